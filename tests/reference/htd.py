"""HTD by loops: cosines to group means, cosines inside groups, and DE's loss (KDD 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from recbole_rcekd.core.types import Vectors
from recbole_rcekd.losses import HTDLoss
from tests.reference import de
from tests.reference.fitnet import affine
from tests.reference.ftd import batch_rows, cosine

Rows = Sequence[Sequence[float]]


def mean(rows: Rows) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def among_groups(student: Rows, teacher: Rows, groups: Sequence[int]) -> float:
    total = 0.0
    for group in set(groups):
        members = [a for a in range(len(groups)) if groups[a] == group]
        ours, theirs = mean([student[a] for a in members]), mean([teacher[a] for a in members])
        for a in range(len(groups)):
            total += (cosine(teacher[a], theirs) - cosine(student[a], ours)) ** 2
    return total


def within_groups(student: Rows, teacher: Rows, groups: Sequence[int]) -> float:
    total = 0.0
    for a in range(len(groups)):
        for b in range(len(groups)):
            alike = cosine(teacher[a], teacher[b])
            if groups[a] == groups[b] and alike > 0:
                total += (alike - cosine(student[a], student[b])) ** 2
    return total


# --- for tests/losses/test_embedding_contract.py ---
SMALL: dict[str, Any] = {}
CASES: list[dict[str, Any]] = [{"htd_groups": 2}, {"htd_groups": 4, "htd_alpha": 0.9}]
WEIGHTED = False  # pairs
CONSTANTS = True  # the means of the groups


def value(users: Vectors | None, items: Vectors | None, loss: HTDLoss) -> float:
    groups = []
    once: list[Vectors | None] = []
    for side, vectors in (("users", users), ("items", items)):
        if vectors is None:
            once.append(None)
            continue
        once.append(dataclasses.replace(vectors, weights=torch.ones(vectors.n)))
        gate: Any = loss.assignment.gates[f"of_{side}"]
        for row in vectors.teacher.tolist()[: vectors.n]:
            logits = affine(row, gate.weight.tolist(), gate.bias.tolist())
            groups.append((side, logits.index(max(logits))))
    numbers = [sorted(set(groups)).index(group) for group in groups]
    student, teacher = batch_rows(users, items)
    topology = among_groups(student, teacher, numbers) + within_groups(student, teacher, numbers)
    alpha = loss.settings.htd_alpha
    return alpha * topology + (1 - alpha) * de.value(once[0], once[1], loss.assignment)
