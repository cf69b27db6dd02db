"""Sequential and context-aware models, scored row by row; what a step's two losses share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import ModelType
from torch import Tensor

from recbole_rcekd.core.errors import ScoringError
from recbole_rcekd.core.top_k import ProductRanking
from recbole_rcekd.data.contexts import Rows
from recbole_rcekd.models.batch_scores import FactoredBatchScores
from recbole_rcekd.models.probe import require_rankable
from recbole_rcekd.models.scorer import ModelScorer
from tests.helpers import Bundle, block_pairs, build, build_model, write_atomic_file, write_dataset
from tests.models.test_scorer import classes_in

N_USERS, N_ITEMS = 20, 30
KINDS = {
    **dict.fromkeys(
        ("Caser", "FOSSIL", "GCSAN", "GRU4Rec", "HGN", "HRM", "LightSANs", "NARM", "NPE"), "product"
    ),
    **dict.fromkeys(("NextItNet", "SASRec", "SHAN", "SINE", "SRGNN", "STAMP", "FEARec"), "product"),
    **dict.fromkeys(("FDSA", "GRU4RecF", "SASRecF"), "product"),
    # A bias, a temperature; a product once they are frozen.
    **dict.fromkeys(("BERT4Rec", "CORE"), "rows"),
    **dict.fromkeys(("FPMC", "RepeatNet", "TransRec", "SASRecCPR", "GRU4RecCPR"), "rows"),
    **dict.fromkeys(("DIN", "DIEN"), "pairs"),
}
LATER_PRODUCTS = ("BERT4Rec", "CORE")
# These need files of pretrained entities, or a pretrained model.
LEFT_OUT = {"GRU4RecKG", "KSR", "S3Rec"}
SMALL: dict[str, Any] = {
    "MAX_ITEM_LIST_LENGTH": 10,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]},
    "embedding_size": 8,
    "hidden_size": 8,
    "inner_size": 8,
    "n_layers": 1,
    "n_heads": 2,
    "mlp_hidden_size": [8],
    "train_batch_size": 16,
}
CE: dict[str, Any] = {"loss_type": "CE", "train_neg_sample_args": None}
BPR: dict[str, Any] = {"loss_type": "BPR"}
BPR_OF_ALL: dict[str, Any] = {"loss_type": "BPR", "train_neg_sample_args": None}
RERANKED: dict[str, Any] = {**CE, "reranker_CAN_NUM": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("FPMC", "TransRec", "DIN", "DIEN"), BPR),
    **dict.fromkeys(("FOSSIL", "HRM"), BPR_OF_ALL),
    **dict.fromkeys(("SASRecCPR", "GRU4RecCPR"), RERANKED),
    "FEARec": {**CE, "n_layers": 2},  # with one it divides by zero
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_dataset(
        tmp_path_factory.mktemp("rows"), pairs=block_pairs(N_USERS, N_ITEMS, 4, per_user=7)
    )
    items = [(f"i{i}", f"c{i % 3} c{i % 5}", i % 4) for i in range(N_ITEMS)]
    write_atomic_file(
        path / "tiny" / "tiny.item", ("item_id:token", "class:token_seq", "colour:token"), items
    )
    users = [(f"u{u}", f"a{u % 6}") for u in range(N_USERS)]
    write_atomic_file(path / "tiny" / "tiny.user", ("user_id:token", "age:token"), users)
    return path


def make(folder: Path, name: str, **overrides: Any) -> tuple[Any, Bundle]:
    """With weights so large that scores differ."""
    bundle = build(folder, name, **{**SMALL, **SPECIAL.get(name, CE), **overrides})
    model = build_model(bundle)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model, bundle


def own_scores(model: Any, rows: Any, kind: str) -> Tensor:
    """Full rows as RecBole's evaluation gets them."""
    n = len(rows)
    if kind != "pairs":
        scores: Tensor = model.full_sort_predict(rows)
        return scores.view(n, -1)
    grid = rows.repeat_interleave(model.n_items)
    grid["item_id"] = torch.arange(model.n_items).repeat(n)
    scores = model.predict(grid)
    return scores.view(n, -1)


