"""An index gives back what was written, is built once, and finds what is wrong with annotations."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.index import (
    INDEX_FOLDER,
    AnnotatedImage,
    Index,
    Problem,
    Target,
    open_index,
    write_index,
)
from evf_sam_jax.errors import UserError
from tests.data_pipelines.tiny_dataset import TinyDataset

TINY = TinyDataset(images=9)
META = {"name": "tiny", "split": "train"}
ONE = TINY.annotated(1)


def test_everything_written_is_read(tmp_path: Path):
    written = [TINY.annotated(i) for i in range(9)]
    index = write_index(tmp_path / "index", written, META)
    assert len(index) == 9
    assert [index.annotated(i) for i in range(9)] == written
    again = pickle.loads(pickle.dumps(index))  # as a worker process gets it
    assert again.annotated(7) == written[7]
    assert index.meta["targets"] == sum(len(one.targets) for one in written)


def test_columns_are_mapped_not_loaded(tmp_path: Path):
    index = write_index(tmp_path / "index", map(TINY.annotated, range(9)), META)
    assert isinstance(index.sizes, np.memmap)


def counted_loader(calls: list[int]):
    def load() -> Iterator[AnnotatedImage | Problem]:
        calls.append(1)
        yield from map(TINY.annotated, range(9))

    return load


def test_an_index_is_built_once_and_again_when_annotations_change(tmp_path: Path):
    file = tmp_path / "annotations.json"
    file.write_text("{}")
    calls: list[int] = []
    for _ in range(2):
        open_index(tmp_path, "tiny", "train", [file], counted_loader(calls))
    assert len(calls) == 1
    assert (tmp_path / INDEX_FOLDER).is_dir()
    os.utime(file, ns=(1, 1))
    open_index(tmp_path, "tiny", "train", [file], counted_loader(calls))
    assert len(calls) == 2
    open_index(tmp_path, "tiny", "train", [file], counted_loader(calls), options="other")
    assert len(calls) == 3


def test_an_index_survives_a_move_of_its_root(tmp_path: Path):
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "annotations.json"
    file.write_text("{}")
    calls: list[int] = []
    open_index(tmp_path / "here", "tiny", "train", [file], counted_loader(calls))
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = tmp_path / "there" / "annotations.json"
    open_index(tmp_path / "there", "tiny", "train", [moved], counted_loader(calls))
    assert len(calls) == 1


def test_an_index_goes_to_the_cache_where_the_root_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    (tmp_path / "data").mkdir()
    calls: list[int] = []
    for _ in range(2):
        index = open_index(tmp_path / "data", "tiny", "train", [], counted_loader(calls))
    assert len(calls) == 1
    assert index.directory.is_relative_to(tmp_path / "cache")


def test_problems_are_kept_beside_the_index(tmp_path: Path):
    problem = Problem("a.json, annotation 3", "expected a polygon, found none")
    index = write_index(tmp_path / "index", [problem, ONE], META)
    assert index.problems() == [problem]
    assert index.meta["problems"] == 1


def test_an_empty_phrase_is_a_problem_and_left_out(tmp_path: Path):
    target = Target("7", ("  ", "the strip"), ONE.targets[0].parts)
    image = AnnotatedImage("tiny/0", "a.png", ONE.height, ONE.width, (target,))
    index = write_index(tmp_path / "index", [image, ONE], META)
    assert index.annotated(0).targets[0].phrases == ("the strip",)
    (problem,) = index.problems()
    assert problem.where == "tiny/train, annotation 7" and "empty phrase" in problem.what


def test_images_without_phrases_are_left_out(tmp_path: Path):
    bare = AnnotatedImage("tiny/bare", "bare.png", 4, 4, ())
    index = write_index(tmp_path / "index", [bare, ONE], META)
    assert len(index) == 1


def test_ids_come_once(tmp_path: Path):
    with pytest.raises(UserError, match="tiny/train: image id 'tiny/1': expected once, found"):
        write_index(tmp_path / "index", [ONE, ONE], META)
    other = AnnotatedImage("tiny/x", "x.png", ONE.height, ONE.width, ONE.targets)
    with pytest.raises(UserError, match="annotation id '1-0': expected once, found twice"):
        write_index(tmp_path / "index", [ONE, other], META)
    assert not (tmp_path / "index").exists()


def test_nothing_at_all_is_refused_with_the_first_problem(tmp_path: Path):
    problem = Problem("a.json, annotation 3", "expected a polygon, found none")
    with pytest.raises(UserError, match="found none; the first problem: a.json, annotation 3"):
        write_index(tmp_path / "index", [problem], META)


def test_meta_is_plain_json(tmp_path: Path):
    write_index(tmp_path / "index", [ONE], META)
    meta = json.loads((tmp_path / "index" / "meta.json").read_text())
    assert meta["name"] == "tiny" and meta["images"] == 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "no json", "another version"])
def test_a_damaged_index_says_what_to_do(tmp_path: Path, damage: str):
    directory = tmp_path / "index"
    write_index(directory, [ONE], META)
    meta, column = directory / "meta.json", directory / "sizes.npy"
    if damage == "truncated":
        column.write_bytes(column.read_bytes()[:40])
    elif damage == "missing":
        column.unlink()
    elif damage == "no json":
        meta.write_text("{")
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format_version": 0}))
    with pytest.raises(UserError, match="index: expected an index of version 1, .* remove it"):
        Index(directory)
