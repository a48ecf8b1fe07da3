"""A report: one HTML page that holds all it shows, pictures included.

The page loads nothing, from disk or network, and runs no script; it can be mailed, archived and
printed. It follows the reader's light or dark setting and fits a phone.
"""

from __future__ import annotations

import base64
import html
import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError, SinkError

__all__ = [
    "Bar",
    "Bars",
    "Block",
    "Code",
    "Curve",
    "Details",
    "Figure",
    "Figures",
    "Film",
    "Histogram",
    "Histograms",
    "LineChart",
    "Mark",
    "Paragraph",
    "Picture",
    "Pictures",
    "Point",
    "Range",
    "Ranges",
    "Report",
    "Section",
    "Series",
    "Share",
    "Stack",
    "Table",
]

Colour = tuple[int, int, int]

# Wide enough for a retina laptop at half the page's width, small enough to be mailed.
_PICTURE_WIDTH = 960
_JPEG_QUALITY = 86
_STRIP_ROWS = 16_000

# Rows of a table that a screen shows at once, about.
_LONG_TABLE = 24

# The drawing of one histogram: its inner units across, which its panel stretches, and pixels down.
_PANEL_UNITS, _PANEL_HEIGHT = 1000, 64
_PANEL_BARS = 64
# Pixels: the narrowest panel of the style sheet, one letter and one row of its labels.
_PANEL_NARROW, _LETTER, _LABEL_ROW = 150, 6.6, 15

# Pixels of the plot of a curve. It is 240 wide on the smallest phone, 960 on a desk.
_CURVE_HEIGHT, _CURVE_WIDTHS, _CURVE_MARGIN = 280, (240, 960), 14
_CURVE_LETTER, _CURVE_LONGEST = 7.4, 30
_CURVE_LABELS = 12

# The drawing of a line chart: its inner units across, which the page stretches, and pixels down.
_CHART_UNITS, _CHART_HEIGHT = 1000, 220
_CHART_STEPS = 7

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Figure:
    """One number to remember, such as "41.3" of "frames per second"."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Figures:
    """The few numbers that say it all, as large tiles in a row."""

    items: tuple[Figure, ...]


@dataclass(frozen=True)
class Paragraph:
    """Plain text; a line break in it stays one."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands or code, as written."""

    text: str


@dataclass(frozen=True)
class Share:
    """A cell of a table that shows a small bar before its text: a column that is seen at a glance.

    ``value``: the bar's length, 0 (none) to 1 (the whole cell). RequestError for another.
    """

    value: float
    text: str

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise RequestError(f"a share is 0 to 1, and {self.value} came")


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; a long table scrolls below its header.

    ``align``: one letter per column, ``l`` (left) or ``r`` (right, for numbers); all left when
    empty. Raises RequestError when a row has another number of columns than the header.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str | Share, ...], ...]
    align: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        columns = len(self.header)
        for row in self.rows:
            if len(row) != columns:
                raise RequestError(
                    f"this table has {columns} columns, and a row of {len(row)} came"
                )
        if self.align and (len(self.align) != columns or set(self.align) - set("lr")):
            raise RequestError(
                f"a table of {columns} columns has {columns} letters l or r, "
                f"and {self.align!r} came"
            )


@dataclass(frozen=True)
class Bar:
    """One bar: its length, and ``text`` for the number at its end.

    ``value`` None: there is nothing to show, and a dash stands for it. ``colour`` (red, green,
    blue), 0-255, is a swatch beside the label, such as the colour of a class in the pictures.
    """

    label: str
    value: float | None
    text: str
    colour: Colour | None = None


@dataclass(frozen=True)
class Bars:
    """A bar chart, one row per bar; ``full`` is the value of the longest bar that there can be.

    ``full`` None takes the largest value. Values must not be negative: RequestError.
    """

    items: tuple[Bar, ...]
    full: float | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        for bar in self.items:
            if bar.value is not None and not bar.value >= 0:
                raise RequestError(f"a bar has a length of 0 or more, and {bar.value} came")

    @classmethod
    def of_classes(
        cls, shares: Mapping[str, float | None], colours: Sequence[Colour], *, caption: str = ""
    ) -> Bars:
        """One bar per class, in per cent; such as the IoU of each, None where it has none."""
        return cls(
            items=tuple(
                Bar(
                    label=name.replace("_", " "),
                    value=share,
                    text="absent" if share is None else f"{share * 100:.1f} %",
                    colour=colour,
                )
                for (name, share), colour in zip(shares.items(), colours, strict=True)
            ),
            full=1.0,
            caption=caption,
        )


@dataclass(frozen=True)
class Stack:
    """One bar cut into parts, with a legend below: where the time of a frame goes.

    The ``text`` of each part is shown in the legend; its ``colour`` is not used. Values must be
    numbers of 0 or more, and not all 0: RequestError.
    """

    parts: tuple[Bar, ...]
    caption: str = ""

    def __post_init__(self) -> None:
        values = [part.value for part in self.parts if part.value is not None]
        if len(values) < len(self.parts) or not all(value >= 0 for value in values):
            raise RequestError("the parts of a stack have lengths of 0 or more")
        if not sum(values) > 0:
            raise RequestError("a stack has at least one part that is longer than 0")


@dataclass(frozen=True)
class Mark:
    """A value marked in a histogram, such as the threshold where a range is clipped.

    An empty ``label`` shows the value itself.
    """

    value: float
    label: str = ""


@dataclass(frozen=True)
class Histogram:
    """How often a tensor takes which values.

    ``counts``: one per bin, 0 or more, in the order of the values; ``low`` and ``high``: the outer
    edges of the bins, all equally wide. ``subtitle``: a line below the title, such as
    "conv 12 · SQNR 31.2 dB". ``marks`` may lie outside the edges; the axis then reaches to them.
    RequestError for counts, edges or marks that are none.
    """

    title: str
    counts: tuple[float, ...]
    low: float
    high: float
    subtitle: str = ""
    marks: tuple[Mark, ...] = ()

    def __post_init__(self) -> None:
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise RequestError(
                f"a histogram goes from a number up to a larger one, and {self.low} to "
                f"{self.high} came"
            )
        wrong = [count for count in self.counts if not 0 <= count < math.inf]
        if wrong:
            raise RequestError(f"a histogram has counts of 0 or more, and {wrong[0]} came")
        if not any(self.counts):
            raise RequestError("a histogram has at least one count above 0, and none came")
        for mark in self.marks:
            if not math.isfinite(mark.value):
                raise RequestError(f"a mark stands at a finite value, and {mark.value} came")


