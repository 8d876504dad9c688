"""What evaluation knows of each phrase: a row of Parquet, in `phrases.parquet` and its shards.

    RUN/phrases.parquet            all phrases, by set, image and phrase
    RUN/predictions/*.parquet      the same rows as they came, some images a file

A shard appears whole or not at all, and says which groups of images it has (see
`evf_sam_jax/evaluation/grouping.py`), so that a job that was killed goes on after it.
"""

import dataclasses
import io
import json
import uuid
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from evf_sam_jax.errors import UserError

PHRASES, SHARDS = "phrases.parquet", "predictions"
_PARTIAL = ".partial"
_NOTES = b"evf_sam_jax"


@dataclasses.dataclass(frozen=True)
class PhraseRow:
    """One phrase; the fields are the columns of the Parquet files, in this order.

    Attributes:
      set: data set and split, such as "refcoco/val".
      image_id: the same for the same picture in other data sets ("coco/581857").
      image_index: place of the image in the set.
      phrase_index: place of the phrase among those of its image.
      phrase: as the model gets it.
      category: of its target, "" if there is none.
      height: of the image, pixels.
      width: likewise.
      target_pixels: inside the target (in one of its parts or more), where pixels count.
      predicted_pixels: where the model's logit is above 0 and pixels count.
      intersection: of target and prediction as the original counts them: where parts of a target
        overlap, a pixel is no part of it.
      union: likewise.
      intersection_parts_union: of the union of the target's parts and the prediction.
      union_parts_union: likewise.
      predicted_iou: the estimate of SAM's head, which EVF-SAM does not train.
      iou: intersection / (union + 1e-10), as the original counts; 1 where the union is empty.
      prediction_rle: the mask as the `counts` of COCO's compressed run lengths, or "" if masks were
        not asked for.
    """

    set: str
    image_id: str
    image_index: int
    phrase_index: int
    phrase: str
    category: str
    height: int
    width: int
    target_pixels: int
    predicted_pixels: int
    intersection: int
    union: int
    intersection_parts_union: int
    union_parts_union: int
    predicted_iou: float
    iou: float
    prediction_rle: str


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What of a set could not be evaluated.

    Attributes:
      set: data set and split.
      image_index: place of the image in the set.
      name: of the image, or of the phrase.
      reason: a sentence.
    """

    set: str
    image_index: int
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Shards:
    """What has been evaluated so far.

    Attributes:
      groups: numbers of the groups of images.
      left_out: what of them could not be evaluated.
      files: of the shards.
    """

    groups: frozenset[int]
    left_out: tuple[LeftOut, ...]
    files: tuple[epath.Path, ...]


def columns() -> tuple[str, ...]:
    """The names of the columns, in their order."""
    return tuple(field.name for field in dataclasses.fields(PhraseRow))


def schema() -> pa.Schema:
    """The columns with their types."""
    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    fields = [
        pa.field(field.name, types[field.type], nullable=False)
        for field in dataclasses.fields(PhraseRow)
    ]
    return pa.schema(fields)


def read_rows(workdir: epath.PathLike) -> pa.Table:
    """All phrases of a finished evaluation, by set, image and phrase.

    Raises:
      UserError: there is no finished evaluation, or its file is damaged or has other columns.
    """
    path = epath.Path(workdir) / PHRASES
    if not path.exists():
        raise UserError(
            f"{workdir}: expected the directory of a finished evaluation, found no {PHRASES}"
        )
    return _read_table(path)


def write_rows(workdir: epath.PathLike, table: pa.Table) -> None:
    """Writes `phrases.parquet`, whole or not at all."""
    _write(epath.Path(workdir) / PHRASES, table)


def write_shard(
    workdir: epath.PathLike,
    process: int,
    rows: Sequence[PhraseRow],
    groups: Iterable[int],
    left_out: Sequence[LeftOut],
) -> None:
    """Writes the next shard of a process, under a name that no other job gives.

    Args:
      groups: whose rows these are; all of them.
    """
    folder = epath.Path(workdir) / SHARDS
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(p.stem.split("-")[1]) for p in folder.glob(f"{process:05}-*.parquet")]
    table = pa.Table.from_pylist(list(map(vars, rows)), schema=schema())
    notes = {"groups": sorted(groups), "left_out": [dataclasses.asdict(one) for one in left_out]}
    table = table.replace_schema_metadata({_NOTES: json.dumps(notes).encode()})
    name = f"{process:05}-{max(taken, default=-1) + 1:05}-{uuid.uuid4().hex[:12]}.parquet"
    _write(folder / name, table)


def read_shards(workdir: epath.PathLike) -> Shards:
    """What the shards of all processes hold. Raises UserError if one is damaged."""
    files = tuple(sorted((epath.Path(workdir) / SHARDS).glob("*.parquet")))
    groups: set[int] = set()
    left_out: list[LeftOut] = []
    for path in files:
        notes = _read_notes(path)
        groups.update(notes["groups"])
        left_out += [LeftOut(**one) for one in notes["left_out"]]
    return Shards(frozenset(groups), tuple(dict.fromkeys(left_out)), files)


def forget(shards: Shards, groups: Set[int], images: Set[tuple[str, int]]) -> None:
    """Takes groups out of the shards, so that they are evaluated anew.

    Each file changes as a whole or not at all.

    Args:
      groups: their numbers.
      images: all of theirs, as (set, place of the image in it).
    """
    for path in shards.files:
        notes = _read_notes(path)
        if groups.isdisjoint(notes["groups"]):
            continue
        table = _read_table(path)
        places = zip(table["set"].to_pylist(), table["image_index"].to_pylist(), strict=True)
        kept = table.filter(pa.array([place not in images for place in places], pa.bool_()))
        left_out = [
            one for one in notes["left_out"] if (one["set"], one["image_index"]) not in images
        ]
        notes = {"groups": sorted({*notes["groups"]} - groups), "left_out": left_out}
        _write(path, kept.replace_schema_metadata({_NOTES: json.dumps(notes).encode()}))


def merge_shards(shards: Shards) -> pa.Table:
    """The rows of all shards, by set, image and phrase; what two jobs both found is there once.

    Raises:
      UserError: a phrase has two results, as two jobs at once on unlike machines leave it.
    """
    keys = ["set", "image_index", "phrase_index"]
    tables = [_read_table(path) for path in shards.files] or [schema().empty_table()]
    table = pa.concat_tables(tables)
    phrases = table.group_by(keys).aggregate([]).num_rows
    if phrases != table.num_rows:
        table = table.group_by(columns()).aggregate([]).select(columns()).cast(schema())
    if phrases != table.num_rows:
        folder = shards.files[0].parent
        raise UserError(
            f"{folder}: expected one result for each phrase, found two for some, as two jobs at "
            "once leave them; evaluate anew with another --workdir for each job"
        )
    return table.sort_by([(key, "ascending") for key in keys])


def columns_of(table: pa.Table, set_name: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some columns of a set's rows."""
    own = table.select(names).filter(pa.array(table["set"].to_numpy() == set_name))
    return {name: own[name].to_numpy() for name in names}


def _read_notes(path: epath.Path) -> dict[str, list[Any]]:
    """What a shard says of itself. Raises UserError if it is damaged."""
    try:
        with path.open("rb") as file:
            notes = json.loads(pyarrow.parquet.read_schema(file).metadata[_NOTES])
        return {"groups": [int(one) for one in notes["groups"]], "left_out": notes["left_out"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _read_table(path: epath.Path) -> pa.Table:
    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.read_table(file).replace_schema_metadata(None)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if tuple(table.schema.names) != columns():
        found = ", ".join(table.schema.names)
        raise UserError(f"{path}: expected the columns {', '.join(columns())}, found {found}")
    return table.cast(schema())


def _write(path: epath.Path, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    partial = path.parent / (path.name + _PARTIAL)
    try:
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _damaged(path: epath.Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path}: expected rows of an evaluation, found it damaged: {reason}")
