"""Servers that lie, drip, hang up and send elsewhere; files whose header lies; clocks that jump."""

from __future__ import annotations

import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import pytest

from edgeseg.errors import SourceError
from edgeseg.frame import Frame
from edgeseg.source import Backoff, LiveSource, open_source, quiet_opencv
from edgeseg.source import opening as opening_module
from edgeseg.source.gstreamer import has_element
from edgeseg.source.opencv import has_backend
from edgeseg.streams import Streams
from tests.edgeseg.faults import Fault, FaultyCamera, WorldClock, lying_avi
from tests.edgeseg.faults import number_in as camera_number_in
from tests.edgeseg.servers import number_in, numbered
from tests.edgeseg.test_pipeline import Stripes

PATIENCE_S = 20.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + PATIENCE_S
    while set(threading.enumerate()) != before and time.monotonic() < deadline:
        time.sleep(0.005)
    assert set(threading.enumerate()) == before


class Script:
    """A server that does with each connection what it is told; ``done`` when it is to end."""

    def __init__(
        self, *acts: Callable[[Script, socket.socket], None], host: str = "127.0.0.1"
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family)
        self._acts = acts
        self.done = threading.Event()
        self.connections = 0
        self.port = int(self._listening.getsockname()[1])
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._threads = [threading.Thread(target=self._accept, name="script")]
        self._threads[0].start()

    def close(self) -> None:
        self.done.set()
        # A close alone does not wake the thread that waits for a connection.
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _accept(self) -> None:
        while not self.done.is_set():
            try:
                link, _ = self._listening.accept()
            except OSError:
                return
            act = self._acts[min(self.connections, len(self._acts) - 1)]
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(act, link), name="script")
            self._threads.append(thread)
            thread.start()

    def _serve(self, act: Callable[[Script, socket.socket], None], link: socket.socket) -> None:
        with link, suppress(OSError):
            link.settimeout(PATIENCE_S)
            act(self, link)


@contextmanager
def script(
    *acts: Callable[[Script, socket.socket], None], host: str = "127.0.0.1"
) -> Iterator[Script]:
    found = Script(*acts, host=host)
    try:
        yield found
    finally:
        found.close()


def part(number: int, *, length: int | None = None) -> bytes:
    content = bytes(cv2.imencode(".jpg", numbered(number))[1].tobytes())
    stated = len(content) if length is None else length
    return f"--frame\r\nContent-Length: {stated}\r\n\r\n".encode() + content + b"\r\n"


# --- what a server does, with a request that it has read, or not


