"""Sources of frames: a URI names a file, a folder, a camera, a network stream or a street.

::

    clip.mp4                          a video file
    frames/  frames/*.png  one.jpg    images, in natural order (2 before 10)
    0  /dev/video0                    a camera; "0?size=720x1280&fps=30" asks it for a mode
    http:// https:// rtsp:// rtmp:// udp://    a network stream
    synthetic:?seed=3&size=360x480    a generated street (`edgeseg.synthetic`)
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

import cv2
import numpy as np

from edgeseg.errors import RequestError, SourceError
from edgeseg.frame import Frame, Pixels
from edgeseg.spec import parse_size
from edgeseg.synthetic import Street

__all__ = [
    "IMAGE_SUFFIXES",
    "CameraSource",
    "ImageSource",
    "NetworkSource",
    "Source",
    "SyntheticSource",
    "VideoSource",
    "cameras",
    "open_source",
    "quiet_opencv",
]

#: endings of the files that a folder of images is made of
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

_NETWORK = ("http", "https", "rtsp", "rtmp", "udp")
_KNOWN = (
    "a video file, a folder of images or a pattern such as 'frames/*.png', a camera (0, 1, "
    "/dev/video0), http://, https://, rtsp://, rtmp://, udp://, and synthetic:"
)
# Files may differ from their header by one frame without anything being wrong: many containers
# state a duration, and the count is made from it.
_HEADER_TOLERANCE = 1

_Source = TypeVar("_Source", bound="Source")


class Source(ABC):
    """Where frames come from: iterate it once, close it when done (or use ``with``).

    One thread iterates; `close` may be called from any thread and never waits. Frames that were
    handed out belong to their receiver.
    """

    def __init__(
        self,
        uri: str,
        *,
        live: bool,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        length: int | None = None,
    ) -> None:
        self._uri = uri
        self._live = live
        self._size = size
        self._fps = fps
        self._length = length
        self._closed = threading.Event()
        self._released = False
        self._reading = threading.Lock()

    @property
    def uri(self) -> str:
        """What the user asked for."""
        return self._uri

    @property
    def live(self) -> bool:
        """Whether frames come when the world makes them, so that old ones lose their worth."""
        return self._live

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the frames as far as is known; later frames may differ."""
        return self._size

    @property
    def fps(self) -> float | None:
        """Frames per second that the source states, None if it states none."""
        return self._fps

    @property
    def length(self) -> int | None:
        """Number of frames that the header or the folder promises, None if nothing does."""
        return self._length

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know afterwards, one sentence each; empty when all was well."""
        return ()

    def __iter__(self) -> Iterator[Frame]:
        """Frames until the source ends or is closed; raises SourceError when it breaks."""
        while (frame := self._take()) is not None:
            yield frame

    def close(self) -> None:
        """Ends the iteration and gives the source back; a second call does nothing.

        A read that is under way in another thread is left to finish; that thread then gives the
        source back.
        """
        self._closed.set()
        self._release_once()

    def __enter__(self: _Source) -> _Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _read(self) -> Frame | None:
        """The next frame, None at the end; never called after, or during, ``_release``."""

    def _release(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Gives back what was opened; called once, and never during ``_read``."""

    def _take(self) -> Frame | None:
        with self._reading:
            frame = None if self._closed.is_set() else self._read()
        # A close() that came during the read could not release: it is done here, after the lock
        # was given back, so that one of the two threads always sees the other.
        if self._closed.is_set():
            self._release_once()
            return None
        return frame

    def _release_once(self) -> None:
        if not self._reading.acquire(blocking=False):
            return
        try:
            if not self._released:
                self._released = True
                self._release()
        finally:
            self._reading.release()


