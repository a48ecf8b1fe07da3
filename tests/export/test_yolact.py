"""YOLACT against the published networks, and its detections against the parity packs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import cv2
import torch
from torch import Tensor
from torch.nn import functional

from edgeseg.errors import RequestError, WeightsError
from edgeseg.export.models import Yolact, create, definition
from edgeseg.export.models.instance import FoundInstances
from edgeseg.export.models.selection import Selection
from edgeseg.export.models.yolact import Priors, decoded, mask_probabilities, selected
from edgeseg.export.preprocess import network_input
from edgeseg.export.weights import load_weights

if TYPE_CHECKING:
    from tests.export.conftest import Parity

Packs = Callable[[str], "Parity"]

#: parity pack -> our name
PUBLISHED = {
    "yolact_resnet50": "yolact_resnet50",
    "yolact_base": "yolact_resnet101",
    "yolact_darknet53": "yolact_darknet53",
}
NAMES = (*PUBLISHED.values(), "yolact_resnet18", "yolact_mobilenetv2")


def yolact(name: str, num_classes: int, *, auxiliary_heads: bool = False) -> Yolact:
    return cast(Yolact, create(name, num_classes, auxiliary_heads=auxiliary_heads))


@pytest.fixture(scope="module")
def pack(parity: Packs) -> Parity:
    return parity("yolact_resnet50")


@pytest.fixture(scope="module")
def heads(pack: Parity) -> dict[str, Tensor]:
    """The stored heads of the case "detection", float32."""
    return {
        name: torch.from_numpy(pack.wanted[f"heads.{name}"].astype(np.float32))
        for name in ("loc", "conf", "mask", "priors", "proto")
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_state_dict_is_that_of_published_checkpoints(parity: Packs, name: str) -> None:
    pack = parity(name).pack
    with torch.device("meta"):
        network = yolact(PUBLISHED[name], 81, auxiliary_heads=True)
        bare = yolact(PUBLISHED[name], 81)
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert shapes == {**pack["keys"], **pack["train_only_keys"]}
    assert {key: list(value.shape) for key, value in bare.state_dict().items()} == pack["keys"]
    assert bare.parameter_count() == pack["n_parameters"]


def test_what_published_checkpoints_hold_besides_is_passed_over() -> None:
    network = yolact("yolact_resnet18", 4)
    state = {
        **yolact("yolact_resnet18", 4, auxiliary_heads=True).state_dict(),
        "fpn.downsample_layers.2.weight": torch.zeros(256, 256, 3, 3),
        "backbone.layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3),
    }
    load_weights(network, state)
    assert torch.equal(
        network.state_dict()["fpn.lat_layers.0.bias"], state["fpn.lat_layers.0.bias"]
    )
    with pytest.raises(WeightsError, match=r"backbone\.layers\.4\.0\.conv1\.weight"):
        load_weights(network, {**state, "backbone.layers.4.0.conv1.weight": torch.zeros(1)})


def test_yolact_plus_plus_is_named(parity: Packs) -> None:
    keys = parity("yolact_plus_resnet50").pack["keys"]
    state = {key: torch.zeros(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        network = yolact("yolact_resnet50", 81)
    with pytest.raises(WeightsError, match=r"a checkpoint of YOLACT\+\+.* yolact_plus_resnet50"):
        load_weights(network, state)


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_counted_from_a_checkpoint(name: str) -> None:
    with torch.device("meta"):
        network = yolact(name, 7)
    assert (network.num_classes, network.named_classes) == (7, 6)
    assert definition(name).task == "instance"
    assert definition(name).network.classes_in(network.state_dict()) == 7


@pytest.mark.parametrize("num_classes", [1, 0, 257])
def test_an_instance_model_needs_a_class_besides_the_background(num_classes: int) -> None:
    with pytest.raises(RequestError, match="of which one is the background"):
        create("yolact_resnet18", num_classes)


@pytest.mark.slow
def test_raw_heads_are_those_of_the_published_network(pack: Parity) -> None:
    network = yolact("yolact_resnet50", 81, auxiliary_heads=True)
    arrays = pack.arrays(training=True)
    load_weights(network, {key: torch.from_numpy(array) for key, array in arrays.items()})
    with torch.inference_mode():
        x = torch.from_numpy(pack.input("tensor"))
        features = network.backbone(x)
        levels = network.fpn(features)
        found: dict[str, Tensor] = {
            **dict(zip(("c3", "c4", "c5"), features, strict=True)),
            **dict(zip(("p3", "p4", "p5", "p6", "p7"), levels, strict=True)),
        }
        heads = network(x)
        found.update({name: cast(Tensor, value) for name, value in heads.items()})
        assert network.semantic_seg_conv is not None
        found["segm"] = network.semantic_seg_conv(levels[0])
    for name, value in found.items():
        pack.check(f"tensor.{name}", value.numpy())


@pytest.mark.slow
def test_the_whole_way_of_a_picture_is_that_of_the_published_network(pack: Parity) -> None:
    network = yolact("yolact_resnet50", 81)
    load_weights(network, {key: torch.from_numpy(array) for key, array in pack.arrays().items()})
    fitted = functional.interpolate(
        torch.from_numpy(pack.input("image").astype(np.float32)).permute(2, 0, 1)[None],
        size=(550, 550),
        mode="bilinear",
    )
    x = normalised(fitted, "yolact_resnet50")
    found = network.detect(x, 100)
    boxes = found.boxes.numpy() / 550
    want = {key: pack.wanted[f"image.det.{key}"] for key in ("box", "class", "score")}
    partners = 0
    for row in range(100):
        same = (
            (found.labels.numpy() == want["class"][row])
            & (np.abs(found.scores.numpy() - want["score"][row]) <= 1e-4)
            & (np.abs(boxes - want["box"][row]).max(axis=1) <= 1e-4)
        )
        partners += bool(same.any())
    assert partners >= 98


def normalised(x: Tensor, name: str) -> Tensor:
    """(1, 3, H, W) BGR float -> what the network reads, by the model's definition."""
    folded = definition(name).preprocessing
    assert folded.order == "rgb"
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (folded.mean, folded.std))
    return (x.flip(1) / 255 - mean) / std


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_preprocessing_is_that_of_the_pack(parity: Packs, name: str) -> None:
    image = parity(name).input("image")
    found = network_input(image, definition(PUBLISHED[name]).preprocessing)[0].numpy()
    x = image.astype(np.float64)
    if name != "yolact_darknet53":
        x = (x - (103.94, 116.78, 123.68)) / (57.38, 57.12, 58.40)
    else:
        x = x / 255
    np.testing.assert_allclose(found, x[..., ::-1].transpose(2, 0, 1), atol=1e-5)