def pictures(
    first: int, *, head: bytes = HEAD + b"\r\n"
) -> Callable[[Script, socket.socket], None]:
    """A good server: pictures from ``first`` on, until the end."""

    def act(server: Script, link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(head)
        number = first
        while not server.done.wait(0.01):
            link.sendall(part(number))
            number += 1

    return act


def says(*pieces: bytes, hold: bool = False) -> Callable[[Script, socket.socket], None]:
    """Answers with some bytes, and hangs up, or does not."""

    def act(server: Script, link: socket.socket) -> None:
        link.recv(4096)
        for piece in pieces:
            link.sendall(piece)
        if hold:
            server.done.wait(PATIENCE_S)

    return act


def drips(content: bytes, *, first: bytes = b"") -> Callable[[Script, socket.socket], None]:
    """Answers with a byte each 50 ms: no time-out of a socket ever fires."""

    def act(server: Script, link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(first)
        for place in range(len(content)):
            if server.done.wait(0.05):
                return
            link.sendall(content[place : place + 1])

    return act


def resets(content: bytes) -> Callable[[Script, socket.socket], None]:
    """Answers, and resets the connection in the middle of it."""

    def act(server: Script, link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(content)
        server.done.wait(0.1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return act


def silent(server: Script, link: socket.socket) -> None:
    """Takes the connection, and never answers."""
    server.done.wait(PATIENCE_S)


# --- at the start


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (silent, r"no answer within 0\.5 seconds"),
        (says(hold=True), r"no answer within 0\.5 seconds"),
        (says(HEAD[:30], hold=True), r"no answer within 0\.5 seconds"),
        (says(HEAD[:30]), r"cannot be opened|gives no frames"),
        (says(HEAD), r"gives no frames \(the stream ended\)"),
        (drips(HEAD + b"\r\n"), r"no answer within 0\.5 seconds"),
        (drips(HEAD + b"X: y\r\n" * 10_000), r"no answer within 0\.5 seconds"),
        (says(), "cannot be opened"),
        (resets(HEAD[:30]), "cannot be opened"),
        (says(HEAD + b"\r\n", hold=True), "gives no frames"),
        (says(HEAD + b"Content-Length: 0\r\n\r\n", hold=True), "gives no frames"),
        (drips(part(1), first=HEAD + b"\r\n"), "gives no frames"),
    ],
)  # fmt: skip
def test_wrong_from_the_start(act: Callable[[Script, socket.socket], None], message: str) -> None:
    with script(act) as server:
        started = time.monotonic()
        with pytest.raises(SourceError, match=message) as raised:
            list(open_source(f"{server.address}/video?timeout=0.5"))
        # What drips in would take a minute, and what is held for ever.
        assert time.monotonic() - started < PATIENCE_S
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "status",
    ["204 No Content", "206 Partial Content", "301 Moved", "304 Not Modified", "401 No", "403 No",
     "410 Gone", "429 Too Many", "500 Oops", "503 Busy", "999 What"],
)  # fmt: skip
def test_other_status_codes(status: str) -> None:
    answer = f"HTTP/1.1 {status}\r\nContent-Length: 3\r\n\r\nno!".encode()
    with (
        script(says(answer)) as server,
        pytest.raises(SourceError, match=f"answers {status[:3]}"),
    ):
        open_source(f"{server.address}/video?timeout=5")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["/a"], "from one address to the next without end"),
        (["/a", "/b", "/a"], "from one address to the next without end"),
        (["file:///etc/passwd"], "answers 302"),
        (["ftp://127.0.0.1/x"], "answers 302"),
        (["http://"], "from one address to the next without end"),
        (["http://[::1"], "answers 302|cannot be opened"),
        (["http://127.0.0.1:99999/"], "answers 302|cannot be opened"),
    ],
)
def test_redirects_that_lead_nowhere(places: list[str], message: str) -> None:
    acts = [
        says(f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode())
        for place in places
    ]
    with script(*acts) as server:
        with pytest.raises(SourceError, match=message):
            open_source(f"{server.address}/video?timeout=5")
        assert server.connections <= 5


def test_head_without_end_takes_bounded_memory() -> None:
    with (
        script(says(HEAD, *[b"X: " + b"y" * 60_000 + b"\r\n"] * 200)) as server,
        pytest.raises(SourceError, match="cannot be opened"),
    ):
        open_source(f"{server.address}/video?timeout=5")


# --- in the middle


