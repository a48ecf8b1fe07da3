"""A PyTorch network as one self-describing ONNX graph with the device contract.

``image`` uint8 (1, H, W, 3) BGR in; ``class_map`` uint8 (1, H, W) out, or ``boxes``, ``scores``,
``labels``, ``count`` and ``masks`` of instances; everything between them in the graph. Initializers
keep their state_dict names, so the file is also a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxscript import optimizer
from torch import Tensor, nn

from edgeseg.bundle import GOLDEN_KEY, SHIPPED, SPEC_KEY, WEIGHTS_KEY, Bundle
from edgeseg.engine.onnxruntime import recorded_golden
from edgeseg.errors import BundleError, RequestError, WeightsError
from edgeseg.export.models import InstanceNetwork, SemanticNetwork
from edgeseg.export.own import OwnNetwork
from edgeseg.export.own_instance import OwnInstanceNetwork
from edgeseg.export.views import ViewedNetwork
from edgeseg.golden import AnyGolden
from edgeseg.onnxfile import HEAD
from edgeseg.spec import ModelSpec, Preprocessing

__all__ = ["Export", "export_network", "weights_of_bundle"]

OPSET = 18
IR_VERSION = 8
DOMAIN = "edgeseg"
# Names of everything that is no weight of the network begin with this, so that the rest of the
# initializers is the state_dict.
_OURS = "edgeseg."


@dataclass(frozen=True)
class Export:
    """What ``export_network`` made: the model, and the golden pair recorded in it."""

    model: onnx.ModelProto
    golden: AnyGolden

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to ``path``, whole or not at all."""
        path = Path(path)
        beside = path.with_name(path.name + ".part")
        try:
            beside.write_bytes(self.model.SerializeToString(deterministic=True))
            beside.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise BundleError(f"{path} cannot be written ({error.strerror})") from error


