"""The demo: three files, two models, and figures that hold."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from edgeseg import demo as demo_module
from edgeseg.bundle import SHIPPED
from edgeseg.classes import CAMVID
from edgeseg.demo import CLIP, NEXT, Demo, run_demo
from edgeseg.errors import DataError, EngineError, RequestError, SinkError
from edgeseg.frame import Pixels
from edgeseg.model import Model, load
from edgeseg.result import AnyOutputs
from edgeseg.source import SyntheticSource, open_source

if TYPE_CHECKING:
    from tests.conftest import Tiny

FRAMES = 6
FILES = ["report.html", "report.json", "segmented.mp4"]
NAMES = ("streets", "streets-int8")
STAGES = ["fit", "network", "head", "restore"]


@contextmanager
def shipped() -> Iterator[tuple[Model, Model]]:
    """The two models of the real demo."""
    with load(NAMES[0]) as plain, load(NAMES[1]) as quantized:
        yield plain, quantized


@contextmanager
def tiny_pair(tiny: Tiny, folder: Path) -> Iterator[tuple[Model, Model]]:
    """Two tiny models, nearly the same, that know the street's classes by name only."""
    spec = replace(tiny.spec, classes=CAMVID.names, colours=CAMVID.colours)
    first_folder, second_folder = (
        replace(tiny, spec=replace(spec, name=name), align_corners=name == "b").write(folder / name)
        for name in "ab"
    )
    with load(first_folder) as first, load(second_folder) as second:
        yield first, second


def film_of(video: Path) -> list[Pixels]:
    """All frames of a video."""
    capture, frames = cv2.VideoCapture(str(video)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    capture.release()
    return frames  # type: ignore[return-value]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with shipped() as models:
        return run_demo(models, folder, frames=FRAMES)


def test_three_files_and_nothing_else(demo: Demo) -> None:
    folder = demo.video.parent
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert {demo.video.name, demo.report.name, demo.figures.name} == set(FILES)


def test_video_has_every_frame_of_both(demo: Demo) -> None:
    frames = film_of(demo.video)
    assert [frame.shape for frame in frames] == [(360, 960, 3)] * FRAMES
    # The halves show one frame with nearly the same masks; legend and titles are at the left.
    left, right = frames[-1][20:300, 120:470], frames[-1][20:300, 600:950]
    assert float(np.abs(left.astype(int) - right).mean()) < 12


def test_figures(demo: Demo) -> None:
    content = json.loads(demo.figures.read_text())
    assert list(content["models"]) == list(NAMES)
    for found, one, precision in zip(
        content["models"].values(), demo.models, ("fp32", "INT8"), strict=True
    ):
        assert (found["precision"], found["frames"], found["dropped"]) == (precision, FRAMES, 0)
        assert found["fps"] > 0 and found["miou"] == one.evaluation.miou
        assert found["work_ms"] >= found["network_ms"] > 0
        assert list(found["per_class"]) == list(CAMVID.names)
        assert list(found["stages"]) == STAGES
        assert one.evaluation.frames == FRAMES and one.name in SHIPPED
    plain, quantized = content["models"].values()
    assert content["speedup"] == pytest.approx(quantized["fps"] / plain["fps"])
    assert quantized["size_mb"] < plain["size_mb"]
    assert content["agreement"] == demo.agreement and content["peak_rss_mb"] > 0


def test_masks_are_right(demo: Demo) -> None:
    # Loose: it tells a model that sees the street from one that does not.
    for one in demo.models:
        assert one.evaluation.miou > 0.3
        road = one.evaluation.per_class["road"]
        assert road is not None and road > 0.5
    assert 0.9 < demo.agreement < 1


def test_report_tells_the_whole_story(demo: Demo) -> None:
    page = demo.report.read_text(encoding="utf-8")
    for part in (
        *(f"{one.summary.fps:.1f}" for one in demo.models),
        *(f"{one.evaluation.miou * 100:.1f} %" for one in demo.models),
        *(f"{one.work_ms:.1f} ms" for one in demo.models),
        *(f"{one.size_mb:.1f} MB" for one in demo.models),
        f"{demo.speedup:.1f}×",
        f"{demo.agreement * 100:.1f} %",
        "streets, fp32",
        "streets-int8, INT8",
        "frames per second",
        "mIoU",
        "How it looks",
        "How right it is",
        "Where the time of a frame goes",
        demo.engines,
        *(name.replace("_", " ") for name in CAMVID.names),
        *STAGES,
        *NEXT,
    ):
        assert part in page, part
    # Four frames: as they came, as each model sees them, and the truth; and the film. All inside.
    assert page.count("data:image/") == 17
    assert "steps(2) infinite" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)


def test_text_for_a_terminal(demo: Demo) -> None:
    lines = demo.render().splitlines()
    assert max(map(len, lines)) < 100
    for one in demo.models:
        (row,) = [line.split() for line in lines if line.startswith(f"  {one.name} ")]
        assert row[1:] == [
            f"{value:.1f}"
            for value in (one.evaluation.miou * 100, one.summary.fps, one.work_ms, one.size_mb)
        ]


