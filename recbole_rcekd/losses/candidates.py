"""Which items a block of users can be taught on: the lists and draws that the losses choose from.

Nothing here knows a model or RecBole: the teacher is a
:class:`~recbole_rcekd.core.types.TeacherScores`, the student a
:class:`~recbole_rcekd.core.top_k.Ranking`, and randomness comes from the generator that is passed
  in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recbole_rcekd.core.functional import count_above, first_distinct, is_member
from recbole_rcekd.core.top_k import CELLS_AT_A_TIME, Ranking, top_k
from recbole_rcekd.core.types import Seen, TeacherScores


class Candidates:
    """The lists of one block of contexts, made on demand.

    Args:
        contexts: ids ``[n]``.
        teacher: the teacher's scores.
        student: ranks as the student stands now; asked only where its list is wanted.
        seen: the training interactions.
        generator: the source of all draws.
        score: the student's scores of any cells: contexts ``[n]``, items ``[n, T]`` → ``[n, T]``.
        score_all: its scores of all items: contexts ``[n]`` → ``[n, n_items]``, −inf at the padding
            item.
        popularity: how often each item stands in the training data, ``[n_items]``.
        trajectories: earlier states of each teacher, the least trained first and the teacher as it
            is last.
        epoch: the epoch that begins, from 0.

    Attributes:
        ids: ``[n]``, the same for the same context in every epoch; 0 to ``n_ids − 1``.
        epoch: as given.
    """

    def __init__(
        self,
        contexts: Tensor,
        teacher: TeacherScores,
        student: Ranking,
        seen: Seen | None,
        generator: torch.Generator,
        *,
        score: Callable[[Tensor, Tensor], Tensor] | None = None,
        score_all: Callable[[Tensor], Tensor] | None = None,
        popularity: Tensor | None = None,
        trajectories: Sequence[Sequence[TeacherScores]] = (),
        epoch: int = 0,
    ) -> None:
        self.contexts = contexts
        self.ids = contexts
        self.generator = generator
        self.epoch = epoch
        self.n_items = teacher.n_items
        self._teacher = teacher
        self._student = student
        self._score = score
        self._score_all = score_all
        self._popularity = popularity
        self._trajectories = trajectories
        if seen is not None:
            self._seen = seen

    # -- the student ---------------------------------------------------------------------------------------------

    def student_top(self, k: int, unseen: bool = False) -> Tensor:
        """The student's best ``k`` items, best first, ``[n, k]``."""
        return self._student.top_k(self.contexts, k, self._seen if unseen else None)

    def student_scores(self, items: Tensor) -> Tensor:
        """The student's scores of ``items [n, T]``, without gradient."""
        if self._score is None:
            raise ValueError("These lists know no scores of the student.")
        with torch.no_grad():
            return self._score(self.contexts, items)

    def student_scores_of_all(self) -> Tensor:
        """The student's scores of every item, ``[n, n_items]``, without gradient: for a few contexts only."""
        if self._score_all is None:
            raise ValueError("These lists know no scores of the student.")
        with torch.no_grad():
            return self._score_all(self.contexts)

    def student_ranks(self, items: Tensor) -> Tensor:
        """The student's rank of ``items [n, T]`` in the whole catalogue, 1 for the best, ``[n, T]``."""
        ranks = []
        for part in torch.split(torch.arange(len(items), device=items.device), self._at_a_time()):
            rows = self.part(part).student_scores_of_all()
            ranks.append(1 + count_above(rows.gather(1, items[part]), rows))
        return torch.cat(ranks) if ranks else items.clone()

    # -- the teacher ---------------------------------------------------------------------------------------------

    def teacher_top(self, k: int, unseen: bool = False) -> Tensor:
        """The teacher's best ``k`` items, best first, ``[n, k]``."""
        return self._teacher.top_k(self.contexts, k, unseen)

    def teacher_scores(self, items: Tensor) -> Tensor:
        """The teacher's scores of ``items [n, T]``."""
        return self._teacher.score(self.contexts, items)

    def teacher_scores_of_all(self) -> Tensor:
        """The teacher's scores of every item, ``[n, n_items]``, −inf at the padding item: for a few contexts only."""
        return self._teacher.score_all(self.contexts)

    def teacher_top_of_groups(self, group: Tensor, n_groups: int, k: int) -> Tensor:
        """The teacher's best unseen items within each group of items, best first, ``[n, n_groups, k]``; 0 beyond its end.

        Args:
            group: of each item, ``[n_items]``, from 0.
            n_groups: how many there are.
            k: length of the lists.
        """
        found = torch.zeros(
            (len(self.contexts), n_groups, k), dtype=torch.int64, device=self.contexts.device
        )
        group = group.to(self.contexts.device)
        members = [(group == g).nonzero().squeeze(1) for g in range(n_groups)]
        for part in torch.split(
            torch.arange(len(self.contexts), device=self.contexts.device), self._at_a_time()
        ):
            block = self.part(part)
            rows = block.teacher_scores_of_all().clone()
            rows[block._seen.cells(block.contexts)] = -torch.inf
            if self._teacher.partial:
                listed = torch.zeros_like(rows, dtype=torch.bool).scatter_(
                    1, block.teacher_top(self.n_items), True
                )
                rows.masked_fill_(~listed, -torch.inf)
            for g, ids in enumerate(members):
                scores, place = rows[:, ids].topk(min(k, len(ids)), dim=1)
                found[part, g, : place.shape[1]] = ids[place].masked_fill(scores == -torch.inf, 0)
        return found

    def trajectories(self) -> list[list[Candidates]]:
        """The same lists with each earlier state of each teacher as the teacher; empty where none is known."""
        return [[self.with_teacher(state) for state in states] for states in self._trajectories]

    def with_teacher(self, teacher: TeacherScores) -> Candidates:
        """The same contexts with another teacher."""
        other = copy.copy(self)
        other._teacher = teacher
        return other

    def part(self, places: Tensor) -> Candidates:
        """The lists of the contexts at ``places``."""
        other = copy.copy(self)
        other.contexts = self.contexts[places]
        other.ids = self.ids[places]
        return other

    def _at_a_time(self) -> int:
        return max(1, CELLS_AT_A_TIME // self.n_items)

    # -- the training data ---------------------------------------------------------------------------------------

    def popularity(self) -> Tensor:
        """How often each item stands in the training data, ``[n_items]``."""
        if self._popularity is None:
            raise ValueError("These lists do not know how popular items are.")
        return self._popularity

    def positives(self, n: int) -> Tensor:
        """Up to ``n`` training items of each context, drawn uniformly, ``[n_contexts, n]``; 0 where it has fewer."""
        rows, ids = self._seen.cells(self.contexts)
        noise = torch.rand(len(ids), generator=self.generator, device=ids.device)
        # Sorted by context and, within, by chance: the first n of each.
        order = (rows + noise.double()).argsort()
        counts = self._seen.counts()[self.contexts]
        place = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[rows]
        taken = place < n
        found = torch.zeros((len(self.contexts), n), dtype=torch.int64, device=ids.device)
        found[rows[taken], place[taken]] = ids[order][taken]
        return found

    def is_seen(self, items: Tensor) -> Tensor:
        """Which of ``items [n, T]`` the contexts have in the training data, bool ``[n, T]``."""
        return ~self._not_in(self._seen, items)

    def mask_rows(self, rows: Tensor) -> Tensor:
        """Full rows of scores with −inf at items that are masked: none, of users."""
        return rows

    def n_allowed(self) -> Tensor:
        """How many items there are for each context, ``[n]``: the catalogue, without padding."""
        return torch.full_like(self.contexts, self.n_items - 1)

    def n_unseen(self) -> Tensor:
        """How many items each context has not in the training data, ``[n]``."""
        return self._seen.n_ids - 1 - self._seen.counts()[self.contexts]

    def draw_unseen(self, n: int, outside: Tensor) -> Tensor:
        """``n`` distinct items per row, uniform over what is neither seen nor in ``outside [n, P]``; 0 where there are fewer."""
        return self._draw(n, outside, self._seen)

    def draw(self, n: int, outside: Tensor) -> Tensor:
        """``n`` distinct items per row, uniform over what is not in ``outside [n, P]``; 0 where there are fewer."""
        return self._draw(n, outside, None)

    def _draw(self, n: int, outside: Tensor, without: Seen | None) -> Tensor:
        """Rejection: draw more than enough, strike what is not allowed or repeated, keep the first ``n``. Rows that run
        short, because little is allowed, are drawn exactly from their full row.
        """  # noqa: D205
        candidates = torch.randint(
            1,
            self.n_items,
            (len(self.contexts), 2 * n + 16),
            generator=self.generator,
            device=self.contexts.device,
        )
        allowed = ~is_member(candidates, outside)
        if without is not None:
            allowed &= self._not_in(without, candidates)
        drawn, found = first_distinct(candidates, allowed, n)
        short = (~found.all(1)).nonzero().squeeze(1)
        if len(short):
            drawn[short] = self.part(short)._draw_exactly(n, outside[short], without)
        return drawn

    def _not_in(self, seen: Seen, items: Tensor) -> Tensor:
        rows, ids = seen.cells(self.contexts)
        # (row, id) as one ascending key: one binary search for the whole block.
        keys = rows * seen.n_ids + ids
        wanted = torch.arange(len(items), device=items.device).unsqueeze(1) * seen.n_ids + items
        if len(keys) == 0:
            return torch.ones_like(items, dtype=torch.bool)
        place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return keys[place] != wanted

    def _draw_exactly(self, n: int, outside: Tensor, without: Seen | None) -> Tensor:
        shape = (len(self.contexts), self.n_items)
        noise = torch.rand(shape, generator=self.generator, device=self.contexts.device)
        if without is not None:
            noise[without.cells(self.contexts)] = -torch.inf
        noise.scatter_(1, outside, -torch.inf)
        noise[:, 0] = -torch.inf
        drawn = top_k(noise, n)
        padding = n - drawn.shape[1]
        return torch.nn.functional.pad(drawn, (0, padding)) if padding > 0 else drawn
