"""When the masks of a run were finished, and how old they were then."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeseg.result import AnyResult

__all__ = ["Intervals", "Timeline"]


@dataclass(frozen=True)
class Intervals:
    """Percentiles of the time from one finished mask to the next, in milliseconds, and the jitter.

    ``deviation_ms``: the standard deviation. ``p99_minus_p50_ms``: how much later than usual a mask
    is once in a hundred times.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    deviation_ms: float

    @property
    def p99_minus_p50_ms(self) -> float:
        """The 99th percentile less the median."""
        return self.p99_ms - self.p50_ms


class Timeline:
    """The masks that a caller took, in order: 16 bytes each."""

    def __init__(self) -> None:
        self._finished_ns = array("q")
        self._ages_ns = array("q")

    def __len__(self) -> int:
        return len(self._finished_ns)

    def add(self, result: AnyResult) -> None:
        """One finished mask."""
        self._finished_ns.append(result.finished_ns)
        self._ages_ns.append(result.finished_ns - result.frame.captured_ns)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """(masks,) when each was finished, since the first."""
        finished = np.array(self._finished_ns, np.int64)
        return (finished - finished[:1]) / 1e9

    @property
    def ages_ms(self) -> NDArray[np.float64]:
        """(masks,) milliseconds from capture to finished mask."""
        return np.array(self._ages_ns, np.int64) / 1e6

    @property
    def intervals_ms(self) -> NDArray[np.float64]:
        """(masks - 1,) milliseconds from each mask to the next."""
        finished = np.array(self._finished_ns, np.int64)
        return (finished[1:] - finished[:-1]) / 1e6

    def intervals(self) -> Intervals:
        """The summary; zeros when there are fewer than two masks."""
        times = self.intervals_ms
        if not len(times):
            return Intervals(0.0, 0.0, 0.0, 0.0)
        p50, p95, p99 = (float(value) for value in np.percentile(times, (50, 95, 99)))
        return Intervals(p50, p95, p99, float(times.std()))
