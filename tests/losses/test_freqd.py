from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses import FreqDLoss, freqd
from recbole_rcekd.losses.freqd import FreqDSettings, neighbour_graph
from tests.reference.freqd import CASES, as_sets, neighbours, value
from tests.tables import seen_of

# Users 1 and 2 share two items, 2 and 3 one; user 4 is alone, user 5 has nothing.
PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 3), (4, 4)]
SEEN = seen_of(PAIRS, 6, 6)


def random_seen(n_users: int, n_items: int, n: int) -> Seen:
    draw = torch.Generator().manual_seed(0)
    # Squared: some are popular.
    users, items = ((torch.rand(n, generator=draw) ** 2 * m).long() + 1 for m in (n_users, n_items))
    return Seen.from_pairs(users, items, n_users + 1, n_items + 1)


def build(
    seen: Seen, widths: tuple[int, int] = (3, 5), seed: int = 7, **settings: Any
) -> FreqDLoss:
    loss = FreqDLoss(FreqDSettings(**settings))
    torch.manual_seed(0)
    loss.build(*widths, seen, torch.Generator().manual_seed(seed))
    return loss.double()


def vectors(loss: FreqDLoss, side: str, ids: list[int], weights: Tensor | None = None) -> Vectors:
    """Random embeddings of these ids and of all others that are needed."""
    draw = torch.Generator().manual_seed(len(side))
    needed = loss.needed(side, torch.tensor(ids, dtype=torch.int64))
    student, teacher = (
        torch.randn(99, d, generator=draw, dtype=torch.float64)[needed] for d in (3, 5)
    )
    weights = torch.ones(len(ids), dtype=torch.float64) if weights is None else weights
    return Vectors(needed, student.requires_grad_(), teacher, weights)


# -- the graph -------------------------------------------------------------------------------------


def test_graph_by_hand() -> None:
    assert as_sets(neighbour_graph(SEEN, 1)) == [set(), {2}, {1, 3}, {2}, set(), set()]
    # Items 1 and 2 have the users {1, 2}, item 3 has {2, 3}; each chooses one, of equals the first.
    assert as_sets(neighbour_graph(SEEN.transposed(), 1)) == [set(), {2, 3}, {1}, {1}, set(), set()]
    assert as_sets(neighbour_graph(SEEN.transposed(), 2)) == [
        set(),
        {2, 3},
        {1, 3},
        {1, 2},
        set(),
        set(),
    ]


def test_no_user_is_its_own_neighbour() -> None:
    # User 1 shares as many items with user 2 as with itself. To drop the best one would drop one of
    # the two by chance.
    graph = neighbour_graph(seen_of([(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)], 4, 4), 3)
    assert as_sets(graph) == [set(), {2}, {1, 3}, {2}]


@pytest.mark.parametrize("k", [0, 1, 5, 60])
@pytest.mark.parametrize("cells", [1, 300, 10**9])
def test_graph_equals_the_slow_version(monkeypatch: pytest.MonkeyPatch, cells: int, k: int) -> None:
    monkeypatch.setattr(freqd, "_COUNTED_CELLS", cells)
    seen = random_seen(40, 60, 300)
    for side in (seen, seen.transposed()):
        found = neighbour_graph(side, k)
        assert found.n_ids == len(side.starts) - 1
        assert as_sets(found) == neighbours(as_sets(side), k)


def test_graph_without_interactions() -> None:
    graph = neighbour_graph(Seen.nothing(4, 9), 5)
    assert graph.counts().tolist() == [0, 0, 0, 0]


# -- the loss --------------------------------------------------------------------------------------


