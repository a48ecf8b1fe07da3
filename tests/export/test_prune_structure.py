"""Which channels go together, what is left when they go, and checkpoints with fewer channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("torch_pruning", reason="pruning needs torch-pruning")

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgeseg.errors import RequestError, WeightsError
from edgeseg.export.couplings import Coupling, find_couplings, remove_channels
from edgeseg.export.models import DEFINITIONS, Network, SemanticNetwork, create
from edgeseg.export.models.layers import ConvBNReLU
from edgeseg.export.structure import (
    layers_of,
    outputs_of,
    positions_of,
    smallest_input,
    structure_of,
    total,
)
from edgeseg.export.weights import load_weights, read_weights, save_weights

Lively = Callable[[Network, int], Network]

PRUNABLE = [name for name, entry in DEFINITIONS.items() if entry.network.prunable]
#: small enough for every run of the tests
QUICK = ("bisenetv2", "fchardnet70", "yolact_resnet18", "yolact_mobilenetv2")
MODELS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRUNABLE
]


def made(name: str) -> Network:
    """The model with few classes and its training heads."""
    return create(name, 4, auxiliary_heads=True)


def some_rows(couplings: list[Coupling], seed: int) -> list[NDArray[np.int64]]:
    """A random choice of bundles of each coupling, never all of them."""
    random = np.random.default_rng(seed)
    return [
        random.permutation(len(each))[: random.integers(0, len(each))].astype(np.int64)
        for each in couplings
    ]


def silence(network: Network, couplings: list[Coupling], rows: list[NDArray[np.int64]]) -> None:
    """Makes every dense layer deaf to the bundles, and leaves all layers as wide as they are."""
    layers = layers_of(network)
    with torch.no_grad():
        for coupling, chosen in zip(couplings, rows, strict=True):
            for (name, side), channels in coupling.members.items():
                layer = layers[name]
                if side == "in" and not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
                    layer.weight[:, torch.from_numpy(channels[chosen].ravel())] = 0


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_network_is_the_original_deaf_to_what_is_gone(name: str, lively: Lively) -> None:
    network = lively(made(name), 3).double()
    couplings = list(find_couplings(network))
    rows = some_rows(couplings, 1)
    deaf = copy.deepcopy(network)
    silence(deaf, couplings, rows)
    remove_channels(network, couplings, rows)
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
    if min(x.shape[2:]) < network.smallest:
        x = torch.rand_like(smallest_input(network)).double()
    with torch.no_grad():
        wanted, found = outputs_of(deaf, x), outputs_of(network, x)
    assert sum(len(row) for row in rows) > 50
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_checkpoint_fills_a_new_network(name: str, lively: Lively, tmp_path: Path) -> None:
    network = lively(made(name), 3)
    couplings = list(find_couplings(network))
    remove_channels(network, couplings, some_rows(couplings, 2))
    save_weights(network, tmp_path / "pruned.pt")
    again = load_weights(made(name), tmp_path / "pruned.pt")
    assert structure_of(again) == structure_of(network)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    for layer in layers_of(again).values():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == layer.weight.shape[0]
    # Pruned once more, as an ordinary network.
    couplings = list(find_couplings(again))
    rows = some_rows(couplings, 3)
    before = structure_of(again)
    remove_channels(again, couplings, rows)
    assert structure_of(again) != before
    outputs_of(again, smallest_input(again))


@pytest.mark.parametrize("name", ["bisenetv1", "bisenetv2", "yolact_resnet18"])
def test_training_heads_that_a_pruned_checkpoint_lacks_read_what_there_is(name: str) -> None:
    network = create(name, 4)
    couplings = list(find_couplings(network))
    remove_channels(network, couplings, some_rows(couplings, 4))
    again = load_weights(made(name), network.state_dict())
    outputs = outputs_of(again, smallest_input(again))
    assert len(outputs) > len(outputs_of(network, smallest_input(network)))
    # And the other way round: heads in the checkpoint, and none in the network.
    both = load_weights(create(name, 4), again.state_dict())
    assert structure_of(both) == structure_of(network)


@pytest.mark.parametrize("name", MODELS)
def test_multiplications_are_those_that_pytorch_counts(name: str) -> None:
    network = create(name, 4)
    size = (max(64, network.smallest), max(96, network.smallest))
    couplings = list(find_couplings(network))
    for _ in range(2):
        cost = total(structure_of(network), positions_of(network, size))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, *size))
        assert 2 * cost.macs == counter.get_total_flops()
        weights = sum(
            p.numel()
            for layer in layers_of(network).values()
            if not isinstance(layer, nn.BatchNorm2d)
            for p in layer.parameters()
        )
        assert cost.parameters == weights
        remove_channels(network, couplings, some_rows(couplings, 5))


class Branches(SemanticNetwork):
    """A sum, a product, a concatenation, own filters, and a layer used twice."""

    stride = 4
    smallest = 4
    classifier = "classify.weight"

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3
        self.stem = ConvBNReLU(3, 4)
        self.one = nn.Conv2d(4, 6, 1)
        self.other = nn.Conv2d(4, 6, 1)
        self.wide = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.narrow = nn.Conv2d(12, 5, 1)
        self.shared = nn.Conv2d(5, 5, 3, padding=1)
        self.classify = nn.Conv2d(9, 3, 1)

    def low_resolution_logits(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        gated = self.one(stem) * torch.sigmoid(self.other(stem))
        narrow = self.narrow(self.wide(gated))
        out: Tensor = self.classify(torch.cat([self.shared(self.shared(narrow)), stem], dim=1))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.low_resolution_logits(x)


def test_couplings_are_those_that_the_arithmetic_asks_for() -> None:
    found = {each.name: each for each in find_couplings(Branches())}
    sides = {name: {side: rows.tolist() for side, rows in each.members.items()}
             for name, each in found.items()}  # fmt: skip
    one_each = [[0], [1], [2], [3], [4], [5]]
    assert sides == {
        "stem.conv": {
            ("stem.conv", "out"): one_each[:4],
            ("stem.bn", "out"): one_each[:4],
            ("one", "in"): one_each[:4],
            ("other", "in"): one_each[:4],
            ("classify", "in"): [[5], [6], [7], [8]],
        },
        "one": {
            ("one", "out"): one_each,
            ("other", "out"): one_each,
            ("wide", "out"): [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]],
            ("wide", "in"): one_each,
            ("narrow", "in"): [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]],
        },
        # What a layer gives it reads itself.
        "narrow": {
            ("narrow", "out"): one_each[:5],
            ("shared", "out"): one_each[:5],
            ("shared", "in"): one_each[:5],
            ("classify", "in"): one_each[:5],
        },
    }
    assert find_couplings(Branches()).fixed == ("classify",)


def test_protected_layers_keep_what_they_give() -> None:
    assert [each.name for each in find_couplings(Branches(), protect=["other"])] == [
        "stem.conv",
        "narrow",
    ]
    # A module's name is for all in it.
    assert [each.name for each in find_couplings(Branches(), protect=["stem"])] == ["one", "narrow"]
    with pytest.raises(RequestError, match=r"'sharde' came; close to it are shared$"):
        find_couplings(Branches(), protect=["sharde"])


def test_mask_rcnn_is_refused() -> None:
    network = create("maskrcnn_resnet50_fpn", 3)
    with pytest.raises(RequestError, match="MaskRCNNResNet50FPN is not pruned: EdgeSeg cannot"):
        find_couplings(network)


def shrunk(state: dict[str, Tensor], key: str, axis: int, width: int) -> dict[str, Tensor]:
    return {**state, key: state[key].narrow(axis, 0, width)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # One layer narrower, and nobody knows of it.
        (lambda s: shrunk(s, "stem.conv.weight", 0, 2), "its layers do not fit together"),
        (lambda s: {**s, "one.weight": torch.zeros(8, 4, 1, 1)}, "one has"),
        (lambda s: {**s, "one.weight": torch.zeros(6, 4, 3, 3)}, "one has"),
        # Half of a channel's own filters.
        (lambda s: shrunk(s, "wide.weight", 0, 11), "wide has"),
        (
            lambda s: {
                **s,
                "classify.weight": s["classify.weight"][:2],
                "classify.bias": s["classify.bias"][:2],
            },
            "its outputs are of other shapes",
        ),
    ],
)
def test_shapes_that_no_pruning_makes_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    network = Branches()
    before = structure_of(network)
    values = copy.deepcopy(network.state_dict())
    with pytest.raises(WeightsError, match=words):
        load_weights(network, change(dict(network.state_dict())))
    assert structure_of(network) == before
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, values[key], rtol=0, atol=0)


def test_a_pruned_checkpoint_is_a_plain_state_dict(tmp_path: Path) -> None:
    network = Branches()
    couplings = list(find_couplings(network))
    remove_channels(network, couplings, [np.array([0, 2]) for _ in couplings])
    save_weights(network, tmp_path / "new" / "pruned.pt")
    content = torch.load(tmp_path / "new" / "pruned.pt", weights_only=True)
    assert {key: value.shape for key, value in content.items()} == {
        key: value.shape for key, value in network.state_dict().items()
    }
    assert set(read_weights(content)) == set(content)
