"""The doctor, on machines that are made of a few files and of libraries that fail on purpose."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeseg import doctor
from edgeseg.doctor import Check, Diagnosis, examine

BUILD_INFORMATION = """
  GUI:                           {gui}
  Video I/O:
    FFMPEG:                      {ffmpeg}
      avcodec:                   YES (62.28.101)
    GStreamer:                   {gstreamer}
"""
MISSING = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"
LIBGL = "raise ImportError('libGL.so.1: cannot open shared object file')"


def working(version: str) -> str:
    return f"__version__ = {version!r}"


def opencv(gui: str = "QT5", ffmpeg: str = "YES", gstreamer: str = "NO") -> str:
    text = BUILD_INFORMATION.format(gui=gui, ffmpeg=ffmpeg, gstreamer=gstreamer)
    return f"__version__ = '5.0.0'\ndef getBuildInformation():\n    return {text!r}"


class Machine:
    """A root folder, and the libraries that a new process finds first."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.modules = folder / "modules"
        self.modules.mkdir()
        self.install(cv2=opencv(), openvino=working("2026.4.1-22982-abc"), onnxruntime=MISSING)
        self.install(tensorrt=MISSING)

    def install(self, **sources: str) -> None:
        for name, source in sources.items():
            (self.modules / f"{name}.py").write_text(source)

    def file(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def diagnosis(self) -> Diagnosis:
        return examine(self.root)

    def check(self, name: str) -> Check:
        (found,) = [check for check in self.diagnosis().checks if check.name == name]
        return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(made.modules))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return made


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_working_machine_is_healthy(machine: Machine) -> None:
    found = machine.diagnosis()
    assert (found.healthy, found.exit_code) == (True, 0)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["healthy"] is True
    assert [check["name"] for check in read["checks"]] == [check.name for check in found.checks]
    assert set(read["checks"][0]) == {"name", "state", "detail", "remedy"}
    text = found.render()
    for check in found.checks:
        assert check.name in text
        assert check.detail in text
        assert check.remedy is None or check.remedy in text
    assert "EdgeSeg can run here" in text


def test_the_real_machine_can_be_examined() -> None:
    found = examine()
    names = [check.name for check in found.checks]
    assert len(names) == len(set(names))
    (opencv_check,) = [check for check in found.checks if check.name == "OpenCV"]
    assert opencv_check.state == "ok"


@pytest.mark.parametrize(
    ("openvino", "onnxruntime", "healthy", "states"),
    [
        (working("1"), working("2"), True, ("ok", "ok", "ok")),
        (working("1"), MISSING, True, ("ok", "ok", "optional")),
        (MISSING, working("2"), True, ("ok", "optional", "ok")),
        (MISSING, MISSING, False, ("problem", "optional", "optional")),
        (LIBGL, working("2"), True, ("ok", "missing", "ok")),
        ("import os; os.abort()", MISSING, False, ("problem", "missing", "optional")),
    ],
)
def test_one_engine_is_enough(
    machine: Machine, openvino: str, onnxruntime: str, healthy: bool, states: tuple[str, ...]
) -> None:
    machine.install(openvino=openvino, onnxruntime=onnxruntime)
    found = machine.diagnosis()
    by_name = {check.name: check for check in found.checks}
    engines = [by_name[name] for name in ("Engine", "OpenVINO", "ONNX Runtime")]
    assert tuple(check.state for check in engines) == states
    assert found.healthy is healthy
    assert found.exit_code == (0 if healthy else 1)
    for check in engines:
        assert (check.remedy is None) == (check.state == "ok")
    if not healthy:
        assert "cannot run here yet: Engine." in found.render()


