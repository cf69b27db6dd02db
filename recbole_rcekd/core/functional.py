"""Pure tensor mathematics shared by the losses and the item sets.

Everything stays in log space, is vectorised over rows, takes its randomness as an argument and
never builds a users × items or a rows × K × M tensor.

>>> import torch
>>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 5.0]])
>>> soft_cross_entropy(student, teacher)  # two items, both sides indifferent: ln 2
tensor([0.6931])
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Up to so many numbers, a copy of the picked table rows is made once and serves both directions: 8
# MB of float32.
_KEPT_CELLS = 2_000_000
# Cells gathered at a time where there is no product without gathering: 256 MB of float32.
_GATHERED_CELLS = 64_000_000


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision up to float32: a log-softmax over item scores loses its small terms below that."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit_rows(x: Tensor) -> Tensor:
    """The rows of ``x [n, d]`` at length 1, in float32 or better; one shorter than 1e-8 is divided by that, so 0 stays 0."""
    return torch.nn.functional.normalize(at_least_float32(x), dim=-1, eps=1e-8)


def masked_log_softmax(scores: Tensor, keep: Tensor | None = None) -> Tensor:
    r"""``log softmax`` over the last axis, counting only the kept entries.

    Args:
        scores: ``[..., K]``.
        keep: bool ``[..., K]``; entries that do not count return 0, so that a product with a zero
            weight is 0.

    Returns:
        ``[..., K]``; a row that keeps nothing is all 0, and a NaN that was in a kept score stays
        visible.
    """
    scores = at_least_float32(scores)
    if keep is None:
        return scores.log_softmax(-1)
    # The dtype's own minimum instead of -inf: a row without any kept entry then has a finite
    # gradient (0).
    filled = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    return filled.log_softmax(-1).masked_fill(~keep, 0.0)


def masked_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Probabilities of the kept entries of the last axis, 0 elsewhere; of a row that keeps nothing 0, with a gradient of 0."""
    scores = at_least_float32(scores)
    return (
        scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~keep, 0.0)
    )


