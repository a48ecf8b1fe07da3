"""The raw heads of a graph and their errors, against arithmetic on the tensors themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

from edgeseg.calibration.graph import prepared
from edgeseg.calibration.half import to_half
from edgeseg.calibration.heads import Heads, head_tensors
from edgeseg.errors import CalibrationError
from tests.calibration import small_yolact

if TYPE_CHECKING:
    from tests.calibration.conftest import Workbench

PICTURES = [small_yolact.picture(seed) for seed in range(3)]


def test_heads_are_what_the_last_layers_give() -> None:
    graph = prepared(small_yolact.model())
    assert tuple(layer.name for layer in graph.layers()) == small_yolact.LAYERS
    assert head_tensors(graph) == small_yolact.HEADS


@pytest.mark.parametrize(
    ("text", "outputs", "heads"),
    [
        ("a = Conv(x); b = Relu(a); y = Conv(b)", (), ("y",)),
        ("a = Conv(x); y = Relu(a)", (), ("y",)),
        ("a = Conv(x); b = Relu(a); y = Conv(b)", ("b",), ("b", "y")),
        ("a = Conv(x); b = Conv(x); c = Concat(a, b, axis=1); y = Softmax(c)", (), ("c",)),
        ("a = Conv(x); b = Conv(x); y = Mul(a, b)", (), ("a", "b")),
        ("a = Conv(x); z = ArgMax(a, axis=1); y = Conv(a)", (), ("a", "y")),
        # Its shape is no number of it.
        ("a = Conv(x); z = Shape(a); y = Conv(a)", (), ("y",)),
    ],
)
def test_which_tensors_are_heads(
    bench: Workbench, text: str, outputs: tuple[str, ...], heads: tuple[str, ...]
) -> None:
    graph = bench.graph(text.replace("; ", "\n"), *outputs)
    assert head_tensors(graph) == heads


def test_errors_are_squared_differences_over_the_variance(bench: Workbench) -> None:
    graph = prepared(small_yolact.model())
    half = to_half(graph.model, PICTURES).model
    other = bench.int8(graph, PICTURES).model
    heads = Heads(graph, PICTURES)
    for model, least, most in ((graph.model, 0.0, 0.0), (half, 0.0, 1e-5), (other, 1e-6, 0.05)):
        found = heads.errors(model)
        assert tuple(found) == small_yolact.HEADS
        for name, error in found.items():
            wanted = [bench.run(graph.model, pixels, name)[name] for pixels in PICTURES]
            given = [bench.run(model, pixels, name)[name] for pixels in PICTURES]
            noise = sum(
                np.mean((one.astype(np.float64) - two) ** 2)
                for one, two in zip(wanted, given, strict=True)
            )
            signal = sum(np.var(one.astype(np.float64)) for one in wanted)
            # ONNX Runtime computes each in its own way with and without its rewriting.
            assert error == pytest.approx(noise / signal, rel=0.2, abs=1e-9)
            assert least <= error <= most
        assert heads.error(model) == pytest.approx(np.mean(list(found.values())))


def test_rows_of_a_second_stage_stay_the_same_candidates(bench: Workbench) -> None:
    """The scores are turned round, so that another cell would be the best; the layer behind the
    ranking must not notice."""
    text = """
    s = Conv(x, out=1)
    flat = Numbers([-1])
    few = Numbers([5])
    shape = Numbers([4, -1])
    scores = Reshape(s, flat)
    best = Gather(scores, few)
    f = Conv(x, kernel=3)
    cells = Reshape(f, shape)
    rows = Transpose(cells, perm=[1, 0])
    """
    from onnx import TensorProto, helper, numpy_helper

    model = bench.model(text)
    nodes = [node for node in model.graph.node if node.output[0] != "best"]
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 1, (4, 4)).astype(np.float32)
    nodes += [
        helper.make_node("TopK", ["scores", "few"], ["best", "places"], "rank"),
        helper.make_node("Gather", ["rows", "places"], ["chosen"], "choose", axis=0),
        helper.make_node("Gemm", ["chosen", "second.weight"], ["y"], "second"),
    ]
    del model.graph.node[:], model.graph.output[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(weight, "second.weight"))
    for name in ("y", "best"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    pictures = bench.pictures(2)
    graph = prepared(model)
    assert set(head_tensors(graph)) == {"scores", "y"}
    turned = prepared(model)
    turned.put("s.weight", -turned.floats("s.weight"))
    assert any(
        not np.array_equal(
            bench.run(graph.model, pixels, "y")["y"], bench.run(turned.model, pixels, "y")["y"]
        )
        for pixels in pictures
    )
    found = Heads(graph, pictures).errors(turned.model)
    assert found["y"] == 0 and found["scores"] > 0.5


def test_a_head_that_says_the_same_everywhere(bench: Workbench) -> None:
    graph, moved = bench.graph("y = Conv(x)"), bench.graph("y = Conv(x)")
    for each, value in ((graph, 0.0), (moved, 1.0)):
        each.put("y.weight", np.zeros_like(each.floats("y.weight")))
        each.put("y.bias", np.full(4, value, np.float32))
    heads = Heads(graph, bench.pictures(1))
    assert heads.errors(graph.model) == {"y": 0.0}
    assert heads.errors(moved.model) == {"y": 1.0}


def test_no_head(bench: Workbench) -> None:
    from onnx import TensorProto, helper

    graph = bench.graph("a = Conv(x)\ny = Shape(a)")
    # The output of the convolution is nobody's but its shape's.
    del graph.model.graph.output[:]
    graph.model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.INT64, None))
    with pytest.raises(CalibrationError, match="no layer of the graph leads to boxes"):
        Heads(graph, bench.pictures(1))
