"""ONNX files without the ``onnx`` package, compared with what that package makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.bundle import GOLDEN_KEY, SPEC_KEY, Bundle
from edgeseg.errors import BundleError
from edgeseg.onnxfile import HEAD, OnnxFile

if TYPE_CHECKING:
    from tests.conftest import Tiny

onnx = pytest.importorskip("onnx")

WAYS: tuple[Callable[[OnnxFile], object], ...] = (
    OnnxFile.metadata,
    OnnxFile.without_head,
    OnnxFile.inlined,
    OnnxFile.has_operators,
    lambda file: file.for_tensorrt(plugins=True),
    lambda file: file.for_tensorrt(plugins=False),
)


def parsed(content: bytes) -> Any:
    """The model, after onnx's own checks."""
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(content: bytes, image: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """What onnx's reference evaluator gives."""
    from onnx.reference import ReferenceEvaluator

    outputs = ReferenceEvaluator(parsed(content)).run(None, {"image": image[None]})
    assert isinstance(outputs, list)
    return outputs


@pytest.fixture(params=["classes", "with-confidence", "align-corners"])
def network(request: pytest.FixtureRequest, tiny: Tiny, sure_tiny: Tiny) -> Tiny:
    return {
        "classes": tiny,
        "with-confidence": sure_tiny,
        "align-corners": replace(sure_tiny, align_corners=True),
    }[request.param]


def test_metadata(network: Tiny) -> None:
    content = network.content()
    found = OnnxFile(content).metadata()
    assert found == {entry.key: entry.value for entry in parsed(content).metadata_props}
    assert found.keys() == {SPEC_KEY, GOLDEN_KEY}


def test_metadata_of_any_text() -> None:
    props = {"": "empty key", "empty value": "", "größe": "夜\n" * 500, "k" * 300: "v" * 70_000}
    model = onnx.ModelProto()
    onnx.helper.set_model_props(model, props)
    assert OnnxFile(model.SerializeToString()).metadata() == props
    assert OnnxFile(onnx.ModelProto().SerializeToString()).metadata() == {}


def test_without_head(network: Tiny) -> None:
    image = network.picture(1)
    cut, head = OnnxFile(network.content()).without_head()
    model = parsed(cut)
    assert [node.op_type for node in model.graph.node] == ["Cast", "Transpose", "Conv"]
    assert len(model.functions) == 0
    assert [output.name for output in model.graph.output] == [head.logits]
    assert (head.height, head.width) == (32, 48)
    assert head.align_corners == network.align_corners
    assert head.confidence == network.spec.confidence
    (logits,) = run(cut, image)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[0], network.logits(image), rtol=1e-5, atol=1e-5)


def test_inlined(network: Tiny) -> None:
    from onnx import inliner

    content = network.content()
    inlined = OnnxFile(content).inlined()
    model = parsed(inlined)
    assert len(model.functions) == 0
    assert HEAD not in {node.op_type for node in model.graph.node}
    assert all(not node.domain for node in model.graph.node)
    by_onnx = inliner.inline_local_functions(onnx.load_model_from_string(content))
    assert [node.op_type for node in model.graph.node] == [
        node.op_type for node in by_onnx.graph.node
    ]
    image = network.picture(2)
    for ours, theirs, original in zip(
        run(inlined, image),
        run(by_onnx.SerializeToString(), image),
        run(content, image),
        strict=True,
    ):
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours, original)
    np.testing.assert_array_equal(run(inlined, image)[0][0], network.class_map(image))


def test_for_tensorrt_with_plugins(network: Tiny) -> None:
    content = network.content()
    model = onnx.load_model_from_string(OnnxFile(content).for_tensorrt(plugins=True))
    original = onnx.load_model_from_string(content)
    # A function of a plugin's name would make the parser's release decide which of them runs.
    assert len(model.functions) == 0
    assert [node.op_type for node in model.graph.node] == [
        node.op_type for node in original.graph.node
    ]
    for node, before in zip(model.graph.node, original.graph.node, strict=True):
        found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type != HEAD:
            assert node == before
            continue
        assert found == {
            "height": 32,
            "width": 48,
            "align_corners": int(network.align_corners),
            "plugin_version": b"1",
            "plugin_namespace": b"edgeseg",
            "confidence": int(network.spec.confidence),
        }
        assert (node.input, node.output) == (before.input, before.output)


