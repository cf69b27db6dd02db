r"""Teachers from outside RecBole: a file of (user, item, score) rows, from a production system or an LLM.

What a file lists is scored as it says; what it does not list gets the user's floor

.. math:: f_u = \min_i t_{ui} - \text{floor} \cdot \sigma_u

with :math:`\sigma_u` the standard deviation of the user's listed scores (1 where that is 0), so
that unlisted items lie below the listed ones. Candidates of the best hold listed items only.
Nothing in a file is dropped silently.
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

# The names of score files, which tell them from checkpoints.
SCORE_FILES = (".csv", ".tsv", ".parquet", ".npz")
_SHOWN = 5
# Whole numbers above this are not told apart in a column of decimals.
_EXACT_IN_FLOAT64 = 2**53


class ListedScores(TeacherScores):
    """Scores of some items per context, as sorted rows; memory grows with what is listed.

    Implements :class:`~recbole_rcekd.core.types.TeacherScores`. Equal scores are listed by
    ascending id.

    Attributes:
        partial: the best of full rows are not the best lists, which hold listed items only.

    Args:
        contexts: ``[R]``, whose score it is; each (context, item) once.
        items: ``[R]``, of what.
        scores: ``[R]``.
        floor: ``[n_contexts]``, the score of what a context does not list; replaced by −inf ("says
            nothing") for contexts that list nothing. With ``floor_of_items``: ``[n_items]``, as it
            is.
        seen: the training interactions, for lists of unseen items.
        floor_of_items: the floor belongs to the items, as after :meth:`transposed`.
    """

    partial = True

    def __init__(
        self,
        contexts: Tensor,
        items: Tensor,
        scores: Tensor,
        floor: Tensor,
        seen: Seen,
        floor_of_items: bool = False,
    ) -> None:
        self.n_contexts, self.n_items = len(seen.starts) - 1, seen.n_ids
        keys, order = (contexts.long() * self.n_items + items.long()).sort()
        self._keys = keys
        self._scores = scores[order].float()
        self._listed = Seen.from_pairs(contexts, items, self.n_contexts, self.n_items)
        # By context, then from the best down; both sorts keep the order of what is equal.
        down = self._scores.argsort(descending=True, stable=True)
        self._best_first = self._listed.ids[down[(keys // self.n_items)[down].argsort(stable=True)]]
        self.seen = seen.to(scores.device)
        self._floor_of_items = floor_of_items
        self._floor = floor.float()
        if not floor_of_items:
            self._floor = self._floor.masked_fill(self._listed.counts() == 0, -torch.inf)

    @classmethod
    def with_floor(
        cls, contexts: Tensor, items: Tensor, scores: Tensor, seen: Seen, depth: float = 1.0
    ) -> ListedScores:
        """The floor is ``depth`` standard deviations below the lowest score that a context lists.

        The deviation is that of the listed scores (not of a sample), 1 where it is 0.
        """
        n = len(seen.starts) - 1
        exact, rows = scores.double(), contexts.long()
        zeros = exact.new_zeros(n)
        counts = torch.bincount(rows, minlength=n).clamp(min=1)
        mean = zeros.index_add(0, rows, exact) / counts
        deviation = (zeros.index_add(0, rows, (exact - mean[rows]) ** 2) / counts).sqrt()
        lowest = (zeros + torch.inf).scatter_reduce(0, rows, exact, "amin")
        return cls(
            contexts, items, scores, lowest - depth * deviation.where(deviation > 0, 1.0), seen
        )

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is listed: contexts, items and scores, ``[R]`` each, by context and item."""
        return self._keys // self.n_items, self._listed.ids, self._scores

    def floor(self) -> Tensor:
        """What unlisted items score, ``[n_contexts]``; after :meth:`transposed` by item, ``[n_items]``."""
        return self._floor

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; above the floor are listed scores only."""
        contexts, _, scores = self.rows()
        floor = self.floor().double()
        above = scores.double() - floor[contexts]
        n, zeros = self.n_items - 1, torch.zeros_like(floor)
        mean = zeros.index_add(0, contexts, above) / n
        listed = zeros.index_add(0, contexts, (above - mean[contexts]) ** 2)
        unlisted = (n - torch.bincount(contexts, minlength=self.n_contexts)) * mean**2
        mean = floor + mean
        return mean, (listed + unlisted) / n, mean.abs()

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        floor = (
            self._floor[items]
            if self._floor_of_items
            else self._floor[contexts].unsqueeze(1).expand(items.shape)
        )
        if len(self._keys) == 0:
            return floor.clone()
        wanted = contexts.long().unsqueeze(1) * self.n_items + items.long()
        place = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
        return self._scores[place].where(self._keys[place] == wanted, floor)

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`."""
        contexts = contexts.to(self._scores.device)
        floor = self._floor if self._floor_of_items else self._floor[contexts].unsqueeze(1)
        scores = floor.expand(len(contexts), self.n_items).clone()
        rows, places = self._listed.places(contexts)
        scores[rows, self._listed.ids[places]] = self._scores[places]
        scores[:, 0] = -torch.inf
        return scores

    def top_k(self, contexts: Tensor, k: int, unseen: bool = False) -> Tensor:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; only what is listed."""
        contexts = contexts.to(self._scores.device)
        rows, places = self._listed.places(contexts)
        items = self._best_first[places]
        if unseen:
            seen_rows, seen_items = self.seen.cells(contexts)
            left = ~torch.isin(rows * self.n_items + items, seen_rows * self.n_items + seen_items)
            rows, items = rows[left], items[left]
        counts = torch.bincount(rows, minlength=len(contexts))
        rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        short = rank < k
        lists = torch.zeros((len(contexts), k), dtype=torch.int64, device=contexts.device)
        lists[rows[short], rank[short]] = items[short]
        return lists

    def transposed(self) -> ListedScores:
        """See :class:`~recbole_rcekd.core.types.TeacherScores`; an unlisted cell keeps the floor of its user."""
        contexts, items, scores = self.rows()
        return ListedScores(
            items, contexts, scores, self._floor, self.seen.transposed(), not self._floor_of_items
        )


class ScoreFileTeacher(Teacher):
    """A teacher that is a file of scores.

    Args:
        path: of the file.
        student_dataset: the student's training dataset.
        settings: what to do with gaps in the file.
    """

    def __init__(self, path: str, student_dataset: Any, settings: TeacherSettings) -> None:
        super().__init__(student_dataset, Path(path).name, path)
        self.scores: ListedScores = read_scores(path, student_dataset, settings)
        self._made_by = (split_hash(student_dataset), settings)

    @classmethod
    def recognises(cls, source: str) -> bool:
        """By the end of the name: .csv, .tsv, .parquet or .npz."""
        return Path(source).suffix.lower() in SCORE_FILES

    @classmethod
    def load(
        cls, source: str, student_dataset: Any, settings: TeacherSettings, trust: bool
    ) -> ScoreFileTeacher:
        """See :meth:`Teacher.load <recbole_rcekd.teachers.base.Teacher.load>`."""
        return cls(source, student_dataset, settings)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the file, the id maps and the settings."""
        digest = hashlib.sha256(Path(self.source).read_bytes())
        digest.update(repr(self._made_by).encode())
        return digest.hexdigest()[:32]

    def score_all(self, contexts: Tensor) -> Tensor:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`; what is not listed has the floor."""
        return self.scores.score_all(contexts)

    def scores_and_listed(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        scores = self.score_all(contexts)
        # 0 in short lists, the padding item, of score −inf.
        listed = self.scores.top_k(contexts, scores.shape[1] - 1)
        only = torch.full_like(scores, -torch.inf).scatter_(1, listed, scores.gather(1, listed))
        return scores, only

    def listed_rows(self, rows: Any) -> Tensor:
        """See :class:`~recbole_rcekd.teachers.base.Teacher`."""
        return self.scores_and_listed(rows[self.student_dataset.uid_field])[1]

    def open_scores(
        self, settings: KDSettings, show_progress: bool = False, ranks: Ranks | None = None
    ) -> TeacherScores:
        """The scores, which are in memory already."""
        return self.scores


def read_scores(
    path: str | Path, student_dataset: Any, settings: TeacherSettings | None = None
) -> ListedScores:
    """Read a teacher's scores from a file.

    Args:
        path: ``.csv`` or ``.tsv`` (a header; commas or tabs), ``.parquet``, or ``.npz`` with
            arrays. Columns (or arrays): the data's user and item fields and ``score``, or ``user``,
            ``item`` and ``score``. Users and items are the tokens of the student's data, as text or
            whole numbers; a higher score is better.
        student_dataset: the student's training dataset.
        settings: ``teacher_floor``, ``teacher_unknown``, ``teacher_missing_users``.

    Returns:
        The scores in the student's ids, on the student's device.

    Raises:
        TeacherError: the file cannot be read, or says something that has no meaning; the message
            counts and shows it.
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
    """The three columns of a score file, and what is wrong with them."""

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
        """The column as text, written as RecBole would hold it."""
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
            # Whole numbers become decimals where a column once had gaps.
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
        """The student's id of each row's user (0) or item (1); 0 or less where there is none."""
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
            # pandas knows text as objects only.
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
    # A user may be called "NA", and 007 is not 7; no score is a gap, to be counted.
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
    """The first few, and whether there are more."""
    return ", ".join(map(str, names[:_SHOWN])) + (
        ", …" if (len(names) if n is None else n) > _SHOWN else ""
    )


def _rows(positions: np.ndarray[Any, Any]) -> str:
    """``rows 3, 8``: the first row below the header is 1."""
    return f"{'row' if len(positions) == 1 else 'rows'} {_some(positions[:_SHOWN] + 1, len(positions))}"
