"""The linter of Q/DQ placement: small graphs with one mistake each, and the same without it.

Graphs are written as lines of ``tensor = Operator(input, input)``; nodes are named after their
tensor. ``a@2`` is tensor ``a`` behind a Q and a DQ of scale 0.2, one pair for all who say so;
``a@1@2`` has two pairs in a row. Every graph passes ONNX's own checker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeseg.bundle import Bundle
from edgeseg.calibration import lint as module
from edgeseg.calibration.lint import Finding, Placement, lint

CHANNELS = 4
# The first that the reference evaluator has Q and DQ for.
OPSET = 19

WINDOW: dict[str, object] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
#: word in a graph -> operator, attributes, constants behind the inputs ("" for one left out)
WORDS: dict[str, tuple[str, dict[str, object], tuple[object, ...]]] = {
    "MaxPool": ("MaxPool", WINDOW, ()),
    "Down": ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}, ()),
    "AveragePool": ("AveragePool", WINDOW, ()),
    "Nearest": ("Resize", {"mode": "nearest"}, ("", np.array([1, 1, 2, 2], np.float32))),
    "Linear": ("Resize", {"mode": "linear"}, ("", np.array([1, 1, 2, 2], np.float32))),
    # Along the height, so that every tensor has the same number of channels.
    "Concat": ("Concat", {"axis": 2}, ()),
    "Transpose": ("Transpose", {"perm": [0, 1, 3, 2]}, ()),
    "Slice": ("Slice", {}, (np.array([1]), np.array([3]), np.array([2]))),
    "Reshape": ("Reshape", {}, (np.array([0, 0, -1, 1]),)),
    "ZeroPad": ("Pad", {}, (np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(0))),
    "OnePad": ("Pad", {}, (np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(1))),
    "Half": ("Cast", {"to": TensorProto.FLOAT16}, ()),
    "Single": ("Cast", {"to": TensorProto.FLOAT}, ()),
    "Twice": ("Mul", {}, (np.float32(2),)),
    "Plus": ("Add", {}, (np.float32(1),)),
    "BatchNormalization": (
        "BatchNormalization",
        {},
        tuple(np.ones(CHANNELS, np.float32) for _ in range(4)),
    ),
    "Softmax": ("Softmax", {"axis": 1}, ()),
    "Head": ("Head", {}, ()),
}


class Program:
    """The ONNX model of some lines. ``x`` and ``y`` are its inputs; what nobody reads is its
    output, and so is what ``outputs`` names."""

    def __init__(self, text: str, outputs: tuple[str, ...] = ()) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._made: list[str] = []
        self._read: set[str] = set()
        for line in text.strip().splitlines():
            for statement in line.split(";"):
                found = re.fullmatch(r"\s*(\w+) = (\w+)\(([^)]*)\)\s*", statement)
                assert found, statement
                self._statement(found[1], found[2], [part.strip() for part in found[3].split(",")])
        self._ends = [name for name in self._made if name not in self._read]
        self._ends += [self._resolve(name) for name in outputs]

    def model(self, *, checked: bool = True) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "program",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, CHANNELS, 8, 8])
                for name in ("x", "y")
            ],
            [helper.make_empty_tensor_value_info(name) for name in self._ends],
            list(self.constants.values()),
        )
        functions = []
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("edgeseg", 1)]
        if any(node.domain for node in self.nodes):
            body = [helper.make_node("ArgMax", ["logits"], ["classes"], axis=1)]
            functions.append(
                helper.make_function("edgeseg", "Head", ["logits"], ["classes"], body, opsets[:1])
            )
        model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=9)
        if not checked:
            return model
        # The checker wants the outputs' types, and knows how to find them.
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(inferred, full_check=True)
        return model

    def _statement(self, target: str, word: str, inputs: list[str]) -> None:
        names = [self._resolve(name) for name in inputs]
        self._made.append(target)
        if word.endswith("Conv"):
            names.append(self._weight(target, word))
            self._node("Conv", names, target, group=CHANNELS if word == "DepthwiseConv" else 1)
            return
        kind, attributes, constants = WORDS.get(word, (word, {}, ()))
        for index, value in enumerate(constants):
            names.append("" if isinstance(value, str) else f"{target}.{index}")
            if not isinstance(value, str):
                self._constant(names[-1], np.asarray(value))
        domain = "edgeseg" if word == "Head" else ""
        self._node(kind, names, target, domain=domain, **attributes)

    def _resolve(self, name: str) -> str:
        """The tensor that ``name`` says, with the pairs on the way to it."""
        if "@" not in name:
            self._read.add(name)
            return name
        before, scale = name.rsplit("@", 1)
        source = self._resolve(before)
        if all(name not in node.output for node in self.nodes):
            self.pair(source, name, np.float32(int(scale) / 10))
        return name

    def pair(self, source: str, target: str, scale: object, **attributes: object) -> None:
        values = np.asarray(scale, np.float32)
        self._constant(f"{target}.scale", values)
        self._constant(f"{target}.zero", np.zeros(values.shape, np.int8))
        constants = [f"{target}.scale", f"{target}.zero"]
        self._node("QuantizeLinear", [source, *constants], f"{target}.q", **attributes)
        self._node("DequantizeLinear", [f"{target}.q", *constants], target, **attributes)

    def _weight(self, layer: str, word: str) -> str:
        shape = (CHANNELS, 1 if word == "DepthwiseConv" else CHANNELS, 1, 1)
        values = np.random.default_rng(len(self.nodes)).normal(size=shape).astype(np.float32)
        name = f"{layer}.weight"
        if word == "FloatConv":
            self._constant(name, values)
        elif word == "StoredConv":
            self._constant(f"{name}.int8", np.full(shape, 3, np.int8))
            self._constant(f"{name}.scale", np.full(CHANNELS, 0.5, np.float32))
            self._node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], name, axis=0)
        elif word == "TensorConv":
            self._constant(f"{name}.float", values)
            self.pair(f"{name}.float", name, 0.5)
        else:
            self._constant(f"{name}.float", values)
            axis = 1 if word == "WrongAxisConv" else 0
            self.pair(f"{name}.float", name, np.full(CHANNELS, 0.5), axis=axis)
        return name

    def _constant(self, name: str, values: NDArray[np.generic]) -> None:
        self.constants[name] = numpy_helper.from_array(np.asarray(values), name)

    def _node(self, kind: str, inputs: list[str], target: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [target], target, **attributes))


def program(text: str, *outputs: str) -> ModelProto:
    return Program(text, outputs).model()


def summary(placement: Placement) -> list[str]:
    """One finding per entry: ``rule tensor->node`` and what it counts as: an avoidable or an
    inherent reformat, or "other"."""
    return [
        f"{found.rule} {found.tensor}->{found.node} "
        + (
            "other"
            if not found.count_as_reformat
            else "avoidable"
            if found.avoidable
            else "inherent"
        )
        for found in placement.findings
    ]


# name -> lines, findings, quantized layers, layers
CASES: dict[str, tuple[str, list[str], str]] = {
    # Nothing to say.
    "no Q/DQ": ("a = FloatConv(x); r = Relu(a); b = FloatConv(r); s = Sigmoid(b)", [], "0/2"),
    "a chain": ("a = Conv(x@1); r = Relu(a); b = DepthwiseConv(r@2)", [], "2/2"),
    "stored weights": ("a = StoredConv(x@1); r = Clip(a); b = StoredConv(r@2)", [], "2/2"),
    "after preprocessing": (
        "h = Half(x); f = Single(h); m = Twice(f); p = Plus(m); a = Conv(p@1); b = Conv(a@2)",
        [],
        "2/2",
    ),
    "into the head": ("a = Conv(x@1); h = Head(a)", [], "1/1"),
    # 1: all inputs of a layer with weights.
    "only the activation": ("a = FloatConv(x@1)", ["partial x->a avoidable"], "0/1"),
    "only the weight": ("a = Conv(x)", ["partial x->a other"], "0/1"),
    "only the weight, in the middle": (
        "a = Conv(x@1); r = Relu(a); b = Conv(r); c = Conv(b@2)",
        ["partial r->b avoidable"],
        "2/3",
    ),
    "a product of activations": ("m = MatMul(x@1, y@2); a = Conv(m@3)", [], "1/1"),
    "a product with one side": (
        "m = MatMul(x@1, y); a = Conv(m@3)",
        ["partial y->m other"],
        "1/1",
    ),
    # 2: weights.
    "one scale for a weight": ("a = TensorConv(x@1)", ["per-tensor a.weight->a other"], "1/1"),
    "scales along inputs": ("a = WrongAxisConv(x@1)", ["weight-axis a.weight->a other"], "1/1"),
    # 3: Q where fusion would have been.
    "Q before the batch norm": (
        "a = Conv(x@1); n = BatchNormalization(a@2); r = Relu(n); b = Conv(r@3)",
        ["fusion a->n avoidable"],
        "2/2",
    ),
    "Q between batch norm and Relu": (
        "a = Conv(x@1); n = BatchNormalization(a); r = Relu(n@2); b = Conv(r@3)",
        ["fusion n->r avoidable"],
        "2/2",
    ),
    "Q behind all of it": (
        "a = Conv(x@1); n = BatchNormalization(a); r = Clip(n); b = Conv(r@3)",
        [],
        "2/2",
    ),
    "Q where two read": (
        "a = Conv(x@1); r = Relu(a@2); b = Conv(r@3); c = Conv(a@2)",
        [],
        "3/3",
    ),
    "Q before the residual sum": (
        "a = Conv(x@1); b = Conv(a@2); s = Add(b@3, a@2); c = Conv(s@4)",
        ["fusion b->s avoidable"],
        "3/3",
    ),
    # 4: residual sums.
    "residual": (
        "a = Conv(x@1); b = Conv(a@2); s = Add(b, a@2); r = Relu(s); c = Conv(r@3)",
        [],
        "3/3",
    ),
    "residual not quantized": (
        "a = Conv(x@1); b = Conv(a@2); s = Add(b, a); r = Relu(s); c = Conv(r@3)",
        ["residual a->s avoidable"],
        "3/3",
    ),
    "two convolutions, neither quantized": (
        "a = Conv(x@1); b = Conv(x@1); s = Add(a, b); c = Conv(s@2)",
        ["residual b->s avoidable"],
        "3/3",
    ),
    "two convolutions, one quantized": (
        "a = Conv(x@1); b = Conv(x@1); s = Add(a@3, b); c = Conv(s@2)",
        [],
        "3/3",
    ),
    "residual that is made in floating point": (
        "a = Conv(x@1); g = Sigmoid(y); s = Add(g, a); c = Conv(s@2)",
        ["residual g->s inherent"],
        "2/2",
    ),
    "a sum that no int8 layer reads": ("a = Conv(x@1); s = Add(a, y); h = Head(s)", [], "1/1"),
    # 5: Concat.
    "Concat, one scale": (
        "a = Conv(x@1); b = Conv(x@1); t = Concat(a@2, b@2); c = Conv(t@2)",
        [],
        "3/3",
    ),
    "Concat, Q behind it only": (
        "a = Conv(x@1); b = Conv(x@1); t = Concat(a, b); c = Conv(t@2)",
        [],
        "3/3",
    ),
    "Concat, DQ before it only": (
        "a = Conv(x@1); b = Conv(x@1); t = Concat(a@2, b@2); c = Conv(t)",
        [],
        "3/3",
    ),
    "Concat, three scales": (
        "a = Conv(x@1); b = Conv(x@1); t = Concat(a@2, b@3); c = Conv(t@4)",
        ["concat a->t avoidable", "concat b->t avoidable"],
        "3/3",
    ),
    "Concat, another scale behind": (
        "a = Conv(x@1); b = Conv(x@1); t = Concat(a@2, b@2); c = Conv(t@4)",
        ["requantize t->t@4.q avoidable"],
        "3/3",
    ),
    "Concat, one input in floating point": (
        "a = Conv(x@1); b = Conv(x@1); t = Concat(a@2, b); c = Conv(t@2)",
        ["concat b->t avoidable"],
        "3/3",
    ),
    "Concat with what is made in floating point": (
        "a = Conv(x@1); g = Sigmoid(y); t = Concat(a@2, g); c = Conv(t@2)",
        ["concat g->t inherent"],
        "2/2",
    ),
    "Concat, scales differ and nobody cares": (
        "a = FloatConv(x); b = FloatConv(y); t = Concat(a, b); h = Head(t)",
        [],
        "0/2",
    ),
    "dense block": (
        """a = Conv(x@1); r = Relu(a)
        b = Conv(r@2); s = Relu(b); t = Concat(r@2, s@2)
        c = Conv(t@2); u = Relu(c); v = Concat(r@2, s@2, u@2); d = Conv(v@2)""",
        [],
        "4/4",
    ),
    "dense block without one scale": (
        """a = Conv(x@1); r = Relu(a)
        b = Conv(r@2); s = Relu(b); t = Concat(r, s); c = Conv(t@3)""",
        ["scales r->t avoidable"],
        "3/3",
    ),
    "stem": (
        """a = Conv(x@1); r = Relu(a); b = Conv(r@2); s = Relu(b)
        m = MaxPool(r@2); t = Concat(s@2, m@2); c = Conv(t@2)""",
        [],
        "3/3",
    ),
    "stem with the Q behind Concat only": (
        """a = Conv(x@1); r = Relu(a); b = Conv(r@2); s = Relu(b)
        m = MaxPool(r); t = Concat(s, m); c = Conv(t@3)""",
        ["scales r->m avoidable"],
        "3/3",
    ),
    # 6: layers without weights.
    **{
        f"{word}, {where}": (f"a = Conv(x@1); m = {word}({before}); c = Conv({behind})", [], "2/2")
        for word in ("MaxPool", "Nearest", "Transpose", "Slice", "Reshape", "ZeroPad", "Identity")
        for where, before, behind in (
            ("Q behind", "a", "m@2"),
            ("DQ before", "a@2", "m"),
            ("both", "a@2", "m@2"),
        )
    },
    **{
        f"{word}, {where}": (f"a = Conv(x@1); m = {word}({before}); c = Conv({behind})", found, n)
        for word in (
            "AveragePool",
            "GlobalAveragePool",
            "ReduceMean",
            "Linear",
            "OnePad",
        )
        for where, before, behind, found, n in (
            ("both", "a@2", "m@3", [], "2/2"),
            ("no Q before", "a", "m@3", ["float-between a->m avoidable"], "2/2"),
            ("no Q behind", "a@2", "m", ["partial m->c avoidable"], "1/2"),
        )
    },
    "two poolings without Q between": (
        "a = Conv(x@1); m = AveragePool(a@2); n = Linear(m); c = Conv(n@3)",
        ["float-between a->m avoidable"],
        "2/2",
    ),
    "elementwise sum": (
        "a = Conv(x@1); r = Relu(a); b = Conv(x@1); s = Relu(b); t = Add(r@2, s@3); c = Conv(t@4)",
        [],
        "3/3",
    ),
    "elementwise sum, one input": (
        "a = Conv(x@1); r = Relu(a); b = Conv(x@1); s = Relu(b); t = Add(r@2, s); c = Conv(t@4)",
        ["float-between s->t avoidable"],
        "3/3",
    ),
    "elementwise sum, floating point behind": (
        "a = Conv(x@1); r = Relu(a); b = Conv(x@1); s = Relu(b); t = Add(r@2, s@3); h = Head(t)",
        ["unused-pair r->t avoidable", "unused-pair s->t avoidable"],
        "2/2",
    ),
    "pooled context": (
        """a = Conv(x@1); r = Relu(a); m = ReduceMean(r@2); b = Conv(m@3); s = Relu(b)
        t = Add(s@4, r@2); c = Conv(t@5)""",
        [],
        "3/3",
    ),
    "gate": (
        """a = Conv(x@1); d = Down(x@1); b = Conv(d); s = Sigmoid(b); n = Nearest(s)
        g = Mul(a, n); c = Conv(g@2)""",
        [
            "float-between b->s inherent",
            "float-between a->g inherent",
            "float-between g->g@2.q inherent",
        ],
        "3/3",
    ),
    "gate with a pooling before": (
        "a = Conv(x@1); p = AveragePool(a); s = Sigmoid(y); g = Mul(p, s); c = Conv(g@2)",
        ["float-between a->p inherent", "float-between g->g@2.q inherent"],
        "2/2",
    ),
    "gate at the end": ("a = Conv(x@1); s = Sigmoid(a); g = Mul(s, a); h = Head(g)", [], "1/1"),
    "gate with Q/DQ inside": (
        "a = Conv(x@1); s = Sigmoid(a@2); c = Conv(s@3)",
        ["unused-pair a->s avoidable", "float-between s->s@3.q inherent"],
        "2/2",
    ),
    "Softmax": (
        "a = Conv(x@1); s = Softmax(a); c = Conv(s@3)",
        ["float-between a->s inherent", "float-between s->s@3.q inherent"],
        "2/2",
    ),
    "swish": ("a = Conv(x@1); s = Sigmoid(a); g = Mul(a, s); c = Conv(g@2)", [], "2/2"),
    "swish of a depthwise convolution": (
        "a = DepthwiseConv(x@1); s = Sigmoid(a); g = Mul(a, s); c = Conv(g@2)",
        [
            "float-between a->s inherent",
            "float-between a->g inherent",
            "float-between g->g@2.q inherent",
        ],
        "2/2",
    ),
    "through fp16": (
        "a = Conv(x@1); h = Half(a); s = Sigmoid(h); f = Single(s); c = Conv(f@2)",
        ["float-between a->h inherent", "float-between s->f inherent"],
        "2/2",
    ),
    "a layer left in floating point": (
        "a = Conv(x@1); r = Relu(a); b = FloatConv(r); s = Relu(b); c = Conv(s@2)",
        ["float-between r->b inherent", "float-between s->s@2.q inherent"],
        "2/3",
    ),
    # 7: one tensor, several readers.
    "one pair for two": ("a = Conv(x@1); b = Conv(a@2); c = Conv(a@2)", [], "3/3"),
    "two scales for two": (
        "a = Conv(x@1); b = Conv(a@2); c = Conv(a@3)",
        ["scales a->a@3.q avoidable"],
        "3/3",
    ),
    "three scales": (
        "a = Conv(x@1); b = Conv(a@2); c = Conv(a@3); d = Conv(a@4); e = Conv(a@4)",
        ["scales a->a@3.q avoidable", "scales a->a@4.q avoidable"],
        "5/5",
    ),
    "a reader in floating point": (
        "a = Conv(x@1); b = Conv(a@2); h = Head(a)",
        ["float-reader a->h inherent"],
        "2/2",
    ),
    "a reader in floating point, of the DQ": (
        "a = Conv(x@1); b = Conv(a@2); h = Head(a@2)",
        ["float-reader a->h inherent"],
        "2/2",
    ),
    "a layer left in floating point beside another": (
        "a = Conv(x@1); b = Conv(a@2); c = FloatConv(a)",
        ["float-reader a->c inherent"],
        "2/3",
    ),
    "a reader that could be int8": (
        "a = Conv(x@1); b = Conv(a@2); m = AveragePool(a); c = Conv(m@3)",
        ["float-between a->m avoidable"],
        "3/3",
    ),
    "a reader behind a pooling": (
        "a = Conv(x@1); b = Conv(a@2); m = MaxPool(a@2); s = Sigmoid(m)",
        ["float-reader m->s inherent"],
        "2/2",
    ),
    "a pooling with an int8 and a floating point reader": (
        "a = Conv(x@1); m = MaxPool(a); b = Conv(m@2); s = Sigmoid(m)",
        ["float-between a->m avoidable"],
        "2/2",
    ),
    "the same, mended": (
        "a = Conv(x@1); m = MaxPool(a@2); b = Conv(m@2); s = Sigmoid(m)",
        ["float-reader m->s inherent"],
        "2/2",
    ),
    # 8: pairs in a row.
    "the same pair twice": ("a = Conv(x@1); c = Conv(a@2@2)", [], "2/2"),
    "the same pair around a MaxPool": (
        "a = Conv(x@1); m = MaxPool(a@2); t = Transpose(m@2); c = Conv(t@2)",
        [],
        "2/2",
    ),
    "another scale": (
        "a = Conv(x@1); c = Conv(a@2@3)",
        ["requantize a->a@2@3.q avoidable"],
        "2/2",
    ),
    "another scale behind a MaxPool": (
        "a = Conv(x@1); m = MaxPool(a@2); c = Conv(m@3)",
        ["requantize m->m@3.q avoidable"],
        "2/2",
    ),
    "another scale into a Concat": (
        "a = Conv(x@1); b = Conv(a@2); m = MaxPool(a@2@3); t = Concat(m, b@3); c = Conv(t@3)",
        ["requantize a->a@2@3.q inherent"],
        "3/3",
    ),
    # 10: the ends of the graph.
    "a pair before the head": (
        "a = Conv(x@1); h = Head(a@2)",
        ["unused-pair a->h avoidable"],
        "1/1",
    ),
    "moved up to the input": ("t = Transpose(x); a = Conv(t@1)", [], "1/1"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_rule(name: str) -> None:
    text, findings, layers = CASES[name]
    model = program(text)
    before = model.SerializeToString(deterministic=True)
    placement = lint(model)
    assert summary(placement) == findings
    assert f"{placement.quantized}/{placement.weighted}" == layers
    assert model.SerializeToString(deterministic=True) == before
    check(placement)
    assert lint(ModelProto.FromString(before)) == placement


def check(placement: Placement) -> None:
    """What holds for every placement."""
    counted = [found for found in placement.findings if found.count_as_reformat]
    assert placement.reformats == len(counted)
    assert placement.reformats == len({(found.tensor, found.node) for found in counted})
    assert placement.avoidable == sum(found.avoidable for found in counted)
    assert 0 <= placement.quantized <= placement.weighted
    for found in placement.findings:
        # One sentence that has a reason, or says what to do.
        assert re.fullmatch(r"[^.;]+([.]\w[^.;]*)*[;,] [^;]+", found.text), found.text
        assert not found.text.endswith(".")
    written = json.loads(json.dumps(placement.to_dict()))
    assert (
        Placement(
            **{**written, "findings": tuple(Finding(**found) for found in written["findings"])}
        )
        == placement
    )
    lines = placement.lines()
    assert len(lines) == 2 + 2 * len(placement.findings)
    for line in lines:
        assert line.isprintable()
        assert line == line.rstrip()
        # Read on a terminal: no Markdown.
        assert not set(line) & set("*`|#")


def test_a_graph_output_is_a_reader() -> None:
    text = "a = Conv(x@1); b = Conv(a@2)"
    assert summary(lint(program(text, "a"))) == ["float-reader a->a inherent"]
    assert summary(lint(program("a = Conv(x@1)", "a@2"))) == ["unused-pair a->a@2 avoidable"]


Change = Callable[[Program], None]


def _constants(**values: object) -> Change:
    """Replaces constants of the pair x@1 (scale, zero), or all that end in such a word."""

    def change(made: Program) -> None:
        for word, value in values.items():
            name = f"x@1.{word}"
            made.constants[name] = numpy_helper.from_array(np.asarray(value), name)

    return change


def _unsigned(made: Program) -> None:
    _constants(zero=np.uint8(128))(made)


def _without_zero(made: Program) -> None:
    for node in made.nodes:
        if node.output[0] in ("x@1.q", "x@1"):
            del node.input[2:]


def _computed(word: str) -> Change:
    """The scale or zero point of x@1 comes out of a node that reads the picture."""

    def change(made: Program) -> None:
        name = f"x@1.{word}"
        del made.constants[name]
        to = TensorProto.FLOAT if word == "scale" else TensorProto.INT8
        made.nodes[:0] = [
            helper.make_node("ReduceMax", ["x"], [f"{word}.max"], f"{word}.max", keepdims=0),
            helper.make_node("Cast", [f"{word}.max"], [name], f"{word}.cast", to=to),
        ]

    return change


def _other_dequantizer_scale(made: Program) -> None:
    made.constants["other"] = numpy_helper.from_array(np.float32(0.7).reshape(()), "other")
    next(node for node in made.nodes if node.output[0] == "x@1").input[1] = "other"


def _bias(made: Program) -> None:
    made.constants["bias.int32"] = numpy_helper.from_array(
        np.ones(CHANNELS, np.int32), "bias.int32"
    )
    made.constants["bias.scale"] = numpy_helper.from_array(np.float32(1).reshape(()), "bias.scale")
    convolution = made.nodes.pop()
    convolution.input.append("bias")
    made.nodes += [
        helper.make_node("DequantizeLinear", ["bias.int32", "bias.scale"], ["bias"], "bias"),
        convolution,
    ]


def _no_dequantizer(made: Program) -> None:
    """A MaxPool reads the integers; a DQ comes behind it."""
    at = next(at for at, node in enumerate(made.nodes) if node.output[0] == "x@1")
    made.nodes[at].input[0] = "pooled"
    made.nodes.insert(
        at, helper.make_node("MaxPool", ["x@1.q"], ["pooled"], "pooled", kernel_shape=[1, 1])
    )


def _no_quantizer(made: Program) -> None:
    """The integers come out of a Cast."""
    at = next(at for at, node in enumerate(made.nodes) if node.output[0] == "x@1.q")
    made.nodes[at] = helper.make_node("Cast", ["x"], ["x@1.q"], "cast", to=TensorProto.INT8)


#: what is done to ``a = Conv(x@1)``, the findings then, the number of quantized layers
MISTAKES: dict[str, tuple[Change, list[str], int]] = {
    "none": (_constants(), [], 1),
    "a vector of one scale": (_constants(scale=[np.float32(1)], zero=[np.int8(0)]), [], 1),
    "zero point": (_constants(zero=np.int8(3)), ["zero-point x->x@1.q other"], 0),
    "unsigned": (_unsigned, ["type x->x@1.q other"], 0),
    "unsigned by default": (_without_zero, ["type x->x@1.q other"], 0),
    "computed zero point": (_computed("zero"), ["zero-point x->x@1.q other"], 0),
    "computed scale": (_computed("scale"), ["scale x->x@1.q other"], 1),
    "scale of 0": (_constants(scale=np.float32(0)), ["scale x->x@1.q other"], 1),
    "negative scale": (_constants(scale=np.float32(-1)), ["scale x->x@1.q other"], 1),
    "scale that is no number": (_constants(scale=np.float32("nan")), ["scale x->x@1.q other"], 1),
    "per channel": (
        _constants(scale=np.ones(CHANNELS, np.float32), zero=np.zeros(CHANNELS, np.int8)),
        ["per-channel x->x@1.q other"],
        1,
    ),
    "Q and DQ disagree": (_other_dequantizer_scale, ["scale x@1.q->x@1 other"], 1),
    "bias": (_bias, ["bias bias->a other"], 1),
    "no DQ": (_no_dequantizer, ["q-without-dq x@1.q->pooled other"], 1),
    "no Q": (_no_quantizer, ["dq-without-q x@1.q->x@1 other"], 1),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_pair_must_be(name: str) -> None:
    change, findings, quantized = MISTAKES[name]
    made = Program("a = Conv(x@1)")
    change(made)
    placement = lint(made.model())
    assert summary(placement) == findings
    assert (placement.quantized, placement.reformats) == (quantized, 0)
    check(placement)


def test_a_quantizer_that_nobody_reads() -> None:
    made = Program("a = Conv(x@1)")
    made.nodes.append(
        helper.make_node("QuantizeLinear", ["a", "x@1.scale", "x@1.zero"], ["q"], "q")
    )
    assert summary(lint(made.model())) == ["q-without-dq q->q other"]


@pytest.mark.parametrize(
    ("kind", "shape", "axis", "attributes", "good"),
    [
        ("Conv", (6, 4, 1, 1), 0, {}, True),
        ("Conv", (6, 4, 1, 1), -4, {}, True),
        ("Conv", (6, 4, 1, 1), 1, {}, False),
        ("ConvTranspose", (4, 6, 1, 1), 1, {}, True),
        ("ConvTranspose", (4, 6, 1, 1), 0, {}, False),
        ("Gemm", (4, 6), 1, {}, True),
        ("Gemm", (6, 4), 0, {"transB": 1}, True),
        ("Gemm", (6, 4), 1, {"transB": 1}, False),
        ("MatMul", (4, 6), 1, {}, True),
        ("MatMul", (4, 6), 0, {}, False),
    ],
)
def test_output_channels(
    kind: str, shape: tuple[int, ...], axis: int, attributes: dict[str, Any], good: bool
) -> None:
    made = Program("a = Conv(x@1)")
    del made.nodes[2:]
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    made.constants["w"] = numpy_helper.from_array(weight, "w")
    made.pair("w", "weight", np.full(shape[axis], 0.1), axis=axis)
    name = "x@1"
    if len(shape) == 2:
        # Gemm wants rows of 4.
        made.constants["rows"] = numpy_helper.from_array(np.array([-1, 4]), "rows")
        made.nodes.append(helper.make_node("Reshape", ["x@1", "rows"], ["flat"], "flat"))
        name = "flat"
    made.nodes.append(helper.make_node(kind, [name, "weight"], ["a"], "a", **attributes))
    model = made.model()
    output = evaluated(model)
    # The axis is that of the output's channels, as ONNX computes them.
    assert output.shape[1] == 6
    placement = lint(model)
    assert summary(placement) == ([] if good else ["weight-axis weight->a other"])
    assert (placement.quantized, placement.weighted) == (1, 1)


def evaluated(model: ModelProto) -> NDArray[np.float32]:
    """The first output of ``model`` for random pictures, by ONNX's reference evaluator."""
    random = np.random.default_rng(1)
    pictures = {
        entry.name: random.normal(size=(1, CHANNELS, 8, 8)).astype(np.float32)
        for entry in model.graph.input
    }
    outputs: list[Any] = list(ReferenceEvaluator(model).run(None, pictures))
    return np.asarray(outputs[0])


