"""Which items a block of users can be taught on: the lists and draws that the losses choose from.

Nothing here knows a model or RecBole: the teacher is a :class:`~recbole_rcekd.types.TeacherScores`, the student a
:class:`~recbole_rcekd.ranking.Ranking`, and randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_rcekd.functional import first_distinct, is_member
from recbole_rcekd.ranking import Ranking, top_k
from recbole_rcekd.types import Seen, TeacherScores


class Lists:
    """The lists of one block of contexts, made on demand.

    Args:
        contexts: ids ``[n]``.
        teacher: the teacher's scores.
        student: ranks as the student stands now; asked only where its list is wanted.
        seen: the training interactions.
        generator: the source of all draws.
    """

    def __init__(
        self,
        contexts: Tensor,
        teacher: TeacherScores,
        student: Ranking,
        seen: Seen | None,
        generator: torch.Generator,
    ) -> None:
        self.contexts = contexts
        self.generator = generator
        self._teacher = teacher
        self._student = student
        if seen is not None:
            self._seen = seen

    def student_top(self, k: int, unseen: bool = False) -> Tensor:
        """The student's best ``k`` items, best first, ``[n, k]``."""
        return self._student.top_k(self.contexts, k, self._seen if unseen else None)

    def teacher_top(self, k: int, unseen: bool = False) -> Tensor:
        """The teacher's best ``k`` items, best first, ``[n, k]``."""
        return self._teacher.top_k(self.contexts, k, unseen)

    def teacher_scores(self, items: Tensor) -> Tensor:
        """The teacher's scores of ``items [n, T]``."""
        return self._teacher.score(self.contexts, items)

    def n_unseen(self) -> Tensor:
        """How many items each context has not in the training data, ``[n]``."""
        return self._seen.n_ids - 1 - self._seen.counts()[self.contexts]

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
