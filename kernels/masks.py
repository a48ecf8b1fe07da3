"""``EdgeSegMaskAssembly`` on the CPU: prototypes and coefficients to one mask per instance."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.kernels.launchers import FLOAT32, Features, FrameFit, Instances
from edgeseg.kernels.library import check_status, checked_size, checked_threads, load

__all__ = [
    "MAX_RLE_AREA",
    "CocoRle",
    "FrameGeometry",
    "assemble_mask_bits",
    "assemble_mask_rles",
    "assemble_masks",
    "launched_fit",
]

_MAX_SIDE = 1 << 20
_MAX_PROTOTYPES = 4096

#: pixels of the largest frame that run lengths are for
MAX_RLE_AREA = (1 << 32) - 1

_NO_SHORT_CUT = 2


class FrameGeometry(Protocol):
    """Where a frame lands in the network's input: what is needed of ``geometry.Geometry``."""

    @property
    def frame_height(self) -> int: ...
    @property
    def frame_width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def top(self) -> int: ...
    @property
    def left(self) -> int: ...
    @property
    def inner_height(self) -> int: ...
    @property
    def inner_width(self) -> int: ...


class CocoRle(TypedDict):
    """A mask as COCO's compressed run lengths, as ``pycocotools.mask`` takes it.

    ``size`` is [height, width]; ``counts`` are ASCII letters.
    """

    size: list[int]
    counts: bytes


