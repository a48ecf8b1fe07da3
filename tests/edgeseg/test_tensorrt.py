"""The TensorRT engine: on doubles of four releases, and on a GPU made of host memory whose streams
run when somebody waits for them, so that a forgotten wait shows in the masks.

The network is a function on arrays, queued where TensorRT would queue its kernels. What TensorRT
itself does is not shown here.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.bundle import Bundle
from edgeseg.engine import available_engines, open_engine, passed_over
from edgeseg.engine import tensorrt as tensorrt_module
from edgeseg.engine.attest import Attestation
from edgeseg.engine.base import Prepared
from edgeseg.engine.build import BuildOptions, Plan
from edgeseg.engine.cuda import Stream
from edgeseg.engine.device_frame import LEGACY_STREAM, DeviceFrame, frame_of
from edgeseg.engine.plan import PluginLibrary, plan_folder, plan_stem, save_plan
from edgeseg.engine.tensorrt import TensorRtEngine
from edgeseg.errors import EngineError, FrameError, RequestError
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceOutputs
from edgeseg.kernels import launchers
from edgeseg.model import Model
from edgeseg.pipeline import Pipeline
from edgeseg.result import AnyOutputs
from edgeseg.source import open_source
from edgeseg.spec import Fit, ModelSpec, Preprocessing
from tests.edgeseg.host_cuda import HostCuda
from tests.tensorrt.stubs import RELEASES

if TYPE_CHECKING:
    from tests.conftest import Tiny
    from tests.tensorrt.double import Double

SPEC = ModelSpec(
    name="stripes",
    architecture="none",
    task="semantic",
    height=32,
    width=48,
    classes=("dark", "middle", "bright", "white"),
    colours=((0, 0, 0), (90, 0, 0), (0, 180, 0), (0, 0, 255)),
    ignore=255,
    preprocessing=Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr"),
    confidence=True,
)
# What has nothing to do with the release is tested on one.
one_release = pytest.mark.parametrize(
    "tensorrt_release", RELEASES[-1:], ids=lambda release: str(release.name), indirect=True
)

IMAGE = (1, 32, 48, 3)
MASK = (1, 32, 48)


def class_map(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What the network makes of a (height, width, 3) image."""
    found: NDArray[np.uint8] = image[..., 2] // 64
    return found


