"""What EdgeSeg needs to be imported, and what it says where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"numpy", "cv2", "openvino", "onnxruntime", "onnx", "torch", "rich"}

# A finder that denies the packages named in EDGESEG_TEST_WITHOUT, as if they were not installed.
SITE = """
import os, sys

class Denier:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["EDGESEG_TEST_WITHOUT"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Denier())
"""

STREAM = """
import sys
import cv2
import edgeseg
from edgeseg.cli import main
from edgeseg.sink import VideoSink

with edgeseg.load("streets") as model, VideoSink("out.avi", fps=10) as sink:
    for result in model.stream("synthetic:?size=48x64&frames=3"):
        assert result.class_map.shape == (48, 64)
        assert result.draw().shape == (48, 64, 3)
        sink.write(result)
assert cv2.VideoCapture("out.avi").get(cv2.CAP_PROP_FRAME_COUNT) == 3
for arguments in (
    ["run", "streets", "--source", "synthetic:?size=48x64&frames=3", "--save", "frames"],
    ["profile", "streets", "--source", "synthetic:?size=48x64", "--frames", "2"],
    ["eval", "streets", "--data", "synthetic:?size=48x64&frames=1"],
    ["inspect", "streets"],
    ["export", "streets", "-o", "copy"],
):
    assert main(arguments) == 0, arguments
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "onnx", "onnxscript"}))
"""


def python(
    *arguments: str,
    folder: Path,
    without: tuple[str, ...] = (),
    broken: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs Python in ``folder``, with packages that are missing, or that fail when imported."""
    modules = folder / "modules"
    modules.mkdir(exist_ok=True)
    for name, message in (broken or {}).items():
        package = modules / name
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(f"raise ImportError({message!r})")
    (modules / "sitecustomize.py").write_text(SITE)
    place = folder / "place"
    place.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env={
            **os.environ,
            "PYTHONPATH": str(modules),
            "EDGESEG_TEST_WITHOUT": ",".join(without),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def edgeseg(
    *arguments: str,
    folder: Path,
    without: tuple[str, ...] = (),
    broken: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    return python("-m", "edgeseg", *arguments, folder=folder, without=without, broken=broken)


def sentence(found: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error of a command that failed."""
    assert (found.returncode, found.stdout) == (1, "")
    (line,) = found.stderr.splitlines()
    assert line.startswith("edgeseg: ")
    return line


@pytest.mark.parametrize(
    "statement",
    [
        "import edgeseg",
        "import edgeseg.cli",
        "from edgeseg import __version__",
        "from edgeseg.cli import main; main([])",
        "import edgeseg.doctor",
    ],
)
def test_nothing_heavy_is_imported(tmp_path: Path, statement: str) -> None:
    code = f"import sys\n{statement}\nprint(';'.join(sys.modules), file=sys.stderr)"
    found = python("-c", code, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    loaded = {name.partition(".")[0] for name in found.stderr.strip().split(";")}
    assert "edgeseg" in loaded and loaded.isdisjoint(HEAVY)


def test_device_side_without_torch_and_onnx(tmp_path: Path) -> None:
    found = python(
        "-c", STREAM, folder=tmp_path, without=("torch", "onnx", "onnxscript", "onnxruntime")
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines()[-1] == "[]"
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == [
        "copy",
        "frames",
        "out.avi",
    ]


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("export", "bisenetv2", "--weights", "x.pt", "--size", "64x64", "-o", "b"), "torch"),
        (("train", "recipe.toml", "-o", "x.pt"), "torch"),
    ],
)
def test_workstation_side_without_its_packages(
    tmp_path: Path, arguments: tuple[str, ...], missing: str
) -> None:
    found = edgeseg(*arguments, folder=tmp_path, without=("torch", "onnx", "onnxscript"))
    assert f"needs {missing}, which is not installed" in sentence(found)
    assert "pip install 'edgeseg[export]'" in found.stderr
    assert list((tmp_path / "place").iterdir()) == []


# --- OpenCV that cannot be loaded

NO_GL = {"cv2": "libGL.so.1: cannot open shared object file: No such file or directory"}


def test_version_and_doctor_without_opencv(tmp_path: Path) -> None:
    found = edgeseg("--version", folder=tmp_path, broken=NO_GL)
    assert (found.returncode, found.stderr) == (0, "")
    found = edgeseg("doctor", folder=tmp_path, broken=NO_GL)
    assert (found.returncode, found.stderr) == (1, "")
    assert "libGL.so.1" in found.stdout and "opencv-python-headless" in found.stdout
    assert "EdgeSeg cannot run here yet: OpenCV." in found.stdout
    found = edgeseg("doctor", "--json", "doctor.json", folder=tmp_path, broken=NO_GL)
    content = json.loads((tmp_path / "place" / "doctor.json").read_text())
    assert content["healthy"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "streets", "--source", "synthetic:", "--save", "out.mp4"),
        ("profile", "streets", "--report", "out.html"),
        ("eval", "streets", "--data", "synthetic:"),
        ("demo",),
    ],
    ids=lambda arguments: str(arguments[0]),
)
@pytest.mark.parametrize("broken", [NO_GL, {"cv2": "numpy.core.multiarray failed to import"}])
def test_commands_without_opencv(
    tmp_path: Path, arguments: tuple[str, ...], broken: dict[str, str]
) -> None:
    found = edgeseg(*arguments, folder=tmp_path, broken=broken)
    line = sentence(found)
    assert broken["cv2"] in line and "`edgeseg doctor` says what helps" in line
    assert list((tmp_path / "place").iterdir()) == []


def test_opencv_that_is_not_installed(tmp_path: Path) -> None:
    found = edgeseg("run", "streets", "--source", "synthetic:", folder=tmp_path, without=("cv2",))
    assert "No module named 'cv2'" in sentence(found) and "`edgeseg doctor`" in found.stderr


def test_numpy_that_is_not_installed(tmp_path: Path) -> None:
    found = edgeseg("inspect", "streets", folder=tmp_path, without=("numpy",))
    assert "No module named 'numpy'" in sentence(found)
    assert edgeseg("--version", folder=tmp_path, without=("numpy",)).returncode == 0


# --- engines that cannot be loaded


def test_engine_that_cannot_be_loaded(tmp_path: Path) -> None:
    found = edgeseg(
        "run", "streets", "--source", "synthetic:",
        folder=tmp_path, broken={"openvino": "libtbb.so.12: cannot open shared object file"},
    )  # fmt: skip
    assert "the engine openvino is installed and cannot be loaded (libtbb.so.12" in sentence(found)


def test_no_engine(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['openvino'] = sys.modules['onnxruntime'] = None\n"
        "from edgeseg.cli import main; sys.exit(main(['profile', 'streets']))"
    )
    found = python("-c", code, folder=tmp_path)
    assert "no inference engine is installed; `pip install openvino`" in sentence(found)


# --- a bare machine with a GPU


def test_gpu_tests_need_numpy_pytest_and_torch_alone(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    files = [
        str(path)
        for path in sorted((root / "tests").rglob("test_*.py"))
        if path != Path(__file__) and "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    assert len(files) > 5
    found = python(
        "-m", "pytest", "-W", "default", "-p", "no:cacheprovider", "-m", "gpu", "-q",
        "--collect-only", "--rootdir", str(root), *files,
        folder=tmp_path,
        without=("cv2", "openvino", "onnxruntime", "onnx", "psutil", "aiohttp", "rich"),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    for file in files:
        assert f"{Path(file).name}::" in found.stdout
