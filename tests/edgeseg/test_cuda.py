"""The module of CUDA access: on doubles of cuda-python and PyCUDA, on a GPU where there is one.

The double of cuda-python has the signatures of the real module, which imports without a driver.
The one of PyCUDA is written after its source; PyCUDA itself has run in none of these tests.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeseg.engine import cuda as module
from edgeseg.engine.cuda import Cuda, CudaPython, Device, Memory, PyCuda, open_cuda
from edgeseg.errors import EdgeSegError, EngineError, RequestError
from tests.edgeseg.host_cuda import POISON, Call, HostCuda

METHODS = sorted(
    name
    for name, value in vars(Cuda).items()
    if callable(value) and not name.startswith("_") and name != "name"
)


@pytest.mark.parametrize("implementation", [CudaPython, PyCuda, HostCuda])
def test_implementations_have_the_protocols_signatures(implementation: type) -> None:
    assert len(METHODS) > 20
    for name in METHODS:
        promised = inspect.signature(getattr(Cuda, name))
        found = inspect.signature(getattr(implementation, name))
        assert list(found.parameters.values()) == list(promised.parameters.values()), name
    for name in ("name", "device", "captures"):
        assert isinstance(vars(Cuda)[name], property)


def test_the_host_is_a_cuda() -> None:
    cuda: Cuda = HostCuda()  # for the type checker
    assert cuda.device == Device(0, "Host", (8, 7), integrated=True)
    assert str(cuda.device) == "Host (compute capability 8.7)"


# --- cuda-python


class FakeBindings:
    """A module of ``cuda.bindings`` in which functions record their calls, and never reach CUDA.

    Names, signatures and constants are those of the real module. A function answers with success
    and its entry of ``values``, or the error in ``errors``.
    """

    def __init__(self, real: ModuleType, values: dict[str, Any], calls: list[Any]) -> None:
        self._real = real
        self._success = real.cudaError_t(0) if hasattr(real, "cudaError_t") else real.CUresult(0)
        self.values = values
        self.errors: dict[str, int] = {}
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)  # AttributeError for a name that is not there
        if name not in self.values:
            assert not inspect.isbuiltin(real) and not inspect.isroutine(real), f"{name} not faked"
            return real
        signature = inspect.signature(real)

        def function(*arguments: Any, **keywords: Any) -> tuple[Any, ...]:
            bound = signature.bind(*arguments, **keywords)
            self.calls.append((name, *bound.arguments.values()))
            value = self.values[name]
            code = type(self._success)(self.errors.get(name, 0))
            if value is None:
                return (code,)
            values = value if isinstance(value, tuple) else (value,)
            return (code, *(values if not int(code) else [None] * len(values)))

        return function


RUNTIME = {
    "cudaGetDeviceCount": 1,
    "cudaDriverGetVersion": 13020,
    "cudaRuntimeGetVersion": 13000,
    "cudaGetDeviceProperties": SimpleNamespace(name=b"Orin", major=8, minor=7),
    "cudaDeviceGetAttribute": 1,
    "cudaGetErrorString": b"words",
    "cudaGetLastError": None,
    "cudaMemGetInfo": (3 << 30, 8 << 30),
    "cudaMalloc": 0x7000,
    "cudaFree": None,
    "cudaHostAlloc": 0,
    "cudaFreeHost": None,
    "cudaStreamCreateWithFlags": 0x50,
    "cudaStreamDestroy": None,
    "cudaStreamSynchronize": None,
    "cudaMemcpyAsync": None,
    "cudaEventCreateWithFlags": 0x60,
    "cudaEventDestroy": None,
    "cudaEventRecord": None,
    "cudaStreamWaitEvent": None,
    "cudaEventSynchronize": None,
    "cudaEventElapsedTime": 1.5,
    "cudaStreamBeginCapture": None,
    "cudaStreamEndCapture": 0x70,
    "cudaGraphInstantiate": 0x80,
    "cudaGraphDestroy": None,
    "cudaGraphLaunch": None,
    "cudaGraphExecDestroy": None,
}
DRIVER = {
    "cuInit": None,
    "cuDevicePrimaryCtxRetain": 0x90,
    "cuDevicePrimaryCtxRelease": None,
    "cuCtxPushCurrent": None,
    "cuCtxPopCurrent": 0x90,
}


class Fakes(SimpleNamespace):
    """Both modules, and what was called of them, in order."""

    runtime: FakeBindings
    driver: FakeBindings
    calls: list[Any]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """``cuda.bindings`` with a GPU that does nothing."""
    bindings = pytest.importorskip("cuda.bindings", reason="`pip install cuda-bindings` has it")
    calls: list[Any] = []
    found = Fakes(calls=calls)
    for name, values in (("runtime", RUNTIME), ("driver", DRIVER)):
        real = importlib.import_module(f"cuda.bindings.{name}")
        fake = FakeBindings(real, dict(values), calls)
        monkeypatch.setattr(bindings, name, fake)
        setattr(found, name, fake)
    return found


@pytest.fixture
def opened(fakes: Fakes) -> CudaPython:
    cuda = CudaPython()
    fakes.calls.clear()
    return cuda


def test_opening(fakes: Fakes) -> None:
    cuda = open_cuda("cuda-python")
    from cuda import bindings

    assert isinstance(cuda, CudaPython)
    assert cuda.name == f"cuda-python {bindings.__version__}"
    assert cuda.device == Device(0, "Orin", (8, 7), integrated=True)
    assert cuda.captures
    assert [name for name, *_ in fakes.calls] == [
        "cudaGetDeviceCount",
        "cudaGetDeviceProperties",
        "cudaDeviceGetAttribute",
        "cuInit",
        "cuDevicePrimaryCtxRetain",
    ]
    fakes.calls.clear()
    cuda.close()
    cuda.close()
    assert fakes.calls == [("cuDevicePrimaryCtxRelease", 0)]


def test_calls_of_cuda_python(opened: CudaPython, fakes: Fakes) -> None:
    source, target = np.arange(6, dtype=np.int16), np.zeros((2, 3), np.float32)
    real = fakes.runtime
    to_device = real.cudaMemcpyKind.cudaMemcpyHostToDevice
    to_host = real.cudaMemcpyKind.cudaMemcpyDeviceToHost
    local = real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    with opened.current():
        stream = opened.create_stream()
        address = opened.allocate(12)
        opened.copy_to_device(address, source, stream)
        start, end = opened.create_event(timing=True), opened.create_event()
        opened.record(start, stream)
        opened.wait(stream, end)
        opened.copy_to_host(target, address + 4, stream)
        opened.synchronize_event(end)
        assert opened.elapsed_ms(start, end) == 1.5
        opened.synchronize(stream)
        opened.begin_capture(stream)
        graph = opened.end_capture(stream)
        opened.launch(graph, stream)
        opened.destroy_graph(graph)
        opened.destroy_event(end)
        opened.destroy_stream(stream)
        opened.free(address)
        assert opened.memory() == Memory(3 << 30, 8 << 30)
    assert fakes.calls == [
        ("cuCtxPushCurrent", 0x90),
        ("cudaStreamCreateWithFlags", 1),  # cudaStreamNonBlocking
        ("cudaMalloc", 12),
        ("cudaMemcpyAsync", 0x7000, source.ctypes.data, 12, to_device, 0x50),
        ("cudaEventCreateWithFlags", 1),  # cudaEventBlockingSync
        ("cudaEventCreateWithFlags", 3),  # and cudaEventDisableTiming
        ("cudaEventRecord", 0x60, 0x50),
        ("cudaStreamWaitEvent", 0x50, 0x60, 0),
        ("cudaMemcpyAsync", target.ctypes.data, 0x7004, 24, to_host, 0x50),
        ("cudaEventSynchronize", 0x60),
        ("cudaEventElapsedTime", 0x60, 0x60),
        ("cudaStreamSynchronize", 0x50),
        ("cudaStreamBeginCapture", 0x50, local),
        ("cudaStreamEndCapture", 0x50),
        ("cudaGraphInstantiate", 0x70, 0),
        ("cudaGraphDestroy", 0x70),
        ("cudaGraphLaunch", 0x80, 0x50),
        ("cudaGraphExecDestroy", 0x80),
        ("cudaEventDestroy", 0x60),
        ("cudaStreamDestroy", 0x50),
        ("cudaFree", 0x7000),
        ("cudaMemGetInfo",),
        ("cuCtxPopCurrent",),
    ]


def test_pinned_memory_of_cuda_python(opened: CudaPython, fakes: Fakes) -> None:
    memory = np.arange(16, dtype=np.uint8)
    fakes.runtime.values["cudaHostAlloc"] = memory.ctypes.data
    array = opened.allocate_host(16)
    assert array.dtype == np.uint8
    assert (array.shape, array.ctypes.data) == ((16,), memory.ctypes.data)
    array[3] = 200
    assert memory[3] == 200 and array.flags.c_contiguous and array.flags.writeable
    opened.free_host(array)
    assert fakes.calls == [("cudaHostAlloc", 16, 1), ("cudaFreeHost", memory.ctypes.data)]


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "memory": (),
    "allocate": (16,),
    "free": (0x7000,),
    "allocate_host": (16,),
    "free_host": (np.zeros(4, np.uint8),),
    "create_stream": (),
    "destroy_stream": (0x50,),
    "synchronize": (0x50,),
    "copy_to_device": (0x7000, np.zeros(4, np.uint8), 0x50),
    "copy_to_host": (np.zeros(4, np.uint8), 0x7000, 0x50),
    "create_event": (),
    "destroy_event": (0x60,),
    "record": (0x60, 0x50),
    "wait": (0x50, 0x60),
    "synchronize_event": (0x60,),
    "elapsed_ms": (0x60, 0x61),
    "begin_capture": (0x50,),
    "end_capture": (0x50,),
    "launch": (0x80, 0x50),
    "destroy_graph": (0x80,),
}


@pytest.mark.parametrize("method", sorted({*METHODS} - {"current", "close"}))
def test_the_real_module_takes_our_arguments(method: str) -> None:
    # Without a driver each function looks at its arguments and then gives an error.
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU here, on which these handles must not be used")
    cuda = object.__new__(CudaPython)
    cuda._runtime, cuda._driver = runtime, importlib.import_module("cuda.bindings.driver")
    with pytest.raises(EngineError, match=r"\(cudaError\w+: "):
        getattr(cuda, method)(*ARGUMENTS[method])


def test_context_is_restored_after_an_error(opened: CudaPython, fakes: Fakes) -> None:
    with pytest.raises(KeyError), opened.current():
        raise KeyError
    assert [name for name, *_ in fakes.calls] == ["cuCtxPushCurrent", "cuCtxPopCurrent"]


CALLS: dict[str, Callable[[Cuda], object]] = {
    "cudaMalloc": lambda cuda: cuda.allocate(5),
    "cudaHostAlloc": lambda cuda: cuda.allocate_host(5),
    "cudaStreamSynchronize": lambda cuda: cuda.synchronize(module.Stream(1)),
    "cudaMemGetInfo": lambda cuda: cuda.memory(),
    "cudaEventElapsedTime": lambda cuda: cuda.elapsed_ms(module.Event(1), module.Event(2)),
    "cudaStreamEndCapture": lambda cuda: cuda.end_capture(module.Stream(1)),
    "cudaGraphInstantiate": lambda cuda: cuda.end_capture(module.Stream(1)),
    "cudaGraphLaunch": lambda cuda: cuda.launch(module.Graph(1), module.Stream(1)),
}


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        (2, "cudaErrorMemoryAllocation", "no memory left for this"),
        (46, "cudaErrorDevicesUnavailable", "busy or in exclusive mode"),
        (700, "cudaErrorIllegalAddress", "cannot be used any more in this process"),
        (719, "cudaErrorLaunchFailure", "start it again"),
        (901, "cudaErrorStreamCaptureInvalidated", "CUDA failed"),
    ],
)
def test_errors_of_cuda_python(
    opened: CudaPython, fakes: Fakes, function: str, code: int, name: str, words: str
) -> None:
    fakes.runtime.errors[function] = code
    with pytest.raises(EngineError) as caught:
        CALLS[function](opened)
    assert f"({name}: words)" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)
    # No later launch is blamed for it.
    assert ("cudaGetLastError",) in fakes.calls
    if function == "cudaGraphInstantiate":
        assert fakes.calls[-1] == ("cudaGraphDestroy", 0x70)


def test_errors_of_the_driver(fakes: Fakes) -> None:
    fakes.driver.errors["cuDevicePrimaryCtxRetain"] = 2
    with pytest.raises(EngineError, match=r"no memory left.*cudaErrorMemoryAllocation"):
        CudaPython()
    fakes.driver.errors["cuDevicePrimaryCtxRetain"] = 216
    with pytest.raises(EngineError, match="CUDA_ERROR_CONTEXT_ALREADY_IN_USE"):
        CudaPython()


@pytest.mark.parametrize(
    ("driver", "package", "sentence"),
    [
        (0, 13000, "No NVIDIA GPU or driver here (cudaErrorInsufficientDriver"),
        (12060, 13000, "is for CUDA 13.0 and the driver here for CUDA 12.6"),
    ],
)
def test_driver_that_is_missing_or_old(
    fakes: Fakes, driver: int, package: int, sentence: str
) -> None:
    fakes.runtime.errors["cudaGetDeviceCount"] = 35
    fakes.runtime.values["cudaDriverGetVersion"] = driver
    fakes.runtime.values["cudaRuntimeGetVersion"] = package
    with pytest.raises(EngineError) as caught:
        CudaPython()
    assert sentence in str(caught.value)
    assert ("pip install 'cuda-bindings<13'" in str(caught.value)) is bool(driver)


@pytest.mark.parametrize(
    ("count", "device", "error", "sentence"),
    [
        (0, 0, EngineError, "No NVIDIA GPU or driver here (cudaErrorNoDevice: no GPU was found)"),
        (1, 1, RequestError, "no GPU 1: one was found, and its number is 0"),
        (2, 2, RequestError, "no GPU 2: 2 found, numbered from 0 to 1"),
        (1, -1, RequestError, "no GPU -1"),
    ],
)
def test_gpu_that_is_not_there(
    fakes: Fakes, count: int, device: int, error: type[EdgeSegError], sentence: str
) -> None:
    fakes.runtime.values["cudaGetDeviceCount"] = count
    with pytest.raises(error) as caught:
        open_cuda("cuda-python", device)
    assert sentence in str(caught.value)


def test_machine_without_a_gpu() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU here")
    with pytest.raises(EngineError) as caught:
        open_cuda()
    assert "NVIDIA GPU or driver here (cudaError" in str(caught.value) or (
        "the driver here for CUDA" in str(caught.value)
    )


# --- which package


def block(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Makes packages look as if they were not installed."""
    real = importlib.import_module

    def denied(name: str, package: str | None = None) -> ModuleType:
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", denied)


