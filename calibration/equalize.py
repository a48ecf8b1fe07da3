"""Cross-layer equalization: channels are rescaled between layers so that one int8 scale fits all.

A convolution may give a channel c times smaller if all its readers multiply it by c again; ReLU,
pooling, sums and concatenations in between do not mind. The network computes the same, but the
channels of a tensor come to have similar ranges, and a scale per tensor no longer wastes its levels
on the widest channel. After Nagel et al., "Data-free quantization through weight equalization and
bias correction", ICCV 2019 (arXiv:1906.04721), here with the measured ranges of activations and
for any graph of channels: residual sums and concatenations tie channels of several layers together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from edgeseg.calibration.graph import Graph, Layer, input_factors, output_factors

__all__ = ["equalize"]

# Operators that commute with a positive factor per channel.
_HOMOGENEOUS = frozenset(
    {
        "Relu",
        "LeakyRelu",
        "PRelu",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "ReduceMean",
        "Resize",
        "Identity",
    }
)
# Factors stay within this of 1: beyond it float32 weights would lose what int8 gains.
_LIMIT = 1e3


def equalize(
    graph: Graph, peaks: Mapping[str, NDArray[np.float64]], *, balance: float = 0.5
) -> tuple[Graph, dict[str, NDArray[np.float64]]]:
    """A new graph that computes the same with evened channels, and what each tensor was divided by.

    ``peaks``: tensor -> largest magnitude of each channel, (channels,), for the tensors that will
    be quantized. ``balance``: 1 evens the activations completely, at the cost of the weights
    behind them; 0 the weights.
    """
    made = Graph(graph.model)
    ties = _Ties(made, peaks)
    factors = ties.factors(balance)
    for layer in made.layers():
        weight = made.array(layer.weight).astype(np.float64)
        if layer.input in factors:
            weight = weight * input_factors(layer, weight.shape, factors[layer.input])
        if layer.output in factors:
            shrink = 1 / factors[layer.output]
            weight = weight * output_factors(layer, weight.shape, shrink)
            if layer.bias is not None:
                made.put(layer.bias, (made.floats(layer.bias) * shrink).astype(np.float32))
        made.put(layer.weight, weight.astype(np.float32))
    return made, {name: factors[name] for name in peaks if name in factors}


class _Ties:
    """Which channels of which tensors have to be scaled together."""

    def __init__(self, graph: Graph, peaks: Mapping[str, NDArray[np.float64]]) -> None:
        self._graph = graph
        self._peaks = peaks
        self._layers = graph.layers()
        self._first: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self._parent: list[int] = []
        self._fixed: set[int] = set()
        for layer in self._layers:
            self._enter(layer.output, _outputs(graph, layer))
            self._enter(layer.input, _inputs(graph, layer))
        self._tie()

    def factors(self, balance: float) -> dict[str, NDArray[np.float64]]:
        """Tensor -> factor of each channel, for tensors with a factor other than 1."""
        roots = {
            name: np.array([self._root(self._first[name] + c) for c in range(count)])
            for name, count in self._channels.items()
        }
        size = len(self._parent)
        peak = np.zeros(size)
        for name, values in self._peaks.items():
            if name in roots and values.size == self._channels[name]:
                np.maximum.at(peak, roots[name], values)
        column = np.zeros(size)
        depthwise = np.ones(size, dtype=bool)
        for layer in self._layers:
            reach, free = self._reach(layer)
            np.maximum.at(column, roots[layer.input], reach)
            if not free:
                depthwise[roots[layer.input]] = False
        made = np.ones(size)
        movable = (peak > 0) & (column > 0)
        movable[list({self._root(index) for index in self._fixed})] = False
        share = np.where(depthwise, 1.0, balance)
        made[movable] = (peak**share / np.maximum(column, 1e-30) ** (1 - share))[movable]
        found = {}
        for name, indices in roots.items():
            values = made[indices]
            free = movable[indices]
            if not free.any():
                continue
            found[name] = values
        return self._normalised(found, roots, movable)

    def _normalised(
        self,
        found: dict[str, NDArray[np.float64]],
        roots: dict[str, NDArray[np.int64]],
        movable: NDArray[np.bool_],
    ) -> dict[str, NDArray[np.float64]]:
        """Brings the widest channel of each tied set of tensors to factor 1, and limits the rest.

        Fixed channels have factor 1, so where a tensor has some, the others are made to reach the
        same peak instead.
        """
        scale = np.ones(len(self._parent))
        for names in self._components(roots):
            level = 0.0
            for name in names:
                if name in self._peaks and name in found:
                    values = self._peaks[name] / found[name]
                    fixed = ~movable[roots[name]]
                    wanted = (
                        self._peaks[name][fixed].max() if fixed.any() else self._peaks[name].max()
                    )
                    if wanted > 0 and values[~fixed].size:
                        level = max(level, float(values[~fixed].max() / wanted))
            for name in names:
                scale[roots[name]] = level or 1.0
        return {
            name: np.clip(
                np.where(movable[roots[name]], values * scale[roots[name]], 1.0), 1 / _LIMIT, _LIMIT
            )
            for name, values in found.items()
        }

    def _components(self, roots: dict[str, NDArray[np.int64]]) -> Iterable[list[str]]:
        """Tensors that share a channel, directly or over others."""
        owner: dict[int, int] = {}
        parent = list(range(len(roots)))

        def find(index: int) -> int:
            while parent[index] != index:
                index = parent[index]
            return index

        names = list(roots)
        for index, name in enumerate(names):
            for root in set(roots[name].tolist()):
                if root in owner:
                    parent[find(index)] = find(owner[root])
                else:
                    owner[root] = index
        together: dict[int, list[str]] = {}
        for index, name in enumerate(names):
            together.setdefault(find(index), []).append(name)
        return together.values()

    def _reach(self, layer: Layer) -> tuple[NDArray[np.float64], bool]:
        """Largest relative weight on each input channel, and whether scaling them costs nothing.

        Relative to the largest weight of the same output channel, since that sets the scale.
        """
        weight = np.abs(self._graph.array(layer.weight).astype(np.float64))
        ones = np.ones(weight.shape)
        axes = tuple(axis for axis in range(weight.ndim) if axis != layer.axis)
        ones = weight / np.maximum(weight.max(axis=axes, keepdims=True), 1e-30)
        count = _inputs(self._graph, layer)
        if layer.kind == "Conv":
            rows = ones.reshape(ones.shape[0], ones.shape[1], -1).max(axis=2)
            per_group = rows.reshape(layer.group, -1, rows.shape[1]).max(axis=1)
            return per_group.reshape(count), weight.shape[1] == 1
        if layer.kind == "ConvTranspose":
            return ones.reshape(count, -1).max(axis=1), False
        side = ones.ndim - 2 if layer.axis == ones.ndim - 1 else 1
        others = tuple(axis for axis in range(ones.ndim) if axis != side)
        return ones.max(axis=others), False

    def _enter(self, tensor: str, channels: int) -> None:
        if tensor in self._first:
            return
        self._first[tensor] = len(self._parent)
        self._channels[tensor] = channels
        self._parent.extend(range(len(self._parent), len(self._parent) + channels))

    def _tie(self) -> None:
        read = {(layer.node, layer.input) for layer in self._layers}
        made = {layer.node for layer in self._layers}
        inputs = {entry.name for entry in self._graph.model.graph.input}
        for node in self._graph.nodes:
            self._tie_node(node, read, made)
        for name in list(self._first):
            if name in inputs or self._graph.is_output(name):
                self._fix(name)

    def _tie_node(self, node: NodeProto, read: set[tuple[str, str]], made: set[str]) -> None:
        if node.name in made:
            for name in node.input:
                if (node.name, name) not in read:
                    self._fix(name)
            return
        source, target = node.input[0] if node.input else "", node.output[0]
        if node.op_type in _HOMOGENEOUS and source in self._first:
            self._enter(target, self._channels[source])
            self._join(source, target, 0)
            for name in node.input[1:]:
                self._fix(name)
        elif node.op_type == "Add" and self._same_channels(node):
            self._enter(target, self._channels[source])
            for name in node.input:
                self._join(name, target, 0)
        elif node.op_type == "Concat" and all(name in self._first for name in node.input):
            self._enter(target, sum(self._channels[name] for name in node.input))
            offset = 0
            for name in node.input:
                self._join(name, target, offset)
                offset += self._channels[name]
        else:
            for name in (*node.input, *node.output):
                self._fix(name)
            for name in node.output:
                # Known from here on, and not to be touched.
                if name not in self._first and source in self._first:
                    self._enter(name, self._channels[source])
                    self._fix(name)

    def _same_channels(self, node: NodeProto) -> bool:
        counts = {self._channels.get(name, -1) for name in node.input}
        return len(counts) == 1 and -1 not in counts

    def _join(self, source: str, target: str, offset: int) -> None:
        for channel in range(self._channels[source]):
            one = self._root(self._first[source] + channel)
            other = self._root(self._first[target] + offset + channel)
            self._parent[one] = other

    def _fix(self, tensor: str) -> None:
        if tensor in self._first:
            first = self._first[tensor]
            self._fixed.update(range(first, first + self._channels[tensor]))

    def _root(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index


def _outputs(graph: Graph, layer: Layer) -> int:
    shape = graph.array(layer.weight).shape
    return int(shape[layer.axis] * (layer.group if layer.kind == "ConvTranspose" else 1))


def _inputs(graph: Graph, layer: Layer) -> int:
    shape = graph.array(layer.weight).shape
    if layer.kind == "Conv":
        return int(shape[1] * layer.group)
    if layer.kind == "ConvTranspose":
        return int(shape[0])
    return int(shape[len(shape) - 2] if layer.axis == len(shape) - 1 else shape[1])
