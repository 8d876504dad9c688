"""Tables of positions are resized as torch resizes them."""

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import image_input
from evf_sam_jax.models.resize import bicubic_matrix, resize_bicubic

SIDES = [(14, 64), (7, 256), (7, 16), (5, 3), (1, 4)]


def table(side: int) -> np.ndarray:
    return np.random.default_rng(side).normal(size=(side, side, 6)).astype(np.float32)


@pytest.mark.parametrize(("source", "target"), SIDES)
def test_resizes_as_images_are_resized(source: int, target: int):
    """Which is compared with stored outputs of torch."""
    found = resize_bicubic(jnp.asarray(table(source)), target, target)
    expected = image_input.resize_bicubic(table(source), target)
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.torch
@pytest.mark.parametrize(("source", "target"), SIDES)
def test_resizes_as_torch(source: int, target: int):
    import torch

    grid = torch.from_numpy(table(source)).permute(2, 0, 1)[None]
    size = (target, target + 1)
    expected = torch.nn.functional.interpolate(grid, size, mode="bicubic", align_corners=False)
    found = resize_bicubic(jnp.asarray(table(source)), *size)
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0), atol=3e-6)


@pytest.mark.parametrize(("source", "target"), SIDES)
def test_each_pixel_is_a_mean_of_others(source: int, target: int):
    np.testing.assert_allclose(bicubic_matrix(source, target).sum(axis=1), 1.0, atol=1e-6)


def test_the_same_size_changes_nothing():
    np.testing.assert_array_equal(bicubic_matrix(14, 14), np.eye(14))
