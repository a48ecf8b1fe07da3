"""Writes a placement into a graph as QuantizeLinear/DequantizeLinear pairs.

Symmetric int8 with zero point 0; one scale per tensor for activations, one per output channel for
weights. Weights are stored as int8 with a DequantizeLinear behind them, which TensorRT, OpenVINO
and ONNX Runtime read alike and which makes the file a quarter of its size; for fine-tuning they can
be left as float32 with a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

from edgeseg.calibration.graph import WEIGHTED, Graph, Layer
from edgeseg.calibration.placement import Placement
from edgeseg.calibration.ranges import quantized
from edgeseg.errors import CalibrationError

__all__ = ["Scales", "activation_scale", "quantize", "weight_scale"]

# The zero point of every activation: one constant for all.
_ZERO = "edgeseg.zero"


@dataclass(frozen=True)
class Scales:
    """What the integers mean: ``activations`` by group of tensors (see ``Placement``), ``weights``
    by layer name, float32 with one entry along the axis of the weight's output channels each."""

    activations: Mapping[str, float]
    weights: Mapping[str, NDArray[np.float32]]


def quantize(
    graph: Graph, placement: Placement, scales: Scales, *, float_weights: bool = False
) -> onnx.ModelProto:
    """A new model: ``graph`` with Q/DQ at the sites of ``placement``; ``graph`` stays as it is.

    ``float_weights`` keeps the weights float32 with a Q/DQ pair each, so that they can be trained;
    what the model computes is the same. CalibrationError when ``scales`` lack one, or have another
    number of them than a layer has output channels.
    """
    made = Graph(graph.model)
    written: list[NodeProto] = []
    # tensor -> the name under which its int8 readers find it
    dequantized: dict[str, str] = {}
    sites = {site.tensor: site for site in placement.sites}
    layers = {layer.node: layer for layer in placement.layers}
    _check(made, placement, scales)

    def pair(tensor: str) -> list[NodeProto]:
        scale = activation_scale(sites[tensor].group)
        made.put(scale, np.array(scales.activations[sites[tensor].group], np.float32))
        made.put(_ZERO, np.array(0, np.int8))
        dequantized[tensor] = f"{tensor}.dequantized"
        return _pair(tensor, scale, _ZERO, f"{tensor}.int8", dequantized[tensor])

    for graph_input in made.model.graph.input:
        if graph_input.name in sites:
            written += pair(graph_input.name)
    for node in made.nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        layer = layers.get(node.name)
        if layer is not None:
            written += _weight(made, layer, scales.weights[layer.name], float_weights)
            copy.input[1] = f"{layer.weight}.dequantized"
        # What multiplies by floating-point weights does so for its accuracy, and reads what was
        # there before rounding; and so does the head.
        if layer is not None or (not node.domain and node.op_type not in WEIGHTED):
            for index, name in enumerate(copy.input):
                copy.input[index] = dequantized.get(name, name)
        written.append(copy)
        for name in node.output:
            if name in sites:
                written += pair(name)
    made.replace_nodes(written)
    made.prune()
    model = made.model
    del model.graph.value_info[:]
    return model


def activation_scale(group: str) -> str:
    """Name of the initializer that holds the scale of ``group``."""
    return f"{group}.scale"


def weight_scale(layer: Layer) -> str:
    """Name of the initializer that holds the scales of the weight of ``layer``."""
    return f"{layer.weight}.scale"


def _check(graph: Graph, placement: Placement, scales: Scales) -> None:
    for site in placement.sites:
        if site.group not in scales.activations:
            raise CalibrationError(
                f"{site.group} is to be quantized and has no scale; observe the tensors of the "
                "same placement"
            )
    for layer in placement.layers:
        expected = graph.array(layer.weight).shape[layer.axis : layer.axis + 1]
        came = scales.weights[layer.name].shape if layer.name in scales.weights else "none"
        if came != expected:
            raise CalibrationError(
                f"the scales of {layer.name} have the shape {expected}, one for each output "
                f"channel along axis {layer.axis}, and {came} came"
            )


def _weight(
    graph: Graph, layer: Layer, scales: NDArray[np.float32], float_weights: bool
) -> list[NodeProto]:
    """The nodes that make the dequantized weight of ``layer``, and their constants."""
    scale, zero = weight_scale(layer), f"{layer.weight}.zero"
    graph.put(scale, scales.astype(np.float32))
    graph.put(zero, np.zeros(scales.size, np.int8))
    integers, values = f"{layer.weight}.int8", f"{layer.weight}.dequantized"
    if float_weights:
        graph.put(layer.weight, _within(graph.floats(layer.weight), scales, layer.axis))
        return _pair(layer.weight, scale, zero, integers, values, axis=layer.axis)
    graph.put(integers, quantized(graph.floats(layer.weight), scales, axis=layer.axis))
    return [_dequantize(integers, scale, zero, values, axis=layer.axis)]


def _within(
    weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int
) -> NDArray[np.float32]:
    """``weight`` with what its scales clip at the limit: a QuantizeLinear goes to -128, where the
    stored integers end at -127."""
    sides = [1] * weight.ndim
    sides[axis] = -1
    steps = scales.reshape(sides)
    limit = np.where(np.abs(weight) > 127.5 * steps, 127 * steps, np.inf)
    return np.clip(weight, -limit, limit).astype(np.float32)


def _pair(
    tensor: str, scale: str, zero: str, integers: str, values: str, *, axis: int | None = None
) -> list[NodeProto]:
    return [
        _node("QuantizeLinear", [tensor, scale, zero], integers, f"{tensor}.quantize", axis),
        _dequantize(integers, scale, zero, values, axis=axis),
    ]


def _dequantize(
    integers: str, scale: str, zero: str, values: str, *, axis: int | None
) -> NodeProto:
    name = f"{values.removesuffix('.dequantized')}.dequantize"
    return _node("DequantizeLinear", [integers, scale, zero], values, name, axis)


def _node(kind: str, inputs: list[str], output: str, name: str, axis: int | None) -> NodeProto:
    node = helper.make_node(kind, inputs, [output], name)
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node
