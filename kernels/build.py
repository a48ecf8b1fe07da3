"""Building the CPU library from its source with the machine's own C++ compiler.

Uses only the standard library, so that it runs where nothing else is installed yet.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from edgeseg.errors import KernelError

__all__ = ["ABI_VERSION", "build", "library_candidates"]

ABI_VERSION = 2
"""What ``edgeseg_abi_version()`` of a fitting library returns; as in cpu/library.cpp."""

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
