"""The networks of the published tables, as ONNX graphs with random weights.

EdgeSeg's own models come out of `edgeseg.export` as its users get them. The others (classifiers,
FCN and NanoSAM's image encoder) are written out here, from their papers and repositories, since
only their layers matter.
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn

from edgeseg.export.models import InstanceNetwork, SemanticNetwork, create, definition
from edgeseg.export.onnx import OPSET, export_network, traced
from edgeseg.onnxfile import OnnxFile
from edgeseg.spec import ModelSpec

__all__ = ["MODELS", "graph"]

_SEMANTIC, _OBJECTS = 19, 80


class _Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels."""

    def __init__(
        self, inputs: int, width: int, *, bottleneck: bool, stride: int, dilation: int
    ) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        middle = nn.Conv2d(
            width if bottleneck else inputs, width, 3, stride, dilation, dilation, bias=False
        )
        if bottleneck:
            layers: list[nn.Module] = [
                nn.Conv2d(inputs, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                middle,
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, outputs, 1, bias=False),
            ]
        else:
            layers = [
                middle,
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, outputs, 3, padding=dilation, dilation=dilation, bias=False),
            ]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(
    depths: tuple[int, ...],
    *,
    bottleneck: bool,
    deep_stem: bool = False,
    dilated: bool = False,
) -> nn.Sequential:
    """ResNet up to its last block; ``dilated`` keeps the resolution from 1/8 on."""
    if deep_stem:
        channels = (3, 32, 32, 64)
        stem: list[nn.Module] = []
        for index in range(3):
            stem += [
                nn.Conv2d(
                    channels[index],
                    channels[index + 1],
                    3,
                    2 if index == 0 else 1,
                    1,
                    bias=False,
                ),
                nn.BatchNorm2d(channels[index + 1]),
                nn.ReLU(),
            ]
    else:
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        late = dilated and stage > 1
        for index in range(depth):
            stride = 2 if index == 0 and stage > 0 and not late else 1
            dilation = 1 << (stage - 1) if late else 1
            layers.append(
                _Block(inputs, width, bottleneck=bottleneck, stride=stride, dilation=dilation)
            )
            inputs = width * (4 if bottleneck else 1)
    return nn.Sequential(*layers)


def _classifier(depths: tuple[int, ...], *, bottleneck: bool) -> nn.Module:
    features = 2048 if bottleneck else 512
    return nn.Sequential(
        _resnet(depths, bottleneck=bottleneck),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(features, 1000),
    )


def _vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 49, 4096), nn.ReLU()]
    layers += [nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers)


def _fcn_resnet18() -> nn.Module:
    """dusty-nv/pytorch-segmentation: FCN on ResNet-18, logits at 1/32, 21 classes."""
    return nn.Sequential(
        _resnet((2, 2, 2, 2), bottleneck=False),
        nn.Conv2d(512, 128, 3, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 21, 1),
    )


class _FcnR50(nn.Module):
    """MMSegmentation's fcn_r50-d8: a dilated ResNet-50 with a deep stem, logits at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _resnet((3, 4, 6, 3), bottleneck=True, deep_stem=True, dilated=True)
        self.head = nn.Sequential(
            nn.Conv2d(2048, 512, 3, padding=1, bias=False),
            nn.BatchNorm2d(512),
            nn.ReLU(),
            nn.Conv2d(512, 512, 3, padding=1, bias=False),
            nn.BatchNorm2d(512),
            nn.ReLU(),
        )
        self.join = nn.Sequential(
            nn.Conv2d(2560, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()
        )
        self.classes = nn.Conv2d(512, _SEMANTIC, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        logits = self.classes(self.join(torch.cat((features, self.head(features)), dim=1)))
        upsampled = nn.functional.interpolate(logits, scale_factor=8.0, mode="bilinear")
        return upsampled.argmax(dim=1)


class _NanoSam(nn.Module):
    """NVIDIA-AI-IOT/nanosam: the image encoder on ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        width = 256
        layers: list[nn.Module] = []
        for inputs in (512, width, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.GELU()]
        layers += [nn.ConvTranspose2d(width, width, 3, 2, 1, 1), nn.GELU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 1)]
        self.body = nn.Sequential(_resnet((2, 2, 2, 2), bottleneck=False), *layers)
        self.position = nn.Parameter(torch.zeros(1, width, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        positioned: Tensor = self.body(x) + self.position
        return positioned


class _Wrapped(nn.Module):
    """A module under the name `traced` looks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)
        return found


_FOREIGN = {
    "resnet18": lambda: _classifier((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: _classifier((3, 4, 6, 3), bottleneck=True),
    "resnet101": lambda: _classifier((3, 4, 23, 3), bottleneck=True),
    "vgg16": _vgg16,
    "fcn_resnet18": _fcn_resnet18,
    "fcn_r50_d8": _FcnR50,
    "nanosam_encoder": _NanoSam,
}

_OWN = (
    "bisenetv1",
    "bisenetv2",
    "fchardnet70",
    "yolact_resnet50",
    "yolact_resnet101",
    "yolact_darknet53",
    "yolact_mobilenetv2",
    "maskrcnn_resnet50_fpn",
)

#: every name that `graph` takes
MODELS = (*_OWN, *_FOREIGN)


def graph(name: str, height: int, width: int) -> bytes:
    """The ONNX file of the model ``name`` at ``height`` x ``width``.

    EdgeSeg's operators are written out in standard ones: the published programs had none.
    """
    torch.manual_seed(0)
    if name in _FOREIGN:
        module = _Wrapped(_FOREIGN[name]())
        model = onnx.helper.make_model(
            traced(module, (height, width)),
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )
        content: bytes = model.SerializeToString()
        return content
    kind = definition(name)
    objects = kind.task == "instance"
    network = create(name, _OBJECTS + 1 if objects else _SEMANTIC)
    assert isinstance(network, SemanticNetwork | InstanceNetwork)
    count = _OBJECTS if objects else _SEMANTIC
    masks = network.mask_size(height, width) if isinstance(network, InstanceNetwork) else (0, 0)
    spec = ModelSpec(
        name=name,
        architecture=name,
        task=kind.task,
        height=height,
        width=width,
        classes=tuple(f"class {index}" for index in range(count)),
        colours=((0, 0, 0),) * count,
        ignore=255,
        preprocessing=kind.preprocessing,
        capacity=100 if objects else 0,
        mask_height=masks[0],
        mask_width=masks[1],
        mask_extent=network.mask_extent if isinstance(network, InstanceNetwork) else "image",
    )
    exported = export_network(network, spec)
    return OnnxFile(exported.model.SerializeToString()).inlined()
