"""Where results go: a video file, a folder of PNGs, a window, several of them, or nowhere."""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import cv2
from numpy.typing import NDArray

from edgeseg.errors import RequestError, SinkError, SourceError
from edgeseg.frame import Pixels
from edgeseg.result import Result
from edgeseg.source import quiet_opencv

__all__ = [
    "VIDEO_SUFFIXES",
    "ImageFolderSink",
    "MultiSink",
    "NullSink",
    "Sink",
    "VideoSink",
    "WindowSink",
    "open_sink",
]

# Per ending the codecs to try, best first. H.264 is what every browser plays, and what OpenCV's
# wheels may not bring; VP8, in .webm, they do bring, and it is slow to write.
_CODECS: dict[str, tuple[str, ...]] = {
    ".mp4": ("avc1", "mp4v"),
    ".mkv": ("avc1", "mp4v"),
    ".avi": ("MJPG",),
    ".webm": ("VP80",),
}
#: endings of the videos that can be written
VIDEO_SUFFIXES = tuple(_CODECS)

# Rate of a video whose source states none.
_USUAL_FPS = 25.0
# A gap in a live source is filled with the picture before it, up to this many seconds.
_LONGEST_GAP_S = 10.0

_ESCAPE = 27

_Sink = TypeVar("_Sink", bound="Sink")


class Sink(ABC):
    """Takes results, one after the other, in one thread.

    ``with`` closes it at the end. An error inside the block aborts it instead, so that nothing
    half-written stays. Ctrl-C, or a source that breaks off, closes it: what was written by then
    is whole, and may not come again.
    """

    @abstractmethod
    def write(self, result: Result) -> None:
        """Takes one result; raises SinkError when it cannot be written."""

    @property
    def stopped(self) -> bool:
        """Whether the user asked to end here (in a window); the loop that writes should end."""
        return False

    def close(self) -> None:  # noqa: B027 - some sinks have nothing to finish
        """Finishes what was written; raises SinkError if that fails. A second call does nothing."""

    def abort(self) -> None:
        """Takes back what is not finished; never raises SinkError. Does nothing when closed."""
        self.close()

    def __enter__(self: _Sink) -> _Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, (KeyboardInterrupt, GeneratorExit, SourceError)):
            self.close()
        else:
            self.abort()


class NullSink(Sink):
    """Takes results and does nothing with them."""

    def write(self, result: Result) -> None:
        """Does nothing."""


class VideoSink(Sink):
    """A video of the frames with their classes over them; the ending of ``path`` says which kind.

    Written under a temporary name in the same folder and renamed by `close`; a video that was
    there before is replaced only then. All pictures have the size of the first. Where frames of
    the source are missing (a live source drops what it has no time for), the picture before is
    repeated, so that the video keeps the pace of the world.

    ``fps`` is the source's rate, None for an unknown one. Raises RequestError for an ending that
    is not in `VIDEO_SUFFIXES`, SinkError when the folder cannot be written to or OpenCV has no
    encoder: both before the first frame.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: float | None = None,
        opacity: float = 0.5,
        legend: bool = True,
    ) -> None:
        self._path = Path(path).expanduser()
        suffix = self._path.suffix.lower()
        if suffix not in _CODECS:
            raise RequestError(
                f"a video ends in {', '.join(VIDEO_SUFFIXES)}, and {str(path)!r} came"
            )
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise RequestError(f"the frames per second are a number above 0, and {fps} came")
        _check_opacity(opacity)
        if self._path.is_dir():
            raise SinkError(f"{self._path} is a folder, and a video is to be written there")
        self._fps = fps or _USUAL_FPS
        self._opacity = opacity
        self._legend = legend
        self._part = _temporary(self._path)
        self._codec = _working_codec(self._part, self._path, self._fps)
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._last_index = -1
        self._closed = False

    @property
    def codec(self) -> str:
        """Four letters of the codec it writes with: ``avc1`` (H.264), ``mp4v``, ``MJPG``..."""
        return self._codec

    def write(self, result: Result) -> None:
        """Draws the result and appends it."""
        if self._closed:
            raise SinkError(f"{self._path} is finished, and one more frame came")
        picture = result.draw(opacity=self._opacity, legend=self._legend)
        repeats = 1
        if self._writer is None:
            self._writer = self._open(picture)
        else:
            longest = max(round(_LONGEST_GAP_S * self._fps), 1)
            repeats = min(max(result.index - self._last_index, 1), longest)
        self._last_index = result.index
        if picture.shape[:2] != self._size:
            picture = cv2.resize(  # type: ignore[assignment]
                picture, (self._size[1], self._size[0]), interpolation=cv2.INTER_AREA
            )
        with quiet_opencv():
            for _ in range(repeats):
                self._writer.write(picture)

    def close(self) -> None:
        """Finishes the video and gives it its name; no file when no frame came."""
        if self._closed:
            return
        self._closed = True
        if self._writer is None:
            self._part.unlink(missing_ok=True)
            return
        try:
            with quiet_opencv():
                self._writer.release()
                # The writer reports nothing, a full disk included: what it wrote must open again.
                check = cv2.VideoCapture(str(self._part))
                readable = check.isOpened() and check.grab()
                check.release()
            if not readable:
                raise SinkError(f"{self._path} could not be written to its end; is the disk full?")
            try:
                self._part.replace(self._path)
            except OSError as error:
                raise SinkError(f"{self._path} cannot be written ({_why(error)})") from error
        finally:
            self._part.unlink(missing_ok=True)

    def abort(self) -> None:
        """Removes what was written; a video that had the name before stays."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            with quiet_opencv():
                self._writer.release()
        self._part.unlink(missing_ok=True)

    def _open(self, picture: Pixels) -> cv2.VideoWriter:
        height, width = picture.shape[:2]
        with quiet_opencv():
            writer = _video_writer(self._part, self._codec, self._fps, height, width)
            opened = writer.isOpened()
        if not opened:
            writer.release()
            raise SinkError(
                f"OpenCV's {self._codec} encoder refuses {height}x{width} at {self._fps:g} frames "
                f"per second for {self._path}; .avi takes most sizes"
            )
        self._size = (height, width)
        return writer


