"""The phrases of a set by what they are like: their length, their object, their words."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from evf_sam_jax.report.words import WORD_GROUPS, phrases_with, word_list

LENGTHS = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 8), (9, 12), (13, None))  # words, both included
# Pixels of the target at the original resolution: COCO's three sizes.
COCO_SIZES = (("small, below 32\u00b2", 0, 32**2), ("medium, below 96\u00b2", 32**2, 96**2))
SHARES = (0.01, 0.03, 0.1, 0.3)  # of the image
LARGEST_CATEGORIES = 30
FEWEST = 10  # phrases of a word that is listed


@dataclasses.dataclass(frozen=True)
class Group:
    """Some of the n phrases of a set.

    Attributes:
      indented: whether it is a part of the group before that is not.
    """

    label: str
    member: Bool[np.ndarray, " n"]
    indented: bool = False


def by_length(phrases: Sequence[str]) -> list[Group]:
    """By the number of words."""
    words = np.array([len(word_list(phrase)) for phrase in phrases])
    groups = [Group("no word", words == 0)]
    for low, high in LENGTHS:
        if high is None:
            groups.append(Group(f"{low} and more", words >= low))
        else:
            label = str(low) if low == high else f"{low} to {high}"
            groups.append(Group(label, (words >= low) & (words <= high)))
    return _not_empty(groups)


def by_coco_size(target_pixels: Int[np.ndarray, " n"]) -> list[Group]:
    """By COCO's small, medium and large; phrases without a target apart."""
    groups = [Group("no target", target_pixels == 0)]
    for label, low, high in COCO_SIZES:
        inside = (target_pixels >= max(low, 1)) & (target_pixels < high)
        groups.append(Group(label, inside))
    groups.append(Group("large", target_pixels >= COCO_SIZES[-1][2]))
    return _not_empty(groups)


def by_share(
    target_pixels: Int[np.ndarray, " n"], image_pixels: Int[np.ndarray, " n"]
) -> list[Group]:
    """By how much of its image the target covers; phrases without a target are left out."""
    share = target_pixels / image_pixels
    edges = (0.0, *SHARES, np.inf)
    groups = []
    for low, high in zip(edges, edges[1:], strict=False):
        if low == 0.0:
            label = f"below {high:.0%}"
        else:
            label = f"{low:.0%} and more" if high == np.inf else f"{low:.0%} to {high:.0%}"
        groups.append(Group(label, (share >= low) & (share < high) & (target_pixels > 0)))
    return _not_empty(groups)


def by_category(categories: Sequence[str]) -> list[Group]:
    """The categories with most phrases, then the others together; none where none is named."""
    counts = Counter(categories)
    if set(counts) == {""}:
        return []
    column = np.array(categories, object)
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    shown, others = ordered[:LARGEST_CATEGORIES], ordered[LARGEST_CATEGORIES:]
    groups = [Group(name or "no category", column == name) for name in shown]
    if others:
        member = np.isin(column.astype(str), others)
        groups.append(Group(f"{len(others)} other categories", member))
    return groups


def by_words(phrases: Sequence[str], fewest: int = FEWEST) -> list[Group]:
    """Each kind of words, then those of its words that at least `fewest` phrases have."""
    groups = []
    for kind, expressions in WORD_GROUPS.items():
        members = phrases_with(phrases, expressions)
        whole = np.logical_or.reduce(list(members.values()))
        if whole.sum() < fewest:
            continue
        groups.append(Group(kind.capitalize(), whole))
        often = [name for name in expressions if members[name].sum() >= fewest]
        often.sort(key=lambda name: -int(members[name].sum()))
        if len(often) == 1 and (members[often[0]] == whole).all():
            groups[-1] = Group(f"{kind.capitalize()}: {often[0]}", whole)
            continue
        groups += [Group(name, members[name], indented=True) for name in often]
    return groups


def _not_empty(groups: list[Group]) -> list[Group]:
    return [group for group in groups if group.member.any()]
