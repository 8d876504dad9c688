"""EfficientSAM gives what the original gives: embeddings, and masks of all kinds of prompts."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import efficient_sam as efficient_sam_table
from data_pipelines.image_input import read_image, stretched_input
from evf_sam_jax.errors import UserError
from evf_sam_jax.mask_geometry import resample_masks
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.efficient_sam.efficient_sam import EfficientSam
from evf_sam_jax.models.interfaces import ImageFeatures, MaskPrediction, Prompts
from evf_sam_jax.prompts import Prompt, stack_geometry
from tests import golden_checkpoint
from tests.golden.make_model_outputs import thinned
from tests.parity import efficient_sam_cases as cases
from tests.parity.weights import our_params

GOLDEN = Path(__file__).parents[2] / "golden" / "efficient_sam_tiny.npz"
BAR = 1e-4


@functools.cache
def params_of(config: EfficientSamConfig) -> dict:
    table = efficient_sam_table.table(config)
    return our_params(table, cases.section(config))["segmenter"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_with(config: EfficientSamConfig, profile: str, params, image, size) -> ImageFeatures:
    model = EfficientSam(config, profile)
    return model.apply({"params": params}, image, size, method=EfficientSam.encode_image)


def encode(config: EfficientSamConfig, profile: str, image, size) -> ImageFeatures:
    return encode_with(config, profile, params_of(config), image, size)


@functools.partial(jax.jit, static_argnums=0)
def decode_with(
    config: EfficientSamConfig, params, features, prompts
) -> dict[bool, MaskPrediction]:
    """One mask and several masks a prompt, compiled together: they differ at the very end only."""
    model = EfficientSam(config, "current")
    return {
        multimask: model.apply(
            {"params": params}, features, prompts, multimask, method=EfficientSam.decode
        )
        for multimask in (False, True)
    }


def logits(config: EfficientSamConfig, features: ImageFeatures, prompts: Prompts) -> jax.Array:
    """Of one mask a prompt, [b, k, l, l]."""
    found = decode_with(config, params_of(config), features, prompts)
    return found[False].low_res_logits[:, :, 0]


def prompts_of(given: cases.Inputs, kinds: tuple[str, ...]) -> Prompts:
    """The prompts of these kinds, as k prompts of one image."""
    return Prompts(
        text=jnp.asarray(given.text[None]) if "text" in kinds else None,
        points=jnp.asarray(given.points[None]) if "points" in kinds else None,
        point_labels=jnp.asarray(given.labels[None]) if "points" in kinds else None,
        boxes=jnp.asarray(given.boxes[None]) if "box" in kinds else None,
    )


def our_outputs(config: EfficientSamConfig) -> dict[str, np.ndarray]:
    given = cases.inputs(config)
    sizes = {"current": (config.image_size,) * 2, "legacy": given.size}
    features = {
        profile: encode(config, profile, given.image[None], np.asarray([size], np.int32))
        for profile, size in sizes.items()
    }
    outputs = {f"{name}/embedding": found.embedding[0] for name, found in features.items()}
    for kinds in cases.COMBINATIONS:
        prompts = prompts_of(given, kinds)
        both = decode_with(config, params_of(config), features["current"], prompts)
        for multimask, found in both.items():
            outputs[cases.key(kinds, multimask, "logits")] = found.low_res_logits[0]
            outputs[cases.key(kinds, multimask, "iou")] = found.iou[0]
    return {name: np.asarray(value) for name, value in outputs.items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert np.abs(found[name] - value).max() <= BAR, name


def test_equals_stored_outputs_of_the_original() -> None:
    with np.load(GOLDEN) as golden:
        assert_equal(thinned(our_outputs(cases.CONFIG)), dict(golden))


@pytest.mark.torch
def test_equals_the_original() -> None:
    pytest.importorskip("efficient_sam", reason="tests/golden/make_efficient_sam.py says whence")
    assert_equal(our_outputs(cases.CONFIG), cases.original_outputs(cases.CONFIG))


def test_equals_the_original_at_full_size() -> None:
    """EfficientSAM-T, from pixels and stored prompts of phrases to masks of the image."""
    config = dataclasses.replace(EfficientSamConfig.vitt(), dtype="float32")
    table = efficient_sam_table.table(config).prefixed("visual_model.")
    params = jax.device_put(our_params(table, cases.section(config))["segmenter"])
    pixels = stretched_input(read_image(golden_checkpoint.EVF_SAM / "image_0.png"))
    size = jnp.full((1, 2), config.image_size, jnp.int32)
    features = encode_with(config, "current", params, pixels[None], size)
    with np.load(golden_checkpoint.EVF_EFFISAM / "evf_effisam_b.npz") as golden:
        text = jnp.asarray(np.stack([golden[f"prompt_{j}"] for j in range(3)])[None, :, None])
        found = decode_with(config, params, features, Prompts(text=text))[False].low_res_logits
        masks = resample_masks(found[:, :, 0], size, jnp.asarray([[427, 640]]), (427, 640), None)
        embedding = features.embedding[0, ::8, ::8].transpose(2, 0, 1)
        np.testing.assert_allclose(embedding, golden["image_embedding"], atol=BAR)
        for j in range(3):
            low_res, logits = golden[f"low_res_masks_{j}"][0], golden[f"mask_logits_{j}"]
            np.testing.assert_allclose(found[0, j, 0, ::2, ::2], low_res, atol=BAR)
            np.testing.assert_allclose(masks[0, j, ::4, ::4], logits, atol=BAR)


def features_of(config: EfficientSamConfig, images: int = 1) -> ImageFeatures:
    shape = (images, config.grid, config.grid, config.out_channels)
    drawn = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return ImageFeatures(embedding=jnp.asarray(drawn))


def test_prompts_that_differ_in_points_share_a_batch() -> None:
    """Each is filled up as if it were alone, with what the original fills up with."""
    config = cases.CONFIG
    rng = np.random.default_rng(2)
    points = rng.uniform(0, config.image_size, (4, 6, 2)).astype(np.float32)
    box = np.asarray([3, 4, 40, 50], np.float32)
    asked = [
        Prompt(None, one[:count], np.ones(count, np.int32), boxed, None)
        for one, (count, boxed) in zip(
            points, ((3, None), (0, box), (3, box), (6, None)), strict=True
        )
    ]
    geometry = stack_geometry(asked)
    together = Prompts(
        points=jnp.asarray(geometry.points[None]),
        point_labels=jnp.asarray(geometry.labels[None]),
        boxes=jnp.asarray(geometry.boxes[None]),
        token_valid=jnp.asarray(geometry.valid[None]),
    )
    features = features_of(config)
    found = logits(config, features, together)[0]

    def twice(x: np.ndarray) -> jax.Array:  # as many as other tests have
        return jnp.asarray(np.stack([x, x])[None])

    for row, prompt in enumerate(asked):
        alone = Prompts(
            points=twice(prompt.points) if len(prompt.points) else None,
            point_labels=twice(prompt.labels) if len(prompt.points) else None,
            boxes=None if prompt.box is None else twice(prompt.box),
        )
        expected = logits(config, features, alone)[0, 0]
        np.testing.assert_allclose(found[row], expected, atol=2e-5)


def test_a_phrase_alone_is_not_filled_up_beside_others_with_points() -> None:
    config = cases.CONFIG
    given, features = cases.inputs(config), features_of(config)
    everything = prompts_of(given, ("points", "box", "text"))
    valid = np.ones((1, 2, 6), bool)
    valid[0, 0, :5] = False
    together = dataclasses.replace(everything, token_valid=jnp.asarray(valid))
    found = logits(config, features, together)[0]
    text = logits(config, features, prompts_of(given, ("text",)))[0]
    np.testing.assert_allclose(found[0], text[0], atol=2e-5)
    np.testing.assert_allclose(found[1], logits(config, features, everything)[0, 1], atol=2e-5)


def test_images_and_prompts_do_not_mix() -> None:
    """Each of b images with its prompts gives what it gives alone."""
    config = cases.CONFIG
    given = cases.inputs(config)
    images = np.stack([given.image, given.image[::-1]])
    sizes = np.asarray([given.size, (config.image_size, 20)], np.int32)
    features = encode(config, "legacy", images, sizes)
    text = jnp.asarray(np.stack([given.text, given.text[::-1] + 1.0]))
    together = logits(config, features, Prompts(text=text))
    for b in range(2):
        alone = encode(config, "legacy", images[b : b + 1], sizes[b : b + 1])
        swapped = logits(config, alone, Prompts(text=text[b : b + 1, ::-1]))[0]
        np.testing.assert_allclose(swapped[::-1], together[b], atol=2e-5)


def test_rematerialising_blocks_changes_nothing() -> None:
    config, given = cases.CONFIG, cases.inputs(cases.CONFIG)
    image, size = given.image[None], np.full((1, 2), config.image_size, np.int32)
    whole = encode(config, "current", image, size).embedding
    found = encode(dataclasses.replace(config, remat=True), "current", image, size).embedding
    np.testing.assert_allclose(found, whole, atol=2e-5)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (Prompts(), "needs text, points or a box"),
        (Prompts(points=jnp.zeros((1, 1, 1, 2))), "point_labels"),
        (Prompts(mask=jnp.zeros((1, 1, 32, 32))), "no mask as a prompt"),
    ],
)
def test_prompts_that_it_cannot_take(prompts: Prompts, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        logits(cases.CONFIG, features_of(cases.CONFIG), prompts)


def test_sizes_that_no_model_can_have() -> None:
    with pytest.raises(UserError, match=r"segmenter.width: expected a multiple of heads 3"):
        dataclasses.replace(cases.CONFIG, width=50)
