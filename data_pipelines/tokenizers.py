"""From a phrase to token ids, as the multimodal encoders were trained: BEiT-3, CLIP, BERT (ViLT).

BEiT-3's is SentencePiece with XLM-RoBERTa's id layout, which is fairseq's: `<s>` 0, `<pad>` 1,
`</s>` 2, `<unk>` 3, then piece k >= 3 of the SentencePiece model at k + 1, `<mask>` after the last
piece, and added tokens (`[semantic]` = 64002) where `added_tokens.json` puts them. Ported from
hustvl/EVF-SAM inference.py:87-91,181 at 9935dc5 (`AutoTokenizer` with `use_fast=False`), that is
`XLMRobertaTokenizer` of transformers 4.57.

CLIP's joins bytes in pairs, BERT's is WordPiece. Both are put together from the library
`tokenizers`, as `CLIPTokenizer` and `BertTokenizer` of transformers 5.24 are.

A literal special token in a phrase (`"<mask> dog"`) becomes its id, as there: a checkpoint sees
what it saw in training. Spelling it out would guard nothing, since no id of these vocabularies is
an instruction.

CLIP has positions for 77 tokens and ViLT for 40, which phrases of data sets exceed: training and
evaluation read the first ones, between begin and end, as transformers does with `truncation=True`.
Prediction refuses such a phrase, and so does whatever reads with BEiT-3's 1022.

Differences: an empty phrase and a phrase past the model's positions are refused, which transformers
passes on; so is half a surrogate pair. OpenAI's own CLIP tokenizer also repairs wrongly decoded
text and HTML entities; transformers' does not, nor does this.
"""

import abc
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int32

from evf_sam_jax.errors import UserError

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
FAIRSEQ_OFFSET = 1  # fairseq's vocabulary has `<pad>` where SentencePiece has none

CLIP_FILES, BERT_FILES = ("vocab.json", "merges.txt"), ("vocab.txt",)
# Each kind of tokenizer by the files that it is made of, as patterns of their names.
KINDS = (("sentencepiece.bpe.model",), ("*.spm",), CLIP_FILES, BERT_FILES)
CONFIG = "tokenizer_config.json"

CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# openai/CLIP at dcba3cb, `simple_tokenizer.py`: what is never joined with its neighbours.
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
BERT_BEGIN, BERT_END, BERT_UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
BERT_SPECIAL = ("[PAD]", BERT_UNKNOWN, BERT_BEGIN, BERT_END, "[MASK]")


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
      truncates: whether of a longer phrase the first tokens are taken; otherwise it is refused.
    """

    vocab_size: int
    max_tokens: int
    truncates: bool
    _begin: int
    _end: int

    def encode(self, text: str) -> list[int]:
        """The ids of one phrase, begin and end included.

        Raises:
          UserError: the phrase is empty, no Unicode text, or longer than the model has positions
            for and not truncated.
        """
        if not is_unicode(text):
            raise UserError(
                f"the phrase {text[:40]!r} is no Unicode text: expected words, "
                "found half a character"
            )
        words = self._encode_words(text)
        if not words:
            raise UserError(
                f"the phrase {text!r} is empty: expected words that name something in the image"
            )
        if self.truncates:
            words = words[: self.max_tokens - 2]
        ids = [self._begin, *words, self._end]
        if len(ids) > self.max_tokens:
            raise UserError(
                f"the phrase {text[:40]!r}... has {len(ids)} tokens, "
                f"expected at most {self.max_tokens}"
            )
        return ids

    @abc.abstractmethod
    def _encode_words(self, text: str) -> list[int]:
        """The ids between begin and end."""

    def check_vocabulary(self, rows: int) -> None:
        """Refuses a tokenizer whose ids do not fit a text embedding of `rows` rows."""
        if self.vocab_size > rows:
            raise UserError(
                f"the tokenizer gives ids up to {self.vocab_size - 1}, "
                f"but the model's text embedding has only {rows} rows: they do not belong together"
            )


class SentencePieceTokenizer(Tokenizer):
    """BEiT-3's: SentencePiece in XLM-RoBERTa's id layout."""

    _begin, _end = BOS_ID, EOS_ID

    def __init__(
        self,
        model: bytes,
        added: Mapping[str, AddedToken],
        max_tokens: int,
        truncates: bool = False,
    ):
        self._model = model
        self._added = dict(added)
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(model)  # the constructor takes an empty model silently
        self.max_tokens, self.truncates = max_tokens, truncates
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
        values = (self._model, self._added, self.max_tokens, self.truncates)
        return SentencePieceTokenizer, values

    def _encode_words(self, text: str) -> list[int]:
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


class _ComposedTokenizer(Tokenizer):
    """One that is put together from the library `tokenizers`.

    Attributes:
      files: the content of the tokenizer's files by their names.
    """

    def __init__(self, files: Mapping[str, str], max_tokens: int, truncates: bool = False):
        self.files = dict(files)
        self.max_tokens, self.truncates = max_tokens, truncates
        self._composed, begin, end = self._compose(_library())
        vocabulary = self._composed.get_vocab()
        self.vocab_size = 1 + max(vocabulary.values())
        self._begin, self._end = vocabulary[begin], vocabulary[end]

    def __reduce__(self):
        return type(self), (self.files, self.max_tokens, self.truncates)

    @abc.abstractmethod
    def _compose(self, library: ModuleType) -> tuple[Any, str, str]:
        """The library's tokenizer, and the pieces that begin and end a phrase."""

    def _encode_words(self, text: str) -> list[int]:
        return self._composed.encode(text, add_special_tokens=False).ids


