"""TensorRT: the engine for NVIDIA GPUs, Jetson boards above all.

A frame's way, with two frames inside::

    slot 0    upload, fit                    download | upload, fit
    compute              network of frame 0 | network of frame 1 | network of frame 2
    slot 1                upload, fit                            download | upload, fit

Each slot has a stream, memory and events of its own. The network runs in one stream for all, since
all slots share one execution context and its memory; it is captured as a CUDA graph, one per slot.
Upload and fit stay outside the graph: their addresses and sizes come with the frame, so that
frames of another size need no new graph, and a frame on the GPU is read where it is.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np

from edgeseg.bundle import Bundle
from edgeseg.engine.base import Pending, Prepared
from edgeseg.engine.build import BuildOptions, NoPlan, build_plan, find_plan, load_plugins
from edgeseg.engine.cuda import Cuda, Graph, Stream, open_cuda
from edgeseg.engine.device_frame import DeviceFrame, DevicePixels
from edgeseg.engine.head import checked_input, taken_instances
from edgeseg.engine.log import listening, tidy
from edgeseg.engine.slot import Slot, SlotOutput, Tensor
from edgeseg.errors import EngineError, FrameError, RequestError
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.kernels import launchers
from edgeseg.kernels.build import find_cuda_library, find_plugin_library
from edgeseg.progress import progress
from edgeseg.result import AnyOutputs, Outputs
from edgeseg.spec import ModelSpec

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["FrameFitter", "Loading", "TensorRtEngine", "open_engine", "tensorrt_version"]

_INPUT = "image"

# One computes while the other is filled or emptied; more would only make masks older.
_FRAMES_IN_FLIGHT = 2

# What TensorRT reports can be a page; a sentence has room for this much, in characters.
_REPORT = 400

_Thing = TypeVar("_Thing")


class FrameFitter(Protocol):
    """What the engine calls of the library that ``launchers.open_library`` opens."""

    def edgeseg_cuda_fit_frame(self, frame: Any, fit: Any, image: int, stream: int) -> int:
        """Queues the fit; see launchers.h."""


@dataclass(frozen=True)
class Loading:
    """What has to be said before a plan is loaded.

    ``carries_code``: the plan brings a runtime of its own (``VERSION_COMPATIBLE``), which is code
    that the process runs. ``dla``: the DLA core that it was built for, None for the GPU alone.
    """

    carries_code: bool = False
    dla: int | None = None


class TensorRtEngine:
    """One plan on one GPU.

    ``plan``: what the builder wrote, for this version of TensorRT and this GPU; ``where`` it is
    from, for messages. ``cuda``: the GPU; the engine closes it, also when it cannot be opened.
    ``fitter``: the CUDA library, or None to fit frames on the CPU. ``built``: how the plan was
    built, for the description.

    EngineError when TensorRT refuses the plan, the plan is not of ``spec``, or memory is short.
    """

    name = "tensorrt"

    def __init__(
        self,
        plan: bytes,
        spec: ModelSpec,
        cuda: Cuda,
        *,
        where: str = "the plan",
        loading: Loading = Loading(),
        fitter: FrameFitter | None = None,
        built: Sequence[str] = (),
        frames_in_flight: int = _FRAMES_IN_FLIGHT,
    ) -> None:
        if frames_in_flight < 1:
            raise RequestError(f"frames in flight are 1 or more, and {frames_in_flight} came")
        self._spec = spec
        self._cuda = cuda
        self._where = where
        self._fitter = fitter
        self._built = tuple(built)
        self._closed = False
        self._lock = threading.Lock()
        self._slots: list[Slot] = []
        self._free: deque[Slot] = deque()
        self._resources = ExitStack()
        try:
            with cuda.current():
                self._loaded = self._owned(_Loaded(plan, loading, spec, where, cuda), _Loaded.close)
                self._network = self._owned(_Network(self._loaded), _Network.close)
                self._compute = self._owned(cuda.create_stream(), cuda.destroy_stream)
                for _ in range(frames_in_flight):
                    slot = Slot(cuda, spec, self._network.outputs, self._owned)
                    self._slots.append(slot)
                self._no_fit = self._tried_fit()
                self._no_graph = self._capture_all()
        except BaseException:
            self.close()
            raise
        self._free.extend(self._slots)

    @property
    def spec(self) -> ModelSpec:
        """The contract of the graph."""
        return self._spec

    @property
    def frames_in_flight(self) -> int:
        """How many frames may be submitted whose outputs nobody has taken yet."""
        return len(self._slots)

    @property
    def description(self) -> str:
        """One line: library, version, device, how the plan was built, and how frames run in it."""
        import tensorrt as trt

        fit = "frames fitted on the GPU"
        if self._no_fit is not None:
            fit = f"frames fitted on the CPU ({self._no_fit})"
        graph = "CUDA graph" if self._no_graph is None else f"no CUDA graph ({self._no_graph})"
        parts = (f"TensorRT {trt.__version__}", self._cuda.device.name, *self._built, fit, graph)
        return ", ".join(parts)

    def run(self, pixels: Pixels) -> AnyOutputs:
        """See ``Engine.run``."""
        return self.submit(Prepared(pixels)).outputs()

    def prepare(self, frame: Frame, geometry: Geometry) -> Prepared:
        """See ``Engine.prepare``."""
        if self._no_fit is not None:
            return Prepared(geometry.fit(frame.pixels))
        if isinstance(frame, DeviceFrame):
            return Prepared(frame.device, geometry)
        return Prepared(frame.pixels, None if _changes_nothing(geometry) else geometry)

    def submit(self, prepared: Prepared) -> Pending:
        """See ``Engine.submit``.

        A numpy array has been read when it returns; a frame on the GPU must stay as it is until
        the outputs are there.
        """
        slot = self._take()
        try:
            with self._cuda.current():
                try:
                    self._queue(slot, prepared)
                except BaseException:
                    # What was queued before it went wrong still uses the slot.
                    self._settle(slot)
                    raise
        except BaseException:
            self._give_back(slot)
            raise
        return _InFlight(self, slot)

    def layer_times(self, images: Sequence[Pixels]) -> list[tuple[str, float]]:
        """Name and median milliseconds of each layer of the plan, in the order in which they run.

        ``images``: network inputs, (height, width, 3) uint8 BGR each; the first is run once more
        to warm up. Layers are timed one by one, in an execution context of its own and without the
        CUDA graph, so that their sum is more than the network takes. No frame may be in flight.
        FrameError for other images, EngineError when memory is short.
        """
        if not images:
            raise RequestError("layers are timed on one image or more, and none came")
        checked = [checked_input(image, self._spec)[0] for image in images]
        with self._lock:
            if self._closed or len(self._free) < len(self._slots):
                raise RequestError("layers are timed while no frame is in flight; take their masks")
        slot = self._take()
        try:
            with self._cuda.current():
                try:
                    return self._profile(slot, checked)
                finally:
                    self._settle(slot)
        finally:
            self._give_back(slot)

    def close(self) -> None:
        """Gives the GPU's memory back; frames that are inside are waited for, and lost."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._free.clear()
        with ExitStack() as current:
            # An error of CUDA that stays was told where it came up. Everything is still ended.
            with suppress(EngineError):
                current.enter_context(self._cuda.current())
            for slot in self._slots:
                self._settle(slot)
            self._resources.close()
        with suppress(EngineError):
            self._cuda.close()

    # --- opening

    def _owned(self, thing: _Thing, end: Callable[[_Thing], object]) -> _Thing:
        """``thing``, which ``close`` ends; what is owned last is ended first."""

        def ended() -> None:
            with suppress(EngineError):
                end(thing)

        self._resources.callback(ended)
        return thing

    def _tried_fit(self) -> str | None:
        """Fits nothing once, which loads the kernel; None, or why frames are fitted on the CPU."""
        if self._fitter is None:
            return "`edgeseg kernels build --cuda` makes the kernel for the GPU"
        spec, slot = self._spec, self._slots[0]
        same = Geometry.fitting(spec.height, spec.width, spec.height, spec.width, fit="stretch")
        address = slot.frame.reserve(spec.height * spec.width * 3)
        try:
            self._queue_fit(slot, address, 3 * spec.width, same)
            self._cuda.synchronize(slot.stream)
        except EngineError as error:
            return str(error).rstrip(".")
        return None

    def _capture_all(self) -> str | None:
        """Runs the network once in each slot and captures it; None, or why there are no graphs."""
        cuda, compute, network = self._cuda, self._compute, self._network
        for slot in self._slots:
            # The first run of a context does work that cannot be captured, and fails here if it
            # has to fail. What it reads and writes is nothing yet.
            network.enqueue(slot, compute)
            cuda.synchronize(compute)
        growing = [tensor.name for tensor in network.outputs if tensor.shape is None]
        if growing:
            return f"the size of {', '.join(growing)} depends on the frame"
        if not cuda.captures:
            return f"{cuda.name} captures none"
        graphs: list[Graph] = []
        for slot in self._slots:
            try:
                graphs.append(self._owned(self._captured(slot), cuda.destroy_graph))
            except EngineError as error:
                return str(error).rstrip(".")
        for slot, graph in zip(self._slots, graphs, strict=True):
            slot.graph = graph
        return None

    def _captured(self, slot: Slot) -> Graph:
        cuda, compute = self._cuda, self._compute
        cuda.begin_capture(compute)
        try:
            self._network.enqueue(slot, compute)
        except BaseException:
            with suppress(EngineError):
                cuda.destroy_graph(cuda.end_capture(compute))
            raise
        return cuda.end_capture(compute)

    # --- a frame

    def _take(self) -> Slot:
        with self._lock:
            if self._closed:
                raise RequestError("the TensorRT engine is closed; open the model again")
            if not self._free:
                raise RequestError(
                    f"{len(self._slots)} frames may be inside the engine, and one more came; take "
                    "the outputs of the oldest first"
                )
            return self._free.popleft()

    def _give_back(self, slot: Slot) -> None:
        slot.owner = None
        with self._lock:
            if not self._closed:
                self._free.append(slot)

    def _settle(self, slot: Slot) -> None:
        """Waits for whatever is queued for ``slot``; its failures are somebody else's to tell."""
        for stream in (self._compute, slot.stream):
            with suppress(EngineError):
                self._cuda.synchronize(stream)

    def _queue(self, slot: Slot, prepared: Prepared) -> None:
        """Queues everything that happens to one frame."""
        cuda, compute = self._cuda, self._compute
        if isinstance(prepared.pixels, DevicePixels):
            self._queue_device_frame(slot, prepared.pixels, prepared.geometry)
        else:
            self._queue_host_frame(slot, prepared.pixels, prepared.geometry)
        cuda.record(slot.fitted, slot.stream)
        cuda.wait(compute, slot.fitted)
        cuda.record(slot.begun, compute)
        if slot.graph is None:
            self._network.enqueue(slot, compute)
        else:
            cuda.launch(slot.graph, compute)
        cuda.record(slot.computed, compute)
        cuda.wait(slot.stream, slot.computed)
        for output in slot.outputs:
            output.queue_download(cuda, slot.stream)
        cuda.record(slot.done, slot.stream)

    def _queue_host_frame(self, slot: Slot, pixels: Pixels, geometry: Geometry | None) -> None:
        """numpy's pixels -> the network's input, by way of pinned memory."""
        started_ns = time.perf_counter_ns()
        if geometry is None:
            pixels = checked_input(pixels, self._spec)[0]
        else:
            _check_size(pixels.shape[:2], geometry)
        pinned = slot.pinned(pixels.size)
        np.copyto(pinned.reshape(pixels.shape), pixels)
        slot.copied_ns = time.perf_counter_ns() - started_ns
        self._cuda.record(slot.started, slot.stream)
        if geometry is None:
            self._cuda.copy_to_device(slot.image, pinned, slot.stream)
            return
        address = slot.frame.reserve(pixels.size)
        self._cuda.copy_to_device(address, pinned, slot.stream)
        self._queue_fit(slot, address, 3 * geometry.frame_width, geometry)

    def _queue_device_frame(
        self, slot: Slot, pixels: DevicePixels, geometry: Geometry | None
    ) -> None:
        """A frame on the GPU -> the network's input, read where it is."""
        if geometry is None:
            raise RequestError("a frame on the GPU is fitted there, and came without geometry")
        _check_size((pixels.height, pixels.width), geometry)
        if pixels.stream is not None:
            self._cuda.record(slot.arrived, Stream(pixels.stream))
            self._cuda.wait(slot.stream, slot.arrived)
        slot.owner = pixels
        slot.copied_ns = 0
        self._cuda.record(slot.started, slot.stream)
        self._queue_fit(slot, pixels.pointer, pixels.pitch, geometry)

    def _queue_fit(self, slot: Slot, address: int, pitch: int, geometry: Geometry) -> None:
        if self._fitter is None:
            raise RequestError("this engine fits frames on the CPU; submit what prepare() gave")
        planes = launchers.FramePlanes(format=launchers.BGR8)
        planes.planes[0], planes.pitches[0] = address, pitch
        # The same fields, in the same order.
        fit = launchers.FrameFit(*astuple(geometry))
        status = self._fitter.edgeseg_cuda_fit_frame(
            ctypes.byref(planes), ctypes.byref(fit), slot.image, slot.stream
        )
        if status != 0:
            raise EngineError(
                f"the kernel that fits frames failed with CUDA error {status}; "
                "`edgeseg kernels build --cuda` makes it for this GPU"
            )

    def _collect(self, slot: Slot) -> AnyOutputs:
        if self._closed:
            raise RequestError(
                "the engine was closed while the frame was inside; its masks are lost"
            )
        cuda = self._cuda
        try:
            with cuda.current():
                cuda.synchronize_event(slot.done)
                fit_ms = cuda.elapsed_ms(slot.started, slot.fitted)
                network_ms = cuda.elapsed_ms(slot.begun, slot.done)
            found = {output.tensor.name: output.taken() for output in slot.outputs}
            fit_ns = slot.copied_ns + round(fit_ms * 1e6)
        finally:
            self._give_back(slot)
        spec = self._spec
        network_ns = round(network_ms * 1e6)
        if spec.task == "instance":
            return taken_instances(found, spec, network_ns=network_ns, fit_ns=fit_ns)
        planes = {}
        for name in ("class_map", "confidence") if spec.confidence else ("class_map",):
            planes[name] = found[name].reshape(spec.height, spec.width)
        return Outputs(
            planes["class_map"],
            planes.get("confidence"),
            network_ns=network_ns,
            fit_ns=fit_ns,
        )

    def _profile(self, slot: Slot, images: Sequence[Pixels]) -> list[tuple[str, float]]:
        cuda, compute = self._cuda, self._compute
        network = _Network(self._loaded)
        try:
            times = network.timed_layers()
            for image in (images[0], *images):
                times.begin_run()
                pinned = slot.pinned(image.size)
                np.copyto(pinned.reshape(image.shape), image)
                cuda.copy_to_device(slot.image, pinned, compute)
                network.enqueue(slot, compute)
                cuda.synchronize(compute)
        finally:
            self._settle(slot)
            network.close()
        return times.medians()


