"""The estimate: sizes against ONNX's own, kernels against graphs counted by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeseg.bundle import SHIPPED, Bundle
from edgeseg.cli import main
from edgeseg.errors import BundleError, RequestError
from edgeseg.estimate import DEVICES, Layer, Network, device, devices, estimate
from edgeseg.estimate.published import PUBLISHED
from edgeseg.estimate.roofline import CONSTANTS, SPREAD, LayerCost, layer_time
from edgeseg.estimate.shapes import read_graph
from edgeseg.estimate.speed import interval_factor

onnx = pytest.importorskip("onnx")

SIZE = (1, 16, 8, 8)
PLANE = 16 * 8 * 8


def model(nodes: list[Any], outputs: list[str], weights: Mapping[str, tuple[int, ...]]) -> bytes:
    """A float32 model with the input x of SIZE, and constants that are all ones."""
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, SIZE)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [
            onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
            for name, shape in weights.items()
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    content: bytes = made.SerializeToString()
    return content


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node of space-separated tensor names."""
    return onnx.helper.make_node(kind, inputs.split(), outputs.split(), outputs, **attributes)


def conv(inputs: str, output: str, **attributes: Any) -> Any:
    """A convolution of 3x3 that keeps the size."""
    return node("Conv", inputs, output, kernel_shape=[3, 3], pads=[1, 1, 1, 1], **attributes)


BLOCK = [
    conv("x w1", "a"),
    node("BatchNormalization", "a g g g g", "b"),
    node("Relu", "b", "c"),
    conv("c w2", "d"),
    node("Add", "d x", "e"),
    node("Relu", "e", "y"),
]
BLOCK_WEIGHTS = {"w1": (16, 16, 3, 3), "w2": (16, 16, 3, 3), "g": (16,)}


# --- sizes


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("written_out", [False, True])
def test_sizes_are_those_that_onnx_infers(name: str, written_out: bool) -> None:
    file = Bundle.open(name).model
    content = file.inlined() if written_out else file.content
    graph = read_graph(content)
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(content), data_prop=True)
    compared = 0
    for value in inferred.graph.value_info:
        sides = value.type.tensor_type.shape.dim
        if all(side.HasField("dim_value") for side in sides) and value.name in graph.shapes:
            assert graph.shapes[value.name] == tuple(side.dim_value for side in sides), value.name
            compared += 1
    assert compared > 0.8 * len(graph.nodes)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_size_of_a_shipped_model_is_known(name: str) -> None:
    network = Network.read(Bundle.open(name).model.content)
    assert (network.unknown, network.unsized) == ((), 0)


@pytest.mark.parametrize("name", SHIPPED)
def test_multiply_accumulates_and_cio_are_those_of_the_convolutions(name: str) -> None:
    content = Bundle.open(name).model.content
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(content), data_prop=True)
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in inferred.graph.value_info
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in inferred.graph.initializer}
    macs = elements = 0
    for each in inferred.graph.node:
        if each.op_type == "Conv":
            kernel, output = shapes[each.input[1]], shapes[each.output[0]]
            macs += math.prod(output) * math.prod(kernel[1:])
            elements += math.prod(shapes[each.input[0]]) + math.prod(output)
    network = Network.read(content)
    assert (network.macs, network.io_elements) == (macs, elements)


# --- kernels


def test_a_residual_block_is_two_kernels() -> None:
    network = Network.read(model(BLOCK, ["y"], BLOCK_WEIGHTS))
    first, second = network.layers
    assert first.operators == ("Conv", "BatchNormalization", "Relu")
    assert second.operators == ("Conv", "Add", "Relu")
    kernel = 16 * 16 * 9
    assert (first.read_bytes, first.write_bytes) == (4 * PLANE, 4 * PLANE)
    assert first.weight_bytes == 4 * kernel + 4 * 16
    # The shortcut is read beside the convolution's input.
    assert (second.read_bytes, second.write_bytes) == (8 * PLANE, 4 * PLANE)
    assert first.macs == second.macs == PLANE * 16 * 9
    assert (first.rows, first.columns, first.depth) == (64, 16, 144)
    assert first.io_elements == 2 * PLANE
    # x and the first kernel's result wait for the second, whose own result is beside them.
    assert network.activation_bytes == 3 * 4 * PLANE


