"""The compiled functions of evaluation: encode images, decode phrases, count pixels.

Each device computes its own rows by a program that knows of no other device (`jax.shard_map`), so
that a row gives the same numbers whatever their number. An image is encoded once, its phrases are
decoded some at a time, and masks are counted in squares of pixels, so that memory depends neither
on the number of phrases nor on the size of an image.

Reference: hustvl/EVF-SAM at 9935dc5, `eval.py` and `intersectionAndUnionGPU` of `utils/utils.py`.

Differences: counts are integers; besides the original's way to count pixels where parts of a target
overlap (no part of the target, yet part of the union where predicted) the union of the parts is
counted.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.mask_geometry import resample_masks
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.interfaces import ImageFeatures, Prompts
from evf_sam_jax.param_rules import Params

# In targets, for pixels that count neither way: the original's number for them.
IGNORED = 255
_AXIS = "devices"

if TYPE_CHECKING:
    Counted = Any  # which of the two it is depends on where the counts are
else:
    Counted = np.ndarray | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Pixels of each mask in a square of pixels; NumPy on the host, `jax.Array` on devices.

    Attributes:
      target: inside the target, one of its parts or more.
      predicted: inside the prediction, where pixels count.
      intersection: as the original counts.
      union: likewise.
      intersection_parts_union: with the union of the target's parts.
      union_parts_union: likewise.
      mask: the prediction, also where pixels do not count; eight pixels of a row a byte, the first
        one its highest bit; None if not asked for.
    """

    target: Int32[Counted, "n k"]
    predicted: Int32[Counted, "n k"]
    intersection: Int32[Counted, "n k"]
    union: Int32[Counted, "n k"]
    intersection_parts_union: Int32[Counted, "n k"]
    union_parts_union: Int32[Counted, "n k"]
    mask: UInt8[Counted, "n k t bytes"] | None


