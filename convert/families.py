"""Which table a tower has: the one place of the converters that knows a family by its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert import beit3, clip, efficient_sam, sam, sam2, vilt
from convert.checkpoint_files import Shapes
from convert.table import Table
from evf_sam_jax.errors import UserError
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

# What the towers of a released EVF-SAM may be.
_RECOGNISED: dict[str, tuple[Callable[[Shapes, Path], tuple[str, Any]], ...]] = {
    "encoder": (beit3.recognise,),
    "segmenter": (sam.recognise, sam2.recognise, efficient_sam.recognise),
}


def tower_table(config: EncoderConfig | SegmenterConfig, variant: str = "") -> Table:
    """Returns the table of an encoder or a segmenter, under the names of its own checkpoints.

    Args:
      variant: of the manifest, where the tower is alone.
    """
    if config.family in _TABLES_OF_VARIANTS:
        return _TABLES_OF_VARIANTS[config.family](config, variant)
    return _TABLES[config.family](config)


def recognise_tower(tower: str, shapes: Shapes) -> tuple[str, Any] | None:
    """Returns the name and the configuration of a tower with these shapes, under its own names.

    Args:
      tower: "encoder" or "segmenter" of an EVF-SAM.
    """
    for recognise in _RECOGNISED[tower]:
        try:
            return recognise(shapes, Path(tower))
        except UserError:
            continue
    return None
