"""What the machine says of itself while a model runs: load, memory, heat, power, throttling.

Everything here is optional. What a machine does not have, or does not let this user read, is None
in a `Reading`, and never an error. Where the figures are from:

- **psutil**: processor time and resident memory of this process.
- **sysfs**: temperatures of hwmon chips and thermal zones (Linux kernel documentation,
  Documentation/hwmon/sysfs-interface.rst and Documentation/driver-api/thermal/sysfs-api.rst).
- **INA3221**: the rails of a Jetson's power monitors, millivolts times milliamperes
  (Documentation/hwmon/ina3221.rst); ``VDD_IN`` is all of the module where it is there, and the sum
  of the rails stands for it on an AGX Orin, which has none (Jetson Linux Developer Guide,
  "Platform Power and Performance").
- **RAPL**: energy counters of processor packages (Documentation/power/powercap/powercap.rst); only
  root may read them since CVE-2020-8694.
- **NVML**: graphics cards, through the package ``nvidia-ml-py`` where it is installed.
- **jtop**: a Jetson through the service of the package ``jetson-stats``, asked only where the rails
  cannot be read, such as in a container that was given nothing but its socket.

Throttling is heat or an overload that takes from the clock: the ``…-throttle-alert`` and frequency
cooling devices of a Jetson and its over-current counters, the counters of ``thermal_throttle`` on
x86, and NVML's reasons of the slowdowns. A power limit that a GPU is told to keep is none.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Reading", "Sensors"]


@dataclass(frozen=True)
class Reading:
    """What was measured at one moment; None is "not available here".

    ``cpu_percent``: of this process since the reading before, 100 is one core. ``rss_mb``: its
    resident memory now, in MB (10^6 bytes). ``gpu_percent``, ``gpu_memory_mb``: of the whole GPU,
    other programs included. ``temperature_c``: the hottest of SoC, CPU and GPU. ``power_w``: of the
    board, or of the processor packages and the GPU together as far as they can be read; the mean
    since the reading before where there is an energy counter, and the moment's otherwise.
    ``throttled``: whether heat or an overload took from the clock since the reading before.
    ``sources``: what it is from, such as ("psutil", "RAPL").
    """

    cpu_percent: float | None
    rss_mb: float | None
    gpu_percent: float | None
    gpu_memory_mb: float | None
    temperature_c: float | None
    power_w: float | None
    throttled: bool | None
    sources: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**asdict(self), "sources": list(self.sources)}


@dataclass(frozen=True)
class _Part:
    """What one probe found."""

    source: str
    cpu_percent: float | None = None
    rss_mb: float | None = None
    gpu_percent: float | None = None
    gpu_memory_mb: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttled: bool | None = None

    @property
    def is_empty(self) -> bool:
        return all(value is None for name, value in vars(self).items() if name != "source")


_Probe = Callable[[], _Part]


class Sensors:
    """The sensors that are here, opened once; reading them once a second costs next to nothing.

    Any thread may read, and nothing raises: a sensor that fails is left out of that reading.
    ``sys_root``: the folder of sysfs. ``clock``: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        sys_root: Path | str = "/sys",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        root = Path(sys_root)
        self._lock = threading.Lock()
        self._closers: list[Callable[[], None]] = []
        self._probes: list[_Probe] = []
        makers: tuple[Callable[[], _Probe | None], ...] = (
            lambda: _process(clock),
            lambda: _heat(root),
            lambda: _throttling(root),
            lambda: self._board(root, clock),
        )
        for make in makers:
            # A library that is installed may still be broken, in any way.
            with suppress(Exception):
                probe = make()
                if probe is not None:
                    self._probes.append(probe)
        # Counters are differences, and this is what the first reading differs from.
        self._parts()

    def read(self) -> Reading:
        """What they say now."""
        with self._lock:
            parts = self._parts()

        def first(name: str) -> Any:
            return next((v for part in parts if (v := getattr(part, name)) is not None), None)

        def every(name: str) -> list[Any]:
            return [v for part in parts if (v := getattr(part, name)) is not None]

        heats, powers, throttles = every("temperature_c"), every("power_w"), every("throttled")
        return Reading(
            cpu_percent=first("cpu_percent"),
            rss_mb=first("rss_mb"),
            gpu_percent=first("gpu_percent"),
            gpu_memory_mb=first("gpu_memory_mb"),
            temperature_c=max(heats) if heats else None,
            power_w=sum(powers) if powers else None,
            throttled=any(throttles) if throttles else None,
            sources=tuple(dict.fromkeys(part.source for part in parts)),
        )

    def close(self) -> None:
        """Lets the libraries go; a second call does nothing, and a reading afterwards is empty."""
        with self._lock:
            self._probes.clear()
            while self._closers:
                with suppress(Exception):
                    self._closers.pop()()

    def _parts(self) -> list[_Part]:
        found = []
        for probe in self._probes:
            with suppress(Exception):
                part = probe()
                if not part.is_empty:
                    found.append(part)
        return found

    def _board(self, root: Path, clock: Callable[[], float]) -> _Probe | None:
        """Power and GPU: of a Jetson by itself, of another machine its packages and NVML's GPU."""
        rails, load = _rails(root), _load(root)
        if rails or load is not None:
            self._probes.append(lambda: _tegra(rails, load))
            # Thor's GPU is seen by NVML, and is on the rails already.
            return self._nvml(clock, power=False) if load is None else None
        for probe in (self._jtop(root), _rapl(root, clock)):
            if probe is not None:
                self._probes.append(probe)
        return self._nvml(clock, power=True)

    def _jtop(self, root: Path) -> _Probe | None:
        # The package alone is no Jetson: it also installs on a laptop, to look at one from there.
        if not (root.parent / "run/jtop.sock").exists():
            return None
        with suppress(Exception):
            service = importlib.import_module("jtop").jtop(interval=1.0)
            service.start()
            self._closers.append(service.close)
            return lambda: _jtop_part(service)
        return None

    def _nvml(self, clock: Callable[[], float], *, power: bool) -> _Probe | None:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        self._closers.append(nvml.nvmlShutdown)
        return _Gpu(nvml, clock, power=power)


