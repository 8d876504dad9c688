"""The config of the embedded default is one that can be trained, whatever the fusion."""

import pytest

from configs import evaluate, shapes
from data_pipelines.shapes import DEFAULT_CONFIG
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import evaluation_from_dict, experiment_from_dict
from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.models.evf_sam import param_shapes
from evf_sam_jax.optimizer import make_optimizer
from evf_sam_jax.param_rules import map_rules
from evf_sam_jax.train_state import split_params


@pytest.mark.parametrize("fusion", ["early", "late", "text"])
def test_rules_cover_the_model(fusion: str):
    config = experiment_from_dict(shapes.get_config(f"fusion={fusion}").to_dict())
    assert config.model.encoder.fusion == fusion
    params = param_shapes(config.model)
    map_rules(lambda factor, leaf: leaf, config.init_scale, params, "init_scale")
    for stage in config.stages:
        trainable, _ = split_params(params, stage.trainable)
        make_optimizer(stage.optimizer, stage.steps, trainable)


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


def test_evaluation_names_what_it_measures():
    values = evaluate.get_config("model=runs/a/model,split=shapes/test,images=10").to_dict()
    config = evaluation_from_dict(values)
    assert (config.model, config.split, config.images) == ("runs/a/model", "shapes/test", 10)
    with pytest.raises(UserError, match="config.model: expected a model directory, found nothing"):
        evaluation_from_dict(evaluate.get_config().to_dict())
