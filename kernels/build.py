"""Building the compiled libraries from their source with the machine's own compilers.

Three of them: the CPU library (a C++ compiler is enough), the CUDA library (CMake and nvcc), and
the TensorRT plugins (the same, and TensorRT's headers). Uses only the standard library, so that it
runs where nothing else is installed yet.
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeseg.errors import KernelError, RequestError
from edgeseg.kernels import launchers

__all__ = [
    "ABI_VERSION",
    "PLUGIN_ABI_VERSION",
    "build",
    "build_cuda",
    "build_plugins",
    "build_tensorrt",
    "find_cuda_library",
    "find_plugin_library",
    "find_tensorrt_headers",
    "library_candidates",
    "require_cuda_library",
    "require_plugin_library",
]

ABI_VERSION = 2
"""What ``edgeseg_abi_version()`` of a fitting library returns; as in cpu/library.cpp."""

PLUGIN_ABI_VERSION = 1
"""What ``edgeseg_plugin_abi_version()`` of a fitting library returns; as in plugins/library.cpp."""

# The same list is in setup.py, which cannot import this package before it is installed; a test
# compares the two. No fused multiply-add: results must not depend on whether a machine has it.
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
)

_SOURCES = Path(__file__).parent
_LIBRARY_NAME = "_cpu.so"


@dataclass(frozen=True)
class _DeviceLibrary:
    """A library that CMake builds: its target, and how its version is told."""

    target: str
    version_function: str
    version: int
    command: str

    @property
    def file_name(self) -> str:
        return f"lib{self.target}.so"


_CUDA = _DeviceLibrary(
    "edgeseg_cuda",
    "edgeseg_cuda_abi_version",
    launchers.ABI_VERSION,
    "edgeseg kernels build --cuda",
)
_PLUGINS = _DeviceLibrary(
    "edgeseg_plugins",
    "edgeseg_plugin_abi_version",
    PLUGIN_ABI_VERSION,
    "edgeseg kernels build --tensorrt",
)


def cache_directory() -> Path:
    """Per-user folder for a library whose package folder cannot be written."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "edgeseg" / "kernels"


def library_candidates() -> list[Path]:
    """Files that may be the CPU library, the newest first: package folder, then cache folder."""
    found = [*_SOURCES.glob("_cpu*.so"), *cache_directory().glob("_cpu*.so")]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _compiler() -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise KernelError(
                f"The C++ compiler named by CXX, {asked[0]!r}, is not on this machine; unset CXX "
                "or point it at g++ or clang++."
            )
        return asked
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise KernelError(
        "Building the CPU kernels needs a C++17 compiler, and none of c++, g++ and clang++ is on "
        "the path; install one (Debian, Ubuntu, Jetson: apt install g++) or set CXX."
    )


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _target_directory() -> Path:
    for directory in (_SOURCES, cache_directory()):
        if _is_writable(directory):
            return directory
    raise KernelError(
        f"Neither {_SOURCES} nor {cache_directory()} can be written; pass a directory that can."
    )


def build(directory: Path | None = None) -> Path:
    """Compile the CPU library and return its path.

    ``directory`` takes the library; by default that is the package's own folder, or the per-user
    cache folder where the package's is read-only, and ``load`` finds it in either. The compiler is
    ``CXX``, else c++, g++ or clang++. The file appears whole or not at all. A library that is
    already loaded stays so until the process ends.

    Raises ``KernelError`` without a compiler, without a folder that can be written, and when
    compilation fails.
    """
    compiler = _compiler()
    sources = sorted((_SOURCES / "cpu").glob("*.cpp"))
    if not sources:
        raise KernelError(f"The sources in {_SOURCES / 'cpu'} are missing; reinstall edgeseg.")
    if directory is None:
        directory = _target_directory()
    elif not _is_writable(directory):
        raise KernelError(f"{directory} cannot be written; choose another directory.")
    target = directory / _LIBRARY_NAME

    handle, name = tempfile.mkstemp(prefix=".build-", suffix=".so", dir=directory)
    os.close(handle)
    temporary = Path(name)
    shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared"]
    fixed = [*COMPILE_FLAGS, "-fPIC", *shared, f"-I{_SOURCES / 'include'}"]
    fixed += map(str, sources)
    try:
        command = [*compiler, *fixed, "-o", str(temporary)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise KernelError(
                f"The C++ compiler {compiler[0]} cannot be run ({error}); set CXX to another."
            ) from error
        if result.returncode == 0:
            temporary.chmod(0o755)
            temporary.replace(target)
            return target
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), (lines or [""])[0])
        raise KernelError(
            f"{compiler[0]} could not compile the CPU kernels (exit code {result.returncode}: "
            f"{said.strip() or 'no message'}); set CXX to a C++17 compiler, GCC 9 or Clang 10 "
            "or newer."
        )
    finally:
        temporary.unlink(missing_ok=True)


