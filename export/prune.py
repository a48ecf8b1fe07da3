"""Pruning: whole channels out of a network, until it costs what it may.

The bundles of channels that go together are found by `edgeseg.export.couplings`, scored by
`edgeseg.export.importance`, and taken out of all layers at once, those first that cost most for
what they give, in chunks that leave widths that hardware likes.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeseg.errors import RequestError
from edgeseg.export.couplings import Coupling, Side, find_couplings, remove_channels
from edgeseg.export.importance import Importance
from edgeseg.export.models.network import Network
from edgeseg.export.structure import (
    Cost,
    LayerShape,
    outputs_of,
    positions_of,
    structure_of,
    total,
)

__all__ = ["Finetune", "Pruning", "Rules", "Stopwatch", "Target", "prune", "recalibrate"]

#: trains a network in place between two steps; the step is 1 after the first
Finetune = Callable[[Network, int], None]
#: a network -> milliseconds for one picture, comparable between calls: `EngineStopwatch`
Stopwatch = Callable[[Network], float]

#: candidates that are measured until a target in milliseconds is met, besides the smallest one
_MEASURED = 6


@dataclass(frozen=True)
class Target:
    """What a network may cost.

    ``amount``: of multiplications or parameters a share of what it has, if it is below 1, or else a
    number; or milliseconds. RequestError for what is no such thing.
    """

    kind: Literal["macs", "parameters", "milliseconds"]
    amount: float

    def __post_init__(self) -> None:
        if not 0 < self.amount < float("inf"):
            raise RequestError(f"a target is a number above 0, and {self.amount:g} came")
        if self.kind != "milliseconds" and self.amount == 1:
            raise RequestError(
                "a target is a share below 1, such as 0.5, or a number of "
                f"{_THINGS[self.kind]}, and 1 came"
            )

    def text(self, amount: float) -> str:
        """``amount`` of what this is a target of, for a person."""
        if self.kind == "milliseconds":
            return f"{amount:.2f} ms"
        return f"{counted(amount)} {_THINGS[self.kind]}"


_THINGS = {"macs": "multiplications", "parameters": "parameters"}


def counted(amount: float) -> str:
    """A large number for a person: 2.41 G, 3.36 M."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if amount >= size:
            return f"{amount / size:.2f}{letter}"
    return f"{amount:.0f}"


