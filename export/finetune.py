"""Quantization-aware fine-tuning: the integers of a quantized graph learn what the floats said.

Needs no labels: the teacher is the floating-point graph itself, on the frames that the model was
calibrated with, averaged over mirrored and resized views of each, which costs nothing on the device
and makes it a better teacher than one look. The student is the quantized graph, rounding included
(Jacob et al., arXiv:1712.05877), its activation scales learned as well (Esser et al.,
arXiv:1902.08153); what comes out is written to the same graph.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgeseg.calibration.calibrate import Calibrated, Stage, silent
from edgeseg.calibration.graph import Graph
from edgeseg.calibration.placement import Placement
from edgeseg.calibration.quantize import Scales, activation_scale, quantize, weight_scale
from edgeseg.calibration.recipe import Finetuning
from edgeseg.errors import CalibrationError
from edgeseg.export.torchgraph import TorchGraph
from edgeseg.frame import Pixels

__all__ = ["finetune", "teach", "train_integers"]

# Sizes of resized views are multiples of this, which suits every network here.
_STRIDE = 32
# What reading a kept file raises when it is not there, or not what was written.
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
)
# Steps between two saved states.
_KEPT_EVERY = 25


def teach(
    model: onnx.ModelProto,
    frames: Sequence[Pixels],
    views: Sequence[float] = (1.0, 1.333),
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What the floating-point ``model`` says of each frame, averaged over views.

    Returns probabilities (frames, classes, h, w) float16 at the size of the logits.
    CalibrationError for a model that takes one size only, if ``views`` has others than 1.
    """
    teacher = TorchGraph(model).eval()
    found = []
    with torch.no_grad():
        for index, pixels in enumerate(frames):
            size: tuple[int, int] | None = None
            total = torch.zeros(())
            for factor in (1.0, *(view for view in views if view != 1.0)):
                seen = _resized(pixels, factor)
                # Frame and mirror image, as one batch.
                logits = _asked(teacher, np.stack([seen, seen[:, ::-1]]), factor)
                logits = torch.stack([logits[0], logits[1].flip(2)])
                size = size or (logits.shape[2], logits.shape[3])
                if logits.shape[2:] != size:
                    logits = functional.interpolate(
                        logits, size, mode="bilinear", align_corners=False, antialias=True
                    )
                if factor != 1.0 or 1.0 in views:
                    total = total + logits.softmax(1).sum(0)
            found.append((total / total.sum(0, keepdim=True)).half())
            if progress is not None:
                progress(index + 1, len(frames))
    return torch.stack(found)


def _asked(teacher: TorchGraph, frames: NDArray[np.uint8], factor: float) -> Tensor:
    """The logits of (frames, height, width, 3) ``frames``, seen at ``factor``."""
    try:
        return _only(teacher(torch.from_numpy(frames)))
    except RuntimeError as error:
        if factor == 1.0:
            raise
        raise CalibrationError(
            f"the teacher looks at each frame also at {factor:g} times its size, and this model "
            f"takes one size only ({error}); fine-tune with views = [1.0]"
        ) from error


def train_integers(
    calibrated: Calibrated,
    frames: Sequence[Pixels],
    settings: Finetuning,
    *,
    floats: Sequence[str] = (),
    work: Path,
    stage: Stage = silent,
) -> Calibrated:
    """``calibrated`` after fine-tuning on ``frames``.

    The layers ``floats`` stay in floating point, and like all that is not quantized they are left
    as they are. What the teacher said and the state of the training are kept in ``work`` and taken
    from there by a later call of the same kind.
    """
    placement = calibrated.placement(floats)
    model = calibrated.graph.model
    with stage("asking the fp32 model") as update:
        wanted = _taught(model, frames, settings, work / "teacher.pt", update)
    with stage("fine-tuning") as update:
        graph, scales = finetune(
            calibrated.graph,
            placement,
            calibrated.scales(placement),
            frames,
            wanted,
            settings,
            resume=work / "finetune.pt",
            progress=lambda step, steps, loss: update(step, steps),
        )
    return calibrated.trained(graph, placement, scales)


def _taught(
    model: onnx.ModelProto,
    frames: Sequence[Pixels],
    settings: Finetuning,
    path: Path,
    update: Callable[[int, int], None],
) -> Tensor:
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    for pixels in frames:
        digest.update(np.ascontiguousarray(pixels).data)
    digest.update(repr(settings.views).encode())
    kept = _loaded(path, digest.hexdigest())
    if kept is not None:
        return cast(Tensor, kept["wanted"])
    wanted = teach(model, frames, settings.views, progress=update)
    _save(path, {"context": digest.hexdigest(), "wanted": wanted})
    return wanted


