"""Training towards a class per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from edgeseg.classes import ClassList
from edgeseg.dataset import Dataset, open_dataset
from edgeseg.errors import DataError
from edgeseg.export.augment import Augmentation
from edgeseg.export.losses import ohem_cross_entropy
from edgeseg.export.models import create_semantic
from edgeseg.export.models.network import Network
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.export.preprocess import evaluate_network
from edgeseg.export.recipe import Recipe
from edgeseg.export.training_task import Batch, Score, TrainingTask

__all__ = ["SemanticTraining"]


class SemanticTraining(TrainingTask[Tensor]):
    """A semantic network; the truth of a batch is (N, H, W) uint8, a class index per pixel.

    ``validate``: (URI, split) of the sets that ``scores`` looks at. Raises DataError when data sets
    disagree about their classes, or hold no labels.
    """

    network: SemanticNetwork

    def __init__(self, recipe: Recipe, validate: Sequence[tuple[str, str]]) -> None:
        self._recipe = recipe
        self._datasets = [open_dataset(source.uri, source.split) for source in recipe.sources]
        self._checks = [open_dataset(uri, split) for uri, split in validate]
        self._classes = _common_classes([*self._datasets, *self._checks])
        self.network = create_semantic(
            recipe.model, len(self._classes.names), auxiliary_heads=recipe.auxiliary_heads
        )
        self._weights = _class_weights(
            self._datasets, recipe.class_weights, np.random.default_rng(recipe.seed)
        )
        full = Augmentation.of(recipe)
        self._augment = [full.weakened(source.augment) for source in recipe.sources]

    def batch(self, rng: np.random.Generator) -> Batch[Tensor]:
        """See ``TrainingTask.batch``."""
        images, labels = [], []
        for dataset, source, augment in zip(
            self._datasets, self._recipe.sources, self._augment, strict=True
        ):
            for _ in range(source.share):
                sample = dataset.sample(int(rng.integers(len(dataset))))
                pixels, truth = augment(sample.pixels, sample.labels, dataset.classes.ignore, rng)
                images.append(pixels)
                labels.append(truth)
        return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)))

    def losses(
        self, found: Tensor | tuple[Tensor, ...], truth: Tensor, device: torch.device
    ) -> dict[str, Tensor]:
        """See ``TrainingTask.losses``: "main", and one part for each head of training."""
        heads = found if isinstance(found, tuple) else (found,)
        labels = truth.to(device).long()
        names = ("main", *(f"head {index}" for index in range(1, len(heads))))
        return {
            name: ohem_cross_entropy(
                head,
                labels,
                ignore=self._classes.ignore,
                class_weights=self._weights.to(device),
            )
            for name, head in zip(names, heads, strict=True)
        }

    def scores(self, network: Network, limit: int | None) -> list[Score]:
        """See ``TrainingTask.scores``: mIoU."""
        found = []
        for dataset in self._checks:
            confusion = evaluate_network(
                cast(SemanticNetwork, network), dataset, self._size(), limit=limit
            )
            iou = confusion.per_class_iou()
            named = " ".join(
                f"{name} {value:.3f}"
                for name, value in zip(dataset.classes.names, iou, strict=True)
            )
            miou = confusion.miou()
            found.append(Score(miou, f"{dataset.title}: mIoU {miou:.4f}  {named}"))
        return found

    def _size(self) -> tuple[int, int]:
        """Network size for validation: ``full_height`` high, 5 to 4 wide, both to the stride."""
        height, stride = self._recipe.full_height, self.network.stride
        return (
            max(round(height / stride), 1) * stride,
            max(round(height * 1.25 / stride), 1) * stride,
        )


def _common_classes(datasets: list[Dataset]) -> ClassList:
    classes = datasets[0].classes
    for dataset in datasets[1:]:
        if dataset.classes != classes:
            raise DataError(
                f"{datasets[0].title} has the classes {', '.join(classes.names)} and "
                f"{dataset.title} has {', '.join(dataset.classes.names)}; "
                "one model needs one list"
            )
    return classes


def _class_weights(datasets: list[Dataset], power: float, rng: np.random.Generator) -> Tensor:
    """(classes,) weights from the label frequencies of up to 100 samples of every data set."""
    classes = datasets[0].classes
    counts = np.zeros(len(classes.names), dtype=np.float64)
    for dataset in datasets:
        for index in rng.choice(len(dataset), size=min(100, len(dataset)), replace=False):
            labels = dataset.sample(int(index)).labels
            counts += np.bincount(labels.ravel(), minlength=256)[: len(counts)]
    if not counts.any():
        raise DataError(
            f"no pixel of {', '.join(data.title for data in datasets)} has a label to learn from"
        )
    share = np.maximum(counts / counts.sum(), 1e-4)
    weights = np.clip((share * len(counts)) ** -power, 0.5, 5.0)
    return torch.from_numpy(weights.astype(np.float32))
