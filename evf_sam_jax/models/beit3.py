"""BEiT-3, the early-fusion encoder: one transformer over image patches and text together.

Reference: torchscale 0.2.0, `model/BEiT3.py`, `architecture/encoder.py`,
`component/multihead_attention.py`, `component/multiway_network.py`, as configured by
`model/unilm/beit3/modeling_utils.py` of hustvl/EVF-SAM at 9935dc5.

Differences:
  - The two modalities travel as a pair of arrays instead of one array with a split position.
  - All layers but the last are stacked and scanned; the last one can compute only the tokens that
    are read out.
  - `fusion`, `early_layers` and `readout` choose what the paper's Tables 3 and 5 compare. Late
    fusion attends within each modality, which equals two single-modality passes; the same mask in
    the later layers alone is fusion in the first ones (as the author describes it in issue 38).
  - Parameters that never influence the output (`mask_token`) don't exist here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from evf_sam_jax.models.attention import attend, attention_weights
from evf_sam_jax.models.config_checks import (
    check_early_layers,
    check_fusion_and_readout,
    check_multiple,
    check_values,
)
from evf_sam_jax.models.layers import (
    TORCH_NORMAL,
    PatchConv,
    dense,
    gathering,
    gelu_float32,
    layer_norm,
    look_up,
    scanned,
    split_by_batch,
)

Fusion = Literal["text", "late", "early"]
Readout = Literal["image_cls", "text_cls", "image_mean", "concat"]
# What can be read out: only what the phrase has reached; the usual one first.
READOUTS = {
    "early": ("image_cls", "text_cls", "image_mean", "concat"),
    "late": ("concat", "text_cls"),
    "text": ("text_cls",),
}

LAYER_NORM_EPSILON = 1e-5  # torchscale architecture/config.py
POSITION_OFFSET = 2  # fairseq: rows 0 and 1 of both position tables are never used


@dataclasses.dataclass(frozen=True)
class Beit3Config:
    """Sizes of a BEiT-3 encoder, and how it fuses image and text.

    Attributes:
      fusion: `early`: all tokens attend to each other; `late`: each modality to itself; `text`:
        there is no image.
      early_layers: with early fusion, in how many of the first layers the modalities attend to each
        other (paper Table 3, "L1-12"); None: in all of them. 0 equals late fusion, read-outs
        included.
      readout: the prompt feature: the image [CLS] token (the released models), the text's `<s>`,
        the mean of the patch tokens, or image [CLS] and `<s>` concatenated.
      concat: along channels into one prompt token, or as two tokens; the paper does not say.
      init_stddev: of the truncated normal that draws weights where no checkpoint is loaded.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes of each layer, see `REMAT`.
    """

    width: int
    heads: int
    layers: int
    mlp_width: int
    vocab_size: int = 64010
    image_size: int = 224
    patch_size: int = 16
    max_text_positions: int = 1024
    fusion: Fusion = "early"
    early_layers: int | None = None
    readout: Readout = "image_cls"
    concat: Literal["channels", "tokens"] = "channels"
    init_stddev: float = 0.02
    dtype: str = "bfloat16"
    remat: bool | str = False

    family: ClassVar[str] = "beit3"
    readouts: ClassVar[Mapping[str, tuple[str, ...]]] = READOUTS

    def __post_init__(self) -> None:
        """Raises UserError for values that no model can have."""
        check_values(self, "encoder")
        check_fusion_and_readout(self, self.readouts, self.early_layers)
        check_early_layers(self.early_layers, self.fusion, self.layers)
        check_multiple(self, "encoder", "width", "heads")
        check_multiple(self, "encoder", "image_size", "patch_size")

    @classmethod
    def base(cls) -> "Beit3Config":
        """`beit3_base_patch16_224`."""
        return cls(width=768, heads=12, layers=12, mlp_width=3072)

    @classmethod
    def large(cls) -> "Beit3Config":
        """`beit3_large_patch16_224`, the encoder of the released EVF-SAM models."""
        return cls(width=1024, heads=16, layers=24, mlp_width=4096)

    @classmethod
    def tiny(cls) -> "Beit3Config":
        """An encoder for tests."""
        return cls(
            width=64,
            heads=4,
            layers=3,
            mlp_width=128,
            vocab_size=128,
            image_size=32,
            patch_size=8,
            max_text_positions=32,
            init_stddev=0.1,
            dtype="float32",
        )

    @property
    def image_kind(self) -> str:
        """How the host prepares the image, see `data_pipelines.tower_images.ENCODER`."""
        return "beit3"

    @property
    def patches(self) -> int:
        """Number of image patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def max_text_tokens(self) -> int:
        """The longest phrase, `<s>` and `</s>` included, that the text positions can hold."""
        return self.max_text_positions - POSITION_OFFSET

    @property
    def prompt_width(self) -> int:
        """Channels of a prompt feature."""
        return 2 * self.width // self.prompt_tokens if self.readout == "concat" else self.width

    @property
    def prompt_tokens(self) -> int:
        """Prompt features of a phrase."""
        return 2 if self.readout == "concat" and self.concat == "tokens" else 1


