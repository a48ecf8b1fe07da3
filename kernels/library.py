"""The compiled CPU library: found, loaded, checked; what all kernels share on the Python side."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import KernelError, RequestError
from edgeseg.kernels.build import ABI_VERSION, library_candidates

__all__ = [
    "MAX_SIDE",
    "available",
    "available_cores",
    "check_status",
    "checked_output",
    "checked_size",
    "checked_threads",
    "load",
]

MAX_SIDE = 1 << 22

_WAY_OUT = "run `edgeseg kernels build`, or reinstall edgeseg"

# Functions of the library: name -> types of their arguments; each returns an int32 status.
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_FUNCTIONS: dict[str, list[Any]] = {
    # logits; classes, height, width; class_map, confidence; target height, width, flags, threads
    "edgeseg_upsample_argmax": [_POINTER, *[_INT] * 3, _POINTER, _POINTER, *[_INT] * 4],
    # prototypes, instances; masks; flags, threads
    "edgeseg_mask_assembly": [*[_POINTER] * 3, *[_INT] * 2],
    # prototypes, instances, fit; threshold; bits; flags, threads
    "edgeseg_mask_bits": [*[_POINTER] * 3, _FLOAT, _POINTER, *[_INT] * 2],
    # prototypes, instances, fit; threshold; text, room, spans, needed; flags, threads
    "edgeseg_mask_runs": [*[_POINTER] * 3, _FLOAT, _POINTER, _LONG, *[_POINTER] * 2, *[_INT] * 2],
    # masks, fit; regions; threads
    "edgeseg_level_regions": [*[_POINTER] * 3, _INT],
    # masks, fit; begins, bits; flags, threads
    "edgeseg_level_bits": [*[_POINTER] * 4, *[_INT] * 2],
    # masks, fit; text, room, spans, needed; flags, threads
    "edgeseg_level_runs": [*[_POINTER] * 3, _LONG, *[_POINTER] * 2, *[_INT] * 2],
    # pyramid; boxes, image_of; rois; pooling; output; threads
    "edgeseg_pyramid_roi_align": [*[_POINTER] * 3, _INT, _POINTER, _POINTER, _INT],
    # frame, fit; image; flags, threads
    "edgeseg_fit_frame": [*[_POINTER] * 3, *[_INT] * 2],
    # class_map; frame, its pitch; height, width, steps; positions, count; refined; flags, threads
    "edgeseg_refine_borders": [
        *[_POINTER] * 2,
        _LONG,
        *[_INT] * 4,
        _POINTER,
        _LONG,
        _POINTER,
        *[_INT] * 2,
    ],
    # frame, its pitch; class_map, colours; classes; fit; opacity; drawn, its pitch; flags, threads
    "edgeseg_draw_overlay": [
        _POINTER,
        _LONG,
        _POINTER,
        _POINTER,
        _INT,
        _POINTER,
        _INT,
        _POINTER,
        _LONG,
        *[_INT] * 2,
    ],
}

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
        missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
        if missing:
            reason = f"{path.name} lacks {', '.join(missing)}"
            continue
        for name, argument_types in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes = argument_types
            function.restype = ctypes.c_int32
        return library
    raise KernelError(f"{reason}; {_WAY_OUT}.")


def check_status(name: str, status: int) -> None:
    """KernelError unless ``status``, returned by the library's function ``name``, is 0."""
    if status != 0:
        reason = {1: "an argument is out of bounds", 2: "not enough memory"}.get(status, "unknown")
        raise KernelError(f"{name} failed in the library with code {status}: {reason}.")


def available_cores() -> int:
    """Cores that this process may use."""
    # Containers and taskset allow fewer than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def checked_threads(threads: int) -> int:
    """``threads``, or all cores for 0; RequestError below that."""
    if threads < 0:
        raise RequestError(f"threads must be 0 (all cores) or more, got {threads}.")
    return threads or available_cores()


def checked_size(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` as (height, width) in pixels; RequestError unless both are 1 to ``MAX_SIDE``."""
    try:
        height, width = (int(side) for side in size)
    except (TypeError, ValueError):
        raise RequestError(f"size must be (height, width) in pixels, got {size!r}.") from None
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise RequestError(f"size must be 1 to {MAX_SIDE} pixels a side, got {size!r}.")
    return height, width


def checked_output(name: str, array: Any, height: int, width: int) -> NDArray[np.uint8]:
    """``array`` if it can take a (height, width) uint8 result, a new one for None."""
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
