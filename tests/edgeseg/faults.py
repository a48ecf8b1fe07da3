"""Things that fail on request: cameras, clocks, sinks, engines, and headers that lie.

On a `FakeClock` nobody waits; on a `WorldClock` the same camera is a real one, with a thread that
reads it. The soak (`tests/soak.py`) is made of the same parts.
"""

from __future__ import annotations

import functools
import math
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgeseg.engine.base import Engine, Pending, Prepared
from edgeseg.errors import SinkError, SourceError
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.result import AnyOutputs, Result
from edgeseg.sink import Sink
from edgeseg.source.connection import Connection, Feed, Picture, Reader, Silence
from edgeseg.source.opencv import as_bgr
from edgeseg.source.status import Clock, FrameLedger
from edgeseg.spec import ModelSpec

__all__ = [
    "BLINDING",
    "DELAY_S",
    "FAULTS",
    "LIES",
    "FailingSink",
    "FakeClock",
    "Fault",
    "FaultKind",
    "FaultyCamera",
    "HangingSink",
    "SlowSink",
    "StallingEngine",
    "WorldClock",
    "lying_avi",
    "number_in",
]

FaultKind = Literal[
    "freeze",  # it stays open, and nothing comes
    "hang",  # it stays open, nothing comes, and a read inside its driver cannot be ended
    "loss",  # every other picture is missing
    "late",  # pictures of long ago come, with the time of long ago
    "delay",  # pictures come later than before, with the time when they were taken
    "repeat",  # every picture comes twice
    "disorder",  # pictures come in pairs, the newer one first
    "corrupt",  # what comes is no picture
    "resize",  # pictures of another size
    "odd",  # pictures with odd sides
    "dot",  # pictures of one pixel
    "huge",  # pictures of 720 x 1280
    "grey",  # pictures without colours
    "deep",  # pictures of 16 bits
    "alpha",  # pictures with a fourth channel
    "ahead",  # its clock is an hour fast
    "behind",  # its clock is an hour slow
    "lie",  # it is opened anew, and states a wrong size and rate
    "break",  # the connection breaks with an error
    "end",  # the connection ends in peace
    "refuse",  # it cannot be opened, and breaks
]

#: every fault of a camera
FAULTS: tuple[FaultKind, ...] = get_args(FaultKind)
#: those during which a camera gives no picture that may be used
BLINDING: tuple[FaultKind, ...] = (
    "freeze", "hang", "late", "corrupt", "behind", "break", "end", "refuse"
)  # fmt: skip
#: seconds that pictures take longer during "delay"
DELAY_S = 0.25
#: (height, width) and rate that a camera states during "lie"
LIES = ((7, 9999), 0.001)

_LATE_NS = 3_000_000_000
_HOUR_NS = 3600 * 10**9
_SIZES: dict[FaultKind, tuple[int, int]] = {
    "resize": (30, 20),
    "odd": (37, 23),
    "dot": (1, 1),
    "huge": (720, 1280),
}
# The strongest channel of a picture, and the two others: far enough apart for any encoder.
_STRONG, _WEAK = 220, 20
# Of how many of its latest pictures a camera knows when they were given.
_REMEMBERED = 1024


class WorldClock(Clock):
    """The real clock, and the seconds since it was made, or since ``ago_s`` before that."""

    def __init__(self, ago_s: float = 0.0) -> None:
        self.started_ns = self.now_ns() - round(ago_s * 1e9)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return (self.now_ns() - self.started_ns) / 1e9


