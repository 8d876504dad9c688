"""The config of the embedded default is one that can be trained, whatever the fusion."""

from pathlib import Path

import numpy as np
import pytest

from configs import evaluate, shapes
from data_pipelines.shapes import DEFAULT_CONFIG
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.config import job_from_dict
from evf_sam_jax.experiment import experiment_from_dict
from evf_sam_jax.initialize import finished_model, initial_params
from evf_sam_jax.model_dir import path_leaves, write_model_dir
from evf_sam_jax.models.evf_sam import param_shapes
from evf_sam_jax.sharding import make_mesh
from evf_sam_jax.train import make_stages, train
from evf_sam_jax.train_state import split_params


@pytest.mark.parametrize("fusion", ["early", "late", "text"])
def test_rules_cover_the_model(fusion: str):
    config = experiment_from_dict(shapes.get_config(f"fusion={fusion}").to_dict())
    assert config.model.encoder.fusion == fusion
    make_stages(config, make_mesh(config.mesh))


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("", {"readout": "image_cls", "early_layers": None}),
        ("early_layers=0", {"early_layers": 0, "readout": "concat"}),
        ("early_layers=2,readout=image_mean", {"early_layers": 2, "readout": "image_mean"}),
        ("fusion=late", {"readout": "concat", "concat": "channels"}),
        ("fusion=late,concat=tokens", {"readout": "concat", "concat": "tokens"}),
        ("fusion=late,readout=text_cls", {"readout": "text_cls"}),
        ("fusion=text", {"readout": "text_cls"}),
        ("size=small,readout=concat", {"readout": "concat", "width": 64, "layers": 4}),
    ],
)
def test_arguments_choose_fusion_and_readout(argument: str, changed: dict):
    config = experiment_from_dict(shapes.get_config(argument).to_dict())
    assert {key: getattr(config.model.encoder, key) for key in changed} == changed
    make_stages(config, make_mesh(config.mesh))


@pytest.mark.parametrize(
    ("argument", "trained"),
    [
        ("", {"encoder", "mask_decoder", "no_mask_embed"}),
        ("train_encoder=false,train_prompt_encoder=false", {"mask_decoder"}),
        ("train_mask_decoder=false,train_prompt_encoder=false", {"encoder"}),
        ("train_prompt_encoder=false", {"encoder", "mask_decoder"}),
        ("pretrain_steps=0", {"encoder", "mask_decoder", "no_mask_embed", "image_encoder"}),
        (
            "pretrain_steps=0,train_encoder=false",
            {"mask_decoder", "no_mask_embed", "image_encoder"},
        ),
    ],
)
def test_arguments_choose_what_phrases_train(argument: str, trained: set):
    config = experiment_from_dict(shapes.get_config(argument).to_dict())
    make_stages(config, make_mesh(config.mesh))
    paths = path_leaves(split_params(param_shapes(config.model), config.stages[-1].trainable)[0])
    assert any(path.startswith("projector/") for path in paths)
    modules = {path.removeprefix("segmenter/prompt_encoder/") for path in paths}
    modules = {path.removeprefix("segmenter/").split("/")[0] for path in modules}
    assert modules == trained | {"projector"}


def test_steps_of_0_leave_a_stage_out():
    def steps(argument: str) -> dict[str, int]:
        config = experiment_from_dict(shapes.get_config(argument).to_dict())
        return {stage.name: stage.steps for stage in config.stages}

    assert steps("") == {"pretrain": 800, "referring": 4000}
    assert steps("pretrain_steps=0,steps=7") == {"referring": 7}
    assert steps("steps=0,size=small") == {"pretrain": 800}
    for none in ("steps=0,pretrain_steps=0", "steps=-1", "segmenter=somewhere,steps=0"):
        with pytest.raises(ValueError, match="'pretrain_steps' and 'steps': expected 0 or more"):
            shapes.get_config(none)


def test_a_run_begins_with_the_segmenter_of_another(tmp_path: Path):
    first = experiment_from_dict(shapes.get_config("size=small,steps=0,seed=3").to_dict())
    params = initial_params(first)
    write_model_dir(tmp_path / "model", *finished_model(first, params, frozenset())[:2])
    argument = f"size=small,fusion=text,segmenter={tmp_path / 'model'}"
    config = experiment_from_dict(shapes.get_config(argument).to_dict())
    assert [stage.name for stage in config.stages] == ["referring"]
    begun = path_leaves(initial_params(config)["segmenter"])
    for path, leaf in path_leaves(params["segmenter"]).items():
        np.testing.assert_array_equal(begun[path], leaf, err_msg=path)


