"""What this machine has for EdgeSeg, what it lacks, and the command that helps.

Nothing heavy is imported at the top, OpenCV least of all: the doctor has to be able to speak when
OpenCV is what is broken. Libraries are tried in processes of their own, so that one which takes
its process down (a missing shared object, an instruction that the CPU lacks) is reported too.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

__all__ = ["Check", "Diagnosis", "State", "examine"]

#: "ok": here and working. "optional": not here, and only some uses want it. "missing": EdgeSeg
#: works without, but worse than it could on this machine. "problem": EdgeSeg cannot work.
State = Literal["ok", "optional", "missing", "problem"]

_PYTHON = Path(sys.executable).name or "python3"
_INSTALL = f"{_PYTHON} -m pip install"
_UNINSTALL = f"{_PYTHON} -m pip uninstall -y"
_PROBE_TIMEOUT_S = 60.0
_TOOL_TIMEOUT_S = 5.0
# What a shell returns for a command that it cannot run.
_NO_ANSWER = 127


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    ``detail`` says what was found, ``remedy`` is the command, or the step, that improves it.
    """

    name: str
    state: State
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found, in the order in which it is read."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether EdgeSeg can run a model here."""
        return all(check.state != "problem" for check in self.checks)

    @property
    def exit_code(self) -> int:
        """What the command line returns: 0, or 1 when there is a problem."""
        return 0 if self.healthy else 1

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "healthy": self.healthy,
            "checks": [
                {
                    "name": check.name,
                    "state": check.state,
                    "detail": check.detail,
                    "remedy": check.remedy,
                }
                for check in self.checks
            ],
        }

    def render(self) -> str:
        """A table for a terminal, one check per line, remedies below, a verdict at the end."""
        names = max(len(check.name) for check in self.checks)
        states = max(len(check.state) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.state:<{states}}  {check.name:<{names}}  {check.detail}")
            if check.remedy is not None:
                lines.append(f"{'':<{states}}  {'':<{names}}    -> {check.remedy}")
        problems = [check.name for check in self.checks if check.state == "problem"]
        lines.append("")
        if problems:
            lines.append(f"EdgeSeg cannot run here yet: {', '.join(problems)}.")
        else:
            lines.append("EdgeSeg can run here. Try: edgeseg demo")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Module:
    """What came of importing a module in a process of its own.

    ``version`` None and ``failure`` None: it is not installed. ``build``: OpenCV's description of
    how it was built, empty for other modules.
    """

    version: str | None
    failure: str | None
    build: str = ""


def examine(root: Path = Path("/")) -> Diagnosis:
    """Looks at this machine; takes a second or two, changes nothing.

    ``root``: where /proc, /sys, /dev and /etc are looked for.
    """
    modules = ("cv2", "openvino", "onnxruntime", "tensorrt")
    with ThreadPoolExecutor(len(modules)) as pool:
        cv2, openvino, onnxruntime, tensorrt = pool.map(_imported, modules)
    board = _first_line(root / "proc/device-tree/model")
    jetson = (root / "etc/nv_tegra_release").exists() or "jetson" in board.lower()
    gpu = _gpu(root, board, jetson)
    return Diagnosis(
        checks=(
            _edgeseg(),
            _python(),
            _system(root, board),
            _cpu(root),
            _memory(root),
            gpu,
            *_engines(openvino, onnxruntime, tensorrt if gpu.state == "ok" else None),
            _tensorrt(tensorrt, jetson=jetson, has_gpu=gpu.state == "ok"),
            _cuda_for_python(has_gpu=gpu.state == "ok"),
            _gpu_kernels(tensorrt, has_gpu=gpu.state == "ok"),
            *_opencv(cv2),
            *_kernels(),
            _cameras(root),
            _installed("PyTorch", "torch", "to train and export models"),
            _installed("ONNX", "onnx", "to export and quantize models"),
        )
    )


