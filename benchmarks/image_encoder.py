"""A segmenter's image encoder beside the PyTorch original's, in one process, in alternation.

    bash tests/install_parity.sh && python -m benchmarks.image_encoder --size vit_h
    python -m benchmarks.image_encoder --size hiera_large --compile
    pip install keras && pip install --no-deps keras-hub  # without TensorFlow
    python -m benchmarks.image_encoder --size vit_b --keras

All encode the same image with the same weights; the outputs are compared. The originals are PyPI's
`segment-anything` and `sam2`, on the GPU where torch has one. `--compile` adds them under
`torch.compile`, with SAM's attention by `scaled_dot_product_attention`, by which SAM-2 attends
anyway. KerasHub has a port of SAM that runs on jax; `--keras` adds it. Operations are our model's;
the others' linear layers also multiply the padding of windows.
"""

import argparse
import copy
import dataclasses
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.alternation import print_comparison
from convert import sam as sam_table
from convert import sam2 as sam2_table
from evf_sam_jax.flops import count_flops
from evf_sam_jax.model_dir import nest, path_leaves
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.frame import PIXEL_MEAN, PIXEL_STD
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.models.sam2.config import Sam2Config
from tests.parity import sam2_cases, sam_cases
from tests.parity.weights import our_params

SIZES: dict[str, Callable[[], SamConfig | Sam2Config]] = {
    **{name: getattr(SamConfig, name) for name in ("vit_b", "vit_l", "vit_h")},
    **{
        f"hiera_{name}": getattr(Sam2Config, f"hiera_{name}")
        for name in ("tiny", "small", "base_plus", "large")
    },
}


@dataclasses.dataclass(frozen=True)
class Original:
    """A PyTorch original and how it is asked.

    Attributes:
      name: of its package.
      model: it, on the device that torch has.
      encode: (model, preprocessed pixels [1 3 s s]) -> embedding [1 c g g].
    """

    name: str
    model: Any
    encode: Callable[[Any, torch.Tensor], torch.Tensor]


def original_of(config: SamConfig | Sam2Config) -> Original:
    if isinstance(config, SamConfig):
        return Original(
            "segment-anything",
            sam_cases.original(config),
            lambda model, pixels: model.image_encoder(pixels),
        )
    return Original(
        "sam2",
        sam2_cases.original(config),
        lambda model, pixels: sam2_cases.original_features(model, pixels)[-1],
    )


def params_of(config: SamConfig | Sam2Config) -> evf_sam.Params:
    """The original's weights as ours, on the device, in the dtypes of inference."""
    if isinstance(config, SamConfig):
        params = our_params(sam_table.table(config), sam_cases.section(config))
    else:
        params = our_params(sam2_table.table(config), sam2_cases.section(config))
    leaves = path_leaves({"segmenter": params["segmenter"]})
    return nest(
        {
            path: jax.device_put(leaf.astype(evf_sam.param_dtype(path, config.dtype)))
            for path, leaf in leaves.items()
        }
    )


def compiled(original: Original) -> Callable[[torch.Tensor], torch.Tensor]:
    """The original under `torch.compile`, with the same parameters."""
    shared = {id(each): each for each in original.model.parameters()}
    model = copy.deepcopy(original.model, memo=shared)
    if original.name == "segment-anything":
        for block in model.image_encoder.blocks:
            block.attn.forward = types.MethodType(attend_fused, block.attn)
    return torch.compile(functools.partial(original.encode, model))