class FakeClock(WorldClock):
    """A clock that stands still until somebody waits, or moves it."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000_000
        super().__init__()

    def now_ns(self) -> int:
        return self.ns

    def wait(self, flag: threading.Event, seconds: float) -> bool:
        if not flag.is_set():
            self.ns += round(seconds * 1e9)
        return flag.is_set()


@dataclass(frozen=True)
class Fault:
    """What goes wrong, from one second of the clock to another."""

    kind: FaultKind
    start_s: float
    end_s: float


@dataclass
class FaultyCamera:
    """The world in front of a camera: picture number n is taken n / fps seconds after the start.

    `connect` is what a LiveSource opens; with ``feeds`` a thread reads it ahead, as with every
    real camera (and the clock has to be real). ``faults``: in any order, or, if an iterator makes
    them, in that of their starts. ``size``: (height, width) of pictures without a fault.

    ``injected`` counts what each fault did: pictures that were withheld or changed, connections
    that were broken or refused. ``sent`` are the numbers of the good pictures that it gave to
    whoever was connected; without ``remembers`` they are only counted, in ``good``.
    """

    clock: WorldClock
    faults: Iterable[Fault] = ()
    fps: float = 10.0
    size: tuple[int, int] = (24, 36)
    feeds: bool = False
    remembers: bool = True
    opened: int = 0
    refused: int = 0
    sent: list[int] = field(default_factory=list)
    good: int = 0
    bad: int = 0
    closes: int = 0
    injected: Counter[FaultKind] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        in_order = isinstance(self.faults, Iterator)
        faults = self.faults if in_order else sorted(self.faults, key=lambda fault: fault.start_s)
        self._coming = iter(faults)
        self._next = next(self._coming, None)
        self._on: list[Fault] = []
        self._lock = threading.Lock()
        #: the second at which the latest fault that leaves nothing to see ends, or has ended
        self.blind_until_s = 0.0
        self.latest = 0
        # Of picture n, at n % _REMEMBERED: its number, when it was handed over, and by how much it
        # was delayed, in nanoseconds.
        self._given = np.full((_REMEMBERED, 3), -1, np.int64)

    def active(self) -> frozenset[FaultKind]:
        """The faults that are on now."""
        now_s = self.clock.seconds
        with self._lock:
            while self._next is not None and self._next.start_s <= now_s:
                self._on.append(self._next)
                if self._next.kind in BLINDING:
                    self.blind_until_s = max(self.blind_until_s, self._next.end_s)
                self._next = next(self._coming, None)
            self._on = [fault for fault in self._on if now_s < fault.end_s]
            return frozenset(fault.kind for fault in self._on)

    def has(self, kind: FaultKind) -> bool:
        """Whether that fault is on now."""
        return kind in self.active()

    def taken_ns(self, number: int) -> int:
        """When picture ``number`` was taken, whatever its time stamp says."""
        return self.clock.started_ns + round(number / self.fps * 1e9)

    def given(self, number: int) -> tuple[int, int] | None:
        """When that picture was handed over, and by how much "delay" had delayed it, in ns.

        None if it was not handed over as a good one, or a thousand pictures ago.
        """
        found, at_ns, delayed_ns = (int(value) for value in self._given[number % _REMEMBERED])
        return (at_ns, delayed_ns) if found == number else None

    def connect(self, frames: FrameLedger, closed: threading.Event) -> Connection:
        """Opens it, if it lets itself be opened."""
        if not self.feeds:
            return self._line(frames)
        return Feed(
            lambda: _LineReader(self._line(frames)), frames, closed, name="camera", timeout_s=10.0
        )

    def pixels(self, number: int) -> Pixels:
        """Picture ``number`` as it comes through the reader, with the number in it."""
        return as_bgr(self._raw(number, self.active()))

    def colour(self, number: int) -> tuple[int, int, int]:
        """What all of picture ``number`` is, but for the pixels with its number; BGR."""
        blue, green, red = (_STRONG if number % 3 == channel else _WEAK for channel in range(3))
        return blue, green, red

    def _line(self, frames: FrameLedger) -> _Line:
        active = self.active()
        if "refuse" in active:
            self.refused += 1
            self.injected["refuse"] += 1
            raise SourceError("nobody answers")
        self.opened += 1
        return _Line(self, frames, lies="lie" in active)

    def _raw(self, number: int, active: frozenset[FaultKind]) -> NDArray[Any]:
        """The picture as a camera or a decoder has it: grey, of 16 bits, with a fourth channel."""
        height, width = next((_SIZES[kind] for kind in active if kind in _SIZES), self.size)
        picture: NDArray[Any] = _plain(height, width, self.colour(number)).copy()
        if width < 3:
            picture[0, 0] = (number % 256, number // 256 % 256, number // 65536)
            return picture
        picture[0, :3] = [
            [number % 256] * 3, [number // 256 % 256] * 3, [number // 65536] * 3
        ]  # fmt: skip
        if "grey" in active:
            return picture[..., 0]
        if "deep" in active:
            return picture.astype(np.uint16) << 8
        if "alpha" in active:
            return np.dstack([picture, np.full((height, width), 77, np.uint8)])
        return picture


@functools.cache
def _plain(height: int, width: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A picture of one colour; not to be changed."""
    return np.full((height, width, 3), colour, np.uint8)


