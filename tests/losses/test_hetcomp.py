from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.types import ItemSets, Seen, TeacherScores
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.hetcomp import HetCompLoss, HetCompSettings, discrepancy, most_important
from tests.reference.hetcomp import easy, hard
from tests.tables import Golden, Table, make_world, ranking_of, relative_error

LN = math.log
CPU = torch.device("cpu")


def make_loss(objective: str = "dynamic", **settings: Any) -> HetCompLoss:
    return HetCompLoss(HetCompSettings.from_mapping({"hetcomp_objective": objective, **settings}))


# --- the formulas ---------------------------------------------------------------------------------


def test_by_hand() -> None:
    # Item 1 is a training item that was drawn, with e^s = 3, item 2 one that was not. Then come ten
    # items of the top-K and two others.
    scores = torch.zeros(1, 15, dtype=torch.float64)
    scores[0, [0, 2]], scores[0, 1] = 9.0, LN(3)
    sets = ItemSets(
        torch.tensor([[1, *range(3, 13)]]),
        seen=Seen.from_pairs(torch.zeros(2), torch.tensor([1, 2]), 1, 15),
    )
    found = make_loss(hetcomp_top_k=10).forward(scores, sets)
    assert found.item() == pytest.approx(2 * (LN((3 + 2) / 3) + 10 * LN(1 + 2)), abs=1e-12)
    # Five in order above the other five and the two others; the best one above the other nine and
    # the two others.
    found = make_loss("hard", hetcomp_top_k=10).forward(scores, sets)
    five = LN(12) + LN(11) + LN(10) + LN(9) + LN(8)
    assert found.item() == pytest.approx(LN((3 + 7) / 3) + (five + LN(12)) / 2, abs=1e-12)


@pytest.mark.parametrize("objective", ["easy", "hard"])
def test_equals_the_slow_version(objective: str) -> None:
    student = torch.randn(20, 41, dtype=torch.float64) * 2
    order = 1 + torch.stack([torch.randperm(40) for _ in range(20)])
    for width in (20, 13, 0):  # how many of the top-20 there are
        items = torch.nn.functional.pad(
            torch.cat([order[:, :2], order[:, 5 : 5 + width]], 1), (0, 20 - width)
        )
        rows = torch.arange(20).repeat_interleave(5)
        seen = Seen.from_pairs(rows, order[:, :5].flatten(), 20, 41)
        found = make_loss(objective, hetcomp_top_k=20).forward(student, ItemSets(items, seen=seen))
        for row in range(20):
            top = [item for item in items[row, 2:].tolist() if item]
            known = (student[row].tolist(), items[row, :2].tolist(), top, order[row, :5].tolist())
            expected = 2 * easy(*known) if objective == "easy" else hard(*known, 20)
            assert found[row].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("objective", "factor"), [("easy", 2), ("hard", 1)])
def test_authors_numbers(golden: Golden, objective: str, factor: int) -> None:
    # https://github.com/woriazzc/RCEKD, commit 771322a, class HetComp. The recorded value lacks the
    # factor 2.
    users = golden.batch()
    items = torch.cat([golden.ids("hetcomp_pos"), golden.ids("hetcomp_top")], 1)[users]
    sets = ItemSets(items, seen=golden.seen().among(users))
    user_table, item_table = (
        golden.table(f"student_{side}").requires_grad_() for side in ("user", "item")
    )
    value = (
        make_loss(objective, hetcomp_top_k=20)
        .forward(user_table[users] @ item_table.t(), sets)
        .sum()
        / factor
    )
    torch.autograd.backward(value)
    assert relative_error(value.detach(), golden.arrays[f"hetcomp_{objective}_loss_sum"]) < 1e-10
    for table, side in ((user_table, "user"), (item_table, "item")):
        assert table.grad is not None
        assert not table.grad[0].any()  # padding
        assert (
            relative_error(table.grad[1:], golden.arrays[f"hetcomp_{objective}_grad_{side}"])
            < 1e-10
        )


