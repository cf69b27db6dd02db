"""The faster batches have exactly RecBole's content, and RecBole stays unchanged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_rcekd.compat import loading
from recbole_rcekd.compat.loading import fast_batches
from tests.helpers import (
    Bundle,
    block_pairs,
    build,
    build_model,
    example_data_path,
    write_atomic_file,
    write_dataset,
    write_knowledge,
)

# isort: split
from recbole.data.interaction import Interaction
from recbole.sampler.sampler import AbstractSampler, Sampler
from recbole.utils import init_seed
from recbole.utils.enum_type import KGDataLoaderState

Batch = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {"embedding_size": 8, "train_batch_size": 37}
NEGATIVES: dict[str, Any] = {
    "distribution": "uniform",
    "sample_num": 1,
    "alpha": 1.0,
    "dynamic": False,
}
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs of items": ("BPR", {}),
    "three negatives a pair": ("BPR", {"train_neg_sample_args": {**NEGATIVES, "sample_num": 3}}),
    "points": ("NeuMF", {"mf_embedding_size": 8, "mlp_embedding_size": 8, "mlp_hidden_size": [8]}),
    "three negatives a point": ("NeuMF", {"train_neg_sample_args": {**NEGATIVES, "sample_num": 3}}),
    "popular negatives": (
        "BPR",
        {"train_neg_sample_args": {**NEGATIVES, "distribution": "popularity"}},
    ),
    "hard negatives": (
        "BPR",
        {"train_neg_sample_args": {**NEGATIVES, "dynamic": True, "candidate_num": 4}},
    ),
    "users": (
        "MultiVAE",
        {"latent_dimension": 8, "mlp_hidden_size": [16], "train_neg_sample_args": None},
    ),
    "knowledge": ("CKE", {"kg_embedding_size": 8}),
    "two workers": ("BPR", {"worker": 2}),
    "whole batches only": ("BPR", {"train_batch_size": 40}),
    "one batch": ("BPR", {"train_batch_size": 10**6}),
    "one row a batch": ("BPR", {"train_batch_size": 1}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("loading"))
    write_knowledge(folder)
    return folder


def states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    return (
        random.getstate(),
        numpy_state[1].tolist(),
        numpy_state[2:],
        torch.get_rng_state().tolist(),
    )


def own_states(bundle: Bundle) -> list[Any]:
    """The states of the loaders' generators."""
    loaders = [
        bundle.train,
        *(getattr(bundle.train, f"{part}_dataloader", None) for part in ("general", "kg")),
    ]
    return [
        loader.generator.get_state().tolist() for loader in loaders if hasattr(loader, "generator")
    ]


def epoch(train: Any) -> list[Batch]:
    return [dict(batch.interaction) for batch in train]


@contextmanager
def as_it_is(train: Any) -> Iterator[None]:
    yield


def course(
    folder: Path, model: str, fast: bool, epochs: int = 2, **settings: Any
) -> tuple[list[list[Batch]], Any]:
    """All batches of some epochs, and all random states after each."""
    bundle = build(folder, model, **{**SMALL, **settings})
    bundle.train.get_model(build_model(bundle)) if hasattr(bundle.train, "get_model") else None
    if hasattr(bundle.train, "set_mode"):
        bundle.train.set_mode(KGDataLoaderState.RSKG)
    init_seed(7, True)
    batches, after = [], []
    for _ in range(epochs):
        with (fast_batches if fast else as_it_is)(bundle.train):
            batches.append(epoch(bundle.train))
        after.append((states(), own_states(bundle)))
    return batches, after


def compare(found: list[list[Batch]], expected: list[list[Batch]]) -> None:
    for ours, plain in zip(found, expected, strict=True):
        for own, other in zip(ours, plain, strict=True):
            assert list(own) == list(other)
            for name, value in other.items():
                assert own[name].dtype == value.dtype
                assert own[name].shape == value.shape
                assert torch.equal(own[name], value)
                assert own[name].is_contiguous() == value.is_contiguous()


@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_recboles_own(folder: Path, name: str) -> None:
    model, settings = LOADERS[name]
    expected, after = course(folder, model, fast=False, **settings)
    assert len(expected[0]) > 1 or name == "one batch"
    assert any(
        not torch.equal(x, y)
        for x, y in zip(expected[0][0].values(), expected[1][0].values(), strict=True)
    )
    found, now = course(folder, model, fast=True, **settings)
    compare(found, expected)
    assert now == after


