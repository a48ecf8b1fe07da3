"""What a run takes from the machine: processor, memory, power, heat."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType

from edgeseg.sensors import Reading, Sensors

__all__ = ["MachineUse", "Sample", "SensorWatch", "peak_rss_mb"]

NOT_AVAILABLE = "not available"
_PERIOD_S = 0.5
# Of a run of a day, every other reading is forgotten again and again.
_REMEMBERED = 2000


@dataclass(frozen=True)
class Sample:
    """A reading, and the seconds since the watch began."""

    seconds: float
    reading: Reading


@dataclass(frozen=True)
class MachineUse:
    """What a run took from the machine; None is "not available here".

    ``cpu_percent``: mean, of this process, 100 is one core. ``others_percent``: what all other
    programs took meanwhile, likewise; they make figures worse than they need be. ``rss_mb``:
    resident memory at the end. ``gpu_percent``: mean; ``gpu_memory_mb``: at most. ``power_w``:
    mean, of what `Reading` says. ``joules_per_frame``: that power, for as long as a finished mask
    took on average; idle power is in it. ``temperature_*_c``: the hottest of SoC, CPU and GPU at
    the start, at the end and at most. ``throttled``: whether heat or an overload took from the
    clock at any time.
    """

    cpu_percent: float | None
    others_percent: float | None
    rss_mb: float | None
    gpu_percent: float | None
    gpu_memory_mb: float | None
    power_w: float | None
    joules_per_frame: float | None
    temperature_start_c: float | None
    temperature_end_c: float | None
    temperature_max_c: float | None
    throttled: bool | None
    sources: tuple[str, ...]

    @classmethod
    def of(
        cls,
        first: Reading,
        samples: Sequence[Sample],
        fps: float,
        *,
        busy_percent: float | None = None,
    ) -> MachineUse:
        """The summary of ``samples``, after the reading ``first`` at their beginning.

        ``busy_percent``: of all programs together, 100 is one core.
        """
        readings = [sample.reading for sample in samples]
        own = _mean(samples, "cpu_percent")
        others = None if busy_percent is None or own is None else max(busy_percent - own, 0.0)
        power = _mean(samples, "power_w")
        heats = [r.temperature_c for r in (first, *readings) if r.temperature_c is not None]
        memory = [r.gpu_memory_mb for r in readings if r.gpu_memory_mb is not None]
        throttles = [r.throttled for r in readings if r.throttled is not None]
        return cls(
            cpu_percent=own,
            others_percent=others,
            rss_mb=readings[-1].rss_mb if readings else first.rss_mb,
            gpu_percent=_mean(samples, "gpu_percent"),
            gpu_memory_mb=max(memory, default=None),
            power_w=power,
            joules_per_frame=power / fps if power is not None and fps > 0 else None,
            temperature_start_c=first.temperature_c,
            temperature_end_c=heats[-1] if heats else None,
            temperature_max_c=max(heats, default=None),
            throttled=any(throttles) if throttles else None,
            sources=tuple(dict.fromkeys(s for r in (first, *readings) for s in r.sources)),
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; null is "not available here"."""
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in {**asdict(self), "sources": list(self.sources)}.items()
        }

    def rows(self, peak_mb: float) -> tuple[tuple[str, str], ...]:
        """What it says to a person, name and value; ``peak_mb``: memory at most, in MB."""
        heat = NOT_AVAILABLE
        if self.temperature_max_c is not None:
            start, end = (
                _text(self.temperature_start_c, " °C"),
                _text(self.temperature_end_c, " °C"),
            )
            heat = (
                f"{start} at the start, {end} at the end, {self.temperature_max_c:.0f} °C at most"
            )
        throttling = {
            None: NOT_AVAILABLE,
            False: "none",
            True: "yes: the machine slowed itself down during this run",
        }[self.throttled]
        memory = f"{peak_mb:.0f} MB at most"
        if self.rss_mb is not None:
            memory = f"{self.rss_mb:.0f} MB at the end, {memory}"
        processor = _text(self.cpu_percent, " % of one core")
        if self.others_percent is not None:
            processor += f"; all other programs {self.others_percent:.0f} %"
        return (
            ("processor", processor),
            ("memory", memory),
            ("GPU", _text(self.gpu_percent, " % busy")),
            ("GPU memory", _text(self.gpu_memory_mb, " MB, other programs included")),
            ("power", _text(self.power_w, " W", digits=1)),
            ("energy", _text(self.joules_per_frame, " J per frame, idle power included", digits=3)),
            ("temperature", heat),
            ("throttling", throttling),
        )


class SensorWatch:
    """A thread that reads the sensors twice a second while the block lasts.

    ``sensors``: those to read, which stay open; None opens them for the while.
    """

    def __init__(self, sensors: Sensors | None = None, *, period_s: float = _PERIOD_S) -> None:
        self._sensors = sensors
        self._mine: Sensors | None = None
        self._period_s = period_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = 0.0
        self._samples: list[Sample] = []
        self._first: Reading | None = None
        self._busy_s: float | None = None
        self._busy_percent: float | None = None

    @property
    def first(self) -> Reading:
        """The reading when the watch began; its means are of the time before."""
        assert self._first is not None
        return self._first

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The readings since, the last one at the end of the block."""
        return tuple(self._samples)

    def use(self, fps: float) -> MachineUse:
        """What was taken from the machine, after the block; ``fps`` of its masks."""
        return MachineUse.of(self.first, self._samples, fps, busy_percent=self._busy_percent)

    def __enter__(self) -> SensorWatch:
        sensors = self._sensors
        if sensors is None:
            sensors = self._mine = Sensors()
        self._first = sensors.read()
        self._busy_s = _busy_s()
        self._started = time.monotonic()
        self._thread = threading.Thread(
            target=self._watch, args=(sensors.read,), name="edgeseg-sensors", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        busy_s, took_s = _busy_s(), time.monotonic() - self._started
        if busy_s is not None and self._busy_s is not None and took_s > 0:
            self._busy_percent = 100 * max(busy_s - self._busy_s, 0.0) / took_s
        if self._mine is not None:
            self._mine.close()

    def _watch(self, read: Callable[[], Reading]) -> None:
        period_s = self._period_s
        ended = False
        while not ended:
            ended = self._ended.wait(period_s)
            self._samples.append(Sample(time.monotonic() - self._started, read()))
            if len(self._samples) >= _REMEMBERED:
                del self._samples[1::2]
                period_s *= 2


def _busy_s() -> float | None:
    """Processor seconds that all programs together have taken since the machine started."""
    with suppress(Exception):
        import psutil

        times = psutil.cpu_times()._asdict()
        # Linux counts guests as user time too.
        free = ("idle", "iowait", "guest", "guest_nice")
        return float(sum(value for name, value in times.items() if name not in free))
    return None


def _mean(samples: Sequence[Sample], name: str) -> float | None:
    """Mean over time: each reading stands for the time since the one before."""
    total = seconds = before = 0.0
    for sample in samples:
        value, span = getattr(sample.reading, name), sample.seconds - before
        before = sample.seconds
        if value is not None:
            total += value * span
            seconds += span
    return total / seconds if seconds > 0 else None


def _text(value: float | None, unit: str, *, digits: int = 0) -> str:
    return NOT_AVAILABLE if value is None else f"{value:.{digits}f}{unit}"


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
