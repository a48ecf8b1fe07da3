"""YOLACT: instance masks as sums of prototypes.

Bolya et al., "YOLACT: Real-time Instance Segmentation" (ICCV 2019, arXiv 1904.02689). Names of the
state_dict are those of the dbolya/yolact checkpoints, which load unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeseg.errors import WeightsError
from edgeseg.export.models.backbones import (
    Backbone,
    BasicBlock,
    Bottleneck,
    Darknet,
    MobileNetV2,
    ResNet,
)
from edgeseg.export.models.instance import FoundInstances, InstanceNetwork
from edgeseg.export.models.selection import Selection
from edgeseg.export.models.semantic import initialise

if TYPE_CHECKING:
    import onnx

    from edgeseg.spec import ModelSpec

__all__ = [
    "Heads",
    "Priors",
    "Yolact",
    "YolactDarknet53",
    "YolactMobileNetV2",
    "YolactResNet18",
    "YolactResNet50",
    "YolactResNet101",
    "chosen",
    "cropped",
    "decoded",
    "mask_probabilities",
    "selected",
]

#: input for which the sizes of relative priors are
_SIZES_AT = 550
#: pixels between two cells, level P3 to P7
_STRIDES = (8, 16, 32, 64, 128)
_PROTOTYPES = 32


@dataclass(frozen=True)
class Priors:
    """Boxes around the centre of every cell, which the network's boxes are told relative to.

    A cell has one for each of ``scales``, and of these for each of ``ratios``, which are width over
    height. ``square``: as wide, and as high as wide, which is what the published YOLACT does.
    ``sizes``: pixels, level P3 to P7. With ``relative`` they are those of a 550 input, and scale
    with it; else they are the same whatever the input, so that a network that learned from crops
    sees larger pictures with the same eyes.
    """

    ratios: tuple[float, ...] = (1.0, 0.5, 2.0)
    scales: tuple[float, ...] = (1.0,)
    sizes: tuple[float, ...] = (24, 48, 96, 192, 384)
    square: bool = False
    relative: bool = True

    @property
    def per_cell(self) -> int:
        """Boxes around each centre."""
        return len(self.ratios) * len(self.scales)

    def of(self, levels: Sequence[tuple[int, int]], height: int, width: int) -> Tensor:
        """Those of all levels: (A, 4) float32 centre x, centre y, width, height, relative.

        ``levels``: cells (rows, columns) of each, for an input of ``height`` x ``width`` pixels.
        Rows, then columns, then scales, then ratios. At other sizes than 550 the base sizes are
        scaled with the input's side, where the input is not square the square root of its area; the
        published YOLACT cuts them to whole pixels. Its cells are equal parts of the input; those of
        sizes in pixels are as wide as the level's stride.
        """
        factor = math.sqrt(height * width) / _SIZES_AT if self.relative else 1.0
        ratios = torch.tensor(self.ratios, dtype=torch.float64).sqrt()
        scales = torch.tensor(self.scales, dtype=torch.float64)
        parts = []
        for (rows, columns), size, stride in zip(levels, self.sizes, _STRIDES, strict=True):
            base = size * factor
            sizes = scales * (max(math.floor(base), 1) if self.square else base)
            widths = (sizes[:, None] * ratios).flatten()
            heights = widths if self.square else (sizes[:, None] / ratios).flatten()
            y = torch.arange(rows, dtype=torch.float64) + 0.5
            x = torch.arange(columns, dtype=torch.float64) + 0.5
            y = y / rows if self.relative else y * stride / height
            x = x / columns if self.relative else x * stride / width
            shape = (rows, columns, self.per_cell)
            part = torch.stack(
                [
                    x[None, :, None].expand(shape),
                    y[:, None, None].expand(shape),
                    (widths / width).expand(shape),
                    (heights / height).expand(shape),
                ],
                dim=-1,
            )
            parts.append(part.reshape(-1, 4))
        return torch.cat(parts).float()


#: those of the networks that are this project's own
_OWN_PRIORS = Priors(sizes=(16, 32, 64, 128, 256), relative=False)


class _Predictions(TypedDict):
    """What the network gives for N pictures, A priors.

    ``loc`` (N, A, 4) raw box regression; ``conf`` (N, A, classes) logits, column 0 background;
    ``mask`` (N, A, 32) coefficients after tanh; ``priors`` (A, 4) centre x, centre y, width, height
    relative to the input; ``proto`` (N, h, w, 32) prototypes after ReLU.
    """

    loc: Tensor
    conf: Tensor
    mask: Tensor
    priors: Tensor
    proto: Tensor


class Heads(_Predictions, total=False):
    """What the network gives: in training, with the semantic head, also ``segm``.

    ``segm`` (N, classes - 1, h, w): logits of a class per pixel, at 1/8 of the input.
    """

    segm: Tensor


class FeaturePyramid(nn.Module):
    """FPN of levels P3 to P7 from C3 to C5 (Lin et al. 2017, with two strided convolutions)."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        # From the top of the pyramid down, as the checkpoints name them.
        self.lat_layers = nn.ModuleList(nn.Conv2d(c, width, 1) for c in reversed(channels))
        self.pred_layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.downsample_layers = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(2)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C3, C4, C5 -> P3 to P7, (N, width, h, w) each."""
        levels: list[Tensor] = []
        x: Tensor | None = None
        for feature, lateral, predict in zip(
            reversed(features), self.lat_layers, self.pred_layers, strict=True
        ):
            side = lateral(feature)
            if x is None:
                x = side
            else:
                x = side + functional.interpolate(
                    x, size=feature.shape[-2:], mode="bilinear", align_corners=False
                )
            levels.insert(0, functional.relu(predict(x)))
        for downsample in self.downsample_layers:
            levels.append(downsample(levels[-1]))
        return levels


class PredictionHead(nn.Module):
    """Boxes, classes and coefficients of one level; all levels share it."""

    def __init__(self, num_classes: int, width: int, anchors: int) -> None:
        super().__init__()
        self._num_classes = num_classes
        self.upfeature = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True))
        self.bbox_layer = nn.Conv2d(width, anchors * 4, 3, padding=1)
        self.conf_layer = nn.Conv2d(width, anchors * num_classes, 3, padding=1)
        self.mask_layer = nn.Conv2d(width, anchors * _PROTOTYPES, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, width, h, w) -> (N, A, 4), (N, A, classes), (N, A, 32) after tanh; A = anchors hw."""
        x = self.upfeature(x)
        return (
            _rows(self.bbox_layer(x), 4),
            _rows(self.conf_layer(x), self._num_classes),
            torch.tanh(_rows(self.mask_layer(x), _PROTOTYPES)),
        )


