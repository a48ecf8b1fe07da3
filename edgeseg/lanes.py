"""A hand-over from several threads to one: a lane for each, served in turns."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Lane", "Lanes", "Lull"]

# Waiting in slices keeps Ctrl-C working on Windows, where a wait without end ignores it.
_SLICE_S = 0.5

_Item = TypeVar("_Item")


class Lull(Exception):
    """Nothing came for as long as was waited for, and more may come."""


@dataclass(frozen=True)
class Lane:
    """How many items a lane holds, and whether a newer one takes the place of the oldest."""

    capacity: int
    newest_only: bool


class Lanes(Generic[_Item]):
    """A hand-over from several threads to one, which takes from each in turn.

    A lane holds ``capacity`` items at most. One that is full makes its ``put`` wait, or loses its
    oldest item if it is ``newest_only``.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = tuple(lanes)
        self._items: tuple[deque[_Item], ...] = tuple(deque() for _ in lanes)
        self._open = set(range(len(self._lanes)))
        self._left: set[int] = set()
        self._turn = 0
        # One lock, and two things to wait for, so that nobody is woken for nothing.
        self._lock = threading.RLock()
        self._came = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._abandoned = False
        self._error: BaseException | None = None

    def is_abandoned(self, lane: int) -> bool:
        """Whether nobody takes items of that lane any more."""
        return self._abandoned or lane in self._left

    def put(self, lane: int, item: _Item) -> bool:
        """Hands ``item`` over; True when it took the place of one that nobody had taken."""
        kind, items = self._lanes[lane], self._items[lane]
        replaced = False
        with self._lock:
            while len(items) == kind.capacity and not (self._abandoned or lane in self._left):
                if kind.newest_only:
                    items.popleft()
                    replaced = True
                else:
                    self._room.wait(_SLICE_S)
            if self._abandoned or lane in self._left:
                return False
            items.append(item)
            if len(items) == 1:
                self._came.notify()
            return replaced

    def get(self, patience_s: float | None = None) -> tuple[int, _Item] | None:
        """The next item and its lane, waited for; None when all lanes have ended.

        The lane after the one that was served last comes first. Raises what `finish` was given,
        after the items that were there before, and Lull when nothing came for ``patience_s``.
        """
        until: float | None = None
        count = len(self._lanes)
        with self._lock:
            while True:
                if self._abandoned:
                    return None
                for step in range(count):
                    lane = (self._turn + step) % count
                    items = self._items[lane]
                    if items:
                        self._turn = lane + 1
                        if len(items) == self._lanes[lane].capacity:
                            self._room.notify_all()
                        return lane, items.popleft()
                if self._error is not None or not self._open:
                    break
                left_s = _SLICE_S
                if patience_s is not None:
                    now = time.monotonic()
                    until = now + patience_s if until is None else until
                    left_s = min(until - now, _SLICE_S)
                    if left_s <= 0:
                        raise Lull
                self._came.wait(left_s)
            # Handed on, not kept: an error holds its traceback, and that holds whole frames.
            error, self._error = self._error, None
        if error is None:
            return None
        try:
            raise error
        finally:
            del error

    def finish(self, lane: int, error: BaseException | None = None) -> None:
        """No more items come on that lane; ``error``, if any, ends all of them."""
        with self._lock:
            self._open.discard(lane)
            self._error = self._error or error
            self._came.notify_all()

    def abandon_lane(self, lane: int) -> None:
        """Nobody takes items of that lane any more, and nobody waits for its end."""
        with self._lock:
            self._left.add(lane)
            self._open.discard(lane)
            self._items[lane].clear()
            self._came.notify_all()
            self._room.notify_all()

    def abandon(self) -> None:
        """Nobody takes items any more: drops what is there and wakes all who wait."""
        with self._lock:
            self._abandoned = True
            for items in self._items:
                items.clear()
            self._came.notify_all()
            self._room.notify_all()
