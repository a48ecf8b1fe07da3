"""The drawing that sinks share."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, SemanticResult
from edgeseg.sink.drawing import drawn
from edgeseg.spec import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="halves",
    architecture="none",
    task="semantic",
    height=48,
    width=64,
    classes=("left", "right"),
    colours=((255, 0, 0), (0, 0, 255)),
    ignore=255,
    preprocessing=Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr"),
)


def result() -> SemanticResult:
    frame = Frame.of(np.full((48, 64, 3), 90, np.uint8))
    outputs = Outputs(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 2)
    return SemanticResult.from_outputs(outputs, frame, Geometry.between(48, 64, SPEC), SPEC)


def test_it_is_the_drawing_of_each_look() -> None:
    one, other = result(), result()
    for opacity, legend in ((0.5, True), (0.5, False), (1.0, False), (0.5, True)):
        for given in (one, other):
            picture = drawn(given, opacity=opacity, legend=legend)
            np.testing.assert_array_equal(picture, given.draw(opacity=opacity, legend=legend))


def test_sinks_in_many_threads_draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, calls = result(), []
    draw = SemanticResult.draw

    def counted(self: SemanticResult, *, opacity: float = 0.5, legend: bool = True) -> Pixels:
        calls.append(opacity)
        return draw(self, opacity=opacity, legend=legend)

    monkeypatch.setattr(SemanticResult, "draw", counted)
    pictures: list[Pixels] = []
    threads = [
        threading.Thread(target=lambda: pictures.append(drawn(one, opacity=0.5, legend=True)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [0.5] and len(pictures) == 8
    assert all(picture is pictures[0] for picture in pictures)
    with pytest.raises(ValueError, match="read-only"):
        pictures[0][0, 0] = 0


def test_neither_result_nor_drawing_outlives_its_owner() -> None:
    one = result()
    kept = weakref.ref(one)
    picture = weakref.ref(drawn(one, opacity=0.5, legend=True))
    assert picture() is not None
    del one
    gc.collect()
    assert kept() is None and picture() is None


def test_a_result_without_a_hash_is_drawn_each_time() -> None:
    class Unhashable(SemanticResult):
        __hash__ = None  # type: ignore[assignment]

    given = result()
    one = Unhashable(given.frame, given.spec, given.geometry, given.outputs)
    first, second = (drawn(one, opacity=0.5, legend=True) for _ in range(2))
    assert first is not second
    np.testing.assert_array_equal(first, second)
