"""Whole models of any towers go to PyTorch and come back as they were, and predict."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from convert import evf_sam
from convert.__main__ import main
from convert.to_torch import config_json
from evf_sam_jax import model_dir
from evf_sam_jax.experiment import InitConfig
from evf_sam_jax.initialize import finished_model
from evf_sam_jax.models.clip import ClipConfig
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.released import RELEASED
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.models.vilt import ViltConfig
from evf_sam_jax.predictor import Predictor
from tests.evf_sam_jax import tiny_experiment
from tests.evf_sam_jax.tiny_model import CONFIG, edited, picture, random_params, write_tiny_model

# As far from the defaults as they can be, which is what a careless way back would restore.
CLIP = EvfSamConfig(
    dataclasses.replace(
        ClipConfig.tiny(), image_fit="crop", normalisation="inception", projected=False
    ),
    EfficientSamConfig.tiny(),
)
VILT = EvfSamConfig(
    dataclasses.replace(ViltConfig.tiny(), image_fit="pad", early_layers=2),
    Sam2Config.tiny(),
)
RELEASED_JSON = {
    "evf-sam": {"sam_scale": "huge", "mm_extractor_scale": "large", "hidden_size": 1024},
    "evf-sam2": {
        "architectures": ["EvfSam2Model"],
        "sam_scale": "large",
        "mm_extractor_scale": "large",
        "hidden_size": 1024,
    },
}


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def write_tokenizer(directory: Path, family: str) -> Path:
    directory.mkdir()
    if family == "clip":
        letters = "cdeilr"
        pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
        ids = {piece: number for number, piece in enumerate(pieces)}
        ids |= {"<|startoftext|>": 126, "<|endoftext|>": 127}
        (directory / "vocab.json").write_text(json.dumps(ids))
        (directory / "merges.txt").write_text("#version: 0.2\n")
    else:
        words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle")
        (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    return directory


def write_model(tmp_path: Path, config: EvfSamConfig) -> Path:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", config.encoder.family)
    manifest = model_dir.Manifest("tiny", config.to_dict())
    model_dir.write_model_dir(tmp_path / "model", random_params(config), manifest, tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize("config", [CLIP, VILT], ids=["clip", "vilt"])
def test_other_encoders_go_there_and_back(tmp_path: Path, config: EvfSamConfig) -> None:
    run("to-torch", write_model(tmp_path, config), tmp_path / "torch")
    run("evf-sam", tmp_path / "torch", tmp_path / "again")
    manifest = model_dir.read_manifest(tmp_path / "again")
    assert EvfSamConfig.from_dict(manifest.config) == config
    assert manifest.has_tokenizer
    again = model_dir.path_leaves(model_dir.load_params(tmp_path / "again"))
    params = random_params(config)
    assert set(again) == set(params)
    for path, array in params.items():
        np.testing.assert_array_equal(again[path], array, err_msg=path)


# With the same segmenter, which is compiled once.
@pytest.mark.parametrize("encoder", [CLIP.encoder, VILT.encoder], ids=["clip", "vilt"])
def test_other_encoders_predict(tmp_path: Path, encoder: ClipConfig | ViltConfig) -> None:
    model = write_model(tmp_path, dataclasses.replace(CLIP, encoder=encoder))
    predictor = Predictor.load(model, dtype="float32")
    found = predictor.predict(picture(20, 30), texts=["red", "circle", "red"]).mask_logits
    assert found.shape == (3, 20, 30)
    np.testing.assert_allclose(found[0], found[2], atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_what_was_trained_on_with_another_readout_comes_back_with_it(tmp_path: Path) -> None:
    published = evf_sam.source_config_of("tiny", CONFIG)
    edited(write_tiny_model(tmp_path / "begun"), tmp_path / "source", source_config=published)
    changed = dataclasses.replace(CONFIG.encoder, readout="text_cls", early_layers=2)
    model = dataclasses.replace(CONFIG, encoder=changed)
    init = InitConfig(model=str(tmp_path / "source"))
    experiment = dataclasses.replace(tiny_experiment.EXPERIMENT, model=model, init=init)
    leaves, manifest, aside = finished_model(experiment, random_params(), frozenset())
    model_dir.write_model_dir(tmp_path / "model", leaves, manifest, passthrough=aside)
    run("to-torch", tmp_path / "model", tmp_path / "torch")
    assert EvfSamConfig.from_dict(evf_sam.convert(tmp_path / "torch").config) == model


@pytest.mark.parametrize(
    ("variant", "token", "changes", "own"),
    [
        ("evf-sam", False, {}, False),
        ("evf-sam", False, {"early_layers": 12}, True),
        ("evf-sam", False, {"readout": "text_cls"}, True),
        ("evf-sam2", False, {"profile": "legacy"}, False),
        ("evf-sam2", False, {"profile": "current"}, True),
        ("evf-sam2", True, {"profile": "current"}, False),
        ("evf-sam2", True, {"profile": "legacy"}, True),
    ],
)
def test_a_config_json_that_no_longer_describes_the_model_is_added_to(
    tmp_path: Path, variant: str, token: bool, changes: dict, own: bool
) -> None:
    if token:
        (tmp_path / "added_tokens.json").write_text('{"[semantic]": 64002}')
    config = RELEASED[variant]
    profile = changes.get("profile", "current")
    encoder = {key: value for key, value in changes.items() if key != "profile"}
    encoder = dataclasses.replace(config.encoder, **encoder)
    config = dataclasses.replace(config, encoder=encoder, profile=profile)
    source = RELEASED_JSON[variant]
    manifest = model_dir.Manifest(variant, config.to_dict(), profile=profile, source_config=source)
    content = config_json(manifest, tmp_path)
    assert content is not None
    assert {key: value for key, value in content.items() if key != "evf_sam_jax"} == source
    assert ("evf_sam_jax" in content) == own
    assert evf_sam.described(content, tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "variant"), [({}, "evf-sam"), ({"readout": "text_cls"}, "beit3-sam")]
)
def test_a_released_model_that_is_changed_is_no_longer_called_so(
    tmp_path: Path, changes: dict, variant: str
) -> None:
    config = RELEASED["evf-sam"]
    manifest = model_dir.Manifest("evf-sam", config.to_dict())
    model_dir.write_model_dir(tmp_path / "source", {"projector/x": np.zeros(1)}, manifest)
    model = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **changes))
    init = InitConfig(model=str(tmp_path / "source"))
    experiment = dataclasses.replace(tiny_experiment.EXPERIMENT, model=model, init=init)
    assert finished_model(experiment, {}, frozenset())[1].variant == variant
