"""CLIP and ViLT checkpoints become model directories and go back, whoever named their tensors."""

import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from convert import clip, vilt
from convert.__main__ import main
from convert.table import make_plan
from convert.to_model_dir import leaf_shapes
from data_pipelines.encoder_images import CLIP_NORMALISATIONS
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax import model_dir
from evf_sam_jax.errors import run_command
from evf_sam_jax.models.clip import Clip, ClipConfig
from evf_sam_jax.models.families import tower_from_dict, tower_to_dict
from evf_sam_jax.models.vilt import Vilt, ViltConfig
from tests.convert import torch_writer
from tests.parity import clip_cases, vilt_cases

CLIP, VILT = ClipConfig.tiny(), ViltConfig.tiny()
LAYER = {"num_attention_heads": 2, "hidden_act": "quick_gelu"}
CLIP_JSON = {
    "model_type": "clip",
    "text_config": LAYER,
    "vision_config": LAYER | {"num_attention_heads": 3},
}


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def random_arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Float32 and float16 by turns, within stacks too."""
    rng = np.random.default_rng(0)
    turns = (np.float32, np.float16)
    return {
        name: np.asarray(rng.normal(size=shape)).astype(turns[turn % 2])
        for turn, (name, shape) in enumerate(sorted(shapes.items()))
    }


def clip_arrays(config: ClipConfig = CLIP) -> dict[str, np.ndarray]:
    """Under transformers' names, with what the model has no use for."""
    shapes = leaf_shapes({"encoder": tower_to_dict(config)})
    arrays = random_arrays(make_plan(clip.table(config), shapes).source_shapes())
    arrays["logit_scale"] = np.full((), 2.7, np.float32)
    arrays["text_model.embeddings.position_ids"] = np.arange(16, dtype=np.int64)[None]
    arrays["vision_model.embeddings.position_ids"] = np.arange(17, dtype=np.int64)[None]
    return arrays


def vilt_arrays() -> dict[str, np.ndarray]:
    """As the published checkpoint, with the head that predicts words."""
    shapes = leaf_shapes({"encoder": tower_to_dict(VILT)})
    arrays = random_arrays(
        make_plan(vilt.table(VILT), shapes).source_shapes()
        | {
            "vilt.pooler.dense.weight": (32, 32),
            "vilt.pooler.dense.bias": (32,),
            "mlm_score.bias": (128,),
            "mlm_score.decoder.weight": (128, 32),
            "mlm_score.transform.dense.weight": (32, 32),
            "mlm_score.transform.LayerNorm.weight": (32,),
        }
    )
    name = "vilt.embeddings.text_embeddings.position_ids"
    return arrays | {name: np.arange(16, dtype=np.int64)[None]}


