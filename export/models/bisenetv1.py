"""BiSeNet: a spatial path for detail beside a ResNet-18 context path.

Yu et al., "BiSeNet: Bilateral Segmentation Network for Real-time Semantic Segmentation" (ECCV
2018). Names of the state_dict follow the CoinCheung/BiSeNet implementation, and so do its three
departures from the paper: batch-norm instead of a two-layer bottleneck in the fusion attention,
nearest-neighbour upsampling inside the context path, and a convolution after each upsampling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeseg.export.models.layers import ConvBNReLU, UpsampledLogits
from edgeseg.export.models.semantic import SemanticNetwork, initialise

__all__ = ["BiSeNetV1"]


def _spatial_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, 1). A mean, not an adaptive pooling: any size can be exported."""
    return x.mean(dim=(2, 3), keepdim=True)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(residual + shortcut)
        return out


class ResNet18(nn.Module):
    """ResNet-18 without its classifier; gives the features at 1/8, 1/16 and 1/32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) -> 128 channels at 1/8, 256 at 1/16, 512 at 1/32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        at8: Tensor = self.layer2(self.layer1(x))
        at16: Tensor = self.layer3(at8)
        at32: Tensor = self.layer4(at16)
        return at8, at16, at32


class AttentionRefinement(nn.Module):
    """3x3 convolution, then channels weighted by a sigmoid of their own mean (paper, fig. 2b)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBNReLU(in_channels, out_channels)
        self.conv_atten = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H, W)."""
        features: Tensor = self.conv(x)
        weight = torch.sigmoid(self.bn_atten(self.conv_atten(_spatial_mean(features))))
        return features * weight


class ContextPath(nn.Module):
    """ResNet-18 with attention refinement at 1/16 and 1/32, brought together at 1/8."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet18()
        self.arm16 = AttentionRefinement(256, 128)
        self.arm32 = AttentionRefinement(512, 128)
        self.conv_head32 = ConvBNReLU(128, 128)
        self.conv_head16 = ConvBNReLU(128, 128)
        self.conv_avg = ConvBNReLU(512, 128, kernel_size=1)
        self.upsample = nn.Upsample(scale_factor=2.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> 128 channels at 1/8 and 128 at 1/16."""
        _, at16, at32 = self.resnet(x)
        tail = self.arm32(at32) + self.conv_avg(_spatial_mean(at32))
        context16: Tensor = self.conv_head32(self.upsample(tail))
        context8: Tensor = self.conv_head16(self.upsample(self.arm16(at16) + context16))
        return context8, context16


class SpatialPath(nn.Module):
    """Three strided convolutions: wide, shallow, at 1/8 (paper, section 3.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvBNReLU(3, 64, kernel_size=7, stride=2)
        self.conv2 = ConvBNReLU(64, 64, stride=2)
        self.conv3 = ConvBNReLU(64, 64, stride=2)
        self.conv_out = ConvBNReLU(64, 128, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 128, H / 8, W / 8)."""
        out: Tensor = self.conv_out(self.conv3(self.conv2(self.conv1(x))))
        return out


class FeatureFusion(nn.Module):
    """Joins the two paths and reweights the channels of the sum (paper, fig. 2c)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convblk = ConvBNReLU(in_channels, out_channels, kernel_size=1)
        self.conv = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        """Two of (N, in / 2, H, W) -> (N, out, H, W)."""
        features: Tensor = self.convblk(torch.cat([spatial, context], dim=1))
        weight = torch.sigmoid(self.bn(self.conv(_spatial_mean(features))))
        return features * weight + features


class Head(nn.Module):
    """3x3 convolution, 1x1 classifier, bilinear upsampling by ``factor``."""

    def __init__(self, in_channels: int, mid_channels: int, num_classes: int, factor: int) -> None:
        super().__init__()
        self.conv = ConvBNReLU(in_channels, mid_channels)
        self.conv_out = nn.Conv2d(mid_channels, num_classes, 1)
        self.up = UpsampledLogits(factor)

    def low_resolution(self, x: Tensor) -> Tensor:
        """(N, in, h, w) -> logits (N, classes, h, w)."""
        out: Tensor = self.conv_out(self.conv(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, h, w) -> logits (N, classes, h * factor, w * factor)."""
        out: Tensor = self.up(self.low_resolution(x))
        return out


class BiSeNetV1(SemanticNetwork):
    """BiSeNet with a ResNet-18 context path; 13.3 M parameters with 19 classes."""

    auxiliary_prefixes = ("conv_out16.", "conv_out32.")
    classifier = "conv_out.conv_out.weight"
    image_convolutions = ("cp.resnet.conv1.weight", "sp.conv1.conv.weight")

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cp = ContextPath()
        self.sp = SpatialPath()
        self.ffm = FeatureFusion(256, 256)
        self.conv_out = Head(256, 256, num_classes, factor=8)
        self.conv_out16: Head | None = None
        self.conv_out32: Head | None = None
        if auxiliary_heads:
            self.conv_out16 = Head(128, 64, num_classes, factor=8)
            self.conv_out32 = Head(128, 64, num_classes, factor=16)
        initialise(self)

    def low_resolution_logits(self, x: Tensor) -> Tensor:
        """Logits at 1/8 of the input size."""
        context8, _ = self.cp(x)
        return self.conv_out.low_resolution(self.ffm(self.sp(x), context8))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits at input size; in training a tuple (main, at 1/8, at 1/16) with the heads."""
        context8, context16 = self.cp(x)
        logits: Tensor = self.conv_out(self.ffm(self.sp(x), context8))
        if self.training and self.conv_out16 is not None and self.conv_out32 is not None:
            return logits, self.conv_out16(context8), self.conv_out32(context16)
        return logits
