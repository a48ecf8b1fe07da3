"""Frames without labels, labelled by a network where it is sure.

Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural
Networks" (ICML 2013 workshop).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from edgeseg.annotation import Annotation, run_lengths
from edgeseg.calibration.frames import open_frames
from edgeseg.classes import ClassList
from edgeseg.dataset import Dataset, Sample
from edgeseg.errors import DataError, RequestError
from edgeseg.export.latency import bare_spec
from edgeseg.export.models import InstanceNetwork, SemanticNetwork
from edgeseg.export.own import OwnNetwork
from edgeseg.export.recipe import FRAMES_PREFIX
from edgeseg.export.torchengine import TorchEngine
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.instance_dataset import InstanceDataset, InstanceSample
from edgeseg.instances import InstanceResult

if TYPE_CHECKING:
    from edgeseg.export.distill import Teacher

__all__ = ["PseudoLabelled", "PseudoObjects"]


class PseudoLabelled(Dataset):
    """What ``uri`` names (``frames:`` and a folder, a list or a video), with labels by ``teacher``.

    Each of at most ``count`` frames, spread evenly, is seen at ``size`` and mirrored;
    where the mean of both probabilities is ``confidence`` or more, the pixel has the class that
    wins, and elsewhere the ignore label of ``classes``. All is kept in memory.

    The errors of ``open_frames``; DataError when the teacher is sure of nothing.
    """

    split = "unlabelled"

    def __init__(
        self,
        uri: str,
        teacher: Teacher,
        classes: ClassList,
        *,
        size: tuple[int, int],
        count: int,
        confidence: float,
    ) -> None:
        network = teacher.network
        if not isinstance(network, SemanticNetwork) or isinstance(network, OwnNetwork):
            raise RequestError(
                "frames without labels are for teachers that give a class map and are models that "
                "EdgeSeg knows; leave them out, or label them"
            )
        frames = open_frames(uri.removeprefix(FRAMES_PREFIX), bare_spec(network, size), count=count)
        self.title = frames.title
        self.classes = classes
        self._samples = [
            (name, pixels, _labels(teacher, pixels, classes.ignore, confidence))
            for name, pixels in frames
        ]
        #: share of all pixels that have a label, 0 to 1
        self.labelled = float(
            np.mean([np.mean(labels != classes.ignore) for _, _, labels in self._samples])
        )
        if not self.labelled:
            raise DataError(
                f"the teacher is sure of no pixel of {self.title}; lower confidence in the table "
                "[distillation], or give frames that are more like what it knows"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> Sample:
        """See ``Dataset.sample``."""
        name, pixels, labels = self._samples[self._checked(index)]
        return Sample(name, pixels.copy(), labels.copy())

    def hashes(self) -> dict[str, str]:
        """See ``Dataset.hashes``."""
        return {name: _hash(pixels) for name, pixels, _ in self._samples}


class PseudoObjects(InstanceDataset):
    """As `PseudoLabelled`, with the objects that ``teacher`` finds.

    One that it gives a score of ``confidence`` or more is an object. One that it gives less, but
    more than ``1 - confidence``, is marked as a crowd: nothing is learned there, neither that there
    is an object nor that there is none. Classes are those of the teacher.

    The errors of ``open_frames``; DataError when the teacher is sure of no object.
    """

    split = "unlabelled"

    def __init__(
        self,
        uri: str,
        teacher: Teacher,
        *,
        size: tuple[int, int],
        count: int,
        confidence: float,
    ) -> None:
        network = teacher.network
        if not isinstance(network, InstanceNetwork):
            raise RequestError(
                "frames without labels are labelled by a teacher that finds objects, and this one "
                "gives a class map; take another, or leave them out"
            )
        spec = bare_spec(network, size)
        engine = TorchEngine(network, spec)
        frames = open_frames(uri.removeprefix(FRAMES_PREFIX), spec, count=count)
        self.title = frames.title
        self.classes = teacher.classes.names
        geometry = Geometry.between(*size, spec)
        self._samples = []
        for number, (name, pixels) in enumerate(frames, 1):
            frame = Frame.of(pixels, number)
            found = InstanceResult.from_outputs(engine.run(pixels), frame, geometry, spec)
            annotations = _annotations(found, confidence)
            self._samples.append(InstanceSample(name, number, pixels, annotations))
        #: objects that it is sure of, in all frames
        self.labelled = sum(
            not each.crowd for sample in self._samples for each in sample.annotations
        )
        if not self.labelled:
            raise DataError(
                f"the teacher is sure of no object in {self.title}; lower confidence in the table "
                "[distillation], or give frames that are more like what it knows"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> InstanceSample:
        """See ``InstanceDataset.sample``."""
        kept = self._samples[self._checked(index)]
        return replace(kept, pixels=kept.pixels.copy())

    def hashes(self) -> dict[str, str]:
        """See ``InstanceDataset.hashes``."""
        return {sample.name: _hash(sample.pixels) for sample in self._samples}


def _hash(pixels: Pixels) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def _annotations(found: InstanceResult, confidence: float) -> tuple[Annotation, ...]:
    """What is found with more than ``1 - confidence``, each where its mask is."""
    made = []
    for index, mask in enumerate(found.masks):
        score = float(found.scores[index])
        across, down = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if not across.size or (score <= 1 - confidence and score < confidence):
            continue
        left, top = int(across[0]), int(down[0])
        made.append(
            Annotation(
                label=int(found.labels[index]),
                box=(left, top, int(across[-1]) + 1 - left, int(down[-1]) + 1 - top),
                area=int(mask.sum()),
                crowd=score < confidence,
                segmentation=run_lengths(mask),
            )
        )
    return tuple(made)


def _labels(teacher: Teacher, pixels: Pixels, ignore: int, confidence: float) -> NDArray[np.uint8]:
    both = np.ascontiguousarray(np.stack([pixels, pixels[:, ::-1]]))
    seen, mirrored = teacher(torch.from_numpy(both)).softmax(dim=1)
    surest, winner = ((seen + mirrored.flip(2)) / 2).max(dim=0)
    labels: NDArray[np.uint8] = torch.where(surest >= confidence, winner, ignore).byte().numpy()
    return labels
