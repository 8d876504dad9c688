"""Sizes of an EfficientSAM, one constructor per released checkpoint."""

import dataclasses
from typing import ClassVar

from evf_sam_jax.models.config_checks import check_multiple, check_values


@dataclasses.dataclass(frozen=True)
class EfficientSamConfig:
    """Sizes of an EfficientSAM segmenter.

    Reference: yformer/EfficientSAM at d525f62, `efficient_sam/efficient_sam.py`.

    Attributes:
      width: channels of the image encoder.
      table_size: side of the stored table of positions, in patches; it is resized to the frame's.
      image_size: side of the square frame, in pixels.
      out_channels: channels of the image embedding, and of the mask decoder.
      filled_points: points and corners of boxes that a prompt is filled up to.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes of each block, see `REMAT`.
      encoder_chunk: images encoded at a time; None: all of them. On a mesh, those of all its
        devices together.
    """

    width: int
    heads: int
    depth: int = 12
    table_size: int = 14
    image_size: int = 1024
    patch_size: int = 16
    mlp_ratio: int = 4
    out_channels: int = 256
    filled_points: int = 6
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    iou_head_width: int = 256
    num_multimask: int = 3
    dtype: str = "bfloat16"
    remat: bool | str = False
    encoder_chunk: int | None = 4

    family: ClassVar[str] = "efficient_sam"
    stretches: ClassVar[bool] = True
    mask_prompts: ClassVar[bool] = False
    outside_points: ClassVar[bool] = False
    finishing: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Raises UserError for values that no model can have."""
        check_values(self, "segmenter")
        check_multiple(self, "segmenter", "width", "heads")
        check_multiple(self, "segmenter", "image_size", "patch_size")
        # The decoder's attention splits its channels, or half of them, into heads.
        check_multiple(self, "segmenter", "out_channels", "decoder_heads")

    @classmethod
    def vitt(cls) -> "EfficientSamConfig":
        """`efficient_sam_vitt`."""
        return cls(width=192, heads=3)

    @classmethod
    def vits(cls) -> "EfficientSamConfig":
        """`efficient_sam_vits`."""
        return cls(width=384, heads=6)

    @classmethod
    def tiny(cls) -> "EfficientSamConfig":
        """A segmenter for tests."""
        return cls(
            width=48,
            heads=3,
            depth=3,
            table_size=5,
            image_size=64,
            patch_size=8,
            out_channels=64,
            decoder_heads=4,
            decoder_mlp_width=128,
            iou_head_width=64,
            dtype="float32",
            encoder_chunk=None,
        )

    @property
    def grid(self) -> int:
        """Side of the image embedding, in patches."""
        return self.image_size // self.patch_size

    @property
    def low_res_size(self) -> int:
        """Side of the decoder's masks."""
        return 4 * self.grid

    @property
    def head_width(self) -> int:
        """Channels of one attention head of the image encoder."""
        return self.width // self.heads
