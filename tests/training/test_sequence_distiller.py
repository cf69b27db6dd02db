"""Distillation of sequential students: the loss of a step and its gradient, derived by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_rcekd import DistillTrainer
from recbole_rcekd.core.distributed import Ranks
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import KDSettings, TeacherSettings
from recbole_rcekd.core.types import Seen
from recbole_rcekd.data.contexts import ROW_FIELD, row_ids_in_batches
from recbole_rcekd.data.fingerprint import training_interactions
from recbole_rcekd.losses import CELoss, FCELoss, KDLoss, RCELoss, RRDLoss
from recbole_rcekd.losses.ce import CESettings
from recbole_rcekd.losses.fce import FCESettings
from recbole_rcekd.losses.rce import RCESettings
from recbole_rcekd.losses.rrd import RRDSettings
from recbole_rcekd.losses.softmax import SoftmaxLoss, SoftmaxSettings
from recbole_rcekd.models.scorer import ModelScorer
from recbole_rcekd.teachers.checkpoint_teacher import read_teacher
from recbole_rcekd.teachers.ensemble import TeacherEnsemble
from recbole_rcekd.teachers.score_file import ScoreFileTeacher
from recbole_rcekd.teachers.score_tables import FactorScores
from recbole_rcekd.training.sequence_candidates import SequenceCandidates, row_teacher_of
from recbole_rcekd.training.sequence_distiller import SequenceDistiller, _first_places
from tests.helpers import Bundle, block_pairs, build, build_model, save_untrained, write_dataset
from tests.tables import Table, ranking_of

# isort: split
from recbole.trainer import Trainer

N_USERS, N_ITEMS, SEED = 20, 30, 5
COMMON: dict[str, Any] = {
    "MAX_ITEM_LIST_LENGTH": 5,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "train_batch_size": 32,
    "embedding_size": 8,
    "hidden_size": 8,
}
CE: dict[str, Any] = {"loss_type": "CE", "train_neg_sample_args": None}
PAIRWISE: dict[str, Any] = {
    "loss_type": "BPR",
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "GRU4Rec": ("GRU4Rec", {**CE, "num_layers": 1, "dropout_prob": 0.3}),
    "GRU4Rec with BPR": ("GRU4Rec", {**PAIRWISE, "num_layers": 1, "dropout_prob": 0.3}),
    "SASRec": (
        "SASRec",
        {
            **CE,
            "inner_size": 8,
            "n_layers": 1,
            "hidden_dropout_prob": 0.4,
            "attn_dropout_prob": 0.4,
        },
    ),
    "FPMC": ("FPMC", PAIRWISE),
    "DIN": (
        "DIN",
        {
            "mlp_hidden_size": [8],
            "dropout_prob": 0.0,
            "train_neg_sample_args": PAIRWISE["train_neg_sample_args"],
        },
    ),
    "HSTU": (
        "HSTU",
        {"train_neg_sample_args": None, "attention_dim": 3, "linear_dim": 5, "n_negatives": 7},
    ),
}
SMALL: dict[str, Any] = {"rce_top_k": 3, "rce_samples": 3, "rce_pool": 8, "kd_diagnostic_users": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    return write_dataset(path, pairs=block_pairs(N_USERS, N_ITEMS, 4, per_user=7))


@pytest.fixture(autouse=True)
def _stand_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def student_of(folder: Path, name: str, **overrides: Any) -> tuple[Bundle, Any]:
    """With weights so large that scores differ."""
    model_name, given = STUDENTS[name]
    bundle = build(
        folder,
        model_name,
        **{**COMMON, **SMALL, **given, "checkpoint_dir": str(Path.cwd()), **overrides},
    )
    model = build_model(bundle)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
            )
    return bundle, model


def teacher_of(dataset: Any, general: bool) -> Table:
    n_users, n_items = int(dataset.user_num), int(dataset.item_num)
    seen = training_interactions(dataset) if general else Seen.nothing(len(dataset), n_items)
    scores = torch.randn(
        n_users if general else len(dataset), n_items, generator=torch.Generator().manual_seed(9)
    )
    return Table(scores, seen)


def distiller_of(
    bundle: Bundle, model: Any, loss: KDLoss, general: bool = True, **kd: Any
) -> SequenceDistiller:
    dataset = bundle.train._dataset
    teaching = row_teacher_of(dataset, teacher_of(dataset, general))
    settings = KDSettings(**{"kd_diagnostic_users": 4, **kd})
    return SequenceDistiller(
        ModelScorer(model, dataset, trainable=True), teaching, loss, settings, dataset, SEED
    )


def first_batch(bundle: Bundle) -> Any:
    with row_ids_in_batches(bundle.train._dataset):
        return next(iter(bundle.train))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def taught_step(distiller: SequenceDistiller, model: Any, batch: Any) -> tuple[Tensor, Tensor, int]:
    """Base loss and KD loss as the trainer gets them, and how often the model ran."""
    calls: list[int] = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    torch.manual_seed(3)
    try:
        scorer = distiller._scorer
        with scorer.shared_forward() as forget:
            with scorer.recording_products(batch) as products:
                base = model.calculate_loss(batch)
            kd = distiller.step(batch, products)
            forget()
    finally:
        vars(model).pop("forward", None)
    return base, kd, len(calls)


# --- by hand --------------------------------------------------------------------------------------


def one_forward(model: Any, name: str, batch: Any) -> tuple[Tensor, Tensor]:
    """Base loss and all scores of a batch from one forward, by the formulas of RecBole's models."""
    torch.manual_seed(3)
    sequences, lengths, target = batch["item_id_list"], batch["item_length"], batch["item_id"]
    if name in ("FPMC", "DIN"):
        base = model.calculate_loss(batch)
        if name == "FPMC":
            last = sequences.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
            users = model.UI_emb(batch["user_id"])
            return base, users @ model.IU_emb.weight.t() + model.LI_emb(
                last
            ) @ model.IL_emb.weight.t()
        return base, torch.zeros(())
    hidden = model.forward(sequences, lengths)
    scores = hidden @ model.item_embedding.weight.t()
    if model.loss_type == "CE":
        return torch.nn.functional.cross_entropy(scores, target), scores
    wanted, drawn = (scores.gather(1, batch[c].unsqueeze(1)) for c in ("item_id", "neg_item_id"))
    return -torch.log(1e-10 + torch.sigmoid(wanted - drawn)).mean(), scores


