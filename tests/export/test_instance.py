"""The head of YOLACT as a graph: against the parity packs, PyTorch and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgeseg import kernels
from edgeseg.classes import class_list
from edgeseg.export.instance import OUTPUTS, append_yolact_head, mask_assembly_function
from edgeseg.export.models.selection import Selection
from edgeseg.export.models.yolact import decoded, mask_probabilities, selected
from edgeseg.onnxfile import OnnxFile
from edgeseg.spec import ModelSpec, Preprocessing

if TYPE_CHECKING:
    from tests.export.conftest import Parity

Packs = Callable[[str], "Parity"]
Arrays = dict[str, NDArray[Any]]

ENGINES = ("onnxruntime", "openvino")


def spec_of(size: tuple[int, int], classes: int, capacity: int, grid: tuple[int, int]) -> ModelSpec:
    listed = class_list(classes)
    return ModelSpec(
        name="head",
        architecture="yolact",
        task="instance",
        height=size[0],
        width=size[1],
        classes=listed.names,
        colours=listed.colours,
        ignore=listed.ignore,
        preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "rgb"),
        capacity=capacity,
        mask_height=grid[0],
        mask_width=grid[1],
    )


def head_model(heads: Arrays, size: tuple[int, int], selection: Selection) -> onnx.ModelProto:
    """The head alone: raw heads in, the contract's outputs out."""
    _, rows, columns, channels = heads["proto"].shape
    count, classes = heads["conf"].shape[1:]
    shapes = {
        "loc": [1, count, 4],
        "conf": [1, count, classes],
        "mask": [1, count, channels],
        "proto": [1, channels, rows, columns],
    }
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    graph = helper.make_graph([], "head", values, values)
    spec = spec_of(size, classes - 1, selection.capacity, (rows, columns))
    functions = append_yolact_head(graph, heads["priors"], spec, selection)
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("edgeseg", 1)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, feeds: Arrays, engine: str) -> Arrays:
    content = OnnxFile(model.SerializeToString()).inlined()
    names = [output.name for output in model.graph.output]
    if engine == "onnxruntime":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, feeds), strict=True))
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(content), "CPU", hints)
    found = compiled(feeds)
    return {name: np.array(found[name]) for name in names}


def run_head(
    heads: Arrays, size: tuple[int, int], selection: Selection, engine: str
) -> tuple[Arrays, int]:
    """The outputs, cut to the count after what is behind it was seen to be zeros; and the count."""
    model = head_model(heads, size, selection)
    assert tuple(output.name for output in model.graph.output) == OUTPUTS
    feeds = {name: heads[name] for name in ("loc", "conf", "mask")}
    feeds["proto"] = np.ascontiguousarray(heads["proto"].transpose(0, 3, 1, 2))
    found = run(model, feeds, engine)
    assert found["boxes"].shape == (1, selection.capacity, 4)
    assert found["labels"].dtype == np.int32
    assert found["count"].dtype == np.int32
    assert found["masks"].dtype == np.uint8
    count = int(found["count"][0])
    rows = {name: found[name][0] for name in ("boxes", "scores", "labels", "masks")}
    assert not any(array[count:].any() for array in rows.values())
    return {name: array[:count] for name, array in rows.items()}, count


@pytest.fixture(scope="module")
def stored(parity: Packs) -> tuple[Parity, Arrays]:
    """The pack and its stored heads, float32, with a batch axis."""
    pack = parity("yolact_resnet50")
    names = ("loc", "conf", "mask", "proto")
    heads = {name: pack.wanted[f"heads.{name}"].astype(np.float32)[None] for name in names}
    return pack, {**heads, "priors": pack.wanted["heads.priors"]}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("candidates", [1000, 2000])
def test_detections_of_the_graph_are_those_of_the_pack(
    stored: tuple[Parity, Arrays], engine: str, candidates: int
) -> None:
    pack, heads = stored
    found, count = run_head(heads, (550, 550), Selection(candidates=candidates), engine)
    assert count == 100
    pack.check("detection.det.box", found["boxes"] / np.float32(550))
    pack.check("detection.det.score", found["scores"])
    pack.check("detection.det.class", found["labels"])
    case = pack.pack["input"]["detection"]
    kept = found["scores"] > case["score_threshold"]
    pack.check("detection.post.class", found["labels"][kept])
    # At picture size, from the levels as any user of the contract has them.
    masks = torch.from_numpy(found["masks"][kept].astype(np.float32))[None]
    size = (case["height"], case["width"])
    large = torch.nn.functional.interpolate(masks, size=size, mode="bilinear")[0] > 127.5
    pack.check("detection.post.masks_packed", np.packbits(large.numpy(), axis=-1))
    scale = np.array([size[1], size[0]] * 2, np.float32)
    pixels = (found["boxes"][kept] / 550).clip(0, 1) * scale
    pack.check("detection.post.box", pixels.astype(np.int32))


