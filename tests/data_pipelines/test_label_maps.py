"""Label maps in the official layouts: a target for each class that an image has."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import label_maps
from data_pipelines.ade20k_classes import CLASSES
from data_pipelines.datasets import find_dataset
from data_pipelines.source import ReadingRules
from evf_sam_jax.errors import UserError

H, W = 12, 16
LABELS = np.zeros((H, W), np.uint8)
LABELS[:6] = 3
LABELS[6:, 4:] = 9


def write(root: Path, labels: str, photos: str, palette: bool = False, count: int = 1) -> None:
    """`count` images of the same labels; the palette's colours have nothing to do with them."""
    for folder in (labels, photos):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.fromarray(LABELS)
        if palette:
            image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        image.save(root / labels / f"image_{i}.png")
        Image.new("RGB", (W, H), (10, 20, 30)).save(root / photos / f"image_{i}.jpg")


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    write(tmp_path, "ade20k/annotations/training", "ade20k/images/training")
    return tmp_path


@pytest.fixture
def human_parsing(tmp_path: Path) -> Path:
    place = "humanparsing/SegmentationClassAug"
    write(tmp_path, place, "humanparsing/JPEGImages", palette=True)
    return tmp_path


def test_ade20k_counts_its_classes_from_one(ade20k: Path):
    example = find_dataset("ade20k").source(ade20k, "train")[0]
    assert example.phrases == ("[semantic] sky", "[semantic] windowpane")
    np.testing.assert_array_equal(example.masks[0], LABELS == 3)
    np.testing.assert_array_equal(example.masks[1], LABELS == 9)
    assert len(CLASSES) == len(set(CLASSES)) == 150 and CLASSES[149] == "flag"


def test_unlabelled_pixels_are_background_or_ignored(ade20k: Path):
    dataset = find_dataset("ade20k")
    assert dataset.source(ade20k, "train")[0].ignore is None
    ignore = dataset.source(ade20k, "train", ReadingRules(ignore_unlabelled=True))[0].ignore
    np.testing.assert_array_equal(ignore, LABELS == 0)


def test_ade20k_takes_255_for_no_label_and_refuses_what_is_between(ade20k: Path):
    path = ade20k / "ade20k/annotations/training/image_0.png"
    Image.fromarray(np.where(LABELS == 9, 255, LABELS).astype(np.uint8)).save(path)
    rules = ReadingRules(ignore_unlabelled=True)
    example = find_dataset("ade20k").source(ade20k, "train", rules)[0]
    assert example.phrases == ("sky",)
    np.testing.assert_array_equal(example.ignore, LABELS != 3)
    Image.fromarray(np.full((H, W), 151, np.uint8)).save(path)
    with pytest.raises(UserError, match="expected the 152 labels of ade20k, found 151"):
        next(find_dataset("ade20k").load(ade20k, "train"))


