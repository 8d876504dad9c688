"""From an image and phrases to masks, in Python (`Predictor`) and on the command line.

    python -m evf_sam_jax.predict --model DIR --image cat.jpg --text "the cat on the left" --out out

The image is encoded once for all phrases. Everything that is compiled has a shape that depends on
the model or on a bucket of phrases, none on the size of the image: the output is computed in tiles.

Reference: hustvl/EVF-SAM at 9935dc5, `inference.py`.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from PIL import Image

from data_pipelines import image_input, tokenizers
from evf_sam_jax import mask_geometry, model_dir, visualize
from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.interfaces import ImageFeatures, MaskPrediction, Prompts
from evf_sam_jax.output_directory import new_directory

# A model is compiled once for each number of phrases and of tokens it meets; these bound how often.
# More phrases than the largest bucket are decoded in several goes, so memory stays bounded.
PHRASE_BUCKETS = (1, 2, 4, 8, 16)
TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 1024)

TILE = 512  # side of the tiles that the output is computed in, in pixels


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """What is computed of an image once, whatever the phrases.

    Attributes:
      features: the segmenter's.
      encoder_image: the multimodal encoder's input.
      sam_size: height and width of the content of the segmenter's frame.
      size: height and width of the image.
    """

    features: ImageFeatures
    encoder_image: Float[Array, "1 h w 3"]
    sam_size: Int[Array, "1 2"]
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Masks of k phrases in one image.

    Attributes:
      mask_logits: at the size of the image; positive inside.
      masks: `mask_logits` > 0.
      iou: the model's own estimate of each mask's IoU.
      low_res_logits: as the decoder gives them, on a grid over the segmenter's frame.
    """

    mask_logits: Float32[np.ndarray, "k h w"]
    masks: Bool[np.ndarray, "k h w"]
    iou: Float32[np.ndarray, " k"]
    low_res_logits: Float32[np.ndarray, "k l l"]