@pytest.mark.parametrize(
    ("word", "moves"),
    [
        *(
            (word, True)
            for word in ("MaxPool", "Nearest", "Transpose", "Slice", "Reshape", "ZeroPad")
        ),
        *((word, False) for word in ("AveragePool", "Linear", "OnePad", "Sigmoid", "ReduceMean")),
    ],
)
def test_a_pair_moves_through_what_gives_the_same_integers(word: str, moves: bool) -> None:
    """ONNX's reference evaluator agrees on which operators Q and DQ may pass."""
    models = [program(f"m = {word}(x@3)"), program(f"m = {word}(x); i = Identity(m@3)")]
    before, behind = (evaluated(model) for model in models)
    assert np.array_equal(before, behind) == moves
    placement = lint(program(f"a = Conv(y@1); m = {word}(a); c = Conv(m@3)"))
    assert (placement.reformats == 0) == moves


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs(seed: int) -> None:
    """Whatever is quantized, and however, an edge is counted once; shapes do not matter here."""
    random = np.random.default_rng(seed)
    kinds = ["Conv", "FloatConv", "Relu", "Add", "Mul", "Concat", "Sigmoid", "Head", "Identity"]
    kinds += ["MaxPool", "AveragePool", "Nearest", "Linear", "MatMul", "Twice", "Half"]
    for _ in range(40):
        tensors, lines = ["x", "y"], []
        for at in range(int(random.integers(3, 25))):
            kind = str(random.choice(kinds))
            reads = [
                str(random.choice(tensors[-6:])) + str(random.choice(["", "@1", "@2", "@2@1"]))
                for _ in range(2 if kind in ("Add", "Mul", "Concat", "MatMul") else 1)
            ]
            lines.append(f"t{at} = {kind}({', '.join(reads)})")
            tensors.append(f"t{at}")
        text = "; ".join(lines)
        placement = lint(Program(text).model(checked=False))
        check(placement)


