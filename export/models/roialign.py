"""RoIAlign in torch: boxes pooled from feature maps by bilinear samples, over one level or several.

He et al., "Mask R-CNN" (ICCV 2017, arXiv 1703.06870); levels by Lin et al., "Feature Pyramid
Networks" (CVPR 2017, arXiv 1612.03144), equation 1. This form is differentiable and runs wherever
torch does; ``edgeseg.kernels.rois`` is the compiled one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["level_of", "pyramid_roi_align", "roi_align"]

#: numbers gathered at a time
_CHUNK = 1 << 24


def roi_align(
    features: Tensor,
    boxes: Tensor,
    image_of: Tensor,
    *,
    output_size: tuple[int, int],
    scale: float,
    sampling_ratio: int,
    aligned: bool = False,
) -> Tensor:
    """Means of bilinear samples in a grid of bins.

    ``features`` (N, C, h, w); ``boxes`` (R, 4) xyxy, times ``scale`` in pixels of the map;
    ``image_of`` (R,) int64 the image of each; ``output_size`` (height, width) in bins;
    ``sampling_ratio`` samples a bin each way, at least 1. ``aligned`` takes half a pixel off the
    corners; without it a box is at least one pixel wide and high. Samples more than one pixel
    outside the map count as 0, others take the nearest value inside.

    Returns (R, C, height, width).
    """
    count, channels = len(boxes), features.shape[1]
    rows, columns = output_size
    samples = rows * columns * sampling_ratio * sampling_ratio
    # Channels last: the channels of one pixel are then read in one piece.
    pixels = features.permute(0, 2, 3, 1).reshape(-1, channels)
    step = max(1, _CHUNK // (samples * channels))
    pooled = [
        _pooled(
            pixels,
            features.shape,
            boxes[first : first + step],
            image_of[first : first + step],
            output_size,
            scale,
            sampling_ratio,
            aligned,
        )
        for first in range(0, count, step)
    ]
    if not pooled:
        return features.new_zeros(0, channels, rows, columns)
    return torch.cat(pooled)


def _pooled(
    pixels: Tensor,
    shape: Sequence[int],
    boxes: Tensor,
    image_of: Tensor,
    output_size: tuple[int, int],
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """One chunk of ``roi_align``; ``pixels`` (N * h * w, C) of features with ``shape``."""
    count, channels = len(boxes), pixels.shape[1]
    height, width = shape[2:]
    rows, columns = output_size
    corners = boxes * scale - (0.5 if aligned else 0.0)
    lengths = corners[:, 2:] - corners[:, :2]
    if not aligned:
        lengths = lengths.clamp(min=1)
    low_y, high_y, far_y, inside_y = _samples(
        corners[:, 1], lengths[:, 1], rows, sampling_ratio, height
    )
    low_x, high_x, far_x, inside_x = _samples(
        corners[:, 0], lengths[:, 0], columns, sampling_ratio, width
    )
    start = (image_of * (height * width))[:, None, None]
    total = pixels.new_zeros(count, low_y.shape[1], low_x.shape[1], channels)
    for row, weight_y in ((low_y, 1 - far_y), (high_y, far_y)):
        for column, weight_x in ((low_x, 1 - far_x), (high_x, far_x)):
            index = start + row[:, :, None] * width + column[:, None, :]
            weight = (weight_y * inside_y)[:, :, None] * (weight_x * inside_x)[:, None, :]
            found = pixels.index_select(0, index.reshape(-1)).reshape(*index.shape, channels)
            total = total + found * weight[..., None]
    cells = total.reshape(count, rows, sampling_ratio, columns, sampling_ratio, channels)
    return cells.mean(dim=(2, 4)).permute(0, 3, 1, 2)


def _samples(
    first: Tensor, length: Tensor, bins: int, ratio: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along one axis of ``size`` pixels, (R, bins * ratio) each: the pixel before every sample and
    the one after, how far it is between them, and 1 where it counts, else 0."""
    bin_of = torch.arange(bins, device=first.device, dtype=first.dtype).repeat_interleave(ratio)
    step = torch.arange(ratio, device=first.device, dtype=first.dtype).repeat(bins)
    bin_size = (length / bins)[:, None]
    at = first[:, None] + bin_of * bin_size + (step + 0.5) * bin_size / ratio
    inside = ((at >= -1) & (at <= size)).to(first.dtype)
    # NaN fails both comparisons, and must not become an index.
    at = torch.where(inside > 0, at, torch.zeros_like(at)).clamp(0, size - 1)
    low = at.floor().clamp(max=max(size - 2, 0))
    high = (low + 1).clamp(max=size - 1)
    return low.long(), high.long(), at - low, inside


def level_of(
    boxes: Tensor,
    levels: int,
    *,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    first_level: int = 2,
) -> Tensor:
    """(R,) int64, from 0: the level of a pyramid that suits the size of each of ``boxes`` (R, 4).

    floor(canonical_level + log2(sqrt(area) / canonical_size) + 1e-6), kept within the ``levels``
    from ``first_level`` on. The small number holds a box of exactly a level's size in that level.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    area = (sides[:, 0] * sides[:, 1]).clamp(min=0)
    level = torch.floor(canonical_level + torch.log2(area.sqrt() / canonical_size) + 1e-6)
    return level.clamp(first_level, first_level + levels - 1).nan_to_num().long() - first_level


def pyramid_roi_align(
    levels: Sequence[Tensor],
    boxes: Tensor,
    image_of: Tensor,
    *,
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int,
) -> Tensor:
    """``roi_align`` of every box from the level of ``level_of``; ``levels`` the finest first."""
    chosen = level_of(boxes, len(levels))
    pooled = levels[0].new_zeros(len(boxes), levels[0].shape[1], *output_size)
    for index, (features, scale) in enumerate(zip(levels, scales, strict=True)):
        here = torch.nonzero(chosen == index)[:, 0]
        found = roi_align(
            features,
            boxes[here],
            image_of[here],
            output_size=output_size,
            scale=scale,
            sampling_ratio=sampling_ratio,
        )
        pooled = pooled.index_copy(0, here, found)
    return pooled
