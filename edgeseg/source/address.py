"""What a URI says: the kind of source, what it is called there, and the options.

::

    clip.mp4?loop=always                          a video file
    frames/  frames/*.png?fps=10  one.jpg         images, in natural order (2 before 10)
    0?size=720x1280&fps=30&format=mjpeg           a camera by number, or /dev/video0
    csi://0?width=1280&height=720&fps=30          a camera on a Jetson's CSI connector
    rtsp://user:secret@host/path?latency=100      a network camera
    http://host/video.mjpg?reconnect=60           MJPEG, or a video behind http or https
    rtmp://host/path  udp://@:5000                other network streams
    gst: v4l2src ! videoconvert                   a GStreamer pipeline
    synthetic:?seed=3&size=360x480&live=1         a generated street (`edgeseg.synthetic`)

Options come after ``?`` as ``name=value``, joined by ``&``. The ``?`` of a network address belongs
to its server: of what follows it, only the options of EdgeSeg are taken out, and the rest is sent
on as it is. Where a server has a name of its own that is also an option's, the options come after
``#``, and everything before it is left alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_plus

from edgeseg.errors import RequestError, SourceError
from edgeseg.source.images import IMAGE_SUFFIXES
from edgeseg.spec import parse_size

__all__ = ["KNOWN", "Address", "Kind", "Options", "without_password"]

Kind = Literal["video", "images", "camera", "csi", "rtsp", "http", "stream", "gst", "synthetic"]

#: every source there is, for messages
KNOWN = (
    "a video file, a folder of images or a pattern such as 'frames/*.png', a camera (0, 1, "
    "/dev/video0, csi://0), http://, https://, rtsp://, rtmp://, udp://, a GStreamer pipeline "
    "(gst: ...), and synthetic:"
)

_SIZE = ("size", "width", "height")
_LASTING = ("timeout", "reconnect")
_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "video": ("loop",),
    "images": ("loop", "fps"),
    "camera": (*_SIZE, "fps", "format", *_LASTING),
    "csi": (*_SIZE, "fps", "flip", *_LASTING),
    "rtsp": ("latency", "transport", *_LASTING),
    "http": ("repeats", "verify", *_LASTING),
    "stream": _LASTING,
    "gst": _LASTING,
    "synthetic": ("seed", *_SIZE, "frames", "fps", "scene", "live"),
}
_TITLES: Mapping[Kind, str] = {
    "video": "a video file",
    "images": "images",
    "camera": "a camera",
    "csi": "a CSI camera",
    "rtsp": "an rtsp:// stream",
    "http": "an http:// stream",
    "stream": "a network stream",
    "gst": "a GStreamer pipeline",
    "synthetic": "synthetic:",
}
_SCHEMES: Mapping[str, Kind] = {
    "http": "http",
    "https": "http",
    "rtsp": "rtsp",
    "rtsps": "rtsp",
    "rtmp": "stream",
    "rtmps": "stream",
    "udp": "stream",
}


@dataclass(frozen=True)
class Options:
    """What was asked of a source; None, or the default, where nothing was.

    ``size``: (height, width). ``format``: what a camera sends (``"mjpeg"``, ``"yuyv"``, or four
    letters). ``latency_ms``: how long an RTSP stream may be buffered. ``timeout_s``: how long a
    live source may take to open, and to give its next frame. ``reconnect_s``: how long a live
    source that was lost is tried again, 0 for never. ``waits``: whether it was asked for by name,
    so that a source that is not there yet is waited for. ``loop``: how often a file is read again.
    The last and ``reconnect_s`` may be
    ``math.inf``. ``repeats``: whether the same picture may come twice in a row.
    ``verify``: whether the certificate of an https server is checked.
    """

    size: tuple[int, int] | None = None
    fps: float | None = None
    format: str | None = None
    flip: int = 0
    latency_ms: int = 200
    transport: Literal["tcp", "udp"] = "tcp"
    timeout_s: float | None = None
    reconnect_s: float = math.inf
    waits: bool = False
    repeats: bool = False
    verify: bool = True
    loop: float = 0
    seed: int = 0
    frames: int = 300
    scene: str | None = None
    live: bool = False


@dataclass(frozen=True)
class Address:
    """A URI, taken apart: ``target`` is what is left of ``uri`` without the options."""

    uri: str
    kind: Kind
    target: str
    options: Options = field(default_factory=Options)

    @property
    def shown(self) -> str:
        """The URI as it may be shown: without a password."""
        return without_password(self.uri)

    @classmethod
    def of(cls, uri: str) -> Address:
        """Takes ``uri`` apart; looks at the disk, because a file's name may hold a ``?``.

        Raises RequestError for a URI of no known kind or with wrong options, SourceError when it
        looks like a file that does not exist.
        """
        text = uri.strip()
        if not text:
            raise RequestError(f"a source is {KNOWN}, and an empty text came")
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text)
        name = scheme[1].lower() if scheme is not None else ""
        if name in _SCHEMES:
            return _behind(text, _SCHEMES[name])
        if name == "gst":
            return _behind(text, "gst")
        head, _, query = text.partition("?")
        if re.fullmatch(r"[0-9]{1,3}", head) or head.startswith("/dev/"):
            return cls(text, "camera", head, _options(text, "camera", query))
        if name == "csi":
            if not re.fullmatch(r"csi://[0-9]{1,2}", head, re.IGNORECASE):
                raise RequestError(
                    f"a CSI camera is csi://0, csi://1, ... with the options "
                    f"{', '.join(_NAMES['csi'])}, and {text!r} came"
                )
            return cls(text, "csi", head[len("csi://") :], _options(text, "csi", query))
        if name == "synthetic":
            if head.lower() != "synthetic:":
                raise RequestError(
                    f"a street is synthetic:?option=value&..., with the options "
                    f"{', '.join(_NAMES['synthetic'])}, and {text!r} came"
                )
            return cls(text, "synthetic", head, _options(text, "synthetic", query))
        return _on_disk(text, unknown_scheme=scheme is not None)


# What cameras and GStreamer's elements call their passwords: ?user=guard&pwd=…, user-pw="…"
_SECRET = re.compile(
    r"""([?&;\s](?:[\w-]*(?:passw(?:or)?d|pwd|psw|secret|token|api[_-]?key)|user-pw|pass|key|auth)"""
    r"""\s*=\s*)(?:"[^"]*"|'[^']*'|[^&;#\s]+)""",
    re.IGNORECASE,
)


