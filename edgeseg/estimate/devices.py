"""Boards and cards by name: what they can compute and move at most.

Figures are the makers' peaks, dense (without the sparsity that data sheets like to count), at the
clock of the power mode in the name, or of the highest one. NVIDIA gives the Orins' tensor peaks for
GPU and DLA together and with sparsity; the GPU's dense share is derived from cores and clock, which
is good to about 15 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from edgeseg.engine.graph import Precision
from edgeseg.errors import RequestError

__all__ = ["DEVICES", "Device", "device", "devices"]

_JETSON = "NVIDIA, Jetson modules: technical specifications, developer.nvidia.com/embedded"
_ORIN = f"{_JETSON}; NVIDIA, Jetson Orin series data sheets"
_TURING = "NVIDIA, Turing GPU architecture whitepaper (2018)"
_VOLTA = "NVIDIA, Tesla V100 GPU architecture whitepaper (2017), TITAN V product page"
_PASCAL = "NVIDIA, GeForce GTX 10 series and TITAN Xp product pages"


@dataclass(frozen=True)
class Device:
    """One board in one power mode, or one card.

    ``multiprocessors``: streaming multiprocessors (SM). ``fp32_tflops`` and ``fp16_tflops``: of the
    plain cores; ``tensor_fp16_tflops``, ``tensor_tf32_tflops`` and ``int8_tops``: of tensor cores
    (of DP4A instructions on cards that have those alone), None where there are none. Each counts
    two operations per multiply-accumulate. ``bandwidth_gbs``: of memory, 10^9 bytes a second.
    ``memory_gb``: on a Jetson shared with the processor. ``peak_doubt``: how far, as a share, the
    peaks may be off because they are derived. ``source``: where the figures stand.
    """

    name: str
    title: str
    kind: Literal["jetson", "card"]
    multiprocessors: int
    fp32_tflops: float
    fp16_tflops: float | None
    tensor_fp16_tflops: float | None
    tensor_tf32_tflops: float | None
    int8_tops: float | None
    bandwidth_gbs: float
    memory_gb: float
    source: str
    peak_doubt: float = 0.0

    def peak(
        self, precision: Precision, *, tensor: bool, tf32: bool = False
    ) -> tuple[float, Precision]:
        """(operations a second, the precision it is for) of work that asks for ``precision``.

        What a device cannot do it does in the next wider precision that it can. ``tensor``: whether
        the work is a matrix product, which tensor cores take; ``tf32``: whether fp32 may be rounded
        to TF32 for them.
        """
        half = self.tensor_fp16_tflops or 0.0
        # Where only DP4A does INT8, tensor cores may be faster with fp16, and engines take these.
        if precision in ("int8", "fp8") and tensor and (self.int8_tops or 0.0) > half:
            return (self.int8_tops or 0.0) * 1e12, "int8"
        if precision != "fp32":
            if tensor and self.tensor_fp16_tflops is not None:
                return self.tensor_fp16_tflops * 1e12, "fp16"
            if self.fp16_tflops is not None:
                return self.fp16_tflops * 1e12, "fp16"
        if tensor and tf32 and self.tensor_tf32_tflops is not None:
            return self.tensor_tf32_tflops * 1e12, "fp32"
        return self.fp32_tflops * 1e12, "fp32"

    def has_tensor_cores(self, precision: Precision, *, tf32: bool = False) -> bool:
        """Whether matrix products of ``precision`` run on tensor cores."""
        _, taken = self.peak(precision, tensor=True, tf32=tf32)
        if taken == "fp32":
            return tf32 and self.tensor_tf32_tflops is not None
        return self.tensor_fp16_tflops is not None


def _orin(
    name: str,
    title: str,
    multiprocessors: int,
    megahertz: float,
    int8_tops: float,
    bandwidth_gbs: float,
    memory_gb: float,
) -> Device:
    """A board with Orin's GPU: 128 plain cores and 4 tensor cores to a multiprocessor."""
    plain = multiprocessors * 128 * 2 * megahertz / 1e6
    return Device(
        name=name,
        title=title,
        kind="jetson",
        multiprocessors=multiprocessors,
        fp32_tflops=plain,
        fp16_tflops=2 * plain,
        tensor_fp16_tflops=int8_tops / 2,
        tensor_tf32_tflops=int8_tops / 4,
        int8_tops=int8_tops,
        bandwidth_gbs=bandwidth_gbs,
        memory_gb=memory_gb,
        source=_ORIN,
        peak_doubt=0.15,
    )