@pytest.mark.parametrize("engine", ENGINES)
def test_cross_class_detections_are_those_of_the_pack(
    stored: tuple[Parity, Arrays], engine: str
) -> None:
    pack, heads = stored
    selection = Selection(cross_class=True, capacity=200)
    found, count = run_head(heads, (550, 550), selection, engine)
    assert count == 185
    pack.check("detection.crossclass.box", found["boxes"] / np.float32(550))
    pack.check("detection.crossclass.score", found["scores"])
    pack.check("detection.crossclass.class", found["labels"])


def random_heads(count: int, classes: int, seed: int, *, sure: float = 2.0) -> Arrays:
    random = np.random.default_rng(seed)
    centres, sides = random.random((count, 2)), random.uniform(0.05, 0.45, (count, 2))
    return {
        "loc": random.normal(size=(1, count, 4)).astype(np.float32),
        "conf": (sure * random.normal(size=(1, count, classes + 1))).astype(np.float32),
        "mask": random.uniform(-1, 1, (1, count, 5)).astype(np.float32),
        "proto": random.uniform(0, 2, (1, 11, 13, 5)).astype(np.float32),
        "priors": np.hstack([centres, sides]).astype(np.float32),
    }


def reference(heads: Arrays, size: tuple[int, int], selection: Selection) -> Arrays:
    """The same in plain PyTorch, which is checked against loops and the pack on its own."""
    loc, conf, mask, proto = (
        torch.from_numpy(heads[name])[0] for name in ("loc", "conf", "mask", "proto")
    )
    priors = torch.from_numpy(heads["priors"])
    rows, labels, scores = selected(loc, conf, priors, selection)
    boxes = decoded(loc[rows], priors[rows])
    masks = mask_probabilities(proto, mask[rows], boxes)
    scale = torch.tensor([size[1], size[0]] * 2)
    return {
        "boxes": (boxes * scale).numpy(),
        "scores": scores.numpy(),
        "labels": labels.numpy(),
        "masks": np.floor(masks.numpy() * 255 + 0.5),
    }


def check_alike(found: Arrays, wanted: Arrays) -> None:
    np.testing.assert_array_equal(found["labels"], wanted["labels"])
    np.testing.assert_allclose(found["scores"], wanted["scores"], atol=1e-5)
    np.testing.assert_allclose(found["boxes"], wanted["boxes"], atol=1e-3)
    apart = np.abs(found["masks"].astype(np.float64) - wanted["masks"])
    assert (apart > 1).sum() <= 1e-3 * apart.size


CASES = {
    "published": (300, 6, Selection()),
    "all candidates": (300, 6, Selection(candidates=300, capacity=300)),
    "fewer priors than detections": (9, 2, Selection()),
    "one prior, one class": (1, 1, Selection(score_threshold=0.0)),
    "one detection": (50, 3, Selection(capacity=1)),
    "ranks of no block's size": (200, 2, Selection(per_class=57, capacity=20)),
    "low IoU": (200, 3, Selection(iou_threshold=0.05)),
    "nothing": (50, 3, Selection(score_threshold=1.0)),
    "cross-class": (300, 6, Selection(cross_class=True, capacity=150)),
    "cross-class, few priors": (9, 4, Selection(cross_class=True)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("count", "classes", "selection"), CASES.values(), ids=CASES)
def test_the_graph_computes_what_pytorch_computes(
    engine: str, count: int, classes: int, selection: Selection
) -> None:
    heads = random_heads(count, classes, seed=count + classes)
    found, rows = run_head(heads, (88, 104), selection, engine)
    wanted = reference(heads, (88, 104), selection)
    assert rows == len(wanted["scores"])
    check_alike(found, wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_candidates_than_are_looked_at_leave_the_best(engine: str) -> None:
    # As documented: exact where the best `capacity` beat the first prior that was left out.
    heads = random_heads(400, 3, seed=8)
    selection = Selection(capacity=20, candidates=150)
    found, _ = run_head(heads, (88, 104), selection, engine)
    wanted = reference(heads, (88, 104), replace(selection, candidates=400))
    odds = torch.softmax(torch.from_numpy(heads["conf"])[0], dim=1)[:, 1:].max(dim=1).values
    assert int((odds > 0.05).sum()) > 150
    assert float(odds.sort(descending=True).values[150]) <= float(wanted["scores"][-1])
    check_alike(found, wanted)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cross_class", [False, True])
def test_what_is_no_number_is_no_detection(engine: str, cross_class: bool) -> None:
    heads = random_heads(60, 3, seed=2)
    selection = Selection(cross_class=cross_class)
    heads["conf"][0, 0] = np.nan
    heads["conf"][0, 1, 2] = np.inf
    heads["loc"][0, 2, 0] = np.nan
    heads["loc"][0, 3, 3] = np.inf
    heads["loc"][0, 4, 2] = 1e5
    found, rows = run_head(heads, (88, 104), selection, engine)
    clean = {
        name: array if name == "proto" else array[5:] if array.ndim == 2 else array[:, 5:]
        for name, array in heads.items()
    }
    wanted = reference(clean, (88, 104), selection)
    assert rows == len(wanted["scores"]) > 0
    check_alike(found, wanted)


def test_the_graph_is_static_and_suits_tensorrt() -> None:
    model = head_model(random_heads(300, 6, 0), (88, 104), Selection())
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"NonZero", "NonMaxSuppression", "Loop", "If", "Scan", "Compress", "Unique"}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    for value in inferred.value_info:
        dims = value.type.tensor_type.shape.dim
        assert all(dim.HasField("dim_value") for dim in dims), value.name


# --- EdgeSegMaskAssembly


def assembly_model(shape: tuple[int, ...], capacity: int, network: tuple[int, int]) -> Any:
    images, channels, height, width = shape
    infos = {
        "prototypes": (TensorProto.FLOAT, [images, channels, height, width]),
        "coefficients": (TensorProto.FLOAT, [images, capacity, channels]),
        "boxes": (TensorProto.FLOAT, [images, capacity, 4]),
        "count": (TensorProto.INT32, [images]),
    }
    node = helper.make_node(
        "EdgeSegMaskAssembly",
        list(infos),
        ["masks"],
        domain="edgeseg",
        network_height=network[0],
        network_width=network[1],
    )
    masks = [images, capacity, height, width]
    graph = helper.make_graph(
        [node],
        "assembly",
        [helper.make_tensor_value_info(name, *info) for name, info in infos.items()],
        [helper.make_tensor_value_info("masks", TensorProto.INT32, masks)],
    )
    return helper.make_model(
        graph,
        functions=[mask_assembly_function()],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("edgeseg", 1)],
        ir_version=8,
    )