def test_for_tensorrt_without_plugins(network: Tiny) -> None:
    content = network.content()
    written = OnnxFile(content).for_tensorrt(plugins=False)
    model = parsed(written)
    assert len(model.functions) == 0
    assert all(not node.domain for node in model.graph.node)
    types = onnx.shape_inference.infer_shapes(model)
    element_of = {value.name: value.type.tensor_type.elem_type for value in types.graph.value_info}
    to_bytes = [
        node
        for node in model.graph.node
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.UINT8
    ]
    assert len(to_bytes) == 1 + network.spec.confidence
    for node in to_bytes:
        assert element_of[node.input[0]] == onnx.TensorProto.FLOAT
    image = network.picture(3)
    for ours, theirs in zip(run(written, image), run(content, image), strict=True):
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("plugins", [True, False])
def test_for_tensorrt_makes_kernels_constants(tiny: Tiny, plugins: bool) -> None:
    from onnx import numpy_helper

    model = tiny.model()
    (kernel,) = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    values = numpy_helper.to_array(kernel)
    name = kernel.name
    kernel.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
    model.graph.node.insert(
        0, onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)
    )
    written = OnnxFile(model.SerializeToString()).for_tensorrt(plugins=plugins)
    made = onnx.load_model_from_string(written)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    assert found.keys() == {tensor.name for tensor in tiny.model().graph.initializer}
    np.testing.assert_array_equal(found[name], values.astype(np.float16).astype(np.float32))
    assert found[name].dtype == np.float32
    makers = {output for node in made.graph.node for output in node.output}
    assert name not in makers and f"{name}.half" not in makers


def test_for_tensorrt_keeps_what_a_cast_shares(tiny: Tiny) -> None:
    """A float16 tensor that something else reads as well stays, and a Cast of other types does."""
    from onnx import numpy_helper

    model = tiny.model()
    shared = numpy_helper.from_array(np.ones(3, np.float16), "shared")
    whole = numpy_helper.from_array(np.ones(3, np.int64), "whole")
    model.graph.initializer.extend([shared, whole])
    model.graph.node.extend(
        [
            onnx.helper.make_node("Cast", ["shared"], ["wide"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Identity", ["shared"], ["same"]),
            onnx.helper.make_node("Cast", ["whole"], ["real"], to=onnx.TensorProto.FLOAT),
        ]
    )
    written = OnnxFile(model.SerializeToString()).for_tensorrt(plugins=True)
    made = onnx.load_model_from_string(written)
    names = {tensor.name for tensor in made.graph.initializer}
    assert {"shared", "wide", "whole"} <= names
    assert [node.input[0] for node in made.graph.node if node.op_type == "Cast"].count("whole") == 1


def test_has_operators(tiny: Tiny) -> None:
    file = OnnxFile(tiny.content())
    assert file.has_operators()
    assert not OnnxFile(file.inlined()).has_operators()


def test_everything_else_is_left_as_it_is(tiny: Tiny) -> None:
    model = tiny.model()
    model.producer_name = "someone"
    model.doc_string = "kept"
    model.graph.doc_string = "kept as well"
    model.graph.value_info.append(
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 32, 48])
    )
    file = OnnxFile(model.SerializeToString())
    for changed in (file.without_head()[0], file.inlined()):
        found = parsed(changed)
        assert (found.producer_name, found.doc_string) == ("someone", "kept")
        assert found.graph.doc_string == "kept as well"
        assert found.graph.value_info == model.graph.value_info
        assert found.graph.initializer == model.graph.initializer
        assert found.graph.input == model.graph.input
        assert found.metadata_props == model.metadata_props
        assert found.opset_import == model.opset_import


def test_model_without_functions_stays_the_same(tiny: Tiny) -> None:
    inlined = OnnxFile(tiny.content()).inlined()
    assert parsed(OnnxFile(inlined).inlined()) == parsed(inlined)


def test_function_that_is_called_twice(tiny: Tiny) -> None:
    model = tiny.model()
    second = onnx.NodeProto()
    second.CopyFrom(next(node for node in model.graph.node if node.op_type == HEAD))
    second.name, second.output[0] = "again", "unused"
    model.graph.node.append(second)
    content = model.SerializeToString()
    inlined = parsed(OnnxFile(content).inlined())
    names = [name for node in inlined.graph.node for name in node.output]
    assert len(names) == len(set(names))
    with pytest.raises(BundleError, match=f"has 2 {HEAD} nodes where one is promised"):
        OnnxFile(content).without_head()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda node: node.ClearField("attribute"), "no attribute height"),
        (lambda node: node.attribute.pop(), "no attribute width"),
    ],
)
def test_head_without_its_attributes(tiny: Tiny, spoil: Callable[[Any], object], says: str) -> None:
    model = tiny.model()
    spoil(next(node for node in model.graph.node if node.op_type == HEAD))
    with pytest.raises(BundleError, match=says):
        OnnxFile(model.SerializeToString()).without_head()


