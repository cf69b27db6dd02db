"""Dot products of rows with some rows of a table, with gradients that touch only these."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_rcekd.core.functional import full_precision

# Numbers gathered at a time where a product needs gathered rows: 256 MB of float32.
_GATHERED_CELLS = 64_000_000
# Up to this size, one copy of the picked table rows is made, for the forward and the backward pass:
# 8 MB of float32.
_KEPT_CELLS = 2_000_000


def picked_products(
    rows: Tensor, table: Tensor, items: Tensor, sparse_gradient: bool = False
) -> Tensor:
    """Some entries of a product of two tables: ``out[b, t] = rows[b] · table[items[b, t]]``.

    The same as ``(rows @ table.T).gather(1, items)`` without computing the other entries, and with
    gradients for both tables. The few entries of a training step are computed from a copy of the
    table rows that they need. More entries are computed by a product that is sampled at the entries
    of a sparse matrix, without a copy. ``benchmarks/README.md`` says what that saves.

    Args:
        rows: ``[B, d]``.
        table: ``[N, d]``.
        items: ``[B, T]``, integer.
        sparse_gradient: make the gradient of ``table`` a sparse tensor if that is less work than a
            dense one.

    Returns:
        ``[B, T]``.
    """
    if rows.dtype != table.dtype:  # under autocast, if one of them is the output of a layer
        common = torch.promote_types(rows.dtype, table.dtype)
        rows, table = rows.to(common), table.to(common)
    # Autocast would compute some of the products below, and so the gradient, in half precision,
    # but not the tables.
    with full_precision(rows.device):
        result: Tensor = _PickedProducts.apply(  # type: ignore[no-untyped-call]
            rows, table, items.long(), sparse_gradient
        )
    return result


class _PickedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, table: Tensor, items: Tensor, sparse_gradient: bool
    ) -> Tensor:
        # Per number, a sparse gradient costs about twice as much as a dense one.
        ctx.sparse = sparse_gradient and 2 * items.numel() * table.shape[1] < table.numel()
        picked = None
        if items.numel() == 0:
            products = rows.new_zeros(items.shape)
        elif items.numel() * table.shape[1] <= _KEPT_CELLS:
            picked = torch.nn.functional.embedding(items, table)
            products = torch.bmm(rows.unsqueeze(1), picked.transpose(1, 2)).squeeze(1)
        elif rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
            starts = torch.arange(0, items.numel() + 1, items.shape[1], device=items.device)
            products = scores_at(starts, items.flatten(), rows, table).view(items.shape)
        else:
            step = max(1, _GATHERED_CELLS // (items.shape[1] * table.shape[1]))
            parts = zip(torch.split(rows, step), torch.split(items, step), strict=True)
            products = torch.cat([torch.bmm(table[i], r.unsqueeze(2)).squeeze(2) for r, i in parts])
        ctx.save_for_backward(rows, table, items, picked)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, table, items, picked = ctx.saved_tensors
        if items.numel() == 0:
            return torch.zeros_like(rows), torch.zeros_like(table), None, None
        grad_rows = grad_table = None
        if ctx.needs_input_grad[0] and picked is not None:
            grad_rows = torch.bmm(grad.unsqueeze(1), picked).squeeze(1)
        elif ctx.needs_input_grad[0]:
            grad_rows = torch.nn.functional.embedding_bag(
                items, table, mode="sum", per_sample_weights=grad.contiguous()
            )
        if ctx.needs_input_grad[1] and ctx.sparse:
            spread = (grad.unsqueeze(2) * rows.unsqueeze(1)).flatten(0, 1)
            grad_table = torch.sparse_coo_tensor(
                items.view(1, -1), spread, table.shape, check_invariants=False
            )
        elif ctx.needs_input_grad[1]:
            grad_table = _transposed_product(grad, items, rows, len(table))
        return grad_rows, grad_table, None, None


def _transposed_product(values: Tensor, items: Tensor, rows: Tensor, n_items: int) -> Tensor:
    """``out[items[b, t]] += values[b, t] · rows[b]`` over all cells, ``[n_items, d]``."""
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        starts = np.arange(0, items.numel() + 1, items.shape[1], dtype=np.int32)
        cells = (
            values.contiguous().numpy().ravel(),
            items.numpy().ravel().astype(np.int32),
            starts,
        )
        # One column for each row b, so that the product needs no copy of the rows.
        columns = scipy.sparse.csc_matrix(cells, shape=(n_items, len(rows)), copy=False)
        return torch.from_numpy(columns @ rows.contiguous().numpy())
    spread = (values.unsqueeze(2) * rows.unsqueeze(1)).flatten(0, 1)
    return rows.new_zeros((n_items, rows.shape[1])).index_add_(0, items.flatten(), spread)


def scores_at(starts: Tensor, items: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """Products of each row with its own items, where each row may have another number of items.

    Args:
        starts: ``[B + 1]``; the items of row b are ``items[starts[b]:starts[b + 1]]``.
        items: ``[n]``, in any order, repeats allowed.
        rows: ``[B, d]``.
        table: ``[N, d]``.

    Returns:
        ``[n]``, in the order of ``items``.
    """
    cells = torch.sparse_csr_tensor(
        starts, items, table.new_zeros(len(items)), (len(rows), len(table)), check_invariants=False
    )
    sampled: Tensor = torch.sparse.sampled_addmm(cells, rows, table.t(), beta=0.0)
    return sampled.values()


def _hear_csr_warning() -> None:
    """Let torch give its warning about sparse CSR tensors here, where it is not shown.

    Torch warns once per process that they are in beta; no user can act on that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores_at(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros((1, 1)), torch.zeros((1, 1)))


_hear_csr_warning()
