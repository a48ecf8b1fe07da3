"""An ONNX graph as the TensorRT builder has to know it before it starts: types and sizes.

Read from the file's bytes, since the device has no ``onnx`` package. It follows element types to
say in which precision the graph wants each convolution, and shapes to say how much memory the
activations take. Both are followed as far as the operators of EdgeSeg's exports go; what lies
behind an unknown operator is left out, never guessed. So is what no network has: a tensor of a
hundred dimensions, or one larger than an address.

Field numbers: onnx/onnx.proto (ONNX IR 10).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from edgeseg.onnxfile import DOMAIN, damaged
from edgeseg.protobuf import BYTES, VARINT, Buffer, fields, floats_of, integers_of, text_of

__all__ = ["Constant", "Graph", "GraphReader", "Node", "Precision", "Shape"]

#: how a layer computes, as EdgeSeg writes it
Precision = Literal["int8", "fp8", "fp16", "bf16", "fp32"]

_FLOAT, _UINT8, _INT32, _INT64, _BOOL, _HALF = 1, 2, 6, 7, 9, 10  # TensorProto.DataType
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64,
         16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4}  # fmt: skip
_PRECISIONS: dict[int, Precision] = {1: "fp32", 10: "fp16", 16: "bf16", 17: "fp8", 3: "int8"}

#: operators with weights, where the precision of a network is decided
_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or")
# These move values and leave them as they are: a weight's DequantizeLinear may stand before one.
_MOVES = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze")
# More in a row are a damaged file that goes round in circles.
_MOST_MOVES = 8

# Values of longer tensors are weights; sizes, scales and axes are shorter. And a vector of sizes
# that is put behind itself forty times would fill any memory.
_FEW = 64
# As many axes as numpy has, and as many elements as an address.
_MOST_AXES = 64
_MOST_ELEMENTS = 1 << 63

Shape = tuple[int, ...]


class Constant(NamedTuple):
    """What is written into the file: type, shape, and the values where they are few.

    ``integers`` of int32 and int64, ``floats`` of float32; None for other types and long tensors.
    """

    element_type: int
    shape: Shape
    integers: tuple[int, ...] | None = None
    floats: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Node:
    """One node. ``integers`` has the attributes that are an int or a list of ints."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    #: the "value..." of a Constant or ConstantOfShape
    constant: Constant | None = None

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return self.name or f"an unnamed {self.op_type} that gives {', '.join(self.outputs)}"


@dataclass(frozen=True)
class Graph:
    """What was read.

    ``inputs``: name -> shape of the graph's own inputs, -1 where the file leaves a size open.
    ``types``: tensor -> TensorProto.DataType. ``shapes``: tensor -> shape, where it is known.
    ``weight_bytes``: size of all initializers.
    """

    nodes: tuple[Node, ...]
    inputs: Mapping[str, Shape]
    outputs: tuple[str, ...]
    types: Mapping[str, int]
    shapes: Mapping[str, Shape]
    weight_bytes: int

    @classmethod
    def read(cls, content: bytes, name: str = "the model") -> Graph:
        """The graph of the ONNX model ``content``; BundleError when it is damaged."""
        try:
            return GraphReader(content).graph()
        except (LookupError, ValueError, ArithmeticError, struct.error) as error:
            raise damaged(name) from error

    def precisions(self) -> dict[str, Precision]:
        """Node with weights -> precision that the graph asks for; unnamed nodes are left out.

        A node asks for int8 when its data and its weights both come out of a DequantizeLinear:
        TensorRT fuses those into the layer (its rules for explicit quantization).
        """
        makers = {output: node for node in self.nodes for output in node.outputs}
        found: dict[str, Precision] = {}
        for node in self.nodes:
            if node.domain or node.op_type not in _HEAVY or not node.name or len(node.inputs) < 2:
                continue
            quantized = [self._quantized_type(name, makers) for name in node.inputs[:2]]
            wanted = quantized[0] if None not in quantized else self.types.get(node.inputs[0])
            precision = _PRECISIONS.get(wanted or 0)
            if precision is not None:
                found[node.name] = precision
        return found

    def operators(self) -> tuple[Node, ...]:
        """Nodes of domain ``edgeseg``: what plugins compute."""
        return tuple(node for node in self.nodes if node.domain == DOMAIN)

    def activation_bytes(self) -> int:
        """Most memory that known tensors take at one time, each freed after its last reader.

        Weights and constants do not count.
        """
        made = {
            output for node in self.nodes if node.op_type != "Constant" for output in node.outputs
        }
        last: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for name in node.inputs:
                last[name] = index
        for name in self.outputs:
            last[name] = len(self.nodes)
        alive = sum(self._bytes(name) for name in self.inputs)
        peak = alive
        for index, node in enumerate(self.nodes):
            alive += sum(self._bytes(name) for name in node.outputs if name in made)
            peak = max(peak, alive)
            for name in {*node.inputs, *node.outputs}:
                if (name in made or name in self.inputs) and last.get(name, index) == index:
                    alive -= self._bytes(name)
        return peak

    def _bytes(self, name: str) -> int:
        shape = self.shapes.get(name)
        if shape is None or min(shape, default=1) < 0:
            return 0
        return math.prod(shape) * _BITS.get(self.types.get(name, _FLOAT), 32) // 8

    def _quantized_type(self, name: str, makers: Mapping[str, Node]) -> int | None:
        """Type of what is dequantized into the tensor ``name``, None when nothing is."""
        node = makers.get(name)
        for _ in range(_MOST_MOVES):
            if node is None or node.op_type not in _MOVES or not node.inputs:
                break
            node = makers.get(node.inputs[0])
        if node is None or not node.inputs or node.op_type != "DequantizeLinear":
            return None
        return self.types.get(node.inputs[0])