@pytest.mark.parametrize(
    ("source", "detail", "remedy"),
    [
        (LIBGL, "libGL.so.1", "opencv-python-headless"),
        (LIBGL, "cannot be loaded", "apt-get install -y libgl1"),
        (MISSING, "not installed", "pip install opencv-python"),
        ("import json.no_such_module", "no_such_module", "opencv-python-headless"),
        ("", "files are incomplete", "opencv-python-headless"),
        ("import os; os.abort()", "ends the process with signal", "opencv-python-headless"),
    ],
)
def test_opencv_that_cannot_load(machine: Machine, source: str, detail: str, remedy: str) -> None:
    machine.install(cv2=source)
    check = machine.check("OpenCV")
    assert check.state == "problem"
    assert detail in check.detail
    assert remedy in (check.remedy or "")
    assert machine.diagnosis().exit_code == 1


@pytest.mark.parametrize(
    ("build", "name", "state", "word"),
    [
        (opencv(gui="NONE"), "OpenCV windows", "optional", "headless"),
        (opencv(gui="QT5"), "OpenCV windows", "ok", "QT5"),
        (opencv(ffmpeg="NO"), "OpenCV FFmpeg", "missing", "not in this build"),
        (opencv(ffmpeg="YES"), "OpenCV FFmpeg", "ok", "rtsp://"),
        (opencv(gstreamer="NO"), "OpenCV GStreamer", "optional", "csi://"),
        (opencv(gstreamer="YES (1.24)"), "OpenCV GStreamer", "ok", "csi://"),
    ],
)
def test_what_opencv_was_built_with(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    build: str,
    name: str,
    state: str,
    word: str,
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    machine.install(cv2=build)
    check = machine.check(name)
    assert check.state == state
    assert word in check.detail


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no DISPLAY")
def test_no_display_is_said(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    check = machine.check("OpenCV windows")
    assert check.state == "optional"
    assert "no display" in check.detail


X86 = "\n".join(
    f"processor\t: {index}\nmodel name\t: Some CPU\nphysical id\t: 0\ncore id\t\t: {index // 2}\n"
    "flags\t\t: fpu sse4_2 avx2 avx512f avx512_vnni\n"
    for index in range(4)
)
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\nCPU part\t: 0xd42\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (X86, ("Some CPU", "2 cores", "avx2 avx512 vnni")),
        (X86.replace("avx512f avx512_vnni", ""), ("avx2",)),
        (ARM, ("neon fp16 dotprod",)),
        (None, ("threads usable",)),
    ],
)
def test_the_cpu_is_read(machine: Machine, text: str | None, words: tuple[str, ...]) -> None:
    if text is not None:
        machine.file("proc/cpuinfo", text)
    detail = machine.check("CPU").detail
    for word in words:
        assert word in detail
    assert ("vnni" in detail) == (text is X86)


def test_memory_is_in_gib(machine: Machine) -> None:
    machine.file("proc/meminfo", "MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\n")
    assert machine.check("Memory").detail == "8.0 GiB, 4.0 GiB of it free"


