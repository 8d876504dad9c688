"""Every row of the paper's Tables 1, 3, 4, 5, 6 and 7, one argument each.

    python -m evf_sam_jax.main --workdir runs/late \\
        --config configs/ablations.py:table=3,row=beit3_large_late,foundations=FOUNDATIONS,data=DATA

Other arguments are those of configs/refcoco.py (of Table 7: configs/semantic_mix.py), but for what
makes the row, and for `model`, since a row begins with foundations. `--mode plan` prints our
parameters beside the paper's. The paper's cIoU, in percent; "-": not available, since the cell
could not be read in the sources that this was written from:

    table=1                          RefCOCO testA (its LLaVA, 79.1, is LISA-7B's)
      clip_text                      63.4
      clip_late                      67.9   (Table 3 has 68.9)
      beit3_early                    83.7

    table=3                          RefCOCO val   testA   testB   parameters of the encoder
      clip_l14_openai_text           61.0          63.4    59.9    123M
      clip_l14_openai_late           67.4          68.9    64.4    428M
      clip_l14_text                  60.8          63.2    59.0    123M
      clip_l14_late                  66.1          67.8    63.1    428M
      clip_h14_text                  61.7          64.2    60.1    302M
      clip_h14_late                  66.3          68.2    64.3    986M
      vilt_b32_text                  61.0          63.0    60.0    133M
      vilt_b32_late                  61.4          64.0    59.6    136M
      vilt_b32_early                 73.9          75.3    70.9    136M
      beit3_large_text               61.6          65.1    59.4    370M
      beit3_large_late               67.7          70.2    65.4    673M
      beit3_large_early_12           80.6          82.2    78.8    673M
      beit3_large_early_24           82.1          83.7    80.0    673M

    table=4                          RefCOCO testA; the projector is always trained
      decoder                        21.2
      encoder                        82.9
      encoder_decoder                83.3
      all                            83.7

    table=5                          RefCOCO; by the text image_cls is best and concat worse
      text_cls                       -
      image_cls                      -
      image_mean                     -
      concat                         -

    table=6                          RefCOCO        RefCOCO+       RefCOCOg   parameters
                                     val  A    B    val  A    B    val  test
      clip_l14_openai_sam_vit_h      61.0 63.4 59.9 -    -    -    -    -     1.08B
      vilt_b32_sam_vit_h             -    -    -    -    -    -    -    -     783M
      beit3_base_sam_vit_h           78.9 80.6 75.3 69.8 74.2 63.0 71.6 72.9  863M
      beit3_large_efficient_sam_vits 82.5 83.5 80.4 75.4 77.9 70.2 76.1 77.1  700M
      beit3_large_sam_vit_h          82.1 83.7 80.0 75.2 78.3 70.1 76.8 77.4  1.32B
      beit3_large_sam2_hiera_large   82.7 84.1 80.0 76.3 80.1 71.8 77.0 78.4  898M
      beit3_base_efficient_sam_vitt  -    80.0 -    -    -    -    -    -     232M, in its README

    table=7                          ADE20K val  RefCOCO's family
      none                           54.2        -  (zero-shot)
      ade20k                         75.9        -
      mapillary                      59.6        -
      both                           76.1        -

Ours: not run. What the paper leaves open is an argument, with this default:

    concat=channels       one prompt token of both features; or tokens, of each its own
    projector_width=0     a hidden layer as wide as the feature, as in the released code
    readout=text_cls      of ViLT, with text alone and early fusion; or pooler, which its conversion
                          has to keep (`python -m convert vilt --readout pooler`), and with early
                          fusion image_cls, image_mean or concat
    projected=true        of CLIP with late fusion; with text alone false: whether its vectors are
                          read after the projection
    image_fit=stretch     of CLIP (or crop) and ViLT (or pad)
    profile=current       of SAM-2 and EfficientSAM (or legacy, as the released EVF-SAM2 needs it)
    ade20k=1,mapillary=1  of Table 7, where the row has them: how often they are drawn from

Where the paper's count of parameters is another than ours, the row says why, and `--mode plan`
prints it.

FOUNDATIONS holds what `python -m convert` makes of the public checkpoints, under the names of
configs/recipe.py; the README says which row needs which.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import refcoco, semantic_mix
from evf_sam_jax.evaluation.tables import PAPER

_REFCOCO = "RefCOCO val / testA / testB"
_ALL_SPLITS = f"{_REFCOCO} / RefCOCO+ val / testA / testB / RefCOCOg val / test"
_TEST_A = "RefCOCO testA"
_H14 = (
    "the paper's 302M are the blocks alone, without the 50.6M of the words and 0.1M of positions, "
    "unlike its rows of L/14"
)
_VILT = "the paper's count has the heads of pretraining, 24.6M, which are not read out here"
_ALL_TOWERS = ""  # begins every module's name


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables.

    Attributes:
      values: arguments of the recipe that make it.
      ciou: in percent, of the sets that the table is about; None: not available.
      parameters: as the paper writes them; "": the table does not count any.
      modules: what the paper counts: modules whose names begin so.
      note: why our count is another.
      defaults: arguments that the paper leaves open, and what they are where nothing else is given.
      drawn: data sets of Table 7 that it is trained on, however often.
    """

    values: Mapping[str, Any]
    ciou: tuple[float | None, ...]
    parameters: str = ""
    modules: str = "encoder"
    note: str = ""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    drawn: tuple[str, ...] = ()


