"""Measures a model on splits of data sets.

    python -m evf_sam_jax.main --mode evaluate --workdir runs/shapes_val \\
        --config configs/evaluate.py:model=runs/shapes/model,split=shapes/val
    python -m evf_sam_jax.main --mode evaluate --workdir runs/paper \\
        --config configs/evaluate.py:model=MODEL_DIR,data=DATA_DIR,split=paper,dtype=bfloat16

`model` is a model directory, or the directory of a training run, of which `checkpoint` is taken.
`split` names sets with "+" between them, such as refcoco/val+refcoco+/testA; "paper" stands for the
eight splits of the paper's Table 2. evf_sam_jax/evaluation/config.py explains all arguments.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.arguments import parse_arguments
from evf_sam_jax.evaluation.config import EvaluationJob


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the evaluation."""
    expected = {
        field.name: field.default
        for field in dataclasses.fields(EvaluationJob)
        if field.default is not dataclasses.MISSING
    }
    expected = {"model": "", **expected, "split": "shapes/val"}
    return ConfigDict(parse_arguments(argument, **expected))
