"""What TensorRT will make of a graph with QuantizeLinear/DequantizeLinear, and where it loses int8.

TensorRT 10.3 to 11 takes the precision of a layer from the Q/DQ nodes around it (NVIDIA TensorRT
documentation, "Explicit Quantization"). It moves a Q towards the inputs and a DQ towards the
outputs through layers that only select or move values, and then fuses: a layer with weights takes
the DQs at its inputs, the bias, batch norm, residual sum and activation behind it, and the Q behind
those; a pooling or an elementwise sum takes the DQs before it and the Q behind it. Every Q or DQ
that finds no layer to be fused into is a kernel of its own that reads and writes the whole tensor.

`lint` moves and fuses in the same way and names the edges where something is left over. It knows
what is documented, not what a certain GPU's kernels do: after a build, the engine inspector has the
last word.

Rules, by `Finding.rule`:

=============== ====================================================================================
partial         a layer with weights has int8 at some of its inputs only
type            a pair whose integers are not int8
zero-point      a zero point other than a constant 0
scale           a scale that is not a positive constant, or a Q and a DQ that disagree
per-channel     one scale per channel for an activation
per-tensor      one scale for all output channels of a weight
weight-axis     scales along another axis of a weight than its output channels
fusion          a Q between a layer with weights and what would have been fused into it
residual        the other input of a sum that is fused into a convolution is not quantized
concat          an input of an int8 Concat that has another scale, or none
float-between   floating point between int8 layers
unused-pair     a Q/DQ pair that only floating point layers read
float-reader    a tensor that is needed both as int8 and in floating point
scales          a tensor that is quantized with several scales
requantize      int8 with one scale that becomes int8 with another
bias            Q/DQ at a bias
q-without-dq    a Q without a DQ
dq-without-q    a DQ without a Q
=============== ====================================================================================
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from edgeseg.calibration.graph import WEIGHTED, attribute

__all__ = ["Finding", "Placement", "lint"]

_FLOATS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
)
_STANDARD = frozenset({"", "ai.onnx"})
# Q and DQ move through these: they select or move values, and keep the scale.
_MOVING = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
# Only their first input is data, the others say how.
_ONE_INPUT = (_MOVING - {"Concat"}) | {"Cast", "Pad", "ReduceMean", "Resize", "Clip", "PRelu"}
# int8 where the inputs come from DQs and the output goes to a Q.
_BOTH_SIDES = frozenset(
    {
        "Add",
        "AveragePool",
        "Clip",
        "Concat",
        "GlobalAveragePool",
        "LeakyRelu",
        "Pad",
        "ReduceMean",
        "Relu",
        "Resize",
    }
)
_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish"})
# Become part of the layer before them if their other operand is a constant.
_SCALING = frozenset({"BatchNormalization", "Mul", "Div", "Add", "Sub"})
# What is still the same constant behind these nodes.
_SAME_VALUES = frozenset({"Cast", "Identity"})
_SAME_SCALES = _SAME_VALUES | {"Transpose", "Reshape"}

_OUTPUT = "output of the graph"
_REQUANTIZE = "Requantize"


@dataclass(frozen=True)
class Finding:
    """One place where TensorRT does not do what the Q/DQ nodes seem to ask for.

    ``rule``: one of the table above. ``node``: the node that reads ``tensor`` there, by its name,
    or by its first output where it has none. ``text``: one sentence, what TensorRT does and what to
    change. ``avoidable``: whether another placement of Q/DQ mends it. ``count_as_reformat``:
    whether it costs a pass over the tensor; no two findings count the same edge.
    """

    rule: str
    node: str
    tensor: str
    text: str
    avoidable: bool
    count_as_reformat: bool


@dataclass(frozen=True)
class Placement:
    """How much of a graph runs in int8 on TensorRT, and what stands in the way.

    ``weighted``: layers with a constant weight (Conv, ConvTranspose, Gemm, MatMul); ``quantized``:
    those of them whose inputs are all int8. ``reformats``: edges where int8 is left or entered in
    the middle of the network, or changes its scale; ``avoidable``: those of them that another
    placement would not have. ``findings`` are in the order of the graph's nodes.
    """

    quantized: int
    weighted: int
    findings: tuple[Finding, ...]
    reformats: int
    avoidable: int

    def to_dict(self) -> dict[str, object]:
        """The placement for ``--json``."""
        return asdict(self) | {"findings": [asdict(finding) for finding in self.findings]}

    def lines(self) -> list[str]:
        """The placement for a terminal: plain text, what can be mended first."""
        reformats = "1 reformat" if self.reformats == 1 else f"{self.reformats} reformats"
        lines = [
            f"{self.quantized} of {self.weighted} layers with weights have int8 at all inputs",
            f"{reformats} in TensorRT, {self.avoidable or 'none'} avoidable",
        ]
        for finding in sorted(self.findings, key=lambda finding: not finding.avoidable):
            word = "reformat, " if finding.count_as_reformat else ""
            word += "avoidable" if finding.avoidable else "inherent"
            lines.append(f"  {finding.rule} ({word}): {finding.tensor} -> {finding.node}")
            lines.append(f"    {finding.text}")
        return lines


def lint(model: onnx.ModelProto) -> Placement:
    """How TensorRT will run ``model``, which stays as it is; without Q/DQ there are no findings."""
    findings = _Findings()
    network = _Network(model, findings)
    _Fusion(network, findings).run()
    layers = [op for op in network.ops if op.weighted]
    counted = [finding for finding in findings if finding.count_as_reformat]
    return Placement(
        quantized=sum(op.all_int8 for op in layers),
        weighted=len(layers),
        findings=tuple(findings),
        reformats=len(counted),
        avoidable=sum(finding.avoidable for finding in counted),
    )


class _Findings:
    """The findings so far; an edge that counts is taken once, by the first rule that names it."""

    def __init__(self) -> None:
        self._found: list[tuple[int, Finding]] = []
        self._edges: set[tuple[str, str]] = set()

    def __iter__(self) -> Iterator[Finding]:
        # A stable sort: findings at one node keep the order of the rules.
        return (finding for _, finding in sorted(self._found, key=lambda entry: entry[0]))

    def add(
        self,
        rule: str,
        at: int,
        edge: tuple[str, str],
        text: str,
        *,
        avoidable: bool = True,
        count: bool = False,
    ) -> None:
        """``at``: index of the node; ``edge``: the tensor and the name of the node."""
        if count:
            if edge in self._edges:
                return
            self._edges.add(edge)
        tensor, node = edge
        self._found.append((at, Finding(rule, node, tensor, text, avoidable, count)))


@dataclass(frozen=True)
class _Scale:
    """A scale of int8 values; two are equal if they are the same numbers.

    ``key``: the value exactly; ``text``: for a person. ``valid``: whether the integers really are
    int8 with zero point 0.
    """

    key: str
    text: str = field(compare=False)
    valid: bool = field(compare=False)


@dataclass(eq=False)
class _Read:
    """One edge: ``op`` reads ``tensor`` (the floating point one, before any Q) as int8 with
    ``scale``, or in floating point if that is None.

    ``quantizer``: name of the Q on the way, if there is one right on ``tensor``. ``wanted``: int8
    is missing here, which has been reported; what follows is judged as if it were there.
    """

    op: _Op
    tensor: str
    scale: _Scale | None
    quantizer: str | None
    wanted: bool = False

    @property
    def int8(self) -> bool:
        return self.scale is not None or self.wanted

    @property
    def edge(self) -> tuple[str, str]:
        return self.tensor, self.op.name

    @property
    def quantized_at(self) -> tuple[str, str]:
        """The edge on which floating point becomes int8."""
        return self.tensor, self.quantizer or self.op.name


@dataclass(eq=False)
class _Op:
    """One node other than Q and DQ. ``moving``: Q and DQ pass through it. ``weight``: the scale of
    its weight. ``int8``: it runs as an int8 kernel or as a part of one."""

    index: int
    kind: str
    name: str
    node: NodeProto
    outputs: list[str]
    moving: bool = False
    reads: list[_Read] = field(default_factory=list)
    weighted: bool = False
    weight: _Scale | None = None
    int8: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def all_int8(self) -> bool:
        """Whether this layer's weight and activations are all int8 as they stand."""
        inputs = [self.weight, *(read.scale for read in self.reads)]
        return all(scale is not None and scale.valid for scale in inputs)

    @property
    def capable(self) -> bool:
        """Whether TensorRT has it in int8 if all around is int8."""
        if self.kind == "Add":
            return len(self.reads) == 2
        return self.moving or self.kind in _BOTH_SIDES


