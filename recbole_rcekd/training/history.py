"""The course of one run: a row per epoch, readable at any moment."""

from __future__ import annotations

import csv
from pathlib import Path

from recbole_rcekd.core.files import replacing


class History:
    """Rows of named numbers; written whole to a CSV file after every epoch, so that an interrupted run keeps them.

    Attributes:
        file: where it is written; ``None``: nowhere.
        rows: one dict per epoch.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.rows: list[dict[str, float]] = []

    def begin(self, epoch: int) -> None:
        """Start the row of an epoch."""
        self.rows.append({"epoch": epoch})

    def note(self, **numbers: float) -> None:
        """Add numbers to the current row and write the file."""
        if not self.rows:
            return
        self.rows[-1].update(numbers)
        if self.file is None:
            return
        # Epochs without validation lack its columns: the header is the union, in order of
        # appearance.
        header = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.file) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header)
            writer.writeheader()
            writer.writerows({k: format(v, ".6g") for k, v in row.items()} for row in self.rows)
