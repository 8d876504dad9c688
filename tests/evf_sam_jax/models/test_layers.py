"""Products of tokens with a kernel are the same however the tokens are laid out for a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from evf_sam_jax.models.layers import PatchTranspose, dense
from evf_sam_jax.models.target import Target, compiled_for

RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(2, 5, 8)).astype(np.float32)
GRID = RNG.normal(size=(2, 3, 4, 8)).astype(np.float32)
CASES = {
    "tokens": (dense("dense", 6, "float32"), TOKENS),
    "grid": (dense("dense", 6, "float32"), GRID),
    "upscaled": (PatchTranspose(6, "float32"), GRID),
}


def traced_for(backend: str, case: str):
    """The gradient of a layer's kernel and inputs, traced for a device: its jaxpr and its value."""
    layer, x = CASES[case][0], jnp.asarray(CASES[case][1])
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.sin(layer.apply(params, x)).sum()

    with compiled_for(Target(backend)):
        found = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x)
    return found.jaxpr, jaxpr_as_fun(found)(*jax.tree.leaves((params, x)))


def contracted(jaxpr) -> list[int]:
    """How many axes each product sums over."""
    return [
        len(equation.params["dimension_numbers"][0][0])
        for equation in jaxpr.eqns
        if equation.primitive.name == "dot_general"
    ]


@pytest.mark.parametrize("case", CASES)
def test_devices_agree_on_values_and_gradients(case: str):
    on_cpu, values = traced_for("cpu", case)
    on_tpu, expected = traced_for("tpu", case)
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-5)
    # Of a kernel's gradient, one axis of rows on CPUs; TPUs keep tokens where they are.
    assert contracted(on_cpu) == [1, 1, 1]
    assert sorted(contracted(on_tpu)) == [1, 1, CASES[case][1].ndim - 1]
