"""The golden pair: a generated picture, and what the exported graph made of it.

Every engine computes it once when it opens a model. It catches what no type check can: swapped
channels, another normalisation, a library that computes something else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import BundleError
from edgeseg.frame import Pixels

__all__ = ["AGREEMENT", "INT8_AGREEMENT", "Golden", "golden_image"]

#: Share of sampled pixels that must agree. Rounding differs between libraries and moves a border
#: by a pixel here and there; swapped channels or a missing normalisation move far more.
AGREEMENT = 0.97

#: The same for INT8, where libraries round every layer's output their own way: 4 % of this busy
#: picture moves between OpenVINO and ONNX Runtime. Swapped channels still move 75 % of it, half the
#: brightness 49 %.
INT8_AGREEMENT = 0.9

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
            values = json.loads(text)
            golden = cls(
                int(values["seed"]),
                str(values["samples"]),
                # Files from before it was written follow the rule for floating point.
                float(values.get("promised", AGREEMENT)),
            )
            bytes.fromhex(golden.samples)
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"the model's golden pair cannot be read ({error})") from error
        return golden
