"""Where a graph is quantized: which tensors become int8, which of them share a scale, and why.

The rules are those that TensorRT documents for explicit quantization (NVIDIA TensorRT
documentation, "Explicit Quantization", Q/DQ placement recommendations), and that suit OpenVINO and
ONNX Runtime as well: quantize all inputs of a weighted layer and not its output; quantize the
residual input of an Add that can be fused into the convolution before it; give a layer without
weights int8 on both sides or on neither; one scale for everything that meets in a Concat or passes
a MaxPool; one quantizer for all int8 readers of a tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from onnx import NodeProto

from edgeseg.calibration.graph import Graph, Layer
from edgeseg.errors import CalibrationError

__all__ = ["Placement", "Site", "place"]

# An int8 tensor passes these unchanged, so both sides have one scale.
_COMMUTING = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity"}
)
# Fused into the layer before them: what is quantized is their output.
_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish"})
# No weights, but TensorRT has them for int8 inputs with an int8 output.
_POOLING = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean", "Resize"})


@dataclass(frozen=True)
class Site:
    """One tensor that gets a QuantizeLinear/DequantizeLinear pair.

    ``group``: tensors of one group have one scale. ``reason``: for a person.
    """

    tensor: str
    group: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """The int8 part of a graph: its layers, and the tensors quantized for them, in graph order.

    ``floats``: names of the weighted layers left alone.
    """

    layers: tuple[Layer, ...]
    sites: tuple[Site, ...]
    floats: tuple[str, ...]

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group -> its tensors."""
        found: dict[str, list[str]] = {}
        for site in self.sites:
            found.setdefault(site.group, []).append(site.tensor)
        return {group: tuple(tensors) for group, tensors in found.items()}


def place(graph: Graph, *, floats: Collection[str] = ()) -> Placement:
    """The placement for ``graph`` with the layers named in ``floats`` left in floating point.

    CalibrationError for a name that no layer has.
    """
    layers = graph.layers()
    unknown = sorted(set(floats) - {layer.name for layer in layers})
    if unknown:
        raise CalibrationError(
            f"there is no layer {unknown[0]} to leave in floating point; "
            f"the layers are {', '.join(layer.name for layer in layers)}"
        )
    search = _Search(graph, [layer for layer in layers if layer.name not in floats])
    search.run()
    return Placement(
        layers=tuple(search.layers),
        sites=search.sites(),
        floats=tuple(layer.name for layer in layers if layer.name in floats),
    )


