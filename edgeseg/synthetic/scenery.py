"""The still parts of a synthetic street: its cross-section, ground, sky, horizon and light.

Lengths are metres, colours BGR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.classes import CAMVID
from edgeseg.synthetic import sprites
from edgeseg.synthetic.sprites import Bytes

Matrix = NDArray[np.float64]

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(
    len(CAMVID.names)
)

# The static town repeats after LOOP metres, its ground after TILE; what is behind the camera
# by more than BACK metres has been recycled to the far end.
LOOP, TILE, BACK, FAR = 192.0, 96.0, 20.0, 110.0
# One texel of ground, in metres: across the road and along it.
TEXEL_X, TEXEL_Z = 0.03, 0.08
GROUND_COLUMNS, GROUND_ROWS = 1024, 1200
# Rows of ground with more than this many texels per pixel along the road use the next coarser
# ground; the coarser ones are shrunk along the road only, as perspective does.
SHRINK = (1, 4, 16)


@dataclass(frozen=True)
class Look:
    """Camera and light of one street; colours are BGR, angles of the pan in radians."""

    focal: float
    horizon: float
    camera_height: float
    speed: float
    start: float
    bend: float
    bend_phase: float
    bob: float
    haze_reach: float
    haze_level: float
    gain_left: float
    gain_right: float
    blur: bool
    noise: Bytes
    tone: Bytes


@dataclass(frozen=True)
class Layout:
    """A cross-section of the street, in metres; index 0 is the left side, 1 the right.

    ``keep`` is the side that traffic keeps to, -1 left or 1 right; the camera drives at x = 0.
    ``edge`` is where the road ends, ``walk`` the width of the pavement, ``wall`` where the
    houses stand. ``lanes`` are (x, speed along the road or against it).
    """

    scene: str
    keep: int
    edge: tuple[float, float]
    parking: tuple[bool, bool]
    walk: tuple[float, float]
    wall: tuple[float, float]
    lanes: tuple[tuple[float, int], ...]
    lane_width: float
    median: float
    grass: bool


def make_look(random: np.random.Generator, scene: str, height: int, width: int) -> Look:
    extent = max(width, round(1.1 * height))
    speed = {"city": random.uniform(6, 10), "suburb": random.uniform(8, 13)}.get(
        scene, random.uniform(20, 28)
    )
    gamma = random.uniform(0.75, 1.35)
    gain = random.uniform(0.85, 1.12)
    warmth = random.uniform(-0.08, 0.1)
    level = np.arange(256) / 255.0
    tone = np.empty((1, 256, 3), np.uint8)
    for channel, tint in enumerate((1 - warmth, 1.0, 1 + warmth)):
        # The 8 is taken off again by the noise, which is centred on it.
        curve = 255 * np.clip(gain * tint * level**gamma, 0, 1) - 8
        tone[0, :, channel] = np.clip(np.round(curve), 0, 255)
    hazy = random.random() < 0.3
    sun = random.uniform(-0.3, 0.3)
    return Look(
        focal=float(random.uniform(0.75, 1.15)) * extent,
        horizon=float(random.uniform(0.38, 0.54)) * height,
        camera_height=float(random.uniform(1.2, 1.9)),
        speed=float(speed),
        start=float(random.uniform(0, LOOP)),
        bend=float(random.uniform(-1, 1)) / (900 if scene != "city" else 1600),
        bend_phase=float(random.uniform(0, 2 * math.pi)),
        bob=float(random.uniform(0.0005, 0.002)) * height,
        haze_reach=float(random.uniform(70, 140) if hazy else random.uniform(200, 500)),
        haze_level=float(random.uniform(190, 225)),
        gain_left=1.0 + float(sun),
        gain_right=1.0 - float(sun),
        # Small frames have no detail to spare.
        blur=bool(random.random() < 0.5) and min(height, width) >= 120,
        noise=_noise_tile(height, width, int(random.integers(1, 4))),
        tone=tone,
    )


@lru_cache(maxsize=16)
def _noise_tile(height: int, width: int, strength: int) -> Bytes:
    """Sensor noise, centred on 8: (height + 64, width + 64, 3) uint8."""
    rows, columns = height + 64, width + 64
    tile = np.stack([np.roll(sprites.grain(1), 100 * c, 1) for c in range(3)], axis=2)
    shared = sprites.grain(2)[..., None]
    small = np.clip(np.round(8 + strength * (0.6 * tile + 0.5 * shared)), 0, 16).astype(np.uint8)
    noise: Bytes = np.tile(small, (-(-rows // 512), -(-columns // 512), 1))
    noise = np.ascontiguousarray(noise[:rows, :columns])
    noise.setflags(write=False)
    return noise


def make_layout(random: np.random.Generator, scene: str) -> Layout:
    keep = -1 if random.random() < 0.6 else 1
    if scene == "highway":
        lane = 3.6
        count = int(random.integers(2, 5))
        inner = int(random.integers(0, count))
        near = lane / 2 + inner * lane + 2.5
        far = lane / 2 + (count - 1 - inner) * lane + 0.9
        lanes = [(keep * (inner - i) * lane, 1) for i in range(count) if i != inner]
        oncoming = far + 2.2
        lanes += [(-keep * (oncoming + lane * (i + 0.5)), -1) for i in range(2)]
        edges = {keep: near, -keep: far}
        median = far
        parking = {-1: False, 1: False}
        walk = {-1: 0.0, 1: 0.0}
        wall = {keep: near + random.uniform(12, 20), -keep: oncoming + 2 * lane + 12}
    else:
        lane = float(random.uniform(2.8, 3.4))
        count = 1 if random.random() < 0.85 else 2
        parked = {-1: random.random() < 0.4, 1: random.random() < 0.4}
        parking = {side: bool(value) for side, value in parked.items()}
        extra = 1.2 if random.random() < 0.4 else 0.35
        near = lane / 2 + extra + (2.2 if parking[keep] else 0.0)
        far = lane / 2 + lane * count + 0.4 + (2.2 if parking[-keep] else 0.0)
        lanes = [(-keep * lane * (i + 1), -1) for i in range(count)]
        edges = {keep: near, -keep: far}
        median = 0.0
        wide = (2.4, 5.5) if scene == "city" else (2.0, 3.5)
        walk = {side: float(random.uniform(*wide)) for side in (-1, 1)}
        set_back = (0.0, 1.5) if scene == "city" else (3.0, 7.0)
        wall = {
            side: edges[side] + walk[side] + float(random.uniform(*set_back)) for side in (-1, 1)
        }
    return Layout(
        scene=scene,
        keep=keep,
        edge=(edges[-1], edges[1]),
        parking=(parking[-1], parking[1]),
        walk=(walk[-1], walk[1]),
        wall=(float(wall[-1]), float(wall[1])),
        lanes=tuple(lanes),
        lane_width=lane,
        median=median,
        grass=scene != "city",
    )


@dataclass(frozen=True)
class Ground:
    """The ground from above, repeating along the rows: colours at three scales, and classes."""

    colours: tuple[Bytes, ...]
    classes: Bytes


@lru_cache(maxsize=4)
def _ground_noise(kind: int) -> Bytes:
    fine, lumps = (1, 64) if kind == 0 else (2, 16)
    noise = sprites.grain(fine) + 0.3 * sprites.grain(lumps) + 0.12 * sprites.grain(16)
    small = np.clip(128 + 30 * noise, 0, 255).astype(np.uint8)
    large: Bytes = np.tile(small, (-(-GROUND_ROWS // 512), GROUND_COLUMNS // 512))
    large = np.ascontiguousarray(large[:GROUND_ROWS])
    three: Bytes = np.repeat(large[..., None], 3, axis=2)
    three.setflags(write=False)
    return three


def make_ground(random: np.random.Generator, layout: Layout) -> Ground:
    rows, columns = GROUND_ROWS, GROUND_COLUMNS
    origin = columns // 2

    def column(x: float) -> int:
        return int(np.clip(round(origin + x / TEXEL_X), 0, columns))

    grey = float(random.uniform(62, 128))
    road = np.array([grey * 1.02, grey, grey * 0.98])
    slab = np.clip(road + random.uniform(22, 60) + random.uniform(-10, 10, 3), 0, 235)
    grass = np.array([random.uniform(38, 62), random.uniform(88, 120), random.uniform(70, 105)])
    yard = grass if layout.grass else slab * 0.9
    yard_label = TREE if layout.grass else PAVEMENT
    profile = np.empty((1, columns, 3), np.float64)
    labels = np.empty((1, columns), np.uint8)
    profile[:], labels[:] = yard, yard_label
    left, right = -layout.edge[0], layout.edge[1]
    if layout.scene == "highway":
        far = -layout.keep * (layout.median + 2.2 + 2 * 3.6 + 1.5)
        left, right = min(left, far), max(right, far)
    else:
        first, last = column(left - layout.walk[0]), column(right + layout.walk[1])
        profile[:, first:last], labels[:, first:last] = slab, PAVEMENT
    profile[:, column(left) : column(right)] = road
    labels[:, column(left) : column(right)] = ROAD
    for lane in (0.0, *(x for x, _ in layout.lanes)):
        # Tyres polish two tracks into every lane.
        for track in (-0.75, 0.75):
            a, b = column(lane + track - 0.25), column(lane + track + 0.25)
            profile[:, a:b] *= 0.93
    colours: Bytes = np.empty((rows, columns, 3), np.uint8)
    colours[:] = np.clip(profile, 0, 255).astype(np.uint8)
    classes: Bytes = np.empty((rows, columns), np.uint8)
    classes[:] = labels
    if layout.scene != "highway":
        _pave(random, colours, layout, column, slab)
    for _ in range(int(random.integers(4, 12))):
        # Patches of newer or older asphalt.
        x, z = random.uniform(left, right - 1.5), int(random.integers(0, rows - 60))
        a, b = column(float(x)), min(column(float(x + random.uniform(0.6, 2.5))), column(right))
        patch = np.clip(road * random.uniform(0.8, 1.12), 0, 255).astype(np.uint8)
        colours[z : z + int(random.integers(15, 60)), a:b] = patch
    _mark_lanes(random, colours, layout, column)
    strength = float(random.uniform(0.25, 0.5))
    noise = _ground_noise(int(random.integers(2)))
    cv2.addWeighted(colours, 1.0, noise, strength, -128 * strength, dst=colours)
    scales = [colours]
    for shrink in SHRINK[1:]:
        size = (columns, rows // shrink)
        scales.append(np.asarray(cv2.resize(colours, size, interpolation=cv2.INTER_AREA), np.uint8))
    # One more row on each side, so that interpolation meets the other end of the loop.
    wrapped = tuple(
        np.asarray(cv2.copyMakeBorder(scale, 1, 1, 0, 0, cv2.BORDER_WRAP), np.uint8)
        for scale in scales
    )
    return Ground(wrapped, classes)


def _pave(
    random: np.random.Generator,
    colours: Bytes,
    layout: Layout,
    column: Callable[[float], int],
    slab: Matrix,
) -> None:
    """Kerbs and the joints between slabs."""
    kerb = np.clip(slab * 1.12 + 8, 0, 245).astype(np.uint8)
    joint = np.clip(slab * 0.8, 0, 255).astype(np.uint8)
    pitch = int(random.integers(7, 13))
    for side, edge, walk in zip((-1, 1), layout.edge, layout.walk, strict=True):
        a, b = sorted((column(side * edge), column(side * (edge + walk))))
        colours[::pitch, a:b] = joint
        for x in np.arange(edge + 0.6, edge + walk, 0.6):
            c = column(float(side * x))
            colours[:, c : c + 1] = joint
        a, b = sorted((column(side * edge), column(side * (edge + 0.16))))
        colours[:, a:b] = kerb
        a, b = sorted((column(side * edge), column(side * (edge - 0.12))))
        colours[:, a:b] = (colours[:, a:b] * 0.72).astype(np.uint8)


def _mark_lanes(
    random: np.random.Generator, colours: Bytes, layout: Layout, column: Callable[[float], int]
) -> None:
    paint = np.array((212, 216, 216), np.float64) * random.uniform(0.85, 1.05)
    white = np.clip(paint, 0, 250).astype(np.uint8)
    yellow = np.array((70, 180, 215), np.uint8)

    def stripe(x: float, colour: Bytes, width: float, on: float, period: float) -> None:
        a, b = column(x - width / 2), column(x + width / 2)
        if on >= period:
            colours[:, a:b] = colour
            return
        for z in np.arange(0.0, TILE, period):
            first = round(float(z) / TEXEL_Z)
            colours[first : first + round(on / TEXEL_Z), a:b] = colour

    keep, lane = layout.keep, layout.lane_width
    if layout.scene == "highway":
        centre_colour = yellow if random.random() < 0.4 else white
        near, far = layout.edge[(keep + 1) // 2], layout.edge[(1 - keep) // 2]
        stripe(keep * (near - 2.4), white, 0.2, 1, 1)
        stripe(-keep * (far - 0.6), centre_colour, 0.2, 1, 1)
        centres = sorted([0.0, *(x for x, direction in layout.lanes if direction > 0)])
        for a, b in pairwise(centres):
            stripe((a + b) / 2, white, 0.16, 4.0, 12.0)
        away = -keep * (far + 2.2)
        stripe(away, white, 0.18, 1, 1)
        stripe(away - keep * lane, white, 0.16, 4.0, 12.0)
        return
    solid = random.random() < 0.25
    centre_colour = yellow if random.random() < 0.25 else white
    stripe(-keep * lane / 2, centre_colour, 0.14, 1 if solid else 2.5, 1 if solid else 6.0)
    if len(layout.lanes) > 1:
        stripe(-keep * lane * 1.5, white, 0.12, 2.0, 6.0)
    for side, edge, parking in zip((-1, 1), layout.edge, layout.parking, strict=True):
        if parking:
            stripe(side * (edge - 2.15), white, 0.1, 1.0, 2.0)
        elif random.random() < 0.5:
            line = yellow if random.random() < 0.7 else white
            stripe(side * (edge - 0.35), line, 0.1, 1, 1)
            stripe(side * (edge - 0.6), line, 0.1, 1, 1)
    left, right = column(-layout.edge[0] + 0.3), column(layout.edge[1] - 0.3)
    if random.random() < 0.6:
        # A zebra crossing, 3.2 m deep.
        first = int(random.integers(100, GROUND_ROWS - 100))
        for a in range(left, right - 10, 32):
            colours[first : first + 40, a : a + 16] = white


def make_sky(random: np.random.Generator, look: Look, height: int, width: int) -> Bytes:
    """Sky down to below the horizon, (rows, width, 3) uint8."""
    below = look.focal * look.camera_height / FAR
    rows = min(height, int(look.horizon + 2 * look.bob + below) + 4)
    cover = random.random()
    blue = np.array([random.uniform(200, 250), random.uniform(150, 195), random.uniform(95, 155)])
    pale = np.array([245.0, 238.0, 228.0]) * random.uniform(0.88, 1.02)
    cloud = np.array([236.0, 236.0, 236.0]) * random.uniform(0.75, 1.04)
    if cover > 0.75:
        # Overcast: hardly any blue, from grey to white.
        blue = cloud * random.uniform(0.82, 1.0)
        pale = cloud * random.uniform(0.95, 1.06)
    fall = (np.arange(rows) / max(1, rows))[:, None, None] ** 0.8
    gradient = (blue * (1 - fall) + pale * fall).astype(np.float32)
    top, left = random.integers(0, 256, 2)
    lumps = sprites.grain(64)[top : top + 200, left : left + 256] + 0.45 * np.asarray(
        sprites.grain(16)[top : top + 200, left : left + 256]
    )
    lumps = cv2.resize(np.asarray(lumps, np.float32), (width, rows), interpolation=cv2.INTER_LINEAR)
    density = np.clip(0.55 * lumps + (cover - 0.62) * 2.2, 0, 0.92).astype(np.float32)[..., None]
    sky = gradient + density * (cloud.astype(np.float32) - gradient)
    painted: Bytes = np.clip(sky, 0, 255).astype(np.uint8)
    return painted


@dataclass(frozen=True)
class Backdrop:
    """What stands at the horizon: colours (rows, columns, 3), codes and outline (rows, columns)."""

    colours: Bytes
    codes: NDArray[np.uint16]
    mask: Bytes


def make_backdrop(random: np.random.Generator, scene: str, look: Look, width: int) -> Backdrop:
    rows = max(4, round(look.focal * 0.16))
    heights = np.zeros(width)
    codes = np.full((rows, width), TREE, np.uint16)
    green = np.array([random.uniform(50, 80), random.uniform(80, 105), random.uniform(62, 92)])
    rolls = [np.roll(sprites.grain(c)[:, 0], int(random.integers(512))) for c in (64, 16, 4)]
    along = np.arange(width) * 512 / max(width, 512)
    bumps = [np.interp(along, np.arange(512), roll) for roll in rolls]
    base = {"city": 0.25, "suburb": 0.4}.get(scene, float(random.uniform(0.2, 0.45)))
    heights = rows * np.clip(base + 0.1 * bumps[0] + 0.06 * bumps[1] + 0.03 * bumps[2], 0.08, 1)
    colours = np.empty((rows, width, 3), np.float32)
    noise = np.resize(sprites.grain(4), (rows, width))
    colours[:] = green * (1 + 0.16 * noise[..., None])
    if scene != "highway" or random.random() < 0.3:
        x = 0
        share = 0.75 if scene == "city" else 0.3
        while x < width:
            step = max(3, int(random.uniform(0.03, 0.1) * look.focal))
            if random.random() < share:
                high = rows * float(random.uniform(0.3, 0.95 if scene == "city" else 0.6))
                heights[x : x + step] = high
                codes[:, x : x + step] = BUILDING
                wall = random.uniform(100, 190) + random.uniform(-14, 14, 3)
                colours[:, x : x + step] = wall
                colours[::5, x : x + step : 3] *= 0.75
            x += step
    haze = 1 - math.exp(-FAR / look.haze_reach)
    colours = colours * (1 - haze) + look.haze_level * haze
    down = rows - np.arange(rows)[:, None]
    mask = (down <= heights[None, :]).astype(np.uint8)
    return Backdrop(np.clip(colours, 0, 255).astype(np.uint8), codes, mask)
