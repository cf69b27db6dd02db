"""What every loss on scores promises, whatever its formula.

Besides the slow formula, ``tests/reference/<name>.py`` has ``SMALL``: settings that fit a catalogue
of 30 items; ``CASES``: what to try beyond them; and ``value(user, settings)``: the slow formula for
one :class:`~tests.tables.User`. These are there only if they differ from the default:

* ``RELATIVE``: whether only differences of scores count (default: True);
* ``BLOCKS``: the first columns of blocks that are told apart by their position;
* ``ORDERED``: how many first columns are in an order that matters;
* ``TAIL``: the setting that says how many the last columns are;
* ``ZERO``: True if a row may have nothing to learn, as where the student agrees;
* ``support(settings, sets)``: which columns count, bool ``[6, T]`` (default: ``sets.keep``, or
    all);
* ``NO_TEACHER``: True for a control that learns the same whatever the teacher's scores are;
* ``CONSTANTS``: True if something computed from the student's scores has no gradient, so that the
  gradient is not that of the value.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.types import ItemSets, Seen
from recbole_rcekd.losses import LOSSES as ALL_LOSSES
from recbole_rcekd.losses import KDLoss
from recbole_rcekd.losses.methods import find_loss
from recbole_rcekd.teachers.listed_scores import ListedScores
from tests.tables import World, make_world

# Losses on embeddings have a contract of their own.
LOSSES: dict[str, type[KDLoss]] = {
    name: loss for name, loss in ALL_LOSSES.items() if issubclass(loss, KDLoss)
}


def make_loss(name: str, **settings: Any) -> KDLoss:
    """A loss with the settings of SMALL and these."""
    return LOSSES[name](LOSSES[name].settings_type(**{**SMALL[name], **settings}))


# What tests/reference/<name>.py says about a loss.
REFERENCE: dict[str, Any] = {
    name: importlib.import_module(f"tests.reference.{name}") for name in LOSSES
}
SMALL: dict[str, dict[str, Any]] = {name: reference.SMALL for name, reference in REFERENCE.items()}
# name of the loss, what differs from SMALL
CASES: list[tuple[str, dict[str, Any]]] = [
    (name, settings) for name, reference in REFERENCE.items() for settings in reference.CASES
]
# Losses in which only differences of scores count: cross-entropies and Plackett–Luce. In CD each
# score counts by itself.
RELATIVE = {name for name, reference in REFERENCE.items() if getattr(reference, "RELATIVE", True)}
# Losses whose rows may be 0 though the teacher lists items.
ZERO = {name for name, reference in REFERENCE.items() if getattr(reference, "ZERO", False)}


@dataclass(frozen=True)
class Case:
    """A loss with six rows to learn; ``support`` says which columns count."""

    name: str
    loss: KDLoss
    scores: Tensor
    sets: ItemSets
    support: Tensor

    def value(self, scores: Tensor | None = None, sets: ItemSets | None = None) -> Tensor:
        return self.loss.forward(
            self.scores if scores is None else scores, self.sets if sets is None else sets
        )

    def gradient(
        self, scores: Tensor | None = None, sets: ItemSets | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = (self.scores if scores is None else scores).detach().clone().requires_grad_()
        value = self.value(scores, sets)
        (found,) = torch.autograd.grad(value.sum(), scores)
        return value.detach(), found

    def double(self) -> Case:
        double: dict[str, Any] = {
            k: v.double() if v.is_floating_point() else v for k, v in self.sets.tensors().items()
        }
        sets = dataclasses.replace(self.sets, **double)
        return dataclasses.replace(self, scores=self.scores.double(), sets=sets)


def build(name: str, settings: dict[str, Any]) -> Case:
    """Select from a random teacher and student, then mask some columns if the loss has a mask."""
    world, users = make_world(), torch.arange(1, 7)
    loss, reference = make_loss(name, **settings), REFERENCE[name]
    loss.prepare(7, torch.device("cpu"))
    sets = loss.select(world.lists())
    if loss.masks_seen:
        sets = dataclasses.replace(sets, seen=world.seen.among(users))
    if loss.teaches_all_items:
        sets = dataclasses.replace(sets, teacher_scores=world.teacher.score_all(users))
    elif sets.keep is not None:
        masked = torch.rand(sets.keep.shape, generator=torch.Generator().manual_seed(1)) < 0.25
        sets = dataclasses.replace(sets, keep=sets.keep & ~masked)
    if loss.scores_all_items:
        support = torch.ones(6, 31, dtype=torch.bool)
        support[:, 0] = False
        if hasattr(reference, "support"):
            support = reference.support(settings, sets)
        return Case(name, loss, world.student[1:], sets, support)
    support = torch.ones_like(sets.items, dtype=torch.bool)
    if sets.keep is not None:
        support[:, -sets.keep.shape[1] :] = sets.keep
    if hasattr(reference, "support"):
        support = reference.support(settings, sets)
    return Case(name, loss, world.student[1:].gather(1, sets.items), sets, support)


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join(
        [case[0], *(f"{key.partition('_')[2]}={value}" for key, value in case[1].items())]
    )


@pytest.fixture(params=CASES, ids=case_id)
def case(request: pytest.FixtureRequest) -> Case:
    return build(*request.param)


def only(*names: str, having: str = "") -> Callable[[Any], Any]:
    """Run a test for the cases of these losses, if their sets have the field ``having``."""
    cases = [case for case in CASES if case[0] in names]
    cases = [case for case in cases if not having or having in build(*case).sets.tensors()]
    return pytest.mark.parametrize(
        "case", [build(*case) for case in cases], ids=map(case_id, cases)
    )


def learns(name: str, value: Tensor) -> bool:
    """Whether all rows have something to learn, or some of them if that is all a loss promises."""
    return bool((value >= 0).all() and (value > 0).any() if name in ZERO else (value > 0).all())


def test_every_loss_is_here() -> None:
    assert {name for name, _ in CASES} == set(LOSSES) == set(SMALL)


def test_one_value_per_row(case: Case) -> None:
    value = case.value()
    assert value.shape == (6,)
    assert learns(case.name, value)


def test_finite_at_extreme_scores(case: Case) -> None:
    # Random signs: some rows agree with the teacher, some contradict it entirely.
    draw = torch.Generator().manual_seed(3)
    for _ in range(5):
        scores = torch.randint(-1, 2, case.scores.shape, generator=draw) * 1e4
        sets = case.sets
        if sets.teacher_scores is not None:
            sets = dataclasses.replace(
                sets,
                teacher_scores=torch.randint(-1, 2, sets.teacher_scores.shape, generator=draw)
                * 1e4,
            )
        value, gradient = case.gradient(scores.where(case.support | (scores == 0), -1e4), sets)
        assert scores.dtype == torch.float32
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_gradient_is_that_of_the_value(case: Case) -> None:
    if getattr(REFERENCE[case.name], "CONSTANTS", False):
        return  # its own test says what the gradient is
    exact = case.double()
    # An item may stand in two columns; ranks jump where scores are equal.
    scores = exact.scores + 1e-3 * torch.rand(
        exact.scores.shape, generator=torch.Generator().manual_seed(4)
    )
    scores[~exact.support] = 0.0  # −inf at the padding item
    assert torch.autograd.gradcheck(lambda x: exact.value(x), scores.requires_grad_())


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("inf"), float("nan")])
def test_what_is_masked_does_not_count(case: Case, garbage: float) -> None:
    value, gradient = case.gradient()
    spoilt_value, spoilt_gradient = case.gradient(case.scores.masked_fill(~case.support, garbage))
    assert torch.equal(value, spoilt_value)
    assert torch.equal(gradient, spoilt_gradient)
    assert not gradient[~case.support].any()


@only(*LOSSES, having="keep")
def test_masked_is_as_good_as_deleted(case: Case) -> None:
    case = case.double()
    assert case.sets.keep is not None
    first = case.sets.items.shape[1] - case.sets.keep.shape[1]  # RCE's first term has no mask
    value, gradient = case.gradient()
    for row in range(6):
        columns = torch.cat([torch.arange(first), first + case.sets.keep[row].nonzero().squeeze(1)])
        one = case.sets.rows(torch.tensor([row]))
        assert one.teacher_scores is None or one.teacher_scores.shape == one.items.shape
        shorter = dataclasses.replace(
            one,
            items=one.items[:, columns],
            keep=torch.ones(1, len(columns) - first, dtype=torch.bool),
            teacher_scores=None if one.teacher_scores is None else one.teacher_scores[:, columns],
        )
        loss = case.loss
        tail: str | None = getattr(REFERENCE[case.name], "TAIL", None)
        if tail is not None:
            head = case.sets.items.shape[1] - getattr(loss.settings, tail)
            loss = type(loss)(
                dataclasses.replace(loss.settings, **{tail: int((columns >= head).sum())})
            )
        alone = dataclasses.replace(
            case, loss=loss, scores=case.scores[row : row + 1, columns], sets=shorter
        )
        alone_value, alone_gradient = alone.gradient()
        torch.testing.assert_close(alone_value[0], value[row])
        torch.testing.assert_close(alone_gradient[0], gradient[row, columns])


@only(*RELATIVE)
def test_a_constant_added_to_all_scores_of_a_row_changes_nothing(case: Case) -> None:
    case = case.double()
    value, gradient = case.gradient()
    shift = torch.linspace(-50, 50, 6, dtype=torch.float64).unsqueeze(1)
    moved_value, moved_gradient = case.gradient(case.scores + shift)
    torch.testing.assert_close(moved_value, value)
    torch.testing.assert_close(moved_gradient, gradient)
    if case.sets.teacher_scores is not None:
        moved = dataclasses.replace(case.sets, teacher_scores=case.sets.teacher_scores + shift)
        torch.testing.assert_close(case.value(sets=moved), value)


@only("cd")
def test_cd_looks_at_each_score_alone(case: Case) -> None:
    assert not torch.allclose(case.value(case.scores + 1), case.value())


@only(*RELATIVE)
def test_what_goes_up_comes_down(case: Case) -> None:
    case = case.double()
    _, gradient = case.gradient()
    assert gradient.abs().amax(1).min() > 1e-6
    assert gradient.sum(1).abs().max() < 1e-12


def test_the_order_of_items_does_not_matter(case: Case) -> None:
    """Where a method has an order (the head of RRD) or blocks (RCE-KD), it is kept."""
    case = case.double()
    width = case.scores.shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
    if case.loss.scores_all_items:  # column 0 is padding; items are renamed
        order = torch.cat([order[order == 0], order[order != 0]])
        renamed = order.argsort()
        sets = dataclasses.replace(case.sets, items=renamed[case.sets.items])
        if sets.seen is not None:
            rows, ids = sets.seen.cells(torch.arange(6))
            sets = dataclasses.replace(
                sets, seen=Seen.from_pairs(rows, renamed[ids], 6, sets.seen.n_ids)
            )
        if case.loss.teaches_all_items and sets.teacher_scores is not None:
            sets = dataclasses.replace(sets, teacher_scores=sets.teacher_scores[:, order])
    else:
        reference = REFERENCE[case.name]
        ordered = getattr(reference, "ORDERED", 0)
        starts = (
            ordered,
            *(start for start in getattr(reference, "BLOCKS", ()) if start > ordered),
        )
        blocks = zip(starts, (*starts[1:], width), strict=True)
        order = torch.cat(
            [torch.arange(ordered), *(order[(order >= a) & (order < b)] for a, b in blocks)]
        )
        if ordered == 0 and starts == (0,):
            order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
        keep, teacher = case.sets.keep, case.sets.teacher_scores
        if keep is not None:
            unmasked = width - keep.shape[1]  # columns before the first that has a mask
            keep = keep[:, order[unmasked:] - unmasked]
        sets = dataclasses.replace(
            case.sets,
            items=case.sets.items[:, order],
            teacher_scores=None if teacher is None else teacher[:, order],
            keep=keep,
        )
    value, gradient = case.gradient()
    mixed_value, mixed_gradient = case.gradient(case.scores[:, order], sets)
    torch.testing.assert_close(mixed_value, value)
    torch.testing.assert_close(mixed_gradient, gradient[:, order])


@only("rrd")
def test_the_order_of_the_head_matters_in_rrd(case: Case) -> None:
    assert case.sets.keep is not None
    every = dataclasses.replace(case.sets, keep=torch.ones_like(case.sets.keep))
    swapped = case.scores[:, [1, 0, *range(2, 9)]]
    assert not torch.isclose(case.value(sets=every), case.value(swapped, every)).any()


def test_rows_do_not_know_each_other(case: Case) -> None:
    value, gradient = case.gradient()
    for part in (torch.tensor([0]), torch.tensor([4, 1]), torch.tensor([2, 3, 5, 5])):
        alone, alone_gradient = case.gradient(case.scores[part], case.sets.rows(part))
        torch.testing.assert_close(alone, value[part])
        torch.testing.assert_close(alone_gradient, gradient[part])


@only(*LOSSES, having="teacher_scores")
def test_the_teacher_gets_no_gradient(case: Case) -> None:
    assert case.sets.teacher_scores is not None
    teacher = case.sets.teacher_scores.clone().requires_grad_()
    scores = case.scores.clone().requires_grad_()
    value = case.value(scores, dataclasses.replace(case.sets, teacher_scores=teacher))
    of_student, of_teacher = torch.autograd.grad(value.sum(), (scores, teacher), allow_unused=True)
    assert of_teacher is None
    assert of_student is not None


def test_no_rows(case: Case) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    value, gradient = case.gradient(case.scores[none], case.sets.rows(none))
    assert value.shape == (0,)
    assert gradient.shape == case.scores[none].shape
    sets = case.loss.select(make_world().lists(none))
    assert sets.items.shape == case.sets.items[none].shape


def test_bfloat16(case: Case) -> None:
    rounded = case.scores.bfloat16()
    value, gradient = case.gradient(rounded)
    exact, exact_gradient = case.gradient(rounded.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(gradient.float(), exact_gradient, rtol=5e-2, atol=1e-2)


def test_nan_in_a_score_that_counts_stays_visible(case: Case) -> None:
    expected = case.value()
    for row in range(6):
        for column in case.support[row].nonzero().squeeze(1).tolist():
            scores = case.scores.clone()
            scores[row, column] = torch.nan
            value = case.value(scores)
            assert value[row].isnan(), column
            others = torch.arange(6) != row
            torch.testing.assert_close(value[others], expected[others])


def test_selected_items_are_real(case: Case) -> None:
    keep = case.sets.keep
    items = case.sets.items if keep is None else case.sets.items[:, -keep.shape[1] :][keep]
    if keep is None and case.support.shape == items.shape:
        items = items[case.support]
    assert (items > 0).all()
    assert (items <= 30).all()


def test_selection_follows_the_generator(case: Case) -> None:
    first, second = (case.loss.select(make_world().lists(seed=5)).tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    if not case.loss.renewed:
        other = case.loss.select(make_world().lists(seed=6))
        assert torch.equal(first["items"], other.items)


# --- teachers that list few items -----------------------------------------------------------------


def short_world(lengths: dict[int, int]) -> World:
    """The world of :func:`make_world`, with a teacher that lists only a user's best items."""
    world = make_world()
    rows = [
        (user, int(item), float(world.teacher.score_all(torch.tensor([user]))[0, item]))
        for user, length in lengths.items()
        for item in world.teacher.top_k(torch.tensor([user]), length, False)[0]
    ]
    users, items, scores = zip(*rows, strict=True)
    table = (torch.tensor(users), torch.tensor(items), torch.tensor(scores))
    return world._replace(teacher=ListedScores.with_floor(*table, world.seen))