def soft_cross_entropy(
    student_scores: Tensor,
    teacher_scores: Tensor,
    keep: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Cross-entropy between the teacher's and the student's softmax over one item set.

    .. math:: -\sum_{i\in J} \sigma_J(t/\tau)_i \, \log \sigma_J(s/\tau)_i

    Args:
        student_scores: ``[..., K]``, with gradient.
        teacher_scores: ``[..., K]``, no gradient is taken.
        keep: bool ``[..., K]``, the set J (``None``: all K).
        temperature: τ > 0, divides both scores; no τ² factor (authors' code @ 771322a).

    Returns:
        ``[...]``, one loss per row; 0 for a row with an empty set.
    """
    whole = student_scores.shape[-1]
    result: Tensor = _MixedCrossEntropy.apply(
        student_scores, teacher_scores, keep, None, whole, temperature
    )  # type: ignore[no-untyped-call]
    return result


def mixed_cross_entropy(
    student_scores: Tensor,
    teacher_scores: Tensor,
    first: int,
    gamma: Tensor,
    keep: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Two item sets side by side, each with its own softmax: ``(1 − γ)·CE(first columns) + γ·CE(the others)``.

    Args:
        student_scores: ``[..., K]``, with gradient.
        teacher_scores: ``[..., K]``, no gradient is taken.
        first: how many columns the first set has.
        gamma: γ, ``[...]``.
        keep: bool ``[..., K]``, which columns count (``None``: all).
        temperature: τ > 0, as in :func:`soft_cross_entropy`.

    Returns:
        ``[...]``.
    """
    result: Tensor = _MixedCrossEntropy.apply(
        student_scores, teacher_scores, keep, gamma, first, temperature
    )  # type: ignore[no-untyped-call]
    return result


class _MixedCrossEntropy(torch.autograd.Function):
    """The gradient is p − q, a subtraction; autograd would take some thirty steps to it, in every training step."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        keep: Tensor | None,
        gamma: Tensor | None,
        first: int,
        temperature: float,
    ) -> Tensor:
        ctx.given_dtype = student.dtype
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        if temperature != 1.0:
            student, teacher = student / temperature, teacher / temperature
        if gamma is None:
            loss, ctx.slope = _cross_entropy_and_slope(student, teacher, keep)
        else:
            gamma = gamma.to(student.dtype)
            (on_first, slope), (on_rest, slope_of_rest) = (
                _cross_entropy_and_slope(
                    student[..., s], teacher[..., s], None if keep is None else keep[..., s]
                )
                for s in (slice(first), slice(first, None))
            )
            loss = torch.lerp(on_first, on_rest, gamma)
            gamma = gamma.unsqueeze(-1)
            ctx.slope = torch.cat([slope.mul_(1.0 - gamma), slope_of_rest.mul_(gamma)], dim=-1)
        ctx.temperature = temperature
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope = ctx.slope * (grad / ctx.temperature).unsqueeze(-1)
        return slope.to(ctx.given_dtype), None, None, None, None, None


def _cross_entropy_and_slope(
    student: Tensor, teacher: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, and its derivative by the student's scores."""
    if keep is None:
        q = teacher.softmax(-1)
        return -(q * student.log_softmax(-1)).sum(-1), student.softmax(-1).sub_(q)
    # The dtype's own minimum instead of -inf: a row that keeps nothing stays finite, and gives 0.
    left_out, kept = ~keep, keep.to(student.dtype)
    student = student.masked_fill(left_out, torch.finfo(student.dtype).min)
    q = teacher.masked_fill(left_out, torch.finfo(teacher.dtype).min).softmax(-1).mul_(kept)
    # A second softmax is faster than exp of the first: exp is slow where it underflows.
    return -(q * student.log_softmax(-1)).sum(-1), student.softmax(-1).mul_(kept).sub_(q)


def plackett_luce(
    head: Tensor, tail: Tensor, head_keep: Tensor | None = None, tail_keep: Tensor | None = None
) -> Tensor:
    r"""Negative log-likelihood of picking the head in its order before anything of the tail.

    .. math:: \sum_k \Big[\log\Big(\sum_{k'\ge k} e^{h_{k'}} + \sum_l e^{r_l}\Big) - h_k\Big]

    Args:
        head: scores ``[..., K]`` in the order to be learned, best first.
        tail: scores ``[..., L]`` that should all come below the head, in any order; L may be 0.
        head_keep: bool ``[..., K]``, which of the head count.
        tail_keep: bool ``[..., L]``, which of the tail count.

    Returns:
        ``[...]``, one loss per row.
    """
    head, tail = at_least_float32(head), at_least_float32(tail)
    lowest = torch.finfo(head.dtype).min
    counted = head if head_keep is None else head.masked_fill(~head_keep, lowest)
    if tail_keep is not None:
        tail = tail.masked_fill(~tail_keep, lowest)
    rest = counted.flip(-1).logcumsumexp(-1).flip(-1)
    steps = torch.logaddexp(rest, tail.logsumexp(-1, keepdim=True)) - counted
    if head_keep is not None:
        steps = steps.masked_fill(~head_keep, 0.0)
    return steps.sum(-1)


def squared_error(found: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Σ_r weights_r ‖found_r − wanted_r‖², a scalar.

    Args:
        found: ``[n, d]``.
        wanted: ``[n, d]``.
        weights: ``[n]``.
    """
    return (weights * (found - wanted).square().sum(1)).sum()


def is_member(query: Tensor, table: Tensor) -> Tensor:
    """For each row, which entries of ``query [n, q]`` occur in ``table [n, t]``: bool ``[n, q]``."""
    return places(query, table) >= 0


def places(query: Tensor, table: Tensor) -> Tensor:
    """For each row, the column of ``table [n, t]`` where each entry of ``query [n, q]`` stands, −1 where it does not.

    Of an id that stands there twice, one of its columns. One sort and one binary search per row:
    O((q + t) log t), no q × t comparison.
    """
    if table.shape[-1] == 0:
        return torch.full_like(query, -1, dtype=torch.int64)
    ordered, column = table.sort(-1)
    place = torch.searchsorted(ordered, query.contiguous()).clamp_(max=table.shape[-1] - 1)
    return column.gather(-1, place).masked_fill_(ordered.gather(-1, place) != query, -1)


def votes_from_below(voters: Tensor, inclusive: bool) -> Tensor:
    """How many voters stand below each position of a ranked list.

    Args:
        voters: bool ``[n, M]`` along a list with the best item first.
        inclusive: count a voter at the position itself too.

    Returns:
        int64 ``[n, M]``.
    """
    counts = voters.long()
    # All of them less those above: one pass, where summing from the end would need two copies.
    below = counts.sum(-1, keepdim=True) - counts.cumsum(-1)
    return below + counts if inclusive else below


def draw_without_replacement(log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Positions ``[rows, n]`` drawn without replacement, each row with probabilities ∝ exp(log_weights).

    Adding Gumbel noise and taking the n largest is the same distribution as drawing one by one
    (Vieira 2014), for all rows at once. Entries of −inf are drawn only where a row has fewer than
    ``n`` others.
    """
    uniform = torch.rand(log_weights.shape, generator=generator, device=log_weights.device)
    # An exponential variable E gives the Gumbel -log E; the clamp keeps log(0) out.
    gumbel = -(-uniform.clamp_(min=1e-20).log()).clamp_(min=1e-20).log()
    return (log_weights + gumbel).topk(n, dim=-1).indices


def first_distinct(candidates: Tensor, allowed: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first ``n`` distinct allowed candidates of each row, in their order.

    Args:
        candidates: ids ``[rows, R]`` in the order they were drawn.
        allowed: bool ``[rows, R]``.
        n: how many to take, at most R.

    Returns:
        ``ids [rows, n]`` (0 where a row ran out) and ``found [rows, n]``.
    """
    ordered, order = candidates.masked_fill(~allowed, 0).sort(dim=-1, stable=True)
    repeated = torch.zeros_like(allowed)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    usable = allowed & ~torch.zeros_like(allowed).scatter(-1, order, repeated)
    first = (~usable).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n]
    found = usable.gather(-1, first)
    return candidates.gather(-1, first).masked_fill(~found, 0), found


def count_above(scores: Tensor, all_scores: Tensor) -> Tensor:
    """How many of ``all_scores [n, N]`` are strictly above each of ``scores [n, K]``: int64 ``[n, K]``.

    One binary search per cell of the smaller side, O(N log K) a row, no argsort of N.
    """
    ordered, order = scores.sort(-1)
    # below[j] = how many of the K listed scores lie strictly below cell j; cell j is above exactly
    # those.
    below = torch.searchsorted(ordered, all_scores.contiguous(), right=False)
    k = scores.shape[-1]
    histogram = torch.zeros(*scores.shape[:-1], k + 1, dtype=torch.int64, device=scores.device)
    histogram.scatter_add_(-1, below, torch.ones_like(below))
    above = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    return torch.zeros_like(order).scatter(-1, order, above)


def ndcg_against(student_top: Tensor, teacher_top: Tensor) -> Tensor:
    """NDCG of the student's list when the teacher's list is the truth (binary gains): ``[n]``.

    Args:
        student_top: the student's best k items, best first, ``[n, k]``.
        teacher_top: the teacher's best k items, best first, ``[n, k]``; 0 where it lists fewer, but
            one at least.
    """
    k = student_top.shape[-1]
    discount = 1.0 / torch.log2(
        torch.arange(2, k + 2, dtype=torch.float32, device=student_top.device)
    )
    ideal = ((teacher_top != 0) * discount).sum(-1)
    shared = is_member(student_top, teacher_top) & (student_top != 0)
    return (shared.float() * discount).sum(-1) / ideal


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast: a step's half precision is not for the teacher's scores, and must not reach its cached lists."""
    return torch.autocast(device.type, enabled=False)


def picked_products(
    rows: Tensor, table: Tensor, items: Tensor, sparse_gradient: bool = False
) -> Tensor:
    """A few cells of a product of two tables: ``out[b, t] = rows[b] · table[items[b, t]]``.

    The same as ``(rows @ table.T).gather(1, items)`` without the other cells, with gradients for
    both tables. A training step's few cells go through a copy of the picked table rows, more cells
    through a product sampled at the cells of a sparse matrix, without any copy
    (``benchmarks/README.md`` has what that saves).

    Args:
        rows: ``[B, d]``.
        table: ``[N, d]``.
        items: ``[B, T]``, integer.
        sparse_gradient: let the gradient of ``table`` be a sparse tensor where that is less work
            than a dense one.

    Returns:
        ``[B, T]``.
    """
    if rows.dtype != table.dtype:  # under autocast, where one side comes out of a layer
        common = torch.promote_types(rows.dtype, table.dtype)
        rows, table = rows.to(common), table.to(common)
    # Autocast would change some of the products inside to half precision, and the gradient with
    # them, but not the tables.
    with full_precision(rows.device):
        result: Tensor = _PickedProducts.apply(rows, table, items.long(), sparse_gradient)  # type: ignore[no-untyped-call]
    return result


class _PickedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, table: Tensor, items: Tensor, sparse_gradient: bool
    ) -> Tensor:
        # Per number it costs about twice a dense one (docs/design.md).
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
        # A column for each row b: its product with the rows is written without another copy of
        # them.
        columns = scipy.sparse.csc_matrix(cells, shape=(n_items, len(rows)), copy=False)
        return torch.from_numpy(columns @ rows.contiguous().numpy())
    spread = (values.unsqueeze(2) * rows.unsqueeze(1)).flatten(0, 1)
    return rows.new_zeros((n_items, rows.shape[1])).index_add_(0, items.flatten(), spread)


def scores_at(starts: Tensor, items: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """FactoredBatchScores of ragged lists: row b with its own ``items[starts[b]:starts[b + 1]]``, all in one ``[n]``.

    Args:
        starts: ``[B + 1]``.
        items: ``[n]``, in any order, repeats allowed.
        rows: ``[B, d]``.
        table: ``[N, d]``.
    """
    cells = torch.sparse_csr_tensor(
        starts, items, table.new_zeros(len(items)), (len(rows), len(table)), check_invariants=False
    )
    sampled: Tensor = torch.sparse.sampled_addmm(cells, rows, table.t(), beta=0.0)
    return sampled.values()


def _hear_csr_warning() -> None:
    """Torch says once per process that compressed sparse tensors are young; no user can act on that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores_at(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros((1, 1)), torch.zeros((1, 1)))


_hear_csr_warning()