@dataclass(frozen=True)
class Rules:
    """Which widths a layer may have.

    A layer keeps all of its channels, or a ``multiple`` of them, ``minimum`` at least. 8 suits
    FP16 on tensor cores, which TensorRT feeds 8 channels at a time (format HWC8), and the vectors
    of a CPU. 32 suits INT8, where it packs 32 channels (CHW32; both in its documentation's "I/O
    Formats") and others are filled up with zeros. ``protect``: names of layers, or of modules for
    all in them, that keep their channels.
    """

    multiple: int = 8
    minimum: int = 8
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("multiple", "minimum"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is 1 channel or more, and {getattr(self, name)} came")


@dataclass(frozen=True)
class Pruning:
    """What became of each layer.

    ``before`` and ``after``: name -> channels of every convolution and linear layer, training heads
    included. ``positions``: name -> how often a picture of ``size`` makes a layer compute its
    channels; training heads have none. ``milliseconds``: before and after, where they were asked
    for.
    """

    size: tuple[int, int]
    before: Mapping[str, LayerShape]
    after: Mapping[str, LayerShape]
    positions: Mapping[str, int]
    milliseconds: tuple[float, float] | None = None

    @property
    def costs(self) -> tuple[Cost, Cost]:
        """Of the network before and after."""
        return total(self.before, self.positions), total(self.after, self.positions)


def prune(
    network: Network,
    target: Target,
    importance: Importance,
    rules: Rules | None = None,
    *,
    size: tuple[int, int],
    steps: int = 1,
    finetune: Finetune | None = None,
    calibration: Sequence[Tensor] = (),
    stopwatch: Stopwatch | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruning:
    """Prunes ``network``, in place and left in eval mode, until it meets ``target``.

    ``size``: (height, width) of the pictures that multiplications are counted for. ``steps``: the
    cost falls in so many equal steps, and importance is measured anew at each. After each,
    ``calibration``, batches (N, 3, H, W) of two normalised pictures or more, sets the statistics of
    the batch norms anew (``recalibrate``), and ``finetune`` trains the network.
    ``stopwatch``: needed for a target in milliseconds. ``progress``: called with (step, steps).

    RequestError when the target is not below what the network has, when no pruning meets it (it
    says how far pruning can go), and as ``find_couplings`` says. ``network`` is then unchanged.
    """
    rules = rules or Rules()
    if steps < 1:
        raise RequestError(f"pruning takes 1 step or more, and {steps} came")
    if target.kind == "milliseconds" and stopwatch is None:
        raise RequestError("a target in milliseconds is measured, and no stopwatch came")
    _check_batches(calibration)
    network.eval()
    positions = positions_of(network, size)
    before = structure_of(network)
    meter = _Meter(target, positions, stopwatch)
    began = meter.of_network(network)
    least = target.amount
    if target.kind != "milliseconds" and target.amount < 1:
        least *= began
    if least >= began:
        raise RequestError(
            f"the network has {target.text(began)}, and a target of {target.text(least)} came; "
            "take one below"
        )
    for step in range(1, steps + 1):
        goal = began + (least - began) * step / steps
        plan = _Plan.of(network, meter, importance, rules)
        if step == 1:
            _check_reachable(plan, meter, least)
        chunks = plan.chunks_for(goal, meter)
        remove_channels(network, plan.couplings, plan.removed(chunks))
        if calibration:
            recalibrate(network, calibration)
        if finetune is not None:
            finetune(network, step)
            network.eval()
        if progress is not None:
            progress(step, steps)
    return Pruning(size, before, structure_of(network), positions)


def _check_batches(inputs: Sequence[Tensor]) -> None:
    if any(len(x) < 2 for x in inputs):
        raise RequestError(
            "batch norms are calibrated with batches of 2 pictures or more, and 1 came; "
            "give more frames"
        )


@torch.no_grad()
def recalibrate(network: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Sets the means and variances of all batch norms to those of ``inputs``, in place.

    After pruning they are others, and this alone gives much of the accuracy back (Li et al.,
    "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", 2020, arXiv
    2007.02491). ``inputs``: batches (N, 3, H, W) of two pictures or more, since some of the norms
    see one value per picture; RequestError for less.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    _check_batches(inputs)
    if not inputs:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # None: the plain mean over all batches.
        norm.momentum = None
        norm.train()
    try:
        for x in inputs:
            outputs_of(network, x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


@dataclass(frozen=True)
class _Meter:
    """What a target is compared with, for networks that are there and for those that may be."""

    target: Target
    positions: Mapping[str, int]
    stopwatch: Stopwatch | None

    def of_structure(self, structure: Mapping[str, LayerShape]) -> float:
        """Parameters or, also where time counts, multiplications."""
        cost = total(structure, self.positions)
        return float(cost.parameters if self.target.kind == "parameters" else cost.macs)

    def of_network(self, network: Network) -> float:
        if self.target.kind == "milliseconds":
            assert self.stopwatch is not None
            return self.stopwatch(network)
        return self.of_structure(structure_of(network))


@dataclass(frozen=True)
class _Chunk:
    """Bundles of one coupling that go together, so that a width that is allowed is left."""

    coupling: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class _Plan:
    """The order in which a network's chunks go."""

    network: Network
    positions: Mapping[str, int]
    couplings: tuple[Coupling, ...]
    chunks: tuple[_Chunk, ...]

    @classmethod
    def of(cls, network: Network, meter: _Meter, importance: Importance, rules: Rules) -> _Plan:
        """What goes first is what costs most for what it gives.

        A chunk's rank is the share that it has in the importance of what is left of its coupling,
        over what its going saves; so the last channels of a layer are dear, whatever it costs. What
        saves nothing, such as channels inside training heads, stays.
        """
        couplings = find_couplings(network, protect=rules.protect).items
        ranked: list[tuple[float, _Chunk]] = []
        for index, scores in enumerate(importance(network, couplings)):
            saved = _saving(network, couplings[index], meter)
            if saved <= 0 or np.isnan(scores).any():
                continue
            left = float(scores.sum())
            rank = 0.0
            for rows in _cut(scores, rules):
                lost = float(scores[rows].sum())
                # Ranks ascend within a coupling, and equal ones stay in order: a chunk never goes
                # before another that makes room for it.
                rank = max(rank, lost / left / (saved * len(rows)) if left > 0 else 0.0)
                ranked.append((rank, _Chunk(index, rows)))
                left -= lost
        ranked.sort(key=lambda pair: pair[0])
        return cls(network, meter.positions, couplings, tuple(chunk for _, chunk in ranked))

    def removed(self, count: int) -> list[NDArray[np.int64]]:
        """Bundles of each coupling that the first ``count`` chunks hold."""
        found: list[list[NDArray[np.int64]]] = [[] for _ in self.couplings]
        for chunk in self.chunks[:count]:
            found[chunk.coupling].append(chunk.rows)
        return [np.concatenate([np.empty(0, np.int64), *rows]) for rows in found]

    def structure(self, count: int) -> dict[str, LayerShape]:
        """Every layer's channels without the first ``count`` chunks."""
        rows = [len(removed) for removed in self.removed(count)]
        return _without(structure_of(self.network), zip(self.couplings, rows, strict=True))

    def candidate(self, count: int) -> Network:
        """A copy of the network without the first ``count`` chunks."""
        made = copy.deepcopy(self.network)
        remove_channels(made, self.couplings, self.removed(count))
        return made

    def amount(self, count: int, meter: _Meter) -> float:
        """What is left without the first ``count`` chunks, in the target's unit."""
        if meter.target.kind == "milliseconds":
            return meter.of_network(self.candidate(count))
        return meter.of_structure(self.structure(count))

    def chunks_for(self, goal: float, meter: _Meter) -> int:
        """The least number of chunks whose going meets ``goal``; all, if that is what it takes."""
        counts: Sequence[int] = range(len(self.chunks) + 1)
        if meter.target.kind == "milliseconds":
            counts = self._stations()
        # Time is not quite monotone in the channels. What is taken was measured all the same, or
        # is all there is.
        return counts[
            min(
                bisect_left(counts, True, key=lambda count: self.amount(count, meter) <= goal),
                len(counts) - 1,
            )
        ]

    def _stations(self) -> list[int]:
        """Numbers of chunks from 0 to all, about equally far apart in multiplications."""
        positions = self.positions
        macs = [total(self.structure(n), positions).macs for n in range(len(self.chunks) + 1)]
        levels = np.linspace(macs[0], macs[-1], 2**_MEASURED)
        return sorted({bisect_left(macs, -level, key=lambda each: -each) for level in levels})


def _without(
    structure: Mapping[str, LayerShape], gone: Iterable[tuple[Coupling, int]]
) -> dict[str, LayerShape]:
    """``structure`` without so many bundles of each coupling."""
    missing: dict[Side, int] = {}
    for coupling, count in gone:
        for side, channels in coupling.members.items():
            missing[side] = missing.get(side, 0) + count * channels.shape[1]
    found = {}
    for name, shape in structure.items():
        inputs = shape.in_channels - missing.get((name, "in"), 0)
        found[name] = replace(
            shape,
            out_channels=shape.out_channels - missing.get((name, "out"), 0),
            in_channels=inputs,
            groups=shape.groups if shape.groups == 1 else inputs,
        )
    return found


def _saving(network: Network, coupling: Coupling, meter: _Meter) -> float:
    """What the going of one bundle saves."""
    before = structure_of(network)
    return meter.of_structure(before) - meter.of_structure(_without(before, [(coupling, 1)]))


def _cut(scores: NDArray[np.float64], rules: Rules) -> list[NDArray[np.int64]]:
    """The bundles in chunks, lowest score first, so that a width that is allowed is always left."""
    if np.isnan(scores).any():
        return []
    order = np.argsort(scores, kind="stable")
    widths = range(
        (len(order) - 1) // rules.multiple * rules.multiple, rules.minimum - 1, -rules.multiple
    )
    found = []
    gone = 0
    for width in widths:
        found.append(order[gone : len(order) - width])
        gone = len(order) - width
    return found


def _check_reachable(plan: _Plan, meter: _Meter, least: float) -> None:
    reached = plan.amount(len(plan.chunks), meter)
    if reached > least:
        text = meter.target.text
        raise RequestError(
            f"pruning can bring this network down to {text(reached)}, and {text(least)} "
            "came; take a larger target, protect fewer layers, or allow fewer channels"
        )
