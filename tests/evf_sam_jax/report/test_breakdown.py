"""Each phrase is in one group of its length, size and category, and in those of its words."""

import numpy as np

from evf_sam_jax.report.breakdown import by_category, by_coco_size, by_length, by_share, by_words

PHRASES = [
    "Left one, please",
    "the LEFTMOST cat",
    "cat",
    "second cat on the far left in front of the big red sofa near the second wall",
    "isn\u2019t red",
    "???",
    "[semantic] wall",
]


def members(groups) -> dict[str, list[int]]:
    return {group.label: np.flatnonzero(group.member).tolist() for group in groups}


def test_length_counts_words():
    assert members(by_length(PHRASES)) == {
        "no word": [5],
        "1": [2, 6],
        "2": [4],
        "3": [0, 1],
        "13 and more": [3],
    }


def test_sizes_are_cocos_with_their_edges():
    pixels = np.array([0, 1, 1023, 1024, 9215, 9216, 10**7])
    assert list(members(by_coco_size(pixels)).values()) == [[0], [1, 2], [3, 4], [5, 6]]
    shares = by_share(np.array([0, 1, 10, 29, 300, 1000]), np.full(6, 1000))
    assert members(shares) == {
        "below 1%": [1],
        "1% to 3%": [2, 3],
        "30% and more": [4, 5],
    }


def test_rare_categories_are_put_together():
    names = [f"c{i:02}" for i in range(40)] + ["c00", "", ""]
    groups = by_category(names)
    assert [group.label for group in groups[:3]] == ["no category", "c00", "c01"]
    assert groups[-1].label == "11 other categories"
    assert (sum(group.member.astype(int) for group in groups) == 1).all()
    assert by_category(["", ""]) == []


def test_words_are_whole_and_counted_by_kind():
    found = members(by_words(PHRASES, fewest=1))
    assert found["Left"] == [0, 1, 3]
    assert found["left"] == [0, 3] and found["leftmost"] == [1] and found["far left"] == [3]
    assert found["Order: second"] == [3] and found["Negation: isn't"] == [4]
    assert found["Colour: red"] == [3, 4] and found["in front of"] == [3]
    assert "Right" not in found and "right" not in found
    indented = [group.label for group in by_words(PHRASES, fewest=1) if group.indented]
    assert "left" in indented and "Left" not in indented


def test_words_that_few_phrases_have_are_left_out():
    found = members(by_words(PHRASES, fewest=2))
    assert "left" in found and "leftmost" not in found and "Size" not in found