OPEN_CLIP_NAMES = (
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_projection\.weight", "text_projection"),
    (r"visual_projection\.weight", "visual.proj"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def as_open_clip(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under open_clip's names: q, k and v in one, projections transposed."""
    renamed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.endswith("position_ids"):
            continue
        if name.endswith("_projection.weight"):
            array = np.ascontiguousarray(array.T)
        for pattern, new in OPEN_CLIP_NAMES:
            name = re.sub(pattern, new, name)
        renamed[name] = array
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace(".q_", f".{part}_")) for part in "qkv"]
        renamed[name.replace(".q_proj.", ".in_proj_")] = np.concatenate(parts)
    return renamed


def write_directory(
    directory: Path, arrays: dict[str, np.ndarray], config: dict, name: str = "model.safetensors"
) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if name.endswith(".bin"):
        torch_writer.save(directory / name, arrays)
    else:
        safetensors.numpy.save_file(arrays, directory / name)
    return directory


def assert_goes_back(model: Path, back: Path, expected: dict[str, np.ndarray]) -> None:
    run("to-torch", model, back)
    found = safetensors.numpy.load_file(back / "model.safetensors")
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_clip_of_transformers_goes_there_and_back(tmp_path: Path, capsys, file: str) -> None:
    arrays = clip_arrays()
    source = write_directory(tmp_path / "source", arrays, CLIP_JSON, file)
    run("clip", source, tmp_path / "model")
    said = capsys.readouterr().out
    assert "logit_scale is kept aside: temperature of contrastive training" in said
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert manifest.variant == "clip_tiny"
    assert manifest.config["encoder"] == tower_to_dict(CLIP)
    assert_goes_back(tmp_path / "model", tmp_path / "back", arrays)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CLIP_JSON


@pytest.mark.parametrize("where", ["in a directory", "alone"])
def test_a_clip_of_open_clip_goes_there_and_back(tmp_path: Path, capsys, where: str) -> None:
    arrays = as_open_clip(clip_arrays())
    source = tmp_path / "source"
    source.mkdir()
    torch_writer.save(source / "open_clip_pytorch_model.bin", arrays)
    if where == "alone":
        source = source / "open_clip_pytorch_model.bin"
    run("clip", source, tmp_path / "model")
    assert "an exact GELU is assumed" in capsys.readouterr().out
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert manifest.variant == "open_clip_tiny"
    assert manifest.config["encoder"]["activation"] == "gelu"
    assert_goes_back(tmp_path / "model", tmp_path / "back", arrays)
    assert not (tmp_path / "back" / "config.json").exists()


def test_the_same_weights_are_the_same_model_under_both_names(tmp_path: Path) -> None:
    arrays = {name: np.asarray(array, np.float32) for name, array in clip_arrays().items()}
    arrays = {name: array for name, array in arrays.items() if "position_ids" not in name}
    run("clip", write_directory(tmp_path / "a", arrays, CLIP_JSON), tmp_path / "model_a")
    (tmp_path / "b").mkdir()
    file = tmp_path / "b" / "open_clip_model.safetensors"
    safetensors.numpy.save_file(as_open_clip(arrays), file)
    run("clip", tmp_path / "b", tmp_path / "model_b")
    models = [
        model_dir.path_leaves(model_dir.load_params(tmp_path / name))
        for name in ("model_a", "model_b")
    ]
    assert set(models[0]) == set(models[1])
    for path, leaf in models[0].items():
        np.testing.assert_array_equal(models[1][path], leaf, err_msg=path)


def test_the_config_beside_open_clips_file_says_which_gelu(tmp_path: Path, capsys) -> None:
    torch_writer.save(tmp_path / "open_clip_pytorch_model.bin", as_open_clip(clip_arrays()))
    config = {"model_cfg": {"embed_dim": 24, "quick_gelu": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    run("clip", tmp_path, tmp_path / "model")
    assert "GELU is assumed" not in capsys.readouterr().out
    encoder = model_dir.read_manifest(tmp_path / "model").config["encoder"]
    assert encoder["activation"] == "quick_gelu"


OPENAI, HALF = [list(one) for one in CLIP_NORMALISATIONS["openai"]], [[0.5] * 3] * 2


def of_transformers(mean: list[float], std: list[float]) -> dict:
    return {"image_mean": mean, "image_std": std}


def of_open_clip(mean: list[float], std: list[float]) -> dict:
    return {"model_cfg": {}, "preprocess_cfg": {"mean": mean, "std": std, "resize_mode": "squash"}}


@pytest.mark.parametrize(
    "names, files, expected, told",
    [
        ("hf", {}, "openai", "says in none of"),
        ("hf", {"preprocessor": of_transformers(*HALF)}, "inception", None),
        ("hf", {"preprocessor": of_transformers(*OPENAI)}, "openai", None),
        ("hf", {"preprocessor": {"crop_size": 224}}, "openai", None),
        ("hf", {"processor": {"image_processor": of_transformers(*HALF)}}, "inception", None),
        (
            "hf",
            {"processor": {"processor_class": "CLIP"}, "preprocessor": of_transformers(*HALF)},
            "inception",
            None,
        ),
        (
            "hf",
            {"preprocessor": of_transformers(*OPENAI), "open_clip": of_open_clip(*HALF)},
            "openai",
            "not those of open_clip_config.json beside it (inception)",
        ),
        ("open", {"open_clip": of_open_clip(*HALF)}, "inception", None),
        ("open", {"open_clip": {"model_cfg": {}}}, "openai", "says in none of"),
        (
            "open",
            {"open_clip": of_open_clip(*HALF), "preprocessor": of_transformers(*OPENAI)},
            "inception",
            "not those of preprocessor_config.json beside it (openai)",
        ),
    ],
)
def test_images_are_normalised_as_the_configs_beside_the_weights_say(
    tmp_path: Path, names: str, files: dict[str, dict], expected: str, told: str | None
) -> None:
    source = tmp_path / "source"
    if names == "hf":
        write_directory(source, clip_arrays(), CLIP_JSON)
    else:
        source.mkdir()
        arrays = as_open_clip(clip_arrays())
        safetensors.numpy.save_file(arrays, source / "open_clip_model.safetensors")
    for name, content in files.items():
        (source / f"{name}_config.json").write_text(json.dumps(content))
    conversion = clip.convert(source)
    assert conversion.config["encoder"]["normalisation"] == expected
    assert len(conversion.notes) == (told is not None)
    assert all(told in note for note in conversion.notes if told)


def test_a_clip_converted_before_the_normalisation_was_recorded_has_openais() -> None:
    old = tower_to_dict(ClipConfig.l14_openai())
    del old["normalisation"]
    assert tower_from_dict("encoder", old) == ClipConfig.l14_openai()


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros that takes no space: safetensors' header, and a hole for the tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


@pytest.mark.parametrize(
    "name, variant, config",
    [
        ("l14_openai", "clip_l14_openai", ClipConfig.l14_openai()),
        ("l14", "clip_l14", ClipConfig.l14()),
        ("h14", "clip_h14", ClipConfig.h14()),
        ("l14_336", "clip_l14", dataclasses.replace(ClipConfig.l14(), image_size=336)),
        ("h14_quick", "clip_h14", dataclasses.replace(ClipConfig.h14(), activation="quick_gelu")),
    ],
)
def test_released_clips_are_recognised(
    tmp_path: Path, name: str, variant: str, config: ClipConfig
) -> None:
    shapes = leaf_shapes({"encoder": tower_to_dict(config)})
    source = make_plan(clip.table(config), shapes).source_shapes()
    write_sparse(tmp_path / "model.safetensors", source)
    towers = {f"{tower}_config": {"hidden_act": config.activation} for tower in ("text", "vision")}
    (tmp_path / "config.json").write_text(json.dumps(towers))
    if config.normalisation == "inception":
        half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    conversion = clip.convert(tmp_path)
    assert conversion.variant == variant
    assert conversion.config == {"encoder": tower_to_dict(config)}


def test_the_released_vilt_is_recognised(tmp_path: Path) -> None:
    config = dataclasses.replace(ViltConfig.b32(), readout="pooler")
    shapes = leaf_shapes({"encoder": tower_to_dict(config)})
    source = make_plan(vilt.table(config), shapes).source_shapes()
    write_sparse(tmp_path / "model.safetensors", source)
    (tmp_path / "config.json").write_text('{"model_type": "vilt", "num_attention_heads": 12}')
    conversion = vilt.convert(tmp_path)
    assert conversion.variant == "vilt_b32"
    # As a recipe plans it before anything is converted.
    assert conversion.config == {"encoder": tower_to_dict(ViltConfig.b32())}


@pytest.mark.parametrize("with_projection", [True, False])
def test_the_texts_tower_alone(tmp_path: Path, with_projection: bool) -> None:
    arrays = {
        name: array
        for name, array in clip_arrays().items()
        if name.startswith("text_model.") or (with_projection and name == "text_projection.weight")
    }
    source = write_directory(
        tmp_path / "source", arrays, {"model_type": "clip_text_model", **LAYER}
    )
    run("clip", source, tmp_path / "model")
    encoder = model_dir.read_manifest(tmp_path / "model").config["encoder"]
    assert (encoder["fusion"], encoder["projected"]) == ("text", with_projection)
    assert_goes_back(tmp_path / "model", tmp_path / "back", arrays)


@pytest.mark.parametrize("readout", [None, "text_cls", "pooler"])
def test_a_vilt_goes_there_and_back(tmp_path: Path, capsys, readout: str | None) -> None:
    arrays = vilt_arrays()
    source = write_directory(tmp_path / "source", arrays, {"model_type": "vilt"})
    run("vilt", source, tmp_path / "model", *(["--readout", readout] if readout else []))
    said = capsys.readouterr().out
    assert "mlm_score.bias is kept aside: predicts masked words" in said
    assert ("vilt.pooler.dense.bias is kept aside: is not read out" in said) != (
        readout == "pooler"
    )
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert manifest.variant == "vilt_tiny"
    expected = dataclasses.replace(VILT, readout=readout or "text_cls")
    assert manifest.config["encoder"] == tower_to_dict(expected)
    assert_goes_back(tmp_path / "model", tmp_path / "back", arrays)


def test_a_vilt_without_a_pooler_cannot_read_it_out(tmp_path: Path, refusal) -> None:
    arrays = {name: one for name, one in vilt_arrays().items() if ".pooler." not in name}
    source = write_directory(tmp_path / "source", arrays, {})
    said = refusal("vilt", source, tmp_path / "model", "--readout", "pooler")
    assert "expected vilt.pooler.dense.weight for the read-out pooler, found none" in said
    run("vilt", source, tmp_path / "model")
    encoder = model_dir.read_manifest(tmp_path / "model").config["encoder"]
    assert encoder["readout"] == "text_cls"


def test_query_key_and_value_are_where_they_belong(tmp_path: Path) -> None:
    arrays = clip_arrays()
    run("clip", write_directory(tmp_path / "source", arrays, CLIP_JSON), tmp_path / "model")
    kernel = model_dir.load_params(tmp_path / "model")["encoder"]["vision_layers"]["attention"]
    for index, part in enumerate("qkv"):
        name = f"vision_model.encoder.layers.2.self_attn.{part}_proj"
        weight, bias = arrays[f"{name}.weight"], arrays[f"{name}.bias"]
        np.testing.assert_array_equal(kernel["qkv"]["kernel"][2, index], weight.T)
        np.testing.assert_array_equal(kernel["qkv"]["bias"][2, index], bias)


def test_tokenizer_files_travel_with_the_model(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "clip", clip_arrays(), CLIP_JSON)
    vocabulary = {"d": 0, "o": 1, "g</w>": 2, "<|startoftext|>": 126, "<|endoftext|>": 127}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\n")
    run("clip", source, tmp_path / "model_clip")
    assert model_dir.read_manifest(tmp_path / "model_clip").has_tokenizer
    assert load_tokenizer(tmp_path / "model_clip").encode("dog") == [126, 0, 1, 2, 127]
    source = write_directory(tmp_path / "vilt", vilt_arrays(), {})
    (source / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ndog\n")
    run("vilt", source, tmp_path / "model_vilt")
    assert load_tokenizer(tmp_path / "model_vilt").encode("Dog") == [2, 5, 3]
    run("to-torch", tmp_path / "model_vilt", tmp_path / "back")
    assert (tmp_path / "back" / "vocab.txt").exists()


@pytest.fixture
def refusal(tmp_path: Path, capsys) -> Callable[..., str]:
    """Runs a command that must fail, and returns its sentence."""

    def run_it(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            run_command(main, [str(argument) for argument in arguments])
        assert exit_.value.code == 2
        assert not (tmp_path / "model").exists()
        return capsys.readouterr().err

    return run_it


def test_another_family_is_named(tmp_path: Path, refusal) -> None:
    clip_source = write_directory(tmp_path / "clip", clip_arrays(), CLIP_JSON)
    vilt_source = write_directory(tmp_path / "vilt", vilt_arrays(), {})
    said = refusal("vilt", clip_source, tmp_path / "model")
    assert "is not a ViLT checkpoint" in said and "looks like CLIP" in said
    said = refusal("clip", vilt_source, tmp_path / "model")
    assert "is not a CLIP checkpoint" in said and "looks like ViLT" in said


def test_another_size_is_named(tmp_path: Path, refusal) -> None:
    arrays = clip_arrays()
    for name in [name for name in arrays if ".layers.1." in name and name.startswith("text")]:
        del arrays[name]
    source = write_directory(tmp_path / "clip", arrays, CLIP_JSON)
    said = refusal("clip", source, tmp_path / "model")
    assert "not a CLIP of a known size" in said
    assert "found 1 layers of 32 channels for text, and 3 of 48 for images in patches of 8" in said
    arrays = vilt_arrays()
    for name in [name for name in arrays if ".layer.2." in name]:
        del arrays[name]
    said = refusal("vilt", write_directory(tmp_path / "vilt", arrays, {}), tmp_path / "model")
    assert "not a ViLT of a known size" in said and "found 2 layers" in said


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_config": {"hidden_act": "gelu"}}, "expected one hidden_act, gelu or quick_gelu"),
        ({"vision_config": 3}, "expected an object under vision_config, found 3"),
        ({"text_config": {"num_attention_heads": 4}}, "expected 2 attention heads in text_config"),
    ],
)
def test_configs_that_do_not_fit_the_weights(
    tmp_path: Path, refusal, changes: dict, message: str
) -> None:
    source = write_directory(tmp_path / "clip", clip_arrays(), CLIP_JSON | changes)
    assert message in refusal("clip", source, tmp_path / "model")


@pytest.mark.parametrize(
    "given, found",
    [
        ({"image_mean": [0.485, 0.456, 0.406]}, "found [0.485, 0.456, 0.406] and"),
        ({"image_std": 0.5}, "and 0.5"),
        ({"image_mean": ["a", 0, 0]}, "found ['a', 0, 0] and"),
    ],
)
def test_a_normalisation_of_other_models(tmp_path: Path, refusal, given: dict, found: str) -> None:
    source = write_directory(tmp_path / "clip", clip_arrays(), CLIP_JSON)
    (source / "preprocessor_config.json").write_text(json.dumps(given))
    said = refusal("clip", source, tmp_path / "model")
    assert "preprocessor_config.json: expected image_mean and image_std [0.48145466" in said
    assert found in said


def test_a_directory_without_a_config(tmp_path: Path, refusal) -> None:
    source = write_directory(tmp_path / "clip", clip_arrays(), CLIP_JSON)
    (source / "config.json").unlink()
    assert "config.json does not exist" in refusal("clip", source, tmp_path / "model")


def test_positions_that_are_no_square(tmp_path: Path, refusal) -> None:
    arrays = clip_arrays()
    name = "vision_model.embeddings.position_embedding.weight"
    arrays[name] = arrays[name][:-1]
    source = write_directory(tmp_path / "clip", arrays, CLIP_JSON)
    said = refusal("clip", source, tmp_path / "model")
    assert f"{name} has 16 rows; expected 1 and a square number" in said


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, refusal) -> None:
    source = write_directory(tmp_path / "vilt", vilt_arrays(), {})
    words = "".join(f"word{n}\n" for n in range(124))
    (source / "vocab.txt").write_text(f"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n{words}")
    assert "has only 128 rows" in refusal("vilt", source, tmp_path / "model")


@pytest.mark.torch
@pytest.mark.parametrize("command", ["clip", "vilt"])
def test_what_transformers_saves_goes_there_and_back(tmp_path: Path, command: str) -> None:
    """With weights as transformers draws them, the directory gives the original's features."""
    import torch

    torch.manual_seed(0)
    if command == "clip":
        from transformers import CLIPModel

        config, given = CLIP, clip_cases.inputs(CLIP)
        original = CLIPModel(clip_cases.original_config(CLIP)).eval()
    else:
        config = dataclasses.replace(VILT, readout="pooler")
        given = vilt_cases.inputs(VILT, vilt_cases.SIZES["square"])
        original = vilt_cases.original(VILT, with_heads=True)
    original.save_pretrained(tmp_path / "source")
    options = ["--readout", "pooler"] if command == "vilt" else []
    run(command, tmp_path / "source", tmp_path / "model", *options)
    encoder = model_dir.load_params(tmp_path / "model")["encoder"]
    module = Clip(config) if command == "clip" else Vilt(config)
    inputs = given.image, given.ids[:, None], given.valid[:, None]
    found = module.apply({"params": encoder}, *map(jnp.asarray, inputs))
    text = {
        "input_ids": torch.from_numpy(given.ids).long(),
        "attention_mask": torch.from_numpy(given.valid).long(),
    }
    image = torch.from_numpy(given.image).permute(0, 3, 1, 2)
    with torch.inference_mode():
        if command == "clip":
            vectors = (original.get_image_features(image), original.get_text_features(**text))
            expected = torch.cat([one.pooler_output for one in vectors], dim=-1)
        else:
            expected = original.vilt(pixel_values=image, **text).pooler_output
    np.testing.assert_allclose(found[:, 0, 0], expected.numpy(), atol=1e-4)
    run("to-torch", tmp_path / "model", tmp_path / "back")
    back = type(original).from_pretrained(tmp_path / "back")
    for name, tensor in original.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
