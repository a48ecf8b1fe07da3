"""From a checkpoint to a bundle, end to end, and nothing left behind where it fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import torch

from edgeseg.bundle import Bundle
from edgeseg.classes import CAMVID
from edgeseg.cli import main
from edgeseg.dataset import open_dataset
from edgeseg.errors import EngineError, RequestError, WeightsError
from edgeseg.export import package
from edgeseg.export.models import SemanticNetwork, create, create_semantic
from edgeseg.export.package import ExportRequest, export_bundle
from edgeseg.export.verify import verify
from edgeseg.export.weights import read_weights

Lively = Callable[[SemanticNetwork, int], SemanticNetwork]


def request(checkpoint: Path | str, **changes: Any) -> ExportRequest:
    """The small network, quick to export."""
    return replace(ExportRequest(model="tiny", weights=str(checkpoint), size="64x96"), **changes)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_definition: str, lively: Lively) -> Path:
    """Weights of the small network with CamVid's classes."""
    path = tmp_path / "mine.pt"
    torch.save({"state_dict": lively(create_semantic(tiny_definition, 11), 1).state_dict()}, path)
    return path


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve streets take longer to paint than all the rest."""
    monkeypatch.setattr(package, "_VERIFIED", 3)
    monkeypatch.setattr(package, "_SHOWN", 2)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_bundle(folder: Path, checkpoint: Path, architecture: str, frames: int) -> dict[str, Any]:
    """What every bundle that was made with ``--data`` holds; returns its bundle.json."""
    manifest: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == [
        "bundle.json",
        "model.onnx",
        "report.html",
    ]
    assert manifest["files"] == {
        name: sha256(folder / name) for name in ("model.onnx", "report.html")
    }
    provenance = manifest["provenance"]
    assert provenance["architecture"] == architecture
    assert provenance["checkpoint"] == {"file": checkpoint.name, "sha256": sha256(checkpoint)}
    assert {"python", "torch", "onnx", "onnxruntime", "numpy"} <= provenance["tools"].keys()
    assert manifest["verification"]["data"] == "CamVid val"
    assert manifest["verification"]["images"] == min(3, frames)
    assert manifest["verification"]["engines"]
    assert all(entry["beyond_ties"] == 0 for entry in manifest["verification"]["engines"])
    engine, reference = manifest["accuracy"]
    assert (engine["step"], reference["step"]) == ("export", "PyTorch")
    assert engine["frames"] == reference["frames"] == frames
    assert abs(engine["miou"] - reference["miou"]) <= 0.001
    assert set(engine["per_class"]) == set(CAMVID.names)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert folder.name in html
    assert "against PyTorch" in html
    return manifest


def test_a_checkpoint_becomes_a_bundle(checkpoint: Path, camvid: str, tmp_path: Path) -> None:
    target = tmp_path / "made" / "street"
    made = export_bundle(request(checkpoint, data=camvid), target, provenance={"recipe": "by hand"})
    manifest = check_bundle(target, checkpoint, "tiny", frames=5)
    assert manifest["name"] == "street"
    assert manifest["provenance"]["recipe"] == "by hand"
    assert manifest["provenance"]["weights_stored_as"] == "fp32"
    assert made.to_dict()["accuracy"] == manifest["accuracy"]
    bundle = Bundle.open(target)
    assert (bundle.spec.height, bundle.spec.width) == (64, 96)
    assert (bundle.spec.classes, bundle.spec.ignore) == (CAMVID.names, CAMVID.ignore)
    assert [path.name for path in target.parent.iterdir()] == ["street"]


def test_every_option_reaches_the_bundle(checkpoint: Path, camvid: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("a card")
    target = tmp_path / "street"
    names = tuple(f"thing {index}" for index in range(11))
    export_bundle(
        request(
            checkpoint,
            name="mine",
            classes=names,
            fit="letterbox",
            confidence=True,
            half_weights=True,
            size="32x64",
        ),
        target,
        extra_files=(card,),
        pictures=open_dataset(camvid, "val"),
    )
    bundle = Bundle.open(target)
    spec = bundle.spec
    assert (spec.name, spec.classes, spec.fit, spec.confidence) == (
        "mine",
        names,
        "letterbox",
        True,
    )
    assert (spec.height, spec.width) == (32, 64)
    assert bundle.manifest["provenance"]["weights_stored_as"] == "fp16"
    assert bundle.manifest["verification"]["data"] == "synthetic streets val"
    assert bundle.manifest["accuracy"] == []
    assert bundle.manifest["files"]["README.md"] == sha256(card)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bisenetv1", "bisenetv2"])
def test_the_real_models_go_all_the_way(
    architecture: str,
    camvid: str,
    lively: Lively,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tmp_path / "model.pth"
    network = lively(create_semantic(architecture, 11, auxiliary_heads=True), 2)
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, checkpoint)
    target = tmp_path / "street"
    code = main(
        [
            *("export", architecture, "--weights", str(checkpoint), "--size", "64x96"),
            *("--data", camvid, "-o", str(target), "--json", "-"),
        ]
    )
    assert code == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == str(target)
    check_bundle(target, checkpoint, architecture, frames=5)


def test_a_bundle_is_a_checkpoint_again(checkpoint: Path, camvid: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export_bundle(request(checkpoint, half_weights=True, data=camvid), first)
    export_bundle(request(first, size="32x32", half_weights=True, data=camvid), second)
    states = [read_weights(folder) for folder in (first, second)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    provenance = Bundle.open(second).manifest["provenance"]
    assert provenance["checkpoint"] == {
        "file": "model.onnx",
        "sha256": sha256(first / "model.onnx"),
    }


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": ({"model": "segnet"}, "bisenetv1, bisenetv2.*'segnet'"),
    "no weights": ({"weights": None}, "--weights"),
    "no size": ({"size": None}, "--size"),
    "a size that is none": ({"size": "big"}, "HEIGHTxWIDTH"),
    "a size between": ({"size": "62x96"}, "60x96 or 64x96"),
    "too few names": ({"classes": ("a", "b")}, "11 classes, and 2 names"),
    "too many names": ({"classes": tuple("abcdefghijkl")}, "11 classes, and 12 names"),
    "other names than the data": ({"classes": tuple("abcdefghijk")}, "has the classes sky"),
    "weights for the shipped model": ({"model": "streets"}, "comes with its weights"),
    "an unknown data set": ({"data": "voc:here"}, "camvid:DIR"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_wrong_request_leaves_nothing(
    case: str, checkpoint: Path, camvid: str, tmp_path: Path
) -> None:
    changes, words = BAD_REQUESTS[case]
    with pytest.raises(RequestError, match=words):
        export_bundle(request(checkpoint, **{"data": camvid, **changes}), tmp_path / "street")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pt"]


def test_a_place_that_is_no_bundle_is_left_as_it_is(
    checkpoint: Path, camvid: str, tmp_path: Path
) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "holiday.jpg").write_bytes(b"the only copy")
    with pytest.raises(RequestError, match="is no bundle"):
        export_bundle(request(checkpoint, data=camvid), target)
    assert [path.name for path in target.iterdir()] == ["holiday.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.pt", "photos"]
    with pytest.raises(RequestError, match="is no bundle"):
        export_bundle(request(checkpoint, data=camvid), checkpoint)
    assert checkpoint.is_file()


def test_an_older_bundle_is_replaced(checkpoint: Path, camvid: str, tmp_path: Path) -> None:
    target = tmp_path / "street"
    export_bundle(request(checkpoint, data=camvid), target)
    (target / "notes.txt").write_text("of the old one")
    export_bundle(request(checkpoint, data=camvid, size="32x32"), target)
    assert Bundle.open(target).spec.height == 32
    check_bundle(target, checkpoint, "tiny", frames=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.pt", "street"]


@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older one"])
def test_a_failed_verification_leaves_no_bundle(
    checkpoint: Path, camvid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    target = tmp_path / "street"
    if older:
        export_bundle(request(checkpoint, data=camvid), target)
        before = {path.name: path.read_bytes() for path in target.iterdir()}

    def spoiled(network: SemanticNetwork, *rest: Any, **options: Any) -> Any:
        with torch.no_grad():
            network.get_parameter("classify.bias")[:3] += 2
        return verify(network, *rest, **options)

    monkeypatch.setattr(package, "verify", spoiled)
    with pytest.raises(EngineError, match="does not give PyTorch's masks"):
        export_bundle(request(checkpoint, data=camvid, size="32x32"), target)
    names = ["mine.pt", "street"] if older else ["mine.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if older:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_weights_that_are_no_numbers_are_refused(
    checkpoint: Path, camvid: str, tmp_path: Path
) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    state["second.bn.running_var"][2] = float("nan")
    torch.save(state, checkpoint)
    with pytest.raises(WeightsError, match=r"no numbers, in 1 entries \(first second\.bn"):
        export_bundle(request(checkpoint, data=camvid), tmp_path / "street")
    assert not (tmp_path / "street").exists()


def test_the_shipped_model_is_copied_out(tmp_path: Path) -> None:
    assert main(["export", "streets", "-o", str(tmp_path / "copy")]) == 0
    shipped, copied = Bundle.open("streets"), Bundle.open(tmp_path / "copy")
    assert shipped.folder is not None
    assert copied.manifest == shipped.manifest
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (shipped.folder / path.name).read_bytes()


@pytest.mark.slow
def test_the_shipped_model_is_exported_at_another_size(tmp_path: Path, camvid: str) -> None:
    target = tmp_path / "small"
    code = main(["export", "streets", "--size", "96x128", "--data", camvid, "-o", str(target)])
    assert code == 0
    bundle, shipped = Bundle.open(target), Bundle.open("streets")
    assert (bundle.spec.height, bundle.spec.width) == (96, 128)
    assert bundle.spec.classes == shipped.spec.classes
    states = [read_weights(source) for source in (target, "streets")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_shipped_models_name_is_taken_as_weights(
    tmp_path: Path, camvid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only as far as the export itself, which is tested above.
    class Reached(Exception):
        pass

    def stop(network: SemanticNetwork, *_: object, **options: object) -> Any:
        shipped = Bundle.open("streets")
        assert options["source_sha256"] == sha256(shipped.model_path)
        assert np.isfinite(network.state_dict()["head.conv_out.1.weight"].numpy()).all()
        raise Reached

    monkeypatch.setattr(package, "export_network", stop)
    with pytest.raises(Reached):
        export_bundle(
            ExportRequest(model="bisenetv2", weights="streets", size="64x96", data=camvid),
            tmp_path / "again",
        )
    assert list(tmp_path.iterdir()) == []


def _cut(path: Path) -> None:
    torch.save(create("bisenetv2", 3).state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])


def _other(path: Path) -> None:
    torch.save(create("bisenetv1", 3).state_dict(), path)


def _whole(path: Path) -> None:
    torch.save(create("bisenetv2", 3).state_dict(), path)


@pytest.mark.parametrize(
    ("make", "size", "code", "words"),
    [
        (lambda path: None, "64x96", 1, ["weights.pt does not exist"]),
        (_cut, "64x96", 1, ["weights.pt cannot be read", "cut short"]),
        (_other, "64x96", 1, ["weights.pt is not of bisenetv2"]),
        (_whole, "100x200", 2, ["100x200", "96x192 or 128x224"]),
        (_whole, "64x97", 2, ["64x96 or 64x128"]),
        (_whole, "0x64", 2, ["between 1 and 16384"]),
    ],
    ids=["missing", "truncated", "another model", "a size between", "one side between", "zero"],
)
def test_the_command_line_says_what_is_wrong_in_a_sentence(
    make: Callable[[Path], None],
    size: str,
    code: int,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / "weights.pt"
    make(weights)
    before = sorted(path.name for path in tmp_path.iterdir())
    target = tmp_path / "street"
    arguments = ["export", "bisenetv2", "--weights", str(weights), "--size", size]
    assert main([*arguments, "-o", str(target)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("edgeseg: ")
    for word in words:
        assert word in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before
