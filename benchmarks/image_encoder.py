"""SAM's image encoder beside PyPI `segment-anything`'s, in one process, in alternation.

    bash tests/install_parity.sh && python -m benchmarks.image_encoder --size vit_h
    pip install keras && pip install --no-deps keras-hub  # without TensorFlow
    python -m benchmarks.image_encoder --size vit_b --keras

All encode the same image with the same weights in float32 on the CPU; the outputs are compared.
KerasHub has a port of SAM that runs on jax; `--keras` adds it. Operations are the model's; the
other two also multiply the padding of windows.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import numpy as np
import torch

from benchmarks.alternation import print_comparison
from convert import sam as sam_table
from evf_sam_jax.flops import count_flops
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.frame import PIXEL_MEAN, PIXEL_STD
from evf_sam_jax.models.sam.config import SamConfig
from tests.parity import sam_cases
from tests.parity.weights import our_params


def keras_hub_encoder(
    config: SamConfig, weights: dict[str, torch.Tensor]
) -> Callable[[torch.Tensor], jax.Array]:
    """KerasHub's encoder with the original's weights: preprocessed pixels -> [1 g g c]."""
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
    mean, stddev = (torch.tensor(x) / 255 for x in (PIXEL_MEAN, PIXEL_STD))

    def encode(pixels: torch.Tensor) -> jax.Array:
        scaled = pixels.permute(0, 2, 3, 1) * stddev + mean  # which it undoes
        embedding = forward(parameters, scaled.numpy())
        return jax.block_until_ready(embedding)

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("vit_b", "vit_l", "vit_h"), default="vit_h")
    parser.add_argument("--keras", action="store_true", help="with KerasHub's port")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    segmenter = dataclasses.replace(getattr(SamConfig, options.size)(), dtype="float32")
    config = dataclasses.replace(evf_sam.EvfSamConfig.tiny(), segmenter=segmenter)
    given = sam_cases.inputs(segmenter)

    original = sam_cases.original(segmenter)
    content = torch.from_numpy(given.image[: given.size[0], : given.size[1]].copy())
    pixels = original.preprocess(content.permute(2, 0, 1).float()[None])

    params = our_params(sam_table.table(segmenter), sam_cases.section(segmenter))
    params = jax.device_put({"segmenter": {"image_encoder": params["segmenter"]["image_encoder"]}})
    image, size = jax.device_put((given.image[None], np.asarray([given.size], np.int32)))
    encode = jax.jit(evf_sam.encode_image, static_argnums=0)

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            return original.image_encoder(pixels)

    def ours() -> jax.Array:
        return jax.block_until_ready(encode(config, params, image, size)).embedding

    runs = {"segment-anything": theirs, "evf_sam_jax": ours}
    expected = theirs()[0].permute(1, 2, 0).numpy()
    found = {"evf_sam_jax": np.asarray(ours())[0]}
    if options.keras:
        encode_by_keras = keras_hub_encoder(segmenter, original.image_encoder.state_dict())
        runs["KerasHub"] = lambda: encode_by_keras(pixels)
        found["KerasHub"] = np.asarray(runs["KerasHub"]())[0]
    for name, embedding in found.items():
        print(f"{name}: the output differs by at most {np.abs(embedding - expected).max():.1e}")
    operations = count_flops(functools.partial(evf_sam.encode_image, config), params, image, size)
    print_comparison(
        f"{options.size} image encoder, float32",
        runs,
        options.repeats,
        operations=dict.fromkeys(runs, operations),
        packages=("segment-anything", "keras", "keras-hub")[: len(runs)],
    )


if __name__ == "__main__":
    main()
