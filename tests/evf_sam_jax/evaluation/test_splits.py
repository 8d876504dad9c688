"""Sets by their names; a name that there is none of lists those there are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.splits import PAPER_SETS, open_sets, split_names
from tests.data_pipelines.astronaut import write_astronaut


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("shapes/val", ("shapes/val",)),
        ("refcoco/val+refcoco/testA", ("refcoco/val", "refcoco/testA")),
        ("refcoco+/val+refcoco/val", ("refcoco+/val", "refcoco/val")),
        ("refcocog/val+refcoco+/testB", ("refcocog/val", "refcoco+/testB")),
        ("refcocog-google/val", ("refcocog_google/val",)),
        ("paper", PAPER_SETS),
        ("paper+refclef/testC", (*PAPER_SETS, "refclef/testC")),
    ],
)
def test_sets_are_named_with_plus_between_them(text: str, names: tuple[str, ...]):
    assert split_names(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "refcoco/testC",
            "config.split: expected one of refcoco/train, refcoco/val, refcoco/testA, "
            "refcoco/testB, found 'refcoco/testC'",
        ),
        ("shapes/train", "config.split: expected one of shapes/val, shapes/test, found"),
        ("refcoco", "config.split: expected one of refcoco/train, refcoco/val, .* found 'refcoco'"),
        ("nowhere/val", "expected DATASET/SPLIT or paper, with one of .* shapes, refcoco, "),
        ("", "expected DATASET/SPLIT or paper, .* found ''"),
        ("paper+refcoco/val", "config.split: expected each set once, found refcoco/val twice"),
    ],
)
def test_no_such_split_lists_those_there_are(text: str, message: str):
    with pytest.raises(UserError, match=message):
        split_names(text)


def test_one_s_own_photograph_is_a_set(tmp_path: Path):
    write_astronaut(tmp_path, "val")
    (one,) = open_sets(("own_jsonl/val",), str(tmp_path))
    example = one.read(0, range(len(one.entry(0).phrases)))
    assert one.name == "own_jsonl/val" and one.image_id(0).startswith("own/")
    np.testing.assert_array_equal(one.masks(0, [1]), example.masks[1:2])
    assert one.source.rules.overlap == "sum" and one.source.rules.text == "lower"


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    """One image of ADE20K: its upper half a wall, below it nothing that has a label."""
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        folder = tmp_path / "ade20k" / kind / "validation"
        folder.mkdir(parents=True)
        pixels = np.zeros((8, 6), np.uint8)
        pixels[:4] = 1
        Image.fromarray(pixels).save(folder / f"a.{suffix}")
    return tmp_path


def test_a_segmented_set_is_scored_by_category(ade20k: Path):
    (one,) = open_sets(("ade20k/val",), str(ade20k))
    assert one.by_category and one.entry(0).phrases == ("[semantic] wall",)
    assert one.category(0, 0) == "wall"
    assert one.read(0, [0]).ignore is None  # as in the original, where it is background
    (other,) = open_sets(
        ("ade20k/val",), str(ade20k), ignore_unlabelled=True, semantic_prefix=False
    )
    assert other.entry(0).phrases == ("wall",)
    ignore = other.read(0, [0]).ignore
    assert ignore is not None and not ignore[:4].any() and ignore[4:].all()


def test_fewer_images_are_the_first(tmp_path: Path):
    (few,) = open_sets(("shapes/val",), "", images=2)
    (more,) = open_sets(("shapes/val",), "", images=3)
    assert (len(few), len(more)) == (2, 3)
    assert few.image_id(1) == more.image_id(1)
    assert few.fingerprint != more.fingerprint
    np.testing.assert_array_equal(few.masks(1, [2]), few.read(1, [0, 1, 2]).masks[2:])


def test_missing_data_is_named():
    with pytest.raises(UserError, match="config.data: expected the folder that has refcoco/val"):
        open_sets(("refcoco/val",), "")
    with pytest.raises(UserError, match="/nowhere: expected a folder of refcoco/val"):
        open_sets(("refcoco/val",), "/nowhere")
