"""SAM-2 and SAM 2.1 checkpoints (Hiera T, S, B+, L): `{"model": state dict}`, or a bare one.

Names: facebookresearch/sam2 at 2b90b9f, `modeling/*.py`; in EVF-SAM2, hustvl/EVF-SAM at 9935dc5,
`model/segment_anything_2`. Both versions have the same model of images; what they track objects
with in videos is kept aside.
"""

from pathlib import Path

from convert.checkpoint_files import Shapes, open_file
from convert.recognise import looks_like
from convert.sam import decoder_fields, mask_decoder_rules, prompt_encoder_rules
from convert.table import (
    CONV,
    LINEAR,
    Ignored,
    Rule,
    Table,
    Transform,
    norm,
    weight_and_bias,
)
from convert.to_model_dir import Conversion, leaf_shapes
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.families import tower_to_dict
from evf_sam_jax.models.sam2.config import STAGES, Run, Sam2Config

_POSITIONS = "image_encoder.trunk.pos_embed"
_WINDOW = "image_encoder.trunk.pos_embed_window"
_ONLY_IN_2_1 = "no_obj_embed_spatial"
_POSITION_GRID = Transform(
    "[1,C,h,w] <-> [h,w,C]",
    lambda x: x[0].transpose(1, 2, 0),
    lambda x: x.transpose(2, 0, 1)[None],
)
_DROP_TWO_ONES = Transform("[1,1,C] <-> [C]", lambda x: x[0, 0], lambda x: x[None, None])

CONFIGS = {
    "hiera_tiny": Sam2Config.hiera_tiny(),
    "hiera_small": Sam2Config.hiera_small(),
    "hiera_base_plus": Sam2Config.hiera_base_plus(),
    "hiera_large": Sam2Config.hiera_large(),
    "tiny": Sam2Config.tiny(),
}
_VIDEOS = "tracks objects through videos"
# The scale of a CXBlock is called gamma by SAM-2 and weight by EVF-SAM2; each goes back as it came.
_IGNORED = tuple(
    Ignored(source, _VIDEOS)
    for source in (
        r"memory_(attention|encoder)\..*",
        r"maskmem_tpos_enc",
        r"no_mem_pos_enc",
        r"no_obj_ptr",
        r"no_obj_embed_spatial",
        r"mask_downsample\.(weight|bias)",
        r"obj_ptr_proj\..*",
        r"obj_ptr_tpos_proj\.(weight|bias)",
    )
)


def table(config: Sam2Config) -> Table:
    """The table of a SAM-2: blocks in a row that are alike are stacked."""
    runs = [run for stage in config.runs for run in stage]
    return Table(
        rules=(
            *_image_encoder(runs),
            *prompt_encoder_rules("sam_prompt_encoder"),
            *mask_decoder_rules("sam_mask_decoder"),
            Rule(
                "sam_mask_decoder.obj_score_token.weight", "segmenter/mask_decoder/obj_score_token"
            ),
            *weight_and_bias(
                "sam_mask_decoder.pred_obj_score_head.layers.{head}",
                "segmenter/mask_decoder/pred_obj_score_head/layers_{head}",
                LINEAR,
            ),
        ),
        fields={
            **decoder_fields(config),
            "lin": {"layers.0": "lin1", "layers.1": "lin2"},
            "block_norm": {name: name for name in ("norm1", "norm2")},
            "mlp_layer": {str(layer): str(layer) for layer in range(2)},
            "level": {str(level): str(level) for level in range(STAGES)},
            "skip": {name: name for name in ("conv_s0", "conv_s1")},
            **{
                run.name: {str(run.first + i): (i,) for i in range(run.length)}
                for run in runs
                if run.length > 1
            },
        },
        ignored=_IGNORED,
    )


def _image_encoder(runs: list[Run]) -> tuple[Rule, ...]:
    source, target = "image_encoder.trunk", "segmenter/image_encoder/trunk"
    neck = ("image_encoder.neck", "segmenter/image_encoder/neck")
    return (
        Rule(_POSITIONS, f"{target}/pos_embed", _POSITION_GRID),
        Rule(_WINDOW, f"{target}/pos_embed_window", _POSITION_GRID),
        *weight_and_bias(f"{source}.patch_embed.proj", f"{target}/patch_embed/proj", CONV),
        *(rule for run in runs for rule in _blocks(run)),
        *weight_and_bias(f"{neck[0]}.convs.{{level}}.conv", f"{neck[1]}/convs_{{level}}", CONV),
        *weight_and_bias("sam_mask_decoder.{skip}", f"{neck[1]}/{{skip}}", CONV),
        Rule("no_mem_embed", "segmenter/image_encoder/no_mem_embed", _DROP_TWO_ONES),
    )


def _blocks(run: Run) -> tuple[Rule, ...]:
    block = run.first if run.length == 1 else f"{{{run.name}}}"
    source = f"image_encoder.trunk.blocks.{block}"
    target = f"segmenter/image_encoder/trunk/{run.name}"
    return (
        *norm(f"{source}.{{block_norm}}", f"{target}/{{block_norm}}"),
        *weight_and_bias(f"{source}.attn.qkv", f"{target}/attn/qkv", LINEAR),
        *weight_and_bias(f"{source}.attn.proj", f"{target}/attn/proj", LINEAR),
        *weight_and_bias(
            f"{source}.mlp.layers.{{mlp_layer}}", f"{target}/mlp/layers_{{mlp_layer}}", LINEAR
        ),
        *(weight_and_bias(f"{source}.proj", f"{target}/proj", LINEAR) if run.pools else ()),
    )


def convert(path: Path) -> Conversion:
    """Opens a SAM-2 checkpoint; its size and version follow from its tensors."""
    checkpoint = open_file(path, wrapped_in="model")
    size, config = recognise(checkpoint.shapes, path)
    version = "sam2.1" if _ONLY_IN_2_1 in checkpoint.tensors else "sam2"
    section = {"segmenter": tower_to_dict(config)}
    return Conversion(
        variant=f"{version}_{size}",
        config=section,
        table=table(config),
        shapes=leaf_shapes(section),
        checkpoint=checkpoint,
        where=str(path),
    )


def recognise(shapes: Shapes, path: Path) -> tuple[str, Sam2Config]:
    """The name and the configuration that have these shapes; UserError if it is none."""
    depth = sum(key.endswith(".attn.qkv.weight") for key in shapes)
    found = (shapes.get(_POSITIONS), shapes.get(_WINDOW))
    for size, config in CONFIGS.items():
        tables = tuple(
            (1, config.width, side, side) for side in (config.position_grid, config.windows[0])
        )
        if depth == sum(config.stages) and found == tables:
            return size, config
    raise UserError(
        f"{path} is not a SAM-2 checkpoint of a known size ({', '.join(CONFIGS)}): found "
        f"{len(shapes)} tensors, {depth} blocks, and {_POSITIONS} {list(found[0] or ())}"
        f"{looks_like(shapes)}"
    )
