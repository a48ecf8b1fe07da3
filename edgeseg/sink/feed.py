"""Pictures into a GStreamer pipeline: the appsrc at its front, and the pipeline itself."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

from edgeseg.errors import SinkError
from edgeseg.frame import Pixels
from edgeseg.source.gstreamer import has_element, is_available

__all__ = ["FRONT", "Feed", "Shape", "gstreamer_library", "works"]

#: the element that pictures come in through; it never makes the one who writes wait
FRONT = "appsrc name=edgeseg is-live=true format=time block=false"

_INSTALL = (
    "sudo apt-get install -y python3-gi gir1.2-gst-plugins-base-1.0 gir1.2-gst-rtsp-server-1.0 "
    "gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly "
    "gstreamer1.0-rtsp"
)
# Pictures that may wait for the encoder. One is being encoded, one is next.
_WAITING = 2
# Pictures are at least this far apart, in nanoseconds, whatever the clock of the source does.
_LEAST_STEP_NS = 1_000_000


def gstreamer_library(wanted_for: str) -> Any:
    """GStreamer's module; SinkError, with the packages to install, where it is missing."""
    if not is_available():
        raise SinkError(
            f"{wanted_for} goes through GStreamer, and its Python side (PyGObject) cannot be "
            f"imported; `{_INSTALL}`, and a virtual environment made with --system-site-packages"
        )
    from gi.repository import Gst

    return Gst


def works(name: str) -> bool:
    """Whether an element is installed and its device, where it needs one, can be opened."""
    if not has_element(name):
        return False
    from gi.repository import Gst

    element = Gst.ElementFactory.make(name, None)
    if element is None:
        return False
    try:
        return bool(element.set_state(Gst.State.READY) != Gst.StateChangeReturn.FAILURE)
    finally:
        element.set_state(Gst.State.NULL)


class Shape:
    """Size and rate of the pictures of a stream: those of the first one, for all of them.

    ``height`` and ``width`` are even, as most encoders want them: an odd side loses its last line.
    Later pictures of another size are scaled.
    """

    def __init__(self, picture: Pixels, fps: float) -> None:
        self.height = max(picture.shape[0] // 2 * 2, 2)
        self.width = max(picture.shape[1] // 2 * 2, 2)
        self.fps = fps
        self._first = picture.shape[:2]
        # A row of a raw picture in GStreamer has a multiple of four bytes.
        self._stride = -(-self.width * 3 // 4) * 4

    @property
    def caps(self) -> str:
        """What the pictures are, to GStreamer."""
        rate = max(round(self.fps * 1000), 1)
        common = math.gcd(rate, 1000)
        return (
            f"video/x-raw,format=BGR,width={self.width},height={self.height},"
            f"framerate={rate // common}/{1000 // common}"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of one picture."""
        nbytes: int = self.height * self._stride
        return nbytes

    def bytes_of(self, picture: Pixels) -> bytes:
        """The picture in this shape, as GStreamer lays it out."""
        size = (self.height, self.width)
        if picture.shape[:2] != self._first or min(self._first) < 2:
            picture = cv2.resize(  # type: ignore[assignment]
                picture, (self.width, self.height), interpolation=cv2.INTER_AREA
            )
        rows = picture[: size[0], : size[1]].reshape(size[0], -1)
        if rows.shape[1] != self._stride:
            rows = np.pad(rows, ((0, 0), (0, self._stride - rows.shape[1])))
        return rows.tobytes()


class Feed:
    """The way into one running pipeline, through its appsrc.

    ``push`` never waits: where the encoder has two pictures before it already, the next one is
    left out, and counted in ``dropped``; the others are in ``pushed``.
    """

    def __init__(self, gst: Any, appsrc: Any, shape: Shape) -> None:
        self._gst = gst
        self._appsrc = appsrc
        self._shape = shape
        self._origin_ns: int | None = None
        self._last_ns = -_LEAST_STEP_NS
        self.pushed = 0
        self.dropped = 0
        appsrc.set_property("caps", gst.Caps.from_string(shape.caps))

    def push(self, content: bytes, captured_ns: int) -> bool:
        """Hands over one picture, taken at ``captured_ns``; False when the pipeline has ended."""
        if self._appsrc.get_property("current-level-bytes") >= _WAITING * self._shape.nbytes:
            self.dropped += 1
            return True
        running_ns = self._running_ns()
        if running_ns is None:
            # It has no clock yet: it is not playing.
            self.dropped += 1
            return True
        # By the time it was taken, so that pictures move evenly, however long each was worked on.
        if self._origin_ns is None:
            self._origin_ns = captured_ns - running_ns
        stamp_ns = max(captured_ns - self._origin_ns, self._last_ns + _LEAST_STEP_NS)
        self._last_ns = stamp_ns
        buffer = self._gst.Buffer.new_wrapped(content)
        buffer.pts = stamp_ns
        buffer.duration = round(1e9 / self._shape.fps)
        if self._appsrc.emit("push-buffer", buffer) != self._gst.FlowReturn.OK:
            return False
        self.pushed += 1
        return True

    def end(self) -> None:
        """Tells the pipeline that nothing more comes."""
        self._appsrc.emit("end-of-stream")

    def _running_ns(self) -> int | None:
        clock = self._appsrc.get_clock()
        if clock is None:
            return None
        running_ns: int = clock.get_time() - self._appsrc.get_base_time()
        return max(running_ns, 0)