def open_engine(bundle: Bundle, *, threads: int, compiled_head: bool | None) -> TensorRtEngine:
    """The model of ``bundle`` on TensorRT; builds the plan first where none here fits.

    ``threads`` has no meaning on a GPU. ``compiled_head``: True needs EdgeSeg's plugins in the
    plan, False keeps to TensorRT's own layers, None takes the newest plan that fits, and builds
    with plugins if their library is here.

    EngineError when TensorRT, a CUDA package, a GPU or memory is missing, or a plan cannot be
    built or loaded.
    """
    version = tensorrt_version()
    cuda = open_cuda()
    try:
        plugin_library = find_plugin_library(int(version.split(".")[0]))
        options = BuildOptions(plugins=compiled_head)
        found = find_plan(
            bundle,
            None if compiled_head is None else options,
            tensorrt_version=version,
            device=cuda.device,
            plugin_library=plugin_library,
        )
        if isinstance(found, NoPlan):
            print(
                f"{bundle.name}: {found}; building one for {cuda.device}, which takes minutes",
                file=sys.stderr,
                flush=True,
            )
            with progress(f"building {bundle.name}") as report:
                found = build_plan(
                    bundle, options, cuda=cuda, plugin_library=plugin_library, report=report
                )
            print("\n".join(found.render()), file=sys.stderr, flush=True)
        if found.options.plugins and plugin_library is not None:
            with cuda.current():
                load_plugins(plugin_library)
        content = found.read()
        fitter = _frame_fitter()
    except BaseException:
        with suppress(EngineError):
            cuda.close()
        raise
    precisions = " and ".join(found.attestation.precisions)
    return TensorRtEngine(
        content,
        bundle.spec,
        cuda,
        where=str(found.path),
        loading=Loading(found.options.version_compatible, found.options.dla),
        fitter=fitter,
        built=(
            *([precisions] if precisions else []),
            "head in a plugin" if found.attestation.plugins else "head in the graph",
        ),
    )


