"""GStreamer pipelines: CSI cameras, RTSP where GStreamer is installed, and any other by its text.

Frames come through PyGObject's appsink, or, without PyGObject, through an OpenCV that was built
with GStreamer (as JetPack's is). The texts are functions of the elements that are installed, so
that a Jetson decodes in hardware, in NVMM memory, and a desktop in software. What needs a Jetson
(nvarguscamerasrc, nvvidconv) is tested as text only.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from edgeseg.errors import SourceError
from edgeseg.source.address import Address, Options
from edgeseg.source.connection import READING_GRACE_S, Connect, Connection, Feed, Picture, Reader
from edgeseg.source.opencv import (
    as_bgr,
    grab_picture,
    has_backend,
    quiet_opencv,
    stated_rate,
    stated_size,
)
from edgeseg.source.status import FrameLedger

__all__ = ["csi_text", "gst_text", "gstreamer", "has_element", "is_available", "rtsp_text"]

#: whether an element of that name is installed
Has = Callable[[str], bool]

_INSTALL = (
    "sudo apt-get install -y python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-good "
    "gstreamer1.0-plugins-bad gstreamer1.0-libav"
)
# The size of a CSI camera that nobody asked anything of: a mode of all common sensors.
_CSI_SIZE = (720, 1280)
_CSI_FPS = 30.0
# How old a frame may be by the pipeline's clock; anything else is a clock that jumped.
_PLAUSIBLE_NS = 10_000_000_000
_SLICE_NS = 50_000_000
# max-buffers=1: only the newest waits. sync=false: it is given out when it is there.
_SINK = "appsink name=edgeseg max-buffers=1 sync=false"


def csi_text(sensor: str, options: Options) -> str:
    """The pipeline of a Jetson's CSI camera, up to the sink.

    The picture stays in NVMM memory up to nvvidconv, which also turns it (``flip``: 2 is upside
    down) in hardware.
    """
    height, width = options.size or _CSI_SIZE
    rate = _fraction(options.fps or _CSI_FPS)
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! video/x-raw(memory:NVMM),width={width},"
        f"height={height},framerate={rate},format=NV12 ! nvvidconv flip-method={options.flip} ! "
        "video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR"
    )


def rtsp_text(url: str, options: Options, has: Has) -> str:
    """The pipeline of an RTSP stream, up to the sink.

    decodebin takes the decoder of the highest rank, which is the hardware's where there is one;
    its pictures are brought out of NVMM memory by what is installed for that.
    """
    quoted = url.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f'rtspsrc location="{quoted}" latency={options.latency_ms} protocols={options.transport} '
        "drop-on-latency=true ! application/x-rtp,media=video ! decodebin ! "
        f"{_to_bgr(has)}"
    )


def gst_text(text: str, has: Has) -> str:
    """A user's pipeline, up to the sink; as it is, if it ends in an appsink of its own."""
    return text if _has_sink(text) else f"{text} ! {_to_bgr(has)}"


def is_available() -> bool:
    """Whether PyGObject and GStreamer's library can be imported."""
    return _gst() is not None


def has_element(name: str) -> bool:
    """Whether GStreamer is here and has an element of that name."""
    gst = _gst()
    return gst is not None and gst.ElementFactory.find(name) is not None


def gstreamer(address: Address, timeout_s: float) -> Connect:
    """What opens the pipeline that ``address`` asks for."""

    def connect(frames: FrameLedger, closed: threading.Event) -> Connection:
        return Feed(
            lambda: _reader(address, frames, timeout_s),
            frames,
            closed,
            name=address.shown,
            timeout_s=timeout_s,
        )

    return connect