def test_the_network_input_is_that_of_the_pack(pack: Parity) -> None:
    image = torch.from_numpy(pack.input("image").astype(np.float32)).permute(2, 0, 1)[None]
    fitted = functional.interpolate(image, size=(550, 550), mode="bilinear")
    pack.check("image.normalised", normalised(fitted, "yolact_resnet50").numpy())


def test_candidates_and_boxes_are_those_of_the_pack(pack: Parity, heads: dict[str, Tensor]) -> None:
    best = torch.softmax(heads["conf"], dim=1)[:, 1:].max(dim=1).values
    assert int((best > 0.05).sum()) == int(pack.wanted["detection.candidates"][0])
    pack.check("detection.decoded", decoded(heads["loc"], heads["priors"]).numpy())


@pytest.mark.parametrize(
    ("case", "selection"),
    [("det", Selection()), ("crossclass", Selection(cross_class=True, capacity=200))],
)
def test_detections_are_those_of_the_pack(
    pack: Parity, heads: dict[str, Tensor], case: str, selection: Selection
) -> None:
    rows, labels, scores = selected(heads["loc"], heads["conf"], heads["priors"], selection)
    pack.check(f"detection.{case}.class", labels.numpy().astype(np.int32))
    pack.check(f"detection.{case}.score", scores.numpy())
    pack.check(f"detection.{case}.mask", heads["mask"][rows].numpy())
    boxes = decoded(heads["loc"][rows], heads["priors"][rows])
    pack.check(f"detection.{case}.box", boxes.numpy())


