"""Sizes of a Segment Anything model, one constructor per released checkpoint."""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

from evf_sam_jax.models.config_checks import check_multiple, check_values


@runtime_checkable
class DecoderConfig(Protocol):
    """Sizes of a mask decoder and what it is asked, shared by other segmenters; see `SamConfig`.

    `grid` and `image_size` are of what is encoded.
    """

    @property
    def image_size(self) -> int: ...
    @property
    def grid(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def decoder_depth(self) -> int: ...
    @property
    def decoder_heads(self) -> int: ...
    @property
    def decoder_mlp_width(self) -> int: ...
    @property
    def iou_head_width(self) -> int: ...
    @property
    def num_multimask(self) -> int: ...
    @property
    def dtype(self) -> str: ...


@runtime_checkable
class PromptConfig(DecoderConfig, Protocol):
    """Sizes of a prompt encoder that takes masks too."""

    @property
    def mask_channels(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM (ViT) segmenter.

    Reference: facebookresearch/segment-anything at dca509f, `build_sam.py`.

    Attributes:
      width: channels of the image encoder.
      global_every: every n-th block attends to the whole image, the others within windows.
      window_size: side of an attention window, in patches.
      image_size: side of the square frame, in pixels.
      out_channels: channels of the image embedding, and of the mask decoder.
      mask_channels: hidden channels of the mask prompt's encoder.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes of each block, see `REMAT`.
      encoder_chunk: images encoded at a time, since each holds large scores; None: all of them. On
        a mesh, those of all its devices together.
    """

    width: int
    depth: int
    heads: int
    global_every: int
    window_size: int = 14
    image_size: int = 1024
    patch_size: int = 16
    mlp_ratio: int = 4
    out_channels: int = 256
    mask_channels: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    iou_head_width: int = 256
    num_multimask: int = 3
    dtype: str = "bfloat16"
    remat: bool | str = False
    encoder_chunk: int | None = 1

    family: ClassVar[str] = "sam"
    stretches: ClassVar[bool] = False
    mask_prompts: ClassVar[bool] = True
    outside_points: ClassVar[bool] = True
    finishing: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Raises UserError for values that no model can have."""
        check_values(self, "segmenter")
        check_multiple(self, "segmenter", "width", "heads")
        check_multiple(self, "segmenter", "depth", "global_every")
        check_multiple(self, "segmenter", "image_size", "patch_size")
        # The decoder's attention splits its channels, or half of them, into heads.
        check_multiple(self, "segmenter", "out_channels", "decoder_heads")

    @classmethod
    def vit_b(cls) -> "SamConfig":
        """`sam_vit_b_01ec64`."""
        return cls(width=768, depth=12, heads=12, global_every=3)

    @classmethod
    def vit_l(cls) -> "SamConfig":
        """`sam_vit_l_0b3195`."""
        return cls(width=1024, depth=24, heads=16, global_every=6)

    @classmethod
    def vit_h(cls) -> "SamConfig":
        """`sam_vit_h_4b8939`, the segmenter of the released EVF-SAM models."""
        return cls(width=1280, depth=32, heads=16, global_every=8)

    @classmethod
    def tiny(cls) -> "SamConfig":
        """A segmenter for tests."""
        return cls(
            width=64,
            depth=4,
            heads=4,
            global_every=2,
            window_size=6,
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
    def groups(self) -> int:
        """Number of blocks with global attention, each after `global_every - 1` windowed ones."""
        return self.depth // self.global_every

    @property
    def head_width(self) -> int:
        """Channels of one attention head of the image encoder."""
        return self.width // self.heads