def test_a_jetson_is_known(machine: Machine) -> None:
    machine.file("proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    machine.file("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic")
    machine.file("etc/os-release", 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n')
    by_name = {check.name: check for check in machine.diagnosis().checks}
    assert by_name["NVIDIA GPU"].detail == (
        "NVIDIA Jetson Orin Nano Developer Kit, Jetson Linux R36 (release), REVISION: 4.3"
    )
    assert by_name["System"].detail.startswith("Ubuntu 22.04.5 LTS, ")
    assert by_name["TensorRT"].state == "missing"
    assert "apt-get" in (by_name["TensorRT"].remedy or "")


@pytest.mark.skipif(os.name != "posix", reason="the stand-in programs are shell scripts")
@pytest.mark.parametrize(
    ("script", "state", "detail"),
    [
        (
            "echo 'NVIDIA L4, 23034 MiB, 570.1'",
            "ok",
            "NVIDIA L4, 23034 MiB, driver 570.1",
        ),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "missing", "NVIDIA-SMI has failed"),
        (None, "optional", "none here"),
    ],
)
def test_nvidia_smi_is_asked(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str | None,
    state: str,
    detail: str,
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    if script is not None:
        program(programs, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    by_name = {check.name: check for check in machine.diagnosis().checks}
    check = by_name["NVIDIA GPU"]
    assert check.state == state
    assert detail in check.detail
    assert (by_name["TensorRT"].state == "missing") == (state == "ok")
    # The folder of programs holds no compiler either.
    assert by_name["C++ compiler"].state == "optional"
    assert by_name["C++ compiler"].remedy is not None


def test_cameras_have_their_names(machine: Machine) -> None:
    assert machine.check("Cameras").state == "optional"
    for number, name in ((0, "Front"), (10, "Rear"), (2, "")):
        machine.file(f"dev/video{number}", "")
        if name:
            machine.file(f"sys/class/video4linux/video{number}/name", f"{name}\n")
    check = machine.check("Cameras")
    assert check.detail == "/dev/video0 (Front), /dev/video2, /dev/video10 (Rear)"
    assert check.state == "ok"


def test_kernels_that_are_not_built(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeseg.kernels.available", lambda: False)
    check = machine.check("Compiled kernels")
    assert check.state == "missing"
    assert "edgeseg kernels build" in (check.remedy or "")
    assert machine.diagnosis().healthy


def test_kernels_that_cannot_be_imported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edgeseg.kernels", None)
    check = machine.check("Compiled kernels")
    assert check.state == "missing"
    assert "cannot be imported" in check.detail


@pytest.mark.usefixtures("machine")
def test_the_doctor_does_not_need_opencv() -> None:
    code = (
        "import sys; sys.modules['cv2'] = None; "
        "from edgeseg.doctor import examine; examine(); "
        "sys.exit(any(name in sys.modules for name in ('openvino', 'onnxruntime', 'torch')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


JETSON = {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic"}


@pytest.mark.parametrize(
    ("tensorrt", "package", "first"),
    [
        (working("10.3.0"), "cuda-bindings", "TensorRT or OpenVINO runs the models"),
        (working("10.3.0"), None, "OpenVINO runs the models"),
        (MISSING, "pycuda", "OpenVINO runs the models"),
    ],
)
def test_tensorrt_is_an_engine_with_a_gpu_and_cuda_for_python(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tensorrt: str,
    package: str | None,
    first: str,
) -> None:
    machine.install(tensorrt=tensorrt)
    versions = {package: "12.6.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    assert machine.check("Engine").detail == "OpenVINO runs the models"  # no GPU yet
    for path, text in JETSON.items():
        machine.file(path, text)
    assert machine.check("Engine").detail == first
    cuda = machine.check("CUDA for Python")
    assert cuda.state == ("missing" if package is None else "ok")
    assert ("cuda-bindings" in (cuda.remedy or "")) == (package is None)


@pytest.mark.parametrize(
    ("cuda", "plugins", "words"),
    [
        (True, True, "kernels and TensorRT plugins built"),
        (True, False, "TensorRT plugins not built"),
        (False, False, "kernels and TensorRT plugins not built"),
    ],
)
def test_cuda_kernels(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, cuda: bool, plugins: bool, words: str
) -> None:
    library = Path("library.so")
    build = importlib.import_module("edgeseg.kernels.build")  # the function has its name
    monkeypatch.setattr(build, "find_cuda_library", lambda: library if cuda else None)
    monkeypatch.setattr(build, "find_plugin_library", lambda major: library if plugins else None)
    complete = cuda and plugins
    assert machine.check("CUDA kernels").state == ("ok" if complete else "optional")
    for path, text in JETSON.items():
        machine.file(path, text)
    found = machine.check("CUDA kernels")
    assert found.state == ("ok" if complete else "missing")
    assert found.detail.startswith(words)
    assert found.remedy == (None if complete else "edgeseg kernels build --tensorrt")
