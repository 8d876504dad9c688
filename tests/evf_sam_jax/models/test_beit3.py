"""BEiT-3 gives what torchscale gives, fused and for each modality alone."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import beit3 as beit3_table
from evf_sam_jax.errors import UserError
from evf_sam_jax.models import beit3, evf_sam
from evf_sam_jax.models.beit3 import Beit3Config
from tests.parity import beit3_cases
from tests.parity.weights import our_params

GOLDEN = Path(__file__).parents[2] / "golden"
BAR = 1e-4


def model(encoder: Beit3Config) -> tuple[evf_sam.EvfSamConfig, evf_sam.Params]:
    config = dataclasses.replace(evf_sam.EvfSamConfig.tiny(), encoder=encoder)
    table = beit3_table.table(encoder)
    return config, our_params(table, beit3_cases.section(encoder), prefix="beit3.")


encode_phrases = jax.jit(evf_sam.encode_phrases, static_argnums=0)
final_tokens = jax.jit(beit3.final_tokens, static_argnums=0)
image_cls_attention = jax.jit(evf_sam.image_cls_attention, static_argnums=0)


def attention(config: evf_sam.EvfSamConfig, params: evf_sam.Params, given) -> np.ndarray:
    """Of each of n pairs: how much the image [CLS] attends to each patch, summed over heads."""
    pairs = given.ids[:, None], given.valid[:, None]
    return np.asarray(image_cls_attention(config, params, given.image, *pairs)[:, 0])


def tokens(config: evf_sam.EvfSamConfig, params: evf_sam.Params, given, fusion: str):
    """Image and text tokens of each of n pairs, given as n images with one phrase each."""
    encoder = dataclasses.replace(config.encoder, fusion=fusion, readout="text_cls")
    phrases = given.ids[:, None], given.valid[:, None]
    return final_tokens(encoder, params["encoder"], given.image, *phrases)


def our_outputs(encoder: Beit3Config) -> dict[str, np.ndarray]:
    """Late fusion keeps the modalities apart, so its tokens are those of each alone."""
    config, params = model(encoder)
    given = beit3_cases.inputs(encoder)
    vision, text = tokens(config, params, given, "late")
    _, text_only = tokens(config, params, given, "text")
    np.testing.assert_allclose(text_only, text, atol=1e-5)
    return {
        "early": np.concatenate(tokens(config, params, given, "early"), axis=1),
        "text": np.asarray(text),
        "vision": np.asarray(vision),
        "attention": attention(config, params, given),
    }


@pytest.mark.parametrize("name", beit3_cases.CONFIGS)
def test_fusion_in_no_layer_equals_each_modality_alone(name: str) -> None:
    config, params = model(beit3_cases.CONFIGS[name])
    given = beit3_cases.inputs(config.encoder)
    apart = dataclasses.replace(config.encoder, early_layers=0, readout="concat")
    found = tokens(dataclasses.replace(config, encoder=apart), params, given, "early")
    for ours, alone in zip(found, tokens(config, params, given, "late"), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=0, atol=1e-6 * np.abs(alone).max())


def test_each_fused_layer_counts_and_all_of_them_are_early_fusion() -> None:
    config, params = model(beit3_cases.CONFIGS["small_base"])
    given = beit3_cases.inputs(config.encoder)
    layers = config.encoder.layers

    def image_tokens(early_layers: int | None) -> np.ndarray:
        encoder = dataclasses.replace(config.encoder, early_layers=early_layers, readout="text_cls")
        chosen = dataclasses.replace(config, encoder=encoder)
        return np.asarray(tokens(chosen, params, given, "early")[0])

    by_depth = [image_tokens(early_layers) for early_layers in range(layers + 1)]
    np.testing.assert_array_equal(by_depth[-1], image_tokens(None))
    for fewer, more in zip(by_depth, by_depth[1:], strict=False):
        assert np.abs(fewer - more).max() > 1e-3


def test_attention_to_patches_leaves_out_text_that_the_last_layer_does_not_see() -> None:
    config, params = model(beit3_cases.CONFIGS["small_base"])
    given = beit3_cases.inputs(config.encoder)
    apart = dataclasses.replace(config.encoder, early_layers=config.encoder.layers - 1)
    encoder = dataclasses.replace(config.encoder, fusion="late", readout="concat")
    projections = params["encoder"]["last_layer"]["self_attn"]["q_proj"]
    edited = jax.tree.map(lambda leaf: leaf, params)
    edited["encoder"]["last_layer"]["self_attn"]["q_proj"] = jax.tree.map(
        np.zeros_like, projections
    )
    for chosen in (apart, encoder):  # even attention over [CLS] and patches
        found = attention(dataclasses.replace(config, encoder=chosen), edited, given)
        expected = np.full((2, 4, 4), encoder.heads / (1 + encoder.patches))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert np.abs(found[name] - value).max() <= BAR, name


@pytest.mark.parametrize("name", beit3_cases.CONFIGS)
def test_equals_stored_outputs_of_the_original(name: str) -> None:
    with np.load(GOLDEN / f"beit3_{name}.npz") as golden:
        assert_equal(our_outputs(beit3_cases.CONFIGS[name]), dict(golden))


@pytest.mark.torch
@pytest.mark.parametrize("name", beit3_cases.CONFIGS)
def test_equals_the_original(name: str) -> None:
    config = beit3_cases.CONFIGS[name]
    assert_equal(our_outputs(config), beit3_cases.original_outputs(config))


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "large"])
def test_equals_the_original_at_full_size(size: str) -> None:
    config = dataclasses.replace(getattr(Beit3Config, size)(), dtype="float32")
    assert_equal(our_outputs(config), beit3_cases.original_outputs(config))


def test_attention_without_a_preference_is_even_and_leaves_out_padding() -> None:
    config, params = model(beit3_cases.CONFIGS["small_base"])
    encoder = config.encoder
    given = beit3_cases.inputs(encoder)
    projections = params["encoder"]["last_layer"]["self_attn"]["q_proj"]
    zeros = jax.tree.map(np.zeros_like, projections)
    edited = jax.tree.map(lambda leaf: leaf, params)
    edited["encoder"]["last_layer"]["self_attn"]["q_proj"] = zeros
    keys = 1 + encoder.patches + given.valid.sum(axis=1)
    expected = np.broadcast_to((encoder.heads / keys)[:, None, None], (2, 4, 4))
    np.testing.assert_allclose(attention(config, edited, given), expected, rtol=1e-6)


def prompts(config: evf_sam.EvfSamConfig, params: evf_sam.Params, image, ids, valid) -> np.ndarray:
    return np.asarray(encode_phrases(config, params, image, ids, valid))


def with_projector(config: evf_sam.EvfSamConfig, params: evf_sam.Params) -> evf_sam.Params:
    rng = np.random.default_rng(0)
    projector = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.1), jnp.float32),
        evf_sam.param_shapes(config)["projector"],
    )
    return {**params, "projector": projector}


def test_padding_changes_no_prompt() -> None:
    config, params = model(beit3_cases.CONFIGS["small_base"])
    params = with_projector(config, params)
    given = beit3_cases.inputs(config.encoder)
    image, ids = given.image[:1], given.ids[:1, None]
    short = prompts(config, params, image, ids, np.ones(ids.shape, bool))
    padding = np.full((1, 1, 5), 77, np.int32)  # whatever the ids of the padding are
    longer = np.concatenate([ids, padding], axis=-1)
    valid = np.arange(longer.shape[-1])[None, None] < ids.shape[-1]
    np.testing.assert_allclose(prompts(config, params, image, longer, valid), short, atol=1e-5)
    assert np.abs(prompts(config, params, image, longer, np.ones_like(valid)) - short).max() > 1e-3


def test_phrases_of_an_image_do_not_mix() -> None:
    config, params = model(beit3_cases.CONFIGS["small_base"])
    params = with_projector(config, params)
    given = beit3_cases.inputs(config.encoder)
    ids, valid = np.stack([given.ids, given.ids[::-1]]), np.stack([given.valid, given.valid[::-1]])
    together = prompts(config, params, given.image, ids, valid)
    for b in range(2):
        for k in range(2):
            alone = prompts(
                config,
                params,
                given.image[b : b + 1],
                ids[b : b + 1, k : k + 1],
                valid[b : b + 1, k : k + 1],
            )
            np.testing.assert_allclose(alone[0, 0], together[b, k], atol=1e-5)


def test_a_phrase_that_is_all_padding_stays_finite() -> None:
    config, params = model(beit3_cases.CONFIGS["small_base"])
    params = with_projector(config, params)
    given = beit3_cases.inputs(config.encoder)
    nothing = np.zeros((2, 1, 9), bool)
    for fusion, readout in (("text", "text_cls"), ("early", "image_cls")):
        encoder = dataclasses.replace(config.encoder, fusion=fusion, readout=readout)
        chosen = dataclasses.replace(config, encoder=encoder)
        assert np.isfinite(prompts(chosen, params, given.image, given.ids[:, None], nothing)).all()


@pytest.mark.parametrize(
    ("fusion", "readout"),
    [
        ("early", "image_cls"),
        ("early", "text_cls"),
        ("early", "image_mean"),
        ("early", "concat"),
        ("late", "concat"),
        ("text", "text_cls"),
    ],
)
def test_readout_takes_the_token_it_names(fusion: str, readout: str) -> None:
    """The last layer computes only what is read out; that equals reading it from all tokens."""
    config, params = model(beit3_cases.CONFIGS["small_base"])
    encoder = dataclasses.replace(config.encoder, fusion=fusion, readout=readout)
    config = dataclasses.replace(config, encoder=encoder)
    params = with_projector(config, params)
    given = beit3_cases.inputs(config.encoder)
    vision, text = tokens(config, params, given, fusion)
    feature = {
        "image_cls": lambda: vision[:, 0],
        "text_cls": lambda: text[:, 0],
        "image_mean": lambda: vision[:, 1:].mean(axis=1),
        "concat": lambda: np.concatenate([vision[:, 0], text[:, 0]], axis=-1),
    }[readout]()
    hidden = params["projector"]["hidden"]
    out = params["projector"]["out"]
    expected = np.maximum(feature @ hidden["kernel"] + hidden["bias"][None], 0.0)
    expected = expected @ out["kernel"] + out["bias"][None]
    found = prompts(config, params, given.image, given.ids[:, None], given.valid[:, None])
    np.testing.assert_allclose(found[:, 0, 0], expected, atol=2e-5)


def test_concatenation_as_tokens_gives_each_feature_a_prompt_of_its_own() -> None:
    config, params = model(beit3_cases.CONFIGS["small_base"])
    given = beit3_cases.inputs(config.encoder)
    pairs = given.ids[:, None], given.valid[:, None]

    def found(readout: str) -> np.ndarray:
        encoder = dataclasses.replace(config.encoder, readout=readout, concat="tokens")
        chosen = dataclasses.replace(config, encoder=encoder)
        return prompts(chosen, with_projector(chosen, params), given.image, *pairs)

    both = found("concat")
    assert both.shape[2] == 2
    for token, readout in enumerate(("image_cls", "text_cls")):
        np.testing.assert_allclose(both[:, :, token], found(readout)[:, :, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (dict(fusion="late", readout="concat", early_layers=1), "with late fusion: expected None"),
        (dict(early_layers=4), "expected None or a number from 0 to 3, found 4"),
        (dict(early_layers=True), "found True"),
        (dict(early_layers=0), "early fusion in no layer: expected concat or text_cls, found 'ima"),
        (dict(early_layers=0, readout="image_mean"), "in no layer: .* found 'image_mean'"),
        (dict(fusion="text"), "readout with text fusion: expected text_cls, found 'image_cls'"),
    ],
)
def test_impossible_fusions_are_refused(values: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(Beit3Config.tiny(), **values)
