"""What a training run says of itself: a table to plot, and TensorBoard's files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeseg.errors import WeightsError

__all__ = ["TrainLog"]

_COLUMNS = ("step", "seconds", "name", "value")


class TrainLog:
    """``scalars.csv`` in ``folder``, and TensorBoard's event files where it is installed.

    A row of the table is one number: ``step``, ``seconds`` since the run began, ``name``,
    ``value``. A run that goes on from ``first_step`` keeps the rows up to there and drops what was
    written of steps that it does again. Use as a context manager. WeightsError when the folder
    cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / "scalars.csv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = _rows_before(self._path, first_step) if first_step else []
            self._file = self._path.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise WeightsError(
                f"the log folder {folder} cannot be written ({error.strerror})"
            ) from error
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(_COLUMNS)
        self._rows.writerows(kept)
        self._board = _board(folder, first_step)

    @property
    def has_board(self) -> bool:
        """Whether TensorBoard's files are written as well."""
        return self._board is not None

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """One row for each of ``values``, on the disk when this returns."""
        for name, value in values.items():
            self._rows.writerow((step, f"{seconds:.1f}", name, f"{value:.6g}"))
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        self._file.flush()

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _rows_before(path: Path, first_step: int) -> list[list[str]]:
    """The whole rows of a table up to ``first_step``; a run may have ended in the middle of one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(io.StringIO(whole)))[1:]
    return [row for row in rows if len(row) == len(_COLUMNS) and int(row[0]) <= first_step]


def _board(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What an earlier run wrote of the steps from here on is not shown.
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
