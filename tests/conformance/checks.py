"""What is tried with every model: to be a teacher, and to be a student.

The result is an :class:`Outcome`, found by running the model. An error that is not one of this
package, or is longer than one line, is a failure of the suite.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recbole_rcekd import KDError, distill_trainer, load_teacher
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.data.contexts import is_sequential
from recbole_rcekd.models import MODELS
from recbole_rcekd.training.sequence_distiller import SequenceDistiller
from recbole_rcekd.training.user_distiller import UserDistiller
from tests.conformance.facts import ImpossibleError, forget, prepare, rank_all, reason, train_plain
from tests.conformance.models import (
    STUDENT_OF,
    TEACHER_OF,
    Model,
    data_settings,
    registry,
    settings_of,
)
from tests.helpers import Bundle, build, build_model, inside, save_untrained

# isort: split
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform

# Short lists for sixty items, and a weight that makes the KD term larger than base losses that are
# sums over the batch.
KD: dict[str, Any] = {
    "rce_top_k": 5,
    "rce_samples": 5,
    "rce_pool": 20,
    "rce_weight": 1000.0,
    "kd_diagnostic_users": 8,
    "kd_refresh_epochs": 1,
}
EPOCHS = 10
# A new student and a hardly trained teacher both score all items about the same, so there would be
# nothing to learn. So noise of this size is added to the student's weights.
ASTRAY = 0.1
# The size of the random scores of a teacher
STUBBORN = 0.7
WORKS = "works"


@dataclass
class Outcome:
    """The result of a try.

    Attributes:
        status: ``works``, ``teacher only``, ``refused``, ``not possible`` or ``failed``.
        note: the reason in one line, if it does not work.
        scored: how the model is scored: ``product``, ``rows`` or ``pairs``.
        kd: the KD loss on the candidates of the first epoch, before and after training.
        users: for a sequential teacher, the result with a general student, for which it scores
            each user's whole sequence.
        checkpoint: the student's checkpoint, to be opened by plain RecBole.
        test_result: the metrics that plain RecBole must then find.
    """

    status: str
    note: str = ""
    scored: str = ""
    kd: list[float] = field(default_factory=list)
    users: str = ""
    checkpoint: str = ""
    test_result: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class WrongError(Exception):
    """A check failed."""


def _outcome(attempt: Callable[[Outcome], None]) -> Outcome:
    found = Outcome(WORKS)
    try:
        attempt(found)
    except ImpossibleError as error:
        found.status, found.note = "not possible", str(error)
    except ModuleNotFoundError as error:
        # Some models import what they need only when they are trained.
        found.status, found.note = "not possible", reason(error)
    except KDError as error:
        found.status, found.note = "refused", str(error)
        if "\n" in found.note:
            found.status, found.note = "failed", f"an error of more than one line: {found.note!r}"
        elif (
            "has no gradient through its scores" in found.note
            or "can teach, but not learn" in found.note
        ):
            found.status = "teacher only"
    except (Exception, SystemExit) as error:
        found.status, found.note = "failed", f"{type(error).__name__}: {error}"
    return found


def as_teacher(model: Model, folder: Path) -> Outcome:
    """Train the model in plain RecBole; let it teach a small student of its own kind."""

    def attempt(found: Outcome) -> None:
        settings = prepare_or_give_up(model, folder)
        bundle, path = _plain_teacher(model, settings, folder)
        student = registry()[STUDENT_OF[model.package]]
        taught = build(folder, student.name, **_for_pair(student, model), epochs=EPOCHS, **KD)
        teacher: Any = load_teacher(path, taught.train)
        with _hidden(settings.get("pre_model_path")):  # must not be opened again
            _, used = _distil(found, taught, teacher, folder)
            found.scored = teacher.scorer.kind
        _require_same_scores(found, bundle, _plain_model(bundle, path), taught, used)

    return _outcome(attempt)


def as_teacher_of_users(model: Model, folder: Path) -> Outcome:
    """Let a sequential model teach a general one.

    It is asked once for each user, with the whole training sequence.
    """

    def attempt(found: Outcome) -> None:
        bundle, path = _plain_teacher(model, prepare_or_give_up(model, folder), folder)
        taught = build(folder, "BPR", **_for_pair(registry()["BPR"], model), epochs=EPOCHS, **KD)
        teacher: Any = load_teacher(path, taught.train)
        _, used = _distil(found, taught, teacher, folder)
        found.scored = teacher.scorer.kind
        # In plain RecBole with one validation item per user, the row of that item has the whole
        # training sequence.
        plain, rows = _plain_model(bundle, path), bundle.valid._dataset
        users = _translated(
            rows, taught.train._dataset, rows.uid_field, rows.inter_feat[rows.uid_field]
        )
        wanted = _scores_of_rows(bundle, plain, _as_loaded(bundle, rows, torch.arange(len(rows))))
        _require_same_as(found, bundle, plain, taught, used, users, wanted)

    return _outcome(attempt)


def as_student_of_users(model: Model, folder: Path) -> Outcome:
    """Let a general model, which knows users only, teach a sequential one."""

    def attempt(found: Outcome) -> None:
        general = registry()["BPR"]
        own = prepare_or_give_up(model, folder)
        path = _stubborn_teacher(general, _for_pair(general, model), folder)
        taught = build(
            folder,
            model.name,
            **{**own, "epochs": EPOCHS, "checkpoint_dir": str(folder / "saved"), **KD},
        )
        trainer, _ = _distil(found, taught, load_teacher(path, taught.train), folder)
        found.scored = trainer.distiller._scorer.kind

    return _outcome(attempt)


def as_student(model: Model, folder: Path) -> Outcome:
    """Let a simple model of the same kind teach it; plain RecBole opens the checkpoint later."""

    def attempt(found: Outcome) -> None:
        teacher_model = registry()[TEACHER_OF[model.package]]
        path = _stubborn_teacher(teacher_model, _for_pair(teacher_model, model), folder)
        own = prepare_or_give_up(model, folder)
        settings = {**own, "epochs": EPOCHS, "checkpoint_dir": str(folder / "saved"), **KD}
        try:
            taught = build(folder, model.name, **settings)
            build_model(taught)
        except (Exception, SystemExit) as error:
            raise ImpossibleError(reason(error)) from error
        teacher = load_teacher(path, taught.train)
        try:
            trainer, _ = _distil(found, taught, teacher, folder)
        except KDError:
            raise
        except Exception:
            # If plain RecBole cannot train it either, this raises its error.
            _plain_teacher(model, own, folder)
            raise
        found.scored = trainer.distiller._scorer.kind
        _require_scorer_is_the_model(found, taught, trainer)
        with inside(folder):
            found.test_result = {k: float(v) for k, v in trainer.evaluate(taught.test).items()}
        found.checkpoint = trainer.saved_model_file

    return _outcome(attempt)


def prepare_or_give_up(model: Model, folder: Path) -> dict[str, Any]:
    """The settings of a model; what fails here fails in plain RecBole."""
    try:
        return prepare(model, folder)
    except (Exception, SystemExit) as error:
        raise ImpossibleError(reason(error)) from error


@contextmanager
def _hidden(path: str | None) -> Iterator[None]:
    """Within the block, the file does not exist."""
    if path is None:
        yield
        return
    away = Path(path).rename(f"{path}.away")
    try:
        yield
    finally:
        away.rename(path)


def _for_pair(model: Model, other: Model) -> dict[str, Any]:
    """The settings of a model with the data of another."""
    return {**settings_of(model), **data_settings(other)}


def _plain_teacher(model: Model, settings: dict[str, Any], folder: Path) -> tuple[Bundle, Path]:
    """A teacher trained in plain RecBole, made once for the same settings.

    It trains two epochs, or more if the settings say so.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[
        :12
    ]
    path = folder / "teachers" / f"{model.name}-{key}.pth"
    try:
        bundle = build(folder, model.name, **{"epochs": 2, **settings})
        if not path.exists():
            train_plain(bundle, path)
    except (Exception, SystemExit) as error:
        raise ImpossibleError(reason(error)) from error
    return bundle, path


