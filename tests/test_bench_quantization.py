"""The parts of bench_quantization.py that decide what its table says."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.dataset import open_dataset
from edgeseg.evaluate import Evaluation

if TYPE_CHECKING:
    from tests.conftest import Tiny

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LONGEST_S = 600
CHANNELS = 16


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """benchmarks/bench_quantization.py, which is in no package."""
    for needed in ("onnx", "onnxruntime", "onnxscript", "openvino", "torch"):
        pytest.importorskip(needed, reason="the benchmark compares with it")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("bench_quantization")
    finally:
        sys.path.remove(str(BENCHMARKS))


def peers_py(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "peers.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_S,
    )


def network(
    *, image: bool = True, kernel: bool = True, between: tuple[str, ...] = (), groups: int = 1
) -> Any:
    """image uint8 -> float -> [Q -> DQ] -> ``between`` -> Conv with a [Q/DQ] kernel -> logits."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    shape = (CHANNELS, CHANNELS // groups, 3, 3)
    stored: dict[str, NDArray[Any]] = {
        "spread": rng.normal(size=(CHANNELS, 3, 1, 1)).astype(np.float32),
        "scale": np.array(0.02, np.float32),
        "zero": np.array(0, np.int8),
        "sizes": np.array([1.0, 1.0, 2.0, 2.0], np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "spread"], ["x"], "first"),
    ]

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def dequantized(name: str) -> str:
        whole = add("QuantizeLinear", name, "scale", "zero")
        return add("DequantizeLinear", whole, "scale", "zero")

    x = dequantized("x") if image else "x"
    for kind in between:
        if kind == "MaxPool":
            x = add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        elif kind == "Relu":
            x = add("Relu", x)
        elif kind == "Concat with itself":
            x = add("Slice", add("Concat", x, x, axis=1), "from", "to", "axis")
            stored |= {"from": np.array([0]), "to": np.array([CHANNELS]), "axis": np.array([1])}
        elif kind == "Concat with fp32":
            x = add("Slice", add("Concat", x, "x", axis=1), "from", "to", "axis")
            stored |= {"from": np.array([0]), "to": np.array([CHANNELS]), "axis": np.array([1])}
        else:
            x = add("Resize", x, "", "sizes", mode=kind.removeprefix("Resize "))
    if kernel:
        stored["weights"] = rng.integers(-127, 128, shape).astype(np.int8)
        weights = add("DequantizeLinear", "weights", "scale", "zero")
    else:
        stored["weights"] = rng.normal(size=shape).astype(np.float32)
        weights = "weights"
    add("Conv", x, weights, group=groups)
    nodes[-1].output[0] = "logits"
    nodes[-1].name = "last"
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 32, 48, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CHANNELS, None, None])],
        [numpy_helper.from_array(values, name) for name, values in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize(
    ("arguments", "is_int8"),
    [
        ({}, True),
        ({"groups": CHANNELS}, True),
        ({"image": False}, False),
        ({"kernel": False}, False),
        ({"image": False, "kernel": False}, False),
        ({"between": ("MaxPool",)}, True),
        ({"between": ("Resize nearest", "MaxPool")}, True),
        ({"between": ("Concat with itself",)}, True),
        ({"between": ("Concat with fp32",)}, False),
        ({"between": ("Resize linear",)}, False),
        ({"between": ("Relu",)}, False),
    ],
)
def test_convolutions_left_in_fp32(
    bench: Any, arguments: dict[str, Any], is_int8: bool, tmp_path: Path
) -> None:
    import onnx

    model = network(**arguments)
    onnx.checker.check_model(model, full_check=True)
    expected = ("first",) if is_int8 else ("first", "last")
    path = tmp_path / "network.onnx"
    onnx.save(model, path)
    assert bench.Convolutions.of(path) == bench.Convolutions(2, expected)
    # OpenVINO's own reading of the same file.
    read = bench.openvino.Core().read_model(path)
    found = bench.Convolutions.in_openvino(read)
    assert (found.total, len(found.fp32)) == (2, len(expected))


def test_saved_integers_count_as_quantized(bench: Any, tmp_path: Path) -> None:
    """What NNCF saves: FakeQuantize on the image, the kernel as integers with a scale."""
    ops = bench.openvino.opset13
    x = ops.parameter([1, 4, 8, 8], np.float32)
    low, high = np.float32(-1), np.float32(1)
    whole = np.ones((4, 4, 3, 3), np.int8)
    scales = np.full((4, 1, 1, 1), 0.1, np.float32)
    kernel = ops.multiply(ops.convert(ops.constant(whole), "f32"), ops.constant(scales))
    quantized = ops.fake_quantize(x, low, high, low, high, 256)
    # Its scale is computed from the picture: a product, and no stored kernel.
    product = ops.multiply(quantized, ops.reduce_mean(quantized, np.array([2, 3]), True))
    padding = ([1, 1], [0, 0], [0, 0], [1, 1])
    first = ops.convolution(quantized, kernel, *padding)
    second = ops.convolution(product, kernel, *padding)
    second.set_friendly_name("second")
    model = bench.openvino.Model([ops.add(first, second)], [x])
    path = tmp_path / "saved.xml"
    bench.openvino.save_model(model, path, compress_to_fp16=False)
    assert bench.Convolutions.of(path) == bench.Convolutions(2, ("second",))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the precisions of x86-64 are promised")
@pytest.mark.parametrize("is_int8", [True, False])
def test_executed_precisions_are_those_openvino_reports(bench: Any, is_int8: bool) -> None:
    core = bench.openvino.Core()
    model = core.read_model(network(image=is_int8, kernel=is_int8).SerializeToString())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = bench.executed_precisions(compiled)
    assert sum(found.values()) == 2
    assert found.get("f32") == (1 if is_int8 else 2)


def test_peers_get_plain_kernels_and_folded_batch_norms(bench: Any) -> None:
    """The same logits by the reference evaluator, from a graph that every tool can read."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    model = network(image=False, kernel=False)
    graph = model.graph
    (weights,) = (found for found in graph.initializer if found.name == "weights")
    half = numpy_helper.to_array(weights).astype(np.float16)
    weights.CopyFrom(numpy_helper.from_array(half, "weights"))
    graph.node.insert(0, helper.make_node("Cast", ["weights"], ["w"], to=TensorProto.FLOAT))
    graph.node[-1].input[1] = "w"
    graph.node[-1].output[0] = "raw"
    rng = np.random.default_rng(2)
    for name in ("gain", "shift", "mean", "variance"):
        values = rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, name))
    norm = ["raw", "gain", "shift", "mean", "variance"]
    graph.node.append(helper.make_node("BatchNormalization", norm, ["logits"], "norm"))

    plain = bench.plain_network(model.SerializeToString())
    assert [node.op_type for node in plain.graph.node] == ["Cast", "Transpose", "Conv", "Conv"]
    assert {found.data_type for found in plain.graph.initializer} == {TensorProto.FLOAT}
    image = rng.integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    evaluators: list[Any] = [ReferenceEvaluator(form) for form in (model, plain)]
    before, after = (evaluator.run(None, {"image": image})[0] for evaluator in evaluators)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("asked", "given"), [(2, (0, 4)), (4, (0, 2, 4, 6)), (99, range(8))])
def test_calibration_frames_are_spread_and_fitted(
    bench: Any, tiny: Tiny, asked: int, given: Sequence[int]
) -> None:
    dataset = open_dataset("synthetic:?frames=8&size=32x48", "train")
    frames = bench.fitted_frames(dataset, asked, tiny.spec)
    assert frames.dtype == np.uint8
    # Of network size already, so that fitting leaves them as they are.
    expected = np.stack([dataset.sample(index).pixels for index in given])
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.skipif(not kernels.available(), reason="the kernels are not compiled")
@pytest.mark.parametrize(
    ("engine", "size"),
    [("openvino", (32, 48)), ("openvino", (64, 32)), ("onnxruntime", (32, 48))],
)
def test_candidates_give_the_masks_of_the_arithmetic(
    bench: Any, tiny: Tiny, engine: str, size: tuple[int, int], tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny.write(tmp_path / "tiny"))
    content, head = bundle.model.without_head()
    path = tmp_path / "candidate.onnx"
    path.write_bytes(content)
    opened = bench.open_network(bench.Candidate("a", "ours", path), engine, bundle, head, size, 1)
    sized = replace(tiny, spec=replace(tiny.spec, height=size[0], width=size[1]))
    pixels = sized.picture(5)
    np.testing.assert_array_equal(opened.run(pixels).class_map, sized.class_map(pixels))
    assert sum(opened.executed.values()) == (1 if engine == "openvino" else 0)
    assert bench.network_fps(opened, [pixels]) > 0
    twice = np.repeat(np.repeat(pixels, 2, axis=0), 2, axis=1)
    assert bench.frame_to_mask(opened)(twice).shape == twice.shape[:2]
    opened.close()


@pytest.mark.skipif(not kernels.available(), reason="the kernels are not compiled")
def test_miou_as_written_computes_quantizers_in_fp32(
    bench: Any, tiny: Tiny, tmp_path: Path
) -> None:
    """A 4-bit image by a scale of 17: the arithmetic with that rounding, and no INT8 kernel."""
    import onnx
    from onnx import helper, numpy_helper

    bundle = Bundle.open(tiny.write(tmp_path / "tiny"))
    content, head = bundle.model.without_head()
    model = onnx.load_from_string(content)
    scale: list[tuple[str, NDArray[Any]]] = [
        ("scale", np.array(17, np.float32)),
        ("zero", np.array(0, np.uint8)),
    ]
    model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in scale)
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
    model.graph.node.remove(conv)
    rounding = [
        helper.make_node("QuantizeLinear", [conv.input[0], "scale", "zero"], ["whole"]),
        helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["rounded"]),
    ]
    conv.input[0] = "rounded"
    model.graph.node.extend([*rounding, conv])
    path = tmp_path / "rounding.onnx"
    onnx.save(model, path)
    network = bench.OpenVinoNetwork(path, bundle.spec, head, (32, 48), 1, in_fp32=True)
    pixels = tiny.picture(5)
    expected = tiny.class_map(np.rint(pixels / 17).astype(np.uint8) * np.uint8(17))
    assert (expected != tiny.class_map(pixels)).any()
    np.testing.assert_array_equal(network.run(pixels).class_map, expected)
    assert network.executed == {"f32": 1} or platform.machine() != "x86_64"
    network.close()


@pytest.mark.parametrize(
    ("text", "tools", "number"),
    [
        ("ort,nncf,modelopt", {"ort", "nncf", "modelopt"}, None),
        ("nncf", {"nncf"}, 5),
        ("nncf-mixed-fast, ort-minmax-all", {"nncf", "ort"}, 2),
        ("", set(), 0),
    ],
)
def test_peers_are_chosen_by_tool_or_configuration(
    bench: Any, text: str, tools: set[str], number: int | None
) -> None:
    found = bench.wanted_peers(text)
    assert {configuration.tool for configuration in found} == tools
    assert len(found) == (len(bench.CONFIGURATIONS) if number is None else number)


def test_unknown_peer_is_refused(bench: Any) -> None:
    with pytest.raises(SystemExit, match="'tflite' came"):
        bench.wanted_peers("ort,tflite")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data is required"),
        (["--data", "camvid:x", "--engines", "tensorrt"], "'tensorrt' came"),
        (["--data", "camvid:x", "--bundle", "no-such-bundle"], "no-such-bundle"),
    ],
)
def test_wrong_requests(
    bench: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert said in capsys.readouterr().err + str(stopped.value)


def test_environment_without_python_is_refused(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--venv is a virtual environment"):
        bench.environment(str(tmp_path))


def fake_python(folder: Path, body: str) -> Path:
    """A program to stand for the peers' Python: $1 peers.py, $2 name, $3 and $4 in, $5 out."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\necho run >> '{folder}/runs'\n{body}\n")
    program.chmod(0o755)
    return program


def test_peers_models_are_reused_for_the_same_input_alone(bench: Any, tmp_path: Path) -> None:
    python = fake_python(tmp_path, 'cat "$3" "$4" > "$5"')
    model, frames = tmp_path / "network.onnx", tmp_path / "frames.npy"
    model.write_text("network ")
    frames.write_text("frames")
    configuration = bench.CONFIGURATIONS["nncf-mixed-fast"]
    made = [bench.quantized_by(configuration, python, model, frames, tmp_path) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0].model.read_text() == "network frames"
    frames.write_text("other frames")
    bench.quantized_by(configuration, python, model, frames, tmp_path)
    assert made[0].model.read_text() == "network other frames"
    assert len((tmp_path / "runs").read_text().split()) == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'Traceback:' >&2; echo 'ValueError: no' >&2; echo >&2; exit 1", "ValueError: no"),
        ("echo 'said so'; exit 1", "said so"),
        ("exit 3", "exit status 3"),
        ("exit 0", "exit status 0"),
    ],
)
def test_failing_peer_is_a_line(bench: Any, body: str, reason: str, tmp_path: Path) -> None:
    python = fake_python(tmp_path, body)
    for name in ("network.onnx", "frames.npy"):
        (tmp_path / name).write_text("")
    found = bench.quantized_by(
        bench.CONFIGURATIONS["ort-minmax-all"],
        python,
        tmp_path / "network.onnx",
        tmp_path / "frames.npy",
        tmp_path,
    )
    assert found == bench.Failure("ort-minmax-all", reason)


