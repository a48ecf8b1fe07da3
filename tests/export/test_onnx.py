"""The exported graph: its contract, its bytes, and its arithmetic on engines that are not ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch.nn import functional

from edgeseg.bundle import GOLDEN_KEY, SPEC_KEY, WEIGHTS_KEY, Bundle
from edgeseg.engine import available_engines, open_engine
from edgeseg.errors import BundleError, RequestError, WeightsError
from edgeseg.export.models import SemanticNetwork, create_semantic
from edgeseg.export.onnx import export_network, head_function, normalisation
from edgeseg.export.preprocess import network_input
from edgeseg.golden import Golden, golden_image
from edgeseg.onnxfile import HEAD
from edgeseg.spec import ModelSpec, Preprocessing

if TYPE_CHECKING:
    from tests.export.conftest import Exportation

Export = Callable[..., "Exportation"]

MODELS = ("bisenetv1", "bisenetv2")

#: combinations of what a graph can be told, all on the small network
VARIANTS: list[dict[str, object]] = [
    {},
    {"order": "bgr", "confidence": True},
    {"align_corners": True},
    {"align_corners": True, "confidence": True, "half_weights": True},
    {"num_classes": 1},
    {"num_classes": 255, "size": (32, 32)},
]


def picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def tensor_type(value: onnx.ValueInfoProto) -> tuple[str, int, list[int]]:
    shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    return value.name, value.type.tensor_type.elem_type, shape


@pytest.mark.parametrize("model", [*MODELS, "tiny"])
def test_the_contract_is_kept(exported: Export, model: str) -> None:
    made = exported(model)
    proto = onnx.load(made.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [tensor_type(value) for value in proto.graph.input] == [
        ("image", TensorProto.UINT8, [1, 64, 96, 3])
    ]
    assert [tensor_type(value) for value in proto.graph.output] == [
        ("class_map", TensorProto.UINT8, [1, 64, 96])
    ]
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 18, "edgeseg": 1}
    assert (proto.ir_version, proto.producer_name) == (8, "edgeseg")
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata.keys() == {SPEC_KEY, GOLDEN_KEY, WEIGHTS_KEY}
    assert ModelSpec.from_json(metadata[SPEC_KEY]) == made.spec
    assert json.loads(metadata[WEIGHTS_KEY]) == {
        "flipped": list(made.network.image_convolutions),
        "sha256": "0123abcd",
    }
    # Nothing of the machine that made it is in the file.
    assert str(Path.cwd()).encode() not in made.path.read_bytes()
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


def test_a_confidence_map_is_promised_on_request(exported: Export) -> None:
    proto = onnx.load(exported("tiny", order="bgr", confidence=True).path)
    assert [tensor_type(value) for value in proto.graph.output] == [
        ("class_map", TensorProto.UINT8, [1, 64, 96]),
        ("confidence", TensorProto.UINT8, [1, 64, 96]),
    ]


@pytest.mark.parametrize("model", [*MODELS, "tiny"])
def test_the_head_is_one_operator_with_a_body(exported: Export, model: str) -> None:
    proto = onnx.load(exported(model).path)
    heads = [node for node in proto.graph.node if node.op_type == HEAD]
    assert [node.domain for node in heads] == ["edgeseg"]
    assert {a.name: helper.get_attribute_value(a) for a in heads[0].attribute} == {
        "height": 64,
        "width": 96,
        "align_corners": 0,
    }
    assert [(body.domain, body.name) for body in proto.functions] == [("edgeseg", HEAD)]
    assert all(node.domain == "" for node in proto.functions[0].node)
    assert all(node.domain == "" for node in proto.graph.node if node is not heads[0])


@pytest.mark.parametrize("model", [*MODELS, "tiny"])
def test_initializers_are_the_state_dict(exported: Export, model: str) -> None:
    made = exported(model)
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(made.path).graph.initializer
    }
    weights = {name: array for name, array in stored.items() if not name.startswith("edgeseg.")}
    wanted = {
        key: value.numpy()
        for key, value in made.network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert weights.keys() == wanted.keys()
    for key, array in weights.items():
        flipped = key in made.network.image_convolutions
        np.testing.assert_array_equal(array, wanted[key][:, ::-1] if flipped else wanted[key])
    # What is ours is small: normalisation and sizes.
    assert sum(stored[name].size for name in stored.keys() - weights.keys()) < 100


@pytest.mark.parametrize("heads", [False, True])
def test_weights_that_are_alike_keep_their_names(
    tiny_class: type[SemanticNetwork], make_spec: Callable[..., ModelSpec], heads: bool
) -> None:
    # A new network has many equal arrays: zeros and ones in every batch norm.
    network = tiny_class(8, auxiliary_heads=heads).eval()
    proto = export_network(network, make_spec("tiny", num_classes=8, size=(32, 32))).model
    names = {tensor.name for tensor in proto.graph.initializer}
    assert {name for name in names if not name.startswith("edgeseg.")} == {
        key
        for key in network.state_dict()
        if not key.endswith("num_batches_tracked") and not key.startswith("extra.")
    }


@pytest.mark.parametrize("model", ["tiny", "bisenetv2"])
def test_two_exports_are_the_same_bytes(exported: Export, model: str, tmp_path: Path) -> None:
    made = exported(model)
    again = export_network(made.network, made.spec, source_sha256="0123abcd")
    again.write(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == made.path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]


def test_half_weights_halve_the_file_and_nothing_else(exported: Export) -> None:
    whole, half = exported("tiny"), exported("tiny", half_weights=True)
    kernels = 0
    for tensor in onnx.load(half.path).graph.initializer:
        array = numpy_helper.to_array(tensor)
        is_kernel = array.ndim > 1 and not tensor.name.startswith("edgeseg.")
        assert (array.dtype == np.float16) == is_kernel or array.dtype == np.int64, tensor.name
        kernels += array.size * is_kernel
    saved = whole.path.stat().st_size - half.path.stat().st_size
    # A Cast stands behind each of the three kernels.
    assert 2 * kernels - 3 * 150 < saved <= 2 * kernels


def test_kernels_beyond_fp16_are_refused(
    tiny_class: type[SemanticNetwork], make_spec: Callable[..., ModelSpec]
) -> None:
    network = tiny_class(3).eval()
    with torch.no_grad():
        network.get_parameter("second.conv.weight")[0, 0, 0, 0] = 1e5
    with pytest.raises(WeightsError, match=r"second\.conv\.weight"):
        export_network(network, make_spec("tiny", num_classes=3), half_weights=True)


@pytest.mark.parametrize("size", [(48, 96), (64, 100), (16, 16), (1, 1)])
@pytest.mark.parametrize("model", MODELS)
def test_sizes_that_do_not_suit_the_network_are_refused(
    make_spec: Callable[..., ModelSpec], model: str, size: tuple[int, int]
) -> None:
    with pytest.raises(RequestError, match=f"multiples of 32, and {size[0]}x{size[1]} came"):
        export_network(create_semantic(model, 11), make_spec(model, size=size))


@pytest.mark.parametrize("place", ["nowhere/model.onnx", "file/model.onnx", "folder"])
def test_an_output_that_cannot_be_written(exported: Export, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleError, match="cannot be written"):
        exported("tiny").export.write(tmp_path / place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_normalisation_is_folded_exactly(order: str) -> None:
    mean, std = (0.3257, 0.3690, 0.3223), (0.2112, 0.2148, 0.2115)
    offset, factor = normalisation(Preprocessing(mean, std, order))  # type: ignore[arg-type]
    pixels = np.arange(256, dtype=np.float32)[:, None].repeat(3, axis=1)
    found = (pixels - offset) * factor
    wanted = (pixels.astype(np.float64) / 255 - mean) / std
    if order == "rgb":
        # Arrays are in BGR order, so the red channel's figures come last.
        np.testing.assert_allclose(offset[::-1], 255 * np.array(mean), rtol=1e-6)
        wanted = (pixels.astype(np.float64) / 255 - mean[::-1]) / std[::-1]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def torch_outputs(
    made: Exportation, pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Class map, confidence, and the distance of the two best logits, by PyTorch."""
    with torch.no_grad():
        logits = made.network(network_input(pixels, made.spec.preprocessing))[0]
    best = logits.softmax(dim=0).max(dim=0)
    confidence = (best.values * 255).round().to(torch.uint8).numpy()
    if logits.shape[0] == 1:
        margin = np.full(logits.shape[1:], np.inf, np.float32)
    else:
        two = logits.topk(2, dim=0).values
        margin = (two[0] - two[1]).numpy()
    return best.indices.to(torch.uint8).numpy(), confidence, margin


