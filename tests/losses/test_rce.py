from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.functional import is_member
from recbole_rcekd.core.top_k import Ranking
from recbole_rcekd.core.types import ItemSets, Seen
from recbole_rcekd.losses import rce
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.rce import RCELoss, RCESettings, blocker_votes
from tests.reference import rce as slow
from tests.reference.ce import soft_ce
from tests.tables import Golden, Table, World, make_world, ranking_of, seen_of

SMALL: dict[str, Any] = {"rce_top_k": 5, "rce_samples": 4, "rce_pool": 10}


def make(**settings: Any) -> RCELoss:
    return RCELoss(RCESettings(**{**SMALL, **settings}))


def exact_candidates(teacher: Tensor, student: Tensor, seed: int = 0) -> Candidates:
    """Candidates in float64, nothing seen, for all users; ``student [n + 1, N + 1]``."""
    seen = seen_of([], *teacher.shape)
    rows = student.clone()
    rows[:, 0] = -torch.inf
    users = torch.arange(1, len(teacher))
    return Candidates(
        users, Table(teacher, seen), ranking_of(rows), seen, torch.Generator().manual_seed(seed)
    )


def built(loss: RCELoss, candidates: Candidates, sampled: Tensor) -> ItemSets:
    """The sets of a loss with these samples."""
    k = loss.top_k
    teacher_top, student_top = candidates.teacher_top(k), candidates.student_top(k)
    return loss.build(
        student_top,
        sampled,
        teacher_top,
        is_member(teacher_top, student_top),
        is_member(teacher_top, sampled),
        candidates,
    )


def value_of(loss: RCELoss, sets: ItemSets, student: Tensor) -> Tensor:
    return loss.forward(student[1:].gather(1, sets.items), sets)


# Five items. Q_T = {1, 2} (teacher probabilities 3:1 there), Q_S = {2, 3}; one sample, item 3.
TEACHER = torch.tensor(
    [[0.0] * 6, [0.0, math.log(6), math.log(2), 0.0, 0.0, -1.0]], dtype=torch.float64
)
STUDENT = torch.tensor(
    [[0.0] * 6, [0.0, 0.0, math.log(3), math.log(2), -0.5, -1.0]], dtype=torch.float64
)
HAND = {"rce_top_k": 2, "rce_samples": 1, "rce_pool": 3, "rce_beta": 2.0}


def test_by_hand() -> None:
    # ℓ1 on {2, 3}: teacher 2/3, 1/3; student 3/5, 2/5.
    l1 = 2 / 3 * math.log(5 / 3) + 1 / 3 * math.log(5 / 2)
    # ℓ2 on {1} ∪ {3}: teacher 6/7, 1/7; student 1/3, 2/3.
    l2 = 6 / 7 * math.log(3) + 1 / 7 * math.log(3 / 2)
    # Without the split, {1, 2, 3}: teacher 6/9, 2/9, 1/9; student 1/6, 3/6, 2/6.
    union = 6 / 9 * math.log(6) + 2 / 9 * math.log(2) + 1 / 9 * math.log(3)
    # One of two teacher items is in Q_S: γ = e^{−2·1/2}. None is among the samples: γ = e^0 in the
    # authors' code.
    gamma = math.exp(-1)
    for settings, expected in (  # 1e-7, since γ is kept in float32
        ({}, (1 - gamma) * l1 + gamma * l2),
        ({"rce_terms": "l1"}, l1),
        ({"rce_terms": "l2"}, l2),
        ({"rce_terms": "no_split"}, union),
        ({"rce_gamma": "code"}, l2),
        ({"rce_gamma": "constant", "rce_gamma_value": 0.25}, 0.75 * l1 + 0.25 * l2),
    ):
        loss = make(**HAND, **settings)
        sets = built(loss, exact_candidates(TEACHER, STUDENT), torch.tensor([[3]]))
        assert value_of(loss, sets, STUDENT).item() == pytest.approx(expected, abs=1e-7), (
            settings
        )  # γ is kept in float32


