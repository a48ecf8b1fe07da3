"""The models there are, as a table: what each costs, and where its checkpoints come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeseg.export.models import DEFINITIONS, create
from edgeseg.export.models.instance import InstanceNetwork
from edgeseg.export.models.network import Network
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.spec import Task, parse_size

__all__ = ["CatalogueEntry", "catalogue", "multiply_accumulates"]

#: at which a network that takes any size is counted, and with how many classes it is
_SIZE, _SEMANTIC_CLASSES, _INSTANCE_CLASSES = "512x1024", 19, 81


@dataclass(frozen=True)
class CatalogueEntry:
    """One model by name.

    ``parameters``: of the network as it is deployed; ``macs``: multiply-accumulates of its
    convolutions and matrices for one picture of ``size`` ("HxW"). Both are for 19 classes, or for
    COCO's 80 objects. ``checkpoints``: where public ones are; ``licence``: of these.
    """

    name: str
    task: Task
    size: str
    parameters: int
    macs: int
    paper: str
    checkpoints: str
    licence: str


def catalogue() -> list[CatalogueEntry]:
    """Every model of `DEFINITIONS`, counted without computing anything."""
    entries = []
    for name, definition in DEFINITIONS.items():
        size = definition.size or _SIZE
        classes = _SEMANTIC_CLASSES if definition.task == "semantic" else _INSTANCE_CLASSES
        with torch.device("meta"):
            network = create(name, classes)
        entries.append(
            CatalogueEntry(
                name=name,
                task=definition.task,
                size=size,
                parameters=network.parameter_count(),
                macs=multiply_accumulates(network, *parse_size(size)),
                paper=definition.paper,
                checkpoints=definition.checkpoints,
                licence=definition.licence,
            )
        )
    return entries


@torch.no_grad()
def multiply_accumulates(network: Network, height: int, width: int) -> int:
    """Those of ``network`` for one picture of ``height`` x ``width``, PyTorch's own count halved.

    Of a network on the meta device nothing is computed.
    """
    x = torch.empty(1, 3, height, width, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        if isinstance(network, InstanceNetwork):
            network.raw(x)
        elif isinstance(network, SemanticNetwork):
            network.low_resolution_logits(x)
        else:
            network(x)
    return int(counter.get_total_flops()) // 2
