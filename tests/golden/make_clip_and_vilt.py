"""Stores what transformers' CLIP and ViLT compute, their images included, for the other tests.

bash tests/install_parity.sh && python -m tests.golden.make_clip_and_vilt
"""

from pathlib import Path

import numpy as np

from tests.parity import clip_cases, encoder_image_cases, vilt_cases

FOLDER = Path(__file__).parent


def main() -> None:
    outputs = {
        f"clip_{name}": clip_cases.original_outputs(config)
        for name, config in clip_cases.CONFIGS.items()
    } | {
        f"vilt_{name}": vilt_cases.original_outputs(vilt_cases.SMALL, sizes)
        for name, sizes in vilt_cases.SIZES.items()
    }
    step = encoder_image_cases.STEP
    outputs["encoder_images"] = {
        name: image[::step, ::step]
        for name, image in encoder_image_cases.original_outputs().items()
    }
    for name, arrays in outputs.items():
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
