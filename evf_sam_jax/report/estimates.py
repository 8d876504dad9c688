"""Ratios of sums over phrases with bootstrap intervals over images, and tests of differences.

cIoU, gIoU and shares of phrases are all ratios of two sums over phrases. Phrases of an image share
its difficulty, so images are what is drawn again, with all their phrases; all ratios of a set see
the same draws, which makes differences between them paired. The draws are those of
`evf_sam_jax/evaluation/scores.py`, so with the values that `results.json` names as its config the
intervals are those that it has.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num

PERMUTATIONS = 10_000
LEVEL = 0.95  # of the intervals
_CHUNK = 4_000_000  # numbers of a block of draws that is held at once


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A sum of `over` divided by a sum of `under`, of the n phrases of a set.

    A phrase that does not count has 0 in both.
    """

    over: Num[np.ndarray, " n"]
    under: Num[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its interval; all NaN where nothing was counted."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Draws of a set's images; ratios computed with it can be compared with each other.

    Attributes:
      images: their number.
    """

    def __init__(self, image: Int[np.ndarray, " n"], resamples: int, seed: int):
        """`image` says for each phrase of which image it is, by any number."""
        names, self._image = np.unique(image, return_inverse=True)
        self.images = len(names)
        self._resamples, self._seed = resamples, seed

    def ratios(self, ratios: Sequence[Ratio]) -> Float[np.ndarray, "r m"]:
        """The m ratios themselves, then those of every draw; NaN where nothing is counted."""
        columns = [ratio.over for ratio in ratios] + [ratio.under for ratio in ratios]
        over, under = np.split(self._sums(columns), 2, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return over / under

    def _sums(self, columns: Sequence[np.ndarray]) -> Float[np.ndarray, "r m"]:
        per_image = np.zeros((self.images, len(columns)))
        for i, column in enumerate(columns):
            per_image[:, i] = np.bincount(self._image, column, self.images)
        rng = np.random.default_rng(self._seed)
        rows = [per_image.sum(0, keepdims=True)]
        chunk = max(1, _CHUNK // self.images)
        for begin in range(0, self._resamples, chunk):
            draws = min(chunk, self._resamples - begin)
            drawn = rng.integers(0, self.images, (draws, self.images))
            drawn += self.images * np.arange(draws)[:, None]
            times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
            rows.append(times.astype(float) @ per_image)
        return np.concatenate(rows)


def estimate(draws: Float[np.ndarray, " r"]) -> Estimate:
    """The first number, with the percentiles of the others that are numbers."""
    others = draws[1:][np.isfinite(draws[1:])]
    if not len(others) or not np.isfinite(draws[0]):
        return Estimate(float(draws[0]), float("nan"), float("nan"))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(others, [tail, 100 - tail])
    return Estimate(float(draws[0]), float(low), float(high))


def permutation_p(
    one: Ratio,
    other: Ratio,
    image: Int[np.ndarray, " n"],
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """How often runs that do not differ would differ as much: two-sided, over swaps of images.

    Under the hypothesis that it does not matter which run an image's predictions come from, the two
    runs' sums of each image may be swapped. The p-value counts the swaps, the observed one among
    them, whose ratios differ at least as much as was observed.
    """
    names, index = np.unique(image, return_inverse=True)
    columns = (one.over, one.under, other.over, other.under)
    sums = np.stack([np.bincount(index, column, len(names)) for column in columns], 1)
    total = sums.sum(0)
    if not (total[1] and total[3]):
        return float("nan")
    observed = abs(total[0] / total[1] - total[2] / total[3])
    # Swapping an image moves its difference from one run's sums to the other's.
    moved = sums[:, 2:] - sums[:, :2]
    rng = np.random.default_rng(seed)
    as_far = 1
    chunk = max(1, _CHUNK // len(names))
    for begin in range(0, permutations, chunk):
        swaps = rng.integers(0, 2, (min(chunk, permutations - begin), len(names))).astype(float)
        shift = swaps @ moved
        with np.errstate(invalid="ignore", divide="ignore"):
            left = (total[0] + shift[:, 0]) / (total[1] + shift[:, 1])
            right = (total[2] - shift[:, 0]) / (total[3] - shift[:, 1])
        # Sums of floats in another order must not turn a tie into a miss; nor is 0 / 0 a miss.
        as_far += int((~(np.abs(left - right) < observed - 1e-12)).sum())
    return as_far / (permutations + 1)