# Image tokens ([CLS] first) and text tokens; None where the modality is absent.
Streams = tuple[Float[Array, "n _ d"] | None, Float[Array, "n _ d"] | None]
BRANCHES = ("vision", "text")

# Which tokens of each modality are computed; None: none.
Kept = tuple[slice | None, slice | None]
ALL_TOKENS: Kept = (slice(None), slice(None))


def each(function: Callable[[str, Array], Array], streams: Streams) -> Streams:
    """Applies `function(branch, tokens)` to each modality that is there."""
    vision, text = streams
    return (
        None if vision is None else function("vision", vision),
        None if text is None else function("text", text),
    )


class MultiwayDense(nn.Module):
    """A Linear layer of its own for each modality."""

    config: Beit3Config
    features: int

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        stddev = self.config.init_stddev
        init = nn.initializers.truncated_normal(stddev, lower=-1.0, upper=1.0)
        return each(
            lambda name, x: dense(name, self.features, self.config.dtype, True, init)(x), streams
        )


class MultiwayNorm(nn.Module):
    """A LayerNorm of its own for each modality."""

    config: Beit3Config

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        return each(
            lambda name, x: layer_norm(name, LAYER_NORM_EPSILON, self.config.dtype)(x), streams
        )


class FeedForward(nn.Module):
    """One modality's expert: fc1, GELU, LayerNorm over the hidden width (sub-LN), fc2."""

    config: Beit3Config

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        config = self.config
        init = nn.initializers.truncated_normal(config.init_stddev, lower=-1.0, upper=1.0)
        x = dense("fc1", config.mlp_width, config.dtype, True, init)(x)
        x = layer_norm("ffn_layernorm", LAYER_NORM_EPSILON, config.dtype)(gelu_float32(x))
        return dense("fc2", config.width, config.dtype, True, init)(x)


class MultiwayFeedForward(nn.Module):
    """A feed-forward expert of its own for each modality."""

    config: Beit3Config

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        return each(lambda name, x: FeedForward(self.config, name=name)(x), streams)


def split_heads(x: Float[Array, "n t d"], heads: int) -> Float[Array, "n t h c"]:
    """Splits the channels of each token into heads."""
    return x.reshape(*x.shape[:2], heads, -1)


class MultiwaySelfAttention(nn.Module):
    """Attention over all tokens; only the projections are each modality's own."""

    config: Beit3Config

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        queries: Streams,
        text_valid: Bool[Array, "n t"],
        together: Bool[Array, ""],
    ) -> Streams:
        """Attends from `queries` (tokens of `streams`, or fewer) to all tokens of `streams`."""
        config = self.config
        q = MultiwayDense(config, config.width, name="q_proj")(queries)
        k = MultiwayDense(config, config.width, name="k_proj")(streams)
        v = MultiwayDense(config, config.width, name="v_proj")(streams)
        present = {
            name: (keys, values, text_valid if name == "text" else jnp.ones(keys.shape[:2], bool))
            for name, keys, values in zip(BRANCHES, k, v, strict=True)
            if keys is not None and values is not None
        }

        if config.fusion == "late":
            context = each(lambda name, asking: self.attend(asking, *present[name]), q)
        else:
            asking = jnp.concatenate([x for x in q if x is not None], axis=1)
            keys, values, valid = (
                jnp.concatenate(x, axis=1) for x in zip(*present.values(), strict=True)
            )
            allowed = None
            if config.early_layers is not None:
                allowed = together | (text_tokens(q)[:, None] == text_tokens(streams)[None])
            joint = self.attend(asking, keys, values, valid, allowed)
            split = 0 if q[0] is None else q[0].shape[1]
            context = each(
                lambda name, _: joint[:, :split] if name == "vision" else joint[:, split:], q
            )
        context = MultiwayNorm(config, name="inner_attn_ln")(context)
        return MultiwayDense(config, config.width, name="out_proj")(context)

    def attend(
        self,
        q: Float[Array, "n a d"],
        k: Float[Array, "n s d"],
        v: Float[Array, "n s d"],
        valid: Bool[Array, "n s"],
        allowed: Bool[Array, "a s"] | None = None,
    ) -> Float[Array, "n a d"]:
        q, k, v = (split_heads(x, self.config.heads) for x in (q, k, v))
        context = attend(q, k, v, scale=q.shape[-1] ** -0.5, key_valid=valid, allowed=allowed)
        return context.reshape(*context.shape[:2], -1)


