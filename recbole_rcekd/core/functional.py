"""Tensor functions that the losses and their candidates share.

They work in log space and on all rows at once. Those that draw take a generator. None of them
builds a users × items or a rows × K × M tensor.

>>> import torch
>>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 5.0]])
>>> soft_cross_entropy(student, teacher)  # two items with equal scores: ln 2
tensor([0.6931])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision raised to float32; any other dtype unchanged.

    In half precision a log-softmax over item scores loses its small terms.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit_rows(x: Tensor) -> Tensor:
    """The rows of ``x [n, d]`` divided by their lengths, in float32 or better.

    A row shorter than 1e-8 is divided by 1e-8, so a row of zeros stays zero.
    """
    return torch.nn.functional.normalize(at_least_float32(x), dim=-1, eps=1e-8)


def masked_log_softmax(scores: Tensor, keep: Tensor | None = None) -> Tensor:
    r"""``log softmax`` over the last axis, counting only the kept entries.

    Args:
        scores: ``[..., K]``.
        keep: bool ``[..., K]``, which entries count (``None``: all). The others return 0, so that
            their product with a weight of 0 is 0.

    Returns:
        ``[..., K]``; a row that keeps nothing is all 0. A NaN in a kept score stays a NaN.
    """
    scores = at_least_float32(scores)
    if keep is None:
        return scores.log_softmax(-1)
    # The dtype's minimum instead of -inf: so a row that keeps nothing has a finite gradient (0).
    filled = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    return filled.log_softmax(-1).masked_fill(~keep, 0.0)


def masked_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the kept entries of the last axis, 0 for the others.

    A row that keeps nothing is all 0, with a gradient of 0.
    """
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
    r"""Cross-entropy between the teacher's and the student's softmax over one set of items.

    .. math:: -\sum_{i\in J} \sigma_J(t/\tau)_i \, \log \sigma_J(s/\tau)_i

    Args:
        student_scores: ``[..., K]``, with gradient.
        teacher_scores: ``[..., K]``, no gradient is taken.
        keep: bool ``[..., K]``, the set J (``None``: all K).
        temperature: τ > 0, divides both scores. There is no factor τ² (as in the authors' code,
            commit 771322a).

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
    r"""Cross-entropy on two sets of items side by side, each with its own softmax.

    The result is ``(1 − γ)·CE(first columns) + γ·CE(other columns)``.

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
    """Cross-entropy with its gradient p − q written out.

    Autograd would need some thirty operations for it, in every training step.
    """

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
    # The dtype's minimum instead of -inf: so a row that keeps nothing stays finite, and gives 0.
    left_out, kept = ~keep, keep.to(student.dtype)
    student = student.masked_fill(left_out, torch.finfo(student.dtype).min)
    q = teacher.masked_fill(left_out, torch.finfo(teacher.dtype).min).softmax(-1).mul_(kept)
    # A second softmax is faster than exp of the first: exp is slow where it underflows.
    return -(q * student.log_softmax(-1)).sum(-1), student.softmax(-1).mul_(kept).sub_(q)


def plackett_luce(
    head: Tensor, tail: Tensor, head_keep: Tensor | None = None, tail_keep: Tensor | None = None
) -> Tensor:
    r"""Negative log-likelihood of picking the head in its order, and before all of the tail.

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
    """Whether each entry of ``query [n, q]`` is in its row of ``table [n, t]``: bool ``[n, q]``."""
    return positions_in(query, table) >= 0


def positions_in(query: Tensor, table: Tensor) -> Tensor:
    """For each row, the column in ``table [n, t]`` of each entry of ``query [n, q]``, or −1.

    −1 means that the table's row does not have the entry. If it has it twice, the result is one of
    the two columns. One sort and one binary search per row: O((q + t) log t), without a comparison
    of all q × t pairs.
    """
    if table.shape[-1] == 0:
        return torch.full_like(query, -1, dtype=torch.int64)
    ordered, column = table.sort(-1)
    place = torch.searchsorted(ordered, query.contiguous()).clamp_(max=table.shape[-1] - 1)
    return column.gather(-1, place).masked_fill_(ordered.gather(-1, place) != query, -1)


def votes_from_below(voters: Tensor, inclusive: bool) -> Tensor:
    """How many voters are below each position of a ranked list.

    Args:
        voters: bool ``[n, M]``, which positions of a list, best item first, are voters.
        inclusive: count a voter at the position itself too.

    Returns:
        int64 ``[n, M]``.
    """
    counts = voters.long()
    # All voters less those above: one pass. A sum from the end would need two copies.
    below = counts.sum(-1, keepdim=True) - counts.cumsum(-1)
    return below + counts if inclusive else below


def draw_without_replacement(log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Positions ``[rows, n]`` drawn without replacement, with probabilities ∝ exp(log_weights).

    Each row is drawn for itself. Adding Gumbel noise and taking the n largest has the same
    distribution as drawing one after the other (Vieira 2014). An entry of −inf is drawn only if the
    row has fewer than ``n`` others.
    """
    uniform = torch.rand(log_weights.shape, generator=generator, device=log_weights.device)
    # An exponential variable E gives the Gumbel -log E; the clamp keeps log(0) out.
    gumbel = -(-uniform.clamp_(min=1e-20).log()).clamp_(min=1e-20).log()
    return (log_weights + gumbel).topk(n, dim=-1).indices


def first_distinct(candidates: Tensor, allowed: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first ``n`` distinct allowed candidates of each row, in their order.

    Args:
        candidates: ids ``[rows, R]`` in the order in which they were drawn.
        allowed: bool ``[rows, R]``, which candidates may be taken.
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
    """How many of ``all_scores [n, N]`` are strictly above each of ``scores [n, K]``.

    The counts are int64 ``[n, K]``. O(N log K) a row: each of the N is looked up among the K, and
    the N are not sorted.
    """
    ordered, order = scores.sort(-1)
    # below[j]: how many of the K scores lie strictly below all_scores[j].
    below = torch.searchsorted(ordered, all_scores.contiguous(), right=False)
    k = scores.shape[-1]
    histogram = torch.zeros(*scores.shape[:-1], k + 1, dtype=torch.int64, device=scores.device)
    histogram.scatter_add_(-1, below, torch.ones_like(below))
    above = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    return torch.zeros_like(order).scatter(-1, order, above)


def ndcg_against(student_top: Tensor, teacher_top: Tensor) -> Tensor:
    """NDCG@k of the student's top-k with the teacher's top-k as the relevant items: ``[n]``.

    Args:
        student_top: the student's best k items, best first, ``[n, k]``.
        teacher_top: the teacher's best k items, best first, ``[n, k]``; 0 where it has fewer than
            k, but it has at least one.
    """
    k = student_top.shape[-1]
    discount = 1.0 / torch.log2(
        torch.arange(2, k + 2, dtype=torch.float32, device=student_top.device)
    )
    ideal = ((teacher_top != 0) * discount).sum(-1)
    shared = is_member(student_top, teacher_top) & (student_top != 0)
    return (shared.float() * discount).sum(-1) / ideal


def full_precision(device: torch.device) -> torch.autocast:
    """A context manager that turns autocast off.

    If the student trains in half precision, the teacher's scores and top-K must not change.
    """
    return torch.autocast(device.type, enabled=False)
