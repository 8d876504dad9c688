"""The paper's recipes: what they train and read, and one of them run on tiny foundations."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import multitask, refcoco, semantic_mix
from data_pipelines.shapes import SHAPES_TOKENIZER
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import ExperimentConfig, experiment_from_dict
from evf_sam_jax.model_dir import Manifest, load_params, path_leaves, read_manifest, write_model_dir
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.evf_sam import init_params, param_shapes
from evf_sam_jax.models.released import RELEASED
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.sharding import make_mesh
from evf_sam_jax.stage import make_stage
from evf_sam_jax.train import train
from evf_sam_jax.train_state import split_params
from evf_sam_jax.training_data import open_data
from tests.data_pipelines.refer_files import write_refer_root
from tests.data_pipelines.test_label_maps import write as write_label_maps
from tests.evf_sam_jax.tiny_experiment import MODEL

ROOT = Path(__file__).parents[2]
RECIPES = {"refcoco": refcoco, "multitask": multitask, "semantic_mix": semantic_mix}
REFER_SETS = {
    "refclef": "refs(unc).p",
    "refcoco": "refs(unc).p",
    "refcoco+": "refs(unc).p",
    "refcocog": "refs(umd).p",
}
ENCODERS = {"beit3_large": Beit3Config.large(), "beit3_base": Beit3Config.base()}
SEGMENTERS = {
    "sam_vit_h": SamConfig.vit_h(),
    "sam_vit_l": SamConfig.vit_l(),
    "sam_vit_b": SamConfig.vit_b(),
}
# As the original counts them, without the mask token, of which nothing is computed.
ENCODER = {"beit3_large": 672_702_464 - 1024, "beit3_base": 220_987_392 - 768}
PROJECTOR = {"beit3_large": 1_312_000, "beit3_base": 787_456}
MASK_DECODER, NO_MASK_EMBED = 4_058_340, 256
ADDED_TOKENS = '{"[semantic]": 65}'  # the first id that the tokenizer of the shapes leaves free


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Foundations of the released sizes, without parameters."""
    root = tmp_path_factory.mktemp("full_size")
    for tower, configs in {"encoder": ENCODERS, "segmenter": SEGMENTERS}.items():
        for name, config in configs.items():
            manifest = Manifest(variant=name, config={tower: dataclasses.asdict(config)})
            (root / name).mkdir()
            text = json.dumps(dataclasses.asdict(manifest))
            (root / name / "manifest.json").write_text(text)
    tokenizer = root / "beit3_large" / "tokenizer"
    shutil.copytree(SHAPES_TOKENIZER, tokenizer)
    (tokenizer / "added_tokens.json").write_text(ADDED_TOKENS)
    return root


@pytest.fixture(scope="module")
def foundations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny foundations under the names that the recipes give them."""
    root = tmp_path_factory.mktemp("foundations")
    params = init_params(MODEL, jax.random.key(0))
    for name, tower in {"beit3_large": "encoder", "sam_vit_h": "segmenter"}.items():
        manifest = Manifest(variant="tiny", config={tower: MODEL.to_dict()[tower]})
        tokenizer = SHAPES_TOKENIZER if tower == "encoder" else None
        write_model_dir(root / name, {tower: params[tower]}, manifest, tokenizer)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the four data sets of referring expressions, and two of classes."""
    root = tmp_path_factory.mktemp("data")
    for folder, refs in REFER_SETS.items():
        one = tmp_path_factory.mktemp("one")
        write_refer_root(one, folder=folder, file=refs)
        shutil.copytree(one, root, dirs_exist_ok=True)
    for split in ("training", "validation"):
        write_label_maps(root, f"ade20k/annotations/{split}", f"ade20k/images/{split}")
    write_label_maps(root, "humanparsing/SegmentationClassAug", "humanparsing/JPEGImages")
    return root


def tiny(config: ConfigDict) -> ExperimentConfig:
    """A recipe in shapes that tests can compute."""
    config.data.text_lengths = (30,)
    config.data.canvases = ((64, 64),)
    config.mesh.data = 1  # of the eight devices that tests have
    return experiment_from_dict(config.to_dict())


def sizes(params: dict) -> dict[str, int]:
    """Elements below each of the names that trainable parameters are spoken of by."""
    counts: dict[str, int] = {}
    for path, leaf in path_leaves(params).items():
        names = path.split("/")
        name = names[0] if names[0] != "segmenter" else names[1]
        counts[name] = counts.get(name, 0) + leaf.size
    return counts


