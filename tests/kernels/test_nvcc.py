"""The CUDA kernels compile without a warning for every GPU that counts, and spill no register.

nvcc needs no GPU, and ptxas reports what each kernel takes: registers, spills, local memory.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SOURCES = sorted((KERNELS / "cuda").glob("*.cu"))
PLUGINS = sorted((KERNELS / "plugins").glob("*.cpp"))

# Turing, A100, GeForce 30, Orin, 88, Ada, Hopper, B200, B300, Thor, GeForce 50, DGX Spark
ARCHITECTURES = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
# The board of today and the newest one: in every run of the tests.
QUICK = (87, 121)
REPORTED = 87

REGISTERS_OF_PROCESSOR = 65536
# Registers are given out to warps in this many per thread.
REGISTER_UNIT = 8

# As kernels/CMakeLists.txt compiles; no fused multiply-add, so that the results are the CPU's.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings")

by_source = pytest.mark.parametrize("source", SOURCES, ids=[source.name for source in SOURCES])


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel."""

    name: str
    architecture: int
    local_bytes: int  # stack frame: spilled registers, and arrays that are indexed at run time
    spill_store_bytes: int
    spill_load_bytes: int
    registers: int


@dataclass(frozen=True)
class Bounds:
    """The launch bounds of one kernel: threads of a block, blocks at once on a processor."""

    threads: int
    blocks: int


@dataclass(frozen=True)
class Compiled:
    """A file compiled by nvcc, with its report."""

    kernels: tuple[Kernel, ...]
    bounds: dict[str, Bounds | None]  # of the architecture REPORTED; None without launch bounds


def compile_source(
    nvcc: Path, source: Path, architectures: tuple[int, ...], folder: Path
) -> Compiled:
    """Compiles ``source`` with all warnings as errors; fails the test with nvcc's words."""
    targets = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in architectures]
    command = [
        str(nvcc), *FLAGS, "-Xptxas=-v", *targets, "--threads=2", "-Xcompiler=-Wall,-Wextra",
        "--keep", "--keep-dir", str(folder), f"-I{KERNELS / 'include'}", "-c", str(source),
        "-o", str(folder / "object.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    ptx = folder / f"{source.stem}.compute_{REPORTED}.ptx"
    bounds = read_bounds(ptx.read_text(encoding="utf-8")) if REPORTED in architectures else {}
    return Compiled(tuple(read_report(done.stderr + done.stdout)), bounds)


def read_report(text: str) -> Iterator[Kernel]:
    """The kernels in what ``ptxas -v`` prints."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)'"
        r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    for found in pattern.finditer(text):
        yield Kernel(
            found["name"],
            int(found["architecture"]),
            int(found["stack"]),
            int(found["stores"]),
            int(found["loads"]),
            int(found["registers"]),
        )


def read_bounds(ptx: str) -> dict[str, Bounds | None]:
    """The launch bounds of each kernel in a PTX file."""
    bounds: dict[str, Bounds | None] = {}
    for entry in re.finditer(r"\.entry (\w+)\(.*?^\{", ptx, re.DOTALL | re.MULTILINE):
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+), (\d+))?", entry[0])
        blocks = re.search(r"\.minnctapersm (\d+)", entry[0])
        if threads is None:
            bounds[entry[1]] = None
            continue
        x, y, z = (int(side or 1) for side in threads.groups())
        bounds[entry[1]] = Bounds(x * y * z, int(blocks[1]) if blocks else 1)
    return bounds


@by_source
def test_compiles_for_orin_and_spark_and_spills_nothing(
    nvcc: Path, source: Path, tmp_path: Path
) -> None:
    compiled = compile_source(nvcc, source, QUICK, tmp_path)
    kernels = [kernel for kernel in compiled.kernels if kernel.architecture == REPORTED]
    # The report is of every kernel that there is.
    assert {kernel.name for kernel in kernels} == set(compiled.bounds)
    assert bool(kernels) == ("__global__" in source.read_text(encoding="utf-8"))
    for kernel in kernels:
        print(kernel)
        assert kernel.local_bytes == 0, kernel
        assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0), kernel
        bounds = compiled.bounds[kernel.name]
        assert bounds is not None, f"{kernel.name} has no __launch_bounds__"
        given = -(-kernel.registers // REGISTER_UNIT) * REGISTER_UNIT
        assert given * bounds.threads * bounds.blocks <= REGISTERS_OF_PROCESSOR, kernel


@pytest.mark.slow
@by_source
def test_compiles_for_every_architecture(nvcc: Path, source: Path, tmp_path: Path) -> None:
    compiled = compile_source(nvcc, source, ARCHITECTURES, tmp_path)
    names = {kernel.name for kernel in compiled.kernels}
    for architecture in ARCHITECTURES:
        found = {kernel.name for kernel in compiled.kernels if kernel.architecture == architecture}
        assert found == names


def test_the_report_tells_a_spill(nvcc: Path, tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    # More values at once than 40 registers hold, and an array that is indexed at run time.
    source.write_text(
        """
        __global__ void __launch_bounds__(768, 2) spills(const float* from, float* to, int at) {
          float values[64];
          for (int i = 0; i < 64; ++i) values[i] = from[i * 1024 + threadIdx.x];
          for (int i = 0; i < 64; ++i) values[i] *= values[(i * 7 + 3) % 64] + values[at];
          float sum = 0.0f;
          for (int i = 0; i < 64; ++i) sum = sum * values[i] + 1.0f;
          to[threadIdx.x] = sum;
        }
        __global__ void unbounded(int* to) { *to = 1; }
        """,
        encoding="utf-8",
    )
    compiled = compile_source(nvcc, source, QUICK, tmp_path)
    reported = [one for one in compiled.kernels if one.architecture == REPORTED]
    kernels = {re.sub(r"^_Z\d+([a-z]+?)P.*", r"\1", one.name): one for one in reported}
    assert kernels["spills"].local_bytes > 0
    assert kernels["unbounded"].local_bytes == 0
    assert compiled.bounds[kernels["spills"].name] == Bounds(768, 2)
    assert compiled.bounds[kernels["unbounded"].name] is None


def test_a_warning_is_an_error(nvcc: Path, tmp_path: Path) -> None:
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void warns() { int unused; }\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="unused"):
        compile_source(nvcc, source, QUICK, tmp_path)


def tensorrt_headers() -> list[Path]:
    """The folders named by EDGESEG_TENSORRT_HEADERS."""
    named = os.environ.get("EDGESEG_TENSORRT_HEADERS", "").split(os.pathsep)
    return [Path(folder) for folder in named if folder]


@pytest.mark.slow
@pytest.mark.parametrize("source", PLUGINS, ids=[source.name for source in PLUGINS])
def test_plugins_compile_against_each_release(nvcc: Path, source: Path, tmp_path: Path) -> None:
    if not tensorrt_headers():
        pytest.skip("EDGESEG_TENSORRT_HEADERS names no folder with TensorRT's headers")
    for headers in tensorrt_headers():
        command = [
            str(nvcc), "-std=c++17", "-O1", "-Xcompiler=-Wall,-Wextra,-Werror",
            f"-I{KERNELS / 'include'}", f"-isystem={headers}", "-c", str(source),
            "-o", str(tmp_path / "object.o"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{headers}\n{done.stderr}"
