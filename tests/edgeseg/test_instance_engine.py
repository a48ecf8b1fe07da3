"""Instance models from the file to the result: cut, run on every CPU engine, streamed, drawn."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.cli import main
from edgeseg.engine import open_engine
from edgeseg.engine.head import taken_instances
from edgeseg.errors import BundleError, EngineError, RequestError
from edgeseg.golden import InstanceGolden, golden_image
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.model import Model, load
from edgeseg.onnxfile import MASK_HEAD, OnnxFile
from edgeseg.result import Outputs
from tests.edgeseg.tiny_instances import SPEC, TinyInstances

if TYPE_CHECKING:
    from tests.conftest import Tiny

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch", reason="the body of the mask head is written by the export side")

ENGINES = ("openvino", "onnxruntime")
HEADS = (
    pytest.param(
        True,
        marks=pytest.mark.skipif(not kernels.available(), reason="the CPU library is not built"),
        id="compiled",
    ),
    pytest.param(False, id="in-graph"),
)


@pytest.fixture(scope="module")
def tiny_instances() -> TinyInstances:
    return TinyInstances()


@pytest.fixture(scope="module")
def folder(tiny_instances: TinyInstances, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_instances.write(tmp_path_factory.mktemp("bundles") / "tiny")


def full_picture() -> NDArray[np.uint8]:
    """With something in every cell."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    for cell in range(6):
        row, column = divmod(cell, 3)
        at = pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        at[..., cell % 3] = 180 + 7 * cell
    return pixels


def check(found: object, wanted: InstanceOutputs) -> None:
    """That an engine's outputs are the wanted ones, masks within a level of rounding."""
    assert isinstance(found, InstanceOutputs)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_array_equal(found.boxes, wanted.boxes)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    assert [array.dtype for array in (found.boxes, found.scores, found.labels, found.masks)] == [
        np.float32, np.float32, np.int32, np.uint8,
    ]  # fmt: skip
    assert found.masks.shape == wanted.masks.shape
    difference = np.abs(found.masks.astype(int) - wanted.masks)
    assert difference.max(initial=0) <= 1
    np.testing.assert_array_equal(found.masks[wanted.masks == 0] <= 1, True)


@pytest.mark.parametrize("compiled_head", HEADS)
@pytest.mark.parametrize("name", ENGINES)
def test_engines(
    folder: Path, tiny_instances: TinyInstances, name: str, compiled_head: bool
) -> None:
    pytest.importorskip(name)
    engine = open_engine(Bundle.open(folder), name, compiled_head=compiled_head)
    counts = []
    kept = []
    for seed in range(6):
        pixels = tiny_instances.picture(seed)
        if seed == 5:
            pixels = np.zeros_like(pixels)
        if seed == 4:
            pixels = full_picture()
        wanted = tiny_instances.outputs(pixels)
        found = engine.run(pixels)
        check(found, wanted)
        assert found.network_ns > 0 and (found.head_ns > 0) == compiled_head
        counts.append(len(wanted.scores))
        kept.append((found, wanted))
    # Nothing that was given belongs to the library.
    for found, wanted in kept:
        check(found, wanted)
    # Neither none, nor all of them, is every picture's answer.
    assert counts[5] == 0 and max(counts) == SPEC.capacity and len(set(counts)) > 2
    assert ("head compiled" in engine.description) == compiled_head
    engine.close()


def test_cut_graph(tiny_instances: TinyInstances) -> None:
    content = tiny_instances.content()
    file = OnnxFile(content)
    assert file.has_mask_head() and not OnnxFile(file.inlined()).has_mask_head()
    cut, head = file.without_mask_head()
    model = onnx.load_model_from_string(cut)
    onnx.checker.check_model(model, full_check=True)
    assert (head.network_height, head.network_width) == (32, 48)
    assert (head.prototypes, head.coefficients, head.boxes) == (
        "prototypes", "coefficients", "boxes",
    )  # fmt: skip
    names = [output.name for output in model.graph.output]
    assert names == ["boxes", "scores", "labels", "count", "prototypes", "coefficients"]
    assert not model.functions and "masks" not in {n.name for n in model.graph.node}
    from onnx.reference import ReferenceEvaluator

    image = tiny_instances.picture(3)
    outputs = ReferenceEvaluator(model).run(None, {"image": image[None]})
    assert isinstance(outputs, list)
    wanted = tiny_instances.outputs(image)
    found = dict(zip(names, outputs, strict=True))
    count = int(found["count"][0])
    assert count == len(wanted.scores) and found["prototypes"].shape == (1, 3, 16, 24)
    np.testing.assert_array_equal(found["boxes"][0, :count], wanted.boxes)
    assert not found["boxes"][0, count:].any()