def _stubborn_teacher(model: Model, settings: dict[str, Any], folder: Path) -> Path:
    """A teacher with random scores, which can only be learned from it and not from the data."""
    try:
        bundle = build(folder, model.name, **settings)
        path = folder / "teachers" / f"{model.name}-stubborn.pth"
        save_untrained(bundle, path, _astray(build_model(bundle), STUBBORN))
    except (Exception, SystemExit) as error:
        raise ImpossibleError(reason(error)) from error
    return path


def _plain_model(bundle: Bundle, path: Path) -> Any:
    """The model of a checkpoint, loaded by RecBole."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    model = build_model(bundle)
    model.load_state_dict(checkpoint["state_dict"])
    model.load_other_parameter(checkpoint.get("other_parameter"))
    return model.eval()


def _astray(model: Any, size: float = ASTRAY) -> Any:
    if not isinstance(model, torch.nn.Module):
        return model  # a tree
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def _distil(found: Outcome, bundle: Bundle, teacher: Any, folder: Path) -> tuple[Any, Any]:
    """Train a student; return the trainer, and the teacher scores that it learned from.

    The KD loss must fall. The candidates, and with them γ, change from epoch to epoch. So the loss
    is compared on the candidates of the first epoch, in evaluation mode, before the first step and
    after the last.
    """
    used: list[Any] = []
    sets: list[Any] = []
    open_original = type(teacher).open_scores
    originals = {kind: kind.begin_epoch for kind in (UserDistiller, SequenceDistiller)}

    def open_scores(*args: Any, **kwargs: Any) -> Any:
        used.append(open_original(*args, **kwargs))
        return used[-1]

    def begin_epoch(distiller: Any, epoch: int, n_steps: int) -> None:
        originals[type(distiller)](distiller, epoch, n_steps)
        if not sets:
            sets.append(_first_sets(distiller))
            found.kd.append(_kd_loss(distiller, sets[0]))

    # They may be from another version of the sources.
    shutil.rmtree(folder / "saved" / "teacher_scores", ignore_errors=True)
    with (
        inside(folder),
        mock.patch.object(type(teacher), "open_scores", open_scores),
        mock.patch.object(UserDistiller, "begin_epoch", begin_epoch),
        mock.patch.object(SequenceDistiller, "begin_epoch", begin_epoch),
    ):
        trainer: Any = distill_trainer(bundle.config)(
            bundle.config, _astray(build_model(bundle)), teacher
        )
        trainer.fit(bundle.train, bundle.valid, saved=True, show_progress=False)
    found.kd.append(_kd_loss(trainer.distiller, sets[0]))
    # KTUP trains its knowledge graph alone in some epochs.
    by_epoch = [float(row["kd_loss"]) for row in trainer.history.rows if "kd_loss" in row]
    if len(by_epoch) < EPOCHS / 2 or not all(
        math.isfinite(value) for value in (*by_epoch, *found.kd)
    ):
        raise WrongError(f"KD losses are {by_epoch}")
    before, after = found.kd
    if not after < before:
        raise WrongError(f"the KD loss does not fall: {before:.4f} before, {after:.4f} after")
    return trainer, used[0]


def _first_sets(distiller: Any) -> Any:
    """The candidates of all users, or of all rows."""
    if isinstance(distiller, UserDistiller):
        side: Any = distiller._sides[0]
        return side.sets.rows(torch.arange(len(side.contexts)))
    with preserved_random_state(), distiller._scorer.evaluating():
        rows = torch.arange(distiller._rows.n)
        batch = distiller._rows.inputs(rows)
        lists = distiller._lists(batch, rows, distiller._scorer.score_batch(batch, []))
        return distiller.loss.select(lists)


def _kd_loss(distiller: Any, sets: Any) -> float:
    with preserved_random_state(), distiller._scorer.evaluating():
        torch.manual_seed(7)
        if isinstance(distiller, UserDistiller):
            side: Any = distiller._sides[0]
            scores = side.score(side.contexts, sets.items)
        else:
            batch = distiller._rows.inputs(torch.arange(distiller._rows.n))
            scores = distiller._scorer.score_batch(batch, []).score(sets.items)
        return round(float(distiller.loss.forward(scores, sets).mean()), 6)


def _inputs(bundle: Bundle, contexts: Tensor) -> Any:
    """The model's inputs in RecBole's evaluation: rows of a sequential training set, else users."""
    dataset = bundle.train._dataset
    if is_sequential(dataset):
        return _as_loaded(bundle, dataset, contexts)
    return dataset.join(Interaction({dataset.uid_field: contexts}))


def _as_loaded(bundle: Bundle, dataset: Any, rows: Tensor) -> Any:
    return construct_transform(bundle.config)(dataset, dataset[rows])


def _scores_of_rows(bundle: Bundle, model: Any, rows: Any, seed: int = 7) -> Tensor:
    """The scores of the model itself, without any of our code."""
    forget(model)
    torch.manual_seed(seed)  # for the models that draw in evaluation
    with torch.no_grad():
        scores, _ = rank_all(model.eval(), rows, bundle.train._dataset)
    forget(model)
    return scores


def _own_scores(bundle: Bundle, model: Any, contexts: Tensor, seed: int = 7) -> Tensor:
    return _scores_of_rows(bundle, model, _inputs(bundle, contexts), seed)


def _contexts(bundle: Bundle) -> Tensor:
    """Every row of a sequential training set, or every user of any other."""
    dataset = bundle.train._dataset
    if is_sequential(dataset):
        return torch.arange(len(dataset))
    return torch.arange(1, int(dataset.user_num))


def _translated(dataset: Any, other: Any, name: str, ids: Tensor) -> Tensor:
    """The ids in ``other`` of the same tokens."""
    tokens = dataset.id2token(name, ids)
    return torch.tensor(
        [other.token2id(name, str(token)) if str(token) != "[PAD]" else 0 for token in tokens]
    )


def _require_same_scores(
    found: Outcome, bundle: Bundle, model: Any, taught: Bundle, used: Any
) -> None:
    """All scores that the student learned from must be those of the teacher in plain RecBole."""
    own, other = taught.train._dataset, bundle.train._dataset
    contexts = _contexts(taught)
    if not is_sequential(own):
        rows = _inputs(bundle, _translated(own, other, own.uid_field, contexts))
    elif _same_rows(own, other):
        rows = _inputs(bundle, contexts)
    else:
        # HSTU has one row per user, so it reads the rows of the other model. That is right only if
        # the ids are the same, which is checked here.
        rows = _as_loaded(bundle, own, contexts)
        for name in (own.uid_field, own.iid_field):
            if list(own.field2id_token[name]) != list(other.field2id_token[name]):
                raise WrongError("teacher and student have other rows and other ids")
    _require_same_as(
        found, bundle, model, taught, used, contexts, _scores_of_rows(bundle, model, rows)
    )


def _same_rows(one: Any, other: Any) -> bool:
    """The same users and targets, in the same order."""
    return len(one) == len(other) and all(
        list(one.id2token(name, one.inter_feat[name]))
        == list(other.id2token(name, other.inter_feat[name]))
        for name in (one.uid_field, one.iid_field)
    )


def _require_same_as(
    found: Outcome,
    bundle: Bundle,
    model: Any,
    taught: Bundle,
    used: Any,
    contexts: Tensor,
    wanted: Tensor,
) -> None:
    """Teacher scores ``used`` of ``contexts`` must equal ``wanted``, in the teacher's own ids."""
    own = taught.train._dataset
    items = torch.arange(int(own.item_num))
    wanted = wanted[:, _translated(own, bundle.train._dataset, own.iid_field, items)]
    torch.manual_seed(7)
    got = used.score(contexts, items[1:].expand(len(contexts), -1))
    if not _draws(found, bundle, model):
        _require_close(got, wanted[:, 1:], "teacher scores")


