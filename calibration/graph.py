"""An exported graph made ready for quantization: plain weights, no batch norms, named layers.

What `edgeseg export` writes is made to be trained further: batch norms stand by themselves, kernels
may be stored as fp16 behind a Cast, pictures are scaled by a node of their own. Quantization wants
the numbers that are really multiplied, so `prepared` folds all of that into the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeseg.errors import CalibrationError

__all__ = ["WEIGHTED", "Graph", "Layer", "prepared", "share_constants"]

#: operators that multiply an activation by a weight; which of them become a `Layer` is told there
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_STANDARD = ("", "ai.onnx")
_INTEGER = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "ConvInteger",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
    }
)
# The first operator set whose QuantizeLinear takes one scale per channel.
_OLDEST_OPSET = 13
# Bytes from which on it pays to look for a constant that is the same.
_WORTH_SHARING = 1024


@dataclass(frozen=True)
class Layer:
    """One node that can be quantized: Conv, ConvTranspose, or a Gemm that is a plain linear layer
    (alpha and beta 1, input not transposed), with constant weight and bias.

    ``name`` is that of its weight without ``.weight``; ``axis`` is the weight's axis of output
    channels, ``group`` the number of groups (1 but for convolutions). A ConvTranspose of several
    groups has out / group entries along ``axis``, each for one channel of every group.

    A MatMul is no layer and stays in floating point: its channels are the last axis of its input,
    where those of every other operator here are axis 1. Linear layers are exported as Gemm.
    """

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
            # An empty name is an optional input or output left out.
            for name in filter(None, node.output):
                self._producer[name] = node
            for name in filter(None, dict.fromkeys(node.input)):
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
        for name in [node.output[0] for node in self.nodes if is_standard(node, kind)]:
            # Looked up only now: a change of the graph makes new node objects.
            node = self.producer(name)
            if node is not None and is_standard(node, kind):
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
        made = numpy_helper.from_array(np.asarray(values, order="C"), tensor)
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

    def layers(self) -> list[Layer]:
        """The nodes that can be quantized, in the order of execution."""
        return [layer for node in self.nodes if (layer := self._layer(node)) is not None]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, as far as ONNX infers it; 0 for a side that is not known."""
        inferred = onnx.shape_inference.infer_shapes(self.model).graph
        return {
            value.name: tuple(side.dim_value for side in value.type.tensor_type.shape.dim)
            for value in (*inferred.input, *inferred.value_info, *inferred.output)
            if value.type.tensor_type.HasField("shape")
        }

    def _layer(self, node: NodeProto) -> Layer | None:
        if not is_standard(node, *_LAYERS):
            return None
        source, weight, bias = (*node.input, "", "")[:3]
        if self.is_constant(source) or not self.is_constant(weight):
            return None
        if bias and not self.is_constant(bias):
            return None
        if node.op_type == "Gemm" and not _is_linear(node):
            return None
        return Layer(
            name=weight.removesuffix(".weight"),
            node=node.name,
            kind=node.op_type,
            input=source,
            output=node.output[0],
            weight=weight,
            bias=bias or None,
            axis=_output_axis(node),
            group=attribute(node, "group", 1),
        )


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Integer attribute ``name`` of ``node``."""
    for entry in node.attribute:
        if entry.name == name:
            return int(entry.i)
    return default


def is_standard(node: NodeProto, *kinds: str) -> bool:
    """Whether ``node`` is one of ONNX's own operators ``kinds``."""
    return node.op_type in kinds and node.domain in _STANDARD


def _output_axis(node: NodeProto) -> int:
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1 if node.op_type == "ConvTranspose" else 0


def _is_linear(node: NodeProto) -> bool:
    plain = all(entry.f == 1 for entry in node.attribute if entry.name in ("alpha", "beta"))
    return plain and not attribute(node, "transA", 0)


def prepared(model: onnx.ModelProto) -> Graph:
    """A copy of ``model`` with fp32 weights, batch norms folded, and every node named.

    Every layer has a weight and a bias that nothing else reads. CalibrationError when the model is
    quantized already, has no layer, or has what cannot be quantized here: fp16 arithmetic, control
    flow, an operator set before 13.
    """
    graph = Graph(model)
    _check(graph)
    del graph.model.graph.value_info[:]
    _name_nodes(graph)
    _settle_constants(graph)
    _separate_weights(graph)
    layers = graph.layers()
    if not layers:
        raise CalibrationError(
            "the graph has no layer with weights that could be quantized "
            f"({', '.join(_LAYERS)} with a constant weight)"
        )
    for layer in layers:
        kind = graph.array(layer.weight).dtype
        if kind != np.float32:
            raise CalibrationError(
                f"a graph is quantized from float32, and {layer.name} computes in {kind}; "
                "quantize the fp32 bundle that it was made from"
            )
    _fold_batch_norms(graph)
    _fold_scaling(graph)
    graph.prune()
    return graph