@dataclass(frozen=True)
class Histograms:
    """Small histograms side by side, as many as there are layers.

    The heights are logarithms, so that the few outliers that decide a range are seen next to the
    millions of values around 0. A histogram of more than 64 bins is drawn with 64, each the mean
    of the bins that it covers.
    """

    items: tuple[Histogram, ...]
    caption: str = ""


@dataclass(frozen=True)
class Point:
    """One point of a curve; ``marked`` makes it stand out, and its label first to find room."""

    x: float
    y: float
    label: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Curve:
    """Points in a plane, joined by a line in their order: accuracy against milliseconds.

    The axes show the part of the plane where the points are, not 0. Labels do not cover each
    other. Of more than 12 points only the marked ones are labelled; the others, and a label that
    finds no room, show theirs to a pointer that rests on the point. RequestError for no points
    and for coordinates that are no numbers.
    """

    points: tuple[Point, ...]
    x_label: str
    y_label: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.points:
            raise RequestError("a curve has one or more points, and none came")
        for point in self.points:
            if not math.isfinite(point.x) or not math.isfinite(point.y):
                raise RequestError(
                    f"a point of a curve has finite coordinates, and ({point.x}, {point.y}) came"
                )


@dataclass(frozen=True)
class Series:
    """One line of a chart: (x, y) points, x rising; one without ``label`` is not in the legend."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis, such as milliseconds over time.

    ``from_zero``: the y axis begins at 0; otherwise it shows the part where the lines are.
    RequestError for no points, for more than eight lines, for coordinates that are no numbers and
    for an x that goes back.
    """

    series: tuple[Series, ...]
    x_label: str
    y_label: str
    caption: str = ""
    from_zero: bool = False

    def __post_init__(self) -> None:
        if not any(line.points for line in self.series):
            raise RequestError("a line chart has one or more points, and none came")
        if len(self.series) > _PALETTE:
            raise RequestError(
                f"a line chart has {_PALETTE} lines at most, and {len(self.series)} came"
            )
        for line in self.series:
            for x, y in line.points:
                if not math.isfinite(x) or not math.isfinite(y):
                    raise RequestError(
                        f"a point of a line chart has finite coordinates, and ({x}, {y}) came"
                    )
            if any(end[0] < start[0] for start, end in itertools.pairwise(line.points)):
                raise RequestError(
                    f"the x of a line chart rises, and that of {line.label!r} does not"
                )


@dataclass(frozen=True)
class Range:
    """A value with the interval that it lies in; ``text`` is the number at its end."""

    label: str
    value: float
    low: float
    high: float
    text: str

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.value <= self.high < math.inf:
            raise RequestError(
                f"a range is low <= value <= high, and {self.low}, {self.value}, {self.high} came"
            )


@dataclass(frozen=True)
class Ranges:
    """Values with their intervals, one row each, on a common axis; ``mark`` is a line through all.

    Such as ratios to a reference, with the line at 1. RequestError for none.
    """

    items: tuple[Range, ...]
    mark: float | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.items:
            raise RequestError("ranges are one or more, and none came")


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture with its caption.

    ``pixels``: (height, width, 3) uint8 BGR, or (height, width) uint8 grey. Wider ones than 960
    pixels are scaled down. ``lossless`` stores PNG (for class maps) in place of JPEG.
    """

    pixels: NDArray[np.uint8]
    caption: str = ""
    lossless: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, ``columns`` to a row (1 to 4); below each other on a phone.

    Two columns are for before and after.
    """

    items: tuple[Picture, ...]
    columns: int = 2
    caption: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.columns <= 4:
            raise RequestError(f"pictures stand in 1 to 4 columns, and {self.columns} came")


@dataclass(frozen=True, eq=False)
class Film:
    """A few frames shown in turn, over and over, by the style sheet alone.

    Browsers play few of the codecs that OpenCV writes, so a page that is to move brings its own
    frames. ``frames``: two or more (height, width, 3) uint8 BGR of one size, stored as one JPEG
    strip; together at most 16,000 rows, which is as tall as browsers draw. ``seconds``: length of
    one round. RequestError for frames that are no film.
    """

    frames: tuple[NDArray[np.uint8], ...]
    seconds: float
    caption: str = ""

    def __post_init__(self) -> None:
        if len(self.frames) < 2 or len({frame.shape for frame in self.frames}) != 1:
            raise RequestError("a film has two or more frames, all of one size")
        rows = sum(frame.shape[0] for frame in self.frames)
        if rows > _STRIP_ROWS:
            raise RequestError(
                f"a film has at most {_STRIP_ROWS} rows in all, and {rows} came; give fewer or "
                "smaller frames"
            )
        if not self.seconds > 0:
            raise RequestError(f"a film lasts longer than 0 s, and {self.seconds} came")


@dataclass(frozen=True)
class Details:
    """Blocks under a line that opens and closes them; closed at first, open in print."""

    title: str
    blocks: tuple[Block, ...]


Block = (
    Figures
    | Paragraph
    | Code
    | Table
    | Bars
    | Stack
    | Histograms
    | Curve
    | LineChart
    | Ranges
    | Pictures
    | Film
    | Details
)


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; an empty ``title`` shows none, as for the figures at the top."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """The whole page."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    footer: str = ""

    def to_html(self) -> str:
        """The page as text; all that was given as text is escaped."""
        sections = "\n".join(_section(section) for section in self.sections)
        footer = f"<footer>{_text(self.footer)}</footer>\n" if self.footer else ""
        return _PAGE.format(
            title=_text(self.title),
            subtitle=f'<p class="subtitle">{_text(self.subtitle)}</p>' if self.subtitle else "",
            style=_STYLE,
            sections=sections,
            footer=footer,
        )

    def write(self, path: Path | str) -> Path:
        """Writes the page to ``path`` and returns it; whole, or not at all.

        Raises SinkError when the file cannot be written.
        """
        target = Path(path)
        # A path that came from a file name may hold bytes that are no text.
        page = self.to_html().encode("utf-8", errors="replace")
        beside: Path | None = None
        try:
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=".report-", suffix=".html")
            beside = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(page)
            # mkstemp lets only the owner read; a report is for whoever may read the folder.
            beside.chmod(0o644)
            beside.replace(target)
        except OSError as error:
            if beside is not None:
                beside.unlink(missing_ok=True)
            raise SinkError(
                f"the report cannot be written to {target} ({error.strerror or error}); "
                "give a file name in a folder that exists and can be written"
            ) from error
        return target


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _name(name: str) -> str:
    """A name of a layer or tensor, which may break after the signs that join its words."""
    return re.sub(r"([/._:,@])(?=[A-Za-z])", r"\1<wbr>", _text(name))


