"""Thumbnails show where a mask is, however small, and stay small files."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from evf_sam_jax.report.pictures import LARGEST, SIDE, thumbnail
from evf_sam_jax.visualize import COLORS


def opened(uri: str) -> np.ndarray:
    kind, data = uri.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image).astype(int)


def near(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture - np.array(color)).max(-1) < 40


@pytest.mark.parametrize("height, width", [(60, 120), (2000, 700), (SIDE, SIDE)])
def test_the_edge_has_the_colour_and_the_inside_keeps_its_own(height: int, width: int):
    image = np.full((height, width, 3), (0, 120, 0), np.uint8)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    uri, (w, h) = thumbnail(image, mask, "vermilion")
    picture = opened(uri)
    assert picture.shape == (h, w, 3) and max(h, w) == SIDE
    edge = near(picture, COLORS["vermilion"])
    assert edge[h // 4 + 1, w * 3 // 8] and edge[h * 3 // 8, w // 4 + 1]
    assert near(picture, (0, 120, 0))[h * 3 // 8, w * 3 // 8]
    assert near(picture, (128, 188, 128))[h * 3 // 4, w * 3 // 4]  # faded
    assert edge[: h // 5].sum() == 0


def test_a_single_pixel_of_a_large_image_is_seen():
    mask = np.zeros((1500, 3000), bool)
    mask[700, 1500] = True
    uri, _ = thumbnail(np.zeros((1500, 3000, 3), np.uint8), mask, "vermilion")
    # Smaller than a JPEG's block of 8, so its colour is not quite that of the edge.
    red, _, blue = np.moveaxis(opened(uri), -1, 0)
    assert (red - blue > 60).any()


def test_noise_stays_within_the_limit():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    uri, _ = thumbnail(noise, np.ones((SIDE, SIDE), bool), "blue")
    assert len(base64.b64decode(uri.split(",", 1)[1])) <= LARGEST
