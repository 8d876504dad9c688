"""Layers that both towers share, with every numeric constant written at the call."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from evf_sam_jax.models.target import current_target

# torch's default for Linear and Conv: uniform in +-1/sqrt(fan_in).
TORCH_UNIFORM = nn.initializers.variance_scaling(1 / 3, mode="fan_in", distribution="uniform")
# torch's default for Embedding.
TORCH_NORMAL = nn.initializers.normal(stddev=1.0)


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Returns how products in `dtype` are computed: those of float32 are float32 on every device.

    An accelerator otherwise rounds float32 inputs to TF32 or bfloat16 on the way.
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def by_rows(product: Callable[[Array], Array], x: Float[Array, "*s d_in"]) -> Array:
    """Returns the product of inputs and a kernel; on CPUs with all rows of `x` along one axis.

    Otherwise XLA for CPUs transposes what the kernel's gradient is computed of, and a training step
    takes a fifth longer (BEiT-3-L on two cores). TPUs would have to move tokens, whose number is no
    multiple of 8; GPUs were not tried.
    """
    if current_target().backend != "cpu":
        return product(x)
    found = product(x.reshape(-1, x.shape[-1]))
    return found.reshape(*x.shape[:-1], found.shape[-1])


def rows_dot_general(x: Array, kernel: Any, dimension_numbers: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` as linear layers call it, `by_rows`."""
    (_, contracted), batch = dimension_numbers

    def product(rows: Array) -> Array:
        last = (((rows.ndim - 1,), contracted), batch)
        return jax.lax.dot_general(rows, kernel, last, **options)

    return by_rows(product, x)


def gathering(layer: type[nn.Module]) -> type[nn.Module]:
    """Returns a layer whose parameters, where a mesh splits them, are gathered when it runs.

    XLA lets them go after it. Without a mesh (`jax.set_mesh`) it is the same layer.
    """
    if not mesh_axes():
        return layer
    return nn.map_variables(layer, "params", trans_in_fn=_gathered, init=True)


def scanned(layer: type[nn.Module], remat: bool | str, alone: bool = False) -> type[nn.Module]:
    """Returns a layer as a scan over layers shall have it: gathering, and rematerialised.

    The backward pass recomputes what `config_checks.REMAT` says.

    Args:
      alone: there is no scan, and XLA must be kept from undoing that.
    """
    layer = gathering(layer)
    if not remat:
        return layer
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(layer, prevent_cse=alone, policy=dots if remat == "dots" else None)


