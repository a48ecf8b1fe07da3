"""Training: several data sets, one recipe, a checkpoint that can resume."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from edgeseg.errors import DataError, RequestError, WeightsError
from edgeseg.export.instance_training import InstanceTraining
from edgeseg.export.models import definition
from edgeseg.export.models.network import Network
from edgeseg.export.ranks import Ranks, chosen_device
from edgeseg.export.recipe import Recipe
from edgeseg.export.semantic_training import SemanticTraining
from edgeseg.export.training_task import Batch, Batches, TrainingTask, network_input
from edgeseg.export.trainlog import TrainLog
from edgeseg.export.weights import (
    check_writable,
    load_weights,
    save_checkpoint,
    save_weights,
)

if TYPE_CHECKING:
    from edgeseg.export.distill import Teacher

__all__ = ["train"]


class _Steps(Dataset[Any]):
    """A run's batches by number, for PyTorch's loader, whose processes prepare them ahead.

    A batch depends on the seed, its number and the rank alone, so a resumed run sees the same.
    """

    def __init__(self, batches: Batches[Any], seed: int, rank: int) -> None:
        self._batches = batches
        self._seed = (seed, rank)

    def __getitem__(self, number: int) -> Batch[Any] | Exception:
        seed, rank = self._seed
        try:
            return self._batches.drawn(np.random.default_rng((seed, number, rank)))
        except Exception as error:
            # An error that the loader carries from one process to another has a traceback in it.
            return error


def _alone(_: int) -> None:
    """Each process that prepares batches computes on one core, and starts no threads."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _loaded(
    task: TrainingTask[Any], seed: int, rank: int, first: int, workers: int
) -> Iterator[Batch[Any]]:
    """Batches from number ``first`` on, without end."""
    loader = DataLoader(
        _Steps(task.batches, seed, rank),
        batch_size=None,
        sampler=itertools.count(first),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_alone,
    )
    for item in loader:
        if isinstance(item, Exception):
            raise item
        yield item


