r"""Cross-entropy over all items, with the teacher's probabilities of all items or of its top-K.

.. math::
    \text{all:}     &\quad \ell = \log\sum_{j\in I} e^{s_j/\tau}
        - \sum_{i\in I} \sigma_I(t/\tau)_i\, s_i/\tau \\
    \text{teacher:} &\quad \ell = \log\sum_{j\in I} e^{s_j/\tau}
        - \sum_{i\in Q_T} \sigma_{Q_T}(t/\tau)_i\, s_i/\tau

Both are bounds without any assumption on closure: the first on NDCG with all items as targets
(theorem 4.1 of the paper), the second on NDCG of :math:`Q_T` (T3 of METHODS.md with A = I; ours,
not in the paper). They need the student's scores of all *items* in every step. For a user without
teacher scores, the loss is 0.

``fce_normaliser: sampled`` estimates the normaliser of the second from the items that weigh most
and n others:

.. math:: \log \hat Z = \log\Big[\sum_{j\in A} e^{s_j/\tau}
    + \frac{N-|A|}{n} \sum_{j\in\text{tail}} e^{s_j/\tau}\Big], \qquad A = Q_T \cup Q_S

The tail is drawn uniformly, without replacement, from the other :math:`N-|A|` items.
:math:`\hat Z` is unbiased; its logarithm is a little low on average. If the tail holds all other
items, the loss is exact.

Source: RCE-KD, ICLR 2026, section 4.1 ("full-CE" in figure 3) for ``all``; the rest is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.full_softmax import catalogue_cross_entropy
from recbole_rcekd.core.functional import (
    at_least_float32,
    is_member,
    masked_softmax,
    soft_cross_entropy,
)
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets
from recbole_rcekd.losses.base import KDLoss
from recbole_rcekd.losses.candidates import Candidates


@dataclass(frozen=True)
class FCESettings(LossSettings):
    """Settings of FCE; ``properties/loss/fce.yaml`` documents each."""

    prefix = "fce"

    fce_weight: float = setting(10.0, low=0.0)
    fce_target: Literal["all", "teacher"] = "teacher"
    fce_top_k: int = setting(50, low=1)
    fce_temperature: float = setting(1.0, above=0.0)
    fce_normaliser: Literal["all", "sampled"] = "all"
    fce_samples: int = setting(200, low=1)

    def check_relations(self) -> None:
        """The normaliser can be estimated only if the targets are the teacher's top-K.

        Raises:
            SettingsError: it is to be estimated, and all items are targets.
        """
        if self.fce_normaliser == "sampled" and self.fce_target == "all":
            raise SettingsError(
                "[fce_normaliser] is 'sampled', but with [fce_target]='all' every item has to be "
                "scored as a target anyway: set fce_target to 'teacher'."
            )

    def longest_list(self) -> tuple[str, ...]:
        """One top-K, if the targets are a top-K."""
        return ("fce_top_k",) if self.fce_target == "teacher" else ()


class FCELoss(KDLoss):
    """Cross-entropy whose normaliser runs over all items.

    Relations: with ``fce_target: all`` it is the limit of
    :class:`~recbole_rcekd.losses.ce.CELoss` for K = all items.

    Example:
        Three items, with the student's probabilities 1/5, 3/5 and 1/5. The teacher's top-2 are the
        items 2 and 1, with probabilities 3/4 and 1/4.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.fce import FCELoss, FCESettings
        >>> loss = FCELoss(FCESettings())
        >>> sets = ItemSets(
        ...     items=torch.tensor([[2, 1]]), teacher_scores=torch.tensor([[3.0, 1.0]]).log()
        ... )
        >>> student_scores = torch.tensor([[0.0, 1.0, 3.0, 1.0]]).log()  # column 0 is no item
        >>> value = loss.forward(student_scores, sets)  # 3/4 ln 5/3 + 1/4 ln 5
        >>> round(value.item(), 4)
        0.7855
    """

    settings_type = FCESettings
    settings: FCESettings

    def __init__(self, settings: FCESettings) -> None:
        super().__init__(settings)
        self.teaches_all_items = settings.fce_target == "all"
        self.renewed = settings.fce_normaliser == "sampled"
        self.scores_all_items = not self.renewed

    def select(self, candidates: Candidates) -> ItemSets:
        """The teacher's top-K with its scores; nothing if all items are targets.

        For an estimated normaliser ``[Q_T | Q_S | tail (n)]``, where each item is kept once. The
        targets are the items that have a teacher score (−∞ elsewhere).
        """
        if self.teaches_all_items:
            return ItemSets(
                torch.zeros(
                    (len(candidates.contexts), 0),
                    dtype=torch.int64,
                    device=candidates.contexts.device,
                )
            )
        teacher_top = candidates.teacher_top(self.settings.fce_top_k)
        scores = candidates.teacher_scores(teacher_top)
        if self.settings.fce_normaliser == "all":
            return ItemSets(teacher_top, scores)
        student_top = candidates.student_top(self.settings.fce_top_k)
        listed = torch.cat(
            [teacher_top, student_top.masked_fill(is_member(student_top, teacher_top), 0)], dim=1
        )
        tail = candidates.draw(self.settings.fce_samples, outside=listed)
        items = torch.cat([listed, tail], dim=1)
        rest = candidates.n_allowed() - (listed != 0).sum(1)
        return ItemSets(
            items,
            torch.nn.functional.pad(
                scores, (0, items.shape[1] - scores.shape[1]), value=-torch.inf
            ),
            keep=(items != 0) & (teacher_top != 0).any(1, keepdim=True),
            # If the tail is empty, there are no other items: log 1 − log 1.
            log_tail=rest.clamp(min=1).log() - (tail != 0).sum(1).clamp(min=1).log(),
        )

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """The loss of each user.

        Args:
            student_scores: ``[B, N]``, column 0 is padding; for an estimated normaliser the scores
                of ``sets.items``.
            sets: for ``fce_target: all`` with ``teacher_scores [B, N]``.
        """
        if sets.teacher_scores is None:
            raise ValueError("FCELoss needs teacher_scores; see FCELoss.select.")
        tau = self.settings.fce_temperature
        if self.settings.fce_normaliser == "sampled":
            return self._estimated(
                at_least_float32(student_scores) / tau, sets.teacher_scores.detach() / tau, sets
            )
        if self.teaches_all_items:
            # −inf: a masked item, or a user without teacher scores.
            taught = sets.teacher_scores[:, 1:] != -torch.inf
            keep = None if taught.all() else taught
            return soft_cross_entropy(student_scores[:, 1:], sets.teacher_scores[:, 1:], keep, tau)
        target = masked_softmax(sets.teacher_scores.detach() / tau, sets.items != 0)
        return catalogue_cross_entropy(at_least_float32(student_scores), sets.items, target, tau)

    def _estimated(self, student: Tensor, teacher: Tensor, sets: ItemSets) -> Tensor:
        if sets.keep is None or sets.log_tail is None:
            raise ValueError(
                "FCELoss needs keep and log_tail to estimate a normaliser; see FCELoss.select."
            )
        n, lowest = self.settings.fce_samples, torch.finfo(student.dtype).min
        stands_for = torch.nn.functional.pad(
            sets.log_tail.unsqueeze(1).expand(-1, n), (student.shape[1] - n, 0)
        )
        normaliser = (student + stands_for).masked_fill(~sets.keep, lowest).logsumexp(-1)
        targets = sets.keep & (teacher != -torch.inf)
        target = masked_softmax(teacher, targets)
        loss = normaliser - (target * student.masked_fill(~targets, 0.0)).sum(-1)
        return loss.where(targets.any(1), 0.0)
