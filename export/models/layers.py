"""Building blocks that several models share."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ConvBNReLU", "UpsampledLogits"]


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; "same" padding for odd kernels."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        out: Tensor = self.relu(self.bn(self.conv(x)))
        return out


class UpsampledLogits(nn.Upsample):
    """The last step of a BiSeNet head: bilinear upsampling with half-pixel centres."""

    def __init__(self, factor: int) -> None:
        super().__init__(scale_factor=factor, mode="bilinear", align_corners=False)
