"""ResNet with frozen batch norms under a feature pyramid: what two-stage detectors see with.

He et al. 2016 (arXiv 1512.03385), the stride in the 3x3 convolution; Lin et al. 2017 (arXiv
1612.03144). Names of the state_dict are those of torchvision's detection models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeseg.export.models.backbones import Bottleneck

__all__ = ["LEVELS", "FrozenBatchNorm", "PyramidBackbone"]

#: names of the levels that the pyramid gives, strides 4, 8, 16, 32, 64
LEVELS = ("0", "1", "2", "3", "pool")


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine parameters are constants, epsilon 0.

    The published COCO weights were made with that epsilon; 1e-5 in its place moves every result.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W), unchanged in shape."""
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.0
        )


class FrozenResNet(nn.Module):
    """Four stages of bottlenecks, the first ``width`` wide, with ``blocks`` in each."""

    def __init__(self, blocks: Sequence[int], width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm(width)
        channels = width
        self.channels: list[int] = []
        for stage, count in enumerate(blocks):
            made = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                made.append(Bottleneck(channels, width << stage, stride, FrozenBatchNorm))
                channels = (width << stage) * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
            self.channels.append(channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> maps at 1/4, 1/8, 1/16, 1/32."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        found = []
        for stage in range(len(self.channels)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
            found.append(x)
        return found


class FeaturePyramid(nn.Module):
    """Maps of one width from those of a backbone, and a coarser one of every other pixel."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        # A sequence of one, as torchvision wraps its convolutions.
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, width, 1)) for c in channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1)) for _ in channels
        )

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps, the finest first -> ``LEVELS``, (N, width, h, w) each."""
        inner = self.inner_blocks[-1](features[-1])
        levels = [self.layer_blocks[-1](inner)]
        for index in range(len(features) - 2, -1, -1):
            side = self.inner_blocks[index](features[index])
            inner = side + functional.interpolate(inner, size=side.shape[-2:], mode="nearest")
            levels.insert(0, self.layer_blocks[index](inner))
        levels.append(functional.max_pool2d(levels[-1], 1, stride=2))
        return dict(zip(LEVELS, levels, strict=True))


class PyramidBackbone(nn.Module):
    """A frozen ResNet of ``blocks`` under a pyramid of ``out_channels``."""

    def __init__(
        self, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, out_channels: int = 256
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.body = FrozenResNet(blocks, width)
        self.fpn = FeaturePyramid(self.body.channels, out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised, sides multiples of 32 -> ``LEVELS``, the finest first."""
        levels: dict[str, Tensor] = self.fpn(self.body(x))
        return levels
