"""Steps that may follow the network, for whoever finds them worth their price."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.instances import InstanceOutputs
from edgeseg.spec import ModelSpec

__all__ = ["NOTHING_MORE", "STEPS", "Postprocessing", "rescored", "without_duplicates"]

#: what the steps are called, in the order in which they are taken
STEPS = ("mask-nms", "rescore", "refine")

# A sample of a mask is on above a half of 255.
_HALF = 127


@dataclass(frozen=True)
class Postprocessing:
    """Steps that follow the network, in the order below; without any, nothing changes.

    ``mask_nms``: of two instances of one class whose masks overlap by more than this IoU, above 0
    and below 1, only the better one stays, see `without_duplicates`. ``rescore``: scores are
    multiplied by how sure the masks are, see `rescored`. ``refine``: pixels near a border are
    decided again by the colours around them, see `edgeseg.borders`. The first two are for
    instances; RequestError for a threshold that is none.

    By name they are ``mask-nms=0.6``, ``rescore`` and ``refine``, joined by ``+``. What each gains
    and costs, `edgeseg eval --compare` measures.
    """

    mask_nms: float | None = None
    rescore: bool = False
    refine: bool = False

    def __post_init__(self) -> None:
        if self.mask_nms is not None and not 0 < self.mask_nms < 1:
            raise RequestError(
                f"mask-nms is an overlap (IoU) above 0 and below 1, and {self.mask_nms:g} came"
            )

    @classmethod
    def parse(cls, text: str) -> Postprocessing:
        """The steps that ``text`` names; RequestError for what is no step, or is there twice."""
        steps = cls()
        seen = set()
        for part in text.split("+"):
            name, equals, value = part.strip().partition("=")
            if name in seen:
                raise RequestError(f"a step is taken once, and {name} came twice in {text!r}")
            seen.add(name)
            if name == "mask-nms":
                steps = replace(steps, mask_nms=_overlap(value))
            elif name in ("rescore", "refine") and not equals:
                steps = replace(steps, **{name: True})
            else:
                raise RequestError(
                    "the steps after the network are mask-nms=IOU, rescore and refine, joined by "
                    f"+, and {part.strip()!r} came"
                )
        return steps

    def check(self, spec: ModelSpec) -> None:
        """RequestError when one of the steps is not for a model like this."""
        for name, wanted in (("mask-nms", self.mask_nms is not None), ("rescore", self.rescore)):
            if wanted and spec.task != "instance":
                raise RequestError(
                    f"the step {name} is for instances, and {spec.name} gives classes of pixels"
                )
        if self.mask_nms is not None and spec.mask_extent != "image":
            raise RequestError(
                "the step mask-nms compares masks that span the picture, and those of "
                f"{spec.name} span their boxes"
            )

    def instances(self, outputs: InstanceOutputs) -> InstanceOutputs:
        """``outputs`` after the steps at network size; itself when there are none."""
        if self.mask_nms is not None:
            outputs = without_duplicates(outputs, self.mask_nms)
        return rescored(outputs) if self.rescore else outputs

    def __str__(self) -> str:
        """What `parse` reads; ``nothing more`` without steps."""
        names = [] if self.mask_nms is None else [f"mask-nms={self.mask_nms:g}"]
        names += [name for name in ("rescore", "refine") if getattr(self, name)]
        return "+".join(names) or "nothing more"


#: what follows where nobody asks for anything
NOTHING_MORE = Postprocessing()


def without_duplicates(outputs: InstanceOutputs, overlap: float) -> InstanceOutputs:
    """``outputs`` without those that are found twice.

    From the best score on, an instance goes when its mask overlaps with that of a better one of
    its class, which stays, by an IoU above ``overlap``. Masks are compared where they are on, at
    network size, before they are cut to the frame.
    """
    count = len(outputs.scores)
    # float32 counts exactly up to 2^24, more than a mask has samples.
    masks = (_flat(outputs.masks) > _HALF).astype(np.float32)
    stays = np.ones(count, np.bool_)
    for label in np.unique(outputs.labels):
        members = np.flatnonzero(outputs.labels == label)
        if len(members) == 1:
            continue
        both = (masks[members] @ masks[members].T).astype(np.float64)
        areas = np.diagonal(both)
        either = areas[:, None] + areas - both
        # Two masks without a single sample have nothing in common.
        close = both > overlap * np.maximum(either, 1)
        for place, member in enumerate(members):
            if stays[member]:
                stays[members[place + 1 :][close[place, place + 1 :]]] = False
    return outputs if stays.all() else _taken(outputs, np.flatnonzero(stays))


def rescored(outputs: InstanceOutputs) -> InstanceOutputs:
    """``outputs`` with scores times the mean probability of the mask where it is on, best first.

    The "maskness" of SOLO (Wang et al., 2020, arXiv 1912.04488): a mask that is sure of its pixels
    tends to fit. An instance whose mask is nowhere on has score 0.
    """
    levels = _flat(outputs.masks)
    on = levels > _HALF
    counts = on.sum(axis=1)
    sums = np.where(on, levels, 0).sum(axis=1, dtype=np.int64)
    sure = sums / np.maximum(counts, 1) / 255
    scores = (outputs.scores * sure).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    return _taken(replace(outputs, scores=scores), order)


def _flat(masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, samples), also where n is 0."""
    return masks.reshape(len(masks), math.prod(masks.shape[1:]))


def _taken(outputs: InstanceOutputs, order: NDArray[np.int64]) -> InstanceOutputs:
    return replace(
        outputs,
        boxes=outputs.boxes[order],
        scores=outputs.scores[order],
        labels=outputs.labels[order],
        masks=outputs.masks[order],
    )


def _overlap(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise RequestError(
            f"mask-nms takes an overlap (IoU), such as mask-nms=0.6, and {text!r} came"
        )
    return value
