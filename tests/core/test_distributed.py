"""Two processes give the gradients, lists, metrics and files of one; and errors if one dies.

The tests start real processes, each of which imports everything. To save time, most results are
computed with one start (:func:`computed`).
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_rcekd import DistillTrainer, KDError, distill_trainer
from recbole_rcekd.cli import distil as command
from recbole_rcekd.cli import main
from recbole_rcekd.core.distributed import Ranks, _cause, run_ranks
from recbole_rcekd.core.errors import ProcessError, SettingsError, TeacherError
from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.data.fingerprint import training_interactions
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.quick_start import run_recbole_kd
from recbole_rcekd.teachers import score_cache as cache
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from recbole_rcekd.teachers.score_cache import open_teacher_scores
from recbole_rcekd.teachers.score_tables import DenseScores, FactorScores, blocks
from recbole_rcekd.training.user_distiller import UserDistiller
from tests.helpers import (
    Bundle,
    block_pairs,
    build,
    build_model,
    read_kd_settings,
    train_teacher,
    write_dataset,
)

ROOT = Path(__file__).parents[2]
WORLD = 2
N_USERS = 37  # users, items and interactions cannot be divided by 2
SMALL: dict[str, Any] = {
    "embedding_size": 8,
    "train_batch_size": 100,
    # Ten users at a time in one process, five in each of two: so the batches differ.
    "eval_batch_size": 600,
    "metrics": ["NDCG", "Recall", "MRR", "GAUC", "ShannonEntropy"],
    "metric_decimal_place": 12,
    "learning_rate": 0.02,
    "rce_top_k": 5,
    "rce_samples": 5,
    "rce_pool": 20,
    "rrd_top_k": 5,
    "rrd_rest": 5,
    "rrd_pool": 10,
    "rrd_weight": 1.0,
    "kd_refresh_epochs": 2,
    "kd_diagnostic_users": 5,
}
RUN: dict[str, Any] = {
    **SMALL,
    "use_gpu": False,
    "show_progress": False,
    "epochs": 2,
    "embedding_size": 4,
    "metrics": ["NDCG", "Recall"],
    "metric_decimal_place": 4,
    "topk": [10],
    "valid_metric": "NDCG@10",
    "teacher_embedding_size": 16,
    "teacher_epochs": 2,
    "ce_top_k": 5,
    "cd_items": 2,
}
METHODS = ["scratch", "rce", "ce", "fce", "cd", "rrd"]
STEPS = [
    (loss, schedule, item_weight)
    for loss, item_weight in (("rce", 0.0), ("rrd", 0.0), ("rrd", 0.5))
    for schedule in ("users", "interactions")
]
# With 37 users, the 4 steps have 5, 5, 5, 4 users in one process and 5, 5, 4, 4 in the other, so
# equal weights would be wrong.
UNEQUAL_STEP = 2
STUDENTS = ["BPR", "LightGCN", "MultiVAE", "RecVAE"]

# RecBole's checkpoints pickle a Config, and its loggers close no file.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("processes"), pairs=block_pairs(n_users=N_USERS))


@pytest.fixture(scope="module")
def teachers(folder: Path) -> dict[str, Path]:
    """A teacher whose scores are a product, and one whose scores are a matrix on disk."""
    return {
        "factors": train_teacher(folder, "BPR", embedding_size=16, learning_rate=0.02),
        "dense": train_teacher(folder, "MultiVAE", latent_dimension=8, mlp_hidden_size=[16]),
    }


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# --- what every rank computes ---------------------------------------------------------------------


def sides(distiller: UserDistiller) -> list[dict[str, Any]]:
    return [
        {"contexts": side.contexts, "sets": side.sets.tensors() if side.sets else {}}
        for side in distiller._sides
    ]


def step_of_a_rank(
    bundle: Bundle, loss: str, schedule: str, item_weight: float, teacher: Path
) -> dict[str, Any]:
    """Gradients of a KD step with RecBole's synchronisation, and all that it takes to repeat it."""
    config = bundle.config
    config["kd_loss"], config["kd_schedule"], config["rrd_item_weight"] = (
        loss,
        schedule,
        item_weight,
    )
    model = build_model(bundle, seed=7).double()
    trainer = DistillTrainer(config, model, read_teacher(teacher, bundle.train), seed=3)
    batch = list(bundle.train)[UNEQUAL_STEP]
    with trainer.distilling(bundle.train) as distiller:
        assert isinstance(distiller, UserDistiller)
        distiller.begin_epoch(0, len(bundle.train))
        for _ in range(UNEQUAL_STEP):
            distiller.step(batch)
        rows = []
        original = distiller._sum

        def noting(side: Any, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
            rows.append(side.contexts[chosen])
            return original(side, chosen, weights)

        distiller._sum = noting  # type: ignore[assignment, method-assign]
        trainer.set_reduce_hook()
        kd = distiller.step(batch)
        (kd + trainer.sync_grad_loss()).backward()
        return {
            "gradient": {name: p.grad.clone() for name, p in model.named_parameters()},
            "state": model.state_dict(),
            "users": batch["user_id"],
            "sides": sides(distiller),
            "taught": rows,
            "kd": float(kd),
            "seed": distiller.generator.initial_seed(),
            "n_steps": len(bundle.train),
        }


def work(config_dict: dict[str, Any], folder: str, teachers: dict[str, str], out: str) -> None:
    """Compute all that the tests below check, in one of two processes."""
    # Processes that decide differently would wait for each other forever.
    faulthandler.dump_traceback_later(300, exit=True)
    bundle = build(Path(folder), **SMALL, **config_dict)
    ranks = Ranks.of(bundle.config)
    found: dict[str, Any] = {"ranks": (ranks.rank, ranks.world), "out": out}

    found["steps"] = [step_of_a_rank(bundle, *case, Path(teachers["factors"])) for case in STEPS]

    # Evaluation: the same weights in both processes, and loaders that divide the users.
    model = build_model(bundle, seed=11)
    trainer = DistillTrainer(bundle.config, model, read_teacher(teachers["factors"], bundle.train))
    trainer.eval_collector.data_collect(bundle.train)
    found["evaluated"] = dict(trainer.evaluate(bundle.test, load_best_model=False))

    # Teacher scores, in several blocks of a few users, which the processes compute in turn
    vars(cache)["blocks"] = functools.partial(blocks, cells=600)
    for kind, checkpoint in teachers.items():
        settings = KDSettings(kd_cache_dir=str(Path(out) / "scores"))
        scores = open_teacher_scores(read_teacher(checkpoint, bundle.train), settings, False, ranks)
        own = ranks.own(torch.arange(scores.n_contexts))
        found[kind] = {
            "type": type(scores).__name__,
            "own": own,
            "top": scores.top_k(own, 10, unseen=True),
            "held": scores._lists[True].shape,
            "by item": scores.transposed().top_k(
                ranks.own(torch.arange(scores.n_items)), 5, unseen=True
            ),
        }
        again = open_teacher_scores(read_teacher(checkpoint, bundle.train), settings, False, ranks)
        found[kind]["read"] = again.top_k(own, 10, unseen=True)
        found[kind]["read held"] = again._lists[True].shape
    ranks.barrier()

    # Whole training runs
    for student in STUDENTS:
        own_keys: dict[str, Any] = (
            {"latent_dimension": 8, "mlp_hidden_size": [16]} if student == "MultiVAE" else {}
        )
        own_keys |= {"latent_dimension": 8, "hidden_dimension": 16} if student == "RecVAE" else {}
        keys = {
            **SMALL,
            **config_dict,
            **own_keys,
            "kd_loss": "rce",
            "epochs": 6,
            "stopping_step": 1,
        }
        other = build(Path(folder), student, **keys)
        student_trainer = distill_trainer(other.config)(
            other.config, build_model(other), read_teacher(teachers["factors"], other.train)
        )
        score, _ = student_trainer.fit(other.train, other.valid, saved=True, show_progress=False)
        test = student_trainer.evaluate(other.test)
        found[student] = {
            "state": student_trainer.model.state_dict(),
            "score": float(score),
            "test": dict(test),
            "file": student_trainer.saved_model_file,
            "history": str(student_trainer.history.file),
            "rows": student_trainer.history.rows,
        }
    torch.save(found, Path(out) / f"rank-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def computed(
    folder: Path, teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The results of each of two processes."""
    out = tmp_path_factory.mktemp("computed")
    paths = {kind: str(path) for kind, path in teachers.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        patch.setattr(sys, "argv", ["pytest"])
        patch.setenv("OMP_NUM_THREADS", "1")
        run_ranks(work, {"folder": str(folder), "teachers": paths, "out": str(out)}, WORLD)
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def alone(folder: Path, **keys: Any) -> Bundle:
    return build(folder, **{**SMALL, **keys})


def test_each_process_knows_its_place(computed: list[dict[str, Any]]) -> None:
    assert [each["ranks"] for each in computed] == [(0, 2), (1, 2)]


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(STEPS)), ids=lambda n: "-".join(map(str, STEPS[n])))
def test_kd_gradients_are_those_of_one_process(
    number: int, computed: list[dict[str, Any]], folder: Path, teachers: dict[str, Path]
) -> None:
    """One process with the candidates of both takes the step of their common batch."""
    loss, schedule, item_weight = STEPS[number]
    parts = [each["steps"][number] for each in computed]
    bundle = alone(folder, kd_loss=loss, kd_schedule=schedule, rrd_item_weight=item_weight)
    model = build_model(bundle).double()
    model.load_state_dict(parts[0]["state"])
    scorer = ModelScorer(model, bundle.train._dataset, trainable=True)
    settings, losses = read_kd_settings(bundle.config)
    kd_loss: Any = losses[loss]
    scores = open_teacher_scores(read_teacher(teachers["factors"], bundle.train), settings)
    distiller = UserDistiller(
        scorer, scores, kd_loss, settings, training_interactions(bundle.train._dataset), seed=3
    )
    distiller.begin_epoch(0, parts[0]["n_steps"])
    assert len(distiller._sides) == (2 if item_weight else 1)
    for k, side in enumerate(distiller._sides):
        assert side.sets is not None
        assert sum(len(part["sides"][k]["contexts"]) for part in parts) == len(side.contexts)
        for part in parts:
            given = part["sides"][k]
            for name, value in given["sets"].items():
                side.sets.tensors()[name][side.row_of[given["contexts"]]] = value
        taught = torch.cat([part["taught"][k] for part in parts])
        if schedule == "users" and k == 0:
            assert len({len(part["taught"][k]) for part in parts}) == WORLD
        if schedule == "users" or k:
            distiller._plans[k] = iter([(side.row_of[taught], float(len(taught)))])
    torch.autograd.backward(
        distiller.step({"user_id": torch.cat([part["users"] for part in parts])})
    )
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        for part in parts:
            torch.testing.assert_close(
                part["gradient"][name], parameter.grad, rtol=1e-7, atol=1e-12
            )
    assert sum(part["kd"] for part in parts) / WORLD > 0


def test_all_users_learn_once_in_an_epoch_whatever_the_number_of_processes(
    computed: list[dict[str, Any]],
) -> None:
    contexts = [each["steps"][0]["sides"][0]["contexts"] for each in computed]
    assert torch.equal(torch.cat(contexts).sort().values, torch.arange(1, N_USERS + 1))
    assert [sorted({int(u) % WORLD for u in each}) for each in contexts] == [[0], [1]]


def test_each_process_has_sets_of_its_own_users_only(computed: list[dict[str, Any]]) -> None:
    for each in computed:
        for step in each["steps"]:
            for side in step["sides"]:
                assert {len(value) for value in side["sets"].values()} == {len(side["contexts"])}


def test_batches_have_users_of_both(computed: list[dict[str, Any]]) -> None:
    """Otherwise the exchange of user ids would not be tested."""
    for each in computed:
        assert len(set((each["steps"][1]["users"] % WORLD).tolist())) == WORLD


def test_processes_draw_different_things(computed: list[dict[str, Any]]) -> None:
    first, second = (each["steps"][0]["seed"] for each in computed)
    assert first == 3  # as in one process
    assert second > 1000  # not a seed that a user tries next


# --- evaluation and training ----------------------------------------------------------------------


def test_evaluation_is_that_of_one_process(
    computed: list[dict[str, Any]], folder: Path, teachers: Any
) -> None:
    bundle = alone(folder)
    trainer = DistillTrainer(
        bundle.config, build_model(bundle, seed=11), read_teacher(teachers["factors"], bundle.train)
    )
    trainer.eval_collector.data_collect(bundle.train)
    expected = dict(trainer.evaluate(bundle.test, load_best_model=False))
    assert set(expected) >= {"ndcg@10", "gauc", "shannonentropy@10"}
    assert bundle.test.sample_size % WORLD
    for each in computed:
        assert each["evaluated"] == expected


@pytest.mark.parametrize("student", STUDENTS)
def test_processes_stay_together(
    student: str, computed: list[dict[str, Any]], folder: Path
) -> None:
    """Equal weights, equal decisions, and one file, which a plain Config opens in one process."""
    first, second = (each[student] for each in computed)
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        torch.testing.assert_close(value, second["state"][name], rtol=0, atol=0)
    for key in ("score", "test", "file"):
        assert first[key] == second[key]
    assert len(first["rows"]) == len(second["rows"])
    means = [
        [
            {name: value for name, value in row.items() if "seconds" not in name}
            for row in each["rows"]
        ]
        for each in (first, second)
    ]
    assert means[0] == means[1]
    assert {"kd_loss", "base_loss", "gamma", "overlap@50", "closure_gap"} <= set(first["rows"][0])
    assert second["history"] == "None"
    assert os.path.exists(Path(first["file"]).parent / Path(first["history"]).name)
    saved = torch.load(first["file"], weights_only=False)
    assert saved["config"]["single_spec"] is True


# --- teacher scores -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_teacher_lists_made_in_shares_are_those_of_one_process(
    kind: str,
    computed: list[dict[str, Any]],
    folder: Path,
    teachers: dict[str, Path],
    tmp_path: Path,
) -> None:
    bundle = alone(folder)
    settings = KDSettings(kd_cache_dir=str(tmp_path / "alone"))
    scores = open_teacher_scores(read_teacher(teachers[kind], bundle.train), settings)
    users, items = torch.arange(scores.n_contexts), torch.arange(scores.n_items)
    expected = scores.top_k(users, 10, unseen=True)
    by_item = scores.transposed().top_k(items, 5, unseen=True)
    for rank, each in enumerate(computed):
        found = each[kind]
        assert found["type"] == type(scores).__name__
        assert torch.equal(found["own"], users[rank::WORLD])
        assert torch.equal(found["top"], expected[rank::WORLD])
        assert torch.equal(found["read"], expected[rank::WORLD])
        assert torch.equal(found["by item"], by_item[rank::WORLD])
        assert found["held"] == found["read held"] == (len(found["own"]), 10)


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_what_processes_wrote_is_what_one_process_writes(
    kind: str,
    computed: list[dict[str, Any]],
    folder: Path,
    teachers: dict[str, Path],
    tmp_path: Path,
) -> None:
    teacher = read_teacher(teachers[kind], alone(folder).train)
    scores = open_teacher_scores(teacher, KDSettings(kd_cache_dir=str(tmp_path / "alone")))
    assert isinstance(scores, FactorScores if kind == "factors" else DenseScores)
    scores.top_k(torch.arange(3), 10, unseen=True)
    scores.transposed().top_k(torch.arange(3), 5, unseen=True)
    theirs = Path(computed[0]["out"]) / "scores" / teacher.fingerprint
    mine = tmp_path / "alone" / teacher.fingerprint
    names = sorted(path.relative_to(mine) for path in mine.rglob("*.npy"))
    assert names == sorted(path.relative_to(theirs) for path in theirs.rglob("*.npy"))
    assert len(names) == (4 if kind == "factors" else 3)
    assert not [path for path in theirs.iterdir() if path.name.startswith(".")]
    for name in names:
        # With other batches of users, the scores of auto-encoders differ in the last digit.
        np.testing.assert_allclose(
            np.load(mine / name), np.load(theirs / name), rtol=1e-5, atol=1e-6
        )


# --- the command ----------------------------------------------------------------------------------


def arguments(folder: Path, *more: str, **keys: Any) -> list[str]:
    settings = {"data_path": str(folder), **RUN, **keys}
    given = ["--model=BPR", "--dataset=tiny", *more]
    return given + [f"--{key}={value}".replace(" ", "") for key, value in settings.items()]


def start(given: list[str], output: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run_recbole_kd.py"), *given],
            stdout=file,
            stderr=file,
            env=environment,
        )


def plain(file: Path) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All methods in two processes, with a teacher trained first; the folder and the output."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("OMP_NUM_THREADS", "1")
        more = ("--teacher=BPR", f"--kd_loss={','.join(METHODS)}", "--nproc=2", "--output_dir=out")
        process = start(arguments(folder, *more), place / "output.txt")
        status = process.wait(timeout=400)
    text = plain(place / "output.txt")
    assert status == 0, text
    return place, text


def test_all_methods_run_and_the_result_is_written_once(finished: tuple[Path, str]) -> None:
    place, text = finished
    result = json.loads((place / "out" / "result.json").read_text(encoding="utf-8"))
    assert [run["loss"] for run in result["runs"]] == METHODS
    assert result["teacher"]["epochs"] == 2
    for run in result["runs"]:
        assert (place / run["checkpoint"]).exists()
        assert (place / "out" / f"{run['loss']}-seed2020" / "history.csv").exists()
        assert text.count(f" {run['loss']}, seed 2020: training BPR") == 1
    assert text.count("student alone") == 1
    assert len(list((place / "log" / "BPR").iterdir())) == 1
    assert len(list((place / "log_tensorboard").iterdir())) == 1
    assert len(list((place / "saved").glob("*.pth"))) == len(METHODS) + 1
    assert not list(place.rglob("*.partial"))


PLAIN = """
import sys
import numpy as np
kinds = {"float": float, "bool": bool, "int": int, "object": object, "long": int, "unicode": str}
for name, kind in kinds.items():
    if name not in vars(np):
        setattr(np, name, kind)
for name, kind in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
    if not hasattr(np, name):
        setattr(np, name, kind)
import torch
original = torch.load
torch.load = lambda *a, **k: original(*a, **{**k, "weights_only": False})
try:
    from recbole.quick_start import load_data_and_model
except ImportError:  # the newest stack has no ray
    print("skipped")
    sys.exit()
from recbole.utils import get_trainer
config, model, dataset, train, valid, test = load_data_and_model(sys.argv.pop())
trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
print({k: float(v) for k, v in trainer.evaluate(test, load_best_model=False).items()})
assert not [name for name in sys.modules if name.startswith("recbole_rcekd")]
"""


def test_plain_recbole_opens_the_checkpoint_in_one_process(finished: tuple[Path, str]) -> None:
    place, _ = finished
    result = json.loads((place / "out" / "result.json").read_text(encoding="utf-8"))
    run = result["runs"][1]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, run["checkpoint"]],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    if last == "skipped":
        pytest.skip("no ray")
    assert last == str(run["test_result"])


def test_finished_runs_are_found_again_by_all(
    finished: tuple[Path, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = finished
    monkeypatch.chdir(place)
    more = ("--teacher=BPR", "--kd_loss=scratch,rce", "--nproc=2", "--output_dir=out")
    process = start(arguments(folder, *more), place / "again.txt")
    assert process.wait(timeout=400) == 0
    text = plain(place / "again.txt")
    assert text.count("finished before") == 2
    assert "BPR trained before" in text


def children(pid: int) -> list[int]:
    """The processes that torch started for a command, in the order of ranks."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
            words = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        if f"PPid:\t{pid}\n" in text and "spawn_main" in words:
            found.append(int(status.parent.name))
    return sorted(found)


def endless(
    folder: Path, teachers: Any, tmp_path: Path
) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A command that trains in two processes until it is stopped, and these processes.

    They are returned once there is a checkpoint.
    """
    more = (f"--teacher={teachers['factors']}", "--kd_loss=rce", "--nproc=2", "--epochs=100000")
    keys = {
        key: value
        for key, value in RUN.items()
        if not key.startswith("teacher_") and key != "epochs"
    }
    given = [
        "--model=BPR",
        "--dataset=tiny",
        f"--data_path={folder}",
        "--stopping_step=100000",
        *more,
    ]
    process = start(
        given + [f"--{k}={v}".replace(" ", "") for k, v in keys.items()], tmp_path / "output.txt"
    )
    waiting_since = time.monotonic()
    while "Saving current" not in plain(tmp_path / "output.txt"):
        if process.poll() is not None or time.monotonic() - waiting_since > 240:
            process.kill()
            pytest.fail(plain(tmp_path / "output.txt"))
        time.sleep(0.1)
    ranks = children(process.pid)
    assert len(ranks) == WORLD
    return process, ranks


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
def test_no_process_outlives_its_starter(folder: Path, teachers: Any, tmp_path: Path) -> None:
    """Also not if it was started in the background, where interrupts are ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes inherit it
    try:
        process, ranks = endless(folder, teachers, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    process.kill()
    process.wait(timeout=10)
    waiting_since = time.monotonic()
    while left := [pid for pid in ranks if Path(f"/proc/{pid}/stat").exists()]:
        if time.monotonic() - waiting_since > 400:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} processes train on")
        time.sleep(0.2)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
def test_a_killed_process_ends_the_command_with_a_message(
    folder: Path, teachers: Any, tmp_path: Path
) -> None:
    process, ranks = endless(folder, teachers, tmp_path)
    try:
        os.kill(ranks[-1], signal.SIGKILL)
        assert process.wait(timeout=400) == 2
        for pid in ranks:
            assert not Path(f"/proc/{pid}/stat").exists()
    finally:
        process.kill()
    errors = [
        line for line in plain(tmp_path / "output.txt").splitlines() if line.startswith("error: ")
    ]
    assert len(errors) == 1
    found = re.fullmatch(
        r"error: Process 1 of 2 was killed by SIGKILL \(the system does that when memory runs "
        r"out\), so the others were stopped; the last checkpoint, \[(.*)\], is whole. With "
        r".output_dir., the same command goes on with what is not finished.",
        errors[0],
    )
    assert found, errors
    checkpoint = torch.load(found[1], weights_only=False)
    assert set(checkpoint["state_dict"]) == {"user_embedding.weight", "item_embedding.weight"}
    assert "Traceback" not in plain(tmp_path / "output.txt")


def test_a_mistake_is_told_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--teacher=BPR", "--nproc=2", "--rce_topk=5")) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert errors == [
        "error: [rce_topk] is not a setting of distillation. Did you mean [rce_top_k]?"
    ]


def fail(config_dict: dict[str, Any], how: str) -> None:
    if config_dict["local_rank"] == 1:
        if how == "exception":
            raise ZeroDivisionError("nothing to share")
        if how == "teacher":
            raise TeacherError("It has seen too much.")
        os._exit(7)
    time.sleep(600)  # longer than the slowest machine needs to stop this process


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            "exception",
            ProcessError,
            "Process 1 of 2 failed with ZeroDivisionError: nothing to share, so the others",
        ),
        ("teacher", TeacherError, r"It has seen too much\.$"),
        ("exit", ProcessError, "Process 1 of 2 ended with status 7, .* there is no checkpoint yet"),
    ],
)
def test_the_first_failure_stops_all_and_is_told(
    how: str, error: type[KDError], message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=message):
        run_ranks(fail, {"how": how}, WORLD)
    assert time.monotonic() - started < 500


