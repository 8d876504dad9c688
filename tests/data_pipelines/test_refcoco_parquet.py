"""Parquet of the Hugging Face Hub gives what the publishers' files give, or its own images."""

import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco

from data_pipelines import refer
from data_pipelines.index import Problem
from data_pipelines.refcoco_parquet import DATASETS
from data_pipelines.segmentations import decode_parts
from evf_sam_jax.errors import UserError
from tests.data_pipelines.refer_files import (
    ANNOTATIONS,
    BLOB,
    REFS,
    RLE,
    SQUARE,
    TRIANGLE,
    H,
    W,
    write_refer_root,
)

BY_NAME = {dataset.name: dataset for dataset in DATASETS}


def write_parquet(path: Path, rows: Sequence[dict], row_group_size: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)


def annotation_row(ref: dict[str, Any]) -> dict[str, Any]:
    """A row of jxu124/refcoco."""
    image_id = ref["image_id"]
    name = f"COCO_train2014_{image_id:012}.jpg"
    info = {"file_name": name, "height": H, "width": W, "id": image_id, "license": 3}
    annotation = {
        "id": ref["ann_id"],
        "image_id": image_id,
        "category_id": 7,
        "segmentation": ANNOTATIONS[ref["ann_id"]][1],
        "iscrowd": 0,
        "bbox": [0.0, 0.0, 1.0, 1.0],
    }
    return {
        **ref,
        "raw_anns": json.dumps(annotation),
        "raw_image_info": json.dumps(info),
        "raw_sentences": json.dumps(ref["sentences"]),
        "image_path": f"coco/train2014/{name}",
        "bbox": [0.0, 0.0, 1.0, 1.0],
        "captions": [sentence["sent"] for sentence in ref["sentences"]],
        "global_image_id": f"coco.{image_id}",
        "anns_id": str(ref["ann_id"]),
    }


FILES = {"train": "train", "val": "validation", "testA": "test", "testB": "testB"}


def write_annotations(
    root: Path,
    folder: str = "refcoco",
    images: str = "train2014",
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
) -> Path:
    for split, file in FILES.items():
        rows = [change(annotation_row(ref)) for ref in REFS if ref["split"] == split]
        name = f"{file}-00000-of-00001-0123456789abcdef.parquet"
        write_parquet(root / folder / "data" / name, rows)
    (root / images).mkdir(parents=True)
    for i in (1, 2, 3, 4):
        name = f"COCO_train2014_{i:012}.jpg"
        if "2017" in images:
            name = name.removeprefix("COCO_train2014_")
        Image.fromarray(np.full((H, W, 3), 40 * i, np.uint8)).save(root / images / name)
    return root


@pytest.mark.parametrize("split", FILES)
def test_annotations_are_those_of_the_publishers_files(split: str, tmp_path: Path):
    publishers = {dataset.name: dataset for dataset in refer.DATASETS}["refcoco"]
    expected = publishers.source(write_refer_root(tmp_path / "a"), split)
    found = BY_NAME["refcoco_parquet"].source(write_annotations(tmp_path / "b"), split)
    assert len(found) == len(expected) > 0
    for i in range(len(found)):
        assert found.index.image_id(i) == expected.index.image_id(i)
        ours, theirs = found.index.annotated(i).targets, expected.index.annotated(i).targets
        assert [(t.target_id, t.phrases, t.parts) for t in ours] == [
            (t.target_id, t.phrases, t.parts) for t in theirs
        ]
        np.testing.assert_array_equal(found[i].masks, expected[i].masks)
        np.testing.assert_array_equal(found[i].image, expected[i].image)
    assert len(found.index.problems()) == len(expected.index.problems())


@pytest.mark.parametrize("images", ["coco/train2014", "train2017", "coco/train2017"])
def test_images_are_found_in_each_folder(images: str, tmp_path: Path):
    source = BY_NAME["refcoco_parquet"].source(write_annotations(tmp_path, images=images), "train")
    assert source.index.file(0).startswith(f"{images}/")
    assert source[0].image.shape == (H, W, 3)