def confidence(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = 255 - image[..., 0]
    return found


def picture(seed: int, height: int = 32, width: int = 48) -> Pixels:
    pixels: Pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return pixels


@dataclass
class Tensor:
    """An input or output of the plan: element type, the size the plan has, the size of a run."""

    mode: str
    dtype: str
    shape: tuple[int, ...]
    run_shape: tuple[int, ...] | None = None


def tensors() -> dict[str, Tensor]:
    return {
        "image": Tensor("INPUT", "UINT8", IMAGE),
        "class_map": Tensor("OUTPUT", "UINT8", MASK),
        "confidence": Tensor("OUTPUT", "UINT8", MASK),
    }


@dataclass
class Network:
    """TensorRT with one plan in it, played by a double; ``compute`` makes outputs of an image."""

    trt: Double
    cuda: HostCuda
    tensors: dict[str, Tensor] = field(default_factory=tensors)
    compute: Callable[[NDArray[np.uint8]], dict[str, NDArray[Any]]] = lambda image: {
        "class_map": class_map(image)[None],
        "confidence": confidence(image)[None],
    }
    layers: tuple[tuple[str, float], ...] = ()
    #: called instead of a run, with its number from 0; True goes on with the run
    before: Callable[[int], bool] = lambda run: True

    def __post_init__(self) -> None:
        trt, module = self.trt, self.trt.module
        self.runs = 0
        self.streams: set[int] = set()
        self.addresses: dict[int, dict[str, int]] = {}
        self.allocators: dict[int, dict[str, Any]] = {}
        trt.when("ICudaEngine.num_io_tensors", does=lambda _: len(self.tensors))
        trt.when("ICudaEngine.get_tensor_name", does=lambda _, index: list(self.tensors)[index])
        trt.when(
            "ICudaEngine.get_tensor_mode",
            does=lambda _, name: getattr(module.TensorIOMode, self.tensors[name].mode),
        )
        trt.when(
            "ICudaEngine.get_tensor_dtype",
            does=lambda _, name: getattr(module.DataType, self.tensors[name].dtype),
        )
        trt.when(
            "ICudaEngine.get_tensor_shape",
            does=lambda _, name: module.Dims(list(self.tensors[name].shape)),
        )
        trt.when(
            "IExecutionContext.get_tensor_shape",
            does=lambda _, name: module.Dims(
                list(self.tensors[name].run_shape or self.tensors[name].shape)
            ),
        )
        trt.when("IExecutionContext.set_tensor_address", does=self._set_address)
        trt.when("IExecutionContext.set_output_allocator", does=self._set_allocator)
        trt.when("IExecutionContext.execute_async_v3", does=self._execute)

    def _set_address(self, context: Any, name: str, address: int) -> bool:
        self.addresses.setdefault(id(context), {})[name] = address
        return True

    def _set_allocator(self, context: Any, name: str, allocator: Any) -> bool:
        self.allocators.setdefault(id(context), {})[name] = allocator
        return True

    def _execute(self, context: Any, stream: int) -> bool:
        run, self.runs = self.runs, self.runs + 1
        if not self.before(run):
            return False
        self.streams.add(stream)
        addresses = dict(self.addresses[id(context)])
        if self.allocators:
            # TensorRT knows the size of such outputs only after it ran what is before them.
            with self.cuda.current():
                self.cuda.synchronize(Stream(stream))
                image = self.cuda.array(addresses["image"], IMAGE, np.uint8)[0]
                found = self.compute(image.copy())
            for name, allocator in self.allocators[id(context)].items():
                size = max(found[name].nbytes, 1)
                address = self.trt.drive(
                    allocator, "reallocate_output_async", name, 0, size, 256, stream
                )
                if address == 0:
                    return False
                addresses[name] = address
                shape = self.trt.module.Dims(list(found[name].shape))
                self.trt.drive(allocator, "notify_shape", name, shape)

        def work() -> None:
            image = self.cuda.array(addresses["image"], IMAGE, np.uint8)[0]
            for name, values in self.compute(image.copy()).items():
                self.cuda.array(addresses[name], values.shape, values.dtype)[:] = values

        self.cuda.enqueue(stream, "network", work)
        profiler = context.profiler
        if self.layers and type(profiler).__name__ == "Profiler":
            for name, ms in self.layers:
                self.trt.drive(profiler, "report_layer_time", name, ms + 10.0 * (run % 2))
        return True


class HostFitter:
    """fit_frame in the place of the CUDA library: OpenCV's, queued on the stream it is given."""

    def __init__(self, cuda: HostCuda, status: int = 0) -> None:
        self._cuda = cuda
        self.status = status
        self.formats: list[int] = []

    def edgeseg_cuda_fit_frame(self, frame: Any, fit: Any, image: int, stream: int) -> int:
        if self.status:
            return self.status
        planes = launchers.FramePlanes.from_buffer_copy(frame._obj)
        geometry = Geometry(*(getattr(fit._obj, name) for name, _ in launchers.FrameFit._fields_))
        self.formats.append(planes.format)

        def work() -> None:
            rows, width, pitch = geometry.frame_height, geometry.frame_width, planes.pitches[0]
            used = (rows - 1) * pitch + 3 * width
            padded = np.zeros(rows * pitch, np.uint8)
            padded[:used] = self._cuda.array(planes.planes[0], (used,), np.uint8)
            pixels = padded.reshape(rows, pitch)[:, : 3 * width].reshape(rows, width, 3)
            target = self._cuda.array(image, (geometry.height, geometry.width, 3), np.uint8)
            target[:] = geometry.fit(pixels)

        self._cuda.enqueue(stream, "fit_frame", work)
        return 0


class DefaultStreams(HostCuda):
    """With the legacy default stream, on which other libraries work."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with self.current():
            self._streams[LEGACY_STREAM] = self._streams.pop(self.create_stream())
        self.calls.clear()

    def assert_all_freed(self) -> None:
        self._streams.pop(LEGACY_STREAM)
        super().assert_all_freed()


@pytest.fixture
def cuda() -> DefaultStreams:
    return DefaultStreams()


@pytest.fixture
def network(tensorrt: Double, cuda: HostCuda) -> Network:
    return Network(tensorrt, cuda)


@pytest.fixture
def engine(network: Network, cuda: HostCuda) -> Iterator[TensorRtEngine]:
    """An engine with two slots that fits frames on the GPU; all it took is given back."""
    opened = TensorRtEngine(b"plan", SPEC, cuda, fitter=HostFitter(cuda))
    yield opened
    opened.close()
    cuda.assert_all_freed()


def check(outputs: AnyOutputs, image: NDArray[np.uint8]) -> None:
    """That the outputs are those of a network input."""
    np.testing.assert_array_equal(outputs.class_map, class_map(image))
    np.testing.assert_array_equal(outputs.confidence, confidence(image))


def fitted(pixels: Pixels, fit: Fit = "stretch") -> tuple[Geometry, Pixels]:
    height, width = pixels.shape[:2]
    geometry = Geometry.fitting(height, width, SPEC.height, SPEC.width, fit=fit)
    return geometry, geometry.fit(pixels)


# --- instances

INSTANCES = replace(
    SPEC,
    task="instance",
    confidence=False,
    capacity=5,
    mask_height=8,
    mask_width=12,
)


def instance_tensors() -> dict[str, Tensor]:
    return {
        "image": Tensor("INPUT", "UINT8", IMAGE),
        "boxes": Tensor("OUTPUT", "FLOAT", (1, 5, 4)),
        "scores": Tensor("OUTPUT", "FLOAT", (1, 5)),
        "labels": Tensor("OUTPUT", "INT32", (1, 5)),
        "count": Tensor("OUTPUT", "INT32", (1,)),
        "masks": Tensor("OUTPUT", "UINT8", (1, 5, 8, 12)),
    }


def instances(image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """As many as the first value says, and numbers made of the picture."""
    rng = np.random.default_rng(image)
    return {
        "boxes": rng.random((1, 5, 4), np.float32),
        "scores": rng.random((1, 5), np.float32),
        "labels": rng.integers(0, 4, (1, 5), np.int32),
        "count": np.array([image[0, 0, 0] % 6], np.int32),
        "masks": rng.integers(0, 256, (1, 5, 8, 12), np.uint8),
    }


def test_instances(network: Network, cuda: HostCuda) -> None:
    network.tensors, network.compute = instance_tensors(), instances
    opened = TensorRtEngine(b"plan", INSTANCES, cuda, fitter=HostFitter(cuda))
    given = [(picture(seed), opened.run(picture(seed))) for seed in range(5)]
    assert len({int(pixels[0, 0, 0]) % 6 for pixels, _ in given}) > 2
    for pixels, outputs in given:
        wanted = instances(pixels)
        count = int(wanted.pop("count")[0])
        assert isinstance(outputs, InstanceOutputs) and outputs.network_ns > 0
        for name, values in wanted.items():
            np.testing.assert_array_equal(getattr(outputs, name), values[0, :count])
    opened.close()
    cuda.assert_all_freed()


@one_release
@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("boxes", Tensor("OUTPUT", "FLOAT", (1, 4, 4)), r"float32 \(1, 4, 4\) as boxes, and"),
        ("masks", Tensor("OUTPUT", "FLOAT", (1, 5, 8, 12)), r"masks, and uint8 \(1, 5, 8, 12\) is"),
        ("labels", Tensor("OUTPUT", "INT64", (1, 5)), r"int64 \(1, 5\) as labels, and int32"),
        ("count", None, r"gives no count, and int32 \(1,\) is promised"),
    ],
)
def test_plans_of_other_instances(
    network: Network, cuda: HostCuda, name: str, tensor: Tensor | None, says: str
) -> None:
    network.tensors = instance_tensors()
    if tensor is None:
        del network.tensors[name]
    else:
        network.tensors[name] = tensor
    with pytest.raises(EngineError, match=says):
        TensorRtEngine(b"plan", INSTANCES, cuda, fitter=HostFitter(cuda))
    cuda.assert_all_freed()


# --- one frame


def test_masks_of_images(engine: TensorRtEngine) -> None:
    first = engine.run(picture(0))
    kept = first.class_map.copy()
    for seed in range(1, 6):
        check(engine.run(picture(seed)), picture(seed))
    np.testing.assert_array_equal(first.class_map, kept)
    assert first.network_ns > 0 and first.fit_ns > 0 and first.head_ns == 0


@one_release
def test_images_of_any_memory(engine: TensorRtEngine) -> None:
    image = picture(1)
    read_only = image.copy()
    read_only.flags.writeable = False
    for view in (read_only, np.asfortranarray(image), image[::-1, ::-1], image[..., ::-1]):
        check(engine.run(view), view)


@one_release
@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 47, 3), np.uint8),
        np.zeros((32, 48), np.uint8),
        np.zeros((1, 32, 48, 3), np.uint8),
        np.zeros((32, 48, 3), np.float32),
    ],
)
def test_other_images(engine: TensorRtEngine, image: Any) -> None:
    came = re.escape(f"{image.shape} {image.dtype} came")
    for _ in range(3):  # more often than there are slots
        with pytest.raises(FrameError, match=rf"stripes takes \(32, 48, 3\) uint8, and {came}"):
            engine.run(image)
    check(engine.run(picture(0)), picture(0))


@one_release
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
@pytest.mark.parametrize(
    "size", [(32, 48), (64, 96), (1, 1), (7, 90), (301, 20), (480, 640), (16, 24)]
)
def test_frames_of_any_size(engine: TensorRtEngine, size: tuple[int, int], fit: Fit) -> None:
    for seed in range(3):
        frame = picture(seed, *size)
        geometry, image = fitted(frame, fit)
        check(engine.submit(engine.prepare(Frame.of(frame), geometry)).outputs(), image)


@one_release
def test_frames_that_change_size(engine: TensorRtEngine, cuda: HostCuda) -> None:
    before = len(cuda.named("end_capture"))
    for seed, size in enumerate([(40, 40), (90, 100), (8, 9), (90, 100), (32, 48), (200, 10)] * 2):
        frame = picture(seed, *size)
        geometry, image = fitted(frame)
        check(engine.submit(engine.prepare(Frame.of(frame), geometry)).outputs(), image)
    assert len(cuda.named("end_capture")) == before


@one_release
def test_nothing_is_allocated_per_frame(engine: TensorRtEngine, cuda: HostCuda) -> None:
    geometry, _ = fitted(picture(0, 64, 96))
    frames = [Frame.of(picture(seed, 64, 96)) for seed in range(12)]
    for frame in frames[:2]:
        engine.submit(engine.prepare(frame, geometry)).outputs()
    calls = len(cuda.calls)
    for frame in frames[2:]:
        engine.submit(engine.prepare(frame, geometry)).outputs()
    methods = {call.method for call in cuda.calls[calls:]}
    assert not {name for name in methods if name.startswith(("allocate", "free", "create"))}
    assert "synchronize" not in methods and cuda.pageable_copies == 0


@one_release
def test_geometry_of_another_frame(engine: TensorRtEngine) -> None:
    geometry, _ = fitted(picture(0, 64, 96))
    for _ in range(3):
        with pytest.raises(FrameError, match=r"frames of \(64, 96\), and one of \(20, 30\) came"):
            engine.submit(engine.prepare(Frame.of(picture(0, 20, 30)), geometry))


@one_release
def test_times_are_those_of_the_gpu(engine: TensorRtEngine, cuda: HostCuda) -> None:
    # A piece of work takes 1 microsecond of the host's clock. Waiting in line is nobody's time.
    geometry, _ = fitted(picture(0, 64, 96))
    frames = [engine.prepare(Frame.of(picture(seed, 64, 96)), geometry) for seed in range(2)]
    for pending in [engine.submit(frame) for frame in frames]:
        outputs = pending.outputs()
        assert 3_000 <= outputs.network_ns <= 8_000
        assert outputs.fit_ns >= 3_000


# --- several frames


def order_of_streams(cuda: HostCuda, engine: TensorRtEngine, eager: str) -> None:
    """Lets one kind of stream run as far as it may, as a GPU would that has time for it first."""
    streams = [slot.stream for slot in engine._slots]
    first = {"compute": [engine._compute], "slots": streams[::-1], "nothing": []}[eager]
    with cuda.current():
        for stream in first:
            cuda.synchronize(stream)


@one_release
@pytest.mark.parametrize("eager", ["compute", "slots", "nothing"])
@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_frames_in_flight(
    network: Network, cuda: HostCuda, slots: int, captures: bool, eager: str
) -> None:
    cuda.captures = captures
    fitter = HostFitter(cuda)
    engine = TensorRtEngine(b"plan", SPEC, cuda, fitter=fitter, frames_in_flight=slots)
    assert engine.frames_in_flight == slots
    random = np.random.default_rng(slots)
    geometry, _ = fitted(picture(0, 50, 70))
    flying: list[tuple[int, Any]] = []
    submitted = taken = 0
    while taken < 30:
        if len(flying) < slots and submitted < 30 and (not flying or random.random() < 0.7):
            frame = picture(submitted, 50, 70)
            flying.append((submitted, engine.submit(engine.prepare(Frame.of(frame), geometry))))
            frame[:] = 99  # the camera's next picture
            submitted += 1
            order_of_streams(cuda, engine, eager)
        else:
            seed, pending = flying.pop(0)
            check(pending.outputs(), geometry.fit(picture(seed, 50, 70)))
            taken += 1
    engine.close()
    cuda.assert_all_freed()
    assert len(network.streams) == 1


@one_release
def test_outputs_may_be_taken_in_any_order(engine: TensorRtEngine) -> None:
    first, second = (engine.submit(Prepared(picture(seed))) for seed in range(2))
    check(second.outputs(), picture(1))
    check(first.outputs(), picture(0))


@one_release
def test_slots_alternate(engine: TensorRtEngine, cuda: HostCuda) -> None:
    for seed in range(6):
        engine.submit(Prepared(picture(seed))).outputs()
    graphs = [graph for graph, _ in cuda.named("launch")]
    assert graphs[0] != graphs[1] and graphs == graphs[:2] * 3


@one_release
def test_upload_does_not_wait_for_the_network(engine: TensorRtEngine, cuda: HostCuda) -> None:
    # With a frame in the network, another one's upload and fit run, and nothing else of it.
    geometry, _ = fitted(picture(0, 64, 96))
    pending = [
        engine.submit(engine.prepare(Frame.of(picture(seed, 64, 96)), geometry))
        for seed in range(2)
    ]
    second = engine._slots[1]
    cuda.ran.clear()
    with cuda.current():
        cuda.synchronize_event(second.fitted)
    assert "network" not in cuda.ran and "fit_frame" in cuda.ran
    for seed, frame in enumerate(pending):
        check(frame.outputs(), geometry.fit(picture(seed, 64, 96)))


@one_release
def test_too_many_frames(engine: TensorRtEngine) -> None:
    flying = [engine.submit(Prepared(picture(seed))) for seed in range(2)]
    with pytest.raises(RequestError, match="2 frames may be inside the engine, and one more came"):
        engine.run(picture(2))
    check(flying[0].outputs(), picture(0))
    check(engine.run(picture(3)), picture(3))
    check(flying[1].outputs(), picture(1))
    with pytest.raises(RequestError, match="taken once"):
        flying[1].outputs()


@one_release
def test_threads_share_the_work(engine: TensorRtEngine) -> None:
    # One thread submits, another takes the outputs, as in the pipeline.
    room, flying = threading.Semaphore(2), []
    ready = threading.Semaphore(0)
    failures: list[BaseException] = []

    def submit() -> None:
        for seed in range(40):
            room.acquire()
            flying.append(engine.submit(Prepared(picture(seed))))
            ready.release()

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        for seed in range(40):
            assert ready.acquire(timeout=10)
            outputs = flying[seed].outputs()
            room.release()
            check(outputs, picture(seed))
    except BaseException as error:
        failures.append(error)
        raise
    finally:
        if not failures:
            thread.join()


# --- the graph


def test_one_graph_per_slot(network: Network, cuda: HostCuda) -> None:
    engine = TensorRtEngine(b"plan", SPEC, cuda, frames_in_flight=3)
    # Once to warm up and once to be captured.
    assert network.runs == 6 and len(cuda.named("end_capture")) == 3
    for seed in range(7):
        check(engine.run(picture(seed)), picture(seed))
    assert network.runs == 6 and len(cuda.named("launch")) == 7
    assert "CUDA graph" in engine.description and "no CUDA graph" not in engine.description
    engine.close()
    cuda.assert_all_freed()


@one_release
def test_warm_up_is_over_before_the_capture(network: Network, cuda: HostCuda) -> None:
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    methods = [call.method for call in cuda.calls]
    first = methods.index("begin_capture")
    assert methods[:first].count("enqueue") == 2
    assert "synchronize" in methods[methods.index("enqueue") : first]
    engine.close()


@one_release
@pytest.mark.parametrize("at", ["begin_capture", "end_capture", "the second end", "the run"])
def test_without_a_graph(network: Network, cuda: HostCuda, at: str) -> None:
    reason = "CUDA failed (cudaErrorStreamCaptureUnsupported)."
    if at == "the run":
        # The first two runs warm the slots up, the third is captured.
        network.before = lambda run: run != 2
        reason = "TensorRT could not run"
    elif at == "the second end":
        real = cuda.end_capture

        def second(stream: Stream) -> Any:
            if len(cuda.named("end_capture")) == 1:
                cuda.fail("end_capture", reason)
                with pytest.raises(EngineError):
                    real(stream)
                for queue in cuda._streams.values():
                    queue.capture = None
                raise EngineError(reason)
            return real(stream)

        cuda.end_capture = second  # type: ignore[method-assign]
    else:
        cuda.fail(at, reason)
        if at == "end_capture":
            # The fake leaves the stream as it is when it is told to fail.
            original = HostCuda.end_capture

            def end(stream: Stream) -> Any:
                try:
                    return original(cuda, stream)
                except EngineError:
                    for queue in cuda._streams.values():
                        queue.capture = None
                    raise

            cuda.end_capture = end  # type: ignore[method-assign]
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    assert f"no CUDA graph ({reason.rstrip('.')}" in engine.description
    for seed in range(5):
        check(engine.run(picture(seed)), picture(seed))
    assert cuda.named("launch") == []
    engine.close()
    cuda.assert_all_freed()


@one_release
def test_package_that_cannot_capture(network: Network, cuda: HostCuda) -> None:
    cuda.captures = False
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    assert "no CUDA graph (host captures none)" in engine.description
    check(engine.run(picture(0)), picture(0))
    engine.close()


# --- fit on the CPU


@one_release
@pytest.mark.parametrize("status", [None, 209])
def test_without_the_kernel(network: Network, cuda: HostCuda, status: int | None) -> None:
    fitter = None if status is None else HostFitter(cuda, status)
    engine = TensorRtEngine(b"plan", SPEC, cuda, fitter=fitter)
    assert re.search(
        r"frames fitted on the CPU \(.*`edgeseg kernels build --cuda`", engine.description
    )
    frame = picture(3, 100, 60)
    geometry, image = fitted(frame, "letterbox")
    prepared = engine.prepare(Frame.of(frame), geometry)
    np.testing.assert_array_equal(prepared.pixels, image)
    check(engine.submit(prepared).outputs(), image)
    with pytest.raises(RequestError, match="submit what prepare"):
        if status is None:
            engine.submit(Prepared(frame, geometry))
        else:
            raise RequestError("submit what prepare")
    engine.close()
    cuda.assert_all_freed()


# --- errors


def report(network: Network, text: str) -> None:
    """Lets TensorRT report an error, to the recorder that it was given."""
    (setting,) = network.trt.named("Runtime.error_recorder")
    code = network.trt.module.ErrorCodeTRT.INTERNAL_ERROR
    assert network.trt.drive(setting.arguments["value"], "report_error", code, text) is False


def test_plan_that_cannot_be_read(network: Network, cuda: HostCuda) -> None:
    text = "Error Code 1: Serialization (Version tag does not match.\n Current Version: 239)"

    def refuse(runtime: Any, plan: Any) -> None:
        assert bytes(plan) == b"damaged"
        report(network, text)

    network.trt.when("Runtime.deserialize_cuda_engine", does=refuse)
    with pytest.raises(EngineError) as raised:
        TensorRtEngine(b"damaged", SPEC, cuda, where="street.plan")
    message = str(raised.value)
    assert message.startswith(f"TensorRT {network.trt.release.version} cannot read street.plan (")
    assert "Current Version: 239" in message and "`edgeseg build`" in message
    assert "\n" not in message
    cuda.assert_all_freed()


def test_errors_reach_the_recorder_and_the_log(network: Network, cuda: HostCuda) -> None:
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    trt = network.trt
    recorder = trt.named("Runtime.error_recorder")[0].arguments["value"]
    (made,) = trt.named("Runtime.__init__")
    logger = made.arguments["logger"]
    severity = trt.module.ILogger.Severity
    report(network, "first")
    trt.drive(logger, "log", severity.ERROR, "second")
    trt.drive(logger, "log", severity.WARNING, "not this")
    assert trt.drive(recorder, "get_num_errors") == 2 == recorder.num_errors()
    assert trt.drive(recorder, "get_error_desc", 1) == "second"
    assert trt.drive(recorder, "get_error_code", 0) == trt.module.ErrorCodeTRT.INTERNAL_ERROR
    assert trt.drive(recorder, "get_error_code", 1) == trt.module.ErrorCodeTRT.UNSPECIFIED_ERROR
    assert trt.drive(recorder, "has_overflowed") is False
    trt.drive(recorder, "clear")
    assert trt.drive(recorder, "get_num_errors") == 0
    engine.close()


@pytest.mark.parametrize("captures", [True, False])
def test_run_that_fails(network: Network, cuda: HostCuda, captures: bool) -> None:
    cuda.captures = captures

    def before(run: int) -> bool:
        if run == 0:
            report(network, "[scopedCudaResources] cuDNN is not there")
            report(network, "[scopedCudaResources] cuDNN is not there")
        return run > 0

    network.before = before
    with pytest.raises(EngineError, match=r"could not run p.plan \(\[scoped.* not there\);"):
        TensorRtEngine(b"plan", SPEC, cuda, where="p.plan")
    cuda.assert_all_freed()


@one_release
def test_run_that_fails_later(network: Network, cuda: HostCuda) -> None:
    cuda.captures = False
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    first = engine.submit(Prepared(picture(0)))
    network.before = lambda run: False
    for _ in range(3):
        with pytest.raises(EngineError, match="it gave no reason"):
            engine.submit(Prepared(picture(1)))
    network.before = lambda run: True
    check(first.outputs(), picture(0))
    for seed in range(3):
        check(engine.run(picture(seed)), picture(seed))
    engine.close()
    cuda.assert_all_freed()


def test_old_reports_are_not_blamed(network: Network, cuda: HostCuda) -> None:
    cuda.captures = False
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    report(network, "something long ago")

    def before(run: int) -> bool:
        report(network, "out of shared memory")
        return False

    network.before = before
    with pytest.raises(EngineError, match=r"could not run the plan \(out of shared memory\);"):
        engine.run(picture(0))
    engine.close()


@one_release
def test_frame_is_let_go_of_when_its_run_fails(network: Network, cuda: HostCuda) -> None:
    cuda.captures = False
    engine = TensorRtEngine(b"plan", SPEC, cuda, fitter=HostFitter(cuda))
    network.before = lambda run: False
    pixels = picture(0, 40, 60)
    camera = Camera(cuda, pixels)
    geometry, _ = fitted(pixels)
    fits = cuda.ran.count("fit_frame")
    with pytest.raises(EngineError, match="could not run"):
        engine.submit(engine.prepare(frame_of(Exporter(camera.interface())), geometry))
    # The fit was queued already: nobody may overwrite the frame before it is over.
    assert cuda.ran.count("fit_frame") == fits + 1
    camera.close()
    engine.close()
    cuda.assert_all_freed()


def test_context_without_memory(network: Network, cuda: HostCuda) -> None:
    network.trt.when("ICudaEngine.device_memory_size_v2", returns=700 << 20)
    network.trt.when("ICudaEngine.create_execution_context", returns=None)
    with pytest.raises(EngineError, match=r"take 700 MiB, and 1024 of 1024 MiB .*; end what else"):
        TensorRtEngine(b"plan", SPEC, cuda)
    cuda.assert_all_freed()


@one_release
def test_out_of_memory_at_any_allocation(network: Network) -> None:
    # Nothing is left behind, whichever allocation fails.
    failed = 0
    for method in ("allocate", "allocate_host", "create_stream", "create_event"):
        for at in range(100):
            cuda = HostCuda()
            network.cuda = cuda
            real, count = getattr(cuda, method), 0

            def counted(*arguments: Any, real: Any = real, at: int = at, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == at + 1:
                    raise EngineError("The GPU has no memory left for this.")
                return real(*arguments, **options)

            setattr(cuda, method, counted)
            try:
                engine = TensorRtEngine(b"plan", SPEC, cuda, fitter=HostFitter(cuda))
            except EngineError as error:
                assert "no memory left" in str(error)
                failed += 1
                cuda.assert_all_freed()
                continue
            engine.close()
            cuda.assert_all_freed()
            break
    assert failed > 15


@one_release
def test_kernel_that_fails(engine: TensorRtEngine, cuda: HostCuda) -> None:
    first, second = (engine.submit(Prepared(picture(seed))) for seed in range(2))
    cuda.fail("synchronize_event", "A kernel failed (cudaErrorIllegalAddress).")
    with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
        first.outputs()
    check(second.outputs(), picture(1))
    check(engine.run(picture(2)), picture(2))


@one_release
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": None}, "it takes nothing, and the model takes image uint8"),
        ({"image": Tensor("INPUT", "FLOAT", IMAGE)}, "takes image float"),
        ({"mean": Tensor("INPUT", "FLOAT", (3,))}, "takes image uint8, mean float"),
        ({"image": Tensor("INPUT", "UINT8", (1, 3, 32, 48))}, r"takes images of \(1, 3, 32, 48\)"),
        ({"image": Tensor("INPUT", "UINT8", (1, 64, 48, 3))}, r"the model's are \(1, 32, 48, 3\)"),
        ({"class_map": None}, r"gives no class_map, and uint8 \(1, 32, 48\) is promised"),
        ({"confidence": None}, "gives no confidence"),
        ({"class_map": Tensor("OUTPUT", "INT32", MASK)}, r"gives int32 \(1, 32, 48\) as class_map"),
        ({"class_map": Tensor("OUTPUT", "UINT8", (32, 48))}, r"gives uint8 \(32, 48\) as"),
        ({"class_map": Tensor("OUTPUT", "UINT8", (1, -1, 48))}, "uint8 of no fixed size as"),
        ({"logits": Tensor("OUTPUT", "BF16", (1, 4, 4, 6))}, "gives logits as bf16"),
    ],
)
def test_plan_of_another_contract(
    network: Network, cuda: HostCuda, change: dict[str, Tensor | None], said: str
) -> None:
    for name, tensor in change.items():
        if tensor is None:
            del network.tensors[name]
        else:
            network.tensors[name] = tensor
    with pytest.raises(EngineError, match=rf"^a.plan is not a plan of stripes: .*{said}.*again$"):
        TensorRtEngine(b"plan", SPEC, cuda, where="a.plan")
    cuda.assert_all_freed()


def test_gpu_that_tensorrt_cannot_use(
    network: Network, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(logger: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(network.trt.module, "Runtime", refuse)
    with pytest.raises(EngineError, match=r"cannot use the GPU \(pybind11::init.*edgeseg doctor"):
        TensorRtEngine(b"plan", SPEC, cuda)
    cuda.assert_all_freed()


@one_release
def test_wrong_number_of_frames(network: Network, cuda: HostCuda) -> None:
    with pytest.raises(RequestError, match="1 or more, and 0 came"):
        TensorRtEngine(b"plan", SPEC, cuda, frames_in_flight=0)


# --- the end


def test_close(network: Network, cuda: HostCuda) -> None:
    engine = TensorRtEngine(b"plan", SPEC, cuda, fitter=HostFitter(cuda))
    flying = [engine.submit(Prepared(picture(seed))) for seed in range(2)]
    engine.close()
    cuda.assert_all_freed()
    engine.close()
    with pytest.raises(RequestError, match="its masks are lost"):
        flying[0].outputs()
    with pytest.raises(RequestError, match="the TensorRT engine is closed"):
        engine.run(picture(0))


@one_release
def test_order_of_the_end(
    network: Network, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    for name in ("_Loaded", "_Network"):
        owner = getattr(tensorrt_module, name)
        close = owner.close

        def noted(this: Any, name: str = name, close: Any = close) -> None:
            ended.append(name)
            close(this)

        monkeypatch.setattr(owner, "close", noted)
    engine = TensorRtEngine(b"plan", SPEC, cuda, fitter=HostFitter(cuda))
    engine.submit(Prepared(picture(0)))
    called = len(cuda.calls)
    engine.close()
    # Frames that are inside, then what they use; the context before the engine it belongs to.
    assert {call.method for call in cuda.calls[called : called + 4]} == {"synchronize"}
    assert ended == ["_Network", "_Loaded"]
    cuda.assert_all_freed()


# --- sizes that depend on the frame


def test_outputs_whose_size_depends_on_the_frame(network: Network, cuda: HostCuda) -> None:
    network.tensors["found"] = Tensor("OUTPUT", "INT32", (-1, 2))
    network.compute = lambda image: {
        "class_map": class_map(image)[None],
        "confidence": confidence(image)[None],
        "found": np.argwhere(image[..., 1] > 200).astype(np.int32)[: int(image[0, 0, 0])],
    }
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    assert "no CUDA graph (the size of found depends on the frame)" in engine.description
    images = [picture(seed) for seed in range(8)]
    images[3][..., 1] = 0  # finds nothing
    images[5][0, 0, 0] = 255
    flying = engine.submit(Prepared(images[0]))
    for index, image in enumerate(images):
        following = engine.submit(Prepared(images[index + 1])) if index < 7 else None
        slot = flying._slot  # type: ignore[attr-defined]
        assert slot is not None
        wanted = network.compute(image)["found"]
        assert next(o for o in slot.outputs if o.tensor.name == "found").shape == wanted.shape
        check(flying.outputs(), image)
        (found,) = [output for output in slot.outputs if output.tensor.name == "found"]
        if following is not None:
            flying = following
        np.testing.assert_array_equal(found.taken(), wanted)
    (allocator,) = network.allocators.values()
    assert len(allocator) == 1
    engine.close()
    cuda.assert_all_freed()


@one_release
def test_no_memory_for_such_an_output(network: Network, cuda: HostCuda) -> None:
    network.tensors["found"] = Tensor("OUTPUT", "INT32", (-1, 2))
    large = False
    network.compute = lambda image: {
        "class_map": class_map(image)[None],
        "confidence": confidence(image)[None],
        "found": np.zeros((1000 if large else 1, 2), np.int32),
    }
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    large = True
    cuda.total = cuda.allocated
    with pytest.raises(EngineError, match="no memory left for this"):
        engine.run(picture(0))
    cuda.total = 1 << 30
    check(engine.run(picture(1)), picture(1))
    engine.close()
    cuda.assert_all_freed()


def test_output_of_unknown_size_that_tensorrt_never_tells(network: Network, cuda: HostCuda) -> None:
    network.tensors["found"] = Tensor("OUTPUT", "INT32", (-1, 2))
    network.compute = lambda image: {
        "class_map": class_map(image)[None],
        "confidence": confidence(image)[None],
        "found": np.zeros((3, 2), np.int32),
    }
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    check(engine.run(picture(0)), picture(0))
    # It told before: that is not to be taken for this frame's.
    network.trt.when("IExecutionContext.execute_async_v3", returns=True)
    for seed in range(3):
        with pytest.raises(EngineError, match="TensorRT could not run"):
            engine.run(picture(seed))
    engine.close()
    cuda.assert_all_freed()


def test_sizes_that_the_plan_leaves_open(network: Network, cuda: HostCuda) -> None:
    network.tensors["image"] = Tensor("INPUT", "UINT8", (-1, -1, -1, 3))
    for name in ("class_map", "confidence"):
        network.tensors[name] = Tensor("OUTPUT", "UINT8", (-1, -1, -1), MASK)
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    (setting,) = network.trt.named("IExecutionContext.set_input_shape")
    assert tuple(setting.arguments.values()) == ("image", IMAGE)
    check(engine.run(picture(0)), picture(0))
    engine.close()
    network.trt.when("IExecutionContext.set_input_shape", returns=False)
    with pytest.raises(EngineError, match=r"takes images of \(-1, -1, -1, 3\)"):
        TensorRtEngine(b"plan", SPEC, HostCuda())


# --- layers


def test_layer_times(network: Network, cuda: HostCuda) -> None:
    network.layers = (("conv1 + relu", 1.5), ("head", 0.25))
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    runs, graphs = network.runs, len(cuda.named("end_capture"))
    images = [picture(seed) for seed in range(4)]
    # Runs are 10 ms longer every second time; the first, which warms up, does not count.
    assert runs % 2 == 0
    found = engine.layer_times(images)
    assert network.runs - runs == 5
    assert [name for name, _ in found] == ["conv1 + relu", "head"]
    assert [ms for _, ms in found] == pytest.approx([6.5, 5.25])
    assert len(cuda.named("end_capture")) == graphs and cuda.named("launch") == []
    # A context of its own: frames run as before, and are not timed.
    assert len(network.trt.named("ICudaEngine.create_execution_context")) == 2
    check(engine.run(picture(9)), picture(9))
    assert network.runs - runs == 5
    engine.close()
    cuda.assert_all_freed()


@one_release
def test_layer_times_of_nothing(network: Network, cuda: HostCuda) -> None:
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    with pytest.raises(RequestError, match="none came"):
        engine.layer_times([])
    with pytest.raises(FrameError, match="came"):
        engine.layer_times([picture(0, 5, 5)])
    with pytest.raises(EngineError, match="reported no times"):
        engine.layer_times([picture(0)])
    pending = engine.submit(Prepared(picture(0)))
    with pytest.raises(RequestError, match="no frame is in flight"):
        engine.layer_times([picture(0)])
    check(pending.outputs(), picture(0))
    engine.close()
    cuda.assert_all_freed()


# --- frames on the GPU


@dataclass(eq=False)
class Exporter:
    """Another library's array; ``interface`` as it describes it."""

    interface: dict[str, Any]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface


class Camera:
    """Frames in device memory, written by a stream of somebody else's."""

    def __init__(
        self, cuda: HostCuda, pixels: Pixels, *, pitch: int = 0, late: bool = True
    ) -> None:
        height, width = pixels.shape[:2]
        self.pitch = pitch or 3 * width
        self.cuda = cuda
        self.shape = (height, width, 3)
        with cuda.current():
            self.stream = cuda.create_stream()
            self.address = cuda.allocate((height - 1) * self.pitch + 3 * width)

            def write() -> None:
                for row in range(height):
                    at = self.address + row * self.pitch
                    cuda.array(at, (3 * width,), np.uint8)[:] = pixels[row].reshape(-1)

            cuda.enqueue(self.stream, "camera", write)
            if not late:
                cuda.synchronize(self.stream)

    def interface(self, **changes: Any) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": (self.pitch, 3, 1),
            "version": 3,
            "stream": int(self.stream),
            **changes,
        }

    def close(self) -> None:
        with self.cuda.current():
            self.cuda.synchronize(self.stream)
            self.cuda.destroy_stream(self.stream)
            self.cuda.free(self.address)


