"""A source: where frames come from, whatever it is."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from edgeseg.frame import Frame
from edgeseg.source.status import FrameLedger, State, Status, Tally

__all__ = ["Source"]

# How many changes of state are remembered. A camera that comes and goes for months has more.
_REMEMBERED = 100

_Source = TypeVar("_Source", bound="Source")


class Source(ABC):
    """Where frames come from: iterate it once, close it when done (or use ``with``).

    One thread iterates; `close` may be called from any thread and never waits for a frame. Frames
    that were handed out belong to their receiver. `status`, `history` and `tally` may be read from
    any thread, also afterwards.
    """

    def __init__(
        self,
        uri: str,
        *,
        live: bool,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        length: int | None = None,
    ) -> None:
        self._uri = uri
        self._live = live
        self._size = size
        self._fps = fps
        self._length = length
        self._closed = threading.Event()
        self._released = False
        self._reading = threading.Lock()
        self._frames = FrameLedger()
        self._listener: Callable[[Status], None] | None = None
        # Replaced and never changed, so that other threads may read it.
        self._history: tuple[Status, ...] = ()
        self._enter("opening", "")

    @property
    def uri(self) -> str:
        """What the user asked for."""
        return self._uri

    @property
    def live(self) -> bool:
        """Whether frames come when the world makes them, so that old ones lose their worth."""
        return self._live

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the frames as far as is known; later frames may differ."""
        return self._size

    @property
    def fps(self) -> float | None:
        """Frames per second that the source states, None if it states none."""
        return self._fps

    @property
    def length(self) -> int | None:
        """Number of frames that the header or the folder promises, None if nothing does."""
        return self._length

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know afterwards, one sentence each; empty when all was well."""
        return ()

    @property
    def status(self) -> Status:
        """The state it is in, since when, and why."""
        return self._history[-1]

    @property
    def history(self) -> tuple[Status, ...]:
        """The latest states, oldest first, with the one it is in last; 100 at most."""
        return self._history

    @property
    def tally(self) -> Tally:
        """What became of the frames so far."""
        return self._frames.tally()

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """Living threads of its own, besides the one that iterates it."""
        return ()

    def listen(self, listener: Callable[[Status], None]) -> None:
        """Has ``listener`` called with each new state, in the thread that found it out."""
        self._listener = listener

    def __iter__(self) -> Iterator[Frame]:
        """Frames until the source ends or is closed; raises SourceError when it breaks."""
        while (frame := self._take()) is not None:
            yield frame
            # Not kept while waiting for the next: it holds a whole picture.
            del frame

    def close(self) -> None:
        """Ends the iteration and gives the source back; a second call does nothing.

        A read that is under way in another thread is left to finish; that thread then gives the
        source back.
        """
        self._closed.set()
        self._interrupt()
        self._release_once()

    def __enter__(self: _Source) -> _Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _read(self) -> Frame | None:
        """The next frame, None at the end; never called after, or during, ``_release``."""

    def _release(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Gives back what was opened; called once, and never during ``_read``."""

    def _interrupt(self) -> None:  # noqa: B027 - most reads are short
        """Cuts a ``_read`` short that is under way in another thread, where that can be done."""

    def _now_ns(self) -> int:
        return time.monotonic_ns()

    def _enter(self, state: State, reason: str) -> None:
        """Notes a state; one that it is in already is noted only for another reason."""
        if self._history:
            before = self._history[-1]
            if before.state == "ended" or (before.state, before.reason) == (state, reason):
                return
        status = Status(state, self._now_ns(), reason)
        self._history = (*self._history, status)[-_REMEMBERED:]
        if self._listener is not None:
            self._listener(status)

    def _take(self) -> Frame | None:
        try:
            with self._reading:
                frame = None if self._closed.is_set() else self._read()
        except BaseException as error:
            self._enter("ended", str(error) or type(error).__name__)
            raise
        # A close() that came during the read could not release: it is done here, after the lock
        # was given back, so that one of the two threads always sees the other.
        if self._closed.is_set():
            self._release_once()
            if frame is not None:
                self._frames.count("dropped")
            return None
        if frame is None:
            self._enter("ended", "it is at its end")
            return None
        if self.status.state != "live":
            self._enter("live", "")
        self._size = (frame.height, frame.width)
        self._frames.count("delivered")
        return frame

    def _release_once(self) -> None:
        if not self._reading.acquire(blocking=False):
            return
        try:
            if not self._released:
                self._released = True
                self._enter("ended", "it was closed")
                self._release()
        finally:
            self._reading.release()