@pytest.mark.parametrize("recipe", RECIPES)
def test_rules_cover_the_model_of_the_paper(recipe: str, full_size: Path):
    config = RECIPES[recipe].get_config(f"foundations={full_size},data=there,fsdp=4")
    experiment = experiment_from_dict(config.to_dict())
    towers = {"encoder": {"remat": True}, "segmenter": {"encoder_chunk": 1}}
    expected = RELEASED["evf-sam"]
    for tower, changes in towers.items():
        changed = dataclasses.replace(getattr(expected, tower), dtype="bfloat16", **changes)
        expected = dataclasses.replace(expected, **{tower: changed})
    assert experiment.model == expected
    (stage,) = experiment.stages
    shapes = make_stage(experiment, stage, make_mesh(experiment.mesh)).shapes
    assert sizes(shapes.trainable) == {
        "encoder": ENCODER["beit3_large"],
        "projector": PROJECTOR["beit3_large"],
        "mask_decoder": MASK_DECODER,
        "prompt_encoder": NO_MASK_EMBED,
    }
    leaves = path_leaves(shapes.frozen)
    # Matrices are cast, and the random Fourier features of positions, norms and biases are not.
    cast = sum(leaf.size for leaf in leaves.values() if leaf.dtype == "bfloat16")
    assert cast > 0.98 * sum(leaf.size for leaf in leaves.values())
    kept = "segmenter/prompt_encoder/pe_layer/positional_encoding_gaussian_matrix"
    assert leaves[kept].dtype == "float32"
    assert all(path.startswith("segmenter/") for path in leaves)
    assert {leaf.dtype.name for leaf in path_leaves(shapes.trainable).values()} == {"float32"}


def test_a_plan_needs_the_sizes_of_the_foundations_alone(full_size: Path, tmp_path: Path):
    given, sizes_alone = (
        experiment_from_dict(refcoco.get_config(f"foundations={root},data=there").to_dict())
        for root in (full_size, "none")
    )
    assert sizes_alone == dataclasses.replace(given, init=sizes_alone.init)
    with pytest.raises(UserError, match="init: expected model or encoder, whose tokenizer"):
        train(sizes_alone, tmp_path / "run")


@pytest.mark.parametrize(
    ("argument", "found", "looks"),
    [
        ("encoder=beit3_large", "beit3_base", "beit3_base"),
        ("segmenter=sam_vit_h", "sam_vit_b", "sam_vit_b"),
        ("encoder=clip_l14", "beit3_base", "beit3_base"),
    ],
)
def test_a_foundation_in_the_place_of_another_is_named(
    argument: str, found: str, looks: str, full_size: Path, tmp_path: Path
):
    _, name = argument.split("=")
    shutil.copytree(full_size / found, tmp_path / name)
    with pytest.raises(
        ValueError, match=f"{name}: expected {name}, found a model that looks like {looks}"
    ):
        refcoco.get_config(f"foundations={tmp_path},data=there,{argument}")


def test_values_are_those_of_the_paper(full_size: Path):
    config = refcoco.get_config(f"foundations={full_size},data=there")
    experiment = experiment_from_dict(config.to_dict())
    (stage,) = experiment.stages
    optimizer = stage.optimizer
    assert (stage.batch_size, stage.accumulate, stage.steps) == (128, 2, 15_000)
    assert (stage.loss.bce, stage.loss.dice, stage.prompts) == (1.0, 1.0, "text")
    assert (optimizer.learning_rate, optimizer.schedule) == (1e-4, "linear")
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.95, 0.0)
    assert (optimizer.warmup_steps, optimizer.clip_norm) == (100, 1.0)
    assert (experiment.mesh.zero_stage, experiment.init.frozen_dtype) == (2, "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        ("encoder=beit3_base", {"encoder", "projector", "mask_decoder", "prompt_encoder"}),
        (
            "encoder=beit3_base,train_encoder=false,train_prompt_encoder=false",
            {"projector", "mask_decoder"},
        ),
        (
            "encoder=beit3_base,train_mask_decoder=false,train_prompt_encoder=false",
            {"encoder", "projector"},
        ),
        (
            "encoder=beit3_base,train_prompt_encoder=false",
            {"encoder", "projector", "mask_decoder"},
        ),
    ],
)
def test_flags_say_what_is_trained(arguments: str, trained: set[str], full_size: Path):
    arguments = f"foundations={full_size},data=there,segmenter=sam_vit_b,{arguments}"
    experiment = experiment_from_dict(refcoco.get_config(arguments).to_dict())
    assert experiment.model.segmenter.width == SamConfig.vit_b().width
    shapes = param_shapes(experiment.model)
    trainable, frozen = split_params(shapes, experiment.stages[0].trainable)
    expected = {
        "encoder": ENCODER["beit3_base"],
        "projector": PROJECTOR["beit3_base"],
        "mask_decoder": MASK_DECODER,
        "prompt_encoder": NO_MASK_EMBED,
    }
    assert sizes(trainable) == {name: expected[name] for name in trained}
    assert {*path_leaves(trainable), *path_leaves(frozen)} == {*path_leaves(shapes)}


