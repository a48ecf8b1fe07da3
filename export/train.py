"""Training of the semantic models: several data sets, one recipe, a checkpoint that can resume."""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from edgeseg.classes import ClassList
from edgeseg.dataset import Dataset, open_dataset
from edgeseg.errors import DataError, RequestError, WeightsError
from edgeseg.export.augment import Augmentation
from edgeseg.export.losses import ohem_cross_entropy
from edgeseg.export.models import create_semantic, definition
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.export.preprocess import evaluate_network
from edgeseg.export.weights import load_weights, save_checkpoint, save_weights
from edgeseg.tomlfile import read_toml

__all__ = ["Recipe", "train"]


@dataclass(frozen=True)
class Source:
    """One data set of a recipe: its URI, its split, and how many samples of each batch it gives.

    ``augment``: how much of the recipe's scale, aspect and colour changes its samples get, 0 to 1.
    """

    uri: str
    share: int
    split: str = "train"
    augment: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run, apart from the machine.

    ``sources`` add up to the batch. ``crop`` is (height, width) in pixels; ``full_height`` the
    height at which a whole picture counts as scale 1. ``learning_rate`` falls to zero as
    ``(1 - step / steps) ** power`` after ``warmup`` steps of linear rise. ``average`` is the decay
    of the weights' exponential moving average, which is what is evaluated and saved.
    ``class_weights`` raises rare classes by ``frequency ** -class_weights``, clipped to 0.5-5.
    """

    model: str
    sources: tuple[Source, ...]
    steps: int
    crop: tuple[int, int] = (288, 384)
    full_height: int = 384
    scale: tuple[float, float] = (0.6, 1.8)
    aspect: float = 1.3
    colour: float = 0.5
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    power: float = 0.9
    warmup: int = 100
    average: float = 0.998
    class_weights: float = 0.5
    auxiliary_heads: bool = False
    mixed_precision: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise RequestError("a recipe names at least one [[source]], and this one has none")
        if any(not isinstance(source.share, int) or source.share < 1 for source in self.sources):
            raise RequestError("the share of a source is a whole number of samples, 1 or more")
        if any(not 0 <= source.augment <= 1 for source in self.sources):
            raise RequestError("the augment of a source is between 0 and 1")
        if self.batch < 2:
            raise RequestError(
                "batch norm needs batches of two samples or more, "
                f"and the shares add up to {self.batch}; raise a source's share"
            )
        if self.steps < 1:
            raise RequestError(f"a recipe has at least one step, and {self.steps} came")
        entry = definition(self.model)
        if entry.task != "semantic":
            raise RequestError(
                f"a recipe trains networks that give a class map, and {self.model} finds objects"
            )
        stride = entry.network.stride
        if len(self.crop) != 2 or min(self.crop) < stride or any(n % stride for n in self.crop):
            raise RequestError(
                f"{self.model} trains on crops of [height, width], both multiples of {stride}, "
                f"and {list(self.crop)} came"
            )

    @property
    def batch(self) -> int:
        """Samples of one step."""
        return sum(source.share for source in self.sources)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a TOML file; RequestError names what is missing or unknown in it."""
        values = read_toml(path)
        try:
            sources = tuple(Source(**entry) for entry in values.pop("source", []))
            for key in ("crop", "scale"):
                if key in values:
                    values[key] = tuple(values[key])
            return cls(sources=sources, **values)
        except TypeError as error:
            raise RequestError(f"the recipe {path} does not fit: {error}") from error


def _class_weights(datasets: list[Dataset], power: float, rng: np.random.Generator) -> Tensor:
    """(classes,) weights from the label frequencies of up to 100 samples of every data set."""
    classes = datasets[0].classes
    counts = np.zeros(len(classes.names), dtype=np.float64)
    for dataset in datasets:
        for index in rng.choice(len(dataset), size=min(100, len(dataset)), replace=False):
            labels = dataset.sample(int(index)).labels
            counts += np.bincount(labels.ravel(), minlength=256)[: len(counts)]
    if not counts.any():
        raise DataError(
            f"no pixel of {', '.join(data.title for data in datasets)} has a label to learn from"
        )
    share = np.maximum(counts / counts.sum(), 1e-4)
    weights = np.clip((share * len(counts)) ** -power, 0.5, 5.0)
    return torch.from_numpy(weights.astype(np.float32))


