"""The heads that look at one region each: its class, its box, its mask.

He et al., "Mask R-CNN" (ICCV 2017, arXiv 1703.06870), section 3 and figure 4 right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeseg.export.models.boxes import at_least, clipped, decoded, grouped_nms
from edgeseg.export.models.roialign import pyramid_roi_align

__all__ = ["BOX_WEIGHTS", "SCALES", "DetectionRules", "Detections", "RegionHeads"]

#: the pooled levels, by their pixels per pixel of the input
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
#: regression targets were multiplied by these in training: dx, dy, dw, dh
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SAMPLING_RATIO = 2
BOX_BINS = 7
MASK_BINS = 14


class Detections(TypedDict):
    """What was found in one picture, best score first.

    ``boxes`` (n, 4) xyxy in pixels; ``labels`` (n,) int64, 0 is the background and never found;
    ``scores`` (n,); ``masks`` (n, 1, h, w) probabilities.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


@dataclass(frozen=True)
class DetectionRules:
    """How detections are picked from the scored regions.

    ``score``: a detection has a larger one; ``overlap``: intersection over union above which the
    lesser of two of a class goes; ``total``: the best that are given; ``smallest``: shortest side
    in pixels.

    An exported graph looks at the ``candidates`` best pairs of region and class. That is exact if
    no more are above the score, and also if ``total`` of them survive: only better boxes decide on
    a box.
    """

    score: float = 0.05
    overlap: float = 0.5
    total: int = 100
    smallest: float = 1e-2
    candidates: int = 2000


class BoxHead(nn.Module):
    """Two fully connected layers on a region of (channels, 7, 7)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(channels * BOX_BINS * BOX_BINS, hidden)
        self.fc7 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(R, channels, 7, 7) -> (R, hidden)."""
        return functional.relu(self.fc7(functional.relu(self.fc6(x.flatten(1)))))


class BoxPredictor(nn.Module):
    """Class logits, and a box regression for every class."""

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(hidden, num_classes)
        self.bbox_pred = nn.Linear(hidden, num_classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, hidden) -> (R, classes), (R, 4 * classes)."""
        return self.cls_score(x), self.bbox_pred(x)


class MaskHead(nn.Sequential):
    """Four 3x3 convolutions with ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            *(
                nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
                for _ in range(4)
            )
        )


class MaskPredictor(nn.Module):
    """Doubles the size, then a mask for every class."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.mask_fcn_logits = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(R, channels, h, w) -> logits (R, classes, 2h, 2w)."""
        logits: Tensor = self.mask_fcn_logits(functional.relu(self.conv5_mask(x)))
        return logits


class RegionHeads(nn.Module):
    """Box and mask heads over a pyramid of ``channels``."""

    def __init__(self, channels: int, hidden: int, num_classes: int, rules: DetectionRules) -> None:
        super().__init__()
        self.box_head = BoxHead(channels, hidden)
        self.box_predictor = BoxPredictor(hidden, num_classes)
        self.mask_head = MaskHead(channels)
        self.mask_predictor = MaskPredictor(channels, num_classes)
        self.rules = rules

    def pooled(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], bins: int) -> Tensor:
        """Regions of all pictures, (R, channels, bins, bins), ``boxes`` (n, 4) of each picture."""
        levels = list(features.values())[: len(SCALES)]
        image_of = torch.cat(
            [
                torch.full_like(rows[:, 0], index, dtype=torch.int64)
                for index, rows in enumerate(boxes)
            ]
        )
        return pyramid_roi_align(
            levels,
            torch.cat(list(boxes)),
            image_of,
            output_size=(bins, bins),
            scales=SCALES,
            sampling_ratio=SAMPLING_RATIO,
        )

    def box_logits(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Class logits (R, classes) and box deltas (R, 4 * classes) of the regions ``boxes``."""
        hidden = self.box_head(self.pooled(features, boxes, BOX_BINS))
        logits, deltas = self.box_predictor(hidden)
        return logits, deltas

    def mask_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Mask logits (R, classes, 28, 28) of the regions ``boxes``."""
        logits: Tensor = self.mask_predictor(
            self.mask_head(self.pooled(features, boxes, MASK_BINS))
        )
        return logits

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Tensor],
        inside: Sequence[tuple[int, int]],
    ) -> list[Detections]:
        """Detections of each picture in network pixels, masks (n, 1, 28, 28) of the box.

        ``inside``: (height, width) of each picture in the network's input, to which its boxes are
        clipped.
        """
        counts = [len(rows) for rows in proposals]
        logits, deltas = self.box_logits(features, proposals)
        picked = [
            self._picked(*parts)
            for parts in zip(
                *(torch.split_with_sizes(x, counts) for x in (logits, deltas)),
                proposals,
                inside,
                strict=True,
            )
        ]
        found = self.mask_logits(features, [boxes for boxes, _, _ in picked]).sigmoid()
        labels = torch.cat([labels for _, labels, _ in picked])
        masks = found[torch.arange(len(labels), device=labels.device), labels][:, None]
        return [
            Detections(boxes=boxes, labels=labels, scores=scores, masks=part)
            for (boxes, labels, scores), part in zip(
                picked,
                torch.split_with_sizes(masks, [len(boxes) for boxes, _, _ in picked]),
                strict=True,
            )
        ]

    def _picked(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, limits: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, labels and scores of one picture."""
        rules = self.rules
        scores = logits.softmax(dim=-1)[:, 1:]
        boxes = clipped(decoded(deltas, proposals, BOX_WEIGHTS), *limits)[:, 1:]
        row, column = torch.nonzero(scores > rules.score, as_tuple=True)
        found, score, label = boxes[row, column], scores[row, column], column + 1
        large = at_least(found, rules.smallest)
        found, score, label = found[large], score[large], label[large]
        kept = grouped_nms(found, score, label, rules.overlap)[: rules.total]
        return found[kept], label[kept], score[kept]
