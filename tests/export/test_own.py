"""A model of one's own, from its name on the command line to its masks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeseg.bundle import Bundle
from edgeseg.cli import main
from edgeseg.engine import cpu_engines, open_engine
from edgeseg.errors import RequestError
from edgeseg.export import package
from edgeseg.export.foreign import logits_of
from edgeseg.export.own import IMAGENET, OwnOptions
from edgeseg.onnxfile import HEAD
from edgeseg.result import Outputs
from edgeseg.spec import Preprocessing

HEIGHT, WIDTH = 32, 48
SIZE = f"{HEIGHT}x{WIDTH}"
CLASSES = "road,car,sky"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
NORMALISED = ["--mean", "0.5,0.4,0.3", "--std", "0.2,0.3,0.25"]

#: one module with every way to go wrong; ``own_models`` writes it beside the test
SOURCE = '''
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Logits at a quarter of the size; what becomes of them is `ending`'s business."""

    def __init__(self, num_classes=3, ending=lambda low, x: low):
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Conv2d(3, 8, 4, stride=4)
        self.last = nn.Conv2d(8, num_classes, 1)
        nn.init.normal_(self.last.weight, std=3)
        self.ending = ending

    def forward(self, x):
        return self.ending(self.last(torch.relu(self.first(x))), x)


def up(low, x, **how):
    return F.interpolate(low, size=x.shape[-2:], **{"mode": "bilinear", **how})


class Padded(nn.Module):
    """Something else than a convolution reads the picture."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(F.hardtanh(x, -9, 9))


def low(): return Net()
def corners(): return Net(ending=lambda low, x: up(low, x, align_corners=True))
def full(): return Net(ending=lambda low, x: {"out": up(low, x), "aux": low})
def soft(): return Net(ending=lambda low, x: (up(low, x).softmax(dim=1), low))
def soft_low(): return Net(ending=lambda low, x: low.softmax(dim=1))
def nearest(): return Net(ending=lambda low, x: up(low, x, mode="nearest"))
def bicubic(): return Net(ending=lambda low, x: up(low, x, mode="bicubic"))
def hidden(): return Net(ending=lambda low, x: SimpleNamespace(main=low.permute(0, 2, 3, 1)))
def one(): return Net(1)
def one_full(): return Net(1, ending=lambda low, x: torch.sigmoid(up(low, x)))
def one_low(): return Net(1, ending=lambda low, x: torch.sigmoid(low))
def one_inside(): return Net(1, ending=lambda low, x: up(torch.sigmoid(low), x))
def counted(num_classes): return Net(num_classes)
made = Net()

def unhide(result): return result.main.permute(0, 3, 1, 2)
def halve(result): return result[0]
def decide(result): return result.argmax(dim=1, keepdim=True)
threshold = 3

def wanting(width, num_classes=3): return Net(num_classes)
def failing(): raise RuntimeError("no weights here\\nsecond line")
def nothing(): return None
def flat(): return Net(ending=lambda low, x: low.mean(dim=(2, 3)))
def mapping(): return Net(ending=lambda low, x: {"scores": low})
def large(): return Net(ending=lambda low, x: F.interpolate(low, scale_factor=8.0))
def choosy():
    return Net(ending=lambda low, x: low.view(1, 3, 8, 12))
def branching():
    return Net(ending=lambda low, x: low if low.sum() > 0 else low + 1)
'''


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve streets take longer to paint than all the rest."""
    monkeypatch.setattr(package, "_VERIFIED", 2)
    monkeypatch.setattr(package, "_SHOWN", 1)