class ImageFolderSink(Sink):
    """A folder of PNGs: ``<index>.png``, the frame with its classes over it, six digits.

    With ``masks`` also ``<index>_classes.png``, the class of every pixel as a grey value, or
    ``<index>_instances.png``, the number of the best instance there, from 1 on, 0 for none. The
    folder is made if it is not there. Each file appears whole, under its name, or not at all; an
    aborted run keeps those that were finished. Raises SinkError, before the first frame, when the
    folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        opacity: float = 0.5,
        legend: bool = True,
        masks: bool = False,
    ) -> None:
        _check_opacity(opacity)
        self._folder = Path(folder).expanduser()
        self._opacity = opacity
        self._legend = legend
        self._masks = masks
        self._made = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SinkError(
                f"the folder {self._folder} cannot be made ({_why(error)}); choose another"
            ) from error
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise SinkError(f"the folder {self._folder} may not be written to; choose another")

    def write(self, result: Result) -> None:
        """Writes the pictures of one result."""
        name = f"{result.index:06d}"
        if self._masks:
            for kind, values in result.maps().items():
                self._save(f"{name}_{kind}.png", values)
        picture = result.draw(opacity=self._opacity, legend=self._legend)
        self._save(f"{name}.png", picture)

    def close(self) -> None:
        """Removes the folder again if it was made for nothing."""
        if self._made and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _save(self, name: str, picture: NDArray[Any]) -> None:
        # Level 1: a quarter of the time of OpenCV's default, for files a little larger.
        done, encoded = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        target = self._folder / name
        if not done:
            raise SinkError(f"OpenCV cannot encode {target} as PNG")
        part = _temporary(target)
        try:
            part.write_bytes(encoded.tobytes())
            part.replace(target)
        except OSError as error:
            raise SinkError(f"{target} cannot be written ({_why(error)})") from error
        finally:
            part.unlink(missing_ok=True)


class WindowSink(Sink):
    """A window on the screen. Q, Escape, or closing the window sets `stopped`.

    Belongs to the thread that made it, which on macOS must be the main thread. Raises SinkError
    when OpenCV is a build without windows, or there is no display.
    """

    def __init__(
        self, title: str = "EdgeSeg", *, opacity: float = 0.5, legend: bool = True
    ) -> None:
        _check_opacity(opacity)
        _check_windows()
        self._title = title
        self._opacity = opacity
        self._legend = legend
        self._stopped = False
        self._open = False
        self._was_visible = False
        self._closed = False

    @property
    def stopped(self) -> bool:
        """Whether the user pressed Q or Escape, or closed the window."""
        return self._stopped

    def write(self, result: Result) -> None:
        """Shows one result; nothing once the window was closed."""
        if self._stopped or self._closed:
            return
        picture = result.draw(opacity=self._opacity, legend=self._legend)
        try:
            if not self._open:
                cv2.namedWindow(self._title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
                cv2.resizeWindow(self._title, picture.shape[1], picture.shape[0])
                self._open = True
            cv2.imshow(self._title, picture)
            key = cv2.waitKey(1) & 0xFF
            visible = cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) > 0
        except cv2.error as error:
            raise SinkError(
                "the window cannot be shown; write the result with --save instead"
            ) from error
        # Some backends don't know whether a window is visible, and always deny it.
        if key in (ord("q"), ord("Q"), _ESCAPE) or (self._was_visible and not visible):
            self._stopped = True
        self._was_visible = visible

    def close(self) -> None:
        """Closes the window."""
        if self._closed:
            return
        self._closed = True
        if self._open:
            # A window that the user has closed is gone already, and some backends say so.
            try:
                cv2.destroyWindow(self._title)
                cv2.waitKey(1)
            except cv2.error:
                return


class MultiSink(Sink):
    """Several sinks as one: each gets every result, in their order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    @property
    def stopped(self) -> bool:
        """Whether any of them was stopped."""
        return any(sink.stopped for sink in self._sinks)

    def write(self, result: Result) -> None:
        """Writes to each."""
        for sink in self._sinks:
            sink.write(result)

    def close(self) -> None:
        """Closes each, also when one fails; the first failure is raised then."""
        failure: SinkError | None = None
        for sink in self._sinks:
            try:
                sink.close()
            except SinkError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def abort(self) -> None:
        """Aborts each."""
        for sink in self._sinks:
            sink.abort()


