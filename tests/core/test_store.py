"""Entries on disk are whole or do not exist, whatever writes, reads or damages them."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_rcekd.core.store import FORMAT, Store

ARRAYS = {
    "users": np.arange(6.0, dtype=np.float32).reshape(3, 2),
    "items": np.arange(4, dtype=np.int32),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one entry, `x`."""
    store = Store(tmp_path / "teacher-a")
    store.write("x", ARRAYS)
    return store


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(store: Store, mmap: bool) -> None:
    found = store.read("x", mmap)
    assert found is not None
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert isinstance(found[name], np.memmap) is mmap


def test_files_are_plain(store: Store) -> None:
    assert contents(store.root) == ["x", "x/items.npy", "x/manifest.json", "x/users.npy"]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(
            np.load(store.root / "x" / f"{name}.npy", allow_pickle=False), array
        )
    manifest = json.loads((store.root / "x" / "manifest.json").read_text())
    assert manifest["format"] == FORMAT
    assert manifest["made_by"] == "teacher-a"
    assert set(manifest["files"]) == {"items.npy", "users.npy"}


def test_objects_are_not_pickled(store: Store) -> None:
    with pytest.raises(ValueError, match="allow_pickle=False"):
        store.write("y", {"ids": np.array([{}, None], dtype=object)})
    assert store.read("y") is None
    assert contents(store.root) == ["x", "x/items.npy", "x/manifest.json", "x/users.npy"]


def test_pickled_objects_are_not_read(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Even if the checksums are right."""
    with store.writing("y") as folder:
        np.save(folder / "ids.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    assert store.read("y") is None
    assert "allow_pickle=False" in caplog.text


def test_missing_entry_is_no_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    assert store.read("y") is None
    assert Store(store.root / "nowhere").read("x") is None
    assert not caplog.records


def change_byte(folder: Path) -> None:
    path = folder / "users.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(folder: Path) -> None:
    path = folder / "items.npy"
    path.write_bytes(path.read_bytes()[:-4])


def remove_array(folder: Path) -> None:
    (folder / "users.npy").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def change_manifest(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


def write_manifest(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "manifest.json").write_text(text)

    return write


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "changed byte": (change_byte, "users.npy is damaged"),
    "cut off": (cut_off, "items.npy is damaged"),
    "lost array": (remove_array, "users.npy"),
    "lost manifest": (remove_manifest, "manifest.json"),
    "other format": (
        change_manifest("format", FORMAT + 1),
        f"it has format version {FORMAT + 1}, this package reads",
    ),
    "other teacher": (change_manifest("made_by", "teacher-b"), "it was made by another teacher"),
    "files no dict": (change_manifest("files", ["users.npy"]), "items"),
    "cut-off manifest": (write_manifest('{"format": 1, "ma'), "Unterminated string"),
    "manifest no dict": (write_manifest("[1]"), "indices"),
    "empty manifest": (write_manifest("{}"), "format"),
    "a file": (replace_by_file, "Not a directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_and_mended(
    store: Store, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(store.root / "x")
    assert store.read("x") is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        f"Cached teacher scores in [{store.root / 'x'}] are not used and made again: "
    )
    assert reason in record.getMessage()

    if damage == "a file":
        (store.root / "x").unlink()
    store.write("x", ARRAYS)
    found = store.read("x")
    assert found is not None
    np.testing.assert_array_equal(found["users"], ARRAYS["users"])
    assert contents(store.root) == ["x", "x/items.npy", "x/manifest.json", "x/users.npy"]


def test_entry_of_another_teacher_is_refused(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(store.root, store.root.with_name("teacher-b"))
    assert Store(store.root.with_name("teacher-b")).read("x") is None
    assert "it was made by another teacher" in caplog.text


def test_scratch_is_never_read_and_removed_on_failure(store: Store) -> None:
    class Interrupted(BaseException):
        pass

    def half_done() -> None:
        with store.writing("y") as scratch:
            np.save(scratch / "ids.npy", np.arange(3))
            assert store.read("y") is None
            assert scratch.parent == store.root
            assert scratch.name.startswith(".")
            raise Interrupted

    with pytest.raises(Interrupted):
        half_done()
    assert contents(store.root) == ["x", "x/items.npy", "x/manifest.json", "x/users.npy"]


def test_scratch_of_a_killed_process_is_not_read(store: Store) -> None:
    (store.root / "x").rename(store.root / ".x-123")
    (store.root / ".x-123" / "manifest.json").unlink()
    assert store.read("x") is None


def test_full_disk_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(path: Path, array: Any, **kwargs: Any) -> None:
        path.write_bytes(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match="No space left"):
        store.write("y", ARRAYS)
    assert contents(store.root) == ["x", "x/items.npy", "x/manifest.json", "x/users.npy"]


def test_whole_entry_is_kept_when_another_writer_was_faster(store: Store) -> None:
    """A process that has mapped its arrays can go on."""
    before = (store.root / "x" / "users.npy").stat().st_ino
    store.write("x", ARRAYS)
    assert (store.root / "x" / "users.npy").stat().st_ino == before


def test_damaged_entry_moved_away_by_another_writer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our check and our move."""
    change_byte(store.root / "x")
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        if source == store.root / "x":
            shutil.rmtree(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    store.write("x", ARRAYS)
    assert store.read("x") is not None


@pytest.mark.parametrize("damaged", [False, True])
def test_writers_at_once(tmp_path: Path, damaged: bool) -> None:
    """Four writers start together, many times: none fails, and one whole entry is left."""
    n_writers, rounds = 4, 25
    store = Store(tmp_path / "teacher")
    barrier = threading.Barrier(n_writers)
    failures: list[BaseException] = []

    if damaged:
        for number in range(rounds):
            store.write(f"x{number}", ARRAYS)
            change_byte(store.root / f"x{number}")

    def write() -> None:
        try:
            for number in range(rounds):
                barrier.wait()
                store.write(f"x{number}", ARRAYS)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    writers = [threading.Thread(target=write) for _ in range(n_writers)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failures
    for number in range(rounds):
        found = store.read(f"x{number}")
        assert found is not None
        np.testing.assert_array_equal(found["users"], ARRAYS["users"])
    assert not [name for name in contents(store.root) if name.startswith(".")]
