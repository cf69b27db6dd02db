"""The types that the parts of the package share.

:class:`ItemSets` holds the items that a loss learns on, :class:`Seen` the training interactions,
:class:`TeacherScores` the teacher's scores. Ids are RecBole's: id 0 of users and of items is
padding, so an item id of 0 means "no item".

A *context* is what items are scored for. It is a user, or for a sequential student a row of the
training data: a sequence and its next item. The texts below say "user" for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ItemSets:
    """The items that each of ``n`` users (or rows of sequences) learns on, and their scores.

    Args:
        items: item ids ``[n, T]``, integer; 0 means "no item".
        teacher_scores: the teacher's scores of ``items``, ``[n, T]``, or ``None`` for losses that
            use only the order.
        keep: ``[n, T]`` bool, which of ``items`` count (``None``: all of them).
        gamma: ``[n]``, mixing weight of a loss with two terms (``None`` for the others).
        overlap: ``[n]``, share of the teacher's top-K that is also in the student's top-K, for
            methods that use both.
        log_tail: ``[n]``, for losses that estimate a normaliser from a sample: the log of the
            number of items that each drawn item represents.
        seen: the training interactions of the n users, numbered 0 to n − 1; only in a training
            step, for losses that ask for it.
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
        """The sets of the users at ``index`` (positions, not ids)."""
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
        """Sets of the same widths for ``n`` users, all 0; ids are int32."""
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
    """The training interactions: for each user the sorted ids of the user's items.

    Args:
        starts: ``[n_contexts + 1]``; user u has the items ``ids[starts[u]:starts[u + 1]]``.
        ids: ``[n]``, the items of all users, ascending for each user.
        n_ids: how many items there are, padding included.
    """

    starts: Tensor
    ids: Tensor
    n_ids: int

    @classmethod
    def from_pairs(cls, contexts: Tensor, ids: Tensor, n_contexts: int, n_ids: int) -> Seen:
        """Build from one pair of a user and an item per interaction; repeats are dropped."""
        keys = torch.unique(contexts.long() * n_ids + ids.long())
        counts = torch.bincount(keys // n_ids, minlength=n_contexts)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(starts, keys % n_ids, n_ids)

    @classmethod
    def nothing(cls, n_contexts: int, n_ids: int) -> Seen:
        """No interactions."""
        return cls(
            torch.zeros(n_contexts + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), n_ids
        )

    def to(self, device: torch.device) -> Seen:
        """The same on another device."""
        return Seen(self.starts.to(device), self.ids.to(device), self.n_ids)

    def counts(self) -> Tensor:
        """How many items each user has, ``[n_contexts]``."""
        return self.starts.diff()

    def contexts(self) -> Tensor:
        """The users that have items; padding (0) is not among them."""
        present = self.counts().nonzero().squeeze(1)
        return present[present != 0]

    def cells(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of a position in ``contexts`` and an item of that user, to mask full rows."""
        rows, places = self.positions(contexts)
        return rows, self.ids[places]

    def positions(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Like :meth:`cells`, with the positions in ``ids`` instead of the items."""
        counts = self.counts()[contexts]
        rows = torch.repeat_interleave(torch.arange(len(contexts), device=contexts.device), counts)
        offset = torch.arange(len(rows), device=contexts.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.starts[contexts][rows] + offset

    def among(self, contexts: Tensor) -> Seen:
        """The interactions of these users alone, numbered 0 to n − 1."""
        _, ids = self.cells(contexts)
        starts = torch.cat([self.starts.new_zeros(1), self.counts()[contexts].cumsum(0)])
        return Seen(starts, ids, self.n_ids)

    def transposed(self) -> Seen:
        """The same interactions seen from the items: for each item the ids of its users."""
        n_contexts = len(self.starts) - 1
        owners = torch.repeat_interleave(
            torch.arange(n_contexts, device=self.ids.device), self.counts()
        )
        return Seen.from_pairs(self.ids, owners, self.n_ids, n_contexts)


@dataclass(frozen=True)
class Vectors:
    """The student's and the teacher's embeddings of the same users, or of the same items.

    Args:
        ids: ``[m]``, distinct; those in the batch come first.
        student: ``[m, d_S]``, with gradient.
        teacher: ``[m, d_T]``.
        weights: ``[n]``, n ≤ m, for those in the batch: 1 for a user; for an item ½ if it is among
            the positives and ½ if it is among the negatives (1 if the model has no negatives).
    """

    ids: Tensor
    student: Tensor
    teacher: Tensor
    weights: Tensor

    @property
    def n(self) -> int:
        """How many of the ids are in the batch."""
        return len(self.weights)


class TeacherScores(ABC):
    """The scores of a frozen teacher, by the *student's* ids.

    They are scores for users. If both teacher and student are sequential, they are scores for the
    rows of the training data.

    Attributes:
        n_contexts: how many users (or rows of sequences) there are, padding included.
        n_items: how many items there are, padding included.
        partial: the teacher lists only some items, so its top-K may be shorter than K, and differ
            from the best items of :meth:`score_all`.
    """

    n_contexts: int
    n_items: int
    partial: bool = False

    @abstractmethod
    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """Scores ``[n, T]`` (float32) of ``items [n, T]`` for the users ``contexts [n]``.

        −inf for users whom the teacher does not cover. Their top-K is empty, and they are not
        taught.
        """

    @abstractmethod
    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores ``[n, n_items]`` (float32) of every item; the padding column is −inf.

        The whole row is −inf for users whom the teacher does not cover.
        """

    @abstractmethod
    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """The ids ``[n, k]`` of the best items, best first; 0 where there are fewer than ``k``.

        ``unseen=True`` leaves out the items that the user has in the training data.
        """

    @abstractmethod
    def transposed(self) -> TeacherScores:
        """The same scores seen from the items: its users are the items, its items the users."""

    def vectors(self) -> tuple[Tensor, Tensor] | None:
        """Tables ``[n_contexts, d]``, ``[n_items, d]`` whose product is the scores, if any."""
        return None

    def moments(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mean, variance and size of each user's scores over the catalogue, in closed form.

        float64, ``[n_contexts]`` each. *Size* is how large the terms are that may cancel in the
        mean. ``None``: there is no closed form, so the moments are computed from full rows.
        """
        return None
