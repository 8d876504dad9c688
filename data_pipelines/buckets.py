"""Which of a few shapes a batch gets: a function of the index entries of the whole global batch.

Every host computes it alike, from what it knows without reading an image, or hosts would compile
and run different programs and wait for each other for ever.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from data_pipelines.assemble import BatchSpec
from data_pipelines.source import Entry
from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.errors import UserError

# Sides of canvases beyond the listed ones are multiples of this.
_CANVAS_STEP = 512


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes to choose from.

    Attributes:
      text_lengths: tokens a phrase, `<s>` and `</s>` included, ascending.
      canvases: heights and widths, by which they are tried in order.
    """

    text_lengths: tuple[int, ...]
    canvases: tuple[tuple[int, int], ...] = ((640, 640),)

    def __post_init__(self) -> None:
        if not self.text_lengths or list(self.text_lengths) != sorted(set(self.text_lengths)):
            raise UserError(
                f"text_lengths: expected numbers from small to large, found {self.text_lengths}"
            )
        if not self.canvases:
            raise UserError("canvases: expected at least one height and width, found none")

    def fits(self, entry: Entry, tokenizer: Tokenizer) -> bool:
        """Whether each phrase has a bucket."""
        return _longest(entry, tokenizer) <= self.text_lengths[-1]

    def choose(self, spec: BatchSpec, entries: Iterable[Entry], tokenizer: Tokenizer) -> BatchSpec:
        """`spec` with the smallest shapes that hold all entries.

        Entries whose phrases fit no bucket do not count. A canvas that holds the largest image is
        taken from the list; where there is none, the last one if `spec.shrink`, otherwise one whose
        sides are rounded up.
        """
        sizes = [
            (longest, entry.height, entry.width)
            for entry in entries
            if (longest := _longest(entry, tokenizer)) <= self.text_lengths[-1]
        ]
        longest, height, width = np.max(sizes, axis=0).tolist() if sizes else (0, 0, 0)
        text_length = next(length for length in self.text_lengths if length >= longest)
        canvas = next((c for c in self.canvases if c[0] >= height and c[1] >= width), None)
        if canvas is None:
            canvas = self.canvases[-1] if spec.shrink else (_rounded(height), _rounded(width))
        return dataclasses.replace(spec, text_length=text_length, canvas=canvas)


def _longest(entry: Entry, tokenizer: Tokenizer) -> int:
    """Tokens of the longest phrase."""
    try:
        return max((len(tokenizer.encode(phrase)) for phrase in entry.phrases), default=0)
    except UserError:  # more than the model has positions for
        return tokenizer.max_tokens + 1


def _rounded(side: int) -> int:
    return -(-side // _CANVAS_STEP) * _CANVAS_STEP
