"""One view of one source, encoded once for all who watch it, and only while somebody does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from edgeseg.result import Result
from edgeseg.serve.feed import Feed

__all__ = ["Broadcast", "Picture"]

Encode = Callable[[Result], Awaitable[bytes]]


@dataclass(frozen=True)
class Picture:
    """An encoded picture: the ``version`` of its feed, and the number of its frame."""

    version: int
    index: int
    data: bytes


class Broadcast:
    """Pictures of a feed for any number of viewers; lives in the event loop's thread.

    A picture is encoded when at least one viewer waits for one, from the newest result at that
    moment, at most as often per second as the fastest viewer wants; all viewers share it. One who
    is slow misses pictures, and neither the others nor the pipeline notice. Without viewers
    nothing runs.
    """

    def __init__(self, feed: Feed, encode: Encode) -> None:
        self._feed = feed
        self._encode = encode
        self._rates: dict[object, float] = {}
        self._picture: Picture | None = None
        self._hungry = asyncio.Event()
        self._cooked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._encoded = 0

    @property
    def viewers(self) -> int:
        """How many watch."""
        return len(self._rates)

    @property
    def encoded(self) -> int:
        """How many pictures were encoded so far."""
        return self._encoded

    async def pictures(self, fps: float) -> AsyncGenerator[Picture, None]:
        """The newest picture each time one is asked for, ``fps`` times a second at most.

        Close it (``contextlib.aclosing``) when it is left before its end.
        """
        viewer = object()
        loop = asyncio.get_running_loop()
        self._rates[viewer] = fps
        if self._task is None:
            self._task = loop.create_task(self._produce())
        try:
            seen, due = 0, loop.time()
            while True:
                await _until(due)
                while (picture := self._picture) is None or picture.version <= seen:
                    if self._task is not None and self._task.done():
                        # Whatever ended it ends those who wait for it.
                        self._task.result()
                        return
                    self._cooked.clear()
                    self._hungry.set()
                    await self._cooked.wait()
                seen = picture.version
                # One that comes late is not made up for: pictures keep their distance.
                due = max(due + 1 / fps, loop.time() + 0.5 / fps)
                yield picture
        finally:
            del self._rates[viewer]
            if not self._rates:
                if self._task is not None:
                    self._task.cancel()
                # What the next viewer is shown should be new.
                self._task, self._picture = None, None

    async def _produce(self) -> None:
        loop = asyncio.get_running_loop()
        version, due = 0, loop.time()
        try:
            while True:
                await self._hungry.wait()
                await _until(due)
                version, result = await self._feed.newer(version)
                self._hungry.clear()
                started = loop.time()
                data = await self._encode(result)
                self._encoded += 1
                self._picture = Picture(version, result.index, data)
                # Not kept while waiting for the next: it holds a whole frame.
                del result, data
                self._cooked.set()
                rate = max(self._rates.values(), default=1.0)
                due = max(due + 1 / rate, started + 0.5 / rate)
        finally:
            self._cooked.set()


async def _until(when: float) -> None:
    wait = when - asyncio.get_running_loop().time()
    if wait > 0:
        await asyncio.sleep(wait)