def tensorrt_version() -> str:
    """TensorRT's version; EngineError when it is not installed, or cannot be loaded."""
    from edgeseg.engine import not_installed

    try:
        import tensorrt as trt
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt":
            raise EngineError(not_installed("tensorrt")) from error
        raise EngineError(
            f"the engine tensorrt is installed and cannot be loaded ({error}); `edgeseg doctor` "
            "shows what is missing, or try another --engine"
        ) from error
    return str(trt.__version__)


def _frame_fitter() -> FrameFitter | None:
    path = find_cuda_library()
    if path is None:
        return None
    library: Any = launchers.open_library(path)
    return cast(FrameFitter, library)


# --- what TensorRT holds


class _Loaded:
    """A plan in TensorRT's hands, and what TensorRT reports about it."""

    def __init__(
        self, plan: bytes, loading: Loading, spec: ModelSpec, where: str, cuda: Cuda
    ) -> None:

        self.spec = spec
        self.where = where
        self.cuda = cuda
        self.reports = _Reports()
        # TensorRT has other things keep it, but does not say so.
        self._recorder = _error_recorder(self.reports)
        self._listening = ExitStack()
        with ExitStack() as opening:
            logger = opening.enter_context(listening(self.reports))
            self._engine: trt.ICudaEngine | None = self._deserialized(plan, loading, logger)
            self._listening = opening.pop_all()

    def _deserialized(self, plan: bytes, loading: Loading, logger: trt.ILogger) -> trt.ICudaEngine:
        import tensorrt as trt

        try:
            runtime = trt.Runtime(logger)
        except (RuntimeError, TypeError) as error:
            raise EngineError(
                f"TensorRT {trt.__version__} cannot use the GPU ({self.reports.take(str(error))}); "
                "`edgeseg doctor` shows what is missing"
            ) from error
        runtime.error_recorder = self._recorder
        if loading.carries_code:
            runtime.engine_host_code_allowed = True
        if loading.dla is not None:
            runtime.DLA_core = loading.dla
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"TensorRT {trt.__version__} cannot read {self.where} ({self.reports.take()}); it "
                "is damaged, or of another version or GPU: `edgeseg build` makes it again"
            )
        self._runtime: trt.Runtime | None = runtime
        return engine

    @property
    def engine(self) -> trt.ICudaEngine:
        """The engine, until ``close``."""
        assert self._engine is not None
        return self._engine

    def close(self) -> None:
        """Lets TensorRT free it."""
        self._engine = None
        self._runtime = None
        self._listening.close()

    def other_contract(self, came: str, promised: str) -> EngineError:
        """The error for a plan that is not of the model."""
        return EngineError(
            f"{self.where} is not a plan of {self.spec.name}: it {came}, and {promised}; "
            "`edgeseg build` makes it again"
        )