def text_tokens(streams: Streams) -> Bool[Array, " s"]:
    """Returns which of the tokens, in the order of attention, are of the text."""
    vision, text = (0 if x is None else x.shape[1] for x in streams)
    return jnp.concatenate([jnp.zeros(vision, bool), jnp.ones(text, bool)])


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    config: Beit3Config

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        text_valid: Bool[Array, "n t"],
        together: Bool[Array, ""],
        keep: Kept = ALL_TOKENS,
    ) -> tuple[Streams, None]:
        """Returns the tokens that `keep` names of each modality (None: no token of it).

        Args:
          together: whether the modalities attend to each other, where `early_layers` leaves it to
            the layer.
        """

        def kept(pair: Streams) -> Streams:
            vision, text = pair
            return (
                None if vision is None or keep[0] is None else vision[:, keep[0]],
                None if text is None or keep[1] is None else text[:, keep[1]],
            )

        normed = MultiwayNorm(self.config, name="self_attn_layer_norm")(streams)
        attention = MultiwaySelfAttention(self.config, name="self_attn")
        streams = add(kept(streams), attention(normed, kept(normed), text_valid, together))
        normed = MultiwayNorm(self.config, name="final_layer_norm")(streams)
        streams = add(streams, MultiwayFeedForward(self.config, name="ffn")(normed))
        return each(lambda _, x: split_by_batch(x), streams), None


def add(a: Streams, b: Streams) -> Streams:
    """Adds two pairs of streams of which the same are there."""

    def total(x: Array | None, y: Array | None) -> Array | None:
        return None if x is None or y is None else x + y

    return total(a[0], b[0]), total(a[1], b[1])


class VisionEmbed(nn.Module):
    """Patch embedding with the learned [CLS] token in front."""

    config: Beit3Config

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b v d"]:
        config = self.config
        cls_token = self.param("cls_token", nn.initializers.zeros, (1, 1, config.width))
        x = PatchConv(config.width, config.patch_size, config.dtype, True, name="proj")(image)
        x = x.reshape(x.shape[0], -1, config.width)
        cls_token = jnp.broadcast_to(cls_token.astype(x.dtype), (x.shape[0], 1, config.width))
        return jnp.concatenate([cls_token, x], axis=1)


class Beit3(nn.Module):
    """The multimodal encoder: `(encoder_image, text_ids, text_valid) -> prompt features`."""

    config: Beit3Config

    def setup(self) -> None:
        config = self.config
        self.text_embed = nn.Embed(
            config.vocab_size,
            config.width,
            param_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(config.width**-0.5),
        )
        self.text_positions = nn.Embed(
            config.max_text_positions,
            config.width,
            param_dtype=jnp.float32,
            embedding_init=TORCH_NORMAL,
        )
        if config.fusion != "text":
            self.vision_embed = VisionEmbed(config)
            self.vision_positions = nn.Embed(
                POSITION_OFFSET + 1 + config.patches,
                config.width,
                param_dtype=jnp.float32,
                embedding_init=TORCH_NORMAL,
            )
        layer = scanned(Layer, config.remat)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] (Flax forgets it)
            length=config.layers - 1,
        )(config)
        self.last_layer = gathering(Layer)(config)
        self.layer_norm = MultiwayNorm(config)

    def __call__(
        self,
        encoder_image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b k l"],
        text_valid: Bool[Array, "b k l"],
        image_valid: Bool[Array, "b h w"] | None = None,
    ) -> Float[Array, "b k t d"]:
        """Returns the prompt features of each phrase with its image, as `readout` says.

        All of an image counts: `image_valid` is for encoders whose images differ in size.
        """
        readout = self.config.readout
        keep = READOUT_TOKENS[readout]
        if self.is_initializing():  # also what is not read out
            self.encode(encoder_image, text_ids, text_valid)
        vision, text = self.encode(encoder_image, text_ids, text_valid, keep)
        if readout == "image_mean":
            assert vision is not None, "the mean of the patches needs an image"
            feature = vision[:, 1:].mean(axis=1, keepdims=True, dtype=jnp.float32)
        else:
            axis = 1 if self.config.prompt_tokens == 2 else -1
            feature = jnp.concatenate([x for x in (vision, text) if x is not None], axis=axis)
        return feature.reshape(*text_ids.shape[:2], *feature.shape[1:])

    def encode(
        self,
        encoder_image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b k l"],
        text_valid: Bool[Array, "b k l"],
        keep: Kept = ALL_TOKENS,
    ) -> Streams:
        """Returns the final tokens of both modalities, [b*k, tokens, d] each.

        Args:
          encoder_image: normalised (mean 0.5, std 0.5).
          text_ids: right-padded.
          text_valid: false at padding: zeroed before the first layer, never attended to.
          keep: which tokens to compute in the last layer; None: none of that modality.
        """
        config = self.config
        k = text_ids.shape[1]
        text_ids = text_ids.reshape(-1, text_ids.shape[-1])
        text_valid = text_valid.reshape(text_ids.shape)
        text = look_up(self.text_embed.embedding, text_ids)
        text = text + positions(self.text_positions, text.shape[1])[None]
        text = jnp.where(text_valid[..., None], text, 0.0).astype(config.dtype)
        vision = None
        if config.fusion != "text":
            vision = self.vision_embed(encoder_image)
            vision = vision + positions(self.vision_positions, vision.shape[1])[None]
            vision = jnp.repeat(vision.astype(config.dtype), k, axis=0)
        streams = each(lambda _, x: split_by_batch(x), (vision, text))
        fused = config.early_layers
        together = jnp.arange(config.layers) < (config.layers if fused is None else fused)
        streams, _ = self.layers(streams, text_valid, together[:-1])
        streams, _ = self.last_layer(streams, text_valid, together[-1], keep)
        return self.layer_norm(streams)


