"""Classes of uncertain pixels decided again by the colours around them, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.kernels.frames import row_pitch
from edgeseg.kernels.library import check_status, checked_threads, load

__all__ = ["refine_borders"]


def refine_borders(
    class_map: NDArray[np.uint8],
    frame: NDArray[np.uint8],
    uncertain: NDArray[np.int64],
    step: tuple[int, int],
    *,
    threads: int = 0,
    flags: int = 0,
) -> NDArray[np.uint8]:
    """A new class map, (height, width) uint8, in which the ``uncertain`` pixels may have changed.

    ``class_map`` is (height, width) uint8, contiguous; ``frame`` (height, width, 3) uint8 BGR, its
    rows any distance apart; ``uncertain`` (n,) int64, contiguous, positions in the flat class map;
    ``step`` is how many rows and columns the samples that vote are apart. The rule is in
    ``edgeseg/refine_borders.h``. ``threads`` 0 is all cores, ``flags`` those of cpu/exports.h for
    tests; the result depends on neither.

    Raises ``RequestError`` for arguments that don't fit, ``KernelError`` without the library.
    """
    row_pitch("class_map", class_map, (-1, -1))
    if not class_map.flags.c_contiguous:
        raise RequestError("class_map must be C-contiguous; pass numpy.ascontiguousarray().")
    height, width = class_map.shape
    pitch = row_pitch("frame", frame, (height, width, 3))
    _check_positions(uncertain, class_map.size)
    if min(step) < 1:
        raise RequestError(f"step must be 1 or more each way, got {step}.")
    refined: NDArray[np.uint8] = class_map.copy()
    status = load().edgeseg_refine_borders(
        class_map.ctypes.data,
        frame.ctypes.data,
        pitch,
        height,
        width,
        *step,
        uncertain.ctypes.data,
        len(uncertain),
        refined.ctypes.data,
        flags,
        checked_threads(threads),
    )
    check_status("refine_borders", status)
    return refined


def _check_positions(uncertain: Any, pixels: int) -> None:
    if (
        not isinstance(uncertain, np.ndarray)
        or uncertain.dtype != np.int64
        or uncertain.ndim != 1
        or not uncertain.flags.c_contiguous
    ):
        got = (
            f"{uncertain.dtype} {uncertain.shape}" if isinstance(uncertain, np.ndarray) else "none"
        )
        raise RequestError(f"uncertain must be a contiguous (n,) int64 array, got {got}.")
    if uncertain.size and not 0 <= int(uncertain.min()) <= int(uncertain.max()) < pixels:
        raise RequestError(f"uncertain must hold positions from 0 to {pixels - 1}.")
