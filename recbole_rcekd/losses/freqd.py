r"""FreqD: bring the student's vectors to the teacher's in what neighbours have in common, the low frequencies of a graph.

.. math:: \ell = \sum_{u} \|(H_U P_U(S))_u - (H_U T)_u\|^2 + \sum_{i} w_i \|(H_I P_I(S))_i - (H_I T)_i\|^2,
    \qquad H = (1-\alpha) I + \alpha A

over the distinct users and items of a batch, :math:`w_i` ½ for each of "is a positive" and "is a
negative". A joins each user (item) and the k with whom it shares most training items (users), both
ways, with entries
:math:`1/\sqrt{\deg_a \deg_b}`; in each batch every entry is kept with a probability ρ, and divided
by ρ. P is a network with one hidden layer. ``freqd_normalise`` replaces the squared distance by 1 −
cos.

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

# Shared items counted at a time while a graph is made: some 200 MB.
_COUNTED_CELLS = 5_000_000


@dataclass(frozen=True)
class FreqDSettings(LossSettings):
    """Settings of FreqD; ``properties/loss/freqd.yaml`` gives type, purpose and source of each."""

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
    """Who is joined with whom: each context with the k others that share most ids with it, and they with it.

    Of equals the lower id; who shares nothing is no neighbour. The counts of a block of contexts
    are there at a time, no contexts × contexts matrix.

    Returns:
        The neighbours of each context.
    """
    n = len(seen.starts) - 1
    starts, ids = seen.starts.cpu().numpy(), seen.ids.cpu().numpy()
    table = scipy.sparse.csr_matrix(
        (np.ones(len(ids), np.int64), ids, starts), shape=(n, seen.n_ids)
    )
    flipped = table.T.tocsr()
    # How many counts the rows before each one cost.
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
    """The mean of E networks with a hidden layer each, which is one network that is E times as wide.

    Args:
        n: how many.
        student_width: what it reads.
        teacher_width: what it writes; the hidden layers are half-way.
    """

    def __init__(self, n: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.first = nn.Linear(student_width, n * ((student_width + teacher_width) // 2))
        self.second = nn.Linear(self.first.out_features, teacher_width)


class FreqDLoss(EmbeddingLoss):
    """Squared distance between filtered vectors: of the student, projected, and of the teacher.

    In evaluation mode nothing is dropped, neither of the graph nor of the projector.

    Attributes:
        generator: of what is dropped.
        graphs: for each side, who is joined with whom.
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
        """And their neighbours."""
        near = torch.unique(self.graphs[side].cells(ids)[1])
        return torch.cat([ids, near[~torch.isin(near, ids)]])

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """Summed over what stands in the batch, with the items' weights."""
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
        # A filter and a linear map can change places: the map is taken of the batch alone, not of
        # all its neighbours.
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
        """H of the batch for one step, by rows: where each begins, places among the vectors, and entries."""
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
