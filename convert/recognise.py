"""Which family a checkpoint seems to be of, by the names in it: for the error of a wrong one."""

import re
from collections.abc import Iterable

# A name that only this family has, as a regular expression that must match whole.
_SIGNS = (
    (r"text_hidden_fcs\.0\.0\.weight", "an EVF-SAM (`evf-sam` converts its directory)"),
    (r"image_encoder\.trunk\.pos_embed_window", "SAM-2"),
    (r"prompt_encoder\.invalid_points\.weight", "EfficientSAM"),
    (r"image_encoder\.blocks\.0\.attn\.rel_pos_h", "SAM (ViT)"),
    (r"beit3\.text_embed\.weight", "BEiT-3"),
    (r"vilt\.embeddings\.text_embeddings\.word_embeddings\.weight", "ViLT (transformers)"),
    (
        r"embeddings\.text_embeddings\.word_embeddings\.weight",
        "ViLT (transformers) saved without its heads, whose names lack `vilt.`",
    ),
    (r"text_model\.embeddings\.token_embedding\.weight", "CLIP (transformers)"),
    (r"positional_embedding", "CLIP (OpenCLIP or OpenAI)"),
)


def family_of(names: Iterable[str]) -> str | None:
    """Returns the family whose sign is among the names of a checkpoint's tensors."""
    names = list(names)
    found = (family for sign, family in _SIGNS if any(re.fullmatch(sign, name) for name in names))
    return next(found, None)


def looks_like(names: Iterable[str]) -> str:
    """Returns "; it looks like FAMILY" for the names of a checkpoint's tensors, or nothing."""
    family = family_of(names)
    return f"; it looks like {family}" if family else ""
