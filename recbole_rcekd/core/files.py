"""Files that are written whole or not at all: to a temporary name, which is then renamed.

So no process reads half a file, and two commands may write to one folder.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file to write to, which replaces ``file`` if the block succeeds.

    If the block fails, or writes nothing, ``file`` stays as it was.

    Args:
        file: the file to replace; its folder is made if it does not exist.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a.txt") as beside:
        ...     _ = beside.write_text("whole")
        >>> [path.name for path in folder.iterdir()]
        ['a.txt']
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{uuid.uuid4().hex[:6]}.partial")
    try:
        yield beside
        if beside.exists():
            os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Write content that JSON can hold, whole or not at all."""
    write_whole(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
