"""What each model can do in plain RecBole on the world dataset, and what it reads.

RecBole is used with the repairs of :mod:`recbole_rcekd.compat`, but without any distillation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.conformance.models import STAGES, Model, Settings, settings_of, shipped
from tests.helpers import Bundle, build, build_model, inside

# isort: split
from recbole.data.interaction import Interaction
from recbole.utils import get_trainer


class ImpossibleError(Exception):
    """Plain RecBole cannot do it; the message says why."""


@dataclass
class Facts:
    """The facts about one model.

    Attributes:
        impossible: why plain RecBole cannot train it or rank with it; empty if it can.
        model_type: RecBole's ``ModelType``.
        input_type: whether batches are pointwise (labels) or pairwise (a negative beside each
            positive).
        trainer: RecBole's trainer class for it.
        loss_types: which of ``CE`` and ``BPR`` it can train with, if it has a ``loss_type``.
        through_calculate_loss: whether its trainer calls ``calculate_loss``.
        scored_by: ``full_sort_predict`` or ``predict``, the one that evaluation calls.
        gradient: whether its scores have a gradient in training mode.
        reads_to_score: columns of an interaction that scoring reads.
        reads_to_train: columns of an interaction that its loss reads.
        repeats: whether two evaluations give the same scores.
        alone: whether the scores of a row do not depend on the other rows of the batch.
        predict_agrees: whether ``predict`` gives the scores of the full sort.
    """

    impossible: str = ""
    model_type: str = ""
    input_type: str = ""
    trainer: str = ""
    loss_types: list[str] = field(default_factory=list)
    through_calculate_loss: bool = False
    scored_by: str = ""
    gradient: bool = False
    reads_to_score: list[str] = field(default_factory=list)
    reads_to_train: list[str] = field(default_factory=list)
    repeats: bool = True
    alone: bool = True
    predict_agrees: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def reason(error: BaseException) -> str:
    """One line on what went wrong in RecBole, and where."""
    if isinstance(error, ModuleNotFoundError):
        return f"needs {(error.name or str(error)).split('.')[0]}"
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/recbole/" in file:
            place = f" ({file.split('/recbole/')[-1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    words = " ".join(str(error).split()) or "no message"
    return f"fails in plain RecBole: {type(error).__name__}: {words[:160]}{place}"


def prepare(model: Model, folder: Path, **overrides: Any) -> Settings:
    """The settings of a model; its earlier stages are trained first (S3Rec, RaCT, KD_DAGFM)."""
    settings = {**settings_of(model), **overrides}
    for stage in STAGES.get(model.name, []):
        place = folder / "stages" / "-".join(map(str, stage.values()))
        bundle = build(folder, model.name, **{**settings, **stage, "checkpoint_dir": str(place)})
        with inside(folder):
            trainer = get_trainer(bundle.config["MODEL_TYPE"], model.name)(
                bundle.config, build_model(bundle)
            )
            trainer.fit(bundle.train, bundle.valid, show_progress=False)
        settings["pre_model_path"] = settings["warm_up"] = str(trainer.saved_model_file)
    return settings


@contextmanager
def columns_read(seen: set[str]) -> Iterator[None]:
    """Note which columns of interactions are read."""
    original = Interaction.__getitem__

    def getitem(self: Any, index: Any) -> Any:
        if isinstance(index, str):
            seen.add(index)
        return original(self, index)

    Interaction.__getitem__ = getitem
    try:
        yield
    finally:
        Interaction.__getitem__ = original


def train_plain(bundle: Bundle, path: Path, seen: set[str] | None = None) -> tuple[Any, Any]:
    """Train in plain RecBole, save a checkpoint at ``path``, and return model and trainer.

    The columns that ``calculate_loss`` reads are added to ``seen``, and ``""`` if it was called.
    """
    model = build_model(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    if seen is not None:
        original = model.calculate_loss

        def calculate_loss(*args: Any, **kwargs: Any) -> Any:
            seen.add("")
            with columns_read(seen):
                return original(*args, **kwargs)

        model.calculate_loss = calculate_loss
    with inside(path.parent):
        trainer = get_trainer(bundle.config["MODEL_TYPE"], bundle.config["model"])(
            bundle.config, model
        )
        trainer.saved_model_file = str(path)
        trainer.fit(bundle.train, bundle.valid, saved=True, show_progress=False)
    vars(model).pop("calculate_loss", None)
    return model, trainer


def evaluation_rows(bundle: Bundle, n: int = 5) -> Any:
    """The first rows that RecBole's test loader gives."""
    interaction = next(iter(bundle.test))[0]
    return interaction[: min(n, len(interaction))]


def rank_all(model: Any, rows: Any, dataset: Any) -> tuple[torch.Tensor, str]:
    """Scores of all items ``[n, n_items]`` as in RecBole's evaluation, and the method used."""
    n_items = int(dataset.item_num)
    try:
        return model.full_sort_predict(rows).view(-1, n_items), "full_sort_predict"
    except NotImplementedError:
        return pairs(model, rows, dataset), "predict"