@one_release
@pytest.mark.parametrize("pitch", [0, 256])
@pytest.mark.parametrize("size", [(32, 48), (50, 70)])
def test_frame_on_the_gpu(
    engine: TensorRtEngine, cuda: HostCuda, size: tuple[int, int], pitch: int
) -> None:
    pixels = picture(4, *size)
    camera = Camera(cuda, pixels, pitch=pitch)
    frame = frame_of(Exporter(camera.interface()))
    assert isinstance(frame, DeviceFrame) and (frame.height, frame.width) == size
    geometry, image = fitted(pixels)
    uploads = len(cuda.named("copy_to_device"))
    pending = engine.submit(engine.prepare(frame, geometry))
    # The host neither saw the pixels nor waited for the camera.
    assert len(cuda.named("copy_to_device")) == uploads and "camera" not in cuda.ran
    check(pending.outputs(), image)
    camera.close()


@one_release
@pytest.mark.parametrize(
    "changes",
    [
        {"stream": None},
        {"strides": None},
        {"version": 2, "stream": LEGACY_STREAM},
        {"version": 2},
        {"typestr": "<u1"},
    ],
)
def test_interfaces(engine: TensorRtEngine, cuda: HostCuda, changes: dict[str, Any]) -> None:
    pixels = picture(5, 40, 60)
    camera = Camera(cuda, pixels, late=False)
    geometry, image = fitted(pixels)
    frame = frame_of(Exporter(camera.interface(**changes)))
    check(engine.submit(engine.prepare(frame, geometry)).outputs(), image)
    camera.close()


