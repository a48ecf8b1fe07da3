"""What quantization did to a model, layer by layer and picture by picture, as one page to read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeseg import report as page
from edgeseg.bundle import Bundle
from edgeseg.calibration.accuracy import AnyDataset, AnyEvaluation, figure, figure_name, title
from edgeseg.calibration.calibrate import Calibrated
from edgeseg.calibration.comparison import Comparison, compared
from edgeseg.calibration.frames import CalibrationFrames
from edgeseg.calibration.half import Half
from edgeseg.calibration.lint import Finding, Placement
from edgeseg.calibration.ranges import Histogram, quantized, scale, sqnr_db
from edgeseg.calibration.recipe import QuantizationRecipe
from edgeseg.calibration.sensitivity import LayerDamage, Search
from edgeseg.engine import open_engine
from edgeseg.evaluate import Evaluation, InstanceEvaluation
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.result import result_of
from edgeseg.spec import Task

__all__ = ["LayerReport", "QuantizationReport", "activation_sqnr_db", "layer_reports"]

Precision = Literal["INT8", "FP16", "FP32"]

# Levels of an activation: QuantizeLinear uses all 256.
_LOWEST, _HIGHEST = -128, 127
# Pictures of the data set that are compared, and of them (or of the calibration frames) shown.
_COMPARED, _SHOWN = 24, 3
# Layers in the table of damages.
_WORST = 10
# Findings of one rule that are named.
_NAMED = 24

_MINUS = "\N{MINUS SIGN}"

_SHARED = (
    "SQNR: power of the values over power of the error that rounding and clipping them to INT8 "
    "makes, in dB; 6 dB more is one bit more. Reformat: a pass over a whole tensor that only "
    "changes its type or scale. "
)
_DEFINITIONS: dict[Task, str] = {
    "semantic": (
        "mIoU: for each class, the pixels where mask and truth have it over those where either "
        "has it; the mean over the classes. Damage: share of the pixels whose class changes when "
        "this layer alone is quantized. "
    ),
    "instance": (
        "AP: average precision as COCO defines it, the mean over overlaps (IoU) from 0.50 to 0.95 "
        "and over the classes. Raw heads: the numbers from which boxes, scores and masks are made. "
        "Error of a head: mean squared difference to fp32 over the head's variance. Damage: the "
        "mean error of the heads when this layer alone is quantized. Found by both: same class, "
        "and boxes and masks that overlap with an IoU of 0.5 or more; instances count whose score "
        "is 0.3 or more on either side. "
    ),
}


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer, and what its input and its weights showed.

    ``damage``: see ``LayerDamage``; ``cost_ms``: milliseconds a frame takes longer when it alone
    stays in floating point; None where not measured. ``threshold``: the magnitude at which
    ``input`` is clipped, and ``histogram`` its values on the calibration frames. ``activation_db``
    and ``weight_db``: SQNR of ``input`` and of the weights. For a layer left in floating point,
    threshold and SQNR are what they would be in INT8.
    """

    name: str
    kind: str
    precision: Precision
    reason: str
    damage: float | None
    cost_ms: float | None
    input: str
    threshold: float
    histogram: Histogram
    activation_db: float
    weight_db: float

    @property
    def minimum(self) -> float:
        """The smallest value of ``input`` that was seen."""
        return self.histogram.minimum

    @property
    def maximum(self) -> float:
        """The largest value of ``input`` that was seen."""
        return self.histogram.maximum

    @property
    def clipped(self) -> float:
        """Share of the values of ``input``, 0 to 1, beyond the threshold, to the bin."""
        edges, counts = self.histogram.edges, self.histogram.counts
        beyond = (edges[:-1] >= self.threshold) | (edges[1:] <= -self.threshold)
        return float(counts[beyond].sum()) / max(self.histogram.count, 1)