def _edgeseg() -> Check:
    here = Path(__file__).parent
    try:
        return Check("EdgeSeg", "ok", f"{metadata.version('edgeseg')} in {here}")
    except metadata.PackageNotFoundError:
        return Check("EdgeSeg", "ok", f"not installed, running from {here}", f"{_INSTALL} -e .")


def _python() -> Check:
    detail = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    return Check("Python", "ok", detail)


def _system(root: Path, board: str) -> Check:
    name = f"{platform.system()} {platform.release()}"
    for line in _lines(root / "etc/os-release"):
        key, _, value = line.partition("=")
        if key == "PRETTY_NAME":
            name = value.strip("\"'")
    parts = [name, platform.machine() or "unknown architecture"]
    if board:
        parts.append(board)
    return Check("System", "ok", ", ".join(parts))


def _cpu(root: Path) -> Check:
    """Model, cores, and the vector instructions that decide how fast INT8 and FP32 are."""
    fields: dict[str, str] = {}
    cores: set[tuple[str, str]] = set()
    package = ""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = (part.strip() for part in line.partition(":"))
        fields.setdefault(key.lower(), value)
        if key == "physical id":
            package = value
        elif key == "core id":
            cores.add((package, value))
    flags = set(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
    model = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = f"{threads} threads usable"
    if cores:
        count = f"{len(cores)} {'core' if len(cores) == 1 else 'cores'}, {count}"
    found = [name for name, any_of in _SIMD if flags & any_of]
    if not flags and platform.machine().lower() in ("arm64", "aarch64"):
        found = ["neon"]
    return Check("CPU", "ok", f"{model}; {count}; {' '.join(found) or 'no known SIMD'}")


#: What to call it, and the names that Linux has for it on x86-64 and aarch64.
_SIMD = (
    ("avx2", {"avx2"}),
    ("avx512", {"avx512f"}),
    ("vnni", {"avx512_vnni", "avx_vnni"}),
    ("amx", {"amx_int8"}),
    ("neon", {"neon", "asimd"}),
    ("fp16", {"asimdhp"}),
    ("dotprod", {"asimddp"}),
    ("i8mm", {"i8mm"}),
    ("sve", {"sve"}),
)


def _memory(root: Path) -> Check:
    kib = {}
    for line in _lines(root / "proc/meminfo"):
        key, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            kib[key] = int(number[0])
    if "MemTotal" in kib:
        detail = f"{kib['MemTotal'] / 2**20:.1f} GiB"
        if "MemAvailable" in kib:
            detail += f", {kib['MemAvailable'] / 2**20:.1f} GiB of it free"
        return Check("Memory", "ok", detail)
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return Check("Memory", "ok", "unknown")
    return Check("Memory", "ok", f"{size / 2**30:.1f} GiB")


def _gpu(root: Path, board: str, jetson: bool) -> Check:
    if jetson:
        release = _first_line(root / "etc/nv_tegra_release").removeprefix("# ")
        # "R36 (release), REVISION: 4.3, GCID: ..., BOARD: ..., DATE: ..."
        linux = ", ".join(release.split(", ")[:2]) or "release unknown"
        return Check("NVIDIA GPU", "ok", f"{board or 'Jetson'}, Jetson Linux {linux}")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("NVIDIA GPU", "optional", "none here; models run on the CPU")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    status, output = _output(query, _TOOL_TIMEOUT_S)
    if status != 0 or not output:
        said = output.splitlines()[0] if output else "no answer"
        return Check(
            "NVIDIA GPU",
            "missing",
            f"nvidia-smi is here and finds no GPU ({said})",
            "install the driver that fits the kernel, then restart; nvidia-smi must list the GPU",
        )
    cards = []
    for line in output.splitlines():
        name, _, rest = line.partition(", ")
        memory, _, driver = rest.partition(", ")
        cards.append(f"{name}, {memory}, driver {driver}")
    return Check("NVIDIA GPU", "ok", "; ".join(cards))


def _engines(openvino: _Module, onnxruntime: _Module, tensorrt: _Module | None) -> list[Check]:
    """What runs the model: the verdict, then each engine; one of them is enough.

    ``tensorrt``: None where there is no GPU for it.
    """
    named = (("OpenVINO", "openvino", openvino), ("ONNX Runtime", "onnxruntime", onnxruntime))
    working = [title for title, _, module in named if module.version is not None]
    if tensorrt is not None and tensorrt.version is not None and _cuda_packages():
        working.insert(0, "TensorRT")
    verdict = Check("Engine", "ok", f"{' or '.join(working)} runs the models")
    if not working:
        verdict = Check(
            "Engine", "problem", "none that loads; a model needs one", f"{_INSTALL} openvino"
        )
    checks = [verdict]
    for title, package, module in named:
        if module.version is not None:
            checks.append(Check(title, "ok", module.version))
        elif module.failure is not None:
            detail = f"installed, and cannot be loaded: {module.failure}"
            remedy = f"{_INSTALL} --force-reinstall {package}"
            checks.append(Check(title, "missing", detail, remedy))
        else:
            checks.append(Check(title, "optional", "not installed", f"{_INSTALL} {package}"))
    return checks


def _tensorrt(module: _Module, *, jetson: bool, has_gpu: bool) -> Check:
    if module.version is not None:
        return Check("TensorRT", "ok", module.version)
    remedy = "sudo apt-get install -y tensorrt" if jetson else f"{_INSTALL} tensorrt"
    if module.failure is not None:
        detail = f"installed, and cannot be loaded: {module.failure}"
        return Check("TensorRT", "missing" if has_gpu else "optional", detail, remedy)
    if has_gpu:
        return Check("TensorRT", "missing", "not installed, and there is a GPU for it", remedy)
    return Check("TensorRT", "optional", "not installed; it needs an NVIDIA GPU")


def _cuda_packages() -> list[str]:
    """Packages that give Python access to CUDA, with their versions."""
    named = ((package, _version(package)) for package in ("cuda-python", "cuda-bindings", "pycuda"))
    return [f"{package} {version}" for package, version in named if version is not None]


def _cuda_for_python(*, has_gpu: bool) -> Check:
    title = "CUDA for Python"
    found = _cuda_packages()
    if found:
        return Check(title, "ok", ", ".join(found))
    if not has_gpu:
        return Check(title, "optional", "not installed; it needs an NVIDIA GPU")
    return Check(
        title,
        "missing",
        "not installed; TensorRT engines need it",
        f"{_INSTALL} 'cuda-bindings==12.*'  (the number is that of the CUDA version: 12 or 13)",
    )


def _gpu_kernels(tensorrt: _Module, *, has_gpu: bool) -> Check:
    title = "CUDA kernels"
    major = None if tensorrt.version is None else int(tensorrt.version.split(".")[0])
    try:
        from edgeseg.kernels.build import find_cuda_library, find_plugin_library
    except ImportError as error:
        return Check(title, "missing" if has_gpu else "optional", f"cannot be imported ({error})")
    named = (("kernels", find_cuda_library()), ("TensorRT plugins", find_plugin_library(major)))
    built = [name for name, path in named if path is not None]
    lacking = [name for name, path in named if path is None]
    if not lacking:
        return Check(title, "ok", f"{' and '.join(built)} built")
    if not has_gpu:
        return Check(title, "optional", "not built; they need an NVIDIA GPU")
    return Check(
        title,
        "missing",
        f"{' and '.join(lacking)} not built; frames are fitted on the CPU, or masks are brought to "
        "size by TensorRT's own layers, slower",
        "edgeseg kernels build --tensorrt",
    )


def _installed(title: str, package: str, purpose: str) -> Check:
    """A library that is only looked up, since importing it takes long."""
    version = _version(package)
    if version is not None:
        return Check(title, "ok", version)
    return Check(
        title,
        "optional",
        f"not installed; needed only {purpose}, on a workstation",
        f"{_INSTALL} 'edgeseg[export]'",
    )


_OPENCV_PACKAGES = (
    "opencv-python",
    "opencv-contrib-python",
    "opencv-python-headless",
    "opencv-contrib-python-headless",
)


def _opencv(module: _Module) -> list[Check]:
    headless = f"{_INSTALL} opencv-python-headless"
    packages = [name for name in _OPENCV_PACKAGES if _version(name) is not None]
    if module.version is None and module.failure is None:
        return [Check("OpenCV", "problem", "not installed", f"{_INSTALL} opencv-python")]
    if module.version is None:
        swap = (
            f"{_INSTALL.replace('install', 'uninstall')} -y {packages[0]} && " if packages else ""
        )
        return [
            Check(
                "OpenCV",
                "problem",
                f"installed, and cannot be loaded: {module.failure}",
                f"{swap}{headless}  (no windows), or: sudo apt-get install -y libgl1 libglib2.0-0",
            )
        ]
    detail = f"{module.version} ({', '.join(packages) or 'not from pip'})"
    return [Check("OpenCV", "ok", detail), _windows(module.build), *_video(module.build)]


def _windows(build: str) -> Check:
    backend = _build_value(build, "GUI") or "NONE"
    # Headless builds write NONE; some others leave the heading empty and list the toolkits below.
    if backend.upper() == "NONE":
        toolkits = ("QT", "GTK+", "Cocoa", "Win32 UI", "Wayland")
        backend = next((kit for kit in toolkits if _says_yes(build, kit)), "")
    if not backend:
        return Check(
            "OpenCV windows",
            "optional",
            "this is a headless build; only --show needs windows",
            f"{_UNINSTALL} opencv-python-headless && {_INSTALL} opencv-python",
        )
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not shown:
        return Check(
            "OpenCV windows",
            "optional",
            f"{backend}, and no display in this session; --save works without one",
        )
    return Check("OpenCV windows", "ok", backend)


def _video(build: str) -> list[Check]:
    ffmpeg = Check("OpenCV FFmpeg", "ok", "reads and writes video files, rtsp:// and http://")
    if not _says_yes(build, "FFMPEG"):
        ffmpeg = Check(
            "OpenCV FFmpeg",
            "missing",
            "not in this build; most video files and streams need it",
            f"{_INSTALL} --force-reinstall opencv-python",
        )
    gstreamer = Check("OpenCV GStreamer", "ok", "csi:// and gst: sources work")
    if not _says_yes(build, "GStreamer"):
        gstreamer = Check(
            "OpenCV GStreamer",
            "optional",
            "not in this build, as in all from pip; csi:// and gst: sources need it only where "
            "PyGObject is missing",
            "sudo apt-get install -y python3-gi gir1.2-gst-plugins-base-1.0 "
            "gstreamer1.0-plugins-good, and a virtual environment made with "
            "--system-site-packages",
        )
    return [ffmpeg, gstreamer]


def _kernels() -> list[Check]:
    compiler = _compiler()
    slower = "the upsampling runs inside the model's graph, slower"
    try:
        from edgeseg.kernels import available
    except ImportError as error:
        detail = f"cannot be imported ({error}); {slower}"
        remedy = f"{_INSTALL} --force-reinstall edgeseg"
        return [Check("Compiled kernels", "missing", detail, remedy), compiler]
    if available():
        return [Check("Compiled kernels", "ok", "built, and loaded"), compiler]
    remedy = "edgeseg kernels build"
    if compiler.remedy is not None:
        remedy = f"{compiler.remedy}, then: {remedy}"
    return [Check("Compiled kernels", "missing", f"not built; {slower}", remedy), compiler]


def _compiler() -> Check:
    """The C++ compiler that would build the kernels, by the order of its usual names."""
    asked = os.environ.get("CXX", "").split()[:1]
    for name in (*asked, "c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is None:
            continue
        status, output = _output([path, "--version"], _TOOL_TIMEOUT_S)
        if status == 0 and output:
            return Check("C++ compiler", "ok", output.splitlines()[0])
    remedy = "install g++ or clang++"
    if sys.platform == "darwin":
        remedy = "xcode-select --install"
    elif shutil.which("apt-get"):
        remedy = "sudo apt-get install -y g++"
    return Check("C++ compiler", "optional", "none; only building the kernels needs one", remedy)


def _cameras(root: Path) -> Check:
    found, shut = [], []
    names = {
        path.parent.name: _first_line(path)
        for path in sorted((root / "sys/class/video4linux").glob("video*/name"))
    }
    devices = sorted(
        (path for path in (root / "dev").glob("video*") if path.name[5:].isdigit()),
        key=lambda path: int(path.name[5:]),
    )
    for device in devices:
        name = names.get(device.name)
        found.append(f"/dev/{device.name}" + (f" ({name})" if name else ""))
        if not os.access(device, os.R_OK | os.W_OK):
            shut.append(f"/dev/{device.name}")
    if shut:
        return Check(
            "Cameras",
            "missing",
            f"{', '.join(found)}; not allowed to open {', '.join(shut)}",
            'sudo usermod -aG video "$USER", then log in again',
        )
    if found:
        return Check("Cameras", "ok", ", ".join(found))
    return Check(
        "Cameras",
        "optional",
        "no /dev/video*; files, network streams and synthetic: need none",
    )


# Imported by its name from the command line, so that one line serves every module.
_PROBE = """
import importlib, json, sys
name = sys.argv[1]
try:
    module = importlib.import_module(name)
    version = getattr(module, "__version__", None)
    if version is None:
        # A folder without a library in it, such as an uninstallation leaves behind.
        found = {"failure": "its files are incomplete"}
    else:
        found = {"version": str(version).partition("-")[0]}
        if name == "cv2":
            found["build"] = module.getBuildInformation()
except ModuleNotFoundError as error:
    found = {} if error.name == name else {"failure": str(error)}
except BaseException as error:
    found = {"failure": str(error) or type(error).__name__}
print("\\n" + json.dumps(found))
"""


def _imported(name: str) -> _Module:
    """Imports ``name`` in a process of its own and says what came of it."""
    status, output = _output([sys.executable, "-c", _PROBE, name], _PROBE_TIMEOUT_S, errors=False)
    try:
        found = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        how = f"ends the process with {'signal' if status < 0 else 'status'} {abs(status)}"
        if status == _NO_ANSWER:
            how = f"takes more than {_PROBE_TIMEOUT_S:.0f} seconds"
        return _Module(None, f"importing it {how}")
    failure = found.get("failure")
    if failure is not None:
        failure = " ".join(str(failure).split())[:300]
    return _Module(found.get("version"), failure, found.get("build", ""))


def _output(command: list[str], timeout_s: float, *, errors: bool = True) -> tuple[int, str]:
    """Exit status and output of a command; status 127 if it cannot run or takes too long.

    ``errors``: whether standard error is part of the output.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
            timeout=timeout_s,
            text=True,
            errors="replace",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _NO_ANSWER, "" if isinstance(error, subprocess.TimeoutExpired) else str(error)
    return done.returncode, done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build_value(build: str, key: str) -> str:
    """The value after ``key:`` in OpenCV's build information, "" where there is none."""
    for line in build.splitlines():
        name, colon, value = line.strip().partition(":")
        if colon and name == key:
            return value.strip()
    return ""


def _says_yes(build: str, key: str) -> bool:
    return _build_value(build, key).upper().startswith("YES")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _first_line(path: Path) -> str:
    """The first line of a file, without the zero byte that device trees end with."""
    lines = _lines(path)
    return lines[0].strip("\0 \t") if lines else ""
