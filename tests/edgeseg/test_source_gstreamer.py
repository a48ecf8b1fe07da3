"""GStreamer: the texts of pipelines everywhere, and real pipelines where it can be imported."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from edgeseg.errors import SourceError
from edgeseg.frame import Frame
from edgeseg.source import LiveSource, open_source
from edgeseg.source import gstreamer as gstreamer_module
from edgeseg.source import opening as opening_module
from edgeseg.source.address import Address, Options
from edgeseg.source.gstreamer import (
    Has,
    csi_text,
    gst_text,
    has_element,
    is_available,
    rtsp_text,
)
from edgeseg.source.network import ffmpeg_options
from edgeseg.source.opencv import has_backend

PATIENCE_S = 10.0
BGR = "videoconvert ! video/x-raw,format=BGR"


def installed(*names: str) -> Has:
    return lambda name: name in names


needs_gstreamer = pytest.mark.skipif(
    not is_available(), reason="PyGObject or GStreamer's typelibs cannot be imported here"
)


# --- texts


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (Options(), ("width=1280,height=720,framerate=30/1", "flip-method=0")),
        (
            Options(size=(1080, 1920), fps=60.0, flip=2),
            ("width=1920,height=1080,framerate=60/1", "flip-method=2"),
        ),
        (Options(fps=29.97), ("framerate=2997/100",)),
    ],
)
def test_csi_stays_in_nvmm_up_to_nvvidconv(options: Options, parts: tuple[str, ...]) -> None:
    text = csi_text("1", options)
    elements = [element.split()[0].split(",")[0] for element in text.split(" ! ")]
    assert elements == [
        "nvarguscamerasrc", "video/x-raw(memory:NVMM)", "nvvidconv", "video/x-raw",
        "videoconvert", "video/x-raw",
    ]  # fmt: skip
    assert "sensor-id=1" in text and text.endswith("format=BGR")
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("elements", "end"),
    [
        ((), BGR),
        (("nvvidconv",), f"nvvidconv ! video/x-raw,format=BGRx ! {BGR}"),
        (("nvvideoconvert",), f"nvvideoconvert ! video/x-raw,format=BGRx ! {BGR}"),
        (("nvvideoconvert", "nvvidconv"), f"nvvidconv ! video/x-raw,format=BGRx ! {BGR}"),
    ],
)
def test_pictures_come_out_of_nvmm_by_what_is_installed(
    elements: tuple[str, ...], end: str
) -> None:
    has = installed(*elements)
    url = 'rtsp://me:a"b\\c@host/x'
    text = rtsp_text(url, Options(latency_ms=50, transport="udp"), has)
    assert text.startswith('rtspsrc location="rtsp://me:a\\"b\\\\c@host/x" latency=50 ')
    assert "protocols=udp" in text and text.endswith(f"! decodebin ! {end}")
    assert gst_text("videotestsrc", has) == f"videotestsrc ! {end}"


def test_a_sink_of_the_user_stays() -> None:
    text = "videotestsrc ! video/x-raw,format=BGR ! appsink name=mine"
    assert gst_text(text, installed()) == text
    assert gst_text("appsink0. ! queue", installed()).endswith(BGR)


def test_latency_and_transport_without_gstreamer() -> None:
    told = ffmpeg_options(Address.of("rtsp://h/x?latency=50&transport=udp"))
    assert told == "rtsp_transport;udp|max_delay;50000"
    assert ffmpeg_options(Address.of("udp://h:5000")) is None


@pytest.mark.parametrize("uri", ["csi://0", "gst: videotestsrc"])
def test_without_gstreamer_the_packages_are_named(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gstreamer_module, "_gst", lambda: None)
    monkeypatch.setattr(gstreamer_module, "has_backend", lambda backend: False)
    with pytest.raises(SourceError, match=r"apt-get install -y python3-gi gir1\.2-gst-plugins"):
        open_source(uri)


# --- real pipelines


def opened(text: str, timeout_s: float = PATIENCE_S) -> LiveSource:
    source = open_source(text, timeout_s=timeout_s)
    assert isinstance(source, LiveSource)
    return source


@needs_gstreamer
@pytest.mark.parametrize("width", [64, 65, 66, 67])
def test_rows_that_are_padded(width: int) -> None:
    text = f"gst: videotestsrc is-live=true pattern=red ! video/x-raw,width={width},height=48"
    with opened(text) as source:
        frame = next(iter(source))
        assert frame.pixels.shape == (48, width, 3)
        np.testing.assert_allclose(frame.pixels.reshape(-1, 3), [[0, 0, 255]] * 48 * width, atol=3)


@needs_gstreamer
@pytest.mark.parametrize("kind", ["BGR", "BGRx", "GRAY8"])
def test_a_sink_of_ones_own(kind: str) -> None:
    text = (
        "gst: videotestsrc is-live=true pattern=white ! "
        f"video/x-raw,width=64,height=48,framerate=30/1,format={kind} ! appsink"
    )
    with opened(text) as source:
        frames = iter(source)
        first, second = next(frames), next(frames)
        assert first.pixels.shape == (48, 64, 3) and first.pixels.min() >= 230
        assert second.index > first.index and second.captured_ns > first.captured_ns
        assert 0 <= time.monotonic_ns() - second.captured_ns < PATIENCE_S * 1e9


@needs_gstreamer
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nosuchelement ! queue", "is no pipeline that GStreamer takes: .*nosuchelement"),
        ("videotestsrc ! ! queue", "is no pipeline that GStreamer takes"),
        ("filesrc location=nothing.mp4 ! decodebin", "nothing.mp4"),
        ("videotestsrc ! video/x-raw,format=I420 ! appsink", "of the format I420"),
        ("videotestsrc num-buffers=0", "gives no frames"),
    ],
)
def test_pipelines_that_give_nothing(text: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        list(opened(f"gst: {text}"))


@needs_gstreamer
def test_csi_without_a_jetson() -> None:
    if has_element("nvarguscamerasrc"):
        pytest.skip("this is a Jetson")
    with pytest.raises(SourceError, match="nvarguscamerasrc"):
        open_source("csi://0")


@needs_gstreamer
def test_end_of_a_pipeline() -> None:
    with opened("gst: videotestsrc is-live=true num-buffers=5#reconnect=0") as source:
        frames = list(source)
    assert 1 <= len(frames) <= 5 and source.tally.delivered + source.tally.dropped <= 5
    assert source.notes[-1].endswith(f"ended after {len(frames)} frames")


# --- a real RTSP server


class RtspServer:
    """GStreamer's RTSP server on loopback, at a port that stays its own when it is killed."""

    def __init__(self) -> None:
        # Older PyGObjects import in a way that Python warns of.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import gi

            gi.require_version("GstRtspServer", "1.0")
            from gi.repository import GLib, GstRtspServer

        self._glib: Any = GLib
        self._rtsp: Any = GstRtspServer
        self._server: Any = None
        self._source = 0
        self.port = 0
        self._context: Any = GLib.MainContext.new()
        self._loop: Any = GLib.MainLoop.new(self._context, False)
        self._thread = threading.Thread(target=self._loop.run, name="rtsp-server")
        self._thread.start()

    def start(self, width: int) -> None:
        server = self._rtsp.RTSPServer.new()
        server.set_address("127.0.0.1")
        server.set_service(str(self.port))
        factory = self._rtsp.RTSPMediaFactory.new()
        factory.set_shared(True)
        factory.set_launch(
            "( videotestsrc is-live=true pattern=ball ! "
            f"video/x-raw,format=I420,width={width},height=48,framerate=30/1 ! jpegenc ! "
            "rtpjpegpay name=pay0 )"
        )
        server.get_mount_points().add_factory("/camera", factory)
        self._source = server.attach(self._context)
        assert self._source
        self.port = server.get_bound_port()
        self._server = server

    def kill(self) -> None:
        """Ends it for all its clients at once."""
        if self._server is None:
            return
        server, self._server = self._server, None
        context_source = self._context.find_source_by_id(self._source)
        if context_source is not None:
            context_source.destroy()
        server.client_filter(lambda *_: self._rtsp.RTSPFilterResult.REMOVE)

    def end(self) -> None:
        self.kill()
        self._loop.quit()
        self._thread.join(PATIENCE_S)


