r"""Teachers from outside RecBole, such as a production system or an LLM: a file of scores.

Each row of the file is a user, an item and a score. An item that the file does not list for a user
has the user's floor as its score:

.. math:: f_u = \min_i t_{ui} - \text{floor} \cdot \sigma_u

where :math:`\sigma_u` is the standard deviation of the user's listed scores (1 where that is 0). So
unlisted items score less than the listed ones. Top-K lists only hold listed items. No row of the
file is left out without a message.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings
from recbole_rcekd.core.types import Seen, TeacherScores
from recbole_rcekd.data.fingerprint import split_hash, training_interactions
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.listed_scores import ListedScores

# The endings of score files' names; other names are those of checkpoints.
SCORE_FILES = (".csv", ".tsv", ".parquet", ".npz")
# How many names a message shows.
_SHOWN = 5
# In a column of decimals (float64), whole numbers from here on are not exact.
_EXACT_IN_FLOAT64 = 2**53


class ScoreFileTeacher(Teacher):
    """A teacher that is a file of scores.

    Args:
        path: the file.
        student_dataset: the student's training dataset.
        settings: ``teacher_floor``, ``teacher_unknown`` and ``teacher_missing_users`` are used.

    Attributes:
        scores: the scores in the file.
    """

    def __init__(self, path: str, student_dataset: Any, settings: TeacherSettings) -> None:
        super().__init__(student_dataset, Path(path).name, path)
        self.scores: ListedScores = read_scores(path, student_dataset, settings)
        self._made_by = (split_hash(student_dataset), settings)

    @classmethod
    def recognises(cls, source: str) -> bool:
        """Accept names that end in .csv, .tsv, .parquet or .npz."""
        return Path(source).suffix.lower() in SCORE_FILES

    @classmethod
    def load(
        cls, source: str, student_dataset: Any, settings: TeacherSettings, trust: bool
    ) -> ScoreFileTeacher:
        """See :meth:`Teacher.load <recbole_rcekd.teachers.base.Teacher.load>`."""
        return cls(source, student_dataset, settings)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the file, the student's data and the settings."""
        digest = hashlib.sha256(Path(self.source).read_bytes())
        digest.update(repr(self._made_by).encode())
        return digest.hexdigest()[:32]

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`; unlisted items have the floor."""
        return self.scores.score_all(contexts)

    def scores_and_listed(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        scores = self.score_all(contexts)
        # Short lists end in zeros, the padding item, whose score is −inf.
        listed = self.scores.top_k(contexts, scores.shape[1] - 1)
        only = torch.full_like(scores, -torch.inf).scatter_(1, listed, scores.gather(1, listed))
        return scores, only

    def listed_rows(self, rows: Any) -> Tensor:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        return self.scores_and_listed(rows[self.student_dataset.uid_field])[1]

    def open_scores(
        self, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
    ) -> TeacherScores:
        """The scores in the file, which are in memory; nothing is kept on disk."""
        return self.scores


def read_scores(
    path: str | Path, student_dataset: Any, settings: TeacherSettings | None = None
) -> ListedScores:
    """Read a teacher's scores from a file.

    Args:
        path: ``.csv`` or ``.tsv`` (with a header; commas or tabs), ``.parquet``, or ``.npz`` with
            arrays. The columns (or arrays) are the data's user field, its item field and ``score``;
            or ``user``, ``item`` and ``score``. Users and items are the tokens of the student's
            data, as text or whole numbers. A higher score is better.
        student_dataset: the student's training dataset.
        settings: ``teacher_floor``, ``teacher_unknown`` and ``teacher_missing_users`` are used.

    Returns:
        The scores in the student's ids, on the student's device.

    Raises:
        TeacherError: the file cannot be read, or has rows that cannot be used; the message counts
            them and shows some.
    """
    settings = settings or TeacherSettings()
    file = _File(path, student_dataset)
    user_ids, item_ids = file.ids(0), file.ids(1)
    known = (user_ids > 0) & (item_ids > 0)
    if not known.all():
        file.report_unknown(user_ids, item_ids, settings.teacher_unknown)
    user_ids, item_ids, scores = user_ids[known], item_ids[known], file.scores[known]
    seen = training_interactions(student_dataset)
    file.require_once(user_ids, item_ids, seen.n_ids)
    file.require_users(user_ids, seen, settings.teacher_missing_users)
    getLogger().info(
        f"Teacher: {len(scores)} scores of {len(np.unique(user_ids))} users from [{path}]. Which "
        "interactions they were made from cannot be checked here: if the student's validation or "
        "test interactions were among them, its results will be too good."
    )
    device = torch.device(student_dataset.config["device"])
    users, items, listed = (
        torch.from_numpy(column).to(device) for column in (user_ids, item_ids, scores)
    )
    return ListedScores.with_floor(users, items, listed, seen, settings.teacher_floor)


class _File:
    """The three columns of a score file, and the checks of them."""

    def __init__(self, path: str | Path, dataset: Any) -> None:
        self._path = path
        self._fields = (dataset.uid_field, dataset.iid_field)
        self._known = [
            np.asarray([str(token) for token in dataset.field2id_token[field]])
            for field in self._fields
        ]
        columns = _read_columns(Path(path), self._fields)
        if len(columns[2]) == 0:
            raise TeacherError(f"The score file [{path}] has no rows.")
        self._tokens = [
            self._as_tokens(name, column)
            for name, column in zip(self._fields, columns, strict=False)
        ]
        numbers = pd.to_numeric(columns[2], errors="coerce").to_numpy(dtype=np.float64)
        with np.errstate(over="ignore"):
            self.scores = numbers.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(self.scores))
        if len(bad):
            raise TeacherError(
                f"The score file [{path}] has {len(bad)} scores that are no finite numbers, in "
                f"{_rows(bad)}. Every score must be a number below 3.4e38; leave out rows that "
                "have none."
            )

    def _as_tokens(self, field: str, column: Any) -> Any:
        """The column as text, in the form of RecBole's tokens."""
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(column.cat.categories.dtype)
        if column.dtype == object and pd.api.types.infer_dtype(column, skipna=True) == "bytes":
            column = column.str.decode("utf-8")
        empty = np.flatnonzero((column.isna() | (column == "")).to_numpy(dtype=bool))
        if len(empty):
            raise TeacherError(
                f"The score file [{self._path}] names no [{field}] in {len(empty)} rows: "
                f"{_rows(empty)}."
            )
        kind = pd.api.types.infer_dtype(column, skipna=False)
        if kind == "floating":
            # A column of whole numbers with gaps has been read as decimals.
            numbers = column.to_numpy(dtype=np.float64)
            broken = np.flatnonzero(
                (numbers != np.floor(numbers)) | (np.abs(numbers) >= _EXACT_IN_FLOAT64)
            )
            if len(broken):
                raise TeacherError(
                    f"The score file [{self._path}] has decimals for [{field}], such as "
                    f"{float(numbers[broken[0]])!r}; write the names of users and items as text or "
                    "as whole numbers."
                )
            return column.astype(np.int64).astype(str)
        if kind not in ("string", "integer"):
            raise TeacherError(
                f"The score file [{self._path}] has values of type [{kind}] for [{field}]; write "
                "the names of users and items as text or as whole numbers."
            )
        return column.astype(str)

    def ids(self, side: int) -> np.ndarray[Any, Any]:
        """The student's id of each row's user (side 0) or item (side 1).

        0 or less where the student's data do not have it.
        """
        found: np.ndarray[Any, Any] = (
            pd.Index(self._known[side]).get_indexer(self._tokens[side]).astype(np.int64)
        )
        return found

    def report_unknown(self, user_ids: Any, item_ids: Any, what_to_do: str) -> None:
        unknown = []
        for side, ids in enumerate((user_ids, item_ids)):
            names = pd.unique(self._tokens[side][ids <= 0])
            known = set(self._known[side])
            whole = [name for name in names if name.endswith(".0") and name[:-2] in known]
            if whole:
                raise TeacherError(
                    f"The score file [{self._path}] writes {len(whole)} values of "
                    f"[{self._fields[side]}] as decimals: {_some(whole)}. The student's data has "
                    f"them as whole numbers ({whole[0][:-2]}); write them so."
                )
            if len(names):
                unknown.append(f"{len(names)} values of [{self._fields[side]}] ({_some(names)})")
        n_rows = int(((user_ids <= 0) | (item_ids <= 0)).sum())
        message = (
            f"The score file [{self._path}] has {n_rows} of {len(user_ids)} rows with names that "
            f"the student's data does not have: {' and '.join(unknown)}"
        )
        if what_to_do == "error":
            raise TeacherError(
                f"{message}. If the file is of a larger catalogue, leave them out with "
                "teacher_unknown: drop."
            )
        if n_rows == len(user_ids):
            raise TeacherError(
                f"{message}. None would be left; are they the names that the student's data uses?"
            )
        getLogger().warning(f"{message}; they are left out.")

    def require_once(self, user_ids: Any, item_ids: Any, n_items: int) -> None:
        keys, counts = np.unique(user_ids * n_items + item_ids, return_counts=True)
        repeated = keys[counts > 1]
        if len(repeated):
            pairs = [
                f"({self._known[0][key // n_items]}, {self._known[1][key % n_items]})"
                for key in repeated[:_SHOWN]
            ]
            raise TeacherError(
                f"The score file [{self._path}] has several scores for {len(repeated)} pairs of "
                f"user and item: {_some(pairs, len(repeated))}. Leave one for each pair."
            )

    def require_users(self, user_ids: Any, seen: Seen, what_to_do: str) -> None:
        learning = seen.contexts().numpy()
        missing = np.setdiff1d(learning, user_ids)
        if len(missing) == 0:
            return
        message = (
            f"The score file [{self._path}] says nothing of {len(missing)} of the {len(learning)} "
            f"users in the training data: {_some(self._known[0][missing[:_SHOWN]], len(missing))}"
        )
        if what_to_do == "error":
            raise TeacherError(
                f"{message}. Add rows for them, or train them without a teacher: "
                "teacher_missing_users: skip."
            )
        getLogger().warning(f"{message}; they are trained without the teacher.")


def _read_columns(path: Path, fields: tuple[str, str]) -> tuple[Any, Any, Any]:
    """Users, items and scores, as pandas columns."""
    try:
        if path.suffix in (".csv", ".tsv"):
            return _read_text(path, fields)
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            names = _choose(path, list(map(str, table.columns)), fields)
            return table[names[0]], table[names[1]], table[names[2]]
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                names = _choose(path, list(arrays.files), fields)
                columns = [arrays[name] for name in names]
            if any(column.ndim != 1 or len(column) != len(columns[0]) for column in columns):
                shapes = ", ".join(
                    f"[{name}] {column.shape}" for name, column in zip(names, columns, strict=True)
                )
                raise TeacherError(
                    f"The arrays in [{path}] must be equally long lists, but have the shapes "
                    f"{shapes}."
                )
            # pandas reads text only as objects.
            columns = [
                column.astype(object) if column.dtype.kind in "SU" else column for column in columns
            ]
            users, items, scores = map(pd.Series, columns)
            return users, items, scores
    except ImportError as error:
        raise TeacherError(
            f"Reading [{path}] needs a parquet engine, which is not installed: pip install "
            "pyarrow, or write a csv file."
        ) from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, TeacherError):
            raise
        raise TeacherError(f"The score file [{path}] cannot be read: {error}") from error
    raise TeacherError(f"[{path}] is not a score file; they end in {', '.join(SCORE_FILES)}.")


def _read_text(path: Path, fields: tuple[str, str]) -> tuple[Any, Any, Any]:
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    options: dict[str, Any] = {"sep": "\t" if "\t" in header else ",", "encoding": "utf-8-sig"}
    names = _choose(path, list(map(str, pd.read_csv(path, nrows=0, **options).columns)), fields)
    # Names are read as text: "NA" may be a user, and 007 is not 7. An empty score is a gap, which
    # is reported.
    as_text = {names[0]: str, names[1]: str}
    table = pd.read_csv(
        path,
        usecols=names,
        dtype=as_text,
        keep_default_na=False,
        na_values={names[2]: [""]},
        low_memory=False,
        **options,
    )
    return table[names[0]], table[names[1]], table[names[2]]


def _choose(path: Path, found: Sequence[str], fields: tuple[str, str]) -> list[str]:
    for names in ([*fields, "score"], ["user", "item", "score"]):
        if set(names) <= set(found):
            return names
    raise TeacherError(
        f"The score file [{path}] has the columns {', '.join(found)}, but needs "
        f"{', '.join(fields)}, score (or user, item, score)."
    )


def _some(names: Sequence[str] | np.ndarray[Any, Any], n: int | None = None) -> str:
    """The first few names, with "…" if there are more."""
    return ", ".join(map(str, names[:_SHOWN])) + (
        ", …" if (len(names) if n is None else n) > _SHOWN else ""
    )


def _rows(positions: np.ndarray[Any, Any]) -> str:
    """``rows 3, 8``; the first row below the header is row 1."""
    noun = "row" if len(positions) == 1 else "rows"
    return f"{noun} {_some(positions[:_SHOWN] + 1, len(positions))}"