@dataclass(frozen=True)
class _Dequantized:
    """What stands behind a DQ, or behind a Q: ``tensor`` with ``scale``."""

    tensor: str
    scale: _Scale
    quantizer: str | None


@dataclass(frozen=True)
class _ConstantPair:
    """A constant behind a DQ: ``node`` is the Q, or the DQ where the integers are stored."""

    node: NodeProto
    index: int
    shape: tuple[int, ...]
    straight: bool


class _Network:
    """A graph without its Q and DQ nodes: what they say is on the edges."""

    def __init__(self, model: onnx.ModelProto, findings: _Findings) -> None:
        self.ops: list[_Op] = []
        self.producers: dict[str, _Op] = {}
        self._readers: dict[str, list[_Read]] = {}
        self._findings = findings
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constants = set(self._tensors)
        self._constant_quantizers: dict[str, tuple[int, NodeProto]] = {}
        self._constant_pairs: dict[str, _ConstantPair] = {}
        self._constant_scales: dict[int, _Scale] = {}
        self._checked_weights: set[str] = set()
        self._quantized: dict[str, _Dequantized] = {}
        self._dequantized: dict[str, _Dequantized] = {}
        # Integers that are no constants: outputs of Qs nobody has read yet, and of nodes on them.
        self._unread: dict[str, tuple[int, NodeProto]] = {}
        self._raw: set[str] = set()
        for index, node in enumerate(model.graph.node):
            self._take(index, node)
        for output in model.graph.output:
            end = _Op(len(model.graph.node), _OUTPUT, output.name, NodeProto(), [])
            self._connect(end, [output.name])
        for tensor, (index, node) in self._unread.items():
            self._no_dequantizer(index, _name(node), tensor)

    def readers(self, tensor: str) -> list[_Read]:
        """Who reads ``tensor``, the graph's outputs included."""
        return self._readers.get(tensor, [])

    def readers_of(self, op: _Op) -> list[_Read]:
        """Who reads what ``op`` makes."""
        return [read for tensor in op.outputs for read in self.readers(tensor)]

    def _take(self, index: int, node: NodeProto) -> None:
        standard = node.domain in _STANDARD
        given = [name for name in node.input if name]
        if standard and node.op_type == "Constant":
            self._take_constant(node)
        elif standard and node.op_type == "QuantizeLinear":
            self._take_quantize(index, node)
        elif standard and node.op_type == "DequantizeLinear":
            self._take_dequantize(index, node)
        elif standard and given and self._constants.issuperset(given):
            self._fold(node)
        else:
            # Of a function or a plugin nothing is known: its kind equals no operator's.
            kind = node.op_type if standard else f"{node.domain}.{node.op_type}"
            op = _Op(index, kind, _name(node), node, [name for name in node.output if name])
            op.moving = self._moves(op)
            self._connect(op, self._data_inputs(op))

    def _moves(self, op: _Op) -> bool:
        if op.kind == "Resize":
            return _word(op.node, "mode", "nearest") == "nearest"
        if op.kind == "Cast":
            return attribute(op.node, "to", TensorProto.FLOAT) in _FLOATS
        if op.kind == "Pad":
            # Other padding copies values, and 0 is 0 with every scale.
            if _word(op.node, "mode", "constant") != "constant" or len(op.node.input) < 3:
                return True
            value = self._values(op.node.input[2])
            return not op.node.input[2] or (value is not None and not value.any())
        return op.kind in _MOVING

    def _take_constant(self, node: NodeProto) -> None:
        name = node.output[0]
        self._constants.add(name)
        entry = node.attribute[0]
        if entry.name == "value":
            self._tensors[name] = entry.t
        elif entry.name in ("value_float", "value_int"):
            value = np.float32(entry.f) if entry.name == "value_float" else np.int64(entry.i)
            self._tensors[name] = numpy_helper.from_array(np.asarray(value), name)

    def _fold(self, node: NodeProto) -> None:
        source = node.input[0]
        self._constants.update(node.output)
        if node.op_type in _SAME_VALUES and source in self._tensors:
            self._tensors[node.output[0]] = self._tensors[source]
        pair = self._constant_pairs.get(source)
        if pair is not None and node.op_type in _SAME_SCALES:
            straight = pair.straight and node.op_type in _SAME_VALUES
            self._constant_pairs[node.output[0]] = _ConstantPair(
                pair.node, pair.index, pair.shape, straight
            )

    def _take_quantize(self, index: int, node: NodeProto) -> None:
        source, target = node.input[0], node.output[0]
        if source in self._constants:
            self._constants.add(target)
            self._constant_quantizers[target] = (index, node)
            return
        scale = self._scale(index, node)
        self._check_activation(index, node)
        before = self._dequantized.get(source)
        tensor = source
        if before is not None and before.scale == scale:
            tensor = before.tensor
        elif before is not None:
            # A node of its own, between the two scales.
            tensor = target
            op = _Op(index, _REQUANTIZE, _name(node), node, [target])
            self._connect(op, [source])
        self._quantized[target] = _Dequantized(tensor, scale, _name(node))
        self._unread[target] = (index, node)

    def _take_dequantize(self, index: int, node: NodeProto) -> None:
        source, target = node.input[0], node.output[0]
        if source in self._constants:
            self._constants.add(target)
            at, first = self._constant_quantizers.get(source, (index, node))
            tensor = self._tensors.get(first.input[0])
            shape = () if tensor is None else tuple(tensor.dims)
            self._constant_pairs[target] = _ConstantPair(first, at, shape, straight=True)
            return
        before = self._quantized.get(source)
        scale = self._scale(index, node, report=before is None)
        if before is not None:
            self._unread.pop(source, None)
            if before.scale != scale:
                self._findings.add(
                    "scale",
                    index,
                    (source, _name(node)),
                    f"the Q before it has the scale {before.scale.text} and this DQ "
                    f"{scale.text}, so that TensorRT cannot take them for one pair; give both the "
                    "same scale",
                )
            self._dequantized[target] = before
            return
        if source not in self._raw:
            self._findings.add(
                "dq-without-q",
                index,
                (source, _name(node)),
                "no Q makes the integers that this DQ reads, so that TensorRT cannot have the "
                "layer before write them; put Q and DQ on the floating point tensor as a pair",
            )
        self._dequantized[target] = _Dequantized(source, scale, None)

    def _data_inputs(self, op: _Op) -> list[str]:
        """The inputs of ``op`` that are activations; takes note of its weight."""
        node = op.node
        if op.kind in ("Shape", "Size"):
            return []
        names = list(node.input[:1]) if op.kind in _ONE_INPUT else list(node.input)
        if op.kind in WEIGHTED and len(names) > 1:
            for name in names[2:]:
                if name in self._constant_pairs:
                    self._findings.add(
                        "bias",
                        op.index,
                        (name, op.name),
                        "TensorRT adds the bias in floating point and does not read a DQ of it; "
                        "store the bias as floating point, without Q/DQ",
                    )
            names = names[:2]
            # MatMul may have its weight on either side.
            slot = 0 if op.kind == "MatMul" and names[1] not in self._constants else 1
            op.weighted = names[slot] in self._constants
            if op.weighted and names[slot] in self._constant_pairs:
                op.weight = self._check_weight(op, names[slot], slot)
        return [name for name in names if name and name not in self._constants]

    def _connect(self, op: _Op, names: Iterable[str]) -> None:
        for name in names:
            before = self._dequantized.get(name)
            if before is None and name in self._quantized:
                before = self._quantized[name]
                if name in self._unread:
                    del self._unread[name]
                    self._no_dequantizer(op.index, op.name, name)
                self._raw.update(op.outputs)
            elif name in self._raw:
                self._raw.update(op.outputs)
            if before is None:
                read = _Read(op, name, None, None)
            else:
                read = _Read(op, before.tensor, before.scale, before.quantizer)
            op.reads.append(read)
            self._readers.setdefault(read.tensor, []).append(read)
        self.ops.append(op)
        for name in op.outputs:
            self.producers[name] = op

    def _no_dequantizer(self, index: int, node: str, tensor: str) -> None:
        self._findings.add(
            "q-without-dq",
            index,
            (tensor, node),
            "no DQ follows this Q, and TensorRT fuses them as pairs only; put a DQ of the same "
            "scale behind it, or take the Q away",
        )

    def _values(self, name: str) -> NDArray[np.float64] | None:
        """The values of a constant; None where they are not known here."""
        tensor = self._tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor).astype(np.float64)

    def _scale(self, index: int, node: NodeProto, *, report: bool = True) -> _Scale:
        """The scale of a Q or DQ; reports what TensorRT does not take of it, if it is the first
        of its pair."""
        edge = (node.input[0], _name(node))
        values = self._values(node.input[1])
        if values is None:
            key = text = f"of {node.input[1]}"
            if report:
                self._findings.add(
                    "scale",
                    index,
                    edge,
                    "the scale is computed while the network runs, and TensorRT needs it for the "
                    "choice of kernels; make it an initializer",
                )
        else:
            # Stored as fp16 or as fp32, it is the same scale if it is the same number.
            key = values.astype(np.float64).tobytes().hex()
            text = f"{values.flat[0]:.6g}" if values.size == 1 else f"of {node.input[1]}"
            if report and not (np.isfinite(values) & (values > 0)).all():
                self._findings.add(
                    "scale",
                    index,
                    edge,
                    f"TensorRT refuses a scale that is not positive, and {values.min():.6g} is "
                    "among these; give a tensor that is always 0 any positive scale",
                )
        return _Scale(key, text, self._check_integers(index, node, values, report))

    def _check_integers(
        self, index: int, node: NodeProto, scales: NDArray[np.float64] | None, report: bool
    ) -> bool:
        """Whether the integers are int8 around 0."""
        edge = (node.input[0], _name(node))
        zero = node.input[2] if len(node.input) > 2 else ""
        kind = self._integer_type(node, zero)
        if kind not in (TensorProto.INT8, None):
            if report:
                name = TensorProto.DataType.Name(kind).lower()
                absent = "" if zero else ", which is what ONNX takes without a zero point"
                refused = " (it refuses uint8, or takes it for int8)" if "uint8" in name else ""
                self._findings.add(
                    "type",
                    index,
                    edge,
                    f"the integers are {name}{absent}, and TensorRT's int8 kernels take int8 only"
                    f"{refused}; quantize symmetrically, with a zero point of type int8",
                )
            return False
        if not zero:
            return True
        zeros = self._values(zero)
        problem = None
        if zeros is None:
            problem = "this zero point is computed while the network runs"
        elif zeros.any():
            problem = f"this zero point is {zeros.flat[np.flatnonzero(zeros)[0]]:.0f}"
        elif scales is not None and zeros.size != scales.size:
            problem = f"there are {zeros.size} zero points for {scales.size} scales"
        if problem is not None and report:
            self._findings.add(
                "zero-point",
                index,
                edge,
                f"{problem}, and TensorRT refuses all but a constant 0 for each scale; quantize "
                "symmetrically",
            )
        return problem is None

    def _integer_type(self, node: NodeProto, zero: str) -> int | None:
        """ONNX's number for the type of the integers; None where it is not known here."""
        if zero:
            return self._tensors[zero].data_type if zero in self._tensors else None
        if node.op_type == "QuantizeLinear":
            return attribute(node, "output_dtype", TensorProto.UNDEFINED) or TensorProto.UINT8
        source = self._tensors.get(node.input[0])
        return None if source is None else source.data_type

    def _check_activation(self, index: int, node: NodeProto) -> None:
        values = self._values(node.input[1])
        if values is not None and values.size > 1:
            self._findings.add(
                "per-channel",
                index,
                (node.input[0], _name(node)),
                f"TensorRT has one scale per tensor for activations, and {values.size} came; "
                "quantize the activation per tensor, and the weights per channel",
            )

    def _check_weight(self, op: _Op, name: str, slot: int) -> _Scale:
        pair = self._constant_pairs[name]
        # Several layers may have one weight; what is wrong with it is said once.
        if pair.index not in self._constant_scales:
            self._constant_scales[pair.index] = self._scale(pair.index, pair.node)
        scale = self._constant_scales[pair.index]
        if name in self._checked_weights or not pair.straight:
            return scale
        self._checked_weights.add(name)
        values = self._values(pair.node.input[1])
        axis = _output_axis(op, slot, len(pair.shape))
        if values is None or not 0 <= axis < len(pair.shape):
            return scale
        edge = (name, op.name)
        channels = pair.shape[axis]
        if values.size == 1:
            if channels > 1:
                self._findings.add(
                    "per-tensor",
                    op.index,
                    edge,
                    f"TensorRT runs this as fast with a scale for each of the {channels} output "
                    "channels, and one for all loses accuracy; quantize the weight per channel",
                )
            return scale
        found = attribute(pair.node, "axis", 1)
        found += len(pair.shape) if found < 0 else 0
        if values.ndim > 1 or found != axis:
            along = "in blocks" if values.ndim > 1 else f"along axis {found}"
            self._findings.add(
                "weight-axis",
                op.index,
                edge,
                f"TensorRT's int8 kernels take the scales of a {op.kind} weight along its output "
                f"channels, axis {axis}, and these are {along}; quantize along axis {axis}",
            )
        return scale


