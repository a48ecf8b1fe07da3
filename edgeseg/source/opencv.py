"""OpenCV's readers of files, cameras and streams, and its silence."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np

from edgeseg.frame import Pixels

__all__ = [
    "as_bgr",
    "grab_picture",
    "has_backend",
    "promised_length",
    "quiet_opencv",
    "stated_rate",
    "stated_size",
]

_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_before: int | None = None


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Keeps OpenCV and its FFmpeg from writing to standard error inside the ``with`` block.

    What went wrong is told by EdgeSeg's own error. Setting OPENCV_LOG_LEVEL brings OpenCV's
    messages back, OPENCV_FFMPEG_LOGLEVEL those of FFmpeg, which reads it once per process.
    """
    global _quiet_depth, _quiet_before
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if "OPENCV_LOG_LEVEL" in os.environ:
        yield
        return
    # Several threads may be inside: the first turns the logging off, the last turns it on again.
    with _quiet_lock:
        _quiet_depth += 1
        if _quiet_depth == 1:
            _quiet_before = _swap_log_level(0)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0 and _quiet_before is not None:
                _swap_log_level(_quiet_before)


def has_backend(backend: int) -> bool:
    """Whether ``backend`` (cv2.CAP_FFMPEG, ...) is built in, not merely known by name."""
    # In wheels GStreamer is listed as a plug-in that nobody has installed.
    registry = cv2.videoio_registry
    if hasattr(registry, "hasBackend"):
        return bool(registry.hasBackend(backend))
    return backend in registry.getBackends()


def stated_size(capture: cv2.VideoCapture) -> tuple[int, int] | None:
    """(height, width) that the capture states, None if it states none."""
    height = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    width = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
    return (height, width) if height > 0 and width > 0 else None


def stated_rate(capture: cv2.VideoCapture) -> float | None:
    """Frames per second that the capture states, None if it states none."""
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    # Streams without a rate of their own show their clock here (90 000 ticks per second).
    return fps if 0 < fps <= 1000 else None


def promised_length(capture: cv2.VideoCapture) -> int | None:
    """Number of frames that the header promises, None if it promises none."""
    # A stream without a duration shows as a huge negative number.
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < 1e9 else None


def grab_picture(capture: cv2.VideoCapture) -> Pixels | None:
    """The next picture, None where there is none: at the end, after an error, and in silence."""
    with quiet_opencv():
        try:
            if not capture.grab():
                return None
            found, picture = capture.retrieve()
        except cv2.error:
            return None
    if not found or picture is None or picture.size == 0:
        return None
    return as_bgr(picture)


def as_bgr(picture: Any) -> Pixels:
    """Any picture OpenCV gives -> (height, width, 3) uint8 BGR; the same array where it is one."""
    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    if picture.ndim == 2 or picture.shape[2] == 1:
        # As fast as cvtColor, of which OpenCV 5 keeps 900 bytes for every thread that ever called
        # it, and a stream that is opened anew is read by a new thread.
        picture = cv2.merge([picture.reshape(picture.shape[:2])] * 3)
    elif picture.shape[2] == 4:
        picture = cv2.cvtColor(picture, cv2.COLOR_BGRA2BGR)
    pixels: Pixels = picture
    return pixels


def _swap_log_level(level: int) -> int | None:
    """Sets OpenCV's log level and gives the one before, None where this OpenCV has no such call."""
    # OpenCV 5 has them in cv2.utils.logging, OpenCV 4 (from 4.5.x on) in cv2 itself.
    owners: tuple[Any, ...] = (getattr(getattr(cv2, "utils", None), "logging", None), cv2)
    for owner in owners:
        if hasattr(owner, "setLogLevel") and hasattr(owner, "getLogLevel"):
            before = int(owner.getLogLevel())
            owner.setLogLevel(level)
            return before
    return None
