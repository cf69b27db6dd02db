"""The search for settings: RecBole's HyperTuning with our objective, on small data."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_rcekd import experiment, tuning
from recbole_rcekd.cli import main
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import read_settings
from recbole_rcekd.losses import LOSSES
from recbole_rcekd.training import train_teacher as teacher_training
from recbole_rcekd.tuning import Objective, tune_recbole_kd
from tests.helpers import write_dataset
from tests.test_quick_start import given

# isort: split
from recbole.trainer import HyperTuning

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
hyperopt = pytest.importorskip("hyperopt")
HYPER = Path(__file__).parents[1] / "properties" / "hyper"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Method and λ of each student that is trained."""
    seen: list[tuple[str, float]] = []
    trainer = experiment.Experiment.trainer

    def noted(self: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((run.name, run.config["rce_weight"] if run.name == "rce" else 0.0))
        return trainer(self, run, *args, **kwargs)

    monkeypatch.setattr(experiment.Experiment, "trainer", noted)
    return seen


def ranges(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model": "BPR",
        "dataset": "tiny",
        "teacher": "BPR",
        "config_dict": given(folder, **settings),
    }


def test_recboles_hypertuning_takes_the_objective(
    folder: Path, tmp_path: Path, fits: list[tuple[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    file = ranges(tmp_path / "rce.test", "rce_weight choice [1.0,10.0,100.0]")
    tuning = HyperTuning(Objective("rce", **arguments(folder)), params_file=str(file), early_stop=9)
    tuning.run()
    assert sorted(fits) == [("rce", 1.0), ("rce", 10.0), ("rce", 100.0)]
    assert len(tuning.params2result) == 3
    best = max(tuning.params2result.values(), key=lambda result: result["best_valid_score"])
    assert tuning.best_score == best["best_valid_score"]
    assert best["test_result"] == {}  # a search does not test
    assert not list(tmp_path.glob("saved/BPR-rce*"))  # a trial leaves no files


def test_a_trial_is_the_run_that_the_command_would_make(folder: Path) -> None:
    from recbole_rcekd import run_recbole_kd

    score = Objective("rce", **arguments(folder))({"rce_weight": 3.0})["best_valid_score"]
    run = run_recbole_kd(kd_loss="rce", saved=False, **arguments(folder, rce_weight=3.0))
    assert score == run["best_valid_score"]


def test_every_method_gets_the_same_number_of_trials_and_one_teacher(
    folder: Path, tmp_path: Path, fits: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[str] = []
    train = teacher_training.train_teacher

    def noted(config: Any, *args: Any) -> Any:
        teachers.append(config["model"])
        return train(config, *args)

    monkeypatch.setattr(experiment, "train_teacher", noted)
    given_ = arguments(folder)
    found = tune_recbole_kd(2, **given_, kd_loss="scratch,rce,rce+ce", output_dir=tmp_path / "out")
    assert teachers == ["BPR"]
    assert {name: len(method["trials"]) for name, method in found.items()} == {
        "scratch": 2,
        "rce": 2,
        "rce+ce": 2,
    }
    assert set(found["rce+ce"]["best"]) == {"rce_weight", "ce_weight"}
    best = yaml.safe_load((tmp_path / "out/tuning/best.yaml").read_text())
    assert best["scratch_weight_decay"] == found["scratch"]["best"]["scratch_weight_decay"]
    assert json.loads((tmp_path / "out/tuning/tuning.json").read_text()) == found
    assert "scratch" in (tmp_path / "out/tuning/tuning.md").read_text()
    before = len(fits)
    # The same search again trains nothing; a longer one trains only the new trials.
    assert (
        tune_recbole_kd(2, **given_, kd_loss="scratch,rce,rce+ce", output_dir=tmp_path / "out")
        == found
    )
    assert len(fits) == before
    tune_recbole_kd(3, **given_, kd_loss="scratch", output_dir=tmp_path / "out")
    assert len(fits) == before + 1


def test_the_command_searches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "s.yaml"
    settings.write_text(yaml.safe_dump(given(folder)))
    file = ranges(tmp_path / "mine.test", "ce_weight choice [0.5,2.0]", "ce_top_k choice [3,4]")
    words = [
        "--model=BPR",
        "--dataset=tiny",
        "--teacher=BPR",
        "--kd_loss=ce",
        f"--config_files={settings}",
    ]
    assert main([*words, "--tune=4", f"--params_file={file}", "--output_dir=out"]) == 0
    trials = json.loads(Path("out/tuning/tuning.json").read_text())["ce"]["trials"]
    assert sorted((t["tried"]["ce_weight"], t["tried"]["ce_top_k"]) for t in trials) == [
        (0.5, 3),
        (0.5, 4),
        (2.0, 3),
        (2.0, 4),
    ]
    # The result is a property file for the main command.
    assert (
        main([*words[:-1], f"--config_files={settings} out/tuning/best.yaml", "--output_dir=out"])
        == 0
    )
    run = json.loads(Path("out/result.json").read_text())["runs"][0]
    best = max(trials, key=lambda trial: trial["best_valid_score"])
    assert run["settings"]["ce_weight"] == best["tried"]["ce_weight"]
    assert run["best_valid_score"] == best["best_valid_score"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"trials": 0}, r"\[tune\] is 0, but must be at least 1"),
        (
            {"params_file": "nowhere.test"},
            r"\[params_file\] nowhere.test cannot be read: No such file",
        ),
        (
            {"params_file": "x.test", "kd_loss": "ce,rce"},
            r"\[params_file\] has the ranges of one method",
        ),
    ],
)
def test_what_is_refused(folder: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        tune_recbole_kd(**{"trials": 1, "kd_loss": "ce", **arguments(folder), **words})


def test_the_command_refuses_what_a_search_ignores(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--seeds=0,1", "--nproc=2"):
        assert main(["--model=BPR", "--dataset=tiny", "--kd_loss=ce", "--tune=1", word]) == 2
        assert "[seeds] and [nproc] have no effect on a search" in capsys.readouterr().err


def test_a_wrong_key_in_the_ranges_is_named(folder: Path, tmp_path: Path) -> None:
    file = ranges(tmp_path / "x.test", "ce_wieght choice [0.5,2.0]")
    with pytest.raises(
        SettingsError,
        match=r"\[ce_wieght\] is not a setting of distillation. Did you mean \[ce_weight\]",
    ):
        tune_recbole_kd(1, **arguments(folder), kd_loss="ce", params_file=file)


def test_it_travels_without_its_data(folder: Path) -> None:
    objective = Objective("ce", **arguments(folder))
    objective.context.prepared()
    assert pickle.loads(pickle.dumps(objective)).context._prepared is None


def test_shipped_ranges_are_valid_and_equally_wide() -> None:
    names = {path.stem for path in HYPER.glob("*.test")}
    assert names == {*LOSSES, "scratch"}
    for name in names:
        space = HyperTuning._build_space_from_file(str(HYPER / f"{name}.test"))
        # λ alone would change nothing in a control without a KD term.
        assert f"{name}_weight" in space or name == "scratch" or LOSSES[name].replaces_base
        lines = [
            line.split(" ", 2) for line in (HYPER / f"{name}.test").read_text().splitlines() if line
        ]
        for key, kind, values in lines:
            assert kind == "choice"
            listed = yaml.safe_load(values)
            assert len(listed) == 4
            if name != "scratch":
                for value in listed:
                    read_settings(LOSSES[name].settings_type, f"loss/{name}", {key: value})


def test_a_trial_that_diverges_is_the_worst(folder: Path, tmp_path: Path) -> None:
    file = ranges(tmp_path / "rce.test", "rce_learning_rate choice [1e30,0.02]")
    found = tune_recbole_kd(
        2, **arguments(folder), kd_loss="rce", output_dir=tmp_path / "out", params_file=file
    )["rce"]
    scores = {
        trial["tried"]["rce_learning_rate"]: trial["best_valid_score"] for trial in found["trials"]
    }
    assert scores[1e30] == -1e9
    assert found["best"] == {"rce_learning_rate": 0.02}


def test_a_sum_keeps_its_own_weights(tmp_path: Path) -> None:
    trials = [{"best_valid_score": 0.1}]
    best = {
        "rce": {"rce_weight": 1.0},
        "rce+ce": {"rce_weight": 9.0, "ce_weight": 2.0},
        "ce": {"ce_weight": 3.0},
    }
    found = {
        name: {"best": values, "best_valid_score": 0.1, "trials": trials}
        for name, values in best.items()
    }
    tuning._write(tmp_path, found)
    assert yaml.safe_load((tmp_path / "best.yaml").read_text()) == {
        "rce_weight": 1.0,
        "ce_weight": 3.0,
    }
    assert yaml.safe_load((tmp_path / "best-rce+ce.yaml").read_text()) == best["rce+ce"]


@pytest.mark.parametrize("line", ["rce_weight chioce [1.0]", "rce_weight [1.0, 10.0]", ""])
def test_ranges_are_read_before_a_teacher_is_trained(
    folder: Path, tmp_path: Path, line: str
) -> None:
    with pytest.raises(
        SettingsError, match=r"\[params_file\] .*mine.test has no ranges as RecBole writes them"
    ):
        tune_recbole_kd(
            1, **arguments(folder), kd_loss="rce", params_file=ranges(tmp_path / "mine.test", line)
        )
    assert not list(Path("saved").glob("*.pth"))
