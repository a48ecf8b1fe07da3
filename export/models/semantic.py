"""What every semantic network of this package offers besides ``forward``."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from edgeseg.export.models.network import Network

__all__ = ["SemanticNetwork"]


class SemanticNetwork(Network):
    """A network that maps a normalised image to one logit per class and pixel.

    In eval mode ``forward`` returns logits (N, classes, H, W) float32. In training mode, when the
    auxiliary heads are there, it returns a tuple: the main logits first, then one per head, all at
    input size.
    """

    stride: ClassVar[int] = 32
    #: convention of the last upsampling
    align_corners: bool = False

    @abstractmethod
    def low_resolution_logits(self, x: Tensor) -> Tensor:
        """Logits before the last upsampling: (N, 3, H, W) -> (N, classes, H / f, W / f)."""


def initialise(network: nn.Module) -> None:
    """Kaiming-normal convolutions (He et al., 2015), unit batch norms, zero biases; in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