class GraphReader:
    """Decodes the file and follows types, shapes and small integer vectors through the nodes.

    What it raises for a damaged file: LookupError, ValueError, ArithmeticError, struct.error.
    """

    def __init__(self, content: Buffer) -> None:
        self._content = content
        self._types: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        # Integer tensors whose values are known: the sizes that Reshape and Resize take.
        self._values: dict[str, tuple[int, ...]] = {}
        self._scales: dict[str, tuple[float, ...]] = {}

    def graph(self) -> Graph:
        graphs = [
            value
            for number, wire, _, value in fields(self._content)
            if (number, wire) == (7, BYTES)
        ]
        if len(graphs) != 1:
            raise ValueError("no graph")
        nodes: list[Node] = []
        inputs: list[Buffer] = []
        outputs: list[str] = []
        weight_bytes = 0
        for number, _, _, value in fields(graphs[0]):
            if number == 1:
                nodes.append(_node(value))
            elif number == 5:
                weight_bytes += self._initializer(value)
            elif number == 11:
                inputs.append(value)
            elif number == 12:
                outputs.append(text_of(value, 1))
        # Files of old IR versions list initializers among the inputs as well.
        own = dict(
            described for described in map(_value_info, inputs) if described[0] not in self._types
        )
        for name, (element_type, shape) in own.items():
            self._types[name] = element_type
            if shape is not None:
                self._set_shape(name, shape)
        for node in nodes:
            self._follow(node)
        return Graph(
            nodes=tuple(nodes),
            inputs={name: shape or () for name, (_, shape) in own.items()},
            outputs=tuple(outputs),
            types=self._types,
            shapes=self._shapes,
            weight_bytes=weight_bytes,
        )

    def _initializer(self, tensor: Buffer) -> int:
        name = text_of(tensor, 8)
        constant = _tensor(tensor)
        self._types[name] = constant.element_type
        self._keep(name, constant)
        shape = self._shapes.get(name, ())
        return math.prod(shape) * _BITS.get(constant.element_type, 32) // 8

    def _keep(self, name: str, constant: Constant) -> None:
        self._set_shape(name, constant.shape)
        if constant.integers is not None:
            self._values[name] = constant.integers
        if constant.floats is not None:
            self._scales[name] = constant.floats

    def _follow(self, node: Node) -> None:
        element_type = self._type_of(node)
        for output in node.outputs:
            if element_type is not None:
                self._types[output] = element_type
        # Where the values were, which both give beside the values.
        if node.op_type in ("TopK", "MaxPool") and not node.domain and len(node.outputs) > 1:
            self._types[node.outputs[1]] = _INT64
        if not node.outputs:
            return
        if node.op_type == "Constant" and node.constant is not None:
            self._keep(node.outputs[0], node.constant)
            return
        shape = self._shape_of(node)
        if shape is not None:
            self._set_shape(node.outputs[0], shape)
            if node.domain == DOMAIN or node.op_type == "MaxPool":
                for output in node.outputs[1:]:
                    self._set_shape(output, shape)
        values = self._values_of(node)
        if values is not None:
            self._values[node.outputs[0]] = values

    def _set_shape(self, name: str, shape: Shape) -> None:
        """``name`` has ``shape``, unless no tensor can have it; then its shape stays unknown."""
        if len(shape) <= _MOST_AXES and all(-1 <= side < _MOST_ELEMENTS for side in shape):
            sides = [max(side, 1) for side in shape]
            if math.prod(sides) < _MOST_ELEMENTS:
                self._shapes[name] = shape
                return
        self._shapes.pop(name, None)

    def _type_of(self, node: Node) -> int | None:
        if node.domain == DOMAIN:
            return _HALF
        if node.domain:
            return None
        op = node.op_type
        if op == "Cast":
            return node.integers["to"][0]
        if op in ("Constant", "ConstantOfShape"):
            return node.constant.element_type if node.constant is not None else _FLOAT
        if op in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero"):
            return _INT64
        if op in _COMPARISONS:
            return _BOOL
        if op == "QuantizeLinear":
            written = node.integers.get("output_dtype", (0,))[0]
            point = self._types.get(node.inputs[2]) if len(node.inputs) > 2 else None
            return point or written or _UINT8
        if op == "DequantizeLinear":
            return node.integers.get("output_dtype", (0,))[0] or self._types.get(node.inputs[1])
        if op == "Where":
            return self._types.get(node.inputs[1])
        return next((self._types[name] for name in node.inputs if name in self._types), None)

    def _shape_of(self, node: Node) -> Shape | None:
        if node.domain == DOMAIN:
            return self._head_shape(node)
        rule = _SHAPES.get(node.op_type) if not node.domain else None
        shapes = [self._shapes.get(name) for name in node.inputs]
        if rule is None or not shapes or shapes[0] is None:
            return None
        return rule(self, node, shapes[0])

    def _head_shape(self, node: Node) -> Shape | None:
        if "height" not in node.integers or "width" not in node.integers:
            return None
        batch = (self._shapes.get(node.inputs[0]) or (1,))[:1]
        return (*batch, node.integers["height"][0], node.integers["width"][0])

    def _values_of(self, node: Node) -> tuple[int, ...] | None:
        op = node.op_type
        if op == "Shape":
            shape = self._shapes.get(node.inputs[0])
            if shape is None or min(shape, default=1) < 0:
                return None
            start = node.integers.get("start", (0,))[0]
            return shape[start : node.integers.get("end", (len(shape),))[0]]
        if op in ("Cast", *_MOVES):
            return self._values.get(node.inputs[0])
        if op == "Concat":
            parts = [self._values.get(name) for name in node.inputs]
            if all(part is not None for part in parts) and sum(len(p or ()) for p in parts) <= _FEW:
                return tuple(value for part in parts for value in part or ())
        return None

    # --- shapes, one function per family of operators

    def _same(self, node: Node, shape: Shape) -> Shape | None:
        return shape

    def _broadcast(self, node: Node, shape: Shape) -> Shape | None:
        shapes = [self._shapes.get(name) for name in node.inputs if name]
        rank = max(len(each) for each in shapes if each is not None)
        sides: list[int] = [1] * rank
        for each in shapes:
            if each is None:
                return None
            for axis, side in enumerate(each, rank - len(each)):
                sides[axis] = side if sides[axis] == 1 else sides[axis]
        return tuple(sides)

    def _conv(self, node: Node, shape: Shape) -> Shape | None:
        kernel = self._shapes.get(node.inputs[1])
        return (
            None
            if kernel is None
            else (shape[0], kernel[0], *_windows(node, shape[2:], kernel[2:]))
        )

    def _conv_transpose(self, node: Node, shape: Shape) -> Shape | None:
        kernel = self._shapes.get(node.inputs[1])
        if kernel is None:
            return None
        count = len(shape) - 2
        pads = node.integers.get("pads", (0,) * 2 * count)
        sides = []
        for axis in range(count):
            stride = node.integers.get("strides", (1,) * count)[axis]
            dilation = node.integers.get("dilations", (1,) * count)[axis]
            extra = node.integers.get("output_padding", (0,) * count)[axis]
            window = dilation * (kernel[2 + axis] - 1) + 1
            total = pads[axis] + pads[axis + count]
            sides.append(stride * (shape[2 + axis] - 1) + extra + window - total)
        return (shape[0], kernel[1] * node.integers.get("group", (1,))[0], *sides)

    def _pool(self, node: Node, shape: Shape) -> Shape | None:
        return (*shape[:2], *_windows(node, shape[2:], tuple(node.integers["kernel_shape"])))

    def _global_pool(self, node: Node, shape: Shape) -> Shape | None:
        return (*shape[:2], *(1 for _ in shape[2:]))

    def _transpose(self, node: Node, shape: Shape) -> Shape | None:
        order = node.integers.get("perm", tuple(reversed(range(len(shape)))))
        return tuple(shape[axis] for axis in order)

    def _concat(self, node: Node, shape: Shape) -> Shape | None:
        axis = node.integers["axis"][0] % max(len(shape), 1)
        sides = [self._shapes.get(name) for name in node.inputs]
        if any(each is None or len(each) != len(shape) for each in sides):
            return None
        return (*shape[:axis], sum(each[axis] for each in sides if each), *shape[axis + 1 :])

    def _resize(self, node: Node, shape: Shape) -> Shape | None:
        if len(node.inputs) > 3 and node.inputs[3]:
            return self._values.get(node.inputs[3])
        scales = self._scales.get(node.inputs[2]) if len(node.inputs) > 2 else None
        if scales is None or len(scales) != len(shape):
            return None
        return tuple(math.floor(side * scale) for side, scale in zip(shape, scales, strict=True))

    def _reshape(self, node: Node, shape: Shape) -> Shape | None:
        wanted = self._values.get(node.inputs[1])
        if wanted is None or min(shape, default=1) < 0:
            return None
        sides = [shape[axis] if side == 0 else side for axis, side in enumerate(wanted)]
        if -1 in sides:
            rest = math.prod(side for side in sides if side != -1)
            sides[sides.index(-1)] = math.prod(shape) // max(rest, 1)
        return tuple(sides)

    def _reduce(self, node: Node, shape: Shape) -> Shape | None:
        if "axis" in node.integers:
            axes: Sequence[int] | None = node.integers["axis"]
        elif len(node.inputs) > 1 and node.inputs[1]:
            axes = self._values.get(node.inputs[1])
        else:
            axes = node.integers.get("axes", range(len(shape)))
        if axes is None:
            return None
        gone = {axis % len(shape) for axis in axes}
        if node.integers.get("keepdims", (1,))[0]:
            return tuple(1 if axis in gone else side for axis, side in enumerate(shape))
        return tuple(side for axis, side in enumerate(shape) if axis not in gone)


