"""Graphs that look at each picture at several sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from torch.nn import functional

from edgeseg.bundle import Bundle
from edgeseg.cli import main
from edgeseg.errors import RequestError
from edgeseg.export import package
from edgeseg.export.models import SemanticNetwork, create, create_semantic
from edgeseg.export.onnx import weights_of_bundle
from edgeseg.export.package import ExportRequest, export_bundle
from edgeseg.export.views import ViewedNetwork, parse_views

Lively = Callable[[SemanticNetwork, int], SemanticNetwork]


@pytest.fixture
def network(tiny_definition: str, lively: Lively) -> SemanticNetwork:
    return lively(create_semantic(tiny_definition, 11), 1)


@torch.inference_mode()
def test_logits_are_the_mean_of_the_views(network: SemanticNetwork) -> None:
    x = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    viewed = ViewedNetwork(network, (0.5, 1, 1.3), (32, 48))
    looks = [
        network.low_resolution_logits(
            functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
        )
        for size in ((16, 24), (32, 48), (40, 64))
    ]
    assert viewed.sizes == ((16, 24), (32, 48), (40, 64))
    grids = [
        functional.interpolate(look, size=(10, 16), mode="bilinear", align_corners=False).double()
        for look in looks
    ]
    found = viewed.low_resolution_logits(x)
    torch.testing.assert_close(found.double(), sum(grids) / 3, atol=1e-5, rtol=1e-5)
    whole = functional.interpolate(found, size=(32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(viewed(x), whole)


@torch.inference_mode()
def test_a_single_view_of_its_own_size_is_the_network(network: SemanticNetwork) -> None:
    x = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    # A size so near that it has the same multiples of the stride.
    viewed = ViewedNetwork(network, (1.01,), (32, 48))
    torch.testing.assert_close(viewed(x), network(x))


def test_corners_are_aligned_where_the_network_does_so() -> None:
    network = create("fchardnet70", 3)
    assert ViewedNetwork(network, (1, 2), (64, 64)).align_corners


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_VERIFIED", 3)
    monkeypatch.setattr(package, "_SHOWN", 2)


@pytest.mark.usefixtures("few_pictures")
def test_the_bundle_keeps_the_contract(
    network: SemanticNetwork, tiny_definition: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "mine.pt"
    torch.save({"state_dict": network.state_dict()}, checkpoint)
    request = ExportRequest(
        model=tiny_definition, weights=str(checkpoint), size="64x96", views=(0.75, 1.25)
    )
    made = export_bundle(request, tmp_path / "views")
    # Every engine gives the class maps of the averaged network.
    assert all(found.is_right for found in made.verification.comparisons)
    assert made.verification.comparisons
    bundle = Bundle.open(tmp_path / "views")
    assert (bundle.spec.height, bundle.spec.width) == (64, 96)
    assert bundle.manifest["provenance"]["views"] == [0.75, 1.25]
    # The weights are in the file once, under the names of the checkpoint.
    state = weights_of_bundle(tmp_path / "views")
    assert state is not None
    assert state.keys() == {
        name for name in network.state_dict() if not name.endswith("num_batches_tracked")
    }
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), network.state_dict()[name].numpy())
    graph = onnx.load(str(tmp_path / "views/model.onnx")).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 6
    # Without views, nothing is said of them, and the graph has one look.
    plain = export_bundle(
        ExportRequest(model=tiny_definition, weights=str(checkpoint), size="64x96"),
        tmp_path / "plain",
    )
    assert "views" not in json.loads((plain.bundle / "bundle.json").read_text())["provenance"]
    graph = onnx.load(str(tmp_path / "plain/model.onnx")).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 3


@pytest.mark.parametrize(
    ("text", "views"),
    [("0.75,1.33", (0.75, 1.33)), (" 1 , 2", (1.0, 2.0)), ("0.5", (0.5,)), ("4,0.25", (4.0, 0.25))],
)
def test_names_of_views(text: str, views: tuple[float, ...]) -> None:
    assert parse_views(text) == views


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' came"),
        ("flip", "'flip' came"),
        ("1,,2", "'' came"),
        ("nan", "nan came"),
        ("0", "0.25 to 4 times"),
        ("1,5", "0.25 to 4 times"),
        ("0.75,0.75", "0.75 came twice"),
        ("1", "leave the views out"),
    ],
)
def test_wrong_views(text: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_views(text)
    assert says in str(error.value)


def test_views_that_are_too_small(network: SemanticNetwork) -> None:
    network_class = type(network)
    before = network_class.smallest
    network_class.smallest = 16
    try:
        with pytest.raises(RequestError, match=r"at least 16 pixels each way .* one of 8 came"):
            ViewedNetwork(network, (0.25, 1), (32, 48))
    finally:
        network_class.smallest = before


@pytest.mark.usefixtures("few_pictures")
def test_views_are_for_models_that_edgeseg_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "yolact.pt"
    torch.save(create("yolact_mobilenetv2", 4).state_dict(), weights)
    with pytest.raises(RequestError, match="semantic models that EdgeSeg knows, and yolact_mobile"):
        export_bundle(
            ExportRequest(
                model="yolact_mobilenetv2", weights=str(weights), size="128x128", views=(0.5, 1)
            ),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
    code = main(["export", "streets", "--views", "1", "-o", str(tmp_path / "out")])
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert "leave the views out" in capsys.readouterr().err
