"""Each fault that `recbole_rcekd.compat` repairs, seen through RecBole.

The tests are run with the oldest and the newest libraries. Expected values are written by hand from
the small data sets here, never taken from a run. The exception are the digests of ml-100k at the
end, which make sure that both sets of libraries give the same tensors.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse
import torch

from recbole_rcekd import compat
from recbole_rcekd.compat import stack
from recbole_rcekd.compat.patching import rewrite

compat.apply()

from recbole.config import Config  # noqa: E402  (RecBole only works once compat has been applied)
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.data.dataloader import FullSortEvalDataLoader  # noqa: E402
from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset  # noqa: E402
from recbole.evaluator import Collector, Evaluator  # noqa: E402
from recbole.trainer import trainer  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402

# 20 interactions in file order, all at the same time: (user, item, rating). More than 16, since
# numpy sorts shorter arrays by insertion, which happens to be stable. The last two repeat the first
# two with other ratings.
TIED = [(f"u{n % 3}", f"i{n}", float(n % 5)) for n in range(18)] + [
    ("u0", "i0", 9.0),
    ("u1", "i1", 9.0),
]


@pytest.fixture(autouse=True)
def _clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide pytest's command line, which Config reads, and restore the environment afterwards."""
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.chdir(tmp_path)  # RecBole's trainer writes log_tensorboard/ where it runs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def write(folder: Path, suffix: str, header: str, rows: Sequence[Sequence[object]]) -> None:
    """Write one atomic file of the data set `tiny`; the header is `name:type` words."""
    (folder / "tiny").mkdir(exist_ok=True)
    lines = ["\t".join(header.split()), *("\t".join(map(str, row)) for row in rows)]
    (folder / "tiny" / f"tiny.{suffix}").write_text("\n".join(lines) + "\n")


def build_config(
    folder: Path, model: str = "BPR", dataset: str = "tiny", **settings: Any
) -> Config:
    """Return a Config that writes only in `folder`."""
    fixed = {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
    }
    return Config(model=model, dataset=dataset, config_dict={**fixed, **settings})


def build_dataset(folder: Path, model: str = "BPR", **settings: Any) -> Any:
    """Return the processed, not yet split data set `tiny`."""
    return create_dataset(build_config(folder, model, **settings))


def plain_inter(folder: Path) -> None:
    """Write four interactions; users a, b get the ids 1, 2 and items x, y, z the ids 1, 2, 3."""
    rows = [("a", "x", 5), ("a", "y", 3), ("b", "x", 4), ("b", "z", 1)]
    write(folder, "inter", "user_id:token item_id:token rating:float", rows)


# --- numpy ----------------------------------------------------------------------------------------


def test_config_builds(tmp_path: Path) -> None:
    plain_inter(tmp_path)
    assert build_config(tmp_path)["model"] == "BPR"


def test_numpy_aliases_fill_gaps_and_override_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = object()
    monkeypatch.setattr(np, "float_", theirs)
    monkeypatch.delattr(np, "int")
    stack.numpy_aliases()
    assert vars(np)["float_"] is theirs
    assert vars(np)["int"] is np.int_
    assert np.dtype(vars(np)["bool"]) == np.dtype(bool)


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a new interpreter without a Config, as when a checkpoint is loaded."""
    script = """
import json, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import recbole_rcekd
    from recbole_rcekd import compat
    compat.apply()
ours = [str(w.message) for w in seen if "recbole_rcekd" in w.filename]
import numpy as np
from recbole.evaluator.metrics import NDCG, GAUC
hits = np.array([[False, True]])
ndcg = NDCG({"topk": [2], "metric_decimal_place": 4}).metric_info(hits, np.array([1]))
import recbole.quick_start
started = "run" in dir(recbole.quick_start)
print(json.dumps({"warnings": ours, "ndcg": ndcg.tolist(), "quick_start": started}))
"""
    root = str(Path(compat.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}){script}"],
        cwd=tmp_path_factory.mktemp("fresh"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_fresh_process_evaluates_without_a_config(fresh_process: Mapping[str, Any]) -> None:
    # One relevant item at rank 2: DCG 1/log2(3), ideal DCG 1.
    np.testing.assert_allclose(fresh_process["ndcg"], [[0.0, 1 / math.log2(3)]])


def test_import_warns_about_nothing_of_ours(fresh_process: Mapping[str, Any]) -> None:
    assert fresh_process["warnings"] == []


def test_quick_start_imports(fresh_process: Mapping[str, Any]) -> None:
    assert fresh_process["quick_start"]


# --- ray ------------------------------------------------------------------------------------------


@pytest.fixture(params=["ray", "pkg_resources"])
def unusable_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Apply the repair without ray, or without a package that ray needs; yield what is missing."""
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "ray"}
    for name in saved:
        del sys.modules[name]
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == request.param else importlib
        )
        stack.ray_stub()
    yield request.param
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        del sys.modules[name]
    sys.modules.update(saved)


