"""Pictures of predictions: masks over an image, and captioned panels of several images."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

# Told apart by most kinds of colour blindness (Okabe and Ito 2008), black left out.
COLORS: dict[str, tuple[int, int, int]] = {
    "vermilion": (213, 94, 0),
    "blue": (0, 114, 178),
    "green": (0, 158, 115),
    "yellow": (240, 228, 66),
    "pink": (204, 121, 167),
    "sky": (86, 180, 233),
    "orange": (230, 159, 0),
}

CAPTION_SIZE = 12  # pixels
MARGIN = 4  # pixels around cells and captions


@dataclasses.dataclass(frozen=True)
class Cell:
    """One picture of a panel with the words below it."""

    image: UInt8[np.ndarray, "h w 3"]
    caption: str = ""


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    color: tuple[int, int, int],
    alpha: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image with `color` blended into the pixels of the mask.

    Args:
      color: red, green, blue, 0 to 255.
      alpha: 0 leaves the image, 1 paints the mask.
    """
    blended = image.copy()
    inside = image[mask].astype(np.float32)
    blended[mask] = np.round((1 - alpha) * inside + alpha * np.asarray(color, np.float32)).astype(
        np.uint8
    )
    return blended


def outline(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    color: tuple[int, int, int],
    width: int = 2,
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image with the mask's pixels nearest to its edge painted in `color`.

    Args:
      width: pixels of the mask, counted from its edge along rows and columns.
    """
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1)
        beside = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        inner = np.logical_and.reduce([inner, *beside])
    painted = image.copy()
    painted[mask & ~inner] = color
    return painted


def panel(rows: Sequence[Sequence[Cell]]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a grid of cells on white, each column as wide as its widest picture.

    Captions are wrapped to their column. Pictures keep their size; rows may differ in length.
    """
    columns = max(len(row) for row in rows)
    widths = [max(row[i].image.shape[1] for row in rows if i < len(row)) for i in range(columns)]
    captions = [[_wrap(cell.caption, widths[i]) for i, cell in enumerate(row)] for row in rows]
    picture_heights = [max((cell.image.shape[0] for cell in row), default=0) for row in rows]
    caption_heights = [max(map(_text_height, row), default=0) for row in captions]

    width = sum(widths) + MARGIN * (columns + 1)
    height = sum(picture_heights) + sum(caption_heights) + MARGIN * (len(rows) + 1)
    canvas = Image.new("RGB", (width, height), "white")
    top = MARGIN
    for row, texts, picture_height, caption_height in zip(
        rows, captions, picture_heights, caption_heights, strict=True
    ):
        left = MARGIN
        for cell, text, column_width in zip(row, texts, widths, strict=False):
            canvas.paste(Image.fromarray(cell.image), (left, top))
            below = (left, top + cell.image.shape[0])
            canvas.paste(_caption(text, column_width, caption_height), below)
            left += column_width + MARGIN
        top += picture_height + caption_height + MARGIN
    return np.asarray(canvas)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(CAPTION_SIZE)


def _caption(text: str, width: int, height: int) -> Image.Image:
    """Black on white; what does not fit is cut off."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.multiline_text((0, MARGIN), text, fill="black", font=_font(), spacing=0)
    return image


def _wrap(text: str, width: int) -> str:
    """Breaks a text into lines of at most `width` pixels, at blanks; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font().getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _text_height(text: str) -> int:
    """Pixels below a picture that its caption takes."""
    if not text:
        return 0
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(draw.multiline_textbbox((0, 0), text, font=_font(), spacing=0)[3]) + 2 * MARGIN