@pytest.mark.parametrize(
    "act",
    [
        silent,
        says(HEAD[:30], hold=True),
        drips(HEAD + b"X: y\r\n" * 10_000),
        drips(part(5000), first=HEAD + b"\r\n"),
        says(HEAD + b"\r\n", hold=True),
        says(b"HTTP/1.1 503 Busy\r\n\r\n"),
        says(b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n"),
        says(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        resets(HEAD + b"\r\n" + part(50) + part(51)[:200]),
        says(HEAD + b"Content-Length: 1000\r\n\r\n" + part(50) + part(51)),
        says(HEAD + b"Content-Length: 9999999\r\n\r\n" + part(50)),
        says(HEAD.replace(b"=frame", b"=other") + b"\r\n" + part(50), hold=True),
        says(HEAD + b"\r\n" + part(50, length=99_999), hold=True),
        says(HEAD + b"\r\n" + part(50, length=7) + part(51)),
        says(HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFF\r\n" + part(50)),
        says(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<h1>Log in</h1>"),
        says(b"HTTP/1.1 200 OK\r\n\r\n", hold=True),
    ],
)
def test_wrong_for_a_while(
    act: Callable[[Script, socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good, then wrong at the next two connections, then good again: back, in order, none twice."""
    monkeypatch.setattr(Backoff, "delay_s", lambda backoff, attempt, share: 0.01)
    first = says(HEAD + b"\r\n" + b"".join(part(number) for number in range(3)))
    with script(first, act, act, pictures(100_000)) as server:
        source = open_source(f"{server.address}/video?timeout=0.5")
        found: list[int] = []

        def read() -> None:
            for frame in source:
                found.append(number_in(frame.pixels))
                if found[-1] >= 100_005:
                    return

        reader = threading.Thread(target=read, name="reader")
        reader.start()
        reader.join(PATIENCE_S)
        alive = reader.is_alive()
        source.close()
        reader.join(PATIENCE_S)
        assert not alive, [status.reason for status in source.history]
        # What the wrong ones send, they send on each connection.
        good = [number for number in found if number not in (50, 51)]
        assert good == sorted(set(good)) and good[-1] == 100_005
        assert set(good) <= {0, 1, 2, *range(100_000, 100_006)}
        assert source.tally.reconnects >= 1 and server.connections >= 4


# --- other ways to the same pictures


def test_ipv6() -> None:
    try:
        server = Script(pictures(7), host="::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here ({error})")
    try:
        with open_source(f"{server.address}/video?timeout=10") as source:
            assert number_in(next(iter(source)).pixels) >= 7
    finally:
        server.close()


def test_ipv6_without_a_port_asks_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(address: tuple[str, int], timeout_s: float) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for uri in ("http://[fd00::1]/x", "https://[fd00::1]/x", "http://[fd00::1]:8080/x"):
        with pytest.raises(SourceError, match="connection refused"):
            open_source(uri)
    assert asked == [("fd00::1", 80), ("fd00::1", 443), ("fd00::1", 8080)]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody has signed, and its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the command openssl is not here, which makes the certificate")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path,
         "-out", path.with_suffix(".crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


def secured(
    certificate: Path, act: Callable[[Script, socket.socket], None]
) -> Callable[[Script, socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def secured_act(server: Script, link: socket.socket) -> None:
        with context.wrap_socket(link, server_side=True) as inner:
            act(server, inner)

    return secured_act


def test_certificate_that_nobody_signed(certificate: Path) -> None:
    with script(secured(certificate, pictures(7))) as server:
        address = server.address.replace("http:", "https:")
        with pytest.raises(SourceError, match=r"certificate that cannot be checked .*verify=0"):
            open_source(f"{address}/video?timeout=10")
        with open_source(f"{address}/video?timeout=10&verify=0") as source:
            frames = iter(source)
            assert [number_in(next(frames).pixels) >= 7 for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (silent, r"no answer within 0\.5 seconds"),
        (says(b"HTTP/1.1 200 OK\r\n\r\n"), "cannot be opened"),
        (says(), "cannot be opened"),
        (drips(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\0" * 999),
         r"no answer within 0\.5 seconds"),
    ],
)  # fmt: skip
def test_tls_with_somebody_who_does_not_speak_it(
    act: Callable[[Script, socket.socket], None], message: str
) -> None:
    with script(act) as server:
        started = time.monotonic()
        with pytest.raises(SourceError, match=message):
            open_source(f"{server.address.replace('http:', 'https:')}/video?timeout=0.5")
        assert time.monotonic() - started < PATIENCE_S


@pytest.mark.parametrize("through", ["GStreamer", "OpenCV"])
@pytest.mark.parametrize(
    "act",
    [
        silent,
        says(),
        says(b"RTSP/1.0 200 OK\r\nCSe", hold=True),
        says(b"RTSP/1.0 404 Not Found\r\nCSeq: 1\r\n\r\n"),
        says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        drips(b"RTSP/1.0 200 OK\r\n" + b"X: y\r\n" * 10_000),
        resets(b"RTSP/1.0 2"),
    ],
)
def test_rtsp_with_somebody_who_does_not_speak_it(
    act: Callable[[Script, socket.socket], None], through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if through == "GStreamer" and not has_element("rtspsrc"):
        pytest.skip("GStreamer and its rtspsrc are not here")
    if through == "OpenCV":
        if not has_backend(cv2.CAP_FFMPEG):
            pytest.skip("this OpenCV has no FFmpeg")
        monkeypatch.setattr(opening_module, "has_element", lambda name: False)
    with script(act) as server:
        started = time.monotonic()
        address = server.address.replace("http:", "rtsp:")
        with pytest.raises(SourceError) as raised:
            list(open_source(f"{address}/camera?timeout=0.5"))
        assert time.monotonic() - started < PATIENCE_S
        assert "\n" not in str(raised.value)


# --- files


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Twenty pictures of 48 x 64, 20 per second, as an AVI of JPEGs."""
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    with quiet_opencv():
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20.0, (64, 48))
        for number in range(20):
            writer.write(numbered(number))
        writer.release()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("frames", "fps", "size"),
    [
        (5, None, None),
        (1, None, None),
        (0, None, None),
        (21, None, None),
        (2_000_000, None, None),
        (4_294_967_295, None, None),
        (None, 1000.0, None),
        (None, 0.001, None),
        (None, None, (40, 100)),
        (99, 300.0, (7, 9999)),
    ],
)
def test_header_that_lies_costs_no_frame_and_makes_none_up(
    clip: bytes,
    frames: int | None,
    fps: float | None,
    size: tuple[int, int] | None,
    tmp_path: Path,
) -> None:
    path = tmp_path / "lying.avi"
    path.write_bytes(lying_avi(clip, frames=frames, fps=fps, size=size))
    with open_source(str(path)) as source:
        found = list(source)
        assert [number_in(frame.pixels) for frame in found] == list(range(20))
        assert [frame.index for frame in found] == list(range(20))
        assert {frame.pixels.shape for frame in found} == {(48, 64, 3)}
        told = source.length
    if told is not None and abs(told - 20) > 1:
        (note,) = source.notes
        assert f"promises {told} frames and 20 could be read" in note


# At 480, FFmpeg takes pictures of 48 rows for the halves of interlaced ones.
@pytest.mark.parametrize("size", [(1, 1), (480, 640), (65_535, 65_535)])
def test_header_that_no_decoder_takes_is_told(
    clip: bytes, size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "lying.avi"
    path.write_bytes(lying_avi(clip, size=size))
    try:
        with open_source(str(path)) as source:
            assert [number_in(frame.pixels) for frame in source] == list(range(20))
    except SourceError as error:
        assert "not one frame of it can be decoded" in str(error)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_file_that_ends_in_the_middle_gives_what_is_whole(
    clip: bytes, share: float, tmp_path: Path
) -> None:
    path = tmp_path / "cut.avi"
    start, end = clip.index(b"movi"), clip.index(b"idx1")
    path.write_bytes(clip[: start + round((end - start) * share)])
    with open_source(str(path)) as source:
        numbers = [number_in(frame.pixels) for frame in source]
        assert len(source.notes) == (len(numbers) < 19)
    # The decoder may fill up the last one; what it shows of it is of that picture.
    assert numbers == list(range(len(numbers))) and 20 * share - 2 <= len(numbers) <= 20 * share + 1


# --- clocks


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A wall clock that is a day fast, then a day slow, then a day fast; how often it was read."""
    read: list[float] = []
    real = time.time

    def jumps() -> float:
        read.append(real())
        return read[-1] + (86_400.0 if len(read) % 2 else -86_400.0)

    monkeypatch.setattr(time, "time", jumps)
    monkeypatch.setattr(time, "time_ns", lambda: round(jumps() * 1e9))
    return lambda: len(read)


def test_wall_clock_that_jumps_changes_nothing(jumping: Callable[[], int]) -> None:
    time.time()
    assert jumping() == 1
    cameras = {
        name: FaultyCamera(WorldClock(), [Fault("break", 0.3, 0.5)], fps=50.0, feeds=True)
        for name in ("a", "b")
    }
    sources = {
        name: LiveSource(name, camera.connect, name=name, timeout_s=PATIENCE_S)
        for name, camera in cameras.items()
    }
    found: dict[str, list[Frame]] = {name: [] for name in cameras}
    started_ns = time.monotonic_ns()
    with Streams(Stripes(), sources) as streams:
        for stream in streams:
            result = stream.result
            found[stream.name].append(result.frame)
            assert started_ns <= result.frame.captured_ns <= result.finished_ns
            assert result.finished_ns <= time.monotonic_ns()
            if min(len(frames) for frames in found.values()) >= 20:
                break
        for ledger in streams.ledgers.values():
            assert 0 <= ledger.summary().mask_age_ms.p99 < 1000 * PATIENCE_S
            assert 0 < ledger.elapsed < 10 * PATIENCE_S
    for name, frames in found.items():
        numbers = [camera_number_in(frame.pixels) for frame in frames]
        assert numbers == sorted(set(numbers)) and set(numbers) <= set(cameras[name].sent)
        assert sources[name].tally.stale == 0
        assert "stalled" not in [status.state for status in sources[name].history]


def test_wall_clock_that_jumps_does_not_disturb_a_network_camera(
    jumping: Callable[[], int],
) -> None:
    with (
        script(pictures(0)) as server,
        open_source(f"{server.address}/video?timeout={PATIENCE_S:g}") as source,
    ):
        frames = iter(source)
        captured = []
        for _ in range(15):
            time.time()
            captured.append(next(frames).captured_ns)
        assert captured == sorted(set(captured))
        assert [status.state for status in source.history] == ["opening", "live"]
        assert source.tally.stale == source.tally.damaged == 0
