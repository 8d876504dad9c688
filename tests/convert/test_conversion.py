"""What goes from PyTorch to a model directory comes back as it was, by the commands themselves."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert.__main__ import main
from convert.beit3 import interpolate_positions
from data_pipelines.shapes import SHAPES_TOKENIZER
from evf_sam_jax import model_dir
from evf_sam_jax.models.evf_sam import EvfSamConfig, param_shapes
from tests.convert import torch_writer
from tests.convert.checkpoints import (
    BRAIN,
    HALF,
    MASK_TOKEN,
    TINY,
    state_dict,
    write_config,
    write_evf_sam,
)

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def read(directory: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / "model.safetensors")


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names, and under each the same dtype, shape and bits."""
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key


def save_shards(directory: Path, arrays: dict[str, np.ndarray], stem: str, suffix: str) -> None:
    """Two shards and their index, named as transformers names them."""
    names = [f"{stem}-0000{part}-of-00002.{suffix}" for part in (1, 2)]
    keys = sorted(arrays)
    parts = {names[0]: keys[: len(keys) // 3], names[1]: keys[len(keys) // 3 :]}
    for name, part in parts.items():
        tensors = {key: arrays[key] for key in part}
        if suffix == "bin":
            torch_writer.save(directory / name, tensors)
        else:
            safetensors.numpy.save_file(tensors, directory / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("files", "dtype"),
    [
        ("model.safetensors", "float32"),
        ("model.safetensors", "mixed"),
        ("sharded safetensors", HALF),
        ("pytorch_model.bin", BRAIN),
        ("sharded bin", "mixed"),
    ],
)
def test_evf_sam_goes_there_and_back(tmp_path: Path, files: str, dtype: np.dtype | str):
    arrays = state_dict("evf-sam", dtype)
    source, model, back = tmp_path / "source", tmp_path / "model", tmp_path / "back"
    source.mkdir()
    write_config(source)
    if files == "model.safetensors":
        safetensors.numpy.save_file(arrays, source / files)
    elif files == "pytorch_model.bin":
        torch_writer.save(source / files, arrays)
    elif files == "sharded bin":
        save_shards(source, arrays, "pytorch_model", "bin")
    else:
        save_shards(source, arrays, "model", "safetensors")
    run("evf-sam", source, model)
    run("to-torch", model, back)
    assert_identical(read(back), arrays)
    assert (back / "config.json").read_text() == (source / "config.json").read_text()


@pytest.mark.parametrize("family", ["sam", "beit3"])
@pytest.mark.parametrize("dtype", ["float16", "mixed"])
def test_foundation_models_go_there_and_back(tmp_path: Path, family: str, dtype: str):
    arrays = state_dict(family, dtype)
    source, model, back = tmp_path / "some.pth", tmp_path / "model", tmp_path / "back"
    torch_writer.save(source, arrays, wrapped_in="model" if family == "beit3" else None)
    run(family, source, model)
    run("to-torch", model, back)
    assert_identical(read(back), arrays)
    tower = {"sam": "segmenter", "beit3": "encoder"}[family]
    assert set(model_dir.load_params(model)) == {tower}
    assert set(model_dir.read_manifest(model).config) == {tower}


def test_a_model_directory_says_what_it_holds_and_where_it_came_from(tmp_path: Path):
    arrays = state_dict("evf-sam", "float16")
    write_evf_sam(tmp_path / "source", arrays)
    run("evf-sam", tmp_path / "source", tmp_path / "model")
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert EvfSamConfig.from_dict(manifest.config) == TINY
    assert (manifest.variant, manifest.profile) == ("tiny", "current")
    assert not manifest.has_tokenizer
    assert re.fullmatch(r"[0-9a-f]{64}", manifest.source["model.safetensors"])
    assert manifest.source_dtypes == {"default": "float16"}
    unused = MASK_TOKEN["evf-sam"]
    assert set(manifest.passthrough) == {unused}
    used = sum(array.size for key, array in arrays.items() if key != unused)
    assert manifest.parameter_counts["total"] == used
    assert sum(manifest.parameter_counts.values()) == 2 * used


def test_the_profile_of_a_configuration_goes_there_and_back(tmp_path: Path):
    write_evf_sam(tmp_path / "source", state_dict("evf-sam"))
    config = {**TINY.to_dict(), "profile": "legacy"}
    write_config(tmp_path / "source", evf_sam_jax={"variant": "tiny", "config": config})
    run("evf-sam", tmp_path / "source", tmp_path / "model")
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert (manifest.profile, manifest.config["profile"]) == ("legacy", "legacy")


def test_parameters_are_the_sources_tensors_in_their_new_places(tmp_path: Path):
    arrays = state_dict("evf-sam")
    write_evf_sam(tmp_path / "source", arrays)
    run("evf-sam", tmp_path / "source", tmp_path / "model")
    params = model_dir.load_params(tmp_path / "model")
    layers = params["encoder"]["layers"]["self_attn"]["q_proj"]["text"]["kernel"]
    name = "mm_extractor.beit3.encoder.layers.{}.self_attn.q_proj.B.weight"
    np.testing.assert_array_equal(layers[1], arrays[name.format(1)].T)
    last = params["encoder"]["last_layer"]["self_attn"]["q_proj"]["text"]["kernel"]
    np.testing.assert_array_equal(last, arrays[name.format(2)].T)
    blocks = params["segmenter"]["image_encoder"]["groups"]
    name = "visual_model.image_encoder.blocks.{}.mlp.lin1.weight"
    np.testing.assert_array_equal(
        blocks["windowed"]["mlp"]["lin1"]["kernel"][1, 0], arrays[name.format(2)].T
    )
    np.testing.assert_array_equal(
        blocks["global"]["mlp"]["lin1"]["kernel"][1], arrays[name.format(3)].T
    )
    upscaling = params["segmenter"]["mask_decoder"]["output_upscaling"]["conv1"]["kernel"]
    source = arrays["visual_model.mask_decoder.output_upscaling.0.weight"]
    np.testing.assert_array_equal(upscaling[1, 0], source[:, :, 1, 0])


def test_tokenizer_files_travel_with_the_model(tmp_path: Path):
    source = tmp_path / "source"
    write_evf_sam(source, state_dict("evf-sam"))
    files = {
        "sentencepiece.bpe.model": (SHAPES_TOKENIZER / "sentencepiece.bpe.model").read_bytes(),
        "added_tokens.json": b'{"[semantic]": 100}',
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / "README.md").write_text("not the tokenizer's")
    run("evf-sam", source, tmp_path / "model")
    assert model_dir.read_manifest(tmp_path / "model").has_tokenizer
    run("to-torch", tmp_path / "model", tmp_path / "back")
    for directory in (tmp_path / "model" / "tokenizer", tmp_path / "back"):
        assert {name: (directory / name).read_bytes() for name in files} == files
        assert not (directory / "README.md").exists()


def test_without_a_tokenizer_it_says_that_only_ids_can_be_used(tmp_path: Path, capsys):
    write_evf_sam(tmp_path / "source", state_dict("evf-sam"))
    run("evf-sam", tmp_path / "source", tmp_path / "model")
    assert "only token ids can be used" in capsys.readouterr().out


def test_what_is_ignored_is_kept_aside_and_its_reason_given(tmp_path: Path, capsys):
    arrays = state_dict("beit3")
    torch_writer.save(tmp_path / "beit3.pth", arrays, wrapped_in="model")
    run("beit3", tmp_path / "beit3.pth", tmp_path / "model")
    said = capsys.readouterr().out
    heads = [key for key in arrays if "head" in key or key == "logit_scale"]
    for key in (*heads, MASK_TOKEN["beit3"]):
        assert f"{key} is kept aside: " in said
    aside = model_dir.read_passthrough(tmp_path / "model")
    assert set(aside) == {*heads, MASK_TOKEN["beit3"]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_done_written_down_and_not_undone(tmp_path: Path, capsys, dtype: str):
    arrays = state_dict("sam")
    torch_writer.save(tmp_path / "sam.pth", arrays)
    run("sam", tmp_path / "sam.pth", tmp_path / "model", "--dtype", dtype)
    assert f"cast to {dtype}" in capsys.readouterr().out
    assert {str(leaf.dtype) for leaf in model_dir.describe(tmp_path / "model").values()} == {dtype}
    assert model_dir.read_manifest(tmp_path / "model").cast_to == dtype
    run("to-torch", tmp_path / "model", tmp_path / "back")
    assert f"were cast to {dtype}" in capsys.readouterr().out
    wanted = BRAIN if dtype == "bfloat16" else HALF
    assert_identical(read(tmp_path / "back"), {k: a.astype(wanted) for k, a in arrays.items()})


def test_a_cast_that_loses_nothing_is_undone(tmp_path: Path, capsys):
    arrays = state_dict("sam", "mixed")
    torch_writer.save(tmp_path / "sam.pth", arrays)
    run("sam", tmp_path / "sam.pth", tmp_path / "model", "--dtype", "float32")
    assert {leaf.dtype for leaf in model_dir.describe(tmp_path / "model").values()} == {
        np.dtype(np.float32)
    }
    run("to-torch", tmp_path / "model", tmp_path / "back")
    assert_identical(read(tmp_path / "back"), arrays)


def test_what_training_changed_goes_back_in_the_dtype_it_was_trained_in(tmp_path: Path):
    arrays = state_dict("sam", "float16")
    torch_writer.save(tmp_path / "sam.pth", arrays)
    run("sam", tmp_path / "sam.pth", tmp_path / "model")
    params = model_dir.load_params(tmp_path / "model", dtype="float32")
    token = params["segmenter"]["mask_decoder"]["iou_token"]
    params["segmenter"]["mask_decoder"]["iou_token"] = token + 1e-6
    manifest = model_dir.read_manifest(tmp_path / "model")
    model_dir.write_model_dir(tmp_path / "trained", params, manifest)
    run("to-torch", tmp_path / "trained", tmp_path / "back")
    expected = {**arrays, "mask_decoder.iou_token.weight": np.asarray(token + 1e-6)}
    assert_identical(read(tmp_path / "back"), expected)


def test_a_model_trained_here_goes_to_torch_and_comes_back(tmp_path: Path):
    rng = np.random.default_rng(0)
    leaves = model_dir.path_leaves(param_shapes(TINY))
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in leaves.items()}
    manifest = model_dir.Manifest(variant="tiny", config=TINY.to_dict())
    model_dir.write_model_dir(tmp_path / "model", params, manifest)
    run("to-torch", tmp_path / "model", tmp_path / "torch")
    run("evf-sam", tmp_path / "torch", tmp_path / "again")
    again = model_dir.path_leaves(model_dir.load_params(tmp_path / "again"))
    assert set(again) == set(params)
    for path, array in params.items():
        np.testing.assert_array_equal(again[path], array)
    assert model_dir.read_manifest(tmp_path / "again").config == TINY.to_dict()


def test_positions_are_interpolated_for_another_image_size(tmp_path: Path, capsys):
    arrays = state_dict("beit3")
    torch_writer.save(tmp_path / "beit3.pth", arrays, wrapped_in="model")
    run("beit3", tmp_path / "beit3.pth", tmp_path / "model", "--image_size", "48")
    assert "positions interpolated" in capsys.readouterr().out
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert manifest.config["encoder"]["image_size"] == 48
    table = model_dir.load_params(tmp_path / "model", only="vision_positions")
    table = table["encoder"]["vision_positions"]["embedding"]
    source = arrays["beit3.encoder.embed_positions.A.weight"]
    assert table.shape == (3 + 36, TINY.encoder.width)
    np.testing.assert_array_equal(table[:3], source[:3])
    np.testing.assert_array_equal(table, interpolate_positions(source, 6))
    run("to-torch", tmp_path / "model", tmp_path / "back")
    back = read(tmp_path / "back")
    np.testing.assert_array_equal(back.pop("beit3.encoder.embed_positions.A.weight"), table)
    del arrays["beit3.encoder.embed_positions.A.weight"]
    assert_identical(back, arrays)


def test_a_checkpoint_of_another_image_size_is_recognised_by_its_positions(tmp_path: Path):
    arrays = state_dict("beit3")
    name = "beit3.encoder.embed_positions.A.weight"
    arrays[name] = interpolate_positions(arrays[name], 6)
    torch_writer.save(tmp_path / "beit3.pth", arrays, wrapped_in="model")
    run("beit3", tmp_path / "beit3.pth", tmp_path / "model")
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert (manifest.variant, manifest.config["encoder"]["image_size"]) == ("beit3_tiny", 48)


def test_interpolation_to_the_same_size_changes_nothing():
    positions = np.random.default_rng(0).normal(size=(3 + 16, 8)).astype(np.float32)
    np.testing.assert_array_equal(interpolate_positions(positions, 4), positions)


@pytest.mark.torch
@pytest.mark.parametrize("side", [7, 12, 20, 30])
def test_interpolation_is_pytorchs(side: int):
    import torch

    positions = np.random.default_rng(0).normal(size=(3 + 196, 32)).astype(np.float32)
    grid = torch.from_numpy(positions[3:]).reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        grid, size=(side, side), mode="bicubic", align_corners=False
    )
    expected = resized.permute(0, 2, 3, 1).reshape(side * side, 32).numpy()
    found = interpolate_positions(positions, side)
    np.testing.assert_array_equal(found[:3], positions[:3])
    # PyTorch computes where to sample in float32.
    np.testing.assert_allclose(found[3:], expected, atol=1e-5, rtol=0)


def test_inspect_prints_modules_parameters_dtypes_and_bytes(tmp_path: Path, capsys):
    write_evf_sam(tmp_path / "source", state_dict("evf-sam", "float16"))
    run("evf-sam", tmp_path / "source", tmp_path / "model")
    capsys.readouterr()
    run("inspect", tmp_path / "model")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["module", "parameters", "dtype", "bytes"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    encoder = TINY.encoder
    words = encoder.vocab_size * encoder.width
    assert rows["encoder/text_embed"] == [f"{words:,}", "float16", f"{2 * words:,}"]
    modules = [row for name, row in rows.items() if "/" in name]
    total = [sum(int(row[column].replace(",", "")) for row in modules) for column in (0, 2)]
    assert rows["total"] == [f"{total[0]:,}", "float16", f"{total[1]:,}"]
    assert any(line.startswith(f"kept aside: {MASK_TOKEN['evf-sam']}") for line in lines)


def test_the_command_itself_runs_without_pytorch(tmp_path: Path):
    torch_writer.save(tmp_path / "sam.pth", state_dict("sam"))
    code = (
        "import sys; sys.modules['torch'] = None\n"  # importing it would fail
        "import runpy; sys.argv[0] = 'convert'; runpy.run_module('convert', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "sam", tmp_path / "sam.pth", tmp_path / "model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {tmp_path / 'model'}: sam_tiny, ")


@pytest.mark.torch
def test_the_originals_checkpoints_go_there_and_back(tmp_path: Path):
    """A model of the PyPI package, saved by torch, comes back to load into it strictly."""
    import safetensors.torch
    import torch

    from tests.parity import originals

    registry = originals.segment_anything().sam_model_registry
    torch.manual_seed(0)
    model = registry["vit_b"]()
    path = tmp_path / "sam_vit_b.pth"
    torch.save(model.state_dict(), path)
    run("sam", path, tmp_path / "model")
    assert model_dir.read_manifest(tmp_path / "model").variant == "sam_vit_b"
    run("to-torch", tmp_path / "model", tmp_path / "back")
    state = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    model.load_state_dict(state, strict=True)
    for key, tensor in torch.load(path, weights_only=True).items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.slow
def test_the_full_size_goes_there_and_back_within_its_memory(tmp_path: Path):
    """1.3 billion float32 parameters: bit-identical, in the model's size and 1.5 GB."""
    from tests import golden_checkpoint

    source, model, back = tmp_path / "source", tmp_path / "model", tmp_path / "back"
    source.mkdir()
    golden_checkpoint.write_evf_sam(source)
    arguments = ["evf-sam", source, model]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "convert", *arguments], cwd=ROOT)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    assert process.returncode == 0
    written = sum(leaf.size * leaf.dtype.itemsize for leaf in model_dir.describe(model).values())
    print(
        f"convert evf-sam: {time.monotonic() - start:.0f} s, peak RssAnon {peak / 1e9:.2f} GB "
        f"(bar: {written / 1e9:.2f} GB of output + 1.5 GB)"
    )
    assert peak <= written + 1.5e9
    run("to-torch", model, back)
    with (
        safetensors.safe_open(source / "model.safetensors", "numpy") as before,
        safetensors.safe_open(back / "model.safetensors", "numpy") as after,
    ):
        assert set(after.keys()) == set(before.keys())
        for key in before.keys():
            assert_identical({key: after.get_tensor(key)}, {key: before.get_tensor(key)})