def find_cuda_library() -> Path | None:
    """The newest ``libedgeseg_cuda.so`` that fits this version of EdgeSeg, or None."""
    return _find(_CUDA, None)[0]


def find_plugin_library(tensorrt_major: int | None = None) -> Path | None:
    """The newest ``libedgeseg_plugins.so`` that fits this version of EdgeSeg, or None.

    ``tensorrt_major`` is that of the TensorRT that is to load it, and then one compiled against
    another major release does not fit: it could crash where it logs an error.
    """
    return _find(_PLUGINS, tensorrt_major)[0]


def require_cuda_library() -> Path:
    """As ``find_cuda_library``; KernelError that says why there is none, and the way out."""
    return _require(_CUDA, None)


def require_plugin_library(tensorrt_major: int | None = None) -> Path:
    """As ``find_plugin_library``; KernelError that says why there is none, and the way out."""
    return _require(_PLUGINS, tensorrt_major)


def _require(library: _DeviceLibrary, tensorrt_major: int | None) -> Path:
    path, reason = _find(library, tensorrt_major)
    if path is None:
        raise KernelError(f"{reason}; run `{library.command}`.")
    return path


def _find(library: _DeviceLibrary, tensorrt_major: int | None) -> tuple[Path | None, str]:
    """The library's file, or None and why."""
    reason = f"{library.file_name} is neither in {_SOURCES} nor in {cache_directory()}"
    found = [
        folder / library.file_name
        for folder in (_SOURCES, cache_directory())
        if (folder / library.file_name).is_file()
    ]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            numbers = _numbers(path, library.version_function, tensorrt_major is not None)
        except (OSError, AttributeError) as error:
            reason = f"{path} cannot be loaded ({error})"
            continue
        if numbers[0] != library.version:
            reason = f"{path} has interface version {numbers[0]}, expected {library.version}"
            continue
        if tensorrt_major not in (None, numbers[-1]):
            reason = f"{path} was built for TensorRT {numbers[-1]}, and {tensorrt_major} is here"
            continue
        return path, ""
    return None, reason


def _numbers(path: Path, version_function: str, of_tensorrt: bool) -> list[int]:
    """What a library says of itself: its version and, on request, TensorRT's major release.

    OSError or AttributeError where it cannot. It is closed again, since a library that stays open
    would hide the one that a rebuild puts in its place.
    """
    library = ctypes.CDLL(str(path))
    try:
        names = [version_function, *(["edgeseg_plugin_tensorrt_major"] if of_tensorrt else [])]
        functions = [getattr(library, name) for name in names]
        for function in functions:
            function.argtypes = []
            function.restype = ctypes.c_int32
        return [int(function()) for function in functions]
    finally:
        _ctypes.dlclose(library._handle)


def build_cuda(directory: Path | None = None, architectures: Sequence[str] | None = None) -> Path:
    """Compile ``libedgeseg_cuda.so``, the CUDA kernels, and return its path.

    ``directory`` is as for ``build``. ``architectures`` are compute capabilities such as "87"; by
    default those of the GPUs that are here, and without one the list in CMakeLists.txt.

    Raises ``KernelError`` that names everything missing at once (CMake, nvcc) and how to get it,
    and when compilation fails; ``RequestError`` for an architecture that is none.
    """
    (path,) = _build_device((_CUDA,), directory, None, architectures)
    return path