@pytest.mark.parametrize("name", [None, "cuda-python", "pycuda"])
def test_no_package(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    block(monkeypatch, "cuda", "pycuda")
    with pytest.raises(EngineError, match=r"is not installed; .*`pip install cuda-bindings`"):
        open_cuda(name)


def test_package_of_another_name() -> None:
    with pytest.raises(RequestError, match="cuda-python or pycuda, and not through 'cupy'"):
        open_cuda("cupy")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ImportError("libcudart.so.13"), r"cannot be loaded \(libcudart\.so\.13\)"),
        (ModuleNotFoundError("x", name="cuda.pathfinder"), r"lacks cuda\.pathfinder"),
    ],
)
def test_package_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, sentence: str
) -> None:
    def broken(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EngineError, match=f"cuda-python is installed and {sentence}"):
        open_cuda()


# --- PyCUDA


class FakePyCuda:
    """``pycuda.driver`` with a GPU made of host memory, after its source (see PyCuda).

    ``stack``: contexts pushed. Handles count, so that what is forgotten shows in ``alive``.
    """

    def __init__(self) -> None:
        driver = self
        self.alive: list[str] = []
        self.stack: list[Any] = []
        self.log: list[tuple[Any, ...]] = []
        self.device_count = 1
        self.Error = type("Error", (Exception,), {})
        self.MemoryError = type("MemoryError", (self.Error,), {})
        self.event_flags = SimpleNamespace(DEFAULT=0, BLOCKING_SYNC=1, DISABLE_TIMING=2)
        self.host_alloc_flags = SimpleNamespace(PORTABLE=1)
        self.device_attribute = SimpleNamespace(INTEGRATED="integrated")
        self.fail: str | None = None

        class Handle:
            kind = ""

            def __init__(self) -> None:
                assert driver.stack, f"{self.kind} outside of a context"
                driver.alive.append(self.kind)

            def __del__(self) -> None:
                if self.kind in driver.alive:
                    driver.alive.remove(self.kind)

        class Stream(Handle):
            kind = "stream"

            def __init__(self, flags: int = 0) -> None:
                super().__init__()
                driver.log.append(("Stream", flags))
                self.handle = 0x50

            def synchronize(self) -> None:
                driver.log.append(("synchronize",))

            def wait_for_event(self, event: Event) -> None:
                assert isinstance(event, Event)
                driver.log.append(("wait_for_event",))

        # No property ``handle``: PyCUDA has none.
        class Event(Handle):
            kind = "event"

            def __init__(self, flags: int = 0) -> None:
                super().__init__()
                driver.log.append(("Event", flags))

            def record(self, stream: Stream | None = None) -> Event:
                driver.log.append(("record",) if stream else ("record on the default stream",))
                return self

            def synchronize(self) -> Event:
                driver.log.append(("event synchronize",))
                return self

            def time_till(self, event: Event) -> float:
                assert isinstance(event, Event)
                return 2.5

        class Allocation(Handle):
            def __init__(self, kind: str, size: int) -> None:
                self.kind = kind
                super().__init__()
                self.memory = np.zeros(size, np.uint8)

            def __int__(self) -> int:
                return self.memory.ctypes.data

            def free(self) -> None:
                driver.alive.remove(self.kind)
                self.kind = ""

        class Context:
            def push(self) -> None:
                driver.stack.append(self)

            @staticmethod
            def pop() -> None:
                driver.stack.pop()

            def detach(self) -> None:
                driver.log.append(("detach",))

            @staticmethod
            def synchronize() -> None:
                driver.log.append(("everything",))

        class FakeDevice:
            def __init__(self, number: int) -> None:
                self.number = number

            @staticmethod
            def count() -> int:
                return driver.device_count

            def name(self) -> str:
                return "Xavier"

            def compute_capability(self) -> tuple[int, int]:
                return 7, 2

            def get_attribute(self, attribute: str) -> int:
                return int(attribute == "integrated")

            def retain_primary_context(self) -> Context:
                return Context()

        self.Stream, self.Event, self.Context, self.Device = Stream, Event, Context, FakeDevice
        self._allocation = Allocation

    def init(self, flags: int = 0) -> None:
        self._failing()

    def _failing(self) -> None:
        if self.fail is not None:
            raise self.Error(self.fail)

    def mem_get_info(self) -> tuple[int, int]:
        self._failing()
        return 1 << 20, 1 << 30

    def mem_alloc(self, bytes: int) -> Any:
        self._failing()
        return self._allocation("device", bytes)

    def pagelocked_empty(self, shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        self._failing()
        allocation = self._allocation("host", shape)

        # The array's base is the allocation, as in PyCUDA.
        class Owned:
            __array_interface__ = allocation.memory.__array_interface__
            free = allocation.free

        self.log.append(("pagelocked_empty", mem_flags))
        return np.asarray(Owned())

    def memcpy_htod_async(self, dest: int, src: Any, stream: Any = None) -> None:
        assert isinstance(stream, self.Stream)
        ctypes.memmove(dest, src.ctypes.data, src.nbytes)

    def memcpy_dtoh_async(self, dest: Any, src: int, stream: Any = None) -> None:
        assert isinstance(stream, self.Stream)
        ctypes.memmove(dest.ctypes.data, src, dest.nbytes)


@pytest.fixture
def fake_pycuda(monkeypatch: pytest.MonkeyPatch) -> FakePyCuda:
    """``pycuda.driver`` on host memory, in the place of the real one."""
    driver = FakePyCuda()
    package = ModuleType("pycuda")
    package.VERSION_TEXT = "2026.1"  # type: ignore[attr-defined]
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    return driver


def test_pycuda(fake_pycuda: FakePyCuda) -> None:
    cuda = open_cuda("pycuda")
    assert isinstance(cuda, PyCuda)
    assert (cuda.name, cuda.device) == ("pycuda 2026.1", Device(0, "Xavier", (7, 2), True))
    with cuda.current():
        stream = cuda.create_stream()
        address = cuda.allocate(12)
        host = cuda.allocate_host(12)
        assert host.dtype == np.uint8 and host.shape == (12,)
        host[:] = np.arange(12)
        cuda.copy_to_device(address, host, stream)
        target = np.zeros(3, np.int32)
        cuda.copy_to_host(target, address, stream)
        assert target.tobytes() == bytes(range(12))
        start, end = cuda.create_event(timing=True), cuda.create_event()
        assert start != end
        cuda.record(start, stream)
        cuda.wait(stream, start)
        cuda.synchronize_event(start)
        assert cuda.elapsed_ms(start, end) == 2.5
        cuda.synchronize(stream)
        assert cuda.memory() == Memory(1 << 20, 1 << 30)
        assert sorted(fake_pycuda.alive) == ["device", "event", "event", "host", "stream"]
        cuda.free(address)
        cuda.free_host(host)
        cuda.destroy_event(start)
        cuda.destroy_event(end)
        cuda.destroy_stream(stream)
        assert fake_pycuda.alive == []
    assert fake_pycuda.stack == []
    cuda.close()
    cuda.close()
    assert fake_pycuda.log == [
        ("Stream", 1),
        ("pagelocked_empty", 1),
        ("Event", 1),  # BLOCKING_SYNC
        ("Event", 3),  # and DISABLE_TIMING
        ("record",),
        ("wait_for_event",),
        ("event synchronize",),
        ("synchronize",),
        ("detach",),
    ]


def test_pycuda_waits_for_everything_on_a_stream_that_is_not_its_own(
    fake_pycuda: FakePyCuda,
) -> None:
    cuda = open_cuda("pycuda")
    with cuda.current():
        event = cuda.create_event()
        cuda.record(event, module.Stream(1))
        cuda.synchronize(module.Stream(2))
        cuda.destroy_event(event)
    cuda.close()
    assert fake_pycuda.log[1:-1] == [
        ("everything",),
        ("record on the default stream",),
        ("everything",),
    ]


def test_pycuda_cannot_capture(fake_pycuda: FakePyCuda) -> None:
    cuda = open_cuda("pycuda")
    assert not cuda.captures
    with cuda.current():
        stream = cuda.create_stream()
        for call in (
            lambda: cuda.begin_capture(stream),
            lambda: cuda.end_capture(stream),
            lambda: cuda.launch(module.Graph(1), stream),
            lambda: cuda.destroy_graph(module.Graph(1)),
        ):
            with pytest.raises(EngineError, match="cannot capture CUDA graphs"):
                call()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cuMemAlloc failed: out of memory", "no memory left for this (cudaErrorMemoryAllocation"),
        ("cuInit failed: no CUDA-capable device is detected", "(cudaErrorNoDevice: cuInit failed"),
        ("cuX failed: an illegal memory access was encountered", "(cudaErrorIllegalAddress: cuX"),
        ("cuX failed: something new", "CUDA failed (cuX failed: something new)."),
    ],
)
def test_errors_of_pycuda(fake_pycuda: FakePyCuda, text: str, sentence: str) -> None:
    cuda = open_cuda("pycuda")
    fake_pycuda.fail = text
    with cuda.current(), pytest.raises(EngineError) as caught:
        cuda.allocate(4)
    assert sentence in str(caught.value)
    with pytest.raises(EngineError):
        open_cuda("pycuda")
    assert fake_pycuda.stack == []


