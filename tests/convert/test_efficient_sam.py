"""EfficientSAM's checkpoints become model directories and come back."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from convert import efficient_sam, evf_sam
from convert.__main__ import main
from convert.table import Plan, Table, make_plan
from convert.to_model_dir import leaf_shapes
from evf_sam_jax import model_dir
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.released import RELEASED
from tests import golden_checkpoint
from tests.convert import torch_writer
from tests.convert.checkpoints import BRAIN, HALF, state_dict

TINY = EfficientSamConfig.tiny()
WHOLE = dataclasses.replace(EvfSamConfig.tiny(), segmenter=TINY)
SECTION = {"segmenter": WHOLE.to_dict()["segmenter"]}
MASK_TOKEN = "mm_extractor.beit3.vision_embed.mask_token"


def plan_of(table: Table, config: dict) -> Plan:
    return make_plan(table, leaf_shapes(config))


def arrays_of(shapes: dict[str, tuple[int, ...]], dtypes: list) -> dict[str, np.ndarray]:
    """Random arrays whose dtypes go by turns, within stacks too."""
    rng = np.random.default_rng(0)
    return {
        key: np.asarray(rng.normal(size=shape)).astype(dtypes[turn % len(dtypes)])
        for turn, (key, shape) in enumerate(sorted(shapes.items()))
    }


def tiny_arrays(dtypes: list) -> dict[str, np.ndarray]:
    return arrays_of(plan_of(efficient_sam.table(TINY), SECTION).source_shapes(), dtypes)


def there_and_back(command: str, source: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    main([command, str(source), str(tmp_path / "model")])
    main(["to-torch", str(tmp_path / "model"), str(tmp_path / "back")])
    return safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("wrapped_in", ["model", None])
def test_official_files_go_there_and_back(tmp_path: Path, wrapped_in: str | None):
    arrays = tiny_arrays([np.float32, HALF, BRAIN])
    torch_writer.save(tmp_path / "efficient_sam_vitt.pt", arrays, wrapped_in=wrapped_in)
    found = there_and_back("efficient-sam", tmp_path / "efficient_sam_vitt.pt", tmp_path)
    assert_identical(found, arrays)
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert manifest.variant == "efficient_sam_tiny"
    assert manifest.config == SECTION


def test_evf_efficient_sam_goes_there_and_back(tmp_path: Path):
    shapes = plan_of(evf_sam.table(WHOLE), WHOLE.to_dict()).source_shapes()
    arrays = arrays_of(shapes | {MASK_TOKEN: (1, 1, WHOLE.encoder.width)}, [np.float16])
    source = tmp_path / "source"
    source.mkdir()
    config = evf_sam.source_config_of("tiny", WHOLE)
    (source / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.numpy.save_file(arrays, source / "model.safetensors")
    assert_identical(there_and_back("evf-sam", source, tmp_path), arrays)
    assert (tmp_path / "back" / "config.json").read_text() == (source / "config.json").read_text()
    assert EvfSamConfig.from_dict(model_dir.read_manifest(tmp_path / "model").config) == WHOLE


@pytest.mark.parametrize(("variant", "letter"), [("evf-effi-sam-tiny", "b"), ("evf-effi-sam", "l")])
def test_the_table_is_the_original_at_full_size(variant: str, letter: str):
    manifest = golden_checkpoint.EVF_EFFISAM / f"evf_effisam_{letter}.manifest.json"
    config = RELEASED[variant]
    expected = {key: tuple(shape) for key, shape in json.loads(manifest.read_text()).items()}
    assert expected.pop(MASK_TOKEN) == (1, 1, config.encoder.width)
    assert plan_of(evf_sam.table(config), config.to_dict()).source_shapes() == expected


def test_parameters_are_the_sources_tensors_in_their_new_places(tmp_path: Path):
    arrays = tiny_arrays([np.float32])
    torch_writer.save(tmp_path / "some.pt", arrays, wrapped_in="model")
    main(["efficient-sam", str(tmp_path / "some.pt"), str(tmp_path / "model")])
    params = model_dir.load_params(tmp_path / "model")["segmenter"]
    for row, name in enumerate(("invalid_points", "point_embeddings", "bbox_top_left_embeddings")):
        np.testing.assert_array_equal(
            params["prompt_encoder"]["point_embeddings"][row],
            arrays[f"prompt_encoder.{name}.weight"][0],
        )
    np.testing.assert_array_equal(
        params["image_encoder"]["pos_embed"], arrays["image_encoder.pos_embed"][0]
    )
    np.testing.assert_array_equal(
        params["image_encoder"]["blocks"]["mlp"]["fc1"]["kernel"][2],
        arrays["image_encoder.blocks.2.mlp.fc1.weight"].T,
    )
    hyper = params["mask_decoder"]["output_hypernetworks_mlps"]
    name = "mask_decoder.output_hypernetworks_mlps.3.{}.weight"
    np.testing.assert_array_equal(
        hyper["layers_1"]["kernel"][3], arrays[name.format("layers.1.0")].T
    )
    np.testing.assert_array_equal(hyper["layers_2"]["kernel"][3], arrays[name.format("fc")].T)


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("efficient-sam", "sam", "looks like SAM (ViT)"),
        ("efficient-sam", "beit3", "looks like BEiT-3"),
        ("sam", "efficient-sam", "looks like EfficientSAM"),
        ("sam2", "efficient-sam", "looks like EfficientSAM"),
    ],
)
def test_a_checkpoint_of_another_family(tmp_path: Path, command: str, given: str, said: str):
    arrays = tiny_arrays([np.float32]) if given == "efficient-sam" else state_dict(given)
    torch_writer.save(tmp_path / "some.pt", arrays, wrapped_in="model")
    with pytest.raises(UserError) as error:
        main([command, str(tmp_path / "some.pt"), str(tmp_path / "model")])
    assert said in str(error.value)


def test_a_checkpoint_of_another_size(tmp_path: Path):
    arrays = tiny_arrays([np.float32])
    arrays["image_encoder.pos_embed"] = np.zeros((1, 50, TINY.width), np.float32)
    torch_writer.save(tmp_path / "some.pt", arrays, wrapped_in="model")
    with pytest.raises(UserError) as error:
        main(["efficient-sam", str(tmp_path / "some.pt"), str(tmp_path / "model")])
    assert "not an EfficientSAM checkpoint of a known size" in str(error.value)
    assert f"3 blocks, and image_encoder.pos_embed [1, 50, {TINY.width}]" in str(error.value)