def assemble_masks(
    prototypes: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    boxes: NDArray[np.float32],
    network_size: tuple[int, int],
    *,
    out: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> NDArray[np.uint8]:
    """Probability of each instance at each sample of the prototypes, as levels 0 to 255.

    round(255 x sigmoid(sum of prototypes x coefficients)) inside the instance's box, 0 outside
    (YOLACT, arXiv:1904.02689). The box is scaled to the prototypes and widened by one sample each
    way, and its corners may come in any order; one outside of the map, or with a NaN, leaves
    nothing. NaN logits give 0. Within one level of exact arithmetic.

    ``prototypes`` are (channels, height, width) or (1, channels, height, width) float32, at most
    4096 channels; pass channels-last ones as ``array.transpose(2, 0, 1)``, nothing is copied.
    ``coefficients`` are (n, channels) and ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels of the
    network's input, whose (height, width) is ``network_size``; both float32 and contiguous.

    Returns (n, height, width) uint8: ``out`` if it was given (same shape, contiguous, writable, not
    overlapping the inputs), else a new array. ``threads`` 0 is all cores; the result does not
    depend on it.

    Raises ``RequestError`` for arguments that don't fit, ``KernelError`` without the library.
    """
    features = _features(prototypes)
    instances = _instances(coefficients, boxes, features.channels, checked_size(network_size))
    masks = _checked_out(out, (instances.capacity, features.height, features.width))
    status = load().edgeseg_mask_assembly(
        ctypes.byref(features),
        ctypes.byref(instances),
        masks.ctypes.data,
        0,
        checked_threads(threads),
    )
    check_status("mask_assembly", status)
    return masks


def assemble_mask_bits(
    prototypes: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    boxes: NDArray[np.float32],
    geometry: FrameGeometry,
    *,
    threshold: float = 0.5,
    out: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> NDArray[np.uint8]:
    """Masks at frame size as packed bits, as ``numpy.packbits`` makes along the last axis.

    The probabilities of ``assemble_masks``, before rounding and with zeros outside the box, are
    interpolated bilinearly (half-pixel centres) at the place where ``geometry`` puts the centre of
    each pixel of the frame; its bit is set where they are above ``threshold``, which is between 0
    and 1. Arguments are as there; the network's size is ``geometry``'s.

    Returns (n, frame_height, ceil(frame_width / 8)) uint8; bits beyond the frame's width are 0.
    ``numpy.unpackbits(bits, axis=-1, count=frame_width)`` gives the pixels.
    """
    bits, _ = _run_bits(prototypes, coefficients, boxes, geometry, threshold, out, 0, threads)
    return bits


def assemble_mask_rles(
    prototypes: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    boxes: NDArray[np.float32],
    geometry: FrameGeometry,
    *,
    threshold: float = 0.5,
    threads: int = 0,
) -> list[CocoRle]:
    """Masks at frame size as COCO's compressed run lengths, one for each instance.

    The same pixels as ``assemble_mask_bits`` gives; frames below 2^32 pixels. Nothing of the
    frame's size is made on the way: the time goes with the area of the boxes among the prototypes
    and with the length of the masks' borders in the frame.
    """
    return _run_rles(prototypes, coefficients, boxes, geometry, threshold, 0, threads)


def _run_bits(
    prototypes: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    boxes: NDArray[np.float32],
    geometry: FrameGeometry,
    threshold: float,
    out: NDArray[np.uint8] | None,
    flags: int,
    threads: int,
) -> tuple[NDArray[np.uint8], FrameFit]:
    """``assemble_mask_bits`` with the library's ``flags``, which may hold ``_NO_SHORT_CUT``."""
    features = _features(prototypes)
    fit = launched_fit(geometry)
    instances = _instances(coefficients, boxes, features.channels, (fit.height, fit.width))
    bits = _checked_out(out, (instances.capacity, fit.frame_height, (fit.frame_width + 7) // 8))
    status = load().edgeseg_mask_bits(
        ctypes.byref(features),
        ctypes.byref(instances),
        ctypes.byref(fit),
        _checked_threshold(threshold),
        bits.ctypes.data,
        flags,
        checked_threads(threads),
    )
    check_status("mask_bits", status)
    return bits, fit


def _run_rles(
    prototypes: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    boxes: NDArray[np.float32],
    geometry: FrameGeometry,
    threshold: float,
    flags: int,
    threads: int,
    room: int = 0,
) -> list[CocoRle]:
    """``assemble_mask_rles`` with the library's ``flags``; the first attempt has ``room`` bytes."""
    features = _features(prototypes)
    fit = launched_fit(geometry)
    instances = _instances(coefficients, boxes, features.channels, (fit.height, fit.width))
    level = _checked_threshold(threshold)
    return written_rles(
        "mask_runs",
        lambda *places: load().edgeseg_mask_runs(
            ctypes.byref(features),
            ctypes.byref(instances),
            ctypes.byref(fit),
            level,
            *places,
            flags,
            checked_threads(threads),
        ),
        instances.capacity,
        fit,
        room,
    )


def written_rles(
    name: str, write: Callable[..., int], count: int, fit: FrameFit, room: int
) -> list[CocoRle]:
    """``count`` run lengths that the library's function ``name`` writes.

    ``write`` takes the address of the texts, their room in bytes, the address of the spans and a
    reference to the bytes needed; it returns the status. ``room``: of the first attempt, 0 for a
    guess. RequestError for a frame of 2^32 pixels or more.
    """
    if fit.frame_height * fit.frame_width > MAX_RLE_AREA:
        raise RequestError(
            f"run lengths are for frames below 2^32 pixels, got {fit.frame_height} x "
            f"{fit.frame_width}; take packed bits."
        )
    spans = np.empty((count, 2), np.int64)
    needed = ctypes.c_int64()
    # Enough for two runs in every column of a frame; the second attempt always fits.
    room = room or 64 + count * (64 + 4 * fit.frame_width)
    while True:
        text = np.empty(room, np.uint8)
        check_status(name, write(text.ctypes.data, room, spans.ctypes.data, ctypes.byref(needed)))
        if needed.value <= room:
            break
        room = needed.value
    size = (fit.frame_height, fit.frame_width)
    return [
        CocoRle(size=list(size), counts=text[begin:end].tobytes()) for begin, end in spans.tolist()
    ]


def _features(prototypes: Any) -> Features:
    array = _checked_floats("prototypes", prototypes)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3:
        raise RequestError(
            "prototypes must be (channels, height, width) or (1, channels, height, width), got "
            f"{array.shape}."
        )
    channels, height, width = array.shape
    if not (1 <= channels <= _MAX_PROTOTYPES):
        raise RequestError(f"prototypes must be 1 to {_MAX_PROTOTYPES}, got {channels}.")
    if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
        raise RequestError(f"prototypes must be 1 to {_MAX_SIDE} high and wide, got {array.shape}.")
    steps = [stride // array.itemsize for stride in array.strides]
    # A stride of an axis of one element says nothing.
    pixel_stride = steps[2] if width > 1 else steps[1] if height > 1 else 1
    channel_stride = steps[0] if channels > 1 else 1
    rows_follow = height == 1 or steps[1] == width * pixel_stride
    is_whole = all(stride % array.itemsize == 0 for stride in array.strides)
    if not (is_whole and rows_follow and pixel_stride > 0 and channel_stride > 0):
        raise RequestError(
            f"prototypes must have their rows one after the other, got strides {array.strides}; "
            "pass numpy.ascontiguousarray(prototypes)."
        )
    return Features(
        array.ctypes.data, FLOAT32, channels, height, width, channel_stride, pixel_stride
    )


def _instances(
    coefficients: Any, boxes: Any, channels: int, network_size: tuple[int, int]
) -> Instances:
    for name, array, columns in [("coefficients", coefficients, channels), ("boxes", boxes, 4)]:
        _checked_floats(name, array)
        if array.ndim != 2 or array.shape[1] != columns:
            raise RequestError(f"{name} must be (n, {columns}), got {array.shape}.")
        if not array.flags.c_contiguous:
            raise RequestError(f"{name} must be C-contiguous; pass numpy.ascontiguousarray.")
    if len(coefficients) != len(boxes):
        raise RequestError(f"{len(coefficients)} rows of coefficients and {len(boxes)} boxes.")
    return Instances(
        coefficients.ctypes.data, boxes.ctypes.data, None, len(boxes),
        *(_checked_side("network_size", side) for side in network_size),
    )  # fmt: skip


def launched_fit(geometry: FrameGeometry) -> FrameFit:
    """``geometry`` as the library takes it; RequestError unless the frame lies in the input."""
    fit = FrameFit(*(int(getattr(geometry, name)) for name, _ in FrameFit._fields_))
    for name in ("frame_height", "frame_width", "height", "width"):
        _checked_side(name, getattr(fit, name))
    inside = (
        fit.top >= 0
        and fit.left >= 0
        and 1 <= fit.inner_height <= fit.height - fit.top
        and 1 <= fit.inner_width <= fit.width - fit.left
    )
    if not inside:
        raise RequestError(
            f"geometry must put the frame inside the network's {fit.height} x {fit.width}, got "
            f"{fit.inner_height} x {fit.inner_width} at ({fit.top}, {fit.left})."
        )
    return fit


def _checked_floats(name: str, array: Any) -> NDArray[np.float32]:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise RequestError(f"{name} must be a float32 array, got {got}; convert with astype.")
    if not array.flags.aligned:
        raise RequestError(f"{name} must be aligned in memory; pass a copy.")
    return array


def _checked_side(name: str, side: int) -> int:
    if not (1 <= side <= _MAX_SIDE):
        raise RequestError(f"{name} must be 1 to {_MAX_SIDE} pixels, got {side}.")
    return side


def _checked_threshold(threshold: float) -> float:
    if not (0 < threshold < 1):
        raise RequestError(f"threshold must be above 0 and below 1, got {threshold!r}.")
    return threshold


def _checked_out(array: Any, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    if array is None:
        return np.empty(shape, np.uint8)
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise RequestError(f"out must be a uint8 array, got {got}.")
    if array.shape != shape:
        raise RequestError(f"out must have shape {shape}, got {array.shape}.")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise RequestError("out must be C-contiguous and writable; make it with numpy.empty.")
    return array
