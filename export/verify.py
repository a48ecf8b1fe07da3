"""Proof that an exported graph computes what PyTorch computes, on real pictures.

Class maps are compared pixel by pixel, instances one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.engine import cpu_engines, open_engine
from edgeseg.errors import EngineError, RequestError
from edgeseg.export.models import InstanceNetwork, SemanticNetwork
from edgeseg.export.models.instance import FoundInstances
from edgeseg.export.own import OwnNetwork
from edgeseg.export.own_instance import OwnInstanceNetwork
from edgeseg.export.preprocess import network_input
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceOutputs
from edgeseg.result import Outputs

__all__ = ["Comparison", "InstanceComparison", "Verification", "verify"]

#: Two classes whose logits differ by less than this are a tie: rounding decides between them. Where
#: the logits of a picture span less than 1, it is that share of the span.
TIE = 1e-3

#: two instances of one class are the same if their boxes overlap by this IoU at least
SAME_BOX = 0.98
#: and their scores differ by this at most
SAME_SCORE = 2e-3
#: levels, of 255, by which the mask of the same instance may differ at a sample
SAME_LEVEL = 2
#: Share of the instances that must have a partner. Rounding may turn an overlap into one that is
#: too large, or swap the last instance that is kept with the first that is not.
MATCHED = 0.98
#: share of mask samples that may differ by more, where a box's side lies just on a sample
OTHER_SAMPLES = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One engine against PyTorch.

    ``differing`` of ``pixels`` have another class; ``beyond_ties`` of those where PyTorch's two
    best logits are further apart than ``TIE``; ``largest_margin`` is the largest such distance.
    """

    engine: str
    head: str
    pixels: int
    differing: int
    beyond_ties: int
    largest_margin: float

    @property
    def is_right(self) -> bool:
        """Whether nothing differs but by a tie."""
        return self.beyond_ties == 0

    def render(self) -> str:
        """One line for a person."""
        return (
            f"{self.engine} (head {self.head}): {self.differing} of {self.pixels} pixels "
            f"differ, {self.beyond_ties} of them not by a tie"
        )


@dataclass(frozen=True)
class InstanceComparison:
    """One engine against PyTorch, instance by instance.

    PyTorch gave ``expected`` instances on all pictures together and the engine ``found``;
    ``matched`` of them are the same: class, box within ``SAME_BOX``, score within ``SAME_SCORE``.
    Of those, ``other_samples`` of all ``samples`` of the masks differ by more than ``SAME_LEVEL``.
    """

    engine: str
    head: str
    expected: int
    found: int
    matched: int
    samples: int
    other_samples: int
    largest_score_difference: float

    @property
    def is_right(self) -> bool:
        """Whether enough instances have a partner, and their masks are the same."""
        return (
            self.matched >= MATCHED * max(self.expected, self.found)
            and self.other_samples <= OTHER_SAMPLES * self.samples
        )

    def render(self) -> str:
        """One line for a person."""
        share = self.other_samples / max(self.samples, 1)
        return (
            f"{self.engine} (head {self.head}): {self.matched} of {self.expected} instances "
            f"found again among {self.found}, {share:.4%} of their masks' samples differ"
        )


@dataclass(frozen=True)
class Verification:
    """All engines that were here, on ``images`` pictures of ``data``.

    ``reference``: what they were compared with.
    """

    data: str
    images: int
    comparisons: tuple[Comparison | InstanceComparison, ...]
    reference: str = "PyTorch"

    def to_dict(self) -> dict[str, object]:
        """Plain values for bundle.json."""
        return {
            "data": self.data,
            "reference": self.reference,
            "images": self.images,
            **self._limits(),
            "engines": [asdict(comparison) for comparison in self.comparisons],
        }

    def _limits(self) -> dict[str, object]:
        if any(isinstance(found, InstanceComparison) for found in self.comparisons):
            return {
                "same_box_iou": SAME_BOX,
                "same_score_within": SAME_SCORE,
                "same_level_within": SAME_LEVEL,
            }
        return {"tie_below": TIE}

    def render(self) -> str:
        """Plain text for a terminal."""
        lines = [f"compared with {self.reference} on {self.images} pictures of {self.data}:"]
        lines += [f"  {found.render()}" for found in self.comparisons]
        return "\n".join(lines)


