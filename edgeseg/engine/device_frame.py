"""Frames in a GPU's memory, as another library left them there.

Two descriptions of such memory are read: the CUDA array interface (CuPy, Numba, PyCUDA, PyTorch)
and DLPack (all of them, and more). The memory stays its owner's: nothing is copied to the host, and
the owner is kept alive as long as the frame is.

Sources: the CUDA Array Interface, version 3 (Numba's documentation); dlpack.h and the Python
specification of DLPack (array API standard 2022.12).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from edgeseg.engine.cuda import Cuda, Stream, open_cuda
from edgeseg.errors import FrameError
from edgeseg.frame import Frame, Pixels, checked_pixels

__all__ = ["LEGACY_STREAM", "DeviceFrame", "DevicePixels", "frame_of"]

#: CUDA's name for its legacy default stream, which synchronizes with all blocking streams
LEGACY_STREAM = 1

_PROMISE = "a frame on the GPU is (height, width, 3) uint8 in BGR order"

# DLDeviceType of dlpack.h.
_DL_CPU, _DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 1, 2, 3, 13
_DL_UINT = 1  # DLDataTypeCode
_CAPSULE_NAME = b"dltensor"


@dataclass(frozen=True, eq=False)
class DevicePixels:
    """Where the pixels of a frame are: (height, width, 3) uint8 BGR in device memory.

    ``pitch``: bytes from one row to the next, 3 * width or more; the three bytes of a pixel, and
    the pixels of a row, follow each other. ``stream``: the CUDA stream, as an integer, after whose
    present work the pixels are there; None if they are there already. ``owner`` keeps the memory.
    """

    pointer: int
    height: int
    width: int
    pitch: int
    stream: int | None
    owner: object

    @classmethod
    def of(cls, array: Any) -> DevicePixels:
        """What ``array`` says of its memory; FrameError, with the conversion to use, if it does
        not hold a frame."""
        if hasattr(array, "__dlpack_device__") and _dlpack_device(array)[0] in (
            _DL_CUDA,
            _DL_CUDA_MANAGED,
        ):
            # Before the array interface: PyTorch's has no stream, and is refused by tensors that
            # require gradients.
            return cls._of_dlpack(array)
        if hasattr(array, "__cuda_array_interface__"):
            return cls._of_interface(array)
        raise FrameError(
            f"{_PROMISE}, with a CUDA array interface or DLPack, and {type(array).__name__} came"
        )

    @classmethod
    def _of_interface(cls, array: Any) -> DevicePixels:
        try:
            interface = dict(array.__cuda_array_interface__)
            shape = tuple(int(side) for side in interface["shape"])
            kind = str(interface["typestr"])
            pointer = int(interface["data"][0] or 0)
            strides = interface.get("strides")
            version = int(interface.get("version", 0))
            stream = interface.get("stream")
        except FrameError:
            raise
        except Exception as error:
            raise FrameError(
                f"{_PROMISE}, and the CUDA array interface of {type(array).__name__} cannot be "
                f"read ({type(error).__name__}: {error})"
            ) from error
        if interface.get("mask") is not None:
            raise FrameError(f"{_PROMISE}, and a masked array came; fill what is masked first")
        _check_shape(shape)
        if kind.lstrip("|<>=") != "u1":
            raise _other_type(kind)
        if version < 3:
            # Older versions have no word for a stream. Their owners work on the default stream.
            stream = LEGACY_STREAM
        elif stream is not None:
            stream = int(stream)
            if stream == 0:
                raise FrameError(
                    f"{_PROMISE}, and a CUDA array interface with stream 0 came, which the "
                    "interface forbids; None means that the pixels are there"
                )
        return cls(pointer, shape[0], shape[1], _pitch(shape, strides), stream, array)

    @classmethod
    def _of_dlpack(cls, array: Any) -> DevicePixels:
        kind, number = _dlpack_device(array)
        if number != 0:
            raise FrameError(
                f"{_PROMISE} on GPU 0, where the engine is, and one on GPU {number} came; copy it "
                "over, or let CUDA_VISIBLE_DEVICES name that GPU alone"
            )
        try:
            # The owner makes the pixels ready for the stream that is named here.
            capsule = array.__dlpack__(stream=LEGACY_STREAM)
            tensor = _tensor_in(capsule)
        except Exception as error:
            raise FrameError(
                f"{_PROMISE}, and DLPack from {type(array).__name__} cannot be read "
                f"({type(error).__name__}: {error})"
            ) from error
        if tensor.device.type != kind:
            raise FrameError(
                f"{_PROMISE}, and {type(array).__name__} names device type {kind} and gives memory "
                f"of type {tensor.device.type}"
            )
        shape = tuple(int(tensor.shape[axis]) for axis in range(tensor.ndim))
        _check_shape(shape)
        element = tensor.dtype
        if (element.code, element.bits, element.lanes) != (_DL_UINT, 8, 1):
            raise _other_type(_dlpack_type(element))
        strides = None
        if tensor.strides:
            strides = [int(tensor.strides[axis]) for axis in range(tensor.ndim)]
        pointer = int(tensor.data or 0) + int(tensor.byte_offset)
        # The capsule is read and not consumed: it frees the tensor itself when it goes.
        return cls(pointer, shape[0], shape[1], _pitch(shape, strides), LEGACY_STREAM, capsule)

    def download(self, cuda: Cuda) -> Pixels:
        """A copy on the host, contiguous; EngineError when CUDA fails."""
        padded = np.empty((self.height, self.pitch), np.uint8)
        used = (self.height - 1) * self.pitch + 3 * self.width
        with cuda.current():
            if self.stream is not None:
                cuda.synchronize(Stream(self.stream))
            stream = cuda.create_stream()
            try:
                cuda.copy_to_host(padded.reshape(-1)[:used], self.pointer, stream)
                cuda.synchronize(stream)
            finally:
                cuda.destroy_stream(stream)
        rows = np.ascontiguousarray(padded[:, : 3 * self.width])
        return rows.reshape(self.height, self.width, 3)


class DeviceFrame(Frame):
    """A frame whose pixels are in a GPU's memory.

    TensorRT reads them there. ``pixels`` are copied to the host when somebody asks for them, an
    engine on the CPU or ``draw``; the memory must still hold the frame then.
    """

    device: DevicePixels

    def __init__(self, device: DevicePixels, captured_ns: int, index: int) -> None:
        # Not the base's __init__: it takes pixels on the host.
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "captured_ns", captured_ns)
        object.__setattr__(self, "index", index)

    @cached_property
    def pixels(self) -> Pixels:
        """The frame on the host, copied once; EngineError where CUDA cannot be used."""
        cuda = open_cuda()
        try:
            return self.device.download(cuda)
        finally:
            cuda.close()

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.device.height

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.device.width


def frame_of(array: Any, index: int = 0) -> Frame:
    """A frame of any array, taken now: numpy's, or one with DLPack or a CUDA array interface.

    What is in device memory stays there (`DeviceFrame`); what another library has on the host is
    not copied either. FrameError, with the conversion to use, for anything else.
    """
    if isinstance(array, np.ndarray):
        return Frame.of(array, index)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        kind, _ = _dlpack_device(array)
        if kind in (_DL_CPU, _DL_CUDA_HOST):
            return Frame.of(_on_the_host(array), index)
        if kind not in (_DL_CUDA, _DL_CUDA_MANAGED):
            raise FrameError(
                "a frame is an array on the host or on an NVIDIA GPU, and one on DLPack's device "
                f"type {kind} came; copy it to the host"
            )
    elif not hasattr(array, "__cuda_array_interface__"):
        return Frame.of(array, index)
    return DeviceFrame(DevicePixels.of(array), time.monotonic_ns(), index)


def _on_the_host(array: Any) -> Pixels:
    try:
        return checked_pixels(np.from_dlpack(array))
    except FrameError:
        raise
    except Exception as error:
        raise FrameError(
            "a frame is (height, width, 3) uint8 in BGR order, and DLPack from "
            f"{type(array).__name__} cannot be read ({error}); numpy.asarray() makes an array of "
            "most things"
        ) from error


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) == 3 and shape[2] == 3 and shape[0] > 0 and shape[1] > 0:
        return
    way_out = ""
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 1):
        way_out = "; repeat the grey channel three times"
    elif len(shape) == 3 and shape[2] == 4:
        way_out = "; take [..., :3] and make it contiguous"
    elif len(shape) == 3 and shape[0] == 3:
        way_out = "; channels come last: .permute(1, 2, 0).contiguous() in PyTorch"
    elif len(shape) == 4 and shape[0] == 1:
        way_out = "; take [0]"
    raise FrameError(f"{_PROMISE}, and an array of shape {shape} came{way_out}")


def _other_type(kind: str) -> FrameError:
    return FrameError(
        f"{_PROMISE}, and one of {kind} came; scale it to 0-255 and convert it: "
        ".to(torch.uint8) in PyTorch, .astype('uint8') in CuPy"
    )


def _pitch(shape: tuple[int, ...], strides: Sequence[int] | None) -> int:
    """Bytes from row to row of a (height, width, 3) array with ``strides`` in bytes."""
    height, width, _ = shape
    if strides is None:
        return 3 * width
    row, pixel, channel = (int(stride) for stride in strides)
    # The stride of an axis of length 1 means nothing, and may be anything.
    if channel == 1 and (pixel == 3 or width == 1) and (row >= 3 * width or height == 1):
        return max(row, 3 * width) if height > 1 else 3 * width
    raise FrameError(
        f"{_PROMISE} whose rows are whole, and strides of {(row, pixel, channel)} bytes came; "
        "make it contiguous: .contiguous() in PyTorch, cupy.ascontiguousarray() in CuPy"
    )


def _dlpack_device(array: Any) -> tuple[int, int]:
    try:
        kind, number = array.__dlpack_device__()
        return int(kind), int(number)
    except Exception as error:
        raise FrameError(
            f"{_PROMISE}, and {type(array).__name__} does not say on which device it is "
            f"({type(error).__name__}: {error})"
        ) from error


class _Device(ctypes.Structure):
    """DLDevice."""

    _fields_: ClassVar[Any] = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _Type(ctypes.Structure):
    """DLDataType."""

    _fields_: ClassVar[Any] = [
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    ]


class _Tensor(ctypes.Structure):
    """DLTensor: the first member of a DLManagedTensor, which is what a capsule points to."""

    _fields_: ClassVar[Any] = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


# A function object of our own: the attributes of ctypes.pythonapi belong to the whole process.
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _tensor_in(capsule: object) -> Any:
    """The DLTensor in a capsule that nobody has consumed; ValueError for anything else."""
    return ctypes.cast(_get_pointer(capsule, _CAPSULE_NAME), ctypes.POINTER(_Tensor)).contents


def _dlpack_type(element: Any) -> str:
    names = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
    lanes = f" in groups of {element.lanes}" if element.lanes > 1 else ""
    return f"{names.get(element.code, 'unknown type ')}{element.bits}{lanes}"
