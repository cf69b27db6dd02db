"""Opens the teacher that ``--teacher`` names, or makes a teacher of what a trainer was given.

:data:`TEACHERS` is the table of the kinds that can be named. A kind of your own is one more line:
``TEACHERS["mine"] = MyTeacher``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import TeacherSettings, read_settings
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.checkpoint_teacher import CheckpointTeacher
from recbole_rcekd.teachers.ensemble import TeacherEnsemble
from recbole_rcekd.teachers.no_teacher import NoTeacher
from recbole_rcekd.teachers.score_file import ScoreFileTeacher
from recbole_rcekd.teachers.scores_in_memory import SCORE_METHODS, ScoresInMemory

# The last kind in the table that recognises a name opens it. CheckpointTeacher recognises every
# name, so it is the first.
TEACHERS: dict[str, type[Teacher]] = {
    "checkpoint": CheckpointTeacher,
    "score_file": ScoreFileTeacher,
}


def load_teacher(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    train_data: Any,
    trust: bool = False,
    settings: TeacherSettings | None = None,
) -> Teacher:
    """Open the teacher of a student.

    Args:
        source: path of a checkpoint that RecBole's trainer wrote, or of a file of scores
            (:func:`~recbole_rcekd.teachers.score_file.read_scores`); or several, as a list or
            separated by commas.
        train_data: the student's training data, as ``data_preparation`` returned it (or its
            dataset).
        trust: allow pickled objects that are not RecBole's (see
            :mod:`recbole_rcekd.teachers.safe_load`).
        settings: the settings of score files and of several teachers; default: those in the Config
            of the data.

    Returns:
        The teacher, with the student's ids.

    Raises:
        TeacherError: a file is not usable, or a teacher learned from other interactions than the
            student will.
        SettingsError: no teacher is named, or there are not as many weights as teachers.

    Example:
        >>> teacher = load_teacher("saved/BPR-teacher.pth", train_data)  # doctest: +SKIP
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
    parts = [kind_of(each).load(each, dataset, settings, trust) for each in sources]
    return parts[0] if len(parts) == 1 else TeacherEnsemble(parts, weights, settings)


def kind_of(source: str) -> type[Teacher]:
    """The kind of teacher that ``source`` names, from :data:`TEACHERS`."""
    return next(kind for kind in reversed(TEACHERS.values()) if kind.recognises(source))


def source_list(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The teachers that ``--teacher`` names, one name each.

    A text is split at its commas, unless the whole text is the name of a file that exists.
    """
    if isinstance(source, (str, os.PathLike)):
        whole = os.fspath(source)
        if os.path.exists(whole):
            return [whole]
        return [part.strip() for part in whole.split(",") if part.strip()]
    return [os.fspath(each) for each in source]


def as_teacher(given: Teacher | TeacherScores | None, dataset: Any) -> Teacher:
    """Make a teacher of what a trainer was given.

    Args:
        given: a teacher, scores in the student's ids, or ``None`` for no teacher.
        dataset: the student's training dataset.
    """
    if given is None:
        return NoTeacher(dataset)
    return given if isinstance(given, Teacher) else ScoresInMemory(given, dataset)


def require_teacher(given: Any) -> None:
    """Refuse what is neither a teacher nor scores, before a trainer is built with it.

    Raises:
        SettingsError: ``given`` is the name of a file, or something else; the message says what to
            do.
    """
    if given is None or isinstance(given, (Teacher, TeacherScores)):
        return
    if isinstance(given, (str, os.PathLike)):
        raise SettingsError(
            "[teacher] is the name of a file: open it with "
            f"load_teacher({os.fspath(given)!r}, train_data)."
        )
    if any(not hasattr(given, name) for name in ("n_contexts", "n_items", *SCORE_METHODS)):
        raise SettingsError(
            f"[teacher] is a {type(given).__name__}, but must be what load_teacher returns, a "
            "Teacher, or scores with the methods of recbole_rcekd.core.types.TeacherScores."
        )
