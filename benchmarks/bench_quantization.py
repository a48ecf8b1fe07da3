"""INT8 by EdgeSeg and by other tools: accuracy, speed, and what stayed in fp32.

One network, the one in front of the head of a bundle, is quantized by every configuration of
ONNX Runtime, NNCF and NVIDIA Model Optimizer that `peers.py` lists, with the same calibration
frames. What comes out is treated alike:

- accuracy: mIoU over the whole validation split, the head in the compiled kernel
- "mIoU as written": the same with quantizers computed in fp32, which tells a graph that is not
  accurate from one that the INT8 kernels of this processor do not follow
- speed: network and head, frame by frame, all of them taking turns in one process
- convolutions left in fp32: in the graph (weights or activations that come from no quantizer),
  and by the precision in which OpenVINO says that it runs each

The peers get the network with fp16 storage undone and batch norms folded, since some of them read
neither as it is. They live in a virtual environment of their own, made in build/peers when it is
not there, or taken from --venv; a torch of PyPI makes it large, and a pip that is configured for
CPU wheels makes it small. A configuration that fails is reported and left out.

End to end, that is, a frame resized, through network and head, and the mask brought back to the
frame's size, the bundles are compared with a PyTorch eager loop that does the same.

    python benchmarks/bench_quantization.py --data camvid:DIR [--calibration camvid:DIR]
        [--bundle streets] [--ours streets-int8] [--venv DIR] [--peers ort,nncf,modelopt]
        [--size 736x960] [--memory] [--json FILE]

The table is Markdown on standard output; with --json - it goes to standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import openvino
import peers
import torch
from bench_end_to_end import ARCHITECTURE, EagerLoop
from numpy.typing import NDArray
from onnx import numpy_helper
from peers import CONFIGURATIONS, PINNED, TOOLS, Configuration
from rounds import Spread, add_output_arguments, in_turn, machine, ratio, say, write_json

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.dataset import Dataset, open_dataset
from edgeseg.engine import Engine
from edgeseg.engine.base import OneAtATime
from edgeseg.engine.head import checked_input, run_head
from edgeseg.errors import EdgeSegError
from edgeseg.evaluate import Evaluation, evaluate
from edgeseg.export.models import create_semantic
from edgeseg.export.onnx import export_network
from edgeseg.export.weights import load_weights
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.onnxfile import Head
from edgeseg.result import Outputs
from edgeseg.spec import ModelSpec, parse_size

Size = tuple[int, int]

PACKAGES = ("edgeseg", "openvino", "onnxruntime", "onnx", "torch", "opencv-python", "numpy")
ENGINES = ("openvino", "onnxruntime")
QUICK_DATA = "synthetic:?frames=4"
BUILD = Path(__file__).resolve().parents[1] / "build" / "peers"
# What a calibration of 100 frames is measured at: a frame of this size, and the network for it.
MEMORY_FRAME = (720, 960)

DROP_TARGET = 0.3
OF_FP32_TARGET = 2.3
OF_EAGER_TARGET = 5.0
OF_NNCF_TARGET = 1.0
MEMORY_TARGET_MIB = 2048

# What gives the same whether it comes before or behind a quantizer of one scale: it moves values,
# or takes the largest.
_ONNX_COMMUTES = (
    *("Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice"),
    *("Split", "Squeeze", "Transpose", "Unsqueeze"),
)
_OPENVINO_COMMUTES = (
    *("Concat", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice"),
    *("Transpose", "Unsqueeze", "VariadicSplit"),
)
_INTEGERS = frozenset({"i8", "u8", "i4", "u4"})
_FOLLOWED = 200


@dataclass(frozen=True)
class Convolutions:
    """How many convolutions a graph has, and the names of those it leaves in fp32."""

    total: int
    fp32: tuple[str, ...]

    @classmethod
    def in_onnx(cls, model: onnx.ModelProto) -> Convolutions:
        """Of a Q/DQ graph: INT8 where image and kernel both come from a DequantizeLinear."""
        made_by = {name: node for node in model.graph.node for name in node.output}

        def quantized(name: str, depth: int = 0) -> bool:
            node = made_by.get(name)
            if node is None or depth > _FOLLOWED:
                return False
            if node.op_type == "DequantizeLinear":
                return True
            if node.op_type == "Resize":
                modes = [a.s for a in node.attribute if a.name == "mode"]
                return modes in ([], [b"nearest"]) and quantized(node.input[0], depth + 1)
            if node.op_type not in _ONNX_COMMUTES:
                return False
            inputs = node.input if node.op_type == "Concat" else node.input[:1]
            return all(quantized(found, depth + 1) for found in inputs)

        found = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
        return cls(
            len(found),
            tuple(
                node.name or node.output[0]
                for node in found
                if not all(quantized(name) for name in node.input[:2])
            ),
        )

    @classmethod
    def in_openvino(cls, model: Any) -> Convolutions:
        """Of an OpenVINO model: INT8 where image and kernel both come from a FakeQuantize.

        A kernel may also be stored as integers with a scale behind them, which is what remains of
        a FakeQuantize when the model is saved.
        """

        def quantized(node: Any, depth: int = 0) -> bool:
            kind = node.get_type_name()
            if kind == "FakeQuantize":
                return True
            if depth > _FOLLOWED:
                return False
            if kind == "Constant":
                return node.get_element_type().get_type_name() in _INTEGERS
            if kind in ("Convert", "Subtract", "Multiply"):
                # Only a constant scale or shift; a product of two images is none.
                others = [value.get_node() for value in node.input_values()[1:]]
                if any(not _is_constant(other) for other in others):
                    return False
            elif kind == "Interpolate":
                if node.get_attributes().get("mode") != "nearest":
                    return False
            elif kind not in _OPENVINO_COMMUTES:
                return False
            inputs = node.input_values() if kind == "Concat" else node.input_values()[:1]
            return all(quantized(value.get_node(), depth + 1) for value in inputs)

        found = [
            node
            for node in model.get_ordered_ops()
            if node.get_type_name() in ("Convolution", "GroupConvolution")
            or node.get_type_name().endswith("ConvolutionBackpropData")
        ]
        return cls(
            len(found),
            tuple(
                node.get_friendly_name()
                for node in found
                if not all(quantized(value.get_node()) for value in node.input_values()[:2])
            ),
        )

    @classmethod
    def of(cls, path: Path) -> Convolutions:
        """Of the ONNX file or OpenVINO IR at ``path``."""
        if path.suffix == ".onnx":
            return cls.in_onnx(onnx.load(path))
        return cls.in_openvino(openvino.Core().read_model(path))


def _is_constant(node: Any) -> bool:
    if node.get_type_name() == "Convert":
        return _is_constant(node.input_value(0).get_node())
    return bool(node.get_type_name() == "Constant")


def executed_precisions(compiled: Any) -> dict[str, int]:
    """How OpenVINO runs the convolutions of a compiled model: {"i8": 50, "f32": 6}, by name."""
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        described = node.get_rt_info()
        if described["layerType"].astype(str) in ("Convolution", "Deconvolution"):
            counts[described["runtimePrecision"].astype(str)] += 1
    return dict(sorted(counts.items(), key=lambda entry: (entry[0] not in _INTEGERS, entry[0])))


@dataclass(frozen=True)
class Candidate:
    """One form of the network: its file, who made it, and in how many seconds.

    ``tool`` is "fp32", "ours", or one of ``peers.TOOLS``.
    """

    name: str
    tool: str
    model: Path
    seconds: float | None = None


class OpenVinoNetwork(OneAtATime):
    """A candidate on OpenVINO with the compiled head, at any ``size`` (height, width).

    Keeps `edgeseg.engine.base.Engine`'s contract. The same options as EdgeSeg's own engine.
    ``in_fp32`` leaves quantizers where they are and computes everything in fp32: what the graph
    says, whatever the kernels for INT8 make of it.
    """

    name = "openvino"

    def __init__(
        self,
        model: Path,
        spec: ModelSpec,
        head: Head,
        size: Size,
        threads: int,
        *,
        in_fp32: bool = False,
    ) -> None:
        self.spec, self._head, self._threads = _sized(spec, head, size, threads)
        self.description = f"{model.stem} on OpenVINO {openvino.__version__.split('-')[0]}"
        core = openvino.Core()
        network = core.read_model(model)
        wanted = [1, *size, 3]
        if list(network.input(0).shape) != wanted:
            network.reshape(wanted)
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
        }
        if in_fp32:
            options["LP_TRANSFORMS_MODE"] = False
        compiled = core.compile_model(network, "CPU", options)
        self.executed = executed_precisions(compiled)
        self._request: Any = compiled.create_infer_request()
        self._logits: Any = self._request.get_output_tensor(0)

    def run(self, pixels: Pixels) -> Outputs:
        """See ``Engine.run``."""
        image = checked_input(pixels, self.spec)
        self._request.set_input_tensor(openvino.Tensor(image, shared_memory=True))
        self._request.infer()
        return Outputs(*run_head(self._head, self._logits.data, self._threads))

    def close(self) -> None:
        """Lets the compiled model go."""
        self._request = self._logits = None


class OnnxRuntimeNetwork(OneAtATime):
    """A candidate on ONNX Runtime with the compiled head, at the size of its file."""

    name = "onnxruntime"

    def __init__(self, model: Path, spec: ModelSpec, head: Head, size: Size, threads: int) -> None:
        self.spec, self._head, self._threads = _sized(spec, head, size, threads)
        self.description = f"{model.stem} on ONNX Runtime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.executed: dict[str, int] = {}

    def run(self, pixels: Pixels) -> Outputs:
        """See ``Engine.run``."""
        image = checked_input(pixels, self.spec)
        (logits,) = self._session.run(None, {self._session.get_inputs()[0].name: image})
        return Outputs(*run_head(self._head, logits, self._threads))

    def close(self) -> None:
        """Lets the session go."""
        self._session = None


Network = OpenVinoNetwork | OnnxRuntimeNetwork


def _sized(spec: ModelSpec, head: Head, size: Size, threads: int) -> tuple[ModelSpec, Head, int]:
    height, width = size
    return (
        replace(spec, height=height, width=width),
        replace(head, height=height, width=width),
        threads,
    )


@dataclass(frozen=True)
class Row:
    """One candidate on one engine.

    ``drop_points``: mIoU of fp32 on the same engine minus this one's, in points of a hundred.
    ``fps`` and ``of_fp32`` are per network size ("384x480"). ``executed`` is empty where the
    engine does not tell. ``miou_in_fp32``: with every quantizer computed in fp32, None where that
    was not measured; far from the mIoU where the engine's INT8 kernels do something else than the
    graph says. ``best``: the highest mIoU among its tool's configurations.
    """

    candidate: Candidate
    engine: str
    evaluation: Evaluation
    drop_points: float
    convolutions: Convolutions
    executed: Mapping[str, int]
    miou_in_fp32: float | None = None
    fps: Mapping[str, Spread] = field(default_factory=dict)
    of_fp32: Mapping[str, Spread] = field(default_factory=dict)
    best: bool = False

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        found = self.evaluation.to_dict()
        return {
            "candidate": self.candidate.name,
            "tool": self.candidate.tool,
            "best": self.best,
            "engine": self.engine,
            "miou": found["miou"],
            "miou_in_fp32": self.miou_in_fp32,
            "per_class": found["per_class"],
            "eval_frames": found["frames"],
            "drop_points": self.drop_points,
            "convolutions": self.convolutions.total,
            "convolutions_fp32": len(self.convolutions.fp32),
            # Only where some are not: fp32 would list them all.
            "left_in_fp32": (
                list(self.convolutions.fp32)
                if len(self.convolutions.fp32) < self.convolutions.total
                else None
            ),
            "executed": dict(self.executed),
            "quantization_seconds": self.candidate.seconds,
            "fps": {size: spread.to_dict() for size, spread in self.fps.items()},
            "of_fp32": {size: spread.to_dict() for size, spread in self.of_fp32.items()},
        }


@dataclass(frozen=True)
class Failure:
    """A configuration that gave no model, or one that an engine cannot run, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Memory:
    """A finished command: its largest resident size in MiB, its seconds, and its exit status."""

    peak_mib: float
    seconds: float
    status: int


