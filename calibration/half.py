"""FP16 in the graph: what is computed in half precision is written into the ONNX as types.

TensorRT 11 knows only strongly typed networks, and TensorRT 10.3 reads them too: the element type
of every tensor is the one in the file, and no builder flag chooses another. So the choice is made
here, where it can be checked: the calibration frames are run in float32, and a node becomes fp16
only if its weights and everything that was seen going in and out of it fit.

Three kinds of nodes have no precision of their own. A Cast from integers and a DequantizeLinear
give whatever their readers want, both types if need be, so that no Cast follows a Cast and no Cast
comes between a DequantizeLinear and its convolution; a QuantizeLinear takes the type of what it
reads.

What is ranked stays float32, and so does all that is computed for it behind the last layer with
weights: scores, boxes, overlaps. The digits of fp16 make neighbours in a ranking equal, and a box
in pixels coarser than what two overlaps differ by; the work is small. What only brings numbers into
another order or form, on the way there, stays in the precision of the layer before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeseg.errors import CalibrationError, FrameError, RequestError

__all__ = ["LARGEST", "LONG_SUM", "MARGIN", "UNCHANGED_IN_19", "Half", "to_half"]

#: largest finite fp16 number
LARGEST = 65504.0
#: An activation may reach LARGEST / MARGIN: frames to come are not the frames that were seen.
MARGIN = 2.0
#: More addends than this lose too much if a library adds them up in fp16.
LONG_SUM = 4096
#: Operators whose definition changed in opset 19, all of them in ways that a file written for 18
#: does not notice: more element types (float8, strings), more modes, attributes whose default is
#: what 18 did (AveragePool's dilations, Cast's saturate). Q and DQ take fp16 from there on.
UNCHANGED_IN_19 = frozenset({
    "AveragePool", "Cast", "CastLike", "Constant", "DequantizeLinear", "Equal", "Identity",
    "If", "Loop", "Pad", "QuantizeLinear", "Reshape", "Resize", "Scan", "Shape", "Size",
})  # fmt: skip

# Smallest normal fp16 number; below it digits are lost.
_SMALLEST = 2.0**-14
# Smallest fp16 number above zero.
_TINIEST = 2.0**-24
# Largest error of a scale beside the largest of its layer; rounding gives half to normal numbers.
_SCALE_LOSS = 2.0**-10
# Outputs of one run of ONNX Runtime, in bytes; more tensors mean more runs per frame.
_BYTES_A_RUN = 256 << 20
_FLOAT, _HALF = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_WIDTHS: dict[int, type[np.floating[Any]]] = {_FLOAT: np.float32, _HALF: np.float16}
_TAGS = {_FLOAT: "fp32", _HALF: "fp16"}

# Where the time goes, and so what is worth a Cast before and behind it.
_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Bounds beyond fp16 mean "no bound" to values that fit.
_BOUNDED = frozenset({"Clip", "Max", "Min"})
_LIGHT = frozenset({
    "Abs", "Add", "ArgMax", "AveragePool", "BatchNormalization", "Concat", "DepthToSpace",
    "Div", "Elu", "Erf", "Exp", "Expand", "Flatten", "Gather", "Gelu", "GlobalAveragePool",
    "GlobalMaxPool", "Greater", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
    "LayerNormalization", "LeakyRelu", "Less", "Log", "LogSoftmax", "MaxPool", "Mean", "Mish",
    "Mul", "Neg", "PRelu", "Pad", "Pow", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceSum", "Relu", "Reshape", "Resize", "Selu", "Sigmoid", "Slice", "Softmax", "Softplus",
    "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile",
    "TopK", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
_OPERATORS = _HEAVY | _BOUNDED | _LIGHT
# Inputs that say where, not what: Resize's region and scales are float32 in every graph.
_PLACES = {"Resize": (1, 2)}
# They put numbers in order.
_RANKING = frozenset({"NonMaxSuppression", "TopK"})
# They compute nothing.
_CARRYING = frozenset({
    "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip
# They look at no number.
_BLIND = frozenset({"Constant", "Shape", "Size"})


@dataclass(frozen=True)
class Half:
    """A graph with fp16 in it, and why it is not everywhere.

    ``model``: the new graph. ``half``: names of the nodes that compute in fp16, also of those that
    did before. ``kept``: name of each other node that computes in floating point -> the reason why
    it stays float32. ``peak``:
    tensor -> its largest magnitude over all frames, inf if it held something that is no number.
    Nodes without a name of their own, or with another's, go by that of their first output.
    """

    model: onnx.ModelProto
    half: tuple[str, ...]
    kept: dict[str, str]
    peak: dict[str, float]


def to_half(
    model: onnx.ModelProto, frames: Iterable[NDArray[np.uint8]], *, keep: Collection[str] = ()
) -> Half:
    """``model`` with fp16 arithmetic wherever the values fit; ``model`` itself stays as it is.

    ``frames``: pictures of network size, (H, W, 3) or (1, H, W, 3) uint8, iterated once. ``keep``:
    names of nodes that stay float32 whatever their values. Inputs, outputs and model-local
    functions keep their types; functions are given float32. An opset 18 graph with Q/DQ becomes
    opset 19, the first in which these take fp16.

    RequestError for a name in ``keep`` that is not there; CalibrationError for a graph that is not
    valid or does not take one picture, and for no frames; FrameError for a frame of another size.
    """
    graph = _Graph(model)
    unknown = sorted(set(keep) - {node.name for node in graph.nodes})
    if unknown:
        raise RequestError(
            f"the nodes to keep in float32 are named as in the graph, and it has no "
            f"{', '.join(unknown)}"
        )
    seen = _seen(graph, frames)
    choice = _Choice(graph, seen, frozenset(keep))
    made = _Writer(graph, choice).written()
    onnx.checker.check_model(made, full_check=True)
    return Half(made, choice.half, choice.kept, seen.peak)


class _Graph:
    """Look-ups in a copy of a model: who makes a tensor, who reads it, its type, its values."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        if len(graph.input) != 1 or graph.input[0].type.tensor_type.elem_type != TensorProto.UINT8:
            raise CalibrationError(
                "a graph takes one uint8 picture (1, H, W, 3), and this one takes "
                + (", ".join(value.name for value in graph.input) or "nothing")
            )
        try:
            onnx.checker.check_model(self.model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CalibrationError(
                f"the graph is no valid ONNX: {reason}; export it again"
            ) from error
        self.nodes: list[NodeProto] = list(graph.node)
        self._name_nodes()
        self.input = graph.input[0]
        self.outputs = {value.name for value in graph.output}
        self.opset = next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        #: tensors that the body of an If, a Loop or a Scan reads from outside
        self.captured = {name for node in self.nodes for name in _captured(node)}
        self._constants: dict[str, NDArray[np.generic]] = {}
        for tensor in graph.initializer:
            self._constants[tensor.name] = numpy_helper.to_array(tensor)
        for node in self.nodes:
            values = self._constant_output(node)
            if values is not None:
                self._constants[node.output[0]] = values
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        self._values = {
            value.name: value for value in (*inferred.value_info, *inferred.input, *inferred.output)
        }

    def _name_nodes(self) -> None:
        taken: set[str] = set()
        for node in self.nodes:
            if not node.name or node.name in taken:
                node.name = f"{node.op_type}_{next(name for name in node.output if name)}"
            taken.add(node.name)

    def _constant_output(self, node: NodeProto) -> NDArray[np.generic] | None:
        """The values that ``node`` gives whatever the picture: a Constant, or a weight's Cast."""
        if node.op_type == "Constant" and not node.domain:
            (entry,) = node.attribute
            value = helper.get_attribute_value(entry)
            if isinstance(value, TensorProto):
                return numpy_helper.to_array(value)
            if entry.name in ("value_float", "value_floats"):
                return np.asarray(value, np.float32)
            return None
        if _is_cast(node) and node.input[0] in self._constants and _integer(node, "to") in _WIDTHS:
            narrowed: NDArray[np.generic] = self._constants[node.input[0]].astype(
                _WIDTHS[_integer(node, "to")]
            )
            return narrowed
        return None

    def kind(self, name: str) -> int:
        """Element type of tensor ``name``; 0 if nobody knows it."""
        if name in self._constants:
            return int(helper.np_dtype_to_tensor_dtype(self._constants[name].dtype))
        if name in self._values:
            return int(self._values[name].type.tensor_type.elem_type)
        return 0

    def size(self, name: str) -> int:
        """Bytes of tensor ``name``, a dimension that nobody knows counted as 1024."""
        sides = self._values[name].type.tensor_type.shape.dim if name in self._values else ()
        return 4 * int(np.prod([side.dim_value or 1024 for side in sides], dtype=np.int64))

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """The values of ``name`` if they do not depend on the picture."""
        return self._constants.get(name)

    def floats(self, node: NodeProto) -> tuple[list[str], list[str]]:
        """The float32 inputs of ``node`` that carry values, and its float32 outputs."""
        places = () if node.domain else _PLACES.get(node.op_type, ())
        inputs = [
            name
            for index, name in enumerate(node.input)
            if name and index not in places and self.kind(name) == _FLOAT
        ]
        return inputs, [name for name in node.output if name and self.kind(name) == _FLOAT]

    def computed(self) -> list[str]:
        """The float tensors that depend on the picture, in the order of execution."""
        return [
            name
            for node in self.nodes
            for name in node.output
            if name and name not in self._constants and self.kind(name) in _WIDTHS
        ]


def _is_cast(node: NodeProto) -> bool:
    """Whether ``node`` is ONNX's Cast."""
    return bool(node.op_type == "Cast" and not node.domain)


def _integer(node: NodeProto, name: str) -> int:
    return int(next((entry.i for entry in node.attribute if entry.name == name), 0))


def _captured(node: NodeProto) -> Iterator[str]:
    """Names that the bodies in ``node`` read without making them."""
    for entry in node.attribute:
        for body in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
            made = {value.name for value in body.input} | {t.name for t in body.initializer}
            for inner in body.node:
                read = (*inner.input, *_captured(inner))
                yield from (name for name in read if name and name not in made)
                made.update(inner.output)
            yield from (value.name for value in body.output if value.name not in made)


# --- what the frames do


@dataclass(frozen=True)
class _Seen:
    """Largest magnitude and shape of each float tensor."""

    peak: dict[str, float]
    shape: dict[str, tuple[int, ...]]


def _seen(graph: _Graph, frames: Iterable[NDArray[np.uint8]]) -> _Seen:
    """Runs ``frames`` in the precision that the graph has now."""
    names = graph.computed()
    sessions = [(portion, _session(graph, portion)) for portion in _portions(graph, names)]
    sides = tuple(side.dim_value for side in graph.input.type.tensor_type.shape.dim)
    peak = dict.fromkeys(names, 0.0)
    shape: dict[str, tuple[int, ...]] = {}
    count = 0
    for frame in frames:
        count += 1
        image = np.ascontiguousarray(frame[None] if frame.ndim == 3 else frame)
        fits = image.ndim == len(sides) and all(
            side in (0, found) for side, found in zip(sides, image.shape, strict=True)
        )
        if image.dtype != np.uint8 or not fits:
            raise FrameError(
                f"frames are uint8 of the graph's size {sides}, and frame {count} is "
                f"{frame.dtype} {frame.shape}"
            )
        for portion, session in sessions:
            values = session.run(portion, {graph.input.name: image})
            for name, value in zip(portion, values, strict=True):
                shape[name] = value.shape
                peak[name] = max(peak[name], _magnitude(value))
    if not count:
        raise CalibrationError(
            "fp16 needs frames to see which values overflow, and none came; give pictures of the "
            "kind that the model will see"
        )
    return _Seen(peak, shape)


def _magnitude(values: NDArray[np.float32]) -> float:
    if not values.size:
        return 0.0
    # Without a copy of a large array. NaN comes through max and min.
    largest = max(float(values.max()), -float(values.min()))
    return largest if np.isfinite(largest) else float("inf")


def _portions(graph: _Graph, names: Sequence[str]) -> list[list[str]]:
    """``names`` in portions whose values fit in one run's memory."""
    portions: list[list[str]] = []
    room = 0
    for name in names:
        size = graph.size(name)
        if not portions or size > room:
            portions.append([])
            room = _BYTES_A_RUN
        portions[-1].append(name)
        room -= size
    return portions


def _session(graph: _Graph, names: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session that gives ``names``, and computes nothing that only the others need."""
    asked = onnx.ModelProto()
    asked.CopyFrom(graph.model)
    del asked.graph.output[:]
    for name in names:
        asked.graph.output.append(helper.make_tensor_value_info(name, graph.kind(name), None))
    needed = set(names)
    nodes = []
    for node in reversed(asked.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input, _captured(node))
            nodes.append(node)
    tensors = [tensor for tensor in asked.graph.initializer if tensor.name in needed]
    del asked.graph.node[:], asked.graph.initializer[:], asked.graph.value_info[:]
    asked.graph.node.extend(reversed(nodes))
    asked.graph.initializer.extend(tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # An arena keeps what the largest run needed, and there is one per session.
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(
        asked.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


# --- which nodes


class _Choice:
    """Which nodes compute in fp16, and why the others do not."""

    def __init__(self, graph: _Graph, seen: _Seen, keep: frozenset[str]) -> None:
        self._graph = graph
        self._seen = seen
        self._keep = keep
        self._between = self._between_integers()
        self._ranked = self._before_rankings()
        self.kept: dict[str, str] = {}
        #: names of the nodes, other than DequantizeLinear, whose float tensors are fp16
        self.typed: set[str] = set()
        #: DequantizeLinear nodes that can give fp16
        self._flexible: set[str] = set()
        self._plain = [node for node in graph.nodes if self._has_precision(node)]
        for node in graph.nodes:
            if node.op_type in (_QUANTIZE, _DEQUANTIZE) and any(graph.floats(node)):
                reason = self._misfit(node)
                if reason is not None:
                    self.kept[node.name] = reason
                elif node.op_type == _DEQUANTIZE:
                    self._flexible.add(node.name)
        for node in self._plain:
            reason = self._objection(node)
            if reason is None:
                self.typed.add(node.name)
            else:
                self.kept[node.name] = reason
        self._give_up_islands()
        self._follow()
        self.half = tuple(
            node.name
            for node in graph.nodes
            if node.name in self.typed or self._is_half_already(node) or self._is_wanted(node)
        )
        self.kept = {
            node.name: self.kept[node.name] for node in graph.nodes if node.name in self.kept
        }

    def gives_half(self, node: NodeProto) -> bool:
        """Whether DequantizeLinear ``node`` can give fp16."""
        return node.name in self._flexible

    def _has_precision(self, node: NodeProto) -> bool:
        """Whether ``node`` computes float32 numbers from float32 numbers, or from nothing."""
        if not node.domain and node.op_type in _BLIND | {"Cast", _QUANTIZE, _DEQUANTIZE}:
            return False
        inputs, outputs = self._graph.floats(node)
        return bool(inputs or outputs)

    def _misfit(self, node: NodeProto) -> str | None:
        """Why Q or DQ ``node`` cannot have an fp16 scale."""
        if node.name in self._keep:
            return "asked"
        inputs, outputs = self._graph.floats(node)
        if self._graph.opset < 18:
            return f"opset {self._graph.opset}: {node.op_type} takes fp16 from opset 19"
        if self._graph.opset == 18 and not _can_become_19(self._graph.model):
            return f"opset 18: {node.op_type} takes fp16 from opset 19, and the graph cannot move"
        if self._graph.kind(node.input[0]) == TensorProto.INT32:
            return "precision: int32 values have more digits than fp16"
        scale = self._graph.constant(node.input[1])
        if scale is None or scale.dtype != np.float32:
            return "precision: its scale is no float32 constant"
        # Beside the layer's largest: a channel that small is as good as dead, and fp16 weights
        # would lose the same. A Cast would cost the convolution behind it its int8 kernel.
        errors = np.abs(_narrow(scale).astype(np.float64) - scale.astype(np.float64))
        loss = float(np.max(errors) / np.max(scale))
        if not loss <= _SCALE_LOSS:
            return f"precision: scale {node.input[1]} loses {100 * loss:.3g} % in fp16"
        values = [name for name in (*inputs, *outputs) if self._graph.constant(name) is None]
        return self._overflow(values)

    def _objection(self, node: NodeProto) -> str | None:
        """Why ``node`` cannot compute in fp16."""
        if node.name in self._keep:
            return "asked"
        if node.domain or node.op_type not in _OPERATORS:
            return f"operator: {node.op_type} is given float32"
        if not _takes_half(node, self._graph.opset):
            return f"operator: {node.op_type} takes no fp16 in opset {self._graph.opset}"
        inputs, outputs = self._graph.floats(node)
        if self._graph.captured.intersection(outputs):
            return "operator: read inside a subgraph"
        if node.name in self._between:
            return "between integers: int8 comes and int8 goes"
        if node.name in self._ranked:
            return "order: a TopK ranks what comes of it"
        several = sum(bool(name) for name in node.output) > 1
        if several and node.op_type in ("BatchNormalization", "LayerNormalization"):
            return f"operator: {node.op_type} gives its statistics too"
        return (
            self._weights(node, inputs)
            or self._overflow([*inputs, *outputs])
            or self._integers(inputs)
            or self._sums(node)
        )

    def _between_integers(self) -> frozenset[str]:
        """Names of the nodes that read integers and give integers, as far as anyone can see.

        An engine makes one int8 kernel of such a node and its Q and DQ, so no fp16 number would
        ever exist. And ONNX Runtime would make a mess of it: it quantizes the bias by a detour
        through fp16, where the quotient overflows (its WeightBiasQuantization), and it takes a
        Concat for int8 with scales that its int8 Concat refuses.
        """
        graph = self._graph
        found: set[str] = set()
        for node in graph.nodes:
            if node.domain or node.op_type not in _HEAVY | {"Concat"}:
                continue
            sources = list(node.input) if node.op_type == "Concat" else node.input[:2]
            makers = [graph.producer.get(name) for name in sources]
            if any(maker is None or maker.op_type != _DEQUANTIZE for maker in makers):
                continue
            chain = [node]
            while chain:
                name = chain[-1].output[0]
                readers = graph.readers.get(name, [])
                if name in graph.outputs or name in graph.captured:
                    break
                if readers and all(reader.op_type == _QUANTIZE for reader in readers):
                    found.update(inner.name for inner in chain)
                    break
                if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip"):
                    break
                chain.append(readers[0])
        return frozenset(found)

    def _before_rankings(self) -> frozenset[str]:
        """Names of the nodes that rank, and of those that compute what is ranked.

        Back to the layers with weights and to other domains' operators; without nodes that only
        carry numbers from there.
        """
        graph = self._graph
        found: set[str] = set()
        waiting = [node for node in graph.nodes if node.op_type in _RANKING and not node.domain]
        while waiting:
            node = waiting.pop()
            if node.name in found or node.domain or node.op_type in _HEAVY:
                continue
            found.add(node.name)
            # A number that is compared decides as well.
            names = [n for n in node.input if graph.kind(n) in (_FLOAT, TensorProto.BOOL)]
            makers = (graph.producer.get(name) for name in names)
            waiting.extend(maker for maker in makers if maker is not None)
        for node in graph.nodes:
            if node.name in found and node.op_type in _CARRYING:
                names = [n for n in graph.floats(node)[0] if graph.constant(n) is None]
                makers = (graph.producer.get(name) for name in names)
                if names and all(m is not None and m.name not in found for m in makers):
                    found.discard(node.name)
        return frozenset(found)

    def _weights(self, node: NodeProto, inputs: Sequence[str]) -> str | None:
        if node.op_type == "BatchNormalization":
            combined = _batch_norm(self._graph, node)
            if combined is None:
                return "precision: the statistics are no constants"
            constants = dict(zip(node.input[1:3], combined, strict=True))
        else:
            constants = {
                name: values.astype(np.float64)
                for name in inputs
                if (values := self._graph.constant(name)) is not None
            }
        for name, values in constants.items():
            finite = np.abs(values[np.isfinite(values)])
            if not finite.size:
                continue
            largest = float(finite.max())
            # 65519 still rounds to the largest number.
            if np.isinf(_narrow(np.float64(largest))) and node.op_type not in _BOUNDED:
                return f"weight overflow: {name} reaches {largest:.6g}, fp16 holds {LARGEST:.0f}"
            # A few tiny numbers in a kernel are no loss beside the large ones; but a divisor is
            # worth as much as its smallest number.
            weight = finite[finite > 0].min(initial=1) if node.op_type == "Div" else largest
            if 0 < weight < _SMALLEST:
                return f"precision: {name} is as small as {weight:.3g}, fp16 begins at 6.1e-05"
        return None

    def _overflow(self, names: Sequence[str]) -> str | None:
        for name in names:
            peak = self._seen.peak.get(name, 0.0)
            if peak > LARGEST / MARGIN:
                margin = "" if peak > LARGEST else f", and {MARGIN:g} times that is wanted"
                return (
                    f"activation overflow: tensor {name} reaches {peak:.6g}{margin}, "
                    f"fp16 holds {LARGEST:.0f}"
                )
        return None

    def _integers(self, names: Sequence[str]) -> str | None:
        """Integers beyond 2048 (positions, counts) are not all in fp16."""
        for name in names:
            node = self._graph.producer.get(name)
            peak = self._seen.peak.get(name, 0.0)
            if node is not None and _is_cast(node) and peak > 2048:
                if self._graph.kind(node.input[0]) in _WIDTHS:
                    continue
                return f"precision: {name} holds integers up to {peak:.0f}, fp16 all up to 2048"
        return None

    def _sums(self, node: NodeProto) -> str | None:
        """Averages over too much for a sum in fp16."""
        addends = self._addends(node)
        if addends > LONG_SUM:
            return f"precision: {node.op_type} adds up {addends} numbers"
        total = self._seen.peak.get(node.output[0], 0.0) * addends
        averages = ("AveragePool", "GlobalAveragePool", "ReduceMean")
        if node.op_type in averages and total > LARGEST / MARGIN:
            return f"precision: {node.op_type} adds up to {total:.6g} before it divides"
        return None

    def _addends(self, node: NodeProto) -> int:
        shape = self._seen.shape.get(node.input[0])
        made = self._seen.shape.get(node.output[0])
        if shape is None or made is None:
            return 1
        attributes = {entry.name: entry for entry in node.attribute}
        if node.op_type in ("GlobalAveragePool", "ReduceMean", "ReduceSum"):
            return int(np.prod(shape) // max(np.prod(made), 1))
        if node.op_type == "AveragePool":
            return int(np.prod(attributes["kernel_shape"].ints))
        if node.op_type == "InstanceNormalization":
            return int(np.prod(shape[2:]))
        if node.op_type in ("LayerNormalization", "Softmax", "LogSoftmax"):
            axis = attributes["axis"].i if "axis" in attributes else -1
            return int(np.prod(shape[axis:]) if node.op_type[0] == "L" else shape[axis])
        return 1

    def _give_up_islands(self) -> None:
        """Light nodes between float32 nodes stay float32: two Casts cost more than they save."""
        graph = self._graph
        light = {
            node.name: node
            for node in self._plain
            if node.name in self.typed and node.op_type not in _HEAVY
        }
        done: set[str] = set()
        for name in light:
            if name in done:
                continue
            region, waiting = {name}, [name]
            half = single = False
            while waiting:
                node = light[waiting.pop()]
                inputs, outputs = graph.floats(node)
                makers = [graph.producer[n] for n in inputs if n in graph.producer]
                single |= not graph.outputs.isdisjoint(outputs)
                for other in (*makers, *(r for n in outputs for r in graph.readers.get(n, ()))):
                    if other.name in light:
                        if other.name not in region:
                            region.add(other.name)
                            waiting.append(other.name)
                    elif other.name in self.typed:
                        half = True
                    elif other.name in self.kept:
                        single = True
            done |= region
            if single and not half:
                self.typed -= region
                self.kept.update(dict.fromkeys(region, _NO_NEIGHBOUR))

    def _follow(self) -> None:
        """QuantizeLinear goes with what it reads, DequantizeLinear with its readers."""
        for node in self._graph.nodes:
            if node.op_type != _QUANTIZE or node.name in self.kept:
                continue
            if self._graph.kind(node.input[0]) != _FLOAT:
                continue
            if self._comes_as_half(node.input[0]):
                self.typed.add(node.name)
            else:
                self.kept[node.name] = _NO_NEIGHBOUR
        for node in self._graph.nodes:
            if node.name in self._flexible and not self._is_wanted(node):
                self.kept[node.name] = _NO_NEIGHBOUR

    def _comes_as_half(self, name: str) -> bool:
        node = self._graph.producer.get(name)
        if node is None or self._graph.constant(name) is not None:
            return False
        if _is_cast(node):
            return self._integers([name]) is None
        return node.name in self.typed or node.name in self._flexible

    def _is_wanted(self, node: NodeProto) -> bool:
        """Whether ``node`` can give fp16 or float32, and somebody reads it as fp16."""
        readers = self._graph.readers.get(node.output[0], ())
        return node.name in self._flexible and any(r.name in self.typed for r in readers)

    def _is_half_already(self, node: NodeProto) -> bool:
        graph = self._graph
        return node.op_type not in _BLIND | {"Cast"} and any(
            graph.kind(name) == _HALF and graph.constant(name) is None
            for name in (*node.input, *node.output)
        )


_NO_NEIGHBOUR = "no fp16 beside it"


def _takes_half(node: NodeProto, opset: int) -> bool:
    schema = onnx.defs.get_schema(node.op_type, opset)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return "tensor(float16)" in allowed.get(schema.inputs[0].type_str, ())


def _can_become_19(model: onnx.ModelProto) -> bool:
    """Whether an opset 18 ``model`` says the same under opset 19."""
    bodies = [model.graph, *model.functions]
    for body in bodies:
        for node in _all_nodes(body.node):
            if node.domain:
                continue
            # Which windows count at the far edge is worded anew, and libraries differ.
            if node.op_type == "AveragePool" and _integer(node, "ceil_mode"):
                return False
            if node.op_type in UNCHANGED_IN_19:
                continue
            if onnx.defs.get_schema(node.op_type, 19).since_version > 18:
                return False
    return all(
        opset.version == 18
        for function in model.functions
        for opset in function.opset_import
        if opset.domain in ("", "ai.onnx")
    )


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for entry in node.attribute:
            for body in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
                yield from _all_nodes(body.node)


def _batch_norm(
    graph: _Graph, node: NodeProto
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Scale and shift of BatchNormalization ``node`` for mean 0 and variance 1; None if unknown.

    The norm could keep float32 parameters by the letter of ONNX, but OpenVINO refuses mixed types,
    and TensorRT's parser makes a float32 layer of them. A running variance may lie anywhere; one
    scale and one shift, rounded once, lose less than four numbers rounded each.
    """
    parts = [graph.constant(name) for name in node.input[1:5]]
    if any(part is None for part in parts):
        return None
    gamma, beta, mean, variance = (np.asarray(part, np.float64) for part in parts)
    epsilon = next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    # The node will add its epsilon to the new variance, 1, as well.
    return factor * np.sqrt(1 + epsilon), beta - mean * factor


def _narrow(values: NDArray[np.generic] | np.float64) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16)


def _narrow_scale(scale: NDArray[np.generic]) -> NDArray[np.float16]:
    """``scale`` in fp16, above zero as TensorRT wants it."""
    narrow: NDArray[np.float16] = np.maximum(_narrow(scale), np.float16(_TINIEST))
    return narrow


# --- the new graph


class _Writer:
    """Writes the choice into a new model."""

    def __init__(self, graph: _Graph, choice: _Choice) -> None:
        self._graph = graph
        self._choice = choice
        self._nodes: list[NodeProto] = []
        self._tensors: dict[str, NDArray[np.generic]] = {}
        self._taken = {name for node in graph.nodes for name in (*node.input, *node.output)}
        self._taken.update(tensor.name for tensor in graph.model.graph.initializer)
        # (tensor, element type) -> its name in that type, where that is another
        self._versions: dict[tuple[str, int], str] = {}
        # scale -> its float32 version with the digits of fp16
        self._rounded_versions: dict[str, str] = {}
        # copy -> the tensor that it stands for; it takes over the name if that one goes
        self._copies: dict[str, str] = {}
        # tensors of the graph that become fp16
        self._halves = {
            name
            for node in graph.nodes
            if node.name in choice.typed
            for name in node.output
            if graph.kind(name) == _FLOAT
        }
        self._rounded = self._rounded_scales()

    def written(self) -> onnx.ModelProto:
        """The new model."""
        graph = self._graph
        for node in graph.nodes:
            self._write(node)
        made = onnx.ModelProto()
        made.CopyFrom(graph.model)
        del made.graph.node[:]
        made.graph.node.extend(self._nodes)
        made.graph.initializer.extend(
            numpy_helper.from_array(values, name) for name, values in self._tensors.items()
        )
        self._tidy(made.graph)
        if graph.opset == 18 and any(
            node.op_type in (_QUANTIZE, _DEQUANTIZE) and node.name in self._choice.half
            for node in graph.nodes
        ):
            _make_19(made)
        return made

    def _write(self, node: NodeProto) -> None:
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.op_type in _BLIND and not node.domain:
            for index, name in enumerate(node.input):
                copy.input[index] = self._native(name)
            self._nodes.append(copy)
            return
        if _is_cast(node):
            self._write_cast(copy)
            return
        half = node.name in self._choice.typed
        floats = set(self._graph.floats(node)[0])
        if half and node.op_type == "BatchNormalization":
            self._write_batch_norm(copy)
        else:
            for index, name in enumerate(node.input):
                kind = self._graph.kind(name) if name else 0
                if kind == _FLOAT:
                    wanted = _HALF if half and name in floats else _FLOAT
                    copy.input[index] = self._version(name, wanted, node)
                elif kind == _HALF:
                    copy.input[index] = self._version(name, _HALF, node)
        self._nodes.append(copy)
        for index, name in enumerate(node.output):
            if name in self._halves and name in self._graph.outputs:
                inner = self._fresh(name, _HALF)
                copy.output[index] = inner
                self._nodes[-1] = copy
                self._versions[name, _HALF] = inner
                self._cast(inner, name, _FLOAT, f"{name}.cast")

    def _write_cast(self, copy: NodeProto) -> None:
        """A Cast of the graph reads what is there; where nothing changes any more it goes."""
        source, target = copy.input[0], copy.output[0]
        narrow = source in self._halves or self._graph.kind(source) == _HALF
        if self._graph.constant(target) is None and narrow:
            copy.input[0] = self._version(source, _HALF, copy)
            if _integer(copy, "to") == _HALF and target not in self._graph.outputs:
                self._versions[target, _HALF] = copy.input[0]
        self._nodes.append(copy)

    def _write_batch_norm(self, copy: NodeProto) -> None:
        combined = _batch_norm(self._graph, copy)
        assert combined is not None
        scale, shift = combined
        parts = (scale, shift, np.zeros(scale.shape), np.ones(scale.shape))
        copy.input[0] = self._version(copy.input[0], _HALF, copy)
        for index, values in enumerate(parts, start=1):
            name = copy.input[index]
            copy.input[index] = self._put(name, _narrow(values))

    def _version(self, name: str, wanted: int, reader: NodeProto) -> str:
        """The name under which ``reader`` finds tensor ``name`` as element type ``wanted``."""
        graph = self._graph
        values = graph.constant(name)
        if values is not None and wanted == _FLOAT and self._is_rounded(name, reader):
            if name not in self._rounded_versions:
                rounded = _narrow_scale(values).astype(np.float32)
                self._rounded_versions[name] = self._put(name, rounded)
            return self._rounded_versions[name]
        if (name, wanted) in self._versions:
            return self._versions[name, wanted]
        native = _HALF if name in self._halves else graph.kind(name)
        if native == wanted:
            return name
        made = self._constant_version if values is not None else self._computed_version
        self._versions[name, wanted] = found = made(name, wanted, reader)
        return found

    def _constant_version(self, name: str, wanted: int, reader: NodeProto) -> str:
        node = self._graph.producer.get(name)
        if node is not None and _is_cast(node) and self._graph.kind(node.input[0]) == wanted:
            return str(node.input[0])
        values = self._graph.constant(name)
        assert values is not None
        if wanted == _FLOAT:
            return self._put(name, values.astype(np.float32))
        if reader.op_type in (_QUANTIZE, _DEQUANTIZE):
            return self._put(name, _narrow_scale(values))
        if reader.op_type in _BOUNDED:
            values = np.clip(values.astype(np.float64), -LARGEST, LARGEST)
        return self._put(name, _narrow(values))

    def _computed_version(self, name: str, wanted: int, reader: NodeProto) -> str:
        graph = self._graph
        node = graph.producer.get(name)
        if node is not None and _is_cast(node):
            source = node.input[0]
            if graph.kind(source) not in _WIDTHS:
                return self._twin(node, name, wanted, [source])
            # It widened, or did nothing: what it read is there in the type wanted, or will be.
            if graph.kind(source) in (wanted, graph.kind(name)):
                return self._version(source, wanted, reader)
        if node is not None and node.op_type == _DEQUANTIZE and self._choice.gives_half(node):
            scale = self._version(node.input[1], wanted, node)
            return self._twin(node, name, wanted, [node.input[0], scale, *node.input[2:]])
        copy = self._fresh(name, wanted)
        self._cast(self._native(name), copy, wanted, f"{name}.to_{_TAGS[wanted]}")
        return copy

    def _native(self, name: str) -> str:
        kind = _HALF if name in self._halves else _FLOAT
        return self._versions.get((name, kind), name)

    def _twin(self, node: NodeProto, name: str, wanted: int, inputs: Sequence[str]) -> str:
        """``node`` once more, giving ``wanted``; it becomes ``node`` if nobody needs that one."""
        twin = NodeProto()
        twin.CopyFrom(node)
        twin.name = f"{node.name}.{_TAGS[wanted]}"
        del twin.input[:]
        twin.input.extend(inputs)
        twin.output[0] = self._fresh(name, wanted)
        for entry in twin.attribute:
            if entry.name == "to":
                entry.i = wanted
        self._copies[twin.output[0]] = name
        self._nodes.append(twin)
        return str(twin.output[0])

    def _cast(self, source: str, target: str, to: int, name: str) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [target], name, to=to))

    def _put(self, name: str, values: NDArray[np.generic]) -> str:
        """A new initializer that stands for constant ``name`` with ``values``."""
        copy = self._fresh(name, int(helper.np_dtype_to_tensor_dtype(values.dtype)))
        self._tensors[copy] = np.ascontiguousarray(values)
        self._copies[copy] = name
        return copy

    def _fresh(self, name: str, kind: int) -> str:
        found = f"{name}.{_TAGS[kind]}"
        while found in self._taken:
            found += "_"
        self._taken.add(found)
        return found

    def _rounded_scales(self) -> set[str]:
        """Scales that some Q or DQ rounds to fp16, so that all that share integers must round.

        Otherwise a float32 QuantizeLinear and an fp16 DequantizeLinear of one tensor would differ
        in what an integer stands for, always to the same side.
        """
        graph = self._graph
        rounded = {
            node.input[1]
            for node in graph.nodes
            if node.op_type in (_QUANTIZE, _DEQUANTIZE) and node.name in self._choice.half
        }
        for node in graph.nodes:
            if node.op_type != _QUANTIZE:
                continue
            readers = [r for r in graph.readers.get(node.output[0], ()) if r.op_type == _DEQUANTIZE]
            scales = {node.input[1], *(reader.input[1] for reader in readers)}
            if scales & rounded:
                rounded |= scales
        return rounded

    def _is_rounded(self, name: str, reader: NodeProto) -> bool:
        if name not in self._rounded or reader.op_type not in (_QUANTIZE, _DEQUANTIZE):
            return False
        return not str(self._choice.kept.get(reader.name, "")).startswith("precision")

    def _tidy(self, graph: onnx.GraphProto) -> None:
        """Takes away what nobody reads; copies whose original went take its name."""
        live = {value.name for value in graph.output}
        nodes = []
        passive = ("Cast", "Constant", _DEQUANTIZE)
        # What was dead before stays: it is not ours to judge.
        dead = {
            node.name
            for node in self._graph.nodes
            if not any(
                name in self._graph.readers or name in live or name in self._graph.captured
                for name in node.output
            )
        }
        for node in reversed(graph.node):
            gone = node.op_type in passive and not node.domain and live.isdisjoint(node.output)
            if gone and node.name not in dead:
                continue
            live.update(node.input)
            live.update(_captured(node))
            nodes.append(node)
        tensors = [tensor for tensor in graph.initializer if tensor.name in live]
        there = {tensor.name for tensor in tensors} | {n for node in nodes for n in node.output}
        renamed: dict[str, str] = {}
        for copy, name in self._copies.items():
            if copy in there and name not in there and name not in renamed.values():
                renamed[copy] = name
        names = {node.name for node in nodes}
        for node in nodes:
            if node.output[0] in renamed and node.op_type in passive:
                plain = node.name.rpartition(".")[0]
                node.name = node.name if plain in names else plain
            for fields in (node.input, node.output):
                for index, name in enumerate(fields):
                    fields[index] = renamed.get(name, name)
        for tensor in tensors:
            tensor.name = renamed.get(tensor.name, tensor.name)
        del graph.node[:], graph.initializer[:]
        graph.node.extend(reversed(nodes))
        graph.initializer.extend(tensors)
        # The notes on types that came with the graph are out of date.
        del graph.value_info[:]


def _make_19(model: onnx.ModelProto) -> None:
    """Opset 18 -> 19, and the IR version that belongs to it, of the graph and its functions."""
    for holder in (model, *model.functions):
        for opset in holder.opset_import:
            if opset.domain in ("", "ai.onnx"):
                opset.version = 19
    model.ir_version = max(model.ir_version, 9)