def _check(graph: Graph) -> None:
    for node in graph.nodes:
        if is_standard(node, *_INTEGER):
            raise CalibrationError(
                f"the graph is quantized already (it has a {node.op_type}); quantize the fp32 "
                "bundle that it was made from"
            )
        if any(entry.HasField("g") or entry.graphs for entry in node.attribute):
            raise CalibrationError(
                f"the graph has a {node.op_type} with a graph of its own, and calibration does not "
                "look into those; export the model without control flow"
            )
    version = next(
        (entry.version for entry in graph.model.opset_import if entry.domain in _STANDARD), 1
    )
    if version < _OLDEST_OPSET:
        raise CalibrationError(
            f"quantized graphs need ONNX operator set {_OLDEST_OPSET} or newer, and this graph has "
            f"{version}; export it again"
        )


def _name_nodes(graph: Graph) -> None:
    """Every node gets a name that no other has: layers are found by it."""
    taken: set[str] = set()
    for node in graph.nodes:
        stem = node.name or f"{node.op_type} {next(filter(None, node.output), '')}"
        node.name = _unused(stem, taken)
        taken.add(node.name)


def _unused(stem: str, taken: Container[str], suffix: str = "") -> str:
    """``stem`` and ``suffix``, with a number between them if that is taken."""
    name, number = stem + suffix, 1
    while name in taken:
        number += 1
        name = f"{stem}.{number}{suffix}"
    return name


def _settle_constants(graph: Graph) -> None:
    """All constants become initializers: those of Constant nodes, and those behind an Identity or
    a Cast to float32. Inputs with an initializer are no longer inputs."""
    inputs = [entry for entry in graph.model.graph.input if not graph.is_constant(entry.name)]
    del graph.model.graph.input[:]
    graph.model.graph.input.extend(inputs)
    same: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        target = node.output[0]
        if graph.is_output(target):
            kept.append(node)
        elif is_standard(node, "Constant"):
            values = _constant(node)
            if values is None:
                kept.append(node)
            else:
                graph.put(target, values)
        elif (_widens(node) or is_standard(node, "Identity")) and graph.is_constant(node.input[0]):
            source = node.input[0]
            if all(map(_widens, graph.consumers(source))) and not graph.is_output(source):
                # The kernel keeps its own name, which is the layer's.
                graph.put(source, graph.floats(source))
            if _widens(node) and graph.array(source).dtype != np.float32:
                graph.put(target, graph.floats(source))
            else:
                same[target] = source
        else:
            kept.append(node)
    graph.replace_nodes(kept)


def _widens(node: NodeProto) -> bool:
    return is_standard(node, "Cast") and attribute(node, "to", 0) == TensorProto.FLOAT


def _constant(node: NodeProto) -> NDArray[np.generic] | None:
    """What Constant ``node`` holds; None for text and sparse tensors."""
    (entry,) = node.attribute
    if entry.name == "value":
        return numpy_helper.to_array(entry.t)
    if entry.name in ("value_float", "value_floats"):
        return np.array(helper.get_attribute_value(entry), np.float32)
    if entry.name in ("value_int", "value_ints"):
        return np.array(helper.get_attribute_value(entry), np.int64)
    return None


def _separate_weights(graph: Graph) -> None:
    """Layers that share a weight or a bias with anything else get one of their own."""
    taken = {tensor.name for tensor in graph.model.graph.initializer}
    layers = {layer.node for layer in graph.layers()}
    seen: set[str] = set()
    for node in graph.nodes:
        if node.name not in layers:
            continue
        for index, name in enumerate(node.input):
            if not index or not name:
                continue
            shared = graph.is_output(name) or any(
                reader.name not in layers for reader in graph.consumers(name)
            )
            if name in seen or shared:
                stem, dot, last = name.rpartition(".")
                own = _unused(stem, taken, dot + last) if dot else _unused(name, taken)
                taken.add(own)
                graph.put(own, graph.array(name))
                node.input[index] = own
            seen.add(name)
    graph.refresh()


def _fold_batch_norms(graph: Graph) -> None:
    """Batch norms become part of the layer before them, else of the one behind, else Mul and Add.

    The layer behind takes a shift only if it pads nothing: the border of a padded input is 0 after
    the batch norm, not before it.
    """
    for node in graph.each("BatchNormalization"):
        if not all(graph.is_constant(name) for name in node.input[1:]) or any(node.output[1:]):
            # Of a network in training; it stays what it is, in floating point.
            continue
        gamma, beta, mean, variance = (
            graph.array(name).astype(np.float64) for name in node.input[1:]
        )
        epsilon = next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        shift = beta - mean * factor
        layers = {layer.output: layer for layer in graph.layers()}
        before = layers.get(node.input[0])
        if before is not None and _read_once(graph, node.input[0]):
            _scale_outputs(graph, before, factor, shift)
            _bypass(graph, node, forward=True)
            continue
        behind = _only_reader(graph, node.output[0])
        if behind is not None and (_pads_nothing(graph, behind) or not shift.any()):
            _scale_inputs(graph, behind, factor, shift)
            _bypass(graph, node, forward=False)
            continue
        _spell_out(graph, node, factor, shift)


