"""Training losses of the semantic models."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["bootstrapped_cross_entropy", "boundary_weights", "ohem_cross_entropy"]


def ohem_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore: int = 255,
    score_threshold: float = 0.7,
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy over the hard pixels of a batch (online hard example mining).

    A pixel is hard when its loss exceeds ``-log(score_threshold)``; when fewer than a sixteenth of
    the labelled pixels are, that many of the largest losses are taken instead. The result is their
    mean, a scalar.

    ``logits``: (N, classes, H, W) float; ``labels``: (N, H, W) int64, ``ignore`` where there is no
    label. ``class_weights``: (classes,) float and ``pixel_weights``: (N, H, W) float, both
    multiplied into each pixel's loss.

    Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining"
    (CVPR 2016), in the form that BiSeNet trains with.
    """
    losses = _losses(logits, labels, ignore, class_weights, pixel_weights).flatten()
    kept = losses[losses > -math.log(score_threshold)]
    least = int((labels != ignore).sum().item()) // 16
    if kept.numel() < least:
        kept = torch.topk(losses, least).values
    if kept.numel() == 0:
        # Nothing is labelled, or next to nothing and all of it easy: a zero that still has a
        # gradient path, so a training step goes on.
        return losses.sum() * 0.0
    return kept.mean()


def bootstrapped_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore: int = 255,
    least: int = 4096,
    loss_threshold: float = 0.3,
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy over the hard pixels of every picture, a scalar: the mean over pictures.

    Of each picture, the pixels with a loss above ``loss_threshold`` count, if these are more than
    ``least``; else the ``least`` with the largest losses. The other arguments are those of
    ``ohem_cross_entropy``.

    Wu, Shen and van den Hengel, "Bridging Category-level and Instance-level Semantic Image
    Segmentation" (arXiv 1605.06885), in the form that FC-HarDNet trains with.
    """
    losses = _losses(logits, labels, ignore, class_weights, pixel_weights).flatten(1)
    least = min(least, losses.shape[1] - 1)
    means = []
    for picture in losses:
        ordered = picture.sort(descending=True).values
        hard = ordered[ordered > loss_threshold]
        means.append((hard if ordered[least] > loss_threshold else ordered[:least]).mean())
    return torch.stack(means).mean()


def _losses(
    logits: Tensor,
    labels: Tensor,
    ignore: int,
    class_weights: Tensor | None,
    pixel_weights: Tensor | None,
) -> Tensor:
    """(N, H, W) float32, 0 where there is no label."""
    losses = functional.cross_entropy(
        logits.float(), labels, weight=class_weights, ignore_index=ignore, reduction="none"
    )
    return losses if pixel_weights is None else losses * pixel_weights


def boundary_weights(
    labels: NDArray[np.uint8], strength: float, reach: float
) -> NDArray[np.float32]:
    """(H, W) float32 weights 1 + ``strength`` exp(-d / ``reach``) for (H, W) ``labels``.

    d is the distance in pixels to the nearest pixel at a boundary: one with another label to its
    left, right, above or below, so that d is 0 on both sides of it. The distance is the Euclidean
    one, exact (Felzenszwalb and Huttenlocher 2012, as OpenCV has it). Without any boundary all
    weights are 1.
    """
    boundary = np.zeros(labels.shape, np.bool_)
    across = labels[:, 1:] != labels[:, :-1]
    down = labels[1:] != labels[:-1]
    boundary[:, 1:] |= across
    boundary[:, :-1] |= across
    boundary[1:] |= down
    boundary[:-1] |= down
    if not boundary.any():
        return np.ones(labels.shape, np.float32)
    distance = cv2.distanceTransform(
        (~boundary).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    weights: NDArray[np.float32] = 1 + strength * np.exp(-distance / np.float32(reach))
    return weights.astype(np.float32, copy=False)
