"""RecBole's checkpoints open; anything else in a file is refused in one sentence, not executed."""

from __future__ import annotations

import builtins
import importlib
import io
import os
import pickle
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from recbole_rcekd.core.errors import TeacherError
from recbole_rcekd.teachers.safe_load import _AllowListUnpickler, read_checkpoint
from tests.helpers import build, save_untrained, train_and_save, write_dataset, write_knowledge

# isort: split
from recbole.config import Config
from recbole.model.general_recommender import BPR
from recbole.utils import ModelType

# Sparse factor tables, evaluation leftovers, scipy matrices, numpy arrays, counts: all that
# RecBole's checkpoints hold.
MODELS = (
    "BPR",
    "LightGCN",
    "DMF",
    "NeuMF",
    "CKE",
    "Pop",
    "ItemKNN",
    "AsymKNN",
    "EASE",
    "SLIMElastic",
    "ADMMSLIM",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and one trained checkpoint of each model, `<model>.pth`."""
    folder = write_dataset(tmp_path_factory.mktemp("checkpoint"))
    write_knowledge(folder)
    for model in MODELS:
        train_and_save(build(folder, model, epochs=1), folder / f"{model}.pth")
    return folder


def same(a: Any, b: Any) -> bool:
    """Equal in type and content, all the way down."""
    if type(a) is not type(b):
        # A class that a Config mentions comes back as its name.
        return (
            isinstance(a, type)
            and isinstance(b, type)
            and (a.__name__, a.__module__) == (b.__name__, b.__module__)
        )
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if scipy.sparse.issparse(a):
        return bool(a.shape == b.shape and a.dtype == b.dtype and (a != b).nnz == 0)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Config):
        return same(vars(a), vars(b))
    if isinstance(a, type):
        return (a.__name__, a.__module__) == (b.__name__, b.__module__)
    return bool(a == b)


@pytest.mark.parametrize("model", MODELS)
def test_own_checkpoints_open(folder: Path, model: str) -> None:
    path = folder / f"{model}.pth"
    read = read_checkpoint(path)
    trusted = torch.load(path, map_location="cpu", weights_only=False)
    assert type(read["config"]) is Config
    assert read["config"]["model"] == model
    assert read["config"]["MODEL_TYPE"] is trusted["config"]["MODEL_TYPE"]
    assert read.keys() == trusted.keys()
    for key in trusted:
        assert same(read[key], trusted[key]), key
    assert same(read_checkpoint(path, trust=True), trusted)


def test_checkpoints_hold_what_the_models_say(folder: Path) -> None:
    """So that the test above does not compare nothing with nothing."""
    assert scipy.sparse.issparse(
        read_checkpoint(folder / "ItemKNN.pth")["other_parameter"]["pred_mat"]
    )
    assert isinstance(
        read_checkpoint(folder / "EASE.pth")["other_parameter"]["item_similarity"], np.ndarray
    )
    assert isinstance(
        read_checkpoint(folder / "LightGCN.pth")["other_parameter"]["restore_user_e"], torch.Tensor
    )
    assert read_checkpoint(folder / "BPR.pth")["state_dict"]["user_embedding.weight"].shape == (
        41,
        64,
    )


class Call:
    """Pickles as a call of `function` with `args`, as an attacker writes it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args

    def __call__(self) -> None:
        """A pickle may call the result of a call; `pickle` only checks that it is callable."""
        raise AssertionError


def look_up(owner: Any, name: str) -> Call:
    return Call(getattr, owner, name)


def by_attributes(sentinel: Path) -> Call:
    """The usual way around a list of names: attributes lead from a harmless name to `os.system`."""
    names = look_up(look_up(Config, "__init__"), "__globals__")
    return Call(look_up(Call(look_up(names, "get"), "os"), "system"), f"touch '{sentinel}'")


Attack = Callable[[Path], Any]
# Each leaves the sentinel file behind if the file is opened without care.
ATTACKS: dict[str, tuple[Attack, str]] = {
    "os.system": (lambda sentinel: Call(os.system, f"touch '{sentinel}'"), r"posix\.system"),
    "subprocess": (
        lambda sentinel: Call(subprocess.call, ["touch", str(sentinel)]),
        r"subprocess\.call",
    ),
    "eval": (
        lambda sentinel: Call(eval, f"open({str(sentinel)!r}, 'w').close()"),
        r"builtins\.eval",
    ),
    "exec": (
        lambda sentinel: Call(exec, f"open({str(sentinel)!r}, 'w').close()"),
        r"builtins\.exec",
    ),
    "open": (lambda sentinel: Call(open, str(sentinel), "w"), r"(io|_io)\.open"),
    "mkdir": (lambda sentinel: Call(os.mkdir, str(sentinel)), r"posix\.mkdir"),
    "getattr": (by_attributes, "looks up an attribute"),
    # RecBole's Config evaluates the strings that it is given.
    "Config": (
        lambda sentinel: Call(
            Config, "BPR", "tiny", None, {"x": f"open({str(sentinel)!r}, 'w').close()"}
        ),
        r"call.*Config",
    ),
}


def poisoned(folder: Path, place: str, payload: Any, path: Path) -> Path:
    content = torch.load(folder / "BPR.pth", weights_only=False)
    if place == "config":
        content["config"] = payload
    elif place == "a setting":
        content["config"].final_config_dict["epochs"] = payload
    elif place == "other_parameter":
        content["other_parameter"] = {"x": payload}
    else:
        content[place] = payload
    torch.save(content, path, pickle_protocol=4)
    return path


@pytest.mark.parametrize(
    "place", ["config", "a setting", "other_parameter", "state_dict", "an extra key"]
)
@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_content_is_refused_and_not_run(
    folder: Path, tmp_path: Path, attack: str, place: str
) -> None:
    sentinel = tmp_path / "sentinel"
    make, words = ATTACKS[attack]
    path = poisoned(folder, place, make(sentinel), tmp_path / "x.pth")
    with pytest.raises(TeacherError, match=words) as caught:
        read_checkpoint(path)
    assert not sentinel.exists()
    message = str(caught.value)
    assert message.startswith(f"[{path}] was not read, because ")
    assert "teacher_trust: True" in message


@pytest.mark.parametrize("attack", ATTACKS)
def test_trusted_files_run_what_they_contain(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sentinel = tmp_path / "sentinel"
    path = poisoned(folder, "an extra key", ATTACKS[attack][0](sentinel), tmp_path / "x.pth")
    content = read_checkpoint(path, trust=True)
    assert sentinel.exists()  # the payloads above are live
    assert content["config"]["model"] == "BPR"


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (Call(BPR, {}, {}), r"call recbole\.model\.general_recommender\.bpr\.BPR"),
        (Call(getattr, builtins, "eval"), "needs"),
        (Call(getattr, ModelType, "__subclasses__"), "attribute"),
        (Call(getattr, "text", "upper"), "attribute"),
        (Call(importlib.import_module, "antigravity"), r"importlib\.import_module"),
        (Call(torch.hub.load, "someone/something"), r"torch\.hub\.load"),
        (Call(np.load, "other.npy"), r"numpy.*load"),
    ],
    ids=[
        "model class",
        "getattr module",
        "getattr enum",
        "getattr str",
        "import",
        "torch.hub",
        "numpy.load",
    ],
)
def test_ways_around_are_refused(folder: Path, tmp_path: Path, payload: Any, words: str) -> None:
    if words == "needs":  # a module cannot be pickled: its loader can
        payload = Call(getattr, importlib.import_module, "__globals__")
    path = poisoned(folder, "an extra key", payload, tmp_path / "x.pth")
    with pytest.raises(TeacherError, match=words):
        read_checkpoint(path)


