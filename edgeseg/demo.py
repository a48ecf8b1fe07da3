"""The whole story on a generated clip, told by two models side by side: masks, speed, accuracy.

The models take turns on portions of the clip, so that a machine that becomes slower or faster
meanwhile favours neither, and their frames lie ready in memory: generating a street costs more
than the smaller model's work on it, and would be the figure. Scoring and drawing happen between
the turns, while no clock runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.classes import CAMVID
from edgeseg.dataset import SPLIT_SEEDS
from edgeseg.draw import colourise, draw_classes
from edgeseg.errors import RequestError, SinkError
from edgeseg.evaluate import Evaluation, Scorer, check_classes
from edgeseg.frame import Frame, Pixels
from edgeseg.jsonfile import write_json
from edgeseg.ledger import Summary
from edgeseg.model import Model
from edgeseg.pipeline import Pipeline
from edgeseg.profile import peak_rss_mb, work_ms
from edgeseg.report import (
    Bar,
    Bars,
    Code,
    Details,
    Figure,
    Figures,
    Film,
    Paragraph,
    Picture,
    Pictures,
    Report,
    Section,
    Share,
    Table,
)
from edgeseg.result import SemanticResult
from edgeseg.sink import VideoSink
from edgeseg.source import Source, SyntheticSource, open_source
from edgeseg.synthetic import Street, StreetFrame

__all__ = ["NEXT", "Contender", "Demo", "run_demo"]

#: the clip: a city street that no training run sees, and that has all eleven classes
CLIP = f"synthetic:?seed={SPLIT_SEEDS['demo'] + 5}&scene=city&size=360x480&fps=25"
# Frames of one turn: enough for a steady pace, and few enough to lie in memory (20 MB).
_PORTION = 30
_SHOWN = 4
# The film in the report: every so many frames, at this size (width, height), at most this many.
_FILM_STEP, _FILM_SIZE, _FILM_FRAMES = 4, (960, 360), 40

# The line between the two halves of the video, and the plates of their names (BGR).
_SEAM = 2
_PLATE, _LETTERS = (24, 20, 20), (245, 245, 245)

_MINUS = "\N{MINUS SIGN}"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Contender:
    """One of the two models, and how it did on the clip.

    ``precision``: "fp32", or "INT8" for a graph with quantized layers. ``size_mb``: the model's
    file in MB (10^6 bytes). ``summary``: without the stage ``capture``, since the frames lay in
    memory; its ``fps`` is frames over the time from the arrival of a portion's first frame to the
    portion's last finished mask.
    """

    name: str
    precision: str
    engine: str
    description: str
    size_mb: float
    summary: Summary
    evaluation: Evaluation

    @property
    def title(self) -> str:
        """Name and precision, as the pictures show them."""
        return f"{self.name}, {self.precision}"

    @property
    def work_ms(self) -> float:
        """Work on one frame, from its pixels to its mask: the medians of the stages added up."""
        return work_ms(self.summary)

    @property
    def network_ms(self) -> float:
        """Median time in the network."""
        return self.summary.stages["network"].p50_ms

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "precision": self.precision,
            "engine": self.engine,
            "engine_description": self.description,
            "size_mb": round(self.size_mb, 3),
            **self.summary.to_dict(),
            "work_ms": self.work_ms,
            "network_ms": self.network_ms,
            "miou": self.evaluation.miou,
            "per_class": self.evaluation.per_class,
        }


@dataclass(frozen=True)
class Demo:
    """What the demo made and measured; paths are of files that exist.

    ``models``: in the order they were given; the first is what the second is compared with.
    ``agreement``: share of pixels, 0 to 1, on which both see the same class.
    """

    video: Path
    report: Path
    figures: Path
    models: tuple[Contender, Contender]
    agreement: float

    @property
    def speedup(self) -> float:
        """How many frames the second model finishes in the time of one of the first."""
        first, second = self.models
        return second.summary.fps / first.summary.fps

    @property
    def engines(self) -> str:
        """What ran them; said once where it is the same."""
        return " · ".join(dict.fromkeys(one.description for one in self.models))

    def to_dict(self) -> dict[str, object]:
        """The figures for JSON: one entry per model, and what compares them."""
        return {
            "clip": CLIP,
            "models": {one.name: one.to_dict() for one in self.models},
            "speedup": self.speedup,
            "agreement": self.agreement,
            "peak_rss_mb": round(peak_rss_mb(), 1),
        }

    def render(self) -> str:
        """Plain text for a terminal: the two models line by line."""
        first, second = self.models
        width = max(len(one.name) for one in self.models)
        lines = [
            self.engines,
            "",
            f"  {'':<{width}}   mIoU %   frames/s   ms/frame       MB",
            *(
                f"  {one.name:<{width}}{one.evaluation.miou * 100:9.1f}{one.summary.fps:11.1f}"
                f"{one.work_ms:11.1f}{one.size_mb:9.1f}"
                for one in self.models
            ),
            "",
            f"{second.name} finishes {self.speedup:.1f} times the frames per second of "
            f"{first.name} and sees the same class",
            f"on {self.agreement:.1%} of the pixels. mIoU: against exact truth; frames per second: "
            "frame to finished",
            "mask; ms/frame: work from pixels to mask, median; MB: the model's file.",
        ]
        return "\n".join(lines)


def run_demo(
    models: tuple[Model, Model],
    folder: Path,
    *,
    frames: int = 150,
    progress: Progress | None = None,
) -> Demo:
    """Segments the demo clip with both ``models`` and writes three files into ``folder``.

    ``segmented.mp4`` (the first model left, the second right, with a legend), ``report.html`` and
    ``report.json``. ``progress(done, total)`` is called after each mask; ``total`` counts both.
    DataError when a model's classes are not the street's, RequestError when both have one name,
    SinkError when the folder cannot be written.
    """
    for model in models:
        check_classes(model.spec.classes, CAMVID)
    if models[0].spec.name == models[1].spec.name:
        raise RequestError(
            f"the demo tells two models apart by their names, and two {models[0].spec.name!r} came"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SinkError(f"{folder} cannot be written ({error.strerror}); use --output") from error
    source = open_source(f"{CLIP}&frames={frames}")
    assert isinstance(source, SyntheticSource)
    street = source.street
    video = VideoSink(folder / "segmented.mp4", fps=street.fps)
    with video, _Player(models[0]) as first, _Player(models[1]) as second:
        screening = _Screening(video, street)
        _take_turns(first, second, street, screening, progress)
        demo = Demo(
            video=folder / "segmented.mp4",
            report=folder / "report.html",
            figures=folder / "report.json",
            models=(first.contender(), second.contender()),
            agreement=screening.agreement,
        )
    _report(demo, screening).write(demo.report)
    write_json(demo.figures, demo.to_dict())
    return demo


def _take_turns(
    first: _Player,
    second: _Player,
    street: Street,
    screening: _Screening,
    progress: Progress | None,
) -> None:
    """Plays the clip in portions, one model after the other; who begins changes every time."""
    total, done = len(street), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, 2 * total)

    for turn, start in enumerate(range(0, total, _PORTION)):
        portion = [street.frame(index) for index in range(start, min(start + _PORTION, total))]
        order = (second, first) if turn % 2 else (first, second)
        results = {player: player.play(portion, start, advance) for player in order}
        for truth, left, right in zip(portion, results[first], results[second], strict=True):
            first.score(left, truth)
            second.score(right, truth)
            screening.show(left, right, (first.title, second.title), truth)


class _PortionSource(Source):
    """Frames that are handed over a portion at a time; in between it waits for the next ones."""

    def __init__(self) -> None:
        super().__init__("the frames of the demo", live=False)
        self._waiting: SimpleQueue[tuple[int, Pixels] | None] = SimpleQueue()

    def hand_over(self, portion: Sequence[StreetFrame], start: int) -> None:
        """Gives it the frames from number ``start`` on."""
        for index, frame in enumerate(portion, start):
            self._waiting.put((index, frame.pixels))

    def close(self) -> None:
        """Ends the iteration, also while it waits."""
        super().close()
        self._waiting.put(None)

    def _read(self) -> Frame | None:
        handed = self._waiting.get()
        if handed is None:
            return None
        index, pixels = handed
        return Frame(pixels, time.monotonic_ns(), index)


class _Player:
    """One model at the clip, with a pipeline, a clock and a score of its own. Use it in ``with``.

    One pipeline for all its turns keeps the stage times of the whole clip together. Between the
    turns its threads wait for frames and cost nothing.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._precision = "INT8" if model.bundle.model.is_quantized() else "fp32"
        self._source = _PortionSource()
        self._pipeline = Pipeline(model.engine, self._source)
        self._results = iter(self._pipeline)
        self._scorer = Scorer(model.spec.classes, CAMVID)
        self._busy_ns = 0

    @property
    def title(self) -> str:
        """Name and precision of the model."""
        return f"{self._model.spec.name}, {self._precision}"

    def __enter__(self) -> _Player:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pipeline.close()

    def play(
        self, portion: Sequence[StreetFrame], start: int, advance: Callable[[], None]
    ) -> list[SemanticResult]:
        """The results of a portion, whose first frame has the number ``start``; the clock runs."""
        if start == 0:
            # The first frame of all is a cold one, and nobody's measure.
            self._model(portion[0].pixels)
        results: list[SemanticResult] = []
        self._source.hand_over(portion, start)
        for result in islice(self._results, len(portion)):
            if not isinstance(result, SemanticResult):
                raise RequestError(
                    f"the demo compares semantic models, and {self._model.spec.name} finds "
                    "instances; show it with `edgeseg run`"
                )
            results.append(result)
            advance()
        self._busy_ns += results[-1].finished_ns - results[0].frame.captured_ns
        return results

    def score(self, result: SemanticResult, truth: StreetFrame) -> None:
        """Compares one result with the truth."""
        self._scorer.add(result.class_map, truth.class_map)

    def contender(self) -> Contender:
        """How it did so far."""
        model, summary = self._model, self._pipeline.ledger.summary()
        # What its ledger takes for reading is mostly waiting for a turn.
        stages = dict(summary.stages)
        stages.pop("capture", None)
        fps = summary.frames * 1e9 / max(self._busy_ns, 1)
        return Contender(
            name=model.spec.name,
            precision=self._precision,
            engine=model.engine.name,
            description=model.engine.description,
            size_mb=len(model.bundle.model.content) / 1e6,
            summary=replace(summary, fps=fps, stages=stages),
            evaluation=self._scorer.evaluation(
                data="synthetic streets", split="demo", engine=model.engine.name
            ),
        )


