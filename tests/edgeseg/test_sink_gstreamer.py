"""Live video out: the texts of pipelines everywhere, and real streams where GStreamer is."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgeseg.errors import RequestError, SinkError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, SemanticResult
from edgeseg.sink import Sink, open_sink
from edgeseg.sink import feed as feed_module
from edgeseg.sink.encoder import Encoder, find_encoder, usual_kbits
from edgeseg.sink.feed import FRONT, Shape, works
from edgeseg.sink.gstreamer import GStreamerSink, RtpSink, RtspPublishSink
from edgeseg.sink.rtspserver import RtspServerSink
from edgeseg.source import open_source
from edgeseg.source.gstreamer import has_element, is_available
from edgeseg.spec import ModelSpec, Preprocessing

LONG_S = 30.0
FPS = 20.0

SPEC = ModelSpec(
    name="plain",
    architecture="none",
    task="semantic",
    height=48,
    width=64,
    classes=("all",),
    colours=((0, 0, 0),),
    ignore=255,
    preprocessing=Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr"),
)


def result(index: int, level: int = 100, size: tuple[int, int] = (96, 130)) -> SemanticResult:
    frame = Frame.of(np.full((*size, 3), level, np.uint8), index)
    outputs = Outputs(np.zeros((48, 64), np.uint8))
    return SemanticResult.from_outputs(outputs, frame, Geometry.between(*size, SPEC), SPEC)


# --- texts and shapes


@pytest.mark.parametrize(
    ("elements", "element", "codec"),
    [
        ("nvv4l2h264enc nvvidconv x264enc jpegenc", "nvv4l2h264enc", "h264"),
        # An Orin Nano, where the first does not work; one without a converter; a Raspberry Pi.
        ("nvvidconv x264enc vp8enc", "x264enc", "h264"),
        ("nvv4l2h264enc openh264enc", "openh264enc", "h264"),
        ("v4l2h264enc x264enc openh264enc", "v4l2h264enc", "h264"),
        ("vaapih264enc vah264enc x264enc", "vah264enc", "h264"),
        ("vaapih264enc x264enc", "vaapih264enc", "h264"),
        ("nvh264enc x264enc", "nvh264enc", "h264"),
        ("vp8enc jpegenc", "vp8enc", "vp8"),
        ("jpegenc", "jpegenc", "jpeg"),
    ],
)
def test_the_encoder_that_is_there(elements: str, element: str, codec: str) -> None:
    there = {*elements.split(), "h264parse", "rtph264pay", "rtpvp8pay", "rtpjpegpay"}
    encoder = find_encoder(lambda name: name in there)
    assert (encoder.element, encoder.codec) == (element, codec)
    text = encoder.text(kbits=800, fps=30.0)
    assert text.startswith("videoconvert ! video/x-raw,format=") and element in text
    if codec != "jpeg":
        assert "=800000" in text or "=800 " in text + " "
        assert "30" in text


def test_pictures_reach_a_jetsons_encoder_in_nvmm_memory() -> None:
    text = Encoder("nvv4l2h264enc", "h264", "nvvidconv").text(kbits=1000, fps=15.0)
    assert [part.split(",")[0].split()[0] for part in text.split(" ! ")] == [
        "videoconvert", "video/x-raw", "nvvidconv", "video/x-raw(memory:NVMM)", "nvv4l2h264enc",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("there", "codec", "says"),
    [
        ("", None, "nothing here that encodes video"),
        ("x264enc", None, "nothing here that encodes video"),
        ("vp8enc rtpvp8pay", "h264", "encodes H.264.*apt-get install"),
    ],
)
def test_no_encoder(there: str, codec: None, says: str) -> None:
    with pytest.raises(SinkError, match=says):
        find_encoder(lambda name: name in there.split(), codec)


def test_texts() -> None:
    encoder = Encoder("x264enc", "h264")
    rtp = RtpSink.text(encoder, "10.0.0.2", 5000, kbits=700, fps=25.0)
    assert rtp.split(" ! ")[0] == FRONT and "key-int-max=25" in rtp
    assert 'udpsink host="10.0.0.2" port=5000 sync=false async=false' in rtp
    publish = RtspPublishSink.text(encoder, 'rtsp://a:b"c@h/x', kbits=700, fps=25.0)
    assert 'rtspclientsink location="rtsp://a:b\\"c@h/x" protocols=tcp' in publish
    serve = RtspServerSink.text(encoder, kbits=700, fps=25.0)
    assert serve.startswith(f"( {FRONT}") and "rtph264pay name=pay0" in serve


@pytest.mark.parametrize(
    ("codec", "host", "parts"),
    [
        ("h264", "10.0.0.2", ("c=IN IP4 10.0.0.2", "m=video 5000 RTP/AVP 96", "96 H264/90000")),
        ("vp8", "ff02::1", ("c=IN IP6 ff02::1", "m=video 5000 RTP/AVP 96", "96 VP8/90000")),
        ("jpeg", "10.0.0.2", ("m=video 5000 RTP/AVP 26", "26 JPEG/90000")),
    ],
)
def test_session_descriptions(codec: str, host: str, parts: tuple[str, ...]) -> None:
    (encoder,) = (one for one in ENCODERS if one.codec == codec)
    lines = encoder.sdp(host, 5000).split("\r\n")
    assert lines[0] == "v=0" and lines[-1] == ""
    for part in parts:
        assert any(part in line for line in lines)


ENCODERS = (
    Encoder("x264enc", "h264"),
    Encoder("vp8enc", "vp8"),
    Encoder("jpegenc", "jpeg"),
)


@pytest.mark.parametrize(
    ("size", "kept", "stride"),
    [((96, 128), (96, 128), 384), ((97, 131), (96, 130), 392), ((1, 1), (2, 2), 8)],
)
def test_shapes(size: tuple[int, int], kept: tuple[int, int], stride: int) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    shape = Shape(picture, 29.97)
    assert (shape.height, shape.width) == kept
    assert f"width={kept[1]},height={kept[0]},framerate=2997/100" in shape.caps
    rows = np.frombuffer(shape.bytes_of(picture), np.uint8).reshape(kept[0], stride)
    found = rows[:, : kept[1] * 3].reshape(*kept, 3)
    if size != (1, 1):
        np.testing.assert_array_equal(found, picture[: kept[0], : kept[1]])
    # Another size is scaled, also where it is larger by the odd line alone.
    other = np.full((size[0] + 1, 2 * size[1], 3), 77, np.uint8)
    rows = np.frombuffer(shape.bytes_of(other), np.uint8).reshape(kept[0], stride)
    assert (rows[:, : kept[1] * 3] == 77).all()


def test_bitrates() -> None:
    assert usual_kbits(360, 480, 30.0) == 622
    assert usual_kbits(48, 64, 5.0) == 300


@pytest.mark.parametrize(
    "target",
    ["rtp://127.0.0.1:5000", "rtsp://:0/x", "rtsp://a:secret@127.0.0.1:1/x", "gst: fakesink"],
)
def test_without_gstreamer(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "is_available", lambda: False)
    with pytest.raises(SinkError, match=r"PyGObject.*apt-get install -y python3-gi") as caught:
        open_sink(target)
    assert "secret" not in str(caught.value)


def test_a_user_without_a_password() -> None:
    with pytest.raises(RequestError, match="give both"):
        RtspServerSink("x", 0, user="me")


# --- real streams

needs_gstreamer = pytest.mark.skipif(
    not is_available(), reason="PyGObject or GStreamer's typelibs cannot be imported here"
)


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not has_element(name)]
    return pytest.mark.skipif(bool(missing), reason=f"GStreamer has no {', '.join(missing)} here")


def has_server() -> bool:
    if not is_available():
        return False
    import gi

    try:
        gi.require_version("GstRtspServer", "1.0")
    except ValueError:
        return False
    return True


needs_server = pytest.mark.skipif(not has_server(), reason="GStreamer's RTSP server is not here")


class Feeding:
    """Writes results to a sink at 20 per second, each a little brighter, until it is left."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._stop = threading.Event()
        self.error: SinkError | None = None
        self.written = 0
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Feeding:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + LONG_S
        while not condition():
            assert time.monotonic() < until and self.error is None, self.error
            self._stop.wait(0.02)

    def _work(self) -> None:
        while not self._stop.wait(1 / FPS):
            try:
                self._sink.write(result(self.written, level=60 + self.written % 100))
            except SinkError as error:
                self.error = error
                return
            self.written += 1


