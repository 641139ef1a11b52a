"""The loss curve: one row per step, in memory and in a CSV file that a resumed run continues."""

from __future__ import annotations

import csv
import io
import logging
import os
from pathlib import Path
from typing import Any

from openmm_bg.errors import CheckpointError
from openmm_bg.training import checkpoint

logger = logging.getLogger(__name__)

COLUMNS = (
    "step", "stage", "loss", "nll", "w2", "kl", "buffer", "path", "variance", "validation_nll", "ess", "gradient_norm",
    "learning_rate", "dropped", "skipped", "seconds",
)  # fmt: skip
_INTEGERS = {"step", "dropped", "skipped"}


class History:
    """Rows of the loss curve.

    Rows reach ``losses.csv`` when a checkpoint is written; the checkpoint records the size of the file, and
    resuming cuts away what lies beyond it. Numbers are written so that they read back to the same bits.
    """

    def __init__(self, directory: Path | None) -> None:
        self.path = None if directory is None else directory / "losses.csv"
        self.rows: list[dict[str, Any]] = []
        self._written = 0  # rows already in the file
        self._size = 0  # its size, bytes

    def append(self, **values: Any) -> dict[str, Any]:
        """Add a row; columns that are not given are None."""
        row = dict.fromkeys(COLUMNS)
        row.update(values)
        self.rows.append(row)
        return row

    def flush(self) -> int:
        """Append the new rows to the file, and return its size in bytes.

        Raises
        ------
        CheckpointError
            When they cannot be written; the file is cut back to what it held.
        """
        if self.path is None:
            return 0
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if self._size == 0:
            writer.writerow(COLUMNS)
        for row in self.rows[self._written :]:
            writer.writerow(["" if row[name] is None else row[name] for name in COLUMNS])
        data = text.getvalue().encode()
        try:
            with open(self.path, "r+b" if self._size else "wb") as file:
                try:
                    file.seek(self._size)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(self._size)
                    raise
        except OSError as error:
            advice = checkpoint.advice(self.path.parent)
            raise CheckpointError(
                f"Cannot write the loss curve {self.path} ({error.strerror or error}){advice}."
            ) from error
        self._size += len(data)
        self._written = len(self.rows)
        return self._size

    def restore(self, size: int) -> None:
        """Read back the rows of a checkpoint that recorded `size` bytes, and cut away later ones."""
        if self.path is None or size == 0:
            return
        try:
            if self.path.stat().st_size < size:
                raise OSError("it is shorter than the checkpoint recorded")
            os.truncate(self.path, size)
            self.rows = read_losses(self.path)
        except (OSError, CheckpointError) as error:
            # A lost log is no reason to lose the training.
            logger.warning("The loss curve %s cannot be continued (%s); a new one begins.", self.path, error)
            self.rows, self._size, self._written = [], 0, 0
            return
        self._size, self._written = size, len(self.rows)


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``losses.csv``, typed as `History.rows` are.

    Raises
    ------
    CheckpointError
        The file is missing or not a loss curve.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [_parse(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:  # None where a row is cut off
        raise CheckpointError(f"{path} is not a readable loss curve ({error}).") from error


def _parse(row: dict[str, str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for name in COLUMNS:
        text = row[name]
        if name == "stage":
            parsed[name] = text
        elif text == "":
            parsed[name] = None
        else:
            parsed[name] = int(text) if name in _INTEGERS else float(text)
    return parsed