class _Line(Connection):
    """One connection to the camera."""

    def __init__(self, camera: FaultyCamera, frames: FrameLedger, *, lies: bool) -> None:
        self._camera = camera
        self._frames = frames
        self._more: list[_Made] = []
        self._held: int | None = None
        self._passed = 0
        self._ended = threading.Event()
        self._lies = lies
        self.size, self.fps = LIES if lies else (None, camera.fps)
        if lies:
            camera.injected["lie"] += 1

    def read(self, timeout_s: float) -> Picture | None:
        camera, clock = self._camera, self._camera.clock
        deadline_s = clock.seconds + timeout_s
        while True:
            if self._more:
                return self._handed(self._more.pop(0))
            number = max(int(clock.seconds * camera.fps + 1e-6), self._passed) + 1
            due_s = number / camera.fps
            if due_s > deadline_s + 1e-9:
                if clock.wait(self._ended, deadline_s - clock.seconds):
                    return None
                raise Silence
            if clock.wait(self._ended, due_s - clock.seconds):
                return None
            self._passed = number
            active = camera.active()
            if "hang" in active:
                camera.injected["hang"] += 1
                self._hang(deadline_s)
                continue
            if "break" in active or "refuse" in active:
                camera.injected["break" if "break" in active else "refuse"] += 1
                raise SourceError("the cable is out")
            if "lie" in active and not self._lies:
                # A header is read when a stream is opened.
                raise SourceError("it starts anew")
            if "end" in active:
                camera.injected["end"] += 1
                return None
            if "freeze" in active:
                camera.injected["freeze"] += 1
            elif "loss" in active and number % 2:
                camera.injected["loss"] += 1
            else:
                self._take(number, active)

    def close(self) -> None:
        self.interrupt()
        self._camera.closes += 1

    def interrupt(self) -> None:
        self._ended.set()

    def _hang(self, deadline_s: float) -> None:
        """Silence up to the deadline, or, in a thread of its own, until the driver lets go."""
        clock = self._camera.clock
        if self._camera.feeds:
            while self._camera.has("hang"):
                time.sleep(0.005)
        elif not clock.wait(self._ended, max(deadline_s - clock.seconds, 0)):
            raise Silence

    def _take(self, number: int, active: frozenset[FaultKind]) -> None:
        """Puts picture ``number`` on the line, or what a fault makes of it."""
        camera = self._camera
        for kind in active:
            camera.injected[kind] += kind not in ("lie", "disorder", "loss")
        stamp_ns = camera.taken_ns(number)
        if "corrupt" in active:
            self._spoilt((np.zeros((24, 36), np.uint8), np.zeros((24, 0, 3), np.uint8),
                          np.zeros((24, 36, 3), np.float32), np.zeros((4, 4, 2), np.uint8),
                          )[number % 4], stamp_ns)  # fmt: skip
            return
        if "late" in active or "behind" in active:
            # The one is old, the other says so.
            hours = "behind" in active
            shown = number if hours else max(number - round(_LATE_NS / 1e9 * camera.fps), 1)
            pixels = as_bgr(camera._raw(shown, active))
            self._spoilt(pixels, stamp_ns - (_HOUR_NS if hours else _LATE_NS))
            return
        now_ns = stamp_ns
        if "delay" in active:
            number -= math.ceil(DELAY_S * camera.fps)
            stamp_ns = camera.taken_ns(number)
        if "disorder" in active and self._held is None:
            self._held = number
            return
        held, self._held = self._held, None
        if number <= camera.latest:
            # It was there before the delay began, in time; this is an old one.
            again = max(number, 1)
            pixels = as_bgr(camera._raw(again, active))
            self._more.append(_Made(pixels, stamp_ns, again, now_ns - stamp_ns, good=False))
            return
        captured_ns = stamp_ns + (_HOUR_NS if "ahead" in active else 0)
        pixels = as_bgr(camera._raw(number, active))
        self._more.append(_Made(pixels, captured_ns, number, now_ns - stamp_ns))
        if held is not None and "disorder" in active:
            camera.injected["disorder"] += 1
            self._spoilt(as_bgr(camera._raw(held, active)), camera.taken_ns(held))
        if "repeat" in active:
            self._spoilt(pixels, captured_ns)

    def _spoilt(self, pixels: NDArray[Any], captured_ns: int) -> None:
        self._more.append(_Made(pixels, captured_ns, None))

    def _handed(self, made: _Made) -> Picture:
        camera, number = self._camera, made.number
        if number is not None:
            given = (number, camera.clock.now_ns(), made.delayed_ns)
            camera._given[number % _REMEMBERED] = given
        if number is None or not made.good:
            camera.bad += 1
        else:
            camera.latest = number
            camera.good += 1
            if camera.remembers:
                camera.sent.append(number)
        return Picture(made.pixels, made.captured_ns, self._frames.number())


@dataclass(frozen=True, eq=False)
class _Made:
    """A picture before it is handed over.

    ``number`` is None for one that must not be used; not ``good`` is one of which a newer one was
    there before, and which may be used if that got lost on its way.
    """

    pixels: NDArray[Any]
    captured_ns: int
    number: int | None
    delayed_ns: int = 0
    good: bool = True


