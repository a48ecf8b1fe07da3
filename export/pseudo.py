"""Frames without labels, labelled by a network where it is sure."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from edgeseg.calibration.frames import open_frames
from edgeseg.classes import ClassList
from edgeseg.dataset import Dataset, Sample
from edgeseg.errors import DataError, RequestError
from edgeseg.export.latency import bare_spec
from edgeseg.export.models import SemanticNetwork
from edgeseg.export.own import OwnNetwork
from edgeseg.export.recipe import FRAMES_PREFIX
from edgeseg.frame import Pixels

if TYPE_CHECKING:
    from edgeseg.export.distill import Teacher

__all__ = ["PseudoLabelled"]


class PseudoLabelled(Dataset):
    """What ``uri`` names (``frames:`` and a folder, a list or a video), with labels by ``teacher``.

    Each of at most ``count`` frames, spread evenly, is seen at ``size`` and mirrored;
    where the mean of both probabilities is ``confidence`` or more, the pixel has the class that
    wins, and elsewhere the ignore label of ``classes`` (Lee, "Pseudo-Label", 2013). All is kept in
    memory.

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
        return {
            name: hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
            for name, pixels, _ in self._samples
        }


def _labels(teacher: Teacher, pixels: Pixels, ignore: int, confidence: float) -> NDArray[np.uint8]:
    both = np.ascontiguousarray(np.stack([pixels, pixels[:, ::-1]]))
    seen, mirrored = teacher(torch.from_numpy(both)).softmax(dim=1)
    surest, winner = ((seen + mirrored.flip(2)) / 2).max(dim=0)
    labels: NDArray[np.uint8] = torch.where(surest >= confidence, winner, ignore).byte().numpy()
    return labels