def slow_ce(scores: Tensor, dataset: Any, batch: Any, general: bool, k: int, whole: bool) -> Tensor:
    """Mean over the rows of CE on the teacher's best k, over those or over all items."""
    teacher = teacher_of(dataset, general).scores
    taken: dict[int, set[int]] = {}
    for user, target, listed in zip(
        *(dataset.inter_feat[c].tolist() for c in ("user_id", "item_id", "item_id_list")),
        strict=True,
    ):
        taken.setdefault(user, set()).update({target, *listed} - {0})
    total = torch.zeros(())
    for row in range(len(batch)):
        user, target = int(batch["user_id"][row]), int(batch["item_id"][row])
        opinion = teacher[user if general else int(batch[ROW_FIELD][row])]
        hidden = taken[user] - {target} if general else set()
        shown = [i for i in range(1, dataset.item_num) if i not in hidden]
        listed = sorted(shown, key=lambda i: -float(opinion[i]))[:k]
        q = opinion[listed].softmax(0)
        normaliser = scores[row, shown if whole else listed]
        total = total + (q * (normaliser.logsumexp(0) - scores[row, listed])).sum()
    return total / len(batch)


FAST = ["GRU4Rec", "GRU4Rec with BPR", "SASRec", "FPMC"]


@pytest.mark.parametrize("general", [False, True], ids=["sequential teacher", "general teacher"])
@pytest.mark.parametrize("whole", [False, True], ids=["ce", "fce"])
@pytest.mark.parametrize("name", FAST)
def test_a_step_by_hand(folder: Path, name: str, whole: bool, general: bool) -> None:
    """Also the gradient in training mode, where KD and base loss must have the same dropout."""
    bundle, model = student_of(folder, name)
    loss = FCELoss(FCESettings(fce_top_k=4)) if whole else CELoss(CESettings(ce_top_k=4))
    distiller = distiller_of(bundle, model, loss, general)
    batch = first_batch(bundle)
    model.train()
    wanted_base, scores = one_forward(model, name, batch)
    wanted = slow_ce(scores, bundle.train._dataset, batch, general, 4, whole)
    expected = gradients(model, wanted_base + 7.0 * wanted)
    base, kd, n_forwards = taught_step(distiller, model, batch)
    torch.testing.assert_close(base, wanted_base)
    torch.testing.assert_close(kd, wanted, rtol=1e-4, atol=1e-5)
    found = gradients(model, base + 7.0 * kd)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)
    assert name == "FPMC" or n_forwards == 1


