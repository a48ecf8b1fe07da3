"""BiSeNetV2 against the outputs of the reference implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from torch.nn import functional

from edgeseg.export.models import SemanticNetwork, create, definition
from edgeseg.export.preprocess import network_input
from edgeseg.export.weights import load_weights

if TYPE_CHECKING:
    from tests.export.conftest import Parity

#: output of the pack -> module whose output it is
MODULES = {
    "tensor.detail": "detail",
    "tensor.semantic_s2": "segment.S1S2",
    "tensor.semantic_s3": "segment.S3",
    "tensor.semantic_s4": "segment.S4",
    "tensor.semantic_s5": "segment.S5_4",
    "tensor.semantic_context": "segment.S5_5",
    "tensor.fused": "bga",
    "tensor.logits": "head",
    "tensor.aux0": "aux2",
    "tensor.aux1": "aux3",
    "tensor.aux2": "aux4",
    "tensor.aux3": "aux5_4",
}


@pytest.fixture(scope="module")
def pack(parity: Callable[[str], Parity]) -> Parity:
    return parity("bisenetv2")


@pytest.fixture(scope="module")
def network(pack: Parity) -> SemanticNetwork:
    arrays = pack.arrays(training=True)
    network = create("bisenetv2", 19, auxiliary_heads=True)
    return load_weights(network, {key: torch.from_numpy(a) for key, a in arrays.items()})


def test_the_keys_are_those_of_the_reference(pack: Parity) -> None:
    for heads in (False, True):
        wanted = pack.pack["keys"] | (pack.pack["train_only_keys"] if heads else {})
        state = create("bisenetv2", 19, auxiliary_heads=heads).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == wanted
    assert create("bisenetv2", 19).parameter_count() == pack.pack["n_parameters"]


@pytest.fixture(scope="module")
def features(pack: Parity, network: SemanticNetwork) -> dict[str, np.ndarray]:
    """Output of every module of ``MODULES`` for the case ``tensor``."""
    found: dict[str, np.ndarray] = {}
    hooks = []
    for output, name in MODULES.items():

        def keep(_: object, __: object, value: torch.Tensor, output: str = output) -> None:
            found[output] = value.detach().numpy()

        hooks.append(network.get_submodule(name).register_forward_hook(keep))
    # The training heads run, while every batch norm uses its running statistics.
    network.training = True
    with torch.no_grad():
        outputs = network(torch.from_numpy(pack.input("tensor")))
    network.eval()
    for hook in hooks:
        hook.remove()
    for output, value in zip(("tensor.logits", *sorted(found)[:4]), outputs, strict=True):
        np.testing.assert_array_equal(found[output], value.numpy())
    return found


@pytest.mark.parametrize("output", MODULES)
def test_features_are_the_references(
    pack: Parity, features: dict[str, np.ndarray], output: str
) -> None:
    pack.check(output, features[output])


@torch.no_grad()
def test_logits_in_eval_mode_are_the_references(pack: Parity) -> None:
    # A checkpoint with training heads, loaded into a network without.
    arrays = {key: torch.from_numpy(a) for key, a in pack.arrays(training=True).items()}
    network = load_weights(create("bisenetv2", 19), arrays)
    pack.check("tensor.logits", network(torch.from_numpy(pack.input("tensor"))).numpy())


@torch.no_grad()
def test_an_image_goes_through_the_references_preprocessing(
    pack: Parity, network: SemanticNetwork
) -> None:
    image = pack.input("image").astype(np.uint8)
    normalised = network_input(image, definition("bisenetv2").preprocessing)
    pack.check("image.normalised", normalised.numpy())
    size = [-(-side // 32) * 32 for side in image.shape[:2]]
    fitted = functional.interpolate(normalised, size=size, mode="bilinear", align_corners=False)
    logits = functional.interpolate(
        network(fitted), size=image.shape[:2], mode="bilinear", align_corners=False
    )
    pack.check("image.logits", logits.numpy())
    pack.check("image.labels", logits.argmax(dim=1).to(torch.uint8).numpy())
