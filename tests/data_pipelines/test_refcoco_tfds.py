"""Splits that TFDS prepared elsewhere are read without TensorFlow, images and masks and all."""

import io
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.refcoco_tfds import DATASETS
from evf_sam_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

H, W = 30, 40
LEFT, RIGHT, NOTHING = (np.zeros((H, W), bool) for _ in range(3))
LEFT[5:20, 2:9] = True
RIGHT[10:25, 20:39] = True
BY_NAME = {dataset.name: dataset for dataset in DATASETS}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def example(image_id: int, refs: Sequence[tuple[int, np.ndarray, list[str]]]) -> bytes:
    """An element of `ref_coco` as TFDS writes it: sequences in sequences are flat, with lengths."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    raws = [raw.encode() for _, _, phrases in refs for raw in phrases]
    lengths = [len(phrases) for _, _, phrases in refs]
    ids = [annotation for annotation, _, _ in refs]
    columns: dict[str, list] = {
        "image": [png(np.full((H, W, 3), 40 * image_id, np.uint8))],
        "image/id": [image_id],
        "objects/id": ids,
        "objects/area": [100] * len(refs),
        "objects/bbox": [0.0, 0.0, 0.5, 0.5] * len(refs),
        "objects/label": [7] * len(refs),
        "objects/gt_box_index": list(range(len(refs))),
        "objects/mask": [png(mask) for _, mask, _ in refs],
        "objects/refexp/raw/ragged_flat_values": raws,
        "objects/refexp/raw/ragged_row_lengths_0": lengths,
        "objects/refexp/refexp_id/ragged_flat_values": list(range(len(raws))),
        "objects/refexp/refexp_id/ragged_row_lengths_0": lengths,
        "coco_annotations/id": ids,
        "coco_annotations/area": [100] * len(refs),
        "coco_annotations/bbox": [0.0, 0.0, 0.5, 0.5] * len(refs),
        "coco_annotations/label": [7] * len(refs),
    }

    def feature(key: str, values: list) -> Any:
        if key.endswith("bbox"):
            return tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=values))
        if key in ("image", "objects/mask", "objects/refexp/raw/ragged_flat_values"):
            return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))

    features = {key: feature(key, values) for key, values in columns.items()}
    content = tf_feature_pb2.Features(feature=features)
    return tf_example_pb2.Example(features=content).SerializeToString()


ELEMENTS = [
    example(1, [(11, LEFT, ["The LEFT one", "left, box"]), (12, RIGHT, ["right"])]),
    example(3, [(13, RIGHT, ["two words"]), (13, RIGHT, ["again"]), (14, NOTHING, ["nothing"])]),
]


def write_prepared(
    root: Path, config: str = "refcoco_unc", split: str = "validation", elements: list = ELEMENTS
) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    builder = tfds.builder_cls("ref_coco")(config=config, data_dir=root, file_format="array_record")
    directory = Path(builder.data_dir)
    directory.mkdir(parents=True)
    writer = ArrayRecordWriter(
        str(directory / f"ref_coco-{split}.array_record-00000-of-00001"), "group_size:1"
    )
    for element in elements:
        writer.write(element)
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name="ref_coco", filetype_suffix="array_record", split=split
    )
    info = tfds.core.SplitInfo(
        name=split, shard_lengths=[len(elements)], num_bytes=1, filename_template=template
    )
    builder.info.set_splits(tfds.core.splits.SplitDict([info]))
    builder.info.write_to_directory(directory)
    return root


def test_masks_expressions_and_ids(tmp_path: Path):
    source = BY_NAME["tfds_refcoco"].source(write_prepared(tmp_path), "val")
    assert len(source) == 2
    first = source[0]
    assert first.phrases == ("the left one", "left, box", "right")
    np.testing.assert_array_equal(first.masks, [LEFT, LEFT, RIGHT])
    np.testing.assert_array_equal(first.image, np.full((H, W, 3), 40))
    assert source.index.image_id(1) == "coco/3"
    assert source[1].image[0, 0, 0] == 120
    targets = source.index.annotated(1).targets
    assert [target.target_id for target in targets] == ["13", "13.2", "14"]
    assert source.index.annotated(0).targets[0].phrases == ("The LEFT one", "left, box")


def test_an_empty_mask_is_reported_and_empty(tmp_path: Path):
    source = BY_NAME["tfds_refcoco"].source(write_prepared(tmp_path), "val")
    assert not source[1].masks[2].any()
    (problem,) = source.index.problems()
    assert "annotation 14" in problem.where and "covers no pixel" in problem.what


def test_masks_of_255_are_read_as_those_of_1(tmp_path: Path):
    grey = LEFT.astype(np.uint8) * 255
    root = write_prepared(tmp_path, elements=[example(1, [(11, grey, ["left"])])])
    source = BY_NAME["tfds_refcoco"].source(root, "val")
    np.testing.assert_array_equal(source[0].masks[0], LEFT)


def test_images_are_read_after_pickling(tmp_path: Path):
    source = BY_NAME["tfds_refcoco"].source(write_prepared(tmp_path), "val")
    expected = source[1].image  # the store is open
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[1].image, expected)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tfds_refcoco_google", "refcoco_google"),
        ("tfds_refcoco+", "refcocoplus_unc"),
        ("tfds_refcocog", "refcocog_umd"),
        ("tfds_refcocog_google", "refcocog_google"),
    ],
)
def test_each_name_reads_its_configuration(name: str, config: str, tmp_path: Path):
    root = write_prepared(tmp_path, config, "train", ELEMENTS[:1])
    assert BY_NAME[name].source(root, "train")[0].phrases[0] == "The LEFT one"


def test_elements_without_refs_are_passed_over(tmp_path: Path):
    root = write_prepared(tmp_path, elements=[example(2, []), ELEMENTS[0]])
    source = BY_NAME["tfds_refcoco"].source(root, "val")
    assert len(source) == 1 and source[0].image[0, 0, 0] == 40


def test_a_split_that_was_not_prepared_is_an_error(tmp_path: Path):
    root = write_prepared(tmp_path)
    with pytest.raises(UserError, match=r"ref_coco-testA\.array_record\*: expected a file"):
        BY_NAME["tfds_refcoco"].source(root, "testA")
    with pytest.raises(UserError, match=r"dataset_info\.json: expected a file"):
        BY_NAME["tfds_refcocog"].source(root, "val")


def test_a_missing_shard_is_an_error(tmp_path: Path):
    root = write_prepared(tmp_path)
    place = root / "ref_coco/refcoco_unc/1.1.0"
    name = "ref_coco-validation.array_record-00000-of-0000"
    (place / f"{name}1").rename(place / f"{name}2")
    with pytest.raises(UserError, match="00001-of-00002: expected a file"):
        BY_NAME["tfds_refcoco"].source(root, "val")


def test_masks_of_two_sizes_are_an_error(tmp_path: Path):
    element = example(1, [(11, LEFT, ["left"]), (12, RIGHT[:, 1:], ["right"])])
    root = write_prepared(tmp_path, elements=[element])
    with pytest.raises(UserError, match="annotation 12: expected a mask of 40 x 30.*found 39 x 30"):
        BY_NAME["tfds_refcoco"].source(root, "val")


def test_a_version_without_masks_is_an_error(tmp_path: Path):
    root = write_prepared(tmp_path)
    features = tfds.features
    without = features.FeaturesDict(
        {"image": features.Image(), "objects": features.Sequence({"id": np.int64})}
    )
    without.save_config(root / "ref_coco/refcoco_unc/1.1.0")
    with pytest.raises(UserError, match="expected masks as ref_coco has them since version 1.1.0"):
        BY_NAME["tfds_refcoco"].source(root, "val")


def test_a_broken_directory_is_an_error(tmp_path: Path):
    root = write_prepared(tmp_path)
    (root / "ref_coco/refcoco_unc/1.1.0/features.json").write_text("{}")
    with pytest.raises(UserError, match=r"1\.1\.0: expected a data set prepared by TFDS"):
        BY_NAME["tfds_refcoco"].source(root, "val")


def test_without_tfds_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = write_prepared(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'evf-sam-jax\[tfds\]'"):
        BY_NAME["tfds_refcoco"].source(root, "val")
