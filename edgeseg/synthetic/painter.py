"""Draws one frame of a synthetic street, picture and ground truth through the same masks.

Geometry: a pinhole camera over flat ground. A point ``x`` metres to the right, ``y`` metres up
and ``z`` metres ahead is seen at ``u = cx + f * (x + c * z * z) / z`` and
``v = horizon + f * (camera_height - y) / z``; ``c`` bends the road. Things are painted from far
to near.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.synthetic import sprites
from edgeseg.synthetic.scenery import (
    BACK,
    BICYCLIST,
    BUILDING,
    CAR,
    FAR,
    FENCE,
    GROUND_COLUMNS,
    GROUND_ROWS,
    PEDESTRIAN,
    POLE,
    SHRINK,
    SIGN,
    SKY,
    TEXEL_X,
    TEXEL_Z,
    TREE,
)
from edgeseg.synthetic.sprites import Bytes, Sprite
from edgeseg.synthetic.town import Thing, Town

# Least width in pixels (a fence: height) at which a thing is drawn. What is smaller could not be
# told from its surroundings in the picture, and its label would be noise.
_LEAST = {
    "lamp": 4.5,
    "sign": 16.0,
    "fence": 14.0,
    "car": 24.0,
    "pedestrian": 12.0,
    "bicyclist": 13.0,
}

__all__ = ["Painter", "StreetFrame", "StreetInstance"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class StreetInstance:
    """One visible countable object: a car, a pedestrian, or a bicyclist with the bicycle.

    ``id`` (at least 1) stays with the object while it is ahead; what is recycled gets a new one.
    ``label`` is its class index.
    ``box`` is (x0, y0, x1, y1) in pixels, half-open, around its visible pixels, of which there
    are ``area``.
    """

    id: int
    label: int
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class StreetFrame:
    """One frame and its ground truth; the arrays are the caller's own.

    ``pixels`` (height, width, 3) uint8 BGR. ``class_map`` (height, width) uint8, CamVid's class
    indices, no pixel unlabelled. ``instance_map`` (height, width) uint16, 0 where there is no
    instance. ``instances`` the visible ones, sorted by id.
    """

    pixels: Bytes
    class_map: Bytes
    instance_map: NDArray[np.uint16]
    instances: tuple[StreetInstance, ...]


def _outline(points: list[tuple[float, float]]) -> NDArray[np.int32]:
    """Whole-pixel corners (n, 2); far outside the frame they stay within what OpenCV can draw."""
    return np.array(
        [[round(min(max(c, -30000.0), 30000.0)) for c in point] for point in points], np.int32
    )


class Painter:
    """Paints one frame; ``codes`` holds class + 16 * slot, slot 0 for what is no instance."""

    def __init__(self, town: Town, fps: float, index: int) -> None:
        self.town = town
        self.index = index
        look = town.look
        self.look = look
        self.time = index / fps
        self.camera = look.start + look.speed * self.time
        turn = 2 * math.pi * self.camera / 200 + look.bend_phase
        self.bend = look.bend * math.sin(turn)
        self.pan = look.focal * 2 * look.bend * 200 / (2 * math.pi) * math.cos(turn)
        self.f = look.focal
        self.h = look.camera_height
        self.cx = town.width / 2
        self.horizon = look.horizon + look.bob * (
            math.sin(5.1 * self.time) + 0.6 * math.sin(11.3 * self.time + 1)
        )
        self.pixels: Bytes = np.empty((town.height, town.width, 3), np.uint8)
        self.codes: NDArray[np.uint16] = np.empty((town.height, town.width), np.uint16)
        # Per slot: id, label, and the rectangle that was painted.
        self.slots: list[tuple[int, int, tuple[int, int, int, int]]] = []

    def paint(self) -> StreetFrame:
        self._far()
        placed = []
        for thing in self.town.things:
            z, lap = self._place(thing)
            if -15 < z < FAR - 8:
                placed.append((thing.layer, -z, thing, z, lap))
        placed.sort(key=lambda item: item[:2])
        for _, _, thing, z, _ in placed:
            if thing.kind == "car":
                self._shadow(thing, z)
        for _, _, thing, z, lap in placed:
            getattr(self, "_" + thing.kind)(thing, z, lap)
        return self._finish()

    def _place(self, thing: Thing) -> tuple[float, int]:
        """Metres ahead of the camera, and how often the thing has been recycled."""
        if thing.loop == 0.0:
            return thing.s + 3.0 * math.sin(0.4 * self.time + thing.phase), 0
        ahead = thing.s + thing.speed * self.time - self.camera + BACK
        lap = math.floor(ahead / thing.loop)
        return ahead - lap * thing.loop - BACK, -lap

    def _haze(self, z: float) -> float:
        return 1 - math.exp(-max(0.0, z) / self.look.haze_reach)

    def _tinted(self, picture: Bytes, gain: float, z: float) -> Bytes:
        haze = self._haze(z)
        if haze < 0.04 and abs(gain - 1) < 0.02:
            return picture
        alpha, beta = gain * (1 - haze), self.look.haze_level * haze
        tinted: Bytes = np.asarray(cv2.convertScaleAbs(picture, alpha=alpha, beta=beta), np.uint8)
        return tinted

    def _far(self) -> None:
        """Sky, horizon and ground."""
        town, look = self.town, self.look
        height, width = town.height, town.width
        first = int(np.clip(math.ceil(self.horizon + self.f * self.h / FAR), 1, height - 1))
        left = int(np.clip(town.margin + self.pan, 0, 2 * town.margin))
        self.pixels[:first] = town.sky[:first, left : left + width]
        self.codes[:first] = SKY
        backdrop = town.backdrop
        rows = min(first, backdrop.mask.shape[0])
        mask = np.ascontiguousarray(backdrop.mask[-rows:, left : left + width])
        cv2.copyTo(
            backdrop.colours[-rows:, left : left + width], mask, self.pixels[first - rows : first]
        )
        np.copyto(
            self.codes[first - rows : first],
            backdrop.codes[-rows:, left : left + width],
            where=mask.view(np.bool_),
        )
        v = np.arange(first, height) + 0.5
        z = self.f * self.h / (v - self.horizon)
        across = (np.arange(width, dtype=np.float32) + 0.5 - self.cx) / self.f / TEXEL_X
        offset = -self.bend * z * z / TEXEL_X + GROUND_COLUMNS / 2 - 0.5
        map_x = np.multiply.outer(z.astype(np.float32), across) + offset.astype(np.float32)[:, None]
        along = np.mod((z + self.camera) / TEXEL_Z, GROUND_ROWS)
        texels = z * z / (self.f * self.h) / TEXEL_Z
        map_y = np.empty_like(map_x)
        map_y[:] = np.minimum(along, GROUND_ROWS - 1)[:, None]
        classes = cv2.remap(
            town.ground.classes, map_x, map_y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE
        )
        self.codes[first:] = classes
        # Rows run from far to near, so texels per pixel only falls.
        ends = [int(np.searchsorted(-texels, -limit)) for limit in (10.0, 2.5, 0.0)]
        start = 0
        for level, end in zip((2, 1, 0), ends, strict=True):
            if end > start:
                shrink = SHRINK[level]
                map_y[start:end] = (along[start:end] / shrink + 0.5)[:, None]
                self.pixels[first + start : first + end] = cv2.remap(
                    town.ground.colours[level],
                    map_x[start:end],
                    map_y[start:end],
                    cv2.INTER_LINEAR,
                    borderMode=cv2.BORDER_REPLICATE,
                )
            start = max(start, end)
        deep = int(np.searchsorted(-z, -25.0))
        if deep:
            haze = (1 - np.exp(-z[:deep] / look.haze_reach)).astype(np.float32)[:, None, None]
            band = self.pixels[first : first + deep]
            band[:] = (band * (1 - haze) + look.haze_level * haze).astype(np.uint8)

    # --- primitives ---

    def _u(self, x: float, z: float) -> float:
        return self.cx + self.f * (x / z + self.bend * z)

    def _v(self, y: float, z: float) -> float:
        return self.horizon + self.f * (self.h - y) / z

    def _clip(self, u0: float, v0: float, u1: float, v1: float) -> tuple[int, int, int, int] | None:
        x0, y0 = max(0, math.floor(u0)), max(0, math.floor(v0))
        x1, y1 = min(self.town.width, math.ceil(u1)), min(self.town.height, math.ceil(v1))
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def _slot(self, thing: Thing, lap: int, label: int) -> int:
        """The code of a new instance."""
        count = max(1, self.town.instances)
        laps = 65535 // count
        self.slots.append((1 + thing.serial + count * (lap % laps), label, (0, 0, 0, 0)))
        return label | len(self.slots) << 4

    def _grow(self, code: int, box: tuple[int, int, int, int]) -> None:
        if code < 16:
            return
        number, label, old = self.slots[(code >> 4) - 1]
        if old[2] > old[0]:
            box = (
                min(old[0], box[0]),
                min(old[1], box[1]),
                max(old[2], box[2]),
                max(old[3], box[3]),
            )
        self.slots[(code >> 4) - 1] = (number, label, box)

    def _lay(self, box: tuple[int, int, int, int], code: int, picture: Bytes, mask: Bytes) -> None:
        """Put ``picture`` on the frame and ``code`` on the map, both through ``mask`` (0 or 1)."""
        x0, y0, x1, y1 = box
        cv2.copyTo(picture, mask, self.pixels[y0:y1, x0:x1])
        np.copyto(self.codes[y0:y1, x0:x1], np.uint16(code), where=mask.view(np.bool_))
        self._grow(code, box)

    def _billboard(
        self,
        sprite: Sprite,
        code: int,
        x: float,
        z: float,
        y: float,
        width: float,
        height: float,
        *,
        gain: float = 1.0,
        flip: bool = False,
    ) -> None:
        """An upright picture facing the camera, its lower edge ``y`` metres up, centred on x."""
        u0, u1 = self._u(x, z) - self.f * width / z / 2, self._u(x, z) + self.f * width / z / 2
        v0, v1 = self._v(y + height, z), self._v(y, z)
        box = self._clip(u0, v0, u1, v1)
        if box is None:
            return
        across = min(3, max(0, int(math.log2(max(1.0, sprite.width / (u1 - u0))))))
        down = min(3, max(0, int(math.log2(max(1.0, sprite.height / (v1 - v0))))))
        colours = sprite.colours[down][across]
        rows, columns = colours.shape[:2]
        sx, sy = columns / (u1 - u0), rows / (v1 - v0)
        matrix = np.array(
            [
                [sx, 0.0, (box[0] + 0.5 - u0) * sx - 0.5],
                [0.0, sy, (box[1] + 0.5 - v0) * sy - 0.5],
            ]
        )
        if flip:
            matrix[0] = -matrix[0]
            matrix[0, 2] += columns - 1
        size = (box[2] - box[0], box[3] - box[1])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        picture = np.asarray(
            cv2.warpAffine(colours, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE),
            np.uint8,
        )
        if sprite.masks is None:
            mask: Bytes = np.ones((size[1], size[0]), np.uint8)
        else:
            soft = cv2.warpAffine(sprite.masks[down][across], matrix, size, flags=flags)
            mask = (np.asarray(soft) > 110).view(np.uint8)
        self._lay(box, code, self._tinted(picture, gain, z), mask)

    def _plane(
        self,
        sprite: Sprite,
        code: int,
        x: float,
        z0: float,
        z1: float,
        y0: float,
        y1: float,
        *,
        gain: float = 1.0,
        repeat: int = 1,
    ) -> None:
        """An upright picture along the road, from z0 to z1 metres ahead, y0 to y1 metres up."""
        if abs(x) < 0.3:
            return
        # Nothing nearer than this is inside the frame, however the road bends.
        reach = self.f * abs(x) / self.cx
        edge = 0.9 * self.f * abs(x) / (self.cx + 2 + self.f * abs(self.bend) * reach)
        near = max(z0, edge, 0.5)
        if z1 <= near + 1e-3:
            return
        # Between its ends the bend is replaced by the chord, which keeps neighbours joined.
        shifted = x - self.bend * near * z1
        centre = self.cx + self.f * self.bend * (near + z1)
        if abs(shifted) < 0.05:
            return
        ua, ub = centre + self.f * shifted / near, centre + self.f * shifted / z1
        corners = (
            (ua, self._v(y1, near)),
            (ub, self._v(y1, z1)),
            (ub, self._v(y0, z1)),
            (ua, self._v(y0, near)),
        )
        box = self._clip(
            min(ua, ub),
            min(corners[0][1], corners[1][1]),
            max(ua, ub),
            max(corners[2][1], corners[3][1]),
        )
        if box is None or abs(ua - ub) < 0.5:
            return
        middle = math.sqrt(near * z1)
        seen = (z1 - near) / (z1 - z0) * sprite.width * repeat
        texels = max(1.0, seen / max(1.0, abs(ua - ub)))
        # Of a wall cut by the frame only the far end is seen, where perspective shrinks it most.
        across = min(3, max(0, int(math.log2(texels))))
        tall = self.f * (y1 - y0) / middle
        down = min(3, max(0, int(math.log2(max(1.0, sprite.height / tall)))))
        colours = sprite.colours[down][across]
        rows, columns = colours.shape[:2]
        a = columns * repeat / (z1 - z0)
        b = rows / (y1 - y0)
        du, dv = box[0] + 0.5 - centre, box[1] + 0.5 - self.horizon
        matrix: Matrix = np.array(
            [
                [-z0 * a - 0.5, 0.0, (self.f * shifted - z0 * du) * a - 0.5 * du],
                [
                    (y1 - self.h) * b - 0.5,
                    shifted * b,
                    ((y1 - self.h) * du + dv * shifted) * b - 0.5 * du,
                ],
                [1.0, 0.0, du],
            ]
        )
        size = (box[2] - box[0], box[3] - box[1])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        border = cv2.BORDER_WRAP if repeat > 1 else cv2.BORDER_REPLICATE
        picture = np.asarray(
            cv2.warpPerspective(colours, matrix, size, flags=flags, borderMode=border), np.uint8
        )
        mask: Bytes = np.zeros((size[1], size[0]), np.uint8)
        outline = np.array(
            [
                (
                    round(min(max(u - box[0] - 0.5, -30000.0), 30000.0) * 16),
                    round(min(max(v - box[1] - 0.5, -30000.0), 30000.0) * 16),
                )
                for u, v in corners
            ],
            np.int32,
        )
        cv2.fillConvexPoly(mask, outline, (1,), cv2.LINE_8, 4)
        if sprite.masks is not None:
            soft = cv2.warpPerspective(sprite.masks[down][across], matrix, size, flags=flags)
            mask &= (np.asarray(soft) > 110).view(np.uint8)
        self._lay(box, code, self._tinted(picture, gain, middle), mask)

    def _bar(
        self, u0: float, v0: float, u1: float, v1: float, colour: tuple[int, int, int], z: float
    ) -> None:
        """A filled upright rectangle of a pole, lit from one side."""
        x0, y0, x1, y1 = round(u0), round(v0), round(u1) - 1, round(v1) - 1
        if x1 < x0 or y1 < y0 or x1 < 0 or y1 < 0:
            return
        if x0 >= self.town.width or y0 >= self.town.height:
            return
        haze = self._haze(z)
        lit = tuple(min(255.0, c * (1 - haze) + self.look.haze_level * haze) for c in colour)
        cv2.rectangle(self.pixels, (x0, y0), (x1, y1), lit, -1)
        if x1 > x0:
            shade = tuple(c * 0.72 for c in lit)
            cv2.rectangle(self.pixels, ((x0 + x1 + 1) // 2, y0), (x1, y1), shade, -1)
        cv2.rectangle(self.codes, (x0, y0), (x1, y1), (POLE,), -1)

    # --- things, by kind ---

    def _gain(self, x: float) -> float:
        return self.look.gain_left if x < 0 else self.look.gain_right

    def _house(self, thing: Thing, z: float, lap: int) -> None:
        if z + thing.length < 0.6:
            return
        sprite = sprites.facade(thing.variant)
        side = 1.0 if thing.x > 0 else -1.0
        gain = self._gain(thing.x)
        end = min(z + thing.length, FAR)
        if thing.gap and z > 4:
            self._billboard(
                sprite,
                BUILDING,
                thing.x + side * 5,
                z,
                0.0,
                10.0,
                thing.height,
                gain=2 - gain - 0.08,
            )
        if thing.width:
            tiles = sprites.roof(int(thing.phase))
            top = thing.height + thing.width
            self._plane(tiles, BUILDING, thing.x, z, end, thing.height - 0.1, top, gain=gain)
            if thing.gap and z > 4:
                x = thing.x + side * 5
                self._billboard(
                    tiles, BUILDING, x, z, thing.height, 10.0, thing.width, gain=gain * 0.9
                )
        self._plane(sprite, BUILDING, thing.x, z, end, 0.0, thing.height, gain=gain)

    def _fence(self, thing: Thing, z: float, lap: int) -> None:
        if z + thing.length < 0.6 or z > min(50.0, self.f * thing.height / _LEAST["fence"]):
            return
        repeat = max(1, round(thing.length / 4))
        self._plane(
            sprites.fence(thing.variant),
            FENCE,
            thing.x,
            z,
            z + thing.length,
            0.0,
            thing.height,
            gain=0.5 + 0.5 * self._gain(thing.x),
            repeat=repeat,
        )

    def _tree(self, thing: Thing, z: float, lap: int) -> None:
        if z < 1.5:
            return
        sprite = sprites.tree(thing.variant)
        width = thing.height * sprite.width / sprite.height
        self._billboard(sprite, TREE, thing.x, z, 0.0, width, thing.height)

    def _lamp(self, thing: Thing, z: float, lap: int) -> None:
        if not 1.0 < z < max(10.0, self.f * thing.width / _LEAST["lamp"]):
            return
        colour = ((70, 74, 74), (52, 62, 50), (150, 152, 152))[thing.variant]
        thick = self.f * thing.width / z
        u, top, foot = self._u(thing.x, z), self._v(thing.height, z), self._v(0.0, z)
        self._bar(u - thick / 2, top, u + thick / 2, foot, colour, z)
        toward = -1.0 if thing.x > 0 else 1.0
        reach = u + toward * self.f * 1.6 / z
        arm = thick * 0.7
        self._bar(min(u, reach), top, max(u, reach), top + arm, colour, z)
        lamp = reach - toward * self.f * 0.7 / z
        self._bar(min(lamp, reach), top, max(lamp, reach), top + 1.5 * arm + 1, (190, 196, 196), z)
        # The thicker base that most lamp posts have.
        base = self._v(1.1, z)
        self._bar(u - thick * 0.75, base, u + thick * 0.75, foot, colour, z)

    def _post(self, thing: Thing, z: float, lap: int) -> None:
        if not 1.0 < z < max(8.0, self.f * thing.width / _LEAST["lamp"]):
            return
        colour = ((40, 42, 42), (60, 66, 60), (190, 192, 192))[thing.variant]
        half = self.f * thing.width / z / 2
        u = self._u(thing.x, z)
        self._bar(u - half, self._v(thing.height, z), u + half, self._v(0.0, z), colour, z)

    def _sign(self, thing: Thing, z: float, lap: int) -> None:
        if not 1.0 < z < max(8.0, min(60.0, self.f * thing.width / _LEAST["sign"])):
            return
        sprite = sprites.sign(thing.variant)
        high = thing.width * sprite.height / sprite.width
        thick = max(2.0, self.f * (0.16 if thing.width < 2 else 0.3) / z)
        colour = (140, 144, 144) if thing.variant < 10 else (48, 50, 50)
        u, foot = self._u(thing.x, z), self._v(0.0, z)
        offsets = (0.0,) if thing.width < 2 else (-0.35 * thing.width, 0.35 * thing.width)
        for offset in offsets:
            x = u + self.f * offset / z
            self._bar(x - thick / 2, self._v(thing.height, z), x + thick / 2, foot, colour, z)
        base = thing.height - (high if thing.width >= 2 else 0.3 * high)
        self._billboard(sprite, SIGN, thing.x, z, base, thing.width, high)

    def _shadow(self, thing: Thing, z: float) -> None:
        """Dark ground below a car; the ground keeps its class."""
        if not -3.0 < z < max(12.0, min(60.0, self.f * 1.78 / _LEAST["car"])):
            return
        near, far = max(z - 0.15, 0.8), max(z + 4.2, 1.2)
        points = [
            (self._u(thing.x - 0.95, near), self._v(0, near)),
            (self._u(thing.x + 0.95, near), self._v(0, near)),
            (self._u(thing.x + 0.95, far), self._v(0, far)),
            (self._u(thing.x - 0.95, far), self._v(0, far)),
        ]
        outline = _outline(points)
        cv2.fillConvexPoly(self.pixels, outline, (34, 32, 32))

    def _car(self, thing: Thing, z: float, lap: int) -> None:
        if not -4.0 < z < max(12.0, min(75.0, self.f * 1.78 / _LEAST["car"])):
            return
        code = self._slot(thing, lap, CAR)
        width = 1.78
        nose, cabin, flank, paint = sprites.car(thing.variant, thing.facing)
        body = width * nose.height / nose.width
        height = body + width * cabin.height / cabin.width
        inner = thing.x - width / 2 if thing.x > 0 else thing.x + width / 2
        if inner * thing.x > 0:
            length = 4.1 if height < 2 else 4.8
            self._plane(flank, code, inner, z, z + length, 0.0, height, gain=self._gain(thing.x))
        if z < 0.8:
            return
        # The windows stand back from the bumper; what lies between is bonnet or boot lid.
        back = z + sprites.car_setback(thing.variant, thing.facing)
        self._billboard(cabin, code, thing.x, back, body, width, height - body)
        if back > z and body < self.h:
            haze = self._haze(z)
            lid = tuple(c * (1 - haze) + self.look.haze_level * haze for c in paint)
            half = 0.94 * width / 2
            points = [
                (self._u(thing.x + side * half, far), self._v(body + rise, far))
                for side, far, rise in ((-1, z, 0), (1, z, 0), (1, back, 0.05), (-1, back, 0.05))
            ]
            outline = _outline(points)
            # The same integer corners give the same pixels on both.
            cv2.fillConvexPoly(self.pixels, outline, lid)
            cv2.fillConvexPoly(self.codes, outline, (code,))
            left, top = outline.min(axis=0).tolist()
            right, bottom = outline.max(axis=0).tolist()
            box = self._clip(left, top, right + 1, bottom + 1)
            if box is not None:
                self._grow(code, box)
        self._billboard(nose, code, thing.x, z, 0.0, width, body)

    def _pedestrian(self, thing: Thing, z: float, lap: int) -> None:
        if not 1.2 < z < max(8.0, min(55.0, self.f * 0.6 / _LEAST["pedestrian"])):
            return
        code = self._slot(thing, lap, PEDESTRIAN)
        step = int((self.time * 1.0 + thing.phase) * sprites.PHASES) % sprites.PHASES
        sprite = sprites.pedestrian(thing.variant, step)
        width = thing.height * sprite.width / sprite.height
        x, flip = thing.x, thing.facing
        if thing.speed == 0:
            # Those seen from the side pace up and down across the pavement.
            cycle = (self.time / 3 + thing.phase) % 1
            flip = cycle > 0.5
            x += 0.5 - 2 * abs(cycle - 0.5)
        self._billboard(sprite, code, x, z, 0.0, width, thing.height, flip=flip)

    def _bicyclist(self, thing: Thing, z: float, lap: int) -> None:
        if not 1.2 < z < max(8.0, min(55.0, self.f * 0.7 / _LEAST["bicyclist"])):
            return
        code = self._slot(thing, lap, BICYCLIST)
        step = int((self.time * 1.2 + thing.phase) * sprites.PHASES) % sprites.PHASES
        sprite = sprites.bicyclist(thing.variant, step)
        width = thing.height * sprite.width / sprite.height
        self._billboard(sprite, code, thing.x, z, 0.0, width, thing.height, flip=thing.x > 0)

    def _finish(self) -> StreetFrame:
        instance_map: NDArray[np.uint16] = np.zeros(self.codes.shape, np.uint16)
        instances = []
        for slot, (number, label, (x0, y0, x1, y1)) in enumerate(self.slots, start=1):
            if x1 <= x0:
                continue
            seen = self.codes[y0:y1, x0:x1] == (label | slot << 4)
            left, top, width, height = cv2.boundingRect(seen.view(np.uint8))
            if not width:
                continue
            np.copyto(instance_map[y0:y1, x0:x1], np.uint16(number), where=seen)
            box = (x0 + left, y0 + top, x0 + left + width, y0 + top + height)
            instances.append(StreetInstance(number, label, box, int(np.count_nonzero(seen))))
        instances.sort(key=lambda instance: instance.id)
        class_map = (self.codes & 15).astype(np.uint8)
        pixels = self.pixels
        if self.look.blur:
            pixels = np.asarray(cv2.GaussianBlur(pixels, (3, 3), 0), np.uint8)
        pixels = np.asarray(cv2.LUT(pixels, self.look.tone), np.uint8)
        shift_y, shift_x = (self.index * 37) % 64, (self.index * 53 + 11) % 64
        rows, columns = class_map.shape
        noise = self.look.noise[shift_y : shift_y + rows, shift_x : shift_x + columns]
        pixels = np.asarray(cv2.add(pixels, noise), np.uint8)
        return StreetFrame(pixels, class_map, instance_map, tuple(instances))
