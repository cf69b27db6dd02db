"""What every loss on embeddings promises, whatever its formula.

``tests/reference/<name>.py`` has ``SMALL``: settings that fit a batch of a few users and items;
``CASES``: what to try beyond them; and ``value(users, items, loss)``: the slow formula in float64.
It reads the learned parameters from the loss and repeats its draws (the loss's generator is in the
state that it had before ``forward``; the loss is in evaluation mode, without dropout). These are
there only if they differ from the default:

* ``WEIGHTED``: False if the weights of rows do not count, as in losses of pairs;
* ``CONSTANTS``: True if something computed from the student's embeddings has no gradient, so that
  the gradient is not that of the value.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.types import Vectors
from recbole_rcekd.losses import LOSSES as ALL_LOSSES
from recbole_rcekd.losses import EmbeddingLoss
from tests.tables import make_world

LOSSES: dict[str, type[EmbeddingLoss]] = {
    name: loss for name, loss in ALL_LOSSES.items() if issubclass(loss, EmbeddingLoss)
}
REFERENCE: dict[str, Any] = {
    name: importlib.import_module(f"tests.reference.{name}") for name in LOSSES
}
SIDES = ("users", "items")
# name of the loss, what differs from SMALL, which sides
Setting = tuple[str, dict[str, Any], str]
CASES: list[Setting] = [
    (name, settings, sides)
    for name in LOSSES
    for settings in REFERENCE[name].CASES
    for sides in ("both", *SIDES)
]
N_USERS, N_ITEMS = 12, 30
STUDENT_WIDTH, TEACHER_WIDTH = 3, 5
# No repeats. Item 7 is positive and negative, the others are one of the two.
BATCH = {"users": torch.tensor([2, 3, 5, 8, 11]), "items": torch.tensor([1, 4, 7, 9, 15, 16, 30])}
WEIGHTS = {"users": torch.ones(5), "items": torch.tensor([0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5])}


class Case:
    """A loss, and the embeddings of a batch in float64."""

    def __init__(
        self,
        setting: Setting,
        seed: int = 0,
        widths: tuple[int, int] = (STUDENT_WIDTH, TEACHER_WIDTH),
    ) -> None:
        self.name, settings, sides = setting
        loss_type = LOSSES[self.name]
        given = {**REFERENCE[self.name].SMALL, **settings, f"{self.name}_sides": sides}
        self.loss = loss_type(loss_type.settings_type(**given))
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.loss.build(*widths, make_world(N_USERS, N_ITEMS).seen, self.generator)
        self.loss.double().eval()
        self.loss.begin_epoch(0.0)
        self._state = self.generator.get_state()
        draw = torch.Generator().manual_seed(99)
        self.student, self.teacher = (
            {
                side: torch.randn(n + 1, width, generator=draw, dtype=torch.float64)
                for side, n in (("users", N_USERS), ("items", N_ITEMS))
            }
            for width in widths
        )
        self.batch, self.weights = (
            dict(BATCH),
            {side: weights.double() for side, weights in WEIGHTS.items()},
        )

    def vectors(self, side: str) -> Vectors | None:
        """As the distiller makes them."""
        if side not in self.loss.sides:
            return None
        ids = self.loss.needed(side, self.batch[side])
        return Vectors(ids, self.student[side][ids], self.teacher[side][ids], self.weights[side])

    def value(self, users: Vectors | None = None, items: Vectors | None = None) -> Tensor:
        """The loss of the batch, or of what is given instead; always with the same draws."""
        self.rewind()
        return self.loss.forward(users or self.vectors("users"), items or self.vectors("items"))

    def rewind(self) -> None:
        self.generator.set_state(self._state)

    def gradients(self, of: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The gradients by these tables of the student or the teacher."""
        for table in of.values():
            table.requires_grad_()
        value = self.value()
        found: tuple[Tensor | None, ...] = (None,) * len(of)
        if value.requires_grad:
            found = torch.autograd.grad(
                value, list(of.values()), allow_unused=True, materialize_grads=False
            )
        for table in of.values():
            table.requires_grad_(False)
        return dict(zip(of, found, strict=True))


