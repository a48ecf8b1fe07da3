"""One opened stream, and the thread that reads it ahead."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgeseg.errors import SourceError
from edgeseg.frame import Pixels
from edgeseg.source.status import FrameLedger

__all__ = [
    "READING_GRACE_S",
    "Connect",
    "Connection",
    "Feed",
    "Picture",
    "Reader",
    "Silence",
    "Unanswered",
]

# How long a thread may take to notice that it is to end before it is left to itself, in seconds:
# longer than one frame of a slow camera, and short enough not to be felt.
_GRACE_S = 1.0
# How much longer than its own time-out an opening is waited for, in seconds.
_OPENING_GRACE_S = 1.0
#: How much longer a reader waits for its next picture than the source does, which then knows that
#: it has stalled before the reader breaks off, in seconds.
READING_GRACE_S = 1.0
# Waiting in slices: a close must be seen, and Ctrl-C must work on Windows.
_SLICE_S = 0.05


class Silence(Exception):
    """Nothing came for the time that was waited for; never leaves this package."""


@dataclass(frozen=True, eq=False)
class Picture:
    """What a connection gives: pixels (height, width, 3) uint8 BGR, their time and number.

    ``captured_ns``: the best that is known of when it was taken, as ``time.monotonic_ns()``.
    ``index``: from `FrameLedger.number`.
    """

    pixels: Pixels
    captured_ns: int
    index: int


class Connection(ABC):
    """A stream that was opened, until it breaks; one thread reads it."""

    size: tuple[int, int] | None = None
    fps: float | None = None
    notes: tuple[str, ...] = ()

    @abstractmethod
    def read(self, timeout_s: float) -> Picture | None:
        """The newest picture that was not read yet, None at the end of the stream.

        Raises Silence when none came in ``timeout_s`` seconds, SourceError when the stream broke.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives everything back; waits a second at most for a thread that hangs in a driver."""

    def interrupt(self) -> None:  # noqa: B027 - some reads are never long
        """Ends a ``read`` that is under way in another thread."""

    @property
    def hangs(self) -> bool:
        """Whether something of it is still not given back, after `close`."""
        return False

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """Living threads of its own."""
        return ()


class Unanswered(SourceError):
    """A stream that could not be opened in time; ``connection`` is what may still hang in it."""

    def __init__(self, message: str, connection: Connection) -> None:
        super().__init__(message)
        self.connection = connection


#: opens a stream: counts go to the ledger; when the event is set, nobody waits for it any more
Connect = Callable[[FrameLedger, threading.Event], Connection]


class Reader(ABC):
    """A stream that is read picture by picture, each read as long as it takes."""

    size: tuple[int, int] | None = None
    fps: float | None = None
    notes: tuple[str, ...] = ()

    @abstractmethod
    def read(self) -> Picture | None:
        """The next picture, None at the end; raises SourceError when the stream broke."""

    @abstractmethod
    def close(self) -> None:
        """Gives everything back; called by the thread that reads."""

    def interrupt(self) -> None:  # noqa: B027 - not every read can be ended
        """Ends a ``read`` that is under way in another thread, if it can be ended."""


class Feed(Connection):
    """A reader with a thread of its own, which keeps only the newest picture.

    So nothing old waits in the queues of drivers and sockets, however slow the receiver is, and a
    driver that hangs hangs its thread alone. A picture that is replaced by a newer one is counted
    as dropped, one that comes after a newer one as stale.

    ``open_reader`` runs in that thread, too, and raises SourceError. ``name`` is for messages,
    ``timeout_s`` how long the opening may take. Raises SourceError when it takes longer, or fails.
    """

    def __init__(
        self,
        open_reader: Callable[[], Reader],
        frames: FrameLedger,
        closed: threading.Event,
        *,
        name: str,
        timeout_s: float,
    ) -> None:
        self._open_reader = open_reader
        self._frames = frames
        self._name = name
        self._changed = threading.Condition()
        self._reader: Reader | None = None
        self._picture: Picture | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="edgeseg-reader", daemon=True)
        self._thread.start()
        self._wait_for_opening(closed, timeout_s + _OPENING_GRACE_S)

    def read(self, timeout_s: float) -> Picture | None:
        """The newest picture that was not read yet, None at the end."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._picture is None and not self._ended and not self._closing:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise Silence
                self._changed.wait(min(left_s, 0.5))
            picture, self._picture = self._picture, None
            if picture is not None:
                return picture
            error, self._error = self._error, None
        if error is None:
            return None
        try:
            raise error
        finally:
            # Its traceback holds this frame, which would hold it.
            del error

    def interrupt(self) -> None:
        """Ends a ``read`` that is under way in another thread, and the thread's own."""
        with self._changed:
            self._closing = True
            reader = self._reader
            self._changed.notify_all()
        if reader is not None:
            reader.interrupt()

    def close(self) -> None:
        """Ends the thread; one that hangs in a driver ends when the driver lets go."""
        self.interrupt()
        self._thread.join(_GRACE_S)
        with self._changed:
            self._error = None
            if self._picture is not None:
                self._picture = None
                self._frames.count("dropped")

    @property
    def hangs(self) -> bool:
        """Whether the thread is still inside a driver."""
        return self._thread.is_alive()

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The thread that reads, while it lives."""
        return (self._thread,) if self._thread.is_alive() else ()

    def _keep(self, picture: Picture) -> None:
        """Has ``picture`` wait for whoever reads, if it is the newest."""
        # What waits here grows old: a clock that is ahead must not make it new again.
        now_ns = time.monotonic_ns()
        if picture.captured_ns > now_ns:
            picture = replace(picture, captured_ns=now_ns)
        with self._changed:
            waiting = self._picture
            if self._closing:
                self._frames.count("dropped")
            elif waiting is not None and picture.captured_ns < waiting.captured_ns:
                # Pictures that came in one piece have one time, and the last of them is the newest.
                self._frames.count("stale")
            else:
                if waiting is not None:
                    self._frames.count("dropped")
                self._picture = picture
                self._changed.notify_all()

    def _wait_for_opening(self, closed: threading.Event, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        with self._changed:
            while self._reader is None and not self._ended:
                if closed.is_set() or time.monotonic() >= deadline:
                    self._closing = True
                    break
                self._changed.wait(_SLICE_S)
            reader = self._reader
            if reader is not None:
                self.size, self.fps, self.notes = reader.size, reader.fps, reader.notes
                return
            error, self._error = self._error, None
        self._thread.join(0 if self._closing else _GRACE_S)
        if error is not None:
            try:
                raise error
            finally:
                del error
        reason = f"gave no answer within {patience_s - _OPENING_GRACE_S:g} seconds"
        raise Unanswered(f"{self._name} {reason}", self)

    def _run(self) -> None:
        """Body of the thread."""
        reader: Reader | None = None
        error: BaseException | None = None
        try:
            reader = self._open_reader()
            with self._changed:
                if not self._closing:
                    self._reader = reader
                self._changed.notify_all()
            while not self._closing and (picture := reader.read()) is not None:
                self._keep(picture)
                del picture
        except BaseException as raised:
            error = raised
        finally:
            if reader is not None:
                reader.close()
            with self._changed:
                self._ended = True
                self._error = error
                self._changed.notify_all()
            # Its traceback holds this frame, which would hold it, and with it the stream's last
            # pictures, until the garbage collector comes by.
            del error
