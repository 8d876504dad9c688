"""Floating point operations of a function, counted before it runs, and how many a device can do."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.target import Target, compiled_for
from evf_sam_jax.param_rules import Params

# Dense products in bfloat16 with float32 sums, in operations a second of one JAX device, by the
# `device_kind` that it must match whole. Datasheets that give the rate with sparsity are halved.
# A part of a card (MIG) has a kind of its own and is not here. V100 has no bfloat16: float16.
PEAK_FLOPS = (
    # nvidia.com/h100 datasheet: 1979e12 (SXM), 1513e12 (PCIe) with sparsity
    (r"NVIDIA H100 \d+GB HBM\w+", 989e12),
    (r"NVIDIA H100 PCIe", 756e12),
    # nvidia.com/h200 datasheet: 1979e12 (SXM) with sparsity
    (r"NVIDIA H200", 989e12),
    # nvidia.com/a100 datasheet: 312e12 for each form and memory
    (r"NVIDIA A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe", 312e12),
    # nvidia.com/l40s datasheet: 362.05e12, 733e12 with sparsity
    (r"NVIDIA L40S", 362e12),
    # nvidia.com/v100 datasheet: 125e12 (SXM2)
    (r"Tesla V100-SXM\d-\d+GB(-\w+)?", 125e12),
    # docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: "Peak compute per chip (bf16)". From v4 on
    # a chip is one JAX device.
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5|TPU v5p", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
)


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the operations of all matrix products and convolutions of `function(*args)`.

    A product of m x k by k x n is 2 m n k of them. Nothing is computed: the function is traced, and
    its equations are counted as they are written, before a compiler removes or merges any. On
    several devices it is their sum.

    Of a convolution, products with padding, and with the zeros that a dilated input is filled up
    with, do not count: so each of its two gradients costs what it costs itself.

    A `scan` counts as often as it is long. Of a `cond` the most expensive branch counts. A
    `while_loop` counts as one pass, since how many there are is unknown before it runs.

    It is traced as for a CPU, whatever the devices: cuDNN's kernels are opaque to JAX and would
    count nothing, and what is folded or padded for a kernel is not the model's.

    Args:
      args: trees of arrays or of `jax.ShapeDtypeStruct`.
    """
    with compiled_for(Target("cpu", fused=False)):
        return _jaxpr_flops(jax.make_jaxpr(function)(*args))


def step_flops(
    loss: Callable[..., Any],
    trainable: Params,
    frozen: Params,
    *inputs: Any,
    has_aux: bool = False,
) -> int:
    """Returns the operations of one training step, as `count_flops` counts them.

    These are the forward pass of `loss(trainable, frozen, *inputs)` and its gradient with respect
    to `trainable`: frozen parameters have no gradients, and what comes before all that is trainable
    has no backward pass. For the *model's* FLOPs, by which a step's utilisation is measured, the
    loss must not recompute: see `without_remat`.

    Args:
      trainable: like `frozen` and `inputs`, a tree of arrays or of `jax.ShapeDtypeStruct`.
      inputs: the batch of all devices, and what else the loss takes.
      has_aux: the loss returns a pair, whose first is the loss.
    """
    return count_flops(jax.value_and_grad(loss, has_aux=has_aux), trainable, frozen, *inputs)


def without_remat(config: EvfSamConfig) -> EvfSamConfig:
    """Returns `config` with nothing recomputed in the backward pass: the same numbers."""
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, remat=False),
        segmenter=dataclasses.replace(config.segmenter, remat=False),
    )


def peak_flops(kind: str) -> float | None:
    """Returns the dense bfloat16 operations a second of a `device_kind`; None where unknown."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.fullmatch(pattern, kind)), None)


def _jaxpr_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: JaxprEqn) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    inner = [_jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(equation)]
    # Of a `cond` one branch runs; of anything else, all that there is.
    return max(inner) if name == "cond" else sum(inner) * _repeats(equation)


def _inner_jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yields the jaxprs among the equation's parameters, and in tuples of them."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                yield item


def _repeats(equation: JaxprEqn) -> int:
    """How many times the equation's inner jaxprs run."""
    params = equation.params
    match equation.primitive.name:
        case "scan":
            return params["length"]
        case "shard_map":
            # Over the mesh's other axes the shapes inside are still those of the whole.
            return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _dot_flops(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(shape[i] for i in contracted)


def _convolution_flops(equation: JaxprEqn) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    lhs, rhs = (_shape(variable) for variable in equation.invars)
    out = _shape(equation.outvars[0])
    # The kernel's input channels are already those of one group.
    products = out[numbers.out_spec[0]] * math.prod(rhs[i] for i in numbers.rhs_spec[:2])
    windows = zip(
        numbers.lhs_spec[2:],
        numbers.rhs_spec[2:],
        numbers.out_spec[2:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    for i, j, k, stride, (low, _), lhs_dilation, rhs_dilation in windows:
        # Where in the dilated input each element of the kernel falls, for each output.
        place = np.add.outer(np.arange(out[k]) * stride, np.arange(rhs[j]) * rhs_dilation) - low
        source, filled = np.divmod(place, lhs_dilation)
        products *= int(((source >= 0) & (source < lhs[i]) & (filled == 0)).sum())
    return 2 * products


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
