"""The last layers of a traced network that EdgeSeg's head makes superfluous.

The head upsamples logits bilinearly and takes the winner, and does both at once faster than a graph
can: it looks closely only where neighbours disagree. A network that upsamples by itself would hide
its low-resolution logits from it. What is taken off leaves every class map as it was: a bilinear
Resize to network size is what the head does, and softmax and sigmoid do not change the winner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

__all__ = ["Tail", "remove_unused", "static_shapes", "take_off_tail"]

_PASSES = ("Identity", "Dropout")


@dataclass(frozen=True)
class Tail:
    """What was found at the end of a graph.

    ``align_corners``: convention of the upsampling that was taken off; None if none was.
    ``sigmoid``: the scores of the whole network are the outcome of a sigmoid. ``probabilities``:
    the graph still ends in a softmax or a sigmoid, and what is interpolated behind it are
    probabilities.
    """

    align_corners: bool | None = None
    sigmoid: bool = False
    probabilities: bool = False

    @property
    def ends_in_sigmoid(self) -> bool:
        """Whether the threshold of a single score is one half, not zero."""
        return self.sigmoid and self.probabilities


def take_off_tail(
    graph: onnx.GraphProto, opset: int, shape: tuple[int, ...], size: tuple[int, int]
) -> Tail:
    """Shortens ``graph``, whose only output has ``shape`` (1, channels, h, w), in place.

    ``size``: (height, width) of the input. Shapes inside have to be static, or an upsampling stays.
    """
    producers = {name: node for node in graph.node for name in node.output}
    last = graph.output[0].name
    full = shape[2:] == size
    end, sigmoid, softmax = _before_probabilities(last, producers)
    align_corners = None
    if full:
        node = producers.get(end)
        if node is not None and node.op_type == "Resize":
            align_corners = _upsampling(node, static_shapes(graph, opset), shape, graph)
        if node is not None and align_corners is not None:
            end = node.input[0]
            _, below, soft_below = _before_probabilities(end, producers)
            sigmoid, softmax = sigmoid or below, soft_below
            kept = below or soft_below
        else:
            kept = False
    else:
        kept = sigmoid or softmax
        end = last if kept else end
    if end != last:
        del graph.output[:]
        graph.output.append(helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None))
        remove_unused(graph)
    return Tail(align_corners, sigmoid, kept)


def _before_probabilities(
    name: str, producers: dict[str, onnx.NodeProto]
) -> tuple[str, bool, bool]:
    """What the softmax or sigmoid that makes tensor ``name`` reads, and which of them there are.

    A log-softmax is passed over as well: it takes the same off every class, also once interpolated.
    """
    sigmoid = softmax = False
    while (node := producers.get(name)) is not None:
        over_classes = _attribute(node, "axis", -1) in (1, -3)
        if node.op_type == "Sigmoid":
            sigmoid = True
        elif node.op_type == "Softmax" and over_classes:
            softmax = True
        elif node.op_type not in _PASSES and not (node.op_type == "LogSoftmax" and over_classes):
            break
        name = node.input[0]
    return name, sigmoid, softmax


def _upsampling(
    node: onnx.NodeProto,
    shapes: dict[str, tuple[int, ...]],
    shape: tuple[int, ...],
    graph: onnx.GraphProto,
) -> bool | None:
    """Whether ``node`` is a bilinear Resize to ``shape``: its align_corners, or None."""
    before = shapes.get(node.input[0])
    if before is None or before[:2] != shape[:2]:
        return None
    if _attribute(node, "mode", b"nearest") != b"linear" or _attribute(node, "antialias", 0):
        return None
    if _attribute(node, "keep_aspect_ratio_policy", b"stretch") != b"stretch":
        return None
    if before[2] > shape[2] or before[3] > shape[3]:
        return None
    if len(node.input) > 2 and node.input[2]:
        # Factors that are not the ratio of the sizes shift the sampling points.
        factors = _constant(node.input[2], graph)
        if factors is None or factors.size != len(shape):
            return None
        if not np.array_equal(np.array(before) * factors, np.array(shape)):
            return None
    coordinates = _attribute(node, "coordinate_transformation_mode", b"half_pixel")
    if coordinates == b"align_corners":
        return True
    if coordinates == b"half_pixel":
        return False
    # PyTorch's differs from half_pixel only for a side of one pixel.
    if coordinates == b"pytorch_half_pixel" and min(shape[2:]) > 1:
        return False
    return None


def _constant(name: str, graph: onnx.GraphProto) -> NDArray[Any] | None:
    for tensor in graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    for node in graph.node:
        if node.op_type == "Constant" and name in node.output:
            for attribute in node.attribute:
                if attribute.name == "value":
                    return numpy_helper.to_array(attribute.t)
                if attribute.name == "value_floats":
                    return np.array(attribute.floats)
    return None


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    for attribute in node.attribute:
        if attribute.name == name:
            value: object = helper.get_attribute_value(attribute)
            return value
    return default


def static_shapes(graph: onnx.GraphProto, opset: int) -> dict[str, tuple[int, ...]]:
    """Names of the tensors whose shape is static -> shape."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    found = {}
    for info in [*inferred.value_info, *inferred.input, *inferred.output]:
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(dim.dim_value > 0 for dim in dims):
            found[info.name] = tuple(dim.dim_value for dim in dims)
    return found


def remove_unused(graph: onnx.GraphProto) -> None:
    """Takes out of ``graph``, in place, every node and initializer that no output depends on."""
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(_read_by(node))
    kept.reverse()
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    initializers = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _read_by(node: onnx.NodeProto) -> set[str]:
    """Names that ``node`` reads, also from inside its branches and loops."""
    names = set(node.input)
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            names.update(output.name for output in inner.output)
            for child in inner.node:
                names |= _read_by(child)
    return names
