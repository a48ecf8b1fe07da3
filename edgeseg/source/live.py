"""A source that lasts: it notices silence, and opens a lost stream anew."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable

from edgeseg.errors import FrameError, RequestError, SourceError
from edgeseg.frame import Frame
from edgeseg.source.base import Source
from edgeseg.source.connection import Connect, Connection, Picture, Silence, Unanswered
from edgeseg.source.status import Backoff, Clock

__all__ = ["LiveSource"]

# How many connections may hang in a driver before no further one is tried.
_MOST_HANGING = 3


class LiveSource(Source):
    """A camera or a stream, opened by ``connect`` as often as it takes.

    After ``timeout_s`` seconds without a new picture it is *stalled*; then, or when the stream
    ends or breaks, it is *reconnecting*: closed, and opened anew after a delay that ``backoff``
    gives, until it is *live* again. ``reconnect_s`` is for how long, 0 for not at all, ``math.inf``
    for ever. The first frame is not waited for like that, unless ``waits``: a wrong address should
    be told at once, and raises SourceError here.

    A frame is given out once, and only if it was captured after the one before it: what is not
    newer is counted as stale. ``clock`` and ``share`` (a random number in [0, 1)) are for tests.
    ``name`` is what messages call it.
    """

    def __init__(
        self,
        uri: str,
        connect: Connect,
        *,
        name: str,
        timeout_s: float = 10.0,
        reconnect_s: float = math.inf,
        waits: bool = False,
        backoff: Backoff | None = None,
        clock: Clock | None = None,
        share: Callable[[], float] = random.random,
    ) -> None:
        if not timeout_s > 0:
            raise RequestError(f"a time-out is a number of seconds above 0, and {timeout_s} came")
        if not reconnect_s >= 0:
            raise RequestError(f"a number of seconds is not below 0, and {reconnect_s} came")
        self._clock = clock or Clock()
        super().__init__(uri, live=True)
        self._name = name
        self._connect = connect
        self._timeout_s = timeout_s
        self._reconnect_s = reconnect_s
        self._waits = waits
        self._backoff = backoff or Backoff()
        self._share = share
        self._connection: Connection | None = None
        self._hanging: list[Connection] = []
        self._choices: tuple[str, ...] = ()
        self._attempt = 0
        self._last_captured_ns = -1
        # When something new was last heard, when the frame was asked for that is being waited for,
        # and when frames began to come without a loss.
        self._heard_ns = self._asked_ns = self._now_ns()
        self._live_since_ns: int | None = None
        self._lost_ns: int | None = None
        self._due_ns = 0
        self._away_ns = 0
        self._ended_after: int | None = None
        try:
            self._open()
        except SourceError as error:
            if not waits:
                self._enter("ended", str(error))
                raise
            self._lost_ns = self._now_ns()
            self._enter("reconnecting", str(error))
            self._schedule()

    @property
    def notes(self) -> tuple[str, ...]:
        """How often it was away and for how long, what could not be used, and where it ended."""
        tally, notes = self.tally, list(self._choices)
        away_ns = self._away_ns
        if self._lost_ns is not None:
            away_ns += self._now_ns() - self._lost_ns
        if tally.reconnects or (self._lost_ns is not None and self._ended_after is None):
            notes.append(
                f"{self._name} was lost and opened anew {_times(tally.reconnects)}, "
                f"{away_ns / 1e9:.1f} seconds in all without a picture"
            )
        if tally.damaged:
            notes.append(f"{tally.damaged} pictures of {self._name} were damaged and left out")
        if tally.stale:
            notes.append(
                f"{tally.stale} pictures of {self._name} were repeats, or late, and left out"
            )
        if self._ended_after is not None:
            notes.append(f"{self._name} ended after {self._ended_after} frames")
        return tuple(notes)

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The reader of the connection, and those of earlier ones that hang in a driver."""
        connection, hanging = self._connection, self._hanging
        connections = (*hanging, *(() if connection is None else (connection,)))
        return tuple(thread for one in connections for thread in one.threads)

    def _now_ns(self) -> int:
        return self._clock.now_ns()

    def _read(self) -> Frame | None:
        self._asked_ns = self._now_ns()
        while not self._closed.is_set() and self._ended_after is None:
            if self._connection is None:
                self._wait_and_open()
                continue
            frame = self._next(self._connection)
            if frame is not None:
                return frame
        return None

    def _next(self, connection: Connection) -> Frame | None:
        """The next frame of this connection; None when there was none that can be given out."""
        # A reader who was away hears nothing either: that is not the camera's silence.
        silent_ns = self._now_ns() - max(self._heard_ns, self._asked_ns)
        left_s = self._timeout_s - silent_ns / 1e9
        try:
            if left_s <= 0:
                # Something came, and all of it was old.
                raise Silence
            picture = connection.read(left_s)
        except Silence:
            if not self._closed.is_set():
                reason = f"it gave no new picture for {self._timeout_s:g} seconds"
                self._enter("stalled", reason)
                self._lose(reason)
            return None
        except SourceError as error:
            self._lose(str(error), error)
            return None
        if picture is None:
            if not self._closed.is_set():
                self._lose("the stream ended", ended=True)
            return None
        return self._accepted(picture)

    def _accepted(self, picture: Picture) -> Frame | None:
        now_ns = self._now_ns()
        # A camera's clock may jump. To the future is cut off; to the past looks like old frames,
        # and as such they are refused, until they are new again or the stream is opened anew.
        captured_ns = min(picture.captured_ns, now_ns)
        oldest_ns = now_ns - round(self._timeout_s * 1e9)
        if captured_ns <= self._last_captured_ns or captured_ns < oldest_ns:
            self._frames.count("stale")
            return None
        try:
            frame = Frame(picture.pixels, captured_ns, picture.index)
        except FrameError:
            self._frames.count("damaged")
            return None
        self._last_captured_ns = captured_ns
        self._heard_ns = now_ns
        if self._live_since_ns is None:
            self._live_since_ns = now_ns
        if self._lost_ns is not None:
            self._away_ns += now_ns - self._lost_ns
            self._lost_ns = None
        elif self._attempt and now_ns - self._live_since_ns > self._backoff.longest_s * 1e9:
            # Only a stream that lasts has earned quick attempts: one that gives a frame and breaks
            # off would otherwise be opened without a pause.
            self._attempt = 0
        self._enter("live", "")
        return frame

    def _lose(self, reason: str, error: SourceError | None = None, *, ended: bool = False) -> None:
        """Closes the connection; raises SourceError if the source is not to be opened again."""
        never_live = self.tally.delivered == 0 and not self._waits
        self._put_away()
        if self._reconnect_s == 0 and ended and not never_live:
            self._ended_after = self.tally.delivered
            return
        if never_live:
            raise SourceError(f"{self._name} opens, and gives no frames ({reason})") from error
        if self._reconnect_s == 0:
            raise SourceError(
                f"{self._name} is lost after {self.tally.delivered} frames: {reason}; is it still "
                "there?"
            ) from error
        if self._lost_ns is None:
            # Without a picture since the last one came.
            self._lost_ns = self._heard_ns
        self._live_since_ns = None
        self._enter("reconnecting", reason)
        self._schedule()

    def _schedule(self) -> None:
        delay_s = self._backoff.delay_s(self._attempt, self._share())
        self._due_ns = self._now_ns() + round(delay_s * 1e9)
        self._attempt += 1

    def _wait_and_open(self) -> None:
        """Waits until the next attempt is due, and makes it."""
        now_ns = self._now_ns()
        if now_ns < self._due_ns:
            self._clock.wait(self._closed, (self._due_ns - now_ns) / 1e9)
            return
        lost_ns = now_ns if self._lost_ns is None else self._lost_ns
        if (now_ns - lost_ns) / 1e9 > self._reconnect_s:
            raise SourceError(
                f"{self._name} is lost after {self.tally.delivered} frames, and did not come back "
                f"within {self._reconnect_s:g} seconds ({self.status.reason})"
            )
        self._hanging = [connection for connection in self._hanging if connection.hangs]
        try:
            if len(self._hanging) >= _MOST_HANGING:
                raise SourceError(f"{len(self._hanging)} reads of {self._name} hang in its driver")
            self._open()
        except SourceError as error:
            if isinstance(error, Unanswered):
                self._hanging.append(error.connection)
            if not self._closed.is_set():
                self._enter("reconnecting", str(error))
                self._schedule()
        else:
            self._frames.count("reconnects")

    def _open(self) -> None:
        connection = self._connect(self._frames, self._closed)
        self._connection = connection
        self._size = connection.size or self._size
        self._fps = connection.fps
        self._choices = connection.notes
        self._heard_ns = self._now_ns()

    def _put_away(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            if connection.hangs:
                self._hanging.append(connection)

    def _interrupt(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.interrupt()

    def _release(self) -> None:
        self._put_away()


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
