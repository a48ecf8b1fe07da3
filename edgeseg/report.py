"""A report: one HTML page that holds all it shows, pictures included.

The page loads nothing, from disk or network, and runs no script; it can be mailed, archived and
printed. It follows the reader's light or dark setting and fits a phone.
"""

from __future__ import annotations

import base64
import html
import os
import tempfile
from collections.abc import Mapping, Sequence
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
    "Figure",
    "Figures",
    "Paragraph",
    "Picture",
    "Pictures",
    "Report",
    "Section",
    "Stack",
    "Table",
]

Colour = tuple[int, int, int]

# Wide enough for a retina laptop at half the page's width, small enough to be mailed.
_PICTURE_WIDTH = 960
_JPEG_QUALITY = 86
_STRIP_ROWS = 16_000


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
class Table:
    """Rows of text under a header.

    ``align``: one letter per column, ``l`` (left) or ``r`` (right, for numbers); all left when
    empty. Raises RequestError when a row has another number of columns than the header.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
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


Block = Figures | Paragraph | Code | Table | Bars | Stack | Pictures | Film


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
    if isinstance(block, Film):
        return _film(block)
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

    def row(cells: tuple[str, ...], tag: str) -> str:
        inner = "".join(
            f"<{tag}{kind}>{_text(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
        )
        return f"<tr>{inner}</tr>\n"

    head = f"<thead>{row(block.header, 'th')}</thead>\n"
    body = f"<tbody>\n{''.join(row(cells, 'td') for cells in block.rows)}</tbody>\n"
    return f'{_caption(block.caption)}<div class="wide"><table>\n{head}{body}</table></div>\n'


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
        drawn = f'<rect class="p0" width="{length:.2f}%" height="10" rx="3"/>' if length else ""
        number = "number" if bar.value is not None else "number faint"
        rows.append(
            f'<div class="row"><span class="name">{swatch}{_text(bar.label)}</span>'
            '<svg class="bar" width="100%" height="10" aria-hidden="true">'
            f'<rect class="track" width="100%" height="10" rx="3"/>{drawn}</svg>'
            f'<span class="{number}">{_text(bar.text)}</span></div>\n'
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
  display: flex; flex-direction: column; padding: 18px 20px 16px; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px;
}
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
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 10px; }
  .tile { padding: 14px 14px 12px; }
  .value { font-size: 28px; }
  .row { grid-template-columns: 104px 1fr 62px; gap: 10px; }
  .c2, .c3, .c4 { grid-template-columns: 1fr; gap: 12px; }
  section { margin-bottom: 32px; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
@media print {
  @page { margin: 16mm; }
  :root { --page: #ffffff; }
  body { font-size: 13px; }
  main { max-width: none; padding: 0; }
  figure, .tile, .row, tr, pre { break-inside: avoid; }
  h2, .caption { break-after: avoid; }
  pre { white-space: pre-wrap; }
  .c2 { grid-template-columns: repeat(2, 1fr); }
  .c3 { grid-template-columns: repeat(3, 1fr); }
}
"""
