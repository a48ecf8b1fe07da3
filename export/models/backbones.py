"""Feature extractors of YOLACT: ResNet, Darknet-53, MobileNetV2, each without its head.

He et al. 2016 (arXiv 1512.03385), Redmon and Farhadi 2018 (arXiv 1804.02767), Sandler et al. 2018
(arXiv 1801.04381). Names of the state_dict of ResNet-50, ResNet-101 and Darknet-53 are those of the
dbolya/yolact checkpoints, with deformable convolutions as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from edgeseg.export.models.deformable import DeformableConvolution

__all__ = ["Backbone", "Darknet", "MobileNetV2", "ResNet"]


class Backbone(nn.Module):
    """Gives three maps of features, at 1/8, 1/16 and 1/32 of the input.

    ``channels``: their channels, in that order.
    """

    channels: tuple[int, int, int]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) -> features of (N, channels[i], ceil(H / f), ceil(W / f)), f 8, 16, 32."""
        raise NotImplementedError


#: what makes a normalisation of so many channels
Norm = Callable[[int], nn.Module]


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 (with the stride) and 1x1 convolutions; four times as wide out."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2: nn.Module = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, 4 width, ceil(H / stride), ceil(W / stride))."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class DeformableBottleneck(Bottleneck):
    """A bottleneck whose 3x3 convolution is deformable."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__(in_channels, width, stride)
        self.conv2 = DeformableConvolution(width, width, stride)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, the stride in the first."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, width, ceil(H / stride), ceil(W / stride))."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


def _shortcut(
    in_channels: int, out_channels: int, stride: int, norm: Norm = nn.BatchNorm2d
) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels)
    )


class ResNet(Backbone):
    """ResNet of four stages; ``blocks`` of each, e.g. (3, 4, 6, 3) for ResNet-50.

    ``deformable_every``: in all stages but the first, the first block and every so manieth after it
    are deformable bottlenecks; 0 for none.
    """

    def __init__(
        self,
        block: type[Bottleneck] | type[BasicBlock],
        blocks: Sequence[int],
        *,
        deformable_every: int = 0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layers = nn.ModuleList()
        channels, width = 64, 64
        widths = []
        for stage, count in enumerate(blocks):
            made = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                deforms = deformable_every > 0 and stage > 0 and index % deformable_every == 0
                kind = DeformableBottleneck if deforms else block
                made.append(kind(channels, width, stride))
                channels = width * block.expansion
            self.layers.append(nn.Sequential(*made))
            widths.append(channels)
            width *= 2
        self.channels = (widths[1], widths[2], widths[3])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backbone.forward``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        found = []
        for stage in self.layers:
            x = stage(x)
            found.append(x)
        return found[1], found[2], found[3]


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, leaky ReLU, as Darknet has them."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.1, inplace=True),
    )


class DarknetBlock(nn.Module):
    """Residual block of a 1x1 convolution to half the width and a 3x3 back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, channels // 2, 1)
        self.conv2 = _convolution(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W), unchanged in shape."""
        out: Tensor = self.conv2(self.conv1(x)) + x
        return out


class Darknet(Backbone):
    """Darknet of five stages; ``blocks`` of each, (1, 2, 8, 8, 4) for Darknet-53."""

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__()
        self._preconv = _convolution(3, 32, 3)
        self.layers = nn.ModuleList()
        channels = 32
        for count in blocks:
            self.layers.append(
                nn.Sequential(
                    _convolution(channels, 2 * channels, 3, stride=2),
                    *(DarknetBlock(2 * channels) for _ in range(count)),
                )
            )
            channels *= 2
        self.channels = (channels // 4, channels // 2, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backbone.forward``."""
        x = self._preconv(x)
        found = []
        for stage in self.layers:
            x = stage(x)
            found.append(x)
        return found[2], found[3], found[4]


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 wider, 3x3 depthwise, 1x1 narrower without activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        steps: list[nn.Module] = []
        if expansion != 1:
            steps += [
                nn.Conv2d(in_channels, wide, 1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(inplace=True),
            ]
        steps += [
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*steps)
        self._residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.conv(x)
        return x + y if self._residual else y


class MobileNetV2(Backbone):
    """MobileNetV2 up to its last block of 320 channels (paper, table 2)."""

    # Expansion, channels, blocks, stride of the first.
    _STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    # Stages after which the map is at 1/8, 1/16, 1/32.
    _GIVEN = (2, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU6(inplace=True),
        )
        self.layers = nn.ModuleList()
        channels = 32
        for expansion, out_channels, count, stride in self._STAGES:
            made = []
            for index in range(count):
                made.append(
                    InvertedResidual(channels, out_channels, stride if index == 0 else 1, expansion)
                )
                channels = out_channels
            self.layers.append(nn.Sequential(*made))
        first, second, third = (self._STAGES[index][1] for index in self._GIVEN)
        self.channels = (first, second, third)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backbone.forward``."""
        x = self.stem(x)
        found = []
        for index, stage in enumerate(self.layers):
            x = stage(x)
            if index in self._GIVEN:
                found.append(x)
        return found[0], found[1], found[2]
