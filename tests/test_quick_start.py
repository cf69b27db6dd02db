"""The whole command, from files on disk to result.json, with data for runs of a second."""

from __future__ import annotations

import configparser
import csv
import json
import logging
import math
import re
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from torch import Tensor

from recbole_rcekd import KDError, run_recbole_kd
from recbole_rcekd.cli import main
from recbole_rcekd.compat.habits import evaluate_more
from recbole_rcekd.core.errors import ScoringError, SettingsError, TeacherError
from recbole_rcekd.data.fingerprint import split_hash
from recbole_rcekd.evaluation.evaluate import TeacherAsModel
from recbole_rcekd.evaluation.report import Report, RunResult, TeacherResult
from recbole_rcekd.teachers.ensemble import TeacherEnsemble
from recbole_rcekd.teachers.load import load_teacher
from recbole_rcekd.training.config import command_config
from recbole_rcekd.training.history import History
from recbole_rcekd.training.recording import recording_trainer
from recbole_rcekd.training.trainer import distill_trainer
from tests.helpers import (
    block_pairs,
    example_data_path,
    train_teacher,
    write_atomic_file,
    write_dataset,
    write_knowledge,
)

# isort: split
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.quick_start import run_recbole
from recbole.utils import get_model, get_trainer, init_seed

# RecBole's init_logger opens a file per run and closes none.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "use_gpu": False,
    "state": "ERROR",
    "show_progress": False,
    "seed": 2020,
    "epochs": 2,
    "train_batch_size": 128,
    "learning_rate": 0.02,
    "embedding_size": 4,
    "metrics": ["NDCG", "Recall"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "teacher_embedding_size": 16,
    "teacher_epochs": 4,
    "teacher_learning_rate": 0.02,
    "rce_top_k": 5,
    "rce_samples": 5,
    "rce_pool": 20,
    "ce_top_k": 5,
    "kd_diagnostic_users": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("quick_start"))


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def given(folder: Path, **settings: Any) -> dict[str, Any]:
    merged = {"data_path": str(folder), **SMALL, **settings}
    return {key: value for key, value in merged.items() if value != "nothing"}


def without_teacher_keys(**settings: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys((key for key in SMALL if key.startswith("teacher_")), "nothing"),
        **settings,
    }


def run(folder: Path, settings: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    arguments = {"model": "BPR", "dataset": "tiny", "teacher": "BPR", **arguments}
    return run_recbole_kd(config_dict=given(folder, **(settings or {})), **arguments)


def metrics(result: dict[str, Any]) -> list[tuple[str, int, dict[str, float]]]:
    return [(each["loss"], each["seed"], each["test_result"]) for each in result["runs"]]


def trainings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Which runs and teachers were trained, from the log."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", caplog.text)
    return re.findall(r"(?:Teacher: training \w+|\w+, seed \d+: training \w+)", text)


# --- what comes back, and what is written ---------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Two methods and two seeds, with files."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["run_recbole_kd.py", "--state=ERROR"])
        result = run(folder, kd_loss=["scratch", "rce"], seeds=[3, 4], output_dir=place / "out")
    return result, place


def test_the_result_has_recboles_keys_and_ours(finished: tuple[dict[str, Any], Path]) -> None:
    result, _ = finished
    assert set(result) == {
        *("best_valid_score", "valid_score_bigger", "best_valid_result", "test_result"),
        *("teacher", "runs", "summary"),
    }
    assert [(run["loss"], run["seed"]) for run in result["runs"]] == [
        *(("scratch", 3), ("rce", 3), ("scratch", 4), ("rce", 4)),
    ]
    first_of_last = result["runs"][1]
    for key in ("best_valid_score", "best_valid_result", "test_result"):
        assert result[key] == first_of_last[key]
    assert result["valid_score_bigger"] is True
    assert set(result["test_result"]) == {"ndcg@10", "recall@10"}
    for each in result["runs"]:
        assert each["best_valid_score"] == each["best_valid_result"]["ndcg@10"]
        assert each["epochs"] == 2
        assert 0 < each["seconds_per_epoch"] * 2 <= each["seconds"] + 0.01
        assert each["parameters"] == (40 + 1 + 60 + 1) * 4
        assert each["ranking_ms_per_1000_users"] > 0
        assert each["checkpoint_bytes"] == (finished[1] / each["checkpoint"]).stat().st_size
    assert result["teacher"]["parameters"] == (40 + 1 + 60 + 1) * 16
    assert result["teacher"]["epochs"] == 4
    assert result["runs"][0]["test_result"] != result["runs"][1]["test_result"]
    assert result["runs"][0]["test_result"] != result["runs"][2]["test_result"]


def table(heading: str) -> dict[str, str]:
    """The keys of a table of docs/result.md with their meanings; a row may have several keys."""
    text = (ROOT / "docs" / "result.md").read_text(encoding="utf-8")
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [
        line.strip("| ").split(" | ", 1) for line in part.splitlines() if line.startswith("| `")
    ]
    return {key: meaning for names, meaning in rows for key in re.findall(r"`(\w+)`", names)}


def names_in(meaning: str) -> set[str]:
    return set(re.findall(r"[a-z0-9_]+", meaning))


