"""Building and loading the CPU library."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgeseg import kernels
from edgeseg.errors import KernelError
from edgeseg.kernels import library
from edgeseg.kernels.build import ABI_VERSION

ROOT = Path(__file__).resolve().parents[2]
BUILD_SOURCE = (ROOT / "kernels" / "build.py").read_text(encoding="utf-8")

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="no C++ compiler on this machine",
)


@needs_compiler
def test_build_makes_one_library_that_loads(tmp_path: Path) -> None:
    path = kernels.build(tmp_path / "made" / "here")
    assert path.parent == tmp_path / "made" / "here"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert ctypes.CDLL(str(path)).edgeseg_abi_version() == ABI_VERSION


def test_no_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match=r"install one .*g\+\+"):
        kernels.build(tmp_path)


def test_missing_cxx_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O0")
    with pytest.raises(KernelError, match="no-such-compiler"):
        kernels.build(tmp_path)


def test_failing_compiler_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    with pytest.raises(KernelError, match="could not compile"):
        kernels.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write anywhere"
)
def test_read_only_directory_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(KernelError, match="cannot be written"):
        kernels.build(tmp_path)


def load_only(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "library_candidates", lambda: list(paths))


def test_no_library_says_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    load_only(monkeypatch)
    assert not kernels.available()
    with pytest.raises(KernelError, match="not here; run `edgeseg kernels build`"):
        kernels.load()


def test_a_file_that_is_no_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    load_only(monkeypatch, broken)
    with pytest.raises(KernelError, match=r"_cpu\.so cannot be loaded"):
        kernels.load()


@needs_compiler
def test_another_version_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "old.cpp"
    source.write_text('extern "C" int edgeseg_abi_version() { return 0; }\n', encoding="utf-8")
    old = tmp_path / "_cpu.old.so"
    compiler = shutil.which("c++") or shutil.which("g++") or "clang++"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(old)], check=True)
    load_only(monkeypatch, old)
    with pytest.raises(KernelError, match="version 0, expected 2"):
        kernels.load()
    load_only(monkeypatch, old, kernels.build(tmp_path / "new"))
    assert kernels.load().edgeseg_abi_version() == ABI_VERSION


def constant(source: str, name: str) -> object:
    """The literal that a module's source assigns to ``name``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def test_setup_and_build_compile_alike() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    ours, theirs = constant(BUILD_SOURCE, "COMPILE_FLAGS"), constant(setup, "COMPILE_FLAGS")
    assert isinstance(ours, tuple)
    assert isinstance(theirs, list)
    assert list(ours) == theirs


def test_python_and_c_agree_on_constants() -> None:
    cpu = (ROOT / "kernels" / "cpu" / "library.cpp").read_text(encoding="utf-8")
    version = re.search(r"kAbiVersion = (\d+);", cpu)
    assert version is not None
    assert int(version[1]) == constant(BUILD_SOURCE, "ABI_VERSION")


@needs_compiler
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_header_stands_alone_without_warnings(standard: str, tmp_path: Path) -> None:
    source = tmp_path / "only.cpp"
    source.write_text(
        '#include "edgeseg/upsample_argmax.h"\n'
        '#include "edgeseg/upsample_argmax.h"\n'
        "float f(float x) { return edgeseg::exp_nonpositive(edgeseg::lerp(x, x, x, x)); }\n"
        "int g(float x) { return edgeseg::confidence_level(x); }\n",
        encoding="utf-8",
    )
    compiler = shutil.which("c++") or shutil.which("g++") or "clang++"
    subprocess.run(
        [compiler, f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
         f"-I{ROOT / 'kernels' / 'include'}", str(source)],
        check=True,
    )  # fmt: skip


@needs_compiler
def test_library_compiles_without_warnings() -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or "clang++"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o", os.devnull,
         f"-I{ROOT / 'kernels' / 'include'}", "-shared", "-fPIC",
         *map(str, (ROOT / "kernels" / "cpu").glob("*.cpp"))],
        check=True,
    )  # fmt: skip
