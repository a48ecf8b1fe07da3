"""Recordings that a viewer starts and stops: videos of one source each, in one folder."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import threading
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeseg.errors import EdgeSegError, SinkError
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.result import Result
from edgeseg.sink import Outlet, Sink, VideoSink
from edgeseg.spec import ModelSpec

__all__ = ["Recording", "RecordingState", "Recordings", "Video"]

# Rate of a recording whose source states none, and the highest: more is not seen on a page, and
# costs what the network could have had.
_USUAL_FPS, _HIGHEST_FPS = 25.0, 30.0
# Seconds of pictures that may wait for the disk, and seconds that it may take over one.
_WAITING_S, _PATIENCE_S = 1.0, 10.0
_SUFFIX = ".mp4"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.mp4", re.ASCII)
_LISTED = 100


@dataclass(frozen=True)
class Video:
    """A finished recording: its file's name, its size, and when it was finished (Unix time)."""

    file: str
    size: int
    finished: float


@dataclass(frozen=True)
class RecordingState:
    """A recording that runs; ``dropped`` are pictures that the disk was too slow for."""

    id: str
    source: str
    file: str
    seconds: float
    written: int
    dropped: int
    size: int
    error: str | None


class Recording:
    """A video that is being written, at the pace of the clock: one picture per tick of ``fps``.

    `offer` is for the pipeline's thread and never waits. It takes the first result of each tick:
    a fast file is thinned out, and where a slow or broken camera gives nothing, the video repeats
    its last picture. Pictures the disk is too slow for are dropped and counted.
    """

    def __init__(self, name: str, source: str, sink: Sink, part: Path, fps: float) -> None:
        self._id = name.removesuffix(_SUFFIX)
        self._file = name
        self._source = source
        self._part = part
        self._fps = fps
        depth = max(round(_WAITING_S * fps), 2)
        self._outlet = Outlet(
            sink, name=f"recording {self._id}", policy="drop", depth=depth, patience_s=_PATIENCE_S
        )
        self._started = time.monotonic()
        self._first_ns: int | None = None
        self._tick = -1

    @property
    def id(self) -> str:
        """Its name in addresses."""
        return self._id

    @property
    def source(self) -> str:
        """The name of the source that it is of."""
        return self._source

    @property
    def error(self) -> SinkError | None:
        """Why it takes nothing any more."""
        return self._outlet.error

    @property
    def state(self) -> RecordingState:
        """How it is doing."""
        stats = self._outlet.stats
        try:
            size = self._part.stat().st_size
        except OSError:
            size = 0
        return RecordingState(
            id=self._id,
            source=self._source,
            file=self._file,
            seconds=time.monotonic() - self._started,
            written=stats.written,
            dropped=stats.dropped,
            size=size,
            error=stats.error,
        )

    def offer(self, result: Result) -> None:
        """Takes the result if its tick has no picture yet; SinkError when it is finished."""
        captured_ns = result.frame.captured_ns
        if self._first_ns is None:
            self._first_ns = captured_ns
        tick = round((captured_ns - self._first_ns) * self._fps / 1e9)
        if tick <= self._tick:
            return
        self._tick = tick
        self._outlet.write(_Ticked(result, tick))

    def finish(self) -> None:
        """Finishes the file; SinkError when that fails, or failed before."""
        self._outlet.close()


