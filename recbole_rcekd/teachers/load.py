"""Whatever ``--teacher`` names: a RecBole checkpoint, a file of scores, or several of these as one teacher."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings, read_settings
from recbole_rcekd.core.store import Store
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.data.contexts import is_sequential
from recbole_rcekd.data.fingerprint import split_hash
from recbole_rcekd.teachers.checkpoint_teacher import Teacher, read_teacher
from recbole_rcekd.teachers.ensemble import combined_rows, ensemble
from recbole_rcekd.teachers.score_cache import FactorScores, open_teacher_scores
from recbole_rcekd.teachers.score_file import SCORE_FILES, ListedScores, read_scores


class ScoreFile:
    """A teacher that is a file of scores.

    Args:
        path: of the file.
        student_dataset: the student's training dataset.
        settings: what to do with gaps in the file.
    """

    scores_rows = False

    def __init__(self, path: str, student_dataset: Any, settings: TeacherSettings) -> None:
        self.source = path
        self.student_dataset = student_dataset
        self.name = Path(path).name
        self.for_rows = is_sequential(student_dataset)
        self.scores: ListedScores = read_scores(path, student_dataset, settings)
        self.seen = self.scores.seen
        self.user_field = student_dataset.uid_field
        self._made_by = (split_hash(student_dataset), settings)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the file, the id maps and the settings."""
        digest = hashlib.sha256(Path(self.source).read_bytes())
        digest.update(repr(self._made_by).encode())
        return digest.hexdigest()[:32]

    def score_rows(self, rows: Any) -> Tensor:
        """See :meth:`Teacher.score_rows <recbole_rcekd.teachers.checkpoint_teacher.Teacher.score_rows>`."""
        return self.scores.score_all(rows[self.user_field])

    def listed_rows(self, rows: Any) -> Tensor:
        """The same, with −inf at what the file does not list."""
        scores, users = self.score_rows(rows), rows[self.user_field]
        listed = self.scores.top_k(
            users, scores.shape[1] - 1
        )  # 0 in short lists, the padding item, of score −inf
        return torch.full_like(scores, -torch.inf).scatter_(1, listed, scores.gather(1, listed))


class Teachers:
    """Several teachers as one.

    Args:
        parts: the teachers.
        weights: of each.
        settings: how they are combined.

    Raises:
        TeacherError: some score the rows of a sequential student, and some its users.
    """

    def __init__(
        self,
        parts: Sequence[Teacher | ScoreFile],
        weights: Sequence[float],
        settings: TeacherSettings,
    ) -> None:
        if len({part.scores_rows for part in parts}) > 1:
            told = ", ".join(
                f"[{part.source}] {'rows' if part.scores_rows else 'users'}" for part in parts
            )
            raise TeacherError(
                "Several teachers of a sequential student must all score its sequences, or all its "
                f"users; here: {told}. Take sequential ones only, or none."
            )
        self.parts, self.weights = parts, weights
        self.how = settings.teacher_ensemble
        self.name = " + ".join(part.name for part in parts)
        self.source = ",".join(part.source for part in parts)
        self.seen, self.scores_rows, self.for_rows = (
            parts[0].seen,
            parts[0].scores_rows,
            parts[0].for_rows,
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the parts, their weights and how they are combined."""
        made_by = ([part.fingerprint for part in self.parts], list(self.weights), self.how)
        return hashlib.sha256(repr(made_by).encode()).hexdigest()[:32]

    def score_rows(self, rows: Any) -> Tensor:
        """See :meth:`Teacher.score_rows <recbole_rcekd.teachers.checkpoint_teacher.Teacher.score_rows>`."""
        only_listed = self.how == "reciprocal_rank"  # which ranks a list, and nothing beyond it
        scores = [
            part.listed_rows(rows)
            if only_listed and isinstance(part, ScoreFile)
            else part.score_rows(rows)
            for part in self.parts
        ]
        return combined_rows(scores, self.weights, self.how)


class NoTeacher:
    """A teacher who says nothing of anybody, for methods that learn without one.

    Args:
        n_contexts: padding included.
        n_items: padding included.
        device: where the student is.
    """

    partial = True

    def __init__(self, n_contexts: int, n_items: int, device: torch.device) -> None:
        self.n_contexts, self.n_items = n_contexts, n_items
        self._device = device

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return torch.full(items.shape, -torch.inf, device=self._device)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return torch.full((len(contexts), self.n_items), -torch.inf, device=self._device)

    def top_k(self, contexts: Tensor, k: int, unseen: bool) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return torch.zeros((len(contexts), k), dtype=torch.int64, device=self._device)

    def transposed(self) -> NoTeacher:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        return NoTeacher(self.n_items, self.n_contexts, self._device)


LoadedTeacher = Teacher | ScoreFile | Teachers


def load_teacher(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    train_data: Any,
    trust: bool = False,
    settings: TeacherSettings | None = None,
) -> LoadedTeacher:
    """Open the teacher of a student.

    Args:
        source: path of a checkpoint that RecBole's trainer wrote, or of a file of scores
            (:func:`~recbole_rcekd.teachers.score_file.read_scores`); or several, as a list or with
            commas between.
        train_data: the student's training data, as ``data_preparation`` returned it (or its
            dataset).
        trust: allow pickled content beyond RecBole's own (see
            :mod:`recbole_rcekd.teachers.safe_load`).
        settings: of score files, and of several teachers; default: those in the data's Config.

    Returns:
        The teacher, answering in the student's ids.

    Raises:
        TeacherError: a file is not usable, or a teacher learned from other interactions than the
            student will.
        SettingsError: there are not as many weights as teachers.

    Example:
        >>> teacher = load_teacher("saved/BPR-Nov-24-2026_11-29-00.pth", train_data)  # doctest: +SKIP
    """
    dataset = getattr(train_data, "_dataset", train_data)
    if settings is None:
        settings = read_settings(TeacherSettings, "teacher", dataset.config.final_config_dict)
    sources = source_list(source)
    if not sources:
        raise SettingsError(
            f"[teacher] is {source!r}, but must name a checkpoint or a file of scores."
        )
    weights = settings.weights_of(sources) if len(sources) > 1 else [1.0]
    parts = [
        ScoreFile(each, dataset, settings)
        if is_score_file(each)
        else read_teacher(each, train_data, trust)
        for each in sources
    ]
    return parts[0] if len(parts) == 1 else Teachers(parts, weights, settings)


def source_list(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that ``--teacher`` names; a path that exists is one file, commas or not."""
    if isinstance(source, (str, os.PathLike)):
        whole = os.fspath(source)
        return (
            [whole]
            if os.path.exists(whole)
            else [part.strip() for part in whole.split(",") if part.strip()]
        )
    return [os.fspath(each) for each in source]


