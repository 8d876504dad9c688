"""From a phrase to token ids: SentencePiece with XLM-RoBERTa's id layout, as BEiT-3 was trained.

The layout is fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then piece k >= 3 of the
SentencePiece model at k + 1, `<mask>` after the last piece, and added tokens (`[semantic]` = 64002)
where `added_tokens.json` puts them.

Ported from hustvl/EVF-SAM inference.py:87-91,181 at 9935dc5 (`AutoTokenizer` with
`use_fast=False`), that is `XLMRobertaTokenizer` of transformers 4.57.

A literal special token in a phrase (`"<mask> dog"`) becomes its id, as there: a checkpoint sees
what it saw in training. Spelling it out would guard nothing, since no id of this vocabulary is an
instruction.

Differences: an empty phrase and a phrase past the model's positions are refused, which transformers
passes on; so is half a surrogate pair.
"""

import abc
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int32

from evf_sam_jax.errors import UserError

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
FAIRSEQ_OFFSET = 1  # fairseq's vocabulary has `<pad>` where SentencePiece has none

MODEL_FILES = ("sentencepiece.bpe.model", "*.spm")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before SentencePiece sees it."""

    id: int
    strip_left: bool = False  # eats the white space before it
    strip_right: bool = False  # eats the white space after it


class Tokenizer(abc.ABC):
    """Phrases to ids; holds no state besides the vocabulary, pickles for worker processes.

    Attributes:
      vocab_size: one more than the largest id that `encode` can give.
      max_tokens: the longest sequence, begin and end included, that the model has positions for.
    """

    vocab_size: int
    max_tokens: int

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of one phrase, begin and end included.

        Raises:
          UserError: the phrase is empty, no Unicode text, or longer than the model has positions
            for.
        """

    def check_vocabulary(self, rows: int) -> None:
        """Refuses a tokenizer whose ids do not fit a text embedding of `rows` rows."""
        if self.vocab_size > rows:
            raise UserError(
                f"the tokenizer gives ids up to {self.vocab_size - 1}, "
                f"but the model's text embedding has only {rows} rows: they do not belong together"
            )


class SentencePieceTokenizer(Tokenizer):
    """BEiT-3's: SentencePiece in XLM-RoBERTa's id layout."""

    def __init__(self, model: bytes, added: Mapping[str, AddedToken], max_tokens: int):
        self._model = model
        self._added = dict(added)
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(model)  # the constructor takes an empty model silently
        self.max_tokens = max_tokens
        mask_id = self._pieces.get_piece_size() + FAIRSEQ_OFFSET
        literals = {
            "<s>": AddedToken(BOS_ID),
            "<pad>": AddedToken(PAD_ID),
            "</s>": AddedToken(EOS_ID),
            "<unk>": AddedToken(UNK_ID),
            "<mask>": AddedToken(mask_id, strip_left=True),
        }
        self._special = literals | self._added
        self.vocab_size = 1 + max(token.id for token in self._special.values())
        # Longest first: of two added tokens that begin alike the longer one is meant.
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __reduce__(self):
        return SentencePieceTokenizer, (self._model, self._added, self.max_tokens)

    def encode(self, text: str) -> list[int]:
        if not is_unicode(text):
            raise UserError(
                f"the phrase {text[:40]!r} is no Unicode text: expected words, "
                "found half a character"
            )
        ids = [BOS_ID, *self._encode_text(text), EOS_ID]
        if len(ids) == 2:
            raise UserError(
                f"the phrase {text!r} is empty: expected words that name something in the image"
            )
        if len(ids) > self.max_tokens:
            raise UserError(
                f"the phrase {text[:40]!r}... has {len(ids)} tokens, "
                f"expected at most {self.max_tokens}"
            )
        return ids

    def _encode_text(self, text: str) -> list[int]:
        parts = self._split.split(text)
        for i in range(1, len(parts), 2):  # odd parts are the special tokens
            token = self._special[parts[i]]
            if token.strip_left:
                parts[i - 1] = parts[i - 1].rstrip()
            if token.strip_right:
                parts[i + 1] = parts[i + 1].lstrip()
        ids = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._special[part].id)
            elif part:
                ids += [p + FAIRSEQ_OFFSET if p else UNK_ID for p in self._pieces.encode(part)]
        return ids


def is_unicode(text: str) -> bool:
    """False if a surrogate is left of a pair, which JSON's "\\ud800" can say and no text can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_tokenizer(directory: str | os.PathLike, max_tokens: int = 1022) -> Tokenizer:
    """Reads the tokenizer files of `directory`, or of its subdirectory `tokenizer`.

    Args:
      directory: holds `sentencepiece.bpe.model` or one `.spm`, and perhaps `added_tokens.json` and
        `tokenizer_config.json`.
      max_tokens: positions of the model less two: BEiT-3 has 1024 and begins at the third
        (torchscale 0.2.0, `component/embedding.py`, `PositionalEmbedding`).

    Raises:
      UserError: no tokenizer there, or a file that cannot be read as one.
    """
    path = _find_model(pathlib.Path(directory))
    added = read_added_tokens(path.parent)
    try:
        return SentencePieceTokenizer(path.read_bytes(), added, max_tokens)
    except (RuntimeError, OSError) as error:  # SentencePiece raises RuntimeError
        raise UserError(f"{path}: expected a SentencePiece model, found something else") from error


def pad_token_ids(
    ids: Sequence[Sequence[int]], length: int
) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, "n l"]]:
    """Pads on the right with `<pad>`; the second array is true at tokens.

    Raises:
      UserError: a sequence is longer than `length`.
    """
    padded = np.full((len(ids), length), PAD_ID, np.int32)
    valid = np.zeros((len(ids), length), bool)
    for row, sequence in enumerate(ids):
        if len(sequence) > length:
            raise UserError(f"a phrase has {len(sequence)} tokens, expected at most {length}")
        padded[row, : len(sequence)] = sequence
        valid[row, : len(sequence)] = True
    return padded, valid


def _find_model(directory: pathlib.Path) -> pathlib.Path:
    for place in (directory, directory / "tokenizer"):
        for pattern in MODEL_FILES:
            found = sorted(place.glob(pattern))
            if len(found) > 1:
                names = ", ".join(path.name for path in found)
                raise UserError(f"{place}: expected one SentencePiece model, found {names}")
            if found:
                return found[0]
    raise UserError(
        f"{directory}: no tokenizer: expected sentencepiece.bpe.model or one .spm file "
        "there or in its subdirectory tokenizer"
    )


def read_added_tokens(directory: pathlib.Path) -> dict[str, AddedToken]:
    """`added_tokens.json` ({text: id}), refined by the `added_tokens_decoder` of the config."""
    path = directory / "added_tokens.json"
    added = {}
    for text, index in _read_json(path).items():
        if not isinstance(index, int):
            raise UserError(f"{path}: expected an id for {text!r}, found {index!r}")
        added[text] = AddedToken(index)
    path = directory / "tokenizer_config.json"
    try:
        for index, entry in _read_json(path).get("added_tokens_decoder", {}).items():
            added[entry["content"]] = AddedToken(int(index), entry["lstrip"], entry["rstrip"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its added_tokens_decoder cannot be read ({error!r})") from error
    return added


def _read_json(path: pathlib.Path) -> dict:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