class EvaluatedModel:
    """A model on all devices of this process, with its compiled functions.

    Everything that goes in has n rows, a multiple of the number of devices; what comes out stays
    on the devices until it is asked for.

    Attributes:
      config: sizes and dtypes of the model.
      tokenizer: phrases to token ids.
      fingerprint: what tells its parameters and sizes from others.
      devices: their number.
    """

    def __init__(
        self,
        config: evf_sam.EvfSamConfig,
        params: Params,
        tokenizer: Tokenizer,
        fingerprint: str,
        masks: bool = True,
        devices: Sequence[Any] | None = None,
    ):
        """Args:
        masks: whether `count` gives the predictions too.
        devices: of this process; None: all.
        """
        local = jax.local_devices() if devices is None else devices
        self._mesh = Mesh(np.array(local), (_AXIS,), axis_types=(AxisType.Auto,))
        self._rows = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        self.config, self.tokenizer, self.fingerprint = config, tokenizer, fingerprint
        self.devices = len(local)
        self._params = self._place(params)
        self._encode = self._compiled(functools.partial(_encode, config), params=True)
        self._decode = self._compiled(functools.partial(_decode, config), params=True)
        count = functools.partial(count_tile, evf_sam.padded_frame(config), masks)
        self._count = self._compiled(count, params=False)

    def encode(
        self, sam_image: UInt8[np.ndarray, "n s s 3"], sam_size: Int32[np.ndarray, "n 2"]
    ) -> ImageFeatures:
        """What is computed of images once, whatever the phrases."""
        return self._encode(self._params, *self.put(sam_image, sam_size))

    def decode(
        self,
        features: ImageFeatures,
        encoder_image: Float[Array, "n h w _"],
        text_ids: Int32[np.ndarray, "n k l"],
        text_valid: Bool[np.ndarray, "n k l"],
    ) -> tuple[Float[Array, "n k l l"], Float[Array, "n k"]]:
        """Low-resolution logits of phrases, and the model's own estimate of their IoU."""
        text = self.put(text_ids, text_valid)
        return self._decode(self._decoding, features, encoder_image, *text)

    def count(
        self,
        logits: Float[Array, "n k l l"],
        sizes: Int32[Array, "n 4"],
        origin: Int32[np.ndarray, "n 2"],
        target: UInt8[np.ndarray, "n k t t"],
    ) -> Counts:
        """Counts a square of pixels of each image; arguments as of `count_tile`."""
        return self._count(logits, sizes, *self.put(origin, target))

    def put(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Arrays on the devices, split by rows."""
        return jax.device_put(list(arrays), self._rows)

    @functools.cached_property
    def _decoding(self) -> tuple[Params, Float[Array, "g g c"]]:
        """What decoding takes whatever the phrases."""
        positions = jax.jit(functools.partial(evf_sam.dense_positions, self.config))(self._params)
        return self._params, self._place(positions)

    def _place(self, arrays: Any) -> Any:
        """On all devices, whole."""
        return jax.device_put(arrays, NamedSharding(self._mesh, PartitionSpec()))

    def _compiled(self, function: Any, params: bool) -> Any:
        def call(*arguments: Any) -> Any:
            rows = PartitionSpec(_AXIS)
            specs = tuple(
                PartitionSpec() if params and i == 0 else rows for i in range(len(arguments))
            )
            return jax.shard_map(
                function, mesh=self._mesh, in_specs=specs, out_specs=rows, check_vma=False
            )(*arguments)

        return jax.jit(call)


def count_tile(
    frame: int | None,
    masks: bool,
    logits: Float[Array, "n k l l"],
    sizes: Int[Array, "n 4"],
    origin: Int[Array, "n 2"],
    target: UInt8[Array, "n k t t"],
) -> Counts:
    """Counts the pixels of masks in a square of each image.

    Args:
      frame: as of `resample_masks`.
      masks: whether to give the predictions too.
      logits: as the decoder gives them.
      sizes: height and width of the content of the frame, then of the original image.
      origin: pixel of the original image at the square's top left.
      target: how many parts of the target are at a pixel, `IGNORED` where it does not count, such
        as outside of the image.
    """
    side = target.shape[-1]

    def resample(logits, sizes, origin):
        at_pixels = resample_masks(
            logits[None], sizes[None, :2], sizes[None, 2:], (side, side), frame, origin
        )
        return at_pixels[0]

    positive = jax.vmap(resample)(logits, sizes, origin) > 0
    counted = target != IGNORED
    predicted = positive & counted
    once, inside = target == 1, (target >= 1) & counted

    def pixels(where: Bool[Array, "n k t t"]) -> Int32[Array, "n k"]:
        return where.sum((-2, -1), dtype=jnp.int32)

    return Counts(
        target=pixels(inside),
        predicted=pixels(predicted),
        intersection=pixels(predicted & once),
        union=pixels(predicted | once),
        intersection_parts_union=pixels(predicted & inside),
        union_parts_union=pixels(predicted | inside),
        mask=jnp.packbits(positive, axis=-1) if masks else None,
    )


def _encode(
    config: evf_sam.EvfSamConfig,
    params: Params,
    sam_image: UInt8[Array, "n s s 3"],
    sam_size: Int[Array, "n 2"],
) -> ImageFeatures:
    return evf_sam.encode_image(config, params, sam_image, sam_size)


def _decode(
    config: evf_sam.EvfSamConfig,
    decoding: tuple[Params, Float[Array, "g g c"]],
    features: ImageFeatures,
    encoder_image: Float[Array, "n h w _"],
    text_ids: Int[Array, "n k l"],
    text_valid: Bool[Array, "n k l"],
) -> tuple[Float[Array, "n k l l"], Float[Array, "n k"]]:
    params, positions = decoding
    text = evf_sam.encode_phrases(config, params, encoder_image, text_ids, text_valid)
    prompts = Prompts(text=text)
    prediction = evf_sam.decode(config, params, features, prompts, positions=positions)
    return prediction.low_res_logits[:, :, 0].astype(jnp.float32), prediction.iou[:, :, 0]
