"""ViLT gives what transformers' ViLT gives, fused, apart and for images of any size."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import vilt as vilt_table
from evf_sam_jax.errors import UserError
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.families import tower_to_dict
from evf_sam_jax.models.vilt import READOUTS, Vilt, ViltConfig
from tests.parity import vilt_cases
from tests.parity.weights import our_params

GOLDEN = Path(__file__).parents[2] / "golden"
BAR = 1e-4
SMALL = vilt_cases.SMALL


@functools.lru_cache
def all_params(config: ViltConfig) -> dict:
    section = {"encoder": tower_to_dict(config)}
    found = our_params(vilt_table.table(config), section, prefix="vilt.")["encoder"]
    return jax.tree.map(jnp.asarray, found)


def params(config: ViltConfig) -> dict:
    """Those of both modalities and the pooler, of which any configuration uses a part."""
    changes = {"fusion": "early", "readout": "pooler", "concat": "channels", "early_layers": None}
    return all_params(dataclasses.replace(config, **changes, remat=False))


@functools.partial(jax.jit, static_argnums=0)
def run(config: ViltConfig, params, *inputs) -> jax.Array:
    return Vilt(config).apply({"params": params}, *inputs)


def of_pairs(config: ViltConfig, given: vilt_cases.Inputs, masked: bool = True) -> np.ndarray:
    """[n, t, d] of n images with one phrase each."""
    inputs = given.image, given.ids[:, None], given.valid[:, None]
    inside = (given.image_valid,) if masked else ()
    return np.asarray(run(config, params(config), *inputs, *inside))[:, 0]


def our_outputs(config: ViltConfig, name: str) -> dict[str, np.ndarray]:
    given = vilt_cases.inputs(config, vilt_cases.SIZES[name])

    def found(readout: str) -> np.ndarray:
        one = dataclasses.replace(config, readout=readout)
        return of_pairs(one, given, masked=name == "padded")[:, 0]

    image_cls, text_cls = np.split(found("concat"), 2, axis=-1)
    outputs = {readout: found(readout) for readout in ("pooler", "image_mean")}
    return outputs | {"image_cls": image_cls, "text_cls": text_cls}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert np.abs(found[name] - value).max() <= BAR, name


@pytest.mark.parametrize("name", vilt_cases.SIZES)
def test_equals_stored_outputs_of_the_original(name: str) -> None:
    with np.load(GOLDEN / f"vilt_{name}.npz") as golden:
        assert_equal(our_outputs(SMALL, name), dict(golden))


@pytest.mark.torch
@pytest.mark.parametrize("name", vilt_cases.SIZES)
def test_equals_the_original(name: str) -> None:
    expected = vilt_cases.original_outputs(SMALL, vilt_cases.SIZES[name])
    assert_equal(our_outputs(SMALL, name), expected)


@pytest.mark.torch
@pytest.mark.slow
def test_equals_the_original_at_full_size() -> None:
    config = dataclasses.replace(ViltConfig.b32(), dtype="float32")
    sizes = ((12, 19), (19, 10))
    given = vilt_cases.inputs(config, sizes)
    expected = vilt_cases.original_outputs(config, sizes)
    for readout, value in expected.items():
        found = of_pairs(dataclasses.replace(config, readout=readout), given)[:, 0]
        assert np.abs(found - value).max() <= BAR, readout


@pytest.fixture(scope="module")
def given() -> vilt_cases.Inputs:
    return vilt_cases.inputs(SMALL, vilt_cases.SIZES["padded"])


def test_what_is_outside_an_image_changes_nothing(given: vilt_cases.Inputs) -> None:
    noise = np.random.default_rng(0).normal(size=given.image.shape).astype(np.float32)
    inside = given.image_valid[..., None]
    noisy = dataclasses.replace(given, image=np.where(inside, given.image, noise))
    for readout in ("concat", "image_mean"):
        config = dataclasses.replace(SMALL, readout=readout)
        np.testing.assert_array_equal(of_pairs(config, noisy), of_pairs(config, given))


def test_a_mask_of_everything_changes_nothing() -> None:
    square = vilt_cases.inputs(SMALL, vilt_cases.SIZES["square"])
    assert square.image_valid.all()
    expected = of_pairs(SMALL, square, masked=False)
    np.testing.assert_allclose(of_pairs(SMALL, square), expected, atol=1e-6)


def test_padding_of_the_text_changes_nothing(given: vilt_cases.Inputs) -> None:
    ids = np.where(given.valid, given.ids, 77)  # whatever the ids of the padding are
    padded = dataclasses.replace(given, ids=ids)
    np.testing.assert_array_equal(of_pairs(SMALL, padded), of_pairs(SMALL, given))
    attended = dataclasses.replace(padded, valid=np.ones_like(given.valid))
    assert np.abs(of_pairs(SMALL, attended) - of_pairs(SMALL, given))[1].max() > 1e-3


BOTH = dataclasses.replace(SMALL, readout="concat")


def test_fused_in_no_layer_equals_two_separate_passes(given: vilt_cases.Inputs) -> None:
    never = dataclasses.replace(BOTH, early_layers=0)
    found = of_pairs(never, given)
    late = of_pairs(dataclasses.replace(BOTH, fusion="late"), given)
    np.testing.assert_allclose(found, late, atol=1e-6)
    # The text of a pass of its own; the image of a pass with another text.
    text = of_pairs(dataclasses.replace(SMALL, fusion="text"), given)
    np.testing.assert_allclose(found[..., SMALL.width :], text, atol=1e-6)
    other_text = dataclasses.replace(given, ids=given.ids[::-1], valid=given.valid[::-1])
    image = of_pairs(never, other_text)[..., : SMALL.width]
    np.testing.assert_allclose(found[..., : SMALL.width], image, atol=1e-6)


def test_each_fused_layer_counts_and_all_of_them_are_early_fusion(
    given: vilt_cases.Inputs,
) -> None:
    by_depth = [
        of_pairs(dataclasses.replace(BOTH, early_layers=layers), given)
        for layers in range(SMALL.layers + 1)
    ]
    for fewer, more in zip(by_depth, by_depth[1:], strict=False):
        assert np.abs(fewer - more).max() > 1e-3
    np.testing.assert_allclose(by_depth[-1], of_pairs(BOTH, given), atol=1e-6)


def test_two_tokens_are_the_two_halves_of_the_channels(given: vilt_cases.Inputs) -> None:
    tokens = of_pairs(dataclasses.replace(BOTH, concat="tokens"), given)
    assert tokens.shape == (2, 2, SMALL.width)
    np.testing.assert_allclose(tokens.reshape(2, 1, -1), of_pairs(BOTH, given), atol=1e-6)


@pytest.mark.parametrize(
    "fusion, readout", [(fusion, one) for fusion, all_of in READOUTS.items() for one in all_of]
)
@pytest.mark.parametrize("concat", ["channels", "tokens"])
def test_the_configuration_says_the_features_shape(fusion: str, readout: str, concat: str) -> None:
    tiny = ViltConfig.tiny()
    config = dataclasses.replace(tiny, fusion=fusion, readout=readout, concat=concat)
    image = jnp.zeros((2, config.image_size, config.image_size, 3), jnp.float32)
    ids, valid = jnp.zeros((2, 3, 5), jnp.int32), jnp.ones((2, 3, 5), bool)
    found, _ = jax.eval_shape(
        lambda: Vilt(config).init_with_output(jax.random.key(0), image, ids, valid)
    )
    assert found.shape == (2, 3, config.prompt_tokens, config.prompt_width)


def test_phrases_of_an_image_do_not_mix(given: vilt_cases.Inputs) -> None:
    ids, valid = np.stack([given.ids, given.ids[::-1]]), np.stack([given.valid, given.valid[::-1]])
    weights = params(SMALL)
    together = np.asarray(run(SMALL, weights, given.image, ids, valid, given.image_valid))
    for b in range(2):
        for k in range(2):
            one = slice(b, b + 1), slice(k, k + 1)
            inside = given.image_valid[one[0]]
            alone = run(SMALL, weights, given.image[one[0]], ids[one], valid[one], inside)
            np.testing.assert_allclose(alone[0, 0], together[b, k], atol=1e-5)


def test_a_phrase_that_is_all_padding_stays_finite(given: vilt_cases.Inputs) -> None:
    nothing = dataclasses.replace(given, valid=np.zeros_like(given.valid))
    for fusion in READOUTS:
        config = dataclasses.replace(SMALL, fusion=fusion, readout="pooler")
        assert np.isfinite(of_pairs(config, nothing)).all()


def test_the_hosts_fourth_channel_says_what_is_inside() -> None:
    tiny = dataclasses.replace(ViltConfig.tiny(), image_fit="pad")
    model = dataclasses.replace(EvfSamConfig.tiny(), encoder=tiny)
    rng = np.random.default_rng(0)
    image = tower_images(model).encoder(rng.integers(0, 256, (40, 90, 3), np.uint8))[None]
    given = vilt_cases.inputs(tiny, vilt_cases.SIZES["square"])
    projector = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        evf_sam.param_shapes(model)["projector"],
    )
    weights = {"encoder": params(tiny), "projector": projector}

    encode_phrases = jax.jit(evf_sam.encode_phrases, static_argnums=0)

    def prompt(image: np.ndarray) -> np.ndarray:
        pairs = given.ids[:1, None], given.valid[:1, None]
        return np.asarray(encode_phrases(model, weights, image, *pairs))

    noise = rng.normal(size=image.shape).astype(np.float32) * (image[..., 3:] == 0)
    noise[..., 3] = 0
    assert np.abs(noise).max() > 1
    np.testing.assert_array_equal(prompt(image + noise), prompt(image))
    assert np.abs(prompt((image + noise)[..., :3]) - prompt(image)).max() > 1e-2


def count(config: ViltConfig) -> int:
    image = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    ids, valid = jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1, 2), bool)
    made = jax.eval_shape(lambda: Vilt(config).init(jax.random.key(0), image, ids, valid))
    return sum(leaf.size for leaf in jax.tree.leaves(made["params"]))


def test_parameters_of_the_released_size() -> None:
    """The paper's Table 3 says 133M with text alone and 136M with both.

    Both counts have the head that predicts masked words, with a matrix of its own for them (24.1M),
    and the pooler; without images there is neither the patch embedding nor their positions.
    """
    config = dataclasses.replace(ViltConfig.b32(), readout="pooler")
    head = 768 * 768 + 3 * 768 + 30522 * 768 + 30522
    assert count(config) == 111_595_008
    assert round((count(config) + head) / 1e6) == 136
    assert round((count(dataclasses.replace(config, fusion="text")) + head) / 1e6) == 133
    assert count(ViltConfig.b32()) == 111_595_008 - 769 * 768


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fusion": "middle"}, "encoder.fusion: expected early or late or text, found 'middle'"),
        ({"fusion": "late", "readout": "image_cls"}, "encoder.readout with late fusion: expected"),
        ({"fusion": "text", "readout": "concat"}, "encoder.readout with text fusion: expected"),
        ({"fusion": "late", "readout": "concat", "early_layers": 2}, "encoder.early_layers"),
        ({"early_layers": 4}, "encoder.early_layers: expected None or a number from 0 to 3"),
        ({"early_layers": 0, "readout": "image_cls"}, "with early fusion in no layer: expected co"),
        ({"image_fit": "crop"}, "encoder.image_fit: expected stretch or pad, found 'crop'"),
        ({"concat": "both"}, "encoder.concat: expected channels or tokens, found 'both'"),
    ],
)
def test_what_no_vilt_can_be(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ViltConfig.tiny(), **changes)