def test_cuda_python_comes_first(
    fake_pycuda: FakePyCuda, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_cuda(), CudaPython)
    block(monkeypatch, "cuda")
    assert isinstance(open_cuda(), PyCuda)


# --- what every implementation checks


@pytest.fixture(params=["cuda-python", "pycuda"])
def either(request: pytest.FixtureRequest, fake_pycuda: FakePyCuda, fakes: Fakes) -> Cuda:
    return open_cuda(request.param)


def test_arrays_that_cannot_be_copied(either: Cuda) -> None:
    with either.current():
        stream = either.create_stream()
        columns = np.zeros((4, 4), np.uint8)[:, ::2]
        frozen = np.zeros(4, np.uint8)
        frozen.flags.writeable = False
        with pytest.raises(EngineError, match=r"of shape \(4, 2\) is none"):
            either.copy_to_device(0x7000, columns, stream)
        with pytest.raises(EngineError, match="contiguous writable arrays"):
            either.copy_to_host(frozen, 0x7000, stream)


# --- the host in CUDA's place


@pytest.fixture
def host() -> Iterator[HostCuda]:
    cuda = HostCuda()
    with cuda.current():
        yield cuda


def test_work_waits_until_it_is_waited_for(host: HostCuda) -> None:
    stream = host.create_stream()
    address = host.allocate(4)
    there, back = host.allocate_host(4), host.allocate_host(4)
    there[:] = [1, 2, 3, 4]
    host.copy_to_device(address, there, stream)
    host.copy_to_host(back, address, stream)
    assert host.array(address, (4,), np.uint8).tolist() == [POISON] * 4
    assert back.tolist() == [POISON] * 4
    there[0] = 9  # too early: the copy has not begun
    host.synchronize(stream)
    assert back.tolist() == [9, 2, 3, 4]
    assert host.ran == ["copy_to_device", "copy_to_host"]
    assert host.pageable_copies == 0


