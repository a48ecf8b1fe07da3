"""The kernels that an engine makes of an ONNX graph: what each computes, reads and writes.

A convolution takes in what follows it element by element (batch norm, bias, activation, residual
sum, quantization), as TensorRT does; neighbouring element-wise operators become one kernel; a
Concat costs only what its parts cannot be written to directly. Without ``fused`` every operator is
a kernel of its own, as in a framework that runs them one by one.

Only sizes are followed, never values. Fusion: TensorRT Developer Guide, "Layer Fusion".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgeseg.engine.graph import Graph, Node, Precision
from edgeseg.estimate.shapes import read_graph
from edgeseg.onnxfile import DOMAIN, damaged

__all__ = ["Kind", "Layer", "Network", "Wanted"]

#: what a layer does: ``matrix`` is a convolution or matrix product on large tiles, ``depthwise`` a
#: convolution of each channel by itself, ``pointwise`` element by element, ``move`` the rest
Kind = Literal["matrix", "depthwise", "pointwise", "move"]
#: the precision to count with: what the graph says, or one for all
Wanted = Literal["graph", "fp32", "fp16", "int8"]

_FLOATS = (1, 10, 16)  # TensorProto.DataType: float, float16, bfloat16
_BYTES = {1: 4.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 4.0, 7: 8.0, 9: 1.0, 10: 2.0, 11: 8.0,
          12: 4.0, 13: 8.0, 16: 2.0, 17: 1.0, 18: 1.0, 19: 1.0, 20: 1.0}  # fmt: skip
_WIDTHS: dict[str, float] = {"int8": 1.0, "fp8": 1.0, "fp16": 2.0, "bf16": 2.0, "fp32": 4.0}
_NAMES: dict[int, Precision] = {1: "fp32", 10: "fp16", 16: "bf16", 17: "fp8", 3: "int8", 2: "int8"}

_MATRIX = ("Conv", "ConvTranspose", "Gemm", "MatMul", "DeformConv")
_VIEWS = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout")
_POINTWISE = (
    "Abs", "Add", "And", "BatchNormalization", "Cast", "Ceil", "Clip", "Div", "Elu", "Equal", "Erf",
    "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu",
    "Pow", "QuantizeLinear", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus",
    "Sqrt", "Sub", "Tanh", "Where",
)  # fmt: skip
_MOVES = (
    "ArgMax", "ArgMin", "AveragePool", "DepthToSpace", "Expand", "Gather", "GatherElements",
    "GatherND", "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization", "LayerNormalization",
    "MaxPool", "NonMaxSuppression", "NonZero", "OneHot", "Pad", "Range", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Resize", "RoiAlign", "ScatterElements",
    "ScatterND", "Slice", "Softmax", "SpaceToDepth", "Split", "Tile", "TopK", "Transpose",
    "GroupNormalization", "LRN", "LogSoftmax", "CumSum", "Trilu", "GridSample", "Constant",
    "ConstantOfShape", "Shape", "Size", "DequantizeLinear", "Concat",
)  # fmt: skip
_KNOWN = frozenset((*_MATRIX, *_VIEWS, *_POINTWISE, *_MOVES))

#: operators that read no more of their first input than they give
_PARTIAL = ("Slice", "Gather", "GatherElements", "GatherND", "RoiAlign")
# More in a row are a damaged file that goes round in circles.
_MOST_VIEWS = 8


@dataclass(frozen=True)
class Layer:
    """One kernel.

    ``macs``: multiply-accumulates. ``rows``, ``columns`` and ``depth``: the matrix product that a
    convolution is, per group (output positions, output channels, inputs per output);
    ``channels``: how many values of the depth lie side by side (input channels per group).
    ``read_bytes``: activations; ``weight_bytes``: weights, read once; ``io_elements``: HarDNet's
    convolutional input/output (Chao et al. 2019, arXiv 1909.00948), 0 for other kinds.
    ``nodes``: names of the operators in it.
    """

    name: str
    kind: Kind
    precision: Precision
    operators: tuple[str, ...]
    macs: int = 0
    groups: int = 1
    rows: int = 0
    columns: int = 0
    depth: int = 0
    channels: int = 0
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    weight_bytes: float = 0.0
    io_elements: int = 0

    @property
    def bytes(self) -> float:
        """All that goes through memory."""
        return self.read_bytes + self.write_bytes + self.weight_bytes


@dataclass(frozen=True)
class Network:
    """The kernels of one graph, in order, and what it needs of memory.

    ``weight_bytes`` and ``activation_bytes``: of the tensors alive at one time, each freed after
    its last reader. ``unknown``: operators counted by their bytes alone. ``unsized``: how many
    operators give tensors whose size the file does not tell; their bytes are not counted.
    """

    layers: tuple[Layer, ...]
    weight_bytes: float
    activation_bytes: float
    unknown: tuple[str, ...]
    unsized: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions and matrix products."""
        return sum(layer.macs for layer in self.layers)

    @property
    def io_elements(self) -> int:
        """HarDNet's convolutional input/output, in elements."""
        return sum(layer.io_elements for layer in self.layers)

    @property
    def moved_bytes(self) -> float:
        """What all kernels read and write."""
        return sum(layer.bytes for layer in self.layers)

    @classmethod
    def read(
        cls,
        content: bytes,
        name: str = "the model",
        *,
        precision: Wanted = "graph",
        fused: bool = True,
    ) -> Network:
        """The kernels of the ONNX model ``content``; BundleError when it is damaged."""
        graph = read_graph(content, name)
        try:
            return _Fusion(graph, precision, fused=fused).network()
        except (LookupError, ValueError, ArithmeticError) as error:
            # Nodes with fewer inputs, or tensors with fewer axes, than their operator has.
            raise damaged(name) from error


