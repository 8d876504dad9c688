"""RefCOCO's family is read from files in the official layout, pickles of Python 2 and all."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from data_pipelines.datasets import find_dataset
from data_pipelines.mixture import exclude_images
from data_pipelines.refer import COCO_IMAGES, has_split
from data_pipelines.source import ReadingRules
from evf_sam_jax.errors import UserError

H, W = 30, 40
TRIANGLE, SQUARE = [2, 2, 22, 2, 2, 22], [10, 5, 30, 5, 30, 25, 10, 25]
BLOB = np.zeros((H, W), np.uint8)
BLOB[4:9, 11:30] = 1
RLE = {"size": [H, W], "counts": coco.encode(np.asfortranarray(BLOB))["counts"].decode()}

ANNOTATIONS = {  # annotation id: image id, segmentation
    101: (1, [TRIANGLE]),
    102: (1, [TRIANGLE, SQUARE]),
    103: (2, [SQUARE]),
    104: (2, []),
    105: (3, [[0, 0, 5, 5]]),
    106: (4, [RLE]),
}


def ref(ref_id: int, ann_id: Any, image_id: int, split: str, *phrases: str) -> dict:
    sentences = [
        {"sent_id": 10 * ref_id + i, "raw": p.upper(), "sent": p, "tokens": p.split()}
        for i, p in enumerate(phrases)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 7,
        "image_id": image_id,
        "file_name": f"COCO_train2014_{image_id:012}_{ref_id}.jpg",
        "split": split,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


REFS = [
    ref(1, 101, 1, "train", "Left triangle ", "the triangle"),
    ref(2, 102, 1, "train", "both of them"),
    ref(3, 103, 2, "val", "the square"),
    ref(4, 104, 2, "train", "nothing drawn"),
    ref(5, 105, 3, "testA", "a line"),
    ref(6, 106, 4, "testB", "the blob"),
]


def write_root(
    root: Path,
    refs: list[dict] = REFS,
    folder: str = "refcoco",
    file: str = "refs(unc).p",
    year: int = 2014,
) -> Path:
    place = root / "refer_seg" / folder
    place.mkdir(parents=True)
    names = {i: f"COCO_train2014_{i:012}.jpg" for i in (1, 2, 3, 4)}
    instances = {
        "images": [{"id": i, "file_name": n, "height": H, "width": W} for i, n in names.items()],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 7, "segmentation": s, "iscrowd": 0}
            for i, (image, s) in ANNOTATIONS.items()
        ],
        "categories": [{"id": 7, "name": "shape"}],
    }
    (place / "instances.json").write_text(json.dumps(instances))
    content = json.dumps(refs).encode() if file.endswith("json") else pickle.dumps(refs, 2)
    (place / file).write_bytes(content)
    images = root / COCO_IMAGES[0].replace("2014", str(year))
    images.mkdir(parents=True)
    for i, name in names.items():
        name = name if year == 2014 else name.removeprefix("COCO_train2014_")
        Image.fromarray(np.full((H, W, 3), 40 * i, np.uint8)).save(images / name)
    return root


def pixels(*polygons: list) -> np.ndarray:
    return coco.decode(coco.frPyObjects(list(polygons), H, W)).sum(-1, dtype=np.uint8)


def test_an_image_has_all_its_refs_of_the_split(tmp_path: Path):
    source = find_dataset("refcoco").source(write_root(tmp_path), "train")
    assert len(source) == 2
    example = source[0]
    assert example.phrases == ("Left triangle ", "the triangle", "both of them")  # as written
    np.testing.assert_array_equal(example.masks[0], pixels(TRIANGLE))
    np.testing.assert_array_equal(example.masks[1], example.masks[0])
    np.testing.assert_array_equal(example.masks[2], pixels(TRIANGLE, SQUARE) > 0)
    assert source.index.image_id(0) == "coco/1"
    assert source.index.annotated(0).targets[0].category == "shape"
    assert abs(int(example.image.mean()) - 40) < 3


def test_overlapping_polygons_can_be_summed_as_in_the_original(tmp_path: Path):
    rules = ReadingRules(overlap="sum")
    example = find_dataset("refcoco").source(write_root(tmp_path), "train", rules)[0]
    np.testing.assert_array_equal(example.masks[2], pixels(TRIANGLE, SQUARE))
    assert example.masks[2].max() == 2


def test_evaluation_reads_phrases_in_lower_case(tmp_path: Path):
    refs = [ref(1, 101, 1, "val", " Left Triangle ")]
    source = find_dataset("refcoco").source(write_root(tmp_path, refs), "val")
    assert source[0].phrases == ("left triangle",)


def test_a_mask_that_is_empty_or_no_polygon_is_reported_and_empty(tmp_path: Path):
    root = write_root(tmp_path)
    source = find_dataset("refcoco").source(root, "train")
    assert source[1].phrases == ("nothing drawn",) and not source[1].masks.any()
    (problem,) = source.index.problems()
    assert "annotation 104" in problem.where and "empty segmentation" in problem.what
    source = find_dataset("refcoco").source(root, "testA")
    assert not source[0].masks.any()
    (problem,) = source.index.problems()
    assert "annotation 105" in problem.where and "at least 3 points, found 2" in problem.what


def test_run_lengths_are_read_as_refclef_has_them(tmp_path: Path):
    source = find_dataset("refcoco").source(write_root(tmp_path), "testB")
    np.testing.assert_array_equal(source[0].masks[0], BLOB)


def test_names_of_2017_are_found(tmp_path: Path):
    source = find_dataset("refcoco").source(write_root(tmp_path, year=2017), "train")
    assert source.index.file(0).endswith("train2017/000000000001.jpg")
    assert abs(int(source[0].image.mean()) - 40) < 3


@pytest.mark.parametrize("file", ["grefs(unc).p", "grefs(unc).json"])
def test_a_generalised_ref_has_several_objects_or_none(tmp_path: Path, file: str):
    refs = [
        ref(1, [101, 102], 1, "train", "all triangles"),
        ref(2, [-1], 1, "train", "the circle"),
    ]
    root = write_root(tmp_path, refs, "grefcoco", file)
    source = find_dataset("grefcoco").source(root, "train")
    example = source[0]
    np.testing.assert_array_equal(example.masks[0], pixels(TRIANGLE, SQUARE) > 0)
    assert not example.masks[1].any()
    assert source.index.problems() == []


@pytest.mark.parametrize(
    "split, of_ref, expected",
    [
        ("testA", "testAB", True),
        ("testB", "testAB", True),
        ("testC", "testAB", False),
        ("test", "testAC", True),
        ("train", "train", True),
        ("train", "train2", False),
        ("val", "test", False),
    ],
)
def test_splits_follow_the_publishers_reader(split: str, of_ref: str, expected: bool):
    assert has_split(split, of_ref) == expected


def test_training_images_of_another_sets_evaluation_can_be_left_out(tmp_path: Path):
    write_root(tmp_path)
    other = tmp_path / "other"
    plus = find_dataset("refcoco+").index(
        write_root(other, [ref(9, 101, 1, "testB", "x")], "refcoco+"), "testB"
    )
    kept, dropped = exclude_images(find_dataset("refcoco").source(tmp_path, "train"), [plus])
    assert dropped == 1 and [kept.index.image_id(i) for i in kept.images.tolist()] == ["coco/2"]


def test_a_missing_image_is_reported_and_left_out(tmp_path: Path):
    write_root(tmp_path)
    (tmp_path / COCO_IMAGES[0] / "COCO_train2014_000000000001.jpg").unlink()
    source = find_dataset("refcoco").source(tmp_path, "train")
    assert len(source) == 1
    assert any("expected the image" in problem.what for problem in source.index.problems())


def test_a_file_without_the_split_names_those_it_has(tmp_path: Path):
    write_root(tmp_path, REFS[:3])
    with pytest.raises(UserError, match="refs of the split testA, found those of train, val"):
        find_dataset("refcoco").source(tmp_path, "testA")


@pytest.mark.parametrize(
    "name", ["refs(unc).p", "instances.json", "images/mscoco/images/train2014"]
)
def test_a_missing_file_shows_the_layout(tmp_path: Path, name: str):
    write_root(tmp_path)
    for path in (tmp_path / "refer_seg").rglob(Path(name).name):
        path.rename(path.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"found nothing there; below (.|\n)*instances.json"):
        find_dataset("refcoco").source(tmp_path, "train")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ann_id": 999}, "expected an annotation of instances.json, found ann_id 999"),
        ({"image_id": 999}, "expected an image of instances.json, found image_id 999"),
        ({"sentences": [{"raw": "x"}]}, "sentences with the key 'sent'"),
        ({"split": None}, "a ref with the key 'split', found None"),
    ],
)
def test_a_ref_that_cannot_be_is_named(tmp_path: Path, change: dict, message: str):
    write_root(tmp_path, [{**REFS[0], **change}])
    with pytest.raises(UserError, match=message):
        find_dataset("refcoco").source(tmp_path, "train")


def test_duplicate_refs_are_refused(tmp_path: Path):
    write_root(tmp_path, [REFS[0], REFS[0]])
    with pytest.raises(UserError, match="annotation id '1': expected once, found twice"):
        find_dataset("refcoco").source(tmp_path, "train")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path):
    root = write_root(tmp_path)
    marker = tmp_path / "ran"
    (root / "refer_seg/refcoco/refs(unc).p").write_bytes(
        b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    )
    with pytest.raises(UserError, match="a reference to posix.system, which was not run"):
        find_dataset("refcoco").source(root, "train")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(REFS, 2)[:200]])
def test_a_broken_pickle_is_named(tmp_path: Path, content: bytes):
    root = write_root(tmp_path)
    (root / "refer_seg/refcoco/refs(unc).p").write_bytes(content)
    with pytest.raises(UserError, match=r"refs\(unc\).p: expected a whole pickle"):
        find_dataset("refcoco").source(root, "train")


def test_strings_of_python_2_are_read(tmp_path: Path):
    root = write_root(tmp_path)
    # Protocol 0, as Python 2 writes a str: S'...', not the unicode of Python 3.
    file = root / "refer_seg/refcoco/refs(unc).p"
    old = (
        pickle.dumps([REFS[2]], 0)
        .replace(b"Vval\n", b"S'val'\n")
        .replace(b"Vthe square\n", b"S'the caf\\xe9'\n")
    )
    file.write_bytes(old)
    assert find_dataset("refcoco").source(root, "val")[0].phrases == ("the caf\xe9",)
