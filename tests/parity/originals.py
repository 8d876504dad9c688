"""Imports of the PyTorch originals that the `torch` tier compares with, from their PyPI packages.

`segment-anything` 1.0, `torchscale` 0.2.0 and `sam2` 1.1.0 are installed by
`tests/install_parity.sh` without their dependencies, which would bring gigabytes and, for `timm`
0.4.12, code that no longer runs. Of those dependencies they use a few functions at import time and
two at run time; here these are stand-ins that exist only while the originals are being imported, so
that no other package takes them for the real thing. `transformers` needs none.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image


def missing_originals() -> list[str]:
    """The packages of the `torch` tier that are not installed."""
    needed = ("torch", "segment_anything", "torchscale", "sam2", "transformers")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def segment_anything() -> types.ModuleType:
    """The package `segment_anything`; its `modeling` and `build_sam` need torch only.

    `ResizeLongestSide.apply_image` works too: it resizes by Pillow's bilinear filter, which is
    what torchvision does to a PIL image. Automatic mask generation raises.
    """
    with _standing_in(
        {
            "torchvision.ops.boxes": {"batched_nms": _refuse, "box_area": _refuse},
            "torchvision.transforms.functional": {
                "to_pil_image": Image.fromarray,
                "resize": _resize_pil,
            },
        }
    ):
        return importlib.import_module("segment_anything")


def torchscale_beit3() -> tuple[type, type]:
    """The classes `(BEiT3, EncoderConfig)` of torchscale.

    Stochastic depth and fairscale's wrappers raise when used: BEiT-3 as published uses neither.
    """
    with _standing_in(
        {
            "fairscale.nn": {"checkpoint_wrapper": _refuse, "wrap": lambda module: module},
            "timm.models.layers": {"drop_path": _refuse},
        }
    ):
        model = importlib.import_module("torchscale.model.BEiT3")
        config = importlib.import_module("torchscale.architecture.config")
    return model.BEiT3, config.EncoderConfig


def sam2() -> types.ModuleType:
    """The package `sam2`; `modeling` needs torch only, and so does `sam2_image_predictor` imported.

    What reads its yaml files and what resizes images raise.
    """
    with _standing_in(
        {
            "hydra": {"initialize_config_module": lambda *_args, **_kwargs: None},
            "hydra.core.global_hydra": {"GlobalHydra": _NoHydra},
            "iopath.common.file_io": {"g_pathmgr": _refuse},
            "torchvision.transforms": dict.fromkeys(("Normalize", "Resize", "ToTensor"), _refuse),
        }
    ):
        package = importlib.import_module("sam2")
        importlib.import_module("sam2.modeling.sam2_base")
        importlib.import_module("sam2.modeling.backbones.image_encoder")
        importlib.import_module("sam2.modeling.backbones.hieradet")
        importlib.import_module("sam2.sam2_image_predictor")
    return package


def sam2_from_yaml(name: str) -> Any:
    """The model of a file of `sam2/configs`, with random weights, as hydra would make it."""
    import yaml

    text = (Path(sam2().__path__[0]) / "configs" / name).read_text()

    def made(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        arguments = {key: made(one) for key, one in value.items()}
        if "_target_" not in arguments:
            return arguments
        module, name = arguments.pop("_target_").rsplit(".", 1)
        return getattr(importlib.import_module(module), name)(**arguments)

    # YAML takes 1e-6 for a word, hydra's reader for a number.
    return made(yaml.safe_load(text.replace(" 1e-6", " 1.0e-6"))["model"])


@contextlib.contextmanager
def _standing_in(modules: dict[str, dict[str, Callable]]) -> Iterator[None]:
    """Puts modules of the given names and attributes, and their parents, before the real ones."""
    stubs: dict[str, types.ModuleType] = {}
    for full_name, attributes in modules.items():
        parts = full_name.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            stubs.setdefault(name, types.ModuleType(name))
            if end > 1:
                setattr(stubs[".".join(parts[: end - 1])], parts[end - 1], stubs[name])
        for attribute, value in attributes.items():
            setattr(stubs[full_name], attribute, value)
    replaced = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in replaced.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _NoHydra:
    """A hydra that is initialised, so that nobody does it."""

    @classmethod
    def instance(cls) -> "_NoHydra":
        return cls()

    def is_initialized(self) -> bool:
        return True


def _resize_pil(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes to `size` = (height, width)."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _refuse(*_args: object, **_kwargs: object) -> None:
    raise NotImplementedError("this part of the original needs packages that are not installed")
