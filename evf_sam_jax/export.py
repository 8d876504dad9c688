"""Writes a model as `jax.export` artefacts, which run without this package on any of the platforms.

    python -m evf_sam_jax.export --model DIR --platforms cpu,cuda,tpu --out EXPORT_DIR

    EXPORT_DIR/manifest.json              sizes, preprocessing, buckets, platforms, origin
    EXPORT_DIR/encode_image.jax_export    image -> features
    EXPORT_DIR/decode_phrases.jax_export  features and token ids -> low-resolution logits, IoU
    EXPORT_DIR/resample_tile.jax_export   low-resolution logits -> a tile of the image's pixels
    EXPORT_DIR/weights.safetensors        the parameters, by '/'-path
    EXPORT_DIR/tokenizer/                 the tokenizer's files
    EXPORT_DIR/evf_sam_export/            the loader (`export_loader.py`) and the files it needs
    EXPORT_DIR/__main__.py                `python EXPORT_DIR --image ... --text ... --out ...`

One artefact serves all its platforms; where the image encoder's attention has other tiles on CPUs
than on accelerators, it holds both. Number and length of phrases are symbolic: each artefact is
compiled where it runs, once for each bucket.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Bool, Float, Int, UInt8

from convert.safetensors_files import SafetensorsWriter
from data_pipelines import encoder_images, image_input, tokenizers, tower_images
from evf_sam_jax import export_loader, model_dir, model_inputs
from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.config_checks import DTYPES
from evf_sam_jax.models.interfaces import ImageFeatures, Prompts
from evf_sam_jax.models.target import Target, compiled_for
from evf_sam_jax.output_directory import new_directory, require_absent
from evf_sam_jax.predictor import (
    PHRASE_BUCKETS,
    TILE,
    TOKEN_BUCKETS,
    check_parameters,
    resample_tile,
)

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

PACKAGE = "evf_sam_export"  # of the loader, inside the export directory

Leaves = dict[str, Any]  # '/'-path -> array


@dataclasses.dataclass(frozen=True)
class Function:
    """What becomes one artefact.

    Attributes:
      apply: (leaves, *inputs) -> arrays in plain dicts, which any reader can rebuild.
      parameters: entries of the parameter tree whose leaves it takes.
      inputs: their shapes, which may be symbolic.
    """

    apply: Callable[..., Any]
    parameters: tuple[str, ...]
    inputs: tuple[Any, ...]


def export_model(
    model: str | os.PathLike,
    out: str | os.PathLike,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    dtype: str = "float32",
) -> dict[str, Any]:
    """Writes an export directory, whole or not at all; weights are copied one at a time.

    Args:
      model: a model directory with a tokenizer.
      out: the directory to make.
      platforms: some of `PLATFORMS`; none of them has to be there.
      dtype: of activations, matrix products and the matrices' weights.

    Returns:
      The manifest as written.

    Raises:
      UserError: any of these cannot be used, or flatbuffers is not installed.
    """
    _check_platforms(platforms)
    if dtype not in DTYPES:
        raise UserError(f"--dtype: expected {' or '.join(DTYPES)}, found {dtype!r}")
    _require_flatbuffers()
    require_absent(out, "--out")
    manifest = model_dir.read_manifest(model)
    config = _read_config(model, manifest, dtype)
    stored = model_dir.describe(model)
    model_dir.require_space(out, sum(4 * leaf.size for leaf in stored.values()))
    functions = model_functions(config, platforms)
    try:
        with new_directory(out, "--out") as directory:
            for name, function in functions.items():
                artefact = lower(function, config, platforms)
                (directory / _artefact_file(name)).write_bytes(artefact.serialize())
            _write_weights(directory / export_loader.WEIGHTS, model, dtype)
            shutil.copytree(Path(model) / "tokenizer", directory / "tokenizer")
            write_loader(directory)
            content = _manifest(manifest, config, functions, platforms, dtype)
            text = json.dumps(content, indent=2) + "\n"
            (directory / export_loader.MANIFEST).write_text(text, encoding="utf-8")
            return content
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from None


def model_functions(config: evf_sam.EvfSamConfig, platforms: Sequence[str]) -> dict[str, Function]:
    """Returns what is exported: what `Predictor` computes, and the shapes of its inputs."""

    def encode_image(
        leaves: Leaves, sam_image: UInt8[Array, "1 s s 3"], sam_size: Int[Array, "1 2"]
    ) -> dict[str, Any]:
        def encode(tiles: str, *inputs: Any) -> ImageFeatures:
            with compiled_for(Target(tiles, fused=False)):
                return evf_sam.encode_image(config, *inputs)

        # Not those of the machine that exports; and no kernels, which not every device has.
        on_cpu, elsewhere = (functools.partial(encode, tiles) for tiles in ("cpu", "gpu"))
        inputs = (model_dir.nest(leaves), sam_image, sam_size)
        if "cpu" not in platforms:
            features = elsewhere(*inputs)
        elif set(platforms) == {"cpu"}:
            features = on_cpu(*inputs)
        else:
            features = jax.lax.platform_dependent(*inputs, cpu=on_cpu, default=elsewhere)
        return {"embedding": features.embedding, "high_res": list(features.high_res)}

    def decode_phrases(
        leaves: Leaves,
        features: dict[str, Any],
        encoder_image: Float[Array, "1 h w _"],
        text_ids: Int[Array, "1 k l"],
        text_valid: Bool[Array, "1 k l"],
    ) -> dict[str, Array]:
        params = model_dir.nest(leaves)
        image = ImageFeatures(features["embedding"], tuple(features["high_res"]))
        # One for all: what suits CPUs matters here to gradients alone.
        with compiled_for(Target("gpu", fused=False)):
            text = evf_sam.encode_phrases(config, params, encoder_image, text_ids, text_valid)
            prediction = evf_sam.decode(config, params, image, Prompts(text=text), multimask=False)
        return {"low_res_logits": prediction.low_res_logits, "iou": prediction.iou}

    def resample(leaves: Leaves, *inputs: Array) -> Array:
        return resample_tile(evf_sam.padded_frame(config), *inputs)

    frame, low = config.segmenter.image_size, config.segmenter.low_res_size
    encoder_image = (1, *model_inputs.tower_images(config).encoder_shape)
    sizes = _shape((1, 2), jnp.int32)
    image = (_shape((1, frame, frame, 3), jnp.uint8), sizes)
    features = jax.eval_shape(encode_image, _leaf_shapes(config, ("segmenter",)), *image)
    phrases, tokens = jax.export.symbolic_shape(
        "k, l", constraints=(f"l <= {config.encoder.max_text_tokens}",)
    )
    text = (1, phrases, tokens)
    decoded = (
        features,
        _shape(encoder_image, jnp.float32),
        _shape(text, jnp.int32),
        _shape(text, jnp.bool_),
    )
    tile = (_shape((1, 1, low, low), jnp.float32), sizes, sizes, _shape((2,), jnp.int32))
    return {
        "encode_image": Function(encode_image, ("segmenter",), image),
        "decode_phrases": Function(decode_phrases, ("encoder", "projector", "segmenter"), decoded),
        "resample_tile": Function(resample, (), tile),
    }


def lower(
    function: Function, config: evf_sam.EvfSamConfig, platforms: Sequence[str]
) -> jax.export.Exported:
    """Returns the artefact of a function for all of `platforms`."""
    export = jax.export.export(jax.jit(function.apply), platforms=tuple(platforms))
    return export(_leaf_shapes(config, function.parameters), *function.inputs)


def write_loader(directory: Path) -> None:
    """Writes the package of the loader, and what makes `python EXPORT_DIR` run it."""
    package = directory / PACKAGE
    package.mkdir()
    errors = f'"""The user\'s mistakes."""\n\n\n{inspect.getsource(UserError)}'
    files = {
        directory / "__main__.py": _MAIN,
        package / "__init__.py": standalone_source(export_loader),
        package / "encoder_images.py": standalone_source(encoder_images),
        package / "image_input.py": standalone_source(image_input),
        package / "tokenizers.py": standalone_source(tokenizers),
        package / "tower_images.py": standalone_source(tower_images),
        package / "errors.py": errors,
    }
    for file, content in files.items():
        file.write_text(content, encoding="utf-8")


