"""From a checkpoint to a pruned checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from edgeseg.bundle import Bundle
from edgeseg.calibration.calibrate import Stage, silent
from edgeseg.calibration.frames import open_frames
from edgeseg.dataset import open_dataset
from edgeseg.engine import cpu_engine
from edgeseg.errors import RequestError
from edgeseg.export.couplings import find_couplings
from edgeseg.export.distill import open_teacher
from edgeseg.export.importance import (
    Activation,
    BatchNormScale,
    Importance,
    Loss,
    Taylor,
    WeightNorm,
    labelled_loss,
    own_loss,
)
from edgeseg.export.latency import EngineStopwatch, bare_spec, check_engine
from edgeseg.export.models import InstanceNetwork, SemanticNetwork, definition_of
from edgeseg.export.models.network import Network
from edgeseg.export.package import read_network
from edgeseg.export.preprocess import network_input
from edgeseg.export.prune import Finetune, Rules, Target, prune
from edgeseg.export.prune_report import PruneReport
from edgeseg.export.recipe import Recipe
from edgeseg.export.train import train
from edgeseg.export.weights import check_writable, load_weights, save_weights
from edgeseg.spec import ModelSpec, parse_size

__all__ = ["MEASURES", "Measure", "PruneRequest", "Pruned", "prune_checkpoint"]

Measure = Literal["activation", "l1", "l2", "bn", "taylor"]
MEASURES: tuple[Measure, ...] = ("activation", "l1", "l2", "bn", "taylor")

#: pictures that go through the network at once
_BATCH = 4


@dataclass(frozen=True)
class PruneRequest:
    """What to prune, how far, and by which measure.

    ``model`` and ``weights``: as ``read_network`` has them. ``size``: "HxW" of the network's input;
    None for that of the bundle, or the model's own. ``calibration``: URIs of frames (see
    ``open_frames``), which activations, Taylor's derivatives and the batch norms are measured on,
    ``frames`` of each at most. ``labels``: labelled pictures, split "train", for Taylor's
    derivatives of the cross entropy; without, those of what the network itself says. ``steps``: see
    ``prune``; ``recipe``: the file of a training recipe, by which the network is trained after each
    of them. ``engine``: measure milliseconds there, with ``threads``.
    """

    model: str
    target: Target
    weights: str | None = None
    size: str | None = None
    importance: Measure = "l2"
    calibration: tuple[str, ...] = ()
    frames: int = 32
    labels: str | None = None
    rules: Rules = field(default_factory=Rules)
    steps: int = 1
    recipe: str | None = None
    engine: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        if self.importance not in MEASURES:
            raise RequestError(
                f"importance is one of {', '.join(MEASURES)}, and {self.importance!r} came"
            )
        if self.importance == "activation" and not self.calibration:
            raise RequestError(
                "activations are measured on frames like those the model will see; name a folder, "
                "a list or a video with --calibration, or take --importance l2"
            )
        if self.importance == "taylor" and not self.calibration and self.labels is None:
            raise RequestError(
                "derivatives are measured on frames like those the model will see; name a folder, "
                "a list or a video with --calibration, or labelled pictures with --labels"
            )
        if self.labels is not None and self.importance != "taylor":
            raise RequestError("labels are read by --importance taylor alone; leave --labels out")


@dataclass(frozen=True)
class Pruned:
    """The checkpoint that was written, and what was done."""

    path: Path
    report: PruneReport


def prune_checkpoint(
    request: PruneRequest,
    target: str | Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    stage: Stage = silent,
) -> Pruned:
    """Writes the pruned checkpoint to ``target``, whole or not at all; the original is only read.

    It is a plain state_dict that ``load_weights``, and with it every other command, takes wherever
    a checkpoint of the model goes. ``device`` and ``workers``: as for ``train``, where the request
    has a recipe; its distillation learns from the model as it was. What such trainings have done
    stands beside the target in ``NAME.pt.steps`` until the target is written, and a second call
    goes on where the first was stopped.

    RequestError, WeightsError and EngineError come before any long work where that can be; see
    `read_network`, `open_frames`, `EngineStopwatch`, `prune` and `train`.
    """
    target = Path(target)
    check_writable(target)
    engine = request.engine
    if engine is None and request.target.kind == "milliseconds":
        engine = cpu_engine()
    if engine is not None:
        check_engine(engine)
    network, architecture, path = read_network(request.model, request.weights, auxiliary_heads=True)
    size = _size(request, network, path)
    training = None
    if request.recipe is not None:
        training = _Training(request, architecture, target, device, workers)
    # What cannot be protected, or cannot be pruned at all, is found before frames are read.
    find_couplings(network, protect=request.rules.protect)
    spec = bare_spec(network, size)
    frames = [open_frames(uri, spec, count=request.frames) for uri in request.calibration]
    notes = tuple(
        f"of {each.title} cannot be read, and were left out: {', '.join(each.skipped)}"
        for each in frames
        if each.skipped
    )
    inputs = _batches(
        [network_input(pixels, spec.preprocessing) for each in frames for _, pixels in each]
    )
    importance = _importance(request, network, spec, inputs)
    with ExitStack() as stack:
        stopwatch: EngineStopwatch | None = None
        if engine is not None:
            with stage(f"timing {architecture} on {engine}"):
                stopwatch = EngineStopwatch(network, size, engine=engine, threads=request.threads)
            stack.enter_context(stopwatch)
        doing = "pruning" if training is None else "pruning and training"
        with stage(f"{doing} {architecture}") as update:
            pruning = prune(
                network,
                request.target,
                importance,
                request.rules,
                size=size,
                steps=request.steps,
                finetune=None if training is None else training.showing(update),
                calibration=inputs,
                stopwatch=stopwatch,
                progress=update if training is None else None,
            )
        if stopwatch is not None:
            with stage(f"timing the pruned {architecture}"):
                times = (stopwatch.reference_ms, stopwatch(network))
            pruning = replace(pruning, milliseconds=times)
        report = PruneReport(
            model=architecture,
            importance=importance.name,
            target=request.target.text(request.target.amount),
            pruning=pruning,
            engine=None if stopwatch is None else stopwatch.description,
            notes=notes,
        )
    save_weights(network, target)
    if training is not None:
        training.forget()
    return Pruned(target, report)


class _Training:
    """What happens to a network between two steps of pruning.

    A checkpoint is named after all that it depends on, so one that is there need not be made again.
    """

    def __init__(
        self,
        request: PruneRequest,
        architecture: str,
        target: Path,
        device: str,
        workers: int | None,
    ) -> None:
        assert request.recipe is not None
        self._recipe = Recipe.read(request.recipe, model=architecture)
        self._teacher = None
        if self._recipe.distillation is not None:
            name = request.weights or request.model
            self._teacher = open_teacher(name, architecture, self._recipe.crop)
        self._steps = request.steps
        # Not what `edgeseg compress` calls the folder of its steps, which is to be kept.
        self._folder = target.with_name(f"{target.name}.steps")
        self._device, self._workers = device, workers

    def showing(self, update: Callable[[int, int], None]) -> Finetune:
        """Trains in place; ``update`` is called with the steps of all trainings."""

        def finetune(network: Network, step: int) -> None:
            key = hashlib.sha256(json.dumps(asdict(self._recipe), sort_keys=True).encode())
            for name, tensor in network.state_dict().items():
                key.update(name.encode() + tensor.numpy().tobytes())
            begin = self._folder / f"{step}-pruned-{key.hexdigest()[:16]}.pt"
            trained = self._folder / f"{step}-trained-{key.hexdigest()[:16]}.pt"
            if not trained.is_file():
                save_weights(network, begin)
                train(
                    self._recipe,
                    trained,
                    start=begin,
                    teacher=self._teacher,
                    device=self._device,
                    workers=self._workers,
                    report=lambda _: None,
                    progress=lambda done, of: update((step - 1) * of + done, self._steps * of),
                )
            load_weights(network, trained)

        return finetune

    def forget(self) -> None:
        """The result is written, and what led there is needed no more."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _size(
    request: PruneRequest, network: SemanticNetwork | InstanceNetwork, path: Path
) -> tuple[int, int]:
    """The network size: as asked for, or the bundle's, or the one that the model is made for."""
    if request.size is not None:
        size = parse_size(request.size, multiple=network.stride)
        if min(size) < network.smallest:
            raise RequestError(
                f"{request.model} takes sizes from {network.smallest}x{network.smallest} on, "
                f"and {request.size} came"
            )
        return size
    if path.suffix == ".onnx":
        spec = Bundle.open(path).spec
        return spec.height, spec.width
    published = definition_of(network).size
    if published is None:
        raise RequestError("the network size is missing; give --size HxW, such as --size 512x1024")
    return parse_size(published)


