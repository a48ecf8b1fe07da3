"""Sinks: what they write, and that nothing half-written is ever left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import EdgeSegError, RequestError, SinkError, SourceError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, SemanticResult
from edgeseg.sink import (
    ImageFolderSink,
    MultiSink,
    NullSink,
    Sink,
    VideoSink,
    WindowSink,
    open_sink,
)
from edgeseg.sink import video as video_module
from edgeseg.sink import window as window_module
from edgeseg.source import open_source
from edgeseg.spec import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="halves",
    architecture="none",
    task="semantic",
    height=48,
    width=64,
    classes=("left", "right"),
    colours=((255, 0, 0), (0, 0, 255)),
    ignore=255,
    preprocessing=Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr"),
)


def result(index: int, level: int = 100, size: tuple[int, int] = (48, 64)) -> SemanticResult:
    frame = Frame.of(np.full((*size, 3), level, np.uint8), index)
    class_map = np.zeros((48, 64), np.uint8)
    class_map[:, 32:] = 1
    return SemanticResult.from_outputs(
        Outputs(class_map), frame, Geometry.between(*size, SPEC), SPEC
    )


def pictures(path: Path) -> list[NDArray[np.uint8]]:
    with open_source(str(path)) as source:
        found = [frame.pixels for frame in source]
        assert source.notes == ()
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- videos


@pytest.mark.parametrize("name", ["out.mp4", "out.avi", "out.mkv", "OUT.MP4", "out.webm"])
def test_video(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    try:
        sink = VideoSink(path, fps=12.0, opacity=0.0, legend=False)
    except SinkError as error:
        pytest.skip(str(error))
    with sink:
        for index in range(15):
            sink.write(result(index, level=10 * index + 40))
        assert not path.exists()
    assert names(tmp_path) == [name]
    found = pictures(path)
    assert [float(picture.mean()) for picture in found] == pytest.approx(
        [10.0 * index + 40 for index in range(15)], abs=6
    )
    with open_source(str(path)) as source:
        assert source.fps == pytest.approx(12.0, rel=0.02)
        assert source.size == (48, 64)


def test_video_shows_the_classes(tmp_path: Path) -> None:
    path = tmp_path / "out.avi"
    with VideoSink(path, opacity=1.0, legend=False) as sink:
        sink.write(result(0))
    (picture,) = pictures(path)
    assert np.abs(picture[10:40, 5:27].astype(int) - (0, 0, 255)).max() < 30
    assert np.abs(picture[10:40, 37:60].astype(int) - (255, 0, 0)).max() < 30


def test_video_keeps_its_size_and_its_pace(tmp_path: Path) -> None:
    path = tmp_path / "out.avi"
    with VideoSink(path, fps=2.0, legend=False) as sink:
        # Numbers 4 and 5 were dropped on the way, and a gap of an hour is not all filled.
        for index, size in ((3, (48, 64)), (6, (100, 90)), (7, (20, 30)), (7207, (48, 64))):
            sink.write(result(index, size=size))
    found = pictures(path)
    assert {picture.shape for picture in found} == {(48, 64, 3)}
    assert len(found) == 1 + 3 + 1 + 20


def stop(error: BaseException) -> Callable[[Sink], None]:
    def body(sink: Sink) -> None:
        for index in range(3):
            sink.write(result(index))
        raise error

    return body


def write_three(sink: Sink) -> None:
    for index in range(3):
        sink.write(result(index))


def write_nothing(sink: Sink) -> None:
    """Leaves the sink as it is."""


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (write_three, True),
        (write_nothing, False),
        (stop(KeyboardInterrupt()), True),
        (stop(SourceError("the camera was unplugged")), True),
        (stop(EdgeSegError("the engine broke")), False),
        (stop(ZeroDivisionError()), False),
    ],
)
@pytest.mark.parametrize("before", [None, b"an older video"])
def test_video_is_whole_or_not_there(
    tmp_path: Path, body: Callable[[Sink], None], kept: bool, before: bytes | None
) -> None:
    path = tmp_path / "out.avi"
    if before is not None:
        path.write_bytes(before)
    sink = VideoSink(path)
    try:
        with sink:
            body(sink)
    except (KeyboardInterrupt, EdgeSegError, ZeroDivisionError):
        assert body is not write_three
    sink.close()
    sink.abort()
    if kept:
        assert len(pictures(path)) == 3
    elif before is not None:
        assert path.read_bytes() == before
    assert names(tmp_path) == (["out.avi"] if kept or before is not None else [])


@pytest.mark.parametrize("fails", ["replace", "open"])
def test_video_that_cannot_be_finished_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(self: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    sink = VideoSink(tmp_path / "out.mp4")
    if sink._part.path.suffix != ".mkv":
        sink.abort()
        pytest.skip("this OpenCV writes no Matroska")
    write_three(sink)
    with monkeypatch.context() as patch:
        patch.setattr(Path, fails, full)
        with pytest.raises(
            SinkError, match=r"out\.mp4 cannot be written \(no space left.*out\.part\.mkv"
        ):
            sink.close()
    assert names(tmp_path) == ["out.part.mkv"]
    assert len(pictures(tmp_path / "out.part.mkv")) == 3


def test_video_of_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = VideoSink(tmp_path / "out.mp4")
    sink.write(result(0))
    monkeypatch.setattr(video_module, "_plays", lambda path: False)
    with pytest.raises(SinkError, match="could not be written to its end"):
        sink.close()
    assert names(tmp_path) == []


# Writes the same 60 frames to every path that it is given, and kills itself.
KILLED = """
import os, signal, sys
import cv2, numpy as np
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, SemanticResult
from edgeseg.sink import VideoSink
from edgeseg.spec import ModelSpec, Preprocessing
preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr")
spec = ModelSpec("x", "none", "semantic", 48, 64, ("a",), ((0, 0, 0),), 255, preprocessing)
cv2.setNumThreads(1)
sinks = [VideoSink(path, fps=20.0, opacity=0.0, legend=False) for path in sys.argv[1:]]
noise = np.random.default_rng(0).integers(0, 80, (240, 320, 3), dtype=np.uint8)
for index in range(60):
    frame = Frame.of(np.roll(noise, 7 * index, axis=0) + np.uint8(2 * index), index)
    outputs = Outputs(np.zeros((48, 64), np.uint8))
    result = SemanticResult.from_outputs(outputs, frame, Geometry.between(240, 320, spec), spec)
    for sink in sinks:
        sink.write(result)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_video_of_a_killed_run_plays_and_is_told_of(tmp_path: Path) -> None:
    targets = [tmp_path / name for name in ("a.mp4", "a.mp4", "b.mkv", "c.avi")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, targets)],
        timeout=120,
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(tmp_path) == ["a.part-2.mkv", "a.part.mkv", "b.part.mkv", "c.part.avi"]
    left = sorted(tmp_path.iterdir())
    for one in left:
        capture, found = cv2.VideoCapture(str(one)), []
        while True:
            got, picture = capture.read()
            if not got:
                break
            found.append(float(picture.mean()))
        # The last quarter of a megabyte is lost, and of Matroska what was not a whole cluster.
        assert 30 <= len(found) <= 60
        assert found == pytest.approx([39.5 + 2 * index for index in range(len(found))], abs=4)
    before = [one.read_bytes() for one in left]
    with VideoSink(targets[0], legend=False) as sink:
        assert [note.split()[0] for note in sink.notes] == [str(left[0]), str(left[1])]
        assert "what a run that was killed has left" in sink.notes[0]
        # One that is being written is no leftover.
        with VideoSink(targets[0], legend=False) as other:
            assert len(other.notes) == 2
        write_three(sink)
    assert sorted(tmp_path.iterdir()) == sorted([targets[0], *left])
    assert [one.read_bytes() for one in left] == before
    assert len(pictures(targets[0])) == 3


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("out.gif", RequestError, r"\.mp4, \.mkv, \.avi, \.webm"),
        ("no such folder/out.mp4", SinkError, "does not exist"),
        ("a file/out.mp4", SinkError, "does not exist"),
        ("folder.mp4", SinkError, "is a folder"),
    ],
)
def test_video_that_cannot_be_is_refused_at_once(
    tmp_path: Path, name: str, error: type[Exception], says: str
) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(error, match=says):
        VideoSink(tmp_path / name)
    assert names(tmp_path) == ["a file", "folder.mp4"]