def test_stages_run_in_the_order_given():
    values = shapes.get_config()
    values.stages.another = values.stages.referring
    values.stage_order = ("pretrain", "referring", "another")
    stages = experiment_from_dict(values.to_dict()).stages
    assert [stage.name for stage in stages] == ["pretrain", "referring", "another"]
    values.stage_order = ("pretrain", "another")
    with pytest.raises(UserError, match="stage_order: expected each of another, pretrain, refer"):
        experiment_from_dict(values.to_dict())


def test_the_second_stage_freezes_the_image_encoder_and_trains_what_the_paper_trains():
    config = experiment_from_dict(shapes.get_config().to_dict())
    params = param_shapes(config.model)
    first, second = (split_params(params, stage.trainable) for stage in config.stages)
    assert all(path.startswith("segmenter/") for path in path_leaves(first[0]))
    frozen = path_leaves(second[1])
    assert all(path.startswith("segmenter/") for path in frozen)
    assert not any("mask_decoder" in path for path in frozen)
    assert set(path_leaves(params["segmenter"]["image_encoder"])) <= {
        path.removeprefix("segmenter/image_encoder/") for path in frozen
    }


def test_evaluation_draws_the_same_images_as_training():
    config = experiment_from_dict(shapes.get_config().to_dict())
    assert config.data.shapes == DEFAULT_CONFIG


def test_an_unknown_key_is_named():
    values = shapes.get_config().to_dict()
    values["stages"]["referring"]["optimizer"]["learning_rat"] = 1.0
    where = r"config\.stages\.referring\.optimizer: unknown key 'learning_rat', expected one of"
    with pytest.raises(UserError, match=where):
        experiment_from_dict(values)


def test_a_missing_key_is_named():
    values = shapes.get_config().to_dict()
    del values["stages"]["referring"]["steps"]
    with pytest.raises(UserError, match=r"config\.stages\.referring: the key 'steps' is missing"):
        experiment_from_dict(values)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompts", "words", "prompts: expected one of text, points, boxes, points_and_boxes"),
        ("steps", 0, "steps: expected a positive number, found 0"),
    ],
)
def test_an_impossible_value_is_named(key: str, value, message: str):
    values = shapes.get_config().to_dict()
    values["stages"]["referring"][key] = value
    with pytest.raises(UserError, match=f"stages.referring.{message}"):
        experiment_from_dict(values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.canvas", (64, 64), "data.canvas: expected at least 128 x 128"),
        ("data.workers", -2, "data.workers: expected 0 or more, found -2"),
        ("evaluation.split", "train", "evaluation.split: expected val or test, found 'train'"),
        ("evaluation.panel_images", -1, "evaluation.panel_images: expected 0 or more, found -1"),
        ("evaluation.images", 10_001, "length of shapes/val: expected 1 to 10000, found 10001"),
        ("model.encoder.fusion", "late", "encoder.readout with late fusion: expected concat or"),
        ("model.encoder.heads", 5, "encoder.width: expected a multiple of heads 5, found 96"),
        ("model.encoder.dtype", "float99", "encoder.dtype: expected float32 or bfloat16"),
        ("model.encoder.layers", 0, "encoder.layers: expected a positive integer, found 0"),
        ("model.segmenter.depth", 5, "segmenter.depth: expected a multiple of global_every 2"),
        ("model.segmenter.image_size", 120, "segmenter.image_size: expected a multiple of patch"),
        ("model.profile", "old", "model.profile: expected current or legacy, found 'old'"),
        ("stages.referring.trainable", [["(", True]], "'\\(' is not a regular expression"),
        ("stages.referring.optimizer.warmup_steps", -1, "warmup_steps: expected 0 or more"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    tmp_path: Path, path: str, value, message: str
):
    values = shapes.get_config().to_dict()
    *parents, key = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[key] = value
    with pytest.raises(UserError, match=message):
        train(experiment_from_dict(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluation_names_what_it_measures():
    values = evaluate.get_config("model=runs/a/model,split=shapes/test,images=10").to_dict()
    config = job_from_dict(values)
    assert (config.model, config.split, config.images) == ("runs/a/model", "shapes/test", 10)
    several = "model=m,data=d,split=refcoco/val+refcoco+/testA,dtype=bfloat16,masks=false"
    config = job_from_dict(evaluate.get_config(several).to_dict())
    assert (config.split, config.masks) == ("refcoco/val+refcoco+/testA", False)
    with pytest.raises(UserError, match="config.model: expected a model directory, found nothing"):
        job_from_dict(evaluate.get_config().to_dict())
