"""Decisions about parameters by their '/'-paths: ordered (regex, value) rules, first match wins."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from evf_sam_jax.errors import UserError
from evf_sam_jax.model_dir import nest, path_leaves

T = TypeVar("T")
Params = dict[str, Any]
Rules = Sequence[tuple[str, T]]


def check_rules(rules: Any, what: str, value: str, valid: Callable[[Any], bool]) -> None:
    """Checks the form of rules that somebody wrote, before there are paths.

    Args:
      what: the name of the rules in an error message.
      value: what the second of each pair shall be, in words.
      valid: whether it is.

    Raises:
      UserError: they are no sequence of pairs, or a pair is not of a string and such a value.
    """
    for rule in rules if isinstance(rules, list | tuple) else [rules]:
        pair = isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)
        if not (pair and valid(rule[1])):
            raise UserError(f"{what}: expected pairs of a regex and {value}, found {rule!r}")


def match_rules(
    rules: Rules[T], paths: Iterable[str], what: str, allow_unused: bool = False
) -> dict[str, T]:
    """Returns for each path the value of the first rule whose regex matches all of it.

    Args:
      what: the name of the rules in an error message.
      allow_unused: whether a rule may match none, as where the paths are a part of all.

    Raises:
      UserError: no rule covers a path, a rule covers none, or a regex is not one.
    """
    paths = list(paths)
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
    matched, used = {}, set()
    for path in paths:
        for index, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(path):
                matched[path] = value
                used.add(index)
                break
        else:
            raise UserError(
                f"{what}: no rule covers the parameter {path}, expected one for each of them"
            )
    for index, (pattern, _) in enumerate(() if allow_unused else rules):
        if index not in used and not any(compiled[index][0].fullmatch(path) for path in paths):
            raise UserError(f"{what}: the rule {pattern!r} matches no parameter")
    return matched


def map_rules(
    function: Callable[[T, Any], Any], rules: Rules[T], params: Mapping[str, Any], what: str
) -> Params:
    """Returns the tree of function(value of the leaf's rule, leaf)."""
    leaves = path_leaves(params)
    values = match_rules(rules, leaves, what)
    return nest({path: function(values[path], leaf) for path, leaf in leaves.items()})


def split(rules: Rules[bool], params: Mapping[str, Any], what: str) -> tuple[Params, Params]:
    """Returns the part of the tree whose rule says true, and the rest."""
    leaves = path_leaves(params)
    chosen = match_rules(rules, leaves, what)
    return (
        nest({path: leaf for path, leaf in leaves.items() if chosen[path]}),
        nest({path: leaf for path, leaf in leaves.items() if not chosen[path]}),
    )


def merge(*trees: Mapping[str, Any]) -> Params:
    """Returns one tree of all leaves of trees that share none; copies no array.

    Raises:
      ValueError: two trees have the same leaf.
    """
    merged: dict[str, Any] = {}
    for tree in trees:
        leaves = path_leaves(tree)
        twice = sorted(merged.keys() & leaves.keys())
        if twice:
            raise ValueError(f"both trees have {twice[0]}")
        merged.update(leaves)
    return nest(merged)
