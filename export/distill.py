"""Training with a teacher beside the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeseg.bundle import SHIPPED, Bundle
from edgeseg.classes import ClassList, class_list
from edgeseg.errors import RequestError
from edgeseg.export.distillation import (
    Distillation,
    Imitation,
    head_imitation,
    semantic_imitation,
)
from edgeseg.export.models import InstanceNetwork, SemanticNetwork, definition_of
from edgeseg.export.models.network import Network
from edgeseg.export.own import OwnNetwork, is_own
from edgeseg.export.package import ExportRequest, own_network, read_network
from edgeseg.export.training_task import Batch, Score, TrainingTask, network_input
from edgeseg.spec import Preprocessing

__all__ = ["DistilledTask", "Teacher", "open_teacher"]


class Teacher:
    """A network in eval mode that says of a batch of pictures what it thinks of them.

    ``preprocessing`` is the network's own: it sees the pictures as it was trained to. ``classes``:
    what it knows, for data that have no labels; ``size``: (height, width) that it is made for, if
    it is made for one.
    """

    def __init__(
        self,
        network: SemanticNetwork | InstanceNetwork,
        preprocessing: Preprocessing,
        classes: ClassList | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.classes = classes or class_list(network.named_classes)
        self.size = size
        self._preprocessing = preprocessing

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """(N, H, W, 3) uint8 BGR -> what the network gives; RequestError for another size."""
        x = network_input(images, self._preprocessing)
        if not isinstance(self.network, OwnNetwork):
            return self.network(x)
        # One picture at a time is what it promises.
        try:
            return torch.cat([self.network(picture[None]) for picture in x])
        except RuntimeError as error:
            raise RequestError(
                f"the teacher does not take pictures of {x.shape[2]}x{x.shape[3]} pixels, the crop "
                f"of the recipe ({str(error).splitlines()[0]}); set crop to the size it is made for"
            ) from error


def open_teacher(name: str, model: str, crop: tuple[int, int]) -> Teacher:
    """The teacher called ``name``.

    A bundle, or a model that ships with EdgeSeg; a checkpoint (.pt, .pth), which is of ``model``;
    or one's own, run at the size ``crop``: ``package.module:factory``, or an ONNX file of others.
    """
    if name not in SHIPPED and is_own(name) and not Path(name).is_dir():
        size = "x".join(str(side) for side in crop)
        own, _, _ = own_network(ExportRequest(model=name, size=size))
        return Teacher(own, own.preprocessing)
    if name not in SHIPPED and Path(name).suffix in (".pt", ".pth"):
        network, _, _ = read_network(model, name)
        return Teacher(network, definition_of(network).preprocessing)
    spec = Bundle.open(name).spec
    network, _, _ = read_network(spec.architecture, name)
    classes = ClassList(spec.name, spec.classes, spec.colours, spec.ignore)
    preprocessing = definition_of(network).preprocessing
    return Teacher(network, preprocessing, classes, (spec.height, spec.width))


class DistilledTask(TrainingTask[Any]):
    """``task`` with a ``teacher``: see `Distillation` for the loss.

    ``precision``: what the teacher computes in, None for float32.
    """

    def __init__(
        self,
        task: TrainingTask[Any],
        teacher: Teacher,
        settings: Distillation,
        precision: torch.dtype | None = None,
    ) -> None:
        self._precision = precision
        self.network = task.network
        self.batches = task.batches
        self._task = task
        self._teacher = teacher
        self._settings = settings
        self._check(task.network, teacher.network)
        self._imitation: Imitation | None = None
        if settings.layers:
            x = torch.zeros(2, 3, 128, 128)
            self._imitation = Imitation(task.network, teacher.network, settings.layers, x)

    @property
    def companions(self) -> nn.Module | None:
        """See ``TrainingTask.companions``: what brings the student's maps to the teacher's."""
        return self._imitation

    def losses(self, found: Any, batch: Batch[Any], device: torch.device) -> dict[str, Tensor]:
        """See ``TrainingTask.losses``."""
        settings = self._settings
        parts: dict[str, Tensor] = {}
        if settings.alpha:
            labels = self._task.losses(found, batch, device)
            parts = {name: settings.alpha * part for name, part in labels.items()}
        if settings.alpha == 1 and not settings.channels and self._imitation is None:
            # The teacher has labelled frames, and has no more to say.
            return parts
        self._teacher.network.to(device)
        # In the student's precision: rounding is little beside what it has to learn.
        with torch.autocast(
            device.type,
            dtype=self._precision or torch.bfloat16,
            enabled=self._precision is not None,
        ):
            wanted = self._teacher(batch.images.to(device))
        if isinstance(wanted, Tensor):
            main = found[0] if isinstance(found, tuple) else found
            soft = semantic_imitation(main, wanted, settings)
        else:
            soft = head_imitation(found, wanted, settings.temperature)
        for name, part in soft.items():
            factor = settings.channels if name == "channels" else 1 - settings.alpha
            parts[name] = factor * part
        if self._imitation is not None:
            parts["features"] = settings.features * self._imitation()
        return parts

    def scores(self, network: Network, limit: int | None) -> list[Score]:
        """See ``TrainingTask.scores``."""
        return self._task.scores(network, limit)

    def _check(self, student: Network, teacher: Network) -> None:
        """RequestError when the two do not say the same things."""
        if isinstance(student, SemanticNetwork) != isinstance(teacher, SemanticNetwork):
            kinds = {True: "a class per pixel", False: "objects"}
            raise RequestError(
                f"a teacher has the task of its student, and it gives "
                f"{kinds[isinstance(teacher, SemanticNetwork)]} where the student gives "
                f"{kinds[isinstance(student, SemanticNetwork)]}"
            )
        if student.named_classes != teacher.named_classes:
            raise RequestError(
                f"a teacher has the classes of its student, and it has {teacher.named_classes} "
                f"where the data have {student.named_classes}"
            )
