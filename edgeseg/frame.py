"""A frame: one picture from a camera, with the moment it was taken."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import FrameError

__all__ = ["Frame", "Pixels", "checked_pixels"]

#: (height, width, 3) uint8, BGR
Pixels = NDArray[np.uint8]


def checked_pixels(array: Any) -> Pixels:
    """``array`` itself if it is a frame's pixels: (height, width, 3) uint8, BGR, not empty.

    Raises FrameError, which names the conversion to use, for anything else.
    """
    if not isinstance(array, np.ndarray):
        raise FrameError(
            "a frame is a numpy array (height, width, 3) of uint8 in BGR order, "
            f"and {type(array).__name__} came; numpy.asarray() makes an array of most things"
        )
    promise = "a frame is (height, width, 3) uint8 in BGR order"
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        raise FrameError(
            f"{promise}, and a grey one of shape {array.shape} came; "
            "cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR) makes it one"
        )
    if array.ndim == 3 and array.shape[2] == 4:
        raise FrameError(
            f"{promise}, and one with four channels, {array.shape}, came; "
            "cv2.cvtColor(frame, cv2.COLOR_BGRA2BGR) makes it one"
        )
    if array.ndim != 3 or array.shape[2] != 3:
        raise FrameError(f"{promise}, and an array of shape {array.shape} came")
    if array.dtype != np.uint8:
        raise FrameError(
            f"{promise}, and one of {array.dtype} came; scale it to 0-255 and use .astype('uint8')"
        )
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise FrameError(f"{promise}, and an empty one, {array.shape}, came")
    return array


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture and when it was taken.

    ``pixels``: (height, width, 3) uint8, BGR. ``captured_ns``: ``time.monotonic_ns()`` when the
    source had it. ``index``: its number in the source, from 0; numbers of frames that were
    dropped stay unused. FrameError when ``pixels`` are none.
    """

    pixels: Pixels
    captured_ns: int
    index: int

    def __post_init__(self) -> None:
        checked_pixels(self.pixels)

    @classmethod
    def of(cls, array: Any, index: int = 0) -> Frame:
        """A frame of ``array``, taken now; raises FrameError if it is none."""
        return cls(array, time.monotonic_ns(), index)

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.pixels.shape[1])
