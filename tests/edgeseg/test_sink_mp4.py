"""Matroska made into MP4 in place, compared with the MP4 that OpenCV and GStreamer write."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import SinkError
from edgeseg.sink.mp4 import matroska_to_mp4
from edgeseg.source.gstreamer import has_element
from edgeseg.source.opencv import quiet_opencv

SIZE = (96, 128)


def write(path: Path, fps: float, frames: int) -> None:
    """A film of moving noise, through OpenCV's MPEG-4 encoder."""
    with quiet_opencv():
        code = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(path), code, fps, (SIZE[1], SIZE[0]))
        if not writer.isOpened():
            pytest.skip(f"this OpenCV does not write {path.suffix}")
        noise = np.random.default_rng(1).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        for index in range(frames):
            writer.write(np.roll(noise, 3 * index, axis=1))
        writer.release()


def read(path: Path) -> tuple[list[NDArray[np.uint8]], list[float], float]:
    """Pictures, their times in milliseconds, and the rate."""
    capture = cv2.VideoCapture(str(path))
    pictures, times = [], []
    while True:
        got, picture = capture.read()
        if not got:
            break
        pictures.append(np.asarray(picture, np.uint8))
        times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
    assert len(pictures) == capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return pictures, times, capture.get(cv2.CAP_PROP_FPS)


@pytest.mark.parametrize(
    ("fps", "frames"), [(30.0, 40), (29.97, 40), (12.5, 26), (1.0, 3), (25.0, 1), (240.0, 50)]
)
def test_it_is_the_mp4_that_opencv_writes(tmp_path: Path, fps: float, frames: int) -> None:
    made, direct = tmp_path / "made.mkv", tmp_path / "direct.mp4"
    write(made, fps, frames)
    write(direct, fps, frames)
    matroska_to_mp4(made, fps)
    as_mp4 = made.rename(tmp_path / "made.mp4")
    pictures, times, rate = read(as_mp4)
    expected, expected_times, expected_rate = read(direct)
    assert len(pictures) == frames
    np.testing.assert_array_equal(pictures, expected)
    assert times == pytest.approx(expected_times, abs=0.01)
    assert rate == pytest.approx(expected_rate, rel=1e-4)
    # Not from the start: that the pictures which stand alone are marked.
    capture = cv2.VideoCapture(str(as_mp4))
    capture.set(cv2.CAP_PROP_POS_FRAMES, frames - 1)
    np.testing.assert_array_equal(capture.read()[1], expected[-1])


def boxes(content: bytes) -> dict[bytes, bytes]:
    """The boxes of an MP4 at one level, by ISO/IEC 14496-12: 32 and 64 bits of size."""
    found, at = {}, 0
    while at < len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, at + 8)
            head = 16
        assert size >= head and at + size <= len(content)
        found[kind] = content[at + head : at + size]
        at += size
    return found


def test_every_byte_is_in_a_box(tmp_path: Path) -> None:
    path = tmp_path / "made.mkv"
    write(path, 30.0, 30)
    before = path.stat().st_size
    matroska_to_mp4(path, 30.0)
    content = path.read_bytes()
    top = boxes(content)
    assert list(top) == [b"ftyp", b"mdat", b"moov"]
    # Nothing was moved: the file has grown by its index alone.
    assert len(content) == before + 8 + len(top[b"moov"])
    media = boxes(boxes(boxes(top[b"moov"])[b"trak"])[b"mdia"])
    table = boxes(boxes(media[b"minf"])[b"stbl"])
    keys = struct.unpack(f">{30 // 12 + 1}I", table[b"stss"][8:])
    # OpenCV asks for a whole picture in twelve.
    assert keys == (1, 13, 25)


@pytest.mark.parametrize("kept", [0, 3, 40, 200, 700, -1])
def test_what_is_no_whole_matroska_file_is_left_alone(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "made.mkv"
    write(path, 30.0, 30)
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    with pytest.raises(SinkError, match=r"not a Matroska file of one H\.264 or MPEG-4 track"):
        matroska_to_mp4(path, 30.0)
    assert path.read_bytes() == content


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm"])
def test_other_files_are_left_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"made{suffix}"
    write(path, 30.0, 3)
    content = path.read_bytes()
    with pytest.raises(SinkError, match="not a Matroska file"):
        matroska_to_mp4(path, 30.0)
    assert path.read_bytes() == content


def test_damaged_files_end_in_an_error_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "made.mkv"
    write(path, 30.0, 14)
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3) ** 2 // len(whole):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            matroska_to_mp4(path, 30.0)
        except SinkError:
            refused += 1
            assert path.read_bytes() == damaged
    assert 0 < refused < 300


ENCODER = ("x264enc", "h264parse", "matroskamux", "mp4mux", "videotestsrc")


@pytest.mark.skipif(
    not all(has_element(name) for name in ENCODER), reason="GStreamer's x264enc is not here"
)
def test_h264_with_pictures_out_of_order(tmp_path: Path) -> None:
    from gi.repository import Gst

    made, direct = tmp_path / "made.mkv", tmp_path / "direct.mp4"
    pipeline = Gst.parse_launch(
        "videotestsrc num-buffers=50 pattern=ball ! "
        "video/x-raw,format=I420,width=128,height=96,framerate=25/1 ! "
        "x264enc bframes=3 b-adapt=false key-int-max=20 ! h264parse ! "
        f"video/x-h264,stream-format=avc ! tee name=t ! queue ! matroskamux ! "
        f"filesink location={made} t. ! queue ! mp4mux ! filesink location={direct}"
    )
    pipeline.set_state(Gst.State.PLAYING)
    kinds = Gst.MessageType.EOS | Gst.MessageType.ERROR
    message = pipeline.get_bus().timed_pop_filtered(60 * Gst.SECOND, kinds)
    pipeline.set_state(Gst.State.NULL)
    assert message is not None and message.type == Gst.MessageType.EOS
    matroska_to_mp4(made, 25.0)
    pictures, times, rate = read(made)
    expected, expected_times, expected_rate = read(direct)
    np.testing.assert_array_equal(pictures, expected)
    assert times == pytest.approx(expected_times, abs=0.01) and rate == expected_rate
