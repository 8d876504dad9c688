#!/usr/bin/env bash
# Installs the PyTorch originals that `pytest -m torch` compares with, into the Python that
# $PYTHON names (default: python). About 1 GB; on Linux the package index may serve only the CUDA
# build of torch, which is larger and works as well.
set -euo pipefail
python="${PYTHON:-python}"

# An installed 2.13.0 of any build (CPU, CUDA) satisfies this line and is left as it is.
"$python" -m pip install "torch==2.13.0"

# --no-deps: their dependencies (torchvision, timm 0.4.12, fairscale 0.4.0) would replace torch or
# no longer build; tests/parity/originals.py stands in for the few functions they use.
"$python" -m pip install --no-deps "segment-anything==1.0"
"$python" -m pip install --no-deps "torchscale==0.2.0"
# sam2 comes as source, whose setup.py imports torch; its CUDA kernels are of no use here.
"$python" -m pip install "setuptools>=77"
SAM2_BUILD_CUDA=0 "$python" -m pip install --no-deps --no-build-isolation "sam2==1.1.0"
# CLIP and ViLT, with their tokenizers and images; it works without torchvision.
"$python" -m pip install "transformers==5.24.0"

cd "$(dirname "$0")/.."
"$python" -c "
from tests.parity import originals
originals.segment_anything()
originals.torchscale_beit3()
originals.sam2()
from transformers import CLIPModel, ViltModel
print('the originals import: pytest -m torch can run')
"