def check_against_torch(
    made: Exportation,
    pixels: NDArray[np.uint8],
    class_map: NDArray[np.uint8],
    confidence: NDArray[np.uint8] | None,
) -> None:
    wanted, sure, margin = torch_outputs(made, pixels)
    scale = float(margin[np.isfinite(margin)].max(initial=1))
    assert (margin[class_map != wanted] < 1e-5 * scale).all()
    assert np.mean(class_map != wanted) < 1e-3
    assert (confidence is not None) == made.spec.confidence
    if confidence is not None:
        assert np.abs(confidence.astype(int) - sure.astype(int)).max() <= 1
        assert np.mean(confidence != sure) < 0.01


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_onnx_runtime_alone_gives_pytorchs_masks(
    exported: Export, variant: dict[str, object]
) -> None:
    # The file as it is, function body and all, on a runtime that knows nothing of EdgeSeg.
    made = exported("tiny", **variant)
    if variant.get("half_weights"):
        made = rounded(made)
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    for seed in range(3):
        pixels = picture(seed, made.spec.height, made.spec.width)
        outputs = [np.asarray(o)[0] for o in session.run(None, {"image": pixels[None]})]
        assert all(output.dtype == np.uint8 for output in outputs)
        check_against_torch(made, pixels, outputs[0], outputs[1] if len(outputs) > 1 else None)