def verify(
    network: SemanticNetwork | InstanceNetwork,
    bundle: Bundle,
    pictures: Sequence[Pixels],
    data: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compares every engine that is installed, with and without the compiled head, with PyTorch.

    ``network``: what was exported, in eval mode. ``pictures``: BGR frames of any size. ``data``
    says where they are from. Class maps, boxes and masks are compared at network size.

    EngineError when a pixel differs by more than a tie, or instances are missing or other ones;
    RequestError without any picture.
    """
    if not pictures:
        raise RequestError("a verification needs at least one picture, and none came")
    heads = [("in the graph", False)]
    if kernels.available():
        heads.append(("compiled", True))
    spec = bundle.spec
    inputs = [
        Geometry.between(picture.shape[0], picture.shape[1], spec).fit(picture)
        for picture in pictures
    ]
    runs = [(engine, *head) for engine in cpu_engines() for head in heads]
    comparisons: list[Comparison] | list[InstanceComparison]
    if isinstance(network, InstanceNetwork):
        comparisons = _compared_instances(network, bundle, inputs, runs, progress)
    else:
        comparisons = _compared_class_maps(network, bundle, inputs, runs, progress)
    reference = "PyTorch"
    if isinstance(network, OwnNetwork | OwnInstanceNetwork):
        reference = network.reference
    found = Verification(data, len(inputs), tuple(comparisons), reference)
    if not all(comparison.is_right for comparison in comparisons):
        what = "instances" if isinstance(network, InstanceNetwork) else "masks"
        raise EngineError(
            f"the exported graph does not give {reference}'s {what}; "
            + found.render().replace("\n", ";")
        )
    return found


def _compared_class_maps(
    network: SemanticNetwork,
    bundle: Bundle,
    inputs: Sequence[Pixels],
    runs: Sequence[tuple[str, str, bool]],
    progress: Callable[[int, int], None] | None,
) -> list[Comparison]:
    expected = [_reference(network, bundle, pixels) for pixels in inputs]
    comparisons = []
    for done, (engine, head, compiled) in enumerate(runs, 1):
        opened = open_engine(bundle, engine, compiled_head=compiled)
        differing = beyond = 0
        largest = 0.0
        for pixels, (class_map, margin) in zip(inputs, expected, strict=True):
            outputs = opened.run(pixels)
            assert isinstance(outputs, Outputs)
            other = outputs.class_map != class_map
            differing += int(other.sum())
            if other.any():
                # Written as not (within a tie), so that a margin that is no number counts.
                beyond += int((~(margin[other] <= TIE)).sum())
                largest = max(largest, float(margin[other].max()))
        opened.close()
        comparisons.append(
            Comparison(
                engine, head, sum(pixels.size // 3 for pixels in inputs), differing, beyond, largest
            )
        )
        if progress is not None:
            progress(done, len(runs))
    return comparisons


@torch.inference_mode()
def _reference(
    network: SemanticNetwork, bundle: Bundle, pixels: Pixels
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """PyTorch's class map and the distance of its two best logits, (height, width) each."""
    logits = network(network_input(pixels, bundle.spec.preprocessing))[0]
    if logits.shape[0] == 1:
        return np.zeros(logits.shape[1:], np.uint8), np.full(logits.shape[1:], np.inf, np.float32)
    best = torch.topk(logits, 2, dim=0)
    # Networks that give probabilities, or scores still smaller, would be all ties otherwise.
    span = float(logits.max() - logits.min())
    scale = span if 0 < span < 1 else 1.0
    margin = ((best.values[0] - best.values[1]) / scale).numpy()
    return best.indices[0].to(torch.uint8).numpy(), margin


def _compared_instances(
    network: InstanceNetwork,
    bundle: Bundle,
    inputs: Sequence[Pixels],
    runs: Sequence[tuple[str, str, bool]],
    progress: Callable[[int, int], None] | None,
) -> list[InstanceComparison]:
    spec = bundle.spec
    expected = [
        network.detect(network_input(pixels, spec.preprocessing), spec.capacity)
        for pixels in inputs
    ]
    comparisons = []
    for done, (engine, head, compiled) in enumerate(runs, 1):
        opened = open_engine(bundle, engine, compiled_head=compiled)
        found = matched = samples = other_samples = 0
        largest = 0.0
        for pixels, wanted in zip(inputs, expected, strict=True):
            outputs = opened.run(pixels)
            assert isinstance(outputs, InstanceOutputs)
            found += len(outputs.scores)
            levels = wanted.levels().numpy().astype(np.int16)
            for row, partner in _partners(wanted, outputs):
                matched += 1
                gap = abs(float(wanted.scores[row]) - float(outputs.scores[partner]))
                largest = max(largest, gap)
                apart = np.abs(levels[row] - outputs.masks[partner])
                samples += apart.size
                other_samples += int((apart > SAME_LEVEL).sum())
        opened.close()
        comparisons.append(
            InstanceComparison(
                engine=engine,
                head=head,
                expected=sum(len(wanted.scores) for wanted in expected),
                found=found,
                matched=matched,
                samples=samples,
                other_samples=other_samples,
                largest_score_difference=largest,
            )
        )
        if progress is not None:
            progress(done, len(runs))
    return comparisons


def _partners(wanted: FoundInstances, found: InstanceOutputs) -> list[tuple[int, int]]:
    """Rows of ``wanted`` and of ``found`` that are the same instance, each row once at most."""
    boxes = wanted.boxes.numpy().astype(np.float64)
    scores, labels = wanted.scores.numpy(), wanted.labels.numpy()
    free = np.ones(len(found.scores), dtype=bool)
    pairs = []
    for row in range(len(scores)):
        same = (
            free
            & (found.labels == labels[row])
            & (np.abs(found.scores - scores[row]) <= SAME_SCORE)
        )
        rows = np.flatnonzero(same)
        if not rows.size:
            continue
        overlaps = _overlaps(boxes[row], found.boxes[rows].astype(np.float64))
        best = int(overlaps.argmax())
        if overlaps[best] >= SAME_BOX:
            free[rows[best]] = False
            pairs.append((row, int(rows[best])))
    return pairs


def _overlaps(box: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of ``box`` (4,) with each of ``boxes`` (n, 4); boxes that are alike overlap wholly."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - common
    # A box of no size has no union with itself.
    alike = np.abs(boxes - box).max(axis=1) <= 1e-3
    overlaps: NDArray[np.float64] = np.where(
        alike, 1.0, common / np.where(union > 0, union, np.inf)
    )
    return overlaps
