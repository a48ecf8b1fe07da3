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

from edgeseg.calibration.graph import Graph, Layer
from edgeseg.calibration.placement import Placement
from edgeseg.calibration.ranges import quantized

__all__ = ["Scales", "activation_scale", "quantize", "weight_scale"]

# The zero point of every activation: one constant for all.
_ZERO = "edgeseg.zero"


@dataclass(frozen=True)
class Scales:
    """What the integers mean: ``activations`` by group of tensors (see ``Placement``), ``weights``
    by layer name, (output channels,) float32 each."""

    activations: Mapping[str, float]
    weights: Mapping[str, NDArray[np.float32]]


def quantize(
    graph: Graph, placement: Placement, scales: Scales, *, float_weights: bool = False
) -> onnx.ModelProto:
    """A new model: ``graph`` with Q/DQ at the sites of ``placement``; ``graph`` stays as it is.

    ``float_weights`` keeps the weights float32 with a Q/DQ pair each, so that they can be trained.
    """
    made = Graph(graph.model)
    written: list[NodeProto] = []
    # tensor -> the name under which its int8 readers find it
    dequantized: dict[str, str] = {}
    sites = {site.tensor: site for site in placement.sites}
    layers = {layer.node: layer for layer in placement.layers}
    floats = {layer.node for layer in made.layers()} - set(layers)

    def pair(tensor: str) -> list[NodeProto]:
        group = sites[tensor].group
        scale = activation_scale(group)
        made.put(scale, np.float32(scales.activations[group]).reshape(()))
        made.put(_ZERO, np.int8(0).reshape(()))
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
        # A layer left in floating point was left so for its accuracy, and reads what was there
        # before rounding; and so does the head.
        if node.name not in floats and not node.domain:
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


def _weight(
    graph: Graph, layer: Layer, scales: NDArray[np.float32], float_weights: bool
) -> list[NodeProto]:
    """The nodes that make the dequantized weight of ``layer``, and their constants."""
    scale, zero = weight_scale(layer), f"{layer.weight}.zero"
    graph.put(scale, scales.astype(np.float32))
    graph.put(zero, np.zeros(scales.size, np.int8))
    integers, values = f"{layer.weight}.int8", f"{layer.weight}.dequantized"
    if float_weights:
        return _pair(layer.weight, scale, zero, integers, values, axis=layer.axis)
    graph.put(integers, quantized(graph.floats(layer.weight), scales, axis=layer.axis))
    return [_dequantize(integers, scale, zero, values, axis=layer.axis)]


def _pair(
    tensor: str, scale: str, zero: str, integers: str, values: str, *, axis: int | None = None
) -> list[NodeProto]:
    attributes = {} if axis is None else {"axis": axis}
    return [
        helper.make_node(
            "QuantizeLinear", [tensor, scale, zero], [integers], f"{tensor}.quantize", **attributes
        ),
        _dequantize(integers, scale, zero, values, axis=axis),
    ]


def _dequantize(
    integers: str, scale: str, zero: str, values: str, *, axis: int | None
) -> NodeProto:
    attributes = {} if axis is None else {"axis": axis}
    return helper.make_node(
        "DequantizeLinear",
        [integers, scale, zero],
        [values],
        f"{values.removesuffix('.dequantized')}.dequantize",
        **attributes,
    )
