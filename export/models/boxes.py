"""Boxes of two-stage detectors: decoding, clipping, overlap, and greedy suppression.

A box is (x1, y1, x2, y2) in pixels; its right and lower edge are outside of it, so its width is
x2 - x1. Arithmetic and order of operations are those of torchvision's detection models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["at_least", "clipped", "decoded", "grouped_nms", "nms", "overlaps"]

#: largest logarithm of an enlargement, so that exp stays finite: 1000 pixels from a stride of 16
LARGEST_LOG = math.log(1000.0 / 16)


def decoded(deltas: Tensor, boxes: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Boxes moved and scaled by regression ``deltas``.

    ``deltas`` (R, 4 * C): dx, dy, dw, dh per class, each times its weight; ``boxes`` (R, 4).
    Centres move by dx and dy box sizes, sizes are multiplied by exp(dw) and exp(dh) (Girshick 2015,
    arXiv 1504.08083). Returns (R, C, 4), unclipped.
    """
    sizes = boxes[:, None, 2:] - boxes[:, None, :2]
    centres = boxes[:, None, :2] + 0.5 * sizes
    parts = deltas.reshape(len(boxes), deltas.shape[1] // 4, 4)
    scaled = parts / deltas.new_tensor(weights)
    centres = scaled[..., :2] * sizes + centres
    halves = 0.5 * (scaled[..., 2:].clamp(max=LARGEST_LOG).exp() * sizes)
    return torch.cat([centres - halves, centres + halves], dim=-1)


def clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    """``boxes`` (..., 4) with every corner within a picture of ``height`` x ``width``."""
    x = boxes[..., 0::2].clamp(0, width)
    y = boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def at_least(boxes: Tensor, side: float) -> Tensor:
    """(n,) bool: whether both sides of each of ``boxes`` (n, 4) are ``side`` or longer."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= side).all(dim=1)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every pair: (n, 4), (m, 4) -> (n, m); NaN for two empty boxes."""
    sizes = torch.minimum(first[:, None, 2:], second[None, :, 2:]) - torch.maximum(
        first[:, None, :2], second[None, :, :2]
    )
    sizes = sizes.clamp(min=0)
    common = sizes[..., 0] * sizes[..., 1]
    return common / (_areas(first)[:, None] + _areas(second)[None, :] - common)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that greedy non-maximum suppression keeps, best score first.

    ``boxes`` (n, 4), ``scores`` (n,). A box goes when a kept box before it overlaps it by more than
    ``threshold``; of equal scores the first comes first. Time and memory grow with n squared.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    # Row i, column j: box i would remove box j, which comes after it.
    removes = (overlaps(ranked, ranked) > threshold).triu(diagonal=1)
    # What is kept depends only on boxes before it, so this comes to rest, and where it rests is
    # the greedy result: a round settles at least one more box of every chain.
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:
        settled = ~(removes & kept[:, None]).any(dim=0)
        if bool((settled == kept).all()):
            return order[kept]
        kept = settled


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """``nms`` within each of ``groups`` (n,) int64; all survivors' indices, best score first."""
    kept = []
    for group in sorted(set(groups.tolist())):
        members = torch.nonzero(groups == group)[:, 0]
        kept.append(members[nms(boxes[members], scores[members], threshold)])
    if not kept:
        return groups.new_zeros(0)
    # Equal scores of different groups keep the order in which they came.
    survivors = torch.cat(kept).sort().values
    return survivors[scores[survivors].argsort(descending=True, stable=True)]
