"""ONNX graphs run and trained in torch, against onnxruntime and gradients worked out by hand."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch.nn import functional

from edgeseg.bundle import Bundle
from edgeseg.errors import RequestError, WeightsError
from edgeseg.export.torchgraph import OPERATORS, TorchGraph, fake_quantize
from edgeseg.synthetic import Street

Arrays = dict[str, NDArray[Any]]

INT8 = np.int8(0)


def node(kind: str, inputs: str, output: str = "y", **attributes: Any) -> NodeProto:
    """A node; names are separated by spaces, and "-" is an input that is left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    outputs = output.split()
    return helper.make_node(kind, names, outputs, f"{kind}_{outputs[0]}", **attributes)


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    made = np.random.default_rng([seed, *shape]).standard_normal(shape) * scale
    return made.astype(np.float32)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def model_of(
    nodes: Sequence[NodeProto],
    constants: Arrays,
    x: NDArray[Any],
    outputs: Sequence[str] = ("y",),
    *,
    name: str = "x",
    opset: int = 18,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "of a test",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim
            )
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def by_onnxruntime(model: onnx.ModelProto, x: NDArray[Any], name: str = "x") -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Each node as it stands: the optimiser's integer kernels round elsewhere.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(array) for array in session.run(None, {name: x})]


def pads(*values: int, **others: Any) -> dict[str, Any]:
    return {"pads": list(values), **others}


IMAGE = (2, 4, 9, 11)
KERNEL = noise(6, 4, 3, 3)
BIAS = noise(6)
THIRD = {"s": np.array([1, 1, 3, 3], np.float32)}
UNEVEN = {"s": np.array([1, 1, 1.7, 0.6], np.float32)}
SIZES = {"s": ints(2, 4, 14, 7)}

