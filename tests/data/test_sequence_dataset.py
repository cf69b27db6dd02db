"""Sequential data with the split of general models.

They are compared with RecBole's own code, and with a second derivation in plain Python.
"""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import recbole.data.dataset
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.data import data_preparation
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.utils import get_model, get_trainer, init_seed

from recbole_rcekd.core.errors import SettingsError, TeacherError
from recbole_rcekd.data import sequences
from recbole_rcekd.data.sequence_dataset import SequenceDataset, create_dataset
from recbole_rcekd.data.sequences import training_pairs, whole_sequences
from recbole_rcekd.teachers.safe_load import read_checkpoint
from tests.conformance.world import write_world
from tests.helpers import Bundle, build_config, save_untrained, write_atomic_file

LENGTH = 5
HEADER = ("user_id:token", "item_id:token", "timestamp:float", "n:float")
SPLITS: dict[str, dict[str, Any]] = {
    "leave one out": {"split": {"LS": "valid_and_test"}},
    "no test": {"split": {"LS": "valid_only"}},
    "no validation": {"split": {"LS": "test_only"}},
    "ratio": {"split": {"RS": [0.8, 0.1, 0.1]}},
    "other ratio": {"split": {"RS": [0.5, 0.25, 0.25]}},
    "ratio of all": {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": "none"},
}


class Event(NamedTuple):
    """An interaction; its number ``n`` in the files is a float column in RecBole."""

    user: str
    item: str
    time: int
    n: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every example overwrites."""
    return tmp_path_factory.mktemp("sequences")


def config_for(folder: Path, model: str = "SASRec", **overrides: Any) -> Any:
    eval_args = {
        "order": "TO",
        "group_by": "user",
        "mode": "full",
        **overrides.pop("eval_args", SPLITS["ratio"]),
    }
    given_keys = {
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "load_col": {"inter": ["user_id", "item_id", "timestamp", "n"]},
        "eval_args": eval_args,
        **(
            {"train_neg_sample_args": None, "hidden_size": 8, "inner_size": 8}
            if model == "SASRec"
            else {}
        ),
    }
    return build_config(folder, model, **{**given_keys, **overrides})


def write_events(folder: Path, events: Sequence[Event], part: str = "") -> None:
    write_atomic_file(folder / "tiny" / f"tiny{part and '.'}{part}.inter", HEADER, events)


@st.composite
def tables(draw: st.DrawFn, most: int = 5) -> list[Event]:
    """At least two users with 1 to ``most`` interactions each, in any order, with equal times."""
    counts = draw(st.lists(st.integers(1, most), min_size=2, max_size=6))
    owners = draw(
        st.permutations([user for user, count in enumerate(counts) for _ in range(count)])
    )
    size = len(owners)
    items = draw(st.lists(st.integers(0, 7), min_size=size, max_size=size))
    times = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return [
        Event(f"u{u}", f"i{i}", t, n)
        for n, (u, i, t) in enumerate(zip(owners, items, times, strict=True))
    ]


def by_user(events: Sequence[Event]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        found[event.user].append(event)
    return found


Rows = list[tuple[str, int, list[str], list[int]]]


def expected_rows(sequence_of: dict[str, list[Event]], part_of: dict[int, int], part: int) -> Rows:
    """For each row of a part: user, number of the target, listed items and their times."""
    rows: Rows = []
    for user, sequence in sequence_of.items():
        for place in range(1, len(sequence)):
            if part_of[sequence[place].n] == part:
                history = sequence[:place][-LENGTH:]
                rows.append(
                    (user, sequence[place].n, [e.item for e in history], [e.time for e in history])
                )
    return sorted(rows)


def found_rows(dataset: Any) -> Rows:
    features = dataset.inter_feat
    users, items = (dataset.field2id_token[field] for field in ("user_id", "item_id"))
    rows: Rows = []
    for row in range(len(features)):
        length = int(features["item_length"][row])
        listed = features["item_id_list"][row].tolist()
        assert listed[length:] == [0] * (LENGTH - length)
        times = (
            features["timestamp_list"][row].tolist()
            if "timestamp_list" in features
            else [0.0] * LENGTH
        )
        rows.append(
            (
                str(users[int(features["user_id"][row])]),
                int(features["n"][row]),
                [str(items[item]) for item in listed[:length]],
                [int(time) for time in times[:length]],
            )
        )
    return sorted(rows)


def pairs_of(dataset: Any, pairs: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[str, str]]:
    users, items = (dataset.field2id_token[field] for field in ("user_id", "item_id"))
    return sorted(
        (str(users[u]), str(items[i])) for u, i in zip(*(p.tolist() for p in pairs), strict=True)
    )


def assert_same_features(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    for field in one:
        assert one[field].dtype == other[field].dtype
        assert torch.equal(one[field], other[field]), field


# --- augmentation ---------------------------------------------------------------------------------


@given(tables(most=9), st.sampled_from([1, 2, LENGTH, 50]), st.randoms(use_true_random=False))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_augmentation_equals_recboles_bit_for_bit(
    folder: Path, events: list[Event], length: int, draw: Any
) -> None:
    header = (
        *HEADER[:3],
        "rating:float",
        "mood:token",
        "price:float",
        "tags:token_seq",
        "v:float_seq",
        "w:float_seq",
    )

    def numbers() -> str:
        return " ".join(f"{draw.random():.3f}" for _ in range(draw.randint(1, 3)))

    def tags() -> str:
        return " ".join(f"t{draw.randint(0, 4)}" for _ in range(draw.randint(1, 3)))

    rows = [
        (
            *event[:3],
            draw.random(),
            f"m{draw.randint(0, 2)}",
            draw.random(),
            tags(),
            numbers(),
            numbers(),
        )
        for event in events
    ]
    write_atomic_file(folder / "tiny" / "tiny.inter", header, rows)
    config = config_for(
        folder,
        load_col=None,
        numerical_features=["price", "w"],
        MAX_ITEM_LIST_LENGTH=length,
        eval_args=SPLITS["no test"],
    )
    own, stock = SequenceDataset(config), SequentialDataset(config)
    with_blocks(2, own._change_feat_format)
    stock._change_feat_format()
    assert_same_features(own.inter_feat, stock.inter_feat)
    for properties in ("field2type", "field2source", "field2seqlen"):
        assert getattr(own, properties) == getattr(stock, properties)


def with_blocks(size: int, work: Callable[[], Any]) -> Any:
    """Process few rows at once, so that a test has more than one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "_BLOCK", size)
        return work()


