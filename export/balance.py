"""Biases of the classes that make the mean IoU highest: rare classes get their share.

Training makes the most probable class win at each pixel, and the mean IoU counts classes, not
pixels: where a pole is two pixels wide and the network is two-fifths sure of it, its surroundings
win, and the pole is lost whole. A constant added to a class's logits moves its border with the
others. Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021, arXiv 2007.07314), take
the constants from the classes' frequencies; here they are found by trying, on labelled pictures of
the training. At run time they cost nothing: they are the classifier's own biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeseg.dataset import Dataset, open_dataset
from edgeseg.errors import RequestError
from edgeseg.evaluate import check_classes
from edgeseg.export.models import SemanticNetwork, definition_of
from edgeseg.export.own import is_own
from edgeseg.export.preprocess import network_input
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.spec import Fit, ModelSpec

__all__ = ["Balance", "balance_classes", "balancing_pictures", "best_biases"]

#: pixels of each picture that are looked at, drawn anew for each
_PIXELS = 6_000
#: how far a bias goes at once, in logits: first far, then near
_STEPS = (0.5, 0.25, 0.125)
#: rounds over all classes with each of them
_ROUNDS = 3
#: searches, each on another half of the pictures, whose mean is taken
_SEARCHES = 8
#: a gain in mean IoU that is worth a step
_LEAST = 1e-5

#: logits (pixels, classes) and labels (pixels,) below the number of classes
Samples = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Balance:
    """What was added to the logits of each class, and the mean IoU without and with it.

    ``miou``: (before, after) on each set of pictures, estimated on some pixels of each.
    """

    biases: dict[str, float]
    miou: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "biases": self.biases,
            "miou": {name: list(values) for name, values in self.miou.items()},
        }


def balancing_pictures(model: str, uris: Sequence[str], spec: ModelSpec) -> list[Dataset]:
    """The labelled pictures, split train, on which ``model`` is to be balanced.

    RequestError where a model of its kind has no biases to set; the errors of `open_dataset`, and
    DataError where the classes are others.
    """
    if spec.task != "semantic" or is_own(model):
        raise RequestError(
            f"{model} cannot be balanced: that is for semantic models of an architecture "
            "in `edgeseg models`; leave balance out"
        )
    datasets = [open_dataset(uri, "train") for uri in uris]
    for dataset in datasets:
        check_classes(spec.classes, dataset.classes)
    return datasets


def balance_classes(
    network: SemanticNetwork,
    datasets: Sequence[Dataset],
    size: tuple[int, int],
    *,
    fit: Fit = "stretch",
    limit: int = 400,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Balance:
    """Sets the biases of ``network``'s classifier so that the mean IoU is highest.

    ``datasets``: labelled pictures of the training, at most ``limit`` of each; what counts is the
    mean of their mean IoUs. ``size``: (height, width) of the network. The summit is flat, and where
    exactly it is depends on the pictures: the mean of what is found on several halves of them does
    better on others (Breiman, "Bagging predictors", 1996).

    RequestError when the network's classifier has no biases.
    """
    biases = _biases(network)
    network.eval()
    names = datasets[0].classes.names
    counts = [min(limit, len(dataset)) for dataset in datasets]
    random = np.random.default_rng(seed)
    done, sets = 0, list[list[Samples]]()
    for dataset, count in zip(datasets, counts, strict=True):
        parts: list[Samples] = []
        for index in range(count):
            sample = dataset.sample(index * len(dataset) // count)
            labels = sample.labels.reshape(-1)
            known = np.flatnonzero(labels < len(names))
            chosen = random.choice(known, min(_PIXELS, len(known)), replace=False)
            logits = _logits(network, sample.pixels, chosen, size, fit)
            parts.append((logits, labels[chosen].astype(np.int64)))
            done += 1
            if progress is not None:
                progress(done, sum(counts))
        sets.append(parts)
    found = np.mean(
        [best_biases([_joined(_half(parts, random)) for parts in sets]) for _ in range(_SEARCHES)],
        axis=0,
    ).astype(np.float32)
    with torch.no_grad():
        biases.add_(torch.from_numpy(found).to(biases))
    return Balance(
        biases={name: float(value) for name, value in zip(names, found, strict=True)},
        miou={
            f"{dataset.title} {dataset.split}": _before_and_after(_joined(parts), found)
            for dataset, parts in zip(datasets, sets, strict=True)
        },
    )


def best_biases(sets: Sequence[Samples]) -> NDArray[np.float32]:
    """What to add to the logits of each class for the highest mean of the sets' mean IoUs.

    The search goes class by class in smaller and smaller steps, so that it finds a summit near no
    biases at all. One that helps nothing stays 0; their median is 0.
    """
    found = np.zeros(sets[0][0].shape[1], np.float32)
    best = float(np.mean([_miou(labels, logits.argmax(axis=1)) for logits, labels in sets]))
    for step in _STEPS:
        for _ in range(_ROUNDS):
            before = best
            for index in range(len(found)):
                rivals = [_Rivals.of(logits + found, index) for logits, _ in sets]
                moved, reached = 0.0, best
                for change in (step, -step):
                    while True:
                        tried = float(
                            np.mean(
                                [
                                    _miou(labels, rival.winners(moved + change))
                                    for rival, (_, labels) in zip(rivals, sets, strict=True)
                                ]
                            )
                        )
                        if tried <= reached + _LEAST:
                            break
                        moved, reached = moved + change, tried
                found[index] += moved
                best = reached
            if best == before:
                break
    # A constant for all changes nothing; without it the figures say who gained on whom.
    return found - np.median(found).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Rivals:
    """One class against the best of the others at each pixel."""

    index: int
    ahead: NDArray[np.float32]
    others: NDArray[np.int64]

    @classmethod
    def of(cls, logits: NDArray[np.float32], index: int) -> _Rivals:
        """Of logits (pixels, classes)."""
        without = logits.copy()
        without[:, index] = -np.inf
        others = without.argmax(axis=1)
        best = np.take_along_axis(without, others[:, None], axis=1)[:, 0]
        return cls(index, logits[:, index] - best, others)

    def winners(self, added: float) -> NDArray[np.int64]:
        """The class of each pixel when so much is added to this one's logits."""
        return np.where(self.ahead + np.float32(added) > 0, self.index, self.others)


