"""EfficientSAM's prompt encoder and mask decoder.

Reference: yformer/EfficientSAM at d525f62, `efficient_sam/efficient_sam_decoder.py`, and
`EfficientSam.predict_masks` of `efficient_sam/efficient_sam.py`, which fills prompts up.

Differences:
  - Those of `models/sam/prompt_encoder.py` and `models/sam/mask_decoder.py`.
  - Boxes are given as such; the original takes their corners as points of labels 2 and 3.
  - The original leaves out points beyond the sixth.
"""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.efficient_sam.two_way_transformer import TwoWayTransformer
from evf_sam_jax.models.interfaces import Prompts
from evf_sam_jax.models.layers import TORCH_NORMAL, PatchTranspose, gelu_float32
from evf_sam_jax.models.sam import mask_decoder, transformer
from evf_sam_jax.models.sam.prompt_encoder import PositionEmbedding

NO_POINT, INSIDE, TOP_LEFT, BOTTOM_RIGHT = -1, 1, 2, 3
LABELS = (NO_POINT, INSIDE, TOP_LEFT, BOTTOM_RIGHT)  # rows of `point_embeddings`
# Where the original puts what fills up a prompt.
NOWHERE = -1.0
GROUP_NORM_EPSILON = 1e-5  # torch's default


class PromptEncoder(nn.Module):
    """Prompts to tokens; there is no dense map, and no mask can be a prompt."""

    config: EfficientSamConfig

    def setup(self) -> None:
        self.pe_layer = PositionEmbedding(self.config)
        shape = (len(LABELS), self.config.out_channels)
        self.point_embeddings = self.param("point_embeddings", TORCH_NORMAL, shape)

    def __call__(
        self, prompts: Prompts
    ) -> tuple[Float[Array, "b k t c"], Bool[Array, "b k t"] | None]:
        """Returns tokens (points, box corners, what fills these up, text) and which are valid.

        Text stands alone. Points and boxes are filled up to `filled_points` by places that are not
        a point; unlike SAM's these keep the encoding of where they are, outside the frame.

        Raises ValueError for a mask, for no prompt at all, or for points without labels.
        """
        if prompts.mask is not None:
            raise ValueError("EfficientSAM takes no mask as a prompt")
        places, labels = [], []
        if prompts.points is not None:
            if prompts.point_labels is None:
                raise ValueError("points need point_labels")
            places.append(prompts.points.astype(jnp.float32))
            labels.append(prompts.point_labels)
        if prompts.boxes is not None:
            b, k = prompts.boxes.shape[:2]
            places.append(prompts.boxes.astype(jnp.float32).reshape(b, k, 2, 2))
            corners = jnp.asarray([TOP_LEFT, BOTTOM_RIGHT])[None, None]
            labels.append(jnp.broadcast_to(corners, (b, k, 2)))
        tokens, valid = [], prompts.token_valid
        if places:
            points, label = jnp.concatenate(places, axis=2), jnp.concatenate(labels, axis=2)
            given = None if valid is None else valid[..., : label.shape[2]]
            points, label, counted = self.fill_up(points, label, given)
            tokens.append(self.encode_points(points, label))
            if valid is not None and given is not None and counted is not None:
                valid = jnp.concatenate([counted, valid[..., given.shape[2] :]], axis=2)
        if prompts.text is not None:
            tokens.append(prompts.text.astype(jnp.float32))
        if not tokens:
            raise ValueError("a prompt needs text, points or a box")
        return jnp.concatenate(tokens, axis=2), valid

    def dense_positions(self) -> Float[Array, "g g c"]:
        """Returns the positional encoding of every cell of the image embedding."""
        return self.pe_layer.of_cells(self.config.grid)

    def fill_up(
        self,
        points: Float[Array, "b k n 2"],
        labels: Int[Array, "b k n"],
        valid: Bool[Array, "b k n"] | None,
    ) -> tuple[Float[Array, "b k m 2"], Int[Array, "b k m"], Bool[Array, "b k m"] | None]:
        """Adds places that are not a point, until there are `filled_points` with those given.

        Where some of `points` are not valid, how many that takes differs by prompt.
        """
        n, full = points.shape[2], self.config.filled_points
        # A prompt that has neither points nor a box has nothing to fill up.
        places = max(0, full - n) if valid is None else full - 1
        added = ((0, 0), (0, 0), (0, places))
        if valid is not None:
            count = valid.sum(axis=-1, keepdims=True)
            # What already stands for no point gives way to points.
            valid = valid & ((labels != NO_POINT) | (count <= full))
            missing = jnp.where(count > 0, full - count, 0)
            valid = jnp.concatenate([valid, jnp.arange(places)[None, None] < missing], axis=-1)
        points = jnp.pad(points, (*added, (0, 0)), constant_values=NOWHERE)
        return points, jnp.pad(labels, added, constant_values=NO_POINT), valid

    def encode_points(
        self, points: Float[Array, "b k n 2"], labels: Int[Array, "b k n"]
    ) -> Float[Array, "b k n c"]:
        """Encodes points by label; a label beyond `LABELS` keeps the bare encoding of its place.

        So does 0: the original knows no points outside the object.
        """
        encoded = self.pe_layer((points + 0.5) / self.config.image_size)  # centre of the pixel
        embeddings = self.point_embeddings.astype(jnp.float32)
        for label, embedding in zip(LABELS, embeddings, strict=True):
            own = jnp.where((labels == label)[..., None], embedding[None, None, None], 0.0)
            encoded = encoded + own
        return encoded


class OutputUpscaling(nn.Module):
    """The image embedding at four times its resolution; its norm is over all pixels of a prompt."""

    config: EfficientSamConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n g g c"]) -> Float[Array, "n 4*g 4*g d"]:
        config = self.config
        x = PatchTranspose(config.out_channels // 4, config.dtype, name="conv1")(x)
        # torch's GroupNorm of one group.
        x = nn.LayerNorm(
            epsilon=GROUP_NORM_EPSILON,
            reduction_axes=(-3, -2, -1),
            feature_axes=-1,
            dtype=config.dtype,
            param_dtype=jnp.float32,
            use_fast_variance=False,
            force_float32_reductions=True,
            name="norm",
        )(x)
        x = gelu_float32(x)
        return gelu_float32(PatchTranspose(config.out_channels // 8, config.dtype, name="conv2")(x))


class MaskDecoder(mask_decoder.MaskDecoder):
    """Predicts one mask a prompt, or several alternatives."""

    activation: ClassVar[str] = "gelu"
    transformer_type: ClassVar[type[transformer.TwoWayTransformer]] = TwoWayTransformer
    upscaling_type: ClassVar[type[nn.Module]] = OutputUpscaling
