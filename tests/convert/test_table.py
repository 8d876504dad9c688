"""A table fills every parameter once from names that must all be there, and reads both ways."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import beit3, clip, efficient_sam, evf_sam, sam, sam2, vilt
from convert.checkpoint_files import SourceTensor
from convert.table import (
    AS_IS,
    CONV,
    CONV_TRANSPOSE,
    DROP_LEADING_ONE,
    LINEAR,
    Ignored,
    Plan,
    Rule,
    Table,
    build_leaf,
    check_source,
    joined,
    make_plan,
)
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.released import RELEASED
from evf_sam_jax.models.vilt import ViltConfig
from tests.golden.make_parameter_paths import FILE, parameter_paths

MANIFEST = Path(__file__).parents[1] / "golden" / "evf_sam" / "evf_sam.manifest.json"
STACK = Table(
    rules=(
        Rule("layers.{layer}.{branch}.weight", "layers/{branch}/kernel", LINEAR),
        Rule("token", "token", DROP_LEADING_ONE),
    ),
    fields={"layer": {"0": (0,), "1": (1,)}, "branch": {"A": "vision", "B": "text"}},
    ignored=(Ignored(r"head\..*", "only for pretraining"),),
)
STACK_SHAPES = {"layers/vision/kernel": (2, 3, 4), "layers/text/kernel": (2, 3, 4), "token": (5,)}


def source(**arrays: np.ndarray) -> dict[str, SourceTensor]:
    return {
        key: SourceTensor(array.shape, array.dtype, lambda array=array: array)
        for key, array in arrays.items()
    }


def stack_source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"layers.{layer}.{branch}.weight": rng.normal(size=(4, 3)).astype(np.float32)
        for layer in (0, 1)
        for branch in "AB"
    } | {"token": rng.normal(size=(1, 5)).astype(np.float32)}


@pytest.mark.parametrize(
    ("transform", "torch_shape", "jax_shape"),
    [
        (AS_IS, (2, 3), (2, 3)),
        (LINEAR, (2, 3), (3, 2)),
        (CONV, (2, 3, 4, 5), (4, 5, 3, 2)),
        (CONV_TRANSPOSE, (2, 3, 4, 5), (4, 5, 2, 3)),
        (DROP_LEADING_ONE, (1, 3, 4), (3, 4)),
    ],
)
def test_transforms_are_undone_by_their_inverse(transform, torch_shape, jax_shape):
    tensor = np.random.default_rng(0).normal(size=torch_shape)
    assert transform.to_jax(tensor).shape == jax_shape
    np.testing.assert_array_equal(transform.to_torch(transform.to_jax(tensor)), tensor)


def test_a_stack_gathers_its_layers_in_place():
    arrays = stack_source()
    plan = make_plan(STACK, STACK_SHAPES)
    leaf = build_leaf(plan, "layers/text/kernel", source(**arrays))
    np.testing.assert_array_equal(leaf[1], arrays["layers.1.B.weight"].T)
    np.testing.assert_array_equal(leaf[0], arrays["layers.0.B.weight"].T)


def test_a_stack_of_mixed_dtypes_is_wide_enough_for_each():
    arrays = stack_source()
    arrays["layers.0.A.weight"] = arrays["layers.0.A.weight"].astype(np.float16)
    arrays["layers.1.A.weight"] = arrays["layers.1.A.weight"].astype(ml_dtypes.bfloat16)
    arrays["layers.0.B.weight"] = arrays["layers.0.B.weight"].astype(np.float16)
    arrays["layers.1.B.weight"] = arrays["layers.1.B.weight"].astype(np.float16)
    plan = make_plan(STACK, STACK_SHAPES)
    assert build_leaf(plan, "layers/vision/kernel", source(**arrays)).dtype == np.float32
    assert build_leaf(plan, "layers/text/kernel", source(**arrays)).dtype == np.float16


def test_a_table_must_fill_the_model():
    shapes = dict(STACK_SHAPES)
    with pytest.raises(ValueError, match="not filled exactly once"):
        make_plan(STACK, shapes | {"unfilled": (1,)})
    with pytest.raises(ValueError, match="not filled exactly once"):
        make_plan(STACK, shapes | {"layers/text/kernel": (3, 3, 4)})
    with pytest.raises(ValueError, match="does not have"):
        make_plan(STACK, {"token": (5,)})
    twice = dataclasses.replace(STACK, rules=(*STACK.rules, Rule("other", "token")))
    with pytest.raises(ValueError, match="not filled exactly once"):
        make_plan(twice, shapes)
    same_name = dataclasses.replace(STACK, rules=(*STACK.rules, Rule("token", "token")))
    with pytest.raises(ValueError, match="two rules use token"):
        make_plan(same_name, shapes)


def test_tables_that_would_confuse_their_fields_are_not_joined():
    with pytest.raises(ValueError, match="share the name of a field"):
        joined(STACK, STACK.prefixed("other."))


def test_a_checkpoint_that_fits_is_accepted_and_what_is_ignored_has_its_reason():
    arrays = stack_source() | {"head.weight": np.zeros(3)}
    plan = make_plan(STACK, STACK_SHAPES)
    assert check_source(plan, source(**arrays), "x") == {"head.weight": "only for pretraining"}


def test_everything_that_is_wrong_is_said_at_once():
    arrays = stack_source() | {"headless": np.zeros(3), "extra": np.zeros(2)}
    del arrays["layers.1.B.weight"]
    arrays["layers.0.A.weight"] = np.zeros((3, 4), np.float32)
    arrays["token"] = np.zeros((1, 5), np.int64)
    with pytest.raises(UserError) as error:
        check_source(make_plan(STACK, STACK_SHAPES), source(**arrays), "some.pth")
    message = str(error.value)
    for part in (
        "some.pth",
        "1 tensor missing: layers.1.B.weight",
        "2 tensors not known to the model: extra, headless",
        "1 tensor of the wrong shape: layers.0.A.weight (expected [4, 3], found [3, 4])",
        "1 tensor of the wrong dtype: token",
        "found int64",
    ):
        assert part in message
    assert "\n" not in message


def test_a_long_list_of_mistakes_is_cut_short():
    with pytest.raises(UserError, match="5 tensors missing"):
        check_source(make_plan(STACK, STACK_SHAPES), {}, "some.pth")
    many = source(**{f"extra{i}": np.zeros(1) for i in range(100)})
    with pytest.raises(UserError, match="and 95 more"):
        check_source(make_plan(STACK, STACK_SHAPES), many, "some.pth")


@pytest.fixture(scope="module")
def pinned() -> dict[str, dict[str, list[int]]]:
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def plans(pinned: dict[str, dict[str, list[int]]]) -> dict[str, Plan]:
    """The plans of what can be converted, for the shapes that are pinned."""
    tables = {"evf_sam": evf_sam.table(RELEASED["evf-sam"])}
    tables["tiny"] = evf_sam.table(EvfSamConfig.tiny())
    tables |= {name: sam.table(config) for name, config in sam.CONFIGS.items()}
    tables |= {name: efficient_sam.table(config) for name, config in efficient_sam.CONFIGS.items()}
    tables |= {f"sam2_{name}": sam2.table(config) for name, config in sam2.CONFIGS.items()}
    tables |= {name: beit3.table(config) for name, config in beit3.CONFIGS.items()}
    tables |= {name: clip.table(config) for name, config in clip.CONFIGS.items()}
    tables["vilt_b32"] = vilt.table(dataclasses.replace(ViltConfig.b32(), readout="pooler"))
    shapes = {name: {path: tuple(s) for path, s in one.items()} for name, one in pinned.items()}
    # That they can be made shows that each table fills its paths exactly once.
    return {name: make_plan(tables[name], shapes[name]) for name in pinned}


def test_the_parameter_paths_are_those_that_are_pinned(pinned: dict[str, dict[str, list[int]]]):
    assert parameter_paths() == pinned


def test_the_tables_name_every_tensor_of_the_released_checkpoint(plans: dict[str, Plan]):
    released = json.loads(MANIFEST.read_text())
    ignored = {"mm_extractor.beit3.vision_embed.mask_token"}
    assert {key: list(shape) for key, shape in plans["evf_sam"].source_shapes().items()} == {
        key: shape for key, shape in released.items() if key not in ignored
    }


def test_evf_sam_holds_the_foundation_models_under_prefixes(plans: dict[str, Plan]):
    encoder = {f"mm_extractor.{key}" for key in plans["beit3_large"].source_shapes()}
    segmenter = {f"visual_model.{key}" for key in plans["sam_vit_h"].source_shapes()}
    projector = {
        f"text_hidden_fcs.0.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")
    }
    assert set(plans["evf_sam"].source_shapes()) == encoder | segmenter | projector


def test_blocks_lie_where_the_scan_runs_them(plans: dict[str, Plan]):
    index = {
        part.key: (path, part.index)
        for path, parts in plans["sam_vit_h"].parts.items()
        for part in parts
        if part.key.endswith("attn.qkv.weight")
    }
    groups = "segmenter/image_encoder/groups"
    assert index["image_encoder.blocks.0.attn.qkv.weight"][1] == (0, 0)
    assert index["image_encoder.blocks.7.attn.qkv.weight"] == (
        f"{groups}/global/attn/qkv/kernel",
        (0,),
    )
    assert index["image_encoder.blocks.12.attn.qkv.weight"] == (
        f"{groups}/windowed/attn/qkv/kernel",
        (1, 4),
    )


@pytest.mark.torch
def test_the_tables_name_every_tensor_of_the_originals(plans: dict[str, Plan]):
    import torch
    from transformers import CLIPModel, ViltModel
    from transformers import ViltConfig as OriginalConfig

    from tests.parity import clip_cases, originals

    beit3_class, encoder_config = originals.torchscale_beit3()
    registry = originals.segment_anything().sam_model_registry
    with torch.device("meta"):
        made = {f"sam_{size}": registry[size]() for size in ("vit_b", "vit_l", "vit_h")}
        for name, width, heads, layers in (("base", 768, 12, 12), ("large", 1024, 16, 24)):
            # model/unilm/beit3/modeling_utils.py of hustvl/EVF-SAM at 9935dc5
            config = encoder_config(
                img_size=224,
                patch_size=16,
                vocab_size=64010,
                multiway=True,
                layernorm_embedding=False,
                normalize_output=True,
                no_output_layer=True,
                encoder_embed_dim=width,
                encoder_attention_heads=heads,
                encoder_ffn_embed_dim=4 * width,
                encoder_layers=layers,
            )
            made[f"beit3_{name}"] = torch.nn.ModuleDict({"beit3": beit3_class(config)})
        for name in ("clip_l14", "clip_h14"):
            made[name] = CLIPModel(clip_cases.original_config(clip.CONFIGS[name]))
        made["vilt_b32"] = torch.nn.ModuleDict({"vilt": ViltModel(OriginalConfig())})
    for name, model in made.items():
        found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        for unused in ("beit3.vision_embed.mask_token", "logit_scale"):
            found.pop(unused, None)
        assert found == plans[name].source_shapes(), name


def test_the_config_of_every_released_scale_is_recognised():
    large = {"sam_scale": "huge", "mm_extractor_scale": "large", "hidden_size": 1024}
    base = {"sam_scale": "huge", "mm_extractor_scale": "base"}  # hidden_size 768 by default
    assert evf_sam.recognise(large, Path("c")) == ("evf-sam", RELEASED["evf-sam"])
    assert evf_sam.recognise(base, Path("c")) == ("evf-sam-base", RELEASED["evf-sam-base"])
    video = {"architectures": ["EvfSam2Model"], "sam_scale": "large", "hidden_size": 1024}
    found = evf_sam.recognise({**video, "mm_extractor_scale": "large"}, Path("c"))
    assert found == ("evf-sam2", RELEASED["evf-sam2"])
    small = {"architectures": ["EvfEffiSamModel"], "sam_scale": "tiny"}
    found = evf_sam.recognise({**small, "mm_extractor_scale": "base"}, Path("c"))
    assert found == ("evf-effi-sam-tiny", RELEASED["evf-effi-sam-tiny"])


@pytest.mark.parametrize(
    ("variant", "multitask", "asked", "profile", "said"),
    [
        ("evf-sam2", False, None, "legacy", "profile legacy, as evf-sam2 needs it"),
        ("evf-sam2", True, None, "current", "profile current, as evf-sam2-multitask needs it"),
        ("evf-sam2", False, "legacy", "legacy", "profile legacy, as evf-sam2 needs it"),
        ("evf-sam2", False, "current", "current", "trained with the profile legacy: expect worse"),
        ("evf-sam2", True, "legacy", "legacy", "trained with the profile current: expect worse"),
        ("evf-effi-sam", False, None, "current", "profile current, as evf-effi-sam needs it"),
        ("evf-sam", False, None, "current", None),
        ("evf-sam", False, "current", "current", None),
        ("evf-sam", False, "legacy", "current", "for evf-sam both mean the same"),
    ],
)
def test_the_profile_is_what_the_released_weights_need_or_is_warned_of(
    tmp_path: Path, variant: str, multitask: bool, asked: str | None, profile: str, said: str | None
):
    if multitask:
        (tmp_path / "added_tokens.json").write_text('{"[semantic]": 64002}')
    config, notes = evf_sam.in_profile(variant, RELEASED[variant], tmp_path, asked)
    assert config == dataclasses.replace(RELEASED[variant], profile=profile)
    if said is None:
        assert notes == ()
    else:
        (note,) = notes
        assert said in note


@pytest.mark.parametrize(
    ("asked", "profile", "warned"),
    [(None, "legacy", False), ("legacy", "legacy", False), ("current", "current", True)],
)
def test_the_profile_of_a_model_trained_here_is_overridden_with_a_warning(
    tmp_path: Path, asked: str | None, profile: str, warned: bool
):
    trained = dataclasses.replace(RELEASED["evf-sam2"], profile="legacy")
    (tmp_path / "added_tokens.json").write_text('{"[semantic]": 64002}')
    config, notes = evf_sam.in_profile("evf-sam2", trained, tmp_path, asked, own=True)
    assert config == dataclasses.replace(trained, profile=profile)
    assert len(notes) == warned
    assert all("trained with the profile legacy: expect worse masks" in note for note in notes)


def test_a_directory_called_multitask_without_its_tokenizer_is_doubted(tmp_path: Path):
    directory = tmp_path / "evf-sam2-multitask"
    directory.mkdir()
    released = RELEASED["evf-sam2"]
    config, notes = evf_sam.in_profile("evf-sam2", released, directory, None)
    assert config.profile == "legacy"
    assert "these need --profile current" in notes[1]
    config, (note,) = evf_sam.in_profile("evf-sam2", released, directory, "current")
    assert config.profile == "current"
    assert "as the directory's name has it" in note and "worse" not in note
    assert evf_sam.in_profile("evf-sam", RELEASED["evf-sam"], directory, None)[1] == ()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"mm_extractor_scale": "large", "hidden_size": 1024}, "has no sam_scale: expected 'huge'"),
        ({"sam_scale": "huge", "hidden_size": 1024}, "has no mm_extractor_scale"),
        (
            {
                "architectures": ["EvfSam2Model"],
                "sam_scale": "huge",
                "mm_extractor_scale": "large",
                "hidden_size": 1024,
            },
            "'large' with 'large' or 'tiny' with 'base' for EvfSam2Model, found 'huge'",
        ),
        (
            {"sam_scale": "tiny", "mm_extractor_scale": "base"},
            "may be evf-sam2-tiny or evf-effi-sam-tiny",
        ),
        (
            {"architectures": ["Llama"], "sam_scale": "huge", "mm_extractor_scale": "large"},
            "EvfEffiSamModel under architectures, found Llama",
        ),
        ({"sam_scale": "huge", "mm_extractor_scale": "giant"}, "found 'huge' with 'giant'"),
        ({"sam_scale": "huge", "mm_extractor_scale": "large"}, "hidden_size 768"),
        (
            {
                "sam_scale": "huge",
                "mm_extractor_scale": "large",
                "hidden_size": 1024,
                "out_dim": 128,
            },
            "out_dim 128",
        ),
        ({"evf_sam_jax": {"variant": "tiny"}}, "variant and config"),
        ({"evf_sam_jax": {"variant": "tiny", "config": {"x": 1}}}, "unknown key 'x'"),
    ],
)
def test_other_configs_are_refused_with_what_they_look_like(config: dict, said: str):
    with pytest.raises(UserError) as error:
        evf_sam.recognise(config, Path("config.json"))
    assert said in str(error.value)
