"""A video file of the results."""

from __future__ import annotations

import math
import os
from pathlib import Path

import cv2

from edgeseg.errors import RequestError, SinkError
from edgeseg.frame import Pixels
from edgeseg.result import Result
from edgeseg.sink.base import Sink, check_opacity
from edgeseg.sink.drawing import drawn
from edgeseg.sink.mp4 import matroska_to_mp4
from edgeseg.sink.part import Part, reason_of
from edgeseg.source import quiet_opencv

__all__ = ["VIDEO_SUFFIXES", "VideoSink"]


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


class VideoSink(Sink):
    """A video of the frames with their classes over them; the ending of ``path`` says which kind.

    Written as ``<name>.part...`` in the same folder and renamed by `close`; a video that was there
    before is replaced only then. Should the run be killed, that file stays and plays, but for the
    last quarter of a megabyte, about a second: an .mp4, which would not, is written as Matroska and
    becomes an MP4 when it is closed, without a picture being copied. The next sink for the same
    path has it in `notes` and leaves it alone. All pictures have the size of the first. Where
    frames of the source are missing (a live source drops what it has no time for), the picture
    before is repeated, so that the video keeps the pace of the world.

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
        check_opacity(opacity)
        if self._path.is_dir():
            raise SinkError(f"{self._path} is a folder, and a video is to be written there")
        self._fps = fps or _USUAL_FPS
        self._opacity = opacity
        self._legend = legend
        self._part, self._codec = _working_part(self._path, self._fps)
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._last_index = -1
        self._closed = False

    @property
    def codec(self) -> str:
        """Four letters of the codec it writes with: ``avc1`` (H.264), ``mp4v``, ``MJPG``..."""
        return self._codec

    @property
    def notes(self) -> tuple[str, ...]:
        """Which videos for the same path killed runs have left."""
        return tuple(
            f"{path} is what a run that was killed has left of a video; it plays up to there"
            for path in self._part.leftovers
        )

    def write(self, result: Result) -> None:
        """Draws the result and appends it."""
        if self._closed:
            raise SinkError(f"{self._path} is finished, and one more frame came")
        picture = drawn(result, opacity=self._opacity, legend=self._legend)
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
        """Finishes the video and gives it its name; no file when no frame came.

        Where that fails, what was written is left, and named in the error, if it plays.
        """
        if self._closed:
            return
        self._closed = True
        if self._writer is None:
            self._part.remove()
            return
        try:
            with quiet_opencv():
                self._writer.release()
                readable = _plays(self._part.path)
                if readable and self._part.path.suffix != self._path.suffix.lower():
                    matroska_to_mp4(self._part.path, self._fps)
                    readable = _plays(self._part.path)
            # The writer reports nothing, a full disk included: what it wrote must open again.
            if not readable:
                self._part.remove()
                raise SinkError(f"{self._path} could not be written to its end; is the disk full?")
            self._part.keep()
        except OSError as error:
            raise SinkError(
                f"{self._path} cannot be written ({reason_of(error)}); what there is of it is "
                f"{self._part.path}"
            ) from error
        finally:
            self._part.leave()

    def abort(self) -> None:
        """Removes what was written; a video that had the name before stays."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            with quiet_opencv():
                self._writer.release()
        self._part.remove()

    def _open(self, picture: Pixels) -> cv2.VideoWriter:
        height, width = picture.shape[:2]
        with quiet_opencv():
            writer = _video_writer(self._part.path, self._codec, self._fps, height, width)
            opened = writer.isOpened()
        if not opened:
            writer.release()
            raise SinkError(
                f"OpenCV's {self._codec} encoder refuses {height}x{width} at {self._fps:g} frames "
                f"per second for {self._path}; .avi takes most sizes"
            )
        self._size = (height, width)
        return writer


def _video_writer(path: Path, codec: str, fps: float, height: int, width: int) -> cv2.VideoWriter:
    return cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (width, height))


def _working_part(target: Path, fps: float) -> tuple[Part, str]:
    """An empty file to write to, and the first codec that OpenCV can write into it."""
    suffix = target.suffix.lower()
    codecs = _CODECS[suffix]
    # An OpenCV without FFmpeg may know how to write one of them only.
    for written_as in (".mkv", ".mp4") if suffix == ".mp4" else (suffix,):
        part = Part(target, written_as)
        for codec in codecs:
            with quiet_opencv():
                writer = _video_writer(part.path, codec, fps, 240, 320)
                works = writer.isOpened() and (written_as == suffix or _is_ffmpeg(writer))
                writer.release()
            if works:
                return part, codec
        part.remove()
    raise SinkError(
        f"this OpenCV has no encoder for {target} ({', '.join(codecs)}); try another ending "
        f"({', '.join(VIDEO_SUFFIXES)}), or a folder of PNGs"
    )


def _is_ffmpeg(writer: cv2.VideoWriter) -> bool:
    return writer.getBackendName() == "FFMPEG"


def _plays(path: Path) -> bool:
    check = cv2.VideoCapture(str(path))
    try:
        return bool(check.isOpened() and check.grab())
    finally:
        check.release()
