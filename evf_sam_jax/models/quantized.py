"""A model whose matrix products are of 8-bit integers, for prediction; by the library qwix.

Linear layers of both towers and of the projector have kernels of int8 with a scale for each output
channel; optionally what they multiply is rounded to int8 too, with a scale for each token.
All else, attention's own products included, stays in the model's dtype; so do the queries', keys'
and values' kernels of CLIP and ViLT, which are one product of three.
"""

import dataclasses
import functools
import importlib.util
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from evf_sam_jax.errors import UserError
from evf_sam_jax.models.evf_sam import EvfSam, EvfSamConfig, Params

CHOICES = ("weights", "weights_and_activations")

# The modules of `evf_sam.MATRICES`.
_MODULES = r"(encoder|projector|segmenter/image_encoder/(?!neck/)).*"
# What is called on the module.
_METHODS = ("encode_image", "encode_phrases", "decode", "finish_features", "touch_all_parameters")


@dataclasses.dataclass(frozen=True)
class QuantizedConfig(EvfSamConfig):
    """A config of quantised parameters, as `quantizer` makes both.

    Attributes:
      int8: one of `CHOICES`.
    """

    int8: str = "weights"

    def module(self) -> nn.Module:
        import qwix

        rule = qwix.QuantizationRule(
            module_path=_MODULES,
            op_names=("dot_general",),  # as linear layers call it; attention calls einsum
            weight_qtype=jnp.int8,
            act_qtype=jnp.int8 if self.int8 == "weights_and_activations" else None,
        )
        provider = qwix.PtqProvider([rule])
        return qwix.quantize_model(EvfSam(self), provider, methods=_METHODS)

    def in_floats(self, params: Params) -> Params:
        import qwix

        def is_kernel(leaf: Any) -> bool:
            return isinstance(getattr(leaf, "array", None), qwix.QArray)

        return jax.tree.map(
            lambda leaf: qwix.dequantize(leaf.array) if is_kernel(leaf) else leaf,
            params,
            is_leaf=is_kernel,
        )


def quantizer(
    config: EvfSamConfig, int8: str
) -> tuple[QuantizedConfig, Callable[[str, Array], Any]]:
    """Returns the config of the same model with kernels of int8, and what makes them.

    That is a function of a parameter's '/'-path and array, so that a model can be read leaf by leaf
    and is never there as a whole in floats; what it returns takes the array's place.

    Args:
      int8: one of `CHOICES`.

    Raises:
      UserError: it is none of them, or qwix is not installed.
    """
    check_choice(int8)
    import qwix

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    quantized = QuantizedConfig(**values, int8=int8)
    module = quantized.module()
    shapes: Any = jax.eval_shape(
        lambda rng: module.init(rng, method="touch_all_parameters"), jax.random.key(0)
    )

    def quantize(path: str, leaf: Array) -> Any:
        kept = functools.reduce(operator.getitem, path.split("/"), shapes["params"])
        if isinstance(kept, jax.ShapeDtypeStruct):
            return leaf
        # qwix.quantize_params takes the layers of a scan for channels.
        channels = tuple(axis for axis in range(leaf.ndim) if axis != leaf.ndim - 2)
        tower = config.segmenter if path.startswith("segmenter/") else config.encoder
        return kept.replace(  # products with it have the dtype of its scales
            array=qwix.quantize(leaf, jnp.int8, channelwise_axes=channels, scale_dtype=tower.dtype)
        )

    return quantized, quantize


def check_choice(int8: str) -> None:
    """Raises UserError where `quantizer` would."""
    if int8 not in CHOICES:
        raise UserError(f"int8: expected {' or '.join(CHOICES)}, found {int8!r}")
    if importlib.util.find_spec("qwix") is None:
        raise UserError('int8: expected qwix, found none: pip install ".[int8]"')
