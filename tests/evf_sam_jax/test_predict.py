"""The command: files of each phrase and each job, bad input, and what becomes of bad files."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from pycocotools import coco

from data_pipelines import image_input
from evf_sam_jax import predict, visualize
from evf_sam_jax.errors import UserError
from evf_sam_jax.predict import Request, predict_files
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


def test_pictures_and_lines_of_each_phrase(
    directory: pathlib.Path, predictor: Predictor, tmp_path: pathlib.Path
):
    texts = ("the red circle", "../../etc/passwd\n\x1b[2J", "圆", "the red circle")
    image, out = image_file(tmp_path / "image.png"), tmp_path / "out"
    lines = predict_files(Request(directory, out, (str(image),), texts=texts)).lines
    files = sorted(path.name for path in out.iterdir())
    assert files == [
        "0_the_red_circle.png",
        "1_etc_passwd_2j.png",
        "2_phrase.png",
        "3_the_red_circle.png",
        "overlay.png",
        "predictions.json",
    ]
    expected = predictor.predict(picture(40, 60), texts=texts)
    colors = list(visualize.COLORS)
    overlay = picture(40, 60)
    assert len(lines) == len(texts)
    for number, line in enumerate(lines):
        mask = expected.masks[number]
        np.testing.assert_array_equal(png(out / files[number]), mask * np.uint8(255))
        assert line.startswith(repr(texts[number])) and line.isprintable()
        assert f" {mask.sum()} pixels ({mask.mean():.1%})" in line
        assert f"IoU {expected.iou[number]:.3f}, {colors[number]}, {files[number]}" in line
        overlay = visualize.overlay(overlay, mask, visualize.COLORS[colors[number]])
    np.testing.assert_array_equal(png(out / "overlay.png"), overlay)


def png(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def test_folders_and_patterns_and_a_bad_file(
    directory: pathlib.Path, predictor: Predictor, tmp_path: pathlib.Path
):
    photos, more = tmp_path / "photos", tmp_path / "more"
    photos.mkdir()
    more.mkdir()
    image_file(photos / "B.PNG", 50, 30)
    image_file(photos / "a.jpg", 40, 60)
    filled(photos / "broken.png", b"no picture")
    filled(photos / "notes.txt", b"no image either")
    filled(photos / "drawing.eps", b"%!PS, which is not read")
    image_file(more / "a.png", 20, 20)
    texts = ("the red circle", "the square")
    images = (str(photos), str(more / "*.png"), str(photos / "a.jpg"))
    request = Request(directory, tmp_path / "out", images, texts=texts, no_target_pixels=200)
    outcome = predict_files(request)
    assert outcome.failures == (
        f"{photos / 'broken.png'}: expected an image file, "
        "found something else than PNG, JPEG, WebP, BMP, GIF or TIFF",
    )
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/*/*"))
    names = ["0_the_red_circle.png", "1_the_square.png", "overlay.png"]
    assert found == [f"{folder}/{name}" for folder in ("a", "a_2", "b") for name in names]
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco.COCO(str(tmp_path / "out" / "predictions.json"))
    files = [photos / "B.PNG", photos / "a.jpg", more / "a.png"]
    assert [image["file_name"] for image in data.imgs.values()] == list(map(str, files))
    annotations = list(data.anns.values())
    assert [a["phrase"] for a in annotations] == list(texts) * 3
    assert {annotation["no_target"] for annotation in annotations} == {True, False}
    for annotation, line in zip(annotations, outcome.lines, strict=True):
        image = image_input.read_image(files[annotation["image_id"] - 1])
        expected = predictor.predict(image, texts=[annotation["phrase"]])
        mask = data.annToMask(annotation)
        assert 0 < mask.sum() == annotation["area"] < mask.size
        # A pixel may be of the other sign by rounding, where others are in the batch.
        assert (mask != expected.masks[0]).mean() < 0.01
        np.testing.assert_array_equal(png(tmp_path / "out" / annotation["file"]), mask * 255)
        assert annotation["predicted_iou"] == pytest.approx(expected.iou[0], abs=1e-3)
        assert annotation["no_target"] == (mask.sum() < 200)
        assert line.endswith(annotation["file"] + ", no target" * annotation["no_target"])


def jobs_file(folder: pathlib.Path, *lines: str) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "jobs.jsonl").write_text("\n".join(lines))
    return folder / "jobs.jsonl"


def test_jobs_of_points_and_boxes_and_those_that_fail(
    directory: pathlib.Path, predictor: Predictor, tmp_path: pathlib.Path
):
    jobs = jobs_file(
        tmp_path / "jobs",
        '{"image": "a.png", "texts": ["it", "that"], "points": [[3, 4, 1], [9, 9, 0]]}',
        "",
        '{"image": "a.png", "box": [1, 2, 61, 4]}',
        '{"image": "none.png", "text": "it"}',
        '{"image": "a.png", "points": [[3, NaN, 1]]}',
        '{"image": "a.png", "box": [0, 0, 1, 1' + "0" * 400 + "]}",
        '{"image": "a.png", "text_ids": [[5, 2]], "box": [1, 2, 60, 4]}',
        '{"image": "a.png", "text": "red \\ud800"}',
        '{"image": "\\ud800.png", "text": "it"}',
    )
    image = image_file(tmp_path / "jobs" / "a.png")
    outcome = predict_files(Request(directory, tmp_path / "out", jobs=jobs))
    missing = tmp_path / "jobs" / "none.png"
    box = "boxes: expected x0 < x1 and y0 < y1 inside an image of 60 x 40, found (1, 2, 61, 4)"
    assert outcome.failures == (
        f"{jobs}:3: {box} in prompt 0",
        f"{jobs}:4: {missing}: expected an image file, found nothing there",
        f"{jobs}:5: points: expected finite numbers, found nan in prompt 0",
        f"{jobs}:6: boxes: expected an array of numbers [any, 4]",
        f"{jobs}:8: the phrase 'red \\ud800' is no Unicode text: expected words, "
        "found half a character",
        f"{jobs}:9: {tmp_path / 'jobs'}/\ud800.png: expected an image file, found nothing there",
    )
    data = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file_name"] for entry in data["images"]] == [str(image)]
    phrases = [annotation["phrase"] for annotation in data["annotations"]]
    assert phrases == ["it", "that", "5 2"]
    pixels = image_input.read_image(image)
    points = {"points": [[[3, 4], [9, 9]]] * 2, "point_labels": [[1, 0]] * 2}
    first = predictor.predict(pixels, texts=["it", "that"], **points)
    second = predictor.predict(pixels, text_ids=[[5, 2]], boxes=[[1, 2, 60, 4]])
    found = [annotation["predicted_iou"] for annotation in data["annotations"]]
    np.testing.assert_allclose(found, np.concatenate([first.iou, second.iou]), atol=1e-3)


def test_several_masks_a_prompt(
    directory: pathlib.Path, predictor: Predictor, tmp_path: pathlib.Path
):
    image = image_file(tmp_path / "image.png")
    texts = ("it",)
    request = Request(directory, tmp_path / "out", (str(image),), texts=texts, multimask=True)
    outcome = predict_files(request)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["0_it_0.png", "0_it_1.png", "0_it_2.png", "overlay.png", "predictions.json"]
    expected = predictor.predict(image_input.read_image(image), texts=texts, multimask=True)
    for i, line in enumerate(outcome.lines):
        assert f"IoU {expected.iou[0, i]:.3f}, vermilion, {files[i]}" in line
        np.testing.assert_array_equal(png(tmp_path / "out" / files[i]), expected.masks[0, i] * 255)
    best = expected.masks[0, expected.iou[0].argmax()]
    overlay = visualize.overlay(picture(40, 60), best, visualize.COLORS["vermilion"])
    np.testing.assert_array_equal(png(tmp_path / "out" / "overlay.png"), overlay)


def test_names_of_classes_get_the_token_of_their_models(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    model = edited(directory, tmp_path / "model")
    tokenizer = next(model.rglob("sentencepiece.bpe.model")).parent
    (tokenizer / "added_tokens.json").write_text('{"[semantic]": 65}')
    image = image_file(tmp_path / "image.png")
    texts = ("red circle", "[semantic] square")
    request = Request(model, tmp_path / "out", (str(image),), texts=texts, semantic=True)
    assert [line.split(":")[0] for line in predict_files(request).lines] == [
        "'[semantic] red circle'",
        "'[semantic] square'",
    ]
    assert (tmp_path / "out" / "0_semantic_red_circle.png").exists()


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
    "no such image": (lambda d, t: {"images": t / "none.png"}, "none.png: expected an image file"),
    "not an image": (lambda d, t: {"images": filled(t / "a.png", b"text")}, "expected an image"),
    "empty image": (lambda d, t: {"images": filled(t / "a.png", b"")}, "found an empty one"),
    "billion pixels": (
        lambda d, t: {"images": filled(t / "a.png", billion_pixels())},
        "pixels, found",
    ),
    "empty phrase": (lambda d, t: {"texts": (" ",)}, "is empty"),
    "no phrase": (lambda d, t: {"texts": ()}, "--text or by --text_ids, found neither"),
    "texts and ids": (lambda d, t: {"id_lines": ("5",)}, "--text or by --text_ids, found both"),
    "ids that are words": (
        lambda d, t: {"texts": (), "id_lines": ("0 five 2",)},
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
    "long name": (lambda d, t: {"images": "a" * 300}, "--image: cannot read aaaa"),
    "empty folder": (lambda d, t: {"images": made(t / "empty")}, "expected images in the folder"),
    "pattern without files": (lambda d, t: {"images": t / "*.bmp"}, "*.bmp', found none"),
    "only bad files": (
        lambda d, t: {"images": filled(made(t / "bad") / "a.png", b"x").parent},
        "a.png: expected an image file",
    ),
    "nothing to predict": (lambda d, t: {"images": ""}, "--image or by --jobs, found neither"),
    "images and jobs": (lambda d, t: {"jobs": t / "a"}, "--image or by --jobs, found both"),
    "jobs and phrases": (
        lambda d, t: {"images": "", "jobs": t / "a"},
        "found --text or --text_ids",
    ),
    "no such jobs": (lambda d, t: asked(t / "none.jsonl"), "--jobs: cannot read"),
    "no jobs": (lambda d, t: asked(jobs_file(t, "", " ")), "expected a job a line in"),
    "token ids of a class": (
        lambda d, t: {"texts": (), "id_lines": ("5",), "semantic": True},
        "--semantic: expected phrases as text",
    ),
    "class for a model without the token": (
        lambda d, t: {"semantic": True},
        "--semantic: expected a model whose tokenizer knows [semantic]",
    ),
    "output exists": (lambda d, t: {"out": d}, "--out: expected a path where nothing is yet"),
    "output cannot be written": (
        lambda d, t: {"out": filled(t / "file", b"x") / "out"},
        "--out: cannot make",
    ),
}


def made(path: pathlib.Path) -> pathlib.Path:
    path.mkdir()
    return path


def asked(jobs: pathlib.Path) -> dict:
    return {"images": "", "texts": (), "jobs": jobs}


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
        "images": image_file(tmp_path / "image.png"),
        "texts": ("the red circle",),
        "out": tmp_path / "results" / "out",
    } | make(directory, tmp_path)
    arguments["images"] = tuple(map(str, [arguments["images"]] if arguments["images"] else []))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        predict_files(Request(**arguments))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


BROKEN_LINES = {
    "{": "expected a json object, found",
    "[1]": "expected a json object, found '[1]'",
    '{"image": "a.png"}': "expected texts, text_ids, points or a box, found none",
    '{"text": "it"}': "'image': expected the path of a file, found None",
    '{"image": "a.png", "phrase": "it"}': "expected the keys image, text, texts, text_ids, points",
    '{"image": "a.png", "text": "it", "texts": []}': "expected one of text, texts and text_ids",
    '{"image": "a.png", "text": 5}': "'texts': expected a list of strings",
    '{"image": "a.png", "texts": ["it", " "]}': "expected phrases of words, found an empty one",
    '{"image": "a.png", "text_ids": [5]}': "'text_ids': expected lists of token ids",
    '{"image": "a.png", "points": [[1, 2]]}': "'points': expected a list of [x, y, 1 or 0]",
    '{"image": ' + "[" * 100_000: "expected a json object, found",
    '{"image": "a.png", "box": [1, 2, 3]}': "'box': expected [x0, y0, x1, y1]",
    '{"image": "a.png", "box": [1, 2, 3, true]}': "'box': expected [x0, y0, x1, y1]",
}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=range(len(BROKEN_LINES)))
def test_a_broken_line_is_named_before_anything_is_predicted(tmp_path: pathlib.Path, line: str):
    jobs = jobs_file(tmp_path, '{"image": "a.png", "text": "it"}', line)
    with pytest.raises(UserError) as error:
        predict_files(Request(tmp_path / "no model", tmp_path / "out", jobs=jobs))
    assert str(error.value).startswith(f"{jobs}:2: ") and BROKEN_LINES[line] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_disk_that_fills_up_meanwhile(directory: pathlib.Path, tmp_path: pathlib.Path):
    image = image_file(tmp_path / "image.png")
    # A limit on the size of files is the nearest to a full disk that every machine has.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "import runpy; runpy.run_module('evf_sam_jax.predict', run_name='__main__')"
    )
    arguments = [f"--model={directory}", f"--image={image}", "--text=it", f"--out={tmp_path}/out"]
    arguments.append("--compilation_cache=")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"error: --out: cannot write {tmp_path}/out: File too large\n"
    assert sorted(tmp_path.iterdir()) == [image]


# The command itself, as a process.


def command(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "evf_sam_jax.predict", "--compilation_cache="]
    line += map(str, arguments)
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
    *files, found = sorted((tmp_path / "out").iterdir())
    names = ["0_the_red_circle.png", "1_the_square_on_the_left.png", "overlay.png"]
    assert [file.name for file in files] == names
    annotations = json.loads(found.read_text())["annotations"]
    assert [entry["file"] for entry in annotations] == names[:2]
    for path in files:
        with Image.open(path) as file:
            assert file.size == (40, 60)


def test_the_command_goes_on_past_a_bad_file_and_says_so(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    image_file(tmp_path / "a.png")
    filled(tmp_path / "b.png", b"no picture")
    paths = ["--model", directory, "--out", tmp_path / "out"]
    result = command(*paths, "--image", tmp_path / "*.png", "--text", "it")
    assert result.returncode == 1
    sentence = "expected an image file, found something else than PNG, JPEG, WebP, BMP, GIF or TIFF"
    assert result.stderr == f"failed: {tmp_path / 'b.png'}: {sentence}\n"
    line, written = result.stdout.splitlines()
    assert line.startswith("'it': ") and "a/0_it.png" in line
    assert written == f"written to {tmp_path / 'out'}"
    assert (tmp_path / "out" / "predictions.json").exists()


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
