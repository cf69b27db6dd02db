"""Score files: what is read, what is refused, and what lists answer, against full matrices."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.core.settings import TeacherSettings
from recbole_rcekd.teachers.listed_scores import ListedScores
from recbole_rcekd.teachers.score_file import read_scores
from tests.helpers import build, write_dataset
from tests.tables import seen_of

# --- lists ----------------------------------------------------------------------------------------

N_USERS, N_ITEMS = 5, 9
SEEN = [(1, 2), (1, 3), (2, 1), (4, 8), (4, 1)]


def listed(rows: list[tuple[int, int, float]], depth: float = 1.0) -> ListedScores:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    seen = seen_of(SEEN, N_USERS, N_ITEMS)
    return ListedScores.with_floor(
        table[:, 0].long(), table[:, 1].long(), table[:, 2].float(), seen, depth
    )


def full(rows: list[tuple[int, int, float]], depth: float = 1.0) -> Tensor:
    """The same as a whole matrix, with Python's arithmetic."""
    matrix = np.full((N_USERS, N_ITEMS), -np.inf)
    for user in range(N_USERS):
        own = [np.float64(np.float32(score)) for u, _, score in rows if u == user]
        if own:
            matrix[user] = min(own) - depth * (float(np.std(own)) or 1.0)
        for u, item, score in rows:
            if u == user:
                matrix[user, item] = score
    matrix[:, 0] = -np.inf
    return torch.from_numpy(matrix).float()


ROWS = [(1, 2, 5.0), (1, 8, 1.0), (1, 3, 3.0), (2, 1, 0.5), (4, 4, 2.0), (4, 1, 2.0), (4, 8, -1.0)]


def test_by_hand() -> None:
    scores = listed(ROWS)
    # User 1: lowest 1; deviation of 5, 1, 3 is √(8/3). User 2 has one score: deviation 1 instead of
    # 0. User 3: nothing.
    found = scores.score(torch.tensor([1, 2, 3]), torch.tensor([[2, 3, 4], [1, 2, 8], [1, 2, 8]]))
    floor = 1 - (8 / 3) ** 0.5
    expected = torch.tensor([[5.0, 3.0, floor], [0.5, -0.5, -0.5], [-torch.inf] * 3])
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    # Items 1 and 4 are tied.
    assert scores.top_k(torch.tensor([4, 3, 1]), 4).tolist() == [
        [1, 4, 8, 0],
        [0] * 4,
        [2, 3, 8, 0],
    ]
    assert scores.top_k(torch.tensor([4, 3, 1]), 2, unseen=True).tolist() == [
        [4, 0],
        [0, 0],
        [8, 0],
    ]
    assert listed(ROWS, 0.0).score(torch.tensor([1]), torch.tensor([[7]])).item() == 1.0


tables = st.dictionaries(
    st.tuples(st.integers(1, N_USERS - 1), st.integers(1, N_ITEMS - 1)),
    st.sampled_from([-2.5, 0.0, 0.5, 1.0, 7.0]),
)


@given(tables, st.sampled_from([0.0, 1.0, 2.5]), st.integers(1, N_ITEMS + 2))
def test_lists_answer_as_the_whole_matrix(
    table: dict[tuple[int, int], float], depth: float, k: int
) -> None:
    rows = [(user, item, score) for (user, item), score in table.items()]
    scores, matrix = listed(rows, depth), full(rows, depth)
    users = torch.tensor([3, 1, 2, 4, 1])
    items = torch.arange(1, N_ITEMS).expand(5, -1)
    torch.testing.assert_close(scores.score_all(users), matrix[users])
    torch.testing.assert_close(scores.score(users, items.int()), matrix[users, 1:])
    other = scores.transposed()
    assert (other.n_contexts, other.n_items) == (N_ITEMS, N_USERS)
    some_items = torch.tensor([8, 2, 2, 5])
    columns = matrix.t()[some_items].clone()
    columns[:, 0] = -torch.inf
    torch.testing.assert_close(other.score_all(some_items), columns)
    some_users = torch.arange(1, N_USERS).expand(4, -1)
    torch.testing.assert_close(other.score(some_items, some_users), columns[:, 1:])
    torch.testing.assert_close(other.transposed().score_all(users), matrix[users])
    for unseen in (False, True):
        for row, user in enumerate(users.tolist()):
            best = sorted((-score, item) for u, item, score in rows if u == user)
            ids = [item for _, item in best if not (unseen and (user, item) in SEEN)]
            assert scores.top_k(users, k, unseen)[row].tolist() == (ids + [0] * k)[:k]
        for row, item in enumerate(some_items.tolist()):
            best = sorted((-score, u) for u, i, score in rows if i == item)
            ids = [u for _, u in best if not (unseen and (u, item) in SEEN)]
            assert other.top_k(some_items, k, unseen)[row].tolist() == (ids + [0] * k)[:k]


