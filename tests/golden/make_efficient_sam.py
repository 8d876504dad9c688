"""Stores what the original EfficientSAM computes, for the tests that run without torch.

It is on GitHub only, so apart from the others that `make_model_outputs.py` asks:

pip install --no-deps git+https://github.com/yformer/EfficientSAM@d525f62
python -m tests.golden.make_efficient_sam
"""

from pathlib import Path

import numpy as np

from tests.golden.make_model_outputs import thinned
from tests.parity import efficient_sam_cases

FILE = Path(__file__).parent / "efficient_sam_tiny.npz"


def main() -> None:
    outputs = efficient_sam_cases.original_outputs(efficient_sam_cases.CONFIG)
    np.savez_compressed(FILE, **thinned(outputs))


if __name__ == "__main__":
    main()
