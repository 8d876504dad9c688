"""SAM gives what `segment_anything` gives: embeddings, and masks of all kinds of prompts."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import sam as sam_table
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.interfaces import ImageFeatures, MaskPrediction, Prompts
from evf_sam_jax.models.sam.config import SamConfig
from tests.golden.make_model_outputs import thinned
from tests.parity import sam_cases
from tests.parity.weights import our_params

GOLDEN = Path(__file__).parents[2] / "golden"
BAR = 1e-4

encode_image = jax.jit(evf_sam.encode_image, static_argnums=0)
decode = jax.jit(evf_sam.decode, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=0)
def decode_both(
    config: evf_sam.EvfSamConfig, params: dict, features: ImageFeatures, prompts: Prompts
) -> dict[bool, MaskPrediction]:
    """One mask and several masks a prompt, compiled together: they differ at the very end only."""
    return {
        multimask: evf_sam.decode(config, params, features, prompts, multimask)
        for multimask in (False, True)
    }


def model(segmenter: SamConfig) -> tuple[evf_sam.EvfSamConfig, evf_sam.Params]:
    config = dataclasses.replace(evf_sam.EvfSamConfig.tiny(), segmenter=segmenter)
    return config, our_params(sam_table.table(segmenter), sam_cases.section(segmenter))


def prompts_of(given: sam_cases.Inputs, kinds: tuple[str, ...]) -> Prompts:
    """The prompts of these kinds, as k prompts of one image."""
    return Prompts(
        text=jnp.asarray(given.text[None]) if "text" in kinds else None,
        points=jnp.asarray(given.points[None]) if "points" in kinds else None,
        point_labels=jnp.asarray(given.labels[None]) if "points" in kinds else None,
        boxes=jnp.asarray(given.boxes[None]) if "box" in kinds else None,
        mask=jnp.asarray(given.mask[None]) if "mask" in kinds else None,
    )


def our_outputs(segmenter: SamConfig, combinations) -> dict[str, np.ndarray]:
    config, params = model(segmenter)
    given = sam_cases.inputs(segmenter)
    sizes = np.asarray([given.size], np.int32)
    features = encode_image(config, params, given.image[None], sizes)
    outputs = {"embedding": np.asarray(features.embedding[0])}
    for kinds in combinations:
        both = decode_both(config, params, features, prompts_of(given, kinds))
        for multimask, found in both.items():
            outputs[sam_cases.key(kinds, multimask, "logits")] = found.low_res_logits[0]
            outputs[sam_cases.key(kinds, multimask, "iou")] = found.iou[0]
    return outputs


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert np.abs(np.asarray(found[name]) - value).max() <= BAR, name


@pytest.mark.parametrize("name", sam_cases.CONFIGS)
def test_equals_stored_outputs_of_the_original(name: str) -> None:
    config = sam_cases.CONFIGS[name]
    found = our_outputs(config, sam_cases.stored_combinations(name))
    with np.load(GOLDEN / f"sam_{name}.npz") as golden:
        assert_equal(thinned(found), dict(golden))


@pytest.mark.torch
@pytest.mark.parametrize("name", sam_cases.CONFIGS)
def test_equals_the_original(name: str) -> None:
    config = sam_cases.CONFIGS[name]
    combinations = sam_cases.combinations(name)
    expected = sam_cases.original_outputs(config, combinations)
    assert_equal(our_outputs(config, combinations), expected)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("size", ["vit_b", "vit_l"])
def test_equals_the_original_at_full_size(size: str) -> None:
    config = dataclasses.replace(getattr(SamConfig, size)(), dtype="float32")
    combinations = [("text",), ("points", "box", "mask", "text")]
    expected = sam_cases.original_outputs(config, combinations)
    assert_equal(our_outputs(config, combinations), expected)


def test_images_and_prompts_do_not_mix() -> None:
    """Each of b images with k prompts gives what it gives alone."""
    segmenter = sam_cases.CONFIGS["small_b"]
    config, params = model(segmenter)
    given = sam_cases.inputs(segmenter)
    images = np.stack([given.image, given.image[::-1]])
    sizes = np.asarray([given.size, (segmenter.image_size,) * 2], np.int32)
    features = encode_image(config, params, images, sizes)
    text = jnp.asarray(np.stack([given.text, given.text[::-1] + 1.0]))
    together = decode(config, params, features, Prompts(text=text))
    for b in range(2):
        alone = encode_image(config, params, images[b : b + 1], sizes[b : b + 1])
        for k in range(2):
            prompt = Prompts(text=text[b : b + 1, k : k + 1])
            found = decode(config, params, alone, prompt).low_res_logits[0, 0]
            np.testing.assert_allclose(found, together.low_res_logits[b, k], atol=2e-5)


def test_encoding_in_chunks_changes_nothing() -> None:
    segmenter = sam_cases.CONFIGS["small_b"]
    config, params = model(segmenter)
    rng = np.random.default_rng(0)
    side = segmenter.image_size
    images = rng.integers(0, 256, (3, side, side, 3), np.uint8)
    sizes = np.full((3, 2), side, np.int32)
    whole = encode_image(config, params, images, sizes).embedding
    chunked = dataclasses.replace(
        config, segmenter=dataclasses.replace(segmenter, encoder_chunk=2, remat=True)
    )
    found = encode_image(chunked, params, images, sizes).embedding
    np.testing.assert_allclose(found, whole, atol=2e-5)


def test_nothing_outside_the_content_reaches_the_embedding() -> None:
    segmenter = sam_cases.CONFIGS["small_b"]
    config, params = model(segmenter)
    given = sam_cases.inputs(segmenter)
    sizes = np.asarray([given.size], np.int32)
    noisy = given.image.copy()
    noisy[given.size[0] :] = 200
    clean = encode_image(config, params, given.image[None], sizes).embedding
    found = encode_image(config, params, noisy[None], sizes).embedding
    np.testing.assert_array_equal(found, clean)


def features_of(segmenter: SamConfig) -> ImageFeatures:
    shape = (1, segmenter.grid, segmenter.grid, segmenter.out_channels)
    return ImageFeatures(embedding=jnp.zeros(shape, jnp.float32))


def test_a_prompt_must_say_something() -> None:
    config, params = model(SamConfig.tiny())
    with pytest.raises(ValueError, match="needs text, points, a box or a mask"):
        evf_sam.decode(config, params, features_of(config.segmenter), Prompts())


def test_points_need_labels() -> None:
    config, params = model(SamConfig.tiny())
    points = Prompts(points=jnp.zeros((1, 1, 1, 2)))
    with pytest.raises(ValueError, match="point_labels"):
        evf_sam.decode(config, params, features_of(config.segmenter), points)