#: nodes that make y from x, the constants they read, and the shape of x
CASES: dict[str, tuple[list[NodeProto], Arrays, tuple[int, ...]]] = {
    "conv": ([node("Conv", "x w b")], {"w": KERNEL, "b": BIAS}, IMAGE),
    "conv without bias": (
        [node("Conv", "x w", **pads(1, 1, 1, 1, strides=[2, 1]))],
        {"w": KERNEL},
        IMAGE,
    ),
    "conv with uneven pads": (
        [node("Conv", "x w b", **pads(0, 2, 1, 1, dilations=[1, 2]))],
        {"w": KERNEL, "b": BIAS},
        IMAGE,
    ),
    "conv in groups": (
        [node("Conv", "x w b", **pads(1, 1, 1, 1, group=2))],
        {"w": noise(6, 2, 3, 3), "b": BIAS},
        IMAGE,
    ),
    "depthwise conv": (
        [node("Conv", "x w", **pads(1, 1, 1, 1, group=4))],
        {"w": noise(4, 1, 3, 3)},
        IMAGE,
    ),
    "conv same upper": (
        [node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 3])],
        {"w": noise(6, 4, 4, 3)},
        IMAGE,
    ),
    "conv same lower": (
        [node("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 2])],
        {"w": noise(6, 4, 2, 3)},
        IMAGE,
    ),
    "conv 1d": ([node("Conv", "x w b")], {"w": noise(6, 4, 3), "b": BIAS}, (2, 4, 9)),
    "transposed conv": (
        [node("ConvTranspose", "x w b", **pads(1, 1, 1, 1, strides=[2, 2]))],
        {"w": noise(4, 6, 3, 3), "b": BIAS},
        IMAGE,
    ),
    "transposed conv with uneven pads": (
        [
            node(
                "ConvTranspose",
                "x w",
                **pads(0, 1, 1, 2, strides=[2, 3], output_padding=[1, 0], group=2),
            )
        ],
        {"w": noise(4, 3, 3, 3)},
        IMAGE,
    ),
    "batch norm": (
        [node("BatchNormalization", "x g b m v", epsilon=0.01)],
        {"g": noise(4), "b": noise(4, seed=1), "m": noise(4, seed=2), "v": noise(4, seed=3) ** 2},
        IMAGE,
    ),
    "relu": ([node("Relu", "x")], {}, IMAGE),
    "leaky relu": ([node("LeakyRelu", "x", alpha=0.2)], {}, IMAGE),
    "clip": ([node("Clip", "x a b")], {"a": np.float32(-0.5), "b": np.float32(0.7)}, IMAGE),
    "clip above": ([node("Clip", "x - b")], {"b": np.float32(0.7)}, IMAGE),
    "sigmoid": ([node("Sigmoid", "x")], {}, IMAGE),
    "hard sigmoid": ([node("HardSigmoid", "x", alpha=0.3, beta=0.4)], {}, IMAGE),
    "hard sigmoid as it is": ([node("HardSigmoid", "x")], {}, IMAGE),
    "hard swish": ([node("HardSwish", "x")], {}, IMAGE),
    "tanh": ([node("Tanh", "x")], {}, IMAGE),
    "softmax": ([node("Softmax", "x", axis=1)], {}, IMAGE),
    "softmax of the last": ([node("Softmax", "x")], {}, IMAGE),
    "add, sub, mul, div": (
        [
            node("Add", "x a", "p"),
            node("Sub", "p b", "q"),
            node("Mul", "q c", "r"),
            node("Div", "r a"),
        ],
        {"a": np.float32(3), "b": noise(4, 1, 1), "c": noise(1, 4, 1, 1)},
        IMAGE,
    ),
    "max pool": (
        [node("MaxPool", "x", kernel_shape=[3, 3], **pads(1, 1, 1, 1, strides=[2, 2]))],
        {},
        IMAGE,
    ),
    "max pool with uneven pads": (
        [node("MaxPool", "x", kernel_shape=[2, 3], **pads(0, 1, 1, 2, strides=[2, 2]))],
        {},
        IMAGE,
    ),
    "max pool rounded up": (
        [node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)],
        {},
        IMAGE,
    ),
    "max pool dilated": (
        [node("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 2])],
        {},
        IMAGE,
    ),
    "average pool": (
        [node("AveragePool", "x", kernel_shape=[3, 3], **pads(1, 1, 1, 1, strides=[2, 2]))],
        {},
        IMAGE,
    ),
    "average pool with its padding": (
        [
            node(
                "AveragePool",
                "x",
                kernel_shape=[3, 3],
                count_include_pad=1,
                **pads(1, 1, 1, 1, strides=[2, 2]),
            )
        ],
        {},
        IMAGE,
    ),
    "average pool with uneven pads": (
        [node("AveragePool", "x", kernel_shape=[3, 2], **pads(1, 0, 2, 1, strides=[2, 2]))],
        {},
        IMAGE,
    ),
    "average pool with its uneven padding": (
        [
            node(
                "AveragePool",
                "x",
                kernel_shape=[3, 2],
                count_include_pad=1,
                **pads(1, 0, 2, 1, strides=[2, 2]),
            )
        ],
        {},
        IMAGE,
    ),
    "global average pool": ([node("GlobalAveragePool", "x")], {}, IMAGE),
    "mean over an input": (
        [node("ReduceMean", "x a", keepdims=0)],
        {"a": ints(2, -1)},
        IMAGE,
    ),
    "mean over all": ([node("ReduceMean", "x")], {}, IMAGE),
    "mean over nothing": ([node("ReduceMean", "x", noop_with_empty_axes=1)], {}, IMAGE),
    "concat": (
        [node("Relu", "x", "r"), node("Concat", "x r c", axis=-3)],
        {"c": noise(2, 1, 9, 11)},
        IMAGE,
    ),
    "gemm": (
        [node("Gemm", "x w b", transB=1)],
        {"w": noise(5, 7), "b": noise(5)},
        (3, 7),
    ),
    "gemm with everything": (
        [node("Gemm", "x w b", transA=1, alpha=0.5, beta=2.0)],
        {"w": noise(3, 5), "b": noise(7, 1)},
        (3, 7),
    ),
    "gemm without bias": ([node("Gemm", "x w")], {"w": noise(7, 5)}, (3, 7)),
    "matmul": ([node("MatMul", "x w")], {"w": noise(7, 5)}, (2, 3, 7)),
    "matmul from the left": ([node("MatMul", "w x")], {"w": noise(5, 3)}, (2, 3, 7)),
    "reshape": ([node("Reshape", "x s")], {"s": ints(0, -1, 11)}, IMAGE),
    "flatten": ([node("Flatten", "x")], {}, IMAGE),
    "flatten from behind": ([node("Flatten", "x", axis=-1)], {}, IMAGE),
    "identity": ([node("Identity", "x")], {}, IMAGE),
    "transpose": ([node("Transpose", "x", perm=[0, 2, 3, 1])], {}, IMAGE),
    "transpose all": ([node("Transpose", "x")], {}, IMAGE),
    "constants": (
        [
            node("Constant", "", "a", value_floats=[1.0, 2.0, 3.0]),
            node("Constant", "", "b", value_float=0.5),
            node("Constant", "", "c", value=numpy_helper.from_array(noise(3))),
            node("Constant", "", "s", value_ints=[-1, 3]),
            node("Reshape", "x s", "r"),
            node("Mul", "r a", "p"),
            node("Add", "p b", "q"),
            node("Sub", "q c"),
        ],
        {},
        (2, 6),
    ),
    "casts": (
        [node("Cast", "x", "i", to=TensorProto.INT32), node("Cast", "i", to=TensorProto.FLOAT)],
        {},
        IMAGE,
    ),
    "slice": (
        [node("Slice", "x b e a s")],
        {"b": ints(1, -1), "e": ints(-1, -100), "a": ints(2, 3), "s": ints(2, -3)},
        IMAGE,
    ),
    "slice from the front": ([node("Slice", "x b e")], {"b": ints(0, 1), "e": ints(2, 3)}, IMAGE),
    "split": (
        [node("Split", "x s", "a b", axis=1), node("Concat", "b a", axis=1)],
        {"s": ints(1, 3)},
        IMAGE,
    ),
    "split evenly": (
        [node("Split", "x", "a b c", axis=3, num_outputs=3), node("Concat", "c a b", axis=3)],
        {},
        IMAGE,
    ),
    "squeeze and unsqueeze": (
        [
            node("ReduceMean", "x a", "m"),
            node("Squeeze", "m a", "t"),
            node("Unsqueeze", "t b"),
        ],
        {"a": ints(2), "b": ints(0, -1)},
        IMAGE,
    ),
    "pad": (
        [node("Pad", "x p v")],
        {"p": ints(0, 1, 2, 0, 0, 0, 1, 3), "v": np.float32(1.5)},
        IMAGE,
    ),
    "pad two axes": ([node("Pad", "x p - a")], {"p": ints(1, 2, 3, 0), "a": ints(3, 2)}, IMAGE),
    "pad by reflection": (
        [node("Pad", "x p", mode="reflect")],
        {"p": ints(0, 0, 2, 1, 0, 0, 3, 0)},
        IMAGE,
    ),
    "pad by the edge": (
        [node("Pad", "x p", mode="edge")],
        {"p": ints(0, 0, 2, 1, 0, 0, 3, 0)},
        IMAGE,
    ),
    "resize to the size of another": (
        [
            node("MaxPool", "x", "m", kernel_shape=[2, 2], strides=[2, 2]),
            node("Shape", "x", "h", start=2),
            node("Shape", "m", "n"),
            node("Gather", "n i", "o"),
            node("Div", "h d", "half"),
            node("Mul", "half d", "whole"),
            node("Concat", "o whole", "s", axis=0),
            node("Resize", "m - - s", mode="linear"),
        ],
        {"i": ints(0, -3), "d": ints(2)},
        IMAGE,
    ),
    "gather": ([node("Gather", "x i", axis=2)], {"i": ints(3, -1).reshape(1, 2)}, IMAGE),
    "nearest, whole": (
        [
            node(
                "Resize", "x - s", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
            )
        ],
        THIRD,
        IMAGE,
    ),
    "nearest on two axes": (
        [node("Resize", "x - s", axes=[3, 2])],
        {"s": np.array([2, 3], np.float32)},
        IMAGE,
    ),
    "linear, whole": ([node("Resize", "x - s", mode="linear")], THIRD, IMAGE),
    "linear by scales": ([node("Resize", "x - s", mode="linear")], UNEVEN, IMAGE),
    "linear by sizes": ([node("Resize", "x - - s", mode="linear")], SIZES, IMAGE),
    "linear, pytorch's": (
        [
            node(
                "Resize",
                "x - - s",
                mode="linear",
                coordinate_transformation_mode="pytorch_half_pixel",
            )
        ],
        SIZES,
        IMAGE,
    ),
    "linear, corners": (
        [node("Resize", "x - - s", mode="linear", coordinate_transformation_mode="align_corners")],
        SIZES,
        IMAGE,
    ),
    **{
        f"nearest, {convention}, {rounding}": (
            [
                node(
                    "Resize",
                    "x - s",
                    coordinate_transformation_mode=convention,
                    nearest_mode=rounding,
                )
            ],
            UNEVEN,
            IMAGE,
        )
        for convention in ("half_pixel", "asymmetric", "pytorch_half_pixel", "align_corners")
        for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    },
    "integers as weights": (
        [node("DequantizeLinear", "w s z", "v", axis=0), node("Conv", "x v")],
        {
            "w": np.random.default_rng(0).integers(-128, 128, KERNEL.shape).astype(np.int8),
            "s": np.linspace(0.01, 0.05, 6, dtype=np.float32),
            "z": np.zeros(6, np.int8),
        },
        IMAGE,
    ),
    "integers as biases": (
        [node("DequantizeLinear", "b s", "v"), node("Conv", "x w v")],
        {"w": KERNEL, "b": np.arange(6, dtype=np.int32) * 1000, "s": np.float32(0.002)},
        IMAGE,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_computes_what_onnxruntime_does(case: str) -> None:
    nodes, constants, shape = CASES[case]
    x = noise(*shape, seed=7, scale=2)
    model = model_of(nodes, constants, x)
    (wanted,) = by_onnxruntime(model, x)
    found = TorchGraph(model, inputs=["x"], outputs=["y"])(torch.from_numpy(x))["y"]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_every_operator_is_in_a_case() -> None:
    tried = {made.op_type for nodes, _, _ in CASES.values() for made in nodes}
    assert tried == OPERATORS.keys()


def test_the_mean_of_older_opsets() -> None:
    x = noise(*IMAGE)
    model = model_of([node("ReduceMean", "x", axes=[1], keepdims=0)], {}, x, opset=13)
    found = TorchGraph(model, inputs=["x"], outputs=["y"])(torch.from_numpy(x))["y"]
    np.testing.assert_allclose(found.numpy(), x.mean(1), rtol=1e-5, atol=1e-6)


def small_network(*, half: bool = False) -> tuple[list[NodeProto], Arrays]:
    """image -> logits of 5 classes at a quarter of the size, with everything that makes a batch
    difficult: shapes and sizes written for one picture."""
    nodes = [
        node("Cast", "image", "f", to=TensorProto.FLOAT),
        node("Transpose", "f", "p", perm=[0, 3, 1, 2]),
        node("Mul", "p factor", "n"),
        node("Conv", "n a.weight a.bias", "c", **pads(1, 1, 1, 1, strides=[2, 2])),
        node("Relu", "c", "r"),
        node("Conv", "r b.weight", "d", **pads(1, 1, 1, 1, group=8)),
        node("MaxPool", "d", "m", kernel_shape=[2, 2], strides=[2, 2]),
        node("ReduceMean", "m axes", "g"),
        node("Reshape", "g flat", "h"),
        node("Gemm", "h gate.weight gate.bias", "k", transB=1),
        node("Sigmoid", "k", "u"),
        node("Reshape", "u square", "v"),
        node("Mul", "m v", "w"),
        node("Resize", "w - - half", "o", mode="linear"),
        node("Resize", "o - - quarter", "z", mode="linear"),
        node("ConvTranspose", "z up.weight", "t", strides=[1, 1]),
        node("Add", "t t", "logits"),
        helper.make_node(
            "EdgeSegUpsampleArgmax", ["logits"], ["class_map"], "head", domain="edgeseg"
        ),
    ]
    constants: Arrays = {
        "factor": np.full((1, 3, 1, 1), 1 / 64, np.float32),
        "a.weight": noise(8, 3, 3, 3, scale=0.3),
        "a.bias": noise(8, scale=0.1),
        "b.weight": noise(8, 1, 3, 3, scale=0.3),
        "axes": ints(2, 3),
        "flat": ints(1, 8),
        "gate.weight": noise(8, 8, scale=0.3),
        "gate.bias": noise(8),
        "square": ints(1, 8, 1, 1),
        "half": ints(1, 8, 8, 12),
        "quarter": ints(1, 8, 4, 6),
        "up.weight": noise(8, 5, 1, 1),
    }
    if half:
        for name in ("a.weight", "up.weight"):
            constants[name] = constants[name].astype(np.float16)
            nodes.insert(0, node("Cast", name, f"{name}.fp32", to=TensorProto.FLOAT))
        nodes = [
            renamed(made, {name: f"{name}.fp32" for name in ("a.weight", "up.weight")})
            for made in nodes
        ]
    return nodes, constants


def renamed(made: NodeProto, names: dict[str, str]) -> NodeProto:
    """``made`` with inputs called otherwise; Casts stay."""
    if made.op_type != "Cast":
        for index, name in enumerate(made.input):
            made.input[index] = names.get(name, name)
    return made


def pictures(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 16, 24, 3)).astype(np.uint8)


def small_model(**options: Any) -> onnx.ModelProto:
    return model_of(*small_network(**options), pictures(1), ["class_map"], name="image")


def one_by_one(
    model: onnx.ModelProto, images: NDArray[np.uint8], output: str
) -> NDArray[np.float32]:
    """``output`` for each picture alone, by onnxruntime, without the head."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    kept = list(itertools.takewhile(lambda made: made.domain != "edgeseg", cut.graph.node))
    del cut.graph.node[:], cut.graph.output[:]
    cut.graph.node.extend(kept)
    cut.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return np.concatenate([by_onnxruntime(cut, image[None], "image")[0] for image in images])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_gives_what_each_picture_gives(count: int, half: bool) -> None:
    model = small_model(half=half)
    images = pictures(count)
    found = TorchGraph(model)(torch.from_numpy(images))
    assert found.keys() == {"logits"}
    wanted = one_by_one(model, images, "logits")
    np.testing.assert_allclose(found["logits"].detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_weights_are_parameters_and_the_rest_is_not() -> None:
    graph = TorchGraph(small_model(half=True))
    layers = {"a.weight", "a.bias", "b.weight", "gate.weight", "gate.bias", "up.weight"}
    assert graph.weights.keys() == layers
    assert len(list(graph.parameters())) == len(layers)
    assert all(weight.dtype == torch.float32 for weight in graph.weights.values())
    assert not graph.scales
    graph(torch.from_numpy(pictures(2)))["logits"].square().mean().backward()
    assert all(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in graph.weights.values()
    )


def test_a_part_of_the_graph() -> None:
    model = small_model()
    images = torch.from_numpy(pictures(2))
    whole = TorchGraph(model, outputs=["r", "m"])(images)
    assert list(whole) == ["r", "m"]
    block = TorchGraph(model, inputs=["r"], outputs=["m"])
    assert block.weights.keys() == {"b.weight"}
    assert torch.equal(block(whole["r"])["m"], whole["m"])
    # What is not needed is not looked at: the head is no operator of ours.
    with pytest.raises(RequestError, match="EdgeSegUpsampleArgmax head is an operator that cannot"):
        TorchGraph(model, outputs=["class_map"])


def test_a_copy_is_trained_alone() -> None:
    graph = TorchGraph(small_model())
    other = copy.deepcopy(graph)
    with torch.no_grad():
        other.weights["a.bias"].add_(1)
    images = torch.from_numpy(pictures(1))
    assert not torch.equal(graph(images)["logits"], other(images)["logits"])
    other.load_state_dict(graph.state_dict())
    assert torch.equal(graph(images)["logits"], other(images)["logits"])


def quantize_model(model: onnx.ModelProto, *, zero_point: bool = True) -> onnx.ModelProto:
    """Every layer's input and weight behind a pair, scales by the largest value of one picture."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    layers = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}
    nodes: list[NodeProto] = []
    done: set[str] = set()
    for step in model.graph.node:
        step = copy.deepcopy(step)
        for index in (0, 1) if step.op_type in layers else ():
            name = step.input[index]
            step.input[index] = f"{name}.dq"
            if name in done:
                continue
            done.add(name)
            axis = None
            source = name.removesuffix(".fp32")
            if index == 1:
                axis = layers[step.op_type]
                values = np.moveaxis(stored[source].astype(np.float32), axis, 0)
                largest = np.abs(values).reshape(len(values), -1).max(1)
            else:
                largest = np.abs(one_by_one(model, pictures(1), name)).max()
            scale = np.asarray(largest / np.float32(127), np.float32)
            zero = np.zeros(scale.shape, np.int8)
            extra: dict[str, Any] = {} if axis is None else {"axis": axis}
            made.graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
            reads = f"{{}} {name}.scale"
            if zero_point:
                made.graph.initializer.append(numpy_helper.from_array(zero, f"{name}.zero"))
                reads += f" {name}.zero"
                typed = extra
            else:
                typed = {**extra, "output_dtype": TensorProto.INT8}
            nodes += [
                node("QuantizeLinear", reads.format(name), f"{name}.q", **typed),
                node("DequantizeLinear", reads.format(f"{name}.q"), f"{name}.dq", **extra),
            ]
        nodes.append(step)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    if not zero_point:
        made.opset_import[0].version = 21
        made.ir_version = 10
    return made


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_a_quantized_graph_gives_what_onnxruntime_gives(half: bool, zero_point: bool) -> None:
    model = quantize_model(small_model(half=half), zero_point=zero_point)
    images = pictures(3)
    graph = TorchGraph(model)
    found = graph(torch.from_numpy(images))["logits"].detach().numpy()
    wanted = one_by_one(model, images, "logits")
    apart = np.abs(found - wanted) > 1e-4 * np.abs(wanted).max()
    # A sum that differs in its last bit may round to the other integer.
    assert apart.mean() < 0.02
    unquantized = one_by_one(small_model(half=half), images, "logits")
    assert (np.abs(found - unquantized) > 1e-4 * np.abs(wanted).max()).mean() > 0.5
    graph.quantizers_enabled = False
    floats = graph(torch.from_numpy(images))["logits"].detach().numpy()
    np.testing.assert_allclose(floats, unquantized, rtol=1e-5, atol=1e-5)


def test_quantized_weights_train() -> None:
    model = quantize_model(small_model(half=True))
    graph = TorchGraph(model)
    images = torch.from_numpy(pictures(4))
    with torch.no_grad():
        graph.quantizers_enabled = False
        wanted = graph(images)["logits"]
        graph.quantizers_enabled = True
        for weight in graph.weights.values():
            weight.mul_(0.8)
    optimizer = torch.optim.Adam(graph.weights.values(), 3e-3)
    losses = []
    for _ in range(30):
        loss = functional.mse_loss(graph(images)["logits"], wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def pair(x: str, made: str, scale: str, zero: str = "z", **attributes: Any) -> list[NodeProto]:
    return [
        node("QuantizeLinear", f"{x} {scale} {zero}", f"{made}.q", **attributes),
        node("DequantizeLinear", f"{made}.q {scale} {zero}", made, **attributes),
    ]


@pytest.mark.parametrize(
    "zero", [INT8, np.int8(-5), np.uint8(0), np.uint8(131), np.int16(0), np.uint16(9)]
)
def test_types_and_zero_points(zero: np.generic) -> None:
    x = np.concatenate([noise(4000, scale=3), np.arange(-200, 200, dtype=np.float32) / 32])
    constants: Arrays = {"s": np.float32(1 / 32), "z": np.asarray(zero)}
    model = model_of(pair("x", "y", "s"), constants, x, opset=21)
    (wanted,) = by_onnxruntime(model, x)
    found = TorchGraph(model, inputs=["x"], outputs=["y"])(torch.from_numpy(x))["y"]
    # Also in halves, which round to even.
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_integers_may_be_selected_before_they_are_dequantized() -> None:
    x = noise(*IMAGE)
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("Transpose", "q", "t", perm=[0, 1, 3, 2]),
        node("MaxPool", "t", "m", kernel_shape=[2, 2]),
        node("DequantizeLinear", "m s z", "y"),
    ]
    constants: Arrays = {"s": np.float32(0.02), "z": np.asarray(INT8)}
    model = model_of(nodes, constants, x)
    (wanted,) = by_onnxruntime(model, x)
    found = TorchGraph(model, inputs=["x"], outputs=["y"])(torch.from_numpy(x))["y"]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


def test_constants_that_are_no_weights_are_quantized_too() -> None:
    x = noise(*IMAGE)
    constants: Arrays = {"s": np.float32(0.3), "z": np.asarray(INT8), "c": noise(4, 1, 1)}
    model = model_of([*pair("c", "d", "s"), node("Add", "x d")], constants, x)
    (wanted,) = by_onnxruntime(model, x)
    graph = TorchGraph(model, inputs=["x"], outputs=["y"], learn_scales=True)
    assert not list(graph.parameters())
    np.testing.assert_allclose(graph(torch.from_numpy(x))["y"].numpy(), wanted, rtol=1e-6)


def test_equal_pairs_are_one() -> None:
    x = noise(*IMAGE)
    nodes = [node("Relu", "x", "r"), *pair("r", "a", "s"), *pair("r", "b", "s"), node("Add", "a b")]
    constants: Arrays = {"s": np.float32(0.01), "z": np.asarray(INT8)}
    model = model_of(nodes, constants, x)
    (wanted,) = by_onnxruntime(model, x)
    graph = TorchGraph(model, inputs=["x"], outputs=["y", "b"])
    made = graph(torch.from_numpy(x))
    np.testing.assert_allclose(made["y"].numpy(), wanted, rtol=1e-6)
    np.testing.assert_allclose(made["b"].numpy(), wanted / 2, rtol=1e-6)
    # The Relu is gone into the one quantizer that is left.
    assert len(graph._steps) == 2


#: x, its quantized value with scale 0.5 in [-4, 3], and what reaches x of a gradient of 1
GRADIENTS = [
    (0.0, 0.0, 1),
    (0.2, 0.0, 1),
    (0.25, 0.0, 1),
    (0.75, 1.0, 1),
    (1.5, 1.5, 1),
    (1.7, 1.5, 1),
    (1.8, 1.5, 0),
    (99.0, 1.5, 0),
    (-1.1, -1.0, 1),
    (-2.2, -2.0, 1),
    (-2.3, -2.0, 0),
    (-9.0, -2.0, 0),
]
#: round(x / s) - x / s inside, the bound outside
SCALE_GRADIENTS = [0, -0.4, -0.5, 0.5, 0, -0.4, 3, 3, 0.2, 0.4, -4, -4]


def points(repeats: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.tensor([point for point, _, _ in GRADIENTS])
    return values.repeat(repeats).to(dtype).requires_grad_()


@pytest.mark.parametrize("repeats", [1, 20000])
def test_straight_through(repeats: int) -> None:
    x = points(repeats)
    y = fake_quantize(x, torch.tensor(0.5), -4, 3)
    assert y.tolist() == [value for _, value, _ in GRADIENTS] * repeats
    weights = torch.arange(1.0, 1 + len(x))
    (y * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    passed = torch.tensor([through for _, _, through in GRADIENTS]).repeat(repeats)
    assert torch.equal(x.grad, weights * passed)


@pytest.mark.parametrize("repeats", [1, 20000])
def test_learned_step_size(repeats: int) -> None:
    x = points(repeats)
    scale = torch.tensor([0.5], requires_grad=True)
    y = fake_quantize(x, scale, -4, 3)
    assert y.tolist() == [value for _, value, _ in GRADIENTS] * repeats
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and scale.grad is not None
    assert x.grad.tolist() == [through for _, _, through in GRADIENTS] * repeats
    wanted = sum(SCALE_GRADIENTS) * repeats / math.sqrt(3 * len(x))
    assert scale.grad.tolist() == pytest.approx([wanted], rel=1e-4)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_joined_with_a_relu(learned: bool, layout: torch.memory_format) -> None:
    gradient = torch.from_numpy(noise(4, 16, 64, 50))
    found = []
    for joined in (False, True):
        x = torch.from_numpy(noise(4, 16, 64, 50, seed=1)).contiguous(memory_format=layout)
        x.requires_grad_()
        scale = torch.tensor(0.01, requires_grad=learned)
        rectified = x if joined else functional.relu(x)
        y = fake_quantize(rectified, scale, after_relu=joined)
        (y * gradient).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None and x.grad.stride() == x.stride() == y.stride()
        found.append((y.detach(), x.grad, scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    if learned:
        torch.testing.assert_close(found[0][2], found[1][2])


def test_one_scale_per_channel() -> None:
    weight = torch.from_numpy(noise(5, 3, 2, 2)).requires_grad_()
    scale = torch.tensor([0.001, 0.01, 0.1])
    made = fake_quantize(weight, scale, axis=1)
    for channel in range(3):
        alone = fake_quantize(weight[:, channel], scale[channel])
        assert torch.equal(made[:, channel], alone)
    made.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    clipped = (weight / scale.view(1, 3, 1, 1)).abs() > 128.5
    assert clipped.any() and not clipped.all()
    assert torch.equal(weight.grad, (~clipped).float())
    with pytest.raises(RequestError, match="say which axis"):
        fake_quantize(weight, scale)


def test_rounding_stays_float32_for_bfloat16() -> None:
    x = points(dtype=torch.bfloat16)
    scale = torch.tensor(0.0123)
    y = fake_quantize(x, scale)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fake_quantize(x.float(), scale).bfloat16())
    y.float().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_autocast() -> None:
    model = quantize_model(small_model())
    graph = TorchGraph(model, learn_scales=True, weight_scales="follow")
    images = torch.from_numpy(pictures(2))
    exact = graph(images)["logits"].detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = graph(images)["logits"]
    assert (rough.detach() - exact).abs().max() < 0.05 * exact.abs().max()
    rough.float().square().mean().backward()
    assert all(
        parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        for parameter in graph.parameters()
    )


def stored(model: onnx.ModelProto) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("weight_scales", ["fixed", "follow"])
@pytest.mark.parametrize("half", [False, True])
def test_written_back(half: bool, weight_scales: Any, learn_scales: bool) -> None:
    model = quantize_model(small_model(half=half))
    graph = TorchGraph(model, weight_scales=weight_scales, learn_scales=learn_scales)
    before = model.SerializeToString(deterministic=True)
    graph.write_back(model)
    # Untrained, the very same bytes: these scales are the largest values already.
    assert model.SerializeToString(deterministic=True) == before
    with torch.no_grad():
        for parameter in graph.weights.values():
            parameter.mul_(1.25)
        for parameter in graph.scale_parameters.values():
            parameter.add_(0.1)
    old = stored(model)
    graph.write_back(model)
    new = stored(model)
    assert {name: array.dtype for name, array in new.items()} == {
        name: array.dtype for name, array in old.items()
    }
    learned = {f"{name}.scale" for name in ("n", "r", "h", "z")}
    assert graph.scale_parameters.keys() == (learned if learn_scales else set())
    for name, array in new.items():
        factor = 1.0
        if name in graph.weights or (
            name.endswith(("weight.scale", "fp32.scale")) and weight_scales == "follow"
        ):
            factor = 1.25
        elif name in learned and learn_scales:
            factor = math.exp(0.1)
        rtol = 2e-3 if array.dtype == np.float16 else 1e-6
        np.testing.assert_allclose(array, old[name] * factor, rtol=rtol, err_msg=name)
    # The file now gives what the module gives.
    images = pictures(2)
    again = TorchGraph(model)(torch.from_numpy(images))["logits"]
    found = graph(torch.from_numpy(images))["logits"]
    spread = float(found.detach().abs().max())
    assert float((again - found).detach().abs().mean()) < (1e-2 if half else 1e-5) * spread


def test_scales_that_follow_keep_a_channel_of_zeros() -> None:
    x = noise(*IMAGE)
    constants: Arrays = {
        "w": KERNEL.copy(),
        "s": np.full(6, 0.25, np.float32),
        "z": np.zeros(6, np.int8),
    }
    constants["w"][2] = 0
    model = model_of([*pair("w", "v", "s", axis=0), node("Conv", "x v")], constants, x)
    graph = TorchGraph(model, inputs=["x"], outputs=["y"], weight_scales="follow")
    wanted = np.abs(constants["w"]).reshape(6, -1).max(1) / 127
    wanted[2] = 0.25
    np.testing.assert_allclose(graph.scales["s"].numpy(), wanted, rtol=1e-6)
    # Nothing is clipped, and so every weight is trained.
    graph(torch.from_numpy(x))["y"].sum().backward()
    gradient = graph.weights["w"].grad
    assert gradient is not None and bool((gradient != 0).all())


def test_two_names_of_one_scale_are_written_together() -> None:
    x = noise(*IMAGE)
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q t z", "y")]
    same: Arrays = {"s": np.float32(0.02), "t": np.float32(0.02), "z": np.asarray(INT8)}
    model = model_of(nodes, same, x)
    graph = TorchGraph(model, inputs=["x"], outputs=["y"], learn_scales=True)
    with torch.no_grad():
        graph.scale_parameters["s"].fill_(-0.5)
    graph.write_back(model)
    found = stored(model)
    assert found["s"] == found["t"] == pytest.approx(0.02 * math.exp(-0.5))


def test_nothing_is_written_when_something_is_wrong() -> None:
    model = small_model(half=True)
    graph = TorchGraph(model)
    with torch.no_grad():
        graph.weights["a.bias"].add_(1)
        graph.weights["up.weight"].fill_(1e6)
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(WeightsError, match=r"up\.weight has values .* beyond float16"):
        graph.write_back(model)
    assert model.SerializeToString(deterministic=True) == before
    for changed, message in (
        (lambda tensor: setattr(tensor, "name", "other"), "the model has none"),
        (lambda tensor: tensor.dims.append(1), r"the model has one of shape \[8, 1\]"),
    ):
        other = small_model()
        changed(next(tensor for tensor in other.graph.initializer if tensor.name == "a.bias"))
        with pytest.raises(RequestError, match=message):
            graph.write_back(other)


Q = "QuantizeLinear"
#: nodes that cannot be trained, their constants, and what the message says
REFUSED: dict[str, tuple[list[NodeProto], Arrays, str]] = {
    "unknown": ([node("Einsum", "x", equation="abcd->abdc")], {}, "Einsum Einsum_y is an operator"),
    "other domain": (
        [helper.make_node("Relu", ["x"], ["y"], "mine", domain="mine")],
        {},
        "Relu mine is an operator",
    ),
    "cubic": ([node("Resize", "x - s", mode="cubic")], THIRD, "mode cubic"),
    "linear asymmetric": (
        [node("Resize", "x - s", mode="linear", coordinate_transformation_mode="asymmetric")],
        THIRD,
        "asymmetric",
    ),
    "training": (
        [node("BatchNormalization", "x c c c c", "y p q", training_mode=1)],
        {"c": noise(4)},
        "training_mode",
    ),
    "indices": ([node("MaxPool", "x", "y i", kernel_shape=[2, 2])], {}, "indices"),
    "wrapped": ([node("Pad", "x s", mode="wrap")], {"s": ints(*[1] * 8)}, "mode wrap"),
    "no scale": ([node(Q, "x s z")], {"s": np.float32(0), "z": np.asarray(INT8)}, "above 0"),
    "computed scale": ([node("ReduceMean", "x", "m"), node(Q, "x m")], {}, "constants above 0"),
    "several zero points": (
        [node(Q, "x s z", axis=1)],
        {"s": np.ones(4, np.float32), "z": np.arange(4, dtype=np.int8)},
        "several zero points",
    ),
    "other scale behind": (
        [node(Q, "x s z", "q"), node("DequantizeLinear", "q t z")],
        {"s": np.float32(1), "t": np.float32(2), "z": np.asarray(INT8)},
        "another scale or zero point",
    ),
    "integers read": (
        [node(Q, "x s z", "q"), node("Mul", "q q")],
        {"s": np.float32(1), "z": np.asarray(INT8)},
        "Mul Mul_y reads integers",
    ),
    "integers from elsewhere": (
        [node("Cast", "x", "i", to=TensorProto.INT8), node("DequantizeLinear", "i s")],
        {"s": np.float32(1)},
        "integers that no QuantizeLinear made",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    nodes, constants, message = REFUSED[case]
    with pytest.raises(RequestError, match=message):
        TorchGraph(model_of(nodes, constants, noise(*IMAGE)), inputs=["x"], outputs=["y"])


def test_wrong_requests() -> None:
    x = noise(*IMAGE)
    relu = model_of([node("Relu", "x")], {}, x)
    with pytest.raises(RequestError, match="has 0 such nodes; name the outputs"):
        TorchGraph(relu)
    with pytest.raises(RequestError, match="no tensor image to begin at"):
        TorchGraph(relu, outputs=["y"])
    with pytest.raises(RequestError, match="no tensor other to give"):
        TorchGraph(relu, inputs=["x"], outputs=["other"])
    with pytest.raises(RequestError, match="need p, which is not made from r"):
        TorchGraph(
            model_of([node("Relu", "p", "r"), node("Add", "r p")], {}, x, name="p"),
            inputs=["r"],
            outputs=["y"],
        )
    with pytest.raises(RequestError, match="opset 12"):
        TorchGraph(model_of([node("Relu", "x")], {}, x, opset=12), inputs=["x"], outputs=["y"])
    bad: Any = "sometimes"
    with pytest.raises(RequestError, match="one of fixed, follow, and 'sometimes' came"):
        TorchGraph(relu, inputs=["x"], outputs=["y"], weight_scales=bad)
    shared = [*pair("w", "a", "s"), *pair("v", "b", "s")]
    constants: Arrays = {"w": KERNEL, "v": noise(4, 6, 1, 1), "s": np.float32(1), "z": INT8}
    layers = [node("Conv", "x a", "h"), node("Conv", "h b")]
    with pytest.raises(RequestError, match="shared by several tensors"):
        TorchGraph(
            model_of([*shared, *layers], constants, x),
            inputs=["x"],
            outputs=["y"],
            weight_scales="follow",
        )


def test_wrong_inputs() -> None:
    graph = TorchGraph(small_model())
    with pytest.raises(RequestError, match=r"image as uint8 of 4 dimensions, and float32 of shape"):
        graph(torch.zeros(1, 16, 24, 3))
    with pytest.raises(RequestError, match="takes image, and 2 tensors came"):
        graph(torch.zeros(1), torch.zeros(1))
    written = model_of([node("Reshape", "x s")], {"s": ints(4, 99)}, noise(*IMAGE))
    one = TorchGraph(written, inputs=["x"], outputs=["y"])
    assert one(torch.zeros(1, 4, 9, 11))["y"].shape == (4, 99)
    with pytest.raises(RequestError, match="another batch than the 2 that came"):
        one(torch.zeros(2, 4, 9, 11))


def test_the_shipped_network() -> None:
    bundle = Bundle.open("streets")
    model = onnx.load_from_string(bundle.model.content)
    size = bundle.spec.height, bundle.spec.width
    images = np.stack([Street(*size, seed=seed).frame(9).pixels for seed in range(2)])
    graph = TorchGraph(model)
    with torch.inference_mode():
        found = graph(torch.from_numpy(images))["edgeseg.logits"].numpy()
    wanted = one_by_one(model, images, "edgeseg.logits")
    assert found.shape == wanted.shape
    # The logits reach 400, where a float32 has steps of 3e-5.
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert len(graph.weights) == 57
    assert sum(weight.ndim == 4 for weight in graph.weights.values()) == 56