class _Kernel:
    """A layer while operators are still being added to it."""

    def __init__(self, index: int, node: Node, kind: Kind) -> None:
        self.index = index
        self.head = node
        self.kind = kind
        self.nodes = [node]


class _Fusion:
    def __init__(self, graph: Graph, precision: Wanted, *, fused: bool) -> None:
        self._graph = graph
        self._wanted = precision
        self._fused = fused
        self._static = self._static_tensors()
        # Views and dequantized tensors are the tensor they were made of.
        self._origin: dict[str, str] = {}
        self._kernels: list[_Kernel] = []
        self._makers: dict[str, _Kernel] = {}
        self._unknown: dict[str, None] = {}
        self._asked = self._quantized()

    def network(self) -> Network:
        nodes = [node for node in self._graph.nodes if not self._is_static(node)]
        for node in nodes:
            if self._is_view(node):
                self._origin[node.outputs[0]] = self._root(node.inputs[0])
        direct = self._written_directly(nodes)
        for node in nodes:
            if self._is_view(node):
                continue
            kernel = self._fused_into(node)
            if kernel is None:
                kernel = _Kernel(len(self._kernels), node, self._kind(node))
                self._kernels.append(kernel)
            for output in node.outputs:
                self._makers[output] = kernel
        readers: dict[str, set[int]] = {}
        for kernel in self._kernels:
            for node in kernel.nodes:
                for root in self._live(node):
                    readers.setdefault(root, set()).add(kernel.index)
        found = [self._layer(kernel, readers, direct) for kernel in self._kernels]
        layers = [layer for layer in found if layer is not None]
        return Network(
            layers=tuple(layers),
            weight_bytes=sum(layer.weight_bytes for layer in layers),
            activation_bytes=self._activation_bytes(nodes),
            unknown=tuple(self._unknown),
            unsized=sum(
                1
                for node in nodes
                if not self._is_view(node)
                and any(output and self._elements(output) is None for output in node.outputs)
            ),
        )

    # --- what stands still

    def _static_tensors(self) -> set[str]:
        """Constants, and what is computed of constants and sizes: done before the first frame."""
        made = {output for node in self._graph.nodes for output in node.outputs}
        found = {
            name
            for node in self._graph.nodes
            for name in node.inputs
            if name not in made and name not in self._graph.inputs
        }
        for node in self._graph.nodes:
            sized = node.op_type in ("Shape", "Size") and node.inputs[0] in self._graph.shapes
            if not node.domain and (sized or all(name in found for name in node.inputs if name)):
                found.update(node.outputs)
        return found

    def _is_static(self, node: Node) -> bool:
        return all(output in self._static for output in node.outputs)

    def _is_view(self, node: Node) -> bool:
        return not node.domain and (
            (self._fused and node.op_type == "DequantizeLinear") or node.op_type in _VIEWS
        )

    def _is_output(self, name: str) -> bool:
        return any(self._root(output) == name for output in self._graph.outputs)

    def _root(self, name: str) -> str:
        return self._origin.get(name, name)

    # --- which operators share a kernel

    def _kind(self, node: Node) -> Kind:
        if node.domain or node.op_type not in _KNOWN:
            if node.domain != DOMAIN:
                self._unknown[f"{node.domain}.{node.op_type}".lstrip(".")] = None
            return "move"
        if node.op_type in _MATRIX:
            groups = node.integers.get("group", (1,))[0]
            return "depthwise" if groups > 1 and self._channels(node) == 1 else "matrix"
        return "pointwise" if node.op_type in _POINTWISE else "move"

    def _channels(self, node: Node) -> int:
        """Input channels per group."""
        shape = self._graph.shapes.get(node.inputs[1]) or (1, 1)
        groups = max(node.integers.get("group", (1,))[0], 1)
        return shape[0] // groups if node.op_type == "ConvTranspose" else shape[1]

    def _fused_into(self, node: Node) -> _Kernel | None:
        """The kernel that ``node`` joins: the last one that it needs, when the sizes agree."""
        if not self._fused or node.domain or node.op_type not in _POINTWISE:
            return None
        makers = {self._makers[root].index for root in self._live(node) if root in self._makers}
        if not makers:
            return None
        kernel = self._kernels[max(makers)]
        takes_all = kernel.kind != "move" or node.op_type == "QuantizeLinear"
        if not takes_all or kernel.head.op_type == "Concat":
            return None
        made = self._elements(node.outputs[0])
        own = self._elements(kernel.nodes[-1].outputs[0])
        if made is None or made != own:
            return None
        kernel.nodes.append(node)
        return kernel

    def _live(self, node: Node) -> list[str]:
        """Activations that ``node`` reads, each once."""
        roots = [self._root(name) for name in node.inputs if name and name not in self._static]
        return list(dict.fromkeys(roots))

    def _written_directly(self, nodes: Sequence[Node]) -> dict[str, Node]:
        """Tensor -> the Concat into whose output it is written at once: the first that takes it."""
        found: dict[str, Node] = {}
        if self._fused:
            for node in nodes:
                if node.op_type == "Concat" and not node.domain:
                    for name in self._live(node):
                        found.setdefault(name, node)
        return found

    # --- what a kernel costs

    def _layer(
        self,
        kernel: _Kernel,
        readers: Mapping[str, set[int]],
        direct: Mapping[str, Node],
    ) -> Layer | None:
        head = kernel.head
        inside = {output for node in kernel.nodes for output in node.outputs}
        read = dict.fromkeys(root for node in kernel.nodes for root in self._live(node))
        sources = [root for root in read if root not in inside]
        given = [
            output
            for node in kernel.nodes
            for output in node.outputs
            if output and (readers.get(output, set()) - {kernel.index} or self._is_output(output))
        ]
        if head.op_type == "Concat" and not head.domain and self._fused:
            sources = [root for root in sources if direct.get(root) is not head]
            if not sources:
                return None
            written = sum(map(self._size, sources))
        else:
            written = sum(map(self._size, given))
        reading = sum(self._read_size(kernel, root) for root in sources)
        operators = tuple(node.op_type for node in kernel.nodes)
        name = head.name or head.outputs[0]
        weights = sum(
            self._weight_size(kernel, name)
            for node in kernel.nodes
            for name in dict.fromkeys(node.inputs)
            if name in self._static
        )
        layer = Layer(
            name,
            kernel.kind,
            self._precision(kernel),
            operators,
            read_bytes=reading,
            write_bytes=written,
            weight_bytes=weights,
        )
        return self._with_matrix(layer, head) if kernel.kind in ("matrix", "depthwise") else layer

    def _with_matrix(self, layer: Layer, node: Node) -> Layer:
        """``layer`` with the matrix product that a convolution or Gemm is."""
        source, output = (
            self._graph.shapes.get(name) for name in (node.inputs[0], node.outputs[0])
        )
        kernel = self._graph.shapes.get(node.inputs[1])
        if source is None or output is None or kernel is None:
            return layer
        if min((*source, *output, *kernel), default=1) < 0:
            # A size that the file leaves open.
            return layer
        if node.op_type in ("Gemm", "MatMul"):
            depth = source[-1] if node.op_type == "MatMul" else math.prod(source) // output[0]
            rows, columns = math.prod(output[:-1]), output[-1]
            return replace(
                layer,
                macs=rows * columns * depth,
                rows=rows,
                columns=columns,
                depth=depth,
                channels=depth,
            )
        groups = max(node.integers.get("group", (1,))[0], 1)
        window = math.prod(kernel[2:])
        channels = self._channels(node)
        # A transposed convolution is a convolution of its input's positions, one for every
        # place in the window.
        transposed = node.op_type == "ConvTranspose"
        rows = math.prod((source if transposed else output)[2:]) * output[0]
        columns = output[1] // groups * (window if transposed else 1)
        depth = channels * (1 if transposed else window)
        return replace(
            layer,
            macs=rows * columns * depth * groups,
            groups=groups,
            rows=rows,
            columns=columns,
            depth=depth,
            channels=channels,
            io_elements=math.prod(source) + math.prod(output),
        )

    def _precision(self, kernel: _Kernel) -> Precision:
        """How the kernel's first operator computes."""
        node = kernel.head
        asked = self._asked.get(node.outputs[0]) if node.outputs else None
        if asked is not None and self._wanted == "graph":
            return asked
        types = [self._graph.types.get(name) for name in (*node.inputs[:1], *node.outputs[:1])]
        found = next((kind for kind in types if kind in _FLOATS), None)
        if found is None:
            return _NAMES.get(types[0] or 0, "fp32")
        if self._wanted != "graph":
            return self._wanted
        return _NAMES[found]

    def _quantized(self) -> dict[str, Precision]:
        """Output of an operator with weights -> int8 or fp8, where both its inputs are."""
        makers = {output: node for node in self._graph.nodes for output in node.outputs}
        found: dict[str, Precision] = {}
        for node in self._graph.nodes:
            if node.domain or node.op_type not in _MATRIX or len(node.inputs) < 2:
                continue
            kinds = [self._dequantized(name, makers) for name in node.inputs[:2]]
            first = kinds[0]
            if first is not None and None not in kinds:
                found[node.outputs[0]] = first
        return found

    def _dequantized(self, name: str, makers: Mapping[str, Node]) -> Precision | None:
        node = makers.get(name)
        for _ in range(_MOST_VIEWS):
            if node is None or node.op_type not in (*_VIEWS, "Transpose") or not node.inputs:
                break
            node = makers.get(node.inputs[0])
        if node is None or node.op_type != "DequantizeLinear" or not node.inputs:
            return None
        return _NAMES.get(self._graph.types.get(node.inputs[0], 0))

    # --- sizes

    def _elements(self, name: str) -> int | None:
        shape = self._graph.shapes.get(name)
        return None if shape is None or min(shape, default=1) < 0 else math.prod(shape)

    def _width(self, name: str) -> float:
        """Bytes of one element."""
        kind = self._graph.types.get(name, 1)
        if self._wanted != "graph" and kind in _FLOATS:
            return _WIDTHS[self._wanted]
        return _BYTES.get(kind, 4.0)

    def _size(self, name: str) -> float:
        elements = self._elements(name)
        return 0.0 if elements is None else elements * self._width(name)

    def _read_size(self, kernel: _Kernel, name: str) -> float:
        """What the kernel reads of the tensor ``name``."""
        node = kernel.head
        size = self._size(name)
        if node.op_type in _PARTIAL and not node.domain and node.inputs[:1] == (name,):
            # A slice or a selection reads what it gives.
            return min(size, sum(map(self._size, node.outputs)))
        return size

    def _weight_size(self, kernel: _Kernel, name: str) -> float:
        """Bytes of a constant as the engine keeps it: kernels in the precision of the layer."""
        elements = self._elements(name) or 0
        heavy = name in kernel.head.inputs[1:2] and kernel.kind in ("matrix", "depthwise")
        return elements * (_WIDTHS[self._precision(kernel)] if heavy else self._width(name))

    def _activation_bytes(self, nodes: Sequence[Node]) -> float:
        """The most that is alive at one time; a tensor is freed after its last reader."""
        inputs = {name for name in self._graph.inputs if name not in self._static}
        outputs = {self._root(name) for name in self._graph.outputs}
        last: dict[str, int] = {}
        made: dict[str, int] = {}
        for node in nodes:
            if self._is_view(node):
                continue
            index = self._makers[node.outputs[0]].index
            for root in self._live(node):
                last[root] = max(index, last.get(root, 0))
            for output in node.outputs:
                made[output] = index
        events: dict[int, float] = {}
        for name in (*inputs, *made):
            start = made.get(name, -1)
            end = len(self._kernels) if name in outputs else last.get(name, start)
            # What a kernel hands on within itself never reaches memory.
            if end > start:
                events[start] = events.get(start, 0.0) + self._size(name)
                events[end + 1] = events.get(end + 1, 0.0) - self._size(name)
        alive = peak = 0.0
        for moment in sorted(events):
            alive += events[moment]
            peak = max(peak, alive)
        return peak
