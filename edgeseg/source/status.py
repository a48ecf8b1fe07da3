"""How a source is doing: its state, since when and why, and what became of its frames."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Literal

from edgeseg.errors import RequestError

__all__ = ["Backoff", "Clock", "FrameLedger", "State", "Status", "Tally"]

#: opening: not one frame yet; live: frames come; stalled: it is open and nothing comes;
#: reconnecting: it is lost and tried again; ended: no frame will come any more
State = Literal["opening", "live", "stalled", "reconnecting", "ended"]

Fate = Literal["delivered", "dropped", "damaged", "stale", "reconnects"]


@dataclass(frozen=True)
class Status:
    """A state, and since when: ``since_ns`` is a ``time.monotonic_ns()``, ``reason`` a clause."""

    state: State
    since_ns: int
    reason: str


@dataclass(frozen=True)
class Tally:
    """What became of the frames that a source was sent.

    ``delivered``: given to the reader. ``dropped``: a newer one came before the reader took it.
    ``damaged``: could not be decoded whole. ``stale``: a repeat, or not newer than one that was
    delivered. ``reconnects``: how often the source was lost and opened anew.
    """

    delivered: int = 0
    dropped: int = 0
    damaged: int = 0
    stale: int = 0
    reconnects: int = 0

    @property
    def received(self) -> int:
        """Frames that came, whatever became of them."""
        return self.delivered + self.dropped + self.damaged + self.stale


class FrameLedger:
    """The counts behind a `Tally`, and the numbers of frames; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Fate, int] = {
            "delivered": 0,
            "dropped": 0,
            "damaged": 0,
            "stale": 0,
            "reconnects": 0,
        }
        self._next = 0

    def count(self, fate: Fate, times: int = 1) -> None:
        """Adds to one of the counts."""
        with self._lock:
            self._counts[fate] += times

    def number(self) -> int:
        """The number of the next frame that came: 0, 1, 2; never the same twice."""
        with self._lock:
            self._next += 1
            return self._next - 1

    def tally(self) -> Tally:
        """The counts so far."""
        with self._lock:
            return Tally(**self._counts)


@dataclass(frozen=True)
class Backoff:
    """How long to wait before the next attempt: doubling, with jitter, up to a limit.

    Attempt n waits ``min(first_s * 2**n, longest_s)`` seconds, of which a random share of up to
    ``jitter`` is left out, so that many clients of one server do not come back all at once. The
    limit is low on purpose: a camera that is back should be seen at once, and one attempt in two
    seconds costs nobody anything.
    """

    first_s: float = 0.25
    longest_s: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.first_s <= self.longest_s and 0 <= self.jitter <= 1):
            raise RequestError(
                "a backoff has 0 < first_s <= longest_s and a jitter between 0 and 1, and "
                f"{self.first_s}, {self.longest_s} and {self.jitter} came"
            )

    def delay_s(self, attempt: int, share: float) -> float:
        """Seconds before ``attempt`` (from 0); ``share`` is a random number in [0, 1)."""
        # The exponent is bounded, because 2.0**1024 is an error and cameras stay away for months.
        longest = min(self.first_s * 2.0 ** min(attempt, 60), self.longest_s)
        return longest * (1 - self.jitter * share)


class Clock:
    """Monotonic time, and waiting; tests put their own in its place."""

    def now_ns(self) -> int:
        """``time.monotonic_ns()``."""
        return time.monotonic_ns()

    def wait(self, flag: threading.Event, seconds: float) -> bool:
        """Waits for ``flag`` at most so long; whether it is set."""
        return flag.wait(seconds)
