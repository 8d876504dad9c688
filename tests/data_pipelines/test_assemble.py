"""Assembly: examples of any size end up in fixed shapes, with clicks and boxes on their targets."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.assemble import BatchSpec, Example, Slot, assemble, draw_box, draw_point
from data_pipelines.image_input import encoder_input, sam_input
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tower_images import TowerImages
from evf_sam_jax.errors import UserError

TOKENIZER = load_tokenizer(SHAPES_TOKENIZER)
SPEC = BatchSpec(
    batch_size=2,
    phrases=3,
    text_length=8,
    images=TowerImages(frame=48, encoder_size=32),
    canvas=(40, 60),
    prompts=True,
)


def example(height: int = 30, width: int = 50, phrases: int = 2) -> Example:
    """Noise, and a rectangle of its own for each phrase."""
    rng = np.random.default_rng(height * width)
    masks = np.zeros((phrases, height, width), np.uint8)
    for i in range(phrases):
        masks[i, 5 + i : 12 + i, 8 * i + 3 : 8 * i + 9] = 1
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Example(41, image, ("the red circle", "strip", "the square")[:phrases], masks)


def test_every_field_holds_the_example():
    one = example()
    batch = assemble([Slot(one)], SPEC, TOKENIZER)
    frame, size = sam_input(one.image, 48)
    assert batch.sam_image is not None
    np.testing.assert_array_equal(batch.sam_image[0], frame)
    np.testing.assert_array_equal(batch.sam_size[0], size)
    np.testing.assert_array_equal(batch.encoder_image[0], encoder_input(one.image, 32))
    np.testing.assert_array_equal(batch.original_size[0], (30, 50))
    np.testing.assert_array_equal(batch.mask[0, :2, :30, :50], one.masks)
    assert batch.mask.sum() == one.masks.sum()
    assert batch.mask_valid[0, :30, :50].all() and batch.mask_valid.sum() == 30 * 50
    np.testing.assert_array_equal(batch.phrase_valid, [[True, True, False]])
    assert batch.example_id[0] == 41 and batch.example_valid[0] and batch.skipped_id[0] == -1


def test_text_is_tokenised_and_padded():
    batch = assemble([Slot(example())], SPEC, TOKENIZER)
    ids = TOKENIZER.encode("the red circle")
    np.testing.assert_array_equal(batch.text_ids[0, 0], ids + [1] * (8 - len(ids)))
    np.testing.assert_array_equal(batch.text_valid.sum(-1), [[5, 3, 2]])


def test_ignored_pixels_are_not_valid():
    ignore = np.zeros((30, 50), bool)
    ignore[3, 4] = True
    batch = assemble([Slot(dataclasses.replace(example(), ignore=ignore))], SPEC, TOKENIZER)
    assert not batch.mask_valid[0, 3, 4]
    assert batch.mask_valid.sum() == 30 * 50 - 1


def test_padding_is_no_example():
    batch = assemble([Slot(None, skipped_id=7), Slot(example())], SPEC, TOKENIZER)
    np.testing.assert_array_equal(batch.example_valid, [False, True])
    np.testing.assert_array_equal(batch.skipped_id, [7, -1])
    assert batch.example_id[0] == -1
    assert not batch.phrase_valid[0].any() and not batch.mask_valid[0].any()
    assert (batch.sam_size > 0).all() and (batch.original_size > 0).all()
    assert batch.text_valid.any(-1).all()  # softmax over a padded phrase stays defined


def test_clicks_and_boxes_are_in_the_frame():
    one = example(30, 50)
    batch = assemble([Slot(one, prompt_seed=(3, 4))], SPEC, TOKENIZER)
    assert batch.points is not None and batch.boxes is not None
    scale = np.array([batch.sam_size[0, 1] / 50, batch.sam_size[0, 0] / 30])
    for phrase, mask in enumerate(one.masks):
        x, y = np.rint(batch.points[0, phrase, 0] / scale).astype(int)
        assert mask[y, x] == 1
        x0, y0, x1, y1 = batch.boxes[0, phrase] / np.tile(scale, 2)
        ys, xs = np.nonzero(mask)
        np.testing.assert_allclose([x0, x1], [xs.min(), xs.max()], atol=0.61)  # a tenth of 6
        np.testing.assert_allclose([y0, y1], [ys.min(), ys.max()], atol=0.71)
    assert not batch.boxes[0, 2].any()


def test_clicks_and_boxes_depend_on_the_seed_alone():
    batches = [
        assemble([Slot(example(), prompt_seed=seed)], SPEC, TOKENIZER)
        for seed in [(0, 1), (0, 1), (0, 2)]
    ]
    np.testing.assert_array_equal(batches[0].boxes, batches[1].boxes)
    np.testing.assert_array_equal(batches[0].points, batches[1].points)
    boxes = [np.asarray(batch.boxes)[0, :2] for batch in batches]
    assert (boxes[0] != boxes[2]).any()


def test_without_prompts_there_are_none():
    batch = assemble([Slot(example())], dataclasses.replace(SPEC, prompts=False), TOKENIZER)
    assert batch.points is None and batch.boxes is None


def test_a_click_may_be_any_pixel_of_the_mask_and_no_other():
    mask = np.zeros((5, 6), np.uint8)
    mask[1, 2] = mask[3, 5] = mask[4, 0] = 1
    rng = np.random.default_rng(0)
    clicks = {tuple(draw_point(mask, rng)) for _ in range(100)}
    assert clicks == {(2, 1), (5, 3), (0, 4)}


def test_a_box_stays_inside_the_image():
    mask = np.ones((5, 6), np.uint8)
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box(mask, rng, jitter=0.5) for _ in range(50)])
    assert boxes.min() == 0 and boxes[:, 2].max() == 5 and boxes[:, 3].max() == 4
    np.testing.assert_array_equal(draw_box(mask, rng, jitter=0.0), [0, 0, 5, 4])


def test_an_empty_mask_gets_no_click():
    one = dataclasses.replace(example(), masks=np.zeros((2, 30, 50), np.uint8))
    batch = assemble([Slot(one)], SPEC, TOKENIZER)
    assert batch.points is not None and not batch.points.any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="example 41 is 41 x 50, expected at most the canvas of 40"):
        assemble([Slot(example(41, 50))], SPEC, TOKENIZER)
    with pytest.raises(UserError, match="example 41 has 3 phrases, expected at most 2"):
        spec = dataclasses.replace(SPEC, phrases=2)
        assemble([Slot(example(phrases=3))], spec, TOKENIZER)
    with pytest.raises(UserError, match="a phrase has 5 tokens, expected at most 4"):
        assemble([Slot(example())], dataclasses.replace(SPEC, text_length=4), TOKENIZER)


def test_the_target_of_an_image_larger_than_the_canvas_can_be_shrunk():
    one = example(80, 50)
    batch = assemble([Slot(one)], dataclasses.replace(SPEC, shrink=True), TOKENIZER)
    np.testing.assert_array_equal(batch.original_size[0], (40, 25))
    np.testing.assert_array_equal(batch.mask[0, :2, :40, :25], one.masks[:, 1::2, 1::2])
    frame, size = sam_input(one.image, 48)  # the model sees all of it
    np.testing.assert_array_equal(batch.sam_image[0], frame)
    np.testing.assert_array_equal(batch.sam_size[0], size)
