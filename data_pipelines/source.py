"""Random-access sources: what Grain draws from, and what every pipeline asks of them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from data_pipelines.assemble import Example
from data_pipelines.image_input import read_image
from data_pipelines.index import Index
from data_pipelines.segmentations import OVERLAPS, Overlap, area, decode_parts
from evf_sam_jax.errors import UserError

# What the multi-task checkpoints know categories and parts by, one token of their tokenizers
# (hustvl/EVF-SAM demo.py:50-51 at 9935dc5).
SEMANTIC_PREFIX = "[semantic] "

TextCase = Literal["as_written", "lower"]
TEXT_CASES: tuple[TextCase, ...] = ("as_written", "lower")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of an example without reading its image: its size and its phrases."""

    height: int
    width: int
    phrases: tuple[str, ...]


@runtime_checkable
class Source(Protocol):
    """What Grain calls a random-access source, and what is known of its items beforehand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example with all its phrases. Raises UserError if it cannot be read."""
        ...

    def phrase_count(self, index: int) -> int:
        """How many phrases it has."""
        ...

    def entry(self, index: int) -> Entry:
        """Size and phrases."""
        ...

    def read(self, index: int, chosen: Sequence[int]) -> Example:
        """The example with the chosen phrases. Raises UserError if it cannot be read."""
        ...

    def describe(self, index: int) -> str:
        """A name for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class ReadingRules:
    """How annotations become examples.

    Attributes:
      overlap: what a pixel in several parts of a target counts: 1 ("union"), or as many ("sum",
        the original's).
      text: "as_written" (the original's for training), or stripped and in lower case (the
        original's for evaluation).
      prefix: put before each phrase, such as "[semantic] ".
      ignore_unlabelled: whether pixels without a label are left out of loss and metrics, where the
        data set has such; the original takes them for background.
      without_categories: targets of these categories are left out, such as "background".
    """

    overlap: Overlap = "union"
    text: TextCase = "as_written"
    prefix: str = ""
    ignore_unlabelled: bool = False
    without_categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            expected = " or ".join(OVERLAPS)
            raise UserError(f"overlap: expected {expected}, found {self.overlap!r}")
        if self.text not in TEXT_CASES:
            raise UserError(f"text: expected {' or '.join(TEXT_CASES)}, found {self.text!r}")
        if not isinstance(self.prefix, str):
            raise UserError(f"prefix: expected a string, found {self.prefix!r}")
        if not isinstance(self.ignore_unlabelled, bool):
            raise UserError(
                f"ignore_unlabelled: expected true or false, found {self.ignore_unlabelled!r}"
            )
        if not isinstance(self.without_categories, tuple):
            raise UserError(
                f"without_categories: expected a list, found {self.without_categories!r}"
            )


@runtime_checkable
class ImageStore(Protocol):
    """Where the pixels of a source are."""

    def read(self, index: int, file: str) -> np.ndarray:
        """Upright RGB of the image: its row in the index, and its `AnnotatedImage.file`."""
        ...


@dataclasses.dataclass(frozen=True)
class LooseFiles:
    """Image files below a root."""

    root: Path

    def read(self, index: int, file: str) -> np.ndarray:
        return read_image(os.path.join(self.root, file))


class IndexedSource:
    """Examples of an index, one an image, read when asked for.

    Attributes:
      index: what the annotations say.
      rules: how they become examples.
      images: [n] the rows of the index that this source has.
    """

    def __init__(
        self,
        index: Index,
        store: ImageStore,
        rules: ReadingRules | None = None,
        images: np.ndarray | None = None,
    ):
        """`images` keeps these rows of the index only.

        Raises:
          UserError: nothing is left.
        """
        self.index, self.store = index, store
        self.rules = ReadingRules() if rules is None else rules
        self.images = np.arange(len(index)) if images is None else np.asarray(images)
        self._kept = _kept_phrases(index, self.rules)
        if self._kept is not None:
            counts = np.add.reduceat(self._kept, index.phrase_begin[:-1], dtype=np.int64)
            self.images = self.images[counts[self.images] > 0]
        if not len(self.images):
            raise UserError(f"{self.name}: expected images with phrases, found none")

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self):
        return IndexedSource, (self.index, self.store, self.rules, self.images)

    def __repr__(self) -> str:  # Grain names the source in its messages
        return f"IndexedSource({self.name}, {len(self)} images)"

    @property
    def name(self) -> str:
        """Data set and split, such as "refcoco/train"."""
        return f"{self.index.meta['name']}/{self.index.meta['split']}"

    def describe(self, index: int) -> str:
        """Data set, split, id and file of the image."""
        image = int(self.images[index])
        return f"{self.name}, image {self.index.image_id(image)} ({self.index.file(image)})"

    def phrase_rows(self, index: int) -> Sequence[int]:
        """The rows of the example's phrases in the index."""
        rows = self.index.phrases(int(self.images[index]))
        return rows if self._kept is None else [row for row in rows if self._kept[row]]

    def phrase_count(self, index: int) -> int:
        """How many phrases the example has."""
        return len(self.phrase_rows(index))

    def entry(self, index: int) -> Entry:
        """Size and phrases, with prefix and case as they will be read."""
        height, width = self.index.sizes[self.images[index]].tolist()
        return Entry(height, width, tuple(map(self._text, self.phrase_rows(index))))

    def __getitem__(self, index: int) -> Example:
        return self.read(index, range(self.phrase_count(index)))

    def read(self, index: int, chosen: Sequence[int]) -> Example:
        """The example with the chosen phrases.

        Raises:
          UserError: the image cannot be read, or has another size than its annotations say.
        """
        image = int(self.images[index])
        height, width = self.index.sizes[image].tolist()
        pixels = self.store.read(image, self.index.file(image))
        if pixels.shape[:2] != (height, width):
            raise UserError(
                f"{self.describe(index)}: expected {width} x {height} pixels as its annotations "
                f"say, found {pixels.shape[1]} x {pixels.shape[0]}"
            )
        texts = self.entry(index).phrases
        return Example(
            index,
            pixels,
            tuple(texts[i] for i in chosen),
            self.masks(index, chosen),
            self._ignore(image),
        )

    def masks(self, index: int, chosen: Sequence[int]) -> UInt8[np.ndarray, "k h w"]:
        """Targets of the chosen phrases, without reading the image."""
        height, width = self.index.sizes[self.images[index]].tolist()
        all_rows = self.phrase_rows(index)
        rows = [all_rows[i] for i in chosen]
        masks = np.empty((len(rows), height, width), np.uint8)
        decoded: dict[int, int] = {}  # several phrases may name one target
        for i, row in enumerate(rows):
            target = int(self.index.phrase_target[row])
            if target in decoded:
                masks[i] = masks[decoded[target]]
            else:
                parts = self.index.parts(target)
                masks[i] = decode_parts(parts, height, width, self.rules.overlap)
                decoded[target] = i
        return masks

    def target_areas(self, index: int) -> list[int]:
        """Pixels of the target of each phrase."""
        height, width = self.index.sizes[self.images[index]].tolist()
        targets = [int(self.index.phrase_target[row]) for row in self.phrase_rows(index)]
        return [area(self.index.parts(target), height, width) for target in targets]

    def _text(self, row: int) -> str:
        text = self.index.phrase(row)
        if self.rules.text == "lower":
            text = text.strip().lower()
        return self.rules.prefix + text

    def _ignore(self, image: int) -> np.ndarray | None:
        encoded = self.index.ignore(image) if self.rules.ignore_unlabelled else b""
        if not encoded:
            return None
        height, width = self.index.sizes[image].tolist()
        return decode_parts((encoded,), height, width) > 0


def _kept_phrases(index: Index, rules: ReadingRules) -> np.ndarray | None:
    """Which phrases of the index the rules keep; None: all.

    Raises:
      UserError: the data set has no such category.
    """
    if not rules.without_categories:
        return None
    categories = index.meta["categories"]
    for category in rules.without_categories:
        if category not in categories:
            known = ", ".join(sorted(categories)[:10])
            raise UserError(
                f"without_categories: expected categories of {index.meta['name']} "
                f"({known}, ...), found {category!r}"
            )
    dropped = [categories.index(category) for category in rules.without_categories]
    return ~np.isin(index.target_category[index.phrase_target], dropped)
