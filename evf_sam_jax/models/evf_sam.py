"""EVF-SAM: a multimodal encoder, a projector and a promptable segmenter, as pure functions.

Reference: hustvl/EVF-SAM at 9935dc5, `model/evf_sam.py`; paper section 3.

Everything outside this package sees `params`, a nested dict of arrays with the entries `encoder`,
`projector` and `segmenter`, and the functions below; a function needs only the entries it uses.

Differences:
  - Padding of the text is always masked; the original's `inference()` attends to it.
  - Several images with several phrases each, without a loop over images.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from evf_sam_jax.errors import UserError
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.config_checks import check_choice
from evf_sam_jax.models.families import (
    attention_of,
    checked_keys,
    make_encoder,
    make_segmenter,
    tower_from_dict,
    tower_to_dict,
)
from evf_sam_jax.models.interfaces import (
    EncoderConfig,
    ImageFeatures,
    MaskPrediction,
    Prompts,
    SegmenterConfig,
)
from evf_sam_jax.models.layers import Mlp, gathering
from evf_sam_jax.models.sam.config import SamConfig

Params = dict[str, Any]

# Of preprocessing and decoding: checkpoints from before and after hustvl/EVF-SAM's commit 9d00853.
# With a SAM ViT both mean the same.
PROFILES = ("current", "legacy")


@dataclasses.dataclass(frozen=True)
class EvfSamConfig:
    """Which encoder, which segmenter, and the profile of the weights.

    Attributes:
      profile: of preprocessing and decoding, one of `PROFILES`.
      projector_width: of the projector's hidden layer; None: as wide as its input, as in the
        original.
    """

    encoder: EncoderConfig
    segmenter: SegmenterConfig
    profile: str = "current"
    projector_width: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a profile that there is none of."""
        check_choice("model.profile", self.profile, PROFILES)
        width = self.projector_width
        if width is not None and not (isinstance(width, int) and width > 0):
            raise UserError(
                f"model.projector_width: expected None or a positive integer, found {width!r}"
            )

    def module(self) -> nn.Module:
        """The model as a Flax module with the methods of `EvfSam`."""
        return EvfSam(self)

    def in_floats(self, params: Params) -> Params:
        """The parameters as arrays of floats, some of which may be stored otherwise."""
        return params

    @classmethod
    def tiny(cls) -> "EvfSamConfig":
        """A model for tests."""
        return cls(Beit3Config.tiny(), SamConfig.tiny())

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serialisable dict that `from_dict` reads."""
        towers = {"encoder": self.encoder, "segmenter": self.segmenter}
        rest = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in towers
        }
        return {name: tower_to_dict(tower) for name, tower in towers.items()} | rest

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EvfSamConfig":
        """Raises UserError if a key is unknown or missing."""
        values = checked_keys(cls, values, "model")
        for tower in ("encoder", "segmenter"):
            values[tower] = tower_from_dict(tower, values[tower])
        return cls(**values)


def padded_frame(config: EvfSamConfig) -> int | None:
    """Side of the frame that images are padded to; None if they are stretched to all of it."""
    return None if config.segmenter.stretches else config.segmenter.image_size


# What a tensor of matrix products is called; all others (norms, biases, positional encodings, the
# neck, the mask decoder) stay float32 in a bfloat16 model: they are small, and rounding them costs
# accuracy.
MATRICES = (
    r"(encoder|projector|segmenter/image_encoder/(?!neck/).*)/.*kernel|encoder/text_embed/embedding"
)


def with_dtype(config: EvfSamConfig, dtype: str) -> EvfSamConfig:
    """Returns `config` with activations and matrix products of both towers in `dtype`."""
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, dtype=dtype),
        segmenter=dataclasses.replace(config.segmenter, dtype=dtype),
    )


def param_dtype(path: str, dtype: str) -> str:
    """What the parameter at `path` is kept in by a model for inference in `dtype`."""
    return dtype if re.fullmatch(MATRICES, path) else "float32"


class EvfSam(nn.Module):
    """The whole model as one Flax module; use the functions below."""

    config: EvfSamConfig

    def setup(self) -> None:
        encoder, channels = self.config.encoder, self.config.segmenter.out_channels
        self.encoder = make_encoder(encoder)
        widths = (self.config.projector_width or encoder.prompt_width, channels)
        self.projector = gathering(Mlp)(widths, "relu", encoder.dtype, ("hidden", "out"))
        self.segmenter = make_segmenter(self.config.segmenter, self.config.profile)

    def encode_image(self, sam_image, sam_size, finished=True) -> ImageFeatures:
        features = self.segmenter.encode_image(sam_image, sam_size)
        return self.segmenter.finish(features) if finished else features

    def finish_features(self, features) -> ImageFeatures:
        return self.segmenter.finish(features)

    def encode_phrases(self, encoder_image, text_ids, text_valid) -> Float[Array, "b k t c"]:
        # A fourth channel says what is inside, where images differ in size.
        pixels, inside = encoder_image[..., :3], encoder_image[..., 3:]
        valid = inside[..., 0] > 0.5 if inside.shape[-1] else None
        return self.projector(self.encoder(pixels, text_ids, text_valid, valid))

    def dense_positions(self) -> Float[Array, "g g c"]:
        return self.segmenter.dense_positions()

    def decode(self, features, prompts, multimask, train, positions=None) -> MaskPrediction:
        return self.segmenter.decode(features, prompts, multimask, train, positions)

    def touch_all_parameters(self) -> None:
        """Reaches every parameter once, so that initialisation creates all of them."""
        encoder, segmenter = self.config.encoder, self.config.segmenter
        image = jnp.zeros((1, encoder.image_size, encoder.image_size, 3), jnp.float32)
        ids, valid = jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1, 2), bool)
        text = self.encode_phrases(image, ids, valid)
        side, low = segmenter.image_size, segmenter.low_res_size
        features = self.encode_image(
            jnp.zeros((1, side, side, 3), jnp.uint8), jnp.full((1, 2), side, jnp.int32)
        )
        prompts = Prompts(
            text=text,
            points=jnp.zeros((1, 1, 1, 2), jnp.float32),
            point_labels=jnp.ones((1, 1, 1), jnp.int32),
            boxes=jnp.zeros((1, 1, 4), jnp.float32),
            mask=jnp.zeros((1, 1, low, low), jnp.float32) if segmenter.mask_prompts else None,
        )
        self.decode(features, prompts, multimask=False, train=False)
        self.decode(features, Prompts(text=text), multimask=False, train=False)


# To optimise a program that runs once takes longer than it saves.
RUNS_ONCE = {"xla_backend_optimization_level": 0}


def init_params(config: EvfSamConfig, rng: Array) -> Params:
    """Returns random float32 parameters, drawn as the original draws them without a checkpoint."""
    return jax.jit(functools.partial(draw_params, config), compiler_options=RUNS_ONCE)(rng)


@functools.lru_cache(maxsize=8)  # tracing a model takes seconds, and several steps ask
def param_shapes(config: EvfSamConfig) -> Params:
    """Returns the parameter tree as `jax.ShapeDtypeStruct`s, spending no memory on it.

    It is the same tree each time, which nobody changes.
    """
    return jax.eval_shape(functools.partial(draw_params, config), jax.random.key(0))


def draw_params(config: EvfSamConfig, rng: Array) -> Params:
    """`init_params`, to be compiled as a part of something else."""
    variables: Any = EvfSam(config).init(rng, method=EvfSam.touch_all_parameters)
    return variables["params"]


def _apply(config: EvfSamConfig, params: Params, method: Callable[..., Any], *inputs: Any) -> Any:
    # By name: a module may have another method of that name.
    return config.module().apply({"params": params}, *inputs, method=method.__name__)


def encode_image(
    config: EvfSamConfig,
    params: Params,
    sam_image: UInt8[Array, "b s s 3"],
    sam_size: Int[Array, "b 2"],
    finished: bool = True,
) -> ImageFeatures:
    """Encodes images for the segmenter, `encoder_chunk` at a time. Uses params["segmenter"].

    Each chunk takes images at equal distances, so that where the batch is split over devices, every
    chunk has images of each; neither they nor their features move.

    Args:
      sam_image: in the segmenter's frame as `TowerImages.segmenter` brings it there, padded or
        stretched; not normalised.
      sam_size: height and width of the content, the frame's where it is stretched.
      finished: whether they are for `decode`; otherwise what `finish_features` does is left out.
    """

    def encode(image: UInt8[Array, "b s s 3"], size: Int[Array, "b 2"]) -> ImageFeatures:
        return _apply(config, params, EvfSam.encode_image, image, size, finished)

    images, chunk = sam_image.shape[0], config.segmenter.encoder_chunk
    # The fewest chunks of one size, none larger than asked for.
    chunks = 1 if chunk is None else next(n for n in range(1, images + 1) if images <= n * chunk)
    while images % chunks:
        chunks += 1
    if chunks == 1:
        return encode(sam_image, sam_size)
    by_chunk = jax.tree.map(lambda x: split_strided(x, chunks), (sam_image, sam_size))
    features = jax.lax.map(lambda pair: encode(*pair), by_chunk)
    return jax.tree.map(join_strided, features)


def finish_features(config: EvfSamConfig, params: Params, features: ImageFeatures) -> ImageFeatures:
    """Completes the features of `encode_image(finished=False)`. Uses params["segmenter"].

    A few parameters that the original counts to the decoder, and trains with it, are applied to an
    image once (`SegmenterConfig.finishing`); most segmenters have none.
    """
    return _apply(config, params, EvfSam.finish_features, features)


def split_strided(x: Array, parts: int) -> Array:
    """[b, ...] -> [parts, b / parts, ...]: part j has the rows j, j + parts, j + 2 parts, ..."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def join_strided(x: Array) -> Array:
    """The inverse of `split_strided`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def encode_phrases(
    config: EvfSamConfig,
    params: Params,
    encoder_image: Float[Array, "b h w _"],
    text_ids: Int[Array, "b k l"],
    text_valid: Bool[Array, "b k l"],
) -> Float[Array, "b k t c"]:
    """Returns the prompt of each phrase with its image. Uses params["encoder"] and ["projector"].

    Args:
      encoder_image: normalised for the multimodal encoder; where images differ in size, a fourth
        channel is 1 inside and 0 at what fills up.
      text_ids: token ids, right-padded.
      text_valid: false at padding.
    """
    return _apply(config, params, EvfSam.encode_phrases, encoder_image, text_ids, text_valid)


def image_cls_attention(
    config: EvfSamConfig,
    params: Params,
    encoder_image: Float[Array, "b h w _"],
    text_ids: Int[Array, "b k l"],
    text_valid: Bool[Array, "b k l"],
) -> Float[Array, "b k g g"]:
    """Returns how much the image [CLS] attends to each patch, see the encoder's own function.

    Of an encoder that has one (`families.attention_of`). Uses params["encoder"].
    """
    attention = attention_of(config.encoder)
    assert attention is not None, "whoever asks has looked whether there is one"
    encoder = config.in_floats(params["encoder"])
    return attention(config.encoder, encoder, encoder_image, text_ids, text_valid)


def dense_positions(config: EvfSamConfig, params: Params) -> Float[Array, "g g c"]:
    """Returns the positional encodings of the features' cells. Uses params["segmenter"].

    They depend on no image and no prompt: whoever decodes often computes them once.
    """
    return _apply(config, params, EvfSam.dense_positions)


def decode(
    config: EvfSamConfig,
    params: Params,
    features: ImageFeatures,
    prompts: Prompts,
    multimask: bool = False,
    train: bool = False,
    positions: Float[Array, "g g c"] | None = None,
) -> MaskPrediction:
    """Decodes k prompts of each image. Uses params["segmenter"].

    Args:
      features: from `encode_image`.
      prompts: any combination of text, points, boxes and masks.
      multimask: three alternatives a prompt instead of one mask.
      train: whether the mask is to be learnt from: some segmenters choose it otherwise then.
      positions: from `dense_positions`; None: computed with the rest.
    """
    return _apply(config, params, EvfSam.decode, features, prompts, multimask, train, positions)
