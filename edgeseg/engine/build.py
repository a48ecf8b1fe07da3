"""Building a TensorRT engine from a bundle's graph, on the device that will run it.

The network is strongly typed: every precision comes from the graph, none from a flag. Whether
EdgeSeg's operators become plugins is decided here and written into the graph that the parser gets.
What TensorRT made of it is looked up in the finished engine (attest.py).

The plugin library is not put into the plan (``plugins_to_serialize``): a plan that carries code
loads only where ``engine_host_code_allowed`` is set, runs whatever library was current when it was
built, and grows. Whoever loads the plan loads the library first, as ``load_plugins`` does.

API: TensorRT 10.3 to 11.4, the names that all of these have.
"""

from __future__ import annotations

import hashlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from edgeseg.bundle import Bundle, tool_versions
from edgeseg.engine.attest import Attestation, Promise
from edgeseg.engine.cuda import Cuda, Device
from edgeseg.engine.graph import Graph
from edgeseg.engine.log import Log, listening, tidy
from edgeseg.engine.memory import FreeMemory, MemoryNeed, checked_workspace
from edgeseg.engine.plan import (
    BuildOptions,
    NoPlan,
    Plan,
    PluginLibrary,
    device_stem,
    find_plan,
    plan_folder,
    plan_stem,
    save_plan,
    write_whole,
)
from edgeseg.errors import EngineError, RequestError
from edgeseg.onnxfile import DOMAIN, PLUGIN_VERSION
from edgeseg.spec import ModelSpec

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = [
    "BuildOptions",
    "BuildProgress",
    "NoPlan",
    "Plan",
    "build_plan",
    "find_plan",
    "load_plugins",
]

# A bar counts these, since the number of TensorRT's steps is known only as they come.
_PERCENT = 100
# How often the waiting thread wakes up to see Ctrl-C, in seconds.
_WAKE_S = 0.2
_SHOWN = 3
_JETSON = Path("/etc/nv_tegra_release")

_DEFAULTS = BuildOptions()


def build_plan(
    bundle: Bundle,
    options: BuildOptions = _DEFAULTS,
    *,
    cuda: Cuda,
    plugin_library: Path | None,
    report: Callable[[int, int], None] | None = None,
) -> Plan:
    """Builds the engine of ``bundle`` for the GPU of ``cuda`` and writes it beside the bundle.

    ``plugin_library``: EdgeSeg's plugin library, if it is here. ``report`` is called with (done,
    total), and from another thread. It takes minutes; Ctrl-C stops it at TensorRT's next step
    and leaves no plan behind. An older plan of the same name is replaced.

    RequestError for options that this release or GPU does not have. EngineError when TensorRT is
    not here or cannot build the graph, when memory is short, or, with ``options.strict``, when the
    finished engine is not what the graph asks for.
    """
    version = _version()
    device = cuda.device
    has_operators = bundle.model.has_operators()
    options = options.resolved(has_operators=has_operators, library_here=plugin_library is not None)
    content = bundle.model.for_tensorrt(plugins=bool(options.plugins))
    graph = Graph.read(content, bundle.model.name)
    promise = Promise.of(graph, plugins=bool(options.plugins), dla=options.dla is not None)
    _check_options(options, device, promise, version)
    with cuda.current():
        free = FreeMemory.of(cuda.memory().free, shared=device.integrated)
    workspace = checked_workspace(
        MemoryNeed.of(graph, shared=device.integrated),
        free,
        options.workspace_mb,
        check=options.memory_check,
    )
    library = plugin_library if options.plugins else None
    # Its hash before it is loaded: it may be built again meanwhile.
    described = None if library is None else PluginLibrary.of(library)
    folder = plan_folder(bundle)
    where = device_stem(tensorrt_version=version, device=device)
    job = _Job(
        spec=bundle.spec,
        content=content,
        name=str(bundle.model_path),
        options=options,
        version=version,
        library=library,
        workspace=workspace,
        timing_cache=options.timing_cache or folder / f"{where}.timing",
        progress=BuildProgress(report),
    )
    start = time.monotonic()
    built, inspected = _interruptible(lambda: _run(job, cuda), job.progress)
    attestation = Attestation.of(inspected, promise)
    if options.strict and not attestation.holds:
        raise EngineError(
            f"TensorRT {version} built an engine that is not what the graph asks for: "
            f"{'; '.join(attestation.failures)}; --no-strict takes it with a warning, "
            "a newer TensorRT or --level 5 may do better"
        )
    stem = plan_stem(options, tensorrt_version=version, device=device)
    plan = Plan(
        path=folder / f"{stem}.plan",
        sha256=hashlib.sha256(built).hexdigest(),
        onnx_sha256=hashlib.sha256(bundle.model.content).hexdigest(),
        tensorrt=version,
        device=device,
        options=options,
        library=described,
        workspace_bytes=workspace,
        attestation=attestation,
        warnings=tuple(job.log.warnings()),
        build_seconds=time.monotonic() - start,
        edgeseg=tool_versions(("edgeseg",)).get("edgeseg", "unknown"),
    )
    save_plan(plan, built, job.library)
    return plan


