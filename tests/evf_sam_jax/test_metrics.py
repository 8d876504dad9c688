"""Intersections and unions are counted exactly, and cIoU and gIoU are what the original's are."""

import jax.numpy as jnp
import numpy as np

from evf_sam_jax.metrics import IouSums, overlap_counts


def example(seed: int):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 3, 6, 5)).astype(np.float32)
    target = rng.integers(0, 3, (2, 3, 6, 5)).astype(np.uint8)  # 2: overlapping parts, summed
    mask_valid = rng.random((2, 6, 5)) < 0.8
    phrase_valid = rng.random((2, 3)) < 0.8
    return logits, target, mask_valid, phrase_valid


def test_counts_are_those_of_sets_of_pixels():
    logits, target, mask_valid, phrase_valid = example(0)
    intersection, union = overlap_counts(*map(jnp.asarray, example(0)))
    for b, k in np.ndindex(2, 3):
        valid = set(zip(*np.nonzero(mask_valid[b]), strict=True)) if phrase_valid[b, k] else set()
        predicted = valid & set(zip(*np.nonzero(logits[b, k] > 0), strict=True))
        inside = valid & set(zip(*np.nonzero(target[b, k] == 1), strict=True))
        assert intersection[b, k] == len(predicted & inside)
        assert union[b, k] == len(predicted | inside)


def test_a_logit_of_zero_is_outside():
    one = jnp.ones((1, 1, 2, 2), jnp.uint8)
    counts = overlap_counts(
        jnp.zeros((1, 1, 2, 2)), one, jnp.ones((1, 2, 2), bool), jnp.ones((1, 1), bool)
    )
    assert [int(count[0, 0]) for count in counts] == [0, 4]


def test_scores_by_hand():
    # Two thirds; nothing predicted of nothing (IoU 1); something predicted of nothing (IoU 0).
    sums = IouSums.count(np.array([[2, 0, 0]]), np.array([[3, 0, 5]]), np.ones((1, 3), bool))
    np.testing.assert_allclose(sums.ciou, 2 / 8, rtol=1e-9)
    np.testing.assert_allclose(sums.giou, (2 / 3 + 1 + 0) / 3, rtol=1e-9)


def test_masks_that_are_not_counted_do_not_exist():
    intersection, union = np.array([[2, 9], [0, 1]]), np.array([[3, 9], [0, 9]])
    counted = np.array([[True, False], [True, False]])
    assert IouSums.count(intersection, union, counted) == IouSums(2, 3, 2 / (3 + 1e-10) + 1, 2)


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    union = rng.integers(1, 100, (4, 3))
    intersection = rng.integers(0, union + 1)
    everything = np.ones((4, 3), bool)
    whole = IouSums.count(intersection, union, everything)
    parts = [
        IouSums.count(intersection[i : i + 1], union[i : i + 1], everything[:1]) for i in range(4)
    ]
    merged = IouSums()
    for part in parts:
        merged = merged.merge(part)
    assert (merged.intersection, merged.union, merged.masks) == (
        whole.intersection,
        whole.union,
        whole.masks,
    )
    np.testing.assert_allclose(merged.giou, whole.giou, rtol=1e-12)


def test_sums_stay_exact_where_float32_would_lose_a_pixel():
    sums = IouSums(2**24, 2**24, 1.0, 1).merge(IouSums(1, 1, 1.0, 1))
    assert sums.intersection == 2**24 + 1


def test_no_masks_have_score_zero():
    assert (IouSums().ciou, IouSums().giou) == (0.0, 0.0)
