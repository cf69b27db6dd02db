"""RecBole's trainers, distilling.

``DistillTrainer(config, model, teacher)`` replaces ``Trainer(config, model)``; for models with a
trainer of their own,
:func:`distill_trainer` makes the distilling version of that. RecBole's ``fit`` runs unchanged: the
KD term enters through the model's ``calculate_loss``, which is wrapped while ``fit`` runs (a
``loss_func`` handed to ``_train_epoch`` is dropped by several of RecBole's trainers).
"""

from __future__ import annotations

import copy
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from recbole.trainer import Trainer
from recbole.utils import ModelType, get_local_time, get_trainer, set_color

from recbole_rcekd.compat import without_anomaly_detection
from recbole_rcekd.compat.loading import fast_batches
from recbole_rcekd.core.distributed import Ranks, note_checkpoint
from recbole_rcekd.core.errors import KDError, ScoringError, SettingsError
from recbole_rcekd.core.files import replacing
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.models.scorer import ModelScorer, require_rankable
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.load import as_teacher, require_no_name
from recbole_rcekd.teachers.trajectory import Trajectory
from recbole_rcekd.training.distiller import Distiller
from recbole_rcekd.training.history import History
from recbole_rcekd.training.kd_terms import KDTermBuilder, Term
from recbole_rcekd.training.run_settings import RunSettings, overrides_for


class RecordingMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """What every run here adds to a RecBole trainer: own file names, whole files, a history.

    RecBole names checkpoints to the second, so two runs started together overwrite each other's;
    and a run stopped while it saves leaves half a file. Here names are unique, and a checkpoint
    replaces the last one when it is whole. Of several processes the first names the checkpoint and
    writes; none reads it before it is there.

    Attributes:
        history: one row per epoch; ``history.file`` is beside the checkpoint unless changed.
        trajectory: keeps earlier checkpoints, if set.
        ranks: this process among those that train the model.
    """

    run_label = "scratch"
    config: Any
    optimizer: Any

    def __init__(self, config: Any, model: Any) -> None:
        os.makedirs(
            config["checkpoint_dir"], exist_ok=True
        )  # RecBole's own way fails if two runs do it at once
        super().__init__(config, model)
        self.ranks = Ranks.of(config)
        name = f"{config['model']}-{self.run_label}-{get_local_time()}-{uuid.uuid4().hex[:6]}"
        name = self.ranks.broadcast(name)
        self.saved_model_file = str(Path(self.checkpoint_dir) / f"{name}.pth")
        self.history = History(
            Path(self.checkpoint_dir) / f"{name}.history.csv" if self.ranks.first else None
        )
        self.trajectory: Trajectory | None = None

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        if not self.ranks.first:
            return
        elsewhere = kwargs.pop("saved_model_file", None)
        wanted = elsewhere or self.saved_model_file
        config = self.config
        if not config["single_spec"]:
            # It would make one process that opens the checkpoint look for the others.
            self.config = copy.deepcopy(config)
            self.config["single_spec"] = True
        written = False
        try:
            with replacing(wanted) as beside:
                super()._save_checkpoint(
                    epoch, verbose=False, saved_model_file=str(beside), **kwargs
                )
                written = beside.exists()
        finally:
            self.config = config
        if not written:
            return
        if elsewhere is None:
            note_checkpoint(wanted)
            if self.trajectory is not None:
                self.trajectory.best = epoch
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {wanted}")

    def _begin_epoch(self, epoch_idx: int, n_steps: int) -> None:
        """Called before the epoch's first batch, inside its measured time."""

    def _end_epoch(self, epoch_idx: int, n_steps: int) -> dict[str, float]:
        """Called after its last batch, inside its measured time; what it returns goes into the history."""
        return {}

    def _train_epoch(self, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.history.begin(epoch_idx)
        started, n_steps = perf_counter(), len(train_data)
        self._begin_epoch(epoch_idx, n_steps)
        with fast_batches(train_data), without_anomaly_detection():
            losses = super()._train_epoch(train_data, epoch_idx, *args, **kwargs)
        found = self._end_epoch(epoch_idx, n_steps)
        total = float(sum(losses) if isinstance(losses, tuple) else losses)
        loss = self.ranks.mean({"train_loss": total / max(1, n_steps)})
        self.history.note(train_seconds=perf_counter() - started, **loss, **found)
        if self.trajectory is not None:
            self.trajectory.add(
                epoch_idx,
                lambda file: self._save_checkpoint(epoch_idx, False, saved_model_file=file),
            )
        return losses

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        started = perf_counter()
        score, result = super()._valid_epoch(valid_data, show_progress=show_progress)
        self.history.note(
            valid_seconds=perf_counter() - started,
            **{f"valid_{k}": float(v) for k, v in result.items()},
        )
        return score, result

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """As RecBole's; the checkpoint to load is there."""
        if load_best_model:
            self.ranks.barrier()
        return super().evaluate(eval_data, load_best_model, *args, **kwargs)


class DistillMixin(RecordingMixin):
    """Adds ``Σ λ · KD`` to the loss of whatever RecBole trainer it is mixed into.

    Args:
        config: the student's stock RecBole Config; KD keys that it lacks take their shipped
            defaults.
        model: the student, a stock RecBole model.
        teacher: from :func:`~recbole_rcekd.teachers.load.load_teacher`, or any
            :class:`~recbole_rcekd.core.types.TeacherScores` in the student's ids; ``None`` for
              methods that need none.
        seed: of the draws; the Config's ``seed`` unless given.
        settings: the KD settings; default: those in the Config.

    Attributes:
        kd_losses: the losses of the method, by name.
        terms: of the total loss, while ``fit`` runs.

    Raises:
        SettingsError: a KD key is unknown or has a wrong value.
        ScoringError: the model cannot be a student.
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        teacher: Teacher | TeacherScores | None,
        seed: int | None = None,
        settings: RunSettings | None = None,
    ) -> None:
        settings = settings or RunSettings.read(config)
        self.kd_settings, self.kd_losses = settings.common, settings.build_losses()
        self.run_label = settings.method.file_name
        for key, value in overrides_for(settings.method, config).items():  # rce_learning_rate
            config[key] = value
        require_rankable(type(model))
        require_no_name(teacher)
        if config["MODEL_TYPE"] == ModelType.TRADITIONAL:
            raise ScoringError(
                f"{config['model']} is not trained by gradient: it can teach, but not learn."
            )
        if teacher is None and any(loss.needs_teacher for loss in self.kd_losses.values()):
            raise SettingsError(
                f"[teacher] is missing: {' + '.join(self.kd_losses)} learns from one."
            )
        super().__init__(config, model)
        self.teacher = teacher
        self.seed = int(config["seed"] if seed is None else seed)
        self.terms: list[Term] = []
        self._n_own_groups = len(self.optimizer.param_groups)
        self._resumed = ""
        replaced = any(loss.replaces_base for loss in self.kd_losses.values())
        self._base_weight = 0.0 if replaced else self.kd_settings.kd_base_weight
        self._kd_sums: list[torch.Tensor] = []
        self._base_sum = torch.zeros(())
        self._refresh_seconds = 0.0
        if any(loss.weight != 0.0 for loss in self.kd_losses.values()):
            update_in_one_pass(self.optimizer)

    @property
    def distiller(self) -> Distiller | None:
        """Of the first term, while ``fit`` runs."""
        return self.terms[0].distiller if self.terms else None

    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> Any:
        """Train as RecBole does, with the KD terms; arguments and result are RecBole's."""
        with self.distilling(train_data, bool(kwargs.get("show_progress", False))):
            return super().fit(train_data, *args, **kwargs)

    @contextmanager
    def distilling(self, train_data: Any, show_progress: bool = False) -> Iterator[Distiller]:
        """While this lasts, the model's ``calculate_loss`` includes the KD terms."""
        dataset = train_data._dataset
        teacher = as_teacher(self.teacher, dataset)
        for part in teacher.parts:
            part.require_data(dataset)
        scorer = ModelScorer(self.model, dataset, trainable=True)
        builder = KDTermBuilder(
            scorer,
            dataset,
            teacher,
            self.kd_settings,
            self.seed,
            self.ranks,
            int(self.epochs),
            show_progress,
        )
        self.terms = builder.terms(self.kd_losses)
        self._kd_sums = [torch.zeros((), device=self.device) for _ in self.terms]
        recording, row_ids = builder.recording(self.terms)
        # Other processes' gradients are averaged by a code that expects dense ones.
        sparse = scorer.sparse_gradients() if self.ranks.world == 1 else nullcontext()
        with (
            self._learning_parts_of_losses(),
            sparse,
            row_ids,
            scorer.shared_forward() as clear_step_memory,
        ):
            self._wrap_loss(recording, clear_step_memory)
            try:
                yield self.terms[0].distiller
            finally:
                delattr(self.model, self._loss_name)

    @contextmanager
    def _learning_parts_of_losses(self) -> Iterator[None]:
        """While this lasts, what the losses have of their own is learned as the model is."""
        self._read_parts()
        parts = list(
            dict.fromkeys(p for term in self.terms for p in term.distiller.loss.parameters())
        )
        groups = self.optimizer.param_groups
        self._n_own_groups = len(groups)
        if parts:
            self.optimizer.add_param_group({**groups[0], "params": parts})
        try:
            yield
        finally:
            del groups[self._n_own_groups :]
            for part in parts:
                self.optimizer.state.pop(part, None)

    def _read_parts(self) -> None:
        """Of a run that is resumed: what its losses had learned. Their optimizer's state begins anew."""
        file = parts_file(self._resumed) if self._resumed else None
        if file is None or not file.exists():
            return
        learned = torch.load(file, map_location=self.device, weights_only=True)
        for term in self.terms:
            if term.name in learned:
                try:
                    term.distiller.loss.load_state_dict(learned[term.name])
                except RuntimeError as error:
                    raise SettingsError(
                        f"[{file}] was learned with other settings of {term.name} than these: "
                        "resume with the same, or remove the file to let these parts begin anew."
                    ) from error

    def resume_checkpoint(self, resume_file: Any) -> None:
        """As RecBole's; what the losses had learned is read, too, when ``fit`` begins."""
        super().resume_checkpoint(resume_file)
        self._resumed = str(resume_file)

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """As ever; what the losses learned lies beside the checkpoint, in ``<name>.kd.pth``, and never in it."""
        optimizer = self.optimizer
        self.optimizer = _OwnGroups(optimizer, self._n_own_groups)
        try:
            super()._save_checkpoint(epoch, verbose, **kwargs)
        finally:
            self.optimizer = optimizer
        learned = {
            term.name: part for term in self.terms if (part := term.distiller.loss.state_dict())
        }
        if learned and self.ranks.first:
            with replacing(
                parts_file(kwargs.get("saved_model_file", self.saved_model_file))
            ) as beside:
                torch.save(learned, beside)

    def _wrap_loss(self, recording: Any, clear_step_memory: Any) -> None:
        original, base_weight, terms = (
            getattr(self.model, self._loss_name),
            self._base_weight,
            self.terms,
        )
        plain = base_weight == 1.0 and all(term.weight == 0.0 for term in terms)

        def calculate_loss(interaction: Any, *args: Any, **kwargs: Any) -> Any:
            clear_step_memory()
            if plain:
                # Nothing that could shift a random stream or a rounding: plain RecBole, bit for
                # bit.
                for term in terms:
                    term.distiller.steps += 1
                return original(interaction, *args, **kwargs)
            base: Any = None
            products = None
            if base_weight != 0.0:
                with recording(interaction) as products:
                    base = original(interaction, *args, **kwargs)
            parts = [term.distiller.step(interaction, products or []) for term in terms]
            clear_step_memory()
            for place, part in enumerate(parts):
                self._kd_sums[place] += part.detach()
            kd: Any = sum(term.weight * part for term, part in zip(terms, parts, strict=True))
            if base is None:
                # A step without anybody to teach has no gradient, but RecBole asks for one.
                return kd if kd.requires_grad else kd.requires_grad_()
            self._base_sum += sum(
                each.detach().sum() for each in (base if isinstance(base, tuple) else (base,))
            )
            if base_weight != 1.0:
                base = (
                    tuple(base_weight * each for each in base)
                    if isinstance(base, tuple)
                    else base_weight * base
                )
            if isinstance(base, tuple):
                # To the first term: NCL drops the last ones while it warms up.
                return (base[0] + kd, *base[1:])
            return base + kd

        setattr(self.model, self._loss_name, calculate_loss)

    @property
    def _loss_name(self) -> str:
        """The method with the loss of recommending: MKR's trainer does not call ``calculate_loss``."""
        return "calculate_rs_loss" if hasattr(self.model, "calculate_rs_loss") else "calculate_loss"

    def _begin_epoch(self, epoch_idx: int, n_steps: int) -> None:
        if not self.terms:
            raise KDError("Distillation begins in fit(); an epoch was started without it.")
        self._kd_sums = [torch.zeros((), device=self.device) for _ in self.terms]
        self._base_sum = torch.zeros((), device=self.device)
        started = perf_counter()
        for term in self.terms:
            term.distiller.begin_epoch(epoch_idx, n_steps)
        self._refresh_seconds = perf_counter() - started

    def _end_epoch(self, epoch_idx: int, n_steps: int) -> dict[str, float]:
        steps = self.terms[0].distiller.steps if self.terms else 0
        if steps == 0 and self._teaches_graph_only(epoch_idx):
            return {}
        if steps == 0:
            raise KDError(
                f"{type(self.model).__name__}'s trainer ran an epoch without one distillation "
                "step: it does not call calculate_loss. Please report this model; its result would "
                "be an undistilled student."
            )
        means = [float(total) / steps for total in self._kd_sums]
        found = {"base_loss": float(self._base_sum) / steps, "kd_loss": means[0]}
        for term, mean in zip(self.terms[1:], means[1:], strict=True):
            of_first = term.name == f"{self.terms[0].name}_of_vectors"
            found["kd_loss_of_vectors" if of_first else f"kd_loss_{term.name}"] = mean
        for term in reversed(self.terms):
            found |= term.distiller.diagnostics()
        found = self.ranks.mean({**found, "refresh_seconds": self._refresh_seconds})
        shown = ", ".join(
            f"{set_color(name, 'blue')}: {value:.4f}" for name, value in found.items()
        )
        self.logger.info(set_color(f"epoch {epoch_idx} distilling", "green") + f" [{shown}]")
        for name, value in found.items():
            self.tensorboard.add_scalar(f"KD/{name}", value, epoch_idx)
        self.wandblogger.log_metrics(
            {"epoch": epoch_idx, **{f"kd/{k}": v for k, v in found.items()}}, head="train"
        )
        return found

    def _teaches_graph_only(self, epoch_idx: int) -> bool:
        """Whether RecBole's trainer of knowledge-aware models spends this epoch on the knowledge graph alone (KTUP)."""
        rec, graph = (getattr(self, f"train_{part}_step", None) for part in ("rec", "kg"))
        return rec is not None and graph is not None and epoch_idx % (rec + graph) >= rec


def update_in_one_pass(optimizer: torch.optim.Optimizer) -> None:
    """Adam's update by torch's own one-pass kernel instead of eight passes over the tables: a fifth of an epoch.

    The same formula with other roundings, so it is left alone where a run must equal plain
    RecBole's bit for bit.
    """
    if type(optimizer) is torch.optim.Adam:
        for group in optimizer.param_groups:
            if all(
                p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"]
            ):
                group.update(fused=True, foreach=False)


def parts_file(checkpoint: str | os.PathLike[str]) -> Path:
    """Where what the losses of a run learned lies: ``model.pth`` → ``model.kd.pth``."""
    return Path(checkpoint).with_suffix(".kd.pth")


class _OwnGroups:
    """The first groups of an optimizer, as the optimizer of a checkpoint: those of the model itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, n: int) -> None:
        self._optimizer, self._n = optimizer, n

    def state_dict(self) -> dict[str, Any]:
        content = self._optimizer.state_dict()
        groups = content["param_groups"][: self._n]
        places = {place for group in groups for place in group["params"]}
        state = {place: value for place, value in content["state"].items() if place in places}
        return {"state": state, "param_groups": groups}


class DistillTrainer(DistillMixin, Trainer):  # type: ignore[misc]
    """``Trainer(config, model)`` that distils: ``DistillTrainer(config, model, teacher)``.

    For every model that RecBole trains with its plain ``Trainer`` (BPR, LightGCN, NeuMF, MultiVAE,
    …).

    Raises:
        KDError: the model has a trainer of its own in RecBole; use :func:`distill_trainer` then.

    Example:
        >>> teacher = load_teacher("saved/BPR-teacher.pth", train_data)  # doctest: +SKIP
        >>> trainer = DistillTrainer(config, model, teacher)  # doctest: +SKIP
        >>> best_valid_score, best_valid_result = trainer.fit(train_data, valid_data)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        teacher: Teacher | TeacherScores | None,
        seed: int | None = None,
        settings: RunSettings | None = None,
    ) -> None:
        own = get_trainer(config["MODEL_TYPE"], config["model"])
        if own is not Trainer:
            raise KDError(
                f"RecBole trains {config['model']} with {own.__name__}; write "
                "distill_trainer(config)(config, model, teacher) instead of DistillTrainer(config, "
                "model, teacher)."
            )
        super().__init__(config, model, teacher, seed, settings)


def distill_trainer(config: Any) -> type[DistillMixin]:
    """The distilling version of the trainer that RecBole picks for ``config["model"]``."""
    own = get_trainer(config["MODEL_TYPE"], config["model"])
    return (
        DistillTrainer
        if own is Trainer
        else type(f"Distill{own.__name__}", (DistillMixin, own), {})
    )


def recording_trainer(config: Any) -> type[RecordingMixin]:
    """RecBole's own trainer for ``config["model"]``, with a history and file names of its own."""
    own = get_trainer(config["MODEL_TYPE"], config["model"])
    return type(f"Recording{own.__name__}", (RecordingMixin, own), {})
