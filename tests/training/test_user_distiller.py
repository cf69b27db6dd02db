"""Schedules, refresh, draws and diagnostics, against sums over plain loops in float64."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.closure import blockers_covered
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import KDSettings, LossSettings, setting
from recbole_rcekd.core.top_k import RowRanking
from recbole_rcekd.core.types import ItemSets, Seen
from recbole_rcekd.losses import CDLoss, CELoss, FCELoss, KDLoss, RCELoss, RRDLoss
from recbole_rcekd.losses.candidates import Candidates
from recbole_rcekd.losses.cd import CDSettings
from recbole_rcekd.losses.ce import CESettings
from recbole_rcekd.losses.dcd import DCDLoss, DCDSettings
from recbole_rcekd.losses.fce import FCESettings
from recbole_rcekd.losses.rce import RCESettings
from recbole_rcekd.losses.rrd import RRDSettings
from recbole_rcekd.losses.srce import SRCELoss, SRCESettings
from recbole_rcekd.teachers.score_tables import FactorScores
from recbole_rcekd.training.user_distiller import UserDistiller

N_USERS, N_ITEMS, WITHOUT = 23, 61, (4, 17)
USERS = [u for u in range(1, N_USERS) if u not in WITHOUT]


def interactions() -> Seen:
    """Users 1 to 22 but 4 and 17 have three items each; between them they have every item."""
    pairs = [(u, 1 + (3 * n + j) % (N_ITEMS - 1)) for n, u in enumerate(USERS) for j in range(3)]
    users, items = torch.tensor(pairs).t()
    return Seen.from_pairs(users, items, N_USERS, N_ITEMS)


def teacher_scores() -> FactorScores:
    torch.manual_seed(1)
    factors = (
        torch.randn(N_USERS, 5, dtype=torch.float64),
        torch.randn(N_ITEMS, 5, dtype=torch.float64),
    )
    return FactorScores(*factors, interactions())


class Student:
    """Two tables in float64 with the interface of a ModelScorer, which notes the scored users."""

    device = torch.device("cpu")

    def __init__(self, kind: str = "product") -> None:
        self.kind = kind
        torch.manual_seed(2)
        self.users = torch.randn(N_USERS, 4, dtype=torch.float64, requires_grad=True)
        self.items = torch.randn(N_ITEMS, 4, dtype=torch.float64, requires_grad=True)
        self.asked: list[list[int]] = []

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        self.asked.append(contexts.tolist())
        return (self.users[contexts].unsqueeze(1) * self.items[items.long()]).sum(-1)

    def operands(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        return self.users[contexts], self.items

    def score_all(self, contexts: Tensor) -> Tensor:
        padding = torch.arange(N_ITEMS) == 0
        return (self.users[contexts] @ self.items.t()).masked_fill(padding, -torch.inf)

    def ranking(self) -> RowRanking:
        return RowRanking(self.score_all, N_ITEMS)

    def score_by_item(self, items: Tensor, users: Tensor) -> Tensor:
        self.asked.append(items.tolist())
        return (self.items[items].unsqueeze(1) * self.users[users.long()]).sum(-1)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        users, items = torch.autograd.grad(loss, (self.users, self.items))
        return users, items


@dataclass(frozen=True)
class ProbeSettings(LossSettings):
    prefix = "probe"

    probe_weight: float = setting(1.0)


class Probe(KDLoss):
    """Its only candidates are the user's id and the time, so that each step shows its users."""

    settings_type = ProbeSettings

    def __init__(self, renewed: bool = True) -> None:
        super().__init__(ProbeSettings())
        self.renewed = renewed
        self.selected: list[int] = []
        self.taught: list[int] = []
        self.versions: dict[int, int] = {}
        self.epoch = 0

    def select(self, lists: Candidates) -> ItemSets:
        self.selected += lists.contexts.tolist()
        stamp = torch.full((len(lists.contexts), 1), float(self.epoch))
        return ItemSets(lists.contexts.unsqueeze(1), stamp)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        assert sets.teacher_scores is not None
        ids = sets.items[:, 0].tolist()
        self.taught += ids
        self.versions.update(zip(ids, sets.teacher_scores[:, 0].int().tolist(), strict=True))
        return student_scores[:, 0]

    def selected_in(self, distiller: UserDistiller, epoch: int) -> list[int]:
        self.epoch, self.selected = epoch, []
        distiller.begin_epoch(epoch, 3)
        return sorted(self.selected)


