"""An instance model of one's own: its head against loops, and from its name to a bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
import torch
from onnx import TensorProto, helper

import edgeseg
from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.classes import class_list
from edgeseg.cli import main
from edgeseg.engine import cpu_engines, open_engine
from edgeseg.errors import RequestError
from edgeseg.export import package
from edgeseg.export.instance import OUTPUTS
from edgeseg.export.onnx import quiet
from edgeseg.export.own import IMAGENET
from edgeseg.export.own_instance import RAW_NAMES, OwnInstanceNetwork, RawForm, raw_of
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.onnxfile import OnnxFile
from edgeseg.spec import ModelSpec
from edgeseg.synthetic import Street

Arrays = dict[str, NDArray[Any]]

HEIGHT, WIDTH = 32, 48
SIZE = f"{HEIGHT}x{WIDTH}"
CLASSES = "car,person,bicycle"
ENGINES = ("onnxruntime", "openvino")


# ---- what is expected, by loops and in float64


def boxes_of(raw: Arrays, size: tuple[int, int], limit: int) -> NDArray[np.float64]:
    """(N, 4) xyxy in pixels, NaN for what is none."""
    height, width = size
    count = raw["scores"].shape[1]
    boxes = np.full((count, 4), np.nan)
    if "boxes" in raw:
        boxes = raw["boxes"][0].astype(np.float64)
    elif "boxes_cxcywh" in raw:
        for row, (x, y, w, h) in enumerate(raw["boxes_cxcywh"][0].astype(np.float64)):
            boxes[row] = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        boxes = boxes * [width, height, width, height]
    else:
        best = np.nan_to_num(raw["scores"][0], nan=0.0).max(axis=1)
        for row in np.argsort(-best, kind="stable")[:limit]:
            mask = raw["masks"][0, row] > 0
            if mask.any():
                rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
                down, right = height / mask.shape[0], width / mask.shape[1]
                boxes[row] = [
                    (columns[0] - 1 / 16) * right,
                    (rows[0] - 1 / 16) * down,
                    (columns[-1] + 17 / 16) * right,
                    (rows[-1] + 17 / 16) * down,
                ]
    for row, (x1, y1, x2, y2) in enumerate(boxes):
        if not (x1 <= x2 and y1 <= y2 and np.abs(boxes[row]).max() < 1e6):
            boxes[row] = np.nan
    return boxes


def iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


def expected(
    raw: Arrays, size: tuple[int, int], *, capacity: int, least: float, overlap: float
) -> Arrays:
    """The detections of raw ones, best first; masks as levels."""
    # A score that is no number is none.
    scores = np.nan_to_num(raw["scores"][0].astype(np.float64), nan=0.0)
    boxes = boxes_of(raw, size, capacity if overlap >= 1 else 200)
    usable = [
        row
        for row in range(len(scores))
        if np.isfinite(boxes[row]).all() and scores[row].max() > least
    ]
    kept: list[tuple[float, int, int]] = []
    if overlap >= 1:
        kept = [(float(scores[row].max()), row, int(scores[row].argmax())) for row in usable]
    else:
        for label in range(scores.shape[1]):
            # Fast NMS: a better one removes, also if it is itself removed.
            ranked = sorted(usable, key=lambda row: (-scores[row, label], row))[:200]
            for place, row in enumerate(ranked):
                if not any(iou(boxes[row], boxes[other]) > overlap for other in ranked[:place]):
                    kept.append((float(scores[row, label]), row, label))
    kept.sort(key=lambda entry: -entry[0])
    kept = kept[:capacity]
    levels = [levels_of(raw, row, boxes[row], size) for _, row, _ in kept]
    return {
        "scores": np.array([score for score, _, _ in kept]),
        "labels": np.array([label for _, _, label in kept]),
        "boxes": np.array([boxes[row] for _, row, _ in kept]).reshape(-1, 4),
        "masks": np.array(levels),
    }


def levels_of(
    raw: Arrays, row: int, box: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.int64]:
    if "masks" in raw:
        logits = raw["masks"][0, row].astype(np.float64)
    else:
        weights = raw["coefficients"][0, row].astype(np.float64)
        planes = raw["prototypes"][0].astype(np.float64)
        logits = np.zeros(planes.shape[1:])
        for weight, plane in zip(weights, planes, strict=True):
            logits += weight * plane
    rows, columns = logits.shape
    levels = np.zeros((rows, columns), np.int64)
    for y in range(rows):
        for x in range(columns):
            inside = (
                box[0] * columns / size[1] - 1 <= x < box[2] * columns / size[1] + 1
                and box[1] * rows / size[0] - 1 <= y < box[3] * rows / size[0] + 1
            )
            if inside and not np.isnan(logits[y, x]):
                levels[y, x] = int(np.floor(255 * np.exp(-np.logaddexp(0, -logits[y, x])) + 0.5))
    return levels


def check_alike(found: Arrays, wanted: Arrays) -> None:
    assert len(found["scores"]) == len(wanted["scores"])
    np.testing.assert_allclose(found["scores"], wanted["scores"], atol=2e-5)
    assert np.array_equal(found["labels"], wanted["labels"])
    np.testing.assert_allclose(found["boxes"], wanted["boxes"], atol=1e-3)
    if len(wanted["masks"]):
        apart = np.abs(found["masks"].astype(np.int64) - wanted["masks"])
        assert apart.max() <= 1
        assert np.mean(apart > 0) < 0.01


# ---- the head alone


def random_raw(names: str, count: int, classes: int, seed: int) -> Arrays:
    """Raw detections of a picture of 32x48 with the first letters ``names``: b, c, s, m, p."""
    random = np.random.default_rng(seed)
    raw: Arrays = {}
    centre = random.uniform(0, 1, (1, count, 2))
    sides = random.uniform(0.02, 0.4, (1, count, 2))
    size = np.array([WIDTH, HEIGHT] * 2)
    if "b" in names:
        raw["boxes"] = np.concatenate([centre - sides / 2, centre + sides / 2], axis=2) * size
    if "c" in names:
        raw["boxes_cxcywh"] = np.concatenate([centre, sides], axis=2)
    raw["scores"] = random.uniform(0, 1, (1, count, classes)) ** 3
    if "m" in names:
        # Blobs around the centres.
        y = (np.arange(7).reshape(1, 1, 7, 1) + 0.5) / 7
        x = (np.arange(13).reshape(1, 1, 1, 13) + 0.5) / 13
        away = np.hypot(x - centre[..., 0, None, None], y - centre[..., 1, None, None])
        raw["masks"] = 20 * (sides.mean(axis=2)[..., None, None] - away)
    if "p" in names:
        raw["coefficients"] = random.normal(0, 1, (1, count, 5))
        raw["prototypes"] = random.normal(0, 1, (1, 5, 7, 13))
    return {name: raw[name].astype(np.float32) for name in RAW_NAMES if name in raw}


def head_network(
    raw: Arrays, *, least: float | None = None, overlap: float | None = None
) -> OwnInstanceNetwork:
    tensors = {name: torch.from_numpy(array) for name, array in raw.items()}
    form = RawForm.of(tensors, (HEIGHT, WIDTH), None, "")
    infos = [
        helper.make_tensor_value_info(f"in.{name}", TensorProto.FLOAT, raw[name].shape)
        for name in form.names
    ]
    graph = helper.make_graph([], "head", infos, infos)

    class Given(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(tensors[name] for name in form.names)

    return OwnInstanceNetwork(
        Given(),
        graph,
        form,
        opset=18,
        size=(HEIGHT, WIDTH),
        classes=None,
        preprocessing=IMAGENET,
        reference="PyTorch",
        least_score=least,
        overlap=overlap,
    )


def head_model(network: OwnInstanceNetwork, capacity: int) -> onnx.ModelProto:
    listed = class_list(network.named_classes)
    spec = ModelSpec(
        name="head",
        architecture="own",
        task="instance",
        height=HEIGHT,
        width=WIDTH,
        classes=listed.names,
        colours=listed.colours,
        ignore=listed.ignore,
        preprocessing=IMAGENET,
        capacity=capacity,
        mask_height=network.form.grid[0],
        mask_width=network.form.grid[1],
    )
    graph = onnx.GraphProto()
    graph.CopyFrom(network.graph)
    functions = network.append_head(graph, spec)
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("edgeseg", 1)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run_head(model: onnx.ModelProto, raw: Arrays, engine: str) -> Arrays:
    """The outputs, cut to the count; what is behind it is seen to be zeros."""
    assert tuple(output.name for output in model.graph.output) == OUTPUTS
    content = OnnxFile(model.SerializeToString()).inlined()
    feeds = {f"in.{name}": array for name, array in raw.items()}
    if engine == "onnxruntime":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = dict(zip(OUTPUTS, session.run(list(OUTPUTS), feeds), strict=True))
    else:
        openvino = pytest.importorskip("openvino")
        core = openvino.Core()
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(content), "CPU", hints)
        given = compiled(feeds)
        found = {name: np.array(given[name]) for name in OUTPUTS}
    count = int(found["count"][0])
    rows = {name: found[name][0] for name in ("boxes", "scores", "labels", "masks")}
    assert not any(array[count:].any() for array in rows.values())
    return {name: array[:count] for name, array in rows.items()}


HEADS: dict[str, tuple[str, int, int, float | None]] = {
    # name: (which tensors, candidates, classes, overlap)
    "prototypes": ("bp", 150, 3, None),
    "prototypes, shares": ("cp", 150, 4, 0.3),
    "prototypes, nothing goes": ("bp", 150, 3, 1.0),
    "masks and shares": ("cm", 40, 5, None),
    "masks and pixels": ("bm", 300, 2, None),
    "masks and pixels, overlaps go": ("bm", 120, 2, 0.4),
    "masks alone": ("m", 90, 3, None),
    "masks alone, overlaps go": ("m", 90, 3, 0.5),
    "one candidate of one class": ("m", 1, 1, None),
    "one candidate with prototypes": ("bp", 1, 1, None),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", HEADS)
def test_the_head_gives_what_loops_give(case: str, engine: str) -> None:
    names, count, classes, overlap = HEADS[case]
    raw = random_raw(names, count, classes, seed=len(case))
    if count == 1:
        raw["scores"][:] = 0.5
    network = head_network(raw, least=0.1, overlap=overlap)
    used = overlap if overlap is not None else (0.5 if "p" in names else 1.0)
    # OpenVINO takes its time to compile.
    for capacity in (60, 7) if engine == "onnxruntime" else (60,):
        wanted = expected(raw, (HEIGHT, WIDTH), capacity=capacity, least=0.1, overlap=used)
        assert len(wanted["scores"])
        check_alike(run_head(head_model(network, capacity), raw, engine), wanted)
        # And the reference of ``verify``, which is PyTorch's.
        eager = network.detect(torch.zeros(1, 3, HEIGHT, WIDTH), capacity)
        check_alike(
            {
                "scores": eager.scores.numpy(),
                "labels": eager.labels.numpy(),
                "boxes": eager.boxes.numpy(),
                "masks": eager.levels().numpy(),
            },
            wanted,
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("names", ["bp", "cm", "bm", "m"])
def test_what_is_no_number_is_no_detection(names: str, engine: str) -> None:
    raw = random_raw(names, 40, 3, seed=9)
    raw["scores"][0, :8] = 0.9 - np.arange(24, dtype=np.float32).reshape(8, 3) / 100
    raw["scores"][0, 0, 1] = np.nan
    for name in ("boxes", "boxes_cxcywh"):
        if name in raw:
            raw[name][0, 1, 2] = np.nan
            raw[name][0, 2, 0] = np.inf
            raw[name][0, 3, 3] = -np.inf
            # The wrong way round, and larger than any picture.
            raw[name][0, 4] = [30, 20, -10, -5]
            raw[name][0, 5] = [-3e6, 0, 3e6, 5]
    if "masks" in raw:
        raw["masks"][0, 6] = np.nan
        raw["masks"][0, 7, :3] = np.inf
        raw["masks"][0, 8] = -np.inf
    else:
        raw["coefficients"][0, 6] = np.nan
    network = head_network(raw)
    overlap = 0.5 if "p" in names else 1.0
    wanted = expected(raw, (HEIGHT, WIDTH), capacity=30, least=0.05, overlap=overlap)
    assert len(wanted["scores"]) > 10
    check_alike(run_head(head_model(network, 30), raw, engine), wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_found_is_nothing(engine: str) -> None:
    for names in ("bp", "cm", "m"):
        raw = random_raw(names, 20, 2, seed=1)
        raw["scores"][:] = 0.01
        assert not len(run_head(head_model(head_network(raw), 12), raw, engine)["scores"])
    raw = random_raw("m", 20, 2, seed=1)
    raw["masks"][:] = -3
    assert not len(run_head(head_model(head_network(raw), 12), raw, engine)["scores"])


@pytest.mark.parametrize("names", ["bp", "cp", "cm", "m"])
def test_the_graph_is_static_and_suits_tensorrt(names: str) -> None:
    model = head_model(head_network(random_raw(names, 5000, 6, 0)), 100)
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"NonZero", "NonMaxSuppression", "Loop", "If", "Scan", "Compress", "Unique"}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    sizes = {}
    for value in inferred.value_info:
        dims = value.type.tensor_type.shape.dim
        assert all(dim.HasField("dim_value") for dim in dims), value.name
        sizes[value.name] = [dim.dim_value for dim in dims]
    for node in model.graph.node:
        if node.op_type == "TopK":
            assert sizes[node.output[0]][-1] <= 3840


def test_rules_that_cannot_be_are_refused() -> None:
    raw = random_raw("m", 5, 1, 0)
    for options in ({"overlap": 1.5}, {"overlap": -0.1}, {"least": 2.0}):
        with pytest.raises(RequestError, match="between 0 and 1"):
            head_network(raw, **options)


# ---- from a module to a bundle

#: modules that find objects, and ways to go wrong; ``models`` writes it beside the test
SOURCE = '''
from types import SimpleNamespace

import torch
from torch import nn


class Dense(nn.Module):
    """Three boxes around each cell, with coefficients, as YOLACT and YOLOv8-seg have them."""

    def __init__(self, num_classes=3):
        super().__init__()
        torch.manual_seed(1)
        self.parts = [4, num_classes, 5]
        self.first = nn.Conv2d(3, 16, 4, stride=4)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Conv2d(16, 3 * sum(self.parts), 1)
        self.proto = nn.Conv2d(16, 5, 1)
        # Named as an output of every bundle is.
        self.register_buffer("masks", torch.tensor(6.0))
        with torch.no_grad():
            self.head.weight.mul_(4)
            self.proto.weight.mul_(4)

    def forward(self, x):
        fine = torch.relu(self.first(x))
        deep = torch.relu(self.second(fine))
        rows, columns = deep.shape[-2:]
        y, z = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = torch.stack([z, y], dim=2).reshape(1, -1, 1, 2) * 8.0 + 4
        found = self.head(deep).permute(0, 2, 3, 1).reshape(1, rows * columns, 3, -1)
        box, scores, coefficients = found.split(self.parts, dim=3)
        middle = centre + torch.tanh(box[..., :2]) * 4
        sides = torch.exp(torch.tanh(box[..., 2:])) * self.masks
        flat = lambda part: part.reshape(1, rows * columns * 3, -1)
        return {
            "boxes": flat(torch.cat([middle - sides, middle + sides], dim=3)),
            "scores": torch.sigmoid(flat(scores)),
            "coefficients": torch.tanh(flat(coefficients)),
            "prototypes": self.proto(fine),
            "more": None,
        }


class Queries(nn.Module):
    """Queries that each give a class, a box and a mask, as DETR's do."""

    def __init__(self, kinds=3, queries=14):
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(3, 16, 4, stride=4)
        self.pool = nn.AdaptiveAvgPool2d((2, 3))
        self.queries = nn.Parameter(torch.randn(1, queries, 16))
        self.mix = nn.Linear(96, 16)
        self.classes = nn.Linear(16, kinds + 1)
        self.box = nn.Linear(16, 4)
        self.mask = nn.Linear(16, 16)
        with torch.no_grad():
            for layer, factor in ((self.classes, 5), (self.mask, 5), (self.mix, 10)):
                layer.weight.mul_(factor)

    def forward(self, x):
        features = torch.relu(self.first(x))
        queries = self.queries + self.mix(self.pool(features).flatten(1))[:, None]
        queries = torch.relu(queries)
        features = features - features.mean(dim=(2, 3), keepdim=True)
        return SimpleNamespace(
            logits=self.classes(queries),
            boxes=torch.sigmoid(self.box(queries)),
            maps=torch.einsum("bqc,bchw->bqhw", self.mask(queries), features),
        )