def test_augmentation_has_the_fields_of_every_kind(folder: Path) -> None:
    """The shapes of the list fields that the test above compares, by hand."""
    rows = [("u", f"i{n}", n, 0.5 * n, "a b", "1 2 3") for n in range(3)]
    header = (
        "user_id:token",
        "item_id:token",
        "timestamp:float",
        "price:float",
        "tags:token_seq",
        "v:float_seq",
    )
    write_atomic_file(folder / "tiny" / "tiny.inter", header, rows)
    dataset = SequenceDataset(config_for(folder, load_col=None, numerical_features=["price"]))
    dataset._change_feat_format()
    shapes = {field: tuple(dataset.inter_feat[field].shape) for field in dataset.inter_feat}
    assert shapes["price_list"] == (2, LENGTH, 2)
    assert shapes["tags_list"] == (2, LENGTH, 2)
    assert shapes["v_list"] == (2, LENGTH, 3)
    assert dataset.inter_feat["price_list"][1].tolist() == [
        [0, 1],
        [0.5, 1],
        [0, 0],
        [0, 0],
        [0, 0],
    ]
    assert "user_id_list" not in shapes


# --- split by interactions ------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@given(events=tables())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interactions_are_split_as_a_general_models(
    folder: Path, split: str, events: list[Event]
) -> None:
    write_events(folder, events)
    keys: dict[str, Any] = {"eval_args": SPLITS[split], "kd_sequence_split": "interactions"}
    general = Dataset(config_for(folder, "BPR", **keys)).build()
    part_of = {int(n): part for part, data in enumerate(general) for n in data.inter_feat["n"]}
    assert sorted(part_of) == list(range(len(events)))
    sequence_of = by_user(sorted(events, key=lambda event: event.time))

    built = SequenceDataset(config_for(folder, **keys)).build()
    assert len(built) == 3
    for part, data in enumerate(built):
        assert found_rows(data) == expected_rows(sequence_of, part_of, part)
    assert built[0].field2token_id["item_id"] == general[0].field2token_id["item_id"]
    assert pairs_of(built[0], training_pairs(built[0])) == pairs_of(
        general[0], training_pairs(general[0])
    )


