"""PyTorch in the place of an engine: what evaluation compares a bundle with."""

from __future__ import annotations

import time

import numpy as np

from edgeseg.engine.base import OneAtATime
from edgeseg.export.models import InstanceNetwork
from edgeseg.export.preprocess import network_input
from edgeseg.frame import Pixels
from edgeseg.instances import InstanceOutputs
from edgeseg.spec import ModelSpec

__all__ = ["TorchEngine"]


class TorchEngine(OneAtATime):
    """An instance network, in eval mode, that keeps the contract ``spec`` in plain PyTorch."""

    name = "torch"
    description = "PyTorch, eager"

    def __init__(self, network: InstanceNetwork, spec: ModelSpec) -> None:
        self._network = network
        self._spec = spec

    @property
    def spec(self) -> ModelSpec:
        """The contract."""
        return self._spec

    def run(self, pixels: Pixels) -> InstanceOutputs:
        """See ``Engine.run``."""
        start = time.perf_counter_ns()
        found = self._network.detect(
            network_input(pixels, self._spec.preprocessing), self._spec.capacity
        )
        return InstanceOutputs(
            boxes=found.boxes.numpy(),
            scores=found.scores.numpy(),
            labels=found.labels.numpy().astype(np.int32),
            masks=found.levels().numpy(),
            network_ns=time.perf_counter_ns() - start,
        )

    def close(self) -> None:
        """Nothing to give back."""
