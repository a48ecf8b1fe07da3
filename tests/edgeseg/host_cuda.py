"""CUDA for tests on a machine without a GPU: device memory is numpy's, streams are queues.

Addresses are real ones, so that kernels compiled for the emulation of CUDA run on them. What is
queued on a stream runs when something waits for it and not before, so that a result which is read
too early is still the poison that fresh memory is filled with. Copies of pageable memory behave as
CUDA's do (they wait), and are counted. What CUDA leaves undefined is an AssertionError here: a call
outside ``current()``, a copy that leaves its allocation, use after free, a forgotten wait at the
end, memory that is never freed.

::

    cuda = HostCuda()
    library = cuda.queueing(emulated_cuda)     # launchers queue on their stream, as on a GPU
    ...
    cuda.assert_all_freed()
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeseg.engine.cuda import Device, Event, Graph, Memory, Stream
from edgeseg.errors import EngineError

POISON = 0xCD
"""What fresh memory is filled with; freed memory is filled with its complement."""

_ALIGNMENT = 256

Work = Callable[[], None]


@dataclass(frozen=True)
class Call:
    """One call of a method, in order."""

    method: str
    arguments: tuple[Any, ...]


@dataclass
class _Record:
    """One recording of an event: ``done_at`` is the clock when it happened."""

    stream: int
    done_at: float | None = None
    capture: _Capture | None = None


@dataclass
class _Capture:
    """What is being captured, from every stream that has joined."""

    origin: int
    work: list[tuple[str, Work]] = field(default_factory=list)
    joined: set[int] = field(default_factory=set)
    failure: str | None = None


@dataclass
class _Queue:
    """What is queued on a stream: a name for the journal, and what to do."""

    work: list[tuple[str, Work]] = field(default_factory=list)
    capture: _Capture | None = None


class HostCuda:
    """``edgeseg.engine.cuda.Cuda`` on the CPU.

    ``calls``: every method called, with its arguments. ``ran``: names of the work that has run, in
    order. ``pageable_copies``: copies from or to memory that is not pinned. ``deferred`` False:
    work runs when it is queued. ``total``: the device's memory in bytes.
    """

    name = "host"

    def __init__(
        self,
        *,
        device: Device | None = None,
        total: int = 1 << 30,
        deferred: bool = True,
        captures: bool = True,
    ) -> None:
        self.device = device or Device(0, "Host", (8, 7), integrated=True)
        self.captures = captures
        self.deferred = deferred
        self.total = total
        self.calls: list[Call] = []
        self.ran: list[str] = []
        self.pageable_copies = 0
        self.closed = False
        self._failures: dict[str, list[EngineError]] = {}
        self._depth = threading.local()
        self._lock = threading.RLock()
        self._device: dict[int, NDArray[np.uint8]] = {}
        self._host: dict[int, NDArray[np.uint8]] = {}
        # Freed memory stays, poisoned: a late write must not take the process down.
        self._freed: list[NDArray[np.uint8]] = []
        self._streams: dict[int, _Queue] = {}
        self._events: dict[int, tuple[bool, _Record | None]] = {}
        self._graphs: dict[int, list[tuple[str, Work]]] = {}
        self._handles = 0x1000
        self._clock = 0.0

    # --- what a test asks and arranges

    def fail(self, method: str, sentence: str) -> None:
        """The next call of ``method`` raises an EngineError with this sentence."""
        self._failures.setdefault(method, []).append(EngineError(sentence))

    def array(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Memory of the device, or pinned, as an array: a view for fakes of kernels."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return self._bytes(address, size).view(kind).reshape(shape)

    def enqueue(self, stream: int, name: str, work: Work) -> None:
        """Queues ``work`` on ``stream``, as a kernel launch or TensorRT does."""
        self._called("enqueue", stream, name)
        self._queue(stream, name, work)

    def queueing(self, library: Any) -> Any:
        """The launchers of an emulated library, which queue on the stream, their last argument.

        Structures that are passed by reference are copied, as a launch does. A launcher's error is
        an AssertionError when the work runs.
        """
        return _Launchers(self, library)

    def named(self, method: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of ``method``, in order."""
        return [call.arguments for call in self.calls if call.method == method]

    @property
    def allocated(self) -> int:
        """Bytes of the device's memory in use."""
        return sum(buffer.nbytes for buffer in self._device.values())

    def assert_all_freed(self) -> None:
        """AssertionError when something created was never destroyed, or work never waited for."""
        left = {
            "allocate": len(self._device),
            "allocate_host": len(self._host),
            "create_stream": len(self._streams),
            "create_event": len(self._events),
            "end_capture": len(self._graphs),
        }
        assert not any(left.values()), f"never ended, of {left}"
        assert self.closed, "close() was never called"

    # --- the protocol

    @contextmanager
    def current(self) -> Iterator[None]:
        assert not self.closed, "current() after close()"
        self._depth.value = getattr(self._depth, "value", 0) + 1
        try:
            yield
        finally:
            self._depth.value -= 1

    def memory(self) -> Memory:
        self._called("memory")
        return Memory(self.total - self.allocated, self.total)

    def allocate(self, size: int) -> int:
        self._called("allocate", size)
        self._refuse_in_capture("cudaMalloc")
        if size > self.total - self.allocated:
            raise EngineError(
                "The GPU has no memory left for this (cudaErrorMemoryAllocation: out of memory)."
            )
        buffer = _aligned(size)
        self._device[buffer.ctypes.data] = buffer
        return buffer.ctypes.data

    def free(self, address: int) -> None:
        self._called("free", address)
        self._refuse_in_capture("cudaFree")
        # cudaFree waits for the whole device.
        for stream in list(self._streams):
            self._drain(stream)
        assert address in self._device, f"free({address:#x}), which allocate() never gave"
        self._bury(self._device.pop(address))

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        self._called("allocate_host", size)
        self._refuse_in_capture("cudaHostAlloc")
        buffer = _aligned(size)
        self._host[buffer.ctypes.data] = buffer
        return buffer

    def free_host(self, array: NDArray[np.uint8]) -> None:
        self._called("free_host", array.ctypes.data)
        self._refuse_in_capture("cudaFreeHost")
        for stream in list(self._streams):
            self._drain(stream)
        address = array.ctypes.data
        assert address in self._host, "free_host() of an array that allocate_host() never gave"
        assert array.nbytes == self._host[address].nbytes, "free_host() of a view"
        self._bury(self._host.pop(address))

    def create_stream(self) -> Stream:
        self._called("create_stream")
        handle = self._handle()
        self._streams[handle] = _Queue()
        return Stream(handle)

    def destroy_stream(self, stream: Stream) -> None:
        self._called("destroy_stream", stream)
        assert self._stream(stream).capture is None, "destroy_stream() during a capture"
        self._drain(stream)
        del self._streams[stream]

    def synchronize(self, stream: Stream) -> None:
        self._called("synchronize", stream)
        capture = self._stream(stream).capture
        if capture is not None:
            capture.failure = "cudaErrorStreamCaptureUnsupported"
            raise EngineError("CUDA failed (cudaErrorStreamCaptureUnsupported).")
        self._drain(stream)

    def copy_to_device(self, address: int, source: NDArray[Any], stream: Stream) -> None:
        self._called("copy_to_device", address, source, stream)
        assert source.flags.c_contiguous, "the source of a copy has to be contiguous"
        target = self._bytes(address, source.nbytes)
        given = source.reshape(-1).view(np.uint8)
        if not self._pinned(source):
            # CUDA takes such memory away before it returns.
            self._pageable(stream)
            given = given.copy()
        self._queue(stream, "copy_to_device", lambda: np.copyto(target, given))

    def copy_to_host(self, target: NDArray[Any], address: int, stream: Stream) -> None:
        self._called("copy_to_host", target, address, stream)
        assert target.flags.c_contiguous, "the target of a copy has to be contiguous"
        assert target.flags.writeable, "the target of a copy has to be writeable"
        source = self._bytes(address, target.nbytes)
        taken = target.reshape(-1).view(np.uint8)
        self._queue(stream, "copy_to_host", lambda: np.copyto(taken, source))
        if not self._pinned(target):
            self._pageable(stream)
            self._drain(stream)

    def create_event(self, *, timing: bool = False) -> Event:
        self._called("create_event", timing)
        handle = self._handle()
        self._events[handle] = (timing, None)
        return Event(handle)

    def destroy_event(self, event: Event) -> None:
        self._called("destroy_event", event)
        self._event(event)
        del self._events[event]

    def record(self, event: Event, stream: Stream) -> None:
        self._called("record", event, stream)
        timing, _ = self._event(event)
        record = _Record(stream, capture=self._stream(stream).capture)
        self._events[event] = (timing, record)

        def happen() -> None:
            record.done_at = self._clock

        self._queue(stream, "record", happen)

    def wait(self, stream: Stream, event: Event) -> None:
        self._called("wait", stream, event)
        queue = self._stream(stream)
        _, record = self._event(event)
        if record is None:
            return  # CUDA takes an event that was never recorded as one that has happened.
        if record.capture is not queue.capture:
            if record.capture is None and queue.capture is not None:
                queue.capture.failure = "cudaErrorStreamCaptureIsolation"
                raise EngineError("CUDA failed (cudaErrorStreamCaptureIsolation).")
            assert queue.capture is None, "a wait between two captures"
            queue.capture = record.capture
        if record.capture is not None:
            if stream == record.capture.origin:
                record.capture.joined.discard(record.stream)
            else:
                record.capture.joined.add(stream)
            return  # captured work stays in the order in which it was queued

        def hold() -> None:
            if record.done_at is None and record.stream in self._streams:
                self._drain(record.stream, until=record)

        self._queue(stream, "wait", hold)

    def synchronize_event(self, event: Event) -> None:
        self._called("synchronize_event", event)
        _, record = self._event(event)
        if record is None:
            return
        if record.capture is not None and record.done_at is None:
            raise EngineError("CUDA failed (cudaErrorCapturedEvent).")
        if record.done_at is None:
            self._drain(record.stream, until=record)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        self._called("elapsed_ms", start, end)
        times = []
        for event in (start, end):
            timing, record = self._event(event)
            if not timing or record is None:
                raise EngineError("CUDA failed (cudaErrorInvalidResourceHandle).")
            if record.done_at is None:
                raise EngineError("CUDA failed (cudaErrorNotReady).")
            times.append(record.done_at)
        return times[1] - times[0]

    def begin_capture(self, stream: Stream) -> None:
        self._called("begin_capture", stream)
        if not self.captures:
            raise EngineError("This package cannot capture CUDA graphs.")
        queue = self._stream(stream)
        if queue.capture is not None:
            raise EngineError("CUDA failed (cudaErrorIllegalState).")
        queue.capture = _Capture(stream)

    def end_capture(self, stream: Stream) -> Graph:
        self._called("end_capture", stream)
        capture = self._stream(stream).capture
        if capture is None:
            raise EngineError("CUDA failed (cudaErrorIllegalState).")
        for queue in self._streams.values():
            if queue.capture is capture:
                queue.capture = None
        if capture.failure is not None:
            raise EngineError("CUDA failed (cudaErrorStreamCaptureInvalidated).")
        if capture.joined:
            raise EngineError("CUDA failed (cudaErrorStreamCaptureUnjoined).")
        handle = self._handle()
        self._graphs[handle] = capture.work
        return Graph(handle)

    def launch(self, graph: Graph, stream: Stream) -> None:
        self._called("launch", graph, stream)
        assert graph in self._graphs, "launch() of a graph that is not there"
        for name, work in self._graphs[graph]:
            self._queue(stream, name, work)

    def destroy_graph(self, graph: Graph) -> None:
        self._called("destroy_graph", graph)
        assert graph in self._graphs, "destroy_graph() of a graph that is not there"
        del self._graphs[graph]

    def close(self) -> None:
        self.closed = True

    # --- how it works

    def _called(self, method: str, *arguments: Any) -> None:
        assert not self.closed, f"{method}() after close()"
        assert getattr(self._depth, "value", 0), f"{method}() outside of current()"
        self.calls.append(Call(method, arguments))
        if self._failures.get(method):
            raise self._failures[method].pop(0)

    def _handle(self) -> int:
        self._handles += 0x10
        return self._handles

    def _stream(self, stream: int) -> _Queue:
        assert stream in self._streams, f"no stream {stream:#x}; the default stream is not used"
        return self._streams[stream]

    def _event(self, event: int) -> tuple[bool, _Record | None]:
        assert event in self._events, f"no event {event:#x}"
        return self._events[event]

    def _queue(self, stream: int, name: str, work: Work) -> None:
        queue = self._stream(stream)
        if queue.capture is not None:
            queue.capture.work.append((name, work))
            return
        with self._lock:
            queue.work.append((name, work))
        if not self.deferred:
            self._drain(stream)

    def _drain(self, stream: int, until: _Record | None = None) -> None:
        """Runs what is queued on a stream, all of it, or until an event has happened."""
        with self._lock:
            queue = self._streams[stream]
            while queue.work and (until is None or until.done_at is None):
                name, work = queue.work.pop(0)
                self._clock += 0.001
                self.ran.append(name)
                work()

    def _refuse_in_capture(self, function: str) -> None:
        capturing = [queue.capture for queue in self._streams.values() if queue.capture]
        for capture in capturing:
            capture.failure = function
        if capturing:
            raise EngineError("CUDA failed (cudaErrorStreamCaptureUnsupported).")

    def _pageable(self, stream: int) -> None:
        self.pageable_copies += 1
        capture = self._stream(stream).capture
        if capture is not None:
            capture.failure = "pageable"
            raise EngineError("CUDA failed (cudaErrorStreamCaptureUnsupported).")

    def _bytes(self, address: int, size: int) -> NDArray[np.uint8]:
        for start, buffer in [*self._device.items(), *self._host.items()]:
            if start <= address and address + size <= start + buffer.nbytes:
                return buffer[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are in no allocation")

    def _pinned(self, array: NDArray[Any]) -> bool:
        address = array.ctypes.data
        return any(
            start <= address and address + array.nbytes <= start + buffer.nbytes
            for start, buffer in self._host.items()
        )

    def _bury(self, buffer: NDArray[np.uint8]) -> None:
        buffer[:] = POISON ^ 0xFF
        self._freed.append(buffer)


class _Launchers:
    """The functions of an emulated CUDA library, run from a queue."""

    def __init__(self, cuda: HostCuda, library: Any) -> None:
        self._cuda = cuda
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def launch(*arguments: Any) -> int:
            *given, stream = (_snapshot(argument) for argument in arguments)
            handle = stream.value if isinstance(stream, ctypes.c_void_p) else stream

            def work() -> None:
                code = function(*given, None)
                assert code == 0, f"{name} returned {code}"

            self._cuda.enqueue(int(handle or 0), name, work)
            return 0

        return launch


def _snapshot(argument: Any) -> Any:
    """A copy of a structure passed by reference; anything else as it is."""
    structure = getattr(argument, "_obj", None)
    if structure is None:
        return argument
    return ctypes.byref(type(structure).from_buffer_copy(structure))


def _aligned(size: int) -> NDArray[np.uint8]:
    """``size`` poisoned bytes at an address divisible by 256."""
    if size <= 0:
        raise EngineError("CUDA failed (cudaErrorInvalidValue: an allocation of no bytes).")
    room = np.full(size + _ALIGNMENT, POISON, np.uint8)
    first = -room.ctypes.data % _ALIGNMENT
    return room[first : first + size]
