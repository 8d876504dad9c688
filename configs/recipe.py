"""What the paper's recipes share: arguments, foundations, data sets, optimizer, mesh.

Reference: the paper's section 4.2 and, where it is silent, the defaults of LISA's `train_ds.py`,
from which hustvl/EVF-SAM descends; its own training script was never released.

Differences:
  - Every image of a data set comes once an epoch of it; the original draws with replacement.
  - `overlap=sum` gives the original's targets, which exceed 1 where parts of an object overlap.
  - The model of the last step is handed on, and the best checkpoint by cIoU is kept beside it; LISA
    selects by gIoU.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.arguments import parse_arguments
from data_pipelines.source import SEMANTIC_PREFIX
from data_pipelines.tokenizers import SentencePieceTokenizer, load_tokenizer
from evf_sam_jax.errors import UserError
from evf_sam_jax.model_dir import read_manifest
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.clip import ClipConfig
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.families import tower_from_dict, tower_to_dict
from evf_sam_jax.models.interfaces import EncoderConfig, SegmenterConfig
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.models.vilt import ViltConfig

# Who split the refs -> the data set's name (data_pipelines/refer.py).
_REFER_SETS = {
    "refclef": {"unc": "refclef", "berkeley": "refclef_berkeley"},
    "refcoco": {"unc": "refcoco", "google": "refcoco_google"},
    "refcoco+": {"unc": "refcoco+"},
    "refcocog": {"umd": "refcocog", "google": "refcocog_google"},
}
_EVALUATION_SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco_google": ("val", "test"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
    "refcocog_google": ("val",),
}

# Directories of FOUNDATIONS, by the names that `python -m convert` gives the variants.
ENCODERS = {
    "beit3_large": Beit3Config.large(),
    "beit3_base": Beit3Config.base(),
    "clip_l14_openai": ClipConfig.l14_openai(),
    "clip_l14": ClipConfig.l14(),
    "clip_h14": ClipConfig.h14(),
    "vilt_b32": ViltConfig.b32(),
}
SEGMENTERS = {
    "sam_vit_h": SamConfig.vit_h(),
    "sam_vit_l": SamConfig.vit_l(),
    "sam_vit_b": SamConfig.vit_b(),
    # Weights of SAM 2.1 have the same sizes: put a directory of them under this name.
    "sam2_hiera_large": Sam2Config.hiera_large(),
    "sam2_hiera_base_plus": Sam2Config.hiera_base_plus(),
    "sam2_hiera_small": Sam2Config.hiera_small(),
    "sam2_hiera_tiny": Sam2Config.hiera_tiny(),
    "efficient_sam_vits": EfficientSamConfig.vits(),
    "efficient_sam_vitt": EfficientSamConfig.vitt(),
}
# Arguments that leave something as the encoder or model is, and that fuse in all layers.
_AS_IT_IS, _ALL = "as_it_is", "all"

_ARGUMENTS: dict[str, Any] = dict(
    # What a run begins with: converted foundations, or a whole model. `foundations=none` has their
    # sizes alone, for --mode plan before anything is downloaded.
    foundations="",
    encoder=tuple(ENCODERS),
    segmenter=tuple(SEGMENTERS),
    model="",
    # How the encoder fuses image and text, what is read out of it, and how it is projected: what
    # the paper's Tables 3 and 5 compare. configs/ablations.py has their rows. Where images and
    # words meet in another way than they did, the read-out is by default what is usual with it:
    # `concat` with late fusion, the text's token with text alone.
    fusion=(_AS_IT_IS, "early", "late", "text"),
    early_layers=_AS_IT_IS,  # or "all", or a number of the first ones; of early fusion alone
    readout=(
        _AS_IT_IS,
        "image_cls",
        "text_cls",
        "text_eos",
        "pooler",
        "image_mean",
        "concat",
    ),
    concat=(_AS_IT_IS, "channels", "tokens"),
    projected=(_AS_IT_IS, "true", "false"),
    projector_width=0,
    # How an image becomes the encoder's: all of it as a square, CLIP's own centre crop, or ViLT's
    # own padding.
    image_fit=(_AS_IT_IS, "stretch", "crop", "pad"),
    # Of preprocessing and decoding; by default that of `model`, and for new ones the current one.
    profile=(_AS_IT_IS, "current", "legacy"),
    # Data: the folder that holds `refer_seg`, or what `data_pipelines.prepare` wrote.
    data="",
    refclef=("unc", "berkeley", "none"),
    refcoco=("unc", "google"),
    refcocog=("umd", "google"),
    overlap=("union", "sum"),
    strict=False,
    phrases=3,
    workers=0,
    # What --mode cache_features wrote for these data and this segmenter; "": none.
    features="",
    # What is trained: the flags of the paper's Table 4, and a regex over '/'-paths for more.
    train_encoder=True,
    train_mask_decoder=True,
    train_prompt_encoder=True,
    also_train="",
    # Training
    steps=15_000,
    batch_size=128,
    accumulate=2,
    # Devices
    fsdp=1,
    zero_stage=(2, 1, 3),
)
_HELD_OUT = ("refcoco", "refcoco+", "refcocog")


def parse_recipe(
    argument: str | None, held_out: tuple[str, ...] = _HELD_OUT, **own: Any
) -> dict[str, Any]:
    """Returns the arguments of a recipe.

    Args:
      argument: what follows the config file's name.
      held_out: data sets of whose val split images may be measured on while it trains; the first by
        default.
      **own: further arguments of the recipe, as `parse_arguments` expects them.

    Raises:
      ValueError: an argument is not possible, or it is not said what to begin with or where the
        data is.
    """
    arguments = parse_arguments(argument, **_ARGUMENTS, held_out=held_out, **own)
    if not arguments["data"]:
        raise ValueError("config argument 'data': expected a directory, found nothing")
    begins = [name for name in ("foundations", "model") if arguments[name]]
    if len(begins) != 1:
        found = "both" if begins else "neither"
        raise ValueError(
            "config arguments 'foundations' and 'model': expected a directory for one of them, "
            f"found {found}"
        )
    return arguments


def dataset(arguments: Mapping[str, Any], name: str, weight: float, **rules: Any) -> dict[str, Any]:
    """The train split of a data set, drawn by weight."""
    rules = {"overlap": arguments["overlap"], **rules}
    return dict(name=name, root=arguments["data"], split="train", weight=weight, rules=rules)


def refer_datasets(arguments: Mapping[str, Any], weight: float) -> list[dict[str, Any]]:
    """The train splits of RefCLEF, RefCOCO, RefCOCO+ and RefCOCOg, drawn from evenly.

    Args:
      weight: of all of them together; 0 gives none.
    """
    names = [_split_by(arguments, family) for family in _REFER_SETS]
    names = [name for name in names if name is not None] if weight else []
    return [dataset(arguments, name, weight / len(names)) for name in names]


def make_recipe(
    arguments: Mapping[str, Any],
    train: Sequence[Mapping[str, Any]],
    canvases: tuple[tuple[int, int], ...],
    held_out_rules: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """Returns the values of an experiment that trains on these data sets as the paper does.

    Args:
      train: the data sets, as `dataset` gives them.
      canvases: heights and widths that hold images at their original size.
      held_out_rules: how the held-out data set is read, where not as the original does.
    """
    config = ConfigDict()
    config.seed = 0
    config.log_every = 20
    # Steps between two profiles; 0: none.
    config.profile_every = 0

    # Model: sizes come with the directories; whatever they have not, here the projector, is drawn.
    begun_encoder, begun_segmenter = begun_towers(arguments)
    choices = _encoder_choices(arguments, begun_encoder)
    encoder = dict(dtype="bfloat16", remat=True, **choices)
    segmenter = dict(dtype="bfloat16", encoder_chunk=1)
    config.init = dict(model=arguments["model"], encoder="", segmenter="", frozen_dtype="bfloat16")
    if arguments["foundations"] == "none":
        encoder = {**tower_to_dict(begun_encoder), **encoder}
        segmenter = {**tower_to_dict(begun_segmenter), **segmenter}
    elif arguments["foundations"]:
        for tower in ("encoder", "segmenter"):
            config.init[tower] = f"{arguments['foundations']}/{arguments[tower]}"
    config.model = ConfigDict(dict(encoder=encoder, segmenter=segmenter))
    if arguments["profile"] != _AS_IT_IS:
        config.model.profile = arguments["profile"]
    if arguments["projector_width"]:
        config.model.projector_width = arguments["projector_width"]

    # Data
    name, root = arguments["held_out"], arguments["data"]
    held_out = dict(name=_split_by(arguments, name) or name, root=root, split="val")
    config.data = ConfigDict()
    config.data.train = list(train)
    config.data.held_out = [dict(held_out, rules=dict(held_out_rules or {}))]
    config.data.exclude_images_of = _evaluation_datasets(arguments) if arguments["strict"] else []
    config.data.phrases = arguments["phrases"]
    config.data.text_lengths = (16, 32, 64, 128)
    config.data.canvases = canvases
    config.data.max_skipped = 100
    config.data.workers = arguments["workers"]
    # A batch of 128 images is 0.6 GB: more threads would hold more of them.
    config.data.threads = 4
    config.data.features = arguments["features"]
    # How --mode cache_features writes features: bfloat16, float32, or int8.
    config.feature_cache = dict(dtype="bfloat16", batch_size=8, images_a_file=500)

    # Training. `trainable` is a tuple, since no list can be given on the command line.
    batch_size, accumulate = arguments["batch_size"], arguments["accumulate"]
    config.stages = ConfigDict()
    config.stages.refer = dict(
        prompts="text",
        steps=arguments["steps"],
        batch_size=batch_size,
        accumulate=accumulate,
        trainable=trainable_rules(
            begun_segmenter,
            encoder=arguments["train_encoder"],
            mask_decoder=arguments["train_mask_decoder"],
            prompt_encoder=arguments["train_prompt_encoder"],
            more=arguments["also_train"],
        ),
        optimizer=dict(
            learning_rate=1e-4,
            schedule="linear",
            warmup_steps=100,
            b1=0.9,
            b2=0.95,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        loss=dict(bce=1.0, dice=1.0),
    )

    # Devices and checkpoints
    config.mesh = dict(
        data=0,
        fsdp=arguments["fsdp"],
        zero_stage=arguments["zero_stage"],
        # Stage 3 would gather the image encoder for every chunk of images: it stays whole.
        rules=(("segmenter/image_encoder/.*", "replicated"), (".*", "fsdp")),
    )
    config.checkpoints = dict(every=500, keep=2, keep_best=1)

    # Evaluation, of as many images at a time as a part of a training batch has: where the one can
    # be split over the devices, the other can.
    config.evaluation = dict(
        images=256, batch_size=batch_size // max(1, accumulate), every=500, panel_images=4
    )
    return config


def require_semantic_token(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError if the tokenizer would spell out `[semantic]`, one token in the original.

    Only BEiT-3's can have tokens beside those it was trained with. A directory that is not there is
    left to whoever reads it.
    """
    directory = arguments["model"] or f"{arguments['foundations']}/{arguments['encoder']}"
    folder = Path(directory) / "tokenizer"
    if not folder.exists():
        return
    tokenizer = load_tokenizer(folder)
    token = SEMANTIC_PREFIX.strip()
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise ValueError(
            f"{folder}: expected a tokenizer that can have the token {token}, as BEiT-3's can, "
            "found that of an encoder that has no such token: leave out what is prefixed with it"
        )
    if len(tokenizer.encode(token)) != 3:  # between <s> and </s>
        added = f'{{"{token}": {tokenizer.vocab_size}}}'
        raise ValueError(
            f"{folder / 'added_tokens.json'}: expected the token {token}, as in {added}, found none"
        )


