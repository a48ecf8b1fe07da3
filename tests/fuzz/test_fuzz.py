"""Mutated inputs: 200 of each kind always, 20 000 with `make test-all`.

``python -m tests.fuzz TARGET --inputs N --seed N`` runs more of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("onnx", reason="the models that are mutated are made with onnx")

from edgeseg.errors import BundleError
from tests.fuzz.harness import LIMIT_S, MEMORY, Target, run
from tests.fuzz.mutate import mutated_bytes, mutated_json, mutated_protobuf, mutated_text
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


def fuzzed(tmp_path: Path, *targets: str, inputs: int, seed: int = 1) -> dict[str, dict[str, Any]]:
    """What `python -m tests.fuzz` says of each target, in a process of its own."""
    crashes = ROOT / "build" / "fuzz"
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *targets, f"--inputs={inputs}", f"--seed={seed}",
         f"--crashes={crashes}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )  # fmt: skip
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {str(outcome["target"]): outcome for outcome in outcomes}
    # A crash of the interpreter, or a hang, leaves the rest of the list out.
    assert list(found) == list(targets), done.stderr[-5000:]
    return found


def check(outcome: dict[str, Any], inputs: int) -> None:
    assert not outcome["failures"], "\n".join(outcome["failures"])
    assert outcome["inputs"] == inputs
    assert outcome["taken"] + outcome["refused"] == inputs
    # Inputs that are all refused, or all taken, would test nothing.
    assert outcome["taken"] > 0
    assert outcome["worst_s"] <= LIMIT_S and outcome["grown_mb"] <= MEMORY / 1e6


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return fuzzed(tmp_path_factory.mktemp("fuzz"), *TARGETS, inputs=200)


@pytest.mark.parametrize("name", TARGETS)
def test_some_inputs(quick: dict[str, dict[str, Any]], name: str) -> None:
    check(quick[name], 200)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs(tmp_path: Path, name: str) -> None:
    (outcome,) = fuzzed(tmp_path, name, inputs=20_000).values()
    check(outcome, 20_000)


# --- the fuzzer itself


def test_inputs_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("spec", "uri", "recipe"):
        targets = [TARGETS[name](tmp_path / str(index)) for index in range(2)]
        made = [[target.make(Random(f"{n}")) for n in range(50)] for target in targets]
        assert made[0] == made[1]
        assert len(set(made[0])) > 40


@pytest.mark.parametrize("seed", range(3))
def test_mutations_are_nearly_right(seed: int) -> None:
    """Some inputs still parse, and those that do differ from the one they come from."""
    import onnx

    rng = Random(seed)
    corpus = [b'{"a": [1, 2.5, "x", {"b": null}], "c": true}']
    parsed = 0
    for _ in range(300):
        try:
            parsed += json.loads(mutated_json(rng, corpus)) != json.loads(corpus[0])
        except (ValueError, RecursionError):
            continue
    assert 30 < parsed < 300
    node = onnx.helper.make_node("Op", ["a", "b"], ["c"], "n", axis=1, ints=[1, 2], text="t")
    content = node.SerializeToString()
    parsed = 0
    for _ in range(300):
        data = mutated_protobuf(rng, [content])
        try:
            parsed += onnx.NodeProto.FromString(data) != node
        except Exception:
            # protobuf's own DecodeError.
            continue
    assert 30 < parsed < 300
    assert len({mutated_bytes(rng, [content]) for _ in range(100)}) > 80
    assert len({mutated_text(rng, ["rtsp://host/x?a=1"], ["&"]) for _ in range(100)}) > 80


class Broken(Target):
    """A reader with every mistake there is."""

    name = "broken"

    def __init__(self, mistake: str) -> None:
        self._mistake = mistake

    def make(self, rng: Random) -> bytes:
        return rng.randbytes(4)

    def read(self, data: bytes) -> None:
        if data[0] < 128:
            raise BundleError("refused")
        if data[0] > 250:
            if self._mistake == "recursion":
                self.read(data)
            if self._mistake == "memory":
                bytearray(MEMORY + (1 << 28))
            raise KeyError(data[0])


@pytest.mark.parametrize("mistake", ["key", "recursion", "memory"])
def test_mistakes_are_found_and_kept(tmp_path: Path, mistake: str) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        outcome = run(Broken(mistake), inputs=400, seed=1, crashes=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    wanted = {"key": "KeyError", "recursion": "RecursionError", "memory": "MemoryError"}[mistake]
    assert outcome.failures and all(wanted in text for text in outcome.failures)
    assert outcome.taken and outcome.refused
    assert outcome.inputs == outcome.taken + outcome.refused + len(outcome.failures)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == len(outcome.failures)
    for text in outcome.failures:
        assert any(f"-m tests.fuzz broken --file {path}" in text for path in kept)
    assert kept[0].read_bytes()[0] > 250
