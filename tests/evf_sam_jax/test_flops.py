"""Operations counted by hand, by the compiler, and of the model's training step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from data_pipelines.batch import Batch
from evf_sam_jax.flops import count_flops, peak_flops, step_flops, without_remat
from evf_sam_jax.losses import bce_and_dice
from evf_sam_jax.models import attention
from evf_sam_jax.models.evf_sam import EvfSamConfig, param_shapes
from evf_sam_jax.models.target import Target, compiled_for
from evf_sam_jax.param_rules import Params, merge, split
from evf_sam_jax.train_state import create_state
from evf_sam_jax.train_step import LossWeights, make_train_step, predict_masks
from tests.evf_sam_jax import tiny_experiment
from tests.evf_sam_jax.tiny_experiment import MODEL, REFERRING


def zeros(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled_flops(function, *args) -> float:
    """XLA's count of the program that it makes: of everything, with each loop run once."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


M, K, N = 5, 7, 11
PRODUCT = 2 * M * K * N


def multiply(x, y):
    return x @ y


def test_a_matrix_product():
    assert count_flops(multiply, zeros(M, K), zeros(K, N)) == PRODUCT
    assert count_flops(multiply, np.zeros((M, K)), np.zeros((K, N))) == PRODUCT
    assert count_flops(jnp.sin, zeros(M, K)) == 0


def test_a_batched_product_with_two_contracted_axes():
    def function(x, y):
        return jnp.einsum("bijk,bjkn->bin", x, y)

    assert count_flops(function, zeros(3, 2, 4, 5), zeros(3, 4, 5, 6)) == 2 * 3 * 2 * 4 * 5 * 6


def test_both_gradients_of_a_product_cost_what_it_costs():
    def loss(x, y):
        return jnp.sum(jnp.sin(x @ y))

    args = zeros(M, K), zeros(K, N)
    assert count_flops(jax.grad(loss), *args) == 2 * PRODUCT
    assert count_flops(jax.grad(loss, argnums=(0, 1)), *args) == 3 * PRODUCT


CONVOLUTIONS = {
    # Two rows of 9 with 3 of a kernel's elements in each: at stride 2 over padding 1, the first of
    # 5 outputs has one of them outside, and so has the last.
    "padding": (dict(window_strides=(2,), padding=[(1, 1)]), (2, 9, 4), (3, 4, 6), 5 * 3 - 2),
    # A transposed convolution: each of 9 inputs meets each of the 3.
    "dilated input": (
        dict(window_strides=(1,), padding=[(2, 2)], lhs_dilation=(3,)),
        (2, 9, 4),
        (3, 4, 6),
        9 * 3,
    ),
    "dilated kernel": (
        dict(window_strides=(1,), padding=[(0, 0)], rhs_dilation=(4,)),
        (2, 9, 4),
        (3, 4, 6),
        1 * 3,
    ),
    "groups": (
        dict(window_strides=(1,), padding=[(0, 0)], feature_group_count=2),
        (2, 9, 8),
        (3, 4, 6),
        7 * 3,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients(name: str):
    options, x, kernel, places = CONVOLUTIONS[name]
    expected = 2 * places * (2 * 4 * 6)  # of rows, input channels (of a group), output channels

    def convolve(x, kernel):
        numbers = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel)))

    args = zeros(*x), zeros(*kernel)
    assert count_flops(convolve, *args) == expected
    assert compiled_flops(convolve, *args) == expected
    assert count_flops(jax.grad(loss), *args) == 2 * expected
    assert count_flops(jax.grad(loss, argnums=1), *args) == 2 * expected


def test_a_convolution_in_two_dimensions():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID")

    # As a patch embedding is: every pixel meets the kernel once.
    assert count_flops(convolve, zeros(2, 3, 16, 24), zeros(8, 3, 4, 4)) == 2 * (
        2 * 16 * 24 * 3 * 8
    )


