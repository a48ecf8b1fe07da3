"""The reference path from a picture to a class map, in PyTorch.

This is what the deployed graph must agree with: geometry outside, everything else as the model's
definition says. Training, ``verify`` and the tests use it.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeseg.export.models import definition_of
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.frame import Pixels
from edgeseg.spec import Preprocessing

__all__ = ["class_map_of", "network_input"]


def network_input(pixels: Pixels, preprocessing: Preprocessing) -> Tensor:
    """(H, W, 3) uint8 BGR -> (1, 3, H, W) float32, normalised as the network expects."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float().unsqueeze(0)
    if preprocessing.order == "rgb":
        x = x.flip(1)
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    return (x / 255 - mean) / std


def class_map_of(
    network: SemanticNetwork, pixels: Pixels, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Class map at the size of ``pixels``, computed at network ``size`` (height, width).

    ``network`` must be in eval mode. The picture is stretched with half-pixel centres; the class
    map comes back by nearest neighbour.
    """
    height, width = pixels.shape[:2]
    fitted = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    logits = network(network_input(fitted, definition_of(network).preprocessing))
    class_map = logits[0].argmax(dim=0).to(torch.uint8).numpy()
    return cv2.resize(  # type: ignore[return-value]
        class_map, (width, height), interpolation=cv2.INTER_NEAREST_EXACT
    )
