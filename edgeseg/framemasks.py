"""Masks of one frame's instances at frame size: packed bits, kept only where a mask can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.borders import border_step, influence, refine_borders
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.kernels import CocoRle, MaskGrid

__all__ = ["FrameMasks", "encoded_rle"]

# A level is on where the probability is above a half.
_HALF = np.float32(127.5)
# Rows of packed bits are computed in steps of this many pixels.
_STEP = 16
_POPULATION = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)


@dataclass(frozen=True, eq=False)
class FrameMasks:
    """The masks of n instances in a frame of ``height`` x ``width`` pixels.

    ``regions``: (n, 4) int32, the part of the frame outside of which a mask is off: first row, end
    of rows, first byte, end of bytes of a packed row. ``begins``: (n,) int64, where in ``bits``
    the rows of each region begin. ``bits``: uint8, the first pixel of a byte is its highest bit;
    bits beyond the frame's width are 0. ``grid``: what they were made of, None where that is not
    all.
    """

    height: int
    width: int
    regions: NDArray[np.int32]
    begins: NDArray[np.int64]
    bits: NDArray[np.uint8]
    grid: MaskGrid | None
    geometry: Geometry

    @classmethod
    def of(cls, grid: MaskGrid, geometry: Geometry, *, compiled: bool | None = None) -> FrameMasks:
        """The masks of ``grid`` in the frame that ``geometry`` is for.

        A pixel is on where the levels, interpolated bilinearly at its centre, are above 127.5.
        ``compiled``: whether the kernel does it; None uses it if it is there. The bits are the
        same. KernelError when it is asked for and is not there.
        """
        compiled = kernels.available() if compiled is None else compiled
        if compiled:
            regions = kernels.level_regions(grid, geometry)
        else:
            placed = [_place(grid, geometry, index) for index in range(len(grid.levels))]
            regions = np.array(
                [_region(*axes, geometry.frame_width) for _, axes in placed], np.int32
            ).reshape(-1, 4)
        sizes = _sizes(regions)
        begins = np.cumsum(sizes) - sizes
        bits = np.empty(int(sizes.sum()), np.uint8)
        if compiled:
            if bits.size:
                kernels.level_bits(grid, geometry, begins, bits)
        else:
            for (patch, axes), region, begin, size in zip(
                placed, regions, begins, sizes, strict=True
            ):
                if size:
                    bits[begin : begin + size] = _drawn(patch, axes, region, geometry).ravel()
        return cls(
            geometry.frame_height, geometry.frame_width, regions, begins, bits, grid, geometry
        )

    def refined(self, pixels: Pixels, *, compiled: bool | None = None) -> FrameMasks:
        """The masks with the pixels near their borders decided again, each mask by itself.

        ``pixels``: the frame, (height, width, 3) uint8 BGR. See `edgeseg.borders`, which
        ``compiled`` is for.
        """
        step = border_step(self.geometry)
        reach = influence(step)
        regions, pieces = np.zeros_like(self.regions), []
        for index, (top, bottom, first, end) in enumerate(self.regions.tolist()):
            if top >= bottom or first >= end:
                continue
            # Beyond the region the mask is off, and votes so.
            top, bottom = max(top - reach[0], 0), min(bottom + reach[0], self.height)
            left = max(first * 8 - reach[1], 0) // 8 * 8
            right = min(end * 8 + reach[1], self.width)
            wider = np.zeros((bottom - top, right - left), np.uint8)
            at_top, at_left, mask = self.window(index)
            y, x = at_top - top, at_left - left
            wider[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
            wider = refine_borders(wider, pixels[top:bottom, left:right], step, compiled=compiled)
            packed = np.packbits(wider, axis=1)
            regions[index] = top, bottom, left // 8, left // 8 + packed.shape[1]
            pieces.append(packed.ravel())
        sizes = _sizes(regions)
        bits = np.concatenate([np.empty(0, np.uint8), *pieces])
        begins = np.cumsum(sizes) - sizes
        return FrameMasks(self.height, self.width, regions, begins, bits, None, self.geometry)

    def __len__(self) -> int:
        return len(self.regions)

    def packed(self, index: int) -> NDArray[np.uint8]:
        """The bits of the region of mask ``index``: (rows, bytes) uint8, a view."""
        top, bottom, first, end = (int(value) for value in self.regions[index])
        size = (bottom - top) * (end - first)
        begin = int(self.begins[index])
        return self.bits[begin : begin + size].reshape(bottom - top, end - first)

    def window(self, index: int) -> tuple[int, int, NDArray[np.bool_]]:
        """Top, left and pixels, (height, width) bool, of the region of mask ``index``."""
        top, _, first, end = (int(value) for value in self.regions[index])
        columns = max(min(end * 8, self.width) - first * 8, 0)
        mask = np.unpackbits(self.packed(index), axis=1, count=columns).view(np.bool_)
        return top, first * 8, mask

    def all_bits(self) -> NDArray[np.uint8]:
        """All masks as ``numpy.packbits`` makes them: (n, height, ceil(width / 8)) uint8, new."""
        whole = np.zeros((len(self), self.height, -(-self.width // 8)), np.uint8)
        for index, (top, bottom, first, end) in enumerate(self.regions.tolist()):
            whole[index, top:bottom, first:end] = self.packed(index)
        return whole

    def arrays(self) -> NDArray[np.bool_]:
        """All masks as (n, height, width) bool, new."""
        whole = np.zeros((len(self), self.height, self.width), np.bool_)
        for index in range(len(self)):
            top, left, mask = self.window(index)
            whole[index, top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        return whole

    def areas(self) -> NDArray[np.int64]:
        """Pixels that each mask covers: (n,) int64."""
        return np.array(
            [int(_POPULATION[self.packed(index)].sum()) for index in range(len(self))], np.int64
        )

    def rles(self) -> list[CocoRle]:
        """COCO's compressed run lengths of each mask."""
        if self.grid is not None and kernels.available():
            return kernels.level_rles(self.grid, self.geometry)
        found = []
        for index in range(len(self)):
            whole = np.zeros((self.height, self.width), np.bool_)
            top, left, mask = self.window(index)
            whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
            found.append(encoded_rle(whole))
        return found


