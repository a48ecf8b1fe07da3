"""Several settings on one machine, measured in turns, so that a machine that drifts cannot lie.

Measured one after the other, the second setting gets the warmer machine, or the one whose neighbour
has just gone to work. Here each round measures every setting twice, in an order that is drawn by
lot and then mirrored (A B C C B A): whatever changes evenly during a round takes as much from each.
The next round turns it around (C B A A B C), which takes the sign from what is left. What counts is
the ratio within a round; the machine may be another one in the next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

from edgeseg.errors import RequestError
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.profile.contestant import Block, Contestant, check_length, contestants
from edgeseg.profile.setting import Setting
from edgeseg.report import (
    Figure,
    Figures,
    LineChart,
    Paragraph,
    Range,
    Ranges,
    Report,
    Section,
    Series,
    Table,
)
from edgeseg.source.address import without_password

__all__ = ["Comparison", "Orders", "Round", "Spread", "Standing", "compare", "measure_round"]

# An even number, since every other round turns the order of the one before around.
_ROUNDS = 10
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Round:
    """What each setting did in one round: its two blocks, settings in their own order."""

    blocks: tuple[tuple[Block, Block], ...]

    def seconds_per_frame(self, index: int) -> float:
        """Mean of the two blocks of one setting."""
        return sum(block.seconds_per_frame for block in self.blocks[index]) / 2

    def ratio(self, index: int, reference: int = 0) -> float:
        """How many times as fast as the reference that setting was in this round."""
        return self.seconds_per_frame(reference) / self.seconds_per_frame(index)


@dataclass(frozen=True)
class Spread:
    """The median of the rounds and the interval in which the true one lies.

    ``low`` and ``high`` are values of rounds, equally far from the ends of the sorted list:
    ``confidence`` is the share of cases in which such an interval holds the true median, whatever
    the distribution is (the binomial distribution of how many values fall below it).
    """

    median: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The narrowest interval of 95 % or more; from the least to the most if none has that."""
        ordered, count = sorted(values), len(values)
        skip = 0
        while 2 * (skip + 1) < count and _coverage(count, skip + 1) >= _CONFIDENCE:
            skip += 1
        return cls(
            median(ordered), ordered[skip], ordered[count - 1 - skip], _coverage(count, skip)
        )

    @property
    def is_sure(self) -> bool:
        """Whether there were rounds enough for 95 %: six."""
        return self.confidence >= _CONFIDENCE

    @property
    def tells(self) -> bool:
        """Whether the interval leaves out "as fast as"."""
        return self.is_sure and not self.low <= 1 <= self.high

    def __str__(self) -> str:
        digits = 2 if self.low >= 0.1 else 3
        return f"{self.median:.{digits}f}x ({self.low:.{digits}f}–{self.high:.{digits}f})"


def _coverage(count: int, skip: int) -> float:
    """How surely the interval without ``skip`` values at each end holds the median."""
    beyond: int = sum(comb(count, k) for k in range(skip + 1))
    return 1 - 2 * beyond / float(2**count)


@dataclass(frozen=True)
class Standing:
    """One setting in a comparison.

    ``fps``: median over the rounds. ``work_ms``: median work on one frame, from pixels to mask.
    ``joules_per_frame``: None where power is not available. ``ratio``: how many times as fast as
    the first setting, round by round; None for the first.
    """

    name: str
    description: str
    network_size: tuple[int, int]
    fps: float
    work_ms: float
    joules_per_frame: float | None
    ratio: Spread | None

    def verdict(self, first: str, rounds: int) -> str:
        """What can be said of it against the first setting, in words."""
        if self.ratio is None:
            return f"{self.name} is what the others are compared with"
        if not self.ratio.is_sure:
            return (
                f"{self.name} was {self.ratio} as fast as {first} in {rounds} rounds, which are "
                "too few to tell: six or more do"
            )
        if not self.ratio.tells:
            return (
                f"{self.name} and {first}: no difference that these {rounds} rounds can tell, "
                f"{self.ratio}"
            )
        return f"{self.name} is {self.ratio} as fast as {first}"