class _Search:
    """Grows the set of quantized tensors until no rule adds another."""

    def __init__(self, graph: Graph, layers: list[Layer]) -> None:
        self._graph = graph
        self.layers = layers
        self._by_output = {layer.output: layer for layer in layers}
        self._reasons: dict[str, str] = {}
        self._parent: dict[str, str] = {}

    def run(self) -> None:
        for layer in self.layers:
            self._add(layer.input, f"input of {layer.name}")
        while self._around_layers_without_weights():
            pass

    def sites(self) -> tuple[Site, ...]:
        """In the order in which the graph makes the tensors."""
        order = dict.fromkeys(self._reasons, 0)
        for index, node in enumerate(self._graph.nodes):
            for name in node.output:
                if name in order:
                    order[name] = index
        names = sorted(order, key=lambda name: (order[name], name))
        # A group is called after its first tensor.
        first: dict[str, str] = {}
        for name in names:
            first.setdefault(self._root(name), name)
        return tuple(Site(name, first[self._root(name)], self._reasons[name]) for name in names)

    def _add(self, tensor: str, reason: str) -> None:
        """``tensor`` becomes int8, and with it what passes into it unchanged."""
        if tensor in self._reasons:
            return
        self._reasons[tensor] = reason
        self._parent[tensor] = tensor
        node = self._graph.producer(tensor)
        if node is None:
            return
        if _commutes(node):
            self._add(node.input[0], f"{_named(node)} passes int8 through")
            self._join(tensor, node.input[0])
        elif node.op_type == "Concat":
            for name in node.input:
                self._add(name, f"one scale for all inputs of {_named(node)}")
                self._join(tensor, name)

    def _join(self, one: str, other: str) -> None:
        self._parent[self._root(one)] = self._root(other)

    def _root(self, tensor: str) -> str:
        while self._parent[tensor] != tensor:
            tensor = self._parent[tensor]
        return tensor

    def _around_layers_without_weights(self) -> bool:
        """Applies the rules for Add and pooling once; whether a tensor was added."""
        before = len(self._reasons)
        for node in self._graph.nodes:
            if node.op_type == "Add":
                self._around_add(node)
            elif node.output[0] in self._reasons and self._is_kernel(node):
                if self._can_be_int8(node.input[0]):
                    self._add(node.input[0], f"input of {_named(node)}, whose output is int8")
            elif node.op_type == "MaxPool" and node.input[0] in self._reasons:
                self._add(node.output[0], f"{_named(node)} passes int8 through")
        return len(self._reasons) > before

    def _around_add(self, node: NodeProto) -> None:
        if any(self._graph.is_constant(name) for name in node.input):
            return
        if self._activated(node.output[0]) not in self._reasons:
            return
        fusable = [name for name in node.input if self._fuses(name)]
        if len(fusable) == len(node.input):
            # The heavier convolution takes the sum; the other's output is the residual.
            heaviest = max(fusable, key=self._weight_size)
            fusable = [heaviest]
        others = [name for name in node.input if name not in fusable]
        if fusable:
            for name in others:
                if self._can_be_int8(name):
                    self._add(name, f"residual input of {_named(node)}")
        elif all(self._can_be_int8(name) for name in others):
            for name in others:
                self._add(name, f"input of {_named(node)}, whose output is int8")

    def _is_kernel(self, node: NodeProto) -> bool:
        """Whether ``node`` is pooling, or an activation behind it that is fused into nothing."""
        before = self._graph.producer(node.input[0]) if node.op_type in _ACTIVATIONS else node
        return before is not None and before.op_type in _POOLING

    def _activated(self, tensor: str) -> str:
        """``tensor``, or what the activation that alone reads it makes of it."""
        readers = self._graph.consumers(tensor)
        if len(readers) == 1 and readers[0].op_type in _ACTIVATIONS:
            return str(readers[0].output[0])
        return tensor

    def _fuses(self, tensor: str) -> bool:
        """Whether an int8 convolution makes ``tensor`` for the Add alone."""
        return (
            tensor in self._by_output
            and tensor not in self._reasons
            and len(self._graph.consumers(tensor)) == 1
            and not self._graph.is_output(tensor)
        )

    def _weight_size(self, tensor: str) -> int:
        return int(self._graph.array(self._by_output[tensor].weight).size)

    def _can_be_int8(self, tensor: str) -> bool:
        """Whether TensorRT can have ``tensor`` come out of the layer before it as int8."""
        if tensor in self._reasons or tensor in self._by_output:
            return True
        node = self._graph.producer(tensor)
        if node is None:
            return False
        if node.op_type in _ACTIVATIONS or _commutes(node):
            return self._can_be_int8(node.input[0])
        if node.op_type == "Concat":
            return all(self._can_be_int8(name) for name in node.input)
        if node.op_type == "Add":
            return any(name in self._by_output for name in node.input)
        return node.op_type in _POOLING and self._can_be_int8(node.input[0])


def _commutes(node: NodeProto) -> bool:
    if node.op_type == "Resize":
        mode = next((entry.s for entry in node.attribute if entry.name == "mode"), b"nearest")
        return bool(mode == b"nearest")
    return node.op_type in _COMMUTING


def _named(node: NodeProto) -> str:
    return f"{node.op_type} {node.name}"