@pytest.mark.parametrize(
    ("frames", "order"),
    # The first frame comes twice, because a model warms up; then portions of two, begun in turn.
    [
        (1, "aa bb"),
        (2, "aaa bbb"),
        (5, "aaa bbb bb aa a b"),
        (7, "aaa bbb bb aa aa bb b a"),
    ],
)
def test_models_take_turns(
    tiny: Tiny, tmp_path: Path, frames: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "_PORTION", 2)
    told: list[tuple[int, int]] = []
    ran: list[str] = []
    with tiny_pair(tiny, tmp_path) as models:
        for model in models:
            monkeypatch.setattr(model.engine, "run", noted(model, ran))
        found = run_demo(
            models,
            tmp_path / "demo",
            frames=frames,
            progress=lambda done, total: told.append((done, total)),
        )
    assert "".join(ran) == order.replace(" ", "")
    assert told == [(done, 2 * frames) for done in range(1, 2 * frames + 1)]
    assert len(film_of(found.video)) == frames
    for one in found.models:
        assert (one.summary.frames, one.precision) == (frames, "fp32") and one.summary.fps > 0


def noted(model: Model, ran: list[str]) -> Callable[[Pixels], AnyOutputs]:
    """The engine's ``run``, which adds the model's name to ``ran``."""
    run = model.engine.run

    def named(pixels: Pixels) -> AnyOutputs:
        ran.append(model.spec.name)
        return run(pixels)

    return named


def test_scores_are_those_of_the_models_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "_PORTION", 2)
    source = open_source(f"{CLIP}&frames=3")
    assert isinstance(source, SyntheticSource)
    frames = [source.street.frame(index) for index in range(3)]
    truth = np.stack([frame.class_map for frame in frames])
    with tiny_pair(tiny, tmp_path) as models:
        found = run_demo(models, tmp_path / "demo", frames=3)
        maps = [np.stack([model(frame.pixels).class_map for frame in frames]) for model in models]
    assert found.agreement == (maps[0] == maps[1]).mean() < 1
    labelled = truth != CAMVID.ignore
    for one, predicted in zip(found.models, maps, strict=True):
        for label, iou in enumerate(one.evaluation.per_class.values()):
            here, there = (predicted == label) & labelled, truth == label
            either = (here | there).sum()
            assert iou == pytest.approx((here & there).sum() / either) if either else iou is None


def test_speed_counts_only_a_models_own_turns(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "_PORTION", 2)
    with tiny_pair(tiny, tmp_path) as models:
        run = models[0].engine.run

        def slow(pixels: Pixels) -> AnyOutputs:
            time.sleep(0.25)
            return run(pixels)

        monkeypatch.setattr(models[0].engine, "run", slow)
        found = run_demo(models, tmp_path / "demo", frames=4)
    first, second = (one.summary.fps for one in found.models)
    # Four sleeps take 1 s; who shared the other's clock could not reach 4 frames per second.
    assert first <= 4 < second and found.speedup == second / first


def test_output_that_cannot_be(
    tiny: Tiny, tmp_path: Path, leftovers: Callable[[Path], list[str]]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    (tmp_path / "video" / "segmented.mp4").mkdir(parents=True)
    with tiny_pair(tiny, tmp_path) as models:
        for name, says in (
            ("file", "cannot be written"),
            ("file/below", "cannot be written"),
            ("taken", r"report\.json cannot be written"),
            ("video", r"segmented\.mp4 is a folder"),
        ):
            with pytest.raises(SinkError, match=says):
                run_demo(models, tmp_path / name, frames=1)
    assert (tmp_path / "file").read_text() == "mine"
    assert leftovers(tmp_path) == []


def test_engine_that_breaks_ends_the_demo(
    tiny: Tiny,
    tmp_path: Path,
    leftovers: Callable[[Path], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = threading.active_count()
    with tiny_pair(tiny, tmp_path) as models:
        run, calls = models[1].engine.run, itertools.count()

        def breaks(pixels: Pixels) -> AnyOutputs:
            if next(calls) == 2:
                raise EngineError("the device was unplugged")
            return run(pixels)

        monkeypatch.setattr(models[1].engine, "run", breaks)
        with pytest.raises(EngineError, match="unplugged"):
            run_demo(models, tmp_path / "demo", frames=4)
    assert list((tmp_path / "demo").iterdir()) == [] and leftovers(tmp_path) == []
    assert threading.active_count() == before


def test_models_that_are_refused_before_anything_is_written(tiny: Tiny, tmp_path: Path) -> None:
    with (
        tiny_pair(tiny, tmp_path) as (first, second),
        load(tiny.write(tmp_path / "other")) as other,
    ):
        for models, kind, says in (
            ((first, other), DataError, "a model is evaluated on its own classes"),
            ((other, second), DataError, "a model is evaluated on its own classes"),
            ((first, first), RequestError, "by their names, and two 'a' came"),
        ):
            with pytest.raises(kind, match=says):
                run_demo(models, tmp_path / "demo", frames=2)
    assert not (tmp_path / "demo").exists()