def test_a_framework_starts_every_operator() -> None:
    network = Network.read(model(BLOCK, ["y"], BLOCK_WEIGHTS), fused=False)
    assert [layer.operators for layer in network.layers] == [(each.op_type,) for each in BLOCK]
    assert network.macs == 2 * PLANE * 16 * 9
    assert sum(layer.read_bytes for layer in network.layers) == 7 * 4 * PLANE


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
def test_a_wish_for_one_precision_sets_the_bytes(precision: Any, size: int) -> None:
    network = Network.read(model(BLOCK, ["y"], BLOCK_WEIGHTS), precision=precision)
    first = network.layers[0]
    assert first.precision == precision
    assert first.read_bytes == first.write_bytes == size * PLANE
    assert first.weight_bytes >= size * 16 * 16 * 9


def test_quantized_tensors_cross_memory_as_int8() -> None:
    quantized = Network.read(Bundle.open("streets-int8").model.content)
    plain = Network.read(Bundle.open("streets").model.content)
    assert quantized.macs == plain.macs
    int8 = [layer for layer in quantized.layers if layer.precision == "int8"]
    assert len([layer for layer in int8 if layer.macs]) > 40
    assert quantized.moved_bytes < 0.45 * plain.moved_bytes
    assert quantized.weight_bytes < 0.3 * plain.weight_bytes
    assert not any("DequantizeLinear" in layer.operators for layer in quantized.layers)


def test_what_only_one_concat_takes_is_written_in_place() -> None:
    once = [conv("x w1", "a"), conv("x w2", "b"), node("Concat", "a b", "y", axis=1)]
    weights = {"w1": (16, 16, 3, 3), "w2": (8, 16, 3, 3)}
    network = Network.read(model(once, ["y"], weights))
    assert [layer.operators for layer in network.layers] == [("Conv",), ("Conv",)]
    twice = [*once, conv("y w3", "z"), node("Concat", "z b", "out", axis=1)]
    network = Network.read(model(twice, ["out"], weights | {"w3": (16, 24, 3, 3)}))
    copies = [layer for layer in network.layers if layer.operators == ("Concat",)]
    assert [(layer.read_bytes, layer.write_bytes) for layer in copies] == [(4 * 512, 4 * 512)]


def test_attention_multiplies_in_a_kernel_of_its_own() -> None:
    nodes = [
        node("GlobalAveragePool", "x", "p"),
        node("Conv", "p w", "s", kernel_shape=[1, 1]),
        node("Sigmoid", "s", "t"),
        node("Mul", "x t", "y"),
    ]
    network = Network.read(model(nodes, ["y"], {"w": (16, 16, 1, 1)}))
    operators = [layer.operators for layer in network.layers]
    assert operators == [("GlobalAveragePool",), ("Conv", "Sigmoid"), ("Mul",)]


def test_an_unknown_operator_is_counted_by_its_bytes_and_named() -> None:
    nodes = [
        onnx.helper.make_node("Wonder", ["x"], ["a"], "wonder", domain="else.where"),
        node("Relu", "x", "y"),
    ]
    network = Network.read(model(nodes, ["y", "a"], {}))
    assert network.unknown == ("else.where.Wonder",)
    assert network.unsized == 1
    assert network.layers[0].read_bytes == 4 * PLANE


def test_depthwise_and_transposed_convolutions() -> None:
    nodes = [
        conv("x w1", "a", group=16),
        node("ConvTranspose", "a w2", "y", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    network = Network.read(model(nodes, ["y"], {"w1": (16, 1, 3, 3), "w2": (16, 4, 2, 2)}))
    first, second = network.layers
    assert (first.kind, first.macs) == ("depthwise", PLANE * 9)
    assert (second.kind, second.macs) == ("matrix", PLANE * 4 * 4)
    assert second.write_bytes == 4 * 4 * 16 * 16


def test_a_size_that_is_left_open_is_never_negative() -> None:
    nodes = [node("MatMul", "x w", "y"), node("Conv", "y k", "z")]
    tensors = [onnx.helper.make_tensor(name, 1, shape, np.zeros(shape).ravel())
               for name, shape in (("w", (8, 8)), ("k", (4, 4, 1, 1)))]  # fmt: skip
    inputs = [onnx.helper.make_tensor_value_info("x", 1, [1, 4, None, 8])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [], tensors)
    content = onnx.helper.make_model(graph).SerializeToString()
    assert read_graph(content).shapes["z"] == (1, 4, -1, 8)
    network = Network.read(content)
    assert network.macs == 0 and all(layer.bytes >= 0 for layer in network.layers)


def test_a_convolution_with_a_kernel_of_one_axis() -> None:
    tensors = [onnx.helper.make_tensor("k", 1, [3], [1.0, 2.0, 3.0])]
    inputs = [onnx.helper.make_tensor_value_info("x", 1, [1, 4, 8, 8])]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, [1, 3, 8, 8])]
    nodes = [node("ConvTranspose", "x k", "y")]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, tensors)
    with pytest.raises(BundleError, match="is not a whole ONNX file"):
        Network.read(onnx.helper.make_model(graph).SerializeToString())


