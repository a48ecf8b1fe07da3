"""The fastest setting of a bundle on this machine, found by racing them against each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from edgeseg import kernels
from edgeseg.engine import library_version
from edgeseg.engine.tuned import save_tuned
from edgeseg.errors import EngineError, RequestError
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.profile.comparison import MEASURED, Orders, Spread, measure_round
from edgeseg.profile.contestant import Block, Contestant, check_length, contestants
from edgeseg.profile.setting import Setting
from edgeseg.report import Figure, Figures, Paragraph, Range, Ranges, Report, Section, Table
from edgeseg.source.address import without_password

__all__ = ["Entrant", "Race", "Sweep", "race", "sweep"]

# An even number, since every other round turns the order of the one before around.
_ROUNDS = 10
# Out of the race after three rounds, each of which was this much slower than the fastest.
_ROUNDS_BEFORE_OUT = 3
_OUT = 0.95
# What is as good as the fastest: fewer threads then leave more of the machine to others.
_AS_FAST = 0.98


@dataclass(frozen=True)
class Race:
    """What racing found.

    ``blocks``: of each runner, its two blocks in each round that it was in. ``winners``: of each
    group the indices, best first, of those that stayed to the end. ``out``: index -> the round
    after which it was out.
    """

    blocks: tuple[tuple[tuple[Block, Block], ...], ...]
    out: dict[int, int]
    rounds: int
    stopped: bool = False

    def seconds(self, index: int) -> list[float]:
        """Seconds per frame in each round that it was in."""
        return [(a.seconds_per_frame + b.seconds_per_frame) / 2 for a, b in self.blocks[index]]

    def ratio(self, index: int, reference: int) -> Spread:
        """How many times as fast as the reference, in the rounds that both were in."""
        pairs = zip(self.seconds(reference), self.seconds(index), strict=False)
        return Spread.of([other / own for other, own in pairs])


def race(
    runners: Sequence[Callable[[], Block]],
    groups: Sequence[Hashable],
    *,
    rounds: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Race:
    """Measures runners in rounds, and leaves out those that cannot win their group any more.

    A runner is out when it was 5 % slower than the fastest of its group in every round of three or
    more. One that is alone in its group stays. Ctrl-C gives the rounds so far, if there is one.
    """
    orders = Orders(seed)
    blocks: list[list[tuple[Block, Block]]] = [[] for _ in runners]
    out: dict[int, int] = {}
    done = 0
    stopped = False
    for turn in range(1, rounds + 1):
        left = [index for index in range(len(runners)) if index not in out]
        try:
            found = measure_round({index: runners[index] for index in left}, orders.next(left))
        except KeyboardInterrupt:
            if not done:
                raise
            stopped = True
            break
        for index, pair in zip(left, found.blocks, strict=True):
            blocks[index].append(pair)
        done = turn
        state = Race(tuple(tuple(pairs) for pairs in blocks), out, done)
        if turn >= _ROUNDS_BEFORE_OUT:
            out.update(dict.fromkeys(_losers(state, groups, left), turn))
        if progress is not None:
            progress(turn, rounds)
    return Race(tuple(tuple(pairs) for pairs in blocks), out, done, stopped)


def _losers(state: Race, groups: Sequence[Hashable], left: Sequence[int]) -> list[int]:
    found = []
    for group in dict.fromkeys(groups[index] for index in left):
        members = [index for index in left if groups[index] == group]
        best = min(members, key=lambda index: median(state.seconds(index)))
        for index in members:
            pairs = zip(state.seconds(best), state.seconds(index), strict=True)
            if index != best and all(fast / own < _OUT for fast, own in pairs):
                found.append(index)
    return found


@dataclass(frozen=True)
class Entrant:
    """One setting of a sweep; ``out_after``: the round after which it was out, None if it stayed.

    ``ratio``: how many times as fast as the fastest of its bundle; None for that one. ``chosen``:
    whether it is the setting that its bundle gets.
    """

    setting: Setting
    description: str
    network_size: tuple[int, int]
    fps: float
    work_ms: float
    ratio: Spread | None
    out_after: int | None
    chosen: bool


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. ``saved``: files that were written, one for each bundle.

    ``at_least``: the frames per second that were asked for, None if any do. ``recommended``: the
    largest network that reaches them, or of those that do not the fastest; the fastest of all
    where nothing was asked for.
    """

    source: str
    frame_size: tuple[int, int]
    entrants: tuple[Entrant, ...]
    rounds: int
    seed: int
    at_least: float | None
    recommended: Entrant
    saved: tuple[Path, ...]
    notes: tuple[str, ...]
    stopped: bool = False

    @property
    def chosen(self) -> tuple[Entrant, ...]:
        """The setting of each bundle."""
        return tuple(each for each in self.entrants if each.chosen)

    def conclusions(self) -> tuple[str, ...]:
        """What it comes to, one sentence each."""
        lines = []
        for each in self.chosen:
            lines.append(f"{each.setting}: {each.fps:.1f} frames per second, {each.work_ms:.1f} ms")
        if len(self.chosen) > 1 or self.at_least is not None:
            best = self.recommended
            if self.at_least is None:
                lines.append(f"the fastest is {best.setting}; a larger network may see more")
            elif best.fps >= self.at_least:
                lines.append(
                    f"{best.setting} is the largest network here that reaches {self.at_least:g} "
                    "frames per second"
                )
            else:
                lines.append(
                    f"none reaches {self.at_least:g} frames per second; the fastest is "
                    f"{best.setting} with {best.fps:.1f}"
                )
        lines += [
            f"written to {path}: taken from now on where no --threads are given"
            for path in self.saved
        ]
        lines += self.notes
        if self.stopped:
            lines.append(f"stopped after {self.rounds} rounds; nothing was written")
        return tuple(lines)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "sweep": [
                {
                    "setting": str(each.setting),
                    "bundle": each.setting.bundle,
                    "engine": each.setting.engine,
                    "threads": each.setting.threads,
                    "network_size": list(each.network_size),
                    "fps": round(each.fps, 3),
                    "work_ms": round(each.work_ms, 3),
                    "ratio_to_fastest": None
                    if each.ratio is None
                    else {
                        "median": round(each.ratio.median, 4),
                        "low": round(each.ratio.low, 4),
                        "high": round(each.ratio.high, 4),
                    },
                    "out_after": each.out_after,
                    "chosen": each.chosen,
                }
                for each in self.entrants
            ],
            "recommended": str(self.recommended.setting),
            "at_least_fps": self.at_least,
            "saved": [str(path) for path in self.saved],
            "rounds": self.rounds,
            "seed": self.seed,
            "source": self.source,
            "frame_size": list(self.frame_size),
            "notes": list(self.notes),
            "stopped": self.stopped,
        }

    def render(self) -> str:
        """Plain text for a terminal."""
        longest = max(len(str(each.setting)) for each in self.entrants)
        lines = [
            f"{len(self.entrants)} settings raced in turns, {self.rounds} rounds at most",
            "",
            f"{'':<{longest}}      fps  ms of work  against the fastest of its bundle",
        ]
        for each in self.entrants:
            lines.append(
                f"{each.setting!s:<{longest}}{each.fps:9.1f}{each.work_ms:12.2f}  {_place(each)}"
            )
        return "\n".join([*lines, "", *self.conclusions()])

    def report(self) -> Report:
        """The same as a page."""
        return Report(
            title=f"{self.recommended.setting}: {self.recommended.fps:.1f} frames per second",
            subtitle=f"{len(self.entrants)} settings raced in turns · {self.source}, frames from "
            "memory",
            sections=(
                Section(
                    "",
                    (
                        Figures(
                            tuple(
                                Figure(
                                    f"{each.fps:.1f}",
                                    f"frames per second, {each.setting}",
                                    f"{each.work_ms:.1f} ms of work on a frame",
                                )
                                for each in self.chosen
                            )
                        ),
                        Paragraph("\n".join(self.conclusions())),
                    ),
                ),
                Section(
                    "All settings",
                    (
                        Ranges(
                            tuple(
                                Range(
                                    str(each.setting),
                                    each.ratio.median if each.ratio else 1.0,
                                    each.ratio.low if each.ratio else 1.0,
                                    each.ratio.high if each.ratio else 1.0,
                                    _place(each),
                                )
                                for each in self.entrants
                            ),
                            mark=1.0,
                            caption="Times as fast as the fastest of its bundle. Those that were "
                            "out early have fewer rounds behind them.",
                        ),
                        Table(
                            header=("setting", "network", "fps", "ms of work", "engine"),
                            rows=tuple(
                                (
                                    str(each.setting),
                                    f"{each.network_size[1]}x{each.network_size[0]}",
                                    f"{each.fps:.1f}",
                                    f"{each.work_ms:.2f}",
                                    each.description,
                                )
                                for each in self.entrants
                            ),
                            align="lrrrl",
                        ),
                    ),
                ),
            ),
            footer=f"{_METHOD} {MEASURED}",
        )