def make(
    loss: KDLoss, student: Student | None = None, seed: int = 5, **settings: Any
) -> UserDistiller:
    settings = {"kd_diagnostic_users": 0, **settings}
    scorer = cast(Any, student or Student())
    return UserDistiller(
        scorer, teacher_scores(), loss, KDSettings(**settings), interactions(), seed
    )


def no_batch() -> dict[str, Tensor]:
    """Who learns is planned: nobody looks into the batch."""
    return {}


# --- kd_schedule: users ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [1, 3, 7, len(USERS), 50])
def test_every_training_user_is_taught_once_per_epoch(n_steps: int) -> None:
    probe = Probe()
    distiller = make(probe)
    orders = []
    for epoch in range(3):
        probe.taught = []
        distiller.begin_epoch(epoch, n_steps)
        for _ in range(n_steps):
            distiller.step(no_batch())
        assert sorted(probe.taught) == USERS
        assert distiller.steps == n_steps
        orders.append(probe.taught)
    assert orders[0] != orders[1] != orders[2]


def test_more_steps_than_planned_go_round() -> None:
    probe = Probe()
    distiller = make(probe)
    distiller.begin_epoch(0, 4)
    for _ in range(8):
        distiller.step(no_batch())
    assert Counter(probe.taught) == Counter(USERS * 2)
    distiller.step(no_batch())
    # The third round begins like the others, with 20 / 4 users.
    assert len(set(probe.taught[-5:])) == 5


def test_steps_without_anyone_are_zero() -> None:
    distiller = make(Probe())
    distiller.begin_epoch(0, 50)
    values = [distiller.step(no_batch()) for _ in range(50)]
    assert sum(value.requires_grad for value in values) == len(USERS)
    assert [float(value.detach()) for value in values[len(USERS) :]] == [0.0] * (50 - len(USERS))


def test_a_step_is_the_mean_over_its_users() -> None:
    probe, student = Probe(), Student()
    distiller = make(probe, student)
    distiller.begin_epoch(0, 3)
    for size in (7, 7, 6):  # 20 users in 3 steps
        probe.taught = []
        # The users of the batch do not matter.
        step = distiller.step({"user_id": torch.tensor([1, 2, 3])})
        assert len(probe.taught) == size
        naive = (
            sum((student.users[u] @ student.items[u] for u in probe.taught), torch.zeros(())) / size
        )
        torch.testing.assert_close(step, naive)
        for own, expected in zip(student.gradients(step), student.gradients(naive), strict=True):
            torch.testing.assert_close(own, expected)


# --- kd_schedule: interactions --------------------------------------------------------------------


def naive_ce(student: Student, user: int, k: int) -> Tensor:
    """Cross-entropy on the teacher's top k, one term after the other."""
    row = teacher_scores().score_all(torch.tensor([user]))[0]
    top = sorted(range(1, N_ITEMS), key=lambda i: -float(row[i]))[:k]
    scores = [student.users[user] @ student.items[i] for i in top]
    normaliser = torch.stack(scores).exp().sum().log()
    weights = [math.exp(float(row[i])) for i in top]
    total = torch.zeros((), dtype=torch.float64)
    for weight, score in zip(weights, scores, strict=True):
        total = total - weight / sum(weights) * (score - normaliser)
    return total


