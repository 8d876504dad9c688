"""The embedded data set: drawn scenes of coloured shapes, phrases that name one each, exact masks.

Everything about example i is a function of (seed, i): nothing is stored or downloaded. A phrase is
kept only if it names exactly one shape, and a clause about position or relation only where the rest
of the phrase does not suffice. Each image asks about several shapes of comparable area, so that a
model must read the phrase: with k disjoint targets an image, no mask that ignores the phrase can
pass 1/k cIoU (`shapes_baselines.py`).
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from data_pipelines.assemble import Example
from data_pipelines.source import Entry
from evf_sam_jax.errors import UserError

T = TypeVar("T")

# The tokenizer of these phrases (train_shapes_tokenizer.py makes it).
SHAPES_TOKENIZER = pathlib.Path(__file__).parent / "shapes_tokenizer"

# First index and end of each split, so that no two of them share an example.
SPLITS = {"train": (0, 1_000_000), "val": (1_000_000, 1_010_000), "test": (1_010_000, 1_020_000)}

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 205, 40),
    "purple": (150, 50, 175),
}
SHAPES = ("circle", "square", "triangle", "strip")
SIZES = ("small", "large")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
CORNERS = tuple(itertools.product(("top", "bottom"), ("left", "right")))

# Of the circle, in pixels; the other shapes are scaled to look as large.
_RADII = {"small": (11.0, 13.0), "large": (17.0, 20.5)}
_GAP = 2.0  # pixels between the circles of two shapes: at most a corner is hidden
_CLEARLY, _PERHAPS = 0.42, 0.55  # share of the image up to which "left" surely, or possibly, holds
# Descriptions come in random order, in which each word left out sets one back by this much (of 1):
# people say more than they must, and name the shape ("the red circle" before "the red object").
_LEFT_OUT = {"size": 0.4, "colour": 0.4, "shape": 0.5}
_MAX_SCENES = 1000  # tries; the first or second succeeds where there is room
_CONTRAST = 80.0  # distance in RGB of the background from the colour of any shape
_MARGIN = 5.0  # pixels between two positions that a phrase may tell apart

_WORDS = {
    "most": {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"},
    "relation": {
        "left": ("left of", "to the left of"),
        "right": ("right of", "to the right of"),
        "top": ("above",),
        "bottom": ("below", "under"),
    },
}


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """How scenes and phrases are drawn.

    Attributes:
      sides: smallest and largest height and width of an image, drawn apart.
      objects: fewest and most shapes in an image.
      phrases: phrases an image, each about another shape.
      weights: how often an attribute phrase ("the small red circle"), a place ("the circle in the
        top left"), an extreme ("the leftmost strip") or a relation ("the circle left of the blue
        square") is tried first; where it cannot name the shape, another is tried.
    """

    seed: int = 0
    sides: tuple[int, int] = (96, 128)
    objects: tuple[int, int] = (3, 4)
    phrases: int = 3
    weights: tuple[float, float, float, float] = (0.45, 0.20, 0.05, 0.30)


DEFAULT_CONFIG = ShapesConfig()


@dataclasses.dataclass(frozen=True)
class Scene:
    """n shapes in an image of (height, width); positions in pixels, (x, y).

    Attributes:
      kind: per shape the index into SIZES, COLOURS, SHAPES.
    """

    height: int
    width: int
    centre: Float32[np.ndarray, "n 2"]
    radius: Float32[np.ndarray, " n"]
    kind: Int32[np.ndarray, "n 3"]

    def share_before(self, direction: str) -> Float32[np.ndarray, " n"]:
        """How much of the image, 0 to 1, lies between each shape and that edge."""
        axis = 0 if direction in ("left", "right") else 1
        share = self.centre[:, axis] / np.float32(self.width if axis == 0 else self.height)
        return share if direction in ("left", "top") else 1 - share


@dataclasses.dataclass(frozen=True)
class Description:
    """Such as "small red circle": indices into SIZES, COLOURS, SHAPES; None is left open."""

    size: int | None
    colour: int | None
    shape: int | None

    def matches(self, scene: Scene) -> Bool[np.ndarray, " n"]:
        """Which shapes the words fit."""
        words = (self.size, self.colour, self.shape)
        open_words = [word is None for word in words]
        wanted = [-1 if word is None else word for word in words]
        return ((scene.kind == wanted) | open_words).all(1)


@dataclasses.dataclass(frozen=True)
class Expression:
    """A description, and perhaps one clause on where the shape is.

    Attributes:
      clause: "attribute" (none), "side", "corner", "most" or "relation".
      where: the direction, or the two directions of a corner.
      reference: the other shape of a relation.
    """

    description: Description
    clause: str = "attribute"
    where: tuple[str, ...] = ()
    reference: Description | None = None

    def matches(self, scene: Scene, strict: bool) -> Bool[np.ndarray, " n"]:
        """Which shapes the phrase fits.

        Places have no sharp edge: `strict` keeps what everybody would call "left", otherwise what
        anybody might.
        """
        fits = self.description.matches(scene)
        if self.clause in ("side", "corner"):
            for direction in self.where:
                fits = fits & (scene.share_before(direction) <= (_CLEARLY if strict else _PERHAPS))
        elif self.clause == "most":
            along = scene.centre @ np.array(DIRECTIONS[self.where[0]], np.float32)
            best = along[fits].max() if fits.any() else 0.0
            # Strict: everybody else is a margin behind. Loose: within a margin of the first.
            tied = fits & (along >= best - _MARGIN)
            fits = tied & (tied.sum() == 1) if strict else tied
        elif self.reference is not None:
            references = np.flatnonzero(self.reference.matches(scene))
            if len(references) != 1:
                return np.zeros(len(fits), bool)
            offset = scene.centre - scene.centre[references[0]]
            along = offset @ np.array(DIRECTIONS[self.where[0]], np.float32)
            across = np.abs(offset).sum(1) - np.abs(along)
            # Strict: mainly in that direction. Loose: at all in that direction.
            clearly = (along > across) & (along > _MARGIN)
            fits = fits & (clearly if strict else along > -_MARGIN)
            fits[references[0]] = False
        return fits

    def names_only(self, scene: Scene, target: int) -> bool:
        """Whether the phrase clearly fits the target, and could not mean another shape."""
        if not self.matches(scene, strict=True)[target]:
            return False
        return bool(np.count_nonzero(self.matches(scene, strict=False)) == 1)


class ShapesSource:
    """A random-access source of `Example`s, as Grain takes it; each is drawn when asked for."""

    def __init__(
        self, split: str, config: ShapesConfig = DEFAULT_CONFIG, length: int | None = None
    ):
        """`length` keeps the first examples of the split only.

        Raises:
          UserError: no such split, longer than the split is, or more phrases than objects.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} of shapes: expected one of {', '.join(SPLITS)}")
        begin, end = SPLITS[split]
        if length is not None and not 0 < length <= end - begin:
            raise UserError(
                f"length of shapes/{split}: expected 1 to {end - begin}, found {length}"
            )
        if config.phrases > config.objects[0]:
            raise UserError(
                f"phrases of shapes: expected at most {config.objects[0]}, "
                f"the fewest objects of an image, found {config.phrases}"
            )
        self.config = config
        self._indices = range(begin, end if length is None else begin + length)

    def __len__(self) -> int:
        return len(self._indices)

    def example_id(self, index: int) -> int:
        """The number that this item of the split is drawn from; no other split has it."""
        return self._indices[index]

    def phrase_count(self, index: int) -> int:
        """As many for every example."""
        return self.config.phrases

    def entry(self, index: int) -> Entry:
        """Size and phrases; the scene is drawn for it."""
        scene, expressions, _, rng = draw_scene(self.config, self.example_id(index))
        paint(scene, rng)  # wordings are drawn after the pixels
        phrases = tuple(render(expression, rng) for expression in expressions)
        return Entry(scene.height, scene.width, phrases)

    def read(self, index: int, chosen: Sequence[int]) -> Example:
        """The example with the chosen phrases."""
        example, rows = self[index], list(chosen)
        phrases = tuple(example.phrases[i] for i in rows)
        return dataclasses.replace(example, phrases=phrases, masks=example.masks[rows])

    def describe(self, index: int) -> str:
        """A name for messages."""
        return f"shapes, example {self.example_id(index)}"

    def __getitem__(self, index: int) -> Example:
        example_id = self.example_id(index)
        scene, expressions, targets, rng = draw_scene(self.config, example_id)
        image, masks = paint(scene, rng)
        phrases = tuple(render(expression, rng) for expression in expressions)
        return Example(example_id, image, phrases, masks[targets])

    def __repr__(self) -> str:  # Grain names the source in its messages
        return f"ShapesSource({self._indices}, {self.config})"


