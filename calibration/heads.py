"""The raw heads of an instance graph, and how far a change of the network moves them.

What a graph finds says little about one layer: an object is there or it is not, and most layers
alone move none over the threshold. The numbers from which the objects are made (boxes, scores,
mask coefficients, prototypes) move with every layer, and can be compared one by one.

Where a graph ranks its candidates and goes on with the best, as two-stage networks do, other
numbers in one layer would change which candidate a row stands for. So the ranking of the
floating-point graph is given to the other: each row is the same candidate in both.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgeseg.calibration.graph import Graph, is_standard
from edgeseg.calibration.observe import cut
from edgeseg.errors import CalibrationError
from edgeseg.frame import Pixels

__all__ = ["Heads", "head_tensors"]

#: operators that put candidates in order, or choose among them
_RANKING = ("TopK", "ArgMax", "NonMaxSuppression")
# What is behind a layer that makes a head, and still the same numbers or all of them together.
_BEHIND = (
    "Clip", "Concat", "Flatten", "Relu", "Reshape", "Sigmoid", "Squeeze", "Tanh", "Transpose",
    "Unsqueeze",
)  # fmt: skip
# They look at no number.
_BLIND = ("Shape", "Size")

Values = Mapping[str, NDArray[Any]]


def head_tensors(graph: Graph) -> tuple[str, ...]:
    """The raw heads of ``graph``: what layers give to the part that ranks, or to the caller.

    A tensor is one if a layer made it, and a TopK, an ArgMax or an output of the graph is reached
    from it without another layer between. Activations and what brings tensors together behind the
    layer are gone through, so that the levels of a pyramid are one head where the graph joins them.
    """
    layers = graph.layers()
    nodes = {layer.node for layer in layers}
    found: dict[str, None] = {}
    for layer in layers:
        if _is_judged(graph, layer.output, nodes):
            found[_joined(graph, layer.output, nodes)] = None
    return tuple(found)


def _is_judged(graph: Graph, tensor: str, layers: set[str]) -> bool:
    """Whether ``tensor`` reaches a ranking or an output without a layer between."""
    seen, waiting = {tensor}, deque([tensor])
    while waiting:
        name = waiting.popleft()
        if graph.is_output(name):
            return True
        for reader in graph.consumers(name):
            if is_standard(reader, *_RANKING):
                return True
            if reader.name in layers or is_standard(reader, *_BLIND):
                continue
            for output in filter(None, reader.output):
                if output not in seen:
                    seen.add(output)
                    waiting.append(output)
    return False


def _joined(graph: Graph, tensor: str, layers: set[str]) -> str:
    """``tensor`` behind all that only brings it into another form, or together with others."""
    while not graph.is_output(tensor):
        readers = graph.consumers(tensor)
        if len(readers) != 1 or readers[0].name in layers:
            break
        (reader,) = readers
        if not is_standard(reader, *_BEHIND):
            break
        if reader.op_type == "Concat":
            # All levels are together; what follows is no longer the network's.
            return str(reader.output[0])
        if reader.input[0] != tensor:
            break
        tensor = reader.output[0]
    return tensor


class Heads:
    """What the heads of a floating-point graph are on some pictures, to compare others with.

    ``graph``: prepared; ``pictures``: of network size. All values are kept: about 10 MB a picture
    for YOLACT at 550x550. CalibrationError for a graph that has no head.
    """

    def __init__(self, graph: Graph, pictures: Sequence[Pixels]) -> None:
        self.tensors = head_tensors(graph)
        if not self.tensors:
            raise CalibrationError(
                "no layer of the graph leads to boxes, scores or masks without another behind it, "
                "so that nothing says what a layer does to them; export the model again"
            )
        self._pictures = tuple(pictures)
        ranked = [name for node in _rankings(graph.model, self.tensors) for name in node.output]
        self._ranked = tuple(filter(None, ranked))
        session = _session(graph.model, (*self.tensors, *self._ranked), ())
        self._wanted = [_run(session, pixels, {}) for pixels in self._pictures]

    def errors(self, model: onnx.ModelProto) -> dict[str, float]:
        """Head -> mean squared error in ``model`` over the head's variance, both of all pictures.

        0 is no difference, and 1 as wrong as the head's mean would be. ``model`` has the same
        tensors, in any precision; its rankings are those of the floating-point graph.
        """
        session = _session(model, self.tensors, self._ranked)
        noise = dict.fromkeys(self.tensors, 0.0)
        signal = dict.fromkeys(self.tensors, 0.0)
        for pixels, wanted in zip(self._pictures, self._wanted, strict=True):
            found = _run(session, pixels, wanted)
            for name in self.tensors:
                expected = wanted[name].astype(np.float64)
                noise[name] += float(np.mean((found[name] - expected) ** 2))
                signal[name] += float(np.var(expected))
        return {
            # A head that says the same everywhere is moved, or it is not.
            name: noise[name] / signal[name] if signal[name] > 0 else float(noise[name] > 0)
            for name in self.tensors
        }

    def error(self, model: onnx.ModelProto) -> float:
        """The mean of ``errors``."""
        return statistics.fmean(self.errors(model).values())


def _rankings(model: onnx.ModelProto, tensors: Sequence[str]) -> list[NodeProto]:
    """The nodes that rank, among those that ``tensors`` are computed from."""
    asked = onnx.GraphProto()
    asked.CopyFrom(model.graph)
    cut(asked, set(tensors))
    return [node for node in asked.node if is_standard(node, *_RANKING)]


def _session(
    model: onnx.ModelProto, tensors: Sequence[str], given: Sequence[str]
) -> onnxruntime.InferenceSession:
    """A session that gives ``tensors`` and takes ``given`` besides the picture."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.output)
    }
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    nodes = [node for node in asked.graph.node if not set(given).intersection(node.output)]
    del asked.graph.node[:]
    asked.graph.node.extend(nodes)
    for name in given:
        kind = kinds.get(name, TensorProto.UNDEFINED)
        asked.graph.input.append(helper.make_tensor_value_info(name, kind, None))
    del asked.graph.output[:]
    asked.graph.output.extend(map(helper.make_empty_tensor_value_info, tensors))
    cut(asked.graph, set(tensors))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(
        asked.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _run(session: onnxruntime.InferenceSession, pixels: Pixels, given: Values) -> Values:
    """What ``session`` gives, by name; of ``given`` it takes what it asks for."""
    picture, *others = session.get_inputs()
    feed: dict[str, NDArray[Any]] = {picture.name: pixels[None]}
    for entry in others:
        kind = np.float16 if "float16" in entry.type else given[entry.name].dtype
        feed[entry.name] = given[entry.name].astype(kind)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))
