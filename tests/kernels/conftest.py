"""The CUDA kernels for tests: on an emulation of CUDA everywhere, compiled by nvcc on a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
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
    folder = tmp_path_factory.mktemp("emulated")
    target = folder / "libedgeseg_cuda.so"

    def compiled(source: str) -> str:
        made = str(folder / f"{Path(source).stem}.o")
        subprocess.run(
            ["g++", "-x", "c++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-Wall",
             "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DEDGESEG_CUDA_EMULATION", f"-I{HERE}",
             f"-I{KERNELS / 'include'}", "-c", source, "-o", made],
            check=True,
        )  # fmt: skip
        return made

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, SOURCES))
    subprocess.run(["g++", "-shared", *objects, "-o", str(target)], check=True)
    return launchers.open_library(target)


def find_nvcc() -> Path | None:
    """CUDA's compiler: on the path, where CUDA is, or from the package index (`make nvcc`)."""
    found = shutil.which("nvcc")
    if found is not None:
        return Path(found)
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *_cuda_packages()]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _cuda_packages() -> list[str]:
    """Folders of NVIDIA's packages, such as site-packages/nvidia/cu13."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return [str(folder) for place in places for folder in sorted(Path(place).glob("cu*"))]


@pytest.fixture(scope="session")
def nvcc() -> Path:
    """CUDA's compiler."""
    found = find_nvcc()
    if found is None:
        pytest.skip("there is no nvcc on the path or in CUDA_HOME; `make nvcc` gets one")
    return found


@pytest.fixture(scope="session")
def cuda_library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """All launchers, compiled by nvcc for the GPU that is here.

    EDGESEG_CUDA_LIBRARY names one that is built already (benchmarks/gpu.sh).
    """
    torch = pytest.importorskip("torch", reason="torch holds the device memory in these tests")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the launchers cannot run")
    built = os.environ.get("EDGESEG_CUDA_LIBRARY")
    if built:
        return launchers.open_library(Path(built))
    nvcc = request.getfixturevalue("nvcc")
    target = tmp_path_factory.mktemp("cuda") / "libedgeseg_cuda.so"
    subprocess.run(
        [str(nvcc), "-std=c++17", "-O3", "-fmad=false", "-arch=native", "-shared",
         "-Xcompiler=-fPIC", f"-I{KERNELS / 'include'}", *SOURCES, "-o", str(target)],
        check=True,
    )  # fmt: skip
    return launchers.open_library(target)