def test_of_two_that_ended_the_one_that_was_killed_is_told(tmp_path: Path) -> None:
    """The other one fails because it is alone, and may be the first that the starter finds."""
    trace = tmp_path / "trace"
    trace.write_bytes(
        pickle.dumps("Traceback (most recent call last):\nRuntimeError: Connection closed by peer")
    )
    ended = [SimpleNamespace(exitcode=1), SimpleNamespace(exitcode=-signal.SIGKILL)]
    context = SimpleNamespace(processes=ended, error_files=[str(trace), str(tmp_path / "none")])
    error = _cause(
        context, RuntimeError("process 0 terminated"), {"offset": 2, "world_size": 4}, tmp_path
    )
    assert str(error).startswith("Process 3 of 4 was killed by SIGKILL")


def answer(config_dict: dict[str, Any]) -> dict[str, Any]:
    return config_dict


def test_each_machine_starts_its_part() -> None:
    """Options mean the same as in RecBole; the result is that of the machine's first process."""
    given = run_ranks(
        answer,
        {"config_dict": {"seed": 1}},
        nproc=1,
        world_size=4,
        ip="10.0.0.1",
        port=99,
        offset=3,
    )
    assert given == {
        **{"seed": 1, "nproc": 1, "world_size": 4, "ip": "10.0.0.1", "port": "99", "offset": 3},
        "local_rank": 0,
    }


