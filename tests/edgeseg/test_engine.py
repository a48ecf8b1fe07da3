"""Engines: one answer, whichever library and head; and what is said when there is none."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.engine import ENGINES, Engine, available_engines, open_engine
from edgeseg.errors import EngineError, FrameError, KernelError, RequestError
from edgeseg.golden import Golden

if TYPE_CHECKING:
    from tests.conftest import Tiny

# Those for a GPU have tests of their own.
NAMES = [entry.name for entry in ENGINES if not entry.needs_gpu]
HEADS = [pytest.param(True, id="compiled"), pytest.param(False, id="graph")]
SEEDS = range(4)


def needs(name: str, compiled_head: bool = False) -> None:
    if name not in available_engines():
        pytest.skip(f"{name} is not installed")
    if compiled_head and not kernels.available():
        pytest.skip("the compiled kernels are not here")


@contextmanager
def opened(tiny: Tiny, folder: Path, name: str | None, **options: Any) -> Iterator[Engine]:
    path = folder / "model.onnx"
    path.write_bytes(tiny.content())
    engine = open_engine(Bundle.open(path), name, **options)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return str(request.param)


@pytest.mark.parametrize("compiled_head", HEADS)
@pytest.mark.parametrize("align_corners", [False, True], ids=["half-pixel", "align-corners"])
def test_class_map_and_confidence(
    sure_tiny: Tiny, tmp_path: Path, name: str, compiled_head: bool, align_corners: bool
) -> None:
    needs(name, compiled_head)
    network = replace(sure_tiny, align_corners=align_corners)
    with opened(network, tmp_path, name, compiled_head=compiled_head) as engine:
        for seed in SEEDS:
            image = network.picture(seed)
            outputs = engine.run(image)
            assert outputs.class_map.dtype == np.uint8 and outputs.class_map.shape == (32, 48)
            np.testing.assert_array_equal(outputs.class_map, network.class_map(image))
            assert outputs.confidence is not None and outputs.confidence.dtype == np.uint8
            difference = outputs.confidence.astype(int) - network.confidence(image)
            assert np.abs(difference).max() <= 1
            assert outputs.network_ns > 0 and (outputs.head_ns > 0) == compiled_head


@pytest.mark.parametrize("compiled_head", HEADS)
def test_without_confidence(tiny: Tiny, tmp_path: Path, name: str, compiled_head: bool) -> None:
    needs(name, compiled_head)
    with opened(tiny, tmp_path, name, compiled_head=compiled_head) as engine:
        for seed in SEEDS:
            outputs = engine.run(tiny.picture(seed))
            assert outputs.confidence is None
            np.testing.assert_array_equal(outputs.class_map, tiny.class_map(tiny.picture(seed)))


@pytest.mark.parametrize("compiled_head", HEADS)
def test_outputs_belong_to_the_caller(
    sure_tiny: Tiny, tmp_path: Path, name: str, compiled_head: bool
) -> None:
    needs(name, compiled_head)
    with opened(sure_tiny, tmp_path, name, compiled_head=compiled_head) as engine:
        image = sure_tiny.picture(0)
        first = engine.run(image)
        assert first.confidence is not None
        kept = first.class_map.copy(), first.confidence.copy()
        others = [engine.run(sure_tiny.picture(seed)) for seed in (1, 2, 3)]
        assert any((other.class_map != kept[0]).any() for other in others)
        np.testing.assert_array_equal(first.class_map, kept[0])
        np.testing.assert_array_equal(first.confidence, kept[1])
        # Nor does the engine read them again, or keep the frame.
        first.class_map[:] = 77
        again = engine.run(image)
        np.testing.assert_array_equal(again.class_map, kept[0])
    np.testing.assert_array_equal(again.class_map, kept[0])


def test_frames_of_any_memory(tiny: Tiny, tmp_path: Path, name: str) -> None:
    image = tiny.picture(1)
    read_only = image.copy()
    read_only.flags.writeable = False
    with opened(tiny, tmp_path, name) as engine:
        for view in (read_only, np.asfortranarray(image), image[::-1, ::-1][::-1, ::-1]):
            np.testing.assert_array_equal(engine.run(view).class_map, tiny.class_map(image))
        swapped = image[..., ::-1]
        np.testing.assert_array_equal(engine.run(swapped).class_map, tiny.class_map(swapped))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 47, 3), np.uint8),
        np.zeros((48, 32, 3), np.uint8),
        np.zeros((32, 48), np.uint8),
        np.zeros((32, 48, 4), np.uint8),
        np.zeros((1, 32, 48, 3), np.uint8),
        np.zeros((32, 48, 3), np.float32),
    ],
)
def test_wrong_input(tiny: Tiny, tmp_path: Path, name: str, image: Any) -> None:
    with opened(tiny, tmp_path, name) as engine:
        came = re.escape(f"{image.shape} {image.dtype} came")
        with pytest.raises(FrameError, match=rf"tiny takes \(32, 48, 3\) uint8, and {came}"):
            engine.run(image)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(tiny: Tiny, tmp_path: Path, name: str, threads: int) -> None:
    with opened(tiny, tmp_path, name, threads=threads) as engine:
        assert f"{threads} threads" in engine.description
        np.testing.assert_array_equal(
            engine.run(tiny.picture(0)).class_map, tiny.class_map(tiny.picture(0))
        )


def test_description(tiny: Tiny, tmp_path: Path, name: str) -> None:
    with opened(tiny, tmp_path, name, compiled_head=False) as engine:
        assert engine.name == name and engine.spec == tiny.spec
        assert re.fullmatch(
            r"(OpenVINO|ONNX Runtime) \d[\d.]+, CPU, \d+ threads, head in the graph",
            engine.description,
        )
    if kernels.available():
        with opened(tiny, tmp_path, name) as engine:
            assert engine.description.endswith("head compiled")


def test_close_twice(tiny: Tiny, tmp_path: Path, name: str) -> None:
    with opened(tiny, tmp_path, name) as engine:
        engine.close()


def test_other_masks_than_at_export(tiny: Tiny, tmp_path: Path, name: str) -> None:
    wrong = replace(tiny, golden=Golden.of(0, np.full((32, 48), 9, np.uint8)))
    with (
        pytest.raises(EngineError, match=r"gives other masks .*: 0\.0% .* 97% is promised"),
        opened(wrong, tmp_path, name),
    ):
        pytest.fail("must not open")
    with opened(wrong, tmp_path, name, check=False) as engine:
        assert engine.run(tiny.picture(0)).class_map.shape == (32, 48)


def test_swapped_channels_are_noticed(tiny: Tiny, tmp_path: Path, name: str) -> None:
    # The mistake that the golden pair is there for: a graph that reads RGB.
    from onnx import numpy_helper

    model = tiny.model()
    kernel = numpy_helper.to_array(model.graph.initializer[0])[:, ::-1]
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ascontiguousarray(kernel), "kernel")
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="gives other masks"):
        open_engine(Bundle.open(path), name)


def test_graph_that_the_library_cannot_read(tiny: Tiny, tmp_path: Path, name: str) -> None:
    model = tiny.model()
    model.graph.node[2].op_type = "NoSuchOperator"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    for compiled_head in (True, False):
        if compiled_head and not kernels.available():
            continue
        with pytest.raises(EngineError, match=r"cannot open .*; try --engine") as raised:
            open_engine(Bundle.open(path), name, compiled_head=compiled_head)
        assert "\n" not in str(raised.value)


# --- which engine


def test_unknown_engine(bundle_folder: Path) -> None:
    with pytest.raises(
        RequestError, match=r"^the engines are tensorrt, openvino, onnxruntime, and 'tflite' came"
    ):
        open_engine(Bundle.open(bundle_folder), "tflite")


def without(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    find_spec = importlib.util.find_spec

    def found(library: str, package: str | None = None) -> Any:
        return None if library in libraries else find_spec(library, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.mark.parametrize("missing", [entry.name for entry in ENGINES])
def test_engine_that_is_not_installed(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    without(monkeypatch, missing)
    assert missing not in available_engines()
    with pytest.raises(EngineError, match=f"^the engine {missing} is not installed; `pip install"):
        open_engine(Bundle.open(bundle_folder), missing)


def test_best_engine_that_is_installed(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        needs(name)
    bundle = Bundle.open(bundle_folder)
    assert open_engine(bundle).name == "openvino"
    without(monkeypatch, "openvino")
    assert open_engine(bundle).name == "onnxruntime"
    without(monkeypatch, "openvino", "onnxruntime")
    assert available_engines() == ()
    with pytest.raises(EngineError, match=r"^no inference engine is installed; `pip install openv"):
        open_engine(bundle)


def test_library_that_cannot_be_loaded(
    bundle_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"edgeseg.engine.{name}", raising=False)
    import_module = importlib.import_module

    def broken(module: str, package: str | None = None) -> Any:
        if module.startswith("edgeseg.engine."):
            raise ImportError("libtbb.so.12: cannot open shared object file")
        return import_module(module, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EngineError, match=rf"{name} is installed and cannot be loaded \(libtbb"):
        open_engine(Bundle.open(bundle_folder), name)


# --- which head


def no_kernels() -> None:
    raise KernelError("The compiled CPU kernels are not here")


def test_head_in_the_graph_where_there_is_no_kernel(
    tiny: Tiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kernels, kernels.library):
        monkeypatch.setattr(module, "load", no_kernels)
    with opened(tiny, tmp_path, name) as engine:
        assert engine.description.endswith("head in the graph")
        np.testing.assert_array_equal(
            engine.run(tiny.picture(0)).class_map, tiny.class_map(tiny.picture(0))
        )
    with pytest.raises(KernelError), opened(tiny, tmp_path, name, compiled_head=True):
        pytest.fail("must not open")


def test_shipped_model_is_the_same_on_all() -> None:
    bundle = Bundle.open("streets")
    image = np.random.default_rng(0).integers(
        0, 256, (bundle.spec.height, bundle.spec.width, 3), dtype=np.uint8
    )
    maps = []
    for engine_name in available_engines():
        engine = open_engine(bundle, engine_name)
        maps.append(engine.run(image).class_map)
        engine.close()
    assert all((found != maps[0]).mean() < 1e-3 for found in maps)


_SIGNALLED = """
import signal, subprocess, threading
from edgeseg.bundle import Bundle
from edgeseg.engine import open_engine

signal.signal(signal.SIGCHLD, lambda *_: None)
engines = [open_engine(Bundle.open("streets"), "openvino", threads=1, check=False)]

def end():
    engines.pop().close()

thread = threading.Thread(target=end)
thread.start()
thread.join()
subprocess.run(["true"], check=True)
print("alive")
"""


def test_a_signal_after_an_engine_went_in_another_thread() -> None:
    """OpenVINO's plugin lends its thread a stack for signals; see ``shared_core``."""
    pytest.importorskip("openvino")
    found = subprocess.run(
        [sys.executable, "-c", _SIGNALLED], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout.strip()) == (0, "alive"), found.stderr
