"""What the benchmarks share: taking turns, ratios with their spread, the machine, the JSON file.

Speeds of two programs are compared round by round: in each round every candidate runs once, and
the ratio is formed inside the round. What slows the whole machine for a while (heat, a neighbour)
then slows both sides of a ratio, and the median over rounds forgets the odd one out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from edgeseg.kernels import available_cores

__all__ = [
    "Spread",
    "add_output_arguments",
    "cpu_model",
    "in_turn",
    "machine",
    "ratio",
    "say",
    "write_json",
]

_Figure = TypeVar("_Figure")


@dataclass(frozen=True)
class Spread:
    """The median of some figures, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    def text(self, digits: int) -> str:
        """``"1.72 (1.68-1.80)"``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def in_turn(
    candidates: Mapping[str, Callable[[], _Figure]],
    rounds: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[_Figure]]:
    """Runs every candidate once per round, in order; what each returned, round by round.

    Every second round goes backwards, so that no candidate always follows the same one.
    """
    found: dict[str, list[_Figure]] = {name: [] for name in candidates}
    for done in range(rounds):
        names = list(candidates)[:: 1 if done % 2 == 0 else -1]
        for name in names:
            found[name].append(candidates[name]())
        if progress is not None:
            progress(done + 1, rounds)
    return found


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """``over / under`` of each round."""
    return Spread.of(a / b for a, b in zip(over, under, strict=True))


def cpu_model() -> str:
    """Name of the processor, as its maker calls it; the architecture where nobody says."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    fields = {
        key.strip(): value.strip()
        for key, separator, value in (line.partition(":") for line in text.splitlines())
        if separator
    }
    board = Path("/proc/device-tree/model")
    if "model name" in fields:
        return fields["model name"]
    if board.is_file():
        return board.read_text(encoding="utf-8").strip("\0\n ")
    return platform.processor() or platform.machine()


def machine(packages: Iterable[str]) -> dict[str, object]:
    """What a figure depends on: processor, cores, versions, and the date. No names, no paths."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": available_cores(),
        "system": platform.system(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """``--json FILE`` and ``--quick``, which every benchmark takes."""
    parser.add_argument("--json", metavar="FILE", help="also write the figures here (- for stdout)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, one round: does it run at all?"
    )


def say(text: str) -> None:
    """One line for a person, on standard error, so that ``--json -`` stays alone on the other."""
    print(text, file=sys.stderr, flush=True)


def write_json(target: str | None, content: Mapping[str, object]) -> None:
    """Writes ``content`` to the file ``target``, to standard output for "-", nowhere for None."""
    if target is None:
        return
    text = json.dumps(content, indent=2)
    if target == "-":
        print(text)
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
