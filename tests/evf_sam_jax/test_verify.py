"""The published masks are recognised, others are not, and what is missing is named."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_input
from evf_sam_jax import model_dir, verify
from evf_sam_jax.errors import UserError
from evf_sam_jax.predictor import Predictor
from evf_sam_jax.verify import Case, Verdict, compare
from tests.evf_sam_jax import tiny_model

ROOT = pathlib.Path(__file__).parents[2]
# The shapes' tokenizer cuts the phrases into more tokens than the tiny model has positions for.
CONFIG = dataclasses.replace(
    tiny_model.CONFIG,
    encoder=dataclasses.replace(tiny_model.CONFIG.encoder, max_text_positions=66),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Of a seed whose masks are neither empty nor full."""
    return tiny_model.write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", CONFIG, seed=10)


@pytest.fixture(scope="module")
def predictor(directory: pathlib.Path) -> Predictor:
    return Predictor.load(directory)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pictures of the photographs' names and sizes."""
    path = tmp_path_factory.mktemp("photos")
    for number, case in enumerate(verify.published_cases()):
        picture = tiny_model.picture(*case.mask.shape, seed=number)
        Image.fromarray(picture).save(path / case.image, quality=95)
    return path


def test_the_published_masks_are_whole():
    cases = verify.published_cases()
    recorded = json.loads((ROOT / "evf_sam_jax" / "published_masks.json").read_text())["cases"]
    assert [case.mask.sum() for case in cases] == [case["pixels"] for case in recorded]
    assert len({case.image for case in cases}) == 5
    for case in cases:
        assert compare(case.mask, case.mask).verdict is Verdict.MATCHES


def disk(radius: float, x: float = 50) -> np.ndarray:
    rows, columns = np.mgrid[:100, :100]
    return (rows - 50) ** 2 + (columns - x) ** 2 < radius**2


def test_a_comparison_by_hand():
    published = np.zeros((6, 6), bool)
    published[:4, :4] = True  # it touches the border of the image
    found = published.copy()
    found[0, 0], found[5, 5] = False, True
    comparison = compare(found, published)
    assert (comparison.iou, comparison.differing, comparison.outline) == (15 / 17, 2, 12)
    empty = np.zeros((6, 6), bool)
    assert compare(empty, empty).iou == 1 and compare(empty, published).iou == 0


@pytest.mark.parametrize("radius", [15, 40])
def test_an_outline_that_moves_less_than_half_a_pixel_matches(radius: int):
    assert compare(disk(radius + 0.2), disk(radius)).verdict is Verdict.MATCHES
    assert compare(disk(radius, x=50.3), disk(radius)).verdict is Verdict.MATCHES
    assert compare(disk(radius + 1), disk(radius)).verdict is Verdict.SAME_THING
    assert compare(disk(radius, x=52), disk(radius)).verdict is Verdict.SAME_THING
    assert compare(disk(radius / 2), disk(radius)).verdict is Verdict.DIFFERS
    assert compare(np.zeros((100, 100), bool), disk(radius)).verdict is Verdict.DIFFERS


def test_a_model_that_made_the_masks_matches(
    predictor: Predictor, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    def own(case: Case) -> Case:
        """The tiny model's own mask, as if it had been published."""
        file = photos / case.image
        [mask] = predictor.predict(image_input.read_image(file), texts=[case.phrase]).masks
        return Case(case.image, hashlib.sha256(file.read_bytes()).hexdigest(), case.phrase, mask)

    cases = [own(case) for case in verify.published_cases()]
    assert verify.print_comparison(predictor, photos, cases) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6, "no note on files"
    assert lines[0].startswith("zebra.jpg 'zebra top left': IoU 1.0000, 0 of 273280 pixels differ")
    assert lines[-1] == "5 of 5 masks match the published ones"
    # One mask of another thing is enough.
    cases[3] = dataclasses.replace(cases[3], mask=~cases[3].mask)
    assert verify.print_comparison(predictor, photos, cases) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("bus.jpg") and lines[3].endswith(": does not match")
    assert lines[-1] == "4 of 5 masks match the published ones"


def test_other_outlines_are_told_from_other_things():
    same, near = compare(disk(15), disk(15)), compare(disk(16), disk(15))
    assert verify.summarize([same, near, near]) == (
        "1 of 3 masks match the published ones, 2 show the same thing with another outline, "
        "as another checkpoint of EVF-SAM may"
    )


def test_another_model_does_not_match(
    predictor: Predictor, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert verify.print_comparison(predictor, photos, verify.published_cases()) == 1
    check_that_none_matches(capsys.readouterr().out)


@pytest.mark.slow
def test_the_command_says_that_another_model_does_not_match(
    directory: pathlib.Path, photos: pathlib.Path
):
    result = command("--model", directory, "--photos", photos)
    assert result.returncode == 1, result.stderr
    check_that_none_matches(result.stdout)


def check_that_none_matches(printed: str) -> None:
    lines = printed.splitlines()
    assert sum(line.endswith(": does not match") for line in lines) == 5
    assert "note: zebra.jpg is not the published file: its sha256 is another" in lines
    assert lines[-1] == "0 of 5 masks match the published ones"


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "evf_sam_jax.verify", "--compilation_cache=", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_missing_photographs_are_named_with_where_they_come_from(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    (tmp_path / "bus.jpg").write_bytes(b"")
    result = command("--model", directory, "--photos", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected zebra.jpg, pizza.jpg, food.jpg, carrots.jpg of https://" in result.stderr
    assert verify.PHOTOS_AT in result.stderr and result.stderr.count("\n") == 1


def test_a_photograph_of_another_size(
    directory: pathlib.Path, photos: pathlib.Path, tmp_path: pathlib.Path
):
    shutil.copytree(photos, tmp_path / "photos")
    Image.new("RGB", (64, 40)).save(tmp_path / "photos" / "zebra.jpg")
    with pytest.raises(UserError, match="zebra.jpg: expected 640 x 427 pixels as published, found"):
        verify.verify_directory(directory, tmp_path / "photos")


def test_a_model_without_tokenizer(
    directory: pathlib.Path, photos: pathlib.Path, tmp_path: pathlib.Path
):
    model_dir.write_model_dir(
        tmp_path / "model", model_dir.load_params(directory), model_dir.read_manifest(directory)
    )
    with pytest.raises(UserError, match="model: expected a model directory with tokenizer files"):
        verify.verify_directory(tmp_path / "model", photos)
