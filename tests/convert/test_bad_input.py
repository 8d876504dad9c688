"""Every mistake of a user gets one sentence and exit code 2, and leaves nothing behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from convert import evf_sam
from convert.__main__ import main
from convert.checkpoint_files import open_file
from evf_sam_jax import model_dir
from evf_sam_jax.errors import UserError, run_command
from tests.convert import torch_writer
from tests.convert.checkpoints import TINY, state_dict, write_config, write_evf_sam

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def refusal(tmp_path: Path, capsys) -> Callable[..., str]:
    """Runs a command that must fail; returns its sentence. Nothing new may be left in tmp_path."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            run_command(main, [str(argument) for argument in arguments])
        assert exit_.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


@pytest.fixture(scope="module")
def sam() -> dict[str, np.ndarray]:
    return state_dict("sam")


def test_a_dictionary_of_other_things_is_no_state_dict():
    with pytest.raises(UserError, match="no state dict: .* found dict under 'model'"):
        open_file(GOLDEN / "dtypes.pth")


@pytest.mark.parametrize(
    ("command", "file", "said"),
    [
        ("sam", "missing.pth", "does not exist"),
        ("sam", GOLDEN / "before_1_6.pth", "save it again by"),
        ("sam", GOLDEN / "module.pth", "not a SAM checkpoint of a known size"),
        ("beit3", GOLDEN / "module.pth", "not a BEiT-3 checkpoint of a known size"),
        ("sam", GOLDEN / "dtypes.pth", "found 17 tensors, 0 blocks"),
        ("sam", Path(__file__), "not a PyTorch checkpoint"),
        ("evf-sam", "missing", "does not exist"),
        ("evf-sam", GOLDEN / "module.pth", "expected the directory with config.json and the wei"),
        ("vilt", GOLDEN / "module.pth", "expected the directory with config.json and the weights"),
        ("sam2", GOLDEN, "expected the file of the checkpoint, found a directory"),
        ("beit3", GOLDEN, "expected the file of the checkpoint, found a directory"),
        ("evf-sam", GOLDEN, "has no checkpoint: expected one of model.safetensors"),
    ],
)
def test_files_that_are_not_what_the_command_reads(
    tmp_path: Path, refusal, command: str, file: str | Path, said: str
):
    assert said in refusal(command, tmp_path / file, tmp_path / "model")


@pytest.mark.parametrize(
    ("given", "said"),
    [("sam", "like SAM (ViT)"), ("beit3", "like BEiT-3"), ("clip", "like CLIP (transformers)")],
)
def test_what_beit3_is_given_instead_is_named(tmp_path: Path, refusal, given: str, said: str):
    clip = {"text_model.embeddings.token_embedding.weight": np.zeros((2, 2), np.float32)}
    arrays = clip if given == "clip" else state_dict(given)
    if given == "beit3":  # of no known size
        arrays = {key: array for key, array in arrays.items() if ".layers.0." not in key}
    torch_writer.save(tmp_path / "some.pth", arrays)
    found = refusal("beit3", tmp_path / "some.pth", tmp_path / "model")
    assert "is not a BEiT-3 checkpoint of a known size" in found
    assert f"; it looks {said}" in found


def test_truncated_files(tmp_path: Path, refusal, sam: dict[str, np.ndarray]):
    path = tmp_path / "whole.pth"
    torch_writer.save(path, sam)
    (tmp_path / "half.pth").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "truncated or damaged" in refusal("sam", tmp_path / "half.pth", tmp_path / "model")
    path = tmp_path / "whole.safetensors"
    safetensors.numpy.save_file(sam, path)
    for size in (0, 5, 1000, path.stat().st_size - 1):
        half = tmp_path / "half.safetensors"
        half.write_bytes(path.read_bytes()[:size])
        said = refusal("sam", half, tmp_path / "model")
        assert f"{half} is not a readable safetensors file" in said


def test_a_pickle_that_executes_code(tmp_path: Path, refusal):
    mark = tmp_path / "executed"
    program = b"cposix\nmkdir\n(" + torch_writer.text(str(mark)) + b"tR"
    torch_writer.write_archive(tmp_path / "evil.pth", program)
    assert "asks for posix.mkdir" in refusal("sam", tmp_path / "evil.pth", tmp_path / "model")
    assert not mark.exists()


def test_keys_too_many_too_few_and_of_the_wrong_shape(
    tmp_path: Path, refusal, sam: dict[str, np.ndarray]
):
    wrong = dict(sam)
    wrong["mask_decoder.extra.weight"] = np.zeros(3, np.float32)
    del wrong["mask_decoder.iou_token.weight"]
    wrong["mask_decoder.mask_tokens.weight"] = np.zeros((3, 64), np.float32)
    torch_writer.save(tmp_path / "sam.pth", wrong)
    said = refusal("sam", tmp_path / "sam.pth", tmp_path / "model")
    assert "1 tensor missing: mask_decoder.iou_token.weight" in said
    assert "1 tensor not known to the model: mask_decoder.extra.weight" in said
    assert "mask_decoder.mask_tokens.weight (expected [4, 64], found [3, 64])" in said