class Predictor:
    """A model ready to predict, with its compiled functions.

    Attributes:
      config: sizes, and the dtype of activations and matrix products.
      params: the model's parameters, on the device.
      tokenizer: turns phrases into token ids; None: only token ids can be given.
    """

    def __init__(
        self,
        config: evf_sam.EvfSamConfig,
        params: evf_sam.Params,
        tokenizer: tokenizers.Tokenizer | None = None,
    ):
        self.config = config
        self.params = jax.device_put(params)
        self.tokenizer = tokenizer
        self._encode_image = jax.jit(functools.partial(evf_sam.encode_image, config))
        self._encode_phrases = jax.jit(functools.partial(evf_sam.encode_phrases, config))
        self._decode = jax.jit(functools.partial(_decode_text, config))
        self._tile = jax.jit(functools.partial(_tile, config.segmenter.image_size))

    @classmethod
    def load(cls, path: str | os.PathLike, dtype: str = "float32") -> "Predictor":
        """Loads a model directory.

        Args:
          path: written by `python -m convert` or at the end of a training.
          dtype: "float32" for the original's numbers, "bfloat16" for speed and half the memory.

        Raises:
          UserError: no model directory, one of another version, one without the whole model, or
            a dtype that is neither.
        """
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype: expected float32 or bfloat16, found {dtype!r}")
        manifest = model_dir.read_manifest(path)
        missing = [key for key in ("encoder", "segmenter") if key not in manifest.config]
        if missing:
            raise UserError(
                f"{path}: expected a whole EVF-SAM model, found one without {' and '.join(missing)}"
            )
        config = evf_sam.with_dtype(evf_sam.EvfSamConfig.from_dict(manifest.config), dtype)
        tokenizer = None
        if manifest.has_tokenizer:
            tokenizer = tokenizers.load_tokenizer(path, config.encoder.max_text_tokens)
            tokenizer.check_vocabulary(config.encoder.vocab_size)
        _check_parameters(path, config)

        def place(name: str, leaf: np.ndarray) -> jax.Array:
            return jax.device_put(
                leaf.astype(dtype if re.fullmatch(evf_sam.MATRICES, name) else "float32")
            )

        return cls(config, model_dir.load_params(path, place=place), tokenizer)

    def predict(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        texts: Sequence[str] | None = None,
        text_ids: Sequence[Sequence[int]] | None = None,
    ) -> Prediction:
        """Returns the masks of phrases in an image.

        Args:
          image: RGB, as `image_input.read_image` gives it.
          texts: k phrases; or else
          text_ids: k phrases as token ids, `<s>` and `</s>` included.

        Raises:
          UserError: not exactly one of `texts` and `text_ids`; no, an empty or too long a phrase;
            texts without a tokenizer; ids outside the vocabulary; an image without pixels.
        """
        ids = self.token_ids(texts, text_ids)
        encoded = self.encode(image)
        low_res_logits, iou = self.decode(encoded, ids)
        mask_logits = np.stack([self.upsample(encoded, logits) for logits in low_res_logits])
        return Prediction(mask_logits, mask_logits > 0, iou, low_res_logits)

    def token_ids(
        self, texts: Sequence[str] | None = None, text_ids: Sequence[Sequence[int]] | None = None
    ) -> list[list[int]]:
        """Returns checked token ids of each phrase; arguments and errors as for `predict`."""
        if (texts is None) == (text_ids is None):
            raise UserError("expected phrases either as texts or as token ids")
        if texts is not None:
            if self.tokenizer is None:
                raise UserError(
                    "the model directory has no tokenizer files: "
                    'expected token ids instead of text (--text_ids "0 5 2")'
                )
            text_ids = [self.tokenizer.encode(text) for text in texts]
        assert text_ids is not None
        if len(text_ids) == 0:
            raise UserError("expected at least one phrase, found none")
        for ids in text_ids:
            _check_ids(ids, self.config)
        return [list(map(int, ids)) for ids in text_ids]

    def encode(self, image: UInt8[np.ndarray, "h w 3"]) -> EncodedImage:
        """Computes what all phrases share; the slow part of a prediction."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise UserError(
                "expected an image of uint8 pixels [height, width, 3], "
                f"found {image.dtype} {list(image.shape)}"
            )
        sam_image, sam_size = image_input.sam_input(image, self.config.segmenter.image_size)
        encoder_image = image_input.encoder_input(image, self.config.encoder.image_size)
        size = jax.device_put(np.asarray([sam_size], np.int32))
        features = self._encode_image(
            {"segmenter": self.params["segmenter"]}, sam_image[None], size
        )
        return EncodedImage(
            features=features,
            encoder_image=jax.device_put(encoder_image[None]),
            sam_size=size,
            size=(image.shape[0], image.shape[1]),
        )

    def decode(
        self, encoded: EncodedImage, ids: Sequence[Sequence[int]]
    ) -> tuple[Float32[np.ndarray, "k l l"], Float32[np.ndarray, " k"]]:
        """Returns low-resolution logits and estimated IoU of k phrases, given as token ids."""
        logits, iou = [], []
        for start in range(0, len(ids), PHRASE_BUCKETS[-1]):
            chunk = ids[start : start + PHRASE_BUCKETS[-1]]
            prediction = self._decode_chunk(encoded, chunk)
            logits.append(np.asarray(prediction.low_res_logits)[0, : len(chunk), 0])
            iou.append(np.asarray(prediction.iou)[0, : len(chunk), 0])
        return np.concatenate(logits), np.concatenate(iou)

    def upsample(
        self, encoded: EncodedImage, low_res_logits: Float32[np.ndarray, "l l"]
    ) -> Float32[np.ndarray, "h w"]:
        """Returns one phrase's logits at the size of the image, computed tile by tile."""
        height, width = encoded.size
        size = np.asarray([encoded.size], np.int32)
        logits = jax.device_put(low_res_logits[None, None])
        result = np.empty((height, width), np.float32)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                origin = np.asarray([top, left], np.int32)
                tile = np.asarray(self._tile(logits, encoded.sam_size, size, origin))[0, 0]
                result[top : top + TILE, left : left + TILE] = tile[: height - top, : width - left]
        return result

    def _decode_chunk(self, encoded: EncodedImage, ids: Sequence[Sequence[int]]) -> MaskPrediction:
        """Decodes as many phrases as one bucket holds; the rest of the bucket repeats the first."""
        phrases = _bucket(len(ids), PHRASE_BUCKETS)
        tokens = min(
            _bucket(max(map(len, ids)), TOKEN_BUCKETS), self.config.encoder.max_text_tokens
        )
        padded = [*ids, *[ids[0]] * (phrases - len(ids))]
        text_ids, text_valid = tokenizers.pad_token_ids(padded, tokens)
        text = self._encode_phrases(
            {key: self.params[key] for key in ("encoder", "projector")},
            encoded.encoder_image,
            text_ids[None],
            text_valid[None],
        )
        return self._decode({"segmenter": self.params["segmenter"]}, encoded.features, text)


def _decode_text(
    config: evf_sam.EvfSamConfig,
    params: evf_sam.Params,
    features: ImageFeatures,
    text: Float[Array, "b k t c"],
) -> MaskPrediction:
    return evf_sam.decode(config, params, features, Prompts(text=text), multimask=False)


def _tile(
    frame: int,
    low_res_logits: Float[Array, "1 1 l l"],
    sam_size: Int[Array, "1 2"],
    size: Int[Array, "1 2"],
    origin: Int[Array, "2"],
) -> Float[Array, "1 1 h w"]:
    return mask_geometry.resample_masks(
        low_res_logits, sam_size, size, canvas=(TILE, TILE), frame=frame, origin=origin
    )


def _bucket(number: int, buckets: tuple[int, ...]) -> int:
    return next((bucket for bucket in buckets if number <= bucket), number)