@one_release
def test_work_on_the_default_stream_is_waited_for(engine: TensorRtEngine, cuda: HostCuda) -> None:
    pixels = picture(6, 40, 60)
    camera = Camera(cuda, np.zeros_like(pixels), late=False)
    with cuda.current():
        cuda.enqueue(
            LEGACY_STREAM,
            "torch",
            lambda: np.copyto(cuda.array(camera.address, pixels.shape, np.uint8), pixels),
        )
    geometry, image = fitted(pixels)
    interface = camera.interface(version=2)
    del interface["stream"]
    frame = frame_of(Exporter(interface))
    check(engine.submit(engine.prepare(frame, geometry)).outputs(), image)
    camera.close()


@one_release
def test_owner_is_kept_until_the_outputs_are_there(engine: TensorRtEngine, cuda: HostCuda) -> None:
    pixels = picture(7, 40, 60)
    camera = Camera(cuda, pixels)
    exporter = Exporter(camera.interface())
    there = weakref.ref(exporter)
    geometry, image = fitted(pixels)
    pending = engine.submit(engine.prepare(frame_of(exporter), geometry))
    del exporter
    gc.collect()
    assert there() is not None
    check(pending.outputs(), image)
    gc.collect()
    assert there() is None
    camera.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": (40, 60)}, r"\(40, 60\) came; repeat the grey channel"),
        ({"shape": (40, 60, 1)}, "repeat the grey channel"),
        ({"shape": (40, 60, 4)}, r"take \[..., :3\]"),
        ({"shape": (3, 40, 60)}, "channels come last: .permute"),
        ({"shape": (1, 40, 60, 3)}, r"take \[0\]"),
        ({"shape": (0, 60, 3)}, r"\(0, 60, 3\) came"),
        ({"shape": (40, 60, 3, 3, 3)}, "came$"),
        ({"typestr": "<f4"}, r"one of <f4 came; scale it to 0-255 .*\.to\(torch.uint8\)"),
        ({"typestr": "|b1"}, r"\|b1 came"),
        ({"strides": (180, 3, -1)}, r"strides of \(180, 3, -1\) bytes came; make it contiguous"),
        ({"strides": (-180, 3, 1)}, "make it contiguous"),
        ({"strides": (360, 6, 1)}, "make it contiguous"),
        ({"strides": (90, 3, 1)}, "make it contiguous"),
        ({"strides": (3, 120, 1)}, "make it contiguous"),
        ({"stream": 0}, "stream 0 came"),
        ({"mask": object()}, "a masked array came"),
        ({"data": None}, r"cannot be read \(TypeError"),
        ({"shape": None}, r"cannot be read \(TypeError"),
    ],
)
def test_interfaces_that_are_no_frame(
    host_cuda: HostCuda, changes: dict[str, Any], said: str
) -> None:
    interface = {
        "shape": (40, 60, 3),
        "typestr": "|u1",
        "data": (4096, False),
        "strides": (180, 3, 1),
        "version": 3,
        "stream": None,
    }
    frame_of(Exporter(interface))
    with pytest.raises(FrameError, match=said) as raised:
        frame_of(Exporter({**interface, **changes}))
    assert str(raised.value).startswith("a frame on the GPU is (height, width, 3) uint8 in BGR")


