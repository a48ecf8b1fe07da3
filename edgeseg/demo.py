"""The whole story on a generated clip: masks, speed, and accuracy against exact ground truth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.classes import CAMVID
from edgeseg.dataset import SPLIT_SEEDS
from edgeseg.draw import colourise
from edgeseg.errors import SinkError
from edgeseg.evaluate import Evaluation, Scorer, check_classes
from edgeseg.frame import Pixels
from edgeseg.jsonfile import write_json
from edgeseg.model import Model
from edgeseg.pipeline import Pipeline, Summary
from edgeseg.profile import DEFINITIONS, peak_rss_mb, speed_figures, stage_blocks
from edgeseg.report import (
    Bars,
    Code,
    Figure,
    Figures,
    Film,
    Paragraph,
    Picture,
    Pictures,
    Report,
    Section,
)
from edgeseg.result import SemanticResult
from edgeseg.sink import VideoSink
from edgeseg.source import SyntheticSource, open_source

__all__ = ["Demo", "run_demo"]

#: the clip: a city street that no training run sees, and that has all eleven classes
CLIP = f"synthetic:?seed={SPLIT_SEEDS['demo'] + 5}&scene=city&size=360x480&fps=25"
_SHOWN = 4
# The film in the report: every so many frames, at this size (width, height), at most this many.
_FILM_STEP, _FILM_SIZE, _FILM_FRAMES = 4, (480, 360), 40


@dataclass(frozen=True)
class Demo:
    """What the demo made and measured; paths are of files that exist."""

    video: Path
    report: Path
    figures: Path
    summary: Summary
    evaluation: Evaluation
    description: str


def run_demo(
    model: Model,
    folder: Path,
    *,
    frames: int = 150,
    progress: Callable[[int, int], None] | None = None,
) -> Demo:
    """Segments the demo clip with ``model`` and writes three files into ``folder``.

    ``segmented.mp4`` (overlay with a legend), ``report.html`` and ``report.json``. DataError when
    the model's classes are not the street's, SinkError when the folder cannot be written.
    """
    check_classes(model.spec.classes, CAMVID)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SinkError(f"{folder} cannot be written ({error.strerror}); use --output") from error
    source = open_source(f"{CLIP}&frames={frames}")
    assert isinstance(source, SyntheticSource)
    street = source.street
    model(street.frame(0).pixels)
    kept: list[SemanticResult] = []
    maps: list[tuple[int, NDArray[np.uint8]]] = []
    film: list[Pixels] = []
    wanted = {round(frames * (2 * shown + 1) / (2 * _SHOWN)) for shown in range(_SHOWN)}
    video = VideoSink(folder / "segmented.mp4", fps=street.fps)
    with video, Pipeline(model.engine, source) as pipeline:
        for done, result in enumerate(pipeline, 1):
            started_ns = time.perf_counter_ns()
            video.write(result)
            pipeline.ledger.record("output", time.perf_counter_ns() - started_ns)
            # Compared later: drawing the truth now would slow the clip that is being timed.
            maps.append((result.index, result.class_map))
            if result.index in wanted:
                kept.append(result)
            if result.index % _FILM_STEP == 0 and len(film) < _FILM_FRAMES:
                film.append(cv2.resize(result.draw(), _FILM_SIZE))  # type: ignore[arg-type]
            if progress is not None:
                progress(done, frames)
        summary = pipeline.ledger.summary()
    evaluation = _scored(model, maps, source)
    report = folder / "report.html"
    _report(model, summary, evaluation, kept, film, source).write(report)
    figures = folder / "report.json"
    content = {
        "model": model.spec.name,
        "engine": model.engine.name,
        "engine_description": model.engine.description,
        **summary.to_dict(),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "miou": evaluation.miou,
        "per_class": evaluation.per_class,
    }
    write_json(figures, content)
    return Demo(
        video=folder / "segmented.mp4",
        report=report,
        figures=figures,
        summary=summary,
        evaluation=evaluation,
        description=model.engine.description,
    )


def _scored(
    model: Model, maps: list[tuple[int, NDArray[np.uint8]]], source: SyntheticSource
) -> Evaluation:
    """The class maps of the clip against the street's own truth."""
    scorer = Scorer(model.spec.classes, CAMVID)
    for index, class_map in maps:
        scorer.add(class_map, source.street.frame(index).class_map)
    return scorer.evaluation(data="synthetic streets", split="demo", engine=model.engine.name)


def _report(
    model: Model,
    summary: Summary,
    evaluation: Evaluation,
    kept: list[SemanticResult],
    film: list[Pixels],
    source: SyntheticSource,
) -> Report:
    spec = model.spec
    pictures = []
    for result in kept:
        truth = colourise(source.street.frame(result.index).class_map, spec.colours)
        pictures += [
            Picture(result.frame.pixels, f"frame {result.index}"),
            Picture(result.draw(legend=False), "what the model sees"),
            Picture(truth, "the truth", lossless=True),
        ]
    seconds = len(film) * _FILM_STEP / source.street.fps
    moving: tuple[Film, ...] = ()
    if len(film) > 1:
        moving = (Film(tuple(film), seconds, "every fourth frame, at the pace of the street"),)
    speed = speed_figures(summary, peak_rss_mb(), live=False)
    right = Figure(
        f"{evaluation.miou * 100:.1f} %", "mIoU", "mean over the classes, against exact truth"
    )
    return Report(
        title="A street, segmented",
        subtitle=f"{spec.name} · {model.engine.description}",
        sections=(
            Section("", (Figures((right, *speed.items)),)),
            Section("How it looks", (*moving, Pictures(tuple(pictures), columns=3))),
            Section(
                "How right it is",
                (
                    Paragraph(
                        "Intersection over union of every class with the exact ground truth of "
                        f"the generated clip, over {evaluation.frames} frames that the model was "
                        "not trained on."
                    ),
                    Bars.of_classes(evaluation.per_class, spec.colours),
                ),
            ),
            Section("Where the time of a frame goes", stage_blocks(summary)),
            Section("Next", (Code("\n".join(NEXT)),)),
        ),
        footer=DEFINITIONS,
    )


#: commands to try after the demo
NEXT = (
    "edgeseg run streets --source YOUR_VIDEO.mp4 --save segmented.mp4",
    "edgeseg run streets --source 0 --show",
    "edgeseg profile streets --source YOUR_VIDEO.mp4",
)