def test_folder_without_permission_is_refused_at_once(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(SinkError, match="permission denied"):
        VideoSink(locked / "out.mp4")
    with pytest.raises(SinkError, match="may not be written to"):
        ImageFolderSink(locked)


def test_missing_encoder_names_the_other_endings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(video_module._CODECS, ".mp4", ("none", "nil?"))
    with pytest.raises(SinkError, match=r"no encoder for .*out\.mp4 \(none, nil\?\)"):
        VideoSink(tmp_path / "out.mp4")
    assert names(tmp_path) == []


def test_writing_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with VideoSink(tmp_path / "out.mp4") as sink:
        sink.write(result(0))
    assert sink.codec in ("avc1", "mp4v")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fps", "opacity", "says"),
    [(0.0, 0.5, "above 0"), (float("nan"), 0.5, "above 0"), (25.0, 1.1, "between 0 and 1")],
)
def test_wrong_numbers(tmp_path: Path, fps: float, opacity: float, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        VideoSink(tmp_path / "out.mp4", fps=fps, opacity=opacity)
    assert names(tmp_path) == []


# --- folders


@pytest.mark.parametrize("masks", [False, True])
def test_folder_of_pngs(tmp_path: Path, masks: bool) -> None:
    folder = tmp_path / "new" / "out"
    given = [result(0), result(12, size=(30, 20))]
    with ImageFolderSink(folder, masks=masks) as sink:
        for one in given:
            sink.write(one)
    overlays = ["000000.png", "000012.png"]
    classes = ["000000_classes.png", "000012_classes.png"]
    assert names(folder) == sorted(overlays + classes * masks)
    for one, overlay, plane in zip(given, overlays, classes, strict=True):
        np.testing.assert_array_equal(cv2.imread(str(folder / overlay)), one.draw())
        if masks:
            found = cv2.imread(str(folder / plane), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(found, one.class_map)


def test_aborted_folder_keeps_whole_pictures_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(SinkError, match=r"000001\.png cannot be written \(no space left"),
        ImageFolderSink(tmp_path) as sink,
    ):
        sink.write(result(0))
        monkeypatch.setattr(Path, "write_bytes", full)
        sink.write(result(1))
    assert names(tmp_path) == ["000000.png"]


def test_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with ImageFolderSink(tmp_path / name):
            pass
    assert names(tmp_path) == ["old"]


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for folder in (tmp_path / "taken", tmp_path / "taken" / "out"):
        with pytest.raises(SinkError, match="cannot be made"):
            ImageFolderSink(folder)


# --- windows


def test_headless_build_says_how_to_get_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "\n  GUI:                 NONE\n")
    with pytest.raises(SinkError, match=r"pip install opencv-python`, or use --save"):
        WindowSink()


