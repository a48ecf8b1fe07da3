"""YOLACT++: YOLACT with deformable convolutions, more priors, and scores that know the mask.

Bolya et al., "YOLACT++: Better Real-time Instance Segmentation" (TPAMI 2020, arXiv 1912.06218).
Names of the state_dict are those of the dbolya/yolact checkpoints, which load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from edgeseg.export.models.backbones import Backbone, Bottleneck, ResNet
from edgeseg.export.models.deformable import DeformableConvolution
from edgeseg.export.models.instance import FoundInstances
from edgeseg.export.models.yolact import Priors, Yolact

if TYPE_CHECKING:
    import onnx

    from edgeseg.spec import ModelSpec

__all__ = ["MaskIoU", "YolactPlus", "YolactPlusResNet50", "YolactPlusResNet101"]


class MaskIoU(nn.Module):
    """How well a mask covers its object, told from the mask alone, for each class it might be of.

    Paper, "Fast Mask Re-Scoring Network". Masks are of 63 samples a side at least: five
    convolutions halve them and cut their borders off.
    """

    def __init__(self, named_classes: int) -> None:
        super().__init__()
        self.maskiou_net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 128, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, named_classes, 1),
            nn.ReLU(inplace=True),
        )

    def forward(self, masks: Tensor) -> Tensor:
        """(n, 1, h, w) cropped probabilities -> (n, classes) intersection over union, 0 or more."""
        found: Tensor = self.maskiou_net(masks).amax(dim=(2, 3))
        return found


class YolactPlus(Yolact):
    """YOLACT++ over any backbone.

    A score is that of the class times the IoU that the mask is thought to have with its object, as
    the published network ranks its masks; it ranks its boxes by the first alone.
    """

    # From here on masks have the 63 samples a side that ``MaskIoU`` needs.
    smallest: ClassVar[int] = 249
    # The first with DeformConv.
    opset: ClassVar[int] = 19
    prunable: ClassVar[bool] = False
    boxes: ClassVar[Priors] = Priors(scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)))

    def __init__(
        self, backbone: Backbone, num_classes: int, *, auxiliary_heads: bool = False
    ) -> None:
        super().__init__(backbone, num_classes, auxiliary_heads=auxiliary_heads)
        for module in backbone.modules():
            if isinstance(module, DeformableConvolution):
                module.reset_parameters()
        self.maskiou_net = MaskIoU(num_classes - 1)

    @classmethod
    def current_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Network.current_names``."""
        return dict(state)

    def append_head(self, graph: onnx.GraphProto, spec: ModelSpec) -> list[onnx.FunctionProto]:
        """See ``InstanceNetwork.append_head``."""
        from edgeseg.export.instance import Rescoring, append_yolact_head

        rescoring = Rescoring(
            {
                name: value.numpy()
                for name, value in self.state_dict().items()
                if name.startswith("maskiou_net.")
            }
        )
        priors = self.priors(spec.height, spec.width).numpy()
        selection = replace(self.selection, capacity=spec.capacity)
        return append_yolact_head(
            graph, priors, spec, selection, rescoring=rescoring, opset=self.opset
        )

    @torch.inference_mode()
    def detect(self, x: Tensor, capacity: int) -> FoundInstances:
        """See ``InstanceNetwork.detect``."""
        return self.rescored(super().detect(x, capacity))

    def rescored(self, found: FoundInstances) -> FoundInstances:
        """``found`` with scores times the IoU of their masks, in the order of the new scores."""
        overlaps = self.maskiou_net(found.masks[:, None])
        scores = found.scores * overlaps.gather(1, found.labels[:, None])[:, 0]
        # A mask that is no number covers nothing.
        scores = torch.where(scores >= 0, scores, 0)
        order = scores.argsort(descending=True, stable=True)
        return FoundInstances(
            found.boxes[order], scores[order], found.labels[order], found.masks[order]
        )


class YolactPlusResNet50(YolactPlus):
    """YOLACT++ over ResNet-50 with thirteen deformable convolutions, 34 million parameters."""

    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone.conv1.weight",)

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        backbone = ResNet(Bottleneck, (3, 4, 6, 3), deformable_every=1)
        super().__init__(backbone, num_classes, auxiliary_heads=auxiliary_heads)


class YolactPlusResNet101(YolactPlus):
    """YOLACT++ over ResNet-101, every third block deformable, 54 million parameters."""

    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone.conv1.weight",)

    def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
        backbone = ResNet(Bottleneck, (3, 4, 23, 3), deformable_every=3)
        super().__init__(backbone, num_classes, auxiliary_heads=auxiliary_heads)
