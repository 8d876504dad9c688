"""SAM-2's checkpoints become model directories and come back, what is for videos included."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert import evf_sam, sam2
from convert.__main__ import main
from convert.table import Plan, Table, make_plan
from convert.to_model_dir import leaf_shapes
from evf_sam_jax import model_dir
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import InitConfig
from evf_sam_jax.initialize import finished_model, initial_params
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.released import RELEASED
from evf_sam_jax.models.sam2.config import Sam2Config
from tests import golden_checkpoint
from tests.convert import torch_writer
from tests.convert.checkpoints import BRAIN, HALF, state_dict
from tests.evf_sam_jax import tiny_experiment

MANIFEST = Path(__file__).parents[1] / "golden" / "evf_sam2" / "evf_sam2.manifest.json"
TINY = Sam2Config.tiny()
WHOLE = dataclasses.replace(EvfSamConfig.tiny(), segmenter=TINY)
VIDEOS = {  # some of them, in sizes of their own
    "memory_attention.layers.0.self_attn.q_proj.weight": (8, 8),
    "memory_attention.norm.bias": (8,),
    "memory_encoder.fuser.layers.0.dwconv.weight": (8, 1, 7, 7),
    "memory_encoder.fuser.layers.0.gamma": (8,),
    "memory_encoder.out_proj.weight": (4, 8, 1, 1),
    "maskmem_tpos_enc": (7, 1, 1, 4),
    "no_mem_pos_enc": (1, 1, 8),
    "no_obj_ptr": (1, 8),
    "mask_downsample.weight": (1, 1, 4, 4),
    "obj_ptr_proj.layers.2.bias": (8,),
}
ONLY_IN_2_1 = {"no_obj_embed_spatial": (1, 4), "obj_ptr_tpos_proj.weight": (4, 8)}


def section(config: Sam2Config) -> dict:
    return {"segmenter": dataclasses.replace(WHOLE, segmenter=config).to_dict()["segmenter"]}


def arrays_of(shapes: dict[str, tuple[int, ...]], dtypes: list) -> dict[str, np.ndarray]:
    """Random arrays whose dtypes go by turns, within stacks too."""
    rng = np.random.default_rng(0)
    return {
        key: np.asarray(rng.normal(size=shape)).astype(dtypes[turn % len(dtypes)])
        for turn, (key, shape) in enumerate(sorted(shapes.items()))
    }


def plan_of(table: Table, config: dict) -> Plan:
    return make_plan(table, leaf_shapes(config))


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key


def there_and_back(command: str, source: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    main([command, str(source), str(tmp_path / "model")])
    main(["to-torch", str(tmp_path / "model"), str(tmp_path / "back")])
    return safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
@pytest.mark.parametrize("dtypes", [[np.float32], [np.float32, HALF, BRAIN]])
def test_official_files_go_there_and_back(tmp_path: Path, capsys, version: str, dtypes: list):
    shapes = plan_of(sam2.table(TINY), section(TINY)).source_shapes() | VIDEOS
    aside = len(VIDEOS)
    if version == "sam2.1":
        shapes, aside = shapes | ONLY_IN_2_1, aside + len(ONLY_IN_2_1)
    arrays = arrays_of(shapes, dtypes)
    source = tmp_path / "checkpoint.pt"
    torch_writer.save(source, arrays, wrapped_in="model")
    assert_identical(there_and_back("sam2", source, tmp_path), arrays)
    said = capsys.readouterr().out
    assert f"note: {aside} tensors such as mask_downsample.weight are kept aside: tracks" in said
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert manifest.variant == f"{version}_tiny"
    assert manifest.config == json.loads(json.dumps(section(TINY)))


def test_evf_sam2_goes_there_and_back_with_its_name_for_gamma(tmp_path: Path):
    """As published: the encoder in float32, SAM-2 in float16."""
    shapes = plan_of(evf_sam.table(WHOLE), WHOLE.to_dict()).source_shapes()
    videos = {f"visual_model.{key.replace('gamma', 'weight')}": VIDEOS[key] for key in VIDEOS}
    arrays = arrays_of(shapes | videos, [np.float32])
    arrays = {
        key: array.astype(np.float16) if key.startswith("visual_model.") else array
        for key, array in arrays.items()
    }
    source = tmp_path / "source"
    source.mkdir()
    config = evf_sam.source_config_of("tiny", WHOLE)
    (source / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.numpy.save_file(arrays, source / "model.safetensors")
    assert_identical(there_and_back("evf-sam", source, tmp_path), arrays)
    assert (tmp_path / "back" / "config.json").read_text() == (source / "config.json").read_text()
    manifest = model_dir.read_manifest(tmp_path / "model")
    assert EvfSamConfig.from_dict(manifest.config) == WHOLE
    assert set(manifest.passthrough) == set(videos)


def test_what_training_began_with_hands_on_what_is_for_videos(tmp_path: Path):
    """A model of two foundations goes to PyTorch with every tensor that an EVF-SAM2 has."""
    shapes = plan_of(sam2.table(TINY), section(TINY)).source_shapes() | VIDEOS
    segmenter, encoder = arrays_of(shapes, [HALF]), state_dict("beit3")
    torch_writer.save(tmp_path / "sam2.pt", segmenter, wrapped_in="model")
    torch_writer.save(tmp_path / "beit3.pth", encoder, wrapped_in="model")
    for command, file in (("sam2", "sam2.pt"), ("beit3", "beit3.pth")):
        main([command, str(tmp_path / file), str(tmp_path / command)])
    init = InitConfig(encoder=str(tmp_path / "beit3"), segmenter=str(tmp_path / "sam2"))
    experiment = dataclasses.replace(tiny_experiment.EXPERIMENT, model=WHOLE, init=init)
    leaves, manifest, aside = finished_model(experiment, initial_params(experiment), frozenset())
    model_dir.write_model_dir(tmp_path / "model", leaves, manifest, passthrough=aside)
    main(["to-torch", str(tmp_path / "model"), str(tmp_path / "back")])
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    for prefix, arrays in (("visual_model.", segmenter), ("mm_extractor.", encoder)):
        for key, array in arrays.items():
            found = back.pop(prefix + key.replace("gamma", "weight"))
            np.testing.assert_array_equal(found, array, err_msg=key)
    assert {key.split(".")[0] for key in back} == {"text_hidden_fcs"}


def test_the_table_and_what_is_kept_aside_are_the_released_checkpoint():
    released = {key: tuple(shape) for key, shape in json.loads(MANIFEST.read_text()).items()}
    config = RELEASED["evf-sam2"]
    plan = plan_of(evf_sam.table(config), config.to_dict())
    rest = dict(released)
    for key, shape in plan.source_shapes().items():
        assert rest.pop(key) == shape, key
    aside = [key for key in rest if key.startswith("visual_model.")]
    assert all(any(re.fullmatch(one.source, key) for one in plan.ignored) for key in rest)
    assert (len(aside), len(rest)) == (157, 158)
    assert sum(int(np.prod(rest[key])) for key in aside) == 7_505_265


def test_blocks_lie_where_the_trunk_runs_them():
    config = Sam2Config.hiera_large()
    index = {
        part.key: (path, part.index)
        for path, parts in plan_of(sam2.table(config), section(config)).parts.items()
        for part in parts
    }
    trunk = "segmenter/image_encoder/trunk"
    name = "image_encoder.trunk.blocks.{}.attn.qkv.weight"
    assert index[name.format(12)] == (f"{trunk}/blocks_9_to_22/attn/qkv/kernel", (3,))
    assert index[name.format(23)] == (f"{trunk}/blocks_23/attn/qkv/kernel", ())
    assert index["image_encoder.trunk.blocks.44.proj.weight"][0] == f"{trunk}/blocks_44/proj/kernel"


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("sam2", "sam", "looks like SAM (ViT)"),
        ("sam2", "beit3", "looks like BEiT-3"),
        ("sam", "sam2", "looks like SAM-2"),
    ],
)
def test_a_checkpoint_of_another_family(tmp_path: Path, command: str, given: str, said: str):
    if given == "sam2":
        shapes = plan_of(sam2.table(TINY), section(TINY)).source_shapes()
        arrays = arrays_of(shapes, [np.float32])
    else:
        arrays = state_dict(given)
    torch_writer.save(tmp_path / "some.pt", arrays, wrapped_in="model" if given != "sam" else None)
    with pytest.raises(UserError) as error:
        main([command, str(tmp_path / "some.pt"), str(tmp_path / "model")])
    assert said in str(error.value)


@pytest.mark.torch
@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
@pytest.mark.parametrize(
    ("letter", "size"),
    [("t", "hiera_tiny"), ("s", "hiera_small"), ("b+", "hiera_base_plus"), ("l", "hiera_large")],
)
def test_the_tables_name_every_tensor_of_the_originals(version: str, letter: str, size: str):
    from tests.parity import originals

    model = originals.sam2_from_yaml(f"{version}/{version}_hiera_{letter}.yaml")
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config = sam2.CONFIGS[size]
    plan = plan_of(sam2.table(config), section(config))
    for key, shape in plan.source_shapes().items():
        assert found.pop(key) == shape, key
    assert all(any(re.fullmatch(one.source, key) for one in plan.ignored) for key in found)
    assert ("no_obj_embed_spatial" in found) == (version == "sam2.1")


@pytest.mark.slow
def test_the_full_size_goes_there_and_back(tmp_path: Path):
    """224 million float32 parameters under the official names: bit-identical."""
    shapes = {
        key.removeprefix("visual_model."): tuple(shape)
        for key, shape in json.loads(MANIFEST.read_text()).items()
        if key.startswith("visual_model.")
    }
    for layer in (0, 1):
        name = f"memory_encoder.fuser.layers.{layer}."
        shapes[name + "gamma"] = shapes.pop(name + "weight")
    arrays = {key: golden_checkpoint.make_weight(key, shape) for key, shape in shapes.items()}
    assert sum(array.size for array in arrays.values()) == 224_430_130 + 256
    source = tmp_path / "sam2_hiera_large.pt"
    torch_writer.save(source, arrays, wrapped_in="model")
    assert_identical(there_and_back("sam2", source, tmp_path), arrays)
    assert model_dir.read_manifest(tmp_path / "model").variant == "sam2_hiera_large"
