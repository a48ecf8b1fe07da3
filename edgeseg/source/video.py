"""Video files, on the disk or behind http."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import cv2

from edgeseg.errors import SourceError
from edgeseg.frame import Frame, Pixels
from edgeseg.source.base import Source
from edgeseg.source.opencv import (
    grab_picture,
    promised_length,
    quiet_opencv,
    stated_rate,
    stated_size,
)

__all__ = ["CaptureSource", "VideoSource"]

# Files may differ from their header by one frame without anything being wrong: many containers
# state a duration, and the count is made from it.
_HEADER_TOLERANCE = 1


class CaptureSource(Source):
    """The pictures of a recording that OpenCV has opened, to its end; nothing is dropped.

    ``name`` is what it is called in messages; ``reopen`` opens it once more for another pass, of
    which there are ``loop`` (``math.inf`` without end). Ends where the last frame can be decoded,
    whatever the header promises. Raises SourceError when no frame of it can be decoded.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        capture: cv2.VideoCapture,
        *,
        reopen: Callable[[], cv2.VideoCapture] | None = None,
        loop: float = 0,
    ) -> None:
        promised = promised_length(capture)
        endless = promised is None or math.isinf(loop)
        super().__init__(
            uri,
            live=False,
            size=stated_size(capture),
            fps=stated_rate(capture),
            length=None if promised is None or endless else promised * (1 + int(loop)),
        )
        self._name = name
        self._capture = capture
        self._reopen = reopen
        self._passes_left = loop
        self._promised = promised
        self._index = 0
        self._in_pass = 0
        self._ended = False
        # Read ahead by one: a header says little about whether anything behind it can be decoded.
        self._ahead: Pixels | None = grab_picture(capture)
        if self._ahead is None:
            capture.release()
            raise SourceError(
                f"{name} opens as a video, and not one frame of it can be decoded; "
                "`ffmpeg -i FILE out.mp4` shows why"
            )
        self._size = (int(self._ahead.shape[0]), int(self._ahead.shape[1]))

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether the header told the truth, once it was read to its end."""
        if not self._ended or self._promised is None:
            return ()
        if abs(self._promised - self._in_pass) <= _HEADER_TOLERANCE:
            return ()
        note = (
            f"the header of {self._name} promises {self._promised} frames and {self._in_pass} "
            "could be read"
        )
        return (note,)

    def _read(self) -> Frame | None:
        pixels, self._ahead = self._ahead, None
        if pixels is None:
            pixels = grab_picture(self._capture)
        if pixels is None:
            self._ended = True
            if self._passes_left <= 0 or self._reopen is None:
                return None
            self._passes_left -= 1
            self._release()
            self._capture = self._reopen()
            self._in_pass = 0
            pixels = grab_picture(self._capture)
            if pixels is None:
                raise SourceError(f"{self._name} could be read once and not again")
        frame = Frame(pixels, time.monotonic_ns(), self._index)
        self._index += 1
        self._in_pass += 1
        return frame

    def _release(self) -> None:
        with quiet_opencv():
            self._capture.release()


class VideoSource(CaptureSource):
    """A video file; ``loop`` is how often it is read again, ``math.inf`` for without end.

    Raises SourceError for a file that is no video, or of which no frame can be decoded.
    """

    def __init__(self, uri: str, path: Path, *, loop: float = 0) -> None:
        if path.stat().st_size == 0:
            raise SourceError(f"{path} is empty, and a video was promised")
        if not os.access(path, os.R_OK):
            raise SourceError(f"{path} may not be read; change its permissions")

        def opened() -> cv2.VideoCapture:
            with quiet_opencv():
                capture = cv2.VideoCapture(str(path))
                if capture.isOpened():
                    return capture
                capture.release()
            raise SourceError(
                f"{path} is no video that OpenCV can read: it is damaged, incomplete, or of "
                "another kind; `ffmpeg -i FILE out.mp4` converts most"
            )

        super().__init__(uri, str(path), opened(), reopen=opened, loop=loop)
