"""What bench_gpu_kernels.py runs: each CUDA kernel at realistic sizes, with what it must give.

A ``Case`` says what is measured; ``prepare`` puts its buffers on a device and gives back calls.
Buffers come in sets, so that a series of calls finds none of its input in the cache. Pointers are
taken from tensors at each call, by functions that thereby keep the tensors alive.

The device may be a CPU where the library is one whose pointers are the host's, as the tests'
emulation of CUDA is; so the cases are tested without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgeseg import kernels
from edgeseg.kernels import FrameRectangle
from edgeseg.kernels.launchers import (
    BGR8,
    FLOAT16,
    FLOAT32,
    NV12,
    RGB8,
    UINT8,
    YUYV,
    Features,
    FramePlanes,
    Instances,
    Pyramid,
    RoiPooling,
)

__all__ = ["Case", "Device", "Mismatch", "Prepared", "all_cases", "quick_cases"]

Array = NDArray[Any]
Size = tuple[int, int]
Call = Callable[[int], object]

POISON = 173
ELEMENT_TYPES = {torch.float32: FLOAT32, torch.float16: FLOAT16}
NUMPY_TYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float16: np.float16}


class Mismatch(Exception):
    """What a kernel gave is not what it must give."""


@dataclass(frozen=True)
class Device:
    """A CUDA library (edgeseg.kernels.launchers.open_library) and where its pointers are."""

    library: ctypes.CDLL
    device: torch.device

    def stream(self) -> int | None:
        """torch's current stream, which is another one while a graph is captured."""
        if self.device.type == "cpu":
            return None
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def put(self, array: Array) -> Tensor:
        """``array`` on the device: memory of its own, filled by a copy and not by a kernel."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        return torch.empty(host.shape, dtype=host.dtype, device=self.device).copy_(host)

    def poisoned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result in which nothing is right yet."""
        host = torch.full(tuple(shape), POISON, dtype=dtype)
        return torch.empty_like(host, device=self.device).copy_(host)

    def launch(self, name: str, *arguments: Any) -> None:
        """Queues the library's ``edgeseg_cuda_<name>`` on the current stream."""
        status = getattr(self.library, f"edgeseg_cuda_{name}")(*arguments, self.stream())
        if status != 0:
            raise Mismatch(f"{name} could not be started: CUDA error {status}")


@dataclass(frozen=True)
class Reference:
    """What a user would run instead, on the same numbers."""

    call: Call
    check: Callable[[], None]
    """Raises ``Mismatch`` unless it computes the same thing as the kernel, but for rounding."""


@dataclass(frozen=True)
class Prepared:
    """A case on a device. Calls take the number of the set of buffers and queue their work."""

    launch: Call
    check: Callable[[], None]
    """Runs set 0 and raises ``Mismatch`` unless its result is the CPU library's, bit for bit."""
    make_reference: Callable[[], Reference] | None = None
    """Makes the reference's own buffers; to be called after ``check``."""


class Prepare(Protocol):
    """Makes ``copies`` sets of buffers on ``device``."""

    def __call__(self, device: Device, copies: int) -> Prepared: ...


@dataclass(frozen=True)
class Case:
    """One kernel, on one kind of input, at one size."""

    kernel: str
    input: str
    output: str
    bytes_in: int
    """Bytes that a call must read at least."""
    bytes_out: int
    """Bytes that it writes."""
    prepare: Prepare
    reference: str | None = None
    """What the reference is."""
    of_copy_wanted: float | None = None
    """Share of the bandwidth of a copy of as many bytes that the kernel has to reach."""
    of_reference_wanted: float | None = None
    """How many times as fast as the reference it has to be."""
    bandwidth_counts: bool = True
    """Whether the bytes above are what limits the kernel: a copy of as many is then timed."""

    @property
    def bytes_moved(self) -> int:
        return self.bytes_in + self.bytes_out

    @property
    def title(self) -> str:
        return f"{self.kernel} {self.input} -> {self.output}"


