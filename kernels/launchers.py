"""The CUDA library's functions for ctypes: include/edgeseg/launchers.h in Python.

For whoever holds device memory and a stream: the TensorRT engine, the GPU tests, the benchmarks.
Pointers are integers, as every CUDA binding of Python gives them. Functions return a cudaError_t,
0 once the work is queued.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

from edgeseg.errors import KernelError

__all__ = [
    "ABI_VERSION",
    "BGR8",
    "FLOAT16",
    "FLOAT32",
    "INT32",
    "NV12",
    "RGB8",
    "UINT8",
    "YUYV",
    "Features",
    "FrameFit",
    "FramePlanes",
    "Instances",
    "Pyramid",
    "RoiPooling",
    "open_library",
    "typed",
]

ABI_VERSION = 2
"""What ``edgeseg_cuda_abi_version()`` of a fitting library returns."""

FLOAT32, FLOAT16, UINT8, INT32 = range(4)
BGR8, RGB8, NV12, YUYV = range(4)
MAX_LEVELS = 8

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Features(ctypes.Structure):
    """A feature map of one image; strides in elements."""

    _fields_: ClassVar[Any] = [
        ("data", _POINTER),
        ("type", _INT),
        ("channels", _INT),
        ("height", _INT),
        ("width", _INT),
        ("channel_stride", _LONG),
        ("pixel_stride", _LONG),
    ]

    @classmethod
    def channels_first(
        cls, data: int, element_type: int, channels: int, height: int, width: int
    ) -> Features:
        """(channels, height, width), contiguous."""
        return cls(data, element_type, channels, height, width, height * width, 1)

    @classmethod
    def channels_last(
        cls, data: int, element_type: int, channels: int, height: int, width: int, pitch: int = 0
    ) -> Features:
        """(height, width, pitch), of which the first ``channels`` count; 0: all of them."""
        return cls(data, element_type, channels, height, width, 1, pitch or channels)


class FrameFit(ctypes.Structure):
    """Where a frame lands in the network's input; the fields of ``geometry.Geometry``."""

    _fields_: ClassVar[Any] = [
        (name, _INT)
        for name in (
            "frame_height", "frame_width", "height", "width",
            "top", "left", "inner_height", "inner_width",
        )
    ]  # fmt: skip


class Instances(ctypes.Structure):
    """Boxes and coefficients of instances, on the device."""

    _fields_: ClassVar[Any] = [
        ("coefficients", _POINTER),
        ("boxes", _POINTER),
        ("count", _POINTER),
        ("capacity", _INT),
        ("network_height", _INT),
        ("network_width", _INT),
    ]


class Pyramid(ctypes.Structure):
    """The levels of a feature pyramid."""

    _fields_: ClassVar[Any] = [
        ("levels", Features * MAX_LEVELS),
        ("image_strides", _LONG * MAX_LEVELS),
        ("scales", _FLOAT * MAX_LEVELS),
        ("level_count", _INT),
        ("images", _INT),
        ("canonical_size", _FLOAT),
        ("canonical_level", _INT),
        ("first_level", _INT),
    ]


class RoiPooling(ctypes.Structure):
    """How boxes are pooled."""

    _fields_: ClassVar[Any] = [
        ("height", _INT),
        ("width", _INT),
        ("sampling_ratio", _INT),
        ("flags", _INT),
    ]


class FramePlanes(ctypes.Structure):
    """The planes of a camera's frame; pitches in bytes."""

    _fields_: ClassVar[Any] = [
        ("planes", _POINTER * 2),
        ("pitches", _LONG * 2),
        ("format", _INT),
    ]


_STRUCT = ctypes.c_void_p  # ctypes.byref(...) passes as a pointer

_FUNCTIONS: dict[str, list[Any]] = {
    # logits; class_map, confidence; output type, target height, target width, flags; stream
    "edgeseg_cuda_upsample_argmax": [_STRUCT, _POINTER, _POINTER, *[_INT] * 4, _POINTER],
    # prototypes, instances; masks; output type; stream
    "edgeseg_cuda_mask_assembly": [_STRUCT, _STRUCT, _POINTER, _INT, _POINTER],
    # prototypes, instances, fit; threshold; bits; stream
    "edgeseg_cuda_mask_bits": [_STRUCT, _STRUCT, _STRUCT, _FLOAT, _POINTER, _POINTER],
    # pyramid; boxes, image_of; rois; pooling; output; stream
    "edgeseg_cuda_pyramid_roi_align": [
        _STRUCT, _POINTER, _POINTER, _INT, _STRUCT, _POINTER, _POINTER,
    ],
    # frame, fit; image; stream
    "edgeseg_cuda_fit_frame": [_STRUCT, _STRUCT, _POINTER, _POINTER],
    # frame, its pitch; class_map, colours; classes; fit; opacity; drawn, its pitch; stream
    "edgeseg_cuda_draw_overlay": [
        _POINTER, _LONG, _POINTER, _POINTER, _INT, _STRUCT, _INT, _POINTER, _LONG, _POINTER,
    ],
}  # fmt: skip


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """``library`` with the types of those functions that it has."""
    for name, argument_types in _FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is not None:
            function.argtypes = argument_types
            function.restype = ctypes.c_int32
    return library


def open_library(path: Path) -> ctypes.CDLL:
    """The CUDA library at ``path``, its functions typed.

    KernelError when it cannot be loaded, or is of another version of EdgeSeg.
    """
    again = "build it again with `edgeseg kernels build --cuda`."
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.edgeseg_cuda_abi_version())
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} cannot be loaded ({error}); {again}") from error
    if version != ABI_VERSION:
        raise KernelError(
            f"{path} has interface version {version}, expected {ABI_VERSION}; {again}"
        )
    missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise KernelError(f"{path} lacks {', '.join(missing)}; {again}")
    return typed(library)
