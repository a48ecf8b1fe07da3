"""The page about a quantization, against raw values in float64 and what was put in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
from onnx import numpy_helper

from edgeseg import report as page
from edgeseg.bundle import Bundle
from edgeseg.calibration.calibrate import Calibrated, Pictures, calibrate
from edgeseg.calibration.frames import open_frames
from edgeseg.calibration.half import Half
from edgeseg.calibration.lint import Finding, Placement, lint
from edgeseg.calibration.observe import run
from edgeseg.calibration.ranges import Histogram
from edgeseg.calibration.recipe import Finetuning, QuantizationRecipe
from edgeseg.calibration.report import QuantizationReport, activation_sqnr_db, layer_reports
from edgeseg.calibration.sensitivity import LayerDamage, Search
from edgeseg.dataset import Sample, open_dataset
from edgeseg.engine import open_engine
from edgeseg.evaluate import Evaluation
from edgeseg.onnxfile import OnnxFile

if TYPE_CHECKING:
    from edgeseg.dataset import Dataset
    from tests.calibration.conftest import Fork, Workbench

Floats = NDArray[np.float32]

NO_SEARCH = Search((), math.nan, math.nan, (), ())
# Without evening, so that INT8 differs from fp32 in a few of the masks.
RECIPE = QuantizationRecipe(ranges="minmax", equalize=0.0, frames=8)


def brute_force_db(values: NDArray[Any], scale: float) -> float:
    """SQNR of the raw values in float64, by ONNX's definition of QuantizeLinear."""
    wide = values.astype(np.float64).ravel()
    near = np.clip(np.rint(wide / scale), -128, 127) * scale
    return float(10 * np.log10(np.sum(wide**2) / np.sum((wide - near) ** 2)))


def normal(rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.normal(0, 3, 200_000)


def after_relu(rng: np.random.Generator) -> NDArray[np.float64]:
    return np.maximum(rng.normal(-4, 3, 200_000), 0)


def with_outliers(rng: np.random.Generator) -> NDArray[np.float64]:
    return np.append(rng.laplace(0, 1, 200_000), [180.0, -90.0])


def after_relu_with_outliers(rng: np.random.Generator) -> NDArray[np.float64]:
    return np.append(np.maximum(rng.normal(-4, 3, 200_000), 0), [150.0])


def centred_pixels(rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.integers(0, 256, 200_000).astype(np.float64) - 103.939


def shares(rng: np.random.Generator) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-rng.normal(2, 2, 200_000)))


@pytest.mark.parametrize("part", [1.2, 1.0, 0.6, 0.1])
@pytest.mark.parametrize(
    "draw",
    [normal, after_relu, with_outliers, after_relu_with_outliers, centred_pixels, shares],
)
def test_sqnr_of_a_histogram_is_that_of_the_values(
    draw: Callable[[np.random.Generator], NDArray[np.float64]], part: float
) -> None:
    values = draw(np.random.default_rng(1)).astype(np.float32)
    histogram = Histogram()
    for frame in np.array_split(values, 4):
        histogram.add(frame)
    scale = histogram.amax * part / 127
    assert activation_sqnr_db(histogram, scale) == pytest.approx(
        brute_force_db(values, scale), abs=0.3
    )


def test_sqnr_of_a_scale_finer_than_a_bin() -> None:
    values = np.append(np.random.default_rng(2).uniform(0, 1, 100_000), [2000.0])
    histogram = Histogram()
    histogram.add(values.astype(np.float32))
    # A bin is 0.25 wide, and a step 0.01: what is left is the outlier, clipped.
    assert activation_sqnr_db(histogram, 0.01) == pytest.approx(
        brute_force_db(values, 0.01), abs=0.3
    )


def test_zeros_are_exact() -> None:
    histogram = Histogram()
    histogram.add(np.zeros(100, np.float32))
    assert activation_sqnr_db(histogram, 0.1) == math.inf


# -- the layers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames(fork: Fork, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = fork.frames(tmp_path_factory.mktemp("report") / "frames", 8)
    return open_frames(str(folder), Bundle.open(fork.folder).spec)


