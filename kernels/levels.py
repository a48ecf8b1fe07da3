"""Finished instance masks on their way to frame size: levels 0 to 255 in, packed bits out."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.kernels.library import check_status, checked_threads, load
from edgeseg.kernels.masks import CocoRle, FrameGeometry, launched_fit, written_rles

__all__ = ["MaskGrid", "level_bits", "level_regions", "level_rles"]

_MAX_SIDE = 1 << 20
_FARTHEST = 1 << 24


class _LevelMasks(ctypes.Structure):
    """``LevelMasks`` of mask_assembly.cpp."""

    _fields_: ClassVar[Any] = [
        ("levels", ctypes.c_void_p),
        ("boxes", ctypes.c_void_p),
        ("pastes", ctypes.c_void_p),
        ("capacity", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
    ]


@dataclass(frozen=True, eq=False)
class MaskGrid:
    """Masks as levels, probability x 255, and where their samples lie.

    ``levels``: (n, height, width) uint8. One of two says what the samples span: ``boxes``, (n, 4)
    float32 x1, y1, x2, y2 in network pixels, that it is the whole network input, and samples
    outside of the box, widened by one sample each way, count as 0; ``pastes``, (n, 4) int32, that
    with a border of one empty sample it is a rectangle of the frame: first column, first row, last
    column, last row. All contiguous; RequestError for anything else.
    """

    levels: NDArray[np.uint8]
    boxes: NDArray[np.float32] | None = None
    pastes: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        _check("levels", self.levels, np.uint8, 3, -1)
        count, height, width = self.levels.shape
        if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
            raise RequestError(
                f"levels must be 1 to {_MAX_SIDE} high and wide, got {self.levels.shape}."
            )
        if (self.boxes is None) == (self.pastes is None):
            raise RequestError("a mask grid has either boxes or pastes; pass one of them.")
        if self.boxes is not None:
            _check("boxes", self.boxes, np.float32, 2, 4)
        elif self.pastes is not None:
            _check("pastes", self.pastes, np.int32, 2, 4)
            if self.pastes.size and np.abs(self.pastes.astype(np.int64)).max() > _FARTHEST:
                raise RequestError(f"pastes must lie within {_FARTHEST} pixels of the frame.")
        others = self.boxes if self.boxes is not None else self.pastes
        if others is not None and len(others) != count:
            raise RequestError(f"{count} masks came with {len(others)} boxes; give one per mask.")

    def _launched(self) -> _LevelMasks:
        return _LevelMasks(
            self.levels.ctypes.data,
            None if self.boxes is None else self.boxes.ctypes.data,
            None if self.pastes is None else self.pastes.ctypes.data,
            *self.levels.shape,
        )


def level_regions(
    grid: MaskGrid, geometry: FrameGeometry, *, threads: int = 0
) -> NDArray[np.int32]:
    """The part of the frame that each mask can reach, on or not: (n, 4) int32.

    First row, end of rows, first byte, end of bytes of a row of packed bits; zeros for a mask that
    reaches no pixel. RequestError for a geometry that cannot be, KernelError without the library.
    """
    fit = launched_fit(geometry)
    regions = np.empty((len(grid.levels), 4), np.int32)
    status = load().edgeseg_level_regions(
        ctypes.byref(grid._launched()),
        ctypes.byref(fit),
        regions.ctypes.data,
        checked_threads(threads),
    )
    check_status("level_regions", status)
    return regions


def level_bits(
    grid: MaskGrid,
    geometry: FrameGeometry,
    begins: NDArray[np.int64],
    out: NDArray[np.uint8],
    *,
    threads: int = 0,
    flags: int = 0,
) -> None:
    """Writes the bits of each mask, within its region, to ``out``.

    A pixel's bit is set where the levels, interpolated bilinearly at its centre (half-pixel
    centres, Geometry's way or the paste's), are above 127.5. ``begins``: (n,) where in ``out``, a
    contiguous (bytes,) uint8, the rows of each region of ``level_regions`` go. ``flags`` are the
    library's, for tests.
    """
    fit = launched_fit(geometry)
    regions = level_regions(grid, geometry, threads=threads)
    _check("begins", begins, np.int64, 1, -1)
    _check("out", out, np.uint8, 1, -1)
    sides = regions.astype(np.int64)
    sizes = (sides[:, 1] - sides[:, 0]) * (sides[:, 3] - sides[:, 2])
    if len(begins) != len(regions) or np.any((begins < 0) | (begins + sizes > out.size)):
        raise RequestError(
            f"the masks' regions must lie in the {out.size} bytes of out; take begins and the size "
            "from level_regions."
        )
    status = load().edgeseg_level_bits(
        ctypes.byref(grid._launched()),
        ctypes.byref(fit),
        begins.ctypes.data,
        out.ctypes.data,
        flags,
        checked_threads(threads),
    )
    check_status("level_bits", status)


def level_rles(
    grid: MaskGrid, geometry: FrameGeometry, *, threads: int = 0, flags: int = 0, room: int = 0
) -> list[CocoRle]:
    """The pixels of ``level_bits`` as COCO's compressed run lengths, one for each mask.

    Frames below 2^32 pixels. The first attempt has ``room`` bytes for all texts, 0 for a guess.
    """
    fit = launched_fit(geometry)
    return written_rles(
        "level_runs",
        lambda *places: load().edgeseg_level_runs(
            ctypes.byref(grid._launched()),
            ctypes.byref(fit),
            *places,
            flags,
            checked_threads(threads),
        ),
        len(grid.levels),
        fit,
        room,
    )


def _check(name: str, array: Any, element: type[np.generic], axes: int, last: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != element:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise RequestError(f"{name} must be a {np.dtype(element)} array, got {got}.")
    if array.ndim != axes or (last >= 0 and array.shape[-1] != last):
        promise = f"{axes} axes" + (f", the last of {last}" if last >= 0 else "")
        raise RequestError(f"{name} must have {promise}, got {array.shape}.")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise RequestError(f"{name} must be C-contiguous; pass numpy.ascontiguousarray({name}).")
