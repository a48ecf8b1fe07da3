"""An exported graph made ready for quantization: one array per weight, no batch norms, layers named.

What `edgeseg export` writes is made to be trained further: batch norms stand by themselves, kernels
may be stored as fp16 behind a Cast, pictures are scaled by a node of their own. Quantization wants
the numbers that are really multiplied, so `prepared` folds all of that into the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from edgeseg.errors import CalibrationError

__all__ = ["WEIGHTED", "Graph", "Layer", "prepared"]

#: operators that multiply an activation by a constant weight, and the weight's axis of output
#: channels; Gemm and MatMul take theirs from `Layer`
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """One weighted node. ``name`` is that of its weight without ``.weight``; ``axis`` is the
    weight's axis of output channels, ``group`` the number of groups (1 but for convolutions)."""

    name: str
    node: str
    kind: str
    input: str
    output: str
    weight: str
    bias: str | None
    axis: int
    group: int


class Graph:
    """An ONNX model that is being edited: who makes each tensor, who reads it, what is constant.

    ``model`` belongs to this object. After nodes were added or taken away through ``model``
    itself, ``refresh`` brings the look-ups up to date; the methods here do that themselves.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self._arrays: dict[str, NDArray[np.generic]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Reads the nodes again."""
        self._producer: dict[str, NodeProto] = {}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.output:
                self._producer[name] = node
            for name in dict.fromkeys(node.input):
                self._consumers.setdefault(name, []).append(node)
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._arrays = {
            name: array for name, array in self._arrays.items() if name in self._tensors
        }

    @property
    def nodes(self) -> Iterable[NodeProto]:
        """The nodes of the main graph, in topological order."""
        nodes: Iterable[NodeProto] = self.model.graph.node
        return nodes

    def each(self, kind: str) -> Iterator[NodeProto]:
        """The nodes of one operator type, one by one while the graph is being changed."""
        for name in [node.output[0] for node in self.nodes if node.op_type == kind]:
            # Looked up only now: a change of the graph makes new node objects.
            node = self.producer(name)
            if node is not None and node.op_type == kind:
                yield node

    def producer(self, tensor: str) -> NodeProto | None:
        """The node that makes ``tensor``; None for a constant or an input of the graph."""
        return self._producer.get(tensor)

    def consumers(self, tensor: str) -> list[NodeProto]:
        """The nodes that read ``tensor``, each once."""
        return list(self._consumers.get(tensor, ()))

    def is_output(self, tensor: str) -> bool:
        """Whether the graph gives ``tensor`` to its caller."""
        return any(output.name == tensor for output in self.model.graph.output)

    def is_constant(self, tensor: str) -> bool:
        """Whether ``tensor`` is an initializer."""
        return tensor in self._tensors

    def array(self, tensor: str) -> NDArray[np.generic]:
        """The values of initializer ``tensor``; do not write to them."""
        if tensor not in self._arrays:
            self._arrays[tensor] = numpy_helper.to_array(self._tensors[tensor])
        return self._arrays[tensor]

    def floats(self, tensor: str) -> NDArray[np.float32]:
        """The values of initializer ``tensor`` as float32."""
        return self.array(tensor).astype(np.float32)

    def put(self, tensor: str, values: NDArray[np.generic]) -> None:
        """Makes initializer ``tensor`` hold ``values``; a new one if there is none."""
        made = numpy_helper.from_array(np.ascontiguousarray(values), tensor)
        if tensor in self._tensors:
            self._tensors[tensor].CopyFrom(made)
        else:
            self.model.graph.initializer.append(made)
            self._tensors[tensor] = self.model.graph.initializer[-1]
        self._arrays.pop(tensor, None)

    def replace_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """The graph's nodes become ``nodes``."""
        kept = list(nodes)
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        self.refresh()

    def prune(self) -> None:
        """Takes away the initializers that nobody reads."""
        used = {name for node in self.nodes for name in node.input}
        used.update(output.name for output in self.model.graph.output)
        tensors = [tensor for tensor in self.model.graph.initializer if tensor.name in used]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(tensors)
        self.refresh()

    def add_bias(self, layer: Layer, values: NDArray[np.float64]) -> None:
        """Adds ``values`` (output channels,) to the bias of ``layer``, which gets one if need be."""
        before = 0.0 if layer.bias is None else self.array(layer.bias).astype(np.float64)
        _put_bias(self, layer, (before + values).astype(np.float32))

    def layers(self) -> list[Layer]:
        """The weighted nodes, in the order of execution."""
        return list(self._layers())

    def _layers(self) -> Iterator[Layer]:
        for node in self.nodes:
            if node.op_type not in WEIGHTED or len(node.input) < 2:
                continue
            weight = node.input[1]
            if not self.is_constant(weight):
                continue
            yield Layer(
                name=weight.removesuffix(".weight"),
                node=node.name,
                kind=node.op_type,
                input=node.input[0],
                output=node.output[0],
                weight=weight,
                bias=node.input[2] if len(node.input) > 2 and node.input[2] else None,
                axis=_output_axis(node, len(self._tensors[weight].dims)),
                group=attribute(node, "group", 1),
            )


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Integer attribute ``name`` of ``node``."""
    for entry in node.attribute:
        if entry.name == name:
            return int(entry.i)
    return default


def _output_axis(node: NodeProto, ndim: int) -> int:
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    if node.op_type == "MatMul":
        return ndim - 1
    return 0


def prepared(model: onnx.ModelProto) -> Graph:
    """A copy of ``model`` with fp32 weights, batch norms folded, and every weighted node named.

    CalibrationError when the model is quantized already, or has no weighted layer.
    """
    graph = Graph(model)
    kinds = {node.op_type for node in graph.nodes}
    if "QuantizeLinear" in kinds or "DequantizeLinear" in kinds:
        raise CalibrationError(
            "the graph is quantized already; quantize the fp32 bundle that it was made from"
        )
    del graph.model.graph.value_info[:]
    _widen(graph)
    _constants_to_initializers(graph)
    _fold_batch_norms(graph)
    _fold_scaling(graph)
    graph.prune()
    if not graph.layers():
        raise CalibrationError(
            "the graph has no layer with weights that could be quantized "
            f"({', '.join(WEIGHTED)} with a constant weight)"
        )
    return graph


def _widen(graph: Graph) -> None:
    """Constants behind a Cast to float32 become float32 constants under their own names."""
    renamed = {}
    kept = []
    for node in graph.nodes:
        if node.op_type == "Cast" and graph.is_constant(node.input[0]):
            to = helper.tensor_dtype_to_np_dtype(attribute(node, "to", 1))
            if to == np.float32:
                graph.put(node.input[0], graph.floats(node.input[0]))
                renamed[node.output[0]] = node.input[0]
                continue
        kept.append(node)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    graph.replace_nodes(kept)


def _constants_to_initializers(graph: Graph) -> None:
    """Constant nodes that hold a tensor become initializers, so that one look-up finds both."""
    kept = []
    for node in graph.nodes:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            graph.put(node.output[0], numpy_helper.to_array(node.attribute[0].t))
        else:
            kept.append(node)
    graph.replace_nodes(kept)


def _fold_batch_norms(graph: Graph) -> None:
    """Batch norms become part of the layer before them, else of the one behind, else Mul and Add.

    The layer behind takes a shift only if it pads nothing: the border of a padded input is 0 after
    the batch norm, not before it.
    """
    for node in graph.each("BatchNormalization"):
        gamma, beta, mean, variance = (
            graph.array(name).astype(np.float64) for name in node.input[1:5]
        )
        epsilon = next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        shift = beta - mean * factor
        layers = {layer.output: layer for layer in graph.layers()}
        before = layers.get(node.input[0])
        if before is not None and len(graph.consumers(node.input[0])) == 1:
            _scale_outputs(graph, before, factor, shift)
            _bypass(graph, node, forward=True)
            continue
        behind = _only_reader(graph, node.output[0])
        if behind is not None and _takes_shift(graph, behind):
            _scale_inputs(graph, behind, factor, shift)
            _bypass(graph, node, forward=False)
            continue
        _spell_out(graph, node, factor, shift)


def _bypass(graph: Graph, node: NodeProto, *, forward: bool) -> None:
    """Takes ``node`` out. ``forward``: the tensor keeps the name behind it, else the one before."""
    source, target = node.input[0], node.output[0]
    kept = [other for other in graph.nodes if other.output[0] != target]
    for other in kept:
        if forward:
            for index, name in enumerate(other.output):
                other.output[index] = target if name == source else name
        else:
            for index, name in enumerate(other.input):
                other.input[index] = source if name == target else name
    graph.replace_nodes(kept)


def _scale_outputs(
    graph: Graph, layer: Layer, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    """``layer`` gives ``factor * y + shift`` per output channel where it gave ``y``."""
    weight = graph.array(layer.weight).astype(np.float64)
    per_channel = output_factors(layer, weight.shape, factor)
    bias = 0.0 if layer.bias is None else graph.array(layer.bias).astype(np.float64)
    graph.put(layer.weight, (weight * per_channel).astype(np.float32))
    _put_bias(graph, layer, (bias * factor + shift).astype(np.float32))


def output_factors(
    layer: Layer, shape: tuple[int, ...], factor: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``factor`` (output channels,) in a form that multiplies a weight of ``shape``."""
    if layer.kind == "ConvTranspose" and layer.group > 1:
        # (in, out / group, ...): the group of an input channel says which outputs a row makes.
        per_group = shape[0] // layer.group
        rows = factor.reshape(layer.group, shape[1]).repeat(per_group, axis=0)
        return rows.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))
    sides = [1] * len(shape)
    sides[layer.axis] = -1
    return factor.reshape(sides)