def test_quick_start_imports_without_ray_and_says_what_is_missing(unusable_ray: str) -> None:
    import recbole.quick_start as package

    # Run the file under another name, so that the module the other tests use stays as it is.
    path = Path(package.__file__).with_name("quick_start.py")
    spec = importlib.util.spec_from_file_location("recbole.quick_start.again", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    with pytest.raises(
        ImportError, match=r"ray\.tune\.report .*ray 2\.6\.3.*Python <= 3\.11"
    ) as caught:
        module.tune.report(recall=1.0)
    assert f"no module named {unusable_ray}" in str(caught.value)


@pytest.mark.usefixtures("unusable_ray")
def test_ray_stand_in_behaves_as_a_module() -> None:
    tune = importlib.import_module("ray.tune")
    assert importlib.import_module("ray").tune is tune
    assert importlib.util.find_spec("ray") is not None
    assert not hasattr(tune, "__file__")
    stack.ray_stub()
    assert importlib.import_module("ray.tune") is tune


# --- torch ----------------------------------------------------------------------------------------


class Payload:
    """An object that the weights-only unpickler refuses."""


def load_as(module: str, path: Path, **kwargs: Any) -> Any:
    """Call `torch.load` from code that says it belongs to `module`."""
    namespace: dict[str, Any] = {"__name__": module, "torch": torch}
    exec("def load(path, **kwargs): return torch.load(path, **kwargs)", namespace)
    return namespace["load"](path, **kwargs)


def test_torch_load_is_relaxed_for_recbole_only(tmp_path: Path) -> None:
    path = tmp_path / "payload.pth"
    torch.save({"config": Payload()}, path)
    assert isinstance(load_as("recbole.trainer.trainer", path)["config"], Payload)
    for other in ("recbole_rcekd.teachers.checkpoint_teacher", "__main__", "recbolex"):
        with pytest.raises(pickle.UnpicklingError, match="weights_only"):
            load_as(other, path)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(path)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        load_as("recbole.trainer.trainer", path, weights_only=True)


def test_trainer_resumes_its_checkpoint(tmp_path: Path) -> None:
    plain_inter(tmp_path)
    config = build_config(tmp_path)
    dataset = create_dataset(config)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(
        config, get_model("BPR")(config, dataset)
    )
    trainer._save_checkpoint(3, verbose=False)
    trainer.start_epoch = 0
    trainer.resume_checkpoint(trainer.saved_model_file)
    assert trainer.start_epoch == 4


# --- scipy ----------------------------------------------------------------------------------------


def test_dok_update() -> None:
    matrix = scipy.sparse.dok_matrix((2, 2), dtype=np.float32)
    matrix._update({(0, 1): 1, (1, 0): 2})
    np.testing.assert_array_equal(matrix.toarray(), [[0, 1], [2, 0]])


def test_lightgcn_builds_its_adjacency(tmp_path: Path) -> None:
    plain_inter(tmp_path)
    config = build_config(tmp_path, "LightGCN")
    adjacency = get_model("LightGCN")(config, create_dataset(config)).norm_adj_matrix.to_dense()
    # Nodes: users PAD, a, b, then items PAD, x, y, z; an edge weighs 1 / sqrt(degree * degree).
    expected = torch.zeros(7, 7)
    for user, item, degrees in [(1, 4, 2 * 2), (1, 5, 2 * 1), (2, 4, 2 * 2), (2, 6, 2 * 1)]:
        expected[user, item] = expected[item, user] = degrees**-0.5
    torch.testing.assert_close(adjacency, expected)


# --- pandas: missing values -----------------------------------------------------------------------


def test_missing_values_are_filled(tmp_path: Path) -> None:
    header = "user_id:token item_id:token rating:float"
    write(tmp_path, "inter", header, [("a", "x", 5), ("a", "y", ""), ("b", "x", 4), ("b", "z", 3)])
    # User b has no row.
    write(
        tmp_path,
        "user",
        "user_id:token age:float job:token",
        [("a", 20, "cook"), ("c", 40, "smith")],
    )
    write(tmp_path, "item", "item_id:token price:float", [("x", 1), ("y", "")])  # no z
    # By default RecBole would drop the interactions of b and z instead.
    dataset = build_dataset(tmp_path, load_col=None, filter_inter_by_user_or_item=False)
    dataset._change_feat_format()

    assert dataset.field2token_id["user_id"] == {"[PAD]": 0, "a": 1, "b": 2, "c": 3}
    mean_rating, mean_age, mean_price = (5 + 4 + 3) / 3, (20 + 40) / 2, 1.0
    assert dataset.inter_feat["rating"].tolist() == [5, mean_rating, 4, 3]
    assert dataset.user_feat["age"].tolist() == [mean_age, 20, mean_age, 40]
    assert dataset.user_feat["job"].tolist() == [0, 1, 0, 2]
    assert dataset.item_feat["price"].tolist() == [mean_price] * 4


def test_empty_sequences_are_read(tmp_path: Path) -> None:
    plain_inter(tmp_path)
    header = "item_id:token tags:token_seq levels:float_seq"
    write(tmp_path, "item", header, [("x", "red", ""), ("y", "", "2 3")])  # no z
    dataset = build_dataset(
        tmp_path, load_col=None, normalize_all=False, filter_inter_by_user_or_item=False
    )
    dataset._change_feat_format()
    assert dataset.item_feat["tags"].tolist() == [[0], [1], [0], [0]]
    assert dataset.item_feat["levels"].tolist() == [[0, 0], [0, 0], [2, 3], [0, 0]]


# --- pandas: lengths of sequences -----------------------------------------------------------------


def sequence_dataset(folder: Path, **settings: Any) -> Any:
    """Items with sequences of unequal length: tags r | g r | b, and levels 0 | 2 4 | 8."""
    plain_inter(folder)
    rows = [("x", "r", "0"), ("y", "g r", "2 4"), ("z", "b", "8")]
    write(folder, "item", "item_id:token tags:token_seq levels:float_seq", rows)
    load_col = {"inter": ["user_id", "item_id"], "item": ["item_id", "tags", "levels"]}
    return build_dataset(folder, load_col=load_col, **settings)


def rows_of(column: Any) -> list[list[float]]:
    return [list(map(float, row)) for row in column]


def test_token_sequences_are_remapped_row_by_row(tmp_path: Path) -> None:
    dataset = sequence_dataset(tmp_path)
    assert dataset.field2token_id["tags"] == {"[PAD]": 0, "r": 1, "g": 2, "b": 3}
    assert rows_of(dataset.item_feat["tags"]) == [[], [1], [2, 1], [3]]
    assert rows_of(dataset.item_feat["levels"]) == [[], [0], [2, 4], [8]]


def test_float_sequences_are_normalised_row_by_row(tmp_path: Path) -> None:
    dataset = sequence_dataset(tmp_path, normalize_field=["levels"], normalize_all=False)
    assert rows_of(dataset.item_feat["levels"]) == [[], [0 / 8], [2 / 8, 4 / 8], [8 / 8]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Two rows for each item: ones, then bucket floor(4 * x / (8 + 1e-9) + 1).
        ({"discretization": {"levels": {"method": "ED", "bucket": 4}}}, [[], [1], [1, 2], [4]]),
        # Without a method: the values, then ones.
        ({}, [[], [1], [1, 1], [1]]),
    ],
)
def test_float_sequences_are_discretised_row_by_row(
    tmp_path: Path, settings: dict[str, Any], expected: list[list[float]]
) -> None:
    dataset = sequence_dataset(
        tmp_path, numerical_features=["levels"], normalize_all=False, **settings
    )
    first, second = zip(*dataset.item_feat["levels"], strict=True)
    assert rows_of(second) == expected
    raw: list[list[float]] = [[], [0], [2, 4], [8]]
    assert rows_of(first) == ([[1.0] * len(row) for row in raw] if settings else raw)


