"""The golden pair: a generated picture, and what the exported graph made of it.

Every engine computes it once when it opens a model. It catches what no type check can: swapped
channels, another normalisation, a library that computes something else.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import BundleError
from edgeseg.frame import Pixels
from edgeseg.instances import InstanceOutputs
from edgeseg.jsonfile import parse_json
from edgeseg.result import AnyOutputs, Outputs

__all__ = [
    "AGREEMENT",
    "INSTANCE_AGREEMENT",
    "INT8_AGREEMENT",
    "INT8_INSTANCE_AGREEMENT",
    "AnyGolden",
    "Detection",
    "Golden",
    "InstanceGolden",
    "golden_from_json",
    "golden_image",
]

#: Share of sampled pixels that must agree. Rounding differs between libraries and moves a border
#: by a pixel here and there; swapped channels or a missing normalisation move far more.
AGREEMENT = 0.97

#: The same for INT8, where libraries round every layer's output their own way: 4 % of this busy
#: picture moves between OpenVINO and ONNX Runtime. Swapped channels still move 75 % of it, half the
#: brightness 49 %.
INT8_AGREEMENT = 0.9

#: Share of recorded detections that must be found again. A detection at the edge of a threshold,
#: of score or of overlap, may go either way between libraries; swapped channels lose nearly all.
INSTANCE_AGREEMENT = 0.8

#: The same for INT8, where rounding moves every score a little: between OpenVINO and ONNX Runtime
#: 95 to 100 % are found again. Swapped channels find up to 15 %, half the brightness up to 40 %.
INT8_INSTANCE_AGREEMENT = 0.5

# Detections that are recorded, best first: enough for a share, few enough for metadata.
_DETECTIONS = 20
# How far a detection may move and still be the same.
_SAME_IOU = 0.9
_SAME_SCORE = 0.05
# Share of the mask's samples, relative, and in samples, since a mask may have few.
_SAME_COVER = 0.1
_SAME_SAMPLES = 2.0

# Samples of the class map per axis.
_GRID = 48
_CELL = 24


def golden_image(seed: int, height: int, width: int) -> Pixels:
    """Blocks of colour under a vertical gradient: (height, width, 3) uint8 BGR.

    Integer arithmetic on numpy's PCG64 stream only, so every machine gets the same bytes.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    rows, columns = -(-height // _CELL), -(-width // _CELL)
    blocks = rng.integers(0, 256, (rows, columns, 3), dtype=np.int64)
    picture = blocks.repeat(_CELL, axis=0).repeat(_CELL, axis=1)[:height, :width]
    top = rng.integers(96, 256, 3, dtype=np.int64)
    bottom = rng.integers(0, 160, 3, dtype=np.int64)
    y = np.arange(height, dtype=np.int64)[:, None, None]
    gradient = (top * (height - 1 - y) + bottom * y) // max(height - 1, 1)
    image: Pixels = ((picture + 3 * gradient) // 4).astype(np.uint8)
    return image


def _sampled(class_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most 48 x 48 values of ``class_map``, evenly spread."""
    rows = np.linspace(0, class_map.shape[0] - 1, min(_GRID, class_map.shape[0])).astype(np.int64)
    columns = np.linspace(0, class_map.shape[1] - 1, min(_GRID, class_map.shape[1])).astype(
        np.int64
    )
    return class_map[np.ix_(rows, columns)]


@dataclass(frozen=True)
class Golden:
    """Seed of the picture, the class map that was sampled from the graph's output, as hex, and the
    share of samples that every engine has to agree with."""

    seed: int
    samples: str
    promised: float = AGREEMENT

    @classmethod
    def of(cls, seed: int, class_map: NDArray[np.uint8], promised: float = AGREEMENT) -> Golden:
        """The pair of ``seed`` and (height, width) uint8 ``class_map``."""
        return cls(seed, _sampled(class_map).tobytes().hex(), promised)

    @property
    def is_proof(self) -> bool:
        """Whether agreement says anything; a class map always does."""
        return True

    def agreement_of(self, outputs: AnyOutputs) -> float:
        """``agreement`` of an engine's outputs; 0 for those of another task."""
        return self.agreement(outputs.class_map) if isinstance(outputs, Outputs) else 0.0

    def agreement(self, class_map: NDArray[np.uint8]) -> float:
        """Share of the sampled pixels at which ``class_map`` has the recorded class, 0 to 1."""
        wanted = np.frombuffer(bytes.fromhex(self.samples), np.uint8)
        found = _sampled(class_map).ravel()
        if wanted.size != found.size:
            return 0.0
        return float(np.mean(wanted == found))

    def to_json(self) -> str:
        """One line of JSON; ``from_json`` reads it back."""
        return json.dumps({"seed": self.seed, "samples": self.samples, "promised": self.promised})

    @classmethod
    def from_json(cls, text: str) -> Golden:
        """The pair that ``to_json`` wrote; BundleError for anything else."""
        try:
            values = parse_json(text)
            golden = cls(
                _seed(values["seed"]),
                str(values["samples"]),
                # Files from before it was written follow the rule for floating point.
                _share(values.get("promised", AGREEMENT)),
            )
            if len(bytes.fromhex(golden.samples)) > _GRID * _GRID:
                raise ValueError(f"more than {_GRID}x{_GRID} samples")
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"the model's golden pair cannot be read ({error})") from error
        return golden


@dataclass(frozen=True)
class Detection:
    """One recorded instance.

    ``box``: x1, y1, x2, y2 in network pixels. ``cover``: its mask's mean level over all samples,
    as a share of the highest; a tenth of it may change.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    cover: float


@dataclass(frozen=True)
class InstanceGolden:
    """Seed of the picture, the best detections in it, the share of them that every engine has to
    find again, and the number of samples of a mask.

    Without detections it proves nothing, and says so: see ``is_proof``.
    """

    seed: int
    detections: tuple[Detection, ...]
    samples: int
    promised: float = INSTANCE_AGREEMENT

    @classmethod
    def of(
        cls, seed: int, outputs: InstanceOutputs, promised: float = INSTANCE_AGREEMENT
    ) -> InstanceGolden:
        """The pair of ``seed`` and what the graph found in its picture."""
        samples = int(np.prod(outputs.masks.shape[1:]))
        return cls(seed, tuple(_detections(outputs)[:_DETECTIONS]), samples, promised)

    @property
    def is_proof(self) -> bool:
        """Whether there is anything to find again."""
        return bool(self.detections)

    def agreement_of(self, outputs: AnyOutputs) -> float:
        """Share of the recorded detections that are found again, 0 to 1.

        Found again: one of the same label, a box with an IoU of 0.9 or more, a score within 0.05
        and a mask that covers as much, within a tenth. Each is found once. Where none is recorded,
        1 if none is found either, else 0; outputs of another task give 0.
        """
        if not isinstance(outputs, InstanceOutputs):
            return 0.0
        found = _detections(outputs)
        if not self.detections:
            return 0.0 if found else 1.0
        again = 0
        for wanted in self.detections:
            match = next((other for other in found if self._is_same(wanted, other)), None)
            if match is not None:
                found.remove(match)
                again += 1
        return again / len(self.detections)

    def _is_same(self, wanted: Detection, found: Detection) -> bool:
        room = max(_SAME_COVER * wanted.cover, _SAME_SAMPLES / self.samples)
        return (
            wanted.label == found.label
            and abs(wanted.score - found.score) <= _SAME_SCORE
            and abs(wanted.cover - found.cover) <= room
            and _iou(wanted.box, found.box) >= _SAME_IOU
        )

    def to_json(self) -> str:
        """One line of JSON; ``golden_from_json`` reads it back."""
        rows = [
            [detection.label, round(detection.score, 5), *detection.box, round(detection.cover, 6)]
            for detection in self.detections
        ]
        return json.dumps(
            {
                "seed": self.seed,
                "detections": rows,
                "samples": self.samples,
                "promised": self.promised,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> InstanceGolden:
        """The pair that ``to_json`` wrote; BundleError for anything else."""
        try:
            values = parse_json(text)
            detections = []
            if len(values["detections"]) > _DETECTIONS:
                raise ValueError(f"more than {_DETECTIONS} detections")
            for label, score, x1, y1, x2, y2, cover in values["detections"]:
                box = (float(x1), float(y1), float(x2), float(y2))
                detections.append(Detection(int(label), float(score), box, float(cover)))
            samples = int(values["samples"])
            if samples < 1:
                raise ValueError(f"a mask of {samples} samples")
            return cls(
                _seed(values["seed"]), tuple(detections), samples, _share(values["promised"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"the model's golden pair cannot be read ({error})") from error


AnyGolden = Golden | InstanceGolden


def golden_from_json(text: str) -> AnyGolden:
    """The golden pair of either task that ``to_json`` wrote; BundleError for anything else."""
    try:
        values = parse_json(text)
        is_instance = isinstance(values, dict) and "detections" in values
    except ValueError as error:
        raise BundleError(f"the model's golden pair cannot be read ({error})") from error
    return InstanceGolden.from_json(text) if is_instance else Golden.from_json(text)


def _seed(value: object) -> int:
    """A seed that numpy takes; TypeError or ValueError for another value."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"a seed of {str(value)[:40]!r}")
    if value < 0:
        raise ValueError(f"a seed of {value}")
    return value


def _share(value: object) -> float:
    """The share that has to agree, above 0, since any engine agrees with nothing."""
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"a promised agreement of {str(value)[:40]!r}")
    return float(value)


def _detections(outputs: InstanceOutputs) -> list[Detection]:
    """The instances that have numbers for boxes, best first."""
    covers = outputs.masks.mean(axis=(1, 2), dtype=np.float64) / 255
    found = []
    for label, score, (x1, y1, x2, y2), cover in zip(
        outputs.labels.tolist(),
        outputs.scores.tolist(),
        outputs.boxes.tolist(),
        covers.tolist(),
        strict=True,
    ):
        # JSON has no NaN, and no box with one is the same as another.
        if all(map(math.isfinite, (score, x1, y1, x2, y2))):
            box = (round(x1, 3), round(y1, 3), round(x2, 3), round(y2, 3))
            found.append(Detection(label, score, box, cover))
    return found


def _iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes; 1 for two equal ones without area."""
    if a == b:
        return 1.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return overlap / (areas - overlap) if areas > overlap else 0.0
