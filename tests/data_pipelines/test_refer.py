"""RefCOCO's family is read from files in the official layout, pickles of Python 2 and all."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco

from data_pipelines.datasets import find_dataset
from data_pipelines.mixture import exclude_images
from data_pipelines.refer import COCO_IMAGES, has_split
from data_pipelines.source import ReadingRules
from evf_sam_jax.errors import UserError
from tests.data_pipelines.refer_files import (
    BLOB,
    REFS,
    SQUARE,
    TRIANGLE,
    H,
    W,
    ref,
)
from tests.data_pipelines.refer_files import write_refer_root as write_root


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


def test_polygons_that_can_be_drawn_are_kept_beside_one_that_cannot(tmp_path: Path):
    root = write_root(tmp_path)
    file = root / "refer_seg/refcoco/instances.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = [TRIANGLE, [0, 0, 5, 5]]
    file.write_text(json.dumps(content))
    source = find_dataset("refcoco").source(root, "train")
    np.testing.assert_array_equal(source[0].masks[0], pixels(TRIANGLE))
    assert any("annotation 101" in problem.where for problem in source.index.problems())


def test_a_ref_to_an_object_of_another_image_is_reported(tmp_path: Path):
    root = write_root(tmp_path, [ref(1, 103, 1, "train", "the square")])
    (problem,) = find_dataset("refcoco").index(root, "train").problems()
    assert "ref 1" in problem.where
    assert problem.what == "expected an annotation of its image, found one of image 2"


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
        ref(3, -1, 1, "train", "the oval"),
    ]
    root = write_root(tmp_path, refs, "grefcoco", file)
    source = find_dataset("grefcoco").source(root, "train")
    example = source[0]
    np.testing.assert_array_equal(example.masks[0], pixels(TRIANGLE, SQUARE) > 0)
    assert not example.masks[1:].any() and len(example.masks) == 3
    categories = [target.category for target in source.index.annotated(0).targets]
    assert categories == ["shape", "", ""]
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
    missing = [p.where for p in source.index.problems() if "expected the image" in p.what]
    assert [where.rpartition(": ")[2] for where in missing] == ["ref 1", "ref 2"]


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
        ({"ann_id": [[101]]}, r"expected an annotation of instances.json, found ann_id \[101\]"),
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
    with pytest.raises(UserError, match="a reference to posix.system: it was not run"):
        find_dataset("refcoco").source(root, "train")
    assert not marker.exists()


def test_pickles_of_python_3_are_read_alike(tmp_path: Path):
    root = write_root(tmp_path)
    old = find_dataset("refcoco").source(root, "train").index
    written = [old.annotated(i) for i in range(len(old))]
    (root / "refer_seg/refcoco/refs(unc).p").write_bytes(pickle.dumps(REFS))
    new = find_dataset("refcoco").source(root, "train").index
    assert [new.annotated(i) for i in range(len(new))] == written


def test_phrases_beyond_ascii_are_read(tmp_path: Path):
    root = write_root(tmp_path, [ref(3, 103, 2, "val", "the caf\xe9")])
    assert find_dataset("refcoco").source(root, "val")[0].phrases == ("the caf\xe9",)


def test_images_are_in_order_of_their_numbers(tmp_path: Path):
    root = write_root(tmp_path)
    file = root / "refer_seg/refcoco/instances.json"
    text = file.read_text().replace('"image_id": 1,', '"image_id": 10,')
    file.write_text(text.replace('{"id": 1,', '{"id": 10,'))
    refs = [ref(1, 101, 10, "train", "ten"), ref(2, 103, 2, "train", "two")]
    (root / "refer_seg/refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    index = find_dataset("refcoco").index(root, "train")
    assert [index.image_id(i) for i in range(len(index))] == ["coco/2", "coco/10"]


@pytest.mark.parametrize("name", ["refclef", "refclef_berkeley"])
def test_refclef_has_run_lengths_and_its_own_images(tmp_path: Path, name: str):
    file = {"refclef": "refs(unc).p", "refclef_berkeley": "refs(berkeley).p"}[name]
    refs = [ref(6, 106, 4, "train", "the blob")]
    source = find_dataset(name).source(write_root(tmp_path, refs, "refclef", file), "train")
    np.testing.assert_array_equal(source[0].masks[0], BLOB)
    assert source.index.image_id(0) == "saiapr/4"
    assert source.index.file(0) == "refer_seg/images/saiapr_tc-12/4.jpg"


def test_short_names_are_found_in_the_folder_of_2014(tmp_path: Path):
    source = find_dataset("refcoco").source(write_root(tmp_path, short_names=True), "train")
    assert source.index.file(0).endswith("train2014/000000000001.jpg")


def test_an_annotation_that_comes_twice_is_refused(tmp_path: Path):
    root = write_root(tmp_path)
    file = root / "refer_seg/refcoco/instances.json"
    file.write_text(file.read_text().replace('{"id": 102,', '{"id": 101,'))
    with pytest.raises(UserError, match="expected each id once, found 101 a second time"):
        find_dataset("refcoco").source(root, "train")
