"""How much a network would miss each of its channels: four measures behind one protocol.

A measure scores the bundles of channels that ``find_couplings`` found. The lowest of a coupling go
first, and what is lost is the sum of their scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgeseg.export.couplings import Coupling, Side
from edgeseg.export.models.instance import InstanceNetwork
from edgeseg.export.models.network import Network
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.export.structure import Layer, Weighted, layers_of

__all__ = [
    "Activation",
    "BatchNormScale",
    "Importance",
    "Loss",
    "Taylor",
    "WeightNorm",
    "labelled_loss",
    "own_loss",
]

#: a network in eval mode -> a scalar with a gradient, on pictures of the loss's own
Loss = Callable[[Network], Tensor]


class Importance(Protocol):
    """A measure of how much a network would miss its channels."""

    @property
    def name(self) -> str:
        """What the command line calls it."""

    def __call__(
        self, network: Network, couplings: Sequence[Coupling]
    ) -> list[NDArray[np.float64]]:
        """(bundles,) scores of each coupling, 0 or more; they are compared within it.

        NaN where the measure says nothing; such bundles stay. ``network`` is in eval mode, and
        is not changed.
        """


class PerLayer(ABC):
    """A measure that gives each channel of a layer a number, and compares within the layer alone.

    The unit of such a number is the layer's own. So it is divided by the mean over the layer's
    channels that can go, and a bundle's score is the mean over all its channels in all layers.
    """

    @abstractmethod
    def channels(self, network: Network) -> Mapping[Side, Tensor]:
        """(channels,) of each side that the measure speaks about, 0 or more."""

    def __call__(
        self, network: Network, couplings: Sequence[Coupling]
    ) -> list[NDArray[np.float64]]:
        """See ``Importance``."""
        values = {
            side: tensor.double().cpu().numpy() for side, tensor in self.channels(network).items()
        }
        found = []
        for coupling in couplings:
            scores = []
            for side, rows in coupling.members.items():
                if side in values:
                    score = values[side][rows].sum(axis=1)
                    # In a layer whose channels are all 0 none is better than another.
                    scores.append(score / (score.mean() or 1.0))
            nothing = np.full(len(coupling), np.nan)
            found.append(np.mean(scores, axis=0) if scores else nothing)
        return found


class WeightNorm(PerLayer):
    """The L1 or L2 norm of all weights that make or read a channel.

    Li et al., "Pruning Filters for Efficient ConvNets" (2017, arXiv 1608.08710), for the filters
    of one layer; over all layers that are coupled as in Fang et al. 2023 (arXiv 2301.12900).
    """

    def __init__(self, order: int) -> None:
        self.name = f"l{order}"
        self._order = order

    def channels(self, network: Network) -> Mapping[Side, Tensor]:
        """See ``PerLayer``."""
        found: dict[Side, Tensor] = {}
        for name, layer in _weighted(network):
            weight = layer.weight.detach().double()
            found[name, "out"] = torch.linalg.vector_norm(weight.flatten(1), self._order, dim=1)
            if not _has_own_filters(layer):
                read = weight.transpose(0, 1).flatten(1)
                found[name, "in"] = torch.linalg.vector_norm(read, self._order, dim=1)
        return found


class BatchNormScale(PerLayer):
    """The size of the factor that a channel's batch norm gives it.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (2017, arXiv
    1708.06519). It says nothing where there is no batch norm, as in YOLACT's heads.
    """

    name = "bn"

    def channels(self, network: Network) -> Mapping[Side, Tensor]:
        """See ``PerLayer``."""
        return {
            (name, "out"): layer.weight.detach().abs()
            for name, layer in layers_of(network).items()
            if isinstance(layer, nn.BatchNorm2d) and layer.affine
        }


class Activation(PerLayer):
    """The mean size of a filter's answer: 1 / HW Σ |W_c · X|, over pictures and positions.

    W_c is the filter of channel c, X what it sees at a position; its bias does not count.
    ``inputs``: pictures (N, 3, H, W), normalised.
    """

    name = "activation"

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        self._inputs = inputs

    def channels(self, network: Network) -> Mapping[Side, Tensor]:
        """See ``PerLayer``."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def add(name: str, layer: Weighted, output: Tensor) -> None:
            answers = output.detach().transpose(0, 1).flatten(1)
            if layer.bias is not None:
                answers = answers - layer.bias.detach()[:, None]
            sums[name] = sums.get(name, 0) + answers.abs().sum(dim=1, dtype=torch.float64)
            counts[name] = counts.get(name, 0) + answers.shape[1]

        hooks = [
            layer.register_forward_hook(
                lambda layer, _, output, name=name: add(name, layer, output)
            )
            for name, layer in _weighted(network)
        ]
        try:
            with torch.no_grad():
                for x in self._inputs:
                    network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {(name, "out"): sums[name] / counts[name] for name in sums}


