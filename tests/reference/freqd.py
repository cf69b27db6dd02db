"""FreqD with dense matrices and loops (arXiv 2411.10676)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses import FreqDLoss
from tests.reference.ftd import cosine

Rows = Sequence[Sequence[float]]


def neighbours(has: Sequence[set[int]], k: int) -> list[set[int]]:
    """For each user the others that it chose or that chose it, given the items of each."""
    near: list[set[int]] = [set() for _ in has]
    for one in range(len(has)):
        shared = [(-len(has[one] & has[other]), other) for other in range(len(has)) if other != one]
        for count, other in sorted(shared)[:k]:
            if count < 0:
                near[one].add(other)
                near[other].add(one)
    return near


def as_sets(seen: Seen) -> list[set[int]]:
    return [
        set(seen.cells(torch.tensor([context]))[1].tolist())
        for context in range(len(seen.starts) - 1)
    ]


def project(row: Sequence[float], projector: nn.Module, kept: Sequence[float]) -> list[float]:
    """Two layers; ``kept`` is what each hidden unit is multiplied by."""
    first: Any = projector.first
    second: Any = projector.second
    out: list[float] = second.bias.tolist()
    for unit, weights in enumerate(first.weight.tolist()):
        total = first.bias.tolist()[unit]
        for x, weight in zip(row, weights, strict=True):
            total += x * weight
        for d, column in enumerate(second.weight.tolist()):
            out[d] += kept[unit] * max(total, 0.0) * column[unit]
    return out


def distance(
    near: Sequence[dict[int, float]], student: Rows, teacher: Rows, cosines: bool
) -> list[float]:
    """Of each row of a filter, which is given as entries by column."""
    found = []
    for row in near:
        left, right = [0.0] * len(teacher[0]), [0.0] * len(teacher[0])
        for column, entry in row.items():
            for d in range(len(left)):
                left[d] += entry * student[column][d]
                right[d] += entry * teacher[column][d]
        found.append(1.0 - cosine(left, right) if cosines else math.dist(left, right) ** 2)
    return found


def filter_rows(
    vectors: Vectors, graph: Sequence[set[int]], alpha: float, kept: Tensor, keep: float
) -> list[Any]:
    """H for the batch, with columns by positions among the embeddings.

    ``kept`` says for each entry in turn whether it stays.
    """
    ids: list[int] = vectors.ids.tolist()
    draws = iter(kept.tolist())
    rows = []
    for place in range(vectors.n):
        row = {place: 1.0 - alpha}
        for other in sorted(graph[ids[place]]):
            if next(draws):
                row[ids.index(other)] = (
                    alpha / keep / math.sqrt(len(graph[ids[place]]) * len(graph[other]))
                )
        rows.append(row)
    return rows


# --- for tests/losses/test_embedding_contract.py ---
SMALL: dict[str, Any] = {"freqd_neighbours": 2}
CASES: list[dict[str, Any]] = [
    {},
    {"freqd_normalise": True, "freqd_alpha": 0.2},
    {"freqd_projectors": 3, "freqd_keep": 1.0, "freqd_dropout": 0.0},
]


def value(users: Vectors | None, items: Vectors | None, loss: FreqDLoss) -> float:
    """In training it draws from the loss's generator what the loss would draw."""
    s, total = loss.settings, 0.0
    keep, share = (s.freqd_keep, 1.0 - s.freqd_dropout) if loss.training else (1.0, 1.0)

    def drawn(share: float, *shape: int) -> Tensor:
        return (
            torch.rand(shape, generator=loss.generator) < share
            if loss.training
            else torch.ones(shape) > 0
        )

    for side, vectors in (("users", users), ("items", items)):
        if vectors is None:
            continue
        graph = as_sets(loss.graphs[side])
        n_entries = sum(len(graph[i]) for i in vectors.ids.tolist()[: vectors.n])
        rows = filter_rows(vectors, graph, s.freqd_alpha, drawn(keep, n_entries), keep)
        used = sorted({column for row in rows for column in row})
        projector: Any = loss.projectors[f"of_{side}"]
        units = drawn(share, len(used), projector.first.out_features)
        projected = [[0.0] * vectors.teacher.shape[1]] * len(vectors.ids)
        for column, kept_units in zip(used, units.tolist(), strict=True):
            projected[column] = project(
                vectors.student[column].tolist(), projector, [k / share for k in kept_units]
            )
        found = distance(rows, projected, vectors.teacher.tolist(), s.freqd_normalise)
        for weight, each in zip(vectors.weights.tolist(), found, strict=True):
            total += weight * each
    return total