def test_no_sequential_model_of_recbole_is_forgotten() -> None:
    found = classes_in("recbole.model.sequential_recommender", SequentialRecommender)
    assert found == set(KINDS) | LEFT_OUT


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_scored_as_the_model_scores_them(folder: Path, name: str) -> None:
    model, bundle = make(folder, name)
    dataset = bundle.train._dataset
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trained, frozen = (
        ModelScorer(model, dataset, trainable=True),
        ModelScorer(model, dataset, frozen=True),
    )
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert trained.kind == KINDS[name]
    assert frozen.kind == ("product" if name in LATER_PRODUCTS else KINDS[name])
    assert (frozen._form.scale_and_bias is not None) == (name in LATER_PRODUCTS)
    assert trained.n_contexts == len(dataset)
    ids = torch.tensor([30, 0, 7, 30])
    items = torch.randint(1, N_ITEMS + 1, (4, 6))
    model.eval()
    with torch.no_grad():
        expected = own_scores(model, Rows(dataset).inputs(ids), trained.kind)
    assert expected[:, 1:].std() > 1e-3
    for scorer in (trained, frozen):
        with scorer.evaluating():
            everything, cells = scorer.score_all(ids), scorer.score(ids, items)
            of_batch = scorer.score_batch(Rows(dataset).inputs(ids), []).score_all()
        for found in (everything, of_batch):
            assert (found[:, 0] == -torch.inf).all()
            torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cells, expected.gather(1, items), rtol=1e-4, atol=1e-4)
    if frozen.kind == "product":
        assert isinstance(frozen.ranking(), ProductRanking)


@pytest.mark.parametrize("name", LATER_PRODUCTS)
def test_a_scale_and_a_bias_are_read_off_once_only_of_what_is_frozen(
    folder: Path, name: str
) -> None:
    model, bundle = make(folder, name)
    model.eval()
    scorer = ModelScorer(model, bundle.train._dataset, frozen=True)
    assert scorer._form.scale_and_bias is not None
    scale, bias = scorer._form.scale_and_bias
    if name == "CORE":
        assert scale == pytest.approx(1 / model.temperature, rel=1e-4)
        assert float(bias.abs().max()) < 1e-4
    else:
        assert scale == pytest.approx(1.0, rel=1e-4)
        torch.testing.assert_close(
            bias, model.output_bias[: len(bias)].detach(), rtol=1e-4, atol=1e-4
        )
        assert float(bias.abs().max()) > 0.1
    # Not so if the scores are no such thing.
    original = model.full_sort_predict
    model.full_sort_predict = lambda rows: original(rows).square()
    assert ModelScorer(model, bundle.train._dataset, frozen=True).kind == "rows"


