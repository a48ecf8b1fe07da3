"""One picture looked at several times in one graph, smaller and larger."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from edgeseg.errors import RequestError
from edgeseg.export.models import SemanticNetwork, definition_of

__all__ = ["ViewedNetwork", "parse_views"]

#: how much smaller or larger than the network size a view may be
_SMALLEST, _LARGEST = 0.25, 4.0


def parse_views(text: str) -> tuple[float, ...]:
    """The sizes of the views that ``text`` names, shares of the network's, with commas between.

    ``"0.75,1.33"``. RequestError for anything else, a size that is there twice or is not 0.25 to 4,
    and for 1 alone, which is the one plain look.
    """
    scales: list[float] = []
    for name in text.split(","):
        try:
            scale = float(name)
        except ValueError:
            raise RequestError(
                f"views are sizes such as 0.75 and 1.33 with commas between, and {name!r} came"
            ) from None
        if not _SMALLEST <= scale <= _LARGEST:
            raise RequestError(
                f"a view is {_SMALLEST:g} to {_LARGEST:g} times as large as the network's input, "
                f"and {name.strip()} came"
            )
        if scale in scales:
            raise RequestError(f"a view is taken once, and {scale:g} came twice in {text!r}")
        scales.append(scale)
    if scales == [1]:
        raise RequestError("the view 1 alone is what a network sees anyway; leave the views out")
    return tuple(scales)


class ViewedNetwork(SemanticNetwork):
    """A network whose logits are the mean over several views of one picture.

    ``scales``: how large each view is as a share of ``size``, the (height, width) of the input; its
    sides are the nearest multiples of the network's stride. The logits of the views are brought to
    the grid of the finest one, bilinearly, before they are averaged. RequestError when a view is
    too small for ``network``.
    """

    def __init__(
        self, network: SemanticNetwork, scales: tuple[float, ...], size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.network = network
        self.scales = scales
        self.sizes = tuple(_size_of(scale, size, network.stride) for scale in scales)
        self.align_corners = network.align_corners
        self.num_classes = network.num_classes
        self.preprocessing = definition_of(network).preprocessing
        smallest = min(min(sides) for sides in self.sizes)
        if smallest < network.smallest:
            raise RequestError(
                f"a view has at least {network.smallest} pixels each way for this network, and "
                f"one of {smallest} came; leave out the smallest"
            )

    def low_resolution_logits(self, x: Tensor) -> Tensor:
        """Mean logits before the last upsampling: (N, 3, H, W) -> (N, classes, h, w)."""
        looks = []
        for size in self.sizes:
            seen = x if size == tuple(x.shape[-2:]) else _resized(x, size, align_corners=False)
            looks.append(self.network.low_resolution_logits(seen))
        grid = max((tuple(logits.shape[-2:]) for logits in looks), key=math.prod)
        finest = (grid[0], grid[1])
        total, *others = (
            logits
            if tuple(logits.shape[-2:]) == finest
            else _resized(logits, finest, align_corners=self.align_corners)
            for logits in looks
        )
        for logits in others:
            total = total + logits
        return total / len(looks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, classes, H, W)."""
        size = (x.shape[-2], x.shape[-1])
        return _resized(self.low_resolution_logits(x), size, align_corners=self.align_corners)


def _size_of(scale: float, size: tuple[int, int], stride: int) -> tuple[int, int]:
    height, width = (max(round(side * scale / stride), 1) * stride for side in size)
    return height, width


def _resized(x: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
