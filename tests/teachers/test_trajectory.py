"""Earlier states of a teacher: which are kept while it is trained, and how a student finds them."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st

from recbole_rcekd import distill_trainer, load_teacher, run_recbole_kd
from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.losses.hetcomp import HetCompLoss, HetCompSettings
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from recbole_rcekd.teachers.safe_load import read_checkpoint
from recbole_rcekd.teachers.trajectory import (
    StateLists,
    Trajectory,
    evenly,
    folder_beside,
    open_trajectories,
)
from tests.helpers import build, build_model, save_untrained, write_dataset
from tests.tables import Table, seen_of

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "use_gpu": False,
    "state": "ERROR",
    "show_progress": False,
    "seed": 2020,
    "epochs": 4,
    "train_batch_size": 128,
    "learning_rate": 0.02,
    "embedding_size": 4,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "hetcomp_top_k": 20,
}
TEACHER: dict[str, Any] = {
    "teacher_embedding_size": 8,
    "teacher_epochs": 9,
    "teacher_learning_rate": 0.02,
}
# Every epoch is looked at, so that the states of a short training are gone through.
QUICK: dict[str, Any] = {"kd_refresh_epochs": 1, "hetcomp_interval": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("trajectory"))


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(folder: Path, settings: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    arguments = {"model": "BPR", "dataset": "tiny", "teacher": "BPR", **arguments}
    return run_recbole_kd(
        config_dict={"data_path": str(folder), **SMALL, **(settings or {})}, **arguments
    )


def numbers(place: Path) -> list[int]:
    assert {file.suffix for file in place.iterdir()} <= {".pth"}
    return sorted(int(file.stem.removeprefix("epoch-")) for file in place.iterdir())


def trained(caplog: pytest.LogCaptureFixture) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*m", "", caplog.text)
    return re.findall(r"(?:Teacher: training \w+|\w+, seed \d+: training \w+)", text)


# --- which epochs are kept ------------------------------------------------------------------------


def test_evenly_by_hand() -> None:
    assert evenly(range(12), 11, 3) == [2, 5, 8]  # after 3, 6 and 9 epochs of 12
    assert evenly([0, 1, 2], 3, 3) == [0, 1, 2]
    assert evenly([1, 3, 5, 7], 9, 1) == [3]  # after 4 or 6 of 10 epochs; the earlier one
    assert evenly([0, 1], 2, 3) == [0, 1]
    assert evenly([], 0, 3) == []
    assert evenly([0, 1, 2, 9], 10, 3) == [1, 2, 9]


@for_all(n=st.integers(1, 6), best=st.integers(0, 150), waited=st.integers(0, 12))
def test_those_kept_are_spread_over_the_epochs_before_the_best(
    n: int, best: int, waited: int
) -> None:
    kept: set[str] = set()

    class Files(Trajectory):
        def _keep(self, epochs: list[int]) -> None:
            gone = {str(self._file(epoch)) for epoch in set(self._epochs) - set(epochs)}
            assert gone <= kept
            kept.difference_update(gone)
            self._epochs = epochs

    trajectory = Files(Path("unused"), n)
    for epoch in range(best + waited + 1):
        trajectory.add(epoch, kept.add)
        assert len(kept) <= 2 * n + 1 + max(0, epoch - trajectory.best)
        if epoch <= best:  # each is better than the last one, until there are no more
            trajectory.best = epoch
    shutil.rmtree("unused", ignore_errors=True)
    trajectory._keep(evenly(trajectory._before_best(), best, n))
    epochs = trajectory._epochs
    assert kept == {f"unused/epoch-{epoch}.pth" for epoch in epochs}
    assert epochs == sorted(set(epochs))
    assert len(epochs) == min(n, best)
    assert all(epoch < best for epoch in epochs)
    # None is further from its place than the next one's place is.
    for part, epoch in enumerate(epochs if best >= n else [], 1):
        assert abs(epoch + 1 - part * (best + 1) / (n + 1)) <= max(1, (best + 1) / (n + 1))


# --- kept while a teacher is trained --------------------------------------------------------------


def test_a_teachers_states_lie_beside_it(folder: Path, tmp_path: Path) -> None:
    plain = run(folder, TEACHER, kd_loss="scratch")
    known = set((tmp_path / "saved").iterdir())
    kept = run(
        folder, {**TEACHER, "teacher_checkpoints": 2, "teacher_eval_step": 3}, kd_loss="scratch"
    )
    (file,) = {*(tmp_path / "saved").glob("teacher-*.pth")} - known
    best = read_checkpoint(file)["epoch"]
    assert best in (2, 5, 8)
    found = numbers(folder_beside(file))
    assert len(found) == 2
    assert found == evenly(range(best), best, 2)
    # They are RecBole's checkpoints, of that training, and whole.
    for number in found:
        state = read_checkpoint(folder_beside(file) / f"epoch-{number}.pth")
        assert state["epoch"] == number
        assert {"config", "state_dict", "optimizer", "other_parameter"} <= state.keys()
    # A student alone is what it was, and keeps nothing.
    assert kept["runs"][0]["test_result"] == plain["runs"][0]["test_result"]
    assert len(list((tmp_path / "saved").glob("*.trajectory"))) == 1
    assert not list((tmp_path / "saved").rglob("*.partial"))


def test_a_state_is_the_teacher_after_so_many_epochs(folder: Path, tmp_path: Path) -> None:
    last = {**TEACHER, "teacher_eval_step": 0}  # the last epoch counts as the best
    run(folder, {**last, "teacher_checkpoints": 2}, kd_loss="scratch")
    (file,) = (tmp_path / "saved").glob("teacher-*.pth")
    # Kept of 1, 3, 5 and 7. Even steps would be after 3 and 6 of 9 epochs.
    assert numbers(folder_beside(file)) == [
        1,
        5,
    ]
    run(folder, last, kd_loss="scratch")
    run(folder, {**last, "teacher_epochs": 6}, kd_loss="scratch")
    others = [
        read_checkpoint(each) for each in (tmp_path / "saved").glob("teacher-*.pth") if each != file
    ]
    whole, shorter = sorted(others, key=lambda content: -content["epoch"])
    state = read_checkpoint(folder_beside(file) / "epoch-5.pth")
    for found, expected in ((read_checkpoint(file), whole), (state, shorter)):
        for name, weights in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][name], weights), name


def test_a_teacher_with_its_states_is_trained_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**TEACHER, "teacher_checkpoints": 2, "epochs": 1}
    once = ["Teacher: training BPR"]
    with caplog.at_level(logging.INFO):
        for expected in (once, []):
            caplog.clear()
            run(folder, settings, kd_loss="scratch")
            assert trained(caplog)[:-1] == expected
        (file,) = (tmp_path / "saved").glob("teacher-*.pth")
        before = numbers(folder_beside(file))
        shutil.rmtree(folder_beside(file))
        caplog.clear()
        run(folder, settings, kd_loss="scratch")
        assert trained(caplog)[:-1] == once
        assert numbers(folder_beside(file)) == before
        # Interrupted between the last two steps, by a training that had kept other epochs.
        file.unlink()
        (folder_beside(file) / "epoch-99.pth").touch()
        caplog.clear()
        run(folder, settings, kd_loss="scratch")
        assert trained(caplog)[:-1] == once
        assert numbers(folder_beside(file)) == before
        caplog.clear()
        run(folder, {**settings, "teacher_checkpoints": 3}, kd_loss="scratch")
        assert trained(caplog)[:-1] == once


def test_an_interrupted_training_leaves_nothing_that_is_taken_for_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TEACHER, "teacher_checkpoints": 2, "epochs": 1}
    add = Trajectory.add

    def stop(self: Trajectory, epoch: int, save: Any) -> None:
        if epoch == 4:
            raise KeyboardInterrupt
        add(self, epoch, save)

    monkeypatch.setattr(Trajectory, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder, settings, kd_loss="scratch")
    assert not list((tmp_path / "saved").glob("teacher-*"))
    monkeypatch.setattr(Trajectory, "add", add)
    run(folder, settings, kd_loss="scratch")
    (place,) = (tmp_path / "saved").glob("teacher-*.trajectory")
    assert len(numbers(place)) == 2


def test_another_command_was_faster(tmp_path: Path) -> None:
    place = tmp_path / "t.trajectory"
    for name in ("one", "two"):
        trajectory = Trajectory(tmp_path / name, 2)
        for epoch in range(4):
            trajectory.add(
                epoch,
                lambda file, name=name: Path(file).write_text(name),  # type: ignore[misc,arg-type]
            )
            trajectory.best = epoch
        assert trajectory.finish(place) == [0, 2]
    assert [file.read_text() for file in place.iterdir()] == ["one", "one"]
    assert [each.name for each in tmp_path.iterdir()] == ["t.trajectory"]


# --- found and opened for a student ---------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(folder: Path) -> Path:
    """``a.pth`` and ``b.pth`` with earlier states, ``alone.pth`` without, and sequential ones.

    The states are untrained models.
    """
    place = folder / "teachers"
    general = build(folder, "BPR", embedding_size=8)
    for seed, name in enumerate(("a", "b", "alone")):
        save_untrained(general, place / f"{name}.pth", build_model(general, 10 * seed))
    for seed, name in enumerate(("a", "b")):
        for number in (2, 10, 9):
            save_untrained(
                general,
                place / f"{name}.trajectory" / f"epoch-{number}.pth",
                build_model(general, 10 * seed + number),
            )
    sequential = build(folder, "GRU4Rec", **IN_TIME, hidden_size=8, num_layers=1)
    for seed, file in enumerate(
        ("rows.pth", "rows.trajectory/epoch-0.pth", "rows.trajectory/epoch-1.pth")
    ):
        save_untrained(sequential, place / file, build_model(sequential, seed))
    in_time = build(folder, "BPR", **IN_TIME, kd_sequence_split="interactions")
    for seed, file in enumerate(("users.pth", "users.trajectory/epoch-0.pth")):
        save_untrained(in_time, place / file, build_model(in_time, seed))
    return place


IN_TIME: dict[str, Any] = {
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "group_by": "user",
        "order": "TO",
        "mode": "full",
    },
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 5,
    "embedding_size": 8,
    "train_neg_sample_args": None,
}
IN_TIME_GENERAL = {
    **IN_TIME,
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "dynamic": False},
}


@pytest.mark.parametrize("scale", ["raw", "standardised"])
def test_the_states_of_a_teacher(folder: Path, tmp_path: Path, teachers: Path, scale: Any) -> None:
    settings = KDSettings(kd_cache_dir=str(tmp_path / "cache"), kd_teacher_scores=scale)
    dataset = build(folder, "BPR").train._dataset
    teacher = load_teacher(teachers / "a.pth", dataset)
    scores = teacher.open_scores(settings)
    (states,) = open_trajectories(
        teacher, scores, HetCompLoss(HetCompSettings()), dataset, settings, CPU
    )
    assert len(states) == 4
    assert states[-1] is scores
    users = torch.arange(1, 41)
    for state, number in zip(states, (2, 9, 10), strict=False):
        expected = read_teacher(
            teachers / "a.trajectory" / f"epoch-{number}.pth", dataset
        ).open_scores(settings)
        for k in (5, 20, 3):
            for unseen in (True, False):
                assert torch.equal(state.top_k(users, k, unseen), expected.top_k(users, k, unseen))
        # Nothing is held but lists.
        assert isinstance(state, StateLists)
        assert {name: lists.shape for name, lists in state._lists.items()} == dict.fromkeys(
            (True, False), (41, 20)
        )
        items = torch.arange(1, 4).expand(40, 3)
        order = state.score(users, items).argsort(1)
        assert torch.equal(order, expected.score(users, items).argsort(1))
        if scale == "standardised":
            full = state.score_all(users)[:, 1:]
            torch.testing.assert_close(full.mean(1), torch.zeros(40), atol=1e-4, rtol=0)
            assert state.transposed().n_contexts == state.n_items


def test_lists_of_a_state_are_those_of_the_ranks_own_users() -> None:
    table = Table(torch.randn(9, 12), seen_of([(1, 1)], 9, 12))
    asked: list[int] = []

    def opened() -> TeacherScores:
        asked.append(1)
        return table

    for rank in (0, 1, 2):
        state = StateLists(opened, 9, 12, Ranks(rank, 3))
        own = Ranks(rank, 3).own(torch.arange(1, 9))
        for k in (4, 2):
            assert torch.equal(state.top_k(own, k, True), table.top_k(own, k, True))
    assert len(asked) == 3


def distilled(folder: Path, teacher: Any, model: str = "BPR", **settings: Any) -> HetCompLoss:
    """The loss after a short training with what lies at ``teacher``."""
    bundle = build(
        folder,
        model,
        **{**QUICK, "epochs": 5, "kd_loss": "hetcomp", "hetcomp_top_k": 20, **settings},
    )
    dataset = bundle.train._dataset
    loaded = (
        teacher
        if isinstance(teacher, Table)
        else load_teacher(teacher, dataset, settings=TeacherSettings())
    )
    trainer: Any = distill_trainer(bundle.config)(bundle.config, build_model(bundle), loaded)
    trainer.fit(bundle.train, bundle.valid, saved=False)
    assert all(row["kd_loss"] > 0 for row in trainer.history.rows)
    loss: HetCompLoss = trainer.kd_losses["hetcomp"]
    return loss


def test_a_student_goes_through_the_states(folder: Path, teachers: Path) -> None:
    loss = distilled(folder, teachers / "a.pth", hetcomp_alpha=0.1)  # every look moves on
    assert loss.stage.shape == (41, 1)
    assert loss.hard  # at epoch 1 the first look, at 2, 3 and 4 the moves
    assert loss.stage[1:].eq(3).all()
    assert not distilled(folder, teachers / "a.pth", hetcomp_alpha=0.1, hetcomp_interval=2).hard


def test_several_teachers_have_a_trajectory_each(folder: Path, teachers: Path) -> None:
    loss = distilled(folder, f"{teachers / 'a.pth'},{teachers / 'b.pth'}", hetcomp_alpha=0.1)
    assert loss.stage[1:].eq(3).all()
    assert loss.stage.shape == (41, 2)
    with pytest.raises(
        TeacherError, match=r"hetcomp learns from earlier states .* but \[.*alone.pth\] has none in"
    ):
        distilled(folder, f"{teachers / 'a.pth'},{teachers / 'alone.pth'}")


def test_states_by_name(folder: Path, teachers: Path) -> None:
    files = [str(teachers / "a.trajectory" / f"epoch-{n}.pth") for n in (9, 2)]
    for teacher in (teachers / "alone.pth", Table(torch.randn(41, 61), seen_of([], 41, 61))):
        loss = distilled(folder, teacher, hetcomp_checkpoints=files, hetcomp_alpha=0.1)
        assert loss.stage[1:].eq(2).all()
        with pytest.raises(TeacherError, match=r"\[hetcomp_checkpoints\]"):
            distilled(folder, teacher)
    with pytest.raises(
        TeacherError, match=r"\[hetcomp_checkpoints\] names \[no.pth\], but there is no such file"
    ):
        distilled(folder, teachers / "alone.pth", hetcomp_checkpoints=["no.pth"])
    with pytest.raises(
        SettingsError, match=r"\[hetcomp_checkpoints\] belongs to one teacher, but there are 2"
    ):
        distilled(folder, f"{teachers / 'a.pth'},{teachers / 'b.pth'}", hetcomp_checkpoints=files)


@pytest.mark.parametrize(("teacher", "n_states"), [("rows", 3), ("users", 2)])
def test_rows_of_a_sequential_student(
    folder: Path, teachers: Path, teacher: str, n_states: int
) -> None:
    more = {"kd_sequence_split": "interactions"} if teacher == "users" else {}
    settings = {**IN_TIME, **more, "hidden_size": 8, "num_layers": 1, "hetcomp_alpha": 0.1}
    loss = distilled(folder, teachers / f"{teacher}.pth", "GRU4Rec", **settings)
    # The first look is in epoch 1; each later epoch moves every row on, and the diagnostics of an
    # epoch do not.
    assert loss.stage.eq(n_states - 1).all()
    slow = distilled(folder, teachers / f"{teacher}.pth", "GRU4Rec", **settings, epochs=2)
    assert not slow.stage.any()


def test_states_of_another_kind_are_refused(folder: Path, teachers: Path) -> None:
    settings = {**IN_TIME, "kd_sequence_split": "interactions", "hidden_size": 8, "num_layers": 1}
    sequential = build(folder, "GRU4Rec", **settings)
    save_untrained(sequential, Path("rows.pth"))
    with pytest.raises(
        TeacherError, match=r"rows.pth\] is a GRU4Rec, which does not score what the teacher scores"
    ):
        distilled(
            folder, teachers / "users.pth", "GRU4Rec", **settings, hetcomp_checkpoints=["rows.pth"]
        )


# --- the whole command ----------------------------------------------------------------------------


def test_the_command(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {
        **TEACHER,
        **QUICK,
        "teacher_checkpoints": 2,
        "rce_top_k": 5,
        "rce_samples": 5,
        "rce_pool": 20,
    }
    with caplog.at_level(logging.INFO):
        first = run(folder, settings, kd_loss="hetcomp,rce+hetcomp", output_dir="out")
        assert trained(caplog) == [
            "Teacher: training BPR",
            "hetcomp, seed 2020: training BPR",
            "hetcomp, seed 2020: training BPR",
        ]
        assert re.search(
            r"its states after the epochs \[\d, \d\] are kept in \[saved/teacher-", caplog.text
        )
        with (tmp_path / "out" / "hetcomp-seed2020" / "history.csv").open() as file:
            assert all(float(row["kd_loss"]) > 0 for row in csv.DictReader(file))
        caplog.clear()
        again = run(folder, settings, kd_loss="hetcomp", output_dir="out")
        assert trained(caplog) == []
        assert again["runs"][0] == first["runs"][0]
        # Other states of the same teacher are another run.
        caplog.clear()
        run(folder, {**settings, "teacher_checkpoints": 3}, kd_loss="hetcomp", output_dir="out")
        assert trained(caplog) == ["Teacher: training BPR", "hetcomp, seed 2020: training BPR"]
    (place,) = (
        each for each in (tmp_path / "saved").glob("*.trajectory") if len(numbers(each)) == 2
    )
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["runs"][0]["settings"]["hetcomp_checkpoints"] == []
    # By path, it is found with its states.
    teacher = place.with_suffix(".pth")
    by_path = run(folder, QUICK, teacher=teacher, kd_loss="hetcomp")
    assert by_path["test_result"] == first["runs"][0]["test_result"]


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        (
            TEACHER,
            {},
            r"\[kd_loss\] rce\+hetcomp learns from earlier states .* say with "
            r"\[teacher_checkpoints\]",
        ),
        (
            {},
            {"teacher": "alone.pth"},
            r"hetcomp learns from .* \[alone.pth\] has none in \[alone.trajectory/epoch-<n>.pth\]",
        ),
        (
            {"teacher_checkpoints": 2},
            {"teacher": "alone.pth"},
            r"\[teacher_checkpoints\] has no effect: .* trained already",
        ),
        (
            {"hetcomp_checkpoints": "no.pth"},
            {"teacher": "alone.pth"},
            r"names \[no.pth\], but there is no such file",
        ),
        (
            {"hetcomp_checkpoints": ["no.pth"]},
            {"teacher": "alone.pth,alone.pth"},
            "belongs to one teacher",
        ),
        (
            {**TEACHER, "teacher_checkpoints": -1},
            {},
            r"\[teacher_checkpoints\] is -1, but must be at least 0",
        ),
    ],
)
def test_what_is_refused_before_data_are_read(
    folder: Path,
    teachers: Path,
    settings: dict[str, Any],
    arguments: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(teachers / "alone.pth", "alone.pth")
    monkeypatch.setattr(
        "recbole_rcekd.experiment.create_dataset", lambda config: pytest.fail("data were read")
    )
    with pytest.raises((SettingsError, TeacherError), match=words):
        run(folder, settings, kd_loss="scratch,rce+hetcomp", **arguments)


def test_a_teacher_whose_first_epoch_was_its_best(folder: Path) -> None:
    with pytest.raises(TeacherError, match="longer, if its first epoch was its best"):
        run(folder, {**TEACHER, "teacher_epochs": 1, "teacher_checkpoints": 2}, kd_loss="hetcomp")
