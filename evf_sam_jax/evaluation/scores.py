"""From rows to numbers: cIoU, gIoU, precision, no-target accuracy, and their intervals.

Reference: hustvl/EVF-SAM at 9935dc5, `eval.py`: cIoU is the sum of all intersections over that of
all unions, gIoU the mean of the phrases' IoUs, where an empty prediction of an empty target has 1.

Differences: sums are exact; gIoU divides by the number of phrases, without the 1e-5 that the
original adds; precision compares integers, so that 50 of 100 pixels are an IoU of 0.5 or more;
where parts of a target overlap, both ways to count are given.

N-acc and T-acc are those of gRefCOCO (Liu et al. 2023, "GRES"): a prediction of few pixels says
that there is no target.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from evf_sam_jax.metrics import EPSILON
from evf_sam_jax.predictor import NO_TARGET_PIXELS

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
# Images drawn at a time, over all samples: what bounds the memory of the bootstrap.
_DRAWN = 2**22

Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score, with a 95 % interval over images.

    Attributes:
      low: one in forty resamplings of the images scores less.
      high: one in forty scores more.
    """

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Score:
    """How well masks fit, by one way to count overlapping parts.

    Attributes:
      ciou: all intersections over all unions.
      giou: mean IoU of the phrases.
      mean_image_iou: mean over images of the mean IoU of their phrases.
      precision: share of phrases whose IoU is at least so much, by that number.
    """

    ciou: Estimate
    giou: Estimate
    mean_image_iou: float
    precision: dict[str, float]


@dataclasses.dataclass(frozen=True)
class NoTarget:
    """Whether the model says that nothing is meant, by predicting few pixels.

    Attributes:
      fewer_than: pixels that say so.
      without_target: phrases that name nothing.
      with_target: phrases that name something.
      n_acc: share of the former that it says so of; None where there are none.
      t_acc: share of the latter that it does not say so of; None where there are none.
      accuracy: share of all phrases that it is right about.
      always_positive_accuracy: the same of a model that never says so, whose N-acc is 0 and whose
        T-acc is 1.
    """

    fewer_than: int
    without_target: int
    with_target: int
    n_acc: float | None
    t_acc: float | None
    accuracy: float
    always_positive_accuracy: float


@dataclasses.dataclass(frozen=True)
class CategoryScore:
    """cIoU of a category, overlapping parts counted as their union."""

    phrases: int
    ciou: float


@dataclasses.dataclass(frozen=True)
class SetScores:
    """All numbers of a set.

    Attributes:
      as_original: overlapping parts counted as the original does.
      as_union: overlapping parts counted as their union.
      categories: of each its own; None where phrases are not categories.
      category_mean_ciou: mean of theirs.
    """

    images: int
    phrases: int
    as_original: Score
    as_union: Score
    no_target: NoTarget
    categories: dict[str, CategoryScore] | None = None
    category_mean_ciou: float | None = None


def score_set(
    columns: Columns,
    *,
    no_target_pixels: int = NO_TARGET_PIXELS,
    samples: int = 1000,
    seed: int = 0,
    by_category: bool = False,
) -> SetScores:
    """Scores the phrases of a set.

    Args:
      columns: of `rows.PhraseRow`, by name, at least one row.
      no_target_pixels: fewer predicted pixels say that nothing is meant.
      samples: resamplings of the images for the intervals.
      seed: of the resamplings.
      by_category: whether to score each category.
    """
    _, image = np.unique(columns["image_index"], return_inverse=True)
    original = columns["intersection"], columns["union"]
    union = columns["intersection_parts_union"], columns["union_parts_union"]
    categories = mean = None
    if by_category:
        categories = _by_category(columns["category"], *union)
        mean = math.fsum(one.ciou for one in categories.values()) / len(categories)
    return SetScores(
        images=int(image.max()) + 1,
        phrases=len(image),
        as_original=_score(image, *original, samples, seed),
        as_union=_score(image, *union, samples, seed),
        no_target=_no_target(columns, no_target_pixels),
        categories=categories,
        category_mean_ciou=mean,
    )