def test_sequences_of_entities_are_renumbered_row_by_row(tmp_path: Path) -> None:
    rows = [("a", "x", "y z"), ("b", "z", "x")]
    write(tmp_path, "inter", "user_id:token item_id:token seen:token_seq", rows)
    write(tmp_path, "link", "item_id:token entity_id:token", [("x", "e1"), ("z", "e2")])
    write(tmp_path, "kg", "head_id:token relation_id:token tail_id:token", [("e1", "likes", "e2")])
    load_col = {
        "inter": ["user_id", "item_id", "seen"],
        "kg": ["head_id", "relation_id", "tail_id"],
        "link": ["item_id", "entity_id"],
    }
    dataset = build_dataset(tmp_path, "CKE", load_col=load_col, alias_of_item_id=["seen"])
    # Items without an entity come first.
    assert dataset.field2token_id["seen"] == {"[PAD]": 0, "y": 1, "x": 2, "z": 3}
    assert dataset.inter_feat["item_id"].tolist() == [2, 3]
    assert rows_of(dataset.inter_feat["seen"]) == [[1, 3], [2]]


def test_ready_made_sequences_keep_their_lengths(tmp_path: Path) -> None:
    header = "user_id:token item_id_list:token_seq item_id:token"
    write(tmp_path, "train.inter", header, [("a", "x", "y"), ("a", "x y", "z")])
    write(tmp_path, "valid.inter", header, [("a", "x y z", "x")])
    write(tmp_path, "test.inter", header, [("a", "x y z x", "y")])
    dataset = build_dataset(
        tmp_path,
        "GRU4Rec",
        benchmark_filename=["train", "valid", "test"],
        alias_of_item_id=["item_id_list"],
        load_col={"inter": ["user_id", "item_id_list", "item_id"]},
        train_neg_sample_args=None,
    )
    assert dataset.inter_feat["item_length"].tolist() == [1, 2, 3, 4]


