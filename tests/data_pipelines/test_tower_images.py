"""How both towers take an image follows from the model's configuration alone."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import image_input
from data_pipelines.tower_images import PAD, STRETCH, STRETCH_ALIASED, TowerImages

IMAGE = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)


def test_a_padded_frame_has_the_content_top_left():
    images = TowerImages(frame=64, encoder_size=32)
    frame, content = images.segmenter(IMAGE)
    expected, size = image_input.sam_input(IMAGE, 64)
    np.testing.assert_array_equal(frame, expected)
    assert content == size == images.prompt_frame(90, 150) == (38, 64)


@pytest.mark.parametrize("fit", [STRETCH, STRETCH_ALIASED])
def test_a_stretched_image_is_all_of_the_frame(fit: str):
    images = TowerImages(frame=64, fit=fit, encoder_size=32)
    frame, content = images.segmenter(IMAGE)
    expected = image_input.stretched_input(IMAGE, 64, antialias=fit == STRETCH)
    np.testing.assert_array_equal(frame, expected)
    assert content == images.prompt_frame(90, 150) == (64, 64)


def test_what_the_device_stretches_is_padded_here_and_clicked_on_as_stretched():
    images = TowerImages(frame=64, fit=PAD, stretched_later=True, encoder_size=32)
    frame, content = images.segmenter(IMAGE)
    np.testing.assert_array_equal(frame, image_input.sam_input(IMAGE, 64)[0])
    assert content == (38, 64) and images.prompt_frame(90, 150) == (64, 64)


@pytest.mark.parametrize("fit", [PAD, STRETCH])
def test_a_frame_can_be_written_in_place(fit: str):
    images = TowerImages(frame=64, fit=fit, encoder_size=32)
    row = np.zeros((64, 64, 3), np.uint8)
    frame, _ = images.segmenter(IMAGE, row)
    assert frame is row
    np.testing.assert_array_equal(row, images.segmenter(IMAGE)[0])


def test_the_encoders_image_has_the_shape_that_is_announced():
    images = TowerImages(frame=64, encoder_size=32)
    found = images.encoder(IMAGE)
    np.testing.assert_array_equal(found, image_input.encoder_input(IMAGE, 32))
    assert found.shape == images.encoder_shape == (32, 32, 3)
    assert dataclasses.replace(images, encoder_size=48).encoder_shape == (48, 48, 3)
