"""What a user writes: load, call, stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

import edgeseg
from edgeseg.bundle import Bundle
from edgeseg.engine import available_engines
from edgeseg.errors import BundleError, FrameError, RequestError, SourceError
from edgeseg.frame import Frame
from edgeseg.source import Source, open_source

if TYPE_CHECKING:
    from tests.conftest import Tiny

BLUE, GREEN, RED = 0, 1, 2


@pytest.fixture
def model(bundle_folder: Path) -> Iterator[edgeseg.Model]:
    with edgeseg.load(bundle_folder) as model:
        yield model


def flag(height: int = 60, width: int = 90) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Three upright stripes: blue, green, red."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        pixels[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 200
    return pixels


def test_public_names() -> None:
    assert dir(edgeseg) == sorted(edgeseg.__all__)
    for name in edgeseg.__all__:
        assert getattr(edgeseg, name) is not None
    with pytest.raises(AttributeError, match="module 'edgeseg' has no attribute 'segment'"):
        _ = edgeseg.segment


def test_frame_to_classes(model: edgeseg.Model, tiny: Tiny) -> None:
    assert model.spec == tiny.spec and isinstance(model.bundle, Bundle)
    assert model.engine.name == available_engines()[0]
    result = model(flag())
    assert result.class_map.shape == (60, 90)
    assert [int(value) for value in result.class_map[30, [15, 45, 75]]] == [BLUE, GREEN, RED]
    assert set(result.shares()) == {"blue", "green", "red"}
    assert result.confidence is None
    again = model(Frame.of(flag(), 12))
    assert again.index == 12
    np.testing.assert_array_equal(again.class_map, result.class_map)


def test_confidence(sure_tiny: Tiny, tmp_path: Path) -> None:
    with edgeseg.load(sure_tiny.write(tmp_path / "sure")) as model:
        result = model(flag(64, 96))
    assert result.confidence is not None and result.confidence.shape == (64, 96)
    assert result.confidence[30, 16] > result.confidence[30, 32]


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (flag()[..., 0], "a grey one .*GRAY2BGR"),
        (np.dstack([flag(), flag()[..., 0]]), "four channels.*BGRA2BGR"),
        (flag().astype(np.float32), "float32 came"),
        (flag()[:0], "an empty one"),
        (None, "NoneType came"),
        ("frame.png", "str came"),
    ],
)
def test_what_is_no_frame(model: edgeseg.Model, frame: Any, says: str) -> None:
    with pytest.raises(FrameError, match=says):
        model(frame)
    # The model is as good as before.
    assert model(flag()).class_map[30, 75] == RED


def test_frames_of_any_memory(model: edgeseg.Model) -> None:
    pixels = flag(32, 48)
    pixels.flags.writeable = False
    assert model(pixels).class_map[16, 40] == RED
    assert model(flag(32, 48)[:, ::-1]).class_map[16, 40] == BLUE
    assert model(flag(64, 96)[::2, ::2, ::-1]).class_map[16, 40] == BLUE


def test_results_stay_what_they_were(model: edgeseg.Model, tiny: Tiny) -> None:
    results = [model(tiny.picture(seed)) for seed in range(4)]
    for seed, result in enumerate(results):
        np.testing.assert_array_equal(result.class_map, tiny.class_map(tiny.picture(seed)))


def test_stream(model: edgeseg.Model, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, size in enumerate([(60, 90), (32, 48), (45, 200), (60, 90)]):
        cv2.imwrite(str(folder / f"{index}.png"), flag(*size))
    for source in (folder, str(folder), open_source(str(folder))):
        results = list(model.stream(source))
        assert [result.index for result in results] == [0, 1, 2, 3]
        assert [result.class_map.shape for result in results] == [
            (60, 90),
            (32, 48),
            (45, 200),
            (60, 90),
        ]
        for result in results:
            np.testing.assert_array_equal(result.class_map, model(result.frame.pixels).class_map)
    assert [result.index for result in model.stream(folder, frames=2)] == [0, 1]


def test_stream_closes_its_source_however_the_loop_ends(model: edgeseg.Model) -> None:
    def opened() -> Source:
        return open_source("synthetic:?size=32x48&frames=0")

    source = opened()
    stream = model.stream(source)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert list(source) == []
    source = opened()
    with pytest.raises(ZeroDivisionError):
        for _ in model.stream(source):
            raise ZeroDivisionError
    # The generator is given up with the loop, and that closes the source.
    assert list(source) == []


def test_stream_is_refused_at_once(model: edgeseg.Model, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        model.stream(tmp_path / "none.mp4")
    with pytest.raises(RequestError, match="at least 1, and 0 came"):
        model.stream("synthetic:?size=32x48", frames=0)


def test_no_camera(model: edgeseg.Model) -> None:
    with pytest.raises(SourceError, match=r"camera 77 .*`edgeseg doctor`"):
        model.stream(77)


def test_two_models_side_by_side(bundle_folder: Path, tiny: Tiny) -> None:
    engines = available_engines()
    models = [edgeseg.load(bundle_folder, engine=name, threads=1) for name in engines * 2]
    for seed in range(3):
        for model in models:
            np.testing.assert_array_equal(
                model(tiny.picture(seed)).class_map, tiny.class_map(tiny.picture(seed))
            )
    for model in models:
        model.close()
        model.close()


def test_load_refuses() -> None:
    with pytest.raises(BundleError, match="there is no bundle nowhere"):
        edgeseg.load("nowhere")
    with pytest.raises(RequestError, match="'abacus' came"):
        edgeseg.load("streets", engine="abacus")


def test_shipped_model_finds_the_road() -> None:
    street = open_source("synthetic:?seed=400&frames=1")
    with edgeseg.load() as model:
        (result,) = model.stream(street)
    assert model.spec.name == "streets"
    assert result.class_map.shape == (360, 480)
    # The road lies before the car.
    assert result.mask("road")[300:, 160:320].mean() > 0.5
    assert result.shares()["road"] > 0.1