def begun_towers(arguments: Mapping[str, Any]) -> tuple[EncoderConfig, SegmenterConfig]:
    """The encoder and the segmenter that a run begins with, as their directories have them.

    With `foundations=none` they are those of the names alone, and so of a directory that cannot be
    read, which is left to whoever needs it.

    Args:
      arguments: with `model`, or with `foundations` and the names of two of them.

    Raises:
      ValueError: a foundation is of another family than its name says, or of the sizes of another.
    """
    towers: dict[str, Any] = {}
    if arguments["model"] == "" and arguments["foundations"] == "none":
        return ENCODERS[arguments["encoder"]], SEGMENTERS[arguments["segmenter"]]
    for tower, known in (("encoder", ENCODERS), ("segmenter", SEGMENTERS)):
        name = arguments.get(tower, next(iter(known)))
        directory = arguments["model"] or f"{arguments['foundations']}/{name}"
        try:
            towers[tower] = tower_from_dict(tower, dict(read_manifest(directory).config[tower]))
        except (UserError, KeyError):
            towers[tower] = known[name]
        if not arguments["model"]:
            _require_named(directory, towers[tower], name, known)
    return towers["encoder"], towers["segmenter"]


def _require_named(directory: str, found: Any, name: str, known: Mapping[str, Any]) -> None:
    """Raises ValueError if a foundation is another one than its directory's name says.

    Sizes that none of them has are somebody's own, and pass.
    """
    alike = [other for other, tower in known.items() if _sizes(tower) == _sizes(found)]
    family = known[name].family
    if found.family != family or (alike and name not in alike):
        like = alike[0] if alike else f"{found.family}, not {family}"
        raise ValueError(f"{directory}: expected {name}, found a model that looks like {like}")


