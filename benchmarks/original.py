"""The PyTorch originals' modules put together, as the peer of whole predictions and trainings.

Reference: hustvl/EVF-SAM at 9935dc5, `model/evf_sam.py`, which joins what `segment-anything` and
torchscale are packages of. Weights are random.
"""

import torch
from jaxtyping import Bool, Float32, Int, UInt8
from numpy import ndarray

from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.sam.config import SamConfig
from tests.parity import beit3_cases, sam_cases


class Original(torch.nn.Module):
    """BEiT-3, the projector and SAM; trained are all but SAM's two encoders."""

    def __init__(self, encoder: Beit3Config, segmenter: SamConfig):
        super().__init__()
        self.encoder = beit3_cases.original(encoder)
        self.segmenter = sam_cases.original(segmenter)
        width = encoder.width
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, segmenter.out_channels),
        )
        self.segmenter.requires_grad_(False)
        self.segmenter.mask_decoder.requires_grad_(True)

    def forward(
        self,
        sam_image: UInt8[ndarray, "s s 3"],
        sam_size: tuple[int, int],
        encoder_image: Float32[ndarray, "h w 3"],
        text_ids: Int[ndarray, "k l"],
        text_valid: Bool[ndarray, "k l"],
        size: tuple[int, int],
    ) -> torch.Tensor:
        """Mask logits [k, 1, height, width] of an image's phrases, at its own size.

        Args:
          sam_size: height and width of the content of `sam_image`.
          size: of the image.
        """
        phrases = len(text_ids)
        frame = torch.from_numpy(sam_image).permute(2, 0, 1).float()
        with torch.no_grad():
            embedding = self.segmenter.image_encoder(self.segmenter.preprocess(frame[None]))
        longest = int(text_valid.sum(axis=-1).max())
        ids = torch.from_numpy(text_ids[:, :longest]).long()
        padding = ~torch.from_numpy(text_valid[:, :longest])
        pixels = torch.from_numpy(encoder_image).permute(2, 0, 1)
        found = self.encoder(
            visual_tokens=pixels.expand(phrases, -1, -1, -1),
            textual_tokens=ids,
            text_padding_position=padding,
        )["encoder_out"]
        prompt_encoder = self.segmenter.prompt_encoder
        _, dense = prompt_encoder(points=None, boxes=None, masks=None)
        low_res, _ = self.segmenter.mask_decoder(
            image_embeddings=embedding,
            image_pe=prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self.projector(found[:, :1]),
            dense_prompt_embeddings=dense.expand(phrases, -1, -1, -1),
            multimask_output=False,
        )
        return self.segmenter.postprocess_masks(low_res, sam_size, size)