@pytest.fixture(scope="module")
def calibrated(fork: Fork, frames: Any) -> Calibrated:
    model = onnx.load_model_from_string(Bundle.open(fork.folder).model.content)
    return calibrate(model, Pictures([frames]), RECIPE)


def test_layers_come_with_what_their_tensors_show(calibrated: Calibrated, frames: Any) -> None:
    layers = layer_reports(calibrated, (), (), ())
    assert [layer.name for layer in layers] == [
        "first", "wide", "narrow", "left", "right", "classify",
    ]  # fmt: skip
    assert {(layer.kind, layer.precision, layer.reason) for layer in layers} == {
        ("Conv", "INT8", "quantized")
    }
    inputs = list(dict.fromkeys(layer.input for layer in layers))
    seen = list(run(calibrated.graph.model, inputs, Pictures([frames])))
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in calibrated.model().graph.initializer
    }
    for layer in layers:
        values = np.stack([each[layer.input] for each in seen])
        assert (layer.minimum, layer.maximum) == pytest.approx(
            (values.min(), values.max()), rel=1e-5
        )
        scale = float(stored[f"{layer.input}.scale"])
        assert layer.threshold == pytest.approx(scale * 127, rel=1e-6)
        # The tiny tensors hold a few thousand values, so single ones weigh more.
        assert layer.activation_db == pytest.approx(brute_force_db(values, scale), abs=0.3)
        weight = calibrated.graph.floats(f"{layer.name}.weight").astype(np.float64)
        near = stored[f"{layer.name}.weight.int8"] * stored[f"{layer.name}.weight.scale"].astype(
            np.float64
        ).reshape(-1, 1, 1, 1)
        wanted = 10 * np.log10(np.sum(weight**2) / np.sum((weight - near) ** 2))
        assert layer.weight_db == pytest.approx(wanted, abs=0.01)


def test_share_that_is_clipped(calibrated: Calibrated, frames: Any) -> None:
    narrow = Calibrated(
        calibrated.graph,
        {name: value / 4 for name, value in calibrated.thresholds.items()},
        calibrated.weight_scales,
        calibrated.observations,
    )
    for layer in layer_reports(narrow, (), (), ()):
        values = np.stack(
            [
                each[layer.input]
                for each in run(calibrated.graph.model, [layer.input], Pictures([frames]))
            ]
        )
        wanted = np.mean(np.abs(values) > layer.threshold)
        assert layer.clipped == pytest.approx(wanted, abs=0.002)
        assert wanted > 0


def test_threshold_is_that_of_all_tensors_with_the_same_scale(bench: Workbench) -> None:
    model = bench.model("""
        one = Conv(x)
        two = Conv(x, kernel=3)
        both = Concat(one, two, axis=1)
        side = Conv(one)
        other = Conv(two)
        logits = Conv(both, into=8)
    """)
    frames: Any = bench.pictures(4)
    calibrated = calibrate(model, frames, RECIPE)
    alone = [calibrated.thresholds[name] for name in ("one", "two", "both")]
    assert min(alone) < max(alone)
    found = {layer.input: layer.threshold for layer in layer_reports(calibrated, (), (), ())}
    assert {found[name] for name in ("one", "two", "both")} == {max(alone)}


HALF = Half(onnx.ModelProto(), ("wide",), {"narrow": "its values reach 1e+05"}, {})


