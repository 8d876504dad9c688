"""Which kinds of words a phrase uses: places, order, colours, sizes, relations, and so on."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from data_pipelines.source import SEMANTIC_PREFIX

# A group's words, as written in lower case; several words are looked for as one expression.
WORD_GROUPS: Mapping[str, tuple[str, ...]] = {
    "left": ("left", "leftmost", "far left", "left most"),
    "right": ("right", "rightmost", "far right", "right most"),
    "up and down": (
        *("top", "bottom", "upper", "lower", "topmost", "bottommost", "highest", "lowest"),
    ),
    "middle": ("middle", "center", "centre", "corner", "edge"),
    "depth": (
        *("front", "back", "nearest", "far", "farthest", "furthest", "close", "closer", "closest"),
        *("background", "foreground"),
    ),
    "order": (
        *("first", "second", "third", "fourth", "fifth", "last", "next"),
        *("1st", "2nd", "3rd", "4th", "5th"),
    ),
    "number": ("two", "three", "four", "five", "both", "all", "2", "3", "4"),
    "colour": (
        *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
        *("gray", "grey", "tan", "beige", "gold", "golden", "silver", "blond", "blonde"),
        *("dark", "light", "striped", "plaid"),
    ),
    "size": (
        *("big", "bigger", "biggest", "large", "larger", "largest", "small", "smaller"),
        *("smallest", "little", "tiny", "tall", "taller", "tallest", "short", "shorter"),
        *("shortest", "long", "longest", "huge"),
    ),
    "relation": (
        *("left of", "right of", "next to", "in front of", "on top of", "behind", "between"),
        *("beside", "holding", "wearing", "above", "below", "under", "near", "with"),
    ),
    "negation": ("not", "no", "without", "isn't", "isnt", "doesn't", "doesnt", "never"),
    "person": (
        *("man", "woman", "guy", "girl", "boy", "kid", "child", "baby", "person", "people", "lady"),
        *("player", "men", "women"),
    ),
}

_WORD = re.compile(r"[a-z0-9]+(?:['\u2019][a-z]+)?")


def word_list(phrase: str) -> list[str]:
    """The words of a phrase in lower case, without punctuation and the prefix of categories."""
    text = phrase.removeprefix(SEMANTIC_PREFIX).lower()
    return [word.replace("\u2019", "'") for word in _WORD.findall(text)]


def phrases_with(
    phrases: Sequence[str], expressions: Sequence[str]
) -> dict[str, Bool[np.ndarray, " n"]]:
    """Which of n phrases have each of the expressions, as whole words one after the other."""
    # Blanks around every word, so that "left" is not found in "leftmost".
    texts = [f" {' '.join(word_list(phrase))} " for phrase in phrases]
    return {
        expression: np.array([f" {expression} " in text for text in texts], bool)
        for expression in expressions
    }
