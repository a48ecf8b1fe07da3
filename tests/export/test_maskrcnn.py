"""Mask R-CNN against a second telling of the papers: loops and float64 on the arrays of a state."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from torch import Tensor
from torch.nn import functional

from edgeseg.errors import RequestError
from edgeseg.export.models import create
from edgeseg.export.models.boxes import decoded, grouped_nms, nms
from edgeseg.export.models.maskrcnn import MaskRCNN, Widths, maskrcnn_resnet50_fpn, pasted
from edgeseg.export.models.proposals import ProposalRules, anchors_of
from edgeseg.export.models.roialign import level_of, pyramid_roi_align, roi_align
from edgeseg.export.models.roiheads import DetectionRules
from edgeseg.export.weights import load_weights

if TYPE_CHECKING:
    from tests.export.conftest import Parity

Floats = NDArray[np.float64]

CLASSES = 5
PROPOSALS = ProposalRules(per_level=40, total=25)
DETECTIONS = DetectionRules(score=0.15, total=30)


class Paper:
    """The network as arXiv 1506.01497, 1612.03144 and 1703.06870 tell it; one picture at a time."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return functional.conv2d(x, kernel, bias, stride, padding=kernel.shape[-1] // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / var.sqrt() * weight + bias

    def block(self, x: Tensor, name: str, stride: int) -> Tensor:
        y = self.norm(self.conv(x, f"{name}.conv1"), f"{name}.bn1").relu()
        y = self.norm(self.conv(y, f"{name}.conv2", stride), f"{name}.bn2").relu()
        y = self.norm(self.conv(y, f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in self.state:
            x = self.norm(self.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return (x + y).relu()

    def features(self, x: Tensor) -> list[Tensor]:
        """P2 to P6."""
        y = self.norm(self.conv(x, "backbone.body.conv1", 2), "backbone.body.bn1").relu()
        y = functional.max_pool2d(y, 3, 2, padding=1)
        stages = []
        for stage in (1, 2, 3, 4):
            index = 0
            while f"backbone.body.layer{stage}.{index}.conv1.weight" in self.state:
                stride = 2 if stage > 1 and index == 0 else 1
                y = self.block(y, f"backbone.body.layer{stage}.{index}", stride)
                index += 1
            stages.append(y)
        inner = [self.conv(y, f"backbone.fpn.inner_blocks.{i}.0") for i, y in enumerate(stages)]
        for i in (2, 1, 0):
            inner[i] = inner[i] + inner[i + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
        levels = [self.conv(y, f"backbone.fpn.layer_blocks.{i}.0") for i, y in enumerate(inner)]
        return [*levels, levels[3][:, :, ::2, ::2]]

    def proposals(
        self, levels: list[Tensor], size: tuple[int, int], limits: tuple[int, int]
    ) -> Floats:
        found: list[tuple[float, Floats]] = []
        for level, (features, side) in enumerate(zip(levels, (32, 64, 128, 256, 512), strict=True)):
            hidden = self.conv(features, "rpn.head.conv.0.0").relu()
            logits = self.conv(hidden, "rpn.head.cls_logits")[0].numpy()
            deltas = self.conv(hidden, "rpn.head.bbox_pred")[0].numpy()
            stride = size[0] // logits.shape[1]
            assert stride == 4 << level
            scored = []
            for y in range(logits.shape[1]):
                for x in range(logits.shape[2]):
                    for shape, ratio in enumerate((0.5, 1.0, 2.0)):
                        half = np.round(
                            np.array([side / math.sqrt(ratio), side * math.sqrt(ratio)]) / 2
                        )
                        centre = np.array([x * stride, y * stride])
                        anchor = np.concatenate([centre - half, centre + half])
                        box = moved(anchor, deltas[4 * shape : 4 * shape + 4, y, x], (1, 1, 1, 1))
                        score = 1 / (1 + math.exp(-logits[shape, y, x]))
                        scored.append((score, within(box, limits)))
            scored.sort(key=lambda entry: -entry[0])
            best = [
                (score, box)
                for score, box in scored[: PROPOSALS.per_level]
                if min(box[2] - box[0], box[3] - box[1]) >= 1e-3
            ]
            found += greedy(best, 0.7)
        found.sort(key=lambda entry: -entry[0])
        return np.array([box for _, box in found[: PROPOSALS.total]])

    def pooled(self, levels: list[Tensor], boxes: Floats, bins: int) -> Tensor:
        regions = []
        for box in boxes:
            area = (box[2] - box[0]) * (box[3] - box[1])
            k = math.floor(4 + math.log2(math.sqrt(area) / 224) + 1e-6)
            k = min(max(k, 2), 5)
            regions.append(looped_roi_align(levels[k - 2][0].numpy(), box / 2**k, bins, 2))
        return torch.from_numpy(np.array(regions))

    def detections(
        self, levels: list[Tensor], proposals: Floats, limits: tuple[int, int]
    ) -> tuple[Floats, list[int], list[float]]:
        x = self.pooled(levels, proposals, 7).flatten(1)
        for name in ("fc6", "fc7"):
            x = self.linear(x, f"roi_heads.box_head.{name}").relu()
        logits = self.linear(x, "roi_heads.box_predictor.cls_score").numpy()
        deltas = self.linear(x, "roi_heads.box_predictor.bbox_pred").numpy()
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = odds / odds.sum(axis=1, keepdims=True)
        found: list[tuple[float, Floats, int]] = []
        for label in range(1, logits.shape[1]):
            scored = []
            for row, proposal in enumerate(proposals):
                part = deltas[row, 4 * label : 4 * label + 4]
                box = within(moved(proposal, part, (10, 10, 5, 5)), limits)
                if shares[row, label] > DETECTIONS.score and (box[2:] - box[:2]).min() >= 1e-2:
                    scored.append((float(shares[row, label]), box))
            scored.sort(key=lambda entry: -entry[0])
            found += [(score, box, label) for score, box in greedy(scored, 0.5)]
        found.sort(key=lambda entry: -entry[0])
        found = found[: DETECTIONS.total]
        return (
            np.array([box for _, box, _ in found]).reshape(-1, 4),
            [label for _, _, label in found],
            [score for score, _, _ in found],
        )

    def masks(self, levels: list[Tensor], boxes: Floats, labels: list[int]) -> Floats:
        x = self.pooled(levels, boxes, 14)
        for index in range(4):
            x = self.conv(x, f"roi_heads.mask_head.{index}.0").relu()
        name = "roi_heads.mask_predictor.conv5_mask"
        kernel = self.state[f"{name}.weight"]
        # Stride 2 and kernel 2: every pixel becomes a block of its own.
        x = torch.einsum("nchw,cdyx->ndhywx", x, kernel).flatten(4, 5).flatten(2, 3)
        x = (x + self.state[f"{name}.bias"].view(1, -1, 1, 1)).relu()
        logits = self.conv(x, "roi_heads.mask_predictor.mask_fcn_logits").numpy()
        chosen: Floats = np.array([logits[i, label] for i, label in enumerate(labels)])
        return 1 / (1 + np.exp(-chosen))

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]


def moved(box: Floats, delta: Floats, weights: tuple[float, float, float, float]) -> Floats:
    dx, dy, dw, dh = delta / np.array(weights)
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + width / 2 + dx * width, box[1] + height / 2 + dy * height
    width *= math.exp(min(dw, math.log(1000 / 16)))
    height *= math.exp(min(dh, math.log(1000 / 16)))
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def within(box: Floats, limits: tuple[int, int]) -> Floats:
    height, width = limits
    return np.array([min(max(v, 0), m) for v, m in zip(box, (width, height) * 2, strict=True)])


def iou(a: Floats, b: Floats) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return float(width * height / (both - width * height))


def greedy(scored: list[tuple[float, Floats]], limit: float) -> list[tuple[float, Floats]]:
    """Non-maximum suppression of boxes that are already in order."""
    kept: list[tuple[float, Floats]] = []
    for score, box in scored:
        if all(iou(box, other) <= limit for _, other in kept):
            kept.append((score, box))
    return kept


def looped_roi_align(features: Floats, box: Floats, bins: int, ratio: int) -> Floats:
    """RoIAlign of one box in pixels of ``features`` (channels, h, w), not aligned, by its
    definition."""
    width, height = max(box[2] - box[0], 1), max(box[3] - box[1], 1)
    out = np.zeros((len(features), bins, bins))
    for i in range(bins):
        for j in range(bins):
            for a in range(ratio):
                for b in range(ratio):
                    y = box[1] + (i + (a + 0.5) / ratio) * height / bins
                    x = box[0] + (j + (b + 0.5) / ratio) * width / bins
                    out[:, i, j] += sample(features, y, x) / ratio**2
    return out


def sample(features: Floats, y: float, x: float) -> Floats:
    _, rows, columns = features.shape
    if not (-1 <= y <= rows and -1 <= x <= columns):
        return np.zeros(len(features))
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
    top, left = int(y), int(x)
    below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    upper = features[:, top, left] * (1 - x + left) + features[:, top, right] * (x - left)
    lower = features[:, below, left] * (1 - x + left) + features[:, below, right] * (x - left)
    found: Floats = upper * (1 - y + top) + lower * (y - top)
    return found


def looped_paste(mask: Floats, box: Floats, height: int, width: int) -> Floats:
    """One mask in its picture, pixel by pixel."""
    side = len(mask) + 2
    padded = np.pad(mask, 1)
    grown = side / len(mask)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half_x, half_y = (box[2] - box[0]) / 2 * grown, (box[3] - box[1]) / 2 * grown
    x1, y1, x2, y2 = (math.trunc(v) for v in (x - half_x, y - half_y, x + half_x, y + half_y))
    rows, columns = y2 - y1 + 1, x2 - x1 + 1
    out = np.zeros((height, width))
    for py in range(max(y1, 0), min(y2 + 1, height)):
        for px in range(max(x1, 0), min(x2 + 1, width)):
            at_y = max((py - y1 + 0.5) * side / rows - 0.5, 0)
            at_x = max((px - x1 + 0.5) * side / columns - 0.5, 0)
            out[py, px] = sample(padded[None], at_y, at_x)[0]
    return out


@pytest.fixture(scope="module")
def network(lively: Callable[..., Any]) -> MaskRCNN:
    """A small Mask R-CNN with random weights, in float64."""
    small = MaskRCNN(
        CLASSES,
        min_size=64,
        max_size=112,
        widths=Widths(blocks=(2, 1, 1, 1), stem=4, pyramid=6, hidden=16),
        proposal_rules=PROPOSALS,
        detection_rules=DETECTIONS,
    )
    lively(small, 4)
    with torch.no_grad():
        # Features of about 1, boxes of all sizes, and more than one class that wins.
        for name, kernel in small.backbone.fpn.layer_blocks.named_parameters():
            kernel.mul_(0.05 if name.endswith("weight") else 1.0)
        small.rpn.head.bbox_pred.weight *= 0.4
        small.roi_heads.box_predictor.bbox_pred.weight *= 0.5
        small.roi_heads.box_predictor.cls_score.weight *= 0.2
    return small.double()


def picture(height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator, dtype=torch.float64)
    return functional.interpolate(coarse, (height, width), mode="bilinear")[0]


@torch.no_grad()
def test_every_step_follows_the_papers(network: MaskRCNN) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 64, 96, generator=generator, dtype=torch.float64)
    limits = (60, 90)
    paper = Paper(network.state_dict())
    levels = paper.features(x)
    features = network.backbone(x)
    assert list(features) == ["0", "1", "2", "3", "pool"]
    for found, wanted in zip(features.values(), levels, strict=True):
        torch.testing.assert_close(found, wanted)

    proposals = paper.proposals(levels, (64, 96), limits)
    (found,) = network.rpn(features, (64, 96), [limits])
    assert len(proposals) == PROPOSALS.total
    np.testing.assert_allclose(found.numpy(), proposals, atol=1e-4)

    boxes, labels, scores = paper.detections(levels, proposals, limits)
    (detections,) = network.detections(x, [limits])
    assert len(boxes) == DETECTIONS.total and len(set(labels)) > 1
    np.testing.assert_allclose(detections["boxes"].numpy(), boxes, atol=1e-4)
    assert detections["labels"].tolist() == labels
    np.testing.assert_allclose(detections["scores"].numpy(), scores, atol=1e-6)
    assert detections["masks"].shape == (len(boxes), 1, 28, 28)
    masks = paper.masks(levels, boxes, labels)
    assert masks.std() > 0.02
    np.testing.assert_allclose(detections["masks"][:, 0].numpy(), masks, atol=1e-5)


@torch.no_grad()
def test_pictures_of_several_sizes_in_one_list(network: MaskRCNN) -> None:
    """Each as if it were alone, except that the padding is common."""
    images = [picture(50, 80, 1), picture(90, 40, 2)]
    x, sizes = network.network_input(images)
    # 64 / 50 would make the long side 102; 64 / 40 would make it 144, more than 112.
    assert sizes == [(64, 102), (112, 49)]
    assert x.shape == (2, 3, 128, 128)
    for image, (height, width), padded in zip(images, sizes, x, strict=True):
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
        wanted = functional.interpolate(
            ((image - mean) / std)[None], (height, width), mode="bilinear", align_corners=False
        )[0]
        torch.testing.assert_close(padded[:, :height, :width], wanted)
        assert not padded[:, height:].any() and not padded[:, :, width:].any()

    results = network(images)
    inside = network.detections(x, sizes)
    for image, size, result, found in zip(images, sizes, results, inside, strict=True):
        height, width = image.shape[-2:]
        scale = np.array([width / size[1], height / size[0]] * 2)
        boxes = found["boxes"].numpy() * scale
        np.testing.assert_allclose(result["boxes"].numpy(), boxes, atol=1e-5)
        assert result["masks"].shape == (len(boxes), 1, height, width)
        assert len(boxes) > 2
        for box, mask, whole in zip(boxes, found["masks"], result["masks"], strict=True):
            enlarged = looped_paste(mask[0].numpy(), box, height, width)
            np.testing.assert_allclose(whole[0].numpy(), enlarged, atol=1e-4)
            assert enlarged.any()


@torch.no_grad()
def test_nothing_found() -> None:
    sure = MaskRCNN(
        2,
        min_size=64,
        widths=Widths((1, 1, 1, 1), 4, 6, 16),
        detection_rules=DetectionRules(score=1.0),
    )
    (found,) = sure([torch.rand(3, 20, 30)])
    assert found["boxes"].shape == (0, 4) and found["labels"].shape == (0,)
    assert found["scores"].shape == (0,) and found["masks"].shape == (0, 1, 20, 30)


def test_anchors_by_hand() -> None:
    first, *_, last = anchors_of([(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)], (64, 96))
    # 32 * sqrt(2) = 45.25 and 32 / sqrt(2) = 22.63; halves are rounded to 23 and 11
    assert first[:3].tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    assert first[3].tolist() == [-19, -11, 27, 11]
    assert first[24 * 3 + 1].tolist() == [-16, -12, 16, 20]
    assert last[4].tolist() == [48 - 256, -256, 48 + 256, 256]


def test_decoding_by_hand() -> None:
    boxes = torch.tensor([[10.0, 20, 30, 60]])
    deltas = torch.tensor([[5.0, -5, 0, 0, 0, 0, 5 * math.log(2), 1000.0]])
    found = decoded(deltas, boxes, (10, 10, 5, 5))
    assert found.shape == (1, 2, 4)
    # Half a box to the right and half a box up.
    torch.testing.assert_close(found[0, 0], torch.tensor([20.0, 0, 40, 40]))
    # Twice as wide; as high as is allowed, 1000 / 16 times.
    torch.testing.assert_close(found[0, 1], torch.tensor([0, 40 - 1250.0, 40, 40 + 1250]))


@pytest.mark.parametrize(
    ("side", "level"),
    [(0, 0), (1, 0), (111, 0), (112, 1), (223.9, 1), (224, 2), (447, 2), (448, 3), (5000, 3)],
)
def test_levels_by_hand(side: float, level: int) -> None:
    box = torch.tensor([[3.0, 5, 3 + side, 5 + side]])
    assert level_of(box, 4).tolist() == [level]


def random_boxes(rng: np.random.Generator, count: int, size: float = 60) -> NDArray[np.float32]:
    corners = rng.uniform(-8, size, (count, 2))
    sides = rng.uniform(0, size / 2, (count, 2))
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


@pytest.mark.parametrize("count", [0, 1, 2, 300])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms_is_greedy(count: int, threshold: float) -> None:
    rng = np.random.default_rng(count)
    boxes = random_boxes(rng, count)
    # Few values, so that many scores are equal.
    scores = rng.integers(0, 40, count).astype(np.float32)
    found = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).tolist()
    wanted: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if all(iou(boxes[index], boxes[other]) <= threshold for other in wanted):
            wanted.append(int(index))
    assert found == wanted


def test_nms_settles_long_chains() -> None:
    """Each box removes the next one, so that every other one stays."""
    left = torch.arange(200, dtype=torch.float32)
    boxes = torch.stack([left, torch.zeros(200), left + 3, torch.ones(200)], dim=1)
    assert nms(boxes, -left, 0.4).tolist() == list(range(0, 200, 2))


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_grouped_nms_is_that_of_onnx(threshold: float) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    rng = np.random.default_rng(7)
    count, groups = 120, 4
    boxes = random_boxes(rng, count)
    scores = rng.permutation(count).astype(np.float32)
    group = rng.integers(0, groups, count)
    by_group = np.full((1, groups, count), -1, np.float32)
    by_group[0, group, np.arange(count)] = scores
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node(
                "NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["kept"]
            )
        ],
        "nms",
        [
            value("boxes", TensorProto.FLOAT, [1, count, 4]),
            value("scores", TensorProto.FLOAT, [1, groups, count]),
            value("most", TensorProto.INT64, [1]),
            value("overlap", TensorProto.FLOAT, [1]),
            value("least", TensorProto.FLOAT, [1]),
        ],
        [value("kept", TensorProto.INT64, [None, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (kept,) = session.run(
        None,
        {
            "boxes": boxes[None],
            "scores": by_group,
            "most": np.array([count]),
            "overlap": np.array([threshold], np.float32),
            "least": np.array([-0.5], np.float32),
        },
    )
    wanted = sorted((int(row[2]) for row in kept), key=lambda index: -scores[index])
    found = grouped_nms(
        torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(group), threshold
    )
    assert found.tolist() == wanted
    assert 0 < len(wanted) < count


@pytest.mark.parametrize("name", [f"case{i}" for i in range(10)])
def test_roi_align_is_that_of_the_parity_pack(parity: Callable[[str], Parity], name: str) -> None:
    pack = parity("roi_align")
    entry = pack.pack["outputs"][name]
    if entry["sampling_ratio"] == 0:
        pytest.skip("a number of samples that depends on the box is not written in torch")
    found = roi_align(
        torch.from_numpy(pack.wanted["features"]),
        torch.from_numpy(pack.wanted[entry["boxes"]]),
        torch.from_numpy(pack.wanted["batch_index"]).long(),
        output_size=tuple(entry["output_size"]),
        scale=entry["spatial_scale"],
        sampling_ratio=entry["sampling_ratio"],
        aligned=entry["aligned"],
    )
    assert np.abs(found.numpy() - pack.wanted[name]).max() <= entry["max_abs"]


def test_roi_align_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels, images, boxes beyond the maps; a map of one pixel; chunks of one box."""
    rng = np.random.default_rng(2)
    shapes = [(2, 3, 16, 20), (2, 3, 8, 10), (2, 3, 4, 5), (2, 3, 1, 1)]
    levels = [rng.standard_normal(shape) for shape in shapes]
    boxes = random_boxes(rng, 15, size=900).astype(np.float64)
    boxes[0] = [-500, -500, -400, -400]
    boxes[1] = [10, 10, 10, 10]
    boxes[2] = [-300, -300, 900, 900]
    image_of = rng.integers(0, 2, len(boxes))
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    monkeypatch.setattr("edgeseg.export.models.roialign._CHUNK", 1)
    found = pyramid_roi_align(
        [torch.from_numpy(level) for level in levels],
        torch.from_numpy(boxes),
        torch.from_numpy(image_of),
        output_size=(3, 3),
        scales=scales,
        sampling_ratio=2,
    ).numpy()
    chosen = level_of(torch.from_numpy(boxes), 4).tolist()
    assert len(set(chosen)) == 4
    for box, image, level, pooled in zip(boxes, image_of, chosen, found, strict=True):
        wanted = looped_roi_align(levels[level][image], box * scales[level], 3, 2)
        np.testing.assert_allclose(pooled, wanted, atol=1e-9)


def test_gradients_reach_the_features() -> None:
    features = torch.rand(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.3, 0.4, 4.2, 3.9]], dtype=torch.float64)

    def pooled(x: Tensor) -> Tensor:
        return roi_align(
            x, boxes, torch.zeros(1, dtype=torch.int64), output_size=(2, 3), scale=1.0,
            sampling_ratio=2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(pooled, (features,))


@pytest.mark.parametrize(
    "box",
    [
        pytest.param((4.0, 3.0, 20.0, 15.0), id="inside"),
        pytest.param((-0.5, 0.2, 9.7, 12.9), id="at the border"),
        pytest.param((0.0, 0.0, 40.0, 30.0), id="all of it"),
        pytest.param((12.3, 8.1, 12.4, 8.2), id="under a pixel"),
        pytest.param((-30.0, -30.0, -20.0, -20.0), id="outside"),
    ],
)
def test_masks_are_pasted_pixel_by_pixel(box: tuple[float, ...]) -> None:
    rng = np.random.default_rng(3)
    mask = rng.uniform(size=(4, 4))
    found = pasted(
        torch.from_numpy(mask)[None, None], torch.tensor([box], dtype=torch.float64), 30, 40
    )
    assert found.shape == (1, 1, 30, 40)
    wanted = looped_paste(mask, np.array(box), 30, 40)
    np.testing.assert_allclose(found[0, 0].numpy(), wanted, atol=1e-9)
    assert wanted.any() == (box[2] > 0)


def test_a_mask_by_hand() -> None:
    """A 2x2 mask of ones in a box of 2x2 at (4, 4): grown to 3 to 7, so 5 pixels for 4 cells."""
    found = pasted(torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 4, 6, 6]]), 10, 10)[0, 0]
    # Pixel p is at (p - 3 + 0.5) * 4 / 5 - 0.5: -0.1, 0.7, 1.5, 2.3, 3.1 between 0, 1, 1, 0.
    line = torch.tensor([0, 0, 0, 0, 0.7, 1, 0.7, 0, 0, 0])
    torch.testing.assert_close(found, line[:, None] * line[None, :])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MaskRCNN(1), "counts the background"),
        (lambda: MaskRCNN(3, min_size=900, max_size=800), "at most max_size"),
        (lambda: create("yolact_resnet18", 3, min_size=900), "are Mask R-CNN's"),
    ],
)
def test_wrong_numbers(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], "an empty one"),
        ([torch.zeros(1, 3, 8, 8)], r"\(3, height, width\)"),
        ([torch.zeros(3, 0, 8)], r"\(3, height, width\)"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], "divide by 255"),
        ([torch.zeros(3, 1, 4000)], "too long and thin"),
    ],
)
def test_wrong_pictures(network: MaskRCNN, images: list[Tensor], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        network(images)


def test_wrong_network_sizes_and_training(network: MaskRCNN) -> None:
    with pytest.raises(RequestError, match="multiples of 32"):
        network.detections(torch.zeros(1, 3, 64, 100))
    with pytest.raises(RequestError, match="train it with torchvision"):
        network.train()
    assert network.eval() is network and not network.training


def test_both_published_layouts_load(network: MaskRCNN) -> None:
    older = {}
    for key, value in network.state_dict().items():
        name = re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", key)
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        name = re.sub(
            r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", name
        )
        older[name] = value + 1
    older["backbone.body.bn1.num_batches_tracked"] = torch.tensor(3)
    assert "roi_heads.mask_head.mask_fcn4.bias" in older
    assert "backbone.fpn.layer_blocks.3.weight" in older
    fresh = MaskRCNN(CLASSES, widths=Widths((2, 1, 1, 1), 4, 6, 16)).double()
    names = list(older)
    fresh.load_state_dict(older)
    assert list(older) == names
    load_weights(fresh, older)
    for key, value in network.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value + 1), key


def test_the_keys_are_those_of_the_reference(parity: Callable[[str], Parity]) -> None:
    pack = parity("maskrcnn_resnet50_fpn").pack
    with torch.device("meta"):
        network = create("maskrcnn_resnet50_fpn", 91, min_size=320, max_size=533)
    assert (network.min_size, network.max_size) == (320, 533)
    found = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert list(found.items()) == list(pack["keys"].items())
    assert network.parameter_count() == pack["n_parameters"]


@pytest.mark.slow
@torch.no_grad()
def test_the_published_network_follows_the_papers(parity: Callable[[str], Parity]) -> None:
    """Features and heads of the parity pack's weights, within its limits."""
    pack = parity("maskrcnn_resnet50_fpn")
    network = maskrcnn_resnet50_fpn(91, min_size=320, max_size=533)
    network.load_state_dict({key: torch.from_numpy(a) for key, a in pack.arrays().items()})
    outputs = pack.pack["outputs"]
    paper = Paper(network.state_dict())
    x = torch.from_numpy(pack.input("tensor"))
    features = network.backbone(x)
    levels = paper.features(x.double())
    for name, wanted in zip(features, levels, strict=True):
        close(features[name], wanted, outputs[f"tensor.fpn_{name}"])
    boxes = torch.tensor(pack.pack["input"]["rois"]["boxes"])
    pooled = paper.pooled(levels, boxes.double().numpy(), 7)
    close(network.roi_heads.pooled(features, [boxes], 7), pooled, outputs["rois.pooled_7x7"])
    hidden = pooled.flatten(1)
    for name in ("fc6", "fc7"):
        hidden = paper.linear(hidden, f"roi_heads.box_head.{name}").relu()
    logits, deltas = network.roi_heads.box_logits(features, [boxes])
    wanted = paper.linear(hidden, "roi_heads.box_predictor.cls_score")
    close(logits, wanted, outputs["rois.class_logits"])
    wanted = paper.linear(hidden, "roi_heads.box_predictor.bbox_pred")
    close(deltas, wanted, outputs["rois.box_deltas"])

    image = torch.from_numpy(pack.input("image")[..., ::-1].copy()).permute(2, 0, 1) / 255
    x, sizes = network.network_input([image])
    assert list(x.shape) == outputs["image.normalised"]["shape"] and sizes == [(319, 533)]
    (found,) = network([image])
    for name in ("boxes", "labels", "scores"):
        value = found[name]
        assert list(value.shape) == outputs[f"image.{name}"]["shape"]


def close(found: Tensor, wanted: Tensor, entry: Mapping[str, Any]) -> None:
    assert list(found.shape) == entry["shape"]
    assert float((found.double() - wanted).abs().max()) <= entry["max_abs"]
