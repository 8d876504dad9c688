"""Every phrase is planned once, in shapes that hold it, whoever computes it."""

from pathlib import Path

import numpy as np
import pytest

from evf_sam_jax.evaluation.grouping import Plan, Shape, make_plan, share, steps
from tests.evf_sam_jax.evaluation.made_set import (
    TOKENIZER,
    MadeImage,
    MadeTarget,
    made_set,
    random_phrase,
)

BATCH_SIZE, PHRASES = 3, 4


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory):
    rng = np.random.default_rng(0)

    def image(i: int) -> MadeImage:
        height, width = rng.choice([1, 60, 128, 129, 300, 700], 2).tolist()
        targets = tuple(
            MadeTarget(random_phrase(rng, int(rng.choice([1, 9, 30]))), ())
            for _ in range(1 + i % 11)
        )
        return MadeImage(height, width, targets, None)

    directory = tmp_path_factory.mktemp("sets")
    return tuple(
        made_set(directory / name, list(map(image, range(images))), f"{name}/val")
        for name, images in (("one", 23), ("two", 14))
    )


@pytest.fixture(scope="module")
def plan(sets) -> Plan:
    return make_plan(sets, TOKENIZER, BATCH_SIZE, PHRASES)


def test_every_phrase_is_planned_once(sets, plan: Plan):
    planned = [
        (image.set, image.image, place)
        for group in plan.groups
        for image in group.images
        for place in image.chosen
    ]
    expected = [
        (number, image, place)
        for number, one in enumerate(sets)
        for image in range(len(one))
        for place in range(len(one.entry(image).phrases))
    ]
    assert sorted(planned) == expected
    assert plan.images == 23 + 14 and not plan.left_out
    assert [group.number for group in plan.groups] == list(range(len(plan.groups)))


def test_shapes_hold_what_is_computed_in_them(sets, plan: Plan):
    for group in plan.groups:
        assert 1 <= len(group.images) <= BATCH_SIZE and group.shape.phrases <= PHRASES
        for image in group.images:
            phrases = sets[image.set].entry(image.image).phrases
            assert max(len(TOKENIZER.encode(text)) for text in phrases) <= group.shape.tokens
            assert group.rounds * group.shape.phrases >= len(image.chosen)
            covered = np.zeros((image.height, image.width), int)
            for top, left in image.tiles(group.shape.tile):
                covered[top : top + group.shape.tile, left : left + group.shape.tile] += 1
            assert (covered == 1).all()


def test_the_shape_of_an_image_is_a_matter_of_that_image_alone(sets, plan: Plan):
    def shapes(plan: Plan) -> dict[int, Shape]:
        return {
            image.image: group.shape
            for group in plan.groups
            for image in group.images
            if image.set == len(sets) - 1
        }

    alone = make_plan(sets[1:], TOKENIZER, BATCH_SIZE, PHRASES)
    assert [shapes(plan)[i] for i in range(14)] == [
        {image.image: g.shape for g in alone.groups for image in g.images}[i] for i in range(14)
    ]


@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (2, 1), (8, 1), (4, 2), (1, 3)])
def test_processes_and_devices_share_the_groups(plan: Plan, devices: int, processes: int):
    taken = []
    for process in range(processes):
        for step in steps(share(plan.groups, process, processes), devices):
            assert 1 <= len(step) <= devices
            assert len({group.shape for group in step}) == 1
            taken += [group.number for group in step]
    assert sorted(taken) == list(range(len(plan.groups)))


def test_a_phrase_that_the_model_has_no_room_for_is_left_out(tmp_path: Path):
    long = " ".join(["red"] * 3000)
    images = [
        MadeImage(4, 4, (MadeTarget("the circle", ()), MadeTarget(long, ())), None),
        MadeImage(4, 4, (MadeTarget(long, ()),), None),
    ]
    plan = make_plan([made_set(tmp_path, images)], TOKENIZER, 2, 8)
    (group,) = plan.groups
    assert [image.chosen for image in group.images] == [(0,)]
    assert [(one.image_index, one.name[:8]) for one in plan.left_out] == [
        (0, "'red red"),
        (1, "'red red"),
    ]
    assert "expected at most" in plan.left_out[0].reason