class _LowResolution(nn.Module):
    """The part of a network that is traced: normalised image -> logits before the upsampling."""

    def __init__(self, network: SemanticNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.low_resolution_logits(x)


class _Viewed(ViewedNetwork):
    """The same of a network and its views; ``network`` is the one that has the weights."""

    def __init__(self, viewed: ViewedNetwork, size: tuple[int, int]) -> None:
        assert isinstance(viewed.network, SemanticNetwork)
        super().__init__(viewed.network, viewed.scales, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.low_resolution_logits(x)


class _Raw(nn.Module):
    """The part of an instance network that is traced: normalised image -> what its head reads."""

    def __init__(self, network: InstanceNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.network.raw(x)


def export_network(
    network: SemanticNetwork | InstanceNetwork,
    spec: ModelSpec,
    *,
    half_weights: bool = False,
    source_sha256: str = "",
) -> Export:
    """``network`` (in eval mode) as an ONNX model that keeps ``spec``'s contract.

    ``half_weights`` stores kernels as fp16 with a Cast to fp32 behind each; arithmetic stays fp32.
    ``source_sha256`` identifies the checkpoint in the metadata.

    RequestError when ``spec`` does not suit the network.
    """
    stride = network.stride
    if spec.height % stride or spec.width % stride:
        raise RequestError(
            f"{spec.architecture} takes sizes that are multiples of {stride}, "
            f"and {spec.height}x{spec.width} came"
        )
    if min(spec.height, spec.width) < network.smallest:
        raise RequestError(
            f"{spec.architecture} takes sizes from {network.smallest}x{network.smallest} on, "
            f"and {spec.height}x{spec.width} came"
        )
    opset = OPSET
    if isinstance(network, OwnInstanceNetwork):
        _check_instances(network, spec)
        opset = network.own_opset
        graph = onnx.GraphProto()
        graph.CopyFrom(network.graph)
        image_convolutions = _image_convolutions(graph)
    elif isinstance(network, InstanceNetwork):
        _check_instances(network, spec)
        opset = network.opset
        names = tuple(f"{_OURS}{name}" for name in network.raw_names)
        graph = traced(_Raw(network), (spec.height, spec.width), names, opset=opset)
        image_convolutions = network.image_convolutions
    elif isinstance(network, OwnNetwork):
        opset = network.opset
        graph = onnx.GraphProto()
        graph.CopyFrom(network.graph)
        image_convolutions = _image_convolutions(graph)
    elif isinstance(network, ViewedNetwork):
        size = (spec.height, spec.width)
        graph = traced(_Viewed(network, size), size)
        image_convolutions = network.network.image_convolutions
    else:
        graph = traced(_LowResolution(network), (spec.height, spec.width))
        image_convolutions = network.image_convolutions
    flipped: tuple[str, ...] = ()
    reads_rgb = spec.preprocessing.order == "rgb"
    if reads_rgb:
        flipped = image_convolutions
        _flip_channels(graph, flipped)
    _prepend_image(graph, spec)
    if reads_rgb and not flipped:
        _reorder_channels(graph)
    if half_weights:
        _store_as_half(graph)
    if isinstance(network, InstanceNetwork):
        functions = network.append_head(graph, spec)
    else:
        if isinstance(network, OwnNetwork) and network.is_binary:
            _append_pair(graph, threshold=0.5 if network.tail.ends_in_sigmoid else 0.0)
        functions = [_append_head(graph, spec, align_corners=network.align_corners, opset=opset)]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=opsets,
        ir_version=max(IR_VERSION, helper.find_min_ir_version_for(opsets, ignore_unknown=True)),
        producer_name="edgeseg",
    )
    folded = {"flipped": list(flipped), "sha256": source_sha256}
    golden = recorded_golden(model.SerializeToString(), spec)
    helper.set_model_props(
        model,
        {
            SPEC_KEY: spec.to_json(),
            GOLDEN_KEY: golden.to_json(),
            WEIGHTS_KEY: json.dumps(folded, sort_keys=True),
        },
    )
    onnx.checker.check_model(model, full_check=True)
    return Export(model, golden)


def _check_instances(network: InstanceNetwork, spec: ModelSpec) -> None:
    """RequestError unless ``spec`` promises the instances that ``network`` gives."""
    masks = network.mask_size(spec.height, spec.width)
    promised = (spec.mask_height, spec.mask_width)
    if spec.task != "instance" or promised != masks or spec.mask_extent != network.mask_extent:
        raise RequestError(
            f"{spec.architecture} at {spec.height}x{spec.width} gives instances with masks of "
            f"{masks[0]}x{masks[1]} that span the {network.mask_extent}, and the task "
            f"{spec.task} with masks of {promised[0]}x{promised[1]} that span the "
            f"{spec.mask_extent} came"
        )
    if len(spec.classes) != network.named_classes:
        raise RequestError(
            f"the network tells {network.named_classes} classes and the background apart, "
            f"and {len(spec.classes)} names came"
        )


def traced(
    module: nn.Module,
    size: tuple[int, int],
    outputs: tuple[str, ...] = (f"{_OURS}logits",),
    *,
    opset: int = OPSET,
) -> onnx.GraphProto:
    """``module`` between normalised image, ``edgeseg.x``, and logits, with batch norms still in it.

    ``outputs``: names of what the module returns.

    The network proper is the module's attribute ``network``; its weights keep their names.

    The exporter's own optimiser would fold them into the convolutions, and the weights could no
    longer be trained further; every engine folds them when it opens the file. So only constants
    are folded here.
    """
    example = torch.zeros(1, 3, *size)
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            optimize=False,
            opset_version=opset,
            input_names=["edgeseg.x"],
            output_names=list(outputs),
            verbose=False,
        )
        assert program is not None
        optimizer.fold_constants(program.model, input_size_limit=4096, output_size_limit=4096)
        optimizer.remove_unused_nodes(program.model)
    graph: onnx.GraphProto = program.model_proto.graph
    _write_names(graph)
    _drop_zero_biases(graph)
    return graph


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the exporter and the optimiser tell of themselves from the user's terminal.

    What fails is raised as well. Single loggers will not do: torch sets their levels anew, and
    prints the graphs that it gives up on.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            # torch and onnxscript use what they themselves have deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)


def _write_names(graph: onnx.GraphProto) -> None:
    """State_dict names for the weights, short names of our own for the rest; no tracing notes."""
    prefix = "network."
    # The exporter stores one array once, however many names it has; other names are constants.
    renamed = {}
    for tensor in graph.initializer:
        renamed[tensor.name] = (
            tensor.name.removeprefix(prefix)
            if tensor.name.startswith(prefix)
            else f"{_OURS}{tensor.name}"
        )
        tensor.name = renamed[tensor.name]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    del graph.value_info[:]
    graph.name = "edgeseg"


def _drop_zero_biases(graph: onnx.GraphProto) -> None:
    """Takes away the zero biases that the exporter gives to convolutions without any."""
    zeros = {
        tensor.name
        for tensor in graph.initializer
        if tensor.name.startswith(_OURS) and not numpy_helper.to_array(tensor).any()
    }
    dropped = set()
    for node in graph.node:
        if node.op_type == "Conv" and len(node.input) == 3 and node.input[2] in zeros:
            dropped.add(node.input[2])
            del node.input[2]
    still_used = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name not in dropped or t.name in still_used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _flip_channels(graph: onnx.GraphProto, keys: tuple[str, ...]) -> None:
    """Reverses the input channels of the kernels ``keys``: an RGB network then reads BGR."""
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    for key in keys:
        kernel = numpy_helper.to_array(by_name[key])
        by_name[key].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(kernel[:, ::-1]), key))


