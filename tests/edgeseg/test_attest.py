"""Attestation, on inspector JSON in the layouts of several releases, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from edgeseg.bundle import Bundle
from edgeseg.engine.attest import Attestation, Promise, engine_layers
from edgeseg.engine.graph import Graph

HALF = "Channel major FP16 format where channel % 8 == 0"
INT8 = "Thirty-two wide channel vectorized row major Int8 format"
FLOAT = "Row major linear FP32"


def old_tensor(kind: str) -> dict[str, Any]:
    """A tensor as 8.6 to 10.x describe it."""
    return {"Name": "t", "Location": "Device", "Dimensions": [1, 8, 4, 4], "Format/Datatype": kind}


def new_tensor(kind: str) -> dict[str, Any]:
    """A tensor whose type stands apart from its layout."""
    return {"Name": "t", "Dimensions": [1, 8, 4, 4], "Format": "N/A", "Datatype": kind}


def convolution(name: str, weights: str, tensor: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [tensor],
        "Outputs": [tensor],
        "ParameterType": "Convolution",
        "Kernel": [3, 3],
        "Weights": {"Type": weights, "Count": 9},
        "TacticName": "sm80_xmma_fprop_implicit_gemm",
        **more,
    }


def layer(name: str, kind: str, *tensors: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Inputs": list(tensors), "Outputs": [], **more}


def old(*layers: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["image", "class_map"]})


def new(*layers: Any) -> str:
    tensor = {"Name": "image", "IOMode": "Input", "DataType": "UInt8", "Dimensions": [1, 4, 4, 3]}
    return json.dumps({"Layers": layers, "I/O Tensors": [tensor], "ProfilingVerbosity": "DETAILED"})


def promise(
    plugins: Mapping[str, str] | None = None, *, dla: bool = False, **wanted: Any
) -> Promise:
    return Promise(wanted, plugins or {}, dla)


REFORMAT = layer(
    "Reformatting CopyNode for Input Tensor 0 to a + relu", "Reformat", old_tensor(FLOAT),
    ParameterType="Reformat", Origin="REFORMAT",
)  # fmt: skip
QUANTIZE = layer(
    "image.quantize", "Reformat", old_tensor(FLOAT), ParameterType="Reformat", Origin="QDQ"
)


# --- reading


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (FLOAT, "fp32"),
        (HALF, "fp16"),
        (INT8, "int8"),
        ("Four wide channel vectorized row major Int8 format.", "int8"),
        ("Channel major INT8 format where channel % 16 == 0", "int8"),
        ("Row major linear FP16 format", "fp16"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("Int8", "int8"),
        ("BFloat16", "bf16"),
        ("Row major linear BFloat16 format", "bf16"),
        ("Row major linear FP8 format", "fp8"),
        ("Row major linear UInt8 format", None),
        ("Row major linear Int32", None),
        ("Bool", None),
        ("Unknown format", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("tensor", [old_tensor, new_tensor])
def test_type_of_a_layer_without_weights_is_its_inputs(
    tensor: Any, kind: str, precision: str | None
) -> None:
    (found,) = engine_layers(new(layer("pool", "CudaPooling", tensor(kind)))) or ()
    assert (found.role, found.precision) == ("other", precision)


@pytest.mark.parametrize(
    ("weights", "precision"),
    [("Int8", "int8"), ("Half", "fp16"), ("Float", "fp32"), ("FP16", "fp16"), ("FP32", "fp32")],
)
def test_type_of_a_convolution_is_its_weights(weights: str, precision: str) -> None:
    # The first layer of a quantized network may read another type than it computes in.
    (found,) = engine_layers(old(convolution("a", weights, old_tensor(HALF)))) or ()
    assert (found.role, found.precision) == ("compute", precision)


@pytest.mark.parametrize(
    ("entry", "role"),
    [
        (REFORMAT, "reformat"),
        (QUANTIZE, "other"),
        (layer("x", "NoOp"), "other"),
        (layer("x", "CaskDeconvolutionV2", ParameterType="Convolution"), "compute"),
        (layer("x", "CaskGemmConvolution"), "compute"),
        (layer("x", "gemm"), "compute"),
        (layer("x", "MatrixMultiply"), "compute"),
        (layer("x", "kgen"), "other"),
        (layer("x", "CaskPooling", ParameterType="Pooling"), "other"),
        (layer("x", "PluginV3"), "plugin"),
        (layer("x", "PluginV2", PluginType="EfficientNMS_TRT"), "plugin"),
        (layer("{ForeignNode[a...b]}", "DLA"), "dla"),
    ],
)
def test_roles(entry: Mapping[str, Any], role: str) -> None:
    for layout in (old, new):
        (found,) = engine_layers(layout(entry)) or ()
        assert found.role == role


@pytest.mark.parametrize(
    ("name", "metadata", "nodes"),
    [
        ("a", "", ("a",)),
        ("a + relu", "", ("a", "relu")),
        ("w + w.quantize + a + PWN(b)", "", ("w", "w.quantize", "a", "PWN(b)")),
        ("fused", "[ONNX Layer: a]\x1e[ONNX Layer: b/c]", ("a", "b/c")),
        ("fused", "[ONNX Layer: a]\x1f[ONNX Layer: b]\x1e[ONNX Layer: a]", ("a", "b")),
        ("fused", "nothing known", ("fused",)),
    ],
)
def test_nodes_of_a_layer(name: str, metadata: str, nodes: tuple[str, ...]) -> None:
    (found,) = engine_layers(old(layer(name, "CaskConvolution", Metadata=metadata))) or ()
    assert found.nodes == nodes


# --- precision


@pytest.mark.parametrize("layout", [old, new])
@pytest.mark.parametrize("tensor", [old_tensor, new_tensor])
def test_an_engine_as_asked(layout: Any, tensor: Any) -> None:
    inspected = layout(
        QUANTIZE,
        REFORMAT,
        convolution("a + relu", "Int8", tensor("Int8")),
        layer("m", "gemm", tensor("Half"), Metadata="[ONNX Layer: b]\x1e[ONNX Layer: bias]"),
        convolution("c", "Float", tensor("Float")),
        layer("pool", "CudaPooling", tensor("Half")),
    )
    found = Attestation.of(inspected, promise(a="int8", b="fp16", c="fp32"))
    assert found.holds and found.failures == ()
    assert (found.layers, found.reformats, found.unseen, found.on_dla) == (6, 1, 0, 0)
    assert found.precisions == {"int8": 1, "fp16": 1, "fp32": 1}
    (line,) = found.render()
    assert line == "6 layers; with weights: 1 int8, 1 fp16, 1 fp32; 1 reformats; plugins: none"


def test_wider_layers_are_named() -> None:
    inspected = old(
        convolution("a", "Half", old_tensor(HALF)),
        convolution("b", "Int8", old_tensor(INT8)),
        convolution("c", "Float", old_tensor(FLOAT)),
        convolution("d", "Float", old_tensor(FLOAT)),
    )
    found = Attestation.of(inspected, promise(a="int8", b="int8", c="int8", d="fp16"))
    assert not found.holds
    assert found.failures == (
        "2 of 3 layers that the graph wants in int8 run wider: a (fp16), c (fp32)",
        "1 of 1 layers that the graph wants in fp16 run wider: d (fp32)",
    )
    assert found.render()[1:] == [f"not as asked: {failure}" for failure in found.failures]


def test_a_long_list_of_names_is_cut() -> None:
    names = [f"conv{index}" for index in range(9)]
    inspected = old(*(convolution(name, "Half", old_tensor(HALF)) for name in names))
    found = Attestation.of(inspected, Promise(dict.fromkeys(names, "int8"), {}))
    assert found.failures[0].startswith("9 of 9 layers")
    assert "conv0 (fp16), conv1 (fp16), conv2 (fp16) and 6 more" in found.failures[0]


def test_narrower_than_promised_is_no_failure() -> None:
    inspected = old(convolution("a", "Half", old_tensor(HALF)))
    assert Attestation.of(inspected, promise(a="fp32")).holds


def test_a_precision_that_is_nowhere() -> None:
    inspected = old(layer("{ForeignNode[a...z]}", "Myelin", old_tensor(FLOAT)))
    found = Attestation.of(inspected, promise(a="int8", b="int8"))
    assert found.unseen == 2
    assert found.failures == ("the graph wants 2 layers in int8, and no layer of the engine is",)
    # Nothing is faster than float32 by accident: nothing to prove.
    assert Attestation.of(inspected, promise(a="fp32")).holds


def test_layers_without_the_nodes_names_count_as_well() -> None:
    # Renamed by TensorRT, but there.
    inspected = old(convolution("__mye_1", "Int8", old_tensor(INT8)))
    found = Attestation.of(inspected, promise(a="int8"))
    assert found.holds and found.unseen == 1


def test_fused_regions_are_told_and_are_no_failure() -> None:
    inspected = old(
        convolution("a", "Int8", old_tensor(INT8)),
        layer("__myl_Fc_myl0_1", "kgen", old_tensor(HALF), Metadata="[ONNX Layer: b]"),
    )
    found = Attestation.of(inspected, promise(a="int8", b="int8"))
    assert found.holds and found.unseen == 1
    assert "1 nodes with weights are in fused regions" in found.render()[1]


# --- plugins and DLA

HEAD = {"head": "EdgeSegUpsampleArgmax"}


@pytest.mark.parametrize(
    "entry",
    [
        layer("head", "PluginV3", old_tensor(HALF)),
        layer("head_1", "PluginV3", old_tensor(HALF), PluginType="EdgeSegUpsampleArgmax"),
        layer("p", "PluginV3", old_tensor(HALF), Metadata="[ONNX Layer: head]"),
        layer("p", "Plugin", new_tensor("Half"), PluginName="EdgeSegUpsampleArgmax"),
    ],
)
def test_a_plugin_is_found_by_node_or_type(entry: Any) -> None:
    found = Attestation.of(new(entry), promise(HEAD))
    assert found.holds and found.plugins == ("EdgeSegUpsampleArgmax",)


@pytest.mark.parametrize(
    "entries",
    [
        (layer("pool", "CudaPooling"),),
        (layer("head", "Resize", Metadata="[ONNX Layer: head]"),),
        (layer("other", "PluginV3", PluginType="ROIAlign_TRT"),),
    ],
)
def test_a_missing_plugin_fails(entries: Any) -> None:
    found = Attestation.of(old(*entries), promise(HEAD))
    assert found.failures == ("1 of 1 plugin layers are missing: EdgeSegUpsampleArgmax (head)",)


def test_each_node_needs_a_plugin_of_its_own() -> None:
    entry = layer("p", "PluginV3", PluginType="EdgeSegPyramidRoiAlign")
    asked = {"one": "EdgeSegPyramidRoiAlign", "two": "EdgeSegPyramidRoiAlign"}
    found = Attestation.of(old(entry), promise(asked))
    assert "1 of 2 plugin layers are missing: EdgeSegPyramidRoiAlign (two)" in found.failures
    assert Attestation.of(old(entry, entry), promise(asked)).holds


def test_plugins_that_nobody_promised_are_told() -> None:
    found = Attestation.of(old(layer("roi", "PluginV3")), promise())
    assert found.holds and found.plugins == ("roi",)


def test_dla() -> None:
    on_dla = layer("{ForeignNode[a...z]}", "DLA", old_tensor(INT8))
    found = Attestation.of(old(on_dla), promise(dla=True, a="int8"))
    assert found.holds and found.on_dla == 1 and found.render()[0].endswith("; 1 on the DLA")
    fallen = Attestation.of(old(convolution("a", "Int8", old_tensor(INT8))), promise(dla=True))
    assert fallen.failures == ("no layer runs on the DLA: all of them fell back to the GPU",)


# --- what cannot be read


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", "{}", '{"Layers": 3}', '{"Layers": [3]}', '{"Layers": [[]]}',
     '{"Layers": []}', old("conv + relu", "pool")],
)  # fmt: skip
def test_an_inspector_that_says_nothing_fails(text: str) -> None:
    found = Attestation.of(text, promise(a="int8"))
    assert found.failures == ("the engine inspector gave no details of the layers",)
    assert found.unseen == 1


def test_names_only_are_read() -> None:
    (found,) = engine_layers(old("conv + relu")) or ()
    assert (found.kind, found.nodes) == ("", ("conv", "relu"))


def test_layers_with_odd_fields_are_read() -> None:
    for entry in ({}, {"Name": None}, {"LayerType": "gemm", "Weights": 3, "Inputs": []}):
        assert len(engine_layers(old(entry)) or ()) == 1


# --- promises and JSON


def test_promise_of_a_shipped_model() -> None:
    bundle = Bundle.open("streets-int8")
    graph = Graph.read(bundle.model.for_tensorrt(plugins=True))
    asked = Promise.of(graph, plugins=True)
    assert asked.plugins == {"head": "EdgeSegUpsampleArgmax"}
    assert set(asked.precisions.values()) == {"int8"}
    inlined = Graph.read(bundle.model.for_tensorrt(plugins=False))
    assert Promise.of(inlined, plugins=False).plugins == {}


def test_json_round_trip() -> None:
    made = Attestation(7, {"int8": 3, "fp16": 1}, ("A",), 2, 1, 4, ("a", "b"))
    assert Attestation.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    for name in made.to_dict():
        values = made.to_dict()
        del values[name]
        with pytest.raises(KeyError):
            Attestation.from_dict(values)
