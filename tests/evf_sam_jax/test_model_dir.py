"""A model directory holds a model whole, or does not exist; it is read without a second copy."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from evf_sam_jax import model_dir
from evf_sam_jax.errors import UserError
from evf_sam_jax.model_dir import Manifest, load_params, read_manifest, write_model_dir

PARAMS = {
    "encoder": {"layers": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7}},
    "projector": {"bias": np.arange(5).astype(ml_dtypes.bfloat16)},
    "segmenter": {
        "image_encoder": {"kernel": np.arange(6, dtype=np.float16).reshape(2, 3)},
        "mask_decoder": {"token": np.full((), 3, np.float32)},
    },
}
MANIFEST = Manifest(variant="tiny", config={"some": "config"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model_dir(tmp_path / "model", PARAMS, MANIFEST)
    return tmp_path / "model"


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_params(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_parameters_come_back_as_they_were(model: Path):
    params = load_params(model)
    assert_same(params, PARAMS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_cast_while_they_are_read(model: Path, dtype: str):
    assert_same(load_params(model, dtype), jax.tree.map(lambda x: x.astype(dtype), PARAMS))


def test_only_what_is_asked_for_is_read(model: Path):
    (model / "params").rename(model / "moved")  # what is not asked for is not even looked at
    shutil.copytree(model / "moved", model / "params")
    assert_same(
        load_params(model, only="^segmenter/image_encoder/"),
        {"segmenter": {"image_encoder": PARAMS["segmenter"]["image_encoder"]}},
    )
    with pytest.raises(UserError, match="no parameter matches 'decoder/x'"):
        load_params(model, only="decoder/x")


def test_each_leaf_is_placed_where_the_caller_wants_it(model: Path):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=auto, devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(path: str, leaf: np.ndarray) -> jax.Array:
        return jax.device_put(leaf, split if path == "encoder/layers/kernel" else whole)

    params = load_params(model, place=place)
    assert_same(params, PARAMS)
    assert params["encoder"]["layers"]["kernel"].sharding == split
    assert params["projector"]["bias"].sharding == whole


def test_any_orbax_reads_the_parameters(model: Path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(model / "params")
    assert_same(restored, PARAMS)


def test_a_directory_describes_itself_without_reading_parameters(model: Path):
    described = model_dir.describe(model)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in described.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in model_dir.path_leaves(PARAMS).items()
    }


def test_the_manifest_counts_the_parameters_of_each_module(model: Path):
    assert read_manifest(model).parameter_counts == {
        "encoder": 24,
        "projector": 5,
        "segmenter/image_encoder": 6,
        "segmenter/mask_decoder": 1,
        "total": 36,
    }


def test_the_manifest_comes_back_as_it_was(tmp_path: Path):
    manifest = Manifest(
        variant="evf-sam",
        config={"encoder": {"width": 1}},
        profile="legacy",
        source={"a.bin": "0" * 64},
        source_config={"sam_scale": "huge"},
        source_dtypes={"default": "float16"},
        cast_to="bfloat16",
        passthrough={"mask_token": "unused"},
    )
    written = write_model_dir(
        tmp_path / "model", PARAMS, manifest, passthrough={"mask_token": np.ones(3, np.float16)}
    )
    assert read_manifest(tmp_path / "model") == written
    assert written.source == manifest.source
    aside = model_dir.read_passthrough(tmp_path / "model")
    assert_same(aside, {"mask_token": np.ones(3, np.float16)})


def test_leaves_can_be_arrays_of_jax_or_functions_under_whole_paths(tmp_path: Path):
    kernel = PARAMS["encoder"]["layers"]["kernel"]
    params = {
        "encoder/layers/kernel": lambda: kernel,
        "projector": {"bias": jnp.arange(5, dtype=jnp.bfloat16)},
    }
    write_model_dir(tmp_path / "model", params, MANIFEST)
    expected = {key: PARAMS[key] for key in ("encoder", "projector")}
    assert_same(load_params(tmp_path / "model"), expected)


def test_leaves_are_made_one_after_another_and_let_go(tmp_path: Path):
    """A leaf as large as what is written together is alone in memory, whichever way it goes."""
    size = model_dir._TOGETHER_BYTES // 4
    alive: list[weakref.ref] = []
    most = 0

    def make() -> np.ndarray:
        nonlocal most
        gc.collect()
        most = max(most, sum(reference() is not None for reference in alive))
        array = np.zeros(size, np.float32)
        alive.append(weakref.ref(array))
        return array

    write_model_dir(tmp_path / "model", {name: make for name in "abcd"}, MANIFEST)
    assert len(alive) == 4
    assert most == 0
    alive.clear()
    for _, array in model_dir.iterate_params(tmp_path / "model"):
        gc.collect()
        most = max(most, sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(array))
    assert len(alive) == 4
    assert most <= 1  # the one that the loop still names


def test_tokenizer_files_are_copied_and_others_are_not(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("sentencepiece.bpe.model", "added_tokens.json", "pytorch_model.bin"):
        (source / name).write_text(name)
    manifest = write_model_dir(tmp_path / "model", PARAMS, MANIFEST, tokenizer_dir=source)
    assert manifest.has_tokenizer
    copied = sorted(path.name for path in (tmp_path / "model" / "tokenizer").iterdir())
    assert copied == ["added_tokens.json", "sentencepiece.bpe.model"]


def test_a_tokenizer_of_another_name_counts_and_none_does_not(tmp_path: Path):
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm" / "beit3.spm").write_text("")
    assert write_model_dir(tmp_path / "a", PARAMS, MANIFEST, tmp_path / "spm").has_tokenizer
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tokenizer_config.json").write_text("{}")
    assert not write_model_dir(tmp_path / "b", PARAMS, MANIFEST, tmp_path / "config").has_tokenizer
    (tmp_path / "empty").mkdir()
    assert not write_model_dir(tmp_path / "c", PARAMS, MANIFEST, tmp_path / "empty").has_tokenizer
    assert not (tmp_path / "c" / "tokenizer").exists()


def test_nothing_is_left_of_a_directory_that_could_not_be_finished(tmp_path: Path):
    def fail() -> np.ndarray:
        raise UserError("the source is damaged")

    with pytest.raises(UserError, match="the source is damaged"):
        write_model_dir(tmp_path / "model", PARAMS | {"z": fail}, MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_refused_before_any_leaf_is_made(model: Path):
    def fail() -> np.ndarray:
        raise AssertionError("made")

    with pytest.raises(UserError, match=str(model)):
        write_model_dir(model, {"a": fail}, MANIFEST)
    assert_same(load_params(model), PARAMS)


def test_parents_are_made(tmp_path: Path):
    write_model_dir(tmp_path / "a" / "b" / "model", PARAMS, MANIFEST)
    assert_same(load_params(tmp_path / "a" / "b" / "model"), PARAMS)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path):
    model_dir.require_space(tmp_path / "a" / "model", 1)
    with pytest.raises(UserError, match="needs 1000000000.0 GB, and its disk has"):
        model_dir.require_space(tmp_path / "a" / "model", 10**18)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(model: Path, version: Any):
    values = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps(values | {"format_version": version}))
    assert f"expected format_version 1, found {version!r}" in refusal(model)


def test_what_is_no_model_directory_is_refused(tmp_path: Path, model: Path):
    assert "does not exist" in refusal(tmp_path / "none")
    assert "is not a directory" in refusal(model / "manifest.json")
    assert "no manifest.json" in refusal(tmp_path)
    (model / "manifest.json").write_text("{")
    assert "is not JSON" in refusal(model)
    (model / "manifest.json").write_text("[]")
    assert "found None" in refusal(model)


def test_missing_and_truncated_parameters_are_refused(model: Path):
    data = max((model / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data.write_bytes(data.read_bytes()[:-20])
    assert "is damaged" in refusal(model)
    (model / "params" / "_METADATA").unlink()
    assert "is damaged" in refusal(model)
    shutil.rmtree(model / "params")
    assert "is damaged" in refusal(model)
