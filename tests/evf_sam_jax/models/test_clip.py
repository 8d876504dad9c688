"""CLIP gives what transformers' CLIP gives, and reads out what its configuration names."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import clip as clip_table
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.clip import Clip, ClipConfig
from evf_sam_jax.models.families import tower_to_dict
from tests.parity import clip_cases
from tests.parity.weights import our_params

GOLDEN = Path(__file__).parents[2] / "golden"
BAR = 1e-4
SMALL = clip_cases.CONFIGS["quick_gelu"]


@functools.lru_cache
def all_params(config: ClipConfig) -> dict:
    return our_params(clip_table.table(config), {"encoder": tower_to_dict(config)})["encoder"]


def params(config: ClipConfig) -> dict:
    """Those of both towers and their projections, of which any configuration uses a part."""
    changes = {"fusion": "late", "readout": "concat", "projected": True, "concat": "channels"}
    return all_params(dataclasses.replace(config, **changes, activation="gelu", remat=False))


@functools.partial(jax.jit, static_argnums=0)
def run(config: ClipConfig, params, *inputs) -> jax.Array:
    return Clip(config).apply({"params": params}, *inputs)


def features(config: ClipConfig, image, ids, valid) -> np.ndarray:
    """[b, k, t, d] of images [b, ...] and ids [b, k, l]."""
    return np.asarray(run(config, params(config), image, ids, valid))


def of_pairs(config: ClipConfig, given) -> np.ndarray:
    """[n, t, d] of n images with one phrase each."""
    return features(config, given.image, given.ids[:, None], given.valid[:, None])[:, 0]


def our_outputs(config: ClipConfig) -> dict[str, np.ndarray]:
    given = clip_cases.inputs(config)
    outputs = {}
    for suffix, projected in (("", False), ("_projected", True)):
        one = dataclasses.replace(config, projected=projected)
        image, text = np.split(of_pairs(one, given)[:, 0], [one.image_vector_width], axis=-1)
        outputs |= {f"image{suffix}": image, f"text{suffix}": text}
    return outputs


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert np.abs(found[name] - value).max() <= BAR, name


@pytest.mark.parametrize("name", clip_cases.CONFIGS)
def test_equals_stored_outputs_of_the_original(name: str) -> None:
    with np.load(GOLDEN / f"clip_{name}.npz") as golden:
        assert_equal(our_outputs(clip_cases.CONFIGS[name]), dict(golden))


@pytest.mark.torch
@pytest.mark.parametrize("name", clip_cases.CONFIGS)
def test_equals_the_original(name: str) -> None:
    config = clip_cases.CONFIGS[name]
    assert_equal(our_outputs(config), clip_cases.original_outputs(config))


@pytest.mark.torch
@pytest.mark.slow
def test_equals_the_original_at_full_size() -> None:
    config = dataclasses.replace(ClipConfig.l14_openai(), dtype="float32")
    given = clip_cases.inputs(clip_cases.SMALL)
    assert given.ids.max() == clip_cases.END
    assert_equal(our_outputs(config), clip_cases.original_outputs(config))


def test_text_alone_is_the_text_of_both() -> None:
    given = clip_cases.inputs(SMALL)
    alone = dataclasses.replace(SMALL, fusion="text", readout="text_eos")
    both = of_pairs(SMALL, given)
    np.testing.assert_allclose(
        of_pairs(alone, given), both[..., SMALL.image_vector_width :], atol=1e-6
    )
    read_out = of_pairs(dataclasses.replace(SMALL, readout="text_eos"), given)
    np.testing.assert_allclose(read_out, of_pairs(alone, given), atol=1e-6)


def test_two_tokens_are_the_two_halves_of_the_channels() -> None:
    given = clip_cases.inputs(SMALL)
    tokens = of_pairs(dataclasses.replace(SMALL, concat="tokens"), given)
    assert tokens.shape == (2, 2, SMALL.projection_width)
    channels = of_pairs(SMALL, given)
    np.testing.assert_array_equal(tokens.reshape(2, 1, -1), channels)


@pytest.mark.parametrize("fusion, readout", [("text", "text_eos"), ("late", "concat")])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("concat", ["channels", "tokens"])
def test_the_configuration_says_the_features_shape(
    fusion: str, readout: str, projected: bool, concat: str
) -> None:
    equal_widths = dataclasses.replace(ClipConfig.tiny(), vision_width=32, vision_heads=2)
    config = dataclasses.replace(
        equal_widths, fusion=fusion, readout=readout, projected=projected, concat=concat
    )
    image = jnp.zeros((2, config.image_size, config.image_size, 3), jnp.float32)
    ids, valid = jnp.zeros((2, 3, 5), jnp.int32), jnp.ones((2, 3, 5), bool)
    found, _ = jax.eval_shape(
        lambda: Clip(config).init_with_output(jax.random.key(0), image, ids, valid)
    )
    assert found.shape == (2, 3, config.prompt_tokens, config.prompt_width)


def test_padding_changes_no_feature() -> None:
    given = clip_cases.inputs(SMALL)
    ids = given.ids[:1, None]
    short = features(SMALL, given.image[:1], ids, np.ones(ids.shape, bool))
    padding = np.full((1, 1, 5), 77, np.int32)  # whatever the ids of the padding are
    longer = np.concatenate([ids, padding], axis=-1)
    valid = np.arange(longer.shape[-1])[None, None] < ids.shape[-1]
    found = features(SMALL, given.image[:1], longer, valid)
    np.testing.assert_allclose(found, short, atol=1e-5)
    read_elsewhere = features(SMALL, given.image[:1], longer, np.ones_like(valid))
    assert np.abs(read_elsewhere - short).max() > 1e-3


def test_every_word_before_the_end_is_seen() -> None:
    given = clip_cases.inputs(SMALL)
    before = of_pairs(SMALL, given)
    for token in range(5):
        ids = given.ids.copy()
        ids[1, token] = (ids[1, token] + 1) % clip_cases.BEGIN
        assert (
            np.abs(of_pairs(SMALL, dataclasses.replace(given, ids=ids))[1] - before[1]).max() > 1e-3
        )


def test_phrases_of_an_image_do_not_mix() -> None:
    given = clip_cases.inputs(SMALL)
    ids, valid = np.stack([given.ids, given.ids[::-1]]), np.stack([given.valid, given.valid[::-1]])
    together = features(SMALL, given.image, ids, valid)
    for b in range(2):
        for k in range(2):
            one = slice(b, b + 1), slice(k, k + 1)
            alone = features(SMALL, given.image[one[0]], ids[one], valid[one])
            np.testing.assert_allclose(alone[0, 0], together[b, k], atol=1e-5)


def test_a_phrase_that_is_all_padding_stays_finite() -> None:
    given = clip_cases.inputs(SMALL)
    nothing = np.zeros((2, 1, 9), bool)
    assert np.isfinite(features(SMALL, given.image, given.ids[:, None], nothing)).all()


def test_low_precision_stays_close() -> None:
    given = clip_cases.inputs(SMALL)
    exact = of_pairs(SMALL, given)
    low = dataclasses.replace(SMALL, dtype="bfloat16")
    found = run(low, params(SMALL), given.image, given.ids[:, None], given.valid[:, None])
    assert found.dtype == np.dtype("bfloat16")
    assert 1e-4 < np.abs(np.asarray(found, np.float32)[:, 0] - exact).max() < 0.1


def test_recomputing_changes_no_gradient() -> None:
    tiny = dataclasses.replace(ClipConfig.tiny(), fusion="text", readout="text_eos")
    given = clip_cases.inputs(tiny)
    inputs = given.image, given.ids[:, None], given.valid[:, None]
    inputs = jax.tree.map(jnp.asarray, inputs)

    def gradient(config: ClipConfig):
        def loss(params):
            return (Clip(config).apply({"params": params}, *inputs) ** 2).sum()

        return jax.jit(jax.grad(loss))(params(tiny))

    expected = gradient(tiny)
    found = gradient(dataclasses.replace(tiny, remat=True))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def count(config: ClipConfig, *beginnings: str) -> int:
    """Parameters of the encoder, or of the modules whose names begin like this."""
    image = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    ids, valid = jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1, 2), bool)
    made = jax.eval_shape(lambda: Clip(config).init(jax.random.key(0), image, ids, valid))
    kept = {
        name: part
        for name, part in made["params"].items()
        if not beginnings or name.startswith(beginnings)
    }
    return sum(leaf.size for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize(
    "size, text, both", [("l14", 123_060_480, 427_616_512), ("h14", 352_984_064, 986_109_440)]
)
def test_parameters_of_the_released_sizes(size: str, text: int, both: int) -> None:
    """The paper's Table 3 says 123M and 428M for L/14, 302M and 986M for H/14.

    "Text" of L/14 is its tower without the projection; of H/14 it can only be the tower's layers,
    without words and positions. "Late" is the whole model of either, but for its temperature.
    """
    config = getattr(ClipConfig, size)()
    alone = dataclasses.replace(config, fusion="text", readout="text_eos", projected=False)
    assert count(config) == both
    assert count(alone) == text
    if size == "h14":
        assert count(alone, "text_layers") == 302_309_376


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fusion": "early"}, "encoder.fusion: expected late or text, found 'early'"),
        ({"fusion": "text"}, "encoder.readout with text fusion: expected text_eos, found 'concat'"),
        ({"readout": "image_cls"}, "encoder.readout with late fusion: expected concat or text_eos"),
        ({"activation": "relu"}, "encoder.activation: expected gelu or quick_gelu, found 'relu'"),
        ({"image_fit": "pad"}, "encoder.image_fit: expected stretch or crop, found 'pad'"),
        ({"image_size": 33}, "encoder.image_size: expected a multiple of patch_size 8, found 33"),
        ({"concat": "tokens", "projected": False}, "found tokens of 48 and 32 channels"),
    ],
)
def test_what_no_clip_can_be(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ClipConfig.tiny(), **changes)