@pytest.mark.parametrize("general", [False, True], ids=["sequential teacher", "general teacher"])
@pytest.mark.parametrize("name", FAST)
def test_rce_by_hand(folder: Path, name: str, general: bool) -> None:
    """Its lists once more, from the scores of one forward and the same draws."""
    bundle, model = student_of(folder, name)
    loss = RCELoss(RCESettings(rce_top_k=3, rce_samples=3, rce_pool=8))
    distiller = distiller_of(bundle, model, loss, general)
    batch, dataset = first_batch(bundle), bundle.train._dataset
    model.train()
    generator = torch.Generator()
    generator.set_state(distiller.generator.get_state())
    base, kd, _ = taught_step(distiller, model, batch)
    wanted_base, scores = one_forward(model, name, batch)
    dense = scores.detach().clone()
    dense[:, 0] = -torch.inf
    teaching = row_teacher_of(dataset, teacher_of(dataset, general))
    sets = loss.select(
        SequenceCandidates(batch[ROW_FIELD], teaching, batch, ranking_of(dense), generator)
    )
    wanted = loss.forward(scores.gather(1, sets.items), sets).mean()
    torch.testing.assert_close(kd, wanted, rtol=1e-4, atol=1e-5)
    expected, found = gradients(model, wanted_base + wanted), gradients(model, base + kd)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)
    gamma = float(sets.gamma.mean())  # type: ignore[union-attr]
    assert distiller.diagnostics()["gamma"] == pytest.approx(gamma)


def test_a_catalogue_of_targets(folder: Path) -> None:
    bundle, model = student_of(folder, "GRU4Rec")
    distiller = distiller_of(bundle, model, FCELoss(FCESettings(fce_target="all")))
    batch = first_batch(bundle)
    model.train()
    _, scores = one_forward(model, "GRU4Rec", batch)
    expected = slow_ce(scores, bundle.train._dataset, batch, True, N_ITEMS, True)
    torch.testing.assert_close(
        taught_step(distiller, model, batch)[1], expected, rtol=1e-4, atol=1e-5
    )


def test_a_control_hides_nothing_from_itself(folder: Path) -> None:
    """Whoever stands beside it: the full softmax has all items in its normaliser."""
    found = []
    for general in (False, True):
        bundle, model = student_of(folder, "GRU4Rec")
        distiller = distiller_of(bundle, model, SoftmaxLoss(SoftmaxSettings()), general)
        found.append(float(taught_step(distiller, model, first_batch(bundle))[1].detach()))
    assert found[0] == found[1]


def test_half_precision_of_a_step_is_not_for_the_teacher(folder: Path) -> None:
    bundle, _ = student_of(folder, "GRU4Rec")
    n_rows, n_items = len(bundle.train._dataset), int(bundle.train._dataset.item_num)
    draw = torch.Generator().manual_seed(4)
    queries, table = (torch.randn(n, 16, generator=draw) for n in (n_rows, n_items))
    rows = torch.arange(n_rows)
    plain, under = (FactorScores(queries, table, Seen.nothing(n_rows, n_items)) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (queries @ table.t()).dtype == torch.bfloat16
        assert torch.equal(under.score_all(rows), plain.score_all(rows))
        assert torch.equal(under.top_k(rows, 8), plain.top_k(rows, 8))
    assert torch.equal(plain.top_k(rows, 8), plain.score_all(rows).topk(8, dim=1).indices)


def test_a_model_that_scores_pairs(folder: Path) -> None:
    """The batches of DIN have each row twice, with its own item and with a drawn one.

    The row is taught once, with its own item.
    """
    bundle, model = student_of(folder, "DIN")
    distiller = distiller_of(bundle, model, CELoss(CESettings(ce_top_k=4)))
    batch, dataset = first_batch(bundle), bundle.train._dataset
    numbers = batch[ROW_FIELD]
    assert len(numbers) == 2 * len(set(numbers.tolist()))
    model.eval()  # without batch normalisation, whose statistics are the batch's
    rows = dataset[numbers.unique()]
    rows[ROW_FIELD] = numbers.unique()
    n_items = int(dataset.item_num)
    grid = rows.repeat_interleave(n_items)
    grid["item_id"] = torch.arange(n_items).repeat(len(rows))
    scores = model.predict(grid).view(len(rows), n_items)
    wanted = slow_ce(scores, dataset, rows, True, 4, whole=False)
    expected = gradients(model, wanted)
    _, kd, _ = taught_step(distiller, model, batch)
    torch.testing.assert_close(kd, wanted, rtol=1e-4, atol=1e-5)
    found = gradients(model, kd)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)