@pytest.mark.parametrize(
    ("damages", "halves", "fixed", "wide", "narrow"),
    [
        ((), (), (), ("FP32", "left in floating point: recipe"), None),
        (
            (LayerDamage("wide", 0.008, 0.3), LayerDamage("narrow", 0.5)),
            (),
            (),
            ("FP32", "left in floating point: budget: damage 0.80 %, costs 0.30 ms"),
            ("FP32", "left in floating point: budget: damage 50.00 %"),
        ),
        (
            (LayerDamage("wide", 0.008, 0.3), LayerDamage("narrow", 0.5)),
            (),
            ("wide",),
            ("FP32", "left in floating point: recipe"),
            ("FP32", "left in floating point: budget: damage 50.00 %"),
        ),
        (
            (),
            (HALF,),
            ("wide", "narrow"),
            ("FP16", "left in floating point: recipe"),
            ("FP32", "left in floating point: recipe; not FP16: its values reach 1e+05"),
        ),
    ],
)
def test_why_a_layer_is_what_it_is(
    calibrated: Calibrated, damages: Any, halves: Any, fixed: Any, wide: Any, narrow: Any
) -> None:
    floats = ("wide", "narrow") if narrow else ("wide",)
    layers = {
        layer.name: layer
        for layer in layer_reports(calibrated, floats, damages, halves, fixed=fixed)
    }
    assert (layers["wide"].precision, layers["wide"].reason) == wide
    if narrow:
        assert (layers["narrow"].precision, layers["narrow"].reason) == narrow
    assert layers["first"].precision == "INT8"
    for name, layer in layers.items():
        given = next((entry for entry in damages if entry.layer == name), None)
        assert layer.damage == (given and given.damage)
        assert layer.cost_ms == (given and given.cost_ms)
    # What it would be in INT8, also where it is not.
    usual = {layer.name: layer for layer in layer_reports(calibrated, (), (), ())}
    assert layers["wide"].threshold == usual["wide"].threshold
    assert layers["wide"].weight_db == usual["wide"].weight_db


# -- the page --------------------------------------------------------------------------------------


