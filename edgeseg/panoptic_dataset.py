"""Pictures with every pixel's class and object, opened by URI: generated streets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeseg.dataset import Pictures, SyntheticDataset, open_streets
from edgeseg.errors import RequestError
from edgeseg.frame import Pixels
from edgeseg.instance_dataset import SyntheticInstances
from edgeseg.panoptic_quality import LabelledSegment

__all__ = ["PanopticDataset", "PanopticSample", "SyntheticPanoptic", "open_panoptic"]


@dataclass(frozen=True, eq=False)
class PanopticSample:
    """One picture and its segments.

    ``pixels``: (height, width, 3) uint8, BGR. ``ids``: (height, width) int32, the id of each
    pixel's segment, or VOID. Both belong to the caller.
    """

    name: str
    pixels: Pixels
    ids: NDArray[np.int32]
    segments: tuple[LabelledSegment, ...]


class PanopticDataset(Pictures[PanopticSample]):
    """Pictures with segments.

    ``classes`` are the names of their classes, in the order of `LabelledSegment.label`, and
    ``things`` the labels of those that are told apart object by object.
    """

    classes: tuple[str, ...]
    things: frozenset[int]


def open_panoptic(uri: str, split: str) -> PanopticDataset:
    """The data set that ``uri`` names: ``synthetic:``, as in `edgeseg.dataset.open_dataset`.

    Raises RequestError for any other.
    """
    if not uri.startswith("synthetic:"):
        raise RequestError(
            f"a data set with classes and objects is synthetic:, with options as in "
            f"synthetic:?seed=100&size=360x480&frames=60, and {uri!r} came"
        )
    return SyntheticPanoptic(open_streets(uri, split))


class SyntheticPanoptic(PanopticDataset):
    """The segments of generated streets: cars, pedestrians, bicyclists, and eight kinds of stuff.

    ``streets``: the pictures, the same as for a semantic model. No pixel is void. What is hidden
    too far is marked as a crowd, as in `SyntheticInstances`.
    """

    title = SyntheticDataset.title

    def __init__(self, streets: SyntheticDataset) -> None:
        self.split = streets.split
        self.classes = streets.classes.names
        self.things = frozenset(self.classes.index(name) for name in SyntheticInstances.classes)
        self._streets = streets

    def __len__(self) -> int:
        return len(self._streets)

    def sample(self, index: int) -> PanopticSample:
        frame = self._streets.frame(index)
        # Stuff has the ids 1 to the number of classes, and objects those beyond.
        first = len(self.classes) + 1
        ids = np.where(
            frame.instance_map > 0, frame.instance_map + np.int32(first), frame.class_map + 1
        ).astype(np.int32)
        stuff = np.unique(frame.class_map[frame.instance_map == 0]).tolist()
        segments = [LabelledSegment(label + 1, label) for label in stuff]
        segments += [
            LabelledSegment(
                instance.id + first,
                instance.label,
                crowd=instance.area < SyntheticInstances.LEAST_SEEN,
            )
            for instance in frame.instances
        ]
        return PanopticSample(self._streets.name(index), frame.pixels, ids, tuple(segments))

    def hashes(self) -> dict[str, str]:
        return self._streets.hashes()
