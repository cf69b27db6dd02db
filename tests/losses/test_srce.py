from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from typing import Any

import pytest
import torch

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.losses.rce import RCELoss, RCESettings
from recbole_rcekd.losses.srce import SRCELoss, SRCESettings
from tests.losses.test_contract import short_world
from tests.losses.test_rce import STUDENT, TEACHER, built, exact_candidates, value_of
from tests.tables import World, make_world, seen_of

SMALL: dict[str, Any] = {"srce_top_k": 5, "srce_samples": 4, "srce_pool": 10}
OFF: dict[str, Any] = {"srce_tail_samples": 0, "srce_popularity_tilt": 0.0}


def make(**settings: Any) -> SRCELoss:
    return SRCELoss(SRCESettings(**{**SMALL, **settings}))


# --- what it shares with RCE-KD -------------------------------------------------------------------


def test_the_shared_settings_are_those_of_rce() -> None:
    """Types, ranges and defaults, in the same order; then those of its own."""
    ours, theirs = dataclasses.fields(SRCESettings), dataclasses.fields(RCESettings)
    hints = [typing.get_type_hints(settings) for settings in (SRCESettings, RCESettings)]
    for own, other in zip(ours, theirs, strict=False):
        assert own.name == f"s{other.name}"
        assert hints[0][own.name] == hints[1][other.name]
        assert (own.default, own.metadata) == (other.default, other.metadata)
    more = [own.name for own in ours[len(theirs) :]]
    assert [key.removeprefix("s") for key in more] == list(RCESettings.retired)


def test_relations_are_checked_under_its_own_keys() -> None:
    with pytest.raises(SettingsError, match=r"\[srce_samples\]=60 is larger than \[srce_pool\]=50"):
        SRCESettings(srce_samples=60, srce_pool=50)
    assert SRCESettings().longest_list() == ("srce_pool",)
    assert make(srce_weight=3.0).weight == 3.0


def teaching(short: bool) -> World:
    """With a teacher that scores everything, or one that lists few items, or none, of a user."""
    return short_world({1: 1, 2: 3, 4: 30, 6: 6}) if short else make_world()


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    ("terms", "gamma", "votes", "temperature"),
    list(
        itertools.product(
            ("full", "l1", "l2", "no_split"),
            ("paper", "code", "constant"),
            ("paper", "code"),
            (10.0, "auto"),
        )
    ),
)
def test_turned_off_it_is_rce_bit_for_bit(
    terms: str, gamma: str, votes: str, temperature: Any, short: bool
) -> None:
    settings: dict[str, Any] = {
        "top_k": 5,
        "samples": 4,
        "pool": 10,
        "temperature": 0.7,
        "terms": terms,
        "gamma": gamma,
        "votes": votes,
        "sampling_temperature": temperature,
    }
    world, found = teaching(short), []
    for loss in (
        RCELoss(RCESettings(**{f"rce_{key}": value for key, value in settings.items()})),
        make(**OFF, **{f"srce_{key}": value for key, value in settings.items()}),
    ):
        candidates = world.lists(seed=3)
        if loss.tuned:
            loss.tune(candidates)
        sets = loss.select(candidates)
        scores = world.student[1:].gather(1, sets.items).requires_grad_()
        value = loss.forward(scores, sets)
        (gradient,) = torch.autograd.grad(value.sum(), scores)
        parts = [sets, *loss.closure_sets(sets)]
        found.append(
            {
                "value": value.detach(),
                "gradient": gradient,
                "generator": candidates.generator.get_state(),
                **{
                    f"{n} {k}": v for n, part in enumerate(parts) for k, v in part.tensors().items()
                },
                **{name: torch.tensor(number) for name, number in loss.metrics().items()},
            }
        )
    rce, srce = found
    assert rce.keys() == srce.keys()
    assert not [name for name in rce if not torch.equal(rce[name], srce[name])]


def test_the_samples_are_drawn_as_in_rce() -> None:
    world = make_world()
    theirs = RCELoss(RCESettings(rce_top_k=5, rce_samples=4, rce_pool=10)).select(world.lists())
    assert torch.equal(make().select(world.lists()).items[:, :14], theirs.items)


# --- what it adds ---------------------------------------------------------------------------------