class ClipTokenizer(_ComposedTokenizer):
    """CLIP's, of OpenAI and OpenCLIP alike: lower case, pairs of bytes joined within words."""

    def _compose(self, library: ModuleType) -> tuple[Any, str, str]:
        vocabulary = _json_object(self.files["vocab.json"], "vocab.json")
        _require(vocabulary, (CLIP_BEGIN, CLIP_END), "vocab.json")
        lines = self.files["merges.txt"].splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError("merges.txt: expected two pieces a line, found another number")
        normalizers, split = library.normalizers, library.pre_tokenizers
        composed = library.Tokenizer(
            library.models.BPE(
                vocab=vocabulary, merges=pairs, end_of_word_suffix="</w>", unk_token=CLIP_END
            )
        )
        spaces = normalizers.Replace(library.Regex(r"\s+"), " ")
        composed.normalizer = normalizers.Sequence(
            [normalizers.NFC(), spaces, normalizers.Lowercase()]
        )
        words = split.Split(library.Regex(_CLIP_WORDS), behavior="removed", invert=True)
        composed.pre_tokenizer = split.Sequence([words, split.ByteLevel(add_prefix_space=False)])
        composed.add_special_tokens([CLIP_BEGIN, CLIP_END])
        return composed, CLIP_BEGIN, CLIP_END


class BertTokenizer(_ComposedTokenizer):
    """BERT's, as ViLT uses it; lower case without accents where its config says nothing else."""

    def _compose(self, library: ModuleType) -> tuple[Any, str, str]:
        pieces = self.files["vocab.txt"].split("\n")
        vocabulary = {piece.rstrip("\r"): index for index, piece in enumerate(pieces) if piece}
        _require(vocabulary, BERT_SPECIAL, "vocab.txt")
        options = _json_object(self.files.get(CONFIG, "{}"), CONFIG)
        composed = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=BERT_UNKNOWN))
        composed.normalizer = library.normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=_option(options, "tokenize_chinese_chars", True),
            strip_accents=_option(options, "strip_accents", None),  # None: as lower case
            lowercase=_option(options, "do_lower_case", True),
        )
        composed.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        composed.add_special_tokens(list(BERT_SPECIAL))
        return composed, BERT_BEGIN, BERT_END


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "the tokenizers of CLIP and ViLT are made with the package tokenizers, "
            "found none: pip install 'evf-sam-jax[hf]'"
        ) from None
    return tokenizers


