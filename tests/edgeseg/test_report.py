"""The report, read back with the standard library's HTML parser."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgeseg.classes import CAMVID
from edgeseg.errors import RequestError, SinkError
from edgeseg.report import (
    Bar,
    Bars,
    Block,
    Code,
    Curve,
    Details,
    Figure,
    Figures,
    Film,
    Histogram,
    Histograms,
    LineChart,
    Mark,
    Paragraph,
    Picture,
    Pictures,
    Point,
    Range,
    Ranges,
    Report,
    Section,
    Series,
    Share,
    Stack,
    Table,
)

VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """What a page holds; fails on tags that are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        # What each element says itself, by its place in ``elements``; and the open ones' places.
        self.said: list[str] = []
        self.places: list[int] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
            self.places.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.said.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.places.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.places:
            self.said[self.places[-1]] += data

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and (kind is None or attributes.get("class") == kind)
        ]

    def words(self, tag: str, kind: str | None = None) -> list[str]:
        """What each of ``all(tag, kind)`` says."""
        return [
            said
            for (name, attributes), said in zip(self.elements, self.said, strict=True)
            if name == tag and (kind is None or attributes.get("class") == kind)
        ]


def page(*blocks: Block) -> Page:
    return Page(Report("A title", "A subtitle", (Section("Heading", blocks),)).to_html())