def test_first_places() -> None:
    distinct, first = _first_places(torch.tensor([7, 3, 7, 9, 3]))
    assert distinct.tolist() == [3, 7, 9]
    assert first.tolist() == [1, 0, 3]


def test_the_item_side_is_refused(folder: Path) -> None:
    bundle, model = student_of(folder, "GRU4Rec")
    loss = RRDLoss(RRDSettings(rrd_top_k=3, rrd_rest=5, rrd_pool=10, rrd_item_weight=1.0))
    with pytest.raises(
        SettingsError, match=r"\[rrd_item_weight\] teaches which users .* GRU4Rec scores sequences"
    ):
        distiller_of(bundle, model, loss)
    user_side = RRDSettings(rrd_top_k=3, rrd_rest=5, rrd_pool=10, rrd_item_weight=0.0)
    assert torch.isfinite(
        taught_step(distiller_of(bundle, model, RRDLoss(user_side)), model, first_batch(bundle))[1]
    )


def test_lists_longer_than_the_catalogue_are_refused(folder: Path) -> None:
    bundle, model = student_of(folder, "GRU4Rec")
    with pytest.raises(
        SettingsError, match=r"\[ce_top_k\]=31 needs a catalogue of at least 31 items"
    ):
        distiller_of(bundle, model, CELoss(CESettings(ce_top_k=31)))


# --- diagnostics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("general", [False, True], ids=["sequential teacher", "general teacher"])
def test_diagnostics_against_plain_loops(folder: Path, general: bool) -> None:
    bundle, model = student_of(folder, "SASRec")
    distiller = distiller_of(
        bundle, model, CELoss(CESettings(ce_top_k=4)), general, kd_diagnostic_users=6
    )
    dataset = bundle.train._dataset
    model.eval()
    overlaps, k = [], int(dataset.item_num) - 1
    rows = dataset[distiller._diagnostic_rows]
    with torch.no_grad():
        scores = model.full_sort_predict(rows)
    seen = training_interactions(dataset)
    top_10, gaps = [], []
    for row in range(6):
        user, target = int(rows["user_id"][row]), int(rows["item_id"][row])
        hidden = set(seen.cells(torch.tensor([user]))[1].tolist()) - {target} if general else set()
        allowed = [i for i in range(1, k + 1) if i not in hidden]
        opinion = teacher_of(dataset, general).scores[
            user if general else int(distiller._diagnostic_rows[row])
        ]
        theirs, mine = (sorted(allowed, key=lambda i: -float(s[i])) for s in (opinion, scores[row]))
        gains = [1 / np.log2(rank + 2) for rank in range(10)]
        top_10.append(
            sum(g for g, i in zip(gains, mine[:10], strict=True) if i in theirs[:10]) / sum(gains)
        )
        overlaps.append(set(theirs) == set(mine))
        listed = theirs[:4]
        q, p = opinion[listed].softmax(0).tolist(), scores[row, listed].softmax(0).tolist()
        above = [
            sum(j not in listed and scores[row, j] > scores[row, i] for j in allowed)
            for i in listed
        ]
        gaps.append(sum(q[n] * np.log(1 + p[n] * int(above[n])) for n in range(4)))
    found = distiller.diagnostics()
    assert set(found) == {f"overlap@{k}", "ndcg@10_to_teacher", "closure_gap"}
    assert all(overlaps)
    assert found[f"overlap@{k}"] == 1.0
    assert found["ndcg@10_to_teacher"] == pytest.approx(np.mean(top_10), rel=1e-5)
    assert found["closure_gap"] == pytest.approx(np.mean(gaps), rel=1e-4)