def test_mentioned_classes_stay_names(folder: Path, tmp_path: Path) -> None:
    """A Config mentions classes; they are not imported and cannot be made."""
    content = read_checkpoint(poisoned(folder, "an extra key", BPR, tmp_path / "x.pth"))
    mentioned = content["an extra key"]
    assert mentioned is not BPR
    assert (mentioned.__module__, mentioned.__name__) == (
        "recbole.model.general_recommender.bpr",
        "BPR",
    )


def test_torchscript_archive_is_not_handed_to_the_jit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.load` runs the code of such an archive, whatever the unpickler is."""
    path = tmp_path / "script.pth"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    loaded: list[Any] = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: loaded.append(args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TeacherError, match="the file is a TorchScript program"):
            read_checkpoint(path)
    assert not loaded


def nothing(path: Path, good: bytes) -> None:
    pass


def directory(path: Path, good: bytes) -> None:
    path.mkdir()


def empty(path: Path, good: bytes) -> None:
    path.touch()


def truncated(path: Path, good: bytes) -> None:
    path.write_bytes(good[: len(good) // 2])


def noise(path: Path, good: bytes) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def other_zip(path: Path, good: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


def garbled(path: Path, good: bytes) -> None:
    """A whole archive whose pickle was cut off."""
    path.write_bytes(good)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(
                name, content[: len(content) // 2] if name.endswith("data.pkl") else content
            )


def saved(content: Any) -> Callable[[Path, bytes], None]:
    def write(path: Path, good: bytes) -> None:
        torch.save(content, path)

    write.__name__ = f"saved_{type(content).__name__}"
    return write


TENSORS = {"weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nothing, r"There is no checkpoint at \["),
        (directory, r"There is no checkpoint at \["),
        (empty, "is not a checkpoint, or was cut off"),
        (truncated, "is not a checkpoint, or was cut off"),
        (noise, "is not a checkpoint, or was cut off"),
        (other_zip, "is damaged or not a RecBole checkpoint"),
        (garbled, "is damaged or not a RecBole checkpoint"),
        (saved(TENSORS), r"is not a RecBole checkpoint: it lacks \[config\] or \[state_dict\]"),
        (saved([TENSORS]), r"is not a RecBole checkpoint: it lacks \[config\] or \[state_dict\]"),
        (saved({"config": {}, "state_dict": 3}), r"its \[state_dict\] is no dict of tensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("trust", [False, True])
def test_files_that_are_no_checkpoints(
    folder: Path, tmp_path: Path, spoil: Callable[[Path, bytes], None], words: str, trust: bool
) -> None:
    path = tmp_path / "x.pth"
    spoil(path, (folder / "BPR.pth").read_bytes())
    with pytest.raises(TeacherError, match=words) as caught:
        read_checkpoint(path, trust=trust)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith((".", ")."))
    assert "\n" not in message
    assert "teacher_trust" not in message  # trusting it would not help


def test_checkpoint_of_a_gpu_opens_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    """The device is in the file twice: with the Config and with each tensor."""
    bundle = build(folder, "BPR")
    bundle.config["device"] = torch.device("cuda", 1)
    model = save_untrained(bundle._replace(config=build(folder, "BPR").config), tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=False)
    content["config"] = bundle.config
    torch.save(content, tmp_path / "x.pth", pickle_protocol=4)
    read = read_checkpoint(tmp_path / "x.pth")
    assert read["config"]["device"] == torch.device("cuda", 1)
    assert torch.equal(read["state_dict"]["user_embedding.weight"], model.user_embedding.weight)


def test_a_class_is_not_changed() -> None:
    """Pickle sets attributes of any object, also of a class; then every matrix would have them."""
    before = vars(scipy.sparse.csr_matrix).copy()
    attributes = b"}X\x05\x00\x00\x00tocoocbuiltins\ndict\ns"
    spoiled = b"\x80\x02cscipy.sparse._csr\ncsr_matrix\nN" + attributes + b"\x86b."
    with pytest.raises(pickle.UnpicklingError, match="the file changes a class"):
        _AllowListUnpickler(io.BytesIO(spoiled)).load()
    assert vars(scipy.sparse.csr_matrix) == before