def _batches(pictures: Sequence[Tensor]) -> list[Tensor]:
    """``pictures`` (1, 3, H, W) in batches of two or more, each from all over the sequence."""
    # Neighbours look alike, and a batch norm that sees one value a picture would take them for all.
    count = max(len(pictures) // _BATCH, 1)
    return [torch.cat(list(pictures[first::count])) for first in range(count) if pictures]


def _importance(
    request: PruneRequest,
    network: SemanticNetwork | InstanceNetwork,
    spec: ModelSpec,
    inputs: Sequence[Tensor],
) -> Importance:
    if request.importance == "activation":
        return Activation(inputs)
    if request.importance == "bn":
        return BatchNormScale()
    if request.importance in ("l1", "l2"):
        return WeightNorm(int(request.importance[1]))
    if request.labels is None:
        return Taylor([own_loss(x, seed) for seed, x in enumerate(inputs)])
    return Taylor(_labelled(request.labels, request.frames, network, spec))


def _labelled(
    uri: str, count: int, network: SemanticNetwork | InstanceNetwork, spec: ModelSpec
) -> list[Loss]:
    """The cross entropy on ``count`` pictures of the split "train", spread evenly."""
    if isinstance(network, InstanceNetwork):
        raise RequestError(
            "labels are for models that give a class map; leave --labels out, and the derivatives "
            "are those of what the model itself says about the calibration frames"
        )
    dataset = open_dataset(uri, "train")
    if len(dataset.classes.names) != network.num_classes:
        raise RequestError(
            f"{uri} has {len(dataset.classes.names)} classes, and the model "
            f"{network.num_classes}; take labels of the same classes"
        )
    count = min(count, len(dataset))
    pictures, truths = [], []
    for index in range(count):
        sample = dataset.sample(index * len(dataset) // count)
        fitted = cv2.resize(sample.pixels, (spec.width, spec.height))
        labels = cv2.resize(
            sample.labels, (spec.width, spec.height), interpolation=cv2.INTER_NEAREST
        )
        pictures.append(network_input(np.asarray(fitted, np.uint8), spec.preprocessing))
        truths.append(torch.from_numpy(labels)[None])
    return [
        labelled_loss(x, truth, dataset.classes.ignore)
        for x, truth in zip(_batches(pictures), _batches(truths), strict=True)
    ]
