"""An image file to pixels, and pixels to what each of the two towers takes; prediction uses the
same code.

Ported from hustvl/EVF-SAM inference.py:42-91,172-173 and
model/segment_anything/utils/transforms.py:27-34,103-113 at 9935dc5. Both resizes are reproduced in
NumPy and Pillow without torch.

Only files of `FORMATS` are opened, by their content and not by their name. Of these Pillow reads
the header first, so that what is too large is refused before it is decoded. Others it decodes while
opening them (an ICO with a PNG inside) or passes to another program (EPS to Ghostscript).

Differences: a side never shrinks below one pixel (the original fails there); the segmenter's image
stays uint8 and is padded with zeros here, since normalisation and the padding with the mean happen
on the device.
"""

import functools
import io
import os
import warnings

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from evf_sam_jax.errors import UserError

# Beyond this Pillow calls a file a decompression bomb; it is checked on the header, before anything
# is decoded.
MAX_PIXELS = 178_956_970

# A camera's JPEG with several pictures, which Pillow calls MPO, is opened as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_LYING = (5, 6, 7, 8)  # of these, height and width change places

_CUBIC_A = np.float32(-0.75)  # torch's; Pillow and JAX use -0.5


def read_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a file as upright 8-bit RGB, as `cv2.imread` and a swap to RGB do.

    EXIF orientation is applied, alpha dropped (not blended), 16 bits keep their upper 8, palettes
    and greys are expanded, CMYK is converted, of an animation the first frame is taken. Equal to
    OpenCV 5.0 on PNG, JPEG, WebP, BMP, GIF and 8-bit TIFF; CMYK JPEG and 16-bit colour TIFF differ
    by up to 1.

    Raises:
      UserError: the file is missing, a directory, empty, truncated, no image of `FORMATS`, or of
        more than `max_pixels` pixels.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: expected an image file, found nothing there")
    if os.path.isdir(path):
        raise UserError(f"{path}: expected an image file, found a directory")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: expected an image file, found an empty one")
    return _read(path, str(path), max_pixels)


