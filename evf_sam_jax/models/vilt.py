"""ViLT as a multimodal encoder: one transformer over words and patches, without a tower before it.

Reference: huggingface/transformers 5.24, `models/vilt/modeling_vilt.py`; dandelin/ViLT,
`vilt/modules/vision_transformer.py`.

The paper (Table 3) names the encoder and "text", "late" or "early"; what it leaves open is an
option with a default, which `ViltConfig` states.

Differences:
  - Of a padded image the patches inside come first, in order, and as many tokens are kept as the
    largest image has; the original draws which ones fill up, and the order where nothing does. No
    output depends on either.
  - Positions are interpolated to the image's own patches in static shapes.
  - A pooler that is not read out doesn't exist.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from evf_sam_jax.models.config_checks import (
    check_choice,
    check_early_layers,
    check_fusion_and_readout,
    check_multiple,
    check_values,
)
from evf_sam_jax.models.layers import (
    PatchConv,
    dense,
    layer_norm,
    look_up,
    matmul_precision,
    on_each_device,
    split_by_batch,
)
from evf_sam_jax.models.pre_norm import PreNormConfig, stacked

# What can be read out: only what the phrase has reached; the usual one first.
READOUTS = {
    "early": ("text_cls", "image_cls", "pooler", "image_mean", "concat"),
    "late": ("concat", "text_cls", "pooler"),
    "text": ("text_cls", "pooler"),
}

LAYER_NORM_EPSILON = 1e-12
INIT_STDDEV = 0.02
INIT = nn.initializers.normal(INIT_STDDEV)
TEXT, IMAGE = 0, 1  # rows of the table of modalities


@dataclasses.dataclass(frozen=True)
class ViltConfig:
    """Sizes of a ViLT, how it fuses image and text, and what is read out.

    Attributes:
      image_size: side of the square images that the position table is made for.
      fusion: `early`: all tokens attend to each other; `late`: each modality to itself; `text`:
        there is no image.
      early_layers: with early fusion, in how many of the first layers the modalities attend to each
        other; None: in all of them. 0 equals late fusion, read-outs included.
      readout: the prompt feature: the text's [CLS] (the default, as the one token that pretraining
        read out), the image's [CLS], tanh(Linear(the text's [CLS])) with the pretrained layer, the
        mean of the patches, or the image's [CLS] and the text's concatenated.
      concat: along channels into one prompt token (the default), or as two tokens.
      image_fit: `stretch` (the default): the whole image becomes a square of `image_size`, as the
        released EVF-SAM does with BEiT-3's, so that encoders are compared on the same picture, the
        positions are those of the checkpoint, and 185 tokens do instead of 269; `pad`: ViLT's own:
        the shorter side becomes `image_size`, the longer at most 1.66 times that.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes of each layer, see `REMAT`.
    """

    width: int
    heads: int
    layers: int
    mlp_width: int
    vocab_size: int = 30522
    max_text_tokens: int = 40
    image_size: int = 384
    patch_size: int = 32
    fusion: str = "early"
    early_layers: int | None = None
    readout: str = "text_cls"
    concat: str = "channels"
    image_fit: str = "stretch"
    dtype: str = "bfloat16"
    remat: bool | str = False

    family: ClassVar[str] = "vilt"
    readouts: ClassVar[Mapping[str, tuple[str, ...]]] = READOUTS

    def __post_init__(self) -> None:
        """Raises UserError for values that no model can have."""
        check_values(self, "encoder")
        check_fusion_and_readout(self, self.readouts, self.early_layers)
        check_early_layers(self.early_layers, self.fusion, self.layers)
        check_choice("encoder.image_fit", self.image_fit, ("stretch", "pad"))
        check_multiple(self, "encoder", "width", "heads")
        check_multiple(self, "encoder", "image_size", "patch_size")

    @classmethod
    def b32(cls) -> "ViltConfig":
        """ViLT-B/32 (`dandelin/vilt-b32-mlm`)."""
        return cls(width=768, heads=12, layers=12, mlp_width=3072)

    @classmethod
    def tiny(cls) -> "ViltConfig":
        """An encoder for tests."""
        return cls(
            width=32,
            heads=2,
            layers=3,
            mlp_width=64,
            vocab_size=128,
            max_text_tokens=16,
            image_size=96,
            dtype="float32",
        )

    @property
    def image_kind(self) -> str:
        """How the host prepares the image, see `data_pipelines.tower_images.ENCODER`."""
        return {"stretch": "vilt", "pad": "vilt_pad"}[self.image_fit]

    @property
    def grid(self) -> int:
        """Side of the table of positions, in patches."""
        return self.image_size // self.patch_size

    @property
    def prompt_tokens(self) -> int:
        """Prompt features of a phrase."""
        return 2 if self.readout == "concat" and self.concat == "tokens" else 1

    @property
    def prompt_width(self) -> int:
        """Channels of a prompt feature."""
        return 2 * self.width // self.prompt_tokens if self.readout == "concat" else self.width


class Vilt(nn.Module):
    """The multimodal encoder: `(encoder_image, text_ids, text_valid) -> prompt features`."""

    config: ViltConfig

    @nn.compact
    def __call__(
        self,
        encoder_image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b k l"],
        text_valid: Bool[Array, "b k l"],
        image_valid: Bool[Array, "b h w"] | None = None,
    ) -> Float[Array, "b k t d"]:
        """Returns the prompt features of each phrase with its image, as `readout` says.

        Args:
          encoder_image: normalised (mean 0.5, std 0.5), in whole patches.
          text_ids: right-padded.
          text_valid: false at padding, which is never attended to.
          image_valid: true in a rectangle of whole patches at the top left, whose shorter side is
            at most `image_size`; None: everywhere.
        """
        config = self.config
        b, k, length = text_ids.shape
        modality = self.embedding("modality_types", 2)
        valid = text_valid.reshape(b * k, length)
        x = self.text_tokens(text_ids.reshape(b * k, length)) + modality[TEXT][None, None]
        allowed = None
        if config.fusion != "text":
            image, image_valid = self.image_tokens(encoder_image, image_valid)
            image = jnp.repeat(image + modality[IMAGE][None, None], k, axis=0)
            x = jnp.concatenate([x, image], axis=1)
            valid = jnp.concatenate([valid, jnp.repeat(image_valid, k, axis=0)], axis=1)
        together = config.early_layers
        if config.fusion == "late" or together is not None:
            of_text = jnp.arange(x.shape[1]) < length
            allowed = of_text[:, None] == of_text[None, :]
        free = jnp.arange(config.layers) < (together or 0)
        x, _ = stacked(layers(config), "layers")(split_by_batch(x), valid, allowed, free)
        x = layer_norm("norm", LAYER_NORM_EPSILON, config.dtype)(x)
        return self.read_out(x, valid, length).reshape(b, k, config.prompt_tokens, -1)

    def embedding(self, name: str, rows: int) -> Float[Array, "r d"]:
        """A table of vectors, as a part of `__call__`."""
        width = self.config.width
        table = nn.Embed(rows, width, param_dtype=jnp.float32, embedding_init=INIT, name=name)
        return table.embedding

    def text_tokens(self, ids: Int[Array, "n l"]) -> Float[Array, "n l d"]:
        """Words, their type and their positions as BERT has them, as a part of `__call__`."""
        config = self.config
        x = look_up(self.embedding("text_embed", config.vocab_size), ids)
        x = x + self.embedding("text_types", 2)[0][None, None]  # one sentence: all are of type 0
        x = x + self.embedding("text_positions", config.max_text_tokens)[: ids.shape[1]][None]
        return layer_norm("text_embed_norm", LAYER_NORM_EPSILON, jnp.float32)(x)

    def image_tokens(
        self, image: Float[Array, "b h w 3"], valid: Bool[Array, "b h w"] | None
    ) -> tuple[Float[Array, "b v d"], Bool[Array, "b v"]]:
        """[CLS] and patches with their positions, and which are there; a part of `__call__`."""
        config = self.config
        b, p, width = image.shape[0], config.patch_size, config.width
        down, across = (side // p for side in image.shape[1:3])
        patches = image.reshape(b, down, p, across, p, 3).swapaxes(2, 3)
        patches = patches.reshape(b, down * across, p, p, 3)
        sizes = jnp.broadcast_to(jnp.asarray([[down, across]]), (b, 2))
        kept = down * across
        if valid is not None:
            valid = valid[:, ::p, ::p]
            sizes = jnp.stack([valid[:, :, 0].sum(axis=1), valid[:, 0].sum(axis=1)], axis=1)
            kept = min(kept, config.grid * max(down, across))
        index = jnp.arange(kept)[None]
        # Row and column of the patches that are there; beyond the last one whatever comes.
        at = jnp.stack([index // sizes[:, 1:], index % sizes[:, 1:]], axis=-1)
        if valid is not None:
            where = jnp.minimum(at[..., 0] * across + at[..., 1], down * across - 1)
            take = on_each_device(lambda x, i: x[jnp.arange(len(i))[:, None], i])
            patches = take(patches, where)
        # A column of patches is an image too.
        x = PatchConv(width, p, config.dtype, True, name="patch_embed")(
            patches.reshape(b, kept * p, p, 3)
        )
        table = self.param("image_positions", INIT, (1 + config.grid**2, width), jnp.float32)
        grid = table[1:].reshape(config.grid, config.grid, width)
        rows, columns = (
            interpolation_weights(at[..., axis], sizes[:, axis], config.grid) for axis in (0, 1)
        )
        precision = matmul_precision(jnp.float32)
        positions = jnp.einsum("bpi,bpj,ijd->bpd", rows, columns, grid, precision=precision)
        x = x.reshape(b, kept, width).astype(jnp.float32) + positions
        cls_token = self.param("cls_token", nn.initializers.zeros, (1, 1, width), jnp.float32)
        cls_token = jnp.broadcast_to(cls_token + table[None, :1], (b, 1, width))
        there = jnp.concatenate(
            [jnp.ones((b, 1), bool), index < sizes.prod(axis=1, keepdims=True)], 1
        )
        return jnp.concatenate([cls_token, x], axis=1), there

    def read_out(
        self, x: Float[Array, "n t d"], valid: Bool[Array, "n t"], length: Any
    ) -> Float[Array, "n s e"]:
        """What `readout` names of the final tokens, `length` of which are of the text."""
        config = self.config
        text_cls, image_cls = x[:, :1], x[:, length : length + 1]
        if config.readout == "text_cls":
            return text_cls
        if config.readout == "image_cls":
            return image_cls
        if config.readout == "pooler":
            pooler = dense("pooler", config.width, config.dtype, kernel_init=INIT)
            return jnp.tanh(pooler(text_cls))
        if config.readout == "concat":
            axis = 1 if config.prompt_tokens == 2 else 2
            return jnp.concatenate([image_cls, text_cls], axis=axis)
        there = valid[:, length + 1 :, None]
        patches = jnp.where(there, x[:, length + 1 :].astype(jnp.float32), 0.0)
        return patches.sum(axis=1, keepdims=True) / there.sum(axis=1, keepdims=True)


def layers(config: ViltConfig) -> PreNormConfig:
    """Returns the sizes of the layers."""
    return PreNormConfig(
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        mlp_width=config.mlp_width,
        activation="gelu",
        epsilon=LAYER_NORM_EPSILON,
        init=(INIT_STDDEV, INIT_STDDEV, INIT_STDDEV, INIT_STDDEV),
        dtype=config.dtype,
        remat=config.remat,
    )


def interpolation_weights(
    position: Int[Array, "b p"], size: Int[Array, " b"], grid: int
) -> Float[Array, "b p g"]:
    """Returns the weights of `grid` cells at positions of an axis of `size` patches.

    As `F.interpolate(mode="bilinear", align_corners=True)` from `grid` to `size`: the first and the
    last patch lie on the first and the last cell.
    """
    scale = jnp.where(size > 1, (grid - 1) / jnp.maximum(size - 1, 1), 0.0)
    source = position.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
    first = jnp.minimum(jnp.floor(source), grid - 1.0)
    second = jnp.minimum(first + 1.0, grid - 1.0)
    weight = (source - first)[..., None]
    cells = jnp.arange(grid, dtype=jnp.float32)[None, None]
    of_first = jnp.where(cells == first[..., None], 1.0 - weight, 0.0)
    return of_first + jnp.where(cells == second[..., None], weight, 0.0)