@pytest.mark.parametrize("general", [False, True], ids=["sequential teacher", "general teacher"])
def test_a_loss_is_tuned_on_the_first_batch_of_each_epoch(folder: Path, general: bool) -> None:
    bundle, model = student_of(folder, "SASRec")
    loss = RCELoss(
        RCESettings(rce_top_k=3, rce_samples=3, rce_pool=8, rce_sampling_temperature="auto")
    )
    distiller = distiller_of(bundle, model, loss, general)
    calls: list[int] = []
    tune = loss.tune

    def noted(candidates: Any) -> None:
        calls.append(len(candidates.contexts))
        tune(candidates)

    loss.tune = noted  # type: ignore[method-assign]
    batch = first_batch(bundle)
    model.train()
    for epoch in range(2):
        distiller.begin_epoch(epoch, 2)
        for _ in range(2):
            taught_step(distiller, model, batch)
    assert calls == [min(64, len(batch))] * 2
    found = distiller.diagnostics()
    assert found["sampling_temperature"] == loss.metrics()["sampling_temperature"] < 1000.0
    assert 0.0 < found["blockers_covered"] <= 1.0
    assert found["closure_gap"] <= found["closure_gap_unsampled"]


def test_diagnostics_can_be_turned_off(folder: Path) -> None:
    bundle, model = student_of(folder, "GRU4Rec")
    assert (
        distiller_of(
            bundle, model, CELoss(CESettings(ce_top_k=4)), kd_diagnostic_users=0
        ).diagnostics()
        == {}
    )
    full = distiller_of(bundle, model, FCELoss(FCESettings(fce_top_k=4)))
    assert set(full.diagnostics()) == {f"overlap@{N_ITEMS}", "ndcg@10_to_teacher"}


def random_states() -> tuple[Any, Any, str]:
    of_numpy = np.random.get_state()  # noqa: NPY002
    return torch.random.get_rng_state().tolist(), random.getstate(), str(of_numpy)


@pytest.mark.parametrize("name", ["GRU4Rec", "GRU4Rec with BPR", "SASRec", "FPMC", "HSTU"])
def test_global_random_streams_do_not_move(folder: Path, name: str) -> None:
    """What is drawn in a step is the base loss's own dropout, whose scores are used again."""
    bundle, model = student_of(folder, name)
    before = random_states()
    distiller = distiller_of(
        bundle, model, RCELoss(RCESettings(rce_top_k=3, rce_samples=3, rce_pool=8))
    )
    assert random_states() == before
    batch = first_batch(bundle)
    model.train()
    torch.manual_seed(3)
    model.calculate_loss(batch)
    plain = random_states()
    _, _, n_forwards = taught_step(distiller, model, batch)
    assert random_states() == plain
    assert name == "FPMC" or n_forwards == 1
    distiller.begin_epoch(1, 3)
    distiller.diagnostics()
    assert random_states() == plain
    assert model.training


# --- in RecBole's trainer -------------------------------------------------------------------------


def course(bundle: Bundle, trainer: Any) -> list[dict[str, Tensor]]:
    """The parameters after each epoch."""
    states: list[dict[str, Tensor]] = []

    def note(epoch: int, score: float) -> None:
        states.append({n: v.clone() for n, v in trainer.model.state_dict().items()})

    trainer.fit(bundle.train, bundle.valid, saved=False, callback_fn=note)
    return states


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("general", [False, True], ids=["sequential teacher", "general teacher"])
@pytest.mark.parametrize("name", STUDENTS)
def test_weight_0_is_plain_recbole_and_another_is_not(
    folder: Path, name: str, general: bool
) -> None:
    runs = []
    for weight in (None, 0.0, 2.0):
        bundle, model = student_of(folder, name, rce_weight=weight or 0.0, kd_loss="rce")
        dataset = bundle.train._dataset
        columns = list(dataset.inter_feat)
        if weight is None:
            trainer = Trainer(bundle.config, model)
        else:
            trainer = DistillTrainer(bundle.config, model, teacher_of(dataset, general))
        runs.append(course(bundle, trainer))
        assert list(dataset.inter_feat) == columns
        assert not {"calculate_loss", "forward"} & set(vars(model))
        if weight is not None:
            k = int(dataset.item_num) - 1
            keys = {
                "base_loss",
                "kd_loss",
                "refresh_seconds",
                f"overlap@{k}",
                "ndcg@10_to_teacher",
                "closure_gap",
            }
            assert keys <= set(trainer.history.rows[-1])
            assert ("gamma" in trainer.history.rows[-1]) == (weight > 0)
            assert (trainer.history.rows[-1]["kd_loss"] > 0) == (weight > 0)
    plain, weightless, distilled = runs
    assert all(map(same, plain, weightless))
    assert not same(plain[0], distilled[0])