def test_files_are_as_documented(finished: tuple[dict[str, Any], Path]) -> None:
    result, place = finished
    content = json.loads((place / "out" / "result.json").read_text(encoding="utf-8"))
    documented = table("`result.json`")
    assert set(content) == set(documented)
    assert {key: content[key] for key in ("teacher", "runs", "summary")} == {
        key: result[key] for key in ("teacher", "runs", "summary")
    }
    assert content["format"] == 1
    assert content["command"] == "run_recbole_kd.py --state=ERROR"
    assert content["date"].endswith("+00:00")
    assert (content["student"], content["metric"]) == ("BPR", "ndcg@10")
    assert set(content["dataset"]) == {"name", "users", "items", "training_interactions", "split"}
    assert (
        content["dataset"]["name"],
        content["dataset"]["users"],
        content["dataset"]["items"],
    ) == ("tiny", 40, 60)
    assert set(content["machine"]) == {
        *("python", "recbole", "torch", "numpy", "scipy", "processor", "cores", "threads", "gpu"),
    }
    for key in ("machine", "dataset", "teacher"):
        assert set(content[key]) <= names_in(documented[key]), key
    for row in content["summary"]:
        assert set(row) <= names_in(documented["summary"])
        assert set(row) == {
            *("loss", "seeds", "test", "std", "transfer_ratio", "best_other", "p_value", "epochs"),
            *(
                "seconds_per_epoch",
                "seconds",
                "parameters",
                "checkpoint_bytes",
                "ranking_ms_per_1000_users",
            ),
        }
    # The keys that the description of the teacher names are in the result.
    assert {word for word in names_in(documented["teacher"]) if "_" in word} <= set(
        content["teacher"]
    )
    runs = table("`runs[i]` and `run.json`")
    for each in content["runs"]:
        assert set(each) == set(runs)
        settings = set(each["settings"])
        assert {
            "learning_rate",
            "weight_decay",
            "train_batch_size",
            "epochs",
            "stopping_step",
        } <= settings
        assert ("rce_beta" in settings) == ("kd_schedule" in settings) == (each["loss"] == "rce")
        written = place / "out" / f"{each['loss']}-seed{each['seed']}" / "run.json"
        assert json.loads(written.read_text(encoding="utf-8")) == each
    assert not list(place.rglob("*.partial"))


def test_history_is_as_documented(finished: tuple[dict[str, Any], Path]) -> None:
    text = (ROOT / "docs" / "result.md").read_text(encoding="utf-8").split("## `history.csv`")[1]
    documented = set(re.findall(r"`([\w@]+)`", text)) | {"valid_ndcg@10", "valid_recall@10"}
    documented -= {"sampling_temperature"}  # with rce_sampling_temperature: auto
    headers = {}
    for name in ("scratch", "rce"):
        with (finished[1] / "out" / f"{name}-seed3" / "history.csv").open(
            newline="", encoding="utf-8"
        ) as lines:
            reader = csv.DictReader(lines)
            assert [row["epoch"] for row in reader] == ["0", "1"]
            headers[name] = set(reader.fieldnames or [])
    assert headers["rce"] == documented
    taught = {
        "base_loss",
        "kd_loss",
        "gamma",
        "overlap@50",
        "ndcg@10_to_teacher",
        "refresh_seconds",
    }
    taught |= {"closure_gap", "closure_gap_unsampled", "blockers_covered"}
    assert headers["scratch"] == documented - taught


def test_the_summary_is_the_table(finished: tuple[dict[str, Any], Path]) -> None:
    result, place = finished
    lines = (place / "out" / "summary.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "teacher BPR",
        "student alone",
        "student, rce",
    ]
    alone = result["summary"][0]
    assert f"{alone['test']['ndcg@10']:.4f} ± {alone['std']['ndcg@10']:.4f}" in lines[3]


# --- numbers of the summary -----------------------------------------------------------------------


def report(scores: dict[str, list[float]], teacher: float | None = 0.5) -> Report:
    """A Report of invented runs: the scores of each method, one per seed."""
    config = {
        "valid_metric": "NDCG@10",
        "dataset": "tiny",
        "model": "BPR",
        "valid_metric_bigger": True,
    }
    made = Report(config, None, "split", dataset=None)
    for loss, values in scores.items():
        for seed, value in enumerate(values):
            result = {"ndcg@10": value, "recall@10": 2 * value}
            made.add(
                RunResult(
                    loss, seed, {}, value, result, result, 5 + seed, 10.0, 2.0, 7, "", 0, 1.0, "f"
                )
            )
    if teacher is not None:
        both = {"ndcg@10": teacher, "recall@10": 0.9}
        made.teacher = TeacherResult("BPR", "t.pth", "f", both, both, 70, 9, 1.0)
    return made


def test_transfer_ratio_deviation_and_means_by_hand() -> None:
    made = report({"scratch": [0.1, 0.3], "rce": [0.4, 0.4], "ce": [0.1, 0.2]})
    alone, rce, ce = made.summary()
    assert [row["loss"] for row in (alone, rce, ce)] == ["scratch", "rce", "ce"]
    assert alone["transfer_ratio"] is None
    assert rce["transfer_ratio"] == pytest.approx((0.4 - 0.2) / (0.5 - 0.2))
    assert ce["transfer_ratio"] == pytest.approx((0.15 - 0.2) / (0.5 - 0.2))
    # The deviation of a sample, divided by n − 1 = 1
    assert alone["std"]["ndcg@10"] == pytest.approx((2 * 0.1**2) ** 0.5)
    assert alone["test"] == pytest.approx({"ndcg@10": 0.2, "recall@10": 0.4})
    assert (alone["epochs"], alone["seconds"], alone["seeds"]) == (5.5, 10.0, [0, 1])
    assert (alone["best_other"], rce["best_other"], ce["best_other"]) == ("rce", "scratch", "rce")


def test_p_value_is_that_of_a_two_sided_paired_test() -> None:
    mine, theirs = [0.31, 0.36, 0.33, 0.35], [0.30, 0.32, 0.31, 0.30]
    made = report({"scratch": [0.1, 0.1, 0.1, 0.1], "ce": theirs, "rce": mine})
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    t = statistics.fmean(differences) / (statistics.stdev(differences) / 4**0.5)
    # Student's t with 3 degrees of freedom has this distribution function in closed form.
    x = t / 3**0.5
    above = 0.5 - (np.arctan(x) + x / (1 + x * x)) / np.pi
    rows = {row["loss"]: row for row in made.summary()}
    assert rows["rce"]["best_other"] == "ce"
    assert rows["rce"]["p_value"] == pytest.approx(2 * above)
    assert rows["ce"]["best_other"] == "rce"
    assert rows["ce"]["p_value"] == pytest.approx(2 * above)
    assert rows["rce"]["p_value"] == pytest.approx(scipy.stats.ttest_rel(mine, theirs).pvalue)


@pytest.mark.parametrize(
    "scores",
    [
        {"rce": [0.1, 0.2]},  # nothing to compare with
        {"rce": [0.1], "ce": [0.2]},  # one seed
        {"rce": [0.1, 0.2], "ce": [0.1, 0.2]},  # no spread
    ],
)
def test_no_p_value(scores: dict[str, list[float]]) -> None:
    assert all(row["p_value"] is None for row in report(scores).summary())