class Recordings:
    """The recordings of one folder, running and finished; one at most per source runs.

    ``folder`` None: there are none, and `start` says so. ``reserve`` bytes of its disk are never
    written: recordings end when no more are left. ``opacity`` and ``legend`` are `VideoSink`'s.
    Every method may be called from any thread, and may wait for the disk.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        reserve: int = 500_000_000,
        opacity: float = 0.5,
        legend: bool = False,
    ) -> None:
        self._folder = None if folder is None else folder.expanduser()
        self._reserve = reserve
        self._opacity = opacity
        self._legend = legend
        self._lock = threading.Lock()
        self._running: dict[str, Recording] = {}
        self._notes: dict[str, str] = {}
        if self._folder is not None:
            _make(self._folder)

    @property
    def folder(self) -> Path | None:
        """Where they are written."""
        return self._folder

    def running(self) -> list[RecordingState]:
        """Those that run, oldest first."""
        with self._lock:
            return [recording.state for recording in self._running.values()]

    def notes(self) -> dict[str, str]:
        """By source, why its last recording ended on its own; a new one takes the note away."""
        with self._lock:
            return dict(self._notes)

    def finished(self) -> list[Video]:
        """The videos in the folder, newest first; a hundred at most."""
        if self._folder is None:
            return []
        found = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        there = entry.stat(follow_symlinks=False)
                        found.append(Video(entry.name, there.st_size, there.st_mtime))
        except OSError:
            # The folder is gone, or its disk is: there are no recordings to be had.
            return []
        return sorted(found, key=lambda video: (-video.finished, video.file))[:_LISTED]

    def path(self, file: str) -> Path | None:
        """The finished recording of that name; None for any other name, whatever it leads to."""
        if self._folder is None or not _NAME.fullmatch(file):
            return None
        path = self._folder / file
        return path if path.is_file() and not path.is_symlink() else None

    def start(self, source: str, fps: float | None) -> Recording:
        """Starts one; SinkError, in a sentence, when that cannot be."""
        folder = self._folder
        if folder is None:
            raise SinkError(
                "There is no folder for recordings; start the program with --recordings FOLDER."
            )
        with self._lock:
            if source in self._running:
                raise SinkError(f"{source} is being recorded already; stop that recording first.")
            if self._is_full(folder):
                raise SinkError(self._full())
            name = _free_name(folder, source)
            rate = min(fps or _USUAL_FPS, _HIGHEST_FPS)
            video = VideoSink(folder / name, fps=rate, opacity=self._opacity, legend=self._legend)
            recording = Recording(name, source, video, _part_of(folder, name), rate)
            self._running[source] = recording
            self._notes.pop(source, None)
            return recording

    def stop(self, recording: Recording) -> Video | None:
        """Finishes one; the video, or None when not one picture came. SinkError when it failed."""
        with self._lock:
            if self._running.get(recording.source) is recording:
                del self._running[recording.source]
        recording.finish()
        path = self.path(f"{recording.id}{_SUFFIX}")
        if path is None:
            return None
        there = path.stat()
        return Video(path.name, there.st_size, there.st_mtime)

    def failing(self) -> list[tuple[Recording, str]]:
        """Those that should be stopped, and why: the disk is full, or it failed."""
        if self._folder is None:
            return []
        with self._lock:
            recordings = list(self._running.values())
        if not recordings:
            return []
        full = self._is_full(self._folder)
        found = []
        for recording in recordings:
            if recording.error is not None:
                found.append((recording, str(recording.error)))
            elif full:
                found.append((recording, self._full()))
        return found

    def give_up(self, recording: Recording, reason: str) -> None:
        """Stops one on its own account; what was written is kept where it can be."""
        try:
            self.stop(recording)
        except EdgeSegError as error:
            reason = str(error)
        with self._lock:
            self._notes[recording.source] = reason

    def close(self) -> None:
        """Finishes all that run; never raises."""
        with self._lock:
            recordings = list(self._running.values())
        for recording in recordings:
            self.give_up(recording, "the program ended")

    def _is_full(self, folder: Path) -> bool:
        try:
            return shutil.disk_usage(folder).free < self._reserve
        except OSError:
            # Opening the video says what is wrong with the folder.
            return False

    def _full(self) -> str:
        return (
            f"The disk of the recordings has less than {self._reserve / 1e6:.0f} MB left; "
            "make room, or choose another folder."
        )


class _Ticked:
    """A result with another number: that of its tick, from which a video takes its pace."""

    def __init__(self, result: Result, index: int) -> None:
        self._result = result
        self._index = index

    @property
    def frame(self) -> Frame:
        return self._result.frame

    @property
    def spec(self) -> ModelSpec:
        return self._result.spec

    @property
    def geometry(self) -> Geometry:
        return self._result.geometry

    @property
    def finished_ns(self) -> int:
        return self._result.finished_ns

    @property
    def index(self) -> int:
        return self._index

    @property
    def age_ms(self) -> float:
        return self._result.age_ms

    @property
    def summary(self) -> str:
        return self._result.summary

    def maps(self) -> dict[str, NDArray[Any]]:
        return self._result.maps()

    def draw(self, *, opacity: float = 0.5, legend: bool = True) -> Pixels:
        return self._result.draw(opacity=opacity, legend=legend)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise SinkError(
            f"the folder {folder} for recordings cannot be made ({why}); choose another"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SinkError(f"the folder {folder} for recordings may not be written to; choose another")


def _free_name(folder: Path, source: str) -> str:
    """``door-20260731-142530.mp4``, which is no file's yet."""
    plain = unicodedata.normalize("NFKD", source).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:60] or "source"
    stem = f"{slug}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    name, number = f"{stem}{_SUFFIX}", 2
    while (folder / name).exists():
        name, number = f"{stem}-{number}{_SUFFIX}", number + 1
    return name


def _part_of(folder: Path, name: str) -> Path:
    """The file that a video is written to before it has its name."""
    stem = name.removesuffix(_SUFFIX)
    return next(folder.glob(f".{stem}-*.part{_SUFFIX}"), folder / name)
