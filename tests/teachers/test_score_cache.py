"""Cached teacher scores equal the model's, need no model, and never come from a damaged file."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.errors import KDError, TeacherError
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.core.store import FORMAT, Store
from recbole_rcekd.core.types import Seen
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.checkpoint_teacher import CheckpointTeacher, read_teacher
from recbole_rcekd.teachers.score_cache import open_teacher_scores
from recbole_rcekd.teachers.score_tables import DenseScores, FactorScores, blocks
from tests.helpers import Bundle, build, train_and_save, write_dataset

# isort: split
from recbole.data.interaction import Interaction

PRODUCTS, OTHERS = ("BPR", "LightGCN"), ("NeuMF", "EASE")
SETTINGS: dict[str, dict[str, Any]] = {
    "BPR": {"embedding_size": 8},
    "LightGCN": {"embedding_size": 8, "n_layers": 2},
}


class Trained:
    """A data set, and checkpoints and models of teachers of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_dataset(folder)
        self.student: Bundle = build(folder, "BPR")
        self.models: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        path = self.folder / f"{name}.pth"
        if not path.exists():
            self.models[name] = train_and_save(
                build(self.folder, name, epochs=3, **SETTINGS.get(name, {})), path
            )
        return path

    def teacher(self, name: str) -> CheckpointTeacher:
        return read_teacher(self.path(name), self.student.train)

    def own_scores(self, name: str) -> Tensor:
        """What RecBole's evaluation sees: all users, all items but padding."""
        self.path(name)
        model, data = self.models[name], self.student.dataset
        users = torch.arange(data.user_num)
        with torch.no_grad():
            if name == "NeuMF":
                grid = {
                    "user_id": users.repeat_interleave(data.item_num),
                    "item_id": torch.arange(data.item_num).repeat(data.user_num),
                }
                scores = model.predict(Interaction(grid))
            else:
                scores = model.full_sort_predict(Interaction({"user_id": users}))
        rows: Tensor = scores.view(data.user_num, data.item_num)
        return rows.float()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("cache"))


def settings(tmp_path: Path, dtype: Any = "float32") -> KDSettings:
    return KDSettings(kd_cache_dir=str(tmp_path / "scores"), kd_cache_dtype=dtype)


class Untouchable(CheckpointTeacher):
    """A teacher that can be asked for its name, and for nothing that needs the model."""

    @property
    def model(self) -> Any:
        raise AssertionError("the model was built")

    @property
    def scorer(self) -> Any:
        raise AssertionError("the model was scored")


def untouchable(teacher: CheckpointTeacher) -> CheckpointTeacher:
    teacher.__class__ = Untouchable
    return teacher


def entry(tmp_path: Path, teacher: Teacher | FakeTeacher) -> Path:
    """The folder of the teacher's scores."""
    root = tmp_path / "scores" / teacher.fingerprint
    (folder,) = [path for path in root.iterdir() if path.name.startswith(("factors", "dense"))]
    return folder


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


USERS = torch.tensor([3, 1, 3, 40])
ITEMS = torch.tensor([[1, 2, 60], [5, 5, 9], [7, 1, 2], [60, 59, 58]])


@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_scores_are_the_models_own(trained: Trained, tmp_path: Path, name: str) -> None:
    teacher = trained.teacher(name)
    own = trained.own_scores(name)
    for scores in (
        open_teacher_scores(teacher, settings(tmp_path)),
        open_teacher_scores(teacher, settings(tmp_path)),
    ):
        assert isinstance(scores, FactorScores if name in PRODUCTS else DenseScores)
        assert (scores.n_contexts, scores.n_items) == own.shape
        everything = scores.score_all(USERS)
        cells = scores.score(USERS, ITEMS.int())
        assert everything.dtype == cells.dtype == torch.float32
        assert (everything[:, 0] == -torch.inf).all()
        torch.testing.assert_close(everything[:, 1:], own[USERS, 1:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cells, own[USERS].gather(1, ITEMS), rtol=1e-5, atol=1e-6)
        assert not cells.requires_grad


def test_half_precision(trained: Trained, tmp_path: Path) -> None:
    teacher, own = trained.teacher("NeuMF"), trained.own_scores("NeuMF")
    scores = open_teacher_scores(teacher, settings(tmp_path, "float16"))
    assert entry(tmp_path, teacher).name == "dense-float16"
    assert np.load(entry(tmp_path, teacher) / "scores.npy", mmap_mode="r").dtype == np.float16
    cells = scores.score(USERS, ITEMS)
    assert cells.dtype == torch.float32
    torch.testing.assert_close(
        cells, own[USERS].gather(1, ITEMS).half().float(), rtol=2e-3, atol=1e-6
    )
    # The other precision is another entry.
    assert not torch.equal(
        open_teacher_scores(teacher, settings(tmp_path)).score(USERS, ITEMS), cells
    )


@pytest.mark.parametrize("name", ["BPR", "NeuMF"])
def test_hit_does_not_need_the_model(trained: Trained, tmp_path: Path, name: str) -> None:
    first = open_teacher_scores(trained.teacher(name), settings(tmp_path))
    top = first.top_k(USERS, 5)
    with pytest.raises(AssertionError, match="was scored"):
        open_teacher_scores(untouchable(trained.teacher(name)), settings(tmp_path / "elsewhere"))
    second = open_teacher_scores(untouchable(trained.teacher(name)), settings(tmp_path))
    assert torch.equal(second.score(USERS, ITEMS), first.score(USERS, ITEMS))
    assert torch.equal(second.top_k(USERS, 5), top)


@pytest.mark.parametrize("name", ["BPR", "NeuMF"])
def test_nothing_is_pickled(trained: Trained, tmp_path: Path, name: str) -> None:
    scores = open_teacher_scores(trained.teacher(name), settings(tmp_path))
    scores.top_k(USERS, 5)
    scores.transposed().top_k(torch.tensor([1]), 5)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in found} == {".npy", ".json"}
    for path in found:
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        else:
            json.loads(path.read_text())


