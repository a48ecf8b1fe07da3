"""What may be done to a model's outputs after the network, each step with its price."""

from __future__ import annotations

from dataclasses import dataclass

from edgeseg.errors import RequestError
from edgeseg.spec import ModelSpec

__all__ = ["NOTHING_MORE", "Postprocessing"]


@dataclass(frozen=True)
class Postprocessing:
    """Steps after the network; none of them by default, and then nothing changes.

    ``refine``: pixels near a border between classes are decided again by the colours around them,
    see `edgeseg.borders`; for semantic models.

    `edgeseg eval --compare` measures what a step gains, and what it costs.
    """

    refine: bool = False

    @classmethod
    def parse(cls, text: str) -> Postprocessing:
        """The steps that ``text`` names, joined by ``+``, such as ``"refine"``.

        RequestError for a name that is no step, or is there twice.
        """
        chosen: dict[str, bool] = {}
        for name in text.split("+"):
            step = name.strip()
            if step != "refine":
                raise RequestError(f"the steps after the network are refine, and {step!r} came")
            if step in chosen:
                raise RequestError(f"a step is taken once, and {step} came twice in {text!r}")
            chosen[step] = True
        return cls(**chosen)

    def check(self, spec: ModelSpec) -> None:
        """RequestError when one of the steps is not for models of this task."""
        if self.refine and spec.task != "semantic":
            raise RequestError(
                f"the step refine is for semantic models, and {spec.name} is for {spec.task}"
            )

    def __str__(self) -> str:
        """What `parse` reads, or ``nothing more``."""
        return "refine" if self.refine else "nothing more"


#: what happens where nobody asks for anything
NOTHING_MORE = Postprocessing()
