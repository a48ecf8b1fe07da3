"""Sweeping: who wins, who is out, and what is kept for whom."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgeseg
from edgeseg.bundle import Bundle
from edgeseg.engine import library_version, open_engine
from edgeseg.engine.plan import plan_folder
from edgeseg.engine.tuned import Machine, Tuned, find_tuned, save_tuned
from edgeseg.errors import EngineError, RequestError
from edgeseg.profile import Setting, sweep
from edgeseg.profile.contestant import Block
from edgeseg.profile.tuning import Entrant, _recommended, race, thread_counts

STREET = "synthetic:?size=48x64&frames=0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of a test goes into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def runners(*work: float, noise: float = 0.002) -> list[Callable[[], Block]]:
    """Settings of so many seconds per frame on a machine that gets slower and slower."""
    generator = random.Random(2)
    now = 0.0

    def runner(seconds: float) -> Callable[[], Block]:
        def measure() -> Block:
            nonlocal now
            took = seconds * (1 + now / 10) * (1 + generator.gauss(0, noise))
            now += took
            return Block(took, 1e3 * took)

        return measure

    return [runner(seconds) for seconds in work]


# --- the race


def test_the_slow_are_out_early_and_the_best_wins() -> None:
    # Measured one after the other, the first would have won: the machine slows down.
    found = race(runners(0.100, 0.080, 0.060, 0.061, 0.200), [0] * 5, rounds=9, seed=0)
    assert found.out == {0: 3, 1: 3, 4: 3}
    assert [len(blocks) for blocks in found.blocks] == [3, 3, 9, 9, 3]
    assert found.ratio(3, 2).median == pytest.approx(60 / 61, rel=0.01)
    assert found.ratio(0, 2).median == pytest.approx(0.6, rel=0.02)


def test_each_group_has_its_race() -> None:
    found = race(
        runners(0.01, 0.02, 0.5, 0.4), ["small", "small", "large", "large"], rounds=4, seed=1
    )
    assert found.out == {1: 3, 2: 3}


def test_one_good_round_keeps_it_in() -> None:
    clock = iter(range(1000))
    lucky = [0.2, 0.2, 0.05, 0.05] + [0.2] * 100

    def unsteady() -> Block:
        return Block(lucky[next(clock)], 1.0)

    found = race([*runners(0.1, noise=0), unsteady], [0, 0], rounds=5, seed=0)
    assert found.out == {}


def test_stopped() -> None:
    calls = 0

    def breaks() -> Block:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return Block(1.0, 1.0)

    found = race([breaks], [0], rounds=9, seed=0)
    assert found.stopped and found.rounds == 3 and len(found.blocks[0]) == 3
    calls = 6
    with pytest.raises(KeyboardInterrupt):
        race([breaks], [0], rounds=9, seed=0)


@pytest.mark.parametrize(
    ("cores", "counts"),
    [(1, (1,)), (2, (1, 2)), (4, (1, 2, 3, 4)), (6, (1, 2, 4, 6)), (12, (1, 2, 4, 8, 9, 12))],
)
def test_thread_counts(cores: int, counts: tuple[int, ...]) -> None:
    assert thread_counts(cores) == counts


# --- real models


def test_sweep_keeps_what_it_found(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sweep(
        [Setting(str(bundle_folder), "openvino")], STREET, threads=(1, 2), rounds=3, frames=3
    )
    assert [each.setting.threads for each in found.entrants] == [1, 2]
    (chosen,) = found.chosen
    assert found.recommended is chosen
    assert found.saved == (bundle_folder / "engines/tuned.json",)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [entry["chosen"] for entry in content["sweep"]].count(True) == 1
    for text in (found.render(), found.report().to_html()):
        assert "taken from now on" in text and "chosen" in text
    # The bundle is as it was: nothing of it names the file.
    kept = chosen.setting.threads
    with edgeseg.load(bundle_folder, engine="openvino") as model:
        assert f"{kept} threads (tuned)" in model.engine.description
    with edgeseg.load(bundle_folder, engine="openvino", threads=2) as model:
        assert "2 threads, head" in model.engine.description
    # Another machine, another version: as if nobody had looked.
    monkeypatch.setattr(Machine, "here", lambda: Machine("another", 4))
    with edgeseg.load(bundle_folder, engine="openvino") as model:
        assert "tuned" not in model.engine.description


def test_fewer_threads_where_it_makes_no_difference(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = {1: 0.100, 2: 0.0605, 3: 0.0600, 4: 0.0601}

    def measured(contestant: Any) -> Block:
        return Block(work[int(contestant.description.split(" threads")[0].split()[-1])], 1.0)

    monkeypatch.setattr("edgeseg.profile.contestant.Contestant.measure", measured)
    found = sweep(
        [Setting(str(bundle_folder), "onnxruntime")], STREET, threads=(1, 2, 3, 4), save=False
    )
    (chosen,) = found.chosen
    assert chosen.setting.threads == 2 and found.saved == ()
    assert [each.out_after for each in found.entrants] == [3, None, None, None]
    assert found.entrants[2].ratio is None


def test_ctrl_c_keeps_nothing(bundle_folder: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(
            [Setting(str(bundle_folder), "openvino")], STREET, threads=(1, 2), frames=3,
            progress=stop,
        )  # fmt: skip
    assert not (bundle_folder / "engines").exists()


def test_nothing_to_choose_from(bundle_folder: Path) -> None:
    with pytest.raises(RequestError, match="alone: one number of threads"):
        sweep([Setting(str(bundle_folder), "openvino", threads=1)], STREET)
    with pytest.raises(RequestError, match="3 rounds or more, and 2 came"):
        sweep([Setting(str(bundle_folder), "openvino")], STREET, threads=(1, 2), rounds=2)


def test_a_sweep_that_cannot_be_kept_says_what_to_give(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> Path:
        raise EngineError("the disk is full")

    monkeypatch.setattr("edgeseg.profile.tuning.save_tuned", full)
    found = sweep(
        [Setting(str(bundle_folder), "openvino")], STREET, threads=(1, 2), rounds=3, frames=3
    )
    (note,) = found.notes
    assert "the disk is full" in note and f"--threads {found.chosen[0].setting.threads}" in note


def entrant(pixels: int, fps: float) -> Entrant:
    return Entrant(Setting(f"b{pixels}"), "", (1, pixels), fps, 1.0, None, None, True)


@pytest.mark.parametrize(
    ("at_least", "best"), [(None, "b100"), (20, "b300"), (30, "b200"), (70, "b100"), (500, "b100")]
)
def test_the_largest_network_that_is_fast_enough(at_least: float | None, best: str) -> None:
    entrants = [entrant(200, 40.0), entrant(300, 22.0), entrant(100, 90.0)]
    assert _recommended(entrants, at_least).setting.bundle == best


# --- what is kept


def test_tuned(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    assert find_tuned(bundle, "openvino", "1.0") is None
    path = save_tuned(bundle, "openvino", "1.0", threads=3, fps=41.256)
    assert save_tuned(bundle, "onnxruntime", "1.0", threads=2, fps=9.0) == path
    found = find_tuned(bundle, "openvino", "1.0")
    assert found is not None and (found.threads, found.fps) == (3, 41.26)
    assert found.machine == Machine.here()
    save_tuned(bundle, "openvino", "1.0", threads=1, fps=50.0)
    found = find_tuned(bundle, "openvino", "1.0")
    assert found is not None and found.threads == 1
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert find_tuned(bundle, "openvino", "1.1") is None
    assert find_tuned(bundle, "tensorrt", "1.0") is None


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"cores": 999}])
def test_of_another_machine(bundle_folder: Path, change: dict[str, Any]) -> None:
    bundle = Bundle.open(bundle_folder)
    path = save_tuned(bundle, "openvino", "1.0", threads=3, fps=1.0)
    content = json.loads(path.read_text())
    content["entries"][0]["machine"].update(change)
    path.write_text(json.dumps(content))
    assert find_tuned(bundle, "openvino", "1.0") is None
    # And it stays for that one.
    save_tuned(bundle, "openvino", "1.0", threads=2, fps=1.0)
    assert len(json.loads(path.read_text())["entries"]) == 2


def test_of_another_graph(bundle_folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    save_tuned(bundle, "openvino", "1.0", threads=3, fps=1.0)
    other = replace(bundle, model=replace(bundle.model, content=bundle.model.content + b" "))
    assert find_tuned(other, "openvino", "1.0") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"format": 2, "entries": []}',
        '{"format": 1, "entries": 3}',
        '{"format": 1, "entries": [1, null, {}, {"threads": 0}, {"threads": "many"}]}',
        '{"format": 1, "entries": [{"threads": 1e400, "machine": {}}]}',
        "[" * 100_000,
        "\xff\x00",
    ],
)
def test_a_damaged_file_is_none(bundle_folder: Path, text: str) -> None:
    bundle = Bundle.open(bundle_folder)
    path = plan_folder(bundle) / "tuned.json"
    path.write_text(text)
    assert find_tuned(bundle, "openvino", "1.0") is None
    save_tuned(bundle, "openvino", "1.0", threads=3, fps=1.0)
    assert find_tuned(bundle, "openvino", "1.0") is not None


def test_threads_out_of_reason_are_not_taken(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    path = save_tuned(bundle, "openvino", library_version("openvino"), threads=3, fps=1.0)
    content = json.loads(path.read_text())
    content["entries"][0]["threads"] = 100_000
    path.write_text(json.dumps(content))
    engine = open_engine(bundle, "openvino", check=False)
    assert "tuned" not in engine.description
    engine.close()


def test_a_bundle_that_ships_is_not_written_to(own_cache: Path) -> None:
    bundle = Bundle.open("streets")
    path = save_tuned(bundle, "openvino", "1.0", threads=2, fps=1.0)
    assert own_cache in path.parents
    assert bundle.folder is not None and not (bundle.folder / "engines").exists()
    found = find_tuned(bundle, "openvino", "1.0")
    assert isinstance(found, Tuned) and found.threads == 2


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor : 0\nmodel name\t: Intel(R) N100\n\nmodel name\t: Intel(R) N100",
            "Intel(R) N100",
        ),
        (
            "processor\t: 0\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0",
            "Raspberry Pi 5 Model B Rev 1.0",
        ),
        (
            "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nCPU part\t: 0xd05",
            "CPU implementer 0x41, CPU part 0xd05/0xd0b",
        ),
    ],
)
def test_the_name_of_a_processor(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert Machine.here(tmp_path / "cpuinfo").cpu == name


def test_a_machine_without_cpuinfo(tmp_path: Path) -> None:
    assert Machine.here(tmp_path / "none").cpu != ""
