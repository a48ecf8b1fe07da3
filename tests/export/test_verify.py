"""The proof that a graph is its network, and that it sees when it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.engine import available_engines
from edgeseg.errors import EngineError, RequestError
from edgeseg.export.models import SemanticNetwork
from edgeseg.export.verify import TIE, Comparison, verify

if TYPE_CHECKING:
    from tests.export.conftest import Exportation

Export = Callable[..., "Exportation"]

#: engine and head of every comparison, in order
RUNS = [
    (engine, head)
    for engine in available_engines()
    for head in ("in the graph", *(["compiled"] if kernels.available() else []))
]


def pictures(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


@pytest.mark.parametrize("model", ["bisenetv1", "bisenetv2", "tiny"])
def test_a_true_export_passes_on_every_engine(exported: Export, model: str) -> None:
    made = exported(model)
    seen: list[tuple[int, int]] = []
    found = verify(
        made.network,
        Bundle.open(made.path),
        pictures((64, 96), (50, 70)),
        "noise",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(entry.engine, entry.head) for entry in found.comparisons] == RUNS
    assert seen == [(done, len(RUNS)) for done in range(1, len(RUNS) + 1)]
    for entry in found.comparisons:
        assert isinstance(entry, Comparison)
        assert entry.pixels == 2 * 64 * 96
        assert entry.beyond_ties == 0
        assert entry.largest_margin <= TIE
        assert entry.differing < 20
    assert found.to_dict()["images"] == 2
    assert "compared with PyTorch on 2 pictures of noise" in found.render()


def copy_of(network: SemanticNetwork) -> SemanticNetwork:
    """A network of its own with the same weights."""
    again = type(network)(network.num_classes).eval()
    again.load_state_dict(network.state_dict())
    return again


@pytest.mark.parametrize("key", ["first.conv.weight", "second.bn.running_mean", "classify.bias"])
def test_another_weight_in_the_network_is_found(exported: Export, key: str) -> None:
    made = exported("tiny")
    other = copy_of(made.network)
    with torch.no_grad():
        other.state_dict()[key][:2] += 0.3
    with pytest.raises(EngineError, match="does not give PyTorch's masks") as caught:
        verify(other, Bundle.open(made.path), pictures((64, 96)), "noise")
    for engine, head in RUNS:
        assert f"{engine} (head {head})" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("amount", [0.2, 5.0], ids=["a little", "a lot"])
def test_another_weight_in_the_file_is_found(
    exported: Export, amount: float, tmp_path: Path
) -> None:
    # A lot is seen by the golden pair when the engine opens, a little by the comparison.
    made = exported("tiny")
    proto = onnx.load(made.path)
    for tensor in proto.graph.initializer:
        if tensor.name == "classify.weight":
            changed = numpy_helper.to_array(tensor).copy()
            changed[0] += amount
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save(proto, tmp_path / "tampered.onnx")
    with pytest.raises(EngineError, match=r"(?i)openvino|onnx ?runtime"):
        verify(made.network, Bundle.open(tmp_path / "tampered.onnx"), pictures((64, 96)), "noise")


def test_ties_are_counted_and_are_no_fault(exported: Export) -> None:
    made = exported("tiny")
    other = copy_of(made.network)
    with torch.no_grad():
        # Far below a tie's width, far above rounding: some pixels change sides.
        other.get_parameter("classify.bias")[::2] += TIE / 3
    found = verify(other, Bundle.open(made.path), pictures(*[(64, 96)] * 8), "noise")
    for entry in found.comparisons:
        assert isinstance(entry, Comparison)
        assert entry.differing > 0
        assert entry.beyond_ties == 0
        assert 0 < entry.largest_margin <= TIE


def test_logits_that_are_no_numbers_are_no_tie(exported: Export) -> None:
    made = exported("tiny")
    other = copy_of(made.network)
    with torch.no_grad():
        other.get_parameter("classify.bias")[3] = float("nan")
    with pytest.raises(EngineError, match="does not give PyTorch's masks"):
        verify(other, Bundle.open(made.path), pictures((64, 96)), "noise")


def test_one_class_has_no_rival(exported: Export) -> None:
    made = exported("tiny", num_classes=1)
    found = verify(made.network, Bundle.open(made.path), pictures((64, 96)), "noise")
    for entry in found.comparisons:
        assert isinstance(entry, Comparison) and entry.differing == 0


def test_nothing_to_look_at_proves_nothing(exported: Export) -> None:
    made = exported("tiny")
    with pytest.raises(RequestError, match="at least one picture"):
        verify(made.network, Bundle.open(made.path), [], "nothing")
