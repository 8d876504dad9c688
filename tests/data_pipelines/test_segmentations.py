"""Masks of every kind equal pycocotools' pixel by pixel; what is no mask says why."""

import numpy as np
import pytest
from pycocotools import mask as coco

from data_pipelines.segmentations import (
    SegmentationError,
    area,
    decode_parts,
    encode_box,
    encode_drawable_parts,
    encode_mask,
    encode_segmentation,
)

TRIANGLE = [2.5, 3.0, 25.2, 4.1, 12.7, 17.9]
SQUARE = [8, 2, 20, 2, 20, 12, 8, 12]  # overlaps the triangle
H, W = 20, 30


def random_mask(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width)) < 0.4


def polygon_pixels(polygon: list, height: int = H, width: int = W) -> np.ndarray:
    return coco.decode(coco.frPyObjects([polygon], height, width))[..., 0]


def test_a_polygon_equals_pycocotools():
    parts = encode_segmentation([TRIANGLE], H, W)
    np.testing.assert_array_equal(decode_parts(parts, H, W), polygon_pixels(TRIANGLE))


def test_a_polygon_without_its_list_is_one_polygon():
    assert encode_segmentation(TRIANGLE, H, W) == encode_segmentation([TRIANGLE], H, W)


def test_overlapping_polygons_are_united_or_summed():
    parts = encode_segmentation([TRIANGLE, SQUARE], H, W)
    both = polygon_pixels(TRIANGLE) + polygon_pixels(SQUARE)
    assert both.max() == 2
    np.testing.assert_array_equal(decode_parts(parts, H, W), both > 0)
    # hustvl/EVF-SAM utils/refer_seg_dataset.py at 9935dc5: decode, np.sum(axis=2), astype uint8
    np.testing.assert_array_equal(decode_parts(parts, H, W, "sum"), both)
    assert area(parts, H, W) == (both > 0).sum()


@pytest.mark.parametrize("seed, height, width", [(0, 1, 1), (1, 1, 50), (2, 37, 3), (3, 40, 60)])
def test_run_lengths_in_every_writing_give_the_mask(seed: int, height: int, width: int):
    mask = random_mask(seed, height, width) | (height * width == 1)
    compressed = coco.encode(np.asfortranarray(mask, np.uint8))
    columns = mask.T.ravel()
    changes = np.flatnonzero(np.diff(columns)) + 1
    lengths = np.diff([0, *changes, columns.size]).tolist()
    uncompressed = ([0] if columns[0] else []) + lengths
    for counts in (compressed["counts"], compressed["counts"].decode(), uncompressed):
        encoded = {"size": [height, width], "counts": counts}
        for segmentation in (encoded, [encoded]):
            parts = encode_segmentation(segmentation, height, width)
            np.testing.assert_array_equal(decode_parts(parts, height, width), mask)


def test_a_list_of_run_lengths_has_a_part_each():
    masks = [random_mask(0, H, W), random_mask(1, H, W)]
    encoded = [{"size": [H, W], "counts": encode_mask(mask).decode()} for mask in masks]
    parts = encode_segmentation(encoded, H, W)
    np.testing.assert_array_equal(
        decode_parts(parts, H, W, "sum"), masks[0].astype(np.uint8) + masks[1]
    )


def test_parts_of_a_polygon_outside_the_image_are_cut_off():
    parts = encode_segmentation([[-50, -50, 10, -50, 10, 10, -50, 10]], H, W)
    assert area(parts, H, W) == 100


def test_no_parts_are_an_empty_mask():
    mask = decode_parts((), 3, 4)
    assert mask.shape == (3, 4) and mask.dtype == np.uint8 and not mask.any()


def test_parts_that_can_be_drawn_are_kept_and_the_others_named():
    parts, wrong = encode_drawable_parts([[0, 0, 5, 5], TRIANGLE, [1, 2, 3]], H, W)
    np.testing.assert_array_equal(decode_parts(parts, H, W), polygon_pixels(TRIANGLE))
    assert len(wrong) == 2 and "at least 3 points, found 2" in wrong[0]
    with pytest.raises(SegmentationError, match="at least 3 points, found 2"):
        encode_segmentation([TRIANGLE, [0, 0, 5, 5]], H, W)


def test_a_box_is_filled():
    mask = decode_parts((encode_box([3, 4, 10, 5], H, W),), H, W)
    expected = np.zeros((H, W), np.uint8)
    expected[4:9, 3:13] = 1
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([], "found an empty segmentation"),
        ("abc", "expected polygons or run lengths, found str"),
        (None, "found NoneType"),
        ([[0, 0, 5, 5]], "at least 3 points, found 2"),
        ([[0, 0, 5, 5, 3]], "found 5 numbers"),
        ([[0, 0, 5, 5, 3, float("nan")]], "finite coordinates"),
        ([[0, 0, 1e8, 5, 3, 3]], "coordinates in pixels, found 100000000.0"),
        ([[0, 0, 10**400, 5, 3, 3]], "expected numbers"),
        ({"size": 5, "counts": [600]}, "expected run lengths of size .20, 30., found 5"),
        ([["a", 0, 5, 5, 3, 3]], "expected numbers"),
        ([[100, 100, 120, 100, 120, 120]], "covers no pixel of its image of 30 x 20"),
        ({"size": [30, 20], "counts": [600]}, "expected run lengths of size .20, 30."),
        ({"size": [20, 30], "counts": [300, 200]}, "add up to 600, found 500"),
        ({"size": [20, 30], "counts": "04"}, "add up to 600, found 4"),
        ({"size": [20, 30], "counts": [-1, 601]}, "run lengths of 0 or more"),
        ({"size": [20, 30], "counts": None}, "run lengths of 0 or more"),
        ({"size": [20, 30], "counts": "0 4"}, "found other characters"),
        ({"size": [20, 30], "counts": "0P"}, "cut short"),
    ],
)
def test_what_is_no_mask_is_refused(segmentation: object, message: str):
    with pytest.raises(SegmentationError, match=message):
        encode_segmentation(segmentation, H, W)


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 0, 5], [1, 2, 3, float("inf")], [50, 2, 3, 3]])
def test_what_is_no_box_is_refused(box: list):
    with pytest.raises(SegmentationError):
        encode_box(box, H, W)
