"""What every multimodal encoder and every promptable segmenter offers, whatever its family.

Everything is [b, k, ...]: b images with k prompts (phrases) each. Only encoders repeat images.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """What a segmenter keeps of an image: computed once, decoded with any number of prompts.

    Attributes:
      embedding: features at the coarsest scale, g = image size / patch size.
      high_res: finer features that some decoders add while upscaling (SAM-2), finest first.
    """

    # *b: a map over images sees them one at a time, without the axis.
    embedding: Float[Array, "*b g g c"]
    high_res: tuple[Float[Array, "*b _ _ _"], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of b images with k prompts each; a prompt combines whatever is not None.

    Attributes:
      text: projected prompt features, one or more tokens a prompt.
      points: (x, y) in pixels of the segmenter's frame (the resized image), with `point_labels`.
      point_labels: 1 inside the object, 0 outside, -1 not a point.
      boxes: (x0, y0, x1, y1) in pixels of the segmenter's frame.
      mask: logits of an earlier mask, at the decoder's low resolution.
      token_valid: false at tokens that fill up a prompt and shall be as if they were not there;
        s counts points (and one more where no box follows), two corners a box, then text.
    """

    text: Float[Array, "b k t c"] | None = None
    points: Float[Array, "b k n 2"] | None = None
    point_labels: Int[Array, "b k n"] | None = None
    boxes: Float[Array, "b k 4"] | None = None
    mask: Float[Array, "b k l l"] | None = None
    token_valid: Bool[Array, "b k s"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskPrediction:
    """Masks of each prompt: m = 1, or 3 alternatives where several masks were asked for.

    Attributes:
      low_res_logits: positive inside; l = 4 g.
      iou: the decoder's own estimate of each mask's IoU.
      object_score: positive where the object is there at all, of a decoder that says so (SAM-2);
        masks don't depend on it.
    """

    low_res_logits: Float[Array, "b k m l l"]
    iou: Float[Array, "b k m"]
    object_score: Float[Array, "b k"] | None = None


@runtime_checkable
class EncoderConfig(Protocol):
    """The configuration of a multimodal encoder, a frozen dataclass.

    Its module is `Module(config)` with
    `__call__(encoder_image [b,h,w,3], text_ids [b,k,l], text_valid [b,k,l], image_valid [b,h,w] |
    None) -> [b,k,t,d]`: the prompt features of each phrase with its image.

    Attributes:
      family: its name in `families.ENCODERS`.
      image_kind: how the host prepares its image, one of `data_pipelines.tower_images.ENCODER`.
      readouts: what can be read out with each fusion that it can do, the usual one first.
      image_size: side of that image; of one that is padded, what its shorter side becomes.
      fusion: how image and text meet; "text": there is no image.
      readout: what is read out of the tokens.
      width: channels of its tokens.
      prompt_width: d, channels of a prompt feature.
      prompt_tokens: t, features a phrase.
      max_text_tokens: the longest phrase, begin and end included.
      vocab_size: rows of the text embedding.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes of each layer, see `config_checks.REMAT`.
    """

    family: ClassVar[str]
    readouts: ClassVar[Mapping[str, tuple[str, ...]]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def image_kind(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def fusion(self) -> str: ...
    @property
    def readout(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def prompt_width(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def max_text_tokens(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def remat(self) -> bool | str: ...


@runtime_checkable
class SegmenterConfig(Protocol):
    """The configuration of a promptable segmenter, a frozen dataclass.

    Its module is `Module(config, profile)` with `encode_image(image uint8 [b,s,s,3], size [b,2]) ->
    ImageFeatures`, `finish(ImageFeatures) -> ImageFeatures`, `dense_positions() -> [g,g,c]` and
    `decode(features, prompts, multimask, train, positions=None) -> MaskPrediction`. `decode` takes
    what `finish` makes of what `encode_image` returns, which is as far as features can be cached
    where `finish` is trained; and what `dense_positions` returns, or computes it itself.

    Attributes:
      family: its name in `families.SEGMENTERS`.
      stretches: whether an image fills the square frame whatever its sides, so that a mask is
        resized to it at once; otherwise the longer side fills it, and masks are cropped.
      mask_prompts: whether an earlier mask can be a prompt.
      outside_points: whether a point can say what is not meant.
      finishing: regex of the parameters of `finish`, "" if it has none; the image encoder's others
        are those of `encode_image`.
      image_size: s, side of the frame in pixels.
      low_res_size: l, side of the decoder's masks.
      out_channels: channels of a prompt token.
      dtype: of activations and matrix products of the image encoder.
      remat: what the backward pass recomputes of each block, see `config_checks.REMAT`.
      encoder_chunk: images encoded at a time, None: all of them; on a mesh, those of all its
        devices together.
    """

    family: ClassVar[str]
    stretches: ClassVar[bool]
    mask_prompts: ClassVar[bool]
    outside_points: ClassVar[bool]
    finishing: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def image_size(self) -> int: ...
    @property
    def low_res_size(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def remat(self) -> bool | str: ...
    @property
    def encoder_chunk(self) -> int | None: ...
