"""The demo: three files, and figures that hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from edgeseg.bundle import SHIPPED
from edgeseg.classes import CAMVID
from edgeseg.demo import NEXT, Demo, run_demo
from edgeseg.errors import DataError, SinkError
from edgeseg.model import load

FRAMES = 8
FILES = ["report.html", "report.json", "segmented.mp4"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with load("streets") as model:
        return run_demo(model, folder, frames=FRAMES)


def test_three_files_and_nothing_else(demo: Demo) -> None:
    folder = demo.video.parent
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert {demo.video.name, demo.report.name, demo.figures.name} == set(FILES)


def test_video_has_every_frame(demo: Demo) -> None:
    capture = cv2.VideoCapture(str(demo.video))
    frames = 0
    while (read := capture.read())[0]:
        assert read[1].shape == (360, 480, 3)
        frames += 1
    capture.release()
    assert frames == FRAMES


def test_figures(demo: Demo) -> None:
    content = json.loads(demo.figures.read_text())
    assert (content["model"], content["frames"], content["dropped"]) == ("streets", FRAMES, 0)
    assert content["fps"] > 0 and content["miou"] == demo.evaluation.miou
    assert list(content["per_class"]) == list(CAMVID.names)
    assert list(content["stages"]) == ["capture", "fit", "network", "head", "restore", "output"]
    assert demo.evaluation.frames == FRAMES and "streets" in SHIPPED


def test_masks_are_right(demo: Demo) -> None:
    # Loose: it tells a model that sees the street from one that does not.
    assert demo.evaluation.miou > 0.3
    road = demo.evaluation.per_class["road"]
    assert road is not None and road > 0.5


def test_report_tells_the_whole_story(demo: Demo) -> None:
    page = demo.report.read_text(encoding="utf-8")
    summary = demo.summary
    for part in (
        f"{summary.fps:.1f}",
        f"{demo.evaluation.miou * 100:.1f} %",
        "frames per second",
        "mIoU",
        "How it looks",
        "How right it is",
        "Where the time of a frame goes",
        demo.description,
        *(name.replace("_", " ") for name in CAMVID.names),
        *summary.stages,
        *NEXT,
    ):
        assert part in page, part
    # Four frames: as they came, as the model sees them, and the truth; and the film. All inside.
    assert page.count("data:image/") == 13
    assert "steps(2) infinite" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)


def test_output_that_cannot_be(tmp_path: Path, leftovers: Callable[[Path], list[str]]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    (tmp_path / "video" / "segmented.mp4").mkdir(parents=True)
    with load("streets") as model:
        for name, says in (
            ("file", "cannot be written"),
            ("file/below", "cannot be written"),
            ("taken", r"report\.json cannot be written"),
            ("video", r"segmented\.mp4 is a folder"),
        ):
            with pytest.raises(SinkError, match=says):
                run_demo(model, tmp_path / name, frames=1)
    assert (tmp_path / "file").read_text() == "mine"
    assert leftovers(tmp_path) == []


def test_model_of_other_classes_is_refused_before_anything_is_written(
    bundle_folder: Path, tmp_path: Path
) -> None:
    with (
        load(bundle_folder) as model,
        pytest.raises(DataError, match="a model is evaluated on its own classes"),
    ):
        run_demo(model, tmp_path / "demo", frames=2)
    assert not (tmp_path / "demo").exists()
