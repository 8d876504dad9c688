"""Scores by hand and from sets of pixels; intervals are those of images drawn again."""

import math
from fractions import Fraction

import numpy as np
import pytest

from evf_sam_jax.evaluation.scores import SetScores, cumulative_iou, phrase_ious, score_set


def columns(**given) -> dict[str, np.ndarray]:
    """Columns of rows; by default each phrase has an image of its own, and parts do not overlap."""
    n = len(given["intersection"])
    values = {
        "image_index": np.arange(n),
        "category": np.array([""] * n, object),
        "target_pixels": np.array(given["union"]),
        "predicted_pixels": np.array(given["union"]),
        "intersection_parts_union": np.array(given["intersection"]),
        "union_parts_union": np.array(given["union"]),
        **{name: np.array(value) for name, value in given.items()},
    }
    return values


def scored(**given) -> SetScores:
    return score_set(columns(**given), samples=50)


def test_scores_by_hand():
    # Two thirds; nothing of nothing; something of nothing; all.
    found = scored(intersection=[2, 0, 0, 4], union=[3, 0, 5, 4], image_index=[0, 0, 0, 7])
    score = found.as_original
    assert (found.images, found.phrases) == (2, 4)
    np.testing.assert_allclose(score.ciou.value, 6 / 12, rtol=1e-9)
    np.testing.assert_allclose(score.giou.value, (2 / 3 + 1 + 0 + 1) / 4, rtol=1e-9)
    np.testing.assert_allclose(score.mean_image_iou, (5 / 9 + 1) / 2, rtol=1e-9)
    assert score.precision == {"0.5": 0.75, "0.6": 0.75, "0.7": 0.5, "0.8": 0.5, "0.9": 0.5}


def test_a_tie_with_a_threshold_is_a_hit():
    tenths = {"0.5": 5, "0.6": 6, "0.7": 7, "0.8": 8, "0.9": 9}
    for one, tenth in tenths.items():
        for union in (10, 70, 100, 307_200):
            least = tenth * union // 10
            found = scored(intersection=[least, least - 1], union=[union, union])
            assert found.as_original.precision[one] == 0.5, (one, union)
    assert set(scored(intersection=[0], union=[0]).as_original.precision.values()) == {1.0}


def test_both_ways_to_count_overlapping_parts_are_scored():
    found = scored(
        intersection=[8],
        union=[10],
        intersection_parts_union=[10],
        union_parts_union=[10],
    )
    np.testing.assert_allclose(found.as_original.ciou.value, 0.8, rtol=1e-9)
    np.testing.assert_allclose(found.as_union.ciou.value, 1.0, rtol=1e-9)


def test_sums_are_exact_where_float32_would_lose_pixels():
    intersection, union = np.array([2**24, 1, 0]), np.array([2**24, 1, 1])
    exact = Fraction(2**24 + 1, 2**24 + 2)
    assert math.isclose(cumulative_iou(intersection, union), exact, rel_tol=1e-15)


def test_giou_is_the_exact_mean_rounded_once():
    rng = np.random.default_rng(0)
    union = rng.integers(1, 10**6, 3000)
    intersection = rng.integers(0, union + 1)
    ious = phrase_ious(intersection, union)
    exact = sum(map(Fraction, ious.tolist())) / len(ious)
    found = scored(intersection=intersection, union=union).as_original.giou.value
    assert math.isclose(found, float(exact), rel_tol=2**-52)


def test_no_target_is_said_by_few_pixels():
    found = score_set(
        columns(
            intersection=[0] * 5,
            union=[1] * 5,
            target_pixels=[0, 0, 0, 9, 9],
            predicted_pixels=[0, 49, 50, 49, 50],
        ),
        no_target_pixels=50,
        samples=10,
    ).no_target
    assert (found.without_target, found.with_target) == (3, 2)
    assert (found.n_acc, found.t_acc) == (2 / 3, 1 / 2)
    assert (found.accuracy, found.always_positive_accuracy) == (3 / 5, 2 / 5)


def test_what_there_is_none_of_has_no_accuracy():
    found = scored(intersection=[1], union=[1], target_pixels=[5]).no_target
    assert (found.n_acc, found.t_acc) == (None, 0.0)


def test_categories_are_scored_each():
    values = columns(intersection=[1, 2, 9], union=[2, 4, 10])
    values["category"] = np.array(["wall", "wall", "sky"], object)
    found = score_set(values, samples=10, by_category=True)
    assert found.categories is not None
    assert {name: one.phrases for name, one in found.categories.items()} == {"sky": 1, "wall": 2}
    np.testing.assert_allclose(found.categories["wall"].ciou, 0.5, rtol=1e-9)
    np.testing.assert_allclose(found.category_mean_ciou, (0.5 + 0.9) / 2, rtol=1e-9)
    assert scored(intersection=[1], union=[2]).categories is None


def test_the_interval_of_a_mean_is_the_normal_one():
    rng = np.random.default_rng(1)
    intersection = rng.integers(0, 101, 2000)
    found = score_set(columns(intersection=intersection, union=np.full(2000, 100)), samples=2000)
    half = 1.96 * (intersection / 100).std() / math.sqrt(2000)
    for estimate in (found.as_original.giou, found.as_original.ciou):  # unions are all alike
        np.testing.assert_allclose(estimate.high - estimate.value, half, rtol=0.08)
        np.testing.assert_allclose(estimate.value - estimate.low, half, rtol=0.08)


def test_images_are_drawn_and_not_phrases():
    # Ten images of a hundred phrases each, all right or all wrong: as uncertain as ten phrases.
    right = np.repeat(np.arange(10) % 2, 100)
    alike = scored(
        intersection=right, union=np.ones(1000, int), image_index=np.repeat(np.arange(10), 100)
    ).as_original.giou
    alone = scored(intersection=right, union=np.ones(1000, int)).as_original.giou
    assert alike.high - alike.low > 5 * (alone.high - alone.low)


def test_intervals_are_a_function_of_the_seed_and_of_no_order_of_work(
    monkeypatch: pytest.MonkeyPatch,
):
    rng = np.random.default_rng(2)
    values = columns(intersection=rng.integers(0, 50, 60), union=rng.integers(50, 90, 60))
    once, other = score_set(values, samples=30), score_set(values, samples=30, seed=1)
    assert once.as_original.ciou.low != other.as_original.ciou.low
    monkeypatch.setattr("evf_sam_jax.evaluation.scores._DRAWN", 60 * 7)  # seven samples at a time
    assert score_set(values, samples=30) == once