def _image_convolutions(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Kernels of the convolutions that read ``edgeseg.x``, if nothing else reads it or them."""
    readers = [node for node in graph.node if f"{_OURS}x" in node.input]
    kernels = tuple(node.input[1] for node in readers if node.op_type == "Conv")
    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 4 and tensor.dims[1] == 3
    }
    uses = [name for node in graph.node for name in node.input]
    has_branches = any(attribute.g.node for node in graph.node for attribute in node.attribute)
    if (
        has_branches
        or len(kernels) != len(readers)
        or any(name not in weights or uses.count(name) != 1 for name in kernels)
    ):
        return ()
    return kernels


def _reorder_channels(graph: onnx.GraphProto) -> None:
    """A Gather from BGR to RGB behind the normalisation, for a network without image kernels."""
    (scale,) = (node for node in graph.node if list(node.output) == [f"{_OURS}x"])
    scale.output[0] = f"{_OURS}x_bgr"
    graph.initializer.append(
        numpy_helper.from_array(np.array([2, 1, 0], dtype=np.int64), f"{_OURS}rgb_order")
    )
    gather = helper.make_node(
        "Gather", [f"{_OURS}x_bgr", f"{_OURS}rgb_order"], [f"{_OURS}x"], "to_rgb", axis=1
    )
    graph.node.insert(list(graph.node).index(scale) + 1, gather)


def _append_pair(graph: onnx.GraphProto, *, threshold: float) -> None:
    """Two classes of a single score s: -(s - ``threshold``) / 2 and (s - ``threshold``) / 2.

    Their softmax is the sigmoid of s, and the second wins where s is above the threshold.
    """
    name = graph.output[0].name
    if threshold:
        graph.initializer.append(
            numpy_helper.from_array(np.array(threshold, np.float32), f"{_OURS}threshold")
        )
        graph.node.append(
            helper.make_node("Sub", [name, f"{_OURS}threshold"], [f"{_OURS}above"], "above")
        )
        name = f"{_OURS}above"
    halves = np.array([-0.5, 0.5], np.float32).reshape(1, 2, 1, 1)
    graph.initializer.append(numpy_helper.from_array(halves, f"{_OURS}halves"))
    graph.node.append(
        helper.make_node("Mul", [name, f"{_OURS}halves"], [f"{_OURS}pair"], "two_classes")
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(f"{_OURS}pair", TensorProto.FLOAT, None))


def _prepend_image(graph: onnx.GraphProto, spec: ModelSpec) -> None:
    """Cast, layout and normalisation before the network; the graph's input becomes ``image``."""
    offset, factor = normalisation(spec.preprocessing)
    graph.initializer.append(
        numpy_helper.from_array(offset.reshape(1, 3, 1, 1), f"{_OURS}mean_255")
    )
    graph.initializer.append(
        numpy_helper.from_array(factor.reshape(1, 3, 1, 1), f"{_OURS}inverse_std_255")
    )
    nodes = [
        helper.make_node("Cast", ["image"], [f"{_OURS}cast"], "cast", to=TensorProto.FLOAT),
        helper.make_node(
            "Transpose", [f"{_OURS}cast"], [f"{_OURS}planes"], "to_planes", perm=[0, 3, 1, 2]
        ),
        helper.make_node(
            "Sub", [f"{_OURS}planes", f"{_OURS}mean_255"], [f"{_OURS}centred"], "centre"
        ),
        helper.make_node(
            "Mul", [f"{_OURS}centred", f"{_OURS}inverse_std_255"], [f"{_OURS}x"], "scale"
        ),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    del graph.input[:]
    graph.input.append(
        helper.make_tensor_value_info("image", TensorProto.UINT8, [1, spec.height, spec.width, 3])
    )


def normalisation(preprocessing: Preprocessing) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(offset, factor), three values each in BGR order: ``(channel - offset) * factor``."""
    mean = np.array(preprocessing.mean, dtype=np.float64)
    std = np.array(preprocessing.std, dtype=np.float64)
    if preprocessing.order == "rgb":
        mean, std = mean[::-1], std[::-1]
    return (mean * 255).astype(np.float32), (1 / (std * 255)).astype(np.float32)


def _store_as_half(graph: onnx.GraphProto) -> None:
    """Kernels as fp16 in the file, and a Cast behind each; vectors keep fp32 (they are small, and
    a running variance may not fit fp16)."""
    casts = []
    renamed = {}
    for tensor in graph.initializer:
        if tensor.name.startswith(_OURS) or len(tensor.dims) < 2:
            continue
        if tensor.data_type != TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            raise WeightsError(f"{tensor.name} has values beyond fp16; export without half weights")
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
        renamed[tensor.name] = f"{tensor.name}.fp32"
        casts.append(
            helper.make_node(
                "Cast",
                [tensor.name],
                [renamed[tensor.name]],
                f"{tensor.name}.cast",
                to=TensorProto.FLOAT,
            )
        )
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *rest])


def _append_head(
    graph: onnx.GraphProto, spec: ModelSpec, *, align_corners: bool, opset: int = OPSET
) -> onnx.FunctionProto:
    """The head's node, Casts to uint8 behind it, the outputs; returns the head's function body.

    TensorRT plugins give no uint8, so the operator gives int32.
    """
    shape = [1, spec.height, spec.width]
    outputs = ["class_map", *(["confidence"] if spec.confidence else [])]
    logits = graph.output[0].name
    graph.node.append(
        helper.make_node(
            HEAD,
            [logits],
            [f"{_OURS}{name}" for name in outputs],
            "head",
            domain=DOMAIN,
            height=spec.height,
            width=spec.width,
            align_corners=int(align_corners),
        )
    )
    del graph.output[:]
    for name in outputs:
        graph.node.append(
            helper.make_node(
                "Cast", [f"{_OURS}{name}"], [name], f"{name}_to_uint8", to=TensorProto.UINT8
            )
        )
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, shape))
    return head_function(confidence=spec.confidence, align_corners=align_corners, opset=opset)


def head_function(
    *, confidence: bool, align_corners: bool, opset: int = OPSET
) -> onnx.FunctionProto:
    """``EdgeSegUpsampleArgmax`` in standard operators.

    ``logits`` float32 (1, classes, h, w) -> ``class_map`` int32 (1, height, width) and, on request,
    ``confidence`` int32 (1, height, width): probability of the winner times 255, rounded. The
    attribute ``align_corners`` speaks to the compiled kernels; this body is written for one value.
    """
    mode = "align_corners" if align_corners else "half_pixel"
    nodes = [
        helper.make_node("Shape", ["logits"], ["outer"], "outer", start=0, end=2),
        *_vector_of("height"),
        *_vector_of("width"),
        helper.make_node("Concat", ["outer", "height", "width"], ["sizes"], "sizes", axis=0),
        helper.make_node(
            "Resize",
            ["logits", "", "", "sizes"],
            ["scores"],
            "upsample",
            mode="linear",
            coordinate_transformation_mode=mode,
        ),
        helper.make_node("ArgMax", ["scores"], ["winner"], "argmax", axis=1, keepdims=0),
        helper.make_node("Cast", ["winner"], ["class_map"], "to_int32", to=TensorProto.INT32),
    ]
    outputs = ["class_map"]
    if confidence:
        outputs.append("confidence")
        nodes += [
            helper.make_node("Softmax", ["scores"], ["probabilities"], "softmax", axis=1),
            helper.make_node("Constant", [], ["axis"], "axis", value_ints=[1]),
            helper.make_node("ReduceMax", ["probabilities", "axis"], ["best"], "best", keepdims=0),
            helper.make_node("Constant", [], ["full"], "full", value_float=255.0),
            helper.make_node("Mul", ["best", "full"], ["scaled"], "scaled"),
            helper.make_node("Round", ["scaled"], ["rounded"], "rounded"),
            helper.make_node(
                "Cast", ["rounded"], ["confidence"], "confidence", to=TensorProto.INT32
            ),
        ]
    return helper.make_function(
        DOMAIN,
        HEAD,
        ["logits"],
        outputs,
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["height", "width", "align_corners"],
    )


def _vector_of(attribute: str) -> list[onnx.NodeProto]:
    """Nodes that make the function's integer ``attribute`` an int64 tensor (1,) of that name."""
    constant = helper.make_node("Constant", [], [f"{attribute}_scalar"], f"{attribute}_scalar")
    reference = onnx.AttributeProto()
    reference.name = "value_int"
    reference.type = onnx.AttributeProto.INT
    reference.ref_attr_name = attribute
    constant.attribute.append(reference)
    shape = helper.make_node("Constant", [], [f"{attribute}_shape"], f"{attribute}_shape")
    shape.attribute.append(helper.make_attribute("value_ints", [1]))
    reshape = helper.make_node(
        "Reshape", [f"{attribute}_scalar", f"{attribute}_shape"], [attribute], attribute
    )
    return [constant, shape, reshape]


def weights_of_bundle(source: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """The state_dict inside a bundle or ONNX file of EdgeSeg's, float32; None if there is none.

    WeightsError when ``source`` exists and is no such thing.
    """
    if not Path(source).exists() and str(source) not in SHIPPED:
        return None
    try:
        bundle = Bundle.open(source)
    except BundleError as error:
        raise WeightsError(f"no weights can be read from {source}: {error}") from error
    if bundle.model.is_quantized():
        raise WeightsError(
            f"{source} is quantized, and integers are no weights to train or export; "
            "take the floating-point bundle or checkpoint that it was made from"
        )
    model = onnx.load_model_from_string(bundle.model.content)
    folded = json.loads(bundle.model.metadata().get(WEIGHTS_KEY, "{}"))
    flipped = set(folded.get("flipped", ()))
    weights = {}
    for tensor in model.graph.initializer:
        if tensor.name.startswith(_OURS):
            continue
        array = numpy_helper.to_array(tensor).astype(np.float32)
        if tensor.name in flipped:
            array = array[:, ::-1]
        weights[tensor.name] = torch.from_numpy(np.ascontiguousarray(array))
    return weights


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hash of a file, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