def _rows(x: Tensor, width: int) -> Tensor:
    """(N, anchors * width, h, w) -> (N, h * w * anchors, width)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)


class Yolact(InstanceNetwork):
    """YOLACT over any backbone.

    ``num_classes`` counts the background, as the published model's 81. ``auxiliary_heads``: also
    the convolution that only training uses. Any input size from 64 x 64 on goes; 550 x 550 is the
    published one. Pictures come as RGB.
    """

    smallest: ClassVar[int] = 64
    classifier: ClassVar[str] = "prediction_layers.0.conf_layer.weight"
    # Besides the training head: published checkpoints name their backbone's stages twice and hold
    # levels of the pyramid that the network doesn't have; its authors' loader drops them as well.
    auxiliary_prefixes: ClassVar[tuple[str, ...]] = (
        "semantic_seg_conv.",
        *(f"backbone.layer{stage}." for stage in range(1, 5)),
        *(f"fpn.downsample_layers.{level}." for level in range(2, 5)),
    )
    mask_extent: ClassVar[Literal["image", "box"]] = "image"
    raw_names: ClassVar[tuple[str, ...]] = ("loc", "conf", "mask", "proto")
    #: boxes around the centre of every cell
    boxes: ClassVar[Priors] = Priors(square=True)
    #: channels of the pyramid and of the heads
    width: ClassVar[int] = 256

    @classmethod
    def current_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Network.current_names``; WeightsError for a checkpoint of YOLACT++."""
        if any("conv_offset_mask" in key for key in state):
            raise WeightsError(
                "this is a checkpoint of YOLACT++, and a YOLACT is to be filled; "
                "ask for yolact_plus_resnet50 or yolact_plus_resnet101"
            )
        return dict(state)

    def __init__(
        self, backbone: Backbone, num_classes: int, *, auxiliary_heads: bool = False
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.selection = Selection()
        self.backbone = backbone
        width = self.width
        self.fpn = FeaturePyramid(backbone.channels, width)
        self.proto_net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, _PROTOTYPES, 1),
            nn.ReLU(inplace=True),
        )
        self.prediction_layers = nn.ModuleList(
            [PredictionHead(num_classes, width, self.boxes.per_cell)]
        )
        self.semantic_seg_conv = nn.Conv2d(width, num_classes - 1, 1) if auxiliary_heads else None
        initialise(backbone)
        _initialise_heads(self)

    @classmethod
    def classes_in(cls, state: Mapping[str, Tensor]) -> int:
        """See ``Network.classes_in``: the classifier has as many rows for each prior of a cell."""
        return int(state[cls.classifier].shape[0]) // cls.boxes.per_cell

    def mask_size(self, height: int, width: int) -> tuple[int, int]:
        """See ``InstanceNetwork.mask_size``: twice the cells at 1/8."""
        return 2 * -(-height // 8), 2 * -(-width // 8)

    def forward(self, x: Tensor) -> Heads:
        """(N, 3, H, W) normalised RGB -> the raw heads."""
        levels = self.fpn(self.backbone(x))
        loc, conf, mask = self._predictions(levels)
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        heads = Heads(
            loc=loc,
            conf=conf,
            mask=mask,
            priors=self.boxes.of(sizes, x.shape[-2], x.shape[-1]).to(x),
            proto=self.proto_net(levels[0]).permute(0, 2, 3, 1),
        )
        if self.training and self.semantic_seg_conv is not None:
            heads["segm"] = self.semantic_seg_conv(levels[0])
        return heads

    def _predictions(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        predictions = [self.prediction_layers[0](level) for level in levels]
        loc, conf, mask = (torch.cat(parts, dim=1) for parts in zip(*predictions, strict=True))
        return loc, conf, mask

    def priors(self, height: int, width: int) -> Tensor:
        """The priors of an input of ``height`` x ``width``, as in ``Heads``."""
        return self.boxes.of(_level_sizes(height, width), height, width)

    def raw(self, x: Tensor) -> tuple[Tensor, ...]:
        """loc, conf, mask of ``Heads``, and the prototypes as (N, 32, h, w)."""
        levels = self.fpn(self.backbone(x))
        return (*self._predictions(levels), self.proto_net(levels[0]))

    def append_head(self, graph: onnx.GraphProto, spec: ModelSpec) -> list[onnx.FunctionProto]:
        """See ``InstanceNetwork.append_head``."""
        # Training does without the onnx package.
        from edgeseg.export.instance import append_yolact_head

        priors = self.priors(spec.height, spec.width).numpy()
        selection = replace(self.selection, capacity=spec.capacity)
        return append_yolact_head(graph, priors, spec, selection)

    @torch.inference_mode()
    def detect(self, x: Tensor, capacity: int) -> FoundInstances:
        """See ``InstanceNetwork.detect``."""
        heads: Heads = self(x)
        height, width = x.shape[-2:]
        rows, labels, scores = selected(
            heads["loc"][0],
            heads["conf"][0],
            heads["priors"],
            replace(self.selection, capacity=capacity),
        )
        boxes = decoded(heads["loc"][0][rows], heads["priors"][rows])
        masks = mask_probabilities(heads["proto"][0], heads["mask"][0][rows], boxes)
        pixels = boxes * boxes.new_tensor([width, height, width, height])
        return FoundInstances(pixels, scores, labels, masks)


class YolactResNet50(Yolact):
    """YOLACT over ResNet-50, 31 million parameters."""

    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone.conv1.weight",)

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        backbone = ResNet(Bottleneck, (3, 4, 6, 3))
        super().__init__(backbone, num_classes, auxiliary_heads=auxiliary_heads)


class YolactResNet101(Yolact):
    """YOLACT over ResNet-101, the paper's base model, 50 million parameters."""

    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone.conv1.weight",)

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        backbone = ResNet(Bottleneck, (3, 4, 23, 3))
        super().__init__(backbone, num_classes, auxiliary_heads=auxiliary_heads)


class YolactDarknet53(Yolact):
    """YOLACT over Darknet-53, 48 million parameters."""

    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone._preconv.0.weight",)

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        backbone = Darknet((1, 2, 8, 8, 4))
        super().__init__(backbone, num_classes, auxiliary_heads=auxiliary_heads)


class YolactResNet18(Yolact):
    """YOLACT over ResNet-18, for small boards, with narrower heads; EdgeSeg's own.

    With no published checkpoint to agree with, its priors have the shapes their ratios say,
    and the same sizes in pixels whatever the input.
    """

    boxes: ClassVar[Priors] = _OWN_PRIORS
    width: ClassVar[int] = 96
    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone.conv1.weight",)

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        backbone = ResNet(BasicBlock, (2, 2, 2, 2))
        super().__init__(backbone, num_classes, auxiliary_heads=auxiliary_heads)


class YolactMobileNetV2(Yolact):
    """YOLACT over MobileNetV2, for small boards, with narrower heads; EdgeSeg's own.

    With no published checkpoint to agree with, its priors have the shapes their ratios say,
    and the same sizes in pixels whatever the input.
    """

    boxes: ClassVar[Priors] = _OWN_PRIORS
    width: ClassVar[int] = 96
    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone.stem.0.weight",)

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        super().__init__(MobileNetV2(), num_classes, auxiliary_heads=auxiliary_heads)


def _initialise_heads(network: Yolact) -> None:
    """Xavier-uniform convolutions (Glorot and Bengio, 2010) and zero biases behind the backbone."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("backbone."):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Cells (rows, columns) of P3 to P7."""
    return [(-(-height // step), -(-width // step)) for step in _STRIDES]


def decoded(loc: Tensor, priors: Tensor) -> Tensor:
    """Boxes (n, 4) x1, y1, x2, y2, relative and not clipped, of raw regression and priors."""
    centres = priors[:, :2] + loc[:, :2] * 0.1 * priors[:, 2:]
    sizes = priors[:, 2:] * torch.exp(loc[:, 2:] * 0.2)
    low = centres - sizes / 2
    return torch.cat([low, low + sizes], dim=1)


def selected(
    loc: Tensor, conf: Tensor, priors: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n,) of the raw heads that are detections, their labels and scores, best first.

    ``loc`` (A, 4), ``conf`` (A, classes + 1) logits, ``priors`` (A, 4); labels do not count the
    background. Every candidate takes part, however many there are. A prior whose scores or box are
    no finite numbers is none.
    """
    return chosen(torch.softmax(conf, dim=1)[:, 1:], decoded(loc, priors), selection)


def chosen(scores: Tensor, boxes: Tensor, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n,) of the candidates that are detections, their labels and scores, best first.

    ``scores`` (A, classes) probabilities without a background, ``boxes`` (A, 4) xyxy in any unit.
    """
    best, label_of_best = scores.max(dim=1)
    usable = (best > selection.score_threshold) & boxes.isfinite().all(dim=1)
    candidates = usable.nonzero()[:, 0]
    found = []
    if selection.cross_class:
        groups = [(candidates, best[candidates], label_of_best[candidates])]
    else:
        groups = [
            (candidates, scores[candidates, label], torch.full_like(candidates, label))
            for label in range(scores.shape[1])
        ]
    for rows, group_scores, labels in groups:
        order = group_scores.argsort(descending=True, stable=True)[: selection.per_class]
        # No two boxes overlap by more than all, but for rounding.
        if selection.iou_threshold < 1:
            overlaps = _overlaps(boxes[rows[order]]).tril(diagonal=-1) > selection.iou_threshold
            order = order[~overlaps.any(dim=1)]
        found.append((rows[order], labels[order], group_scores[order]))
    rows, labels, kept = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = kept.argsort(descending=True, stable=True)[: selection.capacity]
    return rows[order], labels[order], kept[order]


def _overlaps(boxes: Tensor) -> Tensor:
    """(n, n) intersection over union of (n, 4) x1, y1, x2, y2."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low).clamp(min=0).prod(dim=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return common / (areas[:, None] + areas[None] - common)


def mask_probabilities(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """Masks (n, h, w), zero outside of the boxes widened by one sample each way.

    ``prototypes`` (h, w, channels), ``coefficients`` (n, channels), ``boxes`` (n, 4) relative.
    """
    return cropped(torch.sigmoid(prototypes @ coefficients.T).permute(2, 0, 1), boxes)


def cropped(masks: Tensor, boxes: Tensor) -> Tensor:
    """``masks`` (n, h, w), zero outside of ``boxes`` (n, 4), as ``mask_probabilities`` has them."""
    height, width = masks.shape[1:]
    y = torch.arange(height, dtype=boxes.dtype)[None, :, None]
    x = torch.arange(width, dtype=boxes.dtype)[None, None, :]
    x1, y1, x2, y2 = (boxes * boxes.new_tensor([width, height, width, height])).T[:, :, None, None]
    inside = (
        (y >= torch.minimum(y1, y2) - 1)
        & (y < torch.maximum(y1, y2) + 1)
        & (x >= torch.minimum(x1, x2) - 1)
        & (x < torch.maximum(x1, x2) + 1)
    )
    return masks * inside
