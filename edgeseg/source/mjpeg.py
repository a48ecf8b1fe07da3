"""Motion JPEG over HTTP: one JPEG after the other, as most network cameras send them."""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import HTTPDigestAuthHandler, HTTPPasswordMgrWithDefaultRealm, Request

import cv2
import numpy as np

from edgeseg.errors import SourceError
from edgeseg.frame import Pixels
from edgeseg.source.address import Address, without_password
from edgeseg.source.connection import READING_GRACE_S, Connect, Connection, Feed, Picture, Reader
from edgeseg.source.opencv import as_bgr, quiet_opencv
from edgeseg.source.status import FrameLedger

__all__ = ["MjpegReader", "PartReader", "boundary_of", "get", "jpeg_size", "mjpeg", "whole_jpeg"]

# A JPEG of 16384x16384 at the best quality has less; so has anything that a camera sends.
_LARGEST_PART = 64 << 20
_LARGEST_HEAD = 16 << 10
_LARGEST_SIDE = 16384
_LARGEST_AREA = 64_000_000
_CHUNK = 1 << 16
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_REDIRECTS = 5


class PartReader:
    """Takes a multipart body apart, fed with bytes as they come: (part, when it began) pairs.

    ``boundary`` without its dashes. A part ends after its Content-Length, if it has one and what
    follows is a boundary, and otherwise at the next boundary: lengths that lie cost nothing but
    the time until that one comes. Never holds more than one part of 64 MiB; a larger one is passed
    over, and counted in `oversized`. RFC 2046, and what cameras make of it.
    """

    def __init__(self, boundary: bytes) -> None:
        self._mark = b"--" + boundary
        self._buffer = bytearray()
        self._began_ns = 0
        self._inside = False
        self._length: int | None = None
        # Of the buffer, so many bytes have been looked through for what is looked for now, so that
        # a server that sends byte by byte costs no more than one that sends at once.
        self._searched = 0
        self.oversized = 0

    def feed(self, data: bytes, now_ns: int) -> list[tuple[bytes, int]]:
        """The parts that ``data``, which came at ``now_ns``, completes."""
        self._buffer += data
        parts: list[tuple[bytes, int]] = []
        while True:
            if not self._inside and not self._begin(now_ns):
                return parts
            part = self._end()
            if part is None:
                return parts
            parts.append((part, self._began_ns))

    def _begin(self, now_ns: int) -> bool:
        """Goes on to the first byte behind the next part's head, if that is there."""
        start = self._buffer.find(self._mark)
        if start < 0:
            # All but what may be the beginning of a boundary.
            del self._buffer[: max(len(self._buffer) - len(self._mark) + 1, 0)]
            self._searched = 0
            return False
        self._drop(start)
        head = _HEAD_END.search(self._buffer, max(self._searched - 3, 0))
        if head is None:
            self._searched = len(self._buffer)
            if len(self._buffer) > _LARGEST_HEAD:
                # Any other head that begins before the last 16 KiB is too long as well.
                self._drop(len(self._buffer) - _LARGEST_HEAD)
                self.oversized += 1
            return False
        named = re.search(
            rb"\ncontent-length:[ \t]*([0-9]{1,9})[ \t\r]*\n",
            bytes(self._buffer[: head.end()]).lower(),
        )
        length = int(named[1]) if named is not None else None
        # One of zero is what some servers write who do not know it.
        self._length = length if length and length <= _LARGEST_PART else None
        del self._buffer[: head.end()]
        self._inside, self._began_ns, self._searched = True, now_ns, 0
        return True

    def _end(self) -> bytes | None:
        """The part, if all of it is there."""
        if self._length is not None and len(self._buffer) >= self._length:
            if self._buffer.find(self._mark, self._searched, self._length) < 0:
                behind = bytes(self._buffer[self._length : self._length + len(self._mark) + 4])
                rest = behind.lstrip(b"\r\n")
                if rest.startswith(self._mark[: len(rest)]):
                    return self._cut(self._length)
            # It lies. A boundary says where the part ends, before that or behind.
            self._length = None
        return self._up_to_boundary()

    def _up_to_boundary(self) -> bytes | None:
        found = self._buffer.find(self._mark, self._searched)
        if found >= 0:
            part = self._cut(found)
            return part.removesuffix(b"\n").removesuffix(b"\r")
        self._searched = max(len(self._buffer) - len(self._mark) + 1, 0)
        if len(self._buffer) > _LARGEST_PART:
            self.oversized += 1
            self._buffer.clear()
            self._inside, self._searched = False, 0
        return None

    def _cut(self, length: int) -> bytes:
        part = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._inside, self._searched = False, 0
        return part

    def _drop(self, count: int) -> None:
        """Forgets the first bytes of the buffer."""
        del self._buffer[:count]
        self._searched = max(self._searched - count, 0)


