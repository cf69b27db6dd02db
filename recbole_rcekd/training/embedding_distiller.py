"""Embedding distillation: the KD term of the embeddings of a batch's users and items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import Seen, TeacherScores, Vectors
from recbole_rcekd.losses.base import EmbeddingLoss
from recbole_rcekd.models.product_recorder import Product
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.training.diagnostics import DiagnosticUsers
from recbole_rcekd.training.distiller import Distiller


class EmbeddingDistiller(Distiller):
    """The KD term of a method of embedding distillation in one training run.

    Args:
        name: the name of the method, for messages.
        scorer: the student.
        tables: the teacher's embeddings of users ``[n_users, d]`` (``None`` if it has none) and of
            items ``[n_items, d]``.
        teacher: the teacher's scores, for the diagnostics; ``None``: no diagnostics.
        loss: the method; its learned parts are made here.
        settings: ``kd_diagnostic_users`` is used.
        dataset: the training set; it has the names of the batches' columns.
        seen: the training interactions.
        seed: the seed of all random draws. They come from a generator of their own, so RecBole's
            random stream stays the same.
        n_epochs: how many epochs the training may have.

    Raises:
        SettingsError: the student or the teacher does not have the embeddings that are learned.
    """

    loss: EmbeddingLoss

    def __init__(
        self,
        name: str,
        scorer: ModelScorer,
        tables: tuple[Tensor | None, Tensor],
        teacher: TeacherScores | None,
        loss: EmbeddingLoss,
        settings: KDSettings,
        dataset: Any,
        seen: Seen,
        seed: int,
        n_epochs: int,
    ) -> None:
        super().__init__(loss, scorer, seed)
        self._n_epochs = n_epochs
        self._fields = (
            dataset.uid_field,
            dataset.iid_field,
            dataset.config["NEG_PREFIX"] + dataset.iid_field,
        )
        self._label = dataset.config["LABEL_FIELD"]
        require_vectors(name, loss, scorer)
        named = zip(("users", "items"), tables, strict=True)
        self._tables = {side: table.to(scorer.device) for side, table in named if table is not None}
        if "users" in loss.sides and "users" not in self._tables:
            raise _without_users(name, "the teacher")
        # The id for the other side if only one side is learned: the model gives both or none.
        self._any = torch.ones(1, dtype=torch.int64, device=scorer.device)
        seen = seen.to(scorer.device)
        with preserved_random_state():
            with scorer.evaluating():
                width = scorer.vectors(self._any, self._any)[1].shape[1]
            torch.manual_seed(seed)
            loss.build(width, tables[1].shape[1], seen, self.generator)
        loss.to(scorer.device)
        self._diagnostic_users = None
        if teacher is not None and scorer.scores_users:
            self._diagnostic_users = DiagnosticUsers(
                settings.kd_diagnostic_users, seen.contexts(), teacher, self.generator
            )

    def _prepare(self, epoch: int, n_steps: int) -> None:
        """Tell the loss which share of the training is over."""
        self.loss.begin_epoch(epoch / max(1, self._n_epochs))

    def _kd_loss(self, batch: Any, products: Sequence[Product]) -> Tensor:
        """The loss of the batch's distinct users and items, divided by the number of its rows.

        Papers add a sum over the batch to a base loss that is a sum over the batch too. Their
        weights are right here, since RecBole's base loss is a mean.
        """
        ids, weights = {}, {}
        for side in self.loss.sides:
            in_batch, weights[side] = _distinct(self._kinds(side, batch))
            ids[side] = self.loss.needed(side, in_batch)
        found = self._scorer.vectors(ids.get("users", self._any), ids.get("items", self._any))
        student = dict(zip(("users", "items"), found, strict=True))
        # Only the model computes in half precision, not the loss.
        with torch.autocast(self._any.device.type, enabled=False):
            vectors = {
                side: Vectors(
                    needed,
                    student[side].float(),
                    self._tables[side].index_select(0, needed),
                    weights[side],
                )
                for side, needed in ids.items()
            }
            return self.loss.forward(vectors.get("users"), vectors.get("items")) / len(batch)

    def _kinds(self, side: str, batch: Any) -> list[Tensor]:
        """The ids of a side in a batch, for each kind.

        For users there is one kind. For items there are two, positive and negative, or one if the
        batch has no negatives.
        """
        user_field, item_field, negative_field = self._fields
        if side == "users":
            return [batch[user_field]]
        if negative_field in batch:
            return [batch[item_field], batch[negative_field]]
        if self._label in batch:
            positive = batch[self._label] > 0
            return [batch[item_field][positive], batch[item_field][~positive]]
        return [batch[item_field]]

    def _diagnostics(self) -> dict[str, float]:
        """The distance of the student's ranking from the teacher's."""
        users = self._diagnostic_users
        if users is None or len(users) == 0:
            return {}
        return users.distance(self._scorer.score_all(users.contexts))


def require_vectors(name: str, loss: EmbeddingLoss, scorer: ModelScorer) -> None:
    """Refuse a student without the embeddings that a method distils, with any teacher.

    Args:
        name: the name of the method, for messages.
        loss: the method.
        scorer: the student.

    Raises:
        SettingsError: the student's scores are no product of embeddings, or it has no embeddings of
            users.
    """
    if scorer.kind != "product":
        raise SettingsError(
            f"[kd_loss] {name} learns from vectors, but {scorer.name}'s scores are no product of "
            "user and item vectors: choose a method of scores (rce, ce, rrd, …) or another student."
        )
    if "users" in loss.sides and not scorer.scores_users:
        raise _without_users(name, scorer.name)


def _without_users(name: str, who: str) -> SettingsError:
    return SettingsError(
        f"[kd_loss] {name} learns from the vectors of users, but {who} has none: it scores "
        f"sequences. Set {name}_sides: items."
    )


def _distinct(kinds: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The distinct ids of all kinds, without padding, and their weights.

    The weight of an id is the share of the kinds that it belongs to.
    """
    ids = torch.unique(torch.cat(kinds))
    ids = ids[ids != 0]
    weights = torch.zeros(len(ids), device=ids.device)
    for kind in kinds:
        weights += torch.isin(ids, kind).float() / len(kinds)
    return ids, weights