def test_a_run_can_be_repeated(folder: Path) -> None:
    runs = []
    for _ in range(2):
        bundle, model = student_of(folder, "SASRec", kd_loss="rce")
        trainer = DistillTrainer(bundle.config, model, teacher_of(bundle.train._dataset, True))
        runs.append(course(bundle, trainer))
    assert all(map(same, *runs))


def test_rows_lose_their_numbers_after_a_stop(folder: Path) -> None:
    bundle, model = student_of(folder, "GRU4Rec", kd_loss="rce")
    trainer = DistillTrainer(bundle.config, model, teacher_of(bundle.train._dataset, True))
    before = list(bundle.train._dataset.inter_feat)

    def stop(*_: Any) -> None:
        assert ROW_FIELD in bundle.train._dataset.inter_feat
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(bundle.train, bundle.valid, saved=False, callback_fn=stop)
    assert list(bundle.train._dataset.inter_feat) == before


def test_the_teacher_does_not_run_in_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teaching_bundle, teaching_model = student_of(folder, "SASRec")
    save_untrained(teaching_bundle, Path.cwd() / "teacher.pth", teaching_model)
    bundle, model = student_of(folder, "GRU4Rec", kd_loss="rce")
    teacher = read_teacher(Path.cwd() / "teacher.pth", bundle.train)
    assert teacher.scores_rows
    calls: list[str] = []
    forward = type(teaching_model).forward

    def noted(self: Any, *args: Any) -> Any:
        calls.append("forward")
        return forward(self, *args)

    monkeypatch.setattr(type(teaching_model), "forward", noted)
    trainer = DistillTrainer(bundle.config, model, teacher)
    with trainer.distilling(bundle.train) as distiller:
        assert calls
        calls.clear()
        distiller.begin_epoch(0, len(bundle.train))
        model.train()
        for batch in bundle.train:
            assert torch.isfinite(model.calculate_loss(batch))
        distiller.diagnostics()
    assert calls == []


@pytest.mark.parametrize("how", ["standardised", "reciprocal_rank"])
def test_every_process_has_the_lists_of_all_users(folder: Path, how: Any) -> None:
    """A rank owns some users, but its batches have rows of any."""
    bundle, _ = student_of(folder, "GRU4Rec")
    dataset = bundle.train._dataset
    tokens = {field: dataset.field2id_token[field] for field in ("user_id", "item_id")}
    parts = []
    for number in (1, 2):
        file = Path.cwd() / f"{number}.csv"
        lines = [
            f"{tokens['user_id'][user]},{tokens['item_id'][item]},"
            f"{(user * 7 + item * number * 3) % 31}"
            for user in range(1, N_USERS + 1)
            for item in range(1, N_ITEMS + 1)
        ]
        file.write_text("\n".join(["user_id,item_id,score", *lines]), encoding="utf-8")
        parts.append(ScoreFileTeacher(str(file), dataset, TeacherSettings()))
    several = TeacherEnsemble(parts, [1.0, 1.0], TeacherSettings(teacher_ensemble=how))
    settings, users = (
        KDSettings(kd_cache_dir=str(Path.cwd() / "scores")),
        torch.arange(1, N_USERS + 1),
    )
    alone = several.open_scores(settings).top_k(users, 5, True)
    second = several.open_scores(settings, ranks=Ranks(rank=1, world=2)).top_k(users, 5, True)
    assert torch.equal(second, alone)
    assert alone.all()