def own_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("edgeseg-rtsp")]


@needs_server
@needs("x264enc", "rtspsrc", "decodebin", "avdec_h264")
@pytest.mark.parametrize("secret", [None, "s@cret"])
def test_served_to_several_players(secret: str | None) -> None:
    user = None if secret is None else "me"
    sink = RtspServerSink(
        "street/1",
        0,
        host="127.0.0.1",
        user=user,
        password=secret,
        fps=FPS,
        opacity=0.0,
        legend=False,
    )
    login = "" if secret is None else "me:s%40cret@"
    url = sink.url.replace("rtsp://", f"rtsp://{login}")
    with sink, Feeding(sink) as feeding:
        feeding.wait_for(lambda: feeding.written > 2)
        # While nobody watches there is no pipeline.
        assert sink._feeds == {}
        with open_source(f"{url}?timeout=20&latency=0") as first:
            frames = iter(first)
            found = [next(frames) for _ in range(10)]
            assert {frame.pixels.shape for frame in found} == {(96, 130, 3)}
            assert all(50 < frame.pixels.mean() < 170 for frame in found)
            # A second one, through OpenCV's FFmpeg, shares the first one's pipeline.
            second = cv2.VideoCapture(url, cv2.CAP_FFMPEG)
            try:
                pictures = [second.read()[1] for _ in range(5)]
            finally:
                second.release()
            assert all(picture.shape == (96, 130, 3) for picture in pictures)
            assert len(sink._feeds) == 1
            assert next(frames).pixels.shape == (96, 130, 3)
        feeding.wait_for(lambda: sink._feeds == {})
        assert own_threads() != []
    assert own_threads() == []
    sink.close()


