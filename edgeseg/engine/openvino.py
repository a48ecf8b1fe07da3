"""OpenVINO on the CPU: the default where there is no NVIDIA GPU."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino
from openvino.frontend.onnx import ConversionExtension

from edgeseg.bundle import Bundle
from edgeseg.engine.base import OneAtATime
from edgeseg.engine.head import (
    checked_input,
    opened_graph,
    taken_outputs,
    wants_compiled_head,
)
from edgeseg.engine.layers import LayerTime, LayerTimes, checked_images
from edgeseg.errors import EngineError
from edgeseg.frame import Pixels
from edgeseg.result import AnyOutputs
from edgeseg.spec import ModelSpec

__all__ = ["OpenVinoEngine", "open_engine", "shared_core"]


class OpenVinoEngine(OneAtATime):
    """One graph compiled by OpenVINO for the CPU, in the precision that the graph says.

    OpenVINO's own default would lower fp32 to bf16 on processors that have it; here precision
    lives in the graph, so the hint is fixed.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, *, threads: int, compiled_head: bool) -> None:
        self._spec = bundle.spec
        self._bundle = bundle
        content, self._head = opened_graph(bundle.model, bundle.spec, compiled_head=compiled_head)
        compiled = self._compiled(content, {"INFERENCE_NUM_THREADS": threads} if threads else {})
        self._request: Any = compiled.create_infer_request()
        self._threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        # A tensor may have several names, the graph's among them.
        self._outputs = {
            name: self._request.get_output_tensor(index)
            for index, output in enumerate(compiled.outputs)
            for name in output.get_names()
        }

    @property
    def spec(self) -> ModelSpec:
        """The contract of the graph."""
        return self._spec

    @property
    def description(self) -> str:
        """One line: library, version, device, threads, head."""
        version = openvino.__version__.split("-")[0]
        head = "compiled" if self._head is not None else "in the graph"
        threads = f"{self._threads} threads{self.tuned_text}"
        return f"OpenVINO {version}, CPU, {threads}, head {head}"

    def run(self, pixels: Pixels) -> AnyOutputs:
        """See ``Engine.run``."""
        image = checked_input(pixels, self._spec)
        if not image.flags.writeable:
            # OpenVINO shares writable memory only, though it just reads its inputs.
            image = image.copy()
        start = time.perf_counter_ns()
        # shared memory: the tensor borrows the frame, which lives until infer() returns
        self._request.set_input_tensor(openvino.Tensor(image, shared_memory=True))
        self._request.infer()
        after = time.perf_counter_ns()
        # The request's own buffers are overwritten by the next frame: what is given is copied.
        return taken_outputs(
            {name: tensor.data for name, tensor in self._outputs.items()},
            self._head,
            self._spec,
            threads=self._threads,
            network_ns=after - start,
        )

    def layer_times(self, images: Sequence[Pixels]) -> list[LayerTime]:
        """See `TimesLayers`: OpenVINO's performance counters, of the graph without its head.

        The graph is compiled once more for that, so that the counters slow no other run.
        EngineError when OpenVINO cannot.
        """
        checked_images(images)
        checked = [checked_input(image, self._spec) for image in images]
        content, _ = opened_graph(
            self._bundle.model, self._spec, compiled_head=self._head is not None
        )
        compiled = self._compiled(
            content, {"INFERENCE_NUM_THREADS": self._threads, "PERF_COUNT": True}
        )
        names = _fused_names(compiled)
        request = compiled.create_infer_request()
        times = LayerTimes()
        for number, image in enumerate((checked[0], *checked)):
            request.set_input_tensor(openvino.Tensor(image.copy()))
            request.infer()
            if number == 0:
                continue
            for info in request.get_profiling_info():
                if info.status == openvino.ProfilingInfo.Status.EXECUTED:
                    precision = info.exec_type.rpartition("_")[2].lower()
                    times.add(
                        names.get(info.node_name, info.node_name),
                        f"{info.node_type} {precision}",
                        info.real_time.total_seconds() * 1e3,
                    )
        return times.medians()

    def close(self) -> None:
        """Lets the compiled model go."""
        self._outputs = {}
        self._request = None

    def _compiled(self, content: bytes, options: Mapping[str, Any]) -> Any:
        """``content`` compiled for the CPU; EngineError when OpenVINO cannot."""
        try:
            core = shared_core()
            model = core.read_model(content)
            fixed = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            return core.compile_model(model, "CPU", {**fixed, **options})
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO {openvino.__version__} cannot open {self._bundle.model_path}: "
                f"{_first_line(error)}; try --engine onnxruntime"
            ) from error


_core_lock = threading.Lock()


def shared_core() -> openvino.Core:
    """OpenVINO, with the operators of EdgeSeg's graphs that its ONNX reader does not know.

    One for the life of the process. The CPU plugin gives the thread that it is loaded in a stack
    for signals, and takes it away when the last core goes: if that is in another thread, the first
    one keeps the address of nothing, and dies of its next signal, such as Ctrl-C.
    """
    with _core_lock:
        return _made_core()


@functools.cache
def _made_core() -> openvino.Core:
    core = openvino.Core()
    core.add_extension(ConversionExtension("DeformConv", _deformable_convolution))
    return core


def _deformable_convolution(node: Any) -> list[Any]:
    """The outputs of ``node``, a DeformConv of ONNX over a plane, in OpenVINO's own operators."""
    from openvino import opset8

    image, kernel, offsets, *optional = (node.get_input(n) for n in range(node.get_input_size()))
    bias, modulation = [*optional, None, None][:2]
    pads = list(node.get_attribute("pads", [0, 0, 0, 0]))
    convolved = opset8.deformable_convolution(
        image,
        offsets,
        kernel,
        strides=list(node.get_attribute("strides", [1, 1])),
        pads_begin=pads[:2],
        pads_end=pads[2:],
        dilations=list(node.get_attribute("dilations", [1, 1])),
        mask=modulation,
        group=node.get_attribute("group", 1),
        deformable_group=node.get_attribute("offset_group", 1),
        bilinear_interpolation_pad=True,
    )
    # What stands for an input that was left out before others.
    if bias is None or bias.get_node().get_type_name() == "NullNode":
        return list(convolved.outputs())
    column = opset8.constant(np.array([1, -1, 1, 1], np.int64))
    return list(opset8.add(convolved, opset8.reshape(bias, column, False)).outputs())


# What OpenVINO calls the operators that it puts in, such as Multiply_9344.
_MADE_UP = re.compile(r"[A-Z][A-Za-z]*_\d+")


def _fused_names(compiled: Any) -> dict[str, str]:
    """OpenVINO's name of each layer -> the graph's names of the operators that it does."""
    found = {}
    for layer in compiled.get_runtime_model().get_ordered_ops():
        told = layer.get_rt_info()["originalLayersNames"]
        text = str(told.value if hasattr(told, "value") else told.astype(str))
        names = [name.removesuffix("/WithoutBiases") for name in text.split(",") if name]
        kept = [name for name in dict.fromkeys(names) if not _MADE_UP.fullmatch(name)]
        if kept:
            found[layer.get_friendly_name()] = " + ".join(kept)
    return found


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def open_engine(bundle: Bundle, *, threads: int, compiled_head: bool | None) -> OpenVinoEngine:
    """The model of ``bundle`` on OpenVINO; EngineError when it cannot read the graph."""
    return OpenVinoEngine(bundle, threads=threads, compiled_head=wants_compiled_head(compiled_head))
