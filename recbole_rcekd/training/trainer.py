"""RecBole's trainers with distillation.

``DistillTrainer(config, model, teacher)`` replaces ``Trainer(config, model)``. For models that
RecBole trains with another trainer, :func:`distill_trainer` makes the distilling version of that
trainer. RecBole's ``fit`` runs unchanged. The KD terms are added in the model's ``calculate_loss``,
which is replaced while ``fit`` runs. (Several of RecBole's trainers ignore the ``loss_func`` that
is passed to ``_train_epoch``.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recbole.trainer import Trainer
from recbole.utils import ModelType, get_trainer, set_color

from recbole_rcekd.compat.instances import loss_replaced, replaced
from recbole_rcekd.core.errors import KDError, ScoringError, SettingsError
from recbole_rcekd.core.files import replacing
from recbole_rcekd.core.types import TeacherScores
from recbole_rcekd.models.probe import require_rankable
from recbole_rcekd.models.product_recorder import Product
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.base import Teacher
from recbole_rcekd.teachers.load import as_teacher, require_teacher
from recbole_rcekd.training.distiller import Distiller
from recbole_rcekd.training.kd_terms import KDTermBuilder, Term
from recbole_rcekd.training.optimizer import OwnGroups, update_in_one_pass
from recbole_rcekd.training.recording import RecordingMixin
from recbole_rcekd.training.run_settings import RunSettings, overrides_for


class DistillMixin(RecordingMixin):
    """Adds ``Σ λ · KD`` to the loss of a RecBole trainer.

    Args:
        config: the student's RecBole Config; KD keys that it does not have get their defaults.
        model: the student, a RecBole model.
        teacher: from :func:`~recbole_rcekd.teachers.load.load_teacher`, or any
            :class:`~recbole_rcekd.core.types.TeacherScores` in the student's ids; ``None`` for
            methods that need no teacher.
        seed: the seed of the random draws; default: the Config's ``seed``.
        settings: the KD settings; default: those in the Config.

    Attributes:
        teacher: the teacher, as it was given.
        seed: the seed of the random draws.
        kd_settings: the settings that are common to all losses.
        kd_losses: the losses of the method, by name.
        terms: the KD terms, from when ``fit`` is called.

    Raises:
        SettingsError: a KD key is unknown or has a wrong value, or the teacher is missing.
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
        require_teacher(teacher)
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
        """The distiller of the first term; ``None`` before ``fit`` is called."""
        return self.terms[0].distiller if self.terms else None

    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> Any:
        """Train as RecBole's ``fit``, with the KD terms; arguments and result are the same."""
        with self.distilling(train_data, bool(kwargs.get("show_progress", False))):
            return super().fit(train_data, *args, **kwargs)

    @contextmanager
    def distilling(self, train_data: Any, show_progress: bool = False) -> Iterator[Distiller]:
        """While this lasts, the model's ``calculate_loss`` includes the KD terms.

        Args:
            train_data: the loader of the training data.
            show_progress: show a progress bar while the teacher's scores are computed.
        """
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
        # With several processes, the code that averages their gradients needs dense ones.
        sparse = scorer.sparse_gradients() if self.ranks.world == 1 else nullcontext()
        with (
            self._learning_parts_of_losses(),
            sparse,
            row_ids,
            scorer.shared_forward() as clear_step_memory,
            loss_replaced(self.model, self._with_kd(recording, clear_step_memory)),
        ):
            yield self.terms[0].distiller

    @contextmanager
    def _learning_parts_of_losses(self) -> Iterator[None]:
        """While this lasts, the optimizer also learns the parameters of the losses."""
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
        """Read the parameters that the losses of a resumed run had learned.

        The optimizer's state of these parameters is not kept; it begins anew.
        """
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
        """As RecBole's; the learned parameters of the losses are read too, when ``fit`` begins."""
        super().resume_checkpoint(resume_file)
        self._resumed = str(resume_file)

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Save the checkpoint, and the learned parameters of the losses in ``<name>.kd.pth``.

        The checkpoint has none of these, so it is one of plain RecBole.
        """
        own = OwnGroups(self.optimizer, self._n_own_groups)
        with replaced(self, "optimizer", own):
            super()._save_checkpoint(epoch, verbose, **kwargs)
        learned = {
            term.name: part for term in self.terms if (part := term.distiller.loss.state_dict())
        }
        if learned and self.ranks.first:
            file = parts_file(kwargs.get("saved_model_file", self.saved_model_file))
            with replacing(file) as beside:
                torch.save(learned, beside)

    def _with_kd(
        self, recording: Any, clear_step_memory: Callable[[], None]
    ) -> Callable[[Any], Any]:
        """A function that makes the total loss of the model's own ``calculate_loss``."""

        def total(own_loss: Any) -> Any:
            def calculate_loss(interaction: Any, *args: Any, **kwargs: Any) -> Any:
                clear_step_memory()
                if self._is_plain():
                    # Nothing else is computed, so the run is bitwise equal to plain RecBole.
                    for term in self.terms:
                        term.distiller.steps += 1
                    return own_loss(interaction, *args, **kwargs)
                base: Any = None
                products = None
                if self._base_weight != 0.0:
                    with recording(interaction) as products:
                        base = own_loss(interaction, *args, **kwargs)
                kd = self._kd_of_step(interaction, products or [])
                clear_step_memory()
                if base is None:
                    # Without users to teach in this step there is no gradient, but RecBole calls
                    # backward.
                    return kd if kd.requires_grad else kd.requires_grad_()
                return self._sum_of(base, kd)

            return calculate_loss

        return total

    def _is_plain(self) -> bool:
        """Whether the total loss is the model's own."""
        return self._base_weight == 1.0 and all(term.weight == 0.0 for term in self.terms)

    def _kd_of_step(self, batch: Any, products: list[Product]) -> torch.Tensor:
        """Σ λ · KD of a step; the KD losses are also added to the sums for the log."""
        parts = [term.distiller.step(batch, products) for term in self.terms]
        for i, part in enumerate(parts):
            self._kd_sums[i] += part.detach()
        pairs = zip(self.terms, parts, strict=True)
        kd: Any = sum(term.weight * part for term, part in pairs)
        return kd  # type: ignore[no-any-return]

    def _sum_of(self, base: Any, kd: torch.Tensor) -> Any:
        """The weighted base loss plus the KD loss; a tuple if the model has a tuple of losses."""
        several = isinstance(base, tuple)
        parts = base if several else (base,)
        self._base_sum += sum(each.detach().sum() for each in parts)
        if self._base_weight != 1.0:
            parts = tuple(self._base_weight * each for each in parts)
        # Added to the first loss of the tuple: NCL's trainer drops the last ones while it warms up.
        parts = (parts[0] + kd, *parts[1:])
        return parts if several else parts[0]

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
        """Whether RecBole trains only the knowledge graph in this epoch (KTUP)."""
        rec, graph = (getattr(self, f"train_{part}_step", None) for part in ("rec", "kg"))
        return rec is not None and graph is not None and epoch_idx % (rec + graph) >= rec