def row(bench: Any, name: str, tool: str, miou: float, fp32: int = 0) -> Any:
    evaluation = Evaluation("CamVid", "val", "openvino", 101, miou, {"sky": miou}, 0.9, 1.0)
    left = tuple(f"conv_{index}" for index in range(fp32))
    spread = bench.Spread(20.0, 10.0, 30.0)
    return bench.Row(
        bench.Candidate(name, tool, Path(f"{name}.onnx")),
        "openvino",
        evaluation,
        (0.635 - miou) * 100,
        bench.Convolutions(56, left),
        {"i8": 56 - fp32, "f32": fp32},
        miou if fp32 == 0 else None,
        {"384x480": spread},
        {"384x480": spread},
    )


def test_best_configuration_of_each_tool_is_marked(bench: Any) -> None:
    rows = bench.marked(
        row(bench, name, tool, miou)
        for name, tool, miou in (
            ("fp32", "fp32", 0.635),
            ("ort-a", "ort", 0.60),
            ("ort-b", "ort", 0.62),
            ("nncf-a", "nncf", 0.61),
            ("nncf-b", "nncf", 0.61),
        )
    )
    assert [found.candidate.name for found in rows if found.best] == ["fp32", "ort-b", "nncf-a"]


def test_table_and_json_of_a_row(bench: Any) -> None:
    rows = bench.marked([row(bench, "fp32", "fp32", 0.635, 56), row(bench, "ort-a", "ort", 0.63)])
    failures = [bench.Failure("nncf-mixed-fast", "RuntimeError: no")]
    header, line, fp32, ort, _, failed = bench.markdown(rows, failures).splitlines()
    cells = len(header.split("|"))
    assert len(line.split("|")) == len(fp32.split("|")) == len(ort.split("|")) == cells
    assert fp32.startswith("| fp32 | 0.6350 | 0.00 | – |")
    assert fp32.endswith("| 56 of 56 | 0 i8, 56 f32 |")
    assert ort.startswith("| **ort-a** | 0.6300 | 0.50 | 0.6300 | 20.0 (10.0-30.0) |")
    assert failed == "- nncf-mixed-fast failed: RuntimeError: no"
    found = json.loads(json.dumps(rows[1].to_dict()))
    assert (found["candidate"], found["best"], found["convolutions_fp32"]) == ("ort-a", True, 0)
    assert found["fps"]["384x480"] == {"median": 20.0, "low": 10.0, "high": 30.0}


