"""Stub files of four TensorRT releases, made from the releases' own Python bindings.

The bindings are small wheels on the package index, and import without TensorRT when a library of
its name answers the ten C symbols that they look for: nothing of TensorRT runs, but every class,
enum and signature is the real one. So our code is type-checked against each release
(``make lint-tensorrt``), and tested on doubles made of the same files (double.py). It proves names
and signatures, not behaviour.

::

    python tests/tensorrt/stubs.py            makes build/tensorrt/<release>/stubs, once
    python tests/tensorrt/stubs.py --check    mypy over the code that knows TensorRT, per release

What is downloaded and generated stays below build/ and belongs to NVIDIA: none of it may be
committed.

How code that knows TensorRT is written, so that it passes on every release and without stubs:

- All of it is in ``edgeseg/engine``.
- ``import tensorrt as trt`` stands inside the function that needs it (or under ``TYPE_CHECKING``
  for annotations), never at the top of a module: the device side imports without TensorRT, and a
  test puts another release in its place. Classes derived from TensorRT's are made in functions,
  too.
- A name that only some releases have is asked for by
  ``getattr(trt.BuilderFlag, "FP16", None)`` or ``getattr(engine, "device_memory_size_v2", None)``:
  mypy takes it for Any, a test proves that some release has it. A name that all four have is
  written plainly.
- What TensorRT answers with a null pointer is ``X | None`` here (``deserialize_cuda_engine``,
  ``build_serialized_network``, ``create_execution_context``, ``get_creator``, ...).
- A function that returns what TensorRT gave says its type: ``return bool(context.execute(...))``,
  since without stubs it is Any.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "tensorrt"
GENERATOR = HERE / "bindings.py"
STUBGEN = "pybind11-stubgen==3.0.0"

# What mypy reads again for every release: all of our code that imports tensorrt is in there.
CHECKED = "edgeseg/engine"

_SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getInferLibVersion",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_TIMEOUT_S = 300


class StubsError(Exception):
    """Stubs that cannot be made here; the message is one sentence for a person."""


@dataclass(frozen=True)
class Release:
    """A release of TensorRT: ``name`` as users say it, the wheel, and its libraries' major."""

    name: str
    requirement: str
    major: int

    @property
    def folder(self) -> Path:
        """Where everything of this release lies."""
        return BUILD / self.name

    @property
    def stubs(self) -> Path:
        """The folder for MYPYPATH, with values.json beside the package."""
        return self.folder / "stubs"

    @property
    def version(self) -> str:
        """The full version."""
        return self.requirement.partition("==")[2]


RELEASES = (
    Release("10.3", "tensorrt-cu12-bindings==10.3.0", 10),  # JetPack 6
    Release("10.13", "tensorrt-cu13-bindings==10.13.3.9", 10),  # JetPack 7.0
    Release("10.16", "tensorrt-cu13-bindings==10.16.1.11", 10),  # JetPack 7.2
    Release("11.4", "tensorrt-cu13-bindings==11.4.0.106", 11),
)


def reason_missing(release: Release) -> str | None:
    """Why there are no stubs of a release here; None when they are there."""
    if (release.stubs / "values.json").is_file():
        return None
    note = release.folder / "reason.txt"
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    return f"no stubs of TensorRT {release.name} yet: `make tensorrt-stubs` makes them"


def make(release: Release) -> bool:
    """Makes the stubs of a release unless they are there; True when something was made.

    StubsError with the reason, which is kept for the tests, where they cannot be made.
    """
    stamp = release.folder / "stamp"
    wanted = _fingerprint(release)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return False
    release.folder.mkdir(parents=True, exist_ok=True)
    note = release.folder / "reason.txt"
    try:
        bindings = _installed(release.requirement, release.folder / "bindings")
        tools = _installed(STUBGEN, BUILD / "tools")
        libraries = _libraries(release.major)
        _generate(release, bindings, tools, libraries)
    except StubsError as error:
        sentence = f"no stubs of TensorRT {release.name}: {error}"
        note.write_text(sentence + "\n", encoding="utf-8")
        raise StubsError(sentence) from error
    note.unlink(missing_ok=True)
    stamp.write_text(wanted, encoding="utf-8")
    return True


