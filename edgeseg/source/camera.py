"""Cameras of this computer, through OpenCV."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import cv2

from edgeseg.errors import SourceError
from edgeseg.source.address import Address
from edgeseg.source.connection import Connect, Connection, Feed, Picture, Reader
from edgeseg.source.images import natural
from edgeseg.source.opencv import (
    grab_picture,
    has_backend,
    quiet_opencv,
    stated_rate,
    stated_size,
)
from edgeseg.source.status import FrameLedger

__all__ = ["camera", "camera_name", "cameras", "captured_at", "four_letters"]

# Formats by the names that people know them by.
_FORMATS = {"mjpeg": "MJPG", "yuyv": "YUYV", "yuy2": "YUYV", "grey": "GREY"}
# The driver's time of a frame is believed when it is no older than this.
_PLAUSIBLE_NS = 2_000_000_000


def cameras() -> tuple[str, ...]:
    """Device files of the cameras that Linux knows; empty elsewhere."""
    found = Path("/dev").glob("video*") if sys.platform == "linux" else ()
    return tuple(str(path) for path in sorted(found, key=natural))


def camera(address: Address, timeout_s: float) -> Connect:
    """What opens the camera of ``address``."""

    def connect(frames: FrameLedger, closed: threading.Event) -> Connection:
        return Feed(
            lambda: _CameraReader(address, frames),
            frames,
            closed,
            name=camera_name(address),
            timeout_s=timeout_s,
        )

    return connect


def camera_name(address: Address) -> str:
    """What a camera is called in messages: ``camera 0``, or its device file."""
    return f"camera {address.target}" if address.target.isdecimal() else address.target


def four_letters(name: str) -> str:
    """The four letters that V4L2 calls a format by: ``"mjpeg"`` -> ``"MJPG"``."""
    return _FORMATS.get(name.lower(), name.upper()).ljust(4)


def captured_at(driver_ms: float, now_ns: int) -> int:
    """When a frame was taken, from the time that the driver states, in monotonic milliseconds.

    ``now_ns`` where the driver states none, or another clock's: it is believed only for a moment
    of the last two seconds.
    """
    driver_ns = driver_ms * 1e6
    return int(driver_ns) if 0 <= now_ns - driver_ns <= _PLAUSIBLE_NS else now_ns


class _CameraReader(Reader):
    """A camera that was asked for a format, a size and a rate; ``notes`` says what it chose."""

    def __init__(self, address: Address, frames: FrameLedger) -> None:
        self._name = camera_name(address)
        self._frames = frames
        self._read = 0
        options = address.options
        device: int | str = int(address.target) if address.target.isdecimal() else address.target
        node = Path(f"/dev/video{device}" if isinstance(device, int) else device)
        if sys.platform == "linux":
            if not node.exists():
                self._refuse("is not here")
            if not os.access(node, os.R_OK | os.W_OK):
                self._refuse("may not be used by you (`sudo usermod -aG video $USER`, log in anew)")
        backend = cv2.CAP_ANY
        if sys.platform == "linux" and has_backend(cv2.CAP_V4L2):
            backend = cv2.CAP_V4L2
        self._monotonic = backend == cv2.CAP_V4L2
        with quiet_opencv():
            self._capture = cv2.VideoCapture(device, backend)
            opened = self._capture.isOpened()
            if opened:
                # The driver's queue holds old frames; not every backend lets it be shortened.
                self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
                # The format first: it decides which sizes and rates there are.
                if options.format is not None:
                    code = cv2.VideoWriter.fourcc(*four_letters(options.format))
                    self._capture.set(cv2.CAP_PROP_FOURCC, code)
                if options.size is not None:
                    self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, options.size[1])
                    self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, options.size[0])
                if options.fps is not None:
                    self._capture.set(cv2.CAP_PROP_FPS, options.fps)
        if not opened:
            self._capture.release()
            self._refuse("cannot be opened; another program may hold it")
        self.size, self.fps = stated_size(self._capture), stated_rate(self._capture)
        self.notes = self._choices(address)

    def read(self) -> Picture | None:
        """The next picture; a camera has no end, so that SourceError is raised where it stops."""
        pixels = grab_picture(self._capture)
        now_ns = time.monotonic_ns()
        if pixels is None:
            self._refuse(
                f"stopped giving frames after {self._read}"
                if self._read
                else "opens, and gives no frames"
            )
        self._read += 1
        captured_ns = now_ns
        if self._monotonic:
            # Read before the next grab: it is of the frame that was grabbed last.
            captured_ns = captured_at(self._capture.get(cv2.CAP_PROP_POS_MSEC), now_ns)
        return Picture(pixels, captured_ns, self._frames.number())

    def close(self) -> None:
        """Gives the camera back."""
        with quiet_opencv():
            self._capture.release()

    def _choices(self, address: Address) -> tuple[str, ...]:
        """Where the camera did not follow the request."""
        wanted, choices = address.options, []
        if wanted.size is not None and self.size is not None and self.size != wanted.size:
            choices.append(
                f"{self._name} was asked for {wanted.size[0]}x{wanted.size[1]} and gives "
                f"{self.size[0]}x{self.size[1]}"
            )
        if wanted.fps is not None and self.fps is not None and abs(self.fps - wanted.fps) > 0.5:
            choices.append(
                f"{self._name} was asked for {wanted.fps:g} frames per second and gives "
                f"{self.fps:g}"
            )
        if wanted.format is not None:
            code = int(self._capture.get(cv2.CAP_PROP_FOURCC))
            given = code.to_bytes(4, "little", signed=code < 0).decode("latin-1")
            if given.isprintable() and given != four_letters(wanted.format):
                choices.append(f"{self._name} was asked for {wanted.format} and gives {given}")
        return tuple(choices)

    def _refuse(self, reason: str) -> NoReturn:
        here = ", ".join(cameras())
        there = f"the cameras here are {here}" if here else "no camera was found"
        raise SourceError(f"{self._name} {reason}; {there}, and `edgeseg doctor` tells more")
