"""Every model that can be pruned, through to an engine, which gives what PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("torch_pruning", reason="pruning needs torch-pruning")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import torch

from edgeseg.bundle import Bundle
from edgeseg.export.importance import WeightNorm
from edgeseg.export.latency import bare_spec
from edgeseg.export.models import DEFINITIONS, InstanceNetwork, Network, SemanticNetwork, create
from edgeseg.export.onnx import export_network
from edgeseg.export.prune import Target, prune
from edgeseg.export.verify import InstanceComparison, verify
from edgeseg.export.weights import load_weights

PRUNABLE = [name for name, entry in DEFINITIONS.items() if entry.network.prunable]
QUICK = ("fchardnet70", "yolact_resnet18")
MODELS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRUNABLE
]


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_runs_on_every_engine(
    name: str, lively: Callable[[Network, int], Network], tmp_path: Path
) -> None:
    network = lively(create(name, 5, auxiliary_heads=True), 3)
    size = (128, 192)
    found = prune(network, Target("macs", 0.5), WeightNorm(2), size=size)
    before, after = found.costs
    assert after.macs <= 0.5 * before.macs
    again = load_weights(create(name, 5), network.state_dict())
    assert isinstance(again, SemanticNetwork | InstanceNetwork)
    spec = bare_spec(again, size)
    export_network(again, spec).write(tmp_path / "model.onnx")
    pictures = [np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)]
    # EngineError if an engine gives anything else.
    verification = verify(again, Bundle.open(tmp_path / "model.onnx"), pictures, "noise")
    for comparison in verification.comparisons:
        if isinstance(comparison, InstanceComparison):
            assert comparison.matched == comparison.found == comparison.expected
        else:
            assert comparison.beyond_ties == 0
    with torch.no_grad():
        again(torch.zeros(1, 3, *size))
