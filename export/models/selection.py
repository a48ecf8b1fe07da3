"""YOLACT's rules for what is a detection."""

from __future__ import annotations

from dataclasses import dataclass

from edgeseg.errors import RequestError

__all__ = ["Selection"]

# The longest TopK that TensorRT takes.
_MOST = 3840


@dataclass(frozen=True)
class Selection:
    """Which of YOLACT's priors become detections (arXiv 1904.02689, section 5, "Fast NMS").

    A prior whose best foreground probability is above ``score_threshold`` is a candidate. Per
    class, the ``per_class`` candidates with the highest scores are compared: one goes if any of a
    higher score, kept or not, overlaps it by an IoU above ``iou_threshold``. ``cross_class`` gives
    each candidate its best class instead, and compares the ``per_class`` best over all classes.
    The best ``capacity`` remain.

    An exported graph looks at the ``candidates`` priors of the highest best score. That is exact if
    no more are above the threshold, and also if as many detections as ``capacity`` are at least as
    good as the first prior that was left out: only better boxes decide on a box.
    """

    capacity: int = 100
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    per_class: int = 200
    candidates: int = 1000
    cross_class: bool = False

    def __post_init__(self) -> None:
        for name in ("capacity", "per_class", "candidates"):
            value = getattr(self, name)
            if not 1 <= value <= _MOST:
                raise RequestError(f"{name} is 1 to {_MOST}, and {value} came")
        for name in ("score_threshold", "iou_threshold"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RequestError(f"{name} is between 0 and 1, and {value} came")