def _section(section: Section) -> str:
    heading = f"<h2>{_text(section.title)}</h2>\n" if section.title else ""
    return f"<section>\n{heading}{''.join(_block(block) for block in section.blocks)}</section>"


def _block(block: Block) -> str:
    if isinstance(block, Figures):
        return _figures(block)
    if isinstance(block, Paragraph):
        return f"<p>{_text(block.text)}</p>\n"
    if isinstance(block, Code):
        return f"<pre><code>{_text(block.text)}</code></pre>\n"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Bars):
        return _bars(block)
    if isinstance(block, Stack):
        return _stack(block)
    if isinstance(block, Histograms):
        return _histograms(block)
    if isinstance(block, Curve):
        return _curve(block)
    if isinstance(block, LineChart):
        return _line_chart(block)
    if isinstance(block, Ranges):
        return _ranges(block)
    if isinstance(block, Film):
        return _film(block)
    if isinstance(block, Details):
        inner = "".join(_block(part) for part in block.blocks)
        return f"<details>\n<summary>{_text(block.title)}</summary>\n{inner}</details>\n"
    return _pictures(block)


def _figures(block: Figures) -> str:
    tiles = []
    for figure in block.items:
        note = f'<span class="note">{_text(figure.note)}</span>' if figure.note else ""
        tiles.append(
            f'<div class="tile"><span class="value">{_text(figure.value)}</span>'
            f'<span class="label">{_text(figure.label)}</span>{note}</div>\n'
        )
    return f'<div class="tiles">\n{"".join(tiles)}</div>\n'


def _table(block: Table) -> str:
    kinds = [
        ' class="number"' if letter == "r" else ""
        for letter in block.align or "l" * len(block.header)
    ]
    # The bars of a column can be compared only if the texts after them are equally wide.
    widths = [
        max((len(cell.text) for cell in column if isinstance(cell, Share)), default=0)
        for column in zip(block.header, *block.rows, strict=True)
    ]

    long = " long" if len(block.rows) > _LONG_TABLE else ""

    def row(cells: tuple[str | Share, ...], tag: str) -> str:
        inner = "".join(
            f"<{tag}{kind}>{_cell(cell, width, bool(long) and index == 0)}</{tag}>"
            for index, (cell, kind, width) in enumerate(zip(cells, kinds, widths, strict=True))
        )
        return f"<tr>{inner}</tr>\n"

    head = f"<thead>{row(block.header, 'th')}</thead>\n"
    body = f"<tbody>\n{''.join(row(cells, 'td') for cells in block.rows)}</tbody>\n"
    return f'{_caption(block.caption)}<div class="wide{long}"><table>\n{head}{body}</table></div>\n'


def _cell(cell: str | Share, width: int, may_break: bool) -> str:
    """What a cell holds; the text after a bar gets room for ``width`` digits.

    ``may_break``: it is a name, which a narrow column may break.
    """
    if isinstance(cell, str):
        return _name(cell) if may_break else _text(cell)
    return (
        f'<span class="share">{_bar(cell.value * 100)}'
        f'<span class="number" style="width:{width}ch">{_text(cell.text)}</span></span>'
    )


def _bar(length: float) -> str:
    """A bar of ``length`` per cent on its track."""
    drawn = f'<rect class="p0" width="{length:.2f}%" height="10" rx="3"/>' if length else ""
    return (
        '<svg class="bar" width="100%" height="10" aria-hidden="true">'
        f'<rect class="track" width="100%" height="10" rx="3"/>{drawn}</svg>'
    )


def _bars(block: Bars) -> str:
    """Rows of label, bar and number.

    Only the bars are SVG, with lengths in per cent: text in a scaled drawing would shrink with it
    on a phone, and CSS backgrounds would vanish in print.
    """
    values = [bar.value for bar in block.items if bar.value is not None]
    full = block.full if block.full is not None else max(values, default=0.0)
    rows = []
    for bar in block.items:
        swatch = ""
        if bar.colour is not None:
            red, green, blue = bar.colour
            swatch = _swatch(f'style="fill:rgb({red}, {green}, {blue})"')
        length = min(bar.value / full, 1.0) * 100 if bar.value is not None and full > 0 else 0.0
        number = "number" if bar.value is not None else "number faint"
        rows.append(
            f'<div class="row"><span class="name">{swatch}{_text(bar.label)}</span>'
            f'{_bar(length)}<span class="{number}">{_text(bar.text)}</span></div>\n'
        )
    return f'{_caption(block.caption)}<div class="bars">\n{"".join(rows)}</div>\n'


def _stack(block: Stack) -> str:
    total = sum(part.value or 0.0 for part in block.parts)
    drawn, legend = [], []
    start = 0.0
    for index, part in enumerate(block.parts):
        length = (part.value or 0.0) / total * 100
        paint = f'class="p{index % _PALETTE}"'
        drawn.append(f'<rect {paint} x="{start:.2f}%" width="{length:.2f}%" height="28"/>')
        start += length
        legend.append(
            f'<span class="key">{_swatch(paint)}{_text(part.label)} '
            f'<span class="number">{_text(part.text)}</span></span>\n'
        )
    return (
        f'{_caption(block.caption)}<svg class="stack" width="100%" height="28" aria-hidden="true">'
        f'{"".join(drawn)}</svg>\n<div class="legend">\n{"".join(legend)}</div>\n'
    )


def _swatch(paint: str) -> str:
    """A small square; ``paint`` is the attribute that gives its colour."""
    return (
        '<svg class="swatch" width="12" height="12" aria-hidden="true">'
        f'<rect {paint} width="12" height="12" rx="3"/></svg>'
    )


