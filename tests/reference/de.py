"""DE for the rows of a batch: a draw says how much each expert's output counts (CIKM 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch

from recbole_rcekd.core.types import Vectors
from tests.reference.fitnet import affine, squared_distance


def shares(logits: list[float], noise: list[float], temperature: float) -> list[float]:
    """exp((log α + G)/T), normalised; by differences to the best, so that nothing overflows."""
    total = sum(math.exp(x) for x in logits)
    noisy = [
        math.log(math.exp(x) / total) - math.log(e) for x, e in zip(logits, noise, strict=True)
    ]
    weights = [math.exp((x - max(noisy)) / temperature) for x in noisy]
    return [w / sum(weights) for w in weights]


# --- for tests/losses/test_embedding_contract.py ---
SMALL: dict[str, Any] = {}
CASES: list[dict[str, Any]] = [{"de_experts": n} for n in (4, 2)]


def value(users: Vectors | None, items: Vectors | None, loss: Any) -> float:
    total = 0.0
    for side, vectors in (("users", users), ("items", items)):
        if vectors is None:
            continue
        experts, gate = loss.experts[f"of_{side}"], loss.gates[f"of_{side}"]
        n, hidden = experts.n, len(experts.second) // experts.n
        noise = (
            torch.empty(vectors.n, n, dtype=torch.float64)
            .exponential_(generator=loss.generator)
            .tolist()
        )
        for row in range(vectors.n):
            s, t = vectors.student[row].tolist(), vectors.teacher[row].tolist()
            g = shares(
                affine(t, gate.weight.tolist(), gate.bias.tolist()), noise[row], loss.temperature
            )
            rebuilt = [0.0] * len(t)
            for k in range(n):
                own = slice(k * hidden, (k + 1) * hidden)
                h = [
                    max(0.0, x)
                    for x in affine(
                        s, experts.first.weight[own].tolist(), experts.first.bias[own].tolist()
                    )
                ]
                out = affine(h, experts.second[own].t().tolist(), experts.bias[k].tolist())
                rebuilt = [a + g[k] * b for a, b in zip(rebuilt, out, strict=True)]
            total += float(vectors.weights[row]) * squared_distance(rebuilt, t)
    return total