def test_more_can_be_trained(full_size: Path):
    more = "also_train=segmenter/image_encoder/neck/.*"
    arguments = f"foundations={full_size},data=there,encoder=beit3_base,segmenter=sam_vit_b,{more}"
    experiment = experiment_from_dict(refcoco.get_config(arguments).to_dict())
    shapes = param_shapes(experiment.model)
    trainable, _ = split_params(shapes, experiment.stages[0].trainable)
    neck = sum(
        leaf.size for leaf in path_leaves(shapes["segmenter"]["image_encoder"]["neck"]).values()
    )
    assert sizes(trainable)["image_encoder"] == neck


def test_values_can_be_changed_on_the_command_line(full_size: Path, tmp_path: Path):
    config = f"configs/refcoco.py:foundations={full_size},data={tmp_path}"
    trainable = '--config.stages.refer.trainable=(("nothing/.*", True), (".*", False))'
    command = [sys.executable, "-m", "evf_sam_jax.main", "--config", config, trainable]
    command += ["--workdir", str(tmp_path / "run"), "--config.data.train[0].weight=2"]
    command += ["--compilation_cache="]  # not the user's
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("the rule 'nothing/.*' matches no parameter\n")


def test_each_set_of_referring_expressions_is_drawn_from_alike():
    train = refcoco.get_config("foundations=there,data=there").data.train
    assert [entry["name"] for entry in train] == list(REFER_SETS)
    assert [entry["weight"] for entry in train] == [0.25] * 4
    train = refcoco.get_config("foundations=there,data=there,refclef=none,overlap=sum").data.train
    assert [entry["name"] for entry in train] == list(REFER_SETS)[1:]
    assert {entry["rules"]["overlap"] for entry in train} == {"sum"}
    assert sum(entry["weight"] for entry in train) == pytest.approx(1.0)


def test_other_splits_of_the_refs():
    arguments = "refclef=berkeley,refcoco=google,refcocog=google,strict=true"
    data = refcoco.get_config(f"foundations=there,data=there,{arguments}").data
    names = ["refclef_berkeley", "refcoco_google", "refcoco+", "refcocog_google"]
    assert [entry["name"] for entry in data.train] == names
    assert data.held_out[0]["name"] == "refcoco_google"
    splits = [f"{entry['name']}/{entry['split']}" for entry in data.exclude_images_of]
    assert splits == [
        "refcoco_google/val",
        "refcoco_google/test",
        "refcoco+/val",
        "refcoco+/testA",
        "refcoco+/testB",
        "refcocog_google/val",
    ]


def test_multitask_draws_referring_expressions_three_times_as_often_as_each_other():
    train = multitask.get_config("foundations=there,data=there").data.train
    weights = {entry["name"]: entry["weight"] for entry in train}
    others = ("objects365", "ade20k", "pascal_part", "partimagenet", "human_parsing")
    assert weights == {**dict.fromkeys(REFER_SETS, 0.75), **dict.fromkeys(others, 1.0)}
    arguments = "foundations=there,data=there,refer=0,objects365=0.5,ade20k=0,pascal_part=0"
    train = multitask.get_config(f"{arguments},partimagenet=0").data.train
    assert [(entry["name"], entry["weight"]) for entry in train] == [
        ("objects365", 0.5),
        ("human_parsing", 1.0),
    ]