def require_equal(what: str, found: Array, expected: Array) -> None:
    """Mismatch unless the two are the same, bit for bit."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise Mismatch(
            f"{what}: {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
        )
    # As bytes, so that NaN is equal to itself.
    raw = np.dtype(f"u{found.dtype.itemsize}")
    wrong = int((found.view(raw) != expected.view(raw)).sum())
    if wrong:
        raise Mismatch(f"{what}: {wrong} of {found.size} values differ from the CPU library's")


def require_share(what: str, differs: Tensor, most: float) -> None:
    """Mismatch when more than a share ``most`` of ``differs`` is true."""
    share = float(differs.float().mean())
    if not share <= most:
        raise Mismatch(f"{what}: the reference differs in {share:.2%} of the result")


def on_host(tensor: Tensor) -> Array:
    """The tensor's numbers, once the work queued before is done."""
    return np.asarray(tensor.cpu().numpy())


def smooth_field(channels: int, size: Size, scale: float, seed: int) -> NDArray[np.float32]:
    """(channels, height, width) coarse noise, interpolated, with a little fine noise on it: the
    regions and borders of a trained network's output.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, scale, (1, channels, *(max(side // 16, 2) for side in size)))
    smooth = functional.interpolate(
        torch.from_numpy(coarse.astype(np.float32)), size=size, mode="bicubic", align_corners=False
    )
    fine = rng.normal(0, scale / 40, (channels, *size)).astype(np.float32)
    return np.ascontiguousarray(smooth[0].numpy() + fine, dtype=np.float32)


def size_text(size: Size) -> str:
    return "x".join(map(str, size))


def type_text(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16"}[dtype]


def element_size(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype).element_size()


# --- upsample_argmax


def upsample_argmax(
    source: Size,
    target: Size,
    dtype: torch.dtype,
    *,
    classes: int = 19,
    noise: bool = False,
    channels_last: bool = False,
    with_confidence: bool = False,
    of_copy_wanted: float | None = None,
) -> Case:
    """Logits to a class map; ``noise`` is the worst case, in which nothing can be skipped.

    Channels last are as TensorRT's kHWC8 has them: a pixel's classes, padded to whole eights.
    """
    pitch = -(-classes // 8) * 8 if channels_last else classes

    def prepare(device: Device, copies: int) -> Prepared:
        rng = np.random.default_rng(0)
        values = (
            rng.standard_normal((classes, *source)).astype(np.float32)
            if noise
            else smooth_field(classes, source, 4.0, seed=0)
        ).astype(NUMPY_TYPES[dtype])
        if channels_last:
            padded = np.zeros((*source, pitch), values.dtype)
            padded[..., :classes] = values.transpose(1, 2, 0)
            placed = padded
        else:
            placed = values
        logits = [device.put(placed) for _ in range(copies)]
        class_maps = [device.poisoned(target, torch.uint8) for _ in range(copies)]
        confidences = [device.poisoned(target, torch.uint8) for _ in range(copies)]

        def launch(index: int) -> None:
            memory = logits[index].data_ptr(), ELEMENT_TYPES[dtype]
            features = (
                Features.channels_last(*memory, classes, *source, pitch)
                if channels_last
                else Features.channels_first(*memory, classes, *source)
            )
            device.launch(
                "upsample_argmax",
                ctypes.byref(features),
                class_maps[index].data_ptr(),
                confidences[index].data_ptr() if with_confidence else None,
                UINT8, *target, 0,
            )  # fmt: skip

        def check() -> None:
            launch(0)
            expected, levels = kernels.upsample_argmax_confidence(values.astype(np.float32), target)
            require_equal("class map", on_host(class_maps[0]), expected)
            if with_confidence:
                require_equal("confidence", on_host(confidences[0]), levels)

        def make_reference() -> Reference:
            planes = [
                tensor[..., :classes].permute(2, 0, 1) if channels_last else tensor
                for tensor in logits
            ]
            results = [device.poisoned(target, torch.uint8) for _ in range(copies)]

            def steps(index: int) -> None:
                scores = functional.interpolate(
                    planes[index][None], size=target, mode="bilinear", align_corners=False
                )
                results[index].copy_(scores.argmax(dim=1)[0])

            def check_steps() -> None:
                steps(0)
                # In float16 torch rounds the upsampled scores, which makes ties.
                most = 1e-3 if dtype == torch.float32 else 2e-2
                require_share("class map", results[0] != class_maps[0], most)

            return Reference(steps, check_steps)

        return Prepared(launch, check, make_reference)

    size = element_size(dtype)
    layout = "HWC8" if channels_last else "CHW"
    return Case(
        kernel="upsample_argmax",
        input=f"{type_text(dtype)} {layout}{' noise' if noise else ''} "
        f"{classes}x{size_text(source)}",
        output=f"{size_text(target)}{' + confidence' if with_confidence else ''}",
        bytes_in=pitch * source[0] * source[1] * size,
        bytes_out=target[0] * target[1] * (1 + with_confidence),
        prepare=prepare,
        reference="torch interpolate, argmax",
        of_copy_wanted=of_copy_wanted,
    )


# --- fit_frame


@dataclass(frozen=True)
class Format:
    """A camera's format: its constant for the launcher, and the shape of a frame's memory."""

    name: kernels.frames.FrameFormat
    number: int
    rows: float  # of the memory, per row of the picture
    bytes_per_pixel: int  # of one row


FORMATS = (
    Format("bgr", BGR8, 1, 3),
    Format("rgb", RGB8, 1, 3),
    Format("nv12", NV12, 1.5, 1),
    Format("yuyv", YUYV, 1, 2),
)


def fit_frame(
    source: Size, target: Size, format: Format, *, of_copy_wanted: float | None = None
) -> Case:
    """A camera's frame, stretched to the network's input."""
    height, width = source
    rows, pitch = int(height * format.rows), width * format.bytes_per_pixel

    def prepare(device: Device, copies: int) -> Prepared:
        rng = np.random.default_rng(1)
        frame = rng.integers(0, 256, (rows, pitch), dtype=np.uint8)
        frames = [device.put(frame) for _ in range(copies)]
        images = [device.poisoned((*target, 3), torch.uint8) for _ in range(copies)]
        fit = FrameRectangle.fitting(*source, *target).launched()

        def launch(index: int) -> None:
            first = frames[index].data_ptr()
            planes = FramePlanes()
            planes.planes[0], planes.pitches[0] = first, pitch
            if format.number == NV12:
                planes.planes[1], planes.pitches[1] = first + height * pitch, pitch
            planes.format = format.number
            device.launch(
                "fit_frame",
                ctypes.byref(planes),
                ctypes.byref(fit),
                images[index].data_ptr(),
            )

        def check() -> None:
            launch(0)
            shaped = frame if format.number == NV12 else frame.reshape(height, width, -1)
            expected = kernels.fit_frame(shaped, target, format=format.name)
            require_equal("image", on_host(images[0]), expected)

        return Prepared(launch, check)

    return Case(
        kernel="fit_frame",
        input=f"{format.name} {size_text(source)}",
        output=size_text(target),
        bytes_in=rows * pitch,
        bytes_out=target[0] * target[1] * 3,
        prepare=prepare,
        of_copy_wanted=of_copy_wanted,
    )


# --- draw_overlay


def draw_overlay(frame_size: Size, map_size: Size, *, of_copy_wanted: float | None = None) -> Case:
    """Class colours blended into a frame, into memory of their own."""
    classes = 19

    def prepare(device: Device, copies: int) -> Prepared:
        rng = np.random.default_rng(2)
        frame = rng.integers(0, 256, (*frame_size, 3), dtype=np.uint8)
        regions = smooth_field(classes, map_size, 4.0, seed=2).argmax(axis=0).astype(np.uint8)
        palette = rng.integers(0, 256, (classes, 3), dtype=np.uint8)
        rectangle = FrameRectangle.fitting(*frame_size, *map_size)
        frames = [device.put(frame) for _ in range(copies)]
        maps = [device.put(regions) for _ in range(copies)]
        drawn = [device.poisoned(frame.shape, torch.uint8) for _ in range(copies)]
        colours = device.put(palette)
        fit = rectangle.launched()
        pitch = frame_size[1] * 3

        def launch(index: int) -> None:
            device.launch(
                "draw_overlay",
                frames[index].data_ptr(), pitch, maps[index].data_ptr(),
                colours.data_ptr(), classes, ctypes.byref(fit), 128,
                drawn[index].data_ptr(), pitch,
            )  # fmt: skip

        def check() -> None:
            launch(0)
            expected = kernels.draw_overlay(frame, regions, palette, rectangle, opacity=0.5)
            require_equal("drawn frame", on_host(drawn[0]), expected)

        return Prepared(launch, check)

    pixels = frame_size[0] * frame_size[1]
    return Case(
        kernel="draw_overlay",
        input=f"bgr {size_text(frame_size)}, map {size_text(map_size)}",
        output=size_text(frame_size),
        bytes_in=3 * pixels + map_size[0] * map_size[1] + 3 * classes,
        bytes_out=3 * pixels,
        prepare=prepare,
        of_copy_wanted=of_copy_wanted,
    )


# --- mask_assembly, mask_bits


@dataclass(frozen=True)
class MaskInputs:
    """Prototypes (channels, height, width), coefficients and boxes of some instances."""

    prototypes: Array
    coefficients: Array
    boxes: NDArray[np.float32]
    network: Size

    @classmethod
    def random(
        cls, instances: int, size: Size, channels: int, network: Size, dtype: torch.dtype
    ) -> MaskInputs:
        """Smooth prototypes, and boxes from a thirtieth of the picture to half of it a side."""
        rng = np.random.default_rng(3)
        kind = NUMPY_TYPES[dtype]
        centre = rng.uniform(0, 1, (instances, 2))
        half = np.exp(rng.uniform(np.log(1 / 60), np.log(1 / 4), (instances, 2)))
        corners = np.concatenate([centre - half, centre + half], axis=1).clip(0, 1)
        scale = [network[1], network[0], network[1], network[0]]
        return cls(
            smooth_field(channels, size, 1.0, seed=3).astype(kind),
            np.tanh(rng.standard_normal((instances, channels))).astype(kind),
            np.ascontiguousarray(corners * scale, dtype=np.float32),
            network,
        )

    def crop_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """left, right, top, bottom of each box among the prototypes, widened by one sample."""
        height, width = self.prototypes.shape[1:]
        boxes = torch.from_numpy(self.boxes).to(device)
        left, right = (boxes[:, i] * (width / self.network[1]) for i in (0, 2))
        top, bottom = (boxes[:, i] * (height / self.network[0]) for i in (1, 3))
        return (
            (left - 1).clamp(min=0), (right + 1).clamp(max=width),
            (top - 1).clamp(min=0), (bottom + 1).clamp(max=height),
        )  # fmt: skip


@dataclass(frozen=True)
class MaskBuffers:
    """Sets of inputs on a device."""

    inputs: MaskInputs
    prototypes: list[Tensor]
    coefficients: list[Tensor]
    boxes: list[Tensor]

    @classmethod
    def of(cls, inputs: MaskInputs, device: Device, copies: int) -> MaskBuffers:
        arrays = (inputs.prototypes, inputs.coefficients, inputs.boxes)
        return cls(inputs, *([device.put(array) for _ in range(copies)] for array in arrays))

    def features(self, index: int) -> Features:
        tensor = self.prototypes[index]
        return Features.channels_first(
            tensor.data_ptr(), ELEMENT_TYPES[tensor.dtype], *self.inputs.prototypes.shape
        )

    def instances(self, index: int) -> Instances:
        return Instances(
            self.coefficients[index].data_ptr(),
            self.boxes[index].data_ptr(),
            None,
            len(self.inputs.boxes),
            *self.inputs.network,
        )


def reference_masks(buffers: MaskBuffers, device: Device) -> Callable[[int], Tensor]:
    """YOLACT's steps: (height, width, instances) probabilities, 0 outside the boxes."""
    # As YOLACT has its prototypes: channels last.
    prototypes = [tensor.permute(1, 2, 0).contiguous() for tensor in buffers.prototypes]
    left, right, top, bottom = buffers.inputs.crop_on(device.device)
    height, width = buffers.inputs.prototypes.shape[1:]
    rows = torch.arange(height, device=device.device)[:, None, None]
    columns = torch.arange(width, device=device.device)[None, :, None]

    def assemble(index: int) -> Tensor:
        masks = torch.sigmoid(prototypes[index] @ buffers.coefficients[index].t())
        inside = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
        return masks * inside

    return assemble