def test_the_batches_that_are_compared_are_the_fast_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("_index_rows", "_sample_by_key_ids"):
        plain = getattr(loading, name)

        def counted(*args: Any, name: str = name, plain: Any = plain) -> Any:
            calls.append(name)
            return plain(*args)

        monkeypatch.setattr(loading, name, counted)
    (batches, *_), _ = course(folder, "BPR", fast=True, epochs=1)
    assert calls.count("_sample_by_key_ids") == len(batches)
    assert calls.count("_index_rows") >= len(batches)


def test_batches_with_features_of_users_and_items() -> None:
    columns = {
        "inter": ["user_id", "item_id", "rating", "timestamp"],
        "user": ["user_id", "age", "gender"],
        "item": ["item_id", "release_year", "class"],
    }
    settings: dict[str, Any] = {
        "dataset": "ml-100k",
        "load_col": columns,
        "user_inter_num_interval": "[200,inf)",
        "train_batch_size": 2048,
    }
    expected, after = course(example_data_path(), "BPR", fast=False, **settings)
    found, now = course(example_data_path(), "BPR", fast=True, **settings)
    assert {"age", "class", "neg_class"} <= set(expected[0][0])  # class is a list of each item
    compare(found, expected)
    assert now == after


@pytest.mark.parametrize("mode", [KGDataLoaderState.RS, KGDataLoaderState.KG])
def test_a_knowledge_loader_may_change_its_mode_inside(folder: Path, mode: Any) -> None:
    """As RecBole's trainers for knowledge-aware models do at the start of an epoch."""
    courses = []
    for context in (as_it_is, fast_batches):
        bundle = build(folder, "CKE", **SMALL, kg_embedding_size=8)
        init_seed(7, True)
        with context(bundle.train):
            bundle.train.set_mode(mode)
            batches = epoch(bundle.train)
            bundle.train.set_mode(KGDataLoaderState.RSKG)
            batches += epoch(bundle.train)
        assert bundle.train.state == KGDataLoaderState.RSKG
        courses.append(batches)
    compare([courses[1]], [courses[0]])


def test_what_is_set_on_a_loader_meanwhile_stays(folder: Path) -> None:
    bundle = build(folder, "BPR", **SMALL)
    model = build_model(bundle)
    with fast_batches(bundle.train):
        bundle.train.get_model(model)
    assert bundle.train.model is model


@pytest.mark.parametrize("size", [37, 40])
@pytest.mark.parametrize("before_the_end", [0, 1, 2])
def test_a_loader_that_is_left_in_the_middle(folder: Path, size: int, before_the_end: int) -> None:
    """Also after its last batch, before the next is asked for; 40 divides the 400 rows."""
    courses = []
    for context in (as_it_is, fast_batches):
        bundle = build(folder, "BPR", **{**SMALL, "train_batch_size": size})
        init_seed(7, True)
        with context(bundle.train):
            iterator = iter(bundle.train)
            batches = [
                dict(next(iterator).interaction) for _ in range(len(bundle.train) - before_the_end)
            ]
            del iterator
            batches += epoch(bundle.train)
        batches += epoch(bundle.train)
        courses.append((batches, states(), own_states(bundle)))
    compare([courses[1][0]], [courses[0][0]])
    assert courses[0][1:] == courses[1][1:]


# -- afterwards ------------------------------------------------------------------------------------


def surroundings(bundle: Bundle) -> tuple[Any, ...]:
    loaders = [
        bundle.train,
        *(getattr(bundle.train, f"{part}_dataloader", None) for part in ("general", "kg")),
    ]
    return (
        Interaction.__getitem__,
        AbstractSampler.sample_by_key_ids,
        [dict(vars(loader)) for loader in loaders if loader is not None],
    )


def raise_in_the_middle(train: Any) -> None:
    for _ in train:
        raise KeyboardInterrupt