# --- order of ties --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["first", "last"])
def test_ties_in_time_keep_the_file_order(tmp_path: Path, keep: str) -> None:
    # Two earlier rows at the end of the file: the sort must move them up and leave the ties alone.
    early = [("u2", "i20", 1.0, 1), ("u2", "i21", 1.0, 1)]
    rows = [(*row, 2) for row in TIED]
    write(
        tmp_path, "inter", "user_id:token item_id:token rating:float timestamp:float", rows + early
    )
    dataset = build_dataset(
        tmp_path,
        rm_dup_inter=keep,
        load_col={"inter": ["user_id", "item_id", "rating", "timestamp"]},
        eval_args={
            "split": {"LS": "valid_and_test"},
            "order": "TO",
            "group_by": "user",
            "mode": "full",
        },
    )
    kept = rows[:18] if keep == "first" else rows[2:]
    expected = early + kept
    items = dataset.field2id_token["item_id"]
    assert items[dataset.inter_feat["item_id"]].tolist() == [row[1] for row in expected]
    assert dataset.inter_feat["rating"].tolist() == [row[2] for row in expected]
    assert items.tolist() == ["[PAD]", *(row[1] for row in expected)]

    # Leave-one-out: of each user the last row is the test, the one before it the validation.
    of_user = {user: [row[1] for row in expected if row[0] == user] for user in ("u2", "u0", "u1")}
    _, valid, test = dataset.build()
    held_out = {}
    for name, part in (("valid", valid), ("test", test)):
        users = dataset.field2id_token["user_id"][part.inter_feat["user_id"].numpy()]
        held_out[name] = dict(zip(users, items[part.inter_feat["item_id"].numpy()], strict=True))
    assert held_out["test"] == {user: seen[-1] for user, seen in of_user.items()}
    assert held_out["valid"] == {user: seen[-2] for user, seen in of_user.items()}


# --- several processes ----------------------------------------------------------------------------
# test_distributed.py has the results of two processes; here are the settings that each gets, with
# and without GPUs.


class Joined(NamedTuple):
    """The Config of one of two processes, and how it joined the other."""

    config: Any
    calls: list[dict[str, Any]]
    gpus: list[int]


