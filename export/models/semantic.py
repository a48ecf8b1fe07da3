"""What every semantic network of this package offers besides ``forward``."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["SemanticNetwork"]


class SemanticNetwork(nn.Module):
    """A network that maps a normalised image to one logit per class and pixel.

    In eval mode ``forward`` returns logits (N, classes, H, W) float32. In training mode, when the
    auxiliary heads are there, it returns a tuple: the main logits first, then one per head, all at
    input size.
    """

    #: height and width of an input must be multiples of this
    stride: ClassVar[int] = 32
    #: height and width of an input must be this at least, whatever ``stride`` says
    smallest: ClassVar[int] = 1
    #: state_dict prefixes of heads that only training uses
    auxiliary_prefixes: ClassVar[tuple[str, ...]] = ()
    #: state_dict keys of the convolutions that read the image; export folds the channel order there
    image_convolutions: ClassVar[tuple[str, ...]] = ()
    #: state_dict key of the classifier; its first axis has one entry per class
    classifier: ClassVar[str]
    #: convention of the last upsampling
    align_corners: ClassVar[bool] = False

    num_classes: int

    @abstractmethod
    def low_resolution_logits(self, x: Tensor) -> Tensor:
        """Logits before the last upsampling: (N, 3, H, W) -> (N, classes, H / f, W / f)."""

    def parameter_count(self) -> int:
        """Number of trainable scalars, auxiliary heads included."""
        return sum(parameter.numel() for parameter in self.parameters())


def initialise(network: nn.Module) -> None:
    """Kaiming-normal convolutions (He et al., 2015), unit batch norms, zero biases; in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