def test_by_hand() -> None:
    # Only users 1 and 2 are joined: H = ½ [[1, 1], [1, 1]]. The student projects to 0.
    loss = build(seen_of([(1, 1), (2, 1)], 3, 2), (1, 1), freqd_sides="users", freqd_keep=1.0)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.zero_()
    assert loss.needed("users", torch.tensor([2])).tolist() == [2, 1]

    def of(ids: list[int], teacher: list[float], weights: list[float]) -> float:
        table = torch.tensor([teacher], dtype=torch.float64).t()
        return loss.forward(
            Vectors(torch.tensor(ids), table, table, torch.tensor(weights)), None
        ).item()

    assert of([2, 1], [3.0, 5.0], [1.0]) == pytest.approx(4**2)
    assert of([1, 2], [3.0, 5.0], [1.0, 1.0]) == pytest.approx(4**2 + 4**2)
    assert of([1, 2], [3.0, 5.0], [1.0, 0.5]) == pytest.approx(4**2 + 4**2 / 2)
    # The filter removes what neighbours do not have in common.
    assert of([1, 2], [3.0, -3.0], [1.0, 1.0]) == pytest.approx(0.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_equals_the_slow_version(settings: dict[str, Any], training: bool) -> None:
    seen = random_seen(20, 30, 60)
    loss = build(seen, freqd_neighbours=2, **settings)
    loss.train(training)
    users = vectors(loss, "users", [3, 1, 17, 20])
    items = vectors(
        loss,
        "items",
        [9, 2, 30, 5, 1],
        torch.tensor([1.0, 0.5, 0.5, 1.0, 0.5], dtype=torch.float64),
    )
    start = loss.generator.get_state()
    choices: list[tuple[Vectors | None, Vectors | None]] = [
        (users, items),
        (users, None),
        (None, items),
    ]
    for sides in choices:
        loss.generator.set_state(start)
        found = loss.forward(*sides)
        assert found.shape == ()
        loss.generator.set_state(start)
        assert found.item() == pytest.approx(value(*sides, loss), rel=1e-10)


@pytest.mark.parametrize("normalise", [False, True])
def test_gradient(normalise: bool) -> None:
    loss = build(
        random_seen(20, 30, 60), freqd_sides="users", freqd_normalise=normalise, freqd_projectors=2
    )
    users = vectors(loss, "users", [3, 1, 17, 20])
    start = loss.generator.get_state()

    def forward(student: Tensor, *parts: Tensor) -> Tensor:
        loss.generator.set_state(start)
        return loss.forward(Vectors(users.ids, student, users.teacher, users.weights), None)

    assert torch.autograd.gradcheck(forward, (users.student, *loss.parameters()))
    forward(users.student).backward()  # type: ignore[no-untyped-call]
    assert users.student.grad is not None
    assert users.student.grad[users.n :].any()  # neighbours learn too


def test_without_a_filter_neighbours_do_not_count() -> None:
    loss = build(SEEN, freqd_alpha=0.0, freqd_dropout=0.0)
    users = vectors(loss, "users", [1, 3])
    projector: Any = loss.projectors["of_users"]
    projected = projector.second(projector.first(users.student[:2]).relu())
    expected = (projected - users.teacher[:2]).square().sum()
    torch.testing.assert_close(loss.forward(users, None), expected)


def test_a_user_without_neighbours_keeps_a_share_of_itself() -> None:
    # Users 4 and 5 have no neighbours: H is (1 − α) there.
    loss = build(SEEN, freqd_alpha=0.25, freqd_dropout=0.0)
    users = vectors(loss, "users", [4, 5])
    assert users.ids.tolist() == [4, 5]
    bare = build(SEEN, freqd_alpha=0.0, freqd_dropout=0.0)
    torch.testing.assert_close(loss.forward(users, None), 0.75**2 * bare.forward(users, None))


def test_the_drawn_filter_is_right_on_average() -> None:
    loss = build(random_seen(6, 9, 20), freqd_neighbours=2, freqd_keep=0.3)
    users = vectors(loss, "users", [1, 2, 3, 4, 5, 6])

    def dense(of: FreqDLoss) -> Tensor:
        starts, columns, entries = of._drawn_filter(of.graphs["users"], users)
        rows = torch.arange(len(columns)).unsqueeze(1).ge(starts).sum(1) - 1
        return torch.zeros(6, 6).index_put_((rows, columns), entries.float(), accumulate=True)

    mean = torch.stack([dense(loss) for _ in range(3000)]).mean(0)
    whole = dense(build(random_seen(6, 9, 20), freqd_neighbours=2, freqd_keep=1.0))
    assert torch.equal(whole, whole.t())
    torch.testing.assert_close(mean, whole, atol=0.03, rtol=0)


def test_dropout_is_right_on_average() -> None:
    loss = build(SEEN, freqd_dropout=0.4)
    dropped = loss._dropped(torch.full((200, 100), 3.0))
    assert dropped.mean().item() == pytest.approx(3.0, abs=0.1)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 5.0])


def test_a_network_of_several_is_their_mean() -> None:
    wide: Any = build(SEEN, freqd_projectors=3, freqd_sides="users").projectors["of_users"]
    x = torch.randn(4, 3, dtype=torch.float64)
    hidden = (3 + 5) // 2
    each = []
    for e in range(3):
        part = slice(e * hidden, (e + 1) * hidden)
        unit = (x @ wide.first.weight[part].t() + wide.first.bias[part]).relu()
        each.append(unit @ (3 * wide.second.weight[:, part]).t() + wide.second.bias)
    torch.testing.assert_close(wide.second(wide.first(x).relu()), torch.stack(each).mean(0))


def test_which_embeddings_are_needed() -> None:
    loss = build(SEEN, freqd_neighbours=1)
    assert loss.needed("users", torch.tensor([3, 1])).tolist() == [3, 1, 2]
    assert loss.needed("users", torch.tensor([2, 3, 1])).tolist() == [2, 3, 1]
    assert loss.needed("items", torch.tensor([1])).tolist() == [1, 2, 3]
    assert loss.needed("users", torch.tensor([5], dtype=torch.int64)).tolist() == [5]
    assert loss.needed("users", torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_a_batch_without_users() -> None:
    loss = build(SEEN)
    value = loss.forward(vectors(loss, "users", []), vectors(loss, "items", [1]))
    torch.testing.assert_close(value, build(SEEN).forward(None, vectors(loss, "items", [1])))
    assert loss.forward(vectors(loss, "users", []), None).item() == 0.0


@pytest.mark.parametrize("normalise", [False, True])
def test_embeddings_of_zeros(normalise: bool) -> None:
    loss = build(SEEN, freqd_normalise=normalise)
    users = vectors(loss, "users", [1, 2, 4])
    student = torch.zeros_like(users.student).requires_grad_()
    found = loss.forward(
        Vectors(users.ids, student, torch.zeros_like(users.teacher), users.weights), None
    )
    found.backward()  # type: ignore[no-untyped-call]
    assert found.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_only_what_is_learned_is_kept() -> None:
    assert set(build(SEEN, freqd_sides="items").state_dict()) == {
        f"projectors.of_items.{layer}.{kind}"
        for layer in ("first", "second")
        for kind in ("weight", "bias")
    }
    assert set(build(SEEN, freqd_sides="items").graphs) == {"items"}
    assert set(build(SEEN).graphs) == {"users", "items"}