def _scale_inputs(
    graph: Graph, layer: Layer, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    """``layer`` gives for ``x`` what it gave for ``factor * x + shift``; it pads nothing."""
    weight = graph.array(layer.weight).astype(np.float64)
    spread = weight * input_factors(layer, weight.shape, factor)
    if shift.any():
        spatial = tuple(range(2, weight.ndim))
        added = (weight * input_factors(layer, weight.shape, shift)).sum(axis=(1, *spatial))
        bias = 0.0 if layer.bias is None else graph.array(layer.bias).astype(np.float64)
        _put_bias(graph, layer, (bias + added).astype(np.float32))
    graph.put(layer.weight, spread.astype(np.float32))


def input_factors(
    layer: Layer, shape: tuple[int, ...], factor: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``factor`` (input channels,) in a form that multiplies a weight of ``shape``."""
    if layer.kind == "Conv" and layer.group > 1:
        # (out, in / group, ...): each group of outputs reads its own inputs.
        per_group = shape[0] // layer.group
        rows = factor.reshape(layer.group, shape[1]).repeat(per_group, axis=0)
        return rows.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))
    sides = [1] * len(shape)
    if layer.kind in ("Gemm", "MatMul"):
        sides[len(shape) - 2 if layer.axis == len(shape) - 1 else 1] = -1
    else:
        sides[0 if layer.kind == "ConvTranspose" else 1] = -1
    return factor.reshape(sides)


def _put_bias(graph: Graph, layer: Layer, values: NDArray[np.float32]) -> None:
    if layer.bias is not None and len(graph.consumers(layer.bias)) == 1:
        graph.put(layer.bias, values)
        return
    name = f"{layer.name}.bias"
    if graph.is_constant(name):
        name = f"{layer.name}.folded_bias"
    graph.put(name, values)
    node = graph.producer(layer.output)
    assert node is not None
    del node.input[2:]
    node.input.append(name)
    graph.refresh()


def _only_reader(graph: Graph, tensor: str) -> Layer | None:
    """The convolution that alone reads ``tensor``."""
    readers = graph.consumers(tensor)
    if len(readers) != 1 or graph.is_output(tensor):
        return None
    return next(
        (
            layer
            for layer in graph.layers()
            if layer.node == readers[0].name and layer.input == tensor and layer.kind == "Conv"
        ),
        None,
    )


def _takes_shift(graph: Graph, layer: Layer) -> bool:
    node = graph.producer(layer.output)
    assert node is not None
    for entry in node.attribute:
        if entry.name == "pads" and any(entry.ints):
            return False
        if entry.name == "auto_pad" and entry.s not in (b"", b"NOTSET", b"VALID"):
            return False
    return True


def _spell_out(
    graph: Graph, node: NodeProto, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    sides = (1, -1, 1, 1)
    graph.put(f"{node.name}.factor", factor.astype(np.float32).reshape(sides))
    graph.put(f"{node.name}.shift", shift.astype(np.float32).reshape(sides))
    scaled = f"{node.output[0]}.scaled"
    pair = [
        helper.make_node(
            "Mul", [node.input[0], f"{node.name}.factor"], [scaled], f"{node.name}.mul"
        ),
        helper.make_node(
            "Add", [scaled, f"{node.name}.shift"], [node.output[0]], f"{node.name}.add"
        ),
    ]
    written: list[NodeProto] = []
    for other in graph.nodes:
        written.extend(pair if other.output[0] == node.output[0] else [other])
    graph.replace_nodes(written)


def _fold_scaling(graph: Graph) -> None:
    """A Mul by one constant per channel, read by convolutions only, becomes part of their weights.

    That is how pictures are normalised: what reaches the first layer is then in grey levels, whose
    steps an int8 scale can nearly keep. (The subtraction before it stays: convolutions pad with 0,
    which is the mean colour there.)
    """
    for node in graph.each("Mul"):
        constants = [name for name in node.input if graph.is_constant(name)]
        if len(constants) != 1:
            continue
        values = graph.array(constants[0]).astype(np.float64)
        if values.ndim != 4 or values.size != values.shape[1]:
            continue
        readers = {other.name for other in graph.consumers(node.output[0])}
        layers = [
            layer
            for layer in graph.layers()
            if layer.node in readers and layer.kind == "Conv" and layer.input == node.output[0]
        ]
        if len(layers) != len(readers) or graph.is_output(node.output[0]):
            continue
        for layer in layers:
            _scale_inputs(graph, layer, values.ravel(), np.zeros(values.size))
        source = next(name for name in node.input if name != constants[0])
        node.input[0], node.input[1] = source, constants[0]
        _bypass(graph, node, forward=False)