def _sizes(tower: Any) -> dict[str, Any]:
    """What tells two foundations apart: numbers that no argument of a recipe or option changes."""
    chosen = {"image_size", "early_layers", "encoder_chunk", "vocab_size"}
    numbers = {
        key: tuple(value) if isinstance(value, (list, tuple)) else value
        for key, value in vars(tower).items()
        if type(value) is int or isinstance(value, (list, tuple))
    }
    return {key: value for key, value in numbers.items() if key not in chosen}


def trainable_rules(
    segmenter: SegmenterConfig,
    *,
    encoder: bool = True,
    mask_decoder: bool = True,
    prompt_encoder: bool = True,
    more: str = "",
) -> tuple[tuple[str, bool], ...]:
    """What is trained of a model with this segmenter; the projector always is.

    Args:
      prompt_encoder: all that the original's `train_prompt_encoder` trains: 256 numbers, which a
        segmenter adds to an image where there is no mask prompt. One without mask prompts has none.
      more: regex over '/'-paths of what is trained besides.
    """
    # Of SAM-2, what the decoder adds of finer features is computed once an image.
    decoder = ["segmenter/mask_decoder/.*", *filter(None, [segmenter.finishing])]
    rules = [(more, True)] if more else []
    rules += [("encoder/.*", encoder), ("projector/.*", True)]
    rules += [(pattern, mask_decoder) for pattern in decoder]
    if segmenter.mask_prompts:
        rules.append(("segmenter/prompt_encoder/no_mask_embed", prompt_encoder))
    return (*rules, ("segmenter/.*", False))


