"""Plans on disk: which fits, what is said of the others, and that files appear whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeseg.bundle import SHIPPED, Bundle
from edgeseg.engine import plan as module
from edgeseg.engine.attest import Attestation
from edgeseg.engine.cuda import Device
from edgeseg.engine.plan import (
    BuildOptions,
    NoPlan,
    Plan,
    PluginLibrary,
    find_plan,
    plan_folder,
    plan_stem,
    save_plan,
    write_whole,
)
from edgeseg.errors import EngineError, RequestError

ORIN = Device(0, "Orin", (8, 7), integrated=True)
THOR = Device(0, "NVIDIA Thor", (11, 0), integrated=True)
CONTENT = b"a plan as TensorRT wrote it"
GOOD = Attestation(9, {"int8": 4}, ("EdgeSegUpsampleArgmax",), 1, 0, 0, ())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "edgeseg" / "engines"


@pytest.fixture
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.open(bundle_folder)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libedgeseg_plugins.so"
    path.write_bytes(b"plugins")
    return path


def built(
    bundle: Bundle, library: Path | None = None, options: BuildOptions | None = None, **changes: Any
) -> Plan:
    """Writes a plan of ``bundle``."""
    resolved = replace(options or BuildOptions(), plugins=library is not None)
    device = changes.get("device", ORIN)
    version = changes.get("tensorrt", "10.3.0")
    stem = plan_stem(resolved, tensorrt_version=version, device=device)
    values: dict[str, Any] = {
        "path": plan_folder(bundle) / f"{stem}.plan",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "onnx_sha256": hashlib.sha256(bundle.model.content).hexdigest(),
        "tensorrt": version,
        "device": device,
        "options": resolved,
        "library": None if library is None else PluginLibrary.of(library),
        "workspace_bytes": 1 << 28,
        "attestation": GOOD,
        "warnings": ("something minor",),
        "build_seconds": 51.13,
        "edgeseg": "0.1.0",
    }
    made = Plan(**{**values, **changes})
    save_plan(made, CONTENT)
    return made


def find(
    bundle: Bundle,
    options: BuildOptions | None = None,
    version: str = "10.3.0",
    device: Device = ORIN,
    library: Path | None = None,
) -> Plan | NoPlan:
    return find_plan(
        bundle, options, tensorrt_version=version, device=device, plugin_library=library
    )


def reasons(found: Plan | NoPlan) -> str:
    assert isinstance(found, NoPlan)
    return "; ".join(found.reasons)


# --- options


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"level": 6}, "level is 0 .* to 5 .* and 6 came"),
        ({"level": -1}, "and -1 came"),
        ({"workspace_mb": 0}, "1 MiB or more, and 0 came"),
        ({"dla": -1}, "counted from 0, and -1 came"),
        ({"hardware_compatible": "all"}, "ampere_plus or same_compute_capability, and 'all' came"),
    ],
)
def test_options_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        BuildOptions(**values)


@pytest.mark.parametrize("asked", [True, False, None])
@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("operators", [True, False])
def test_plugins_are_decided(asked: bool | None, here: bool, operators: bool) -> None:
    options = BuildOptions(plugins=asked)
    if asked and operators and not here:
        with pytest.raises(
            EngineError, match="`edgeseg kernels build --tensorrt` makes it, --no-plugins"
        ):
            options.resolved(has_operators=operators, library_here=here)
        return
    resolved = options.resolved(has_operators=operators, library_here=here)
    assert resolved.plugins is (operators and here and asked is not False)


def test_what_does_not_change_the_plan_is_not_compared() -> None:
    other = BuildOptions(timing_cache=Path("x"), strict=False, memory_check=False)
    assert other == BuildOptions()
    assert set(other.to_dict()).isdisjoint({"timing_cache", "strict", "memory_check"})


# --- names and places


def test_names_tell_plans_apart() -> None:
    made = {
        plan_stem(options, tensorrt_version=version, device=device)
        for version in ("10.3.0", "11.4.0.106")
        for device in (ORIN, THOR)
        for options in (
            BuildOptions(plugins=False), BuildOptions(plugins=True), BuildOptions(level=5),
            BuildOptions(workspace_mb=64), BuildOptions(version_compatible=True),
            BuildOptions(hardware_compatible="ampere_plus"), BuildOptions(dla=0),
            BuildOptions(dla=1), BuildOptions(tf32=True),
            BuildOptions(hardware_compatible="same_compute_capability"),
        )
    }  # fmt: skip
    assert len(made) == 2 * 2 * 10
    assert "nvidia-thor-sm110-trt10.3.0-plugins" in made
    assert all("/" not in name and " " not in name for name in made)


def test_place_beside_the_model(bundle: Bundle, cache: Path) -> None:
    assert bundle.folder is not None
    assert plan_folder(bundle) == bundle.folder / "engines"
    # A bundle with engines is still the bundle that was exported.
    Bundle.open(bundle.folder)
    assert not cache.exists()


def test_place_in_the_cache(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = hashlib.sha256(bundle.model.content).hexdigest()
    lone = Bundle.open(bundle.model_path)
    assert plan_folder(lone) == cache / sha256
    for name in SHIPPED:
        assert cache in plan_folder(Bundle.open(name)).parents
    # A folder that nothing can be written to: a file is in its place.
    assert bundle.folder is not None
    (bundle.folder / "engines").write_text("")
    assert plan_folder(bundle) == cache / sha256
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.model_path))
    with pytest.raises(EngineError, match=r"there is no place for the plan: .* cannot be written"):
        plan_folder(bundle)


# --- what fits


def test_a_plan_that_fits(bundle: Bundle, library: Path) -> None:
    assert find(bundle) == NoPlan(None, ())
    assert str(find(bundle)) == "no plan has been built here yet"
    made = built(bundle, library)
    found = find(bundle, BuildOptions(), library=library)
    assert found == replace(made, build_seconds=51.1)
    assert isinstance(found, Plan) and found.read() == CONTENT
    assert find(bundle, BuildOptions(plugins=True), library=library) == found
    assert find(bundle, library=library) == found
    # A GPU's number is no part of what it is.
    assert isinstance(find(bundle, device=replace(ORIN, ordinal=1), library=library), Plan)


def test_a_plan_in_the_cache_is_found(bundle: Bundle) -> None:
    lone = Bundle.open(bundle.model_path)
    made = built(lone)
    assert isinstance(find(lone), Plan)
    # By the bundle with the same ONNX file as well.
    found = find(bundle)
    assert isinstance(found, Plan) and found.path == made.path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "10.7.0"}, "built by TensorRT 10.3.0, and 10.7.0 is here"),
        (
            {"device": THOR},
            "built for Orin (compute capability 8.7), and NVIDIA Thor (compute capability 11.0) is "
            "here",
        ),
        ({"device": replace(ORIN, name="Orin Mini")}, "built for Orin (compute capability 8.7)"),
        ({"options": BuildOptions(level=5)}, "built with level 3, asked level 5"),
        ({"options": BuildOptions(plugins=False)}, "built with plugins, asked no plugins"),
        ({"options": BuildOptions(workspace_mb=64)}, "no workspace mb, asked workspace mb 64"),
        ({"options": BuildOptions(dla=0)}, "built with no dla, asked dla 0"),
        ({"options": BuildOptions(tf32=True)}, "built with no tf32, asked tf32"),
        (
            {"options": BuildOptions(version_compatible=True, hardware_compatible="ampere_plus")},
            "built with no version compatible, asked version compatible; built with no hardware "
            "compatible, asked hardware compatible ampere_plus",
        ),
    ],
)
def test_what_differs(bundle: Bundle, library: Path, changes: dict[str, Any], said: str) -> None:
    made = built(bundle, library)
    found = find(bundle, **{"options": BuildOptions(), "library": library, **changes})
    assert said in reasons(found)
    assert str(found).startswith(f"{made.path.name} does not fit: ")


def test_another_onnx_file(bundle: Bundle) -> None:
    built(bundle, onnx_sha256="0" * 64)
    assert reasons(find(bundle)) == "built from another ONNX file"


def test_plugin_library_missing_or_changed(bundle: Bundle, library: Path) -> None:
    built(bundle, library)
    for options in (None, BuildOptions(plugins=None)):
        said = reasons(find(bundle, options))
        assert "uses the plugin library libedgeseg_plugins.so, which is not here" in said
        assert "`edgeseg kernels build --tensorrt`" in said
    library.write_bytes(b"newer plugins")
    assert reasons(find(bundle, library=library)) == (
        "the plugin library libedgeseg_plugins.so has changed since it was built"
    )
    with pytest.raises(EngineError, match="their library is not here"):
        find(bundle, BuildOptions(plugins=True))


def test_library_that_came_later(bundle: Bundle, library: Path) -> None:
    built(bundle)
    said = reasons(find(bundle, BuildOptions(), library=library))
    assert said == "built with no plugins, asked plugins"
    assert isinstance(find(bundle, library=library), Plan)


@pytest.mark.parametrize(
    ("made_by", "here", "loads"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.3.0", "10.13.3.9", True),
        ("10.3.0", "11.4.0.106", True),
        ("10.13.3.9", "10.3.0", False),
        ("11.1.0", "12.0.0", False),
        ("11.4.0", "11.10.0", True),
        ("10.3.0", "strange", False),
    ],
)
def test_version_compatible_plans(bundle: Bundle, made_by: str, here: str, loads: bool) -> None:
    built(bundle, options=BuildOptions(version_compatible=True), tensorrt=made_by)
    assert isinstance(find(bundle, version=here), Plan) is loads


@pytest.mark.parametrize(
    ("level", "here", "runs"),
    [
        ("ampere_plus", THOR, True),
        ("ampere_plus", replace(THOR, compute_capability=(7, 5)), False),
        ("same_compute_capability", replace(ORIN, name="Other"), True),
        ("same_compute_capability", THOR, False),
    ],
)
def test_hardware_compatible_plans(bundle: Bundle, level: Any, here: Device, runs: bool) -> None:
    built(bundle, options=BuildOptions(hardware_compatible=level))
    assert isinstance(find(bundle, device=here), Plan) is runs


def test_a_plan_that_is_not_as_asked(bundle: Bundle) -> None:
    built(bundle, attestation=replace(GOOD, failures=("conv1 runs in fp16",)))
    assert reasons(find(bundle, BuildOptions())) == (
        "not what the graph asks for: conv1 runs in fp16"
    )
    assert isinstance(find(bundle, BuildOptions(strict=False)), Plan)
    assert isinstance(find(bundle), Plan)


def test_the_closest_plan_is_spoken_of(bundle: Bundle) -> None:
    near = built(bundle)
    far = built(bundle, device=THOR, tensorrt="11.4.0.106")
    for newest in (near, far):
        stamp = newest.sidecar.stat().st_mtime_ns + 10**10
        os.utime(newest.sidecar, ns=(stamp, stamp))
        found = find(bundle, BuildOptions(), version="10.7.0")
        assert isinstance(found, NoPlan) and found.path == near.path
        assert len(found.reasons) == 1


def test_a_workspace_is_compared_when_one_is_asked_for(bundle: Bundle) -> None:
    built(bundle, options=BuildOptions(workspace_mb=64))
    assert isinstance(find(bundle, BuildOptions()), Plan)
    assert isinstance(find(bundle, BuildOptions(workspace_mb=64)), Plan)
    said = reasons(find(bundle, BuildOptions(workspace_mb=65)))
    assert said == "built with workspace mb 64, asked workspace mb 65"


def test_any_options_take_the_newest(bundle: Bundle) -> None:
    for age, level in ((30, 5), (10, 4), (20, 3)):
        made = built(bundle, options=BuildOptions(level=level))
        stamp = made.sidecar.stat().st_mtime_ns - age * 10**9
        os.utime(made.sidecar, ns=(stamp, stamp))
    found = find(bundle)
    assert isinstance(found, Plan) and found.options.level == 4
    found = find(bundle, BuildOptions(level=5))
    assert isinstance(found, Plan) and found.options.level == 5


# --- damage


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", "[]", '"x"', "{}", '{"format": 1}', '{"format": 9}', "\0"]
)
def test_damaged_sidecar(bundle: Bundle, text: str) -> None:
    made = built(bundle)
    made.sidecar.write_text(text)
    assert "is damaged, or of another EdgeSeg (" in reasons(find(bundle))


def test_every_value_of_the_sidecar_is_needed(bundle: Bundle) -> None:
    made = built(bundle)
    values = json.loads(made.sidecar.read_text())
    for name in values:
        if name == "plan":
            continue
        for spoilt in ({key: values[key] for key in values if key != name}, {**values, name: 3.5}):
            if name in ("sha256", "onnx_sha256", "tensorrt", "edgeseg", "workspace_bytes",
                        "build_seconds") and name in spoilt:  # fmt: skip
                continue
            made.sidecar.write_text(json.dumps(spoilt))
            assert "is damaged, or of another EdgeSeg" in reasons(find(bundle)), name
    made.sidecar.write_bytes(b"\xff\xfe")
    assert "is damaged" in reasons(find(bundle))


def test_damaged_and_missing_plan(bundle: Bundle) -> None:
    made = built(bundle)
    for content in (b"", CONTENT[:-1], CONTENT.replace(b"T", b"t")):
        made.path.write_bytes(content)
        assert "is damaged: its sha256 differs" in reasons(find(bundle))
        with pytest.raises(EngineError, match="`edgeseg build` makes it again"):
            made.read()
    made.path.unlink()
    assert "cannot be read (No such file" in reasons(find(bundle))


def test_a_folder_in_place_of_a_sidecar(bundle: Bundle) -> None:
    made = built(bundle)
    made.sidecar.unlink()
    made.sidecar.mkdir()
    assert "cannot be read (Is a directory)" in reasons(find(bundle))


def test_unreadable_library(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"gone\.so cannot be read \(No such file"):
        PluginLibrary.of(tmp_path / "gone.so")


# --- writing


def test_files_are_whole_or_not_there(
    bundle: Bundle,
    leftovers: Callable[[Path], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = built(bundle)
    before = made.path.read_bytes(), made.sidecar.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EngineError, match=r"cannot be written \(No space left on device\)"):
        write_whole(made.path, b"another plan")
    monkeypatch.undo()
    assert (made.path.read_bytes(), made.sidecar.read_bytes()) == before
    assert leftovers(made.path.parent) == []


def test_a_sidecar_of_the_last_plan_does_not_cover_a_new_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = built(bundle)
    kept = module.write_whole

    def stops(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        kept(path, content)

    monkeypatch.setattr(module, "write_whole", stops)
    with pytest.raises(KeyboardInterrupt):
        save_plan(made, b"another plan")
    assert "is damaged: its sha256 differs" in reasons(find(bundle))


def test_sidecar_is_json_for_people(bundle: Bundle, library: Path) -> None:
    made = built(bundle, library, BuildOptions(workspace_mb=256))
    values = json.loads(made.sidecar.read_text())
    assert values["plan"] == made.path.name and made.sidecar.stem == made.path.stem
    assert values["tensorrt"] == "10.3.0"
    assert values["device"] == {
        "name": "Orin", "compute_capability": "8.7", "integrated": True,
    }  # fmt: skip
    assert values["plugin_library"]["sha256"] == hashlib.sha256(b"plugins").hexdigest()
    assert values["options"]["workspace_mb"] == 256 and values["options"]["plugins"] is True
    assert Plan.from_dict(made.path, values) == replace(made, build_seconds=51.1)


def test_render(bundle: Bundle) -> None:
    options = BuildOptions(
        level=5, version_compatible=True, hardware_compatible="ampere_plus", dla=1, tf32=True
    )
    made = built(bundle, options=options)
    lines = made.render()
    assert lines[0] == str(made.path)
    assert lines[1] == (
        "TensorRT 10.3.0, Orin (compute capability 8.7), level 5, for newer TensorRT too, ampere "
        "plus, DLA 1, TF32, built in 51 s"
    )
    assert lines[2:] == [*GOOD.render(), "TensorRT warns: something minor"]


def test_a_bundle_whose_signature_was_checked_takes_no_plan_from_its_folder(
    bundle: Bundle, cache: Path
) -> None:
    made = built(bundle)
    assert made.path.parent.parent == bundle.folder
    signed = replace(bundle, signed=True)
    assert isinstance(find(signed), NoPlan)
    mine = built(signed)
    assert cache in mine.path.parents
    found = find(signed)
    assert isinstance(found, Plan) and found.path == mine.path


@pytest.mark.parametrize(
    "text",
    ['{"format": 1, "format": 1}', '{"format": NaN}', "[" * 100_000, '{"x": "\\ud800"}'],
)
def test_sidecar_that_could_be_read_in_two_ways(bundle: Bundle, text: str) -> None:
    built(bundle).sidecar.write_text(text)
    assert "is damaged, or of another EdgeSeg" in reasons(find(bundle))


def test_sidecar_that_is_a_pipe(bundle: Bundle) -> None:
    made = built(bundle)
    made.sidecar.unlink()
    os.mkfifo(made.sidecar)
    assert "cannot be read (it is no regular file)" in reasons(find(bundle))