def test_memory_is_what_is_listed() -> None:
    # A matrix of so many users and items would have 10^12 cells.
    n = 1_000_000
    scores = ListedScores.with_floor(
        torch.tensor([1, n - 1]),
        torch.tensor([n - 1, 5]),
        torch.tensor([1.0, 2.0]),
        seen_of([(1, 1)], n, n),
    )
    # One floor per user
    assert max(value.numel() for value in vars(scores).values() if isinstance(value, Tensor)) == n
    assert scores.score(torch.tensor([n - 1]), torch.tensor([[5, 6]])).tolist() == [[2.0, 1.0]]
    assert scores.top_k(torch.tensor([1]), 2).tolist() == [[n - 1, 0]]


# --- files ----------------------------------------------------------------------------------------


def dataset(users: list[str], items: list[str], pairs: list[tuple[int, int]]) -> Any:
    """What reading looks at in a RecBole dataset."""
    table = np.array(pairs)
    return SimpleNamespace(
        uid_field="user_id",
        iid_field="item_id",
        user_num=len(users) + 1,
        item_num=len(items) + 1,
        field2id_token={
            "user_id": np.array(["[PAD]", *users]),
            "item_id": np.array(["[PAD]", *items]),
        },
        inter_feat={"user_id": table[:, 0], "item_id": table[:, 1]},
        config={"device": "cpu"},
    )


# Users 12, NA and 007; the last has no training interaction. Items 5, 10, 3.
STUDENT = dataset(["12", "NA", "007"], ["5", "10", "3"], [(1, 1), (2, 2)])
TABLE = pd.DataFrame(
    {
        "user_id": ["12", "NA", "12"],
        "item_id": ["10", "3", "5"],
        "score": [0.5, -1.0, 2.0],
        "other": ["x", "", "y"],
    }
)
EXPECTED = [[1, 1, 2.0], [1, 2, 0.5], [2, 3, -1.0]]


def write(path: Path, table: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: np.array(table[name].tolist()) for name in table.columns})
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def rows_of(scores: ListedScores) -> list[list[float]]:
    return torch.stack([part.double() for part in scores.rows()], dim=1).tolist()


def refused(path: Path, student: Any = STUDENT, **settings: Any) -> str:
    with pytest.raises(TeacherError) as caught:
        read_scores(path, student, TeacherSettings(**settings))
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npz"])
@pytest.mark.parametrize("names", [("user_id", "item_id"), ("user", "item")])
def test_files_that_are_read(tmp_path: Path, suffix: str, names: tuple[str, str]) -> None:
    table = TABLE.rename(columns=dict(zip(("user_id", "item_id"), names, strict=True)))
    assert rows_of(read_scores(write(tmp_path / f"s{suffix}", table), STUDENT)) == EXPECTED


def test_the_separator_is_the_headers(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    TABLE.to_csv(path, index=False, sep="\t", encoding="utf-8-sig")
    assert rows_of(read_scores(path, STUDENT)) == EXPECTED


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLE.assign(user_id=TABLE["user_id"].astype("category"))
    monkeypatch.setattr(pd, "read_parquet", lambda path: table)
    assert rows_of(read_scores(tmp_path / "s.parquet", STUDENT)) == EXPECTED

    def no_engine(path: Path) -> Any:
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd, "read_parquet", no_engine)
    path = tmp_path / "s.parquet"
    assert refused(path) == (
        f"Reading [{path}] needs a parquet engine, which is not installed: pip install pyarrow, or "
        "write a csv file."
    )