def test_splits_may_go_by_the_names_of_the_files(tmp_path: Path):
    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "split": FILES[row["split"]]}

    root = write_annotations(tmp_path, "refcocoplus", change=renamed)
    source = BY_NAME["refcoco+_parquet"].source(root, "testA")
    assert source.index.target_id(0) == "5"
    assert BY_NAME["refcoco+_parquet"].source(root, "val").index.target_id(0) == "3"


def test_sentences_may_be_json(tmp_path: Path):
    def as_json(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "sentences": json.dumps(row["sentences"])}

    root = write_annotations(tmp_path, "refcocog", change=as_json)
    source = BY_NAME["refcocog_parquet"].source(root, "train")
    assert source[0].phrases == ("Left triangle ", "the triangle", "both of them")


def test_files_may_lie_without_a_data_folder(tmp_path: Path):
    root = write_annotations(tmp_path)
    for path in (root / "refcoco/data").iterdir():
        path.rename(root / "refcoco" / path.name)
    assert len(BY_NAME["refcoco_parquet"].source(root, "train")) == 2


def test_each_ref_of_a_missing_image_is_reported(tmp_path: Path):
    root = write_annotations(tmp_path)
    (root / "train2014/COCO_train2014_000000000001.jpg").unlink()
    index = BY_NAME["refcoco_parquet"].index(root, "train")
    assert [index.image_id(i) for i in range(len(index))] == ["coco/2"]
    missing = [one for one in index.problems() if "expected the image" in one.what]
    assert [one.where[-5:] for one in missing] == ["ref 1", "ref 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw_anns": "{"}, r"ref 3: expected json in 'raw_anns', found"),
        ({"raw_anns": "[]"}, r"ref 3: expected a json object in 'raw_anns', found '\[\]'"),
        ({"raw_image_info": '{"file_name": "a.jpg"}'}, r"raw_image_info: expected 'height' as int"),
        ({"sentences": "{}"}, r"ref 3: expected a list in 'sentences', found '{}'"),
        ({"sentences": "["}, r"ref 3: expected json in 'sentences'"),
        ({"sentences": '[{"raw": "a"}]'}, r"sentences: expected 'sent' as str, found 'None'"),
        ({"image_id": None}, r"ref 3: expected 'image_id' as int, found 'None'"),
        ({"ref_id": "x"}, r"row 0: expected 'ref_id' as int, found 'x'"),
    ],
)
def test_a_malformed_row_is_an_error(change: dict[str, Any], message: str, tmp_path: Path):
    root = write_annotations(tmp_path, change=lambda row: {**row, **change})
    with pytest.raises(UserError, match=message):
        BY_NAME["refcoco_parquet"].source(root, "val")


def test_a_missing_column_split_or_file_is_an_error(tmp_path: Path):
    def without(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key != "raw_anns"}

    dataset = BY_NAME["refcoco_parquet"]
    with pytest.raises(UserError, match=r"refcoco/data/\*\.parquet: expected a file"):
        dataset.source(tmp_path, "val")
    with pytest.raises(UserError, match="expected the column 'raw_anns', found ref_id, ann_id"):
        dataset.source(write_annotations(tmp_path / "a", change=without), "val")
    root = write_annotations(tmp_path / "b")
    (root / "refcoco/data/testB-00000-of-00001-0123456789abcdef.parquet").unlink()
    with pytest.raises(UserError, match="split testB, found those of testA, train, val"):
        dataset.source(root, "testB")
    broken = root / "refcoco/data/train-00000-of-00001-0123456789abcdef.parquet"
    broken.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="train-.*: expected a readable Parquet file, found"):
        dataset.source(root, "val")


