"""Fine-tuning on one's own photograph, from a model directory to a model directory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs.finetune import get_config
from data_pipelines.datasets import find_dataset
from data_pipelines.prepare import prepare
from data_pipelines.shapes import SHAPES_TOKENIZER
from evf_sam_jax.checkpoints import is_begun
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import DatasetConfig, experiment_from_dict
from evf_sam_jax.feature_cache import cache_features
from evf_sam_jax.model_dir import Manifest, load_params, path_leaves, write_model_dir
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.evf_sam import init_params, param_shapes
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.train import train
from evf_sam_jax.train_state import split_params
from evf_sam_jax.training_data import open_source
from tests.data_pipelines.astronaut import OBJECTS, write_astronaut
from tests.evf_sam_jax.tiny_experiment import MODEL

ROOT = Path(__file__).parents[2]
PHRASES = sum(len(phrases) for phrases, _ in OBJECTS.values())

# With room for phrases that are spelt out letter by letter, for want of words.
ENCODER = dataclasses.replace(MODEL.encoder, max_text_positions=66)
SPELLING_MODEL = dataclasses.replace(MODEL, encoder=ENCODER)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random parameters."""
    path = tmp_path_factory.mktemp("models") / "model"
    params = init_params(SPELLING_MODEL, jax.random.key(0))
    manifest = Manifest(variant="tiny", config=SPELLING_MODEL.to_dict())
    write_model_dir(path, params, manifest, SHAPES_TOKENIZER)
    return path


