"""An image as the two towers of a model take it, whatever families they are of."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8

from data_pipelines.encoder_images import (
    clip_crop_input,
    clip_input,
    vilt_input,
    vilt_pad_input,
)
from data_pipelines.image_input import encoder_input, sam_input, sam_size, stretched_input

# The segmenter's frame: the longer side fills it, or both do; of the latter the original has one
# way in training and evaluation and another, without antialias, in its inference script.
FITS = PAD, STRETCH, STRETCH_ALIASED = "pad", "stretch", "stretch_aliased"

# How a multimodal encoder's image is made from pixels and its side: [h, w, 3], or [h, w, 4] where
# images differ in size; the fourth channel is then 1 inside and 0 at what fills up.
EncoderImage = Callable[[np.ndarray, int], np.ndarray]
ENCODER: dict[str, EncoderImage] = {
    "beit3": encoder_input,
    "clip": clip_input,
    "clip_crop": clip_crop_input,
    "clip_inception": functools.partial(clip_input, normalisation="inception"),
    "clip_crop_inception": functools.partial(clip_crop_input, normalisation="inception"),
    "vilt": vilt_input,
    "vilt_pad": vilt_pad_input,
}


@dataclasses.dataclass(frozen=True)
class TowerImages:
    """How the towers of a model take an image.

    Attributes:
      frame: S, side of the segmenter's frame.
      fit: `PAD`, `STRETCH` or `STRETCH_ALIASED`.
      stretched_later: the device stretches what was padded here.
      encoder_size: side of the multimodal encoder's image.
      encoder_kind: one of `ENCODER`.
    """

    frame: int = 1024
    fit: str = PAD
    stretched_later: bool = False
    encoder_size: int = 224
    encoder_kind: str = "beit3"

    @property
    def encoder_shape(self) -> tuple[int, ...]:
        """Of the multimodal encoder's image."""
        return self.encoder(np.zeros((1, 1, 3), np.uint8)).shape

    @property
    def stretches(self) -> bool:
        """Whether an image fills the segmenter's frame whatever its sides."""
        return self.fit != PAD or self.stretched_later

    def prompt_frame(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what an image is in the frame that points and boxes are given in."""
        if self.stretches:
            return self.frame, self.frame
        return sam_size(height, width, self.frame)

    def segmenter(
        self, image: UInt8[np.ndarray, "h w 3"], out: UInt8[np.ndarray, "S S 3"] | None = None
    ) -> tuple[UInt8[np.ndarray, "S S 3"], tuple[int, int]]:
        """The segmenter's frame, and height and width of its content.

        Args:
          out: zeros to write it into, such as a row of a batch; by default a new array.
        """
        if self.fit == PAD:
            return sam_input(image, self.frame, out)
        filled = stretched_input(image, self.frame, antialias=self.fit == STRETCH)
        if out is not None:
            out[:] = filled
            filled = out
        return filled, self.content(*image.shape[:2])

    def content(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the content of the segmenter's frame, of an image of this size."""
        return sam_size(height, width, self.frame) if self.fit == PAD else (self.frame, self.frame)

    def encoder(self, image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "eh ew c"]:
        """The multimodal encoder's image."""
        return ENCODER[self.encoder_kind](image, self.encoder_size)