@pytest.fixture(autouse=True)
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory holds ``owned/nets.py``; what was imported of it is forgotten."""
    folder = tmp_path / "here"
    (folder / "owned").mkdir(parents=True)
    (folder / "owned" / "nets.py").write_text(SOURCE)
    (folder / "owned" / "broken.py").write_text("import no_such_library\n")
    (folder / "owned" / "faulty.py").write_text("1 / 0\n")
    monkeypatch.chdir(folder)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "owned"]:
        del sys.modules[name]


def own(attribute: str) -> Any:
    """An attribute of the module above."""
    import importlib

    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module("owned.nets"), attribute)
    finally:
        sys.path.pop(0)


def scores(result: torch.Tensor, *, align_corners: bool = False) -> torch.Tensor:
    """(1, C, h, w) at network size."""
    if result.shape[-2:] == (HEIGHT, WIDTH):
        return result
    return torch.nn.functional.interpolate(
        result, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=align_corners
    )


def picture(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def normalised(pixels: NDArray[np.uint8], order: str = "rgb", scale: float = 255.0) -> torch.Tensor:
    """By numpy in float64, without EdgeSeg: (1, 3, height, width) float32."""
    x = pixels.astype(np.float64)[..., ::-1] if order == "rgb" else pixels.astype(np.float64)
    x = (x / scale - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)[None])).float()


def check_masks(
    target: Path, wanted: Callable[[NDArray[np.uint8]], NDArray[np.float64]], seeds: int = 2
) -> None:
    """Every CPU engine gives the winner of ``wanted``'s scores (classes, height, width)."""
    bundle = Bundle.open(target)
    for engine_name in cpu_engines():
        engine = open_engine(bundle, engine_name)
        for seed in range(seeds):
            pixels = picture(seed)
            outputs = engine.run(pixels)
            assert isinstance(outputs, Outputs)
            found = wanted(pixels)
            best = np.sort(found, axis=0)
            sure = best[-1] - best[-2] > 1e-3 * np.ptp(found)
            assert sure.mean() > 0.9
            assert np.array_equal(outputs.class_map[sure], found.argmax(axis=0)[sure])
            assert len(np.unique(outputs.class_map)) > 1
        engine.close()


def resizes(target: Path) -> list[str]:
    """Op types in the graph that the head replaces."""
    graph = onnx.load(target / "model.onnx").graph
    return [
        node.op_type
        for node in graph.node
        if node.op_type in ("Resize", "Softmax", "Sigmoid", HEAD)
    ]


def export(model: str, *options: str, target: Path) -> int:
    return main(["export", model, "--size", SIZE, *options, "-o", str(target)])


WITHIN: dict[str, tuple[str, list[str], Callable[[Any], torch.Tensor], list[str]]] = {
    # name: (factory, options, what computes the scores of the result, ops left in the graph)
    "low logits": ("low", [], scores, [HEAD]),
    "corners are told": (
        "low",
        ["--align-corners"],
        lambda r: scores(r, align_corners=True),
        [HEAD],
    ),
    "corners are seen": ("corners", [], lambda r: r, [HEAD]),
    "upsampling in a mapping": ("full", [], lambda r: r["out"], [HEAD]),
    "softmax in a tuple": ("soft", [], lambda r: r[0], [HEAD]),
    "softmax below": ("soft_low", [], scores, ["Softmax", HEAD]),
    "nearest stays": ("nearest", [], lambda r: r, ["Resize", HEAD]),
    "an adapter": (
        "hidden",
        ["--adapter", "owned.nets:unhide"],
        lambda r: scores(r.main.permute(0, 3, 1, 2)),
        [HEAD],
    ),
    "a module that is made": ("made", ["--bgr"], scores, [HEAD]),
    "no convolution reads the picture": ("Padded", [], scores, [HEAD]),
    "num_classes": ("counted", ["--half-weights"], scores, [HEAD]),
}


#: tracing takes about a second; these stand for the rest in a quick run
QUICK = {
    "corners are seen",
    "upsampling in a mapping",
    "softmax below",
    "an adapter",
    "no convolution reads the picture",
    "num_classes",
    "a sigmoid at full size",
    "a sigmoid before the upsampling",
    "edgeseg export unet:UNet",
    "edgeseg export queries:Queries",
    "edgeseg export model.onnx",
}