def layer_reports(
    calibrated: Calibrated,
    floats: Collection[str],
    damages: Sequence[LayerDamage],
    halves: Sequence[Half],
    *,
    fixed: Collection[str] = (),
) -> tuple[LayerReport, ...]:
    """A report of every layer, in the order of the graph.

    ``floats``: names of the layers left in floating point, ``fixed`` those of them that the recipe
    asked for. ``damages`` may be empty. ``halves``: the finished FP16 graph, empty if there is
    none.
    """
    chosen, everywhere = calibrated.placement(floats), calibrated.placement()
    thresholds = {
        tensor: max(calibrated.thresholds[other] for other in tensors)
        for placement in (everywhere, chosen)
        for tensors in placement.groups().values()
        for tensor in tensors
    }
    measured = {entry.layer: entry for entry in damages}
    sqnrs: dict[str, float] = {}
    found = []
    for layer in calibrated.graph.layers():
        seen = calibrated.observations[layer.input].histogram
        threshold = thresholds[layer.input]
        if layer.input not in sqnrs:
            sqnrs[layer.input] = activation_sqnr_db(seen, float(scale(threshold)))
        weight = calibrated.graph.floats(layer.weight)
        scales = calibrated.weight_scales[layer.name]
        sides = [1] * weight.ndim
        sides[layer.axis] = -1
        near = quantized(weight, scales, axis=layer.axis) * scales.reshape(sides)
        entry = measured.get(layer.name)
        precision, reason = _choice(
            layer.name, layer.node, entry, halves, floats=floats, fixed=fixed
        )
        found.append(
            LayerReport(
                name=layer.name,
                kind=layer.kind,
                precision=precision,
                reason=reason,
                damage=None if entry is None else entry.damage,
                cost_ms=None if entry is None else entry.cost_ms,
                input=layer.input,
                threshold=threshold,
                histogram=seen,
                activation_db=sqnrs[layer.input],
                weight_db=sqnr_db(weight, near.astype(np.float32)),
            )
        )
    return tuple(found)


def _choice(
    name: str,
    node: str,
    measured: LayerDamage | None,
    halves: Sequence[Half],
    *,
    floats: Collection[str],
    fixed: Collection[str],
) -> tuple[Precision, str]:
    if name not in floats:
        return "INT8", "quantized"
    if name in fixed or measured is None:
        reason = "left in floating point: recipe"
    else:
        reason = f"left in floating point: budget: damage {_percent(measured.damage)}"
        if measured.cost_ms is not None:
            reason += f", costs {_plain(measured.cost_ms, 2)} ms"
    if not halves:
        return "FP32", reason
    if node in halves[-1].half:
        return "FP16", reason
    why = halves[-1].kept.get(node)
    return "FP32", reason if why is None else f"{reason}; not FP16: {why}"


def activation_sqnr_db(histogram: Histogram, scale: float) -> float:
    """Signal to noise, in dB, of a tensor in int8 with ``scale``: rounded, clipped to -128..127.

    The values count as spread evenly over their bin, and the error is integrated over it, so it
    holds for scales finer than a bin too. Zeros, which int8 has exactly, are told from small values
    by being more than in either bin beside theirs. Infinite for a tensor of zeros.
    """
    counts = histogram.counts.astype(np.float64)
    edges = histogram.edges
    middle = counts.size // 2
    # The zeros are in the bin that begins at 0.
    counts[middle] = min(counts[middle], max(counts[middle - 1], counts[middle + 1]))
    levels = np.clip(np.rint(edges / scale), _LOWEST, _HIGHEST)
    # The integral of the squared error from 0 to each edge, in closed form: the error goes from
    # minus to plus half a step around each level, and on from the outermost ones.
    errors = levels * scale**3 / 12 + (edges - levels * scale) ** 3 / 3
    density = counts / np.diff(edges)
    noise = float(density @ np.diff(errors))
    signal = float(density @ np.diff(edges**3)) / 3
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise)


