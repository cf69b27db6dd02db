"""LambdaLoss for one user, pair by pair (CIKM 2018, with LambdaRank's weights)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.types import ItemSets
from tests.reference.ce import softmax
from tests.tables import User


def lambdaloss(
    student: Sequence[float],
    teacher: Sequence[float],
    q_t: Sequence[int],
    pool: Sequence[int],
    tau: float,
) -> float:
    gain = softmax(teacher, q_t, tau)

    def discount(item: int) -> float:
        rank = pool.index(item) + 1 if item in pool else len(pool) + 1
        return 1 / math.log2(1 + rank)

    ideal = sum(g / math.log2(2 + k) for k, g in enumerate(sorted(gain.values(), reverse=True)))
    loss = 0.0
    for i in q_t:
        for j in {*q_t, *pool}:
            more = gain[i] - gain.get(j, 0.0)
            if more > 0:
                change = more * abs(discount(i) - discount(j)) / ideal
                loss += change * math.log(1 + math.exp(student[j] - student[i]))
    return loss


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"lambdaloss_top_k": 5, "lambdaloss_pool": 8}
CASES: list[dict[str, Any]] = [{}, {"lambdaloss_temperature": 2.0}]
ORDERED = 8  # the student's top-M
BLOCKS = (8,)


def value(user: User, settings: Mapping[str, Any]) -> float:
    tau = settings.get("lambdaloss_temperature", 1.0)
    return lambdaloss(user.student, user.teacher, user.teacher_top(5), user.student_top(8), tau)


def support(settings: Mapping[str, Any], sets: ItemSets) -> Tensor:
    """An item of both top lists counts as a target."""
    both = (sets.items[:, :8].unsqueeze(2) == sets.items[:, 8:].unsqueeze(1)).any(2)
    return torch.cat([~both, sets.items[:, 8:] != 0], dim=1)
