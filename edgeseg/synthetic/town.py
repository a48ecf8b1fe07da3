"""What a seed decides about a synthetic street: its houses, furniture, people and traffic.

Lengths are metres, speeds metres per second. `edgeseg.synthetic.painter` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from edgeseg.synthetic import sprites
from edgeseg.synthetic.scenery import (
    LOOP,
    Backdrop,
    Ground,
    Layout,
    Look,
    make_backdrop,
    make_ground,
    make_layout,
    make_look,
    make_sky,
)
from edgeseg.synthetic.sprites import Bytes

SCENES = ("city", "suburb", "highway")


@dataclass(frozen=True)
class Thing:
    """Something that stands or moves on the street; lengths in metres, speed in metres/second.

    ``layer`` orders the painting: 0 buildings, 1 behind the fences, 2 fences, 3 all else.
    ``loop`` is the distance after which it comes back as another one, 0 for never.
    """

    kind: str
    layer: int
    s: float
    x: float
    variant: int = 0
    length: float = 0.0
    height: float = 0.0
    width: float = 0.0
    speed: float = 0.0
    loop: float = LOOP
    phase: float = 0.0
    facing: bool = False
    gap: bool = False
    serial: int = -1


@dataclass(frozen=True)
class Town:
    """All that is the same in every frame of a street; shared by threads, never written to.

    ``instances`` counts the things that are instances. ``sky`` and the backdrop are wider than
    a frame by ``margin`` pixels on each side, for the camera turns with the road.
    """

    height: int
    width: int
    scene: str
    look: Look
    things: tuple[Thing, ...]
    instances: int
    ground: Ground
    margin: int
    sky: Bytes
    backdrop: Backdrop


def build_town(seed: int, scene: str | None, height: int, width: int) -> Town:
    """The town of a seed, for frames of this size; ``scene`` None lets the seed choose."""
    random = np.random.default_rng(seed)
    chosen = SCENES[int(np.searchsorted((0.55, 0.85), random.random()))]
    scene = chosen if scene is None else scene
    look = make_look(random, scene, height, width)
    layout = make_layout(random, scene)
    things = _populate(random, scene, layout, look.speed)
    ground = make_ground(random, layout)
    margin = int(look.focal * 2 * abs(look.bend) * 200 / (2 * math.pi)) + 2
    return Town(
        height=height,
        width=width,
        scene=scene,
        look=look,
        things=things,
        instances=1 + max(thing.serial for thing in things),
        ground=ground,
        margin=margin,
        sky=make_sky(random, look, height, width + 2 * margin),
        backdrop=make_backdrop(random, scene, look, width + 2 * margin),
    )


def _populate(
    random: np.random.Generator, scene: str, layout: Layout, speed: float
) -> tuple[Thing, ...]:
    """Everything that stands or moves on the street."""
    things: list[Thing] = []
    for side, edge, walk, wall, parking in zip(
        (-1, 1), layout.edge, layout.walk, layout.wall, layout.parking, strict=True
    ):
        _build_houses(things, random, scene, side, wall)
        if scene == "highway":
            _plant_highway(things, random, layout, side, edge)
        else:
            _furnish(things, random, scene, side, edge, walk, wall)
            if parking:
                _park(things, random, layout, side, edge)
            _walkers(things, random, scene, side, edge, walk)
    _traffic(things, random, scene, layout, speed)
    # Parallel to the road, what stands farther out never hides what stands farther in, so all
    # that is behind a fence is painted before it, whatever the distance.
    barrier = {
        side: min((abs(t.x) for t in things if t.kind == "fence" and t.x * side > 0), default=1e9)
        for side in (-1, 1)
    }
    numbered = []
    serial = 0
    for thing in things:
        if thing.layer == 3 and abs(thing.x) > barrier[1 if thing.x > 0 else -1]:
            thing = replace(thing, layer=1)
        if thing.kind in ("car", "pedestrian", "bicyclist"):
            thing = replace(thing, serial=serial)
            serial += 1
        numbered.append(thing)
    return tuple(numbered)


def _build_houses(
    things: list[Thing], random: np.random.Generator, scene: str, side: int, wall: float
) -> None:
    fronts = random.integers(0, sprites.FACADES, 6)
    if scene == "suburb":
        fronts = fronts // 2 * 2
    roofs = random.integers(0, sprites.ROOFS, 2)
    tall = random.uniform(7, 12) if scene == "city" else random.uniform(5, 7.5)
    s, gap, shift, before = 0.0, True, 0.0, 0.0
    while s < LOOP - 6:
        length = min(float(random.uniform(8, 15)), LOOP - s)
        present = {"city": 0.94, "suburb": 0.72}.get(scene, 0.16)
        if random.random() < present:
            if gap:
                shift = float(random.uniform(0, 0.8 if scene == "city" else 2.5))
            height = float(tall * random.uniform(0.8, 1.35))
            things.append(
                Thing(
                    "house",
                    0,
                    s,
                    side * (wall + shift),
                    variant=int(random.choice(fronts)),
                    length=length,
                    height=height,
                    width=float(random.uniform(1.4, 3.0)) if random.random() < 0.75 else 0.0,
                    phase=float(random.choice(roofs)),
                    # The end wall shows beside a gap and above a lower neighbour.
                    gap=gap or height > before - 1.5,
                )
            )
            gap, before = False, height
        else:
            gap = True
        s += length
        if scene != "city" or random.random() < 0.12:
            s += float(random.uniform(2.5, 6))
            gap = True


def _fences(
    things: list[Thing],
    random: np.random.Generator,
    x: float,
    share: float,
    kinds: tuple[int, ...],
    height: float,
) -> None:
    s = 0.0
    while s < LOOP - 8:
        length = 8.0 * int(random.integers(1, 4))
        length = min(length, LOOP - s)
        if random.random() < share:
            kind = int(random.choice(kinds))
            for part in np.arange(0.0, length, 8.0):
                end = min(8.0, length - float(part))
                things.append(
                    Thing("fence", 2, s + float(part), x, kind, length=end, height=height)
                )
        s += length + 4.0


def _furnish(
    things: list[Thing],
    random: np.random.Generator,
    scene: str,
    side: int,
    edge: float,
    walk: float,
    wall: float,
) -> None:
    """Lamps, signs, fences and trees of a street with pavements."""
    kerb = side * (edge + 0.35)
    variant = int(random.integers(3))
    step = float(random.uniform(15, 24))
    for s in np.arange(float(random.uniform(0, step)), LOOP - 5, step):
        height = float(random.uniform(6.5, 9))
        thick = float(random.uniform(0.2, 0.3))
        things.append(Thing("lamp", 3, float(s), kerb, variant, height=height, width=thick))
    for s in np.arange(float(random.uniform(0, 9)), LOOP, 9.0):
        s = float(s + random.uniform(0, 6))
        pick = random.random()
        if pick < 0.66:
            kind = int(random.integers(sprites.SIGNS))
            size = 0.6 if kind >= 10 else float(random.uniform(0.8, 1.2))
            high = float(random.uniform(2.1, 2.9))
            things.append(Thing("sign", 3, s, kerb, kind, height=high, width=size))
        elif pick < 0.8:
            things.append(Thing("post", 3, s, kerb, variant, height=1.0, width=0.22))
    railings = (0, 1, 2) if scene == "city" else (0, 3, 4, 5)
    if scene == "city":
        if random.random() < 0.6:
            _fences(things, random, side * (edge + 0.2), 0.4, railings, 1.05)
    else:
        line = side * (edge + walk + 0.2)
        _fences(things, random, line, 0.6, railings, float(random.uniform(1.0, 1.6)))
    trees = random.integers(0, 12, 3)
    count = int(random.integers(3, 8)) if scene == "city" else int(random.integers(10, 17))
    for s in random.uniform(0, LOOP, count):
        front = scene == "city" or random.random() < 0.25
        x = edge + 0.9 if front else float(random.uniform(edge + walk + 1.6, wall + 2))
        high = float(random.uniform(5, 9) if front else random.uniform(6, 12))
        things.append(
            Thing(
                "tree",
                3 if front else 1,
                float(s),
                side * x,
                int(random.choice(trees)),
                height=high,
            )
        )
    if scene == "suburb":
        for s in random.uniform(0, LOOP, 12):
            x = float(random.uniform(edge + walk + 1.0, wall - 0.5))
            kind = int(random.integers(12, sprites.TREES))
            high = float(random.uniform(1.6, 3))
            things.append(Thing("tree", 1, float(s), side * x, kind, height=high))


def _plant_highway(
    things: list[Thing], random: np.random.Generator, layout: Layout, side: int, edge: float
) -> None:
    kind = int(random.integers(6, 8))
    if side != layout.keep:
        _fences(things, random, side * (edge + 0.4), 1.0, (kind,), 0.95)
    elif random.random() < 0.7:
        _fences(things, random, side * (edge + 0.5), 0.6, (kind,), 0.85)
    outer = edge + 3 if side == layout.keep else layout.wall[(side + 1) // 2] - 11
    trees = random.integers(0, sprites.TREES, 4)
    for s in random.uniform(0, LOOP, int(random.integers(14, 34))):
        variant = int(random.choice(trees))
        high = float(random.uniform(2, 4) if variant >= 12 else random.uniform(6, 12))
        x = side * float(outer + random.uniform(0, 9))
        things.append(Thing("tree", 1, float(s), x, variant, height=high))
    step = float(random.uniform(22, 34))
    post = side * (edge + 1.2)
    if side == layout.keep or random.random() < 0.5:
        for s in np.arange(float(random.uniform(0, step)), LOOP - 5, step):
            things.append(Thing("lamp", 1, float(s), post, 2, height=9.5, width=0.34))
    if side == layout.keep:
        for s in np.arange(float(random.uniform(0, 40)), LOOP, 38.0):
            large = random.random() < 0.5
            size = float(random.uniform(2.6, 3.8)) if large else 1.1
            kind = int(random.choice((3, 8))) if large else int(random.integers(0, 3))
            high = 5.2 if large else 2.8
            things.append(Thing("sign", 1, float(s), post, kind, height=high, width=size))


def _park(
    things: list[Thing], random: np.random.Generator, layout: Layout, side: int, edge: float
) -> None:
    s = float(random.uniform(0, 5))
    share = float(random.uniform(0.4, 0.85))
    while s < LOOP - 6:
        if random.random() < share:
            variant = int(random.integers(sprites.CARS))
            things.append(
                Thing("car", 3, s, side * (edge - 1.05), variant, facing=side != layout.keep)
            )
        s += float(random.uniform(5.0, 6.5))


def _walkers(
    things: list[Thing],
    random: np.random.Generator,
    scene: str,
    side: int,
    edge: float,
    walk: float,
) -> None:
    count = int(random.integers(12, 21)) if scene == "city" else int(random.integers(6, 13))
    for s in random.uniform(0, 64, count):
        x = side * (edge + float(random.uniform(0.55, max(0.7, walk - 0.4))))
        variant = int(random.integers(sprites.PEOPLE))
        facing = variant % 2 == 0
        speed = float(random.uniform(0.9, 1.6)) * (1 if variant % 2 else -1)
        things.append(
            Thing(
                "pedestrian",
                3,
                float(s),
                x,
                variant,
                height=float(random.uniform(1.6, 1.9)),
                # Those seen from the side pace across the pavement instead.
                speed=0.0 if variant % 3 == 0 else speed,
                loop=64.0,
                phase=float(random.random()),
                facing=facing,
            )
        )


def _traffic(
    things: list[Thing], random: np.random.Generator, scene: str, layout: Layout, speed: float
) -> None:
    """Moving cars and bicyclists."""
    if random.random() < 0.7:
        things.append(
            Thing(
                "car",
                3,
                float(random.uniform(11, 20)),
                float(random.uniform(-0.3, 0.3)),
                int(random.integers(sprites.CARS)),
                speed=speed,
                loop=0.0,
                phase=float(random.uniform(0, 2 * math.pi)),
            )
        )
    for x, direction in layout.lanes:
        pace = speed * float(random.uniform(0.82, 1.12)) * direction
        spacing = float(random.uniform(16, 30))
        count = 5
        for place in range(count):
            if random.random() < 0.75:
                s = place * spacing + float(random.uniform(0, spacing - 8))
                things.append(
                    Thing(
                        "car",
                        3,
                        s,
                        x + float(random.uniform(-0.25, 0.25)),
                        int(random.integers(sprites.CARS)),
                        speed=pace,
                        loop=count * spacing,
                        facing=direction < 0,
                    )
                )
    if scene == "highway":
        return
    near, far = (
        layout.edge[side] - (2.2 if layout.parking[side] else 0.0)
        for side in ((layout.keep + 1) // 2, (1 - layout.keep) // 2)
    )
    for s in np.arange(0.0, 60.0, 15.0):
        if random.random() < 0.75:
            variant = int(random.integers(sprites.BICYCLES)) // 2 * 2
            things.append(
                Thing(
                    "bicyclist",
                    3,
                    float(s + random.uniform(0, 11)),
                    layout.keep * (near - 0.25),
                    variant,
                    height=float(random.uniform(1.7, 1.9)),
                    speed=4.5,
                    loop=60.0,
                    phase=float(random.random()),
                )
            )
    for s in np.arange(0.0, 64.0, 16.0):
        if random.random() < 0.8:
            # Riders who cross, or who wait at the kerb, are seen from the side.
            variant = int(random.integers(sprites.BICYCLES)) // 2 * 2 + 1
            side = 1 if random.random() < 0.5 else -1
            edge, walk = layout.edge[(side + 1) // 2], layout.walk[(side + 1) // 2]
            x = side * (edge + walk / 2) if random.random() < 0.7 else -layout.keep * (far - 0.6)
            things.append(
                Thing(
                    "bicyclist",
                    3,
                    float(s + random.uniform(0, 12)),
                    x,
                    variant,
                    height=float(random.uniform(1.7, 1.85)),
                    speed=0.6,
                    loop=64.0,
                    phase=float(random.random()),
                )
            )
