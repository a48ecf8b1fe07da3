"""Training losses of the semantic models."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ohem_cross_entropy"]


def ohem_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore: int = 255,
    score_threshold: float = 0.7,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy over the hard pixels of a batch (online hard example mining).

    A pixel is hard when its loss exceeds ``-log(score_threshold)``; when fewer than a sixteenth of
    the labelled pixels are, that many of the largest losses are taken instead. The result is their
    mean, a scalar.

    ``logits``: (N, classes, H, W) float; ``labels``: (N, H, W) int64, ``ignore`` where there is no
    label. ``class_weights``: (classes,) float, multiplied into each pixel's loss.

    Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining"
    (CVPR 2016), in the form that BiSeNet trains with.
    """
    losses = functional.cross_entropy(
        logits.float(), labels, weight=class_weights, ignore_index=ignore, reduction="none"
    ).flatten()
    kept = losses[losses > -math.log(score_threshold)]
    least = int((labels != ignore).sum().item()) // 16
    if kept.numel() < least:
        kept = torch.topk(losses, least).values
    if kept.numel() == 0:
        # Nothing is labelled, or next to nothing and all of it easy: a zero that still has a
        # gradient path, so a training step goes on.
        return losses.sum() * 0.0
    return kept.mean()
