"""Modulated deformable convolution: each tap reads where the picture says, and as much as it says.

Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results" (CVPR 2019, arXiv 1811.11168).
Names of the state_dict are those of the DCNv2 layers in the dbolya/yolact checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DeformableConvolution", "deformed_convolution"]

_KERNEL = 3
_TAPS = _KERNEL * _KERNEL


class DeformableConvolution(nn.Module):
    """A 3x3 convolution with padding 1 whose taps are moved, and weighted, at every position.

    ``conv_offset_mask`` finds 27 channels from the same input: how far to move each tap, (down,
    right) for one tap after the other in row order, and nine weights, before the sigmoid. It begins
    with zeros, so that a new layer is a plain convolution of half the strength.

    Exported, it is ONNX's own DeformConv (opset 19).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, _KERNEL, _KERNEL))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.conv_offset_mask = nn.Conv2d(in_channels, 3 * _TAPS, _KERNEL, stride, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal taps (He et al., 2015), not moved, and no bias; in place."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        for values in (self.bias, *self.conv_offset_mask.parameters()):
            nn.init.zeros_(values)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        found = self.conv_offset_mask(x)
        offsets = found[:, : 2 * _TAPS]
        weights = torch.sigmoid(found[:, 2 * _TAPS :])
        if torch.onnx.is_in_onnx_export():
            return torch.onnx.ops.symbolic(
                "DeformConv",
                (x, self.weight, offsets, self.bias, weights),
                attrs={
                    "kernel_shape": [_KERNEL, _KERNEL],
                    "pads": [1, 1, 1, 1],
                    "strides": [self.stride, self.stride],
                },
                dtype=x.dtype,
                shape=(x.shape[0], self.weight.shape[0], *found.shape[2:]),
                version=19,
            )
        return deformed_convolution(x, self.weight, self.bias, offsets, weights, self.stride)


def deformed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, modulation: Tensor, stride: int
) -> Tensor:
    """(N, out, h, w): the sum over taps and channels of ``weight`` times what the taps read.

    ``x`` (N, in, H, W); ``weight`` (out, in, 3, 3); ``bias`` (out,); ``offsets`` (N, 18, h, w)
    in samples of ``x``, (down, right) per tap; ``modulation`` (N, 9, h, w), a factor for each tap.
    A tap reads between samples, bilinearly, and samples beyond the border are 0.
    """
    batch, channels, height, width = x.shape
    rows, columns = offsets.shape[2:]
    tap = torch.arange(_TAPS, device=x.device)
    below = tap // _KERNEL - 1
    beside = tap % _KERNEL - 1
    y = below[:, None, None] + stride * torch.arange(rows, device=x.device)[:, None]
    x_ = beside[:, None, None] + stride * torch.arange(columns, device=x.device)
    # grid_sample counts from -1 to 1, from the outer edge of the first sample to that of the last.
    places = torch.stack(
        [
            (2 * (offsets[:, 1::2] + x_) + 1) / width - 1,
            (2 * (offsets[:, 0::2] + y) + 1) / height - 1,
        ],
        dim=-1,
    )
    read = functional.grid_sample(
        x, places.flatten(1, 2), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    read = read.view(batch, channels, _TAPS, -1) * modulation.reshape(batch, 1, _TAPS, -1)
    out = functional.conv2d(read, weight.flatten(2).unsqueeze(3), bias)
    return out.view(batch, -1, rows, columns)
