"""The command that looks at a data set: its counts, its histograms, its sheet."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.inspect import histogram, inspect, sheet
from tests.data_pipelines.test_refer import write_root
from tests.data_pipelines.tiny_dataset import TinyDataset

ROOT = Path(__file__).parents[2]
TINY = TinyDataset(images=9)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    TINY.write(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_counts_stand_beside_the_published_ones(root: Path):
    written = [TINY.annotated(i) for i in range(9)]
    targets = sum(len(one.targets) for one in written)
    published = {"train": {"images": 9, "targets": targets + 1}}
    text = inspect(dataclasses.replace(TINY.dataset(), published=published), root, "train")
    lines = [line.split() for line in text.splitlines()]
    assert ["images", "9", "9", "(equal)"] in lines
    assert ["targets", str(targets), str(targets + 1), "(differs)"] in lines
    phrases = sum(len(t.phrases) for one in written for t in one.targets)
    assert ["phrases", str(phrases)] in lines


def test_a_histogram_counts_each_value_once():
    lines = histogram("words", [1, 1, 2, 5, 99], (1, 2, 4))
    assert [line.split()[3] for line in lines[1:]] == ["2", "1", "2"]
    assert lines[1].count("#") == 40 and lines[2].count("#") == 20


def test_a_sheet_has_a_row_an_image_and_says_what_cannot_be_read(root: Path):
    source = TINY.dataset().source(root, "train")
    whole = sheet(source, 3)
    assert whole.shape[0] > 3 * 20 and whole.shape[1] > 2 * 30
    (root / "images" / "00000.png").unlink()
    assert sheet(source, 3).shape[0] > 3 * 20


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_pipelines.inspect", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_and_draws(tmp_path: Path):
    write_root(tmp_path / "data")
    picture = tmp_path / "sheet.png"
    done = run(
        "refcoco", "--root", str(tmp_path / "data"), "--split", "train", "--sheet", str(picture)
    )
    assert done.returncode == 0, done.stderr
    assert "refcoco/train" in done.stdout and "42404 (differs)" in done.stdout
    assert "problem: " in done.stdout and "annotation 104" in done.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_mistakes_are_one_sentence(tmp_path: Path):
    done = run("nothing", "--root", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: data set 'nothing': expected one of refcoco,")
    done = run("refcoco", "--root", str(tmp_path), "--images", "0")
    assert done.returncode == 2
    assert done.stderr == "error: --images: expected 1 or more, found 0\n"
    done = run("refcoco", "--root", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "instances.json" in done.stderr
