"""The estimate of a bundle's speed on boards that are not here, with what it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgeseg.bundle import Bundle
from edgeseg.estimate.devices import Device
from edgeseg.estimate.layers import Layer, Network, Wanted
from edgeseg.estimate.roofline import SPREAD, LayerTime, Limit, layer_time
from edgeseg.report import Figure, Figures, Paragraph, Report, Section, Share, Table

__all__ = ["DeviceEstimate", "Estimate", "LayerEstimate", "estimate", "interval_factor"]

_LAYERS_SHOWN = 8
_MORE_LAYERS_SHOWN = 20
_MB = 1e6

_LIMITS: dict[Limit, str] = {
    "arithmetic": "arithmetic",
    "bandwidth": "memory bandwidth",
    "start": "starting kernels",
}

#: what the figures mean
DEFINITIONS = (
    "An estimate, not a measurement. Milliseconds are those of a TensorRT engine alone, one "
    "picture at a time, clocks at the power mode named; camera, resizing and drawing come on top. "
    "Of published speeds that an estimate never saw, about nine in ten lie in its interval "
    "(benchmarks/bench_estimate.py). On the board itself, `edgeseg profile` measures."
)


@dataclass(frozen=True)
class LayerEstimate:
    """One kernel and how long it takes."""

    layer: Layer
    time: LayerTime


@dataclass(frozen=True)
class DeviceEstimate:
    """What one device would make of the network.

    ``ms``: the middle; ``low_ms`` to ``high_ms``: the interval.
    """

    device: Device
    ms: float
    low_ms: float
    high_ms: float
    layers: tuple[LayerEstimate, ...]

    @property
    def fps(self) -> float:
        """Pictures a second, in the middle of the interval."""
        return 1e3 / self.ms

    @property
    def fps_interval(self) -> tuple[float, float]:
        """Pictures a second, fewest and most."""
        return 1e3 / self.high_ms, 1e3 / self.low_ms

    def shares(self) -> dict[Limit, float]:
        """How much of the time goes to layers that wait for each thing; together 1."""
        found = dict.fromkeys(_LIMITS, 0.0)
        for entry in self.layers:
            found[entry.time.limit] += entry.time.total_us
        total = sum(found.values()) or 1.0
        return {limit: value / total for limit, value in found.items()}

    @property
    def limit(self) -> Limit:
        """What most of the time goes to."""
        shares = self.shares()
        return max(shares, key=shares.__getitem__)

    def slowest(self, count: int) -> list[LayerEstimate]:
        """The ``count`` longest layers, the longest first."""
        return sorted(self.layers, key=lambda entry: entry.time.total_us, reverse=True)[:count]


@dataclass(frozen=True)
class Estimate:
    """A bundle's estimate, device by device."""

    model: str
    network_size: tuple[int, int]
    precision: Wanted
    tf32: bool
    network: Network
    devices: tuple[DeviceEstimate, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures leave out, in sentences."""
        found = []
        if self.network.unknown:
            found.append(
                f"Not known to EdgeSeg, so counted by the bytes they read and write alone: "
                f"{', '.join(self.network.unknown)}."
            )
        if self.network.unsized:
            found.append(
                f"The file does not tell what {self.network.unsized} operators give in size; only "
                "the start of their kernels is counted."
            )
        found += [
            f"{entry.device.title} is short of memory: weights and activations alone take "
            f"{self._memory_mb:.0f} MB of its {entry.device.memory_gb:g} GB."
            for entry in self.devices
            if self._memory_mb * _MB > entry.device.memory_gb * 1e9 / 2
        ]
        return tuple(found)

    @property
    def _memory_mb(self) -> float:
        return (self.network.weight_bytes + self.network.activation_bytes) / _MB

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        network = self.network
        return {
            "model": self.model,
            "network_size": list(self.network_size),
            "precision": self.precision,
            "tf32": self.tf32,
            "macs": network.macs,
            "cio_elements": network.io_elements,
            "moved_mb": round(network.moved_bytes / _MB, 3),
            "weights_mb": round(network.weight_bytes / _MB, 3),
            "activations_mb": round(network.activation_bytes / _MB, 3),
            "kernels": len(network.layers),
            "notes": list(self.notes),
            "devices": [_device_dict(entry) for entry in self.devices],
        }

    def render(self) -> str:
        """Plain text for a terminal."""
        network = self.network
        height, width = self.network_size
        width_of_titles = max(len(entry.device.title) for entry in self.devices)
        lines = [
            f"{self.model} at {width}x{height}, {_precision(self.precision, tf32=self.tf32)}",
            f"{network.macs / 1e9:.1f} G multiply-accumulates, {network.io_elements / 1e6:.0f} M "
            f"convolutional inputs and outputs, {len(network.layers)} kernels",
            f"weights {network.weight_bytes / _MB:.0f} MB, activations at most "
            f"{network.activation_bytes / _MB:.0f} MB; a picture moves "
            f"{network.moved_bytes / _MB:.0f} MB",
            "",
            f"{'device':<{width_of_titles}}  frames a second        ms a frame            mostly",
        ]
        for entry in self.devices:
            lines.append(
                f"{entry.device.title:<{width_of_titles}}  {_fps_text(entry):<21}  "
                f"{_ms_text(entry):<20}  {_LIMITS[entry.limit]} "
                f"({entry.shares()[entry.limit]:.0%})"
            )
        if len(self.devices) == 1:
            (entry,) = self.devices
            lines += ["", "the slowest kernels", "      ms  share  limit             kernel"]
            total = sum(each.time.total_us for each in entry.layers)
            lines += [
                f"{each.time.total_us / 1e3:8.3f}  {each.time.total_us / total:5.1%}  "
                f"{_LIMITS[each.time.limit]:<16}  {each.layer.name} ({_what(each.layer)})"
                for each in entry.slowest(_LAYERS_SHOWN)
            ]
        return "\n".join([*lines, "", *self.notes, DEFINITIONS])

    def report(self) -> Report:
        """The same as a page."""
        network = self.network
        best = max(entry.fps_interval[1] for entry in self.devices)
        overview = Table(
            header=("device", "frames a second", "", "ms a frame", "mostly"),
            rows=tuple(
                (
                    entry.device.title,
                    Share(min(entry.fps / best, 1.0), f"{entry.fps:.3g}"),
                    "{:.3g} to {:.3g}".format(*entry.fps_interval),
                    _ms_text(entry),
                    f"{_LIMITS[entry.limit]} ({entry.shares()[entry.limit]:.0%})",
                )
                for entry in self.devices
            ),
            align="lllll",
        )
        figures = Figures(
            (
                Figure(f"{network.macs / 1e9:.1f} G", "multiply-accumulates", "of one picture"),
                Figure(
                    f"{network.io_elements / 1e6:.0f} M",
                    "convolutional inputs and outputs",
                    "CIO, after HarDNet",
                ),
                Figure(f"{network.weight_bytes / _MB:.0f} MB", "weights", "as the engine has them"),
                Figure(
                    f"{network.activation_bytes / _MB:.0f} MB",
                    "activations at most",
                    "alive at one time",
                ),
            )
        )
        sections = [
            Section("", (figures,)),
            Section("Frames a second, estimated", (overview, *map(Paragraph, self.notes))),
        ]
        sections += [
            Section(entry.device.title, (Paragraph(_source(entry.device)), _layer_table(entry)))
            for entry in self.devices
        ]
        height, width = self.network_size
        return Report(
            title=f"{self.model}: how fast it may be",
            subtitle=f"{width}x{height}, {_precision(self.precision, tf32=self.tf32)}",
            sections=tuple(sections),
            footer=DEFINITIONS,
        )


def interval_factor(device: Device, spread: float = SPREAD) -> float:
    """The interval is from the middle divided by this to the middle times this.

    ``spread``: natural logarithm of the factor on a device whose peaks are certain.
    """
    return math.exp(math.hypot(spread, math.log1p(device.peak_doubt)))


def estimate(
    bundle: Bundle,
    devices: Sequence[Device],
    *,
    precision: Wanted = "graph",
    tf32: bool = False,
) -> Estimate:
    """How fast ``bundle`` would be on ``devices``.

    ``precision``: "graph" takes each layer's from the file, as EdgeSeg's TensorRT engines do; the
    others say what the same network would be if all of it were so. ``tf32``: fp32 convolutions may
    be rounded to TF32, as in an engine of `edgeseg build --tf32`. BundleError when the file is
    damaged.
    """
    network = Network.read(bundle.model.content, bundle.model.name, precision=precision)
    return Estimate(
        model=bundle.name,
        network_size=(bundle.spec.height, bundle.spec.width),
        precision=precision,
        tf32=tf32,
        network=network,
        devices=tuple(_on_device(network, each, tf32=tf32) for each in devices),
    )


def _on_device(network: Network, device: Device, *, tf32: bool) -> DeviceEstimate:
    layers = tuple(
        LayerEstimate(layer, layer_time(layer, device, tf32=tf32)) for layer in network.layers
    )
    ms = max(sum(entry.time.total_us for entry in layers) / 1e3, 1e-6)
    factor = interval_factor(device)
    return DeviceEstimate(device, ms, ms / factor, ms * factor, layers)


def _device_dict(entry: DeviceEstimate) -> dict[str, object]:
    low, high = entry.fps_interval
    return {
        "device": entry.device.name,
        "title": entry.device.title,
        "fps": round(entry.fps, 2),
        "fps_low": round(low, 2),
        "fps_high": round(high, 2),
        "ms": round(entry.ms, 4),
        "ms_low": round(entry.low_ms, 4),
        "ms_high": round(entry.high_ms, 4),
        "limit": entry.limit,
        "limit_shares": {limit: round(share, 4) for limit, share in entry.shares().items()},
        "source": entry.device.source,
        "layers": [
            {
                "name": each.layer.name,
                "operators": list(each.layer.operators),
                "precision": each.layer.precision,
                "macs": each.layer.macs,
                "bytes": round(each.layer.bytes),
                "ms": round(each.time.total_us / 1e3, 5),
                "limit": each.time.limit,
            }
            for each in entry.layers
        ],
    }


def _layer_table(entry: DeviceEstimate) -> Table:
    shown = entry.slowest(_MORE_LAYERS_SHOWN)
    total = sum(each.time.total_us for each in entry.layers)
    longest = shown[0].time.total_us if shown else 1.0
    return Table(
        header=("kernel", "operators", "ms", "of all", "limit"),
        rows=tuple(
            (
                each.layer.name,
                _what(each.layer),
                Share(each.time.total_us / longest, f"{each.time.total_us / 1e3:.3f}"),
                f"{each.time.total_us / total:.1%}",
                _LIMITS[each.time.limit],
            )
            for each in shown
        ),
        align="lllrl",
        caption=f"The slowest of {len(entry.layers)} kernels.",
    )


def _what(layer: Layer) -> str:
    first, *rest = dict.fromkeys(layer.operators)
    return f"{' + '.join((first, *rest))}, {layer.precision}"


def _source(device: Device) -> str:
    computes = f"{device.fp32_tflops:.3g} TFLOPS fp32"
    if device.tensor_fp16_tflops is not None:
        computes += f", {device.tensor_fp16_tflops:.3g} fp16 on tensor cores"
    elif device.fp16_tflops is not None:
        computes += f", {device.fp16_tflops:.3g} fp16"
    if device.int8_tops is not None:
        computes += f", {device.int8_tops:.3g} TOPS INT8"
    doubt = (
        f" Derived, good to about {device.peak_doubt:.0%}, which widens the interval."
        if device.peak_doubt
        else ""
    )
    memory = f"{device.bandwidth_gbs:g} GB/s, {device.memory_gb:g} GB"
    return f"{computes}, {memory}. {device.source}.{doubt}"


def _precision(precision: Wanted, *, tf32: bool) -> str:
    text = "precision of the graph" if precision == "graph" else f"if all of it were {precision}"
    return f"{text}, fp32 as TF32 where there is any" if tf32 else text


def _fps_text(entry: DeviceEstimate) -> str:
    low, high = entry.fps_interval
    return f"{entry.fps:.3g} ({low:.3g} to {high:.3g})"


def _ms_text(entry: DeviceEstimate) -> str:
    return f"{entry.ms:.3g} ({entry.low_ms:.3g} to {entry.high_ms:.3g})"