def pixels(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def whole_report() -> Report:
    bars = (Bar("a", 1.0, "one"), Bar("b", 3.0, "three", (1, 2, 3)))
    return Report(
        "A title",
        "A subtitle",
        (
            Section("", (Figures((Figure("42", "frames per second", "all included"),)),)),
            Section(
                "Everything",
                (
                    Paragraph("words"),
                    Code("edgeseg demo"),
                    Table(("x", "y"), (("1", Share(0.5, "half")),), "lr", "a table"),
                    Bars(bars, caption="bars"),
                    Stack(bars, "stack"),
                    Details("more", (Histograms((Histogram("h", (1, 2), 0, 1),), "shapes"),)),
                    Curve((Point(1, 2, "here"), Point(2, 3)), "ms", "mIoU", "a curve"),
                    Pictures((Picture(pixels(), "before"), Picture(pixels(), "after"))),
                ),
            ),
        ),
        "A footer",
    )


def test_the_page_is_whole_and_loads_nothing() -> None:
    source = whole_report().to_html()
    found = Page(source)
    for words in ("A title", "A subtitle", "42", "frames per second", "all included", "words"):
        assert words in found.text
    for words in ("Everything", "edgeseg demo", "a table", "bars", "stack", "after", "A footer"):
        assert words in found.text
    for words in ("half", "more", "shapes", "a curve", "here", "ms", "mIoU"):
        assert words in found.text
    assert {"charset": "utf-8"} in found.all("meta")
    assert any(meta.get("name") == "viewport" for meta in found.all("meta"))
    assert "prefers-color-scheme: dark" in source
    assert found.all("script") == found.all("link") == []
    for _, attributes in found.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", source)


HOSTILE = "<script>alert(\"1\")</script> & 'x' {title}"


def test_a_film_is_one_strip_that_moves_in_steps() -> None:
    frames = tuple(np.full((40, 60, 3), value, np.uint8) for value in (10, 120, 240))
    (image,) = page(Film(frames, 1.5, "moving")).all("img")
    assert image["width"] == "60" and image["height"] == "120"
    assert "1.5s steps(3) infinite" in (image["style"] or "")
    data = base64.b64decode((image["src"] or "").partition(",")[2])
    strip = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert strip is not None
    for index, frame in enumerate(frames):
        assert abs(int(strip[index * 40 + 20, 30, 0]) - int(frame[0, 0, 0])) <= 3


@pytest.mark.parametrize(
    "block",
    [
        Paragraph(HOSTILE),
        Code(HOSTILE),
        Figures((Figure(HOSTILE, HOSTILE, HOSTILE),)),
        Table((HOSTILE,), ((HOSTILE,),), caption=HOSTILE),
        Bars((Bar(HOSTILE, 1, HOSTILE),), caption=HOSTILE),
        Stack((Bar(HOSTILE, 1, HOSTILE),), caption=HOSTILE),
        Pictures((Picture(pixels(), HOSTILE),), caption=HOSTILE),
        Table((HOSTILE,), ((Share(0.5, HOSTILE),),)),
        Table((HOSTILE,), ((HOSTILE,),) * 40),
        Histograms((Histogram(HOSTILE, (1,), 0, 1, HOSTILE, (Mark(0.5, HOSTILE),)),), HOSTILE),
        Curve((Point(1, 2, HOSTILE, True),), HOSTILE, HOSTILE, HOSTILE),
        Details(HOSTILE, (Paragraph(HOSTILE),)),
    ],
    ids=lambda block: type(block).__name__,
)
def test_text_is_escaped(block: Block) -> None:
    source = Report(HOSTILE, HOSTILE, (Section(HOSTILE, (block,)),), HOSTILE).to_html()
    found = Page(source)
    assert found.all("script") == []
    # Title, heading, subtitle, section and footer, and at least one in the block.
    assert found.text.count(HOSTILE) >= 6
    for image in found.all("img"):
        assert image["alt"] == HOSTILE


@pytest.mark.parametrize(
    ("full", "values", "lengths"),
    [
        (None, [1.0, 4.0, 2.0], ["25.00%", "100.00%", "50.00%"]),
        (8.0, [1.0, 4.0, 16.0], ["12.50%", "50.00%", "100.00%"]),
        (1.0, [0.0, None, 0.5], ["50.00%"]),
        (None, [0.0, 0.0], []),
        (None, [], []),
    ],
)
def test_bars_have_their_lengths(
    full: float | None, values: list[float | None], lengths: list[str]
) -> None:
    found = page(Bars(tuple(Bar("x", value, "t") for value in values), full))
    assert [bar["width"] for bar in found.all("rect", "p0")] == lengths
    assert len(found.all("rect", "track")) == len(values)


def test_bars_of_classes_show_each_share_and_colour() -> None:
    shares: dict[str, float | None] = dict.fromkeys(CAMVID.names, 0.25)
    shares["sign_symbol"] = None
    found = page(Bars.of_classes(shares, CAMVID.colours))
    assert [bar["width"] for bar in found.all("rect", "p0")] == ["25.00%"] * 10
    assert found.text.count("25.0 %") == 10
    assert found.text.count("absent") == 1
    assert "sign symbol" in found.text
    styles = [rect["style"] for rect in found.all("rect") if "style" in rect]
    assert styles == [f"fill:rgb({r}, {g}, {b})" for r, g, b in CAMVID.colours]


def test_a_stack_fills_its_width() -> None:
    parts = tuple(Bar(name, value, "t") for name, value in zip("abc", (1, 2, 5), strict=True))
    drawn = [rect for rect in page(Stack(parts)).all("rect") if rect["height"] == "28"]
    assert [rect["x"] for rect in drawn] == ["0.00%", "12.50%", "37.50%"]
    assert [rect["width"] for rect in drawn] == ["12.50%", "25.00%", "62.50%"]


def test_a_table_aligns_its_columns() -> None:
    found = page(Table(("a", "b"), (("1", "2"), ("3", "4")), "lr"))
    assert [cell.get("class") for cell in found.all("td")] == [None, "number"] * 2
    assert [cell.get("class") for cell in found.all("th")] == [None, "number"]


def test_a_share_is_a_bar_in_a_cell() -> None:
    cells = (("a", Share(0.25, "25 %")), ("b", Share(0, "0 %")), ("c", Share(1, "100 %")))
    found = page(Table(("x", "y"), cells))
    assert [bar["width"] for bar in found.all("rect", "p0")] == ["25.00%", "100.00%"]
    assert len(found.all("rect", "track")) == 3
    assert found.words("span", "number") == ["25 %", "0 %", "100 %"]
    # All texts are as wide as the longest, or the bars would not have one scale.
    assert {cell["style"] for cell in found.all("span", "number")} == {"width:5ch"}


@pytest.mark.parametrize(("rows", "is_long"), [(5, False), (24, False), (25, True), (60, True)])
def test_a_long_table_scrolls_under_its_header(rows: int, is_long: bool) -> None:
    found = page(Table(("name",), (("stage3.block_1/conv",),) * rows))
    assert len(found.all("div", "wide long")) == is_long
    assert len(found.all("div", "wide")) == (not is_long)
    assert found.words("td") == ["stage3.block_1/conv"] * rows


def test_details_hold_blocks_and_are_closed() -> None:
    inner = Details("inner", (Table(("a",), (("b",),)),))
    found = page(Details("outer", (Paragraph("words"), inner)))
    assert found.all("details") == [{}, {}]
    assert found.words("summary") == ["outer", "inner"]
    assert found.words("p")[-1] == "words"
    assert found.words("td") == ["b"]


def bars_of(path: str) -> list[tuple[float, float, float]]:
    """(left, right, height) of each step of a drawn histogram, in units of its drawing."""
    start, rest = path.removeprefix("M").split("V", 1)
    left = float(start.split()[0])
    steps = rest.removesuffix("V64Z").split("V")
    bars = []
    for step in steps:
        top, right = (float(number) for number in step.split("H"))
        bars.append((left, right, 64 - top))
        left = right
    return bars


@pytest.mark.parametrize(
    ("counts", "low", "high", "marks"),
    [
        ((1, 10, 100, 1000, 0, 10), -1.0, 2.0, ()),
        ((5,), 0.0, 1.0, ()),
        ((0, 0, 7, 7), -3.0, -1.0, (-2.0,)),
        ((0.001, 0.2, 0.5), 0.0, 3.0, (1.5, 2.0)),
        ((1e300, 1, 3e5), 0.0, 1e-30, ()),
        ((1, 2, 3, 4), -1.0, 1.0, (-2.0, 3.0)),
        (tuple(range(64)), 0.0, 1.0, ()),
        (tuple(range(65)), 0.0, 1.0, ()),
        (tuple((7 * i) % 101 * (i % 5) for i in range(2048)), -8.0, 8.0, (-7.0, 7.0)),
        ((0,) * 500 + (1,) + (0,) * 499, -1.0, 1.0, ()),
    ],
)
def test_histograms_have_their_heights_and_places(
    counts: tuple[float, ...], low: float, high: float, marks: tuple[float, ...]
) -> None:
    item = Histogram("h", counts, low, high, "", tuple(Mark(mark) for mark in marks))
    found = page(Histograms((item,)))
    (shape,) = found.all("path", "p0")
    bars = bars_of(shape["d"] or "")
    assert len(bars) == min(len(counts), 64)
    start, end = min(low, *marks, high), max(high, *marks, low)
    means = []
    for index, (left, right, _) in enumerate(bars):
        # Which bins the bar covers, by where it is drawn.
        first, last = (
            (start + unit / 1000 * (end - start) - low) / (high - low) * len(counts)
            for unit in (left, right)
        )
        # Drawn to whole units of 1000, of which half a one can be a bin of 2048.
        edges = [index * len(counts) // len(bars), (index + 1) * len(counts) // len(bars)]
        slack = 0.5001 / 1000 * (end - start) / (high - low) * len(counts)
        assert [first, last] == pytest.approx(edges, abs=slack)
        means.append(float(np.mean(np.asarray(counts[edges[0] : edges[1]], np.float64))))
    floor, peak = min(mean for mean in means if mean) / 2, max(means)
    for mean, (_, _, height) in zip(means, bars, strict=True):
        wanted = 64 * np.log(mean / floor) / np.log(peak / floor) if mean else 0
        assert height == pytest.approx(wanted, abs=0.01)
    drawn = [float((mark["d"] or "")[1:].split()[0]) for mark in found.all("path", "mark")]
    assert drawn == pytest.approx([1000 * (mark - start) / (end - start) for mark in marks], abs=1)


def test_lines_of_a_histogram_are_a_thousand_times_apart() -> None:
    found = page(Histograms((Histogram("h", (1, 1e3, 1e6, 1e9), 0, 4),)))
    (grid,) = found.all("path", "grid")
    tops = [float(line.split("H")[0]) for line in (grid["d"] or "").split("M0 ")[1:]]
    (shape,) = found.all("path", "p0")
    heights = [64 - height for _, _, height in bars_of(shape["d"] or "")]
    assert tops == pytest.approx(heights[::-1], abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "marks", "axis", "labels"),
    [
        (-1.0, 1.0, (), ["−1", "1", "0"], []),
        (-6.126, 5.0, (-4.0, 4.0), ["−6.13", "5", "0"], ["−4", "4"]),
        (0.0, 12345.6, (10000.0,), ["0", "12346"], ["10000"]),
        # Nothing to tell 0 from the end of the axis by: the end is enough.
        (-0.01, 30.0, (29.0,), ["−0.01", "30"], ["29"]),
        (0.00123456, 0.0987, (), ["0.00123", "0.0987"], []),
        (1.2e-7, 3e6, (), ["1.2e−7", "3e6"], []),
        (-1.0, 1.0, (2.0,), ["−1", "2", "0"], ["2"]),
    ],
)
def test_histograms_say_their_ends(
    low: float, high: float, marks: tuple[float, ...], axis: list[str], labels: list[str]
) -> None:
    item = Histogram("h", (1, 2), low, high, "", tuple(Mark(mark) for mark in marks))
    said = page(Histograms((item,))).words("span")
    assert said == ["h", *labels, *axis]


def test_labels_of_marks_that_are_close_stand_in_rows() -> None:
    marks = (*(Mark(value, f"t {value}") for value in (0.5, 0.52, 0.54)), Mark(-0.9, "t -0.9"))
    found = page(Histograms((Histogram("h", (1, 2), -1, 1, "", marks),)))
    places = dict(zip(found.words("span"), found.all("span"), strict=True))
    rows = {
        name: (attributes["style"] or "").split(";")[0]
        for name, attributes in places.items()
        if name.startswith("t ")
    }
    assert rows == {
        "t -0.9": "bottom:0px",
        "t 0.5": "bottom:0px",
        "t 0.52": "bottom:15px",
        "t 0.54": "bottom:30px",
    }


def test_a_page_of_sixty_histograms_stays_small() -> None:
    counts = tuple(np.random.default_rng(0).integers(0, 10**6, 4096).tolist())
    item = Histogram("stage3.block1.conv2", counts, -3, 3, "dB", (Mark(-2), Mark(2)))
    source = Report("", "", (Section("", (Histograms((item,) * 60),)),)).to_html()
    assert len(Page(source).all("path", "p0")) == 60
    assert len(source) < 150_000


def numbers(attributes: dict[str, str | None], *names: str) -> list[float]:
    return [float((attributes[name] or "").removesuffix("%")) for name in names]


def ticks_of(found: Page, anchor: str) -> list[tuple[float, float]]:
    """(place, value) of the ticks of one axis: anchor "middle" for x, "end" for y."""
    return [
        (numbers(attributes, "x" if anchor == "middle" else "y")[0], float(said.replace("−", "-")))
        for attributes, said in zip(
            found.all("text", "tick"), found.words("text", "tick"), strict=True
        )
        if attributes["text-anchor"] == anchor
    ]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([11.1, 12.9, 16.0, 29.3], [0.576, 0.5969, 0.5983, 0.5991]),
        ([0.0, 100.0], [1.0, 1.0]),
        ([3.0], [0.0]),
        ([-5.0, 5.0, -4.0], [-1e-3, 2e-3, 0.0]),
        ([1e5, 3e5], [0.59991, 0.59992]),
        ([0.1, 0.3], [0.7, 0.2]),
        ([1.0, 1.0 + 1e-15], [2.0, 2.0]),
    ],
)
def test_points_of_a_curve_stand_where_its_axes_say(x: list[float], y: list[float]) -> None:
    points = tuple(Point(*pair) for pair in zip(x, y, strict=True))
    found = page(Curve(points, "ms", "mIoU"))
    circles = [numbers(circle, "cx", "cy") for circle in found.all("circle")]
    for values, anchor, at in ((x, "middle", 0), (y, "end", 1)):
        ticks = ticks_of(found, anchor)
        assert 3 <= len(ticks) <= 5
        steps = np.diff([value for _, value in ticks])
        assert steps == pytest.approx([steps[0]] * len(steps))
        mantissa = float(f"{steps[0]:.6e}".split("e")[0])
        assert mantissa in (1.0, 2.0, 2.5, 5.0)
        assert ticks[0][1] <= min(values) + 1e-9 and max(values) - 1e-9 <= ticks[-1][1]
        # From the first and the last tick to where each value must be.
        (here, first), (there, last) = ticks[0], ticks[-1]
        wanted = [here + (value - first) / (last - first) * (there - here) for value in values]
        shift = 4 if anchor == "end" else 0
        assert [circle[at] + shift for circle in circles] == pytest.approx(wanted, abs=0.06)
    ends = [numbers(line, "x1", "y1", "x2", "y2") for line in found.all("line", "line")]
    assert ends == [[*a, *b] for a, b in itertools.pairwise(circles)]


