"""Pipelines: training is a function of (seed, step), evaluation sees every example once."""

import collections
import dataclasses
import gc
import hashlib
import itertools
import multiprocessing.synchronize
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest

from data_pipelines.assemble import BatchSpec, Example
from data_pipelines.batch import Batch
from data_pipelines.buckets import Buckets
from data_pipelines.eval_pipeline import eval_dataset, eval_rows
from data_pipelines.index import write_index
from data_pipelines.mixture import Mixture, exclude_images
from data_pipelines.shapes import SHAPES_TOKENIZER, ShapesSource
from data_pipelines.source import Entry, Source
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tower_images import TowerImages
from data_pipelines.train_pipeline import iterate, train_dataset
from evf_sam_jax.errors import UserError
from tests.data_pipelines.tiny_dataset import TinyDataset

ROOT = Path(__file__).parents[2]
TOKENIZER = load_tokenizer(SHAPES_TOKENIZER)
SPEC = BatchSpec(
    batch_size=4,
    phrases=4,
    text_length=16,
    images=TowerImages(frame=32, encoder_size=16),
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
        return self.read(index, range(self.phrases))

    def phrase_count(self, index: int) -> int:
        return self.phrases

    def entry(self, index: int) -> Entry:
        return Entry(4, 6, ("the strip", "the circle") * (self.phrases // 2))

    def describe(self, index: int) -> str:
        return f"number {index}"

    def read(self, index: int, chosen: Sequence[int]) -> Example:
        if index in self.broken:
            raise UserError(f"{index}.jpg: expected a whole image, found a broken one")
        masks = np.zeros((self.phrases, 4, 6), np.uint8)
        masks[:, 1, 2] = np.arange(self.phrases) % 2 + 1  # tells the phrases apart
        image = np.full((4, 6, 3), index, np.uint8)
        phrases = self.entry(index).phrases
        return Example(index, image, tuple(phrases[i] for i in chosen), masks[list(chosen)])


TINY = TinyDataset(images=12)


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "tiny"
    TINY.write(root)
    return root


def assert_same(ours: Batch, theirs: Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


TWENTY = Numbers(20)


def block(host: int, count: int) -> range:
    """The rows of a host whose devices follow each other."""
    rows = SPEC.batch_size // count
    return range(host * rows, (host + 1) * rows)


def stream(
    seed: int,
    steps: int = 6,
    source: Source = TWENTY,
    spec: BatchSpec = SPEC,
    rows: Sequence[int] | None = None,
) -> Any:  # Grain's type allows for elements that a filter took away
    mixture = source if isinstance(source, Mixture) else Mixture((source,), (1.0,))
    return train_dataset(mixture, TOKENIZER, spec, seed=seed, steps=steps, rows=rows)


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
    parts = [stream(0, rows=rows)[2] for rows in ((0, 1), (2, 3))]
    assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole)


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


def test_a_replacement_comes_from_the_same_source():
    mixture = Mixture((Numbers(4, broken=frozenset({1, 2})), Numbers(50)), (1.0, 1.0))
    batches = list(stream(0, steps=20, source=mixture))
    rows = np.concatenate([batch.skipped_id for batch in batches])
    replaced = np.array(ids(batches))[rows >= 0]
    assert len(replaced) and set(replaced) <= {0, 3}


def test_a_mixture_draws_by_weight_and_each_source_once_an_epoch():
    mixture = Mixture((Numbers(40), Numbers(7), Numbers(1000)), (3.0, 0.5, 1.5))
    order = mixture.order(seed=3)
    drawn = np.array([order[position] for position in range(5_000)])
    for begin, length, weight in ((0, 40, 0.6), (40, 7, 0.1), (47, 1000, 0.3)):
        own = drawn[(drawn >= begin) & (drawn < begin + length)]
        assert abs(len(own) / len(drawn) - weight) < 0.01
        epochs = own[: len(own) // length * length].reshape(-1, length)
        assert (np.sort(epochs, axis=1) == np.arange(begin, begin + length)).all()
    assert {mixture.order(seed=4)[p] for p in range(9)} != set(drawn[:9].tolist())


def test_every_host_draws_from_the_whole_mixture():
    mixture = Mixture((Numbers(40), Numbers(40)), (1.0, 1.0))
    for host in range(2):
        part = np.array(ids(stream(0, steps=10, source=mixture, rows=block(host, 2))))
        assert abs((part < 40).mean() - 0.5) < 0.11  # of 20 draws


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, float("nan"))])
def test_a_mixture_needs_a_weight_above_zero_for_each_source(weights: tuple[float, ...]):
    with pytest.raises(UserError, match="the mixture: expected"):
        Mixture((Numbers(4), Numbers(4)), weights)


def test_a_mixture_names_examples_by_their_source():
    mixture = Mixture((Numbers(4), Numbers(9)), (1.0, 1.0))
    assert len(mixture) == 13 and mixture.describe(6) == "number 2"
    assert mixture[6].example_id == 6 and mixture[6].image[0, 0, 0] == 2
    assert mixture.siblings(6) == range(4, 13)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_hosts_of_an_epoch_see_every_image_once(count: int):
    parts = [
        i
        for host in range(count)
        for i in ids(stream(0, steps=5, source=Numbers(20), rows=block(host, count)))
    ]
    assert sorted(parts) == list(range(20))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_hosts_of_an_evaluation_see_every_phrase_once(count: int, tiny_root: Path):
    source = TINY.dataset().source(tiny_root, "val")
    spec = dataclasses.replace(SPEC, phrases=2, prompts=False)
    rows = eval_rows(source, 2)
    seen = collections.Counter()
    for host in range(count):
        for batch in eval_dataset(source, TOKENIZER, spec, held=block(host, count)):
            for i in np.flatnonzero(batch.example_valid):
                row = int(batch.example_id[i])
                assert batch.phrase_valid[i].sum() == rows.count[row]
                seen.update((int(rows.image[row]), phrase) for phrase in rows.chosen(row))
    assert set(seen.values()) == {1}
    assert sum(seen.values()) == sum(map(source.phrase_count, range(len(source))))


def bucketed(
    source: Source, seed: int = 0, steps: int = 12, rows: Sequence[int] | None = None
) -> Any:
    mixture = Mixture((source,), (1.0,))
    spec = dataclasses.replace(SPEC, batch_size=2, phrases=2, prompts=False)
    return train_dataset(
        mixture, TOKENIZER, spec, seed=seed, steps=steps, rows=rows, buckets=BUCKETS
    )


BUCKETS = Buckets(text_lengths=(5, 16), canvases=((30, 40), (64, 64)))


def test_a_batch_gets_the_smallest_shapes_that_hold_it(tiny_root: Path):
    source = TINY.dataset().source(tiny_root, "train")
    shapes = set()
    for batch in bucketed(source):
        assert batch.example_valid.all() and (batch.skipped_id == -1).all()
        longest, (height, width) = batch.text_valid.sum(-1).max(), batch.original_size.max(0)
        canvas, length = batch.mask.shape[2:], batch.text_ids.shape[2]
        assert length == (5 if longest <= 5 else 16)
        assert canvas == ((30, 40) if height <= 30 and width <= 40 else (64, 64))
        shapes.add((length, canvas))
    assert len(shapes) > 1


def test_hosts_agree_on_the_shapes_of_a_batch(tiny_root: Path):
    source = TINY.dataset().source(tiny_root, "train")
    whole = bucketed(source)
    parts = [bucketed(source, rows=[i]) for i in range(2)]
    for step in range(12):
        halves = [part[step] for part in parts]
        assert_same(jax.tree.map(lambda *r: np.concatenate(r), *halves), whole[step])


def test_a_replacement_fits_the_shapes_of_its_batch(tiny_root: Path, tmp_path: Path):
    TINY.write(tmp_path / "tiny")
    for i in range(0, 12, 3):  # the small ones
        (tmp_path / "tiny" / "images" / f"{i:05}.png").unlink()
    batches = list(bucketed(TINY.dataset().source(tmp_path / "tiny", "train")))
    assert any((batch.skipped_id >= 0).any() for batch in batches)
    assert all(batch.example_valid.all() for batch in batches)
    whole = list(bucketed(TINY.dataset().source(tiny_root, "train")))
    assert [b.mask.shape for b in batches] == [b.mask.shape for b in whole]


def test_evaluation_rounds_up_the_canvas_of_an_image_larger_than_all():
    entry = Entry(700, 1100, ("the strip",))
    spec = Buckets((8,), ((640, 640),)).choose(SPEC, [entry], TOKENIZER)
    assert spec.canvas == (1024, 1536)
    shrunk = dataclasses.replace(SPEC, shrink=True)
    assert Buckets((8,), ((640, 640),)).choose(shrunk, [entry], TOKENIZER).canvas == (640, 640)


def test_phrases_longer_than_all_buckets_are_skipped_and_named(tiny_root: Path):
    source = TINY.dataset().source(tiny_root, "val")
    buckets = Buckets((6,), ((64, 64),))
    spec = dataclasses.replace(SPEC, phrases=4, prompts=False)
    batches = list(eval_dataset(source, TOKENIZER, spec, buckets=buckets))
    skipped = [int(i) for batch in batches for i in batch.skipped_id if i >= 0]
    assert skipped == [3, 7, 11]  # whose phrases include the longest
    assert sum(int(batch.example_valid.sum()) for batch in batches) == 9


@pytest.mark.parametrize("lengths, canvases", [((), ((4, 4),)), ((8, 4), ((4, 4),)), ((4,), ())])
def test_buckets_that_cannot_be(lengths: tuple, canvases: tuple):
    with pytest.raises(UserError, match="text_lengths|canvases"):
        Buckets(lengths, canvases)


def test_images_of_evaluation_splits_can_be_excluded(tiny_root: Path, tmp_path: Path):
    source = TINY.dataset().source(tiny_root, "train")
    held_out = write_index(tmp_path / "held_out", map(TINY.annotated, (2, 5)), {"name": "other"})
    kept, dropped = exclude_images(source, [held_out])
    assert dropped == 2 and len(kept) == 10
    left = {kept.index.image_id(image) for image in kept.images.tolist()}
    assert left == {f"tiny/{i}" for i in range(12)} - {"tiny/2", "tiny/5"}
    assert exclude_images(kept, [held_out]) == (kept, 0)
    with pytest.raises(UserError, match="tiny/train: expected images that no evaluation split"):
        exclude_images(source, [source.index])


def digests(batches: Iterable[Batch]) -> list[str]:
    return [
        hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(batch))).hexdigest()
        for batch in batches
    ]


