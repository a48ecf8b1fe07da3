"""Creating networks, and what all of them promise."""

from __future__ import annotations

import hashlib

import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from torch.nn import functional

from edgeseg.errors import RequestError
from edgeseg.export.models import (
    DEFINITIONS,
    SemanticNetwork,
    definition,
    definition_of,
)
from edgeseg.export.models import create as create_any

NAMES = tuple(name for name, entry in DEFINITIONS.items() if entry.task == "semantic")

# Of the reference implementation, with 19 classes: (model, training heads) -> number of entries,
# trainable scalars, and the sha256 over the sorted lines "key [shape]".
PUBLISHED = {
    ("bisenetv1", False): (
        206,
        13_275_539,
        "aefb9e8c244d788f2b25d3477999c4536572c7a16c9c6770981e24ddc3e0ddf1",
    ),
    ("bisenetv1", True): (
        222,
        13_425_721,
        "2f70be94fc423f1079326fb44fa7b0295f5ae9bef83f1f12fe5a9acd714a4e21",
    ),
    ("fchardnet70", False): (
        416,
        4_119_257,
        "67362b2aed6dbf4d0f2f36d30591fab55179efffd3dfe456d2a05e83eb1bd97e",
    ),
    ("bisenetv2", False): (
        327,
        3_358_627,
        "a7881002360c1cd5bbd444d3f13223d0d7897467dbf5ef328ffe0dada6932678",
    ),
    ("bisenetv2", True): (
        383,
        5_231_487,
        "0a8f2a1b6edfbc205506a4fb1b56fccda929c5dea9c5299a5ce4c1370f22eb31",
    ),
}


def create(name: str, num_classes: int, *, auxiliary_heads: bool = False) -> SemanticNetwork:
    network = create_any(name, num_classes, auxiliary_heads=auxiliary_heads)
    assert isinstance(network, SemanticNetwork)
    return network


@pytest.mark.parametrize(("name", "heads"), PUBLISHED)
def test_the_state_dict_is_that_of_published_checkpoints(name: str, heads: bool) -> None:
    network = create(name, 19, auxiliary_heads=heads)
    lines = sorted(f"{key} {list(value.shape)}" for key, value in network.state_dict().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), network.parameter_count(), digest) == PUBLISHED[name, heads]


@pytest.mark.parametrize(
    ("name", "num_classes", "words"),
    [
        ("bisenetv3", 19, "bisenetv1, bisenetv2, fchardnet70.*'bisenetv3'"),
        ("", 19, "bisenetv1, bisenetv2"),
        ("BiSeNetV2", 19, "bisenetv1, bisenetv2"),
        ("bisenetv2", 0, "1 to 255 classes, and 0 came"),
        ("bisenetv1", 256, "1 to 255 classes, and 256 came"),
        ("bisenetv2", -1, "1 to 255 classes, and -1 came"),
    ],
)
def test_what_cannot_be_created(name: str, num_classes: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        create(name, num_classes)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_network_is_ready_to_be_run(name: str) -> None:
    network = create(name, 3, auxiliary_heads=True)
    assert not any(module.training for module in network.modules())
    assert network.num_classes == 3
    assert definition_of(network) is definition(name)
    side = max(network.smallest, network.stride)
    logits = network(torch.zeros(1, 3, side, side))
    assert logits.shape == (1, 3, side, side)
    assert logits.dtype == torch.float32


def test_a_foreign_network_has_no_definition(tiny_class: type[SemanticNetwork]) -> None:
    with pytest.raises(RequestError, match="a Tiny came"):
        definition_of(tiny_class(3))


def test_a_network_without_training_heads_gives_one_map() -> None:
    network = create("fchardnet70", 4, auxiliary_heads=True).train()
    assert network(torch.rand(2, 3, 64, 96)).shape == (2, 4, 64, 96)


@pytest.mark.parametrize(("name", "outputs"), [("bisenetv1", 3), ("bisenetv2", 5)])
def test_training_gives_one_map_of_logits_per_head(name: str, outputs: int) -> None:
    network = create(name, 4, auxiliary_heads=True).train()
    logits = network(torch.rand(2, 3, 64, 96))
    assert isinstance(logits, tuple)
    assert [tuple(head.shape) for head in logits] == [(2, 4, 64, 96)] * outputs
    without = create(name, 4).train()(torch.rand(2, 3, 64, 96))
    assert isinstance(without, torch.Tensor)
    assert without.shape == (2, 4, 64, 96)


@pytest.mark.parametrize("name", NAMES)
def test_training_heads_change_nothing_in_eval_mode(name: str) -> None:
    with_heads = create(name, 4, auxiliary_heads=True)
    without = create(name, 4)
    state = with_heads.state_dict()
    without.load_state_dict({key: state[key] for key in without.state_dict()})
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(with_heads(x), without(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 32), (160, 64)])
@torch.no_grad()
def test_any_multiple_of_32_goes_and_low_resolution_is_the_same_before_upsampling(
    name: str, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    network = create(name, 5)
    if min(size) < network.smallest:
        size = (size[0] + 64, size[1] + 64)
    x = torch.randn(1, 3, *size)
    low = network.low_resolution_logits(x)
    factor = 4 if name == "fchardnet70" else 8
    assert low.shape == (1, 5, size[0] // factor, size[1] // factor)
    full = network(x)
    assert full.shape == (1, 5, *size)
    again = functional.interpolate(
        low, size=size, mode="bilinear", align_corners=network.align_corners
    )
    torch.testing.assert_close(full, again, rtol=1e-5, atol=1e-5 * float(full.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_every_named_key_is_there(name: str) -> None:
    network = create(name, 7, auxiliary_heads=True)
    state = network.state_dict()
    assert state[network.classifier].shape[0] == 7
    assert all(state[key].shape[1] == 3 for key in network.image_convolutions)
    # No other convolution reads the image.
    readers = [key for key, value in state.items() if value.ndim == 4 and value.shape[1] == 3]
    assert sorted(readers) == sorted(network.image_convolutions)
    heads = {key.split(".")[0] + "." for key in state} - {
        key.split(".")[0] + "." for key in create(name, 7).state_dict()
    }
    assert heads == set(network.auxiliary_prefixes)
