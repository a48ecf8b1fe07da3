"""``edgeseg eval --compare`` and ``--postprocess``: table, JSON, and one sentence for mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import edgeseg
from edgeseg.bundle import Bundle
from edgeseg.cli import main
from edgeseg.engine import cpu_engines
from edgeseg.errors import RequestError
from edgeseg.postprocess import Postprocessing
from edgeseg.result import SemanticResult
from tests.edgeseg.tiny_instances import SPEC, TinyInstances

Run = Callable[..., tuple[int, str, str]]

STREETS = ("--data", "synthetic:?frames=2&size=96x128")

pytestmark = pytest.mark.skipif(not cpu_engines(), reason="no engine for the CPU is here")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def figures(out: str) -> Any:
    return json.loads(out)


def test_a_step_and_a_model_beside_the_first(run: Run) -> None:
    command = ("eval", "streets-int8", *STREETS, "--compare", "refine, streets")
    code, out, _ = run(*command)
    assert code == 0
    head, first, refined, other = out.splitlines()[-4:]
    assert head.split() == [
        "mIoU",
        "boundary",
        "IoU",
        "ms",
        "a",
        "frame",
        *["more", "than", "the", "first"],
    ]
    assert [line.split()[0] for line in (first, refined, other)] == [
        "streets-int8",
        "refine",
        "streets",
    ]
    code, out, _ = run(*command, "--json", "-")
    found = figures(out)
    assert (code, found["frames"], len(found["candidates"])) == (0, 2, 3)
    plain, refined, _ = found["candidates"]
    assert refined["gain"]["miou"] == pytest.approx(refined["miou"] - plain["miou"])
    assert plain["extra_ms"] == {"p25": 0, "p50": 0, "p75": 0}
    assert refined["frame_ms"]["p25"] <= refined["frame_ms"]["p50"] <= refined["frame_ms"]["p75"]
    # The same figure as without a comparison.
    for candidate, more in ((plain, ()), (refined, ("--postprocess", "refine"))):
        alone = figures(run("eval", "streets-int8", *STREETS, *more, "--json", "-")[1])
        assert alone["miou"] == candidate["miou"]
    assert plain["miou"] != refined["miou"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--compare", "sharpen"), "rescore and refine, joined by +"),
        (("--compare", "refine,"), "'' came"),
        (("--compare", "rescore"), "rescore is for instances, and streets gives classes"),
        (("--compare", "refine", "--boundary"), "do not go with it"),
        (("--compare", "refine", "--postprocess", "refine"), "do not go with it"),
        (("--postprocess", "mask-nms"), "'mask-nms' came"),
        (("--postprocess", "rescore"), "rescore is for instances"),
        (("--panoptic", "streets", "--postprocess", "refine"), "--postprocess is for one model"),
    ],
)
def test_wrong_requests(run: Run, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run("eval", "streets", *STREETS, *arguments)
    assert (code, out) == (2, "")
    assert says in err and err.startswith("edgeseg: ") and len(err.splitlines()) == 1


def test_streams_with_a_step(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    source = "synthetic:?frames=2&size=96x128"
    command = ("run", "streets", "--source", source, "--save", folder, "--masks")
    assert run(*command, "--postprocess", "refine")[0] == 0
    written = sorted(folder.rglob("*.png"))
    with edgeseg.load("streets") as model, edgeseg.load("streets", postprocessing="refine") as more:
        assert str(more.postprocessing) == "refine"
        pairs = list(zip(list(model.stream(source)), list(more.stream(source)), strict=True))
        assert len(pairs) == 2
        for plain, refined in pairs:
            assert isinstance(plain, SemanticResult) and isinstance(refined, SemanticResult)
            assert (plain.class_map != refined.class_map).any()
            maps = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in written]
            assert any(
                found is not None and np.array_equal(found, refined.class_map) for found in maps
            )
            again = more(refined.frame)
            assert isinstance(again, SemanticResult)
            np.testing.assert_array_equal(again.class_map, refined.class_map)


def test_instances_with_their_steps(run: Run, tmp_path: Path) -> None:
    for package in ("onnx", "torch", "pycocotools"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    names = ("car", "pedestrian", "bicyclist")
    tiny = TinyInstances(replace(SPEC, classes=names))
    bundle = tiny.write(tmp_path / "tiny")
    steps = ("rescore", "refine", "rescore+refine")
    code, out, _ = run("eval", bundle, *STREETS, "--compare", ",".join(steps), "--json", "-")
    assert code == 0
    found = figures(out)["candidates"]
    assert [candidate["title"] for candidate in found] == [str(bundle), *steps]
    assert all({"box_ap", "mask_ap", "gain"} <= candidate.keys() for candidate in found)
    pixels = tiny.picture(3)
    with (
        edgeseg.load(bundle) as plain,
        edgeseg.load(bundle, postprocessing=Postprocessing(rescore=True)) as more,
    ):
        before, after = plain(pixels), more(pixels)
    assert isinstance(before, edgeseg.InstanceResult) and isinstance(after, edgeseg.InstanceResult)
    assert len(before) == len(after) > 0
    assert (np.sort(after.scores) < np.sort(before.scores)).all()


def test_load_refuses_before_it_opens_an_engine() -> None:
    with pytest.raises(RequestError, match="rescore is for instances"):
        edgeseg.load("streets", engine="none such", postprocessing="rescore")
    with pytest.raises(RequestError, match="joined by"):
        edgeseg.load("streets", postprocessing="no step")
    assert Bundle.open("streets").spec.task == "semantic"