def learned_from(loss: KDLoss, world: World) -> tuple[ItemSets, Tensor, Tensor]:
    """The item sets, the loss of each row, and its gradient by all student scores."""
    loss.prepare(7, torch.device("cpu"))
    sets = loss.select(world.lists())
    student = world.student[1:].clone().requires_grad_()
    if loss.masks_seen:
        sets = dataclasses.replace(sets, seen=world.seen.among(torch.arange(1, 7)))
    if loss.teaches_all_items:
        sets = dataclasses.replace(sets, teacher_scores=world.teacher.score_all(torch.arange(1, 7)))
    scores = student if loss.scores_all_items else student.gather(1, sets.items)
    value = loss.forward(scores, sets)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return sets, value.detach(), gradient


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_users_without_teacher_scores_learn_nothing(
    case: tuple[str, dict[str, Any]],
) -> None:
    loss = make_loss(case[0], **case[1])
    sets, value, gradient = learned_from(loss, short_world({2: 2, 4: 30, 5: 1, 6: 30}))
    if getattr(REFERENCE[case[0]], "NO_TEACHER", False):
        assert not loss.needs_teacher
        assert torch.equal(value, learned_from(loss, make_world())[1])
        return
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    for untaught in (0, 2):
        assert value[untaught] == 0
        assert not gradient[untaught].any()
    assert learns(case[0], value[[1, 3, 5]])
    assert not gradient[:, 0].any()  # padding
    if sets.keep is not None:
        masked = sets.items[:, -sets.keep.shape[1] :]
        assert not sets.keep[masked == 0].any()
        assert (
            not sets.keep[[0, 2]].any() or case[0] == "rrd"
        )  # its head is empty there, so the loss is 0
    for part in loss.closure_sets(sets) or ():
        assert part.keep is not None
        assert not part.keep[part.items == 0].any()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_short_list_is_the_formula_on_what_it_has(case: tuple[str, dict[str, Any]]) -> None:
    name, settings = case
    loss = make_loss(name, **settings)
    world = short_world({1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 30})
    sets, value, _ = learned_from(loss, world)
    for user in range(1, 7):
        expected = REFERENCE[name].value(
            world.user(user, sets.items[user - 1].tolist()), {**SMALL[name], **settings}
        )
        assert value[user - 1].item() == pytest.approx(expected, rel=1e-5), user
    if sets.overlap is not None:  # a share of the listed items, not of K
        first = set(world.teacher.top_k(torch.tensor([2]), 5, False)[0].tolist()) - {0}
        assert sets.overlap[1] == len(first & set(world.lists().student_top(5)[1].tolist())) / 2