@pytest.mark.parametrize("engine", available_engines())
@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "compiled"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_engine_gives_pytorchs_masks(
    exported: Export, variant: dict[str, object], engine: str, compiled: bool
) -> None:
    from edgeseg import kernels

    if compiled and not kernels.available():
        pytest.skip("the compiled kernels are not here")
    made = exported("tiny", **variant)
    if variant.get("half_weights"):
        made = rounded(made)
    opened = open_engine(Bundle.open(made.path), engine, compiled_head=compiled)
    pixels = picture(4, made.spec.height, made.spec.width)
    outputs = opened.run(pixels)
    check_against_torch(made, pixels, outputs.class_map, outputs.confidence)
    opened.close()


def rounded(made: Exportation) -> Exportation:
    """The same export beside a network whose kernels hold what the file holds."""
    from dataclasses import replace

    network = type(made.network)(made.network.num_classes).eval()
    network.load_state_dict(
        {k: v.half().float() if v.ndim > 1 else v for k, v in made.network.state_dict().items()}
    )
    return replace(made, network=network)


def test_the_reference_evaluator_gives_pytorchs_masks(exported: Export) -> None:
    made = exported("tiny", order="rgb", confidence=True, num_classes=4, size=(8, 12))
    pixels = picture(1, 8, 12)
    outputs = ReferenceEvaluator(onnx.load(made.path)).run(None, {"image": pixels[None]})
    class_map, confidence = (np.asarray(output)[0] for output in outputs)
    check_against_torch(made, pixels, class_map, confidence)


def test_channel_order_matters(exported: Export) -> None:
    # Otherwise the tests above would not see a wrong one.
    made = exported("tiny")
    pixels = picture(0, 64, 96)
    swapped = np.ascontiguousarray(pixels[..., ::-1])
    assert (torch_outputs(made, pixels)[0] != torch_outputs(made, swapped)[0]).mean() > 0.02


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("classes", "low", "high"),
    [(4, (3, 5), (9, 17)), (3, (2, 2), (16, 16)), (2, (4, 3), (4, 3)), (5, (1, 1), (3, 4))],
    ids=str,
)
def test_the_heads_body_is_interpolation_and_argmax(
    align_corners: bool, classes: int, low: tuple[int, int], high: tuple[int, int]
) -> None:
    body = head_function(confidence=True, align_corners=align_corners)
    node = helper.make_node(
        HEAD,
        ["logits"],
        ["class_map", "confidence"],
        domain="edgeseg",
        height=high[0],
        width=high[1],
        align_corners=int(align_corners),
    )
    graph = helper.make_graph(
        [node],
        "head",
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes, *low])],
        [
            helper.make_tensor_value_info(name, TensorProto.INT32, [1, *high])
            for name in ("class_map", "confidence")
        ],
    )
    model = helper.make_model(
        graph,
        functions=[body],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("edgeseg", 1)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    logits = np.random.default_rng(0).normal(0, 3, (1, classes, *low)).astype(np.float32)
    wanted = functional.interpolate(
        torch.from_numpy(logits).double(), high, mode="bilinear", align_corners=align_corners
    )
    sure = (wanted.softmax(1).max(1).values * 255).round()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for outputs in (
        ReferenceEvaluator(model).run(None, {"logits": logits}),
        session.run(None, {"logits": logits}),
    ):
        class_map, confidence = (np.asarray(output) for output in outputs)
        assert class_map.dtype == confidence.dtype == np.int32
        np.testing.assert_array_equal(class_map, wanted.argmax(1).numpy())
        np.testing.assert_allclose(confidence, sure.numpy(), rtol=0, atol=1)


@pytest.mark.parametrize("model", [*MODELS, "tiny"])
def test_the_golden_pair_is_what_the_graph_gives(exported: Export, model: str) -> None:
    made = exported(model)
    golden = Bundle.open(made.path).golden
    assert isinstance(golden, Golden)
    assert golden == made.export.golden
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    image = golden_image(golden.seed, 64, 96)
    class_map = np.asarray(session.run(None, {"image": image[None]})[0])[0]
    assert golden.agreement(class_map) == 1
    # A picture with one class in it would let anything pass.
    assert len(np.unique(class_map)) > 1
