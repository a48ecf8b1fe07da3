"""The newest result of one source, on its way from the pipeline's thread to the web page's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

from edgeseg.errors import SinkError
from edgeseg.result import Result
from edgeseg.serve.recordings import Recording
from edgeseg.sink import Sink

__all__ = ["HISTORY_S", "Feed", "Second"]

#: seconds that a chart goes back
HISTORY_S = 300
# Ages kept of one second, of which the median is made.
_MOST_AGES = 1000


@dataclass(frozen=True)
class Second:
    """One second of a source's past.

    ``at``: whole seconds of ``time.monotonic()``. ``masks``: how many came in it. ``age_ms``: the
    median of their ages, capture to mask, None when there were none.
    """

    at: int
    masks: int
    age_ms: float | None


class Feed(Sink):
    """A sink that keeps the newest result of one source, for whoever looks.

    `write` takes microseconds, whatever the viewers do: it keeps the result, counts it, and hands
    it to a recording that may be running (see `Recording.offer`, which does not wait either). It
    is the pipeline's; all else here is for the event loop's thread.
    """

    def __init__(self, name: str, *, fps: float | None = None) -> None:
        self._name = name
        self._fps = fps
        # Replaced as a whole, so that a result and its number belong together in any thread.
        self._newest: tuple[int, Result] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: asyncio.Event | None = None
        self._wanted = False
        self._recording: Recording | None = None
        self._lock = threading.Lock()
        self._past: deque[Second] = deque(maxlen=HISTORY_S)
        self._second = int(time.monotonic())
        self._masks = 0
        self._ages: list[float] = []

    @property
    def name(self) -> str:
        """Of its source."""
        return self._name

    @property
    def fps(self) -> float | None:
        """Frames per second that the source states, None if it states none."""
        return self._fps

    @fps.setter
    def fps(self, value: float | None) -> None:
        self._fps = value

    @property
    def newest(self) -> tuple[int, Result] | None:
        """How many results came, and the newest of them; None before the first."""
        return self._newest

    @property
    def recording(self) -> Recording | None:
        """What records it now."""
        return self._recording

    @recording.setter
    def recording(self, value: Recording | None) -> None:
        self._recording = value

    def write(self, result: Result) -> None:
        """Keeps the result; never waits."""
        now = int(time.monotonic())
        with self._lock:
            self._turn(now)
            self._masks += 1
            if len(self._ages) < _MOST_AGES:
                self._ages.append(result.age_ms)
        before = self._newest
        self._newest = (1 if before is None else before[0] + 1, result)
        recording = self._recording
        if recording is not None:
            # It may have been finished a moment ago.
            with suppress(SinkError):
                recording.offer(result)
        if self._wanted:
            self._wanted = False
            loop, arrived = self._loop, self._arrived
            if loop is not None and arrived is not None:
                # The loop may have ended a moment ago.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(arrived.set)

    def attach(self) -> None:
        """Makes the running event loop the one that `newer` waits in."""
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()

    async def newer(self, version: int) -> tuple[int, Result]:
        """The newest result and its number, waited for until that is above ``version``."""
        assert self._arrived is not None
        while True:
            self._arrived.clear()
            # Only from here on is the loop woken: a pipeline that nobody waits for is left alone.
            self._wanted = True
            newest = self._newest
            if newest is not None and newest[0] > version:
                return newest
            await self._arrived.wait()

    def past(self, after: int) -> list[Second]:
        """The seconds that are over, later than ``after``, oldest first; five minutes at most."""
        now = int(time.monotonic())
        with self._lock:
            self._turn(now)
            return [second for second in self._past if second.at > after]

    def _turn(self, now: int) -> None:
        """Puts the seconds before ``now`` into the past; call it with the lock held."""
        if now <= self._second:
            return
        age = median(self._ages) if self._ages else None
        self._past.append(Second(self._second, self._masks, age))
        # Those in which nothing came are part of the past too.
        for quiet in range(max(self._second + 1, now - HISTORY_S), now):
            self._past.append(Second(quiet, 0, None))
        self._second, self._masks, self._ages = now, 0, []