def _draws(found: Outcome, bundle: Bundle, model: Any) -> bool:
    """Whether a model has other scores each time, so that there is nothing to compare.

    If so, the outcome notes it.
    """
    contexts = _contexts(bundle)
    first, second = (
        _own_scores(bundle, model, contexts),
        _own_scores(bundle, model, contexts, seed=8),
    )
    draws = not torch.allclose(first, second, rtol=1e-4, atol=1e-4)
    if draws:
        found.note = "it draws its scores anew each time it is asked; they were not compared"
    return draws


def _require_scorer_is_the_model(found: Outcome, taught: Bundle, trainer: Any) -> None:
    scorer = trainer.distiller._scorer
    contexts = _contexts(taught)
    wanted = _own_scores(taught, trainer.model, contexts)[:, 1:]
    items = torch.arange(1, wanted.shape[1] + 1).expand(len(contexts), -1)
    answers: dict[str, Callable[[], Tensor]] = {
        "scores of chosen items": lambda: scorer.score(contexts, items),
        "scores of all items": lambda: scorer.score_all(contexts)[:, 1:],
    }
    if is_sequential(taught.train._dataset):
        answers["scores of a batch"] = lambda: scorer.score_batch(
            _inputs(taught, contexts), []
        ).score(items)
    if _draws(found, taught, trainer.model):
        return
    for what, answer in answers.items():
        with scorer.evaluating():
            torch.manual_seed(7)
            _require_close(answer(), wanted, what)


