"""Every row of the paper's tables is a configuration, with the paper's figures beside it."""

import dataclasses
import re

import pytest

from configs import ablations
from evf_sam_jax.experiment import (
    DatasetsConfig,
    ExperimentConfig,
    PaperRow,
    experiment_from_dict,
)
from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.models.evf_sam import param_shapes
from evf_sam_jax.plan_command import paper_text
from evf_sam_jax.train_state import split_params

ROWS = [(table, row) for table, rows in ablations.TABLES.items() for row in rows]
# By torch: the modules of the paper's repository, transformers' CLIP and ViLT; the projector, and
# without what no output depends on (two tokens of BEiT-3, what SAM-2 tracks with).
COUNTS = {
    (3, "clip_l14_openai_text"): 123_060_480,
    (3, "clip_l14_openai_late"): 427_616_512,
    (3, "clip_l14_text"): 123_060_480,
    (3, "clip_l14_late"): 427_616_512,
    (3, "clip_h14_text"): 352_984_064,  # the blocks alone: 302,309,376
    (3, "clip_h14_late"): 986_109_440,
    (3, "vilt_b32_text"): 108_532_224,
    (3, "vilt_b32_late"): 111_004_416,
    (3, "vilt_b32_early"): 111_004_416,
    (3, "beit3_large_text"): 369_152_000,
    (3, "beit3_large_late"): 672_702_464 - 1024,
    (3, "beit3_large_early_12"): 672_702_464 - 1024,
    (3, "beit3_large_early_24"): 672_702_464 - 1024,
    (6, "clip_l14_openai_sam_vit_h"): 123_060_480 + 641_090_608 + 787_712,
    (6, "vilt_b32_sam_vit_h"): 111_004_416 + 641_090_608 + 787_712,
    (6, "beit3_base_sam_vit_h"): 862_865_456 - 512,
    (6, "beit3_large_efficient_sam_vits"): 700_427_492 - 768,
    (6, "beit3_large_sam_vit_h"): 1_315_105_072 - 768,
    (6, "beit3_large_sam2_hiera_large"): 898_444_594 - 7_506_033,
    (6, "beit3_base_efficient_sam_vitt"): 231_998_052 - 512,
}


def experiment(table: int, row: str, more: str = "") -> ExperimentConfig:
    argument = f"table={table},row={row},foundations=none,data=there{more}"
    return experiment_from_dict(ablations.get_config(argument).to_dict())


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_a_row_is_an_experiment_that_knows_its_figures(table: int, row: str):
    config = experiment(table, row)
    expected = ablations.TABLES[table][row]
    assert config.paper is not None
    assert config.paper.source == f"Table {table}, {row}"
    assert config.paper.ciou == expected.ciou
    encoder = config.model.encoder
    for key in ("fusion", "readout"):
        assert getattr(encoder, key) == expected.values.get(key, getattr(encoder, key))


@pytest.mark.parametrize(("table", "row"), COUNTS)
def test_parameters_are_those_that_the_originals_have(table: int, row: str):
    config = experiment(table, row)
    assert config.paper is not None
    leaves = path_leaves(param_shapes(config.model))
    found = sum(leaf.size for path, leaf in leaves.items() if path.startswith(config.paper.modules))
    expected = COUNTS[table, row]
    # The two tokens, and of early and late fusion alike: `mask_token` is not here.
    assert abs(found - expected) <= 1024, f"{found:,}"
    if not config.paper.note:
        scale = {"M": 1e6, "B": 1e9}[config.paper.parameters[-1]]
        digits = len(config.paper.parameters.partition(".")[2]) - 1
        unit = scale / 10 ** max(digits, 0)
        assert abs(found - float(config.paper.parameters[:-1]) * scale) <= unit


def test_rows_of_table_4_train_what_they_say():
    trained = {}
    for row in ablations.TABLES[4]:
        config = experiment(4, row)
        trainable, _ = split_params(param_shapes(config.model), config.stages[0].trainable)
        names = {"/".join(path.split("/")[:2]) for path in path_leaves(trainable)}
        trained[row] = {name for name in names if not name.startswith("encoder/")}
        trained[row] |= {"encoder"} if any(name.startswith("encoder/") for name in names) else set()
    projector = {"projector/hidden", "projector/out"}
    decoder, prompt = {"segmenter/mask_decoder"}, {"segmenter/prompt_encoder"}
    assert trained == {
        "decoder": projector | decoder,
        "encoder": projector | {"encoder"},
        "encoder_decoder": projector | decoder | {"encoder"},
        "all": projector | decoder | prompt | {"encoder"},
    }


def test_fusion_in_half_of_the_layers_is_that_of_the_encoder():
    encoder = experiment(3, "beit3_large_early_12").model.encoder
    whole = experiment(3, "beit3_large_early_24").model.encoder
    assert encoder == dataclasses.replace(whole, early_layers=12)


