"""Writes mask_geometry_torch.npz: what the original's chain of two resizes gives, thinned out.

pip install torch numpy
python -m tests.golden.make_mask_geometry
"""

import pathlib

import numpy as np

from tests.parity import mask_geometry_cases as cases


def main() -> None:
    arrays = {}
    for height, width in cases.SIZES:
        rows, columns = cases.steps(height, width)
        full = cases.original(cases.logits(height, width), height, width)
        arrays[f"{height}_{width}"] = full[:, rows, columns]
        full = cases.original_stretched(cases.logits(height, width), height, width)
        arrays[f"stretched_{height}_{width}"] = full[:, rows, columns]
    file = pathlib.Path(__file__).parent / "mask_geometry_torch.npz"
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    main()
