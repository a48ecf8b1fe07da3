"""What pyproject.toml promises against what lies on the disk, and a wheel that is whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import edgeseg

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]

LINKED = ("calibration", "export", "kernels")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def tracked() -> list[str]:
    """Every file of the repository that is not ignored by its .gitignore, by its path."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-per-directory=.gitignore"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = sorted(set(listed.stdout.split("\0")) - {""})
    return [name for name in names if os.path.lexists(ROOT / name)]


def home(package: str) -> str:
    """The folder of a package, below the root."""
    folders: dict[str, str] = SETUPTOOLS["package-dir"]
    owner = package
    while owner not in folders:
        owner = owner.rpartition(".")[0]
    rest = package.removeprefix(owner).replace(".", "/")
    return folders[owner] + rest


def test_packages_are_those_on_the_disk() -> None:
    found = set()
    for folder in ("edgeseg", *LINKED):
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            # The links inside edgeseg/ lead to folders that are counted on their own.
            if parts[:1] == ("edgeseg",) and parts[1:2] and parts[1] in LINKED:
                continue
            found.add(".".join(parts if parts[0] == "edgeseg" else ("edgeseg", *parts)))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)
    for package in SETUPTOOLS["packages"]:
        assert (ROOT / home(package) / "__init__.py").is_file()


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_to_the_top_level_folders(name: str) -> None:
    link = ROOT / "edgeseg" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert SETUPTOOLS["package-dir"][f"edgeseg.{name}"] == name


def test_package_data_is_there_and_complete() -> None:
    files = [name for name in tracked() if not (ROOT / name).is_symlink()]
    covered = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / home(package)
        for pattern in patterns:
            matches = {path.relative_to(ROOT).as_posix() for path in folder.glob(pattern)}
            assert matches & set(files), f"{package}: nothing matches {pattern}"
            covered |= matches
    inside = {
        name
        for name in files
        if name.split("/")[0] in ("edgeseg", *LINKED) and not name.endswith(".py")
    }
    assert inside - covered == set()


def test_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == edgeseg.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?({re.escape(edgeseg.__version__)}|Unreleased)\b", changes, re.M)


# --- pinned requirements


def pins(name: str, python: str) -> dict[str, str]:
    """Package -> version that a file below requirements/ installs on that Python."""
    environment = {key: str(value) for key, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.9"}
    found: dict[str, str] = {}
    for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r ").strip(), python)
            continue
        pin = Requirement(line)
        (version,) = pin.specifier
        assert version.operator == "==", line
        if pin.marker is None or pin.marker.evaluate(environment):
            package = canonicalize_name(pin.name)
            assert package not in found, f"{package} is pinned twice for Python {python}"
            found[package] = version.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("name", "extras"),
    [("device.txt", ("serve",)), ("dev.txt", ("onnxruntime", "export", "serve", "signing", "dev"))],
)
def test_pins_satisfy_the_project(name: str, extras: tuple[str, ...], python: str) -> None:
    project = PROJECT["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    found = pins(name, python)
    asked = set()
    for line in wanted:
        requirement = Requirement(line)
        package = canonicalize_name(requirement.name)
        environment = {"python_version": python}
        if package == "edgeseg" or (
            requirement.marker is not None and not requirement.marker.evaluate(environment)
        ):
            continue
        asked.add(package)
        assert package in found, f"{name} does not pin {package}, which pyproject asks for"
        assert found[package] in requirement.specifier, f"{package}=={found[package]}, {line}"
    assert set(found) == asked, f"{name} pins what pyproject does not ask for"


def test_supported_pythons_agree() -> None:
    classifiers = PROJECT["project"]["classifiers"]
    named = [line.rpartition(" ")[2] for line in classifiers if "Python :: 3." in line]
    assert named == list(PYTHONS)
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + PYTHONS[0].replace(".", "")


# --- what must not be in the repository


def test_no_path_of_one_machine() -> None:
    # Put together here, so that this file has none of them.
    pattern = re.compile(
        rb"[\s\"'=(]/(" + b"|".join([b"home", b"root", b"Users", b"work"]) + rb")/"
    )
    found = [
        name
        for name in tracked()
        if (ROOT / name).is_file() and pattern.search((ROOT / name).read_bytes())
    ]
    assert found == []


def test_nothing_large_but_the_shipped_model() -> None:
    large = {name for name in tracked() if (ROOT / name).stat().st_size > 1_000_000}
    assert {name for name in large if not re.fullmatch(r"edgeseg/bundles/.*\.onnx", name)} == set()


# --- a wheel


@pytest.mark.slow
def test_wheel_is_whole(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in tracked():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", tmp_path],
        cwd=copy,
        check=True,
        timeout=600,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("edgeseg-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = {name.split("/")[0] for name in names}
    assert folders == {"edgeseg", f"edgeseg-{edgeseg.__version__}.dist-info"}
    for file in (
        "edgeseg/py.typed",
        "edgeseg/bundles/streets/model.onnx",
        "edgeseg/bundles/streets/bundle.json",
        "edgeseg/engine/openvino.py",
        "edgeseg/export/models/bisenetv2.py",
        "edgeseg/kernels/cpu/library.cpp",
        "edgeseg/kernels/cuda/launch.h",
        "edgeseg/kernels/include/edgeseg/upsample_argmax.h",
    ):
        assert file in names

    target = tmp_path / "target"
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel],
        check=True,
        timeout=600,
    )
    place = tmp_path / "place"
    place.mkdir()
    # The target comes before the site-packages that have the dependencies, and a checkout of ours.
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where = subprocess.run(
        [sys.executable, "-c", "import edgeseg.export as e; print(e.__file__)"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()) == target / "edgeseg" / "export" / "__init__.py"
    run = subprocess.run(
        [sys.executable, "-m", "edgeseg", "run", "streets",
         "--source", "synthetic:?frames=2", "--save", "out.mp4"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert "2 frames, 0 dropped" in run.stdout and "saved out.mp4" in run.stdout
    assert [path.name for path in place.iterdir()] == ["out.mp4"]
