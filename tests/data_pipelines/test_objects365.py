"""Objects365: the authors' masks and the official boxes; and what a COCO json must have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from data_pipelines.coco_json import read_coco
from data_pipelines.index import Problem
from data_pipelines.objects365 import DATASETS, FOLDER, alone_of_their_category
from evf_sam_jax.errors import UserError

MASKS, BOXES = DATASETS
CATEGORIES = [
    {"id": 1, "name": "Person"},
    {"id": 2, "name": "Cell Phone"},
    {"id": 7, "name": "Cup"},
]
HEIGHT, WIDTH = 20, 30


def filled(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def annotation(ann_id: int, image: int, category: int, **rest) -> dict[str, Any]:
    return {"id": ann_id, "image_id": image, "category_id": category, "iscrowd": 0, **rest}


def write(root: Path, file: str, annotations: list[dict], split: str = "train") -> Path:
    """Images 1 and 2 are there, 3 is not."""
    folder = root / FOLDER
    (folder / split).mkdir(parents=True)
    names = {i: f"obj365_{split}_{i:012}.jpg" for i in (1, 2, 3)}
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), (i, 0, 0)).save(folder / split / names[i])
    images = [
        {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in names.items()
    ]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / file).write_text(json.dumps(content))
    return folder / file


def test_masks_of_the_authors_have_the_raw_category_as_phrase(tmp_path: Path):
    first, second = filled(1, 2, 5, 6), filled(10, 3, 4, 20)
    annotations = [
        annotation(11, 2, 2, segmentation=[run_lengths(first)]),
        annotation(12, 1, 7, segmentation=[run_lengths(first)]),
        annotation(13, 2, 1, segmentation=[run_lengths(second)]),
    ]
    write(tmp_path, "o365_res_instances.json", annotations)
    source = MASKS.source(tmp_path, "train")
    assert len(source) == 2
    index = source.index
    assert [index.image_id(i) for i in range(2)] == [
        "objects365/obj365_train_000000000001",
        "objects365/obj365_train_000000000002",
    ]
    assert [t.target_id for t in index.annotated(1).targets] == ["11", "13"]
    example = source[1]
    assert example.phrases == ("Cell Phone", "Person")
    np.testing.assert_array_equal(example.masks, [first, second])
    assert MASKS.eval_rules.text == "lower"


def test_categories_with_several_instances_in_an_image_are_dropped():
    annotations = [
        annotation(1, 1, 5),
        annotation(2, 1, 6),
        annotation(3, 1, 5),
        annotation(4, 1, 8, iscrowd=1),
        annotation(5, 1, 9),
    ]
    assert [one["id"] for one in alone_of_their_category(annotations)] == [2, 5]


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_of_objects_alone_of_their_category_are_filled(tmp_path: Path, split: str):
    annotations = [
        annotation(1, 1, 1, bbox=[2, 3, 10, 5]),
        annotation(2, 1, 2, bbox=[4, 4, 8, 9]),
        annotation(3, 1, 2, bbox=[14, 4, 8, 9]),
        annotation(4, 2, 2, bbox=[4, 4, 8, 9]),
    ]
    write(tmp_path, f"objects365_{split}.json", annotations, split)
    source = BOXES.source(tmp_path, split)
    assert source.entry(0).phrases == (("Person",) if split == "train" else ("person",))
    np.testing.assert_array_equal(source[0].masks, [filled(3, 2, 5, 10)])
    np.testing.assert_array_equal(source[1].masks, [filled(4, 4, 9, 8)])


def test_bad_annotations_and_missing_images_are_problems(tmp_path: Path):
    small = coco.encode(np.ones((3, 3), np.uint8, order="F"))
    other_size = {"size": [3, 3], "counts": small["counts"].decode()}
    annotations = [
        annotation(1, 1, 1, segmentation=[other_size]),
        annotation(2, 1, 2, segmentation=[run_lengths(filled(0, 0, 2, 2))]),
        annotation(3, 3, 2, segmentation=[run_lengths(filled(0, 0, 2, 2))]),
    ]
    path = write(tmp_path, "o365_res_instances.json", annotations)
    index = MASKS.index(tmp_path, "train")
    missing = f"{FOLDER}/train/obj365_train_000000000003.jpg"
    assert index.problems() == [
        Problem(f"{path}: annotation 1", "expected run lengths of size [20, 30], found [3, 3]"),
        Problem(
            f"{path}: annotation 3",
            f"expected the image {missing}, found nothing there",
        ),
    ]
    assert [t.target_id for t in index.annotated(0).targets] == ["2"] and len(index) == 1


def test_a_box_without_area_is_a_problem(tmp_path: Path):
    annotations = [annotation(1, 1, 1, bbox=[2, 3, 0, 5]), annotation(2, 2, 1, bbox=[2, 3, 4, 5])]
    write(tmp_path, "objects365_train.json", annotations)
    (problem,) = BOXES.index(tmp_path, "train").problems()
    assert problem.what == "expected a box x, y, width, height, found [2, 3, 0, 5]"


def test_an_unknown_category_is_refused_even_where_the_filter_drops_it(tmp_path: Path):
    annotations = [annotation(i, 1, 9, bbox=[2, 3, 4, 5]) for i in (1, 2)]
    path = write(tmp_path, "objects365_train.json", annotations)
    with pytest.raises(UserError) as error:
        BOXES.index(tmp_path, "train")
    assert str(error.value) == (
        f"{path}: annotation 1: expected the id of one of the file's 3 categories as "
        "'category_id', found 9"
    )


def test_a_missing_file_is_named_with_the_layout(tmp_path: Path):
    with pytest.raises(UserError, match="o365_res_instances.json: expected a file of objects365/"):
        MASKS.index(tmp_path, "train")


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("images"), "the content: expected the key 'images', found annotations"),
        (lambda c: c.update(annotations={}), "'annotations': expected a list, found '{}'"),
        (lambda c: c["images"].append(3), "images[3]: expected an object, found '3'"),
        (lambda c: c["images"][0].pop("height"), "images[0]: expected the key 'height', found id"),
        (lambda c: c["images"][0].update(width="30"), "'width': expected a whole number, found"),
        (lambda c: c["images"][0].update(width=0), "'width': expected 1 pixel or more, found 0"),
        (lambda c: c["images"][1].update(id=1), "images[1]: expected each id once, found 1"),
        (lambda c: c["images"][0].update(file_name=5), "'file_name': expected a string, found '5'"),
        (
            lambda c: c["annotations"][0].update(id=2),
            "annotations[1]: expected each id once, found 2 a second time",
        ),
        (
            lambda c: c["annotations"][0].update(image_id=9),
            "annotations[0]: expected the id of one of the file's images as 'image_id', found 9",
        ),
        (
            lambda c: c["annotations"][0].update(image_id=[1]),
            "'image_id': expected a whole number or a string, found '[1]'",
        ),
        (lambda c: c["annotations"][1].pop("bbox"), "annotations[1]: expected the key 'bbox'"),
        (lambda c: c["categories"][2].update(id=1), "categories[2]: expected each id once"),
        (lambda c: c["categories"][0].pop("name"), "categories[0]: expected the key 'name'"),
    ],
)
def test_a_malformed_coco_json_is_refused(tmp_path: Path, edit: Edit, message: str):
    annotations = [annotation(i, 1, 1, bbox=[2, 3, 4, 5]) for i in (1, 2)]
    path = write(tmp_path, "objects365_train.json", annotations)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_coco(path, ("category_id", "bbox"))
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', "expected json, found"),
        (b"\xff\xfe\xfa", "expected json"),
        (b"3", "an object"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_coco(path)
