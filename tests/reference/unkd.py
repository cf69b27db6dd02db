"""UnKD for one user: the probability of the teacher's order within pairs (WSDM 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.types import ItemSets
from tests.tables import User


def unkd(student: Sequence[float], pairs: Sequence[tuple[int, int]]) -> float:
    total = 0.0
    for better, worse in pairs:
        total -= math.log(
            math.exp(student[better]) / (math.exp(student[better]) + math.exp(student[worse]))
        )
    return total / len(pairs) if pairs else 0.0


def groups(popularity: Sequence[int], n_groups: int) -> list[int]:
    """The group of each item: the most popular first, the next group when a share is used up."""
    total, before, group = sum(popularity), 0, [n_groups - 1] * len(popularity)
    for item in sorted(range(len(popularity)), key=lambda i: -popularity[i]):
        if popularity[item]:
            group[item] = next(g for g in range(n_groups) if before * n_groups < (g + 1) * total)
        before += popularity[item]
    return group


def pair_probabilities(weights: Sequence[float]) -> dict[tuple[int, int], float]:
    """Of two independent draws that are repeated until they differ, the smaller position first."""
    likely = {
        (a, b): 2 * weights[a] * weights[b]
        for a in range(len(weights))
        for b in range(a + 1, len(weights))
    }
    return {pair: p / sum(likely.values()) for pair, p in likely.items()}


# --- for tests/losses/test_contract.py ---
SMALL: dict[str, Any] = {"unkd_groups": 2, "unkd_pairs": 5, "unkd_pool": 7}
CASES: list[dict[str, Any]] = [{"unkd_quota_power": power} for power in (0.0, 1.0)]
ORDERED = 10  # pairs of columns
ZERO = True  # a teacher that lists few items may have no two in a group


def support(settings: Mapping[str, Any], sets: ItemSets) -> Tensor:
    """A group with fewer than two items for a user has no pair."""
    pairs = (sets.items[:, :5] != 0) & (sets.items[:, 5:] != 0)
    return torch.cat([pairs, pairs], dim=1)


def value(user: User, settings: Mapping[str, Any]) -> float:
    pairs = list(zip(user.items[:5], user.items[5:], strict=True))
    assert all(bool(a) == bool(b) for a, b in pairs)
    return unkd(user.student, [(a, b) for a, b in pairs if a])