def png(value: int, height: int = H) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, W, 3), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def lmms_row(image_id: int, polygon: list[int], *phrases: str) -> dict[str, Any]:
    """A row of lmms-lab/RefCOCO; the number behind the image's is its annotation's place."""
    name = f"COCO_train2014_{image_id:012}_2.jpg"
    return {
        "question_id": "7",
        "image": {"bytes": png(40 * image_id % 256), "path": name},
        "question": "Describe",
        "answer": list(phrases),
        "segmentation": [float(number) for number in polygon],
        "bbox": [0.0, 0.0, 1.0, 1.0],
        "iscrowd": 0,
        "file_name": name,
    }


LMMS_ROWS = [
    lmms_row(2, SQUARE, "Square"),
    lmms_row(1, TRIANGLE, "triangle", "left"),
    lmms_row(3, [], "nothing drawn"),
    lmms_row(2, TRIANGLE, "corner"),
    lmms_row(4, SQUARE, "fourth"),
]


def write_lmms(root: Path, rows: Sequence[dict] = LMMS_ROWS, folder: str = "RefCOCO") -> Path:
    place = root / "lmms-lab" / folder / "data"
    write_parquet(place / "val-00000-of-00002.parquet", rows[:3])
    write_parquet(place / "val-00001-of-00002.parquet", rows[3:])
    return root


def polygon_mask(polygon: list[int]) -> np.ndarray:
    return coco.decode(coco.frPyObjects([polygon], H, W))[..., 0]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("lmms_refcoco", "RefCOCO"),
        ("lmms_refcoco+", "RefCOCOplus"),
        ("lmms_refcocog", "RefCOCOg"),
    ],
)
def test_rows_of_one_image_are_one_example_in_order(name: str, folder: str, tmp_path: Path):
    source = BY_NAME[name].source(write_lmms(tmp_path, folder=folder), "val")
    assert [source.index.image_id(i) for i in range(3)] == ["coco/2", "coco/1", "coco/4"]
    assert source[0].phrases == ("square", "corner")
    np.testing.assert_array_equal(source[0].masks, [polygon_mask(SQUARE), polygon_mask(TRIANGLE)])
    for i, image_id in ((0, 2), (2, 4), (1, 1)):
        np.testing.assert_array_equal(source[i].image, np.full((H, W, 3), 40 * image_id))
    (problem,) = source.index.problems()
    assert problem.where.endswith("val-00000-of-00002.parquet: row 2")
    assert "empty segmentation" in problem.what


def test_images_inside_are_read_after_pickling(tmp_path: Path):
    source = BY_NAME["lmms_refcoco"].source(write_lmms(tmp_path), "val")
    expected = source[2].image  # a row group is kept
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[2].image, expected)


def test_each_split_has_its_files_alone(tmp_path: Path):
    root = write_lmms(tmp_path)
    place = root / "lmms-lab/RefCOCO/data"
    write_parquet(place / "test-00000-of-00001.parquet", [lmms_row(5, SQUARE, "google's")])
    write_parquet(place / "testA-00000-of-00001.parquet", [lmms_row(6, SQUARE, "person")])
    dataset = BY_NAME["lmms_refcoco"]
    assert dataset.source(root, "test")[0].phrases == ("google's",)
    assert dataset.source(root, "testA")[0].phrases == ("person",)
    assert dataset.evaluation_only
    with pytest.raises(UserError, match="expected one of the splits val, testA, .* found 'train'"):
        dataset.source(root, "train")


