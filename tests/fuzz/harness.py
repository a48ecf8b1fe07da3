"""Runs one target over thousands of mutated inputs, each from its own seed, and says how it went.

What passes: an input is taken, or refused with an `EdgeSegError`. What fails: any other exception,
more than `LIMIT_S` of processor time for one input, a hang of the clock, or memory: the process may
not grow by more than 1 GiB beyond what it had before the first input.
"""

from __future__ import annotations

import faulthandler
import resource
import sys
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from edgeseg.errors import EdgeSegError

__all__ = ["LIMIT_S", "MEMORY", "Outcome", "Target", "run"]

#: processor time that one input may take, in seconds; the worst ones take hundredths
LIMIT_S = 5.0
#: bytes that the process may take more than at the beginning
MEMORY = 1 << 30
# A machine that does other things may be slow; this is for what never ends.
_HANG_S = 300.0


class Target(ABC):
    """Something that reads bytes it cannot trust."""

    #: how it is called on the command line
    name: str

    def prepare(self) -> None:
        """Makes what is made once; called before the first input, in the same process."""
        return

    @abstractmethod
    def make(self, rng: Random) -> bytes:
        """An input, nearly right; the same for the same state of ``rng``."""

    @abstractmethod
    def read(self, data: bytes) -> None:
        """Reads ``data`` as a user's program would; EdgeSegError when it is refused."""


@dataclass(frozen=True)
class Outcome:
    """How a run went. Times are of the processor, ``grown_mb`` is the peak of resident memory."""

    target: str
    inputs: int
    taken: int
    refused: int
    failures: tuple[str, ...]
    seconds: float
    worst_s: float
    worst_input: int
    grown_mb: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def run(
    target: Target, *, inputs: int, seed: int, crashes: Path, most_failures: int = 10
) -> Outcome:
    """Inputs 0 to ``inputs`` of ``seed``; those that fail are written into ``crashes``."""
    target.prepare()
    # A first one, so that what is imported late counts as there.
    _read(target, target.make(_rng(target, seed, 0)))
    before = _peak()
    _limit_memory()
    taken = refused = worst_input = 0
    worst_s = 0.0
    failures: list[str] = []
    started = time.process_time()
    for index in range(inputs):
        data = target.make(_rng(target, seed, index))
        faulthandler.dump_traceback_later(_HANG_S, exit=True)
        began = time.process_time()
        problem = _read(target, data)
        took = time.process_time() - began
        faulthandler.cancel_dump_traceback_later()
        if took > worst_s:
            worst_s, worst_input = took, index
        if took > LIMIT_S:
            problem = f"{took:.1f} s of processor time"
        if problem is None:
            taken += 1
        elif problem == "":
            refused += 1
        else:
            failures.append(_kept(target, data, index, problem, crashes))
            if len(failures) >= most_failures:
                break
    return Outcome(
        target=target.name,
        inputs=index + 1 if inputs else 0,
        taken=taken,
        refused=refused,
        failures=tuple(failures),
        seconds=round(time.process_time() - started, 1),
        worst_s=round(worst_s, 4),
        worst_input=worst_input,
        grown_mb=round((_peak() - before) / 1e6, 1),
    )


def repeat(target: Target, data: bytes) -> None:
    """Reads one input again, and lets what it raises through."""
    target.prepare()
    _limit_memory()
    try:
        target.read(data)
    except EdgeSegError as error:
        print(f"refused: {type(error).__name__}: {error}")
    else:
        print("taken")


def _rng(target: Target, seed: int, index: int) -> Random:
    return Random(f"{target.name}-{seed}-{index}")


def _read(target: Target, data: bytes) -> str | None:
    """None when ``data`` is taken, empty when it is refused, otherwise what went wrong."""
    try:
        target.read(data)
    except EdgeSegError:
        return ""
    except Exception:
        return traceback.format_exc()
    return None


def _kept(target: Target, data: bytes, index: int, problem: str, crashes: Path) -> str:
    crashes.mkdir(parents=True, exist_ok=True)
    path = crashes / f"{target.name}-{index}.bin"
    path.write_bytes(data)
    text = (
        f"{target.name}, input {index}: {problem.strip()}\n"
        f"again: {sys.executable} -m tests.fuzz {target.name} --file {path}"
    )
    print(text, file=sys.stderr, flush=True)
    return text


def _peak() -> int:
    """Bytes of resident memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