def phrase_ious(
    intersection: Int[np.ndarray, " n"], union: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """IoU of each phrase; 1 where nothing is predicted of nothing."""
    return intersection / (union + EPSILON) + (union == 0)


def iou_at_least(
    intersection: Int[np.ndarray, " n"], union: Int[np.ndarray, " n"], tenths: int
) -> Bool[np.ndarray, " n"]:
    """Which phrases have so many tenths of IoU or more, exactly; nothing of nothing has."""
    return 10 * intersection.astype(np.int64) >= tenths * union.astype(np.int64)


def cumulative_iou(intersection: Int[np.ndarray, " n"], union: Int[np.ndarray, " n"]) -> float:
    """All intersections over all unions."""
    return int(intersection.sum()) / (int(union.sum()) + EPSILON)


def to_json(scores: SetScores) -> dict[str, Any]:
    """The numbers as `results.json` has them."""
    values = dataclasses.asdict(scores)
    return {key: value for key, value in values.items() if value is not None}


def _score(
    image: Int[np.ndarray, " n"],
    intersection: Int[np.ndarray, " n"],
    union: Int[np.ndarray, " n"],
    samples: int,
    seed: int,
) -> Score:
    ious = phrase_ious(intersection, union)
    images = int(image.max()) + 1
    phrases = np.bincount(image, minlength=images)
    pixels = np.zeros((images, 2), np.int64)
    np.add.at(pixels, image, np.stack([intersection, union], -1).astype(np.int64))
    of_image = np.bincount(image, weights=ious, minlength=images)

    def resampled(drawn: Int[np.ndarray, "s m"]) -> Float[np.ndarray, "2 s"]:
        both = pixels[drawn].sum(1)
        ciou = both[:, 0] / (both[:, 1] + EPSILON)
        return np.stack([ciou, of_image[drawn].sum(1) / phrases[drawn].sum(1)])

    (ciou_low, ciou_high), (giou_low, giou_high) = _intervals(resampled, images, samples, seed)
    return Score(
        ciou=Estimate(cumulative_iou(intersection, union), ciou_low, ciou_high),
        giou=Estimate(math.fsum(ious) / len(ious), giou_low, giou_high),
        mean_image_iou=math.fsum(of_image / phrases) / images,
        precision={
            str(least): float(np.mean(iou_at_least(intersection, union, round(10 * least))))
            for least in THRESHOLDS
        },
    )


def _intervals(
    resampled: Callable[[np.ndarray], np.ndarray], images: int, samples: int, seed: int
) -> list[tuple[float, float]]:
    """95 % intervals of scores by the bootstrap: images are drawn with replacement.

    Args:
      resampled: [s, images] places of drawn images -> [scores, s].
    """
    rng = np.random.default_rng(seed)
    at_a_time = max(1, _DRAWN // images)
    found = [
        resampled(rng.integers(0, images, (min(at_a_time, samples - done), images)))
        for done in range(0, samples, at_a_time)
    ]
    low, high = np.quantile(np.concatenate(found, axis=1), (0.025, 0.975), axis=1)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _no_target(columns: Columns, fewer_than: int) -> NoTarget:
    none = columns["target_pixels"] == 0
    says_none = columns["predicted_pixels"] < fewer_than
    without, with_target = int(none.sum()), int((~none).sum())
    return NoTarget(
        fewer_than=fewer_than,
        without_target=without,
        with_target=with_target,
        n_acc=float(np.mean(says_none[none])) if without else None,
        t_acc=float(np.mean(~says_none[~none])) if with_target else None,
        accuracy=float(np.mean(says_none == none)),
        always_positive_accuracy=with_target / len(none),
    )


def _by_category(
    category: np.ndarray, intersection: Int[np.ndarray, " n"], union: Int[np.ndarray, " n"]
) -> dict[str, CategoryScore]:
    names, place = np.unique(category, return_inverse=True)
    found = {}
    for number, name in enumerate(names.tolist()):
        own = place == number
        ciou = cumulative_iou(intersection[own], union[own])
        found[name] = CategoryScore(int(own.sum()), ciou)
    return found