@pytest.mark.parametrize("model", ["BPR", "CKE"])
def test_afterwards_everything_is_recboles(folder: Path, model: str) -> None:
    bundle = build(folder, model, **SMALL, kg_embedding_size=8)
    if model == "CKE":
        bundle.train.set_mode(KGDataLoaderState.RSKG)
        epoch(bundle.train)  # it keeps its iterators
    before = surroundings(bundle)
    assert before[0] is loading._INDEX_ROWS
    with fast_batches(bundle.train):
        assert surroundings(bundle) != before
        for _ in bundle.train:
            pass
        if model == "CKE":
            bundle.train.kg_iter, bundle.train.gen_iter = (
                before[2][0][f"{part}_iter"] for part in ("kg", "gen")
            )
    assert surroundings(bundle) == before
    with pytest.raises(KeyboardInterrupt), fast_batches(bundle.train):
        raise_in_the_middle(bundle.train.general_dataloader if model == "CKE" else bundle.train)
    assert surroundings(bundle) == before


def test_one_inside_another(folder: Path) -> None:
    bundle = build(folder, "BPR", **SMALL)
    before = surroundings(bundle)
    init_seed(7, True)
    expected = epoch(bundle.train)
    bundle = build(folder, "BPR", **SMALL)
    other = build(folder, "BPR", **SMALL)
    init_seed(7, True)
    with fast_batches(bundle.train):
        with fast_batches(bundle.train), fast_batches(other.train):
            found = epoch(bundle.train)
        assert Interaction.__getitem__ is loading._index_rows
        epoch(bundle.train)
    compare([found], [expected])
    assert surroundings(bundle)[:2] == before[:2]
    assert isinstance(vars(bundle.train)["dataset"], list)


def test_without_a_loader_rows_are_still_indexed_faster() -> None:
    with fast_batches(None):
        assert Interaction.__getitem__ is loading._index_rows


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        np.array([2, 0, 2]),
        np.array([], dtype=np.int64),
        np.array([-1]),
        np.array([1], dtype=np.int32),
        np.array([True, False, True]),
        torch.tensor([2, 0]),
        torch.tensor([2, 0], dtype=torch.int32),
        torch.tensor([True, False, False]),
        [0, 1],
        slice(1, 3),
    ],
    ids=repr,
)
def test_rows_by_any_index(index: Any) -> None:
    rows = Interaction({"user": torch.tensor([4, 5, 6]), "list": torch.arange(6.0).reshape(3, 2)})
    expected = rows[index]
    with fast_batches(None):
        found = rows[index]
        assert torch.equal(rows["user"], torch.tensor([4, 5, 6]))
    compare([[dict(found.interaction)]], [[dict(expected.interaction)]])
    found["user"][:] = 0  # a copy
    assert rows["user"].tolist() == [4, 5, 6] or isinstance(index, slice)


def test_rows_out_of_range_raise_what_recbole_raises() -> None:
    rows = Interaction({"user": torch.tensor([4, 5, 6])})
    with pytest.raises(IndexError) as plain:
        rows[np.array([3])]
    with fast_batches(None), pytest.raises(type(plain.value)):
        rows[np.array([3])]


# -- negatives -------------------------------------------------------------------------------------


