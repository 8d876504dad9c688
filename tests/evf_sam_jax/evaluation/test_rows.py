"""Rows come back as they were written; what is damaged, missing or there twice is said."""

import dataclasses
from pathlib import Path

import pytest

from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.rows import (
    LeftOut,
    PhraseRow,
    columns,
    forget,
    merge_shards,
    read_rows,
    read_shards,
    schema,
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


def test_groups_are_forgotten_with_their_rows_and_what_was_left_out(tmp_path: Path):
    left_out = [LeftOut("refcoco/val", i, f"image {i}", "expected one, found none") for i in (3, 7)]
    write_shard(tmp_path, 0, [row(2), row(4)], [0, 1], left_out)
    write_shard(tmp_path, 0, [row(5)], [2], [])
    forget(read_shards(tmp_path), {1}, {("refcoco/val", 3), ("refcoco/val", 4)})
    shards = read_shards(tmp_path)
    assert shards.groups == {0, 2} and shards.left_out == (left_out[1],)
    assert merge_shards(shards)["image_index"].to_pylist() == [2, 5]


def test_nothing_evaluated_is_a_table_without_rows(tmp_path: Path):
    assert merge_shards(read_shards(tmp_path)).num_rows == 0


def test_what_a_kill_leaves_half_written_does_not_count(tmp_path: Path):
    write_shard(tmp_path, 0, [row(0)], [0], [])
    whole = next((tmp_path / "predictions").iterdir())
    (tmp_path / "predictions" / "00000-00001.parquet.partial").write_bytes(whole.read_bytes()[:50])
    assert read_shards(tmp_path).groups == {0}


def test_what_two_jobs_found_alike_is_there_once(tmp_path: Path):
    left_out = LeftOut("refcoco/val", 3, "image 3", "expected an image, found none")
    same = [row(0, predicted_iou=float("nan")), row(1)]
    write_shard(tmp_path, 0, same[::-1], [0], [left_out])
    write_shard(tmp_path, 1, [row(2), *same], [0, 1], [left_out])
    shards = read_shards(tmp_path)
    assert shards.left_out == (left_out,)
    table = merge_shards(shards)
    assert table.schema == schema()
    assert table["image_index"].to_pylist() == [0, 1, 2]


def test_two_results_for_a_phrase_name_the_remedy(tmp_path: Path):
    write_shard(tmp_path, 0, [row(0)], [0], [])
    write_shard(tmp_path, 1, [row(0, intersection=6)], [0], [])
    with pytest.raises(UserError) as raised:
        merge_shards(read_shards(tmp_path))
    assert str(raised.value) == (
        f"{tmp_path}/predictions: expected one result for each phrase, found two for some, as two "
        "jobs at once leave them; evaluate anew with another --workdir for each job"
    )


def test_two_jobs_never_give_a_shard_the_same_name(tmp_path: Path):
    # Both see a directory without shards, as where they begin at once.
    for folder in ("one", "other"):
        write_shard(tmp_path / folder, 0, [row(0)], [0], [])
    one, other = (next((tmp_path / f / "predictions").iterdir()) for f in ("one", "other"))
    assert one.name != other.name and one.name[:12] == other.name[:12] == "00000-00000-"


def test_a_damaged_shard_is_named(tmp_path: Path):
    write_shard(tmp_path, 0, [row(0)], [0], [])
    (file,) = (tmp_path / "predictions").iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"00000-00000-\w+.parquet: expected rows of an evaluation"):
        read_shards(tmp_path)


def test_a_directory_without_an_evaluation_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="expected the directory of a finished evaluation"):
        read_rows(tmp_path)
