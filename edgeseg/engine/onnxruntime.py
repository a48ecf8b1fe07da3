"""ONNX Runtime on the CPU: runs on every machine that Python runs on."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.engine.base import OneAtATime
from edgeseg.engine.head import checked_input, run_head, wants_compiled_head
from edgeseg.errors import EngineError
from edgeseg.frame import Pixels
from edgeseg.golden import AGREEMENT, Golden, golden_image
from edgeseg.onnxfile import Head
from edgeseg.result import Outputs
from edgeseg.spec import ModelSpec

__all__ = ["OnnxRuntimeEngine", "open_engine", "recorded_golden"]

_ERRORS_ONLY = 3
# Golden pictures that are tried before one is chosen.
_GOLDEN_SEEDS = 8


class OnnxRuntimeEngine(OneAtATime):
    """One graph in an ONNX Runtime session on the CPU."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int, compiled_head: bool) -> None:
        self._spec = bundle.spec
        self._head: Head | None = None
        # The runtime would run the function body as it is; both engines get the same inlined form
        # so that one test covers both.
        if compiled_head:
            content, self._head = bundle.model.without_head()
        else:
            content = bundle.model.inlined()
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

    def run(self, pixels: Pixels) -> Outputs:
        """See ``Engine.run``."""
        image = checked_input(pixels, self._spec)
        start = time.perf_counter_ns()
        values = self._session.run(self._names, {self._input: image})
        after = time.perf_counter_ns()
        if self._head is None:
            planes = [np.asarray(value)[0] for value in values]
            return Outputs(planes[0], planes[1] if len(planes) > 1 else None, after - start)
        class_map, confidence = run_head(self._head, np.asarray(values[0]), self._threads)
        return Outputs(class_map, confidence, after - start, time.perf_counter_ns() - after)

    def close(self) -> None:
        """Lets the session go."""
        self._session = None


def open_engine(bundle: Bundle, *, threads: int, compiled_head: bool | None) -> OnnxRuntimeEngine:
    """The model of ``bundle`` on ONNX Runtime; EngineError when it cannot read the graph."""
    return OnnxRuntimeEngine(
        bundle, threads=threads, compiled_head=wants_compiled_head(compiled_head)
    )


def recorded_golden(content: bytes, spec: ModelSpec, promised: float = AGREEMENT) -> Golden:
    """The golden pair for a new model: of a few pictures, the one on which it names most classes.

    ``content``: the ONNX file, whole; its metadata are not looked at. ``promised``: share of the
    samples that every engine has to agree with.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    session: Any = onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )
    best: tuple[float, Golden] | None = None
    for seed in range(_GOLDEN_SEEDS):
        image = golden_image(seed, spec.height, spec.width)[None]
        class_map = np.asarray(session.run(["class_map"], {"image": image})[0])[0]
        shares = np.bincount(class_map.ravel()) / class_map.size
        entropy = -float(np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
        if best is None or entropy > best[0]:
            best = entropy, Golden.of(seed, class_map, promised)
    assert best is not None
    return best[1]