def is_score_file(source: str) -> bool:
    """Whether a file holds scores and no model, by its name."""
    return Path(source).suffix.lower() in SCORE_FILES


def open_scores(
    teacher: LoadedTeacher,
    settings: KDSettings,
    device: torch.device,
    show_progress: bool = False,
    ranks: Ranks | None = None,
) -> TeacherScores:
    """The scores of a teacher, from disk if they are there; see :func:`~recbole_rcekd.teachers.score_cache.open_teacher_scores`."""
    if isinstance(teacher, ScoreFile):
        return teacher.scores
    if isinstance(teacher, Teacher):
        return open_teacher_scores(teacher, settings, show_progress, ranks)
    parts = [open_scores(part, settings, device, show_progress, ranks) for part in teacher.parts]
    store = Store(Path(settings.kd_cache_dir) / teacher.fingerprint)
    # A rank asks for lists of the users that it owns, or, for the rows of its batches, of any.
    owners = None if teacher.for_rows else ranks
    return ensemble(
        parts,
        teacher.weights,
        teacher.how,
        teacher.seen,
        store,
        owners,
        device,
        teacher.scores_rows,
    )


def vectors(
    name: str, teacher: LoadedTeacher | TeacherScores | None, scores: TeacherScores
) -> tuple[Tensor | None, Tensor]:
    """The teacher's rows of users (``None`` if it scores sequences) and of items, whose product its scores are.

    Those of several such teachers stand side by side, as they are averaged.

    Args:
        name: of the method, for the message.
        teacher: as loaded.
        scores: its scores.

    Raises:
        TeacherError: it has none.
    """
    if not isinstance(scores, FactorScores):
        who = getattr(teacher, "name", "the teacher")
        raise TeacherError(
            f"[kd_loss] {name} learns the teacher's vectors, but the scores of {who} are no "
            "product of user and item vectors: choose a method of scores (rce, ce, rrd, …) or "
            "another teacher."
        )
    parts = teacher.parts if isinstance(teacher, Teachers) else [teacher]
    of_users = all(part.scores_users for part in parts if isinstance(part, Teacher))
    return scores.context_factors if of_users else None, scores.item_factors