@dataclass(frozen=True)
class QuantizationReport:
    """The page about one quantization.

    ``bundle`` and ``quantized``: before and after. ``search``: what the budget led to. ``layers``:
    see ``layer_reports``. ``accuracy``: (fp32, INT8) on labelled pictures. ``agreement`` and
    ``heads``: see ``Quantized``; on ``pictures``, which are of network size, (height, width, 3)
    uint8 BGR. ``frames``: what it was calibrated with. ``dataset``: labelled pictures of
    which the worst are shown; None shows the worst of ``pictures``. ``engine`` and ``threads``:
    what makes the masks, as for ``open_engine``.
    """

    bundle: Bundle
    quantized: Bundle
    search: Search
    layers: tuple[LayerReport, ...]
    accuracy: tuple[AnyEvaluation, AnyEvaluation] | None
    agreement: float
    placement: Placement
    frames: tuple[CalibrationFrames, ...]
    recipe: QuantizationRecipe
    notes: tuple[str, ...] = ()
    pictures: tuple[Pixels, ...] = ()
    heads: Mapping[str, float] = field(default_factory=dict)
    dataset: AnyDataset | None = None
    engine: str | None = None
    threads: int = 0

    def write(self, path: Path | str) -> Path:
        """Writes the page to ``path`` and returns it; it runs both models on a few pictures.

        SinkError when the file cannot be written.
        """
        return self.report().write(path)

    def report(self) -> page.Report:
        """The page."""
        spec = self.quantized.spec
        sections = [page.Section("", (self._figures(),))]
        if self.notes:
            sections.append(
                page.Section("Worth knowing", tuple(page.Paragraph(note) for note in self.notes))
            )
        sections += [
            page.Section("Accuracy", self._accuracy()),
            page.Section("Layers in floating point", self._floats()),
            page.Section("Where INT8 looks worst", self._worst()),
            page.Section("Every layer", self._layers()),
            page.Section("What TensorRT makes of it", self._placement()),
            page.Section("How it was made", self._making()),
        ]
        return page.Report(
            title=f"{spec.name}: {self.bundle.name} in INT8",
            subtitle=(
                f"{spec.architecture}, {spec.height}×{spec.width} pixels (height × width), "
                f"{len(spec.classes)} classes"
            ),
            sections=tuple(sections),
            footer=_DEFINITIONS[spec.task] + _SHARED.strip(),
        )

    def _figures(self) -> page.Figures:
        figures = []
        if self.accuracy is not None:
            before, after = (_known(figure(found)) for found in self.accuracy)
            note = "the pictures have no labels"
            if before is not None and after is not None:
                lost = round((before - after) * 100, 2)
                note = f"fp32 {_percent(before)}, {abs(lost):.2f} points "
                note += "lost" if lost >= 0 else "won"
            figures.append(page.Figure(_tile(after), f"{title(self.accuracy[1])} in INT8", note))
        share = _known(self.agreement)
        where = f"on {_number_of(len(self.pictures), 'calibration frame')}"
        if self._instances and share is None:
            where = f"there are none {where}"
        what = "of instances found by both" if self._instances else "of pixels as in fp32"
        figures.append(page.Figure(_tile(share), what, where))
        done = sum(layer.precision == "INT8" for layer in self.layers)
        rest = len(self.layers) - done
        figures.append(
            page.Figure(
                f"{done}/{len(self.layers)}",
                "layers in INT8",
                f"{rest or 'none'} in floating point",
            )
        )
        before_mb, after_mb = (
            len(each.model.content) / 1e6 for each in (self.bundle, self.quantized)
        )
        figures.append(
            page.Figure(_size(after_mb), "MB, ONNX file", f"{_size(before_mb)} MB before")
        )
        figures.append(
            page.Figure(
                str(self.placement.reformats),
                "reformats in TensorRT",
                f"{self.placement.avoidable or 'none'} avoidable",
            )
        )
        return page.Figures(tuple(figures))

    @property
    def _instances(self) -> bool:
        return self.bundle.spec.task == "instance"

    def _accuracy(self) -> tuple[page.Block, ...]:
        heads = (self._head_table(),) if self.heads else ()
        if self.accuracy is None:
            return (
                page.Paragraph(
                    f"Not measured: no labelled pictures were given (--data). {self._closeness()}"
                ),
                *heads,
            )
        fp32, int8 = self.accuracy
        if isinstance(fp32, Evaluation) and isinstance(int8, Evaluation):
            return (_class_table(fp32, int8),)
        assert isinstance(fp32, InstanceEvaluation) and isinstance(int8, InstanceEvaluation)
        return (_precision_table(fp32, int8), *heads)

    def _closeness(self) -> str:
        if not self._instances:
            return (
                f"That {_percent(self.agreement)} of pixels keep their class says how close INT8 "
                "is to fp32, not how right either is."
            )
        share = _known(self.agreement)
        if share is None:
            return "Neither found an instance on the calibration frames that is worth a look."
        return (
            f"That {_percent(share)} of the instances are found by both says how close INT8 is to "
            "fp32, not how right either is."
        )

    def _head_table(self) -> page.Table:
        most = max(self.heads.values())
        return page.Table(
            ("raw head", "error"),
            tuple((name, _damage(error, most)) for name, error in self.heads.items()),
            caption="How far INT8 moves the numbers from which the instances are made.",
        )

    def _floats(self) -> tuple[page.Block, ...]:
        names = [layer.name for layer in self.layers if layer.precision != "INT8"]
        staying = f"In floating point: {', '.join(names)}."
        tried = self.search.tried
        if len(tried) > 1:
            curve = page.Curve(
                tuple(
                    page.Point(
                        count,
                        found * 100,
                        f"{count}: {_percent(found)}",
                        marked=count == len(self.search.floats),
                    )
                    for count, found in tried
                ),
                "layers in floating point",
                f"{figure_name(self.bundle.spec.task)} in %",
                caption=(
                    "Each point is a graph that was tried on all labelled pictures; the large "
                    f"one was taken. fp32 has {_percent(self.search.fp32)}."
                ),
            )
            return (curve, page.Paragraph(staying)) if names else (curve,)
        if names:
            return (page.Paragraph(f"{staying} Why, the table of layers says."),)
        met = "No layer had to stay: the budget is met with all of them in INT8."
        return (page.Paragraph(met if tried else "None: all layers are in INT8."),)

    def _worst(self) -> tuple[page.Block, ...]:
        worst, looked_at = self._compared()
        if not worst:
            where = f" on {_number_of(looked_at, 'picture')}" if looked_at else ""
            return (page.Paragraph(f"Nowhere: both give the same masks{where}."),)
        frames = _number_of(looked_at, "calibration frame")
        if self.dataset is not None:
            frames = (
                f"{_number_of(looked_at, 'picture')} of {self.dataset.title} "
                f"{self.dataset.split}, evenly spread,"
            )
        blocks: list[page.Block] = [page.Paragraph(worst[0].intro(frames))]
        blocks += [
            page.Pictures(
                tuple(page.Picture(pixels, words) for words, pixels in found.pictures()),
                caption=found.caption(),
            )
            for found in worst
        ]
        return tuple(blocks)

    def _compared(self) -> tuple[list[Comparison], int]:
        """The worst pictures, and how many were looked at."""
        spec = self.bundle.spec
        worst: list[Comparison] = []
        count = 0
        if self.dataset is None and not self.pictures:
            return [], 0
        # Both were checked when they were made.
        engines = [
            open_engine(each, self.engine, threads=self.threads, check=False)
            for each in (self.bundle, self.quantized)
        ]
        try:
            for name, pixels, labels in self._candidates():
                count += 1
                frame = Frame.of(pixels)
                geometry = Geometry.between(frame.height, frame.width, spec)
                fitted = geometry.fit(pixels)
                fp32, int8 = (
                    result_of(engine.run(fitted), frame, geometry, spec) for engine in engines
                )
                worst.append(compared(name, fp32, int8, labels))
                worst = sorted(worst, key=lambda found: -found.rank)[:_SHOWN]
        finally:
            for engine in engines:
                engine.close()
        return [found for found in worst if found.differing > 0], count

    def _candidates(self) -> Iterator[tuple[str, Pixels, NDArray[np.uint8] | None]]:
        if self.dataset is None:
            for number, pixels in enumerate(self.pictures, 1):
                yield f"calibration frame {number} of {len(self.pictures)}", pixels, None
            return
        count = min(_COMPARED, len(self.dataset))
        for index in range(count):
            sample = self.dataset.sample(index * len(self.dataset) // count)
            yield sample.name, sample.pixels, getattr(sample, "labels", None)

    def _layers(self) -> tuple[page.Block, ...]:
        blocks: list[page.Block] = []
        worst = sorted(
            (layer for layer in self.layers if layer.damage is not None),
            key=lambda layer: -(layer.damage or 0.0),
        )[:_WORST]
        most = max((layer.damage or 0.0 for layer in worst), default=0.0)
        if worst:
            blocks.append(
                page.Table(
                    ("damage", "layer", "precision"),
                    tuple(
                        (_damage(layer.damage, most), layer.name, layer.precision)
                        for layer in worst
                    ),
                    caption=(
                        "The layers that do most damage when each alone is quantized, in "
                        f"{self._damage}; the longer the bar, the more a layer would gain from "
                        "floating point."
                    ),
                )
            )
        else:
            blocks.append(
                page.Paragraph(
                    "The damage of single layers was not measured, since nothing needed it; "
                    "--sensitivity measures it anyway."
                )
            )
        blocks.append(self._layer_table(most))
        blocks.append(page.Details("Histograms of the inputs of the layers", (self._histograms(),)))
        return tuple(blocks)

    @property
    def _damage(self) -> str:
        if self._instances:
            return "mean error of the raw heads"
        return "share of pixels whose class changes"

    def _layer_table(self, most: float) -> page.Table:
        damaging = any(layer.damage is not None for layer in self.layers)
        costly = any(layer.cost_ms is not None for layer in self.layers)
        header, align = ["layer", "precision"], "ll"
        if damaging:
            header, align = [*header, "damage"], align + "l"
        if costly:
            header, align = [*header, "ms"], align + "r"
        header += ["input, dB", "weights, dB", "input seen", "clipped at", "why"]
        rows = []
        for layer in self.layers:
            row: list[str | page.Share] = [layer.name, layer.precision]
            if damaging:
                row.append(_damage(layer.damage, most))
            if costly:
                row.append("" if layer.cost_ms is None else _plain(layer.cost_ms, 2))
            row += [
                _db(layer.activation_db),
                _db(layer.weight_db),
                f"{_short(layer.minimum)} to {_short(layer.maximum)}",
                f"±{_short(layer.threshold)}",
                layer.reason,
            ]
            rows.append(tuple(row))
        cost = " In ms: what a frame takes longer with the layer in floating point."
        cost = cost if costly else ""
        note = " What was seen is from before the fine-tuning." if self.recipe.finetune else ""
        return page.Table(
            tuple(header),
            tuple(rows),
            f"{align}rrrrl",
            caption=(
                "In the order of the graph. In dB: the SQNR of what the layer reads and of its "
                "weights; below about 20 dB a tensor suffers, above 30 dB it hardly notices. Of a "
                "layer in floating point it "
                f"is what it would be in INT8.{cost}{note}"
            ),
        )

    def _histograms(self) -> page.Histograms:
        """One of each tensor, since layers that read the same one would show the same."""
        readers: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            readers.setdefault(layer.input, []).append(layer)
        return page.Histograms(
            tuple(_histogram(layers) for layers in readers.values() if layers[0].histogram.count),
            caption=(
                "What each layer reads, on the calibration frames. INT8 has 127 steps from 0 to "
                "the coloured line; what lies beyond is clipped to it, and a line far outside the "
                "values wastes steps. Where nothing is below 0 there is no line to the left."
            ),
        )

    def _placement(self) -> tuple[page.Block, ...]:
        found = self.placement
        avoidable = f"{found.avoidable or 'none'} of them avoidable by another placement of Q/DQ"
        blocks: list[page.Block] = [
            page.Paragraph(
                f"{found.quantized} of {found.weighted} layers with weights have INT8 at all "
                f"inputs. TensorRT has to reformat {_number_of(found.reformats, 'tensor')}"
                + (f", {avoidable}." if found.reformats else ".")
            )
        ]
        # What can be mended stands first; the same rule about many edges must not bury it.
        groups: dict[tuple[bool, bool, str], list[Finding]] = {}
        for finding in found.findings:
            key = (not finding.avoidable, not finding.count_as_reformat, finding.rule)
            groups.setdefault(key, []).append(finding)
        for (inherent, free, rule), findings in sorted(groups.items()):
            said = [
                page.Paragraph(f"{finding.tensor} → {finding.node}\n{finding.text}")
                for finding in findings[:_NAMED]
            ]
            if len(findings) > _NAMED:
                said.append(page.Paragraph(f"and {len(findings) - _NAMED} more like these"))
            title = (
                f"{rule}: {_number_of(len(findings), 'place')}, "
                f"{'no reformat' if free else 'a reformat each'}, "
                f"{'inherent' if inherent else 'avoidable'}"
            )
            blocks.append(page.Details(title, tuple(said)))
        return tuple(blocks)

    def _making(self) -> tuple[page.Block, ...]:
        frames = page.Table(
            ("frames from", "number", "skipped", "sizes (height × width)"),
            tuple(
                (
                    each.title,
                    str(len(each)),
                    str(len(each.skipped)),
                    ", ".join(
                        f"{height}×{width}" + (f" ({number})" if len(each.sizes) > 1 else "")
                        for (height, width), number in each.sizes.items()
                    ),
                )
                for each in self.frames
            ),
            "lrrl",
            caption="What it was calibrated with.",
        )
        recipe = page.Table(
            ("choice", "value"), tuple(_recipe_rows(self.recipe)), caption="The recipe."
        )
        return (frames, recipe)


def _class_table(fp32: Evaluation, int8: Evaluation) -> page.Table:
    rows = [
        (name.replace("_", " "), before, int8.per_class.get(name))
        for name, before in fp32.per_class.items()
    ]
    rows.append(("mean (mIoU)", _known(fp32.miou), _known(int8.miou)))
    rows.append(("pixels that are right", _known(fp32.pixel_accuracy), _known(int8.pixel_accuracy)))
    return _before_and_after("class", rows, "IoU of each class", int8)


def _precision_table(fp32: InstanceEvaluation, int8: InstanceEvaluation) -> page.Table:
    # Where the data set has outlines, masks are what counts.
    pair = (fp32.box, int8.box) if fp32.mask is None else (fp32.mask, int8.mask)
    before, after = pair
    assert before is not None and after is not None
    what = title(fp32)
    rows = [
        (name.replace("_", " "), _known(value), _known(after.per_class[name]))
        for name, value in before.per_class.items()
    ]
    rows.append((f"mean ({what})", _known(before.ap), _known(after.ap)))
    rows.append((f"{what} at an IoU of 0.50", _known(before.ap50), _known(after.ap50)))
    rows.append((f"{what} at an IoU of 0.75", _known(before.ap75), _known(after.ap75)))
    if fp32.mask is not None:
        rows.append(("mean (box AP)", _known(fp32.box.ap), _known(int8.box.ap)))
    return _before_and_after("class", rows, f"{what} of each class", int8)


def _before_and_after(
    column: str,
    rows: Sequence[tuple[str, float | None, float | None]],
    what: str,
    measured: AnyEvaluation,
) -> page.Table:
    return page.Table(
        (column, "fp32, %", "INT8, %", "points"),
        tuple(
            (name, _bare(before), _bare(after), _change(before, after))
            for name, before, after in rows
        ),
        "lrrr",
        caption=(
            f"{what} on {measured.data} {measured.split}, "
            f"{_number_of(measured.frames, 'picture')}, by {measured.engine}; the last column is "
            "what INT8 changes, of 100 points."
        ),
    )


def _histogram(layers: Sequence[LayerReport]) -> page.Histogram:
    """The panel of the tensor that ``layers`` read."""
    first = layers[0]
    seen = first.histogram
    counts, edges = seen.counts, seen.edges
    used = np.flatnonzero(counts)
    low, high = int(used[0]), int(used[-1]) + 1
    marks = [page.Mark(first.threshold)]
    if seen.minimum < 0:
        marks.insert(0, page.Mark(-first.threshold))
    others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    clipped = f"{_percent(first.clipped)} clipped" if first.clipped > 0 else "nothing clipped"
    return page.Histogram(
        title=first.name + others,
        counts=tuple(counts[low:high].astype(np.float64).tolist()),
        low=float(edges[low]),
        high=float(edges[high]),
        subtitle=(
            f"{first.kind} · {first.precision} · SQNR {_db(first.activation_db)} dB · {clipped}"
        ),
        marks=tuple(marks),
    )


def _recipe_rows(recipe: QuantizationRecipe) -> Iterator[tuple[str, str]]:
    ranges = recipe.ranges
    if ranges == "percentile":
        ranges += f", {recipe.percentile:g} %"
    yield "ranges of activations", ranges
    yield "ranges of weights", recipe.weights
    yield "evening out of channels", f"{recipe.equalize:g}" if recipe.equalize else "none"
    yield "frames from each source, at most", str(recipe.frames)
    yield "layers to leave in floating point", ", ".join(recipe.floats) or "none"
    yield "what is not INT8", "FP16" if recipe.half else "FP32"
    tuning = recipe.finetune
    if tuning is None:
        yield "fine-tuning", "none"
        return
    yield "fine-tuning", f"{tuning.steps} steps of {tuning.batch} frames"
    yield "learning rate of the weights", f"{tuning.learning_rate:g}"
    yield "learning rate of the scales", f"{tuning.scale_learning_rate:g}"
    yield "views of the teacher", ", ".join(f"{view:g}×" for view in tuning.views)
    yield "frames to train with, at most", str(tuning.frames)
    yield "seed", str(tuning.seed)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(share: float | None) -> str:
    """A share of 0 to 1 in per cent; two digits that say something where it is small."""
    if share is None:
        return "absent"
    value = share * 100
    if 0 < value < 0.01:
        return "<0.01 %"
    return f"{value:.2f} %"


def _tile(share: float | None) -> str:
    """A share in per cent, short enough for a tile and never broken."""
    return "–" if share is None else f"{share * 100:.1f}\N{NO-BREAK SPACE}%"


def _size(megabytes: float) -> str:
    return f"{megabytes:.1f}" if megabytes >= 0.1 else f"{megabytes:.3f}"


def _bare(share: float | None) -> str:
    """A share in per cent, where the header of the column has the unit."""
    return "absent" if share is None else f"{share * 100:.2f}"


def _damage(damage: float | None, most: float) -> str | page.Share:
    """A cell with a damage; the bar is full at ``most``."""
    if damage is None:
        return "not measured"
    return page.Share(damage / most if most > 0 else 0.0, _percent(damage))


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else _points(after - before)


def _points(difference: float) -> str:
    """A difference of shares, in points of a hundred, with its sign."""
    points = round(difference * 100, 2)
    return f"{points:+.2f}".replace("-", _MINUS) if points else "0.00"


def _plain(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", _MINUS)


def _short(value: float) -> str:
    """A value with three digits."""
    return f"{value:.3g}".replace("-", _MINUS)


def _db(value: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "all noise"
    return _plain(value, 1)


def _number_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
