"""Images fill the frame as by the original's second resize, whatever their size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evf_sam_jax.models.frame import PIXEL_MEAN, PIXEL_STD, normalize_and_stretch

SIDE = 64

stretch = jax.jit(normalize_and_stretch, static_argnums=2)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def normalized(image: np.ndarray) -> np.ndarray:
    return ((image - np.asarray(PIXEL_MEAN)) / np.asarray(PIXEL_STD)).astype(np.float32)


@functools.cache
def stretched(height: int, width: int) -> np.ndarray:
    """What the original makes of the first image's top left."""
    return np.asarray(stretch(images(1), jnp.asarray([[height, width]]), "legacy"))[0]


def test_the_current_profile_only_normalises():
    image = images(2)
    found = stretch(image, jnp.asarray([[SIDE, SIDE], [20, SIDE]]), "current")
    np.testing.assert_allclose(found, normalized(image), atol=1e-5)


def test_what_fills_the_frame_is_not_resized():
    np.testing.assert_allclose(stretched(SIDE, SIDE), normalized(images(1))[0], atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, SIDE), (SIDE, 1)])
def test_a_line_fills_the_frame(height: int, width: int):
    line = normalized(images(1))[0, :height, :width]
    whole = np.broadcast_to(line, (SIDE, SIDE, 3))
    np.testing.assert_allclose(stretched(height, width), whole, atol=1e-5)


def test_pixels_are_mixed_by_the_distance_of_their_centres():
    # Twice as many rows: a quarter and three quarters of the two nearest, and edges repeated.
    half = normalized(images(1))[0, : SIDE // 2]
    found = stretched(SIDE // 2, SIDE)
    np.testing.assert_allclose(found[0], half[0], atol=1e-5)
    np.testing.assert_allclose(found[3], 0.75 * half[1] + 0.25 * half[2], atol=1e-5)
    np.testing.assert_allclose(found[4], 0.25 * half[1] + 0.75 * half[2], atol=1e-5)
    np.testing.assert_allclose(found[-1], half[-1], atol=1e-5)


def test_each_image_of_a_batch_has_its_own_size():
    image, sizes = images(1).repeat(2, axis=0), [(43, SIDE), (SIDE, 21)]
    found = stretch(image, jnp.asarray(sizes), "legacy")
    for one, (height, width) in zip(found, sizes, strict=True):
        np.testing.assert_allclose(one, stretched(height, width), atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(("height", "width"), [(43, SIDE), (SIDE, 21), (SIDE, 63), (5, SIDE)])
def test_stretches_as_torch(height: int, width: int):
    import torch

    content = torch.from_numpy(normalized(images(1))[0, :height, :width]).permute(2, 0, 1)
    expected = torch.nn.functional.interpolate(
        content[None], (SIDE, SIDE), mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(stretched(height, width), expected, atol=2e-6)
