"""The trainer and RecBole's traps; each has a test that fails without the guard against it."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd import DistillTrainer, KDError, distill_trainer
from recbole_rcekd.core.errors import ScoringError, SettingsError
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from recbole_rcekd.training.history import History
from recbole_rcekd.training.optimizer import update_in_one_pass
from recbole_rcekd.training.recording import recording_trainer
from recbole_rcekd.training.trainer import DistillMixin
from recbole_rcekd.training.user_distiller import UserDistiller
from tests.helpers import Bundle, build, build_model, train_teacher, write_dataset

# isort: split
from recbole.config import Config
from recbole.model.general_recommender import BPR, MultiVAE
from recbole.trainer import RecVAETrainer, Trainer
from recbole.utils import get_trainer, init_seed

State = dict[str, Tensor]
SMALL: dict[str, Any] = {
    "rce_top_k": 5,
    "rce_samples": 5,
    "rce_pool": 20,
    "kd_diagnostic_users": 8,
    "kd_refresh_epochs": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "BPR": {"embedding_size": 8},
    "LightGCN": {"embedding_size": 8, "n_layers": 2},
    "NeuMF": {"mf_embedding_size": 8, "mlp_embedding_size": 8, "mlp_hidden_size": [8]},
    "MultiVAE": {"latent_dimension": 8, "mlp_hidden_size": [16]},
    # DiffRec draws in evaluation too.
    "DiffRec": {
        "embedding_size": 4,
        "dims_dnn": [16],
        "steps": 3,
        "sampling_noise": True,
    },
    "RecVAE": {"latent_dimension": 8, "hidden_dimension": 16, "n_enc_epochs": 1, "n_dec_epochs": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def teacher_file(folder: Path) -> Path:
    return train_teacher(folder, "BPR", embedding_size=16, learning_rate=0.02)


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # tensorboard and the cache are written where the process stands


def bundle_of(folder: Path, tmp_path: Path, model: str = "BPR", **settings: Any) -> Bundle:
    settings = {
        "learning_rate": 0.01,
        "checkpoint_dir": str(tmp_path / "saved"),
        **SMALL,
        **settings,
    }
    return build(folder, model, **{**MODELS.get(model, {}), **settings})


def make(
    folder: Path, tmp_path: Path, teacher_file: Path, model: str = "BPR", **settings: Any
) -> tuple[Bundle, DistillMixin]:
    bundle = bundle_of(folder, tmp_path, model, **settings)
    teacher = read_teacher(teacher_file, bundle.train)
    return bundle, distill_trainer(bundle.config)(bundle.config, build_model(bundle), teacher)


def state(model: Any) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def course(bundle: Bundle, trainer: Any, saved: bool = False) -> list[State]:
    """The parameters after each epoch."""
    states: list[State] = []
    trainer.fit(
        bundle.train,
        bundle.valid,
        saved=saved,
        callback_fn=lambda epoch, score: states.append(state(trainer.model)),
    )
    return states


def plain_words(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


# --- λ = 0 is plain RecBole -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BPR", "LightGCN", "NeuMF", "MultiVAE", "DiffRec", "RecVAE"])
def test_weight_0_is_plain_recbole_bit_for_bit(
    folder: Path, tmp_path: Path, teacher_file: Path, name: str
) -> None:
    bundle = bundle_of(folder, tmp_path, name, epochs=3)
    config = bundle.config
    plain = course(bundle, get_trainer(config["MODEL_TYPE"], name)(config, build_model(bundle)))
    assert len(plain) == 3
    assert not same(plain[0], plain[2])
    weightless, trainer = make(folder, tmp_path, teacher_file, name, epochs=3, rce_weight=0.0)
    assert all(map(same, plain, course(weightless, trainer)))
    assert [row["kd_loss"] for row in trainer.history.rows] == [0.0] * 3
    _, heavy = make(folder, tmp_path, teacher_file, name, epochs=3)
    distilled = course(bundle_of(folder, tmp_path, name, epochs=3), heavy)
    assert not same(plain[0], distilled[0])


def test_the_recording_trainer_is_plain_recbole(folder: Path, tmp_path: Path) -> None:
    bundle = bundle_of(folder, tmp_path, epochs=2)
    plain = course(bundle, Trainer(bundle.config, build_model(bundle)))
    bundle = bundle_of(folder, tmp_path, epochs=2)
    trainer = recording_trainer(bundle.config)(bundle.config, build_model(bundle))
    assert all(map(same, plain, course(bundle, trainer)))
    assert set(trainer.history.rows[-1]) == {
        *(
            "epoch",
            "train_seconds",
            "train_loss",
            "valid_seconds",
            "valid_ndcg@10",
            "valid_recall@10",
        ),
    }


@pytest.mark.parametrize("before", [True, False])
def test_no_anomaly_detection_while_an_epoch_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """RecBole's SINE turns it on for the whole process, as soon as it is imported."""
    bundle = bundle_of(folder, tmp_path, epochs=1)
    trainer = recording_trainer(bundle.config)(bundle.config, build_model(bundle))
    modes: list[bool] = []
    original = trainer.model.calculate_loss

    def noted(interaction: Any) -> Any:
        modes.append(torch.is_anomaly_enabled())
        return original(interaction)

    monkeypatch.setattr(trainer.model, "calculate_loss", noted)
    with torch.autograd.set_detect_anomaly(before):
        trainer.fit(bundle.train, bundle.valid, saved=False)
        assert torch.is_anomaly_enabled() is before
    assert modes
    assert not any(modes)


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["BPR", "NeuMF"])
def test_a_run_from_the_cache_is_the_same_run(tmp_path: Path, teacher: str) -> None:
    folder = write_dataset(tmp_path / "data")  # other checkpoints than the other tests'
    file = train_teacher(folder, teacher, epochs=2, **MODELS[teacher])
    runs = []
    for _ in range(2):
        bundle, trainer = make(folder, tmp_path, file, epochs=2)
        runs.append(course(bundle, trainer))
        assert list((tmp_path / "saved" / "teacher_scores").iterdir())
    assert all(map(same, *runs))


