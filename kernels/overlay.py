"""Class colours blended into frames on the CPU, straight from the class map at network size."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.kernels.frames import FrameRectangle, checked_image, row_pitch
from edgeseg.kernels.library import check_status, checked_threads, load

__all__ = ["draw_overlay"]

_MAX_COLOURS = 256
_OPAQUE = 256


def draw_overlay(
    frame: NDArray[np.uint8],
    class_map: NDArray[np.uint8],
    colours: NDArray[np.uint8],
    rectangle: FrameRectangle,
    *,
    opacity: float = 0.5,
    out: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> NDArray[np.uint8]:
    """The frame with its classes blended over it: (frame_height, frame_width, 3) uint8 BGR.

    ``frame`` is (frame_height, frame_width, 3) uint8 BGR, its rows any distance apart;
    ``class_map`` (height, width) uint8 at network size, contiguous; ``colours`` (classes, 3) uint8
    BGR, contiguous, and what is not among the classes is black; ``rectangle`` says where the frame
    lies in the class map. Each pixel takes the class that its centre lies in. ``opacity`` 0 shows
    the frame alone, 1 the classes alone; it is rounded to 1/256.

    Returns ``out`` if it was given (frame-size, writable; ``frame`` itself does, other memory of
    the frame's does not), else a new array. ``threads`` 0 is all cores; the result does not depend
    on it.

    Raises ``RequestError`` for arguments that don't fit, ``KernelError`` without the library.
    """
    shape = (rectangle.frame_height, rectangle.frame_width, 3)
    pitch = row_pitch("frame", frame, shape)
    _check_contiguous("class_map", class_map, (rectangle.height, rectangle.width))
    _check_contiguous("colours", colours, (-1, 3))
    if len(colours) > _MAX_COLOURS:
        raise RequestError(f"colours must be at most {_MAX_COLOURS}, got {len(colours)}.")
    if not 0.0 <= opacity <= 1.0:
        raise RequestError(f"opacity must be 0 to 1, got {opacity}.")
    drawn = checked_image("out", out, *shape[:2])
    drawn_pitch = row_pitch("out", drawn, shape)
    in_place = drawn.ctypes.data == frame.ctypes.data and drawn_pitch == pitch
    if not in_place and np.may_share_memory(drawn, frame):
        raise RequestError("out overlaps frame; pass the frame itself, or other memory.")
    for name, array in (("class_map", class_map), ("colours", colours)):
        if np.may_share_memory(drawn, array):
            raise RequestError(f"out and {name} are the same memory; pass two arrays.")
    status = load().edgeseg_draw_overlay(
        frame.ctypes.data,
        pitch,
        class_map.ctypes.data,
        colours.ctypes.data,
        len(colours),
        ctypes.byref(rectangle.launched()),
        round(opacity * _OPAQUE),
        drawn.ctypes.data,
        drawn_pitch,
        0,
        checked_threads(threads),
    )
    check_status("draw_overlay", status)
    return drawn


def _check_contiguous(name: str, array: Any, shape: tuple[int, ...]) -> None:
    row_pitch(name, array, shape)
    if not array.flags.c_contiguous:
        raise RequestError(f"{name} must be C-contiguous; pass numpy.ascontiguousarray({name}).")
