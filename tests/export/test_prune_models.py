"""Every model that can be pruned, through to an engine, which gives what PyTorch gives."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("torch_pruning", reason="pruning needs torch-pruning")
pytest.importorskip("onnx", reason="the workstation side needs onnx")
pytest.importorskip("onnxruntime")

import onnxruntime
import torch
from onnx import TensorProto, helper

from edgeseg.export.importance import WeightNorm
from edgeseg.export.latency import bare_spec
from edgeseg.export.models import DEFINITIONS, InstanceNetwork, SemanticNetwork, create
from edgeseg.export.onnx import export_network
from edgeseg.export.preprocess import network_input
from edgeseg.export.prune import Target, prune
from edgeseg.export.weights import load_weights

PRUNABLE = [name for name, entry in DEFINITIONS.items() if entry.network.prunable]
QUICK = ("fchardnet70", "yolact_resnet18")
MODELS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRUNABLE
]
SIZE = (64, 96)


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_gives_the_same_in_onnx_runtime(name: str) -> None:
    torch.manual_seed(0)
    network = create(name, 5, auxiliary_heads=True)
    # With fresh weights numbers would grow or vanish from layer to layer; the norms prevent it.
    noise = torch.randn(2, 3, 128, 192)
    found = prune(network, Target("macs", 0.5), WeightNorm(2), size=SIZE, calibration=[noise])
    before, after = found.costs
    assert after.macs <= 0.5 * before.macs
    again = load_weights(create(name, 5), network.state_dict())
    assert isinstance(again, SemanticNetwork | InstanceNetwork)
    spec = bare_spec(again, SIZE)
    model = export_network(again, spec).model
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    names = [f"edgeseg.{each}" for each in getattr(again, "raw_names", ("logits",))]
    model.graph.output.extend(
        helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in names
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = session.run(names, {"image": pixels[None]})
    with torch.no_grad():
        x = network_input(pixels, spec.preprocessing)
        if isinstance(again, SemanticNetwork):
            wanted: tuple[torch.Tensor, ...] = (again.low_resolution_logits(x),)
        else:
            wanted = again.raw(x)
    for value, tensor in zip(values, wanted, strict=True):
        scale = float(tensor.abs().max())
        assert scale > 1e-3
        np.testing.assert_allclose(value, tensor.numpy(), rtol=0, atol=1e-3 * scale)