def with_nodes(content: bytes, change: Any) -> bytes:
    model = onnx.load_model_from_string(content)
    change(model)
    changed: bytes = model.SerializeToString()
    return changed


def test_cut_inlines_other_functions(tiny_instances: TinyInstances) -> None:
    from onnx import helper

    def add(model: Any) -> None:
        model.functions.append(
            helper.make_function(
                "edgeseg",
                "EdgeSegOther",
                ["a"],
                ["b"],
                [helper.make_node("Identity", ["a"], ["b"], "same")],
                [helper.make_opsetid("", 18)],
            )
        )
        first = model.graph.node[0]
        first.output[0] = "before"
        model.graph.node.insert(
            1, helper.make_node("EdgeSegOther", ["before"], ["cast"], "other", domain="edgeseg")
        )

    cut, _ = OnnxFile(with_nodes(tiny_instances.content(), add)).without_mask_head()
    model = onnx.load_model_from_string(cut)
    onnx.checker.check_model(model, full_check=True)
    assert "Identity" in [node.op_type for node in model.graph.node]
    assert {node.domain for node in model.graph.node} == {""}


def test_head_that_cannot_be_cut(tiny: Tiny, tiny_instances: TinyInstances) -> None:
    with pytest.raises(BundleError, match=f"has 0 {MASK_HEAD} nodes where one is promised"):
        OnnxFile(tiny.content()).without_mask_head()

    def without_width(model: Any) -> None:
        (head,) = (node for node in model.graph.node if node.op_type == MASK_HEAD)
        kept = [attribute for attribute in head.attribute if attribute.name != "network_width"]
        del head.attribute[:]
        head.attribute.extend(kept)

    with pytest.raises(BundleError, match=f"{MASK_HEAD} has no attribute network_width"):
        OnnxFile(with_nodes(tiny_instances.content(), without_width)).without_mask_head()


def graph_outputs(count: int, labels: list[int]) -> dict[str, NDArray[Any]]:
    k = SPEC.capacity
    return {
        "boxes": np.ones((1, k, 4), np.float32),
        "scores": np.ones((1, k), np.float32),
        "labels": np.array([labels], np.int32),
        "count": np.array([count], np.int32),
        "masks": np.ones((1, k, 16, 24), np.uint8),
    }


