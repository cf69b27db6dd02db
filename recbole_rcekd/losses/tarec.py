r"""TARec, approximately: Wasserstein distance, contrast of embeddings, and an assistant.

.. math::
    \ell &= \sum_{k=1}^{|J|} \big|F_T(k) - F_S(k)\big|, \qquad
    F(k) = \sum_{j\le k} \sigma_J(\cdot/\tau)_j \\
    J &= Q_T\cup Q_S \text{ in the teacher's order}

This is the Wasserstein-1 distance of the two softmaxes, where the distance of two items is the
distance of their positions in the teacher's order. Its gradient by F_S(k) is the sign of
F_S(k) − F_T(k), and 0 where they are equal. The contrast (:class:`TARecContrast`) is InfoNCE
between the student's projected embedding of a user (or item) and the teacher's embedding of the
same one, against the teacher's embeddings of others in the batch.

The assistant is a model of the student's kind, of ``tarec_assistant_size``. ``run_recbole_kd``
trains it first and then lets it teach the student.
:class:`~recbole_rcekd.training.trainer.DistillTrainer` has no assistant: it uses the teacher that
it is given. To have one there, train it and pass it on as the next teacher.

Source: Zhuang et al., WWW 2025, "Teacher-Assisted Wasserstein Knowledge Distillation", from its
abstract. Approximate: no code of the authors was found; see METHODS.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recbole_rcekd.core.functional import at_least_float32, is_member, masked_softmax
from recbole_rcekd.core.settings import LossSettings, setting
from recbole_rcekd.core.types import ItemSets, Seen, Vectors
from recbole_rcekd.losses.base import EmbeddingLoss, KDLoss
from recbole_rcekd.losses.candidates import Candidates

# At most so many embeddings are contrasted with each other: a batch of 2,048 rows has some 4,000
# items, and the matrix of all pairs is slow on a CPU.
_CONTRASTED_AT_A_TIME = 512
# A squared length that is taken for 0.
_TINY = 1e-24


@dataclass(frozen=True)
class TARecSettings(LossSettings):
    """Settings of TARec; ``properties/loss/tarec.yaml`` documents each."""

    prefix = "tarec"

    tarec_weight: float = setting(1.0, low=0.0)
    tarec_top_k: int = setting(50, low=1)
    tarec_temperature: float = setting(1.0, above=0.0)
    tarec_contrast_weight: float = setting(0.1, low=0.0)
    tarec_contrast_temperature: float = setting(0.2, above=0.0)
    tarec_sides: Literal["both", "users", "items"] = "both"
    tarec_assistant_size: int = setting(-1, low=-1)

    def longest_list(self) -> tuple[str, ...]:
        """One top-K of the teacher, one of the student."""
        return ("tarec_top_k",)


class TARecLoss(KDLoss):
    """Wasserstein-1 distance of teacher and student on the union of their top-K.

    With ``tarec_contrast_weight`` above 0, the contrast of embeddings is added.

    Example:
        The teacher's probabilities are 3/4 and 1/4, the student's 1/4 and 3/4: half of the
        probability lies one position too far down.

        >>> import torch
        >>> from recbole_rcekd.core.types import ItemSets
        >>> from recbole_rcekd.losses.tarec import TARecLoss, TARecSettings
        >>> loss = TARecLoss(TARecSettings())
        >>> sets = ItemSets(
        ...     items=torch.tensor([[5, 7]]),
        ...     teacher_scores=torch.tensor([[3.0, 1.0]]).log(),
        ...     keep=torch.ones(1, 2, dtype=torch.bool),
        ... )
        >>> student_scores = torch.tensor([[1.0, 3.0]]).log()
        >>> round(loss.forward(student_scores, sets).item(), 4)
        0.5
    """

    settings_type = TARecSettings
    settings: TARecSettings

    def select(self, candidates: Candidates) -> ItemSets:
        """``Q_T ∪ Q_S`` in the teacher's order, each item once, then the masked columns.

        Items with equal teacher scores (those that a score file does not list) are in the student's
        order.
        """
        k = self.settings.tarec_top_k
        teacher_top, student_top = candidates.teacher_top(k), candidates.student_top(k)
        items = torch.cat(
            [teacher_top, student_top.masked_fill(is_member(student_top, teacher_top), 0)], dim=1
        )
        scores = candidates.teacher_scores(items).masked_fill(items == 0, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return ItemSets(items.gather(1, order), scores, scores != -torch.inf)

    def forward(self, student_scores: Tensor, sets: ItemSets) -> Tensor:
        """``Σ_k |F_T(k) − F_S(k)|`` of each user."""
        if sets.teacher_scores is None or sets.keep is None:
            raise ValueError("TARecLoss needs teacher_scores and keep; see TARecLoss.select.")
        student, teacher = (
            masked_softmax(scores / self.settings.tarec_temperature, sets.keep)
            for scores in (
                at_least_float32(student_scores),
                at_least_float32(sets.teacher_scores.detach()),
            )
        )
        return (student - teacher).cumsum(-1).abs().masked_fill(~sets.keep, 0.0).sum(-1)

    def embedding_side(self) -> tuple[EmbeddingLoss, float] | None:
        """The contrast of embeddings."""
        weight = self.settings.tarec_contrast_weight
        return None if weight == 0.0 else (TARecContrast(self.settings), weight)


class TARecContrast(EmbeddingLoss):
    r"""InfoNCE between a linear projection of the student's embeddings and the teacher's.

    .. math:: \ell = \sum_i -w_i \log
        \frac{e^{\cos(W s_i, t_i)/\tau}}{\sum_j e^{\cos(W s_i, t_j)/\tau}}

    with j over the batch's users (or its items). If there are more than 512, they are split at
    random into parts of at most 512, and j runs over the part of i. W is learned, one for each
    side.

    Example:
        Two users. With W = 1 the cosine to the own teacher embedding is 1, to the other's 0.

        >>> import torch
        >>> from recbole_rcekd.core.types import Seen, Vectors
        >>> from recbole_rcekd.losses.tarec import TARecContrast, TARecSettings
        >>> loss = TARecContrast(TARecSettings(tarec_contrast_temperature=1.0))
        >>> loss.build(2, 2, Seen.nothing(3, 2), torch.Generator())
        >>> _ = torch.nn.init.eye_(loss.projections["of_users"].weight)
        >>> users = Vectors(
        ...     ids=torch.tensor([1, 2]),
        ...     student=torch.tensor([[6.0, 0.0], [0.0, 5.0]]),
        ...     teacher=torch.tensor([[2.0, 0.0], [0.0, 7.0]]),
        ...     weights=torch.ones(2),
        ... )
        >>> value = loss.forward(users, None)  # −2 ln(e / (e + 1))
        >>> round(value.item(), 4)
        0.6265
    """

    settings_type = TARecSettings
    settings: TARecSettings
    left_out_by = "tarec_contrast_weight: 0"

    def build(
        self, student_width: int, teacher_width: int, seen: Seen, generator: torch.Generator
    ) -> None:
        """The projections W."""
        self.projections = nn.ModuleDict(
            {
                f"of_{side}": nn.Linear(student_width, teacher_width, bias=False)
                for side in self.sides
            }
        )
        self._generator = generator

    def forward(self, users: Vectors | None, items: Vectors | None) -> Tensor:
        """The weighted sum over the batch's users and items."""
        given = {"users": users, "items": items}
        terms = [
            self._contrast(side, vectors) for side, vectors in given.items() if vectors is not None
        ]
        return torch.stack(terms).sum()

    def _contrast(self, side: str, vectors: Vectors) -> Tensor:
        # (W s)·t is s·(Wᵀ t), and |W s|² is s·(WᵀW) s: so the compared vectors are only as wide as
        # the student's.
        projection: Any = self.projections[f"of_{side}"]
        weight, student = projection.weight, vectors.student
        square = ((student @ (weight.t() @ weight)) * student).sum(1, keepdim=True)
        student = student / square.clamp(min=_TINY).sqrt()
        teacher = (
            nn.functional.normalize(vectors.teacher.detach().to(student.dtype), dim=1) @ weight
        )
        total: Tensor = student.new_zeros(())
        for part in self._parts(vectors.n, student.device):
            alike = (
                at_least_float32(student[part] @ teacher[part].t())
                / self.settings.tarec_contrast_temperature
            )
            own = torch.arange(len(part), device=part.device)
            lost = nn.functional.cross_entropy(alike, own, reduction="none")
            total = total + (vectors.weights[part] * lost).sum()
        return total

    def _parts(self, n: int, device: torch.device) -> tuple[Tensor, ...]:
        if n <= _CONTRASTED_AT_A_TIME:
            return (torch.arange(n, device=device),)
        order = torch.randperm(n, generator=self._generator, device=self._generator.device)
        return order.to(device).tensor_split(-(-n // _CONTRASTED_AT_A_TIME))