def like_detr(found):
    return {
        "boxes_cxcywh": found.boxes,
        "scores": found.logits.softmax(dim=-1)[..., :-1],
        "masks": found.maps,
    }


def like_maskformer(found):
    return {"scores": found.logits.softmax(dim=-1)[..., :-1], "masks": found.maps}


class Pair(nn.Module):
    """``Dense`` as a YOLOv8-seg file has it: columns of everything, and prototypes."""

    def __init__(self):
        super().__init__()
        self.dense = Dense()

    def forward(self, x):
        found = self.dense(x)
        low, high = found["boxes"].split(2, dim=2)
        parts = [(low + high) / 2, high - low, found["scores"], found["coefficients"]]
        return torch.cat(parts, dim=2).transpose(1, 2), found["prototypes"]


class Named(nn.Module):
    def forward(self, x, net=Queries()):
        found = like_detr(net(x))
        return found["scores"], found["masks"], found["boxes_cxcywh"], found["masks"].sum()


class Selecting(nn.Module):
    """Its number of detections depends on the picture."""

    def __init__(self, least=0.5):
        super().__init__()
        self.net = Queries()
        self.least = least

    def forward(self, x):
        found = like_detr(self.net(x))
        sure = torch.nonzero(found["scores"][0].amax(dim=1) > self.least)[:, 0]
        return {name: part[:, sure] for name, part in found.items()}


