r"""How nearly closed the candidates are: the closure gap Δ, and the share of blockers in them.

A *blocker* of a target is an item that the student ranks above it. A set A is *closed* if it holds
all blockers of its targets; the cross-entropy on A then bounds NDCG. The closure gap Δ says in nats
how far A is from closed (METHODS.md, T3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recbole_rcekd.core.functional import count_above, masked_log_softmax
from recbole_rcekd.core.types import ItemSets


def closure_gap(
    target_probs: Tensor,
    target_scores: Tensor,
    target_above: Tensor,
    support_scores: Tensor,
    support_keep: Tensor | None = None,
) -> Tensor:
    r"""How far an item set A is from closed, in nats: Δ(A) of METHODS.md.

    .. math:: \Delta(A) = \sum_{i\in J} \tilde q_i \, \ln(1 + p^A_i\, m_i(A))

    with :math:`m_i(A)` the items outside A that the student puts above i. Adding Δ to the
    cross-entropy on A turns it into a true bound:
    :math:`-\ln \mathrm{NDCG}_J \le \mathrm{CE} + \Delta`. It is 0 exactly when no blocker is
    missing.

    Args:
        target_probs: q̃ ``[n, J]``, the teacher's softmax over J; 0 for masked entries.
        target_scores: student scores of J, ``[n, J]``; J ⊆ A.
        target_above: how many items of the whole catalogue the student puts above, ``[n, J]``.
        support_scores: student scores of A, ``[n, A]``.
        support_keep: bool ``[n, A]``, which entries of A count (``None``: all).

    Returns:
        ``[n]``.
    """
    lowest = torch.finfo(support_scores.dtype).min
    kept = (
        support_scores
        if support_keep is None
        else support_scores.masked_fill(~support_keep, lowest)
    )
    probs = (target_scores - kept.logsumexp(-1, keepdim=True)).exp()
    missing = (target_above - count_above(target_scores, kept)).clamp(min=0)
    # Entries of probability 0 may lie outside A, where p overflows.
    gaps = (target_probs * torch.log1p(probs * missing)).masked_fill(target_probs == 0, 0.0)
    return gaps.sum(-1)


def mean_closure_gaps(
    targets: ItemSets, supports: Sequence[ItemSets], rows: Tensor, temperature: float = 1.0
) -> list[float]:
    """The mean closure gap Δ of the targets J, in nats, for each of several sets A.

    The mean is over the users for whom the teacher has targets.

    Args:
        targets: J of n users (or rows of sequences), with the teacher's scores.
        supports: the sets A; each contains J.
        rows: the student's scores of every item for the same users, ``[n, n_items]``.
        temperature: τ of the teacher's and the student's softmax.
    """
    if targets.teacher_scores is None:
        raise ValueError("A closure gap weighs by the teacher's scores, and the targets have none.")
    taught = (targets.items != 0).any(1)
    scores = rows.gather(1, targets.items.long())
    probs = masked_log_softmax(targets.teacher_scores / temperature, targets.keep).exp()
    if targets.keep is not None:
        probs = probs.masked_fill(~targets.keep, 0.0)
    above = count_above(scores, rows)

    def gaps(support: ItemSets) -> Tensor:
        listed = rows.gather(1, support.items.long()) / temperature
        return closure_gap(probs, scores / temperature, above, listed, support.keep)

    return [float(gaps(support)[taught].sum() / max(1, int(taught.sum()))) for support in supports]


def blockers_covered(targets: ItemSets, support: ItemSets, rows: Tensor) -> float:
    """The share of all pairs of a target and a blocker whose blocker is in A.

    Args:
        targets: J of n users (or rows of sequences).
        support: A.
        rows: the student's scores of every item for the same users, ``[n, n_items]``.

    Returns:
        From 0 to 1; 1 if no target has a blocker.
    """
    scores, listed = (rows.gather(1, sets.items.long()) for sets in (targets, support))
    if support.keep is not None:
        listed = listed.masked_fill(~support.keep, -torch.inf)
    pairs, covered = count_above(scores, rows), count_above(scores, listed)
    if targets.keep is not None:
        pairs, covered = pairs[targets.keep], covered[targets.keep]
    n_pairs = int(pairs.sum())
    return int(covered.sum()) / n_pairs if n_pairs else 1.0
