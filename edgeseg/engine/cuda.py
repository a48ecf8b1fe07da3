"""CUDA as the TensorRT engine and its builder use it: the twenty calls that they need, typed.

Two packages give them: cuda-python (``pip install cuda-bindings``, NVIDIA's own, the default) and
PyCUDA. Neither is imported before ``open_cuda`` is called. All handles are integers, as TensorRT
and the kernels of ``edgeseg.kernels.launchers`` take them.

::

    cuda = open_cuda()
    with cuda.current():
        stream = cuda.create_stream()
        address = cuda.allocate(image.nbytes)
        cuda.copy_to_device(address, image, stream)
        cuda.synchronize(stream)

The device's primary context is used, which is the one of PyTorch and of the CUDA runtime, so that
device memory can be shared with them. ``current()`` makes it current in the calling thread; every
other method, every call of TensorRT and every kernel launch happens inside. An error of CUDA is an
EngineError with CUDA's own name of it and the way out.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NewType, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import EngineError, RequestError

__all__ = [
    "Cuda",
    "CudaPython",
    "Device",
    "Event",
    "Graph",
    "Memory",
    "PyCuda",
    "Stream",
    "open_cuda",
]

Stream = NewType("Stream", int)
"""A cudaStream_t that does not wait for the default stream."""

Event = NewType("Event", int)
"""A cudaEvent_t, or a number that stands for one: PyCUDA hides it."""

Graph = NewType("Graph", int)
"""An instantiated graph, a cudaGraphExec_t."""


@dataclass(frozen=True)
class Device:
    """A GPU: what it is called, its compute capability, and whether it shares the CPU's memory."""

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    integrated: bool

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"{self.name} (compute capability {major}.{minor})"


@dataclass(frozen=True)
class Memory:
    """Memory of a GPU in bytes."""

    free: int
    total: int


class Cuda(Protocol):
    """One GPU, opened.

    Methods that queue work on a stream return at once. Whoever creates a thing destroys it before
    ``close``. Not thread-safe beyond what CUDA promises: several threads may call at the same
    time, each inside its own ``current()``, on streams and buffers of their own.
    """

    @property
    def name(self) -> str:
        """The package behind it, with its version: ``cuda-python 13.5.0``."""

    @property
    def device(self) -> Device:
        """The GPU."""

    @property
    def captures(self) -> bool:
        """Whether work can be captured into a graph; PyCUDA cannot."""

    def current(self) -> AbstractContextManager[None]:
        """Makes the device current in this thread, and what was current before afterwards."""

    def memory(self) -> Memory:
        """Free and total memory of the device now."""

    def allocate(self, size: int) -> int:
        """The address of ``size`` > 0 new bytes on the device, aligned to 256, for ``free``."""

    def free(self, address: int) -> None:
        """Ends what ``allocate`` gave; work that uses it must have been waited for."""

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """(size,) uint8 of pinned host memory, which is what makes copies asynchronous.

        The device can read and write it at the same address (``array.ctypes.data``). Views of it
        must not be used after ``free_host``.
        """

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Ends an array that ``allocate_host`` gave, the very array and no view of it."""

    def create_stream(self) -> Stream:
        """A new stream that does not wait for the default stream."""

    def destroy_stream(self, stream: Stream) -> None:
        """Ends a stream; what is queued on it still runs."""

    def synchronize(self, stream: Stream) -> None:
        """Waits until everything queued on ``stream`` is done; failures of kernels show here."""

    def copy_to_device(self, address: int, source: NDArray[Any], stream: Stream) -> None:
        """Queues a copy of all of ``source``, a contiguous array, to the device.

        ``source`` must stay as it is until the stream has passed: the copy may not have begun.
        """

    def copy_to_host(self, target: NDArray[Any], address: int, stream: Stream) -> None:
        """Queues a copy that fills ``target``, a contiguous array; valid once the stream passed."""

    def create_event(self, *, timing: bool = False) -> Event:
        """A new event; only one with ``timing`` can be asked for the time."""

    def destroy_event(self, event: Event) -> None:
        """Ends an event."""

    def record(self, event: Event, stream: Stream) -> None:
        """Queues ``event``: it has happened when what was queued before it is done."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Holds what is queued on ``stream`` from now on until ``event`` has happened."""

    def synchronize_event(self, event: Event) -> None:
        """Waits until ``event``, as last recorded, has happened."""

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Milliseconds between two events with timing that have both happened."""

    def begin_capture(self, stream: Stream) -> None:
        """From now on what is queued on ``stream`` is recorded and not run.

        Other threads are not disturbed. ``end_capture`` must follow, whatever happens between.
        """

    def end_capture(self, stream: Stream) -> Graph:
        """What was captured, ready to be launched; EngineError when it cannot be a graph.

        The stream is a normal one again in both cases.
        """

    def launch(self, graph: Graph, stream: Stream) -> None:
        """Queues all of ``graph``'s work on ``stream``."""

    def destroy_graph(self, graph: Graph) -> None:
        """Ends a graph; a launch that is under way must have been waited for."""

    def close(self) -> None:
        """Lets go of the device; nothing but ``close`` may be called afterwards."""