def _histograms(block: Histograms) -> str:
    panels = []
    for item in block.items:
        subtitle = f'<span class="note">{_text(item.subtitle)}</span>' if item.subtitle else ""
        panels.append(
            f'<div class="panel"><span class="title">{_name(item.title)}</span>{subtitle}'
            f"{_labels(_mark_labels(item))}{_shape(item)}{_labels(_axis_labels(item))}</div>\n"
        )
    scale = (
        "Counts on a log scale: each line across stands for 1000 times fewer than the one above."
    )
    return (
        f'{_caption(block.caption)}<div class="panels">\n{"".join(panels)}</div>\n'
        f'<p class="scale">{scale}</p>\n'
    )


def _reach(item: Histogram) -> tuple[float, float]:
    """The values at the left and right end of a histogram's axis."""
    values = [item.low, item.high, *(mark.value for mark in item.marks)]
    return min(values), max(values)


def _shape(item: Histogram) -> str:
    """The drawing of one histogram, stretched to its panel; it holds no text that could stretch."""
    start, end = _reach(item)

    def across(value: float) -> str:
        return f"{(value - start) / (end - start) * _PANEL_UNITS:.0f}"

    edges, heights, decades = _log_heights(item.counts)
    places = [across(item.low + edge * (item.high - item.low)) for edge in edges]
    steps = "".join(
        f"V{_PANEL_HEIGHT * (1 - height):.4g}H{place}"
        for height, place in zip(heights, places[1:], strict=True)
    )
    grid = "".join(
        f"M0 {_PANEL_HEIGHT * power / decades:.4g}H{_PANEL_UNITS}"
        for power in range(0, math.ceil(decades), 3)
    )
    if start < 0 < end:
        grid += f"M{across(0)} 0V{_PANEL_HEIGHT}"
    marks = "".join(
        f'<path class="mark" d="M{across(mark.value)} 0V{_PANEL_HEIGHT}"/>' for mark in item.marks
    )
    return (
        f'<svg class="shape" width="100%" height="{_PANEL_HEIGHT}" '
        f'viewBox="0 0 {_PANEL_UNITS} {_PANEL_HEIGHT}" preserveAspectRatio="none" '
        f'aria-hidden="true"><path class="grid" d="{grid}"/>'
        f'<path class="p0" d="M{places[0]} {_PANEL_HEIGHT}{steps}V{_PANEL_HEIGHT}Z"/>{marks}</svg>'
    )


