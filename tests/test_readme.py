"""The README, the docs and the examples say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from edgeseg import cli
from edgeseg.synthetic import Street

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def _fenced(page: Path) -> list[str]:
    """Lines inside the fenced blocks of a page."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in _fenced(page):
        match = re.match(r"make (\S+)", line)
        if match:
            assert re.search(rf"^{re.escape(match[1])}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page: Path) -> None:
    parser = cli._parser()
    for line in _fenced(page):
        match = re.match(r"(?:\.venv/bin/)?edgeseg ([a-z].*)", line.split("#")[0].strip())
        if match:
            # Raises SystemExit(2) for a command or an option that does not exist.
            parser.parse_args(match[1].split())


def test_changelog_names_the_commands() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for command in cli._parser()._subparsers._group_actions[0].choices or ():  # type: ignore[union-attr]
        assert command in text


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    cv2.imwrite(str(path), Street(seed=5).frame(10).pixels)
    return path


def _run(example: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(example), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_are_numbered() -> None:
    assert [example.name[:2] for example in EXAMPLES] == [
        f"{number:02d}" for number in range(1, len(EXAMPLES) + 1)
    ]


def test_example_frame(picture: Path, tmp_path: Path) -> None:
    output = _run(EXAMPLES[0], str(picture), str(tmp_path / "overlay.png"))
    assert "road" in output
    drawn = cv2.imread(str(tmp_path / "overlay.png"))
    assert drawn is not None
    assert drawn.shape == (360, 480, 3)


def test_example_stream() -> None:
    output = _run(EXAMPLES[1], "synthetic:?scene=city&frames=4")
    assert len(output.splitlines()) == 4


def test_example_tasks(picture: Path, tmp_path: Path) -> None:
    output = _run(EXAMPLES[3], str(picture), str(tmp_path / "drawn"))
    assert [line.split()[0] for line in output.splitlines()] == ["semantic", "instance", "panoptic"]
    for name in ("semantic", "instance", "panoptic"):
        drawn = cv2.imread(str(tmp_path / "drawn" / f"{name}.jpg"))
        assert drawn is not None
        assert drawn.shape == (360, 480, 3)


@pytest.mark.slow
def test_example_export(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the workstation side is not installed")
    from edgeseg.export.models import create

    checkpoint = tmp_path / "checkpoint.pt"
    torch.save(create("bisenetv2", 11).state_dict(), checkpoint)
    assert "differ" in _run(EXAMPLES[2], str(checkpoint), str(tmp_path / "bundle"))
    assert (tmp_path / "bundle/model.onnx").is_file()