def test_pageable_memory_waits_as_in_cuda(host: HostCuda) -> None:
    stream = host.create_stream()
    address = host.allocate(4)
    there, back = np.arange(4, dtype=np.uint8), np.zeros(4, np.uint8)
    host.copy_to_device(address, there, stream)
    there[:] = 0
    host.copy_to_host(back, address, stream)
    assert back.tolist() == [0, 1, 2, 3]
    assert host.pageable_copies == 2


def test_events_order_two_streams(host: HostCuda) -> None:
    order: list[str] = []
    first, second = host.create_stream(), host.create_stream()
    start, done = host.create_event(timing=True), host.create_event(timing=True)
    host.enqueue(first, "a", lambda: order.append("a"))
    host.record(start, first)
    host.enqueue(first, "b", lambda: order.append("b"))
    host.wait(second, start)
    host.enqueue(second, "c", lambda: order.append("c"))
    host.record(done, second)
    with pytest.raises(EngineError, match="cudaErrorNotReady"):
        host.elapsed_ms(start, done)
    host.synchronize_event(done)
    assert order == ["a", "c"]  # b is behind the event
    assert host.elapsed_ms(start, done) > 0
    host.synchronize(first)
    assert order == ["a", "c", "b"]


def test_launchers_queue_and_keep_their_structures(host: HostCuda) -> None:
    class Sizes(ctypes.Structure):
        _fields_ = (("count", ctypes.c_int),)

    def write(sizes: Any, address: int, stream: int | None) -> int:
        ctypes.memset(address, 7, sizes.contents.count)
        return 0

    pointer = ctypes.c_void_p
    fill = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Sizes), pointer, pointer)(write)
    library = host.queueing(SimpleNamespace(fill=fill, refuse=lambda *_: 1))
    stream = host.create_stream()
    address = host.allocate(4)
    sizes = Sizes(2)
    assert library.fill(ctypes.byref(sizes), address, stream) == 0
    sizes.count = 100  # a launch has its own copy
    assert host.array(address, (4,), np.uint8)[0] == POISON
    host.synchronize(stream)
    assert host.array(address, (4,), np.uint8).tolist() == [7, 7, POISON, POISON]
    library.refuse(stream)
    with pytest.raises(AssertionError, match="refuse returned 1"):
        host.synchronize(stream)