def plain_network(model: bytes) -> onnx.ModelProto:
    """``model`` with kernels as fp32 initializers and batch norms folded into convolutions.

    The kernels of a bundle lie in it as fp16 with a Cast behind each. The folding is ONNX
    Runtime's (its "basic" optimizations, which keep to standard operators).
    """
    network = onnx.load_from_string(model)
    stored = {found.name: found for found in network.graph.initializer}
    kept = []
    for node in network.graph.node:
        source = stored.get(node.input[0]) if node.op_type == "Cast" else None
        if source is None:
            kept.append(node)
            continue
        target = onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
        values = numpy_helper.to_array(source).astype(target)
        network.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
    del network.graph.node[:]
    network.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    initializers = [found for found in network.graph.initializer if found.name in used]
    del network.graph.initializer[:]
    network.graph.initializer.extend(initializers)
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        onnxruntime.InferenceSession(
            network.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return onnx.load(folded)


def fitted_frames(dataset: Dataset, count: int, spec: ModelSpec) -> NDArray[np.uint8]:
    """(count, spec.height, spec.width, 3) uint8 BGR, spread evenly over ``dataset``.

    Fewer where the set has fewer.
    """
    total = min(count, len(dataset))
    frames = []
    for index in range(total):
        pixels = dataset.sample(index * len(dataset) // total).pixels
        frames.append(_geometry(pixels, spec).fit(pixels))
    return np.stack(frames)


def environment(given: str | None) -> Path:
    """The peers' Python: of the virtual environment ``given``, or of one made in build/peers."""
    if given is not None:
        python = Path(given) / "bin" / "python"
        if not python.is_file():
            raise SystemExit(f"--venv is a virtual environment, and there is no {python}")
        return python
    python, done = BUILD / "bin" / "python", BUILD / "installed.txt"
    wanted = "\n".join(PINNED) + "\n"
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        say(f"Installing the peers in {BUILD}: {', '.join(PINNED)}")
        venv.create(BUILD, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        if subprocess.run([*pip, *PINNED], check=False).returncode:
            raise SystemExit(
                "pip could not install the peers; --venv takes an environment of yours"
            )
        done.write_text(wanted, encoding="utf-8")
    return python


def wanted_peers(text: str) -> list[Configuration]:
    """``"ort,nncf-mixed-fast"`` -> all of ONNX Runtime's configurations, and one of NNCF's."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TOOLS and name not in CONFIGURATIONS:
            raise SystemExit(
                f"--peers takes {', '.join(TOOLS)} or one of their configurations "
                f"({', '.join(CONFIGURATIONS)}), and {name!r} came"
            )
    return [
        found for found in CONFIGURATIONS.values() if found.name in names or found.tool in names
    ]


def quantized_by(
    configuration: Configuration, python: Path, network: Path, frames: Path, folder: Path
) -> Candidate | Failure:
    """What a peer makes of ``network``, in ``folder``; what lies there already is taken.

    A model is taken only if network, frames and this benchmark's description of the peer are the
    same as when it was made.
    """
    out = folder / f"{configuration.name}{configuration.suffix}"
    made = folder / f"{configuration.name}.json"
    digest = hashlib.sha256(repr((configuration, PINNED)).encode())
    for path in (network, frames, Path(peers.__file__)):
        digest.update(path.read_bytes())
    if made.is_file() and out.is_file():
        found = json.loads(made.read_text(encoding="utf-8"))
        if found["of"] == digest.hexdigest():
            return Candidate(configuration.name, configuration.tool, out, found["seconds"])
    out.unlink(missing_ok=True)
    started = time.perf_counter()
    done = subprocess.run(
        [str(python), peers.__file__, configuration.name, str(network), str(frames), str(out)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode or not out.is_file():
        reason = last_line(done.stderr) or last_line(done.stdout)
        return Failure(configuration.name, reason or f"exit status {done.returncode}")
    text = json.dumps({"of": digest.hexdigest(), "seconds": seconds})
    made.write_text(text + "\n", encoding="utf-8")
    return Candidate(configuration.name, configuration.tool, out, seconds)


def last_line(text: str) -> str:
    """The last line of ``text`` that says anything, where Python puts the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def open_network(
    candidate: Candidate, engine: str, bundle: Bundle, head: Head, size: Size, threads: int
) -> Network:
    """``candidate`` on ``engine``; any exception of the engine where it cannot read the file."""
    opened = OpenVinoNetwork if engine == "openvino" else OnnxRuntimeNetwork
    return opened(candidate.model, bundle.spec, head, size, threads)


def marked(rows: Iterable[Row]) -> list[Row]:
    """``rows``, with the best of each tool and engine marked by mIoU; the first of equals."""
    rows = list(rows)
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.candidate.tool, row.engine)
        if key not in best or row.evaluation.miou > best[key].evaluation.miou:
            best[key] = row
    chosen = {id(row) for row in best.values()}
    return [replace(row, best=id(row) in chosen) for row in rows]


def network_fps(engine: Engine, frames: Sequence[Pixels]) -> float:
    """Frames per second of network and head, after one frame that is not counted."""
    engine.run(frames[-1])
    started = time.perf_counter()
    for pixels in frames:
        engine.run(pixels)
    return len(frames) / (time.perf_counter() - started)


def end_to_end_fps(run: Callable[[Pixels], object], frames: Sequence[Pixels]) -> float:
    """Frames per second of ``run``, which takes a frame to its mask, after one not counted."""
    run(frames[-1])
    started = time.perf_counter()
    for pixels in frames:
        run(pixels)
    return len(frames) / (time.perf_counter() - started)


def frame_to_mask(engine: Engine) -> Callable[[Pixels], NDArray[np.uint8]]:
    """A frame of any size -> its class map at that size."""

    def run(pixels: Pixels) -> NDArray[np.uint8]:
        geometry = _geometry(pixels, engine.spec)
        return geometry.restore(engine.run(geometry.fit(pixels)).class_map)

    return run


def peak_memory(command: Sequence[str]) -> Memory:
    """Runs ``command`` to its end, its output on standard error, and says what it took at most.

    The figure is the largest resident size of the process, or of one that it waited for.
    """
    started = time.perf_counter()
    # Linux counts the process that a command is started from, so it is started from a small one.
    done = subprocess.run(
        [sys.executable, "-S", "-c", _SMALL_PARENT, *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    status, peak = (int(number) for number in done.stdout.split())
    # Linux counts in KiB, macOS in bytes.
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return Memory(peak / unit, time.perf_counter() - started, status)


_SMALL_PARENT = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, used = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(process.returncode, used.ru_maxrss)
"""


def quantize_command(bundle: Path, frames: Path, out: Path) -> list[str]:
    """The command whose memory --memory measures: ``bundle`` to INT8 with all of ``frames``."""
    return [
        *(sys.executable, "-m", "edgeseg", "quantize", str(bundle)),
        *("--calibration", str(frames), "-o", str(out)),
    ]


def calibration_memory(bundle: Bundle, dataset: Dataset, count: int, source: str) -> Memory:
    """Peak memory of EdgeSeg's quantization with ``count`` frames of ``MEMORY_FRAME``.

    The network is exported for that size, and the frames are pictures of ``dataset``, enlarged.
    """
    height, width = MEMORY_FRAME
    spec = bundle.spec
    network = load_weights(create_semantic(spec.architecture, len(spec.classes)), source)
    stride = network.stride
    sized = replace(spec, height=-(-height // stride) * stride, width=-(-width // stride) * stride)
    with tempfile.TemporaryDirectory() as folder:
        model, frames = Path(folder) / "model.onnx", Path(folder) / "frames"
        frames.mkdir()
        export_network(network, sized).write(model)
        total = min(count, len(dataset))
        for index in range(total):
            pixels = dataset.sample(index * len(dataset) // total).pixels
            cv2.imwrite(str(frames / f"{index:04d}.png"), cv2.resize(pixels, (width, height)))
        return peak_memory(quantize_command(model, frames, Path(folder) / "int8"))


def accuracy(
    candidates: Sequence[Candidate],
    engines: Sequence[str],
    bundle: Bundle,
    head: Head,
    dataset: Dataset,
    options: argparse.Namespace,
) -> tuple[list[Row], list[Failure]]:
    """The rows without their speed, fp32 first, and what an engine could not run."""
    size = (bundle.spec.height, bundle.spec.width)
    rows: list[Row] = []
    failures: list[Failure] = []
    for engine in engines:
        reference: float | None = None
        for candidate in candidates:
            if engine == "onnxruntime" and candidate.model.suffix != ".onnx":
                continue
            try:
                network = open_network(candidate, engine, bundle, head, size, options.threads)
                found = evaluate(network, dataset, limit=options.limit)
            except EdgeSegError:
                raise
            except Exception as error:
                # The engines' exceptions have no base class of their own.
                failures.append(Failure(f"{candidate.name} on {engine}", last_line(str(error))))
                continue
            reference = found.miou if reference is None else reference
            network.close()
            row = Row(
                candidate,
                engine,
                found,
                (reference - found.miou) * 100,
                Convolutions.of(candidate.model),
                network.executed,
                miou_in_fp32(candidate, bundle, head, dataset, options)
                if engine == "openvino" and candidate.tool != "fp32"
                else None,
            )
            say(
                f"{candidate.name}, {engine}: mIoU {found.miou:.4f}, as written "
                f"{'–' if row.miou_in_fp32 is None else format(row.miou_in_fp32, '.4f')}, "
                f"{len(row.convolutions.fp32)} of {row.convolutions.total} convolutions in fp32, "
                f"executed as {_executed(row.executed)}"
            )
            rows.append(row)
    return marked(rows), failures


def miou_in_fp32(
    candidate: Candidate,
    bundle: Bundle,
    head: Head,
    dataset: Dataset,
    options: argparse.Namespace,
) -> float | None:
    """mIoU of what the graph of ``candidate`` says; None where OpenVINO cannot be told so.

    The switch is one that OpenVINO does not document.
    """
    size = (bundle.spec.height, bundle.spec.width)
    try:
        network = OpenVinoNetwork(
            candidate.model, bundle.spec, head, size, options.threads, in_fp32=True
        )
    except RuntimeError:
        return None
    miou = evaluate(network, dataset, limit=options.limit).miou
    network.close()
    return miou


def timed(
    rows: Sequence[Row],
    size: Size,
    bundle: Bundle,
    head: Head,
    pictures: Sequence[Pixels],
    options: argparse.Namespace,
) -> tuple[list[Row], dict[str, list[float]]]:
    """``rows`` with their speed at ``size``; and the speeds, round by round, by candidate."""
    spec = replace(bundle.spec, height=size[0], width=size[1])
    fitted = [_geometry(pixels, spec).fit(pixels) for pixels in pictures]
    is_native = size == (bundle.spec.height, bundle.spec.width)
    with ExitStack() as opened:
        turns: dict[str, Callable[[], float]] = {}
        for row in rows:
            if row.engine == "onnxruntime" and not is_native:
                # Its graph has its size written in it.
                continue
            network = open_network(row.candidate, row.engine, bundle, head, size, options.threads)
            opened.callback(network.close)
            turns[_key(row)] = _turn(network, fitted)
        say(f"Network and head at {_text(size)}: {options.rounds} rounds of {len(fitted)} frames")
        found = in_turn(turns, options.rounds)
    timed_rows = []
    for row in rows:
        key, reference = _key(row), f"fp32 {row.engine}"
        if key in found:
            row = replace(
                row,
                fps={**row.fps, _text(size): Spread.of(found[key])},
                of_fp32={**row.of_fp32, _text(size): ratio(found[key], found[reference])},
            )
        timed_rows.append(row)
    return timed_rows, found


def _turn(network: Network, fitted: Sequence[Pixels]) -> Callable[[], float]:
    return lambda: network_fps(network, fitted)


def end_to_end(
    candidates: Sequence[Candidate],
    bundle: Bundle,
    source: str,
    head: Head,
    pictures: Sequence[Pixels],
    options: argparse.Namespace,
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Frame to mask: frames per second by name, with "eager" for PyTorch, and ratios to that."""
    spec = bundle.spec
    size = (spec.height, spec.width)
    eager = EagerLoop(
        load_weights(create_semantic(spec.architecture, len(spec.classes)), source), size
    )
    with ExitStack() as opened, torch.inference_mode():
        turns: dict[str, Callable[[], float]] = {
            "eager": lambda: end_to_end_fps(eager.class_map, pictures)
        }
        for candidate in candidates:
            network = open_network(candidate, "openvino", bundle, head, size, options.threads)
            opened.callback(network.close)
            turns[candidate.name] = _turn_of_frames(network, pictures)
        say(f"End to end: {options.rounds} rounds of {len(pictures)} frames")
        found = in_turn(turns, options.rounds)
    fps = {name: Spread.of(values) for name, values in found.items()}
    return fps, {name: ratio(found[name], found["eager"]) for name in found if name != "eager"}


def _turn_of_frames(network: Network, pictures: Sequence[Pixels]) -> Callable[[], float]:
    return lambda: end_to_end_fps(frame_to_mask(network), pictures)


def markdown(rows: Sequence[Row], failures: Sequence[Failure]) -> str:
    """The table; the best configuration of each tool is in bold."""
    sizes = list(dict.fromkeys(size for row in rows for size in row.fps))
    engines = list(dict.fromkeys(row.engine for row in rows))
    header = ["", "mIoU", "points lost", "mIoU as written"]
    header += [f"FPS {size}" for size in sizes] + [f"× fp32 {size}" for size in sizes]
    header += ["convolutions in fp32", "executed as"]
    lines = [f"| {' | '.join(header)} |", "|---" + "|--:" * (len(header) - 2) + "|---|"]
    for row in rows:
        name = row.candidate.name
        if row.best and row.candidate.tool in TOOLS:
            name = f"**{name}**"
        if len(engines) > 1:
            name += f", {row.engine}"
        written = "–" if row.miou_in_fp32 is None else f"{row.miou_in_fp32:.4f}"
        cells = [name, f"{row.evaluation.miou:.4f}", f"{row.drop_points:.2f}", written]
        cells += [row.fps[size].text(1) if size in row.fps else "–" for size in sizes]
        cells += [row.of_fp32[size].text(2) if size in row.of_fp32 else "–" for size in sizes]
        cells += [
            f"{len(row.convolutions.fp32)} of {row.convolutions.total}",
            _executed(row.executed),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if failures:
        lines += ["", *(f"- {failure.name} failed: {failure.reason}" for failure in failures)]
    return "\n".join(lines)


def _executed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "–"


def _key(row: Row) -> str:
    return f"{row.candidate.name} {row.engine}"


def _geometry(pixels: Pixels, spec: ModelSpec) -> Geometry:
    return Geometry.between(pixels.shape[0], pixels.shape[1], spec)


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="evaluated on its split val, such as camvid:DIR")
    parser.add_argument("--calibration", help="calibrated on its split train (as --data)")
    parser.add_argument("--bundle", default="streets", help="the fp32 model (streets)")
    parser.add_argument("--ours", default="streets-int8", help="its INT8 form, if it is there")
    parser.add_argument("--peers", default=",".join(TOOLS), help="tools or configurations (all)")
    parser.add_argument("--venv", metavar="DIR", help="the peers' virtual environment (made)")
    parser.add_argument("--work", metavar="DIR", help="keep and reuse the peers' models here")
    parser.add_argument("--engines", default="openvino", help=f"of {', '.join(ENGINES)} (openvino)")
    parser.add_argument("--size", metavar="HxW", help="time the networks at this size as well")
    parser.add_argument("--frames", type=int, default=100, help="calibration frames (100)")
    parser.add_argument("--rounds", type=int, default=9, help="alternated rounds (9)")
    parser.add_argument("--turn", type=int, default=16, help="frames per round and candidate (16)")
    parser.add_argument("--limit", type=int, help="evaluate on that many pictures (all)")
    parser.add_argument("--memory", action="store_true", help="peak memory of our calibration")
    parser.add_argument(
        "--threads", type=int, default=kernels.available_cores(), help="for all (all cores)"
    )
    add_output_arguments(parser)
    options = parser.parse_args(given)
    if options.quick:
        options.frames, options.rounds, options.turn, options.limit = 4, 1, 2, 2
        options.data = options.data or QUICK_DATA
        # Nothing is installed to see whether the benchmark runs.
        options.peers = options.peers if options.venv else ""
    if options.data is None:
        parser.error("--data is required, such as camvid:DIR; --quick does without")
    for engine in options.engines.split(","):
        if engine not in ENGINES:
            parser.error(f"--engines are {', '.join(ENGINES)}, and {engine!r} came")
    return options


def _ours(name: str, bundle: Bundle, folder: Path) -> Candidate | None:
    """EdgeSeg's INT8 form of ``bundle``; None, and a line that says so, where it is not there."""
    if not Path(name).exists() and not (_is_shipped(name)):
        say(f"There is no bundle {name}: the row of EdgeSeg's own INT8 is left out")
        return None
    found = Bundle.open(name)
    if (found.spec.height, found.spec.width) != (bundle.spec.height, bundle.spec.width):
        raise SystemExit(f"{name} and {bundle.name} are of different network sizes")
    model = folder / "ours.onnx"
    model.write_bytes(found.model.without_head()[0])
    return Candidate("ours", "ours", model)


def _is_shipped(name: str) -> bool:
    try:
        Bundle.locate(name)
    except EdgeSegError:
        return False
    return True


def _best(rows: Sequence[Row], tool: str) -> Row | None:
    return next(
        (
            row
            for row in rows
            if row.best and row.candidate.tool == tool and row.engine == "openvino"
        ),
        None,
    )


def _fastest(rows: Sequence[Row], tool: str, size: Size) -> Row | None:
    found = [row for row in rows if row.candidate.tool == tool and row.engine == "openvino"]
    return max(found, key=lambda row: row.fps[_text(size)].median, default=None)


def measure(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, object]]:
    """All of it: the Markdown, and the content of the JSON."""
    bundle = Bundle.open(options.bundle)
    if bundle.spec.architecture != ARCHITECTURE:
        raise SystemExit(f"the eager loop is {ARCHITECTURE}'s, not {bundle.spec.architecture}'s")
    size = (bundle.spec.height, bundle.spec.width)
    content, head = bundle.model.without_head()
    evaluated = open_dataset(options.data, "val")
    calibrated = open_dataset(options.calibration or options.data, "train")
    configurations = wanted_peers(options.peers)

    frames, network = folder / "frames.npy", folder / "network.onnx"
    calibration = fitted_frames(calibrated, options.frames, bundle.spec)
    np.save(frames, calibration)
    onnx.save(plain_network(content), network)
    fp32 = folder / "fp32.onnx"
    fp32.write_bytes(content)
    candidates = [Candidate("fp32", "fp32", fp32)]
    ours = _ours(options.ours, bundle, folder)
    candidates += [ours] if ours else []
    failures: list[Failure] = []
    found_versions: dict[str, str] = {}
    if configurations:
        python = environment(options.venv)
        found_versions = json.loads(
            subprocess.check_output([str(python), peers.__file__, "--versions"])
        )
    for configuration in configurations:
        say(f"Quantizing: {configuration.name}")
        made = quantized_by(configuration, python, network, frames, folder)
        if isinstance(made, Failure):
            say(f"{made.name} failed: {made.reason}")
            failures.append(made)
        else:
            candidates.append(made)

    rows, unread = accuracy(
        candidates, options.engines.split(","), bundle, head, evaluated, options
    )
    failures += unread
    total = min(options.turn, len(evaluated))
    pictures = [evaluated.sample(i * len(evaluated) // total).pixels for i in range(total)]
    sizes = [size, *([parse_size(options.size)] if options.size else [])]
    of_nncf: dict[str, Spread] = {}
    for timed_size in sizes:
        rows, speeds = timed(rows, timed_size, bundle, head, pictures, options)
        nncf, own = _fastest(rows, "nncf", timed_size), _best(rows, "ours")
        if nncf and own:
            of_nncf[_text(timed_size)] = ratio(speeds[_key(own)], speeds[_key(nncf)])

    alive = {row.candidate.name for row in rows}
    chosen = [c for c in candidates if c.tool in ("fp32", "ours") and c.name in alive]
    chosen += [row.candidate for tool in TOOLS if (row := _best(rows, tool))]
    whole, of_eager = end_to_end(chosen, bundle, options.bundle, head, pictures, options)
    memory = (
        calibration_memory(bundle, calibrated, options.frames, options.bundle)
        if options.memory
        else None
    )

    frame = (pictures[0].shape[0], pictures[0].shape[1])
    lines = [markdown(rows, failures), ""]
    lines += [
        f"Frame ({_text(frame)}) to mask, in frames per second: "
        + ", ".join(f"{name} {spread.text(1)}" for name, spread in whole.items())
        + ". Of PyTorch eager: "
        + ", ".join(f"{name} {spread.text(2)}" for name, spread in of_eager.items())
        + "."
    ]
    if of_nncf:
        lines += ["", "Ours over the fastest of NNCF: " + _spreads(of_nncf) + "."]
    if memory:
        height, width = MEMORY_FRAME
        lines += [
            "",
            f"Calibration at {height}x{width} failed with exit status {memory.status}."
            if memory.status
            else f"Calibration at {height}x{width}: {memory.peak_mib:.0f} MiB at most.",
        ]
    return "\n".join(lines), {
        "benchmark": "quantization",
        "machine": machine(PACKAGES),
        "peers": found_versions,
        "model": f"{bundle.spec.name}, {bundle.spec.architecture}, {_text(size)}",
        "data": {
            "evaluated": f"{evaluated.title} val, {rows[0].evaluation.frames} pictures",
            "calibrated": f"{calibrated.title} train, {len(calibration)} pictures",
        },
        "threads": options.threads,
        "rounds": options.rounds,
        "frames": total,
        "quick": options.quick,
        "targets": {
            "drop_points": DROP_TARGET,
            "of_fp32": OF_FP32_TARGET,
            "of_eager": OF_EAGER_TARGET,
            "of_nncf": OF_NNCF_TARGET,
            "memory_mib": MEMORY_TARGET_MIB,
        },
        "rows": [row.to_dict() for row in rows],
        "failures": [vars(failure) for failure in failures],
        "of_nncf": {name: spread.to_dict() for name, spread in of_nncf.items()},
        "end_to_end": {
            "frame": list(frame),
            "fps": {name: spread.to_dict() for name, spread in whole.items()},
            "of_eager": {name: spread.to_dict() for name, spread in of_eager.items()},
        },
        "memory": vars(memory) if memory else None,
    }


def _spreads(found: Mapping[str, Spread]) -> str:
    return ", ".join(f"{spread.text(2)} at {name}" for name, spread in found.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON."""
    options = _arguments(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.work or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            table, content = measure(options, folder)
        except EdgeSegError as error:
            raise SystemExit(str(error)) from error
    print(table, file=sys.stderr if options.json == "-" else sys.stdout)
    write_json(options.json, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