_MAIN = f'''"""Predicts: python EXPORT_DIR --image FILE --text PHRASE --out DIR."""

from pathlib import Path

from {PACKAGE} import main

main(Path(__file__).parent)
'''


def standalone_source(module: ModuleType) -> str:
    """Returns a module's source as a member of the loader's package.

    Imports from this project become relative; annotations are not evaluated, so the library of
    shapes in them is not needed.
    """
    source = inspect.getsource(module)
    lines = source.splitlines(keepends=True)
    statements = ast.parse(source).body
    for statement in statements:
        if not isinstance(statement, ast.ImportFrom):
            continue
        first, last = statement.lineno - 1, statement.end_lineno
        if statement.module == "jaxtyping":
            lines[first:last] = [""] * len(lines[first:last])
        elif statement.module == "data_pipelines":
            lines[first] = lines[first].replace("from data_pipelines import", "from . import")
        elif (statement.module or "").startswith("data_pipelines."):
            lines[first] = lines[first].replace("from data_pipelines.", "from .")
        elif statement.module == "evf_sam_jax.errors":
            lines[first] = lines[first].replace("from evf_sam_jax.", "from .")
    docstring_end = statements[0].end_lineno or 0
    lines.insert(docstring_end, "\nfrom __future__ import annotations\n")
    return "".join(lines)