@needs_server
@needs("x264enc", "rtspsrc", "decodebin")
def test_players_without_the_password_see_nothing() -> None:
    with RtspServerSink("street", 0, host="127.0.0.1", user="me", password="x", fps=FPS) as sink:
        assert "anyone" not in sink.notes[0] and "x@" not in sink.notes[0]
        sink.write(result(0))
        capture = cv2.VideoCapture(sink.url.replace("rtsp://", "rtsp://me:y@"), cv2.CAP_FFMPEG)
        assert not capture.isOpened()


@needs_server
@needs("x264enc", "rtspsrc", "decodebin", "avdec_h264")
def test_a_player_that_reads_nothing_holds_nobody_up() -> None:
    with (
        RtspServerSink("street", 0, host="127.0.0.1", fps=FPS, kbits=20_000) as sink,
        Feeding(sink) as feeding,
        contextlib.closing(socket.create_connection((sink._host, sink._server.port))) as deaf,
    ):
        feeding.wait_for(lambda: feeding.written > 1)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader = deaf.makefile("rb")

        def ask(number: int, request: str, *headers: str) -> dict[str, str]:
            lines = (f"{request} RTSP/1.0", f"CSeq: {number}", *headers, "", "")
            deaf.sendall("\r\n".join(lines).encode())
            assert reader.readline().split()[1] == b"200"
            found = {}
            while (line := reader.readline().decode().strip()) != "":
                name, _, value = line.partition(":")
                found[name.lower()] = value.strip()
            reader.read(int(found.get("content-length", "0")))
            return found

        ask(1, f"DESCRIBE {sink.url}", "Accept: application/sdp")
        setup = ask(
            2, f"SETUP {sink.url}/stream=0", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1"
        )
        session = setup["session"].partition(";")[0]
        deaf.sendall(f"PLAY {sink.url} RTSP/1.0\r\nCSeq: 3\r\nSession: {session}\r\n\r\n".encode())
        feeding.wait_for(lambda: len(sink._feeds) == 1)
        with open_source(f"{sink.url}?timeout=20&latency=0") as other:
            frames = iter(other)
            for _ in range(60):
                next(frames)
        assert feeding.error is None


@needs_server
def test_a_port_that_is_taken_is_refused_at_once() -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SinkError, match="is the port taken"):
            RtspServerSink("x", port, host="127.0.0.1")
    assert own_threads() == []