def load_plugins(library: Path) -> None:
    """Makes EdgeSeg's plugins known to TensorRT in this process; a second call does nothing.

    EngineError when the library cannot be loaded, or holds no plugins of this version.
    """
    import tensorrt as trt

    registry = trt.get_plugin_registry()
    if _has_plugins(registry):
        return
    # A file that is no plugin library gives a null pointer and a line in TensorRT's log; one of
    # another EdgeSeg gives a handle. Whether our plugins are there afterwards tells both.
    registry.load_library(str(library))
    if not _has_plugins(registry):
        raise EngineError(
            f"TensorRT {_version()} cannot load the plugin library {library}: it is damaged, or "
            "made for another machine or EdgeSeg; `edgeseg kernels build --tensorrt` makes it "
            "again, --no-plugins does without"
        )


def _has_plugins(registry: Any) -> bool:
    # Not get_creator, which logs an error for a plugin that is not there yet.
    return any(
        creator.plugin_namespace == DOMAIN and creator.plugin_version == PLUGIN_VERSION
        for creator in registry.all_creators
    )


# --- progress


class BuildProgress:
    """One share of a build that is done, from TensorRT's nested phases, and the wish to stop it.

    A phase has steps, and a step may be a phase of its own. Steps differ in length and phases come
    as they come, so the share is a guess that never goes back.
    """

    def __init__(self, report: Callable[[int, int], None] | None) -> None:
        self._report = report
        self._lock = threading.Lock()
        # name -> parent, steps, steps done
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._shown = 0
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Has the build stop at its next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was to stop."""
        return self._cancelled.is_set()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[phase] = (parent or None, max(steps, 1), 0)
        self._show()

    def step(self, phase: str, step: int) -> bool:
        """Step number ``step``, from 0, is done; False when the build is to stop."""
        with self._lock:
            if phase in self._phases:
                parent, steps, _ = self._phases[phase]
                self._phases[phase] = (parent, steps, min(step + 1, steps))
        self._show()
        return not self.cancelled

    def finish(self, phase: str) -> None:
        """A phase ends; also one whose steps were not all done."""
        with self._lock:
            parent, steps, _ = self._phases.pop(phase, (None, 1, 0))
            if parent is None:
                self._phases[phase] = (None, steps, steps)
        self._show()

    def _show(self) -> None:
        with self._lock:
            roots = [name for name, (parent, _, _) in self._phases.items() if parent is None]
            share = max((self._share(name) for name in roots), default=0.0)
            self._shown = max(self._shown, int(share * _PERCENT))
            shown = self._shown
        if self._report is not None:
            self._report(shown, _PERCENT)

    def _share(self, phase: str) -> float:
        _, steps, done = self._phases[phase]
        inner = [
            self._share(name)
            for name, (parent, _, _) in self._phases.items()
            if parent == phase and name != phase
        ]
        return min((done + max(inner, default=0.0)) / steps, 1.0)


def _monitor(progress: BuildProgress) -> trt.IProgressMonitor:
    """TensorRT's view of ``progress``."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        """Passes the phases on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