def boxes_of(random: np.random.Generator, count: int, network: tuple[int, int]) -> Any:
    """Boxes of all kinds: usual, turned round, outside, huge, of no size, and no numbers."""
    height, width = network
    boxes = random.uniform(-0.3, 1.3, (count, 4)) * (width, height, width, height)
    boxes[0] = (width, height, 0, 0)
    boxes[1] = (3 * width, 0, 4 * width, height)
    boxes[2] = (-1e9, -1e9, 1e9, 1e9)
    boxes[3] = (5, 5, 5, 5)
    boxes[4] = (np.nan, 0, width, height)
    boxes[5] = (0, 0, width, np.nan)
    boxes[6] = (-np.inf, -np.inf, np.inf, np.inf)
    return boxes.astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 32, 14, 18), (1, 3, 1, 1), (1, 1, 9, 2)])
@pytest.mark.parametrize("by", ["reference", *ENGINES])
def test_the_body_of_mask_assembly_is_the_compiled_kernel(
    shape: tuple[int, int, int, int], by: str
) -> None:
    if not kernels.available():
        pytest.skip("needs the compiled CPU kernels")
    random = np.random.default_rng(sum(shape))
    network, capacity = (110, 146), 24
    prototypes = random.normal(size=shape).astype(np.float32)
    coefficients = random.normal(size=(1, capacity, shape[1])).astype(np.float32)
    coefficients[0, 7] = np.nan
    boxes = boxes_of(random, capacity, network)[None]
    count = np.array([capacity - 3], np.int32)
    feeds = {
        "prototypes": prototypes,
        "coefficients": coefficients,
        "boxes": boxes,
        "count": count,
    }
    model = assembly_model(shape, capacity, network)
    if by == "reference":
        with np.errstate(invalid="ignore"):
            (masks,) = cast(list[Any], ReferenceEvaluator(model).run(None, feeds))
    else:
        masks = run(model, feeds, by)["masks"]
    wanted = kernels.assemble_masks(prototypes, coefficients[0], boxes[0], network)
    wanted[count[0] :] = 0
    assert masks.dtype == np.int32
    # Sums are added up in another order: a level may be one off, but a box is a box.
    apart = np.abs(masks[0] - wanted.astype(np.int32))
    assert apart.max() <= 1
    assert np.mean(apart > 0) <= 0.01
    assert not masks[0, [4, 5, 7]].any()


def test_several_images_go_through_mask_assembly_at_once() -> None:
    random = np.random.default_rng(0)
    shape, network, capacity = (3, 4, 6, 8), (48, 64), 9
    feeds = {
        "prototypes": random.normal(size=shape).astype(np.float32),
        "coefficients": random.normal(size=(3, capacity, 4)).astype(np.float32),
        "boxes": np.stack([boxes_of(random, capacity, network) for _ in range(3)]),
        "count": np.array([0, 9, 4], np.int32),
    }
    found = run(assembly_model(shape, capacity, network), feeds, "onnxruntime")["masks"]
    single = assembly_model((1, *shape[1:]), capacity, network)
    for image in range(3):
        alone = run(
            single, {name: array[image : image + 1] for name, array in feeds.items()}, "onnxruntime"
        )
        assert np.abs(found[image] - alone["masks"][0]).max() <= 1
    assert not found[0].any()
    assert found[1].any()
    assert not found[2, 4:].any()