def open_source(uri: str, *, timeout_s: float = 10.0) -> Source:
    """The source that ``uri`` names, opened.

    ``timeout_s`` is how long a network stream may take to open, and to give its next frame, in
    seconds. Raises RequestError for a URI of no known kind or with wrong options, SourceError
    when there is nothing at it that can be read.
    """
    text = uri.strip()
    if not text:
        raise RequestError(f"a source is {_KNOWN}, and an empty text came")
    address, _, query = text.partition("?")
    if re.fullmatch(r"\d{1,3}", address):
        return CameraSource(text, int(address), _options(text, query, ("size", "fps")))
    if address.startswith("/dev/"):
        return CameraSource(text, address, _options(text, query, ("size", "fps")))
    if address.lower().startswith("synthetic:"):
        return _open_synthetic(text, address, query)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text)
    if scheme is not None and scheme[1].lower() in _NETWORK:
        if timeout_s <= 0:
            raise RequestError(f"a time-out is a number of seconds above 0, and {timeout_s} came")
        return NetworkSource(text, timeout_s)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(text, path)
    if path.exists():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return ImageSource(text, [path])
        return VideoSource(text, path)
    if scheme is not None:
        raise RequestError(f"a source is {_KNOWN}, and {_without_password(text)!r} came")
    if any(sign in text for sign in "*?["):
        return _open_pattern(text, path)
    raise SourceError(f"{text} does not exist; a source is {_KNOWN}")


class ImageSource(Source):
    """Images from files, one frame each, made BGR uint8 whatever they were.

    ``paths`` in the order to read. ``Frame.index`` is the place in that list: an image that
    cannot be read is left out, named in `notes`, and its number stays unused. Raises SourceError
    when none can be read.
    """

    def __init__(self, uri: str, paths: Sequence[Path]) -> None:
        super().__init__(uri, live=False, length=len(paths))
        self._paths = list(paths)
        self._next = 0
        self._unreadable: list[str] = []
        # Read ahead by one, so that a folder without a readable image is refused when it is opened.
        self._ahead = self._read_file()
        if self._ahead is None:
            what = (
                f"{paths[0]} is no image that OpenCV can read"
                if len(paths) == 1
                else f"none of the {len(paths)} images of {uri} can be read by OpenCV"
            )
            raise SourceError(f"{what}; is it damaged, or still being written?")
        self._size = (self._ahead.height, self._ahead.width)

    @property
    def notes(self) -> tuple[str, ...]:
        """Names of the images that were skipped."""
        if not self._unreadable:
            return ()
        named = ", ".join(self._unreadable[:5])
        more = len(self._unreadable) - 5
        note = (
            f"{len(self._unreadable)} of {len(self._paths)} images could not be read and were "
            f"skipped: {named}{f' and {more} more' if more > 0 else ''}"
        )
        return (note,)

    def _read(self) -> Frame | None:
        if self._ahead is not None:
            frame, self._ahead = self._ahead, None
            return Frame(frame.pixels, time.monotonic_ns(), frame.index)
        return self._read_file()

    def _read_file(self) -> Frame | None:
        while self._next < len(self._paths):
            index = self._next
            self._next += 1
            pixels = _read_image(self._paths[index])
            if pixels is not None:
                return Frame(pixels, time.monotonic_ns(), index)
            self._unreadable.append(self._paths[index].name)
        return None


class _CaptureSource(Source):
    """What an opened cv2.VideoCapture gives, frame by frame."""

    def __init__(
        self, uri: str, capture: cv2.VideoCapture, *, live: bool, length: int | None
    ) -> None:
        height = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        width = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        super().__init__(
            uri,
            live=live,
            size=(height, width) if height > 0 and width > 0 else None,
            # Streams without a rate of their own show their clock here (90 000 ticks per second).
            fps=fps if 0 < fps <= 1000 else None,
            length=length,
        )
        self._capture = capture
        self._frames = 0

    def _read(self) -> Frame | None:
        with quiet_opencv():
            grabbed = self._capture.grab()
            captured_ns = time.monotonic_ns()
            found, picture = self._capture.retrieve() if grabbed else (False, None)
        if not found or picture is None or picture.size == 0:
            return None
        frame = Frame(_as_bgr(picture), captured_ns, self._frames)
        self._frames += 1
        return frame

    def _release(self) -> None:
        with quiet_opencv():
            self._capture.release()