def pairs(model: Any, rows: Any, dataset: Any) -> torch.Tensor:
    """Scores of all items, one ``predict`` per cell, as in RecBole's `_full_sort_batch_eval`."""
    n_items = int(dataset.item_num)
    grid = rows.repeat_interleave(n_items)
    grid.update(dataset.get_item_feature().repeat(len(rows)))
    scores: torch.Tensor = model.predict(grid)
    return scores.view(-1, n_items)


def forget(model: Any) -> None:
    """Remove the propagated embeddings that some graph models keep after an evaluation."""
    for name in ("restore_user_e", "restore_item_e", "i_embedding"):
        if name in vars(model):
            setattr(model, name, None)


def find_facts(model: Model, folder: Path) -> Facts:
    """Train one epoch, evaluate, and find the facts."""
    facts = Facts()
    try:
        settings = prepare(model, folder)
        bundle = build(folder, model.name, **{**settings, "epochs": 1})
        config = bundle.config
        facts.model_type = config["MODEL_TYPE"].name
        facts.input_type = getattr(config["MODEL_INPUT_TYPE"], "name", "")
        trainer_class = get_trainer(config["MODEL_TYPE"], model.name)
        facts.trainer = trainer_class.__name__
        path = folder / "facts" / f"{model.name}.pth"
        if facts.model_type == "DECISIONTREE":
            _train_trees(trainer_class, bundle, folder)
            return facts
        seen: set[str] = set()
        trained, trainer = train_plain(bundle, path, seen)
        facts.through_calculate_loss = "" in seen
        facts.reads_to_train = sorted(seen - {""})
        if not path.exists():
            raise ImpossibleError("its trainer wrote no checkpoint")
        losses = [
            sum(loss) if isinstance(loss, tuple) else loss
            for loss in trainer.train_loss_dict.values()
        ]
        if not losses or not all(math.isfinite(loss) for loss in losses):
            raise ImpossibleError(f"its training loss is {losses}")
        result = trainer.evaluate(bundle.test)
        if not all(math.isfinite(value) for value in result.values()):
            raise ImpossibleError(f"its evaluation gives {result}")
        _look_at_scores(facts, trained, bundle)
    except (Exception, SystemExit) as error:
        facts.impossible = str(error) if isinstance(error, ImpossibleError) else reason(error)
        return facts
    if "loss_type" in shipped(model.name):
        facts.loss_types = [
            kind for kind in ("CE", "BPR") if _trains_with(model, settings, kind, folder)
        ]
    return facts


def _train_trees(trainer_class: Any, bundle: Bundle, folder: Path) -> None:
    with inside(folder):
        trainer = trainer_class(bundle.config, build_model(bundle))
        trainer.fit(bundle.train, bundle.valid, saved=True, show_progress=False)
        trainer.evaluate(bundle.test)


def _look_at_scores(facts: Facts, model: Any, bundle: Bundle) -> None:
    rows, dataset = evaluation_rows(bundle), bundle.train._dataset
    model.eval()
    seen: set[str] = set()
    with torch.no_grad():
        forget(model)
        with columns_read(seen):
            scores, facts.scored_by = rank_all(model, rows, dataset)
        facts.reads_to_score = sorted(seen)
        if scores.shape != (len(rows), dataset.item_num):
            raise ImpossibleError(f"its full sort has shape {tuple(scores.shape)}")
        again, _ = rank_all(model, rows, dataset)
        facts.repeats = torch.allclose(scores, again, atol=1e-5)
        single = torch.cat([rank_all(model, rows[n : n + 1], dataset)[0] for n in range(len(rows))])
        facts.alone = torch.allclose(scores, single, atol=1e-5)
        if facts.scored_by == "full_sort_predict":
            try:
                facts.predict_agrees = torch.allclose(
                    pairs(model, rows, dataset)[:, 1:], scores[:, 1:], atol=1e-4
                )
            except Exception:
                facts.predict_agrees = None
    forget(model)
    torch.nn.Module.train(model, True)
    try:
        with torch.enable_grad():
            facts.gradient = rank_all(model, rows, dataset)[0].requires_grad
    finally:
        forget(model)
        model.eval()


def _trains_with(model: Model, settings: Settings, kind: str, folder: Path) -> bool:
    negatives = None if kind == "CE" else {"distribution": "uniform", "sample_num": 1}
    try:
        bundle = build(
            folder,
            model.name,
            **{**settings, "loss_type": kind, "train_neg_sample_args": negatives, "epochs": 1},
        )
        seen: set[str] = set()
        _, trainer = train_plain(bundle, folder / "facts" / f"{model.name}-{kind}.pth", seen)
        if kind == "BPR" and not any(name.lower().startswith("neg_") for name in seen):
            return False  # the model ignores the setting
        return all(
            math.isfinite(sum(x) if isinstance(x, tuple) else x)
            for x in trainer.train_loss_dict.values()
        )
    except (Exception, SystemExit):  # the CPR models end the process
        return False
