"""The loop of evaluation: rounds are read ahead, computed on the devices, and become rows."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Bool, UInt8

from data_pipelines.segmentations import encode_mask
from evf_sam_jax.evaluation.count import Counts, EvaluatedModel
from evf_sam_jax.evaluation.grouping import Group
from evf_sam_jax.evaluation.reading import Images, Reader, Round, RowTargets
from evf_sam_jax.evaluation.rows import LeftOut, PhraseRow
from evf_sam_jax.evaluation.splits import EvaluationSet
from evf_sam_jax.metrics import EPSILON

# Rounds the host may be ahead of the devices.
_AHEAD = 2
_PIXEL_COUNTS = tuple(field.name for field in dataclasses.fields(Counts) if field.name != "mask")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What became of a step.

    Attributes:
      groups: all of their phrases are here.
      left_out: images that could not be read.
    """

    groups: tuple[Group, ...]
    rows: tuple[PhraseRow, ...]
    left_out: tuple[LeftOut, ...]


@dataclasses.dataclass(frozen=True)
class _Computed:
    """A round that the devices have been given."""

    round: Round
    images: Images
    iou: jax.Array
    tiles: tuple[Any, ...]


def evaluate_steps(model: EvaluatedModel, reader: Reader, threads: int) -> Iterator[Evaluated]:
    """Evaluates all steps of the reader, in order.

    Args:
      threads: that prepare rounds ahead.
    """
    waiting: collections.deque[_Computed] = collections.deque()
    rows: list[PhraseRow] = []
    for computed in _compute(model, _read_ahead(reader, threads)):
        waiting.append(computed)
        if len(waiting) > _AHEAD:
            yield from _finished(waiting.popleft(), reader.sets, rows)
    while waiting:
        yield from _finished(waiting.popleft(), reader.sets, rows)


def _read_ahead(reader: Reader, threads: int) -> Iterator[Round]:
    rounds = reader.rounds()
    if not rounds:
        return
    dataset = grain.MapDataset.range(len(rounds)).map(lambda i: reader.read(rounds[i]))
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, threads))
    iterator = iter(dataset.to_iter_dataset(ahead))
    try:
        yield from iterator
    finally:
        iterator.close()


def _compute(model: EvaluatedModel, rounds: Iterator[Round]) -> Iterator[_Computed]:
    """Gives rounds to the devices, and does not wait for them."""
    images = features = encoder_image = sizes = None
    for one in rounds:
        if one.images is not None:
            images = one.images
            encoder_image, sizes = model.put(images.encoder_image, images.sizes)
            features = model.encode(images.sam_image, images.sizes[:, :2])
        assert images is not None and features is not None, "a step begins with its images"
        assert encoder_image is not None and sizes is not None, "likewise"
        logits, iou = model.decode(features, encoder_image, one.text_ids, one.text_valid)
        tiles = []
        for number in range(one.tiles):
            origin, target = one.tile(number, images.ignore)
            tiles.append(model.count(logits, sizes, origin, target))
        yield _Computed(one, images, iou, tuple(tiles))


def _finished(
    computed: _Computed, sets: Sequence[EvaluationSet], rows: list[PhraseRow]
) -> Iterator[Evaluated]:
    """Waits for a round and adds its rows; the last one of a step gives all and empties `rows`."""
    one = computed.round
    iou, tiles = jax.device_get((computed.iou, computed.tiles))
    for i, row in enumerate(one.targets):
        if row is not None and computed.images.failed[i] is None:
            rows += _rows(row, i, iou[i], tiles, one.shape.tile, sets[row.image.set])
    if one.last:
        yield Evaluated(one.groups, tuple(rows), _left_out(computed.images, sets))
        rows.clear()


def _rows(
    row: RowTargets,
    i: int,
    predicted_iou: np.ndarray,
    tiles: Sequence[Counts],
    side: int,
    source: EvaluationSet,
) -> Iterator[PhraseRow]:
    """The rows of an image's phrases in a round; `i` is its row among all of the devices."""
    image = row.image
    origins = image.tiles(side)
    own = tiles[: len(origins)]
    sums = {
        name: np.stack([getattr(tile, name)[i] for tile in own]).sum(0, dtype=np.int64)
        for name in _PIXEL_COUNTS
    }
    for k, (place, phrase) in enumerate(zip(row.chosen, row.phrases, strict=True)):
        counts = {name: int(total[k]) for name, total in sums.items()}
        intersection, union = counts["intersection"], counts["union"]
        bits = [None if tile.mask is None else tile.mask[i, k] for tile in own]
        yield PhraseRow(
            set=source.name,
            image_id=source.image_id(image.image),
            image_index=image.image,
            phrase_index=place,
            phrase=phrase,
            category=source.category(image.image, place),
            height=image.height,
            width=image.width,
            target_pixels=counts["target"],
            predicted_pixels=counts["predicted"],
            intersection=intersection,
            union=union,
            intersection_parts_union=counts["intersection_parts_union"],
            union_parts_union=counts["union_parts_union"],
            predicted_iou=float(predicted_iou[k]),
            iou=intersection / (union + EPSILON) + (union == 0),
            prediction_rle=_run_lengths(bits, origins, image.height, image.width),
        )


def _run_lengths(
    bits: Sequence[UInt8[np.ndarray, "t bytes"] | None],
    origins: Sequence[tuple[int, int]],
    height: int,
    width: int,
) -> str:
    """COCO's run lengths of a mask that is given in squares; "" without any."""
    mask = np.zeros((height, width), bool)
    for square, (top, left) in zip(bits, origins, strict=True):
        if square is None:
            return ""
        pixels: Bool[np.ndarray, "t t"] = np.unpackbits(square, axis=-1).astype(bool)
        mask[top : top + len(pixels), left : left + len(pixels)] = pixels[
            : height - top, : width - left
        ]
    return encode_mask(mask).decode("ascii")


def _left_out(images: Images, sets: Sequence[EvaluationSet]) -> tuple[LeftOut, ...]:
    return tuple(
        LeftOut(sets[row.set].name, row.image, sets[row.set].describe(row.image), reason)
        for row, reason in zip(images.rows, images.failed, strict=True)
        if row is not None and reason is not None
    )