# --- lines over time

LINES = (
    Series("time since the mask before", ((0.0, 12.0), (0.5, 30.0), (2.0, 8.0))),
    Series("mask age <&>", ((0.0, 3.0), (1.0, 24.5))),
)


@pytest.mark.parametrize("from_zero", [True, False])
def test_lines_run_where_the_axes_say(from_zero: bool) -> None:
    found = page(LineChart(LINES, "seconds", "milliseconds", "both", from_zero=from_zero))
    for words in ("seconds", "milliseconds", "both", "time since the mask before", "mask age <&>"):
        assert words in found.text
    traces = [path for path in found.all("path") if "trace" in (path.get("class") or "")]
    assert [path["class"] for path in traces] == ["trace t0", "trace t1"]
    x_ticks, y_ticks = ticks_of(found, "middle"), ticks_of(found, "end")
    assert 0 in [value for _, value in y_ticks] if from_zero else True
    (here, first), (there, last) = y_ticks[0], y_ticks[-1]
    for path, line in zip(traces, LINES, strict=True):
        drawn = [
            tuple(float(number) for number in point.split())
            for point in (path["d"] or "").removeprefix("M").split("L")
        ]
        assert len(drawn) == len(line.points)
        for (x, y), (across, down) in zip(line.points, drawn, strict=True):
            # The page goes from the first to the last second, 1000 units.
            assert across == pytest.approx(x / 2.0 * 1000, abs=0.06)
            wanted = here - 4 + (y - first) / (last - first) * (there - here)
            assert down == pytest.approx(wanted, abs=0.1)
    for place, value in x_ticks:
        assert place == pytest.approx(value / 2.0 * 100, abs=0.006)