def test_a_short_list_leaves_the_pool_of_rrd_whole() -> None:
    # 9 of 30 items are listed: all may be drawn as interesting, none as uninteresting, though 5
    # uninteresting are wanted.
    world = short_world(dict.fromkeys(range(1, 7), 9))
    loss = make_loss("rrd")
    drawn: set[int] = set()
    listed = world.teacher.top_k(torch.tensor([1]), 9, True)[0].tolist()
    for seed in range(200):
        row = loss.select(world.lists(torch.tensor([1]), seed)).items[0].tolist()
        drawn |= set(row[:4])
        assert not set(row[4:]) & set(listed)
    assert drawn | {0} == set(listed) | {0}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_teacher_that_lists_all_items_is_no_other_teacher(
    case: tuple[str, dict[str, Any]],
) -> None:
    loss = make_loss(case[0], **case[1])
    for found, expected in zip(
        learned_from(loss, short_world(dict.fromkeys(range(1, 7), 30))),
        learned_from(loss, make_world()),
        strict=True,
    ):
        if isinstance(found, ItemSets):
            assert isinstance(expected, ItemSets)
            assert torch.equal(found.items, expected.items)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_settings_class_and_weight(case: Case) -> None:
    weighted = dataclasses.replace(case.loss.settings, **{f"{case.name}_weight": 0.25})
    assert type(case.loss)(weighted).weight == 0.25
    assert case.loss.closure_sets(case.sets) is None or case.name in ("rce", "srce", "ce")
    assert case.loss.item_side() is None


def test_unknown_loss() -> None:
    with pytest.raises(
        Exception, match=r"\[kd_loss\] names 'rcee', which is not a loss. Did you mean \[rce\]\?"
    ):
        find_loss("rcee")
    with pytest.raises(Exception, match="scratch"):
        find_loss("zzzzz")
