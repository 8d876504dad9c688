"""How evaluation goes through its sets: images in groups, a group a device, a step all devices.

A group holds images whose phrases and pixels are computed in the same shapes. Which images those
are depends on the sets and the size of a group alone, neither on the number of devices and
processes nor on what has been evaluated before: so each image is always computed beside the same
others, and gives the same numbers.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.rows import LeftOut
from evf_sam_jax.evaluation.splits import EvaluationSet
from evf_sam_jax.predictor import TOKEN_BUCKETS

# A program is compiled once for each combination that images need, of these and `TOKEN_BUCKETS`.
PHRASE_SIZES = (1, 2, 4, 8, 16, 32)
# Sides of the squares of pixels that masks are counted in; a larger image takes several of the
# largest, which holds any image of COCO.
TILE_SIZES = (128, 256, 640)


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """What the compiled functions depend on, besides the model and the size of a group.

    Attributes:
      tile: side of the square of pixels that is counted at a time.
      tokens: of a phrase, `<s>` and `</s>` included.
      phrases: of an image that are decoded at a time.
    """

    tile: int
    tokens: int
    phrases: int


@dataclasses.dataclass(frozen=True)
class PlannedImage:
    """An image of a set, with what is to be evaluated of it.

    Attributes:
      set: the place of the set among all.
      image: place of the image in its set.
      height: pixels.
      width: pixels.
      chosen: its phrases, as their places among those of the image.
    """

    set: int
    image: int
    height: int
    width: int
    chosen: tuple[int, ...]

    def tiles(self, side: int) -> list[tuple[int, int]]:
        """The top left pixels of the squares that it is counted in."""
        return list(itertools.product(range(0, self.height, side), range(0, self.width, side)))


@dataclasses.dataclass(frozen=True)
class Group:
    """Images that a device computes together.

    Attributes:
      number: of the group, from 0.
      images: as many as a device takes, or fewer.
    """

    number: int
    shape: Shape
    images: tuple[PlannedImage, ...]

    @property
    def rounds(self) -> int:
        """How often phrases are decoded until all have been."""
        return max(-(-len(image.chosen) // self.shape.phrases) for image in self.images)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is to be evaluated.

    Attributes:
      left_out: phrases that the model has no room for.
    """

    groups: tuple[Group, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def images(self) -> int:
        """How many are evaluated."""
        return sum(len(group.images) for group in self.groups)


def make_plan(
    sets: Sequence[EvaluationSet], tokenizer: Tokenizer, batch_size: int, phrases: int
) -> Plan:
    """Puts the images of all sets in groups.

    Args:
      batch_size: images of a group.
      phrases: of an image that are decoded at a time, at most.
    """
    groups: list[Group] = []
    left_out: list[LeftOut] = []
    for number, one in enumerate(sets):
        by_shape: dict[Shape, list[PlannedImage]] = {}
        for image in range(len(one)):
            shape, planned, without = _planned(one, number, image, tokenizer, phrases)
            left_out += without
            if planned.chosen:
                by_shape.setdefault(shape, []).append(planned)
        for shape in sorted(by_shape):
            # Alike ones together, since a group takes as long as its longest image.
            images = sorted(by_shape[shape], key=lambda image: _cost(image, shape))
            for first in range(0, len(images), batch_size):
                group = Group(len(groups), shape, tuple(images[first : first + batch_size]))
                groups.append(group)
    return Plan(tuple(groups), tuple(left_out))


def steps(groups: Sequence[Group], devices: int) -> Iterator[tuple[Group, ...]]:
    """The groups in steps: of one shape, at most one a device."""
    by_shape = sorted(groups, key=lambda group: group.shape)
    for _, alike in itertools.groupby(by_shape, key=lambda group: group.shape):
        while step := tuple(itertools.islice(alike, devices)):
            yield step


def share(groups: Sequence[Group], process: int, processes: int) -> list[Group]:
    """The groups that a process takes: of each shape every so manyth."""
    return sorted(groups, key=lambda group: (group.shape, group.number))[process::processes]


def _planned(
    one: EvaluationSet, number: int, image: int, tokenizer: Tokenizer, phrases: int
) -> tuple[Shape, PlannedImage, list[LeftOut]]:
    entry = one.entry(image)
    chosen, longest, left_out = [], 0, []
    for place, phrase in enumerate(entry.phrases):
        try:
            longest = max(longest, len(tokenizer.encode(phrase)))
        except UserError as error:
            left_out.append(LeftOut(one.name, image, repr(phrase[:80]), str(error)))
        else:
            chosen.append(place)
    side = max(entry.height, entry.width)
    shape = Shape(
        tile=next((tile for tile in TILE_SIZES if side <= tile), TILE_SIZES[-1]),
        tokens=min(_least(longest, TOKEN_BUCKETS), tokenizer.max_tokens),
        phrases=min(_least(len(chosen), PHRASE_SIZES), phrases),
    )
    return shape, PlannedImage(number, image, entry.height, entry.width, tuple(chosen)), left_out


def _least(wanted: int, sizes: tuple[int, ...]) -> int:
    """The least of the sizes that has room, or the largest."""
    return next((size for size in sizes if wanted <= size), sizes[-1])


def _cost(image: PlannedImage, shape: Shape) -> tuple[int, int]:
    rounds = -(-len(image.chosen) // shape.phrases)
    return rounds * len(image.tiles(shape.tile)), image.image