@pytest.fixture(scope="module")
def two_hundred(tiny_root: Path) -> tuple[grain.MapDataset[Batch], list[str]]:
    """A stream, and what its batches are without interruption."""
    dataset = bucketed(TINY.dataset().source(tiny_root, "train"), steps=200)
    return dataset, digests(dataset)


@pytest.mark.parametrize("before, after", [(0, 1), (1, 2), (2, 4), (4, 0)])
def test_two_hundred_batches_resume_to_the_same_bytes(before: int, after: int, two_hundred):
    dataset, whole = two_hundred
    stop = random.Random(before).randrange(1, 200)  # in the middle of an epoch of six batches
    with iterate(dataset, workers=before) as batches:
        first = digests(itertools.islice(batches, stop))
    with iterate(dataset[stop:], workers=after) as batches:
        rest = digests(batches)
    assert first + rest == whole
    assert len(set(whole)) > 100


@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (0, 3), (1, 0), (1, 3)])
def test_threads_do_not_change_the_stream(workers: int, threads: int, tiny_root: Path):
    dataset = bucketed(TINY.dataset().source(tiny_root, "train"), steps=100)
    with iterate(dataset, workers=workers, threads=threads) as batches:
        assert digests(batches) == digests(dataset)


def test_nothing_of_the_workers_is_left_for_later(tiny_root: Path):
    """Python 3.12 warns where their semaphores are collected while others are made."""
    dataset = bucketed(TINY.dataset().source(tiny_root, "train"), steps=40)

    def semaphores_left() -> int:
        with iterate(dataset, workers=2) as batches:
            digests(itertools.islice(batches, 5))
        # `isinstance` would ask each object for its class, which some answer with a warning.
        kinds = map(type, gc.get_objects())
        return sum(issubclass(kind, multiprocessing.synchronize.SemLock) for kind in kinds)

    gc.disable()
    try:
        # The first workers also start what all share, which stays.
        assert semaphores_left() == semaphores_left() < 10
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_resumes_to_the_same_bytes(workers: str, tiny_root: Path):
    command = [sys.executable, "-m", "tests.data_pipelines.test_pipelines", str(tiny_root), workers]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        killed = [run.stdout.readline().strip() for _ in range(23)]
        run.kill()
        os.killpg(run.pid, signal.SIGKILL)  # its workers too, which would wait for ever
    dataset = bucketed(TINY.dataset().source(tiny_root, "train"), steps=200)
    assert killed + digests(dataset[23:40]) == digests(dataset[:40])