@pytest.mark.parametrize(
    "batch",
    [
        [3, 3, 3, 5, 7, 5],
        [0, 9, 9, 0, 1],  # padding is no row
        [8],
        [2] * 6,
        list(range(1, 4)) * 3,
    ],
)
def test_interactions_is_the_mean_over_rows_of_the_batch(batch: list[int]) -> None:
    student = Student()
    distiller = make(CELoss(CESettings(ce_top_k=6)), student, kd_schedule="interactions")
    distiller.begin_epoch(0, 3)
    student.asked = []
    step = distiller.step({"user_id": torch.tensor(batch)})
    rows = [u for u in batch if u != 0]
    # Each user is scored once, however often it is in the batch.
    assert student.asked == [sorted(set(rows))]
    naive = sum((naive_ce(student, u, 6) for u in rows), torch.zeros(())) / len(rows)
    torch.testing.assert_close(step, naive)
    for own, expected in zip(student.gradients(step), student.gradients(naive), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("schedule", ["users", "interactions"])
def test_padding_and_users_without_training_items_are_never_taught(schedule: str) -> None:
    probe = Probe()
    distiller = make(probe, kd_schedule=schedule)
    distiller.begin_epoch(0, 4)
    everyone = torch.arange(N_USERS)
    for _ in range(8):
        distiller.step({"user_id": everyone})
    assert set(probe.taught) == set(probe.selected) == set(USERS)


def test_a_batch_of_nobody_is_zero() -> None:
    distiller = make(Probe(), kd_schedule="interactions")
    distiller.begin_epoch(0, 1)
    for batch in ([0, 0], [*WITHOUT], []):
        assert float(distiller.step({"user_id": torch.tensor(batch, dtype=torch.int64)})) == 0.0


# --- refresh --------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 4, 100])
def test_all_lists_at_the_start_then_each_once_in_a_period(every: int) -> None:
    probe = Probe()
    distiller = make(probe, kd_refresh_epochs=every)
    assert probe.selected_in(distiller, 0) == USERS
    for start in (1, 1 + every):
        shares = [probe.selected_in(distiller, epoch) for epoch in range(start, start + every)]
        assert sorted(user for share in shares for user in share) == USERS
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_resumed_training_starts_with_all_lists() -> None:
    probe = Probe()
    distiller = make(probe, kd_refresh_epochs=4)
    assert probe.selected_in(distiller, 6) == USERS
    assert len(probe.selected_in(distiller, 7)) == len(USERS) // 4


def test_a_step_uses_the_renewed_lists_and_keeps_the_others() -> None:
    probe = Probe()
    distiller = make(probe, kd_refresh_epochs=2)
    probe.selected_in(distiller, 0)
    renewed = probe.selected_in(distiller, 1)
    for _ in range(3):
        distiller.step(no_batch())
    assert probe.versions == {user: int(user in renewed) for user in USERS}


def test_lists_that_cannot_change_are_chosen_once() -> None:
    probe = Probe(renewed=False)
    distiller = make(probe, kd_refresh_epochs=1)
    assert probe.selected_in(distiller, 0) == USERS
    assert probe.selected_in(distiller, 1) == probe.selected_in(distiller, 2) == []


# --- draws ----------------------------------------------------------------------------------------

SAMPLING: list[KDLoss] = [
    FCELoss(FCESettings(fce_top_k=4, fce_normaliser="sampled", fce_samples=5)),
    RCELoss(RCESettings(rce_top_k=5, rce_samples=5, rce_pool=20)),
    CDLoss(CDSettings(cd_items=5, cd_pool=30)),
    RRDLoss(RRDSettings(rrd_top_k=3, rrd_rest=5, rrd_pool=20, rrd_item_weight=0.5)),
    DCDLoss(DCDSettings(dcd_items=3, dcd_pool=20, dcd_item_weight=0.5)),
]


def course(loss: KDLoss, seed: int, **settings: Any) -> list[float]:
    # For IR-RRD the "catalogue" of the item side is the users.
    distiller = make(loss, seed=seed, kd_refresh_epochs=1, **settings)
    values = []
    for epoch in range(2):
        distiller.begin_epoch(epoch, 2)
        values += [
            float(distiller.step({"user_id": torch.tensor(USERS)}).detach()) for _ in range(2)
        ]
        distiller.diagnostics()
    return values


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()  # noqa: NPY002
    return [int(word) for word in state[1]]


@pytest.mark.parametrize("loss", SAMPLING, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("schedule", ["users", "interactions"])
def test_draws_follow_the_seed_and_nothing_else(loss: KDLoss, schedule: Any) -> None:
    student = Student()
    before = random.getstate(), numpy_state(), torch.get_rng_state()
    distiller = make(loss, student, seed=5, kd_schedule=schedule, kd_diagnostic_users=3)
    torch.set_rng_state(before[2])  # the tables of this test are drawn from the global stream
    distiller.begin_epoch(0, 2)
    distiller.step({"user_id": torch.tensor(USERS)})
    distiller.begin_epoch(1, 2)
    distiller.diagnostics()
    assert random.getstate() == before[0]
    assert numpy_state() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])

    first = course(loss, 5, kd_schedule=schedule)
    random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    assert course(loss, 5, kd_schedule=schedule) == first
    assert course(loss, 6, kd_schedule=schedule) != first


# --- losses over the catalogue, and the item side -------------------------------------------------


