"""What a run amounts to: the time of every stage of a frame, the age of masks, what was dropped."""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeseg.errors import RequestError
from edgeseg.frame import Frame
from edgeseg.result import AnyResult
from edgeseg.source import Source

__all__ = [
    "STAGES",
    "Ledger",
    "MaskAge",
    "Stage",
    "StageTimes",
    "Summary",
    "timed",
]

Stage = Literal["capture", "fit", "network", "head", "restore", "output"]

#: what a frame goes through, in order
STAGES: tuple[Stage, ...] = ("capture", "fit", "network", "head", "restore", "output")

# How many of the latest frames the percentiles are made of: eleven minutes at 30 frames per
# second, in 1.1 MB for the six stages and the age.
_REMEMBERED = 20_000

# How far back the recent frames per second reach.
_RECENT_NS = 5 * 10**9


@dataclass(frozen=True)
class StageTimes:
    """Percentiles of the time one stage takes per frame, in milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class MaskAge:
    """Percentiles of the time from a frame's capture to its finished mask, in milliseconds."""

    p50: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """What a run amounted to; `Ledger` says how each figure is measured."""

    fps: float
    frames: int
    dropped: int
    stages: dict[Stage, StageTimes]
    mask_age_ms: MaskAge

    def to_dict(self) -> dict[str, object]:
        """The summary in the shape of ``edgeseg profile --json``; stages in the order of a frame.

        ``{"fps", "frames", "dropped", "stages": {name: {"p50_ms", "p95_ms", "p99_ms"}},
        "mask_age_ms": {"p50", "p99"}}``
        """
        return {
            "fps": self.fps,
            "frames": self.frames,
            "dropped": self.dropped,
            "stages": {
                name: {"p50_ms": times.p50_ms, "p95_ms": times.p95_ms, "p99_ms": times.p99_ms}
                for name, times in self.stages.items()
            },
            "mask_age_ms": {"p50": self.mask_age_ms.p50, "p99": self.mask_age_ms.p99},
        }