def build_plugins(
    directory: Path | None = None,
    headers: Path | None = None,
    architectures: Sequence[str] | None = None,
) -> Path:
    """Compile ``libedgeseg_plugins.so``, the TensorRT plugins, and return its path.

    ``headers`` is the folder of TensorRT's NvInferRuntime.h, or one above it; by default what
    ``find_tensorrt_headers`` finds. The rest is as for ``build_cuda``.
    """
    (path,) = _build_device((_PLUGINS,), directory, headers, architectures)
    return path


def build_tensorrt(
    directory: Path | None = None,
    headers: Path | None = None,
    architectures: Sequence[str] | None = None,
) -> tuple[Path, Path]:
    """What a TensorRT engine uses: the CUDA library and the plugins, compiled in one go."""
    cuda, plugins = _build_device((_CUDA, _PLUGINS), directory, headers, architectures)
    return cuda, plugins


def find_tensorrt_headers(headers: Path | None = None) -> Path:
    """The folder with NvInferRuntime.h: ``headers``, or the first of the usual places.

    These are EDGESEG_TENSORRT_HEADERS, the tar installation that TENSORRT_HOME or TensorRT_ROOT
    names, the packages of Debian, Ubuntu and Jetson, /usr/local/tensorrt and /opt/tensorrt. A place
    that was named must have them.

    Raises ``KernelError`` when there are none, or only those of a release before 10.0.
    """
    named = _named_headers(headers)
    if named is not None:
        origin, place = named
        tried = [place, place / "include"]
        missing = f"{origin} is {place}, and neither it nor its include folder"
    else:
        tried = [Path(folder) for folder in _HEADER_FOLDERS]
        missing = (
            f"TensorRT's headers are not on this machine: none of {', '.join(map(str, tried))}"
        )
    for folder in tried:
        if (folder / "NvInferRuntime.h").is_file():
            _check_headers(folder)
            return folder
    raise KernelError(
        f"{missing} has NvInferRuntime.h. On a Jetson, and with NVIDIA's packages for Ubuntu, "
        "`sudo apt install libnvinfer-headers-dev` brings it; otherwise unpack a TensorRT tar from "
        "NVIDIA and name its folder with --tensorrt-headers."
    )


_HEADER_FOLDERS = (
    "/usr/include/aarch64-linux-gnu",
    "/usr/include/x86_64-linux-gnu",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
    "/usr/include",
)


def _named_headers(headers: Path | None) -> tuple[str, Path] | None:
    """Who names a place for the headers, and which."""
    if headers is not None:
        return "--tensorrt-headers", headers
    for variable in ("EDGESEG_TENSORRT_HEADERS", "TENSORRT_HOME", "TensorRT_ROOT"):
        # Several may be named, for tests; the first counts.
        value = os.environ.get(variable, "").split(os.pathsep)[0]
        if value:
            return variable, Path(value)
    return None


def _check_headers(folder: Path) -> None:
    """KernelError unless the headers are of a release that has IPluginV3."""
    version = tensorrt_version(folder)
    if version is None:
        raise KernelError(
            f"{folder / 'NvInferVersion.h'} does not tell a TensorRT version; name the headers of "
            "TensorRT 10.0 or newer with --tensorrt-headers."
        )
    if version < (10, 0, 0):
        told = ".".join(map(str, version))
        raise KernelError(
            f"The headers in {folder} are of TensorRT {told}, and the plugins need 10.0 or newer "
            "(JetPack 6), which brought IPluginV3; name newer ones with --tensorrt-headers."
        )


