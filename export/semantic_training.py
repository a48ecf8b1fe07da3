"""Training towards a class per pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeseg.classes import ClassList
from edgeseg.dataset import Dataset, open_dataset
from edgeseg.errors import DataError
from edgeseg.export.augment import Augmentation
from edgeseg.export.losses import (
    bootstrapped_cross_entropy,
    boundary_weights,
    ohem_cross_entropy,
)
from edgeseg.export.models import create_semantic
from edgeseg.export.models.network import Network
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.export.preprocess import evaluate_network
from edgeseg.export.recipe import Recipe
from edgeseg.export.training_task import Batch, Batches, Score, TrainingTask

if TYPE_CHECKING:
    from edgeseg.export.distill import Teacher

__all__ = ["SemanticBatches", "SemanticTraining", "SemanticTruth"]

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "ohem": ohem_cross_entropy,
    "bootstrapped": bootstrapped_cross_entropy,
}


@dataclass(frozen=True, eq=False)
class SemanticTruth:
    """``labels`` (N, H, W) uint8, a class index per pixel; ``weights`` (N, H, W) float32 or None.

    The latter are how much each pixel counts.
    """

    labels: Tensor
    weights: Tensor | None


class SemanticBatches(Batches[SemanticTruth]):
    """Crops of the data sets of ``recipe``."""

    def __init__(self, recipe: Recipe, datasets: Sequence[Dataset]) -> None:
        self._recipe = recipe
        self._datasets = datasets
        full = Augmentation.of(recipe)
        self._augment = [full.weakened(source.augment) for source in recipe.sources]

    def drawn(self, rng: np.random.Generator) -> Batch[SemanticTruth]:
        """See ``Batches.drawn``."""
        images, labels = [], []
        for dataset, source, augment in zip(
            self._datasets, self._recipe.sources, self._augment, strict=True
        ):
            for _ in range(source.share):
                sample = dataset.sample(int(rng.integers(len(dataset))))
                pixels, truth = augment(sample.pixels, sample.labels, dataset.classes.ignore, rng)
                images.append(pixels)
                labels.append(truth)
        return Batch(torch.from_numpy(np.stack(images)), self._truth(labels))

    def _truth(self, labels: list[NDArray[np.uint8]]) -> SemanticTruth:
        weights = None
        strength, reach = self._recipe.boundary_weight, self._recipe.boundary_reach
        if strength:
            made = [boundary_weights(each, strength, reach) for each in labels]
            weights = torch.from_numpy(np.stack(made))
        return SemanticTruth(torch.from_numpy(np.stack(labels)), weights)


class SemanticTraining(TrainingTask[SemanticTruth]):
    """A semantic network.

    ``validate``: (URI, split) of the sets that ``scores`` looks at. ``teacher`` labels sources of
    frames that have no labels. Raises DataError when data sets disagree about their classes, or
    hold no labels, and RequestError for frames without labels and without a teacher.
    """

    network: SemanticNetwork

    def __init__(
        self,
        recipe: Recipe,
        validate: Sequence[tuple[str, str]],
        teacher: Teacher | None = None,
    ) -> None:
        self._recipe = recipe
        recipe.check_labels(teacher)
        opened = {
            source: open_dataset(source.uri, source.split)
            for source in recipe.sources
            if not source.unlabelled
        }
        self._checks = [open_dataset(uri, split) for uri, split in validate]
        labelled = [*opened.values(), *self._checks]
        if teacher is not None and not labelled:
            self._classes = teacher.classes
        else:
            self._classes = _common_classes(labelled)
        self.network = create_semantic(
            recipe.model, len(self._classes.names), auxiliary_heads=recipe.auxiliary_heads
        )
        datasets = [
            opened[source] if source in opened else self._frames(source.uri, teacher)
            for source in recipe.sources
        ]
        self._weights = _class_weights(
            datasets, recipe.class_weights, np.random.default_rng(recipe.seed)
        )
        self.batches = SemanticBatches(recipe, datasets)

    def losses(
        self,
        found: Tensor | tuple[Tensor, ...],
        batch: Batch[SemanticTruth],
        device: torch.device,
    ) -> dict[str, Tensor]:
        """See ``TrainingTask.losses``: "main", and one part for each head of training."""
        heads = found if isinstance(found, tuple) else (found,)
        truth = batch.truth
        labels = truth.labels.to(device).long()
        weights = None if truth.weights is None else truth.weights.to(device)
        names = ("main", *(f"head {index}" for index in range(1, len(heads))))
        return {
            name: _LOSSES[self._recipe.loss](
                head,
                labels,
                ignore=self._classes.ignore,
                class_weights=self._weights.to(device),
                pixel_weights=weights,
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
            found.append(
                Score(f"{dataset.title} mIoU", miou, f"{dataset.title}: mIoU {miou:.4f}  {named}")
            )
        return found

    def _frames(self, uri: str, teacher: Teacher | None) -> Dataset:
        settings = self._recipe.distillation
        assert teacher is not None
        assert settings is not None
        # Training alone does without the onnx package.
        from edgeseg.export.pseudo import PseudoLabelled

        return PseudoLabelled(
            uri,
            teacher,
            self._classes,
            size=teacher.size or self._size(),
            count=settings.frames,
            confidence=settings.confidence,
        )

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