class Taylor:
    """How much a loss changes, to first order, when nobody reads a channel any more.

    The change is -Σ w · ∂L/∂w over the weights that read the channel, since what a layer gives is
    linear in them; a score is its mean square over ``losses``. As in Molchanov et al., "Importance
    Estimation for Neural Network Pruning" (2019, arXiv 1906.10771), whose gate behind a batch norm
    has the same derivative.
    """

    name = "taylor"

    def __init__(self, losses: Iterable[Loss]) -> None:
        self._losses = losses

    def __call__(
        self, network: Network, couplings: Sequence[Coupling]
    ) -> list[NDArray[np.float64]]:
        """See ``Importance``."""
        readers = [
            (name, layer.weight)
            for name, layer in _weighted(network)
            if not _has_own_filters(layer)
        ]
        required = [weight.requires_grad for _, weight in readers]
        squares = [np.zeros(len(coupling)) for coupling in couplings]
        count = 0
        try:
            for _, weight in readers:
                weight.requires_grad_(True)
            for loss in self._losses:
                with torch.enable_grad():
                    gradients = torch.autograd.grad(
                        loss(network), [weight for _, weight in readers], allow_unused=True
                    )
                changes: dict[Side, NDArray[np.float64]] = {}
                for (name, weight), gradient in zip(readers, gradients, strict=True):
                    # Training heads have no part in the loss.
                    if gradient is not None:
                        each = (weight.detach() * gradient).transpose(0, 1).flatten(1)
                        changes[name, "in"] = each.sum(dim=1, dtype=torch.float64).cpu().numpy()
                for square, coupling in zip(squares, couplings, strict=True):
                    change = np.zeros(len(coupling))
                    for side, rows in coupling.members.items():
                        if side in changes:
                            change += changes[side][rows].sum(axis=1)
                    square += change**2
                count += 1
        finally:
            for (_, weight), before in zip(readers, required, strict=True):
                weight.requires_grad_(before)
        return [square / max(count, 1) for square in squares]


def labelled_loss(x: Tensor, labels: Tensor, ignore: int) -> Loss:
    """Cross entropy of a semantic network: ``x`` (N, 3, H, W) normalised, ``labels`` (N, H, W)."""

    def loss(network: Network) -> Tensor:
        return functional.cross_entropy(network(x), labels.long(), ignore_index=ignore)

    return loss


def own_loss(x: Tensor, seed: int) -> Loss:
    """A loss without labels for ``x`` (N, 3, H, W): its squared derivative is the outputs' change.

    A semantic network is asked for the log-probability of classes that are drawn from what it says
    itself, so the expected square of a derivative is the Fisher information of the weight
    (Theis et al. 2018, arXiv 1801.05787). The raw outputs of an instance network, each divided by
    its deviation, are summed with random signs, and the expected square is that of their change.
    """

    def loss(network: Network) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(network, SemanticNetwork):
            logits = network.low_resolution_logits(x)
            flat = logits.permute(0, 2, 3, 1).flatten(0, 2)
            drawn = torch.multinomial(flat.detach().softmax(1).cpu(), 1, generator=generator)
            return functional.cross_entropy(flat, drawn[:, 0].to(flat.device))
        assert isinstance(network, InstanceNetwork)
        total = x.new_zeros(())
        for output in network.raw(x):
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1.0
            spread = output.detach().std().clamp(min=1e-6)
            total = total + (output * signs.to(output)).mean() / spread
        return total

    return loss


def _weighted(network: Network) -> list[tuple[str, Weighted]]:
    return [
        (name, layer)
        for name, layer in layers_of(network).items()
        if not isinstance(layer, nn.BatchNorm2d)
    ]


def _has_own_filters(layer: Layer) -> bool:
    """Whether the layer's input channels go with its outputs, so that it only hands them on."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1