@dataclass(eq=False)
class _Kernel:
    """A layer with weights and what is fused into it so far."""

    layer: _Op
    added: bool = False
    activated: bool = False


class _Fusion:
    """Moves Q and DQ, fuses, and reports what is left over, as the module's text describes."""

    def __init__(self, network: _Network, findings: _Findings) -> None:
        self._network = network
        self._findings = findings
        # Last tensor of each int8 layer with weights -> that layer.
        self._kernels: dict[str, _Kernel] = {}
        # Answers of `_able`: what is before an operator is decided when it is asked about.
        self._is_able: dict[str, bool] = {}
        # Floating point operators that would be int8 with Q/DQ around them.
        self._could: set[_Op] = set()

    def run(self) -> None:
        self._move()
        for op in self._network.ops:
            if op.weight is not None:
                for read in op.reads:
                    read.wanted = read.scale is None
        for op in self._network.ops:
            self._fuse(op)
        self._find_could()
        self._several_scales()
        self._crossings()

    def _move(self) -> None:
        """DQs go down and Qs go up through moving operators, until nothing changes."""
        changed = True
        while changed:
            changed = False
            for op in self._network.ops:
                if op.moving:
                    scale = _common(op.reads)
                    for read in self._network.readers_of(op) if scale else ():
                        if read.scale is None:
                            read.scale, changed = scale, True
            for op in reversed(self._network.ops):
                if op.moving:
                    scale = _common(self._network.readers_of(op))
                    if scale and all(read.scale is None for read in op.reads):
                        for read in op.reads:
                            read.scale, changed = scale, True

    def _fuse(self, op: _Op) -> None:
        """Decides whether ``op`` runs in int8; its inputs have been decided."""
        if op.weighted or (op.kind in WEIGHTED and len(op.reads) == 2):
            self._fuse_layer(op)
        elif op.kind == _REQUANTIZE:
            self._requantize(op)
        elif self._extend(op) or self._extend_by_sum(op) or self._extend_by_swish(op):
            op.int8 = True
        elif op.kind == "Concat":
            self._concat(op)
        elif op.moving:
            op.int8 = all(read.int8 for read in op.reads)
            if op.int8:
                self._changed_scale(op)
        elif op.capable:
            op.int8 = all(read.int8 for read in op.reads) and any(
                read.int8 for read in self._network.readers_of(op)
            )

    def _fuse_layer(self, op: _Op) -> None:
        weight = op.weighted and op.weight is not None
        given = [read.scale is not None for read in op.reads]
        if not weight and not any(given):
            return
        if op.weighted and not weight:
            self._partial(op.reads, "its weight is not; quantize the weight, or take the Q/DQ away")
        elif not all(given):
            missing = [read for read in op.reads if read.scale is None]
            side = "its weight" if weight else "its other input"
            why = f"only {side} is; quantize this input too, or take the other Q/DQ away"
            for read in missing:
                readers = self._network.readers(read.tensor)
                inside = self._made_in_int8(read.tensor) or any(other.scale for other in readers)
                self._partial([read], why, count=inside)
                read.wanted = True
        op.int8 = True
        self._kernels[op.outputs[0]] = _Kernel(op)

    def _partial(self, reads: list[_Read], why: str, *, count: bool = True) -> None:
        for read in reads:
            quantized = "this input is quantized" if read.scale else "not all inputs are quantized"
            self._findings.add(
                "partial",
                read.op.index,
                read.edge,
                f"TensorRT runs {read.op} in floating point, since {quantized} and {why}",
                count=count,
            )

    def _requantize(self, op: _Op) -> None:
        op.int8 = True
        read = op.reads[0]
        after = self._network.readers_of(op)
        scale = after[0].scale if after else None
        self._report_requantize(read.edge, op.index, read.scale, scale, after)

    def _changed_scale(self, op: _Op) -> None:
        """A Q with another scale behind an int8 operator that keeps the scale."""
        scale = _common(op.reads)
        if scale is None:
            return
        readers = self._network.readers_of(op)
        others = dict.fromkeys(read.scale for read in readers if read.scale not in (None, scale))
        for other in others:
            same = [read for read in readers if read.scale == other]
            self._report_requantize(same[0].quantized_at, op.index, scale, other, same)

    def _report_requantize(
        self,
        edge: tuple[str, str],
        index: int,
        before: _Scale | None,
        after: _Scale | None,
        readers: list[_Read],
    ) -> None:
        scales = f"{_text(before)} to {_text(after)}"
        into_concat = bool(readers) and all(self._leads_to_concat(read) for read in readers)
        end = (
            "the Concat behind needs one scale for all its inputs, and these integers have "
            "another reader"
            if into_concat
            else "give both sides of it the same scale"
        )
        self._findings.add(
            "requantize",
            index,
            edge,
            f"TensorRT rescales the integers here in a kernel of its own, from {scales}; {end}",
            avoidable=not into_concat,
            count=True,
        )

    def _leads_to_concat(self, read: _Read) -> bool:
        if read.op.kind == "Concat":
            return True
        behind = self._network.readers_of(read.op)
        return read.op.moving and bool(behind) and all(map(self._leads_to_concat, behind))

    def _sole_kernel(self, read: _Read) -> _Kernel | None:
        """The layer that makes what ``read`` alone reads."""
        alone = len(self._network.readers(read.tensor)) == 1
        return self._kernels.get(read.tensor) if alone else None

    def _extend(self, op: _Op) -> bool:
        """Batch norms, constant factors and shifts, and one activation become part of a layer."""
        if len(op.reads) != 1 or op.kind not in _ACTIVATIONS | _SCALING:
            return False
        read = op.reads[0]
        kernel = self._sole_kernel(read)
        if kernel is None or kernel.activated:
            return False
        self._unquantized(read, kernel)
        kernel.activated = op.kind in _ACTIVATIONS
        self._pass_on(kernel, read.tensor, op)
        return True

    def _extend_by_sum(self, op: _Op) -> bool:
        """A sum becomes part of one of the layers right before it; the other input is read."""
        if op.kind != "Add" or len(op.reads) != 2:
            return False
        open_kernels = [
            (read, kernel)
            for read in op.reads
            for kernel in [self._sole_kernel(read)]
            if kernel is not None and not kernel.added and not kernel.activated
        ]
        if not open_kernels:
            return False
        # The one that was meant is the one without Q.
        fused, kernel = min(open_kernels, key=lambda entry: entry[0].int8)
        self._unquantized(fused, kernel)
        for read in op.reads:
            if read is not fused and not read.int8 and self._feeds_int8(op):
                self._residual(read, kernel)
        kernel.added = True
        self._pass_on(kernel, fused.tensor, op)
        return True

    def _residual(self, read: _Read, kernel: _Kernel) -> None:
        able = self._able(read.tensor)
        end = (
            "put Q/DQ on this input of the sum"
            if able
            else "it is made in floating point, so that Q/DQ there would be kernels of their own"
        )
        self._findings.add(
            "residual",
            read.op.index,
            read.edge,
            f"TensorRT fuses {read.op} into {kernel.layer} but has it write floating point, with "
            f"the quantization in a kernel of its own, since {read.tensor} is not quantized; {end}",
            avoidable=able,
            count=True,
        )
        read.wanted = True

    def _extend_by_swish(self, op: _Op) -> bool:
        """``x * sigmoid(x)`` behind a convolution; depthwise kernels have no such ending."""
        if op.kind != "Mul" or len(op.reads) != 2:
            return False
        for read, other in (op.reads, op.reads[::-1]):
            gate = self._network.producers.get(other.tensor)
            kernel = self._kernels.get(read.tensor)
            if kernel is None or kernel.activated or gate is None or gate.kind != "Sigmoid":
                continue
            readers = {entry.op for entry in self._network.readers(read.tensor)}
            private = readers == {gate, op} and len(self._network.readers(other.tensor)) == 1
            plain = gate.reads[0].scale is None and read.scale is None and other.scale is None
            if private and plain and attribute(kernel.layer.node, "group", 1) == 1:
                gate.int8 = kernel.activated = True
                self._pass_on(kernel, read.tensor, op)
                return True
        return False

    def _unquantized(self, read: _Read, kernel: _Kernel) -> None:
        """Reports a Q where ``read.op`` would have been fused into ``kernel``."""
        if read.scale is None:
            return
        self._findings.add(
            "fusion",
            read.op.index,
            read.edge,
            f"TensorRT would fuse {read.op} into {kernel.layer}, and the Q/DQ between them makes "
            f"it a kernel of its own; quantize the output of {read.op} instead",
            count=True,
        )

    def _pass_on(self, kernel: _Kernel, before: str, op: _Op) -> None:
        del self._kernels[before]
        self._kernels[op.outputs[0]] = kernel

    def _feeds_int8(self, op: _Op) -> bool:
        """Whether what ``op`` makes is read as int8, at once or behind an activation."""
        readers = self._network.readers_of(op)
        if len(readers) == 1 and readers[0].op.kind in _ACTIVATIONS and not readers[0].int8:
            readers = self._network.readers_of(readers[0].op)
        return any(read.int8 for read in readers)

    def _concat(self, op: _Op) -> None:
        consumers = [read for read in self._network.readers_of(op) if read.int8]
        scales = [read.scale for read in [*consumers, *op.reads] if read.scale is not None]
        if not consumers or not scales or not any(read.int8 for read in op.reads):
            op.int8 = bool(op.reads) and _common(op.reads) is not None
            return
        op.int8 = True
        if _common(op.reads) is not None:
            self._changed_scale(op)
            return
        wanted = scales[0]
        for read in op.reads:
            if read.scale is not None and read.scale != wanted:
                self._findings.add(
                    "concat",
                    op.index,
                    read.edge,
                    f"TensorRT joins int8 tensors of one scale only and rescales this input from "
                    f"{read.scale.text} to {wanted.text}; give all inputs and the output of "
                    f"{op} one scale",
                    count=True,
                )
            elif read.scale is None:
                able = self._able(read.tensor)
                end = (
                    f"put Q/DQ with the scale {wanted.text} on it"
                    if able
                    else "it is made in floating point, and is quantized in a kernel of its own"
                )
                self._findings.add(
                    "concat",
                    op.index,
                    read.edge,
                    f"TensorRT joins int8 tensors of one scale only, and this input of {op} is in "
                    f"floating point; {end}",
                    avoidable=able,
                    count=True,
                )
                read.wanted = True

    def _made_in_int8(self, tensor: str) -> bool:
        """Whether an int8 kernel makes ``tensor``."""
        producer = self._network.producers.get(tensor)
        return producer is not None and producer.int8

    def _able(self, tensor: str) -> bool:
        """Whether ``tensor`` can come out of the operator before it as int8."""
        if tensor not in self._is_able:
            producer = self._network.producers.get(tensor)
            self._is_able[tensor] = producer is not None and (
                producer.int8
                or (
                    producer.capable
                    and bool(producer.reads)
                    and all(read.int8 or self._able(read.tensor) for read in producer.reads)
                )
            )
        return self._is_able[tensor]

    def _read_as_int8(self, read: _Read) -> bool:
        """Whether others need the integers that ``read`` reads, or would read, as well.

        Also where an operator that Q and DQ pass lies between: the integers are the same.
        """
        for other in self._network.readers(read.tensor):
            if other is not read and other.scale and (other.op.int8 or other.op in self._could):
                return True
        producer = self._network.producers.get(read.tensor)
        return (
            read.scale is not None
            and producer is not None
            and producer.moving
            and any(self._read_as_int8(before) for before in producer.reads)
        )

    def _find_could(self) -> None:
        """Of the floating point operators, those that Q/DQ on all sides would make int8."""
        could = {op for op in self._network.ops if not op.int8 and op.capable and op.reads}
        before = -1
        while before != len(could):
            before = len(could)
            could = {op for op in could if self._can_stay(op, could)}
        self._could = could

    def _can_stay(self, op: _Op, could: set[_Op]) -> bool:
        readers = self._network.readers_of(op)
        return any(read.int8 or read.op in could for read in readers) and all(
            read.int8
            or self._made_in_int8(read.tensor)
            or self._network.producers.get(read.tensor) in could
            for read in op.reads
        )

    def _several_scales(self) -> None:
        for op_reads in self._by_tensor():
            scales = dict.fromkeys(read.scale for read in op_reads if read.scale is not None)
            first, *others = scales or [None]
            for scale in others:
                read = next(read for read in op_reads if read.scale == scale)
                self._findings.add(
                    "scales",
                    read.op.index,
                    read.quantized_at,
                    f"TensorRT has to write {read.tensor} again with the scale {_text(scale)} for "
                    f"{read.op}, besides {_text(first)}; one Q/DQ pair for all readers is enough",
                    count=True,
                )

    def _by_tensor(self) -> list[list[_Read]]:
        tensors = dict.fromkeys(read.tensor for op in self._network.ops for read in op.reads)
        return [self._network.readers(tensor) for tensor in tensors]

    def _crossings(self) -> None:
        """Edges between int8 and floating point operators."""
        leads = self._leading_to_int8()
        behind = self._behind_int8()
        for op in self._network.ops:
            if op.int8:
                continue
            for read in op.reads:
                if op in self._could:
                    self._could_be_int8(read)
                elif read.scale is not None:
                    self._dequantized(read)
                elif self._made_in_int8(read.tensor):
                    if self._read_as_int8(read):
                        self._both(read)
                    elif op in leads:
                        self._leaves(read)
            if op in behind and op not in self._could:
                for tensor in op.outputs:
                    self._comes_back(op, tensor)

    def _could_be_int8(self, read: _Read) -> None:
        """Reports where int8 is left for an operator that could have gone on with it."""
        op = read.op
        if read.int8:
            if not all(other.int8 for other in op.reads):
                return
            missing = "its output"
        elif self._made_in_int8(read.tensor):
            missing = read.tensor
        else:
            return
        self._findings.add(
            "float-between",
            op.index,
            read.edge,
            f"TensorRT runs {op} in floating point between int8 layers, since {missing} is not "
            "quantized; put Q/DQ on all its inputs and on its output",
            count=True,
        )

    def _dequantized(self, read: _Read) -> None:
        if self._read_as_int8(read):
            self._both(read)
            return
        self._findings.add(
            "unused-pair",
            read.op.index,
            read.edge,
            f"TensorRT quantizes {read.tensor} and dequantizes it again for {_reader(read.op)}, "
            "which no int8 kernel reads; take this Q/DQ pair away",
            count=True,
        )

    def _both(self, read: _Read) -> None:
        self._findings.add(
            "float-reader",
            read.op.index,
            read.edge,
            f"TensorRT needs {read.tensor} as int8 and, for {_reader(read.op)}, in floating point, "
            f"and converts it in a kernel of its own; {self._why(read.op)}",
            avoidable=False,
            count=True,
        )

    def _leaves(self, read: _Read) -> None:
        producer = self._network.producers[read.tensor]
        self._findings.add(
            "float-between",
            read.op.index,
            read.edge,
            f"TensorRT leaves int8 here: {producer} writes floating point for {read.op}; "
            f"{self._why(read.op)}",
            avoidable=False,
            count=True,
        )

    def _comes_back(self, op: _Op, tensor: str) -> None:
        quantized = [read for read in self._network.readers(tensor) if read.scale is not None]
        if not quantized:
            return
        first = quantized[0]
        self._findings.add(
            "float-between",
            first.op.index,
            first.quantized_at,
            f"TensorRT comes back to int8 here: what {op} makes in floating point is quantized in "
            f"a kernel of its own; {self._why(op)}",
            avoidable=False,
            count=True,
        )

    def _why(self, op: _Op) -> str:
        """Why ``op`` is in floating point: the nearest operator around it that has to be."""
        seen = {op}
        queue = deque([op])
        while queue:
            near = queue.popleft()
            if near.kind == _OUTPUT:
                return "the caller reads floating point"
            if near.weighted:
                return f"{near} is left in floating point, and only quantizing it closes the gap"
            if not near.capable and not self._ends_float_layer(near):
                return (
                    f"TensorRT documents no int8 kernel for {near}, which no placement of Q/DQ "
                    "changes"
                )
            ahead = [read.op for read in self._network.readers_of(near)]
            back = [self._network.producers.get(read.tensor) for read in near.reads]
            for other in [*ahead, *back]:
                if other is not None and not other.int8 and other not in seen:
                    seen.add(other)
                    queue.append(other)
        return f"not all that {op} reads can be int8"

    def _ends_float_layer(self, op: _Op) -> bool:
        """Whether ``op`` would have been fused into a layer that is left in floating point."""
        before = self._network.producers.get(op.reads[0].tensor) if len(op.reads) == 1 else None
        return (
            before is not None
            and op.kind in _ACTIVATIONS | _SCALING
            and not before.int8
            and (before.weighted or self._ends_float_layer(before))
        )

    def _leading_to_int8(self) -> set[_Op]:
        """The floating point operators behind which there is int8 again."""
        found: set[_Op] = set()
        for op in reversed(self._network.ops):
            readers = self._network.readers_of(op)
            if not op.int8 and any(read.int8 or read.op in found for read in readers):
                found.add(op)
        return found

    def _behind_int8(self) -> set[_Op]:
        """The floating point operators before which there was int8."""
        found: set[_Op] = set()
        for op in self._network.ops:
            if not op.int8 and any(
                read.int8
                or self._made_in_int8(read.tensor)
                or self._network.producers.get(read.tensor) in found
                for read in op.reads
            ):
                found.add(op)
        return found


def _common(reads: list[_Read]) -> _Scale | None:
    """The scale that all of ``reads`` have; None if one has another or none."""
    scales = {read.scale for read in reads}
    return scales.pop() if len(scales) == 1 else None


def _output_axis(op: _Op, slot: int, ndim: int) -> int:
    if op.kind == "ConvTranspose":
        return 1
    if op.kind == "Gemm":
        return 0 if attribute(op.node, "transB", 0) else 1
    if op.kind == "MatMul":
        return ndim - 1 if slot else ndim - 2
    return 0


def _name(node: NodeProto) -> str:
    return str(node.name or node.output[0])


def _reader(op: _Op) -> str:
    return f"the {op}" if op.kind == _OUTPUT else str(op)


def _text(scale: _Scale | None) -> str:
    return "another" if scale is None else scale.text


def _word(node: NodeProto, name: str, default: str) -> str:
    """String attribute ``name`` of ``node``."""
    for entry in node.attribute:
        if entry.name == name:
            return bytes(entry.s).decode()
    return default
