"""Sizes at which masks are resampled, and what the original makes of them.

Reference: `Sam.postprocess_masks` of hustvl/EVF-SAM at 9935dc5, `model/segment_anything/modeling/
sam.py:159-173`: to the frame, crop, to the image, each time bilinearly.
"""

import numpy as np

from data_pipelines.image_input import sam_size

FRAME, LOW_RES = 1024, 256
# Original height and width: COCO's, odd and prime, enlarged, one pixel wide or high, one pixel,
# exactly the frame, and larger than it.
SIZES = [
    (427, 640),
    (333, 500),
    (97, 331),
    (13, 7),
    (640, 1),
    (1, 53),
    (1, 1),
    (1024, 1024),
    (1023, 1025),
    (1300, 1900),
]
STEP_CELLS = 48  # a stored output has about this many pixels a side


def logits(height: int, width: int) -> np.ndarray:
    """Two masks [2, 256, 256] whose neighbouring pixels have nothing in common."""
    rng = np.random.Generator(np.random.Philox(key=np.array([height, width], np.uint64)))
    return 4 * rng.standard_normal((2, LOW_RES, LOW_RES), np.float32)


def steps(height: int, width: int) -> tuple[slice, slice]:
    """Which pixels are stored: every n-th, the last row and column among them."""
    rows, columns = (max(1, side // STEP_CELLS) for side in (height, width))
    return slice((height - 1) % rows, None, rows), slice((width - 1) % columns, None, columns)


def original_stretched(low_res: np.ndarray, height: int, width: int) -> np.ndarray:
    """The same of a segmenter that images are stretched for; needs torch.

    Reference: `postprocess_masks` of `model/evf_sam2.py:135-141`, `model/evf_effisam.py:247-273`.
    """
    import torch
    from torch.nn.functional import interpolate

    masks = torch.from_numpy(low_res)[None]
    return interpolate(masks, (height, width), mode="bilinear", align_corners=False)[0].numpy()


def original(low_res: np.ndarray, height: int, width: int) -> np.ndarray:
    """The original's logits at the size of the image, [2, height, width]; needs torch."""
    import torch
    from torch.nn.functional import interpolate

    content_height, content_width = sam_size(height, width, FRAME)
    masks = torch.from_numpy(low_res)[None]
    masks = interpolate(masks, (FRAME, FRAME), mode="bilinear", align_corners=False)
    masks = masks[..., :content_height, :content_width]
    masks = interpolate(masks, (height, width), mode="bilinear", align_corners=False)
    return masks[0].numpy()