@dataclass(frozen=True)
class Comparison:
    """Settings measured in turns; the first is what the others are compared with."""

    source: str
    frame_size: tuple[int, int]
    settings: tuple[Standing, ...]
    rounds: tuple[Round, ...]
    seed: int
    throttled: bool | None
    stopped: bool = False

    def verdicts(self) -> tuple[str, ...]:
        """One sentence for each setting but the first."""
        first = self.settings[0].name
        return tuple(each.verdict(first, len(self.rounds)) for each in self.settings[1:])

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "comparison": [
                {
                    "setting": each.name,
                    "engine_description": each.description,
                    "network_size": list(each.network_size),
                    "fps": round(each.fps, 3),
                    "work_ms": round(each.work_ms, 3),
                    "joules_per_frame": each.joules_per_frame,
                    "ratio": None
                    if each.ratio is None
                    else {
                        "median": round(each.ratio.median, 4),
                        "low": round(each.ratio.low, 4),
                        "high": round(each.ratio.high, 4),
                        "confidence": round(each.ratio.confidence, 4),
                        "tells": each.ratio.tells,
                    },
                    "ratios": [round(turn.ratio(index), 4) for turn in self.rounds],
                }
                for index, each in enumerate(self.settings)
            ],
            "verdicts": list(self.verdicts()),
            "rounds": len(self.rounds),
            "seed": self.seed,
            "source": self.source,
            "frame_size": list(self.frame_size),
            "throttled": self.throttled,
            "stopped": self.stopped,
        }

    def render(self) -> str:
        """Plain text for a terminal."""
        height, width = self.frame_size
        longest = max(len(each.name) for each in self.settings)
        lines = [
            f"{len(self.settings)} settings in turns, {len(self.rounds)} rounds, {width}x{height} "
            f"frames of {self.source} from memory",
            "",
            f"{'':<{longest}}      fps  ms of work  times as fast (95 % interval)",
        ]
        for each in self.settings:
            ratio = "1" if each.ratio is None else str(each.ratio)
            lines.append(f"{each.name:<{longest}}{each.fps:9.1f}{each.work_ms:12.2f}  {ratio}")
        lines += ["", *self.verdicts(), *self._remarks()]
        lines += ["", *(f"{each.name}: {each.description}" for each in self.settings)]
        return "\n".join(lines)

    def report(self) -> Report:
        """The same as a page."""
        first = self.settings[0]
        tiles = [
            Figure(
                f"{each.ratio.median:.2f}x",
                f"{each.name}",
                f"{each.ratio.low:.2f}–{each.ratio.high:.2f} times as fast as {first.name}"
                if each.ratio.tells
                else "no difference that these rounds can tell",
            )
            for each in self.settings[1:]
            if each.ratio is not None
        ]
        ratios = Ranges(
            tuple(
                Range(
                    each.name, each.ratio.median, each.ratio.low, each.ratio.high, str(each.ratio)
                )
                for each in self.settings[1:]
                if each.ratio is not None
            ),
            mark=1.0,
            caption=f"Times as fast as {first.name}: the median of the rounds and its 95 % "
            "interval. The line stands at 1, as fast as.",
        )
        over_rounds = LineChart(
            tuple(
                Series(
                    each.name,
                    tuple(
                        (float(turn), 1 / found.seconds_per_frame(index))
                        for turn, found in enumerate(self.rounds, 1)
                    ),
                )
                for index, each in enumerate(self.settings)
            ),
            x_label="round",
            y_label="frames per second",
            caption="Frames per second in each round. When the machine gets slower or faster, all "
            "move together, and their ratios stay.",
            from_zero=True,
        )
        table = Table(
            header=("setting", "network", "fps", "ms of work", "J per frame", "times as fast"),
            rows=tuple(
                (
                    each.name,
                    f"{each.network_size[1]}x{each.network_size[0]}",
                    f"{each.fps:.1f}",
                    f"{each.work_ms:.2f}",
                    "not available"
                    if each.joules_per_frame is None
                    else f"{each.joules_per_frame:.3f}",
                    "1" if each.ratio is None else str(each.ratio),
                )
                for each in self.settings
            ),
            align="lrrrrr",
        )
        words = "\n".join((*self.verdicts(), *self._remarks()))
        return Report(
            title=f"{len(self.settings)} settings in turns",
            subtitle=f"{len(self.rounds)} rounds · {self.source}, frames from memory",
            sections=(
                Section("", (Figures(tuple(tiles)), Paragraph(words))),
                Section("Against the first", (ratios, table)),
                Section("Round by round", (over_rounds,)),
                Section(
                    "What was compared",
                    (
                        Paragraph(
                            "\n".join(f"{each.name}: {each.description}" for each in self.settings)
                        ),
                    ),
                ),
            ),
            footer=f"{_METHOD} {MEASURED}",
        )

    def _remarks(self) -> list[str]:
        remarks = []
        if self.stopped:
            remarks.append(f"It was stopped after {len(self.rounds)} rounds.")
        if self.throttled:
            remarks.append(
                "The machine slowed itself down meanwhile; the ratios hold, the frames per second "
                "are lower than they could be."
            )
        return remarks


