"""What a run found for one set, as columns; and whether two runs asked the same phrases."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from etils import epath
from jaxtyping import Bool, Float64, Int64

from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.rows import read_rows
from evf_sam_jax.evaluation.scores import iou_at_least
from evf_sam_jax.evaluation.splits import PAPER_SETS
from evf_sam_jax.report.estimates import Ratio

if TYPE_CHECKING:
    import pyarrow

FOUND = 0.5  # IoU from which on a phrase is taken to be found, as in Precision@0.5


@dataclasses.dataclass(frozen=True)
class EvaluatedSet:
    """The n phrases of a set, by image and phrase; the columns are those of `PhraseRow`."""

    name: str
    image_id: list[str]
    image_index: Int64[np.ndarray, " n"]
    phrase_index: Int64[np.ndarray, " n"]
    phrase: list[str]
    category: list[str]
    height: Int64[np.ndarray, " n"]
    width: Int64[np.ndarray, " n"]
    target_pixels: Int64[np.ndarray, " n"]
    predicted_pixels: Int64[np.ndarray, " n"]
    intersection: Int64[np.ndarray, " n"]
    union: Int64[np.ndarray, " n"]
    intersection_parts_union: Int64[np.ndarray, " n"]
    union_parts_union: Int64[np.ndarray, " n"]
    iou: Float64[np.ndarray, " n"]
    prediction_rle: list[str]

    def __len__(self) -> int:
        return len(self.phrase)

    @property
    def images(self) -> int:
        """How many images the phrases are about."""
        return len(np.unique(self.image_index))

    @property
    def found(self) -> Bool[np.ndarray, " n"]:
        """Which phrases were found: IoU of 0.5 or more."""
        return self.at_least(FOUND)

    def at_least(self, level: float) -> Bool[np.ndarray, " n"]:
        """Which phrases have so much IoU or more, exactly; `level` has one decimal."""
        return iou_at_least(self.intersection, self.union, round(10 * level))

    def ciou(self, member: Bool[np.ndarray, " n"] | None = None) -> Ratio:
        """All intersections over all unions, of these phrases."""
        return _masked(self.intersection, self.union, member)

    def ciou_of_united_parts(self) -> Ratio:
        """The same, where overlapping parts of a target are one area."""
        return Ratio(self.intersection_parts_union, self.union_parts_union)

    def giou(self, member: Bool[np.ndarray, " n"] | None = None) -> Ratio:
        """The mean of the IoUs of these phrases."""
        return _masked(self.iou, np.ones(len(self)), member)

    def share(
        self, holds: Bool[np.ndarray, " n"], member: Bool[np.ndarray, " n"] | None = None
    ) -> Ratio:
        """How many of these phrases something holds for."""
        return _masked(holds.astype(float), np.ones(len(self)), member)


def read_sets(run: epath.PathLike) -> dict[str, EvaluatedSet]:
    """The sets of a finished evaluation by name: the paper's in its order, then the others.

    Raises:
      UserError: there is no finished evaluation, it is damaged, or it has no phrases.
    """
    table = read_rows(run)
    if not table.num_rows:
        raise UserError(f"{run}: expected an evaluation with phrases, found none")
    order = [("set", "ascending"), ("image_index", "ascending"), ("phrase_index", "ascending")]
    table = table.sort_by(order)
    names = np.array(table.column("set").to_pylist(), object)
    bounds = np.flatnonzero(names[1:] != names[:-1]) + 1
    starts = [0, *bounds.tolist(), len(names)]
    sets = {
        str(names[begin]): _from_table(str(names[begin]), table.slice(begin, end - begin))
        for begin, end in zip(starts, starts[1:], strict=False)
    }
    known = [name for name in PAPER_SETS if name in sets]
    return {name: sets[name] for name in [*known, *(n for n in sets if n not in known)]}


def require_same_phrases(
    one: EvaluatedSet, other: EvaluatedSet, one_run: epath.PathLike, other_run: epath.PathLike
) -> None:
    """Raises UserError, with what differs first, if two runs asked other phrases of a set."""
    runs = f"{one.name}: expected the same phrases in {one_run} and {other_run}"
    if len(one) != len(other):
        raise UserError(f"{runs}, found {len(one)} and {len(other)}")
    for key in ("image_id", "phrase", "height", "width", "target_pixels"):
        left, right = (list(getattr(run, key)) for run in (one, other))
        if left == right:
            continue
        row = next(i for i in range(len(left)) if left[i] != right[i])
        what = key.replace("_", " ")
        place = f"image {one.image_id[row]}, phrase {one.phrase_index[row]}"
        values = " and ".join(
            repr(v) if isinstance(v, str) else str(v) for v in (left[row], right[row])
        )
        raise UserError(f"{runs}, found another {what} at {place}: {values}")


def _from_table(name: str, table: "pyarrow.Table") -> EvaluatedSet:
    columns = {}
    for field in dataclasses.fields(EvaluatedSet):
        if field.name == "name":
            continue
        column = table.column(field.name)
        texts = field.type == list[str]
        columns[field.name] = column.to_pylist() if texts else column.to_numpy()
    return EvaluatedSet(name=name, **columns)


def _masked(over: np.ndarray, under: np.ndarray, member: np.ndarray | None) -> Ratio:
    return Ratio(over, under) if member is None else Ratio(over * member, under * member)
