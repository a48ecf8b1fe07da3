"""A sink with a thread of its own, so that a slow or failing one does not hold up the others."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import Literal

from edgeseg.errors import RequestError, SinkError
from edgeseg.result import Result
from edgeseg.sink.base import Policy, Sink

__all__ = ["Outlet", "OutletStats", "Policy"]


@dataclass(frozen=True)
class OutletStats:
    """How an outlet is doing.

    ``written``: results that its sink took. ``dropped``: results that it did not take, because a
    newer one came, or because it was given up or aborted. ``waiting``: results in the queue.
    ``busy_s``: how long the write under way takes already; 0.0 when there is none. ``error``: why
    it takes nothing any more, None while it does.
    """

    name: str
    policy: Policy
    written: int
    dropped: int
    waiting: int
    busy_s: float
    error: str | None


class Outlet(Sink):
    """A sink with a thread of its own: `write` puts results into a queue, the thread writes them.

    ``policy`` says what a full queue of ``depth`` results does: ``"wait"`` makes `write` wait, for
    a file, of which nothing may be missing; ``"drop"`` throws the oldest away, for a viewer, who
    wants the newest. The sink's `write`, `close` and `abort` are all called in the one thread,
    named ``edgeseg-outlet-<name>``, in the order of the calls here. (A `WindowSink` belongs to the
    thread that made it, and into no outlet.)

    A sink that raises is aborted and given up: `error` has the reason, and later results are
    counted as dropped. So is one that takes longer than ``patience_s`` seconds over one result;
    its thread cannot be ended and is left behind, as a daemon, and aborts the sink should it ever
    come back. Other outlets notice nothing of either.

    At most ``depth`` + 1 results are kept, one of them being written, and none once it is done.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        name: str,
        policy: Policy = "wait",
        depth: int = 2,
        patience_s: float = 30.0,
    ) -> None:
        if policy not in ("wait", "drop"):
            raise RequestError(f"the policy of an outlet is wait or drop, and {policy!r} came")
        if depth < 1:
            raise RequestError(f"a queue holds 1 result or more, and {depth} came")
        if not (math.isfinite(patience_s) and patience_s > 0):
            raise RequestError(
                f"the patience is a number of seconds above 0, and {patience_s} came"
            )
        self._sink = sink
        self._name = name
        self._policy: Policy = policy
        self._depth = depth
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._queue: deque[Result] = deque()
        self._ending: Literal["close", "abort"] | None = None
        self._error: SinkError | None = None
        self._written = 0
        self._dropped = 0
        self._busy_since: float | None = None
        self._thread = threading.Thread(
            target=self._work, name=f"edgeseg-outlet-{name}", daemon=True
        )
        self._thread.start()

    @property
    def name(self) -> str:
        """What it is called in messages and statistics."""
        return self._name

    @property
    def stats(self) -> OutletStats:
        """How it is doing; any thread."""
        with self._changed:
            self._lose_patience()
            return OutletStats(
                name=self._name,
                policy=self._policy,
                written=self._written,
                dropped=self._dropped,
                waiting=len(self._queue),
                busy_s=self._busy_s(),
                error=None if self._error is None else str(self._error),
            )

    @property
    def error(self) -> SinkError | None:
        """Why it takes nothing any more, None while it does; any thread."""
        with self._changed:
            self._lose_patience()
            return self._error

    @property
    def policy(self) -> Policy:
        """What a full queue does."""
        return self._policy

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the sink."""
        return self._sink.notes

    @property
    def stopped(self) -> bool:
        """Whether the user asked the sink to end."""
        return self._sink.stopped

    def write(self, result: Result) -> None:
        """Queues one result; does nothing but count it when the sink was given up.

        Raises SinkError when the outlet was closed.
        """
        with self._changed:
            if self._ending is not None:
                raise SinkError(f"{self._name} is finished, and one more frame came")
            while not self._gives_up() and len(self._queue) >= self._depth:
                if self._policy == "drop":
                    self._queue.popleft()
                    self._dropped += 1
                else:
                    self._changed.wait(self._patience_s - self._busy_s())
            if self._error is not None or self._ending is not None:
                self._dropped += 1
                return
            self._queue.append(result)
            self._changed.notify_all()

    def close(self) -> None:
        """Lets the sink write what is queued and finish, within ``patience_s``.

        Raises SinkError when that fails or takes longer, or when the sink had been given up
        before. A second call does nothing.
        """
        if self._end("close") and self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Forgets what is queued and has the sink aborted, within ``patience_s``."""
        self._end("abort")

    def _end(self, how: Literal["close", "abort"]) -> bool:
        """Ends the thread; False when that was done before."""
        with self._changed:
            if self._ending is not None:
                return False
            self._ending = how
            if how == "abort":
                self._forget_queue()
            self._changed.notify_all()
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            with self._changed:
                self._give_up(
                    f"{self._name} was not finished within {self._patience_s:g} seconds, and what "
                    "it had not written is lost"
                )
        return True

    def _work(self) -> None:
        try:
            while (result := self._next()) is not None:
                self._sink.write(result)
                # Not kept while waiting for the next: it holds a whole frame.
                del result
                with self._changed:
                    self._busy_since = None
                    self._written += 1
                    self._changed.notify_all()
            if self._ending == "close" and self._error is None:
                self._sink.close()
            else:
                self._sink.abort()
        except BaseException as error:
            # Whatever it is: a thread that is gone without a word would have `write` wait for it.
            result = None
            self._fail(error)

    def _next(self) -> Result | None:
        """The next result to write; None when there will be none."""
        with self._changed:
            while not self._queue:
                if self._ending is not None or self._error is not None:
                    return None
                self._changed.wait()
            self._busy_since = time.monotonic()
            result = self._queue.popleft()
            self._changed.notify_all()
            return result

    def _fail(self, error: BaseException) -> None:
        _forget_frames(error)
        if isinstance(error, SinkError):
            reason = error
        else:
            reason = SinkError(f"{self._name} broke: {str(error) or type(error).__name__}")
            reason.__cause__ = error
        with self._changed:
            if self._busy_since is not None:
                self._busy_since = None
                self._dropped += 1
            self._error = self._error or reason
            self._forget_queue()
            self._changed.notify_all()
        try:
            self._sink.abort()
        except Exception:
            # It is given up already, with the reason that counts.
            return

    def _gives_up(self) -> bool:
        self._lose_patience()
        return self._error is not None or self._ending is not None

    def _lose_patience(self) -> None:
        """Gives the sink up if it takes too long; call it with the lock held."""
        if self._busy_s() >= self._patience_s:
            self._give_up(
                f"{self._name} took more than {self._patience_s:g} seconds over one frame and is "
                "given up"
            )

    def _give_up(self, reason: str) -> None:
        if self._error is None:
            self._error = SinkError(reason)
            self._forget_queue()
            self._changed.notify_all()

    def _busy_s(self) -> float:
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def _forget_queue(self) -> None:
        self._dropped += len(self._queue)
        self._queue.clear()


def _forget_frames(error: BaseException) -> None:
    """Empties the local variables of an error's traceback: they keep a whole frame alive."""
    chained: BaseException | None = error
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__
