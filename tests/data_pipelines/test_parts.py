"""PartImageNet and PASCAL-Part: annotations of one category are one target of an image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from data_pipelines.index import Problem
from data_pipelines.parts import DATASETS
from data_pipelines.source import ReadingRules
from evf_sam_jax.errors import UserError

PARTIMAGENET, PASCAL_PART = DATASETS
HEIGHT, WIDTH = 24, 32
JPEGS = "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"

LEFT = [2.0, 2.0, 12.0, 2.0, 12.0, 14.0, 2.0, 14.0]
MIDDLE = [8.0, 4.0, 20.0, 4.0, 20.0, 12.0, 8.0, 12.0]  # overlaps LEFT
RIGHT = [22.5, 3.0, 30.0, 6.0, 25.0, 20.0]


def drawn(*polygons: list[float]) -> np.ndarray:
    """Sum of the polygons, as pycocotools draws them."""
    encoded = coco.frPyObjects(list(polygons), HEIGHT, WIDTH)
    return coco.decode(encoded).sum(-1, dtype=np.uint8)


def annotation(ann_id: int, image: int, category: int, *polygons: list) -> dict[str, Any]:
    return {
        "id": ann_id,
        "image_id": image,
        "category_id": category,
        "segmentation": list(polygons),
        "iscrowd": 0,
    }


def write(
    path: Path, images: Path, names: list[str], categories: dict[int, str], annotations: list[dict]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (WIDTH, HEIGHT), (i, 0, 0)).save(images / name, "JPEG")
    content = {
        "images": [
            {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(names)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }
    path.write_text(json.dumps(content))


def write_partimagenet(root: Path, annotations: list[dict], split: str = "train") -> Path:
    base = root / "PartImageNet"
    path = base / "annotations" / split / f"{split}.json"
    names = ["n01440764_18.JPEG", "n02817516_7.JPEG"]
    categories = {0: "Quadruped Head", 1: "Quadruped Body", 26: "Car Side Mirror"}
    write(path, base / "images" / split, names, categories, annotations)
    return path


def test_annotations_of_one_category_are_one_target(tmp_path: Path):
    annotations = [
        annotation(1, 1, 26, LEFT),
        annotation(2, 1, 0, RIGHT),
        annotation(3, 1, 26, MIDDLE),
        annotation(4, 0, 1, RIGHT),
    ]
    write_partimagenet(tmp_path, annotations)
    source = PARTIMAGENET.source(tmp_path, "train")
    example = source[1]
    assert example.phrases == ("[semantic] car side mirror", "[semantic] quadruped head")
    np.testing.assert_array_equal(example.masks, [drawn(LEFT, MIDDLE) > 0, drawn(RIGHT)])
    one = source.index.annotated(1)
    assert one.image_id == "partimagenet/n02817516_7"
    assert [t.target_id for t in one.targets] == ["1/26", "1/0"]
    assert [t.category for t in one.targets] == ["Car Side Mirror", "Quadruped Head"]


def test_overlapping_annotations_add_up_by_the_rule_but_polygons_of_one_do_not(tmp_path: Path):
    annotations = [
        annotation(1, 0, 0, LEFT),
        annotation(2, 0, 0, MIDDLE),
        annotation(3, 1, 0, LEFT, MIDDLE),
    ]
    write_partimagenet(tmp_path, annotations)
    source = PARTIMAGENET.source(tmp_path, "train", ReadingRules(overlap="sum"))
    np.testing.assert_array_equal(source[0].masks, [drawn(LEFT, MIDDLE)])
    assert source[0].masks.max() == 2
    np.testing.assert_array_equal(source[1].masks, [drawn(LEFT, MIDDLE) > 0])


@pytest.mark.parametrize("split", ["val", "test"])
def test_other_splits_have_their_own_folders(tmp_path: Path, split: str):
    write_partimagenet(tmp_path, [annotation(1, 0, 0, LEFT)], split)
    assert PARTIMAGENET.source(tmp_path, split).entry(0).phrases == ("[semantic] quadruped head",)
    with pytest.raises(UserError, match="train.json: expected a file of partimagenet/train"):
        PARTIMAGENET.index(tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_pascal_part_names_object_and_part_and_shares_its_image_folder(tmp_path: Path, split: str):
    path = tmp_path / "vlpart/pascal_part" / f"{split}.json"
    annotations = [annotation(1, 0, 9, LEFT), annotation(2, 0, 19, RIGHT)]
    categories = {9: "bird:head", 19: "bus:license plate"}
    write(path, tmp_path / JPEGS, ["2008_000008.jpg"], categories, annotations)
    source = PASCAL_PART.source(tmp_path, split)
    assert source.entry(0).phrases == ("[semantic] bird head", "[semantic] bus license plate")
    np.testing.assert_array_equal(source[0].masks, [drawn(LEFT), drawn(RIGHT)])
    assert source.index.image_id(0) == "pascal_part/2008_000008"
    assert source.index.file(0) == f"{JPEGS}/2008_000008.jpg"


def test_annotations_that_cannot_be_drawn_are_problems(tmp_path: Path):
    without = annotation(4, 0, 0)
    del without["segmentation"]
    annotations = [
        annotation(1, 0, 0, [1.0, 2.0, 3.0, 4.0]),
        annotation(2, 0, 1),
        annotation(3, 0, 0, LEFT),
        without,
    ]
    path = write_partimagenet(tmp_path, annotations)
    index = PARTIMAGENET.index(tmp_path, "train")
    assert index.problems() == [
        Problem(f"{path}: annotation 1", "expected a polygon of at least 3 points, found 2"),
        Problem(
            f"{path}: annotation 2",
            "expected polygons or run lengths, found an empty segmentation",
        ),
        Problem(f"{path}: annotation 4", "expected polygons or run lengths, found NoneType"),
    ]
    (target,) = index.annotated(0).targets
    assert len(index) == 1 and target.target_id == "0/0" and len(target.parts) == 1


def test_a_missing_image_is_a_problem_of_each_annotation(tmp_path: Path):
    annotations = [annotation(i, i % 2, 0, LEFT) for i in range(4)]
    write_partimagenet(tmp_path, annotations)
    missing = "PartImageNet/images/train/n02817516_7.JPEG"
    (tmp_path / missing).unlink()
    index = PARTIMAGENET.index(tmp_path, "train")
    assert len(index) == 1
    assert [p.what for p in index.problems()] == [
        f"expected the image {missing}, found nothing there"
    ] * 2


def test_an_unknown_category_is_refused(tmp_path: Path):
    path = write_partimagenet(tmp_path, [annotation(5, 0, 40, LEFT)])
    with pytest.raises(UserError) as error:
        PARTIMAGENET.index(tmp_path, "train")
    assert str(error.value) == (
        f"{path}: annotation 5: expected the id of one of the file's 3 categories as "
        "'category_id', found 40"
    )