def test_where_both_ways_agree_the_datasets_are_equal(folder: Path) -> None:
    """Leave-one-out with at least four interactions: rows in RecBole's order.

    So the same seed gives the same training.
    """
    draw = torch.Generator().manual_seed(3)
    events = [
        Event(
            f"u{n % 7}",
            f"i{int(torch.randint(9, (), generator=draw))}",
            int(torch.randint(6, (), generator=draw)),
            n,
        )
        for n in range(7 * 6)
    ]
    write_events(folder, events)
    keys: dict[str, Any] = {"eval_args": SPLITS["leave one out"]}
    stock = create_dataset(config_for(folder, **keys))
    own = create_dataset(config_for(folder, kd_sequence_split="interactions", **keys))
    assert (type(stock), type(own)) == (SequentialDataset, SequenceDataset)
    for one, other in zip(own.build(), stock.build(), strict=True):
        assert_same_features(one.inter_feat, other.inter_feat)


@pytest.mark.parametrize("way", [None, "rows"])
def test_rows_are_split_as_recbole_does(folder: Path, way: str | None) -> None:
    write_events(folder, [Event(f"u{n % 3}", f"i{n % 5}", n % 4, n) for n in range(17)])
    config = config_for(folder, kd_sequence_split=way)
    for one, other in zip(
        SequenceDataset(config).build(), SequentialDataset(config).build(), strict=True
    ):
        assert_same_features(one.inter_feat, other.inter_feat)
        assert not hasattr(one, "training_pairs")


def test_only_the_training_split_knows_its_pairs(folder: Path) -> None:
    write_events(folder, [Event(f"u{n % 3}", f"i{n}", n, n) for n in range(18)])
    built = SequenceDataset(config_for(folder, kd_sequence_split="interactions")).build()
    assert [hasattr(part, "training_pairs") for part in built] == [True, False, False]


def test_columns_that_are_not_used_go_after_the_split(folder: Path) -> None:
    write_events(folder, [Event(f"u{n % 3}", f"i{n}", -n, n) for n in range(18)])
    keys: dict[str, Any] = {"kd_sequence_split": "interactions"}
    full = SequenceDataset(config_for(folder, **keys)).build()
    less = SequenceDataset(config_for(folder, unused_col={"inter": ["timestamp"]}, **keys)).build()
    for one, other in zip(full, less, strict=True):
        assert found_rows(one) == found_rows(other)
        assert set(one.inter_feat) - set(other.inter_feat) == {"timestamp"}


# --- ready split ----------------------------------------------------------------------------------

PARTS = ("train", "valid", "test")


def write_ready_split(folder: Path, events: Sequence[Event]) -> dict[int, int]:
    """Put every third event in the validation and another in the test; return the part of each."""
    part_of = {event.n: (event.n * 7 + event.time) % 5 for event in events}
    part_of = {n: part if part in (1, 2) else 0 for n, part in part_of.items()}
    part_of[events[0].n] = 0
    for number, part in enumerate(PARTS):
        write_events(folder, [event for event in events if part_of[event.n] == number], part)
    return part_of