def test_no_display_is_said_and_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux runs without a display")
    monkeypatch.setattr(window_module, "_is_headless", lambda: False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for display in (None, "127.0.0.1:98"):
        if display is None:
            monkeypatch.delenv("DISPLAY", raising=False)
        else:
            monkeypatch.setenv("DISPLAY", display)
        with pytest.raises(SinkError, match=r"no display .* use --save"):
            WindowSink()


class _Screen:
    """Stands in for OpenCV's windows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.key = -1
        self.visible = 1.0
        monkeypatch.setattr(window_module, "_check_windows", lambda: None)
        for name in ("namedWindow", "resizeWindow", "imshow", "destroyWindow"):
            monkeypatch.setattr(cv2, name, lambda *_, name=name: self.calls.append(name))
        monkeypatch.setattr(cv2, "waitKey", lambda _: self.key)
        monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: self.visible)


@pytest.mark.parametrize(
    ("key", "visible", "stopped"),
    [
        (-1, 1.0, False),
        (ord("x"), 1.0, False),
        (ord("q"), 1.0, True),
        (27, 1.0, True),
        (-1, 0.0, True),
        (-1, -1.0, True),
    ],
)
def test_window_ends_by_key_or_by_closing_it(
    monkeypatch: pytest.MonkeyPatch, key: int, visible: float, stopped: bool
) -> None:
    screen = _Screen(monkeypatch)
    with MultiSink([NullSink(), WindowSink()]) as sink:
        sink.write(result(0))
        assert not sink.stopped
        screen.key, screen.visible = key, visible
        sink.write(result(1))
        assert sink.stopped == stopped
        sink.write(result(2))
    shown = 2 if stopped else 3
    assert screen.calls == ["namedWindow", "resizeWindow", *["imshow"] * shown, "destroyWindow"]


def test_window_whose_backend_does_not_know_its_visibility(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = _Screen(monkeypatch)
    screen.visible = -1.0
    with WindowSink() as sink:
        for index in range(3):
            sink.write(result(index))
        assert not sink.stopped


# --- all of them


@pytest.mark.parametrize(
    ("target", "kind"),
    [(None, NullSink), ("out.mp4", VideoSink), ("out", ImageFolderSink), (".", ImageFolderSink)],
)
def test_open_sink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str | None, kind: type[Sink]
) -> None:
    monkeypatch.chdir(tmp_path)
    _Screen(monkeypatch)
    with open_sink(target, fps=25.0) as sink:
        assert type(sink) is kind
        assert not sink.stopped
    with open_sink(target, show=True) as sink:
        assert type(sink) is (WindowSink if target is None else MultiSink)
    assert names(tmp_path) == []


def test_multi_sink_closes_all_and_tells_of_the_first_failure(tmp_path: Path) -> None:
    class Broken(NullSink):
        def close(self) -> None:
            raise SinkError("broken")

    path = tmp_path / "out.avi"
    with pytest.raises(SinkError, match="broken"), MultiSink([Broken(), VideoSink(path)]) as sink:
        sink.write(result(0))
    assert len(pictures(path)) == 1