@pytest.mark.parametrize("schedule", ["users", "interactions"])
@pytest.mark.parametrize("name", ["LightGCN", "DMF"])
def test_validation_ranks_with_the_weights_of_the_moment(
    folder: Path, tmp_path: Path, teacher_file: Path, name: str, schedule: str
) -> None:
    """LightGCN and DMF cache a full sort; one made in training must not be used in validation."""
    bundle, trainer = make(
        folder, tmp_path, teacher_file, name, epochs=3, learning_rate=0.05, kd_schedule=schedule
    )
    reported: list[float] = []
    true: list[float] = []

    def evaluate_anew(epoch: int, score: float) -> None:
        fresh = build_model(bundle)
        fresh.load_state_dict(trainer.model.state_dict())
        result = Trainer(bundle.config, fresh).evaluate(bundle.valid, load_best_model=False)
        reported.append(score)
        true.append(result["ndcg@10"])

    trainer.fit(bundle.train, bundle.valid, saved=False, callback_fn=evaluate_anew)
    assert reported == true
    assert len(set(true)) > 1  # otherwise stale results would not show


# --- the wrapped loss -----------------------------------------------------------------------------


class Stop(Exception):
    """Raised by a callback."""


def raising(error: BaseException) -> Callable[..., None]:
    def callback(*args: Any) -> None:
        raise error

    return callback


def test_the_model_is_as_it_was_after_fit(folder: Path, tmp_path: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file, epochs=1)
    before = set(vars(trainer.model))
    trainer.fit(bundle.train, bundle.valid, saved=False)
    assert set(vars(trainer.model)) == before
    assert trainer.model.calculate_loss.__func__ is BPR.calculate_loss
    assert trainer.model.forward.__func__ is BPR.forward


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_and_after_a_stop(
    folder: Path, tmp_path: Path, teacher_file: Path, error: BaseException
) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file, epochs=2)
    before = set(vars(trainer.model))
    with pytest.raises(type(error)):
        trainer.fit(bundle.train, bundle.valid, saved=False, callback_fn=raising(error))
    assert set(vars(trainer.model)) == before
    trainer.fit(bundle.train, bundle.valid, saved=False)  # and can be trained on


