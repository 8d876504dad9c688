"""Which table a tower has: the one place of the converters that knows a family by its name."""

from collections.abc import Callable
from typing import Any

from convert import beit3, clip, efficient_sam, sam, sam2, vilt
from convert.table import Table
from evf_sam_jax.models.interfaces import EncoderConfig, SegmenterConfig

_TABLES: dict[str, Callable[[Any], Table]] = {
    "beit3": beit3.table,
    "vilt": vilt.table,
    "sam": sam.table,
    "sam2": sam2.table,
    "efficient_sam": efficient_sam.table,
}


# Of a family whose checkpoints come under names of more than one kind, the variant says which.
_TABLES_OF_VARIANTS: dict[str, Callable[[Any, str], Table]] = {"clip": clip.table_of_variant}


def tower_table(config: EncoderConfig | SegmenterConfig, variant: str = "") -> Table:
    """Returns the table of an encoder or a segmenter, under the names of its own checkpoints.

    Args:
      variant: of the manifest, where the tower is alone.
    """
    if config.family in _TABLES_OF_VARIANTS:
        return _TABLES_OF_VARIANTS[config.family](config, variant)
    return _TABLES[config.family](config)
