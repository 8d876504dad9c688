"""Stores what the PyTorch originals compute, for the tests that run without torch.

bash tests/install_parity.sh && python -m tests.golden.make_model_outputs
"""

from pathlib import Path

import numpy as np

from tests.parity import (
    beit3_cases,
    clip_cases,
    encoder_image_cases,
    sam2_cases,
    sam_cases,
    vilt_cases,
)

FOLDER = Path(__file__).parent


def thinned(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keeps every third row and column of the masks and of features at a high resolution."""
    return {
        name: value[..., ::3, ::3]
        if name.endswith("logits")
        else value[::3, ::3]
        if name.startswith("high_res")
        else value
        for name, value in outputs.items()
    }


def main() -> None:
    outputs = (
        {
            f"sam_{name}": sam_cases.original_outputs(config, sam_cases.stored_combinations(name))
            for name, config in sam_cases.CONFIGS.items()
        }
        | {f"sam2_{name}": sam2_cases.original_outputs(name) for name in sam2_cases.CONFIGS}
        | {
            f"beit3_{name}": beit3_cases.original_outputs(config)
            for name, config in beit3_cases.CONFIGS.items()
        }
        | {
            f"clip_{name}": clip_cases.original_outputs(config)
            for name, config in clip_cases.CONFIGS.items()
        }
        | {
            f"vilt_{name}": vilt_cases.original_outputs(vilt_cases.SMALL, sizes)
            for name, sizes in vilt_cases.SIZES.items()
        }
        | {"encoder_images": encoder_image_cases.stored_outputs()}
    )
    for name, arrays in outputs.items():
        np.savez_compressed(FOLDER / f"{name}.npz", **thinned(arrays))


if __name__ == "__main__":
    main()
