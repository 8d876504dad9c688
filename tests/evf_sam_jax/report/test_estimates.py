"""Intervals are those of the evaluation's results; p-values are those of all swaps."""

import itertools

import numpy as np
import pytest

from evf_sam_jax.evaluation.scores import score_set
from evf_sam_jax.report.estimates import Bootstrap, Ratio, estimate, permutation_p

RNG = np.random.default_rng(0)
IMAGE = np.repeat(np.arange(30), RNG.integers(1, 5, 30))
UNION = RNG.integers(50, 900, len(IMAGE))
INTERSECTION = RNG.integers(0, UNION + 1)


def test_intervals_are_those_of_the_results():
    columns = {
        "image_index": IMAGE,
        "category": np.full(len(IMAGE), ""),
        "target_pixels": UNION,
        "predicted_pixels": UNION,
        "intersection": INTERSECTION,
        "union": UNION,
        "intersection_parts_union": INTERSECTION,
        "union_parts_union": UNION,
    }
    expected = score_set(columns, samples=200, seed=3).as_original
    bootstrap = Bootstrap(IMAGE, 200, 3)
    iou = INTERSECTION / UNION
    draws = bootstrap.ratios([Ratio(INTERSECTION, UNION), Ratio(iou, np.ones(len(iou)))])
    for column, one in zip(draws.T, (expected.ciou, expected.giou), strict=True):
        found = estimate(column)
        assert found.value == pytest.approx(one.value, rel=1e-12)
        assert (found.low, found.high) == pytest.approx((one.low, one.high), rel=1e-9)


def test_images_are_drawn_whole_and_ratios_in_pairs():
    # Within an image the two cancel: drawing images leaves a difference without spread.
    image = np.repeat(np.arange(20), 2)
    one = Ratio(np.tile([3.0, 1.0], 20), np.full(40, 4.0))
    other = Ratio(np.tile([1.0, 2.0], 20), np.full(40, 4.0))
    draws = Bootstrap(image, 100, 0).ratios([one, other])
    assert np.ptp(draws, axis=0) == pytest.approx([0, 0], abs=1e-12)
    assert not estimate(draws[:, 0] - draws[:, 0]).excludes_zero
    assert estimate(draws[:, 0] - draws[:, 1]).excludes_zero


def test_what_was_never_counted_is_no_number():
    nothing = Ratio(np.zeros(len(IMAGE)), np.zeros(len(IMAGE)))
    found = estimate(Bootstrap(IMAGE, 20, 0).ratios([nothing])[:, 0])
    assert np.isnan([found.value, found.low, found.high]).all()
    assert np.isnan(permutation_p(nothing, nothing, IMAGE))


def all_swaps_p(one: Ratio, other: Ratio) -> float:
    """By the definition, for one phrase an image."""

    def difference(swapped: np.ndarray) -> float:
        left = np.where(swapped, other.over, one.over).sum()
        left /= np.where(swapped, other.under, one.under).sum()
        right = np.where(swapped, one.over, other.over).sum()
        right /= np.where(swapped, one.under, other.under).sum()
        return abs(left - right)

    n = len(one.over)
    observed = difference(np.zeros(n, bool))
    swaps = [np.array(s) for s in itertools.product((False, True), repeat=n)]
    return float(np.mean([difference(s) >= observed - 1e-12 for s in swaps]))


@pytest.mark.parametrize("shift", [0, 60, 200])
def test_p_is_the_share_of_swaps_that_differ_as_much(shift: int):
    rng = np.random.default_rng(shift)
    under = rng.integers(300, 600, 9)
    one = Ratio(rng.integers(0, 300, 9) + shift * 1, under)
    other = Ratio(rng.integers(0, 300, 9), rng.integers(300, 600, 9))
    expected = all_swaps_p(one, other)
    assert permutation_p(one, other, np.arange(9)) == pytest.approx(expected, abs=0.02)


def test_equal_runs_never_differ_and_better_ones_do():
    same = Ratio(INTERSECTION, UNION)
    assert permutation_p(same, same, IMAGE, permutations=100) == 1
    worse = Ratio(INTERSECTION // 2, UNION)
    assert permutation_p(same, worse, IMAGE, permutations=1000) == pytest.approx(1 / 1001)
