"""Rows come back as they were written; what is damaged, missing or there twice is said."""

import dataclasses
from pathlib import Path

import pytest

from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.rows import (
    LeftOut,
    PhraseRow,
    columns,
    merge_shards,
    read_rows,
    read_shards,
    write_rows,
    write_shard,
)


def row(image: int, phrase: int = 0, **changes) -> PhraseRow:
    """A row of a made-up phrase."""
    values = PhraseRow(
        set="refcoco/val",
        image_id=f"coco/{image}",
        image_index=image,
        phrase_index=phrase,
        phrase="the großer cup",
        category="",
        height=480,
        width=640,
        target_pixels=7,
        predicted_pixels=8,
        intersection=5,
        union=10,
        intersection_parts_union=6,
        union_parts_union=9,
        predicted_iou=0.75,
        iou=0.5,
        prediction_rle="0c0",
    )
    return dataclasses.replace(values, **changes)


def test_shards_of_all_processes_become_one_sorted_table(tmp_path: Path):
    left_out = LeftOut("refcoco/val", 3, "image 3", "expected an image, found none")
    write_shard(tmp_path, 1, [row(2), row(0, 1)], [4], [left_out])
    write_shard(tmp_path, 0, [row(0)], [0, 2], [])
    write_shard(tmp_path, 0, [row(1)], [1], [])
    shards = read_shards(tmp_path)
    assert shards.groups == {0, 1, 2, 4} and shards.left_out == (left_out,)
    assert len(shards.files) == 3
    write_rows(tmp_path, merge_shards(shards))
    table = read_rows(tmp_path)
    assert tuple(table.schema.names) == columns()
    assert [PhraseRow(**one) for one in table.to_pylist()] == [row(0), row(0, 1), row(1), row(2)]


def test_nothing_evaluated_is_a_table_without_rows(tmp_path: Path):
    assert merge_shards(read_shards(tmp_path)).num_rows == 0


def test_what_a_kill_leaves_half_written_does_not_count(tmp_path: Path):
    write_shard(tmp_path, 0, [row(0)], [0], [])
    whole = next((tmp_path / "predictions").iterdir())
    (tmp_path / "predictions" / "00000-00001.parquet.partial").write_bytes(whole.read_bytes()[:50])
    assert read_shards(tmp_path).groups == {0}


def test_a_phrase_twice_is_an_error(tmp_path: Path):
    write_shard(tmp_path, 0, [row(0)], [0], [])
    write_shard(tmp_path, 1, [row(0)], [0], [])
    with pytest.raises(UserError, match="expected each phrase once, found some twice"):
        merge_shards(read_shards(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path):
    write_shard(tmp_path, 0, [row(0)], [0], [])
    (file,) = (tmp_path / "predictions").iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="00000-00000.parquet: expected rows of an evaluation"):
        read_shards(tmp_path)


def test_a_directory_without_an_evaluation_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="expected the directory of a finished evaluation"):
        read_rows(tmp_path)