class _Network:
    """An execution context: the network, to be queued with the memory of any slot.

    Runs of one context must not overlap, so all of them go to one stream.
    """

    outputs: tuple[Tensor, ...]

    def __init__(self, loaded: _Loaded) -> None:
        self._loaded = loaded
        context = loaded.engine.create_execution_context()
        if context is None:
            memory = loaded.cuda.memory()
            raise EngineError(
                f"TensorRT cannot run {loaded.where} ({loaded.reports.take()}): a frame's "
                f"activations take {loaded.engine.device_memory_size_v2 / 2**20:.0f} MiB, and "
                f"{memory.free / 2**20:.0f} of {memory.total / 2**20:.0f} MiB of the GPU are free; "
                "end what else uses it, or export the model at a smaller size"
            )
        self._context: trt.IExecutionContext | None = context
        self._names = [
            loaded.engine.get_tensor_name(index) for index in range(loaded.engine.num_io_tensors)
        ]
        self._set_input(context)
        self.outputs = self._described(context)
        self._allocators: dict[str, _Allocator] = {}
        for tensor in self.outputs:
            if tensor.shape is None:
                allocator = _Allocator()
                # Once, and not per slot: the binding keeps each one that it was ever given.
                context.set_output_allocator(tensor.name, _output_allocator(allocator))
                self._allocators[tensor.name] = allocator

    def close(self) -> None:
        """Lets TensorRT free it."""
        self._context = None

    def enqueue(self, slot: Slot, stream: Stream) -> None:
        """Queues the network, from the input of ``slot`` to its outputs; EngineError if it fails.

        Outputs whose size depends on the frame have their shape when it returns.
        """
        context, loaded = self._context, self._loaded
        assert context is not None
        loaded.reports.clear()
        ready = context.set_tensor_address(_INPUT, slot.image)
        for output in slot.outputs:
            name = output.tensor.name
            if name in self._allocators:
                self._allocators[name].output = output
                output.shape = None
            else:
                ready = context.set_tensor_address(name, output.memory.address) and ready
        queued = ready and context.execute_async_v3(stream)
        for allocator in self._allocators.values():
            error, allocator.error = allocator.error, None
            if error is not None:
                raise error
        lacking = [output.tensor.name for output in slot.outputs if output.shape is None]
        if not queued or lacking:
            raise EngineError(
                f"TensorRT could not run {loaded.where} ({loaded.reports.take()}); if it goes on, "
                "`edgeseg build` makes the plan again"
            )

    def timed_layers(self) -> _LayerTimes:
        """From now on every run is timed, layer by layer, and ``enqueue`` waits for its end."""
        assert self._context is not None
        times = _LayerTimes()
        self._context.profiler = _profiler(times)
        return times

    def _set_input(self, context: trt.IExecutionContext) -> None:
        """EngineError unless the plan takes what the spec promises, and nothing else."""
        import tensorrt as trt

        loaded = self._loaded
        engine, spec = loaded.engine, loaded.spec
        inputs = [
            name for name in self._names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        ]
        if inputs != [_INPUT] or engine.get_tensor_dtype(_INPUT) != trt.DataType.UINT8:
            given = [f"{name} {_said(engine.get_tensor_dtype(name))}" for name in inputs]
            raise loaded.other_contract(
                f"takes {', '.join(given) or 'nothing'}", f"the model takes {_INPUT} uint8"
            )
        wanted = (1, spec.height, spec.width, 3)
        shape = _sizes(engine.get_tensor_shape(_INPUT))
        if -1 in shape:
            fits = context.set_input_shape(_INPUT, wanted) and not list(context.infer_shapes())
        else:
            fits = shape == wanted
        if not fits:
            raise loaded.other_contract(f"takes images of {shape}", f"the model's are {wanted}")

    def _described(self, context: trt.IExecutionContext) -> tuple[Tensor, ...]:
        """The outputs; EngineError unless those of the spec are among them."""
        loaded = self._loaded
        engine, spec = loaded.engine, loaded.spec
        outputs = {}
        for name in self._names:
            if name == _INPUT:
                continue
            element = _element_type(engine.get_tensor_dtype(name))
            if element is None:
                raise loaded.other_contract(
                    f"gives {name} as {_said(engine.get_tensor_dtype(name))}",
                    "numpy has no such type",
                )
            shape = _sizes(context.get_tensor_shape(name))
            outputs[name] = Tensor(name, element, None if -1 in shape else shape)
        for wanted in _promised(spec):
            found = outputs.get(wanted.name)
            if found != wanted:
                given = "no"
                if found is not None:
                    given = f"{found.element} {found.shape or 'of no fixed size'} as"
                raise loaded.other_contract(
                    f"gives {given} {wanted.name}", f"{wanted.element} {wanted.shape} is promised"
                )
        return tuple(outputs.values())


