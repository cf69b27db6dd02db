"""Every model that RecBole can build here: scored as its full sort does, or refused.

What is expected comes from the model's own `full_sort_predict` or `predict`, called here without
our code.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_rcekd.core.errors import ScoringError
from recbole_rcekd.core.products import picked_products
from recbole_rcekd.models.scorer import ModelScorer
from tests.helpers import Bundle, build, build_model, write_dataset, write_knowledge

# isort: split
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender, KnowledgeRecommender
from recbole.model.general_recommender import BPR
from recbole.utils import ModelType

GENERAL = {
    **dict.fromkeys(
        ("BPR", "LINE", "LightGCN", "NGCF", "DGCF", "SGL", "NCL", "SpectralCF", "SimpleX"),
        "product",
    ),
    "NCEPLRec": "product",
    # DMF ends in a sigmoid, so its scores are no product.
    **dict.fromkeys(("DMF", "ENMF", "GCMC", "FISM", "NAIS"), "rows"),
    **dict.fromkeys(
        ("CDAE", "MultiDAE", "MultiVAE", "MacridVAE", "RecVAE", "RaCT", "DiffRec", "LDiffRec"),
        "rows",
    ),
    **dict.fromkeys(
        ("Pop", "Random", "ItemKNN", "AsymKNN", "EASE", "SLIMElastic", "ADMMSLIM"), "rows"
    ),
    **dict.fromkeys(("NeuMF", "ConvNCF", "NNCF"), "pairs"),
}
KNOWLEDGE = {
    **dict.fromkeys(("CKE", "KGAT", "KGIN", "MCCLK"), "product"),
    **dict.fromkeys(("KGCN", "KGNNLS", "RippleNet"), "rows"),
    **dict.fromkeys(("CFKG", "KTUP", "MKR"), "pairs"),
}
KINDS = {**GENERAL, **KNOWLEDGE}
# Packages that are not among RecBole's requirements; without them the model cannot be built.
NEEDS = {"KGAT": "dgl", "KGIN": "torch_scatter", "MCCLK": "torch_scatter"}
NO_GRADIENT = ("Pop", "Random", "ItemKNN", "AsymKNN", "EASE", "SLIMElastic", "ADMMSLIM", "NCEPLRec")
TRAINABLE = [name for name in KINDS if name not in NO_GRADIENT]
KEEP_THEIR_EVALUATION = ("LightGCN", "NGCF", "DGCF", "SGL", "NCL", "SpectralCF", "DMF")
PROPAGATE_IN_FORWARD = ("LightGCN", "NGCF", "DGCF", "SGL", "NCL", "SpectralCF")

SMALL: dict[str, Any] = {
    "embedding_size": 8,
    "kg_embedding_size": 8,
    "mlp_hidden_size": [8],
    "latent_dimension": 4,
    "hidden_dimension": 8,
    "encoder_hidden_size": [8],
    "dims_dnn": [8],
    "in_dims": [8],
    "gcn_output_dim": 8,
    "n_layers": 2,
}
NO_SAMPLING: dict[str, Any] = {"train_neg_sample_args": None}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("CDAE", "MultiDAE", "MultiVAE", "RecVAE", "RaCT", "DiffRec", "LDiffRec"), NO_SAMPLING
    ),
    "MacridVAE": {**NO_SAMPLING, "kfac": 2},
    "KTUP": {"use_st_gumbel": False},  # with it, even its evaluation draws noise
    "ConvNCF": {"embedding_size": 64},  # its convolutions are cut to this size
}


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("scoring"))
    write_knowledge(folder)
    return folder


def make(data_path: Path, name: str, **overrides: Any) -> tuple[Any, Bundle]:
    """A model with weights large enough for its scores to differ, and its data."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{name} needs {NEEDS[name]}, which is not installed")
    bundle = build(data_path, name, **{**SMALL, **SPECIAL.get(name, {}), **overrides})
    model = build_model(bundle)
    if name == "Pop":  # it counts in training
        for interaction in bundle.train:
            model.calculate_loss(interaction)
    if name not in NO_GRADIENT:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model, bundle


