"""The inputs of models: each column of each row, derived again from the .inter file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from recbole.data import create_dataset as stock_dataset

from recbole_rcekd.data.contexts import (
    ROW_FIELD,
    Rows,
    TranslatedRows,
    Users,
    WholeSequences,
    _ends,
    as_loaded,
    ids_of_tokens,
    is_sequential,
    of_training,
    row_ids_in_batches,
)
from recbole_rcekd.data.sequence_dataset import create_dataset
from tests.helpers import Bundle, build, build_config, write_atomic_file

LENGTH = 5
HEADER = (
    "user_id:token",
    "item_id:token",
    "timestamp:float",
    "n:float",
    "mood:token",
    "price:float",
    "v:float_seq",
)


class Event(NamedTuple):
    """A line of the file; its number ``n`` is a float column in RecBole."""

    user: str
    item: str
    time: int
    n: int
    mood: str
    price: float
    v: str


def make_events() -> list[Event]:
    """Users u0 and u1, the first in the file, have one and two lines; the others have 4 to 9.

    The others also have items of their own.
    """
    draw = random.Random(4)
    owners = ["u0", "u1", "u1"] + [f"u{u}" for u in range(2, 8) for _ in range(4 + u % 6)]
    return [
        Event(
            user,
            f"only-{user}" if n in (0, 1) else f"i{draw.randrange(9)}",
            draw.randrange(1000),
            n,
            f"mood of {user}" if n == 2 else f"m{draw.randrange(4)}",
            round(draw.random(), 3),
            f"{draw.random():.2f} {draw.random():.2f}",
        )
        for n, user in enumerate(owners)
    ]


EVENTS = make_events()
# Without these two, users, items and moods get other ids.
OTHER_FILTER: dict[str, Any] = {"user_inter_num_interval": "[3,inf)"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contexts")
    write_atomic_file(path / "tiny" / "tiny.inter", HEADER, EVENTS)
    write_atomic_file(
        path / "tiny" / "tiny.user",
        ("user_id:token", "age:token"),
        [(f"u{u}", f"age{u % 3}") for u in range(8)],
    )
    return path


def bundle_of(folder: Path, model: str = "GRU4Rec", **overrides: Any) -> Bundle:
    given = {
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "load_col": {"inter": [name.split(":")[0] for name in HEADER], "user": ["user_id", "age"]},
        "train_neg_sample_args": None,
        **overrides,
    }
    return build(folder, model, **given)


def training_set(folder: Path, **overrides: Any) -> Any:
    return bundle_of(folder, **overrides).train._dataset


def history(n: int, length: int) -> list[Event]:
    """The lines of the same user before line ``n``, as many as fit in a list."""
    before = sorted((e for e in EVENTS if e.user == EVENTS[n].user), key=lambda e: e.time)
    return before[: before.index(EVENTS[n])][-length:]


def token(dataset: Any, field: str, number: Any) -> str:
    return str(dataset.field2id_token[field][int(number)])


def check(dataset: Any, inputs: Any, length: int, left_out: Sequence[str] = ()) -> None:
    """Check that every row of ``inputs`` has the content of its target's line in the file.

    Its ids are those of ``dataset``.
    """
    unknown_items = {e.item for e in EVENTS} - {e.item for e in EVENTS if e.user not in left_out}
    unknown_moods = {e.mood for e in EVENTS} - {e.mood for e in EVENTS if e.user not in left_out}

    def items(events: Sequence[Event]) -> list[str]:
        return ["[PAD]" if e.item in unknown_items else e.item for e in events]

    def moods(events: Sequence[Event]) -> list[str]:
        return ["[PAD]" if e.mood in unknown_moods else e.mood for e in events]

    for row in range(len(inputs)):
        target = EVENTS[int(inputs["n"][row])]
        before = history(target.n, length)
        size = len(before)
        assert int(inputs["item_length"][row]) == size
        assert token(dataset, "user_id", inputs["user_id"][row]) == (
            "[PAD]" if target.user in left_out else target.user
        )
        assert [token(dataset, "item_id", inputs["item_id"][row])] == items([target])
        assert [token(dataset, "mood", inputs["mood"][row])] == moods([target])
        for name in ("item_id", "mood", "price", "v", "n"):
            assert inputs[f"{name}_list"].shape[:2] == (len(inputs), length)
            assert not inputs[f"{name}_list"][row, size:].any()
        assert [token(dataset, "item_id", i) for i in inputs["item_id_list"][row, :size]] == items(
            before
        )
        assert [token(dataset, "mood", i) for i in inputs["mood_list"][row, :size]] == moods(before)
        assert inputs["n_list"][row, :size].tolist() == [e.n for e in before]
        assert inputs["price_list"][row, :size].tolist() == pytest.approx([e.price for e in before])
        vectors = [[float(x) for x in e.v.split()] for e in before]
        torch.testing.assert_close(inputs["v_list"][row, :size], torch.tensor(vectors))


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_the_files(folder: Path) -> None:
    dataset = training_set(folder)
    rows = Rows(dataset)
    assert rows.n == len(dataset) > 8
    inputs = rows.inputs(torch.arange(rows.n))
    check(dataset, inputs, LENGTH)
    for row in range(rows.n):  # joined with features
        assert (
            token(dataset, "age", inputs["age"][row])
            == f"age{int(EVENTS[int(inputs['n'][row])].user[1:]) % 3}"
        )
    some = torch.tensor([5, 1, 5])
    chosen = rows.inputs(some.int())
    assert all(torch.equal(chosen[name], inputs[name][some]) for name in inputs)
    assert len(rows.inputs(some[:0])) == 0


def test_rows_are_what_the_loader_gives(folder: Path) -> None:
    bundle = bundle_of(folder, "SHAN")
    with row_ids_in_batches(bundle.train._dataset):
        for batch in bundle.train:
            inputs = Rows(bundle.train._dataset).inputs(batch[ROW_FIELD])
            assert set(inputs) == set(batch)
            assert all(torch.equal(inputs[name], batch[name]) for name in batch)
            assert "Inverse_item_id_list" in batch


@pytest.mark.parametrize("width", [1, 3, LENGTH, 9])
def test_rows_in_other_ids_and_another_length(folder: Path, width: int) -> None:
    dataset = training_set(folder)
    other = training_set(folder, MAX_ITEM_LIST_LENGTH=width, **OTHER_FILTER)
    assert dataset.field2id_token["item_id"][1] not in other.field2token_id["item_id"]
    rows = TranslatedRows(dataset, other)
    assert rows.n == len(dataset)
    inputs = rows.inputs(torch.arange(rows.n))
    for name in inputs:
        if name.endswith("_list"):
            assert inputs[name].shape[1] == width
            # Items that are not in the student's lists cannot be known.
            assert not inputs[name][:, LENGTH:].any()
            inputs[name] = inputs[name][:, :LENGTH]
    check(other, inputs, min(width, LENGTH), left_out=("u0", "u1"))
    ages = [token(other, "age", age) for age in inputs["age"]]
    users = [EVENTS[int(n)].user for n in inputs["n"]]
    known = [(u, a) for u, a in zip(users, ages, strict=True) if u != "u1"]
    assert all(age == f"age{int(user[1:]) % 3}" for user, age in known)


def test_rows_of_validation_are_translated_too(folder: Path) -> None:
    bundle = bundle_of(folder)
    other = training_set(folder, MAX_ITEM_LIST_LENGTH=3, **OTHER_FILTER)
    valid = bundle.valid._dataset
    rows = TranslatedRows(bundle.train._dataset, other).translated(valid[list(range(len(valid)))])
    assert len(rows) == len(valid)
    check(other, rows, 3, left_out=("u0", "u1"))


def test_translated_rows_are_transformed_for_their_reader(folder: Path) -> None:
    other = bundle_of(folder, "SHAN", MAX_ITEM_LIST_LENGTH=3, **OTHER_FILTER).train._dataset
    inputs = TranslatedRows(training_set(folder), other).inputs(torch.arange(7))
    for listed, turned, length in zip(
        inputs["item_id_list"].tolist(),
        inputs["Inverse_item_id_list"].tolist(),
        inputs["item_length"],
        strict=True,
    ):
        assert turned == [0] * (3 - int(length)) + listed[: int(length)]


def test_what_is_for_training_only_is_left_out(folder: Path) -> None:
    dataset = bundle_of(folder, "BERT4Rec", hidden_size=8, inner_size=8, n_layers=1).train._dataset
    before = random.getstate()
    assert not [
        name
        for name in Rows(dataset).inputs(torch.arange(4))
        if name.startswith(("Mask", "Pos", "Neg"))
    ]
    assert random.getstate() == before
    rows = dataset.inter_feat
    assert as_loaded(dataset.config)(dataset, rows) is rows


def test_ends_against_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    for width, own in [(1, 1), (2, 5), (5, 5), (7, 3)]:
        lengths = torch.randint(1, own + 1, (20,), generator=draw)
        lists = torch.randint(1, 9, (20, own, 2), generator=draw)
        cut = _ends(lists, lengths, width)
        for row in range(20):
            kept = lists[row, : int(lengths[row])].tolist()[-width:]
            assert cut[row].tolist() == kept + [[0, 0]] * (width - len(kept))
        assert torch.equal(_ends(lists[..., 0].float(), lengths, width), cut[..., 0].float())


def test_ids_of_tokens() -> None:
    assert ids_of_tokens(["[PAD]", "b", "x"], {"[PAD]": 0, "a": 1, "b": 2}).tolist() == [0, 2, 0]


# --- numbers of rows ------------------------------------------------------------------------------


def test_numbers_go_with_their_rows_and_then_away(folder: Path) -> None:
    bundle = bundle_of(folder)
    dataset = bundle.train._dataset
    before = list(dataset.inter_feat)
    with row_ids_in_batches(dataset):
        seen = [
            (int(r), int(n))
            for batch in bundle.train
            for r, n in zip(batch[ROW_FIELD], batch["n"], strict=True)
        ]
    assert sorted(row for row, _ in seen) == list(range(len(dataset)))
    assert all(int(dataset.inter_feat["n"][row]) == n for row, n in seen)
    assert list(dataset.inter_feat) == before
    with pytest.raises(KeyboardInterrupt), row_ids_in_batches(dataset):
        raise KeyboardInterrupt
    assert list(dataset.inter_feat) == before


# --- users ----------------------------------------------------------------------------------------


def test_users_by_id(folder: Path) -> None:
    dataset = training_set(
        folder, model="BPR", train_neg_sample_args={"distribution": "uniform", "sample_num": 1}
    )
    users = Users(dataset)
    assert users.n == dataset.user_num
    inputs = users.inputs(torch.tensor([3, 0, 3], dtype=torch.int32))
    assert {name: inputs[name].tolist() for name in inputs} == {"user_id": [3, 0, 3]}
    assert inputs["user_id"].dtype == torch.int64
    translated = Users(dataset, torch.tensor([0, 2, 1]))
    assert translated.n == 3
    assert translated.inputs(torch.tensor([1, 2, 0]))["user_id"].tolist() == [2, 1, 0]


def test_context_aware_models_read_the_users_features(folder: Path) -> None:
    data = bundle_of(
        folder,
        "FM",
        train_neg_sample_args={"distribution": "uniform", "sample_num": 1},
        load_col={"inter": ["user_id", "item_id", "timestamp"], "user": ["user_id", "age"]},
    ).train._dataset
    inputs = Users(data).inputs(torch.arange(1, data.user_num))
    assert set(inputs) == {"user_id", "age"}
    for user, age in zip(inputs["user_id"], inputs["age"], strict=True):
        assert token(data, "age", age) == f"age{int(token(data, 'user_id', user)[1:]) % 3}"


def test_what_a_student_learns_on(folder: Path) -> None:
    sequential = training_set(folder)
    general = training_set(
        folder, model="BPR", train_neg_sample_args={"distribution": "uniform", "sample_num": 1}
    )
    assert (is_sequential(sequential), is_sequential(general)) == (True, False)
    assert isinstance(of_training(sequential), Rows)
    assert isinstance(of_training(general), Users)


# --- whole sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["rows", "interactions"])
def test_whole_sequences_are_the_files(folder: Path, split: str) -> None:
    config = build_config(
        folder,
        "GRU4Rec",
        MAX_ITEM_LIST_LENGTH=LENGTH,
        load_col={
            "inter": ["user_id", "item_id", "timestamp", "price"],
            "user": ["user_id", "age"],
        },
        eval_args={
            "order": "TO",
            "group_by": "user",
            "mode": "full",
            "split": {"LS": "valid_and_test"},
        },
        kd_sequence_split=split,
        train_neg_sample_args=None,
    )
    dataset = (create_dataset if split == "interactions" else stock_dataset)(config).build()[0]
    sequences = WholeSequences(dataset)
    assert sequences.n == dataset.user_num == 9
    inputs = sequences.inputs(torch.arange(9))
    assert len(inputs) == 9
    for number in range(1, 9):
        user = token(dataset, "user_id", number)
        events = sorted((e for e in EVENTS if e.user == user), key=lambda e: e.time)
        if user == "u0" and split == "rows":
            # With one line the user has no row and is never asked for, but must not cause errors.
            continue
        # RecBole leaves a user at least one interaction for training, or, if it splits rows, one
        # row, which has two.
        held_out = min(2, len(events) - (1 if split == "interactions" else 2))
        taken = events[: len(events) - held_out][-LENGTH:]
        assert int(inputs["user_id"][number]) == number
        assert int(inputs["item_length"][number]) == len(taken)
        listed = [token(dataset, "item_id", i) for i in inputs["item_id_list"][number]]
        assert listed == [e.item for e in taken] + ["[PAD]"] * (LENGTH - len(taken))
        if len(taken) > 1:  # otherwise there is no row with the other columns
            assert inputs["price_list"][number, : len(taken)].tolist() == pytest.approx(
                [e.price for e in taken]
            )
        assert token(dataset, "age", inputs["age"][number]) == f"age{int(user[1:]) % 3}"
    moved = torch.tensor([0, 3, 0, 5])
    translated = WholeSequences(dataset, moved)
    assert translated.n == 4
    assert torch.equal(
        translated.inputs(torch.tensor([3, 1]))["item_id_list"], inputs["item_id_list"][[5, 3]]
    )
    assert len(translated.inputs(torch.tensor([0, 2]))) == 2  # padding