def test_votes_by_hand() -> None:
    # The student's top-M is 10, 11, ..., 15; Q_T = {11, 13, 15, 99}, K = 2, so Q_S = {10, 11}, and
    # 13 and 15 are missed.
    pool, teacher_top = torch.tensor([[10, 11, 12, 13, 14, 15]]), torch.tensor([[11, 13, 15, 99]])
    assert blocker_votes(is_member(pool, teacher_top), 2, "paper").tolist() == [[2, 2, 2, 1, 1, 0]]
    # All of Q_T in the top-M votes, the position itself included.
    assert blocker_votes(is_member(pool, teacher_top), 2, "code").tolist() == [[3, 3, 2, 2, 1, 1]]


def test_the_authors_never_count_more_than_50_votes() -> None:
    pool = torch.arange(1, 61).unsqueeze(0)
    assert blocker_votes(is_member(pool, pool), 60, "code").tolist() == [
        [min(60 - place, 50) for place in range(60)]
    ]
    assert blocker_votes(is_member(pool, pool.flip(1)), 0, "paper").tolist() == [
        [59 - place for place in range(60)]
    ]


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_votes_equal_the_slow_version(mode: str) -> None:
    world = make_world(20, 40, seed=5)
    pool, teacher_top = world.lists().student_top(15), world.lists().teacher_top(6)
    found = blocker_votes(is_member(pool, teacher_top), 6, mode)
    for row in range(20):
        place = pool[row].tolist()
        assert found[row].tolist() == slow.votes(place, teacher_top[row].tolist(), place[:6], mode)


def test_teacher_items_beyond_the_pool_do_not_change_the_draw() -> None:
    # D2: the paper's z among all items is z in the pool plus the number of items missed beyond it,
    # which is the same everywhere.
    world = make_world(20, 40, seed=5)
    everything, teacher_top = world.lists().student_top(40), world.lists().teacher_top(6)
    inside = blocker_votes(is_member(everything[:, :15], teacher_top), 6, "paper")
    difference = blocker_votes(is_member(everything, teacher_top), 6, "paper")[:, :15] - inside
    assert (difference == difference[:, :1]).all()
    assert (difference > 0).any()


@pytest.mark.parametrize(
    ("terms", "gamma", "tau", "n_samples"),
    [
        *itertools.product(("full", "l1", "l2", "no_split"), ("paper", "code"), (0.7, 1.0), (0, 4)),
        ("full", "constant", 2.0, 4),
        ("full", "paper", 2.0, 10),
    ],
)
def test_equals_the_slow_version(terms: str, gamma: str, tau: float, n_samples: int) -> None:
    draw = torch.Generator().manual_seed(7)
    teacher = torch.randn(13, 26, generator=draw, dtype=torch.float64) * 2
    student = teacher + torch.randn(13, 26, generator=draw, dtype=torch.float64) * 2
    loss = make(
        rce_samples=n_samples,
        rce_terms=terms,
        rce_gamma=gamma,
        rce_gamma_value=0.3,
        rce_temperature=tau,
        rce_beta=1.7,
    )
    candidates = exact_candidates(teacher, student)
    sets = loss.select(candidates)
    found = value_of(loss, sets, student)
    for user in range(1, 13):
        q_t = sorted(range(1, 26), key=lambda i: -float(teacher[user, i]))[:5]
        ranked = sorted(range(1, 26), key=lambda i: -float(student[user, i]))
        q_s, pool = ranked[:5], ranked[:10]
        samples = sets.items[user - 1, 5 : 5 + n_samples].tolist()
        assert len(set(samples)) == n_samples
        assert set(samples) <= set(pool)
        mixing = slow.gamma(q_t, q_s, samples, gamma, 1.7, 0.3)
        assert sets.gamma is not None
        assert sets.gamma[user - 1].item() == pytest.approx(mixing, rel=1e-6)  # kept in float32
        exact = dataclasses.replace(sets, gamma=torch.full((12,), mixing, dtype=torch.float64))
        found = value_of(loss, exact, student)
        expected = slow.rce(
            student[user].tolist(), teacher[user].tolist(), q_t, q_s, samples, mixing, tau, terms
        )
        assert found[user - 1].item() == pytest.approx(expected, abs=1e-10)