def test_what_the_paper_leaves_open_is_an_argument():
    config = experiment(3, "beit3_large_late", ",concat=tokens,projector_width=512").model
    assert (config.encoder.prompt_tokens, config.projector_width) == (2, 512)
    assert config.encoder.prompt_width == config.encoder.width
    assert experiment(3, "beit3_large_late").model.encoder.prompt_tokens == 1


@pytest.mark.parametrize(
    ("table", "row", "argument"),
    [
        (3, "vilt_b32_early", "readout=pooler"),
        (3, "vilt_b32_text", "readout=pooler"),
        (3, "vilt_b32_late", "image_fit=pad"),
        (3, "clip_l14_late", "image_fit=crop"),
        (3, "clip_l14_openai_late", "projected=false"),
        (3, "clip_l14_openai_text", "projected=true"),
    ],
)
def test_a_default_gives_way_to_what_is_asked_for(table: int, row: str, argument: str):
    key, _, value = argument.partition("=")
    encoders = [experiment(table, row, more).model.encoder for more in ("", f",{argument}")]
    before, after = (str(getattr(encoder, key)).lower() for encoder in encoders)
    assert before != after == value
    changed = {key: getattr(encoders[1], key)}
    assert dataclasses.replace(encoders[0], **changed) == encoders[1]


def test_rows_of_table_7_draw_from_what_they_say_and_measure_classes():
    drawn = {}
    for row in ablations.TABLES[7]:
        data = experiment(7, row).data
        assert isinstance(data, DatasetsConfig)
        assert [one.name for one in data.held_out] == ["ade20k"]
        drawn[row] = {one.name for one in data.train} & {"ade20k", "mapillary"}
    names = {"ade20k", "mapillary"}
    assert drawn == {"none": set(), "ade20k": {"ade20k"}, "mapillary": {"mapillary"}, "both": names}
    data = experiment(7, "both", ",ade20k=2").data
    assert isinstance(data, DatasetsConfig)
    weights = {one.name: one.weight for one in data.train}
    assert (weights["ade20k"], weights["mapillary"]) == (2.0, 1.0)


def test_the_docstring_has_the_figures_of_every_row():
    lines = (ablations.__doc__ or "").splitlines()
    table = 0
    found: dict[int, list[str]] = {}
    for line in lines:
        if head := re.match(r" +table=(\d)", line):
            table = int(head[1])
        words = line.split()
        if table and words and words[0] in ablations.TABLES[table]:
            row = ablations.TABLES[table][words[0]]
            scores = ["-" if one is None else f"{one:.1f}" for one in row.ciou]
            shown = [word.rstrip(",") for word in words[1:]]
            assert shown[: len(scores)] in (scores, ["-"]), line
            if row.parameters:
                assert shown[len(scores)] == row.parameters, line
            found.setdefault(table, []).append(words[0])
    assert found == {number: list(rows) for number, rows in ablations.TABLES.items()}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("table=2,row=all", "'?table'?: expected one of 1, 3, 4, 5, 6, 7, found '2'"),
        ("table=4,row=some", "row, of table 4: expected one of decoder, encoder,.* found 'some'"),
        ("table=4", "row, of table 4: .* found ''"),
        ("table=4,row=all,train_encoder=false", "'train_encoder': expected none, since the row"),
        ("table=4,row=all", "data"),
        ("table=4,row=all,model=there,data=there", "'model': expected none, since a row begins w"),
        ("table=3,row=vilt_b32_late,readout=text_cls", "'readout': expected none, since the row"),
        ("table=3,row=vilt_b32_early,early_layers=6", "'early_layers': expected none, since the"),
        ("table=6,row=beit3_base_sam_vit_h,fusion=late", "'fusion': expected none, since the row"),
        (
            "table=7,row=both,foundations=none,data=there,ade20k=0",
            "'ade20k': expected a number above 0, since the row both is trained on it, found '0'",
        ),
    ],
)
def test_other_rows_are_refused(argument: str, said: str):
    with pytest.raises(ValueError, match=said):
        ablations.get_config(argument)


def test_a_plan_shows_the_papers_figures_beside_ours():
    counts = {"encoder": (1_000, 200), "projector": (30, 0), "segmenter/x": (0, 4)}
    row = PaperRow("Table 3, late", "RefCOCO testA", (70.2, None), "673M", "encoder", "as is")
    assert paper_text(counts, row).splitlines() == [
        "the paper's Table 3, late: cIoU of RefCOCO testA 70.2 / not available",
        "its parameters of the encoder: 673M; ours: 1,200",
        "(as is)",
    ]
    whole = dataclasses.replace(row, modules="", note="")
    assert paper_text(counts, whole).splitlines()[1:] == ["its parameters: 673M; ours: 1,234"]