def test_a_missing_shard_is_an_error(tmp_path: Path):
    root = write_lmms(tmp_path)
    (root / "lmms-lab/RefCOCO/data/val-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"val-00001-of-00002\.parquet: expected a file"):
        BY_NAME["lmms_refcoco"].source(root, "val")


def test_an_image_that_cannot_be_read_is_reported(tmp_path: Path):
    broken = {**LMMS_ROWS[0], "image": {"bytes": b"text", "path": "a.jpg"}}
    none = {**LMMS_ROWS[1], "image": {"bytes": None, "path": "a.jpg"}}
    root = write_lmms(tmp_path, [broken, none, LMMS_ROWS[4]])
    # The second file would be empty.
    (root / "lmms-lab/RefCOCO/data/val-00001-of-00002.parquet").unlink()
    path = root / "lmms-lab/RefCOCO/data/val-00000-of-00002.parquet"
    path.rename(path.with_name("val-00000-of-00001.parquet"))
    index = BY_NAME["lmms_refcoco"].index(root, "val")
    assert len(index) == 1
    assert [(one.where[-5:], one.what) for one in index.problems()] == [
        ("row 0", "expected an image in 'image', found 4 bytes"),
        ("row 1", "expected an image in 'image', found 0 bytes"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_name": "a.jpg"}, "row 0: expected a COCO image's name as 'file_name', found 'a"),
        ({"answer": "words"}, "row 0: expected 'answer' as list, found 'words'"),
        ({"answer": [None]}, "row 0: expected 'answer' of strings, found 'None'"),
        ({"image": "a.jpg"}, "row 0: expected 'image' as dict, found 'a.jpg'"),
    ],
)
def test_a_malformed_row_with_its_image_is_an_error(
    change: dict[str, Any], message: str, tmp_path: Path
):
    root = write_lmms(tmp_path, [{**row, **change} for row in LMMS_ROWS])
    with pytest.raises(UserError, match=message):
        BY_NAME["lmms_refcoco"].source(root, "val")


def refcoco_m_row(image_id: int, samples: list[dict]) -> dict[str, Any]:
    name = f"COCO_train2014_{image_id:012}.jpg"
    image = {"bytes": png(40 * image_id % 256), "path": name}
    return {"image": image, "image_id": image_id, "file_name": name, "samples": samples}


def sample(sample_id: int, mask: dict, *phrases: str) -> dict[str, Any]:
    return {
        "id": sample_id,
        "image_id": 1,
        "category": "shape",
        "supercategory": "thing",
        "label": "shape",
        "sentences": list(phrases),
        "bbox": [0.0, 0.0, 1.0, 1.0],
        "mask": mask,
    }


def test_run_lengths_of_refcoco_m(tmp_path: Path):
    other = {"size": [H + 1, W], "counts": RLE["counts"]}
    rows = [
        refcoco_m_row(1, [sample(8, RLE, "The blob", "it"), sample(9, other, "too large")]),
        refcoco_m_row(581857, [sample(10, RLE, "blob")]),
    ]
    place = tmp_path / "moondream/refcoco-m/data"
    write_parquet(place / "validation-00000-of-00001.parquet", rows)
    source = BY_NAME["refcoco_m"].source(tmp_path, "val")
    assert source[0].phrases == ("the blob", "it")
    np.testing.assert_array_equal(source[0].masks, [BLOB, BLOB])
    assert source.index.image_id(1) == "coco/581857"
    (target,) = source.index.annotated(0).targets
    assert (target.target_id, target.category) == ("8", "shape")
    np.testing.assert_array_equal(decode_parts(target.parts, H, W), BLOB)
    path = place / "validation-00000-of-00001.parquet"
    assert source.index.problems() == [
        Problem(
            f"{path}: row 0: samples: id 9",
            f"expected run lengths of size {[H, W]}, found {[H + 1, W]}",
        )
    ]
    with pytest.raises(UserError, match="expected one of the splits val, found 'train'"):
        BY_NAME["refcoco_m"].source(tmp_path, "train")


def test_a_malformed_sample_of_refcoco_m_is_an_error(tmp_path: Path):
    broken = {**sample(8, RLE), "sentences": "words"}
    place = tmp_path / "moondream/refcoco-m/data"
    write_parquet(place / "validation-00000-of-00001.parquet", [refcoco_m_row(1, [broken])])
    with pytest.raises(UserError, match="id 8: expected 'sentences' as list, found 'words'"):
        BY_NAME["refcoco_m"].source(tmp_path, "val")