@pytest.mark.parametrize("timed", [True, False])
@given(events=tables(most=8))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_ready_split_keeps_its_parts(folder: Path, timed: bool, events: list[Event]) -> None:
    part_of = write_ready_split(folder, events)
    columns = ["user_id", "item_id", "n", *(["timestamp"] if timed else [])]
    if not timed:
        events = [event._replace(time=0) for event in events]
    config = config_for(folder, benchmark_filename=list(PARTS), load_col={"inter": columns})
    general = Dataset(
        config_for(folder, "BPR", benchmark_filename=list(PARTS), load_col={"inter": columns})
    ).build()
    built = create_dataset(config).build()
    sequence_of = by_user(sorted(events, key=lambda event: (part_of[event.n], event.time)))
    for part, data in enumerate(built):
        assert found_rows(data) == expected_rows(sequence_of, part_of, part)
    assert pairs_of(built[0], training_pairs(built[0])) == pairs_of(
        general[0], training_pairs(general[0])
    )


def test_a_training_interaction_comes_first_whatever_the_time(folder: Path) -> None:
    for part, event in zip(
        PARTS, [("u", "a", 9, 0), ("u", "b", 5, 1), ("u", "c", 1, 2)], strict=True
    ):
        write_events(folder, [Event(*event)], part)
    train, valid, test = create_dataset(config_for(folder, benchmark_filename=list(PARTS))).build()
    assert found_rows(train) == []
    assert found_rows(valid) == [("u", 1, ["a"], [9])]
    assert found_rows(test) == [("u", 2, ["a", "b"], [9, 5])]
    assert pairs_of(train, training_pairs(train)) == [("u", "a")]


def test_parts_survive_what_drops_interactions(folder: Path) -> None:
    class Dropping(SequenceDataset):
        def _fill_nan(self) -> None:
            super()._fill_nan()
            self.inter_feat = self.inter_feat[self.inter_feat["n"] != 1]

    events = [Event("u", f"i{n}", n, n) for n in range(6)]
    for number, part in enumerate(PARTS):
        write_events(folder, events[2 * number : 2 * number + 2], part)
    built = Dropping(config_for(folder, benchmark_filename=list(PARTS))).build()
    assert [[row[1] for row in found_rows(part)] for part in built] == [[], [2, 3], [4, 5]]
    assert pairs_of(built[0], training_pairs(built[0])) == [("u", "i0")]


def test_files_with_lists_are_read_as_recbole_reads_them(folder: Path) -> None:
    header = ("user_id:token", "item_id_list:token_seq", "item_id:token")
    for part in PARTS:
        write_atomic_file(
            folder / "tiny" / f"tiny.{part}.inter", header, [("u", "a b", "c"), ("v", "a", "b")]
        )
    config = config_for(
        folder,
        benchmark_filename=list(PARTS),
        load_col=None,
        alias_of_item_id=["item_id_list"],
        eval_args={},
    )
    stock = create_dataset(config)
    assert type(stock) is SequentialDataset
    for one, other in zip(SequenceDataset(config).build(), stock.build(), strict=True):
        assert_same_features(one.inter_feat, other.inter_feat)
        assert pairs_of(other, training_pairs(other)) == [
            ("u", "a"),
            ("u", "b"),
            ("u", "c"),
            ("v", "a"),
            ("v", "b"),
        ]


# --- pairs and whole sequences --------------------------------------------------------------------


@given(tables(most=9))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pairs_are_what_the_rows_hold(folder: Path, events: list[Event]) -> None:
    write_events(folder, events)
    built = SequentialDataset(config_for(folder)).build()
    numbers = {event.n: event for event in events}
    wanted = set()
    for user, target, items, _ in found_rows(built[0]):
        wanted |= {(user, item) for item in [*items, numbers[target].item]}
    assert pairs_of(built[0], with_blocks(2, lambda: training_pairs(built[0]))) == sorted(wanted)


