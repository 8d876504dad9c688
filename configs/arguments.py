"""Arguments of a config file, as in `--config configs/shapes.py:fusion=late`, checked and typed."""

from typing import Any

_BOOLEANS = {"true": True, "false": False}


def parse_arguments(text: str | None, **expected: Any) -> dict[str, Any]:
    """Returns each argument's value: the given one, or the default.

    Args:
      text: what follows the config file's name: "fusion=late,steps=100".
      **expected: each argument's default, which gives its type; or a tuple of all choices, the
        default first.

    Raises:
      ValueError: an argument is unknown or given twice, or its value is not of that type or choice.
        (absl reports it as a wrong flag.)
    """
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in expected.items()}
    given = set()
    for argument in filter(None, (text or "").split(",")):
        name, _, value = argument.partition("=")
        if name not in expected:
            known = ", ".join(expected) or "none"
            raise ValueError(f"unknown config argument {name!r}, expected one of: {known}")
        if name in given:
            raise ValueError(f"config argument {name!r} is given twice")
        given.add(name)
        values[name] = _parse(name, value, expected[name])
    return values


def _parse(name: str, value: str, expected: Any) -> Any:
    if isinstance(expected, tuple):
        by_text = {str(choice): choice for choice in expected}
        wanted = " or ".join(by_text)
    elif isinstance(expected, bool):
        by_text = _BOOLEANS
        wanted = "true or false"
    else:
        try:
            return type(expected)(value)
        except ValueError:
            by_text, wanted = {}, f"a value like {expected!r}"
    if value not in by_text:
        raise ValueError(f"config argument {name!r}: expected {wanted}, found {value!r}")
    return by_text[value]
