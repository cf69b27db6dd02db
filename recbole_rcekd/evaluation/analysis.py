"""Compares the checkpoints of a student and its teacher on the student's data; nothing is trained.

Data and split come from the student's checkpoint. Teacher, student and ``baseline`` (a student that
was trained alone) all give scores in the student's ids.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.files import write_json, write_whole
from recbole_rcekd.evaluation import curves
from recbole_rcekd.evaluation.model_analysis import ModelAnalysis
from recbole_rcekd.evaluation.tables import as_text
from recbole_rcekd.teachers.load import source_list

ANALYSIS_FORMAT = 1


def analyse(
    teacher: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    student: str | os.PathLike[str] | None = None,
    baseline: str | os.PathLike[str] | None = None,
    history: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    users: int = 1000,
    output_dir: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    config_dict: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare a student with its teacher, or the histories of several runs; nothing is trained.

    Args:
        teacher: what :func:`~recbole_rcekd.teachers.load.load_teacher` takes: a RecBole checkpoint,
            a file of scores, or several.
        student: a RecBole checkpoint; data and split are those of its Config.
        baseline: a RecBole checkpoint of the same student trained alone. It shows which share of
            the teacher's advantage the student has gained.
        history: ``history.csv`` files, or folders that contain some (the ``output_dir`` of a
            command); without teacher and student, by default ``output_dir``.
        users: for how many training users (rows of a sequential student) all items are scored; 0:
            all.
        output_dir: where ``analysis.json`` and ``analysis.md`` are written, and for histories
            ``curves.csv`` and (with matplotlib) ``curves.svg``.
        dataset: the name of the dataset; it need not be given.
        config_dict: ``data_path``, RecBole's device keys, ``metrics`` and ``topk``; the settings of
            the teacher (``teacher_…``, ``kd_teacher_…``) and of the candidates whose closure gap is
            measured (``ce_…``, ``rce_…``).

    Returns:
        The content of ``analysis.json``, which docs/guides/analysis.md describes;
        :func:`~recbole_rcekd.evaluation.tables.as_text` makes tables of it.

    Raises:
        SettingsError: there is nothing to analyse, a setting is unknown or has no effect, or a file
            is missing.
        TeacherError: a checkpoint is not usable, or was trained on other data.
    """
    history = history or None  # `--history=` is an empty text
    if teacher is None and student is None and history is None:
        history = output_dir
    if history is None and (teacher is None or student is None):
        missing = "student" if student is None else "teacher"
        raise SettingsError(
            f"[{missing}] is missing: give --teacher and --student, two checkpoints, or --history, "
            "the output_dir of a training."
        )
    if (teacher is None) != (student is None) or (baseline is not None and student is None):
        missing = "student" if student is None else "teacher"
        raise SettingsError(f"[{missing}] is missing: a comparison needs --teacher and --student.")
    if not isinstance(users, int) or isinstance(users, bool) or users < 0:
        raise SettingsError(
            f"[analyse_users] is {users!r}, but must be a whole number of at least 0; 0 looks at "
            "all."
        )
    result: dict[str, Any] = {"format": ANALYSIS_FORMAT}
    if teacher is not None and student is not None:
        # RecBole unpickles saved datasets that it finds in the folder of checkpoints, so it gets an
        # empty folder.
        with tempfile.TemporaryDirectory() as empty:
            given = dict(config_dict or {})
            result |= ModelAnalysis(
                teacher, os.fspath(student), baseline, users, dataset, given, empty
            ).run()
    folder = Path(output_dir) if output_dir else None
    if history is not None:
        histories = curves.read_histories(source_list(history))
        columns = curves.quantities(histories, result.get("metric"))
        runs = {
            name: [_only(row, ["epoch", *columns]) for row in rows]
            for name, rows in histories.items()
        }
        result["curves"] = {"columns": columns, "runs": runs}
        if folder is not None:
            curves.write_curves(folder / "curves.csv", histories, columns)
            curves.draw_curves(folder / "curves.svg", histories, columns)
    if folder is not None:
        write_json(folder / "analysis.json", result)
        write_whole(folder / "analysis.md", as_text(result, "github") + "\n")
    getLogger().info(as_text(result))
    return result


def _only(row: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: row[name] for name in names if name in row}
