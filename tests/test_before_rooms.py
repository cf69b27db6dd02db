"""Files written by commit dc35f00, before the package was split into folders, can still be read.

That commit made ``fixtures/before_rooms`` with commands on the tiny dataset of ``helpers.py``: a
BPR teacher, its stored scores, the student alone and with RCE-KD in ``out``, a search of two trials
in ``out/tuning``, and a sequential run with ``kd_sequence_split: interactions`` in ``seq``.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recbole_rcekd import load_teacher, run_recbole_kd
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.data.sequence_dataset import SequenceDataset, create_dataset
from recbole_rcekd.teachers.safe_load import read_checkpoint
from recbole_rcekd.tuning import tune_recbole_kd
from tests.helpers import build, build_config, write_dataset

FIXTURE = Path(__file__).parent / "fixtures" / "before_rooms"
COMMON: dict[str, Any] = {
    "data_path": "data",
    "checkpoint_dir": "saved",
    "use_gpu": False,
    "state": "INFO",
    "show_progress": False,
    "epochs": 2,
    "train_batch_size": 128,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "embedding_size": 4,
}
SETTINGS: dict[str, Any] = {
    **COMMON,
    "teacher_embedding_size": 8,
    "teacher_epochs": 3,
    "rce_pool": 30,
    "rce_samples": 10,
    "rce_top_k": 10,
    "ce_top_k": 10,
}
SEQUENCES: dict[str, Any] = {
    "kd_sequence_split": "interactions",
    "MAX_ITEM_LIST_LENGTH": 6,
    "hidden_size": 8,
    "num_layers": 1,
    "train_neg_sample_args": None,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "save_dataset": True,
    "eval_args": {
        "split": {"RS": [0.8, 0.1, 0.1]},
        "group_by": "user",
        "order": "TO",
        "mode": "full",
    },
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture, in which commands run."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    write_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder, except RecBole's logs."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not {"log", "log_tensorboard"} & set(file.relative_to(folder).parts)
    }


def test_finished_runs_teacher_and_scores_are_found_again(place: Path) -> None:
    before = contents(place / "saved")
    old = json.loads((place / "out" / "result.json").read_text(encoding="utf-8"))
    found = run_recbole_kd(
        "BPR",
        "tiny",
        config_dict=SETTINGS,
        teacher="BPR",
        kd_loss="scratch,rce",
        output_dir="out",
    )
    assert found["runs"] == old["runs"]
    assert contents(place / "saved") == before  # nothing was trained, nothing scored


def test_trials_are_found_again(place: Path) -> None:
    before = contents(place / "out" / "tuning" / "rce")
    old = json.loads((place / "out" / "tuning" / "tuning.json").read_text(encoding="utf-8"))
    found = tune_recbole_kd(
        2,
        "BPR",
        "tiny",
        config_dict=SETTINGS,
        teacher="BPR",
        kd_loss="rce",
        output_dir="out",
        params_file="rce.test",
    )
    assert found["rce"]["best"] == old["rce"]["best"]
    assert contents(place / "out" / "tuning" / "rce") == before


def test_the_best_settings_are_read(place: Path) -> None:
    file = FIXTURE / "out" / "tuning" / "best.yaml"
    best = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = run_recbole_kd(
        "BPR",
        "tiny",
        config_file_list=[str(file)],
        config_dict=SETTINGS,
        teacher="BPR",
        kd_loss="rce",
    )
    (run,) = found["runs"]
    assert best.items() <= run["settings"].items()


def test_cached_scores_are_those_of_the_teacher(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = build(place / "data", **{**COMMON, "data_path": str(place / "data")})
    (file,) = (place / "saved").glob("teacher-*.pth")
    teacher = load_teacher(file, bundle.train)
    with caplog.at_level(logging.INFO):
        scores = teacher.open_scores(KDSettings(kd_cache_dir="saved/teacher_scores"))
    assert "two tables, from [saved/teacher_scores/" in caplog.text
    users = torch.arange(1, teacher.n_contexts)
    torch.testing.assert_close(scores.score_all(users), teacher.score_all(users))


@pytest.mark.parametrize("name", ["BPR-rce", "BPR-scratch", "GRU4Rec-scratch", "teacher-BPR"])
def test_checkpoints_are_read(name: str) -> None:
    (file,) = (FIXTURE / "saved").glob(f"{name}-*.pth")
    assert {"config", "state_dict", "epoch"} <= read_checkpoint(file).keys()


def test_a_saved_dataset_of_interactions_is_found(place: Path) -> None:
    config = build_config(place / "data", "GRU4Rec", **{**COMMON, **SEQUENCES})
    dataset = create_dataset(config)
    assert type(dataset) is SequenceDataset
    fresh = SequenceDataset(config)
    for one, other in zip(dataset.build(), fresh.build(), strict=True):
        for column in one.inter_feat:
            assert torch.equal(one.inter_feat[column], other.inter_feat[column])
