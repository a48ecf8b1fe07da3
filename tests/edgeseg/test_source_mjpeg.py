"""Motion JPEG over HTTP: parts of a body, damaged pictures, and a server that dies and returns."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import SourceError
from edgeseg.frame import Frame
from edgeseg.source import Backoff, CaptureSource, LiveSource, open_source, quiet_opencv
from edgeseg.source import mjpeg as mjpeg_module
from edgeseg.source.mjpeg import PartReader, boundary_of, jpeg_size, whole_jpeg
from edgeseg.source.opencv import has_backend

PATIENCE_S = 10.0


def jpeg(level: int, height: int = 48, width: int = 64) -> bytes:
    picture = np.full((height, width, 3), level, np.uint8)
    return bytes(cv2.imencode(".jpg", picture)[1].tobytes())


def level(frame: Frame) -> float:
    return float(frame.pixels.mean())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + PATIENCE_S
    # The server's threads notice that their client has gone when they write the next time.
    while set(threading.enumerate()) != before and time.monotonic() < deadline:
        time.sleep(0.005)
    assert set(threading.enumerate()) == before


# --- parts


def body(parts: list[bytes], *, head: Callable[[bytes], bytes], end: bytes = b"\r\n") -> bytes:
    return b"".join(b"--frame\r\n" + head(part) + b"\r\n" + part + end for part in parts)


def right(part: bytes) -> bytes:
    return f"Content-Type: image/jpeg\r\nContent-Length: {len(part)}\r\n".encode()


def nothing(part: bytes) -> bytes:
    return b"Content-Type: image/jpeg\r\n"


def too_long(part: bytes) -> bytes:
    return f"Content-Length: {len(part) + 7}\r\n".encode()


def much_too_long(part: bytes) -> bytes:
    return b"Content-Length: 60000000\r\n"


def absurd(part: bytes) -> bytes:
    return b"Content-Length: 99999999999999999999\r\n"


def zero(part: bytes) -> bytes:
    return b"content-length:0\r\n"


@pytest.mark.parametrize("head", [right, nothing, too_long, much_too_long, absurd, zero])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_parts_in_any_pieces_and_whatever_their_head_says(
    head: Callable[[bytes], bytes], seed: int
) -> None:
    chance = random.Random(seed)
    parts = [chance.randbytes(chance.choice((1, 50, 3000))) + b"\xff\xd9" for _ in range(12)]
    parts[4] += b"\r\n--fram"
    whole = b"some text before\r\n" + body(parts, head=head) + b"--frame--"
    reader, found, place = PartReader(b"frame"), [], 0
    while place < len(whole):
        step = chance.choice((1, 7, 500, 5000))
        found += [part for part, _ in reader.feed(whole[place : place + step], place)]
        place += step
    assert found == parts and reader.oversized == 0


def test_part_with_its_length_is_there_with_its_last_byte() -> None:
    reader, part = PartReader(b"frame"), b"\xff\xd8abc\xff\xd9"
    first = b"--frame\r\n" + right(part) + b"\r\n"
    assert reader.feed(first, 5) == []
    assert reader.feed(part[:-1], 6) == []
    # Its time is that of its head, when the camera had begun to send it.
    assert reader.feed(part[-1:], 7) == [(part, 5)]


def test_length_that_is_too_short_is_not_believed_when_more_is_there() -> None:
    part = bytes(range(200))
    content = body([part, part], head=lambda p: b"Content-Length: 50\r\n") + b"--frame"
    assert [found for found, _ in PartReader(b"frame").feed(content, 0)] == [part, part]


def test_part_that_never_ends_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mjpeg_module, "_LARGEST_PART", 10_000)
    reader = PartReader(b"frame")
    reader.feed(b"--frame\r\n\r\n", 0)
    for _ in range(100):
        assert reader.feed(b"x" * 1000, 0) == []
        assert len(reader._buffer) <= 11_000
    assert reader.oversized > 0
    # A head without an end, likewise.
    for _ in range(100):
        reader.feed(b"--frame\r\nX: " + b"y" * 1000, 0)
        assert len(reader._buffer) <= 40_000
    assert reader.feed(b"\r\n\r\n", 0) == []
    assert [part for part, _ in reader.feed(body([b"good"], head=right) + b"--frame", 0)][-1:] == [
        b"good"
    ]


def test_heads_without_an_end_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mjpeg_module, "_LARGEST_HEAD", 1000)
    reader = PartReader(b"frame")
    for _ in range(50):
        assert reader.feed(b"--frame\r\n" * 1000, 0) == []
        assert len(reader._buffer) <= 1000
    assert [part for part, _ in reader.feed(body([b"good"], head=right) + b"--frame", 0)] == [
        b"good"
    ]


def test_any_bytes_are_taken_apart() -> None:
    chance = random.Random(3)
    pieces = (b"--frame", b"\r\n", b"\n\n", b"Content-Length: 5", b"-", b"x" * 40, b"\xff\xd8")
    for _ in range(3000):
        reader = PartReader(b"frame")
        for _ in range(6):
            content = b"".join(chance.choices(pieces, k=chance.randint(0, 6)))
            for part, _ in reader.feed(content, 0):
                assert b"--frame" not in part


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/x-mixed-replace; boundary=frame", b"frame"),
        ('multipart/x-mixed-replace;boundary="a b"', b"a b"),
        ("Multipart/X-Mixed-Replace; Boundary=--mine; x=y", b"mine"),
        ("multipart/x-mixed-replace", None),
        ("multipart/x-mixed-replace; boundary=", None),
        ("video/mp4", None),
        ("", None),
    ],
)
def test_boundary(content_type: str, boundary: bytes | None) -> None:
    assert boundary_of(content_type) == boundary


# --- pictures


@pytest.mark.parametrize("options", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]])
def test_size_in_the_head(options: list[int]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (37, 91, 3), np.uint8)
    data = bytes(cv2.imencode(".jpg", picture, options)[1].tobytes())
    assert jpeg_size(data) == (37, 91)
    pixels = whole_jpeg(data + b"\r\n")
    assert pixels is not None and pixels.shape == (37, 91, 3)
    for cut in range(0, len(data), 97):
        # The decoder would fill what is missing with grey.
        assert whole_jpeg(data[:cut]) is None
        jpeg_size(data[:cut])
    assert jpeg_size(b"") is jpeg_size(b"\xff\xd8") is jpeg_size(b"\x89PNG" * 9) is None


def test_size_that_would_take_all_memory_is_refused() -> None:
    data = bytearray(jpeg(10))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    assert jpeg_size(bytes(data)) == (65535, 65535) and whole_jpeg(bytes(data)) is None


def test_any_damage_is_a_picture_or_none() -> None:
    chance, data = random.Random(5), jpeg(90)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 9)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        pixels = whole_jpeg(bytes(damaged))
        assert pixels is None or pixels.ndim == 3


# --- a server that can be killed


class Server:
    """An MJPEG camera on loopback; `send` gives a picture to whoever is connected."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parts: list[bytes] = []
        self._server: ThreadingHTTPServer | None = None
        self._links: list[socket.socket] = []
        self.port = 0
        self.requests: list[str] = []
        self.authorized: Callable[[str | None], str | None] = lambda header: None
        self.content_type = "multipart/x-mixed-replace; boundary=frame"
        self.ending = False
        # Whoever connects gets one picture, and no two the same, and is sent away.
        self.one_each = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera._serve(self)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing on standard error."""

        class Quiet(ThreadingHTTPServer):
            allow_reuse_address = True
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that went away is what is tested here."""

        self._server = Quiet(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), name="server").start()

    def kill(self) -> None:
        """Ends it as a cable does that is pulled out: for all clients at once."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        with self._changed:
            links, self._links = self._links, []
            self._changed.notify_all()
        for link in links:
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def send(self, *parts: bytes) -> None:
        """Puts parts of the body on the wire."""
        with self._changed:
            self._parts += parts
            self._changed.notify_all()

    def picture(self, content: bytes) -> None:
        """Puts one picture on the wire, as cameras do."""
        self.send(body([content], head=right))

    def wait_connected(self, count: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._links) >= count, PATIENCE_S)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(handler.path)
        challenge = self.authorized(handler.headers.get("Authorization"))
        if challenge is not None:
            handler.send_response(401)
            handler.send_header("WWW-Authenticate", challenge)
            handler.end_headers()
            return
        if handler.path.startswith("/moved"):
            handler.send_response(302)
            handler.send_header("Location", handler.path[len("/moved") :] or "/moved")
            handler.end_headers()
            return
        if handler.path == "/missing":
            handler.send_error(404)
            return
        handler.send_response(200)
        handler.send_header("Content-Type", self.content_type)
        handler.end_headers()
        if self.one_each:
            handler.wfile.write(body([jpeg(len(self.requests))], head=right))
            return
        link = handler.connection
        with self._changed:
            place = len(self._parts)
            self._links.append(link)
            self._changed.notify_all()
        while True:
            with self._changed:
                while len(self._parts) == place and link in self._links and not self.ending:
                    self._changed.wait(PATIENCE_S)
                parts, place = self._parts[place:], len(self._parts)
                if link not in self._links or (self.ending and not parts):
                    return
            handler.wfile.write(b"".join(parts))


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    found.start()
    try:
        yield found
    finally:
        found.kill()


@contextmanager
def opened(server: Server, uri: str) -> Iterator[LiveSource]:
    """The source, and the server ended before it: its threads only notice when they write."""
    with open_source(uri, timeout_s=PATIENCE_S) as source:
        assert isinstance(source, LiveSource)
        server.wait_connected()
        yield source


def test_pictures_come_at_once_and_in_order(server: Server) -> None:
    with opened(server, f"{server.address}/video?width=640&timeout=9") as source:
        assert server.requests == ["/video?width=640"]
        frames, last_ns = iter(source), 0
        for number in range(12):
            sent_ns = time.monotonic_ns()
            server.picture(jpeg(20 * number, 48, 64 + 2 * number))
            # No picture waits for the boundary behind it: the next is sent when this is here.
            frame = next(frames)
            assert frame.index == number and abs(level(frame) - 20 * number) < 3
            assert sent_ns <= frame.captured_ns <= time.monotonic_ns()
            assert frame.captured_ns > last_ns and frame.width == 64 + 2 * number
            last_ns = frame.captured_ns
        assert source.size == (48, 86) and source.status.state == "live"
        assert source.tally.delivered == source.tally.received == 12
    assert source.notes == ()


def test_slow_reader_gets_the_newest(server: Server) -> None:
    with opened(server, f"{server.address}/video") as source:
        frames = iter(source)
        server.picture(jpeg(1))
        next(frames)
        for number in range(2, 40):
            server.picture(jpeg(5 * number))
        deadline = time.monotonic() + PATIENCE_S
        while source.tally.dropped < 37 and time.monotonic() < deadline:
            time.sleep(0.002)
        frame = next(frames)
        assert frame.index == 38 and abs(level(frame) - 195) < 3
        assert (source.tally.delivered, source.tally.dropped) == (2, 37)


def test_damaged_and_repeated_pictures_are_left_out(server: Server) -> None:
    with opened(server, f"{server.address}/video") as source:
        frames = iter(source)
        server.picture(jpeg(10))
        assert next(frames).index == 0
        good = jpeg(20)
        server.picture(jpeg(10))
        server.picture(good[: len(good) // 2])
        server.picture(b"no jpeg at all")
        server.send(b"\r\nnoise" * 50)
        server.picture(good)
        frame = next(frames)
        assert frame.index == 4 and abs(level(frame) - 20) < 3
        assert (source.tally.damaged, source.tally.stale) == (2, 1)
    assert len(source.notes) == 2


def test_repeats_are_known_after_a_reconnect(server: Server) -> None:
    # A camera that hangs may take new connections, and send each of them its last picture.
    with opened(server, f"{server.address}/video") as source:
        frames = iter(source)
        server.picture(jpeg(10))
        assert next(frames).index == 0
        server.kill()
        server.start()
        found: list[Frame] = []
        reader = threading.Thread(target=lambda: found.append(next(frames)))
        reader.start()
        server.wait_connected()
        server.picture(jpeg(10))
        server.picture(jpeg(200))
        reader.join(PATIENCE_S)
        assert [round(level(frame)) for frame in found] == [200]
        assert (source.tally.stale, source.tally.reconnects) == (1, 1)


def test_repeats_where_they_are_allowed(server: Server) -> None:
    with opened(server, f"{server.address}/video?repeats=1") as source:
        frames = iter(source)
        for number in range(3):
            server.picture(jpeg(10))
            assert next(frames).index == number


def test_killed_server_is_back_within_its_time(server: Server) -> None:
    with opened(server, f"{server.address}/video") as source:
        frames = iter(source)
        server.picture(jpeg(10))
        assert next(frames).index == 0
        got: list[Frame] = []
        reader = threading.Thread(target=lambda: got.append(next(frames)))
        reader.start()
        server.kill()
        deadline = time.monotonic() + PATIENCE_S
        while source.status.state != "reconnecting" and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.3)
        assert reader.is_alive()
        server.start()
        server.wait_connected()
        server.picture(jpeg(200))
        reader.join(PATIENCE_S)
        assert [frame.index for frame in got] == [1] and abs(level(got[0]) - 200) < 3
        # A refused attempt tells another reason than the end of the stream: the same state.
        states = [status.state for status in source.history]
        assert list(dict.fromkeys(states)) == ["opening", "live", "reconnecting"]
        assert states[-1] == "live" and source.tally.reconnects == 1
    (note,) = source.notes
    assert "opened anew once" in note


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reconnects_leak_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("descriptors are counted in /proc")
    monkeypatch.setattr(Backoff, "delay_s", lambda backoff, attempt, share: 0.0)
    server.one_each = True
    with open_source(f"{server.address}/video", timeout_s=PATIENCE_S) as source:
        counts: list[tuple[int, int]] = []
        for number, _ in zip(range(201), source, strict=False):
            if number in (40, 200):
                counts.append((threading.active_count(), descriptors()))
        assert source.tally.reconnects == 200 == source.tally.delivered - 1
    (threads, files), (threads_after, files_after) = counts
    assert abs(threads_after - threads) <= 2 and abs(files_after - files) <= 4


def test_end_of_a_stream_that_is_not_opened_again(server: Server) -> None:
    with opened(server, f"{server.address}/video?reconnect=0") as source:
        frames = iter(source)
        server.picture(jpeg(10))
        next(frames)
        server.ending = True
        server.send(b"")
        assert list(frames) == []
    assert source.notes == (f"{server.address}/video ended after 1 frames",)


def test_silence_is_a_stall_or_an_error(server: Server) -> None:
    with opened(server, f"{server.address}/video?reconnect=0&timeout=0.3") as source:
        frames = iter(source)
        server.picture(jpeg(10))
        next(frames)
        with pytest.raises(SourceError, match=r"after 1 frames: it gave no new picture for 0\.3"):
            next(frames)
    assert [status.state for status in source.history] == ["opening", "live", "stalled", "ended"]


def test_close_wakes_a_reader_that_waits(server: Server) -> None:
    with opened(server, f"{server.address}/video") as source:
        found: list[Frame] = []
        reader = threading.Thread(target=lambda: found.extend(source))
        reader.start()
        time.sleep(0.05)
        source.close()
        reader.join(PATIENCE_S)
        assert not reader.is_alive() and found == []


def test_silent_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/video"
        with pytest.raises(SourceError, match=r"no answer within 0\.3 seconds"):
            open_source(address, timeout_s=0.3)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 ", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n" * 999]
)
def test_server_that_speaks_something_else(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            link, _ = listening.accept()
            with link:
                link.recv(4096)
                link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"http://me:secret@127.0.0.1:{listening.getsockname()[1]}/video"
        with pytest.raises(SourceError, match=r"me:\*\*\*@") as raised:
            open_source(address, timeout_s=2)
        thread.join(PATIENCE_S)
    assert "secret" not in str(raised.value)


def basic(header: str | None) -> str | None:
    wanted = "Basic " + base64.b64encode(b"me:s:1").decode()
    return None if header == wanted else 'Basic realm="camera"'


def digest(header: str | None) -> str | None:
    """The check of RFC 2617, written anew."""
    challenge = 'Digest realm="camera", nonce="abc123", qop="auth,auth-int", algorithm=MD5'
    if header is None:
        return challenge
    said = {name: a or b for name, a, b in re.findall(r'(\w+)=(?:"([^"]*)"|([^\s,]+))', header)}

    def md5(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    keys = [md5("me:camera:s:1"), "abc123", said["nc"], said["cnonce"], "auth"]
    right = md5(":".join([*keys, md5(f"GET:{said['uri']}")]))
    return None if said["response"] == right else challenge


@pytest.mark.parametrize("check", [basic, digest])
def test_name_and_password(server: Server, check: Callable[[str | None], str | None]) -> None:
    server.authorized = check
    place = f"127.0.0.1:{server.port}/video?a=1"
    with opened(server, f"http://me:s%3A1@{place}") as source:
        server.picture(jpeg(9))
        assert next(iter(source)).index == 0
    with pytest.raises(SourceError, match=r"//me:\*\*\*@.* answers 401 .*name and password"):
        open_source(f"http://me:wrong@{place}")
    with pytest.raises(SourceError, match="answers 401"):
        open_source(f"http://{place}")


def test_other_answers(server: Server) -> None:
    with pytest.raises(SourceError, match="answers 404 Not Found"):
        open_source(f"{server.address}/missing")
    with pytest.raises(SourceError, match="without end"):
        open_source(f"{server.address}/moved")
    with opened(server, f"{server.address}/moved/video") as source:
        server.picture(jpeg(9))
        assert next(iter(source)).index == 0
        assert server.requests[-2:] == ["/moved/video", "/video"]


@pytest.mark.parametrize(
    "place", ["http://[", "http://[::1", "//[x]/", "http://a:b:c]/", "rtsp://x"]
)
def test_redirection_to_nowhere(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    class Link:
        def makefile(self, mode: str, *_: object) -> io.BytesIO:
            return io.BytesIO(f"HTTP/1.1 302 Found\r\nLocation: {place}\r\n\r\n".encode())

        def sendall(self, data: bytes) -> None: ...
        def setsockopt(self, *_: int) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: Link())
    with pytest.raises(SourceError, match=r"http://camera/x answers 302 Found|cannot be opened"):
        mjpeg_module.get("http://camera/x", 1.0)


@pytest.mark.parametrize(
    "challenge",
    [
        # 60 kB each: what takes the square of that time does not come back.
        "Digest " + "a" * 60_000,
        "Digest " + "a " * 30_000,
        "Digest " + 'a="' * 20_000,
        "Digest a" + " " * 60_000 + "b",
        "Digest realm=, nonce=" + "é" * 9,
        'Digest realm="x", nonce="y", algorithm="None"',
    ],
)
def test_challenges_that_are_none(challenge: str) -> None:
    parts = urlsplit("http://me:secret@camera/x")
    answer = mjpeg_module._credentials(parts, [challenge])
    assert answer == "" or answer.startswith("Digest ")


def test_refused_connection_hides_the_password() -> None:
    for address in ("http://me:secret@127.0.0.1:9/x", "rtsp://me:secret@127.0.0.1:9/x"):
        with pytest.raises(SourceError, match=r"//me:\*\*\*@127\.0\.0\.1:9/x ") as raised:
            open_source(address, timeout_s=2)
        assert "secret" not in str(raised.value)


def test_recording_behind_http_drops_nothing(tmp_path: Path) -> None:
    if not has_backend(cv2.CAP_FFMPEG):
        pytest.skip("this OpenCV has no FFmpeg, which opens recordings over the network")
    path = tmp_path / "clip.avi"
    with quiet_opencv():
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20.0, (64, 48))
        for number in range(20):
            picture: NDArray[np.uint8] = np.full((48, 64, 3), 10 * number, np.uint8)
            writer.write(picture)
        writer.release()
    content = path.read_bytes()

    class Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "video/x-msvideo")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            try:
                self.wfile.write(content)
            except OSError:
                return

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as files:
        thread = threading.Thread(target=files.serve_forever, args=(0.01,))
        thread.start()
        try:
            with open_source(f"http://127.0.0.1:{files.server_address[1]}/clip.avi") as source:
                assert isinstance(source, CaptureSource) and not source.live
                assert [frame.index for frame in source] == list(range(20))
        finally:
            files.shutdown()
            thread.join()