def _require_close(got: Tensor, wanted: Tensor, what: str) -> None:
    if got.shape != wanted.shape or not torch.allclose(
        got.float(), wanted.float(), rtol=1e-4, atol=1e-4
    ):
        far = f"{float((got - wanted).abs().max()):.2g}" if got.shape == wanted.shape else "shape"
        raise WrongError(f"{what} differ from the model's own ({far})")


# --- plain RecBole, in a process that cannot import this package ----------------------------------

PLAIN = """
import json, sys
if sys.argv.pop(1) == "plain":
    sys.modules["recbole_rcekd"] = None  # importing it is an error now
else:
    import recbole_rcekd  # HSTU and VBPR
import numpy as np, torch
kinds = {"float": float, "int": int, "long": int, "bool": bool, "object": object, "str": str}
kinds["complex"] = complex
for name, value in kinds.items():
    setattr(np, name, value)
load = torch.load
torch.load = lambda *args, **kwargs: load(*args, **{"weights_only": False, **kwargs})
files = sys.argv[1:]
del sys.argv[1:]
from recbole.quick_start import load_data_and_model
from recbole.utils import get_trainer
for file in files:
    try:
        config, model, dataset, train, valid, test = load_data_and_model(file)
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        result = trainer.evaluate(test, load_best_model=False)
        found = {key: float(value) for key, value in result.items()}
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    print("PLAIN", json.dumps([file, found]), flush=True)
"""


def open_in_plain_recbole(checkpoints: dict[str, str], place: Path) -> dict[str, Any]:
    """For each model the test metrics of its checkpoint, or the error.

    RecBole's models are opened in a process without this package, our models in one that imports it
    first.
    """
    found: dict[str, Any] = {}
    for way in ("plain", "own"):
        names = [name for name in checkpoints if (name in MODELS) == (way == "own")]
        if names:
            opened = _open([checkpoints[name] for name in names], way, place)
            found |= {name: opened[checkpoints[name]] for name in names}
    return found


def _open(checkpoints: list[str], way: str, place: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, way, *checkpoints]
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=900, check=False
    )
    found: dict[str, Any] = dict(
        json.loads(line.removeprefix("PLAIN "))
        for line in done.stdout.splitlines()
        if line.startswith("PLAIN ")
    )
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {file: found.get(file, last) for file in checkpoints}


def judge_plain(found: Outcome, plain: Any) -> None:
    """Plain RecBole must find the same metrics for a student that works."""
    if plain != found.test_result:
        found.status, found.note = (
            "failed",
            f"plain RecBole gives {plain}, distillation gave {found.test_result}",
        )
