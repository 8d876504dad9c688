"""The evaluation stream: every phrase once, in order, the last batch padded."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int32

from data_pipelines.assemble import BatchSpec, Slot, assemble
from data_pipelines.batch import Batch
from data_pipelines.buckets import Buckets
from data_pipelines.source import Entry, Source
from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """The rows that evaluation goes through: an image, and at most k of its phrases.

    An image with more phrases has several rows, so that memory is bounded.

    Attributes:
      image: the index of the image in the source.
      first: the first of its phrases in the row.
      count: how many phrases the row has.
    """

    image: Int32[np.ndarray, " n"]
    first: Int32[np.ndarray, " n"]
    count: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.image)

    def chosen(self, row: int) -> range:
        """The phrases of a row, as the source takes them."""
        first = int(self.first[row])
        return range(first, first + int(self.count[row]))


def eval_rows(source: Source, phrases: int) -> EvalRows:
    """All phrases of the source, at most `phrases` a row."""
    rows = [
        (image, first, min(phrases, count - first))
        for image in range(len(source))
        for count in (source.phrase_count(image),)
        for first in range(0, count, phrases)
    ]
    return EvalRows(*np.array(rows, np.int32).reshape(-1, 3).T)


def eval_dataset(
    source: Source,
    tokenizer: Tokenizer,
    spec: BatchSpec,
    *,
    held: Sequence[int] | None = None,
    buckets: Buckets | None = None,
) -> grain.MapDataset[Batch]:
    """This host's part of each global batch; all hosts have as many.

    `example_id` is the row in `eval_rows(source, spec.phrases)`. Rows past the last one, and those
    that cannot be read, have `example_valid` false; the latter name themselves in `skipped_id`.

    Args:
      held: the rows of each global batch that this host assembles; None: all.
      buckets: text lengths and canvases to choose from for each global batch; None: those of
        `spec`.
    """
    rows = eval_rows(source, spec.phrases)
    batches = -(-len(rows) // spec.batch_size)
    held = range(spec.batch_size) if held is None else held
    return grain.MapDataset.range(batches).map(
        _EvalBatch(source, rows, tokenizer, spec, held, buckets)
    )


@dataclasses.dataclass(frozen=True)
class _EvalBatch(grain.transforms.Map):
    """Assembles the rows of this host; a class, because it is pickled on the way to a worker."""

    source: Source
    rows: EvalRows
    tokenizer: Tokenizer
    spec: BatchSpec
    held: Sequence[int]
    buckets: Buckets | None

    def map(self, element: int) -> Batch:
        first = element * self.spec.batch_size
        spec = self.spec if self.buckets is None else self._bucket(first, self.buckets)
        slots = [self._read(first + row, spec) for row in self.held]
        return assemble(slots, spec, self.tokenizer)

    def _bucket(self, first: int, buckets: Buckets) -> BatchSpec:
        last = min(first + self.spec.batch_size, len(self.rows))
        entries = [self._entry(row) for row in range(first, last)]
        return buckets.choose(self.spec, entries, self.tokenizer)

    def _entry(self, row: int) -> Entry:
        entry = self.source.entry(int(self.rows.image[row]))
        phrases = tuple(entry.phrases[i] for i in self.rows.chosen(row))
        return dataclasses.replace(entry, phrases=phrases)

    def _read(self, row: int, spec: BatchSpec) -> Slot:
        if row >= len(self.rows):
            return Slot(None)
        try:
            if self.buckets and not self.buckets.fits(self._entry(row), self.tokenizer):
                raise UserError(f"expected at most {spec.text_length} tokens, found more")
            example = self.source.read(int(self.rows.image[row]), self.rows.chosen(row))
        except UserError:
            return Slot(None, skipped_id=row)
        return Slot(dataclasses.replace(example, example_id=row), prompt_seed=(0, row))
