"""Several sources drawn from by weight, each image of each source once in its own epochs.

The order is one sequence for all hosts, of which each takes a block of every global batch: so all
hosts draw from the same mixture.

Reference: hustvl/EVF-SAM at 9935dc5, utils/dataset.py:110-193 and
utils/refer_seg_dataset.py:140-156.

Differences: the original draws images at random with replacement, here each comes once an epoch;
`exclude_images` has no counterpart there.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import grain
import numpy as np

from data_pipelines.assemble import Example
from data_pipelines.index import Index
from data_pipelines.source import Entry, IndexedSource, Source
from evf_sam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources one after another, as a source of their own; `order` mixes them.

    Attributes:
      sources: what is mixed.
      weights: how often each is drawn from, in any unit.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("the mixture: expected at least one data set, found none")
        if len(self.weights) != len(self.sources):
            raise UserError(
                f"the mixture: expected a weight for each of {len(self.sources)} data sets, "
                f"found {len(self.weights)}"
            )
        for weight in self.weights:
            if not (np.isfinite(weight) and weight > 0):
                raise UserError(f"the mixture: expected weights above 0, found {weight}")

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        return self.read(index, range(self.phrase_count(index)))

    def phrase_count(self, index: int) -> int:
        """How many phrases the example has."""
        source, row, _ = self._locate(index)
        return source.phrase_count(row)

    def entry(self, index: int) -> Entry:
        """Size and phrases of the example."""
        source, row, _ = self._locate(index)
        return source.entry(row)

    def read(self, index: int, chosen: Sequence[int]) -> Example:
        """The example with the chosen phrases; its id is its index in the mixture."""
        source, row, _ = self._locate(index)
        return dataclasses.replace(source.read(row, chosen), example_id=index)

    def describe(self, index: int) -> str:
        """A name for messages."""
        source, row, _ = self._locate(index)
        return source.describe(row)

    def siblings(self, index: int) -> range:
        """The indices of the source that an example belongs to."""
        _, row, begin = self._locate(index)
        return range(begin, begin + len(self.sources[self._begins().index(begin)]))

    def order(self, seed: int) -> grain.MapDataset[int]:
        """Indices without end: position to example, a function of the seed."""
        begins = self._begins()
        orders = [
            grain.MapDataset.range(begin, begin + len(source)).shuffle(seed=seed + i).repeat()
            for i, (begin, source) in enumerate(zip(begins, self.sources, strict=True))
        ]
        if len(orders) == 1:
            return orders[0]
        total = sum(self.weights)
        return grain.MapDataset.mix(orders, [weight / total for weight in self.weights])

    def _begins(self) -> list[int]:
        lengths = [len(source) for source in self.sources]
        return [0, *itertools.accumulate(lengths)][:-1]

    def _locate(self, index: int) -> tuple[Source, int, int]:
        """The source of an example, its row there, and the index at which the source begins."""
        if not 0 <= index < len(self):  # ends iteration over the mixture, too
            raise IndexError(index)
        begins = self._begins()
        number = bisect.bisect_right(begins, index) - 1
        return self.sources[number], index - begins[number], begins[number]


def exclude_images(source: IndexedSource, evaluation: Iterable[Index]) -> tuple[IndexedSource, int]:
    """The source without the images that any of the indices has, and how many were dropped.

    RefCOCO, RefCOCO+ and RefCOCOg share pictures across their splits, so that a model trained on
    all of them has seen pictures it is evaluated on. Not in the original.
    """
    held_out = {index.image_id(image) for index in evaluation for image in range(len(index))}
    kept = [
        image for image in source.images.tolist() if source.index.image_id(image) not in held_out
    ]
    if not kept:
        raise UserError(f"{source.name}: expected images that no evaluation split has, found none")
    dropped = len(source) - len(kept)
    if not dropped:
        return source, 0
    return IndexedSource(source.index, source.store, source.rules, np.array(kept)), dropped
