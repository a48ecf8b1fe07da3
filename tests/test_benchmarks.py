"""The benchmarks run, and write what they promise; how fast anything is, they say themselves."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
LONGEST_S = 600


def missing(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_S,
    )


def numbers(value: object) -> list[float]:
    """All numbers in nested lists and dictionaries."""
    if isinstance(value, bool):
        return []
    if isinstance(value, (int, float)):
        return [float(value)]
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "needs", "spreads"),
    [
        (
            "bench_end_to_end.py",
            ("torch", "onnx", "onnxscript"),
            ("end_to_end_fps", "engine_alone_fps", "eager_fps", "of_engine", "of_eager"),
        ),
        ("bench_start.py", (), ("seconds",)),
        ("bench_serve.py", ("aiohttp", "openvino"), ("served_fps", "of_engine", "of_end_to_end")),
        ("bench_upsample_argmax.py", ("onnx", "onnxruntime"), ()),
        ("bench_mask_assembly.py", ("torch",), ()),
        (
            "bench_instance_end_to_end.py",
            ("torch", "onnx", "onnxscript", "onnxruntime", "openvino"),
            ("total_ms", "eager_ms", "of_eager", "post_share", "graph_head_ms"),
        ),
        ("bench_compression.py", ("torch", "onnx", "onnxscript", "torch_pruning"), ()),
    ],
)
def test_quick_run_writes_its_figures(
    script: str, needs: tuple[str, ...], spreads: tuple[str, ...], tmp_path: Path
) -> None:
    if absent := missing(*needs):
        pytest.skip(f"{script} compares with {', '.join(absent)}, which is not installed")
    target = tmp_path / "made" / "figures.json"
    done = run(script, "--quick", "--json", str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    assert f"bench_{found['benchmark']}.py" == script
    assert {"cpu", "cores", "versions", "date"} <= set(found["machine"])
    assert found["rows"]
    assert all(number >= 0 for number in numbers(found["rows"]))
    for row in found["rows"]:
        for name in spreads:
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


@pytest.mark.slow
def test_json_to_standard_output_is_json_alone() -> None:
    done = run("bench_start.py", "--quick", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quick"] is True


@pytest.mark.parametrize(
    ("arguments", "figures"),
    [(("1.0", "3.0", "2.0"), (2.0, 1.0, 3.0)), (("4.0",), (4.0, 4.0, 4.0))],
)
def test_spread_is_median_and_ends(
    arguments: tuple[str, ...], figures: tuple[float, float, float]
) -> None:
    rounds = load_rounds()
    spread = rounds.Spread.of(float(value) for value in arguments)
    assert (spread.median, spread.low, spread.high) == figures


def test_candidates_take_turns_and_ratios_stay_within_a_round() -> None:
    rounds = load_rounds()
    order: list[str] = []

    def candidate(name: str, slowness: float) -> Any:
        def measured() -> float:
            order.append(name)
            return slowness * len(order)

        return measured

    times = rounds.in_turn({"a": candidate("a", 1.0), "b": candidate("b", 2.0)}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1.0, 4.0, 5.0], "b": [4.0, 6.0, 12.0]}
    assert rounds.ratio(times["b"], times["a"]).median == pytest.approx(2.4)
    with pytest.raises(ValueError, match="shorter"):
        rounds.ratio([1.0, 2.0], [1.0])


def test_machine_has_no_names_and_no_paths() -> None:
    rounds = load_rounds()
    described = json.dumps(rounds.machine(("numpy", "no-such-package")))
    assert os.uname().nodename not in described
    assert str(Path.home()) not in described
    assert "no-such-package" not in described


def run_gpu_script(python: str, folder: Path, *tools: str) -> subprocess.CompletedProcess[str]:
    """gpu.sh on a path with the shell's tools and these; its results would go to folder/results."""
    for tool in ("bash", "dirname", "realpath", "false", *tools):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), str(folder / "results")],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(folder), "PYTHON": python, "CUDA_HOME": str(folder)},
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="gpu.sh needs bash")
@pytest.mark.parametrize(
    ("python", "said"),
    [("no-such-python", "there is no no-such-python"), ("false", "there is no nvcc")],
)
def test_gpu_script_says_what_is_missing(python: str, said: str, tmp_path: Path) -> None:
    done = run_gpu_script(python, tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(shutil.which("bash") is None, reason="gpu.sh needs bash")
@pytest.mark.slow
@pytest.mark.skipif(bool(missing("torch")), reason="gpu.sh asks for torch before the GPU")
def test_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    compiler = tmp_path / "bin" / "nvcc"  # below CUDA_HOME
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n", encoding="utf-8")
    compiler.chmod(0o755)
    done = run_gpu_script(sys.executable, tmp_path)
    assert done.returncode == 1
    assert f"torch {torch.__version__} sees no NVIDIA GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def load_rounds() -> Any:
    """benchmarks/rounds.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("benchmark_rounds", BENCHMARKS / "rounds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
