"""Any ONNX file that classifies pixels or finds objects, as a network to be exported again.

Its preprocessing and its argmax, or what follows its raw detections, are replaced by EdgeSeg's, so
that it keeps the contract; between them it stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, compose, helper, inliner, numpy_helper, version_converter
from onnxscript import ir, optimizer
from torch import Tensor, nn

from edgeseg.bundle import SPEC_KEY
from edgeseg.errors import BundleError, RequestError
from edgeseg.export.external import take_weights_in
from edgeseg.export.onnx import OPSET, quiet
from edgeseg.export.own import OwnNetwork, check_output, first_line
from edgeseg.export.own_instance import (
    RAW_NAMES,
    OwnInstanceNetwork,
    RawForm,
    check_pictures,
    check_static,
    probed,
)
from edgeseg.export.tail import remove_unused, take_off_tail
from edgeseg.files import read_file
from edgeseg.onnxfile import LARGEST
from edgeseg.spec import Preprocessing

__all__ = ["instances_of_file", "network_of_file"]

_PREFIX = "model."
_INPUT = "edgeseg.x"
_RAW = "edgeseg.raw."
_ERRORS_ONLY = 3
_STANDARD = ("", "ai.onnx")
_FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
_INTEGERS = (
    TensorProto.UINT8,
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
)
# What may stand between an argmax and the output without changing a value.
_FORWARDS = ("Cast", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Flatten")


class _Session(nn.Module):
    """The file as it came, in ONNX Runtime: normalised image -> scores (1, channels, h, w)."""

    def __init__(self, model: onnx.ModelProto, output: str, *, channels_last: bool) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        self._session: Any = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        given = self._session.get_inputs()[0]
        self._input = given.name
        self._type = np.float16 if given.type == "tensor(float16)" else np.float32
        self._output = output
        self._reads_channels_last = channels_last
        self.axes: tuple[int, int, int, int] | None = None
        self.classes_of_map = 0

    def run(self, x: Tensor) -> np.ndarray[Any, Any]:
        """The output as it comes."""
        return self.run_all(x, [self._output])[0]

    def run_all(self, x: Tensor, outputs: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """Several outputs as they come."""
        pixels = x.numpy().astype(self._type)
        if self._reads_channels_last:
            pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        found: list[np.ndarray[Any, Any]] = self._session.run(list(outputs), {self._input: pixels})
        return found

    def forward(self, x: Tensor) -> Tensor:
        found = self.run(x)
        if self.classes_of_map:
            names = np.arange(self.classes_of_map).reshape(1, -1, 1, 1)
            found = found.reshape(1, 1, *x.shape[-2:]) == names
        elif self.axes is not None:
            found = found.transpose(self.axes)
        return torch.from_numpy(np.ascontiguousarray(found.astype(np.float32)))


def network_of_file(
    path: str,
    size: tuple[int, int] | None,
    *,
    classes: tuple[str, ...] | None,
    preprocessing: Preprocessing,
    align_corners: bool = False,
    output_name: str | None = None,
) -> OwnNetwork:
    """The ONNX file ``path`` as a network of ``size`` (height, width), or of its own fixed size.

    RequestError when the file is no classifier of pixels, or not of that size; BundleError when it
    cannot be read.
    """
    model = _read(path)
    source = _only_input(model, path)
    channels_last, fixed = _layout(source, path)
    height, width = _decided_size(size, fixed, path)
    target = _chosen_output(model, output_name, path)
    sides = (1, height, width, 3) if channels_last else (1, 3, height, width)
    _fix_shapes(model, source.name, sides)
    is_class_map = target.type.tensor_type.elem_type in _INTEGERS
    decided = _scores_before_argmax(model.graph, target.name) if is_class_map else None
    scores, class_axis = (target.name, None) if decided is None else decided
    model = _with_only_outputs(model, [scores])
    try:
        session = _Session(model, scores, channels_last=channels_last)
        found = session.run(torch.zeros(1, 3, height, width))
    except Exception as error:
        # The runtime's exceptions share no base class but Exception.
        raise RequestError(
            f"{path} does not run on a picture of {height}x{width} "
            f"({first_line(error)}); try another --size, often a multiple of 32"
        ) from error
    model = _converted(model, path)
    graph = _graph_of(model, sides, source.type.tensor_type.elem_type, channels_last=channels_last)
    opset = _opset(model)
    if is_class_map and decided is None:
        shape = _one_hot(graph, session, found, (height, width), classes, path)
    else:
        if class_axis is None:
            class_axis = _class_axis(found.shape, classes, channels_last=channels_last)
        shape = _planes(graph, session, found, class_axis)
    check_output(shape, (height, width), classes, "--output-name names another output")
    tail = take_off_tail(graph, opset, shape, (height, width))
    return OwnNetwork(
        session,
        graph,
        tail,
        opset=opset,
        size=(height, width),
        channels=shape[1],
        classes=classes,
        preprocessing=preprocessing,
        align_corners=align_corners,
        reference="the original file",
    )


class _InstanceSession(nn.Module):
    """The file as it came, in ONNX Runtime: normalised image -> raw detections, in their order.

    ``outputs``: of the file, read in that order. ``columns`` (classes, coefficients): they are the
    pair that ``_columns_of`` knows, the rows first; None where they have the names.
    """

    def __init__(
        self,
        session: _Session,
        outputs: Sequence[str],
        columns: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self._session = session
        self._outputs = tuple(outputs)
        self._columns = columns

    def found(self, x: Tensor) -> dict[str, Tensor]:
        """By name."""
        values = [torch.from_numpy(value) for value in self._session.run_all(x, self._outputs)]
        if self._columns is None:
            return dict(zip(self._outputs, values, strict=True))
        rows, prototypes = values
        height, width = x.shape[-2:]
        pixels, scores, coefficients = torch.split(rows.transpose(1, 2), [4, *self._columns], dim=2)
        return {
            "boxes_cxcywh": pixels * pixels.new_tensor([1 / width, 1 / height] * 2),
            "scores": scores,
            "coefficients": coefficients,
            "prototypes": prototypes,
        }

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.float() for tensor in self.found(x).values())


def instances_of_file(
    path: str,
    size: tuple[int, int] | None,
    *,
    classes: tuple[str, ...] | None,
    preprocessing: Preprocessing,
    least_score: float | None = None,
    overlap: float | None = None,
) -> OwnInstanceNetwork:
    """As ``network_of_file``, for a file that finds objects.

    Its outputs have the names that `edgeseg.export.own_instance` gives, others are left out; or
    there are two, (1, 4 + classes + k, N) and (1, k, h, w): centre and size of N boxes in pixels
    above probabilities and coefficients, and the prototypes, as YOLOv8-seg has them.
    ``least_score`` and ``overlap``: see `OwnInstanceNetwork`.
    """
    model = _read(path)
    source = _only_input(model, path)
    channels_last, fixed = _layout(source, path)
    height, width = _decided_size(size, fixed, path)
    sides = (1, height, width, 3) if channels_last else (1, 3, height, width)
    _fix_shapes(model, source.name, sides)
    names = [output.name for output in model.graph.output]
    known = [name for name in RAW_NAMES if name in names]
    if not known and len(names) != 2:
        raise RequestError(_no_instances(path, names))
    outputs = known or names
    try:
        session = _Session(
            _with_only_outputs(model, outputs), outputs[0], channels_last=channels_last
        )
        pictures = probed((height, width))
        values = session.run_all(pictures[0], outputs)
    except Exception as error:
        # The runtime's exceptions share no base class but Exception.
        raise RequestError(
            f"{path} does not run on a picture of {height}x{width} "
            f"({first_line(error)}); try another --size, often a multiple of 32"
        ) from error
    kinds = [value.dtype for value in values]
    columns = None
    if not known:
        if values[0].ndim > values[1].ndim:
            outputs, kinds, values = outputs[::-1], kinds[::-1], values[::-1]
        columns = _columns_of([value.shape for value in values], classes, path, outputs)
    source_network = _InstanceSession(session, outputs, columns)
    found = [source_network.found(x) for x in pictures]
    form = RawForm.of(
        found[0],
        (height, width),
        classes,
        "bring the file's outputs into that form, or export the module itself with --adapter",
    )
    check_pictures(found, (height, width))
    model = _converted(_with_only_outputs(model, outputs), path)
    graph = _graph_of(model, sides, source.type.tensor_type.elem_type, channels_last=channels_last)
    _take_outputs(graph, kinds, columns, (height, width))
    check_static(graph, _opset(model), path)
    return OwnInstanceNetwork(
        source_network,
        graph,
        form,
        opset=_opset(model),
        size=(height, width),
        classes=classes,
        preprocessing=preprocessing,
        reference="the original file",
        least_score=least_score,
        overlap=overlap,
    )


def _read(path: str) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(read_file(path, most=LARGEST))
    except FileNotFoundError as error:
        raise BundleError(f"there is no file {path}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:
        # protobuf's own exception.
        raise BundleError(f"{path} cannot be read as ONNX ({first_line(error)})") from error
    take_weights_in(model, Path(path))
    if not model.graph.node:
        raise BundleError(f"{path} is no ONNX model, or an empty one: it has no nodes")
    if any(entry.key == SPEC_KEY for entry in model.metadata_props):
        raise RequestError(
            f"{path} was exported by EdgeSeg and is a bundle's model already; every command takes "
            "it where it wants a BUNDLE"
        )
    if model.functions:
        model = inliner.inline_local_functions(model)
    foreign = sorted(
        {
            f"{node.domain}.{node.op_type}"
            for node in model.graph.node
            if node.domain not in _STANDARD
        }
    )
    if foreign:
        raise RequestError(
            f"{path} uses operators outside standard ONNX ({', '.join(foreign[:4])}), which "
            "engines on a device don't have; export the model again before any runtime optimises it"
        )
    return model


def _only_input(model: onnx.ModelProto, path: str) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs) or "none"
        raise RequestError(f"{path} is to have one input, a picture, and has {names}")
    kind = inputs[0].type.tensor_type
    if kind.elem_type not in _FLOATS:
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise RequestError(
            f"{path} is to read a normalised picture, float32 or float16, and reads {name}; export "
            "it without its preprocessing, which EdgeSeg puts into the graph itself"
        )
    if not kind.HasField("shape") or len(kind.shape.dim) != 4:
        raise RequestError(
            f"{path} is to read (1, 3, height, width) or (1, height, width, 3), and its input "
            f"{inputs[0].name} has {len(kind.shape.dim)} dimensions"
        )
    source: onnx.ValueInfoProto = inputs[0]
    return source


def _layout(source: onnx.ValueInfoProto, path: str) -> tuple[bool, tuple[int, int]]:
    """Whether channels come last, and the fixed (height, width), 0 where it is free."""
    dims = [dim.dim_value for dim in source.type.tensor_type.shape.dim]
    written = "x".join(str(dim) if dim > 0 else "?" for dim in dims)
    if dims[0] > 1:
        raise RequestError(
            f"{path} takes {dims[0]} pictures at once ({written}), and a live stream has one at a "
            "time; export it with a batch of 1, or a free one"
        )
    if dims[1] == 3 or (dims[1] <= 0 and dims[3] != 3):
        return False, (max(dims[2], 0), max(dims[3], 0))
    if dims[3] == 3:
        return True, (max(dims[1], 0), max(dims[2], 0))
    raise RequestError(
        f"{path} is to read pictures of 3 channels, (1, 3, height, width) or "
        f"(1, height, width, 3), and reads {written}"
    )


def _decided_size(
    asked: tuple[int, int] | None, fixed: tuple[int, int], path: str
) -> tuple[int, int]:
    if asked is None:
        if not all(fixed):
            raise RequestError(f"{path} takes pictures of any size; give --size HxW")
        return fixed
    for side, (wanted, own) in enumerate(zip(asked, fixed, strict=True)):
        if own and own != wanted:
            what = ("height", "width")[side]
            raise RequestError(
                f"{path} was exported for a {what} of {own} only, and {asked[0]}x{asked[1]} came; "
                "leave --size out, or export it again with that size"
            )
    return asked


def _chosen_output(model: onnx.ModelProto, wanted: str | None, path: str) -> onnx.ValueInfoProto:
    outputs: dict[str, onnx.ValueInfoProto] = {output.name: output for output in model.graph.output}
    if wanted is None:
        if len(outputs) == 1:
            return next(iter(outputs.values()))
        raise RequestError(
            f"{path} has the outputs {', '.join(outputs)}; say which are the logits with "
            "--output-name"
        )
    if wanted not in outputs:
        raise RequestError(f"{path} has no output {wanted}; it has {', '.join(outputs)}")
    return outputs[wanted]


def _fix_shapes(model: onnx.ModelProto, name: str, sides: tuple[int, ...]) -> None:
    """Gives the input the shape ``sides``, and forgets every shape that was known inside."""
    for entry in model.graph.input:
        if entry.name == name:
            for dim, side in zip(entry.type.tensor_type.shape.dim, sides, strict=True):
                dim.ClearField("dim_param")
                dim.dim_value = side
    del model.graph.value_info[:]
    # Files from before IR 4 list their weights among the inputs, where they count as variable.
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in weights]
    kept = copy.deepcopy(inputs)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 4)


def _scores_before_argmax(graph: onnx.GraphProto, name: str) -> tuple[str, int] | None:
    """What the argmax that makes the class map ``name`` reads, and over which axis; or None."""
    producers = {output: node for node in graph.node for output in node.output}
    while (node := producers.get(name)) is not None:
        if node.op_type == "ArgMax":
            attributes = {entry.name: entry.i for entry in node.attribute}
            axis = attributes.get("axis", 0)
            if axis in (1, -3):
                return node.input[0], 1
            if axis in (3, -1):
                return node.input[0], 3
            return None
        if node.op_type not in _FORWARDS:
            return None
        name = node.input[0]
    return None


def _with_only_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy that gives the tensors ``names``, in that order, and nothing else."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.output[:]
    for name in names:
        entry = onnx.ValueInfoProto()
        entry.name = name
        for known in model.graph.output:
            if known.name == name:
                entry.type.tensor_type.elem_type = known.type.tensor_type.elem_type
        if not entry.type.tensor_type.elem_type:
            entry.type.tensor_type.elem_type = TensorProto.FLOAT
        cut.graph.output.append(entry)
    remove_unused(cut.graph)
    return cut


def _opset(model: onnx.ModelProto) -> int:
    return max(int(entry.version) for entry in model.opset_import if entry.domain in _STANDARD)


def _converted(model: onnx.ModelProto, path: str) -> onnx.ModelProto:
    """``model`` in the opset of EdgeSeg's own graphs, or in its own if that is newer."""
    opset = _opset(model)
    if opset < OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:
            # The converter raises what its C++ side throws.
            raise RequestError(
                f"{path} is written in opset {opset} and cannot be converted to {OPSET} "
                f"({first_line(error)}); export it again with opset_version={OPSET}"
            ) from error
    # Sizes computed from shapes become constants, which TensorRT and the head's short cut need.
    proto = ir.serde.deserialize_model(model)
    with quiet():
        optimizer.fold_constants(
            proto, onnx_shape_inference=True, input_size_limit=4096, output_size_limit=4096
        )
        optimizer.remove_unused_nodes(proto)
    folded: onnx.ModelProto = ir.serde.serialize_model(proto)
    return folded