class _Batches:
    """Endless batches, prepared ahead by threads; (images, labels) as uint8 tensors."""

    def __init__(
        self, datasets: list[Dataset], recipe: Recipe, first_step: int, workers: int = 1
    ) -> None:
        self._datasets = datasets
        self._recipe = recipe
        full = Augmentation(
            crop=recipe.crop,
            full_height=recipe.full_height,
            scale=recipe.scale,
            aspect=recipe.aspect,
            colour=recipe.colour,
        )
        self._augment = [full.weakened(source.augment) for source in recipe.sources]
        self._stop = threading.Event()
        self._queues: list[queue.Queue[tuple[Tensor, Tensor] | BaseException]] = [
            queue.Queue(maxsize=2) for _ in range(workers)
        ]
        self._threads = [
            threading.Thread(
                target=self._fill, args=(slot, first_step), name=f"batches-{slot}", daemon=True
            )
            for slot in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        # A batch depends on the seed and the step alone, so a resumed run sees the same ones.
        rng = np.random.default_rng((self._recipe.seed, step))
        images, labels = [], []
        for dataset, source, augment in zip(
            self._datasets, self._recipe.sources, self._augment, strict=True
        ):
            for _ in range(source.share):
                sample = dataset.sample(int(rng.integers(len(dataset))))
                pixels, truth = augment(sample.pixels, sample.labels, dataset.classes.ignore, rng)
                images.append(pixels)
                labels.append(truth)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))

    def _fill(self, slot: int, first_step: int) -> None:
        step = first_step + slot
        while not self._stop.is_set():
            item: tuple[Tensor, Tensor] | BaseException
            try:
                item = self._batch(step)
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queues[slot].put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += len(self._queues)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for slot in self._queues:
                item = slot.get()
                if isinstance(item, BaseException):
                    raise item
                yield item

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=5)