def _manifest(
    manifest: model_dir.Manifest,
    config: evf_sam.EvfSamConfig,
    functions: dict[str, Function],
    platforms: Sequence[str],
    dtype: str,
) -> dict[str, Any]:
    images = model_inputs.tower_images(config)
    return {
        "export_version": export_loader.FORMAT_VERSION,
        "variant": manifest.variant,
        "profile": manifest.profile,
        "source": manifest.source,
        "parameter_counts": manifest.parameter_counts,
        "dtype": dtype,
        "platforms": list(platforms),
        "jax_version": jax.__version__,
        "functions": {
            name: {"file": _artefact_file(name), "parameters": list(function.parameters)}
            for name, function in functions.items()
        },
        "preprocessing": {
            "segmenter": {
                "frame": images.frame,
                "fit": images.fit,
                "values": "uint8 RGB; encode_image normalises",
            },
            "encoder": {"size": images.encoder_size, "kind": images.encoder_kind},
        },
        "max_text_tokens": config.encoder.max_text_tokens,
        "phrase_buckets": list(PHRASE_BUCKETS),
        "token_buckets": list(TOKEN_BUCKETS),
        "tile": TILE,
    }


def _check_platforms(platforms: Sequence[str]) -> None:
    known = ", ".join(PLATFORMS)
    if not platforms:
        raise UserError(f"--platforms: expected some of {known}, found none")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f"--platforms: expected some of {known}, found {platform!r}")
    if len(set(platforms)) < len(platforms):
        raise UserError(f"--platforms: expected each once, found {','.join(platforms)}")


def _require_flatbuffers() -> None:
    try:
        importlib.import_module("flatbuffers")
    except ImportError:
        raise UserError(
            'export needs the package flatbuffers, found none: pip install "evf-sam-jax[export]"'
        ) from None


def _read_config(
    model: str | os.PathLike, manifest: model_dir.Manifest, dtype: str
) -> evf_sam.EvfSamConfig:
    """Returns the model's config with `dtype`; raises UserError where it cannot be exported."""
    model_dir.check_whole(model, manifest)
    if not manifest.has_tokenizer:
        raise UserError(
            f"{model}: expected a model directory with tokenizer files, found none in it; "
            "an export takes phrases as text"
        )
    config = evf_sam.with_dtype(evf_sam.EvfSamConfig.from_dict(manifest.config), dtype)
    model_inputs.load_tokenizer(model, config)
    check_parameters(model, config)
    return config


def _write_weights(file: Path, model: str | os.PathLike, dtype: str) -> None:
    """Copies the parameters one at a time, each in the dtype that `Predictor` gives it."""

    def leaf_dtype(path: str) -> np.dtype:
        return jnp.dtype(evf_sam.param_dtype(path, dtype))

    tensors = {
        path: (leaf.shape, leaf_dtype(path)) for path, leaf in model_dir.describe(model).items()
    }
    with SafetensorsWriter(file, tensors) as writer:
        for path, leaf in model_dir.iterate_params(model):
            writer.write(path, leaf.astype(leaf_dtype(path)))


def _leaf_shapes(config: evf_sam.EvfSamConfig, parameters: Sequence[str]) -> Leaves:
    """Shapes and dtypes of the leaves below some entries, as `_write_weights` writes them."""
    dtype = config.encoder.dtype
    leaves = model_dir.path_leaves(evf_sam.param_shapes(config))
    return {
        path: _shape(leaf.shape, evf_sam.param_dtype(path, dtype))
        for path, leaf in leaves.items()
        if path.split("/")[0] in parameters
    }


def _shape(shape: tuple[Any, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _artefact_file(name: str) -> str:
    return f"{name}.jax_export"


# The command line.


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    flags.DEFINE_string("model", None, "The model directory.")
    flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "Where it shall run.")
    flags.DEFINE_string("out", None, "The directory to make; by default MODEL_export.")
    flags.DEFINE_enum(
        "dtype", "float32", list(DTYPES), "float32: exact; bfloat16: half the memory."
    )


def main(argv: list[str]) -> None:
    """Checks the flags, exports, and says what was written."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    if not options.model:
        raise UserError("--model: expected a path, found nothing")
    out = options.out or f"{os.path.normpath(options.model)}_export"
    manifest = export_model(options.model, out, options.platforms, options.dtype)
    for file in sorted(path for path in Path(out).iterdir() if path.is_file()):
        print(f"{file.name}: {file.stat().st_size:,} bytes")
    print(f"written to {out}: {manifest['dtype']}, for {', '.join(manifest['platforms'])}")
    print(f'try: python {out} --image FILE --text "PHRASE" --out DIR')


if __name__ == "__main__":
    define_flags()
    run_app(main)