def scorer_of(model: Any, bundle: Bundle, trainable: bool = False) -> ModelScorer:
    return ModelScorer(model, bundle.train._dataset, trainable)


def forget_evaluation(model: Any) -> None:
    for name in ("restore_user_e", "restore_item_e", "i_embedding"):
        if name in vars(model):
            setattr(model, name, None)


def own_scores(model: Any, kind: str, users: Tensor) -> Tensor:
    """Full rows as RecBole's evaluation gets them."""
    n_items = int(model.n_items)
    torch.manual_seed(7)  # for `Random`
    forget_evaluation(model)
    if kind == "pairs":
        grid = {
            "user_id": users.repeat_interleave(n_items),
            "item_id": torch.arange(n_items).repeat(len(users)),
        }
        scores = model.predict(Interaction(grid))
    else:
        scores = model.full_sort_predict(Interaction({"user_id": users}))
    forget_evaluation(model)
    rows: Tensor = scores.view(len(users), n_items)
    return rows


def classes_in(package_name: str, base: type) -> set[str]:
    package = importlib.import_module(package_name)
    found = set()
    for info in pkgutil.iter_modules(package.__path__, package_name + "."):
        module = importlib.import_module(info.name)
        found |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == info.name
        }
    return found


def test_no_model_of_recbole_is_forgotten() -> None:
    assert classes_in("recbole.model.general_recommender", GeneralRecommender) == set(GENERAL)
    assert classes_in("recbole.model.knowledge_aware_recommender", KnowledgeRecommender) == set(
        KNOWLEDGE
    )


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_the_models_own(data_path: Path, name: str) -> None:
    model, bundle = make(data_path, name)
    scorer = scorer_of(model, bundle)
    assert scorer.kind == KINDS[name]

    users = torch.tensor([5, 1, 5, 17])  # one of them twice
    model.eval()
    with torch.no_grad():
        expected = own_scores(model, scorer.kind, users)
    items = torch.randint(
        1, scorer.n_items, (len(users), 9), generator=torch.Generator().manual_seed(1)
    )
    items[:, 3] = items[:, 2]
    with scorer.evaluating():
        torch.manual_seed(7)
        everything = scorer.score_all(users)
        torch.manual_seed(7)
        cells = scorer.score(users, items.int())  # ids are kept in 32 bits elsewhere
    assert expected[:, 1:].std() > 0
    assert everything.shape == (len(users), bundle.dataset.item_num)
    assert (everything[:, 0] == -torch.inf).all()
    torch.testing.assert_close(everything[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cells, expected.gather(1, items), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradient_is_the_models_own(data_path: Path, name: str) -> None:
    model, bundle = make(data_path, name)
    scorer = scorer_of(model, bundle, trainable=True)
    users = torch.tensor([5, 1, 5])
    items = torch.tensor([[3, 4, 3], [60, 1, 2], [9, 8, 7]])
    weights = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 1.0], [2.0, -1.0, 1.5]])

    def gradients(scores: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        torch.autograd.backward((scores * weights).sum())
        return {
            key: value.grad.clone()
            for key, value in model.named_parameters()
            if value.grad is not None
        }

    model.eval()  # no dropout: the same function twice
    wanted = gradients(own_scores(model, scorer.kind, users).gather(1, items))
    got = gradients(scorer.score(users, items))
    assert any(gradient.abs().sum() > 0 for gradient in wanted.values())
    for key, gradient in wanted.items():
        torch.testing.assert_close(
            got.get(key, torch.zeros(())).expand_as(gradient), gradient, rtol=1e-3, atol=1e-5
        )

    model.train()
    drawn = gradients(scorer.score(users, items))
    assert any(gradient.abs().sum() > 0 for gradient in drawn.values())


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_models_without_gradient_are_no_students(data_path: Path, name: str) -> None:
    model, bundle = make(data_path, name)
    with pytest.raises(ScoringError, match=f"^{name} has no gradient .* cannot be a student"):
        scorer_of(model, bundle, trainable=True)


def random_states() -> tuple[Any, Any, str]:
    of_numpy = str(np.random.get_state())  # noqa: NPY002
    return torch.random.get_rng_state().tolist(), random.getstate(), of_numpy


@pytest.mark.parametrize("name", KINDS)
def test_start_up_check_leaves_no_trace(data_path: Path, name: str) -> None:
    model, bundle = make(data_path, name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        graph = getattr(
            model, "sub_graph1", None
        )  # SGL draws one whenever it is put into training mode
        before = random_states()
        scorer = scorer_of(model, bundle, trainable=name not in NO_GRADIENT)
        with scorer.evaluating():
            pass
        assert random_states() == before
        assert model.training is training
        assert all(module.training is training for module in model.modules())
        assert getattr(model, "sub_graph1", None) is graph
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(
        getattr(model, cache, None) is not None for cache in ("restore_user_e", "i_embedding")
    )


@pytest.mark.parametrize("name", KEEP_THEIR_EVALUATION)
def test_next_evaluation_uses_the_new_weights(data_path: Path, name: str) -> None:
    model, bundle = make(data_path, name)
    scorer = scorer_of(model, bundle, trainable=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    users = torch.tensor([1, 2, 3])

    def evaluate(some_model: Any) -> Tensor:
        some_model.eval()
        with torch.no_grad():
            scores: Tensor = some_model.full_sort_predict(Interaction({"user_id": users})).view(
                len(users), -1
            )
        return scores

    before = evaluate(model)  # fills the cache, which the scoring below must not use
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.train()
    scores = scorer.score(users, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert not torch.allclose(scores, before[:, :6].reshape(3, 2, 3)[:, :, 0])
    torch.autograd.backward(-scores.sum())
    optimizer.step()
    with scorer.evaluating():  # as lists are renewed: several blocks, then another step
        scorer.score_all(users)
        scorer.score_all(users + 3)
    model.train()
    optimizer.zero_grad()
    torch.autograd.backward(scorer.score(users, torch.tensor([[1], [2], [3]])).sum())
    optimizer.step()

    fresh = build_model(bundle)
    fresh.load_state_dict(model.state_dict())
    after = evaluate(model)
    torch.testing.assert_close(after, evaluate(fresh))
    assert not torch.allclose(after, before)


def test_blocks_of_one_evaluation_propagate_once(
    data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bundle = make(data_path, "LightGCN")
    scorer = scorer_of(model, bundle)
    calls = count_sparse_products(monkeypatch)
    with scorer.evaluating():
        for block in torch.split(torch.arange(1, 41), 10):
            scorer.score_all(block)
    assert len(calls) == 2  # n_layers


def count_sparse_products(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    product = torch.sparse.mm

    def counted(*args: Any) -> Tensor:
        calls.append(None)
        scores: Tensor = product(*args)
        return scores

    monkeypatch.setattr(torch.sparse, "mm", counted)
    return calls


def batch() -> Interaction:
    return Interaction(
        {
            "user_id": torch.tensor([1, 2, 3, 4]),
            "item_id": torch.tensor([5, 6, 7, 8]),
            "neg_item_id": torch.tensor([9, 10, 11, 12]),
        }
    )


def one_step(model: Any, scorer: ModelScorer) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    random.seed(3)
    base = model.calculate_loss(batch())
    total = sum(base) if isinstance(base, tuple) else base
    total = (
        total + scorer.score(torch.tensor([1, 7]), torch.tensor([[1, 2], [3, 4]])).square().sum()
    )
    torch.autograd.backward(total)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_base_loss_and_kd_share_one_propagation(
    data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bundle = make(data_path, "LightGCN")
    scorer = scorer_of(model, bundle, trainable=True)
    model.train()
    calls = count_sparse_products(monkeypatch)
    wanted = one_step(model, scorer)
    assert len(calls) == 4  # two layers, twice
    calls.clear()
    with scorer.shared_forward() as end_step:
        got = one_step(model, scorer)
        assert len(calls) == 2
        end_step()
        with torch.no_grad():
            model.user_embedding.weight.mul_(2)
        again = one_step(model, scorer)
        assert len(calls) == 4
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient)
    assert not torch.allclose(again["user_embedding.weight"], got["user_embedding.weight"])
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", PROPAGATE_IN_FORWARD)
def test_sharing_does_not_change_the_gradient(data_path: Path, name: str) -> None:
    no_dropout = {"node_dropout": 0.0, "message_dropout": 0.0}
    if name == "NCL":
        no_dropout["warm_up_step"] = 0  # its clusters need faiss
    model, bundle = make(data_path, name, **no_dropout)
    if name == "NCL":
        model.ProtoNCE_loss = lambda *_: torch.zeros(())
    scorer = scorer_of(model, bundle, trainable=True)
    model.train()
    wanted = one_step(model, scorer)
    with scorer.shared_forward():
        got = one_step(model, scorer)
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-5)


def test_evaluation_within_a_step_does_not_reuse_its_propagation(data_path: Path) -> None:
    model, bundle = make(data_path, "LightGCN")
    scorer = scorer_of(model, bundle, trainable=True)
    users = torch.tensor([1, 2])
    with scorer.shared_forward():
        model.train()
        stale = scorer.score_all(users)
        with torch.no_grad():
            model.user_embedding.weight.mul_(2)
        with scorer.evaluating():
            fresh = scorer.score_all(users)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fresh[:, 1:], own_scores(model, "product", users)[:, 1:])
    assert not torch.allclose(fresh[:, 1:], stale[:, 1:])


@pytest.mark.parametrize("name", ["BPR", "LightGCN", "ENMF", "NeuMF", "DMF"])
def test_item_side_is_the_transposed_user_side(data_path: Path, name: str) -> None:
    model, bundle = make(data_path, name)
    scorer = scorer_of(model, bundle)
    items, users = (
        torch.tensor([4, 60, 4]),
        torch.tensor([[1, 2, 2, 40], [7, 1, 9, 3], [5, 6, 7, 8]]),
    )
    with scorer.evaluating():
        got = scorer.score_by_item(items, users)
        table = scorer.score_all(torch.arange(scorer.n_contexts))
    torch.testing.assert_close(got, table[users, items.unsqueeze(1)], rtol=1e-4, atol=1e-5)
    model.train()
    assert scorer.score_by_item(items, users).requires_grad


class FakeData:
    """Just enough of a Dataset."""

    uid_field, iid_field, user_num, item_num = "user_id", "item_id", 4, 5


class FakeModel(torch.nn.Module):
    """A product of two tables, which the subclasses spoil."""

    type = ModelType.GENERAL
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.users = torch.nn.Parameter(torch.arange(8.0).view(4, 2))
        self.items = torch.nn.Parameter(torch.arange(10.0).view(5, 2))
        self.product: Callable[[Tensor, Tensor], Tensor] = lambda users, items: users @ items.t()

    def full_sort_predict(self, interaction: Any) -> Tensor:
        return self.product(self.users[interaction["user_id"]], self.items).view(-1)


def test_every_way_to_write_a_product_is_recognised() -> None:
    products: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "@": lambda u, i: u @ i.t(),
        "matmul": lambda u, i: torch.matmul(u, i.transpose(0, 1)),
        ".matmul": lambda u, i: u.matmul(i.T),
        "mm": lambda u, i: torch.mm(u, i.t()),
        ".mm": lambda u, i: u.mm(i.t()),
        "linear": lambda u, i: torch.nn.functional.linear(u, i),
    }
    for product in products.values():
        model = FakeModel()
        model.product = product
        scorer = ModelScorer(model, FakeData())
        assert scorer.kind == "product"
        users, items = torch.tensor([2, 1]), torch.tensor([[1, 4], [2, 2]])
        expected = (model.users[users].unsqueeze(1) * model.items[items]).sum(-1)
        torch.testing.assert_close(scorer.score(users, items), expected)


def test_product_with_something_added_is_a_row() -> None:
    """Even where what is added is zero before training, as biases are."""

    class Biased(FakeModel):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(5))

        def full_sort_predict(self, interaction: Any) -> Tensor:
            return super().full_sort_predict(interaction).view(-1, 5) + self.bias

    class Layer(Biased):
        def full_sort_predict(self, interaction: Any) -> Tensor:
            return torch.nn.functional.linear(
                self.users[interaction["user_id"]], self.items, self.bias
            )

    for model in (Biased(), Layer()):
        scorer = ModelScorer(model, FakeData(), trainable=True)
        assert scorer.kind == "rows"
        model.bias.data += torch.arange(5.0)
        expected = model.users[[1]] @ model.items.t() + torch.arange(5.0)
        torch.testing.assert_close(
            scorer.score(torch.tensor([1]), torch.arange(5).unsqueeze(0)), expected
        )


def test_full_sort_of_another_shape_is_refused() -> None:
    class Narrow(FakeModel):
        def full_sort_predict(self, interaction: Any) -> Tensor:
            return self.users[interaction["user_id"]] @ self.items[1:].t()

    with pytest.raises((ScoringError, RuntimeError)):
        ModelScorer(Narrow(), FakeData())


def test_scores_that_change_between_calls_are_refused() -> None:
    class Drifting(FakeModel):
        def full_sort_predict(self, interaction: Any) -> Tensor:
            self.users.data += 1
            return super().full_sort_predict(interaction)

    with pytest.raises(
        ScoringError,
        match="Drifting: the scores used for distillation differ from full_sort_predict",
    ):
        ModelScorer(Drifting(), FakeData())


def test_product_that_disappears_is_reported() -> None:
    model = FakeModel()
    scorer = ModelScorer(model, FakeData())
    model.product = lambda users, items: torch.zeros(len(users), len(items))
    with pytest.raises(ScoringError, match="FakeModel no longer ends in a product"):
        scorer.score(torch.tensor([1]), torch.tensor([[1]]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# -- two plain tables ------------------------------------------------------------------------------


PLAIN_TABLES = ("BPR", "LINE")


@pytest.mark.parametrize("name", KINDS)
def test_which_models_are_nothing_but_two_tables(data_path: Path, name: str) -> None:
    """CKE adds an entity to each item; the graph models propagate; SimpleX averages."""
    model, bundle = make(data_path, name)
    tables = scorer_of(model, bundle)._tables
    assert (tables is not None) is (name in PLAIN_TABLES)
    if tables is not None:
        assert tables[0] is model.user_embedding.weight
        assert tables[1] is model.item_embedding.weight


@pytest.mark.parametrize("name", PLAIN_TABLES)
def test_two_tables_give_what_the_model_gives(data_path: Path, name: str) -> None:
    model, bundle = make(data_path, name)
    direct, long_way = scorer_of(model, bundle), scorer_of(model, bundle)
    long_way._tables = None
    users, items = torch.tensor([5, 1, 5, 40]), torch.randint(1, 61, (4, 9))
    results = []
    for scorer in (direct, long_way):
        model.zero_grad()
        scores = [scorer.score(users, items), scorer.score_by_item(items[:, 0], users.expand(4, 4))]
        torch.autograd.backward([s.square().sum() for s in scores])
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(grads) == 2
        results.append([*scores, *grads])
        with scorer.evaluating():
            results[-1] += [scorer.score_all(users), scorer.ranking().top_k(users, 5)]
    for own, other in zip(*results, strict=True):
        assert torch.equal(own, other)


def test_two_tables_are_those_of_the_moment(data_path: Path) -> None:
    """Training changes them in place, and so does a checkpoint that is read."""
    model, bundle = make(data_path, "BPR")
    scorer = scorer_of(model, bundle)
    other, _ = make(data_path, "BPR")
    users, items = torch.tensor([5, 1]), torch.tensor([[1, 2], [3, 60]])
    model.load_state_dict(other.state_dict())
    assert torch.equal(scorer.score(users, items), scorer_of(other, bundle).score(users, items))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.autograd.backward(scorer.score(users, items).sum())
    optimizer.step()
    own = own_scores(model, "product", users).gather(1, items)
    torch.testing.assert_close(scorer.score(users, items), own)


class Scaled(BPR):  # type: ignore[misc]
    def full_sort_predict(self, interaction: Any) -> Any:
        return 2.0 * self.user_embedding(interaction["user_id"]) @ self.item_embedding.weight.t()


class Normalised(BPR):  # type: ignore[misc]
    def full_sort_predict(self, interaction: Any) -> Any:
        users = torch.nn.functional.normalize(self.user_embedding(interaction["user_id"]), dim=1)
        return users @ torch.nn.functional.normalize(self.item_embedding.weight, dim=1).t()


class NormalisedItems(BPR):  # type: ignore[misc]
    def full_sort_predict(self, interaction: Any) -> Any:
        items = torch.nn.functional.normalize(self.item_embedding.weight, dim=1)
        return self.user_embedding(interaction["user_id"]) @ items.t()


class Dropped(BPR):  # type: ignore[misc]
    def full_sort_predict(self, interaction: Any) -> Any:
        users = torch.nn.functional.dropout(
            self.user_embedding(interaction["user_id"]), 0.5, self.training
        )
        return users @ self.item_embedding.weight.t()


class Biased(BPR):  # type: ignore[misc]
    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.bias = torch.nn.Parameter(torch.ones(self.n_items))

    def full_sort_predict(self, interaction: Any) -> Any:
        return (
            self.user_embedding(interaction["user_id"]) @ self.item_embedding.weight.t() + self.bias
        )


class BiasedLinear(Biased):
    def full_sort_predict(self, interaction: Any) -> Any:
        users = self.user_embedding(interaction["user_id"])
        return torch.nn.functional.linear(users, self.item_embedding.weight, self.bias)


class LongTable(BPR):  # type: ignore[misc]
    """User and item rows in one table of users, as some models keep them."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.user_embedding = torch.nn.Embedding(self.n_users + 3, self.embedding_size)

    def full_sort_predict(self, interaction: Any) -> Any:
        return self.user_embedding(interaction["user_id"] + 3) @ self.item_embedding.weight.t()


class OtherNumbers(BPR):  # type: ignore[misc]
    """A table of the right length in another order."""

    def full_sort_predict(self, interaction: Any) -> Any:
        users = self.user_embedding(self.n_users - 1 - interaction["user_id"])
        return users @ self.item_embedding.weight.t()


class OtherNumbersForSome(BPR):  # type: ignore[misc]
    """In order, for the first few."""

    def full_sort_predict(self, interaction: Any) -> Any:
        users = self.user_embedding(interaction["user_id"].clamp(max=7))
        return users @ self.item_embedding.weight.t()


class OtherwiseInEvaluation(BPR):  # type: ignore[misc]
    def full_sort_predict(self, interaction: Any) -> Any:
        users = self.user_embedding(interaction["user_id"])
        if not self.training:
            users = torch.nn.functional.normalize(users, dim=1)
        return users @ self.item_embedding.weight.t()


class HiddenFromAutograd(BPR):  # type: ignore[misc]
    def full_sort_predict(self, interaction: Any) -> Any:
        users = self.user_embedding(interaction["user_id"])
        users.data.mul_(3.0)
        return users @ self.item_embedding.weight.t()


class SquareTable(BPR):  # type: ignore[misc]
    """As many dimensions as items: the item table is not transposed, and does not look it."""

    def full_sort_predict(self, interaction: Any) -> Any:
        return self.user_embedding(interaction["user_id"]) @ self.item_embedding.weight


NOT_PLAIN = (
    *(Scaled, Normalised, NormalisedItems, Dropped, Biased, BiasedLinear, LongTable, OtherNumbers),
    *(OtherNumbersForSome, OtherwiseInEvaluation, HiddenFromAutograd, SquareTable),
)


@pytest.mark.parametrize("kind", NOT_PLAIN, ids=lambda kind: kind.__name__)
def test_what_only_looks_like_two_tables_goes_the_long_way(data_path: Path, kind: Any) -> None:
    bundle = build(data_path, "BPR", embedding_size=61 if kind is SquareTable else 8)
    model = kind(bundle.config, bundle.train._dataset)
    scorer = scorer_of(model, bundle)
    assert scorer._tables is None
    users, items = torch.tensor([5, 1, 30]), torch.randint(1, 61, (3, 9))
    with scorer.evaluating():
        torch.testing.assert_close(
            scorer.score(users, items),
            own_scores(model, "product", users).gather(1, items),
            rtol=1e-4,
            atol=1e-5,
        )


class Transposed(BPR):  # type: ignore[misc]
    """The same two tables, one of them lying on its side, through another operator."""

    def full_sort_predict(self, interaction: Any) -> Any:
        return torch.mm(
            self.user_embedding(interaction["user_id"]), self.item_embedding.weight.transpose(0, 1)
        )


class Linear(BPR):  # type: ignore[misc]
    def full_sort_predict(self, interaction: Any) -> Any:
        return torch.nn.functional.linear(
            self.user_embedding(interaction["user_id"]), self.item_embedding.weight
        )


@pytest.mark.parametrize("kind", [Transposed, Linear])
def test_two_tables_by_any_operator(data_path: Path, kind: Any) -> None:
    bundle = build(data_path, "BPR", embedding_size=8)
    model = kind(bundle.config, bundle.train._dataset)
    scorer = scorer_of(model, bundle)
    assert scorer._tables is not None
    users, items = torch.tensor([5, 1, 30]), torch.randint(1, 61, (3, 9))
    torch.testing.assert_close(
        scorer.score(users, items), own_scores(model, "product", users).gather(1, items)
    )


def test_a_frozen_table_is_no_trouble(data_path: Path) -> None:
    for name in ("user_embedding", "item_embedding"):
        model, bundle = make(data_path, "BPR")
        getattr(model, name).weight.requires_grad_(False)
        scorer = scorer_of(model, bundle, trainable=True)
        users, items = torch.tensor([5, 1]), torch.tensor([[1, 2], [3, 60]])
        scores = scorer.score(users, items)
        torch.testing.assert_close(scores, own_scores(model, "product", users).gather(1, items))
        torch.autograd.backward(scores.sum())
        assert getattr(model, name).weight.grad is None


def test_rows_of_the_padding_user_are_learned_as_the_model_learns_them(data_path: Path) -> None:
    """A plain lookup cannot replace one with ``padding_idx`` or with scaled gradients."""
    for settings in ({"padding_idx": 5}, {"scale_grad_by_freq": True}, {"max_norm": 0.1}):
        model, bundle = make(data_path, "BPR")
        model.user_embedding = torch.nn.Embedding(41, 8, **settings)
        scorer = scorer_of(model, bundle)
        assert scorer._tables is None
        users, items = torch.tensor([5, 1, 5]), torch.tensor([[1, 2], [3, 60], [3, 4]])
        grads = []
        for scores in (
            scorer.score(users, items),
            own_scores(model, "product", users).gather(1, items),
        ):
            model.zero_grad()
            torch.autograd.backward(scores.sum())
            grads.append(model.user_embedding.weight.grad.clone())
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("with_base", [True, False])
def test_sparse_gradients_are_the_dense_ones_when_an_optimizer_sees_them(
    data_path: Path, with_base: bool
) -> None:
    model, bundle = make(data_path, "BPR", embedding_size=3)
    scorer = scorer_of(model, bundle)
    users, items = torch.tensor([5, 1, 40]), torch.tensor([[7, 7, 2], [60, 1, 7], [0, 3, 60]])

    def gradients() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        scores = scorer.score(users, items)
        loss = scores.square().sum()
        if with_base:
            loss = loss + model.calculate_loss(batch())
        torch.autograd.backward(loss)
        return model.user_embedding.weight.grad, model.item_embedding.weight.grad

    dense = gradients()
    with scorer.sparse_gradients():
        assert scorer.operands(users)[0].grad_fn is not None
        kept = gradients()
    after = gradients()
    for one, other, last in zip(dense, kept, after, strict=True):
        assert not other.is_sparse
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)
        assert torch.equal(one, last)
    assert not model.item_embedding.weight._post_accumulate_grad_hooks


def test_sparse_gradient_only_where_it_is_less_work() -> None:
    """2 · 2 rows · 3 items · 2 numbers = 24, which must be fewer than the table has."""
    for n_items, sparse in ((12, False), (13, True)):
        rows, table = torch.randn(2, 2), torch.randn(n_items, 2, requires_grad=True)
        items = torch.tensor([[1, 1, 2], [0, 11, 2]])
        plain = torch.autograd.grad(picked_products(rows, table, items).square().sum(), table)[0]
        (found,) = torch.autograd.grad(
            picked_products(rows, table, items, True).square().sum(), table
        )
        assert found.is_sparse is sparse
        assert torch.allclose(found.to_dense() if sparse else found, plain, rtol=1e-6)