@pytest.mark.parametrize(
    ("count", "labels", "says"),
    [
        (7, [0] * 6, "at most 6 instances, and the graph gave 7"),
        (-1, [0] * 6, "the graph gave -1"),
        (2, [0, 3, 0, 0, 0, 0], "has 3 classes, and the graph gave labels from 0 to 3"),
        (1, [-1, 0, 0, 0, 0, 0], "labels from -1 to -1"),
    ],
)
def test_graphs_that_break_the_contract(count: int, labels: list[int], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        taken_instances(graph_outputs(count, labels), SPEC)


def test_what_lies_beyond_count_is_not_looked_at() -> None:
    found = taken_instances(graph_outputs(2, [0, 1, 99, -5, 9, 9]), SPEC)
    assert found.labels.tolist() == [0, 1] and found.masks.shape == (2, 16, 24)


# --- the golden pair


def test_golden_pair_is_of_the_picture_with_most_in_it(
    folder: Path, tiny_instances: TinyInstances
) -> None:
    golden = Bundle.open(folder).golden
    assert isinstance(golden, InstanceGolden) and golden.is_proof
    image = golden_image(golden.seed, SPEC.height, SPEC.width)
    wanted = tiny_instances.outputs(image)
    assert golden.agreement_of(wanted) == 1.0
    others = [
        tiny_instances.outputs(golden_image(seed, SPEC.height, SPEC.width)) for seed in range(8)
    ]
    told = [len(other.scores) * len(np.unique(other.labels)) for other in others]
    assert len(golden.detections) == len(wanted.scores) > 3
    assert len(wanted.scores) * len(np.unique(wanted.labels)) == max(told)
    # Swapped channels are what it is for.
    assert golden.agreement_of(tiny_instances.outputs(np.roll(image, 1, axis=2))) < golden.promised
    assert golden.agreement_of(Outputs(np.zeros((32, 48), np.uint8))) == 0.0


@pytest.mark.parametrize("name", ENGINES)
def test_engine_that_finds_something_else(
    tmp_path: Path, tiny_instances: TinyInstances, name: str
) -> None:
    pytest.importorskip(name)
    other = tiny_instances.outputs(tiny_instances.picture(0))
    wrong = replace(tiny_instances, golden=InstanceGolden.of(0, other))
    with pytest.raises(EngineError, match="gives other masks than those recorded at export"):
        open_engine(Bundle.open(wrong.write(tmp_path / "wrong")), name)


def test_picture_without_instances_is_no_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = TinyInstances(threshold=2.0)
    bundle = Bundle.open(blind.write(tmp_path / "blind"))
    assert not bundle.golden.is_proof
    open_engine(bundle, "onnxruntime").close()
    assert "nothing was found in its golden picture" in capsys.readouterr().err
    # It is still a promise that nothing is found.
    seeing = Bundle.open(TinyInstances(golden=bundle.golden).write(tmp_path / "seeing"))
    with pytest.raises(EngineError, match="other masks than those recorded"):
        open_engine(seeing, "onnxruntime")


# --- what a user does


@pytest.fixture
def model(folder: Path) -> Any:
    with load(folder, engine="onnxruntime") as opened:
        yield opened


def test_a_frame(model: Model, tiny_instances: TinyInstances) -> None:
    pixels = tiny_instances.picture(1)
    large = cv2.resize(pixels, (192, 128), interpolation=cv2.INTER_NEAREST)
    result = model(large)
    assert isinstance(result, InstanceResult)
    wanted = tiny_instances.outputs(pixels)
    assert len(result) == len(wanted.scores)
    assert result.masks.shape == (len(result), 128, 192) and result.masks.any(axis=(1, 2)).all()
    assert result.draw().shape == large.shape and (result.draw() != large).any()
    assert Counter(result.names) == Counter(SPEC.classes[label] for label in wanted.labels)
    with pytest.raises(RequestError, match="finds instances and has no class map; take masks"):
        _ = result.class_map
    assert result.confidence is None


def write_pictures(folder: Path, tiny_instances: TinyInstances) -> Path:
    folder.mkdir()
    for seed in range(3):
        cv2.imwrite(str(folder / f"{seed}.png"), tiny_instances.picture(seed))
    return folder


def test_a_stream(model: Model, tiny_instances: TinyInstances, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", tiny_instances)
    results = list(model.stream(pictures))
    assert [result.index for result in results] == [0, 1, 2]
    for seed, result in enumerate(results):
        check(result.outputs, tiny_instances.outputs(tiny_instances.picture(seed)))
        assert result.age_ms > 0


def test_command_line(folder: Path, tiny_instances: TinyInstances, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", tiny_instances)
    saved, figures = tmp_path / "saved", tmp_path / "run.json"
    arguments = ["--engine", "onnxruntime", "--source", str(pictures)]
    done = main(
        ["run", str(folder), *arguments, "--save", str(saved), "--masks", "--json", str(figures)]
    )
    assert done == 0 and json.loads(figures.read_text())["frames"] == 3
    names = sorted(path.name for path in saved.iterdir())
    assert names == sorted(f"{i:06d}{kind}.png" for i in range(3) for kind in ("", "_instances"))
    numbers = cv2.imread(str(saved / "000000_instances.png"), cv2.IMREAD_UNCHANGED)
    assert numbers is not None and numbers.dtype == np.uint8
    assert set(np.unique(numbers).tolist()) <= set(range(SPEC.capacity + 1)) and numbers.any()
    report = tmp_path / "profile.html"
    assert main(["profile", str(folder), *arguments, "--report", str(report)]) == 0
    assert "with what was found" in report.read_text()


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "instance segmentation with strongest-cells" in shown
    assert "at most 6 instances" in shown and "16x24 over the network's input" in shown


def test_tools_for_semantic_models_say_so(folder: Path) -> None:
    engine = open_engine(Bundle.open(folder), "onnxruntime")
    with pytest.raises(RequestError, match="needs a semantic model's class map"):
        _ = engine.run(np.zeros((32, 48, 3), np.uint8)).class_map
    engine.close()
