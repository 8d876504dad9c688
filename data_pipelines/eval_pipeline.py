"""The evaluation stream: every example once, in order, the last batch padded."""

import dataclasses

import grain

from data_pipelines.assemble import BatchSpec, Slot, assemble
from data_pipelines.batch import Batch
from data_pipelines.tokenizers import Tokenizer
from data_pipelines.train_pipeline import ONE_HOST, Hosts, Source
from evf_sam_jax.errors import UserError


def eval_dataset(
    source: Source, tokenizer: Tokenizer, spec: BatchSpec, *, hosts: Hosts = ONE_HOST
) -> grain.MapDataset[Batch]:
    """This host's part of each global batch; all hosts have as many.

    Rows past the last example, and those that cannot be read, have `example_valid` false; the
    latter name themselves in `skipped_id`, by index.
    """
    batches = -(-len(source) // spec.batch_size)
    rows = hosts.block(spec.batch_size)
    return grain.MapDataset.range(batches).map(_EvalBatch(source, tokenizer, spec, rows))


@dataclasses.dataclass(frozen=True)
class _EvalBatch(grain.transforms.Map):
    """Assembles the rows of this host; a class, because it is pickled on the way to a worker."""

    source: Source
    tokenizer: Tokenizer
    spec: BatchSpec
    rows: range

    def map(self, element: int) -> Batch:
        indices = [element * self.spec.batch_size + row for row in self.rows]
        slots = [_read(self.source, index) for index in indices]
        return assemble(slots, self.spec, self.tokenizer)


def _read(source: Source, index: int) -> Slot:
    if index >= len(source):
        return Slot(None)
    try:
        return Slot(source[index], prompt_seed=(0, index))
    except UserError:
        return Slot(None, skipped_id=index)