@needs_server
@needs("x264enc")
def test_several_sinks_share_a_port() -> None:
    with RtspServerSink("front", 0, host="127.0.0.1", fps=FPS) as front:
        port = front._server.port
        with RtspServerSink("back", port, host="127.0.0.1", fps=FPS) as back:
            assert len(own_threads()) == 1
            for index in range(2):
                front.write(result(index))
                back.write(result(index))
            with (
                RtspServerSink("back", port, host="127.0.0.1") as twice,
                pytest.raises(SinkError, match="a name of its own"),
            ):
                twice.write(result(0))
            with pytest.raises(SinkError, match="shares its port"):
                RtspServerSink("side", port, host="127.0.0.1", user="a", password="b")
        assert len(own_threads()) == 1
    assert own_threads() == []


RECORDER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer.new()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory.new()
factory.set_transport_mode(GstRtspServer.RTSPTransportMode.RECORD)
factory.set_launch("( rtph264depay name=depay0 ! h264parse ! appsink name=end emit-signals=true )")
def took(sink):
    caps = sink.emit("pull-sample").get_caps().get_structure(0)
    print(caps.get_value("width"), caps.get_value("height"), flush=True)
    return Gst.FlowReturn.OK
def configure(factory, media):
    media.get_element().get_by_name_recurse_up("end").connect("new-sample", took)
factory.connect("media-configure", configure)
auth, token = GstRtspServer.RTSPAuth.new(), GstRtspServer.RTSPToken.new()
token.set_string("media.factory.role", "writer")
auth.add_basic(GstRtspServer.RTSPAuth.make_basic("me", "secret"), token)
server.set_auth(auth)
permissions = GstRtspServer.RTSPPermissions.new()
for right in ("access", "construct"):
    permissions.add_permission_for_role("writer", "media.factory." + right, True)
factory.set_permissions(permissions)
server.get_mount_points().add_factory("/street", factory)
assert server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""