def test_no_transfer_ratio() -> None:
    for made in (
        report({"rce": [0.1]}),
        report({"scratch": [0.1], "rce": [0.2]}, teacher=None),
        report({"scratch": [0.5], "rce": [0.2]}, teacher=0.5),  # no gap to close
    ):
        assert all(row["transfer_ratio"] is None for row in made.summary())


def test_the_table_shows_all(caplog: pytest.LogCaptureFixture) -> None:
    made = report({"scratch": [0.1, 0.3], "rce": [0.4, 0.42]})
    with caplog.at_level(logging.INFO):
        made.show()
    assert "teacher BPR" in caplog.text
    assert re.search(r"student, rce.*0\.4100 ± 0\.0141.*70%", caplog.text)
    assert "tiny, BPR, test results, 2 seeds" in caplog.text
    assert report({}).table() == ""


# --- the teacher ----------------------------------------------------------------------------------


def test_a_teacher_by_name_is_trained_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        first = run(folder)
        assert trainings(caplog) == ["Teacher: training BPR", "rce, seed 2020: training BPR"]
        caplog.clear()
        second = run(folder)
        assert trainings(caplog) == ["rce, seed 2020: training BPR"]
        assert "BPR trained before, from [saved/teacher-BPR-tiny-" in caplog.text
    assert metrics(first) == metrics(second)
    assert first["teacher"]["fingerprint"] == second["teacher"]["fingerprint"]
    assert (second["teacher"]["epochs"], second["teacher"]["seconds"]) == (
        4,
        first["teacher"]["seconds"],
    )
    with caplog.at_level(logging.INFO):
        caplog.clear()
        run(folder, {"teacher_embedding_size": 12})
        assert trainings(caplog)[0] == "Teacher: training BPR"


def test_an_interrupted_teacher_is_not_taken_for_a_finished_one(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(folder)
    (checkpoint,) = (tmp_path / "saved").glob("teacher-BPR-tiny-*.pth")
    checkpoint.unlink()  # as if the command had been stopped before its last step
    with caplog.at_level(logging.INFO):
        run(folder)
    assert trainings(caplog)[0] == "Teacher: training BPR"


def test_a_teacher_by_path(folder: Path, tmp_path: Path) -> None:
    file = train_teacher(folder, "BPR", embedding_size=16)
    result = run(folder, without_teacher_keys(), teacher=file)
    assert result["teacher"]["checkpoint"] == str(file)
    assert (result["teacher"]["epochs"], result["teacher"]["seconds"]) == (0, 0.0)
    assert not list((tmp_path / "saved").glob("teacher-*"))
    with pytest.raises(
        SettingsError,
        match=r"\[teacher_embedding_size\] has no effect: the teacher in .* is trained",
    ):
        run(folder, without_teacher_keys(teacher_embedding_size=16), teacher=file)
    with pytest.raises(TeacherError, match="learned from other interactions"):
        run(folder, without_teacher_keys(seed=2021), teacher=file)


def test_another_model_teaches(folder: Path) -> None:
    settings = {"teacher_n_layers": 1, "kd_loss": "ce"}
    result = run(folder, settings, model="NeuMF", teacher="LightGCN", kd_loss="ce")
    assert result["teacher"]["model"] == "LightGCN"
    assert [each["loss"] for each in result["runs"]] == ["ce"]


# --- what is refused, before data are read --------------------------------------------------------


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr("recbole_rcekd.experiment.create_dataset", fail)


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"rce_betta": 1.0}, {}, r"\[rce_betta\].*\[rce_beta\]"),
        ({"ce_top_k": 0}, {"kd_loss": "scratch,rce,ce"}, r"\[ce_top_k\] is 0"),
        ({"rce_pool": 4}, {}, r"\[rce_top_k\]=5 is larger than \[rce_pool\]=4"),
        ({}, {"kd_loss": "rce,rec"}, r"\[kd_loss\] names 'rec'"),
        ({}, {"kd_loss": ["rce", "rce"]}, "name each method once"),
        ({}, {"teacher": None}, r"\[teacher\] is missing: give a model name"),
        (
            {},
            {"teacher": "BRP"},
            r"\[teacher\] is 'BRP', which is neither a RecBole model .written as in BPR, LightGCN. "
            r"nor a file",
        ),
        ({}, {"teacher": "saved/BPR.pth"}, r"\[teacher_\w+\] has no effect"),
        ({"teacher_embedding_sice": 8}, {}, r"\[teacher_embedding_sice\].*\[embedding_size\]"),
        ({"teacher_seed": 8}, {}, r"\[teacher_seed\] has no effect"),
        ({}, {"seeds": [0, 1, 0]}, "name each seed once"),
        ({}, {"seeds": []}, "whole numbers"),
        ({}, {"seeds": [0.5]}, "whole numbers"),
        ({}, {"seeds": [True]}, "whole numbers"),
        ({"seeds": "a,b"}, {}, r"\[seeds\] is 'a,b', but must be whole numbers"),
    ],
)
def test_settings_are_refused_before_data_are_read(
    folder: Path, settings: dict[str, Any], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        run(folder, settings, **arguments)


@pytest.mark.usefixtures("no_data")
def test_a_sequential_teacher_in_random_order_is_refused_before_it_is_trained(
    folder: Path, tmp_path: Path
) -> None:
    settings = without_teacher_keys(load_col={"inter": ["user_id", "item_id", "timestamp"]})
    with pytest.raises(
        SettingsError,
        match=r"SASRec learns sequences, but \[eval_args\] has order 'RO'.* set order: TO",
    ):
        run(folder, settings, teacher="SASRec")
    assert not list(tmp_path.rglob("*.pth"))


def test_lists_longer_than_the_catalogue_are_refused_before_a_teacher_is_trained(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        SettingsError, match=r"\[rce_pool\]=61 needs a catalogue of at least 61 items, .* has 60"
    ):
        run(folder, {"rce_pool": 61}, kd_loss="scratch,rce")
    assert not list(tmp_path.rglob("*.pth"))


# --- seeds and methods ----------------------------------------------------------------------------


def test_seeds_repeat_on_one_split_with_other_initialisations(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[list[int]], float, int]] = []

    def watch(config: Any) -> Any:
        class Watching(distill_trainer(config)):  # type: ignore[misc]
            def fit(self, train_data: Any, valid_data: Any, **kwargs: Any) -> Any:
                users = [
                    valid_data._dataset.inter_feat[field].tolist()
                    for field in ("user_id", "item_id")
                ]
                hash_of = split_hash(train_data._dataset)
                weights = float(self.model.user_embedding.weight.sum())
                seen.append((hash_of, users, weights, self.seed))
                return super().fit(train_data, valid_data, **kwargs)

        return Watching

    monkeypatch.setattr("recbole_rcekd.experiment.distill_trainer", watch)
    result = run(folder, {"epochs": 1}, seeds="0,1,2")
    assert [each["seed"] for each in result["runs"]] == [0, 1, 2]
    hashes, evaluated, weights, seeds = zip(*seen, strict=True)
    assert len(set(hashes)) == 1
    assert evaluated[0] == evaluated[1] == evaluated[2]
    assert len(set(weights)) == 3
    assert seeds == (0, 1, 2)


