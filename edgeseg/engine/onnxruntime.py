"""ONNX Runtime on the CPU: runs on every machine that Python runs on."""

from __future__ import annotations

import time
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
        content, self._head = opened_graph(bundle.model, bundle.spec, compiled_head=compiled_head)
        self._threads = threads or kernels.available_cores()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = self._threads
        try:
            self._session: Any = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # The runtime's exceptions share no base class but Exception.
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {bundle.model_path}: "
                f"{str(error).strip().splitlines()[0]}; try --engine openvino"
            ) from error
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
        return f"ONNX Runtime {onnxruntime.__version__}, CPU, {self._threads} threads, head {head}"

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

    def close(self) -> None:
        """Lets the session go."""
        self._session = None


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
