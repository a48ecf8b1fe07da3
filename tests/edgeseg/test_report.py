"""The report, read back with the standard library's HTML parser."""

from __future__ import annotations

import base64
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
    Figure,
    Figures,
    Film,
    Paragraph,
    Picture,
    Pictures,
    Report,
    Section,
    Stack,
    Table,
)

VOID = {"meta", "img", "rect", "br"}


class Page(HTMLParser):
    """What a page holds; fails on tags that are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
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
                    Table(("x", "y"), (("1", "2"),), "lr", "a table"),
                    Bars(bars, caption="bars"),
                    Stack(bars, "stack"),
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