def _log_heights(
    counts: tuple[float, ...],
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Edges (bars + 1) of the bars from 0 to 1, heights (bars) from 0 to 1, decades of the axis.

    The axis begins at half of the smallest count, so that it is seen too.
    """
    values = np.asarray(counts, np.float64)
    bars = min(len(values), _PANEL_BARS)
    edges = np.arange(bars + 1) * len(values) // bars
    # Means, because the number of bins that a bar covers differs by one.
    means = np.add.reduceat(values / values.max(), edges[:-1]) / np.diff(edges)
    seen = means > 0
    logs = np.log10(means[seen])
    floor = float(logs.min()) - math.log10(2)
    decades = float(logs.max()) - floor
    heights = np.zeros(bars)
    heights[seen] = (logs - floor) / decades
    return edges / len(values), heights, decades


_Label = tuple[int, float, str]


def _mark_labels(item: Histogram) -> list[_Label]:
    """(row, place from 0 to 1, text) of each mark; a label that would cover another is higher."""
    start, end = _reach(item)
    placed: list[_Label] = []
    for mark in sorted(item.marks, key=lambda mark: mark.value):
        place, text = (mark.value - start) / (end - start), mark.label or _number(mark.value)
        row = 0
        while any(row == other and _covers(place, text, at, by) for other, at, by in placed):
            row += 1
        placed.append((row, place, text))
    return placed


def _axis_labels(item: Histogram) -> list[_Label]:
    """Both ends of the axis, and 0 where it lies between with room for it."""
    start, end = _reach(item)
    labels = [(0, 0.0, _number(start)), (0, 1.0, _number(end))]
    if start < 0 < end:
        zero = -start / (end - start)
        if not any(_covers(zero, "0", place, text) for _, place, text in labels):
            labels.append((0, zero, "0"))
    return labels


def _covers(place: float, text: str, other: float, by: str) -> bool:
    """Whether two labels in one row would touch in the narrowest panel."""
    width, its = (min(len(words) * _LETTER / _PANEL_NARROW, 1.0) for words in (text, by))
    left, right = place * (1 - width), other * (1 - its)
    gap = _LETTER / _PANEL_NARROW
    return left < right + its + gap and right < left + width + gap


def _labels(labels: list[_Label]) -> str:
    rows = max((row + 1 for row, _, _ in labels), default=0)
    # Shifted left by the share that it is placed at, a label at either end ends with the panel.
    spans = "".join(
        f'<span style="bottom:{row * _LABEL_ROW}px;left:{place * 100:.1f}%;'
        f'transform:translateX(-{place * 100:.1f}%)">{_text(text)}</span>'
        for row, place, text in labels
    )
    return f'<div class="labels" style="height:{rows * _LABEL_ROW}px">{spans}</div>'


def _number(value: float) -> str:
    """A value with three digits, as a person writes it: 0.031, 4.5, 12800, 1.2e-7."""
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1e6:
        digits = max(2 - math.floor(math.log10(size)), 0) if size else 0
        text = f"{value:.{digits}f}"
        text = text.rstrip("0").rstrip(".") if digits else text
    else:
        mantissa, _, power = f"{value:.2e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return text.replace("-", _MINUS)


@dataclass(frozen=True)
class _Box:
    """A rectangle in a plot whose width changes with the page.

    ``place``: share of the plot's width, from where ``left`` and ``right`` are counted in pixels.
    """

    place: float
    left: float
    right: float
    top: float
    bottom: float

    def touches(self, other: _Box) -> bool:
        """Whether the two overlap at some width that the plot may have."""
        if self.bottom <= other.top or other.bottom <= self.top:
            return False
        # What is left of another at the narrowest and at the widest is so in between.
        apart = [width * (other.place - self.place) for width in _CURVE_WIDTHS]
        before = all(step + other.left >= self.right for step in apart)
        after = all(self.left >= step + other.right for step in apart)
        return not before and not after

    def touches_any(self, others: Sequence[_Box]) -> bool:
        return any(self.touches(other) for other in others)

    def fits(self) -> bool:
        """Whether the plot holds it at each width."""
        return (
            self.top >= 0
            and self.bottom <= _CURVE_HEIGHT
            and all(
                self.place * width + self.left >= -_CURVE_MARGIN
                and self.place * width + self.right <= width + _CURVE_MARGIN
                for width in _CURVE_WIDTHS
            )
        )


@dataclass(frozen=True)
class _Spot:
    """Where the label of a point could stand: its anchor, and pixels from the point."""

    anchor: str
    dx: float
    dy: float
    far: bool = False

    def box(self, place: float, y: float, text: str) -> _Box:
        width = len(text) * _CURVE_LETTER
        start = self.dx - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        baseline = y + self.dy
        return _Box(place, start, start + width, baseline - 12, baseline + 4)

    def lead(self, place: float, y: float) -> list[_Box]:
        """What the thin line covers that joins the point and a label far from it."""
        x, down = self.lead_end()
        return [
            _Box(place, x * part - 1, x * part + 1, y + down * part - 1, y + down * part + 1)
            for part in np.linspace(0.0, 1.0, 9).tolist()
        ]

    def lead_end(self) -> tuple[float, float]:
        """Where that line meets the label, in pixels from the point."""
        return self.dx, self.dy + (4 if self.dy < 0 else -12)


_NEAR = (
    _Spot("middle", 0, -12),
    _Spot("middle", 0, 20),
    _Spot("start", 11, 4),
    _Spot("end", -11, 4),
    _Spot("start", 4, -12),
    _Spot("end", -4, -12),
    _Spot("start", 4, 20),
    _Spot("end", -4, 20),
)
# A label that finds no room beside its point stands farther off, joined to it by a thin line.
_FAR = tuple(
    _Spot("middle" if dx == 0 else "start" if dx > 0 else "end", dx, dy, far=True)
    for away in range(16, 272, 8)
    for dx in (0, 12, -12, 36, -36, 72, -72)
    for dy in (-12 - away, 20 + away)
)


def _curve(block: Curve) -> str:
    """Sizes across are per cent, sizes down and text are pixels; so text stays as it is."""
    x_ticks = _ticks([point.x for point in block.points])
    y_ticks = _ticks([point.y for point in block.points])

    def share(value: float, ticks: list[tuple[float, str]]) -> float:
        return (value - ticks[0][0]) / (ticks[-1][0] - ticks[0][0])

    places = [share(point.x, x_ticks) for point in block.points]
    heights = [(1 - share(point.y, y_ticks)) * _CURVE_HEIGHT for point in block.points]
    drawn = []
    for value, text in x_ticks:
        at = f"{share(value, x_ticks):.2%}"
        drawn.append(
            f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{_CURVE_HEIGHT}"/>'
            f'<text class="tick" x="{at}" y="{_CURVE_HEIGHT + 20}" text-anchor="middle">'
            f"{text}</text>\n"
        )
    for value, text in y_ticks:
        y = (1 - share(value, y_ticks)) * _CURVE_HEIGHT
        drawn.append(
            f'<line class="grid" x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="-8" y="{y + 4:.1f}" text-anchor="end">{text}</text>\n'
        )
    drawn.extend(
        f'<line class="line" x1="{places[end - 1]:.2%}" x2="{places[end]:.2%}" '
        f'y1="{heights[end - 1]:.1f}" y2="{heights[end]:.1f}"/>\n'
        for end in range(1, len(places))
    )
    spots = _spots(block.points, places, heights)
    for index, spot in spots.items():
        if spot.far:
            x, down = spot.lead_end()
            # A drawing in the drawing: its corner is at per cent, and its inside is in pixels.
            drawn.append(
                f'<svg x="{places[index]:.2%}" y="{heights[index]:.1f}" overflow="visible">'
                f'<line class="lead" x2="{x:g}" y2="{down:g}"/></svg>\n'
            )
    for point, place, y in zip(block.points, places, heights, strict=True):
        kind, radius = ("point marked", 7) if point.marked else ("point", 4)
        words = f"{point.label} ({_number(point.x)}, {_number(point.y)})".strip()
        drawn.append(
            f'<circle class="{kind}" cx="{place:.2%}" cy="{y:.1f}" r="{radius}">'
            f"<title>{_text(words)}</title></circle>\n"
        )
    for index, spot in spots.items():
        point = block.points[index]
        drawn.append(
            f'<text class="{"name marked" if point.marked else "name"}" x="{places[index]:.2%}" '
            f'dx="{spot.dx:g}" y="{heights[index] + spot.dy:.1f}" text-anchor="{spot.anchor}">'
            f"{_text(_short(point.label))}</text>\n"
        )
    side = max(len(text) for _, text in y_ticks) * _CURVE_LETTER + 10
    return (
        f'{_caption(block.caption)}<div class="curve"><span class="axis">{_text(block.y_label)}'
        f'</span>\n<svg class="plot" height="{_CURVE_HEIGHT}" '
        f'style="margin-left:{side:.0f}px;width:calc(100% - {side + 16:.0f}px)">\n'
        f"{''.join(drawn)}</svg>\n"
        f'<span class="axis x">{_text(block.x_label)}</span></div>\n'
    )


def _line_chart(block: LineChart) -> str:
    """The lines are stretched to the page, their strokes are not; text stays as it is."""
    points = [point for line in block.series for point in line.points]
    # Those outside of the points are not drawn.
    x_ticks = _ticks([x for x, _ in points], _CHART_STEPS)
    y_ticks = _ticks([y for _, y in points] + ([0.0] if block.from_zero else []))
    # Time does not go on after the last point, so that the line need not stop at a tick.
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    if not right > left:
        left, right = x_ticks[0][0], x_ticks[-1][0]

    def across(x: float) -> float:
        return (x - left) / (right - left)

    def down(y: float) -> float:
        return (1 - (y - y_ticks[0][0]) / (y_ticks[-1][0] - y_ticks[0][0])) * _CHART_HEIGHT

    drawn = []
    for value, text in x_ticks:
        if 0 <= across(value) <= 1:
            at = f"{across(value):.2%}"
            drawn.append(
                f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{_CHART_HEIGHT}"/>'
                f'<text class="tick" x="{at}" y="{_CHART_HEIGHT + 20}" text-anchor="middle">'
                f"{text}</text>\n"
            )
    for value, text in y_ticks:
        y = down(value)
        drawn.append(
            f'<line class="grid" x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="-8" y="{y + 4:.1f}" text-anchor="end">{text}</text>\n'
        )
    traces = "".join(_trace(line, index, across, down) for index, line in enumerate(block.series))
    keys = [
        (_swatch(f'class="p{index}"'), _text(line.label))
        for index, line in enumerate(block.series)
        if line.label
    ]
    legend = "".join(f'<span class="key">{swatch}{label}</span>\n' for swatch, label in keys)
    side = max(len(text) for _, text in y_ticks) * _CURVE_LETTER + 10
    return (
        f'{_caption(block.caption)}<div class="curve"><span class="axis">{_text(block.y_label)}'
        f'</span>\n<svg class="plot" height="{_CHART_HEIGHT}" '
        f'style="margin-left:{side:.0f}px;width:calc(100% - {side + 16:.0f}px)">\n'
        f"{''.join(drawn)}"
        f'<svg width="100%" height="{_CHART_HEIGHT}" viewBox="0 0 {_CHART_UNITS} {_CHART_HEIGHT}" '
        f'preserveAspectRatio="none">{traces}</svg></svg>\n'
        f'<span class="axis x">{_text(block.x_label)}</span>'
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + "</div>\n"
    )


def _trace(
    line: Series, index: int, across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    if not line.points:
        return ""
    places = [f"{across(x) * _CHART_UNITS:.1f} {down(y):.1f}" for x, y in line.points]
    # A path of one point has no length, and is drawn as a dot if it has a little.
    path = "L".join(places) if len(places) > 1 else f"{places[0]}h.01"
    title = f"<title>{_text(line.label)}</title>" if line.label else ""
    return f'<path class="trace t{index}" d="M{path}">{title}</path>'


def _ranges(block: Ranges) -> str:
    values = [value for item in block.items for value in (item.low, item.high)]
    if block.mark is not None:
        values.append(block.mark)
    low, high = min(values), max(values)
    room = (high - low) * 0.04 or max(abs(high), 1.0) * 0.05
    start, end = low - room, high + room

    def at(value: float) -> str:
        return f"{(value - start) / (end - start):.2%}"

    mark = ""
    if block.mark is not None:
        place = at(block.mark)
        mark = f'<line class="mark" x1="{place}" x2="{place}" y1="0" y2="22"/>'
    rows = "".join(
        f'<div class="row"><span class="name"><span>{_name(item.label)}</span></span>'
        f'<svg class="range" width="100%" height="22" aria-hidden="true">'
        f'<line class="grid" x1="0" x2="100%" y1="11" y2="11"/>{mark}'
        f'<line class="reach" x1="{at(item.low)}" x2="{at(item.high)}" y1="11" y2="11"/>'
        f'<circle class="point" cx="{at(item.value)}" cy="11" r="6"/></svg>'
        f'<span class="number">{_text(item.text)}</span></div>\n'
        for item in block.items
    )
    ends = [(0, 0.0, _number(float(f"{start:.3g}"))), (0, 1.0, _number(float(f"{end:.3g}")))]
    scale = f'<div class="row ends"><span></span>{_labels(ends)}<span></span></div>\n'
    return f'{_caption(block.caption)}<div class="ranges">\n{rows}{scale}</div>\n'


def _ticks(values: list[float], steps: int = 4) -> list[tuple[float, str]]:
    """Round values with their texts; ``values`` lie between the first and the last.

    ``steps``: at most so many from tick to tick, and no fewer than half of that.
    Steps of 1, 2, 2.5 and 5 times a power of ten; each is at most double the one before, which is
    why a step of too many ticks is followed by one of enough.
    """
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if not high - low > 1e-9 * size:
        margin = size / 10 or 1.0
        low, high = low - margin, high + margin
    power = math.floor(math.log10((high - low) / steps)) - 1
    while True:
        for factor, decimals in ((1.0, 0), (2.0, 0), (2.5, 1), (5.0, 0)):
            step = factor * 10.0**power
            # A value that is a tick but for rounding is one.
            first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
            if last - first <= steps:
                shown = max(decimals - power, 0)
                plain = shown <= 9 and size < 1e9
                return [
                    (
                        index * step,
                        f"{index * step:.{shown}f}".replace("-", _MINUS)
                        if plain
                        else _number(index * step),
                    )
                    for index in range(first, last + 1)
                ]
        power += 1


def _spots(
    points: tuple[Point, ...], places: list[float], heights: list[float]
) -> dict[int, _Spot]:
    """Where the label of each point stands, by its index; the marked points choose first."""
    dots = []
    for point, place, y in zip(points, places, heights, strict=True):
        size = 8 if point.marked else 5
        dots.append(_Box(place, -size, size, y - size, y + size))
    line = []
    for end in range(1, len(points)):
        for part in np.linspace(0.0, 1.0, 33).tolist():
            y = heights[end - 1] + (heights[end] - heights[end - 1]) * part
            place = places[end - 1] + (places[end] - places[end - 1]) * part
            line.append(_Box(place, 0, 0, y, y))
    spots: dict[int, _Spot] = {}
    labels: list[_Box] = []
    leads: list[_Box] = []
    for index in sorted(range(len(points)), key=lambda index: not points[index].marked):
        point, place, y = points[index], places[index], heights[index]
        if not point.label or not (point.marked or len(points) <= _CURVE_LABELS):
            continue
        text = _short(point.label)

        def is_free(spot: _Spot, place: float = place, y: float = y, text: str = text) -> bool:
            box = spot.box(place, y, text)
            return box.fits() and not box.touches_any(dots + labels + leads)

        near = [spot for spot in _NEAR if is_free(spot)]
        # Text on the line can be read, but is better beside it.
        off = [spot for spot in near if not spot.box(place, y, text).touches_any(line)]
        chosen = (off or near)[:1]
        if not chosen and point.marked:
            far = [spot for spot in _FAR if is_free(spot)]
            # Labels lie above the thin lines, so that one that has to may pass below them.
            clear = (
                spot
                for spot in far
                if not any(box.touches_any(labels) for box in spot.lead(place, y))
            )
            chosen = [*itertools.islice(clear, 1), *far[:1]][:1]
        for spot in chosen:
            spots[index] = spot
            labels.append(spot.box(place, y, text))
            leads.extend(spot.lead(place, y) if spot.far else ())
    return spots


def _short(label: str) -> str:
    """A label that a phone has room for."""
    return label if len(label) <= _CURVE_LONGEST else label[: _CURVE_LONGEST - 1] + "…"


def _pictures(block: Pictures) -> str:
    figures = []
    for picture in block.items:
        kind, encoded, height, width = _encoded(picture)
        caption = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
        figures.append(
            f'<figure><img src="data:image/{kind};base64,{encoded}" '
            f'width="{width}" height="{height}" alt="{_text(picture.caption)}">{caption}</figure>\n'
        )
    return (
        f'{_caption(block.caption)}<div class="pictures c{block.columns}">\n'
        f"{''.join(figures)}</div>\n"
    )


def _film(block: Film) -> str:
    strip = np.concatenate(block.frames)
    _, encoded, height, width = _encoded(Picture(strip))
    count = len(block.frames)
    caption = f"<figcaption>{_text(block.caption)}</figcaption>" if block.caption else ""
    return (
        f'<figure class="film"><div style="aspect-ratio: {width} / {height / count:g}">'
        f'<img src="data:image/jpeg;base64,{encoded}" width="{width}" height="{height}" '
        f'alt="{_text(block.caption)}" style="animation: film {block.seconds:g}s '
        f'steps({count}) infinite"></div>{caption}</figure>\n'
    )


def _encoded(picture: Picture) -> tuple[str, str, int, int]:
    """(image type, base64 text, height, width) of a picture as the page stores it."""
    pixels = picture.pixels
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise RequestError(
            "a picture of a report is (height, width, 3) uint8 BGR, or (height, width) uint8, "
            f"and {pixels.shape} {pixels.dtype} came"
        )
    height, width = pixels.shape[:2]
    if width > _PICTURE_WIDTH:
        height, width = max(round(height * _PICTURE_WIDTH / width), 1), _PICTURE_WIDTH
        # Averaging two labels' colours would make a third that no class has.
        how = cv2.INTER_NEAREST if picture.lossless else cv2.INTER_AREA
        pixels = cv2.resize(pixels, (width, height), interpolation=how)  # type: ignore[assignment]
    if picture.lossless:
        done, data = cv2.imencode(".png", pixels)
    else:
        done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise SinkError(f"OpenCV cannot encode a picture of {height}x{width} for the report")
    kind = "png" if picture.lossless else "jpeg"
    return kind, base64.b64encode(data.tobytes()).decode("ascii"), height, width


def _caption(caption: str) -> str:
    return f'<p class="caption">{_text(caption)}</p>\n' if caption else ""


#: Number of part colours in the style sheet, p0 and up.
_PALETTE = 8

# The policy in the head makes "loads nothing" a fact that browsers enforce.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{subtitle}
</header>
{sections}
{footer}</main>
</body>
</html>
"""

_STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1a2129; --soft: #5b6672; --faint: #6b7682;
  --line: #e3e7ec; --track: #e9edf1; --accent: #0f766e;
  --p0: #0f766e; --p1: #e0923b; --p2: #5673c7; --p3: #b4558d;
  --p4: #7a9b3f; --p5: #46a3c4; --p6: #c7604f; --p7: #8a8f98;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #11161b; --card: #1a2128; --ink: #e8edf2; --soft: #a3afbb; --faint: #8c98a4;
    --line: #2a343d; --track: #29323b; --accent: #4fd1c1;
    --p0: #35b5a7; --p1: #e8a657; --p2: #7f9be6; --p3: #d281b1;
    --p4: #9dbd62; --p5: #6bbfdc; --p6: #e08372; --p7: #9aa2ad;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 48px 28px 40px; }
header { margin-bottom: 28px; }
h1 { margin: 0; font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; font-weight: 700; }
h2 { margin: 0 0 14px; font-size: 20px; line-height: 1.3; letter-spacing: -0.01em; }
p { margin: 0 0 14px; max-width: 72ch; white-space: pre-line; overflow-wrap: anywhere; }
.subtitle { margin: 8px 0 0; color: var(--soft); font-size: 17px; }
.caption { margin: 18px 0 8px; color: var(--soft); font-size: 14px; }
h2 + .caption { margin-top: -8px; }
section { margin: 0 0 40px; }
section > :last-child { margin-bottom: 0; }
.tiles { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.tile {
  display: flex; flex-direction: column; min-width: 0; padding: 18px 20px 16px;
  overflow-wrap: anywhere; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px;
}
.tiles + p { margin-top: 20px; }
.value {
  font-size: 36px; line-height: 1.1; font-weight: 680; letter-spacing: -0.02em;
  color: var(--accent); font-variant-numeric: tabular-nums;
}
.label { margin-top: 6px; font-weight: 600; }
.note { color: var(--soft); font-size: 14px; line-height: 1.4; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.faint { color: var(--faint); }
.wide { overflow-x: auto; margin-bottom: 14px; }
table { width: 100%; border-collapse: collapse; font-size: 15px; }
th, td { padding: 8px 18px 8px 0; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-size: 13px; font-weight: 600; }
th:last-child, td:last-child { padding-right: 0; }
th.number, td.number { text-align: right; }
tbody tr:last-child td { border-bottom: 0; }
.bars { display: grid; gap: 9px; margin-bottom: 14px; }
.row { display: grid; grid-template-columns: 150px 1fr 72px; gap: 14px; align-items: center; }
.row .number { font-size: 15px; }
.name {
  display: flex; align-items: center; gap: 6px; font-size: 15px; line-height: 1.25;
  overflow-wrap: anywhere;
}
svg { display: block; }
.swatch { flex: none; }
.stack { border-radius: 6px; }
.track { fill: var(--track); }
.p0 { fill: var(--p0); } .p1 { fill: var(--p1); } .p2 { fill: var(--p2); } .p3 { fill: var(--p3); }
.p4 { fill: var(--p4); } .p5 { fill: var(--p5); } .p6 { fill: var(--p6); } .p7 { fill: var(--p7); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 10px 0 18px; font-size: 14px; }
.key { display: flex; align-items: center; gap: 6px; }
.key .number { color: var(--soft); }
.share { display: grid; grid-template-columns: minmax(96px, 1fr) auto; gap: 10px; }
.share { align-items: center; min-width: 168px; }
.share .bar { width: 0; min-width: 100%; }
.long { max-height: 80vh; overflow: auto; }
.long th { position: sticky; top: 0; z-index: 1; background: var(--page); border-bottom: 0; }
.long th { box-shadow: inset 0 -1px var(--line); }
.panels { display: grid; gap: 20px; margin-bottom: 10px; }
.panels { grid-template-columns: repeat(auto-fill, minmax(184px, 1fr)); }
.panel { display: flex; flex-direction: column; min-width: 0; }
.title { font-size: 14px; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }
.panel .note { font-size: 12px; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.labels { position: relative; font-size: 11px; line-height: 15px; color: var(--soft); }
.labels span {
  position: absolute; max-width: 100%; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; font-variant-numeric: tabular-nums;
}
.shape { border-bottom: 1px solid var(--faint); }
.note + .labels, .title + .labels { margin-top: auto; padding-top: 4px; box-sizing: content-box; }
.grid { stroke: var(--line); fill: none; }
.mark { stroke: var(--p6); stroke-width: 1.5; fill: none; }
.shape path { vector-effect: non-scaling-stroke; }
.scale { margin: 0 0 14px; color: var(--faint); font-size: 13px; }
.curve { margin: 0 0 18px; }
.plot { margin: 14px 16px 26px 0; overflow: visible; }
.plot text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.plot .name { stroke: var(--page); stroke-width: 4; stroke-linejoin: round; paint-order: stroke; }
.plot .name.marked { fill: var(--ink); font-weight: 600; }
.line { stroke: var(--p0); stroke-width: 2; }
.lead { stroke: var(--faint); }
.trace {
  fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke;
}
.t0 { stroke: var(--p0); } .t1 { stroke: var(--p1); } .t2 { stroke: var(--p2); }
.t3 { stroke: var(--p3); } .t4 { stroke: var(--p4); } .t5 { stroke: var(--p5); }
.t6 { stroke: var(--p6); } .t7 { stroke: var(--p7); }
.curve .legend { margin: 6px 0 0; }
.ranges { display: grid; gap: 9px; margin-bottom: 14px; }
.ranges .row { grid-template-columns: minmax(120px, 260px) 1fr minmax(150px, auto); }
.ranges .number { text-align: left; white-space: normal; }
.reach { stroke: var(--p0); stroke-width: 5; stroke-linecap: round; opacity: 0.45; }
.point { fill: var(--p0); stroke: var(--page); stroke-width: 1.5; }
.point.marked { fill: var(--p1); stroke: var(--page); stroke-width: 2; }
.axis { display: block; font-size: 13px; font-weight: 600; color: var(--soft); }
.axis.x { text-align: right; margin-right: 16px; }
details { margin: 0 0 14px; padding: 0 16px; border: 1px solid var(--line); border-radius: 10px; }
summary { margin: 0 -16px; padding: 11px 16px; font-weight: 600; cursor: pointer; }
summary + .caption { margin-top: 0; }
details > :last-child { margin-bottom: 16px; }
details > summary:last-child { margin-bottom: 0; }
.pictures { display: grid; gap: 16px; margin-bottom: 16px; }
.c2 { grid-template-columns: repeat(2, 1fr); }
.c3 { grid-template-columns: repeat(3, 1fr); }
.c4 { grid-template-columns: repeat(4, 1fr); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; border-radius: 8px; background: var(--track); }
.film { margin-bottom: 16px; }
.film div { overflow: hidden; border-radius: 8px; }
.film img { border-radius: 0; }
@keyframes film { to { transform: translateY(-100%); } }
@media (prefers-reduced-motion: reduce) { .film img { animation: none !important; } }
figcaption { margin-top: 6px; color: var(--soft); font-size: 14px; line-height: 1.4; }
pre {
  margin: 0 0 14px; padding: 14px 16px; overflow-x: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px;
}
code {
  font: 14px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
footer {
  padding-top: 16px; border-top: 1px solid var(--line); color: var(--faint); font-size: 14px;
  white-space: pre-line; overflow-wrap: anywhere;
}
@media (max-width: 640px) {
  main { padding: 28px 16px 28px; }
  h1 { font-size: 27px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .tile { padding: 14px 14px 12px; }
  .value { font-size: 28px; }
  .row { grid-template-columns: 104px 1fr 62px; gap: 10px; }
  .ranges .row { grid-template-columns: 1fr auto; gap: 4px 10px; }
  .ranges .range, .ranges .labels { grid-row: 2; grid-column: 1 / -1; }
  .c2, .c3, .c4 { grid-template-columns: 1fr; gap: 12px; }
  .long table { width: max-content; min-width: 100%; }
  .long td { max-width: 36ch; }
  .long td:first-child { max-width: 17ch; overflow-wrap: anywhere; }
  .long td:first-child { position: sticky; left: 0; background: var(--page); }
  .long th:first-child { left: 0; z-index: 2; }
  .panels { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 18px 16px; }
  details { padding: 0 12px; }
  summary { margin: 0 -12px; padding: 11px 12px; }
  section { margin-bottom: 32px; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
@media print {
  @page { margin: 16mm; }
  :root { --page: #ffffff; }
  body { font-size: 13px; }
  main { max-width: none; padding: 0; }
  figure, .tile, .row, .panel, .curve, tr, pre { break-inside: avoid; }
  .long { max-height: none; overflow: visible; }
  .long th { position: static; }
  .long table { font-size: 11px; }
  .long td { padding: 3px 12px 3px 0; }
  details::details-content { content-visibility: visible; height: auto; }
  h2, .caption { break-after: avoid; }
  pre { white-space: pre-wrap; }
  .c2 { grid-template-columns: repeat(2, 1fr); }
  .c3 { grid-template-columns: repeat(3, 1fr); }
}
"""