def _check_parameters(path: str | os.PathLike, config: evf_sam.EvfSamConfig) -> None:
    """Raises UserError unless the directory's parameters are those of its config."""
    expected = {
        name: leaf.shape
        for name, leaf in model_dir.path_leaves(evf_sam.param_shapes(config)).items()
    }
    found = {name: leaf.shape for name, leaf in model_dir.describe(path).items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path}: parameter {name}: expected {_shape_words(expected.get(name))} by the "
                f"config, found {_shape_words(found.get(name))}"
            )


def _shape_words(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"shape {shape}"


def _check_ids(ids: Sequence[int], config: evf_sam.EvfSamConfig) -> None:
    longest, vocabulary = config.encoder.max_text_tokens, config.encoder.vocab_size
    if len(ids) == 0:
        raise UserError("expected token ids for each phrase, found a phrase without any")
    if len(ids) > longest:
        raise UserError(f"expected at most {longest} tokens a phrase, found {len(ids)}")
    outside = [i for i in ids if not 0 <= i < vocabulary]
    if outside:
        raise UserError(f"expected token ids from 0 to {vocabulary - 1}, found {outside[0]}")


# The command line.


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    flags.DEFINE_string("model", None, "The model directory.")
    flags.DEFINE_string("image", None, "The image file.")
    flags.DEFINE_multi_string("text", [], "A phrase; give it again for more phrases.")
    flags.DEFINE_multi_string(
        "text_ids", [], 'A phrase as token ids, "0 5 2"; for models without a tokenizer.'
    )
    flags.DEFINE_string("out", None, "The directory to make, for mask PNGs and an overlay PNG.")
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "float32: exact; bfloat16: half the memory."
    )


def main(argv: list[str]) -> None:
    """Checks the flags, predicts, and prints a line a phrase."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    for name in ("model", "image", "out"):
        if not options[name].value:
            raise UserError(f"--{name}: expected a path, found nothing")
    lines = predict_file(
        options.model, options.image, options.text, options.text_ids, options.out, options.dtype
    )
    print("\n".join(lines))
    print(f"written to {options.out}")


def predict_file(
    model: str | os.PathLike,
    image: str | os.PathLike,
    texts: Sequence[str],
    id_lines: Sequence[str],
    out: str | os.PathLike,
    dtype: str = "float32",
) -> list[str]:
    """Predicts phrases in an image file into a new directory; the directory is whole or not there.

    Args:
      model: a model directory.
      texts: phrases; or else
      id_lines: phrases as token ids, such as "0 5 2".
      out: the directory to make.

    Returns:
      A line of text for each phrase: its area, predicted IoU, colour and file.

    Raises:
      UserError: any of these cannot be used.
    """
    if bool(texts) == bool(id_lines):
        found = "both" if texts else "neither"
        raise UserError(f"expected phrases by --text or by --text_ids, found {found}")
    text_ids = [_parse_ids(line) for line in id_lines]
    try:
        with new_directory(out, name="--out") as directory:
            pixels = image_input.read_image(image)
            predictor = Predictor.load(model, dtype=dtype)
            ids = predictor.token_ids(texts or None, text_ids or None)
            return list(write_prediction(predictor, pixels, texts or id_lines, ids, directory))
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from None


def write_prediction(
    predictor: Predictor,
    image: UInt8[np.ndarray, "h w 3"],
    phrases: Sequence[str],
    ids: Sequence[Sequence[int]],
    directory: Path,
) -> Iterator[str]:
    """Writes a mask PNG (0 or 255) a phrase and `overlay.png`; yields a line of text a phrase.

    One mask at a time is held at the size of the image.
    """
    encoded = predictor.encode(image)
    low_res_logits, iou = predictor.decode(encoded, ids)
    digits = len(str(len(phrases) - 1))
    picture = image
    for number, phrase in enumerate(phrases):
        mask = predictor.upsample(encoded, low_res_logits[number]) > 0
        file = f"{number:0{digits}}_{_file_name(phrase)}.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(directory / file)
        names = list(visualize.COLORS)
        color = names[number % len(names)]
        picture = visualize.overlay(picture, mask, visualize.COLORS[color])
        area = int(mask.sum())
        # repr: a phrase may hold what a terminal would obey.
        yield (
            f"{phrase!r}: {area} pixels ({area / math.prod(encoded.size):.1%}), "
            f"predicted IoU {iou[number]:.3f}, {color}, {file}"
        )
    Image.fromarray(picture).save(directory / "overlay.png")


def _file_name(phrase: str) -> str:
    """Lower-case letters and digits of a phrase: safe on every disk, never empty."""
    words = re.findall(r"[a-z0-9]+", phrase.lower())
    return "_".join(words)[:40].rstrip("_") or "phrase"


def _parse_ids(line: str) -> list[int]:
    try:
        return [int(number) for number in line.split()]
    except ValueError:
        raise UserError(f'--text_ids: expected numbers such as "0 5 2", found {line!r}') from None


if __name__ == "__main__":
    define_flags()
    run_app(main)
