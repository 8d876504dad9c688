"""SAM's prompt encoder: points, boxes, masks and text become decoder tokens and a dense map.

Reference: hustvl/EVF-SAM at 9935dc5, `model/segment_anything/modeling/prompt_encoder.py`
(facebookresearch/segment-anything at dca509f with a text token added).

Differences:
  - Positional encodings are always computed in float32.
  - Prompts come as [images, prompts per image, ...].
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from evf_sam_jax.models.interfaces import Prompts
from evf_sam_jax.models.layers import TORCH_NORMAL, PatchConv, gelu_float32, layer_norm
from evf_sam_jax.models.sam.config import DecoderConfig, PromptConfig

LAYER_NORM_EPSILON = 1e-6


class PositionEmbedding(nn.Module):
    """Random Fourier features of coordinates in [0, 1]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, coordinates: Float[Array, "*s 2"]) -> Float[Array, "*s c"]:
        """Encodes (x, y)."""
        shape = (2, self.config.out_channels // 2)
        gaussian = self.param(
            "positional_encoding_gaussian_matrix", TORCH_NORMAL, shape, jnp.float32
        )
        # Not a dot product: a TPU would round its inputs to bfloat16, and the phases with them.
        centred = 2.0 * coordinates - 1.0
        gaussian = gaussian.astype(jnp.float32)
        outer = jnp.multiply.outer
        phase = outer(centred[..., 0], gaussian[0]) + outer(centred[..., 1], gaussian[1])
        phase = (2.0 * jnp.pi) * phase
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)

    def of_cells(self, grid: int) -> Float[Array, "g g c"]:
        """Encodes the centre of every cell of a frame of grid x grid."""
        centres = (jnp.arange(grid, dtype=jnp.float32) + 0.5) / grid
        y, x = jnp.meshgrid(centres, centres, indexing="ij")
        return self(jnp.stack([x, y], axis=-1))


class MaskDownscaling(nn.Module):
    """Encodes a mask prompt at a quarter of its resolution."""

    config: PromptConfig

    @nn.compact
    def __call__(self, mask: Float[Array, "n l l 1"]) -> Float[Array, "n g g c"]:
        config = self.config
        x = PatchConv(config.mask_channels // 4, 2, config.dtype, True, name="conv1")(mask)
        x = gelu_float32(layer_norm("norm1", LAYER_NORM_EPSILON, config.dtype)(x))
        x = PatchConv(config.mask_channels, 2, config.dtype, True, name="conv2")(x)
        x = gelu_float32(layer_norm("norm2", LAYER_NORM_EPSILON, config.dtype)(x))
        return PatchConv(config.out_channels, 1, config.dtype, True, name="conv3")(x)


class PromptEncoder(nn.Module):
    """Prompts to sparse tokens and a dense map."""

    config: PromptConfig

    def setup(self) -> None:
        channels = self.config.out_channels
        self.pe_layer = PositionEmbedding(self.config)
        self.point_embeddings = self.param("point_embeddings", TORCH_NORMAL, (4, channels))
        self.not_a_point_embed = self.param("not_a_point_embed", TORCH_NORMAL, (channels,))
        self.no_mask_embed = self.param("no_mask_embed", TORCH_NORMAL, (channels,))
        self.mask_downscaling = MaskDownscaling(self.config)

    def __call__(
        self, prompts: Prompts
    ) -> tuple[Float[Array, "b k t c"], Float[Array, "b k #g #g c"]]:
        """Returns sparse tokens (points, box corners, text) and the dense map (1x1 if constant).

        Points without a box are followed by one more that is not a point; text stands alone.
        Raises ValueError if there is no prompt at all, or points come without labels.
        """
        tokens = []
        if prompts.points is not None:
            if prompts.point_labels is None:
                raise ValueError("points need point_labels")
            tokens.append(
                self.encode_points(prompts.points, prompts.point_labels, prompts.boxes is None)
            )
        if prompts.boxes is not None:
            tokens.append(self.encode_boxes(prompts.boxes))
        if prompts.text is not None:
            tokens.append(prompts.text.astype(jnp.float32))
        if prompts.mask is not None:
            b, k, side, _ = prompts.mask.shape
            dense = self.mask_downscaling(prompts.mask.reshape(b * k, side, side, 1))
            dense = dense.reshape(b, k, *dense.shape[1:])
            if not tokens:
                tokens.append(jnp.zeros((b, k, 0, self.config.out_channels), jnp.float32))
        elif tokens:
            b, k = tokens[0].shape[:2]
            dense = jnp.broadcast_to(self.no_mask_embed, (b, k, 1, 1, self.config.out_channels))
        else:
            raise ValueError("a prompt needs text, points, a box or a mask")
        sparse = jnp.concatenate(tokens, axis=2)
        return sparse.astype(self.config.dtype), dense.astype(self.config.dtype)

    def encode_points(
        self, points: Float[Array, "b k n 2"], labels: Int[Array, "b k n"], pad: bool
    ) -> Float[Array, "b k _ c"]:
        """Encodes points by label; `pad` adds one that is not a point, where no box follows."""
        points = points.astype(jnp.float32) + 0.5  # to the centre of the pixel
        if pad:
            points = jnp.pad(points, ((0, 0), (0, 0), (0, 1), (0, 0)))
            labels = jnp.pad(labels, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        encoded = self.pe_layer(points / self.config.image_size)
        # Any label beyond -1, 0 and 1 keeps the bare positional encoding, as in the original.
        by_label = jnp.stack([self.point_embeddings[0], self.point_embeddings[1]])
        known = (labels == 0) | (labels == 1)
        embedding = jnp.where(known[..., None], by_label[jnp.clip(labels, 0, 1)], 0.0)
        encoded = encoded + embedding.astype(jnp.float32)
        not_a_point = self.not_a_point_embed.astype(jnp.float32)
        return jnp.where((labels == -1)[..., None], not_a_point, encoded)

    def encode_boxes(self, boxes: Float[Array, "b k 4"]) -> Float[Array, "b k _ c"]:
        """Encodes the two corners of each box."""
        corners = boxes.reshape(*boxes.shape[:2], 2, 2) + 0.5
        encoded = self.pe_layer(corners / self.config.image_size)
        return encoded + self.point_embeddings[None, None, 2:4].astype(jnp.float32)

    def dense_positions(self) -> Float[Array, "g g c"]:
        """Returns the positional encoding of every cell of the image embedding."""
        return self.pe_layer.of_cells(self.config.grid)