@pytest.mark.parametrize("objective", ["easy", "hard"])
def test_scores_of_more_than_40_still_teach(objective: str) -> None:
    # The authors cut scores at 40, which stops the gradient, and subtract exponentials, which loses
    # small terms.
    scores = torch.tensor(
        [[0.0, 50.0, *(100.0 - place for place in range(10)), 98.0]], requires_grad=True
    )
    sets = ItemSets(
        torch.arange(1, 12).unsqueeze(0), seen=Seen.from_pairs(torch.zeros(1), torch.ones(1), 1, 13)
    )
    (gradient,) = torch.autograd.grad(
        make_loss(objective, hetcomp_top_k=10).forward(scores, sets).sum(), scores
    )
    assert (gradient[0, [1, 2, 12]].abs() > 1e-3).all()


def test_no_item_remains_below_the_top_k() -> None:
    # Ten unseen items, all of them in the top-K.
    scores = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    sets = ItemSets(
        torch.arange(1, 12).unsqueeze(0), seen=Seen.from_pairs(torch.zeros(1), torch.ones(1), 1, 12)
    )
    for objective, expected in (
        ("easy", 0.0),
        ("hard", hard(scores[0].tolist(), [1], list(range(2, 12)), [1], 10)),
    ):
        value = make_loss(objective, hetcomp_top_k=10).forward(scores, sets)
        assert value.item() == pytest.approx(expected, abs=1e-12)
        assert torch.autograd.grad(value.sum(), scores)[0].isfinite().all()


def test_training_items_are_required() -> None:
    with pytest.raises(ValueError, match="seen"):
        make_loss().forward(torch.zeros(1, 2), ItemSets(torch.ones(1, 1).long()))


# --- how far rankings are from each other, and what they agree on ---------------------------------


def gain(place: int) -> float:
    return 2 ** math.exp(-place / 10) - 1


def test_discrepancy_by_hand() -> None:
    target = torch.tensor([[7, 8, 9], [7, 8, 0], [7, 8, 9], [0, 0, 0], [7, 8, 9]])
    student = torch.tensor([[7, 8, 9, 1], [8, 1, 7, 0], [1, 2, 3, 4], [1, 2, 3, 4], [9, 7, 8, 1]])
    ideal = [
        gain(1) / 1 + gain(2) / math.log2(3),
        gain(1) + gain(2) / math.log2(3) + gain(3) / math.log2(4),
    ]
    expected = [
        0.0,
        1 - (gain(2) / 1 + gain(1) / math.log2(4)) / ideal[0],
        1.0,
        0.0,
        1 - (gain(3) + gain(1) / math.log2(3) + gain(2) / math.log2(4)) / ideal[1],
    ]
    torch.testing.assert_close(
        discrepancy(student, target), torch.tensor(expected), rtol=1e-5, atol=1e-6
    )


def test_most_important_by_hand() -> None:
    # e^(−.1) + e^(−.3) > 2 e^(−.2) > e^(−.1) > e^(−.3): item 5, then 6, then 7. 0 is no item.
    rankings = [
        torch.tensor([[5, 6, 0], [0, 0, 0], [4, 0, 0]]),
        torch.tensor([[7, 6, 5], [0, 0, 0], [0, 4, 0]]),
    ]
    found = most_important(rankings, 4)
    assert found.tolist() == [[5, 6, 7, 0], [0, 0, 0, 0], [4, 0, 0, 0]]
    assert most_important(rankings, 2).tolist() == [[5, 6], [0, 0], [4, 0]]
    # Positions so low that their weight is 0 in float32.
    late = [torch.arange(1, 3001).unsqueeze(0), torch.arange(3000, 0, -1).unsqueeze(0)]
    assert sorted(most_important(late, 3000)[0].tolist()) == list(range(1, 3001))


# --- which checkpoint teaches a user --------------------------------------------------------------


