"""What a model asks of the host, by its configuration: images in its shapes, and token ids."""

import os

from data_pipelines import tokenizers
from data_pipelines.tower_images import PAD, STRETCH, STRETCH_ALIASED, TowerImages
from evf_sam_jax.models.evf_sam import EvfSamConfig


def tower_images(config: EvfSamConfig, antialias: bool = True) -> TowerImages:
    """Returns how both towers take an image.

    Args:
      antialias: of a segmenter that images are stretched for: as the original's training and
        evaluation do it, or, without, as its inference script does. They differ where a side
        shrinks.
    """
    encoder, segmenter = config.encoder, config.segmenter
    # The legacy profile stretches on the device what was scaled by its longer side.
    later = segmenter.stretches and config.profile == "legacy"
    fit = PAD
    if segmenter.stretches and not later:
        fit = STRETCH if antialias else STRETCH_ALIASED
    return TowerImages(segmenter.image_size, fit, later, encoder.image_size, encoder.image_kind)


def load_tokenizer(
    directory: str | os.PathLike, config: EvfSamConfig, truncates: bool | None = None
) -> tokenizers.Tokenizer:
    """Returns the tokenizer in a directory, for the encoder of `config`.

    Args:
      truncates: as of `data_pipelines.tokenizers.load_tokenizer`.

    Raises:
      UserError: there is none, it cannot be read, or it gives ids that the encoder does not know.
    """
    tokenizer = tokenizers.load_tokenizer(directory, config.encoder.max_text_tokens, truncates)
    tokenizer.check_vocabulary(config.encoder.vocab_size)
    return tokenizer
