"""Every data set by its name, as configs and commands call it."""

from data_pipelines import (
    label_maps,
    objects365,
    own_data,
    parts,
    refcoco_parquet,
    refcoco_tfds,
    refer,
)
from data_pipelines.dataset import Dataset
from evf_sam_jax.errors import UserError

_MODULES = (
    refer,
    refcoco_parquet,
    refcoco_tfds,
    label_maps,
    objects365,
    parts,
    own_data,
)

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset for module in _MODULES for dataset in module.DATASETS
}


def find_dataset(name: str) -> Dataset:
    """The data set of that name. Raises UserError if there is none."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]
