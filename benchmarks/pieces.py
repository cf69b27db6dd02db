"""What the parts cost: a list refresh and a KD step in pieces, ours against the plain way, on random tables.

python benchmarks/pieces.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from tabulate import tabulate
from torch import Tensor

from recbole_rcekd.functional import draw_without_replacement, is_member, picked_products
from recbole_rcekd.ranking import CELLS_AT_A_TIME, top_k

SIZES = {"citeulike-t, 400 -> 20": (25182, 400, 20, 109, 150), "gowalla, 300 -> 20": (40982, 300, 20, 75, 250)}


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    rows = []
    for name, (n_items, d_teacher, d_student, batch, listed) in SIZES.items():
        for piece, plain, ours in pieces(n_items, d_teacher, d_student, batch, listed):
            slow, fast = milliseconds(plain), milliseconds(ours)
            rows.append([name, piece, f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.1f}"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); medians, milliseconds")
    print(tabulate(rows, ["sizes", "piece", "plain", "here", "times faster"], tablefmt="github", disable_numparse=True))


def pieces(
    n_items: int, d_teacher: int, d_student: int, batch: int, listed: int
) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """(what, the plain way, ours), each for 256 users or one step."""
    users, items = torch.randn(256, d_student), torch.randn(n_items, d_student)
    teacher_users, teacher_items = torch.randn(256, d_teacher), torch.randn(n_items, d_teacher)
    sets = torch.randint(1, n_items, (256, listed))
    generator = torch.Generator().manual_seed(0)
    block = max(1, CELLS_AT_A_TIME // n_items)

    def blocked_lists() -> list[Tensor]:
        return [top_k(part @ items.t(), 200) for part in torch.split(users, block)]

    def gathered() -> Tensor:
        return torch.bmm(teacher_items[sets], teacher_users.unsqueeze(2))

    step_users, step_items = users[:batch].clone().requires_grad_(), items.clone().requires_grad_()
    step_sets = sets[:batch]

    def plain_step() -> None:
        picked = torch.nn.functional.embedding(step_sets, step_items)
        torch.bmm(picked, step_users.unsqueeze(2)).sum().backward()

    def our_step() -> None:
        picked_products(step_users, step_items, step_sets).sum().backward()

    pool, weights = torch.randint(1, n_items, (256, 200)), torch.randn(256, 200)
    return [
        ("student top-200 of 256 users", lambda: (users @ items.t()).topk(200), blocked_lists),
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
        (f"scores of a KD step ({batch} users), with gradients", plain_step, our_step),
    ]


def milliseconds(function: Callable[[], object], repeats: int = 15) -> float:
    """Median of some repeats, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        started = perf_counter()
        function()
        times.append((perf_counter() - started) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
