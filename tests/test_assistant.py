"""The assistant between teacher and student: its size, training and results, and resuming."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from recbole_rcekd import run_recbole_kd
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.training.config import assistant_config
from recbole_rcekd.training.run_settings import RunSettings
from recbole_rcekd.training.trainer import distill_trainer
from tests.helpers import build_config, train_teacher, write_dataset

# RecBole's init_logger opens a file per run and closes none.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
SMALL: dict[str, Any] = {
    "use_gpu": False,
    "state": "ERROR",
    "show_progress": False,
    "seed": 2020,
    "epochs": 1,
    "train_batch_size": 128,
    "learning_rate": 0.02,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "tarec_top_k": 5,
    "ce_top_k": 5,
}
BPR = {"embedding_size": 4, "teacher_embedding_size": 16, "teacher_epochs": 2}
N_ROWS = 40 + 1 + 60 + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("assistant"))


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(folder: Path, model: str = "BPR", **settings: Any) -> dict[str, Any]:
    merged = {
        "data_path": str(folder),
        "kd_loss": "tarec",
        **SMALL,
        **(BPR if model == "BPR" else {}),
        **settings,
    }
    arguments = {key: merged.pop(key, None) for key in ("kd_loss", "seeds", "output_dir")}
    teacher = merged.pop("teacher", "BPR")
    left = {key: value for key, value in merged.items() if value != "nothing"}
    return run_recbole_kd(model, "tiny", config_dict=left, teacher=teacher, **arguments)


def trainings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The models that were trained, in order, from the log."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", caplog.text)
    return re.findall(r"(Teacher|Assistant, \S+|\S+, seed \d+): training", text)


# --- how large it is ------------------------------------------------------------------------------


def test_sizes(folder: Path) -> None:
    def size(wanted: int, kd_loss: str = "tarec") -> Any:
        student = build_config(
            folder, embedding_size=4, kd_loss=kd_loss, tarec_assistant_size=wanted
        )
        settings = RunSettings.read(student)
        teacher = build_config(folder, "LightGCN", embedding_size=20)
        config = assistant_config(student, settings, teacher)
        if config is not None:
            assert student["embedding_size"] == 4
            assert (config["model"], config["tarec_assistant_size"]) == ("BPR", 0)
        return config and config["embedding_size"]

    assert size(-1) == 9  # √(4·20) = 8.94
    assert size(6) == 6
    assert size(6, "ce+tarec") == 6
    assert size(0) is None
    assert size(6, "ce") is None


@pytest.mark.parametrize("wanted", [-1, 8])
def test_students_without_an_embedding_size_are_refused_before_data_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    monkeypatch.setattr(
        "recbole_rcekd.experiment.create_dataset", lambda config: pytest.fail("data were read")
    )
    with pytest.raises(
        SettingsError, match=r"NeuMF has no \[embedding_size\] .* set tarec_assistant_size: 0"
    ):
        run(folder, "NeuMF", tarec_assistant_size=wanted, embedding_size=8)


def test_an_assistant_has_no_earlier_states(folder: Path) -> None:
    student = build_config(folder, kd_loss="hetcomp+tarec", tarec_assistant_size=8)
    with pytest.raises(
        SettingsError,
        match=r"hetcomp\+tarec learns from earlier states .* set tarec_assistant_size: 0",
    ):
        assistant_config(student, RunSettings.read(student), None)


def test_no_mean_with_a_teacher_of_no_size(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"is -1, the geometric mean .* but the teacher has none"
    ):
        run(folder, teacher="NeuMF", teacher_embedding_size="nothing", kd_loss="scratch,tarec")
    file = train_teacher(folder, "NeuMF", epochs=1)
    given: dict[str, Any] = {"teacher_embedding_size": "nothing", "teacher_epochs": "nothing"}
    with pytest.raises(
        SettingsError, match=r"is -1, the geometric mean .* but the teacher has none"
    ):
        run(folder, teacher=str(file), kd_loss="scratch,tarec", **given)
    assert not list((tmp_path / "saved").glob("*.pth"))  # nor was the student alone trained


# --- from end to end ------------------------------------------------------------------------------


def test_it_learns_from_the_teacher_and_teaches_the_student(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taught: list[tuple[int, int, int]] = []

    def watch(config: Any) -> Any:
        class Watching(distill_trainer(config)):  # type: ignore[misc]
            def fit(self, *args: Any, **kwargs: Any) -> Any:
                taught.append(
                    (
                        self.teacher.config["embedding_size"],
                        self.config["embedding_size"],
                        self.seed,
                    )
                )
                return super().fit(*args, **kwargs)

        return Watching

    monkeypatch.setattr("recbole_rcekd.experiment.distill_trainer", watch)
    with caplog.at_level(logging.INFO):
        result = run(folder, kd_loss="scratch,ce,tarec", seeds=[3, 4], output_dir="out")
    assert taught == [(16, 4, 3), (16, 8, 2020), (8, 4, 3), (16, 4, 4), (8, 4, 4)]
    assert trainings(caplog) == [
        *("Teacher", "scratch, seed 3", "ce, seed 3", "Assistant, tarec", "tarec, seed 3"),
        *("scratch, seed 4", "ce, seed 4", "tarec, seed 4"),
    ]
    assert [run["assistant"] is not None for run in result["runs"]] == [False, False, True] * 2
    assistant = result["runs"][2]["assistant"]
    assert assistant == result["runs"][5]["assistant"]
    assert (assistant["embedding_size"], assistant["parameters"], assistant["epochs"]) == (
        8,
        N_ROWS * 8,
        1,
    )
    assert set(assistant) == {"embedding_size", *result["teacher"]}
    assert assistant["test_result"] != result["teacher"]["test_result"]
    assert re.fullmatch(r"saved/assistant-BPR-tiny-\w{10}\.pth", assistant["checkpoint"])
    assert f"{assistant['test_result']}" in caplog.text
    assert (
        json.loads(Path("out/tarec-seed3/run.json").read_text(encoding="utf-8"))["assistant"]
        == assistant
    )
    assert result["runs"][2]["parameters"] == N_ROWS * 4
    # Each run has one checkpoint, and with the contrast one of what the contrast learned.
    assert len(list(Path("saved").glob("BPR-tarec-*.kd.pth"))) == 2
    assert len(list(Path("saved").glob("assistant-*.kd.pth"))) == 1


def test_it_is_trained_once_and_found_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        first = run(folder)
        caplog.clear()
        second = run(folder)
        assert trainings(caplog) == ["tarec, seed 2020"]
        third = run(folder, tarec_assistant_size=8)  # the same size as by default
        assert trainings(caplog) == ["tarec, seed 2020"] * 2
        caplog.clear()
        for settings in (
            {"tarec_temperature": 2.0},
            {"tarec_assistant_size": 6},
            {"teacher_epochs": 1},
        ):
            run(folder, **settings)
        assert trainings(caplog) == [
            *("Assistant, tarec", "tarec, seed 2020") * 2,
            *("Teacher", "Assistant, tarec", "tarec, seed 2020"),
        ]
        caplog.clear()
        run(folder, ce_top_k=6)  # the setting does not concern the assistant
        assert trainings(caplog) == ["tarec, seed 2020"]
    one, two, three = (each["runs"][0] for each in (first, second, third))
    assert one["test_result"] == two["test_result"] == three["test_result"]
    for each in (one, two, three):
        del each["assistant"]["ranking_ms_per_1000_users"]  # measured each time
    assert one["assistant"] == two["assistant"] == three["assistant"]


@pytest.mark.parametrize("n_trained", [0, 1])
def test_a_stopped_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, n_trained: int
) -> None:
    """Stopped while the assistant learns, and while its student does."""
    begun: list[int] = []

    def stop(config: Any) -> Any:
        class Stopping(distill_trainer(config)):  # type: ignore[misc]
            def fit(self, *args: Any, **kwargs: Any) -> Any:
                begun.append(self.config["embedding_size"])
                result = super().fit(*args, **kwargs)
                if len(begun) > n_trained:
                    raise KeyboardInterrupt
                return result

        return Stopping

    monkeypatch.setattr("recbole_rcekd.experiment.distill_trainer", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder, kd_loss="scratch,tarec", output_dir="out")
    assert begun == [8, 4][: n_trained + 1]
    monkeypatch.setattr("recbole_rcekd.experiment.distill_trainer", distill_trainer)
    with caplog.at_level(logging.INFO):
        result = run(folder, kd_loss="scratch,tarec", output_dir="out")
        assert trainings(caplog) == ["Assistant, tarec", "tarec, seed 2020"][n_trained:]
        caplog.clear()
        # The assistant is not needed after its student has learned.
        Path(result["runs"][1]["assistant"]["checkpoint"]).unlink()
        assert run(folder, kd_loss="scratch,tarec", output_dir="out")["runs"] == result["runs"]
        assert trainings(caplog) == []


def test_a_run_of_before_there_were_assistants_is_known(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(folder, kd_loss="ce", output_dir="out")
    file = Path("out/ce-seed2020/run.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content.pop("assistant") is None
    file.write_text(json.dumps(content), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        run(folder, kd_loss="ce", output_dir="out")
    assert trainings(caplog) == []


def test_without_an_assistant_and_without_vectors_any_teacher_teaches_any_student(
    folder: Path,
) -> None:
    settings = {"tarec_assistant_size": 0, "tarec_contrast_weight": 0.0, "teacher_epochs": 1}
    result = run(
        folder, "NeuMF", teacher="MultiDAE", teacher_train_neg_sample_args=None, **settings
    )
    assert result["runs"][0]["assistant"] is None


def test_who_has_no_vectors_is_told_how_to_leave_them_out(folder: Path) -> None:
    settings: dict[str, Any] = {"tarec_assistant_size": 0, "teacher_epochs": 1}
    with pytest.raises(
        TeacherError,
        match=r"NeuMF are no product .* Or leave the vectors out: tarec_contrast_weight: 0\.",
    ):
        run(folder, teacher="NeuMF", **settings, teacher_embedding_size="nothing")
    with pytest.raises(
        SettingsError, match=r"NeuMF's scores are no product .* out: tarec_contrast_weight: 0\."
    ):
        run(folder, "NeuMF", **settings)


def test_sums_have_an_assistant_too(folder: Path) -> None:
    result = run(folder, kd_loss="ce+tarec", tarec_sides="items")
    assert result["runs"][0]["assistant"]["parameters"] == N_ROWS * 8
