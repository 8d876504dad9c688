"""CLIP as a multimodal encoder: its text tower alone, or both towers side by side.

Reference: openai/CLIP at dcba3cb, `clip/model.py`; mlfoundations/open_clip, `model.py`, is the same
with an exact GELU; huggingface/transformers 5.24, `models/clip/modeling_clip.py`.

The paper (Tables 1 and 3) names the encoders and "text" or "late"; what it leaves open is an option
with a default, which `ClipConfig` states.

Differences:
  - The text's vector is read at its last valid token, which is the end of text that the tokenizer
    put there; the originals look for the first token of that id.
  - Vectors are not scaled to length one, and there is no temperature.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from evf_sam_jax.errors import UserError
from evf_sam_jax.models.config_checks import (
    check_choice,
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
    split_by_batch,
)
from evf_sam_jax.models.pre_norm import ACTIVATIONS, PreNormConfig, stacked

# The towers never see each other, so only what comes from the text, or both, depends on the phrase;
# the usual one first.
READOUTS = {"late": ("concat", "text_eos"), "text": ("text_eos",)}

LAYER_NORM_EPSILON = 1e-5
MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP, and what is read out of it.

    Attributes:
      activation: of both towers' MLPs: `quick_gelu` in OpenAI's weights, `gelu` in OpenCLIP's own.
      fusion: `late`: both towers; `text`: there is no image.
      readout: `concat`: the image's vector ([CLS]) and the text's (end of text); or the text's.
      projected: whether vectors are read after the projection to the width that both have in
        common. By default they are, since these are what CLIP was trained to compare. The paper's
        parameter counts suggest it with late fusion (428M), and hardly with text alone (123M).
      concat: along channels into one prompt token (the default), or as two tokens, which then must
        be of one width.
      image_fit: `stretch` (the default): the whole image becomes a square, as the released EVF-SAM
        does with BEiT-3's; `crop`: CLIP's own centre crop, which can cut off what a phrase means.
      normalisation: which mean and deviation the image has: `openai`, the statistics of OpenAI's
        data, which most weights need; or `inception`, 0.5 for both, which `l14` was trained with.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes of each layer, see `REMAT`.
    """

    text_width: int
    text_heads: int
    text_layers: int
    vision_width: int
    vision_heads: int
    vision_layers: int
    projection_width: int
    activation: str
    vocab_size: int = 49408
    max_text_tokens: int = 77
    image_size: int = 224
    patch_size: int = 14
    fusion: str = "late"
    readout: str = "concat"
    projected: bool = True
    concat: str = "channels"
    image_fit: str = "stretch"
    normalisation: str = "openai"
    dtype: str = "bfloat16"
    remat: bool | str = False

    family: ClassVar[str] = "clip"
    readouts: ClassVar[Mapping[str, tuple[str, ...]]] = READOUTS

    def __post_init__(self) -> None:
        """Raises UserError for values that no model can have."""
        check_values(self, "encoder")
        check_choice("encoder.activation", self.activation, ACTIVATIONS)
        check_fusion_and_readout(self, self.readouts)
        check_choice("encoder.projected", self.projected, (False, True))
        check_choice("encoder.image_fit", self.image_fit, ("stretch", "crop"))
        check_choice("encoder.normalisation", self.normalisation, ("openai", "inception"))
        for name, divisor in (
            ("text_width", "text_heads"),
            ("vision_width", "vision_heads"),
            ("image_size", "patch_size"),
        ):
            check_multiple(self, "encoder", name, divisor)
        if self.prompt_tokens == 2 and self.image_vector_width != self.text_vector_width:
            raise UserError(
                "encoder.concat: expected channels, or projected vectors as tokens, found tokens "
                f"of {self.image_vector_width} and {self.text_vector_width} channels"
            )

    @classmethod
    def l14_openai(cls) -> "ClipConfig":
        """ViT-L/14 as OpenAI trained it (`openai/clip-vit-large-patch14`)."""
        return dataclasses.replace(cls.l14(), activation="quick_gelu", normalisation="openai")

    @classmethod
    def l14(cls) -> "ClipConfig":
        """ViT-L/14 as OpenCLIP trained it (`laion/CLIP-ViT-L-14-laion2B-s32B-b82K`).

        Its normalisation: mlfoundations/open_clip at 0134a45, `pretrained.py`.
        """
        return cls(
            text_width=768,
            text_heads=12,
            text_layers=12,
            vision_width=1024,
            vision_heads=16,
            vision_layers=24,
            projection_width=768,
            activation="gelu",
            normalisation="inception",
        )

    @classmethod
    def h14(cls) -> "ClipConfig":
        """ViT-H/14 as OpenCLIP trained it (`laion/CLIP-ViT-H-14-laion2B-s32B-b79K`)."""
        return cls(
            text_width=1024,
            text_heads=16,
            text_layers=24,
            vision_width=1280,
            vision_heads=16,
            vision_layers=32,
            projection_width=1024,
            activation="gelu",
        )

    @classmethod
    def tiny(cls) -> "ClipConfig":
        """An encoder for tests."""
        return cls(
            text_width=32,
            text_heads=2,
            text_layers=2,
            vision_width=48,
            vision_heads=3,
            vision_layers=3,
            projection_width=24,
            activation="quick_gelu",
            vocab_size=128,
            max_text_tokens=16,
            image_size=32,
            patch_size=8,
            dtype="float32",
        )

    @property
    def image_kind(self) -> str:
        """How the host prepares the image, see `data_pipelines.tower_images.ENCODER`."""
        kind = {"stretch": "clip", "crop": "clip_crop"}[self.image_fit]
        return kind if self.normalisation == "openai" else f"{kind}_{self.normalisation}"

    @property
    def width(self) -> int:
        """Channels of the text's tokens."""
        return self.text_width

    @property
    def patches(self) -> int:
        """Number of image patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def text_vector_width(self) -> int:
        """Channels of the text's vector."""
        return self.projection_width if self.projected else self.text_width

    @property
    def image_vector_width(self) -> int:
        """Channels of the image's vector."""
        return self.projection_width if self.projected else self.vision_width

    @property
    def prompt_tokens(self) -> int:
        """Prompt features of a phrase."""
        return 2 if self.readout == "concat" and self.concat == "tokens" else 1

    @property
    def prompt_width(self) -> int:
        """Channels of a prompt feature."""
        if self.readout == "text_eos" or self.prompt_tokens == 2:
            return self.text_vector_width
        return self.image_vector_width + self.text_vector_width


