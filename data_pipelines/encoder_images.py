"""An image as CLIP and ViLT take it: resized by Pillow's bicubic filter, and normalised.

Reference: openai/CLIP at dcba3cb, `clip/clip.py` (`_transform`); dandelin/ViLT,
`vilt/transforms/pixelbert.py` and `utils.py`; transformers 5.24's image processors of both;
mlfoundations/open_clip at 0134a45, `pretrained.py`, for what the weights of OpenCLIP are given.

Of each there are two ways. The first makes a square of the whole image, whatever its sides, as
EVF-SAM does with BEiT-3's image: what a phrase means can be at an edge. The second is the
encoder's own.

Differences: a side that ViLT's rounding would leave without a patch keeps one (the original fails
there); a centre crop is cut out before it is resized, with the same weights for each pixel, so that
a panorama is never enlarged as a whole.
"""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VILT_MEAN = VILT_STD = (0.5, 0.5, 0.5)
# Mean and deviation by the names that `ClipConfig.normalisation` knows.
CLIP_NORMALISATIONS = {
    "openai": (CLIP_MEAN, CLIP_STD),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

CROP_LONGEST = 16

VILT_PATCH = 32
# The longer side is at most this many times what the shorter side is scaled to.
VILT_LONGER = 1333 / 800


def clip_input(
    image: UInt8[np.ndarray, "h w 3"], size: int = 224, normalisation: str = "openai"
) -> Float32[np.ndarray, "size size 3"]:
    """CLIP's image, the whole of it stretched to a square."""
    return _normalize(_resize(image, size, size), *CLIP_NORMALISATIONS[normalisation])


def clip_crop_input(
    image: UInt8[np.ndarray, "h w 3"], size: int = 224, normalisation: str = "openai"
) -> Float32[np.ndarray, "size size 3"]:
    """CLIP's own: the shorter side becomes `size`, and of the longer one the middle is taken."""
    shorter = min(image.shape[:2])
    height, width = (min(side, CROP_LONGEST * shorter) for side in image.shape[:2])
    image = _middle(image, height, width)
    resized = _resize(image, int(size * height / shorter), int(size * width / shorter))
    return _normalize(_middle(resized, size, size), *CLIP_NORMALISATIONS[normalisation])


def vilt_input(
    image: UInt8[np.ndarray, "h w 3"], size: int = 384
) -> Float32[np.ndarray, "size size 3"]:
    """ViLT's image, the whole of it stretched to a square."""
    return _normalize(_resize(image, size, size), VILT_MEAN, VILT_STD)


def vilt_pad_input(
    image: UInt8[np.ndarray, "h w 3"], size: int = 384
) -> Float32[np.ndarray, "canvas canvas 4"]:
    """ViLT's own: the shorter side is scaled to `size`, both are whole patches; then padded.

    Returns:
      The image at the top left of a square that holds every image, zero elsewhere; the fourth
      channel is 1 inside.
    """
    height, width = vilt_size(image.shape[0], image.shape[1], size)
    canvas = _longest(size) // VILT_PATCH * VILT_PATCH
    padded = np.zeros((canvas, canvas, 4), np.float32)
    resized = _resize(image, height, width)
    padded[:height, :width, :3] = _normalize(resized, VILT_MEAN, VILT_STD)
    padded[:height, :width, 3] = 1
    return padded


def vilt_size(height: int, width: int, shorter: int = 384) -> tuple[int, int]:
    """Height and width that ViLT gives an image, in whole patches."""
    scale = shorter / min(height, width)
    sides = (shorter, scale * width) if height < width else (scale * height, shorter)
    if max(sides) > _longest(shorter):
        scale = _longest(shorter) / max(sides)
        sides = (scale * sides[0], scale * sides[1])
    down, across = (max(1, int(side + 0.5) // VILT_PATCH) * VILT_PATCH for side in sides)
    return down, across


def _longest(shorter: int) -> int:
    return int(VILT_LONGER * shorter)


def _middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre, where torchvision's `center_crop` has it: halves are rounded to even."""
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """By Pillow's bicubic filter, which shrinks without aliasing."""
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def _normalize(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    pixels = image.astype(np.float32) / np.float32(255)
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
