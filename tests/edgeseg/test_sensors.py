"""Sensors: what they make of the files and libraries of boards that are not here."""

from __future__ import annotations

import json
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeseg.sensors import Reading, Sensors


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Machine:
    """A sysfs of files, and the sensors that read it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "sys"
        self.root.mkdir()
        self.clock = Clock()

    def write(self, name: str, content: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")

    def open(self) -> Sensors:
        return Sensors(sys_root=self.root, clock=self.clock)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    # An import of None in sys.modules fails as that of a package that is not installed.
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return Machine(tmp_path)


def rails(machine: Machine, chip: int, *found: tuple[str, int, int]) -> None:
    """An INA3221: label, millivolts, milliamperes of each channel."""
    folder = f"class/hwmon/hwmon{chip}"
    machine.write(f"{folder}/name", "ina3221")
    for number, (label, volts, amperes) in enumerate(found, 1):
        machine.write(f"{folder}/in{number}_label", label)
        machine.write(f"{folder}/in{number}_input", volts)
        machine.write(f"{folder}/curr{number}_input", amperes)


def test_a_machine_that_tells_nothing(machine: Machine) -> None:
    reading = machine.open().read()
    assert reading.rss_mb is not None and reading.rss_mb > 5
    assert (reading.gpu_percent, reading.gpu_memory_mb, reading.temperature_c) == (None,) * 3
    assert (reading.power_w, reading.throttled) == (None, None)
    assert reading.sources == ("psutil",)
    assert json.loads(json.dumps(reading.to_dict()))["power_w"] is None


def test_processor_time_since_the_reading_before(machine: Machine) -> None:
    sensors = machine.open()
    before = os.times()
    while (now := os.times()).user + now.system - before.user - before.system < 0.2:
        sum(range(10_000))
    machine.clock.now += 0.1
    percent = sensors.read().cpu_percent
    # 0.2 s of work in 0.1 s of the clock, give or take the ticks of 10 ms.
    assert percent is not None and percent > 170
    machine.clock.now += 10
    percent = sensors.read().cpu_percent
    assert percent is not None and 0 <= percent < 20
    # No time went by: there is nothing to divide by.
    assert sensors.read().cpu_percent is None


# --- boards


def test_orin_nano(machine: Machine) -> None:
    rails(machine, 1, ("VDD_IN", 5000, 1240), ("VDD_CPU_GPU_CV", 5000, 300), ("VDD_SOC", 5000, 400))
    machine.write("devices/platform/bus@0/17000000.gpu/load", 437)
    for number, (kind, milli) in enumerate(
        [
            ("cpu-thermal", 48500),
            ("gpu-thermal", 51250),
            ("PMIC-Die", 100000),
            ("cv0-thermal", -256000),
        ]
    ):
        machine.write(f"class/thermal/thermal_zone{number}/type", kind)
        machine.write(f"class/thermal/thermal_zone{number}/temp", milli)
    for number, (kind, state) in enumerate(
        [("pwm-fan", 2), ("cpu-throttle-alert", 0), ("hot-surface-alert", 1), ("cpufreq-cpu0", 0)]
    ):
        machine.write(f"class/thermal/cooling_device{number}/type", kind)
        machine.write(f"class/thermal/cooling_device{number}/cur_state", state)
    sensors = machine.open()
    reading = sensors.read()
    # All of the module, not all of its rails: they are parts of VDD_IN.
    assert reading.power_w == pytest.approx(6.2)
    assert reading.gpu_percent == pytest.approx(43.7)
    assert reading.temperature_c == pytest.approx(51.25)
    assert reading.throttled is False
    assert reading.sources == ("psutil", "sysfs", "INA3221")
    machine.write("class/thermal/cooling_device1/cur_state", 1)
    assert sensors.read().throttled is True


def test_agx_orin_has_no_rail_for_all(machine: Machine) -> None:
    rails(
        machine,
        3,
        ("VDD_GPU_SOC", 20000, 100),
        ("VDD_CPU_CV", 20000, 50),
        ("VIN_SYS_5V0", 5000, 800),
    )
    rails(machine, 4, ("NC", 5000, 9999), ("VDDQ_VDD2_1V8AO", 5000, 200))
    machine.write("class/hwmon/hwmon5/name", "soctherm_oc")
    machine.write("class/hwmon/hwmon5/oc1_event_cnt", 7)
    sensors = machine.open()
    assert sensors.read().power_w == pytest.approx(2.0 + 1.0 + 4.0 + 1.0)
    # Counters of before are of before.
    assert sensors.read().throttled is False
    machine.write("class/hwmon/hwmon5/oc1_event_cnt", 8)
    assert sensors.read().throttled is True
    assert sensors.read().throttled is False


def test_a_rail_that_cannot_be_read_takes_nothing(machine: Machine) -> None:
    rails(machine, 0, ("VDD_GPU_SOC", 20000, 100), ("VDD_CPU_CV", 20000, 50))
    sensors = machine.open()
    (machine.root / "class/hwmon/hwmon0/curr2_input").unlink()
    assert sensors.read().power_w == pytest.approx(2.0)


def test_processor_packages(machine: Machine) -> None:
    for number, energy in ((0, 900_000_000), (1, 50_000_000)):
        folder = f"class/powercap/intel-rapl:{number}"
        machine.write(f"{folder}/name", f"package-{number}")
        machine.write(f"{folder}/energy_uj", energy)
        machine.write(f"{folder}/max_energy_range_uj", 1_000_000_000)
    # A part of a package, and the whole platform: neither is added.
    machine.write("class/powercap/intel-rapl:0:0/name", "core")
    machine.write("class/powercap/intel-rapl:0:0/energy_uj", 1)
    machine.write("class/powercap/intel-rapl:2/name", "psys")
    machine.write("class/powercap/intel-rapl:2/energy_uj", 1)
    sensors = machine.open()
    machine.clock.now += 2
    machine.write("class/powercap/intel-rapl:0/energy_uj", 930_000_000)
    machine.write("class/powercap/intel-rapl:1/energy_uj", 60_000_000)
    reading = sensors.read()
    assert reading.power_w == pytest.approx((30 + 10) / 2)
    assert "RAPL" in reading.sources
    # The first counter begins anew: 70 J up to its end, and 20 J after.
    machine.clock.now += 3
    machine.write("class/powercap/intel-rapl:0/energy_uj", 20_000_000)
    assert sensors.read().power_w == pytest.approx((70 + 20 + 0) / 3)
    # Unreadable for a while: no power, and the mean begins anew.
    (machine.root / "class/powercap/intel-rapl:1/energy_uj").unlink()
    machine.clock.now += 1
    assert sensors.read().power_w is None
    machine.write("class/powercap/intel-rapl:1/energy_uj", 61_000_000)
    machine.clock.now += 1
    assert sensors.read().power_w is None
    machine.clock.now += 1
    machine.write("class/powercap/intel-rapl:0/energy_uj", 25_000_000)
    assert sensors.read().power_w == pytest.approx(5)


def test_counters_for_root_only(machine: Machine) -> None:
    machine.write("class/powercap/intel-rapl:0/name", "package-0")
    # Tests may run as root, who may read every file; nobody can read a folder.
    (machine.root / "class/powercap/intel-rapl:0/energy_uj").mkdir()
    sensors = machine.open()
    machine.clock.now += 1
    assert sensors.read().power_w is None


def test_a_processor_that_throttles(machine: Machine) -> None:
    for core in (0, 1):
        folder = f"devices/system/cpu/cpu{core}/thermal_throttle"
        machine.write(f"{folder}/core_throttle_count", 12)
        machine.write(f"{folder}/core_throttle_total_time_ms", 40)
    machine.write("class/hwmon/hwmon0/name", "coretemp")
    machine.write("class/hwmon/hwmon0/temp1_input", 71000)
    machine.write("class/hwmon/hwmon0/temp2_input", 88000)
    machine.write("class/hwmon/hwmon1/name", "nvme")
    machine.write("class/hwmon/hwmon1/temp1_input", 95000)
    sensors = machine.open()
    reading = sensors.read()
    assert (reading.throttled, reading.temperature_c) == (False, 88.0)
    machine.write("devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", 13)
    assert sensors.read().throttled is True
    machine.write("devices/system/cpu/cpu0/thermal_throttle/core_throttle_total_time_ms", 90)
    assert sensors.read().throttled is True
    assert sensors.read().throttled is False


def test_a_zone_of_the_board_where_there_is_no_other(machine: Machine) -> None:
    machine.write("class/thermal/thermal_zone0/type", "acpitz")
    machine.write("class/thermal/thermal_zone0/temp", 40000)
    assert machine.open().read().temperature_c == 40.0
    machine.write("class/thermal/thermal_zone1/type", "x86_pkg_temp")
    machine.write("class/thermal/thermal_zone1/temp", 35000)
    assert machine.open().read().temperature_c == 35.0


@pytest.mark.parametrize("content", ["", "nan", "not a number", "-40000", "900000"])
def test_a_sensor_that_says_nonsense(machine: Machine, content: str) -> None:
    machine.write("class/thermal/thermal_zone0/type", "cpu-thermal")
    machine.write("class/thermal/thermal_zone0/temp", content)
    assert machine.open().read().temperature_c is None


# --- libraries


class Nvml(types.ModuleType):
    """NVML of a card: counters that the test sets; what is None is not supported."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.energy: int | None = 5_000_000
        self.power: int | None = 250_000
        self.reasons: int | None = 0x4
        self.asked: list[Any] = []
        self.shut = 0

    def _given(self, value: Any) -> Any:
        if value is None:
            raise RuntimeError("NVMLError_NotSupported")
        return value

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        self.shut += 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked.append(index)
        return "card"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "card"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return types.SimpleNamespace(gpu=63, memory=20)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return types.SimpleNamespace(used=1_500_000_000)

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 66

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> Any:
        return self._given(self.energy)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> Any:
        return self._given(self.power)

    # Drivers before release 535 have it by this name only.
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> Any:
        return self._given(self.reasons)


