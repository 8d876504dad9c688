"""SAM-2 gives what `sam2` gives: image features, and masks of all kinds of prompts."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convert import sam2 as sam2_table
from evf_sam_jax.collectives import collective_bytes
from evf_sam_jax.errors import UserError
from evf_sam_jax.models import attention
from evf_sam_jax.models.interfaces import ImageFeatures, MaskPrediction, Prompts
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.models.sam2.mask_decoder import stability
from evf_sam_jax.models.sam2.sam2 import Sam2
from evf_sam_jax.prompts import Prompt, stack_geometry
from evf_sam_jax.sharding import MeshConfig, make_mesh
from tests.golden.make_model_outputs import thinned
from tests.parity import sam2_cases
from tests.parity.sam_cases import Inputs, inputs
from tests.parity.weights import our_params

GOLDEN = Path(__file__).parents[2] / "golden"
BAR = 1e-4


@functools.lru_cache(maxsize=1)
def params_of(config: Sam2Config) -> dict:
    return our_params(sam2_table.table(config), sam2_cases.section(config))["segmenter"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(config: Sam2Config, profile: str, params: dict, image, size) -> ImageFeatures:
    model = Sam2(config, profile)

    def finished(segmenter: Sam2, image: jax.Array, size: jax.Array) -> ImageFeatures:
        return segmenter.finish(segmenter.encode_image(image, size))

    return model.apply({"params": params}, image, size, method=finished)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode(
    config: Sam2Config, ways: tuple, params: dict, features: ImageFeatures, prompts: Prompts
) -> list[MaskPrediction]:
    """What the prompts give each of the ways (profile, multimask, train), compiled together."""
    return [
        Sam2(config, profile).apply(
            {"params": params}, features, prompts, multimask, train, method=Sam2.decode
        )
        for profile, multimask, train in ways
    ]


def prompts_of(given: Inputs, kinds: tuple[str, ...]) -> Prompts:
    """The prompts of these kinds, as k prompts of one image."""
    return Prompts(
        text=jnp.asarray(given.text[None]) if "text" in kinds else None,
        points=jnp.asarray(given.points[None]) if "points" in kinds else None,
        point_labels=jnp.asarray(given.labels[None]) if "points" in kinds else None,
        boxes=jnp.asarray(given.boxes[None]) if "box" in kinds else None,
        mask=jnp.asarray(given.mask[None]) if "mask" in kinds else None,
    )


def features_of(config: Sam2Config, profile: str) -> ImageFeatures:
    given = inputs(config)
    sizes = np.asarray([given.size], np.int32)
    return encode(config, profile, params_of(config), given.image[None], sizes)


def our_outputs(name: str) -> dict[str, np.ndarray]:
    config = (sam2_cases.CONFIGS | sam2_cases.FULL_SIZES)[name]
    outputs = {}
    for profile in sam2_cases.profiles(name):
        features = features_of(config, profile)
        outputs[f"embedding/{profile}"] = features.embedding[0]
        for level, found in enumerate(features.high_res):
            outputs[f"high_res_{level}/{profile}"] = found[0]
    given = inputs(config)
    for kinds in sam2_cases.combinations(name):
        ways = sam2_cases.ways(kinds)
        all_ways = tuple((*way, False) for way in ways)
        found = decode(config, all_ways, params_of(config), features, prompts_of(given, kinds))
        for way, prediction in zip(ways, found, strict=True):
            outputs[sam2_cases.key(kinds, way, "logits")] = prediction.low_res_logits[0]
            outputs[sam2_cases.key(kinds, way, "iou")] = prediction.iou[0]
            outputs[f"{'+'.join(kinds)}/object_score"] = prediction.object_score[0]
    return outputs


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        worst = np.abs(np.asarray(found[name]) - value).max()
        assert worst <= BAR, f"{name}: {worst}"


@pytest.mark.parametrize("name", sam2_cases.CONFIGS)
def test_equals_stored_outputs_of_the_original(name: str) -> None:
    with np.load(GOLDEN / f"sam2_{name}.npz") as golden:
        assert_equal(thinned(our_outputs(name)), dict(golden))


@pytest.mark.torch
@pytest.mark.parametrize("name", sam2_cases.CONFIGS)
def test_equals_the_original(name: str) -> None:
    assert_equal(our_outputs(name), sam2_cases.original_outputs(name))


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", sam2_cases.FULL_SIZES)
def test_equals_the_original_at_full_size(name: str) -> None:
    assert_equal(our_outputs(name), sam2_cases.original_outputs(name))


def single_and_best() -> tuple[Sam2Config, ImageFeatures, Prompts]:
    """A model whose single masks are unstable, so that the best of three stands in for them."""
    config = sam2_cases.CONFIGS["small_t"]
    return config, features_of(config, "current"), prompts_of(inputs(config), ("text",))


def test_in_training_the_legacy_profile_keeps_to_the_single_mask() -> None:
    config, features, prompts = single_and_best()
    ways = tuple(
        (profile, False, train) for profile in ("legacy", "current") for train in (False, True)
    )
    legacy, legacy_training, current, training = decode(
        config, ways, params_of(config), features, prompts
    )
    assert (stability(legacy_training.low_res_logits) < 0.98).all()
    assert not np.allclose(legacy_training.low_res_logits, legacy.low_res_logits)
    np.testing.assert_array_equal(legacy.low_res_logits, current.low_res_logits)
    np.testing.assert_array_equal(training.low_res_logits, current.low_res_logits)


def test_a_mask_is_stable_if_its_area_is() -> None:
    logits = np.full((3, 10, 10), -1.0, np.float32)
    logits[0, :5] = 1.0
    logits[1, :5], logits[1, 5] = 1.0, 0.01  # between the thresholds
    np.testing.assert_allclose(stability(jnp.asarray(logits)), [1.0, 50 / 60, 1.0])


def test_prompts_of_several_shapes_go_together() -> None:
    """Points, or a box, or both, filled up to one shape, give what each gives alone."""
    config = sam2_cases.CONFIGS["small_t"]
    features, given = features_of(config, "current"), inputs(config)
    no_points = given.points[0, :0], given.labels[0, :0]
    asked = (
        Prompt(None, given.points[0, :2], given.labels[0, :2], None, None),
        Prompt(None, *no_points, given.boxes[0], None),
        Prompt(None, given.points[0, :1], given.labels[0, :1], given.boxes[0], None),
    )
    geometry = stack_geometry(asked)
    together = Prompts(
        points=jnp.asarray(geometry.points[None]),
        point_labels=jnp.asarray(geometry.labels[None]),
        boxes=jnp.asarray(geometry.boxes[None]),
        token_valid=jnp.asarray(geometry.valid[None]),
    )
    ways = (("current", True, False),)
    [found] = decode(config, ways, params_of(config), features, together)
    for row, prompt in enumerate(asked):
        points, boxes = prompt.points[None, None], prompt.box
        alone = Prompts(
            points=jnp.asarray(points) if len(prompt.points) else None,
            point_labels=jnp.asarray(prompt.labels[None, None]) if len(prompt.points) else None,
            boxes=None if boxes is None else jnp.asarray(boxes[None, None]),
        )
        [expected] = decode(config, ways, params_of(config), features, alone)
        np.testing.assert_allclose(
            found.low_res_logits[0, row], expected.low_res_logits[0, 0], atol=2e-5
        )


def test_images_and_prompts_do_not_mix() -> None:
    """What a prompt of an image gives, another image and other prompts do not change."""
    config = Sam2Config.tiny()
    params, rng = params_of(config), np.random.default_rng(0)
    side = config.image_size
    images = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    sizes = np.asarray([[side // 2, side], [side, side - 3]], np.int32)
    text = rng.normal(size=(2, 2, 1, config.out_channels)).astype(np.float32)

    def logits() -> np.ndarray:
        features = encode(config, "legacy", params, images, sizes)
        ways, prompts = (("legacy", False, False),), Prompts(text=jnp.asarray(text))
        [found] = decode(config, ways, params, features, prompts)
        return np.asarray(found.low_res_logits)

    before = logits()
    text[1, 0] += 1.0
    after = logits()
    np.testing.assert_allclose(after[0], before[0], atol=2e-5)
    np.testing.assert_allclose(after[1, 1], before[1, 1], atol=2e-5)
    assert np.abs(after[1, 0] - before[1, 0]).max() > 1e-2
    images[0], sizes[0] = images[0, ::-1], (side, side)
    after = logits()
    assert np.abs(after[0] - before[0]).max() > 1e-2
    np.testing.assert_allclose(after[1, 1], before[1, 1], atol=2e-5)


def test_devices_that_share_a_batch_exchange_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in tiles too, as images of the released size have it."""
    monkeypatch.setattr(attention, "SMALL_SCORES", 16)
    monkeypatch.setattr(attention, "TILE_SCORES", {"cpu": 64, "gpu": 64})
    config = Sam2Config.tiny()
    params, rng, side = params_of(config), np.random.default_rng(0), config.image_size
    images = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    sizes = np.asarray([[side // 2, side], [side, side]], np.int32)
    text = rng.normal(size=(2, 1, 1, config.out_channels)).astype(np.float32)

    def logits(params, images, sizes, text):
        features = encode(config, "legacy", params, images, sizes)
        [found] = decode(config, (("legacy", False, False),), params, features, Prompts(text=text))
        return found.low_res_logits

    expected = jax.jit(logits)(params, images, sizes, text)
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    with jax.set_mesh(mesh):
        shared = jax.device_put((images, sizes, text), rows)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(logits).lower(params, *shared).compile()
        found = compiled(params, *shared)
    assert not any(one.count for one in collective_bytes(compiled.as_text()).values())
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stages": (1, 2, 3)}, "segmenter.stages: expected 4 numbers"),
        ({"stages": (1, 0, 3, 1)}, "segmenter.stages: expected integers from 1 on"),
        ({"windows": (4, 3, 6, 3)}, "segmenter.windows: expected even ones but the last, found 3"),
        ({"global_blocks": (2,)}, "not the first of a later stage"),
        ({"global_blocks": (7,)}, "expected blocks from 0 to 6"),
        ({"image_size": 72}, "segmenter.image_size: expected a multiple of 32, found 72"),
    ],
)
def test_sizes_that_no_model_can_have(changes: dict, expected: str) -> None:
    with pytest.raises(UserError) as error:
        dataclasses.replace(Sam2Config.tiny(), **changes)
    assert expected in str(error.value)


def test_sizes_may_come_from_json() -> None:
    as_lists = dataclasses.replace(Sam2Config.tiny(), stages=[1, 1, 4, 1], windows=[4, 2, 6, 3])
    assert as_lists == Sam2Config.tiny() and hash(as_lists) == hash(Sam2Config.tiny())
