"""The same weights for an original module and for ours: drawn by name, carried by the converter."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.checkpoint_files import SourceTensor
from convert.table import Table, build_leaf, make_plan
from convert.to_model_dir import leaf_shapes
from evf_sam_jax import model_dir
from tests.golden_checkpoint import make_weight


def fill(module: Any) -> None:
    """Gives a torch module the weights that follow from its names."""
    import torch

    state = {
        name: torch.from_numpy(np.asarray(make_weight(name, tuple(tensor.shape))))
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, strict=True)
    module.eval()


def our_params(table: Table, section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns our parameters with the weights that follow from the original's names.

    Args:
      table: the conversion of the family.
      section: the configuration, as a manifest has it.
      prefix: what the table's names have before the module's own.
    """
    plan = make_plan(table, leaf_shapes(dict(section)))
    tensors = {
        name: SourceTensor(
            shape,
            np.dtype(np.float32),
            lambda name=name, shape=shape: np.asarray(
                make_weight(name.removeprefix(prefix), shape)
            ),
        )
        for name, shape in plan.source_shapes().items()
    }
    return model_dir.nest({path: build_leaf(plan, path, tensors) for path in plan.shapes})
