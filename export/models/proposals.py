"""The region proposal network: where in a picture objects may be.

Ren et al., "Faster R-CNN" (2015, arXiv 1506.01497) on a feature pyramid (Lin et al. 2017, arXiv
1612.03144): each level has anchors of one size in three shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeseg.export.models.boxes import at_least, clipped, decoded, grouped_nms

__all__ = [
    "ANCHOR_RATIOS",
    "ANCHOR_SIZES",
    "PLAIN_WEIGHTS",
    "ProposalNetwork",
    "ProposalRules",
    "anchors_of",
    "rows_of",
]

#: side of the square anchor of each level, in pixels
ANCHOR_SIZES = (32, 64, 128, 256, 512)
#: height over width of the anchors
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
#: deltas of proposals were not multiplied by anything in training
PLAIN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class ProposalRules:
    """How proposals are picked from the scored anchors.

    ``per_level``: the best of each level that go on; ``overlap``: intersection over union above
    which the lesser of two in a level goes; ``total``: the best of all levels that are given;
    ``smallest``: shortest side in pixels.
    """

    per_level: int = 1000
    total: int = 1000
    overlap: float = 0.7
    smallest: float = 1e-3


class ProposalHead(nn.Module):
    """Objectness and box regression of every anchor; all levels share it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        anchors = len(ANCHOR_RATIOS)
        # Sequences, as torchvision wraps its convolutions.
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        )
        self.cls_logits = nn.Conv2d(channels, anchors, 1)
        self.bbox_pred = nn.Conv2d(channels, anchors * 4, 1)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels (N, C, h, w) -> logits (N, 3, h, w) and deltas (N, 12, h, w) of each."""
        hidden = [self.conv(level) for level in levels]
        return [self.cls_logits(x) for x in hidden], [self.bbox_pred(x) for x in hidden]


class ProposalNetwork(nn.Module):
    """Levels of a pyramid -> boxes that may hold an object, of no class yet."""

    def __init__(self, channels: int, rules: ProposalRules) -> None:
        super().__init__()
        self.head = ProposalHead(channels)
        self.rules = rules

    def forward(
        self,
        features: Mapping[str, Tensor],
        size: tuple[int, int],
        inside: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Proposals of each picture, (at most ``rules.total``, 4), the likeliest first.

        ``size``: (height, width) of the network's input; ``inside``: of each picture in it, to
        which its boxes are clipped.
        """
        levels = list(features.values())
        logits, deltas = self.head(levels)
        anchors = anchors_of([(level.shape[-2], level.shape[-1]) for level in levels], size)
        return [
            self._of_picture(
                [level[index : index + 1] for level in logits],
                [level[index : index + 1] for level in deltas],
                [level.to(logits[0]) for level in anchors],
                limits,
            )
            for index, limits in enumerate(inside)
        ]

    def _of_picture(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        limits: tuple[int, int],
    ) -> Tensor:
        rules = self.rules
        boxes, scores, levels = [], [], []
        for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            objectness = rows_of(logit, 1)[0, :, 0]
            best = objectness.topk(min(rules.per_level, len(objectness))).indices
            boxes.append(decoded(rows_of(delta, 4)[0][best], anchor[best], PLAIN_WEIGHTS)[:, 0])
            # Sorted by probability, not by logit: where it is 1 in float32, order is by level.
            scores.append(objectness[best].sigmoid())
            levels.append(torch.full_like(best, level))
        found = clipped(torch.cat(boxes), *limits)
        large = at_least(found, rules.smallest)
        found, score, group = found[large], torch.cat(scores)[large], torch.cat(levels)[large]
        return found[grouped_nms(found, score, group, rules.overlap)[: rules.total]]


def rows_of(x: Tensor, width: int) -> Tensor:
    """(N, anchors * width, h, w) -> (N, h * w * anchors, width)."""
    count, _, height, columns = x.shape
    x = x.reshape(count, -1, width, height, columns).permute(0, 3, 4, 1, 2)
    return x.reshape(count, -1, width)


def anchors_of(levels: Sequence[tuple[int, int]], size: tuple[int, int]) -> list[Tensor]:
    """Anchors of levels of (rows, columns) in an input of ``size``, (rows * columns * 3, 4) each.

    Rows, then columns, then ratios. Shapes are rounded to even pixels and centred on multiples of
    the stride, which is size // cells.
    """
    ratios = torch.tensor(ANCHOR_RATIOS)
    found = []
    for (rows, columns), side in zip(levels, ANCHOR_SIZES, strict=True):
        heights = ratios.sqrt() * side
        widths = (1 / ratios.sqrt()) * side
        shapes = (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()
        y = torch.arange(rows) * (size[0] // rows)
        x = torch.arange(columns) * (size[1] // columns)
        y, x = torch.meshgrid(y, x, indexing="ij")
        centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        found.append((centres + shapes).reshape(-1, 4))
    return found


def initialise(network: ProposalNetwork) -> None:
    """Normal weights of deviation 0.01, zero biases (arXiv 1506.01497, section 3.1.3); in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
