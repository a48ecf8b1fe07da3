"""The networks that EdgeSeg knows by name."""

from __future__ import annotations

from dataclasses import dataclass

from edgeseg.errors import RequestError
from edgeseg.export.models.bisenetv1 import BiSeNetV1
from edgeseg.export.models.bisenetv2 import BiSeNetV2
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.spec import Preprocessing

__all__ = [
    "DEFINITIONS",
    "BiSeNetV1",
    "BiSeNetV2",
    "ModelDefinition",
    "SemanticNetwork",
    "create",
    "definition",
    "definition_of",
]


@dataclass(frozen=True)
class ModelDefinition:
    """One network by name: what builds it, and what its published checkpoints were trained with."""

    name: str
    network: type[BiSeNetV1] | type[BiSeNetV2]
    preprocessing: Preprocessing
    paper: str
    checkpoints: str


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


def create(name: str, num_classes: int, *, auxiliary_heads: bool = False) -> BiSeNetV1 | BiSeNetV2:
    """A new network with random weights, in eval mode.

    ``num_classes``: 1 to 255. ``auxiliary_heads``: also the heads that only training uses.
    """
    if not 1 <= num_classes <= 255:
        raise RequestError(f"a model has 1 to 255 classes, and {num_classes} came")
    network = definition(name).network(num_classes, auxiliary_heads=auxiliary_heads)
    network.eval()
    return network
