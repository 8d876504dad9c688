"""Pipelines: training is a function of (seed, step), evaluation sees every example once."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines.assemble import BatchSpec, Example
from data_pipelines.batch import Batch
from data_pipelines.eval_pipeline import eval_dataset
from data_pipelines.shapes import SHAPES_TOKENIZER, ShapesSource
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.train_pipeline import ONE_HOST, Hosts, Source, iterate, train_dataset
from evf_sam_jax.errors import UserError

TOKENIZER = load_tokenizer(SHAPES_TOKENIZER)
SPEC = BatchSpec(
    batch_size=4,
    phrases=4,
    text_length=16,
    frame=32,
    encoder_size=16,
    canvas=(128, 128),
    prompts=True,
)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A source of tiny examples, some of which cannot be read; `phrases` phrases each."""

    length: int
    broken: frozenset[int] = frozenset()
    phrases: int = 4

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if index in self.broken:
            raise UserError(f"{index}.jpg: expected a whole image, found a broken one")
        masks = np.zeros((self.phrases, 4, 6), np.uint8)
        masks[:, 1, 2] = np.arange(self.phrases) % 2 + 1  # tells the phrases apart
        image = np.full((4, 6, 3), index, np.uint8)
        return Example(index, image, ("the strip", "the circle") * (self.phrases // 2), masks)


def assert_same(ours: Batch, theirs: Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


TWENTY = Numbers(20)


def stream(
    seed: int,
    steps: int = 6,
    source: Source = TWENTY,
    spec: BatchSpec = SPEC,
    hosts: Hosts = ONE_HOST,
) -> Any:  # Grain's type allows for elements that a filter took away
    return train_dataset(source, TOKENIZER, spec, seed=seed, steps=steps, hosts=hosts)


def ids(batches: Iterable[Batch]) -> list[int]:
    return np.concatenate([batch.example_id for batch in batches]).tolist()


def test_the_stream_is_a_function_of_seed_and_step():
    first, again, other = stream(0), stream(0), stream(1)
    for step in (5, 0, 3):  # in any order
        assert_same(first[step], again[step])
    assert ids(first) != ids(other)


def test_resuming_is_slicing():
    whole = list(stream(0))
    with iterate(stream(0)[4:]) as resumed:
        for ours, theirs in zip(resumed, whole[4:], strict=True):
            assert_same(ours, theirs)


def test_an_epoch_brings_every_example_once_and_the_next_reorders():
    epochs = ids(stream(0, steps=10))
    assert sorted(epochs[:20]) == sorted(epochs[20:]) == list(range(20))
    assert epochs[:20] != epochs[20:]
    assert epochs[:20] != list(range(20))


def test_clicks_differ_between_epochs():
    source = ShapesSource("train", length=4)
    batches = list(stream(0, steps=2, source=source))
    order = [np.argsort(batch.example_id) for batch in batches]
    assert (batches[0].points[order[0]] != batches[1].points[order[1]]).any()


def test_hosts_assemble_blocks_of_the_same_global_batch():
    whole = stream(0)[2]
    parts = [stream(0, hosts=Hosts(i, 2))[2] for i in range(2)]
    assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole)


def test_hosts_must_share_a_batch_evenly():
    with pytest.raises(UserError, match="batch_size 4: expected a multiple of 3 hosts"):
        stream(0, hosts=Hosts(0, 3))


def test_worker_processes_do_not_change_the_stream():
    source = ShapesSource("train", length=40)
    alone = list(stream(0, steps=4, source=source))
    with iterate(stream(0, steps=4, source=source), workers=2) as batches:
        for ours, theirs in zip(batches, alone, strict=True):
            assert_same(ours, theirs)


def test_more_phrases_than_room_are_drawn_anew_each_time():
    spec = dataclasses.replace(SPEC, phrases=2)
    batches = list(stream(0, steps=20, source=Numbers(4, phrases=4), spec=spec))
    seen = collections.Counter(
        tuple(mask[:, 1, 2].tolist()) for batch in batches for mask in batch.mask
    )
    assert set(seen) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    for batch in batches:  # a phrase keeps its mask
        strip = TOKENIZER.encode("the strip")[2]
        np.testing.assert_array_equal(batch.text_ids[..., 2] == strip, batch.mask[..., 1, 2] == 1)


def test_an_unreadable_example_is_replaced_and_named():
    source = Numbers(20, broken=frozenset({3, 11}))
    batches = list(stream(0, steps=5, source=source))
    skipped = np.concatenate([batch.skipped_id for batch in batches])
    assert sorted(skipped[skipped >= 0]) == [3, 11]
    assert not {3, 11} & set(ids(batches))
    assert all(batch.example_valid.all() for batch in batches)
    for ours, theirs in zip(batches, stream(0, steps=5, source=source), strict=True):
        assert_same(ours, theirs)


def test_a_source_of_nothing_readable_stops_the_run():
    with pytest.raises(UserError, match="and 15 drawn in its place cannot be read"):
        _ = stream(0, source=Numbers(20, broken=frozenset(range(20))))[0]


def test_evaluation_visits_every_example_once_and_pads():
    batches = list(eval_dataset(Numbers(10), TOKENIZER, SPEC))
    assert [batch.example_valid.sum() for batch in batches] == [4, 4, 2]
    valid = np.concatenate([batch.example_valid for batch in batches])
    assert np.array(ids(batches))[valid].tolist() == list(range(10))


def test_evaluation_gives_every_host_as_many_batches():
    parts = [list(eval_dataset(Numbers(9), TOKENIZER, SPEC, hosts=Hosts(i, 4))) for i in range(4)]
    assert [len(part) for part in parts] == [3] * 4
    seen = [i for part in parts for batch in part for i in batch.example_id[batch.example_valid]]
    assert sorted(seen) == list(range(9))


def test_evaluation_names_what_it_could_not_read():
    (batch,) = eval_dataset(Numbers(4, broken=frozenset({2})), TOKENIZER, SPEC)
    np.testing.assert_array_equal(batch.example_valid, [True, True, False, True])
    np.testing.assert_array_equal(batch.skipped_id, [-1, -1, 2, -1])
