"""The history of one run: a row of numbers for each epoch."""

from __future__ import annotations

import csv
from pathlib import Path

from recbole_rcekd.core.files import replacing


class History:
    """Rows of numbers with names, one row for each epoch.

    They are written to a CSV file whenever numbers are added, so an interrupted run keeps them.

    Args:
        file: the file; ``None``: nothing is written.

    Attributes:
        file: the file, or ``None``.
        rows: one dict for each epoch.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.rows: list[dict[str, float]] = []

    def begin(self, epoch: int) -> None:
        """Start the row of an epoch."""
        self.rows.append({"epoch": epoch})

    def note(self, **numbers: float) -> None:
        """Add numbers to the row of the current epoch, and write the file."""
        if not self.rows:
            return
        self.rows[-1].update(numbers)
        if self.file is None:
            return
        # Epochs without validation do not have its columns, so the header has the columns of all
        # rows, in order of appearance.
        header = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.file) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header)
            writer.writeheader()
            writer.writerows({k: format(v, ".6g") for k, v in row.items()} for row in self.rows)