def test_names_beside_the_data_come_first(ade20k: Path):
    names = [f"class {i}" for i in range(1, 151)]
    (ade20k / "ade20k/ade20k_classes.json").write_text(json.dumps(names))
    example = find_dataset("ade20k").source(ade20k, "train", ReadingRules())[0]
    assert example.phrases == ("class 3", "class 9")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"1": "wall"}, "a list of names, found dict"),
        ([], "a list of names, found an empty list"),
        (["wall"] * 149, "150 names, found 149"),
        (["wall", 7] * 75, "a list of names, found 7 at place 1"),
        (["wall", " "] * 75, "a list of names, found ' ' at place 1"),
    ],
)
def test_a_file_of_other_than_names_is_refused(ade20k: Path, names: object, message: str):
    (ade20k / "ade20k/ade20k_classes.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=rf"ade20k_classes\.json: expected {message}"):
        find_dataset("ade20k").source(ade20k, "train")


def test_mapillary_has_its_names_in_a_file_and_no_prefix(tmp_path: Path):
    write(tmp_path, "mapillary/training/v2.0/labels", "mapillary/training/images", palette=True)
    labels = [{"readable": f"Class {i}"} for i in range(10)]
    labels[0]["readable"] = "Unlabeled"
    (tmp_path / "mapillary/config_v2.0.json").write_text(json.dumps({"labels": labels}))
    dataset = find_dataset("mapillary")
    assert dataset.source(tmp_path, "train")[0].phrases == ("class 3", "class 9")
    prefixed = dataset.source(tmp_path, "train", ReadingRules(prefix="[semantic] "))
    assert prefixed[0].phrases == ("[semantic] class 3", "[semantic] class 9")
    ignore = dataset.source(tmp_path, "train", ReadingRules(ignore_unlabelled=True))[0].ignore
    np.testing.assert_array_equal(ignore, LABELS == 0)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([], "none"),
        ({}, "none"),
        ({"labels": {}}, "dict"),
        ({"labels": []}, "an empty list"),
        ({"labels": [{"readable": "Bird"}, {"name": "x"}]}, "None at place 1"),
        ({"labels": [{"readable": 5}]}, "5 at place 0"),
    ],
)
def test_a_mapillary_config_without_names_is_refused(tmp_path: Path, content: object, found: str):
    write(tmp_path, "mapillary/training/v2.0/labels", "mapillary/training/images")
    (tmp_path / "mapillary/config_v2.0.json").write_text(json.dumps(content))
    expected = (
        rf"config_v2\.0\.json: expected 'labels', each with a 'readable' name, found {found}$"
    )
    with pytest.raises(UserError, match=expected):
        find_dataset("mapillary").source(tmp_path, "train")


def test_human_parsing_reads_indices_and_names_sides_as_the_viewer_sees_them(human_parsing: Path):
    example = find_dataset("human_parsing").source(human_parsing, "train")[0]
    assert example.phrases == (
        "[semantic] background",
        "[semantic] sunglasses",
        "[semantic] right shoe",
    )
    np.testing.assert_array_equal(example.masks[2], LABELS == 9)


def test_the_background_can_be_left_out(human_parsing: Path):
    rules = ReadingRules(without_categories=("background",))
    example = find_dataset("human_parsing").source(human_parsing, "train", rules)[0]
    assert example.phrases == ("sunglasses", "right shoe")
    np.testing.assert_array_equal(example.masks[0], LABELS == 3)


def test_worker_processes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = "ade20k/annotations/validation"
    write(tmp_path, place, "ade20k/images/validation", count=5)
    dataset = find_dataset("ade20k")
    alone = list(dataset.load(tmp_path, "val"))
    monkeypatch.setattr(label_maps, "_IN_ONE_PROCESS", 2)
    assert list(dataset.load(tmp_path, "val")) == alone and len(alone) == 5


def test_an_unknown_label_is_named(human_parsing: Path):
    path = human_parsing / "humanparsing/SegmentationClassAug/image_0.png"
    Image.fromarray(np.full((H, W), 18, np.uint8)).save(path)
    with pytest.raises(UserError, match="image_0.png: expected the 18 labels .*found 18"):
        find_dataset("human_parsing").source(human_parsing, "train")


@pytest.mark.parametrize("content", ["empty", "truncated", "colour", "no photograph"])
def test_a_bad_pair_of_files_is_reported(ade20k: Path, content: str):
    write(ade20k, "ade20k/annotations/training", "ade20k/images/training", count=2)
    path = ade20k / "ade20k/annotations/training/image_1.png"
    if content == "no photograph":
        (ade20k / "ade20k/images/training/image_1.jpg").unlink()
    elif content == "colour":
        Image.new("RGB", (W, H)).save(path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if content == "empty" else 60])
    source = find_dataset("ade20k").source(ade20k, "train")
    assert len(source) == 1
    (problem,) = source.index.problems()
    assert "image_1" in problem.where and problem.what.startswith("expected")


def test_a_missing_folder_shows_the_layout(tmp_path: Path):
    with pytest.raises(UserError, match=r"expected a folder of ade20k/val(.|\n)*images/validation"):
        find_dataset("ade20k").source(tmp_path, "val")
