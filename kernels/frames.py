"""Camera frames to network input on the CPU: conversion, resizing and letterbox in one pass."""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.kernels import launchers
from edgeseg.kernels.library import (
    MAX_SIDE,
    check_status,
    checked_size,
    checked_threads,
    load,
)

__all__ = ["FrameFormat", "FrameRectangle", "fit_frame"]

FrameFormat = Literal["bgr", "rgb", "nv12", "yuyv"]
"""How a camera hands over its pixels, 8 bits each.

"bgr" and "rgb": (height, width, 3). "yuyv": (height, width, 2), luma first, chroma of two columns
in the second channel, U then V. "nv12": (height * 3 / 2, width), the luma and below it the chroma
of 2 x 2 squares, U and V in turn; or the two planes as a tuple, (height, width) and
(height / 2, width). All uint8, BT.601 in limited range where YUV.
"""

_FORMATS = {
    "bgr": launchers.BGR8,
    "rgb": launchers.RGB8,
    "nv12": launchers.NV12,
    "yuyv": launchers.YUYV,
}


@dataclass(frozen=True)
class FrameRectangle:
    """Where frames land in the network's input, in pixels.

    ``frame_height`` x ``frame_width`` pixels are stretched to ``inner_height`` x ``inner_width``
    at (``top``, ``left``) of an input of ``height`` x ``width``; around that is padding. The
    fields are those of ``edgeseg.geometry.Geometry`` and ``edgeseg.kernels.launchers.FrameFit``.

    Raises ``RequestError`` for sides below 1, and a rectangle that sticks out of the input.
    """

    frame_height: int
    frame_width: int
    height: int
    width: int
    top: int
    left: int
    inner_height: int
    inner_width: int

    def __post_init__(self) -> None:
        sides = (self.frame_height, self.frame_width, self.height, self.width)
        if not all(1 <= side <= MAX_SIDE for side in sides):
            raise RequestError(f"sides must be 1 to {MAX_SIDE} pixels, got {self}.")
        if not (
            self.inner_height >= 1
            and self.inner_width >= 1
            and 0 <= self.top <= self.height - self.inner_height
            and 0 <= self.left <= self.width - self.inner_width
        ):
            raise RequestError(f"the inner rectangle must lie within the input, got {self}.")

    @classmethod
    def fitting(
        cls,
        frame_height: int,
        frame_width: int,
        height: int,
        width: int,
        *,
        fit: Literal["stretch", "letterbox"] = "stretch",
    ) -> FrameRectangle:
        """The rectangle for frames of this size: all of the input, or with "letterbox" as much
        of it as keeps the frame's aspect ratio, in the middle.
        """
        if fit not in ("stretch", "letterbox"):
            raise RequestError(f'fit must be "stretch" or "letterbox", got {fit!r}.')
        if min(frame_height, frame_width, height, width) < 1:
            raise RequestError(
                f"sides must be 1 to {MAX_SIDE} pixels, got frames of {frame_height}x{frame_width} "
                f"and an input of {height}x{width}."
            )
        inner_height, inner_width = height, width
        if fit == "letterbox":
            scale = min(height / frame_height, width / frame_width)
            inner_height = min(max(round(frame_height * scale), 1), height)
            inner_width = min(max(round(frame_width * scale), 1), width)
        top, left = (height - inner_height) // 2, (width - inner_width) // 2
        return cls(frame_height, frame_width, height, width, top, left, inner_height, inner_width)

    def launched(self) -> launchers.FrameFit:
        """The same as the struct that the compiled kernels take."""
        return launchers.FrameFit(*astuple(self))