_METHOD = (
    "Settings are measured in rounds, each twice a round in an order that is drawn and then "
    "mirrored. One that was 5 % slower than the fastest of its bundle in three rounds or more, in "
    "each of them, is out. Of those that are within 2 % of the fastest, or within 5 % and cannot "
    "be told from it, the one with fewest threads is taken."
)


def _place(each: Entrant) -> str:
    words = "fastest" if each.ratio is None else str(each.ratio)
    if each.out_after is not None:
        words += f", out after round {each.out_after}"
    return f"{words}, chosen" if each.chosen else words


def thread_counts(cores: int) -> tuple[int, ...]:
    """Numbers of threads worth trying: powers of two, three quarters, and all."""
    powers = [1 << k for k in range(cores.bit_length()) if 1 << k <= cores]
    return tuple(sorted({*powers, max(3 * cores // 4, 1), cores}))


def sweep(
    settings: Sequence[Setting],
    uri: str = "synthetic:?frames=0",
    *,
    threads: Sequence[int] | None = None,
    rounds: int = _ROUNDS,
    seconds: float | None = None,
    frames: int | None = None,
    warm_up: int = 10,
    seed: int = 0,
    at_least: float | None = None,
    save: bool = True,
    postprocessing: str | Postprocessing = NOTHING_MORE,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Finds the best number of threads of each setting's bundle and engine on this machine.

    ``settings``: one or more; one with a number of threads runs with that alone. ``threads``: what
    to try, None for powers of two up to the cores that are here. ``seconds``: of the whole race if
    nobody were out. ``at_least``: the frames per second that are needed; of several bundles the
    largest network that reaches them is recommended. ``save``: writes the winner where
    `edgeseg.load` looks (see `edgeseg.engine.tuned`); nothing is written after Ctrl-C.

    RequestError when there is nothing to choose from.
    """
    check_length(frames, seconds)
    entered = _entered(settings, threads or thread_counts(kernels.available_cores()))
    if rounds < _ROUNDS_BEFORE_OUT:
        raise RequestError(f"a sweep takes {_ROUNDS_BEFORE_OUT} rounds or more, and {rounds} came")
    block_s = None if seconds is None else seconds / (2 * rounds * len(entered))
    with contestants(entered, uri, postprocessing) as found:
        # None is the best engine that is here, which by now has a name.
        entered = [
            replace(setting, engine=each.model.engine.name)
            for setting, each in zip(entered, found.all, strict=True)
        ]
        groups = [(setting.bundle, setting.engine, setting.head) for setting in entered]
        found.prepare(warm_up, frames=frames, block_s=block_s)
        outcome = race(
            [each.measure for each in found.all],
            groups,
            rounds=rounds,
            seed=seed,
            progress=progress,
        )
        entrants = _entrants(entered, groups, found.all, outcome)
        saved, notes = [], []
        for each, contestant in zip(entrants, found.all, strict=True):
            if not each.chosen or not save or outcome.stopped or each.setting.engine == "tensorrt":
                continue
            engine = contestant.model.engine.name
            try:
                path = save_tuned(
                    contestant.model.bundle,
                    engine,
                    library_version(engine),
                    threads=each.setting.threads,
                    fps=each.fps,
                )
            except EngineError as error:
                notes.append(
                    f"the setting could not be kept ({error}); give --threads "
                    f"{each.setting.threads} instead"
                )
            else:
                saved.append(path)
    return Sweep(
        source=without_password(uri),
        frame_size=found.frame_size,
        entrants=entrants,
        rounds=outcome.rounds,
        seed=seed,
        at_least=at_least,
        recommended=_recommended(entrants, at_least),
        saved=tuple(saved),
        notes=tuple(notes),
        stopped=outcome.stopped,
    )


def _entered(settings: Sequence[Setting], threads: Sequence[int]) -> list[Setting]:
    """Each setting with each number of threads."""
    from edgeseg.engine import available_engines

    entered: list[Setting] = []
    for setting in settings:
        engine = setting.engine or next(iter(available_engines()), None)
        # Threads are of no meaning on a GPU.
        counts = [0] if engine == "tensorrt" else [setting.threads] if setting.threads else threads
        entered += [replace(setting, threads=count) for count in counts]
    entered = list(dict.fromkeys(entered))
    if len(entered) < 2:
        only = f"{entered[0]}" if entered else "nothing"
        raise RequestError(
            f"a sweep chooses among settings, and here there is {only} alone: one number of "
            "threads; add bundles of other sizes with --compare"
        )
    return entered


def _entrants(
    entered: Sequence[Setting],
    groups: Sequence[Hashable],
    found: Sequence[Contestant],
    outcome: Race,
) -> tuple[Entrant, ...]:
    fastest: dict[Hashable, int] = {}
    chosen: set[int] = set()
    for group in dict.fromkeys(groups):
        members = [i for i in range(len(entered)) if groups[i] == group and i not in outcome.out]
        best = min(members, key=lambda index: median(outcome.seconds(index)))
        fastest[group] = best
        ratios = {index: outcome.ratio(index, best) for index in members}
        level = [
            index
            for index in members
            if index == best
            or ratios[index].median >= _AS_FAST
            or (ratios[index].is_sure and not ratios[index].tells and ratios[index].median >= _OUT)
        ]
        chosen.add(min(level, key=lambda index: entered[index].threads))
    entrants = []
    for index, (setting, contestant) in enumerate(zip(entered, found, strict=True)):
        best = fastest[groups[index]]
        entrants.append(
            Entrant(
                setting=setting,
                description=contestant.description,
                network_size=contestant.network_size,
                fps=1 / median(outcome.seconds(index)),
                work_ms=median(b.work_ms for pair in outcome.blocks[index] for b in pair),
                ratio=None if index == best else outcome.ratio(index, best),
                out_after=outcome.out.get(index),
                chosen=index in chosen,
            )
        )
    return tuple(entrants)


def _recommended(entrants: Sequence[Entrant], at_least: float | None) -> Entrant:
    chosen = [each for each in entrants if each.chosen]
    fastest = max(chosen, key=lambda each: each.fps)
    if at_least is None:
        return fastest
    reaching = [each for each in chosen if each.fps >= at_least]
    if not reaching:
        return fastest
    return max(reaching, key=lambda each: (each.network_size[0] * each.network_size[1], each.fps))