def test_classes_have_the_prefix_that_a_recipe_says(foundations: Path, data: Path, tmp_path: Path):
    both = f"data={data},held_out=ade20k,mapillary=0"
    plain = open_data(tiny(semantic_mix.get_config(f"foundations={foundations},{both}")))
    assert plain.mixture.sources[-1].entry(0).phrases == ("sky", "windowpane")
    assert plain.held_out.entry(0).phrases == ("sky", "windowpane")

    with pytest.raises(ValueError, match=r'the token \[semantic\], as in {"\[semantic\]": 65}'):
        semantic_mix.get_config(f"foundations={foundations},{both},prefix=true")
    others = f"data={data},objects365=0,pascal_part=0,partimagenet=0,background=false"
    with pytest.raises(ValueError, match="tokenizer/added_tokens.json: expected the token"):
        multitask.get_config(f"foundations={foundations},{others}")

    shutil.copytree(foundations, tmp_path / "multitask")
    tokenizer = tmp_path / "multitask" / "beit3_large" / "tokenizer"
    (tokenizer / "added_tokens.json").write_text(ADDED_TOKENS)
    config = semantic_mix.get_config(f"foundations={tmp_path / 'multitask'},{both},prefix=true")
    prefixed = open_data(tiny(config))
    for entry in (prefixed.mixture.sources[-1].entry(0), prefixed.held_out.entry(0)):
        assert entry.phrases == ("[semantic] sky", "[semantic] windowpane")
    config = multitask.get_config(f"foundations={tmp_path / 'multitask'},{others}")
    sources = open_data(tiny(config)).mixture.sources
    phrases = [source.entry(0).phrases for source in sources]
    assert phrases[0][0] == "Left triangle "
    assert phrases[-2] == ("[semantic] sky", "[semantic] windowpane")
    assert phrases[-1] == ("[semantic] sunglasses", "[semantic] right shoe")  # no background


def test_strict_leaves_out_images_of_evaluation(
    foundations: Path, data: Path, caplog: pytest.LogCaptureFixture
):
    arguments = f"foundations={foundations},data={data}"
    opened = open_data(tiny(refcoco.get_config(arguments)))
    assert [len(source) for source in opened.mixture.sources] == [2, 2, 2, 2]
    assert "left out" not in caplog.text
    opened = open_data(tiny(refcoco.get_config(f"{arguments},strict=true")))
    # RefCLEF has pictures of its own.
    assert [len(source) for source in opened.mixture.sources] == [2, 1, 1, 1]
    said = [message for message in caplog.messages if "left out" in message]
    assert [message.split(",")[0] for message in said] == [
        "refclef/train: left out 0 of 2 images",
        *(f"{name}/train: left out 1 of 2 images" for name in ("refcoco", "refcoco+", "refcocog")),
    ]


@pytest.mark.slow
def test_tiny_foundations_are_trained_as_the_recipe_says(
    foundations: Path, data: Path, tmp_path: Path
):
    arguments = f"foundations={foundations},data={data},steps=3,batch_size=2,phrases=2"
    config = refcoco.get_config(arguments)
    config.log_every = 1
    config.stages.refer.optimizer.warmup_steps = 1  # the first two steps have rate 0
    for tower in ("encoder", "segmenter"):
        config.model[tower].dtype = "float32"  # bfloat16 takes XLA twice as long on a CPU
    assert train(tiny(config), tmp_path / "run").masks == 1  # RefCOCO val has one phrase here
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("refer/loss") for line in metrics]
    assert np.isfinite([loss for loss in losses if loss is not None]).sum() == 3

    model = tmp_path / "run" / "model"
    assert read_manifest(model).has_tokenizer
    before = {}
    for name in ("beit3_large", "sam_vit_h"):
        before |= path_leaves(load_params(foundations / name))
    after = path_leaves(load_params(model))
    moved = {path for path in before if (before[path] != after[path]).any()}
    frozen = {path for path in before if path.startswith("segmenter/image_encoder/")}
    assert moved.isdisjoint(frozen)  # to the bit: they were cast for training only
    assert "segmenter/prompt_encoder/no_mask_embed" in moved
    assert {"encoder", "segmenter"} == {path.split("/")[0] for path in moved}
    assert set(after) - set(before) == {path for path in after if path.startswith("projector/")}


def test_a_run_can_begin_with_a_whole_model(full_size: Path, tmp_path: Path):
    manifest = Manifest(variant="evf-sam", config=RELEASED["evf-sam-base"].to_dict())
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    config = multitask.get_config(f"model={tmp_path},data=there")
    experiment = experiment_from_dict(config.to_dict())
    assert experiment.model.encoder.width == Beit3Config.base().width
    assert (experiment.init.model, experiment.init.encoder) == (str(tmp_path), "")


