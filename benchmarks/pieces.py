"""The time of the parts of distillation on random tables, ours compared with plain torch.

python benchmarks/pieces.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import machine, median_seconds
from tabulate import tabulate
from torch import Tensor

from recbole_rcekd.core.full_softmax import catalogue_cross_entropy, sum_over_blocks
from recbole_rcekd.core.functional import draw_without_replacement, is_member, mixed_cross_entropy
from recbole_rcekd.core.products import picked_products
from recbole_rcekd.core.top_k import ProductRanking
from recbole_rcekd.losses.de import Experts

SIZES = {
    "citeulike-t, 400 -> 20": (25182, 400, 20, 109, 150),
    "gowalla, 300 -> 20": (40982, 300, 20, 75, 250),
}


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    rows = []
    for name, (n_items, d_teacher, d_student, batch, listed) in SIZES.items():
        for piece, plain, ours in pieces(n_items, d_teacher, d_student, batch, listed):
            slow, fast = median_seconds(plain) * 1e3, median_seconds(ours) * 1e3
            rows.append([name, piece, f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.1f}"])
    print(f"medians, milliseconds; {machine()}")
    print(
        tabulate(
            rows,
            ["sizes", "piece", "plain", "here", "times faster"],
            tablefmt="github",
            disable_numparse=True,
        )
    )


def pieces(
    n_items: int, d_teacher: int, d_student: int, batch: int, listed: int
) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """The name of each part, with a function in plain torch and ours; for 256 users or one step."""
    users, items = torch.randn(256, d_student), torch.randn(n_items, d_student)
    teacher_users, teacher_items = torch.randn(256, d_teacher), torch.randn(n_items, d_teacher)
    sets = torch.randint(1, n_items, (256, listed))
    generator = torch.Generator().manual_seed(0)

    def lists() -> Tensor:
        return ProductRanking(lambda contexts: users[contexts], items).top_k(torch.arange(256), 200)

    def gathered() -> Tensor:
        return torch.bmm(teacher_items[sets], teacher_users.unsqueeze(2))

    step_users, step_items = users[:batch].clone().requires_grad_(), items.clone().requires_grad_()
    step_sets, teacher_scores = sets[:batch], torch.randn(batch, listed)
    keep, gamma, k = torch.rand(batch, listed - 50) < 0.7, torch.rand(batch), 50
    keep_all = torch.cat([torch.ones(batch, k, dtype=torch.bool), keep], dim=1)

    def plain_step() -> None:
        picked = torch.nn.functional.embedding(step_sets, step_items)
        scores = torch.bmm(picked, step_users.unsqueeze(2)).squeeze(2)
        on_top = -(teacher_scores[:, :k].softmax(1) * scores[:, :k].log_softmax(1)).sum(1)
        rest, goal = (x[:, k:].masked_fill(~keep, -1e9) for x in (scores, teacher_scores))
        on_rest = -(goal.softmax(1) * rest.log_softmax(1)).sum(1)
        ((1 - gamma) * on_top + gamma * on_rest).mean().backward()

    def our_step() -> None:
        scores = picked_products(step_users, step_items, step_sets)
        mixed_cross_entropy(scores, teacher_scores, k, gamma, keep_all).mean().backward()

    target = torch.rand(batch, k).softmax(1)

    def plain_catalogue() -> None:
        scores = (step_users @ step_items.t()).masked_fill(torch.arange(n_items) == 0, -torch.inf)
        listed_scores = scores.gather(1, step_sets[:, :k])
        (scores[:, 1:].logsumexp(1) - (target * listed_scores).sum(1)).sum().backward()

    def our_catalogue() -> None:
        def losses(scores: Tensor, places: Tensor) -> Tensor:
            return catalogue_cross_entropy(scores, step_sets[places, :k], target[places])

        sum_over_blocks(step_users, step_items, losses).backward()

    experts, vectors = Experts(30, d_student, d_teacher), torch.randn(1000, d_student)
    # At a temperature of .02 nearly every row has one expert, and a few rows have more.
    shares = ((torch.randn(1000, 30) - torch.empty(1000, 30).exponential_().log()) / 0.02).softmax(
        1
    )
    shares = shares.masked_fill(shares < 1e-9, 0.0)

    def all_experts() -> None:
        hidden = experts.first(vectors).relu().unflatten(1, (30, -1)) * shares.unsqueeze(2)
        torch.addmm(
            shares @ experts.bias, hidden.flatten(1), experts.second
        ).square().sum().backward()

    def their_experts() -> None:
        experts(vectors, shares).square().sum().backward()

    pool, weights = torch.randint(1, n_items, (256, 200)), torch.randn(256, 200)
    return [
        ("student top-200 of 256 users", lambda: (users @ items.t()).topk(200), lists),
        (
            "teacher scores of their sets",
            gathered,
            lambda: picked_products(teacher_users, teacher_items, sets),
        ),
        (
            "membership, 200 in 50",
            lambda: (pool.unsqueeze(2) == pool[:, None, :50]).any(2),
            lambda: is_member(pool, pool[:, :50]),
        ),
        (
            "50 draws without replacement",
            lambda: torch.multinomial(weights.exp(), 50, generator=generator),
            lambda: draw_without_replacement(weights, 50, generator),
        ),
        (f"RCE-KD step of {batch} users, with gradients", plain_step, our_step),
        (f"CE over the catalogue of {batch} users, with gradients", plain_catalogue, our_catalogue),
        ("30 experts for 1,000 vectors, with gradients", all_experts, their_experts),
    ]


if __name__ == "__main__":
    main()
