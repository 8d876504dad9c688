"""`Batch` is a tree: of arrays, and of whatever jax puts in their place."""

import jax
import numpy as np

from data_pipelines.assemble import BatchSpec, Slot, assemble
from data_pipelines.batch import Batch, copied
from data_pipelines.shapes import SHAPES_TOKENIZER, ShapesSource
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tower_images import TowerImages

SPEC = BatchSpec(
    1, phrases=4, text_length=16, images=TowerImages(frame=32, encoder_size=16), canvas=(128, 128)
)


def a_batch() -> Batch:
    example = ShapesSource("train")[0]
    return assemble([Slot(example)], SPEC, load_tokenizer(SHAPES_TOKENIZER))


def test_leaves_are_named_and_absent_ones_are_none():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(a_batch())]
    assert ".sam_image" in paths and ".text_ids" in paths
    assert ".points" not in paths and ".image_features" not in paths


def test_a_batch_goes_through_jit_and_to_a_device():
    batch = a_batch()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.device_put(batch, jax.tree.map(lambda _: sharding, batch))
    same = jax.jit(lambda batch: batch)(placed)
    assert isinstance(same, Batch)
    jax.tree.map(np.testing.assert_array_equal, same, batch)


def test_a_copy_shares_no_memory():
    batch = a_batch()
    copy = copied(batch)
    jax.tree.map(np.testing.assert_array_equal, copy, batch)
    assert not np.shares_memory(copy.mask, batch.mask)
