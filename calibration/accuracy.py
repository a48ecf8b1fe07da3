"""How good a model is on labelled pictures, whatever its task: one figure that a budget is about.

For a semantic model that is mIoU, for an instance model the average precision of its masks, or of
its boxes where the data set has no outlines.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeseg.annotation import coco_masks
from edgeseg.dataset import Dataset, open_dataset
from edgeseg.engine import Engine
from edgeseg.evaluate import (
    Evaluation,
    InstanceEvaluation,
    check_classes,
    evaluate,
    evaluate_instances,
    match_classes,
)
from edgeseg.instance_dataset import InstanceDataset, open_instances
from edgeseg.spec import ModelSpec, Task

__all__ = ["AnyDataset", "AnyEvaluation", "figure", "figure_name", "labelled", "measured", "title"]

AnyDataset = Dataset | InstanceDataset
AnyEvaluation = Evaluation | InstanceEvaluation

_NAMES: dict[Task, str] = {"semantic": "mIoU", "instance": "AP"}


def figure_name(task: Task) -> str:
    """What a budget for models of ``task`` is about."""
    return _NAMES[task]


def labelled(uri: str, split: str, spec: ModelSpec) -> AnyDataset:
    """The labelled pictures that ``uri`` names, for a model of ``spec``.

    The errors of `open_dataset`, `open_instances`, and DataError where the classes are others.
    RequestError where pycocotools is missing, which instances need.
    """
    if spec.task == "semantic":
        pixels = open_dataset(uri, split)
        check_classes(spec.classes, pixels.classes)
        return pixels
    coco_masks()
    objects = open_instances(uri, split)
    match_classes(spec.classes, objects.classes, objects.title)
    return objects


def measured(
    engine: Engine, dataset: AnyDataset, *, progress: Callable[[int, int], None] | None = None
) -> AnyEvaluation:
    """The model of ``engine`` on the whole of ``dataset``, which is one for its task."""
    if isinstance(dataset, InstanceDataset):
        return evaluate_instances(engine, dataset, progress=progress)
    return evaluate(engine, dataset, progress=progress)


def figure(found: AnyEvaluation) -> float:
    """The one that counts, 0 to 1; NaN where nothing had a label."""
    if isinstance(found, Evaluation):
        return found.miou
    return (found.box if found.mask is None else found.mask).ap


def title(found: AnyEvaluation) -> str:
    """What ``figure`` is."""
    if isinstance(found, Evaluation):
        return "mIoU"
    return "box AP" if found.mask is None else "mask AP"
