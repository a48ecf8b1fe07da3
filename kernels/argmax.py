"""``EdgeSegUpsampleArgmax`` on the CPU: class logits to a class map at full size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.kernels.library import (
    MAX_SIDE,
    check_status,
    checked_output,
    checked_size,
    checked_threads,
    load,
)

__all__ = ["MAX_CLASSES", "upsample_argmax", "upsample_argmax_confidence"]

MAX_CLASSES = 255

_ALIGN_CORNERS = 1
_NO_SHORT_CUT = 2


def upsample_argmax(
    logits: NDArray[np.float32],
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    out: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> NDArray[np.uint8]:
    """Class of each pixel: bilinear upsampling of ``logits`` to ``size``, then the argmax.

    ``logits`` are (classes, height, width) or (1, classes, height, width) float32, contiguous, at
    most 255 classes; ``size`` is (height, width) of the result in pixels. Coordinates follow
    PyTorch's ``interpolate(mode="bilinear", align_corners=...)``, which are ONNX Resize's
    half_pixel and align_corners; a smaller ``size`` samples without antialiasing. Ties go to the
    lowest class. NaN never wins; where nothing is above minus infinity the class is 0.

    Returns (height, width) uint8: ``out`` if it was given (same shape, contiguous, writable, not
    overlapping ``logits``), and then nothing is allocated, else a new array. ``threads`` 0 is all
    cores; the result does not depend on it.

    Raises ``RequestError`` for arguments that don't fit, ``KernelError`` without the library.
    """
    values = _checked_logits(logits)
    height, width = checked_size(size)
    class_map = checked_output("out", out, height, width)
    _run(values, class_map, None, _ALIGN_CORNERS if align_corners else 0, threads)
    return class_map


def upsample_argmax_confidence(
    logits: NDArray[np.float32],
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    out: NDArray[np.uint8] | None = None,
    confidence: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Class of each pixel, and how sure: round(255 x softmax probability of that class).

    As ``upsample_argmax``; the softmax is taken over the upsampled logits, within one level of
    exact arithmetic. NaN adds nothing to it; where nothing is above minus infinity, or the winner
    is infinite, confidence is 0.

    Returns (class_map, confidence), both (height, width) uint8: ``out`` and ``confidence`` where
    they were given (not the same memory), else new arrays.
    """
    values = _checked_logits(logits)
    height, width = checked_size(size)
    class_map = checked_output("out", out, height, width)
    levels = checked_output("confidence", confidence, height, width)
    if np.may_share_memory(class_map, levels):
        raise RequestError("out and confidence are the same memory; pass two arrays.")
    _run(values, class_map, levels, _ALIGN_CORNERS if align_corners else 0, threads)
    return class_map, levels


def _run(
    logits: NDArray[np.float32],
    class_map: NDArray[np.uint8],
    confidence: NDArray[np.uint8] | None,
    flags: int,
    threads: int,
) -> None:
    """Call the library; all arrays have been checked. ``flags`` may hold ``_NO_SHORT_CUT``."""
    classes, height, width = logits.shape[-3:]
    status = load().edgeseg_upsample_argmax(
        logits.ctypes.data,
        classes,
        height,
        width,
        class_map.ctypes.data,
        None if confidence is None else confidence.ctypes.data,
        *class_map.shape,
        flags,
        checked_threads(threads),
    )
    check_status("upsample_argmax", status)


def _checked_logits(logits: Any) -> NDArray[np.float32]:
    if not isinstance(logits, np.ndarray) or logits.dtype != np.float32:
        got = logits.dtype if isinstance(logits, np.ndarray) else type(logits).__name__
        raise RequestError(f"logits must be a float32 array, got {got}; convert with astype.")
    shape = logits.shape
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[0] != 1):
        raise RequestError(
            f"logits must be (classes, height, width) or (1, classes, height, width), got {shape}."
        )
    classes, height, width = shape[-3:]
    if not (1 <= classes <= MAX_CLASSES):
        raise RequestError(f"logits must have 1 to {MAX_CLASSES} classes, got {classes}.")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise RequestError(f"logits must be 1 to {MAX_SIDE} high and wide, got {shape}.")
    if not logits.flags.c_contiguous or not logits.flags.aligned:
        raise RequestError("logits must be C-contiguous; pass numpy.ascontiguousarray(logits).")
    return logits
