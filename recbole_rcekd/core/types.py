"""The shapes that everything else passes along.

:class:`ItemSets` is what a loss learns on; :class:`Seen` is who has what; :class:`TeacherScores` is
where the teacher's opinion comes from. Ids are RecBole's: row 0 of users and of items is padding,
so an item id of 0 means "no item".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ItemSets:
    """Which items each of ``n`` contexts (users, as a rule) is taught on, and what the teacher says of them.

    Args:
        items: item ids ``[n, T]``, integer; 0 means "no item".
        teacher_scores: the teacher's scores of ``items``, ``[n, T]``, or ``None`` for losses that
            use only the order.
        keep: ``[n, T]`` bool, which of ``items`` count (``None``: all of them).
        gamma: ``[n]``, mixing weight of a loss with two terms (``None`` for the others).
        overlap: ``[n]``, share of the teacher's top-K among the student's top-K, where the method
            looks at both.
        log_tail: ``[n]``, log of the items that each drawn item of a tail stands for, where a
            normaliser is estimated.
        seen: what the n contexts (places 0 to n − 1) have in the training data; only in a step, for
            losses that ask for it.
    """

    items: Tensor
    teacher_scores: Tensor | None = None
    keep: Tensor | None = None
    gamma: Tensor | None = None
    overlap: Tensor | None = None
    log_tail: Tensor | None = None
    seen: Seen | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def rows(self, index: Tensor) -> ItemSets:
        """The sets of the contexts at ``index`` (positions, not ids)."""
        part: dict[str, Any] = {
            name: value.index_select(0, index) for name, value in self.tensors().items()
        }
        return ItemSets(**part, seen=None if self.seen is None else self.seen.among(index))

    def put(self, index: Tensor, block: ItemSets) -> None:
        """Overwrite the rows at ``index`` with those of ``block``, in place."""
        for name, value in block.tensors().items():
            target: Tensor = getattr(self, name)
            target[index] = value.to(target.dtype)

    def empty_like(self, n: int) -> ItemSets:
        """Unfilled sets of the same widths for ``n`` contexts; ids are kept in 32 bits."""
        fields = self.tensors()
        widths = {name: (n, *value.shape[1:]) for name, value in fields.items()}
        empty: dict[str, Any] = {
            name: torch.zeros(
                widths[name],
                dtype=torch.int32 if name == "items" else value.dtype,
                device=value.device,
            )
            for name, value in fields.items()
        }
        return ItemSets(**empty)


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

    @classmethod
    def nothing(cls, n_contexts: int, n_ids: int) -> Seen:
        """Nobody has anything."""
        return cls(
            torch.zeros(n_contexts + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), n_ids
        )

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
        rows, places = self.places(contexts)
        return rows, self.ids[places]

    def places(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the places in ``ids`` instead of the ids."""
        counts = self.counts()[contexts]
        rows = torch.repeat_interleave(torch.arange(len(contexts), device=contexts.device), counts)
        offset = torch.arange(len(rows), device=contexts.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.starts[contexts][rows] + offset

    def among(self, contexts: Tensor) -> Seen:
        """Of these contexts alone, under the places 0 to n − 1."""
        _, ids = self.cells(contexts)
        starts = torch.cat([self.starts.new_zeros(1), self.counts()[contexts].cumsum(0)])
        return Seen(starts, ids, self.n_ids)

    def transposed(self) -> Seen:
        """Who has it, for each id."""
        n_contexts = len(self.starts) - 1
        owners = torch.repeat_interleave(
            torch.arange(n_contexts, device=self.ids.device), self.counts()
        )
        return Seen.from_pairs(self.ids, owners, self.n_ids, n_contexts)


@dataclass(frozen=True)
class Vectors:
    """Rows of the student's and of the teacher's table for the same users, or items.

    Args:
        ids: ``[m]``, distinct; first those that stand in the batch.
        student: ``[m, d_S]``, with gradient.
        teacher: ``[m, d_T]``.
        weights: ``[n]``, n ≤ m, of those in the batch: 1 for a user; for an item ½ if it is among
            the positives and ½ if among the negatives (1 where the model has no negatives).
    """

    ids: Tensor
    student: Tensor
    teacher: Tensor
    weights: Tensor

    @property
    def n(self) -> int:
        """How many stand in the batch."""
        return len(self.weights)


class TeacherScores(ABC):
    """The frozen teacher as a table that can be asked for any cell; ids are the *student's*.

    Rows are users, or, for a sequential student whose teacher is sequential too, the rows of the
    training data.

    Attributes:
        n_contexts: how many users (or rows) there are, padding included.
        n_items: how many items, padding included.
        partial: its lists of the best hold listed items only, so they may be shorter than the
            catalogue, and differ from the best of :meth:`score_all`.
    """

    n_contexts: int
    n_items: int
    partial: bool = False

    @abstractmethod
    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """Scores ``[n, T]`` (float32) of ``items [n, T]`` for ``contexts [n]``.

        −inf for users of whom the teacher says nothing (and whose lists are empty): they are not
        taught.
        """

    @abstractmethod
    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores ``[n, n_items]`` (float32) of every item; the padding column is −inf.

        A row of −inf for users of whom the teacher says nothing.
        """

    @abstractmethod
    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """The ids ``[n, k]`` of the best items, best first; 0 where there are fewer than ``k``.

        ``unseen=True`` leaves out what the user has in the training data.
        """

    @abstractmethod
    def transposed(self) -> TeacherScores:
        """The same table seen from the items: rows are items, "items" are users."""

    def vectors(self) -> tuple[Tensor, Tensor] | None:
        """Tables ``[n_contexts, d]``, ``[n_items, d]`` whose product the scores are, if any."""
        return None

    def moments(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mean, variance and size of each user's scores over the catalogue, in closed form.

        float64, ``[n_contexts]`` each; *size* is how large the terms are that may cancel in the
        mean. ``None``: there is no closed form, so full rows are asked for.
        """
        return None
