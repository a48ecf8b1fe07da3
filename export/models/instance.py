"""What every instance network of this package offers besides ``forward``."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from edgeseg.export.models.network import Network

if TYPE_CHECKING:
    import onnx

    from edgeseg.spec import ModelSpec

__all__ = ["FoundInstances", "InstanceNetwork"]


@dataclass(frozen=True, eq=False)
class FoundInstances:
    """Detections of one picture, best score first.

    ``boxes`` (n, 4) float32 xyxy in pixels of the network's input, ``scores`` (n,) float32,
    ``labels`` (n,) int64 without the background, ``masks`` (n, h, w) float32 probabilities, on the
    grid that ``InstanceNetwork.mask_extent`` says.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor

    def levels(self) -> Tensor:
        """``masks`` as the device's contract has them: (n, h, w) uint8, round(255 p)."""
        return torch.floor(self.masks * 255 + 0.5).to(torch.uint8)


class InstanceNetwork(Network):
    """A network that finds objects: a box, a class, a score and a mask for each.

    ``num_classes`` counts the background, which is class 0.
    """

    #: what a mask's grid covers: the network's whole input, or the object's box
    mask_extent: ClassVar[Literal["image", "box"]]
    #: what to call the tensors of ``raw``
    raw_names: ClassVar[tuple[str, ...]]
    #: version of ONNX's operators that the exported graph is written in
    opset: ClassVar[int] = 18

    @property
    def named_classes(self) -> int:
        """Classes that have a name: all but the background."""
        return self.num_classes - 1

    @abstractmethod
    def mask_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a mask's grid for an input of ``height`` x ``width``."""

    @abstractmethod
    def raw(self, x: Tensor) -> tuple[Tensor, ...]:
        """(1, 3, H, W) normalised -> the tensors that ``append_head`` reads; export traces this."""

    @abstractmethod
    def append_head(self, graph: onnx.GraphProto, spec: ModelSpec) -> list[onnx.FunctionProto]:
        """Adds the contract's outputs to ``graph``, whose outputs are those of ``raw``, in place.

        Returns the function bodies that the new nodes call.
        """

    @abstractmethod
    def detect(self, x: Tensor, capacity: int) -> FoundInstances:
        """(1, 3, H, W) normalised -> at most ``capacity`` detections, in plain PyTorch.

        The reference that exported graphs are compared with.
        """