def test_uniform_items_and_weights_by_hand() -> None:
    # A = {1} ∪ {3} ∪ {4, 5}; teacher 6, 1, 1, e^−1 and student 1, 2, e^−0.5, e^−1, then weights.
    mass = 1 + 2 + math.exp(-0.5) + math.exp(-1)
    # Items 1, 3, 4, 5 have 3, 1, 0 and 9 interactions; only 1 is in the history; the student's
    # ranks are 3, 2, 4, 4 (4 and 5 are beyond M = 3).
    candidates = exact_candidates(TEACHER, STUDENT)
    candidates._popularity = torch.tensor([0, 3, 9, 1, 0, 9])
    candidates._seen = seen_of([(1, 1)], 2, 6)
    at = {rank: 1 / (1 + math.exp(-(rank - 2) / 4)) for rank in (2, 3, 4)}
    e = math.exp(-1)
    for settings, weights in (
        ({}, (6, 1, 1, e)),
        ({"srce_popularity_tilt": 0.5}, (6 / 2, 1 / math.sqrt(2), 1, e / math.sqrt(10))),
        ({"srce_history_boost": 0.5}, (6 * 1.5, 1, 1, e)),
        (
            {"srce_rank_boost": 3.0, "srce_rank_boost_scale": 4.0},
            (6 * (1 + 3 * at[3]), 1 + 3 * at[2], 1 + 3 * at[4], e * (1 + 3 * at[4])),
        ),
        ({"srce_popularity_tilt": 1.0, "srce_history_boost": 1.0}, (6 / 4 * 2, 1 / 2, 1, e / 10)),
    ):
        loss = SRCELoss(
            SRCESettings(
                **{"srce_popularity_tilt": 0.0, **settings},  # type: ignore[arg-type]
                srce_top_k=2,
                srce_samples=1,
                srce_pool=3,
                srce_tail_samples=2,
                srce_terms="l2",
            )
        )
        pool, teacher_top = candidates.student_top(3), candidates.teacher_top(2)
        sets = built(loss, candidates, torch.tensor([[3]]))
        sets = loss._with_tail(sets, teacher_top, pool, candidates)
        assert sorted(sets.items[0, 5:].tolist()) == [4, 5]
        expected = sum(
            weight / sum(weights) * (math.log(mass) - score)
            for weight, score in zip(weights, (0.0, math.log(2), -0.5, -1.0), strict=True)
        )
        found = value_of(loss, loss.weighted(sets, pool, candidates), STUDENT)
        assert found.item() == pytest.approx(expected, abs=1e-12), settings


@pytest.mark.parametrize("terms", ["full", "no_split"])
def test_uniform_items_come_from_outside_q_t_and_the_pool(terms: str) -> None:
    world = make_world(40, 30, seed=2)
    met: set[int] = set()
    for n in (4, 22):  # of 30 items, 15 to 20 are outside
        loss = make(srce_tail_samples=n, srce_terms=terms)
        sets = loss.select(world.lists())
        _, support = loss.closure_sets(sets)
        assert support.keep is not None
        pool, teacher_top = world.lists().student_top(10), world.lists().teacher_top(5)
        for row in range(40):
            outside = set(range(1, 31)) - set(pool[row].tolist()) - set(teacher_top[row].tolist())
            tail = sets.items[row, 14:].tolist()
            drawn = set(tail) - {0}
            assert drawn <= outside
            assert len(drawn) == n - tail.count(0) == min(n, len(outside))
            counted = support.items[row][support.keep[row]].tolist()
            assert len(counted) == len(set(counted))
            assert drawn <= set(counted)
            assert 0 not in counted
            met |= drawn if n == 4 else set()
    assert len(met) > 25


def test_the_targets_of_the_closure_gap_are_those_of_rce() -> None:
    world = make_world(40, 20, seed=2)
    targets = [
        loss.closure_sets(loss.select(world.lists()))[0]
        for loss in (make(**OFF), make(srce_tail_samples=3))
    ]
    assert torch.equal(targets[0].items, targets[1].items)
    assert targets[0].keep is not None
    assert targets[1].keep is not None
    assert torch.equal(targets[0].keep, targets[1].keep)


def test_what_is_turned_off_is_not_asked_for() -> None:
    world, plain = make_world(30, 30), make(**OFF, srce_rank_boost_scale=3.0)
    candidates = world.lists()
    candidates._popularity = None
    sets = plain.select(candidates)
    assert sets.items.shape[1] == 5 + 4 + 5
    assert sets.teacher_scores is not None
    assert torch.equal(sets.teacher_scores, candidates.teacher_scores(sets.items))
    with pytest.raises(ValueError, match="popularity"):
        make().select(candidates)


def test_auto_tries_all_temperatures_with_the_same_uniform_items() -> None:
    world = make_world(8, 30)
    loss, once = make(srce_sampling_temperature="auto"), world.lists()
    candidates = world.lists()
    loss.tune(candidates)
    make().select(once)
    assert torch.equal(candidates.generator.get_state(), once.generator.get_state())
    taken = loss.metrics()["sampling_temperature"]
    fixed = make(srce_sampling_temperature=taken)
    assert torch.equal(loss.select(world.lists()).items, fixed.select(world.lists()).items)