def test_a_teacher_is_trained_on_the_students_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes: list[str] = []

    def watch(config: Any) -> Any:
        class Watching(recording_trainer(config)):  # type: ignore[misc]
            def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> Any:
                hashes.append(split_hash(train_data._dataset))
                return super().fit(train_data, *args, **kwargs)

        return Watching

    for module in ("experiment", "training.train_teacher"):
        monkeypatch.setattr(f"recbole_rcekd.{module}.recording_trainer", watch)
    run(folder, {"seed": 5, "epochs": 1}, kd_loss="scratch", seeds=[1])
    run(folder, {"seed": 6, "epochs": 1}, kd_loss="scratch", seeds=[1])
    teacher, student, other_teacher, other_student = hashes
    assert teacher == student
    assert other_teacher == other_student
    assert teacher != other_teacher  # the seed is part of the split


def test_a_run_does_not_depend_on_those_before_it(folder: Path) -> None:
    together = run(folder, kd_loss="scratch,ce,rce", seeds=[7, 8])
    for loss in ("scratch", "rce"):
        alone = run(folder, kd_loss=loss, seeds=[8])
        assert metrics(alone) == [each for each in metrics(together) if each[:2] == (loss, 8)]


def test_keys_for_one_method(folder: Path) -> None:
    settings = {"scratch_epochs": 1, "ce_learning_rate": 0.5, "rce_weight_decay": 0.25}
    used = {
        each["loss"]: each["settings"]
        for each in run(folder, settings, kd_loss="scratch,ce,rce")["runs"]
    }
    assert [used[name]["epochs"] for name in ("scratch", "ce", "rce")] == [1, 2, 2]
    assert [used[name]["learning_rate"] for name in ("scratch", "ce", "rce")] == [0.02, 0.5, 0.02]
    assert [used[name]["weight_decay"] for name in ("scratch", "ce", "rce")] == [0.0, 0.0, 0.25]


def test_without_a_teacher_only_the_student_alone(folder: Path) -> None:
    result = run(folder, without_teacher_keys(), teacher=None, kd_loss="scratch")
    assert result["teacher"] is None
    assert result["summary"][0]["transfer_ratio"] is None