def tensorrt_version(headers: Path) -> tuple[int, int, int] | None:
    """(major, minor, patch) of the TensorRT headers in a folder; None if they do not tell."""
    try:
        text = (headers / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    defined: dict[str, str] = dict(re.findall(r"^\s*#define\s+(\w+)\s+(\w+)", text, re.MULTILINE))
    numbers: list[int] = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = defined.get(f"NV_TENSORRT_{part}", "")
        value = defined.get(value, value)  # newer ones go through a second name
        if not value.isdecimal():
            return None
        numbers.append(int(value))
    return numbers[0], numbers[1], numbers[2]


def _build_device(
    libraries: Sequence[_DeviceLibrary],
    directory: Path | None,
    headers: Path | None,
    architectures: Sequence[str] | None,
) -> list[Path]:
    """Build ``libraries`` in a temporary folder and put them in place."""
    wanted = _checked_architectures(architectures)
    cmake, nvcc = _device_compilers()
    defined = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_CUDA_COMPILER": nvcc}
    if _PLUGINS in libraries:
        defined["EDGESEG_TENSORRT_HEADERS"] = str(find_tensorrt_headers(headers))
    if wanted:
        defined["CMAKE_CUDA_ARCHITECTURES"] = ";".join(wanted)
    if directory is None:
        directory = _target_directory()
    elif not _is_writable(directory):
        raise KernelError(f"{directory} cannot be written; choose another directory.")
    # Each compiler takes up to 1 GB, and the smallest boards have 4.
    jobs = min(os.cpu_count() or 1, 4)
    with tempfile.TemporaryDirectory(prefix="edgeseg-build-") as folder:
        _run_cmake(
            [cmake, "-S", str(_SOURCES), "-B", folder]
            + [f"-D{name}={value}" for name, value in defined.items()]
        )
        targets = [library.target for library in libraries]
        _run_cmake([cmake, "--build", folder, "--parallel", str(jobs), "--target", *targets])
        return [
            _put_in_place(Path(folder) / library.file_name, directory / library.file_name)
            for library in libraries
        ]


def _checked_architectures(architectures: Sequence[str] | None) -> list[str]:
    """As CMake writes them: "87". Those of the GPUs that are here for None."""
    if architectures is None:
        return _device_architectures()
    checked = []
    for architecture in architectures:
        plain = architecture.strip().removeprefix("sm_").replace(".", "")
        if re.fullmatch(r"[1-9][0-9]{1,2}[af]?", plain) is None:
            raise RequestError(
                f"An architecture is a compute capability such as 87, and {architecture!r} came; "
                "Orin is 87, Thor 110, Xavier 72."
            )
        checked.append(plain)
    if not checked:
        raise RequestError("architectures is empty; pass None for those of the GPUs that are here.")
    return checked


def _device_architectures() -> list[str]:
    """Compute capabilities of the GPUs here, such as "87"; none without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = set()
    for ordinal in range(count.value):
        device = ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.add((major.value, minor.value))
    return [f"{major}{minor}" for major, minor in sorted(found)]


def _device_compilers() -> tuple[str, str]:
    """(cmake, nvcc); KernelError that names all that is missing."""
    # A cmake from pip lies beside the Python that runs, whose folder need not be on the path.
    beside = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake") or shutil.which("cmake", path=beside)
    cuda_homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in cuda_homes if home]
    asked = os.environ.get("CUDACXX", "")
    nvcc = shutil.which(asked or "nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    missing = []
    if cmake is None:
        missing.append("cmake, which is not on the path (`sudo apt install cmake`, or with pip)")
    if nvcc is None:
        missing.append(
            f"nvcc, which is neither on the path nor in {' or '.join(folders)} (a Jetson has it in "
            "/usr/local/cuda/bin after `sudo apt install nvidia-jetpack`; elsewhere install the "
            "CUDA toolkit and set CUDA_HOME)"
        )
    if cmake is None or nvcc is None:
        raise KernelError(f"Building the CUDA kernels needs {' and '.join(missing)}.")
    return cmake, nvcc


def _run_cmake(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelError(f"{command[0]} cannot be run ({error}); install CMake again.") from error
    if result.returncode == 0:
        return
    # Compilers write to one stream, make and ninja pass it on to the other.
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    at = next(
        (i for i, line in enumerate(lines) if re.search(r"\berror\b|undefined ref", line, re.I)), 0
    )
    # CMake says where on the first line and what on the next.
    said = " ".join(lines[at : at + 2]) if lines else "no message"
    raise KernelError(
        f"The CUDA kernels could not be compiled (cmake ended with {result.returncode}: {said}). "
        "CMake 3.18 or newer is needed, a C++17 compiler, and architectures that this nvcc knows."
    )


def _put_in_place(made: Path, target: Path) -> Path:
    """``made`` at ``target``, whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=".build-", suffix=".so", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        shutil.copyfile(made, temporary)
        temporary.chmod(0o755)
        temporary.replace(target)
    except OSError as error:
        raise KernelError(f"{target} cannot be written ({error.strerror}).") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