def test_boxes_and_masks_at_picture_size_are_those_of_the_pack(
    pack: Parity, heads: dict[str, Tensor]
) -> None:
    case = pack.pack["input"]["detection"]
    rows, labels, scores = selected(heads["loc"], heads["conf"], heads["priors"], Selection())
    kept = scores > case["score_threshold"]
    rows, labels, scores = rows[kept], labels[kept], scores[kept]
    pack.check("detection.post.class", labels.numpy().astype(np.int32))
    pack.check("detection.post.score", scores.numpy())
    boxes = decoded(heads["loc"][rows], heads["priors"][rows])
    height, width = case["height"], case["width"]
    pixels = boxes.clamp(0, 1) * torch.tensor([width, height, width, height])
    assert np.abs(pixels.int().numpy() - pack.wanted["detection.post.box"]).max() <= 1
    masks = mask_probabilities(heads["proto"], heads["mask"][rows], boxes)
    large = functional.interpolate(masks[None], size=(height, width), mode="bilinear")[0]
    pack.check("detection.post.masks_packed", np.packbits((large > 0.5).numpy(), axis=-1))


@pytest.mark.parametrize(("height", "width"), [(550, 550), (138, 170), (64, 64), (400, 711)])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2 ** (1 / 3), 2 ** (2 / 3))])
@pytest.mark.parametrize("square", [True, False])
def test_priors_are_those_of_a_plain_loop(
    height: int, width: int, scales: tuple[float, ...], square: bool
) -> None:
    levels = [(-(-height // step), -(-width // step)) for step in (8, 16, 32, 64, 128)]
    rows = []
    for (cells_y, cells_x), size in zip(levels, (24, 48, 96, 192, 384), strict=True):
        base = size * math.sqrt(height * width) / 550
        if square:
            base = max(math.floor(base), 1)
        for y in range(cells_y):
            for x in range(cells_x):
                for scale in scales:
                    for ratio in (1, 0.5, 2):
                        wide = base * scale * math.sqrt(ratio)
                        high = wide if square else base * scale / math.sqrt(ratio)
                        centre = ((x + 0.5) / cells_x, (y + 0.5) / cells_y)
                        rows.append((*centre, wide / width, high / height))
    found = Priors(scales=scales, square=square).of(levels, height, width)
    np.testing.assert_allclose(found.numpy(), np.array(rows), atol=1e-7)


def test_priors_in_pixels_are_the_same_in_a_crop_and_in_the_whole() -> None:
    priors = Priors(sizes=(16, 32, 64, 128, 256), relative=False)
    found = {}
    for height, width in ((288, 384), (384, 512)):
        levels = [(-(-height // step), -(-width // step)) for step in (8, 16, 32, 64, 128)]
        scale = torch.tensor([width, height, width, height])
        found[height] = {tuple(row) for row in (priors.of(levels, height, width) * scale).tolist()}
    crop, whole = ({tuple(round(v, 2) for v in row) for row in rows} for rows in found.values())
    assert crop <= whole
    assert (4.0, 4.0, 16.0, 16.0) in crop
    assert (192.0, 64.0, round(256 * 2**0.5, 2), round(256 / 2**0.5, 2)) in crop


def test_priors_at_550_are_those_of_the_pack(pack: Parity) -> None:
    levels = [(cells, cells) for cells in (69, 35, 18, 9, 5)]
    pack.check("tensor.priors", Priors(square=True).of(levels, 550, 550).numpy())
    assert create("yolact_resnet50", 81).boxes == Priors(square=True)


@pytest.mark.parametrize("name", ["yolact_resnet18", "yolact_mobilenetv2"])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (138, 170)])
@torch.inference_mode()
def test_any_size_goes(name: str, size: tuple[int, int]) -> None:
    network = yolact(name, 5)
    heads = network(torch.rand(1, 3, *size))
    count = heads["priors"].shape[0]
    assert heads["loc"].shape == (1, count, 4)
    assert heads["conf"].shape == (1, count, 5)
    assert heads["mask"].shape == (1, count, 32)
    assert heads["proto"].shape == (1, *network.mask_size(*size), 32)
    assert "segm" not in heads
    torch.testing.assert_close(network.priors(*size), heads["priors"], rtol=0, atol=0)


def test_training_gives_the_semantic_head_too() -> None:
    network = yolact("yolact_resnet18", 5, auxiliary_heads=True).train()
    heads = network(torch.rand(2, 3, 64, 96))
    assert heads["segm"].shape == (2, 4, 8, 12)
    assert heads["conf"].shape[0] == 2


def slow_selection(
    boxes: np.ndarray, scores: np.ndarray, selection: Selection
) -> list[tuple[int, int, float]]:
    """(row, label, score) of every detection, one pair of boxes after the other, in float64."""

    def iou(a: np.ndarray, b: np.ndarray) -> float:
        common_w = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
        common_h = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        common = common_w * common_h
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
        return float(common / union) if union > 0 else 0.0

    rows = [row for row in range(len(boxes)) if scores[row].max() > selection.score_threshold]
    if selection.cross_class:
        groups = [[(row, int(scores[row].argmax())) for row in rows]]
    else:
        groups = [[(row, label) for row in rows] for label in range(scores.shape[1])]
    kept: list[tuple[int, int, float]] = []
    for group in groups:
        ordered = sorted(group, key=lambda pair: -scores[pair])[: selection.per_class]
        for rank, pair in enumerate(ordered):
            if all(
                iou(boxes[better[0]], boxes[pair[0]]) <= selection.iou_threshold
                for better in ordered[:rank]
            ):
                kept.append((*pair, float(scores[pair])))
    return sorted(kept, key=lambda entry: -entry[2])[: selection.capacity]


SELECTIONS = {
    "published": Selection(),
    "few": Selection(capacity=7, per_class=5, score_threshold=0.2, iou_threshold=0.3),
    "cross-class": Selection(cross_class=True, capacity=50, per_class=30),
    "nothing": Selection(score_threshold=1.0),
}


def random_heads(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """loc, conf, priors with many overlapping boxes and distinct scores."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(rows, 4, generator=generator)
    conf = torch.randn(rows, classes + 1, generator=generator) * 2
    centres = torch.rand(rows, 2, generator=generator)
    sides = torch.rand(rows, 2, generator=generator) * 0.4 + 0.05
    return loc, conf, torch.cat([centres, sides], dim=1)


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_the_selection_is_that_of_a_plain_loop(selection: Selection) -> None:
    loc, conf, priors = random_heads(60, 4, 3)
    rows, labels, scores = selected(loc, conf, priors, selection)
    odds = torch.softmax(conf.double(), dim=1)[:, 1:].numpy()
    boxes = decoded(loc.double(), priors.double()).numpy()
    wanted = slow_selection(boxes, odds, selection)
    assert [(int(r), int(c)) for r, c in zip(rows, labels, strict=True)] == [
        entry[:2] for entry in wanted
    ]
    np.testing.assert_allclose(scores.numpy(), [entry[2] for entry in wanted], atol=1e-6)


def test_what_is_no_number_is_no_detection() -> None:
    loc, conf, priors = random_heads(40, 3, 1)
    clean = selected(loc[2:], conf[2:], priors[2:], Selection())
    loc[0, 2] = math.inf
    conf[1, 2] = math.nan
    rows, labels, scores = selected(loc, conf, priors, Selection())
    assert torch.equal(rows, clean[0] + 2)
    assert torch.equal(labels, clean[1])
    assert torch.equal(scores, clean[2])


def test_masks_are_rounded_half_up_into_levels() -> None:
    masks = torch.tensor([[[0.0, 1.0, 0.5, 0.4999 / 255, 0.5001 / 255]]])
    none = torch.zeros(1)
    levels = FoundInstances(torch.zeros(1, 4), none, none.long(), masks).levels()
    assert levels.dtype == torch.uint8
    assert levels.flatten().tolist() == [0, 255, 128, 0, 1]


def test_opencv_fits_as_the_pack_does(pack: Parity) -> None:
    # Geometry.fit resizes uint8; the published network resizes floats. Half a level apart.
    image = pack.input("image")
    fitted = cv2.resize(image, (550, 550), interpolation=cv2.INTER_LINEAR)
    exact = functional.interpolate(
        torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None],
        size=(550, 550),
        mode="bilinear",
    )[0].permute(1, 2, 0)
    assert np.abs(fitted - exact.numpy()).max() <= 1.0
