"""A model whose matrix products are of 8-bit integers, for prediction; by the library qwix.

Linear layers of both towers and of the projector have kernels of int8 with a scale for each output
channel; optionally what they multiply is rounded to int8 too, with a scale for each token.
All else, attention's own products included, stays in the model's dtype.
"""

import dataclasses
import importlib.util
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evf_sam_jax.errors import UserError
from evf_sam_jax.models.evf_sam import EvfSam, EvfSamConfig, Params

CHOICES = ("weights", "weights_and_activations")

# The modules of `evf_sam.MATRICES`.
_MODULES = r"(encoder|projector|segmenter/image_encoder/(?!neck/)).*"
# What is called on the module.
_METHODS = ("encode_image", "encode_phrases", "decode", "finish_features", "touch_all_parameters")


@dataclasses.dataclass(frozen=True)
class QuantizedConfig(EvfSamConfig):
    """A config of quantised parameters, as `quantize` makes both.

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


def quantize(config: EvfSamConfig, params: Params, int8: str) -> tuple[QuantizedConfig, Params]:
    """Returns the config and parameters of the same model with kernels of int8.

    Args:
      params: of the whole model, or of some modules of it.
      int8: one of `CHOICES`.

    Raises:
      UserError: it is none of them, or qwix is not installed.
    """
    check_choice(int8)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    quantized = QuantizedConfig(**values, int8=int8)
    module = quantized.module()
    shapes: Any = jax.eval_shape(
        lambda rng: module.init(rng, method="touch_all_parameters"), jax.random.key(0)
    )
    dtypes = {"segmenter": config.segmenter.dtype}
    return quantized, {
        name: _quantized(
            params[name], shapes["params"][name], dtypes.get(name, config.encoder.dtype)
        )
        for name in params
    }


def _quantized(params: Any, shapes: Any, dtype: str) -> Any:
    """A tree whose kernels are what qwix keeps in their place; products with them have `dtype`."""
    import qwix

    if isinstance(params, dict):
        return {name: _quantized(params[name], shapes[name], dtype) for name in params}
    if isinstance(shapes, jax.ShapeDtypeStruct):
        return params
    # qwix.quantize_params takes the layers of a scan for channels.
    channels = tuple(axis for axis in range(params.ndim) if axis != params.ndim - 2)
    return shapes.replace(
        array=qwix.quantize(params, jnp.int8, channelwise_axes=channels, scale_dtype=dtype)
    )


def check_choice(int8: str) -> None:
    """Raises UserError where `quantize` would."""
    if int8 not in CHOICES:
        raise UserError(f"int8: expected {' or '.join(CHOICES)}, found {int8!r}")
    if importlib.util.find_spec("qwix") is None:
        raise UserError('int8: expected qwix, found none: pip install ".[int8]"')
