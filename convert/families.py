"""Which table a tower has: the one place of the converters that knows a family by its name."""

from collections.abc import Callable
from typing import Any

from convert import beit3, clip, efficient_sam, sam, sam2, vilt
from convert.table import Table
from evf_sam_jax.models.interfaces import EncoderConfig, SegmenterConfig

_TABLES: dict[str, Callable[[Any], Table]] = {
    "beit3": beit3.table,
    "clip": clip.table,
    "vilt": vilt.table,
    "sam": sam.table,
    "sam2": sam2.table,
    "efficient_sam": efficient_sam.table,
}


def tower_table(config: EncoderConfig | SegmenterConfig) -> Table:
    """Returns the table of an encoder or a segmenter, under the names of its own checkpoints."""
    return _TABLES[config.family](config)
