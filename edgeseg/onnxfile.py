"""An ONNX file as a device needs it: read its metadata, take off or write out its head.

The device side does without the ``onnx`` package, and a few things are all it has to do with the
file itself: read ``metadata_props``; cut the graph before ``EdgeSegUpsampleArgmax`` or
``EdgeSegMaskAssembly``, so that the compiled kernel takes over; replace such a node by its function
body, for libraries that know no model-local functions; or hand EdgeSeg's nodes to TensorRT's
plugins. Each is a matter of moving
whole protobuf fields, so that is what this does: fields it has no business with are copied as they
are, byte for byte.

The file may be anybody's: lengths are checked where they are read (`edgeseg.protobuf`), and what a
few bytes could blow up is bounded here.

Field numbers: onnx/onnx.proto (ONNX IR 10).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from edgeseg.errors import BundleError
from edgeseg.files import read_file
from edgeseg.protobuf import (
    BYTES,
    VARINT,
    Buffer,
    Field,
    WireError,
    fields,
    joined,
    text_of,
    texts_of,
)

__all__ = [
    "DOMAIN",
    "HEAD",
    "LARGEST",
    "MASK_HEAD",
    "PLUGIN_VERSION",
    "Head",
    "MaskHead",
    "OnnxFile",
    "damaged",
]

#: bytes of the largest model there can be: Protocol Buffers count a message in 31 bits
LARGEST = (1 << 31) - 1

#: domain of EdgeSeg's operators, and namespace of the TensorRT plugins for them
DOMAIN = "edgeseg"
#: version under which those plugins register
PLUGIN_VERSION = "1"

#: op type of the upsampling head (domain ``edgeseg``)
HEAD = "EdgeSegUpsampleArgmax"
#: op type of the head that makes the masks of instances (domain ``edgeseg``)
MASK_HEAD = "EdgeSegMaskAssembly"

_MODEL_GRAPH, _MODEL_METADATA, _MODEL_FUNCTION = 7, 14, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 2, 8, 9
_VALUE_NAME = 1
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_NODE_DOMAIN = 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_STRING, _ATTRIBUTE_TYPE = 1, 3, 4, 20
_ATTRIBUTE_REFERENCE = 21
_TYPE_INT, _TYPE_STRING = 2, 3  # AttributeProto.AttributeType
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_NODE = 1, 4, 5, 7
_FLOAT, _UINT8, _FLOAT16 = 1, 2, 10  # TensorProto.DataType

_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_EXTERNAL = 1  # TensorProto.DataLocation

# Where tensors may be: kind of message -> field -> kind of message in it.
_HOLDERS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
}
# Protocol Buffers' own limit.
_DEEPEST = 100
# A network has hundreds of nodes. A function called by each of a million has a million times its
# own.
_MOST_NODES = 100_000


@dataclass(frozen=True)
class Head:
    """Attributes of the head that was cut off.

    ``logits``: name of the float32 (1, classes, h, w) tensor that it read and that the cut graph
    gives. ``height`` and ``width``: network size in pixels. ``confidence``: whether the graph also
    promises a confidence map.
    """

    logits: str
    height: int
    width: int
    align_corners: bool
    confidence: bool


@dataclass(frozen=True)
class MaskHead:
    """What the mask head that was cut off read, and its attributes.

    Names of tensors that the cut graph gives: ``prototypes`` float32 (1, channels, h, w),
    ``coefficients`` float32 (1, capacity, channels), ``boxes`` float32 (1, capacity, 4) in network
    pixels. ``network_height`` and ``network_width``: network size in pixels.
    """

    prototypes: str
    coefficients: str
    boxes: str
    network_height: int
    network_width: int


@dataclass(frozen=True)
class OnnxFile:
    """The bytes of one ONNX model; any method raises BundleError if they are damaged."""

    content: bytes
    name: str = "the model"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> OnnxFile:
        """The file at ``path``; BundleError if it cannot be read, or has more than 2 GiB."""
        try:
            return cls(read_file(path, most=LARGEST), str(path))
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror})") from error

    def metadata(self) -> dict[str, str]:
        """``metadata_props``: key -> value."""
        found: dict[str, str] = {}
        for number, wire, _, value in self._fields(self.content):
            if (number, wire) == (_MODEL_METADATA, BYTES):
                key = self._text(value, _ENTRY_KEY)
                if key in found:
                    raise BundleError(
                        f"{self.name} says {key!r} twice in its metadata; export it again"
                    )
                found[key] = self._text(value, _ENTRY_VALUE)
        return found

    def check_whole(self) -> None:
        """BundleError when weights lie in another file, or messages in one another without end.

        What other libraries look up in such a file's place depends on the folder they run in.
        """
        level: list[tuple[str, Buffer]] = [("model", self.content)]
        for _ in range(_DEEPEST):
            below: list[tuple[str, Buffer]] = []
            for kind, message in level:
                if kind == "tensor":
                    self._check_inside(message)
                    continue
                holders = _HOLDERS[kind]
                below.extend(
                    (holders[number], value)
                    for number, wire, _, value in self._fields(message)
                    if number in holders and wire == BYTES
                )
            if not below:
                return
            level = below
        raise self._damaged()

    def _check_inside(self, tensor: Buffer) -> None:
        for number, wire, integer, value in self._fields(tensor):
            if (number, wire, integer) == (_TENSOR_LOCATION, VARINT, _EXTERNAL) or (
                (number, wire) == (_TENSOR_EXTERNAL, BYTES)
                and self._text(value, _ENTRY_KEY) == "location"
            ):
                raise BundleError(
                    f"{self.name} keeps the weights {self._text(tensor, _TENSOR_NAME)!r} in a file "
                    "beside it, and a bundle's model has all of them inside; `edgeseg export` of "
                    "the original ONNX file takes them in"
                )

    def is_quantized(self) -> bool:
        """Whether the graph says itself what is int8: whether it has a DequantizeLinear."""
        _, graph = self._parts()
        return any(
            number == _GRAPH_NODE and self._text(value, _NODE_OP_TYPE) == "DequantizeLinear"
            for number, _, _, value in graph
        )

    def without_head(self) -> tuple[bytes, Head]:
        """A model that ends with the low-resolution logits, and what the head would have done.

        The graph's outputs are replaced by the head's input; the head, whatever follows it, and
        the function bodies are gone.
        """
        model, graph = self._parts()
        head = self._head_node(graph, HEAD)
        attributes = self._integers(head, HEAD, ("height", "width", "align_corners"))
        logits = self._text(head, _NODE_INPUT)
        outputs = sum(number == _GRAPH_OUTPUT for number, _, _, _ in graph)
        kept, _ = self._upstream(graph, head)
        rest = [field for field in kept if field[0] != _GRAPH_OUTPUT]
        output = (_GRAPH_OUTPUT, BYTES, 0, _float_value_info(logits, 4))
        return _rewritten(model, [*rest, output]), Head(
            logits=logits,
            height=attributes["height"],
            width=attributes["width"],
            align_corners=bool(attributes["align_corners"]),
            confidence=outputs > 1,
        )

    def has_mask_head(self) -> bool:
        """Whether masks are assembled at the end, so that ``without_mask_head`` can cut there."""
        _, graph = self._parts()
        return bool(self._nodes(graph, MASK_HEAD))

    def without_mask_head(self) -> tuple[bytes, MaskHead]:
        """A model that ends with what the mask head reads, and what the head would have done.

        Of the graph's outputs the masks are gone, with the head and whatever follows it; its
        inputs come after the others, as far as they are not among them. The calls of other
        functions are replaced by their bodies.
        """
        content = self.inlined(but=MASK_HEAD)
        file = OnnxFile(content, self.name)
        model, graph = file._parts()
        head = file._head_node(graph, MASK_HEAD)
        attributes = file._integers(head, MASK_HEAD, ("network_height", "network_width"))
        inputs = file._texts(head, _NODE_INPUT)
        if len(inputs) != 4:
            raise BundleError(
                f"{self.name}: {MASK_HEAD} reads prototypes, coefficients, boxes and count, and "
                f"{len(inputs)} inputs came"
            )
        kept, gone = file._upstream(graph, head)
        given = set()
        written = []
        for field in kept:
            if field[0] == _GRAPH_OUTPUT:
                name = file._text(field[3], _VALUE_NAME)
                if name in gone:
                    continue
                given.add(name)
            written.append(field)
        for name, axes in zip(inputs[:3], (4, 3, 3), strict=True):
            if name not in given:
                written.append((_GRAPH_OUTPUT, BYTES, 0, _float_value_info(name, axes)))
        prototypes, coefficients, boxes, _ = inputs
        return _rewritten(model, written), MaskHead(
            prototypes=prototypes,
            coefficients=coefficients,
            boxes=boxes,
            network_height=attributes["network_height"],
            network_width=attributes["network_width"],
        )

    def inlined(self, *, but: str = "") -> bytes:
        """The model with every call of a model-local function replaced by the function's body.

        Calls of the function ``but`` stay as they are; its body is gone all the same.
        """
        model, graph = self._parts()
        functions = {
            self._text(value, _FUNCTION_NAME): value
            for number, _, _, value in model
            if number == _MODEL_FUNCTION and self._text(value, _FUNCTION_NAME) != but
        }
        written: list[Field] = []
        nodes = 0
        for index, field in enumerate(graph):
            function = (
                functions.get(self._text(field[3], _NODE_OP_TYPE))
                if field[0] == _GRAPH_NODE
                else None
            )
            if function is None:
                written.append(field)
                continue
            for node in self._body(function, field[3], f"edgeseg_{index}_"):
                nodes += 1
                if nodes > _MOST_NODES:
                    raise BundleError(
                        f"{self.name} has more than {_MOST_NODES} nodes in its functions, which no "
                        "network needs; export it again"
                    )
                written.append(node)
        return _rewritten(model, written)

    def for_tensorrt(self, *, plugins: bool) -> bytes:
        """The model as TensorRT's parser has to see it, with or without EdgeSeg's plugins.

        Which of the two runs must not depend on the parser: given a plugin and a function of one
        name, releases before 10.7 and from 10.15 take the function and those between the plugin. So
        with ``plugins`` the functions are gone, and the nodes of domain ``edgeseg`` name the plugin
        library's version and namespace; without, they are replaced by the functions' bodies.

        TensorRT makes uint8 of floating-point tensors only (DataType.UINT8): the plugins give half,
        and the bodies, which give int32, get a Cast to float in between. Kernels stored as fp16
        with a Cast behind become fp32 kernels: TensorRT wants a convolution's weights as constants.
        """
        content = self._with_plugins() if plugins else self._casting_from_float(self.inlined())
        return OnnxFile(content, self.name)._with_wide_kernels()

    def has_operators(self) -> bool:
        """Whether any node is of domain ``edgeseg``: whether plugins would have work to do."""
        _, graph = self._parts()
        return any(
            number == _GRAPH_NODE and self._text(value, _NODE_DOMAIN) == DOMAIN
            for number, _, _, value in graph
        )

    def _with_plugins(self) -> bytes:
        model, graph = self._parts()
        written: list[Field] = []
        for field in graph:
            node = field[3]
            if field[0] != _GRAPH_NODE or self._text(node, _NODE_DOMAIN) != DOMAIN:
                written.append(field)
                continue
            added = [_string("plugin_version", PLUGIN_VERSION), _string("plugin_namespace", DOMAIN)]
            if self._text(node, _NODE_OP_TYPE) == HEAD:
                # A plugin has to know how many outputs it has before it sees the graph.
                outputs = len(self._texts(node, _NODE_OUTPUT))
                added.append(_integer("confidence", int(outputs > 1)))
            attributes = [(_NODE_ATTRIBUTE, BYTES, 0, attribute) for attribute in added]
            written.append((_GRAPH_NODE, BYTES, 0, joined([*self._fields(node), *attributes])))
        return _rewritten(model, written)

    def _casting_from_float(self, content: bytes) -> bytes:
        """``content`` with a Cast to float before every Cast to uint8."""
        model, graph = OnnxFile(content, self.name)._parts()
        written: list[Field] = []
        for field in graph:
            node = field[3]
            if field[0] == _GRAPH_NODE and self._cast_target(node) == _UINT8:
                sources = self._texts(node, _NODE_INPUT)
                if len(sources) != 1:
                    raise self._damaged()
                source = sources[0]
                between = f"{source}.as_float"
                written.append((_GRAPH_NODE, BYTES, 0, _cast_node(source, between, _FLOAT)))
                node = joined(
                    [
                        (
                            number,
                            wire,
                            integer,
                            between.encode() if number == _NODE_INPUT else value,
                        )
                        for number, wire, integer, value in self._fields(node)
                    ]
                )
            written.append((field[0], field[1], field[2], node))
        return _rewritten(model, written)

    def _with_wide_kernels(self) -> bytes:
        """The model with every Cast of a float16 initializer to float32 done."""
        model, graph = self._parts()
        initializers = {
            self._text(field[3], _TENSOR_NAME): field[3]
            for field in graph
            if field[0] == _GRAPH_INITIALIZER
        }
        done: dict[int, bytes] = {}
        for index, field in enumerate(graph):
            if field[0] == _GRAPH_NODE and self._cast_target(field[3]) == _FLOAT:
                tensor = initializers.get(self._text(field[3], _NODE_INPUT))
                wide = tensor and self._widened(tensor, self._text(field[3], _NODE_OUTPUT))
                if wide:
                    done[index] = wide
        # What was read by a Cast only is gone with it.
        left = {
            name
            for index, field in enumerate(graph)
            if field[0] == _GRAPH_NODE and index not in done
            for name in self._texts(field[3], _NODE_INPUT)
        }
        written: list[Field] = []
        for index, field in enumerate(graph):
            if index in done:
                written.append((_GRAPH_INITIALIZER, BYTES, 0, done[index]))
            elif field[0] != _GRAPH_INITIALIZER or self._text(field[3], _TENSOR_NAME) in left:
                written.append(field)
        return _rewritten(model, written)

    def _widened(self, tensor: Buffer, name: str) -> bytes | None:
        """A float16 TensorProto as a float32 one called ``name``; None for other types."""
        fields = list(self._fields(tensor))
        types = [field[2] for field in fields if field[0] == _TENSOR_TYPE]
        raw = [field[3] for field in fields if field[0] == _TENSOR_RAW]
        if types != [_FLOAT16] or len(raw) != 1:
            return None
        if len(raw[0]) % 2:
            raise self._damaged()
        values = np.frombuffer(raw[0], "<f2").astype("<f4").tobytes()
        replaced: dict[int, Field] = {
            _TENSOR_TYPE: (_TENSOR_TYPE, VARINT, _FLOAT, b""),
            _TENSOR_NAME: (_TENSOR_NAME, BYTES, 0, name.encode()),
            _TENSOR_RAW: (_TENSOR_RAW, BYTES, 0, values),
        }
        return joined([replaced.get(field[0], field) for field in fields])

    def _cast_target(self, node: Buffer) -> int | None:
        """The element type that a Cast node gives, None for other nodes."""
        if self._text(node, _NODE_OP_TYPE) != "Cast" or self._text(node, _NODE_DOMAIN):
            return None
        return self._named_integers(node).get("to")

    def _body(self, function: Buffer, call: Buffer, prefix: str) -> Iterator[Field]:
        """The nodes of ``function`` with the names and attributes of ``call``."""
        names = dict(
            zip(
                self._texts(function, _FUNCTION_INPUT), self._texts(call, _NODE_INPUT), strict=False
            )
        )
        names.update(
            zip(
                self._texts(function, _FUNCTION_OUTPUT),
                self._texts(call, _NODE_OUTPUT),
                strict=False,
            )
        )
        attributes = {
            self._text(value, _ATTRIBUTE_NAME): value
            for number, _, _, value in self._fields(call)
            if number == _NODE_ATTRIBUTE
        }
        for number, _, _, node in self._fields(function):
            if number == _FUNCTION_NODE:
                yield _GRAPH_NODE, BYTES, 0, self._bound(node, names, attributes, prefix)

    def _bound(
        self,
        node: Buffer,
        names: Mapping[str, str],
        attributes: Mapping[str, Buffer],
        prefix: str,
    ) -> bytes:
        written: list[Field] = []
        for number, wire, integer, value in self._fields(node):
            if number in (_NODE_INPUT, _NODE_OUTPUT):
                name = str(value, "utf-8", "replace")
                # An empty name is an optional input left out; it stays empty.
                value = (names.get(name, prefix + name) if name else "").encode()
            elif number == _NODE_NAME:
                value = prefix.encode() + bytes(value)
            elif number == _NODE_ATTRIBUTE:
                value = self._resolved(value, attributes)
            written.append((number, wire, integer, value))
        return joined(written)

    def _resolved(self, attribute: Buffer, given: Mapping[str, Buffer]) -> Buffer:
        """``attribute``, or, where it refers to one of the call's, that one under its name."""
        reference = self._text(attribute, _ATTRIBUTE_REFERENCE)
        if not reference:
            return attribute
        if reference not in given:
            raise BundleError(f"{self.name}: the call of a function leaves out {reference}")
        name = self._text(attribute, _ATTRIBUTE_NAME).encode()
        return joined(
            [
                (number, wire, integer, name if number == _ATTRIBUTE_NAME else value)
                for number, wire, integer, value in self._fields(given[reference])
            ]
        )

    def _nodes(self, graph: list[Field], op_type: str) -> list[Buffer]:
        return [
            value
            for number, _, _, value in graph
            if number == _GRAPH_NODE and self._text(value, _NODE_OP_TYPE) == op_type
        ]

    def _head_node(self, graph: list[Field], op_type: str) -> Buffer:
        heads = self._nodes(graph, op_type)
        if len(heads) != 1:
            raise BundleError(f"{self.name} has {len(heads)} {op_type} nodes where one is promised")
        return heads[0]

    def _upstream(self, graph: list[Field], head: Buffer) -> tuple[list[Field], set[str]]:
        """``graph`` without ``head`` and what follows it, and the tensors that went with them."""
        gone = set(self._texts(head, _NODE_OUTPUT))
        kept = []
        for field in graph:
            if field[0] == _GRAPH_NODE:
                if field[3] is head:
                    continue
                if gone.intersection(self._texts(field[3], _NODE_INPUT)):
                    gone.update(self._texts(field[3], _NODE_OUTPUT))
                    continue
            kept.append(field)
        return kept, gone

    def _parts(self) -> tuple[list[Field], list[Field]]:
        model = list(self._fields(self.content))
        graphs = [value for number, _, _, value in model if number == _MODEL_GRAPH]
        if len(graphs) != 1:
            raise BundleError(f"{self.name} is not an ONNX model")
        return model, list(self._fields(graphs[0]))

    def _integers(self, node: Buffer, op_type: str, names: Sequence[str]) -> dict[str, int]:
        """The attributes ``names`` of ``node`` as integers; BundleError where one is missing."""
        found = self._named_integers(node)
        for name in names:
            if name not in found:
                raise BundleError(f"{self.name}: {op_type} has no attribute {name}")
        return found

    def _named_integers(self, node: Buffer) -> dict[str, int]:
        """The attributes of ``node`` as integers; 0 where one has no integer value."""
        found = {}
        for number, _, _, value in self._fields(node):
            if number == _NODE_ATTRIBUTE:
                integers = [field[2] for field in self._fields(value) if field[0] == _ATTRIBUTE_INT]
                found[self._text(value, _ATTRIBUTE_NAME)] = integers[0] if integers else 0
        return found

    def _texts(self, message: Buffer, number: int) -> list[str]:
        with self._checked():
            return texts_of(message, number)

    def _text(self, message: Buffer, number: int) -> str:
        with self._checked():
            return text_of(message, number)

    def _fields(self, message: Buffer) -> Iterator[Field]:
        with self._checked():
            yield from fields(message)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except WireError as error:
            raise self._damaged() from error

    def _damaged(self) -> BundleError:
        return damaged(self.name)


