"""What a task adds to training: its batches, its loss, its figure of merit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from edgeseg.export.models.network import Network
from edgeseg.spec import Preprocessing

__all__ = ["Batch", "Batches", "Score", "TrainingTask", "network_input"]

TruthT = TypeVar("TruthT")


@dataclass(frozen=True, eq=False)
class Batch(Generic[TruthT]):
    """Pictures and what is in them.

    ``images``: (N, H, W, 3) uint8, BGR; ``truth``: what the task's loss wants to know.
    """

    images: Tensor
    truth: TruthT


class Batches(ABC, Generic[TruthT]):
    """Where batches come from. It travels to the processes that prepare them."""

    @abstractmethod
    def drawn(self, rng: np.random.Generator) -> Batch[TruthT]:
        """The batch that ``rng`` draws, and nothing else decides."""


@dataclass(frozen=True)
class Score:
    """How good a network is on one data set: ``value``, 0 to 1 (more is better), and in words."""

    name: str
    value: float
    text: str


class TrainingTask(ABC, Generic[TruthT]):
    """A network that learns, and the data it learns from."""

    network: Network
    batches: Batches[TruthT]

    @property
    def companions(self) -> nn.Module | None:
        """What is learned with the network and is no part of it."""
        return None

    @abstractmethod
    def losses(self, found: Any, batch: Batch[TruthT], device: torch.device) -> dict[str, Tensor]:
        """Parts of the loss by name, which add up to it; ``found`` is what the network gave."""

    @abstractmethod
    def scores(self, network: Network, limit: int | None) -> list[Score]:
        """How good ``network`` is on each validation set, on ``limit`` pictures of it at most."""


def network_input(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, H, W, 3) uint8 BGR -> (N, 3, H, W) float32, normalised as the network expects."""
    x = images.permute(0, 3, 1, 2).float().div_(255)
    if preprocessing.order == "rgb":
        x = x.flip(1)
    mean = torch.tensor(preprocessing.mean, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=x.device).view(1, 3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)
