"""EdgeSegMaskAssembly against float64 arithmetic, PyTorch, YOLACT's own masks and COCO's format."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import KernelError, RequestError
from edgeseg.geometry import Geometry
from edgeseg.kernels import masks
from edgeseg.kernels.launchers import FLOAT16, FLOAT32, INT32, UINT8, Features, FrameFit, Instances

ROOT = Path(__file__).resolve().parents[2]
PARITY = ROOT.parent / "shared" / "parity"

Floats = NDArray[np.float32]
Exact = NDArray[np.float64]
Bytes = NDArray[np.uint8]

NO_SHORT_CUT = 2
PORTABLE_CODE = 4
AVX2_CODE = 8

# Float32 arithmetic moves a probability by less than this.
ROUNDING = 3e-6


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    if not kernels.available():
        try:
            kernels.build()
        except KernelError as error:
            pytest.skip(f"the CPU kernels are not here and cannot be built: {error}")


@dataclass(frozen=True)
class Scene:
    """Prototypes (channels, height, width), and instances with boxes in network pixels."""

    prototypes: Floats
    coefficients: Floats
    boxes: Floats
    network: tuple[int, int]

    @property
    def arrays(self) -> tuple[Floats, Floats, Floats]:
        return self.prototypes, self.coefficients, self.boxes

    def half(self) -> Scene:
        """The same with values that binary16 has."""
        prototypes, coefficients = (
            array.astype(np.float16).astype(np.float32)
            for array in (self.prototypes, self.coefficients)
        )
        return replace(self, prototypes=prototypes, coefficients=coefficients)


def smooth_scene(
    channels: int, height: int, width: int, network: tuple[int, int], instances: int, seed: int = 0
) -> Scene:
    """Random waves: masks are blobs with soft borders; boxes of all sizes, some partly outside."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    down, along, phase = rng.uniform(-0.5, 0.5, (3, channels, 1, 1))
    prototypes = np.cos(down * y + along * x + 9 * phase)
    sides = np.array([network[1], network[0]])
    centre = rng.uniform(-0.1, 1.1, (instances, 2)) * sides
    extent = np.exp(rng.uniform(np.log(0.02), np.log(1.2), (instances, 2))) * sides
    # Corners in any order.
    extent *= rng.choice([-1, 1], (instances, 2))
    return Scene(
        prototypes.astype(np.float32),
        rng.normal(0, 1.5, (instances, channels)).astype(np.float32),
        np.concatenate([centre - extent / 2, centre + extent / 2], axis=1).astype(np.float32),
        network,
    )


def random_scene(
    channels: int, height: int, width: int, network: tuple[int, int], instances: int, seed: int = 0
) -> Scene:
    """Independent samples: nearly every cell is mixed."""
    rng = np.random.default_rng(seed)
    scene = smooth_scene(channels, height, width, network, instances, seed)
    prototypes = rng.standard_normal((channels, height, width)).astype(np.float32)
    return replace(scene, prototypes=prototypes)


def level_scene(
    channels: int, height: int, width: int, network: tuple[int, int], instances: int, seed: int = 0
) -> Scene:
    """Logits of -0, 0, or hardly more or less: probabilities of 1/2, up to rounding."""
    scene = random_scene(channels, height, width, network, instances, seed)
    rng = np.random.default_rng(seed)
    prototypes = rng.choice(
        np.array([-2e-6, -3e-7, -0.0, 0.0, 1e-7, 4e-7, 3.0], np.float32),
        scene.prototypes.shape,
        p=[0.1, 0.2, 0.1, 0.2, 0.2, 0.1, 0.1],
    )
    return replace(scene, prototypes=prototypes)


KINDS = [smooth_scene, random_scene, level_scene]

# channels, prototypes' height and width, network, frame, fit, instances
CASES = [
    pytest.param(32, 35, 35, (138, 138), (72, 128), "stretch", 20, id="upsampled"),
    pytest.param(32, 35, 35, (138, 138), (72, 128), "letterbox", 20, id="letterbox"),
    pytest.param(8, 20, 33, (77, 130), (131, 61), "letterbox", 20, id="letterbox-upright"),
    pytest.param(5, 24, 18, (96, 72), (96, 72), "stretch", 12, id="network-size"),
    pytest.param(5, 24, 18, (24, 18), (24, 18), "stretch", 12, id="same-size"),
    pytest.param(4, 9, 140, (36, 560), (40, 1999), "stretch", 12, id="wide"),
    pytest.param(5, 64, 90, (64, 90), (23, 17), "stretch", 12, id="smaller"),
    pytest.param(3, 70, 150, (70, 150), (3, 9), "stretch", 9, id="much-smaller"),
    pytest.param(3, 6, 5, (48, 40), (101, 300), "stretch", 9, id="much-larger"),
    pytest.param(4, 4, 3, (32, 24), (250, 3), "stretch", 9, id="larger-and-smaller"),
    pytest.param(7, 1, 9, (8, 72), (16, 40), "stretch", 9, id="one-row"),
    pytest.param(7, 9, 1, (72, 8), (40, 16), "stretch", 9, id="one-column"),
    pytest.param(1, 1, 1, (8, 8), (5, 6), "stretch", 9, id="one-sample"),
    pytest.param(3, 3, 4, (24, 32), (1, 1), "stretch", 9, id="one-pixel"),
    pytest.param(70, 13, 17, (50, 60), (31, 47), "letterbox", 40, id="70-channels"),
]


def unpacked(bits: Bytes, width: int) -> NDArray[np.bool_]:
    return np.unpackbits(bits, axis=-1, count=width).astype(bool)


def exact_crop(a: float, b: float, samples: int, network: int) -> NDArray[np.bool_]:
    """Which samples of an axis a box from ``a`` to ``b`` keeps, in the reference's words."""
    low, high = sorted((a * samples / network, b * samples / network))
    low, high = max(low - 1, 0), min(high + 1, samples)
    return np.array([low <= index < high for index in range(samples)])