@given(tables(most=9), st.sampled_from(["ratio", "leave one out"]))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whole_sequences_end_with_the_last_training_interaction(
    folder: Path, events: list[Event], split: str
) -> None:
    write_events(folder, events)
    keys: dict[str, Any] = {"eval_args": SPLITS[split], "kd_sequence_split": "interactions"}
    train = SequenceDataset(config_for(folder, **keys)).build()[0]
    general = Dataset(config_for(folder, "BPR", **keys)).build()[0]
    in_training = {int(n) for n in general.inter_feat["n"]}
    sequence_of = by_user(
        [e for e in sorted(events, key=lambda event: event.time) if e.n in in_training]
    )

    ids = train.field2token_id
    tokens = sorted(sequence_of, reverse=True)
    users = torch.tensor([ids["user_id"][token] for token in [*tokens, tokens[0]]])
    whole = whole_sequences(train, users, fallback=training_pairs(train))
    assert torch.equal(whole["user_id"], users)
    assert set(whole) == set(train.inter_feat)
    for row, token in enumerate([*tokens, tokens[0]]):
        sequence = sequence_of[token]
        last = sequence[-LENGTH:]
        padding = [0] * (LENGTH - len(last))
        assert (
            whole["item_id_list"][row].tolist() == [ids["item_id"][e.item] for e in last] + padding
        )
        assert int(whole["item_length"][row]) == len(last)
        assert int(whole["item_id"][row]) == ids["item_id"][sequence[-1].item]
        alone = len(sequence) == 1  # no row: only its item is known
        assert (
            whole["timestamp_list"][row].tolist()
            == [0 if alone else e.time for e in last] + padding
        )
        assert whole["n_list"][row].tolist() == [0 if alone else e.n for e in last] + padding
        assert int(whole["n"][row]) == (0 if alone else sequence[-1].n)


def test_whole_sequences_have_fields_of_every_kind(folder: Path) -> None:
    header = (*HEADER[:3], "price:float", "tags:token_seq", "v:float_seq")
    rows = [("u", f"i{n}", n, 0.5 * n, f"a{n} b", "1 2 3") for n in range(4)]
    write_atomic_file(folder / "tiny" / "tiny.inter", header, rows)
    keys: dict[str, Any] = {
        "load_col": None,
        "numerical_features": ["price"],
        "MAX_ITEM_LIST_LENGTH": 3,
        "eval_args": SPLITS["no test"],
    }
    train, valid, _ = SequenceDataset(
        config_for(folder, kd_sequence_split="interactions", **keys)
    ).build()
    whole = whole_sequences(train, torch.tensor([1]))
    # A training sequence is the history of the first validation row.
    for field in (
        "item_id_list",
        "timestamp_list",
        "price_list",
        "tags_list",
        "v_list",
        "item_length",
    ):
        assert torch.equal(whole[field], valid.inter_feat[field]), field


def test_users_without_a_sequence_are_named(folder: Path) -> None:
    write_events(
        folder, [Event("long", f"i{n}", n, n) for n in range(6)] + [Event("short", "i0", 7, 6)]
    )
    train = SequenceDataset(config_for(folder, kd_sequence_split="interactions")).build()[0]
    short = train.field2token_id["user_id"]["short"]
    with pytest.raises(TeacherError, match=r"^1 users have no training sequence: short\. "):
        whole_sequences(train, torch.tensor([1, short, 2, short]))
    pairs = torch.tensor([1]), torch.tensor([1])
    with pytest.raises(TeacherError, match="short"):
        whole_sequences(train, torch.tensor([short]), fallback=pairs)


def test_a_fallback_may_be_longer_than_a_list(folder: Path) -> None:
    write_events(
        folder, [Event("long", f"i{n}", n, n) for n in range(8)] + [Event("short", "i0", 9, 8)]
    )
    train = SequenceDataset(config_for(folder, kd_sequence_split="interactions")).build()[0]
    items = torch.arange(1, LENGTH + 3)
    whole = whole_sequences(train, torch.tensor([2]), fallback=(torch.full_like(items, 2), items))
    assert whole["item_id_list"].tolist() == [items[2:].tolist()]
    assert whole["item_length"].tolist() == [LENGTH]


