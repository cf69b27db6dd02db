"""Embedding distillation from end to end: a step, refused models, saved state, sums of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_rcekd import distill_trainer, load_teacher
from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.losses import FitNetLoss
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from recbole_rcekd.training.embedding_distiller import EmbeddingDistiller, _distinct
from recbole_rcekd.training.trainer import DistillMixin, parts_file
from tests.helpers import (
    Bundle,
    build,
    build_model,
    read_kd_settings,
    save_untrained,
    train_teacher,
    write_dataset,
)

# isort: split
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import get_trainer

State = dict[str, Tensor]
METHODS = ("fitnet", "vkd", "de")
TIME_ORDERED: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {
        "split": {"RS": [0.8, 0.1, 0.1]},
        "order": "TO",
        "group_by": "user",
        "mode": "full",
    },
}
SEQUENTIAL: dict[str, Any] = {
    **TIME_ORDERED,
    "kd_sequence_split": "interactions",
    "train_neg_sample_args": None,
    "MAX_ITEM_LIST_LENGTH": 6,
    "hidden_size": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "BPR": {"embedding_size": 4},
    "LightGCN": {"embedding_size": 4, "n_layers": 2},
    "NeuMF": {"mf_embedding_size": 4, "mlp_embedding_size": 4, "mlp_hidden_size": [4]},
    "SASRec": {**SEQUENTIAL, "inner_size": 8, "n_layers": 1, "n_heads": 2, "loss_type": "CE"},
    "HSTU": {**SEQUENTIAL, "n_heads": 2, "attention_dim": 3, "linear_dim": 5, "n_negatives": 7},
}
SMALL: dict[str, Any] = {
    "rce_top_k": 5,
    "rce_samples": 5,
    "rce_pool": 20,
    "de_experts": 3,
    "learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def teacher_file(folder: Path) -> Path:
    return train_teacher(folder, "BPR", embedding_size=7, learning_rate=0.02)


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bundle_of(folder: Path, model: str = "BPR", **settings: Any) -> Bundle:
    own = {
        **MODELS[model],
        **SMALL,
        "kd_loss": "fitnet",
        "checkpoint_dir": str(Path.cwd() / "saved"),
        **settings,
    }
    return build(folder, model, **own)


def make(
    folder: Path, teacher_file: Path, model: str = "BPR", **settings: Any
) -> tuple[Bundle, DistillMixin]:
    bundle = bundle_of(folder, model, **settings)
    teacher = load_teacher(teacher_file, bundle.train)
    return bundle, distill_trainer(bundle.config)(bundle.config, build_model(bundle), teacher)


def untrained(folder: Path, model: str, **settings: Any) -> Path:
    file = Path.cwd() / f"{model}.pth"
    save_untrained(build(folder, model, **{**MODELS[model], **settings}), file)
    return file


def distiller_of(trainer: DistillMixin, term: int = 0) -> EmbeddingDistiller:
    found = trainer.terms[term].distiller
    assert isinstance(found, EmbeddingDistiller)
    return found


def state(model: Any) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def course(bundle: Bundle, trainer: Any) -> list[State]:
    states: list[State] = []
    trainer.fit(
        bundle.train,
        bundle.valid,
        saved=False,
        callback_fn=lambda *_: states.append(state(trainer.model)),
    )
    return states


# --- what a step learns on ------------------------------------------------------------------------


def test_weights_of_kinds_by_hand() -> None:
    ids, weights = _distinct([torch.tensor([4, 2, 2, 0]), torch.tensor([9, 2])])
    assert ids.tolist() == [2, 4, 9]  # without the padding
    assert weights.tolist() == [1.0, 0.5, 0.5]
    ids, weights = _distinct([torch.tensor([3, 1, 3])])
    assert (ids.tolist(), weights.tolist()) == ([1, 3], [1.0, 1.0])


def test_what_a_batch_has(folder: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, teacher_file)
    with trainer.distilling(bundle.train):
        distiller = distiller_of(trainer)
        users, items = torch.tensor([5, 5, 8]), torch.tensor([1, 2, 3])
        pairs = Interaction(
            {"user_id": users, "item_id": items, "neg_item_id": torch.tensor([2, 7, 7])}
        )
        labelled = Interaction(
            {"user_id": users, "item_id": items, "label": torch.tensor([1.0, 0.0, 1.0])}
        )

        def kinds(side: str, batch: Any) -> list[list[int]]:
            return [kind.tolist() for kind in distiller._kinds(side, batch)]

        assert kinds("users", pairs) == [[5, 5, 8]]
        assert kinds("items", pairs) == [[1, 2, 3], [2, 7, 7]]
        assert kinds("items", labelled) == [[1, 3], [2]]
        assert kinds("items", Interaction({"user_id": users, "item_id": items})) == [[1, 2, 3]]


def tables_of(name: str, model: Any) -> tuple[Tensor, Tensor]:
    if name == "LightGCN":
        users, items = model.forward()
        return users, items
    return model.user_embedding.weight, model.item_embedding.weight


@pytest.mark.parametrize("teacher", ["BPR", "LightGCN"])
@pytest.mark.parametrize("student", ["BPR", "LightGCN"])
def test_a_step_by_hand(folder: Path, teacher_file: Path, student: str, teacher: str) -> None:
    """Value and gradient, also in the total loss; base loss and both sides share a propagation."""
    file = teacher_file if teacher == "BPR" else untrained(folder, "LightGCN", embedding_size=6)
    bundle, trainer = make(folder, file, student, fitnet_weight=3.0)
    model, teacher_model = trainer.model, read_teacher(file, bundle.train).model
    batch = next(iter(bundle.train))
    assert len(set(batch["user_id"].tolist())) < len(batch)
    positive, negative = set(batch["item_id"].tolist()), set(batch["neg_item_id"].tolist())
    assert positive & negative
    with trainer.distilling(bundle.train):
        loss: Any = trainer.terms[0].distiller.loss
        trainer._begin_epoch(0, 1)
        total = model.calculate_loss(batch)
        found = torch.autograd.grad(total, list(model.parameters()))
        projectors = [loss.projectors[f"of_{side}"] for side in ("users", "items")]
    base = model.calculate_loss(batch)
    expected = base
    weights = [
        dict.fromkeys(batch["user_id"].tolist(), 1.0),
        {item: ((item in positive) + (item in negative)) / 2 for item in positive | negative},
    ]
    with torch.no_grad():
        of_teacher = tables_of(teacher, teacher_model)
    for own, other, projector, counted in zip(
        tables_of(student, model), of_teacher, projectors, weights, strict=True
    ):
        for row, weight in counted.items():
            difference = projector.weight @ own[row] + projector.bias - other[row]
            expected = expected + 3.0 * weight * difference.square().sum() / len(batch)
    torch.testing.assert_close(total, expected)
    for one, two in zip(
        found, torch.autograd.grad(expected, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_graph_is_propagated_once_in_a_step(folder: Path, teacher_file: Path) -> None:
    bundle, trainer = make(
        folder, teacher_file, "LightGCN", kd_loss="rce+fitnet", kd_diagnostic_users=0
    )
    model = trainer.model
    calls: list[int] = []
    original = model.forward

    def counted() -> Any:
        calls.append(1)
        return original()

    model.forward = counted
    with trainer.distilling(bundle.train):
        trainer._begin_epoch(0, 1)
        calls.clear()
        model.calculate_loss(next(iter(bundle.train)))
    assert len(calls) == 1


def test_only_its_own_rows_of_plain_tables_are_touched(folder: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, teacher_file, kd_base_weight=0)
    batch = next(iter(bundle.train))[:3]
    with trainer.distilling(bundle.train):
        trainer._begin_epoch(0, 1)
        torch.autograd.backward(trainer.model.calculate_loss(batch))
    for table, ids in (
        (trainer.model.user_embedding.weight, batch["user_id"]),
        (trainer.model.item_embedding.weight, torch.cat([batch["item_id"], batch["neg_item_id"]])),
    ):
        assert not table.grad.is_sparse
        assert table.grad.any(1).nonzero().squeeze(1).tolist() == sorted(set(ids.tolist()))


@pytest.mark.parametrize("student", ["BPR", "LightGCN"])
@pytest.mark.parametrize("method", METHODS)
def test_weight_0_is_plain_recbole_bit_for_bit(
    folder: Path, teacher_file: Path, method: str, student: str
) -> None:
    bundle = bundle_of(folder, student)
    plain = course(
        bundle,
        get_trainer(bundle.config["MODEL_TYPE"], student)(bundle.config, build_model(bundle)),
    )
    bundle, trainer = make(
        folder, teacher_file, student, kd_loss=method, **{f"{method}_weight": 0.0}
    )
    assert all(map(same, plain, course(bundle, trainer)))
    bundle, trainer = make(folder, teacher_file, student, kd_loss=method)
    assert not same(plain[0], course(bundle, trainer)[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_can_be_repeated_and_another_seed_draws_other_parts(
    folder: Path, teacher_file: Path, method: str
) -> None:
    runs = []
    for seed in (1, 1, 2):
        bundle = bundle_of(folder, kd_loss=method)
        teacher = load_teacher(teacher_file, bundle.train)
        runs.append(
            course(
                bundle,
                distill_trainer(bundle.config)(bundle.config, build_model(bundle), teacher, seed),
            )
        )
    assert all(map(same, runs[0], runs[1]))
    assert not same(runs[0][0], runs[2][0])


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_no_other_run(folder: Path, teacher_file: Path, method: str) -> None:
    rows = []
    for half in (False, True):
        settings: dict[str, Any] = {
            f"{method}_weight": 0.5,
            "enable_amp": half,
            "enable_scaler": True,
        }
        bundle, trainer = make(folder, teacher_file, kd_loss=method, **settings)
        trainer.fit(bundle.train, bundle.valid, saved=False)
        rows.append(trainer.history.rows[-1])
    for key in ("base_loss", "kd_loss"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=0.01)


def test_in_half_precision_only_the_model_computes(folder: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, teacher_file)
    batch = next(iter(bundle.train))
    with trainer.distilling(bundle.train):
        distiller = distiller_of(trainer)
        exact = distiller.step(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = distiller.step(batch)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


# --- from whom, and who ---------------------------------------------------------------------------


@pytest.mark.parametrize("student", ["BPR", "LightGCN"])
@pytest.mark.parametrize("method", METHODS)
def test_a_student_learns_the_vectors(
    folder: Path, teacher_file: Path, method: str, student: str
) -> None:
    settings = {f"{method}_weight": 1.0, "learning_rate": 0.03, "epochs": 15, "stopping_step": 99}
    bundle, trainer = make(folder, teacher_file, student, kd_loss=method, **settings)
    trainer.fit(bundle.train, bundle.valid, saved=False)
    first, last = trainer.history.rows[0], trainer.history.rows[-1]
    assert last["kd_loss"] < 0.8 * first["kd_loss"]
    assert "overlap@50" in last
    assert "ndcg@10_to_teacher" in last


def test_a_graph_teaches_factors(folder: Path) -> None:
    bundle, trainer = make(folder, untrained(folder, "LightGCN"), kd_loss="vkd")
    trainer.fit(bundle.train, bundle.valid, saved=False)
    assert trainer.history.rows[-1]["kd_loss"] > 0


def test_several_teachers_have_their_vectors_side_by_side(folder: Path, teacher_file: Path) -> None:
    graph = untrained(folder, "LightGCN")
    bundle = bundle_of(folder, epochs=1)
    trainer = distill_trainer(bundle.config)(
        bundle.config, build_model(bundle), load_teacher([teacher_file, graph], bundle.train)
    )
    trainer.fit(bundle.train, bundle.valid, saved=False)
    loss: Any = trainer.terms[0].distiller.loss
    assert loss.projectors["of_users"].weight.shape == (7 + 4, 4)
    # One that scores sequences has none of users, and so the two together.
    sequences = untrained(folder, "SASRec")
    bundle = bundle_of(folder, **TIME_ORDERED)
    both = load_teacher([sequences, untrained(folder, "BPR", **TIME_ORDERED)], bundle.train)
    trainer = distill_trainer(bundle.config)(bundle.config, build_model(bundle), both)
    with pytest.raises(
        SettingsError, match="fitnet learns from the vectors of users, but the teacher has none"
    ):
        trainer.fit(bundle.train)


@pytest.mark.parametrize("teacher", ["SASRec", "HSTU"])
@pytest.mark.parametrize("method", METHODS)
def test_a_sequential_teacher_has_vectors_of_items_only(
    folder: Path, method: str, teacher: str
) -> None:
    file = untrained(folder, teacher)
    bundle, trainer = make(folder, file, kd_loss=method, **TIME_ORDERED)
    with pytest.raises(
        SettingsError, match=rf"{method} learns from the vectors of users, but the teacher has none"
    ) as e:
        trainer.fit(bundle.train)
    assert str(e.value).endswith(f"it scores sequences. Set {method}_sides: items.")
    assert not hasattr(vars(trainer.model), "calculate_loss")
    bundle, trainer = make(
        folder, file, kd_loss=method, **{f"{method}_sides": "items"}, **TIME_ORDERED
    )
    trainer.fit(bundle.train, bundle.valid, saved=False)
    assert trainer.history.rows[-1]["kd_loss"] > 0
    assert "overlap@50" in trainer.history.rows[-1]  # by the scores, which it has of users


@pytest.mark.parametrize("student", ["SASRec", "HSTU"])
def test_a_sequential_student_learns_vectors_of_items(folder: Path, student: str) -> None:
    file = untrained(folder, "BPR", **TIME_ORDERED, embedding_size=5)
    bundle, trainer = make(folder, file, student)
    with pytest.raises(
        SettingsError, match=f"learns from the vectors of users, but {student} has none"
    ):
        trainer.fit(bundle.train)
    bundle, trainer = make(folder, file, student, fitnet_sides="items", kd_loss="rce+fitnet")
    before = state(trainer.model)
    with trainer.distilling(bundle.train):
        trainer._begin_epoch(0, 1)
        batch = next(iter(bundle.train))
        torch.autograd.backward(trainer.terms[1].distiller.step(batch))
        items = torch.unique(batch["item_id"])
        touched = {
            n: p.grad
            for n, p in trainer.model.named_parameters()
            if p.grad is not None and p.grad.any()
        }
        ((name, gradient),) = touched.items()
        assert "item" in name
        assert gradient.any(1).nonzero().squeeze(1).tolist() == items[items != 0].tolist()
    trainer.fit(bundle.train, bundle.valid, saved=False)
    assert not same(before, state(trainer.model))
    assert {"kd_loss", "kd_loss_fitnet"} <= trainer.history.rows[-1].keys()


def test_who_has_no_vectors_is_refused(folder: Path, teacher_file: Path, tmp_path: Path) -> None:
    bundle, trainer = make(folder, teacher_file, "NeuMF")
    with pytest.raises(
        SettingsError,
        match="fitnet learns from vectors, but NeuMF's scores are no product of user and",
    ):
        trainer.fit(bundle.train)
    bundle, trainer = make(folder, untrained(folder, "NeuMF"))
    with pytest.raises(
        TeacherError, match="the scores of NeuMF are no product of user and item vectors"
    ):
        trainer.fit(bundle.train)
    scores = tmp_path / "scores.csv"
    dataset = bundle.train._dataset
    users, items = (dataset.field2id_token[field][1:] for field in ("user_id", "item_id"))
    lines = [f"{u},{i},{k}.5" for u in users for k, i in enumerate(items)]
    scores.write_text("\n".join(["user_id,item_id,score", *lines]) + "\n", encoding="utf-8")
    bundle, trainer = make(folder, scores)
    with pytest.raises(TeacherError, match=r"the scores of scores\.csv are no product") as error:
        trainer.fit(bundle.train)
    assert "\n" not in str(error.value)
    bundle = bundle_of(folder)
    both = load_teacher([teacher_file, scores], bundle.train)
    trainer = distill_trainer(bundle.config)(bundle.config, build_model(bundle), both)
    with pytest.raises(TeacherError, match=r"the scores of BPR \+ scores\.csv are no product"):
        trainer.fit(bundle.train)


def test_several_processes_are_refused(folder: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, teacher_file)
    trainer.ranks = Ranks(0, 2)
    with pytest.raises(SettingsError, match="several processes do not share: set nproc to 1"):
        trainer.fit(bundle.train)
    assert not Path("saved/teacher_scores").exists()  # before anything is computed


# --- what is learned beside the student -----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_parts_are_learned_and_kept_beside_the_checkpoint(
    folder: Path, teacher_file: Path, method: str
) -> None:
    bundle, trainer = make(folder, teacher_file, kd_loss=method, epochs=2)
    with trainer.distilling(bundle.train):
        before = state(trainer.terms[0].distiller.loss)
    trainer.fit(bundle.train)  # without validation, every epoch is saved
    after = state(trainer.terms[0].distiller.loss)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    file = Path(trainer.saved_model_file)
    kept = torch.load(file.with_suffix(".kd.pth"), weights_only=True)
    assert set(kept) == {method}
    assert same(kept[method], after)
    checkpoint = torch.load(file, weights_only=False)
    assert checkpoint["state_dict"].keys() == trainer.model.state_dict().keys()
    assert b"recbole_rcekd" not in file.read_bytes()
    assert not list(Path.cwd().rglob("*.partial"))
    # As the optimizer was before: the model's alone.
    assert len(trainer.optimizer.param_groups) == 1
    assert len(trainer.optimizer.state) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("learner", ["adam", "sgd", "adagrad", "rmsprop"])
@pytest.mark.parametrize("student", ["BPR", "LightGCN"])
def test_the_checkpoint_is_resumed_by_plain_recbole(
    folder: Path, teacher_file: Path, student: str, learner: str
) -> None:
    keys: dict[str, Any] = {"kd_loss": "rce+de", "learner": learner, "weight_decay": 0.01}
    bundle, first = make(folder, teacher_file, student, epochs=2, **keys)
    first.fit(bundle.train)
    content = torch.load(first.saved_model_file, weights_only=False)["optimizer"]
    n = len(list(first.model.parameters()))
    assert [group["params"] for group in content["param_groups"]] == [list(range(n))]
    assert set(content["state"]) <= set(range(n))
    bundle = bundle_of(folder, student, epochs=4, **keys)
    plain = Trainer(bundle.config, build_model(bundle))
    plain.resume_checkpoint(first.saved_model_file)
    assert plain.start_epoch == 2
    assert same(state(plain.model), state(first.model))
    for own, other in zip(
        plain.optimizer.state.values(), first.optimizer.state.values(), strict=True
    ):
        assert all(
            torch.equal(torch.as_tensor(own[name]), torch.as_tensor(other[name])) for name in own
        )
    states = course(bundle, plain)
    assert len(states) == 2
    assert all(value.isfinite().all() for value in states[-1].values())


def test_a_resumed_run_goes_on_with_the_parts(folder: Path, teacher_file: Path) -> None:
    bundle, first = make(folder, teacher_file, epochs=2)
    first.fit(bundle.train)
    learned = state(first.terms[0].distiller.loss)
    bundle, second = make(folder, teacher_file, epochs=4)
    second.resume_checkpoint(first.saved_model_file)
    with second.distilling(bundle.train):
        assert same(state(second.terms[0].distiller.loss), learned)
    second.fit(bundle.train, bundle.valid)
    assert [row["epoch"] for row in second.history.rows] == [2, 3]
    bundle, other = make(folder, teacher_file, epochs=4, fitnet_projector="mlp")
    other.resume_checkpoint(first.saved_model_file)
    with pytest.raises(
        SettingsError, match=r"\.kd\.pth\] was learned with other settings of fitnet than these"
    ):
        other.fit(bundle.train)
    parts_file(first.saved_model_file).unlink()
    other.fit(bundle.train, bundle.valid, saved=False)


def test_the_same_trainer_fits_and_resumes_again(folder: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, teacher_file, epochs=1)
    trainer.fit(bundle.train)
    trainer.resume_checkpoint(trainer.saved_model_file)
    trainer.epochs = 2
    trainer.fit(bundle.train)
    assert [row["epoch"] for row in trainer.history.rows] == [0, 1]
    assert len(trainer.optimizer.param_groups) == 1


def test_methods_of_scores_leave_no_parts(folder: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, teacher_file, kd_loss="rce", epochs=1)
    trainer.fit(bundle.train)
    assert Path(trainer.saved_model_file).exists()
    assert not list(Path.cwd().rglob("*.kd.pth"))


# --- sums -----------------------------------------------------------------------------------------


def test_a_sum_is_the_base_loss_and_each_term(
    folder: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {
        "kd_loss": "rce+fitnet+vkd",
        "rce_weight": 2.0,
        "fitnet_weight": 0.5,
        "vkd_weight": 0.0,
    }
    bundle, trainer = make(folder, teacher_file, epochs=1, **keys)
    assert Path(trainer.saved_model_file).name.startswith("BPR-rce+fitnet+vkd-")
    batch = next(iter(bundle.train))
    base = trainer.model.calculate_loss(batch)
    values: list[Tensor] = []
    with trainer.distilling(bundle.train):
        for term in trainer.terms:

            def noted(*given: Any, step: Any = term.distiller.step) -> Tensor:
                values.append(step(*given))
                return values[-1]

            monkeypatch.setattr(term.distiller, "step", noted)
        trainer._begin_epoch(0, 1)
        total = trainer.model.calculate_loss(batch)
    assert [term.name for term in trainer.terms] == ["rce", "fitnet", "vkd"]
    assert [term.weight for term in trainer.terms] == [2.0, 0.5, 0.0]
    torch.testing.assert_close(total, base + 2.0 * values[0] + 0.5 * values[1])


def test_the_numbers_of_each_term(
    folder: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"kd_loss": "rce+fitnet", "rce_weight": 2.0, "fitnet_weight": 0.5}
    bundle, trainer = make(folder, teacher_file, epochs=2, **keys)
    trainer.fit(bundle.train, bundle.valid)
    for row in trainer.history.rows:
        parts = row["base_loss"] + 2.0 * row["kd_loss"] + 0.5 * row["kd_loss_fitnet"]
        assert row["train_loss"] == pytest.approx(parts, rel=1e-4)
        assert {"gamma", "closure_gap", "overlap@50"} <= row.keys()
    assert trainer.history.file is not None
    header = trainer.history.file.read_text(encoding="utf-8").splitlines()[0]
    assert {"base_loss", "kd_loss", "kd_loss_fitnet"} <= set(header.split(","))
    assert set(torch.load(parts_file(trainer.saved_model_file), weights_only=True)) == {"fitnet"}


def test_a_second_method_does_not_change_the_draws_of_the_first(
    folder: Path, teacher_file: Path
) -> None:
    found = []
    for method in ("rce", "rce+de"):
        bundle, trainer = make(folder, teacher_file, epochs=1, kd_loss=method, de_weight=0.0)
        found.append(course(bundle, trainer)[0])
        seeds = [term.distiller.generator.initial_seed() for term in trainer.terms]
        assert seeds[0] == 2020
        assert len(set(seeds)) == len(seeds)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


# --- the teacher alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vkd", "rce", "rce+fitnet"])
@pytest.mark.parametrize("student", ["BPR", "LightGCN"])
def test_without_the_base_loss_it_is_not_computed(
    folder: Path, teacher_file: Path, student: str, method: str
) -> None:
    bundle, trainer = make(
        folder,
        teacher_file,
        student,
        kd_loss=method,
        kd_base_weight=0,
        epochs=3,
        learning_rate=0.05,
    )
    model_type = type(trainer.model)

    class Silent(model_type):  # type: ignore[misc, valid-type]
        def calculate_loss(self, interaction: Any) -> Any:
            raise AssertionError("the base loss was computed")

    trainer.model.__class__ = Silent
    reported: list[float] = []
    true: list[float] = []

    def evaluate_anew(epoch: int, score: float) -> None:
        fresh = build_model(bundle)
        fresh.load_state_dict(trainer.model.state_dict())
        reported.append(score)
        true.append(
            Trainer(bundle.config, fresh).evaluate(bundle.valid, load_best_model=False)["ndcg@10"]
        )

    trainer.fit(bundle.train, bundle.valid, saved=False, callback_fn=evaluate_anew)
    assert reported == true  # LightGCN keeps the last full sort for evaluation
    assert len(set(true)) > 1
    rows = trainer.history.rows
    assert all(row["base_loss"] == 0.0 for row in rows)
    assert rows[-1]["kd_loss"] < rows[0]["kd_loss"]
    if method == "vkd":
        assert rows[0]["train_loss"] == pytest.approx(0.1 * rows[0]["kd_loss"], rel=1e-4)


def test_a_part_of_the_base_loss(folder: Path, teacher_file: Path) -> None:
    bundle, trainer = make(folder, teacher_file, epochs=1, kd_base_weight=0.25, fitnet_weight=2.0)
    trainer.fit(bundle.train, bundle.valid, saved=False)
    (row,) = trainer.history.rows
    assert row["train_loss"] == pytest.approx(
        0.25 * row["base_loss"] + 2.0 * row["kd_loss"], rel=1e-4
    )


def test_more_steps_than_users_without_the_base_loss(folder: Path, teacher_file: Path) -> None:
    """A step whose turn nobody has leaves the model as it is."""
    bundle, trainer = make(
        folder, teacher_file, kd_loss="rce", kd_base_weight=0, epochs=1, train_batch_size=4
    )
    assert len(bundle.train) > 40
    trainer.fit(bundle.train, bundle.valid, saved=False)
    assert trainer.history.rows[0]["kd_loss"] > 0


def test_nothing_to_learn_from_is_refused(folder: Path, teacher_file: Path) -> None:
    for keys in (
        {"fitnet_weight": 0.0},
        {"kd_loss": "fitnet+vkd", "fitnet_weight": 0.0, "vkd_weight": 0.0},
    ):
        bundle = bundle_of(folder, kd_base_weight=0.0, **keys)
        with pytest.raises(SettingsError, match="are both 0, so there is nothing to learn from"):
            read_kd_settings(bundle.config)
    bundle = bundle_of(folder, kd_base_weight=0.0, kd_loss="fitnet+vkd", fitnet_weight=0.0)
    assert isinstance(read_kd_settings(bundle.config)[1]["fitnet"], FitNetLoss)
