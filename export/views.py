"""One picture looked at several times in one graph: mirrored, smaller, larger."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgeseg.errors import RequestError
from edgeseg.export.models import SemanticNetwork, definition_of

__all__ = ["View", "ViewedNetwork", "parse_views"]

#: how much smaller or larger than the network size a view may be
_SMALLEST, _LARGEST = 0.25, 4.0


@dataclass(frozen=True)
class View:
    """One look at the picture: its size as a share of the network's, and whether it is mirrored."""

    scale: float = 1.0
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.scale <= _LARGEST:
            raise RequestError(
                f"a view is {_SMALLEST:g} to {_LARGEST:g} times as large as the network's input, "
                f"and {self.scale:g} came"
            )

    def size(self, height: int, width: int, stride: int) -> tuple[int, int]:
        """Height and width of the view, the multiples of ``stride`` that are nearest."""
        sides = (max(round(side * self.scale / stride), 1) * stride for side in (height, width))
        return next(sides), next(sides)


def parse_views(text: str) -> tuple[View, ...]:
    """The views that ``text`` names: sizes, and ``flip`` for the picture mirrored, with commas.

    ``"1,flip"``, ``"0.75,1.33"``. RequestError for anything else, a view that is there twice, and
    for the plain picture alone, which needs no views.
    """
    views = []
    for name in (part.strip() for part in text.split(",")):
        if name == "flip":
            view = View(mirrored=True)
        else:
            try:
                scale = float(name)
            except ValueError:
                scale = math.nan
            if math.isnan(scale):
                raise RequestError(
                    "views are sizes such as 1 and 0.75, and flip, with commas between, "
                    f"and {name!r} came"
                )
            view = View(scale)
        if view in views:
            raise RequestError(f"a view is taken once, and {name} came twice in {text!r}")
        views.append(view)
    if views == [View()]:
        raise RequestError("the view 1 alone is what a network sees anyway; leave --views out")
    return tuple(views)


class ViewedNetwork(SemanticNetwork):
    """A network whose logits are the mean over several views of one picture.

    ``size``: (height, width) of the input. The logits of the views are brought to the grid of the
    finest one, bilinearly, before they are averaged. RequestError when a view is too small for
    ``network``.
    """

    def __init__(
        self, network: SemanticNetwork, views: tuple[View, ...], size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.network = network
        self.views = views
        self.sizes = tuple(view.size(*size, network.stride) for view in views)
        self.align_corners = network.align_corners
        self.num_classes = network.num_classes
        self.preprocessing = definition_of(network).preprocessing
        smallest = min(min(size) for size in self.sizes)
        if smallest < network.smallest:
            raise RequestError(
                f"a view has at least {network.smallest} pixels each way for this network, and "
                f"one of {smallest} came; leave out the smallest"
            )

    def low_resolution_logits(self, x: Tensor) -> Tensor:
        """Mean logits before the last upsampling: (N, 3, H, W) -> (N, classes, h, w)."""
        looks = []
        for view, size in zip(self.views, self.sizes, strict=True):
            seen = x if size == tuple(x.shape[-2:]) else _resized(x, size, align_corners=False)
            if view.mirrored:
                seen = seen.flip(3)
            logits = self.network.low_resolution_logits(seen)
            looks.append(logits.flip(3) if view.mirrored else logits)
        grid = max((tuple(logits.shape[-2:]) for logits in looks), key=math.prod)
        finest = (grid[0], grid[1])
        total = torch.zeros(())
        for logits in looks:
            if tuple(logits.shape[-2:]) != finest:
                logits = _resized(logits, finest, align_corners=self.align_corners)
            total = total + logits
        return total / len(looks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, classes, H, W)."""
        size = (x.shape[-2], x.shape[-1])
        return _resized(self.low_resolution_logits(x), size, align_corners=self.align_corners)


def _resized(x: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
