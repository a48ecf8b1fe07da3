"""The networks that EdgeSeg knows by name."""

from __future__ import annotations

from dataclasses import dataclass

from edgeseg.errors import RequestError
from edgeseg.export.models.bisenetv1 import BiSeNetV1
from edgeseg.export.models.bisenetv2 import BiSeNetV2
from edgeseg.export.models.fchardnet import FCHarDNet70
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.spec import Preprocessing

__all__ = [
    "DEFINITIONS",
    "BiSeNetV1",
    "BiSeNetV2",
    "FCHarDNet70",
    "ModelDefinition",
    "SemanticNetwork",
    "create",
    "definition",
    "definition_of",
]

#: the networks of ``DEFINITIONS``; all are made by (num_classes, auxiliary_heads=...)
NamedNetwork = BiSeNetV1 | BiSeNetV2 | FCHarDNet70


@dataclass(frozen=True)
class ModelDefinition:
    """One network by name: what builds it, and what its published checkpoints were trained with."""

    name: str
    network: type[BiSeNetV1] | type[BiSeNetV2] | type[FCHarDNet70]
    preprocessing: Preprocessing
    paper: str
    checkpoints: str


# Mean and deviation of ImageNet, in BGR order as PingoLH/FCHarDNet reads its pictures.
_HARDNET = Preprocessing(mean=(0.406, 0.456, 0.485), std=(0.225, 0.224, 0.229), order="bgr")

# Mean and deviation of the Cityscapes training pictures, as the CoinCheung/BiSeNet checkpoints use.
_BISENET = Preprocessing(mean=(0.3257, 0.3690, 0.3223), std=(0.2112, 0.2148, 0.2115), order="rgb")

DEFINITIONS: dict[str, ModelDefinition] = {
    entry.name: entry
    for entry in (
        ModelDefinition(
            name="bisenetv1",
            network=BiSeNetV1,
            preprocessing=_BISENET,
            paper="arXiv 1808.00897",
            checkpoints="CoinCheung/BiSeNet on GitHub",
        ),
        ModelDefinition(
            name="bisenetv2",
            network=BiSeNetV2,
            preprocessing=_BISENET,
            paper="arXiv 2004.02147",
            checkpoints="CoinCheung/BiSeNet on GitHub",
        ),
        ModelDefinition(
            name="fchardnet70",
            network=FCHarDNet70,
            preprocessing=_HARDNET,
            paper="arXiv 1909.00948",
            checkpoints="PingoLH/FCHarDNet on GitHub",
        ),
    )
}


def definition(name: str) -> ModelDefinition:
    """The definition of the model ``name``; RequestError lists the names there are."""
    try:
        return DEFINITIONS[name]
    except KeyError:
        raise RequestError(f"the models are {', '.join(DEFINITIONS)}, and {name!r} came") from None


def definition_of(network: SemanticNetwork) -> ModelDefinition:
    """The definition that ``network`` was created from; RequestError for a foreign network."""
    for entry in DEFINITIONS.values():
        if type(network) is entry.network:
            return entry
    raise RequestError(
        f"the networks are {', '.join(DEFINITIONS)}, and a {type(network).__name__} came"
    )


def create(name: str, num_classes: int, *, auxiliary_heads: bool = False) -> NamedNetwork:
    """A new network with random weights, in eval mode.

    ``num_classes``: 1 to 255. ``auxiliary_heads``: also the heads that only training uses,
    where the network has any.
    """
    if not 1 <= num_classes <= 255:
        raise RequestError(f"a model has 1 to 255 classes, and {num_classes} came")
    network = definition(name).network(num_classes, auxiliary_heads=auxiliary_heads)
    network.eval()
    return network
