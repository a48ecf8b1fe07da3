"""The painted parts of a synthetic street: facades, cars, people, trees, signs, fences.

Every part is drawn once with a fixed random generator, shrunk into a small pyramid, and shared
by all streets of the process. Nothing here knows about perspective; `edgeseg.synthetic` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BICYCLES",
    "CARS",
    "FACADES",
    "FENCES",
    "PEOPLE",
    "PHASES",
    "ROOFS",
    "SIGNS",
    "TREES",
    "Bytes",
    "Sprite",
    "bicyclist",
    "car",
    "car_setback",
    "facade",
    "fence",
    "grain",
    "pedestrian",
    "roof",
    "sign",
    "tree",
]

Bytes = NDArray[np.uint8]
Colour = tuple[int, int, int]

# How many variants of each part exist.
FACADES, ROOFS, CARS, PEOPLE, BICYCLES, TREES, SIGNS, FENCES = 28, 6, 36, 14, 10, 16, 14, 8
# Steps of one walking or pedalling cycle.
PHASES = 8


@dataclass(frozen=True)
class Sprite:
    """One picture with its outline, at full size and shrunk by 2, 4, 8 along each axis.

    ``colours[down][across]`` is (rows, columns, 3) uint8 BGR, ``masks[down][across]`` the
    outline as (rows, columns) uint8 0 or 255, or None for a picture that fills its rectangle.
    Shared between streets: never written to.
    """

    colours: tuple[tuple[Bytes, ...], ...]
    masks: tuple[tuple[Bytes, ...], ...] | None

    @property
    def width(self) -> int:
        """Columns at full size."""
        return int(self.colours[0][0].shape[1])

    @property
    def height(self) -> int:
        """Rows at full size."""
        return int(self.colours[0][0].shape[0])


def _sprite(picture: Bytes, mask: Bytes | None) -> Sprite:
    rows, columns = picture.shape[:2]
    if mask is not None:
        # Colours bleed outwards, so that interpolation at the outline meets no background.
        weight = (mask > 0).astype(np.float32)
        spread = cv2.blur(picture.astype(np.float32) * weight[..., None], (13, 13))
        total = cv2.blur(weight, (13, 13))[..., None]
        spread = np.where(total > 1e-3, spread / np.maximum(total, 1e-3), 90.0)
        picture = np.where(mask[..., None] > 0, picture, spread.astype(np.uint8))
    colours = []
    masks = []
    for down in range(4):
        colour_row = []
        mask_row = []
        for across in range(4):
            size = (max(2, columns >> across), max(2, rows >> down))
            colour_row.append(_bytes(cv2.resize(picture, size, interpolation=cv2.INTER_AREA)))
            if mask is not None:
                soft = cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
                mask_row.append(np.where(soft > 100, 255, 0).astype(np.uint8))
        colours.append(tuple(colour_row))
        masks.append(tuple(mask_row))
    return Sprite(
        colours=tuple(colours),
        masks=tuple(masks) if mask is not None else None,
    )


def _bytes(picture: object) -> Bytes:
    return np.ascontiguousarray(picture, dtype=np.uint8)


@lru_cache(maxsize=16)
def grain(coarse: int, size: int = 512) -> NDArray[np.float32]:
    """Smooth noise (size, size) float32, mean 0, deviation 1; tiles without a seam.

    ``coarse`` is the width of a lump in pixels; it divides ``size``.
    """
    random = np.random.default_rng(coarse + 7919)
    cells = max(2, size // coarse)
    small = random.standard_normal((cells, cells)).astype(np.float32)
    if cells < size:
        # Four cells of border on each side make the enlargement periodic.
        padded = cv2.copyMakeBorder(small, 2, 2, 2, 2, cv2.BORDER_WRAP)
        step = size // cells
        large = cv2.resize(padded, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
        small = np.asarray(large[2 * step : 2 * step + size, 2 * step : 2 * step + size])
    small = small - small.mean()
    result: NDArray[np.float32] = (small / max(1e-6, float(small.std()))).astype(np.float32)
    result.setflags(write=False)
    return result


def _roughen(picture: Bytes, random: np.random.Generator, strength: float, coarse: int) -> Bytes:
    """The picture with brightness noise of the given deviation (grey levels)."""
    rows, columns = picture.shape[:2]
    noise = grain(coarse)
    top, left = random.integers(0, 512, 2)
    noise = np.roll(noise, (int(top), int(left)), (0, 1))[:rows, :columns]
    return np.clip(picture + strength * noise[..., None], 0, 255).astype(np.uint8)


def _pick(random: np.random.Generator, colours: Sequence[Colour], spread: int = 12) -> Colour:
    base = colours[int(random.integers(len(colours)))]
    shift = random.integers(-spread, spread + 1, 3)
    blue, green, red = (int(np.clip(c + s, 4, 250)) for c, s in zip(base, shift, strict=True))
    return blue, green, red


def _scaled(colour: Colour, gain: float) -> Colour:
    blue, green, red = (int(np.clip(c * gain, 0, 255)) for c in colour)
    return blue, green, red


def _points(*points: tuple[float, float]) -> NDArray[np.int32]:
    return np.array([[round(x), round(y)] for x, y in points], np.int32)


class _Canvas:
    """A picture and its outline, painted together."""

    def __init__(self, rows: int, columns: int) -> None:
        self.picture: Bytes = np.full((rows, columns, 3), 90, np.uint8)
        self.mask: Bytes = np.zeros((rows, columns), np.uint8)

    def polygon(self, colour: Colour, *points: tuple[float, float]) -> None:
        cv2.fillPoly(self.picture, [_points(*points)], colour)
        cv2.fillPoly(self.mask, [_points(*points)], (255,))

    def box(self, colour: Colour, x0: float, y0: float, x1: float, y1: float) -> None:
        first, last = (round(x0), round(y0)), (round(x1), round(y1))
        cv2.rectangle(self.picture, first, last, colour, -1)
        cv2.rectangle(self.mask, first, last, (255,), -1)

    def ellipse(self, colour: Colour, x: float, y: float, a: float, b: float) -> None:
        centre, axes = (round(x), round(y)), (max(1, round(a)), max(1, round(b)))
        cv2.ellipse(self.picture, centre, axes, 0, 0, 360, colour, -1)
        cv2.ellipse(self.mask, centre, axes, 0, 0, 360, (255,), -1)

    def ring(self, colour: Colour, x: float, y: float, a: float, b: float, thick: int) -> None:
        centre, axes = (round(x), round(y)), (max(1, round(a)), max(1, round(b)))
        cv2.ellipse(self.picture, centre, axes, 0, 0, 360, colour, thick)
        cv2.ellipse(self.mask, centre, axes, 0, 0, 360, (255,), thick)

    def line(self, colour: Colour, thick: float, *points: tuple[float, float]) -> None:
        chain = [_points(*points)]
        cv2.polylines(self.picture, chain, False, colour, max(1, round(thick)))
        cv2.polylines(self.mask, chain, False, (255,), max(1, round(thick)))


# --- buildings ------------------------------------------------------------------------------

_WALLS: tuple[Colour, ...] = (
    (70, 88, 138),
    (62, 78, 118),
    (88, 112, 150),
    (120, 146, 168),
    (150, 172, 188),
    (196, 206, 212),
    (214, 218, 222),
    (118, 122, 128),
    (92, 98, 104),
    (170, 190, 208),
    (84, 100, 120),
)


@lru_cache(maxsize=FACADES)
def facade(variant: int) -> Sprite:
    """A house front, 12 m by 9 m, with windows; odd variants have a shop at street level."""
    random = np.random.default_rng(1000 + variant)
    rows, columns = 288, 256
    wall = _pick(random, _WALLS)
    picture: Bytes = np.full((rows, columns, 3), wall, np.uint8)
    bright = sum(wall) / 3
    modern = random.random() < 0.25
    if bright < 150 and not modern:
        # Brick: one course of 5 px is about 16 cm.
        for y in range(0, rows, 5):
            picture[y] = _scaled(wall, 0.86)
            offset = 0 if (y // 5) % 2 else 6
            picture[y : y + 5, offset::12] = _scaled(wall, 0.9)
    picture = _roughen(picture, random, 5, 2)
    picture = _roughen(picture, random, 7, 32)
    floors = int(random.integers(2, 5))
    bays = int(random.integers(3, 7))
    frame = _pick(random, ((225, 228, 230), (60, 64, 70), (40, 46, 62), (200, 206, 210)))
    glass = _pick(random, ((62, 52, 44), (88, 78, 66), (48, 44, 42), (118, 106, 92)))
    floor_height, bay_width = rows / floors, columns / bays
    share = random.uniform(0.4, 0.6) if not modern else random.uniform(0.78, 0.92)
    tall = random.uniform(0.48, 0.66)
    for floor in range(floors):
        top = floor * floor_height + floor_height * (1 - tall) * 0.45
        for bay in range(bays):
            left = bay * bay_width + bay_width * (1 - share) / 2
            x0, y0 = round(left), round(top)
            x1, y1 = round(left + bay_width * share), round(top + floor_height * tall)
            cv2.rectangle(picture, (x0 - 2, y0 - 3), (x1 + 2, y1 + 3), _scaled(wall, 1.15), -1)
            cv2.rectangle(picture, (x0, y0), (x1, y1), frame, -1)
            pane = _scaled(glass, float(random.uniform(0.7, 1.35)))
            cv2.rectangle(picture, (x0 + 2, y0 + 2), (x1 - 2, y1 - 2), pane, -1)
            shine = _points((x0 + 2, y0 + 2), (x1 - 2, y0 + 2), (x0 + 2, y0 + (y1 - y0) * 0.6))
            cv2.fillConvexPoly(picture, shine, _scaled(pane, 1.25))
            middle = (x0 + x1) // 2
            cv2.rectangle(picture, (middle - 1, y0), (middle, y1), frame, -1)
            cv2.rectangle(picture, (x0, (y0 + y1) // 2), (x1, (y0 + y1) // 2 + 1), frame, -1)
            cv2.rectangle(picture, (x0 - 3, y1 + 2), (x1 + 3, y1 + 5), _scaled(wall, 0.7), -1)
    cv2.rectangle(picture, (0, 0), (columns, 5), _scaled(wall, 1.2), -1)
    cv2.rectangle(picture, (0, 6), (columns, 9), _scaled(wall, 0.6), -1)
    if variant % 2:
        _shop(picture, random, wall)
    cv2.rectangle(picture, (0, rows - 8), (columns, rows), _scaled(wall, 0.65), -1)
    cv2.rectangle(picture, (0, 0), (1, rows), _scaled(wall, 0.6), -1)
    return _sprite(picture, None)


def _shop(picture: Bytes, random: np.random.Generator, wall: Colour) -> None:
    rows, columns = picture.shape[:2]
    top = rows - 84
    board = _pick(random, ((40, 36, 120), (90, 50, 30), (40, 80, 40), (30, 30, 34), (60, 150, 190)))
    cv2.rectangle(picture, (0, top), (columns, rows), _scaled(wall, 0.8), -1)
    cv2.rectangle(picture, (6, top), (columns - 6, top + 20), board, -1)
    ink = (225, 230, 232) if sum(board) < 330 else (30, 30, 34)
    x = 60
    while x < columns - 66:
        width = int(random.integers(4, 12))
        cv2.rectangle(picture, (x, top + 6), (x + width, top + 14), ink, -1)
        x += width + 4
    panes = int(random.integers(3, 6))
    for pane in range(panes):
        x0 = 8 + pane * (columns - 16) // panes
        x1 = 8 + (pane + 1) * (columns - 16) // panes - 5
        glass = _pick(random, ((54, 50, 46), (80, 84, 88), (40, 52, 66), (100, 120, 132)), 16)
        cv2.rectangle(picture, (x0, top + 24), (x1, rows - 12), glass, -1)
        for _ in range(5):
            gx, gy = int(random.integers(x0, x1 - 6)), int(random.integers(top + 34, rows - 26))
            goods = _pick(random, ((60, 80, 160), (120, 130, 140), (90, 120, 80), (40, 60, 90)), 30)
            cv2.rectangle(picture, (gx, gy), (gx + 7, gy + 12), goods, -1)


@lru_cache(maxsize=ROOFS)
def roof(variant: int) -> Sprite:
    """A tiled or slated roof slope."""
    random = np.random.default_rng(2000 + variant)
    slate: tuple[Colour, ...] = ((88, 82, 78), (60, 62, 66), (52, 66, 104), (66, 78, 96))
    colour = _pick(random, slate)
    picture: Bytes = np.full((64, 256, 3), colour, np.uint8)
    picture[::6] = _scaled(colour, 0.75)
    for y in range(0, 64, 6):
        picture[y : y + 6, (y // 6 % 2) * 4 :: 9] = _scaled(colour, 0.85)
    picture[:4] = _scaled(colour, 0.6)
    picture = _roughen(_roughen(picture, random, 5, 2), random, 6, 32)
    return _sprite(picture, None)


# --- fences ---------------------------------------------------------------------------------


@lru_cache(maxsize=FENCES)
def fence(variant: int) -> Sprite:
    """A fence panel 4 m wide; the label covers bars and gaps together, as CamVid's does.

    0-2 iron railings, 3-4 wooden boards, 5 pale pickets, 6-7 a steel guard rail.
    """
    random = np.random.default_rng(3000 + variant)
    rows, columns = 96, 256
    if variant < 3:
        # What shows between the bars is dim and without detail, so that the bars stand out.
        back: tuple[Colour, ...] = ((96, 104, 104), (74, 92, 84), (118, 124, 128))
        picture: Bytes = np.full((rows, columns, 3), back[variant], np.uint8)
        picture = _roughen(picture, random, 10, 16)
        iron: Colour = ((28, 30, 30), (44, 60, 40), (188, 190, 192))[variant]
        for x in range(2, columns, 11):
            cv2.rectangle(picture, (x, 6), (x + 3, rows), iron, -1)
        for y in (8, rows - 14):
            cv2.rectangle(picture, (0, y), (columns, y + 5), iron, -1)
        for x in range(0, columns, 128):
            cv2.rectangle(picture, (x, 0), (x + 8, rows), _scaled(iron, 0.9), -1)
    elif variant < 6:
        woods: tuple[Colour, ...] = ((70, 98, 128), (52, 70, 88), (206, 210, 212))
        wood = woods[variant - 3]
        picture = np.full((rows, columns, 3), wood, np.uint8)
        for x in range(0, columns, 16):
            picture[:, x : x + 16] = _scaled(wood, float(random.uniform(0.88, 1.1)))
            picture[:, x : x + 3] = _scaled(wood, 0.45)
        for y in (12, rows - 22):
            cv2.rectangle(picture, (0, y), (columns, y + 7), _scaled(wood, 0.8), -1)
    else:
        steel: Colour = ((168, 170, 170), (142, 148, 150))[variant - 6]
        picture = np.full((rows, columns, 3), (70, 84, 80), np.uint8)
        picture = _roughen(picture, random, 10, 8)
        for x in range(0, columns, 128):
            cv2.rectangle(picture, (x + 50, 10), (x + 62, rows), _scaled(steel, 0.65), -1)
        for y, height, gain in ((6, 12, 1.15), (18, 9, 0.72), (27, 12, 1.1), (39, 9, 0.66)):
            cv2.rectangle(picture, (0, y), (columns, y + height), _scaled(steel, gain), -1)
    picture = _roughen(picture, random, 4, 2)
    return _sprite(picture, None)


# --- trees ----------------------------------------------------------------------------------


@lru_cache(maxsize=TREES)
def tree(variant: int) -> Sprite:
    """A tree (or, from variant 12, a bush) with a ragged crown; the trunk belongs to it."""
    random = np.random.default_rng(4000 + variant)
    rows, columns = 256, 208
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    noise = [np.roll(grain(c), int(random.integers(512)), 0)[:rows, :columns] for c in (4, 16, 64)]
    ragged = 0.1 * noise[0] + 0.14 * noise[1] + 0.16 * noise[2]
    shape = variant % 4
    bush = variant >= 12
    if bush:
        crown_y, a, b = 168.0, 88.0, 84.0
    elif shape == 3:
        crown_y, a, b = 112.0, 52.0, 102.0
    else:
        crown_y, a, b = 92.0, float(random.uniform(72, 90)), float(random.uniform(70, 82))
    squash = np.where(y < crown_y, 1.0, 1.25)
    inside = ((x - columns / 2) / a) ** 2 + ((y - crown_y) / b * squash) ** 2 + ragged < 0.92
    if bush:
        inside |= (abs(x - columns / 2) < 74 + 6 * noise[1]) & (y > 180)
    greens: tuple[Colour, ...] = (
        (38, 74, 58),
        (42, 92, 78),
        (52, 84, 66),
        (30, 60, 46),
        (48, 96, 104),
        (62, 80, 84),
    )
    leaf = np.array(_pick(random, greens, 10), np.float32)
    light = 1.0 + 0.22 * noise[0] + 0.2 * noise[1] - 0.0035 * (y - crown_y)
    picture = np.clip(leaf * light[..., None], 6, 235).astype(np.uint8)
    mask: Bytes = np.where(inside, 255, 0).astype(np.uint8)
    mask = _bytes(cv2.medianBlur(mask, 5))
    if not bush:
        bark = _pick(random, ((44, 54, 66), (58, 66, 74), (36, 44, 54)), 6)
        half = int(random.integers(5, 9))
        trunk = _points(
            (columns / 2 - half, crown_y + 20),
            (columns / 2 + half, crown_y + 20),
            (columns / 2 + half + 3, rows),
            (columns / 2 - half - 3, rows),
        )
        wood = np.zeros_like(mask)
        cv2.fillConvexPoly(wood, trunk, (255,))
        wood[mask > 0] = 0
        shade = np.array(bark, np.float32) * (1 + 0.12 * noise[0])[..., None]
        picture[wood > 0] = np.clip(shade, 0, 255).astype(np.uint8)[wood > 0]
        mask |= wood
    return _sprite(picture, mask)


# --- signs ----------------------------------------------------------------------------------


@lru_cache(maxsize=SIGNS)
def sign(variant: int) -> Sprite:
    """A sign panel or a traffic light head (variants 10-13), without its post."""
    random = np.random.default_rng(5000 + variant)
    red: Colour = (36, 30, 190)
    white: Colour = (228, 230, 230)
    black: Colour = (28, 28, 30)
    if variant >= 10:
        canvas = _Canvas(128, 56)
        canvas.box((24, 26, 26), 2, 2, 53, 125)
        lit = variant % 3
        lamps: tuple[Colour, ...] = ((40, 40, 245), (40, 190, 250), (150, 235, 70))
        for place, lamp in enumerate(lamps):
            colour = lamp if place == lit else _scaled(lamp, 0.22)
            canvas.ellipse(colour, 28, 25 + place * 39, 15, 15)
        return _sprite(canvas.picture, canvas.mask)
    canvas = _Canvas(128, 128)
    kind = variant % 5
    if kind == 0:
        canvas.ellipse(red, 64, 64, 61, 61)
        canvas.ellipse(white, 64, 64, 44, 44)
        canvas.box(black, 42, 46, 58, 82)
        canvas.box(black, 68, 46, 86, 82)
    elif kind == 1:
        canvas.polygon(red, (64, 4), (126, 122), (2, 122))
        canvas.polygon(white, (64, 38), (102, 108), (26, 108))
        canvas.box(black, 58, 62, 70, 98)
    elif kind == 2:
        blue = _pick(random, ((170, 84, 24), (150, 60, 20)))
        canvas.ellipse(blue, 64, 64, 61, 61)
        canvas.polygon(white, (64, 22), (96, 60), (32, 60))
        canvas.box(white, 54, 58, 74, 100)
    elif kind == 3:
        plate = _pick(random, ((120, 96, 20), (170, 84, 24), (60, 110, 20), (220, 224, 224)))
        ink = white if sum(plate) < 400 else black
        canvas.box(plate, 2, 22, 125, 106)
        for row in range(3):
            canvas.box(ink, 14, 34 + row * 22, int(random.integers(70, 112)), 44 + row * 22)
    else:
        canvas.box(_pick(random, ((30, 190, 230), (40, 200, 240))), 14, 4, 113, 123)
        canvas.box(black, 30, 30, 98, 44)
        canvas.box(black, 30, 58, 98, 72)
        canvas.box(black, 30, 86, 80, 100)
    picture = _roughen(canvas.picture, random, 4, 8)
    return _sprite(picture, canvas.mask)


# --- cars -----------------------------------------------------------------------------------

_PAINTS: tuple[Colour, ...] = (
    (40, 36, 36),
    (58, 56, 54),
    (176, 178, 178),
    (142, 142, 140),
    (226, 228, 228),
    (36, 30, 140),
    (110, 62, 30),
    (120, 92, 58),
    (44, 70, 42),
    (150, 168, 176),
    (86, 84, 96),
    (70, 130, 190),
)


# Bodies in turn, and for each the share of its height that is windows.
_BODIES = (0, 1, 0, 2, 1, 3)
_BELT = (0.44, 0.45, 0.42, 0.46)


def _car_kind(variant: int) -> tuple[int, Colour, np.random.Generator]:
    """Body (0 hatchback, 1 saloon, 2 off-roader, 3 van), paint, and a generator for the rest."""
    random = np.random.default_rng(6000 + variant)
    body = _BODIES[variant % len(_BODIES)]
    paint = _pick(random, _PAINTS, 10)
    if body == 3 and random.random() < 0.6:
        paint = (222, 226, 226)
    return body, paint, random


@lru_cache(maxsize=2 * CARS)
def car(variant: int, front: bool) -> tuple[Sprite, Sprite, Sprite, Colour]:
    """A car from the front or from behind: body end, cabin end, flank, and colour of its lid.

    The body end reaches from the ground to the lower edge of the windows, the cabin from there
    to the roof. The flank's near end is at its left for a car at the right of the road.
    """
    body, paint, random = _car_kind(variant)
    whole = _car_end(body, paint, random, front, plate_yellow=variant % 2 == 1)
    belt = round(whole.picture.shape[0] * _BELT[body]) + 3
    picture = _roughen(whole.picture, random, 3, 16)
    nose = _sprite(_bytes(picture[belt:]), _bytes(whole.mask[belt:]))
    cabin = _sprite(_bytes(picture[:belt]), _bytes(whole.mask[:belt]))
    return nose, cabin, _car_flank(body, paint, random, mirrored=front), _scaled(paint, 1.12)


def car_setback(variant: int, front: bool) -> float:
    """Metres from the bumper to the windows above it."""
    body = _BODIES[variant % len(_BODIES)]
    return ((0.15, 0.75, 0.0, 0.0), (1.35, 1.35, 1.3, 0.6))[front][body]


def _car_end(
    body: int, paint: Colour, random: np.random.Generator, front: bool, *, plate_yellow: bool
) -> _Canvas:
    rows = (172, 164, 196, 236)[body]
    columns = 196
    canvas = _Canvas(rows, columns)
    middle = columns / 2
    belt = rows * _BELT[body]
    roof_half = (66, 60, 74, 86)[body]
    tyre: Colour = (24, 24, 26)
    for x in (16, columns - 46):
        canvas.box(tyre, x, rows - 44, x + 30, rows - 1)
    # Cabin, then body; the lower body is darker, as it faces the road.
    canvas.polygon(
        _scaled(paint, 0.95),
        (middle - roof_half, 8),
        (middle - roof_half + 14, 1),
        (middle + roof_half - 14, 1),
        (middle + roof_half, 8),
        (middle + 92, belt + 8),
        (middle - 92, belt + 8),
    )
    canvas.polygon(
        paint,
        (middle - 90, belt),
        (middle + 90, belt),
        (columns - 2, belt + 20),
        (columns - 4, rows - 24),
        (columns - 14, rows - 14),
        (14, rows - 14),
        (4, rows - 24),
        (2, belt + 20),
    )
    canvas.box(_scaled(paint, 0.62), 6, rows - 44, columns - 7, rows - 16)
    glass: Colour = (70, 62, 54) if front else (52, 48, 44)
    canvas.polygon(
        glass,
        (middle - roof_half + 10, 12),
        (middle + roof_half - 10, 12),
        (middle + 76, belt - 2),
        (middle - 76, belt - 2),
    )
    canvas.polygon(
        _scaled(glass, 1.9),
        (middle - roof_half + 16, 15),
        (middle - 4, 15),
        (middle - 44, belt - 6),
        (middle - 70, belt - 6),
    )
    canvas.box(_scaled(paint, 1.25), 12, belt + 3, columns - 13, belt + 6)
    lamp_y = belt + (rows - belt) * 0.24
    if front:
        for x in (28, columns - 29):
            canvas.ellipse((215, 225, 228), x, lamp_y, 19, 11)
            canvas.ellipse((250, 252, 252), x, lamp_y, 8, 7)
        canvas.box((30, 30, 32), 60, lamp_y - 8, columns - 61, lamp_y + 12)
        canvas.box((170, 172, 174), middle - 10, lamp_y - 6, middle + 10, lamp_y + 8)
        plate: Colour = (224, 228, 228)
    else:
        for x in (5, columns - 30):
            canvas.box((30, 26, 190), x, lamp_y - 14, x + 24, lamp_y + 14)
            canvas.box((120, 150, 230), x + 5, lamp_y + 3, x + 18, lamp_y + 9)
        canvas.line(_scaled(paint, 0.6), 2, (32, belt + 12), (34, rows - 48), (162, rows - 48))
        plate = (70, 200, 225) if plate_yellow else (222, 226, 226)
    plate_y = rows - 62 if not front else rows - 40
    canvas.box(plate, middle - 28, plate_y, middle + 28, plate_y + 14)
    for x in range(-22, 22, 8):
        canvas.box((30, 30, 30), middle + x, plate_y + 3, middle + x + 3, plate_y + 11)
    if body != 3:
        for side in (-1, 1):
            canvas.ellipse(_scaled(paint, 0.7), middle + side * 92, belt - 4, 6, 6)
    return canvas


def _car_flank(body: int, paint: Colour, random: np.random.Generator, *, mirrored: bool) -> Sprite:
    """The flank of a car, rear at the left; rear at the right if mirrored."""
    paint = _scaled(paint, 0.86)
    rows = (86, 82, 98, 118)[body]
    columns = 232
    canvas = _Canvas(rows, columns)
    belt = rows * _BELT[body]
    cabins = (
        ((4, belt), (14, 4), (30, 0), (128, 0), (172, belt)),
        ((30, belt), (56, 4), (70, 0), (134, 0), (172, belt)),
        ((2, belt), (6, 3), (16, 0), (138, 0), (170, belt)),
        ((0, belt), (0, 2), (10, 0), (178, 0), (208, belt)),
    )
    panes = (
        ((16, belt - 2), (24, 7), (122, 7), (156, belt - 2)),
        ((46, belt - 2), (64, 7), (130, 7), (158, belt - 2)),
        ((12, belt - 2), (16, 8), (132, 8), (156, belt - 2)),
        ((134, belt - 2), (134, 10), (172, 10), (194, belt - 2)),
    )
    canvas.polygon(paint, *cabins[body])
    canvas.polygon(
        paint,
        (0, belt + 6),
        (4, belt - 2),
        (176, belt - 2),
        (222, belt + 8),
        (231, belt + 20),
        (231, rows - 12),
        (0, rows - 12),
    )
    canvas.box(_scaled(paint, 0.6), 2, rows - 22, 230, rows - 11)
    canvas.polygon((54, 50, 46), *panes[body])
    for x in (84, 126) if body != 3 else (150,):
        canvas.box(paint, x, 7, x + 4, belt)
        canvas.line(_scaled(paint, 0.65), 2, (x, belt), (x, rows - 14))
    for x in (44, 188):
        canvas.ellipse((22, 22, 24), x, rows - 19, 20, 18)
        canvas.ellipse((120, 122, 124), x, rows - 19, 11, 10)
        canvas.ellipse((60, 60, 62), x, rows - 19, 4, 4)
    canvas.box((30, 26, 180), 0, belt + 4, 6, belt + 16)
    canvas.box((215, 222, 226), 222, belt + 12, 231, belt + 20)
    picture = _roughen(canvas.picture, random, 3, 16)
    mask = canvas.mask
    if mirrored:
        picture, mask = _bytes(picture[:, ::-1]), _bytes(mask[:, ::-1])
    return _sprite(picture, mask)


# --- people ---------------------------------------------------------------------------------

_CLOTHES: tuple[Colour, ...] = (
    (40, 36, 34),
    (70, 60, 50),
    (110, 70, 40),
    (40, 40, 130),
    (60, 90, 70),
    (150, 150, 152),
    (60, 80, 110),
    (205, 208, 210),
    (130, 60, 90),
)
_TROUSERS: tuple[Colour, ...] = ((38, 34, 32), (92, 66, 44), (60, 60, 62), (70, 90, 110))
_SKINS: tuple[Colour, ...] = ((140, 165, 205), (100, 130, 175), (60, 85, 125))
_HAIRS: tuple[Colour, ...] = ((26, 28, 34), (40, 56, 84), (90, 130, 160), (130, 134, 138))


@lru_cache(maxsize=PEOPLE * PHASES)
def pedestrian(variant: int, phase: int) -> Sprite:
    """A walking person; every third variant is seen from the side, the others from behind."""
    random = np.random.default_rng(7000 + variant)
    coat = _pick(random, _CLOTHES, 14)
    trousers = _pick(random, _TROUSERS, 8)
    skin = _pick(random, _SKINS, 8)
    hair = _pick(random, _HAIRS, 6)
    skirt, bag = random.random() < 0.25, random.random() < 0.4
    canvas = _Canvas(192, 96)
    swing = math.sin(2 * math.pi * phase / PHASES)
    shoe: Colour = (26, 26, 28)
    if variant % 3 == 0:
        for sign_, gain in ((-1, 0.75), (1, 1.0)):
            foot = 48 + sign_ * swing * 26
            knee = 48 + sign_ * swing * 14 + 4
            canvas.line(_scaled(trousers, gain), 15, (48, 100), (knee, 140), (foot, 178))
            canvas.line(shoe, 10, (foot - 3, 184), (foot + 9, 185))
        canvas.polygon(coat, (34, 38), (60, 38), (63, 112), (33, 112))
        hand = 48 - swing * 22
        canvas.line(_scaled(coat, 0.75), 11, (48, 46), (48 - swing * 10, 76), (hand + 4, 100))
        canvas.ellipse(skin, hand + 5, 104, 5, 6)
        canvas.ellipse(skin, 50, 19, 12, 16)
        canvas.ellipse(hair, 45, 14, 13, 12)
    else:
        for sign_ in (-1, 1):
            lift = max(0.0, sign_ * swing) * 12
            x = 48 + sign_ * 11
            canvas.line(_scaled(trousers, 0.85 if lift > 2 else 1.0), 17, (x, 100), (x, 176 - lift))
            canvas.box(shoe, x - 8, 178 - lift, x + 8, 189 - lift)
        canvas.polygon(
            coat, (28, 40), (40, 34), (56, 34), (68, 40), (67, 84), (70, 116), (26, 116), (29, 84)
        )
        for sign_ in (-1, 1):
            reach = sign_ * swing * 6
            canvas.line(
                _scaled(coat, 0.82),
                12,
                (48 + sign_ * 22, 46),
                (48 + sign_ * 27, 76),
                (48 + sign_ * 26, 104 + reach),
            )
            canvas.ellipse(skin, 48 + sign_ * 26, 111 + reach, 6, 7)
        if skirt:
            canvas.polygon(_scaled(coat, 0.9), (30, 96), (66, 96), (76, 142), (20, 142))
        if bag:
            canvas.box(_scaled(trousers, 0.8), 34, 46, 62, 84)
        canvas.box(skin, 42, 26, 54, 38)
        canvas.ellipse(skin, 48, 19, 13, 16)
        # Seen from behind the head is hair; from the front a face below a fringe.
        canvas.ellipse(hair, 48, 15 if variant % 2 else 11, 14, 14 if variant % 2 else 10)
    picture = _roughen(canvas.picture, random, 4, 4)
    return _sprite(picture, canvas.mask)


@lru_cache(maxsize=BICYCLES * PHASES)
def bicyclist(variant: int, phase: int) -> Sprite:
    """A rider on a bicycle: even variants from behind, odd ones from the side (to the right)."""
    random = np.random.default_rng(8000 + variant)
    jacket = _pick(random, (*_CLOTHES, (60, 235, 205), (50, 140, 245), (60, 235, 205)), 10)
    trousers = _pick(random, _TROUSERS, 8)
    skin = _pick(random, _SKINS, 8)
    helmet = _pick(random, ((30, 30, 32), (200, 204, 206), (40, 40, 170), (150, 90, 40)), 8)
    metal = _pick(random, ((40, 38, 40), (60, 50, 140), (140, 90, 50), (150, 154, 156)), 8)
    turn = 2 * math.pi * phase / PHASES
    tyre: Colour = (26, 26, 28)
    shoe: Colour = (22, 22, 24)
    if variant % 2 == 0:
        canvas = _Canvas(192, 88)
        canvas.box(tyre, 38, 112, 49, 189)
        canvas.box((28, 24, 190), 39, 104, 48, 112)
        canvas.line(metal, 5, (16, 84), (71, 84))
        for sign_ in (-1, 1):
            lift = 14 * (1 + sign_ * math.sin(turn))
            x = 44 + sign_ * 14
            canvas.line(trousers, 15, (x - sign_ * 4, 96), (x + sign_ * 3, 126 - lift / 3))
            canvas.line(
                _scaled(trousers, 0.85), 12, (x + sign_ * 3, 126 - lift / 3), (x, 162 - lift)
            )
            canvas.box(shoe, x - 7, 162 - lift, x + 7, 171 - lift)
            canvas.line(_scaled(jacket, 0.85), 11, (44 + sign_ * 18, 46), (44 + sign_ * 27, 82))
        canvas.polygon(jacket, (23, 42), (36, 34), (52, 34), (65, 42), (62, 100), (26, 100))
        canvas.ellipse(trousers, 44, 102, 20, 13)
        canvas.box(skin, 38, 26, 50, 36)
        canvas.ellipse(skin, 44, 20, 12, 15)
        canvas.ellipse(helmet, 44, 14, 14, 13)
        if variant % 4 == 0:
            canvas.box((190, 230, 225), 30, 66, 58, 72)
    else:
        canvas = _Canvas(192, 196)
        for x in (40, 156):
            canvas.ring(tyre, x, 151, 35, 35, 7)
            for spoke in range(4):
                angle = turn / 3 + spoke * math.pi / 4
                dx, dy = 32 * math.cos(angle), 32 * math.sin(angle)
                canvas.line((120, 122, 124), 1, (x - dx, 151 - dy), (x + dx, 151 + dy))
        crank = (92.0, 152.0)
        saddle = (76.0, 96.0)
        hip = (80.0, 88.0)
        shoulder = (114.0, 44.0)
        for half, gain in ((math.pi, 0.72), (0.0, 1.0)):
            if half == 0.0:
                canvas.line(metal, 6, (40, 151), saddle, (140, 98), crank, (40, 151))
                canvas.line(metal, 6, saddle, crank)
                canvas.line(metal, 6, (156, 151), (138, 84), (152, 80))
                canvas.box((30, 30, 30), 62, 90, 90, 96)
            pedal = (crank[0] + 15 * math.cos(turn + half), crank[1] + 15 * math.sin(turn + half))
            knee = ((hip[0] + pedal[0]) / 2 + 26, (hip[1] + pedal[1]) / 2 - 10)
            canvas.line(_scaled(trousers, gain), 15, hip, knee, pedal)
            canvas.box(shoe, pedal[0] - 6, pedal[1], pedal[0] + 14, pedal[1] + 8)
        canvas.line(jacket, 28, hip, shoulder)
        canvas.line(_scaled(jacket, 0.8), 12, shoulder, (130, 70), (148, 80))
        canvas.ellipse(skin, 126, 22, 12, 15)
        canvas.ellipse(helmet, 123, 15, 16, 12)
    picture = _roughen(canvas.picture, random, 4, 4)
    return _sprite(picture, canvas.mask)
