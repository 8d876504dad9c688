"""From the phrases of a run, and perhaps of another, to all the numbers of a report."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from evf_sam_jax.evaluation.tables import FEWEST_IMAGES
from evf_sam_jax.predictor import NO_TARGET_PIXELS
from evf_sam_jax.report import breakdown
from evf_sam_jax.report.breakdown import Group
from evf_sam_jax.report.estimates import Bootstrap, Estimate, Ratio, estimate, permutation_p
from evf_sam_jax.report.evaluated_set import EvaluatedSet

HISTOGRAM_BINS = 20
PRECISIONS = (0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Counting:
    """How a run counts, of its config.

    Attributes:
      resamples: of the images, for the intervals.
      seed: of these.
      no_target_pixels: fewer predicted pixels say that a phrase names nothing.
    """

    resamples: int = 1000
    seed: int = 0
    no_target_pixels: int = NO_TARGET_PIXELS


DEFAULT_COUNTING = Counting()


@dataclasses.dataclass(frozen=True)
class GroupScores:
    """Some phrases of a set.

    Attributes:
      phrases: their number.
      ciou: of them.
      to_rest: their cIoU less that of the other phrases of the set; None in a plain breakdown.
      to_other: their cIoU less that of the other run; None without one.
    """

    label: str
    indented: bool
    phrases: int
    ciou: Estimate
    to_rest: Estimate | None
    to_other: Estimate | None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A score of two runs on the same phrases.

    Attributes:
      difference: one's less the other's, with its interval over images, drawn in pairs.
      p: of the permutation test over images.
    """

    score: str
    one: float
    other: float
    difference: Estimate
    p: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A set in two runs.

    Attributes:
      gained: rows of the phrases that only this run finds, by how much their IoU rose.
      lost: rows of those that only the other run finds, by how much it fell.
    """

    differences: tuple[Difference, ...]
    gained: tuple[int, ...]
    lost: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SetAnalysis:
    """All numbers of a set.

    Attributes:
      scores: by name; what was not counted anywhere in the set is missing.
      histogram: phrases by IoU in equal bins of 0 to 1; 1 is in the last.
      other_histogram: of the other run.
      breakdowns: title to groups.
      comparison: with the other run, if it has the set.
    """

    phrases: EvaluatedSet
    other: EvaluatedSet | None
    scores: Mapping[str, Estimate]
    histogram: tuple[int, ...]
    other_histogram: tuple[int, ...] | None
    breakdowns: Mapping[str, tuple[GroupScores, ...]]
    comparison: Comparison | None


def analyse(
    phrases: EvaluatedSet,
    other: EvaluatedSet | None = None,
    counting: Counting = DEFAULT_COUNTING,
) -> SetAnalysis:
    """All numbers of a set; `other` is the same phrases in another run."""
    bootstrap = Bootstrap(phrases.image_index, counting.resamples, counting.seed)
    image_pixels = phrases.height * phrases.width
    plain = {
        "By length of the phrase, in words": breakdown.by_length(phrases.phrase),
        "By size of the target, in pixels (COCO)": breakdown.by_coco_size(phrases.target_pixels),
        "By the target's share of the image": breakdown.by_share(
            phrases.target_pixels, image_pixels
        ),
        "By category": breakdown.by_category(phrases.category),
    }
    breakdowns = {
        title: _scores_of(groups, phrases, other, bootstrap, to_rest=False)
        for title, groups in plain.items()
        if groups
    }
    words = breakdown.by_words(phrases.phrase)
    if words:
        breakdowns["By words"] = _scores_of(words, phrases, other, bootstrap, to_rest=True)
    return SetAnalysis(
        phrases=phrases,
        other=other,
        scores=_set_scores(phrases, bootstrap, counting.no_target_pixels),
        histogram=_histogram(phrases),
        other_histogram=None if other is None else _histogram(other),
        breakdowns=breakdowns,
        comparison=None if other is None else _compare(phrases, other, bootstrap),
    )


def worst_and_best(
    sets: Sequence[EvaluatedSet], count: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The phrases with the least and the greatest IoU, as (set, row), the extreme first.

    Of equal IoUs comes first the one with most pixels wrong, or right. No phrase is in both.
    """
    iou = np.concatenate([phrases.iou for phrases in sets])
    union = np.concatenate([phrases.union for phrases in sets])
    intersection = np.concatenate([phrases.intersection for phrases in sets])
    place = [(i, row) for i, phrases in enumerate(sets) for row in range(len(phrases))]
    each = min(count, len(place) // 2) if len(place) > 1 else 1
    worst = np.lexsort((intersection - union, iou))[:each]
    best = np.lexsort((-intersection, -iou))[:each] if len(place) > 1 else worst[:0]
    return [place[i] for i in worst], [place[i] for i in best]


def _set_scores(
    phrases: EvaluatedSet, bootstrap: Bootstrap, no_target_pixels: int
) -> dict[str, Estimate]:
    empty = phrases.target_pixels == 0
    few = phrases.predicted_pixels < no_target_pixels
    # Each image counts once, by the mean of its phrases.
    per_image = np.bincount(phrases.image_index)[phrases.image_index]
    ratios = {
        "cIoU": phrases.ciou(),
        "cIoU, parts united": phrases.ciou_of_united_parts(),
        "gIoU": phrases.giou(),
        "mean IoU per image": Ratio(phrases.iou / per_image, 1 / per_image),
        **{f"P@{level}": phrases.share(phrases.at_least(level)) for level in PRECISIONS},
    }
    if empty.any():
        ratios["N-acc"] = phrases.share(few, empty)
        ratios["T-acc"] = phrases.share(~few, ~empty)
    draws = bootstrap.ratios(list(ratios.values()))
    return {
        name: estimate(column)
        for name, column in zip(ratios, draws.T, strict=True)
        if np.isfinite(column[0])
    }


def _scores_of(
    groups: Sequence[Group],
    phrases: EvaluatedSet,
    other: EvaluatedSet | None,
    bootstrap: Bootstrap,
    to_rest: bool,
) -> tuple[GroupScores, ...]:
    inside = bootstrap.ratios([phrases.ciou(group.member) for group in groups])
    rest = bootstrap.ratios([phrases.ciou(~group.member) for group in groups]) if to_rest else None
    others = None
    if other is not None:
        others = bootstrap.ratios([other.ciou(group.member) for group in groups])
    scores = []
    for i, group in enumerate(groups):
        images = len(np.unique(phrases.image_index[group.member]))
        # Draws of one or two images say nothing: then the number stands alone.
        draws = slice(None) if images >= FEWEST_IMAGES else slice(1)
        one = inside[draws, i]
        scores.append(
            GroupScores(
                label=group.label,
                indented=group.indented,
                phrases=int(group.member.sum()),
                ciou=estimate(one),
                to_rest=None if rest is None else estimate(one - rest[draws, i]),
                to_other=None if others is None else estimate(one - others[draws, i]),
            )
        )
    return tuple(scores)


def _compare(one: EvaluatedSet, other: EvaluatedSet, bootstrap: Bootstrap) -> Comparison:
    pairs = {
        "cIoU": (one.ciou(), other.ciou()),
        "gIoU": (one.giou(), other.giou()),
        "P@0.5": (one.share(one.found), other.share(other.found)),
    }
    differences = []
    for score, pair in pairs.items():
        draws = bootstrap.ratios(pair)
        if np.isfinite(draws[0]).all():
            one_value, other_value = draws[0].tolist()
            difference = estimate(draws[:, 0] - draws[:, 1])
            p = permutation_p(*pair, one.image_index)
            differences.append(Difference(score, one_value, other_value, difference, p))
    change = one.iou - other.iou
    gained = _ordered(np.flatnonzero(one.found & ~other.found), -change)
    lost = _ordered(np.flatnonzero(other.found & ~one.found), change)
    return Comparison(tuple(differences), gained, lost)


def _ordered(rows: Int[np.ndarray, " m"], key: np.ndarray) -> tuple[int, ...]:
    return tuple(rows[np.argsort(key[rows], kind="stable")].tolist())


def _histogram(phrases: EvaluatedSet) -> tuple[int, ...]:
    counts, _ = np.histogram(phrases.iou, HISTOGRAM_BINS, (0.0, 1.0))
    return tuple(counts.tolist())