@pytest.fixture
def join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Joined]:
    """Build a Config as the second of two processes, with or without GPUs; start no process."""
    plain_inter(tmp_path)

    def build(gpus: bool, **settings: Any) -> Joined:
        calls: list[dict[str, Any]] = []
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: bool(calls))
        monkeypatch.setattr(
            torch.distributed, "init_process_group", lambda **given: calls.append(given)
        )
        settings |= {
            "local_rank": 1,
            "nproc": 2,
            "world_size": 4,
            "ip": "10.0.0.1",
            "port": "5678",
            "offset": 2,
        }
        build_config(tmp_path, **settings)
        return Joined(build_config(tmp_path, **settings), calls, chosen)

    return build


def test_processes_without_gpu_use_gloo(join: Callable[..., Joined]) -> None:
    joined = join(gpus=False)
    assert joined.calls == [
        {"backend": "gloo", "rank": 3, "world_size": 4, "init_method": "tcp://10.0.0.1:5678"}
    ]
    assert joined.config["device"] == torch.device("cpu")
    assert joined.config["single_spec"] is False
    assert joined.gpus == []


def test_processes_with_gpus_use_nccl_as_before(join: Callable[..., Joined]) -> None:
    joined = join(gpus=True, gpu_id="0,1")
    assert joined.calls == [
        {"backend": "nccl", "rank": 3, "world_size": 4, "init_method": "tcp://10.0.0.1:5678"}
    ]
    assert joined.config["device"] == torch.device("cuda", 1)
    assert joined.gpus == [1, 1]


def test_a_process_without_a_gpu_of_its_own_is_an_error(join: Callable[..., Joined]) -> None:
    with pytest.raises(
        ValueError, match=r"\[gpu_id\]='0' names too few GPUs for \[nproc\]=2.*--gpu_id=0,1"
    ):
        join(gpus=True, gpu_id="0")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_gpus_have_numbers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        trainer, "DistributedDataParallel", lambda model, device_ids: given.append(device_ids)
    )
    config = {"single_spec": False, "local_rank": 1, "device": torch.device(device)}
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    made = trainer.AbstractTrainer(config, model)
    assert given == [[1] if device == "cuda" else None]
    # The synchronised kind of batch normalisation exists for GPUs only.
    kind = torch.nn.SyncBatchNorm if device == "cuda" else torch.nn.BatchNorm1d
    assert type(made.model[0]) is kind


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_draws_curves(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    writer = trainer.get_tensorboard(logging.getLogger())
    writer.add_scalar("Loss/Train", 1.0, 0)
    writer.add_hparams({"learner": "adam"}, {"hparam/best_valid_result": 0.5})
    assert (tmp_path / "log_tensorboard").exists() is (rank == 0)


def test_no_tensorboard_for_a_while(tmp_path: Path) -> None:
    with compat.without_tensorboard():
        trainer.get_tensorboard(logging.getLogger()).add_scalar("Loss/Train", 1.0, 0)
    assert not (tmp_path / "log_tensorboard").exists()
    trainer.get_tensorboard(logging.getLogger())
    assert (tmp_path / "log_tensorboard").exists()


# --- evaluation -----------------------------------------------------------------------------------


def test_counts_of_the_training_data_are_no_tensors(tmp_path: Path) -> None:
    """By hand: three lists of one item each, from a catalogue of four ids with padding."""
    plain_inter(tmp_path)
    config = build_config(
        tmp_path,
        metrics=["ItemCoverage", "AveragePopularity"],
        valid_metric="ItemCoverage@1",
        topk=[1],
    )
    collector = Collector(config)
    collector.data_struct.set("data.num_items", 4)
    collector.data_struct.set("data.count_items", {1: 2, 2: 1, 3: 1})
    collector.data_struct.set("rec.items", torch.tensor([[1], [3], [1]]))
    found = Evaluator(config).evaluate(collector.get_data_struct())
    assert found == {"itemcoverage@1": 2 / 4, "averagepopularity@1": round((2 + 1 + 2) / 3, 4)}


# --- the rewriting itself -------------------------------------------------------------------------


def test_apply_again_changes_nothing() -> None:
    def state() -> list[object]:
        return [
            *(
                torch.load,
                sys.modules.get("ray"),
                Dataset._fill_nan,
                Dataset._load_feat,
                Dataset._remap,
            ),
            *(Config._init_device, trainer.AbstractTrainer.__init__, trainer.get_tensorboard),
            *(
                FullSortEvalDataLoader.__init__,
                Collector.get_data_struct,
                trainer.Trainer._map_reduce,
            ),
        ]

    before = state()
    compat.apply()
    assert all(one is other for one, other in zip(before, state(), strict=True))


def test_rewritten_methods_keep_their_place_in_the_source() -> None:
    for method, line in ((Dataset._fill_nan, 632), (Dataset._remove_duplication, 838)):
        assert method.__code__.co_filename.endswith("dataset.py")
        assert method.__code__.co_firstlineno == line
        assert method.__module__ == "recbole.data.dataset.dataset"
        assert method.__qualname__ == f"Dataset.{method.__name__}"
    assert "_fill_nan" not in vars(SequentialDataset)
    assert "_fill_nan" not in vars(KnowledgeBasedDataset)


def test_rewriting_an_unknown_recbole_is_an_error() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"Dataset\._filter_nan_user_or_item has no line 'gone'.*recbole==1\.2\.1",
    ):
        rewrite(Dataset, "_filter_nan_user_or_item", {"gone": "here"})


