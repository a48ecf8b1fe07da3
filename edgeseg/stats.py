"""How a run is doing at one moment: its sources, its outputs, the engine, and the machine."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgeseg.ledger import Summary
from edgeseg.source import Status, Tally

if TYPE_CHECKING:
    # What they are is made elsewhere; a run without outputs or sensors imports neither.
    from edgeseg.sensors import Reading
    from edgeseg.sink.outlet import OutletStats

__all__ = ["SourceStats", "Stats"]


@dataclass(frozen=True)
class SourceStats:
    """How one source is doing, and its frames on their way to masks.

    ``uri`` is without a password. ``size``: (height, width) of its latest frame, None before the
    first where nothing states it. ``fps``: finished masks per second over the last five seconds,
    0.0 when there were none. ``summary``: the whole run. ``superseded``: finished masks that the
    caller was too slow to take. ``error``: what ended it, if it broke.
    """

    name: str
    uri: str
    status: Status
    tally: Tally
    size: tuple[int, int] | None
    fps: float
    summary: Summary
    superseded: int
    error: str | None

    def to_dict(self) -> dict[str, object]:
        """For JSON: ``{"name", "uri", "status", "tally", "size", "fps", "summary", …}``.

        ``status`` is ``{"state", "reason", "for_s"}``: seconds it has lasted when this is called,
        since a monotonic time means nothing to another machine.
        """
        for_s = (time.monotonic_ns() - self.status.since_ns) / 1e9
        return {
            "name": self.name,
            "uri": self.uri,
            "status": {"state": self.status.state, "reason": self.status.reason, "for_s": for_s},
            "tally": asdict(self.tally),
            "size": None if self.size is None else list(self.size),
            "fps": self.fps,
            "summary": self.summary.to_dict(),
            "superseded": self.superseded,
            "error": self.error,
        }


@dataclass(frozen=True)
class Stats:
    """One moment of a run; `Streams.stats` makes it.

    ``engine`` and ``description`` are the engine's, ``network_size`` is (height, width).
    ``uptime_s``: since the run was started, until it ended. ``in_engine_s``: how long the oldest
    frame has been inside the engine, 0 when there is none. ``threads``: names of the living threads
    of this run; none after it was closed, unless one hangs in a driver. ``reading``: what the
    machine's sensors say, None when nobody asked them.
    """

    model: str
    engine: str
    description: str
    network_size: tuple[int, int]
    uptime_s: float
    in_engine_s: float
    threads: tuple[str, ...]
    sources: tuple[SourceStats, ...]
    outlets: tuple[OutletStats, ...]
    reading: Reading | None

    def to_dict(self) -> dict[str, object]:
        """For JSON: the fields by name; sources, outlets and reading as they are written alone."""
        return {
            "model": self.model,
            "engine": self.engine,
            "description": self.description,
            "network_size": list(self.network_size),
            "uptime_s": self.uptime_s,
            "in_engine_s": self.in_engine_s,
            "threads": list(self.threads),
            "sources": [source.to_dict() for source in self.sources],
            "outlets": [asdict(outlet) for outlet in self.outlets],
            "reading": None if self.reading is None else self.reading.to_dict(),
        }
