"""Mask R-CNN: boxes and classes of regions that a first stage proposes, and a mask in each box.

He et al., "Mask R-CNN" (ICCV 2017, arXiv 1703.06870), ResNet-50 with a feature pyramid. Names of
the state_dict are those of torchvision's checkpoints, of which `current_names` knows both layouts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeseg.errors import RequestError
from edgeseg.export.models.frozenresnet import PyramidBackbone
from edgeseg.export.models.instance import FoundInstances, InstanceNetwork
from edgeseg.export.models.proposals import ProposalNetwork, ProposalRules, anchors_of
from edgeseg.export.models.proposals import initialise as initialise_proposals
from edgeseg.export.models.roiheads import (
    MASK_BINS,
    DetectionRules,
    Detections,
    RegionHeads,
)

if TYPE_CHECKING:
    import onnx

    from edgeseg.spec import ModelSpec

__all__ = [
    "MaskRCNN",
    "MaskRCNNResNet50FPN",
    "Widths",
    "current_names",
    "maskrcnn_resnet50_fpn",
    "pasted",
]

#: mean and deviation of ImageNet, RGB
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_STRIDE = 32


@dataclass(frozen=True)
class Widths:
    """The numbers that make one member of the family.

    ``blocks`` of each stage of the ResNet; ``stem``: channels of its first convolution;
    ``pyramid``: channels of every level; ``hidden``: width of the box head.
    """

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    stem: int = 64
    pyramid: int = 256
    hidden: int = 1024


class MaskRCNN(InstanceNetwork):
    """Mask R-CNN for inference; it stays in eval mode, and asking for training is a RequestError.

    ``num_classes`` counts the background, as the published model's 91. A picture is scaled so that
    its short side is ``min_size`` unless its long side would pass ``max_size``, both in pixels.
    """

    stride: ClassVar[int] = _STRIDE
    smallest: ClassVar[int] = _STRIDE
    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone.body.conv1.weight",)
    classifier: ClassVar[str] = "roi_heads.box_predictor.cls_score.weight"
    mask_extent: ClassVar[Literal["image", "box"]] = "box"
    prunable: ClassVar[bool] = False
    raw_names: ClassVar[tuple[str, ...]] = (
        *(f"level_{index}" for index in range(4)),
        *(f"objectness_{index}" for index in range(5)),
        *(f"deltas_{index}" for index in range(5)),
    )

    def __init__(
        self,
        num_classes: int,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        widths: Widths | None = None,
        proposal_rules: ProposalRules | None = None,
        detection_rules: DetectionRules | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise RequestError(
                f"num_classes counts the background, so it is at least 2, and {num_classes} came"
            )
        if not 1 <= min_size <= max_size:
            raise RequestError(
                "min_size is at least 1 pixel and at most max_size, "
                f"and {min_size} and {max_size} came"
            )
        widths = widths or Widths()
        self.num_classes = num_classes
        self.min_size = min_size
        self.max_size = max_size
        self.backbone = PyramidBackbone(widths.blocks, widths.stem, widths.pyramid)
        self.rpn = ProposalNetwork(widths.pyramid, proposal_rules or ProposalRules())
        self.roi_heads = RegionHeads(
            widths.pyramid, widths.hidden, num_classes, detection_rules or DetectionRules()
        )
        _initialise(self)
        self.register_load_state_dict_pre_hook(_rename_in_place)  # type: ignore[no-untyped-call]
        self.eval()

    @classmethod
    def current_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Network.current_names``: torchvision's first and present layouts."""
        return current_names(state)

    def train(self, mode: bool = True) -> MaskRCNN:
        """Refuses training mode: there are no losses here."""
        if mode:
            raise RequestError(
                "Mask R-CNN cannot be trained here; train it with torchvision and load its weights"
            )
        super().train(False)
        return self

    def forward(self, images: Sequence[Tensor]) -> list[Detections]:
        """Pictures (3, h, w) RGB from 0 to 1, of any sizes -> detections in their own pixels.

        Masks are (n, 1, h, w) probabilities at the picture's size.
        """
        x, sizes = self.network_input(images)
        found = self.detections(x, sizes)
        return [
            _at_picture(detections, size, (image.shape[-2], image.shape[-1]))
            for detections, size, image in zip(found, sizes, images, strict=True)
        ]

    def network_input(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised and scaled pictures as one batch (N, 3, H, W), and each one's (height, width).

        Each lies in the upper left corner; zeros around it, to a multiple of 32.
        """
        if not images:
            raise RequestError("Mask R-CNN takes a list of pictures, and an empty one came")
        scaled = [self._scaled(image) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in scaled]
        height, width = (
            -(-max(size[axis] for size in sizes) // _STRIDE) * _STRIDE for axis in (0, 1)
        )
        return torch.stack(
            [
                functional.pad(image, (0, width - w, 0, height - h))
                for image, (h, w) in zip(scaled, sizes, strict=True)
            ]
        ), sizes

    def _scaled(self, image: Tensor) -> Tensor:
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise RequestError(f"a picture is (3, height, width), and {tuple(image.shape)} came")
        if not image.is_floating_point():
            raise RequestError(
                f"a picture is floating point from 0 to 1, and {image.dtype} came; "
                "convert it and divide by 255"
            )
        mean, std = (image.new_tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
        short, long = sorted(image.shape[-2:])
        scale = min(self.min_size / short, self.max_size / long)
        size = [math.floor(side * scale) for side in image.shape[-2:]]
        if min(size) < 1:
            raise RequestError(
                f"a picture of {image.shape[-2]}x{image.shape[-1]} is too long and thin for "
                f"a long side of {self.max_size}; cut it into pieces"
            )
        # Steps of old / new size, not of 1 / scale: what the published model was trained with.
        return functional.interpolate(
            ((image - mean) / std)[None], size=size, mode="bilinear", align_corners=False
        )[0]

    def detections(
        self, x: Tensor, sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Detections]:
        """``network_input`` -> detections in network pixels, masks (n, 1, 28, 28) of the box.

        ``sizes``: of the pictures in ``x``, by default all of it.
        """
        size = (x.shape[-2], x.shape[-1])
        if size[0] % _STRIDE or size[1] % _STRIDE:
            raise RequestError(
                f"the network takes sizes that are multiples of {_STRIDE}, "
                f"and {size[0]}x{size[1]} came"
            )
        inside = list(sizes) if sizes is not None else [size] * len(x)
        features = self.backbone(x)
        proposals = self.rpn(features, size, inside)
        found: list[Detections] = self.roi_heads(features, proposals, inside)
        return found

    def mask_size(self, height: int, width: int) -> tuple[int, int]:
        """See ``InstanceNetwork.mask_size``: the same for every input."""
        del height, width
        return 2 * MASK_BINS, 2 * MASK_BINS

    def raw(self, x: Tensor) -> tuple[Tensor, ...]:
        """The levels that boxes are pooled from, then objectness and deltas of every level."""
        levels = list(self.backbone(x).values())
        logits, deltas = self.rpn.head(levels)
        return (*levels[:-1], *logits, *deltas)

    def append_head(self, graph: onnx.GraphProto, spec: ModelSpec) -> list[onnx.FunctionProto]:
        """See ``InstanceNetwork.append_head``."""
        # Inference in PyTorch does without the onnx package.
        from edgeseg.export.maskrcnn_head import append_maskrcnn_head

        size = (spec.height, spec.width)
        levels = [
            (-(-spec.height // stride), -(-spec.width // stride)) for stride in (4, 8, 16, 32, 64)
        ]
        return append_maskrcnn_head(
            graph,
            [level.numpy() for level in anchors_of(levels, size)],
            {
                key: value.detach().cpu().numpy()
                for key, value in self.state_dict().items()
                if key.startswith("roi_heads.")
            },
            spec,
            self.rpn.rules,
            self.roi_heads.rules,
        )

    @torch.inference_mode()
    def detect(self, x: Tensor, capacity: int) -> FoundInstances:
        """See ``InstanceNetwork.detect``."""
        (found,) = self.detections(x)
        kept = slice(0, capacity)
        return FoundInstances(
            found["boxes"][kept],
            found["scores"][kept],
            found["labels"][kept] - 1,
            found["masks"][kept, 0],
        )


def _at_picture(found: Detections, size: tuple[int, int], picture: tuple[int, int]) -> Detections:
    """Detections at ``size`` in network pixels, brought to a picture's (height, width)."""
    boxes = found["boxes"]
    ratios = [
        boxes.new_tensor(there) / boxes.new_tensor(here)
        for there, here in zip(picture, size, strict=True)
    ]
    boxes = boxes * torch.stack([ratios[1], ratios[0], ratios[1], ratios[0]])
    masks = pasted(found["masks"], boxes, *picture)
    return Detections(boxes=boxes, labels=found["labels"], scores=found["scores"], masks=masks)


def pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks of boxes at the size of their picture: (n, 1, m, m), (n, 4) -> (n, 1, height, width).

    A mask gets a border of one zero, its box grows by (m + 2) / m about its centre, corners are cut
    to integers, and the mask is resized (bilinear, half-pixel centres) to the pixels from the first
    corner to the second, both included. The rest is zero.
    """
    side = masks.shape[-1]
    padded = functional.pad(masks, (1, 1, 1, 1))
    centres = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    halves = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((side + 2) / side)
    corners = torch.cat([centres - halves, centres + halves], dim=1).to(torch.int64).tolist()
    out = masks.new_zeros(len(masks), 1, height, width)
    for index, (x1, y1, x2, y2) in enumerate(corners):
        rows, columns = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        top, bottom = max(y1, 0), min(y2 + 1, height)
        left, right = max(x1, 0), min(x2 + 1, width)
        if top >= bottom or left >= right:
            continue
        resized = functional.interpolate(
            padded[index : index + 1], size=(rows, columns), mode="bilinear", align_corners=False
        )
        out[index, 0, top:bottom, left:right] = resized[
            0, 0, top - y1 : bottom - y1, left - x1 : right - x1
        ]
    return out


class MaskRCNNResNet50FPN(MaskRCNN):
    """The published member, 44.4 million parameters with 91 classes."""

    def __init__(
        self,
        num_classes: int = 91,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        auxiliary_heads: bool = False,
    ) -> None:
        del auxiliary_heads  # one signature for all networks by name, and this one has none
        super().__init__(num_classes, min_size=min_size, max_size=max_size)


def maskrcnn_resnet50_fpn(
    num_classes: int = 91, *, min_size: int = 800, max_size: int = 1333
) -> MaskRCNNResNet50FPN:
    """A new Mask R-CNN with random weights, in eval mode."""
    return MaskRCNNResNet50FPN(num_classes, min_size=min_size, max_size=max_size)


#: names of the first published checkpoints, and what later ones call the same arrays
_RENAMED = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^roi_heads\.mask_head\.mask_fcn([1-4])\.(weight|bias)$", None),
)


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of either published layout with the names used here, in the same order.

    Counters of batches, which frozen batch norms do not have, are left out.
    """
    return {
        _current_name(key): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }


def _current_name(key: str) -> str:
    for pattern, replacement in _RENAMED:
        match = re.match(pattern, key)
        if match is not None:
            if replacement is None:
                return f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}"
            return match.expand(replacement)
    return key


def _rename_in_place(module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    """Hook of ``load_state_dict``, which has made a copy of its mapping."""
    del module
    renamed = current_names(state)
    state.clear()
    state.update(renamed)


def _initialise(network: MaskRCNN) -> None:
    """Random weights as the papers start them; in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.backbone.fpn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
    initialise_proposals(network.rpn)