def test_capture_and_replay(host: HostCuda) -> None:
    stream, side = host.create_stream(), host.create_stream()
    fork, join = host.create_event(), host.create_event()
    ran: list[str] = []
    host.begin_capture(stream)
    host.enqueue(stream, "a", lambda: ran.append("a"))
    host.record(fork, stream)
    host.wait(side, fork)
    host.enqueue(side, "b", lambda: ran.append("b"))
    host.record(join, side)
    host.wait(stream, join)
    graph = host.end_capture(stream)
    host.synchronize(stream)
    assert ran == []
    for _ in range(2):
        host.launch(graph, stream)
    host.synchronize(stream)
    assert ran == ["a", "b", "a", "b"]
    host.destroy_graph(graph)


def captured(host: HostCuda, call: Callable[[module.Stream], object]) -> str:
    """What ``end_capture`` says after ``call`` during a capture."""
    stream = host.create_stream()
    host.begin_capture(stream)
    with suppress(EngineError):
        call(stream)
    with pytest.raises(EngineError) as caught:
        host.end_capture(stream)
    host.synchronize(stream)  # a normal stream again
    return str(caught.value)


def test_what_cannot_be_captured(host: HostCuda) -> None:
    address = host.allocate(4)
    other, event = host.create_stream(), host.create_event()
    host.record(event, other)
    inside = host.create_event()

    def fork(stream: module.Stream) -> None:
        host.record(inside, stream)
        host.wait(other, inside)

    pageable = np.zeros(4, np.uint8)
    for call in (
        host.synchronize,
        lambda stream: host.allocate(4),
        lambda stream: host.allocate_host(4),
        lambda stream: host.free(address),
        lambda stream: host.copy_to_device(address, pageable, stream),
        lambda stream: host.wait(stream, event),
    ):
        assert "Invalidated" in captured(host, call)
    assert "Unjoined" in captured(host, fork)
    with pytest.raises(EngineError, match="IllegalState"):
        host.end_capture(other)