def some_quick(cases: Iterable[str]) -> list[Any]:
    """``cases`` as parameters, those that are not in ``QUICK`` marked slow."""
    return [
        case
        if any(case.startswith(quick) for quick in QUICK)
        else pytest.param(case, marks=pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize("case", some_quick(WITHIN))
def test_a_module_of_ones_own_becomes_a_bundle(case: str, tmp_path: Path) -> None:
    factory, options, read, left = WITHIN[case]
    target = tmp_path / "mine"
    assert (
        export(f"owned.nets:{factory}", "--classes", CLASSES, *NORMALISED, *options, target=target)
        == 0
    )
    bundle = Bundle.open(target)
    order = "bgr" if "--bgr" in options else "rgb"
    assert bundle.spec.preprocessing == Preprocessing(MEAN, STD, order)  # type: ignore[arg-type]
    assert bundle.spec.classes == tuple(CLASSES.split(","))
    assert bundle.manifest["verification"]["engines"]
    assert resizes(target) == left
    make = own(factory)
    if factory == "counted":
        module = make(3)
        with torch.no_grad():
            for kernel in (module.first.weight, module.last.weight):
                kernel.copy_(kernel.half().float())
    else:
        module = make if isinstance(make, torch.nn.Module) else make()

    def wanted(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.inference_mode():
            found: NDArray[np.float64] = read(module(normalised(pixels, order)))[0].double().numpy()
        return found

    check_masks(target, wanted)


BINARY: dict[str, tuple[str, Callable[[Any], torch.Tensor], list[str]]] = {
    "a logit": ("one", scores, [HEAD]),
    "a sigmoid at full size": ("one_full", lambda r: r - 0.5, [HEAD]),
    "a sigmoid below": ("one_low", lambda r: scores(r) - 0.5, ["Sigmoid", HEAD]),
    "a sigmoid before the upsampling": ("one_inside", lambda r: r - 0.5, ["Sigmoid", HEAD]),
}


@pytest.mark.parametrize("case", some_quick(BINARY))
def test_one_channel_and_two_names_are_two_classes(case: str, tmp_path: Path) -> None:
    factory, read, left = BINARY[case]
    target = tmp_path / "crack"
    assert (
        export(f"owned.nets:{factory}", "--classes", "none,crack", *NORMALISED, target=target) == 0
    )
    assert resizes(target) == left
    module = own(factory)()

    def wanted(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.inference_mode():
            score = read(module(normalised(pixels)))[0, 0].double().numpy()
        return np.stack([-score, score])

    check_masks(target, wanted)


def test_weights_come_from_a_checkpoint(tmp_path: Path) -> None:
    module = own("low")()
    with torch.no_grad():
        module.last.weight.mul_(-1)
    path = tmp_path / "mine.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}, path)
    target = tmp_path / "mine"
    assert export("owned.nets:low", "--weights", str(path), *NORMALISED, target=target) == 0
    manifest = json.loads((target / "bundle.json").read_text())
    assert manifest["provenance"]["checkpoint"]["file"] == "mine.pt"

    def wanted(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.inference_mode():
            found: NDArray[np.float64] = scores(module(normalised(pixels)))[0].double().numpy()
        return found

    check_masks(target, wanted)


#: (factory, further options, words of the sentence)
REFUSED = {
    "a file for a module": ("owned/nets.py:low", [], ["owned.nets:low"]),
    "no attribute": ("owned.nets:", [], ["package.module:function"]),
    "no such module": ("owned.elsewhere:low", [], ["no Python module owned.elsewhere"]),
    "no such package": ("nowhere.nets:low", [], ["no Python module nowhere"]),
    "its imports": ("owned.broken:low", [], ["needs no_such_library"]),
    "a faulty module": ("owned.faulty:low", [], ["cannot be imported", "division by zero"]),
    "no such attribute": ("owned.nets:Nets", [], ["has no Nets", "it has Net"]),
    "no function": ("owned.nets:threshold", [], ["is a int"]),
    "arguments": ("owned.nets:wanting", [], ["wants width"]),
    "num_classes missing": ("owned.nets:counted", [], ["--classes"]),
    "it raises": ("owned.nets:failing", [], ["RuntimeError: no weights here"]),
    "no module comes": ("owned.nets:nothing", [], ["gave a NoneType"]),
    "two dimensions": ("owned.nets:flat", [], ["gives (1, 3)"]),
    "nothing to find": ("owned.nets:mapping", [], ["a mapping with scores", "--adapter"]),
    "larger than the input": ("owned.nets:large", [], ["32x48", "64x96"]),
    "an adapter without logits": (
        "owned.nets:low",
        ["--adapter", "owned.nets:decide"],
        ["torch.int64 came"],
    ),
    "an adapter that takes too much": (
        "owned.nets:low",
        ["--adapter", "owned.nets:halve"],
        ["gives (3, 8, 12)"],
    ),
    "an adapter that is none": (
        "owned.nets:low",
        ["--adapter", "owned.nets:threshold"],
        ["is a int"],
    ),
    "a size": ("owned.nets:choosy", ["--size", "64x64"], ["64x64", "another --size"]),
    "too many names": ("owned.nets:low", ["--classes", "a,b,c,d"], ["3 channels, and 4 names"]),
    "too few names": ("owned.nets:low", ["--classes", "a,b"], ["3 channels", "background"]),
    "a branch on pixels": ("owned.nets:branching", [], ["cannot be turned into ONNX"]),
    "mean alone": ("owned.nets:low", ["--mean", "0,0,0"], ["add --std"]),
    "no spread": ("owned.nets:low", ["--mean", "0,0,0", "--std", "1,0,1"], ["std above zero"]),
    "scale alone": ("owned.nets:low", ["--scale", "255"], ["--mean and --std"]),
    "an output's name": ("owned.nets:low", ["--output-name", "y"], ["--output-name does not go"]),
    "instances": ("owned.nets:low", ["--task", "instance"], ["boxes", "a Tensor came"]),
    "confidence of probabilities": ("owned.nets:soft_low", ["--confidence"], ["probabilities"]),
    "no checkpoint": ("owned.nets:low", ["--weights", "gone.pt"], ["gone.pt does not exist"]),
    "no file": ("gone.onnx", [], ["no file gone.onnx"]),
    "no folder": ("hf:nvidia/segformer-b0", [], ["hf download nvidia/segformer-b0"]),
    "options for a known model": ("bisenetv2", ["--rgb"], ["has its own normalisation"]),
    "a task for a known model": ("bisenetv2", ["--task", "semantic"], ["has one task"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, options, words = REFUSED[case]
    assert export(model, *options, target=tmp_path / "mine") in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edgeseg: ")
    assert len(line) < 420
    for word in words:
        assert word in line
    assert not (tmp_path / "mine").exists()


def test_another_models_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.pt"
    state = own("low")().state_dict()
    for change, words in (
        ({"first.weight": torch.zeros(8, 3, 5, 5)}, "size mismatch for first.weight"),
        ({"third.weight": torch.zeros(1)}, "1 keys are unexpected (third.weight)"),
        ({"last.bias": torch.full((3,), float("nan"))}, "no numbers"),
    ):
        torch.save({**state, **change}, path)
        assert export("owned.nets:low", "--weights", str(path), target=tmp_path / "mine") == 1
        assert words in capsys.readouterr().err


def test_the_current_directory_is_importable_for_the_export_only(tmp_path: Path) -> None:
    before = list(sys.path)
    assert export("owned.nets:low", target=tmp_path / "mine") == 0
    assert sys.path == before


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: {"aux": None, "out": logits},
        lambda logits: {"logits": logits},
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: SimpleNamespace(out=logits),
        lambda logits: (logits, torch.zeros(1)),
        lambda logits: [{"out": logits}],
    ],
    ids=["tensor", "out", "logits", "object", "object with out", "tuple", "list of mappings"],
)
def test_logits_are_found(wrap: Callable[[torch.Tensor], Any]) -> None:
    logits = torch.zeros(1, 3, 2, 2)
    assert logits_of(wrap(logits)) is logits


@pytest.mark.parametrize("result", [None, {}, (), {"out": 3}, 1.5])
def test_what_holds_no_logits_is_refused(result: Any) -> None:
    with pytest.raises(RequestError, match="--adapter"):
        logits_of(result)


NORMALISATIONS = {
    "nothing said": (OwnOptions(), IMAGENET),
    "the other order": (
        OwnOptions(order="bgr"),
        Preprocessing((0.406, 0.456, 0.485), (0.225, 0.224, 0.229), "bgr"),
    ),
    "mean and std": (OwnOptions(mean=MEAN, std=STD), Preprocessing(MEAN, STD, "rgb")),
    "up to 255": (
        OwnOptions(mean=(51, 102, 204), std=(255, 25.5, 51), scale=255, order="bgr"),
        Preprocessing((0.2, 0.4, 0.8), (1.0, 0.1, 0.2), "bgr"),
    ),
}


@pytest.mark.parametrize("case", NORMALISATIONS)
def test_normalisation(case: str) -> None:
    options, wanted = NORMALISATIONS[case]
    assert options.preprocessing() == wanted


def test_normalisation_needs_both() -> None:
    with pytest.raises(RequestError, match="add --mean"):
        OwnOptions(std=STD).preprocessing()


# ---- ONNX files


def written(
    path: Path,
    *,
    ending: str = "",
    channels_last: bool = False,
    size: tuple[int, int] | None = None,
    opset: int = 18,
    half: bool = False,
    batch: int | str = 1,
    second_output: bool = False,
) -> Path:
    """The network ``low`` as a foreign ONNX file, written by hand."""
    module = own("low")()
    kind = np.float16 if half else np.float32
    elem = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weights = [
        numpy_helper.from_array(value.detach().numpy().astype(kind), name)
        for name, value in module.state_dict().items()
    ]
    rows, columns = size or ("rows", "columns")
    shape = [batch, rows, columns, 3] if channels_last else [batch, 3, rows, columns]
    nodes = []
    name = "image"
    if channels_last:
        nodes.append(helper.make_node("Transpose", [name], ["planes"], perm=[0, 3, 1, 2]))
        name = "planes"
    nodes += [
        helper.make_node("Conv", [name, "first.weight", "first.bias"], ["a"], strides=[4, 4]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "last.weight", "last.bias"], ["low"]),
    ]
    name = "low"
    if "up" in ending:
        factors = numpy_helper.from_array(np.array([1, 1, 4, 4], np.float32), "factors")
        weights.append(factors)
        roi = numpy_helper.from_array(np.array([], np.float32), "roi")
        weights.append(roi)
        nodes.append(
            helper.make_node(
                "Resize",
                [name, "roi", "factors"],
                ["high"],
                mode="linear",
                coordinate_transformation_mode="half_pixel",
            )
        )
        name = "high"
    if "last" in ending:
        nodes.append(helper.make_node("Transpose", [name], ["nhwc"], perm=[0, 2, 3, 1]))
        name = "nhwc"
    out = elem
    if "argmax" in ending:
        axis = 3 if "last" in ending else 1
        keep = int("keep" in ending)
        nodes.append(helper.make_node("ArgMax", [name], ["best"], axis=axis, keepdims=keep))
        nodes.append(helper.make_node("Cast", ["best"], ["map"], to=TensorProto.INT32))
        name, out = "map", TensorProto.INT32
    if "greater" in ending:
        # A class map that no argmax made: 1 where the first score is above zero.
        split = numpy_helper.from_array(np.array([1, 2]), "sides")
        zero = numpy_helper.from_array(np.array(0, kind), "zero")
        weights.extend([split, zero])
        nodes += [
            helper.make_node("Split", [name, "sides"], ["some", "others"], axis=1),
            helper.make_node("Greater", ["some", "zero"], ["above"]),
            helper.make_node("Cast", ["above"], ["map"], to=TensorProto.INT64),
        ]
        name, out = "map", TensorProto.INT64
    outputs = [helper.make_tensor_value_info(name, out, None)]
    if second_output:
        outputs.append(helper.make_tensor_value_info("b", elem, None))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", elem, shape)], outputs, weights
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 20 else 10
    )
    onnx.save(model, path)
    return path


def of_low(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    with torch.inference_mode():
        found: NDArray[np.float64] = scores(own("low")()(normalised(pixels)))[0].double().numpy()
    return found


def first_above(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    first = of_low(pixels)[0]
    return np.stack([-first, first])


FILES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    # name: (how it is written, options, ops left)
    "free size": ({}, ["--size", SIZE], [HEAD]),
    "fixed size": ({"size": (HEIGHT, WIDTH)}, [], [HEAD]),
    "upsampled by factors": ({"ending": "up"}, ["--size", SIZE], [HEAD]),
    "free batch": ({"batch": "n"}, ["--size", SIZE], [HEAD]),
    "opset 11": ({"opset": 11, "ending": "up"}, ["--size", SIZE], [HEAD]),
    "opset 21": ({"opset": 21, "ending": "up"}, ["--size", SIZE], [HEAD]),
    "channels last": ({"channels_last": True, "ending": "last"}, ["--size", SIZE], [HEAD]),
    "channels last at the end only": ({"ending": "up last"}, ["--size", SIZE], [HEAD]),
    "a class map": ({"ending": "up argmax"}, ["--size", SIZE], [HEAD]),
    "a class map with a channel": ({"ending": "up argmax keep"}, ["--size", SIZE], [HEAD]),
    "a class map of channels last": ({"ending": "up last argmax"}, ["--size", SIZE], [HEAD]),
    "a low class map": ({"ending": "argmax"}, ["--size", SIZE], [HEAD]),
    "several outputs": (
        {"second_output": True},
        ["--size", SIZE, "--output-name", "low"],
        [HEAD],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_an_onnx_file_becomes_a_bundle(case: str, tmp_path: Path) -> None:
    how, options, left = FILES[case]
    path = written(tmp_path / "foreign.onnx", **how)
    target = tmp_path / "mine"
    arguments = ["export", str(path), "--classes", CLASSES, *NORMALISED, "--rgb", *options]
    assert main([*arguments, "-o", str(target)]) == 0
    assert resizes(target) == left
    check_masks(target, of_low)
    manifest = json.loads((target / "bundle.json").read_text())
    assert manifest["verification"]["reference"] == "the original file"


def test_a_half_precision_file_becomes_a_bundle(tmp_path: Path) -> None:
    path = written(tmp_path / "half.onnx", half=True)
    target = tmp_path / "mine"
    assert export(str(path), "--classes", CLASSES, *NORMALISED, target=target) == 0
    engine = open_engine(Bundle.open(target), "onnxruntime")
    outputs = engine.run(picture(1))
    assert isinstance(outputs, Outputs)
    assert np.mean(outputs.class_map == of_low(picture(1)).argmax(axis=0)) > 0.98


def test_a_class_map_without_an_argmax_is_taken_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "foreign.onnx", ending="up greater")
    target = tmp_path / "mine"
    assert export(str(path), "--classes", "no,yes", *NORMALISED, target=target) == 0
    check_masks(target, first_above)


def test_weights_beside_the_file_are_stored_inside(tmp_path: Path) -> None:
    path = written(tmp_path / "foreign.onnx")
    model = onnx.load(path)
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    target = tmp_path / "mine"
    assert export(str(path), "--classes", CLASSES, *NORMALISED, target=target) == 0
    (tmp_path / "weights.bin").unlink()
    check_masks(target, of_low)


def _uint8(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["cast"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "cast"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save(model, path)


def _foreign_operator(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[1].domain = "com.microsoft"
    model.graph.node[1].op_type = "FusedThing"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)


def _grey(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, path)


def _no_onnx(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 not a graph at all")


def _weights_gone(path: Path) -> None:
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="gone.bin", size_threshold=0
    )
    (path.parent / "gone.bin").unlink()


def _two_inputs(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    onnx.save(model, path)


def _as_it_is(path: Path) -> None:
    pass


BAD_FILES: dict[str, tuple[dict[str, Any], Callable[[Path], None], list[str], list[str]]] = {
    "no size": ({}, _as_it_is, ["--size", ""], ["give --size"]),
    "another size": ({"size": (64, 64)}, _as_it_is, [], ["height of 64 only", "32x48"]),
    "a batch": ({"batch": 4}, _as_it_is, [], ["4 pictures at once"]),
    "two outputs": ({"second_output": True}, _as_it_is, [], ["low, b", "--output-name"]),
    "no such output": ({}, _as_it_is, ["--output-name", "high"], ["no output high; it has low"]),
    "uint8": ({}, _uint8, [], ["reads uint8"]),
    "grey": ({}, _grey, [], ["1x1x"]),
    "two inputs": ({}, _two_inputs, [], ["image, mask"]),
    "operators from elsewhere": ({}, _foreign_operator, [], ["com.microsoft.FusedThing"]),
    "no ONNX": ({}, _no_onnx, [], ["foreign.onnx"]),
    "weights gone": ({}, _weights_gone, [], ["gone.bin"]),
    "names": ({}, _as_it_is, ["--classes", "a,b,c,d,e"], ["3 channels, and 5 names"]),
    "half weights": ({}, _as_it_is, ["--half-weights"], ["--half-weights does not go"]),
    "a low class map": (
        {"ending": "greater"},
        _as_it_is,
        ["--classes", "a,b"],
        ["only one of the picture's size"],
    ),
    "a class map of unknown classes": ({"ending": "up greater"}, _as_it_is, [], ["--classes"]),
    "a size it does not take": ({}, _as_it_is, ["--size", "2x2"], ["does not run", "2x2"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_taken_is_refused_in_a_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how, spoil, options, words = BAD_FILES[case]
    path = written(tmp_path / "foreign.onnx", **how)
    spoil(path)
    arguments = ["export", str(path), *(["--size", SIZE] if "--size" not in options else [])]
    given = [] if options == ["--size", ""] else options
    assert main([*arguments, *given, "-o", str(tmp_path / "mine")]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edgeseg: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "mine").exists()


def test_a_bundles_own_graph_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine"
    assert export("owned.nets:low", target=target) == 0
    capsys.readouterr()
    assert export(str(target / "model.onnx"), target=tmp_path / "again") == 2
    assert "bundle's model already" in capsys.readouterr().err


# ---- the page that explains it

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-models.md"
COMMANDS = [
    line
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("edgeseg export")
]


def test_the_page_has_its_walks() -> None:
    assert [command.split()[2] for command in COMMANDS] == [
        "fcn:FCN",
        "unet:UNet",
        "deeplab:street",
        "pspnet:PSPNet",
        "model.onnx",
        "hf:segformer",
        "finder:Finder",
        "queries:Queries",
    ]


@pytest.mark.parametrize("command", some_quick(COMMANDS), ids=lambda command: command.split()[2])
def test_the_page_says_what_works(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = command.split()[2]
    stem = "make_segformer" if model == "hf:segformer" else model.split(":")[0]
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name, source in blocks:
        if name == stem:
            (tmp_path / f"{name}.py").write_text(source)
    if model == "hf:segformer":
        pytest.importorskip("transformers", reason="needs transformers")
        exec(compile(dict(blocks)[stem], stem, "exec"), {})
    elif model == "model.onnx":
        monkeypatch.syspath_prepend(str(tmp_path / "here"))
        written(tmp_path / "model.onnx")
    monkeypatch.delitem(sys.modules, stem, raising=False)
    assert main(command.split()[1:]) == 0
    monkeypatch.delitem(sys.modules, stem, raising=False)
    (target,) = [path for path in tmp_path.iterdir() if (path / "bundle.json").is_file()]
    assert target.name == command.rsplit(maxsplit=1)[-1]
    if "--task instance" in command:
        # A quarter of the size, as its prototypes are, and an eighth, as its features.
        rows, columns = {"finder": (24, 32), "queries": (12, 16)}[stem]
        spec = Bundle.open(target).spec
        assert (spec.task, spec.mask_height, spec.mask_width) == ("instance", rows, columns)
        return
    # The U-Net ends in a convolution at full size; from all others the head takes its work over.
    assert resizes(target)[-1] == HEAD
    assert Bundle.open(target).manifest["verification"]["engines"]
