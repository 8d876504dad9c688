"""The command: files of each phrase and each job, bad input, and what becomes of bad files."""

import io
import pathlib
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from evf_sam_jax import predict, visualize
from evf_sam_jax.errors import UserError
from evf_sam_jax.predict import predict_file, write_prediction
from evf_sam_jax.predictor import Predictor
from tests.evf_sam_jax.tiny_model import edited, picture, write_tiny_model

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def predictor(directory: pathlib.Path) -> Predictor:
    return Predictor.load(directory)


# Files: what the command does, called in this process.


def image_file(path: pathlib.Path, height: int = 40, width: int = 60) -> pathlib.Path:
    Image.fromarray(picture(height, width)).save(path)
    return path


def test_pictures_and_lines_of_each_phrase(predictor: Predictor, tmp_path: pathlib.Path):
    texts = ["the red circle", "../../etc/passwd\n\x1b[2J", "圆", "the red circle"]
    ids = predictor.token_ids(texts)
    lines = list(write_prediction(predictor, picture(40, 60), texts, ids, tmp_path))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "0_the_red_circle.png",
        "1_etc_passwd_2j.png",
        "2_phrase.png",
        "3_the_red_circle.png",
        "overlay.png",
    ]
    expected = predictor.predict(picture(40, 60), texts=texts)
    colors = list(visualize.COLORS)
    overlay = picture(40, 60)
    for number, line in enumerate(lines):
        mask = expected.masks[number]
        with Image.open(tmp_path / files[number]) as file:
            np.testing.assert_array_equal(np.asarray(file), mask * np.uint8(255))
        assert line.startswith(repr(texts[number])) and line.isprintable()
        assert f" {mask.sum()} pixels ({mask.mean():.1%})" in line
        assert f"IoU {expected.iou[number]:.3f}, {colors[number]}, {files[number]}" in line
        overlay = visualize.overlay(overlay, mask, visualize.COLORS[colors[number]])
    with Image.open(tmp_path / "overlay.png") as file:
        np.testing.assert_array_equal(np.asarray(file), overlay)


def billion_pixels() -> bytes:
    """The beginning of a PNG whose header says 40,000 x 30,000."""
    file = io.BytesIO()
    Image.new("1", (40_000, 1)).save(file, "PNG")
    header = bytearray(file.getvalue())
    header[20:24] = (30_000).to_bytes(4, "big")
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    return bytes(header)


Case = Callable[[pathlib.Path, pathlib.Path], dict]

# What each gives in place of good arguments, and words of the sentence that answers.
BAD_INPUT: dict[str, tuple[Case, str]] = {
    "no such image": (lambda d, t: {"image": t / "none.png"}, "none.png: expected an image file"),
    "not an image": (lambda d, t: {"image": filled(t / "a.png", b"text")}, "expected an image"),
    "empty image": (lambda d, t: {"image": filled(t / "a.png", b"")}, "found an empty one"),
    "billion pixels": (
        lambda d, t: {"image": filled(t / "a.png", billion_pixels())},
        "pixels, found",
    ),
    "empty phrase": (lambda d, t: {"texts": [" "]}, "is empty"),
    "no phrase": (lambda d, t: {"texts": []}, "--text or by --text_ids, found neither"),
    "texts and ids": (lambda d, t: {"id_lines": ["5"]}, "--text or by --text_ids, found both"),
    "ids that are words": (
        lambda d, t: {"texts": [], "id_lines": ["0 five 2"]},
        "--text_ids: expected numbers",
    ),
    "no tokenizer": (
        lambda d, t: {"model": edited(d, t / "model", has_tokenizer=False)},
        "no tokenizer files: expected token ids instead",
    ),
    "no such model": (lambda d, t: {"model": t / "none"}, "none does not exist"),
    "not a model": (lambda d, t: {"model": t}, "no manifest.json"),
    "model of another version": (
        lambda d, t: {"model": edited(d, t / "model", format_version=99)},
        "expected format_version 1, found 99",
    ),
    "output exists": (lambda d, t: {"out": d}, "--out: expected a path where nothing is yet"),
    "output cannot be written": (
        lambda d, t: {"out": filled(t / "file", b"x") / "out"},
        "--out: cannot make",
    ),
}


def filled(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    directory: pathlib.Path, tmp_path: pathlib.Path, case: str
):
    make, words = BAD_INPUT[case]
    arguments = {
        "model": directory,
        "image": image_file(tmp_path / "image.png"),
        "texts": ["the red circle"],
        "id_lines": [],
        "out": tmp_path / "results" / "out",
    } | make(directory, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        predict_file(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_meanwhile(directory: pathlib.Path, tmp_path: pathlib.Path):
    image = image_file(tmp_path / "image.png")
    # A limit on the size of files is the nearest to a full disk that every machine has.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "import runpy; runpy.run_module('evf_sam_jax.predict', run_name='__main__')"
    )
    arguments = [f"--model={directory}", f"--image={image}", "--text=it", f"--out={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"error: --out: cannot write {tmp_path}/out: File too large\n"
    assert sorted(tmp_path.iterdir()) == [image]


# The command itself, as a process.


def command(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "evf_sam_jax.predict", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_predicts_a_turned_photograph_upright(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90 degrees
    Image.fromarray(picture(40, 60)).save(tmp_path / "photo.jpg", exif=exif)
    flags = ["--text", "the red circle", "--text", "the square, on the left"]
    paths = ["--model", directory, "--image", tmp_path / "photo.jpg", "--out", tmp_path / "out"]
    result = command(*paths, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert "'the red circle': " in result.stdout and "the square, on the left" in result.stdout
    files = sorted((tmp_path / "out").iterdir())
    names = ["0_the_red_circle.png", "1_the_square_on_the_left.png", "overlay.png"]
    assert [file.name for file in files] == names
    for path in files:
        with Image.open(path) as file:
            assert file.size == (40, 60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "none", "--image", "none", "--text", "a"], "--out: expected a path"),
        (["--model", "none", "stray"], "expected flags only, found 'stray'"),
        (
            ["--image", "none", "--out", "o", "--model", "m", "--text", "a"],
            "none: expected an image",
        ),
        (["--dtype", "float16"], "--dtype=float16"),
    ],
)
def test_the_command_answers_a_mistake_in_one_line(arguments: list[str], words: str):
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert result.stderr.count("\n") == 1


def test_importing_predict_defines_no_flags():
    assert not hasattr(predict.flags.FLAGS, "text_ids")