def layers(config: ClipConfig, width: int, heads: int, number: int) -> PreNormConfig:
    """Returns the sizes of one tower's layers, with the original's initialisation of the text's."""
    attention, hidden = width**-0.5, (2 * width) ** -0.5
    residual = attention * (2 * number) ** -0.5
    return PreNormConfig(
        width=width,
        heads=heads,
        layers=number,
        mlp_width=MLP_RATIO * width,
        activation=config.activation,
        epsilon=LAYER_NORM_EPSILON,
        init=(attention, residual, hidden, residual),
        dtype=config.dtype,
        remat=config.remat,
    )


class PatchesWithCls(nn.Module):
    """Patch embedding without a bias, and the learned [CLS] token in front."""

    config: ClipConfig

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        config, width = self.config, self.config.vision_width
        init = nn.initializers.normal(width**-0.5)
        cls_token = self.param("cls_token", init, (width,), jnp.float32)
        x = PatchConv(width, config.patch_size, config.dtype, False, name="proj")(image)
        x = x.reshape(x.shape[0], -1, width).astype(jnp.float32)
        cls_token = jnp.broadcast_to(cls_token[None, None], (x.shape[0], 1, width))
        return jnp.concatenate([cls_token, x], axis=1)


class Clip(nn.Module):
    """The multimodal encoder: `(encoder_image, text_ids, text_valid) -> prompt features`."""

    config: ClipConfig

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
          encoder_image: normalised as the configuration says; looked at with late fusion only.
          text_ids: right-padded. No token sees what comes after it, so padding changes nothing.
          text_valid: false at padding; the vector is read at the last token where it is true.
          image_valid: for encoders whose images differ in size; here all of an image counts.
        """
        config = self.config
        b, k, length = text_ids.shape
        text = self.text_vectors(text_ids.reshape(b * k, length), text_valid.reshape(b * k, length))
        text = text.reshape(b, k, -1)
        if config.readout == "text_eos":
            if config.fusion == "late" and self.is_initializing():
                self.image_vectors(encoder_image)  # also what is not read out
            return text[:, :, None]
        image = jnp.repeat(self.image_vectors(encoder_image)[:, None], k, axis=1)
        if config.prompt_tokens == 2:
            return jnp.stack([image, text], axis=2)
        return jnp.concatenate([image, text], axis=-1)[:, :, None]

    def text_vectors(
        self, ids: Int[Array, "n l"], valid: Bool[Array, "n l"]
    ) -> Float[Array, "n d"]:
        """The text's tower, as a part of `__call__`."""
        config = self.config
        words = nn.Embed(
            config.vocab_size,
            config.text_width,
            param_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(0.02),
            name="text_embed",
        )
        positions = nn.Embed(
            config.max_text_tokens,
            config.text_width,
            param_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(0.01),
            name="text_positions",
        )
        x = look_up(words.embedding, ids) + positions.embedding[: ids.shape[1]][None]
        order = jnp.arange(x.shape[1])
        causal = order[None, :] <= order[:, None]
        tower = layers(config, config.text_width, config.text_heads, config.text_layers)
        bound = jnp.zeros(config.text_layers, bool)
        x, _ = stacked(tower, "text_layers")(split_by_batch(x), None, causal, bound)
        last = jnp.maximum(valid.sum(axis=-1) - 1, 0)
        # A product instead of a gather, which a mesh would not keep where the batch is.
        chosen = (order[None] == last[:, None]).astype(x.dtype)
        x = jnp.einsum("nt,ntd->nd", chosen, x, precision=matmul_precision(x.dtype))
        x = layer_norm("text_norm", LAYER_NORM_EPSILON, config.dtype)(x)
        return projection("text_projection", config)(x) if config.projected else x

    def image_vectors(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The image's tower, as a part of `__call__`."""
        config, width = self.config, self.config.vision_width
        positions = nn.Embed(
            1 + config.patches,
            width,
            param_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(width**-0.5),
            name="vision_positions",
        )
        x = PatchesWithCls(config, name="vision_embed")(image) + positions.embedding[None]
        x = layer_norm("vision_norm_before", LAYER_NORM_EPSILON, jnp.float32)(x)
        tower = layers(config, width, config.vision_heads, config.vision_layers)
        free = jnp.ones(config.vision_layers, bool)
        x, _ = stacked(tower, "vision_layers")(split_by_batch(x), None, None, free)
        x = layer_norm("vision_norm", LAYER_NORM_EPSILON, config.dtype)(x[:, 0])
        return projection("vision_projection", config)(x) if config.projected else x


def projection(name: str, config: ClipConfig) -> nn.Dense:
    """Returns the Linear layer without a bias to the width that both towers have in common."""
    init = nn.initializers.variance_scaling(1.0, mode="fan_in", distribution="normal")
    return dense(name, config.projection_width, config.dtype, False, init)
