"""Placement: each rule on a graph that has little else, and what holds for any graph."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

from edgeseg.calibration.graph import Graph
from edgeseg.calibration.placement import Placement, place
from edgeseg.errors import CalibrationError

if TYPE_CHECKING:
    from tests.calibration.conftest import Workbench

TWICE = "f = Floats([1, 1, 2, 2])"
# Two branches, 1x1 and 3x3, of what comes in.
BRANCHES = "a = Conv(x); b = Conv(x, kernel=3)"

# name -> lines, layers left in floating point, groups of tensors with one scale. Every net begins
# with the group "cast x", the picture before and after its Transpose, which is left out here.
CASES: dict[str, tuple[str, list[str], str]] = {
    "a chain": ("a = Conv(x); r = Relu(a); b = Conv(r, group=4); c = Deconv(b)", [], "r | b"),
    "Clip is fused": (
        "l = Values([], 0, 0); a = Conv(x); r = Clip(a, l); b = Conv(r)",
        [],
        "r",
    ),
    "no output of the last layer": ("a = Conv(x); r = Relu(a)", [], ""),
    "what is read twice": ("a = Conv(x); r = Relu(a); b = Conv(r); c = Conv(r)", [], "r"),
    # Sums.
    "residual with identity": (
        "a = Conv(x); r = Relu(a); b = Conv(r); s = Add(b, r); t = Relu(s); c = Conv(t)",
        [],
        "r | t",
    ),
    "residual that nobody else reads as int8": (
        "a = Conv(x); r = Relu(a); b = Conv(x); s = Add(r, b); c = Conv(s)",
        [],
        "r | s",
    ),
    "residual with two convolutions": (f"{BRANCHES}; s = Add(a, b); c = Conv(s)", [], "a | s"),
    "the heavier one first": (f"{BRANCHES}; s = Add(b, a); r = Relu(s); c = Conv(r)", [], "a | r"),
    "of which the heavier is a float": (f"{BRANCHES}; s = Add(a, b); c = Conv(s)", ["b"], "s"),
    "of which the lighter is a float": (f"{BRANCHES}; s = Add(a, b); c = Conv(s)", ["a"], "s"),
    "a convolution that others read": (
        f"{BRANCHES}; s = Add(a, b); c = Conv(s); d = Sigmoid(b)",
        [],
        "b | s",
    ),
    "a sum of neither": (
        "a = Conv(x); r = Relu(a); b = Conv(x); q = Relu(b); s = Add(r, q); c = Conv(s)",
        [],
        "r | q | s",
    ),
    "a sum of neither, one in floating point": (
        "a = Conv(x); r = Sigmoid(a); b = Conv(x); q = Relu(b); s = Add(r, q); c = Conv(s)",
        [],
        "s",
    ),
    "a sum that no layer reads": (f"{BRANCHES}; s = Add(a, b); t = Sigmoid(s)", [], ""),
    "a constant added": (
        "k = Values([1, 4, 1, 1], 0, 1); a = Conv(x); s = Add(a, k); c = Conv(s)",
        [],
        "s",
    ),
    "a sum of sums": (
        "a = Conv(x); b = Conv(a); s = Add(a, b); c = Conv(s); t = Add(c, s); d = Conv(t)",
        [],
        "a | s | t",
    ),
    # What int8 passes unchanged.
    "MaxPool before a layer": (
        "a = Conv(x); r = Relu(a); m = MaxPool(r, kernel_shape=[2, 2]); b = Conv(m)",
        [],
        "r m",
    ),
    "MaxPool beside a layer": (
        "a = Conv(x); m = MaxPool(a, kernel_shape=[2, 2], ceil_mode=1); b = Conv(a)",
        [],
        "a m",
    ),
    "nearest Resize": (
        f"{TWICE}; a = Conv(x); u = Resize(a, '', f, mode='nearest'); b = Conv(u)",
        [],
        "a u",
    ),
    "Flatten before a Gemm": (
        "a = Conv(x); p = GlobalAveragePool(a); f = Flatten(p); b = Linear(f)",
        [],
        "a | p f",
    ),
    "Concat": (
        f"{BRANCHES}; c = Concat(a, b, axis=1); d = Conv(c, into=8)",
        [],
        "a b c",
    ),
    "Concat of MaxPool": (
        "a = Conv(x); r = Relu(a); b = Conv(r); m = MaxPool(r, kernel_shape=[1, 1]); "
        "c = Concat(b, m, axis=1); d = Conv(c, into=8)",
        [],
        "r b m c",
    ),
    "residual behind a Transpose": (
        "a = Conv(x); r = Relu(a); t = Transpose(r, perm=[0, 1, 3, 2]); b = Conv(x); "
        "s = Add(b, t); c = Conv(s)",
        [],
        "r t | s",
    ),
    "residual behind a Concat": (
        "a = Conv(x, out=2); q = Conv(x, out=2); c = Concat(a, q, axis=1); b = Conv(x); "
        "s = Add(b, c); d = Conv(s)",
        [],
        "a q c | s",
    ),
    # Pooling: int8 on both sides, or on neither.
    "GlobalAveragePool": ("a = Conv(x); p = GlobalAveragePool(a); b = Conv(p)", [], "a | p"),
    "ReduceMean": (
        "n = Numbers([2, 3]); a = Conv(x); p = ReduceMean(a, n); b = Conv(p)",
        [],
        "a | p",
    ),
    "AveragePool of floats": (
        "a = Conv(x); g = Sigmoid(a); p = AveragePool(g, kernel_shape=[2, 2]); b = Conv(p)",
        [],
        "p",
    ),
    "AveragePool for floats": (
        "a = Conv(x); p = AveragePool(a, kernel_shape=[2, 2]); g = Sigmoid(p)",
        [],
        "",
    ),
    "linear Resize": (
        f"{TWICE}; a = Conv(x); u = Resize(a, '', f, mode='linear'); r = Relu(u); b = Conv(r)",
        [],
        "a | u | r",
    ),
    # Layers in floating point.
    "a float in the middle": (
        "a = Conv(x); r = Relu(a); b = Conv(r); q = Relu(b); c = Conv(q)",
        ["b"],
        "q",
    ),
    "a float beside": ("a = Conv(x); r = Relu(a); b = Conv(r); c = Conv(r)", ["b"], "r"),
    "a float at the end of a pool": (
        "a = Conv(x); m = MaxPool(a, kernel_shape=[2, 2]); b = Conv(m)",
        ["b"],
        "",
    ),
    "no layer of their kind": (
        "w = Values([8, 8], 0, 1); a = Conv(x); m = MatMul(a, w); b = Conv(m)",
        [],
        "m",
    ),
}


def groups(placement: Placement) -> str:
    return " | ".join(" ".join(tensors) for tensors in placement.groups().values())


@pytest.mark.parametrize("name", CASES)
def test_rules(bench: Workbench, name: str) -> None:
    text, floats, wanted = CASES[name]
    graph = bench.graph(text)
    placement = place(graph, floats=floats)
    expected = ["cast x", *([wanted] if wanted else [])]
    assert groups(placement) == " | ".join(expected)
    assert placement.floats == tuple(floats)
    names = [layer.name for layer in graph.layers()]
    assert [layer.name for layer in placement.layers] == [n for n in names if n not in floats]


def test_sites_in_graph_order_with_reasons(bench: Workbench) -> None:
    placement = place(bench.graph("a = Conv(x); m = MaxPool(a, kernel_shape=[2, 2]); b = Conv(m)"))
    assert [(site.tensor, site.group, site.reason) for site in placement.sites] == [
        ("cast", "cast", "Transpose x passes int8 through"),
        ("x", "cast", "input of a"),
        ("a", "a", "MaxPool m passes int8 through"),
        ("m", "a", "input of b"),
    ]


def test_nothing_left_to_quantize(bench: Workbench) -> None:
    placement = place(bench.graph("a = Conv(x)"), floats=["a"])
    assert placement == Placement(layers=(), sites=(), floats=("a",))


def test_unknown_float(bench: Workbench) -> None:
    with pytest.raises(CalibrationError, match=r"there is no layer c .*; the layers are a, b"):
        place(bench.graph("a = Conv(x); b = Conv(a)"), floats=["a", "c"])


def tensors(placement: Placement) -> set[str]:
    return {site.tensor for site in placement.sites}


def test_streets(streets_graph: Graph) -> None:
    placement = place(streets_graph)
    assert len(placement.layers) == 56
    assert len(placement.sites) == 57
    assert len(placement.groups()) == 54


def test_streets_floats_only_take_sites_away(streets_graph: Graph) -> None:
    full = tensors(place(streets_graph))
    names = [layer.name for layer in streets_graph.layers()]
    for name in names:
        assert tensors(place(streets_graph, floats=[name])) <= full, name
    rng = random.Random(0)
    for _ in range(100):
        floats = rng.sample(names, rng.randint(2, len(names)))
        assert tensors(place(streets_graph, floats=floats)) <= full, floats


def grown(rng: random.Random) -> str:
    """Lines of a random net."""
    made = ["x"]
    lines = [TWICE.replace("2", "1")]
    for index in range(rng.randint(5, 14)):
        one, other, target = rng.choice(made[-4:]), rng.choice(made[-5:]), f"t{index}"
        kernel = rng.choice((1, 3))
        kind = rng.choice(
            (
                f"Conv({one}, kernel={kernel}, group={rng.choice((1, 4))})",
                f"Conv({other}, kernel={kernel})",
                f"Deconv({one}, group=2)",
                f"Relu({one})",
                f"Relu({other})",
                f"Add({one}, {other})",
                f"Add({other}, {one})",
                f"Mul({one}, {other})",
                f"Sigmoid({one})",
                f"MaxPool({one}, kernel_shape=[1, 1])",
                f"AveragePool({one}, kernel_shape=[1, 1])",
                f"Concat({one}, {other}, axis=1)",
                f"Resize({one}, '', f, mode='{rng.choice(('nearest', 'linear'))}')",
                f"Transpose({one}, perm=[0, 1, 3, 2])",
            )
        )
        if kind.startswith("Concat"):
            lines.append(f"{target}c = {kind}")
            kind = f"Conv({target}c, into=8)"
        lines.append(f"{target} = {kind}")
        made.append(target)
    return "\n".join([*lines, "z = Conv(x)"])


def test_floats_only_take_sites_away(bench: Workbench) -> None:
    for seed in range(80):
        rng = random.Random(seed)
        text = grown(rng)
        graph = bench.graph(text)
        full = tensors(place(graph))
        names = [layer.name for layer in graph.layers()]
        for name in names:
            assert tensors(place(graph, floats=[name])) <= full, (name, text)
        for _ in range(4):
            floats = rng.sample(names, rng.randint(1, len(names)))
            assert tensors(place(graph, floats=floats)) <= full, (floats, text)