def test_peak_memory_is_that_of_one_command(bench: Any) -> None:
    def peak(mebibytes: int) -> float:
        found = bench.peak_memory(
            [sys.executable, "-c", f"import os; block = os.urandom({mebibytes} << 20)"]
        )
        assert found.status == 0
        size: float = found.peak_mib
        return size

    large, small = peak(200), peak(1)
    assert 200 < large < 260
    assert small < 60
    assert bench.peak_memory([sys.executable, "-c", "raise SystemExit(3)"]).status == 3


def test_peers_script_names_its_configurations_and_versions() -> None:
    refused = peers_py("tflite")
    assert refused.returncode == 2
    assert "nncf-mixed-fast" in refused.stderr
    versions = json.loads(peers_py("--versions").stdout)
    assert versions["numpy"] == np.__version__


@pytest.mark.slow
def test_onnxruntime_as_a_peer_quantizes_every_convolution(bench: Any, tmp_path: Path) -> None:
    import onnx

    model, frames, out = (tmp_path / name for name in ("in.onnx", "frames.npy", "out.onnx"))
    onnx.save(network(image=False, kernel=False), model)
    pixels: NDArray[np.uint8] = np.random.default_rng(4).integers(
        0, 256, (5, 32, 48, 3), dtype=np.uint8
    )
    np.save(frames, pixels)
    done = peers_py("ort-entropy-conv", str(model), str(frames), str(out))
    assert done.returncode == 0, done.stderr
    assert bench.Convolutions.of(model) == bench.Convolutions(2, ("first", "last"))
    assert bench.Convolutions.of(out) == bench.Convolutions(2, ())


