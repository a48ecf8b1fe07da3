"""Comparing in turns: what a machine that drifts cannot do to it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from edgeseg.errors import BundleError, RequestError, SourceError
from edgeseg.profile import Setting, compare
from edgeseg.profile.comparison import Comparison, Orders, Round, Spread, Standing, measure_round
from edgeseg.profile.contestant import Block
from edgeseg.profile.frames import KeptFrames, kept_frames

STREET = "synthetic:?size=48x64&frames=0"


class Drifting:
    """A machine whose speed changes with the time that its work takes."""

    def __init__(self, speed: Callable[[float], float], noise: float = 0.0) -> None:
        self.now = 0.0
        self._speed = speed
        self._noise = noise
        self._random = random.Random(5)

    def runner(self, work: float) -> Callable[[], Block]:
        """A setting whose frames are ``work`` seconds on this machine at full speed."""

        def measure() -> Block:
            seconds = 0.0
            for _ in range(10):
                took = work / self._speed(self.now) * (1 + self._random.gauss(0, self._noise))
                self.now += took
                seconds += took
            return Block(seconds / 10, 1e3 * seconds / 10)

        return measure


def turns(measures: Sequence[Callable[[], Block]], rounds: int, seed: int = 0) -> list[Round]:
    orders = Orders(seed)
    by_index = dict(enumerate(measures))
    return [measure_round(by_index, orders.next(range(len(measures)))) for _ in range(rounds)]


# Of what a machine does: it heats up, a neighbour comes, its clock goes up and down over rounds.
DRIFTS: dict[str, Callable[[float], float]] = {
    "heats up": lambda now: 1 / (1 + now / 8),
    "cools down": lambda now: 0.4 + now / 20,
    "falls off a cliff": lambda now: 1.0 if now < 3 else 0.35,
    "breathes": lambda now: 1 + 0.3 * math.sin(now / 6),
}


@pytest.mark.parametrize("speed", DRIFTS.values(), ids=DRIFTS)
@pytest.mark.parametrize("ratio", [1.73, 1.0, 0.8])
def test_a_machine_that_drifts_cannot_lie(speed: Callable[[float], float], ratio: float) -> None:
    machine = Drifting(speed, noise=0.004)
    found = turns([machine.runner(0.05), machine.runner(0.05 / ratio)], 10)
    spread = Spread.of([turn.ratio(1) for turn in found])
    assert spread.median == pytest.approx(ratio, rel=0.03)
    assert spread.low <= ratio * 1.01 and spread.high >= ratio * 0.99
    assert spread.tells == (ratio != 1.0)


def test_one_after_the_other_would_have_lied() -> None:
    """The same two settings on the same machine, each measured in one go."""
    machine = Drifting(DRIFTS["heats up"])
    first, second = (machine.runner(0.05) for _ in range(2))
    one = median(first().seconds_per_frame for _ in range(18))
    other = median(second().seconds_per_frame for _ in range(18))
    assert one / other < 0.5
    machine = Drifting(DRIFTS["heats up"])
    found = turns([machine.runner(0.05), machine.runner(0.05)], 9)
    assert median(turn.ratio(1) for turn in found) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_an_even_drift_takes_as_much_from_each(seed: int) -> None:
    clock = itertools.count()

    def measure() -> Block:
        # Each block takes as long, and is slower than the one before by the same.
        return Block(1 + next(clock) / 100, 1.0)

    for turn in turns([measure] * 4, 6, seed):
        for index in range(1, 4):
            assert turn.ratio(index) == pytest.approx(1, abs=1e-12)


def test_the_order_is_drawn_and_mirrored() -> None:
    seen: list[str] = []

    def runner(name: str) -> Callable[[], Block]:
        def measure() -> Block:
            seen.append(name)
            return Block(1.0, 1.0)

        return measure

    turns([runner(name) for name in "ABC"], 40, seed=1)
    orders = ["".join(seen[start : start + 6]) for start in range(0, 240, 6)]
    assert all(order == order[::-1] and sorted(order[:3]) == list("ABC") for order in orders)
    # Every other one is drawn, and the next one turns it around.
    assert [order[:3] for order in orders[1::2]] == [order[2::-1] for order in orders[::2]]
    assert len(set(orders)) == 6
    again = seen.copy()
    seen.clear()
    turns([runner(name) for name in "ABC"], 40, seed=1)
    assert seen == again


# --- the interval


def test_interval_of_few_rounds() -> None:
    assert Spread.of([1.2]) == Spread(1.2, 1.2, 1.2, 0.0)
    five = Spread.of([1.1, 1.3, 1.2, 1.5, 1.4])
    assert (five.median, five.low, five.high) == (1.3, 1.1, 1.5)
    assert five.confidence == 1 - Fraction(2, 32) and not five.is_sure and not five.tells
    six = Spread.of([1.1, 1.3, 1.2, 1.5, 1.4, 1.6])
    assert six.confidence == 1 - Fraction(2, 64) and six.is_sure and six.tells


def test_an_outlier_is_left_out_of_nine() -> None:
    spread = Spread.of([1.5] * 4 + [1.4] * 3 + [0.2, 40.0])
    assert (spread.low, spread.median, spread.high) == (1.4, 1.5, 1.5)
    assert spread.confidence == 1 - Fraction(2 * (1 + 9), 512)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    # Skewed, as times are; its median is 1.
    samples = np.exp(generator.normal(0, 0.3, (4000, 9)))
    held = sum(spread.low <= 1 <= spread.high for spread in map(Spread.of, samples.tolist()))
    assert held / 4000 == pytest.approx(Spread.of(samples[0].tolist()).confidence, abs=0.015)


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([1.7, 1.71, 1.72, 1.73, 1.74, 1.75, 1.78], "B is 1.73x (1.70–1.78) as fast as A"),
        ([0.5] * 6, "B is 0.50x (0.50–0.50) as fast as A"),
        (
            [0.97, 0.98, 1.0, 1.01, 1.02, 1.03],
            "B and A: no difference that these 6 rounds can tell, 1.00x (0.97–1.03)",
        ),
        ([1.9, 2.0], "B was 1.95x (1.90–2.00) as fast as A in 2 rounds, which are too few to tell"),
    ],
)
def test_verdicts(ratios: list[float], words: str) -> None:
    standing = Standing("B", "an engine", (4, 4), 9.0, 1.0, None, Spread.of(ratios))
    assert standing.verdict("A", len(ratios)).startswith(words)


# --- real models


def test_compare(bundle_folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    plain = Setting(str(bundle_folder), "openvino", 1)
    settings = [plain, Setting.parse("@onnxruntime", plain), Setting.parse(",head=graph", plain)]
    seen: list[tuple[int, int]] = []
    found = compare(
        settings,
        STREET,
        rounds=3,
        frames=3,
        warm_up=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [each.name for each in found.settings] == [str(setting) for setting in settings]
    assert "ONNX Runtime" in found.settings[1].description
    assert "head in the graph" in found.settings[2].description
    assert found.frame_size == (48, 64) and len(found.rounds) == 3
    for index, each in enumerate(found.settings):
        fps = [1 / turn.seconds_per_frame(index) for turn in found.rounds]
        assert each.fps == median(fps) and each.work_ms > 0
        if index:
            assert each.ratio == Spread.of([turn.ratio(index) for turn in found.rounds])
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(content["comparison"]) == 3 and len(content["comparison"][1]["ratios"]) == 3
    assert content["verdicts"] == list(found.verdicts()) and len(content["verdicts"]) == 2
    text, page = found.render(), found.report().to_html()
    for verdict in found.verdicts():
        assert verdict in text and "too few to tell" in verdict
    assert "Round by round" in page and page.count('class="trace') == 3


def test_ctrl_c_gives_the_rounds_so_far(bundle_folder: Path) -> None:
    settings = [Setting(str(bundle_folder), threads=threads) for threads in (1, 2)]

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    found = compare(settings, STREET, frames=3, warm_up=0, progress=stop)
    assert found.stopped and len(found.rounds) == 2
    assert "It was stopped after 2 rounds." in found.render()


def test_ctrl_c_before_the_first_round(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> Round:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeseg.profile.comparison.measure_round", stop)
    settings = [Setting(str(bundle_folder), threads=threads) for threads in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        compare(settings, STREET, frames=3, warm_up=0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tiny"], "two settings or more, and 1 came"),
        (["tiny", "tiny"], "tiny is there twice"),
    ],
)
def test_settings_that_cannot_be_compared(names: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        compare([Setting(name) for name in names], STREET)


def test_what_is_not_there(bundle_folder: Path, tmp_path: Path) -> None:
    here = Setting(str(bundle_folder))
    with pytest.raises(BundleError, match="there is no bundle nowhere"):
        compare([here, Setting("nowhere")], STREET)
    with pytest.raises(RequestError, match="the engines are tensorrt, openvino"):
        compare([here, Setting(str(bundle_folder), "caffe")], STREET)
    with pytest.raises(SourceError, match="does not exist"):
        compare([here, Setting("nowhere")], str(tmp_path / "none.mp4"))
    with pytest.raises(RequestError, match="one round or more"):
        compare([here, Setting("nowhere")], STREET, rounds=0)


def test_joules_where_power_is_known(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeseg.sensors import Reading, Sensors

    reading = Reading(None, None, None, None, None, 40.0, True, ("RAPL",))
    monkeypatch.setattr(Sensors, "read", lambda self: reading)
    settings = [Setting(str(bundle_folder), threads=threads) for threads in (1, 2)]
    found: Comparison = compare(settings, STREET, rounds=2, frames=3, warm_up=0)
    for index, each in enumerate(found.settings):
        blocks = [block for turn in found.rounds for block in turn.blocks[index]]
        joules = median(40 * block.seconds_per_frame for block in blocks)
        assert each.joules_per_frame == pytest.approx(joules, abs=1e-4)
    assert found.throttled is True and "slowed itself down" in found.render()


# --- frames in memory


def test_kept_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = kept_frames(STREET)
    assert len(pictures) == 16 and len(kept_frames("synthetic:?size=48x64&frames=3")) == 3
    monkeypatch.setattr("edgeseg.profile.frames._BYTES", 3 * 48 * 64 * 2)
    assert len(kept_frames(STREET)) == 2
    with KeptFrames(pictures[:2], 5) as source:
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(5))
    for frame in frames:
        assert frame.pixels is pictures[frame.index % 2]
    assert all(b.captured_ns >= a.captured_ns for a, b in itertools.pairwise(frames))


def test_a_source_without_frames(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        kept_frames(str(tmp_path))


# --- settings


BASE = Setting("streets", "openvino", 3, "graph")


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("streets", Setting("streets")),
        ("streets@onnxruntime", Setting("streets", "onnxruntime")),
        ("streets,threads=2", Setting("streets", threads=2)),
        ("streets@openvino,threads=1,head=graph", Setting("streets", "openvino", 1, "graph")),
        ("a b/c,head=compiled", Setting("a b/c", head="compiled")),
        ("streets,engine=openvino", Setting("streets", "openvino")),
        ("user@host/b@openvino", Setting("user@host/b", "openvino")),
    ],
)
def test_setting(text: str, setting: Setting) -> None:
    assert Setting.parse(text) == setting
    assert Setting.parse(str(setting)) == setting


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("@onnxruntime", Setting("streets", "onnxruntime", 3, "graph")),
        (",threads=1", Setting("streets", "openvino", 1, "graph")),
        ("other", Setting("other", "openvino", 3, "graph")),
        ("other,head=auto", Setting("other", "openvino", 3, "auto")),
    ],
)
def test_what_is_left_out_is_as_before(text: str, setting: Setting) -> None:
    assert Setting.parse(text, BASE) == setting


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no bundle"),
        ("@openvino", "names no bundle"),
        ("streets@", "names no engine after its @"),
        ("streets,threads=many", "'threads=many' is none of them"),
        ("streets,threads=-1", "is none of them"),
        ("streets,head=square", "is none of them"),
        ("streets,", "'' is none of them"),
        ("streets,2", "'2' is none of them"),
    ],
)
def test_what_is_no_setting(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Setting.parse(text)


def test_a_folder_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b,threads=2").mkdir()
    assert Setting.parse("a@b,threads=2") == Setting("a@b,threads=2")