def exact_probabilities(scene: Scene) -> Exact:
    """(n, height, width) by float64 arithmetic, zeros outside the boxes."""
    _, height, width = scene.prototypes.shape
    logits = np.einsum(
        "chw,nc->nhw", scene.prototypes.astype(np.float64), scene.coefficients.astype(np.float64)
    )
    values: Exact = 1 / (1 + np.exp(-logits))
    for value, (x1, y1, x2, y2) in zip(values, scene.boxes.tolist(), strict=True):
        rows = exact_crop(y1, y2, height, scene.network[0])
        columns = exact_crop(x1, x2, width, scene.network[1])
        value *= rows[:, None] & columns
    return values


def at_frame_size(values: Exact, geometry: Geometry) -> Exact:
    """(n, frame_height, frame_width): each pixel's centre on its way to the prototypes, float64."""

    def weights(samples: int, network: int, start: int, inner: int, frame: int) -> Exact:
        on_network = (np.arange(frame) + 0.5) * inner / frame + start
        at = np.clip(on_network * samples / network - 0.5, 0, samples - 1)
        near = np.floor(at).astype(int)
        found: Exact = np.zeros((frame, samples))
        np.add.at(found, (np.arange(frame), near), 1 - (at - near))
        np.add.at(found, (np.arange(frame), np.minimum(near + 1, samples - 1)), at - near)
        return found

    g = geometry
    rows = weights(values.shape[1], g.height, g.top, g.inner_height, g.frame_height)
    columns = weights(values.shape[2], g.width, g.left, g.inner_width, g.frame_width)
    result: Exact = rows @ values @ columns.T
    return result


def assert_above(found: NDArray[np.bool_], values: Exact, threshold: float) -> None:
    """``found`` is where ``values`` are above the threshold, but for ties up to rounding."""
    assert found.shape == values.shape
    distance = np.abs(values - threshold)[found != (values > threshold)]
    assert distance.max(initial=0.0) <= ROUNDING, f"{int((distance > ROUNDING).sum())} wrong pixels"


