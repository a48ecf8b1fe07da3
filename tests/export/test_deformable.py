"""The deformable convolution against loops in float64, in PyTorch and in each engine's library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from edgeseg.export.models.deformable import DeformableConvolution, deformed_convolution
from edgeseg.export.onnx import traced

Array = NDArray[np.float64]


def slow(
    x: Array, weight: Array, bias: Array, offsets: Array, modulation: Array, stride: int
) -> Array:
    """Sample for sample, tap for tap."""

    def at(plane: Array, row: int, column: int) -> float:
        inside = 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]
        return float(plane[row, column]) if inside else 0.0

    def between(plane: Array, y: float, x_: float) -> float:
        row, column = math.floor(y), math.floor(x_)
        down, right = y - row, x_ - column
        return (
            at(plane, row, column) * (1 - down) * (1 - right)
            + at(plane, row, column + 1) * (1 - down) * right
            + at(plane, row + 1, column) * down * (1 - right)
            + at(plane, row + 1, column + 1) * down * right
        )

    batch, channels = x.shape[:2]
    rows, columns = offsets.shape[2:]
    out = np.zeros((batch, len(weight), rows, columns)) + bias[None, :, None, None]
    for n, row, column, tap in np.ndindex(batch, rows, columns, 9):
        y = row * stride + tap // 3 - 1 + offsets[n, 2 * tap, row, column]
        x_ = column * stride + tap % 3 - 1 + offsets[n, 2 * tap + 1, row, column]
        read = np.array([between(x[n, c], y, x_) for c in range(channels)])
        read = read * modulation[n, tap, row, column]
        out[n, :, row, column] += weight[:, :, tap // 3, tap % 3] @ read
    return out


def arrays(
    batch: int, channels: int, height: int, width: int, stride: int, spread: float
) -> tuple[Array, Array, Array, Array, Array, int]:
    rng = np.random.default_rng(height * 100 + width)
    rows, columns = -(-height // stride), -(-width // stride)
    return (
        rng.standard_normal((batch, channels, height, width)),
        rng.standard_normal((4, channels, 3, 3)),
        rng.standard_normal(4),
        rng.standard_normal((batch, 18, rows, columns)) * spread,
        rng.uniform(0, 1, (batch, 9, rows, columns)),
        stride,
    )


def in_torch(case: tuple[Array, Array, Array, Array, Array, int], kind: torch.dtype) -> Tensor:
    stride = case[5]
    x, weight, bias, offsets, modulation = (torch.from_numpy(value).to(kind) for value in case[:5])
    return deformed_convolution(x, weight, bias, offsets, modulation, stride)


@pytest.mark.parametrize("spread", [0.0, 0.7, 6.0])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (7, 6), (6, 9)])
def test_it_is_that_of_a_loop(size: tuple[int, int], stride: int, spread: float) -> None:
    case = arrays(2, 3, *size, stride, spread)
    wanted = slow(*case)
    np.testing.assert_allclose(in_torch(case, torch.float64).numpy(), wanted, atol=1e-10)
    np.testing.assert_allclose(in_torch(case, torch.float32).numpy(), wanted, atol=2e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_taps_that_stay_are_a_convolution(stride: int) -> None:
    x, weight, bias, offsets, modulation, _ = arrays(2, 3, 8, 7, stride, 0.0)
    found = in_torch((x, weight, bias, offsets, modulation * 0 + 1, stride), torch.float64)
    image, kernel, shift = (torch.from_numpy(value) for value in (x, weight, bias))
    wanted = functional.conv2d(image, kernel, shift, stride=stride, padding=1)
    torch.testing.assert_close(found, wanted)


def test_what_is_read_at_the_edge_fades_and_beyond_it_is_nothing() -> None:
    # One sample of value 1; the middle tap reads beside it.
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    for moved, wanted in [(0.25, 0.75), (-0.25, 0.75), (1.0, 0), (-1.0, 0), (1e30, 0), (-1e30, 0)]:
        for axis in (0, 1):
            offsets = torch.zeros(1, 18, 1, 1)
            offsets[0, 8 + axis] = moved
            found = deformed_convolution(
                torch.ones(1, 1, 1, 1), weight, torch.zeros(1), offsets, torch.ones(1, 9, 1, 1), 1
            )
            assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_everything_has_a_gradient() -> None:
    inputs = [torch.from_numpy(v).requires_grad_() for v in arrays(1, 2, 4, 3, 1, 0.4)[:5]]

    def convolved(x: Tensor, weight: Tensor, bias: Tensor, moved: Tensor, share: Tensor) -> Tensor:
        return deformed_convolution(x, weight, bias, moved, share, 1)

    assert torch.autograd.gradcheck(convolved, inputs)


def test_a_new_layer_is_half_a_convolution() -> None:
    layer = DeformableConvolution(3, 5, 2)
    x = torch.rand(1, 3, 9, 11)
    wanted = functional.conv2d(x, layer.weight, stride=2, padding=1) / 2
    torch.testing.assert_close(layer(x), wanted)
    assert list(layer.state_dict()) == [
        "weight",
        "bias",
        "conv_offset_mask.weight",
        "conv_offset_mask.bias",
    ]


class Traced(nn.Module):
    """What the exporter traces, with the layer where it looks for the network."""

    def __init__(self, layer: DeformableConvolution) -> None:
        super().__init__()
        self.network = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)
        return found


def in_onnxruntime(content: bytes, x: NDArray[np.float32]) -> NDArray[Any]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, {"edgeseg.x": x})[0]
    return found


def in_openvino(content: bytes, x: NDArray[np.float32]) -> NDArray[Any]:
    pytest.importorskip("openvino", reason="openvino is not installed")
    from edgeseg.engine.openvino import shared_core

    options = {"INFERENCE_PRECISION_HINT": "f32"}
    core = shared_core()
    compiled: Any = core.compile_model(core.read_model(content), "CPU", options)
    return np.array(compiled(x)[0])


@pytest.mark.parametrize("run", [in_onnxruntime, in_openvino])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_exported_layer_is_that_of_a_loop(run: Any, stride: int) -> None:
    torch.manual_seed(stride)
    layer = DeformableConvolution(3, 4, stride).eval()
    for values in layer.parameters():
        nn.init.normal_(values)
    # Far enough that some taps leave the picture, on every side.
    x = torch.randn(1, 3, 9, 11)
    with torch.no_grad():
        found = layer.conv_offset_mask(x)
    graph = traced(Traced(layer), (9, 11), opset=19)
    assert [node.op_type for node in graph.node].count("DeformConv") == 1
    assert {tensor.name for tensor in graph.initializer} >= set(layer.state_dict())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    x64, weight, bias, moved, share = (
        value.detach().double().numpy()
        for value in (x, layer.weight, layer.bias, found[:, :18], found[:, 18:].sigmoid())
    )
    wanted = slow(x64, weight, bias, moved, share, stride)
    given = run(model.SerializeToString(), x.numpy())
    np.testing.assert_allclose(given, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        ("wobm", {"pads": [1, 1, 1, 1]}),
        ("wo", {}),
        ("wob", {"pads": [1, 0, 0, 1]}),
        ("wo-m", {}),
        ("wobm", {"pads": [2] * 4, "strides": [2, 2], "dilations": [2, 2], "offset_group": 2}),
        ("wob", {"group": 2, "strides": [2, 1]}),
    ],
)
def test_openvino_reads_every_form_of_it(inputs: str, attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    pads = attributes.get("pads", [0] * 4)
    parts = attributes.get("offset_group", 1)
    rows, columns = (
        (side + pads[axis] + pads[axis + 2] - 2 * dilation - 1) // stride + 1
        for axis, side, stride, dilation in zip(
            (0, 1),
            (9, 11),
            attributes.get("strides", [1, 1]),
            attributes.get("dilations", [1, 1]),
            strict=True,
        )
    )
    shapes = {
        "w": (4, 4 // attributes.get("group", 1), 3, 3),
        "o": (1, 18 * parts, rows, columns),
        "b": (4,),
        "m": (1, 9 * parts, rows, columns),
    }
    names = [name.replace("-", "") for name in inputs]
    graph = helper.make_graph(
        [helper.make_node("DeformConv", ["edgeseg.x", *names], ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info("edgeseg.x", TensorProto.FLOAT, [1, 4, 9, 11])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(rng.standard_normal(shapes[name]).astype(np.float32), name)
            for name in names
            if name
        ],
    )
    opsets = [helper.make_opsetid("", 19)]
    content = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    x = rng.standard_normal((1, 4, 9, 11)).astype(np.float32)
    np.testing.assert_allclose(in_openvino(content, x), in_onnxruntime(content, x), atol=1e-4)
