"""The INT8 graph: its form, its bytes, and its arithmetic on engines that are not ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from edgeseg.bundle import Bundle
from edgeseg.calibration.graph import Graph
from edgeseg.calibration.lint import lint
from edgeseg.calibration.placement import place
from edgeseg.calibration.quantize import Scales, activation_scale, quantize, weight_scale
from edgeseg.calibration.ranges import weight_scales
from edgeseg.engine import available_engines, open_engine
from edgeseg.errors import CalibrationError
from edgeseg.frame import Pixels
from edgeseg.onnxfile import OnnxFile

if TYPE_CHECKING:
    from tests.calibration.conftest import Int8, Workbench

NETS: dict[str, str] = {
    "a chain": "a = Conv(x, kernel=3); r = Relu(a); y = Conv(r, group=4, bias=0)",
    "ConvTranspose": "a = Deconv(x, kernel=3, out=6); y = Conv(a, into=6)",
    "ConvTranspose of two groups": "a = Deconv(x, out=6, group=2); y = Relu(a)",
    "Gemm": "a = Conv(x); p = GlobalAveragePool(a); f = Flatten(p); y = Linear(f, out=3)",
    "Gemm, weight (in, out)": "p = GlobalAveragePool(x); f = Flatten(p); y = Linear(f, transB=0)",
    "MatMul": "w = Values([8, 5], -1, 1); a = Conv(x); m = MatMul(a, w); y = Conv(m)",
    "a residual": "a = Conv(x); r = Relu(a); b = Conv(r); s = Add(b, r); t = Relu(s); y = Conv(t)",
    "a Concat": "a = Conv(x); b = Conv(x); c = Concat(a, b, axis=1); y = Conv(c, into=8)",
    "several outputs": "a = Conv(x); y = Conv(a); z = Conv(a); s = Tanh(a)",
    "constants": "k = Node([1.0, 1.0, 2.0, 2.0]); u = Resize(x, '', k); a = Conv(u); y = Tanh(a)",
    "a head": "a = Conv(x); b = Conv(a); h = Head(b); g = Head(a)",
    "a shared kernel": "a = Conv(x); y = Conv(a, weight='a.weight', bias=0)",
}


@pytest.fixture(params=NETS)
def int8(request: pytest.FixtureRequest, bench: Workbench) -> Int8:
    """One of the nets, quantized."""
    return bench.int8(bench.graph(NETS[request.param]), bench.pictures(2))


def initializers(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def check_form(int8: Int8) -> None:
    """What TensorRT asks of a graph with Q/DQ."""
    onnx.checker.check_model(int8.model, full_check=True)
    arrays = initializers(int8.model)
    nodes = {node.output[0]: node for node in int8.model.graph.node}
    asked = {site.tensor: site.group for site in int8.placement.sites}
    quantizers = [node for node in nodes.values() if node.op_type == "QuantizeLinear"]
    assert sorted(node.input[0] for node in quantizers) == sorted(asked)
    for node in quantizers:
        scale, zero = arrays[node.input[1]], arrays[node.input[2]]
        assert node.input[1] == activation_scale(asked[node.input[0]])
        assert scale.dtype == np.float32 and zero.dtype == np.int8
        assert scale.shape == zero.shape == () and scale > 0 and zero == 0
    dequantizers = [node for node in nodes.values() if node.op_type == "DequantizeLinear"]
    assert len(dequantizers) == len(asked) + len(int8.placement.layers)
    made = {node.name: node for node in nodes.values()}
    for layer in int8.placement.layers:
        activation, weight = (nodes[name] for name in list(made[layer.node].input)[:2])
        assert nodes[activation.input[0]].input[0] == layer.input
        integers, scale, zero = (arrays[name] for name in weight.input)
        assert weight.attribute[0].i == layer.axis
        assert scale.shape == zero.shape == (integers.shape[layer.axis],)
        assert integers.dtype == zero.dtype == np.int8 and not zero.any()
        assert integers.min() >= -127 and weight.input[1] == weight_scale(layer)
        # The bias stays what it was.
        if layer.bias:
            bias = made[layer.node].input[2]
            assert np.array_equal(arrays[bias], int8.graph.array(layer.bias))


def test_form(int8: Int8) -> None:
    check_form(int8)


def test_same_on_the_reference_evaluator(bench: Workbench, int8: Int8) -> None:
    if any(layer.kind == "ConvTranspose" and layer.group > 1 for layer in int8.placement.layers):
        pytest.skip("the reference evaluator has no ConvTranspose of several groups")
    reference = ReferenceEvaluator(int8.model)
    for pixels in bench.pictures(2, seed=1):
        found = bench.run(int8.model, pixels)
        wanted = reference.run(list(found), {"image": pixels[None]})
        for values, expected in zip(found.values(), wanted, strict=True):
            assert np.abs(values - expected).max() <= 1e-5 * np.abs(expected).max()


def test_bytes_and_input(bench: Workbench, int8: Int8) -> None:
    before = int8.graph.model.SerializeToString()
    again = quantize(int8.graph, int8.placement, int8.scales)
    assert again.SerializeToString() == int8.model.SerializeToString()
    assert int8.graph.model.SerializeToString() == before
    pixels = bench.pictures(1)[0]
    one, other = bench.run(again, pixels), bench.run(again, pixels)
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_float_weights(bench: Workbench, int8: Int8, method: str) -> None:
    weights = {
        # Scales that clip, whatever the method finds.
        layer.name: weight_scales(int8.graph.floats(layer.weight), layer.axis, method)
        * np.float32(0.7 if method == "mse" else 1)
        for layer in int8.placement.layers
    }
    scales = replace(int8.scales, weights=weights)
    stored = quantize(int8.graph, int8.placement, scales)
    trained = quantize(int8.graph, int8.placement, scales, float_weights=True)
    onnx.checker.check_model(trained, full_check=True)
    arrays = initializers(trained)
    for layer in int8.placement.layers:
        assert arrays[layer.weight].dtype == np.float32
        if method == "minmax":
            assert np.array_equal(arrays[layer.weight], int8.graph.array(layer.weight))
    for pixels in bench.pictures(2):
        one, other = bench.run(stored, pixels), bench.run(trained, pixels)
        assert all(np.array_equal(one[name], other[name]) for name in one)


def fake_quantized(values: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    return np.clip(np.rint(values / scale), -128, 127) * scale


def convolved(
    x: NDArray[np.float64], weight: NDArray[np.float64], group: int, pad: int
) -> NDArray[np.float64]:
    """A convolution of (channels, height, width), written out."""
    out, into, height, width = weight.shape
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (1, 2))
    groups = [
        np.einsum("cyxhw,ochw->oyx", part, rows)
        for part, rows in zip(
            windows.reshape(group, into, *windows.shape[1:]),
            weight.reshape(group, out // group, into, height, width),
            strict=True,
        )
    ]
    return np.concatenate(groups)


def test_arithmetic(bench: Workbench) -> None:
    graph = bench.graph("a = Conv(x, kernel=3, out=6); r = Relu(a); y = Conv(r, into=6, group=2)")
    frames = bench.pictures(2)
    int8 = bench.int8(graph, frames)
    arrays = {name: values.astype(np.float64) for name, values in initializers(graph.model).items()}
    scales = {name: np.float64(np.float32(s)) for name, s in int8.scales.activations.items()}
    weights = {}
    for name in ("a", "y"):
        steps = int8.scales.weights[name].astype(np.float64).reshape(-1, 1, 1, 1)
        weights[name] = np.rint(arrays[f"{name}.weight"] / steps) * steps
    for pixels in frames:
        x = fake_quantized(pixels.transpose(2, 0, 1).astype(np.float64), scales["cast"])
        a = convolved(x, weights["a"], 1, 1) + arrays["a.bias"][:, None, None]
        r = fake_quantized(np.maximum(a, 0), scales["r"])
        y = convolved(r, weights["y"], 2, 0) + arrays["y.bias"][:, None, None]
        found = bench.run(int8.model, pixels)["y"][0]
        assert np.abs(found - y).max() < 1e-5 * np.abs(y).max()


def test_arithmetic_of_a_grouped_transposed_convolution(bench: Workbench) -> None:
    int8 = bench.int8(bench.graph("y = Deconv(x, out=6, group=2, bias=0)"), bench.pictures(1))
    steps = int8.scales.weights["y"].astype(np.float64)
    assert steps.shape == (3,)
    weight = int8.graph.array("y.weight").astype(np.float64)[:, :, 0, 0]
    weight = np.rint(weight / steps) * steps
    (pixels,) = bench.pictures(1)
    scale = float(np.float32(int8.scales.activations["cast"]))
    x = fake_quantized(pixels.transpose(2, 0, 1).astype(np.float64), scale)
    y = np.concatenate([np.einsum("iyx,io->oyx", x[g : g + 2], weight[g : g + 2]) for g in (0, 2)])
    assert np.abs(bench.run(int8.model, pixels)["y"][0] - y).max() < 1e-5 * np.abs(y).max()


# lines, layers in floating point, node, the tensors that it reads
READS: list[tuple[str, list[str], str, list[str]]] = [
    ("a = Conv(x); b = Conv(a); c = Conv(a)", ["b"], "b", ["a", "b.weight", "b.bias"]),
    (
        "a = Conv(x); b = Conv(a); c = Conv(a)",
        ["b"],
        "c",
        ["a.dequantized", "c.weight.dequantized", "c.bias"],
    ),
    ("w = Values([8, 5], 0, 1); a = Conv(x); m = MatMul(a, w); b = Conv(a)", [], "m", ["a", "w"]),
    ("a = Conv(x); h = Head(a); b = Conv(a)", [], "h", ["a"]),
    ("a = Conv(x); s = Sigmoid(a); b = Conv(a)", [], "s", ["a.dequantized"]),
    (
        "a = Conv(x); b = Conv(a); s = Add(a, b); c = Conv(s)",
        [],
        "s",
        ["a.dequantized", "b"],
    ),
    (
        "k = Node([1.0, 1.0, 2.0, 2.0]); u = Resize(x, '', k); a = Conv(u)",
        [],
        "u",
        ["x.dequantized", "", "k"],
    ),
]


@pytest.mark.parametrize(("text", "floats", "name", "reads"), READS)
def test_who_reads_what(
    bench: Workbench, text: str, floats: list[str], name: str, reads: list[str]
) -> None:
    model = bench.int8(bench.graph(text), bench.pictures(1), floats).model
    onnx.checker.check_model(model, full_check=True)
    (node,) = [node for node in model.graph.node if node.name == name]
    assert list(node.input) == reads


def test_all_in_floating_point(bench: Workbench) -> None:
    graph = bench.graph("a = Conv(x); y = Conv(a)")
    model = quantize(graph, place(graph, floats=["a", "y"]), Scales({}, {}))
    assert model.graph.node == graph.model.graph.node


def test_an_input_that_is_float(bench: Workbench) -> None:
    model = bench.model("y = Conv(x)")
    # From the picture on without Cast and Transpose.
    del model.graph.node[:2]
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", 1, [1, 4, 8, 8]))
    graph = Graph(model)
    weights = {"y": weight_scales(graph.floats("y.weight"), 0)}
    made = quantize(graph, place(graph), Scales({"x": 0.5}, weights))
    onnx.checker.check_model(made, full_check=True)
    assert [node.op_type for node in made.graph.node] == [
        "QuantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "Conv",
    ]


@pytest.mark.parametrize(
    ("activations", "weights", "message"),
    [
        ({"cast": 1.0}, {"a": 4, "y": 2}, "a is to be quantized and has no scale"),
        ({"cast": 1.0, "a": 1.0}, {"a": 4}, r"the scales of y have the shape \(2,\).*none came"),
        ({"cast": 1.0, "a": 1.0}, {"a": 4, "y": 4}, r"along axis 1, and \(4,\) came"),
    ],
)
def test_scales_that_do_not_fit(
    bench: Workbench, activations: dict[str, float], weights: dict[str, int], message: str
) -> None:
    graph = bench.graph("a = Conv(x); y = Deconv(a, group=2)")
    scales = Scales(activations, {k: np.ones(count, np.float32) for k, count in weights.items()})
    with pytest.raises(CalibrationError, match=message):
        quantize(graph, place(graph), scales)


TWICE = "f = Floats([1, 1, 2, 2])"
# Parts of the networks that EdgeSeg exports: the linter has nothing to mend in them.
PARTS: dict[str, str] = {
    "a stem": "a = Conv(x, strides=[2, 2]); r = Relu(a); m = MaxPool(r, kernel_shape=[2, 2]); "
    "b = Conv(r, strides=[1, 1], kernel=2, pad=0); c = Concat(m, b, axis=1); y = Conv(c, into=8)",
    "a residual block": "a = Conv(x); r = Relu(a); b = Conv(r); q = Relu(b); c = Conv(q); "
    "s = Add(c, r); t = Relu(s); y = Conv(t)",
    "one with a shortcut": "a = Conv(x); b = Conv(a, kernel=3); c = Conv(x); s = Add(b, c); "
    "t = Relu(s); y = Conv(t)",
    "global context": "n = Numbers([2, 3]); a = Conv(x); r = Relu(a); p = ReduceMean(r, n); "
    "b = Conv(p); q = Relu(b); s = Add(q, r); y = Conv(s)",
    "upsampling into a Concat": f"{TWICE}; a = Conv(x); r = Relu(a); u = Resize(r, '', f, "
    "mode='linear'); b = Conv(u); c = Concat(u, b, axis=1); y = Conv(c, into=8)",
    "a pyramid": f"{TWICE}; a = Conv(x); b = Conv(a, strides=[2, 2]); l = Conv(a); p = Conv(b); "
    "u = Resize(p, '', f, mode='linear'); t = Add(u, l); y = Conv(t); z = Conv(p)",
    "a Relu behind Resize": f"{TWICE}; a = Conv(x); r = Relu(a); u = Resize(r, '', f, "
    "mode='linear'); v = Relu(u); y = Conv(v)",
}


@pytest.mark.parametrize("name", PARTS)
def test_nothing_to_mend(bench: Workbench, name: str) -> None:
    int8 = bench.int8(bench.graph(PARTS[name]), bench.pictures(1))
    assert [found for found in lint(int8.model).findings if found.avoidable] == []


def test_streets_has_nothing_to_mend(streets_graph: Graph, streets_int8: Int8) -> None:
    names = [layer.name for layer in streets_graph.layers()]
    for floats in ([], *([name] for name in names[3::9]), names[::2]):
        placement = place(streets_graph, floats=floats)
        scales = Scales(
            {group: 0.01 * (index + 1) for index, group in enumerate(placement.groups())},
            streets_int8.scales.weights,
        )
        report = lint(quantize(streets_graph, placement, scales))
        assert [found for found in report.findings if found.avoidable] == [], floats


def test_streets_form(streets_int8: Int8) -> None:
    check_form(streets_int8)
    assert streets_int8.model.functions == streets_int8.graph.model.functions
    assert streets_int8.model.metadata_props == streets_int8.graph.model.metadata_props
    (head,) = [node for node in streets_int8.model.graph.node if node.domain == "edgeseg"]
    assert list(head.input) == ["edgeseg.logits"]
    assert len(streets_int8.model.SerializeToString()) < 4e6


def class_maps(
    model: onnx.ModelProto, engine: str, pictures: Sequence[Pixels]
) -> list[NDArray[np.uint8]]:
    file = OnnxFile(model.SerializeToString(), "streets, quantized")
    opened = open_engine(
        replace(Bundle.open("streets"), model=file), engine, threads=1, check=False
    )
    found = [opened.run(pixels).class_map.copy() for pixels in pictures]
    opened.close()
    return found


def test_streets_on_every_engine(
    bench: Workbench, streets_int8: Int8, street_pictures: list[Pixels]
) -> None:
    engines = [name for name in ("onnxruntime", "openvino") if name in available_engines()]
    pictures = [street_pictures[2], street_pictures[2]]
    found = {name: class_maps(streets_int8.model, name, pictures) for name in engines}
    for name, (one, again) in found.items():
        assert np.array_equal(one, again), name
    if len(found) < 2:
        pytest.skip("OpenVINO and ONNX Runtime are compared")
    # Both round in the same places, but a value between two integers goes either way.
    assert np.mean(found["onnxruntime"][0] == found["openvino"][0]) >= 0.98