def taking_all(): return Selecting(0.0)


def changed(**changes):
    def adapter(found):
        raw = like_detr(found)
        raw.update({name: change(raw) for name, change in changes.items()})
        return {name: part for name, part in raw.items() if part is not None}
    return adapter


tuples = lambda found: (found.boxes, found.logits)
nothing = lambda found: {}
lists = changed(scores=lambda raw: [[0.5]])
integers = changed(scores=lambda raw: raw["scores"].argmax(dim=2, keepdim=True))
logits = lambda found: {**like_detr(found), "scores": found.logits[..., :-1]}
background = lambda found: {**like_detr(found), "scores": found.logits.softmax(dim=-1)}
two = changed(masks=lambda raw: raw["masks"].repeat(2, 1, 1, 1))
fewer = changed(masks=lambda raw: raw["masks"][:, :5])
flat = changed(masks=lambda raw: raw["masks"].flatten(2))
no_masks = changed(masks=lambda raw: None)
both = changed(boxes=lambda raw: raw["boxes_cxcywh"])
corners = changed(boxes_cxcywh=lambda raw: raw["boxes_cxcywh"][..., :2])
shares = changed(boxes_cxcywh=lambda raw: None, boxes=lambda raw: raw["boxes_cxcywh"])
pixels = changed(boxes_cxcywh=lambda raw: raw["boxes_cxcywh"] * 40)
lone = changed(masks=lambda raw: None, prototypes=lambda raw: raw["masks"])
uneven = changed(
    masks=lambda raw: None,
    prototypes=lambda raw: raw["masks"],
    coefficients=lambda raw: raw["masks"][:, :, 0, :3],
)
unboxed = changed(
    boxes_cxcywh=lambda raw: None,
    masks=lambda raw: None,
    prototypes=lambda raw: raw["masks"],
    coefficients=lambda raw: raw["masks"].flatten(2)[:, :, :14],
)
large = changed(masks=lambda raw: torch.nn.functional.interpolate(raw["masks"], scale_factor=8))
no_numbers = changed(scores=lambda raw: raw["scores"] / 0 * 0)
wrong = lambda found: found.nowhere
'''


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve streets take longer to paint than all the rest."""
    monkeypatch.setattr(package, "_VERIFIED", 2)
    monkeypatch.setattr(package, "_SHOWN", 1)


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current directory holds ``finders.py``; what was imported of it is forgotten."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "finders.py").write_text(SOURCE)
    monkeypatch.chdir(folder)
    yield
    sys.modules.pop("finders", None)


def own(attribute: str) -> Any:
    """An attribute of the module above."""
    import importlib

    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module("finders"), attribute)
    finally:
        sys.path.pop(0)


def picture(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def found_by(module: torch.nn.Module, adapter: Callable[[Any], Any], seed: int) -> Arrays:
    """The raw detections in ``picture(seed)``, normalised without EdgeSeg."""
    x = picture(seed).astype(np.float64)[..., ::-1] / 255
    x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        raw = adapter(module(torch.from_numpy(x.transpose(2, 0, 1)[None].copy()).float()))
    return {name: raw[name].numpy() for name in RAW_NAMES if name in raw}


def check_bundle(
    target: Path, wanted: Callable[[int], Arrays], *, least: float = 0.05, overlap: float
) -> None:
    """Every CPU engine and head finds in two pictures what loops find in ``wanted``'s numbers."""
    bundle = Bundle.open(target)
    rules = {"least": least, "overlap": overlap}
    right = [expected(wanted(seed), (HEIGHT, WIDTH), capacity=100, **rules) for seed in range(2)]
    assert all(len(entry["scores"]) > 3 for entry in right)
    for engine_name in cpu_engines():
        for compiled in {False, kernels.available()}:
            engine = open_engine(bundle, engine_name, compiled_head=compiled)
            for seed, entry in enumerate(right):
                outputs = engine.run(picture(seed))
                assert isinstance(outputs, InstanceOutputs)
                check_alike({name: getattr(outputs, name) for name in entry}, entry)
            engine.close()


def export(model: str, *options: str, target: Path) -> int:
    arguments = ["export", model, "--task", "instance", "--size", SIZE]
    if "--classes" not in options:
        arguments += ["--classes", CLASSES]
    return main([*arguments, *options, "-o", str(target)])


WITHIN: dict[str, tuple[str, str, list[str], dict[str, float]]] = {
    # name: (factory, adapter, options, rules)
    "prototypes": ("Dense", "", ["--half-weights"], {"overlap": 0.5}),
    "masks and boxes": (
        "Queries",
        "like_detr",
        ["--least-score", "0.2"],
        {"overlap": 1.0, "least": 0.2},
    ),
    "masks alone": ("Queries", "like_maskformer", [], {"overlap": 1.0}),
}


@pytest.mark.parametrize(
    "case",
    [*list(WITHIN)[:2], *(pytest.param(case, marks=pytest.mark.slow) for case in list(WITHIN)[2:])],
)
def test_a_module_of_ones_own_becomes_a_bundle(case: str, tmp_path: Path) -> None:
    factory, adapter, options, rules = WITHIN[case]
    target = tmp_path / "mine"
    asked = ["--adapter", f"finders:{adapter}"] if adapter else []
    assert export(f"finders:{factory}", *asked, *options, target=target) == 0
    spec = Bundle.open(target).spec
    assert (spec.task, spec.classes, spec.capacity) == ("instance", tuple(CLASSES.split(",")), 100)
    assert (spec.mask_height, spec.mask_width, spec.mask_extent) == (8, 12, "image")
    manifest = json.loads((target / "bundle.json").read_text())
    assert manifest["verification"]["reference"] == "PyTorch"
    assert all(entry["expected"] > 0 for entry in manifest["verification"]["engines"])
    module = own(factory)()
    if "--half-weights" in options:
        with torch.no_grad():
            for kernel in module.parameters():
                if kernel.ndim > 1:
                    kernel.copy_(kernel.half().float())

    def wanted(seed: int) -> Arrays:
        return found_by(module, own(adapter) if adapter else dict, seed)

    check_bundle(target, wanted, **rules)


def test_the_bundle_goes_the_way_of_every_bundle(tmp_path: Path) -> None:
    target, small = tmp_path / "mine", tmp_path / "small"
    assert export("finders:Dense", target=target) == 0
    model = edgeseg.load(target)
    frame = np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    result = model(frame)
    assert isinstance(result, InstanceResult)
    assert len(result) > 3 and result.masks.shape[1:] == (90, 120) and result.masks.any()
    assert result.draw().shape == frame.shape
    source = "synthetic:?frames=2&size=96x64"
    assert main(["run", str(target), "--source", source, "--json", str(tmp_path / "r.json")]) == 0
    arguments = ["--calibration", "synthetic:?frames=4&size=96x64", "-o", str(small)]
    assert main(["quantize", str(target), *arguments]) == 0
    assert Bundle.open(small).model.is_quantized()
    assert isinstance(edgeseg.load(small)(frame), InstanceResult)


SHIPPED = """
import torch
from torch import nn
from edgeseg.bundle import Bundle
from edgeseg.export.models.yolact import decoded
from edgeseg.export.package import read_network

SPEC = Bundle.open("street-objects").spec


class Somebodys(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = read_network("street-objects", None)[0]
        self.register_buffer("priors", self.net.priors(SPEC.height, SPEC.width))
        size = [SPEC.width, SPEC.height, SPEC.width, SPEC.height]
        self.register_buffer("size", torch.tensor(size, dtype=torch.float32))

    def forward(self, x):
        loc, conf, coefficients, prototypes = self.net.raw(x)
        return {
            "boxes": (decoded(loc[0], self.priors) * self.size)[None],
            "scores": conf.softmax(dim=-1)[..., 1:],
            "coefficients": coefficients,
            "prototypes": prototypes,
        }
"""


@pytest.mark.slow
def test_a_shipped_model_as_somebodys_own_finds_the_same(tmp_path: Path) -> None:
    (Path.cwd() / "finders.py").write_text(SHIPPED)
    shipped, target = Bundle.open("street-objects"), tmp_path / "mine"
    spec, told = shipped.spec, shipped.spec.preprocessing
    values = [",".join(map(repr, side)) for side in (told.mean, told.std)]
    options = ["--mean", values[0], "--std", values[1], "--size", f"{spec.height}x{spec.width}"]
    options += ["--classes", ",".join(spec.classes)]
    assert export("finders:Somebodys", *options, target=target) == 0
    ours, other = (open_engine(bundle, "onnxruntime") for bundle in (Bundle.open(target), shipped))
    street = Street(spec.height, spec.width, seed=7)
    found = 0
    for number in range(0, 60, 20):
        pixels = street.frame(number).pixels
        first, second = ours.run(pixels), other.run(pixels)
        assert isinstance(first, InstanceOutputs) and isinstance(second, InstanceOutputs)
        found += len(second.scores)
        wanted = {name: getattr(second, name) for name in ("scores", "labels", "boxes", "masks")}
        wanted["masks"] = wanted["masks"].astype(np.int64)
        check_alike({name: getattr(first, name) for name in wanted}, wanted)
    assert found > 20


#: (adapter of ``Queries``, further options, words of the sentence)
REFUSED: dict[str, tuple[str, list[str], list[str]]] = {
    "no adapter": ("", [], ["a SimpleNamespace", "--adapter"]),
    "tuples": ("tuples", [], ["a tuple came", "--adapter"]),
    "nothing": ("nothing", [], ["a mapping with nothing"]),
    "lists": ("lists", [], ["scores is to be a tensor", "a list"]),
    "integers": ("integers", [], ["scores are floating-point", "torch.int64"]),
    "logits": ("logits", [], ["probabilities, 0 to 1", "softmax"]),
    "a background": ("background", [], ["scores 4 classes, and 3 names", "background"]),
    "too many names": ("like_detr", ["--classes", "a,b,c,d,e"], ["3 classes, and 5 names"]),
    "a name for the background": ("like_detr", ["--classes", "no,a,b,c"], ["no name for it"]),
    "another batch": ("two", [], ["masks of one picture", "(2, 14, 8, 12)"]),
    "other candidates": ("fewer", [], ["of 5 candidates", "of 14"]),
    "flat masks": ("flat", [], ["4 dimensions", "(1, 14, 96)"]),
    "no masks": ("no_masks", [], ["boxes_cxcywh, scores came", "no masks"]),
    "boxes twice": ("both", [], ["boxes came in two forms"]),
    "half boxes": ("corners", [], ["four numbers each", "(1, 14, 2)"]),
    "shares for pixels": ("shares", [], ["in pixels", "boxes_cxcywh"]),
    "pixels for shares": ("pixels", [], ["are shares of the input", "divide"]),
    "prototypes alone": ("lone", [], ["go together"]),
    "too few coefficients": ("uneven", [], ["its coefficient", "(1, 14, 3)"]),
    "prototypes without boxes": ("unboxed", [], ["cropped to boxes"]),
    "large masks": ("large", [], ["32x48", "64x96"]),
    "no numbers": ("no_numbers", [], ["no numbers", "diverged"]),
    "a faulty adapter": ("wrong", [], ["adapter", "AttributeError"]),
    "a confidence": ("like_detr", ["--confidence"], ["--confidence does not go"]),
    "corners": ("like_detr", ["--align-corners"], ["--align-corners does not go"]),
    "views": ("like_detr", ["--views", "0.5"], ["views are averaged"]),
    "an overlap": ("like_detr", ["--overlap", "1.5"], ["between 0 and 1"]),
    "a score": ("like_detr", ["--least-score", "nan"], ["between 0 and 1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, options, words = REFUSED[case]
    if case not in ("views", "corners"):
        # All of these are told before anything is traced, which is what takes time.
        monkeypatch.setattr("edgeseg.export.foreign.traced", never)
    asked = ["--adapter", f"finders:{adapter}"] if adapter else []
    assert export("finders:Queries", *asked, *options, target=tmp_path / "mine") == 2
    check_sentence(capsys, words)
    assert not (tmp_path / "mine").exists()


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("this was to be refused before")


def check_sentence(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edgeseg: ")
    assert len(line) < 480
    for word in words:
        assert word in line


def test_a_number_of_detections_that_depends_on_the_picture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("finders:Selecting", target=tmp_path / "mine") == 2
    check_sentence(capsys, ["the shape of boxes_cxcywh depends on the picture"])
    # Here it could, and no picture that was tried shows it.
    assert export("finders:taking_all", target=tmp_path / "mine") == 2
    check_sentence(capsys, ["(NonZero)", "depends on the picture"])


def test_options_of_instances_are_refused_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, option in (("finders:Dense", "--overlap"), ("yolact_resnet50", "--least-score")):
        arguments = ["export", model, "--size", SIZE, option, "0.5", "-o", str(tmp_path / "mine")]
        assert main(arguments) == 2
        assert "overlap" in capsys.readouterr().err


def test_raw_detections_are_found_in_objects_too() -> None:
    from types import SimpleNamespace

    scores, masks = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4, 4)
    found = raw_of(SimpleNamespace(masks=masks, scores=scores, boxes=None, other=3))
    assert list(found) == ["scores", "masks"]
    assert found["masks"] is masks


# ---- ONNX files


def written(
    path: Path, module: torch.nn.Module, names: list[str], *, half: bool = False, opset: int = 18
) -> Path:
    """``module`` as PyTorch's own exporter writes it."""
    kind = torch.float16 if half else torch.float32
    with quiet():
        program = torch.onnx.export(
            module.eval().to(kind),
            (torch.zeros(1, 3, HEIGHT, WIDTH, dtype=kind),),
            dynamo=True,
            opset_version=opset,
            input_names=["pixels"],
            output_names=names,
            verbose=False,
        )
        assert program is not None
        program.save(path)
    return path


def test_a_file_with_named_outputs_becomes_a_bundle(tmp_path: Path) -> None:
    names = ["scores", "masks", "boxes_cxcywh", "more"]
    path = written(tmp_path / "foreign.onnx", own("Named")(), names, opset=20)
    target = tmp_path / "mine"
    assert export(str(path), target=target) == 0
    manifest = json.loads((target / "bundle.json").read_text())
    assert manifest["verification"]["reference"] == "the original file"
    module, adapter = own("Queries")(), own("like_detr")
    check_bundle(target, lambda seed: found_by(module, adapter, seed), overlap=1.0)


def test_a_pair_of_outputs_becomes_a_bundle(tmp_path: Path) -> None:
    path = written(tmp_path / "foreign.onnx", own("Pair")(), ["output0", "output1"])
    target = tmp_path / "mine"
    assert export(str(path), target=target) == 0
    check_bundle(target, lambda seed: found_by(own("Dense")(), dict, seed), overlap=0.5)


@pytest.mark.slow
def test_the_order_of_a_pair_and_half_precision_are_no_matter(tmp_path: Path) -> None:
    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = own("Pair")()

        def forward(self, x: torch.Tensor) -> Any:
            return tuple(part.to(x.dtype) for part in self.pair(x))[::-1]

    path = written(tmp_path / "foreign.onnx", Turned(), ["p", "rows"], half=True)
    target = tmp_path / "mine"
    assert export(str(path), target=target) == 0
    assert Bundle.open(target).spec.classes == tuple(CLASSES.split(","))


def flat_file(path: Path, outputs: dict[str, tuple[int, ...]], *, selects: bool = False) -> Path:
    """A file whose ``outputs`` are one number everywhere; or those above zero, which are all."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)]
    weights = [onnx.numpy_helper.from_array(np.array([-1]), "whole")]
    for name, shape in outputs.items():
        array = np.full(shape, 0.5, np.float32)
        weights.append(onnx.numpy_helper.from_array(array, f"{name}_0"))
        nodes.append(helper.make_node("Mul", [f"{name}_0", "mean"], [f"{name}_1"]))
        whole = f"{name}_2" if selects else name
        nodes.append(helper.make_node("Sigmoid", [f"{name}_1"], [whole]))
        if selects:
            last = onnx.numpy_helper.from_array(np.array([1, -1, *shape[2:]]), f"{name}_shape")
            weights.append(last)
            nodes += [
                helper.make_node("Cast", [whole], [f"{name}_is"], to=TensorProto.BOOL),
                helper.make_node("Reshape", [f"{name}_is", "whole"], [f"{name}_3"]),
                helper.make_node("Compress", [whole, f"{name}_3"], [f"{name}_4"]),
                helper.make_node("Reshape", [f"{name}_4", f"{name}_shape"], [name]),
            ]
    picture = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "h", "w"])
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", [picture], infos, weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path
    )
    return path


BAD_FILES: dict[str, tuple[dict[str, tuple[int, ...]], list[str], list[str]]] = {
    "other names": ({"logits": (1, 5, 4), "a": (1,), "b": (1,)}, [], ["logits, a, b", "scores"]),
    "a pair of others": ({"a": (1, 9, 7), "b": (1, 5)}, [], ["the outputs b, a", "YOLOv8-seg"]),
    "other classes": (
        {"a": (1, 4 + 80 + 32, 50), "b": (1, 32, 8, 12)},
        [],
        ["(1, 116, 50)", "3 classes", "32 coefficients"],
    ),
    "no masks": ({"boxes": (1, 9, 4), "scores": (1, 9, 3)}, [], ["boxes, scores came", "no masks"]),
    "another batch": (
        {"scores": (2, 9, 3), "masks": (2, 9, 8, 12)},
        [],
        ["scores of one picture", "(2, 9, 3)"],
    ),
    "an output's name": (
        {"scores": (1, 9, 3), "masks": (1, 9, 8, 12)},
        ["--output-name", "scores"],
        ["--output-name does not go"],
    ),
    "an adapter": (
        {"scores": (1, 9, 3), "masks": (1, 9, 8, 12)},
        ["--adapter", "finders:like_detr"],
        ["--adapter does not go with an ONNX file"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_taken_is_refused_in_a_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, options, words = BAD_FILES[case]
    path = flat_file(tmp_path / "foreign.onnx", outputs)
    assert export(str(path), *options, target=tmp_path / "mine") == 2
    check_sentence(capsys, words)
    assert not (tmp_path / "mine").exists()


def test_a_file_that_selects_itself_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {"scores": (1, 9, 3), "masks": (1, 9, 8, 12)}
    path = flat_file(tmp_path / "foreign.onnx", outputs, selects=True)
    assert export(str(path), target=tmp_path / "mine") == 2
    check_sentence(capsys, ["selects its detections itself (Compress)"])