def test_what_cuda_leaves_undefined(host: HostCuda) -> None:
    stream = host.create_stream()
    address = host.allocate(4)
    pinned = host.allocate_host(4)
    cases: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: host.copy_to_device(address + 1, pinned, stream), "are in no allocation"),
        (lambda: host.copy_to_device(address, pinned, module.Stream(0)), "default stream"),
        (lambda: host.free(address + 1), r"never gave"),
        (lambda: host.free_host(pinned[:2]), "of a view"),
        (lambda: host.record(module.Event(3), stream), "no event"),
        (lambda: host.launch(module.Graph(3), stream), "a graph that is not there"),
    )
    for call, words in cases:
        with pytest.raises(AssertionError, match=words):
            call()
    host.free(address)
    with pytest.raises(AssertionError, match="are in no allocation"):
        host.copy_to_device(address, pinned, stream)


def test_calls_outside_of_current() -> None:
    cuda = HostCuda()
    with pytest.raises(AssertionError, match="outside of current"):
        cuda.create_stream()
    with cuda.current():
        failures: list[BaseException] = []

        def elsewhere() -> None:
            try:
                cuda.create_stream()
            except AssertionError as error:
                failures.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(failures) == 1


def test_what_is_left_over(host: HostCuda) -> None:
    stream = host.create_stream()
    with pytest.raises(AssertionError, match="'create_stream': 1"):
        host.assert_all_freed()
    host.destroy_stream(stream)
    with pytest.raises(AssertionError, match="close"):
        host.assert_all_freed()
    host.close()
    host.assert_all_freed()


