"""What is a frame, and what the user is told about everything else."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from edgeseg.errors import FrameError
from edgeseg.frame import Frame, checked_pixels

NO_FRAMES = [
    pytest.param(np.zeros((4, 6), np.uint8), "COLOR_GRAY2BGR", id="grey"),
    pytest.param(np.zeros((4, 6, 1), np.uint8), "COLOR_GRAY2BGR", id="grey-with-axis"),
    pytest.param(np.zeros((4, 6, 4), np.uint8), "COLOR_BGRA2BGR", id="four-channels"),
    pytest.param(np.zeros((4, 6, 2), np.uint8), r"shape \(4, 6, 2\) came", id="two-channels"),
    pytest.param(np.zeros((3, 4, 6), np.uint8), r"shape \(3, 4, 6\) came", id="channels-first"),
    pytest.param(np.zeros((1, 4, 6, 3), np.uint8), r"shape \(1, 4, 6, 3\) came", id="batch"),
    pytest.param(np.zeros((4, 6, 3), np.float32), "one of float32 came.*astype", id="float"),
    pytest.param(np.zeros((4, 6, 3), np.int8), "one of int8 came", id="signed"),
    pytest.param(np.zeros((4, 6, 3), np.uint16), "one of uint16 came", id="sixteen-bit"),
    pytest.param(np.zeros((0, 6, 3), np.uint8), "an empty one", id="no-rows"),
    pytest.param(np.zeros((4, 0, 3), np.uint8), "an empty one", id="no-columns"),
    pytest.param(np.uint8(3), "uint8 came.*numpy.asarray", id="scalar"),
    pytest.param(np.zeros((), np.uint8), r"shape \(\) came", id="no-axes"),
    pytest.param([[[0, 0, 0]]], "list came.*numpy.asarray", id="list"),
    pytest.param(None, "NoneType came", id="none"),
    pytest.param("frame.png", "str came", id="path"),
]


@pytest.mark.parametrize(("array", "says"), NO_FRAMES)
def test_what_is_no_frame(array: Any, says: str) -> None:
    for make in (checked_pixels, Frame.of, lambda value: Frame(value, 0, 0)):
        with pytest.raises(FrameError, match=rf"^a frame is .*{says}") as raised:
            make(array)
        assert isinstance(raised.value, ValueError)
        assert raised.value.exit_code == 1


def test_frame_keeps_the_array_and_knows_its_size() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    before = time.monotonic_ns()
    frame = Frame.of(pixels, 9)
    assert before <= frame.captured_ns <= time.monotonic_ns()
    assert frame.pixels is pixels and checked_pixels(pixels) is pixels
    assert (frame.height, frame.width, frame.index) == (4, 6, 9)
    assert Frame.of(pixels).index == 0


def test_views_are_frames() -> None:
    pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    for view in (pixels[::-1], pixels[::2, ::3], pixels[..., ::-1], pixels.transpose(1, 0, 2)):
        assert Frame.of(view).pixels is view