def without_password(uri: str) -> str:
    """The URI as it may be shown: rtsp://user:secret@host -> rtsp://user:***@host.

    So with what cameras take behind their address, and GStreamer's elements as properties:
    ``?user=guard&pwd=***``, ``user-pw=***``.
    """
    return _SECRET.sub(r"\1***", re.sub(r"(://[^/@:\s]*):[^/\s]*@", r"\1:***@", uri))


def _behind(text: str, kind: Kind) -> Address:
    """An address whose ``?`` is not ours: of a server, or inside a pipeline."""
    target, mark, fragment = text.rpartition("#")
    if mark:
        return Address(text, kind, _filled(text, kind, target), _options(text, kind, fragment))
    head, mark, query = text.partition("?") if kind != "gst" else text.rpartition("?")
    if not mark:
        return Address(text, kind, _filled(text, kind, text))
    ours: list[str] = []
    theirs: list[str] = []
    for piece in query.split("&"):
        (ours if piece.partition("=")[0] in _NAMES[kind] else theirs).append(piece)
    if kind == "gst" and theirs:
        # A question mark somewhere inside the pipeline.
        return Address(text, kind, _filled(text, kind, text))
    target = f"{head}?{'&'.join(theirs)}" if theirs else head
    return Address(text, kind, _filled(text, kind, target), _options(text, kind, "&".join(ours)))


def _filled(text: str, kind: Kind, target: str) -> str:
    """``target``, the pipeline itself for ``gst:``; RequestError when there is nothing in it."""
    if kind == "gst":
        target = target[len("gst:") :].strip()
    elif re.search(r"[\x00-\x20\x7f]", target) or not re.match(r"[^:]+://[^/?#]", target):
        raise RequestError(
            "a network address is rtsp://host/path, without spaces, and "
            f"{without_password(text)!r} came"
        )
    if not target:
        raise RequestError(
            "a GStreamer pipeline is gst: and what gst-launch-1.0 takes, such as 'gst: "
            f"videotestsrc ! videoconvert', and {text!r} came"
        )
    return target