def attend_fused(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """What the forward of `segment_anything`'s `Attention` returns, by torch's fused attention."""
    from segment_anything.modeling.image_encoder import get_rel_pos

    b, h, w, _ = x.shape
    n = attention.num_heads
    query, key, value = attention.qkv(x).reshape(b, h * w, 3, n, -1).permute(2, 0, 3, 1, 4)
    by_row, by_column = (
        torch.einsum(form, query.unflatten(2, (h, w)), get_rel_pos(side, side, table))
        for form, side, table in (
            ("bnhwc,hkc->bnhwk", h, attention.rel_pos_h),
            ("bnhwc,wkc->bnhwk", w, attention.rel_pos_w),
        )
    )
    bias = (by_row[..., :, None] + by_column[..., None, :]).reshape(b, n, h * w, h * w)
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attention.proj(found.transpose(1, 2).reshape(b, h, w, -1))


def keras_hub_encoder(
    config: SamConfig, weights: dict[str, torch.Tensor]
) -> Callable[[np.ndarray], jax.Array]:
    """KerasHub's encoder with the original's weights: pixels [1 3 s s] -> embedding [1 g g c]."""
    os.environ["KERAS_BACKEND"] = "jax"
    try:
        import keras
        from keras_hub.models import ViTDetBackbone
    except ImportError as error:
        raise SystemExit(
            f"error: --keras: expected keras and keras-hub, found that {error}"
        ) from None

    backbone = ViTDetBackbone(
        hidden_size=config.width,
        num_layers=config.depth,
        intermediate_dim=config.mlp_ratio * config.width,
        num_heads=config.heads,
        global_attention_layer_indices=list(
            range(config.global_every - 1, config.depth, config.global_every)
        ),
        image_shape=(config.image_size, config.image_size, 3),
        patch_size=config.patch_size,
        num_output_channels=config.out_channels,
        window_size=config.window_size,
    )

    def assign(variable: keras.Variable, name: str) -> None:
        value = weights[name]
        if value.ndim == 4 and name.endswith("weight"):
            value = value.permute(2, 3, 1, 0)
        elif value.ndim == 2 and name.endswith("weight"):
            value = value.T
        variable.assign(value.numpy())

    def assign_all(layer: keras.Layer, name: str) -> None:
        for variable in layer.weights:
            end = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
            assign(variable, f"{name}.{end.get(variable.name, variable.name)}")

    embed, positions, *blocks = (
        layer for layer in backbone.layers if layer.weights and layer is not backbone.neck
    )
    assign_all(embed.projection, "patch_embed.proj")
    assign(positions.pos_embed, "pos_embed")
    for i, block in enumerate(blocks):
        attention, mlp = block.attention, block.mlp_block.dense_net.layers
        for layer, name in (
            (block.layer_norm1, "norm1"),
            (attention.qkv, "attn.qkv"),
            (attention.projection, "attn.proj"),
            (attention.add_decomposed_relative_pe, "attn"),
            (block.layer_norm2, "norm2"),
            (mlp[0], "mlp.lin1"),
            (mlp[-1], "mlp.lin2"),
        ):
            assign_all(layer, f"blocks.{i}.{name}")
    for i, layer in enumerate(backbone.neck.layers):
        assign_all(layer, f"neck.{i}")

    parameters = [variable.value for variable in backbone.trainable_variables]
    forward = jax.jit(lambda values, x: backbone.stateless_call(values, [], x)[0])
    mean, stddev = (np.asarray(x, np.float32) / 255 for x in (PIXEL_MEAN, PIXEL_STD))

    def encode(pixels: np.ndarray) -> jax.Array:
        scaled = pixels.transpose(0, 2, 3, 1) * stddev + mean  # which it undoes
        return jax.block_until_ready(forward(parameters, scaled))

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="vit_h")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--keras", action="store_true", help="with KerasHub's port of SAM")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.keras and (not options.size.startswith("vit_") or options.dtype != "float32"):
        parser.error(f"--keras: expected a SAM in float32, found {options.size}, {options.dtype}")

    segmenter = dataclasses.replace(SIZES[options.size](), dtype=options.dtype)
    config = dataclasses.replace(evf_sam.EvfSamConfig.tiny(), segmenter=segmenter)
    side = segmenter.image_size
    image = np.random.default_rng(7).integers(0, 256, (1, side, side, 3), np.uint8)
    mean, stddev = (np.asarray(x, np.float32) for x in (PIXEL_MEAN, PIXEL_STD))
    pixels = ((image.astype(np.float32) - mean) / stddev).transpose(0, 3, 1, 2)

    original = original_of(segmenter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original.model.to(device, getattr(torch, options.dtype))
    given = torch.from_numpy(pixels).to(device, getattr(torch, options.dtype))
    params = params_of(segmenter)
    frame, size = jax.device_put((image, np.full((1, 2), side, np.int32)))
    encode = jax.jit(evf_sam.encode_image, static_argnums=0)

    def ours() -> np.ndarray:
        return np.asarray(encode(config, params, frame, size).embedding, np.float32)

    def theirs(encode: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        with torch.inference_mode():
            return encode(given).permute(0, 2, 3, 1).float().cpu().numpy()

    eager = functools.partial(original.encode, original.model)
    runs = {original.name: functools.partial(theirs, eager), "evf_sam_jax": ours}
    if options.compile:
        runs["torch.compile"] = functools.partial(theirs, compiled(original))
    if options.keras:
        assert isinstance(segmenter, SamConfig)  # as checked above, of `--size`
        keras = keras_hub_encoder(segmenter, original.model.image_encoder.state_dict())
        runs["KerasHub"] = lambda: np.asarray(keras(pixels))
    # Twice, since torch compiles anew what has been remembered in the first call.
    expected, *others = [[run() for run in runs.values()] for _ in range(2)][-1]
    for name, found in zip(list(runs)[1:], others, strict=True):
        print(f"{name}: the output differs by at most {np.abs(found - expected).max():.1e}")
    operations = count_flops(functools.partial(evf_sam.encode_image, config), params, frame, size)
    print_comparison(
        f"{options.size} image encoder, {options.dtype}",
        runs,
        options.repeats,
        operations=dict.fromkeys(runs, operations),
        dtype=options.dtype,
        packages=(original.name, *(("keras", "keras-hub") if options.keras else ())),
    )


if __name__ == "__main__":
    main()