@pytest.mark.parametrize(
    "users",
    [
        np.array([12, 7, 12]),
        np.array([12.0, 7.0, 12.0]),
        np.array(["12", "7", "12"]),
        np.array([b"12", b"7", b"12"]),
        np.array([12, 7, 12], dtype=np.uint8),
    ],
    ids=lambda users: str(users.dtype),
)
def test_names_are_compared_as_text(tmp_path: Path, users: Any) -> None:
    student = dataset(["12", "7"], ["5", "10", "3"], [(1, 1), (2, 2)])
    np.savez(
        tmp_path / "s.npz", user=users, item=np.array([10, 3, 5]), score=np.array([0.5, -1.0, 2.0])
    )
    assert rows_of(read_scores(tmp_path / "s.npz", student)) == EXPECTED


def test_007_is_not_7(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", pd.concat([TABLE, TABLE[:1].assign(user_id="007")]))
    assert rows_of(read_scores(path, STUDENT)) == [*EXPECTED, [3, 2, 0.5]]
    path = write(tmp_path / "s.csv", pd.concat([TABLE, TABLE[:1].assign(user_id="7")]))
    assert "1 values of [user_id] (7)" in refused(path)


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (np.array([12.5, 12.0, 12.0]), "has decimals for [user_id], such as 12.5; write the names"),
        (
            np.array([2.0**53, 12.0, 12.0]),
            "has decimals for [user_id], such as 9007199254740992.0; write",
        ),
        (np.array([12.0, np.nan, np.nan]), "names no [user_id] in 2 rows: rows 2, 3."),
        (np.array(["12", "", "12"]), "names no [user_id] in 1 rows: row 2."),
        (
            np.array([True, True, False]),
            "has values of type [boolean] for [user_id]; write the names",
        ),
    ],
    ids=str,
)
def test_names_that_are_refused(tmp_path: Path, user: Any, words: str) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, user=user, item=np.array([10, 3, 5]), score=np.ones(3))
    message = refused(path)
    assert message.startswith(f"The score file [{path}] ")
    assert words in message


def test_whole_numbers_written_as_decimals(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", TABLE.assign(item_id=["10.0", "3.0", "5.0"]))
    for what in ("error", "drop"):
        assert refused(path, teacher_unknown=what) == (
            f"The score file [{path}] writes 3 values of [item_id] as decimals: 10.0, 3.0, 5.0. "
            "The student's data has them as whole numbers (10); write them so."
        )


def test_columns_are_named_in_the_error(tmp_path: Path) -> None:
    for suffix in (".csv", ".npz"):
        path = write(tmp_path / f"s{suffix}", TABLE.rename(columns={"item_id": "item"}))
        assert refused(path) == (
            f"The score file [{path}] has the columns user_id, item, score, other, but needs "
            "user_id, item_id, score (or user, item, score)."
        )


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("", "has 1 scores that are no finite numbers, in row 2."),
        ("nan", "has 1 scores that are no finite numbers, in row 2."),
        ("high", "has 1 scores that are no finite numbers, in row 2."),
        ("inf", "has 1 scores that are no finite numbers, in row 2."),
        ("1e39", "has 1 scores that are no finite numbers, in row 2."),
    ],
)
def test_scores_that_are_no_numbers(tmp_path: Path, bad: str, words: str) -> None:
    path = write(tmp_path / "s.csv", TABLE.assign(score=["1", bad, "2"]))
    message = refused(path)
    assert words in message
    assert message.endswith(
        "Every score must be a number below 3.4e38; leave out rows that have none."
    )
    many = pd.concat([TABLE.assign(score=[bad, bad, bad])] * 2)
    assert "has 6 scores that are no finite numbers, in rows 1, 2, 3, 4, 5, …." in refused(
        write(path, many)
    )


def test_repeated_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", pd.concat([TABLE, TABLE[1:]]))
    assert refused(path) == (
        f"The score file [{path}] has several scores for 2 pairs of user and item: (12, 5), (NA, "
        "3). Leave one for each pair."
    )