class History:
    """One student after another with the same teachers."""

    def __init__(
        self, trajectories: Sequence[Sequence[TeacherScores]], seen: Seen, n_items: int
    ) -> None:
        self.trajectories, self.seen, self.n_items = trajectories, seen, n_items

    def candidates(self, student: Tensor, epoch: int, users: Tensor) -> Candidates:
        student = student.clone()
        student[:, 0] = -torch.inf
        teacher = self.trajectories[0][-1]
        draw = torch.Generator().manual_seed(epoch)
        return Candidates(
            users,
            teacher,
            ranking_of(student),
            self.seen,
            draw,
            trajectories=self.trajectories,
            epoch=epoch,
        )


def random_history(n_states: Sequence[int], n_users: int = 12, n_items: int = 60) -> History:
    seen = Seen.from_pairs(
        torch.arange(n_users + 1), torch.arange(1, n_users + 2), n_users + 1, n_items + 1
    )
    draw = torch.Generator().manual_seed(1)
    tables = [
        [torch.randn(n_users + 1, n_items + 1, generator=draw) for _ in range(n)] for n in n_states
    ]
    return History([[Table(table, seen) for table in states] for states in tables], seen, n_items)


def slow_rule(
    history: History, students: Sequence[Tensor], interval: int, alpha: float
) -> list[list[list[int]]]:
    """The checkpoint of each user and teacher after each epoch, by the published rule."""
    n_users = len(students[0])
    stage = [[0] * len(history.trajectories) for _ in range(n_users)]
    stored: dict[tuple[int, int], float] = {}

    def apart(user: int, student: Tensor, state: TeacherScores) -> float:
        one = torch.tensor([user])
        own = Table(student, history.seen).top_k(one, 50, True)[0].tolist()
        target = state.top_k(one, 50, True)[0].tolist()
        ideal = sum(gain(k + 1) / math.log2(k + 2) for k, item in enumerate(target) if item)
        return 1 - sum(
            gain(target.index(item) + 1) / math.log2(k + 2)
            for k, item in enumerate(own)
            if item in target and item
        ) / (ideal)

    after = []
    for epoch, student in enumerate(students):
        if epoch and epoch % interval == 0:
            for user in range(1, n_users):
                for m, states in enumerate(history.trajectories):
                    v, key = stage[user][m], (user, m)
                    if v == len(states) - 1:
                        continue
                    now = apart(user, student, states[v + 1])
                    if key not in stored:
                        stored[key] = now
                    elif (
                        stored[key] / now > alpha * 0.995 ** (epoch // interval)
                        or stored[key] / now < 1
                    ):
                        stage[user][m] = v + 1
                        if v + 2 < len(states):
                            stored[key] = apart(user, student, states[v + 2])
        after.append([list(row) for row in stage])
    return after


@pytest.mark.parametrize("alpha", [1.05, 1.1])
def test_the_published_rule(alpha: float) -> None:
    history = random_history([3, 4])
    draw = torch.Generator().manual_seed(2)
    students, student = [], torch.randn(13, 61, generator=draw)
    for _ in range(31):  # the student changes slowly, as in training
        student = student + 0.25 * torch.randn(13, 61, generator=draw)
        students.append(student)
    expected = slow_rule(history, students, 2, alpha)
    loss = make_loss(hetcomp_interval=2, hetcomp_alpha=alpha, hetcomp_top_k=10)
    loss.prepare(13, CPU)
    users, hard_at = torch.arange(1, 13), []
    for epoch, student in enumerate(students):
        for part in torch.split(users, 5):
            sets = loss.select(history.candidates(student, epoch, part))
            for row, user in enumerate(part.tolist()):
                rankings = [
                    history.trajectories[m][v].top_k(torch.tensor([user]), 10, True)
                    for m, v in enumerate(expected[epoch][user])
                ]
                assert sets.items[row, 1:].tolist() == most_important(rankings, 10)[0].tolist()
                assert sets.items[row, 0] == user + 1  # the only training item
        assert loss.stage[1:].tolist() == expected[epoch][1:]
        if loss.hard:
            hard_at.append(epoch)
    # All users have reached the last checkpoints: from here on the loss learns the order.
    first = min(e for e in range(31) if all(row == [2, 3] for row in expected[e][1:]))
    assert hard_at == list(range(first, 31))
    # Not all users get there at the same time, or the test would show little.
    assert 0 < sum(row == [2, 3] for row in expected[first - 1][1:]) < 12


def test_when_a_user_goes_on() -> None:
    """One user, whose discrepancy from the second checkpoint falls, stays or grows."""
    seen = Seen.from_pairs(torch.tensor([1]), torch.tensor([60]), 2, 61)
    target = torch.zeros(2, 61)
    target[1] = -torch.arange(61.0)  # 1, 2, 3, …
    history = History([[Table(-target, seen), Table(target, seen)]], seen, 60)

    def student(first: int) -> Tensor:
        """A ranking that begins with ``first`` and goes round."""
        scores = torch.zeros(2, 61)
        scores[1, 1:] = -((torch.arange(60.0) - first + 1) % 60)
        return scores

    far, near, user = student(20), student(2), torch.tensor([1])
    for later, moves in ((far, False), (near, True), (student(30), True)):
        loss = make_loss(hetcomp_top_k=10)
        loss.prepare(2, CPU)
        stages = []
        for epoch, now in (
            (0, far),
            (3, near),
            (8, far),
            (9, near),
            (15, near),
            (16, later),
            (17, later),
        ):
            loss.select(history.candidates(now, epoch, user))
            stages.append(int(loss.stage[1, 0]))
        # The rankings are compared in epochs 8 and 16: 8 remembers, 16 decides.
        assert stages == [0, 0, 0, 0, 0, int(moves), int(moves)]
        assert loss.hard == moves
    # With an unchanged ranking the user goes on when α·0.995^n has fallen below 1:
    # 1.05·0.995^9 > 1 > 1.05·0.995^10.
    loss = make_loss(hetcomp_top_k=10)
    loss.prepare(2, CPU)
    found = []
    for look in range(1, 11):
        loss.select(history.candidates(far, 8 * look, user))
        found.append(int(loss.stage[1, 0]))
    assert found == [0] * 9 + [1]


def test_a_user_goes_on_if_the_student_agrees_entirely() -> None:
    history = random_history([2])
    loss = make_loss(hetcomp_top_k=10)
    loss.prepare(13, CPU)
    for epoch in (0, 8, 16):
        loss.select(
            history.candidates(
                history.trajectories[0][1].score_all(torch.arange(13)), epoch, torch.arange(1, 13)
            )
        )
        assert loss.hard == (epoch == 16)


def test_a_second_comparison_in_one_epoch_counts_once() -> None:
    """The diagnostics of a sequential student compare a second time."""
    history, users = random_history([3]), torch.arange(1, 13)
    loss = make_loss(hetcomp_top_k=10, hetcomp_interval=1)
    loss.prepare(13, CPU)
    loss.select(history.candidates(torch.randn(13, 61), 1, users))
    better = history.trajectories[0][1].score_all(torch.arange(13))
    loss.select(history.candidates(better, 1, users))
    assert not loss.stage.any()
    loss.select(history.candidates(better, 2, users))
    assert loss.stage[1:].all()


def test_checkpoints_are_left_unchanged() -> None:
    """The authors' port overwrites the first checkpoint's top items with those in use."""
    history = random_history([3])
    loss = make_loss(hetcomp_top_k=10, hetcomp_interval=1)
    loss.prepare(13, CPU)
    users = torch.arange(1, 13)
    before = [state.top_k(users, 50, True).clone() for state in history.trajectories[0]]
    for epoch in range(8):
        loss.select(history.candidates(torch.randn(13, 61), epoch, users))
    assert loss.hard
    for state, top in zip(history.trajectories[0], before, strict=True):
        assert torch.equal(state.top_k(users, 50, True), top)
    # Nor are all users cut to the shortest history: each has its own training items.
    assert torch.equal(
        loss.select(history.candidates(torch.randn(13, 61), 9, users)).items[:, 0], users + 1
    )


def test_selection() -> None:
    world = make_world()
    loss = make_loss(hetcomp_top_k=20)
    loss.prepare(7, CPU)
    items = loss.select(world.lists()).items
    assert items.shape == (6, 22)
    for row in range(6):
        seen = {row + 1, 2 * (row + 1), 3 * (row + 1)}
        assert set(items[row, :2].tolist()) < seen
        assert not set(items[row, 2:].tolist()) & {0, *seen}
    assert torch.equal(items[:, 2:], world.earlier[0].top_k(torch.arange(1, 7), 20, True))


def test_a_new_training_begins_with_the_first_checkpoint() -> None:
    history, users = random_history([2]), torch.arange(1, 13)
    loss = make_loss(hetcomp_top_k=10, hetcomp_interval=1)
    for _ in range(2):
        loss.prepare(13, CPU)
        assert not loss.hard
        for epoch in range(13):
            loss.select(history.candidates(torch.randn(13, 61), epoch, users))
        assert loss.hard


def test_without_earlier_checkpoints() -> None:
    history = random_history([1])
    alone = history.candidates(torch.randn(13, 61), 0, torch.arange(1, 13))
    nothing = Candidates(
        alone.contexts,
        history.trajectories[0][0],
        ranking_of(torch.zeros(13, 61)),
        history.seen,
        alone.generator,
    )
    for candidates in (alone, nothing):
        loss = make_loss(hetcomp_top_k=10)
        loss.prepare(13, CPU)
        with pytest.raises(ValueError, match="earlier checkpoints"):
            loss.select(candidates)


# --- settings -------------------------------------------------------------------------------------


def test_checkpoints_are_a_list_of_files() -> None:
    for given in ("a.pth, b.pth", ["a.pth", "b.pth"], ("a.pth", "b.pth")):
        loss = make_loss(hetcomp_checkpoints=given)
        assert loss.checkpoints == ["a.pth", "b.pth"]
    for wrong in (5, [1, 2], None):
        with pytest.raises(
            SettingsError,
            match=re.escape(f"[hetcomp_checkpoints] is {wrong!r}, but must be a list"),
        ):
            make_loss(hetcomp_checkpoints=wrong)


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    history, users, file = random_history([4, 3]), torch.arange(1, 13), tmp_path / "learned.pth"
    students = [torch.randn(13, 61) for _ in range(30)]
    loss = make_loss(hetcomp_top_k=10, hetcomp_interval=1)
    loss.prepare(13, CPU)
    stages, hard = [], []
    for epoch, student in enumerate(students):
        loss.select(history.candidates(student, epoch, users))
        stages.append(loss.stage.clone())
        hard.append(loss.hard)
        if epoch in (2, 25):
            torch.save(loss.state_dict(), file.with_suffix(f".{epoch}"))
    assert stages[2].any()
    assert hard.index(True) < 25
    for stopped in (2, 25):
        resumed = make_loss(hetcomp_top_k=10, hetcomp_interval=1)
        resumed.prepare(13, CPU)
        resumed.load_state_dict(torch.load(file.with_suffix(f".{stopped}"), weights_only=True))
        for epoch in range(stopped + 1, 30):
            resumed.select(history.candidates(students[epoch], epoch, users))
            assert torch.equal(resumed.stage, stages[epoch])
            assert resumed.hard == hard[epoch]


def test_a_saved_state_of_other_data_is_refused() -> None:
    loss, other = make_loss(), make_loss()
    loss.prepare(5, CPU)
    other.prepare(6, CPU)
    with pytest.raises(RuntimeError, match="has 5 users or rows, but this training has 6"):
        other.load_state_dict(loss.state_dict())