def decode_image(
    content: bytes, name: str, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "h w 3"]:
    """As `read_image`, from the bytes of a file; `name` is what messages call it."""
    if not content:
        raise UserError(f"{name}: expected an image file, found an empty one")
    return _read(io.BytesIO(content), name, max_pixels)


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of the image as `read_image` gives it, from the file's header alone.

    Raises:
      UserError: it is no image.
    """
    with _open(path, str(path), MAX_PIXELS) as opened:
        height, width = opened.height, opened.width
        return (width, height) if _orientation(opened) in _LYING else (height, width)


def _read(
    file: str | os.PathLike | io.BytesIO, name: str, max_pixels: int
) -> UInt8[np.ndarray, "h w 3"]:
    with _open(file, name, max_pixels) as opened:
        if opened.width * opened.height > max_pixels:
            size = f"{opened.width} x {opened.height}"
            raise UserError(f"{name}: expected at most {max_pixels:,} pixels, found {size}")
        try:
            return np.asarray(_upright(_to_rgb(opened), opened))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except Exception as error:  # each decoder raises its own
            raise UserError(f"{name}: expected a whole image, found a broken one") from error


def _open(file: str | os.PathLike | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    """The image, of which the header has been read."""
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of its limit; the one that counts is the caller's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"{name}: expected at most {max_pixels:,} pixels, found more") from None
    except PermissionError:
        raise UserError(f"{name}: expected a readable image file, found no permission") from None
    except Exception as error:  # each decoder raises its own
        raise UserError(
            f"{name}: expected an image file, "
            "found something else than PNG, JPEG, WebP, BMP, GIF or TIFF"
        ) from error


def sam_size(height: int, width: int, frame: int = 1024) -> tuple[int, int]:
    """Height and width after the longest side is scaled to `frame`."""
    scale = frame / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def sam_input(
    image: UInt8[np.ndarray, "h w 3"],
    frame: int = 1024,
    out: UInt8[np.ndarray, "S S 3"] | None = None,
) -> tuple[UInt8[np.ndarray, "S S 3"], tuple[int, int]]:
    """The segmenter's image: longest side to `frame` by Pillow's bilinear filter, top-left in
    zeros.

    Args:
      out: zeros to write it into, such as a row of a batch; by default a new array.

    Returns:
      The frame, and the height and width of its content.
    """
    height, width = sam_size(*image.shape[:2], frame=frame)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    framed = np.zeros((frame, frame, 3), np.uint8) if out is None else out
    framed[:height, :width] = np.asarray(resized)
    return framed, (height, width)


def stretched_input(
    image: UInt8[np.ndarray, "h w 3"], frame: int = 1024, antialias: bool = True
) -> UInt8[np.ndarray, "S S 3"]:
    """The image of a segmenter whose frame both sides fill: bilinear, in 8 bits.

    Reference: hustvl/EVF-SAM at 9935dc5, class `Resize` of `utils/dataset.py`, which is Pillow's
    filter, and `inference.py:65-69`, PyTorch's on uint8.

    Args:
      antialias: as in the original's training and evaluation; without, as in its inference script.
        They are equal where no side shrinks.
    """
    if antialias:
        resized = Image.fromarray(image).resize((frame, frame), Image.Resampling.BILINEAR)
        return np.asarray(resized)
    # As PyTorch does it: columns first, then rows, each in fixed point and rounded to 8 bits.
    lines = _bilinear_8_bit(image.swapaxes(0, 1), frame).swapaxes(0, 1)
    return _bilinear_8_bit(lines, frame)


def encoder_input(
    image: UInt8[np.ndarray, "h w 3"], size: int = 224
) -> Float32[np.ndarray, "size size 3"]:
    """The multimodal encoder's image: to [0, 1], bicubic to size x size, then (x - 0.5) / 0.5.

    Reference: hustvl/EVF-SAM at 9935dc5, `inference.py:73-84`.
    """
    pixels = _to_unit(image) if image.shape[:2] == (size, size) else resize_bicubic(image, size)
    return (pixels - np.float32(0.5)) / np.float32(0.5)


def resize_bicubic(
    pixels: UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"], size: int
) -> Float32[np.ndarray, "size size c"]:
    """torch's `F.interpolate(mode="bicubic", align_corners=False)` without antialias.

    a = -0.75, edges are repeated, and values overshoot. Only the 4 x 4 pixels under each output
    pixel are touched; uint8 is brought to [0, 1] first.
    """
    height, width = pixels.shape[:2]
    rows, row_weights = cubic_taps(height, size)
    columns, column_weights = cubic_taps(width, size)
    # Of an image so tall that most rows go unused, only those needed are resized.
    if height > rows.size:
        pixels, rows = pixels.take(rows.reshape(-1), axis=0), np.arange(rows.size).reshape(-1, 4)
    if pixels.dtype == np.uint8:
        pixels = _to_unit(pixels)
    # Columns first, then rows, one tap after the other: torch's order of rounding.
    lines = _weighted_sum(pixels, columns, column_weights[..., None], axis=1)
    return _weighted_sum(lines, rows, row_weights[..., None, None], axis=0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey (Pillow keeps the upper byte of 16-bit RGB itself)
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError("expected at most 16 bits a pixel, found 32")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError("expected 8 or 16 bits a pixel, found floating point")
    return image.convert("RGB")


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    orientation = _orientation(source)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return None


@functools.lru_cache(maxsize=512)
def cubic_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """The 4 source indices of each target pixel, edges repeated, and their weights: [target, 4].

    Float32 as in torch's `upsample_bicubic2d` (align_corners False, no antialias).
    """
    # The scale is rounded to float32, the position once: torch's compiled code uses a fused
    # multiply-add, and without it a position is off by up to 1e-4 of the result.
    scale = np.float64(np.float32(source) / np.float32(target))
    position = (scale * (np.arange(target) + 0.5) - 0.5).astype(np.float32)
    first = np.floor(position)
    t = position - first
    a, one = _CUBIC_A, np.float32(1)

    def near(x: np.ndarray) -> np.ndarray:  # |x| <= 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # 1 < |x| < 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(t + one), near(t), near(one - t), far(one - t + one)], axis=1)
    indices = first.astype(np.int64)[:, None] + np.arange(-1, 3)
    return np.clip(indices, 0, source - 1), weights.astype(np.float32)


def _bilinear_8_bit(pixels: UInt8[np.ndarray, "s w c"], size: int) -> UInt8[np.ndarray, "t w c"]:
    """The rows of an image brought to `size`, without antialias, in PyTorch's fixed point."""
    if pixels.shape[0] == size:
        return pixels
    scale = pixels.shape[0] / size
    position = np.maximum(scale * (np.arange(size) + 0.5) - 0.5, 0.0)
    first = position.astype(np.int64)
    second = np.minimum(first + 1, pixels.shape[0] - 1)
    weight = (position - first)[:, None, None]
    # As many bits as the largest weight leaves of 16 with a sign.
    largest = max(float(weight.max()), float((1 - weight).max()))
    bits = next(b for b in range(23) if int(0.5 + largest * 2 ** (b + 1)) >= 2**15)
    half, one = 2 ** (bits - 1), 2**bits
    total = np.floor(0.5 + (1 - weight) * one).astype(np.int64) * pixels[first]
    total += np.floor(0.5 + weight * one).astype(np.int64) * pixels[second]
    return np.clip((total + half) >> bits, 0, 255).astype(np.uint8)


def _to_unit(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / np.float32(255)


def _weighted_sum(
    pixels: np.ndarray, taps: np.ndarray, weights: np.ndarray, axis: int
) -> np.ndarray:
    """The sum of the pixels at 4 `taps` along an axis, each times `weights[:, tap]`."""
    total = pixels.take(taps[:, 0], axis=axis) * weights[:, 0]
    for tap in (1, 2, 3):
        total += pixels.take(taps[:, tap], axis=axis) * weights[:, tap]
    return total