def test_a_step_adds_the_weighted_loss_and_stays_a_scalar(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    bundle, trainer = make(
        folder, tmp_path, teacher_file, kd_schedule="interactions", rce_weight=3.0
    )
    batch = next(iter(bundle.train))
    # Some users are in the batch twice.
    assert len(set(batch["user_id"].tolist())) < len(batch["user_id"])
    base = trainer.model.calculate_loss(batch)
    with trainer.distilling(bundle.train) as distiller:
        assert isinstance(distiller, UserDistiller)
        distiller.begin_epoch(0, 2)
        kd = distiller.step(batch)
        total = trainer.model.calculate_loss(batch)
    assert total.shape == base.shape == ()
    torch.testing.assert_close(total, base + 3.0 * kd)


class TwoLosses(BPR):  # type: ignore[misc]
    """A model that returns its terms apart, as NCL does."""

    def calculate_loss(self, interaction: Any) -> tuple[Tensor, Tensor]:
        loss = super().calculate_loss(interaction)
        return loss, 0.1 * loss


def test_a_tuple_of_losses_stays_a_tuple(folder: Path, tmp_path: Path, teacher_file: Path) -> None:
    bundle = bundle_of(folder, tmp_path, epochs=2)
    init_seed(1, True)
    model = TwoLosses(bundle.config, bundle.train._dataset)
    trainer = DistillTrainer(bundle.config, model, read_teacher(teacher_file, bundle.train))
    batch = next(iter(bundle.train))
    base = model.calculate_loss(batch)
    with trainer.distilling(bundle.train) as distiller:
        distiller.begin_epoch(0, 1)
        both = model.calculate_loss(batch)
    assert isinstance(both, tuple)
    assert len(both) == 2
    assert float(both[0].detach()) > float(base[0].detach())
    assert torch.equal(both[1], base[1])
    trainer.fit(bundle.train, bundle.valid, saved=False)
    for row in trainer.history.rows:
        assert row["train_loss"] == pytest.approx(
            row["base_loss"] + 10.0 * row["kd_loss"], rel=1e-4
        )


class Deaf(Trainer):  # type: ignore[misc]
    """A trainer that never asks the model for its loss, as a future one of RecBole might."""

    def _train_epoch(self, *args: Any, **kwargs: Any) -> float:
        return 0.0


def test_an_epoch_without_distillation_is_an_error(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    bundle = bundle_of(folder, tmp_path)
    deaf: type[DistillMixin] = type("DistillDeaf", (DistillMixin, Deaf), {})
    trainer = deaf(bundle.config, build_model(bundle), read_teacher(teacher_file, bundle.train))
    with pytest.raises(KDError, match="BPR's trainer ran an epoch without one distillation step"):
        trainer.fit(bundle.train, bundle.valid, saved=False)


def test_an_epoch_outside_fit_is_an_error(folder: Path, tmp_path: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file)
    with pytest.raises(KDError, match="an epoch was started without it"):
        trainer._train_epoch(bundle.train, 0)
    trainer.fit(bundle.train, bundle.valid, saved=False)
    with pytest.raises(KDError, match="without one distillation step"):
        trainer._train_epoch(bundle.train, 9)


def test_wrong_settings_and_models_are_refused(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    bundle = bundle_of(folder, tmp_path)
    teacher = read_teacher(teacher_file, bundle.train)
    bundle.config["rce_betta"] = 1.0
    with pytest.raises(SettingsError, match="rce_beta"):
        DistillTrainer(bundle.config, build_model(bundle), teacher)
    bundle = bundle_of(folder, tmp_path, "EASE")
    with pytest.raises(ScoringError, match="EASE is not trained by gradient"):
        distill_trainer(bundle.config)(bundle.config, build_model(bundle), teacher)


# --- models with a trainer of their own -----------------------------------------------------------


def test_recvae_is_trained_by_its_own_trainer(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file, "RecVAE", epochs=2)
    assert isinstance(trainer, RecVAETrainer)
    assert type(trainer).__name__ == "DistillRecVAETrainer"
    steps: list[int] = []
    with pytest.raises(Stop):
        trainer.fit(bundle.train, bundle.valid, callback_fn=raising(Stop()))
    assert trainer.distiller is not None
    steps.append(trainer.distiller.steps)
    # Once through the data for the encoder, once for the decoder
    assert steps == [2 * len(bundle.train)]
    assert trainer.history.rows[0]["kd_loss"] > 0


def test_distill_trainer_class_refuses_it_and_says_what_to_write(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    bundle = bundle_of(folder, tmp_path, "RecVAE")
    teacher = read_teacher(teacher_file, bundle.train)
    with pytest.raises(
        KDError, match=r"RecBole trains RecVAE with RecVAETrainer; write distill_trainer\(config\)"
    ):
        DistillTrainer(bundle.config, build_model(bundle), teacher)
    assert distill_trainer(bundle_of(folder, tmp_path, "LightGCN").config) is DistillTrainer


# --- files ----------------------------------------------------------------------------------------


def test_trainers_of_the_same_second_write_different_files(
    folder: Path, tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "recbole_rcekd.training.recording.get_local_time", lambda: "Nov-24-2026_11-29-00"
    )
    trainers: list[Any] = [make(folder, tmp_path, teacher_file)[1] for _ in range(2)]
    config = bundle_of(folder, tmp_path).config
    trainers += [recording_trainer(config)(config, trainers[0].model) for _ in range(2)]
    assert len({trainer.saved_model_file for trainer in trainers}) == 4
    assert len({trainer.history.file for trainer in trainers}) == 4
    labels = [Path(trainer.saved_model_file).name.rsplit("-", 1)[0] for trainer in trainers]
    assert labels == [
        f"BPR-{label}-Nov-24-2026_11-29-00" for label in ("rce", "rce", "scratch", "scratch")
    ]


def test_a_loss_in_a_list_does_not_stand_in_brackets_in_the_name(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    _, trainer = make(folder, tmp_path, teacher_file, kd_loss=["ce"], ce_top_k=5)
    assert Path(trainer.saved_model_file).name.startswith("BPR-ce-")


def test_a_crash_while_saving_leaves_the_last_checkpoint(
    folder: Path, tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file, epochs=1)
    trainer.fit(bundle.train, bundle.valid)
    file = Path(trainer.saved_model_file)
    whole = file.read_bytes()

    def half(content: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_bytes(whole[: len(whole) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        trainer._save_checkpoint(1)
    assert file.read_bytes() == whole
    monkeypatch.undo()
    assert torch.load(file, weights_only=False)["epoch"] == 0
    trainer._save_checkpoint(1)
    assert torch.load(file, weights_only=False)["epoch"] == 1


@pytest.mark.parametrize("moment", ["callback", "batch"])
def test_ctrl_c_leaves_whole_files(
    folder: Path, tmp_path: Path, teacher_file: Path, moment: str
) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file, epochs=5)
    model, calls = trainer.model, 0

    def stop_after(epoch: int, score: float) -> None:
        if moment == "callback" and epoch == 1:
            raise KeyboardInterrupt

    class Interrupted(BPR):  # type: ignore[misc]
        def calculate_loss(self, interaction: Any) -> Any:
            nonlocal calls
            calls += 1
            if moment == "batch" and calls > 2 * len(bundle.train) + 1:
                raise KeyboardInterrupt
            return super().calculate_loss(interaction)

    model.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(bundle.train, bundle.valid, callback_fn=stop_after)
    checkpoint = torch.load(trainer.saved_model_file, weights_only=False)
    assert checkpoint["epoch"] in (0, 1)
    assert trainer.history.file is not None
    rows = rows_of(trainer.history.file)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(row["valid_ndcg@10"] and row["kd_loss"] for row in rows)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_student_stays_stock(folder: Path, tmp_path: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file, epochs=1)
    trainer.fit(bundle.train, bundle.valid)
    plain_trainer = Trainer(bundle.config, build_model(bundle))
    plain_trainer.fit(bundle.train, bundle.valid)
    mine = torch.load(trainer.saved_model_file, weights_only=False)
    plain = torch.load(plain_trainer.saved_model_file, weights_only=False)
    assert mine.keys() == plain.keys()
    assert type(trainer.model) is BPR
    assert type(mine["config"]) is Config
    assert set(vars(mine["config"])) == set(vars(plain["config"]))
    assert mine["state_dict"].keys() == plain["state_dict"].keys()
    assert len(mine["optimizer"]["param_groups"][0]["params"]) == len(
        list(trainer.model.parameters())
    )
    assert b"recbole_rcekd" not in Path(trainer.saved_model_file).read_bytes()


def test_resume_with_recboles_own_method(folder: Path, tmp_path: Path, teacher_file: Path) -> None:
    bundle, first = make(folder, tmp_path, teacher_file, epochs=2, kd_loss="fce", fce_top_k=5)
    first.fit(bundle.train)  # without validation, every epoch is saved
    bundle, second = make(folder, tmp_path, teacher_file, epochs=4, kd_loss="fce", fce_top_k=5)
    second.resume_checkpoint(first.saved_model_file)
    assert same(state(second.model), state(first.model))
    second.fit(bundle.train, bundle.valid)
    assert [row["epoch"] for row in second.history.rows] == [2, 3]
    assert second.saved_model_file == first.saved_model_file
    assert torch.load(second.saved_model_file, weights_only=False)["epoch"] in (2, 3)
    assert second.history.rows[0]["kd_loss"] < first.history.rows[0]["kd_loss"]


# --- what is reported -----------------------------------------------------------------------------


def test_history_log_and_tensorboard_say_the_same(
    folder: Path,
    tmp_path: Path,
    teacher_file: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file, epochs=4, eval_step=2, rce_weight=3.0)
    shown: dict[tuple[str, int], float] = {}
    monkeypatch.setattr(
        trainer.tensorboard,
        "add_scalar",
        lambda name, value, step: shown.__setitem__((name, step), value),
    )
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(
        trainer.wandblogger, "log_metrics", lambda metrics, head="train": sent.append(metrics)
    )
    results: list[float] = []
    with caplog.at_level(logging.INFO):
        trainer.fit(
            bundle.train, bundle.valid, callback_fn=lambda epoch, score: results.append(score)
        )
    rows, log = trainer.history.rows, plain_words(caplog.text)
    found = ["base_loss", "kd_loss", "gamma", "overlap@50", "ndcg@10_to_teacher"]
    found += ["closure_gap", "closure_gap_unsampled", "blockers_covered", "refresh_seconds"]
    in_training = {"epoch", "train_seconds", "train_loss", *found}
    with_validation = {*in_training, "valid_seconds", "valid_ndcg@10", "valid_recall@10"}
    assert [set(row) for row in rows] == [in_training, with_validation] * 2
    losses = [float(x) for x in re.findall(r"train loss: ([\d.]+)", log)]
    assert len(losses) == 4
    for row, total in zip(rows, losses, strict=True):
        epoch = int(row["epoch"])
        assert row["train_loss"] == pytest.approx(total / len(bundle.train), abs=1e-4)
        assert row["train_loss"] == pytest.approx(row["base_loss"] + 3.0 * row["kd_loss"], rel=1e-4)
        line = re.search(rf"epoch {epoch} distilling \[(.*)\]", log)
        assert line is not None
        assert line[1] == ", ".join(f"{name}: {row[name]:.4f}" for name in found)
        assert {name: shown[f"KD/{name}", epoch] for name in found} == {
            name: row[name] for name in found
        }
        assert {"epoch": epoch, **{f"kd/{name}": row[name] for name in found}} in sent
        assert 0 <= row["refresh_seconds"] <= row["train_seconds"]
    assert [row["valid_ndcg@10"] for row in rows[1::2]] == results
    assert trainer.history.file is not None
    on_disk = rows_of(trainer.history.file)
    assert set(on_disk[0]) == with_validation
    assert [row["valid_ndcg@10"] for row in on_disk] == [
        "",
        f"{results[0]:.6g}",
        "",
        f"{results[1]:.6g}",
    ]
    for written, row in zip(on_disk, rows, strict=True):
        assert {k: float(v) for k, v in written.items() if v} == pytest.approx(row, rel=1e-5)


def test_a_history_without_a_file_or_an_epoch(tmp_path: Path) -> None:
    history = History()
    history.note(loss=1.0)  # an evaluation before the first epoch
    history.begin(0)
    history.note(loss=2.0)
    assert history.rows == [{"epoch": 0, "loss": 2.0}]
    assert not list(tmp_path.iterdir())


def test_a_student_learns_from_its_teacher(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    settings: dict[str, Any] = {
        "kd_loss": "fce",
        "fce_top_k": 5,
        "learning_rate": 0.05,
        "stopping_step": 99,
    }
    bundle, trainer = make(folder, tmp_path, teacher_file, epochs=15, **settings)
    trainer.fit(bundle.train, bundle.valid, saved=False)
    first, last = trainer.history.rows[0], trainer.history.rows[-1]
    assert last["kd_loss"] < first["kd_loss"]
    assert last["ndcg@10_to_teacher"] > first["ndcg@10_to_teacher"] + 0.1
    assert last["overlap@50"] > first["overlap@50"]


def test_the_seed_of_the_draws_can_be_given(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    courses = []
    for seed in (None, 2020, 1):
        bundle = bundle_of(folder, tmp_path, epochs=1)
        teacher = read_teacher(teacher_file, bundle.train)
        courses.append(
            course(bundle, DistillTrainer(bundle.config, build_model(bundle), teacher, seed))[0]
        )
    assert same(courses[0], courses[1])
    assert not same(courses[0], courses[2])


def test_scores_of_ones_own_will_do_as_a_teacher(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    from recbole_rcekd.teachers.score_tables import FactorScores

    bundle = bundle_of(folder, tmp_path, epochs=1)
    teacher = read_teacher(teacher_file, bundle.train)
    factors = teacher.factors()
    assert factors is not None
    own = FactorScores(*factors, teacher.seen)
    mine = course(bundle, DistillTrainer(bundle.config, build_model(bundle), own))
    bundle, trainer = make(folder, tmp_path, teacher_file, epochs=1)
    assert all(map(same, mine, course(bundle, trainer)))


def test_autoencoders_are_taught_too(folder: Path, tmp_path: Path, teacher_file: Path) -> None:
    """Their batches hold padding user 0."""
    bundle, trainer = make(
        folder, tmp_path, teacher_file, "MultiVAE", epochs=1, kd_schedule="interactions"
    )
    assert isinstance(trainer.model, MultiVAE)
    trainer.fit(bundle.train, bundle.valid, saved=False)
    assert trainer.history.rows[0]["kd_loss"] > 0


# --- the update in one pass -----------------------------------------------------------------------


def fused(optimizer: Any) -> bool:
    return any(bool(group.get("fused")) for group in optimizer.param_groups)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, False), (1.0, True)])
def test_only_distilled_runs_are_updated_in_one_pass(
    folder: Path, tmp_path: Path, teacher_file: Path, weight: float, expected: bool
) -> None:
    bundle, trainer = make(folder, tmp_path, teacher_file, rce_weight=weight)
    assert fused(trainer.optimizer) is expected
    assert not fused(recording_trainer(bundle.config)(bundle.config, build_model(bundle)).optimizer)


class OwnAdam(torch.optim.Adam):
    """Somebody's variant."""


@pytest.mark.parametrize("kind", [OwnAdam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_other_optimizers_are_left_alone(kind: Any) -> None:
    optimizer = kind([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    before = [dict(group) for group in optimizer.param_groups]
    update_in_one_pass(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == before


@pytest.mark.parametrize("learner", ["sgd", "adagrad", "rmsprop", "adam"])
def test_every_learner_of_recbole_distils(
    folder: Path, tmp_path: Path, teacher_file: Path, learner: str
) -> None:
    bundle, trainer = make(
        folder, tmp_path, teacher_file, epochs=1, learner=learner, weight_decay=0.01
    )
    trainer.fit(bundle.train, bundle.valid, saved=False)
    assert fused(trainer.optimizer) is (learner == "adam")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_pass_takes_the_same_steps(weight_decay: float) -> None:
    """A step of Adam is at most the learning rate; float32 rounds a millionth of it."""
    lr, n_steps = 0.01, 8
    weights = []
    for one_pass in (False, True):
        torch.manual_seed(3)
        tables = [torch.nn.Parameter(torch.randn(30, 8)) for _ in range(2)]
        optimizer = torch.optim.Adam(tables, lr=lr, weight_decay=weight_decay)
        if one_pass:
            update_in_one_pass(optimizer)
        for _ in range(n_steps):
            for table in tables:
                table.grad = torch.randn(30, 8) * (torch.rand(30, 1) < 0.5)
            optimizer.step()
        weights.append(torch.cat([table.detach() for table in tables]))
    # Weights of size 1 are rounded by 2^-24 in every step; the quotient m/√v by some 2^-22 of lr.
    assert float((weights[0] - weights[1]).abs().max()) < n_steps * (
        4 * 2.0**-24 + 4 * lr * 2.0**-22
    )


@pytest.mark.parametrize("name", ["BPR", "LightGCN"])
def test_a_distilled_run_is_stock_adams_but_for_rounding(
    folder: Path, tmp_path: Path, teacher_file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first epoch: later ones choose other items where two scores are nearly equal."""
    courses = []
    for one_pass in (True, False):
        if not one_pass:
            monkeypatch.setattr(
                "recbole_rcekd.training.trainer.update_in_one_pass", lambda optimizer: None
            )
        bundle, trainer = make(folder, tmp_path, teacher_file, name, epochs=1)
        assert fused(trainer.optimizer) is one_pass
        courses.append(course(bundle, trainer)[0])
    for key, value in courses[1].items():
        # m/√v magnifies the rounding of a gradient that is itself near 0: a thousandth of a step of
        # 0.01.
        torch.testing.assert_close(courses[0][key], value, rtol=1e-4, atol=1e-5)


def test_a_distilled_checkpoint_is_resumed_by_plain_recbole(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    """The learner goes on in one pass there, which is torch's own option and none of ours."""
    bundle, first = make(folder, tmp_path, teacher_file, epochs=2)
    first.fit(bundle.train)  # without validation, every epoch is saved
    bundle = bundle_of(folder, tmp_path, epochs=4)
    plain = Trainer(bundle.config, build_model(bundle))
    plain.resume_checkpoint(first.saved_model_file)
    assert plain.start_epoch == 2
    assert same(state(plain.model), state(first.model))
    for own, other in zip(
        plain.optimizer.state_dict()["state"].values(),
        first.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(
            torch.equal(own[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq")
        )
    states = course(bundle, plain)
    assert len(states) == 2
    assert all(value.isfinite().all() for value in states[-1].values())
    steps = [int(entry["step"]) for entry in plain.optimizer.state_dict()["state"].values()]
    assert steps == [4 * len(bundle.train)] * len(steps)


def test_a_plain_checkpoint_is_resumed_with_distillation(
    folder: Path, tmp_path: Path, teacher_file: Path
) -> None:
    bundle = bundle_of(folder, tmp_path, epochs=1)
    plain = Trainer(bundle.config, build_model(bundle))
    plain.fit(bundle.train)
    bundle, second = make(folder, tmp_path, teacher_file, epochs=3)
    second.resume_checkpoint(plain.saved_model_file)
    second.fit(bundle.train, bundle.valid)
    assert [row["epoch"] for row in second.history.rows] == [1, 2]


# --- half precision -------------------------------------------------------------------------------

# LightGCN is not among the models: RecBole's own step fails in half precision, in torch's sparse
# products.
LOSSES_OF_ALL_KINDS: dict[str, dict[str, Any]] = {
    "rce": {},
    "ce": {"ce_top_k": 5},
    "fce": {"fce_top_k": 5},
    "cd": {"cd_items": 5},
    "rrd": {"rrd_top_k": 3, "rrd_rest": 5, "rrd_pool": 20},
}


@pytest.mark.parametrize("name", ["BPR", "NeuMF", "SimpleX", "MultiVAE"])
@pytest.mark.parametrize("loss", LOSSES_OF_ALL_KINDS)
def test_half_precision_is_no_other_run(
    folder: Path, tmp_path: Path, teacher_file: Path, name: str, loss: str
) -> None:
    """One for each way of scoring, and one whose user rows come out of a layer (SimpleX)."""
    settings = {"kd_loss": loss, "enable_scaler": True, **LOSSES_OF_ALL_KINDS[loss]}
    if name == "SimpleX":
        settings["embedding_size"] = 8
    rows = []
    for half in (False, True):
        bundle, trainer = make(
            folder, tmp_path, teacher_file, name, epochs=2, enable_amp=half, **settings
        )
        assert trainer.enable_amp is half
        trainer.fit(bundle.train, bundle.valid, saved=False)
        rows.append(trainer.history.rows[-1])
        assert all(value.isfinite().all() for value in state(trainer.model).values())
    # bfloat16 rounds by 2^-8 = 0.4 %; a few such roundings on the way.
    for key in ("base_loss", "kd_loss"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=0.03)