@pytest.fixture
def nvml(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def test_a_graphics_card(machine: Machine, nvml: Nvml) -> None:
    sensors = machine.open()
    machine.clock.now += 4
    assert nvml.energy is not None
    nvml.energy += 1_000_000
    reading = sensors.read()
    assert (reading.gpu_percent, reading.gpu_memory_mb, reading.temperature_c) == (63, 1500, 66)
    # 1000 J in 4 s; a power limit is no throttling.
    assert reading.power_w == pytest.approx(250)
    assert reading.throttled is False
    assert reading.sources == ("psutil", "NVML")
    nvml.reasons = 0x20 | 0x1
    assert sensors.read().throttled is True
    nvml.energy, nvml.power, nvml.reasons = None, 180_500, None
    reading = sensors.read()
    assert (reading.power_w, reading.throttled) == (180.5, None)
    nvml.power = None
    assert sensors.read().power_w is None
    sensors.close()
    sensors.close()
    assert nvml.shut == 1
    assert sensors.read().sources == ()


def test_processor_and_card_add_up(machine: Machine, nvml: Nvml) -> None:
    machine.write("class/powercap/intel-rapl:0/name", "package-0")
    machine.write("class/powercap/intel-rapl:0/energy_uj", 0)
    sensors = machine.open()
    machine.clock.now += 1
    machine.write("class/powercap/intel-rapl:0/energy_uj", 40_000_000)
    assert nvml.energy is not None
    nvml.energy += 100_000
    assert sensors.read().power_w == pytest.approx(140)


def test_a_jetson_is_not_asked_twice(machine: Machine, nvml: Nvml) -> None:
    rails(machine, 0, ("VDD_IN", 5000, 1000))
    machine.write("devices/platform/gpu.0/load", 100)
    reading = machine.open().read()
    assert (reading.power_w, reading.gpu_percent) == (5.0, 10.0)
    assert nvml.asked == []


def test_a_jetson_whose_gpu_only_nvml_sees(machine: Machine, nvml: Nvml) -> None:
    rails(machine, 0, ("VDD_GPU", 12000, 1000), ("VIN", 12000, 2000))
    sensors = machine.open()
    machine.clock.now += 1
    reading = sensors.read()
    # The GPU is on the rails already.
    assert (reading.power_w, reading.gpu_percent) == (36.0, 63.0)


@pytest.mark.parametrize(
    ("visible", "asked"), [("2,0", 2), ("GPU-8f3e", "GPU-8f3e"), ("", 0), ("MIG-1", 0)]
)
def test_the_card_that_cuda_takes(
    machine: Machine, nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str, asked: object
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine.open()
    assert nvml.asked == [asked]


def test_a_library_that_is_broken(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Nvml()
    monkeypatch.setattr(broken, "nvmlInit", lambda: broken._given(None))
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert machine.open().read().sources == ("psutil",)


def test_jetson_stats_in_a_container(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended: list[str] = []

    def service(interval: float) -> Any:
        return types.SimpleNamespace(
            start=lambda: None,
            close=lambda: ended.append("closed"),
            power={"tot": {"power": 7300, "name": "VDD_IN"}, "rail": {}},
            temperature={
                "cpu": {"temp": 55.0, "online": True},
                "gpu": {"temp": 61.5, "online": True},
                "cv0": {"temp": -256, "online": False},
                "PMIC": {"temp": 100.0, "online": True},
            },
            gpu={"gpu": {"status": {"load": 88.0}}},
        )

    module = types.ModuleType("jtop")
    module.jtop = service  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jtop", module)
    assert machine.open().read().power_w is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run/jtop.sock").write_text("")
    sensors = machine.open()
    reading = sensors.read()
    assert (reading.power_w, reading.temperature_c, reading.gpu_percent) == (7.3, 61.5, 88.0)
    assert "jtop" in reading.sources
    sensors.close()
    assert ended == ["closed"]


def test_from_many_threads(machine: Machine) -> None:
    sensors = Sensors()
    found: list[Reading] = []

    def work(read: Callable[[], Reading]) -> None:
        for _ in range(50):
            found.append(read())

    threads = [threading.Thread(target=work, args=(sensors.read,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    sensors.close()
    for thread in threads:
        thread.join()
    assert len(found) == 200