def run_bits(
    scene: Scene, geometry: Geometry, flags: int = 0, threads: int = 1, threshold: float = 0.5
) -> Bytes:
    """Packed bits with raw flags, in memory that was not clear."""
    shape = (len(scene.boxes), geometry.frame_height, (geometry.frame_width + 7) // 8)
    poisoned = np.full(shape, 0xA5, np.uint8)
    bits, _ = masks._run_bits(*scene.arrays, geometry, threshold, poisoned, flags, threads)
    assert bits is poisoned
    return bits


Fit = Literal["stretch", "letterbox"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "height", "width", "network", "frame", "fit", "instances"), CASES
)
def test_equals_float64(
    kind: Callable[..., Scene],
    channels: int,
    height: int,
    width: int,
    network: tuple[int, int],
    frame: tuple[int, int],
    fit: Fit,
    instances: int,
) -> None:
    scene = kind(channels, height, width, network, instances)
    geometry = Geometry.fitting(*frame, *network, fit=fit)
    values = exact_probabilities(scene)

    levels = kernels.assemble_masks(*scene.arrays, network)
    assert levels.shape == values.shape
    assert np.abs(levels - 255 * values).max() < 0.5 + 255 * ROUNDING
    assert not levels[values == 0].any()

    bits = kernels.assemble_mask_bits(*scene.arrays, geometry)
    assert bits.shape == (instances, frame[0], -(-frame[1] // 8))
    pixels = unpacked(bits, frame[1])
    assert_above(pixels, at_frame_size(values, geometry), 0.5)
    # Nothing beyond the frame's width.
    np.testing.assert_array_equal(np.packbits(pixels, axis=-1), bits)


@pytest.mark.parametrize("threshold", [1e-30, 1e-6, 0.02, 0.3, 0.5, 0.77, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("kind", KINDS)
def test_threshold(kind: Callable[..., Scene], threshold: float) -> None:
    scene = kind(6, 19, 23, (76, 92), 20)
    geometry = Geometry.fitting(90, 70, 76, 92, fit="letterbox")
    bits = run_bits(scene, geometry, threshold=threshold)
    assert_above(
        unpacked(bits, 70),
        at_frame_size(exact_probabilities(scene), geometry),
        float(np.float32(threshold)),
    )
    np.testing.assert_array_equal(
        bits, run_bits(scene, geometry, NO_SHORT_CUT, threshold=threshold)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equals_yolact_in_torch(kind: Callable[..., Scene]) -> None:
    torch = pytest.importorskip("torch", reason="runs YOLACT's steps in torch")
    scene = kind(32, 35, 35, (140, 140), 30)
    size = (97, 171)
    prototypes, coefficients, boxes = (torch.from_numpy(array).double() for array in scene.arrays)
    found = torch.sigmoid(prototypes.permute(1, 2, 0) @ coefficients.T)
    x = boxes[:, 0::2] * 35 / 140
    y = boxes[:, 1::2] * 35 / 140
    place = torch.arange(35).view(-1, 1)
    columns, rows = (
        (place >= (axis.amin(dim=1) - 1).clamp(min=0))
        & (place < (axis.amax(dim=1) + 1).clamp(max=35))
        for axis in (x, y)
    )
    found = (found * rows[:, None] * columns[None]).permute(2, 0, 1)
    values = torch.nn.functional.interpolate(
        found[None], size, mode="bilinear", align_corners=False
    )[0]
    geometry = Geometry.fitting(*size, 140, 140, fit="stretch")
    pixels = unpacked(kernels.assemble_mask_bits(*scene.arrays, geometry), size[1])
    assert_above(pixels, values.numpy(), 0.5)


def test_equals_the_masks_of_yolact() -> None:
    # From stored head outputs of the reference: its masks, at frame size, bit for bit but ties.
    arrays = PARITY / "yolact_resnet50.npz"
    if not arrays.is_file():
        pytest.skip("the parity packs are not here")
    wanted = np.load(arrays)
    pack = json.loads((PARITY / "yolact_resnet50.json").read_text())
    case = pack["input"]["detection"]
    kept = wanted["detection.det.score"] > case["score_threshold"]
    prototypes = wanted["heads.proto"].astype(np.float32).transpose(2, 0, 1)
    geometry = Geometry.fitting(case["height"], case["width"], 550, 550, fit="stretch")
    bits = kernels.assemble_mask_bits(
        prototypes,
        wanted["detection.det.mask"][kept],
        wanted["detection.det.box"][kept] * np.float32(550),
        geometry,
    )
    stored = wanted["detection.post.masks_packed"]
    assert bits.shape == stored.shape
    differing = np.unpackbits(bits ^ stored).sum()
    entry = pack["outputs"]["detection.post.masks_packed"]
    # The pack allows more than this kernel needs.
    assert differing <= 50 < entry["max_differing_fraction"] * stored.size * 8


def test_prototypes_may_be_channels_last() -> None:
    scene = smooth_scene(9, 21, 18, (84, 72), 15)
    geometry = Geometry.fitting(50, 60, 84, 72, fit="stretch")
    padded = np.full((21, 18, 16), np.nan, np.float32)
    padded[..., :9] = scene.prototypes.transpose(1, 2, 0)
    room = np.full((9, 23, 18), np.nan, np.float32)
    room[:, :21] = scene.prototypes
    views = {
        "last": np.ascontiguousarray(scene.prototypes.transpose(1, 2, 0)).transpose(2, 0, 1),
        "last-padded": padded[..., :9].transpose(2, 0, 1),
        "planes-apart": room[:, :21],
        "batch": scene.prototypes[None],
    }
    levels = kernels.assemble_masks(*scene.arrays, scene.network)
    bits = kernels.assemble_mask_bits(*scene.arrays, geometry)
    for name, prototypes in views.items():
        assert name == "batch" or np.shares_memory(prototypes, prototypes.base)
        rest = (prototypes, scene.coefficients, scene.boxes)
        np.testing.assert_array_equal(kernels.assemble_masks(*rest, scene.network), levels)
        np.testing.assert_array_equal(kernels.assemble_mask_bits(*rest, geometry), bits)


@pytest.mark.skipif(sys.platform != "linux", reason="takes memory that cannot be read from Linux")
def test_reads_nothing_beyond_the_prototypes() -> None:
    # They end where readable memory ends. In a process of its own, which a read too far would end.
    program = """
import ctypes, mmap, numpy as np
from edgeseg import kernels
from edgeseg.geometry import Geometry
size = 64 * mmap.PAGESIZE
memory = mmap.mmap(-1, size + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
for channels, height, width in [(3, 9, 21), (5, 1, 16), (2, 3, 5), (1, 1, 1), (32, 30, 37)]:
    count = channels * height * width
    flat = np.frombuffer(memory, np.float32, count, size - 4 * count)
    flat[:] = np.random.default_rng(0).standard_normal(count)
    network = (4 * height, 4 * width)
    boxes = np.array([[0, 0, 4 * width, 4 * height], [2 * width, 0, 999, 999]], np.float32)
    coefficients = np.ones((2, channels), np.float32)
    geometry = Geometry.fitting(40, 50, *network, fit="stretch")
    first = flat.reshape(channels, height, width)
    last = flat.reshape(height, width, channels).transpose(2, 0, 1)
    for prototypes in (first, last):
        kernels.assemble_masks(prototypes, coefficients, boxes, network)
        kernels.assemble_mask_bits(prototypes, coefficients, boxes, geometry)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


# x1, x2 of a box in a network 40 wide over 10 samples, and the samples that it keeps.
SIDES: list[tuple[str, float, float, range]] = [
    ("whole-samples", 8.0, 20.0, range(1, 6)),
    ("between-samples", 8.1, 19.9, range(2, 6)),
    ("hardly-more", 7.998, 20.002, range(1, 7)),
    ("reversed", 20.0, 8.0, range(1, 6)),
    ("no-size", 20.0, 20.0, range(4, 6)),
    ("no-size-between", 21.0, 21.0, range(5, 7)),
    ("all", 0.0, 40.0, range(10)),
    ("more-than-all", -100.0, 140.0, range(10)),
    ("left-of-it", -50.0, -5.0, range(0)),
    ("left-touching", -50.0, -4.0, range(0)),
    ("left-within-a-sample", -50.0, -3.0, range(1)),
    ("right-of-it", 44.0, 90.0, range(0)),
    ("right-within-a-sample", 40.0, 90.0, range(9, 10)),
    ("nan", np.nan, 20.0, range(0)),
    ("nan-second", 8.0, np.nan, range(0)),
    ("infinite", -np.inf, np.inf, range(10)),
    ("beyond", np.inf, np.inf, range(0)),
    ("overflow", -3e38, 3e38, range(10)),
]


@pytest.mark.parametrize(
    ("first", "second", "kept"), [pytest.param(*side, id=name) for name, *side in SIDES]
)
@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_box(first: float, second: float, kept: range, axis: int) -> None:
    shape = (10, 6) if axis == 0 else (6, 10)
    network = (4 * shape[0], 4 * shape[1])
    box = np.array([[first, -1, second, 99] if axis == 1 else [-1, first, 99, second]], np.float32)
    scene = Scene(np.full((1, *shape), 9, np.float32), np.ones((1, 1), np.float32), box, network)
    expected = np.zeros(shape, bool)
    expected[(slice(None), list(kept)) if axis == 1 else list(kept)] = True
    levels = kernels.assemble_masks(*scene.arrays, network)[0]
    np.testing.assert_array_equal(levels, np.where(expected, 255, 0))
    for size in [(24, 40), (31, 17), (200, 3)]:
        geometry = Geometry.fitting(*size, *network, fit="stretch")
        values = at_frame_size(expected[None] / (1 + np.exp(-9.0)), geometry)
        for flags in (0, NO_SHORT_CUT):
            assert_above(unpacked(run_bits(scene, geometry, flags), size[1]), values, 0.5)


def test_logits_that_are_not_finite() -> None:
    prototypes = np.full((1, 8, 8), 2, np.float32)
    prototypes[0, 0, 0], prototypes[0, 3, 4], prototypes[0, 7, 7] = np.nan, np.inf, -np.inf
    box = np.array([[0, 0, 8, 8]], np.float32)
    scene = Scene(prototypes, np.ones((1, 1), np.float32), box, (8, 8))
    expected = np.full((8, 8), round(255 / (1 + np.exp(-2))))
    expected[0, 0], expected[3, 4], expected[7, 7] = 0, 255, 0
    np.testing.assert_array_equal(kernels.assemble_masks(*scene.arrays, (8, 8))[0], expected)
    geometry = Geometry.fitting(33, 65, 8, 8, fit="stretch")
    np.testing.assert_array_equal(
        run_bits(scene, geometry), run_bits(scene, geometry, NO_SHORT_CUT)
    )
    assert not unpacked(run_bits(scene, geometry), 65)[0, 0, 0]


@pytest.mark.parametrize("scale", [1e-38, 1e-7, 1.0, 40.0, 1e4, 1e38])
def test_probabilities_of_any_logit(scale: float) -> None:
    logits = np.linspace(-3, 3, 601, dtype=np.float32) * np.float32(scale)
    levels = kernels.assemble_masks(
        logits[None, None], np.ones((1, 1), np.float32),
        np.array([[0, 0, 601, 1]], np.float32), (1, 601),
    )  # fmt: skip
    with np.errstate(over="ignore"):
        exact = 255 / (1 + np.exp(-logits.astype(np.float64)))
    assert np.abs(levels[0, 0] - exact).max() < 0.5 + 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "height", "width", "network", "frame", "fit", "instances"), CASES
)
def test_codes_and_short_cut_give_the_same_bytes(
    kind: Callable[..., Scene],
    channels: int,
    height: int,
    width: int,
    network: tuple[int, int],
    frame: tuple[int, int],
    fit: Fit,
    instances: int,
) -> None:
    scene = kind(channels, height, width, network, instances, seed=1)
    geometry = Geometry.fitting(*frame, *network, fit=fit)
    expected = run_bits(scene, geometry, NO_SHORT_CUT | PORTABLE_CODE)
    for code in (0, PORTABLE_CODE, AVX2_CODE):
        for flags in (code, code | NO_SHORT_CUT):
            np.testing.assert_array_equal(run_bits(scene, geometry, flags), expected)
    runs = masks._run_rles(*scene.arrays, geometry, 0.5, NO_SHORT_CUT | PORTABLE_CODE, 1)
    for flags in (0, PORTABLE_CODE, AVX2_CODE):
        assert masks._run_rles(*scene.arrays, geometry, 0.5, flags, 1) == runs


@pytest.mark.parametrize("side", ["above", "below"])
def test_short_cut_keeps_what_rounding_makes(side: str) -> None:
    # All probabilities are on one side of the threshold, by about the least that float32 can show.
    # Rounding in the interpolation takes some pixels to the other side, with the short cut too.
    threshold = np.float32(0.49)
    logits = np.unique((np.log(0.49 / 0.51) + np.arange(-100, 101) * 2e-9).astype(np.float32))
    steps = (1 / (1 + np.exp(-logits.astype(np.float64))) - threshold) / np.spacing(threshold)
    if side == "below":
        steps = -steps
    choice = logits[(steps > 0.6) & (steps < 1.7)]
    scene = Scene(
        np.random.default_rng(9).choice(choice, (1, 40, 40)),
        np.ones((1, 1), np.float32),
        np.array([[0, 0, 40, 40]], np.float32),
        (40, 40),
    )
    geometry = Geometry.fitting(275, 277, 40, 40, fit="stretch")
    full = run_bits(scene, geometry, NO_SHORT_CUT, threshold=0.49)
    assert 0 < unpacked(full, 277).mean() < 1
    np.testing.assert_array_equal(run_bits(scene, geometry, threshold=0.49), full)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_give_the_same_bytes(threads: int) -> None:
    scene = smooth_scene(16, 40, 30, (160, 120), 37)
    last = np.ascontiguousarray(scene.prototypes.transpose(1, 2, 0)).transpose(2, 0, 1)
    geometry = Geometry.fitting(101, 200, 160, 120, fit="letterbox")
    one = run_bits(scene, geometry)
    runs = kernels.assemble_mask_rles(*scene.arrays, geometry, threads=1)
    for prototypes in (scene.prototypes, last):
        rest = (prototypes, scene.coefficients, scene.boxes)
        bits = kernels.assemble_mask_bits(*rest, geometry, threads=threads)
        np.testing.assert_array_equal(bits, one)
        assert kernels.assemble_mask_rles(*rest, geometry, threads=threads) == runs


def test_sizes_may_change_from_call_to_call() -> None:
    for channels, side, frame in [(4, 6, 31), (9, 50, 120), (4, 6, 31), (2, 3, 90), (4, 6, 30)]:
        scene = smooth_scene(channels, side, side, (64, 64), 12)
        for fit in ("stretch", "letterbox"):
            geometry = Geometry.fitting(frame, 2 * frame, 64, 64, fit=fit)
            values = at_frame_size(exact_probabilities(scene), geometry)
            bits = kernels.assemble_mask_bits(*scene.arrays, geometry)
            assert_above(unpacked(bits, 2 * frame), values, 0.5)


# --- COCO's run lengths, read and written here by the published description alone: lengths of runs
# down the columns, zeros first; from the fourth on the difference to the one two before; each in
# groups of five bits, the lowest first, with a sixth bit where more follow and the sign in the last
# group's highest bit; 48 added to make a letter.


def decoded(text: bytes, size: list[int]) -> NDArray[np.bool_]:
    lengths: list[int] = []
    value, shift = 0, 0
    for letter in text:
        group = letter - 48
        assert 0 <= group < 64
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value, shift = 0, 0
    assert shift == 0
    assert sum(lengths) == size[0] * size[1]
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    pixels: NDArray[np.bool_] = flat.reshape(size[1], size[0]).T
    return pixels


def encoded(mask: NDArray[np.bool_]) -> bytes:
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    if flat[0]:
        lengths.insert(0, 0)
    letters = []
    for index, length in enumerate(lengths):
        value = length - lengths[index - 2] if index > 2 else length
        while True:
            group, value = value & 31, value >> 5
            if value == (-1 if group & 16 else 0):
                letters.append(group + 48)
                break
            letters.append((group | 32) + 48)
    return bytes(letters)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "height", "width", "network", "frame", "fit", "instances"), CASES
)
def test_rles_are_the_bits(
    kind: Callable[..., Scene],
    channels: int,
    height: int,
    width: int,
    network: tuple[int, int],
    frame: tuple[int, int],
    fit: Fit,
    instances: int,
) -> None:
    scene = kind(channels, height, width, network, instances, seed=2)
    geometry = Geometry.fitting(*frame, *network, fit=fit)
    pixels = unpacked(run_bits(scene, geometry), frame[1])
    found = kernels.assemble_mask_rles(*scene.arrays, geometry)
    assert [run["size"] for run in found] == [list(frame)] * instances
    assert [run["counts"] for run in found] == [encoded(mask) for mask in pixels]
    for run, mask in zip(found, pixels, strict=True):
        np.testing.assert_array_equal(decoded(run["counts"], run["size"]), mask)


@pytest.mark.parametrize(
    ("value", "box", "expected"),
    [
        # 1500 = 28 + 14 * 32 + 1 * 1024, after no zeros.
        pytest.param(9, (0, 0, 40, 40), b"0l^1", id="all"),
        pytest.param(-9, (0, 0, 40, 40), b"l^1", id="nothing-above"),
        pytest.param(9, (99, 99, 120, 120), b"l^1", id="box-outside"),
        pytest.param(9, (10, -9, 20, 99), None, id="full-columns"),
        pytest.param(9, (-9, 10, 99, 20), None, id="full-rows"),
        pytest.param(9, (20, 20, 99, 99), None, id="last-corner"),
        pytest.param(9, (-9, -9, 20, 20), None, id="first-corner"),
    ],
)
def test_rle_of_plain_shapes(value: float, box: tuple[float, ...], expected: bytes | None) -> None:
    scene = Scene(
        np.full((1, 10, 10), value, np.float32),
        np.ones((1, 1), np.float32),
        np.array([box], np.float32),
        (40, 40),
    )
    geometry = Geometry.fitting(30, 50, 40, 40, fit="stretch")
    (run,) = kernels.assemble_mask_rles(*scene.arrays, geometry)
    mask = unpacked(run_bits(scene, geometry), 50)[0]
    assert run["counts"] == encoded(mask)
    if expected is not None:
        assert run["counts"] == expected


def test_rles_are_those_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="compares with COCO's own encoder")
    scene = smooth_scene(12, 35, 35, (140, 140), 40)
    geometry = Geometry.fitting(97, 171, 140, 140, fit="letterbox")
    pixels = unpacked(run_bits(scene, geometry), 171).astype(np.uint8)
    expected = [coco.encode(np.asfortranarray(mask)) for mask in pixels]
    assert kernels.assemble_mask_rles(*scene.arrays, geometry) == expected


def test_rles_that_need_more_room_come_all_the_same() -> None:
    scene = random_scene(4, 20, 20, (80, 80), 10)
    geometry = Geometry.fitting(90, 90, 80, 80, fit="stretch")
    expected = kernels.assemble_mask_rles(*scene.arrays, geometry)
    for room in (1, 100, sum(len(run["counts"]) for run in expected)):
        assert masks._run_rles(*scene.arrays, geometry, 0.5, 0, 2, room) == expected


def test_no_instances() -> None:
    scene = smooth_scene(4, 5, 6, (20, 24), 0)
    geometry = Geometry.fitting(9, 17, 20, 24, fit="stretch")
    assert kernels.assemble_masks(*scene.arrays, scene.network).shape == (0, 5, 6)
    assert kernels.assemble_mask_bits(*scene.arrays, geometry).shape == (0, 9, 3)
    assert kernels.assemble_mask_rles(*scene.arrays, geometry) == []


def test_out_is_used_in_place_and_nothing_around_it() -> None:
    scene = random_scene(4, 7, 11, (28, 44), 5)
    geometry = Geometry.fitting(37, 41, 28, 44, fit="stretch")
    room = np.full((3, 5, 7, 11), 77, np.uint8)
    assert kernels.assemble_masks(*scene.arrays, scene.network, out=room[1]).base is room
    np.testing.assert_array_equal(room[1], kernels.assemble_masks(*scene.arrays, scene.network))
    assert (room[[0, 2]] == 77).all()
    room = np.full((3, 5, 37, 6), 77, np.uint8)
    kernels.assemble_mask_bits(*scene.arrays, geometry, out=room[1])
    np.testing.assert_array_equal(room[1], run_bits(scene, geometry))
    assert (room[[0, 2]] == 77).all()


GOOD = smooth_scene(3, 4, 5, (16, 20), 2)
GOOD_FIT = Geometry.fitting(9, 8, 16, 20, fit="stretch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"prototypes": GOOD.prototypes.astype(np.float64)}, "float32", id="float64"),
        pytest.param({"prototypes": [[[1.0]]]}, "list", id="list"),
        pytest.param({"prototypes": GOOD.prototypes[0]}, r"\(4, 5\)", id="two-dimensions"),
        pytest.param(
            {"prototypes": np.zeros((2, 3, 4, 5), np.float32)}, r"\(2, 3", id="batch-of-two"
        ),
        pytest.param({"prototypes": GOOD.prototypes[:, ::2]}, "strides", id="every-second-row"),
        pytest.param({"prototypes": GOOD.prototypes[:, :, ::-1]}, "strides", id="mirrored"),
        pytest.param({"prototypes": GOOD.prototypes[:, :, 1:]}, "strides", id="cut"),
        pytest.param(
            {"prototypes": np.broadcast_to(np.float32(0), (3, 4, 5))}, "strides", id="broadcast"
        ),
        pytest.param({"prototypes": np.zeros((3, 0, 5), np.float32)}, "high and wide", id="empty"),
        pytest.param({"prototypes": np.zeros((0, 4, 5), np.float32)}, "got 0", id="no-channels"),
        pytest.param(
            {"prototypes": np.zeros((4097, 1, 1), np.float32)}, "4097", id="many-channels"
        ),
        pytest.param({"coefficients": GOOD.coefficients[:, :2]}, r"\(n, 3\)", id="coefficients"),
        pytest.param({"coefficients": GOOD.coefficients[0]}, r"\(n, 3\)", id="one-dimension"),
        pytest.param({"coefficients": GOOD.coefficients[:1]}, "2 boxes", id="fewer"),
        pytest.param(
            {"coefficients": np.asfortranarray(GOOD.coefficients)}, "contiguous", id="transposed"
        ),
        pytest.param({"boxes": GOOD.boxes.astype(np.int32)}, "int32", id="whole-boxes"),
        pytest.param({"boxes": GOOD.boxes[:, :3]}, r"\(n, 4\)", id="boxes-of-three"),
        pytest.param({"threshold": 0.0}, "threshold", id="threshold-0"),
        pytest.param({"threshold": 1.0}, "threshold", id="threshold-1"),
        pytest.param({"threshold": float("nan")}, "threshold", id="threshold-nan"),
        pytest.param({"threads": -1}, "threads", id="threads"),
        pytest.param({"out": np.zeros((2, 9, 2), np.uint8)}, r"\(2, 9, 1\)", id="out-shape"),
        pytest.param({"out": np.zeros((2, 9, 1), np.int8)}, "uint8", id="out-dtype"),
        pytest.param({"out": np.zeros((2, 9, 2), np.uint8)[..., :1]}, "contig", id="out-strided"),
        pytest.param(
            {"out": np.frombuffer(bytes(18), np.uint8).reshape(2, 9, 1)},
            "writable",
            id="out-read-only",
        ),
        pytest.param({"geometry": replace(GOOD_FIT, frame_height=0)}, "frame_height", id="frame"),
        pytest.param({"geometry": replace(GOOD_FIT, left=1)}, r"\(0, 1\)", id="outside"),
        pytest.param({"geometry": replace(GOOD_FIT, inner_height=0)}, "0 x 20", id="no-inside"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "prototypes": GOOD.prototypes,
        "coefficients": GOOD.coefficients,
        "boxes": GOOD.boxes,
        "geometry": GOOD_FIT,
    }
    with pytest.raises(RequestError, match=message):
        kernels.assemble_mask_bits(**(good | arguments))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(RequestError, match="height, width"):
        kernels.assemble_masks(*GOOD.arrays, None)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="1 to 1048576"):
        kernels.assemble_masks(*GOOD.arrays, (1 << 21, 20))
    vast = replace(GOOD_FIT, frame_height=1 << 16, frame_width=1 << 16)
    with pytest.raises(RequestError, match="packed bits"):
        kernels.assemble_mask_rles(*GOOD.arrays, vast)


def bad_arguments(
    features: Features, instances: Instances, fit: FrameFit
) -> Iterator[tuple[Features, Instances, FrameFit, float]]:
    """What no entry point may accept; each struct has one bad field."""

    def changed(struct: Any, name: str, value: Any) -> Any:
        copy = type(struct)(*(getattr(struct, field) for field, _ in struct._fields_))
        setattr(copy, name, value)
        return copy

    for name, value in [
        ("data", None), ("type", UINT8), ("type", INT32), ("channels", 0), ("channels", 4097),
        ("height", 0), ("width", -1), ("width", 1 << 21), ("channel_stride", 0),
        ("pixel_stride", -1),
    ]:  # fmt: skip
        yield changed(features, name, value), instances, fit, 0.5
    for name, value in [
        ("coefficients", None), ("boxes", None), ("capacity", -1), ("network_height", 0),
        ("network_height", 15), ("network_width", 1 << 21),
    ]:  # fmt: skip
        yield features, changed(instances, name, value), fit, 0.5
    for name, value in [
        ("frame_height", 0), ("frame_width", 1 << 21), ("height", 15), ("width", 21), ("top", -1),
        ("top", 1), ("left", -1), ("left", 1), ("inner_height", 0), ("inner_height", 17),
        ("inner_width", 0), ("inner_width", 21),
    ]:  # fmt: skip
        yield features, instances, changed(fit, name, value), 0.5
    for threshold in (0.0, 1.0, -1.0, float("nan")):
        yield features, instances, fit, threshold


def good_arguments() -> tuple[Features, Instances, FrameFit]:
    features = Features.channels_first(GOOD.prototypes.ctypes.data, FLOAT32, 3, 4, 5)
    instances = Instances(
        GOOD.coefficients.ctypes.data, GOOD.boxes.ctypes.data, None, 2, *GOOD.network
    )
    return features, instances, masks.launched_fit(GOOD_FIT)


def test_the_library_checks_its_own_arguments() -> None:
    library = kernels.load()
    bits = np.empty((2, 9, 1), np.uint8)
    spans = np.empty((2, 2), np.int64)
    needed = ctypes.c_int64()
    out = bits.ctypes.data

    def bits_of(features: Any, instances: Any, fit: Any, threshold: float, *rest: Any) -> int:
        pointers = map(ctypes.byref, (features, instances, fit))
        return int(library.edgeseg_mask_bits(*pointers, threshold, *rest))

    def runs_of(features: Any, instances: Any, fit: Any, threshold: float, *rest: Any) -> int:
        pointers = map(ctypes.byref, (features, instances, fit))
        return int(library.edgeseg_mask_runs(*pointers, threshold, *rest))

    good = good_arguments()
    assert bits_of(*good, 0.5, out, 0, 1) == 0
    runs = (out, 18, spans.ctypes.data, ctypes.byref(needed))
    assert runs_of(*good, 0.5, *runs, 0, 1) == 0
    for bad in bad_arguments(*good):
        assert bits_of(*bad, out, 0, 1) == 1
        assert runs_of(*bad, *runs, 0, 1) == 1
    for out_and_flags in [(None, 0, 1), (out, 16, 1), (out, 0, 0)]:
        assert bits_of(*good, 0.5, *out_and_flags) == 1
        pointers = map(ctypes.byref, good[:2])
        assert library.edgeseg_mask_assembly(*pointers, *out_and_flags) == 1
    for index, value in [(0, None), (1, -1), (2, None), (3, None)]:
        assert runs_of(*good, 0.5, *runs[:index], value, *runs[index + 1 :], 0, 1) == 1


# --- The CUDA launchers, on the emulation and on a GPU.


class Memory:
    """Where a launcher's arrays live: here, numpy's own memory."""

    stream: int | None = None

    def put(self, array: NDArray[Any]) -> tuple[Any, int]:
        """A copy that the launcher can reach, and its address."""
        copy = array.copy()
        return copy, copy.ctypes.data

    def get(self, held: Any) -> NDArray[Any]:
        return np.asarray(held)


class DeviceMemory(Memory):
    """The GPU's, held by torch."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self.stream = torch.cuda.current_stream().cuda_stream

    def put(self, array: NDArray[Any]) -> tuple[Any, int]:
        tensor = self._torch.from_numpy(array.copy()).cuda()
        return tensor, tensor.data_ptr()

    def get(self, held: Any) -> NDArray[Any]:
        found: NDArray[Any] = held.cpu().numpy()
        return found


Layout = Literal["first", "last", "last-padded", "odd"]
LAYOUTS: list[Layout] = ["first", "last", "last-padded", "odd"]


def placed(prototypes: NDArray[Any], layout: Layout, memory: Memory) -> tuple[Any, Features]:
    """Prototypes in ``memory``; "odd" is channels first at addresses that no vector load takes."""
    channels, height, width = prototypes.shape
    kind = FLOAT16 if prototypes.dtype == np.float16 else FLOAT32
    size = (channels, height, width)
    if layout == "first":
        held, address = memory.put(prototypes)
        return held, Features.channels_first(address, kind, *size)
    if layout == "odd":
        plane = height * width + 1
        room = np.full((channels, plane + 1), np.nan, prototypes.dtype)
        room[:, 1:plane] = prototypes.reshape(channels, -1)
        held, address = memory.put(room)
        return held, Features(address + prototypes.itemsize, kind, *size, plane + 1, 1)
    pitch = channels if layout == "last" else -(-channels // 8) * 8 + 8
    padded = np.full((height, width, pitch), np.nan, prototypes.dtype)
    padded[..., :channels] = prototypes.transpose(1, 2, 0)
    held, address = memory.put(padded)
    return held, Features.channels_last(address, kind, *size, pitch)


def check_launchers(
    library: ctypes.CDLL,
    memory: Memory,
    scene: Scene,
    geometry: Geometry,
    *,
    element: type[Any] = np.float32,
    layout: Layout = "first",
    count: int | None = None,
    offset: int = 0,
    threshold: float = 0.5,
) -> None:
    """Both launchers give the CPU library's bytes, in outputs that were not clear.

    Outputs start ``offset`` elements into their memory, and what lies before and after stays.
    """
    if element is np.float16:
        scene = scene.half()
    capacity = len(scene.boxes)
    prototypes, features = placed(scene.prototypes.astype(element), layout, memory)
    coefficients, coefficients_at = memory.put(scene.coefficients.astype(element))
    boxes, boxes_at = memory.put(scene.boxes)
    number, number_at = memory.put(np.array([0 if count is None else count], np.int32))
    instances = Instances(
        coefficients_at, boxes_at, None if count is None else number_at, capacity, *scene.network
    )
    present = capacity if count is None else min(max(count, 0), capacity)
    inputs = (ctypes.byref(features), ctypes.byref(instances))

    def checked(expected: NDArray[Any], poison: int, call: Callable[[int], int]) -> None:
        expected = expected.copy()
        expected[present:] = 0
        room = np.full(expected.size + 2 * offset + 8, poison, expected.dtype)
        held, address = memory.put(room)
        assert call(address + offset * expected.itemsize) == 0
        found = memory.get(held)
        end = offset + expected.size
        np.testing.assert_array_equal(found[offset:end].reshape(expected.shape), expected)
        assert (found[:offset] == poison).all()
        assert (found[end:] == poison).all()

    levels = kernels.assemble_masks(*scene.arrays, scene.network)
    for output_type, dtype in [(UINT8, np.uint8), (FLOAT16, np.float16)]:
        checked(
            levels.astype(dtype), 201,
            lambda to, kind=output_type: library.edgeseg_cuda_mask_assembly(  # type: ignore[misc]
                *inputs, to, kind, memory.stream
            ),
        )  # fmt: skip
    fit = masks.launched_fit(geometry)
    checked(
        run_bits(scene, geometry, threshold=threshold), 0xA5,
        lambda to: int(library.edgeseg_cuda_mask_bits(
            *inputs, ctypes.byref(fit), threshold, to, memory.stream
        )),
    )  # fmt: skip
    del prototypes, coefficients, boxes, number


CUDA_KINDS = [pytest.param(smooth_scene, id="smooth"), pytest.param(level_scene, id="level")]


@pytest.mark.parametrize("kind", CUDA_KINDS)
@pytest.mark.parametrize(
    ("channels", "height", "width", "network", "frame", "fit", "instances"), CASES
)
def test_cuda_kernels_on_an_emulated_gpu_give_the_cpu_bytes(
    emulated_cuda: ctypes.CDLL,
    kind: Callable[..., Scene],
    channels: int,
    height: int,
    width: int,
    network: tuple[int, int],
    frame: tuple[int, int],
    fit: Fit,
    instances: int,
) -> None:
    scene = kind(channels, height, width, network, instances, seed=3)
    geometry = Geometry.fitting(*frame, *network, fit=fit)
    check_launchers(emulated_cuda, Memory(), scene, geometry)


@pytest.mark.parametrize("element", [np.float32, np.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [5, 16, 40])
def test_cuda_layouts_on_an_emulated_gpu(
    emulated_cuda: ctypes.CDLL, channels: int, layout: Layout, element: type[Any]
) -> None:
    scene = smooth_scene(channels, 12, 20, (48, 80), 6, seed=4)
    geometry = Geometry.fitting(40, 67, 48, 80, fit="letterbox")
    check_launchers(emulated_cuda, Memory(), scene, geometry, element=element, layout=layout)


@pytest.mark.parametrize("count", [None, 0, -3, 1, 7, 9, 500])
def test_cuda_count_on_an_emulated_gpu(emulated_cuda: ctypes.CDLL, count: int | None) -> None:
    scene = smooth_scene(3, 9, 8, (36, 32), 9, seed=5)
    geometry = Geometry.fitting(20, 40, 36, 32, fit="stretch")
    check_launchers(emulated_cuda, Memory(), scene, geometry, count=count, offset=1)


def test_cuda_many_instances_on_an_emulated_gpu(emulated_cuda: ctypes.CDLL) -> None:
    # More than one batch of tiles; most boxes are small, as crowds are.
    scene = smooth_scene(2, 9, 8, (36, 32), 600, seed=6)
    boxes = scene.boxes.copy()
    boxes[:, 2:] = boxes[:, :2] + 0.2 * (boxes[:, 2:] - boxes[:, :2])
    geometry = Geometry.fitting(11, 24, 36, 32, fit="stretch")
    check_launchers(emulated_cuda, Memory(), replace(scene, boxes=boxes), geometry, count=580)


@pytest.mark.parametrize("threshold", [1e-6, 0.3, 0.999])
def test_cuda_threshold_on_an_emulated_gpu(emulated_cuda: ctypes.CDLL, threshold: float) -> None:
    scene = smooth_scene(4, 12, 14, (48, 56), 6, seed=7)
    geometry = Geometry.fitting(44, 90, 48, 56, fit="letterbox")
    check_launchers(emulated_cuda, Memory(), scene, geometry, threshold=threshold)


def test_cuda_boxes_on_an_emulated_gpu(emulated_cuda: ctypes.CDLL) -> None:
    scene = smooth_scene(2, 10, 10, (40, 40), 2 * len(SIDES), seed=8)
    boxes = np.empty((2 * len(SIDES), 4), np.float32)
    for index, (_, first, second, _) in enumerate(SIDES):
        boxes[2 * index] = first, 0, second, 40
        boxes[2 * index + 1] = 0, first, 40, second
    prototypes = scene.prototypes.copy()
    prototypes[0, ::3, 1::4] = np.nan
    scene = replace(scene, prototypes=prototypes, boxes=boxes)
    geometry = Geometry.fitting(33, 50, 40, 40, fit="stretch")
    check_launchers(emulated_cuda, Memory(), scene, geometry)


def test_cuda_launchers_check_their_arguments(emulated_cuda: ctypes.CDLL) -> None:
    bits = np.empty((2, 9, 1), np.uint8)
    levels = np.empty((2, 4, 5), np.uint8)
    good = good_arguments()

    def bits_of(features: Any, instances: Any, fit: Any, threshold: float, out: Any) -> int:
        pointers = map(ctypes.byref, (features, instances, fit))
        return int(emulated_cuda.edgeseg_cuda_mask_bits(*pointers, threshold, out, None))

    assert bits_of(*good, 0.5, bits.ctypes.data) == 0
    assert bits_of(*good, 0.5, None) == 1
    for bad in bad_arguments(*good):
        assert bits_of(*bad, bits.ctypes.data) == 1
    pointers = (ctypes.byref(good[0]), ctypes.byref(good[1]))
    for out, output_type, status in [
        (levels.ctypes.data, UINT8, 0),
        (levels.ctypes.data, FLOAT32, 1),
        (levels.ctypes.data, INT32, 1),
        (None, UINT8, 1),
    ]:
        found = emulated_cuda.edgeseg_cuda_mask_assembly(*pointers, out, output_type, None)
        assert found == status


@pytest.mark.gpu
@pytest.mark.parametrize("element", [np.float32, np.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "height", "width", "network", "frame", "fit", "instances"),
    [
        *CASES,
        pytest.param(32, 138, 138, (550, 550), (720, 1280), "stretch", 100, id="720p"),
        pytest.param(32, 138, 138, (550, 550), (1080, 1920), "letterbox", 300, id="crowd"),
    ],
)
def test_cuda_kernels_give_the_cpu_bytes(
    cuda_library: ctypes.CDLL,
    kind: Callable[..., Scene],
    channels: int,
    height: int,
    width: int,
    network: tuple[int, int],
    frame: tuple[int, int],
    fit: Fit,
    instances: int,
    element: type[Any],
) -> None:
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    scene = kind(channels, height, width, network, instances, seed=seed)
    geometry = Geometry.fitting(*frame, *network, fit=fit)
    check_launchers(cuda_library, DeviceMemory(), scene, geometry, element=element)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [None, 0, -3, 7, 500])
@pytest.mark.parametrize("element", [np.float32, np.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_layouts_and_count(
    cuda_library: ctypes.CDLL, layout: Layout, element: type[Any], count: int | None
) -> None:
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    scene = smooth_scene(33, 69, 70, (276, 280), 30, seed=seed)
    geometry = Geometry.fitting(240, 427, 276, 280, fit="letterbox")
    check_launchers(
        cuda_library, DeviceMemory(), scene, geometry,
        element=element, layout=layout, count=count, offset=3,
    )  # fmt: skip
