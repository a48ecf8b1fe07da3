"""Which channels of a network stand or fall together.

Taking a filter out of one convolution takes channels out of all that read it, and, through sums,
products and concatenations, filters out of others. Fang et al., "DepGraph: Towards Any Structural
Pruning" (CVPR 2023, arXiv 2301.12900) finds them in the autograd graph; its library does it here.
"""

from __future__ import annotations

import copy
import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeseg.errors import RequestError
from edgeseg.export.models.network import Network
from edgeseg.export.structure import (
    Layer,
    is_resizable,
    layers_of,
    outputs_of,
    shape_of,
    smallest_input,
    take_channels,
)

__all__ = ["Coupling", "Couplings", "Side", "find_couplings", "remove_channels"]

#: a layer's name, and which of its channels; a batch norm has outputs alone
Side = tuple[str, Literal["out", "in"]]


@dataclass(frozen=True, eq=False)
class Coupling:
    """Bundles of channels, alike in what they touch; each goes as a whole or stays.

    ``members``: for each side of a layer that is touched, (bundles, channels per bundle) int64, the
    channels of that side that belong to each bundle.
    """

    members: Mapping[Side, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(next(iter(self.members.values())))

    @property
    def name(self) -> str:
        """The first layer that computes one of the channels of each bundle."""
        return next(name for name, side in self.members if side == "out")


@dataclass(frozen=True)
class Couplings:
    """All of a network's bundles that can go. ``fixed``: layers whose outputs all stay."""

    items: tuple[Coupling, ...]
    fixed: tuple[str, ...]

    def __iter__(self) -> Iterator[Coupling]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def find_couplings(network: Network, *, protect: Sequence[str] = ()) -> Couplings:
    """The couplings of ``network``, training heads included.

    Layers that compute an output of the network keep their channels, and so do those in
    ``protect``: names of layers, or of modules for all in them. RequestError for a name that does
    not occur, and for a network that cannot be pruned.
    """
    if not network.prunable:
        raise RequestError(
            f"{type(network).__name__} is not pruned: EdgeSeg cannot train it afterwards, and "
            "untrained its accuracy is lost; prune one of the other models"
        )
    layers = layers_of(network)
    protected = _named(layers, protect)
    graph, shadow = _traced(network)
    names: dict[nn.Module, str] = {layer: name for name, layer in layers_of(shadow).items()}
    fixed = protected | {names[layer] for layer in _last_layers(graph)}
    atoms = _Atoms(layers)
    untouchable: list[int] = []
    traced = {names[module] for module in graph.module2node if module in names}
    for name in fixed:
        untouchable.extend(atoms.of((name, "out")))
    for name, layer in layers.items():
        if isinstance(layer, nn.BatchNorm2d):
            continue
        if not is_resizable(layer) or name not in traced:
            untouchable.extend([*atoms.of((name, "out")), *atoms.of((name, "in"))])
        elif (shape := shape_of(layer)).groups > 1:
            # A channel and the filters that it has for its own.
            per_input = shape.out_channels // shape.groups
            inputs, outputs = atoms.of((name, "in")), atoms.of((name, "out"))
            for index, atom in enumerate(outputs):
                atoms.join(inputs[index // per_input], atom)
    for module, name in names.items():
        if isinstance(module, nn.BatchNorm2d) or name not in traced:
            continue
        own = atoms.of((name, "out"))
        group = graph.get_pruning_group(
            module, graph.get_pruner_of_module(module).prune_out_channels, list(range(len(own)))
        )
        for item in group:
            if item.dep.target.module not in names:
                continue
            # A layer whose sides are one, such as a batch norm, has outputs here.
            is_out = graph.is_out_channel_pruning_fn(item.dep.handler)
            there = atoms.of((names[item.dep.target.module], "out" if is_out else "in"))
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                atoms.join(own[root], there[index])
    return Couplings(tuple(atoms.couplings(untouchable)), tuple(n for n in layers if n in fixed))


def remove_channels(
    network: nn.Module, couplings: Sequence[Coupling], removed: Sequence[NDArray[np.int64]]
) -> None:
    """Takes bundles out of ``network``, in place; ``removed`` are their indices per coupling."""
    gone: dict[Side, list[NDArray[np.int64]]] = defaultdict(list)
    for coupling, rows in zip(couplings, removed, strict=True):
        if len(rows):
            for side, channels in coupling.members.items():
                gone[side].append(channels[rows].ravel())
    layers = layers_of(network)
    for name, layer in layers.items():
        shape = shape_of(layer)
        outputs = _left(shape.out_channels, gone.get((name, "out")))
        inputs = _left(shape.in_channels, gone.get((name, "in")))
        take_channels(layer, outputs=outputs, inputs=inputs)


def _left(count: int, gone: list[NDArray[np.int64]] | None) -> Tensor | None:
    """The channels of ``count`` that are not gone; None for all."""
    if gone is None:
        return None
    return torch.from_numpy(np.setdiff1d(np.arange(count), np.concatenate(gone)))


def _named(layers: Mapping[str, Layer], protect: Sequence[str]) -> set[str]:
    """The layers that ``protect`` means."""
    found = set()
    modules = {".".join(name.split(".")[:end]) for name in layers for end in range(1, 20)}
    for given in protect:
        inside = [name for name in layers if name == given or name.startswith(f"{given}.")]
        if not inside:
            close = difflib.get_close_matches(given, sorted(modules), n=3)
            hint = f"; close to it are {', '.join(close)}" if close else ""
            raise RequestError(
                f"a protected layer is a layer or module of the network, such as "
                f"{next(iter(layers))}, and {given!r} came{hint}"
            )
        found.update(inside)
    return found


def _traced(network: Network) -> tuple[Any, Network]:
    """The dependency graph of a copy of ``network``, and the copy."""
    shadow = copy.deepcopy(network).eval()
    for parameter in shadow.parameters():
        parameter.requires_grad_(True)

    def forward(module: Network, x: Tensor) -> list[Tensor]:
        # An output may also be read inside the network; a step behind it ends the graph there.
        return [output * 1.0 for output in outputs_of(module, x) if output.requires_grad]

    graph: Any = torch_pruning.DependencyGraph()
    with torch.enable_grad():
        graph.build_dependency(shadow, smallest_input(network), forward_fn=forward, verbose=False)
    return graph, shadow


def _last_layers(graph: Any) -> set[nn.Module]:
    """Layers with weights between which and an output there is none."""
    pending = [node for node in graph.module2node.values() if not node.outputs]
    seen = set()
    found: set[nn.Module] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.module, nn.Conv2d | nn.Linear):
            found.add(node.module)
        else:
            pending.extend(node.inputs)
    return found


class _Atoms:
    """Single channels of single layers, joined into bundles; each is known by a number."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers
        self._ranges: dict[Side, range] = {}
        end = 0
        for name, layer in layers.items():
            shape = shape_of(layer)
            self._ranges[name, "out"] = range(end, end := end + shape.out_channels)
            if not isinstance(layer, nn.BatchNorm2d):
                self._ranges[name, "in"] = range(end, end := end + shape.in_channels)
        self._parent = list(range(end))

    def of(self, side: Side) -> range:
        """The atoms of one side, in the order of its channels."""
        return self._ranges[side]

    def join(self, one: int, other: int) -> None:
        """Puts both into one bundle."""
        one, other = self._root(one), self._root(other)
        # The lower number leads, so that the order of the couplings is that of the layers.
        self._parent[max(one, other)] = min(one, other)

    def _root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = atom = self._parent[self._parent[atom]]
        return atom

    def couplings(self, untouchable: Sequence[int]) -> list[Coupling]:
        """The bundles without ``untouchable`` atoms that a layer with weights computes."""
        stays = {self._root(atom) for atom in untouchable}
        bundles: dict[int, dict[Side, list[int]]] = defaultdict(dict)
        for side, atoms in self._ranges.items():
            for channel, atom in enumerate(atoms):
                root = self._root(atom)
                if root not in stays:
                    bundles[root].setdefault(side, []).append(channel)
        alike: dict[tuple[tuple[Side, int], ...], list[dict[Side, list[int]]]] = defaultdict(list)
        for bundle in bundles.values():
            if any(side == "out" and self._has_weights(name) for name, side in bundle):
                alike[tuple((side, len(found)) for side, found in bundle.items())].append(bundle)
        return [
            Coupling({side: np.array([bundle[side] for bundle in found]) for side in found[0]})
            for found in alike.values()
        ]

    def _has_weights(self, name: str) -> bool:
        return not isinstance(self._layers[name], nn.BatchNorm2d)
