"""HSTU: blocks and loss against plain loops, independence of padding and batch, use in RecBole."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data import dataset as recbole_datasets
from recbole.data.interaction import Interaction
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.trainer import Trainer
from recbole.utils import ModelType, get_model
from torch import Tensor

from recbole_rcekd import models
from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.models.hstu import HSTU, HSTUBlock, HSTUDataset, HSTUSettings
from tests.helpers import (
    Bundle,
    build,
    build_config,
    build_model,
    train_and_save,
    write_atomic_file,
    write_dataset,
)

BIASES = ["none", "position", "position_time"]
SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "n_heads": 2,
    "attention_dim": 3,
    "linear_dim": 5,
    "n_negatives": 7,
    "MAX_ITEM_LIST_LENGTH": 6,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def build_hstu(folder: Path, **overrides: Any) -> Bundle:
    return build(folder, "HSTU", **{**SMALL, **overrides})


def last_query(
    model: Any, items: torch.Tensor, lengths: torch.Tensor, times: torch.Tensor | None = None
) -> Any:
    """The query at the last item of each row, of length 1."""
    hidden, _ = model.forward(items, lengths, times)
    return torch.nn.functional.normalize(hidden[lengths.cumsum(0) - 1], dim=-1)


def noisy_model(bundle: Bundle, std: float = 0.5) -> Any:
    """A model in double precision and evaluation mode, with weights that are not near zero."""
    model = build_model(bundle).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


# Items padded on the right, their number, and their times
SEQ = torch.tensor([[3, 7, 2, 9, 0, 0], [5, 0, 0, 0, 0, 0], [1, 1, 4, 8, 6, 2]])
LENGTHS = torch.tensor([4, 1, 6])
TIMES = torch.tensor(
    [[0.0, 9.0, 9.0, 4000.0, 0, 0], [77.0, 0, 0, 0, 0, 0], [1.0, 2.0, 50.0, 900.0, 1e5, 1e9]],
    dtype=torch.float64,
)


# --- the formula ----------------------------------------------------------------------------------


def slow_silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def slow_norm(x: Any) -> Any:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def slow_bucket(seconds: float) -> int:
    return min(int(math.log(max(seconds, 1.0)) / 0.301), 127)


def slow_block(
    block: HSTUBlock, settings: HSTUSettings, x: Any, times: Any, max_length: int
) -> Any:
    """One block for one row without padding, ``[L, d]``."""
    heads, a, c = settings.n_heads, settings.attention_dim, settings.linear_dim
    weights = {name: p.detach().numpy() for name, p in block.named_parameters()}
    parts = [slow_silu(weights["project.weight"] @ slow_norm(row)) for row in x]
    out = []
    for i in range(len(x)):
        attended = np.zeros(heads * c)
        for head in range(heads):
            for j in range(i + 1):
                v = parts[j][heads * c + head * c :][:c]
                q = parts[i][2 * heads * c + head * a :][:a]
                k = parts[j][2 * heads * c + heads * a + head * a :][:a]
                logit = sum(q[n] * k[n] for n in range(a))
                if settings.relative_bias != "none":
                    logit += weights["position_bias"][i - j]
                if settings.relative_bias == "position_time":
                    logit += weights["time_bias"][slow_bucket(times[i] - times[j])]
                attended[head * c :][:c] += slow_silu(logit) / (max_length + 10) * v
        gated = parts[i][: heads * c] * slow_norm(attended)
        out.append(x[i] + weights["project_out.weight"] @ gated + weights["project_out.bias"])
    return np.array(out)


@pytest.mark.parametrize("bias", BIASES)
def test_a_block_is_its_formula(bias: str) -> None:
    settings = HSTUSettings.from_mapping(
        {"hidden_size": 8, "n_heads": 2, "attention_dim": 3, "linear_dim": 5, "relative_bias": bias}
    )
    torch.manual_seed(0)
    block = HSTUBlock(settings, 6).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    real = torch.arange(6) < LENGTHS.unsqueeze(1)
    x = torch.randn(int(LENGTHS.sum()), 8, dtype=torch.float64)
    buckets = torch.tensor(
        [[[slow_bucket(float(i - j)) for j in row] for i in row] for row in TIMES]
    )
    out = block(x, real, buckets if bias == "position_time" else None).detach().numpy()
    ends = LENGTHS.cumsum(0).tolist()
    for row, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        expected = slow_block(block, settings, x[start:end].numpy(), TIMES[row].tolist(), 6)
        np.testing.assert_allclose(out[start:end], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_query_is_its_formula(folder: Path, bias: str, n_layers: int) -> None:
    model = noisy_model(build_hstu(folder, relative_bias=bias, n_layers=n_layers))
    queries = last_query(model, SEQ, LENGTHS, TIMES).detach().numpy()
    items, positions = (
        each.weight.detach().numpy() for each in (model.item_embedding, model.position_embedding)
    )
    for row, length in enumerate(LENGTHS.tolist()):
        x = items[SEQ[row, :length].numpy()] * math.sqrt(8) + positions[:length]
        for block in model.blocks:
            x = slow_block(block, model.settings, x, TIMES[row].tolist(), 6)
        np.testing.assert_allclose(queries[row], x[-1] / np.sqrt((x[-1] ** 2).sum()), rtol=1e-8)


def slow_loss(
    queries: Any, table: Any, targets: list[int], negatives: list[int], temperature: float
) -> float:
    total = 0.0
    for query, target in zip(queries, targets, strict=True):
        cosine = [
            query @ table[i] / math.sqrt((query @ query) * (table[i] @ table[i]))
            for i in range(len(table))
        ]
        own = math.exp(cosine[target] / temperature)
        rest = sum(math.exp(cosine[i] / temperature) for i in negatives if i != target)
        total -= math.log(own / (own + rest))
    return total / len(targets)


def batch(model: Any, **columns: Tensor) -> Interaction:
    given = {
        model.ITEM_SEQ: SEQ,
        model.ITEM_SEQ_LEN: LENGTHS,
        model.ITEM_ID: torch.tensor([7, 9, 3]),
        **columns,
    }
    return Interaction(given)


def test_the_loss_is_its_formula_at_every_position(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = noisy_model(build_hstu(folder, temperature=0.3))
    negatives = [2, 11, 7, 7, 30, 9]  # 7 twice; 2, 7 and 9 are targets of some rows
    monkeypatch.setattr(model, "_draw_negatives", lambda: torch.tensor(negatives))
    # The query of a position must be that of the row up to there.
    cut = [
        (row, end) for row, length in enumerate(LENGTHS.tolist()) for end in range(1, length + 1)
    ]
    queries = [
        last_query(model, SEQ[row : row + 1], torch.tensor([end]))[0].detach().numpy()
        for row, end in cut
    ]
    targets = [7, 2, 9, 7, 9, 1, 4, 8, 6, 2, 3]
    table = model.item_embedding.weight.detach().numpy()
    expected = slow_loss(queries, table, targets, negatives, 0.3)
    assert model.calculate_loss(batch(model)).item() == pytest.approx(expected, rel=1e-10)


def test_a_negative_that_is_the_target_does_not_count(folder: Path) -> None:
    model = noisy_model(build_hstu(folder))
    query = torch.nn.functional.normalize(
        torch.randn(1, 8, dtype=torch.float64), dim=-1
    ).requires_grad_()
    target = torch.tensor([5])
    with_hit = model.sampled_softmax(query, target, torch.tensor([4, 5, 6, 5]))
    assert with_hit.item() == pytest.approx(
        model.sampled_softmax(query, target, torch.tensor([4, 6])).item()
    )
    nothing_left = model.sampled_softmax(query, target, torch.tensor([5, 5]))
    nothing_left.backward()
    assert nothing_left.item() == 0
    assert query.grad is not None
    assert torch.equal(query.grad, torch.zeros_like(query))


def test_negatives_are_items_and_reach_all_of_them(folder: Path) -> None:
    model = build_model(build_hstu(folder, n_negatives=2000))
    drawn = model._draw_negatives()
    assert drawn.shape == (2000,)
    # An item is missed with probability 60 · (59/60)^2000 < 1e-12.
    assert set(drawn.tolist()) == set(range(1, model.n_items))


# --- what may not depend on what ------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
def test_more_padding_changes_nothing(folder: Path, bias: str) -> None:
    model = noisy_model(build_hstu(folder, relative_bias=bias)).float()
    times = TIMES.float()
    both = last_query(model, SEQ, LENGTHS, times)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = last_query(
            model,
            SEQ[row : row + 1, :length],
            LENGTHS[row : row + 1],
            times[row : row + 1, :length],
        )
        torch.testing.assert_close(both[row], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("changed", range(1, 6))
def test_a_later_item_changes_no_earlier_position(folder: Path, bias: str, changed: int) -> None:
    model = noisy_model(build_hstu(folder, relative_bias=bias))
    other_items, other_times = SEQ[2:].clone(), TIMES[2:].clone()
    other_items[0, changed] = 33
    other_times[0, changed] *= 5
    before, _ = model.forward(SEQ[2:], LENGTHS[2:], TIMES[2:])
    after, _ = model.forward(other_items, LENGTHS[2:], other_times)
    assert torch.equal(before[:changed], after[:changed])
    assert all((before[place] != after[place]).any() for place in range(changed, 6))


def test_one_time_unit_is_a_second(folder: Path) -> None:
    """Buckets grow by e^.301 = 1.35: a second is in the first, more than a lifetime in the last."""
    model = build_model(build_hstu(folder, relative_bias="position_time"))
    times = torch.tensor([[0.0, 0.5, 1.36, 10.0, 1e30]])
    expected = [0, 0, 1, int(math.log(10) / 0.301), 127]
    assert model._time_buckets(times)[0, :, 0].tolist() == expected


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "factor"), [("temperature", 1 / 0.2), ("cosine", 1.0)])
def test_scores_are_cosines_over_the_temperature(folder: Path, scale: str, factor: float) -> None:
    model = noisy_model(build_hstu(folder, score_scale=scale, temperature=0.2))
    query = last_query(model, SEQ, LENGTHS).detach().numpy()
    table = model.item_embedding.weight.detach().numpy()
    expected = [[q @ t / np.sqrt(t @ t) * factor for t in table] for q in query]
    scores = model.full_sort_predict(batch(model))
    np.testing.assert_allclose(scores.detach().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(
        model.predict(batch(model)).detach(), [expected[n][i] for n, i in enumerate([7, 9, 3])]
    )


def test_scores_are_a_product_of_two_tables_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = noisy_model(build_hstu(folder))
    seen: list[Tensor] = []
    matmul = torch.matmul

    def recorded(left: Tensor, right: Tensor) -> Tensor:
        seen.extend([left, right, matmul(left, right)])
        return seen[-1]

    monkeypatch.setattr(torch, "matmul", recorded)
    scores = model.full_sort_predict(batch(model))
    query, table, product = seen
    assert scores is product
    assert (query.shape, table.shape) == ((3, 8), (8, model.n_items))


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_gradient_reaches_every_parameter(folder: Path, bias: str, n_layers: int) -> None:
    bundle = build_hstu(folder, relative_bias=bias, n_layers=n_layers)
    model = build_model(bundle)
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    assert ("position_bias" in names, "time_bias" in names) == (
        bias != "none",
        bias == "position_time",
    )
    model.calculate_loss(next(iter(bundle.train))).backward()
    silent = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not silent
    assert not model.item_embedding.weight.grad[0].any()


@pytest.mark.parametrize(
    "split",
    [{"LS": "valid_and_test"}, {"RS": [0.8, 0.1, 0.1]}],
    ids=lambda split: str(next(iter(split))),
)
def test_training_learns_and_the_checkpoint_reopens(tmp_path: Path, split: dict[str, Any]) -> None:
    """Item n is always followed by item n + 1, modulo 30."""
    pairs = [(f"u{user}", f"i{(7 * user + step) % 30}") for user in range(40) for step in range(10)]
    write_dataset(tmp_path, "chain", pairs)
    bundle = build_hstu(
        tmp_path,
        dataset="chain",
        eval_args={"split": split, "group_by": "user", "order": "TO", "mode": "full"},
        hidden_size=16,
        n_negatives=30,
        epochs=20,
        learning_rate=0.01,
        train_batch_size=8,
        eval_step=10,
        hidden_dropout_prob=0.1,
        emb_dropout_prob=0.1,
    )
    untrained = build_model(bundle)
    before = sum(untrained.calculate_loss(each).item() for each in bundle.train)
    model = train_and_save(bundle, tmp_path / "hstu.pth")
    after = sum(model.calculate_loss(each).item() for each in bundle.train)
    assert after < 0.5 * before
    result = Trainer(bundle.config, model).evaluate(bundle.test, load_best_model=False)
    assert result["recall@10"] > 0.9  # at random 10 / 30
    _, reopened, _, train, _, test = load_data_and_model(str(tmp_path / "hstu.pth"))
    assert type(reopened) is HSTU
    assert Trainer(bundle.config, reopened).evaluate(test, load_best_model=False) == result
    assert len(train._dataset) == len(bundle.train._dataset) == 40


def test_plain_recbole_runs_it(folder: Path) -> None:
    config = build_config(folder, "HSTU", **SMALL)
    given = {**config.external_config_dict, "data_path": str(folder)}
    result = run_recbole(model="HSTU", dataset="tiny", config_dict=given, saved=False)
    assert 0 <= result["test_result"]["ndcg@10"] <= 1


# --- the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split", [{"LS": "valid_and_test"}, {"LS": "test_only"}, {"RS": [0.6, 0.2, 0.2]}], ids=str
)
@pytest.mark.parametrize("group_by", ["user", "none"])
@pytest.mark.parametrize("max_length", [3, 50])
def test_one_training_row_per_user_and_all_pairs(
    folder: Path, split: dict[str, Any], group_by: str, max_length: int
) -> None:
    given = {
        **SMALL,
        "eval_args": {"split": split, "group_by": group_by, "order": "TO", "mode": "full"},
        "MAX_ITEM_LIST_LENGTH": max_length,
    }
    ours = create_dataset(build_config(folder, "HSTU", **given))
    theirs = create_dataset(build_config(folder, "SASRec", train_neg_sample_args=None, **given))
    assert type(ours) is HSTUDataset
    got, expected = ours.build(), theirs.build()
    for mine, plain in zip(got[1:], expected[1:], strict=True):
        for field in plain.inter_feat.columns:
            assert torch.equal(mine.inter_feat[field], plain.inter_feat[field]), field

    # The items of each user in their order: the list and the target of the first row, and then the
    # target of each later row.
    taken: dict[int, list[int]] = defaultdict(list)
    rows = expected[0].inter_feat
    fields = ("user_id", "item_length", "item_id", "item_id_list")
    for user, length, item, items in zip(*(rows[field].tolist() for field in fields), strict=True):
        taken[user] += [item] if taken[user] else [*items[:length], item]
    left = got[0].inter_feat
    assert left["user_id"].tolist() == sorted(taken)
    for user, length, item, items in zip(*(left[field].tolist() for field in fields), strict=True):
        assert item == taken[user][-1]
        assert items[:length] == taken[user][-1 - max_length : -1]
    pairs = sorted({(user, item) for user, items in taken.items() for item in items})
    for dataset in got:
        assert list(zip(*(ids.tolist() for ids in dataset.training_pairs), strict=True)) == pairs


def test_a_ready_split_in_any_order(tmp_path: Path) -> None:
    header = ("user_id:token", "item_id_list:token_seq", "item_id:token")
    rows = [("a", "i1 i2 i3", "i4"), ("b", "i9", "i1"), ("a", "i1", "i2"), ("a", "i5 i1", "i1")]
    write_atomic_file(tmp_path / "ready" / "ready.train.inter", header, rows)
    write_atomic_file(tmp_path / "ready" / "ready.test.inter", header, [("b", "i9 i1", "i2")])
    given = {**SMALL, "load_col": {"inter": ["user_id", "item_id_list", "item_id"]}}
    alias = {"benchmark_filename": ["train", "test", "test"], "alias_of_item_id": ["item_id_list"]}
    dataset = create_dataset(build_config(tmp_path, "HSTU", "ready", **given, **alias))
    train = dataset.build()[0]
    tokens = [dataset.id2token("item_id", row) for row in train.inter_feat["item_id_list"]]
    assert [[token for token in row if token != "[PAD]"] for row in tokens] == [
        ["i1", "i2", "i3"],
        ["i9"],
    ]
    users, items = (
        dataset.id2token(f, i)
        for f, i in zip(("user_id", "item_id"), train.training_pairs, strict=True)
    )
    expected = [("a", f"i{n}") for n in (1, 2, 3, 4, 5)] + [("b", "i1"), ("b", "i9")]
    assert sorted(zip(users, items, strict=True)) == expected


# --- RecBole finds it -----------------------------------------------------------------------------


def test_recbole_finds_model_and_dataset_by_name() -> None:
    assert get_model("HSTU") is HSTU
    assert importlib.util.find_spec("recbole.model.sequential_recommender.hstu") is not None
    assert HSTU.type == ModelType.SEQUENTIAL
    assert vars(recbole_datasets)["HSTUDataset"] is HSTUDataset
    models.register()
    assert get_model("HSTU") is HSTU


def test_config_precedence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("n_layers: 3\nn_heads: 3\nhidden_size: 24\n")
    monkeypatch.setattr(sys, "argv", ["x", "--n_layers=5"])
    given = {"n_layers": 4, "n_heads": 4, "data_path": str(folder), "use_gpu": False}
    config = Config(model="HSTU", dataset="tiny", config_file_list=[str(file)], config_dict=given)
    values = [config[key] for key in ("temperature", "hidden_size", "n_heads", "n_layers")]
    assert values == [0.05, 24, 4, 5]  # ours, the file, the dict, the command line
    # RecBole's overall.yaml has "uniform".
    assert config["train_neg_sample_args"]["distribution"] == "none"
    assert Config(model=HSTU, dataset="tiny", config_dict=given)["temperature"] == 0.05
    assert (
        Config(
            model="SASRec", dataset="tiny", config_dict={**given, "train_neg_sample_args": None}
        )["n_negatives"]
        is None
    )


def test_the_defaults_are_those_of_the_yaml(folder: Path) -> None:
    model = build_model(build(folder, "HSTU", load_col=SMALL["load_col"]))
    assert model.settings == HSTUSettings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"relative_bias": "time"},
            r"\[relative_bias\] is 'time', but must be one of none, position, position_time",
        ),
        ({"temperature": 0}, r"\[temperature\] is 0.0, but must be above 0"),
        ({"n_layers": 0}, r"\[n_layers\] is 0, but must be at least 1"),
        (
            {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
            "HSTU draws its own",
        ),
    ],
)
def test_bad_settings_are_refused(folder: Path, given: dict[str, Any], message: str) -> None:
    bundle = build_hstu(folder)
    for key, value in given.items():
        bundle.config[key] = value
    with pytest.raises(SettingsError, match=message):
        build_model(bundle)


def test_the_time_bias_needs_times(folder: Path, tmp_path: Path) -> None:
    bundle = build_hstu(folder, relative_bias="position_time")
    model = build_model(bundle)
    with pytest.raises(SettingsError, match=r"there is no \[timestamp_list\]: load the time field"):
        last_query(model, SEQ, LENGTHS)
    del bundle.train._dataset.inter_feat.interaction["timestamp_list"]
    with pytest.raises(SettingsError, match=r"there is no \[timestamp_list\]: load the time field"):
        build_model(bundle)