def both_ways(sampler: Any, keys: Any, num: int = 1) -> tuple[Any, Any]:
    """What RecBole draws (or the error) and what we draw, each with the random state afterwards."""
    results: list[Any] = []
    for context in (as_it_is, fast_batches):
        np.random.seed(3)  # noqa: NPY002
        with context(None):
            try:
                drawn = sampler.sample_by_user_ids(keys, None, num)
                results.append((None if drawn is None else (drawn.dtype, drawn.tolist()), states()))
            except Exception as error:
                results.append((repr(error), states()))
    return results[0], results[1]


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize(
    "keys",
    [
        [1, 2, 3],
        [5],
        [5, 5, 5],
        [0, 1],
        [],
        [1, 41],
        [1, 1000],
        [1, -1],
        [-1, -1],
        [-2, 1],
        [1000],
        [-1000, 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [np.array, list])
def test_keys_of_any_kind(folder: Path, keys: list[int], num: int, kind: Any) -> None:
    bundle = build(folder, "BPR", **SMALL)
    plain, fast = both_ways(bundle.train._sampler, kind(keys), num)
    assert fast == plain


def test_a_user_who_has_nearly_everything(tmp_path: Path) -> None:
    pairs = [*block_pairs(), *(("u3", f"i{item}") for item in range(59))]
    folder = write_dataset(tmp_path, pairs=sorted(set(pairs)))
    config: dict[str, Any] = {**SMALL, "eval_args": {"split": {"RS": [1.0, 0.0, 0.0]}}}
    expected, after = course(folder, "BPR", fast=False, epochs=1, **config)
    found, now = course(folder, "BPR", fast=True, epochs=1, **config)
    compare(found, expected)
    assert now == after
    bundle = build(folder, "BPR", **config)
    user = bundle.dataset.token2id("user_id", "u3")
    drawn, fast = both_ways(bundle.train._sampler, [user, user, 1], 2)
    assert drawn == fast
    (free,) = {bundle.dataset.token2id("item_id", f"i{item}") for item in range(60)} - set(
        bundle.train._sampler.used_ids[user]
    )
    assert fast[0][1][:2] == [free, free]


def test_a_sampler_of_another_phase_has_other_marks(folder: Path) -> None:
    bundle = build(folder, "BPR", **SMALL)
    users = list(range(1, 41))
    every = Sampler(
        ["train", "valid", "test"],
        [part._dataset for part in (bundle.train, bundle.valid, bundle.test)],
    )
    train = every.set_phase("train")
    plain, fast = both_ways(train, users, 20)
    assert plain == fast
    assert "_used_marks" in vars(train)
    # A copy has the marks of the training phase; ids that were added since must not be drawn.
    test = train.set_phase("test") if isinstance(train.used_ids, dict) else every.set_phase("test")
    vars(test)["_used_marks"] = vars(train)["_used_marks"]
    plain, fast = both_ways(test, users, 20)
    assert plain == fast
    for user, item in zip(users * 20, fast[0][1], strict=True):
        assert item not in test.used_ids[user]
    train.used_ids = test.used_ids  # and if they are replaced
    plain, fast = both_ways(train, users, 20)
    assert plain == fast


class Few(AbstractSampler):  # type: ignore[misc]
    """Keys that have used any of 1 to 8."""

    def __init__(self, used: list[set[int]]) -> None:
        self.used = used
        super().__init__("uniform", 1.0)

    def _uni_sampling(self, sample_num: int) -> Any:
        return np.random.randint(1, 10, sample_num)  # noqa: NPY002

    def get_used_ids(self) -> Any:
        return np.array([set(), *self.used])

    def sample_by_user_ids(self, keys: Any, _: Any, num: int) -> Any:
        return self.sample_by_key_ids(keys, num)


@given(
    st.lists(st.sets(st.integers(1, 8)), min_size=4, max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_any_sets_of_used_ids(used: list[set[int]], keys: list[int], num: int) -> None:
    plain, fast = both_ways(Few(used), keys, num)
    assert fast == plain


def test_marks_that_collide_only_cost_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one slot for all pairs, every drawn id is looked up."""
    monkeypatch.setattr(loading, "_slots", lambda keys, ids, n: np.zeros(len(keys), dtype=np.int64))
    plain, fast = both_ways(
        Few([{1, 2, 3}, {4, 5, 6, 7, 8}, set(), {9 - 1}]), [1, 2, 3, 4, 2, 2], 5
    )
    assert fast == plain


def test_pairs_are_spread_over_the_slots() -> None:
    keys, ids = (x.ravel() for x in np.meshgrid(np.arange(300), np.arange(300)))
    slots = loading._slots(keys, ids, 1 << 20)
    assert slots.min() >= 0
    assert slots.max() < 1 << 20
    # 90,000 balls in 2^20 boxes: about n²/2m = 3,862 share one.
    assert len(np.unique(slots)) > 90_000 - 2 * 90_000**2 / 2 / 2**20


def test_the_atomic_files_are_not_needed_twice(tmp_path: Path) -> None:
    """With items without interactions and users with one: ids that are in no set."""
    folder = write_dataset(tmp_path, pairs=[("u1", "i1"), ("u2", "i2"), ("u3", "i1"), ("u3", "i3")])
    write_atomic_file(
        folder / "tiny" / "tiny.item",
        ("item_id:token", "x:float"),
        [(f"i{n}", n) for n in range(9)],
    )
    settings: dict[str, Any] = {"eval_args": {"split": {"RS": [1.0, 0.0, 0.0]}}, "load_col": None}
    expected, after = course(folder, "BPR", fast=False, **settings)
    found, now = course(folder, "BPR", fast=True, **settings)
    compare(found, expected)
    assert now == after
