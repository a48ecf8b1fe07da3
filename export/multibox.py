"""What YOLACT learns from: boxes, classes, masks as sums of prototypes, a class per pixel.

Bolya et al., "YOLACT: Real-time Instance Segmentation" (ICCV 2019, arXiv 1904.02689), section 3;
matching and boxes after Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgeseg.export.models.yolact import Heads

__all__ = ["Matching", "Objects", "encoded", "matched", "multibox_losses"]

#: a prior with this overlap or more is its object's, below the other it is background
_POSITIVE, _NEGATIVE = 0.5, 0.4
#: a prior that lies within a crowd by more than this share is neither
_IN_CROWD = 0.7
#: background priors that count, for each of an object
_NEGATIVES = 3
#: objects of one picture whose masks are looked at
_MASKS = 100
#: published weights of the parts
_BOX, _CLASS, _MASK, _PIXEL = 1.5, 1.0, 6.125, 1.0


@dataclass(frozen=True, eq=False)
class Objects:
    """The truth of one picture with n objects.

    ``boxes`` (n, 4) float32 x1, y1, x2, y2, relative to the picture; ``labels`` (n,) int64, the
    background not counted; ``masks`` (n, h, w) bool on the grid of the prototypes; ``crowd`` (n,)
    bool: parts of the picture from which nothing is learned.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    crowd: Tensor

    def to(self, device: torch.device) -> Objects:
        """The same on ``device``."""
        return Objects(
            self.boxes.to(device),
            self.labels.to(device),
            self.masks.to(device),
            self.crowd.to(device),
        )


@dataclass(frozen=True, eq=False)
class Matching:
    """What each of A priors is to learn.

    ``classes`` (A,) int64: 0 background, 1 + label of its object, -1 nothing. ``objects`` (A,)
    int64: the object it overlaps most, which means something where the class is above 0.
    """

    classes: Tensor
    objects: Tensor


def multibox_losses(heads: Heads, truth: Sequence[Objects]) -> dict[str, Tensor]:
    """The parts of the loss, weighted as published; their sum is what to minimise.

    ``heads``: of N pictures; ``truth``: one for each. ``box``: smooth L1 of the encoded boxes;
    ``class``: cross entropy of all priors with an object, and of the background priors the three
    times as many that are hardest (three where a picture has no object); ``mask``: binary cross
    entropy within the object's box, over the area of that box; each over the number of priors with
    an object in the whole batch. ``pixel``, if the network has the head for it: binary cross
    entropy of each class at each cell.
    """
    conf = heads["conf"].float()
    loc = heads["loc"].float()
    coefficients = heads["mask"].float()
    prototypes = heads["proto"].float()
    priors = heads["priors"].float()
    # Every parameter has a part in the loss, also where there is no object.
    zero = (loc.sum() + coefficients.sum() + prototypes.sum()) * 0.0
    box = class_ = mask = zero
    count = 0
    for index, objects in enumerate(truth):
        found = matched(priors, objects)
        positive = (found.classes > 0).nonzero()[:, 0]
        count += len(positive)
        class_ = class_ + _class_loss(conf[index], found.classes)
        if len(positive) == 0:
            continue
        own = found.objects[positive]
        box = box + functional.smooth_l1_loss(
            loc[index, positive],
            encoded(objects.boxes[own], priors[positive]),
            reduction="sum",
        )
        mask = mask + _mask_loss(prototypes[index], coefficients[index, positive], own, objects)
    total = max(count, 1)
    parts = {
        "box": _BOX * box / total,
        "class": _CLASS * class_ / total,
        "mask": _MASK * mask / total,
    }
    if "segm" in heads:
        parts["pixel"] = _PIXEL * _pixel_loss(heads["segm"].float(), truth)
    return parts


