"""The CUDA kernels for tests: on an emulation of CUDA everywhere, compiled by nvcc on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from edgeseg.kernels import launchers

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
SOURCES = sorted(map(str, (KERNELS / "cuda").glob("*.cu")))


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All launchers over the CUDA kernels' own lines, on the CPU; pointers are numpy's."""
    if shutil.which("g++") is None:
        pytest.skip("the emulation of CUDA is compiled with g++, which is not here")
    target = tmp_path_factory.mktemp("emulated") / "libedgeseg_cuda.so"
    subprocess.run(
        ["g++", "-x", "c++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall",
         "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DEDGESEG_CUDA_EMULATION", f"-I{HERE}",
         f"-I{KERNELS / 'include'}", *SOURCES, "-o", str(target)],
        check=True,
    )  # fmt: skip
    return launchers.open_library(target)


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All launchers, compiled by nvcc for the GPU that is here."""
    torch = pytest.importorskip("torch", reason="torch holds the device memory in these tests")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the launchers cannot run")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the path: the launchers cannot be compiled")
    target = tmp_path_factory.mktemp("cuda") / "libedgeseg_cuda.so"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-arch=native", "-shared",
         "-Xcompiler=-fPIC", f"-I{KERNELS / 'include'}", *SOURCES, "-o", str(target)],
        check=True,
    )  # fmt: skip
    return launchers.open_library(target)