def test_a_line_of_one_point_is_a_dot() -> None:
    found = page(LineChart((Series("", ((3.0, 4.0),)),), "x", "y"))
    (path,) = (path for path in found.all("path") if path.get("class") == "trace t0")
    assert (path["d"] or "").endswith("h.01")
    assert found.all("span", "key") == []


def test_ranges_stand_on_one_axis() -> None:
    found = page(
        Ranges((Range("b", 1.5, 1.4, 1.8, "1.5x"), Range("c", 0.5, 0.5, 0.5, "0.5x")), mark=1.0)
    )
    reaches = [numbers(line, "x1", "x2") for line in found.all("line", "reach")]
    points = [numbers(circle, "cx")[0] for circle in found.all("circle")]
    marks = [numbers(line, "x1")[0] for line in found.all("line", "mark")]
    # The axis reaches from 0.5 to 1.8, and a little farther.
    low, high = 0.5 - 1.3 * 0.04, 1.8 + 1.3 * 0.04

    def at(value: float) -> float:
        return (value - low) / (high - low) * 100

    assert points == pytest.approx([at(1.5), at(0.5)], abs=0.006)
    assert reaches[0] == pytest.approx([at(1.4), at(1.8)], abs=0.006)
    assert marks == pytest.approx([at(1.0)] * 2, abs=0.006)
    assert "1.5x" in found.text and "0.5x" in found.text