def encoded_rle(mask: NDArray[np.bool_]) -> CocoRle:
    """(height, width) bool as COCO's compressed run lengths (cocodataset/cocoapi, maskApi.c)."""
    height, width = mask.shape
    flat = mask.ravel(order="F")
    borders = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(np.concatenate([[0], borders, [flat.size]])).tolist()
    text = bytearray()
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            digit = value & 0x1F
            value >>= 5
            more = value != -1 if digit & 0x10 else value != 0
            text.append((digit | 0x20 if more else digit) + 48)
    return CocoRle(size=[height, width], counts=bytes(text))


def _sizes(regions: NDArray[np.int32]) -> NDArray[np.int64]:
    sides = regions.astype(np.int64)
    sizes: NDArray[np.int64] = (sides[:, 1] - sides[:, 0]) * (sides[:, 3] - sides[:, 2])
    return sizes


# --- the kernel's arithmetic in numpy, for machines without it: edgeseg/mask_assembly.h


@dataclass(frozen=True)
class _Axis:
    """``FrameAxis`` of mask_assembly.h, with the positions whose pixels see a sample."""

    samples: int
    step: int
    offset: int
    denominator: int
    begin: int
    end: int

    @classmethod
    def of(
        cls,
        samples: int,
        positions: tuple[int, int],
        fraction: tuple[int, int, int],
        span: tuple[int, int],
    ) -> _Axis:
        """``positions``: first and end; ``fraction``: step, offset, denominator."""
        common = gcd(*fraction)
        step, offset, denominator = (value // common for value in fraction)

        def begin(cell: int) -> int:
            if cell <= 0:
                return positions[0]
            if cell >= samples:
                return positions[1]
            first = -((offset - cell * denominator) // step)
            return min(max(first, positions[0]), positions[1])

        empty = span[0] >= span[1]
        return cls(
            samples,
            step,
            offset,
            denominator,
            0 if empty else begin(span[0] - 1),
            0 if empty else begin(span[1]),
        )

    def weights(
        self, begin: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Near and far sample, and their weights, of the positions from ``begin`` to ``end``."""
        exact = np.arange(begin, end, dtype=np.int64) * self.step + self.offset
        numerator = np.clip(exact, 0, (self.samples - 1) * self.denominator)
        cell = numerator // self.denominator
        denominator = np.float32(self.denominator)
        near = ((cell + 1) * self.denominator - numerator).astype(np.float32) / denominator
        far = (numerator - cell * self.denominator).astype(np.float32) / denominator
        return cell, np.minimum(cell + 1, self.samples - 1), near, far


_Axes = tuple[_Axis, _Axis]


def _place(grid: MaskGrid, geometry: Geometry, index: int) -> tuple[NDArray[np.float32], _Axes]:
    """The samples of one mask, zero where they don't count, and the axes (y, x) to the frame."""
    levels = grid.levels[index].astype(np.float32)
    frame = (geometry.frame_height, geometry.frame_width)
    if grid.boxes is None:
        assert grid.pastes is not None
        x1, y1, x2, y2 = (int(value) for value in grid.pastes[index])
        seen = x1 <= x2 and y1 <= y2
        axes = [
            _paste_axis(side, first, last, size, seen=seen)
            for side, first, last, size in zip(levels.shape, (y1, x1), (y2, x2), frame, strict=True)
        ]
        return np.pad(levels, 1), (axes[0], axes[1])
    box = grid.boxes[index]
    network = (geometry.height, geometry.width)
    spans = [
        _crop_span(box[axis], box[axis + 2], side, size)
        for axis, side, size in zip((1, 0), levels.shape, network, strict=True)
    ]
    kept = np.zeros_like(levels)
    inside = tuple(slice(*span) for span in spans)
    kept[inside] = levels[inside]
    axes = []
    for side, size, start, inner, pixels, span in zip(
        levels.shape,
        network,
        (geometry.top, geometry.left),
        (geometry.inner_height, geometry.inner_width),
        frame,
        spans,
        strict=True,
    ):
        offset = inner * side + 2 * start * pixels * side - pixels * size
        axes.append(
            _Axis.of(side, (0, pixels), (2 * inner * side, offset, 2 * pixels * size), span)
        )
    return kept, (axes[0], axes[1])


def _paste_axis(samples: int, first: int, last: int, frame: int, *, seen: bool) -> _Axis:
    size, padded = last - first + 1, samples + 2
    positions = (max(first, 0), min(max(last + 1, 0), frame))
    seen = seen and positions[0] < positions[1]
    span = (1, samples + 1) if seen else (0, 0)
    if not seen:
        size = 1
    offset = padded - size - 2 * padded * first
    return _Axis.of(padded, positions, (2 * padded, offset, 2 * size), span)


def _crop_span(start: np.float32, end: np.float32, samples: int, network: int) -> tuple[int, int]:
    """``crop_span`` of mask_assembly.h: float32 throughout."""
    one = np.float32(1)
    scaled = sorted(side * np.float32(samples) / np.float32(network) for side in (start, end))
    if np.isnan(scaled[0]) or np.isnan(scaled[1]):
        return 0, 0
    low, high = max(scaled[0] - one, np.float32(0)), min(scaled[1] + one, np.float32(samples))
    return (int(np.ceil(low)), int(np.ceil(high))) if low < high else (0, 0)


def _region(y: _Axis, x: _Axis, width: int) -> tuple[int, int, int, int]:
    if y.begin >= y.end or x.begin >= x.end:
        return 0, 0, 0, 0
    end = min(-(-x.end // _STEP) * _STEP // 8, -(-width // 8))
    return y.begin, y.end, x.begin // _STEP * _STEP // 8, end


def _drawn(
    patch: NDArray[np.float32], axes: _Axes, region: Sequence[int] | NDArray[np.int32], at: Geometry
) -> NDArray[np.uint8]:
    """The packed bits of one region."""
    top, bottom, first, end = (int(value) for value in region)
    y, x = axes
    near_x, far_x, left, right = x.weights(first * 8, min(end * 8, at.frame_width))
    near_y, far_y, above, below = y.weights(top, bottom)
    rows = left * patch[:, near_x] + right * patch[:, far_x]
    values = above[:, None] * rows[near_y] + below[:, None] * rows[far_y]
    return np.packbits(values > _HALF, axis=1)
