"""Training: several data sets, one recipe, a checkpoint that can resume."""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeseg.errors import DataError, RequestError, WeightsError
from edgeseg.export.instance_training import InstanceTraining
from edgeseg.export.models import definition
from edgeseg.export.models.network import Network
from edgeseg.export.recipe import Recipe
from edgeseg.export.semantic_training import SemanticTraining
from edgeseg.export.training_task import Batch, TrainingTask
from edgeseg.export.weights import load_weights, save_checkpoint, save_weights
from edgeseg.spec import Preprocessing

__all__ = ["train"]


class _Batches:
    """Endless batches, prepared ahead by threads."""

    def __init__(
        self, task: TrainingTask[Any], seed: int, first_step: int, workers: int = 1
    ) -> None:
        self._task = task
        self._seed = seed
        self._stop = threading.Event()
        self._queues: list[queue.Queue[Batch[Any] | BaseException]] = [
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

    def _fill(self, slot: int, first_step: int) -> None:
        step = first_step + slot
        while not self._stop.is_set():
            item: Batch[Any] | BaseException
            try:
                # A batch depends on the seed and the step alone, so a resumed run sees the same.
                item = self._task.batch(np.random.default_rng((self._seed, step)))
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

    def __iter__(self) -> Iterator[Batch[Any]]:
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
    entry = definition(recipe.model)
    task: TrainingTask[Any] = (
        SemanticTraining(recipe, validate)
        if entry.task == "semantic"
        else InstanceTraining(recipe, validate)
    )
    network = task.network
    if start is not None:
        load_weights(network, start)
    device = torch.device("cpu")
    # In place. torch's stubs leave this argument of Module.to out, and the next function untyped.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=decayed, use_buffers=True)
    optimizer = torch.optim.AdamW(_parameter_groups(network, recipe), lr=recipe.learning_rate)
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

    began = time.monotonic() - spent
    batches = _Batches(task, recipe.seed, first)
    smooth = math.nan
    step = first
    try:
        for batch in batches:
            progress = step / recipe.steps
            if minutes is not None:
                progress = max(progress, (time.monotonic() - began) / (60 * minutes))
            if progress >= 1:
                break
            rate = recipe.learning_rate * (1 - progress) ** recipe.power
            rate *= min(1.0, (step + 1) / max(recipe.warmup, 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = _network_input(batch.images, entry.preprocessing)
            # Dropout depends on the seed and the step alone, as the batches do.
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            network.train()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.mixed_precision):
                found = network(x)
            losses = task.losses(found, batch.truth, device)
            loss = torch.stack(list(losses.values())).sum()
            value = float(loss.detach())
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
                parts = "  ".join(f"{name} {float(part):.3f}" for name, part in losses.items())
                report(
                    f"step {step}  loss {smooth:.4f}  rate {rate:.2e}  "
                    f"{(time.monotonic() - began) / (step or 1):.2f} s/step  ({parts})"
                )
            if step % validate_every == 0:
                _save_resume(resume, recipe, network, average, optimizer, step, began)
                _report_scores(task, average, report, limit=40)
    finally:
        batches.close()
    _report_scores(task, average, report, limit=None)
    save_weights(_averaged(average), output)
    resume.unlink(missing_ok=True)
    report(f"{step} steps; {output}")
    return output


def _network_input(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, H, W, 3) uint8 BGR -> (N, 3, H, W) float32, normalised as the network expects."""
    x = images.permute(0, 3, 1, 2).float().div_(255)
    if preprocessing.order == "rgb":
        x = x.flip(1)
    mean = torch.tensor(preprocessing.mean, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=x.device).view(1, 3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


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


def _averaged(average: torch.optim.swa_utils.AveragedModel) -> Network:
    found: Network = average.module
    return found


def _parameter_groups(network: Network, recipe: Recipe) -> list[dict[str, Any]]:
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


def _report_scores(
    task: TrainingTask[Any],
    average: torch.optim.swa_utils.AveragedModel,
    report: Callable[[str], None],
    limit: int | None,
) -> None:
    for score in task.scores(_averaged(average), limit):
        report(f"  {score.text}")