def _graph_of(
    model: onnx.ModelProto, sides: tuple[int, ...], elem_type: int, *, channels_last: bool
) -> onnx.GraphProto:
    """The graph with names of its own, reading ``edgeseg.x`` float32 (1, 3, height, width)."""
    graph = compose.add_prefix_graph(model.graph, _PREFIX)
    graph.name = "edgeseg"
    del graph.value_info[:]
    name = graph.input[0].name
    source = _INPUT
    nodes = []
    if channels_last:
        planes = f"{_INPUT}.channels_last"
        nodes.append(
            helper.make_node("Transpose", [source], [planes], "channels_last", perm=[0, 2, 3, 1])
        )
        source = planes
        height, width = sides[1:3]
    else:
        height, width = sides[2:]
    if elem_type == TensorProto.FLOAT16:
        half = f"{_INPUT}.half"
        nodes.append(helper.make_node("Cast", [source], [half], "to_half", to=TensorProto.FLOAT16))
        source = half
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        _rename(node, name, source)
    nodes.extend(graph.node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.input[:]
    graph.input.append(
        helper.make_tensor_value_info(_INPUT, TensorProto.FLOAT, [1, 3, height, width])
    )
    return graph


def _rename(node: onnx.NodeProto, name: str, new: str) -> None:
    """Lets ``node``, and what is inside it, read ``new`` instead of ``name``."""
    for index, read in enumerate(node.input):
        if read == name:
            node.input[index] = new
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            for child in inner.node:
                _rename(child, name, new)


def _class_axis(
    shape: tuple[int, ...], classes: tuple[str, ...] | None, *, channels_last: bool
) -> int:
    """The axis of the classes in scores of ``shape``: by their number, else as the input has it."""
    if len(shape) == 4 and classes is not None:
        fitting = [axis for axis in (1, 3) if shape[axis] == len(classes)]
        if len(classes) == 2 and not fitting:
            fitting = [axis for axis in (1, 3) if shape[axis] == 1]
        if len(fitting) == 1:
            return fitting[0]
    return 3 if channels_last else 1


def _planes(
    graph: onnx.GraphProto, session: _Session, found: np.ndarray[Any, Any], class_axis: int
) -> tuple[int, ...]:
    """Makes the output float32 (1, channels, h, w), here and in ``session``; returns its shape."""
    name = graph.output[0].name
    shape: tuple[int, ...] = found.shape
    if class_axis == 3 and len(shape) == 4:
        session.axes = (0, 3, 1, 2)
        shape = (shape[0], shape[3], shape[1], shape[2])
        last = next(node for node in graph.node if name in node.output)
        perm = [list(entry.ints) for entry in last.attribute if entry.name == "perm"]
        if last.op_type == "Transpose" and perm == [[0, 2, 3, 1]]:
            # It undoes what would be appended.
            name = last.input[0]
        else:
            graph.node.append(
                helper.make_node(
                    "Transpose", [name], ["edgeseg.planes_out"], "to_planes_out", perm=[0, 3, 1, 2]
                )
            )
            name = "edgeseg.planes_out"
    if found.dtype != np.float32:
        graph.node.append(
            helper.make_node(
                "Cast", [name], ["edgeseg.scores"], "scores_to_float", to=TensorProto.FLOAT
            )
        )
        name = "edgeseg.scores"
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    remove_unused(graph)
    return shape


def _one_hot(
    graph: onnx.GraphProto,
    session: _Session,
    found: np.ndarray[Any, Any],
    size: tuple[int, int],
    classes: tuple[str, ...] | None,
    path: str,
) -> tuple[int, ...]:
    """Scores of a class map: 1 where a class is, 0 elsewhere; returns their shape."""
    height, width = size
    if found.size != height * width or not {height, width} <= set(found.shape):
        raise RequestError(
            f"{path} gives a class map {tuple(found.shape)} for a picture of {height}x{width}, and "
            "only one of the picture's size can be taken; name the logits with --output-name"
        )
    if classes is None:
        raise RequestError(
            f"{path} gives a class map and not how many classes there are; give --classes A,B,..."
        )
    if int(found.max()) >= len(classes) or int(found.min()) < 0:
        raise RequestError(
            f"{path} gives class {int(found.max())}, and {len(classes)} names came; "
            "--classes names every class, in order, from 0 on"
        )
    session.classes_of_map = len(classes)
    name = graph.output[0].name
    shape = (1, len(classes), height, width)
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([1, 1, height, width]), "edgeseg.map_shape"),
            numpy_helper.from_array(
                np.arange(len(classes)).reshape(1, -1, 1, 1), "edgeseg.class_numbers"
            ),
        ]
    )
    graph.node.extend(
        [
            helper.make_node(
                "Reshape", [name, "edgeseg.map_shape"], ["edgeseg.map"], "class_map_shape"
            ),
            helper.make_node(
                "Cast", ["edgeseg.map"], ["edgeseg.map_int64"], "map", to=TensorProto.INT64
            ),
            helper.make_node(
                "Equal",
                ["edgeseg.map_int64", "edgeseg.class_numbers"],
                ["edgeseg.is_class"],
                "is_class",
            ),
            helper.make_node(
                "Cast",
                ["edgeseg.is_class"],
                ["edgeseg.scores"],
                "scores_of_map",
                to=TensorProto.FLOAT,
            ),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("edgeseg.scores", TensorProto.FLOAT, None))
    return shape


def _no_instances(path: str, names: Sequence[str]) -> str:
    return (
        f"{path} has the outputs {', '.join(names)}, and an instance model's are boxes or "
        "boxes_cxcywh, scores, and masks or coefficients and prototypes, or they are the pair of "
        "YOLOv8-seg; name them so (output_names of torch.onnx.export), or export the module itself "
        "with --adapter"
    )


def _columns_of(
    shapes: Sequence[tuple[int, ...]],
    classes: tuple[str, ...] | None,
    path: str,
    names: Sequence[str],
) -> tuple[int, int]:
    """(classes, coefficients) of the pair of outputs with ``shapes``; RequestError if it is none.

    One is (1, 4 + classes + k, N), the other (1, k, h, w).
    """
    rows, prototypes = sorted(shapes, key=len)
    if len(rows) != 3 or len(prototypes) != 4:
        raise RequestError(_no_instances(path, names))
    coefficients = prototypes[1]
    found = rows[1] - 4 - coefficients
    if found < 1 or (classes is not None and found != len(classes)):
        wanted = f"{len(classes)} classes" if classes is not None else "the classes"
        raise RequestError(
            f"{path} gives {rows} and {prototypes}, and (1, 4 + classes + k, N) with (1, k, h, w) "
            f"has 4 numbers of a box, {wanted} and {coefficients} coefficients in each column; "
            "--classes names every class, in order, without a background"
        )
    return found, coefficients


def _take_outputs(
    graph: onnx.GraphProto,
    kinds: Sequence[np.dtype[Any]],
    columns: tuple[int, int] | None,
    size: tuple[int, int],
) -> None:
    """Makes the outputs of ``graph`` float32, and of a pair with ``columns`` the four, in place."""
    names = []
    for output, kind in zip(graph.output, kinds, strict=True):
        names.append(output.name)
        if kind != np.float32:
            names[-1] = f"{_RAW}{output.name}"
            graph.node.append(
                helper.make_node(
                    "Cast",
                    [output.name],
                    [names[-1]],
                    f"{output.name}_to_float",
                    to=TensorProto.FLOAT,
                )
            )
    if columns is not None:
        height, width = size
        shares = np.array([1 / width, 1 / height] * 2, np.float32)
        parts = [f"{_RAW}{part}" for part in ("pixels", "scores", "coefficients")]
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.array([4, *columns]), f"{_RAW}columns"),
                numpy_helper.from_array(shares, f"{_RAW}share_of_pixel"),
            ]
        )
        rows = f"{_RAW}rows"
        graph.node.extend(
            [
                helper.make_node("Transpose", [names[0]], [rows], "to_rows", perm=[0, 2, 1]),
                helper.make_node("Split", [rows, f"{_RAW}columns"], parts, "split_rows", axis=2),
                helper.make_node(
                    "Mul", [parts[0], f"{_RAW}share_of_pixel"], [f"{_RAW}shares"], "to_shares"
                ),
            ]
        )
        names = [f"{_RAW}shares", *parts[1:], names[1]]
    del graph.output[:]
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