class VideoSource(_CaptureSource):
    """A video file. Ends where the last frame can be decoded, whatever the header promises.

    Raises SourceError for a file that is no video, or of which no frame can be decoded.
    """

    def __init__(self, uri: str, path: Path) -> None:
        if path.stat().st_size == 0:
            raise SourceError(f"{path} is empty, and a video was promised")
        if not os.access(path, os.R_OK):
            raise SourceError(f"{path} may not be read; change its permissions")
        with quiet_opencv():
            capture = cv2.VideoCapture(str(path))
            opened = capture.isOpened()
        if not opened:
            capture.release()
            raise SourceError(
                f"{path} is no video that OpenCV can read: it is damaged, incomplete, or of "
                "another kind; `ffmpeg -i FILE out.mp4` converts most"
            )
        super().__init__(uri, capture, live=False, length=_promised_length(capture))
        # Read ahead by one: a header says little about whether anything behind it can be decoded.
        self._ahead = super()._read()
        if self._ahead is None:
            capture.release()
            raise SourceError(
                f"{path} opens as a video, and not one frame of it can be decoded; "
                "`ffmpeg -i FILE out.mp4` shows why"
            )
        self._size = (self._ahead.height, self._ahead.width)
        self._ended = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether the header told the truth, once the file was read to its end."""
        if not self._ended or self._length is None:
            return ()
        if abs(self._length - self._frames) <= _HEADER_TOLERANCE:
            return ()
        note = (
            f"the header of {self._uri} promises {self._length} frames and {self._frames} "
            "could be read"
        )
        return (note,)

    def _read(self) -> Frame | None:
        if self._ahead is not None:
            frame, self._ahead = self._ahead, None
            return Frame(frame.pixels, time.monotonic_ns(), frame.index)
        following = super()._read()
        self._ended = following is None
        return following


class NetworkSource(_CaptureSource):
    """A stream over the network, opened by OpenCV's FFmpeg (or GStreamer, where that is built in).

    A file behind http, with a length, is no live source: nothing of it is dropped. Opening and
    reading each give up after ``timeout_s`` seconds with a SourceError (as far as OpenCV's backend
    knows time-outs). A stream that ends is at its end; `notes` says after how many frames.
    """

    def __init__(self, uri: str, timeout_s: float) -> None:
        self._name = _without_password(uri)
        self._timeout_s = timeout_s
        self._ended = False
        started = time.monotonic()
        with quiet_opencv():
            capture = _open_network(uri, timeout_s)
            opened = capture.isOpened()
        if not opened:
            capture.release()
            if time.monotonic() - started >= 0.9 * timeout_s:
                reason = f"gave no answer within {timeout_s:g} seconds"
            elif not _has_backend(cv2.CAP_FFMPEG) and not _has_backend(cv2.CAP_GSTREAMER):
                reason = "cannot be opened: this OpenCV has neither FFmpeg nor GStreamer"
            else:
                reason = "cannot be opened, or is no stream that OpenCV can read"
            raise SourceError(
                f"{self._name} {reason}; check the address, and that it plays elsewhere "
                "(ffplay, VLC)"
            )
        length = None if uri.lower().startswith(("rtsp", "udp")) else _promised_length(capture)
        super().__init__(uri, capture, live=length is None, length=length)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the stream ended, if it was not expected to."""
        if not self._ended:
            return ()
        if self._length is None:
            return (f"{self._name} ended after {self._frames} frames",)
        if self._length - self._frames > _HEADER_TOLERANCE:
            return (f"{self._name} promises {self._length} frames and {self._frames} came",)
        return ()

    def _read(self) -> Frame | None:
        started = time.monotonic()
        frame = super()._read()
        if frame is None and not self._closed.is_set():
            if time.monotonic() - started >= 0.9 * self._timeout_s:
                raise SourceError(
                    f"{self._name} gave nothing for {self._timeout_s:g} seconds, after "
                    f"{self._frames} frames; is it still there?"
                )
            if self._frames == 0:
                raise SourceError(f"{self._name} opens, and gives no frames; does it play?")
            self._ended = True
        return frame


