"""FC-HarDNet-70 against a second telling of the paper, in functions and float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from torch import Tensor
from torch.nn import functional

from edgeseg.errors import RequestError
from edgeseg.export.models import SemanticNetwork, create, definition
from edgeseg.export.onnx import export_network
from edgeseg.export.preprocess import network_input
from edgeseg.export.weights import load_weights

if TYPE_CHECKING:
    from edgeseg.spec import ModelSpec
    from tests.export.conftest import Parity

#: layers of each block of the encoder, by the index of the block in ``base``
ENCODER = {4: 4, 7: 4, 10: 8, 13: 8, 16: 8}
#: layers of each block of the decoder
DECODER = (8, 8, 4, 4)


class Paper:
    """The network as section 3 of arXiv 1909.00948 describes it, on the arrays of a state_dict.

    Widths are read off the kernels, so only the wiring is told here.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def block(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        """Convolution, batch norm, ReLU."""
        kernel = self.state[f"{name}.conv.weight"]
        y = functional.conv2d(x, kernel, None, stride, padding=kernel.shape[-1] // 2)
        mean, var, weight, bias = (
            self.state[f"{name}.norm.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((y - mean) / (var + 1e-5).sqrt() * weight + bias).relu()

    def harmonic(self, x: Tensor, name: str, layers: int) -> Tensor:
        outputs = {0: x}
        for layer in range(1, layers + 1):
            # k - 1 first, then k - 2, k - 4 ... as long as the step divides k
            steps = [step for step in (1, 2, 4, 8) if layer % step == 0]
            joined = torch.cat([outputs[layer - step] for step in steps], dim=1)
            outputs[layer] = self.block(joined, f"{name}.layers.{layer - 1}")
        kept = [k for k in outputs if k % 2 or k == layers]
        return torch.cat([outputs[k] for k in kept if k], dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.block(x, "base.0", 2)
        x = self.block(x, "base.1")
        x = self.block(x, "base.2", 2)
        x = self.block(x, "base.3")
        skips = []
        for index, layers in ENCODER.items():
            x = self.harmonic(x, f"base.{index}", layers)
            skips.append(x)
            x = self.block(x, f"base.{index + 1}")
            if index != 16:
                x = functional.avg_pool2d(x, 2)
        skips.pop()
        for index, layers in enumerate(DECODER):
            skip = skips.pop()
            x = torch.cat([enlarged(x, skip.shape[-2:]), skip], dim=1)
            x = self.block(x, f"conv1x1_up.{index}")
            x = self.harmonic(x, f"denseBlocksUp.{index}", layers)
        x = functional.conv2d(x, self.state["finalConv.weight"], self.state["finalConv.bias"])
        return enlarged(x, size)


def enlarged(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear with corners aligned, one axis after the other, by matrices."""
    for axis, target in ((2, size[0]), (3, size[1])):
        source = x.shape[axis]
        position = torch.arange(target, dtype=torch.float64) * (
            (source - 1) / (target - 1) if target > 1 else 0.0
        )
        low = position.floor().long().clamp(max=max(source - 2, 0))
        far = (position - low).clamp(0, 1)
        weights = torch.zeros(target, source, dtype=torch.float64)
        weights[torch.arange(target), low] += 1 - far
        weights[torch.arange(target), (low + 1).clamp(max=source - 1)] += far
        x = torch.tensordot(x, weights, dims=([axis], [1])).movedim(-1, axis)
    return x


@pytest.fixture(scope="module")
def pack(parity: Callable[[str], Parity]) -> Parity:
    return parity("fchardnet70")


@pytest.fixture(scope="module")
def network(pack: Parity) -> SemanticNetwork:
    arrays = pack.arrays()
    return load_weights(
        create("fchardnet70", 19), {key: torch.from_numpy(a) for key, a in arrays.items()}
    )


def test_the_keys_are_those_of_the_reference(pack: Parity) -> None:
    network = create("fchardnet70", 19)
    found = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert found == pack.pack["keys"]
    assert list(found) == list(pack.pack["keys"])
    assert network.parameter_count() == pack.pack["n_parameters"]


@pytest.mark.parametrize("case", ["tensor", "odd"])
@torch.no_grad()
def test_the_logits_are_those_of_the_paper(
    pack: Parity, network: SemanticNetwork, case: str
) -> None:
    x = torch.from_numpy(pack.input(case))
    found = network(x)
    wanted = Paper(network.state_dict())(x.double())
    assert list(found.shape) == pack.pack["outputs"][f"{case}.logits"]["shape"]
    limit = pack.pack["outputs"][f"{case}.logits"]["max_abs"]
    assert float((found.double() - wanted).abs().max()) <= limit
    assert float(wanted.std()) > 1


@torch.no_grad()
def test_small_random_networks_follow_the_paper() -> None:
    torch.manual_seed(3)
    network = create("fchardnet70", 3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    x = torch.randn(2, 3, 64, 96)
    wanted = Paper(network.state_dict())(x.double())
    torch.testing.assert_close(
        network(x).double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
    )


def test_pictures_stay_bgr(pack: Parity) -> None:
    """The mean and deviation of the parity notes, in BGR order."""
    image = pack.input("image")
    found = network_input(image, definition("fchardnet70").preprocessing)
    mean = 255 * np.array([0.406, 0.456, 0.485])
    std = 255 * np.array([0.225, 0.224, 0.229])
    wanted = ((image.astype(np.float64) - mean) / std).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-4)


def test_an_export_that_is_too_small_is_refused(make_spec: Callable[..., ModelSpec]) -> None:
    spec = make_spec("fchardnet70", size=(32, 64))
    with pytest.raises(RequestError, match="sizes from 64x64 on, and 32x64 came"):
        export_network(create("fchardnet70", len(spec.classes)), spec)
