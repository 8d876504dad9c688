"""Checkpoints whose weights follow from their names, for comparing with stored outputs.

The files in `tests/golden/` hold what the PyTorch original computes with these weights: a parameter
is drawn from its name and shape alone, so a manifest (name -> shape) rebuilds the checkpoint.
"""

import json
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

EVF_SAM = Path(__file__).parent / "golden" / "evf_sam"
EVF_EFFISAM = Path(__file__).parent / "golden" / "evf_effisam"


def make_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns the float32 array of a parameter; activations stay of order one in every block."""
    rng = np.random.Generator(np.random.Philox(key=[zlib.crc32(name.encode()), seed]))
    noise = rng.standard_normal(size=shape, dtype=np.float32)
    if len(shape) == 1 and name.endswith("weight"):  # the scale of a norm
        return 1.0 + 0.1 * noise
    if "gaussian_matrix" in name:
        return noise
    small = ("pos_embed", "rel_pos")
    small_ends = ("cls_token", "mask_token", "no_mem_embed", "no_mem_pos_enc")
    embedding = "embed" in name and len(shape) == 2 and "fc" not in name
    if any(part in name for part in small) or name.endswith(small_ends) or embedding:
        return 0.2 * noise
    if len(shape) < 2:
        return 0.2 * noise
    return noise / np.float32(np.sqrt(math.prod(shape[1:])))


def write_evf_sam(directory: Path) -> None:
    """Writes `model.safetensors` (5.3 GB) and `config.json` of EVF-SAM."""
    scales = {"hidden_size": 1024, "sam_scale": "huge", "mm_extractor_scale": "large"}
    write_checkpoint(directory, EVF_SAM / "evf_sam.manifest.json", "EvfSamModel", scales)


def write_checkpoint(
    directory: Path, manifest: Path, architecture: str, scales: Mapping[str, Any]
) -> None:
    """Writes `model.safetensors`, tensor by tensor, and `config.json` of a whole model.

    Args:
      manifest: name -> shape.
      architecture: of config.json.
      scales: what else config.json says of the model's size.
    """
    shapes = json.loads(manifest.read_text())
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            make_weight(name, tuple(shape)).astype("<f4").tofile(file)
    config = {
        "architectures": [architecture],
        "model_type": "evf",
        "out_dim": 256,
        "torch_dtype": "float32",
        **scales,
    }
    (directory / "config.json").write_text(json.dumps(config))