def open_sink(
    target: str | os.PathLike[str] | None,
    *,
    show: bool = False,
    fps: float | None = None,
    opacity: float = 0.5,
    legend: bool = True,
    masks: bool = False,
) -> Sink:
    """The sink for ``target``: a video by its ending, a folder of PNGs for a name without one.

    ``show`` adds a window; without either, results go nowhere. ``fps`` is for videos, ``masks``
    for folders. Raises RequestError for an ending that is no video's, SinkError when the output
    cannot be written or shown: nothing has been processed by then.
    """
    sinks: list[Sink] = []
    # The window first: that it cannot be shown should not leave a file behind.
    if show:
        sinks.append(WindowSink(opacity=opacity, legend=legend))
    if target is not None:
        path = Path(target).expanduser()
        if path.is_dir() or not path.suffix:
            sinks.append(ImageFolderSink(path, opacity=opacity, legend=legend, masks=masks))
        elif path.suffix.lower() in _CODECS:
            sinks.append(VideoSink(path, fps=fps, opacity=opacity, legend=legend))
        else:
            raise RequestError(
                f"results are written to a video ({', '.join(VIDEO_SUFFIXES)}) or, for a name "
                f"without an ending, to a folder of PNGs, and {str(target)!r} came"
            )
    if not sinks:
        return NullSink()
    return sinks[0] if len(sinks) == 1 else MultiSink(sinks)


def _check_opacity(opacity: float) -> None:
    if not 0.0 <= opacity <= 1.0:
        raise RequestError(f"an opacity is between 0 and 1, and {opacity} came")


def _temporary(target: Path) -> Path:
    """An empty file beside ``target``, with its ending (OpenCV reads the format from it).

    Raises SinkError when the folder cannot be written to.
    """
    if not target.parent.is_dir():
        raise SinkError(f"the folder {target.parent} does not exist; make it, or choose another")
    part = target.with_name(f".{target.stem}-{secrets.token_hex(4)}.part{target.suffix.lower()}")
    try:
        part.touch(exist_ok=False)
    except OSError as error:
        raise SinkError(f"{target} cannot be written ({_why(error)}); choose another") from error
    return part


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _video_writer(path: Path, codec: str, fps: float, height: int, width: int) -> cv2.VideoWriter:
    return cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (width, height))


def _working_codec(part: Path, target: Path, fps: float) -> str:
    """The first codec for this ending that OpenCV can write with; ``part`` is left empty."""
    codecs = _CODECS[part.suffix]
    for codec in codecs:
        with quiet_opencv():
            writer = _video_writer(part, codec, fps, 240, 320)
            works = writer.isOpened()
            writer.release()
        if works:
            return codec
    part.unlink(missing_ok=True)
    raise SinkError(
        f"this OpenCV has no encoder for {target} ({', '.join(codecs)}); try another ending "
        f"({', '.join(VIDEO_SUFFIXES)}), or a folder of PNGs"
    )


# What opens a window and closes it again, for a process of its own: without a display, some of
# OpenCV's window backends end the whole process instead of raising.
_WINDOW_PROBE = "import cv2; cv2.namedWindow('EdgeSeg'); cv2.waitKey(1); cv2.destroyAllWindows()"


def _check_windows() -> None:
    """Raises SinkError, with the fix, where no window can be opened."""
    if _is_headless():
        raise SinkError(
            "this OpenCV is a headless build and opens no windows; "
            "`pip uninstall opencv-python-headless` and `pip install opencv-python`, or use --save"
        )
    no_display = (
        "there is no display to open a window on; use --save, or start it in a desktop session"
    )
    if sys.platform == "linux":
        if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
            raise SinkError(no_display)
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _WINDOW_PROBE],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SinkError(no_display) from error
        if probe.returncode != 0:
            raise SinkError(no_display)


def _is_headless() -> bool:
    if not hasattr(cv2, "imshow"):
        return True
    gui = [line for line in cv2.getBuildInformation().splitlines() if "GUI:" in line]
    return any(line.split("GUI:")[1].strip().upper() in ("NONE", "NO") for line in gui)
