r"""FreqD: distil what an embedding has in common with its neighbours in a graph.

.. math::
    \ell &= \sum_{u} \|(H_U P_U(S))_u - (H_U T)_u\|^2
        + \sum_{i} w_i \|(H_I P_I(S))_i - (H_I T)_i\|^2 \\
    H &= (1-\alpha) I + \alpha A

The sums run over the distinct users and items of a batch. :math:`w_i` is ½ if the item is among the
positives, plus ½ if it is among the negatives. A is a graph: each user (item) is joined with the k
others that share most training items (users) with it, in both directions, with entries
:math:`1/\sqrt{\deg_a \deg_b}`. So H is a filter that keeps the low frequencies of the graph. In
each batch every entry of A is kept with probability ρ, and divided by ρ. P is a network with one
hidden layer. ``freqd_normalise`` replaces the squared distance by 1 − cos.

Source: FreqD, KDD 2025 (arXiv 2411.10676).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from recbole_rcekd.core.functional import squared_error, unit_rows
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import Seen, Vectors
from recbole_rcekd.losses.base import EmbeddingLoss

# How many shared items are counted at a time while a graph is made: some 200 MB.
_COUNTED_CELLS = 5_000_000


@dataclass(frozen=True)
class FreqDSettings(LossSettings):
    """Settings of FreqD; ``properties/loss/freqd.yaml`` documents each."""

    prefix = "freqd"

    freqd_weight: float = setting(0.5, low=0.0)
    freqd_sides: Literal["both", "users", "items"] = "both"
    freqd_neighbours: int = setting(5, low=0)
    freqd_alpha: float = setting(0.5, low=0.0, high=1.0)
    freqd_keep: float = setting(0.5, above=0.0, high=1.0)
    freqd_projectors: int = setting(1, low=1)
    freqd_dropout: float = setting(0.2, low=0.0, high=0.99)
    freqd_normalise: bool = False


def neighbour_graph(seen: Seen, k: int) -> Seen:
    """Join each user with the k others that share most items with it, in both directions.

    Among equals those with lower ids are taken; a user that shares nothing is no neighbour. With
    ``seen.transposed()`` this is the graph of items. The shared items of a block of users are
    counted at a time, so there is no users × users matrix.

    Returns:
        The neighbours of each user.
    """
    n = len(seen.starts) - 1
    starts, ids = seen.starts.cpu().numpy(), seen.ids.cpu().numpy()
    table = scipy.sparse.csr_matrix(
        (np.ones(len(ids), np.int64), ids, starts), shape=(n, seen.n_ids)
    )
    flipped = table.T.tocsr()
    # How many counts all rows before a row need.
    work = np.concatenate([[0], np.diff(flipped.indptr)[ids].cumsum(dtype=np.int64)])[starts]
    pairs = [np.zeros((2, 0), np.int64)]
    first = 0
    while first < n:
        last = max(
            first + 1, int(np.searchsorted(work, work[first] + _COUNTED_CELLS, side="right")) - 1
        )
        shared = table[first:last] @ flipped
        lengths = np.diff(shared.indptr)
        filled = np.flatnonzero(lengths)
        lengths = lengths[filled]
        # One number that is larger for more shared ids, then for a lower id.
        rank = shared.data * n + (n - 1 - shared.indices)
        rank[np.repeat(first + filled, lengths) == shared.indices] = -1
        for _ in range(k):
            best = np.maximum.reduceat(rank, shared.indptr[filled]) if len(filled) else rank
            found = best >= 0
            pairs.append(np.stack([first + filled[found], n - 1 - best[found] % n]))
            rank[rank == np.repeat(best, lengths)] = -1
        first = last
    one, other = torch.from_numpy(np.concatenate(pairs, 1)).to(seen.ids.device)
    return Seen.from_pairs(torch.cat([one, other]), torch.cat([other, one]), n, n)


class Projector(nn.Module):
    """The mean of E networks with one hidden layer, held as one network that is E times as wide.

    Args:
        n: the number of networks, E.
        student_width: of their input.
        teacher_width: of their output. The hidden layers are half-way between the two widths.
    """

    def __init__(self, n: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.first = nn.Linear(student_width, n * ((student_width + teacher_width) // 2))
        self.second = nn.Linear(self.first.out_features, teacher_width)


class FreqDLoss(EmbeddingLoss):
    """Squared distance between the filtered embeddings of the projected student and of the teacher.

    In evaluation mode nothing is dropped, neither from the graph nor from the projector.

    Attributes:
        generator: the source of what is dropped.
        graphs: for each side, the neighbours of each user (item).

    Example:
        Two users share an item, so they are neighbours. With α = ½ each is filtered to the mean of
        both. The projector's parameters are all 1: P(s) = max(0, s + 1) + 1.

        >>> import torch
        >>> from recbole_rcekd.core.types import Seen, Vectors
        >>> from recbole_rcekd.losses.freqd import FreqDLoss, FreqDSettings
        >>> loss = FreqDLoss(FreqDSettings(freqd_sides="users", freqd_alpha=0.5))
        >>> ids = torch.tensor([1, 2])
        >>> seen = Seen.from_pairs(ids, torch.tensor([1, 1]), 3, 2)  # both have item 1
        >>> loss.build(1, 1, seen, torch.Generator())
        >>> for parameter in loss.parameters():
        ...     _ = torch.nn.init.ones_(parameter)
        >>> users = Vectors(
        ...     ids=ids,
        ...     student=torch.tensor([[1.0], [3.0]]),  # projected: 3 and 5, filtered: 4 and 4
        ...     teacher=torch.tensor([[7.0], [3.0]]),  # filtered: 5 and 5
        ...     weights=torch.ones(2),
        ... )
        >>> loss.eval().forward(users, None).item()  # (4 − 5)² + (4 − 5)²
        2.0
    """

    settings_type = FreqDSettings
    settings: FreqDSettings
    generator: torch.Generator
    graphs: dict[str, Seen]

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """A projector and a graph for each side."""
        s = self.settings
        self.generator = generator
        self.projectors = nn.ModuleDict(
            {
                f"of_{side}": Projector(s.freqd_projectors, student_width, teacher_width)
                for side in self.sides
            }
        )
        self.graphs = {
            side: neighbour_graph(
                seen if side == "users" else seen.transposed(), s.freqd_neighbours
            )
            for side in self.sides
        }

    def needed(self, side: str, ids: Tensor) -> Tensor:
        """The given ids, then their neighbours."""
        near = torch.unique(self.graphs[side].cells(ids)[1])
        return torch.cat([ids, near[~torch.isin(near, ids)]])

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The sum over users and items."""
        return self.sum_over_sides(self._of_side, users, items)

    def _of_side(self, side: str, vectors: Vectors) -> Tensor:
        projector: Any = self.projectors[f"of_{side}"]
        starts, columns, entries = self._drawn_filter(self.graphs[side], vectors)

        def filtered(columns: Tensor, x: Tensor) -> Tensor:
            return torch.nn.functional.embedding_bag(
                columns, x, starts, mode="sum", per_sample_weights=entries
            )

        used, among_used = torch.unique(columns, return_inverse=True)
        hidden = self._dropped(projector.first(vectors.student.index_select(0, used)).relu())
        # The filter and the last layer are linear and can be exchanged. So the last layer is
        # computed for the batch alone, not for all its neighbours.
        total = filtered(among_used, torch.ones_like(hidden[:, :1]))
        student = (
            filtered(among_used, hidden) @ projector.second.weight.t()
            + total * projector.second.bias
        )
        teacher = filtered(columns, vectors.teacher.detach())
        if self.settings.freqd_normalise:
            return (
                vectors.weights * (1.0 - (unit_rows(student) * unit_rows(teacher)).sum(1))
            ).sum()
        return squared_error(student, teacher, vectors.weights)

    def _drawn_filter(self, graph: Seen, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        """H of the batch for one step, by rows.

        Returns:
            Where each row begins, the positions among the embeddings, and the entries.
        """
        s, ids, n = self.settings, vectors.ids, vectors.n
        degrees = graph.counts()
        rows, near = graph.cells(ids[:n])
        share = s.freqd_keep if self.training else 1.0
        if self.training:
            kept = torch.rand(len(rows), generator=self.generator, device=ids.device) < share
            rows, near = rows[kept], near[kept]
        entries = (
            s.freqd_alpha
            / share
            * (degrees[ids[rows]] * degrees[near]).to(vectors.student.dtype).rsqrt()
        )
        place = torch.full_like(degrees, -1)
        place[ids] = torch.arange(len(ids), device=ids.device)
        # Each row begins with itself.
        own = torch.arange(n, device=ids.device)
        rows, order = torch.cat([own, rows]).sort(stable=True)
        entries = torch.cat([entries.new_full((n,), 1.0 - s.freqd_alpha), entries])
        return torch.searchsorted(rows, own), torch.cat([own, place[near]])[order], entries[order]

    def _dropped(self, hidden: Tensor) -> Tensor:
        if not self.training:
            return hidden
        share = 1.0 - self.settings.freqd_dropout
        kept = torch.rand(hidden.shape, generator=self.generator, device=hidden.device) < share
        return hidden * (kept / share).to(hidden.dtype)
