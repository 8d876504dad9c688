"""Tokens: the ids of transformers' slow tokenizer, one sentence for what cannot be tokenised."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import Tokenizer, load_tokenizer, pad_token_ids
from evf_sam_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
PARITY = json.loads((GOLDEN / "tokenizer_parity.json").read_text())


def write_tokenizer(directory: Path, files: str = "plain", model: str = "sentencepiece.bpe.model"):
    """The small model of the golden file, with the files that go with one of its cases."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / model).write_bytes((GOLDEN / "tokenizer_parity.model").read_bytes())
    for name, content in PARITY["files"][files].items():
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path, "added"))


@pytest.mark.parametrize("files", ["plain", "added", "decoder"])
def test_ids_equal_those_of_transformers(tmp_path: Path, files: str):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, files))
    empty = 0
    for text, ids in zip(PARITY["texts"], PARITY["ids"][files], strict=True):
        if ids == [0, 2]:
            empty += 1
            with pytest.raises(UserError, match="is empty"):
                tokenizer.encode(text)
        else:
            assert tokenizer.encode(text) == ids, text
    assert empty < 10


def test_semantic_is_one_token_and_eats_the_space_after_it(tokenizer: Tokenizer):
    semantic = PARITY["files"]["added"]["added_tokens.json"]["[semantic]"]
    hair = tokenizer.encode("hair")
    assert tokenizer.encode("[semantic] hair") == [0, semantic, *hair[1:]]
    assert tokenizer.encode("[semantic]hair") == [0, semantic, *hair[1:]]


def test_without_the_added_token_semantic_is_text(tmp_path: Path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, "plain"))
    assert len(tokenizer.encode("[semantic] hair")) > len(tokenizer.encode("hair")) + 1


@pytest.mark.parametrize(
    "place, model",
    [
        (".", "sentencepiece.bpe.model"),
        (".", "beit3.spm"),
        ("tokenizer", "sentencepiece.bpe.model"),
        ("tokenizer", "beit3.spm"),
    ],
)
def test_places_and_names_of_the_model(tmp_path: Path, place: str, model: str):
    write_tokenizer(tmp_path / place, "added", model)
    tokenizer = load_tokenizer(tmp_path)
    index = PARITY["texts"].index("zebra top left")
    assert tokenizer.encode("zebra top left") == PARITY["ids"]["added"][index]


def test_a_tokenizer_survives_the_way_to_a_worker(tokenizer: Tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("[semantic] zebra") == tokenizer.encode("[semantic] zebra")


@pytest.mark.parametrize("text", ["red \ud800", "\udc00", "[semantic] a\udfffb"])
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer, text: str):
    with pytest.raises(UserError, match="is no Unicode text: expected words, found half a char"):
        tokenizer.encode(text)


def test_padding_goes_to_the_right():
    ids, valid = pad_token_ids([[0, 7, 2], [0, 2]], 4)
    np.testing.assert_array_equal(ids, np.array([[0, 7, 2, 1], [0, 2, 1, 1]], np.int32))
    np.testing.assert_array_equal(valid, [[True, True, True, False], [True, True, False, False]])
    assert ids.dtype == np.int32


def test_padding_refuses_what_does_not_fit():
    with pytest.raises(UserError, match="a phrase has 3 tokens, expected at most 2"):
        pad_token_ids([[0, 7, 2]], 2)


def test_vocabulary_must_fit_the_embedding(tokenizer: Tokenizer):
    tokenizer.check_vocabulary(tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"has only {tokenizer.vocab_size - 1} rows"):
        tokenizer.check_vocabulary(tokenizer.vocab_size - 1)


def test_vocabulary_counts_mask_and_added_tokens(tmp_path: Path):
    plain = load_tokenizer(write_tokenizer(tmp_path / "plain", "plain"))
    added = load_tokenizer(write_tokenizer(tmp_path / "added", "added"))
    assert plain.encode("<mask>")[1] == plain.vocab_size - 1
    assert added.encode("[semantic]")[1] == added.vocab_size - 1 == plain.vocab_size


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u200b"])
def test_an_empty_phrase(tokenizer: Tokenizer, text: str):
    with pytest.raises(UserError, match="the phrase .* is empty: expected words"):
        tokenizer.encode(text)


def test_a_phrase_past_the_positions(tokenizer: Tokenizer):
    assert len(tokenizer.encode("zebra " * 1020)) == 1022
    with pytest.raises(UserError, match="has 1023 tokens, expected at most 1022"):
        tokenizer.encode("zebra " * 1021)


def test_the_limit_follows_the_model(tmp_path: Path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path), max_tokens=4)
    assert len(tokenizer.encode("zebra zebra")) == 4
    with pytest.raises(UserError, match="expected at most 4"):
        tokenizer.encode("zebra zebra zebra")
    whole = load_tokenizer(tmp_path).encode("zebra zebra zebra")
    cut = load_tokenizer(tmp_path, max_tokens=4, truncates=True)
    for tokenizer in (cut, pickle.loads(pickle.dumps(cut))):
        assert tokenizer.encode("zebra zebra zebra") == [*whole[:3], whole[-1]]


def test_no_tokenizer(tmp_path: Path):
    with pytest.raises(UserError, match="no tokenizer: expected sentencepiece.bpe.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


def test_two_models(tmp_path: Path):
    write_tokenizer(tmp_path, model="a.spm")
    write_tokenizer(tmp_path, model="b.spm")
    with pytest.raises(UserError, match="expected one SentencePiece model, found a.spm, b.spm"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["nothing", "text", "half"])
def test_a_broken_model(tmp_path: Path, content: str):
    path = write_tokenizer(tmp_path) / "sentencepiece.bpe.model"
    whole = path.read_bytes()
    path.write_bytes({"nothing": b"", "text": b"<html>", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(UserError, match="expected a SentencePiece model, found something else"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("added_tokens.json", "{", "added_tokens.json: expected JSON"),
        ("added_tokens.json", "[]", "added_tokens.json: expected a JSON object"),
        ("added_tokens.json", '{"[semantic]": "x"}', "expected an id for '\\[semantic\\]'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [7]}', "added_tokens_decoder"),
    ],
)
def test_broken_companions(tmp_path: Path, name: str, content: str, message: str):
    (write_tokenizer(tmp_path) / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_the_shapes_speak_through_the_same_code():
    tokenizer = load_tokenizer(SHAPES_TOKENIZER)
    ids = tokenizer.encode("the small red circle left of the blue square")
    assert len(ids) == 9 + 2
    assert 3 not in ids
