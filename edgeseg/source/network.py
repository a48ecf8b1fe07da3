"""Network streams through OpenCV's FFmpeg (or GStreamer, where that is built in)."""

from __future__ import annotations

import os
import threading
import time

import cv2

from edgeseg.errors import SourceError
from edgeseg.source.address import Address, without_password
from edgeseg.source.connection import READING_GRACE_S, Connect, Connection, Feed, Picture, Reader
from edgeseg.source.opencv import (
    grab_picture,
    has_backend,
    quiet_opencv,
    stated_rate,
    stated_size,
)
from edgeseg.source.status import FrameLedger

__all__ = ["ffmpeg_options", "network", "open_capture"]

_ENVIRONMENT = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_told: str | None = None


def network(
    address: Address, timeout_s: float, *, first: cv2.VideoCapture | None = None
) -> Connect:
    """What opens the stream of ``address``; ``first`` is one that was opened already."""
    ready = [] if first is None else [first]

    def connect(frames: FrameLedger, closed: threading.Event) -> Connection:
        return Feed(
            lambda: _StreamReader(address, frames, timeout_s, ready.pop() if ready else None),
            frames,
            closed,
            name=without_password(address.target),
            timeout_s=timeout_s,
        )

    return connect


def ffmpeg_options(address: Address) -> str | None:
    """What FFmpeg is told of an RTSP stream, in OpenCV's notation; None for other streams."""
    if address.kind != "rtsp":
        return None
    options = address.options
    return f"rtsp_transport;{options.transport}|max_delay;{options.latency_ms * 1000}"


def open_capture(address: Address, timeout_s: float) -> cv2.VideoCapture:
    """The capture of a stream, opened; raises SourceError where that fails."""
    name = without_password(address.target)
    started = time.monotonic()
    _tell(ffmpeg_options(address))
    with quiet_opencv():
        capture = _opened(address.target, timeout_s)
        opened = capture.isOpened()
    if opened:
        return capture
    capture.release()
    if time.monotonic() - started >= 0.9 * timeout_s:
        reason = f"gave no answer within {timeout_s:g} seconds"
    elif not has_backend(cv2.CAP_FFMPEG) and not has_backend(cv2.CAP_GSTREAMER):
        reason = "cannot be opened: this OpenCV has neither FFmpeg nor GStreamer"
    else:
        reason = "cannot be opened, or is no stream that OpenCV can read"
    raise SourceError(
        f"{name} {reason}; check the address, and that it plays elsewhere (ffplay, VLC)"
    )


class _StreamReader(Reader):
    """A stream, picture by picture; gives up after ``timeout_s`` seconds of silence."""

    def __init__(
        self,
        address: Address,
        frames: FrameLedger,
        timeout_s: float,
        capture: cv2.VideoCapture | None,
    ) -> None:
        self._name = without_password(address.target)
        self._frames = frames
        self._timeout_s = timeout_s
        self._capture = open_capture(address, timeout_s) if capture is None else capture
        self.size, self.fps = stated_size(self._capture), stated_rate(self._capture)

    def read(self) -> Picture | None:
        """The next picture, None at the end of the stream."""
        started = time.monotonic()
        pixels = grab_picture(self._capture)
        if pixels is not None:
            return Picture(pixels, time.monotonic_ns(), self._frames.number())
        # OpenCV says no more than that there is no picture: how long it took tells which it was.
        if time.monotonic() - started >= 0.9 * self._timeout_s:
            raise SourceError(f"{self._name} gave nothing for {self._timeout_s:g} seconds")
        return None

    def close(self) -> None:
        """Ends the connection."""
        with quiet_opencv():
            self._capture.release()


def _opened(url: str, timeout_s: float) -> cv2.VideoCapture:
    # OpenCV got these two in 4.5.2 and 4.5.3, for FFmpeg; GStreamer learned them later.
    limits: list[int] = []
    for name, limit_s in (
        ("CAP_PROP_OPEN_TIMEOUT_MSEC", timeout_s),
        ("CAP_PROP_READ_TIMEOUT_MSEC", timeout_s + READING_GRACE_S),
    ):
        if hasattr(cv2, name):
            limits += [int(getattr(cv2, name)), max(int(limit_s * 1000), 1)]
    if limits and has_backend(cv2.CAP_FFMPEG):
        capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, limits)
        if capture.isOpened() or not has_backend(cv2.CAP_GSTREAMER):
            return capture
        capture.release()
    return cv2.VideoCapture(url)


def _tell(options: str | None) -> None:
    """Sets what FFmpeg is told, which OpenCV reads from the environment when it opens a stream.

    What the user has set there goes first. It stays set, because OpenCV does not say when it has
    read it, and waiting for the opening would let one camera that is gone delay all others; two
    streams with different options that open at the same instant may get each other's.
    """
    global _told
    if options is not None and os.environ.get(_ENVIRONMENT) in (None, _told):
        os.environ[_ENVIRONMENT] = _told = options
