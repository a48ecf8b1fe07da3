"""Equalization: the same outputs from channels that are even, where they can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

from numpy.typing import NDArray

from edgeseg.calibration.equalize import equalize
from edgeseg.calibration.graph import Graph
from edgeseg.frame import Pixels

if TYPE_CHECKING:
    from tests.calibration.conftest import Workbench

Peaks = dict[str, NDArray[np.float64]]

TWICE = "f = Floats([1, 1, 2, 2])"

# name -> lines, tensors whose channels can move, and whether all of them come to one level: those
# that are tied to wider ones elsewhere do not
CASES: dict[str, tuple[str, str, bool]] = {
    "a chain": ("a = Conv(x); r = Relu(a); b = Conv(r, kernel=3); y = Conv(b)", "a r b", True),
    "depthwise": ("a = Conv(x); b = Conv(a, kernel=3, group=4); y = Conv(b)", "a b", True),
    "two groups": ("a = Conv(x, out=6); b = Conv(a, into=6, group=2); y = Conv(b)", "a b", True),
    "without bias": ("a = Conv(x, bias=0); y = Conv(a)", "a", True),
    "ConvTranspose": ("a = Deconv(x, out=6); b = Deconv(a, into=6); y = Conv(b)", "a b", True),
    "of two groups": (
        "a = Deconv(x, out=6, group=2); b = Deconv(a, into=6, group=2); y = Conv(b)",
        "a b",
        True,
    ),
    "Gemm": (
        "a = Conv(x); p = GlobalAveragePool(a); b = Conv(p); f = Flatten(b); "
        "c = Linear(f, out=6); y = Linear(c, into=6, transB=0)",
        "a p c",
        False,
    ),
    "activations and pooling": (
        "s = Values([4, 1, 1], 0.1, 0.3); a = Conv(x); q = LeakyRelu(a); w = PRelu(q, s); "
        "p = AveragePool(w, kernel_shape=[2, 2]); m = MaxPool(p, kernel_shape=[2, 2]); y = Conv(m)",
        "a q w p m",
        False,
    ),
    "an identity residual": (
        "a = Conv(x); r = Relu(a); b = Conv(r); s = Add(b, r); t = Relu(s); y = Conv(t)",
        "a r b s t",
        False,
    ),
    "a residual of two": ("a = Conv(x); b = Conv(x); s = Add(a, b); y = Conv(s)", "a b s", False),
    "global context": (
        "n = Numbers([-2, -1]); a = Conv(x); p = ReduceMean(a, n); b = Conv(p); s = Add(b, a); "
        "y = Conv(s)",
        "a p b s",
        False,
    ),
    "Concat": (
        "a = Conv(x); b = Conv(x, out=6); c = Concat(a, b, axis=1); y = Conv(c, into=10); "
        "z = Conv(b, into=6)",
        "a b c",
        False,
    ),
    "Concat, axis from the end": (
        "a = Conv(x); b = Conv(x); c = Concat(a, b, axis=-3); y = Conv(c, into=8)",
        "a b c",
        True,
    ),
    "Concat along the height": (
        "a = Conv(x); b = Conv(x); c = Concat(a, b, axis=2); y = Conv(c)",
        "a b c",
        False,
    ),
    "Concat along the batch": (
        "a = Conv(x); b = Conv(x); c = Concat(a, b, axis=0); y = Conv(c)",
        "",
        True,
    ),
    "Resize": (
        f"{TWICE}; a = Conv(x); u = Resize(a, '', f, mode='linear'); y = Conv(u)",
        "a u",
        False,
    ),
    "Resize by sizes": (
        "n = Numbers([1, 4, 5, 7]); a = Conv(x); u = Resize(a, '', '', n); y = Conv(u)",
        "a u",
        False,
    ),
    "Resize of some axes": (
        "f = Floats([2, 2]); a = Conv(x); u = Resize(a, '', f, axes=[2, 3]); y = Conv(u)",
        "a u",
        True,
    ),
    # Operators that mind.
    "Resize of channels": (
        "f = Floats([1, 1.2, 1, 1]); a = Conv(x); u = Resize(a, '', f, mode='linear'); y = Conv(u)",
        "",
        True,
    ),
    "Resize with a border": (
        "o = Floats([0, 0, 0, 0, 1, 1, 1.5, 1.5]); f = Floats([1, 1, 2, 2]); a = Conv(x); "
        "u = Resize(a, o, f, coordinate_transformation_mode='tf_crop_and_resize', "
        "extrapolation_value=3.0); y = Conv(u)",
        "",
        True,
    ),
    "ReduceMean of channels": (
        "n = Numbers([1]); a = Conv(x); p = ReduceMean(a, n); y = Conv(p, into=1)",
        "",
        True,
    ),
    "ReduceMean of channels, the sides alike": (
        "n = Numbers([1]); a = Conv(x, out=8); p = ReduceMean(a, n, keepdims=0); t = Tanh(p); "
        "y = Conv(a, into=8)",
        "",
        True,
    ),
    "ReduceMean of everything": (
        "a = Conv(x); p = ReduceMean(a); s = Add(a, p); y = Conv(s)",
        "",
        True,
    ),
    "Clip": (
        "l = Values([], 0, 0); h = Values([], 6, 6); a = Conv(x); c = Clip(a, l, h); y = Conv(c)",
        "",
        True,
    ),
    "a constant added": (
        "k = Values([1, 4, 1, 1], 0, 1); a = Conv(x); s = Add(a, k); y = Conv(s)",
        "",
        True,
    ),
    "a sum over one channel": (
        "a = Conv(x); g = Conv(x, out=1); s = Add(a, g); y = Conv(s)",
        "",
        True,
    ),
    "a gate": ("a = Conv(x); g = Tanh(a); m = Mul(a, g); y = Conv(m)", "", True),
    "a Softmax beside": (
        "a = Conv(x); b = Conv(a); p = Softmax(a, axis=1); y = Conv(b)",
        "b",
        True,
    ),
    "a Transpose": ("a = Conv(x); t = Transpose(a, perm=[0, 1, 3, 2]); y = Conv(t)", "", True),
    "a MatMul": ("w = Values([8, 8], 0, 1); a = Conv(x); m = MatMul(a, w); y = Conv(m)", "", True),
    "a head": ("a = Conv(x); h = Head(a); y = Conv(a)", "", True),
    # Tied to the picture, or to what the graph gives.
    "the picture": ("m = MaxPool(x, kernel_shape=[2, 2]); a = Conv(m); y = Conv(a)", "a", True),
    "a sum with the picture": ("a = Conv(x); s = Add(a, x); y = Conv(s)", "", True),
}


def uneven(graph: Graph) -> None:
    """Makes channels of very different width, the same all along the graph."""
    for layer in graph.layers():
        shape = [1] * graph.array(layer.weight).ndim
        shape[layer.axis] = -1
        count = graph.array(layer.weight).shape[layer.axis]
        graph.put(
            layer.weight,
            graph.floats(layer.weight)
            * np.geomspace(0.5, 2, count, dtype=np.float32).reshape(shape),
        )


def peaks_of(bench: Workbench, graph: Graph, frames: list[Pixels]) -> Peaks:
    """Of every float tensor that a node makes, by the shape that it has when it is run."""
    shapes = graph.shapes()
    names = [
        node.output[0]
        for node in graph.nodes
        if node.op_type not in ("Cast", "Transpose", "Head") and len(shapes[node.output[0]]) > 1
    ]
    found: Peaks = {}
    for pixels in frames:
        for name, values in bench.run(graph.model, pixels, *names).items():
            rows = np.abs(np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)).max(axis=1)
            found[name] = np.maximum(found.get(name, 0), rows.astype(np.float64))
    return found


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_same_outputs(bench: Workbench, name: str, balance: float) -> None:
    text, movable, _ = CASES[name]
    graph = bench.graph(text)
    uneven(graph)
    before = graph.model.SerializeToString()
    frames = bench.pictures(2)
    made, factors = equalize(graph, peaks_of(bench, graph, frames), balance=balance)
    assert graph.model.SerializeToString() == before
    assert set(factors) == set(movable.split())
    for pixels in bench.pictures(2, seed=1):
        wanted, found = bench.run(graph.model, pixels), bench.run(made.model, pixels)
        for output, values in wanted.items():
            assert np.abs(found[output] - values).max() <= 1e-4 * np.abs(values).max(), output


@pytest.mark.parametrize("name", CASES)
def test_what_tensors_were_divided_by(bench: Workbench, name: str) -> None:
    text, _, even = CASES[name]
    graph = bench.graph(text)
    uneven(graph)
    frames = bench.pictures(2)
    peaks = peaks_of(bench, graph, frames)
    made, factors = equalize(graph, peaks, balance=1.0)
    after = peaks_of(bench, made, frames)
    for tensor, values in peaks.items():
        factor = factors.get(tensor, np.ones(values.size))
        assert after[tensor] == pytest.approx(values / factor, rel=1e-4, abs=1e-3), tensor
        assert after[tensor].max() <= values.max() * (1 + 1e-4), tensor
        moved = factor != 1
        if even and tensor in factors:
            level = after[tensor][values > 0]
            assert level.min() > 0.99 * level.max(), tensor
            assert moved.sum() >= values.size - 2


def test_the_widest_of_tied_channels_decides(bench: Workbench) -> None:
    graph = bench.graph("a = Conv(x); b = Conv(x); s = Add(a, b); y = Conv(s)")
    frames = bench.pictures(2)
    peaks = peaks_of(bench, graph, frames)
    made, factors = equalize(graph, peaks, balance=1.0)
    assert np.array_equal(factors["a"], factors["b"])
    assert np.array_equal(factors["a"], factors["s"])
    after = peaks_of(bench, made, frames)
    widest = np.max([after[name] for name in "abs"], axis=0)
    assert widest.min() > 0.99 * widest.max()


def test_fixed_channels_stay_and_are_reached(bench: Workbench) -> None:
    # The first half of the Concat is also read by a Tanh, which minds.
    graph = bench.graph(
        "a = Conv(x); t = Tanh(a); b = Conv(x); c = Concat(a, b, axis=1); y = Conv(c, into=8)"
    )
    uneven(graph)
    frames = bench.pictures(2)
    peaks = peaks_of(bench, graph, frames)
    made, factors = equalize(graph, peaks, balance=1.0)
    assert set(factors) == {"b", "c"}
    assert np.array_equal(factors["c"][:4], np.ones(4))
    after = peaks_of(bench, made, frames)
    assert np.array_equal(after["a"], peaks["a"])
    assert np.array_equal(made.array("a.weight"), graph.array("a.weight"))
    assert after["b"] == pytest.approx(np.full(4, peaks["a"].max()), rel=0.01)


def test_dead_channels_stay(bench: Workbench) -> None:
    graph = bench.graph("a = Conv(x); r = Relu(a); y = Conv(r)")
    bias, weight = graph.floats("a.bias"), graph.floats("a.weight")
    bias[1], weight[1] = -1, 0
    graph.put("a.bias", bias)
    graph.put("a.weight", weight)
    kernel = graph.floats("y.weight")
    # And one that nobody looks at.
    kernel[:, 2] = 0
    graph.put("y.weight", kernel)
    peaks = {"r": np.array([1000.0, 0.0, 7.0, 0.5])}
    _, factors = equalize(graph, peaks, balance=1.0)
    assert factors["r"] == pytest.approx([1000 / 7, 1.0, 1.0, 0.5 / 7])
    _, factors = equalize(graph, {"r": np.array([1000.0, 0.0, 0.0, 0.5])}, balance=1.0)
    assert factors["r"] == pytest.approx([1.0, 1.0, 1.0, 1 / 1000], abs=1e-3)


def test_factors_are_limited(bench: Workbench) -> None:
    graph = bench.graph("a = Conv(x); y = Conv(a)")
    _, factors = equalize(graph, {"a": np.array([1e9, 1.0, 1e-9, 1e9])}, balance=1.0)
    assert factors["a"] == pytest.approx([1.0, 1e-3, 1e-3, 1.0])


def test_balance_evens_the_weights(bench: Workbench) -> None:
    graph = bench.graph("a = Conv(x); y = Conv(a)")
    weight = graph.floats("y.weight")
    weight *= np.array([1, 8, 64, 512], np.float32).reshape(1, 4, 1, 1)
    graph.put("y.weight", weight)
    made, _ = equalize(graph, {"a": np.array([1.0, 1.0, 1.0, 1.0])}, balance=0.0)
    relative = np.abs(made.array("y.weight"))[:, :, 0, 0]
    relative = relative / np.abs(weight).max(axis=(1, 2, 3))[:, None]
    widest = relative.max(axis=0)
    assert widest.min() > 0.99 * widest.max()


@pytest.mark.parametrize(
    "peaks", [{}, {"nowhere": np.ones(4)}, {"a": np.ones(3)}, {"a": np.zeros(0)}]
)
def test_nothing_known(bench: Workbench, peaks: Peaks) -> None:
    graph = bench.graph("a = Conv(x); y = Conv(a)")
    made, factors = equalize(graph, peaks)
    assert factors == {}
    assert made.model.SerializeToString() == graph.model.SerializeToString()


def test_streets(
    bench: Workbench,
    streets_graph: Graph,
    streets_peaks: Peaks,
    street_pictures: list[Pixels],
) -> None:
    made, factors = equalize(streets_graph, streets_peaks)
    # All but the centred picture and the sum behind the two gates.
    assert set(streets_peaks) - set(factors) == {"edgeseg.centred", "add_9"}
    name = "edgeseg.logits"
    wanted = bench.run(streets_graph.model, street_pictures[2], name)[name]
    found = bench.run(made.model, street_pictures[2], name)[name]
    assert np.abs(found - wanted).max() < 1e-4
    peak = {tensor: streets_peaks[tensor] / factor for tensor, factor in factors.items()}
    assert all(
        values.max() <= streets_peaks[tensor].max() * 1.0001 for tensor, values in peak.items()
    )