@pytest.mark.parametrize(
    "place",
    [{"nproc": 0}, {"nproc": 2, "world_size": 1}, {"nproc": 2, "world_size": 3, "offset": 2}],
)
def test_impossible_places_are_refused(place: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"are not among \[world_size\]"):
        run_ranks(answer, {}, **place)


def test_nproc_in_a_file_is_not_ignored(folder: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"\[nproc\] is read by run_recbole_kd.py from its command line"
    ):
        run_recbole_kd(
            "BPR", "tiny", config_dict={"data_path": str(folder), "nproc": 2}, teacher="BPR"
        )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], None),
        (["--nproc=1"], None),
        (["--nproc=2"], (2, -1, "localhost", None, 0)),
        (
            ["--nproc=2", "--world_size=6", "--ip=10.0.0.7", "--port=5000", "--group_offset=4"],
            (2, 6, "10.0.0.7", 5000, 4),
        ),
        (["--nproc=1", "--world_size=2"], (1, 2, "localhost", None, 0)),
    ],
)
def test_one_process_starts_no_other(
    given: list[str], expected: tuple[Any, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(command, "run_recbole_kd", lambda **run: called.append(None))
    monkeypatch.setattr(command, "run_ranks", lambda work, run, *place: called.append(place))
    assert main(["--model=BPR", *given]) == 0
    assert called == [expected]


# --- a process alone ------------------------------------------------------------------------------


def test_alone_nothing_is_shared_or_sent() -> None:
    """There is no process group, so any communication would raise an error."""
    ranks, ids = Ranks(), torch.arange(5)
    assert ranks.own(ids) is ids
    assert ranks.row(ids) is ids
    assert ranks.joined(ids) is ids
    assert ranks.whole(ids, 5) is ids
    assert ranks.counts(ids) == [5]
    assert ranks.seed(7) == 7
    assert ranks.gather("x") == ["x"]
    assert ranks.broadcast("x") == "x"
    assert ranks.mean({"a": 1.0}) == {"a": 1.0}
    ranks.barrier()


@pytest.mark.parametrize("world", [2, 3])
def test_everything_is_owned_once(world: int) -> None:
    ids = torch.tensor([1, 2, 3, 5, 8, 9, 10])
    places = [Ranks(rank, world) for rank in range(world)]
    owned = [place.own(ids) for place in places]
    assert torch.equal(torch.cat(owned).sort().values, ids)
    assert places[0].counts(ids) == [len(each) for each in owned]
    for place in places:
        everything = place.own(torch.arange(11))
        assert torch.equal(place.row(everything), torch.arange(len(everything)))
    assert len({place.seed(2020) for place in places}) == world
