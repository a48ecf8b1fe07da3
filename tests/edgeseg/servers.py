"""Servers of cameras as processes of their own, which can be killed as a power cut kills them.

    python -m tests.edgeseg.servers mjpeg|rtsp PORT FIRST

Picture number n has n in it, 24 bits as black and white blocks that survive an encoder. A process
starts with picture FIRST, prints the port that it listens to, and drops all its clients when it
reads a line.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["FPS", "ServerProcess", "number_in", "numbered"]

FPS = 30
_BLOCK = 8
_BITS = 24
_PER_ROW = 8
_SIZE = (48, 64)
_PATIENCE_S = 30.0


def numbered(number: int) -> NDArray[np.uint8]:
    """Picture ``number``: (48, 64, 3) uint8."""
    picture = np.full((*_SIZE, 3), 128, np.uint8)
    for bit in range(_BITS):
        top, left = bit // _PER_ROW * _BLOCK, bit % _PER_ROW * _BLOCK
        picture[top : top + _BLOCK, left : left + _BLOCK] = 230 if number >> bit & 1 else 25
    return picture


def number_in(picture: NDArray[np.uint8]) -> int:
    """The number of a picture, after any encoder; ValueError when it is not all there."""
    number = 0
    for bit in range(_BITS):
        top, left = bit // _PER_ROW * _BLOCK, bit % _PER_ROW * _BLOCK
        level = float(picture[top + 2 : top + _BLOCK - 2, left + 2 : left + _BLOCK - 2].mean())
        if 80 < level < 175:
            raise ValueError(f"block {bit} is neither black nor white ({level:.0f})")
        number |= (level >= 175) << bit
    return number


class ServerProcess:
    """A server at a port that stays its own, through any number of lives."""

    def __init__(self, kind: Literal["mjpeg", "rtsp"]) -> None:
        self._kind = kind
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def start(self, first: int = 0) -> float:
        """Starts it with picture ``first``; when it answers, as ``time.monotonic()``."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.edgeseg.servers", self._kind, str(self.port), str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip().isdecimal():
            self.kill()
            raise RuntimeError(f"the server did not start: {line.strip() or 'see standard error'}")
        self.port = int(line)
        return time.monotonic()

    def drop(self) -> None:
        """Ends the connections of all clients."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write("drop\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """Ends it with SIGKILL: the system closes its sockets, and nobody says goodbye."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait(_PATIENCE_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _mjpeg(port: int, first: int) -> None:
    started = time.monotonic()
    links: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            links.append(self.connection)
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            sent = first - 1
            try:
                while True:
                    number = first + int((time.monotonic() - started) * FPS)
                    if number == sent:
                        time.sleep(0.003)
                        continue
                    content = _jpeg(number)
                    head = f"--frame\r\nContent-Length: {len(content)}\r\n\r\n".encode()
                    self.wfile.write(head + content + b"\r\n")
                    sent = number
            except OSError:
                return

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on standard error."""

    class Server(ThreadingHTTPServer):
        allow_reuse_address = True
        daemon_threads = True

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    print(server.server_address[1], flush=True)
    for _ in sys.stdin:
        gone, links[:] = links[:], []
        for link in gone:
            with contextlib.suppress(OSError):
                # With a time to linger of zero, a close is a reset.
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                link.shutdown(socket.SHUT_RDWR)


def _rtsp(port: int, first: int) -> None:
    # Older PyGObjects import in a way that Python warns of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstRtspServer", "1.0")
        from gi.repository import GLib, Gst, GstRtspServer

    Gst.init(None)
    started = time.monotonic()
    server: Any = GstRtspServer.RTSPServer.new()
    server.set_address("127.0.0.1")
    server.set_service(str(port))
    factory = GstRtspServer.RTSPMediaFactory.new()
    factory.set_shared(True)
    factory.set_launch(
        "( appsrc name=pictures is-live=true format=time do-timestamp=true "
        f"caps=image/jpeg,width={_SIZE[1]},height={_SIZE[0]},framerate={FPS}/1 ! "
        "rtpjpegpay name=pay0 )"
    )

    def configure(_: Any, media: Any) -> None:
        pictures = media.get_element().get_by_name("pictures")

        def push() -> bool:
            content = _jpeg(first + int((time.monotonic() - started) * FPS))
            flow = pictures.emit("push-buffer", Gst.Buffer.new_wrapped(content))
            return bool(flow == Gst.FlowReturn.OK)

        GLib.timeout_add(1000 // FPS, push)

    factory.connect("media-configure", configure)
    server.get_mount_points().add_factory("/camera", factory)
    if not server.attach(None):
        sys.exit("the port is taken")
    loop: Any = GLib.MainLoop()

    def drop() -> bool:
        server.client_filter(lambda *_: GstRtspServer.RTSPFilterResult.REMOVE)
        return False

    def listen() -> None:
        for _ in sys.stdin:
            GLib.idle_add(drop)
        loop.quit()

    threading.Thread(target=listen, daemon=True).start()
    print(server.get_bound_port(), flush=True)
    loop.run()


def _jpeg(number: int) -> bytes:
    return bytes(cv2.imencode(".jpg", numbered(number))[1].tobytes())


if __name__ == "__main__":
    {"mjpeg": _mjpeg, "rtsp": _rtsp}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