def test_call_that_leaves_out_what_the_body_needs(tiny: Tiny) -> None:
    model = tiny.model()
    next(node for node in model.graph.node if node.op_type == HEAD).ClearField("attribute")
    with pytest.raises(BundleError, match="the call of a function leaves out height"):
        OnnxFile(model.SerializeToString()).inlined()


def test_model_without_a_head(tiny: Tiny) -> None:
    cut, _ = OnnxFile(tiny.content()).without_head()
    with pytest.raises(BundleError, match=f"has 0 {HEAD} nodes where one is promised"):
        OnnxFile(cut, "cut.onnx").without_head()


@pytest.mark.parametrize("content", [b"", b"\x08\x08"])
def test_no_model_at_all(content: bytes) -> None:
    assert OnnxFile(content).metadata() == {}
    for way in (OnnxFile.without_head, OnnxFile.inlined):
        with pytest.raises(BundleError, match=r"^x\.onnx is not an ONNX model"):
            way(OnnxFile(content, "x.onnx"))


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8\xff\xe0 a JPEG picture",
        b"<html><head><title>404 Not Found</title></head></html>\n",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x80" * 20,
        b"\x00\x01",
        b"\x0b\x0c",
        b"\x3a\x05abc",
        b"\x09\x00\x00",
    ],
)
def test_what_is_no_protobuf(content: bytes) -> None:
    for way in WAYS:
        with pytest.raises(BundleError, match=r"^x\.onnx is not a whole ONNX file"):
            way(OnnxFile(content, "x.onnx"))


def test_every_length_but_the_whole(tiny: Tiny) -> None:
    # A file cut inside its last field is noticed; one cut between two fields is a smaller model.
    content = tiny.content()
    whole = OnnxFile(content).metadata()
    for size in range(0, len(content), 7):
        for way in WAYS:
            try:
                found = way(OnnxFile(content[:size]))
            except BundleError:
                continue
            assert way is not OnnxFile.metadata or found != whole


def test_flipped_bits_raise_nothing_else(tiny: Tiny) -> None:
    content = tiny.content()
    rng = np.random.default_rng(0)
    for _ in range(1500):
        spoilt = bytearray(content)
        spoilt[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        for way in WAYS:
            try:
                way(OnnxFile(bytes(spoilt)))
            except BundleError as error:
                assert "\n" not in str(error)


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"abc")
    assert OnnxFile.read(path) == OnnxFile(b"abc", str(path))
    for missing in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(BundleError, match=r"cannot be read \("):
            OnnxFile.read(missing)


def test_a_graph_says_whether_it_is_quantized() -> None:
    found = {name: Bundle.open(name).model.is_quantized() for name in ("streets", "streets-int8")}
    assert found == {"streets": False, "streets-int8": True}


def test_functions_that_blow_up(tiny: Tiny) -> None:
    """A thousand calls of a function of a thousand nodes: 100 kB that would become a gigabyte."""
    model = tiny.model()
    function = model.functions[0]
    node = function.node[0]
    for _ in range(1000):
        function.node.append(node)
    head = next(each for each in model.graph.node if each.op_type == HEAD)
    for _ in range(1000):
        model.graph.node.append(head)
    with pytest.raises(BundleError, match="more than 100000 nodes in its functions"):
        OnnxFile(model.SerializeToString()).inlined()


def test_head_of_another_size_than_the_spec(tiny: Tiny) -> None:
    from edgeseg.engine.head import opened_graph

    model = tiny.model()
    head = next(each for each in model.graph.node if each.op_type == HEAD)
    next(each for each in head.attribute if each.name == "height").i = 1 << 30
    with pytest.raises(
        BundleError, match=r"promises masks of 32x48 and its head makes 1073741824x"
    ):
        opened_graph(OnnxFile(model.SerializeToString()), tiny.spec, compiled_head=True)


def test_cast_without_an_input(tiny: Tiny) -> None:
    model = tiny.model()
    del model.graph.node[-1].input[:]
    with pytest.raises(BundleError, match="is not a whole ONNX file"):
        OnnxFile(model.SerializeToString()).for_tensorrt(plugins=False)