def test_a_beit3_whose_shapes_are_wrong_is_refused_before_it_is_interpolated(
    tmp_path: Path, refusal
):
    wrong = state_dict("beit3")
    del wrong["beit3.encoder.layer_norm.A.bias"]
    torch_writer.save(tmp_path / "beit3.pth", wrong)
    arguments = ("beit3", tmp_path / "beit3.pth", tmp_path / "model", "--image_size", 48)
    assert "missing: beit3.encoder.layer_norm.A.bias" in refusal(*arguments)


@pytest.mark.parametrize("size", ["0", "-8", "30", "many"])
def test_image_sizes_that_are_none(tmp_path: Path, refusal, size: str):
    torch_writer.save(tmp_path / "beit3.pth", state_dict("beit3"))
    said = refusal("beit3", tmp_path / "beit3.pth", tmp_path / "model", f"--image_size={size}")
    assert "--image_size" in said


def test_positions_that_are_no_square(tmp_path: Path, refusal):
    wrong = state_dict("beit3")
    wrong["beit3.encoder.embed_positions.A.weight"] = np.zeros((3 + 17, 64), np.float32)
    torch_writer.save(tmp_path / "beit3.pth", wrong)
    assert "has 20 rows" in refusal("beit3", tmp_path / "beit3.pth", tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "config.json does not exist"),
        ("{not json", "is not JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"mm_extractor_scale": "large", "hidden_size": 1024}', "has no sam_scale"),
        ('{"sam_scale": "huge", "hidden_size": 1024}', "has no mm_extractor_scale"),
        (
            '{"sam_scale": ["huge"], "mm_extractor_scale": "large"}',
            "under sam_scale, found ['huge']",
        ),
        (
            '{"sam_scale": "huge", "mm_extractor_scale": "large", "architectures": 5}',
            "expected names under architectures, found 5",
        ),
        (
            '{"evf_sam_jax": {"variant": "x", "config": {"encoder": 5, "segmenter": {}}}}',
            "model.encoder: expected keys with values, found 5",
        ),
    ],
)
def test_configs_that_do_not_say_which_model(
    tmp_path: Path, refusal, sam: dict[str, np.ndarray], config: str | None, said: str
):
    write_evf_sam(tmp_path / "source", sam)
    (tmp_path / "source" / "config.json").unlink()
    if config is not None:
        (tmp_path / "source" / "config.json").write_text(config)
    assert said in refusal("evf-sam", tmp_path / "source", tmp_path / "model")


def test_a_config_of_another_model_than_the_weights(
    tmp_path: Path, refusal, sam: dict[str, np.ndarray]
):
    write_evf_sam(tmp_path / "source", {f"visual_model.{key}": a for key, a in sam.items()})
    said = refusal("evf-sam", tmp_path / "source", tmp_path / "model")
    assert "tensors missing: " in said and "mm_extractor.beit3.text_embed.weight" in said
    assert "look like" not in said  # what there is, is as it should be


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"visual_model.prompt_encoder.invalid_points.weight": 3}, "visual_model.* look like Eff"),
        ({"mm_extractor.vilt.embeddings.text_embeddings.word_embeddings.weight": 3}, "like ViLT"),
        ({"text_model.embeddings.token_embedding.weight": 3}, "it looks like CLIP (transformers)"),
    ],
)
def test_a_config_beside_weights_of_another_family(
    tmp_path: Path, refusal, tensors: dict[str, int], said: str
):
    arrays = {name: np.zeros(length, np.float32) for name, length in tensors.items()}
    write_evf_sam(tmp_path / "source", arrays)
    assert said in refusal("evf-sam", tmp_path / "source", tmp_path / "model")


def test_weights_of_another_released_model_are_named():
    files = {
        "evf-sam": GOLDEN / "evf_sam" / "evf_sam.manifest.json",
        "evf-sam2": GOLDEN / "evf_sam2" / "evf_sam2.manifest.json",
        "evf-effi-sam-tiny": GOLDEN / "evf_effisam" / "evf_effisam_b.manifest.json",
    }
    shapes = {
        variant: {key: tuple(shape) for key, shape in json.loads(file.read_text()).items()}
        for variant, file in files.items()
    }
    for variant, found in shapes.items():
        assert evf_sam.other_model(found, found) == ""
        others = [expected for other, expected in shapes.items() if other != variant]
        for expected in others:
            said = evf_sam.other_model(found, expected)
            assert said == f"; they look like those of {variant}"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "missing.bin"}}', "missing.bin does not exist"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "not in its own directory"),
        ('{"weight_map": {"a": "one.bin"}}', "does not list 'b' in one.bin"),
        ('{"weight_map": {"a": "one.bin", "b": "one.bin", "c": "one.bin"}}', "lists 'c'"),
    ],
)
def test_indices_that_do_not_fit_their_shards(tmp_path: Path, refusal, index: str, said: str):
    source = tmp_path / "source"
    source.mkdir()
    write_config(source)
    tensors = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    torch_writer.save(source / "one.bin", tensors)
    (source / "pytorch_model.bin.index.json").write_text(index)
    assert said in refusal("evf-sam", source, tmp_path / "model")