# --- this process


def _process(clock: Callable[[], float]) -> _Probe:
    """Processor time since the last call, and memory, of this process."""
    import psutil

    process = psutil.Process()
    seen: tuple[float, float] | None = None

    def read() -> _Part:
        nonlocal seen
        times = process.cpu_times()
        before, seen = seen, (clock(), times.user + times.system)
        percent = None
        if before is not None and seen[0] > before[0]:
            percent = max(100 * (seen[1] - before[1]) / (seen[0] - before[0]), 0.0)
        return _Part("psutil", cpu_percent=percent, rss_mb=process.memory_info().rss / 1e6)

    return read


# --- sysfs

# Chips and zones that tell of the silicon, not of a disk, a battery or the air. A PMIC's zone shows
# a constant on some boards.
_CHIPS = re.compile(r"coretemp|k10temp|zenpower|cpu|soc|gpu|amdgpu|nouveau", re.IGNORECASE)
_ZONES = re.compile(r"cpu|gpu|soc|^tj|x86_pkg|pkg-temp|cv\d|mcpu|bcpu", re.IGNORECASE)
_BOARD_ZONES = re.compile(r"acpitz|board", re.IGNORECASE)
_HOTTEST_C = 150.0


def _number(path: Path) -> float | None:
    """The number in a file of sysfs; None when it cannot be read."""
    try:
        return float(path.read_text(encoding="ascii", errors="replace").split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _word(path: Path) -> str:
    """The text in a file of sysfs; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _chips(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each hwmon chip."""
    for chip in sorted((root / "class/hwmon").glob("hwmon*")):
        yield _word(chip / "name"), chip


def _heat(root: Path) -> _Probe | None:
    """The hottest of CPU, GPU and SoC, in degrees Celsius."""
    files = [
        file
        for name, chip in _chips(root)
        if _CHIPS.search(name)
        for file in sorted(chip.glob("temp*_input"))
    ]
    zones = [
        (_word(zone / "type"), zone / "temp")
        for zone in sorted((root / "class/thermal").glob("thermal_zone*"))
    ]
    files += [file for kind, file in zones if _ZONES.search(kind)]
    if not files:
        files = [file for kind, file in zones if _BOARD_ZONES.search(kind)]
    if not files:
        return None

    def read() -> _Part:
        found = [value / 1000 for file in files if (value := _number(file)) is not None]
        # A sensor that is off says 0, or -256.
        sound = [value for value in found if 0 < value < _HOTTEST_C]
        return _Part("sysfs", temperature_c=max(sound, default=None))

    return read


# Cooling devices that cool by going slower; the others are fans, and alerts for hot surfaces.
_SLOWERS = re.compile(
    r"throttle|^(thermal-)?(cpufreq|devfreq|cpu-?idle)|^Processor$|^intel_powerclamp$"
)


def _throttling(root: Path) -> _Probe | None:
    """Cooling devices that are at work, and counters that have moved."""
    devices = [
        device / "cur_state"
        for device in sorted((root / "class/thermal").glob("cooling_device*"))
        if _SLOWERS.search(_word(device / "type"))
    ]
    counters = sorted((root / "devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_count"))
    # The count moves when a spell begins, the time when it ends: a spell that began before is seen.
    counters += sorted(
        (root / "devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_total_time_ms")
    )
    for name, chip in _chips(root):
        if name == "soctherm_oc":
            counters += sorted(chip.glob("oc*_event_cnt"))
    if not devices and not counters:
        return None
    seen: dict[Path, float] = {}

    def read() -> _Part:
        known = False
        throttled = False
        for file in devices:
            state = _number(file)
            known = known or state is not None
            throttled = throttled or (state is not None and state > 0)
        for file in counters:
            count = _number(file)
            if count is None:
                continue
            known = True
            throttled = throttled or count > seen.get(file, count)
            seen[file] = count
        return _Part("sysfs", throttled=throttled if known else None)

    return read


# Loads of a Jetson's GPU, in tenths of a per cent; where it lies depends on the release.
_TEGRA_LOADS = (
    "devices/platform/gpu.0/load",
    "devices/gpu.0/load",
    "devices/platform/bus@0/17000000.gpu/load",
    "devices/platform/17000000.gpu/load",
)
_WHOLE = ("VDD_IN", "POM_5V_IN")


def _rails(root: Path) -> list[tuple[Path, Path]]:
    """Millivolts and milliamperes of the rails whose sum is the power of a Jetson."""
    rails: dict[str, tuple[Path, Path]] = {}
    for name, chip in _chips(root):
        if name != "ina3221":
            continue
        for number in (1, 2, 3):
            label = _word(chip / f"in{number}_label")
            if label and not label.startswith("NC"):
                rails[label] = (chip / f"in{number}_input", chip / f"curr{number}_input")
    whole = [rails[label] for label in _WHOLE if label in rails]
    found = whole[:1] or list(rails.values())
    return found if any(_number(file) is not None for rail in found for file in rail) else []


def _load(root: Path) -> Path | None:
    """The file with the load of a Jetson's GPU; None on other machines."""
    return next((root / name for name in _TEGRA_LOADS if _number(root / name) is not None), None)


def _tegra(rails: Sequence[tuple[Path, Path]], load: Path | None) -> _Part:
    """Power and GPU load of a Jetson."""
    pairs = [(_number(volts), _number(amperes)) for volts, amperes in rails]
    # A rail whose part of the board sleeps cannot be read, and takes nothing.
    watts = sum(v * a for v, a in pairs if v is not None and a is not None) / 1e6
    tenths = None if load is None else _number(load)
    return _Part(
        "INA3221" if rails else "sysfs",
        gpu_percent=None if tenths is None else tenths / 10,
        power_w=watts if rails else None,
    )


def _rapl(root: Path, clock: Callable[[], float]) -> _Probe | None:
    """Mean power of the processor packages since the last call."""
    # "intel-rapl:0" is a package, on AMD too; "intel-rapl:0:0" is a part of it.
    zones = [
        zone
        for zone in sorted((root / "class/powercap").glob("intel-rapl:*"))
        if zone.name.count(":") == 1 and _word(zone / "name").startswith("package")
    ]
    counters = [
        (zone / "energy_uj", _number(zone / "max_energy_range_uj"))
        for zone in zones
        if _number(zone / "energy_uj") is not None
    ]
    if not counters:
        return None
    seen: tuple[float, list[float]] | None = None

    def read() -> _Part:
        nonlocal seen
        values = [_number(file) for file, _ in counters]
        if any(value is None for value in values):
            seen = None
            return _Part("RAPL")
        before, seen = seen, (clock(), [value for value in values if value is not None])
        if before is None or not seen[0] > before[0]:
            return _Part("RAPL")
        joules = sum(
            _gone(old, new, limit)
            for old, new, (_, limit) in zip(before[1], seen[1], counters, strict=True)
        )
        return _Part("RAPL", power_w=joules / 1e6 / (seen[0] - before[0]))

    return read


def _gone(old: float, new: float, limit: float | None) -> float:
    """How far a counter went that begins anew at 0 after ``limit``."""
    if new >= old:
        return new - old
    return new if limit is None else limit - old + new


# --- libraries

# nvml.h: HwSlowdown, SwThermalSlowdown, HwThermalSlowdown, HwPowerBrakeSlowdown.
_SLOWDOWNS = 0x8 | 0x20 | 0x40 | 0x80


class _Gpu:
    """The GPU that CUDA takes first, as NVML sees it."""

    def __init__(self, nvml: Any, clock: Callable[[], float], *, power: bool) -> None:
        self._nvml = nvml
        self._has_power = power
        self._clock = clock
        self._handle = self._found()
        self._seen: tuple[float, float] | None = None

    def __call__(self) -> _Part:
        nvml, handle = self._nvml, self._handle
        reasons = self._asked(
            ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        )
        load = self._asked(("nvmlDeviceGetUtilizationRates",))
        memory = self._asked(("nvmlDeviceGetMemoryInfo",))
        heat = None
        with suppress(Exception):
            heat = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        return _Part(
            "NVML",
            gpu_percent=None if load is None else float(load.gpu),
            gpu_memory_mb=None if memory is None else memory.used / 1e6,
            temperature_c=heat,
            power_w=self._power() if self._has_power else None,
            throttled=None if reasons is None else bool(reasons & _SLOWDOWNS),
        )

    def _found(self) -> Any:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        if visible.startswith("GPU-"):
            return self._nvml.nvmlDeviceGetHandleByUUID(visible)
        return self._nvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)

    def _asked(self, names: Iterable[str]) -> Any:
        """What the first of these functions that is there says; None when it cannot."""
        for name in names:
            # An integrated GPU supports few of them, and older drivers lack some.
            with suppress(Exception):
                return getattr(self._nvml, name)(self._handle)
        return None

    def _power(self) -> float | None:
        """Mean watts since the last call where there is an energy counter, else the moment's."""
        millijoules = self._asked(("nvmlDeviceGetTotalEnergyConsumption",))
        if millijoules is None:
            milliwatts = self._asked(("nvmlDeviceGetPowerUsage",))
            return None if milliwatts is None else milliwatts / 1e3
        before, self._seen = self._seen, (self._clock(), float(millijoules))
        if before is None or not self._seen[0] > before[0] or self._seen[1] < before[1]:
            return None
        return (self._seen[1] - before[1]) / 1e3 / (self._seen[0] - before[0])


def _jtop_part(service: Any) -> _Part:
    """What jetson-stats 4 says: milliwatts, degrees by zone, per cent of each GPU."""
    power = heat = load = None
    with suppress(Exception):
        power = float(service.power["tot"]["power"]) / 1e3
    with suppress(Exception):
        zones = service.temperature.items()
        heat = max(
            float(zone["temp"])
            for name, zone in zones
            if _ZONES.search(name) and zone.get("online", True) and zone["temp"] > 0
        )
    with suppress(Exception):
        load = max(float(gpu["status"]["load"]) for gpu in service.gpu.values())
    return _Part("jtop", gpu_percent=load, temperature_c=heat, power_w=power)
