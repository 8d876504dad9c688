"""Writes image_torch.npz: what torch's bicubic and 8-bit bilinear filters give for odd sizes.

pip install torch numpy
python tests/golden/make_image_input.py
"""

import pathlib

import numpy as np
import torch

GOLDEN = pathlib.Path(__file__).parent

# Height, width, target: shrunk, enlarged, mixed, one pixel wide, prime, larger than any frame.
CASES = (
    (427, 640, 224),
    (640, 480, 224),
    (50, 60, 224),
    (97, 331, 224),
    (1, 1, 224),
    (1, 700, 64),
    (300, 2, 64),
    (1080, 1920, 224),
    (13, 7, 5),
)


def noise(height: int, width: int) -> np.ndarray:
    """An image whose neighbouring pixels have nothing in common: the hardest for a filter."""
    rng = np.random.Generator(np.random.Philox(key=np.array([height, width], np.uint64)))
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def torch_encoder_input(image: np.ndarray, size: int) -> np.ndarray:
    """The three steps of inference.py:73-84, [size, size, 3]."""
    tensor = torch.from_numpy(image).permute(2, 0, 1).float().div(255)[None]
    if image.shape[:2] != (size, size):
        tensor = torch.nn.functional.interpolate(
            tensor, (size, size), mode="bicubic", align_corners=False, antialias=False
        )
    return tensor.sub(0.5).div(0.5)[0].permute(1, 2, 0).numpy()


def torch_stretched(image: np.ndarray, size: int) -> np.ndarray:
    """inference.py:65-69 on uint8, [size, size, 3]."""
    tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()[None]
    stretched = torch.nn.functional.interpolate(
        tensor, (size, size), mode="bilinear", align_corners=False
    )
    return stretched[0].permute(1, 2, 0).numpy()


def main() -> None:
    arrays = {}
    for height, width, size in CASES:
        step = max(1, size // 16)
        full = torch_encoder_input(noise(height, width), size)
        arrays[f"bicubic_{height}_{width}_{size}"] = full[::step, ::step]
        full = torch_stretched(noise(height, width), size)
        arrays[f"stretched_{height}_{width}_{size}"] = full[::step, ::step]
    np.savez_compressed(GOLDEN / "image_torch.npz", **arrays)


if __name__ == "__main__":
    main()
