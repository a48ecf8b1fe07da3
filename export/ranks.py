"""The processes that train one network together, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn

from edgeseg.errors import RequestError

__all__ = ["Ranks", "chosen_device"]


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``count``, and its number on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that reports, evaluates and writes."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device) -> Iterator[Ranks]:
        """All processes, connected while the context lasts; alone unless torchrun started this.

        NCCL connects GPUs and Gloo CPUs, both PyTorch's own.
        """
        if not distributed.is_torchelastic_launched():
            yield cls()
            return
        local = int(os.environ["LOCAL_RANK"])
        if device.type == "cuda":
            torch.cuda.set_device(local)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield cls(distributed.get_rank(), distributed.get_world_size(), local)
        finally:
            distributed.destroy_process_group()

    def device(self, kind: torch.device) -> torch.device:
        """Which device of ``kind`` this process uses."""
        return torch.device("cuda", self.local) if kind.type == "cuda" else kind

    def mean_gradients(self, module: nn.Module) -> None:
        """Gives the parameters of ``module`` the mean of all processes' gradients."""
        for parameter in module.parameters() if self.count > 1 else ():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.count

    def agreed(self, value: float, device: torch.device) -> float:
        """``value`` as the leading process has it."""
        if self.count == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.broadcast(told, 0)
        return float(told)


def chosen_device(name: str) -> torch.device:
    """The device that ``name`` means: "cpu", "cuda", or "auto", a GPU if PyTorch can use one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise RequestError(f"the device is auto, cpu or cuda, and {name!r} came")
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "cuda was asked for, and this PyTorch finds no GPU; install the CUDA build of torch, "
            "or train on the CPU"
        )
    return torch.device(name)
