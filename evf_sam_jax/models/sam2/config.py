"""Sizes of a SAM-2 model, one constructor per released checkpoint."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from evf_sam_jax.errors import UserError
from evf_sam_jax.models.config_checks import check_multiple, check_values

PATCH_STRIDE = 4  # pixels of the frame a token of the first stage
STAGES = 4  # each has half the tokens a side of the one before, and twice the channels and heads
EMBEDDED_STAGE = 2  # has the resolution of the image embedding
_FRAME_STEP = PATCH_STRIDE * 2 ** (STAGES - 1)  # the last stage has a whole number of tokens


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive blocks of the trunk that are alike.

    Attributes:
      first: the number of the first of them.
      length: how many there are.
      width_in: channels of the input.
      width: channels of the output.
      heads: of attention.
      window: side of an attention window, in tokens of the input; None: the whole image.
      pools: whether queries, and with them the output, are pooled to half the tokens a side.
    """

    first: int
    length: int
    width_in: int
    width: int
    heads: int
    window: int | None
    pools: bool

    @property
    def name(self) -> str:
        """What the trunk calls them."""
        last = self.first + self.length - 1
        return f"blocks_{self.first}" + (f"_to_{last}" if last > self.first else "")


@dataclasses.dataclass(frozen=True)
class Sam2Config:
    """Sizes of a SAM-2 segmenter; those of SAM 2.1 are the same.

    Reference: facebookresearch/sam2 at 2b90b9f, `configs/sam2/*.yaml`, `configs/sam2.1/*.yaml`.

    Attributes:
      width: channels of the trunk's first stage.
      heads: of the first stage's attention.
      stages: blocks of each stage.
      global_blocks: the blocks that attend to the whole image, the others within windows.
      windows: side of each stage's attention windows, in tokens. The first block of a stage still
        has the window of the stage before.
      position_grid: side of the table of positions that is stretched over the image; to it a table
        as large as the first stage's window is added, repeated.
      image_size: side of the square frame, in pixels.
      out_channels: channels of the image embedding, and of the mask decoder.
      mask_channels: hidden channels of the mask prompt's encoder.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes of each block, see `REMAT`.
      encoder_chunk: images encoded at a time, since each holds large scores; None: all of them. On
        a mesh, those of all its devices together.
    """

    family: ClassVar[str] = "sam2"
    stretches: ClassVar[bool] = True
    mask_prompts: ClassVar[bool] = True
    outside_points: ClassVar[bool] = True
    finishing: ClassVar[str] = "segmenter/image_encoder/neck/conv_s[01]/.*"

    width: int
    heads: int
    stages: Sequence[int]
    global_blocks: Sequence[int]
    windows: Sequence[int] = (8, 4, 14, 7)
    position_grid: int = 7
    image_size: int = 1024
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

    def __post_init__(self) -> None:
        """Raises UserError for values that no model can have."""
        for name in ("stages", "global_blocks", "windows"):
            object.__setattr__(self, name, _tuple(name, getattr(self, name)))
        check_values(self, "segmenter")
        for name in ("stages", "windows"):
            found = getattr(self, name)
            if len(found) != STAGES:
                raise UserError(
                    f"segmenter.{name}: expected {STAGES} numbers, one a stage, found {list(found)}"
                )
        odd = [window for window in self.windows[:-1] if window % 2]
        if odd:
            raise UserError(f"segmenter.windows: expected even ones but the last, found {odd[0]}")
        firsts = [sum(self.stages[:stage]) for stage in range(1, STAGES)]
        wrong = [b for b in self.global_blocks if b in firsts or b >= sum(self.stages)]
        if wrong:
            raise UserError(
                f"segmenter.global_blocks: expected blocks from 0 to {sum(self.stages) - 1} that "
                f"are not the first of a later stage ({firsts}), found {wrong[0]}"
            )
        check_multiple(self, "segmenter", "width", "heads")
        step = max(_FRAME_STEP, PATCH_STRIDE * self.windows[0])
        if self.image_size % _FRAME_STEP or self.image_size % (PATCH_STRIDE * self.windows[0]):
            raise UserError(
                f"segmenter.image_size: expected a multiple of {step}, found {self.image_size}"
            )
        # The decoder's attention splits its channels, or half of them, into heads.
        check_multiple(self, "segmenter", "out_channels", "decoder_heads")

    @classmethod
    def hiera_tiny(cls) -> "Sam2Config":
        """`sam2_hiera_tiny` and `sam2.1_hiera_tiny`."""
        return cls(width=96, heads=1, stages=(1, 2, 7, 2), global_blocks=(5, 7, 9))

    @classmethod
    def hiera_small(cls) -> "Sam2Config":
        """`sam2_hiera_small` and `sam2.1_hiera_small`."""
        return cls(width=96, heads=1, stages=(1, 2, 11, 2), global_blocks=(7, 10, 13))

    @classmethod
    def hiera_base_plus(cls) -> "Sam2Config":
        """`sam2_hiera_base_plus` and `sam2.1_hiera_base_plus`."""
        return cls(
            width=112,
            heads=2,
            stages=(2, 3, 16, 3),
            global_blocks=(12, 16, 20),
            position_grid=14,
        )

    @classmethod
    def hiera_large(cls) -> "Sam2Config":
        """`sam2_hiera_large`, the segmenter of the released EVF-SAM2, and `sam2.1_hiera_large`."""
        return cls(
            width=144,
            heads=2,
            stages=(2, 6, 36, 4),
            global_blocks=(23, 33, 43),
            windows=(8, 4, 16, 8),
        )

    @classmethod
    def tiny(cls) -> "Sam2Config":
        """A segmenter for tests."""
        return cls(
            width=16,
            heads=1,
            stages=(1, 1, 4, 1),
            global_blocks=(5,),
            windows=(4, 2, 6, 3),
            position_grid=3,
            image_size=64,
            out_channels=64,
            decoder_heads=4,
            decoder_mlp_width=128,
            iou_head_width=64,
            dtype="float32",
            encoder_chunk=None,
        )

    @property
    def grid(self) -> int:
        """Side of the image embedding."""
        return self.stage_grid(EMBEDDED_STAGE)

    @property
    def low_res_size(self) -> int:
        """Side of the decoder's masks."""
        return 4 * self.grid

    def stage_grid(self, stage: int) -> int:
        """Tokens a side of a stage's output."""
        return self.image_size // (PATCH_STRIDE * 2**stage)

    def stage_width(self, stage: int) -> int:
        """Channels of a stage's output."""
        return self.width * 2**stage

    @property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """The blocks of each stage, those in a row that are alike as one."""
        stages, first = [], 0
        for stage, blocks in enumerate(self.stages):
            width, heads = self.stage_width(stage), self.heads * 2**stage
            runs: list[Run] = []
            for block in range(first, first + blocks):
                pools = block == first and stage > 0
                window = self.windows[stage - 1 if pools else stage]
                run = Run(
                    first=block,
                    length=1,
                    width_in=self.stage_width(stage - 1) if pools else width,
                    width=width,
                    heads=heads,
                    window=None if block in self.global_blocks else window,
                    pools=pools,
                )
                before = runs[-1] if runs else None
                if before and dataclasses.replace(run, first=before.first) == dataclasses.replace(
                    before, length=1
                ):
                    runs[-1] = dataclasses.replace(before, length=before.length + 1)
                else:
                    runs.append(run)
            stages.append(tuple(runs))
            first += blocks
        return tuple(stages)


def _tuple(name: str, value: object) -> tuple[int, ...]:
    """A sequence of numbers as a tuple (JSON has lists), which a frozen configuration needs."""
    lowest = 0 if name == "global_blocks" else 1
    if isinstance(value, (list, tuple)) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= lowest for one in value
    ):
        return tuple(value)
    raise UserError(f"segmenter.{name}: expected integers from {lowest} on, found {value!r}")
