"""The KD terms of one training run: for each loss who computes it, from whatever teacher there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import Seen, TeacherScores
from recbole_rcekd.data.contexts import is_sequential, row_ids_in_batches
from recbole_rcekd.data.fingerprint import training_interactions
from recbole_rcekd.losses.base import EmbeddingLoss, KDLoss, Loss
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.checkpoint_teacher import Teacher
from recbole_rcekd.teachers.ensemble import rescaled
from recbole_rcekd.teachers.load import (
    LoadedTeacher,
    NoTeacher,
    ScoreFile,
    Teachers,
    open_scores,
    vectors,
)
from recbole_rcekd.teachers.trajectory import open_trajectories
from recbole_rcekd.training.embedding_distiller import EmbeddingDistiller, require_vectors
from recbole_rcekd.training.sequence_candidates import RowTeacher, row_teacher_of
from recbole_rcekd.training.sequence_distiller import SequenceDistiller, require_one_side
from recbole_rcekd.training.user_distiller import UserDistiller

AnyDistiller = UserDistiller | SequenceDistiller | EmbeddingDistiller


@dataclass(frozen=True)
class Term:
    """One summand ``weight · KD`` of the loss.

    Args:
        name: of the method; ``<name>_of_vectors`` for the loss of vectors that belongs to one of
            scores.
        loss: which method.
        weight: λ.
        distiller: who computes it.
        step: the batch, and the products met in the base loss → KD.
    """

    name: str
    loss: Loss
    weight: float
    distiller: AnyDistiller
    step: Callable[[Any, Any], Tensor]


def require_learner(scorer: ModelScorer, losses: Mapping[str, Loss], ranks: Ranks) -> None:
    """Refuse methods that this student, or several processes, cannot learn by, whoever the teacher is.

    Args:
        scorer: the student.
        losses: the methods, by name.
        ranks: this process among those that train the student.

    Raises:
        SettingsError: says which and why.
    """
    for name, loss in losses.items():
        for part, _ in _parts(loss):
            if isinstance(part, KDLoss):
                require_one_side(part, scorer)
            elif isinstance(part, EmbeddingLoss):
                if ranks.world > 1:
                    raise SettingsError(
                        f"[kd_loss] {name} learns from vectors, with parts of its own beside the "
                        "student that several processes do not share: set nproc to 1."
                    )
                with _saying_how_to_do_without(part):
                    require_vectors(name, part, scorer)


def _parts(loss: Loss) -> list[tuple[Loss, float]]:
    """A loss and, if it has one, the loss of vectors that belongs to it, with their weights."""
    more = loss.feature_side() if isinstance(loss, KDLoss) else None
    return [(loss, loss.weight)] + ([] if more is None else [(more[0], loss.weight * more[1])])


@contextmanager
def _saying_how_to_do_without(part: EmbeddingLoss) -> Iterator[None]:
    try:
        yield
    except (SettingsError, TeacherError) as error:
        if not part.left_out_by:
            raise
        raise type(error)(f"{error} Or leave the vectors out: {part.left_out_by}.") from error


@dataclass(frozen=True)
class KDTermBuilder:
    """Makes the terms of one run.

    Args:
        scorer: the student.
        dataset: the training set.
        teacher: as loaded, or scores in the student's ids, or ``None`` for methods that need none.
        settings: what is common to all methods.
        seed: of the draws.
        ranks: this process among those that train the student.
        n_epochs: how long the training may last.
        show_progress: while the teacher's scores are computed.
    """

    scorer: ModelScorer
    dataset: Any
    teacher: LoadedTeacher | TeacherScores | None
    settings: KDSettings
    seed: int
    ranks: Ranks
    n_epochs: int
    show_progress: bool = False

    @cached_property
    def seen(self) -> Seen:
        """The training interactions; rows of sequential students do without."""
        return training_interactions(self.dataset)

    def terms(self, losses: Mapping[str, Loss]) -> list[Term]:
        """A term for each loss, and for each loss of vectors that belongs to one.

        Raises:
            SettingsError: a loss cannot be used with this student, or with several processes.
            TeacherError: nor with this teacher.
        """
        require_learner(self.scorer, losses, self.ranks)
        loaded: Any = (
            self.teacher if isinstance(self.teacher, (Teacher, ScoreFile, Teachers)) else None
        )
        sequential = is_sequential(self.dataset)
        raw: TeacherScores
        if loaded is not None:
            raw = open_scores(
                loaded, self.settings, self.scorer.device, self.show_progress, self.ranks
            )
        elif self.teacher is not None:
            raw = self.teacher  # type: ignore[assignment]
        else:
            n = len(self.dataset) if sequential else int(self.dataset.user_num)
            raw = NoTeacher(n, int(self.dataset.item_num), self.scorer.device)
        how, temperature = self.settings.kd_teacher_scores, self.settings.kd_teacher_temperature
        scores = rescaled(raw, how, temperature, self.scorer.device)
        trajectories: Sequence[Sequence[TeacherScores]] = ()
        for loss in losses.values():
            if isinstance(loss, KDLoss) and loss.uses_trajectory:
                common = (self.settings, self.scorer.device, self.show_progress, self.ranks)
                trajectories = open_trajectories(self.teacher, scores, loss, self.dataset, *common)
        by_rows = None if loaded is None else loaded.scores_rows
        teaching = row_teacher_of(self.dataset, scores, by_rows) if sequential else None
        terms: list[Term] = []
        for name, loss in losses.items():
            for part, weight in _parts(loss):
                # Each term draws from a generator of its own; the first as if it were alone.
                seed = self.seed + 7919 * len(terms)
                if isinstance(part, EmbeddingLoss):
                    with _saying_how_to_do_without(part):
                        term = self._of_vectors(name, part, weight, raw, scores, seed)
                    terms.append(
                        term
                        if part is loss
                        else dataclasses.replace(term, name=f"{name}_of_vectors")
                    )
                elif isinstance(part, KDLoss):
                    terms.append(
                        self._of_scores(name, part, weight, scores, trajectories, teaching, seed)
                    )
        return terms

    def _of_scores(
        self,
        name: str,
        loss: KDLoss,
        weight: float,
        scores: TeacherScores,
        trajectories: Sequence[Sequence[TeacherScores]],
        teaching: RowTeacher | None,
        seed: int,
    ) -> Term:
        common = (loss, self.settings)
        if teaching is not None:
            rows = SequenceDistiller(
                self.scorer, teaching, *common, self.dataset, seed, self.ranks, trajectories
            )
            return Term(name, loss, weight, rows, rows.step)
        users = UserDistiller(
            self.scorer, scores, *common, self.seen, seed, self.ranks, trajectories
        )
        field = self.dataset.uid_field
        return Term(name, loss, weight, users, lambda batch, products: users.step(batch[field]))

    def _of_vectors(
        self,
        name: str,
        loss: EmbeddingLoss,
        weight: float,
        raw: TeacherScores,
        scores: TeacherScores,
        seed: int,
    ) -> Term:
        tables = vectors(name, self.teacher, raw)
        teacher = scores if scores.n_contexts == int(self.dataset.user_num) else None
        distiller = EmbeddingDistiller(
            name,
            self.scorer,
            tables,
            teacher,
            loss,
            self.settings,
            self.dataset,
            self.seen,
            seed,
            self.n_epochs,
        )
        return Term(name, loss, weight, distiller, lambda batch, products: distiller.step(batch))

    def watching(self, terms: Sequence[Term]) -> tuple[Any, AbstractContextManager[Any]]:
        """What the terms need while the model trains: a watch on the products of a batch, and numbers on its rows."""
        if any(isinstance(term.distiller, SequenceDistiller) for term in terms):
            return self.scorer.recording_products, row_ids_in_batches(self.dataset)
        return (lambda batch: nullcontext()), nullcontext()