def _require(vocabulary: Mapping[str, Any], pieces: tuple[str, ...], name: str) -> None:
    missing = [f"no {piece}" for piece in pieces if piece not in vocabulary]
    strange = [f"the id {one!r}" for one in vocabulary.values() if not isinstance(one, int)]
    if missing or strange:
        raise UserError(
            f"{name}: expected pieces with their ids, {' and '.join(pieces)} among them, "
            f"found {(missing + strange)[0]}"
        )


def _option(options: Mapping[str, Any], name: str, default: bool | None) -> bool | None:
    value = options.get(name, default)
    if not isinstance(value, bool | None):
        raise UserError(f"{CONFIG}: expected true or false for {name}, found {value!r}")
    return value


def is_unicode(text: str) -> bool:
    """False if a surrogate is left of a pair, which JSON's "\\ud800" can say and no text can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_tokenizer(directory: str | os.PathLike) -> bool:
    """Whether all files of one kind of tokenizer are there."""
    return _kind(pathlib.Path(directory)) is not None


def load_tokenizer(
    directory: str | os.PathLike, max_tokens: int | None = None, truncates: bool | None = None
) -> Tokenizer:
    """Reads the tokenizer files of `directory`, or of its subdirectory `tokenizer`.

    Args:
      directory: holds the files of one of `KINDS`, and perhaps `added_tokens.json` (SentencePiece)
        and `tokenizer_config.json`.
      max_tokens: what the model has positions for; None: as the released BEiT-3 has, whose 1024
        begin at the third (torchscale 0.2.0, `component/embedding.py`), CLIP 77 and ViLT 40.
      truncates: whether of a longer phrase the first tokens are taken, or it is refused; None: CLIP
        and BERT take them, SentencePiece refuses it.

    Raises:
      UserError: no tokenizer there, or a file that cannot be read as one; for CLIP and BERT also,
        the package `tokenizers` is not installed.
    """
    for place in (pathlib.Path(directory), pathlib.Path(directory) / "tokenizer"):
        patterns = _kind(place)
        if patterns == CLIP_FILES:
            return _load_composed(
                ClipTokenizer, place, CLIP_FILES, max_tokens or 77, truncates is not False
            )
        if patterns == BERT_FILES:
            return _load_composed(
                BertTokenizer, place, BERT_FILES, max_tokens or 40, truncates is not False
            )
        if patterns is not None:
            return _load_sentencepiece(place, patterns[0], max_tokens or 1022, bool(truncates))
    raise UserError(
        f"{directory}: no tokenizer: expected {tokenizer_files()} there or in its subdirectory "
        "tokenizer"
    )


def _kind(directory: pathlib.Path) -> tuple[str, ...] | None:
    """The first of `KINDS` whose files are all there."""
    for patterns in KINDS:
        if all(any(directory.glob(pattern)) for pattern in patterns):
            return patterns
    return None


def tokenizer_files() -> str:
    """The files of each kind, in words."""
    return " or ".join(" and ".join(patterns) for patterns in KINDS)


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


def _load_sentencepiece(
    directory: pathlib.Path, pattern: str, max_tokens: int, truncates: bool
) -> SentencePieceTokenizer:
    found = sorted(directory.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{directory}: expected one SentencePiece model, found {names}")
    added = read_added_tokens(directory)
    try:
        return SentencePieceTokenizer(found[0].read_bytes(), added, max_tokens, truncates)
    except (RuntimeError, OSError) as error:  # SentencePiece raises RuntimeError
        raise UserError(
            f"{found[0]}: expected a SentencePiece model, found something else"
        ) from error


def _load_composed(
    tokenizer: type[_ComposedTokenizer],
    directory: pathlib.Path,
    names: tuple[str, ...],
    max_tokens: int,
    truncates: bool,
) -> Tokenizer:
    present = [name for name in (*names, CONFIG) if (directory / name).exists()]
    try:
        files = {name: (directory / name).read_text(encoding="utf-8") for name in present}
        return tokenizer(files, max_tokens, truncates)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    except Exception as error:  # the library raises no other type
        raise UserError(
            f"{directory}: expected {' and '.join(names)} of one tokenizer, found otherwise "
            f"({error})"
        ) from error


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


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return _json_object(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: expected JSON, found something else ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected a JSON object, found {type(content).__name__}")
    return content
