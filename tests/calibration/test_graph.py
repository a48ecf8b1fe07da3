"""The graph made ready: fewer nodes, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeseg.calibration.graph import Graph, prepared
from edgeseg.errors import CalibrationError

if TYPE_CHECKING:
    from tests.calibration.conftest import Workbench

FLAT = "p = GlobalAveragePool(x); f = Flatten(p)"
SCALE = "k = Values([1, 4, 1, 1], 0.01, 0.02)"

# name -> lines, the operators that are left
SAME: dict[str, tuple[str, str]] = {
    "batch norm behind Conv": ("a = Conv(x, kernel=3); n = Norm(a); y = Relu(n)", "Conv Relu"),
    "without bias": ("a = Conv(x, kernel=3, bias=0); y = Norm(a)", "Conv"),
    "depthwise": ("a = Conv(x, kernel=3, group=4); y = Norm(a)", "Conv"),
    "behind ConvTranspose": (
        "a = Deconv(x, kernel=3, out=6); y = Norm(a, into=6)",
        "ConvTranspose",
    ),
    "ConvTranspose of two groups": (
        "a = Deconv(x, kernel=3, out=6, group=2); y = Norm(a, into=6)",
        "ConvTranspose",
    ),
    "behind Gemm": (
        f"{FLAT}; a = Linear(f, out=3); y = Norm(a, into=3)",
        "GlobalAveragePool Flatten Gemm",
    ),
    "two in a row": ("a = Conv(x); n = Norm(a); y = Norm(n)", "Conv"),
    "before a 1x1 Conv": ("n = Norm(x); y = Conv(n)", "Conv"),
    "before one of two groups": ("n = Norm(x); y = Conv(n, out=6, group=2, bias=0)", "Conv"),
    "before one without padding": ("n = Norm(x); y = Conv(n, kernel=3, pad=0)", "Conv"),
    "before a padded Conv": ("n = Norm(x); y = Conv(n, kernel=3)", "Mul Add Conv"),
    "before two": ("n = Norm(x); y = Conv(n); z = Conv(n)", "Mul Add Conv Conv"),
    "before a Gemm": (
        f"{FLAT}; n = Norm(f); y = Linear(n)",
        "GlobalAveragePool Flatten Mul Add Gemm",
    ),
    "input read twice": ("a = Conv(x); n = Norm(a); y = Mul(a, n)", "Conv Mul Add Mul"),
    "fp16 kernels": ("a = Conv(x, kernel=3, half=1); y = Norm(a)", "Conv"),
    "fp16 kernel with another reader": (
        "a = Conv(x, half=1); y = Norm(a); z = Cast('a.weight', to=11)",
        "Conv Cast",
    ),
    "fp16 kernel for two": (
        "a = Conv(x, half=1); n = Norm(a); y = Conv(n, weight='a.weight.wide', bias=0)",
        "Conv Conv",
    ),
    "pictures scaled": (f"{SCALE}; s = Mul(x, k); y = Conv(s, kernel=3); z = Conv(s)", "Conv Conv"),
    "constant first": (f"{SCALE}; s = Mul(k, x); y = Conv(s, kernel=3, group=2)", "Conv"),
    "by one number": ("k = Node(0.01); s = Mul(x, k); y = Conv(s, group=2)", "Conv"),
    "by (1, 1, 1, 1)": (
        "k = Values([1, 1, 1, 1], 2, 3); s = Mul(x, k); y = Conv(s, group=4)",
        "Conv",
    ),
    "by (channels, 1, 1)": ("k = Values([4, 1, 1], 2, 3); s = Mul(x, k); y = Conv(s)", "Conv"),
    "scaled, another reader": (
        f"{SCALE}; s = Mul(x, k); y = Conv(s); z = Relu(s)",
        "Mul Conv Relu",
    ),
    "scaled for ConvTranspose": (f"{SCALE}; s = Mul(x, k); y = Deconv(s)", "Mul ConvTranspose"),
    "scaled along the width": ("k = Values([8], 1, 2); s = Mul(x, k); y = Conv(s)", "Mul Conv"),
    "scaled at each place": (
        "k = Values([1, 4, 8, 8], 1, 2); s = Mul(x, k); y = Conv(s)",
        "Mul Conv",
    ),
    "product of activations": ("s = Mul(x, x); y = Conv(s)", "Mul Conv"),
    "Constant nodes": (
        "k = Node([1.0, 1.0, 2.0, 2.0]); a = Conv(x); y = Resize(a, '', k, mode='nearest')",
        "Conv Resize",
    ),
    "a scalar Constant": ("k = Node(0.5); a = Conv(x); y = Add(a, k)", "Conv Add"),
    "shared kernel": (
        "a = Conv(x); m = Norm(a); b = Conv(x, weight='a.weight'); n = Norm(b); y = Sub(m, n)",
        "Conv Conv Sub",
    ),
    "kernel read elsewhere": ("a = Conv(x); y = Norm(a); z = Relu('a.weight')", "Conv Relu"),
    "kernel behind Identity": (
        "a = Conv(x); i = Identity('a.weight'); b = Conv(a, weight='i'); y = Norm(b)",
        "Conv Conv",
    ),
}


def kinds(graph: Graph) -> str:
    """The operators behind the two that every net begins with."""
    return " ".join(node.op_type for node in list(graph.nodes)[2:])


def assert_same(bench: Workbench, model: onnx.ModelProto, graph: Graph) -> None:
    onnx.checker.check_model(graph.model, full_check=True)
    for pixels in bench.pictures(2):
        wanted, found = bench.run(model, pixels), bench.run(graph.model, pixels)
        assert wanted.keys() == found.keys()
        for name, values in wanted.items():
            assert np.abs(found[name] - values).max() < 1e-5 * np.abs(values).max(), name


@pytest.mark.parametrize("name", SAME)
def test_prepared_computes_the_same(bench: Workbench, name: str) -> None:
    text, left = SAME[name]
    model = bench.model(text)
    before = model.SerializeToString()
    graph = prepared(model)
    assert kinds(graph) == left
    assert_same(bench, model, graph)
    assert model.SerializeToString() == before
    assert prepared(model).model.SerializeToString() == graph.model.SerializeToString()


@pytest.mark.parametrize(
    ("text", "outputs", "left"),
    [
        ("a = Conv(x); n = Norm(a); y = Relu(n)", ["a"], "Conv Mul Add Relu"),
        ("n = Norm(x); y = Conv(n)", ["n"], "Mul Add Conv"),
        (f"{SCALE}; s = Mul(x, k); y = Conv(s)", ["s"], "Mul Conv"),
        ("k = Node([1.0, 2.0]); y = Conv(x)", ["k"], "Constant Conv"),
    ],
)
def test_outputs_of_the_graph_stay(
    bench: Workbench, text: str, outputs: list[str], left: str
) -> None:
    model = bench.model(text, *outputs)
    graph = prepared(model)
    assert kinds(graph) == left
    assert_same(bench, model, graph)


def test_nodes_without_names_and_with_one_name(bench: Workbench) -> None:
    model = bench.model(
        "a = Conv(x); n = Norm(a); b = Conv(n); c = Conv(b); d = Split(c, num_outputs=2, axis=1)"
    )
    for index, node in enumerate(model.graph.node):
        node.name = "same" if index % 2 else ""
    # An output that is left out has an empty name.
    model.graph.node[-1].output.insert(0, "")
    graph = prepared(model)
    names = [node.name for node in graph.nodes]
    assert all(names) and len(set(names)) == len(names)
    assert [layer.name for layer in graph.layers()] == ["a", "b", "c"]


def test_initializers_that_are_inputs_too(bench: Workbench) -> None:
    model = bench.model("y = Conv(x)")
    model.graph.input.append(helper.make_tensor_value_info("y.weight", 1, [4, 4, 1, 1]))
    graph = prepared(model)
    assert [entry.name for entry in graph.model.graph.input] == ["image"]
    assert_same(bench, model, graph)


# name -> lines, "layer kind axis group bias" of each layer
LAYERS: dict[str, tuple[str, list[str]]] = {
    "Conv": ("y = Conv(x, out=6, group=2)", ["y Conv 0 2 y.bias"]),
    "ConvTranspose": ("y = Deconv(x, out=6, group=2, bias=0)", ["y ConvTranspose 1 2 None"]),
    "Gemm": (f"{FLAT}; y = Linear(f)", ["y Gemm 0 1 y.bias"]),
    "Gemm, weight (in, out)": (f"{FLAT}; y = Linear(f, transB=0)", ["y Gemm 1 1 y.bias"]),
    "Gemm with alpha": (f"{FLAT}; a = Linear(f, alpha=2.0); y = Linear(a)", ["y Gemm 0 1 y.bias"]),
    "Gemm, transposed": (
        f"{FLAT}; a = Linear(f, transA=1, into=1, bias=0); y = Conv(x)",
        ["y Conv 0 1 y.bias"],
    ),
    "Gemm plus activation": (
        f"{FLAT}; w = Values([4, 4], 0, 1); a = Gemm(f, w, f); y = Linear(a)",
        ["y Gemm 0 1 y.bias"],
    ),
    "MatMul": ("w = Values([8, 5], 0, 1); a = Conv(x); y = MatMul(a, w)", ["a Conv 0 1 a.bias"]),
    "Conv with a computed weight": (
        "w = Values([4, 4, 1, 1], 0, 1); v = Relu(w); a = Conv(x, weight='v'); y = Conv(a)",
        ["y Conv 0 1 y.bias"],
    ),
    "Conv of a constant": (
        "c = Values([1, 4, 8, 8], 0, 1); a = Conv(c); y = Conv(x)",
        ["y Conv 0 1 y.bias"],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(bench: Workbench, name: str) -> None:
    text, wanted = LAYERS[name]
    found = bench.graph(text).layers()
    assert [
        f"{layer.name} {layer.kind} {layer.axis} {layer.group} {layer.bias}" for layer in found
    ] == wanted


def quantized(bench: Workbench) -> onnx.ModelProto:
    text = "s = Floats(0.1); q = QuantizeLinear(x, s); d = DequantizeLinear(q, s); y = Conv(d)"
    return bench.model(text)


def with_if(bench: Workbench) -> onnx.ModelProto:
    model = bench.model("y = Conv(x)")
    body = helper.make_graph(
        [helper.make_node("Identity", ["y"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(
        helper.make_node("If", ["yes"], ["z"], "choice", then_branch=body, else_branch=body)
    )
    return model


def fp16(bench: Workbench) -> onnx.ModelProto:
    model = bench.model("a = Conv(x); y = Norm(a)")
    model.graph.node[0].attribute[0].i = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    return model


def older(bench: Workbench) -> onnx.ModelProto:
    model = bench.model("y = Conv(x)")
    model.opset_import[0].version = 12
    return model


REFUSED: list[tuple[Callable[[Workbench], onnx.ModelProto], str]] = [
    (quantized, "the graph is quantized already (it has a QuantizeLinear)"),
    (lambda bench: bench.model("y = Relu(x)"), "the graph has no layer with weights"),
    (lambda bench: bench.model("y = Conv(x, weight='x', bias=0)"), "the graph has no layer"),
    (with_if, "the graph has a If with a graph of its own"),
    (fp16, "a computes in float16"),
    (older, "operator set 13 or newer, and this graph has 12"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refused(
    bench: Workbench, make: Callable[[Workbench], onnx.ModelProto], message: str
) -> None:
    with pytest.raises(CalibrationError) as caught:
        prepared(make(bench))
    assert message in str(caught.value)


def test_put_keeps_shapes(bench: Workbench) -> None:
    graph = bench.graph("y = Conv(x)")
    for values in (np.float32(2), np.zeros((0, 3), np.int64), np.eye(3, dtype=np.int8).T[::-1]):
        graph.put("c", np.asarray(values))
        assert graph.array("c").shape == np.shape(values)
        assert np.array_equal(graph.array("c"), values)


def test_streets(bench: Workbench, streets: onnx.ModelProto, streets_graph: Graph) -> None:
    assert len(streets_graph.layers()) == 56
    left = {node.op_type for node in streets_graph.nodes}
    assert not left & {"BatchNormalization", "Constant"}
    assert sum(node.op_type == "Mul" for node in streets_graph.nodes) == 2
    assert streets_graph.model.metadata_props == streets.metadata_props
    assert streets_graph.model.functions == streets.functions
    pixels = np.random.default_rng(0).integers(0, 256, (384, 480, 3)).astype(np.uint8)
    wanted = bench.run(streets, pixels, "edgeseg.logits")["edgeseg.logits"]
    found = bench.run(streets_graph.model, pixels, "edgeseg.logits")["edgeseg.logits"]
    assert np.abs(found - wanted).max() < 1e-4