def test_damaged_bytes() -> None:
    content = Bundle.open("streets").model.content
    with pytest.raises(BundleError, match="not a whole ONNX file"):
        Network.read(content[: len(content) // 2])


# --- time


def matrix(**changes: Any) -> Layer:
    """A large, well aligned convolution in fp16."""
    layer = Layer(
        "conv",
        "matrix",
        "fp16",
        ("Conv",),
        macs=65536 * 256 * 2304,
        rows=65536,
        columns=256,
        depth=2304,
        channels=256,
        read_bytes=2 * 65536 * 256,
        write_bytes=2 * 65536 * 256,
    )
    return replace(layer, **changes)


def test_a_copy_takes_what_the_bandwidth_allows() -> None:
    copy = Layer("copy", "move", "fp32", ("Slice",), read_bytes=1e8, write_bytes=1e8)
    board = device("agx-orin-64gb")
    time = layer_time(copy, board, CONSTANTS)
    expected = 2e8 / (204.8e9 * CONSTANTS.bandwidth) * 1e6
    assert time.bandwidth_us == pytest.approx(expected)
    assert time.total_us == pytest.approx(expected + CONSTANTS.jetson_start_us)
    assert time.limit == "bandwidth"


def test_a_large_product_comes_close_to_the_peak() -> None:
    board = device("agx-orin-64gb")
    cost = LayerCost.of(matrix(), board)
    least = 2e6 * matrix().macs / 42.5e12
    assert least < cost.arithmetic_us < 1.1 * least
    assert layer_time(matrix(), board, CONSTANTS).limit == "arithmetic"
    # Three quarters of the same product on a sixteenth of its rows leave the device part idle.
    small = matrix(rows=256, macs=256 * 256 * 2304)
    assert LayerCost.of(small, board).arithmetic_us > cost.arithmetic_us / 256


@pytest.mark.parametrize(("channels", "padded"), [(64, 64), (65, 72), (33, 40)])
def test_tensor_cores_take_channels_in_eights(channels: int, padded: int) -> None:
    board = device("t4")
    odd = matrix(channels=channels, depth=9 * channels, macs=65536 * 256 * 9 * channels)
    even = matrix(channels=padded, depth=9 * padded, macs=65536 * 256 * 9 * padded)
    costs = [LayerCost.of(layer, board).arithmetic_us for layer in (odd, even)]
    assert costs[0] == pytest.approx(costs[1])


def test_a_narrow_product_wastes_most_of_a_tile() -> None:
    narrow = matrix(columns=8, macs=65536 * 8 * 2304)
    board = device("t4")
    full = LayerCost.of(matrix(), board).arithmetic_us
    assert LayerCost.of(narrow, board).arithmetic_us > 3 * full / 32


@pytest.mark.parametrize(
    ("name", "precision", "tflops", "taken"),
    [
        ("nano", "int8", 0.472, "fp16"),
        ("gtx-1080-ti", "fp16", 11.3, "fp32"),
        ("titan-v", "int8", 110, "fp16"),
        ("t4", "fp32", 8.1, "fp32"),
        ("a40", "fp32", 37.4, "fp32"),
        ("agx-orin-64gb", "int8", 85, "int8"),
    ],
)
def test_what_a_device_cannot_do_it_does_wider(
    name: str, precision: Any, tflops: float, taken: Any
) -> None:
    peak, found = device(name).peak(precision, tensor=True)
    assert peak == pytest.approx(tflops * 1e12)
    assert found == taken


def test_fp32_may_be_rounded_for_tensor_cores() -> None:
    board = device("a40")
    assert board.peak("fp32", tensor=True, tf32=True) == (74.8e12, "fp32")
    assert board.has_tensor_cores("fp32", tf32=True) and not board.has_tensor_cores("fp32")
    assert not device("t4").has_tensor_cores("fp32", tf32=True)
    bundle = Bundle.open("streets")
    board = device("agx-orin-64gb")
    plain, rounded = (estimate(bundle, [board], tf32=tf32).devices[0].ms for tf32 in (False, True))
    assert rounded < plain


# --- devices and intervals


def test_devices_are_named_in_an_error() -> None:
    with pytest.raises(RequestError, match=r"orin-nano-8gb, .*or all, and 'toaster' came"):
        device("toaster")
    assert {entry.kind for entry in devices("all")} == {"jetson"}
    assert devices("t4") == (DEVICES["t4"],)


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_sound_figures(name: str) -> None:
    board = DEVICES[name]
    assert board.name == name and board.source and board.title
    assert 0 < board.fp32_tflops <= (board.fp16_tflops or math.inf)
    if board.tensor_fp16_tflops is not None:
        assert board.tensor_fp16_tflops > board.fp32_tflops
    assert 20 < board.bandwidth_gbs < 1000


def test_doubt_about_peaks_widens_the_interval() -> None:
    sure = device("agx-xavier")
    assert interval_factor(sure) == pytest.approx(math.exp(SPREAD))
    assert interval_factor(device("orin-nano-8gb")) > interval_factor(sure)


def test_published_speeds_name_devices_that_there_are() -> None:
    assert len(PUBLISHED) == len(set(PUBLISHED)) >= 60
    for point in PUBLISHED:
        assert point.device in DEVICES and point.fps > 0 and point.source


# --- the whole


def test_better_boards_are_faster() -> None:
    names = ("nano", "orin-nano-8gb", "orin-nano-8gb-super", "agx-orin-64gb")
    found = estimate(Bundle.open("streets"), [device(name) for name in names])
    middles = [entry.ms for entry in found.devices]
    assert middles == sorted(middles, reverse=True)
    for entry in found.devices:
        assert entry.low_ms < entry.ms < entry.high_ms
        assert sum(entry.shares().values()) == pytest.approx(1)
        assert entry.ms == pytest.approx(sum(each.time.total_us for each in entry.layers) / 1e3)
        slowest = [each.time.total_us for each in entry.slowest(5)]
        assert slowest == sorted(slowest, reverse=True)


def test_int8_is_faster_than_the_same_model_in_fp32() -> None:
    board = [device("orin-nano-8gb")]
    plain, quantized = (
        estimate(Bundle.open(name), board).devices[0].ms for name in ("streets", "streets-int8")
    )
    assert quantized < plain
    half = estimate(Bundle.open("streets"), board, precision="fp16").devices[0].ms
    assert quantized < half < plain


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, page = tmp_path / "found.json", tmp_path / "page.html"
    arguments = ["estimate", "streets-int8", "--device", "orin-nano-8gb"]
    assert main([*arguments, "--json", str(target), "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "Jetson Orin Nano 8 GB" in shown and "An estimate, not a measurement" in shown
    found = json.loads(target.read_text(encoding="utf-8"))
    (entry,) = found["devices"]
    assert entry["fps_low"] < entry["fps"] < entry["fps_high"]
    assert found["macs"] > 1e9 and found["cio_elements"] > 1e6
    assert entry["ms"] == pytest.approx(sum(each["ms"] for each in entry["layers"]), rel=1e-3)
    assert set(entry["limit_shares"]) == {"arithmetic", "bandwidth", "start"}
    assert "Jetson Orin Nano 8 GB" in page.read_text(encoding="utf-8")


def test_command_line_refuses_an_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "streets", "--device", "toaster"]) == 2
    message = capsys.readouterr().err
    assert "toaster" in message and "agx-orin-64gb" in message


def test_all_jetsons_are_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "street-objects", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["device"] for entry in found["devices"]] == [
        entry.name for entry in devices("all")
    ]