# --- what a step shares ---------------------------------------------------------------------------


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How often the model runs, whoever asks."""
    calls: list[int] = []
    original = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        yield calls


DROPOUT = {"hidden_dropout_prob": 0.4, "attn_dropout_prob": 0.4, "dropout_prob": 0.4}


@pytest.mark.parametrize(
    ("name", "overrides", "n_forwards", "known"),
    [
        ("SASRec", CE, 1, True),
        (
            "SASRec",
            {**BPR, "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
            1,
            False,
        ),
        ("GRU4Rec", CE, 1, True),
        # Its own loss runs it twice on the same sequences, for two draws of dropout, and once on
        # others.
        ("FEARec", {**CE, "n_layers": 2, "contrast": "us", "tau": 1.0, "sim": "dot"}, 3, True),
    ],
    ids=["SASRec", "SASRec with BPR", "GRU4Rec", "FEARec"],
)
def test_base_loss_and_scores_share_one_forward(
    folder: Path, name: str, overrides: dict[str, Any], n_forwards: int, known: bool
) -> None:
    model, bundle = make(folder, name, **DROPOUT, **overrides)
    scorer = ModelScorer(model, bundle.train._dataset, trainable=True)
    batch = next(iter(bundle.train))
    model.train()

    def base_loss() -> Tensor:
        torch.manual_seed(3)
        random.seed(3)
        loss: Tensor = model.calculate_loss(batch)
        return loss

    alone = float(base_loss())
    with counted(model) as calls, scorer.shared_forward() as end_step:
        with scorer.recording_products(batch) as products:
            base = base_loss()
        assert len(calls) == n_forwards
        after = torch.random.get_rng_state()
        scores = scorer.score_batch(batch, products)
        assert len(calls) == n_forwards
        assert torch.equal(torch.random.get_rng_state(), after)
        assert float(base) == alone
        assert isinstance(scores, FactoredBatchScores)
        assert (scores._known is not None) == known
        first = scores.score_all()
        if known:  # the very logits of the loss
            logits = next(p for _, _, p in products if p is not None and p.shape == first.shape)
            assert torch.equal(first[:, 1:], logits[:, 1:])
        end_step()
        again = scorer.score_batch(batch, [])
        assert len(calls) == n_forwards + 1
        assert not torch.equal(again.score_all(), first)  # another draw of dropout
    assert "forward" not in vars(model)


def test_what_a_step_shares_has_the_gradient_of_both(folder: Path) -> None:
    model, bundle = make(folder, "GRU4Rec", dropout_prob=0.0, num_layers=1)
    scorer = ModelScorer(model, bundle.train._dataset, trainable=True)
    batch = next(iter(bundle.train))
    items = torch.randint(1, N_ITEMS, (len(batch), 3))
    found = []
    for shared in (True, False):
        model.zero_grad()
        with scorer.shared_forward() as end_step:
            with scorer.recording_products(batch) as products:
                base = model.calculate_loss(batch)
            if not shared:
                end_step()
            cells = scorer.score_batch(batch, products if shared else []).score(items)
            torch.autograd.backward(base + cells.square().sum())
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for key, gradient in found[1].items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-4, atol=1e-5)


# --- models that read features --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FM", "DeepFM"])
def test_context_aware_models_are_asked_pair_by_pair(folder: Path, name: str) -> None:
    columns = {
        "inter": ["user_id", "item_id", "timestamp"],
        "item": ["item_id", "class", "colour"],
        "user": ["user_id", "age"],
    }
    bundle = build(
        folder,
        name,
        load_col=columns,
        embedding_size=4,
        mlp_hidden_size=[8],
        dropout_prob=0.0,
        train_neg_sample_args={"distribution": "uniform", "sample_num": 1},
        eval_args={
            "mode": "full",
            "split": {"RS": [0.8, 0.1, 0.1]},
            "order": "RO",
            "group_by": "user",
        },
    )
    model, dataset = build_model(bundle), bundle.train._dataset
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    scorer = ModelScorer(model, dataset, trainable=True)
    assert scorer.kind == "pairs"
    assert scorer.n_contexts == N_USERS + 1
    users = torch.tensor([3, 9, 3])
    tokens = {field: dataset.field2id_token[field] for field in ("user_id", "item_id")}
    rows = []
    for user in users.tolist():
        for item in range(1, N_ITEMS + 1):
            u, i = int(tokens["user_id"][user][1:]), int(tokens["item_id"][item][1:])
            classes = [dataset.field2token_id["class"][c] for c in (f"c{i % 3}", f"c{i % 5}")]
            age, colour = (
                dataset.field2token_id["age"][f"a{u % 6}"],
                dataset.field2token_id["colour"][str(i % 4)],
            )
            rows.append((user, item, classes, age, colour))
    fields = ("user_id", "item_id", "class", "age", "colour")
    grid = Interaction(
        {
            f: torch.tensor(c)
            for f, c in zip(fields, map(list, zip(*rows, strict=True)), strict=True)
        }
    )
    model.eval()
    with torch.no_grad():
        expected = model.predict(grid).view(3, N_ITEMS)
    items = torch.tensor([[1, 5], [30, 2], [7, 7]])
    with scorer.evaluating():
        torch.testing.assert_close(scorer.score_all(users)[:, 1:], expected)
        torch.testing.assert_close(scorer.score(users, items), expected.gather(1, items - 1))
    assert expected.std() > 0.1
    assert scorer.score(users, items).requires_grad


@pytest.mark.parametrize("kind", [ModelType.DECISIONTREE, None])
def test_what_is_no_torch_model_is_refused(kind: Any) -> None:
    class Forest:
        type = kind

    with pytest.raises(
        ScoringError,
        match=r"^Forest is a \w+ model, which RecBole trains and scores outside of torch",
    ):
        require_rankable(Forest)
