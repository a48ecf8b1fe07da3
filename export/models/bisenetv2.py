"""BiSeNetV2: a wide shallow detail branch, a deep narrow semantic branch, guided aggregation.

Yu et al., "BiSeNet V2: Bilateral Network with Guided Aggregation for Real-time Semantic
Segmentation" (IJCV 2021, arXiv 2004.02147). Names of the state_dict follow the CoinCheung/BiSeNet
implementation; where that adds a ReLU to the paper's blocks (after depthwise convolutions that
expand, and after the aggregation), so does this, because published checkpoints rely on it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeseg.export.models.layers import ConvBNReLU, UpsampledLogits
from edgeseg.export.models.semantic import SemanticNetwork, initialise

__all__ = ["BiSeNetV2"]


def _depthwise(channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    """3x3 depthwise convolution, widening by ``out_channels / channels``, and its batch norm."""
    return [
        nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


def _pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    """1x1 convolution and its batch norm."""
    return [
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


class DetailBranch(nn.Module):
    """Plain 3x3 convolutions down to 1/8, 64 to 128 channels (paper, table 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.S1 = nn.Sequential(ConvBNReLU(3, 64, stride=2), ConvBNReLU(64, 64))
        self.S2 = nn.Sequential(
            ConvBNReLU(64, 64, stride=2), ConvBNReLU(64, 64), ConvBNReLU(64, 64)
        )
        self.S3 = nn.Sequential(
            ConvBNReLU(64, 128, stride=2), ConvBNReLU(128, 128), ConvBNReLU(128, 128)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 128, H / 8, W / 8)."""
        out: Tensor = self.S3(self.S2(self.S1(x)))
        return out


class Stem(nn.Module):
    """Two ways of downsampling to 1/4, a convolution and a pooling, fused (paper, fig. 4a)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBNReLU(3, 16, stride=2)
        self.left = nn.Sequential(ConvBNReLU(16, 8, kernel_size=1), ConvBNReLU(8, 16, stride=2))
        self.right = nn.MaxPool2d(3, stride=2, padding=1)
        self.fuse = ConvBNReLU(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 16, H / 4, W / 4)."""
        x = self.conv(x)
        out: Tensor = self.fuse(torch.cat([self.left(x), self.right(x)], dim=1))
        return out


class GatherExpansion(nn.Module):
    """Gather-and-expansion layer that keeps the size (paper, fig. 5b); expansion 6."""

    def __init__(self, channels: int, expansion: int = 6) -> None:
        super().__init__()
        wide = channels * expansion
        self.conv1 = ConvBNReLU(channels, channels)
        self.dwconv = nn.Sequential(*_depthwise(channels, wide), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(*_pointwise(wide, channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        out: Tensor = self.relu(self.conv2(self.dwconv(self.conv1(x))) + x)
        return out


class GatherExpansionDown(nn.Module):
    """Gather-and-expansion layer that halves the size (paper, fig. 5c); expansion 6."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 6) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.conv1 = ConvBNReLU(in_channels, in_channels)
        self.dwconv1 = nn.Sequential(*_depthwise(in_channels, wide, stride=2))
        self.dwconv2 = nn.Sequential(*_depthwise(wide, wide), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(*_pointwise(wide, out_channels))
        self.shortcut = nn.Sequential(
            *_depthwise(in_channels, in_channels, stride=2),
            *_pointwise(in_channels, out_channels),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / 2, W / 2)."""
        residual = self.conv2(self.dwconv2(self.dwconv1(self.conv1(x))))
        out: Tensor = self.relu(residual + self.shortcut(x))
        return out


class ContextEmbedding(nn.Module):
    """Adds the global mean to every position (paper, fig. 4b)."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(128)
        self.conv_gap = ConvBNReLU(128, 128, kernel_size=1)
        self.conv_last = ConvBNReLU(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 128, H, W) -> (N, 128, H, W)."""
        context = self.conv_gap(self.bn(x.mean(dim=(2, 3), keepdim=True)))
        out: Tensor = self.conv_last(context + x)
        return out


class SemanticBranch(nn.Module):
    """Stem, gather-and-expansion stages to 1/32, context embedding (paper, table 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.S1S2 = Stem()
        self.S3 = nn.Sequential(GatherExpansionDown(16, 32), GatherExpansion(32))
        self.S4 = nn.Sequential(GatherExpansionDown(32, 64), GatherExpansion(64))
        self.S5_4 = nn.Sequential(
            GatherExpansionDown(64, 128),
            GatherExpansion(128),
            GatherExpansion(128),
            GatherExpansion(128),
        )
        self.S5_5 = ContextEmbedding()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(N, 3, H, W) -> features at 1/4, 1/8, 1/16, 1/32, and 1/32 with context."""
        at4: Tensor = self.S1S2(x)
        at8: Tensor = self.S3(at4)
        at16: Tensor = self.S4(at8)
        at32: Tensor = self.S5_4(at16)
        context: Tensor = self.S5_5(at32)
        return at4, at8, at16, at32, context


class GuidedAggregation(nn.Module):
    """Each branch gates the other, at 1/8 and at 1/32; the products are summed (paper, fig. 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.left1 = nn.Sequential(*_depthwise(128, 128), nn.Conv2d(128, 128, 1, bias=False))
        self.left2 = nn.Sequential(
            nn.Conv2d(128, 128, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.AvgPool2d(3, stride=2, padding=1),
        )
        self.right1 = nn.Sequential(
            nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        )
        self.right2 = nn.Sequential(*_depthwise(128, 128), nn.Conv2d(128, 128, 1, bias=False))
        self.upsample = nn.Upsample(scale_factor=4.0)
        self.conv = nn.Sequential(
            nn.Conv2d(128, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
        )

    def forward(self, detail: Tensor, semantic: Tensor) -> Tensor:
        """(N, 128, H, W) and (N, 128, H / 4, W / 4) -> (N, 128, H, W)."""
        # The gates are squashed before they are enlarged: with nearest-neighbour upsampling the
        # result is the same and the sigmoid sees a sixteenth of the values.
        at8 = self.left1(detail) * self.upsample(torch.sigmoid(self.right1(semantic)))
        at32 = self.left2(detail) * torch.sigmoid(self.right2(semantic))
        out: Tensor = self.conv(at8 + self.upsample(at32))
        return out


class Head(nn.Module):
    """Classifier of the fused features (1/8), and, with ``widen``, of one training feature.

    A training head doubles its feature's size and adds a convolution to ``factor ** 2`` channels
    before the classifier (a departure of the reference implementation from the paper).
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        num_classes: int,
        factor: int,
        *,
        widen: bool = False,
    ) -> None:
        super().__init__()
        self.conv = ConvBNReLU(in_channels, mid_channels)
        self.drop = nn.Dropout(0.1)
        before: nn.Module = nn.Identity()
        channels = mid_channels
        remaining = factor
        if widen:
            channels = factor * factor
            remaining = factor // 2
            before = nn.Sequential(
                nn.Upsample(scale_factor=2.0), ConvBNReLU(mid_channels, channels)
            )
        self.conv_out = nn.Sequential(
            before, nn.Conv2d(channels, num_classes, 1), UpsampledLogits(remaining)
        )

    def low_resolution(self, x: Tensor) -> Tensor:
        """(N, in, h, w) -> logits before the last upsampling."""
        out: Tensor = self.conv_out[:-1](self.drop(self.conv(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, h, w) -> logits (N, classes, h * factor, w * factor)."""
        out: Tensor = self.conv_out(self.drop(self.conv(x)))
        return out


class BiSeNetV2(SemanticNetwork):
    """BiSeNetV2; 3.4 M parameters with 19 classes, 5.2 M with the training heads."""

    auxiliary_prefixes = ("aux2.", "aux3.", "aux4.", "aux5_4.")
    classifier = "head.conv_out.1.weight"
    image_convolutions = ("detail.S1.0.conv.weight", "segment.S1S2.conv.conv.weight")

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.detail = DetailBranch()
        self.segment = SemanticBranch()
        self.bga = GuidedAggregation()
        self.head = Head(128, 1024, num_classes, factor=8)
        self._has_auxiliary_heads = auxiliary_heads
        if auxiliary_heads:
            self.aux2 = Head(16, 128, num_classes, factor=4, widen=True)
            self.aux3 = Head(32, 128, num_classes, factor=8, widen=True)
            self.aux4 = Head(64, 128, num_classes, factor=16, widen=True)
            self.aux5_4 = Head(128, 128, num_classes, factor=32, widen=True)
        initialise(self)

    def low_resolution_logits(self, x: Tensor) -> Tensor:
        """Logits at 1/8 of the input size."""
        context = self.segment(x)[-1]
        return self.head.low_resolution(self.bga(self.detail(x), context))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits at input size; in training a tuple (main, 1/4, 1/8, 1/16, 1/32) with the heads."""
        at4, at8, at16, at32, context = self.segment(x)
        logits: Tensor = self.head(self.bga(self.detail(x), context))
        if self.training and self._has_auxiliary_heads:
            return logits, self.aux2(at4), self.aux3(at8), self.aux4(at16), self.aux5_4(at32)
        return logits
