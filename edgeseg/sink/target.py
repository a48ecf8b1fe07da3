"""What a target says: the kind of sink, where it is, and the options.

::

    out.mp4  out.mkv  out.avi  out.webm           a video file
    frames                                        a folder of PNGs: a name without an ending
    log.jsonl?shapes=polygons                     JSON lines; shapes: rle, polygons or none
    rtp://192.168.1.20:5000?sdp=street.sdp        RTP packets to a receiver
    rtsp://:8554/street                           an RTSP server of our own, for all players
    rtsp://me:secret@:8554/street                 the same, for those who know the password
    rtsp://:8554/street?address=127.0.0.1         the same, for this machine alone
    rtsp://me:secret@server:8554/street           published to an RTSP server elsewhere
    gst: x264enc ! mp4mux ! filesink location=x   any GStreamer pipeline

Options come after ``?`` as ``name=value``, joined by ``&``. All live video takes ``codec`` (h264,
vp8 or jpeg; else the best there is) and ``bitrate`` in kilobits per second (else what suits the
size). What else stands after the ``?`` of a server elsewhere is sent on to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, unquote_plus, urlsplit

from edgeseg.errors import RequestError
from edgeseg.sink.encoder import CODECS, Codec
from edgeseg.sink.jsonlines import JSON_SUFFIXES, SHAPES, Shapes
from edgeseg.sink.video import VIDEO_SUFFIXES
from edgeseg.source.address import without_password

__all__ = ["KNOWN", "Kind", "Target", "target_of_source"]

Kind = Literal["video", "images", "jsonlines", "rtp", "rtsp-server", "rtsp", "gst"]

#: every target there is, for messages
KNOWN = (
    f"a video ({', '.join(VIDEO_SUFFIXES)}), a folder for PNGs (a name without an ending), JSON "
    f"lines ({', '.join(JSON_SUFFIXES)}), rtp://HOST:PORT, rtsp://:PORT/NAME (served here), "
    "rtsp://HOST/NAME (published there), or a GStreamer pipeline (gst: ...)"
)

_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "video": (),
    "images": (),
    "jsonlines": ("shapes",),
    "rtp": ("codec", "bitrate", "sdp"),
    "rtsp-server": ("codec", "bitrate", "address"),
    "rtsp": ("codec", "bitrate"),
    "gst": (),
}
_RTSP_PORT = 8554
_MOST_KBITS = 1_000_000


@dataclass(frozen=True)
class Target:
    """A target, taken apart.

    ``where``: the path, the pipeline, the address to publish to, or the name that is served.
    ``host`` and ``port`` are those of RTP and of the server here, where an empty host stands for
    all addresses of this machine. ``kbits``: kilobits per second. None where nothing was said.
    """

    # May hold a password, which no message and no traceback is to show.
    text: str = field(repr=False)
    kind: Kind
    where: str = field(repr=False)
    host: str = ""
    port: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    codec: Codec | None = None
    kbits: int | None = None
    shapes: Shapes = "rle"
    sdp: str | None = None

    @property
    def shown(self) -> str:
        """The target as it may be shown: without a password."""
        return without_password(self.text)

    @classmethod
    def of(cls, text: str) -> Target:
        """Takes ``text`` apart; RequestError for what is no target, or has wrong options."""
        text = text.strip()
        if not text:
            raise RequestError(f"results go to {KNOWN}, and an empty text came")
        if text.startswith("gst:"):
            if not text[4:].strip():
                raise RequestError(
                    "a pipeline for results is gst: and what gst-launch-1.0 takes, such as 'gst: "
                    "x264enc ! mp4mux ! filesink location=x.mp4', and nothing came"
                )
            return cls(text, "gst", text[4:].strip())
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text)
        if scheme is not None:
            return _on_the_network(text, scheme[1].lower())
        return _on_disk(text)


def target_of_source(target: str, name: str) -> str:
    """Where the results of one of several sources go: ``name`` is put in where they must differ.

    out.mp4 -> out-NAME.mp4, DIR -> DIR/NAME, rtsp://:8554/street -> rtsp://:8554/street-NAME. All
    go into the same JSON lines, which say whose they are. RequestError for rtp:// and gst:, which
    take one source.
    """
    found = Target.of(target)
    if found.kind == "jsonlines":
        return target
    if found.kind == "images":
        return str(Path(target) / name)
    if found.kind == "video":
        path = Path(target)
        return str(path.with_name(f"{path.stem}-{name}{path.suffix}"))
    if found.kind in ("rtsp-server", "rtsp"):
        head, mark, query = target.strip().partition("?")
        return f"{head.rstrip('/')}-{name}{mark}{query}"
    raise RequestError(f"{found.shown} takes the results of one source, and several came")


def _on_disk(text: str) -> Target:
    path, query = Path(text), ""
    if not path.exists():
        found = re.fullmatch(r"(.+?)\?([a-z]+=[^?/]*)", text)
        if found is not None:
            path, query = Path(found[1]), found[2]
    suffix = path.suffix.lower()
    if path.is_dir() or not suffix:
        kind: Kind = "images"
    elif suffix in VIDEO_SUFFIXES:
        kind = "video"
    elif suffix in JSON_SUFFIXES:
        kind = "jsonlines"
    else:
        raise RequestError(f"results go to {KNOWN}, and {text!r} came")
    given = _given(text, kind, query.split("&") if query else [])
    shapes = given.get("shapes", "rle")
    for one in SHAPES:
        if one == shapes:
            return Target(text, kind, str(path), shapes=one)
    raise RequestError(f"shapes in {text!r} is {', '.join(SHAPES)}, and {shapes!r} came")


def _on_the_network(text: str, scheme: str) -> Target:
    shown = without_password(text)
    head, mark, query = text.partition("?")
    try:
        parts = urlsplit(head)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise RequestError(f"an address is rtsp://HOST:PORT/NAME, and {shown!r} came") from None
    if scheme not in ("rtp", "rtsp"):
        raise RequestError(f"results go to {KNOWN}, and {shown!r} came")
    if re.search(r"[\x00-\x20\x7f]", text):
        raise RequestError(f"an address has no spaces, and {shown!r} came")
    kind: Kind = "rtp" if scheme == "rtp" else "rtsp" if host else "rtsp-server"
    pieces = query.split("&") if mark else []
    if kind == "rtsp":
        # The rest of the question is the server's.
        theirs = [one for one in pieces if one.partition("=")[0] not in _NAMES[kind]]
        pieces = [one for one in pieces if one not in theirs]
        head = f"{head}?{'&'.join(theirs)}" if theirs else head
    given = _given(text, kind, pieces)
    codec, kbits = _codec(shown, given), _kbits(shown, given)
    name = parts.path.strip("/")
    if kind == "rtp":
        if not host or not port or name or "@" in parts.netloc:
            raise RequestError(f"a receiver of RTP is rtp://HOST:PORT, and {shown!r} came")
        return Target(text, kind, "", host, port, codec=codec, kbits=kbits, sdp=given.get("sdp"))
    if not re.fullmatch(r"[A-Za-z0-9_.~/-]+", name):
        raise RequestError(
            "what is shown has a name of letters, digits and _.~-, as in rtsp://:8554/street, and "
            f"{shown!r} came"
        )
    if kind == "rtsp":
        return Target(text, kind, head, codec=codec, kbits=kbits)
    return Target(
        text,
        kind,
        name,
        given.get("address", ""),
        _RTSP_PORT if port is None else port,
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        codec=codec,
        kbits=kbits,
    )


def _given(text: str, kind: Kind, pieces: list[str]) -> dict[str, str]:
    shown, names = without_password(text), _NAMES[kind]
    given: dict[str, str] = {}
    for piece in pieces:
        name, mark, value = piece.partition("=")
        if name not in names:
            known = f"its options are {', '.join(names)}" if names else "it has no options"
            raise RequestError(f"{name!r} came in {shown!r}, and {known}")
        if not mark or not value or name in given:
            problem = "comes twice" if name in given else "has no value"
            raise RequestError(f"an option is name=value, and {name} {problem} in {shown!r}")
        given[name] = unquote_plus(value)
    return given


def _codec(shown: str, given: Mapping[str, str]) -> Codec | None:
    value = given.get("codec")
    for codec in CODECS:
        if value == codec:
            return codec
    if value is not None:
        raise RequestError(f"codec in {shown!r} is {', '.join(CODECS)}, and {value!r} came")
    return None


def _kbits(shown: str, given: Mapping[str, str]) -> int | None:
    value = given.get("bitrate")
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,7}", value) or not 1 <= int(value) <= _MOST_KBITS:
        raise RequestError(
            f"bitrate in {shown!r} is kilobits per second, 1 to {_MOST_KBITS}, and {value!r} came"
        )
    return int(value)