def case_id(setting: Setting) -> str:
    name, settings, sides = setting
    return "-".join(
        [
            name,
            *(f"{key.removeprefix(f'{name}_')}={value}" for key, value in settings.items()),
            sides,
        ]
    )


@pytest.fixture(params=CASES, ids=case_id)
def setting(request: pytest.FixtureRequest) -> Setting:
    found: Setting = request.param
    return found


@pytest.fixture
def case(setting: Setting) -> Case:
    return Case(setting)


def test_every_loss_is_here() -> None:
    assert LOSSES
    assert {name for name, _, _ in CASES} == set(LOSSES)
    for name, loss_type in LOSSES.items():
        assert [key for key in loss_type.settings_type.keys() if key.endswith("_sides")] == [
            f"{name}_sides"
        ]


def test_a_scalar(case: Case) -> None:
    value = case.value()
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value.isfinite()
    assert value > 0


@pytest.mark.parametrize("widths", [(STUDENT_WIDTH, TEACHER_WIDTH), (5, 3), (4, 4)], ids=str)
def test_equals_the_slow_version(setting: Setting, widths: tuple[int, int]) -> None:
    case = Case(setting, widths=widths)
    for progress in (0.0, 0.1, 1.0):
        case.loss.begin_epoch(progress)
        found = case.value()
        case.rewind()
        expected = REFERENCE[case.name].value(
            case.vectors("users"), case.vectors("items"), case.loss
        )
        assert isinstance(expected, float)
        assert found.item() == pytest.approx(expected, rel=1e-9), progress


def test_the_gradient_is_that_of_the_value(case: Case) -> None:
    if getattr(REFERENCE[case.name], "CONSTANTS", False):
        pytest.skip("something has no gradient on purpose")
    tables = [case.student[side].requires_grad_() for side in case.loss.sides]
    parameters = list(case.loss.parameters())
    # value() reads the perturbed tensors again.
    assert torch.autograd.gradcheck(lambda *_: case.value(), (*tables, *parameters))


def test_only_the_embeddings_of_the_batch_and_its_neighbours_get_a_gradient(case: Case) -> None:
    of_student = case.gradients(case.student)
    for side in SIDES:
        gradient = of_student[side]
        if side not in case.loss.sides:
            assert gradient is None
            continue
        assert gradient is not None
        touched = gradient.any(1).nonzero().squeeze(1).tolist()
        needed = set(case.loss.needed(side, case.batch[side]).tolist())
        assert touched
        assert set(touched) <= needed
        assert 0 not in needed
    assert list(case.gradients(case.teacher).values()) == [None, None]


def test_all_its_parts_are_learned(case: Case) -> None:
    if not list(case.loss.parameters()):
        pytest.skip("it has none")
    torch.autograd.backward(case.value())
    for name, part in case.loss.named_parameters():
        assert part.grad is not None, name
        assert part.grad.any(), name


def test_those_in_the_batch_come_first(case: Case) -> None:
    for side in case.loss.sides:
        ids = case.loss.needed(side, case.batch[side])
        assert torch.equal(ids[: len(case.batch[side])], case.batch[side])
        assert len(torch.unique(ids)) == len(ids)


def test_the_order_of_rows_does_not_matter(case: Case) -> None:
    value, gradients = case.value(), case.gradients(case.student)
    if not torch.equal(case.generator.get_state(), case._state):
        pytest.skip("each row has draws of its own")
    for side in SIDES:
        order = torch.randperm(len(case.batch[side]), generator=torch.Generator().manual_seed(4))
        case.batch[side], case.weights[side] = case.batch[side][order], case.weights[side][order]
    torch.testing.assert_close(case.value(), value)
    mixed = case.gradients(case.student)
    for side in case.loss.sides:
        torch.testing.assert_close(mixed[side], gradients[side])


def test_both_sides_are_the_sum_of_each(setting: Setting) -> None:
    """Not for losses of pairs, which also have pairs of a user and an item."""
    if setting[2] != "both" or not getattr(REFERENCE[setting[0]], "WEIGHTED", True):
        pytest.skip("nothing to add up")
    case = Case(setting)
    total = case.value()
    parts = []
    case.rewind()
    for side in SIDES:  # one after the other, so that the draws are the same
        given = {other: case.vectors(other) if other == side else None for other in SIDES}
        parts.append(case.loss.forward(given["users"], given["items"]))
    torch.testing.assert_close(sum(parts, torch.zeros((), dtype=torch.float64)), total)