class _InFlight:
    """The `Pending` of a slot."""

    def __init__(self, engine: TensorRtEngine, slot: Slot) -> None:
        self._engine = engine
        self._slot: Slot | None = slot

    def outputs(self) -> AnyOutputs:
        """See ``Pending.outputs``."""
        slot, self._slot = self._slot, None
        if slot is None:
            raise RequestError("a frame's outputs are taken once, and were asked for again")
        return self._engine._collect(slot)


# --- what TensorRT calls


class _Reports:
    """What TensorRT reported; it reports from threads of its own, too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[tuple[Any, str]] = []

    def add(self, text: str, code: Any = None) -> None:
        """Takes one report; ``code`` is TensorRT's."""
        with self._lock:
            self._entries.append((code, " ".join(text.split())))

    def error(self, message: str) -> None:
        """Takes an error of TensorRT's log."""
        self.add(tidy(message))

    def warn(self, message: str) -> None:
        """Leaves out a warning: the builder has told those."""

    def entries(self) -> list[tuple[Any, str]]:
        """Codes and texts so far, oldest first."""
        with self._lock:
            return list(self._entries)

    def clear(self) -> None:
        """Forgets them."""
        with self._lock:
            self._entries.clear()

    def take(self, otherwise: str = "it gave no reason") -> str:
        """The reports as a part of a sentence; forgets them."""
        texts = dict.fromkeys(text.rstrip(". ") for _, text in self.entries())
        self.clear()
        text = "; ".join(texts) or otherwise
        return text if len(text) <= _REPORT else f"{text[:_REPORT]}…"


