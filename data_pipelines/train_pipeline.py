"""The training stream: batch number `step` is a function of (seed, step) alone.

So the step is all the data position that a checkpoint needs, whatever the number of workers or
hosts: the stream is sliced at the step to resume. Each host assembles its own contiguous block of
every global batch.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Protocol, cast, runtime_checkable

import grain
import numpy as np
from absl import flags

from data_pipelines.assemble import BatchSpec, Example, Slot, assemble
from data_pipelines.batch import Batch, copied
from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.errors import UserError

# A sample that cannot be read is replaced; after so many replacements in a row the source itself is
# broken.
MAX_REPLACEMENTS = 16


@runtime_checkable
class Source(Protocol):
    """What Grain calls a random-access source. An item that cannot be read raises `UserError`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Which of how many processes this one is."""

    index: int = 0
    count: int = 1

    def block(self, batch_size: int) -> range:
        """The rows of a global batch that this host assembles.

        Raises:
          UserError: the batch cannot be shared out evenly.
        """
        if batch_size % self.count:
            raise UserError(f"batch_size {batch_size}: expected a multiple of {self.count} hosts")
        rows = batch_size // self.count
        return range(self.index * rows, (self.index + 1) * rows)


ONE_HOST = Hosts()


def train_dataset(
    source: Source,
    tokenizer: Tokenizer,
    spec: BatchSpec,
    *,
    seed: int,
    steps: int,
    hosts: Hosts = ONE_HOST,
) -> grain.MapDataset[Batch]:
    """`dataset[step]` is this host's part of the global batch number `step`; `dataset[step:]`
    resumes there.

    Every example comes once an epoch, in another order in each. Where an example has more than
    `spec.phrases` phrases, that many are drawn anew each time (hustvl/EVF-SAM
    utils/refer_seg_dataset.py:140-156 at 9935dc5).
    """
    order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
    rows = hosts.block(spec.batch_size)
    return grain.MapDataset.range(steps).map(
        _TrainBatch(source, order, tokenizer, spec, seed, rows)
    )


@contextlib.contextmanager
def iterate(
    dataset: grain.MapDataset[Batch], workers: int = 0, prefetch: int = 4
) -> Iterator[Iterator[Batch]]:
    """Iterates over a dataset of batches, some prefetched by a thread or by worker processes.

    Workers and shared memory are given back when the context ends.
    """
    stream = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    )
    if workers:
        # Grain reads absl flags, which nobody has parsed outside of `app.run`.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(stream)
    try:
        # A batch from a worker lies in shared memory, which a copy releases now and not at exit.
        yield map(copied, iterator) if workers else iterator
    finally:
        iterator.close()


@dataclasses.dataclass(frozen=True)
class _TrainBatch(grain.transforms.Map):
    """Assembles the rows of this host; a class, because it is pickled on the way to a worker."""

    source: Source
    order: grain.MapDataset
    tokenizer: Tokenizer
    spec: BatchSpec
    seed: int
    rows: range

    def map(self, element: int) -> Batch:
        positions = [element * self.spec.batch_size + row for row in self.rows]
        # A `MapDataset` may hold None where it was filtered; this one was not.
        slots = [self._slot(cast(int, self.order[position]), position) for position in positions]
        return assemble(slots, self.spec, self.tokenizer)

    def _slot(self, index: int, position: int) -> Slot:
        """The example at `index`; if it cannot be read, one drawn in its place."""
        key = (self.seed, position)
        rng = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        attempt, skipped = index, -1
        for _ in range(MAX_REPLACEMENTS):
            try:
                example = _some_phrases(self.source[attempt], self.spec.phrases, rng)
                return Slot(example, skipped, key)
            except UserError:
                skipped = index
                attempt = int(rng.integers(len(self.source)))
        raise UserError(
            f"example {index} and {MAX_REPLACEMENTS - 1} drawn in its place cannot be read"
        )


def _some_phrases(example: Example, count: int, rng: np.random.Generator) -> Example:
    if len(example.phrases) <= count:
        return example
    chosen = np.sort(rng.choice(len(example.phrases), count, replace=False))
    phrases = tuple(example.phrases[i] for i in chosen)
    return dataclasses.replace(example, phrases=phrases, masks=example.masks[chosen])