#: what the figures of settings measured in turns mean
MEASURED = (
    "Frames per second: the masks that a block of frames finished after its third, over the time "
    "from the third to the last; resizing, network, upsampling and bringing the mask to frame size "
    "are in it, reading frames is not. Work: the medians of these steps added up."
)

_METHOD = (
    "All settings are open in one process and see the same frames, kept in memory, so that reading "
    "is not in the figures. Each round measures every setting twice, in an order that is drawn and "
    "then mirrored; a ratio is of one round."
)


def compare(
    settings: Sequence[Setting],
    uri: str = "synthetic:?frames=0",
    *,
    rounds: int = _ROUNDS,
    seconds: float | None = None,
    frames: int | None = None,
    warm_up: int = 10,
    seed: int = 0,
    postprocessing: str | Postprocessing = NOTHING_MORE,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measures two settings or more against the first, on frames of ``uri`` kept in memory.

    ``frames``: of a block; otherwise as many as take ``seconds`` / (2 x rounds x settings), or 0.4
    seconds when that is not given either. ``warm_up``: frames before, of each setting. ``seed``: of
    the orders. ``progress(done, total)`` is called after each round.

    Ctrl-C gives the rounds so far, if there is one. RequestError for fewer than two settings, the
    same one twice, or fewer than one round; what `edgeseg.load` raises for a setting that cannot be
    opened.
    """
    check_settings(settings)
    check_length(frames, seconds)
    if rounds < 1:
        raise RequestError(f"a comparison takes one round or more, and {rounds} came")
    block_s = None if seconds is None else seconds / (2 * rounds * len(settings))
    with contestants(settings, uri, postprocessing) as found:
        turns: list[Round] = []
        stopped = False
        try:
            found.prepare(warm_up, frames=frames, block_s=block_s)
            orders = Orders(seed)
            measures = {index: each.measure for index, each in enumerate(found.all)}
            for _ in range(rounds):
                turns.append(measure_round(measures, orders.next(range(len(measures)))))
                if progress is not None:
                    progress(len(turns), rounds)
        except KeyboardInterrupt:
            if not turns:
                raise
            stopped = True
        return Comparison(
            source=without_password(uri),
            frame_size=found.frame_size,
            settings=tuple(
                standing(str(setting), contestant, turns, index)
                for index, (setting, contestant) in enumerate(zip(settings, found.all, strict=True))
            ),
            rounds=tuple(turns),
            seed=seed,
            throttled=found.throttled(),
            stopped=stopped,
        )


def check_settings(settings: Sequence[Setting]) -> None:
    """RequestError unless they are two or more, all different."""
    if len(settings) < 2:
        raise RequestError(
            f"a comparison needs two settings or more, and {len(settings)} came; add --compare "
            "OTHER_BUNDLE, or the same one with @ENGINE or ,threads=N"
        )
    seen: set[Setting] = set()
    for setting in settings:
        if setting in seen:
            raise RequestError(f"{setting} is there twice; a comparison needs different settings")
        seen.add(setting)


class Orders:
    """In which order settings are measured in each round: drawn by lot, and turned around after.

    Mirrored, a round takes the even part of a drift from each setting alike. What is left is worse
    for those at its ends, or better; so the next round begins with those in its middle.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._drawn: list[int] | None = None

    def next(self, members: Sequence[int]) -> list[int]:
        """The first half of the next round of these; the second half is its mirror image."""
        if self._drawn is not None and sorted(self._drawn) == sorted(members):
            order, self._drawn = self._drawn[::-1], None
            return order
        self._drawn = list(members)
        self._random.shuffle(self._drawn)
        return self._drawn


def measure_round(measures: Mapping[int, Callable[[], Block]], order: Sequence[int]) -> Round:
    """One round: each is measured twice, in ``order`` and then in its mirror image."""
    first = {index: measures[index]() for index in order}
    second = {index: measures[index]() for index in reversed(order)}
    return Round(tuple((first[index], second[index]) for index in sorted(order)))


def standing(name: str, contestant: Contestant, turns: Sequence[Round], index: int) -> Standing:
    """How one setting did over the rounds."""
    blocks = [block for turn in turns for block in turn.blocks[index]]
    joules = [b.joules_per_frame for b in blocks if b.joules_per_frame is not None]
    return Standing(
        name=name,
        description=contestant.description,
        network_size=contestant.network_size,
        fps=median(1 / turn.seconds_per_frame(index) for turn in turns),
        work_ms=median(block.work_ms for block in blocks),
        joules_per_frame=round(median(joules), 4) if joules else None,
        ratio=Spread.of([turn.ratio(index) for turn in turns]) if index else None,
    )
