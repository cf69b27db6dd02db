"""HetComp for one user, with exponentials of plain numbers (WWW 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.types import ItemSets
from tests.tables import User


def easy(
    student: Sequence[float], positives: Sequence[int], top: Sequence[int], seen: Iterable[int]
) -> float:
    rest = sum(
        math.exp(student[item]) for item in range(1, len(student)) if item not in {*seen, *top}
    )
    loss = 0.0
    for item in [*positives, *top]:
        loss -= math.log(math.exp(student[item]) / (math.exp(student[item]) + rest))
    return loss


def in_order(student: Sequence[float], head: Sequence[int], rest: float) -> float:
    loss = 0.0
    for k, item in enumerate(head):
        below = sum(math.exp(student[other]) for other in head[k:])
        loss -= math.log(math.exp(student[item]) / (below + rest))
    return loss


def hard(
    student: Sequence[float],
    positives: Sequence[int],
    top: Sequence[int],
    seen: Iterable[int],
    k: int,
) -> float:
    unseen = [item for item in range(1, len(student)) if item not in set(seen)]
    half, tenth = top[: k // 2], top[: k // 10]
    not_half = sum(math.exp(student[item]) for item in unseen if item not in half)
    not_tenth = sum(math.exp(student[item]) for item in unseen if item not in tenth)
    return in_order(student, positives, not_half) + 0.5 * (
        in_order(student, half, not_half) + in_order(student, tenth, not_tenth)
    )


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"hetcomp_top_k": 20}
CASES: list[dict[str, Any]] = [
    {"hetcomp_objective": objective} for objective in ("dynamic", "hard")
]


def support(settings: Mapping[str, Any], sets: ItemSets) -> Tensor:
    """The unseen items, and the positives that were drawn."""
    assert sets.seen is not None
    counts = torch.ones(6, 31, dtype=torch.bool)
    counts[sets.seen.cells(torch.arange(6))] = False
    counts.scatter_(1, sets.items[:, :2].long(), True)
    counts[:, 0] = False
    return counts


def value(user: User, settings: Mapping[str, Any]) -> float:
    # At the beginning, the first checkpoint teaches.
    top = [int(i) for i in user.world.earlier[0].top_k(torch.tensor([user.id]), 20, True)[0] if i]
    positives = [item for item in user.items[:2] if item]
    if settings.get("hetcomp_objective") == "hard":
        return hard(user.student, positives, top, user.seen, 20)
    return 2 * easy(user.student, positives, top, user.seen)