def fit_frame(
    frame: NDArray[np.uint8] | tuple[NDArray[np.uint8], NDArray[np.uint8]],
    size: tuple[int, int],
    *,
    format: FrameFormat = "bgr",
    fit: Literal["stretch", "letterbox"] = "stretch",
    out: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> NDArray[np.uint8]:
    """The network's input for a camera's frame: (height, width, 3) uint8 BGR.

    ``frame`` as ``FrameFormat`` says; its rows may be any distance apart, so that a view of a
    larger buffer does. YUYV needs an even width, NV12 an even height too. ``size`` is (height,
    width) of the input in pixels. Resizing is bilinear with half-pixel centres, without
    antialiasing; "letterbox" keeps the aspect ratio and pads with level 114.

    The result is that of cv2.cvtColor, cv2.resize and cv2.copyMakeBorder within one level; for a
    frame of the input's size it is exact. It is ``out`` if that was given (same shape, contiguous,
    writable, not overlapping ``frame``), and then nothing is allocated, else a new array.
    ``threads`` 0 is all cores; the result does not depend on it.

    Raises ``RequestError`` for arguments that don't fit, ``KernelError`` without the library.
    """
    planes, frame_height, frame_width, arrays = _checked_frame(frame, format)
    rectangle = FrameRectangle.fitting(frame_height, frame_width, *checked_size(size), fit=fit)
    image = checked_image("out", out, rectangle.height, rectangle.width)
    if not image.flags.c_contiguous:
        raise RequestError("out must be C-contiguous; make it with numpy.empty.")
    if out is not None and any(np.may_share_memory(image, array) for array in arrays):
        raise RequestError("out and frame are the same memory; pass two arrays.")
    _run(planes, rectangle, image, 0, threads)
    return image


def _run(
    planes: launchers.FramePlanes,
    rectangle: FrameRectangle,
    image: NDArray[np.uint8],
    flags: int,
    threads: int,
) -> None:
    """Call the library; all arguments have been checked. ``flags`` may choose the code."""
    status = load().edgeseg_fit_frame(
        ctypes.byref(planes),
        ctypes.byref(rectangle.launched()),
        image.ctypes.data,
        flags,
        checked_threads(threads),
    )
    check_status("fit_frame", status)


def checked_image(name: str, array: Any, height: int, width: int) -> NDArray[np.uint8]:
    """``array`` if it can take (height, width, 3) uint8, its rows any distance apart; a new one
    for None.
    """
    if array is None:
        return np.empty((height, width, 3), np.uint8)
    row_pitch(name, array, (height, width, 3))
    if not array.flags.writeable:
        raise RequestError(f"{name} must be writable; make it with numpy.empty.")
    checked: NDArray[np.uint8] = array
    return checked


def row_pitch(name: str, array: Any, shape: tuple[int, ...]) -> int:
    """Bytes from one row of ``array`` to the next; RequestError unless it is uint8 of this shape
    with each row in one piece, from top to bottom. -1 in ``shape`` stands for any size.
    """
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise RequestError(f"{name} must be a uint8 array, got {got}.")
    promised = tuple("any" if side < 0 else side for side in shape)
    if array.ndim != len(shape) or any(
        side not in (-1, got) for side, got in zip(shape, array.shape, strict=True)
    ):
        text = ", ".join(map(str, promised))
        raise RequestError(f"{name} must have shape ({text}), got {array.shape}.")
    if array.size == 0:
        raise RequestError(f"{name} is empty: {array.shape}.")
    row_bytes = array[0].size
    # A single row may have any stride.
    pitch = array.strides[0] if array.shape[0] > 1 else row_bytes
    if not array[0].flags.c_contiguous or pitch < row_bytes:
        raise RequestError(
            f"each row of {name} must lie in one piece, from top to bottom; pass "
            f"numpy.ascontiguousarray({name})."
        )
    return int(pitch)


def _checked_frame(
    frame: Any, format: str
) -> tuple[launchers.FramePlanes, int, int, list[NDArray[np.uint8]]]:
    """The planes, the frame's height and width, and the arrays that hold it."""
    if format not in _FORMATS:
        raise RequestError(f"format must be one of {', '.join(_FORMATS)}, got {format!r}.")
    luma, chroma = frame, None
    if format == "nv12":
        luma, chroma = frame if isinstance(frame, tuple) else _split_nv12(frame)
        pitch = row_pitch("the luma of frame", luma, (-1, -1))
        height, width = luma.shape
        if height % 2 or width % 2:
            raise RequestError(
                f"NV12 has one chroma for 2 x 2 pixels, so its sides are even; got {luma.shape}."
            )
        chroma_pitch = row_pitch("the chroma of frame", chroma, (height // 2, width))
    else:
        pitch = row_pitch("frame", frame, (-1, -1, 2 if format == "yuyv" else 3))
        height, width = frame.shape[:2]
        chroma_pitch = 0
        if format == "yuyv" and width % 2:
            raise RequestError(
                f"YUYV has one chroma for two columns, so its width is even; got {frame.shape}."
            )
    arrays = [luma] if chroma is None else [luma, chroma]
    planes = launchers.FramePlanes()
    for index, array in enumerate(arrays):
        planes.planes[index] = array.ctypes.data
    planes.pitches[0], planes.pitches[1] = pitch, chroma_pitch
    planes.format = _FORMATS[format]
    return planes, height, width, arrays


def _split_nv12(frame: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    row_pitch("frame", frame, (-1, -1))
    if frame.shape[0] % 3:
        raise RequestError(
            f"an NV12 frame has 3 rows for 2 of the picture, got {frame.shape}; pass (luma, "
            "chroma) where they are apart."
        )
    height = frame.shape[0] // 3 * 2
    return frame[:height], frame[height:]
