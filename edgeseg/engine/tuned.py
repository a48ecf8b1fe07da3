"""What `edgeseg profile --sweep` found to be fastest on a machine, kept beside the plans.

::

    street/engines/tuned.json

One entry for each machine, engine, version of the engine, and graph: all four have to be the same
for an entry to count, so that a bundle that goes to another board takes nothing along. It is no
part of the bundle: ``bundle.json`` neither names nor hashes it. A bundle that ships with EdgeSeg,
or is read-only, has it in the user's cache, see `edgeseg.engine.plan`.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.engine.plan import plan_folder, plan_folders, write_whole

__all__ = ["Machine", "Tuned", "find_tuned", "save_tuned"]

_FILE = "tuned.json"
_FORMAT = 1
# Larger than that is none of ours.
_LARGEST = 1_000_000


@dataclass(frozen=True)
class Machine:
    """What a measured number of threads holds for: processor, its cores that may be used."""

    cpu: str
    cores: int

    @classmethod
    def here(cls, cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
        """This one."""
        return cls(_processor(cpuinfo), kernels.available_cores())


@dataclass(frozen=True)
class Tuned:
    """The fastest setting of one graph on one machine and engine.

    ``version``: of the engine's library. ``model_sha256``: of the ONNX file. ``fps``: what it
    reached there, for people.
    """

    machine: Machine
    engine: str
    version: str
    model_sha256: str
    threads: int
    fps: float

    def is_for(self, other: Tuned) -> bool:
        """Whether both are of the same machine, engine and graph."""
        return (self.machine, self.engine, self.version, self.model_sha256) == (
            other.machine,
            other.engine,
            other.version,
            other.model_sha256,
        )


def find_tuned(bundle: Bundle, engine: str, version: str) -> Tuned | None:
    """What was found for ``bundle`` on this machine and engine; None when nothing was.

    A file that is damaged, or of another EdgeSeg, counts as none: it holds nothing but a
    preference.
    """
    for folder in plan_folders(bundle):
        entries = list(_read(folder / _FILE))
        if not entries:
            continue
        sha256 = hashlib.sha256(bundle.model.content).hexdigest()
        wanted = Tuned(Machine.here(), engine, version, sha256, 0, 0.0)
        for entry in entries:
            if entry.is_for(wanted):
                return entry
    return None


def save_tuned(bundle: Bundle, engine: str, version: str, *, threads: int, fps: float) -> Path:
    """Writes the setting to where `find_tuned` looks; returns the file.

    Entries of other machines and engines stay. EngineError when nothing can be written.
    """
    sha256 = hashlib.sha256(bundle.model.content).hexdigest()
    new = Tuned(Machine.here(), engine, version, sha256, threads, round(fps, 2))
    path = plan_folder(bundle) / _FILE
    entries = [entry for entry in _read(path) if not entry.is_for(new)]
    content = {"format": _FORMAT, "entries": [asdict(entry) for entry in (*entries, new)]}
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def _read(path: Path) -> Iterator[Tuned]:
    """The entries of a file that can be understood."""
    try:
        if path.stat().st_size > _LARGEST:
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["entries"] if content["format"] == _FORMAT else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for entry in entries if isinstance(entries, list) else []:
        with suppress(KeyError, TypeError, ValueError, OverflowError):
            yield _tuned(entry)


def _tuned(entry: Mapping[str, Any]) -> Tuned:
    threads = int(entry["threads"])
    if not 1 <= threads <= 1024:
        raise ValueError(threads)
    machine = entry["machine"]
    return Tuned(
        Machine(str(machine["cpu"]), int(machine["cores"])),
        str(entry["engine"]),
        str(entry["version"]),
        str(entry["model_sha256"]),
        threads,
        float(entry["fps"]),
    )


def _processor(cpuinfo: Path) -> str:
    """The processor's name; on a board whose kernel tells none, the parts that it tells."""
    lines = []
    with suppress(OSError):
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    told: dict[str, set[str]] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), set()).add(value.strip())
    for key in ("model name", "Model"):
        if key in told:
            return " + ".join(sorted(told[key]))
    # Arm: a number for the designer and one for each kind of core.
    arm = [
        f"{key} {'/'.join(sorted(told[key]))}"
        for key in ("CPU implementer", "CPU part")
        if key in told
    ]
    return ", ".join(arm) or platform.processor() or platform.machine()