def bindings_environment(release: Release) -> dict[str, str]:
    """Variables with which a process can ``import tensorrt_bindings``, the release's own."""
    return {
        "PYTHONPATH": str(_installed(release.requirement, release.folder / "bindings")),
        "LD_LIBRARY_PATH": str(_libraries(release.major)),
    }


def _fingerprint(release: Release) -> str:
    """Changes when the stubs would come out differently."""
    parts = [GENERATOR.read_bytes(), release.requirement.encode(), STUBGEN.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    """Runs a command; StubsError with its last word when it fails."""
    try:
        subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        written = f"{error.stdout}\n{error.stderr}".splitlines()
        lines = [line.strip() for line in written if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        words = [f"exit code {error.returncode}", *lines, *errors]
        raise StubsError(words[-1]) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StubsError(str(error)) from error


def _installed(requirement: str, folder: Path) -> Path:
    """A folder for sys.path with one package and none of its dependencies."""
    # Extension modules differ between versions of Python, and a folder may be shared.
    target = folder / f"{sys.implementation.cache_tag}-{requirement.partition('==')[2]}"
    if not target.is_dir():
        scratch = folder / "part"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            _run(
                [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
                 "--no-deps", "--only-binary", ":all:", "--retries", "1", "--target", scratch,
                 requirement]
            )  # fmt: skip
        except StubsError as error:
            python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
            raise StubsError(
                f"`pip install {requirement}` gave none for {python} here ({error})"
            ) from error
        scratch.rename(target)
    return target


def _libraries(major: int) -> Path:
    """A folder with libraries of TensorRT's names, in which every function returns null."""
    folder = BUILD / "libraries"
    names = [f"lib{name}.so.{major}" for name in _LIBRARIES]
    if all((folder / name).is_file() for name in names):
        return folder
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise StubsError("no C compiler here (`apt-get install gcc`)")
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "null.c"
    source.write_text(
        "".join(f"void *{name}(void) {{ return 0; }}\n" for name in _SYMBOLS), encoding="utf-8"
    )
    for name in names:
        _run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", source, "-o", folder / name])
    return folder


def _generate(release: Release, bindings: Path, tools: Path, libraries: Path) -> None:
    """Imports the bindings in a process of its own and writes their stubs."""
    scratch = release.folder / "part"
    shutil.rmtree(scratch, ignore_errors=True)
    # The package under its public name, by which classes call their module.
    package = scratch / "path" / "tensorrt"
    shutil.copytree(
        bindings / "tensorrt_bindings", package, ignore=shutil.ignore_patterns("plugin")
    )
    stubs = scratch / "stubs"
    _run(
        [sys.executable, GENERATOR, stubs],
        {
            "PYTHONPATH": os.pathsep.join([str(package.parent), str(tools)]),
            "LD_LIBRARY_PATH": str(libraries),
        },
    )
    shutil.rmtree(release.stubs, ignore_errors=True)
    stubs.rename(release.stubs)
    shutil.rmtree(scratch)


def check(release: Release) -> int:
    """mypy's exit code over the code that knows TensorRT, read against one release."""
    cache = release.folder / "mypy"
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", cache, CHECKED],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(release.stubs)},
        check=False,
    ).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes stubs, and checks when asked to; exit code 0 where they cannot be made, with a line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="type-check our code per release")
    wanted = parser.parse_args(arguments)
    code = 0
    for release in RELEASES:
        try:
            if make(release):
                print(f"TensorRT {release.name}: stubs made of {release.requirement}", flush=True)
        except StubsError as error:
            print(error, flush=True)
            continue
        if wanted.check:
            print(f"TensorRT {release.name}:", flush=True)
            code = check(release) or code
    return code


if __name__ == "__main__":
    sys.exit(main())
