"""Shapes of a whole graph, an instance model's selection of boxes included.

`edgeseg.engine.graph` follows the shapes that the builder's memory check needs: those of backbones
and heads of convolutions. Here the rules for what stands behind them are added: slices, selections,
matrix products. What cannot be known from the file (how many boxes overlap) stays unknown.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from edgeseg.engine.graph import Graph, GraphReader, Node, Shape
from edgeseg.onnxfile import DOMAIN, MASK_HEAD, damaged

__all__ = ["read_graph"]

_AS_BEFORE = (
    "Abs", "Dropout", "Elu", "Gelu", "Log", "LogSoftmax", "Mish", "Reciprocal", "Selu", "Sign",
    "Softplus", "CumSum", "LayerNormalization", "GroupNormalization", "ScatterElements",
    "ScatterND", "Trilu",
)  # fmt: skip


def read_graph(content: bytes, name: str = "the model") -> Graph:
    """The graph of the ONNX model ``content`` with these shapes; BundleError when it is damaged."""
    try:
        return _Shapes(content).graph()
    except (LookupError, ValueError, ArithmeticError, struct.error) as error:
        raise damaged(name) from error


class _Shapes(GraphReader):
    def _follow(self, node: Node) -> None:
        super()._follow(node)
        if node.domain or not node.inputs:
            return
        shape = self._shapes.get(node.inputs[0])
        if shape is None:
            return
        if node.op_type == "Split":
            self._split(node, shape)
        elif node.op_type == "TopK":
            taken = self._taken(node, shape)
            if taken is not None:
                for output in node.outputs:
                    self._set_shape(output, taken)

    def _shape_of(self, node: Node) -> Shape | None:
        if node.domain == DOMAIN and node.op_type == MASK_HEAD:
            return self._masks(node)
        found = super()._shape_of(node)
        if found is not None or node.domain or not node.inputs:
            return found
        shape = self._shapes.get(node.inputs[0])
        if shape is None:
            return None
        if node.op_type in _AS_BEFORE:
            return shape
        if node.op_type == "Shape":
            start = node.integers.get("start", (0,))[0]
            return (len(shape[start : node.integers.get("end", (len(shape),))[0]]),)
        rule = _RULES.get(node.op_type)
        return None if rule is None else rule(self, node, shape)

    def _masks(self, node: Node) -> Shape | None:
        prototypes, coefficients = (self._shapes.get(name) for name in node.inputs[:2])
        if prototypes is None or coefficients is None:
            return None
        return (1, coefficients[1], *prototypes[2:])

    def _axes(self, node: Node, index: int) -> tuple[int, ...] | None:
        """The axes of attribute or input ``index``."""
        if "axes" in node.integers:
            return tuple(node.integers["axes"])
        if len(node.inputs) > index and node.inputs[index]:
            return self._values.get(node.inputs[index])
        return None

    def _slice(self, node: Node, shape: Shape) -> Shape | None:
        if len(node.inputs) < 3:
            return None
        starts, ends = (self._values.get(name) for name in node.inputs[1:3])
        if starts is None or ends is None:
            return None
        axes = self._axes(node, 3) or tuple(range(len(starts)))
        steps = (
            self._values.get(node.inputs[4])
            if len(node.inputs) > 4 and node.inputs[4]
            else (1,) * len(starts)
        )
        if steps is None:
            return None
        sides = list(shape)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            sides[axis] = len(range(*slice(start, end, step).indices(shape[axis])))
        return tuple(sides)

    def _gather(self, node: Node, shape: Shape) -> Shape | None:
        chosen = self._shapes.get(node.inputs[1])
        if chosen is None:
            return None
        axis = node.integers.get("axis", (0,))[0] % max(len(shape), 1)
        return (*shape[:axis], *chosen, *shape[axis + 1 :])

    def _gather_elements(self, node: Node, shape: Shape) -> Shape | None:
        return self._shapes.get(node.inputs[1])

    def _gather_nd(self, node: Node, shape: Shape) -> Shape | None:
        chosen = self._shapes.get(node.inputs[1])
        batch = node.integers.get("batch_dims", (0,))[0]
        return None if chosen is None else (*chosen[:-1], *shape[batch + chosen[-1] :])

    def _squeeze(self, node: Node, shape: Shape) -> Shape | None:
        axes = self._axes(node, 1)
        if axes is None:
            return tuple(side for side in shape if side != 1)
        gone = {axis % len(shape) for axis in axes}
        return tuple(side for axis, side in enumerate(shape) if axis not in gone)

    def _unsqueeze(self, node: Node, shape: Shape) -> Shape | None:
        axes = self._axes(node, 1)
        if axes is None:
            return None
        rank = len(shape) + len(axes)
        new = {axis % rank for axis in axes}
        if len(new) < len(axes):
            # One of them comes twice.
            return None
        old = iter(shape)
        return tuple(1 if axis in new else next(old) for axis in range(rank))

    def _flatten(self, node: Node, shape: Shape) -> Shape | None:
        axis = node.integers.get("axis", (1,))[0]
        axis = axis + len(shape) if axis < 0 else axis
        return (math.prod(shape[:axis]), math.prod(shape[axis:]))

    def _gemm(self, node: Node, shape: Shape) -> Shape | None:
        other = self._shapes.get(node.inputs[1])
        if other is None:
            return None
        rows = shape[1] if node.integers.get("transA", (0,))[0] else shape[0]
        return (rows, other[0] if node.integers.get("transB", (0,))[0] else other[1])

    def _matmul(self, node: Node, shape: Shape) -> Shape | None:
        other = self._shapes.get(node.inputs[1])
        if other is None or len(shape) < 2 or len(other) < 2:
            return None
        batch = shape[:-2] if len(shape) >= len(other) else other[:-2]
        return (*batch, shape[-2], other[-1])

    def _expand(self, node: Node, shape: Shape) -> Shape | None:
        wanted = self._values.get(node.inputs[1])
        if wanted is None:
            return None
        rank = max(len(wanted), len(shape))
        left = (1,) * (rank - len(shape)) + shape
        right = (1,) * (rank - len(wanted)) + wanted
        return tuple(max(one, other) for one, other in zip(left, right, strict=True))

    def _tile(self, node: Node, shape: Shape) -> Shape | None:
        times = self._values.get(node.inputs[1])
        if times is None:
            return None
        return tuple(side * time for side, time in zip(shape, times, strict=True))

    def _pad(self, node: Node, shape: Shape) -> Shape | None:
        pads = self._values.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if pads is None or len(pads) != 2 * len(shape):
            return None
        return tuple(side + pads[axis] + pads[axis + len(shape)] for axis, side in enumerate(shape))

    def _roi_align(self, node: Node, shape: Shape) -> Shape | None:
        boxes = self._shapes.get(node.inputs[1])
        if boxes is None:
            return None
        sides = (node.integers.get(f"output_{side}", (1,))[0] for side in ("height", "width"))
        return (boxes[0], shape[1], *sides)

    def _depth_to_space(self, node: Node, shape: Shape) -> Shape | None:
        size = node.integers["blocksize"][0]
        if node.op_type == "SpaceToDepth":
            return (shape[0], shape[1] * size * size, shape[2] // size, shape[3] // size)
        return (shape[0], shape[1] // (size * size), shape[2] * size, shape[3] * size)

    def _taken(self, node: Node, shape: Shape) -> Shape | None:
        count = self._values.get(node.inputs[1])
        if count is None:
            return None
        axis = node.integers.get("axis", (-1,))[0] % max(len(shape), 1)
        return (*shape[:axis], count[0], *shape[axis + 1 :])

    def _split(self, node: Node, shape: Shape) -> None:
        axis = node.integers.get("axis", (0,))[0] % max(len(shape), 1)
        parts: tuple[int, ...] | None = tuple(node.integers.get("split", ()))
        if not parts and len(node.inputs) > 1 and node.inputs[1]:
            parts = self._values.get(node.inputs[1])
        elif not parts:
            whole = -(-shape[axis] // len(node.outputs))
            last = shape[axis] - whole * (len(node.outputs) - 1)
            parts = (*(whole,) * (len(node.outputs) - 1), last)
        for output, part in zip(node.outputs, parts or (), strict=False):
            self._set_shape(output, (*shape[:axis], part, *shape[axis + 1 :]))


_RULES: dict[str, Callable[[_Shapes, Node, Shape], Shape | None]] = {
    "Slice": _Shapes._slice,
    "Gather": _Shapes._gather,
    "GatherElements": _Shapes._gather_elements,
    "GatherND": _Shapes._gather_nd,
    "Squeeze": _Shapes._squeeze,
    "Unsqueeze": _Shapes._unsqueeze,
    "Flatten": _Shapes._flatten,
    "Gemm": _Shapes._gemm,
    "MatMul": _Shapes._matmul,
    "Expand": _Shapes._expand,
    "Tile": _Shapes._tile,
    "Pad": _Shapes._pad,
    "RoiAlign": _Shapes._roi_align,
    "DepthToSpace": _Shapes._depth_to_space,
    "SpaceToDepth": _Shapes._depth_to_space,
    "ReduceL2": _Shapes._reduce,
    "ReduceProd": _Shapes._reduce,
}