def spoil_byte(folder: Path) -> None:
    path = next(folder.glob("*.npy"))
    content = bytearray(path.read_bytes())
    content[-2] ^= 255
    path.write_bytes(content)


def cut_off(folder: Path) -> None:
    path = next(folder.glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-8])


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def other_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1}))


def foreign(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "made_by": "0" * 32}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_byte, ".npy is damaged"),
        (cut_off, ".npy is damaged"),
        (lose_manifest, "manifest.json"),
        (other_format, "it has format version"),
        (foreign, "it was made by another teacher"),
    ],
)
@pytest.mark.parametrize("name", ["BPR", "NeuMF"])
def test_what_cannot_be_trusted_is_made_again(
    trained: Trained,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    spoil: Any,
    reason: str,
) -> None:
    teacher = trained.teacher(name)
    expected = open_teacher_scores(teacher, settings(tmp_path)).score(USERS, ITEMS)
    spoil(entry(tmp_path, teacher))
    scores = open_teacher_scores(teacher, settings(tmp_path))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert reason in record.getMessage()
    assert torch.equal(scores.score(USERS, ITEMS), expected)
    caplog.clear()
    # The new entry is whole.
    again = open_teacher_scores(untouchable(trained.teacher(name)), settings(tmp_path))
    assert torch.equal(again.score(USERS, ITEMS), expected)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_other_teacher_is_another_folder(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bpr, graph = trained.teacher("BPR"), trained.teacher("LightGCN")
    open_teacher_scores(bpr, settings(tmp_path))
    expected = open_teacher_scores(graph, settings(tmp_path / "b")).score(USERS, ITEMS)
    root = tmp_path / "scores"
    # As if somebody had moved files by hand
    shutil.copytree(root / bpr.fingerprint, root / graph.fingerprint)
    assert torch.equal(open_teacher_scores(graph, settings(tmp_path)).score(USERS, ITEMS), expected)
    assert "it was made by another teacher" in caplog.text


@pytest.mark.parametrize("name", ["BPR", "NeuMF"])
def test_runs_side_by_side_share_one_entry(trained: Trained, tmp_path: Path, name: str) -> None:
    teachers = [trained.teacher(name) for _ in range(3)]
    for teacher in teachers:
        # Building the models draws random numbers, in an order that threads would change.
        teacher.scorer  # noqa: B018
    barrier = threading.Barrier(len(teachers))
    results: list[Tensor] = []

    def run(teacher: Teacher) -> None:
        barrier.wait()
        results.append(open_teacher_scores(teacher, settings(tmp_path)).score(USERS, ITEMS))

    threads = [threading.Thread(target=run, args=(teacher,)) for teacher in teachers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, results[0]) for result in results)
    root = tmp_path / "scores" / teachers[0].fingerprint
    assert [path.name for path in root.iterdir()] == [
        "factors" if name == "BPR" else "dense-float32"
    ]


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_does_not_stop_a_product_teacher(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(np, "save", full_disk)
    scores = open_teacher_scores(trained.teacher("BPR"), settings(tmp_path))
    torch.testing.assert_close(
        scores.score(USERS, ITEMS), trained.own_scores("BPR")[USERS].gather(1, ITEMS)
    )
    assert scores.top_k(USERS, 5).shape == (4, 5)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2  # the tables, and the lists
    assert all(
        "could not be kept in [" in text and "No space left on device" in text for text in warnings
    )
    assert not files(tmp_path)


class FullDisk:
    """An open file on a disk with room for `left` bytes."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.left -= len(content)
        if self.left < 0:
            full_disk()
        return int(self.file.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_full_disk_stops_a_dense_teacher(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def limited(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(path, mode, *args, **kwargs)
        return FullDisk(file, 500) if path.name == "scores.npy" and mode == "r+b" else file

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(KDError) as caught:
        open_teacher_scores(FakeTeacher(300, 2000), settings(tmp_path))  # 300 × 2000 × 4 bytes
    message = str(caught.value)
    assert message.startswith(
        f"The teacher's scores (2 MiB) could not be written to [{tmp_path / 'scores'}"
    )
    assert "No space left on device" in message
    assert "Set kd_cache_dir to a larger disk, or kd_cache_dtype: float16." in message
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["BPR", "NeuMF"])
def test_cache_dir_that_is_a_file(trained: Trained, tmp_path: Path, name: str) -> None:
    (tmp_path / "scores").write_text("x")
    if name == "BPR":
        assert open_teacher_scores(trained.teacher(name), settings(tmp_path)).score(
            USERS, ITEMS
        ).shape == (4, 3)
    else:
        with pytest.raises(KDError, match="could not be written"):
            open_teacher_scores(trained.teacher(name), settings(tmp_path))


class FakeTeacher:
    """A teacher that scores with a formula, through numpy, where its memory is counted."""

    def __init__(self, n_users: int, n_items: int, spoil: dict[int, float] | None = None) -> None:
        self.n_contexts, self.n_items = n_users, n_items
        self.device = torch.device("cpu")
        self.source = "fake.pth"
        self.for_rows = self.scores_rows = False
        self.seen = Seen.from_pairs(torch.tensor([1]), torch.tensor([1]), n_users, n_items)
        self.spoil = spoil or {}
        self.fingerprint = "f" * 32

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None

    def score_all(self, contexts: Tensor) -> Tensor:
        users = contexts.numpy()[:, None].astype(np.float32)
        rows = np.sin(users * np.arange(self.n_items, dtype=np.float32))
        for user, value in self.spoil.items():
            rows[contexts.numpy() == user, 2] = value
        rows[:, 0] = -np.inf
        return torch.from_numpy(rows)

    def user_tokens(self, contexts: Tensor) -> list[str]:
        return [f"user-{int(i)}" for i in contexts]

    def release(self) -> None:
        """There is nothing to give back."""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_name_the_users(tmp_path: Path, value: float) -> None:
    # The scores of the padding user do not matter.
    teacher = FakeTeacher(20, 10, {0: np.nan, 3: value, 17: value})
    with pytest.raises(
        TeacherError,
        match=r"NaN or infinite scores to 2 users: user-3, user-17\. Its training diverged",
    ):
        open_teacher_scores(teacher, settings(tmp_path))
    assert not files(tmp_path)
    many = FakeTeacher(20, 10, dict.fromkeys(range(1, 9), value))
    with pytest.raises(TeacherError, match=r"8 users: user-1, user-2, user-3, user-4, user-5, …\."):
        open_teacher_scores(many, settings(tmp_path))
    open_teacher_scores(FakeTeacher(20, 10, {0: value}), settings(tmp_path))


def test_scores_that_outgrow_half_precision(tmp_path: Path) -> None:
    teacher = FakeTeacher(20, 10, {4: 1e6})
    with pytest.raises(
        TeacherError, match=r"1 users: user-4\..*kd_cache_dtype: float32, if they outgrow float16"
    ):
        open_teacher_scores(teacher, settings(tmp_path, "float16"))
    scores = open_teacher_scores(teacher, settings(tmp_path, "float32"))
    assert scores.score(torch.tensor([4]), torch.tensor([[2]])).item() == 1e6


def test_product_teacher_with_values_that_are_not_finite(trained: Trained, tmp_path: Path) -> None:
    teacher = trained.teacher("BPR")
    tokens = trained.student.dataset.field2id_token["user_id"]
    with torch.no_grad():
        teacher.model.user_embedding.weight[[0, 2, 9]] = torch.nan
    with pytest.raises(TeacherError, match=f"scores to 2 users: {tokens[2]}, {tokens[9]}"):
        open_teacher_scores(teacher, settings(tmp_path))
    with torch.no_grad():
        teacher.model.item_embedding.weight[[0, 5], 0] = torch.inf
    with pytest.raises(TeacherError, match="NaN or infinite values for 1 items, so for all users"):
        open_teacher_scores(teacher, settings(tmp_path))
    assert not files(tmp_path)


def test_memory_grows_with_a_block_only(tmp_path: Path) -> None:
    def peak(n_users: int) -> int:
        folder = tmp_path / str(n_users)
        tracemalloc.start()
        open_teacher_scores(FakeTeacher(n_users, 4000), settings(folder))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (
            entry(folder, FakeTeacher(n_users, 4000)) / "scores.npy"
        ).stat().st_size >= n_users * 4000 * 4
        return most

    small, large = peak(2000), peak(8000)  # 32 and 128 MB
    assert large < 1.3 * small
    assert large < 64e6


def test_blocks_cover_everything_once() -> None:
    parts = list(blocks(10, 4, cells=12))
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    assert torch.cat(parts).tolist() == list(range(10))
    assert [len(part) for part in blocks(2, 100, cells=5)] == [1, 1]


# A table with ties, small enough to rank by hand; row and column 0 are padding.
TABLE = torch.tensor(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [9.0, 1.0, 4.0, 2.0, 3.0],
        [9.0, 5.0, 5.0, 5.0, 1.0],
        [9.0, -1.0, -2.0, -3.0, -4.0],
    ]
)
SEEN = Seen.from_pairs(torch.tensor([1, 1, 3, 3, 3]), torch.tensor([2, 4, 1, 2, 3]), 4, 5)


def small(kind: str, store: Store | None = None) -> FactorScores | DenseScores:
    if kind == "dense":
        return DenseScores(TABLE.numpy(), SEEN, store)
    return FactorScores(TABLE, torch.eye(5), SEEN, store)


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_top_k(kind: str) -> None:
    scores, users = small(kind), torch.tensor([3, 1])
    assert scores.top_k(users, 3).tolist() == [[1, 2, 3], [2, 4, 3]]
    assert scores.top_k(users, 3, unseen=True).tolist() == [[4, 0, 0], [3, 1, 0]]
    tied = scores.top_k(torch.tensor([2]), 4)[0].tolist()
    assert sorted(tied[:3]) == [1, 2, 3]
    assert tied[3] == 4
    assert scores.top_k(users, 1).dtype == torch.int64


@pytest.mark.parametrize("kind", ["factors", "dense"])
@pytest.mark.parametrize("unseen", [False, True])
def test_top_k_of_more_than_there_is(kind: str, unseen: bool) -> None:
    got = small(kind).top_k(torch.tensor([1]), 7, unseen).tolist()
    assert got == ([[3, 1, 0, 0, 0, 0, 0]] if unseen else [[2, 4, 3, 1, 0, 0, 0]])


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_wider_lists_are_reused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, users = small(kind), torch.tensor([1, 2, 3])
    made: list[int] = []
    make = scores._make_lists

    def counted(k: int, unseen: bool) -> Tensor:
        made.append(k)
        return make(k, unseen)

    monkeypatch.setattr(scores, "_make_lists", counted)
    wide = scores.top_k(users, 3)
    assert torch.equal(scores.top_k(users, 2), wide[:, :2])
    assert made == [3]
    scores.top_k(users, 2, unseen=True)  # another list
    scores.top_k(users, 4)  # a wider one
    assert made == [3, 2, 4]


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_lists_are_kept_on_disk(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    users = torch.tensor([1, 2, 3])
    store = Store(tmp_path / "teacher")
    expected = small(kind, store).top_k(users, 3, unseen=True)
    by_item = small(kind, store).transposed().top_k(torch.tensor([1, 4]), 3)
    dtype = "" if kind == "factors" else "-float32"
    kept = [f"top-3-all-by-users{dtype}", f"top-3-unseen-users{dtype}"]
    assert sorted(path.name for path in store.root.iterdir()) == kept

    def never(*args: Any) -> Tensor:
        raise AssertionError("the lists were made again")

    again, by_item_again = small(kind, store), small(kind, store).transposed()
    monkeypatch.setattr(type(again), "score_all", never)
    assert torch.equal(again.top_k(users, 3, unseen=True), expected)
    assert torch.equal(by_item_again.top_k(torch.tensor([1, 4]), 3), by_item)
    monkeypatch.undo()

    spoil_byte(store.root / f"top-3-unseen-users{dtype}")
    assert torch.equal(small(kind, store).top_k(users, 3, unseen=True), expected)
    assert "ids.npy is damaged" in caplog.text


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_transposed(kind: str) -> None:
    scores = small(kind)
    turned = scores.transposed()
    assert (turned.n_contexts, turned.n_items) == (5, 4)
    items = torch.tensor([4, 1])
    assert turned.score_all(items).tolist() == [[-torch.inf, 3, 1, -4], [-torch.inf, 1, 5, -1]]
    assert turned.score(items, torch.tensor([[1, 3], [2, 2]])).tolist() == [[3, -4], [5, 5]]
    assert turned.top_k(items, 3).tolist() == [[1, 2, 3], [2, 1, 3]]
    assert turned.top_k(items, 3, unseen=True).tolist() == [[2, 3, 0], [2, 1, 0]]
    back = turned.transposed()
    users = torch.tensor([1, 3])
    assert torch.equal(back.score_all(users), scores.score_all(users))
