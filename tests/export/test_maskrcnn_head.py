"""The exported second half of Mask R-CNN against the network in PyTorch, on several engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")

import onnx
import torch
from onnx import inliner

from edgeseg.errors import RequestError
from edgeseg.export.maskrcnn_head import pyramid_roi_align_function
from edgeseg.export.models.maskrcnn import MaskRCNN, Widths
from edgeseg.export.models.proposals import ProposalRules
from edgeseg.export.models.roialign import pyramid_roi_align
from edgeseg.export.models.roiheads import SCALES, DetectionRules
from edgeseg.export.onnx import Export, export_network
from edgeseg.export.preprocess import network_input
from edgeseg.golden import golden_image
from edgeseg.spec import ModelSpec, Preprocessing

SIZE = (64, 96)
CAPACITY = 20
PREPROCESSING = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "rgb")

Run = Callable[[onnx.ModelProto, dict[str, Any]], list[NDArray[Any]]]


def on_onnxruntime(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[NDArray[Any]]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return [np.asarray(value) for value in session.run(None, feeds)]


def on_openvino(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[NDArray[Any]]:
    openvino = pytest.importorskip("openvino")
    content = inliner.inline_local_functions(model).SerializeToString()
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = compiled(feeds)
    return [np.array(found[output]) for output in compiled.outputs]


ENGINES = [
    pytest.param(on_onnxruntime, id="onnxruntime"),
    pytest.param(on_openvino, id="openvino"),
]


def small(
    lively: Callable[..., Any], proposals: ProposalRules, detections: DetectionRules
) -> MaskRCNN:
    network = MaskRCNN(
        5,
        widths=Widths(blocks=(1, 1, 1, 1), stem=4, pyramid=6, hidden=16),
        proposal_rules=proposals,
        detection_rules=detections,
    )
    lively(network, 4)
    with torch.no_grad():
        for name, kernel in network.backbone.fpn.layer_blocks.named_parameters():
            kernel.mul_(0.05 if name.endswith("weight") else 1.0)
        network.rpn.head.bbox_pred.weight.mul_(0.4)
        network.roi_heads.box_predictor.bbox_pred.weight.mul_(0.5)
        network.roi_heads.box_predictor.cls_score.weight.mul_(0.2)
    return network


def spec_of(network: MaskRCNN, capacity: int = CAPACITY) -> ModelSpec:
    names = tuple(f"class {index}" for index in range(network.named_classes))
    return ModelSpec(
        name="small",
        architecture="maskrcnn_resnet50_fpn",
        task="instance",
        height=SIZE[0],
        width=SIZE[1],
        classes=names,
        colours=tuple((index, 0, 0) for index in range(len(names))),
        ignore=255,
        preprocessing=PREPROCESSING,
        capacity=capacity,
        mask_height=28,
        mask_width=28,
        mask_extent="box",
    )


@pytest.fixture(scope="module")
def network(lively: Callable[..., Any]) -> MaskRCNN:
    return small(
        lively, ProposalRules(per_level=60, total=40), DetectionRules(score=0.15, total=CAPACITY)
    )


@pytest.fixture(scope="module")
def exported(network: MaskRCNN) -> Export:
    return export_network(network, spec_of(network))


@pytest.mark.parametrize("run", ENGINES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_graph_gives_what_the_network_gives(
    network: MaskRCNN, exported: Export, run: Run, seed: int
) -> None:
    image = golden_image(seed, *SIZE)
    found = network.detect(network_input(image, PREPROCESSING), CAPACITY)
    boxes, scores, labels, count, masks = run(exported.model, {"image": image[None]})
    assert boxes.shape == (1, CAPACITY, 4) and masks.shape == (1, CAPACITY, 28, 28)
    assert masks.dtype == np.uint8 and labels.dtype == np.int32
    assert int(count[0]) == len(found.scores) > 5
    rows = int(count[0])
    np.testing.assert_allclose(boxes[0, :rows], found.boxes.numpy(), atol=2e-3)
    np.testing.assert_allclose(scores[0, :rows], found.scores.numpy(), atol=1e-5)
    np.testing.assert_array_equal(labels[0, :rows], found.labels.numpy())
    levels = found.levels().numpy().astype(int)
    assert np.abs(masks[0, :rows].astype(int) - levels).max() <= 1
    assert levels.std() > 2
    assert not boxes[0, rows:].any() and not masks[0, rows:].any()


@pytest.mark.parametrize("run", ENGINES)
def test_nothing_found(lively: Callable[..., Any], run: Run) -> None:
    network = small(lively, ProposalRules(per_level=9, total=7), DetectionRules(score=1.0))
    exported = export_network(network, spec_of(network, capacity=50))
    outputs = run(exported.model, {"image": golden_image(1, *SIZE)[None]})
    # Also more rows than there are candidates: 7 regions of 4 classes.
    assert outputs[0].shape == (1, 50, 4)
    assert not any(values.any() for values in outputs)


def test_shapes_are_static_and_operators_are_those_of_tensorrt(exported: Export) -> None:
    operators = {node.op_type for node in exported.model.graph.node}
    operators |= {n.op_type for function in exported.model.functions for n in function.node}
    assert not operators & {"NonMaxSuppression", "NonZero", "Loop", "If", "Scan", "Compress"}
    inferred = onnx.shape_inference.infer_shapes(
        inliner.inline_local_functions(exported.model), data_prop=True
    )
    sizes = [
        dim.HasField("dim_value")
        for value in inferred.graph.value_info
        for dim in value.type.tensor_type.shape.dim
    ]
    assert all(sizes) and len(sizes) > 500


def test_weights_keep_their_names(network: MaskRCNN, exported: Export) -> None:
    stored = {tensor.name for tensor in exported.model.graph.initializer}
    assert set(network.state_dict()) <= stored


@pytest.mark.parametrize("run", ENGINES)
def test_pooling_is_that_of_torch(run: Run) -> None:
    rng = np.random.default_rng(5)
    levels = [rng.standard_normal((1, 3, 64 >> i, 80 >> i)).astype(np.float32) for i in range(4)]
    corners = rng.uniform(0, 200, (30, 2))
    sides = np.exp(rng.uniform(0, 6, (30, 2)))
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    # Just on the border between two levels, and no size at all.
    boxes[0] = [0, 0, 112, 112]
    boxes[1] = [8, 8, 232, 232]
    boxes[2] = [5, 5, 5, 9]
    wanted = pyramid_roi_align(
        [torch.from_numpy(level) for level in levels],
        torch.from_numpy(boxes),
        torch.zeros(len(boxes), dtype=torch.int64),
        output_size=(7, 5),
        scales=SCALES,
        sampling_ratio=2,
    )
    function = pyramid_roi_align_function()
    names = list(function.input)
    value = onnx.helper.make_tensor_value_info
    shapes: dict[str, tuple[int, list[int]]] = {
        "boxes": (onnx.TensorProto.FLOAT, [30, 4]),
        "image_of": (onnx.TensorProto.INT32, [30]),
    }
    for name, level in zip(names[2:], levels, strict=True):
        shapes[name] = (onnx.TensorProto.FLOAT, list(level.shape))
    node = onnx.helper.make_node(
        function.name,
        names,
        ["pooled"],
        domain=function.domain,
        output_height=7,
        output_width=5,
        sampling_ratio=2,
    )
    graph = onnx.helper.make_graph(
        [node],
        "pool",
        [value(name, *shapes[name]) for name in names],
        [value("pooled", onnx.TensorProto.FLOAT, [30, 3, 7, 5])],
    )
    model = onnx.helper.make_model(
        graph,
        functions=[function],
        opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("edgeseg", 1)],
        ir_version=8,
    )
    feeds = {"boxes": boxes, "image_of": np.zeros(30, np.int32)}
    (found,) = run(model, {**feeds, **dict(zip(names[2:], levels, strict=True))})
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_too_much_for_tensorrt(lively: Callable[..., Any]) -> None:
    network = small(lively, ProposalRules(total=4000), DetectionRules())
    with pytest.raises(RequestError, match="1 to 3840 can be exported, and 4000 came"):
        export_network(network, spec_of(network))