def _reader(address: Address, frames: FrameLedger, timeout_s: float) -> Reader:
    name = address.shown
    if _gst() is not None:
        return _AppSinkReader(name, _text(address, has_element), frames, timeout_s)
    if has_backend(cv2.CAP_GSTREAMER):
        # Which elements there are cannot be asked through OpenCV; nvvidconv is where csi:// is.
        text = _text(address, lambda element: False)
        return _OpenCvReader(name, text, frames)
    raise SourceError(
        f"{name} is read through GStreamer, and its Python side (PyGObject) cannot be imported; "
        f"`{_INSTALL}`, and a virtual environment made with --system-site-packages"
    )


def _text(address: Address, has: Has) -> str:
    if address.kind == "csi":
        return csi_text(address.target, address.options)
    if address.kind == "rtsp":
        return rtsp_text(address.target, address.options, has)
    return gst_text(address.target, has)


def _has_sink(text: str) -> bool:
    return text.rpartition("!")[2].split()[:1] == ["appsink"]


def _to_bgr(has: Has) -> str:
    # nvvidconv is a Jetson's, nvvideoconvert DeepStream's; both also take pictures that a decoder
    # in software made, and neither gives BGR, which is what videoconvert is left to do.
    for element in ("nvvidconv", "nvvideoconvert"):
        if has(element):
            return f"{element} ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR"
    return "videoconvert ! video/x-raw,format=BGR"


def _fraction(fps: float) -> str:
    # 29.97 is 2997/100 to a driver.
    return f"{round(fps)}/1" if abs(fps - round(fps)) < 1e-6 else f"{round(fps * 100)}/100"


class _OpenCvReader(Reader):
    """A pipeline inside an OpenCV that was built with GStreamer."""

    def __init__(self, name: str, text: str, frames: FrameLedger) -> None:
        self._name = name
        self._frames = frames
        full = text if _has_sink(text) else f"{text} ! {_SINK} drop=true"
        with quiet_opencv():
            self._capture = cv2.VideoCapture(full, cv2.CAP_GSTREAMER)
            opened = self._capture.isOpened()
        if not opened:
            self._capture.release()
            raise SourceError(
                f"{name} cannot be opened; `gst-launch-1.0 {text} ! fakesink` says why"
            )
        self.size, self.fps = stated_size(self._capture), stated_rate(self._capture)

    def read(self) -> Picture | None:
        """The next picture, None at the end."""
        pixels = grab_picture(self._capture)
        if pixels is None:
            return None
        return Picture(pixels, time.monotonic_ns(), self._frames.number())

    def close(self) -> None:
        """Ends the pipeline."""
        with quiet_opencv():
            self._capture.release()


