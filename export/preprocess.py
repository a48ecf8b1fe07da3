"""The reference path from a picture to a class map, in PyTorch.

This is what the deployed graph must agree with: geometry outside, everything else as the model's
definition says. Training, ``verify`` and the tests use it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeseg.dataset import Dataset
from edgeseg.export.models import SemanticNetwork, definition_of
from edgeseg.export.own import OwnNetwork
from edgeseg.export.views import ViewedNetwork
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.metrics import ConfusionMatrix
from edgeseg.spec import Fit, Preprocessing

__all__ = ["class_map_of", "evaluate_network", "network_input"]


def network_input(pixels: Pixels, preprocessing: Preprocessing) -> Tensor:
    """(H, W, 3) uint8 BGR -> (1, 3, H, W) float32, normalised as the network expects."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float().unsqueeze(0)
    if preprocessing.order == "rgb":
        x = x.flip(1)
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    return (x / 255 - mean) / std


@torch.inference_mode()
def class_map_of(
    network: SemanticNetwork, pixels: Pixels, size: tuple[int, int], *, fit: Fit = "stretch"
) -> NDArray[np.uint8]:
    """Class map at the size of ``pixels``, computed at network ``size`` (height, width).

    ``network`` must be in eval mode. The frame's way in and out is the device's own.
    """
    geometry = Geometry.fitting(pixels.shape[0], pixels.shape[1], *size, fit=fit)
    if isinstance(network, OwnNetwork | ViewedNetwork):
        preprocessing = network.preprocessing
    else:
        preprocessing = definition_of(network).preprocessing
    fitted = network_input(geometry.fit(pixels), preprocessing)
    return geometry.restore(network(fitted)[0].argmax(dim=0).to(torch.uint8).numpy())


def evaluate_network(
    network: SemanticNetwork,
    dataset: Dataset,
    size: tuple[int, int],
    *,
    fit: Fit = "stretch",
    limit: int | None = None,
) -> ConfusionMatrix:
    """Confusion of ``network``, put into eval mode, on ``dataset`` at network ``size``.

    ``limit``: that many pictures at most, spread evenly.
    """
    confusion = ConfusionMatrix(len(dataset.classes.names), dataset.classes.ignore)
    network.eval()
    total = len(dataset) if limit is None else min(limit, len(dataset))
    for done in range(total):
        sample = dataset.sample(done * len(dataset) // total)
        confusion.update(class_map_of(network, sample.pixels, size, fit=fit), sample.labels)
    return confusion