def test_strides_of_an_axis_of_length_1_mean_nothing() -> None:
    interface = {"typestr": "|u1", "data": (4096, False), "version": 3, "stream": None}
    for shape, strides in (((1, 60, 3), (7, 3, 1)), ((40, 1, 3), (99, 5, 1))):
        frame = frame_of(Exporter({**interface, "shape": shape, "strides": strides}))
        assert isinstance(frame, DeviceFrame) and frame.device.pitch >= 3 * shape[1]


@one_release
def test_frame_on_the_gpu_for_an_engine_that_fits_on_the_cpu(
    network: Network, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = picture(8, 40, 60)
    camera = Camera(cuda, pixels, pitch=192)
    opened = Borrowed(cuda)
    monkeypatch.setattr("edgeseg.engine.device_frame.open_cuda", lambda: opened)
    frame = frame_of(Exporter(camera.interface()))
    engine = TensorRtEngine(b"plan", SPEC, cuda)
    geometry, image = fitted(pixels)
    check(engine.submit(engine.prepare(frame, geometry)).outputs(), image)
    # Copied once, and for whoever draws on it.
    np.testing.assert_array_equal(frame.pixels, pixels)
    assert opened.times_closed == 1
    camera.close()
    engine.close()
    cuda.assert_all_freed()


class Borrowed:
    """A second opening of the same GPU."""

    def __init__(self, cuda: HostCuda) -> None:
        self._cuda = cuda
        self.times_closed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)

    def close(self) -> None:
        self.times_closed += 1