def _read_once(graph: Graph, tensor: str) -> bool:
    return len(graph.consumers(tensor)) == 1 and not graph.is_output(tensor)


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
    _put_bias(graph, layer, bias * factor + shift)


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
        _put_bias(graph, layer, bias + added)
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
    sides[1 - layer.axis] = -1
    return factor.reshape(sides)


def output_channels(layer: Layer, shape: tuple[int, ...]) -> int:
    """Channels that ``layer`` makes with a weight of ``shape``."""
    return shape[layer.axis] * (layer.group if layer.kind == "ConvTranspose" else 1)


def input_channels(layer: Layer, shape: tuple[int, ...]) -> int:
    """Channels that ``layer`` reads with a weight of ``shape``."""
    return shape[1 - layer.axis] * (layer.group if layer.kind == "Conv" else 1)


def _put_bias(graph: Graph, layer: Layer, values: NDArray[np.float64]) -> None:
    name = layer.bias
    if name is None:
        taken = {tensor.name for tensor in graph.model.graph.initializer}
        name = _unused(layer.name, taken, ".bias")
        node = graph.producer(layer.output)
        assert node is not None
        del node.input[2:]
        node.input.append(name)
    graph.put(name, values.astype(np.float32))
    graph.refresh()


def _only_reader(graph: Graph, tensor: str) -> Layer | None:
    """The convolution that alone reads ``tensor``."""
    if not _read_once(graph, tensor):
        return None
    (reader,) = graph.consumers(tensor)
    return next(
        (layer for layer in graph.layers() if layer.node == reader.name and layer.kind == "Conv"),
        None,
    )


def _pads_nothing(graph: Graph, layer: Layer) -> bool:
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
    shape = graph.shapes().get(node.input[0])
    if shape is None:
        # Of unknown rank: it stays what it is, in floating point.
        return
    sides = (1, -1, *[1] * (len(shape) - 2))
    taken = {tensor.name for tensor in graph.model.graph.initializer}
    constants = [_unused(node.name, taken, part) for part in (".factor", ".shift")]
    for name, values in zip(constants, (factor, shift), strict=True):
        graph.put(name, values.astype(np.float32).reshape(sides))
    source, target = node.input[0], node.output[0]
    scaled = f"{target}.scaled"
    pair = [
        helper.make_node("Mul", [source, constants[0]], [scaled], f"{node.name}.mul"),
        helper.make_node("Add", [scaled, constants[1]], [target], f"{node.name}.add"),
    ]
    written: list[NodeProto] = []
    for other in graph.nodes:
        written.extend(pair if other.output[0] == target else [other])
    graph.replace_nodes(written)


def _fold_scaling(graph: Graph) -> None:
    """A Mul by a constant, or one per channel, read by convolutions only, becomes part of their
    weights.

    That is how pictures are normalised: what reaches the first layer is then in grey levels, whose
    steps an int8 scale can nearly keep. (The subtraction before it stays: convolutions pad with 0,
    which is the mean colour there.)
    """
    for node in graph.each("Mul"):
        constants = [name for name in node.input if graph.is_constant(name)]
        target = node.output[0]
        readers = {reader.name for reader in graph.consumers(target)}
        layers = [layer for layer in graph.layers() if layer.node in readers]
        if len(constants) != 1 or len(layers) != len(readers) or graph.is_output(target):
            continue
        values = graph.array(constants[0]).astype(np.float64)
        factors = [_channel_factors(graph, layer, values) for layer in layers]
        if any(factor is None for factor in factors):
            continue
        for layer, factor in zip(layers, factors, strict=True):
            if factor is not None:
                _scale_inputs(graph, layer, factor, np.zeros(1))
        if node.input[0] == constants[0]:
            node.input[0], node.input[1] = node.input[1], node.input[0]
        _bypass(graph, node, forward=False)


def _channel_factors(
    graph: Graph, layer: Layer, values: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """``values`` as a factor per input channel of ``layer``; None if they are something else."""
    shape = graph.array(layer.weight).shape
    channels = input_channels(layer, shape)
    if layer.kind != "Conv" or values.ndim > len(shape):
        return None
    sides = (1,) * (len(shape) - values.ndim) + values.shape
    if sides not in ((1,) * len(sides), (1, channels, *[1] * (len(shape) - 2))):
        return None
    return np.broadcast_to(values.ravel(), channels)


def share_constants(model: onnx.ModelProto) -> None:
    """Large constants of ``model`` that are the same, bit by bit, become one.

    `prepared` gives each layer weights of its own. Where those of a head that looks at several
    levels of a pyramid are still the same in the end, the file need not hold them several times.
    """
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same: dict[str, str] = {}
    kept = []
    for tensor in model.graph.initializer:
        if tensor.ByteSize() >= _WORTH_SHARING:
            array = numpy_helper.to_array(tensor)
            content = hashlib.sha256(np.ascontiguousarray(array).data).digest()
            known = first.setdefault((tensor.data_type, tuple(tensor.dims), content), tensor.name)
            if known != tensor.name:
                same[tensor.name] = known
                continue
        kept.append(tensor)
    if not same:
        return
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
    tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