SQUARE = zeros(M, M)
CUBE = 2 * M**3


def scanned(x):
    return jax.lax.scan(lambda carry, _: (jnp.sin(carry @ carry), None), x, None, length=6)[0]


def two_products(x):
    return jnp.sin(x @ x) @ x


@jax.custom_vjp
def custom_vjp(x):
    return x @ x


custom_vjp.defvjp(lambda x: (x @ x, x), lambda x, gradient: (gradient @ x.T + x.T @ gradient,))


@jax.custom_jvp
def custom_jvp(x):
    return x @ x


custom_jvp.defjvp(lambda x, dx: (x[0] @ x[0], dx[0] @ x[0]))

NESTED = {
    "jit": (jax.jit(lambda x: x @ x), 1),
    "remat": (jax.checkpoint(lambda x: x @ x), 1),
    "custom_jvp": (custom_jvp, 1),
    "custom_vjp": (custom_vjp, 1),
    "custom_vjp, differentiated": (jax.grad(lambda x: custom_vjp(x).sum()), 3),
    "scan": (scanned, 6),
    "scan, differentiated": (jax.grad(lambda x: scanned(x).sum()), 18),
    "scan of scans": (lambda x: jax.lax.map(scanned, jnp.stack([x] * 4)), 24),
    "while": (lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ y, x), 1),
    "cond": (lambda x: jax.lax.cond(x[0, 0] < 1, lambda y: y @ y @ y, lambda y: y @ y, x), 2),
    "switch": (lambda x: jax.lax.switch(0, [lambda y: y, jnp.sin, lambda y: y @ y], x), 1),
    # The first of its two products is computed again; the last has nothing that needs it.
    "remat, differentiated": (jax.grad(lambda x: jax.checkpoint(two_products)(x).sum()), 7),
}


@pytest.mark.parametrize("name", NESTED)
def test_what_is_inside_an_equation_counts(name: str):
    function, products = NESTED[name]
    assert count_flops(function, SQUARE) == products * CUBE


@pytest.mark.parametrize("axes", [{"a"}, {"a", "b"}])
def test_devices_count_each(axes: set[str]):
    """Over the axes that it is mapped over: the others are the compiler's."""
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(multiply, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=axes)
    times = 2 if axes == {"a"} else 8
    assert count_flops(mapped, zeros(M, K), zeros(K, N)) == times * PRODUCT


def test_both_products_of_attention_count():
    b, q, s, h, d = 2, 6, 10, 3, 8
    attend = functools.partial(attention.attend, scale=1.0)
    keys = zeros(b, s, h, d)
    assert count_flops(attend, zeros(b, q, h, d), keys, keys) == 2 * 2 * b * h * q * s * d