@pytest.mark.parametrize("kind", ["product", "rows"])
@pytest.mark.parametrize("cells", [N_ITEMS, 3 * N_ITEMS, 10**6])
@pytest.mark.parametrize("target", ["teacher", "all"])
def test_an_epoch_over_the_whole_catalogue(
    target: Any, cells: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the blocks: a row, three rows, everybody."""
    monkeypatch.setattr("recbole_rcekd.core.full_softmax._CELLS", {"cpu": cells})
    monkeypatch.setattr("recbole_rcekd.training.user_distiller._SCORED_AT_A_TIME", cells)
    student = Student(kind)
    distiller = make(FCELoss(FCESettings(fce_target=target, fce_top_k=4)), student)
    distiller.begin_epoch(0, 1)
    step = distiller.step(no_batch())
    naive = torch.zeros((), dtype=torch.float64)
    for user in USERS:
        row = teacher_scores().score_all(torch.tensor([user]))[0]
        scores = student.items @ student.users[user]
        chosen = sorted(range(1, N_ITEMS), key=lambda i: -float(row[i]))[
            : 4 if target == "teacher" else None
        ]
        weights = {i: math.exp(float(row[i])) for i in chosen}
        normaliser = scores[1:].exp().sum().log()
        for i, weight in weights.items():
            naive = naive - weight / sum(weights.values()) * (scores[i] - normaliser) / len(USERS)
    torch.testing.assert_close(step, naive)
    for own, expected in zip(student.gradients(step), student.gradients(naive), strict=True):
        torch.testing.assert_close(own, expected)


def test_an_estimated_normaliser_asks_for_no_full_row_in_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = Student()
    loss = FCELoss(FCESettings(fce_top_k=4, fce_normaliser="sampled", fce_samples=N_ITEMS))
    distiller = make(loss, student)
    distiller.begin_epoch(0, 1)
    monkeypatch.setattr(distiller._sides[0], "score_all", None)
    step = distiller.step(no_batch())
    monkeypatch.undo()
    assert student.asked
    # With everything in the sample it is the exact loss all the same.
    exact = make(FCELoss(FCESettings(fce_top_k=4)), student)
    exact.begin_epoch(0, 1)
    torch.testing.assert_close(step, exact.step(no_batch()), rtol=1e-5, atol=1e-5)


def rrd(item_weight: float) -> RRDLoss:
    return RRDLoss(
        RRDSettings(
            rrd_top_k=3, rrd_rest=5, rrd_pool=20, rrd_sample=False, rrd_item_weight=item_weight
        ),
    )


def test_the_item_side_adds_its_mean_and_its_gradient() -> None:
    values: dict[float, Tensor] = {}
    gradients: dict[float, tuple[Tensor, Tensor]] = {}
    for weight in (0.0, 1.0, 2.0):
        student = Student()
        distiller = make(rrd(weight), student)
        distiller.begin_epoch(0, 1)
        step = distiller.step(no_batch())
        values[weight], gradients[weight] = step, student.gradients(step)
    torch.testing.assert_close(values[2.0] - values[1.0], values[1.0] - values[0.0])
    # The item side from scratch: who is listed for each item, and the formula on the student's
    # scores of them.
    student, by_item, owners = Student(), teacher_scores().transposed(), interactions().transposed()
    items = torch.arange(1, N_ITEMS)
    sets = rrd(0.0).select(Candidates(items, by_item, student.ranking(), owners, torch.Generator()))
    naive = rrd(0.0).forward(student.score_by_item(items, sets.items), sets).mean()
    torch.testing.assert_close(values[1.0] - values[0.0], naive)
    for total, users_only, expected in zip(
        gradients[1.0], gradients[0.0], student.gradients(naive), strict=True
    ):
        torch.testing.assert_close(total - users_only, expected)
        assert float(expected.abs().max()) > 0


def test_every_item_is_visited_once_per_epoch() -> None:
    student = Student()
    distiller = make(rrd(1.0), student)
    distiller.begin_epoch(0, 4)
    student.asked = []
    for _ in range(4):
        distiller.step(no_batch())
    users, items = student.asked[::2], student.asked[1::2]
    assert sorted(u for part in users for u in part) == USERS
    assert sorted(i for part in items for i in part) == list(range(1, N_ITEMS))


# --- diagnostics ----------------------------------------------------------------------------------


def ranking(row: Tensor) -> list[int]:
    return sorted(range(1, N_ITEMS), key=row.detach().tolist().__getitem__, reverse=True)


def test_diagnostics_against_plain_loops() -> None:
    student = Student()
    distiller = make(CELoss(CESettings(ce_top_k=6)), student, kd_diagnostic_users=1000)
    distiller.begin_epoch(0, 1)
    overlaps, ndcgs, gaps = [], [], []
    for user in USERS:
        teacher_row = teacher_scores().score_all(torch.tensor([user]))[0]
        student_row = (student.items @ student.users[user]).detach()
        theirs, mine = ranking(teacher_row), ranking(student_row)
        overlaps.append(len(set(theirs[:50]) & set(mine[:50])) / 50)
        gains = [1 / math.log2(rank + 2) for rank in range(10)]
        ndcgs.append(
            sum(g for g, item in zip(gains, mine[:10], strict=True) if item in theirs[:10])
            / sum(gains)
        )
        listed = theirs[:6]  # J = A
        mass = sum(math.exp(float(teacher_row[i])) for i in listed)
        normaliser = sum(math.exp(float(student_row[i])) for i in listed)
        gap = 0.0
        for i in listed:
            blockers = sum(
                1 for j in range(1, N_ITEMS) if j not in listed and student_row[j] > student_row[i]
            )
            share = math.exp(float(student_row[i])) / normaliser
            gap += math.exp(float(teacher_row[i])) / mass * math.log(1 + share * blockers)
        gaps.append(gap)
    found = distiller.diagnostics()
    assert set(found) == {"overlap@50", "ndcg@10_to_teacher", "closure_gap"}
    assert found["overlap@50"] == pytest.approx(sum(overlaps) / len(USERS))
    assert found["ndcg@10_to_teacher"] == pytest.approx(sum(ndcgs) / len(USERS))
    assert found["closure_gap"] == pytest.approx(sum(gaps) / len(USERS))


@pytest.mark.parametrize("terms", ["full", "no_split"])
def test_closure_of_the_samples_against_plain_loops(terms: Any) -> None:
    student = Student()
    loss = SRCELoss(
        SRCESettings(
            srce_top_k=6,
            srce_samples=5,
            srce_pool=20,
            srce_tail_samples=4,
            srce_terms=terms,
            srce_popularity_tilt=0.0,
            srce_rank_boost=0.0,
            srce_history_boost=0.0,
        )
    )
    distiller = make(loss, student, kd_diagnostic_users=1000)
    distiller.begin_epoch(0, 1)
    gaps: dict[str, list[float]] = {"closure_gap": [], "closure_gap_unsampled": []}
    pairs = covered = 0
    for user in USERS:
        teacher_row = teacher_scores().score_all(torch.tensor([user]))[0]
        student_row = (student.items @ student.users[user]).detach()
        theirs, mine = ranking(teacher_row)[:6], ranking(student_row)[:6]
        missed = [i for i in theirs if i not in mine]
        assert distiller._sides[0].sets is not None
        # Columns: Q_S (6), samples (5), Q_T (6), uniform ones (4).
        row = distiller._sides[0].sets.items[USERS.index(user)].tolist()
        drawn = row[6:11] + row[17:]
        sampled = {*missed, *drawn} | ({*mine, *theirs} if terms == "no_split" else set())
        mass = sum(math.exp(float(teacher_row[i])) for i in missed)
        for name, inside in (("closure_gap", sampled), ("closure_gap_unsampled", set(missed))):
            gap, normaliser = 0.0, sum(math.exp(float(student_row[i])) for i in inside)
            for i in missed:
                blockers = [j for j in range(1, N_ITEMS) if student_row[j] > student_row[i]]
                share = math.exp(float(student_row[i])) / normaliser
                outside = len(set(blockers) - inside)
                gap += math.exp(float(teacher_row[i])) / mass * math.log(1 + share * outside)
                if name == "closure_gap":
                    pairs += len(blockers)
                    covered += len(blockers) - outside
            gaps[name].append(gap)
    found = distiller.diagnostics()
    assert set(found) == {"gamma", "overlap@50", "ndcg@10_to_teacher", *gaps, "blockers_covered"}
    for name, values in gaps.items():
        assert found[name] == pytest.approx(sum(values) / len(USERS))
    assert found["closure_gap"] < found["closure_gap_unsampled"]
    assert found["blockers_covered"] == pytest.approx(covered / pairs)
    assert 0 < covered < pairs


def test_nothing_is_uncovered_where_nothing_is_missed() -> None:
    rows = torch.tensor([[-torch.inf, 3.0, 2.0, 1.0]])
    targets = ItemSets(torch.tensor([[1, 2]]), torch.zeros(1, 2), torch.tensor([[False, False]]))
    assert blockers_covered(targets, targets, rows) == 1.0
    # Item 1 is above item 2, and above item 3, as is item 2.
    everything = ItemSets(torch.tensor([[1, 2, 3]]))
    assert blockers_covered(everything, everything, rows) == 1.0
    assert blockers_covered(everything, ItemSets(torch.tensor([[1, 3]])), rows) == 2 / 3


def test_one_set_that_is_both_has_no_samples_to_be_judged() -> None:
    for terms, names in (
        ("l1", {"closure_gap"}),
        ("l2", {"closure_gap", "closure_gap_unsampled", "blockers_covered"}),
    ):
        settings = RCESettings(
            rce_top_k=6,
            rce_samples=5,
            rce_pool=20,
            rce_terms=terms,  # type: ignore[arg-type]
        )
        loss = RCELoss(settings)
        distiller = make(loss, kd_diagnostic_users=3)
        distiller.begin_epoch(0, 1)
        assert set(distiller.diagnostics()) == {"gamma", "overlap@50", "ndcg@10_to_teacher", *names}


class Tuned(Probe):
    """Remembers whom it was tuned on."""

    tuned = True

    def __init__(self) -> None:
        super().__init__()
        self.tuned_on: list[list[int]] = []

    def tune(self, lists: Candidates) -> None:
        assert lists.student_scores_of_all().shape == (len(lists.contexts), N_ITEMS)
        assert not self.selected or self.tuned_on
        self.tuned_on.append(lists.contexts.tolist())

    def metrics(self) -> dict[str, float]:
        return {"times": float(len(self.tuned_on))}


@pytest.mark.parametrize("watched", [0, 3])
def test_a_loss_is_tuned_on_a_few_users_before_it_lists_anything(
    watched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recbole_rcekd.training.user_distiller.TUNED_ON", 4)
    loss = Tuned()
    distiller = make(loss, kd_diagnostic_users=watched)
    for epoch in range(3):
        distiller.begin_epoch(epoch, 2)
        assert distiller.diagnostics()["times"] == epoch + 1
    assert all(len(set(users)) == 4 and set(users) <= set(USERS) for users in loss.tuned_on)
    assert len({tuple(users) for users in loss.tuned_on}) > 1


@pytest.mark.parametrize("watched", [0, 3])
def test_gamma_is_the_mean_over_all_users(watched: int) -> None:
    student = Student()
    loss = RCELoss(RCESettings(rce_top_k=5, rce_samples=5, rce_pool=20, rce_beta=2.0))
    distiller = make(loss, student, kd_diagnostic_users=watched)
    distiller.begin_epoch(0, 1)
    expected = []
    for user in USERS:
        theirs = ranking(teacher_scores().score_all(torch.tensor([user]))[0])[:5]
        mine = ranking(student.items @ student.users[user])[:5]
        expected.append(math.exp(-2.0 * len(set(theirs) & set(mine)) / 5))
    found = distiller.diagnostics()
    assert found["gamma"] == pytest.approx(sum(expected) / len(USERS))
    assert ("closure_gap" in found) == ("overlap@50" in found) == (watched > 0)


def test_the_same_users_are_watched_in_every_epoch() -> None:
    distiller = make(CELoss(CESettings(ce_top_k=6)), kd_diagnostic_users=3)
    found = []
    for epoch in range(3):
        distiller.begin_epoch(epoch, 2)
        distiller.step(no_batch())
        found.append(distiller.diagnostics())
    assert found[0] == found[1] == found[2]  # nothing was learned in between


def test_no_closure_gap_where_all_items_are_the_normaliser() -> None:
    distiller = make(FCELoss(FCESettings(fce_top_k=4)), kd_diagnostic_users=3)
    distiller.begin_epoch(0, 1)
    assert set(distiller.diagnostics()) == {"overlap@50", "ndcg@10_to_teacher"}


def test_lists_longer_than_the_catalogue_are_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"\[ce_top_k\]=61 needs a catalogue of at least 61 items, .* has 60"
    ):
        make(CELoss(CESettings(ce_top_k=61)))
    make(CELoss(CESettings(ce_top_k=60)))
