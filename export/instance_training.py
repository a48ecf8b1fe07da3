"""Training towards objects: a box, a class and a mask for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from edgeseg.annotation import Annotation
from edgeseg.classes import class_list
from edgeseg.errors import DataError, RequestError
from edgeseg.evaluate import evaluate_instances
from edgeseg.export.augment import Augmentation, Placement
from edgeseg.export.models import create, definition
from edgeseg.export.models.network import Network
from edgeseg.export.models.yolact import Yolact
from edgeseg.export.models.yolactplus import YolactPlus
from edgeseg.export.multibox import Objects, multibox_losses
from edgeseg.export.recipe import Recipe
from edgeseg.export.torchengine import TorchEngine
from edgeseg.export.training_task import Batch, Batches, Score, TrainingTask
from edgeseg.frame import Pixels
from edgeseg.instance_dataset import InstanceDataset, InstanceSample, open_instances
from edgeseg.spec import ModelSpec

if TYPE_CHECKING:
    from edgeseg.export.distill import Teacher

__all__ = ["InstanceBatches", "InstanceTraining"]

Truth = tuple[Objects, ...]

#: pixels of an object in the crop from which on it is learned
_LEAST = 64
#: what kept samples may take together
_KEPT_BYTES = 3 << 30


class InstanceBatches(Batches[Truth]):
    """Crops of the data sets of ``recipe``; ``grid`` is (height, width) of the masks."""

    def __init__(
        self, recipe: Recipe, datasets: Sequence[InstanceDataset], grid: tuple[int, int]
    ) -> None:
        self._recipe = recipe
        self._datasets = [_Kept(dataset) for dataset in datasets]
        self._grid = grid
        full = Augmentation.of(recipe)
        self._augment = [full.weakened(source.augment) for source in recipe.sources]

    def drawn(self, rng: np.random.Generator) -> Batch[Truth]:
        """See ``Batches.drawn``."""
        images, truth = [], []
        for dataset, source, augment in zip(
            self._datasets, self._recipe.sources, self._augment, strict=True
        ):
            for _ in range(source.share):
                sample = dataset.sample(int(rng.integers(len(dataset))))
                height, width = sample.pixels.shape[:2]
                placement = augment.drawn(height, width, rng)
                images.append(augment.recoloured(placement.picture(sample.pixels), rng))
                truth.append(_objects(sample, placement, self._grid))
        return Batch(torch.from_numpy(np.stack(images)), tuple(truth))


class InstanceTraining(TrainingTask[Truth]):
    """A YOLACT; the truth of a batch is the objects of each picture.

    ``validate``: (URI, split) of the sets that ``scores`` looks at. ``teacher`` labels sources of
    frames that have no labels. Raises RequestError for a network of another kind and for frames
    without labels and without a teacher, and DataError when data sets disagree about their classes.
    """

    network: Yolact

    def __init__(
        self,
        recipe: Recipe,
        validate: Sequence[tuple[str, str]],
        teacher: Teacher | None = None,
    ) -> None:
        self._recipe = recipe
        recipe.check_labels(teacher)
        kind = definition(recipe.model).network
        # The part of YOLACT++ that judges masks learns from masks that were found, after the rest.
        if not issubclass(kind, Yolact) or issubclass(kind, YolactPlus):
            raise RequestError(
                f"EdgeSeg trains YOLACT and semantic networks, and {recipe.model} is neither; "
                "train it where it comes from and export its checkpoint"
            )
        datasets = [
            _frames(source.uri, recipe, teacher)
            if source.unlabelled
            else open_instances(source.uri, source.split)
            for source in recipe.sources
        ]
        self._checks = [open_instances(uri, split) for uri, split in validate]
        self.classes = _common_classes([*datasets, *self._checks])
        network = create(
            recipe.model, len(self.classes) + 1, auxiliary_heads=recipe.auxiliary_heads
        )
        assert isinstance(network, Yolact)
        self.network = network
        self.batches = InstanceBatches(recipe, datasets, network.mask_size(*recipe.crop))

    def losses(self, found: object, batch: Batch[Truth], device: torch.device) -> dict[str, Tensor]:
        """See ``TrainingTask.losses``: the parts of ``multibox_losses``."""
        return multibox_losses(found, [objects.to(device) for objects in batch.truth])  # type: ignore[arg-type]

    def scores(self, network: Network, limit: int | None) -> list[Score]:
        """See ``TrainingTask.scores``: mask AP, or box AP where the data have no masks."""
        assert isinstance(network, Yolact)
        network.eval()
        found = []
        for dataset in self._checks:
            engine = TorchEngine(network, self._spec(dataset))
            result = evaluate_instances(engine, dataset, limit=limit)
            best = result.box if result.mask is None else result.mask
            named = " ".join(
                f"{name} {'-' if value is None else format(value, '.3f')}"
                for name, value in best.to_classes().items()
            )
            masks = "" if result.mask is None else f"  mask AP {result.mask.ap:.4f}"
            kind = "box" if result.mask is None else "mask"
            text = f"{dataset.title}: box AP {result.box.ap:.4f}{masks}  {named}"
            found.append(Score(f"{dataset.title} {kind} AP", best.ap, text))
        return found

    def _spec(self, dataset: InstanceDataset) -> ModelSpec:
        """Pictures of ``full_height``, as wide as those of ``dataset``, to the next 32."""
        rows, columns = dataset.sample(0).pixels.shape[:2]
        height = max(round(self._recipe.full_height / 32), 2) * 32
        width = max(round(self._recipe.full_height * columns / rows / 32), 2) * 32
        mask_height, mask_width = self.network.mask_size(height, width)
        return ModelSpec(
            name=self._recipe.model,
            architecture=self._recipe.model,
            task="instance",
            height=height,
            width=width,
            classes=self.classes,
            colours=class_list(len(self.classes)).colours,
            ignore=255,
            preprocessing=definition(self._recipe.model).preprocessing,
            capacity=self.network.selection.capacity,
            mask_height=mask_height,
            mask_width=mask_width,
        )


def _frames(uri: str, recipe: Recipe, teacher: Teacher | None) -> InstanceDataset:
    settings = recipe.distillation
    assert teacher is not None
    assert settings is not None
    # Training alone does without the onnx package.
    from edgeseg.export.pseudo import PseudoObjects

    return PseudoObjects(
        uri,
        teacher,
        size=teacher.size or recipe.crop,
        count=settings.frames,
        confidence=settings.confidence,
    )


def _common_classes(datasets: Sequence[InstanceDataset]) -> tuple[str, ...]:
    classes = datasets[0].classes
    for dataset in datasets[1:]:
        if dataset.classes != classes:
            raise DataError(
                f"{datasets[0].title} has the classes {', '.join(classes)} and {dataset.title} "
                f"has {', '.join(dataset.classes)}; one model needs one list"
            )
    return classes


def _objects(sample: InstanceSample, placement: Placement, grid: tuple[int, int]) -> Objects:
    """The objects of ``sample`` that are left in the crop."""
    height, width = sample.pixels.shape[:2]
    rows, columns = placement.crop
    boxes, labels, masks, crowd = [], [], [], []
    for annotation in sample.annotations:
        mask = annotation.mask(height, width).astype(np.uint8)
        mask = placement.labels(mask, 0)
        across, down = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if not across.size:
            continue
        boxes.append(
            (
                across[0] / columns,
                down[0] / rows,
                (across[-1] + 1) / columns,
                (down[-1] + 1) / rows,
            )
        )
        labels.append(annotation.label)
        crowd.append(annotation.crowd or int(mask.sum()) < _LEAST)
        shares = cv2.resize(mask * 255, grid[::-1], interpolation=cv2.INTER_AREA)
        masks.append(shares > 127)
    count = len(boxes)
    return Objects(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(count, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *grid), np.bool_)),
        crowd=torch.tensor(crowd, dtype=torch.bool),
    )


@dataclass(frozen=True, eq=False)
class _Packed:
    """A sample in the memory it needs: its picture as PNG."""

    name: str
    number: int
    picture: bytes
    annotations: tuple[Annotation, ...]


class _Kept:
    """A data set whose samples are kept once they were read, or generated, until memory is full.

    A picture with exact truth takes ten times as long to generate as to unpack.
    """

    def __init__(self, dataset: InstanceDataset) -> None:
        self._dataset = dataset
        self._packed: dict[int, _Packed] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, index: int) -> InstanceSample:
        """As ``Pictures.sample``."""
        packed = self._packed.get(index)
        if packed is None:
            sample = self._dataset.sample(index)
            self._keep(index, sample)
            return sample
        pixels: Pixels = cv2.imdecode(np.frombuffer(packed.picture, np.uint8), cv2.IMREAD_COLOR)  # type: ignore[assignment]
        return InstanceSample(packed.name, packed.number, pixels, packed.annotations)

    def _keep(self, index: int, sample: InstanceSample) -> None:
        if self._bytes > _KEPT_BYTES:
            return
        picture = cv2.imencode(".png", sample.pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        self._packed[index] = _Packed(
            sample.name, sample.number, picture.tobytes(), sample.annotations
        )
        # Run lengths of masks as Python numbers.
        runs = sum(
            len(each.segmentation["counts"])
            for each in sample.annotations
            if isinstance(each.segmentation, dict)
        )
        self._bytes += picture.nbytes + 40 * runs