class Ledger:
    """Times and counts of one run; every method may be called from any thread.

    ``capture`` is the time inside the source, waiting for a live one included; ``fit`` the way to
    network size and, on a GPU, into its memory; ``network`` and ``head`` what the engine reports (a
    head of 0 runs inside the network); ``restore`` brings the masks to frame size,
    postprocessing included;
    ``output`` is drawing and writing, which the caller records. Waiting in line, for the engine or
    for the caller, is in no stage; mask age has it. Percentiles cover the latest 20 000 frames,
    counts all. Its memory is taken when it is made, and does not grow with the frames: times are
    overwritten, and of the last five seconds at most 20 000 masks are remembered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times = {stage: _Latest(_REMEMBERED) for stage in STAGES}
        self._ages_ns = _Latest(_REMEMBERED)
        self._recent: deque[int] = deque(maxlen=_REMEMBERED)
        self._frames = 0
        self._dropped = 0
        self._superseded = 0
        self._started_ns: int | None = None
        self._stopped_ns: int | None = None
        self._first_ns = 0
        self._last_ns = 0

    @property
    def frames(self) -> int:
        """Frames whose mask was finished."""
        with self._lock:
            return self._frames

    @property
    def dropped(self) -> int:
        """Frames of a live source that were replaced by a newer one unprocessed, here or there."""
        with self._lock:
            return self._dropped

    @property
    def superseded(self) -> int:
        """Finished masks of a live source that the caller was too slow to take."""
        with self._lock:
            return self._superseded

    @property
    def elapsed(self) -> float:
        """Seconds since the run was started, until it ended; 0 before it starts."""
        with self._lock:
            if self._started_ns is None:
                return 0.0
            until_ns = time.monotonic_ns() if self._stopped_ns is None else self._stopped_ns
            return (until_ns - self._started_ns) / 1e9

    def fps(self) -> float:
        """Finished masks per second: (frames - 1) over the time from the first to the last one.

        The steady state: opening the source and the first, cold frame are left out, everything
        that a frame goes through is in. 0 before there are two masks.
        """
        with self._lock:
            span_ns = self._last_ns - self._first_ns
            return (self._frames - 1) * 1e9 / span_ns if span_ns > 0 else 0.0

    def recent_fps(self, now_ns: int | None = None) -> float:
        """Finished masks per second over the last five seconds; 0.0 when there were none.

        In the first five seconds after the first mask: since then, without it. ``now_ns``: a
        ``time.monotonic_ns()``, None for now.
        """
        now_ns = time.monotonic_ns() if now_ns is None else now_ns
        since_ns = now_ns - _RECENT_NS
        with self._lock:
            finished = [at_ns for at_ns in self._recent if at_ns > since_ns]
            all_are_there = len(self._recent) < _REMEMBERED
            begun = self._frames > 0 and self._first_ns <= since_ns
        if begun and all_are_there:
            return len(finished) * 1e9 / _RECENT_NS
        span_ns = now_ns - finished[0] if finished else 0
        return (len(finished) - 1) * 1e9 / span_ns if span_ns > 0 else 0.0

    def record(self, stage: Stage, ns: int) -> None:
        """Adds one frame's time in ``stage``, in nanoseconds."""
        if stage not in self._times:
            raise RequestError(f"the stages are {', '.join(STAGES)}, and {stage!r} came")
        with self._lock:
            self._times[stage].append(ns)

    def count_finished(self, result: AnyResult, restore_ns: int) -> None:
        """Counts one finished mask, with its age and the engine's times in network and head."""
        finished_ns = result.finished_ns
        with self._lock:
            self._times["network"].append(result.outputs.network_ns)
            self._times["head"].append(result.outputs.head_ns)
            self._times["restore"].append(restore_ns)
            self._ages_ns.append(finished_ns - result.frame.captured_ns)
            if self._frames == 0:
                self._first_ns = finished_ns
            self._last_ns = finished_ns
            self._frames += 1
            recent = self._recent
            recent.append(finished_ns)
            while recent[0] <= finished_ns - _RECENT_NS:
                recent.popleft()

    def count_dropped(self, frames: int = 1) -> None:
        """Counts captured frames that were not processed."""
        with self._lock:
            self._dropped += frames

    def count_superseded(self) -> None:
        """Counts one finished mask that was not taken."""
        with self._lock:
            self._superseded += 1

    def start(self) -> None:
        """Marks the beginning of the run."""
        with self._lock:
            self._started_ns = time.monotonic_ns()

    def stop(self) -> None:
        """Marks the end of the run; the first call counts."""
        with self._lock:
            if self._stopped_ns is None:
                self._stopped_ns = time.monotonic_ns()

    def percentiles(self, stage: Stage) -> tuple[float, float, float]:
        """(p50, p95, p99) of one stage in milliseconds; zeros when nothing was recorded."""
        with self._lock:
            times = self._times[stage].copy()
        p50, p95, p99 = _percentiles_ms(times, (50, 95, 99))
        return p50, p95, p99

    def summary(self) -> Summary:
        """The figures so far; a stage that nobody recorded is left out.

        Takes a few milliseconds, of which other threads wait microseconds: times are copied under
        the lock, and sorted outside of it.
        """
        with self._lock:
            recorded = [stage for stage in STAGES if len(self._times[stage])]
            ages_ns = self._ages_ns.copy()
            frames, dropped = self._frames, self._dropped
        p50, p99 = _percentiles_ms(ages_ns, (50, 99))
        return Summary(
            fps=self.fps(),
            frames=frames,
            dropped=dropped,
            stages={stage: StageTimes(*self.percentiles(stage)) for stage in recorded},
            mask_age_ms=MaskAge(p50, p99),
        )


def timed(source: Source, ledger: Ledger, wanted: Callable[[int], bool]) -> Iterator[Frame]:
    """The frames of ``source``, with the time inside it and what it dropped in ``ledger``.

    ``wanted(read)`` is asked before each frame whether there is to be another.
    """
    iterator = iter(source)
    read = dropped = 0
    while wanted(read):
        started_ns = time.perf_counter_ns()
        frame = next(iterator, None)
        dropped_now = source.tally.dropped
        ledger.count_dropped(dropped_now - dropped)
        dropped = dropped_now
        if frame is None:
            return
        ledger.record("capture", time.perf_counter_ns() - started_ns)
        read += 1
        yield frame
        # Not kept while waiting for the next: it holds a whole picture.
        del frame


class _Latest:
    """The latest ``capacity`` of a series of times; one that is full overwrites its oldest."""

    def __init__(self, capacity: int) -> None:
        # Written once, so that the system gives the memory now and not frame by frame.
        self._times = array("q", bytes(8 * capacity))
        self._capacity = capacity
        self._next = 0

    def __len__(self) -> int:
        return min(self._next, self._capacity)

    def append(self, ns: int) -> None:
        """Takes one more."""
        at = self._next
        self._times[at % self._capacity] = ns
        self._next = at + 1

    def copy(self) -> array[int]:
        """Those that are there, in no order."""
        return self._times[: len(self)]


def _percentiles_ms(times_ns: array[int], ranks: Sequence[float]) -> list[float]:
    if not times_ns:
        return [0.0] * len(ranks)
    return [float(value) / 1e6 for value in np.percentile(np.frombuffer(times_ns, np.int64), ranks)]