READOUT_TOKENS = {
    "image_cls": (slice(0, 1), None),
    "text_cls": (None, slice(0, 1)),
    "image_mean": (slice(None), None),
    "concat": (slice(0, 1), slice(0, 1)),
}


def final_tokens(
    config: Beit3Config,
    params: Mapping[str, Any],
    encoder_image: Float[Array, "b h w 3"],
    text_ids: Int[Array, "b k l"],
    text_valid: Bool[Array, "b k l"],
) -> Streams:
    """Returns all image tokens ([CLS] first) and text tokens of each phrase, n = b k."""
    inputs = (encoder_image, text_ids, text_valid)
    return Beit3(config).apply({"params": params}, *inputs, method=Beit3.encode)  # pyright: ignore


# Whose outputs `_attention_to_patches` is computed from.
_LAST_PROJECTIONS = {name: ("last_layer", "self_attn", f"{name}_proj") for name in ("q", "k")}


def image_cls_attention(
    config: Beit3Config,
    params: Mapping[str, Any],
    encoder_image: Float[Array, "b h w 3"],
    text_ids: Int[Array, "b k l"],
    text_valid: Bool[Array, "b k l"],
) -> Float[Array, "b k g g"]:
    """Returns how much the image's [CLS] attends to each patch in the last layer.

    Summed over heads (paper Figure 5). The last layer's queries and keys are caught as they pass,
    so that nothing of the model knows of this.
    """

    def is_last_projection(module: nn.Module, _: str) -> bool:
        return module.path in _LAST_PROJECTIONS.values()

    _, caught = Beit3(config).apply(
        {"params": params},
        encoder_image,
        text_ids,
        text_valid,
        READOUT_TOKENS["image_cls"],
        method=Beit3.encode,
        capture_intermediates=is_last_projection,
        mutable="intermediates",
    )

    def output(path: tuple[str, ...]) -> Streams:
        calls: Any = caught["intermediates"]
        for name in path:
            calls = calls[name]
        [streams] = calls["__call__"]
        return streams

    found = _attention_to_patches(
        config,
        output(_LAST_PROJECTIONS["q"]),
        output(_LAST_PROJECTIONS["k"]),
        text_valid.reshape(-1, text_valid.shape[-1]),
    )
    return found.reshape(*text_ids.shape[:2], *found.shape[1:])


def _attention_to_patches(
    config: Beit3Config, q: Streams, k: Streams, text_valid: Bool[Array, "n t"]
) -> Float[Array, "n g g"]:
    """Returns the attention of `image_cls_attention`, n = b k.

    Args:
      q: the last layer's queries, of the image [CLS] alone.
      k: its keys, of all tokens.
    """
    vision, text = k
    assert q[0] is not None and vision is not None, "the attention to an image needs an image"
    keys, valid = [vision], [jnp.ones(vision.shape[:2], bool)]
    # Where `early_layers` leaves out the last one, it attends to the image alone.
    together = config.fusion == "early" and config.early_layers in (None, config.layers)
    if together and text is not None:
        keys, valid = [vision, text], [*valid, text_valid]
    query, key = (split_heads(x, config.heads) for x in (q[0], jnp.concatenate(keys, axis=1)))
    weights = attention_weights(
        query, key, scale=query.shape[-1] ** -0.5, key_valid=jnp.concatenate(valid, axis=1)
    )
    patches = weights[:, :, 0, 1 : vision.shape[1]].sum(axis=1)
    side = config.image_size // config.patch_size
    return patches.reshape(-1, side, side)


def positions(table: nn.Embed, tokens: Any) -> Float[Array, "t d"]:
    """Returns the positions of the first `tokens` tokens: a number or, in an export, a symbol."""
    return table.embedding[POSITION_OFFSET : POSITION_OFFSET + tokens]