def _half(parts: Sequence[Samples], random: np.random.Generator) -> list[Samples]:
    chosen = random.choice(len(parts), (len(parts) + 1) // 2, replace=False)
    return [parts[index] for index in chosen]


def _joined(parts: Sequence[Samples]) -> Samples:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _before_and_after(samples: Samples, biases: NDArray[np.float32]) -> tuple[float, float]:
    logits, labels = samples
    before = _miou(labels, logits.argmax(axis=1))
    return before, _miou(labels, (logits + biases).argmax(axis=1))


def _miou(labels: NDArray[np.int64], winners: NDArray[np.int64]) -> float:
    """Mean IoU of the classes that occur, in the labels or among the winners."""
    classes = int(max(labels.max(), winners.max())) + 1
    pairs = np.bincount(labels * classes + winners, minlength=classes**2)
    confusion = pairs.reshape(classes, classes)
    right = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    return float(np.mean(right[union > 0] / union[union > 0]))


@torch.inference_mode()
def _logits(
    network: SemanticNetwork,
    pixels: Pixels,
    chosen: NDArray[np.int64],
    size: tuple[int, int],
    fit: Fit,
) -> NDArray[np.float32]:
    """(chosen pixels, classes): logits at the places of a frame, counted row by row.

    Nearest neighbour with half-pixel centres, as `Geometry.restore` brings back class maps.
    """
    height, width = pixels.shape[:2]
    geometry = Geometry.fitting(height, width, *size, fit=fit)
    fitted = network_input(geometry.fit(pixels), definition_of(network).preprocessing)
    logits = network(fitted)[0].numpy()
    rows = geometry.top + (2 * (chosen // width) + 1) * geometry.inner_height // (2 * height)
    columns = geometry.left + (2 * (chosen % width) + 1) * geometry.inner_width // (2 * width)
    return np.ascontiguousarray(logits[:, rows, columns].T)


def _biases(network: SemanticNetwork) -> torch.nn.Parameter:
    key = type(network).classifier.removesuffix(".weight") + ".bias"
    found = dict(network.named_parameters()).get(key)
    if found is None:
        raise RequestError(
            f"{definition_of(network).name} has a classifier without biases, which balancing sets; "
            "leave --balance out"
        )
    return found
