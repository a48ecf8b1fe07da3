"""``EdgeSegPyramidRoiAlign`` on the CPU: boxes pooled from the levels of a feature pyramid."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.kernels.launchers import FLOAT32, MAX_LEVELS, Features, Pyramid, RoiPooling
from edgeseg.kernels.library import MAX_SIDE, check_status, checked_threads, load

__all__ = ["MAX_BINS", "MAX_SAMPLING_RATIO", "pyramid_roi_align"]

MAX_BINS = 1024
"""Most bins of an output, each way."""

MAX_SAMPLING_RATIO = 1024

_ALIGNED = 1
_MAX_ELEMENTS = (1 << 31) - 1
_ITEM = 4  # bytes of a float32


def pyramid_roi_align(
    levels: Sequence[NDArray[np.float32]],
    boxes: NDArray[np.float32],
    *,
    output_size: tuple[int, int],
    scales: Sequence[float],
    image_of: NDArray[np.int32] | None = None,
    sampling_ratio: int = 0,
    aligned: bool = False,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    first_level: int = 2,
    out: NDArray[np.float32] | None = None,
    threads: int = 0,
) -> NDArray[np.float32]:
    """RoIAlign of ``boxes``, each from the level that fits its size (Mask R-CNN, FPN).

    ``levels`` are 1 to 8 feature maps, (images, channels, height, width) or (channels, height,
    width) float32, the finest first. Each is contiguous, or a channels-last map seen as channels
    first (``nhwc.transpose(0, 3, 1, 2)``), of which nothing is copied. ``scales`` are one number
    per level: box coordinates times this are its pixels (1/4, 1/8, ...). ``boxes`` are (n, 4) xyxy
    float32, ``image_of`` (n,) int32 the image of each, by default the first one.

    ``output_size`` is (height, width) in bins. ``sampling_ratio`` is the number of samples in a bin
    each way, or 0 for ceil(size of the bin). ``aligned`` is torchvision's flag, ONNX's
    coordinate_transformation_mode half_pixel; without it, output_half_pixel. Bins are averages.

    With several levels a box goes to level floor(``canonical_level`` + log2(sqrt(area) /
    ``canonical_size``) + 1e-6), kept within ``first_level`` and the last level there is.

    A box with NaN or infinity, or of an image that is not there, gives zeros; pixels outside a map
    are zeros, as in ONNX. include/edgeseg/pyramid_roi_align.h defines inverted and empty boxes.

    Returns (n, channels, height, width) float32: ``out`` if it was given (same shape, contiguous,
    writable, not overlapping the inputs), else a new array. ``threads`` 0 is all cores; the result
    does not depend on it.

    Raises ``RequestError`` for arguments that don't fit, ``KernelError`` without the library.
    """
    height, width = _checked_output_size(output_size)
    if not 0 <= sampling_ratio <= MAX_SAMPLING_RATIO:
        raise RequestError(
            f"sampling_ratio must be 0 (adaptive) to {MAX_SAMPLING_RATIO}, got {sampling_ratio}."
        )
    pooling = RoiPooling(height, width, sampling_ratio, _ALIGNED if aligned else 0)
    pyramid = _pyramid(levels, scales)
    if len(levels) > 1:
        if not 0 < _as_float32(canonical_size) < math.inf:
            raise RequestError(f"canonical_size must be above 0 pixels, got {canonical_size!r}.")
        for name, level in (("canonical_level", canonical_level), ("first_level", first_level)):
            if not -MAX_SIDE <= level <= MAX_SIDE:
                raise RequestError(f"{name} must be the number of a level, got {level!r}.")
        pyramid.canonical_size = canonical_size
        pyramid.canonical_level = canonical_level
        pyramid.first_level = first_level
    _check_boxes(boxes, image_of)
    shape = (len(boxes), int(pyramid.levels[0].channels), height, width)
    pooled = _checked_out(out, shape)
    _run(pyramid, boxes, image_of, pooling, pooled, threads)
    return pooled


def _run(
    pyramid: Pyramid,
    boxes: NDArray[np.float32],
    image_of: NDArray[np.int32] | None,
    pooling: RoiPooling,
    out: NDArray[np.float32],
    threads: int,
) -> None:
    """Call the library; all arrays have been checked, and the caller keeps the levels alive."""
    status = load().edgeseg_pyramid_roi_align(
        ctypes.byref(pyramid),
        boxes.ctypes.data,
        None if image_of is None else image_of.ctypes.data,
        len(boxes),
        ctypes.byref(pooling),
        out.ctypes.data,
        checked_threads(threads),
    )
    check_status("pyramid_roi_align", status)


def _pyramid(levels: Sequence[NDArray[np.float32]], scales: Sequence[float]) -> Pyramid:
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise RequestError(f"levels must be 1 to {MAX_LEVELS} feature maps, got {len(levels)}.")
    if len(scales) != len(levels):
        raise RequestError(
            f"scales must be one number per level, got {len(scales)} for {len(levels)} levels."
        )
    pyramid = Pyramid()
    pyramid.level_count = len(levels)
    for index, (level, scale) in enumerate(zip(levels, scales, strict=True)):
        features, images, image_stride = _features(index, level)
        first = pyramid.levels[0]
        if index and (images, features.channels) != (pyramid.images, first.channels):
            raise RequestError(
                f"All levels must have the same images and channels; level 0 has {pyramid.images} "
                f"and {first.channels}, level {index} has {images} and {features.channels}."
            )
        if not 0 < _as_float32(scale) < math.inf:
            raise RequestError(f"scales must be above 0, got {scale!r} for level {index}.")
        pyramid.levels[index] = features
        pyramid.image_strides[index] = image_stride
        pyramid.scales[index] = scale
        pyramid.images = images
    return pyramid


def _as_float32(value: float) -> float:
    """What the library reads: infinite, or 0, where float32 has no such number."""
    return ctypes.c_float(value).value


def _features(index: int, level: Any) -> tuple[Features, int, int]:
    """The level as the library takes it, its number of images, and elements between them."""
    if not isinstance(level, np.ndarray) or level.dtype != np.float32:
        got = level.dtype if isinstance(level, np.ndarray) else type(level).__name__
        raise RequestError(f"Level {index} must be a float32 array, got {got}.")
    if level.ndim not in (3, 4) or 0 in level.shape:
        raise RequestError(
            f"Level {index} must be (images, channels, height, width) or (channels, height, width) "
            f"with nothing empty, got {level.shape}."
        )
    batch = level if level.ndim == 4 else level[None]
    images, channels, height, width = batch.shape
    if max(height, width) > MAX_SIDE or channels * height * width > _MAX_ELEMENTS:
        raise RequestError(
            f"Level {index} must be at most {MAX_SIDE} pixels a side and 2^31 numbers an image, "
            f"got {level.shape}."
        )
    planar = batch[0].flags.c_contiguous
    # Strides of a side of 1 mean nothing, so contiguity is asked of the right view of one image.
    if not (planar or batch[0].transpose(1, 2, 0).flags.c_contiguous) or not level.flags.aligned:
        raise RequestError(
            f"Level {index} must be contiguous, channels first or last; "
            "pass numpy.ascontiguousarray(level)."
        )
    image_stride = batch.strides[0] // _ITEM if images > 1 else channels * height * width
    if image_stride < 0:
        raise RequestError(f"Level {index} runs backwards over its images; pass a copy of it.")
    make = Features.channels_first if planar else Features.channels_last
    return make(level.ctypes.data, FLOAT32, channels, height, width), images, image_stride


def _checked_output_size(output_size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in output_size)
    except (TypeError, ValueError):
        raise RequestError(
            f"output_size must be (height, width) in bins, got {output_size!r}."
        ) from None
    if not (1 <= height <= MAX_BINS and 1 <= width <= MAX_BINS):
        raise RequestError(f"output_size must be 1 to {MAX_BINS} bins a side, got {output_size!r}.")
    return height, width


def _check_boxes(boxes: Any, image_of: Any) -> None:
    if not isinstance(boxes, np.ndarray) or boxes.dtype != np.float32:
        got = boxes.dtype if isinstance(boxes, np.ndarray) else type(boxes).__name__
        raise RequestError(f"boxes must be a float32 array, got {got}; convert with astype.")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise RequestError(f"boxes must be (n, 4), x1 y1 x2 y2, got {boxes.shape}.")
    if len(boxes) > _MAX_ELEMENTS:
        raise RequestError(f"boxes must be fewer than 2^31, got {len(boxes)}.")
    if not boxes.flags.c_contiguous or not boxes.flags.aligned:
        raise RequestError("boxes must be C-contiguous; pass numpy.ascontiguousarray(boxes).")
    if image_of is None:
        return
    if not isinstance(image_of, np.ndarray) or image_of.dtype != np.int32:
        got = image_of.dtype if isinstance(image_of, np.ndarray) else type(image_of).__name__
        raise RequestError(f"image_of must be an int32 array, got {got}; convert with astype.")
    if image_of.shape != (len(boxes),):
        raise RequestError(f"image_of must have shape {(len(boxes),)}, got {image_of.shape}.")
    if not image_of.flags.c_contiguous or not image_of.flags.aligned:
        raise RequestError("image_of must be contiguous; pass numpy.ascontiguousarray(image_of).")


def _checked_out(out: Any, shape: tuple[int, int, int, int]) -> NDArray[np.float32]:
    if out is None:
        return np.empty(shape, np.float32)
    if not isinstance(out, np.ndarray) or out.dtype != np.float32:
        got = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise RequestError(f"out must be a float32 array, got {got}.")
    if out.shape != shape:
        raise RequestError(f"out must have shape {shape}, got {out.shape}.")
    if not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
        raise RequestError("out must be C-contiguous and writable; make it with numpy.empty.")
    return out