class _LineReader(Reader):
    """The same connection, read by a `Feed`."""

    def __init__(self, line: _Line) -> None:
        self._line = line
        self.size, self.fps = line.size, line.fps

    def read(self) -> Picture | None:
        while True:
            try:
                return self._line.read(1.0)
            except Silence:
                continue

    def close(self) -> None:
        self._line.close()

    def interrupt(self) -> None:
        self._line.interrupt()


def number_in(pixels: Pixels) -> int:
    """The number of the camera's picture."""
    wide = pixels.shape[1] >= 3
    low, middle, high = (int(value) for value in (pixels[0, :3, 0] if wide else pixels[0, 0]))
    return low + 256 * middle + 65536 * high


# --- what comes behind the masks


class SlowSink(Sink):
    """A sink that takes its time over each result."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._closed = threading.Event()
        self.indices: list[int] = []

    def write(self, result: Result) -> None:
        self._closed.wait(self._seconds)
        self.indices.append(result.index)

    def close(self) -> None:
        self._closed.set()


class FailingSink(Sink):
    """A sink that raises ``error`` after some results."""

    def __init__(self, error: Exception | None = None, *, after: int = 0) -> None:
        self._error = error or SinkError("the disk is full")
        self._left = after
        self.aborted = 0

    def write(self, result: Result) -> None:
        if self._left == 0:
            raise self._error
        self._left -= 1

    def abort(self) -> None:
        self.aborted += 1


class HangingSink(Sink):
    """A sink that does not come back from a result until ``go_on`` is set."""

    def __init__(self, *, after: int = 0) -> None:
        self.go_on = threading.Event()
        self.hanging = threading.Event()
        self._left = after

    def write(self, result: Result) -> None:
        if self._left == 0:
            self.hanging.set()
            self.go_on.wait()
            return
        self._left -= 1


class StallingEngine:
    """An engine that stands still when it is told to.

    ``network_ns`` of its outputs is all the time that a frame was inside, standing still included.
    ``stalls`` are (start, end) pairs of ``time.monotonic_ns()``, of which the latest hundred stay.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._due_s = 0.0
        self.stalled = 0
        self.stalls: deque[tuple[int, int]] = deque(maxlen=100)

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def spec(self) -> ModelSpec:
        return self._engine.spec

    @property
    def description(self) -> str:
        return self._engine.description

    @property
    def frames_in_flight(self) -> int:
        return self._engine.frames_in_flight

    def stall(self, seconds: float) -> None:
        """Lets the next frame wait inside."""
        with self._lock:
            self._due_s = seconds

    def run(self, pixels: Pixels) -> AnyOutputs:
        return self._engine.run(pixels)

    def prepare(self, frame: Frame, geometry: Geometry) -> Prepared:
        return self._engine.prepare(frame, geometry)

    def submit(self, prepared: Prepared) -> Pending:
        started_ns = time.monotonic_ns()
        with self._lock:
            due_s, self._due_s = self._due_s, 0.0
        if due_s:
            time.sleep(due_s)
            self.stalls.append((started_ns, time.monotonic_ns()))
            self.stalled += 1
        return _Inside(self._engine.submit(prepared), started_ns)

    def close(self) -> None:
        self._engine.close()


class _Inside:
    """A frame inside a `StallingEngine`."""

    def __init__(self, pending: Pending, started_ns: int) -> None:
        self._pending = pending
        self._started_ns = started_ns

    def outputs(self) -> AnyOutputs:
        outputs = self._pending.outputs()
        inside_ns = time.monotonic_ns() - self._started_ns
        return replace(outputs, network_ns=inside_ns, head_ns=0, fit_ns=0)


# --- headers


def lying_avi(
    content: bytes,
    *,
    frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> bytes:
    """An AVI file whose headers state something else than what is in it.

    ``avih`` has microseconds per frame, the number of frames, and the size; ``strh`` rate, scale
    and length; ``strf`` the size once more (Microsoft, AVI RIFF File Reference).
    """
    lying = bytearray(content)
    main, stream, kind = (content.index(name) + 8 for name in (b"avih", b"strh", b"strf"))
    if frames is not None:
        struct.pack_into("<I", lying, main + 16, frames)
        struct.pack_into("<I", lying, stream + 32, frames)
    if fps is not None:
        struct.pack_into("<I", lying, main, round(1e6 / fps))
        struct.pack_into("<II", lying, stream + 20, 1000, round(1000 * fps))
    if size is not None:
        struct.pack_into("<II", lying, main + 32, size[1], size[0])
        struct.pack_into("<ii", lying, kind + 4, size[1], size[0])
    return bytes(lying)