class _AppSinkReader(Reader):
    """A pipeline that is pulled through its appsink."""

    def __init__(self, name: str, text: str, frames: FrameLedger, timeout_s: float) -> None:
        gst = _gst()
        assert gst is not None
        self._gst: Any = gst
        self._name = name
        self._frames = frames
        self._patience_s = timeout_s + READING_GRACE_S
        self._stopping = threading.Event()
        full = text if _has_sink(text) else f"{text} ! {_SINK}"
        try:
            self._pipeline: Any = gst.parse_launch(full)
        except Exception as error:
            # GLib.Error, which is there only where PyGObject is.
            message = getattr(error, "message", str(error))
            raise SourceError(f"{name} is no pipeline that GStreamer takes: {message}") from error
        self._sink: Any = self._found_sink()
        self._bus: Any = self._pipeline.get_bus()
        self._started = False
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def read(self) -> Picture | None:
        """The next picture, None at the end of the stream."""
        until_ns = time.monotonic_ns() + round(self._patience_s * 1e9)
        while not self._stopping.is_set():
            sample = self._sink.emit("try-pull-sample", _SLICE_NS)
            if sample is not None:
                picture = self._picture(sample)
                if picture is not None:
                    return picture
                continue
            self._raise_error()
            if self._sink.get_property("eos"):
                return None
            if time.monotonic_ns() > until_ns:
                raise SourceError(f"{self._name} gave nothing for {self._patience_s:g} seconds")
        return None

    def close(self) -> None:
        """Stops the pipeline."""
        self._pipeline.set_state(self._gst.State.NULL)

    def interrupt(self) -> None:
        """Lets a `read` that is under way end within a moment."""
        self._stopping.set()

    def _found_sink(self) -> Any:
        """The appsink: ours by its name, a user's as the only one there is."""
        if isinstance(self._pipeline, self._gst.Bin):
            sinks = self._pipeline.iterate_sinks()
            while True:
                found, sink = sinks.next()
                if found != self._gst.IteratorResult.OK:
                    break
                if sink.get_factory() is not None and sink.get_factory().get_name() == "appsink":
                    return sink
        raise SourceError(f"{self._name} has no appsink that its pictures could be taken from")

    def _start(self) -> None:
        gst = self._gst
        self._sink.set_property("emit-signals", False)
        change = self._pipeline.set_state(gst.State.PLAYING)
        if change == gst.StateChangeReturn.FAILURE:
            self._raise_error()
            raise SourceError(f"{self._name} cannot be started")
        # The newest wins, whatever the pipeline's own sink was told.
        self._sink.set_property("drop", True)
        self._sink.set_property("max-buffers", 1)

    def _raise_error(self) -> None:
        message = self._bus.pop_filtered(self._gst.MessageType.ERROR)
        if message is None:
            return
        error, detail = message.parse_error()
        text = (error.message or detail or "no reason is given").strip()
        source = message.src.get_name() if message.src is not None else "the pipeline"
        raise SourceError(f"{self._name} broke off: {text} ({source})")

    def _picture(self, sample: Any) -> Picture | None:
        now_ns = time.monotonic_ns()
        index = self._frames.number()
        buffer, caps = sample.get_buffer(), sample.get_caps().get_structure(0)
        height, width = caps.get_value("height"), caps.get_value("width")
        channels = {"BGR": 3, "BGRx": 4, "BGRA": 4, "GRAY8": 1}.get(caps.get_value("format"))
        if channels is None or not height or not width:
            raise SourceError(
                f"{self._name} gives pictures of the format {caps.get_value('format')}; put "
                "`videoconvert ! video/x-raw,format=BGR` before the appsink"
            )
        found, rate = self.fps, caps.get_fraction("framerate")
        if found is None and rate[0] and rate[2] and rate[1] > 0:
            self.fps = rate[1] / rate[2]
        mapped, content = buffer.map(self._gst.MapFlags.READ)
        if not mapped:
            self._frames.count("damaged")
            return None
        try:
            # Rows are padded, to a multiple of four bytes as a rule.
            stride = content.size // height
            if stride < width * channels:
                self._frames.count("damaged")
                return None
            rows = np.frombuffer(content.data, np.uint8, stride * height).reshape(height, stride)
            picture = rows[:, : width * channels].reshape(height, width, channels).copy()
        finally:
            buffer.unmap(content)
        return Picture(as_bgr(picture), now_ns - self._age_ns(buffer), index)

    def _age_ns(self, buffer: Any) -> int:
        """How long ago the picture was taken by the pipeline's clock; 0 where that cannot be."""
        clock, stamp = self._pipeline.get_clock(), buffer.pts
        if clock is None or stamp == self._gst.CLOCK_TIME_NONE:
            return 0
        age_ns = int(clock.get_time() - self._pipeline.get_base_time() - stamp)
        return age_ns if 0 <= age_ns <= _PLAUSIBLE_NS else 0


_loaded = False
_module: Any = None
_loading = threading.Lock()


def _gst() -> Any:
    """GStreamer's module, initialised; None where it cannot be imported."""
    global _loaded, _module
    with _loading:
        if not _loaded:
            _loaded = True
            try:
                # Older PyGObjects import in a way that Python warns of.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    import gi

                    gi.require_version("Gst", "1.0")
                    gi.require_version("GstApp", "1.0")
                    from gi.repository import Gst, GstApp  # noqa: F401 - it has appsink's type

                    Gst.init(None)
                _module = Gst
            except (ImportError, ValueError):
                _module = None
        return _module
