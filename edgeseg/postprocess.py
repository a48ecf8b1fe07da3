"""Steps that may follow the network, for whoever finds them worth their price."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from edgeseg.errors import RequestError
from edgeseg.instances import InstanceOutputs
from edgeseg.spec import ModelSpec

__all__ = ["NOTHING_MORE", "STEPS", "Postprocessing", "rescored"]

#: what the steps are called, in the order in which they are taken
STEPS = ("rescore", "refine")

# A sample of a mask is on above a half of 255.
_HALF = 127


@dataclass(frozen=True)
class Postprocessing:
    """Steps that follow the network; without any, nothing changes.

    ``rescore``: scores are multiplied by how sure the masks are, see `rescored`; for instances.
    ``refine``: pixels near a border are decided again by the colours around them, see
    `edgeseg.borders`.

    By name they are those of `STEPS`, joined by ``+``. What each gains and costs,
    `edgeseg eval --compare` measures.
    """

    rescore: bool = False
    refine: bool = False

    @classmethod
    def parse(cls, text: str) -> Postprocessing:
        """The steps that ``text`` names; RequestError for what is no step, or is there twice."""
        names = [part.strip() for part in text.split("+")]
        for name in names:
            if name not in STEPS:
                raise RequestError(
                    f"the steps after the network are {' and '.join(STEPS)}, joined by +, "
                    f"and {name!r} came"
                )
            if names.count(name) > 1:
                raise RequestError(f"a step is taken once, and {name} came twice in {text!r}")
        return cls(rescore="rescore" in names, refine="refine" in names)

    def check(self, spec: ModelSpec) -> None:
        """RequestError when one of the steps is not for models of this task."""
        if self.rescore and spec.task != "instance":
            raise RequestError(
                f"the step rescore is for instances, and {spec.name} gives classes of pixels"
            )

    def instances(self, outputs: InstanceOutputs) -> InstanceOutputs:
        """``outputs`` after the steps at network size; itself when there are none."""
        return rescored(outputs) if self.rescore else outputs

    def __str__(self) -> str:
        """What `parse` reads; ``nothing more`` without steps."""
        taken = (self.rescore, self.refine)
        names = [name for name, wanted in zip(STEPS, taken, strict=True) if wanted]
        return "+".join(names) or "nothing more"


#: what follows where nobody asks for anything
NOTHING_MORE = Postprocessing()


def rescored(outputs: InstanceOutputs) -> InstanceOutputs:
    """``outputs`` with scores times the mean probability of the mask where it is on, best first.

    The "maskness" of SOLO (Wang et al., 2020, arXiv 1912.04488): a mask that is sure of its pixels
    tends to fit. An instance whose mask is nowhere on has score 0.
    """
    count = len(outputs.scores)
    levels = outputs.masks.reshape(count, math.prod(outputs.masks.shape[1:]))
    on = levels > _HALF
    samples = np.count_nonzero(on, axis=1)
    # What is on is 0xff in the bytes of the negated truth.
    sums = (levels & -on.view(np.uint8)).sum(axis=1, dtype=np.uint32)
    sure = sums / np.maximum(samples, 1) / 255
    scores = (outputs.scores * sure).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    return replace(
        outputs,
        boxes=outputs.boxes[order],
        scores=scores[order],
        labels=outputs.labels[order],
        masks=outputs.masks[order],
    )