def test_evaluation_visits_every_example_once_and_pads():
    batches = list(eval_dataset(Numbers(10), TOKENIZER, SPEC))
    assert [batch.example_valid.sum() for batch in batches] == [4, 4, 2]
    valid = np.concatenate([batch.example_valid for batch in batches])
    assert np.array(ids(batches))[valid].tolist() == list(range(10))


def test_evaluation_gives_every_host_as_many_batches():
    parts = [list(eval_dataset(Numbers(9), TOKENIZER, SPEC, held=[i])) for i in range(4)]
    assert [len(part) for part in parts] == [3] * 4
    seen = [i for part in parts for batch in part for i in batch.example_id[batch.example_valid]]
    assert sorted(seen) == list(range(9))


def test_evaluation_names_what_it_could_not_read():
    (batch,) = eval_dataset(Numbers(4, broken=frozenset({2})), TOKENIZER, SPEC)
    np.testing.assert_array_equal(batch.example_valid, [True, True, False, True])
    np.testing.assert_array_equal(batch.skipped_id, [-1, -1, 2, -1])


if __name__ == "__main__":  # the run that a test kills
    stream = bucketed(TINY.dataset().source(Path(sys.argv[1]), "train"), steps=200)
    with iterate(stream, workers=int(sys.argv[2])) as made:
        for made_batch in made:
            (digest,) = digests([made_batch])
            print(digest, flush=True)