def _interruptible(
    work: Callable[[], tuple[bytes, str]], progress: BuildProgress
) -> tuple[bytes, str]:
    """What ``work`` returns or raises; KeyboardInterrupt once it has ended after Ctrl-C.

    Python looks at signals in the main thread only, and not while that is inside TensorRT; so the
    work has a thread of its own and the main one waits in Python.
    """
    results: list[tuple[bytes, str]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    with _signals_to(progress):
        threading.Thread(target=run, name="edgeseg-build", daemon=True).start()
        while not done.wait(_WAKE_S):
            pass
    if progress.cancelled:
        raise KeyboardInterrupt
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _signals_to(progress: BuildProgress) -> Iterator[None]:
    """Meanwhile the first Ctrl-C, or SIGTERM where that is handled, only cancels.

    An exception out of nowhere could leave TensorRT working behind our back. A second one is
    handled as ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}

    def handle(number: int, frame: FrameType | None) -> None:
        if progress.cancelled:
            handlers[signal.Signals(number)](number, frame)
        progress.cancel()

    try:
        for number in handlers:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- the build itself


@dataclass(frozen=True)
class _Job:
    """What one build needs to know. ``name``: of the graph, for messages."""

    spec: ModelSpec
    content: bytes
    name: str
    options: BuildOptions
    version: str
    library: Path | None
    workspace: int
    timing_cache: Path
    progress: BuildProgress
    log: Log = field(default_factory=Log)

    def error(self, doing: str) -> EngineError:
        """What to raise when TensorRT failed at ``doing``, from what it logged."""
        cause = self.log.cause() or "it gives no reason"
        if self.log.out_of_memory():
            mib = self.workspace >> 20
            return EngineError(
                f"TensorRT {self.version} ran out of memory {doing} {self.name} ({cause}); "
                f"close other programs, add swap, ask for less --workspace than {mib}, "
                "or export with a smaller --size"
            )
        return EngineError(
            f"TensorRT {self.version} failed {doing} {self.name}: {cause}; "
            "`edgeseg doctor` shows what is installed, --engine onnxruntime runs the model without"
        )


def _run(job: _Job, cuda: Cuda) -> tuple[bytes, str]:
    """The plan, and what the engine inspector says of it."""
    with cuda.current(), listening(job.log) as logger:
        built = _built(job, logger)
        # The builder's memory is free again by here.
        return built, _inspected(job, logger, built)


def _built(job: _Job, logger: trt.ILogger) -> bytes:
    import tensorrt as trt

    options = job.options
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as error:
        raise EngineError(
            f"TensorRT {job.version} cannot use the GPU ({job.log.cause() or error}); "
            "`edgeseg doctor` shows what is missing"
        ) from error
    # Standard plugins that the parser itself uses, such as the one behind RoiAlign. Declared as a
    # capsule, and given a logger in all of NVIDIA's samples.
    initialize: Any = trt.init_libnvinfer_plugins
    initialize(logger, "")
    if job.library is not None:
        load_plugins(job.library)
    # The flag's bit moved between 10 and 11, where it has no effect: all networks are so.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(job.content):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        raise _parser_error(job, found)
    config = builder.create_builder_config()
    # The inspector tells types and plugins only of plans that were built with this.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible is not None:
        config.hardware_compatibility_level = _hardware_level(job)
    if options.dla is not None:
        _use_dla(job, builder, config)
    _add_profile(job, builder, network, config)
    _load_timing_cache(job, config)
    monitor = _monitor(job.progress)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise job.error("building")
    measured = config.get_timing_cache()
    if measured is not None:
        write_whole(job.timing_cache, bytes(measured.serialize()))
    return bytes(serialized)


def _parser_error(job: _Job, found: list[Any]) -> EngineError:
    """What to raise for the parser's errors: which nodes, and what to do."""
    sentences = []
    ours = False
    for error in found:
        operator, node = error.node_operator(), error.node_name() or f"number {error.node()}"
        ours = ours or operator.startswith("EdgeSeg")
        if not operator:
            sentences.append(tidy(error.desc()))
            continue
        code = str(getattr(error.code(), "name", error.code()))
        verdict = "is not supported" if code.startswith("UNSUPPORTED") else "cannot be read"
        sentences.append(f"operator {operator} of node {node} {verdict} ({tidy(error.desc())})")
    sentences = list(dict.fromkeys(sentences)) or [job.log.cause() or "it gives no reason"]
    more = len(sentences) - _SHOWN
    said = "; ".join(sentences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    if ours and job.library is not None:
        way_out = (
            "the plugin library does not know it: `edgeseg kernels build --tensorrt` makes it "
            "again, --no-plugins does without"
        )
    else:
        way_out = (
            "export the model without it, use a newer TensorRT, or run it with --engine onnxruntime"
        )
    return EngineError(f"TensorRT {job.version} cannot take {job.name}: {said}; {way_out}")


def _hardware_level(job: _Job) -> Any:
    import tensorrt as trt

    asked = str(job.options.hardware_compatible)
    level = getattr(trt.HardwareCompatibilityLevel, asked.upper(), None)
    if level is None:
        raise RequestError(
            f"TensorRT {job.version} does not know the hardware compatibility {asked}; "
            "ampere_plus is in all releases, or leave it out"
        )
    return level


def _use_dla(job: _Job, builder: trt.Builder, config: trt.IBuilderConfig) -> None:
    """Puts on the DLA what it can run, the rest on the GPU."""
    import tensorrt as trt

    cores = builder.num_DLA_cores
    core = job.options.dla
    if core is None or core >= cores:
        raise RequestError(
            f"DLA core {core} was asked for, and TensorRT {job.version} finds {cores} here; "
            "releases up to 10.7 know the DLAs of Xavier, Orin NX and AGX Orin, from 11.4.1 on "
            "that of AGX Orin; leave --dla out to use the GPU"
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _add_profile(
    job: _Job, builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig
) -> None:
    """Gives inputs whose size the graph leaves open the network size of the spec."""
    profile: trt.IOptimizationProfile | None = None
    wanted = (1, job.spec.height, job.spec.width, 3)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape[axis] for axis in range(len(tensor.shape)))
        if all(side >= 0 for side in shape):
            continue
        fits = len(shape) == len(wanted) and all(
            side in (-1, size) for side, size in zip(shape, wanted, strict=True)
        )
        if not fits:
            raise EngineError(
                f"{job.name} leaves the size of its input {tensor.name} open, {shape}, which the "
                f"network size {wanted} does not settle; export it with fixed sizes"
            )
        if profile is None:
            profile = builder.create_optimization_profile()
        profile.set_shape(tensor.name, wanted, wanted, wanted)
    if profile is not None:
        config.add_optimization_profile(profile)


def _load_timing_cache(job: _Job, config: trt.IBuilderConfig) -> None:
    """Takes what an earlier build measured, if it was with this release on such a GPU."""
    try:
        content = job.timing_cache.read_bytes()
    except OSError:
        content = b""
    cache = config.create_timing_cache(content)
    if content and (cache is None or not config.set_timing_cache(cache, ignore_mismatch=False)):
        job.log.warn(
            f"the timing cache {job.timing_cache} is damaged, or of another TensorRT or GPU; "
            "it is replaced"
        )
        content, cache = b"", config.create_timing_cache(b"")
    if not content and cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    # A cache that does not fit is logged as an error, and is none.
    job.log.forget_errors()


def _inspected(job: _Job, logger: trt.ILogger, plan: bytes) -> str:
    import tensorrt as trt

    runtime = trt.Runtime(logger)
    if job.options.version_compatible:
        # Such a plan brings a runtime of its own; this one was built a moment ago.
        runtime.engine_host_code_allowed = True
    if job.options.dla is not None:
        runtime.DLA_core = job.options.dla
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise job.error("loading the engine it built of")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


# --- what can be refused before anything starts


def _check_options(options: BuildOptions, device: Device, promise: Promise, version: str) -> None:
    level = options.hardware_compatible
    least = {"ampere_plus": (8, 0), "same_compute_capability": (7, 5)}
    if level is not None and device.compute_capability < least[level]:
        major, minor = least[level]
        raise RequestError(
            f"hardware compatibility {level} needs compute capability {major}.{minor} or newer, "
            f"and this is {device}; leave it out"
        )
    if level is not None and version.startswith("10.") and _JETSON.exists():
        raise RequestError(
            f"TensorRT {version} has no hardware compatibility on a Jetson; leave it out and build "
            "on each kind of board"
        )
    if options.dla is not None and set(promise.precisions.values()) == {"fp32"}:
        raise RequestError(
            "the DLA computes in FP16 and INT8, and this graph is in FP32 throughout; "
            "`edgeseg quantize` makes an INT8 bundle, or leave --dla out"
        )


def _version() -> str:
    """TensorRT's version; EngineError when it is not installed, cannot be loaded or is too old."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise EngineError(
            f"TensorRT cannot be imported ({error}); on a Jetson: sudo apt-get install "
            "python3-libnvinfer, and a virtual environment made with --system-site-packages; "
            "elsewhere: pip install tensorrt"
        ) from error
    version = str(trt.__version__)
    known = re.match(r"(\d+)\.(\d+)", version)
    if known is None or (int(known[1]), int(known[2])) < (10, 3):
        raise EngineError(
            f"EdgeSeg needs TensorRT 10.3 or newer, and {version} is here; "
            "JetPack 6.1 is the first that has it"
        )
    return version
