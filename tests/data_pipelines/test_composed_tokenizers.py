"""The tokenizers of CLIP and BERT: transformers' ids, and one sentence for what cannot be read."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.buckets import Buckets
from data_pipelines.source import Entry
from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from evf_sam_jax.errors import UserError
from tests.golden import make_composed_tokenizers

ROOT = Path(__file__).parents[2]
PARITY = json.loads((ROOT / "tests" / "golden" / "composed_tokenizers.json").read_text())
KINDS = list(PARITY["files"])
LONG = 10_000  # longer than any of the golden texts


def write_tokenizer(directory: Path, kind: str, **changes: str | None) -> Path:
    """The files of one kind; a change replaces a file's content, None leaves it out."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {name.replace(".", "_"): name for name in PARITY["files"][kind]}
    files = PARITY["files"][kind] | {names[key]: content for key, content in changes.items()}
    for name, content in files.items():
        if content is not None:
            (directory / name).write_text(content, encoding="utf-8")
    return directory


def load(directory: Path, kind: str, max_tokens: int | None = None, **changes) -> Tokenizer:
    return load_tokenizer(write_tokenizer(directory, kind, **changes), max_tokens)


def assert_ids(tokenizer: Tokenizer, texts: list[str], ids: list[list[int]]) -> None:
    for text, expected in zip(texts, ids, strict=True):
        if len(expected) == 2:
            with pytest.raises(UserError, match="is empty: expected words"):
                tokenizer.encode(text)
        else:
            assert tokenizer.encode(text) == expected, text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    assert_ids(load(tmp_path, kind, LONG), PARITY["texts"], PARITY["ids"][kind])


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_the_installed_transformers(tmp_path: Path, kind: str) -> None:
    texts = make_composed_tokenizers.tricky_texts(400)
    ids = make_composed_tokenizers.original_ids(kind.split("_")[0], PARITY["files"][kind], texts)
    assert_ids(load(tmp_path, kind, LONG), texts, ids)


def test_the_golden_texts_tell_case_accents_and_kinds_apart() -> None:
    ids = PARITY["ids"]
    index = PARITY["texts"].index("der größte Hund rechts")
    assert len({tuple(ids[kind][index]) for kind in KINDS}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_begin_and_end_surround_the_words(tmp_path: Path, kind: str) -> None:
    tokenizer = load(tmp_path, kind)
    one, two = tokenizer.encode("left"), tokenizer.encode("left left")
    assert (one[0], one[-1]) == (two[0], two[-1])
    assert two[1:-1] == 2 * one[1:-1]


def test_the_place_is_the_directory_or_its_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model" / "tokenizer", "clip")
    expected = load(tmp_path / "beside", "clip").encode("zebra top left")
    assert load_tokenizer(tmp_path / "model").encode("zebra top left") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_survives_the_way_to_a_worker(tmp_path: Path, kind: str) -> None:
    tokenizer = load(tmp_path, kind, LONG)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("Zebra, left") == tokenizer.encode("Zebra, left")
    assert (copy.vocab_size, copy.max_tokens) == (tokenizer.vocab_size, LONG)
    short = pickle.loads(pickle.dumps(load_tokenizer(tmp_path, 4, truncates=True)))
    assert len(short.encode("left left left left left")) == 4


@pytest.mark.parametrize("kind, positions", [("clip", 77), ("bert", 40)])
def test_a_phrase_past_the_positions(tmp_path: Path, kind: str, positions: int) -> None:
    write_tokenizer(tmp_path, kind)
    whole = load_tokenizer(tmp_path, LONG)
    for truncates in (None, True, False):
        tokenizer = load_tokenizer(tmp_path, truncates=truncates)
        assert tokenizer.max_tokens == positions
        phrase = "left " * (positions - 2)
        assert tokenizer.encode(phrase) == whole.encode(phrase)
        longer = phrase + "zebra"
        message = f"tokens, expected at most {positions}"
        if truncates is False:
            with pytest.raises(UserError, match=message):
                tokenizer.encode(longer)
        else:
            ids = whole.encode(longer)
            assert tokenizer.encode(longer) == [*ids[: positions - 1], ids[-1]]
            assert Buckets((positions,)).fits(Entry(9, 9, (longer,)), tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["red \ud800", "\udc00"])
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, kind: str, text: str) -> None:
    with pytest.raises(UserError, match="is no Unicode text"):
        load(tmp_path, kind).encode(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_an_empty_phrase(tmp_path: Path, kind: str, text: str) -> None:
    with pytest.raises(UserError, match="the phrase .* is empty: expected words"):
        load(tmp_path, kind).encode(text)


@pytest.mark.parametrize("kind, size", [("clip", 768), ("bert", 300)])
def test_vocabulary_must_fit_the_embedding(tmp_path: Path, kind: str, size: int) -> None:
    tokenizer = load(tmp_path, kind)
    tokenizer.check_vocabulary(size)
    with pytest.raises(UserError, match=f"ids up to {size - 1}, .* only {size - 1} rows"):
        tokenizer.check_vocabulary(size - 1)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_lines_may_end_as_on_windows(tmp_path: Path, line_end: str) -> None:
    expected = PARITY["ids"]["bert"][0]
    files = PARITY["files"]["bert"]
    tokenizer = load(tmp_path, "bert", vocab_txt=files["vocab.txt"].replace("\n", line_end))
    assert tokenizer.encode(PARITY["texts"][0]) == expected


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("clip", {"vocab_json": "{"}, "vocab.json: expected JSON, found something else"),
        ("clip", {"vocab_json": "[]"}, "vocab.json: expected a JSON object, found list"),
        ("clip", {"vocab_json": '{"a": 0}'}, r"vocab.json: expected pieces .*, found no <|start"),
        ("clip", {"vocab_json": '{"<|startoftext|>": 0, "<|endoftext|>": "1"}'}, "the id '1'"),
        ("clip", {"merges_txt": "a b c\n"}, "merges.txt: expected two pieces a line"),
        ("clip", {"merges_txt": "zz qq\n"}, "expected vocab.json and merges.txt of one tokenizer"),
        ("clip", {"merges_txt": None}, "no tokenizer: expected .* or vocab.json and merges.txt"),
        ("bert", {"vocab_txt": "a\nb\n"}, r"vocab.txt: expected pieces .*, found no \[PAD\]"),
        ("bert_cased", {"tokenizer_config_json": "{"}, "tokenizer_config.json: expected JSON"),
        (
            "bert_cased",
            {"tokenizer_config_json": '{"do_lower_case": "no"}'},
            "expected true or false for do_lower_case, found 'no'",
        ),
    ],
)
def test_broken_files(tmp_path: Path, kind: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, kind, **changes)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "bert")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe[PAD]")
    with pytest.raises(UserError, match="expected vocab.txt of one tokenizer, found otherwise"):
        load_tokenizer(tmp_path)


def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "clip")
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"  # importing it would fail
        "from data_pipelines.tokenizers import load_tokenizer\n"
        f"load_tokenizer({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "pip install 'evf-sam-jax[hf]'" in done.stderr.splitlines()[-1]
