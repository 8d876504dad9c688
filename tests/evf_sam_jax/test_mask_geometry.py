"""Masks reach the pixels of the image as by the original's two resizes, whatever the size."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.image_input import sam_size
from evf_sam_jax.mask_geometry import resample_masks
from tests.parity import mask_geometry_cases as cases

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "mask_geometry_torch.npz")
TOLERANCE = 2e-5  # logits go up to 20

resample = jax.jit(resample_masks, static_argnames=("canvas", "frame"))


def ours(height: int, width: int, canvas: tuple[int, int], **options) -> np.ndarray:
    """[2, *canvas] of one image with two phrases."""
    sizes = jnp.array([sam_size(height, width, cases.FRAME)]), jnp.array([[height, width]])
    low_res = jnp.asarray(cases.logits(height, width)[None])
    return np.array(resample(low_res, *sizes, canvas=canvas, frame=cases.FRAME, **options))[0]


@pytest.mark.parametrize(("height", "width"), cases.SIZES)
def test_equals_stored_outputs_of_the_original(height: int, width: int):
    found = ours(height, width, (height, width))
    rows, columns = cases.steps(height, width)
    golden = GOLDEN[f"{height}_{width}"]
    np.testing.assert_allclose(found[:, rows, columns], golden, rtol=0, atol=TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize(("height", "width"), [*cases.SIZES, (229, 1021), (2048, 3)])
def test_equals_the_original(height: int, width: int):
    theirs = cases.original(cases.logits(height, width), height, width)
    found = ours(height, width, (height, width))
    np.testing.assert_allclose(found, theirs, rtol=0, atol=TOLERANCE)


def stretched(height: int, width: int) -> np.ndarray:
    """[2, height, width] of an image that fills the frame whatever its sides."""
    # The size of the content is that of the padded image: it must not matter.
    sizes = jnp.array([sam_size(height, width, cases.FRAME)]), jnp.array([[height, width]])
    low_res = jnp.asarray(cases.logits(height, width)[None])
    return np.array(resample(low_res, *sizes, canvas=(height, width), frame=None))[0]


@pytest.mark.parametrize(("height", "width"), cases.SIZES)
def test_a_stretched_frame_equals_stored_outputs_of_the_original(height: int, width: int):
    rows, columns = cases.steps(height, width)
    golden = GOLDEN[f"stretched_{height}_{width}"]
    found = stretched(height, width)[:, rows, columns]
    np.testing.assert_allclose(found, golden, rtol=0, atol=TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize(("height", "width"), [*cases.SIZES, (229, 1021), (2048, 3)])
def test_a_stretched_frame_equals_the_original(height: int, width: int):
    theirs = cases.original_stretched(cases.logits(height, width), height, width)
    np.testing.assert_allclose(stretched(height, width), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(427, 640), (640, 1), (13, 7)])
def test_a_canvas_holds_the_image_top_left_and_zeros(height: int, width: int):
    found = ours(height, width, (648, 652))
    exact = ours(height, width, (height, width))
    np.testing.assert_allclose(found[:, :height, :width], exact, rtol=0, atol=TOLERANCE)
    found[:, :height, :width] = 0
    assert not found.any()


def test_tiles_are_parts_of_the_whole():
    height, width, tile = 333, 500, (128, 96)
    whole = ours(height, width, (height, width))
    for top, left in ((0, 0), (128, 192), (205, 404)):
        part = ours(height, width, tile, origin=jnp.array([top, left]))
        cut = whole[:, top : top + tile[0], left : left + tile[1]]
        np.testing.assert_allclose(part, cut, rtol=0, atol=TOLERANCE)


def test_images_of_a_batch_do_not_mix():
    """Each with its own size, in one compiled shape."""
    sizes = [(427, 640), (1, 53), (640, 1)]
    low_res = jnp.stack([jnp.asarray(cases.logits(*size)) for size in sizes])
    sam_sizes = jnp.array([sam_size(*size, cases.FRAME) for size in sizes])
    together = resample(low_res, sam_sizes, jnp.array(sizes), canvas=(640, 640), frame=cases.FRAME)
    for found, size in zip(together, sizes, strict=True):
        alone = ours(*size, (640, 640))
        np.testing.assert_allclose(found, alone, rtol=0, atol=TOLERANCE)


def test_gradients_are_the_transposed_resampling():
    """<A x, y> = <x, A' y>: what the loss sends back is exactly what went forward."""
    height, width = 97, 331
    given = jnp.array([sam_size(height, width, cases.FRAME)]), jnp.array([[height, width]])
    forward = functools.partial(
        resample,
        sam_size=given[0],
        original_size=given[1],
        canvas=(height, width),
        frame=cases.FRAME,
    )
    x = jnp.asarray(cases.logits(height, width)[None])
    y = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, height, width), np.float32))
    out, back = jax.vjp(forward, x)
    there, here = float((out * y).sum()), float((x * back(y)[0]).sum())
    assert there == pytest.approx(here, rel=1e-4)
