"""The networks that EdgeSeg knows by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

from edgeseg.errors import RequestError
from edgeseg.export.models.bisenetv1 import BiSeNetV1
from edgeseg.export.models.bisenetv2 import BiSeNetV2
from edgeseg.export.models.fchardnet import FCHarDNet70
from edgeseg.export.models.instance import InstanceNetwork
from edgeseg.export.models.maskrcnn import MEAN, STD, MaskRCNNResNet50FPN, maskrcnn_resnet50_fpn
from edgeseg.export.models.network import Network
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.export.models.yolact import (
    Yolact,
    YolactDarknet53,
    YolactMobileNetV2,
    YolactResNet18,
    YolactResNet50,
    YolactResNet101,
)
from edgeseg.export.models.yolactplus import YolactPlusResNet50, YolactPlusResNet101
from edgeseg.spec import Preprocessing, Task

__all__ = [
    "DEFINITIONS",
    "BiSeNetV1",
    "BiSeNetV2",
    "FCHarDNet70",
    "InstanceNetwork",
    "MaskRCNNResNet50FPN",
    "ModelDefinition",
    "Network",
    "SemanticNetwork",
    "Yolact",
    "create",
    "create_semantic",
    "definition",
    "definition_of",
    "maskrcnn_resnet50_fpn",
]

#: the semantic networks of ``DEFINITIONS``
NamedNetwork = BiSeNetV1 | BiSeNetV2 | FCHarDNet70


@dataclass(frozen=True)
class ModelDefinition:
    """One network by name: what builds it, and what its published checkpoints were trained with.

    ``network`` is made by (num_classes, auxiliary_heads=...). ``licence``: of the published
    checkpoints, and what stands beside it. ``size``: "HxW" that published checkpoints were trained
    at, where the network is made for one size.
    """

    name: str
    network: type[Network]
    preprocessing: Preprocessing
    paper: str
    checkpoints: str
    licence: str
    size: str | None = None

    @property
    def task(self) -> Task:
        """What the network gives: a class per pixel, or objects."""
        return "instance" if issubclass(self.network, InstanceNetwork) else "semantic"


# Mean and deviation of ImageNet, in BGR order as PingoLH/FCHarDNet reads its pictures.
_HARDNET = Preprocessing(mean=(0.406, 0.456, 0.485), std=(0.225, 0.224, 0.229), order="bgr")

# Mean and deviation of the Cityscapes training pictures, as the CoinCheung/BiSeNet checkpoints use.
_BISENET = Preprocessing(mean=(0.3257, 0.3690, 0.3223), std=(0.2112, 0.2148, 0.2115), order="rgb")

# Those of dbolya/yolact for its ResNets, on a scale of 255 there.
_YOLACT = Preprocessing(
    mean=(123.68 / 255, 116.78 / 255, 103.94 / 255),
    std=(58.40 / 255, 57.12 / 255, 57.38 / 255),
    order="rgb",
)

# Its Darknet only wants 0 to 1.
_UNIT = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), order="rgb")

# Those of ImageNet, as torchvision's detection models read their pictures.
_MASK_RCNN = Preprocessing(mean=MEAN, std=STD, order="rgb")

_YOLACT_PAPER = "arXiv 1904.02689"
_YOLACT_PLUS_PAPER = "arXiv 1912.06218"
_YOLACT_CHECKPOINTS = "dbolya/yolact on GitHub"
_NO_CHECKPOINTS = "none; train it on your own data"

# Licences of the repositories, and the terms of what was learned from.
_CITYSCAPES_MIT = "MIT; Cityscapes' pictures are for non-commercial use"
_COCO_MIT = "MIT; COCO's annotations are CC BY 4.0"
_COCO_BSD = "BSD-3-Clause; COCO's annotations are CC BY 4.0"
_NO_LICENCE = "your own"

DEFINITIONS: dict[str, ModelDefinition] = {
    entry.name: entry
    for entry in (
        ModelDefinition(
            name="bisenetv1",
            network=BiSeNetV1,
            preprocessing=_BISENET,
            paper="arXiv 1808.00897",
            checkpoints="CoinCheung/BiSeNet on GitHub",
            licence=_CITYSCAPES_MIT,
        ),
        ModelDefinition(
            name="bisenetv2",
            network=BiSeNetV2,
            preprocessing=_BISENET,
            paper="arXiv 2004.02147",
            checkpoints="CoinCheung/BiSeNet on GitHub",
            licence=_CITYSCAPES_MIT,
        ),
        ModelDefinition(
            name="fchardnet70",
            network=FCHarDNet70,
            preprocessing=_HARDNET,
            paper="arXiv 1909.00948",
            checkpoints="PingoLH/FCHarDNet on GitHub",
            licence=_CITYSCAPES_MIT,
        ),
        ModelDefinition(
            name="yolact_resnet50",
            network=YolactResNet50,
            preprocessing=_YOLACT,
            paper=_YOLACT_PAPER,
            checkpoints=_YOLACT_CHECKPOINTS,
            licence=_COCO_MIT,
            size="550x550",
        ),
        ModelDefinition(
            name="yolact_resnet101",
            network=YolactResNet101,
            preprocessing=_YOLACT,
            paper=_YOLACT_PAPER,
            checkpoints=_YOLACT_CHECKPOINTS,
            licence=_COCO_MIT,
            size="550x550",
        ),
        ModelDefinition(
            name="yolact_darknet53",
            network=YolactDarknet53,
            preprocessing=_UNIT,
            paper=_YOLACT_PAPER,
            checkpoints=_YOLACT_CHECKPOINTS,
            licence=_COCO_MIT,
            size="550x550",
        ),
        ModelDefinition(
            name="yolact_plus_resnet50",
            network=YolactPlusResNet50,
            preprocessing=_YOLACT,
            paper=_YOLACT_PLUS_PAPER,
            checkpoints=_YOLACT_CHECKPOINTS,
            licence=_COCO_MIT,
            size="550x550",
        ),
        ModelDefinition(
            name="yolact_plus_resnet101",
            network=YolactPlusResNet101,
            preprocessing=_YOLACT,
            paper=_YOLACT_PLUS_PAPER,
            checkpoints=_YOLACT_CHECKPOINTS,
            licence=_COCO_MIT,
            size="550x550",
        ),
        ModelDefinition(
            name="yolact_resnet18",
            network=YolactResNet18,
            preprocessing=_YOLACT,
            paper=_YOLACT_PAPER,
            checkpoints=_NO_CHECKPOINTS,
            licence=_NO_LICENCE,
        ),
        ModelDefinition(
            name="yolact_mobilenetv2",
            network=YolactMobileNetV2,
            preprocessing=_YOLACT,
            paper=_YOLACT_PAPER,
            checkpoints=_NO_CHECKPOINTS,
            licence=_NO_LICENCE,
        ),
        ModelDefinition(
            name="maskrcnn_resnet50_fpn",
            network=MaskRCNNResNet50FPN,
            preprocessing=_MASK_RCNN,
            paper="arXiv 1703.06870",
            checkpoints="torchvision, MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
            licence=_COCO_BSD,
            size="800x1344",
        ),
    )
}


def definition(name: str) -> ModelDefinition:
    """The definition of the model ``name``; RequestError lists the names there are."""
    try:
        return DEFINITIONS[name]
    except KeyError:
        raise RequestError(f"the models are {', '.join(DEFINITIONS)}, and {name!r} came") from None


def definition_of(network: Network) -> ModelDefinition:
    """The definition that ``network`` was created from; RequestError for a foreign network."""
    for entry in DEFINITIONS.values():
        if type(network) is entry.network:
            return entry
    raise RequestError(
        f"the networks are {', '.join(DEFINITIONS)}, and a {type(network).__name__} came"
    )


@overload
def create(
    name: Literal["bisenetv1", "bisenetv2", "fchardnet70"],
    num_classes: int,
    *,
    auxiliary_heads: bool = False,
) -> NamedNetwork: ...
@overload
def create(
    name: Literal[
        "yolact_resnet18",
        "yolact_resnet50",
        "yolact_resnet101",
        "yolact_darknet53",
        "yolact_mobilenetv2",
        "yolact_plus_resnet50",
        "yolact_plus_resnet101",
    ],
    num_classes: int,
    *,
    auxiliary_heads: bool = False,
) -> Yolact: ...
@overload
def create(
    name: Literal["maskrcnn_resnet50_fpn"],
    num_classes: int,
    *,
    auxiliary_heads: bool = False,
    min_size: int | None = None,
    max_size: int | None = None,
) -> MaskRCNNResNet50FPN: ...
@overload
def create(
    name: str,
    num_classes: int,
    *,
    auxiliary_heads: bool = False,
    min_size: int | None = None,
    max_size: int | None = None,
) -> Network: ...
def create(
    name: str,
    num_classes: int,
    *,
    auxiliary_heads: bool = False,
    min_size: int | None = None,
    max_size: int | None = None,
) -> Network:
    """A new network with random weights, in eval mode.

    ``num_classes``: 1 to 255; of an instance model it counts the background, so 2 to 256.
    ``auxiliary_heads``: also the heads that only training uses, where the network has any.
    ``min_size`` and ``max_size``: to how many pixels Mask R-CNN scales its pictures, 800 and 1333
    by default; other networks take a picture as it is, and have no such numbers.
    """
    entry = definition(name)
    scales = entry.network is MaskRCNNResNet50FPN
    if not scales and (min_size is not None or max_size is not None):
        raise RequestError(f"min_size and max_size are Mask R-CNN's, and came with {name}")
    background = int(entry.task == "instance")
    if not 1 <= num_classes - background <= 255:
        raise RequestError(
            f"a model has 1 to 255 classes, and {num_classes} came"
            + (", of which one is the background" if background else "")
        )
    network: Network
    if scales:
        network = MaskRCNNResNet50FPN(
            num_classes,
            min_size=800 if min_size is None else min_size,
            max_size=1333 if max_size is None else max_size,
        )
    else:
        network = entry.network(num_classes, auxiliary_heads=auxiliary_heads)
    network.eval()
    return network


def create_semantic(
    name: str, num_classes: int, *, auxiliary_heads: bool = False
) -> SemanticNetwork:
    """As ``create``, for a model of the task semantic; RequestError for others."""
    network = create(name, num_classes, auxiliary_heads=auxiliary_heads)
    if not isinstance(network, SemanticNetwork):
        raise RequestError(f"{name} finds instances, and a model that gives classes is wanted")
    return network
