"""Cross-layer equalization: channels are rescaled between layers so that one int8 scale fits all.

A convolution may give a channel c times smaller if all its readers multiply it by c again; ReLU,
pooling, sums and concatenations in between do not mind. The network computes the same, but the
channels of a tensor come to have similar ranges, and a scale per tensor no longer wastes its levels
on the widest channel. After Nagel et al., "Data-free quantization through weight equalization and
bias correction", ICCV 2019 (arXiv:1906.04721), here with the measured ranges of activations and
for any graph of channels: residual sums and concatenations tie channels of several layers together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from edgeseg.calibration.graph import (
    Graph,
    Layer,
    attribute,
    input_channels,
    input_factors,
    is_standard,
    output_channels,
    output_factors,
)

__all__ = ["equalize"]

# One input, and operators that commute with a positive factor per channel of it; ReduceMean and
# Resize do so where they leave the channels alone.
_HOMOGENEOUS = (
    "Relu",
    "LeakyRelu",
    "PRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "ReduceMean",
    "Resize",
    "Identity",
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
    factors = _factors(made, peaks, balance)
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


def _factors(
    graph: Graph, peaks: Mapping[str, NDArray[np.float64]], balance: float
) -> dict[str, NDArray[np.float64]]:
    """Tensor -> what to divide each of its channels by, for tensors that are to change."""
    ties = _Ties(graph)
    seen = {
        name: values
        for name, values in peaks.items()
        if name in ties.tensors and values.size == len(ties.channels(name))
    }
    # Of each set of tied channels: the widest activation, the largest weight that reads them, and
    # whether all such weights have a scale of their own, which takes any factor in at no cost.
    peak, reach = np.zeros(ties.size), np.zeros(ties.size)
    free = np.ones(ties.size, dtype=bool)
    for name, values in seen.items():
        np.maximum.at(peak, ties.channels(name), values)
    for layer in ties.layers:
        weight = np.abs(graph.array(layer.weight).astype(np.float64))
        channels = ties.channels(layer.input)
        np.maximum.at(reach, channels, _reach(layer, weight))
        free[channels] &= layer.kind == "Conv" and weight.shape[1] == 1
    movable = (peak > 0) & (reach > 0) & ~ties.fixed()
    share = np.where(free, 1.0, balance)[movable]
    factor = np.ones(ties.size)
    factor[movable] = peak[movable] ** share / reach[movable] ** (1 - share)
    factor *= _levels(ties, seen, factor, movable)
    factor = np.where(movable, factor.clip(1 / _LIMIT, _LIMIT), 1.0)
    return {
        name: factor[ties.channels(name)]
        for name in ties.tensors
        if movable[ties.channels(name)].any()
    }


def _reach(layer: Layer, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest of the weights on each input channel, (channels,), each relative to the largest
    of its output channel, since that sets the scale."""
    axes = tuple(axis for axis in range(weight.ndim) if axis != layer.axis)
    largest = weight.max(axis=axes, keepdims=True)
    relative = weight / np.where(largest > 0, largest, 1)
    if layer.kind == "Conv":
        # (out, in / group, ...) -> (group, out / group, in / group, positions)
        groups = relative.reshape(layer.group, weight.shape[0] // layer.group, weight.shape[1], -1)
        per_input: NDArray[np.float64] = groups.max(axis=(1, 3)).ravel()
        return per_input
    rows = np.moveaxis(relative, 1 - layer.axis, 0)
    per_row: NDArray[np.float64] = rows.reshape(rows.shape[0], -1).max(axis=1)
    return per_row


def _levels(
    ties: _Ties,
    peaks: Mapping[str, NDArray[np.float64]],
    factor: NDArray[np.float64],
    movable: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """What to multiply the factors by, per channel, one number for all tensors tied together: the
    widest channel then keeps its peak, or comes to that of the widest one that cannot move."""
    own: dict[int, float] = {}
    given: dict[int, float] = {}
    for name, values in peaks.items():
        moves = movable[ties.channels(name)]
        evened = (values / factor[ties.channels(name)])[moves].max(initial=0.0)
        still = values[~moves].max(initial=0.0)
        for found, wanted in ((own, values.max()), (given, still)):
            if evened > 0 and wanted > 0:
                found[ties.group(name)] = max(found.get(ties.group(name), 0.0), evened / wanted)
    levels = {**own, **given}
    level = np.ones(ties.size)
    for name in ties.tensors:
        level[ties.channels(name)] = levels.get(ties.group(name), 1.0)
    return level


class _Ties:
    """Which channels (axis 1) of a graph's tensors have to be scaled together: in each set of them
    one stands for all.

    ``tensors``: those with channels. ``layers``: those whose channels are known. ``size``: how many
    numbers there are for channels.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._shapes = {
            name: shape for name, shape in graph.shapes().items() if len(shape) > 1 and shape[1]
        }
        self.tensors = tuple(self._shapes)
        self.layers = [layer for layer in graph.layers() if self._fits(layer)]
        self._numbers: dict[str, slice] = {}
        self.size = 0
        for name, shape in self._shapes.items():
            self._numbers[name] = slice(self.size, self.size + shape[1])
            self.size += shape[1]
        self._index = {name: index for index, name in enumerate(self.tensors)}
        channels, groups = _Sets(self.size), _Sets(len(self.tensors))
        self._minded = {end.name for end in (*graph.model.graph.input, *graph.model.graph.output)}
        layers = {layer.node for layer in self.layers}
        for node in graph.nodes:
            joints = self._joints(node)
            for source, target, offset in joints:
                groups.join(self._index[source], self._index[target])
                first = self._numbers[target].start + offset
                for number in range(self._shapes[source][1]):
                    channels.join(self._numbers[source].start + number, first + number)
            if node.name not in layers:
                tied = {name for joint in joints for name in joint[:2]}
                self._minded.update({*node.input, *node.output} - tied)
        self._roots, self._groups = channels.roots(), groups.roots()

    def channels(self, tensor: str) -> NDArray[np.int64]:
        """What stands for each channel of ``tensor``, (channels,) numbers below ``size``."""
        return self._roots[self._numbers[tensor]]

    def group(self, tensor: str) -> int:
        """One number for all tensors that share a channel, directly or over others."""
        return int(self._groups[self._index[tensor]])

    def fixed(self) -> NDArray[np.bool_]:
        """Which channels cannot be scaled, (size,): they meet an operator that minds, or are an
        input or output of the graph."""
        fixed = np.zeros(self.size, dtype=bool)
        for name in self._minded & self._numbers.keys():
            fixed[self.channels(name)] = True
        return fixed

    def _fits(self, layer: Layer) -> bool:
        shape = self._graph.array(layer.weight).shape
        return all(
            self._shapes.get(name, (0, 0))[1] == channels
            for name, channels in (
                (layer.input, input_channels(layer, shape)),
                (layer.output, output_channels(layer, shape)),
            )
        )

    def _joints(self, node: NodeProto) -> list[tuple[str, str, int]]:
        """Tensors of ``node`` that have the same channels: (input, output, channel of the output
        that is the first of the input). None for an operator that minds a factor."""
        target = node.output[0]
        shapes = [self._shapes.get(name) for name in (*node.input, target)]
        first, last = shapes[0], shapes[-1]
        if first is None or last is None:
            return []
        if is_standard(node, *_HOMOGENEOUS):
            same = first[1] == last[1] and self._leaves_channels(node, len(first))
            return [(node.input[0], target, 0)] if same else []
        if is_standard(node, "Add"):
            same = all(shape and (len(shape), shape[1]) == (len(last), last[1]) for shape in shapes)
            return [(name, target, 0) for name in node.input] if same else []
        joints = []
        if is_standard(node, "Concat") and None not in shapes:
            axis = attribute(node, "axis", 0) % len(first)
            offset = 0
            for name in node.input if axis else ():
                joints.append((name, target, offset))
                offset += self._shapes[name][1] if axis == 1 else 0
        return joints

    def _leaves_channels(self, node: NodeProto, rank: int) -> bool:
        """Whether a ReduceMean or Resize works along spatial axes only; others always do."""
        if node.op_type not in ("ReduceMean", "Resize"):
            return True
        words = {entry.name: entry for entry in node.attribute}
        axes = list(words["axes"].ints) if "axes" in words else []
        if node.op_type == "ReduceMean":
            if len(node.input) > 1 and self._graph.is_constant(node.input[1]):
                axes = self._graph.array(node.input[1]).tolist()
            return bool(axes) and all(axis % rank > 1 for axis in axes)
        mode = words.get("coordinate_transformation_mode")
        if mode is not None and mode.s == b"tf_crop_and_resize":
            # What lies outside of the picture is a constant, whatever the factor.
            return False
        if axes or len(node.input) < 3 or not node.input[2]:
            # By sizes: the number of channels is the same, so they are not resized.
            return all(axis % rank > 1 for axis in axes)
        return self._graph.is_constant(node.input[2]) and bool(
            (self._graph.array(node.input[2])[:2] == 1).all()
        )


class _Sets:
    """Disjoint sets of the numbers below ``size``; at first each has one."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def join(self, one: int, other: int) -> None:
        """Makes one set of theirs."""
        self._parent[self._root(one)] = self._root(other)

    def roots(self) -> NDArray[np.int64]:
        """Number -> the one that stands for its set, (size,)."""
        return np.array([self._root(number) for number in range(len(self._parent))], np.int64)

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number