def test_memory_of_the_host_is_limited() -> None:
    cuda = HostCuda(total=1000)
    with cuda.current():
        first = cuda.allocate(600)
        assert (cuda.memory(), cuda.allocated, first % 256) == (Memory(400, 1000), 600, 0)
        with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
            cuda.allocate(401)
        cuda.free(first)
        assert cuda.memory() == Memory(1000, 1000)


def test_failures_that_a_test_arranges(host: HostCuda) -> None:
    host.fail("allocate", "no memory today")
    with pytest.raises(EngineError, match="no memory today"):
        host.allocate(4)
    host.allocate(4)
    assert host.named("allocate") == [(4,), (4,)]
    assert host.calls[-1] == Call("allocate", (4,))


# --- a GPU


@pytest.mark.gpu
def test_round_trip_on_a_gpu() -> None:
    try:
        cuda = open_cuda()
    except EngineError as error:
        pytest.skip(str(error))
    with cuda.current():
        before = cuda.memory()
        assert 0 < before.free <= before.total
        stream = cuda.create_stream()
        size = 1 << 20
        there, back = cuda.allocate_host(size), cuda.allocate_host(size)
        address = cuda.allocate(size)
        assert address % 256 == 0
        start, end = cuda.create_event(timing=True), cuda.create_event(timing=True)
        there[:] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        back[:] = POISON
        cuda.record(start, stream)
        cuda.copy_to_device(address, there, stream)
        cuda.copy_to_host(back, address, stream)
        cuda.record(end, stream)
        cuda.synchronize_event(end)
        assert np.array_equal(there, back)
        assert cuda.elapsed_ms(start, end) > 0
        if cuda.captures:
            cuda.begin_capture(stream)
            cuda.copy_to_device(address, there, stream)
            cuda.copy_to_host(back, address, stream)
            graph = cuda.end_capture(stream)
            there[:] = ~there
            cuda.launch(graph, stream)
            cuda.synchronize(stream)
            assert np.array_equal(there, back)
            cuda.destroy_graph(graph)
            # A capture that cannot be a graph leaves a stream that works.
            cuda.begin_capture(stream)
            with pytest.raises(EngineError, match="cudaErrorStreamCapture"):
                cuda.synchronize(stream)
            with pytest.raises(EngineError, match="cudaErrorStreamCapture"):
                cuda.end_capture(stream)
        cuda.synchronize(stream)
        with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
            cuda.allocate(before.total * 4)
        for event in (start, end):
            cuda.destroy_event(event)
        cuda.destroy_stream(stream)
        cuda.free(address)
        cuda.free_host(there)
        cuda.free_host(back)
    cuda.close()
