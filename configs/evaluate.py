"""Measures a model directory on a data set.

    python -m evf_sam_jax.main --mode evaluate --workdir runs/shapes_val \\
        --config configs/evaluate.py:model=runs/shapes/model,split=shapes/val
"""

from ml_collections import ConfigDict

from configs.arguments import parse_arguments


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the evaluation."""
    values = parse_arguments(argument, model="", split="shapes/val", images=2000, batch_size=16)
    return ConfigDict({**values, "text_length": 16})
