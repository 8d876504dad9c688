"""The training stream: batch number `step` is a function of (seed, step) alone.

So the step is all the data position that a checkpoint needs, whatever the number of workers or
hosts: the stream is sliced at the step to resume. Each host assembles those rows of every global
batch that its devices hold.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Generator, Iterator, Sequence
from typing import cast

import grain
import numpy as np
from absl import flags

from data_pipelines.assemble import BatchSpec, Slot, assemble
from data_pipelines.batch import Batch, copied
from data_pipelines.buckets import Buckets
from data_pipelines.features import FeatureStore
from data_pipelines.mixture import Mixture
from data_pipelines.source import Entry
from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.errors import UserError

# A sample that cannot be read is replaced; after so many replacements in a row the source itself is
# broken.
MAX_REPLACEMENTS = 16


def train_dataset(
    mixture: Mixture,
    tokenizer: Tokenizer,
    spec: BatchSpec,
    *,
    seed: int,
    steps: int,
    rows: Sequence[int] | None = None,
    buckets: Buckets | None = None,
    features: FeatureStore | None = None,
) -> grain.MapDataset[Batch]:
    """`dataset[step]` is this host's part of the global batch number `step`; `dataset[step:]`
    resumes there.

    Every example comes once an epoch of its source, in another order in each. Where an example has
    more than `spec.phrases` phrases, that many are drawn anew each time (hustvl/EVF-SAM
    utils/refer_seg_dataset.py:140-156 at 9935dc5).

    Args:
      rows: those of the global batch that this host assembles; None: all.
      buckets: text lengths and canvases to choose from for each global batch; None: those of
        `spec`.
      features: where those of each image are read; None: images go to the segmenter. An image
        without them is replaced as one that cannot be read.
    """
    rows = range(spec.batch_size) if rows is None else rows
    return grain.MapDataset.range(steps).map(
        _TrainBatch(mixture, mixture.order(seed), tokenizer, spec, seed, rows, buckets, features)
    )


@contextlib.contextmanager
def iterate(
    dataset: grain.MapDataset[Batch], workers: int = 0, prefetch: int = 4, threads: int = 1
) -> Iterator[Iterator[Batch]]:
    """Iterates over a dataset of batches, some prefetched by threads or by worker processes.

    Neither changes the stream. Workers and shared memory are given back when the context ends.

    Args:
      workers: processes; 0: this one makes the batches. They pay where threads wait for each other
        in Python; a batch of photographs costs as much to hand over as to make.
      threads: of this process, or of each worker, that make batches beside the one that hands them
        over; 0: that one makes them itself.
    """
    stream = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    )
    if workers:
        # Grain reads absl flags, which nobody has parsed outside of `app.run`.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(stream)
    batches = _copies(iterator) if workers else iterator
    try:
        yield batches
    finally:
        iterator.close()
        if workers:
            batches.close()
            # The semaphores of workers lie in cycles, and Python 3.12 warns if those are collected
            # while the next workers get theirs (python/cpython#109629).
            del batches, iterator, stream
            gc.collect()


def _copies(iterator: Iterator[Batch]) -> Generator[Batch, None, None]:
    """A batch from a worker lies in shared memory, which a copy releases now and not at exit."""
    for batch in iterator:
        yield copied(batch)


@dataclasses.dataclass(frozen=True)
class _TrainBatch(grain.transforms.Map):
    """Assembles the rows of this host; a class, because it is pickled on the way to a worker."""

    mixture: Mixture
    order: grain.MapDataset
    tokenizer: Tokenizer
    spec: BatchSpec
    seed: int
    rows: Sequence[int]
    buckets: Buckets | None
    features: FeatureStore | None

    def map(self, element: int) -> Batch:
        first = element * self.spec.batch_size
        spec = self.spec if self.buckets is None else self._bucket(first, self.buckets)
        slots = [self._slot(first + row, spec) for row in self.rows]
        return assemble(slots, spec, self.tokenizer)

    def _bucket(self, first: int, buckets: Buckets) -> BatchSpec:
        """The shapes of the whole global batch, whichever rows are this host's."""
        entries = []
        for position in range(first, first + self.spec.batch_size):
            index = self._index(position)
            chosen = self._choose(index, self._rng(position))
            entries.append(_chosen_entry(self.mixture.entry(index), chosen))
        return buckets.choose(self.spec, entries, self.tokenizer)

    def _slot(self, position: int, spec: BatchSpec) -> Slot:
        """The example at a position; if it cannot be read, one of its source in its place."""
        index = self._index(position)
        rng = self._rng(position)
        attempt, skipped = index, -1
        for _ in range(MAX_REPLACEMENTS):
            try:
                chosen = self._choose(attempt, rng)
                self._check_room(attempt, chosen, spec)
                example = self.mixture.read(attempt, chosen)
                found = () if self.features is None else self.features.read(example.image)
                return Slot(example, skipped, (self.seed, position), found)
            except UserError as error:
                skipped, reason = index, error
                siblings = self.mixture.siblings(index)
                attempt = siblings[int(rng.integers(len(siblings)))]
        raise UserError(
            f"{self.mixture.describe(index)} and {MAX_REPLACEMENTS - 1} drawn in its place cannot "
            f"be read; the last: {reason}"
        )

    def _index(self, position: int) -> int:
        # A `MapDataset` may hold None where it was filtered; this one was not.
        return cast(int, self.order[position])

    def _rng(self, position: int) -> np.random.Generator:
        key = np.array((self.seed, position), np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _choose(self, index: int, rng: np.random.Generator) -> Sequence[int]:
        """Which phrases of an example are taken, in their order."""
        count = self.mixture.phrase_count(index)
        if count <= self.spec.phrases:
            return range(count)
        return np.sort(rng.choice(count, self.spec.phrases, replace=False)).tolist()

    def _check_room(self, index: int, chosen: Sequence[int], spec: BatchSpec) -> None:
        """Raises UserError where an example does not fit the shapes that the batch has got."""
        if self.buckets is None:
            return
        entry = _chosen_entry(self.mixture.entry(index), chosen)
        fitting = dataclasses.replace(self.buckets, text_lengths=(spec.text_length,))
        too_large = entry.height > spec.canvas[0] or entry.width > spec.canvas[1]
        if not fitting.fits(entry, self.tokenizer) or (too_large and not spec.shrink):
            raise UserError(
                f"{self.mixture.describe(index)}: expected phrases of at most {spec.text_length} "
                f"tokens and at most {spec.canvas[0]} x {spec.canvas[1]} pixels, found more"
            )


def _chosen_entry(entry: Entry, chosen: Sequence[int]) -> Entry:
    return dataclasses.replace(entry, phrases=tuple(entry.phrases[i] for i in chosen))