def train(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    start: str | os.PathLike[str] | None = None,
    teacher: Teacher | None = None,
    validate: tuple[tuple[str, str], ...] = (),
    validate_every: int = 500,
    save_every: int = 100,
    minutes: float | None = None,
    device: str = "auto",
    workers: int | None = None,
    log: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Trains ``recipe`` and writes a checkpoint to ``output``; returns its path.

    ``start``: a checkpoint to begin from. ``teacher``: what the recipe's distillation learns from;
    one does not go without the other. ``validate``: (URI, split) pairs that are evaluated
    every ``validate_every`` steps, on 40 pictures each, and at the end on all; the network that was
    best on the first of them is kept as ``NAME.best.pt`` beside ``output`` ``NAME.pt``.
    ``minutes``: stop, and let the learning rate reach zero, by then; the number of steps is
    shortened to fit. ``device``: as `chosen_device` has it. ``workers``: processes that prepare
    batches, 0 for none; by default one, with a GPU one for each core but one, up to 8. ``log``: a
    folder for a `TrainLog`. ``progress``: called with (steps done, steps).

    Beside ``output`` stands ``output + .resume`` while the run lasts, written every ``save_every``
    steps; a run that was interrupted, however, goes on from it, on the same losses as if nothing
    had been (on a GPU up to rounding). Started by torchrun, all processes train one network, each
    on batches of its own.

    Raises RequestError for a recipe that cannot be, DataError for data that do not match or when
    the loss is no longer a number (the batch is kept and named), and WeightsError when ``start`` or
    the interrupted run cannot be read, or ``output`` cannot be written; that is found out before
    any work is done.
    """
    output = Path(output)
    kind = chosen_device(device)
    if (teacher is None) != (recipe.distillation is None):
        raise RequestError(
            "a teacher and a recipe with a table [distillation] go together; "
            + ("there is no teacher" if teacher is None else "the recipe has none")
        )
    check_writable(output)
    if workers is None:
        workers = 1 if kind.type == "cpu" else max(min((os.cpu_count() or 2) - 1, 8), 1)
    with Ranks.joined(kind) as ranks:
        run = _Run(recipe, output, start, teacher, validate, ranks.device(kind), ranks)
        lead = ranks.leads
        run.train(
            validate_every=validate_every,
            save_every=save_every,
            minutes=minutes,
            workers=workers,
            log=Path(log) if log is not None and lead else None,
            report=report if lead else _nothing,
            progress=progress if lead else None,
        )
    return output


def _nothing(_: str) -> None:
    """What all processes but one report."""


class _Run:
    """One network on its way; see ``train``."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        start: str | os.PathLike[str] | None,
        teacher: Teacher | None,
        validate: tuple[tuple[str, str], ...],
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self._recipe = recipe
        self._output = output
        self._device = device
        self._ranks = ranks
        torch.manual_seed(recipe.seed)
        entry = definition(recipe.model)
        self._preprocessing = entry.preprocessing
        self._task: TrainingTask[Any] = (
            SemanticTraining(recipe, validate, teacher)
            if entry.task == "semantic"
            else InstanceTraining(recipe, validate, teacher)
        )
        self._network = self._task.network
        if start is not None:
            load_weights(self._network, start)
        if recipe.distillation is not None and teacher is not None:
            # Training alone does without the onnx package.
            from edgeseg.export.distill import DistilledTask

            self._task = DistilledTask(
                self._task, teacher, recipe.distillation, _precision(recipe, device)
            )
        # In place. torch's stubs leave this argument out, and the next function untyped.
        self._network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._decay = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)  # type: ignore[no-untyped-call]
        self._average = torch.optim.swa_utils.AveragedModel(
            self._network, multi_avg_fn=self._decay, use_buffers=True
        )
        companions = self._task.companions
        self._companions = nn.Module() if companions is None else companions.to(device)
        self._optimizer = _optimizer(self._network, self._companions, recipe)
        self._type = _precision(recipe, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._type == torch.float16)
        self._first = 0
        self._spent = 0.0
        self._best = -math.inf
        self._resume = output.with_name(output.name + ".resume")
        if self._resume.exists():
            self._go_on(_read_resume(self._resume))

    def _go_on(self, state: dict[str, Any]) -> None:
        if state["recipe"] != self._description():
            raise RequestError(
                f"{self._resume} belongs to a run of another recipe; delete it to begin anew"
            )
        self._network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        self._companions.load_state_dict(state["companions"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._first, self._spent = int(state["step"]), float(state["seconds"])
        self._best = float(state["best"])

    def train(
        self,
        *,
        validate_every: int,
        save_every: int,
        minutes: float | None,
        workers: int,
        log: Path | None,
        report: Callable[[str], None],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """All steps, and the checkpoint at the end."""
        recipe, ranks = self._recipe, self._ranks
        step = self._first
        if step:
            report(f"resuming at step {step}")
        student: nn.Module = self._network
        if ranks.count > 1:
            student = nn.parallel.DistributedDataParallel(self._network)
        began = time.monotonic() - self._spent
        smooth = math.nan
        batches = _loaded(self._task, recipe.seed, ranks.rank, step * recipe.accumulate, workers)
        with contextlib.ExitStack() as stack:
            stack.callback(batches.close)  # type: ignore[attr-defined]
            table = None if log is None else stack.enter_context(TrainLog(log, step))
            while True:
                seconds = time.monotonic() - began
                share = step / recipe.steps
                if minutes is not None:
                    share = max(share, ranks.agreed(seconds / (60 * minutes), self._device))
                if share >= 1:
                    break
                rate = recipe.learning_rate * (1 - share) ** recipe.power
                rate *= min(1.0, (step + 1) / max(recipe.warmup, 1))
                parts = self._step(student, batches, step, rate)
                value = sum(parts.values())
                smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
                step += 1
                seconds = time.monotonic() - began
                if progress is not None:
                    progress(step, recipe.steps)
                if table is not None:
                    losses = {f"loss/{name}": part for name, part in parts.items()}
                    table.write(step, seconds, {"loss": value, **losses, "rate": rate})
                if step % 50 == 0:
                    shown = "  ".join(f"{name} {part:.3f}" for name, part in parts.items())
                    report(
                        f"step {step}  loss {smooth:.4f}  rate {rate:.2e}  "
                        f"{seconds / step:.2f} s/step  ({shown})"
                    )
                if step % save_every == 0 or step % validate_every == 0:
                    self._save(step, seconds)
                if step % validate_every == 0:
                    self._validate(step, seconds, 40, report, table)
            self._validate(step, time.monotonic() - began, None, report, table)
        if ranks.leads:
            save_weights(self._averaged(), self._output)
            self._resume.unlink(missing_ok=True)
            report(f"{step} steps; {self._output}")

    def _step(
        self, student: nn.Module, batches: Iterator[Batch[Any]], step: int, rate: float
    ) -> dict[str, float]:
        """One step of the optimizer; returns the parts of the loss, means over its batches."""
        recipe = self._recipe
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._network.train()
        self._optimizer.zero_grad(set_to_none=True)
        found: dict[str, float] = {}
        for turn in range(recipe.accumulate):
            batch = next(batches)
            # Dropout and the like depend on the same numbers alone as the batches do. The loader
            # has drawn from this generator when it began.
            number = step * recipe.accumulate + turn
            torch.manual_seed(
                (recipe.seed * 1_000_003 + number) * self._ranks.count + self._ranks.rank
            )
            x = network_input(batch.images.to(self._device), self._preprocessing)
            last = turn + 1 == recipe.accumulate
            with contextlib.nullcontext() if last else _unsynchronised(student):
                with torch.autocast(
                    self._device.type,
                    dtype=self._type or torch.bfloat16,
                    enabled=self._type is not None,
                ):
                    heads = student(x)
                losses = self._task.losses(heads, batch, self._device)
                loss = torch.stack(list(losses.values())).sum() / recipe.accumulate
                values = [float(part) for part in torch.stack([*losses.values()]).tolist()]
                if not all(map(math.isfinite, values)):
                    raise DataError(self._not_finite(batch, step, sum(values)))
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            for name, value in zip(losses, values, strict=True):
                found[name] = found.get(name, 0.0) + value / recipe.accumulate
        self._ranks.mean_gradients(self._companions)
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._network.parameters(), 5.0)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average.update_parameters(self._network)
        return found

    def _not_finite(self, batch: Batch[Any], step: int, value: float) -> str:
        """Keeps the batch; says what happened."""
        kept = self._output.with_name(f"{self._output.name}.batch-{step}")
        save_checkpoint(asdict(batch), kept)
        return (
            f"the loss is {value} at step {step}; lower learning_rate in the recipe, or look at "
            f"the batch, which is kept in {kept}"
        )

    def _validate(
        self,
        step: int,
        seconds: float,
        limit: int | None,
        report: Callable[[str], None],
        table: TrainLog | None,
    ) -> None:
        if not self._ranks.leads:
            return
        scores = self._task.scores(_on_cpu(self._averaged()), limit)
        for score in scores:
            report(f"  {score.text}")
        if table is not None:
            table.write(step, seconds, {score.name: score.value for score in scores})
        # Those of the end are of other pictures, and not to be compared with.
        if limit is not None and scores and scores[0].value > self._best:
            self._best = scores[0].value
            save_weights(
                self._averaged(),
                self._output.with_name(f"{self._output.stem}.best{self._output.suffix}"),
            )

    def _averaged(self) -> Network:
        return cast(Network, self._average.module)

    def _description(self) -> str:
        return json.dumps(asdict(self._recipe), sort_keys=True)

    def _save(self, step: int, seconds: float) -> None:
        if not self._ranks.leads:
            return
        state = {
            "recipe": self._description(),
            "network": self._network.state_dict(),
            "average": self._average.state_dict(),
            "companions": self._companions.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "step": step,
            "seconds": seconds,
            "best": self._best,
        }
        save_checkpoint(state, self._resume)


def _on_cpu(network: Network) -> Network:
    """``network`` where evaluation runs, in eval mode; a copy if it is on a GPU."""
    if next(network.parameters()).device.type != "cpu":
        network = copy.deepcopy(network).cpu()
    return network.eval()


def _unsynchronised(student: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While gradients are only gathered, processes need not exchange them."""
    if isinstance(student, nn.parallel.DistributedDataParallel):
        return student.no_sync()
    return contextlib.nullcontext()


def _precision(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """What activations are computed in, None for float32."""
    if not recipe.mixed_precision:
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def _optimizer(network: Network, companions: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = _parameter_groups(network, recipe)
    if any(True for _ in companions.parameters()):
        groups.append({"params": list(companions.parameters()), "weight_decay": 0.0})
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


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