@pytest.mark.parametrize(("name", "warned"), [("evf-sam2", True), ("evf-sam", False)])
def test_another_profile_than_a_model_was_trained_with_is_told_where_it_matters(
    name: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trained, other = RELEASED[name].profile, {"legacy": "current", "current": "legacy"}
    manifest = Manifest(variant=name, config=RELEASED[name].to_dict(), profile=trained)
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    arguments = f"model={tmp_path},data=there,profile={other[trained]}"
    experiment_from_dict(refcoco.get_config(arguments).to_dict())
    said = f"config.model.profile: {other[trained]}, but {tmp_path} was trained with {trained}"
    assert (said in caplog.text) == warned


def encoder_of(arguments: str) -> Any:
    values = refcoco.get_config(f"data=there,{arguments}").to_dict()
    return experiment_from_dict(values).model.encoder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("fusion=late", {"fusion": "late", "readout": "concat"}),
        ("fusion=late,readout=text_cls", {"fusion": "late", "readout": "text_cls"}),
        ("fusion=text", {"fusion": "text", "readout": "text_cls"}),
        ("early_layers=0", {"early_layers": 0, "readout": "concat"}),
        ("early_layers=12", {"early_layers": 12, "readout": "image_cls"}),
        ("early_layers=all", {"early_layers": None, "readout": "image_cls"}),
        ("encoder=vilt_b32", {"readout": "text_cls", "image_fit": "stretch"}),
        ("encoder=vilt_b32,fusion=late,image_fit=pad", {"readout": "concat", "image_fit": "pad"}),
        ("encoder=clip_l14,fusion=text", {"fusion": "text", "readout": "text_eos"}),
        ("encoder=clip_l14,image_fit=crop", {"readout": "concat", "image_fit": "crop"}),
    ],
)
def test_the_usual_is_read_out_of_each_fusion(arguments: str, expected: dict):
    encoder = encoder_of(f"foundations=none,{arguments}")
    assert {key: getattr(encoder, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", ("early", 12, "text_cls")),
        ("early_layers=all", ("early", None, "text_cls")),
        ("early_layers=as_it_is,readout=image_mean", ("early", 12, "image_mean")),
        ("fusion=late", ("late", None, "concat")),
        ("fusion=text,early_layers=all", ("text", None, "text_cls")),
        ("fusion=early,early_layers=3", ("early", 3, "text_cls")),
    ],
)
def test_what_a_model_has_chosen_can_be_undone(tmp_path: Path, arguments: str, expected: tuple):
    model = RELEASED["evf-sam-base"]
    encoder = dataclasses.replace(model.encoder, early_layers=12, readout="text_cls")
    config = dataclasses.replace(model, encoder=encoder).to_dict()
    manifest = Manifest(variant="evf-sam-base", config=config)
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    found = encoder_of(f"model={tmp_path},{arguments}")
    assert (found.fusion, found.early_layers, found.readout) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("early_layers=x", "'early_layers': expected as_it_is, all or a number, found 'x'"),
        ("fusion=late,early_layers=3", "early_layers with late fusion: expected None, found 3"),
        ("early_layers=0,readout=image_cls", "readout with early fusion in no layer: expected"),
        (
            "encoder=clip_l14,early_layers=3",
            "clip has no such choice and its fusion is late or text",
        ),
        ("image_fit=crop", "'image_fit': expected none, as beit3 has no such choice"),
        ("encoder=vilt_b32,projected=true", "'projected': expected none, as vilt has no such"),
        ("encoder=vilt_b32,image_fit=crop", "encoder.image_fit: expected stretch or pad"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused(arguments: str, message: str):
    with pytest.raises((UserError, ValueError), match=message):
        encoder_of(f"foundations=none,{arguments}")


def test_an_encoder_that_has_no_semantic_token_is_named(tmp_path: Path):
    tokenizer = tmp_path / "vilt_b32" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhair\n")
    arguments = f"foundations={tmp_path},encoder=vilt_b32,data=there"
    with pytest.raises(ValueError, match="found that of an encoder that has no such token"):
        semantic_mix.get_config(f"{arguments},prefix=true")
    semantic_mix.get_config(arguments)


def test_directories_of_the_wrong_kind_are_named(full_size: Path):
    config = refcoco.get_config(f"foundations={full_size},data=there")
    config.init.encoder = config.init.segmenter
    with pytest.raises(
        UserError, match=r"init\.encoder: expected a model directory with encoder, found sam_vit_h"
    ):
        experiment_from_dict(config.to_dict())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("foundations=there", "'data': expected a directory, found nothing"),
        ("data=there", "'foundations' and 'model': expected a directory for one .*, found neither"),
        ("data=there,foundations=a,model=b", "'foundations' and 'model': .*, found both"),
        ("encoder=clip", "'encoder': expected beit3_large or beit3_base or .*, found 'clip'"),
        ("zero_stage=4", "'zero_stage': expected 2 or 1 or 3, found '4'"),
        ("strict=1", "'strict': expected true or false, found '1'"),
        ("held_out=coco", "'held_out': expected .*refcoco or refcoco.*, found 'coco'"),
        ("rate=2", "unknown config argument 'rate', expected one of: foundations, encoder"),
    ],
)
def test_wrong_arguments_are_named(recipe: str, arguments: str, message: str):
    with pytest.raises(ValueError, match=message):
        RECIPES[recipe].get_config(arguments)