def damaged(name: str) -> BundleError:
    """The error for bytes, called ``name``, that are no whole ONNX file."""
    return BundleError(
        f"{name} is not a whole ONNX file: it is damaged, cut short, or something else; "
        "export or copy it again"
    )


def _rewritten(model: list[Field], graph: list[Field]) -> bytes:
    """``model`` with another graph, in the old one's place, and without functions.

    The place matters: OpenVINO takes a stream for ONNX by its first three fields, which have to be
    different ones.
    """
    return joined(
        [
            (_MODEL_GRAPH, BYTES, 0, joined(graph)) if field[0] == _MODEL_GRAPH else field
            for field in model
            if field[0] != _MODEL_FUNCTION
        ]
    )


def _float_value_info(name: str, axes: int) -> bytes:
    """A ValueInfoProto: ``name``, float32, ``axes`` dimensions whose sizes inference will find."""
    shape = joined([(1, BYTES, 0, b"")] * axes)
    tensor = joined([(1, VARINT, _FLOAT, b""), (2, BYTES, 0, shape)])
    kind = joined([(1, BYTES, 0, tensor)])
    return joined([(1, BYTES, 0, name.encode()), (2, BYTES, 0, kind)])


def _cast_node(source: str, target: str, element_type: int) -> bytes:
    """A NodeProto: Cast of tensor ``source`` to ``element_type``, called ``target``."""
    return joined(
        [
            (_NODE_INPUT, BYTES, 0, source.encode()),
            (_NODE_OUTPUT, BYTES, 0, target.encode()),
            (_NODE_NAME, BYTES, 0, target.encode()),
            (_NODE_OP_TYPE, BYTES, 0, b"Cast"),
            (_NODE_ATTRIBUTE, BYTES, 0, _integer("to", element_type)),
        ]
    )


def _integer(name: str, value: int) -> bytes:
    """An AttributeProto."""
    return joined(
        [
            (_ATTRIBUTE_NAME, BYTES, 0, name.encode()),
            (_ATTRIBUTE_INT, VARINT, value, b""),
            (_ATTRIBUTE_TYPE, VARINT, _TYPE_INT, b""),
        ]
    )


def _string(name: str, value: str) -> bytes:
    """An AttributeProto."""
    return joined(
        [
            (_ATTRIBUTE_NAME, BYTES, 0, name.encode()),
            (_ATTRIBUTE_STRING, BYTES, 0, value.encode()),
            (_ATTRIBUTE_TYPE, VARINT, _TYPE_STRING, b""),
        ]
    )
