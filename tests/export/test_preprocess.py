"""The reference path from a picture to a class map."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from numpy.typing import NDArray

from edgeseg.dataset import open_dataset
from edgeseg.export.models import create, create_semantic
from edgeseg.export.preprocess import class_map_of, evaluate_network, network_input
from edgeseg.spec import Preprocessing

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("flipped", [False, True])
def test_normalisation_is_that_of_float64(order: str, flipped: bool) -> None:
    pixels = picture(6, 10)
    if flipped:
        # A view with a negative stride, as flips and crops give it.
        pixels = pixels[:, ::-1]
    found = network_input(pixels, Preprocessing(MEAN, STD, order))  # type: ignore[arg-type]
    channels = pixels[..., ::-1] if order == "rgb" else pixels
    wanted = ((channels / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)
    assert found.shape == (1, 3, 6, 10)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(64, 96), (48, 80), (100, 131)])
def test_a_class_map_has_the_size_of_its_picture(size: tuple[int, int]) -> None:
    class_map = class_map_of(create("bisenetv2", 5), picture(*size), (64, 96))
    assert class_map.shape == size
    assert class_map.dtype == np.uint8
    assert class_map.max() < 5


def test_at_network_size_nothing_is_resized() -> None:
    torch.manual_seed(0)
    network = create("bisenetv2", 5)
    pixels = picture(64, 96)
    with torch.no_grad():
        logits = network(
            network_input(
                pixels, Preprocessing((0.3257, 0.3690, 0.3223), (0.2112, 0.2148, 0.2115), "rgb")
            )
        )
    found = class_map_of(network, pixels, (64, 96))
    np.testing.assert_array_equal(found, logits[0].argmax(0).numpy())


def test_evaluation_counts_every_labelled_pixel(camvid: str, tiny_definition: str) -> None:
    network = create_semantic(tiny_definition, 11)
    with torch.no_grad():
        # Class 0 everywhere.
        network.get_parameter("classify.weight").zero_()
        network.get_parameter("classify.bias").copy_(torch.eye(11)[0])
    network.train()
    dataset = open_dataset(camvid, "val")
    confusion = evaluate_network(network, dataset, (64, 96))
    truth = np.concatenate([sample.labels.ravel() for sample in dataset])
    wanted = np.bincount(truth[truth < 11], minlength=11)
    np.testing.assert_array_equal(confusion.counts[:, 0], wanted)
    assert confusion.counts[:, 1:].sum() == 0
    assert not network.training
    limited = evaluate_network(network, dataset, (64, 96), limit=2)
    per_frame = int((dataset.sample(0).labels != 11).sum())
    assert limited.counts.sum() == 2 * per_frame
