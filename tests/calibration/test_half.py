"""FP16 in the graph: which nodes, which types, and that the masks stay what they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime import quantization

from edgeseg.bundle import Bundle
from edgeseg.calibration import half
from edgeseg.calibration.half import LARGEST, LONG_SUM, UNCHANGED_IN_19, Half, to_half
from edgeseg.dataset import open_dataset
from edgeseg.engine import available_engines, open_engine
from edgeseg.errors import CalibrationError, FrameError, RequestError
from edgeseg.geometry import Geometry
from tests.calibration import small_yolact

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
node = helper.make_node
Frames = list[NDArray[np.uint8]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pictures(count: int = 2, size: tuple[int, int] = (8, 8)) -> Frames:
    return [rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8) for seed in range(count)]


def kernel(out: int = 3, into: int = 3, side: int = 1) -> NDArray[np.float32]:
    return rng(out + into).normal(0, 0.4, (out, into, side, side)).astype(np.float32)


def graph(
    nodes: list[NodeProto],
    constants: dict[str, Any] | None = None,
    *,
    size: tuple[int, int] = (8, 8),
    outputs: dict[str, int] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """``nodes`` behind a Cast and a Transpose that make ``x``, float32 (1, 3, H, W), of the
    picture. ``outputs``: name -> element type."""
    outputs = outputs or {"y": FLOAT}
    head = [
        node("Cast", ["image"], ["cast"], "cast", to=FLOAT),
        node("Transpose", ["cast"], ["x"], "planes", perm=[0, 3, 1, 2]),
    ]
    made = helper.make_graph(
        [*head, *nodes],
        "of a test",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, *size, 3])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [
            numpy_helper.from_array(
                np.asarray(v, np.float32) if isinstance(v, float) else np.asarray(v), name
            )
            for name, v in (constants or {}).items()
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    # The rank and sizes of the outputs, which the checker asks for.
    inferred = onnx.shape_inference.infer_shapes(model)
    for value, found in zip(model.graph.output, inferred.graph.output, strict=True):
        value.CopyFrom(found)
    return model


def conv(x: str, y: str, weight: str, name: str = "") -> NodeProto:
    return node("Conv", [x, weight], [y], name or y)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> element type, by strict inference."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    found.update({tensor.name: tensor.data_type for tensor in inferred.initializer})
    return found


def casts(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(n.input[0], n.output[0]) for n in model.graph.node if n.op_type == "Cast"]


def run(model: onnx.ModelProto, picture: NDArray[np.uint8], *, optimized: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"image": picture[None]})[0]


def evaluated(model: onnx.ModelProto, picture: NDArray[np.uint8]) -> list[Any]:
    """All outputs, by an evaluator that is not ours."""
    return list(ReferenceEvaluator(model).run(None, {"image": picture[None]}))


def check(model: onnx.ModelProto, made: Half) -> None:
    """What is true of every conversion."""
    for side in ("input", "output"):
        before, after = getattr(model.graph, side), getattr(made.model.graph, side)
        assert [v.SerializeToString() for v in before] == [v.SerializeToString() for v in after]
    assert not set(made.half) & set(made.kept)
    kinds = types(made.model)
    makers = {name: n for n in made.model.graph.node for name in n.output}
    for n in made.model.graph.node:
        if n.op_type == "Cast":
            to = next(entry.i for entry in n.attribute)
            assert kinds[n.input[0]] != to, f"{n.name} casts to what is there"
            maker = makers.get(n.input[0])
            assert maker is None or maker.op_type != "Cast" or to not in (FLOAT, HALF), n.name
        floats = {kinds[name] for name in n.output if kinds.get(name) in (FLOAT, HALF)}
        if n.name in made.half and n.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert floats <= {HALF}, n.name
        if n.name in made.kept:
            assert floats <= {FLOAT}, n.name
    names = [n.name for n in made.model.graph.node]
    assert len(set(names)) == len(names)
    read = {name for n in made.model.graph.node for name in n.input}
    assert {tensor.name for tensor in made.model.graph.initializer} <= read


def close(model: onnx.ModelProto, made: Half) -> None:
    """The first output, fp16 against float32."""
    sides = model.graph.input[0].type.tensor_type.shape.dim
    (picture,) = pictures(1, (sides[1].dim_value, sides[2].dim_value))
    wanted = evaluated(model, picture)[0]
    for found in (evaluated(made.model, picture)[0], run(made.model, picture)):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-3 * np.abs(wanted).max())


# --- which nodes, and why

TWO = {"w1": kernel(), "w2": kernel()}
MATRIX: dict[str, tuple[list[NodeProto], dict[str, Any], dict[str, str]]] = {
    "everything fits": (
        [conv("x", "a", "w1"), node("Relu", ["a"], ["b"], "b"), conv("b", "y", "w2")],
        TWO,
        {},
    ),
    "an activation overflows": (
        [
            conv("x", "a", "w1"),
            node("Mul", ["a", "big"], ["b"], "up"),
            node("Mul", ["b", "small"], ["c"], "down"),
            conv("c", "y", "w2"),
        ],
        {**TWO, "big": 1e4, "small": 1e-4},
        {"up": "activation overflow: tensor b reaches", "down": "activation overflow: tensor b"},
    ),
    "an activation comes near": (
        [
            conv("x", "a", "one"),
            node("Mul", ["a", "big"], ["b"], "up"),
            conv("b", "y", "w2"),
        ],
        # 255 * 160 is below what fp16 holds, and above half of it.
        {"one": np.eye(3, dtype=np.float32)[..., None, None], "w2": kernel() / 100, "big": 160.0},
        {
            "up": "activation overflow: tensor b reaches 40800, and 2 times that is wanted, "
            "fp16 holds 65504",
            "y": "activation overflow: tensor b",
        },
    ),
    "infinity": (
        [
            conv("x", "a", "w1"),
            node("Abs", ["a"], ["p"], "p"),
            node("Div", ["one", "zero"], ["inf"], "inf"),
            node("Mul", ["p", "inf"], ["b"], "b"),
            node("Min", ["b", "one"], ["c"], "c"),
            conv("c", "y", "w2"),
        ],
        {**TWO, "one": 1.0, "zero": 0.0},
        {
            "inf": "activation overflow: tensor inf reaches inf",
            "b": "activation overflow: tensor inf",
            "c": "activation overflow: tensor b reaches inf",
        },
    ),
    "a weight overflows": (
        [
            conv("x", "a", "w1"),
            node("Mul", ["a", "tiny"], ["b"], "b"),
            conv("b", "c", "huge"),
            conv("c", "y", "w2"),
        ],
        {**TWO, "huge": kernel() * 0 + np.float32(65600), "tiny": np.float32(1e-4)},
        {"c": "weight overflow: huge reaches 65600, fp16 holds 65504"},
    ),
    "a weight just fits": (
        [conv("x", "a", "w1"), conv("a", "b", "edge"), node("Mul", ["b", "n"], ["y"], "y")],
        # 65519 rounds to 65504; the sums it makes are another matter.
        {**TWO, "edge": kernel() * 0 + np.float32(65519), "n": np.float32(1e-4)},
        {"b": "activation overflow", "y": "activation overflow"},
    ),
    "a divisor is tiny": (
        [
            conv("x", "a", "w1"),
            node("Div", ["a", "divisor"], ["b"], "b"),
            node("Mul", ["b", "divisor"], ["c"], "c"),
            conv("c", "y", "w2"),
        ],
        {**TWO, "divisor": np.array([1, 0.5, 2e-2, 3e-5], np.float32)[:3].reshape(1, 3, 1, 1)},
        {},
    ),
    "a divisor is too tiny": (
        [
            node("Mul", ["x", "little"], ["l"], "l"),
            conv("l", "a", "w1"),
            node("Div", ["a", "divisor"], ["b"], "b"),
            conv("b", "y", "w2"),
        ],
        {
            **TWO,
            "little": 1e-3,
            "divisor": np.array([1, 1, 3e-5], np.float32).reshape(1, 3, 1, 1),
        },
        {"b": "precision: divisor is as small as 3e-05"},
    ),
    "an epsilon vanishes": (
        [
            conv("x", "a", "w1"),
            node("Add", ["a", "epsilon"], ["b"], "b"),
            conv("b", "y", "w2"),
        ],
        {**TWO, "epsilon": 1e-12},
        {"b": "precision: epsilon is as small as 1e-12"},
    ),
    "a bound beyond fp16 is no bound": (
        [
            conv("x", "a", "w1"),
            node("Clip", ["a", "zero", "most"], ["b"], "b"),
            conv("b", "y", "w2"),
        ],
        {**TWO, "zero": 0.0, "most": float(np.finfo(np.float32).max)},
        {},
    ),
    "an average adds up too much": (
        [
            conv("x", "a", "w1"),
            node("Mul", ["a", "some"], ["b"], "b"),
            node("Abs", ["b"], ["d"], "d"),
            node("GlobalAveragePool", ["d"], ["c"], "pool"),
            conv("c", "y", "w2"),
        ],
        {**TWO, "some": 30.0},
        {"pool": "precision: GlobalAveragePool adds up to"},
    ),
    "an operator that is not on the list": (
        [
            conv("x", "a", "w1"),
            node("CumSum", ["a", "axis"], ["b"], "sum"),
            conv("b", "y", "w2"),
        ],
        {**TWO, "axis": np.int64(3)},
        {"sum": "operator: CumSum is given float32"},
    ),
    "light nodes between float32 nodes": (
        [
            node("CumSum", ["x", "axis"], ["a"], "sum"),
            node("Relu", ["a"], ["b"], "relu"),
            node("Tanh", ["b"], ["c"], "tanh"),
            node("CumSum", ["c", "axis"], ["d"], "sum2"),
            conv("d", "y", "w2"),
        ],
        {**TWO, "axis": np.int64(3)},
        {
            "planes": "no fp16 beside it",
            "sum": "operator",
            "relu": "no fp16 beside it",
            "tanh": "no fp16 beside it",
            "sum2": "operator",
        },
    ),
    "positions": (
        [
            node("Shape", ["x"], ["shape"], "shape"),
            node("ReduceProd", ["shape"], ["count"], "count"),
            node("Mul", ["count", "many"], ["counts"], "counts"),
            node("Cast", ["counts"], ["n"], "n", to=FLOAT),
            conv("x", "a", "w1"),
            node("Div", ["a", "n"], ["b"], "b"),
            conv("b", "y", "w2"),
        ],
        {**TWO, "many": np.int64(11)},
        {"b": "precision: n holds integers up to 2112, fp16 all up to 2048"},
    ),
}


@pytest.mark.parametrize("case", MATRIX)
def test_exactly_the_right_nodes_stay(case: str) -> None:
    nodes, constants, kept = MATRIX[case]
    model = graph(nodes, constants)
    made = to_half(model, pictures())
    check(model, made)
    assert set(made.kept) == set(kept)
    for name, reason in kept.items():
        assert made.kept[name].startswith(reason), made.kept[name]
    blind = {"Cast", "Shape", "ReduceProd"}
    others = {n.name for n in model.graph.node if n.op_type not in blind} - {"counts"}
    assert set(made.half) == others - set(kept)
    if case not in ("infinity", "an epsilon vanishes"):
        close(model, made)


@pytest.mark.parametrize(
    ("size", "kept"), [((64, 64), False), ((64, 65), True)], ids=["4096", "more"]
)
@pytest.mark.parametrize("kind", ["ReduceMean", "GlobalAveragePool", "InstanceNormalization"])
def test_long_sums_stay(kind: str, size: tuple[int, int], kept: bool) -> None:
    inputs = {
        "ReduceMean": ["b", "axes"],
        "GlobalAveragePool": ["b"],
        "InstanceNormalization": ["b", "g", "g"],
    }[kind]
    model = graph(
        [
            conv("x", "a", "w1"),
            node("Mul", ["a", "little"], ["b"], "b"),
            node(kind, inputs, ["c"], "long"),
            conv("c", "y", "w2"),
        ],
        {**TWO, "little": 1e-2, "axes": np.array([2, 3]), "g": np.ones(3, np.float32)}
        if kind == "ReduceMean"
        else {**TWO, "little": 1e-2, "g": np.ones(3, np.float32)},
        size=size,
    )
    _drop_unused(model)
    made = to_half(model, pictures(1, size))
    check(model, made)
    wanted = {"long": f"precision: {kind} adds up 4160 numbers"} if kept else {}
    assert made.kept == wanted
    assert LONG_SUM == 4096


def _drop_unused(model: onnx.ModelProto) -> None:
    read = {name for n in model.graph.node for name in n.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)


def test_a_node_is_kept_when_asked() -> None:
    model = graph(
        [conv("x", "a", "w1"), node("Relu", ["a"], ["b"], "relu"), conv("b", "y", "w2")], TWO
    )
    made = to_half(model, pictures(), keep=("a",))
    check(model, made)
    # The Transpose before it has nothing else to do.
    assert made.kept == {"planes": "no fp16 beside it", "a": "asked"}
    assert made.half == ("relu", "y")
    with pytest.raises(RequestError, match="it has no nobody"):
        to_half(model, pictures(), keep=("a", "nobody"))


def test_peaks_are_what_an_evaluator_finds() -> None:
    nodes, constants, _ = MATRIX["an activation overflows"]
    model = graph(nodes, constants)
    frames = pictures(3)
    made = to_half(model, iter(frames))
    names = ["cast", "x", "a", "b", "c", "y"]
    assert list(made.peak) == names
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    found = [evaluated(probe, frame) for frame in frames]
    for index, name in enumerate(names):
        wanted = max(float(np.abs(values[index]).max()) for values in found)
        assert made.peak[name] == pytest.approx(wanted, rel=1e-5), name
    assert f"tensor b reaches {made.peak['b']:.6g}" in made.kept["up"]
    assert made.peak["b"] > LARGEST


def test_memory_is_bounded_by_smaller_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, constants, _ = MATRIX["an activation overflows"]
    model = graph(nodes, constants)
    whole = to_half(model, pictures())
    monkeypatch.setattr(half, "_BYTES_A_RUN", 4 * 8 * 8 * 3 * 2)
    opened: list[list[str]] = []
    original = half._session

    def session(*arguments: Any) -> Any:
        opened.append(arguments[1])
        return original(*arguments)

    monkeypatch.setattr(half, "_session", session)
    pieces = to_half(model, pictures())
    assert opened == [["cast", "x"], ["a", "b"], ["c", "y"]]
    assert pieces.peak == whole.peak
    assert pieces.model == whole.model


# --- types and constants


def test_weights_are_written_once_in_the_type_of_their_readers() -> None:
    model = graph(
        [
            node("Cast", ["stored"], ["stored.fp32"], "stored.cast", to=FLOAT),
            node("Cast", ["both"], ["both.fp32"], "both.cast", to=FLOAT),
            node("Constant", [], ["factor"], "factor", value_float=0.5),
            conv("x", "a", "stored.fp32"),
            conv("a", "b", "plain"),
            node("Mul", ["b", "factor"], ["c"], "c"),
            conv("c", "d", "both.fp32"),
            conv("d", "e", "both.fp32", "float"),
            conv("e", "y", "plain"),
        ],
        {
            "stored": kernel().astype(np.float16),
            "both": kernel(3, 3, 1).astype(np.float16),
            "plain": kernel(),
        },
    )
    made = to_half(model, pictures(), keep=("float",))
    check(model, made)
    close(model, made)
    found = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    assert set(found) == {"stored", "both", "plain", "factor"}
    assert all(values.dtype == np.float16 for values in found.values())
    np.testing.assert_array_equal(found["stored"], kernel().astype(np.float16))
    np.testing.assert_array_equal(found["plain"], kernel().astype(np.float16))
    # The kernel that a float32 node reads keeps its Cast, and the fp16 node reads what is behind.
    inputs = {n.name: list(n.input) for n in made.model.graph.node}
    assert inputs["d"][1] == "both" and inputs["float"][1] == "both.fp32"
    assert casts(made.model) == [
        ("image", "cast"),
        ("both", "both.fp32"),
        ("d", "d.fp32"),
        ("e", "e.fp16"),
        ("y.fp16", "y"),
    ]


def test_bounds_stay_finite() -> None:
    nodes, constants, _ = MATRIX["a bound beyond fp16 is no bound"]
    made = to_half(graph(nodes, constants), pictures())
    found = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    assert found["most"] == LARGEST


@pytest.mark.parametrize("variance", [1.0, 3e-9, 4e6, 1e12])
def test_batch_norms_of_any_variance(variance: float) -> None:
    # 4e6 and 1e12 are beyond fp16, and 3e-9 is nothing in it.
    spread = np.array([1.0, 0.3, 2.0], np.float32) * np.float32(variance)
    parts = {
        "scale": rng(1).normal(1, 0.2, 3).astype(np.float32) * np.sqrt(spread + 1e-5) / 30,
        "bias": rng(2).normal(0, 8, 3).astype(np.float32),
        "mean": rng(3).normal(100, 20, 3).astype(np.float32),
        "variance": spread,
    }
    model = graph(
        [
            node("BatchNormalization", ["x", *parts], ["a"], "norm"),
            conv("a", "y", "w1"),
        ],
        {"w1": TWO["w1"], **{name: values.astype(np.float32) for name, values in parts.items()}},
    )
    made = to_half(model, pictures())
    check(model, made)
    assert made.kept == {}
    close(model, made)
    found = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    assert set(found) == {"w1", *parts}
    # One type for all five: OpenVINO refuses a mixture.
    assert {values.dtype for values in found.values()} == {np.dtype(np.float16)}
    x = np.linspace(0, 255, 6)[:, None]
    lines = []
    for source in (parts, found):
        scale, bias, mean, spread = (source[name].astype(np.float64) for name in parts)
        lines.append((x - mean) / np.sqrt(spread + 1e-5) * scale + bias)
    np.testing.assert_allclose(lines[1], lines[0], rtol=0, atol=1e-3 * np.abs(lines[0]).max())


def test_inputs_and_outputs_keep_their_types() -> None:
    model = graph(
        [
            conv("x", "float", "w1"),
            node("Relu", ["float"], ["b"], "relu"),
            node("ArgMax", ["b"], ["index"], "argmax", axis=1),
            node("Cast", ["b"], ["y"], "to_uint8", to=TensorProto.UINT8),
        ],
        {"w1": TWO["w1"]},
        outputs={"float": FLOAT, "y": TensorProto.UINT8, "index": TensorProto.INT64},
    )
    made = to_half(model, pictures())
    check(model, made)
    assert made.half == ("planes", "float", "relu", "argmax")
    kinds = types(made.model)
    assert kinds["b"] == HALF and kinds["float"] == FLOAT
    # One Cast for the output; the fp16 nodes read what is before it.
    assert casts(made.model) == [("image", "cast"), ("float.fp16", "float"), ("b", "y")]


def test_what_a_subgraph_reads_stays() -> None:
    branches = {}
    for name, kind in (("then_branch", "Relu"), ("else_branch", "Neg")):
        branches[name] = helper.make_graph(
            [node(kind, ["b"], [f"{name}.y"], f"{name}.node")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}.y", FLOAT, [1, 3, 8, 8])],
        )
    model = graph(
        [
            conv("x", "a", "w1"),
            conv("a", "b", "w2"),
            node("If", ["yes"], ["c"], "if", **branches),
            conv("c", "y", "w1"),
        ],
        {**TWO, "yes": np.bool_(True)},
    )
    made = to_half(model, pictures())
    check(model, made)
    assert made.half == ("planes", "a", "y")
    assert made.kept == {
        "b": "operator: read inside a subgraph",
        "if": "operator: If is given float32",
    }
    close(model, made)


def test_nodes_without_names_get_one() -> None:
    model = graph([conv("x", "a", "w1"), conv("a", "y", "w2", "a")], TWO)
    model.graph.node[0].name = ""
    assert to_half(model, pictures()).half == ("planes", "a", "Conv_y")


def test_a_second_time_changes_nothing() -> None:
    nodes, constants, _ = MATRIX["an activation overflows"]
    _second_time(to_half(graph(nodes, constants), pictures()))
    # There a.d gives both types, and so there are two of it afterwards.
    _second_time(to_half(quantized(), pictures()))


def _second_time(once: Half) -> None:
    again = to_half(once.model, pictures())
    assert again.model.graph.node == once.model.graph.node
    assert {name.removesuffix(".fp16") for name in again.half} == set(once.half)
    assert set(again.kept) - {"a.d"} == set(once.kept)
    assert sorted(t.SerializeToString() for t in again.model.graph.initializer) == sorted(
        t.SerializeToString() for t in once.model.graph.initializer
    )


def test_the_same_input_gives_the_same_bytes_and_is_left_alone() -> None:
    nodes, constants, _ = MATRIX["an activation overflows"]
    model = graph(nodes, constants)
    before = model.SerializeToString(deterministic=True)
    made = [to_half(model, pictures()) for _ in range(2)]
    assert model.SerializeToString(deterministic=True) == before
    assert made[0] == made[1]
    one, two = (m.model.SerializeToString(deterministic=True) for m in made)
    assert one == two != before


# --- quantized graphs


def quantized(
    *,
    opset: int = 18,
    scale: float = 2.3,
    weight_scale: NDArray[np.float32] | None = None,
    float_weights: bool = False,
) -> onnx.ModelProto:
    """A float convolution, then two int8 ones with a residual Add, then a float one.

    ``first`` gives fp16 to a QuantizeLinear; ``second`` lies between integers; ``third`` adds to
    what was quantized; ``last`` is not quantized.
    """
    weights = weight_scale if weight_scale is not None else np.array([1, 2, 3], np.float32) / 400
    constants: dict[str, Any] = {
        "w1": kernel() / 4,
        "last.w": kernel(),
        "bias": np.array([20, -3, 400], np.float32),
        "a.s": np.float32(scale),
        "b.s": np.float32(1.37),
        "zero": np.int8(0),
        "second.w.s": weights,
        "third.w.s": weights,
        "w.zero": np.zeros(3, np.int8),
    }
    nodes = [conv("x", "a", "w1", "first")]
    for name in ("second", "third"):
        integers = rng(len(name)).integers(-127, 128, (3, 3, 1, 1)).astype(np.int8)
        if float_weights:
            constants[f"{name}.w"] = (integers * weights.reshape(-1, 1, 1, 1)).astype(np.float32)
            nodes.append(
                node(
                    "QuantizeLinear",
                    [f"{name}.w", f"{name}.w.s", "w.zero"],
                    [f"{name}.w.q"],
                    f"{name}.w.q",
                    axis=0,
                )
            )
        else:
            constants[f"{name}.w.q"] = integers
        nodes.append(
            node(
                "DequantizeLinear",
                [f"{name}.w.q", f"{name}.w.s", "w.zero"],
                [f"{name}.w.d"],
                f"{name}.w.d",
                axis=0,
            )
        )
    nodes += [
        node("QuantizeLinear", ["a", "a.s", "zero"], ["a.q"], "a.q"),
        node("DequantizeLinear", ["a.q", "a.s", "zero"], ["a.d"], "a.d"),
        node("Conv", ["a.d", "second.w.d", "bias"], ["b"], "second"),
        node("Relu", ["b"], ["b.r"], "relu"),
        node("QuantizeLinear", ["b.r", "b.s", "zero"], ["b.q"], "b.q"),
        node("DequantizeLinear", ["b.q", "b.s", "zero"], ["b.d"], "b.d"),
        node("Conv", ["b.d", "third.w.d", "bias"], ["c"], "third"),
        node("Add", ["c", "a.d"], ["d"], "add"),
        conv("d", "y", "last.w", "last"),
    ]
    return graph(nodes, constants, opset=opset)


def test_quantized_types() -> None:
    model = quantized()
    made = to_half(model, pictures())
    check(model, made)
    assert made.half == (
        "planes", "first", "third.w.d", "a.q", "a.d", "b.d", "third", "add", "last",
    )  # fmt: skip
    assert made.kept == {
        "second.w.d": "no fp16 beside it",
        "second": "between integers: int8 comes and int8 goes",
        "relu": "between integers: int8 comes and int8 goes",
        "b.q": "no fp16 beside it",
    }
    assert (made.model.opset_import[0].version, made.model.ir_version) == (19, 9)
    # No Cast but at the ends: Q and DQ stand between the types.
    assert casts(made.model) == [("image", "cast"), ("y.fp16", "y")]
    kinds = types(made.model)
    wanted = {"a": HALF, "a.d": FLOAT, "a.d.fp16": HALF, "b": FLOAT, "b.d": HALF, "c": HALF}
    assert {name: kinds[name] for name in wanted} == wanted


@pytest.mark.parametrize("float_weights", [False, True], ids=["int8", "pairs"])
@pytest.mark.parametrize("opset", [18, 19, 20])
def test_quantized_values(opset: int, float_weights: bool) -> None:
    model = quantized(opset=opset, float_weights=float_weights)
    made = to_half(model, pictures())
    check(model, made)
    assert made.model.opset_import[0].version == max(opset, 19)
    for picture in pictures(2):
        wanted = run(model, picture, optimized=False)
        # fp16 moves a few values over the border of an integer: a step of 1.37 times a weight.
        for found in (
            evaluated(made.model, picture)[0],
            run(made.model, picture),
            run(made.model, picture, optimized=False),
        ):
            error = np.abs(found - wanted) / np.abs(wanted).max()
            assert error.max() < 0.03 and error.mean() < 2e-3


def test_openvino_reads_quantized_graphs() -> None:
    core = openvino.Core()
    picture = pictures(1)[0]
    found = []
    for model in (quantized(), to_half(quantized(), pictures()).model):
        read = core.read_model(model.SerializeToString())
        compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found.append(np.array(compiled(picture[None])[0]))
    error = np.abs(found[1] - found[0]) / np.abs(found[0]).max()
    assert error.max() < 0.03 and error.mean() < 2e-3


def test_scales_are_one_number_in_both_types() -> None:
    # 2.3 and 1.37 are not in fp16; what a float32 QuantizeLinear and an fp16 DequantizeLinear
    # take an integer for has to be the same.
    made = to_half(quantized(), pictures())
    found = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    by_name = {n.name: n for n in made.model.graph.node}
    for q, d in (("a.q", "a.d"), ("a.q", "a.d.fp16"), ("b.q", "b.d")):
        one, two = (found[by_name[name].input[1]].astype(np.float64) for name in (q, d))
        assert one == two == np.float64(np.float16(one)), (q, d)
    # Weights have one reader each and no partner.
    second = found[by_name["second.w.d"].input[1]]
    np.testing.assert_array_equal(second, np.array([1, 2, 3], np.float32) / 400)


@pytest.mark.parametrize(
    ("scale", "loss"),
    [(1e-9, "100 %"), (3e-6, "0."), (2.0**-20 * 1.03, "")],
    ids=["underflow", "digits", "few"],
)
def test_a_scale_that_fp16_does_not_hold_stays(scale: float, loss: str) -> None:
    model = quantized(scale=scale)
    made = to_half(model, pictures())
    check(model, made)
    for name in ("a.q", "a.d"):
        assert made.kept[name].startswith("precision: scale a.s loses"), made.kept[name]
        assert loss in made.kept[name]
    # Then there are Casts: before the QuantizeLinear and behind the DequantizeLinear.
    assert ("a", "a.fp32") in casts(made.model) and ("a.d", "a.d.fp16") in casts(made.model)
    found = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    assert found["a.s"].dtype == np.float32 and found["a.s"] == np.float32(scale)


def test_a_dead_channel_does_not_cost_its_layer_int8() -> None:
    weights = np.array([1e-9, 2e-3, 1e-3], np.float32)
    made = to_half(quantized(weight_scale=weights), pictures())
    assert "third.w.d" in made.half and not any("scale" in why for why in made.kept.values())
    (scale,) = [
        numpy_helper.to_array(t) for t in made.model.graph.initializer if t.name == "third.w.s"
    ]
    assert (scale > 0).all()
    np.testing.assert_allclose(scale, weights, rtol=0, atol=2e-6)


def test_functions_move_with_the_graph_and_are_given_float32() -> None:
    # The checker, which every conversion runs, refuses a function of another opset.
    model = quantized()
    body = [
        node("Identity", ["v"], ["same"], "same"),
        node("Resize", ["same", "", "factors"], ["big"], "big", mode="linear"),
    ]
    factors = node("Constant", [], ["factors"], "factors", value_floats=[1.0, 1.0, 2.0, 2.0])
    model.functions.append(
        helper.make_function(
            "of.a.test", "Double", ["v"], ["big"], [factors, *body], [helper.make_opsetid("", 18)]
        )
    )
    model.opset_import.append(helper.make_opsetid("of.a.test", 1))
    model.graph.node[-1].output[0] = "low"
    model.graph.node.append(node("Double", ["low"], ["y"], "double", domain="of.a.test"))
    for side in model.graph.output[0].type.tensor_type.shape.dim[2:]:
        side.dim_value *= 2
    made = to_half(model, pictures())
    check(model, made)
    assert made.kept["double"] == "operator: Double is given float32"
    (before,), (after,) = model.functions, made.model.functions
    assert after.node == before.node
    assert [o.version for o in after.opset_import] == [19]
    assert made.model.graph.node[-1].input[0] == "low.fp32" and "last" in made.half


def test_opset_17_keeps_its_pairs_in_float32() -> None:
    model = quantized(opset=17)
    made = to_half(model, pictures())
    check(model, made)
    assert made.model.opset_import[0].version == 17
    assert made.kept["a.q"] == "opset 17: QuantizeLinear takes fp16 from opset 19"
    assert {"first", "third", "add", "last"} <= set(made.half)
    assert ("a", "a.fp32") in casts(made.model)


def test_what_changed_in_opset_19_was_looked_at() -> None:
    history = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""]
    before = {s.name for s in history if s.since_version <= 18}
    changed = {s.name for s in history if s.since_version == 19}
    assert changed & before == UNCHANGED_IN_19


def test_a_concat_between_integers_is_what_onnx_runtime_can_read() -> None:
    # With fp16 scales ONNX Runtime makes an int8 Concat of it that it then refuses.
    nodes = [conv("x", "a", "w1")]
    for name in ("p", "q"):
        nodes += [
            node("QuantizeLinear", ["a", f"{name}.s", "zero"], [f"{name}.i"], f"{name}.i"),
            node("DequantizeLinear", [f"{name}.i", f"{name}.s", "zero"], [f"{name}.d"], name),
        ]
    nodes += [
        node("Concat", ["p.d", "q.d"], ["c"], "concat", axis=1),
        node("QuantizeLinear", ["c", "p.s", "zero"], ["c.i"], "c.i"),
        node("DequantizeLinear", ["c.i", "p.s", "zero"], ["c.d"], "c"),
        conv("c.d", "y", "w2", "y"),
    ]
    constants = {
        "w1": kernel(), "w2": kernel(3, 6), "p.s": np.float32(1.9), "q.s": np.float32(3.1),
        "zero": np.int8(0),
    }  # fmt: skip
    model = graph(nodes, constants)
    made = to_half(model, pictures())
    check(model, made)
    assert made.kept["concat"].startswith("between integers")
    assert {"p.i", "q.i", "c", "y"} <= set(made.half)
    picture = pictures(1)[0]
    wanted = run(model, picture)
    assert np.abs(run(made.model, picture) - wanted).max() < 0.02 * np.abs(wanted).max()


def test_what_onnx_runtimes_own_tool_makes(tmp_path: Path) -> None:
    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[NDArray[np.uint8]] = iter(pictures())

        def get_next(self) -> dict[str, Any] | None:
            picture = next(self.left, None)
            return None if picture is None else {"image": picture[None]}

    model = graph(
        [
            node("Mul", ["x", "n"], ["n.x"], "norm"),
            node("Conv", ["n.x", "w1", "bias"], ["a"], "a"),
            node("Relu", ["a"], ["r"], "r"),
            node("Conv", ["r", "w2", "bias"], ["b"], "b"),
            node("Add", ["b", "r"], ["c"], "c"),
            node("Conv", ["c", "w1", "bias"], ["y"], "y"),
        ],
        {**TWO, "bias": np.array([0.1, -0.2, 0.3], np.float32), "n": np.float32(1 / 64)},
    )
    onnx.save(model, tmp_path / "model.onnx")
    quantization.quantize_static(
        tmp_path / "model.onnx",
        tmp_path / "q.onnx",
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["Conv"],
        extra_options={"ActivationSymmetric": True},
    )
    made = to_half(onnx.load(tmp_path / "q.onnx"), pictures())
    check(onnx.load(tmp_path / "q.onnx"), made)
    # Its int32 biases keep float32, with a Cast behind.
    assert any(why.startswith("precision: int32") for why in made.kept.values())
    assert any(n.op_type == "QuantizeLinear" and n.name in made.half for n in made.model.graph.node)
    for picture in pictures():
        wanted = run(onnx.load(tmp_path / "q.onnx"), picture)
        found = run(made.model, picture)
        assert np.abs(found - wanted).mean() < 0.01 * np.abs(wanted).max()


# --- the shipped model


def street_frames(count: int) -> Frames:
    """Frames of the generated streets at the size of the shipped network."""
    spec = Bundle.open("streets").spec
    found = []
    for sample in open_dataset(f"synthetic:?frames={count}", "val"):
        height, width = sample.pixels.shape[:2]
        geometry = Geometry.between(height, width, spec)
        found.append(geometry.fit(sample.pixels))
    return found


@pytest.fixture(scope="module")
def streets() -> tuple[onnx.ModelProto, Half]:
    """The shipped float model, and what two frames made of it."""
    model = onnx.load(Bundle.open("streets").model_path)
    return model, to_half(model, street_frames(2))


def test_the_shipped_model_is_all_fp16(streets: tuple[onnx.ModelProto, Half]) -> None:
    model, made = streets
    check(model, made)
    assert made.kept == {"head": "operator: EdgeSegUpsampleArgmax is given float32"}
    assert {t.data_type for t in made.model.graph.initializer} == {HALF, TensorProto.INT64}
    names = {t.name for t in model.graph.initializer}
    assert names == {t.name for t in made.model.graph.initializer}
    # One Cast at the picture, one at the logits, and the one at the output that was there.
    logits = made.model.graph.node[-2].input[0]
    assert [target for _, target in casts(made.model)] == ["edgeseg.cast", logits, "class_map"]
    assert made.model.functions == model.functions
    assert made.model.metadata_props == model.metadata_props
    assert made.model.opset_import == model.opset_import
    assert len(made.model.SerializeToString()) < 1.01 * len(model.SerializeToString())


@pytest.mark.parametrize("engine", available_engines())
def test_the_shipped_model_gives_the_same_masks(
    streets: tuple[onnx.ModelProto, Half], tmp_path: Path, engine: str
) -> None:
    onnx.save(streets[1].model, tmp_path / "model.onnx")
    bundles = (Bundle.open("streets"), Bundle.open(tmp_path / "model.onnx"))
    plain, narrow = (
        open_engine(bundle, engine, threads=1, compiled_head=False) for bundle in bundles
    )
    for pixels in street_frames(4):
        same = plain.run(pixels).class_map == narrow.run(pixels).class_map
        # 0.9998 was seen. All the same everywhere would mean that nothing was rounded.
        assert same.mean() >= 0.995
    plain.close()
    narrow.close()


# --- bad input


# --- what is ranked


def test_what_is_ranked_is_computed_in_float32() -> None:
    model = small_yolact.model()
    frames = [small_yolact.picture(seed) for seed in range(3)]
    made = to_half(model, frames)
    kinds = types(made.model)
    convolutions = [each for each in made.model.graph.node if each.op_type == "Conv"]
    assert len(convolutions) == len(small_yolact.LAYERS)
    assert all(kinds[each.output[0]] == HALF for each in convolutions)
    # Levels are put together before anything becomes float32, and so is what is chosen of them.
    assert {kinds[name] for name in ("loc", "conf", "mask", "edgeseg.head.chosen")} == {HALF}
    for name in ("odds", "top_score", "corners", "overlap_width_0", "worst_excess", "final_score"):
        assert kinds[f"edgeseg.head.{name}"] == FLOAT, name
    assert made.kept["edgeseg.head.odds"].startswith("order")
    (head,) = [each for each in made.model.graph.node if each.op_type == "EdgeSegMaskAssembly"]
    assert all(kinds[name] in (FLOAT, TensorProto.INT32) for name in head.input)
    # The whole of the scores, the boxes of the candidates, the prototypes, the coefficients.
    assert len(casts(made.model)) <= len(casts(model)) + 6


def test_a_comparison_that_decides_on_a_ranking_is_float32() -> None:
    model = graph(
        [
            conv("x", "c", "k"),
            node("Relu", ["c"], ["r"], "relu"),
            node("Mul", ["r", "small"], ["scaled"], "scale"),
            node("Less", ["scaled", "limit"], ["below"], "compare"),
            node("Where", ["below", "r", "limit"], ["scores"], "where"),
            node("Reshape", ["scores", "flat"], ["row"], "row"),
            node("TopK", ["row", "few"], ["y", "place"], "rank"),
            conv("r", "z", "k", "second"),
        ],
        {
            "k": kernel(),
            "small": np.float32(1 / 256),
            "limit": np.float32(0.5),
            "flat": np.array([-1], np.int64),
            "few": np.array([4], np.int64),
        },
        outputs={"y": FLOAT, "z": FLOAT},
    )
    made = to_half(model, pictures())
    check(model, made)
    ranked = {"relu", "scale", "compare", "where", "row", "rank"}
    assert {name for name, why in made.kept.items() if why.startswith("order")} >= {"rank", "row"}
    assert ranked <= set(made.kept) and {"c", "second"} <= set(made.half)


def test_no_frames() -> None:
    with pytest.raises(CalibrationError, match="none came; give pictures"):
        to_half(graph([conv("x", "y", "w1")], {"w1": kernel()}), [])


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((8, 9, 3), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float32),
    ],
    ids=lambda frame: f"{frame.dtype}{frame.shape}",
)
def test_frames_of_another_kind(frame: Any) -> None:
    model = graph([conv("x", "y", "w1")], {"w1": kernel()})
    with pytest.raises(FrameError, match=r"size \(1, 8, 8, 3\), and frame 2 is"):
        to_half(model, [*pictures(1), frame])


def test_frames_with_a_batch_axis_are_the_same() -> None:
    model = graph([conv("x", "y", "w1")], {"w1": kernel()})
    assert to_half(model, [p[None] for p in pictures()]) == to_half(model, pictures())


def test_graphs_that_are_none() -> None:
    model = graph([conv("x", "y", "w1")], {"w1": kernel()})
    model.graph.input[0].type.tensor_type.elem_type = FLOAT
    with pytest.raises(CalibrationError, match="takes one uint8 picture"):
        to_half(model, pictures())
    model = graph([conv("x", "y", "w1")], {"w1": kernel()})
    model.graph.node[-1].input[0] = "nothing"
    with pytest.raises(CalibrationError, match="no valid ONNX"):
        to_half(model, pictures())