def mask_assembly(
    instances: int,
    dtype: torch.dtype,
    *,
    size: Size = (138, 138),
    channels: int = 32,
    network: Size = (550, 550),
) -> Case:
    """Masks at the size of the prototypes, levels 0 to 255."""

    def prepare(device: Device, copies: int) -> Prepared:
        inputs = MaskInputs.random(instances, size, channels, network, dtype)
        buffers = MaskBuffers.of(inputs, device, copies)
        masks = [device.poisoned((instances, *size), torch.uint8) for _ in range(copies)]

        def launch(index: int) -> None:
            device.launch(
                "mask_assembly",
                ctypes.byref(buffers.features(index)),
                ctypes.byref(buffers.instances(index)),
                masks[index].data_ptr(),
                UINT8,
            )

        def check() -> None:
            launch(0)
            expected = kernels.assemble_masks(
                inputs.prototypes.astype(np.float32),
                inputs.coefficients.astype(np.float32),
                inputs.boxes,
                network,
            )
            require_equal("masks", on_host(masks[0]), expected)

        def make_reference() -> Reference:
            assemble = reference_masks(buffers, device)
            results = [torch.empty_like(masks[0]) for _ in range(copies)]

            def steps(index: int) -> None:
                results[index].copy_((assemble(index) * 255).round().permute(2, 0, 1))

            def check_steps() -> None:
                steps(0)
                most = 1 if dtype == torch.float32 else 3
                far = (results[0].int() - masks[0].int()).abs() > most
                require_share("masks", far, 1e-3)

            return Reference(steps, check_steps)

        return Prepared(launch, check, make_reference)

    return mask_case("mask_assembly", instances, dtype, size, channels, (instances, *size), prepare)


