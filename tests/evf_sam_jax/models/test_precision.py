"""What is float32 is multiplied in float32 on every device, also in a bfloat16 model."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.clip import ClipConfig
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.interfaces import ImageFeatures, Prompts
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.models.vilt import ViltConfig

EXACT = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def products(jaxpr: Any) -> Iterator[Any]:
    """Every matrix product and convolution, those inside loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def forward(config: EvfSamConfig) -> Any:
    """The jaxpr of the whole model."""
    params = evf_sam.param_shapes(config)
    side, low = config.segmenter.image_size, config.segmenter.low_res_size

    def whole(params, image, size, encoder_image, ids, valid, mask):
        features: ImageFeatures = evf_sam.encode_image(config, params, image, size)
        text = evf_sam.encode_phrases(config, params, encoder_image, ids, valid)
        boxes, mask = jnp.zeros((1, 2, 4)), mask if config.segmenter.mask_prompts else None
        return evf_sam.decode(config, params, features, Prompts(text=text, boxes=boxes, mask=mask))

    array = jax.ShapeDtypeStruct
    encoder_side = config.encoder.image_size
    with jax.default_matmul_precision("default"):  # what a user has
        return jax.make_jaxpr(whole)(
            params,
            array((1, side, side, 3), jnp.uint8),
            array((1, 2), jnp.int32),
            array((1, encoder_side, encoder_side, 3), jnp.float32),
            array((1, 2, 5), jnp.int32),
            array((1, 2, 5), jnp.bool_),
            array((1, 2, low, low), jnp.float32),
        ).jaxpr


@pytest.mark.parametrize(
    "tower",
    [
        {"encoder": Beit3Config.tiny(), "segmenter": SamConfig.tiny()},
        {"encoder": ClipConfig.tiny()},
        {"encoder": ViltConfig.tiny()},
        {"segmenter": Sam2Config.tiny()},
        {"segmenter": EfficientSamConfig.tiny()},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_operands_are_multiplied_exactly(dtype: str, tower: dict[str, Any]):
    found = {jnp.float32: 0, jnp.bfloat16: 0}
    config = dataclasses.replace(EvfSamConfig.tiny(), **tower)
    for equation in products(forward(evf_sam.with_dtype(config, dtype))):
        operands = {variable.aval.dtype for variable in equation.invars}
        assert len(operands) == 1, equation
        if operands == {jnp.dtype(jnp.float32)}:
            assert equation.params["precision"] == EXACT, equation
            found[jnp.float32] += 1
        else:
            found[jnp.bfloat16] += 1
    # The neck and the decoder are float32 in both; the towers follow the dtype.
    assert found[jnp.float32] > 20
    assert (found[jnp.bfloat16] > 20) == (dtype == "bfloat16")
