"""EdgeSeg's own kernels: the arithmetic around the network, compiled.

The CPU library is built when EdgeSeg is installed, or later with ``build()``; where it is missing,
``available()`` is false and engines run the operator's standard-ONNX form instead. Results are the
same bytes on every machine, at any number of threads.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import KernelError, RequestError
from edgeseg.kernels.build import ABI_VERSION, build, library_candidates

__all__ = [
    "available",
    "build",
    "load",
    "upsample_argmax",
    "upsample_argmax_confidence",
]

MAX_CLASSES = 255
MAX_SIDE = 1 << 22

_ALIGN_CORNERS = 1
_NO_SHORT_CUT = 2

_WAY_OUT = "run `edgeseg kernels build`, or reinstall edgeseg"

_library: ctypes.CDLL | None = None
_lock = threading.Lock()


def load() -> ctypes.CDLL:
    """The CPU library, loaded on the first call and kept.

    Raises ``KernelError`` when there is none, or only one of another version.
    """
    global _library
    if _library is None:
        with _lock:
            if _library is None:
                _library = _open()
    return _library


def available() -> bool:
    """Whether the CPU library is here and loads."""
    try:
        load()
    except KernelError:
        return False
    return True


def _open() -> ctypes.CDLL:
    reason = "The compiled CPU kernels are not here"
    # Several may lie side by side after an upgrade; the newest that fits is the one to use.
    for path in library_candidates():
        try:
            library = ctypes.CDLL(str(path))
            version_of = library.edgeseg_abi_version
        except (OSError, AttributeError) as error:
            reason = f"{path.name} cannot be loaded ({error})"
            continue
        version_of.argtypes = []
        version_of.restype = ctypes.c_int32
        version = version_of()
        if version != ABI_VERSION:
            reason = f"{path.name} has interface version {version}, expected {ABI_VERSION}"
            continue
        function = library.edgeseg_upsample_argmax
        function.argtypes = [
            ctypes.c_void_p,  # logits
            *[ctypes.c_int32] * 3,  # classes, height, width
            ctypes.c_void_p,  # class_map
            ctypes.c_void_p,  # confidence
            *[ctypes.c_int32] * 4,  # target_height, target_width, flags, threads
        ]
        function.restype = ctypes.c_int32
        return library
    raise KernelError(f"{reason}; {_WAY_OUT}.")


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
    height, width = _checked_size(size)
    class_map = _checked_output("out", out, height, width)
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
    height, width = _checked_size(size)
    class_map = _checked_output("out", out, height, width)
    levels = _checked_output("confidence", confidence, height, width)
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
    if threads < 0:
        raise RequestError(f"threads must be 0 (all cores) or more, got {threads}.")
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
        threads or available_cores(),
    )
    if status != 0:
        reason = {1: "an argument is out of bounds", 2: "not enough memory"}.get(status, "unknown")
        raise KernelError(f"upsample_argmax failed in the library with code {status}: {reason}.")


def available_cores() -> int:
    """Cores that this process may use."""
    # Containers and taskset allow fewer than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in size)
    except (TypeError, ValueError):
        raise RequestError(f"size must be (height, width) in pixels, got {size!r}.") from None
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise RequestError(f"size must be 1 to {MAX_SIDE} pixels a side, got {size!r}.")
    return height, width


def _checked_output(name: str, array: Any, height: int, width: int) -> NDArray[np.uint8]:
    if array is None:
        return np.empty((height, width), np.uint8)
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise RequestError(f"{name} must be a uint8 array, got {got}.")
    if array.shape != (height, width):
        raise RequestError(f"{name} must have shape {(height, width)}, got {array.shape}.")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise RequestError(f"{name} must be C-contiguous and writable; make it with numpy.empty.")
    return array
