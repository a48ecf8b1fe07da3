"""Sources: what each URI opens, what it gives, and what is said when there is nothing."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import RequestError, SourceError
from edgeseg.frame import Frame
from edgeseg.source import (
    ImageSource,
    LiveSource,
    Source,
    SyntheticSource,
    VideoSource,
    cameras,
    open_source,
    quiet_opencv,
)
from edgeseg.source import opencv as opencv_module
from edgeseg.source.images import natural


def plain(level: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    return np.full((height, width, 3), level, np.uint8)


def write_image(path: Path, picture: NDArray[np.generic]) -> Path:
    done, encoded = cv2.imencode(path.suffix, np.asarray(picture))
    assert done
    path.write_bytes(encoded.tobytes())
    return path


def write_video(path: Path, frames: int, codec: str, fps: float = 20.0) -> Path:
    with quiet_opencv():
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (64, 48))
        opened = writer.isOpened()
        for index in range(frames):
            writer.write(plain(8 * index % 256))
        writer.release()
    if not opened:
        pytest.skip(f"this OpenCV cannot write {codec}")
    return path


def level(frame: Frame) -> float:
    return float(frame.pixels.mean())


# --- video files


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "mp4v"), ("clip.avi", "MJPG")])
def test_video_file(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, 30, codec)
    with open_source(str(path)) as source:
        assert isinstance(source, VideoSource)
        assert (source.live, source.size, source.fps, source.length) == (False, (48, 64), 20.0, 30)
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(30))
    assert [level(frame) for frame in frames] == pytest.approx(
        [8.0 * index for index in range(30)], abs=6
    )
    assert all(frame.pixels.shape == (48, 64, 3) for frame in frames)
    captured = [frame.captured_ns for frame in frames]
    assert captured == sorted(captured)
    assert source.notes == ()


def test_video_that_ends_early_is_a_note(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 50, "MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_source(str(path)) as source:
        frames = list(source)
        assert source.length == 50
    assert 0 < len(frames) < 50
    (note,) = source.notes
    assert f"promises 50 frames and {len(frames)} could be read" in note


def test_video_left_early_has_no_note(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 20, "MJPG")
    with open_source(str(path)) as source:
        next(iter(source))
    assert source.notes == ()
    assert list(source) == []


def test_truncated_mp4_is_refused(tmp_path: Path) -> None:
    # Its index is at the end: nothing can be read without it.
    path = write_video(tmp_path / "clip.mp4", 20, "mp4v")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"clip\.mp4 is no video that OpenCV can read"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "is empty"), (b"no video at all\n" * 500, "is no video")]
)
def test_file_that_is_no_video(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=says):
        open_source(str(path))


def test_failures_are_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no video at all\n" * 500)
    (tmp_path / "one.png").write_bytes(b"no image at all\n")
    for uri in ("clip.mp4", "one.png"):
        with pytest.raises(SourceError):
            open_source(str(tmp_path / uri))
    with pytest.raises(SourceError):
        open_source("http://127.0.0.1:9/nothing", timeout_s=2)
    assert capfd.readouterr() == ("", "")


def test_quiet_restores_the_log_level() -> None:
    def current() -> int | None:
        before = opencv_module._swap_log_level(3)
        assert before is not None
        opencv_module._swap_log_level(before)
        return before

    before = current()
    with quiet_opencv():
        with quiet_opencv():
            assert current() == 0
        assert current() == 0
    assert current() == before


def test_loops_count_on(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 5, "MJPG")
    with open_source(f"{path}?loop=2") as source:
        assert source.length == 15
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(15)) and source.notes == ()
    np.testing.assert_array_equal(frames[1].pixels, frames[11].pixels)
    with open_source(f"{path}?loop=always") as source:
        assert source.length is None
        numbers = [frame.index for frame, _ in zip(source, range(12), strict=False)]
    assert numbers == list(range(12))


# --- images


def test_folder_in_natural_order_whatever_the_images_are(tmp_path: Path) -> None:
    write_image(tmp_path / "f10.png", plain(100))
    write_image(tmp_path / "f2.JPG", plain(20, 30, 40))
    write_image(tmp_path / "f1.png", np.full((48, 64), 10, np.uint8))
    write_image(tmp_path / "f3.png", np.full((48, 64, 4), 30, np.uint8))
    write_image(tmp_path / "f4.png", np.full((48, 64, 3), 40 * 257, np.uint16))
    write_image(tmp_path / "f5.bmp", plain(50))
    write_image(tmp_path / "f6.webp", plain(60))
    write_image(tmp_path / "f7.tif", plain(70))
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "._f1.png").write_text("left by another program")
    with open_source(str(tmp_path)) as source:
        assert isinstance(source, ImageSource)
        assert (source.live, source.size, source.length) == (False, (48, 64), 8)
        frames = list(source)
    assert [round(level(frame) / 10) for frame in frames] == [1, 2, 3, 4, 5, 6, 7, 10]
    assert [frame.index for frame in frames] == list(range(8))
    assert {(frame.pixels.dtype.name, frame.pixels.ndim) for frame in frames} == {("uint8", 3)}
    assert frames[1].pixels.shape == (30, 40, 3)
    assert source.notes == ()


def test_unreadable_images_are_skipped_and_named(tmp_path: Path) -> None:
    for index in range(10):
        path = tmp_path / f"{index}.png"
        if index % 4 == 0:
            path.write_bytes(b"damaged" if index else b"")
        else:
            write_image(path, plain(index))
    with open_source(str(tmp_path)) as source:
        assert [frame.index for frame in source] == [1, 2, 3, 5, 6, 7, 9]
    assert source.notes == (
        "3 of 10 images could not be read and were skipped: 0.png, 4.png, 8.png",
    )


def test_images_loop_at_a_rate(tmp_path: Path) -> None:
    for index in range(3):
        write_image(tmp_path / f"{index}.png", plain(10 * index))
    (tmp_path / "1.png").write_bytes(b"damaged")
    with open_source(f"{tmp_path}?loop=1&fps=12.5") as source:
        assert (source.length, source.fps) == (6, 12.5)
        assert [frame.index for frame in source] == [0, 2, 3, 5]
    assert source.notes == ("1 of 3 images could not be read and were skipped: 1.png",)
    assert (source.tally.delivered, source.tally.damaged) == (4, 2)


def test_images_that_vanish_end_a_loop(tmp_path: Path) -> None:
    path = write_image(tmp_path / "1.png", plain(9))
    with open_source(f"{tmp_path}?loop=always") as source:
        frames = iter(source)
        assert [next(frames).index for _ in range(3)] == [0, 1, 2]
        path.unlink()
        assert list(frames) == []


def test_natural_order_of_odd_names() -> None:
    names = ["f10", "f2", "f٣", "f²", "f1"]
    assert [path.name for path in sorted(map(Path, names), key=natural)] == [
        "f1", "f2", "f٣", "f10", "f²"
    ]  # fmt: skip


def test_question_mark_in_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A name that is there is a file, however much it looks like options; so is a pattern's letter.
    write_image(tmp_path / "a.png", plain(1))
    write_image(tmp_path / "b.png", plain(2))
    odd = write_video(tmp_path / "x.avi", 3, "MJPG").rename(tmp_path / "clip.avi?loop=1")
    monkeypatch.chdir(tmp_path)
    for uri, count in (
        ("?.png", 2),
        ("?.png?loop=1", 4),
        ("[ab].png?loop=1&fps=5", 4),
        ("a.png?loop=2", 3),
        (str(odd), 3),
        (f"{odd}?loop=1", 6),
    ):
        with open_source(uri) as source:
            assert len(list(source)) == count, uri


def test_pattern_and_single_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "a/2.png", "a/3.jpg"):
        write_image(tmp_path / name, plain(9))
    monkeypatch.chdir(tmp_path)
    for uri, count in (
        (str(tmp_path / "a" / "*.png"), 2),
        ("a/*", 3),
        ("*/[13].*", 2),
        ("a/1.png", 1),
    ):
        with open_source(uri) as source:
            assert source.length == count
            assert len(list(source)) == count


@pytest.mark.parametrize(
    ("files", "uri", "says"),
    [
        ((), "", "holds no images"),
        (("notes.txt",), "", "holds no images"),
        (("1.png", "2.png"), "", "none of the 2 images"),
        (("1.png",), "1.png", "is no image that OpenCV can read"),
        (("notes.txt",), "*.txt", "no image matches"),
        ((), "*.png", "no image matches"),
        ((), "clip.mp4", "does not exist"),
    ],
)
def test_nothing_to_read(tmp_path: Path, files: tuple[str, ...], uri: str, says: str) -> None:
    for name in files:
        (tmp_path / name).write_text("neither image nor video")
    with pytest.raises(SourceError, match=says):
        open_source(str(tmp_path / uri))


# --- requests


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "an empty text came"),
        ("csi://front", r"csi://0, csi://1, .* size, width, height, fps, flip"),
        ("gst:", "gst-launch-1.0 takes"),
        ("rtsp://", "rtsp://host/path"),
        ("ftp://user:secret@host/x.mp4", r"ftp://user:\*\*\*@host"),
        ("synthetic:street", "seed, size"),
        ("synthetic:?speed=3", "'speed' came"),
        ("synthetic:?size=large", "HEIGHTxWIDTH"),
        ("synthetic:?frames=-1", "whole number"),
        ("synthetic:?fps=0", "above 0"),
        ("0?colour=red", "size, width, height, fps, format, timeout, reconnect, and 'colour'"),
    ],
)
def test_wrong_requests_name_what_is_known(uri: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        open_source(uri)


@pytest.mark.parametrize("uri", ["a\0b", "x" * 5000, "~nobody-here/x.mp4", "**x/*.png", "a/[*.png"])
def test_names_that_no_disk_has(uri: str) -> None:
    with pytest.raises(SourceError):
        open_source(uri)


# --- states


def test_states_of_a_file(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png", plain(9))
    seen: list[str] = []
    source = open_source(str(tmp_path))
    source.listen(lambda status: seen.append(status.state))
    assert source.status.state == "opening"
    assert len(list(source)) == 1
    assert seen == ["live", "ended"]
    assert [status.state for status in source.history] == ["opening", *seen]
    since = [status.since_ns for status in source.history]
    assert since == sorted(since) and source.status.reason == "it is at its end"
    source.close()
    assert source.status.reason == "it is at its end"


# --- cameras


def test_camera_that_is_not_here_names_the_doctor() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux lists its cameras without opening them")
    for uri, name in (("77", "camera 77"), ("/dev/video77", "/dev/video77")):
        with pytest.raises(SourceError, match=rf"^{name} is not here; .* `edgeseg doctor`"):
            open_source(uri)


def test_camera() -> None:
    found = [path for path in cameras() if os.access(path, os.R_OK | os.W_OK)]
    if not found:
        pytest.skip("no camera on this computer")
    with open_source(found[0]) as source:
        assert isinstance(source, LiveSource) and source.live
        assert next(iter(source)).pixels.ndim == 3


# --- streets


def test_street_is_the_street_itself() -> None:
    with open_source("synthetic:?seed=3&size=96x128&frames=4&fps=12&scene=highway") as source:
        assert isinstance(source, SyntheticSource)
        assert (source.live, source.size, source.fps, source.length) == (False, (96, 128), 12.0, 4)
        frames = list(source)
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    for frame in frames:
        np.testing.assert_array_equal(frame.pixels, source.street.frame(frame.index).pixels)


def test_street_defaults_and_endless() -> None:
    with open_source("synthetic:") as source:
        assert (source.size, source.length, source.fps) == ((360, 480), 300, 30.0)
    with open_source("synthetic:?size=64x64&frames=0") as source:
        assert source.length is None
        frames = iter(source)
        assert [next(frames).index for _ in range(3)] == [0, 1, 2]
    assert list(frames) == []


def test_live_street_skips_what_came_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source("synthetic:?size=64x64&frames=40&fps=10&live=1") as source:
        assert source.live
        now_ns = 5_000_000_000
        waits: list[float] = []

        def clock() -> int:
            return now_ns

        def wait(seconds: float | None = None) -> bool:
            nonlocal now_ns
            assert seconds is not None
            waits.append(round(seconds, 3))
            now_ns += round(seconds * 1e9)
            return False

        monkeypatch.setattr(time, "monotonic_ns", clock)
        monkeypatch.setattr(source._closed, "wait", wait)
        frames = iter(source)
        assert next(frames).index == 0
        now_ns += 30_000_000
        assert next(frames).index == 1  # waited for
        now_ns += 1_050_000_000
        assert next(frames).index == 11  # 2 to 10 were there and gone
        assert next(frames).index == 12
        assert source.tally.dropped == 9
        assert waits == [0.07, 0.05]
        now_ns += 60_000_000_000
        assert list(frames) == []


# --- closing


class _Slow(Source):
    """Hands out one frame when told to; records when it was given back."""

    def __init__(self) -> None:
        super().__init__("slow", live=True)
        self.reading = threading.Event()
        self.go_on = threading.Event()
        self.releases: list[str] = []

    def _read(self) -> Frame | None:
        self.reading.set()
        assert self.go_on.wait(10)
        assert not self.releases
        return Frame.of(plain(1))

    def _release(self) -> None:
        self.releases.append(threading.current_thread().name)


def test_close_during_a_read_leaves_the_release_to_the_reader() -> None:
    source = _Slow()
    frames: list[Frame] = []
    reader = threading.Thread(target=lambda: frames.extend(source), name="reader")
    reader.start()
    assert source.reading.wait(10)
    source.close()
    source.close()
    assert source.releases == []
    source.go_on.set()
    reader.join(10)
    assert frames == [] and source.releases == ["reader"]
    source.close()
    assert source.releases == ["reader"]
