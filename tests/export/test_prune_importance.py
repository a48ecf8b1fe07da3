"""Each measure of importance against its formula, written as loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("torch_pruning", reason="pruning needs torch-pruning")

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeseg.export.couplings import Coupling, find_couplings
from edgeseg.export.importance import (
    Activation,
    BatchNormScale,
    Taylor,
    WeightNorm,
    labelled_loss,
    own_loss,
)
from edgeseg.export.models import Network, SemanticNetwork, create
from edgeseg.export.structure import layers_of

Lively = Callable[[Network, int], Network]


@pytest.fixture
def network(tiny_class: type[SemanticNetwork], lively: Lively) -> Network:
    return lively(tiny_class(3), 7)


@pytest.fixture
def couplings(network: Network) -> list[Coupling]:
    """first (8 filters), then second (12)."""
    return list(find_couplings(network))


def pictures(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 12, 8, generator=generator) for _ in range(count)]


def relative(values: list[float]) -> NDArray[np.float64]:
    return np.array(values) / (sum(values) / len(values))


@pytest.mark.parametrize("order", [1, 2])
def test_weight_norm(network: Network, couplings: list[Coupling], order: int) -> None:
    weights = {name: layer.weight.detach().double() for name, layer in layers_of(network).items()}

    def norm(values: Tensor) -> float:
        total = sum(abs(float(v)) ** order for v in values.flatten())
        return float(total ** (1 / order))

    found = WeightNorm(order)(network, couplings)
    for scores, own, reader in zip(
        found, ("first.conv", "second.conv"), ("second.conv", "classify"), strict=True
    ):
        makes = relative([norm(row) for row in weights[own]])
        reads = relative([norm(weights[reader][:, c]) for c in range(weights[reader].shape[1])])
        np.testing.assert_allclose(scores, (makes + reads) / 2, rtol=1e-9)


def test_batch_norm_scale(network: Network, couplings: list[Coupling]) -> None:
    state = network.state_dict()
    state["first.bn.weight"][3] *= -2
    found = BatchNormScale()(network, couplings)
    for scores, norm in zip(found, ("first.bn", "second.bn"), strict=True):
        wanted = relative([abs(float(v)) for v in state[f"{norm}.weight"]])
        np.testing.assert_allclose(scores, wanted, rtol=1e-6)


def test_layers_without_batch_norm_say_nothing() -> None:
    network = create("yolact_resnet18", 3)
    couplings = list(find_couplings(network))
    scores = dict(
        zip([c.name for c in couplings], BatchNormScale()(network, couplings), strict=True)
    )
    assert np.isnan(scores["proto_net.0"]).all()
    assert not np.isnan(scores["backbone.conv1"]).any()


def test_activation(network: Network, couplings: list[Coupling]) -> None:
    given = pictures()
    found = Activation(given)(network, couplings)
    conv = layers_of(network)["first.conv"]
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach().double().numpy()
    sums, count = np.zeros(8), 0
    for x in torch.cat(given).double().numpy():
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        for row in range(0, x.shape[1], 2):
            for column in range(0, x.shape[2], 2):
                seen = padded[:, row : row + 3, column : column + 3]
                for channel in range(8):
                    sums[channel] += abs((weight[channel] * seen).sum())
                count += 1
    np.testing.assert_allclose(found[0], relative(list(sums / count)), rtol=1e-5)


def test_activation_leaves_biases_out() -> None:
    class Biased(SemanticNetwork):
        stride = smallest = 4
        classifier = "last.weight"

        def __init__(self) -> None:
            super().__init__()
            self.num_classes = 2
            self.first = nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(4, 2, 1)

        def low_resolution_logits(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.first(x)))
            return out

        def forward(self, x: Tensor) -> Tensor:
            return self.low_resolution_logits(x)

    network = Biased().eval()
    couplings = list(find_couplings(network))
    before = Activation(pictures())(network, couplings)[0]
    with torch.no_grad():
        network.get_parameter("first.bias").add_(torch.tensor([5.0, -3.0, 0.0, 100.0]))
    np.testing.assert_allclose(Activation(pictures())(network, couplings)[0], before, rtol=1e-4)


def test_taylor_is_the_slope_of_the_loss_as_a_channel_fades(
    network: Network, couplings: list[Coupling]
) -> None:
    network = network.double()
    labels = torch.randint(0, 3, (2, 12, 8), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = 255
    losses = [labelled_loss(x.double(), labels, 255) for x in pictures()]
    found = Taylor(losses)(network, couplings)
    step = 1e-5
    for scores, reader in zip(found, ("second.conv", "classify"), strict=True):
        weight = layers_of(network)[reader].weight
        for channel, score in enumerate(scores):
            slopes = []
            for loss in losses:
                values = []
                for factor in (1 - step, 1 + step):
                    kept = weight.detach().clone()
                    with torch.no_grad():
                        weight[:, channel] *= factor
                        values.append(float(loss(network)))
                        weight.copy_(kept)
                slopes.append((values[1] - values[0]) / (2 * step))
            wanted = sum(slope**2 for slope in slopes) / len(slopes)
            assert score == pytest.approx(wanted, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", ["bisenetv2", "yolact_mobilenetv2"])
def test_a_loss_without_labels_has_a_slope_everywhere(name: str, lively: Lively) -> None:
    network = lively(create(name, 3), 5)
    couplings = list(find_couplings(network))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    flags = [parameter.requires_grad_(False) for parameter in network.parameters()]
    found = Taylor([own_loss(x, seed) for seed in range(2)])(network, couplings)
    again = Taylor([own_loss(x, seed) for seed in range(2)])(network, couplings)
    for scores, same in zip(found, again, strict=True):
        assert np.isfinite(scores).all()
        assert scores.max() > 0
        np.testing.assert_allclose(scores, same, rtol=1e-3)
    # Nothing is left behind in the network.
    assert not any(flag.requires_grad or flag.grad is not None for flag in flags)