def test_rows_count_by_their_weights(case: Case) -> None:
    if not getattr(REFERENCE[case.name], "WEIGHTED", True):
        pytest.skip("pairs are counted, not rows")
    ones = dict(case.weights)
    value = case.value()
    # The loss is linear in the weights.
    case.weights = {side: 1.5 * weights for side, weights in ones.items()}
    torch.testing.assert_close(case.value(), 1.5 * value)
    # Row by row, the parts make up the whole.
    parts = []
    for side in case.loss.sides:
        for place in range(len(ones[side])):
            case.weights = {name: torch.zeros_like(weights) for name, weights in ones.items()}
            case.weights[side][place] = ones[side][place]
            parts.append(case.value())
            assert parts[-1] > 0
    torch.testing.assert_close(torch.stack(parts).sum(), value)


@pytest.mark.parametrize("empty", [("users",), ("items",), SIDES], ids="+".join)
def test_an_empty_side(case: Case, empty: tuple[str, ...]) -> None:
    for side in empty:
        case.batch[side], case.weights[side] = case.batch[side][:0], case.weights[side][:0]
    value = case.value()
    assert value.isfinite()
    gradients = case.gradients(case.student)
    for side in case.loss.sides:
        gradient = gradients[side]
        assert gradient is None or gradient.isfinite().all()
    if set(case.loss.sides) <= set(empty):
        assert value == 0


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
@pytest.mark.parametrize("rows", ["one", "all"])
def test_embeddings_of_zeros(case: Case, zero: str, rows: str) -> None:
    for tables in [case.student, case.teacher] if zero == "both" else [getattr(case, zero)]:
        for side in SIDES:
            tables[side][case.batch[side][1:2] if rows == "one" else slice(None)] = 0.0
    assert case.value().isfinite()
    gradients = [g for g in case.gradients(case.student).values() if g is not None]
    parts = [part for part in case.loss.parameters()]
    gradients += (
        [g for g in torch.autograd.grad(case.value(), parts, allow_unused=True) if g is not None]
        if parts
        else []
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_same_seed_makes_the_same_parts_and_another_others(setting: Setting) -> None:
    first, second, other = Case(setting), Case(setting), Case(setting, seed=1)
    parts = first.loss.state_dict()
    assert parts.keys() == second.loss.state_dict().keys()
    assert all(torch.equal(part, second.loss.state_dict()[name]) for name, part in parts.items())
    assert torch.equal(first.value(), second.value())
    for name, part in first.loss.named_parameters():
        assert not torch.equal(part, other.loss.state_dict()[name]), name


def test_parts_can_be_kept(setting: Setting) -> None:
    one, other = Case(setting), Case(setting, seed=1)
    other.loss.load_state_dict(one.loss.state_dict())
    one._state = other._state  # the same draws
    assert torch.equal(one.value(), other.value())


def test_in_training_all_draws_come_from_the_generator(setting: Setting) -> None:
    """RecBole's own random stream (batch order, dropout) is left alone."""
    case = Case(setting)
    case.loss.train()
    before = torch.get_rng_state()
    first, second = case.value(), case.value()
    assert torch.equal(before, torch.get_rng_state())
    assert first.isfinite()
    assert torch.equal(first, second)


def test_in_the_precision_of_the_model(case: Case) -> None:
    exact = case.value()
    case.loss.float()
    for tables in (case.student, case.teacher, case.weights):
        for side in SIDES:
            tables[side] = tables[side].float()
    found = case.value()
    assert found.dtype == torch.float32
    if torch.equal(case.generator.get_state(), case._state):
        assert found.item() == pytest.approx(exact.item(), rel=1e-4)


def test_settings_class_and_weight(case: Case) -> None:
    weighted = dataclasses.replace(case.loss.settings, **{f"{case.name}_weight": 0.25})
    assert type(case.loss)(weighted).weight == 0.25
