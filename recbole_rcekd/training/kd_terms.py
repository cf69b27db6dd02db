"""The KD terms of one training run: each loss with its weight and its distiller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.types import Seen, TeacherScores
from recbole_rcekd.data.contexts import is_sequential, row_ids_in_batches
from recbole_rcekd.data.fingerprint import training_interactions
from recbole_rcekd.losses.base import EmbeddingLoss, KDLoss, Loss
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.rescale import rescaled
from recbole_rcekd.teachers.trajectory import open_trajectories
from recbole_rcekd.training.distiller import Distiller
from recbole_rcekd.training.embedding_distiller import EmbeddingDistiller, require_vectors
from recbole_rcekd.training.sequence_candidates import RowTeacher, row_teacher_of
from recbole_rcekd.training.sequence_distiller import SequenceDistiller, require_one_side
from recbole_rcekd.training.user_distiller import UserDistiller


@dataclass(frozen=True)
class Term:
    """One term ``weight · KD`` of the training loss.

    Args:
        name: the name of the method; ``<name>_of_vectors`` for the embedding loss that is a part of
            a method of scores.
        weight: λ.
        distiller: computes the KD loss.
    """

    name: str
    weight: float
    distiller: Distiller


def require_learner(scorer: ModelScorer, losses: Mapping[str, Loss], ranks: Ranks) -> None:
    """Refuse methods that cannot be used with this student or with several processes.

    The teacher does not matter here.

    Args:
        scorer: the student.
        losses: the methods, by name.
        ranks: this process among those that train the student.

    Raises:
        SettingsError: a method cannot be used; the message says which and why.
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
    """A loss and, if it has one, the embedding loss that is a part of it, with their weights."""
    more = loss.embedding_side() if isinstance(loss, KDLoss) else None
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
    """Makes the KD terms of one training run.

    Args:
        scorer: the student.
        dataset: the training set.
        teacher: the student's teacher; :class:`~recbole_rcekd.teachers.no_teacher.NoTeacher` for
            methods that need none.
        settings: the settings that are common to all methods.
        seed: the seed of all random draws.
        ranks: this process among those that train the student.
        n_epochs: how many epochs the training may have.
        show_progress: show a progress bar while the teacher's scores are computed.
    """

    scorer: ModelScorer
    dataset: Any
    teacher: Teacher
    settings: KDSettings
    seed: int
    ranks: Ranks
    n_epochs: int
    show_progress: bool = False

    @cached_property
    def seen(self) -> Seen:
        """The training interactions of each user."""
        return training_interactions(self.dataset)

    @cached_property
    def raw_scores(self) -> TeacherScores:
        """The teacher's scores, on their own scale."""
        return self.teacher.open_scores(self.settings, self.show_progress, self.ranks)

    @cached_property
    def scores(self) -> TeacherScores:
        """The teacher's scores, on the scale that the settings say."""
        how, temperature = self.settings.kd_teacher_scores, self.settings.kd_teacher_temperature
        return rescaled(self.raw_scores, how, temperature, self.scorer.device)

    def terms(self, losses: Mapping[str, Loss]) -> list[Term]:
        """A term for each loss, and for each embedding loss that is a part of one.

        Args:
            losses: the methods, by name.

        Raises:
            SettingsError: a loss cannot be used with this student, or with several processes.
            TeacherError: a loss cannot be used with this teacher.
        """
        require_learner(self.scorer, losses, self.ranks)
        scores = self.scores
        trajectories: Sequence[Sequence[TeacherScores]] = ()
        for loss in losses.values():
            if isinstance(loss, KDLoss) and loss.uses_trajectory:
                common = (self.settings, self.scorer.device, self.show_progress, self.ranks)
                trajectories = open_trajectories(self.teacher, scores, loss, self.dataset, *common)
        rows = None
        if is_sequential(self.dataset):
            rows = row_teacher_of(self.dataset, scores, self.teacher.scores_rows)
        terms: list[Term] = []
        for name, loss in losses.items():
            for part, weight in _parts(loss):
                # Each term has a generator of its own; the first term's seed is the run's, so its
                # draws are the same with further terms or without.
                seed = self.seed + 7919 * len(terms)
                if isinstance(part, EmbeddingLoss):
                    with _saying_how_to_do_without(part):
                        distiller: Distiller = self._of_embeddings(name, part, seed)
                    own_name = name if part is loss else f"{name}_of_vectors"
                    terms.append(Term(own_name, weight, distiller))
                elif isinstance(part, KDLoss):
                    terms.append(
                        Term(name, weight, self._of_scores(part, trajectories, rows, seed))
                    )
        return terms

    def _of_scores(
        self,
        loss: KDLoss,
        trajectories: Sequence[Sequence[TeacherScores]],
        rows: RowTeacher | None,
        seed: int,
    ) -> Distiller:
        if rows is not None:
            return SequenceDistiller(
                self.scorer, rows, loss, self.settings, self.dataset, seed, self.ranks, trajectories
            )
        return UserDistiller(
            self.scorer,
            self.scores,
            loss,
            self.settings,
            self.seen,
            seed,
            self.ranks,
            trajectories,
            str(self.dataset.uid_field),
        )

    def _of_embeddings(self, name: str, loss: EmbeddingLoss, seed: int) -> Distiller:
        tables = self.raw_scores.vectors()
        if tables is None:
            raise TeacherError(
                f"[kd_loss] {name} learns the teacher's vectors, but the scores of "
                f"{self.teacher.name} are no product of user and item vectors: choose a method of "
                "scores (rce, ce, rrd, …) or another teacher."
            )
        users = tables[0] if self.teacher.scores_users else None
        of_users = self.scores.n_contexts == int(self.dataset.user_num)
        return EmbeddingDistiller(
            name,
            self.scorer,
            (users, tables[1]),
            self.scores if of_users else None,
            loss,
            self.settings,
            self.dataset,
            self.seen,
            seed,
            self.n_epochs,
        )

    def recording(self, terms: Sequence[Term]) -> tuple[Any, AbstractContextManager[Any]]:
        """The context managers that the terms need in training.

        Args:
            terms: the terms of the run.

        Returns:
            A function from a batch to a context manager that records the products of the base loss,
            and a context manager that adds the ids of rows to the batches.
        """
        if any(term.distiller.needs_rows for term in terms):
            return self.scorer.recording_products, row_ids_in_batches(self.dataset)
        return (lambda batch: nullcontext()), nullcontext()