class CameraSource(_CaptureSource):
    """A camera of this computer, by number or by device file.

    ``options`` may hold ``size`` ("720x1280") and ``fps``, which the camera is asked for; `notes`
    says when it chose otherwise. Raises SourceError when there is no such camera, or when it
    stops giving frames: a camera has no end.
    """

    def __init__(self, uri: str, device: int | str, options: dict[str, str]) -> None:
        self._device = device if isinstance(device, str) else f"camera {device}"
        wanted = parse_size(options["size"]) if "size" in options else None
        rate = _number(uri, "fps", options["fps"]) if "fps" in options else None
        node = Path(device if isinstance(device, str) else f"/dev/video{device}")
        if sys.platform == "linux":
            if not node.exists():
                self._refuse("is not here")
            if not os.access(node, os.R_OK | os.W_OK):
                self._refuse("may not be used by you (`sudo usermod -aG video $USER`, log in anew)")
        backend = cv2.CAP_ANY
        if sys.platform == "linux" and _has_backend(cv2.CAP_V4L2):
            backend = cv2.CAP_V4L2
        with quiet_opencv():
            capture = cv2.VideoCapture(device, backend)
            opened = capture.isOpened()
            if opened:
                # The driver's queue holds old frames; not every backend lets it be shortened.
                capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
                if wanted is not None:
                    capture.set(cv2.CAP_PROP_FRAME_WIDTH, wanted[1])
                    capture.set(cv2.CAP_PROP_FRAME_HEIGHT, wanted[0])
                if rate is not None:
                    capture.set(cv2.CAP_PROP_FPS, rate)
        if not opened:
            capture.release()
            self._refuse("cannot be opened; another program may hold it")
        super().__init__(uri, capture, live=True, length=None)
        self._choices: list[str] = []
        if wanted is not None and self._size is not None and self._size != wanted:
            self._choices.append(
                f"{self._device} was asked for {wanted[0]}x{wanted[1]} and gives "
                f"{self._size[0]}x{self._size[1]}"
            )
        if rate is not None and self._fps is not None and abs(self._fps - rate) > 0.5:
            self._choices.append(
                f"{self._device} was asked for {rate:g} frames per second and gives {self._fps:g}"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the camera did not follow the request."""
        return tuple(self._choices)

    def _read(self) -> Frame | None:
        frame = super()._read()
        if frame is None and not self._closed.is_set():
            if self._frames == 0:
                self._refuse("opens, and gives no frames")
            self._refuse(f"stopped giving frames after {self._frames}")
        return frame

    def _refuse(self, reason: str) -> NoReturn:
        here = ", ".join(cameras())
        there = f"the cameras here are {here}" if here else "no camera was found"
        raise SourceError(f"{self._device} {reason}; {there}, and `edgeseg doctor` tells more")


class SyntheticSource(Source):
    """A generated street with exact ground truth (`street`), as fast as it can be drawn.

    With ``live`` it behaves like a camera: a frame exists from its moment until the next one's,
    and who comes late gets a later frame. ``Frame.index`` is the number of the street's frame, so
    that ``street.frame(index)`` has the ground truth of any result.
    """

    def __init__(self, uri: str, street: Street, *, live: bool) -> None:
        super().__init__(
            uri,
            live=live,
            size=(street.height, street.width),
            fps=street.fps,
            length=street.frames,
        )
        self._street = street
        self._next = 0
        self._started_ns: int | None = None

    @property
    def street(self) -> Street:
        """The street behind the frames."""
        return self._street

    def _read(self) -> Frame | None:
        if self._live:
            self._wait_for_frame()
        index = self._next
        if self._closed.is_set() or (self._length is not None and index >= self._length):
            return None
        self._next += 1
        if self._live:
            # What a camera shows was there before it was read out: drawing counts as age.
            captured_ns = time.monotonic_ns()
            return Frame(self._street.frame(index).pixels, captured_ns, index)
        pixels = self._street.frame(index).pixels
        return Frame(pixels, time.monotonic_ns(), index)

    def _wait_for_frame(self) -> None:
        """Sets ``_next`` to the frame of this moment, or waits for the next one's."""
        now_ns = time.monotonic_ns()
        if self._started_ns is None:
            self._started_ns = now_ns
        period_ns = 1e9 / self._street.fps
        current = int((now_ns - self._started_ns) / period_ns)
        if current >= self._next:
            self._next = current
            return
        due_ns = self._started_ns + self._next * period_ns
        self._closed.wait(max(due_ns - now_ns, 0.0) / 1e9)


def cameras() -> tuple[str, ...]:
    """Device files of the cameras that Linux knows; empty elsewhere."""
    found = Path("/dev").glob("video*") if sys.platform == "linux" else ()
    return tuple(str(path) for path in sorted(found, key=_natural))


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_before: int | None = None


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Keeps OpenCV and its FFmpeg from writing to standard error inside the ``with`` block.

    What went wrong is told by EdgeSeg's own error. Setting OPENCV_LOG_LEVEL brings OpenCV's
    messages back, OPENCV_FFMPEG_LOGLEVEL those of FFmpeg, which reads it once per process.
    """
    global _quiet_depth, _quiet_before
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if "OPENCV_LOG_LEVEL" in os.environ:
        yield
        return
    # Several threads may be inside: the first turns the logging off, the last turns it on again.
    with _quiet_lock:
        _quiet_depth += 1
        if _quiet_depth == 1:
            _quiet_before = _swap_log_level(0)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0 and _quiet_before is not None:
                _swap_log_level(_quiet_before)


def _swap_log_level(level: int) -> int | None:
    """Sets OpenCV's log level and gives the one before, None where this OpenCV has no such call."""
    # OpenCV 5 has them in cv2.utils.logging, OpenCV 4 (from 4.5.x on) in cv2 itself.
    owners: tuple[Any, ...] = (getattr(getattr(cv2, "utils", None), "logging", None), cv2)
    for owner in owners:
        if hasattr(owner, "setLogLevel") and hasattr(owner, "getLogLevel"):
            before = int(owner.getLogLevel())
            owner.setLogLevel(level)
            return before
    return None


def _open_folder(uri: str, folder: Path) -> ImageSource:
    paths = [path for path in folder.iterdir() if _is_image(path)]
    if not paths:
        raise SourceError(
            f"the folder {uri} holds no images ({', '.join(IMAGE_SUFFIXES)}); "
            "give a video by its own name"
        )
    return ImageSource(uri, sorted(paths, key=_natural))


def _open_pattern(uri: str, path: Path) -> ImageSource:
    root, parts = Path(path.anchor), list(path.parts[1 if path.anchor else 0 :])
    while parts and not any(sign in parts[0] for sign in "*?["):
        root /= parts.pop(0)
    found = list(root.glob(str(Path(*parts)))) if root.is_dir() else []
    paths = [path for path in found if _is_image(path)]
    if not paths:
        raise SourceError(
            f"no image matches {uri} ({len(found)} other files do); "
            f"images end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return ImageSource(uri, sorted(paths, key=_natural))


def _open_synthetic(uri: str, address: str, query: str) -> SyntheticSource:
    names = ("seed", "size", "frames", "fps", "scene", "live")
    if address.lower() != "synthetic:":
        raise RequestError(
            f"a street is synthetic:?option=value&..., with the options {', '.join(names)}, "
            f"and {uri!r} came"
        )
    options = _options(uri, query, names)
    height, width = parse_size(options.get("size", "360x480"))
    frames = _whole(uri, "frames", options.get("frames", "300"))
    street = Street(
        height,
        width,
        seed=_whole(uri, "seed", options.get("seed", "0")),
        frames=frames if frames > 0 else None,
        fps=_number(uri, "fps", options.get("fps", "30")),
        scene=options.get("scene"),
    )
    return SyntheticSource(uri, street, live=_whole(uri, "live", options.get("live", "0")) > 0)


def _options(uri: str, query: str, names: Sequence[str]) -> dict[str, str]:
    """``"seed=3&fps=30"`` -> {"seed": "3", "fps": "30"}; RequestError for other names."""
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in names:
            raise RequestError(f"the options of {uri!r} are {', '.join(names)}, and {name!r} came")
    return options


def _whole(uri: str, name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise RequestError(f"{name} in {uri!r} is a whole number from 0, and {text!r} came")
    return int(text)


def _number(uri: str, name: str, text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d*)?", text) or float(text) <= 0:
        raise RequestError(f"{name} in {uri!r} is a number above 0, and {text!r} came")
    return float(text)


def _open_network(uri: str, timeout_s: float) -> cv2.VideoCapture:
    # OpenCV got these two in 4.5.2 and 4.5.3, for FFmpeg; GStreamer learned them later.
    limits: list[int] = []
    for name in ("CAP_PROP_OPEN_TIMEOUT_MSEC", "CAP_PROP_READ_TIMEOUT_MSEC"):
        if hasattr(cv2, name):
            limits += [int(getattr(cv2, name)), max(int(timeout_s * 1000), 1)]
    if limits and _has_backend(cv2.CAP_FFMPEG):
        capture = cv2.VideoCapture(uri, cv2.CAP_FFMPEG, limits)
        if capture.isOpened() or not _has_backend(cv2.CAP_GSTREAMER):
            return capture
        capture.release()
    return cv2.VideoCapture(uri)


def _has_backend(backend: int) -> bool:
    # Whether the backend is built in, not merely known by name: in wheels GStreamer is listed as a
    # plug-in that nobody has installed.
    registry = cv2.videoio_registry
    if hasattr(registry, "hasBackend"):
        return bool(registry.hasBackend(backend))
    return backend in registry.getBackends()


def _promised_length(capture: cv2.VideoCapture) -> int | None:
    # A stream without a duration shows as a huge negative number.
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < 1e9 else None


def _read_image(path: Path) -> Pixels | None:
    # Decoding from memory, because cv2.imread cannot open every name on Windows.
    try:
        encoded = np.frombuffer(path.read_bytes(), np.uint8)
        if encoded.size == 0:
            return None
        with quiet_opencv():
            picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        return None
    return None if picture is None or picture.size == 0 else _as_bgr(picture)


def _as_bgr(picture: Any) -> Pixels:
    """Any picture OpenCV gives -> (height, width, 3) uint8 BGR; the same array where it is one."""
    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    if picture.ndim == 2 or picture.shape[2] == 1:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
    elif picture.shape[2] == 4:
        picture = cv2.cvtColor(picture, cv2.COLOR_BGRA2BGR)
    pixels: Pixels = picture
    return pixels


def _is_image(path: Path) -> bool:
    # Names with a leading dot are other programs' side files (macOS writes "._photo.jpg").
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Sorts numbers inside names by value: frame2 before frame10."""
    pieces = re.split(r"(\d+)", str(path).casefold())
    return [int(piece) if piece.isdigit() else piece for piece in pieces], str(path)


def _without_password(uri: str) -> str:
    """The URI as it may be shown: rtsp://user:secret@host -> rtsp://user:***@host."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)
