"""Losses over the whole catalogue that hold only a block of the scores in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_rcekd.core.functional import at_least_float32

# Scores in a block. On a CPU 8 MB of float32, which stay in its cache: four times as fast as blocks
# of 50 MB. On a GPU 128 MB, because there fewer calls are faster.
_CELLS = {"cpu": 2_000_000}
_CELLS_ELSEWHERE = 32_000_000


def catalogue_cross_entropy(
    scores: Tensor, items: Tensor, weights: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Cross-entropy of a few weighted items with a normaliser over all items.

    .. math:: \ell = \sum_k w_k \Big[\log\sum_{j\ge 1} e^{s_j/\tau} - s_{i_k}/\tau\Big]

    Args:
        scores: ``[B, N]``; column 0 is padding, and the score of a masked item is −∞.
        items: ``[B, K]``; 0 for no item, whose weight does not count.
        weights: w, ``[B, K]``, without gradient; they need not sum to 1.
        temperature: τ.

    Returns:
        ``[B]``; 0 for a row without items.
    """
    found: Tensor = _CatalogueCrossEntropy.apply(  # type: ignore[no-untyped-call]
        scores, items.long(), weights, temperature
    )
    return found


class _CatalogueCrossEntropy(torch.autograd.Function):
    """One pass forwards and one back.

    Autograd would copy the scores for each slice, division and lookup.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, items: Tensor, weights: Tensor, temperature: float
    ) -> Tensor:
        catalogue = scores[:, 1:] if temperature == 1.0 else scores[:, 1:] / temperature
        log_shares = catalogue.log_softmax(1)
        weights = weights.detach().masked_fill(items == 0, 0.0)
        ctx.save_for_backward(log_shares, items, weights)
        ctx.temperature = temperature
        surprise = log_shares.gather(1, (items - 1).clamp(min=0)).masked_fill(items == 0, 0.0)
        return -(weights * surprise).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_shares, items, weights = ctx.saved_tensors
        weights = weights * (grad / ctx.temperature).unsqueeze(1)
        slope = log_shares.new_empty(len(log_shares), log_shares.shape[1] + 1)
        slope[:, 0] = 0.0
        torch.exp(log_shares, out=slope[:, 1:])
        slope.mul_(weights.sum(1, keepdim=True)).scatter_add_(1, items, -weights)
        return slope, None, None, None


def sum_over_blocks(
    rows: Tensor,
    table: Tensor,
    losses: Callable[[Tensor, Tensor], Tensor],
    weights: Tensor | None = None,
) -> Tensor:
    """Σ_r weights_r losses_r, where the scores are the product ``rows @ table.T``.

    Value and gradient are computed together, block by block. Memory holds one block of scores and
    one gradient of the table. Every score is computed once; checkpointing would compute it again in
    the backward pass.

    Args:
        rows: ``[B, d]``.
        table: ``[N, d]``; row 0 is padding, whose score is −∞ and whose gradient here is 0.
        losses: a function of ``(scores [b, N], positions [b])``, the scores of a block and the
            positions of its rows among the B, which returns the block's losses ``[b]``.
        weights: ``[B]``; default: 1.

    Returns:
        A scalar.
    """
    # Only the model computes in half precision.
    with torch.autocast(rows.device.type, enabled=False):
        found: Tensor = _SumOverBlocks.apply(
            at_least_float32(rows), at_least_float32(table), losses, weights
        )  # type: ignore[no-untyped-call]
    return found


class _SumOverBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        table: Tensor,
        losses: Callable[[Tensor, Tensor], Tensor],
        weights: Tensor | None,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        total = rows.new_zeros(())
        of_rows, of_table = (torch.zeros_like(x) if wanted else x for x in (rows, table))
        at_a_time = max(1, _CELLS.get(rows.device.type, _CELLS_ELSEWHERE) // len(table))
        for places in torch.split(torch.arange(len(rows), device=rows.device), at_a_time):
            block = rows[places]
            scores = block @ table.t()
            scores[:, 0] = -torch.inf
            with torch.set_grad_enabled(wanted):
                scores.requires_grad_(wanted)
                found = losses(scores, places)
                value = (found if weights is None else found * weights[places]).sum()
            total += value.detach()
            if wanted:
                (slope,) = torch.autograd.grad(value, scores)
                slope[:, 0] = 0.0
                of_rows[places] = slope @ table
                of_table.addmm_(slope.t(), block)
        ctx.slopes = of_rows, of_table
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_rows, of_table = ctx.slopes
        return grad * of_rows, grad * of_table, None, None
