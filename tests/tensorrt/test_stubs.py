"""Stub files of TensorRT: what mypy makes of them, and what is said where they cannot be made."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tensorrt import stubs
from tests.tensorrt.stubs import RELEASES, ROOT, Release, StubsError

SOURCE = """
import tensorrt as trt

def build(logger: trt.ILogger, model: bytes) -> bytes | None:
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        return None
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 3), (1, 3), trt.Dims((4, 3)))
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)

def run(runtime: trt.Runtime, plan: bytes, stream: int) -> bool:
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return False
    context = engine.create_execution_context()
    if context is None or tuple(engine.get_tensor_shape("image")) == (1, 3):
        return False
    context.set_tensor_address("image", 0x1000)
    return context.execute_async_v3(stream)

class Monitor(trt.IProgressMonitor):
    def __init__(self) -> None:
        super().__init__()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool:
        return True
    def phase_finish(self, phase_name: str) -> None: ...
"""

# What mypy has to find, and in which releases.
WRONG = {
    "trt.BuilderFlag.FP16": ("attr-defined", {"11.4"}),
    "trt.BuilderFlag.SUCH": ("attr-defined", None),
    "trt.Logger('verbose')": ("arg-type", None),
    "trt.Builder()": ("call-arg", None),
    "trt.Runtime(trt.Logger()).deserialize_cuda_engine(b'').name": ("union-attr", None),
    "trt.Builder(trt.Logger()).max_batch_size": ("attr-defined", None),
    "trt.Builder(trt.Logger()).create_network(flag=1)": ("call-arg", None),
    "trt.IInt8EntropyCalibrator2": ("attr-defined", {"11.4"}),
}


@pytest.mark.slow
def test_mypy_reads_them(tensorrt_release: Release, tmp_path: Path) -> None:
    lines = [f"print({wrong})" for wrong in WRONG]
    start = SOURCE.count("\n") + 1
    file = tmp_path / "example.py"
    file.write_text(SOURCE + "\n".join(lines) + "\n")
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir",
         tensorrt_release.folder / "mypy", "--no-pretty", file],
        cwd=tmp_path,
        env={"PATH": "", "MYPYPATH": str(tensorrt_release.stubs)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert found.stderr == ""
    errors: dict[int, set[str]] = {}
    for line in found.stdout.splitlines():
        if ": error: " in line:
            number = int(line.partition(".py:")[2].partition(":")[0])
            errors.setdefault(number, set()).add(line.rpartition("[")[2].rstrip("]"))
    expected = {
        start + index: {code}
        for index, (code, releases) in enumerate(WRONG.values())
        if releases is None or tensorrt_release.name in releases
    }
    assert errors == expected, found.stdout


def test_stub_file(tensorrt_release: Release) -> None:
    source = (tensorrt_release.stubs / "tensorrt" / "__init__.pyi").read_text(encoding="utf-8")
    tree = ast.parse(source)
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {"Builder", "Runtime", "ICudaEngine", "OnnxParser", "BuilderFlag"} < classes
    assert "nvinfer1" not in source and "tensorrt.tensorrt" not in source
    # NVIDIA's documentation is not copied.
    assert all(
        ast.get_docstring(node) is None
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    )
    values = json.loads((tensorrt_release.stubs / "values.json").read_text(encoding="utf-8"))
    assert values["names"]["float32"] == "DataType.FLOAT"
    assert values["enums"]["BuilderFlag"]["TF32"] >= 0
    assert ("FP16" in values["enums"]["BuilderFlag"]) is (tensorrt_release.major == 10)


def test_nothing_is_any_that_we_use(tensorrt_release: Release) -> None:
    # A signature that could not be read would let everything pass.
    source = (tensorrt_release.stubs / "tensorrt" / "__init__.pyi").read_text(encoding="utf-8")
    used = {
        "Builder",
        "IBuilderConfig",
        "Runtime",
        "ICudaEngine",
        "IExecutionContext",
        "OnnxParser",
    }
    # ``kernel_text`` and handles that only go from one call to the next.
    allowed = {"gpu_allocator", "kernel_text", "__exit__", "__enter__", "this", "func"}
    vague = []
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.ClassDef) and node.name in used):
            continue
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name not in allowed:
                annotations = {argument.arg: argument.annotation for argument in member.args.args}
                vague += [
                    f"{node.name}.{member.name}({name})"
                    for name, annotation in {**annotations, "return": member.returns}.items()
                    if annotation is not None
                    and name not in allowed
                    and ast.unparse(annotation) == "typing.Any"
                ]
    assert vague == []


def asked_for(path: Path) -> set[str]:
    """Names that a file asks of TensorRT by ``getattr(x, "name", default)``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), _]
            ) if not name.startswith("__"):
                names.add(name)
    return names


def test_names_of_some_releases_only_exist() -> None:
    missing = [stubs.reason_missing(release) for release in RELEASES]
    if any(missing):
        pytest.skip("; ".join(reason for reason in missing if reason))
    known = "\n".join(
        path.read_text(encoding="utf-8")
        for release in RELEASES
        for path in (release.stubs / "tensorrt" / "__init__.pyi", release.stubs / "values.json")
    )
    for path in sorted((ROOT / "edgeseg" / "engine").glob("*.py")):
        if "import tensorrt" not in path.read_text(encoding="utf-8"):
            continue
        for name in asked_for(path):
            assert f"{name}:" in known or f"def {name}(" in known or f'"{name}"' in known, (
                f"{path.name} asks TensorRT for {name!r}, which no release has"
            )


# --- what is said where they cannot be made


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """A release with a build folder in which nothing is yet, and no way to the package index."""
    monkeypatch.setattr(stubs, "BUILD", tmp_path / "tensorrt")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return RELEASES[0]


def test_before_they_are_made(elsewhere: Release) -> None:
    reason = stubs.reason_missing(elsewhere)
    assert reason is not None and "make tensorrt-stubs" in reason


def test_without_the_package_index(elsewhere: Release, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StubsError) as caught:
        stubs.make(elsewhere)
    sentence = str(caught.value)
    assert sentence.startswith("no stubs of TensorRT 10.3: `pip install tensorrt-cu12-bindings==")
    assert "\n" not in sentence
    # Tests skip with this reason, and the command goes on.
    assert stubs.reason_missing(elsewhere) == sentence
    assert stubs.main(["--check"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(RELEASES)


def test_without_a_compiler(elsewhere: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stubs, "_installed", lambda requirement, folder: folder)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(StubsError, match=r"no C compiler here \(`apt-get install gcc`\)"):
        stubs.make(elsewhere)


def test_bindings_that_cannot_be_imported(
    elsewhere: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_bindings").mkdir()
    (tmp_path / "tensorrt_bindings" / "__init__.py").write_text("raise ImportError('GLIBC_9.9')")
    monkeypatch.setattr(stubs, "_installed", lambda requirement, folder: tmp_path)
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here")
    with pytest.raises(StubsError, match=r"10\.3: ImportError: GLIBC_9\.9"):
        stubs.make(elsewhere)
    assert not elsewhere.stubs.exists()


def test_nothing_is_made_twice(tensorrt_release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refused)
    assert stubs.make(tensorrt_release) is False


def test_nothing_generated_is_committed() -> None:
    assert stubs.BUILD.is_relative_to(ROOT / "build")
    assert "build/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
