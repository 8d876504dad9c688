"""Pickles of plain values are read; whatever would run code, or is no whole pickle, is refused."""

import collections
import pickle
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.restricted_pickle import load_plain_pickle
from evf_sam_jax.errors import UserError
from tests.data_pipelines.refer_files import REFS, python_2_pickle

PLAIN = [{"a": 1, "b": [2.5, None, True], "c": "caf\xe9 \u4e2d"}, -(2**40)]


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_of_every_protocol_come_back(tmp_path: Path, protocol: int):
    path = written(tmp_path, pickle.dumps(PLAIN, protocol))
    assert load_plain_pickle(path) == PLAIN


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"S'caf\\xe9'\n.", "caf\xe9"),  # str of protocol 0
        (b"\x80\x02U\x04caf\xe9q\x00.", "caf\xe9"),  # str of protocol 2
        (b"Vcaf\\u00e9\np0\n.", "caf\xe9"),  # unicode of protocol 0
        (b"\x80\x02X\x05\x00\x00\x00caf\xc3\xa9q\x00.", "caf\xe9"),  # unicode of protocol 2
        (b"L5L\n.", 5),  # long
        (python_2_pickle(REFS), REFS),
    ],
)
def test_what_python_2_writes_is_read(tmp_path: Path, content: bytes, expected: Any):
    assert load_plain_pickle(written(tmp_path, content)) == expected


def test_a_function_is_named_and_not_run(tmp_path: Path):
    marker = tmp_path / "ran"
    command = f"cos\nsystem\n(S'touch {marker}'\ntR."
    with pytest.raises(UserError) as caught:
        load_plain_pickle(written(tmp_path, command.encode()))
    assert str(caught.value) == (
        f"{tmp_path}/refs.p: expected a pickle of plain lists, dicts, strings and numbers, found "
        "a reference to os.system: it was not run"
    )
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_even_harmless_classes_are_refused(tmp_path: Path, protocol: int):
    path = written(tmp_path, pickle.dumps(collections.OrderedDict(a=1), protocol))
    with pytest.raises(UserError, match="a reference to collections.OrderedDict: it was not run"):
        load_plain_pickle(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b'[{"ref_id": 1}]',
        pickle.dumps(REFS, 2)[:200],
        python_2_pickle(REFS)[:-1],
        b"P1\n.",  # refers to an object outside the pickle
        b"\x82\x01.",  # refers to a class by a registered number
    ],
)
def test_what_is_no_whole_pickle_is_named(tmp_path: Path, content: bytes):
    with pytest.raises(UserError, match="refs.p: expected a whole pickle, found a broken one"):
        load_plain_pickle(written(tmp_path, content))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere.p: expected a readable file, found: No such"):
        load_plain_pickle(tmp_path / "nowhere.p")