def test_attention_costs_the_same_in_tiles(monkeypatch: pytest.MonkeyPatch):
    n, side, d = 6, 4, 8
    tokens = side * side
    monkeypatch.setattr(attention, "SMALL_SCORES", 0)
    monkeypatch.setitem(attention.TILE_SCORES, jax.default_backend(), tokens * tokens // 2)
    x, bias = zeros(n, tokens, d), zeros(n, tokens, side)
    attend_square = functools.partial(attention.attend_square, scale=1.0)
    assert "scan" in str(jax.make_jaxpr(attend_square)(x, x, x, bias, bias)), "one tile only"
    assert count_flops(attend_square, x, x, x, bias, bias) == 2 * 2 * n * tokens * tokens * d


def test_attention_by_a_kernel_counts_as_without_one(monkeypatch: pytest.MonkeyPatch):
    n, side, d = 2, 16, 8
    tokens = side * side
    monkeypatch.setattr(attention, "FUSED_TOKENS", tokens)
    x = jax.ShapeDtypeStruct((n, tokens, d), "bfloat16")
    bias = jax.ShapeDtypeStruct((n, tokens, side), "bfloat16")
    attend_square = functools.partial(attention.attend_square, scale=1.0)
    with compiled_for(Target("tpu")):
        kernel = jax.make_jaxpr(lambda *given: attend_square(*given))(x, x, x, bias, bias)
        assert "pallas_call" in str(kernel)
        assert count_flops(attend_square, x, x, x, bias, bias) == 2 * 2 * n * tokens * tokens * d


def test_the_compiler_counts_the_same_where_products_dominate():
    def loss(weights, x):
        hidden = jax.nn.relu(x @ weights[0])
        return jnp.sum((hidden @ weights[1]) ** 2)

    gradient = jax.value_and_grad(loss)
    args = (zeros(256, 512), zeros(512, 128)), zeros(64, 256)
    assert count_flops(gradient, *args) == pytest.approx(compiled_flops(gradient, *args), rel=0.02)


@functools.cache
def batch() -> Batch:
    return tiny_experiment.batch(prompts=False)


def referring_loss(config: EvfSamConfig):
    def loss(trainable: Params, frozen: Params, batch: Batch):
        logits = predict_masks(config, merge(trainable, frozen), batch, "text")
        bce, dice = bce_and_dice(logits, batch.mask, batch.mask_valid, batch.phrase_valid)
        return bce + dice, logits.sum()

    return loss


@functools.cache
def referring_flops(config: EvfSamConfig, rules=REFERRING.trainable) -> int:
    trainable, frozen = split(rules, param_shapes(config), "trainable")
    data = batch()
    return step_flops(referring_loss(config), trainable, frozen, data, has_aux=True)


def with_remat(config: EvfSamConfig) -> EvfSamConfig:
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, remat=True),
        segmenter=dataclasses.replace(config.segmenter, remat=True),
    )


ALL = ((".*/positional_encoding_gaussian_matrix", False), (".*", True))


def test_what_is_recomputed_is_no_work_of_the_model():
    recomputing = with_remat(MODEL)
    assert referring_flops(recomputing, ALL) > 1.1 * referring_flops(MODEL, ALL)
    assert without_remat(recomputing) == MODEL
    assert referring_flops(without_remat(recomputing), ALL) == referring_flops(MODEL, ALL)


def test_frozen_parameters_have_no_backward_pass():
    decoder = (("segmenter/mask_decoder/.*", True), (".*", False))  # of masks, from an embedding
    unfrozen = (decoder, REFERRING.trainable, ALL)
    forward = count_flops(
        lambda params, data: predict_masks(MODEL, params, data, "text"),
        param_shapes(MODEL),
        batch(),
    )
    costs = [referring_flops(MODEL, rules) for rules in unfrozen]
    assert forward < costs[0] < costs[1] < costs[2] <= 3 * forward


def test_the_step_costs_what_its_loss_and_gradient_cost():
    """An optimizer has no matrix products, so the step can be counted as well as its loss."""
    trainable, frozen = split(REFERRING.trainable, param_shapes(MODEL), "trainable")
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda t, f: create_state(t, f, optimizer), trainable, frozen)
    step = make_train_step(MODEL, "text", LossWeights(), optimizer, lambda count: 1e-3)
    assert count_flops(step, state, batch()) == referring_flops(MODEL)


def test_the_compiler_agrees_about_the_model_without_loops():
    """XLA counts a loop's body once, so each scan has one step here."""
    config = dataclasses.replace(
        MODEL,
        encoder=dataclasses.replace(MODEL.encoder, layers=2),
        segmenter=dataclasses.replace(MODEL.segmenter, width=256, depth=1, global_every=1),
    )

    def forward(params, data):
        return predict_masks(config, params, data, "text")

    args = param_shapes(config), batch()
    # The rest is softmax, normalisation and GELU.
    assert count_flops(forward, *args) == pytest.approx(compiled_flops(forward, *args), rel=0.1)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA L4", None),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind: str, peak: float | None):
    assert peak_flops(kind) == peak