def test_a_list_without_its_column_is_left_out(folder: Path) -> None:
    write_events(folder, [Event("u", f"i{n}", n, n) for n in range(6)])
    unused = {"inter": ["timestamp"]}
    train = SequenceDataset(
        config_for(folder, unused_col=unused, kd_sequence_split="interactions")
    ).build()[0]
    assert "timestamp_list" in train.inter_feat
    assert "timestamp_list" not in whole_sequences(train, torch.tensor([1]))


# --- which dataset --------------------------------------------------------------------------------


@pytest.fixture
def written(folder: Path) -> Path:
    events = [Event(f"u{n % 4}", f"i{n % 6}", n, n) for n in range(24)]
    write_events(folder, events)
    write_ready_split(folder, events)
    for saved in (folder / "saved").glob("*"):
        saved.unlink()
    return folder


@pytest.mark.parametrize(
    ("model", "keys", "wanted"),
    [
        ("BPR", {"kd_sequence_split": "interactions"}, Dataset),
        ("BPR", {"benchmark_filename": list(PARTS)}, Dataset),
        ("SASRec", {}, SequentialDataset),
        ("SASRec", {"kd_sequence_split": "rows"}, SequentialDataset),
        ("SASRec", {"kd_sequence_split": "interactions"}, SequenceDataset),
        ("SASRec", {"benchmark_filename": list(PARTS)}, SequenceDataset),
    ],
)
def test_each_model_gets_the_data_it_needs(
    written: Path, model: str, keys: dict[str, Any], wanted: type
) -> None:
    assert type(create_dataset(config_for(written, model, **keys))) is wanted