class CudaPython:
    """``Cuda`` through cuda-python: the runtime API of ``cuda.bindings``, 12 or newer.

    The context is pushed and popped by the driver API, since the runtime alone has no way back to
    a context that somebody else, PyCUDA say, has made current.
    """

    captures = True

    def __init__(self, device: int = 0) -> None:
        from cuda import bindings
        from cuda.bindings import driver, runtime

        self.name = f"cuda-python {bindings.__version__}"
        self._runtime = runtime
        self._driver = driver
        error, count = runtime.cudaGetDeviceCount()
        if int(error) == _INSUFFICIENT_DRIVER:
            raise EngineError(self._old_driver())
        _check_ordinal(device, int(self._done((error, count))))
        attribute = runtime.cudaDeviceAttr
        properties = self._done(runtime.cudaGetDeviceProperties(device))
        self.device = Device(
            device,
            properties.name.decode(errors="replace"),
            (int(properties.major), int(properties.minor)),
            bool(
                self._done(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrIntegrated, device))
            ),
        )
        self._done(driver.cuInit(0))
        self._context = self._done(driver.cuDevicePrimaryCtxRetain(device))
        self._open = True

    def _done(self, answer: tuple[Any, ...]) -> Any:
        """The value of a call's answer (error, value); EngineError when the error is one."""
        error, *values = answer
        if int(error):
            raise EngineError(self._sentence(error))
        return values[0] if len(values) == 1 else values

    def _sentence(self, error: Any) -> str:
        if isinstance(error, self._driver.CUresult):
            return _sentence(_runtime_name(error.name), f"{error.name}")
        # What failed stays behind as the last error, and the next launch would be blamed for it.
        self._runtime.cudaGetLastError()
        words = self._runtime.cudaGetErrorString(error)[1] or b""
        return _sentence(error.name, words.decode(errors="replace"))

    def _old_driver(self) -> str:
        """What to do about a driver that is missing, or older than the package."""
        _, driver = self._runtime.cudaDriverGetVersion()
        _, package = self._runtime.cudaRuntimeGetVersion()
        if not driver:
            return _sentence("cudaErrorInsufficientDriver", "no driver was found")
        major = driver // 1000
        return (
            f"{self.name} is for CUDA {_dotted(package)} and the driver here for CUDA "
            f"{_dotted(driver)} (cudaErrorInsufficientDriver); "
            f"`pip install 'cuda-bindings<{major + 1}'` gives the one that fits."
        )

    @contextmanager
    def current(self) -> Iterator[None]:
        self._done(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._done(self._driver.cuCtxPopCurrent())

    def memory(self) -> Memory:
        free, total = self._done(self._runtime.cudaMemGetInfo())
        return Memory(int(free), int(total))

    def allocate(self, size: int) -> int:
        return int(self._done(self._runtime.cudaMalloc(size)))

    def free(self, address: int) -> None:
        self._done(self._runtime.cudaFree(address))

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        address = int(self._done(self._runtime.cudaHostAlloc(size, _HOST_PORTABLE)))
        return _array_at(address, size)

    def free_host(self, array: NDArray[np.uint8]) -> None:
        self._done(self._runtime.cudaFreeHost(array.ctypes.data))

    def create_stream(self) -> Stream:
        flags = self._runtime.cudaStreamNonBlocking
        return Stream(int(self._done(self._runtime.cudaStreamCreateWithFlags(flags))))

    def destroy_stream(self, stream: Stream) -> None:
        self._done(self._runtime.cudaStreamDestroy(stream))

    def synchronize(self, stream: Stream) -> None:
        self._done(self._runtime.cudaStreamSynchronize(stream))

    def copy_to_device(self, address: int, source: NDArray[Any], stream: Stream) -> None:
        _check_contiguous(source)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._done(
            self._runtime.cudaMemcpyAsync(address, source.ctypes.data, source.nbytes, kind, stream)
        )

    def copy_to_host(self, target: NDArray[Any], address: int, stream: Stream) -> None:
        _check_contiguous(target, written=True)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._done(
            self._runtime.cudaMemcpyAsync(target.ctypes.data, address, target.nbytes, kind, stream)
        )

    def create_event(self, *, timing: bool = False) -> Event:
        runtime = self._runtime
        # Who waits sleeps: spinning would take a core from the camera.
        flags = runtime.cudaEventBlockingSync
        if not timing:
            flags |= runtime.cudaEventDisableTiming
        return Event(int(self._done(runtime.cudaEventCreateWithFlags(flags))))

    def destroy_event(self, event: Event) -> None:
        self._done(self._runtime.cudaEventDestroy(event))

    def record(self, event: Event, stream: Stream) -> None:
        self._done(self._runtime.cudaEventRecord(event, stream))

    def wait(self, stream: Stream, event: Event) -> None:
        self._done(self._runtime.cudaStreamWaitEvent(stream, event, 0))

    def synchronize_event(self, event: Event) -> None:
        self._done(self._runtime.cudaEventSynchronize(event))

    def elapsed_ms(self, start: Event, end: Event) -> float:
        return float(self._done(self._runtime.cudaEventElapsedTime(start, end)))

    def begin_capture(self, stream: Stream) -> None:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._done(self._runtime.cudaStreamBeginCapture(stream, mode))

    def end_capture(self, stream: Stream) -> Graph:
        captured = self._done(self._runtime.cudaStreamEndCapture(stream))
        try:
            return Graph(int(self._done(self._runtime.cudaGraphInstantiate(captured, 0))))
        finally:
            self._done(self._runtime.cudaGraphDestroy(captured))

    def launch(self, graph: Graph, stream: Stream) -> None:
        self._done(self._runtime.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: Graph) -> None:
        self._done(self._runtime.cudaGraphExecDestroy(graph))

    def close(self) -> None:
        if self._open:
            self._open = False
            self._done(self._driver.cuDevicePrimaryCtxRelease(self.device.ordinal))


class PyCuda:
    """``Cuda`` through PyCUDA's driver module, 2022.1 or newer.

    Written after PyCUDA's published source (2026.1, src/wrapper/wrap_cudadrv.cpp), and never run on
    a GPU. PyCUDA has no capture of graphs. Its handles are objects that end what they hold when
    they go, so they are kept here until they are destroyed.
    """

    captures = False

    def __init__(self, device: int = 0) -> None:
        import pycuda
        from pycuda import driver

        self.name = f"pycuda {pycuda.VERSION_TEXT}"
        self._driver = driver
        with self._errors():
            driver.init()
            _check_ordinal(device, int(driver.Device.count()))
            found = driver.Device(device)
            major, minor = found.compute_capability()
            integrated = found.get_attribute(driver.device_attribute.INTEGRATED)
            self.device = Device(device, found.name(), (major, minor), bool(integrated))
            self._context = found.retain_primary_context()
        self._open = True
        # Handle -> the object behind it.
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        self._last_event = 0

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of PyCUDA as ours."""
        try:
            yield
        except self._driver.Error as error:
            text = str(error)
            lowered = text.lower()
            name = next((name for words, name in _PYCUDA_WORDS if words in lowered), "")
            raise EngineError(_sentence(name, text)) from error

    @contextmanager
    def current(self) -> Iterator[None]:
        # PyCUDA ends the process when a thread ends with a context on its stack: always popped.
        with self._errors():
            self._context.push()
        try:
            yield
        finally:
            with self._errors():
                self._driver.Context.pop()

    def memory(self) -> Memory:
        with self._errors():
            free, total = self._driver.mem_get_info()
        return Memory(int(free), int(total))

    def allocate(self, size: int) -> int:
        with self._errors():
            allocation = self._driver.mem_alloc(size)
        address = int(allocation)
        self._memory[address] = allocation
        return address

    def free(self, address: int) -> None:
        with self._errors():
            self._memory.pop(address).free()

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        with self._errors():
            array: NDArray[np.uint8] = self._driver.pagelocked_empty(
                size, np.uint8, mem_flags=self._driver.host_alloc_flags.PORTABLE
            )
        return array

    def free_host(self, array: NDArray[np.uint8]) -> None:
        allocation: Any = array.base
        with self._errors():
            allocation.free()

    def create_stream(self) -> Stream:
        with self._errors():
            stream = self._driver.Stream(_STREAM_NON_BLOCKING)
        handle = int(stream.handle)
        self._streams[handle] = stream
        return Stream(handle)

    def destroy_stream(self, stream: Stream) -> None:
        del self._streams[stream]

    def synchronize(self, stream: Stream) -> None:
        with self._errors():
            if stream in self._streams:
                self._streams[stream].synchronize()
            else:
                self._driver.Context.synchronize()

    def copy_to_device(self, address: int, source: NDArray[Any], stream: Stream) -> None:
        _check_contiguous(source)
        with self._errors():
            self._driver.memcpy_htod_async(address, source, self._streams[stream])

    def copy_to_host(self, target: NDArray[Any], address: int, stream: Stream) -> None:
        _check_contiguous(target, written=True)
        with self._errors():
            self._driver.memcpy_dtoh_async(target, address, self._streams[stream])

    def create_event(self, *, timing: bool = False) -> Event:
        named = self._driver.event_flags
        flags = named.BLOCKING_SYNC if timing else named.BLOCKING_SYNC | named.DISABLE_TIMING
        with self._errors():
            event = self._driver.Event(flags)
        self._last_event += 1
        self._events[self._last_event] = event
        return Event(self._last_event)

    def destroy_event(self, event: Event) -> None:
        del self._events[event]

    def record(self, event: Event, stream: Stream) -> None:
        with self._errors():
            if stream in self._streams:
                self._events[event].record(self._streams[stream])
            else:
                # A stream that another library made, of which PyCUDA takes no handle.
                self._driver.Context.synchronize()
                self._events[event].record()

    def wait(self, stream: Stream, event: Event) -> None:
        with self._errors():
            self._streams[stream].wait_for_event(self._events[event])

    def synchronize_event(self, event: Event) -> None:
        with self._errors():
            self._events[event].synchronize()

    def elapsed_ms(self, start: Event, end: Event) -> float:
        with self._errors():
            return float(self._events[start].time_till(self._events[end]))

    def begin_capture(self, stream: Stream) -> None:
        raise EngineError(_NO_CAPTURE)

    def end_capture(self, stream: Stream) -> Graph:
        raise EngineError(_NO_CAPTURE)

    def launch(self, graph: Graph, stream: Stream) -> None:
        raise EngineError(_NO_CAPTURE)

    def destroy_graph(self, graph: Graph) -> None:
        raise EngineError(_NO_CAPTURE)

    def close(self) -> None:
        if self._open:
            self._open = False
            with self._errors():
                self._context.detach()


def open_cuda(name: str | None = None, device: int = 0) -> Cuda:
    """The GPU number ``device`` through the package ``name``.

    ``name``: ``cuda-python`` or ``pycuda``; by default what is installed, cuda-python first.
    RequestError for another name, EngineError when no package is installed, or there is no GPU.
    """
    packages: dict[str, tuple[str, Callable[[int], Cuda]]] = {
        "cuda-python": ("cuda.bindings.runtime", CudaPython),
        "pycuda": ("pycuda.driver", PyCuda),
    }
    if name is not None and name not in packages:
        raise RequestError(
            f"CUDA is reached through {' or '.join(packages)}, and not through {name!r}."
        )
    for package, (module, implementation) in packages.items():
        if name not in (None, package):
            continue
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                continue
            raise EngineError(f"{package} is installed and lacks {error.name}.") from error
        except ImportError as error:
            raise EngineError(
                f"{package} is installed and cannot be loaded ({error}); "
                f"install it again, for the CUDA of this machine."
            ) from error
        return implementation(device)
    raise EngineError(
        f"{name or 'A Python package for CUDA'} is not installed; the TensorRT engine needs it: "
        "`pip install cuda-bindings`, of the major version that `nvidia-smi` shows as CUDA's."
    )


# --- what both implementations say and check

_INSUFFICIENT_DRIVER = 35
_HOST_PORTABLE = 1
_STREAM_NON_BLOCKING = 1

_NO_CAPTURE = (
    "PyCUDA cannot capture CUDA graphs; `pip install cuda-bindings` gives a package that can."
)

_NO_GPU = (
    "No NVIDIA GPU or driver here",
    "`nvidia-smi` shows whether there is one; `--engine openvino` runs on the CPU",
)
_NO_MEMORY = (
    "The GPU has no memory left for this",
    "close other programs that use it, or build for a smaller network size",
)
_LOST = (
    "A kernel failed, and CUDA cannot be used any more in this process",
    "start it again; if that fails too, build the engine anew with `edgeseg build`",
)
# CUDA's name of an error -> what happened, what helps.
_REMEDIES = {
    "cudaErrorNoDevice": _NO_GPU,
    "cudaErrorInsufficientDriver": _NO_GPU,
    "cudaErrorStubLibrary": _NO_GPU,
    "cudaErrorMemoryAllocation": _NO_MEMORY,
    "cudaErrorInitializationError": (
        "CUDA cannot start in this process",
        "a process that was forked after CUDA was used cannot use it: start workers by spawning",
    ),
    "cudaErrorDevicesUnavailable": (
        "The GPU is busy or in exclusive mode",
        "end the other process that has it, which `nvidia-smi` shows",
    ),
    "cudaErrorSystemDriverMismatch": (
        "The driver's parts are of different versions",
        "restart the machine after the driver was updated",
    ),
    "cudaErrorNoKernelImageForDevice": (
        "A kernel is not compiled for this GPU",
        "build the kernels on this machine with `edgeseg kernels build --cuda`",
    ),
    "cudaErrorIllegalAddress": _LOST,
    "cudaErrorMisalignedAddress": _LOST,
    "cudaErrorIllegalInstruction": _LOST,
    "cudaErrorLaunchFailure": _LOST,
    "cudaErrorLaunchTimeout": _LOST,
    "cudaErrorAssert": _LOST,
    "cudaErrorHardwareStackError": _LOST,
    "cudaErrorECCUncorrectable": _LOST,
}
# The driver API's names of the same errors.
_DRIVER_NAMES = {
    "CUDA_ERROR_NO_DEVICE": "cudaErrorNoDevice",
    "CUDA_ERROR_STUB_LIBRARY": "cudaErrorStubLibrary",
    "CUDA_ERROR_OUT_OF_MEMORY": "cudaErrorMemoryAllocation",
    "CUDA_ERROR_NOT_INITIALIZED": "cudaErrorInitializationError",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "cudaErrorDevicesUnavailable",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "cudaErrorSystemDriverMismatch",
}
# PyCUDA's errors have no code, but end with what cuGetErrorString says.
_PYCUDA_WORDS = (
    ("no cuda-capable device", "cudaErrorNoDevice"),
    ("stub library", "cudaErrorStubLibrary"),
    ("out of memory", "cudaErrorMemoryAllocation"),
    ("initialization error", "cudaErrorInitializationError"),
    ("busy or unavailable", "cudaErrorDevicesUnavailable"),
    ("system has unsupported display driver", "cudaErrorSystemDriverMismatch"),
    ("no kernel image", "cudaErrorNoKernelImageForDevice"),
    ("illegal memory access", "cudaErrorIllegalAddress"),
    ("misaligned address", "cudaErrorMisalignedAddress"),
    ("illegal instruction", "cudaErrorIllegalInstruction"),
    ("unspecified launch failure", "cudaErrorLaunchFailure"),
    ("launch timed out", "cudaErrorLaunchTimeout"),
    ("device-side assert", "cudaErrorAssert"),
    ("hardware stack error", "cudaErrorHardwareStackError"),
    ("uncorrectable ecc", "cudaErrorECCUncorrectable"),
)


def _runtime_name(driver_name: str) -> str:
    return _DRIVER_NAMES.get(driver_name, driver_name)


def _sentence(name: str, words: str) -> str:
    """What happened, CUDA's own name and words for it, and the way out where there is one."""
    origin = ": ".join(part for part in (name, words) if part)
    if name not in _REMEDIES:
        return f"CUDA failed ({origin})."
    happened, remedy = _REMEDIES[name]
    return f"{happened} ({origin}); {remedy}."


def _dotted(version: int) -> str:
    """CUDA's 12060 as 12.6."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _check_ordinal(device: int, count: int) -> None:
    if not count:
        raise EngineError(_sentence("cudaErrorNoDevice", "no GPU was found"))
    if not 0 <= device < count:
        raise RequestError(
            f"there is no GPU {device}: {count} found, numbered from 0 to {count - 1}."
            if count > 1
            else f"there is no GPU {device}: one was found, and its number is 0."
        )


def _check_contiguous(array: NDArray[Any], *, written: bool = False) -> None:
    if not array.flags.c_contiguous or (written and not array.flags.writeable):
        raise EngineError(
            f"CUDA copies contiguous{' writable' if written else ''} arrays, and this one of shape "
            f"{array.shape} is none; np.ascontiguousarray makes it one."
        )


def _array_at(address: int, size: int) -> NDArray[np.uint8]:
    """(size,) uint8 over memory that somebody else owns."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
