"""The GPU benchmark, as far as a CPU can tell: its cases on an emulation of CUDA, its figures.

How fast anything is, it says itself.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeseg import kernels

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

torch = pytest.importorskip("torch", reason="the GPU benchmark runs on torch")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench_gpu_kernels.py, which is in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu_kernels

    return bench_gpu_kernels


@pytest.fixture
def cases(bench: ModuleType) -> ModuleType:
    """gpu_cases.py."""
    return sys.modules["gpu_cases"]


@pytest.fixture
def emulated(emulated_cuda: ctypes.CDLL, cases: ModuleType) -> Any:
    if not kernels.available():
        pytest.skip("the CPU kernels are not here")
    return cases.Device(emulated_cuda, torch.device("cpu"))


class FakeTimer:
    """Runs the ends of a series; one takes 2 us per call, and 1 us more for each one before it."""

    cache_bytes = 1 << 10
    free_bytes = 1 << 30

    def __init__(self) -> None:
        self.series_made = 0

    def series(self, call: Callable[[int], object], count: int) -> Callable[[], float]:
        for index in {0, count - 1}:
            call(index)
        took = 2.0 + self.series_made
        self.series_made += 1
        return lambda: took


def test_quick_cases_give_what_the_cpu_library_gives(emulated: Any, cases: ModuleType) -> None:
    chosen = cases.quick_cases()
    assert {case.kernel for case in chosen} == {case.kernel for case in cases.all_cases()}
    for case in chosen:
        prepared = case.prepare(emulated, 2)
        prepared.check()
        prepared.launch(1)
        if prepared.make_reference is not None:
            reference = prepared.make_reference()
            reference.check()
            reference.call(1)


@pytest.mark.parametrize("status", [0, 35])
def test_a_kernel_that_does_nothing_is_found_out(cases: ModuleType, status: int) -> None:
    names = {case.kernel for case in cases.quick_cases()}
    idle = SimpleNamespace(**{f"edgeseg_cuda_{name}": lambda *_: status for name in names})
    device = cases.Device(idle, torch.device("cpu"))
    for case in cases.quick_cases():
        with pytest.raises(cases.Mismatch, match="35" if status else "differ"):
            case.prepare(device, 1).check()


def test_a_reference_of_something_else_is_found_out(emulated: Any, cases: ModuleType) -> None:
    for case in cases.quick_cases():
        if case.reference is None or case.kernel == "pyramid_roi_align":
            continue
        prepared = case.prepare(emulated, 1)
        # Without `check`, the kernel's result is still poison.
        with pytest.raises(cases.Mismatch, match="reference differs"):
            prepared.make_reference().check()


def test_roi_align_is_compared_level_by_level(
    emulated: Any, cases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def roi_align(
        level: Any, rois: Any, size: tuple[int, int], scale: float, ratio: int, aligned: bool
    ) -> Any:
        assert (rois[:, 0] == 0).all()
        assert level.dtype == rois.dtype
        seen.append(scale)
        pooled = kernels.pyramid_roi_align(
            [level.float().numpy()],
            np.ascontiguousarray(rois[:, 1:].float().numpy()),
            output_size=size,
            scales=[scale],
            sampling_ratio=ratio,
            aligned=aligned,
        )
        return torch.from_numpy(pooled).to(level.dtype)

    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.ops", SimpleNamespace(roi_align=roi_align))
    for dtype in (torch.float32, torch.float16):
        case = cases.pyramid_roi_align(40, 3, dtype, channels=2, image=(640, 800))
        assert "torchvision" in case.reference
        prepared = case.prepare(emulated, 1)
        prepared.check()
        prepared.make_reference().check()
    assert set(seen) == {1 / 4, 1 / 8, 1 / 16, 1 / 32}


def test_without_torchvision_there_is_no_reference(
    cases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    case = cases.pyramid_roi_align(4, 3, torch.float32, of_reference_wanted=1.5)
    assert case.reference is None
    assert case.of_reference_wanted is None


def test_bytes_are_each_input_once_and_each_output_once(cases: ModuleType) -> None:
    half = torch.float16
    bgr, _, nv12, yuyv = cases.FORMATS
    for case, read, written in [
        (
            cases.upsample_argmax((128, 256), (1024, 2048), torch.float32),
            19 * 128 * 256 * 4,
            1024 * 2048,
        ),
        (
            cases.upsample_argmax((4, 8), (32, 64), half, channels_last=True, with_confidence=True),
            24 * 4 * 8 * 2,
            2 * 32 * 64,
        ),
        (cases.fit_frame((1080, 1920), (512, 1024), bgr), 1080 * 1920 * 3, 512 * 1024 * 3),
        (cases.fit_frame((1080, 1920), (512, 1024), nv12), 1620 * 1920, 512 * 1024 * 3),
        (cases.fit_frame((1080, 1920), (512, 1024), yuyv), 1080 * 3840, 512 * 1024 * 3),
        (cases.draw_overlay((10, 20), (5, 6)), 600 + 30 + 57, 600),
        (
            cases.mask_assembly(50, half),
            32 * 138 * 138 * 2 + 50 * (64 + 16),
            50 * 138 * 138,
        ),
        (
            cases.mask_bits(100, torch.float32, frame=(720, 1281)),
            32 * 138 * 138 * 4 + 100 * (128 + 16),
            100 * 720 * 161,
        ),
        (
            cases.pyramid_roi_align(10, 7, half, channels=3, image=(64, 100)),
            3 * 2 * (16 * 25 + 8 * 13 + 4 * 7 + 2 * 4),
            10 * 3 * 49 * 2,
        ),
    ]:
        assert (case.bytes_in, case.bytes_out) == (read, written), case.title


def test_every_promise_has_its_case(cases: ModuleType) -> None:
    chosen = cases.all_cases()
    of_copy = {(case.kernel, case.output) for case in chosen if case.of_copy_wanted == 0.8}
    assert of_copy == {
        (kernel, "1024x2048") for kernel in ("upsample_argmax", "fit_frame", "draw_overlay")
    }
    bits = [case for case in chosen if case.of_reference_wanted == 10.0]
    assert bits
    assert all(case.output == "100x720x160" for case in bits)
    assert len({case.title for case in chosen}) == len(chosen)


@pytest.mark.parametrize(
    ("cache", "free", "calls"),
    [
        pytest.param(1 << 20, 1 << 40, 8, id="small-cache"),
        pytest.param(64 << 20, 1 << 40, 128, id="four-times-the-cache"),
        pytest.param(1 << 40, 1 << 44, 512, id="huge-cache"),
        pytest.param(64 << 20, 96 << 20, 6, id="small-memory"),
        pytest.param(64 << 20, 1, 1, id="no-memory"),
    ],
)
def test_calls_go_round_more_than_the_cache(
    bench: ModuleType, cases: ModuleType, cache: int, free: int, calls: int
) -> None:
    case = cases.Case("k", "i", "o", 1 << 20, 1 << 20, lambda *_: None)
    assert bench.calls_for(case, cache, free) == calls


def test_rows_have_ratios_and_say_what_falls_short(
    bench: ModuleType, cases: ModuleType, emulated: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    case = cases.upsample_argmax((4, 4), (16, 16), torch.float32, of_copy_wanted=2.5)
    (row,) = bench.measure_all([case], emulated, FakeTimer(), 7)
    assert (row.edgeseg_us.median, row.reference_us.median, row.copy_us.median) == (2.0, 3.0, 4.0)
    assert row.rounds == 7
    assert row.of_copy.median == 2.0
    assert row.of_reference.median == 1.5
    assert row.falls_short
    assert row.gb_per_s == pytest.approx(case.bytes_moved / 2e-6 / 1e9)
    said = capsys.readouterr().err
    assert "200 (200-200) % of a copy, 1.5 (1.5-1.5) x torch interpolate, argmax" in said
    assert "FALLS SHORT" in said


def test_the_report_is_json_with_every_figure(
    bench: ModuleType, cases: ModuleType, emulated: Any, tmp_path: Path
) -> None:
    quick = [case for case in cases.quick_cases() if "fp16" not in case.input]
    rows = bench.measure_all(quick, emulated, FakeTimer(), 2)
    target = bench.result_file(tmp_path / "made", "NVIDIA H200 (SXM)", "2026-05-01")
    assert target.name == "gpu-nvidia-h200-sxm-2026-05-01.json"
    bench.write_json(str(target), bench.report(rows, {"gpu": "NVIDIA H200"}, True))
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["machine"] == {"gpu": "NVIDIA H200"}
    assert len(found["rows"]) == len(quick)
    for row in found["rows"]:
        assert row["edgeseg_us"]["median"] > 0
        assert (row["of_copy"] is None) == (row["kernel"] == "pyramid_roi_align")
        assert (row["of_reference"] is None) == (row["reference"] is None)
        assert row["falls_short"] is False


def test_arguments_are_read(bench: ModuleType) -> None:
    options = bench.arguments(["--library", "lib.so", "--only", "mask_bits", "--results", "out"])
    assert (options.library, options.results) == (Path("lib.so"), Path("out"))
    assert not options.check
    assert not options.quick
    chosen = bench.selected_cases(options.only, quick=False)
    assert {case.kernel for case in chosen} == {"mask_bits"}
    with pytest.raises(SystemExit, match="mask_bits"):
        bench.selected_cases("mask_bit", quick=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu_kernels.py", "--quick", "--check"])
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        bench.main()
