"""The drawing of a result, made once for all sinks that want the same."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from edgeseg.frame import Pixels
from edgeseg.result import Result

__all__ = ["drawn"]


class _Drawing:
    """The latest drawing of one result, and what it was asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.look: tuple[float, bool] | None = None
        self.picture: Pixels | None = None


# Kept as long as somebody has the result, and no longer.
_drawings: WeakKeyDictionary[Result, _Drawing] = WeakKeyDictionary()
_lock = threading.Lock()


def drawn(result: Result, *, opacity: float, legend: bool) -> Pixels:
    """``result.draw(...)``, not to be written to: others may be given the same array.

    A video, a page and a window of one source draw alike; the first of them draws, and the others
    wait for it. Only the latest look of a result is kept, and only while the result is.
    """
    try:
        with _lock:
            drawing = _drawings.setdefault(result, _Drawing())
    except TypeError:
        # A result of the user's own that has no hash, or cannot be referred to weakly.
        return result.draw(opacity=opacity, legend=legend)
    with drawing.lock:
        if drawing.picture is None or drawing.look != (opacity, legend):
            drawing.picture = result.draw(opacity=opacity, legend=legend)
            drawing.picture.flags.writeable = False
            drawing.look = (opacity, legend)
        return drawing.picture