@pytest.mark.slow
@pytest.mark.skipif(not kernels.available(), reason="the kernels are not compiled")
def test_quick_run_writes_its_figures(bench: Any, tmp_path: Path) -> None:
    target = tmp_path / "made" / "figures.json"
    done = subprocess.run(
        [sys.executable, bench.__file__, "--quick", "--ours", "no-such", "--json", str(target)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].startswith("| fp32 |")
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["benchmark"] == "quantization"
    (fp32,) = found["rows"]
    assert fp32["convolutions"] == fp32["convolutions_fp32"] == 56
    assert fp32["fps"]["384x480"]["median"] > 0
    assert set(found["end_to_end"]["fps"]) == {"eager", "fp32"}


def test_the_docs_have_the_measured_figures() -> None:
    root = BENCHMARKS.parent
    page = (root / "docs" / "quantization.md").read_text(encoding="utf-8")
    found = json.loads((BENCHMARKS / "results" / "quantization.json").read_text(encoding="utf-8"))
    names = {"fp32 (`streets`)": "fp32", "EdgeSeg (`streets-int8`)": "ours"}
    rows = {row["candidate"]: row for row in found["rows"]}
    told = 0
    for line in page[page.index("## Against other tools") :].splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        name = names.get(cells[0], cells[0])
        if name in rows:
            row = rows[name]
            assert cells[1:4] == [
                f"{row['miou']:.4f}",
                f"{row['drop_points']:.2f}",
                f"{row['fps']['384x480']['median']:.1f}",
            ]
            told += 1
    assert told >= 8
    best = max(row["miou"] for name, row in rows.items() if name not in ("fp32", "ours"))
    assert rows["ours"]["miou"] >= best and rows["ours"]["executed"] == {"i8": 56}