_TABLE = (
    _orin("orin-nano-4gb", "Jetson Orin Nano 4 GB, 10 W", 4, 625, 10, 34, 4),
    _orin("orin-nano-8gb", "Jetson Orin Nano 8 GB, 15 W", 8, 625, 20, 68, 8),
    _orin("orin-nano-8gb-super", "Jetson Orin Nano 8 GB, MAXN SUPER", 8, 1020, 33, 102, 8),
    _orin("orin-nx-8gb", "Jetson Orin NX 8 GB, 20 W", 8, 765, 25, 102.4, 8),
    _orin("orin-nx-16gb", "Jetson Orin NX 16 GB, 25 W", 8, 918, 30, 102.4, 16),
    _orin("agx-orin-32gb", "Jetson AGX Orin 32 GB, 40 W", 14, 930, 54, 204.8, 32),
    _orin("agx-orin-64gb", "Jetson AGX Orin 64 GB, MAXN", 16, 1300, 85, 204.8, 64),
    Device(
        "thor-t4000", "Jetson T4000 (Thor), 70 W", "jetson",
        12, 4.7, 9.4, 150, 75, 300, 273, 64, _JETSON, 0.15,
    ),
    Device(
        "thor-t5000", "Jetson T5000 (Thor), MAXN", "jetson",
        20, 8.1, 16.1, 258, 129, 517, 273, 128, _JETSON, 0.15,
    ),
    Device(
        "agx-xavier", "Jetson AGX Xavier, MAXN", "jetson",
        8, 1.41, 2.82, 11.0, None, 22.0, 136.5, 32, _JETSON,
    ),
    Device(
        "xavier-nx", "Jetson Xavier NX, 15 W", "jetson",
        6, 0.85, 1.69, 6.0, None, 12.3, 59.7, 8, _JETSON,
    ),
    Device(
        "tx2", "Jetson TX2, MAXN", "jetson",
        2, 0.67, 1.33, None, None, None, 59.7, 8, _JETSON,
    ),
    Device(
        "nano", "Jetson Nano (2019), 10 W", "jetson",
        1, 0.236, 0.472, None, None, None, 25.6, 4, _JETSON,
    ),
    Device(
        "a40", "A40", "card",
        84, 37.4, 37.4, 149.7, 74.8, 299.3, 696, 48, "NVIDIA, A40 data sheet (2022)",
    ),
    Device(
        "t4", "Tesla T4", "card",
        40, 8.1, 16.2, 65, None, 130, 320, 16, f"NVIDIA, Tesla T4 data sheet; {_TURING}",
    ),
    Device(
        "rtx-2080-ti", "GeForce RTX 2080 Ti", "card",
        68, 13.4, 26.9, 107.6, None, 215.2, 616, 11, _TURING,
    ),
    Device(
        "titan-v", "TITAN V", "card",
        80, 13.8, 27.6, 110, None, 55, 652.8, 12, _VOLTA,
    ),
    Device(
        "titan-xp", "TITAN Xp", "card",
        30, 12.1, None, None, None, 48.6, 547.7, 12, _PASCAL,
    ),
    Device(
        "gtx-1080-ti", "GeForce GTX 1080 Ti", "card",
        28, 11.3, None, None, None, 45.4, 484, 11, _PASCAL,
    ),
)  # fmt: skip

#: every device by name
DEVICES: Mapping[str, Device] = MappingProxyType({entry.name: entry for entry in _TABLE})


def device(name: str) -> Device:
    """The device ``name``; RequestError lists the names there are."""
    try:
        return DEVICES[name]
    except KeyError:
        raise RequestError(
            f"the devices are {', '.join(DEVICES)}, or all, and {name!r} came"
        ) from None


def devices(name: str) -> tuple[Device, ...]:
    """The device ``name``, or with "all" every Jetson; RequestError lists the names there are."""
    if name == "all":
        return tuple(entry for entry in _TABLE if entry.kind == "jetson")
    return (device(name),)