class Text(HTMLParser):
    """The words of a page; fails on a tag that is not closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words = ""
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "wbr"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words += data


@pytest.fixture(scope="module")
def bare(fork: Fork, frames: Any, calibrated: Calibrated) -> QuantizationReport:
    """Without anything that needs labels or measurements."""
    bundle = Bundle.open(fork.folder)
    made = calibrated.model()
    quantized = replace(
        bundle,
        model=OnnxFile(made.SerializeToString(), "quantized"),
        spec=replace(bundle.spec, name="fork-int8"),
    )
    return QuantizationReport(
        bundle=bundle,
        quantized=quantized,
        search=NO_SEARCH,
        layers=layer_reports(calibrated, (), (), ()),
        accuracy=None,
        agreement=0.9123,
        placement=lint(made),
        frames=(frames,),
        recipe=RECIPE,
        pictures=tuple(Pictures([frames])),
        engine="onnxruntime",
        threads=1,
    )


@pytest.fixture(scope="module")
def full(
    bare: QuantizationReport,
    fork: Fork,
    calibrated: Calibrated,
    tmp_path_factory: pytest.TempPathFactory,
) -> QuantizationReport:
    """With all there can be."""
    names = bare.bundle.spec.classes
    fp32 = {name: 0.9 - index / 100 for index, name in enumerate(names)}
    int8: dict[str, float | None] = {name: value - 0.0123 for name, value in fp32.items()}
    int8[names[0]] = None

    def evaluation(miou: float, per_class: dict[str, Any]) -> Evaluation:
        return Evaluation("CamVid", "val", "onnxruntime", 30, miou, per_class, 0.95, 1.0)

    damages = tuple(
        LayerDamage(layer.name, 0.01 * (index + 1), 0.1 * index)
        for index, layer in enumerate(bare.layers)
    )
    data = fork.camvid(tmp_path_factory.mktemp("report") / "data", count=30)
    return replace(
        bare,
        search=Search(("wide",), 0.7512, 0.7401, ((0, 0.6), (1, 0.7401), (2, 0.7403)), damages),
        layers=layer_reports(calibrated, ("wide",), damages, ()),
        accuracy=(evaluation(0.7512, fp32), evaluation(0.7401, int8)),
        notes=("few <b>frames</b> & dark ones",),
        dataset=open_dataset(data, "val"),
        recipe=replace(RECIPE, half=True, floats=("first",), finetune=Finetuning(steps=77)),
    )


@pytest.fixture(scope="module")
def full_page(full: QuantizationReport) -> page.Report:
    return full.report()


def plain(made: QuantizationReport) -> QuantizationReport:
    """Without pictures, which take the time."""
    return replace(made, pictures=(), dataset=None)


def blocks(made: page.Report) -> Iterator[page.Block]:
    """All blocks of a page, also those inside others."""
    waiting: list[page.Block] = [block for section in made.sections for block in section.blocks]
    while waiting:
        block = waiting.pop(0)
        yield block
        if isinstance(block, page.Details):
            waiting[:0] = block.blocks


def tables(made: page.Report) -> dict[str, list[dict[str, Any]]]:
    """First word of the header -> rows by header; numbers before a bar as their text."""
    found: dict[str, list[dict[str, Any]]] = {}
    for block in blocks(made):
        if isinstance(block, page.Table):
            rows = [dict(zip(block.header, row, strict=True)) for row in block.rows]
            found[block.header[0]] = rows
    return found


def figures(made: page.Report) -> dict[str, tuple[str, str]]:
    block = next(block for block in blocks(made) if isinstance(block, page.Figures))
    return {
        item.label: (item.value.replace("\N{NO-BREAK SPACE}", " "), item.note)
        for item in block.items
    }


def words(made: page.Report) -> str:
    return Text(made.to_html()).words


def test_figures_are_the_inputs(full: QuantizationReport, full_page: page.Report) -> None:
    made = full_page
    before, after = (len(each.model.content) / 1e6 for each in (full.bundle, full.quantized))
    assert figures(made) == {
        "mIoU in INT8": ("74.0 %", "fp32 75.12 %, 1.11 points lost"),
        "of pixels as in fp32": ("91.2 %", "on 8 calibration frames"),
        "layers in INT8": ("5/6", "1 in floating point"),
        "MB, ONNX file": (f"{after:.3f}", f"{before:.3f} MB before"),
        "reformats in TensorRT": (str(full.placement.reformats), "none avoidable"),
    }
    assert full.accuracy is not None
    fp32, _ = full.accuracy
    assert isinstance(fp32, Evaluation)
    rows = tables(made)["class"]
    for row, (name, share) in zip(rows, fp32.per_class.items(), strict=False):
        assert row["class"] == name.replace("_", " ")
        assert row["fp32, %"] == f"{(share or 0) * 100:.2f}"
    assert (rows[0]["INT8, %"], rows[0]["points"]) == ("absent", "")
    assert (rows[1]["INT8, %"], rows[1]["points"]) == ("87.77", "\N{MINUS SIGN}1.23")
    assert rows[-2] == {
        "class": "mean (mIoU)", "fp32, %": "75.12", "INT8, %": "74.01",
        "points": "\N{MINUS SIGN}1.11",
    }  # fmt: skip


def test_layers_on_the_page_are_the_inputs(
    full: QuantizationReport, full_page: page.Report
) -> None:
    made = full_page
    rows = tables(made)["layer"]
    assert [row["layer"] for row in rows] == [layer.name for layer in full.layers]
    for row, layer in zip(rows, full.layers, strict=True):
        assert layer.damage is not None
        assert row["damage"] == page.Share(layer.damage / 0.06, f"{layer.damage * 100:.2f} %")
        assert row["ms"] == f"{layer.cost_ms:.2f}"
        assert row["input, dB"] == f"{layer.activation_db:.1f}"
        assert row["weights, dB"] == f"{layer.weight_db:.1f}"
        assert row["clipped at"] == f"±{layer.threshold:.3g}"
        assert (row["precision"], row["why"]) == (layer.precision, layer.reason)
    worst = [row["layer"] for row in tables(made)["damage"]]
    assert worst == [layer.name for layer in reversed(full.layers)]

    (drawn,) = [block for block in blocks(made) if isinstance(block, page.Histograms)]
    # Two layers read the same tensor.
    assert [item.title for item in drawn.items] == [
        "first", "wide", "narrow", "left and 1 more", "classify",
    ]  # fmt: skip
    for item in drawn.items:
        layer = next(each for each in full.layers if each.name == item.title.split()[0])
        assert sum(item.counts) == layer.histogram.count
        assert item.low <= layer.minimum < layer.maximum <= item.high
        sides = [-layer.threshold, layer.threshold] if layer.minimum < 0 else [layer.threshold]
        assert [mark.value for mark in item.marks] == sides
    (curve,) = [block for block in blocks(made) if isinstance(block, page.Curve)]
    assert [(point.x, point.marked) for point in curve.points] == [
        (0, False),
        (1, True),
        (2, False),
    ]
    assert [point.y for point in curve.points] == pytest.approx([60.0, 74.01, 74.03])


def test_nothing_is_missing_without_labels_and_measurements(
    bare: QuantizationReport, tmp_path: Path
) -> None:
    made = bare.report()
    assert "mIoU in INT8" not in figures(made)
    assert figures(made)["layers in INT8"] == ("6/6", "none in floating point")
    said = words(made)
    for text in (
        "Not measured: no labelled pictures",
        "None: all layers are in INT8.",
        "--sensitivity measures it",
        "Of 8 calibration frames",
        "frames from",
    ):
        assert text in said
    assert {"nan", "None,"}.isdisjoint(said.split())
    assert set(tables(made)) == {"layer", "frames from", "choice"}
    assert {"damage", "ms"}.isdisjoint(tables(made)["layer"][0])
    written = bare.write(tmp_path / "report.html")
    assert written.stat().st_size < 1_500_000
    assert written.read_text(encoding="utf-8").startswith("<!")


def test_no_labels_in_the_data(full: QuantizationReport) -> None:
    assert full.accuracy is not None
    fp32, _ = full.accuracy
    assert isinstance(fp32, Evaluation)
    empty = replace(
        fp32,
        miou=math.nan,
        pixel_accuracy=math.nan,
        per_class=dict.fromkeys(fp32.per_class),
    )
    made = replace(plain(full), accuracy=(empty, empty)).report()
    assert figures(made)["mIoU in INT8"] == ("–", "the pictures have no labels")
    assert {row["INT8, %"] for row in tables(made)["class"]} == {"absent"}
    assert "nan" not in words(made)


@pytest.mark.parametrize(
    ("floats", "tried", "said"),
    [
        ((), (), "None: all layers are in INT8."),
        ((), ((0, 0.74),), "the budget is met with all of them in INT8"),
        (("wide", "left"), ((2, 0.74),), "In floating point: wide, left. Why, the table"),
    ],
)
def test_what_stays_in_floating_point(
    full: QuantizationReport, calibrated: Calibrated, floats: Any, tried: Any, said: str
) -> None:
    made = replace(
        plain(full),
        search=Search(floats, 0.75, 0.74, tried, ()),
        layers=layer_reports(calibrated, floats, (), (), fixed=floats),
    ).report()
    assert said in words(made)
    assert not [block for block in blocks(made) if isinstance(block, page.Curve)]


def shown(made: page.Report) -> list[page.Pictures]:
    return [block for block in blocks(made) if isinstance(block, page.Pictures)]


def test_the_worst_calibration_frames_are_shown(bare: QuantizationReport) -> None:
    maps = []
    for bundle in (bare.bundle, bare.quantized):
        engine = open_engine(bundle, "onnxruntime", threads=1, check=False)
        maps.append([engine.run(pixels).class_map.copy() for pixels in bare.pictures])
        engine.close()
    shares = [float(np.mean(one != other)) for one, other in zip(*maps, strict=True)]
    worst = sorted(range(len(shares)), key=lambda index: -shares[index])[:3]
    found = shown(bare.report())
    assert [block.caption for block in found] == [
        f"calibration frame {index + 1} of 8: {shares[index] * 100:.2f} % of pixels differ"
        for index in worst
    ]
    # Orange in the second picture is where the masks differ, and only there.
    orange = (found[0].items[1].pixels == (0, 140, 255)).all(axis=2)
    assert np.array_equal(orange, maps[0][worst[0]] != maps[1][worst[0]])
    assert len(found[0].items) == 4


def test_the_worst_labelled_frames_are_shown(
    full: QuantizationReport, full_page: page.Report
) -> None:
    assert full.dataset is not None
    # Its labels are what fp32 gives, so whatever differs is lost.
    losses = {}
    engine = open_engine(full.quantized, "onnxruntime", threads=1, check=False)
    for index in range(24):
        sample = full.dataset.sample(index * 30 // 24)
        assert isinstance(sample, Sample)
        losses[sample.name] = 100 * float(
            np.mean(engine.run(sample.pixels).class_map != sample.labels)
        )
    engine.close()
    found = shown(full_page)
    assert len(found) == 3
    assert [block.caption.partition(":")[0] for block in found] == sorted(
        losses, key=lambda name: -losses[name]
    )[:3]
    for block in found:
        loss = losses[block.caption.partition(":")[0]]
        assert f"{loss:.2f} % of pixels differ" in block.caption
        assert f"(\N{MINUS SIGN}{loss:.2f} points)" in block.caption


def test_what_is_lost_and_won_has_its_colour(bare: QuantizationReport) -> None:
    maps = []
    for bundle in (bare.bundle, bare.quantized):
        engine = open_engine(bundle, "onnxruntime", threads=1, check=False)
        maps.append(engine.run(bare.pictures[0]).class_map.copy())
        engine.close()
    fp32, int8 = maps
    labels = np.full_like(fp32, bare.bundle.spec.ignore)
    labels[:, 0::4], labels[:, 1::4] = fp32[:, 0::4], int8[:, 1::4]
    # A class that neither gives.
    labels[:, 2::4] = next(i for i in range(256) if i not in (*fp32.ravel(), *int8.ravel()))

    class One:
        title, split = "One", "val"

        def __len__(self) -> int:
            return 1

        def sample(self, index: int) -> Sample:
            return Sample("it", bare.pictures[0], labels)

    dataset: Dataset = One()  # type: ignore[assignment]
    (found,) = shown(replace(bare, dataset=dataset).report())
    drawn = found.items[1].pixels
    for column, colour in enumerate([(0, 140, 255), (255, 170, 60), (240, 240, 240)] * 2):
        column += column // 3  # the fourth has no labels
        differs = (fp32 != int8)[:, column::8]
        assert differs.any()
        assert np.array_equal((drawn[:, column::8] == colour).all(axis=2), differs)
    unlabelled = (fp32 != int8)[:, 3::4]
    assert np.array_equal((drawn[:, 3::4] == 240).all(axis=2), unlabelled)


def test_equal_masks_are_said_to_be_equal(bare: QuantizationReport) -> None:
    same = replace(bare, quantized=bare.bundle).report()
    assert not shown(same)
    assert "Nowhere: both give the same masks on 8 pictures." in words(same)
    assert "Nowhere: both give the same masks." in words(plain(bare).report())


def test_findings_say_what_can_be_mended_first(bare: QuantizationReport) -> None:
    findings = (
        *(Finding("float-between", f"n{i}", "t", "it leaves int8", False, True) for i in range(30)),
        Finding("concat", "join", "side", "another scale", True, True),
    )
    made = replace(plain(bare), placement=Placement(5, 6, findings, 31, 1)).report()
    titles = [block.title for block in blocks(made) if isinstance(block, page.Details)]
    assert titles[1:] == [
        "concat: 1 place, a reformat each, avoidable",
        "float-between: 30 places, a reformat each, inherent",
    ]
    said = words(made)
    assert "TensorRT has to reformat 31 tensors, 1 of them avoidable" in said
    assert said.count("it leaves int8") == 24 and "and 6 more like these" in said


def test_text_is_escaped(full: QuantizationReport) -> None:
    odd = "<script>alert('1')</script> & co"
    made = replace(
        plain(full),
        layers=(replace(full.layers[0], name=odd, reason=odd), *full.layers[1:]),
        placement=Placement(1, 1, (Finding("bias", odd, odd, odd, True, False),), 0, 0),
    ).report()
    read = Text(made.to_html())
    assert "script" not in read.tags and "b" not in read.tags
    assert odd in read.words and "few <b>frames</b> & dark ones" in read.words


def test_recipe_and_frames_stand_at_the_end(full_page: page.Report) -> None:
    found = tables(full_page)
    (row,) = found["frames from"]
    assert (row["number"], row["skipped"]) == ("8", "0")
    assert row["sizes (height × width)"] == "32×48"
    recipe = {row["choice"]: row["value"] for row in found["choice"]}
    assert recipe["ranges of activations"] == "minmax"
    assert recipe["evening out of channels"] == "none"
    assert recipe["layers to leave in floating point"] == "first"
    assert recipe["what is not INT8"] == "FP16"
    assert recipe["fine-tuning"] == "77 steps of 4 frames"