def test_equals_the_slow_version_under_any_mask() -> None:
    student, teacher = (
        torch.randn(40, 14, dtype=torch.float64) * 2,
        torch.randn(40, 14, dtype=torch.float64) * 2,
    )
    keep, gamma = torch.rand(40, 9) < 0.6, torch.rand(40, dtype=torch.float64)
    keep[0] = False
    sets = ItemSets(torch.arange(1, 15).expand(40, 14), teacher, keep, gamma)
    found = make(rce_temperature=1.4).forward(student, sets)
    for row in range(40):
        s, t = student[row].tolist(), teacher[row].tolist()
        l1 = soft_ce(s, t, range(5), 1.4)
        l2 = soft_ce(s, t, [5 + int(place) for place in keep[row].nonzero()], 1.4)
        mixing = gamma[row].item()
        assert found[row].item() == pytest.approx((1 - mixing) * l1 + mixing * l2, abs=1e-10)


@pytest.mark.parametrize("prefix", ["rce0_", "rce1_"])
def test_authors_numbers(golden: Golden, prefix: str) -> None:
    # https://github.com/woriazzc/RCEKD, commit 771322a, modeling/KD/playground.py
    settings = golden.meta[prefix]
    loss = RCELoss(
        RCESettings(
            rce_top_k=settings["mkd_K"],
            rce_samples=settings["mkd_L"],
            rce_pool=settings["mkd_mxK"],
            rce_temperature=settings["mkd_tau"],
            rce_sampling_temperature=settings["mkd_T"],
            rce_beta=settings["mkd_beta"],
            rce_gamma="code",
            rce_votes="code",
        )
    )
    users = golden.batch()
    candidates = golden.lists(users)
    pool, teacher_top = (
        candidates.student_top(settings["mkd_mxK"]),
        candidates.teacher_top(settings["mkd_K"]),
    )
    assert torch.equal(pool, golden.ids(f"{prefix}student_top")[users])
    assert torch.equal(teacher_top, golden.ids(f"{prefix}teacher_top")[users])
    z = torch.from_numpy(golden.arrays[f"{prefix}z"])[users - 1]
    assert torch.equal(
        blocker_votes(is_member(pool, teacher_top), settings["mkd_K"], "code").double(), z
    )
    sampled = golden.ids(f"{prefix}sampled")[users]
    sets = built(loss, candidates, sampled)
    # γ in float64, as theirs; ours is kept in float32.
    assert sets.gamma is not None
    gamma = torch.exp(-settings["mkd_beta"] * is_member(teacher_top, sampled).double().mean(1))
    torch.testing.assert_close(sets.gamma, gamma.float())
    golden.check(prefix, "loss_sum", loss, users, dataclasses.replace(sets, gamma=gamma), 1e-10)


def terms_of(world_seed: int, **settings: Any) -> dict[str, Tensor]:
    """The loss and its two terms on the same sets."""
    world = make_world(seed=world_seed)
    sets = make(**settings).select(world.lists())
    return {
        terms: value_of(make(**settings, rce_terms=terms), sets, world.student)
        for terms in ("full", "l1", "l2")
    }


def test_beta_0_leaves_the_second_term() -> None:
    found = terms_of(0, rce_beta=0.0)
    assert torch.equal(found["full"], found["l2"])
    assert not torch.allclose(found["l1"], found["l2"])


def test_a_large_beta_leaves_the_first_term_where_the_top_k_overlap() -> None:
    world = make_world()
    loss = make(rce_beta=1e4)
    sets = loss.select(world.lists())
    assert sets.overlap is not None
    some = sets.overlap > 0
    assert some.any()
    found = terms_of(0, rce_beta=1e4)
    assert torch.equal(found["full"][some], found["l1"][some])
    assert torch.equal(found["full"][~some], found["l2"][~some])


def test_without_overlap_gamma_is_1() -> None:
    # Teacher and student in opposite order.
    teacher = torch.arange(31.0).expand(2, 31)
    sets = make().select(exact_candidates(teacher.double(), -teacher.double()))
    assert sets.gamma is not None
    assert sets.gamma.tolist() == [1.0]


@pytest.mark.parametrize("beta", [0.0, 0.4, 5.0])
def test_equal_top_k_and_no_other_samples_make_both_terms_equal(beta: float) -> None:
    # P6: Q_T = Q_S and L = M = K.
    teacher = torch.randn(6, 31, dtype=torch.float64)
    student = teacher * 3 + 1
    values = []
    for terms in ("l1", "l2", "full", "no_split"):
        loss = make(rce_samples=5, rce_pool=5, rce_beta=beta, rce_terms=terms)
        values.append(value_of(loss, loss.select(exact_candidates(teacher, student)), student))
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