def boundary_of(content_type: str) -> bytes | None:
    """The boundary that a Content-Type names, without dashes; None if there is none."""
    if not re.match(r"\s*multipart/", content_type, re.IGNORECASE):
        return None
    named = re.search(r'boundary\s*=\s*(?:"([^"]*)"|([^\s;]+))', content_type, re.IGNORECASE)
    text = (named[1] or named[2] or "") if named is not None else ""
    # Some servers name the boundary with the dashes that go before it.
    return text.removeprefix("--").encode("latin-1", "replace")[:200] or None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) that the head of a JPEG states, None if there is none (ITU-T T.81, B.2)."""
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        # SOF0 to SOF15, without DHT, JPG and DAC, which are among them.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return (
                int.from_bytes(data[place + 5 : place + 7], "big"),
                int.from_bytes(data[place + 7 : place + 9], "big"),
            )
        place += 2 + max(int.from_bytes(data[place + 2 : place + 4], "big"), 2)
    return None


def whole_jpeg(data: bytes) -> Pixels | None:
    """The picture of a JPEG that is there to its end, None otherwise.

    A decoder fills what is missing of a JPEG with grey, which is no picture of anything. Sizes
    over 16384 pixels a side or 64 million in all are refused before memory is taken for them.
    """
    size = jpeg_size(data)
    if size is None or not data.rstrip(b"\r\n\0").endswith(b"\xff\xd9"):
        return None
    height, width = size
    if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
        return None
    if height * width > _LARGEST_AREA:
        return None
    with quiet_opencv():
        try:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:
            return None
    return None if picture is None or picture.size == 0 else as_bgr(picture)


class MjpegReader(Reader):
    """The pictures of a multipart response, decoded; damaged and repeated ones are left out.

    A camera that hangs often goes on sending its last picture. The same bytes twice are no new
    picture of the world, so that they are counted as stale, unless ``repeats`` allows them; also
    when it was opened anew in between, for which ``before`` is what was read of it before.
    """

    def __init__(
        self,
        response: _Response,
        boundary: bytes,
        frames: FrameLedger,
        *,
        repeats: bool = False,
        before: MjpegReader | None = None,
    ) -> None:
        self._response = response
        self._parts = PartReader(boundary)
        self._frames = frames
        self._repeats = repeats
        self._waiting: list[tuple[bytes, int]] = []
        self._last: bytes = b"" if before is None else before._last

    def read(self) -> Picture | None:
        """The next picture, None when the server has ended the response."""
        while True:
            while self._waiting:
                part, began_ns = self._waiting.pop(0)
                picture = self._picture(part, began_ns)
                if picture is not None:
                    return picture
            data = self._response.read()
            if not data:
                return None
            oversized = self._parts.oversized
            self._waiting = self._parts.feed(data, time.monotonic_ns())
            self._frames.count("damaged", self._parts.oversized - oversized)

    def close(self) -> None:
        """Ends the connection."""
        self._response.close()

    def interrupt(self) -> None:
        """Ends the connection while it is read."""
        self._response.interrupt()

    def _picture(self, part: bytes, began_ns: int) -> Picture | None:
        index = self._frames.number()
        if part == self._last and not self._repeats:
            self._frames.count("stale")
            return None
        pixels = whole_jpeg(part)
        if pixels is None:
            self._frames.count("damaged")
            return None
        self._last = part
        return Picture(pixels, began_ns, index)


class _Response:
    """An HTTP response that is read as it comes; `interrupt` ends it from another thread."""

    def __init__(self, link: socket.socket, response: http.client.HTTPResponse, name: str) -> None:
        self._link = link
        self._response = response
        self._name = name
        self.content_type = response.getheader("Content-Type", "")

    def wait_for(self, seconds: float) -> None:
        """How long a `read` may take from now on."""
        self._link.settimeout(seconds)

    def read(self) -> bytes:
        """What is there, waited for; empty at the end. Raises SourceError when it breaks."""
        try:
            return self._response.read1(_CHUNK)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SourceError(f"{self._name} broke off ({_why(error)})") from error

    def interrupt(self) -> None:
        """Ends a `read` that is under way."""
        try:
            self._link.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It is closed already, by the other side or by us.
            return

    def close(self) -> None:
        """Closes the connection."""
        self._response.close()
        self._link.close()


def mjpeg(
    address: Address, timeout_s: float, otherwise: Connect, *, first: _Response | None = None
) -> Connect:
    """What opens the MJPEG stream at ``address``; ``otherwise`` opens what is no MJPEG.

    ``first`` is a response that was opened already, for the first time.
    """
    ready = [] if first is None else [first]
    before: MjpegReader | None = None

    def connect(frames: FrameLedger, closed: threading.Event) -> Connection:
        name = without_password(address.target)

        def reader() -> Reader:
            nonlocal before
            verify = address.options.verify
            response = ready.pop() if ready else get(address.target, timeout_s, verify=verify)
            boundary = boundary_of(response.content_type)
            if boundary is None:
                response.close()
                raise NotMjpegError(f"{name} sends {response.content_type or 'nothing'}")
            response.wait_for(timeout_s + READING_GRACE_S)
            repeats = address.options.repeats
            before = MjpegReader(response, boundary, frames, repeats=repeats, before=before)
            return before

        try:
            return Feed(reader, frames, closed, name=name, timeout_s=timeout_s)
        except NotMjpegError:
            return otherwise(frames, closed)

    return connect


class NotMjpegError(SourceError):
    """A response that is no MJPEG; never leaves this package."""


def get(url: str, timeout_s: float, *, verify: bool = True) -> _Response:
    """Asks for ``url``, with the name and password in it; raises SourceError if it is refused.

    ``verify``: whether the certificate behind https is checked.
    """
    name, asked, answer = without_password(url), url, ""
    for _ in range(_REDIRECTS):
        try:
            parts = urlsplit(asked)
            link, response = _ask(parts, timeout_s, answer, verify)
        except ssl.SSLCertVerificationError as error:
            raise SourceError(
                f"{name} has a certificate that cannot be checked ({error.verify_message}); "
                "?verify=0 does without"
            ) from error
        except TimeoutError as error:
            raise SourceError(
                f"{name} gave no answer within {timeout_s:g} seconds; check the address, and that "
                "it plays elsewhere (a browser, VLC)"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SourceError(
                f"{name} cannot be opened ({_why(error)}); check the address, and that it plays "
                "elsewhere (a browser, VLC)"
            ) from error
        if response.status == http.client.OK:
            return _Response(link, response, name)
        challenges = response.headers.get_all("WWW-Authenticate") or []
        moved = response.getheader("Location")
        response.close()
        link.close()
        if response.status == http.client.UNAUTHORIZED and not answer:
            answer = _credentials(parts, challenges)
            if answer:
                continue
        elif 300 <= response.status < 400 and moved:
            onward = _onward(asked, moved, parts)
            if onward is not None:
                asked, answer = onward, ""
                continue
        raise SourceError(
            f"{name} answers {response.status} {response.reason}"
            + ("; check name and password" if response.status == http.client.UNAUTHORIZED else "")
        )
    raise SourceError(f"{name} sends from one address to the next without end")


def _ask(
    parts: SplitResult, timeout_s: float, answer: str, verify: bool
) -> tuple[socket.socket, http.client.HTTPResponse]:
    if parts.hostname is None:
        raise ValueError("there is no host in the address")
    deadline = time.monotonic() + timeout_s
    secure = parts.scheme.lower() == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    # Without a port, the last part of an IPv6 address would be taken for one.
    connection = kind(parts.hostname, parts.port or kind.default_port, timeout=timeout_s)
    headers = {"User-Agent": "edgeseg", "Accept": "*/*", "Connection": "close"}
    if answer:
        headers["Authorization"] = answer
    link = socket.create_connection((connection.host, connection.port), timeout_s)
    try:
        if secure:
            link = _wrapped(link, connection.host, verify)
        with _until(deadline, link):
            if isinstance(link, ssl.SSLSocket):
                link.do_handshake()
            connection.sock = link
            connection.request("GET", _path_of(parts), headers=headers)
            return link, connection.getresponse()
    except BaseException:
        connection.close()
        link.close()
        raise


def _wrapped(link: socket.socket, host: str, verify: bool) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(link, server_hostname=host, do_handshake_on_connect=False)


@contextmanager
def _until(deadline: float, link: socket.socket) -> Iterator[None]:
    """Raises TimeoutError when the block takes longer, also if a byte comes now and then.

    A socket's own time-out begins anew with each byte.
    """
    late = threading.Event()

    def cut() -> None:
        late.set()
        # Of the socket below: one with TLS forgets its state before the other thread has noticed.
        with suppress(OSError):
            socket.socket.shutdown(link, socket.SHUT_RDWR)

    timer = threading.Timer(max(deadline - time.monotonic(), 0), cut)
    timer.name = "edgeseg-deadline"
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        if late.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
        timer.join()
    if late.is_set():
        raise TimeoutError


def _path_of(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _credentials(parts: SplitResult, challenges: Sequence[str]) -> str:
    """The Authorization that answers a challenge, RFC 7617 and 7616; empty when there is none."""
    if parts.username is None:
        return ""
    user, password = unquote(parts.username), unquote(parts.password or "")
    offered = {kind.lower(): rest for kind, _, rest in (text.partition(" ") for text in challenges)}
    if "digest" not in offered:
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        return f"Basic {basic}" if "basic" in offered else ""
    asked = {
        name.lower(): quoted or plain
        for name, quoted, plain in re.findall(
            r'\b(\w+)\s*=\s*(?:"([^"]*)"|([^\s,]+))', offered["digest"]
        )
    }
    if "qop" in asked:
        # A server may offer several; "auth" is the one that has no body in it.
        asked["qop"] = "auth"
    where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{_path_of(parts)}"
    known = HTTPPasswordMgrWithDefaultRealm()
    known.add_password(None, where, user, password)
    try:
        found = HTTPDigestAuthHandler(known).get_authorization(Request(where), asked)
    except ValueError:
        # An algorithm that Python does not know.
        return ""
    return f"Digest {found}" if found else ""


def _onward(asked: str, moved: str, parts: SplitResult) -> str | None:
    """Where a redirection from ``asked`` leads; None if that is no web address.

    To the same host the name and password in ``parts`` go along, to another one never.
    """
    try:
        onward = urljoin(asked, moved)
        return _with_login(onward, parts) if urlsplit(onward).scheme in ("http", "https") else None
    except ValueError:
        # Such as half of an IPv6 address.
        return None


def _with_login(url: str, before: SplitResult) -> str:
    """``url`` with the name and password of ``before``, if it is the same host."""
    parts = urlsplit(url)
    login, mark, _ = before.netloc.rpartition("@")
    if not mark or parts.username is not None or parts.hostname != before.hostname:
        return url
    return parts._replace(netloc=f"{login}@{parts.netloc}").geturl()


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return str(error) or type(error).__name__