def finetune(
    graph: Graph,
    placement: Placement,
    scales: Scales,
    frames: Sequence[Pixels],
    wanted: Tensor,
    settings: Finetuning,
    *,
    resume: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Graph, Scales]:
    """``graph`` and ``scales`` after training towards ``wanted`` (what ``teach`` gave).

    ``resume``: a file that keeps the state every ``_KEPT_EVERY`` steps; a call with the same
    arguments goes on from it, with the same result. ``progress(step, steps, loss)``: the loss is
    the Kullback-Leibler divergence per position of the logits, in nats. Trained are the weights and
    biases of the layers of ``placement``, and the scales of its activations; those of weights
    follow the weights. CalibrationError when the training diverges.
    """
    model = quantize(graph, placement, scales, float_weights=True)
    student = TorchGraph(model, learn_scales=True, weight_scales="follow").train()
    trained = {name for layer in placement.layers for name in (layer.weight, layer.bias)}
    for name, weight in student.weights.items():
        weight.requires_grad_(name in trained)
    weights = {name: each for name, each in student.weights.items() if name in trained}
    sizes = _sizes(weights, placement)
    optimiser = torch.optim.Adam(
        [
            {"params": list(weights.values()), "lr": settings.learning_rate},
            {
                "params": list(student.scale_parameters.values()),
                "lr": settings.scale_learning_rate,
            },
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: _rate(step, settings.steps)
    )
    context = hashlib.sha256(
        model.SerializeToString(deterministic=True)
        + wanted.numpy().tobytes()
        + repr(settings).encode()
    ).hexdigest()
    first = 0
    kept = None if resume is None else _loaded(resume, context)
    if kept is not None:
        student.load_state_dict(kept["student"])
        optimiser.load_state_dict(kept["optimiser"])
        schedule.load_state_dict(kept["schedule"])
        first = int(kept["step"])
    order = _Order(len(frames), settings.seed)
    for step in range(settings.steps):
        chosen, mirrored = order.next(settings.batch)
        if step < first:
            continue
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision):
            logits = _only(student(_batch(frames, chosen, mirrored))).float()
        loss = divergence(logits, _targets(wanted, chosen, mirrored))
        if not torch.isfinite(loss):
            raise CalibrationError(
                f"fine-tuning diverged at step {step + 1} of {settings.steps}; take smaller "
                "learning rates, or leave it out"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        optimiser.step()
        _shrink_steps(weights, before, sizes)
        schedule.step()
        if progress is not None:
            progress(step + 1, settings.steps, float(loss.detach()))
        if resume is not None and (step + 1) % _KEPT_EVERY == 0:
            state = {
                "context": context,
                "step": step + 1,
                "student": student.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
            }
            _save(resume, state)
    student.write_back(model)
    return _taken(graph, placement, scales, Graph(model))


def _sizes(weights: Mapping[str, Tensor], placement: Placement) -> dict[str, Tensor]:
    """Root mean square of each output channel of a weight, and of a bias as a whole."""
    axes = {layer.weight: layer.axis for layer in placement.layers}
    found = {}
    for name, weight in weights.items():
        squares = weight.detach().square()
        whole = squares.mean()
        if name in axes:
            others = [axis for axis in range(weight.ndim) if axis != axes[name] % weight.ndim]
            squares = squares.mean(others, keepdim=True)
        else:
            squares = whole
        # A dead channel may come back to life, but slowly.
        found[name] = torch.maximum(squares, whole * 1e-6).sqrt()
    return found


def _shrink_steps(
    weights: Mapping[str, Tensor], before: Mapping[str, Tensor], sizes: Mapping[str, Tensor]
) -> None:
    """Makes the optimiser's last step relative to the size of what was changed.

    Adam changes every value by about the learning rate. Folded and equalized channels differ in
    size by orders of magnitude, and a step that one of them does not feel destroys another.
    """
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.lerp(before[name], weight, sizes[name].expand_as(weight)))


def _batch(frames: Sequence[Pixels], chosen: list[int], mirrored: list[bool]) -> Tensor:
    """(frames, height, width, 3) uint8."""
    pairs = zip(chosen, mirrored, strict=True)
    return torch.from_numpy(
        np.stack([frames[index][:, ::-1] if flip else frames[index] for index, flip in pairs])
    )


def _targets(wanted: Tensor, chosen: list[int], mirrored: list[bool]) -> Tensor:
    """(frames, classes, h, w) float32 probabilities."""
    pairs = zip(chosen, mirrored, strict=True)
    return torch.stack(
        [wanted[index].flip(2) if flip else wanted[index] for index, flip in pairs]
    ).float()


def _loaded(path: Path, context: str) -> dict[str, Any] | None:
    """What was saved at ``path`` for ``context``; None if there is no such thing."""
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        return content if content["context"] == context else None
    except _UNREADABLE:
        return None


def _save(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.part")
    try:
        torch.save(content, beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        raise CalibrationError(f"{path} cannot be written ({error})") from error


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(targets || softmax(logits)), mean over frames and positions, in nats.

    Both (frames, classes, h, w); ``targets`` are probabilities.
    """
    entropy = torch.special.xlogy(targets, targets).sum(1)
    cross = (targets * functional.log_softmax(logits, 1)).sum(1)
    loss: Tensor = (entropy - cross).mean()
    return loss


def _taken(
    graph: Graph, placement: Placement, scales: Scales, trained: Graph
) -> tuple[Graph, Scales]:
    """The trained numbers in the forms that ``quantize`` takes."""
    made = Graph(graph.model)
    for layer in placement.layers:
        for name in (layer.weight, layer.bias):
            if name is not None:
                made.put(name, trained.floats(name))
    return made, Scales(
        {group: float(trained.array(activation_scale(group))) for group in scales.activations},
        {layer.name: trained.floats(weight_scale(layer)) for layer in placement.layers},
    )


class _Order:
    """Frames in random order, each once before any comes again, half of them mirrored."""

    def __init__(self, count: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._count = count
        self._left: list[int] = []

    def next(self, batch: int) -> tuple[list[int], list[bool]]:
        chosen = []
        for _ in range(batch):
            if not self._left:
                self._left = [int(index) for index in self._rng.permutation(self._count)]
            chosen.append(self._left.pop())
        return chosen, [bool(flip) for flip in self._rng.integers(0, 2, batch)]


def _rate(step: int, steps: int) -> float:
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _resized(pixels: Pixels, factor: float) -> Pixels:
    if factor == 1.0:
        return pixels
    height, width = (max(round(side * factor / _STRIDE), 1) * _STRIDE for side in pixels.shape[:2])
    resized: Pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
    return resized


def _only(outputs: dict[str, Tensor]) -> Tensor:
    (logits,) = outputs.values()
    return logits