_SHAPES: dict[str, Callable[[GraphReader, Node, Shape], Shape | None]] = {
    **dict.fromkeys(
        ("Cast", "Relu", "Sigmoid", "Softmax", "Identity", "BatchNormalization", "Clip", "Tanh",
         "QuantizeLinear", "DequantizeLinear", "Round", "LeakyRelu", "PRelu", "HardSigmoid",
         "HardSwish", "Erf", "Exp", "Neg", "Sqrt", "Floor", "Ceil", "InstanceNormalization"),
        GraphReader._same,
    ),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", *_COMPARISONS),
        GraphReader._broadcast,
    ),
    **dict.fromkeys(("MaxPool", "AveragePool"), GraphReader._pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), GraphReader._global_pool),
    **dict.fromkeys(
        ("ArgMax", "ArgMin", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"),
        GraphReader._reduce,
    ),
    **dict.fromkeys(("Conv", "DeformConv"), GraphReader._conv),
    "ConvTranspose": GraphReader._conv_transpose,
    "Transpose": GraphReader._transpose,
    "Concat": GraphReader._concat,
    "Resize": GraphReader._resize,
    "Reshape": GraphReader._reshape,
}  # fmt: skip


def _windows(node: Node, sides: Shape, kernel: Shape) -> Iterator[int]:
    """Sizes after a convolution or pooling of ``kernel`` (ONNX's rules, opset 22)."""
    count = len(sides)
    pads = node.integers.get("pads", (0,) * 2 * count)
    for axis, side in enumerate(sides):
        stride = node.integers.get("strides", (1,) * count)[axis]
        window = node.integers.get("dilations", (1,) * count)[axis] * (kernel[axis] - 1) + 1
        if node.texts.get("auto_pad", "NOTSET").startswith("SAME"):
            yield -(-side // stride)
            continue
        room = side + pads[axis] + pads[axis + count] - window
        steps = -(-room // stride) if node.integers.get("ceil_mode", (0,))[0] else room // stride
        yield steps + 1


# --- protobuf messages


def _node(message: Buffer) -> Node:
    inputs, outputs = [], []
    name = op_type = domain = ""
    integers: dict[str, Sequence[int]] = {}
    texts: dict[str, str] = {}
    constant = None
    for number, _, _, value in fields(message):
        if number == 1:
            inputs.append(str(value, "utf-8", "replace"))
        elif number == 2:
            outputs.append(str(value, "utf-8", "replace"))
        elif number == 3:
            name = str(value, "utf-8", "replace")
        elif number == 4:
            op_type = str(value, "utf-8", "replace")
        elif number == 7:
            domain = str(value, "utf-8", "replace")
        elif number == 5:
            key = text_of(value, 1)
            numbers = integers_of(value, 3, 8)
            if numbers:
                integers[key] = numbers
            if key.startswith("value"):
                constant = _constant(value, numbers)
            for inner, wire, _, text in fields(value):
                if (inner, wire) == (4, BYTES):
                    texts[key] = str(text, "utf-8", "replace")
    if domain == "ai.onnx":
        domain = ""
    return Node(name, op_type, domain, tuple(inputs), tuple(outputs), integers, texts, constant)


def _constant(attribute: Buffer, numbers: tuple[int, ...]) -> Constant:
    for number, wire, _, value in fields(attribute):
        if (number, wire) == (5, BYTES):
            return _tensor(value)
    scalar = not text_of(attribute, 1).endswith("s")
    if numbers:
        return Constant(_INT64, () if scalar else (len(numbers),), integers=numbers)
    floats = floats_of(attribute, 2, 7)
    return Constant(_FLOAT, () if scalar else (len(floats),), floats=floats)


def _tensor(message: Buffer) -> Constant:
    element_type = 0
    shape = integers_of(message, 1)
    raw: Buffer | None = None
    for number, wire, integer, value in fields(message):
        if (number, wire) == (2, VARINT):
            element_type = integer
        elif (number, wire) == (9, BYTES):
            raw = value
    if len(shape) > _MOST_AXES:
        raise ValueError(f"a tensor of {len(shape)} axes")
    count = math.prod(shape)
    if count > _FEW or element_type not in (_FLOAT, _INT32, _INT64):
        return Constant(element_type, shape)
    if element_type == _FLOAT:
        floats = struct.unpack(f"<{count}f", raw) if raw else floats_of(message, 4)
        return Constant(element_type, shape, floats=floats)
    letter = "q" if element_type == _INT64 else "i"
    integers = struct.unpack(f"<{count}{letter}", raw) if raw else integers_of(message, 5, 7)
    return Constant(element_type, shape, integers=integers)


def _value_info(message: Buffer) -> tuple[str, tuple[int, Shape | None]]:
    """Name, element type, and shape with -1 for a size that is left open."""
    element_type, shape = 0, None
    for number, _, _, kind in fields(message):
        if number != 2:
            continue
        for inner, _, _, tensor in fields(kind):
            if inner != 1:
                continue
            for part, wire, integer, value in fields(tensor):
                if (part, wire) == (1, VARINT):
                    element_type = integer
                elif part == 2:
                    shape = tuple(map(_side, (each for _, _, _, each in fields(value))))
    return text_of(message, 1), (element_type, shape)


def _side(dimension: Buffer) -> int:
    return next(
        (integer for number, _, integer, _ in fields(dimension) if number == 1),
        -1,
    )
