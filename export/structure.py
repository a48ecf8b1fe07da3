"""The widths of a network's layers: what they cost, how they shrink, and how a checkpoint has them.

The shapes in a state_dict say all about a pruned network: the convolutions of EdgeSeg's networks
are dense, or give each input channel filters of its own, and pruning changes neither that nor how
many filters those are. So a pruned checkpoint is a plain state_dict, and ``fit_structure`` shrinks
a new network to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeseg.export.models.network import Network

__all__ = [
    "Cost",
    "Layer",
    "LayerShape",
    "Weighted",
    "fit_structure",
    "is_resizable",
    "layers_of",
    "macs_of",
    "outputs_of",
    "positions_of",
    "shape_of",
    "smallest_input",
    "structure_of",
    "take_channels",
    "total",
]

#: layers that compute channels from channels
Weighted = nn.Conv2d | nn.Linear
#: layers whose sizes follow from the number of channels
Layer = nn.Conv2d | nn.Linear | nn.BatchNorm2d


@dataclass(frozen=True)
class LayerShape:
    """Channels of one layer. ``kernel``: weights of one filter per channel that it reads."""

    out_channels: int
    in_channels: int
    groups: int = 1
    kernel: int = 1
    has_bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights and biases."""
        filters = self.out_channels * (self.in_channels // self.groups) * self.kernel
        return filters + self.out_channels * self.has_bias


@dataclass(frozen=True)
class Cost:
    """``macs``: multiplications for one picture; ``parameters``: weights and biases."""

    macs: int
    parameters: int


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """Name -> layer, in the order of the state_dict."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Layer)}


def shape_of(layer: Layer) -> LayerShape:
    """The channels of ``layer`` as they are."""
    if isinstance(layer, nn.BatchNorm2d):
        return LayerShape(layer.num_features, layer.num_features, layer.num_features, 0, False)
    if isinstance(layer, nn.Linear):
        return LayerShape(layer.out_features, layer.in_features, has_bias=layer.bias is not None)
    return LayerShape(
        layer.out_channels,
        layer.in_channels,
        layer.groups,
        layer.kernel_size[0] * layer.kernel_size[1],
        layer.bias is not None,
    )


def structure_of(network: nn.Module) -> dict[str, LayerShape]:
    """Name -> channels of every convolution and linear layer, in the order of the state_dict."""
    return {
        name: shape_of(layer)
        for name, layer in layers_of(network).items()
        if not isinstance(layer, nn.BatchNorm2d)
    }


def is_resizable(layer: Layer) -> bool:
    """Whether the layer is dense, or gives each input channel filters of its own."""
    return not isinstance(layer, nn.Conv2d) or layer.groups in (1, layer.in_channels)


@contextmanager
def _heads_on(network: nn.Module) -> Iterator[None]:
    """Makes ``network`` give the outputs of its training heads, and changes no layer's mode."""
    before = network.training
    # Networks look at their own flag; batch norms and dropout look at theirs.
    network.training = True
    try:
        yield
    finally:
        network.training = before


def outputs_of(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Every tensor that ``network`` gives for ``x``, those of its training heads included."""
    with _heads_on(network):
        return list(_tensors(network(x)))


def _tensors(found: object) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from _tensors(value)
    elif isinstance(found, Sequence):
        for value in found:
            yield from _tensors(value)


def smallest_input(network: Network) -> Tensor:
    """Zeros (1, 3, side, side) of the least size that ``network`` takes, 64 at least."""
    # From 64 on, no stage of any network is without cells.
    side = max(network.smallest, network.stride, 64)
    return next(network.parameters()).new_zeros(1, 3, side, side)


def positions_of(network: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Name -> how often a picture of ``size`` makes the layer compute all of its channels.

    Of a convolution that several levels share, the positions of all. Layers that only training
    uses do not occur. Nothing is computed: the shapes alone go through the network.
    """
    shadow = copy.deepcopy(network).to("meta").eval()
    found: dict[str, int] = {}

    def count(name: str, output: Tensor) -> None:
        found[name] = found.get(name, 0) + output.numel() // output.shape[1]

    for name, layer in layers_of(shadow).items():
        if not isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, __, output, name=name: count(name, output))
    with torch.no_grad():
        shadow(next(shadow.parameters()).new_zeros(1, 3, *size))
    return found


def total(structure: Mapping[str, LayerShape], positions: Mapping[str, int]) -> Cost:
    """The cost of a network of that structure at inference; training heads do not count."""
    return Cost(
        sum(macs_of(structure[name], count) for name, count in positions.items()),
        sum(structure[name].weights for name in positions),
    )


def macs_of(shape: LayerShape, positions: int) -> int:
    """Multiplications of one layer for one picture."""
    return positions * shape.out_channels * (shape.in_channels // shape.groups) * shape.kernel


def take_channels(
    layer: Layer, *, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> None:
    """Keeps some channels of ``layer``, in place.

    ``outputs`` and ``inputs``: (kept,) int64 in ascending order; None keeps all. Of a layer whose
    input channels have filters of their own, whole sets of those are kept, and ``inputs`` follow.
    """
    if isinstance(layer, nn.BatchNorm2d):
        if outputs is not None:
            for name in ("weight", "bias", "running_mean", "running_var"):
                _take(layer, name, 0, outputs)
            layer.num_features = len(outputs)
        return
    own_filters = isinstance(layer, nn.Conv2d) and layer.groups > 1
    if outputs is not None:
        per_input = shape_of(layer).out_channels // shape_of(layer).groups
        _take(layer, "weight", 0, outputs)
        _take(layer, "bias", 0, outputs)
        if isinstance(layer, nn.Linear):
            layer.out_features = len(outputs)
        else:
            layer.out_channels = len(outputs)
            if own_filters:
                layer.groups = layer.in_channels = len(outputs) // per_input
    if inputs is not None and not own_filters:
        _take(layer, "weight", 1, inputs)
        if isinstance(layer, nn.Linear):
            layer.in_features = len(inputs)
        else:
            layer.in_channels = len(inputs)


def _take(layer: Layer, name: str, axis: int, kept: Tensor) -> None:
    before = getattr(layer, name)
    if before is None:
        return
    after = before.detach().index_select(axis, kept.to(before.device))
    if isinstance(before, nn.Parameter):
        after = nn.Parameter(after, requires_grad=before.requires_grad)
    setattr(layer, name, after)


def fit_structure(network: Network, state: Mapping[str, Tensor]) -> str | None:
    """Shrinks ``network`` in place to the widths that ``state``, its state_dict, has.

    Layers that ``state`` lacks, such as training heads, take what the others give; their weights
    begin anew. Returns None when that is done or was not needed. Otherwise says in some words why
    the shapes are none of a pruned ``network``, which is then unchanged: a layer would grow, the
    layers do not fit together, or the outputs have other shapes.
    """
    layers = layers_of(network)
    wanted: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        weight = state.get(f"{name}.weight")
        if weight is None or layer.weight is None or weight.shape == layer.weight.shape:
            continue
        widths = _widths(layer, weight)
        if widths is None:
            shapes = f"{tuple(weight.shape)} for {tuple(layer.weight.shape)}"
            return f"{name} has {shapes}, which no pruning makes"
        wanted[name] = widths
    if not wanted:
        return None
    if not network.prunable:
        return f"a {type(network).__name__} cannot be pruned"
    shadow = copy.deepcopy(network).to("meta").eval()
    x = smallest_input(shadow)
    with torch.no_grad():
        before = [output.shape for output in outputs_of(shadow, x)]
        shadow_layers = layers_of(shadow)
        for name, (out_channels, in_channels) in wanted.items():
            _resize(shadow_layers[name], out_channels, in_channels)
        followers = {
            name: layer
            for name, layer in shadow_layers.items()
            if f"{name}.weight" not in state and is_resizable(layer)
        }
        hooks = [
            layer.register_forward_pre_hook(lambda layer, given: _follow(layer, given[0]))
            for layer in followers.values()
        ]
        try:
            after = [output.shape for output in outputs_of(shadow, x)]
        except RuntimeError as error:
            return f"its layers do not fit together ({str(error).splitlines()[0]})"
        finally:
            for hook in hooks:
                hook.remove()
    if before != after:
        return "its outputs are of other shapes"
    for name in followers:
        shape = shape_of(shadow_layers[name])
        if shape != shape_of(layers[name]):
            wanted[name] = (shape.out_channels, shape.in_channels)
    for name, (out_channels, in_channels) in wanted.items():
        _resize(layers[name], out_channels, in_channels)
    return None


def _widths(layer: Layer, weight: Tensor) -> tuple[int, int] | None:
    """(out, in) channels of ``layer`` if it had ``weight``; None if it never can."""
    shape = shape_of(layer)
    own = layer.weight
    if not is_resizable(layer) or weight.ndim != own.ndim or weight.shape[2:] != own.shape[2:]:
        return None
    out_channels = weight.shape[0]
    if shape.groups > 1:
        per_input = shape.out_channels // shape.groups
        if weight.shape[1:] != own.shape[1:] or out_channels % per_input:
            return None
        in_channels = out_channels // per_input
    else:
        in_channels = weight.shape[1]
    fits = 1 <= out_channels <= shape.out_channels and 1 <= in_channels <= shape.in_channels
    return (out_channels, in_channels) if fits else None


def _resize(layer: Layer, out_channels: int, in_channels: int) -> None:
    """Keeps the first channels of ``layer``: a place for others' weights, or a beginning."""
    device = layer.weight.device
    take_channels(
        layer,
        outputs=torch.arange(out_channels, device=device),
        inputs=torch.arange(in_channels, device=device),
    )


def _follow(layer: nn.Module, given: Tensor) -> None:
    """Makes a layer that nobody has widths for read what comes."""
    assert isinstance(layer, Layer)
    shape = shape_of(layer)
    channels = given.shape[-1] if isinstance(layer, nn.Linear) else given.shape[1]
    if channels < shape.in_channels:
        if shape.groups > 1:
            _resize(layer, shape.out_channels // shape.groups * channels, channels)
        else:
            _resize(layer, shape.out_channels, channels)