def test_no_samples_and_equal_top_k_leave_the_second_term_empty() -> None:
    teacher = torch.randn(6, 31, dtype=torch.float64)
    loss = make(rce_samples=0, rce_beta=0.0)
    assert (
        value_of(loss, loss.select(exact_candidates(teacher, teacher * 3)), teacher * 3).tolist()
        == [0.0] * 5
    )


def test_no_split_counts_each_item_once() -> None:
    world = make_world(40, 20, seed=2)
    loss = make(rce_samples=8, rce_terms="no_split")
    sets = loss.select(world.lists())
    assert sets.keep is not None
    for row in range(40):
        counted = [*sets.items[row, :5].tolist(), *sets.items[row, 5:][sets.keep[row]].tolist()]
        assert len(counted) == len(set(counted))
        assert set(counted) == set(sets.items[row].tolist())


def test_the_second_term_counts_each_item_once_and_no_shared_ones() -> None:
    world = make_world(40, 20, seed=2)
    sets = make(rce_samples=8).select(world.lists())
    assert sets.keep is not None
    for row in range(40):
        q_s, samples, q_t = (part.tolist() for part in torch.tensor_split(sets.items[row], (5, 13)))
        counted = sets.items[row, 5:][sets.keep[row]].tolist()
        assert len(counted) == len(set(counted))
        assert set(counted) == (set(q_t) - set(q_s)) | set(samples)


def test_gamma_modes() -> None:
    world = make_world(30, 30)
    paper, code, constant = (
        make(rce_gamma=mode, rce_gamma_value=0.3).select(world.lists())
        for mode in ("paper", "code", "constant")
    )
    assert torch.equal(paper.items, code.items)  # the same draw
    for sets, expected in ((paper, paper.items[:, :5]), (code, code.items[:, 5:9])):
        assert sets.gamma is not None
        shared = is_member(sets.items[:, 9:], expected).float().mean(1)
        torch.testing.assert_close(sets.gamma, torch.exp(-5.0 * shared))
    assert code.gamma is not None
    assert paper.gamma is not None
    assert (code.gamma >= math.exp(-5.0 * 4 / 5) - 1e-6).all()  # at most L of K are counted
    assert not torch.equal(paper.gamma, code.gamma)
    assert constant.gamma is not None
    torch.testing.assert_close(constant.gamma, torch.full((30,), 0.3))


def test_a_low_sampling_temperature_draws_the_top_blockers() -> None:
    # z falls along the top-M; T → 0 takes the positions with most votes first.
    world = make_world(30, 30)
    sets = make(rce_sampling_temperature=1e-3).select(world.lists())
    pool, teacher_top = world.lists().student_top(10), world.lists().teacher_top(5)
    votes = blocker_votes(is_member(pool, teacher_top), 5, "paper")
    for row in range(30):
        chosen = [
            int(votes[row, pool[row].tolist().index(item)])
            for item in sets.items[row, 5:9].tolist()
        ]
        assert sorted(chosen, reverse=True) == votes[row].sort(descending=True).values[:4].tolist()


def test_closure_sets_are_the_missed_items_and_these_with_the_samples() -> None:
    world = make_world(40, 20, seed=2)
    loss = make(rce_samples=8)
    sets = loss.select(world.lists())
    targets, support = loss.closure_sets(sets)
    assert targets.keep is not None
    assert support.keep is not None
    for row in range(40):
        q_s, samples, q_t = (part.tolist() for part in torch.tensor_split(sets.items[row], (5, 13)))
        missed = set(q_t) - set(q_s)
        assert set(targets.items[row][targets.keep[row]].tolist()) == missed
        counted = support.items[row][support.keep[row]].tolist()
        assert len(counted) == len(set(counted))
        assert set(counted) == missed | set(samples)


# --- the sampling temperature that is found -------------------------------------------------------