def train(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    start: str | os.PathLike[str] | None = None,
    validate: tuple[tuple[str, str], ...] = (),
    validate_every: int = 500,
    minutes: float | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains ``recipe`` and writes a checkpoint to ``output``; returns its path.

    ``start``: a checkpoint to begin from. ``validate``: (URI, split) pairs that are evaluated
    every ``validate_every`` steps. ``minutes``: stop, and let the learning rate reach zero, by
    then; the number of steps is shortened to fit. Beside ``output`` stands ``output + .resume``
    while the run lasts; a run that was interrupted goes on from it.

    Raises RequestError for a recipe that cannot be, DataError for data that do not match or when
    the loss is no longer a number, and WeightsError when ``start`` or the interrupted run cannot be
    read, or ``output`` cannot be written; that is found out before any work is done.
    """
    output = Path(output)
    _check_writable(output)
    torch.manual_seed(recipe.seed)
    datasets = [open_dataset(source.uri, source.split) for source in recipe.sources]
    classes = _common_classes(datasets)
    checks = [open_dataset(uri, split) for uri, split in validate]
    network = create_semantic(
        recipe.model, len(classes.names), auxiliary_heads=recipe.auxiliary_heads
    )
    if start is not None:
        load_weights(network, start)
    # In place. torch's stubs leave this argument of Module.to out, and the next function untyped.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=decayed, use_buffers=True)
    optimizer = torch.optim.AdamW(_parameter_groups(network, recipe), lr=recipe.learning_rate)
    weights = _class_weights(datasets, recipe.class_weights, np.random.default_rng(recipe.seed))
    preprocessing = definition(recipe.model).preprocessing
    resume = output.with_name(output.name + ".resume")
    first = 0
    spent = 0.0
    if resume.exists():
        state = _read_resume(resume)
        if state["recipe"] != json.dumps(asdict(recipe), sort_keys=True):
            raise RequestError(
                f"{resume} belongs to a run of another recipe; delete it to begin anew"
            )
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = int(state["step"]), float(state["seconds"])
        report(f"resuming at step {first}")

    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    size = _validation_size(recipe, network.stride)
    began = time.monotonic() - spent
    batches = _Batches(datasets, recipe, first)
    smooth = math.nan
    step = first
    try:
        for images, labels in batches:
            progress = step / recipe.steps
            if minutes is not None:
                progress = max(progress, (time.monotonic() - began) / (60 * minutes))
            if progress >= 1:
                break
            rate = recipe.learning_rate * (1 - progress) ** recipe.power
            rate *= min(1.0, (step + 1) / max(recipe.warmup, 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = images.permute(0, 3, 1, 2).float().div_(255)
            if preprocessing.order == "rgb":
                x = x.flip(1)
            x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
            # Dropout depends on the seed and the step alone, as the batches do.
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            network.train()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.mixed_precision):
                logits = network(x)
            heads = logits if isinstance(logits, tuple) else (logits,)
            truth = labels.long()
            losses = [
                ohem_cross_entropy(head, truth, ignore=classes.ignore, class_weights=weights)
                for head in heads
            ]
            loss = torch.stack(losses).sum()
            value = float(losses[0].detach())
            if not math.isfinite(value):
                raise DataError(
                    f"the loss is {value} at step {step}; lower learning_rate in the recipe"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            average.update_parameters(network)
            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            step += 1
            if step % 50 == 0:
                report(
                    f"step {step}  loss {smooth:.4f}  rate {rate:.2e}  "
                    f"{(time.monotonic() - began) / (step or 1):.2f} s/step"
                )
            if step % validate_every == 0:
                _save_resume(resume, recipe, network, average, optimizer, step, began)
                _report_validation(average, checks, size, report, limit=40)
    finally:
        batches.close()
    _report_validation(average, checks, size, report, limit=None)
    save_weights(_averaged(average), output)
    resume.unlink(missing_ok=True)
    report(f"{step} steps; {output}")
    return output


def _check_writable(output: Path) -> None:
    """Makes the folder of ``output``; WeightsError when no file can be written there."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(
            f"the checkpoint {output} cannot be written ({error.strerror})"
        ) from error
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        what = "it is a folder" if output.is_dir() else f"{output.parent} is no writable folder"
        raise WeightsError(f"the checkpoint {output} cannot be written: {what}")


def _validation_size(recipe: Recipe, stride: int) -> tuple[int, int]:
    """Network size for validation: ``full_height`` high, 5 to 4 wide, both to the next stride."""
    return (
        max(round(recipe.full_height / stride), 1) * stride,
        max(round(recipe.full_height * 1.25 / stride), 1) * stride,
    )


def _averaged(average: torch.optim.swa_utils.AveragedModel) -> SemanticNetwork:
    return cast(SemanticNetwork, average.module)


def _common_classes(datasets: list[Dataset]) -> ClassList:
    classes = datasets[0].classes
    for dataset in datasets[1:]:
        if dataset.classes != classes:
            raise DataError(
                f"{datasets[0].title} has the classes {', '.join(classes.names)} and "
                f"{dataset.title} has {', '.join(dataset.classes.names)}; "
                "one model needs one list"
            )
    return classes


def _parameter_groups(network: SemanticNetwork, recipe: Recipe) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only; biases and batch norms go without."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _read_resume(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:
        # torch.load raises whatever its unpickler or zip reader meets first.
        raise WeightsError(f"{path} is damaged or cut short; delete it to begin anew") from error
    return state


def _save_resume(
    path: Path,
    recipe: Recipe,
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    began: float,
) -> None:
    state = {
        "recipe": json.dumps(asdict(recipe), sort_keys=True),
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": time.monotonic() - began,
    }
    save_checkpoint(state, path)


def _report_validation(
    average: torch.optim.swa_utils.AveragedModel,
    checks: list[Dataset],
    size: tuple[int, int],
    report: Callable[[str], None],
    limit: int | None,
) -> None:
    for dataset in checks:
        confusion = evaluate_network(_averaged(average), dataset, size, limit=limit)
        iou = confusion.per_class_iou()
        named = " ".join(
            f"{name} {value:.3f}" for name, value in zip(dataset.classes.names, iou, strict=True)
        )
        report(f"  {dataset.title}: mIoU {confusion.miou():.4f}  {named}")