def split_by_batch(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Keeps the first axis of activations and of their gradients over all devices of the mesh.

    Otherwise XLA may move activations to where split parameters are, instead of gathering these.
    Without a mesh it does nothing.
    """
    axes = mesh_axes()
    if not axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def on_each_device(
    function: Callable[..., Array], whole: int = 0, kernel: bool = False
) -> Callable[..., Array]:
    """Returns a function of arrays that are split by batch, computed by each device for its rows.

    What loops over rows would otherwise bring all of them to every device. Without a mesh, and
    where rows cannot be shared out (initialisation sees one image), it is the same function.

    Args:
      whole: how many of the first arguments have no rows, and are whole on every device.
      kernel: the function calls a Pallas kernel, which does not say over which axes of the mesh
        its outputs vary, so that jax cannot check it; that is for functions without `whole`.
    """

    def call(*arrays: Array) -> Array:
        axes = mesh_axes()
        devices = jax.sharding.get_abstract_mesh().size if axes else 1
        if devices == 1 or any(x.shape[0] % devices for x in arrays[whole:]):
            return function(*arrays)
        rows = PartitionSpec(axes)
        specs = tuple(PartitionSpec() if i < whole else rows for i in range(len(arrays)))
        return jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=not kernel)(
            *arrays
        )

    return call


def look_up(table: Float[Array, "v d"], ids: Int[Array, "n t"]) -> Float[Array, "n t d"]:
    """Returns the rows of a table of embeddings.

    The gradient of the table adds up on each device, or every word would go to all of them.
    """
    rows = on_each_device(lambda table, ids: jnp.take(table, ids, axis=0), whole=1)
    return rows(table, ids)


def mesh_axes() -> tuple[str, ...]:
    """Names of the axes of the mesh that is set where this is traced; none without one.

    Within `jax.shard_map` there is none either: what is there is on one device already.
    """
    return tuple(jax.sharding.get_abstract_mesh().auto_axes)


@jax.custom_vjp
def _gathered(params):
    """Whole parameters on every device; their gradients may be split as the step needs them."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), params)


_gathered.defvjp(lambda params: (_gathered(params), None), lambda _, gradients: (gradients,))


def gelu_float32(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns the exact (erf) GELU, evaluated in float32 and cast back to the dtype of `x`."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def layer_norm(name: str, epsilon: float, dtype: DTypeLike) -> nn.LayerNorm:
    """Returns a LayerNorm over the last axis: float32 statistics, two-pass variance as in torch."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=jnp.float32,
        use_fast_variance=False,
        force_float32_reductions=True,
        name=name,
    )


def dense(
    name: str,
    features: int,
    dtype: DTypeLike,
    use_bias: bool = True,
    kernel_init: nn.initializers.Initializer = TORCH_UNIFORM,
) -> nn.Dense:
    """Returns a Linear layer that multiplies in `dtype` and keeps float32 parameters."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        precision=matmul_precision(dtype),
        kernel_init=kernel_init,
        dot_general=rows_dot_general,
        name=name,
    )


class Mlp(nn.Module):
    """Linear layers of the given names with an activation between them and none at the end."""

    features: Sequence[int]
    activation: str
    dtype: DTypeLike
    names: Sequence[str]

    @nn.compact
    def __call__(self, x: Float[Array, "*s d_in"]) -> Float[Array, "*s d_out"]:
        activation = {"relu": jax.nn.relu, "gelu": gelu_float32}[self.activation]
        for index, (name, features) in enumerate(zip(self.names, self.features, strict=True)):
            if index:
                x = activation(x)
            x = dense(name, features, self.dtype)(x)
        return x


class PatchConv(nn.Module):
    """Convolution with stride = kernel size = `patch_size`; kernel [p, p, in, out] as in HWIO.

    Patches don't overlap, so it is one matrix product, which every backend does fast.
    """

    features: int
    patch_size: int
    dtype: DTypeLike
    use_bias: bool

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b gh gw d"]:
        b, h, w, c = image.shape
        p = self.patch_size
        kernel = self.param("kernel", TORCH_UNIFORM, (p, p, c, self.features), jnp.float32)
        patches = image.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(b, h // p, w // p, p * p * c).astype(self.dtype)
        kernel = kernel.reshape(p * p * c, self.features).astype(self.dtype)
        precision = matmul_precision(self.dtype)
        x = by_rows(lambda rows: jnp.matmul(rows, kernel, precision=precision), patches)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            x = x + bias.astype(self.dtype)[None, None, None]
        return x


class PatchTranspose(nn.Module):
    """Transposed convolution with stride = kernel size = 2: a Linear layer and a pixel shuffle.

    The kernel is stored [2, 2, in, out] (torch: [in, out, 2, 2]), unflipped: windows don't overlap.
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w d"]:
        b, h, w, c = x.shape
        d = self.features
        kernel = self.param("kernel", TORCH_UNIFORM, (2, 2, c, d), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (d,), jnp.float32)
        kernel = kernel.transpose(2, 0, 1, 3).reshape(c, 4 * d).astype(self.dtype)
        precision = matmul_precision(self.dtype)
        y = by_rows(
            lambda rows: jnp.matmul(rows, kernel, precision=precision), x.astype(self.dtype)
        )
        y = y.reshape(b, h, w, 2, 2, d)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, d)
        return y + bias.astype(self.dtype)[None, None, None]