@dataclass(frozen=True, eq=False)
class _SideBySide(SemanticResult):
    """The result of one model, drawn with that of another for the same frame at its right.

    ``titles``: what the two halves are called.
    """

    right: SemanticResult = field(kw_only=True)
    titles: tuple[str, str] = field(kw_only=True)

    @classmethod
    def of(
        cls, left: SemanticResult, right: SemanticResult, titles: tuple[str, str]
    ) -> _SideBySide:
        """Both results as one."""
        return cls(
            frame=left.frame,
            spec=left.spec,
            geometry=left.geometry,
            outputs=left.outputs,
            finished_ns=left.finished_ns,
            right=right,
            titles=titles,
        )

    def draw(self, *, opacity: float = 0.5, legend: bool = True) -> Pixels:
        """Both halves, with one legend: (height, 2 x width, 3) uint8 BGR, a new array."""
        pixels = self.frame.pixels
        maps = (self.class_map, self.right.class_map)
        picture = draw_classes(
            np.hstack((pixels, pixels)),
            np.hstack(maps),
            names=self.spec.classes,
            colours=self.spec.colours,
            opacity=opacity,
            legend=legend,
        )
        middle = pixels.shape[1]
        picture[:, middle - _SEAM // 2 : middle + _SEAM // 2] = _PLATE
        for edge, title in zip((0, middle), self.titles, strict=True):
            _letter(picture, title, edge)
        return picture


def _letter(picture: Pixels, title: str, edge: int) -> None:
    """Writes a title on a plate near the lower left corner of the half that begins at ``edge``."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, picture.shape[0] / 700
    (width, height), below = cv2.getTextSize(title, font, scale, 1)
    left, bottom = edge + height, picture.shape[0] - height
    corner = (left, bottom - height - 2 * below)
    cv2.rectangle(picture, corner, (left + width + 2 * below, bottom), _PLATE, cv2.FILLED)
    cv2.putText(
        picture, title, (left + below, bottom - below), font, scale, _LETTERS, 1, cv2.LINE_AA
    )


@dataclass(frozen=True, eq=False)
class _Shot:
    """One frame for the report, as both models see it."""

    left: SemanticResult
    right: SemanticResult
    truth: NDArray[np.uint8]


class _Screening:
    """Shows both models' results of each frame: in the video, in the film, in the pictures."""

    def __init__(self, video: VideoSink, street: Street) -> None:
        frames = len(street)
        self._video = video
        self._wanted = {round(frames * (2 * shot + 1) / (2 * _SHOWN)) for shot in range(_SHOWN)}
        self._same = 0
        self._pixels = 0
        self.fps = street.fps
        self.film: list[Pixels] = []
        self.shots: list[_Shot] = []

    @property
    def agreement(self) -> float:
        """Share of all pixels so far on which both see the same class, 0 to 1."""
        return self._same / self._pixels

    def show(
        self,
        left: SemanticResult,
        right: SemanticResult,
        titles: tuple[str, str],
        truth: StreetFrame,
    ) -> None:
        """Takes the results of one frame."""
        both = _SideBySide.of(left, right, titles)
        self._video.write(both)
        self._same += int(np.count_nonzero(left.class_map == right.class_map))
        self._pixels += left.class_map.size
        if left.index % _FILM_STEP == 0 and len(self.film) < _FILM_FRAMES:
            self.film.append(
                cv2.resize(both.draw(), _FILM_SIZE, interpolation=cv2.INTER_AREA)  # type: ignore[arg-type]
            )
        if left.index in self._wanted:
            self.shots.append(_Shot(left, right, truth.class_map))


def _report(demo: Demo, screening: _Screening) -> Report:
    first, second = demo.models
    return Report(
        title="A street, segmented twice",
        subtitle=f"{first.title} · {second.title} · {demo.engines}",
        sections=(
            Section("", (_headline(demo),)),
            Section("Both models", (_scores(demo),)),
            Section("How it looks", _looks(demo, screening)),
            Section("How right it is", _accuracy(demo)),
            Section("Where the time of a frame goes", _times(demo)),
            Section("Next", (Code("\n".join(NEXT)),)),
        ),
        footer=_FOOTER,
    )


def _headline(demo: Demo) -> Figures:
    first, second = demo.models
    points = (second.evaluation.miou - first.evaluation.miou) * 100
    return Figures(
        (
            Figure(
                f"{demo.speedup:.1f}×",
                "frames per second",
                f"{second.summary.fps:.1f} in place of {first.summary.fps:.1f}",
            ),
            Figure(
                _signed(points),
                "points of mIoU",
                f"{second.evaluation.miou * 100:.1f} % in place of "
                f"{first.evaluation.miou * 100:.1f} %",
            ),
            Figure(f"{demo.agreement * 100:.1f} %", "of the pixels", "have one class in both"),
            Figure(
                f"{second.size_mb:.1f} MB", "model's file", f"in place of {first.size_mb:.1f} MB"
            ),
        )
    )


def _scores(demo: Demo) -> Table:
    lines: tuple[tuple[str, Callable[[Contender], str]], ...] = (
        ("precision", lambda one: one.precision),
        ("mIoU against exact truth", lambda one: f"{one.evaluation.miou * 100:.1f} %"),
        ("frames per second", lambda one: f"{one.summary.fps:.1f}"),
        ("work on a frame, median", lambda one: f"{one.work_ms:.1f} ms"),
        ("of it in the network", lambda one: f"{one.network_ms:.1f} ms"),
        ("file", lambda one: f"{one.size_mb:.1f} MB"),
    )
    return Table(
        header=("", *(one.name for one in demo.models)),
        rows=tuple((name, *(text(one) for one in demo.models)) for name, text in lines),
        align="lrr",
    )


def _looks(demo: Demo, screening: _Screening) -> tuple[Film | Pictures, ...]:
    first, second = demo.models
    pictures = []
    for shot in screening.shots:
        truth = colourise(shot.truth, shot.left.spec.colours)
        pictures += [
            Picture(shot.left.frame.pixels, f"frame {shot.left.index}"),
            Picture(shot.left.draw(legend=False), first.title),
            Picture(shot.right.draw(legend=False), second.title),
            Picture(truth, "the truth", lossless=True),
        ]
    stills = Pictures(tuple(pictures), columns=4)
    film = screening.film
    if len(film) < 2:
        return (stills,)
    seconds = len(film) * _FILM_STEP / screening.fps
    return (
        Film(tuple(film), seconds, "every fourth frame, at the pace of the street"),
        stills,
    )


def _accuracy(demo: Demo) -> tuple[Paragraph | Table, ...]:
    first, second = demo.models
    rows = []
    for name, before in first.evaluation.per_class.items():
        after = second.evaluation.per_class[name]
        points = "" if before is None or after is None else _signed((after - before) * 100)
        bar = Share(0.0 if after is None else after, "")
        # The bar comes last: on a phone it is out of sight, and not a number.
        rows.append((name.replace("_", " "), _iou(before), _iou(after), points, bar))
    return (
        Paragraph(
            "Intersection over union of every class with the exact ground truth of the generated "
            f"clip, in per cent, over {first.evaluation.frames} frames that neither model was "
            f"trained on. The bars are those of {second.name}."
        ),
        Table(
            header=("class", first.name, second.name, "points", ""),
            rows=tuple(rows),
            align="lrrrl",
        ),
    )


def _times(demo: Demo) -> tuple[Paragraph | Bars | Details, ...]:
    # One scale for both models.
    longest = max(times.p50_ms for one in demo.models for times in one.summary.stages.values())
    return (
        Paragraph(
            "Median of each stage. Stages of different frames overlap. The models took turns, "
            f"{_PORTION} frames each, and who began changed every time."
        ),
        *(
            Bars(
                tuple(
                    Bar(name, times.p50_ms, _short_ms(times.p50_ms))
                    for name, times in one.summary.stages.items()
                ),
                full=longest,
                caption=one.title,
            )
            for one in demo.models
        ),
        Details("Percentiles", tuple(_percentiles(one) for one in demo.models)),
    )


def _percentiles(one: Contender) -> Table:
    return Table(
        header=("stage", "p50 ms", "p95 ms", "p99 ms"),
        rows=tuple(
            (name, f"{times.p50_ms:.2f}", f"{times.p95_ms:.2f}", f"{times.p99_ms:.2f}")
            for name, times in one.summary.stages.items()
        ),
        align="lrrr",
        caption=one.title,
    )


def _iou(share: float | None) -> str:
    return "absent" if share is None else f"{share * 100:.1f}"


def _short_ms(value: float) -> str:
    """Short enough for the end of a bar on a phone."""
    return f"{value:.0f} ms" if value >= 99.95 else f"{value:.1f} ms"


def _signed(points: float) -> str:
    if abs(points) < 0.05:
        return "0.0"
    return f"{points:+.1f}".replace("-", _MINUS)


_FOOTER = (
    "Frames per second: frames over the time from the arrival of a portion's first frame to the "
    "portion's last finished mask; resizing, network, upsampling and bringing the mask to frame "
    "size are all in it. The frames lay ready in memory and nothing was drawn meanwhile: reading a "
    "camera or a video comes on top, and `edgeseg profile` measures it with yours."
)

#: commands to try after the demo
NEXT = (
    "edgeseg run streets-int8 --source YOUR_VIDEO.mp4 --save segmented.mp4",
    "edgeseg run streets --source YOUR_VIDEO.mp4 --save segmented.mp4",
    "edgeseg run streets-int8 --source 0 --show",
    "edgeseg profile streets-int8 --source YOUR_VIDEO.mp4",
)