def draw_scene(
    config: ShapesConfig, example_id: int
) -> tuple[Scene, list[Expression], list[int], np.random.Generator]:
    """A scene that `config.phrases` of its shapes can be named in.

    Returns:
      The scene, the expressions, the shape that each names, and the generator to go on with.

    Raises:
      UserError: there is none, because images are too small for so many shapes.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, example_id], np.uint64)))
    for _ in range(_MAX_SCENES):
        scene = _place(config, rng)
        if scene is None:
            continue
        expressions, targets = [], []
        for target in rng.permutation(len(scene.kind)).tolist():
            expression = _express(scene, target, config, rng)
            if expression is not None:
                expressions.append(expression)
                targets.append(target)
            if len(targets) == config.phrases:
                return scene, expressions, targets, rng
    raise UserError(
        f"shapes: {config.objects[0]} to {config.objects[1]} objects with {config.phrases} phrases "
        f"do not fit images of {config.sides[0]} to {config.sides[1]} pixels"
    )


def paint(
    scene: Scene, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "n h w"]]:
    """The image, on a shaded background with mild noise, and the visible pixels of every shape."""
    height, width = scene.height, scene.width
    slope_x, slope_y = rng.uniform(-40, 40, 2)
    y, x = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    shade = slope_y * (y / height - 0.5)[:, None] + slope_x * (x / width - 0.5)
    image = (_background(rng) + shade[:, :, None]).astype(np.int16)
    masks = np.zeros((len(scene.kind), height, width), np.uint8)
    for i, (_, colour, shape) in enumerate(scene.kind.tolist()):
        window, inside = _silhouette(SHAPES[shape], scene.centre[i], scene.radius[i], height, width)
        masks[:, *window][:, inside] = 0  # later shapes hide earlier ones
        masks[i, *window] = inside
        tint = np.array(tuple(COLOURS.values())[colour]) + rng.integers(-15, 16, 3)
        image[window][inside] = tint
    image += rng.integers(-8, 9, image.shape, np.int8)
    return np.clip(image, 0, 255).astype(np.uint8), masks


def render(expression: Expression, rng: np.random.Generator) -> str:
    """The expression in words, in one of its wordings."""
    words = _render_description(expression.description, rng)
    where = expression.where
    if expression.clause == "side":
        words += f" {_pick(('on the', 'at the'), rng)} {where[0]}"
    elif expression.clause == "corner":
        words += f" {_pick(('in the', 'at the'), rng)} {' '.join(where)}"
        words += _pick(("", " corner"), rng)
    elif expression.clause == "most":
        words = f"{_WORDS['most'][where[0]]} {words}"
    elif expression.reference is not None:
        link = _pick(_WORDS["relation"][where[0]], rng)
        words += f" {link} the {_render_description(expression.reference, rng)}"
    return f"{_pick(('the ', 'the ', 'the ', ''), rng)}{words}"


def _place(config: ShapesConfig, rng: np.random.Generator) -> Scene | None:
    """Shapes that do not touch, or None where they did not fit."""
    height, width = rng.integers(config.sides[0], config.sides[1] + 1, 2).tolist()
    count = int(rng.integers(config.objects[0], config.objects[1] + 1))
    # Few colours and shapes a scene: then a single word doesn't always tell two objects apart.
    colours = rng.choice(len(COLOURS), rng.integers(3, 6), replace=False)
    shapes = rng.choice(len(SHAPES), rng.integers(1, 4), replace=False)
    sizes = rng.integers(len(SIZES), size=count)
    kind = np.stack([sizes, rng.choice(colours, count), rng.choice(shapes, count)], axis=1)
    low, high = np.array([_RADII[size] for size in SIZES])[kind[:, 0]].T
    radius = rng.uniform(low, high).astype(np.float32)
    centre = np.empty((count, 2), np.float32)
    for i in range(count):
        room = radius[i] + 1
        tries = rng.uniform(room, (width - 1 - room, height - 1 - room), (24, 2))
        apart = np.hypot(*(tries[:, None] - centre[None, :i]).transpose(2, 0, 1))
        free = np.flatnonzero((apart > radius[:i] + radius[i] + _GAP).all(1))
        if not len(free):
            return None
        centre[i] = tries[free[0]]
    return Scene(height, width, centre, radius, kind.astype(np.int32))


def _express(
    scene: Scene, target: int, config: ShapesConfig, rng: np.random.Generator
) -> Expression | None:
    """An expression that names the target alone, of a kind drawn by weight, or None."""
    families = (_attributes, _places, _extremes, _relations)
    keys = rng.random(len(families)) ** (1 / np.maximum(config.weights, 1e-9))
    for family in np.argsort(-keys):
        for expression in families[family](scene, target, rng):
            if config.weights[family] > 0 and expression.names_only(scene, target):
                return expression
    return None


def _descriptions(scene: Scene, target: int, rng: np.random.Generator) -> list[Description]:
    """All ways to describe the target; those that say much tend to come first."""
    size, colour, shape = scene.kind[target].tolist()
    ways = [
        Description(*choice)
        for choice in itertools.product((None, size), (None, colour), (shape, None))
    ]
    keys = rng.random(len(ways)) + [
        sum(delay for word, delay in _LEFT_OUT.items() if getattr(way, word) is None)
        for way in ways
    ]
    return [ways[i] for i in np.argsort(keys)]


def _shared(scene: Scene, target: int, rng: np.random.Generator) -> list[Description]:
    """Descriptions that fit another shape too, so that a clause has to decide."""
    return [d for d in _descriptions(scene, target, rng) if np.count_nonzero(d.matches(scene)) > 1]


def _attributes(scene: Scene, target: int, rng: np.random.Generator) -> Iterator[Expression]:
    return map(Expression, _descriptions(scene, target, rng))


def _places(scene: Scene, target: int, rng: np.random.Generator) -> Iterator[Expression]:
    sides = [side for side in DIRECTIONS if scene.share_before(side)[target] <= _CLEARLY]
    corners = [corner for corner in CORNERS if set(corner) <= set(sides)]
    wheres = [*((side,) for side in sides), *corners]
    for description in _shared(scene, target, rng):
        for where in _shuffled(wheres, rng):
            yield Expression(description, "side" if len(where) == 1 else "corner", where)


def _extremes(scene: Scene, target: int, rng: np.random.Generator) -> Iterator[Expression]:
    directions = _shuffled(list(DIRECTIONS), rng)
    for description in _shared(scene, target, rng):
        for direction in directions:
            yield Expression(description, "most", (direction,))


def _relations(scene: Scene, target: int, rng: np.random.Generator) -> Iterator[Expression]:
    shared = _shared(scene, target, rng)
    for reference in rng.permutation(len(scene.kind)).tolist():
        x, y = scene.centre[target] - scene.centre[reference]
        if reference == target or max(abs(x), abs(y)) <= _MARGIN:
            continue
        if abs(x) > abs(y):
            direction = "left" if x < 0 else "right"
        else:
            direction = "top" if y < 0 else "bottom"
        for named in _descriptions(scene, reference, rng):
            if np.count_nonzero(named.matches(scene)) == 1:
                for description in shared:
                    yield Expression(description, "relation", (direction,), named)
                break


def _render_description(description: Description, rng: np.random.Generator) -> str:
    words = []
    if description.size is not None:
        words.append(_pick(("small", "little") if description.size == 0 else ("large", "big"), rng))
    if description.colour is not None:
        words.append(tuple(COLOURS)[description.colour])
    if description.shape is not None:
        words.append(SHAPES[description.shape])
    else:
        words.append(_pick(("shape", "object"), rng))
    return " ".join(words)


def _shuffled(choices: Sequence[T], rng: np.random.Generator) -> list[T]:
    return [choices[i] for i in rng.permutation(len(choices))]


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _background(rng: np.random.Generator) -> np.ndarray:
    """A colour that no shape has; any other, so that no single channel tells them apart."""
    while True:
        colour = rng.uniform(30, 225, 3)
        distance = np.linalg.norm(np.array(tuple(COLOURS.values())) - colour, axis=1)
        if distance.min() >= _CONTRAST:
            return colour


def _silhouette(
    shape: str, centre: np.ndarray, radius: np.float32, height: int, width: int
) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window around a shape, and which of its pixels the shape covers."""
    reach = int(radius * 1.2) + 2
    x0, y0 = (max(0, int(c) - reach) for c in centre)
    x1, y1 = min(width, int(centre[0]) + reach + 1), min(height, int(centre[1]) + reach + 1)
    x = (np.arange(x0, x1, dtype=np.float32) - centre[0]) / radius
    y = ((np.arange(y0, y1, dtype=np.float32) - centre[1]) / radius)[:, None]
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) <= 0.85
    elif shape == "triangle":
        inside = (y <= 0.85) & (2 * np.abs(x) <= y + 1.05)
    else:
        inside = (np.abs(x) <= 1.15) & (np.abs(y) <= 0.55)
    return (slice(y0, y1), slice(x0, x1)), inside
