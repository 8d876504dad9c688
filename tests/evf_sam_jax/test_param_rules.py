"""Rules over paths: the first match wins, and nothing is left to chance."""

import pytest

from evf_sam_jax.errors import UserError
from evf_sam_jax.param_rules import check_rules, map_rules, match_rules, merge, split

PARAMS = {
    "encoder": {"proj": {"kernel": 1, "bias": 2}},
    "segmenter": {"mask_decoder": {"kernel": 3}, "image_encoder": {"kernel": 4}},
}


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        (["encoder/.*"], "'encoder/.*'"),
        ("encoder/.*", "'encoder/.*'"),
        ([["encoder/.*", True, 1]], "['encoder/.*', True, 1]"),
        ([[1, True]], "[1, True]"),
        ([["encoder/.*", "yes"]], "['encoder/.*', 'yes']"),
        (None, "None"),
    ],
)
def test_what_is_no_rule_is_named(rules, found: str):
    with pytest.raises(UserError) as raised:
        check_rules(rules, "trainable", "True or False", lambda value: isinstance(value, bool))
    assert str(raised.value) == (
        f"trainable: expected pairs of a regex and True or False, found {found}"
    )


def test_the_first_match_wins():
    rules = [("segmenter/image_encoder/.*", "a"), ("segmenter/.*", "b"), (".*", "c")]
    paths = ["segmenter/mask_decoder/kernel", "segmenter/image_encoder/kernel", "encoder/x"]
    assert match_rules(rules, paths, "rules") == dict(zip(paths, "bac", strict=True))


def test_a_rule_matches_the_whole_path():
    with pytest.raises(UserError, match="no rule covers the parameter encoder/x"):
        match_rules([("encoder", 1)], ["encoder/x"], "trainable")


def test_a_rule_that_matches_nothing_is_a_typing_error():
    with pytest.raises(UserError, match="trainable: the rule 'enc0der/.*' matches no parameter"):
        match_rules([("enc0der/.*", 1), (".*", 2)], ["encoder/x"], "trainable")


def test_a_rule_behind_others_may_be_left_over():
    assert match_rules([("a|b", 1), (".*", 2)], ["a", "b"], "rules") == {"a": 1, "b": 1}


def test_a_regex_that_is_none_is_named():
    with pytest.raises(UserError, match=r"decay: '\(' is not a regular expression"):
        match_rules([("(", 1)], ["a"], "decay")


def test_rules_map_leaves():
    rules = [(".*/kernel", 10), (".*", 1)]
    scaled = map_rules(lambda factor, leaf: factor * leaf, rules, PARAMS, "scale")
    assert scaled == {
        "encoder": {"proj": {"kernel": 10, "bias": 2}},
        "segmenter": {"mask_decoder": {"kernel": 30}, "image_encoder": {"kernel": 40}},
    }


def test_split_and_merge_are_inverse():
    rules = [(".*/image_encoder/.*", False), (".*", True)]
    trainable, frozen = split(rules, PARAMS, "trainable")
    assert frozen == {"segmenter": {"image_encoder": {"kernel": 4}}}
    assert "image_encoder" not in trainable["segmenter"]
    assert merge(trainable, frozen) == PARAMS


def test_trees_that_share_a_leaf_do_not_merge():
    with pytest.raises(ValueError, match="encoder/proj/kernel"):
        merge(PARAMS, {"encoder": {"proj": {"kernel": 5}}})