def matched(priors: Tensor, objects: Objects) -> Matching:
    """Which object each of ``priors`` (A, 4), centre and size, is for.

    A prior is for the object that it overlaps most, if by an IoU of 0.5 or more; below 0.4 it is
    background, and between the two it learns nothing. Whatever its overlap, every object has the
    prior that overlaps it most, the better overlapped object first where two want the same. A
    background prior of which more than 70 % lie within a crowd learns nothing.
    """
    corners = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)
    classes = priors.new_zeros(len(priors), dtype=torch.int64)
    nearest = torch.zeros_like(classes)
    asked = (~objects.crowd).nonzero()[:, 0]
    if len(asked):
        overlaps = _intersections(corners, objects.boxes[asked])
        areas = _areas(corners)[:, None] + _areas(objects.boxes[asked])[None] - overlaps
        overlaps = overlaps / areas.clamp(min=1e-12)
        best, which = overlaps.max(dim=1)
        left = overlaps.clone()
        for _ in range(len(asked)):
            # The pair that overlaps most of all that are left.
            row, column = divmod(int(left.argmax()), len(asked))
            best[row] = 2.0
            which[row] = column
            left[row] = -1.0
            left[:, column] = -1.0
        nearest = asked[which]
        classes = torch.where(best < _POSITIVE, -1, 1 + objects.labels[nearest])
        classes[best < _NEGATIVE] = 0
    crowds = objects.boxes[objects.crowd]
    if len(crowds):
        within = _intersections(corners, crowds) / _areas(corners).clamp(min=1e-12)[:, None]
        classes[(classes <= 0) & (within.max(dim=1).values > _IN_CROWD)] = -1
    return Matching(classes, nearest)


def encoded(boxes: Tensor, priors: Tensor) -> Tensor:
    """(n, 4) x1, y1, x2, y2 as the network says them relative to ``priors`` (n, 4).

    The inverse of ``decoded`` of the model.
    """
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2 - priors[:, :2]) / (0.1 * priors[:, 2:])
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    return torch.cat([centres, torch.log(sizes / priors[:, 2:]) / 0.2], dim=1)


def _class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of the priors that count, summed; ``logits`` (A, classes + 1)."""
    losses = functional.cross_entropy(logits, classes.clamp(min=0), reduction="none")
    positive = classes > 0
    background = classes == 0
    wanted = min(_NEGATIVES * int(positive.sum()), int(background.sum()))
    # A picture without objects has a say, too: its hardest background priors.
    wanted = max(wanted, min(_NEGATIVES, int(background.sum())))
    hardest = torch.where(background, losses.detach(), -1.0).topk(wanted).indices
    return losses[positive].sum() + losses[hardest].sum()


def _mask_loss(prototypes: Tensor, coefficients: Tensor, own: Tensor, objects: Objects) -> Tensor:
    """Summed over the priors with an object, of which at most ``_MASKS`` are looked at.

    ``prototypes`` (h, w, channels), ``coefficients`` (n, channels), ``own`` (n,) the objects.
    """
    count = len(own)
    if count > _MASKS:
        # torch's generator is set for every step, so a run that goes on chooses the same.
        chosen = torch.randperm(count)[:_MASKS].to(own.device)
        coefficients, own = coefficients[chosen], own[chosen]
    height, width = prototypes.shape[:2]
    logits = torch.einsum("hwc,nc->nhw", prototypes, coefficients)
    truth = objects.masks[own].to(logits.dtype)
    losses = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    scale = logits.new_tensor([width, height, width, height])
    x1, y1, x2, y2 = (objects.boxes[own] * scale).T[:, :, None, None]
    y = torch.arange(height, device=logits.device)[None, :, None]
    x = torch.arange(width, device=logits.device)[None, None, :]
    # The crop of the detections, which is one sample wider each way.
    inside = (y >= y1 - 1) & (y < y2 + 1) & (x >= x1 - 1) & (x < x2 + 1)
    areas = ((x2 - x1) * (y2 - y1)).flatten().clamp(min=1.0)
    each: Tensor = (losses * inside).sum(dim=(1, 2)) / areas
    return each.sum() * (count / len(own))


def _pixel_loss(logits: Tensor, truth: Sequence[Objects]) -> Tensor:
    """``logits`` (N, classes, h, w): mean over pictures and cells, summed over the classes."""
    wanted = torch.zeros_like(logits)
    for index, objects in enumerate(truth):
        asked = ~objects.crowd
        if not bool(asked.any()):
            continue
        masks = functional.interpolate(
            objects.masks[asked][None].to(logits.dtype), logits.shape[-2:], mode="area"
        )[0]
        for mask, label in zip(masks, objects.labels[asked].tolist(), strict=True):
            wanted[index, label] = torch.maximum(wanted[index, label], (mask > 0.5).float())
    losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    loss: Tensor = losses.mean(dim=(2, 3)).sum() / len(truth)
    return loss


def _intersections(first: Tensor, second: Tensor) -> Tensor:
    """(n, m) common areas of boxes (n, 4) and (m, 4)."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    return (high - low).clamp(min=0).prod(dim=2)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