def parts_file(checkpoint: str | os.PathLike[str]) -> Path:
    """The file of the losses' learned parameters: ``model.kd.pth`` for ``model.pth``."""
    return Path(checkpoint).with_suffix(".kd.pth")


class DistillTrainer(DistillMixin, Trainer):  # type: ignore[misc]
    """RecBole's ``Trainer`` with distillation: ``DistillTrainer(config, model, teacher)``.

    It is for all models that RecBole trains with its plain ``Trainer`` (BPR, LightGCN, NeuMF,
    MultiVAE, …). The arguments are those of :class:`DistillMixin`.

    Raises:
        KDError: RecBole trains the model with another trainer; use :func:`distill_trainer` then.

    Example:
        >>> teacher = load_teacher("saved/BPR-teacher.pth", train_data)  # doctest: +SKIP
        >>> trainer = DistillTrainer(config, model, teacher)  # doctest: +SKIP
        >>> best_score, best_result = trainer.fit(train_data, valid_data)  # doctest: +SKIP
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
    """The distilling version of the trainer that RecBole chooses for ``config["model"]``."""
    own = get_trainer(config["MODEL_TYPE"], config["model"])
    return (
        DistillTrainer
        if own is Trainer
        else type(f"Distill{own.__name__}", (DistillMixin, own), {})
    )
