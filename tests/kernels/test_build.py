"""Building the compiled libraries, finding and loading them."""

from __future__ import annotations

import ast
import ctypes
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgeseg import kernels
from edgeseg.errors import KernelError, RequestError
from edgeseg.kernels import launchers, library
from edgeseg.kernels.build import (
    ABI_VERSION,
    PLUGIN_ABI_VERSION,
    build_cuda,
    build_plugins,
    build_tensorrt,
    find_cuda_library,
    find_plugin_library,
    find_tensorrt_headers,
    require_cuda_library,
    require_plugin_library,
    tensorrt_version,
)

ROOT = Path(__file__).resolve().parents[2]
BUILD_SOURCE = (ROOT / "kernels" / "build.py").read_text(encoding="utf-8")

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="no C++ compiler on this machine",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU library, built into a folder that was not there."""
    return kernels.build(tmp_path_factory.mktemp("cpu") / "made" / "here")


@needs_compiler
def test_build_makes_one_library_that_loads(built: Path) -> None:
    assert built.parent.parts[-2:] == ("made", "here")
    assert [entry.name for entry in built.parent.iterdir()] == [built.name]
    assert ctypes.CDLL(str(built)).edgeseg_abi_version() == ABI_VERSION


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
def test_another_version_is_passed_over(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "old.cpp"
    source.write_text('extern "C" int edgeseg_abi_version() { return 0; }\n', encoding="utf-8")
    old = tmp_path / "_cpu.old.so"
    compiler = shutil.which("c++") or shutil.which("g++") or "clang++"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(old)], check=True)
    load_only(monkeypatch, old)
    with pytest.raises(KernelError, match="version 0, expected 2"):
        kernels.load()
    load_only(monkeypatch, old, built)
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
    plugins = (ROOT / "kernels" / "plugins" / "library.cpp").read_text(encoding="utf-8")
    version = re.search(r"kAbiVersion = (\d+);", plugins)
    assert version is not None
    assert int(version[1]) == PLUGIN_ABI_VERSION


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


# --- TensorRT's headers

PLAIN = """
#define NV_TENSORRT_MAJOR 10 //!< TensorRT major version.
#define NV_TENSORRT_MINOR 3 //!< TensorRT minor version.
#define NV_TENSORRT_PATCH 0 //!< TensorRT patch version.
#define NV_TENSORRT_BUILD 26
"""
INDIRECT = """
#define TRT_MAJOR_ENTERPRISE 11
#define TRT_MINOR_ENTERPRISE 1
#define TRT_PATCH_ENTERPRISE 2
#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.
#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE
#define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE
"""
OLD = PLAIN.replace("MAJOR 10", "MAJOR 8").replace("MINOR 3", "MINOR 5")


def write_headers(folder: Path, version: str = PLAIN) -> Path:
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").touch()
    (folder / "NvInferVersion.h").write_text(version, encoding="utf-8")
    return folder


@pytest.fixture
def no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without TensorRT's headers."""
    for name in ("EDGESEG_TENSORRT_HEADERS", "TENSORRT_HOME", "TensorRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    set_in_build(monkeypatch, "_HEADER_FOLDERS", ("/none/here", "/nor/there"))


def set_in_build(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    # The package has a function of the module's name.
    monkeypatch.setattr(importlib.import_module("edgeseg.kernels.build"), name, value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(PLAIN, (10, 3, 0), id="numbers"),
        pytest.param(INDIRECT, (11, 1, 2), id="second-names"),
        pytest.param("#define TRT_MAJOR_RTX 1\n", None, id="another-product"),
        pytest.param(PLAIN.replace(" 3 ", " EVEN "), None, id="no-number"),
    ],
)
def test_headers_tell_their_version(
    text: str, expected: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    assert tensorrt_version(write_headers(tmp_path / "include", text)) == expected


def test_a_folder_without_headers_tells_no_version(tmp_path: Path) -> None:
    assert tensorrt_version(tmp_path) is None


@pytest.mark.usefixtures("no_headers")
def test_headers_are_found_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_headers(tmp_path / "TensorRT-10.3" / "include")
    assert find_tensorrt_headers(place) == place
    assert find_tensorrt_headers(place.parent) == place
    for name in ("TensorRT_ROOT", "TENSORRT_HOME"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(place.parent))
            assert find_tensorrt_headers() == place
    # Several may be named, and the first counts.
    monkeypatch.setenv("EDGESEG_TENSORRT_HEADERS", f"{place}{os.pathsep}/elsewhere")
    monkeypatch.setenv("TENSORRT_HOME", "/elsewhere")
    assert find_tensorrt_headers() == place


@pytest.mark.usefixtures("no_headers")
def test_headers_are_found_in_the_usual_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_headers(tmp_path / "include")
    set_in_build(monkeypatch, "_HEADER_FOLDERS", ("/none/here", str(place)))
    assert find_tensorrt_headers() == place


@pytest.mark.usefixtures("no_headers")
def test_missing_headers_say_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        KernelError, match=r"none of /none/here, /nor/there has .*apt install libnv"
    ):
        find_tensorrt_headers()
    with pytest.raises(KernelError, match=f"--tensorrt-headers is {tmp_path}, and neither it"):
        find_tensorrt_headers(tmp_path)
    monkeypatch.setenv("TENSORRT_HOME", str(tmp_path))
    with pytest.raises(KernelError, match=f"TENSORRT_HOME is {tmp_path}, and neither it"):
        find_tensorrt_headers()


def test_old_headers_are_refused(tmp_path: Path) -> None:
    old = write_headers(tmp_path / "old", OLD)
    with pytest.raises(KernelError, match=r"TensorRT 8\.5\.0, and the plugins need 10\.0 or newer"):
        find_tensorrt_headers(old)
    mute = write_headers(tmp_path / "mute", "")
    with pytest.raises(KernelError, match=r"NvInferVersion\.h does not tell a TensorRT version"):
        find_tensorrt_headers(mute)


# --- what CMake is asked to do, by a cmake that only notes it

FAKE_CMAKE = """#!{python}
import json, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if "--build" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("--build") + 1])
    for target in sys.argv[sys.argv.index("--target") + 1 :]:
        if {fails!r}:
            print("nothing wrong in line 1")
            print("mask.cu(7): error: identifier is undefined", file=sys.stderr)
            print("and more", file=sys.stderr)
            sys.exit(2)
        (folder / f"lib{{target}}.so").write_text(target)
"""


class Tools:
    """A cmake and an nvcc that compile nothing, first on the path."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._log = folder / "log"
        folder.mkdir()
        self._write("nvcc", "#!/bin/sh\n")
        self.write_cmake()
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("CUDACXX", raising=False)

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text, encoding="utf-8")
        (self._folder / name).chmod(0o755)

    def write_cmake(self, *, fails: bool = False) -> None:
        text = FAKE_CMAKE.format(python=sys.executable, log=str(self._log), fails=fails)
        self._write("cmake", text)

    @property
    def nvcc(self) -> str:
        return str(self._folder / "nvcc")

    def calls(self) -> tuple[dict[str, str], list[str]]:
        """What was defined, and the targets that were built."""
        configure, build = map(json.loads, self._log.read_text(encoding="utf-8").splitlines())
        assert configure[:2] == ["-S", str(Path(kernels.__file__).parent)]
        defined = [argument[2:].split("=", 1) for argument in configure if argument[:2] == "-D"]
        return dict(defined), build[build.index("--target") + 1 :]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(tmp_path / "bin", monkeypatch)


def test_both_libraries_are_built_in_one_go(tools: Tools, tmp_path: Path) -> None:
    headers = write_headers(tmp_path / "include")
    made = tmp_path / "made"
    cuda, plugins = build_tensorrt(made, headers, ["8.7", " sm_110", "90a"])
    assert (cuda, plugins) == (made / "libedgeseg_cuda.so", made / "libedgeseg_plugins.so")
    assert sorted(made.iterdir()) == [cuda, plugins]
    assert plugins.read_text(encoding="utf-8") == "edgeseg_plugins"
    assert os.access(plugins, os.X_OK)
    defined, targets = tools.calls()
    assert defined == {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": tools.nvcc,
        "CMAKE_CUDA_ARCHITECTURES": "87;110;90a",
        "EDGESEG_TENSORRT_HEADERS": str(headers),
    }
    assert targets == ["edgeseg_cuda", "edgeseg_plugins"]


def test_the_plugins_alone(tools: Tools, tmp_path: Path) -> None:
    path = build_plugins(tmp_path / "made", write_headers(tmp_path / "include"), ["87"])
    assert path.name == "libedgeseg_plugins.so"
    assert tools.calls()[1] == ["edgeseg_plugins"]


@pytest.mark.usefixtures("no_headers")
def test_the_cuda_library_needs_no_tensorrt(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_in_build(monkeypatch, "_device_architectures", lambda: ["87"])
    assert build_cuda(tmp_path / "made").name == "libedgeseg_cuda.so"
    defined, targets = tools.calls()
    assert targets == ["edgeseg_cuda"]
    assert defined["CMAKE_CUDA_ARCHITECTURES"] == "87"
    assert "EDGESEG_TENSORRT_HEADERS" not in defined


def test_without_a_gpu_cmake_has_its_own_list(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_in_build(monkeypatch, "_device_architectures", list)
    build_cuda(tmp_path / "made")
    assert "CMAKE_CUDA_ARCHITECTURES" not in tools.calls()[0]


@pytest.mark.parametrize("architectures", [["orin"], ["87", ""], ["5"], ["87;90"], []])
def test_other_architectures_are_refused(
    tools: Tools, architectures: Sequence[str], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="rchitecture"):
        build_cuda(tmp_path / "made", architectures)
    assert not (tmp_path / "made").exists()


def test_a_failing_build_says_why_and_leaves_nothing(tools: Tools, tmp_path: Path) -> None:
    made = tmp_path / "made"
    old = build_cuda(made, ["87"])
    tools.write_cmake(fails=True)
    with pytest.raises(
        KernelError, match=r"mask\.cu\(7\): error: identifier is undefined and more"
    ):
        build_cuda(made, ["87"])
    assert list(made.iterdir()) == [old]
    assert old.read_text(encoding="utf-8") == "edgeseg_cuda"


def test_all_missing_tools_are_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CUDACXX", raising=False)
    which = shutil.which
    # A toolkit in /usr/local/cuda would be found whatever the path is.
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: which(name, path=path and str(tmp_path))
    )
    with pytest.raises(
        KernelError, match=r"needs cmake, .*apt install cmake.* and nvcc, .*jetpack"
    ):
        build_cuda(tmp_path / "made", ["87"])


def test_nvcc_is_found_off_the_path(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    Path(tools.nvcc).rename(home / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(home))
    build_cuda(tmp_path / "made", ["87"])
    assert tools.calls()[0]["CMAKE_CUDA_COMPILER"] == str(home / "bin" / "nvcc")


# --- finding what was built


@pytest.fixture
def shelves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Empty folders in place of the package's and the user's cache."""
    package, cache = tmp_path / "package", tmp_path / "cache"
    set_in_build(monkeypatch, "_SOURCES", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    package.mkdir()
    (cache / "edgeseg" / "kernels").mkdir(parents=True)
    return package, cache / "edgeseg" / "kernels"


def compile_numbers(path: Path, **numbers: int) -> Path:
    """A library whose functions return the numbers."""
    text = "".join(f"int {name}(void) {{ return {number}; }}\n" for name, number in numbers.items())
    source = path.with_suffix(".c")
    source.write_text(text, encoding="utf-8")
    path.unlink(missing_ok=True)  # what is loaded must not be written over
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    source.unlink()
    return path


needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")


@needs_cc
def test_the_newest_library_that_fits_is_found(shelves: tuple[Path, Path]) -> None:
    assert find_cuda_library() is None
    old, new = (
        compile_numbers(
            folder / "libedgeseg_cuda.so", edgeseg_cuda_abi_version=launchers.ABI_VERSION
        )
        for folder in shelves
    )
    os.utime(old, ns=(1, 1))
    assert find_cuda_library() == new
    assert require_cuda_library() == new
    compile_numbers(new, edgeseg_cuda_abi_version=launchers.ABI_VERSION + 1)
    assert find_cuda_library() == old
    assert find_plugin_library() is None


@needs_cc
def test_a_library_that_does_not_fit_says_so(shelves: tuple[Path, Path]) -> None:
    package, _ = shelves
    path = package / "libedgeseg_plugins.so"
    with pytest.raises(KernelError, match=r"neither in .*; run `edgeseg kernels build --tensorrt`"):
        require_plugin_library()

    compile_numbers(path, edgeseg_plugin_abi_version=0)
    with pytest.raises(KernelError, match=f"{path} has interface version 0, expected"):
        require_plugin_library()
    assert find_plugin_library() is None

    path.unlink()
    path.write_bytes(b"not a library")
    with pytest.raises(KernelError, match=r"libedgeseg_plugins\.so cannot be loaded"):
        require_plugin_library()


@needs_cc
def test_plugins_for_another_major_release_do_not_fit(shelves: tuple[Path, Path]) -> None:
    package, cache = shelves
    for folder, major in ((package, 10), (cache, 11)):
        compile_numbers(
            folder / "libedgeseg_plugins.so",
            edgeseg_plugin_abi_version=PLUGIN_ABI_VERSION,
            edgeseg_plugin_tensorrt_major=major,
        )
    assert find_plugin_library(10) == package / "libedgeseg_plugins.so"
    assert find_plugin_library(11) == cache / "libedgeseg_plugins.so"
    assert find_plugin_library() is not None
    with pytest.raises(KernelError, match=r"was built for TensorRT 1[01], and 12 is here; run"):
        require_plugin_library(12)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("nvcc") is None,
    reason="no cmake or no nvcc on the path: the CUDA library cannot be built",
)
def test_the_cuda_library_is_built_and_opens(tmp_path: Path) -> None:
    path = build_cuda(tmp_path / "made", ["87"])
    assert [entry.name for entry in path.parent.iterdir()] == ["libedgeseg_cuda.so"]
    assert launchers.open_library(path).edgeseg_cuda_abi_version() == launchers.ABI_VERSION
