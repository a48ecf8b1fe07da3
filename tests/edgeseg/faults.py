"""A camera that fails on request, and a clock that only it moves: no test has to wait."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from edgeseg.errors import SourceError
from edgeseg.frame import Pixels
from edgeseg.source.connection import Connection, Picture, Silence
from edgeseg.source.status import Clock, FrameLedger

__all__ = ["FakeClock", "Fault", "FaultyCamera", "number_in"]

FaultKind = Literal[
    "freeze",  # it stays open, and nothing comes
    "loss",  # every other picture is missing
    "late",  # pictures come with the time of long ago
    "repeat",  # every picture comes twice
    "corrupt",  # what comes is no picture
    "resize",  # pictures of another size
    "ahead",  # its clock is an hour fast
    "behind",  # its clock is an hour slow
    "break",  # the connection breaks with an error
    "end",  # the connection ends in peace
    "refuse",  # it cannot be opened, and breaks
]


class FakeClock(Clock):
    """A clock that stands still until somebody waits, or moves it."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000_000

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return (self.ns - 1_000_000_000_000) / 1e9

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

    `connect` is what a LiveSource opens. ``sent`` are the numbers of the good pictures that it
    gave to whoever was connected.
    """

    clock: FakeClock
    faults: Sequence[Fault] = ()
    fps: float = 10.0
    opened: int = 0
    refused: int = 0
    sent: list[int] = field(default_factory=list)
    bad: int = 0
    closes: int = 0

    def has(self, kind: FaultKind) -> bool:
        """Whether that fault is on now."""
        now = self.clock.seconds
        return any(f.kind == kind and f.start_s <= now < f.end_s for f in self.faults)

    def connect(self, frames: FrameLedger, closed: threading.Event) -> Connection:
        """Opens it, if it lets itself be opened."""
        if self.has("refuse"):
            self.refused += 1
            raise SourceError("nobody answers")
        self.opened += 1
        return _Line(self, frames)

    def pixels(self, number: int) -> Pixels:
        """Picture ``number``, with the number in it."""
        height, width = (30, 20) if self.has("resize") else (24, 36)
        pixels = np.full((height, width, 3), number % 251, np.uint8)
        pixels[0, 0] = (number % 256, number // 256 % 256, number // 65536)
        return pixels


class _Line(Connection):
    """One connection to the camera."""

    fps = 10.0

    def __init__(self, camera: FaultyCamera, frames: FrameLedger) -> None:
        self._camera = camera
        self._frames = frames
        self._again: Picture | None = None

    def read(self, timeout_s: float) -> Picture | None:
        camera, clock = self._camera, self._camera.clock
        deadline_s = clock.seconds + timeout_s
        if self._again is not None:
            picture, self._again = self._again, None
            camera.bad += 1
            return picture
        while True:
            number = int(clock.seconds * camera.fps + 1e-6) + 1
            due_s = number / camera.fps
            if due_s > deadline_s + 1e-9:
                clock.ns += round((deadline_s - clock.seconds) * 1e9)
                raise Silence
            clock.ns += round((due_s - clock.seconds) * 1e9)
            if camera.has("break") or camera.has("refuse"):
                raise SourceError("the cable is out")
            if camera.has("end"):
                return None
            if camera.has("freeze") or (camera.has("loss") and number % 2):
                continue
            return self._picture(number)

    def close(self) -> None:
        self._camera.closes += 1

    def _picture(self, number: int) -> Picture:
        camera = self._camera
        index = self._frames.number()
        if camera.has("corrupt"):
            camera.bad += 1
            return Picture(np.zeros((24, 36), np.uint8), camera.clock.ns, index)
        hour_ns = 3600 * 10**9
        captured_ns = camera.clock.ns
        if camera.has("late") or camera.has("behind"):
            captured_ns -= hour_ns if camera.has("behind") else 3_000_000_000
            camera.bad += 1
            return Picture(camera.pixels(number), captured_ns, index)
        if camera.has("ahead"):
            captured_ns += hour_ns
        camera.sent.append(number)
        picture = Picture(camera.pixels(number), captured_ns, index)
        if camera.has("repeat"):
            self._again = Picture(picture.pixels, captured_ns, self._frames.number())
        return picture


def number_in(pixels: Pixels) -> int:
    """The number of the camera's picture."""
    blue, green, red = (int(value) for value in pixels[0, 0])
    return blue + 256 * green + 65536 * red