@pytest.fixture
def directories(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The model, and a photograph with phrases to train and to measure on."""
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write_astronaut(tmp_path / "data", split)
    return model, tmp_path / "data"


def config_of(directories: tuple[Path, Path]) -> ConfigDict:
    model, data = directories
    config = get_config(f"model={model},data={data},steps=3,batch_size=1")
    config.log_every = 1
    config.data.text_lengths = (64,)  # one to compile
    config.mesh.data = 1  # of the eight devices that tests have
    return config


@pytest.mark.slow
def test_a_photograph_is_trained_on(directories: tuple[Path, Path], tmp_path: Path):
    config = experiment_from_dict(config_of(directories).to_dict())
    assert config.model == SPELLING_MODEL
    sums = train(config, tmp_path / "run")
    assert sums.masks == PHRASES and sums.union > 0  # all phrases, although three are in a batch
    before, after = (
        path_leaves(load_params(path)) for path in (directories[0], tmp_path / "run" / "model")
    )
    moved = {name.split("/")[1] for name in before if (before[name] != after[name]).any()}
    assert "mask_decoder" in moved and "image_encoder" not in moved
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("finetune/loss") for line in lines]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


@pytest.mark.slow
def test_features_that_were_cached_train_as_the_photograph(
    directories: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    values = config_of(directories)
    values.feature_cache.dtype = "float32"
    cache_features(experiment_from_dict(values.to_dict()), tmp_path / "features")
    said = capsys.readouterr().out
    assert said.startswith("1 images, 0.0") and "1 images have features, in 0.0" in said
    losses = []
    for features in ("", str(tmp_path / "features")):
        values.data.features = features
        workdir = tmp_path / f"run{bool(features)}"
        train(experiment_from_dict(values.to_dict()), workdir)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line).get("finetune/loss") for line in lines]
        losses.append([loss for loss in found if loss is not None])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    # Of another encoder, they are refused before the first checkpoint.
    values.unlock()
    values.model = {"segmenter": {"dtype": "bfloat16"}}
    with pytest.raises(UserError, match="expected features of this run's segmenter"):
        train(experiment_from_dict(values.to_dict()), tmp_path / "other")
    assert not is_begun(epath.Path(tmp_path / "other"), "finetune")


@pytest.mark.slow
def test_held_out_phrases_without_room_are_named(directories, tmp_path: Path):
    config = config_of(directories)
    config.stages.finetune.steps = 1
    config.data.text_lengths = (16, 25)
    sums = train(experiment_from_dict(config.to_dict()), tmp_path / "run")
    (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert "own_jsonl/val" in line and '"held_out": true' in line
    assert sums.masks < PHRASES


def test_unreadable_images_are_listed_and_stop_the_run(directories, tmp_path: Path):
    data = directories[1]
    line = {"image": "broken.png", "phrase": "the strip", "mask": [[1, 1, 9, 1, 9, 9]]}
    photograph = (data / "astronaut.png").read_bytes()
    (data / "broken.png").write_bytes(photograph[:4000])
    lines = (data / "train.jsonl").read_text() + json.dumps(line) + "\n"
    (data / "train.jsonl").write_text(lines)
    config = config_of(directories)
    config.stages.finetune.steps = 8
    config.data.max_skipped = 1
    with pytest.raises(UserError, match="at most data.max_skipped = 1 examples that cannot be"):
        train(experiment_from_dict(config.to_dict()), tmp_path / "run")
    listed = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert len(listed) == 2
    for line in map(json.loads, listed):
        assert "broken.png" in line["example"] and "broken.png" in line["reason"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": [{"name": "nothing", "root": "."}]}, "data set 'nothing': expected one of"),
        ({"train": []}, "data.train: expected at least one data set"),
        ({"train": [{"name": "own_jsonl"}]}, "config.data.train: the key 'root' is missing"),
        (
            {"train": [{"name": "own_jsonl", "root": ".", "rules": {"size": 3}}]},
            "unknown rule 'size'",
        ),
    ],
)
def test_a_mixture_that_cannot_be(directories, tmp_path: Path, change: dict, message: str):
    values = config_of(directories).to_dict()
    values["data"] = {**values["data"], **change}
    with pytest.raises(UserError, match=message):
        train(experiment_from_dict(values), tmp_path / "run")


def test_held_out_images_that_cannot_be_read_do_not_cost_the_model(directories, tmp_path: Path):
    model, data = directories
    photograph = (data / "astronaut.png").read_bytes()
    (data / "broken.png").write_bytes(photograph[:4000])
    lines = (data / "val.jsonl").read_text()
    (data / "val.jsonl").write_text(lines.replace("astronaut.png", "broken.png"))
    config = config_of(directories)
    config.stages.finetune.steps = 8  # as above, for one to compile
    sums = train(experiment_from_dict(config.to_dict()), tmp_path / "run")
    assert sums.masks == 0
    assert (tmp_path / "run" / "model" / "manifest.json").exists()
    assert not (tmp_path / "run" / "panel.png").exists()
    assert "broken.png" in (tmp_path / "run" / "skipped.jsonl").read_text()


# Without the type checks of the tests, which would speak before the configuration does.
REFUSALS = """
import json, sys
from evf_sam_jax.checkpoints import is_begun
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import experiment_from_dict
from evf_sam_jax.training_data import open_source
values = json.loads(sys.argv[1])
for change in json.loads(sys.argv[2]):
    try:
        config = experiment_from_dict({**values, "data": {**values["data"], **change}})
        open_source(config.data.train[0])
    except UserError as error:
        print(error)
"""


def test_values_of_wrong_types_are_refused(directories):
    own = {"name": "own_jsonl", "root": str(directories[1])}
    cases = [
        ({"train": "own_jsonl"}, "config.data.train: expected a list of data sets, found 'own_"),
        ({"train": ["own_jsonl"]}, "config.data.train: expected keys with values, found 'own_j"),
        ({"train": [{**own, "root": 3}]}, "data: expected root as a string, found 3"),
        ({"train": [{**own, "weight": "much"}]}, "data: expected weight as a number, found 'mu"),
        ({"train": [{**own, "rules": "sum"}]}, "config.data.train: expected keys with values, f"),
        ({"train": [{**own, "rules": {"prefix": 3}}]}, "prefix: expected a string, found 3"),
        ({"train": [{**own, "rules": {"overlap": "max"}}]}, "overlap: expected union or sum, fo"),
        (
            {"train": [{**own, "rules": {"without_categories": "hair"}}]},
            "without_categories: expected a list, found 'hair'",
        ),
        ({"text_lengths": 16}, "data.text_lengths: expected a list, found 16"),
        ({"text_lengths": [0]}, "data.text_lengths: expected a positive number, found 0"),
        ({"canvases": [640]}, "data.canvases: expected heights and widths, found 640"),
        ({"max_skipped": -1}, "data.max_skipped: expected 0 or more, found -1"),
        ({"workers": "two"}, "data.workers: expected 0 or more, found 'two'"),
    ]
    values = json.dumps(config_of(directories).to_dict())
    changes = json.dumps([change for change, _ in cases])
    command = [sys.executable, "-c", REFUSALS, values, changes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    sentences = done.stdout.splitlines()
    assert len(sentences) == len(cases), done.stdout
    for sentence, (_, beginning) in zip(sentences, cases, strict=True):
        assert sentence.startswith(beginning)


def test_a_config_changes_single_values_of_the_model_that_a_run_begins_with(directories):
    values = config_of(directories).to_dict()
    plain = experiment_from_dict(values).model
    changed = experiment_from_dict({**values, "model": {"encoder": {"remat": True}}}).model
    assert changed == dataclasses.replace(
        plain, encoder=dataclasses.replace(plain.encoder, remat=True)
    )


def test_a_model_comes_from_one_place(directories):
    values = config_of(directories).to_dict()
    values["init"]["encoder"] = values["init"]["model"]
    with pytest.raises(UserError, match="init: expected model, or encoder and segmenter, found b"):
        experiment_from_dict(values)


def test_a_model_directory_that_is_not_there(directories, tmp_path: Path):
    config = config_of((tmp_path / "nowhere", directories[1]))
    with pytest.raises(UserError, match="nowhere does not exist"):
        experiment_from_dict(config.to_dict())


def test_what_is_for_evaluation_only_is_not_trained_on(directories, tmp_path: Path):
    values = config_of(directories).to_dict()
    values["data"]["train"] = [{"name": "refcoco_m", "root": str(tmp_path), "split": "val"}]
    with pytest.raises(UserError, match="expected data to train on, found refcoco_m"):
        train(experiment_from_dict(values), tmp_path / "run")


def test_a_prepared_data_set_is_read_in_place_of_its_files(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    write_astronaut(data)
    loose = open_source(DatasetConfig("own_jsonl", str(data)))
    prepare(find_dataset("own_jsonl"), data, tmp_path / "prepared", "train")
    (data / "astronaut.png").unlink()
    rules = (("text", "lower"), ("prefix", "find "))
    prepared = open_source(DatasetConfig("own_jsonl", str(tmp_path / "prepared"), rules=rules))
    assert prepared[0].phrases == tuple(f"find {p.lower()}" for p in loose.entry(0).phrases)
    assert prepared[0].masks.any(axis=(1, 2)).all()


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_that_is_not_above_zero(directories, tmp_path: Path, weight: float):
    values = config_of(directories).to_dict()
    values["data"]["train"][0]["weight"] = weight
    with pytest.raises(UserError, match="expected weights above 0"):
        train(experiment_from_dict(values), tmp_path / "run")


@pytest.mark.parametrize(
    ("segmenter", "trained"),
    [
        (SamConfig.tiny(), {"mask_decoder", "prompt_encoder/no_mask_embed"}),
        (
            Sam2Config.tiny(),
            {
                "mask_decoder",
                "image_encoder/neck/conv_s0",
                "image_encoder/neck/conv_s1",
                "prompt_encoder/no_mask_embed",
            },
        ),
        (EfficientSamConfig.tiny(), {"mask_decoder"}),
    ],
    ids=["sam", "sam2", "efficient_sam"],
)
def test_of_every_segmenter_the_decoder_is_trained(tmp_path: Path, segmenter, trained: set[str]):
    model = dataclasses.replace(MODEL, segmenter=segmenter)
    manifest = Manifest(variant="tiny", config=model.to_dict())
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    config = experiment_from_dict(get_config(f"model={tmp_path},data=there").to_dict())
    params, _ = split_params(param_shapes(config.model), config.stages[0].trainable)
    paths = {path.removeprefix("segmenter/") for path in path_leaves(params)}
    assert {path.split("/")[0] for path in paths} > {"encoder", "projector"}
    rest = {path for path in paths if not path.startswith(("encoder/", "projector/"))}
    assert all(path.startswith(tuple(trained)) for path in rest)
    assert all(any(path.startswith(name) for path in rest) for name in trained)


def test_model_and_data_must_be_given():
    with pytest.raises(ValueError, match="'model': expected a directory, found nothing"):
        get_config("data=here")
