"""Arrays on disk that are written whole or not at all.

An entry is a folder of plain ``.npy`` files with a JSON manifest of their checksums. It is written
to a temporary folder, which is renamed when complete. So no process reads half an entry, and two
processes may write at the same time. Nothing is pickled. A damaged or partial entry, or one of
another format, is never read: it is reported and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
_MANIFEST = "manifest.json"
_ATTEMPTS = 100
# The errors of reading an entry that is damaged, partial or of another format.
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
Array = np.ndarray[Any, Any]


class Store:
    """A folder of entries.

    Args:
        root: the folder; made on the first write. Its name should identify what made the entries (a
            content hash).
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def read(self, name: str, mmap: bool = False) -> dict[str, Array] | None:
        """The arrays of an entry, or ``None`` if there is no entry or it is not usable.

        A warning says why an entry is not usable.

        Args:
            name: the name of the entry.
            mmap: map the arrays into memory instead of loading them.
        """
        folder = self.root / name
        if not folder.exists():
            return None
        try:
            return {
                Path(file).stem: np.load(
                    folder / file, mmap_mode="r" if mmap else None, allow_pickle=False
                )
                for file in self._checked_files(folder)
            }
        except _UNUSABLE as error:
            getLogger().warning(
                f"Cached teacher scores in [{folder}] are not used and made again: {error}."
            )
            return None

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary folder for the ``.npy`` files of an entry.

        It becomes the entry if the block succeeds.
        """
        scratch = self.root / f".{name}-{uuid.uuid4().hex}"
        scratch.mkdir(parents=True)
        try:
            yield scratch
            files = {path.name: file_checksum(path) for path in sorted(scratch.glob("*.npy"))}
            manifest = {"format": FORMAT, "made_by": self.root.name, "files": files}
            (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            self._put_in_place(scratch, self.root / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def write(self, name: str, arrays: dict[str, Array]) -> None:
        """Write an entry of arrays that are in memory.

        Raises:
            OSError: it cannot be written, for example because the disk is full; no part of it
                remains.
        """
        with self.writing(name) as folder:
            for key, array in arrays.items():
                np.save(folder / f"{key}.npy", array, allow_pickle=False)

    def _checked_files(self, folder: Path) -> list[str]:
        """The names of the files of an entry; raises one of ``_UNUSABLE`` if it is not usable."""
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"it has format version {manifest['format']}, this package reads {FORMAT}"
            )
        if manifest["made_by"] != self.root.name:
            raise ValueError("it was made by another teacher")
        for file, checksum in manifest["files"].items():
            if file_checksum(folder / file) != checksum:
                raise ValueError(f"{file} is damaged")
        return list(manifest["files"])

    def _put_in_place(self, scratch: Path, place: Path) -> None:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(OSError):
                os.rename(scratch, place)
                return
            # There is an entry already. If it is whole, another process was faster: it has the same
            # content, and may be in use. If not, ours replaces it.
            with contextlib.suppress(*_UNUSABLE):
                self._checked_files(place)
                return
            old = place.with_name(f".old-{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):
                os.rename(place, old)
                shutil.rmtree(old, ignore_errors=True)
        os.rename(scratch, place)


def file_checksum(path: Path) -> str:
    """A hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