def test_unknown_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = pd.DataFrame(
        {
            "user_id": ["12", "u9", "[PAD]", "NA"],
            "item_id": ["new", "old", "5", "new"],
            "score": [1.0, 2.0, 3.0, 4.0],
        }
    )
    path = write(tmp_path / "s.csv", pd.concat([TABLE[["user_id", "item_id", "score"]], more]))
    told = (
        f"The score file [{path}] has 4 of 7 rows with names that the student's data does not "
        "have: 2 values of [user_id] (u9, [PAD]) and 2 values of [item_id] (new, old)"
    )
    assert refused(path) == (
        f"{told}. If the file is of a larger catalogue, leave them out with teacher_unknown: drop."
    )
    with caplog.at_level(logging.WARNING):
        assert (
            rows_of(read_scores(path, STUDENT, TeacherSettings(teacher_unknown="drop"))) == EXPECTED
        )
    assert caplog.messages == [f"{told}; they are left out."]
    write(path, more)
    assert refused(path, teacher_unknown="drop").endswith(
        "None would be left; are they the names that the student's data uses?"
    )


def test_users_without_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "s.csv", TABLE[TABLE["user_id"] == "12"])
    told = f"The score file [{path}] says nothing of 1 of the 2 users in the training data: NA"
    assert refused(path) == (
        f"{told}. Add rows for them, or train them without a teacher: teacher_missing_users: skip."
    )
    with caplog.at_level(logging.WARNING):
        scores = read_scores(path, STUDENT, TeacherSettings(teacher_missing_users="skip"))
    assert caplog.messages == [f"{told}; they are trained without the teacher."]
    assert (scores.score_all(torch.tensor([2])) == -torch.inf).all()
    # What is left out because it is unknown does not count as a row.
    lost = write(path, TABLE.assign(item_id=["10", "unknown", "5"]))
    assert "says nothing of 1 of the 2" in refused(lost, teacher_unknown="drop")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    assert f"The score file [{path}] cannot be read: " in refused(path)
    path.write_bytes(b"user,item,score\n\xff,5,1\n")
    assert f"The score file [{path}] cannot be read: " in refused(path)
    path.write_text("")
    assert f"The score file [{path}] cannot be read: " in refused(path)
    path.write_text("user,item,score\n")
    assert refused(path) == f"The score file [{path}] has no rows."
    archive = tmp_path / "s.npz"
    archive.write_bytes(b"no archive")
    assert f"The score file [{archive}] cannot be read: " in refused(archive)
    np.savez(
        archive, user=np.array(["12", "NA"], dtype=object), item=np.array([5, 5]), score=np.ones(2)
    )
    assert "Object arrays cannot be loaded when allow_pickle=False" in refused(archive)
    np.savez(archive, user=np.array(["12", "NA"]), item=np.array([5]), score=np.ones((2, 2)))
    assert refused(archive) == (
        f"The arrays in [{archive}] must be equally long lists, but have the shapes [user] (2,), "
        "[item] (1,), [score] (2, 2)."
    )
    other = tmp_path / "s.json"
    assert (
        refused(other) == f"[{other}] is not a score file; they end in .csv, .tsv, .parquet, .npz."
    )


def test_with_a_dataset_of_recbole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = build(write_dataset(tmp_path)).train._dataset
    tokens = student.field2id_token
    pairs = [
        (user, item)
        for user in range(1, student.user_num)
        for item in (1 + user % 7, 20 + user % 9)
    ]
    named = [(tokens["user_id"][user], tokens["item_id"][item]) for user, item in pairs]
    table = pd.DataFrame(named, columns=["user_id", "item_id"]).assign(
        score=np.arange(len(pairs)) / 7
    )
    path = write(tmp_path / "s.csv", table.sample(frac=1, random_state=1))
    with caplog.at_level(logging.INFO):
        scores = read_scores(path, student)
    assert [(int(user), int(item)) for user, item, _ in rows_of(scores)] == pairs
    assert scores.rows()[2].tolist() == torch.tensor(table["score"].to_numpy()).float().tolist()
    assert (scores.n_contexts, scores.n_items) == (student.user_num, student.item_num)
    assert f"{len(pairs)} scores of 40 users from [{path}]" in caplog.text
    assert "cannot be checked" in caplog.text