@contextlib.contextmanager
def recorder(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An RTSP server that takes what is published, and writes the size of each picture."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RECORDER, str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert line(server) == "ready"
        yield server
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def line(server: subprocess.Popen[bytes]) -> str:
    """The next line that the server writes."""
    assert server.stdout is not None
    letters = b""
    while not letters.endswith(b"\n"):
        ready, _, _ = select.select([server.stdout], [], [], LONG_S)
        assert ready, "the server writes nothing"
        letter = os.read(server.stdout.fileno(), 1)
        assert letter, "the server has ended"
        letters += letter
    return letters.decode().strip()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@needs_server
@needs("x264enc", "rtspclientsink")
def test_published_to_a_server_that_comes_back() -> None:
    port = free_port()
    url = f"rtsp://me:secret@127.0.0.1:{port}/street"
    with contextlib.ExitStack() as stack:
        with recorder(port) as server:
            sink = stack.enter_context(RtspPublishSink(url, fps=FPS))
            feeding = stack.enter_context(Feeding(sink))
            assert {line(server) for _ in range(20)} == {"130 96"}
        feeding.wait_for(lambda: sink.notes != ())
        assert "was lost" in sink.notes[0] and "secret" not in sink.notes[0]
        with recorder(port) as server:
            assert {line(server) for _ in range(10)} == {"130 96"}
        assert feeding.error is None
    assert sink.dropped > 0


@needs_server
@needs("x264enc", "rtspclientsink")
@pytest.mark.parametrize("runs", [False, True])
def test_a_server_that_was_never_there_is_an_error(runs: bool) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        if runs:
            stack.enter_context(recorder(port))
        sink = stack.enter_context(
            RtspPublishSink(f"rtsp://me:wrong@127.0.0.1:{port}/street", fps=FPS)
        )
        with Feeding(sink) as feeding:
            until = time.monotonic() + LONG_S
            while feeding.error is None and time.monotonic() < until:
                time.sleep(0.02)
    assert "rtsp://me:***@127.0.0.1" in str(feeding.error) and "wrong" not in str(feeding.error)


@needs_gstreamer
@needs("x264enc", "rtspclientsink")
def test_a_server_that_says_nothing_is_an_error() -> None:
    with contextlib.closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        now = [100.0]
        port = silent.getsockname()[1]
        sink = RtspPublishSink(f"rtsp://127.0.0.1:{port}/x", now_s=lambda: now[0])
        with pytest.raises(SinkError, match="has taken no picture for 10 seconds"), sink:
            for index in range(40):
                sink.write(result(index))
                now[0] += 1.0


@needs("x264enc", "udpsink", "udpsrc", "rtph264depay", "avdec_h264")
def test_rtp_is_understood_through_its_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    description = tmp_path / "street.sdp"
    sink = open_sink(f"rtp://127.0.0.1:{port}?sdp={description}", fps=FPS)
    assert sink.policy == "drop"
    with sink, Feeding(sink) as feeding:
        caps = "application/x-rtp,media=video,encoding-name=H264,payload=96,clock-rate=90000"
        with open_source(
            f"gst: udpsrc port={port} caps={caps} ! rtph264depay ! avdec_h264"
        ) as source:
            frames = iter(source)
            assert {next(frames).pixels.shape for _ in range(5)} == {(96, 130, 3)}
        monkeypatch.setitem(
            os.environ, "OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file,udp,rtp"
        )
        capture = cv2.VideoCapture(str(description), cv2.CAP_FFMPEG)
        try:
            assert capture.read()[1].shape == (96, 130, 3)
        finally:
            capture.release()
        assert feeding.error is None


@needs("jpegenc", "vp8enc", "udpsink", "udpsrc", "jpegdec", "vp8dec")
@pytest.mark.parametrize(
    ("codec", "receiver"),
    [
        ("vp8", "encoding-name=VP8,payload=96,clock-rate=90000 ! rtpvp8depay ! vp8dec"),
        ("jpeg", "encoding-name=JPEG,payload=26,clock-rate=90000 ! rtpjpegdepay ! jpegdec"),
    ],
)
def test_rtp_without_h264(codec: str, receiver: str) -> None:
    port = free_port()
    sink = open_sink(f"rtp://127.0.0.1:{port}?codec={codec}", fps=FPS)
    with sink, Feeding(sink) as feeding:
        text = f"gst: udpsrc port={port} caps=application/x-rtp,media=video,{receiver}"
        with open_source(text) as source:
            frames = iter(source)
            shapes = {next(frames).pixels.shape for _ in range(5)}
        assert feeding.error is None
    # JPEG in RTP counts in blocks of eight pixels.
    assert shapes == {(96, 130 if codec == "vp8" else 136, 3)}


@needs("jpegenc", "matroskamux", "filesink")
def test_a_pipeline_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "out.mkv"
    with open_sink(f"gst: jpegenc ! matroskamux ! filesink location={path}", fps=FPS) as sink:
        for index in range(12):
            size = (96, 130) if index % 2 else (50, 60)
            sink.write(result(index, level=20 * index, size=size))
            time.sleep(0.02)
        assert isinstance(sink, GStreamerSink)
    capture, levels = cv2.VideoCapture(str(path)), []
    while True:
        got, picture = capture.read()
        if not got:
            break
        assert picture.shape == (50, 60, 3)
        levels.append(round(float(picture.mean()) / 10))
    assert len(levels) + sink.dropped == 12 and len(levels) > 2
    assert levels == sorted(levels)


@needs_gstreamer
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nosuchelement ! fakesink", "is no pipeline that GStreamer takes: .*nosuchelement"),
        ("x264enc !", "is no pipeline that GStreamer takes"),
    ],
)
def test_a_wrong_pipeline_is_refused_at_once(text: str, says: str) -> None:
    with pytest.raises(SinkError, match=says):
        open_sink(f"gst: {text}")


@needs_gstreamer
@needs("filesink")
def test_a_pipeline_that_breaks_is_an_error(tmp_path: Path) -> None:
    sink = open_sink(f"gst: filesink location={tmp_path}/none/x")
    with pytest.raises(SinkError, match=r"broke off|cannot be started"):
        for index in range(200):
            sink.write(result(index))
            time.sleep(0.01)
    sink.abort()
    with pytest.raises(SinkError, match="is finished"):
        sink.write(result(0))


@needs_gstreamer
def test_an_element_that_is_not_there_does_not_work() -> None:
    assert not works("nosuchelement")
    assert works("videoconvert")
