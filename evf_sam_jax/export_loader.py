"""Predicts with what `python -m evf_sam_jax.export` wrote: no model code, only arrays in and out.

    python EXPORT_DIR --image cat.jpg --text "the cat on the left" --out out/cat

A copy of this file travels in each export directory, with copies of the files that read images and
tokenize phrases. There it needs jax, numpy, flatbuffers, pillow, safetensors and sentencepiece, or
tokenizers for CLIP and ViLT.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from data_pipelines import image_input, tokenizers
from data_pipelines.tower_images import ENCODER, FITS, TowerImages
from evf_sam_jax.errors import UserError

FORMAT_VERSION = 2

MANIFEST = "manifest.json"
FUNCTIONS = ("encode_image", "decode_phrases", "resample_tile")
WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Masks of k phrases in one image.

    Attributes:
      mask_logits: at the size of the image; positive inside.
      masks: `mask_logits` > 0.
      iou: the model's own estimate of each mask's IoU.
    """

    mask_logits: Float32[np.ndarray, "k h w"]
    masks: Bool[np.ndarray, "k h w"]
    iou: Float32[np.ndarray, " k"]


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """An export directory, opened: `ExportedModel.load("EXPORT_DIR").predict(pixels, phrases)`.

    Attributes:
      manifest: sizes, buckets, and where everything came from.
      weights: '/'-path -> array on the device.
      functions: the compiled functions; each compiles once for every shape of its inputs.
      tokenizer: turns phrases into token ids.
      images: how the model takes an image.
    """

    manifest: Mapping[str, Any]
    weights: Mapping[str, jax.Array]
    functions: Mapping[str, Callable[..., Any]]
    tokenizer: tokenizers.Tokenizer
    images: TowerImages

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "ExportedModel":
        """Reads an export directory; weights go to the default device, one after the other.

        Raises:
          UserError: it is no export directory, one of another version, one for other platforms
            than jax's here, or it is damaged.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        functions = {
            name: _load_function(directory / entry["file"], entry["parameters"])
            for name, entry in ((name, manifest["functions"][name]) for name in FUNCTIONS)
        }
        tokenizer = tokenizers.load_tokenizer(directory, manifest["max_text_tokens"], False)
        towers = manifest["preprocessing"]
        images = TowerImages(
            frame=towers["segmenter"]["frame"],
            fit=towers["segmenter"]["fit"],
            encoder_size=towers["encoder"]["size"],
            encoder_kind=towers["encoder"]["kind"],
        )
        return cls(manifest, _load_weights(directory / WEIGHTS), functions, tokenizer, images)

    def predict(self, image: UInt8[np.ndarray, "h w 3"], texts: Sequence[str]) -> Prediction:
        """Returns the masks of phrases in an image, which is encoded once.

        Args:
          image: RGB, as `image_input.read_image` gives it.
          texts: k phrases.

        Raises:
          UserError: no phrase, an empty or too long one, or an image without pixels.
        """
        if isinstance(texts, str):
            raise UserError("expected a list of phrases, found one text")
        return self.predict_ids(image, [self.tokenizer.encode(text) for text in texts])

    def predict_ids(
        self, image: UInt8[np.ndarray, "h w 3"], ids: Sequence[Sequence[int]]
    ) -> Prediction:
        """As `predict`, of phrases as token ids, `<s>` and `</s>` included."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise UserError(
                "expected an image of uint8 pixels [height, width, 3], "
                f"found {image.dtype} {list(image.shape)}"
            )
        if not ids:
            raise UserError("expected at least one phrase, found none")
        sam_image, sam_size = self.images.segmenter(image)
        encoder_image = self.images.encoder(image)
        sam_sizes = np.asarray([sam_size], np.int32)
        features = self._call("encode_image", sam_image[None], sam_sizes)
        most = self.manifest["phrase_buckets"][-1]
        logits, iou = [], []
        for start in range(0, len(ids), most):
            decoded = self._decode(features, encoder_image[None], ids[start : start + most])
            logits += [self._resample(x, sam_sizes, image.shape[:2]) for x in decoded[0]]
            iou.append(decoded[1])
        mask_logits = np.stack(logits)
        return Prediction(mask_logits, mask_logits > 0, np.concatenate(iou))

    def _call(self, name: str, *inputs: Any) -> Any:
        return self.functions[name](self.weights, *inputs)

    def _decode(
        self,
        features: Any,
        encoder_image: Float32[np.ndarray, "1 h w _"],
        ids: Sequence[Sequence[int]],
    ) -> tuple[Float32[np.ndarray, "k l l"], Float32[np.ndarray, " k"]]:
        """Decodes as many phrases as one bucket holds; the rest of the bucket repeats the first."""
        longest = max(map(len, ids))
        tokens = min(
            _bucket(longest, self.manifest["token_buckets"]), self.manifest["max_text_tokens"]
        )
        phrases = _bucket(len(ids), self.manifest["phrase_buckets"])
        padded = [*ids, *[ids[0]] * (phrases - len(ids))]
        text_ids, text_valid = tokenizers.pad_token_ids(padded, tokens)
        decoded = self._call(
            "decode_phrases", features, encoder_image, text_ids[None], text_valid[None]
        )
        logits, iou = (np.asarray(decoded[key]) for key in ("low_res_logits", "iou"))
        return logits[0, : len(ids), 0], iou[0, : len(ids), 0]

    def _resample(
        self,
        low_res_logits: Float32[np.ndarray, "l l"],
        sam_sizes: np.ndarray,
        size: tuple[int, int],
    ) -> Float32[np.ndarray, "h w"]:
        """Returns one phrase's logits at the size of the image, computed tile by tile."""
        height, width = size
        side = self.manifest["tile"]
        sizes = np.asarray([size], np.int32)
        result = np.empty(size, np.float32)
        for top in range(0, height, side):
            for left in range(0, width, side):
                origin = np.asarray([top, left], np.int32)
                tile = self._call(
                    "resample_tile", low_res_logits[None, None], sam_sizes, sizes, origin
                )
                part = np.asarray(tile)[0, 0, : height - top, : width - left]
                result[top : top + side, left : left + side] = part
        return result


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads what an export directory holds.

    Raises:
      UserError: it is no export directory, one of another format version, or something is missing
        in its manifest.
    """
    file = Path(directory) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file}: expected JSON, found something else ({error})") from None
    version = manifest.get("export_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: expected export_version {FORMAT_VERSION}, found {version!r}")
    for path, expected in _NEEDED.items():
        value: Any = manifest
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if not expected(value):
            raise UserError(f"{file}: {'/'.join(path)} is missing or damaged: export again")
    return manifest


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_size, value))


def _is_function(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("file"), str)
        and isinstance(value.get("parameters"), list)
    )


# What `ExportedModel` takes from a manifest, and what each must be.
_NEEDED: Mapping[tuple[str, ...], Callable[[Any], bool]] = {
    **{("functions", name): _is_function for name in FUNCTIONS},
    ("preprocessing", "segmenter", "frame"): _is_size,
    ("preprocessing", "segmenter", "fit"): FITS.__contains__,
    ("preprocessing", "encoder", "size"): _is_size,
    ("preprocessing", "encoder", "kind"): ENCODER.__contains__,
    ("max_text_tokens",): _is_size,
    ("phrase_buckets",): _are_sizes,
    ("token_buckets",): _are_sizes,
    ("tile",): _is_size,
}


def _load_function(file: Path, parameters: Sequence[str]) -> Callable[..., Any]:
    """(all weights, *inputs) -> outputs, compiled; `parameters` begin the paths that it takes."""
    try:
        exported = jax.export.deserialize(bytearray(file.read_bytes()))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # FlatBuffers does not check what it reads, so anything may follow
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: jax {jax.__version__} cannot open it: {reason}") from None
    here = jax.export.default_export_platform()
    if here not in exported.platforms:
        found = ", ".join(exported.platforms)
        raise UserError(f"{file}: expected an export for {here}, found one for {found} only")
    call = jax.jit(exported.call)

    def apply(weights: Mapping[str, jax.Array], *inputs: Any) -> Any:
        own = {path: leaf for path, leaf in weights.items() if path.split("/")[0] in parameters}
        return call(own, *inputs)

    return apply


def _load_weights(file: Path) -> dict[str, jax.Array]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return {path: jax.device_put(opened.get_tensor(path)) for path in opened.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: expected a whole .safetensors file: {reason}") from None


def _bucket(number: int, buckets: Sequence[int]) -> int:
    return next((bucket for bucket in buckets if number <= bucket), number)


# The command line.


def main(directory: str | os.PathLike, arguments: Sequence[str] | None = None) -> None:
    """`python EXPORT_DIR`: predicts, writes one mask PNG (0 or 255) a phrase, prints a line each.

    A user's mistake ends it with one line on standard error and exit code 2.
    """
    parser = argparse.ArgumentParser(prog=f"python {directory}")
    parser.add_argument("--image", required=True, help="the image file")
    parser.add_argument(
        "--text", required=True, action="append", help="a phrase; give it again for more phrases"
    )
    parser.add_argument("--out", required=True, help="the directory to make, for mask PNGs")
    options = parser.parse_args(arguments)
    try:
        _predict_file(directory, options.image, options.text, Path(options.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _predict_file(
    directory: str | os.PathLike, image: str | os.PathLike, texts: Sequence[str], out: Path
) -> None:
    if os.path.lexists(out):
        raise UserError(f"--out: expected a path where nothing is yet, found {out}")
    pixels = image_input.read_image(image)
    prediction = ExportedModel.load(directory).predict(pixels, texts)
    try:
        out.mkdir(parents=True)
        for number, mask in enumerate(prediction.masks):
            Image.fromarray(mask.astype(np.uint8) * 255).save(out / f"{number}.png")
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)  # all masks or none
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from None
    for number, (text, mask) in enumerate(zip(texts, prediction.masks, strict=True)):
        # repr: a phrase may hold what a terminal would obey.
        print(
            f"{text!r}: {mask.sum()} pixels ({mask.mean():.1%}), "
            f"predicted IoU {prediction.iou[number]:.3f}, {number}.png"
        )
