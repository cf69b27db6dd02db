"""The candidates of a block of users: the top-K items and random draws that a loss chooses from.

Nothing here depends on a model or on RecBole. The teacher is a
:class:`~recbole_rcekd.core.types.TeacherScores`, the student a
:class:`~recbole_rcekd.core.top_k.Ranking`, and all randomness comes from the given generator.
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
    """The candidates of a block of users (or rows of sequences), computed on demand.

    Args:
        contexts: ids of the users (or rows of sequences), ``[n]``.
        teacher: the teacher's scores.
        student: the student's ranking as it is now; computed only if a loss asks for it.
        seen: the training interactions.
        generator: the source of all random draws.
        score: the student's scores of some items: contexts ``[n]``, items ``[n, T]`` → ``[n, T]``.
        score_all: the student's scores of all items: contexts ``[n]`` → ``[n, n_items]``, −inf at
            the padding item.
        popularity: how many training interactions each item has, ``[n_items]``.
        trajectories: for each teacher its earlier checkpoints, the least trained first, and the
            teacher itself last.
        epoch: the epoch that begins, from 0.

    Attributes:
        ids: ``[n]``, from 0 to ``n_ids − 1``. A user (or row) has the same id in every epoch.
        epoch: the epoch that begins.
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

    # --- the student ------------------------------------------------------------------------------

    def student_top(self, k: int, unseen: bool = False) -> Tensor:
        """The student's top-``k`` items, best first, ``[n, k]``."""
        return self._student.top_k(self.contexts, k, self._seen if unseen else None)

    def student_scores(self, items: Tensor) -> Tensor:
        """The student's scores of ``items [n, T]``, without gradient."""
        if self._score is None:
            raise ValueError("These candidates have no student scores.")
        with torch.no_grad():
            return self._score(self.contexts, items)

    def student_scores_of_all(self) -> Tensor:
        """The student's scores of all items, ``[n, n_items]``, without gradient.

        This is a full row for each user, so ask for a few users only.
        """
        if self._score_all is None:
            raise ValueError("These candidates have no student scores.")
        with torch.no_grad():
            return self._score_all(self.contexts)

    def student_ranks(self, items: Tensor) -> Tensor:
        """The student's ranks of ``items [n, T]`` among all items, 1 for the best: ``[n, T]``."""
        ranks = []
        for part in torch.split(torch.arange(len(items), device=items.device), self._at_a_time()):
            rows = self.part(part).student_scores_of_all()
            ranks.append(1 + count_above(rows.gather(1, items[part]), rows))
        return torch.cat(ranks) if ranks else items.clone()

    # --- the teacher ------------------------------------------------------------------------------

    def teacher_top(self, k: int, unseen: bool = False) -> Tensor:
        """The teacher's top-``k`` items, best first, ``[n, k]``."""
        return self._teacher.top_k(self.contexts, k, unseen)

    def teacher_scores(self, items: Tensor) -> Tensor:
        """The teacher's scores of ``items [n, T]``."""
        return self._teacher.score(self.contexts, items)

    def teacher_scores_of_all(self) -> Tensor:
        """The teacher's scores of all items, ``[n, n_items]``, −inf at the padding item.

        This is a full row for each user, so ask for a few users only.
        """
        return self._teacher.score_all(self.contexts)

    def teacher_top_of_groups(self, group: Tensor, n_groups: int, k: int) -> Tensor:
        """The teacher's top-``k`` unseen items of each group of items, best first.

        Args:
            group: the group of each item, ``[n_items]``, from 0.
            n_groups: the number of groups.
            k: how many items of each group.

        Returns:
            ``[n, n_groups, k]``; 0 where a group has fewer than ``k`` items.
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
        """For each teacher, these candidates with each of its checkpoints as the teacher.

        Empty if no earlier checkpoints were given.
        """
        return [[self.with_teacher(state) for state in states] for states in self._trajectories]

    def with_teacher(self, teacher: TeacherScores) -> Candidates:
        """The candidates of the same users with another teacher."""
        other = copy.copy(self)
        other._teacher = teacher
        return other

    def part(self, positions: Tensor) -> Candidates:
        """The candidates of the users at these positions."""
        other = copy.copy(self)
        other.contexts = self.contexts[positions]
        other.ids = self.ids[positions]
        return other

    def _at_a_time(self) -> int:
        return max(1, CELLS_AT_A_TIME // self.n_items)

    # --- the training data ------------------------------------------------------------------------

    def popularity(self) -> Tensor:
        """How many training interactions each item has, ``[n_items]``."""
        if self._popularity is None:
            raise ValueError("These candidates have no popularity of items.")
        return self._popularity

    def positives(self, n: int) -> Tensor:
        """Up to ``n`` training items of each user, drawn uniformly, ``[n_contexts, n]``.

        0 where a user has fewer.
        """
        rows, ids = self._seen.cells(self.contexts)
        noise = torch.rand(len(ids), generator=self.generator, device=ids.device)
        # Sorted by user, and in random order within a user: take the first n of each.
        order = (rows + noise.double()).argsort()
        counts = self._seen.counts()[self.contexts]
        place = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[rows]
        taken = place < n
        found = torch.zeros((len(self.contexts), n), dtype=torch.int64, device=ids.device)
        found[rows[taken], place[taken]] = ids[order][taken]
        return found

    def is_seen(self, items: Tensor) -> Tensor:
        """Which of ``items [n, T]`` are training items of their user, bool ``[n, T]``."""
        return ~self._not_in(self._seen, items)

    def mask_rows(self, rows: Tensor) -> Tensor:
        """Full rows of scores with −inf at masked items; for users nothing is masked."""
        return rows

    def n_allowed(self) -> Tensor:
        """How many items each user may be given, ``[n]``: all but the padding item."""
        return torch.full_like(self.contexts, self.n_items - 1)

    def n_unseen(self) -> Tensor:
        """How many items are no training items of each user, ``[n]``."""
        return self._seen.n_ids - 1 - self._seen.counts()[self.contexts]

    def draw_unseen(self, n: int, outside: Tensor) -> Tensor:
        """Draw ``n`` distinct items per row that are neither seen nor in ``outside [n, P]``.

        They are drawn uniformly; 0 where there are fewer.
        """
        return self._draw(n, outside, self._seen)

    def draw(self, n: int, outside: Tensor) -> Tensor:
        """Draw ``n`` distinct items per row that are not in ``outside [n, P]``.

        They are drawn uniformly; 0 where there are fewer.
        """
        return self._draw(n, outside, None)

    def _draw(self, n: int, outside: Tensor, without: Seen | None) -> Tensor:
        """Draw by rejection, which needs no full rows.

        More items than needed are drawn, those that are not allowed or repeated are dropped, and
        the first ``n`` are kept. Rows that are left with fewer than ``n``, because few items are
        allowed, are drawn from their full row instead.
        """
        proposed = torch.randint(
            1,
            self.n_items,
            (len(self.contexts), 2 * n + 16),
            generator=self.generator,
            device=self.contexts.device,
        )
        allowed = ~is_member(proposed, outside)
        if without is not None:
            allowed &= self._not_in(without, proposed)
        drawn, found = first_distinct(proposed, allowed, n)
        short = (~found.all(1)).nonzero().squeeze(1)
        if len(short):
            drawn[short] = self.part(short)._draw_exactly(n, outside[short], without)
        return drawn

    def _not_in(self, seen: Seen, items: Tensor) -> Tensor:
        rows, ids = seen.cells(self.contexts)
        # (row, id) as one ascending key, so that one binary search serves the whole block.
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