def _on_disk(text: str, *, unknown_scheme: bool) -> Address:
    """A file, a folder or a pattern."""
    path, query = _path(text), ""
    # A name that is there is that file, whatever it looks like. Otherwise what looks like options
    # is options, and any other question mark stands for one letter of a pattern.
    if not _exists(path):
        found = re.fullmatch(r"(.+?)\?([a-z]+=[^&?/]*(?:&[a-z]+=[^&?/]*)*)", text)
        if found is not None:
            path, query = _path(found[1]), found[2]
    if _exists(path):
        images = path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES
        kind: Kind = "images" if images else "video"
        return Address(text, kind, str(path), _options(text, kind, query))
    if unknown_scheme:
        raise RequestError(f"a source is {KNOWN}, and {without_password(text)!r} came")
    if any(sign in str(path) for sign in "*?["):
        return Address(text, "images", str(path), _options(text, "images", query))
    raise SourceError(f"{text} does not exist; a source is {KNOWN}")


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):
        # There is no such user, or the name holds a zero byte.
        return Path(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name that is too long, or holds a zero byte.
        return False


def _options(text: str, kind: Kind, query: str) -> Options:
    """``"seed=3&fps=30"`` -> the options; RequestError for others, and for wrong values."""
    names = _NAMES[kind]
    given: dict[str, str] = {}
    for piece in query.split("&") if query else ():
        name, mark, value = piece.partition("=")
        shown = without_password(text)
        if name not in names:
            raise RequestError(
                f"the options of {_TITLES[kind]} are {', '.join(names)}, and {name!r} "
                f"came in {shown!r}"
            )
        if not mark or name in given:
            problem = "comes twice" if name in given else "has no value"
            raise RequestError(f"an option is name=value, and {name} {problem} in {shown!r}")
        given[name] = unquote_plus(value)
    return _Reading(text, given).options()


class _Reading:
    """Values of options, from their texts."""

    def __init__(self, text: str, given: Mapping[str, str]) -> None:
        self._text = without_password(text)
        self._given = given

    def options(self) -> Options:
        """All of them; RequestError, with what it can be, for the first that is wrong."""
        default = Options()
        transport = self._one_of("transport", ("tcp", "udp"), default.transport)
        return Options(
            size=self._size(),
            fps=self._number("fps"),
            format=self._format(),
            flip=self._whole("flip", default.flip, most=7),
            latency_ms=self._whole("latency", default.latency_ms, most=60_000),
            transport="udp" if transport == "udp" else "tcp",
            timeout_s=self._number("timeout"),
            reconnect_s=self._lasting("reconnect", default.reconnect_s),
            waits="reconnect" in self._given and self._given["reconnect"] != "0",
            repeats=self._whole("repeats", 0, most=1) > 0,
            verify=self._whole("verify", 1, most=1) > 0,
            loop=self._lasting("loop", default.loop),
            seed=self._whole("seed", default.seed),
            frames=self._whole("frames", default.frames),
            scene=self._given.get("scene"),
            live=self._whole("live", 0, most=1) > 0,
        )

    def _size(self) -> tuple[int, int] | None:
        size, width, height = (self._given.get(name) for name in _SIZE)
        if size is None and width is None and height is None:
            return None
        if size is not None and width is None and height is None:
            return parse_size(size)
        if size is None and width is not None and height is not None:
            return parse_size(f"{height}x{width}")
        raise RequestError(
            f"the size of {self._text!r} is width=1280&height=720, or size=720x1280, and only a "
            "part of it, or both, came"
        )

    def _format(self) -> str | None:
        name = self._given.get("format")
        if name is not None and not re.fullmatch(r"mjpeg|[A-Za-z0-9]{3,4}", name):
            raise RequestError(
                f"format in {self._text!r} is mjpeg, yuyv, or the four letters of another one "
                f"(`v4l2-ctl --list-formats` has them), and {name!r} came"
            )
        return name

    def _whole(self, name: str, default: int, *, most: int | None = None) -> int:
        text = self._given.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,18}", text) or (most is not None and int(text) > most):
            limit = "" if most is None else f" to {most}"
            raise RequestError(
                f"{name} in {self._text!r} is a whole number from 0{limit}, and {text!r} came"
            )
        return int(text)

    def _number(self, name: str) -> float | None:
        text = self._given.get(name)
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{0,6})?", text) or float(text) <= 0:
            raise RequestError(f"{name} in {self._text!r} is a number above 0, and {text!r} came")
        return float(text)

    def _lasting(self, name: str, default: float) -> float:
        """A number from 0, or ``always``."""
        text = self._given.get(name)
        if text is None:
            return default
        if text == "always":
            return math.inf
        if not re.fullmatch(r"[0-9]{1,9}", text):
            what = "a number of seconds" if name == "reconnect" else "how often again"
            raise RequestError(
                f"{name} in {self._text!r} is {what}, from 0, or always, and {text!r} came"
            )
        return float(text)

    def _one_of(self, name: str, values: Sequence[str], default: str) -> str:
        value = self._given.get(name, default)
        if value not in values:
            raise RequestError(
                f"{name} in {self._text!r} is {' or '.join(values)}, and {value!r} came"
            )
        return value
