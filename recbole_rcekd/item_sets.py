"""Which items a block of users can be taught on: the lists and draws that the losses choose from.

Nothing here knows a model or RecBole: the teacher is a :class:`~recbole_rcekd.types.TeacherScores`, the student a
function that scores every item, and randomness comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_rcekd.functional import first_distinct, is_member
from recbole_rcekd.types import TeacherScores

# Full rows are scored and ranked so many cells at a time: 4 MB of float32, which stay in a processor's cache between
# the product and the selection (three times faster than 16 MB blocks here, see benchmarks/README.md).
CELLS_AT_A_TIME = 1_000_000
_GROUP_SIZE = 8


@dataclass(frozen=True)
class Seen:
    """The training interactions as sorted rows: who has what.

    Args:
        starts: ``[n_contexts + 1]``, row u is ``ids[starts[u]:starts[u + 1]]``.
        ids: ``[n]``, ascending within a row.
        n_ids: how many ids there are, padding included.
    """

    starts: Tensor
    ids: Tensor
    n_ids: int

    @classmethod
    def from_pairs(cls, contexts: Tensor, ids: Tensor, n_contexts: int, n_ids: int) -> Seen:
        """Build from one (context, id) pair per interaction; repeats are dropped."""
        keys = torch.unique(contexts.long() * n_ids + ids.long())
        counts = torch.bincount(keys // n_ids, minlength=n_contexts)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(starts, keys % n_ids, n_ids)

    def to(self, device: torch.device) -> Seen:
        """The same on another device."""
        return Seen(self.starts.to(device), self.ids.to(device), self.n_ids)

    def counts(self) -> Tensor:
        """How many ids each context has, ``[n_contexts]``."""
        return self.starts.diff()

    def contexts(self) -> Tensor:
        """The contexts that have any; padding (0) is not among them."""
        present = self.counts().nonzero().squeeze(1)
        return present[present != 0]

    def cells(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Row positions and ids of all that ``contexts`` have, for masking a block of full rows."""
        counts = self.counts()[contexts]
        rows = torch.repeat_interleave(torch.arange(len(contexts), device=contexts.device), counts)
        offset = torch.arange(len(rows), device=contexts.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.ids[self.starts[contexts][rows] + offset]

    def transposed(self) -> Seen:
        """Who has it, for each id."""
        n_contexts = len(self.starts) - 1
        owners = torch.repeat_interleave(torch.arange(n_contexts, device=self.ids.device), self.counts())
        return Seen.from_pairs(self.ids, owners, self.n_ids, n_contexts)


def top_k(rows: Tensor, k: int) -> Tensor:
    """Ids of the best ``k`` of each row of full scores, best first; 0 for those of score −inf.

    Exact, in two steps: the k best items lie in the k groups with the best maxima, so the full selection runs over
    groups and then over k groups' members. Groups are strided (item i is in group i mod G), which makes the maxima one
    vectorised pass.
    """
    n, width = rows.shape
    k = min(k, width)
    groups = width // _GROUP_SIZE
    if groups < 2 * k:
        return _ids(*rows.topk(k, dim=1))
    whole = rows[:, : groups * _GROUP_SIZE].view(n, _GROUP_SIZE, groups)
    best_groups = whole.amax(1).topk(k, dim=1, sorted=False).indices
    members = best_groups.unsqueeze(1) + groups * torch.arange(_GROUP_SIZE, device=rows.device).view(1, -1, 1)
    leftover = torch.arange(groups * _GROUP_SIZE, width, device=rows.device).expand(n, -1)
    candidates = torch.cat([members.flatten(1), leftover], dim=1)
    best, place = rows.gather(1, candidates).topk(k, dim=1)
    return _ids(best, candidates.gather(1, place))


def _ids(scores: Tensor, ids: Tensor) -> Tensor:
    return ids.masked_fill(scores == -torch.inf, 0)


class Lists:
    """The lists of one block of contexts, made on demand.

    Args:
        contexts: ids ``[n]``.
        teacher: the teacher's scores.
        student_rows: scores of every item for these contexts, ``[n, n_items]`` with −inf at the padding item, as the
            student stands now; called at most once.
        seen: the training interactions.
        generator: the source of all draws.
    """

    def __init__(
        self,
        contexts: Tensor,
        teacher: TeacherScores,
        student_rows: Callable[[Tensor], Tensor],
        seen: Seen,
        generator: torch.Generator,
    ) -> None:
        self.contexts = contexts
        self.generator = generator
        self._teacher = teacher
        self._score_student = student_rows
        self._seen = seen

    def student_top(self, k: int, unseen: bool = False) -> Tensor:
        """The student's best ``k`` items, best first, ``[n, k]``; full rows are held for a few contexts at a time."""
        lists = []
        for part in torch.split(self.contexts, max(1, CELLS_AT_A_TIME // self._teacher.n_items)):
            rows = self._score_student(part)
            if unseen:
                rows[self._seen.cells(part)] = -torch.inf
            lists.append(top_k(rows, k))
        return torch.cat(lists)

    def teacher_top(self, k: int, unseen: bool = False) -> Tensor:
        """The teacher's best ``k`` items, best first, ``[n, k]``."""
        return self._teacher.top_k(self.contexts, k, unseen)

    def teacher_scores(self, items: Tensor) -> Tensor:
        """The teacher's scores of ``items [n, T]``."""
        return self._teacher.score(self.contexts, items)

    def draw_unseen(self, n: int, outside: Tensor) -> Tensor:
        """``n`` distinct items per row, uniform over what is neither seen nor in ``outside [n, P]``.

        Rejection: draw more than enough, strike what is not allowed or repeated, keep the first ``n``. Rows that run
        short, because little is allowed, are drawn exactly from their full row. 0 where even that has too few.
        """
        candidates = torch.randint(
            1,
            self._seen.n_ids,
            (len(self.contexts), 2 * n + 16),
            generator=self.generator,
            device=self.contexts.device,
        )
        drawn, found = first_distinct(candidates, self._allowed(candidates, outside), n)
        short = (~found.all(1)).nonzero().squeeze(1)
        if len(short):
            drawn[short] = self._draw_exactly(short, n, outside[short])
        return drawn

    def _allowed(self, items: Tensor, outside: Tensor) -> Tensor:
        rows, ids = self._seen.cells(self.contexts)
        # (row, id) as one ascending key: one binary search for the whole block.
        keys = rows * self._seen.n_ids + ids
        wanted = torch.arange(len(items), device=items.device).unsqueeze(1) * self._seen.n_ids + items
        if len(keys) == 0:
            return ~is_member(items, outside)
        place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return (keys[place] != wanted) & ~is_member(items, outside)

    def _draw_exactly(self, rows: Tensor, n: int, outside: Tensor) -> Tensor:
        noise = torch.rand((len(rows), self._seen.n_ids), generator=self.generator, device=rows.device)
        noise[self._seen.cells(self.contexts[rows])] = -torch.inf
        noise.scatter_(1, outside, -torch.inf)
        noise[:, 0] = -torch.inf
        drawn = top_k(noise, n)
        padding = n - drawn.shape[1]
        return torch.nn.functional.pad(drawn, (0, padding)) if padding > 0 else drawn