def test_ranges_that_are_all_the_same() -> None:
    found = page(Ranges((Range("b", 1.0, 1.0, 1.0, "1x"),), mark=1.0))
    assert numbers(found.all("circle")[0], "cx") == pytest.approx([50.0])


def text_boxes(found: Page, width: float) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of the labels of a curve whose plot is ``width`` pixels wide."""
    boxes = []
    for kind in ("name", "name marked"):
        labels = zip(found.all("text", kind), found.words("text", kind), strict=True)
        for attributes, said in labels:
            place, dx, baseline = numbers(attributes, "x", "dx", "y")
            # A generous mean for 12 pixels of a sans serif, bold.
            long = 7.2 * len(said)
            shift = {"start": 0.0, "middle": long / 2, "end": long}[attributes["text-anchor"] or ""]
            left = place / 100 * width + dx - shift
            boxes.append((left, baseline - 11, left + long, baseline + 3))
    return boxes


@pytest.mark.parametrize("seed", range(12))
def test_labels_of_a_curve_do_not_overlap(seed: int) -> None:
    random = np.random.default_rng(seed)
    spread = (1.0, 0.1, 0.01)[seed % 3]
    count = 12
    points = tuple(
        Point(float(x), float(y), f"{index} layers left", index % 3 == 0)
        for index, (x, y) in enumerate(random.normal(0, spread, (count, 2)).round(4))
    )
    # Two far corners, so that a narrow spread is a cluster.
    points = (*points[:-2], Point(4, 4, "far corner"), Point(-4, -4, "other corner", True))
    found = page(Curve(points, "ms", "mIoU"))
    marked = {point.label for point in points if point.marked}
    assert set(found.words("text", "name marked")) == marked
    for width in (240, 286, 358, 640, 960):
        boxes = text_boxes(found, width)
        for index, (left, top, right, bottom) in enumerate(boxes):
            assert left >= -14 and right <= width + 14 and top >= 0 and bottom <= 280
            for x0, y0, x1, y1 in boxes[:index]:
                assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top


def test_a_curve_names_what_has_room() -> None:
    many = tuple(Point(i, i * i, f"n{i}", i == 7) for i in range(20))
    found = page(Curve(many, "ms", "mIoU"))
    assert found.words("text", "name") == []
    assert found.words("text", "name marked") == ["n7"]
    assert [circle["r"] for circle in found.all("circle", "point marked")] == ["7"]
    assert len(found.all("circle", "point")) == 19
    assert found.words("title")[1:4] == ["n0 (0, 0)", "n1 (1, 1)", "n2 (2, 4)"]
    # A name that no phone has room for is cut; the pointer shows the whole.
    long = page(Curve((Point(1, 2, "a" * 200, True),), "ms", "mIoU"))
    assert long.words("text", "name marked") == ["a" * 29 + "…"]
    assert long.words("title")[1] == "a" * 200 + " (1, 2)"


@pytest.mark.parametrize(
    ("shape", "lossless", "kind", "stored"),
    [
        ((20, 30, 3), True, "png", (20, 30)),
        ((20, 30), True, "png", (20, 30)),
        ((20, 30, 3), False, "jpeg", (20, 30)),
        ((100, 1920, 3), False, "jpeg", (50, 960)),
        ((1, 4000), True, "png", (1, 960)),
    ],
)
def test_pictures_can_be_read_back(
    shape: tuple[int, ...], lossless: bool, kind: str, stored: tuple[int, int]
) -> None:
    original = (np.arange(np.prod(shape)).reshape(shape) // 97 % 256).astype(np.uint8)
    (image,) = page(Pictures((Picture(original, "x", lossless),))).all("img")
    head, _, data = (image["src"] or "").partition(",")
    assert head == f"data:image/{kind};base64"
    assert (image["height"], image["width"]) == tuple(str(side) for side in stored)
    encoded = np.frombuffer(base64.b64decode(data, validate=True), np.uint8)
    read = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    assert read is not None
    assert read.shape[:2] == stored
    if shape[:2] == stored:
        difference = np.abs(read.astype(int) - original.astype(int)).mean()
        assert difference == 0 if lossless else difference < 12
    else:
        assert set(np.unique(read)) <= set(np.unique(original)) or not lossless


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table(("a", "b"), (("1",),)), "2 columns, and a row of 1"),
        (lambda: Table(("a", "b"), (), "l"), "'l' came"),
        (lambda: Table(("a",), (), "c"), "'c' came"),
        (lambda: Bars((Bar("a", -1.0, ""),)), "-1.0 came"),
        (lambda: Bars((Bar("a", float("nan"), ""),)), "nan came"),
        (lambda: Stack((Bar("a", None, ""),)), "lengths of 0 or more"),
        (lambda: Stack((Bar("a", 0.0, ""),)), "longer than 0"),
        (lambda: Share(1.5, ""), "0 to 1, and 1.5 came"),
        (lambda: Share(float("nan"), ""), "nan came"),
        (lambda: Table(("a", "b"), ((Share(1, ""),),)), "2 columns, and a row of 1"),
        (lambda: Histogram("h", (), 0, 1), "one count above 0"),
        (lambda: Histogram("h", (0, 0), 0, 1), "one count above 0"),
        (lambda: Histogram("h", (1, -2), 0, 1), "0 or more, and -2 came"),
        (lambda: Histogram("h", (1, float("nan")), 0, 1), "nan came"),
        (lambda: Histogram("h", (float("inf"),), 0, 1), "inf came"),
        (lambda: Histogram("h", (1,), 1, 1), "1 to 1 came"),
        (lambda: Histogram("h", (1,), float("nan"), 1), "nan to 1 came"),
        (lambda: Histogram("h", (1,), 0, float("inf")), "0 to inf came"),
        (lambda: Histogram("h", (1,), 0, 1, "", (Mark(float("inf")),)), "finite value, and inf"),
        (lambda: Curve((), "x", "y"), "one or more points"),
        (lambda: Curve((Point(1, float("nan")),), "x", "y"), r"\(1, nan\) came"),
        (lambda: LineChart((), "x", "y"), "one or more points"),
        (lambda: LineChart((Series("a", ()),), "x", "y"), "one or more points"),
        (lambda: LineChart((Series("a", ((1, 2),)),) * 9, "x", "y"), "8 lines at most, and 9"),
        (lambda: LineChart((Series("a", ((1, float("inf")),)),), "x", "y"), r"\(1, inf\) came"),
        (lambda: LineChart((Series("a", ((2, 0), (1, 0))),), "x", "y"), "that of 'a' does not"),
        (lambda: Ranges(()), "one or more, and none came"),
        (lambda: Range("r", 1, 2, 3, ""), "low <= value <= high, and 2, 1, 3 came"),
        (lambda: Range("r", 1, 1, float("inf"), ""), "inf came"),
        (lambda: Range("r", float("nan"), 1, 2, ""), "nan"),
        (lambda: Pictures((), columns=5), "1 to 4 columns, and 5"),
        (lambda: Film((np.zeros((4, 4, 3), np.uint8),), 1), "two or more frames"),
        (lambda: Film((np.zeros((9000, 1, 3), np.uint8),) * 2, 1), "16000 rows in all, and 18000"),
        (lambda: Film((np.zeros((4, 4, 3), np.uint8),) * 2, 0), "longer than 0 s"),
        (lambda: page(Pictures((Picture(np.zeros((0, 3, 3), np.uint8)),))), r"\(0, 3, 3\)"),
        (lambda: page(Pictures((Picture(np.zeros((2, 2, 3))),))), "float64"),  # type: ignore[arg-type]
    ],
)
def test_blocks_that_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


def test_writing_replaces_the_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    report = whole_report()
    assert report.write(target) == target
    assert target.read_text(encoding="utf-8") == report.to_html()
    assert list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o444 == 0o444


def test_a_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    name = b"stra\xdfe.mp4".decode("utf-8", errors="surrogateescape")
    Report(name, "", ()).write(tmp_path / "report.html")
    assert "stra?e.mp4" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["nowhere/report.html", "file/report.html", "folder"])
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SinkError, match="report cannot be written"):
        whole_report().write(tmp_path / where)
    assert sorted(tmp_path.rglob("*")) == before