def _encoder_choices(arguments: Mapping[str, Any], begun: EncoderConfig) -> dict[str, Any]:
    """Fields of the encoder's configuration that are asked to be other than they are."""
    for key in ("early_layers", "image_fit", "projected"):
        if arguments[key] != _AS_IT_IS and not hasattr(begun, key):
            raise ValueError(
                f"config argument {key!r}: expected none, as {begun.family} has no such choice and "
                f"its fusion is {' or '.join(begun.readouts)}, found {arguments[key]!r}"
            )
    chosen = {
        key: arguments[key]
        for key in ("fusion", "readout", "concat", "image_fit")
        if arguments[key] != _AS_IT_IS
    }
    if arguments["projected"] != _AS_IT_IS:
        chosen["projected"] = arguments["projected"] == "true"
    fusion, layers = chosen.get("fusion", begun.fusion), arguments["early_layers"]
    if layers not in (_AS_IT_IS, _ALL) and not layers.isdecimal():
        raise ValueError(
            f"config argument 'early_layers': expected {_AS_IT_IS}, {_ALL} or a number, "
            f"found {layers!r}"
        )
    if layers == _ALL:
        chosen["early_layers"] = None
    elif layers != _AS_IT_IS:
        chosen["early_layers"] = int(layers)
    elif fusion != "early" and hasattr(begun, "early_layers"):
        chosen["early_layers"] = None  # the number of another fusion
    before = _meeting(begun.fusion, getattr(begun, "early_layers", None))
    after = _meeting(fusion, chosen.get("early_layers", getattr(begun, "early_layers", None)))
    if after != before and "readout" not in chosen and after in begun.readouts:
        chosen["readout"] = begun.readouts[after][0]
    return chosen


def _meeting(fusion: str, early_layers: int | None) -> str:
    """How images and words meet: early fusion in no layer is late."""
    return "late" if fusion == "early" and early_layers == 0 else fusion


def _split_by(arguments: Mapping[str, Any], family: str) -> str | None:
    """The name of a data set of RefCOCO's family in the split asked for; None: it is left out."""
    names = _REFER_SETS.get(family, {})
    if len(names) == 1:
        return next(iter(names.values()))
    return names.get(arguments.get(family, ""))


def _evaluation_datasets(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All splits of RefCOCO, RefCOCO+ and RefCOCOg that scores are reported of."""
    names = [_split_by(arguments, family) for family in _HELD_OUT]
    return [
        dict(name=name, root=arguments["data"], split=split)
        for name in names
        if name is not None
        for split in _EVALUATION_SPLITS[name]
    ]
