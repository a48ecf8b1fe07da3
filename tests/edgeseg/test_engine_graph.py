"""The builder's view of a graph, against ONNX's own shape inference and graphs made by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeseg.bundle import SHIPPED, Bundle
from edgeseg.engine.graph import Graph
from edgeseg.errors import BundleError

if TYPE_CHECKING:
    from tests.conftest import Tiny

onnx = pytest.importorskip("onnx")


def inferred(content: bytes) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Type and shape of every tensor that ONNX can infer wholly."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content), data_prop=True)
    found = {}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        sides = [side.dim_value for side in kind.shape.dim]
        known = kind.HasField("shape")
        if known and all(side.HasField("dim_value") for side in kind.shape.dim):
            found[value.name] = (kind.elem_type, tuple(sides))
    return found


def check(content: bytes) -> Graph:
    """Reads ``content`` and compares all that ONNX knows as well."""
    graph = Graph.read(content)
    compared = 0
    for name, (element_type, shape) in inferred(content).items():
        if name in graph.types:
            assert graph.types[name] == element_type, name
        if name in graph.shapes:
            assert graph.shapes[name] == shape, name
            compared += 1
    assert compared >= len(graph.nodes) // 2
    return graph


def test_the_network_of_a_shipped_instance_model_is_known() -> None:
    bundle = Bundle.open("street-objects")
    content = bundle.model.inlined()
    graph = Graph.read(content)
    known = inferred(content)
    for name, shape in graph.shapes.items():
        if name in known:
            assert shape == known[name][1], name
    for name, element_type in graph.types.items():
        if name in known:
            assert element_type == known[name][0], name
    # The network is known to the last tensor, and what decides on instances as far as it is needed.
    unknown = {output for node in graph.nodes for output in node.outputs} - set(graph.shapes)
    layers = {output for node in graph.nodes if node.op_type == "Conv" for output in node.outputs}
    assert len(layers) > 40 and not layers & unknown
    model = onnx.load_from_string(content)
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert graph.weight_bytes == sum(array.nbytes for array in arrays)
    assert set(graph.precisions().values()) == {"fp32"}


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("streets")])
def test_shipped_models_are_known_to_the_last_tensor(name: str) -> None:
    bundle = Bundle.open(name)
    graph = check(bundle.model.inlined())
    unknown = {output for node in graph.nodes for output in node.outputs} - set(graph.shapes)
    # What Shape gives is followed by its values.
    assert all(tensor.endswith(("outer", "sizes")) for tensor in unknown)
    spec = bundle.spec
    assert graph.inputs == {"image": (1, spec.height, spec.width, 3)}
    assert graph.shapes["class_map"] == (1, spec.height, spec.width)
    model = onnx.load_from_string(bundle.model.inlined())
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert graph.weight_bytes == sum(array.nbytes for array in arrays)
    (wanted,) = set(graph.precisions().values())
    assert wanted == ("int8" if name.endswith("int8") else "fp32")
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert list(graph.precisions()) == convolutions


def test_plugin_nodes(sure_tiny: Tiny) -> None:
    from edgeseg.onnxfile import OnnxFile

    file = OnnxFile(sure_tiny.content())
    graph = Graph.read(file.for_tensorrt(plugins=True))
    assert [(node.name, node.op_type) for node in graph.operators()] == [
        ("head", "EdgeSegUpsampleArgmax")
    ]
    size = (1, sure_tiny.spec.height, sure_tiny.spec.width)
    for name in ("raw_class_map", "raw_confidence"):
        assert (graph.types[name], graph.shapes[name]) == (onnx.TensorProto.FLOAT16, size)
    assert graph.types["confidence"] == onnx.TensorProto.UINT8
    assert Graph.read(file.for_tensorrt(plugins=False)).operators() == ()


def model(nodes: list[Any], shape: list[Any], arrays: dict[str, Any]) -> bytes:
    """A graph from a float32 "x" to "y"."""
    helper = onnx.helper
    proto = onnx.TensorProto
    given = proto.INT64 if nodes[-1].op_type == "ArgMax" else proto.FLOAT
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", proto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", given, None)],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    content: bytes = made.SerializeToString()
    return content


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(op_type, inputs.split(","), [output], output, **attributes)


@pytest.mark.parametrize("side", [1, 7, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda stride: node("Conv", "x,w", "y", strides=[stride, 1], pads=[1, 2, 1, 1]),
        lambda stride: node("Conv", "x,w", "y", strides=[stride] * 2, auto_pad="SAME_UPPER"),
        lambda stride: node("Conv", "x,w", "y", dilations=[stride] * 2, pads=[9, 9, 9, 9]),
        lambda stride: node(
            "ConvTranspose", "x,t", "y", strides=[stride] * 2, pads=[1, 0, 1, 0],
            output_padding=[0, stride - 1], dilations=[1, 2],
        ),
        lambda stride: node("MaxPool", "x", "y", kernel_shape=[3, 2], strides=[stride] * 2,
                            pads=[1, 1, 1, 0], ceil_mode=1),
        lambda stride: node("AveragePool", "x", "y", kernel_shape=[1, 1], strides=[stride] * 2),
        lambda stride: node("Resize", "x,,scales", "y", mode="nearest"),
        lambda stride: node("Resize", "x,,,sizes", "y", mode="linear"),
        lambda stride: node("Transpose", "x", "y", perm=[0, 2, 3, 1]),
        lambda stride: node("Concat", "x,x,x", "y", axis=stride),
        lambda stride: node("ReduceMean", "x,axes", "y", keepdims=stride % 2),
        lambda stride: node("ArgMax", "x", "y", axis=-1, keepdims=0),
        lambda stride: node("Reshape", "x,rows", "y"),
        lambda stride: node("Add", "x,column", "y"),
        lambda stride: node("GlobalAveragePool", "x", "y"),
    ],
)  # fmt: skip
def test_shapes_of_single_operators(make: Any, side: int, stride: int) -> None:
    arrays = {
        "w": np.zeros((5, 3, 3, 2), np.float32),
        "t": np.zeros((3, 4, 3, 2), np.float32),
        "scales": np.asarray([1, 1, 2, 1.5], np.float32),
        "sizes": np.asarray([1, 3, 9, 40], np.int64),
        "axes": np.asarray([-1, 1], np.int64),
        "rows": np.asarray([0, -1, 3], np.int64),
        "column": np.zeros((3, 1, 1), np.float32),
    }
    content = model([make(stride)], [1, 3, side, side + 2], arrays)
    graph = Graph.read(content)
    assert (graph.types["y"], graph.shapes["y"]) == inferred(content)["y"]


def test_open_sizes_and_unknown_operators_are_left_out() -> None:
    content = model([node("Relu", "x", "r"), node("Mystery", "r", "y")], ["n", 3, 4, 4], {})
    graph = Graph.read(content)
    assert graph.inputs == {"x": (-1, 3, 4, 4)}
    assert "y" not in graph.shapes
    assert graph.activation_bytes() == 0


def test_memory_of_a_chain_and_of_a_skip() -> None:
    # x is 1x3x4x4 float32, 192 bytes; each Relu gives as much.
    chain = [node("Relu", "x", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")]
    assert Graph.read(model(chain, [1, 3, 4, 4], {})).activation_bytes() == 2 * 192
    skip = [*chain[:2], node("Add", "b,x", "y")]
    assert Graph.read(model(skip, [1, 3, 4, 4], {})).activation_bytes() == 3 * 192
    # An output that is read on the way stays to the end.
    kept = [node("Relu", "x", "y"), node("Relu", "y", "a"), node("Relu", "a", "b")]
    kept.append(node("Relu", "b", "c"))
    assert Graph.read(model(kept, [1, 3, 4, 4], {})).activation_bytes() == 3 * 192
    constant = onnx.numpy_helper.from_array(np.zeros((100, 100), np.float32))
    ignored = [*chain, onnx.helper.make_node("Constant", [], ["c"], "c", value=constant)]
    assert Graph.read(model(ignored, [1, 3, 4, 4], {})).activation_bytes() == 2 * 192


def quantized(*, data: bool, weights: bool, half: bool) -> Graph:
    nodes = []
    x, w = "x", "w"
    if half:
        nodes += [node("Cast", "x", "half", to=onnx.TensorProto.FLOAT16)]
        x = "half"
    if data:
        nodes += [node("QuantizeLinear", f"{x},s,z", "q"), node("DequantizeLinear", "q,s,z", "dq")]
        x = "dq"
    if weights:
        nodes += [node("DequantizeLinear", "wq,s,z", "wd"), node("Identity", "wd", "wi")]
        w = "wi"
    nodes.append(node("Conv", f"{x},{w}", "y"))
    kind: Any = np.float16 if half else np.float32
    arrays = {
        "s": np.asarray(0.5, kind),
        "z": np.asarray(0, np.int8),
        "w": np.zeros((2, 3, 1, 1), kind),
        "wq": np.zeros((2, 3, 1, 1), np.int8),
    }
    return Graph.read(model(nodes, [1, 3, 4, 4], arrays))


@pytest.mark.parametrize("half", [False, True])
def test_int8_needs_both_sides_quantized(half: bool) -> None:
    plain = "fp16" if half else "fp32"
    for data, weights, wanted in (
        (True, True, "int8"), (True, False, plain), (False, True, plain), (False, False, plain),
    ):  # fmt: skip
        assert quantized(data=data, weights=weights, half=half).precisions() == {"y": wanted}


def test_unnamed_nodes_are_not_asked_for() -> None:
    unnamed = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    graph = Graph.read(model([unnamed], [1, 3, 4, 4], {"w": np.zeros((2, 3, 1, 1), np.float32)}))
    assert graph.precisions() == {}
    assert graph.nodes[0].label == "an unnamed Conv that gives y"


def test_damaged_files(tiny: Tiny) -> None:
    content = tiny.content()
    rng = np.random.default_rng(0)
    for damaged in (b"", b"not onnx", content[: len(content) // 2], content[:-1], content[3:]):
        with pytest.raises(BundleError, match="is not a whole ONNX file"):
            Graph.read(damaged)
    for _ in range(200):
        spoilt = bytearray(content)
        for at in rng.integers(0, len(content), 8):
            spoilt[at] = rng.integers(0, 256)
        try:
            Graph.read(bytes(spoilt)).activation_bytes()
        except BundleError:
            continue


def graph_of(nodes: list[Any], *constants: Any) -> Graph:
    """``nodes`` behind "x", float32 (2, 3), with int64 or float constants."""
    from onnx import TensorProto, helper, numpy_helper

    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])]
    tensors = [numpy_helper.from_array(values, name) for name, values in constants]
    graph = helper.make_graph(nodes, "g", inputs, [], tensors)
    return Graph.read(helper.make_model(graph).SerializeToString())


def test_sizes_that_double_forty_times() -> None:
    nodes = [onnx.helper.make_node("Shape", ["x"], ["s0"])]
    nodes += [
        onnx.helper.make_node("Concat", [f"s{n}", f"s{n}"], [f"s{n + 1}"], axis=0)
        for n in range(40)
    ]
    nodes.append(onnx.helper.make_node("Reshape", ["x", "s3"], ["y"]))
    nodes.append(onnx.helper.make_node("Reshape", ["x", "s40"], ["z"]))
    graph = graph_of(nodes)
    assert graph.shapes["y"] == (2, 3) * 8
    assert "z" not in graph.shapes


def test_axes_that_double_forty_times() -> None:
    from edgeseg.estimate.shapes import read_graph

    nodes = [
        onnx.helper.make_node("Gather", [f"x{n}" if n else "x"] * 2, [f"x{n + 1}"])
        for n in range(40)
    ]
    inputs = [onnx.helper.make_tensor_value_info("x", 1, [1, 1])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, []))
    shapes = read_graph(model.SerializeToString()).shapes
    assert len(shapes["x5"]) == 33 and all(len(shape) <= 64 for shape in shapes.values())
    assert "x40" not in shapes


def test_sides_that_grow_without_end() -> None:
    times = np.array([1 << 31, 1 << 31], np.int64)
    nodes = [
        onnx.helper.make_node("Resize", [f"x{n}" if n else "x", "", "scales"], [f"x{n + 1}"])
        for n in range(9)
    ]
    graph = graph_of(nodes, ("scales", times.astype(np.float32)))
    assert set(graph.shapes) == {"x", "scales"}
    assert graph.activation_bytes() == 2 * 3 * 4


def test_a_tensor_of_a_million_axes() -> None:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[(1 << 62) + 1] * 1_000_000)
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    with pytest.raises(BundleError, match="is not a whole ONNX file"):
        Graph.read(onnx.helper.make_model(graph).SerializeToString())


def test_an_axis_that_is_new_twice() -> None:
    from edgeseg.estimate.shapes import read_graph

    nodes = [onnx.helper.make_node("Unsqueeze", ["x"], ["y"], axes=[0, 0])]
    inputs = [onnx.helper.make_tensor_value_info("x", 1, [2, 3])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, []))
    assert "y" not in read_graph(model.SerializeToString()).shapes