def _error_recorder(reports: _Reports) -> trt.IErrorRecorder:
    """TensorRT's view of the reports."""
    import tensorrt as trt

    class Recorder(trt.IErrorRecorder):
        """Passes errors on, and back."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)

        def report_error(self, arg0: trt.ErrorCodeTRT, arg1: str) -> bool:
            reports.add(arg1, arg0)
            # True would mean that TensorRT need not go on.
            return False

        def num_errors(self) -> int:
            return len(reports.entries())

        def get_num_errors(self) -> int:
            # By this name the bindings look for num_errors when TensorRT asks.
            return self.num_errors()

        def get_error_code(self, arg0: int) -> trt.ErrorCodeTRT:
            code = reports.entries()[arg0][0]
            return trt.ErrorCodeTRT.UNSPECIFIED_ERROR if code is None else code

        def get_error_desc(self, arg0: int) -> str:
            return reports.entries()[arg0][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            reports.clear()

    return Recorder()


class _Allocator:
    """Memory for an output whose size TensorRT knows only while it runs.

    ``output``: the one that the next run writes. ``error``: why there was no memory.
    """

    def __init__(self) -> None:
        self.output: SlotOutput | None = None
        self.error: EngineError | None = None

    def memory(self, size: int) -> int:
        """The address of ``size`` bytes; 0 when there are none, since TensorRT takes no error."""
        if self.output is None:
            return 0
        try:
            return self.output.memory.reserve(size)
        except EngineError as error:
            self.error = error
            return 0

    def shape(self, shape: Sequence[int]) -> None:
        """What the output turns out to be."""
        if self.output is not None:
            self.output.shape = tuple(shape)


def _output_allocator(allocator: _Allocator) -> trt.IOutputAllocator:
    """TensorRT's view of ``allocator``."""
    import tensorrt as trt

    class Allocator(trt.IOutputAllocator):
        """Passes the calls on; memory of CUDA is aligned to more than any tensor asks for."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

        def reallocate_output(
            self, tensor_name: str, memory: int, size: int, alignment: int
        ) -> int:
            return allocator.memory(size)

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return allocator.memory(size)

        def notify_shape(self, tensor_name: str, shape: trt.Dims) -> None:
            allocator.shape(_sizes(shape))

    return Allocator()


class _LayerTimes:
    """Milliseconds per layer and run."""

    def __init__(self) -> None:
        self._runs: list[dict[str, float]] = []

    def begin_run(self) -> None:
        """What is reported from now on belongs to another run."""
        self._runs.append({})

    def add(self, layer: str, ms: float) -> None:
        """Takes the time of one layer, or of another part of it."""
        if self._runs:
            self._runs[-1][layer] = self._runs[-1].get(layer, 0.0) + ms

    def medians(self) -> list[tuple[str, float]]:
        """Name and median of each layer over all runs but the first."""
        measured = self._runs[1:]
        layers = dict.fromkeys(layer for run in measured for layer in run)
        if not layers:
            raise EngineError("TensorRT reported no times of layers; the plan may have none")
        return [(layer, median(run.get(layer, 0.0) for run in measured)) for layer in layers]


def _profiler(times: _LayerTimes) -> trt.IProfiler:
    """TensorRT's view of ``times``."""
    import tensorrt as trt

    class Profiler(trt.IProfiler):
        """Passes times on."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.add(layer_name, ms)

    return Profiler()


# --- types and sizes


def _element_type(dtype: trt.DataType) -> np.dtype[Any] | None:
    """numpy's name of a data type; None where it has none."""
    import tensorrt as trt

    kinds: dict[Any, Any] = {
        trt.DataType.UINT8: np.uint8,
        trt.DataType.INT8: np.int8,
        trt.DataType.INT32: np.int32,
        trt.DataType.INT64: np.int64,
        trt.DataType.HALF: np.float16,
        trt.DataType.FLOAT: np.float32,
        trt.DataType.BOOL: np.bool_,
    }
    return np.dtype(kinds[dtype]) if dtype in kinds else None