def mask_bits(
    instances: int,
    dtype: torch.dtype,
    *,
    size: Size = (138, 138),
    channels: int = 32,
    network: Size = (550, 550),
    frame: Size = (720, 1280),
    of_reference_wanted: float | None = None,
) -> Case:
    """Masks at frame size, packed to bits; the reference leaves them as bytes."""
    shape = (instances, frame[0], -(-frame[1] // 8))

    def prepare(device: Device, copies: int) -> Prepared:
        inputs = MaskInputs.random(instances, size, channels, network, dtype)
        buffers = MaskBuffers.of(inputs, device, copies)
        rectangle = FrameRectangle.fitting(*frame, *network)
        fit = rectangle.launched()
        bits = [device.poisoned(shape, torch.uint8) for _ in range(copies)]

        def launch(index: int) -> None:
            device.launch(
                "mask_bits",
                ctypes.byref(buffers.features(index)),
                ctypes.byref(buffers.instances(index)),
                ctypes.byref(fit),
                0.5,
                bits[index].data_ptr(),
            )

        def check() -> None:
            launch(0)
            expected = kernels.assemble_mask_bits(
                inputs.prototypes.astype(np.float32),
                inputs.coefficients.astype(np.float32),
                inputs.boxes,
                rectangle,
            )
            require_equal("bits", on_host(bits[0]), expected)

        def make_reference() -> Reference:
            assemble = reference_masks(buffers, device)

            def steps(index: int) -> Tensor:
                masks = assemble(index).permute(2, 0, 1)[None]
                return functional.interpolate(masks, frame, mode="bilinear")[0] > 0.5

            def check_steps() -> None:
                ours = np.unpackbits(on_host(bits[0]), axis=-1, count=frame[1])
                most = 1e-4 if dtype == torch.float32 else 5e-3
                require_share("bits", steps(0).cpu() != torch.from_numpy(ours).bool(), most)

            return Reference(steps, check_steps)

        return Prepared(launch, check, make_reference)

    return mask_case(
        "mask_bits", instances, dtype, size, channels, shape, prepare, of_reference_wanted
    )


def mask_case(
    kernel: str,
    instances: int,
    dtype: torch.dtype,
    size: Size,
    channels: int,
    shape: Sequence[int],
    prepare: Prepare,
    of_reference_wanted: float | None = None,
) -> Case:
    """What the two mask kernels have in common."""
    element = element_size(dtype)
    read = channels * size[0] * size[1] * element + instances * (channels * element + 16)
    return Case(
        kernel=kernel,
        input=f"{type_text(dtype)} {channels}x{size_text(size)}, {instances} instances",
        output="x".join(map(str, shape)),
        bytes_in=read,
        bytes_out=int(np.prod(shape)),
        prepare=prepare,
        reference="YOLACT's steps in torch",
        of_reference_wanted=of_reference_wanted,
    )


# --- pyramid_roi_align


def torchvision_roi_align() -> Callable[..., Tensor] | None:
    """``torchvision.ops.roi_align``, or None where torchvision is not, or not for this torch."""
    try:
        function: Callable[..., Tensor] = importlib.import_module("torchvision.ops").roi_align
    except (ImportError, RuntimeError, OSError):
        return None
    return function


def pyramid_roi_align(
    rois: int,
    bins: int,
    dtype: torch.dtype,
    *,
    channels: int = 256,
    image: Size = (800, 1344),
    of_reference_wanted: float | None = None,
) -> Case:
    """Boxes pooled from four levels of one image, as Mask R-CNN with an FPN does.

    The reference is told the level of each box and leaves the results of the levels apart.
    """
    strides = (4, 8, 16, 32)
    sizes = [(-(-image[0] // stride), -(-image[1] // stride)) for stride in strides]
    scales = [1 / stride for stride in strides]
    shape = (rois, channels, bins, bins)
    sampling_ratio = 2
    element = element_size(dtype)
    theirs = torchvision_roi_align()

    def prepare(device: Device, copies: int) -> Prepared:
        rng = np.random.default_rng(4)
        values = [
            rng.standard_normal((1, channels, *size), dtype=np.float32).astype(NUMPY_TYPES[dtype])
            for size in sizes
        ]
        boxes = random_boxes(rng, rois, image)
        levels = [[device.put(value) for value in values] for _ in range(copies)]
        on_device = [device.put(boxes) for _ in range(copies)]
        pooled = [device.poisoned(shape, dtype) for _ in range(copies)]
        pooling = RoiPooling(bins, bins, sampling_ratio, 0)

        def launch(index: int) -> None:
            pyramid = pyramid_of(levels[index], scales, ELEMENT_TYPES[dtype])
            device.launch(
                "pyramid_roi_align",
                ctypes.byref(pyramid), on_device[index].data_ptr(), None, rois,
                ctypes.byref(pooling), pooled[index].data_ptr(),
            )  # fmt: skip

        def check() -> None:
            launch(0)
            expected = kernels.pyramid_roi_align(
                [value.astype(np.float32) for value in values],
                boxes,
                output_size=(bins, bins),
                scales=scales,
                sampling_ratio=sampling_ratio,
            ).astype(NUMPY_TYPES[dtype])
            require_equal("pooled boxes", on_host(pooled[0]), expected)

        if theirs is None:
            return Prepared(launch, check)
        roi_align = theirs

        def make_reference() -> Reference:
            level_of = level_numbers(boxes, len(strides))
            members = [np.flatnonzero(level_of == level) for level in range(len(strides))]
            # A column for the number of the image, and the type of the features, as it wants them.
            parts = [
                device.put(np.pad(boxes[member], ((0, 0), (1, 0))).astype(NUMPY_TYPES[dtype]))
                for member in members
            ]

            def steps(index: int) -> list[Tensor]:
                return [
                    roi_align(level, part, (bins, bins), scale, sampling_ratio, False)
                    for level, part, scale in zip(levels[index], parts, scales, strict=True)
                    if len(part)
                ]

            def check_steps() -> None:
                found = torch.cat(steps(0)).float().cpu()
                order = torch.from_numpy(np.concatenate(members))
                difference = (found - pooled[0].float().cpu()[order]).abs()
                # In float16 its boxes are float16 too: up to half a pixel off.
                tolerance = 1e-3 if dtype == torch.float32 else 0.5
                require_share("pooled boxes", difference > tolerance, 1e-2)

            return Reference(steps, check_steps)

        return Prepared(launch, check, make_reference)

    return Case(
        kernel="pyramid_roi_align",
        input=f"{type_text(dtype)} {channels} channels of {size_text(image)}, {rois} boxes",
        output=f"{bins}x{bins}",
        bytes_in=sum(channels * height * width * element for height, width in sizes),
        bytes_out=int(np.prod(shape)) * element,
        prepare=prepare,
        reference=None if theirs is None else "torchvision.ops.roi_align, level by level",
        of_reference_wanted=None if theirs is None else of_reference_wanted,
        bandwidth_counts=False,
    )


def random_boxes(rng: np.random.Generator, rois: int, image: Size) -> NDArray[np.float32]:
    """(rois, 4) xyxy inside the image, of all the sizes that a detector proposes."""
    height, width = image
    side = np.exp(rng.uniform(np.log(16), np.log(min(image) * 0.9), (rois, 1)))
    aspect = np.exp(rng.uniform(-0.7, 0.7, (rois, 1)) / 2)
    extent = np.concatenate([side * aspect, side / aspect], axis=1)
    centre = rng.uniform(0, 1, (rois, 2)) * [width, height]
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)
    return np.ascontiguousarray(boxes.clip(0, [width, height] * 2), dtype=np.float32)


def level_numbers(boxes: NDArray[np.float32], levels: int) -> NDArray[np.int64]:
    """The level of each box, as torchvision's LevelMapper assigns it."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    with np.errstate(divide="ignore"):
        level = np.floor(4 + np.log2(np.sqrt(area) / 224) + 1e-6)
    return np.asarray(level.clip(2, 1 + levels) - 2, dtype=np.int64)


def pyramid_of(levels: Sequence[Tensor], scales: Sequence[float], element_type: int) -> Pyramid:
    """The launcher's struct for (1, channels, height, width) levels."""
    pyramid = Pyramid()
    for index, (level, scale) in enumerate(zip(levels, scales, strict=True)):
        _, channels, height, width = level.shape
        pyramid.levels[index] = Features.channels_first(
            level.data_ptr(), element_type, channels, height, width
        )
        pyramid.image_strides[index] = channels * height * width
        pyramid.scales[index] = scale
    pyramid.level_count, pyramid.images = len(levels), 1
    pyramid.canonical_size, pyramid.canonical_level, pyramid.first_level = 224.0, 4, 2
    return pyramid


# --- the lists


def all_cases() -> list[Case]:
    """What `make gpu` measures."""
    cases = []
    for dtype in (torch.float32, torch.float16):
        cases += [
            upsample_argmax((64, 128), (512, 1024), dtype),
            upsample_argmax((128, 256), (1024, 2048), dtype, of_copy_wanted=0.8),
        ]
    full: tuple[Size, Size] = ((128, 256), (1024, 2048))
    cases += [
        upsample_argmax(*full, torch.float16, channels_last=True),
        upsample_argmax(*full, torch.float32, with_confidence=True),
        upsample_argmax(*full, torch.float32, noise=True),
    ]
    for format in FORMATS:
        cases += [
            fit_frame((1080, 1920), (1024, 2048), format, of_copy_wanted=0.8),
            fit_frame((1080, 1920), (512, 1024), format),
        ]
    cases.append(draw_overlay((1024, 2048), (1024, 2048), of_copy_wanted=0.8))
    for dtype in (torch.float32, torch.float16):
        cases += [mask_assembly(50, dtype), mask_assembly(100, dtype)]
        cases += [mask_bits(50, dtype), mask_bits(100, dtype, of_reference_wanted=10.0)]
        cases += [
            pyramid_roi_align(1000, 7, dtype, of_reference_wanted=1.5),
            pyramid_roi_align(100, 14, dtype, of_reference_wanted=1.5),
        ]
    return cases


def quick_cases() -> list[Case]:
    """Each kernel on inputs of odd sizes, small enough for a sanitizer or an emulation."""
    cases = []
    for dtype in (torch.float32, torch.float16):
        cases += [
            upsample_argmax((9, 17), (72, 270), dtype, with_confidence=True),
            upsample_argmax((9, 17), (41, 67), dtype, channels_last=True),
            upsample_argmax((7, 9), (10, 11), dtype, noise=True),
            mask_assembly(3, dtype, size=(21, 19), channels=5, network=(85, 76)),
            mask_bits(
                3, dtype, size=(21, 19), channels=5, network=(85, 76), frame=(47, 61)
            ),
            pyramid_roi_align(5, 3, dtype, channels=6, image=(224, 160)),
        ]  # fmt: skip
    cases += [fit_frame((34, 46), (21, 37), format) for format in FORMATS]
    cases.append(draw_overlay((35, 45), (21, 37)))
    return cases
