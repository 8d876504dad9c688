"""Images that CLIP's and ViLT's preprocessing are asked for, and what transformers gives."""

from collections.abc import Callable

import numpy as np

from data_pipelines.encoder_images import CLIP_MEAN, CLIP_STD, VILT_MEAN, VILT_STD

# Height and width: landscape, portrait, square, prime, enlarged, and long enough to be bounded.
# Where three more pixels than a multiple of four are to be cut off, transformers and torchvision,
# which OpenAI uses, disagree by one; these sizes have none. Nor is there a portrait of which Pillow
# 13 shrinks the columns first, as it does where that is cheaper: earlier versions round otherwise.
SIZES = ((43, 62), (64, 48), (40, 40), (97, 331), (15, 8), (30, 90))
CLIP_SIZE, VILT_SIZE = 32, 96
INCEPTION = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
STEP = 5  # of a stored image every so manyth row and column is kept


def image(height: int, width: int) -> np.ndarray:
    """An image whose neighbouring pixels have nothing in common: the hardest for a filter."""
    rng = np.random.Generator(np.random.Philox(key=np.array([height, width], np.uint64)))
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def originals() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By name, transformers' preprocessing of one image to [h, w, 3]."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

    side = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    clip = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    square = {"height": VILT_SIZE, "width": VILT_SIZE}
    vilt = {"image_mean": VILT_MEAN, "image_std": VILT_STD}
    processors = {
        "clip_crop": CLIPImageProcessorPil(
            size={"shortest_edge": CLIP_SIZE}, crop_size=side, **clip
        ),
        "clip": CLIPImageProcessorPil(size=side, do_center_crop=False, **clip),
        "clip_crop_inception": CLIPImageProcessorPil(
            size={"shortest_edge": CLIP_SIZE}, crop_size=side, **INCEPTION
        ),
        "clip_inception": CLIPImageProcessorPil(size=side, do_center_crop=False, **INCEPTION),
        "vilt_pad": ViltImageProcessorPil(size={"shortest_edge": VILT_SIZE}, **vilt),
        # ViLT's has no square; CLIP's with other constants does the same.
        "vilt": CLIPImageProcessorPil(size=square, do_center_crop=False, **vilt),
    }

    def call(processor) -> Callable[[np.ndarray], np.ndarray]:
        return lambda pixels: (
            processor(images=[pixels], return_tensors="np").pixel_values[0].transpose(1, 2, 0)
        )

    return {name: call(processor) for name, processor in processors.items()}


def original_outputs() -> dict[str, np.ndarray]:
    """Each kind of each size: "clip/43x64" and so on, [h, w, 3]."""
    return {
        f"{kind}/{height}x{width}": np.asarray(prepare(image(height, width)), np.float32)
        for kind, prepare in originals().items()
        for height, width in SIZES
    }


def stored_outputs() -> dict[str, np.ndarray]:
    """`original_outputs`, thinned."""
    return {name: pixels[::STEP, ::STEP] for name, pixels in original_outputs().items()}