def _clip(encoder: str, fusion: str) -> dict[str, Any]:
    readout = {"text": "text_eos", "late": "concat"}[fusion]
    return dict(encoder=encoder, fusion=fusion, readout=readout)


def _vilt(fusion: str) -> dict[str, Any]:
    values = dict(encoder="vilt_b32", fusion=fusion, early_layers="all")
    return values | (dict(readout="concat") if fusion == "late" else {})


def _beit3(fusion: str, early_layers: str = "all") -> dict[str, Any]:
    readout = {"text": "text_cls", "late": "concat", "early": "image_cls"}[fusion]
    return dict(encoder="beit3_large", fusion=fusion, readout=readout, early_layers=early_layers)


def _trained(encoder: bool, prompt_encoder: bool, mask_decoder: bool) -> dict[str, Any]:
    return dict(
        train_encoder=encoder, train_prompt_encoder=prompt_encoder, train_mask_decoder=mask_decoder
    )


def _towers(encoder: str, segmenter: str, **values: Any) -> dict[str, Any]:
    return _beit3("early") | dict(encoder=encoder, segmenter=segmenter, **values)


def _splits(model: str) -> tuple[float, ...]:
    """What the paper says of a model on all eight splits."""
    return PAPER[model][1]


_UNKNOWN = (None, None, None)
# Of CLIP's vectors and of ViLT, what the paper does not say.
_UNPROJECTED, _PROJECTED = dict(projected=False), dict(projected=True)
_TEXT_CLS = dict(readout="text_cls")
TABLES: dict[int, dict[str, Row]] = {
    1: {
        "clip_text": Row(_clip("clip_l14_openai", "text"), (63.4,), defaults=_UNPROJECTED),
        "clip_late": Row(_clip("clip_l14_openai", "late"), (67.9,), defaults=_PROJECTED),
        "beit3_early": Row(_beit3("early"), (83.7,)),
    },
    3: {
        "clip_l14_openai_text": Row(
            _clip("clip_l14_openai", "text"), (61.0, 63.4, 59.9), "123M", defaults=_UNPROJECTED
        ),
        "clip_l14_openai_late": Row(
            _clip("clip_l14_openai", "late"), (67.4, 68.9, 64.4), "428M", defaults=_PROJECTED
        ),
        "clip_l14_text": Row(
            _clip("clip_l14", "text"), (60.8, 63.2, 59.0), "123M", defaults=_UNPROJECTED
        ),
        "clip_l14_late": Row(
            _clip("clip_l14", "late"), (66.1, 67.8, 63.1), "428M", defaults=_PROJECTED
        ),
        "clip_h14_text": Row(
            _clip("clip_h14", "text"), (61.7, 64.2, 60.1), "302M", note=_H14, defaults=_UNPROJECTED
        ),
        "clip_h14_late": Row(
            _clip("clip_h14", "late"), (66.3, 68.2, 64.3), "986M", defaults=_PROJECTED
        ),
        "vilt_b32_text": Row(
            _vilt("text"), (61.0, 63.0, 60.0), "133M", note=_VILT, defaults=_TEXT_CLS
        ),
        "vilt_b32_late": Row(_vilt("late"), (61.4, 64.0, 59.6), "136M", note=_VILT),
        "vilt_b32_early": Row(
            _vilt("early"), (73.9, 75.3, 70.9), "136M", note=_VILT, defaults=_TEXT_CLS
        ),
        "beit3_large_text": Row(_beit3("text"), (61.6, 65.1, 59.4), "370M"),
        "beit3_large_late": Row(_beit3("late"), (67.7, 70.2, 65.4), "673M"),
        "beit3_large_early_12": Row(_beit3("early", "12"), (80.6, 82.2, 78.8), "673M"),
        "beit3_large_early_24": Row(_beit3("early"), (82.1, 83.7, 80.0), "673M"),
    },
    4: {
        "decoder": Row(_beit3("early") | _trained(False, False, True), (21.2,)),
        "encoder": Row(_beit3("early") | _trained(True, False, False), (82.9,)),
        "encoder_decoder": Row(_beit3("early") | _trained(True, False, True), (83.3,)),
        "all": Row(_beit3("early") | _trained(True, True, True), (83.7,)),
    },
    5: {
        readout: Row(_beit3("early") | dict(readout=readout), _UNKNOWN)
        for readout in ("text_cls", "image_cls", "image_mean", "concat")
    },
    6: {
        "clip_l14_openai_sam_vit_h": Row(
            _clip("clip_l14_openai", "text") | dict(segmenter="sam_vit_h"),
            (61.0, 63.4, 59.9, *[None] * 5),
            "1.08B",
            _ALL_TOWERS,
            "the paper counts both towers of CLIP, 428M; its scores are those of the text alone",
            _UNPROJECTED,
        ),
        "vilt_b32_sam_vit_h": Row(
            _vilt("early") | dict(segmenter="sam_vit_h"),
            (None,) * 8,
            "783M",
            _ALL_TOWERS,
            "the paper's count has the heads of pretraining, 24.6M, and 5M unexplained",
            _TEXT_CLS,
        ),
        "beit3_base_sam_vit_h": Row(
            _towers("beit3_base", "sam_vit_h"), _splits("evf-sam-base"), "863M", _ALL_TOWERS
        ),
        "beit3_large_efficient_sam_vits": Row(
            _towers("beit3_large", "efficient_sam_vits"),
            _splits("evf-effi-sam"),
            "700M",
            _ALL_TOWERS,
        ),
        "beit3_large_sam_vit_h": Row(
            _towers("beit3_large", "sam_vit_h"), _splits("evf-sam"), "1.32B", _ALL_TOWERS
        ),
        "beit3_large_sam2_hiera_large": Row(
            _towers(
                "beit3_large",
                "sam2_hiera_large",
                # As released, so that what tracks objects through videos still fits.
                **_trained(True, False, False),
            ),
            _splits("evf-sam2"),
            "898M",
            _ALL_TOWERS,
            "the paper's count has what tracks objects through videos, which is kept aside here",
        ),
        "beit3_base_efficient_sam_vitt": Row(
            _towers("beit3_base", "efficient_sam_vitt"),
            (None, 80.0, *[None] * 6),
            "232M",
            _ALL_TOWERS,
        ),
    },
    7: {
        "none": Row(dict(ade20k=0.0, mapillary=0.0), (54.2, None)),
        "ade20k": Row(dict(mapillary=0.0), (75.9, None), drawn=("ade20k",)),
        "mapillary": Row(dict(ade20k=0.0), (59.6, None), drawn=("mapillary",)),
        "both": Row({}, (76.1, None), drawn=("ade20k", "mapillary")),
    },
}
_SETS = {
    1: _TEST_A,
    3: _REFCOCO,
    4: _TEST_A,
    5: _REFCOCO,
    6: _ALL_SPLITS,
    7: "ADE20K val / RefCOCO's family",
}


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the experiment.

    Raises:
      ValueError: there is no such table or row, an argument is given that would make it another
        row, or as the recipe raises it.
    """
    given: dict[str, str] = {}
    for part in filter(None, (argument or "").split(",")):
        key, _, value = part.partition("=")
        given[key] = value
    number = _choose("table", given.pop("table", ""), {str(key): key for key in TABLES})
    rows = TABLES[number]
    name = given.pop("row", "")
    row = _choose(f"row, of table {number},", name, rows)
    for key in row.values:
        if key in given:
            raise ValueError(
                f"config argument {key!r}: expected none, since the row {name} has "
                f"{row.values[key]!r}, found {given[key]!r}"
            )
    if "model" in given:
        raise ValueError(
            "config argument 'model': expected none, since a row begins with the foundations of "
            f"its towers, found {given['model']!r}"
        )
    arguments = {key: str(value).lower() for key, value in (row.defaults | row.values).items()}
    arguments |= given
    recipe = semantic_mix if number == 7 else refcoco
    config = recipe.get_config(",".join(f"{key}={value}" for key, value in arguments.items()))
    drawn = {entry["name"] for entry in config.to_dict()["data"]["train"]}
    for key in row.drawn:
        if key not in drawn:
            raise ValueError(
                f"config argument {key!r}: expected a number above 0, since the row {name} is "
                f"trained on it, found {given[key]!r}"
            )
    config.paper = dict(
        source=f"Table {number}, {name}",
        sets=_SETS[number],
        ciou=row.ciou,
        parameters=row.parameters,
        modules=row.modules,
        note=row.note,
    )
    return config


def _choose(name: str, found: str, choices: Mapping[str, Any]) -> Any:
    if found not in choices:
        raise ValueError(
            f"config argument {name.rstrip(',')}: expected one of {', '.join(choices)}, "
            f"found {found!r}"
        )
    return choices[found]
