"""What every network of this package offers, whatever its task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["Network"]


class Network(nn.Module):
    """A network that EdgeSeg can fill from a checkpoint and export."""

    #: height and width of an input must be multiples of this
    stride: ClassVar[int] = 1
    #: height and width of an input must be this at least, whatever ``stride`` says
    smallest: ClassVar[int] = 1
    #: state_dict prefixes that a checkpoint may have or lack: heads that only training uses, and
    #: leftovers of the published ones
    auxiliary_prefixes: ClassVar[tuple[str, ...]] = ()
    #: state_dict keys of the convolutions that read the image; export folds the channel order there
    image_convolutions: ClassVar[tuple[str, ...]] = ()
    #: whether channels can be taken out of it, and a checkpoint may have fewer than a new network
    prunable: ClassVar[bool] = True
    #: state_dict key of the classifier: a checkpoint without it is of another model
    classifier: ClassVar[str]

    #: classes that the classifier tells apart; of an instance model this counts the background
    num_classes: int

    @classmethod
    def classes_in(cls, state: Mapping[str, Tensor]) -> int:
        """``num_classes`` of the network that ``state``, which has the classifier, is of."""
        return int(state[cls.classifier].shape[0])

    @classmethod
    def current_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state``, of any published layout, with the names that the network has."""
        return dict(state)

    @property
    def named_classes(self) -> int:
        """Classes that have a name: ``num_classes`` without a background."""
        return self.num_classes

    def parameter_count(self) -> int:
        """Number of trainable scalars, auxiliary heads included."""
        return sum(parameter.numel() for parameter in self.parameters())