def test_output_directories_that_exist(tmp_path: Path, refusal, sam: dict[str, np.ndarray]):
    torch_writer.save(tmp_path / "sam.pth", sam)
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for target in ("model", "link", "sam.pth"):
        said = refusal("sam", tmp_path / "sam.pth", tmp_path / target)
        assert str(tmp_path / target) in said


def test_output_directories_that_cannot_be_written(
    tmp_path: Path, refusal, sam: dict[str, np.ndarray]
):
    torch_writer.save(tmp_path / "sam.pth", sam)
    said = refusal("sam", tmp_path / "sam.pth", tmp_path / "sam.pth" / "model")
    assert str(tmp_path / "sam.pth" / "model") in said
    assert "cannot make" in said


def test_a_path_too_long_for_the_system(tmp_path: Path, refusal, sam: dict[str, np.ndarray]):
    torch_writer.save(tmp_path / "sam.pth", sam)
    said = refusal("sam", tmp_path / "sam.pth", tmp_path / ("long" * 100) / "model")
    assert "cannot make" in said and "File name too long" in said
    assert "does not exist" in refusal("inspect", tmp_path / ("long" * 100))
    assert "does not exist" in refusal("evf-sam", tmp_path / ("long" * 100), tmp_path / "model")


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, refusal):
    source, target = tmp_path / "source", tmp_path / "model"
    write_evf_sam(source, state_dict("evf-sam"))
    file = source / "sentencepiece.bpe.model"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "expected a SentencePiece model" in refusal("evf-sam", source, target)
    file.write_bytes((GOLDEN / "tokenizer_parity.model").read_bytes())
    (source / "added_tokens.json").write_text('{"[semantic]": 64002}')
    said = "ids up to 64002, but the model's text embedding has only 128 rows"
    assert said in refusal("evf-sam", source, target)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_directories_without_permission(tmp_path: Path, refusal, sam: dict[str, np.ndarray]):
    torch_writer.save(tmp_path / "sam.pth", sam)
    (tmp_path / "mine").mkdir(mode=0o555)
    said = refusal("sam", tmp_path / "sam.pth", tmp_path / "mine" / "model")
    assert "Permission denied" in said


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, sam: dict[str, np.ndarray]):
    torch_writer.save(tmp_path / "sam.pth", sam)
    # A limit on the size of files is the nearest to a full disk that every machine has.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import runpy; runpy.run_module('convert', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "sam", tmp_path / "sam.pth", tmp_path / "model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'model'} cannot be written: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [tmp_path / "sam.pth"]


@pytest.mark.parametrize("command", ["to-torch", "inspect"])
@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (None, "is not a model directory: it has no manifest.json"),
        ("{", "is not JSON"),
        ('{"format_version": 2}', "expected format_version 1, found 2"),
        ('{"format_version": 1, "colour": "red"}', "is not a manifest"),
        ('{"format_version": 1, "variant": "x", "config": 5}', "an object under config, found 5"),
    ],
)
def test_what_is_no_model_directory(
    tmp_path: Path, refusal, command: str, manifest: str | None, said: str
):
    (tmp_path / "model").mkdir()
    if manifest is not None:
        (tmp_path / "model" / "manifest.json").write_text(manifest)
    arguments = [tmp_path / "out"] if command == "to-torch" else []
    assert said in refusal(command, tmp_path / "model", *arguments)


def test_a_model_directory_whose_parameters_are_not_its_configurations(tmp_path: Path, refusal):
    manifest = model_dir.Manifest("tiny", TINY.to_dict())
    params = {"encoder/text_embed/embedding": np.zeros((128, 64), np.float32)}
    model_dir.write_model_dir(tmp_path / "model", params, manifest)
    said = refusal("to-torch", tmp_path / "model", tmp_path / "out")
    assert "not those of the configuration in its manifest" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["resnet"], "invalid choice: 'resnet'"),
        (["sam", "a.pth"], "MODEL_DIR"),
        (["sam", "a.pth", "b", "--dtype", "int8"], "--dtype"),
        (["sam", "a.pth", "b", "--image_size", "48"], "--image_size"),
    ],
)
def test_commands_that_are_none(refusal, arguments: list[str], said: str):
    assert said in refusal(*arguments)


def test_the_command_itself_shows_no_traceback(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "convert", "sam", tmp_path / "none.pth", tmp_path / "model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'none.pth'} does not exist\n"


def test_help_explains_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "convert", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for command in ("evf-sam", "sam", "beit3", "to-torch", "inspect"):
        assert command in done.stdout
