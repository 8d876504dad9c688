"""Arguments of config files are typed, and whatever is not known is refused."""

import pytest

from configs.arguments import parse_arguments

EXPECTED = {"fusion": ("early", "late"), "steps": 10, "rate": 0.5, "name": "", "fast": False}


def test_defaults():
    defaults = {"fusion": "early", "steps": 10, "rate": 0.5, "name": "", "fast": False}
    assert parse_arguments(None, **EXPECTED) == parse_arguments("", **EXPECTED) == defaults


def test_values_have_the_type_of_their_default():
    values = parse_arguments("fusion=late,steps=3,rate=1,name=a/b,fast=true", **EXPECTED)
    assert values == {"fusion": "late", "steps": 3, "rate": 1.0, "name": "a/b", "fast": True}
    assert isinstance(values["rate"], float)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("fuson=late", "unknown config argument 'fuson', expected one of: fusion, steps"),
        ("fusion=mid", "'fusion': expected early or late, found 'mid'"),
        ("steps=few", "'steps': expected a value like 10, found 'few'"),
        ("fast=1", "'fast': expected true or false, found '1'"),
        ("steps=1,steps=2", "'steps' is given twice"),
    ],
)
def test_wrong_arguments_are_named(argument: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_arguments(argument, **EXPECTED)
