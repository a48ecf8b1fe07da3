"""Generated streets as a source."""

from __future__ import annotations

import time

from edgeseg.frame import Frame
from edgeseg.source.base import Source
from edgeseg.synthetic import Street

__all__ = ["SyntheticSource"]


class SyntheticSource(Source):
    """A generated street with exact ground truth (`street`), as fast as it can be drawn.

    With ``live`` it behaves like a camera: a frame exists from its moment until the next one's,
    and who comes late gets a later frame; those in between are counted as dropped.
    ``Frame.index`` is the number of the street's frame, so that ``street.frame(index)`` has the
    ground truth of any result.
    """

    def __init__(self, uri: str, street: Street, *, live: bool) -> None:
        super().__init__(
            uri,
            live=live,
            size=(street.height, street.width),
            fps=street.fps,
            length=street.frames,
        )
        self._street = street
        self._next = 0
        self._started_ns: int | None = None

    @property
    def street(self) -> Street:
        """The street behind the frames."""
        return self._street

    def _read(self) -> Frame | None:
        if self._live:
            self._wait_for_frame()
        index = self._next
        if self._closed.is_set() or (self._length is not None and index >= self._length):
            return None
        self._next += 1
        if self._live:
            # What a camera shows was there before it was read out: drawing counts as age.
            captured_ns = time.monotonic_ns()
            return Frame(self._street.frame(index).pixels, captured_ns, index)
        pixels = self._street.frame(index).pixels
        return Frame(pixels, time.monotonic_ns(), index)

    def _wait_for_frame(self) -> None:
        """Sets ``_next`` to the frame of this moment, or waits for the next one's."""
        now_ns = time.monotonic_ns()
        if self._started_ns is None:
            self._started_ns = now_ns
        period_ns = 1e9 / self._street.fps
        current = int((now_ns - self._started_ns) / period_ns)
        if current >= self._next:
            # Those after the last of the street never were.
            there = current if self._length is None else min(current, self._length)
            self._frames.count("dropped", max(there - self._next, 0))
            self._next = current
            return
        due_ns = self._started_ns + self._next * period_ns
        self._closed.wait(max(due_ns - now_ns, 0.0) / 1e9)