@pytest.mark.parametrize("place", ["recbole", "model"])
def test_a_models_own_kind_is_used(
    written: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SASRecDataset(SequenceDataset):
        pass

    module = (
        recbole.data.dataset
        if place == "recbole"
        else __import__(get_model("SASRec").__module__, fromlist=["_"])
    )
    monkeypatch.setattr(module, "SASRecDataset", SASRecDataset, raising=False)
    assert type(create_dataset(config_for(written))) is SASRecDataset
    assert (
        type(create_dataset(config_for(written, kd_sequence_split="interactions"))) is SASRecDataset
    )


@pytest.mark.parametrize(
    "keys", [{"kd_sequence_split": "interactions"}, {"benchmark_filename": list(PARTS)}]
)
def test_a_model_whose_own_data_cannot_split_so_is_refused(
    written: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recbole.data.dataset, "SASRecDataset", SequentialDataset, raising=False)
    assert type(create_dataset(config_for(written))) is SequentialDataset
    with pytest.raises(SettingsError, match="SASRecDataset"):
        create_dataset(config_for(written, **keys))


def test_a_saved_dataset_is_found_and_only_where_it_fits(written: Path) -> None:
    def kept(**keys: Any) -> bool:
        dataset = create_dataset(config_for(written, **keys))
        return bool(getattr(dataset, "mark", False))

    keys: dict[str, Any] = {"kd_sequence_split": "interactions"}
    create_dataset(config_for(written, save_dataset=True, **keys))
    file = written / "saved" / "tiny-SequenceDataset.pth"
    saved = pickle.loads(file.read_bytes())
    saved.mark = True
    elsewhere = written / "elsewhere.pth"
    for place in (file, elsewhere):
        place.write_bytes(pickle.dumps(saved))
    assert kept(**keys)
    assert kept(dataset_save_path=str(elsewhere), **keys)
    assert not kept(MAX_ITEM_LIST_LENGTH=4, **keys)
    assert not kept(seed=1, **keys)
    assert not kept(eval_args=SPLITS["leave one out"], **keys)
    assert not kept(benchmark_filename=list(PARTS))
    saved.config["kd_sequence_split"] = "rows"
    file.write_bytes(pickle.dumps(saved))
    assert not kept(**keys)
    stock = SequentialDataset(config_for(written, **keys))
    stock.mark = True
    file.write_bytes(pickle.dumps(stock))
    assert not kept(**keys)


def test_a_saved_dataset_splits_as_a_fresh_one(written: Path) -> None:
    dataset = SequenceDataset(config_for(written, benchmark_filename=list(PARTS)))
    again = pickle.loads(pickle.dumps(copy.copy(dataset)))
    for one, other in zip(dataset.build(), again.build(), strict=True):
        assert_same_features(one.inter_feat, other.inter_feat)


def test_stock_datasets_are_saved_by_recbole(written: Path) -> None:
    create_dataset(config_for(written, save_dataset=True))
    assert [file.name for file in (written / "saved").glob("*.pth")] == [
        "tiny-SequentialDataset.pth"
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"kd_sequence_split": "interaction"},
            r"\[kd_sequence_split\].*Did you mean \[interactions\]",
        ),
        (
            {"kd_sequence_split": "interactions", "eval_args": {"order": "RO", **SPLITS["ratio"]}},
            r"\[eval_args\].*'RO'",
        ),
        (
            {"kd_sequence_split": "interactions", "load_col": {"inter": ["user_id", "item_id"]}},
            r"\[TIME_FIELD\] is 'timestamp'",
        ),
    ],
)
def test_what_does_not_fit_is_said(written: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        create_dataset(config_for(written, **keys)).build()


def test_a_missing_file_is_recboles_to_report(written: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny\.nowhere\.inter not exist"):
        create_dataset(config_for(written, benchmark_filename=["nowhere", "valid", "test"]))


# --- end to end -----------------------------------------------------------------------------------


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    "keys",
    [
        {"benchmark_filename": list(PARTS)},
        {"kd_sequence_split": "interactions", "eval_args": SPLITS["leave one out"]},
        {"kd_sequence_split": "interactions", "eval_args": SPLITS["ratio"]},
    ],
    ids=["ready split", "leave one out", "ratio"],
)
def test_a_sequential_model_trains_on_what_a_general_one_does(
    folder: Path, keys: dict[str, Any]
) -> None:
    events = [Event(f"u{n % 11}", f"i{n % 13}", n, n) for n in range(11 * 8)]
    events += [
        Event("once", "i0", 100, 88),
        Event("twice", "i1", 101, 89),
        Event("twice", "i2", 102, 90),
    ]
    write_events(folder, events)
    write_ready_split(folder, events)
    trained = {}
    for model in ("BPR", "SASRec"):
        config = config_for(folder, model, epochs=1, checkpoint_dir=str(folder / "run"), **keys)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
        trained[model] = pairs_of(train._dataset, training_pairs(train._dataset))
        built = get_model(model)(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, built)
        trainer.fit(train, valid, saved=False, show_progress=False)
        result = trainer.evaluate(test, load_best_model=False, show_progress=False)
        assert 0 <= result["ndcg@10"] <= 1
    assert trained["SASRec"] == trained["BPR"]


def test_a_built_split_is_recboles_own(written: Path) -> None:
    """GRU4RecF, FDSA, DIN and DIEN put it in their checkpoints, which plain RecBole must open."""
    config = config_for(written, kd_sequence_split="interactions")
    for part in create_dataset(config).build():
        assert type(part) is SequentialDataset
        assert b"recbole_rcekd" not in pickle.dumps(part)


def test_a_checkpoint_that_holds_the_data_opens(tmp_path: Path) -> None:
    config = build_config(
        write_world(tmp_path),
        "GRU4RecF",
        "world",
        kd_sequence_split="interactions",
        selected_features=["class"],
        load_col={"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]},
        eval_args={"split": {"RS": [8, 1, 1]}, "group_by": "user", "order": "TO", "mode": "full"},
        train_neg_sample_args=None,
        hidden_size=4,
        embedding_size=4,
        num_layers=1,
    )
    dataset = create_dataset(config)
    bundle = Bundle(config, dataset, *data_preparation(config, dataset))
    model = save_untrained(bundle, tmp_path / "GRU4RecF.pth")
    content = read_checkpoint(tmp_path / "GRU4RecF.pth")
    assert content["state_dict"].keys() == model.state_dict().keys()
