"""FC-HarDNet: an encoder and decoder of harmonic dense blocks, few memory accesses per result.

Chao et al., "HarDNet: A Low Memory Traffic Network" (ICCV 2019, arXiv 1909.00948); the 70-layer
segmentation network of the PingoLH/FCHarDNet implementation, whose checkpoints load unchanged. They
were trained on BGR pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeseg.export.models.semantic import SemanticNetwork, initialise

__all__ = ["CATALOGUE", "FCHarDNet", "FCHarDNet70", "HarDBlock", "Widths"]


@dataclass(frozen=True)
class Widths:
    """The numbers that make one member of the family.

    ``stem``: channels of the four convolutions down to 1/4. Per block of the encoder: ``channels``
    after it, ``growth`` the width of a layer with one link, ``layers`` its depth. Every further
    link multiplies a layer's width by ``multiplier``.
    """

    stem: tuple[int, int, int, int]
    channels: tuple[int, ...]
    growth: tuple[int, ...]
    layers: tuple[int, ...]
    multiplier: float


CATALOGUE: dict[str, Widths] = {
    "fchardnet70": Widths(
        stem=(16, 24, 32, 48),
        channels=(64, 96, 160, 224, 320),
        growth=(10, 16, 18, 24, 32),
        layers=(4, 4, 8, 8, 8),
        multiplier=1.7,
    ),
}


class ConvNormReLU(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU; "same" padding for odd kernels."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.add_module(
            "conv",
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
            ),
        )
        self.add_module("norm", nn.BatchNorm2d(out_channels))
        self.add_module("relu", nn.ReLU(inplace=True))


def _links(layer: int) -> list[int]:
    """The layers that ``layer`` (from 1; 0 is the block's input) reads, nearest first.

    Layer k reads k - 2^i for every power of two that divides k (paper, section 3.1).
    """
    return [layer - (1 << i) for i in range(layer.bit_length()) if layer % (1 << i) == 0]


class HarDBlock(nn.Module):
    """Harmonic dense block: layer k is connected to layers k - 1, k - 2, k - 4 ... where 2^i | k.

    Its result joins the layers of odd number and the last one.
    """

    def __init__(self, in_channels: int, growth: int, multiplier: float, layers: int) -> None:
        super().__init__()
        widths = [in_channels]
        for layer in range(1, layers + 1):
            width = growth * multiplier ** (len(_links(layer)) - 1)
            # To an even number, halves upwards, as the published widths are.
            widths.append(int(int(width + 1) / 2) * 2)
        self._sources = [_links(layer) for layer in range(1, layers + 1)]
        self._kept = [layer for layer in range(1, layers + 1) if layer % 2 == 1 or layer == layers]
        self.layers = nn.ModuleList(
            ConvNormReLU(sum(widths[source] for source in sources), widths[layer])
            for layer, sources in enumerate(self._sources, start=1)
        )
        self.out_channels = sum(widths[layer] for layer in self._kept)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        values = [x]
        for layer, sources in zip(self.layers, self._sources, strict=True):
            read = [values[source] for source in sources]
            values.append(layer(read[0] if len(read) == 1 else torch.cat(read, dim=1)))
        return torch.cat([values[layer] for layer in self._kept], dim=1)


class FCHarDNet(SemanticNetwork):
    """FC-HarDNet with the widths of one member of the family.

    Any input of at least 64x64 pixels goes; export takes multiples of 32. There are no auxiliary
    heads.
    """

    image_convolutions: ClassVar[tuple[str, ...]] = ("base.0.conv.weight",)
    classifier: ClassVar[str] = "finalConv.weight"
    smallest: ClassVar[int] = 64
    align_corners: bool = True

    def __init__(self, widths: Widths, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        stem = [3, *widths.stem]
        base: list[nn.Module] = [
            ConvNormReLU(stem[i], stem[i + 1], stride=2 if i % 2 == 0 else 1) for i in range(4)
        ]
        self._skips: list[int] = []
        skip_channels: list[int] = []
        channels = widths.stem[-1]
        blocks = list(zip(widths.growth, widths.layers, widths.channels, strict=True))
        for growth, layers, out_channels in blocks:
            block = HarDBlock(channels, growth, widths.multiplier, layers)
            self._skips.append(len(base))
            skip_channels.append(block.out_channels)
            base += [block, ConvNormReLU(block.out_channels, out_channels, kernel_size=1)]
            channels = out_channels
            if len(self._skips) < len(blocks):
                base.append(nn.AvgPool2d(2))
        # The deepest block has nothing below it to be joined with.
        self._skips.pop()
        skip_channels.pop()
        self.base = nn.ModuleList(base)

        self.denseBlocksUp = nn.ModuleList()
        self.conv1x1_up = nn.ModuleList()
        for index in range(len(blocks) - 2, -1, -1):
            joined = channels + skip_channels[index]
            growth, layers, _ = blocks[index]
            block = HarDBlock(joined // 2, growth, widths.multiplier, layers)
            self.conv1x1_up.append(ConvNormReLU(joined, joined // 2, kernel_size=1))
            self.denseBlocksUp.append(block)
            channels = block.out_channels
        self.finalConv = nn.Conv2d(channels, num_classes, 1)
        initialise(self)

    def low_resolution_logits(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes, H / 4, W / 4)."""
        skips = []
        for index, module in enumerate(self.base):
            x = module(x)
            if index in self._skips:
                skips.append(x)
        for squeeze, block in zip(self.conv1x1_up, self.denseBlocksUp, strict=True):
            skip = skips.pop()
            x = functional.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            x = block(squeeze(torch.cat([x, skip], dim=1)))
        out: Tensor = self.finalConv(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) normalised -> logits (N, classes, H, W)."""
        return functional.interpolate(
            self.low_resolution_logits(x), size=x.shape[-2:], mode="bilinear", align_corners=True
        )


class FCHarDNet70(FCHarDNet):
    """The member with 70 layers, 4.1 million parameters."""

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        del auxiliary_heads  # one signature for all networks by name, and this one has none
        super().__init__(CATALOGUE["fchardnet70"], num_classes)
