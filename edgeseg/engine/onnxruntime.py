"""ONNX Runtime on the CPU: runs on every machine that Python runs on."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.engine.base import OneAtATime
from edgeseg.engine.head import (
    checked_input,
    opened_graph,
    taken_instances,
    taken_outputs,
    wants_compiled_head,
)
from edgeseg.engine.layers import LayerTime, LayerTimes, checked_images
from edgeseg.errors import EngineError
from edgeseg.frame import Pixels
from edgeseg.golden import (
    AGREEMENT,
    INSTANCE_AGREEMENT,
    AnyGolden,
    Golden,
    InstanceGolden,
    golden_image,
)
from edgeseg.result import AnyOutputs
from edgeseg.spec import ModelSpec

__all__ = ["OnnxRuntimeEngine", "open_engine", "recorded_golden"]

_ERRORS_ONLY = 3
# Golden pictures that are tried before one is chosen.
_GOLDEN_SEEDS = 8
# And as long as nothing is found in any of them, up to this many.
_GOLDEN_SEEDS_AT_MOST = 64


class OnnxRuntimeEngine(OneAtATime):
    """One graph in an ONNX Runtime session on the CPU."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int, compiled_head: bool) -> None:
        self._spec = bundle.spec
        self._bundle = bundle
        content, self._head = opened_graph(bundle.model, bundle.spec, compiled_head=compiled_head)
        self._threads = threads or kernels.available_cores()
        self._session: Any = self._opened(content, onnxruntime.SessionOptions())
        self._input = self._session.get_inputs()[0].name
        self._names = [output.name for output in self._session.get_outputs()]

    @property
    def spec(self) -> ModelSpec:
        """The contract of the graph."""
        return self._spec

    @property
    def description(self) -> str:
        """One line: library, version, device, threads, head."""
        head = "compiled" if self._head is not None else "in the graph"
        threads = f"{self._threads} threads{self.tuned_text}"
        return f"ONNX Runtime {onnxruntime.__version__}, CPU, {threads}, head {head}"

    def run(self, pixels: Pixels) -> AnyOutputs:
        """See ``Engine.run``."""
        image = checked_input(pixels, self._spec)
        start = time.perf_counter_ns()
        values = self._session.run(self._names, {self._input: image})
        after = time.perf_counter_ns()
        return taken_outputs(
            dict(zip(self._names, values, strict=True)),
            self._head,
            self._spec,
            threads=self._threads,
            network_ns=after - start,
        )

    def layer_times(self, images: Sequence[Pixels]) -> list[LayerTime]:
        """See `TimesLayers`: the runtime's own profile, of the graph without its head.

        The session is opened once more for that, so that timing slows no other run, and writes a
        file of its own in a temporary folder. EngineError when it cannot.
        """
        checked_images(images)
        checked = [checked_input(image, self._spec) for image in images]
        content, _ = opened_graph(
            self._bundle.model, self._spec, compiled_head=self._head is not None
        )
        with tempfile.TemporaryDirectory(prefix="edgeseg-layers-") as folder:
            options = onnxruntime.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "run")
            session = self._opened(content, options)
            for image in (checked[0], *checked):
                session.run(self._names, {self._input: image})
            try:
                text = Path(session.end_profiling()).read_text(encoding="utf-8", errors="replace")
                events = json.loads(text)
            except (OSError, ValueError) as error:
                raise EngineError(
                    f"ONNX Runtime {onnxruntime.__version__} wrote no profile that can be read "
                    f"({error}); leave out --layers"
                ) from error
        return _layers(events)

    def close(self) -> None:
        """Lets the session go."""
        self._session = None

    def _opened(self, content: bytes, options: Any) -> Any:
        """A session of ``content``; EngineError when the runtime cannot."""
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = self._threads
        try:
            return onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # The runtime's exceptions share no base class but Exception.
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {self._bundle.model_path}: "
                f"{str(error).strip().splitlines()[0]}; try --engine openvino"
            ) from error


_KERNEL = "_kernel_time"
_PRECISIONS = {"float": "f32", "float16": "f16", "int8": "i8", "uint8": "u8"}


def _layers(events: Sequence[Any]) -> list[LayerTime]:
    """The nodes in the runtime's list of events, the first run left out.

    Each event is a dictionary of Chrome's trace format; a node's has the microseconds ``dur``, the
    ``op_name`` and the types of its inputs in ``args``.
    """
    times = LayerTimes()
    warm: set[str] = set()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL):
            continue
        # The runtime's own layout of channels is put at the end of some names.
        name = event["name"].removesuffix(_KERNEL).removesuffix("_nchwc")
        if name not in warm:
            warm.add(name)
            continue
        inputs = event["args"].get("input_type_shape", [])
        told = next(iter(inputs[0]), "") if inputs else ""
        kind = f"{event['args'].get('op_name', '')} {_PRECISIONS.get(told, told)}".strip()
        times.add(name, kind, event["dur"] / 1e3)
    return times.medians()


def open_engine(bundle: Bundle, *, threads: int, compiled_head: bool | None) -> OnnxRuntimeEngine:
    """The model of ``bundle`` on ONNX Runtime; EngineError when it cannot read the graph."""
    return OnnxRuntimeEngine(
        bundle, threads=threads, compiled_head=wants_compiled_head(compiled_head)
    )


def recorded_golden(content: bytes, spec: ModelSpec, promised: float | None = None) -> AnyGolden:
    """The golden pair for a new model: of a few pictures, the one that says most.

    For a semantic model the one in which it names most classes, for an instance model the one in
    which it finds most, and most kinds; where it finds nothing in any, the pair proves nothing
    (``is_proof``). ``content``: the ONNX file, whole; its metadata are not looked at.
    ``promised``: share of the samples, or detections, that every engine has to agree with; None
    for the task's usual one.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    session: Any = onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )
    if spec.task == "instance":
        return _recorded_instances(
            session, spec, INSTANCE_AGREEMENT if promised is None else promised
        )
    best: tuple[float, Golden] | None = None
    for seed in range(_GOLDEN_SEEDS):
        image = golden_image(seed, spec.height, spec.width)[None]
        class_map = np.asarray(session.run(["class_map"], {"image": image})[0])[0]
        shares = np.bincount(class_map.ravel()) / class_map.size
        entropy = -float(np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
        if best is None or entropy > best[0]:
            golden = Golden.of(seed, class_map, AGREEMENT if promised is None else promised)
            best = entropy, golden
    assert best is not None
    return best[1]


def _told(golden: InstanceGolden) -> int:
    """How much a pair says: many detections, and of several classes, since a network with swapped
    channels may well find the same things in another class's place."""
    return len(golden.detections) * len({found.label for found in golden.detections})


def _recorded_instances(session: Any, spec: ModelSpec, promised: float) -> InstanceGolden:
    names = [output.name for output in session.get_outputs()]
    best: InstanceGolden | None = None
    for seed in range(_GOLDEN_SEEDS_AT_MOST):
        if seed >= _GOLDEN_SEEDS and best is not None and best.is_proof:
            break
        image = golden_image(seed, spec.height, spec.width)[None]
        found = dict(zip(names, session.run(names, {"image": image}), strict=True))
        golden = InstanceGolden.of(seed, taken_instances(found, spec), promised)
        if best is None or _told(golden) > _told(best):
            best = golden
    assert best is not None
    return best