# --- one pipeline, the same tensors on every stack ------------------------------------------------


def digest(*tensors: Any) -> str:
    """Hash integer arrays exactly, floating ones to four decimals."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        array = np.asarray(tensor)
        # + 0.0 turns -0.0 into 0.0
        exact = (
            np.round(array.astype("<f8"), 4) + 0.0
            if array.dtype.kind == "f"
            else array.astype("<i8")
        )
        hasher.update(exact.tobytes())
    return hasher.hexdigest()[:12]


RANDOM_RATIO = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full"}
LEAVE_ONE_OUT = {
    "split": {"LS": "valid_and_test"},
    "order": "TO",
    "group_by": "user",
    "mode": "full",
}
ML_100K = {
    "random ratio": {
        "tokens": "38ba959b1e5f",
        "train": "1e833081ef4b",
        "valid": "051b432381ae",
        "test": "3405cb36b458",
        "users": "ea6f79495c06",
        "items": "bdfd2bb15c00",
        "batch": "edce487b294b",
    },
    "leave one out": {
        "tokens": "38ba959b1e5f",
        "train": "bb20e5ea63e2",
        "valid": "9f3de44dc64a",
        "test": "b0b55e034f86",
        "users": "ea6f79495c06",
        "items": "bdfd2bb15c00",
        "batch": "4f2d998015e4",
    },
}


@pytest.mark.parametrize(
    ("name", "eval_args"), [("random ratio", RANDOM_RATIO), ("leave one out", LEAVE_ONE_OUT)]
)
def test_ml_100k_gives_the_same_tensors_everywhere(
    tmp_path: Path, name: str, eval_args: dict[str, Any]
) -> None:
    config = build_config(
        tmp_path,
        dataset="ml-100k",  # RecBole ships it and ignores data_path for it
        eval_args=eval_args,
        rm_dup_inter="first",
        user_inter_num_interval="[40,inf)",
        load_col={
            "inter": ["user_id", "item_id", "rating", "timestamp"],
            "user": ["user_id", "age", "gender"],
            "item": ["item_id", "release_year", "class"],
        },
    )
    init_seed(2020, True)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    batch = next(iter(train))
    text = "\n".join(
        "\t".join(dataset.field2id_token[field]) for field in ("user_id", "item_id", "class")
    )

    def interactions(part: Any) -> str:
        feat = part.dataset.inter_feat
        return digest(feat["user_id"], feat["item_id"], feat["rating"])

    users, items = dataset.user_feat, dataset.item_feat
    assert {
        "tokens": digest(np.frombuffer(text.encode(), dtype=np.uint8)),
        "train": interactions(train),
        "valid": interactions(valid),
        "test": interactions(test),
        "users": digest(users["user_id"], users["age"], users["gender"]),
        "items": digest(items["item_id"], items["release_year"], items["class"]),
        "batch": digest(batch["user_id"], batch["item_id"], batch["neg_item_id"], batch["rating"]),
    } == ML_100K[name]