def _promised(spec: ModelSpec) -> tuple[Tensor, ...]:
    """The outputs that a graph of ``spec`` has."""
    if spec.task == "instance":
        rows = (1, spec.capacity)
        return (
            Tensor("boxes", np.dtype(np.float32), (*rows, 4)),
            Tensor("scores", np.dtype(np.float32), rows),
            Tensor("labels", np.dtype(np.int32), rows),
            Tensor("count", np.dtype(np.int32), (1,)),
            Tensor("masks", np.dtype(np.uint8), (*rows, spec.mask_height, spec.mask_width)),
        )
    names = ("class_map", *(["confidence"] if spec.confidence else []))
    return tuple(Tensor(name, np.dtype(np.uint8), (1, spec.height, spec.width)) for name in names)


def _sizes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(int(dims[axis]) for axis in range(len(dims)))


def _said(dtype: trt.DataType) -> str:
    return str(getattr(dtype, "name", dtype)).lower()


def _changes_nothing(geometry: Geometry) -> bool:
    sizes = {
        (geometry.frame_height, geometry.frame_width),
        (geometry.inner_height, geometry.inner_width),
        (geometry.height, geometry.width),
    }
    return len(sizes) == 1


def _check_size(size: tuple[int, ...], geometry: Geometry) -> None:
    wanted = (geometry.frame_height, geometry.frame_width)
    if size != wanted:
        raise FrameError(f"the geometry is for frames of {wanted}, and one of {size} came")