@one_release
def test_model_takes_frames_on_the_gpu(
    engine: TensorRtEngine, cuda: HostCuda, bundle_folder: Path
) -> None:
    bundle = replace(Bundle.open(bundle_folder), spec=SPEC)
    pixels = picture(9, 64, 96)
    camera = Camera(cuda, pixels)
    result = Model(bundle, engine)(Exporter(camera.interface()))
    geometry, image = fitted(pixels)
    np.testing.assert_array_equal(result.class_map, geometry.restore(class_map(image)))
    assert result.class_map.shape == (64, 96)
    camera.close()


# --- DLPack


class _Managed(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class Tensorlike:
    """A tensor of another library that gives DLPack; it notes streams and ended capsules."""

    # Capsules outlive the tensor that gave them, and here what ends them is part of it.
    made: ClassVar[list[Tensorlike]] = []

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int] | None,
        *,
        device: tuple[int, int] = (2, 0),
        element: tuple[int, int, int] = (1, 8, 1),
        offset: int = 0,
        name: bytes = b"dltensor",
    ) -> None:
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        steps = (ctypes.c_int64 * len(shape))(*strides) if strides is not None else None
        self.device = device
        self.streams: list[Any] = []
        self.ended = 0
        self._kept = (sizes, steps)
        self._name = name
        self._managed = _Managed(
            address, *device, len(shape), *element, sizes, steps, offset, None, None
        )

        def end(capsule: int) -> None:
            self.ended += 1

        self._end = _DESTRUCTOR(end)
        self.made.append(self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.streams.append(stream)
        return _new_capsule(ctypes.addressof(self._managed), self._name, self._end)


@one_release
def test_dlpack(engine: TensorRtEngine, cuda: HostCuda) -> None:
    pixels = picture(10, 40, 60)
    camera = Camera(cuda, pixels, pitch=200, late=False)
    tensor = Tensorlike(camera.address - 16, (40, 60, 3), (200, 3, 1), offset=16)
    geometry, image = fitted(pixels)
    frame = frame_of(tensor)
    assert tensor.streams == [LEGACY_STREAM]
    pending = engine.submit(engine.prepare(frame, geometry))
    del frame
    gc.collect()
    assert tensor.ended == 0
    check(pending.outputs(), image)
    del pending
    gc.collect()
    assert tensor.ended == 1
    camera.close()


@one_release
def test_dlpack_without_strides(engine: TensorRtEngine, cuda: HostCuda) -> None:
    pixels = picture(11, 40, 60)
    camera = Camera(cuda, pixels, late=False)
    geometry, image = fitted(pixels)
    frame = frame_of(Tensorlike(camera.address, (40, 60, 3), None, device=(13, 0)))
    check(engine.submit(engine.prepare(frame, geometry)).outputs(), image)
    camera.close()


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (Tensorlike(4096, (3, 40, 60), None), "channels come last"),
        (Tensorlike(4096, (40, 60, 3), (180, 3, 1), element=(2, 32, 1)), "one of float32 came"),
        (Tensorlike(4096, (40, 60, 3), (180, 3, 1), element=(0, 8, 1)), "one of int8 came"),
        (Tensorlike(4096, (40, 60, 3), (180, 3, 1), element=(6, 8, 1)), "one of bool8 came"),
        (Tensorlike(4096, (40, 60, 3), (180, 3, 1), element=(1, 8, 4)), "in groups of 4 came"),
        (Tensorlike(4096, (40, 60, 3), (1, 40, 2400)), "make it contiguous"),
        (Tensorlike(4096, (40, 60, 3), None, device=(2, 1)), "one on GPU 1 came"),
        (Tensorlike(4096, (40, 60, 3), None, device=(10, 0)), "device type 10 came"),
        (Tensorlike(4096, (40, 60, 3), None, name=b"used_dltensor"), r"cannot be read \(ValueErr"),
    ],
)
def test_dlpack_that_is_no_frame(tensor: Tensorlike, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        frame_of(tensor)
    gc.collect()
    assert tensor.ended == len(tensor.streams)


class Wrapped:
    """An array on the host that is not numpy's."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def test_dlpack_on_the_host() -> None:
    pixels = picture(12, 40, 60)
    frame = frame_of(Wrapped(pixels))
    assert not isinstance(frame, DeviceFrame) and np.shares_memory(frame.pixels, pixels)
    with pytest.raises(FrameError, match="cvtColor"):
        frame_of(Wrapped(pixels[..., 0].copy()))
    with pytest.raises(FrameError, match="list came"):
        frame_of([[1, 2, 3]])


@pytest.mark.slow
def test_tensor_of_pytorch_on_the_host() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch gives the tensor of this test")
    pixels = picture(13, 40, 60)
    tensor = torch.from_numpy(pixels)
    assert np.shares_memory(frame_of(tensor).pixels, pixels)
    with pytest.raises(FrameError, match="float32 came"):
        frame_of(tensor.float())


# --- the pipeline


@one_release
@pytest.mark.parametrize("live", [False, True])
def test_pipeline(engine: TensorRtEngine, cuda: HostCuda, live: bool) -> None:
    uri = f"synthetic:?size=96x128&frames=20{'&live=1&fps=200' if live else ''}"
    seen = []
    with Pipeline(engine, open_source(uri), max_frames=20) as results:
        for result in results:
            geometry = Geometry.between(96, 128, SPEC)
            image = geometry.fit(result.frame.pixels)
            np.testing.assert_array_equal(result.class_map, geometry.restore(class_map(image)))
            seen.append(result.index)
    assert seen == sorted(seen) and (live or seen == list(range(20)))
    summary = results.ledger.summary()
    assert {"capture", "fit", "network", "head", "restore"} <= set(summary.stages)
    # All came back: the engine can be used again.
    check(engine.run(picture(0)), picture(0))


# --- with the kernel itself, on the emulation of CUDA


@pytest.fixture(scope="module")
def fit_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The launcher of fit_frame, its kernel compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("the emulation of CUDA is compiled with g++, which is not here")
    root = Path(__file__).parents[2]
    target = tmp_path_factory.mktemp("fit") / "libedgeseg_cuda.so"
    subprocess.run(
        ["g++", "-x", "c++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared",
         "-Wno-unknown-pragmas", "-DEDGESEG_CUDA_EMULATION", f"-I{root / 'tests' / 'kernels'}",
         f"-I{root / 'kernels' / 'include'}",
         *(root / "kernels" / "cuda" / name for name in ("fit_frame.cu", "library.cu")),
         "-o", target],
        check=True,
    )  # fmt: skip
    return launchers.typed(ctypes.CDLL(str(target)))


@one_release
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_fit_by_the_kernel(
    network: Network, cuda: HostCuda, fit_library: ctypes.CDLL, fit: Fit
) -> None:
    # The class map is the image that the network saw.
    network.compute = lambda image: {
        "class_map": image[..., 1][None].copy(),
        "confidence": image[..., 0][None].copy(),
    }
    engine = TensorRtEngine(b"plan", SPEC, cuda, fitter=cuda.queueing(fit_library))
    for seed, size in enumerate([(64, 96), (33, 47), (480, 640), (32, 48), (5, 7), (1, 1)]):
        pixels = picture(seed, *size)
        geometry, image = fitted(pixels, fit)
        camera = Camera(cuda, pixels, pitch=3 * size[1] + 13)
        on_the_host = engine.submit(engine.prepare(Frame.of(pixels), geometry))
        on_the_gpu = engine.submit(engine.prepare(frame_of(Exporter(camera.interface())), geometry))
        for pending in (on_the_host, on_the_gpu):
            outputs = pending.outputs()
            assert outputs.confidence is not None
            for plane, channel in ((outputs.class_map, 1), (outputs.confidence, 0)):
                assert np.abs(plane.astype(int) - image[..., channel]).max() <= 1
        camera.close()
    engine.close()
    cuda.assert_all_freed()


# --- from a bundle


class Workshop:
    """A machine with TensorRT, a GPU and the bundle of the tiny network."""

    def __init__(
        self, network: Network, tiny: Tiny, folder: Path, patch: pytest.MonkeyPatch
    ) -> None:
        self.network = network
        self.cuda = network.cuda
        self.bundle = Bundle.open(folder)
        self.version = network.trt.release.version
        self.folder = folder
        self.patch = patch
        self.builds: list[BuildOptions] = []
        self.plugins: Path | None = None
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        network.tensors.pop("confidence", None)
        network.compute = lambda image: {"class_map": tiny.class_map(image)[None]}
        specification = importlib.machinery.ModuleSpec("tensorrt", None)
        patch.setattr(network.trt.module, "__spec__", specification)
        patch.setattr("edgeseg.engine.cuda.open_cuda", lambda: Borrowed(self.cuda))
        patch.setattr("edgeseg.engine.tensorrt.open_cuda", lambda: self.cuda)
        patch.setattr("edgeseg.engine.tensorrt.build_plan", self.build)
        patch.setattr("edgeseg.engine.tensorrt.find_plugin_library", lambda major: self.plugins)
        patch.setattr("edgeseg.engine.tensorrt.find_cuda_library", lambda: None)

    def save(self, content: bytes = b"plan", **changes: Any) -> Plan:
        """Puts a plan for this machine beside the bundle, or one that differs from it."""
        options = changes.pop("options", BuildOptions(plugins=False))
        stem = plan_stem(options, tensorrt_version=self.version, device=self.cuda.device)
        plan = Plan(
            path=plan_folder(self.bundle) / f"{stem}.plan",
            sha256=hashlib.sha256(content).hexdigest(),
            onnx_sha256=hashlib.sha256(self.bundle.model.content).hexdigest(),
            tensorrt=self.version,
            device=self.cuda.device,
            options=options,
            library=None,
            workspace_bytes=1 << 20,
            attestation=Attestation(9, {"int8": 7, "fp16": 2}, (), 1, 0, 0, ()),
            warnings=("a layer is slow",),
            build_seconds=12.0,
            edgeseg="1",
        )
        plan = replace(plan, **changes)
        save_plan(plan, content)
        return plan

    def build(
        self,
        bundle: Bundle,
        options: BuildOptions,
        *,
        cuda: Any,
        plugin_library: Path | None,
        report: Callable[[int, int], None],
    ) -> Plan:
        assert bundle is self.bundle and cuda is self.cuda and plugin_library == self.plugins
        self.builds.append(options)
        report(50, 100)
        resolved = options.resolved(has_operators=True, library_here=plugin_library is not None)
        return self.save(options=resolved)


@pytest.fixture
def workshop(
    network: Network, tiny: Tiny, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Workshop:
    return Workshop(network, tiny, bundle_folder, monkeypatch)


def test_plan_that_fits_is_used(
    workshop: Workshop, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = workshop.save(b"the plan")
    engine = open_engine(workshop.bundle)
    assert engine.name == "tensorrt" and workshop.builds == []
    (call,) = workshop.network.trt.named("Runtime.deserialize_cuda_engine")
    assert call.arguments == {"serialized_engine": b"the plan"}
    # The golden picture went through it.
    assert len(workshop.cuda.named("launch")) == 1
    image = tiny.picture(1)
    np.testing.assert_array_equal(engine.run(image).class_map, tiny.class_map(image))
    assert re.fullmatch(
        rf"TensorRT {re.escape(workshop.version)}, Host, int8 and fp16, head in the graph, frames "
        r"fitted on the CPU \(.*\), CUDA graph",
        engine.description,
    )
    assert capsys.readouterr() == ("", "")
    engine.close()
    workshop.cuda.assert_all_freed()
    assert plan.path.read_bytes() == b"the plan"


@one_release
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (None, "no plan has been built here yet"),
        ({"tensorrt": "10.1.0"}, "built by TensorRT 10.1.0, and 11.4.0.106 is here"),
        ({"onnx_sha256": "0" * 64}, "built from another ONNX file"),
        ({"sha256": "0" * 64}, "is damaged"),
        ({"library": PluginLibrary("p.so", "0")}, "uses the plugin library p.so, which is not he"),
    ],
)
def test_plan_that_does_not_fit_is_built_again(
    workshop: Workshop,
    changes: dict[str, Any] | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if changes is not None:
        workshop.save(**changes)
    engine = open_engine(workshop.bundle, "tensorrt")
    (options,) = workshop.builds
    assert options == BuildOptions()
    out, err = capsys.readouterr()
    first = err.splitlines()[0]
    assert out == "" and first.startswith("tiny: ") and said in first
    assert first.endswith("building one for Host (compute capability 8.7), which takes minutes")
    assert "TensorRT warns: a layer is slow" in err
    engine.close()
    # The next time it is there.
    workshop.cuda.closed = False
    open_engine(workshop.bundle, "tensorrt").close()
    assert len(workshop.builds) == 1


@one_release
def test_plugins_that_are_not_here(workshop: Workshop) -> None:
    with pytest.raises(EngineError, match="plugins, and their library is not here"):
        open_engine(workshop.bundle, "tensorrt", compiled_head=True)
    workshop.cuda.assert_all_freed()


@one_release
@pytest.mark.parametrize("compiled_head", [None, True, False])
def test_plugins_as_asked(workshop: Workshop, tmp_path: Path, compiled_head: bool | None) -> None:
    workshop.plugins = tmp_path / "libedgeseg_plugins.so"
    workshop.plugins.write_bytes(b"plugins")
    # A plan of the other kind fits the machine, and not what is asked.
    if compiled_head is not None:
        workshop.save(options=BuildOptions(plugins=not compiled_head))
    trt = workshop.network.trt
    loaded = []

    def load_plugins(path: Path) -> None:
        assert trt.named("Runtime.deserialize_cuda_engine") == []
        loaded.append(path)

    workshop.patch.setattr("edgeseg.engine.tensorrt.load_plugins", load_plugins)
    open_engine(workshop.bundle, "tensorrt", compiled_head=compiled_head).close()
    assert workshop.builds == [BuildOptions(plugins=compiled_head)]
    assert loaded == ([] if compiled_head is False else [workshop.plugins])


@one_release
def test_what_a_plan_needs_said_before_it_is_loaded(workshop: Workshop) -> None:
    workshop.save(options=BuildOptions(plugins=False, version_compatible=True, dla=1))
    open_engine(workshop.bundle, "tensorrt").close()
    trt = workshop.network.trt
    names = [call.name for call in trt.calls]
    for name, value in (("Runtime.engine_host_code_allowed", True), ("Runtime.DLA_core", 1)):
        (setting,) = trt.named(name)
        assert setting.arguments == {"value": value}
        assert names.index(name) < names.index("Runtime.deserialize_cuda_engine")


@one_release
def test_plain_plans_get_no_rights(workshop: Workshop) -> None:
    workshop.save()
    open_engine(workshop.bundle, "tensorrt").close()
    trt = workshop.network.trt
    assert trt.named("Runtime.engine_host_code_allowed") == trt.named("Runtime.DLA_core") == []


@one_release
def test_other_masks_than_at_export(workshop: Workshop) -> None:
    workshop.save()
    workshop.network.compute = lambda image: {"class_map": np.full(MASK, 2, np.uint8)}
    with pytest.raises(EngineError, match=r"TensorRT .* gives other masks than those"):
        open_engine(workshop.bundle, "tensorrt")
    workshop.cuda.assert_all_freed()


@one_release
def test_kernel_library_is_used(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.save()
    monkeypatch.setattr("edgeseg.engine.tensorrt.find_cuda_library", lambda: Path("libcuda.so"))
    opened = []

    def open_library(path: Path) -> HostFitter:
        opened.append(path)
        return HostFitter(workshop.cuda)

    monkeypatch.setattr(launchers, "open_library", open_library)
    engine = open_engine(workshop.bundle, "tensorrt")
    assert opened == [Path("libcuda.so")] and "frames fitted on the GPU" in engine.description
    engine.close()


@one_release
def test_error_of_the_builder_leaves_nothing_open(workshop: Workshop) -> None:
    def fail(*arguments: Any, **options: Any) -> Plan:
        raise EngineError("TensorRT ran out of memory")

    workshop.patch.setattr("edgeseg.engine.tensorrt.build_plan", fail)
    with pytest.raises(EngineError, match="ran out of memory"):
        open_engine(workshop.bundle, "tensorrt")
    workshop.cuda.assert_all_freed()


# --- whether it is the default


NO_GPU = "No NVIDIA GPU or driver here (cudaErrorNoDevice); `nvidia-smi` shows whether there is one"


@one_release
@pytest.mark.parametrize("what", ["GPU", "library"])
def test_default_without_what_it_needs(
    workshop: Workshop,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("openvino", reason="the engine that takes over")

    def fail(*arguments: Any) -> Any:
        if what == "GPU":
            raise EngineError(NO_GPU)
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    if what == "GPU":
        reason = NO_GPU
        monkeypatch.setattr("edgeseg.engine.cuda.open_cuda", fail)
        monkeypatch.setattr("edgeseg.engine.tensorrt.open_cuda", fail)
    else:
        reason = "it cannot be loaded (libnvinfer.so.10: cannot open shared object file)"
        import_module = importlib.import_module

        def broken(name: str, package: str | None = None) -> Any:
            return fail() if name == "tensorrt" else import_module(name, package)

        monkeypatch.setattr(importlib, "import_module", broken)
    assert passed_over() == {"tensorrt": reason}
    assert "tensorrt" not in available_engines()
    engine = open_engine(workshop.bundle)
    assert engine.name == "openvino"
    assert capsys.readouterr().err == f"tensorrt is passed over: {reason}\n"
    engine.close()
    if what == "GPU":
        with pytest.raises(EngineError, match=r"^No NVIDIA GPU or driver"):
            open_engine(workshop.bundle, "tensorrt")


@one_release
def test_default_with_all_it_needs(workshop: Workshop) -> None:
    assert passed_over() == {} and available_engines()[0] == "tensorrt"


@one_release
def test_nothing_but_an_engine_that_cannot_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: find_spec(name, package) if name == "tensorrt" else None,
    )

    def fail() -> Any:
        raise EngineError(NO_GPU)

    monkeypatch.setattr("edgeseg.engine.cuda.open_cuda", fail)
    with pytest.raises(EngineError, match=r"can run here \(tensorrt: No NVIDIA .*pip insta"):
        open_engine(workshop.bundle)
