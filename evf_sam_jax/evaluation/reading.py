"""What the host prepares for a round of evaluation: some phrases of each image of a step.

The first round of a step has the images; the others only phrases and targets, so that an image is
read once however many phrases it has.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from data_pipelines.tokenizers import BOS_ID, EOS_ID, Tokenizer, pad_token_ids
from data_pipelines.tower_images import TowerImages
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.count import IGNORED
from evf_sam_jax.evaluation.grouping import Group, PlannedImage, Shape
from evf_sam_jax.evaluation.splits import EvaluationSet

_MOST_PARTS = IGNORED - 1


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a step, a row each; rows without one are black and of size 1.

    Attributes:
      rows: the image of each row.
      sam_image: the segmenter's frames.
      sizes: height and width of the content of the frame, then of the original image.
      encoder_image: the multimodal encoder's.
      ignore: of each row: true at pixels that do not count; None: all count.
      failed: of each row: why its image could not be read; None: it could, or there is none.
    """

    rows: tuple[PlannedImage | None, ...]
    sam_image: UInt8[np.ndarray, "n s s 3"]
    sizes: Int32[np.ndarray, "n 4"]
    encoder_image: Float32[np.ndarray, "n h w _"]
    ignore: tuple[Bool[np.ndarray, "_ _"] | None, ...]
    failed: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class RowTargets:
    """The phrases of one row in a round, with their targets.

    Attributes:
      chosen: places of the phrases among those of the image.
      masks: how many parts of the target are at each pixel.
    """

    image: PlannedImage
    chosen: tuple[int, ...]
    phrases: tuple[str, ...]
    masks: UInt8[np.ndarray, "k h w"]


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of a step.

    Attributes:
      groups: of the step, one a device.
      images: in the first round; else None.
      targets: of each row; None where it has no phrases in this round.
      last: whether the step ends with it.
    """

    groups: tuple[Group, ...]
    shape: Shape
    images: Images | None
    text_ids: Int32[np.ndarray, "n k l"]
    text_valid: Bool[np.ndarray, "n k l"]
    targets: tuple[RowTargets | None, ...]
    last: bool

    @property
    def tiles(self) -> int:
        """How many squares of pixels the largest image is counted in."""
        side = self.shape.tile
        return max(0 if row is None else len(row.image.tiles(side)) for row in self.targets)

    def tile(
        self, number: int, ignore: Sequence[Bool[np.ndarray, "_ _"] | None]
    ) -> tuple[Int32[np.ndarray, "n 2"], UInt8[np.ndarray, "n k t t"]]:
        """Origin and targets of each row's square of this number; what is not there is ignored.

        Args:
          ignore: as of the step's `Images`.
        """
        side = self.shape.tile
        origin = np.zeros((len(self.targets), 2), np.int32)
        target = np.full((len(self.targets), self.shape.phrases, side, side), IGNORED, np.uint8)
        for i, row in enumerate(self.targets):
            tiles = [] if row is None else row.image.tiles(side)
            if row is None or number >= len(tiles):
                continue
            top, left = origin[i] = tiles[number]
            within = row.masks[:, top : top + side, left : left + side]
            k, height, width = within.shape
            # More parts than fit in a byte with the number for ignored pixels are still "several".
            np.minimum(within, _MOST_PARTS, out=target[i, :k, :height, :width])
            if (ignored := ignore[i]) is not None:
                hidden = ignored[top : top + side, left : left + side]
                target[i, :k, :height, :width][:, hidden] = IGNORED
        return origin, target


@dataclasses.dataclass(frozen=True)
class Reader:
    """Prepares any round of a list of steps; what it gives depends on nothing else.

    Attributes:
      sets: that the groups' images are of.
      steps: the groups of each.
      devices: groups that a step has room for.
      batch_size: images that a group has room for.
      images: how both towers take an image.
    """

    sets: tuple[EvaluationSet, ...]
    steps: tuple[tuple[Group, ...], ...]
    tokenizer: Tokenizer
    devices: int
    batch_size: int
    images: TowerImages

    def rounds(self) -> list[tuple[int, int]]:
        """(step, round of it) of all rounds, in order."""
        return [
            (number, one)
            for number, step in enumerate(self.steps)
            for one in range(max(group.rounds for group in step))
        ]

    def read(self, place: tuple[int, int]) -> Round:
        """The round at a place that `rounds` names."""
        number, one = place
        step = self.steps[number]
        shape = step[0].shape
        rows: list[PlannedImage | None] = [None] * (self.devices * self.batch_size)
        for device, group in enumerate(step):
            first = device * self.batch_size
            rows[first : first + len(group.images)] = group.images
        images = None if one else self._empty_images(tuple(rows))
        failed: list[str | None] = [None] * len(rows)
        ignore: list[np.ndarray | None] = [None] * len(rows)
        targets: list[RowTargets | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if row is None:
                continue
            chosen = row.chosen[one * shape.phrases : (one + 1) * shape.phrases]
            source = self.sets[row.set]
            if images is None:
                if chosen:
                    texts = source.entry(row.image).phrases
                    phrases = tuple(texts[place] for place in chosen)
                    targets[i] = RowTargets(row, chosen, phrases, source.masks(row.image, chosen))
                continue
            try:
                example = source.read(row.image, chosen)
            except UserError as error:
                failed[i] = str(error)
                continue
            _, sam_size = self.images.segmenter(example.image, images.sam_image[i])
            images.sizes[i] = *sam_size, row.height, row.width
            images.encoder_image[i] = self.images.encoder(example.image)
            ignore[i] = example.ignore
            targets[i] = RowTargets(row, chosen, example.phrases, example.masks)
        if images is not None:
            images = dataclasses.replace(images, ignore=tuple(ignore), failed=tuple(failed))
        text_ids, text_valid = self._texts(targets, shape)
        last = one + 1 == max(group.rounds for group in step)
        return Round(step, shape, images, text_ids, text_valid, tuple(targets), last)

    def _empty_images(self, rows: tuple[PlannedImage | None, ...]) -> Images:
        n, frame = len(rows), self.images.frame
        return Images(
            rows=rows,
            sam_image=np.zeros((n, frame, frame, 3), np.uint8),
            sizes=np.ones((n, 4), np.int32),
            encoder_image=np.zeros((n, *self.images.encoder_shape), np.float32),
            ignore=(),
            failed=(),
        )

    def _texts(
        self, targets: Sequence[RowTargets | None], shape: Shape
    ) -> tuple[Int32[np.ndarray, "n k l"], Bool[np.ndarray, "n k l"]]:
        """Token ids; a row without a phrase has one of no words: attention over it is defined."""
        ids = []
        for row in targets:
            phrases = () if row is None else row.phrases
            ids += [self.tokenizer.encode(phrase) for phrase in phrases]
            ids += [[BOS_ID, EOS_ID]] * (shape.phrases - len(phrases))
        text_ids, text_valid = pad_token_ids(ids, shape.tokens)
        rows = (len(targets), shape.phrases, shape.tokens)
        return text_ids.reshape(rows), text_valid.reshape(rows)
