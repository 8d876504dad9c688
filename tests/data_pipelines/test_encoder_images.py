"""Images for CLIP and ViLT: what transformers' processors give, and what becomes of odd shapes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.encoder_images import (
    CLIP_MEAN,
    CLIP_NORMALISATIONS,
    CLIP_STD,
    clip_crop_input,
    clip_input,
    vilt_input,
    vilt_pad_input,
    vilt_size,
)
from data_pipelines.tower_images import ENCODER
from evf_sam_jax.models.clip import ClipConfig
from tests.parity import encoder_image_cases as cases

GOLDEN = Path(__file__).parents[1] / "golden"
# What is rounded is the scale: one grey level is 1.5e-2 and 8e-3 of them.
BAR = 1e-5


def ours(name: str) -> np.ndarray:
    """The image of a case, [h, w, 3] without padding."""
    kind, size = name.split("/")
    image = cases.image(*map(int, size.split("x")))
    if kind == "vilt_pad":
        height, width = vilt_size(*image.shape[:2], cases.VILT_SIZE)
        return vilt_pad_input(image, cases.VILT_SIZE)[:height, :width, :3]
    if kind == "vilt":
        return vilt_input(image, cases.VILT_SIZE)
    return ENCODER[kind](image, cases.CLIP_SIZE)


def test_equal_to_stored_outputs_of_the_originals() -> None:
    with np.load(GOLDEN / "encoder_images.npz") as golden:
        assert len(golden.files) == 6 * len(cases.SIZES)
        for name in golden.files:
            found = ours(name)[:: cases.STEP, :: cases.STEP]
            np.testing.assert_allclose(found, golden[name], atol=BAR, err_msg=name)


@pytest.mark.torch
def test_equal_to_the_originals() -> None:
    for name, expected in cases.original_outputs().items():
        np.testing.assert_allclose(ours(name), expected, atol=BAR, err_msg=name)


def grey_levels(image: np.ndarray) -> np.ndarray:
    return np.rint((image * np.asarray(CLIP_STD) + np.asarray(CLIP_MEAN)) * 255)


def test_an_image_that_fits_is_only_normalised() -> None:
    image = cases.image(64, 64)
    for prepare in (clip_input, clip_crop_input):
        np.testing.assert_array_equal(grey_levels(prepare(image, 64)), image)
    np.testing.assert_allclose(vilt_input(image, 64), image / 127.5 - 1, atol=1e-6)


def test_white_is_one_and_black_minus_one_with_inceptions_normalisation() -> None:
    image = np.full((40, 60, 3), 255, np.uint8)
    image[:, 30:] = 0
    for kind in ("clip_inception", "clip_crop_inception"):
        found = ENCODER[kind](image, 20)
        assert (found[:, :5] == 1).all() and (found[:, -5:] == -1).all()


@pytest.mark.parametrize("image_fit", ["stretch", "crop"])
@pytest.mark.parametrize("normalisation", CLIP_NORMALISATIONS)
def test_every_image_of_clip_can_be_made(image_fit: str, normalisation: str) -> None:
    tiny = ClipConfig.tiny()
    config = dataclasses.replace(tiny, image_fit=image_fit, normalisation=normalisation)
    black = ENCODER[config.image_kind](np.zeros((40, 40, 3), np.uint8), 8)
    mean, std = (np.asarray(one) for one in CLIP_NORMALISATIONS[normalisation])
    np.testing.assert_allclose(black[0, 0], -mean / std, rtol=1e-5)


def test_the_crop_is_the_middle_and_the_stretch_is_everything() -> None:
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 200
    assert (grey_levels(clip_crop_input(image, 20))[:, 2:-2] == 200).all()
    stretched = grey_levels(clip_input(image, 60))
    assert (stretched[:, 22:38] == 200).all()
    assert (stretched[:, :18] == 0).all() and (stretched[:, 42:] == 0).all()


def test_of_an_odd_number_of_columns_torchvision_cuts_more_off_where_it_rounds_to_even() -> None:
    image = cases.image(64, 67)
    np.testing.assert_array_equal(grey_levels(clip_crop_input(image, 64)), image[:, 2:66])
    image = cases.image(65, 64)
    np.testing.assert_array_equal(grey_levels(clip_crop_input(image, 64)), image[:64])


@pytest.mark.parametrize("height, width", [(1, 40_000), (40_000, 1), (1, 1), (2, 33)])
def test_a_line_of_pixels_is_an_image_too(height: int, width: int) -> None:
    image = np.full((height, width, 3), 90, np.uint8)
    for prepare in (clip_input, clip_crop_input):
        np.testing.assert_array_equal(grey_levels(prepare(image, 32)), np.full((32, 32, 3), 90))
    padded = vilt_pad_input(image, 96)
    assert padded.shape == (128, 128, 4)
    inside = padded[..., 3].astype(bool)
    assert 32 * 32 <= inside.sum() <= 96 * 128
    np.testing.assert_allclose(padded[inside][:, :3], 90 / 127.5 - 1, atol=1e-6)


def test_padding_is_zero_and_marked() -> None:
    image = np.full((30, 60, 3), 255, np.uint8)
    height, width = vilt_size(30, 60, 384)
    assert (height, width) == (320, 608)
    padded = vilt_pad_input(image, 384)
    assert padded.shape == (608, 608, 4)
    assert (padded[:height, :width] == 1).all()
    assert not padded[height:].any() and not padded[:, width:].any()


@pytest.mark.parametrize(
    "height, width, expected",
    [(480, 640, (384, 512)), (640, 480, (512, 384)), (427, 640, (384, 576)), (10, 10, (384, 384))],
)
def test_vilt_keeps_the_sides_in_whole_patches(height, width, expected) -> None:
    assert vilt_size(height, width, 384) == expected
