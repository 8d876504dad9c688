"""Folded positions and the kernels compute what the reference block of the original computes."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from evf_sam_jax.errors import UserError
from evf_sam_jax.models import attention, fused_attention
from evf_sam_jax.models.attention import method_of
from evf_sam_jax.models.target import Target, compiled_for, current_target, target_of

ROWS, SIDE, WIDTH = 2, 16, 20
TOKENS = SIDE * SIDE
SCALE = WIDTH**-0.5
VIT_H = (1, 64, 80)  # one head of a whole frame

KERNELS = {
    # cuDNN's place is taken by XLA, which jax calls with the same arguments.
    "cudnn": (functools.partial(fused_attention.cudnn, implementation="xla"), 8),
    "flash": (fused_attention.flash, 128),
}


@pytest.fixture(autouse=True)
def interpreter():
    """In which a kernel for TPUs runs, its backward pass too."""
    with pltpu.force_tpu_interpret_mode():
        yield


def operands(
    biased: bool, dtype: str = "float32", size: tuple[int, int, int] = (ROWS, SIDE, WIDTH)
) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    rows, side, width = size
    shapes = 3 * [(rows, side**2, width)] + 2 * biased * [(rows, side**2, side)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def reference(query, key, value, *biases) -> jax.Array:
    """`Attention.forward` and `add_decomposed_rel_pos` of the original: scores are kept whole."""
    scores = jnp.einsum("nqd,nkd->nqk", query * query.shape[-1] ** -0.5, key)
    if biases:
        h, w = biases
        square = scores.reshape(*h.shape[:2], h.shape[-1], w.shape[-1])
        scores = (square + h[..., :, None] + w[..., None, :]).reshape(scores.shape)
    return jnp.einsum("nqk,nkd->nqd", jax.nn.softmax(scores, axis=-1), value)


def fused(name: str, *arrays) -> jax.Array:
    kernel, multiple = KERNELS[name]
    scale = arrays[0].shape[-1] ** -0.5
    return fused_attention.attend_fused(kernel, *arrays, scale=scale, multiple=multiple)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [(ROWS, SIDE, WIDTH), VIT_H], ids=["small", "ViT-H"])
def test_kernels_are_the_reference_block(name: str, biased: bool, size: tuple[int, int, int]):
    arrays = operands(biased, size=size)
    np.testing.assert_allclose(fused(name, *arrays), reference(*arrays), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_their_gradients_are_the_reference_block_s(name: str):
    arrays = operands(biased=True)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, TOKENS, WIDTH)), "float32")

    def gradients(attend) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *given: (weights * attend(*given)).sum(), argnums=range(5))(*arrays)

    for found, expected in zip(
        gradients(functools.partial(fused, name)), gradients(reference), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_is_as_near_as_tiles_are(name: str):
    arrays = operands(biased=True, dtype="bfloat16")
    exact = reference(*(x.astype(jnp.float32) for x in arrays))
    tiles = attention.attend_square(*arrays, scale=SCALE)
    errors = [jnp.abs(x.astype(jnp.float32) - exact).max() for x in (fused(name, *arrays), tiles)]
    assert errors[0] < 1.5 * errors[1]


def test_a_block_of_a_tpu_takes_the_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "FUSED_TOKENS", TOKENS)
    arrays = operands(biased=True, dtype="bfloat16")
    attend = functools.partial(attention.attend_square, scale=SCALE)

    def kernels(target: Target) -> int:
        with compiled_for(target):
            return str(jax.make_jaxpr(lambda *given: attend(*given))(*arrays)).count("pallas_call")

    assert kernels(Target("tpu")) == 1
    assert kernels(Target("tpu", fused=False)) == kernels(Target("cpu")) == 0
    monkeypatch.setenv(attention.VARIABLE, "xla")
    assert kernels(Target("tpu")) == 0
    monkeypatch.setenv(attention.VARIABLE, "cudnn")
    with pytest.raises(UserError) as error:
        kernels(Target("tpu"))
    assert str(error.value) == (
        "environment variable EVF_SAM_ATTENTION: expected xla or nothing, found 'cudnn'"
    )


HOPPER, AMPERE = Target("gpu", capability=9.0), Target("gpu", capability=8.0)


@pytest.mark.parametrize(
    ("target", "dtype", "tokens", "width", "side", "method"),
    [
        (HOPPER, "bfloat16", 4096, 80, 64, "cudnn"),  # ViT-H's whole frames
        (HOPPER, "bfloat16", 4096, 64, 0, "cudnn"),  # EfficientSAM
        (HOPPER, "bfloat16", 196, 80, 14, "tiles"),  # ViT-H's windows
        (HOPPER, "float32", 4096, 80, 64, "tiles"),
        (HOPPER, "bfloat16", 4096, 136, 64, "tiles"),  # 264 wide
        (AMPERE, "bfloat16", 4096, 80, 64, "tiles"),
        (AMPERE, "bfloat16", 4096, 64, 0, "cudnn"),
        (Target("gpu", capability=7.5), "bfloat16", 4096, 64, 0, "tiles"),
        (Target("gpu"), "bfloat16", 4096, 64, 0, "tiles"),  # AMD's
        (Target("tpu"), "bfloat16", 4096, 80, 64, "flash"),
        (Target("tpu"), "bfloat16", 4096, 144, 64, "tiles"),  # 272 wide
        (Target("tpu"), "bfloat16", 2500, 80, 50, "tiles"),  # no block of lanes divides them
        (Target("tpu"), "float32", 4096, 80, 64, "tiles"),
        (Target("cpu"), "bfloat16", 4096, 80, 64, "tiles"),
    ],
)
def test_the_table_says_which(
    target: Target, dtype: str, tokens: int, width: int, side: int, method: str
):
    assert method_of(target, dtype, tokens, width, side) == method


def test_devices_are_told_apart():
    class Described:
        def __init__(self, platform: str, capability: str):
            self.platform, self.compute_capability = platform, capability

    assert target_of(Described("gpu", "9.0")) == Target("gpu", capability=9.0)
    assert target_of(Described("gpu", "gfx942")) == Target("gpu")
    assert target_of(jax.devices("cpu")[0]) == Target("cpu")


def test_what_is_traced_is_for_jaxs_default_device(monkeypatch: pytest.MonkeyPatch):
    cpu = jax.devices("cpu")[0]
    by_backend = {None: SimpleNamespace(platform="gpu", compute_capability="9.0"), "cpu": cpu}
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [by_backend[backend]])
    assert current_target() == HOPPER
    for chosen in (cpu, "cpu"):
        with jax.default_device(chosen):
            assert current_target() == Target("cpu")
