"""Proof that an exported graph computes what PyTorch computes, pixel by pixel, on real pictures."""

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
from edgeseg.export.models import SemanticNetwork
from edgeseg.export.preprocess import network_input
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry

__all__ = ["Comparison", "Verification", "verify"]

#: two classes whose logits differ by less than this are a tie: rounding decides between them
TIE = 1e-3


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


@dataclass(frozen=True)
class Verification:
    """All engines that were here, on ``images`` pictures of ``data``."""

    data: str
    images: int
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values for bundle.json."""
        return {
            "data": self.data,
            "images": self.images,
            "tie_below": TIE,
            "engines": [asdict(comparison) for comparison in self.comparisons],
        }

    def render(self) -> str:
        """Plain text for a terminal."""
        lines = [f"compared with PyTorch on {self.images} pictures of {self.data}:"]
        lines += [
            f"  {found.engine} (head {found.head}): {found.differing} of {found.pixels} pixels "
            f"differ, {found.beyond_ties} of them not by a tie"
            for found in self.comparisons
        ]
        return "\n".join(lines)


def verify(
    network: SemanticNetwork,
    bundle: Bundle,
    pictures: Sequence[Pixels],
    data: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compares every engine that is installed, with and without the compiled head, with PyTorch.

    ``network``: what was exported, in eval mode. ``pictures``: BGR frames of any size. ``data``
    says where they are from. Every class map is compared at network size.

    EngineError when a pixel differs by more than a tie; RequestError without any picture.
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
    expected = [_reference(network, bundle, pixels) for pixels in inputs]
    comparisons = []
    for done, (engine, head, compiled) in enumerate(runs, 1):
        opened = open_engine(bundle, engine, compiled_head=compiled)
        differing = beyond = 0
        largest = 0.0
        for pixels, (class_map, margin) in zip(inputs, expected, strict=True):
            other = opened.run(pixels).class_map != class_map
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
    found = Verification(data, len(inputs), tuple(comparisons))
    wrong = [comparison for comparison in comparisons if comparison.beyond_ties]
    if wrong:
        raise EngineError(
            "the exported graph does not give PyTorch's masks; " + found.render().replace("\n", ";")
        )
    return found


@torch.inference_mode()
def _reference(
    network: SemanticNetwork, bundle: Bundle, pixels: Pixels
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """PyTorch's class map and the distance of its two best logits, (height, width) each."""
    logits = network(network_input(pixels, bundle.spec.preprocessing))[0]
    if logits.shape[0] == 1:
        return np.zeros(logits.shape[1:], np.uint8), np.full(logits.shape[1:], np.inf, np.float32)
    best = torch.topk(logits, 2, dim=0)
    margin = (best.values[0] - best.values[1]).numpy()
    return best.indices[0].to(torch.uint8).numpy(), margin