def test_a_control_learns_without_a_teacher_and_the_same_beside_one(folder: Path) -> None:
    alone = run(
        folder, without_teacher_keys(epochs=4), teacher=None, kd_loss="softmax", output_dir="out"
    )
    assert alone["teacher"] is None
    with Path("out/softmax-seed2020/history.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["kd_loss"]) for row in rows]
    assert losses[0] == pytest.approx(math.log(60), abs=0.05)  # an untrained student of 60 items
    assert losses[-1] < losses[0] - 0.03
    assert [float(row["base_loss"]) for row in rows] == [0.0] * 4
    together = run(folder, {"epochs": 4}, kd_loss="scratch,softmax", output_dir="other")
    assert [row["loss"] for row in together["summary"]] == ["scratch", "softmax"]
    assert together["summary"][1]["transfer_ratio"] is not None
    assert metrics(together)[1] == metrics(alone)[0]
    assert metrics(together)[0][2] != metrics(alone)[0][2]
    assert together["runs"][1]["fingerprint"] == alone["runs"][0]["fingerprint"]


def test_nothing_is_kept_with_saved_false(folder: Path, tmp_path: Path) -> None:
    result = run(folder, saved=False)
    assert [path.name[:8] for path in (tmp_path / "saved").glob("*.pth")] == ["teacher-"]
    assert (result["runs"][0]["checkpoint"], result["runs"][0]["checkpoint_bytes"]) == ("", 0)


# --- going on -------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A copy of the finished command's folders, to be changed."""
    for name in ("out", "saved"):
        shutil.copytree(finished[1] / name, tmp_path / name, dirs_exist_ok=True)
    return finished[0], tmp_path


def test_finished_runs_are_taken_over(
    folder: Path, copied: tuple[dict[str, Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        again = run(folder, kd_loss="scratch,rce", seeds=[3, 4, 5], output_dir="out")
        assert trainings(caplog) == ["scratch, seed 5: training BPR", "rce, seed 5: training BPR"]
        assert "rce, seed 4: finished before" in re.sub(r"\x1b\[[0-9;]*m", "", caplog.text)
        assert again["runs"][:4] == copied[0]["runs"]
        caplog.clear()
        # This setting does not concern the other method.
        run(folder, {"rce_beta": 1.0}, kd_loss="scratch,rce", seeds=[3], output_dir="out")
        assert trainings(caplog) == ["rce, seed 3: training BPR"]
        caplog.clear()
        run(folder, {"teacher_epochs": 1}, kd_loss="scratch,rce", seeds=[4], output_dir="out")
        assert trainings(caplog) == ["Teacher: training BPR", "rce, seed 4: training BPR"]
        caplog.clear()
        run(folder, {"learning_rate": 0.01}, kd_loss="scratch", seeds=[4], output_dir="out")
        assert trainings(caplog)[-1] == "scratch, seed 4: training BPR"


@pytest.mark.parametrize("damage", ["half a file", "a key is missing", "the checkpoint is gone"])
def test_a_run_that_is_not_whole_is_trained_again(
    folder: Path, copied: tuple[dict[str, Any], Path], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file = copied[1] / "out" / "rce-seed3" / "run.json"
    text = file.read_text(encoding="utf-8")
    content = json.loads(text)
    if damage == "half a file":
        file.write_text(text[: len(text) // 2], encoding="utf-8")
    elif damage == "a key is missing":
        file.write_text(
            json.dumps({key: content[key] for key in content if key != "epochs"}), encoding="utf-8"
        )
    else:
        (copied[1] / content["checkpoint"]).unlink()
    with caplog.at_level(logging.INFO):
        again = run(folder, kd_loss="scratch,rce", seeds=[3], output_dir="out")
    assert trainings(caplog) == ["rce, seed 3: training BPR"]
    assert metrics(again) == metrics(copied[0])[:2]


def test_a_stopped_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(config: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("recbole_rcekd.experiment.distill_trainer", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder, kd_loss="scratch,rce", output_dir="out")
    content = json.loads(Path("out/result.json").read_text(encoding="utf-8"))
    assert [each["loss"] for each in content["runs"]] == ["scratch"]
    monkeypatch.setattr("recbole_rcekd.experiment.distill_trainer", distill_trainer)
    with caplog.at_level(logging.INFO):
        run(folder, kd_loss="scratch,rce", output_dir="out")
    assert trainings(caplog) == ["rce, seed 2020: training BPR"]
    content = json.loads(Path("out/result.json").read_text(encoding="utf-8"))
    assert [each["loss"] for each in content["runs"]] == ["scratch", "rce"]


# --- equal to RecBole -----------------------------------------------------------------------------


def test_the_student_alone_is_recboles_own_run_on_ml_100k() -> None:
    settings = given(example_data_path(), **without_teacher_keys(epochs=2, train_batch_size=2048))
    own = {
        key: value for key, value in settings.items() if not key.startswith(("rce_", "ce_", "kd_"))
    }
    plain = run_recbole("BPR", "ml-100k", config_dict={**own, "eval_batch_size": 2**20})
    ours = run_recbole_kd("BPR", "ml-100k", config_dict=settings, kd_loss="scratch")
    for key in ("best_valid_score", "best_valid_result", "test_result"):
        assert ours[key] == plain[key]
    assert ours["test_result"]["ndcg@10"] > 0


def test_distillation_on_ml_100k_with_a_teacher_of_another_kind() -> None:
    settings = given(
        example_data_path(), epochs=2, teacher_epochs=1, train_batch_size=2048, teacher_n_layers=1
    )
    result = run_recbole_kd(
        "BPR", "ml-100k", config_dict=settings, teacher="LightGCN", kd_loss="rce"
    )
    (only,) = result["runs"]
    assert only["test_result"]["ndcg@10"] > 0
    assert result["teacher"]["test_result"]["ndcg@10"] > 0


PLAIN = """
import json, sys
import numpy as np, torch
kinds = {"float": float, "int": int, "bool": bool, "object": object, "str": str, "complex": complex}
for name, value in kinds.items():
    setattr(np, name, value)
load = torch.load
torch.load = lambda *args, **kwargs: load(*args, **{"weights_only": False, **kwargs})
from recbole.quick_start import load_data_and_model
from recbole.trainer import Trainer
config, model, dataset, train, valid, test = load_data_and_model(sys.argv.pop(1))
result = Trainer(config, model).evaluate(test, load_best_model=False)
assert "recbole_rcekd" not in sys.modules
print(json.dumps([type(config).__module__, type(model).__module__, dict(result)], default=float))
"""


def plain_python(place: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=300, check=False
    )


def test_plain_recbole_opens_the_checkpoint(finished: tuple[dict[str, Any], Path]) -> None:
    """In a process that never imports this package."""
    result, place = finished
    checkpoint = result["runs"][1]["checkpoint"]
    done = plain_python(place, PLAIN, str(place / checkpoint))
    if done.returncode != 0 and int(np.__version__.split(".")[0]) >= 2:
        # RecBole 1.2.1 itself does not start with numpy 2. If it starts, it must open the file.
        probe = plain_python(place, "import recbole.quick_start, numpy; numpy.float_")
        assert probe.returncode != 0, done.stderr
        pytest.skip(
            f"plain RecBole does not start on this stack: {probe.stderr.strip().splitlines()[-1]}"
        )
    assert done.returncode == 0, done.stderr
    config_module, model_module, test = json.loads(done.stdout.strip().splitlines()[-1])
    assert config_module == "recbole.config.configurator"
    assert model_module == "recbole.model.general_recommender.bpr"
    assert test == result["runs"][1]["test_result"]


# --- the command line -----------------------------------------------------------------------------


def words(folder: Path, *more: str) -> list[str]:
    given_here = given(folder)
    keys = [f"--{key}={value}" for key, value in given_here.items() if key != "data_path"]
    return ["-m", "BPR", "-d", "tiny", f"--data_path={folder}", *keys, *more]


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ["x", "--leave=me"]
    monkeypatch.setattr(sys, "argv", before)
    assert (
        main(
            words(folder, "-t", "BPR", "-l", "scratch,rce", "--seeds", "3,4", "--output_dir", "out")
        )
        == 0
    )
    content = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert [(each["loss"], each["seed"]) for each in content["runs"]] == [
        *(("scratch", 3), ("rce", 3), ("scratch", 4), ("rce", 4)),
    ]
    assert content["runs"][0]["parameters"] == 102 * 4  # by --embedding_size=4
    assert content["teacher"]["parameters"] == 102 * 16
    assert "--embedding_size=4" in content["command"]
    assert sys.argv is before


def test_the_command_with_equal_signs_gives_the_same(
    folder: Path, tmp_path: Path, finished: tuple[dict[str, Any], Path]
) -> None:
    options = ("--teacher=BPR", "--kd_loss=scratch,rce", "--seeds=3", "--output_dir=out")
    assert main(words(folder, *options)) == 0
    content = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert metrics(content) == metrics(finished[0])[:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--teacher=BPR", "--rce_betta=1"],
            "error: [rce_betta] is not a setting of distillation. Did you mean",
        ),
        (["--kd_loss=rce"], "error: [teacher] is missing: give a model name (--teacher=BPR)"),
        (["--teacher=BPR", "--seeds=1,x"], "error: [seeds] is '1,x', but must be whole numbers"),
        (["--teacher=BPR", "--seeds", "1,x"], "error: [seeds] is '1,x', but must be whole numbers"),
        (["--teacher=BPR", "--seeds=1.5"], "error: [seeds] is 1.5, but must be whole numbers"),
        (["--teacher=BPR", "--seeds="], "error: [seeds] is '', but must be whole numbers"),
        (["--teacher=BPR", "--kd_loss=rec"], "error: [kd_loss] names 'rec'"),
    ],
)
def test_what_the_command_refuses(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(folder, *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_checkpoint_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        word
        for word in words(folder, "--teacher=saved/nothing.pth")
        if not word.startswith("--teacher_")
    ]
    assert main(options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "saved/nothing.pth" in line


def test_ctrl_c_of_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(**arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recbole_rcekd.cli.distil.run_recbole_kd", stop)
    assert main(["--model=BPR"]) == 130
    assert (
        "with --output_dir, the same command would not repeat what is finished"
        in capsys.readouterr().err
    )
    assert main(["--model=BPR", "--output_dir=out"]) == 130
    assert "the same command goes on with what is not finished" in capsys.readouterr().err


def test_without_arguments_the_shipped_example_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "recbole_rcekd.cli.distil.run_recbole_kd", lambda **arguments: asked.append(arguments)
    )
    assert main([]) == 0
    assert main(["-m", "BPR"]) == 0
    assert main(["--config_files", "a.yaml b.yaml"]) == 0
    assert [[Path(file).name for file in each["config_file_list"] or []] for each in asked] == [
        ["quick_start.yaml"],
        [],
        ["a.yaml", "b.yaml"],
    ]


def test_errors_of_ours_are_kd_errors() -> None:
    assert all(issubclass(error, KDError) for error in (SettingsError, TeacherError, ScoringError))


def test_two_commands_at_once_do_not_disturb_each_other(folder: Path, tmp_path: Path) -> None:
    """With the same second, folder and teacher, both finish with the same numbers and own files."""
    code = "import sys; from recbole_rcekd.cli import main; sys.exit(main())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words(folder, "--teacher=BPR", f"--output_dir={name}")],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    one, two = (
        json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8"))
        for name in ("one", "two")
    )
    assert metrics(one) == metrics(two)
    assert one["runs"][0]["checkpoint"] != two["runs"][0]["checkpoint"]
    for each in (one, two):
        assert torch.load(tmp_path / each["runs"][0]["checkpoint"], weights_only=False)[
            "state_dict"
        ]


# --- models with loaders, trainers or losses of their own -----------------------------------------

_KNOWLEDGE = {
    "load_col": {
        "inter": ["user_id", "item_id"],
        "kg": ["head_id", "relation_id", "tail_id"],
        "link": ["item_id", "entity_id"],
    }
}


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_dataset(tmp_path_factory.mktemp("knowledge"))
    write_knowledge(place)
    return place


@pytest.mark.parametrize("model", ["CKE", "CFKG", "KTUP", "KGCN", "MKR"])
def test_knowledge_aware_models_learn_from_their_like(knowledge: Path, model: str) -> None:
    settings = {**without_teacher_keys(), **_KNOWLEDGE, "teacher_epochs": 2}
    result = run(knowledge, settings, model=model, teacher=model, kd_loss="rce", output_dir="out")
    with Path("out/rce-seed2020/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["kd_loss"]) > 0 for row in rows] == [True, True]
    assert result["test_result"].keys() == {"ndcg@10", "recall@10"}


@pytest.mark.parametrize(
    "model", ["NeuMF", "MultiDAE", "RecVAE", "SGL", "DiffRec", "GCMC", "SimpleX"]
)
def test_students_of_every_kind_learn_from_a_factor_model(folder: Path, model: str) -> None:
    autoencoder = model in ("MultiDAE", "RecVAE", "DiffRec")
    settings = {"train_neg_sample_args": None} if autoencoder else {}
    result = run(folder, settings, model=model, kd_loss="rce", output_dir="out")
    with Path("out/rce-seed2020/history.csv").open() as file:
        assert all(float(row["kd_loss"]) > 0 for row in csv.DictReader(file))
    assert 0 <= result["test_result"]["ndcg@10"] <= 1


def test_a_misspelt_or_untrainable_student_is_refused_before_data_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "recbole_rcekd.experiment.create_dataset", lambda config: pytest.fail("data were read")
    )
    with pytest.raises(SettingsError, match=r"\[model\] names no RecBole model: 'BRP'"):
        run(folder, model="BRP")
    with pytest.raises(SettingsError, match=r"EASE is not trained by gradient"):
        run(folder, model="EASE")


# --- how it is evaluated, and what is found again -------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    ["full", "uni20", "labeled", "rows"],
    ids=["all items", "sampled items", "labels", "rows of sequences"],
)
def test_a_teacher_is_evaluated_as_students_are(folder: Path, mode: str) -> None:
    """A student with its teacher's weights has its teacher's results, by any metric."""
    settings: dict[str, Any] = {
        "embedding_size": 4,
        "teacher_embedding_size": 4,
        "teacher_epochs": 2,
    }
    model = "BPR"
    if mode == "rows":
        model = "GRU4Rec"
        settings |= {
            "loss_type": "CE",
            "train_neg_sample_args": None,
            "hidden_size": 8,
            "num_layers": 1,
        }
        settings |= {
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "teacher_hidden_size": 8,
        }
        settings |= {
            "MAX_ITEM_LIST_LENGTH": 5,
            "dropout_prob": 0.0,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni20"},
        }
    elif mode == "labeled":
        settings |= {
            "metrics": ["AUC", "LogLoss"],
            "valid_metric": "AUC",
            "load_col": {"inter": ["user_id", "item_id", "rating"]},
        }
        settings |= {
            "threshold": {"rating": 4},
            "eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}, "mode": "labeled"},
        }
    else:
        settings |= {"metrics": ["NDCG", "ItemCoverage", "AveragePopularity"]}
        settings |= {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "mode": mode}}
    result = run(folder, settings, model=model, teacher=model, kd_loss="scratch", seeds=[2020])
    found = result["teacher"]["test_result"]
    assert set(found) == set(result["test_result"])
    state = torch.load(result["teacher"]["checkpoint"], weights_only=False)
    config = state["config"]
    config["train_neg_sample_args"] = config["train_neg_sample_args"] or {"distribution": "none"}
    dataset = create_dataset(config)
    init_seed(config["seed"], config["reproducibility"])
    train, _, test = data_preparation(config, dataset)
    student = get_model(model)(config, train._dataset)
    student.load_state_dict(state["state_dict"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, student)
    trainer.eval_collector.data_collect(train)
    expected = trainer.evaluate(test, load_best_model=False)
    assert found == pytest.approx(
        dict(expected), abs=0.1 if "uni" in str(config["eval_args"]["mode"]) else 2e-4
    )


def test_of_sampled_items_whoever_is_asked_often_is_scored_once() -> None:
    table = torch.arange(24.0).view(4, 6)

    class Asked:
        calls: ClassVar[list[list[int]]] = []

        def score_rows(self, rows: Any) -> Tensor:
            self.calls.append(rows["user_id"].tolist())
            return table[rows["user_id"]]

    config = {
        "device": torch.device("cpu"),
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
    }
    users, items = torch.tensor([3, 1, 3, 2, 1, 3]), torch.tensor([1, 2, 5, 4, 3, 0])
    found = TeacherAsModel(Asked(), config).predict(
        Interaction({"user_id": users, "item_id": items})
    )
    assert torch.equal(found, table[users, items])
    assert sorted(user for call in Asked.calls for user in call) == [1, 2, 3]


def test_a_loader_that_recbole_saves(folder: Path) -> None:
    """Saving removes the generator; the draws must be those of a run that saves nothing."""
    plain = run(folder, kd_loss="rce", seeds=[1])
    assert metrics(run(folder, {"save_dataloaders": True}, kd_loss="rce", seeds=[1])) == metrics(
        plain
    )


def test_loaders_of_another_split_are_refused(folder: Path) -> None:
    settings: dict[str, Any] = {
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "hidden_size": 4,
        "epochs": 1,
    }
    settings |= {
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"order": "TO"},
    }
    settings = without_teacher_keys(**settings)
    run(
        folder,
        {**settings, "save_dataloaders": True},
        model="GRU4Rec",
        teacher=None,
        kd_loss="scratch",
    )
    with pytest.raises(
        SettingsError,
        match=r"\[kd_sequence_split\]: the data loaders that RecBole kept in \[saved\]",
    ):
        run(
            folder,
            {**settings, "kd_sequence_split": "interactions"},
            model="GRU4Rec",
            teacher=None,
            kd_loss="scratch",
        )


def test_other_test_data_are_another_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = block_pairs()
    for part, rows in (("train", pairs[::2]), ("valid", pairs[1::4]), ("test", pairs[3::4])):
        write_atomic_file(
            tmp_path / "tiny" / f"tiny.{part}.inter", ["user_id:token", "item_id:token"], rows
        )
    ready = {"benchmark_filename": ["train", "valid", "test"], "load_col": None}
    with caplog.at_level(logging.INFO):
        for rows in (pairs[3::4], pairs[3::8]):
            write_atomic_file(
                tmp_path / "tiny/tiny.test.inter", ["user_id:token", "item_id:token"], rows
            )
            run(tmp_path, ready, kd_loss="rce", output_dir="out")
            run(tmp_path, ready, kd_loss="rce", output_dir="out")
    assert trainings(caplog) == ["Teacher: training BPR", "rce, seed 2020: training BPR"] * 2


def test_facts_that_were_cut_off_are_made_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = Path(run(folder, kd_loss="scratch")["teacher"]["checkpoint"]).with_suffix(".json")
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:20])
    with caplog.at_level(logging.INFO):
        run(folder, kd_loss="scratch")
    assert "Teacher: training BPR" in trainings(caplog)
    assert json.loads(file.read_text())["epochs"] == whole["epochs"]


@pytest.mark.parametrize("metric", ["NDCG@20", "MRR@10", "AUC"])
def test_a_validated_metric_that_is_not_measured(folder: Path, metric: str) -> None:
    with pytest.raises(
        SettingsError,
        match=rf"\[valid_metric\] is {metric}, but what is measured are NDCG, Recall at 10",
    ):
        run(folder, {"valid_metric": metric})


def test_sampled_items_are_evaluated_in_recboles_batches(folder: Path) -> None:
    """For sampled items RecBole makes full rows of all users of a batch."""
    for mode, size in (
        ("full", 2**20),
        ("uni20", 4096),
        ({"valid": "uni20", "test": "full"}, 4096),
    ):
        config = command_config("BPR", "tiny", None, given(folder, eval_args={"mode": mode}), {})
        evaluate_more(config)
        assert config["eval_batch_size"] == size


def test_a_teacher_that_is_worse_has_nothing_to_hand_on() -> None:
    for bigger, teacher in ((True, 0.2), (False, 0.4)):
        made = report({"scratch": [0.3], "rce": [0.25]}, teacher=teacher)
        made.config["valid_metric_bigger"] = bigger
        assert all(row["transfer_ratio"] is None for row in made.summary())


def test_two_commands_in_one_folder(tmp_path: Path) -> None:
    """Each writes its whole history; none removes the other's."""
    one, other = (History(tmp_path / "history.csv") for _ in range(2))
    for number in range(3):
        for history in (one, other):
            history.begin(number)
    started, write = threading.Barrier(2), 30

    def many(history: History) -> None:
        started.wait()
        for number in range(write):
            history.note(kd_loss=float(number))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(many, (one, other)))
    assert [file.name for file in tmp_path.iterdir()] == ["history.csv"]


def test_all_packages_are_installed() -> None:
    """An editable install would also find packages that are missing in setup.cfg."""
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg", encoding="utf-8")
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.glob("recbole_rcekd/**/__init__.py")
    }
    assert {*listed["options"]["packages"].split()} == {*there, "recbole_rcekd.properties"}


# --- what a user gets wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher_trust=no"], "[teacher_trust] is 'no', but must be True or False."),
        (
            ["--seeds=0-3"],
            "[seeds] is -3, but seeds are from 0 to 2^32 − 1; several are written as 0,1,2.",
        ),
        (["--seed=1,2"], "[seed] is (1, 2), but must be one whole number; several are [seeds]."),
        (
            ["--config_files=missing.yaml"],
            "[config_files] names [missing.yaml], but there is no such file.",
        ),
        (
            ["--learning_rte=0.1"],
            "[learning_rte] is known neither to RecBole nor here. Did you mean [learning_rate]?",
        ),
        (
            ["--analyse_user=5"],
            "[analyse_user] is known neither to RecBole nor here. Did you mean [analyse_users]?",
        ),
        (["--teacher_model=LightGCN"], "[teacher_model] has no effect: [teacher] names the model"),
        (["--teacher_topk=0"], "RecBole cannot read the settings of the teacher BPR"),
        (["--topk=[0]"], "RecBole cannot read these settings"),
        (["--kd_loss=scratch+rce"], "[kd_loss] sums scratch with something"),
        (
            ["--output_dir=s.yaml"],
            "[output_dir] is 's.yaml', which is no folder and cannot be made one",
        ),
    ],
)
def test_one_sentence_for_each_mistake(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.yaml").write_text(yaml.safe_dump(given(folder)))
    loss = [] if any(word.startswith("--kd_loss") for word in words) else ["--kd_loss=rce"]
    files = (
        []
        if any(word.startswith("--config_files") for word in words)
        else ["--config_files=s.yaml"]
    )
    assert main(["--model=BPR", "--dataset=tiny", "--teacher=BPR", *loss, *files, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert not list(Path("saved").glob("*.pth"))


def test_a_word_that_is_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model=BPR", "--epochs", "1"])
    assert (
        "--epochs is not understood: write RecBole's keys, and ours, as --key=value"
        in capsys.readouterr().err
    )


def test_models_are_written_as_recbole_writes_them(folder: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"\[model\] is 'bpr', but RecBole's models are written as in BPR"
    ):
        run(folder, model="bpr")
    with pytest.raises(
        SettingsError, match=r"\[teacher\] is 'bpr', which is neither a RecBole model"
    ):
        run(folder, teacher="bpr")


def test_a_teacher_that_measures_no_ranking_by_default(folder: Path) -> None:
    """The student's settings decide what is validated.

    A context-aware student is validated with labels, which pairs of a user and an item lack.
    """
    settings: dict[str, Any] = {
        "threshold": {"rating": 4},
        "load_col": {"inter": ["user_id", "item_id", "rating"]},
    }
    result = run(folder, settings, teacher="DeepFM", kd_loss="scratch")
    assert set(result["teacher"]["test_result"]) == {"ndcg@10", "recall@10"}
    settings = dict.fromkeys(("metrics", "topk", "valid_metric"), "nothing")
    with pytest.raises(
        SettingsError, match=r"BPR is validated as the student is, on labels, but learns from pairs"
    ):
        run(folder, settings, model="DeepFM")


def test_a_sequential_student_needs_no_word_on_negatives(folder: Path) -> None:
    settings = without_teacher_keys(
        load_col={"inter": ["user_id", "item_id", "timestamp"]}, hidden_size=4
    )
    assert run(folder, settings, model="GRU4Rec", teacher=None, kd_loss="scratch")["test_result"]
    with pytest.raises(
        SettingsError, match=r"train_neg_sample_args .* should be None when the loss_type is CE"
    ):
        run(
            folder,
            {**settings, "train_neg_sample_args": {"distribution": "uniform"}},
            model="GRU4Rec",
        )


def test_another_device_is_the_same_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(folder, kd_loss="rce", output_dir="out")
    with caplog.at_level(logging.INFO):
        run(
            folder,
            {"gpu_id": "1", "worker": 0, "eval_batch_size": 300},
            kd_loss="rce",
            output_dir="out",
        )
    assert trainings(caplog) == []


def test_a_run_of_other_settings_is_put_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for beta in (5.0, 3.0, 1.0):
        run(folder, {"rce_beta": beta}, kd_loss="rce", output_dir="out")
    found = [
        json.loads(Path(f"out/rce-seed2020{end}/run.json").read_text()) for end in (".1", ".2", "")
    ]
    assert [each["settings"]["rce_beta"] for each in found] == [5.0, 3.0, 1.0]
    assert "it is kept as [out/rce-seed2020.1]" in caplog.text


def test_what_was_finished_is_shown_before_an_error(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(KDError, match="The training loss of ce, seed 2020, is no number any more"),
    ):
        run(folder, {"ce_learning_rate": 1e30}, kd_loss="rce,ce")
    assert "student, rce" in caplog.text


def test_a_teacher_of_other_data_than_those_of_the_training(folder: Path) -> None:
    """``load_teacher(path, dataset)`` instead of ``train_data`` would leak the test items."""
    config = command_config("BPR", "tiny", None, given(folder, kd_loss="rce", rce_epochs=1), {})
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    path = train_teacher(folder, eval_args=config["eval_args"])
    teacher = load_teacher(path, train)
    model = get_model("BPR")(config, train._dataset)
    trainer = distill_trainer(config)(config, model, teacher)
    assert trainer.epochs == 1  # rce_epochs
    trainer.fit(train, valid, show_progress=False)
    with pytest.raises(
        TeacherError, match="was loaded with other data than those of this training"
    ):
        distill_trainer(config)(config, model, load_teacher(path, valid)).fit(train, valid)
    with pytest.raises(SettingsError, match=r"open it with load_teacher\('t.pth', train_data\)"):
        distill_trainer(config)(config, model, "t.pth")  # type: ignore[arg-type]
    config["teacher_weights"] = [1, 0]
    both = load_teacher([path, path], train)
    assert isinstance(both, TeacherEnsemble)
    assert both.weights == [1.0, 0.0]