@pytest.fixture
def rtsp() -> Iterator[RtspServer]:
    if not is_available():
        pytest.skip("PyGObject or GStreamer's typelibs cannot be imported here")
    try:
        server = RtspServer()
    except (ImportError, ValueError) as error:
        pytest.skip(f"GStreamer's RTSP server cannot be imported ({error})")
    missing = [name for name in ("rtspsrc", "jpegenc", "rtpjpegpay") if not has_element(name)]
    if missing:
        server.end()
        pytest.skip(f"GStreamer has no {', '.join(missing)}")
    try:
        yield server
    finally:
        server.end()


@pytest.mark.parametrize("through", ["GStreamer", "OpenCV"])
def test_killed_rtsp_server_is_back_within_its_time(
    rtsp: RtspServer, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if through == "OpenCV":
        if not has_backend(cv2.CAP_FFMPEG):
            pytest.skip("this OpenCV has no FFmpeg")
        monkeypatch.setattr(opening_module, "has_element", lambda name: False)
    rtsp.start(64)
    with opened(f"rtsp://127.0.0.1:{rtsp.port}/camera?latency=0&timeout=2") as source:
        frames = iter(source)
        first = [next(frames) for _ in range(5)]
        assert {frame.pixels.shape for frame in first} == {(48, 64, 3)}
        captured = [frame.captured_ns for frame in first]
        assert captured == sorted(set(captured))
        found: list[Frame] = []
        back = threading.Event()

        def read() -> None:
            for frame in frames:
                found.append(frame)
                if frame.width == 80:
                    back.set()
                    return

        reader = threading.Thread(target=read)
        reader.start()
        rtsp.kill()
        deadline = time.monotonic() + PATIENCE_S
        while source.status.state == "live" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert source.status.state in ("stalled", "reconnecting")
        time.sleep(0.5)
        # It comes back with another size.
        rtsp.start(80)
        assert back.wait(PATIENCE_S)
        reader.join(PATIENCE_S)
        indices = [frame.index for frame in (*first, *found)]
        assert indices == sorted(set(indices)) and found[-1].pixels.shape == (48, 80, 3)
        assert source.tally.reconnects >= 1