def test_the_table_of_rules_is_complete() -> None:
    table = set(re.findall(r"^([a-z-]+)  +\S", module.__doc__ or "", re.MULTILINE))
    seen = {found.split()[0] for _, findings, _ in CASES.values() for found in findings}
    seen |= {found.split()[0] for _, findings, _ in MISTAKES.values() for found in findings}
    assert seen == table


def test_names_are_not_needed() -> None:
    model = program(CASES["gate"][0])
    wanted = summary(lint(model))
    for node in model.graph.node:
        node.name = ""
    assert summary(lint(model)) == wanted


def test_order_of_the_initializers_does_not_matter() -> None:
    model = program(CASES["dense block without one scale"][0])
    placement = lint(model)
    backwards = list(model.graph.initializer)[::-1]
    del model.graph.initializer[:]
    model.graph.initializer.extend(backwards)
    assert lint(model) == placement


def test_constants_behind_nodes_are_constants() -> None:
    """Scales from Constant nodes, weights stored as fp16 behind a Cast."""
    made = Program("a = Conv(x@1)")
    scale = made.constants.pop("x@1.scale")
    weight = numpy_helper.to_array(made.constants.pop("a.weight.float"))
    made.constants["half"] = numpy_helper.from_array(weight.astype(np.float16), "half")
    made.nodes[:0] = [
        helper.make_node("Constant", [], ["x@1.scale"], "scale", value=scale),
        helper.make_node("Cast", ["half"], ["a.weight.float"], "cast", to=TensorProto.FLOAT),
    ]
    placement = lint(made.model())
    assert placement == Placement(1, 1, (), 0, 0)


def test_lines() -> None:
    assert lint(program("a = Conv(x@1)")).lines() == [
        "1 of 1 layers with weights have int8 at all inputs",
        "0 reformats in TensorRT, none avoidable",
    ]
    # What can be mended comes first, though it is later in the graph.
    lines = lint(program("a = Conv(x@1); s = Sigmoid(a); b = Conv(s@2); n = Relu(b@3)")).lines()
    assert lines[:3] == [
        "2 of 2 layers with weights have int8 at all inputs",
        "3 reformats in TensorRT, 1 avoidable",
        "  fusion (reformat, avoidable): b -> n",
    ]
    assert lines[3] == (
        "    TensorRT would fuse Relu n into Conv b, and the Q/DQ between them makes it a kernel "
        "of its own; quantize the output of Relu n instead"
    )
    assert [line for line in lines[4:] if not line.startswith("    ")] == [
        "  float-between (reformat, inherent): a -> s",
        "  float-between (reformat, inherent): s -> s@2.q",
    ]


def test_the_shipped_model_is_not_quantized() -> None:
    model = onnx.load(Bundle.open("streets").model_path)
    placement = lint(model)
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    assert placement == Placement(0, convolutions, (), 0, 0)
    assert convolutions > 50