def slow_gap(world: World, row: int, targets: ItemSets, support: ItemSets) -> float:
    """Δ of one user, in plain Python."""
    user = world.user(row + 1, [])
    assert targets.keep is not None
    assert support.keep is not None
    missed = targets.items[row][targets.keep[row]].tolist()
    inside = support.items[row][support.keep[row]].tolist()
    mass = sum(math.exp(user.teacher[i]) for i in missed)
    normaliser = sum(math.exp(user.student[i]) for i in inside)
    gap = 0.0
    for i in missed:
        blockers = sum(
            1 for j in range(1, 31) if j not in inside and user.student[j] > user.student[i]
        )
        gap += (
            math.exp(user.teacher[i])
            / mass
            * math.log(1 + math.exp(user.student[i]) / normaliser * blockers)
        )
    return gap


@pytest.mark.parametrize("turned", [False, True])
def test_auto_takes_the_temperature_of_the_smallest_closure_gap(
    turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)
    assert tried == rce._TEMPERATURES
    if turned:
        monkeypatch.setattr(rce, "_TEMPERATURES", tried[::-1])
    for seed in range(3):
        world = make_world(8, 30, seed=seed)
        loss = make(rce_sampling_temperature="auto")
        assert loss.tuned
        candidates, once = world.lists(seed=seed), world.lists(seed=seed)
        loss.tune(candidates)
        make().select(once)
        assert torch.equal(
            candidates.generator.get_state(), once.generator.get_state()
        )  # the same noise for all
        gaps = {}
        for temperature in tried:
            fixed = make(rce_sampling_temperature=temperature)
            pair = fixed.closure_sets(fixed.select(world.lists(seed=seed)))
            gaps[temperature] = sum(slow_gap(world, row, *pair) for row in range(8)) / 8
        found = loss.metrics()["sampling_temperature"]
        assert gaps[found] == pytest.approx(min(gaps.values()), rel=1e-5)
        assert gaps[found] < max(gaps.values())
        fixed = make(rce_sampling_temperature=found)
        assert torch.equal(loss.select(world.lists()).items, fixed.select(world.lists()).items)


def test_auto_is_the_papers_value_before_it_was_tuned_and_without_users() -> None:
    world, loss = make_world(), make(rce_sampling_temperature="auto")
    expected = make(rce_sampling_temperature=10).select(world.lists()).items
    assert torch.equal(loss.select(world.lists()).items, expected)
    loss.tune(world.lists(torch.zeros(0, dtype=torch.int64)))
    assert loss.metrics() == {"sampling_temperature": 10.0}
    assert not make().tuned
    assert make().metrics() == {}


def test_scores_mask_and_weights_are_required() -> None:
    sets = ItemSets(torch.ones(1, 14).long(), torch.zeros(1, 14))
    with pytest.raises(ValueError, match="keep and gamma"):
        make().forward(torch.zeros(1, 14), sets)
    with pytest.raises(ValueError, match="keep"):
        make().closure_sets(sets)


def test_the_end_of_a_short_top_m_is_no_item() -> None:
    """A row that may be recommended two items only ends with 0, which is never drawn or scored."""

    class Short(Ranking):
        def top_k(self, contexts: Tensor, k: int, without: Seen | None = None) -> Tensor:
            return torch.tensor([[2, 1] + [0] * (k - 2)])

    class Terse(Table):
        def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
            return torch.tensor([[1] + [0] * (k - 1)])

    seen = seen_of([], 2, 6)
    teacher = Terse(TEACHER.clone(), seen)
    loss = make(rce_top_k=3, rce_samples=2, rce_pool=4, rce_beta=1.0)
    for seed in range(20):
        candidates = Candidates(
            torch.tensor([1]), teacher, Short(), seen, torch.Generator().manual_seed(seed)
        )
        sets = loss.select(candidates)
        assert sets.overlap is not None
        assert sets.overlap.tolist() == [1.0]
        assert sorted(sets.items[0, 3:5].tolist()) == [1, 2]
        student = STUDENT[1:].clone().requires_grad_()
        value = loss.forward(student.gather(1, sets.items), sets)
        (slope,) = torch.autograd.grad(value.sum(), student)
        assert slope[0, 0] == 0.0
        other = student.detach().clone()
        other[0, 0] = 9.0
        assert torch.equal(loss.forward(other.gather(1, sets.items), sets), value)
