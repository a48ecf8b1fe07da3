"""A plan: an engine that TensorRT built for one kind of GPU, and the sidecar that says for which.

TensorRT loads a plan of another release, GPU or plugin library with an error at best and wrong
masks at worst, and the file itself cannot be asked. So what it was made of lies beside it, and a
plan is used only when all of that fits; else the sentences say what differs.

::

    street/engines/orin-sm87-trt10.3.0-plugins.plan     as TensorRT wrote it: trtexec loads it too
    street/engines/orin-sm87-trt10.3.0-plugins.json     the sidecar
    street/engines/orin-sm87-trt10.3.0.timing           what the builder measured, for the next time
    street/engines/libedgeseg_plugins.so                the library, for trtexec and others

A bundle that ships with EdgeSeg, that cannot be written, or that is a lone file keeps its plans in
the user's cache: ``~/.cache/edgeseg/engines/<sha256 of the ONNX file>/``. So does a bundle whose
signature was checked: nobody signs what lies in its folder's ``engines``, so that is not looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from edgeseg.bundle import Bundle
from edgeseg.engine.attest import Attestation
from edgeseg.engine.cuda import Device
from edgeseg.errors import EngineError, RequestError
from edgeseg.files import read_file
from edgeseg.jsonfile import parse_json

__all__ = [
    "BuildOptions",
    "HardwareLevel",
    "NoPlan",
    "Plan",
    "PluginLibrary",
    "find_plan",
    "plan_folder",
    "plan_folders",
    "plan_stem",
    "save_plan",
    "write_whole",
]

#: which other GPUs a plan has to run on as well (HardwareCompatibilityLevel)
HardwareLevel = Literal["ampere_plus", "same_compute_capability"]
LEVELS = range(6)

# Of the sidecar's layout.
_FORMAT = 1
# A sidecar names layers and warnings; a plan holds the weights, once or twice.
_LARGEST_SIDECAR = 1 << 24
_LARGEST_PLAN = 1 << 33
_FOLDER = "engines"
_SHIPPED = Path(__file__).resolve().parents[1] / "bundles"


@dataclass(frozen=True)
class BuildOptions:
    """What a plan is built for; RequestError when a value cannot be.

    Precision is no option: the graph says it.

    ``plugins``: True needs EdgeSeg's kernels in the plan, False keeps to TensorRT's own layers,
    None takes the kernels when their library is here. ``workspace_mb``: scratch memory in MiB that
    a layer may use, None takes it from what is free. ``level``: 0 builds fastest, 5 searches
    longest (``builder_optimization_level``). ``version_compatible``: newer releases of TensorRT
    can load the plan too, at some cost in speed and size. ``hardware_compatible``: which other
    GPUs can. ``dla``: number of the DLA core that runs what it can, None for the GPU alone.
    ``tf32``: float32 convolutions may round their inputs to 10 bits of mantissa; off, so that
    float32 is float32 as on the other engines.

    These do not change the plan: ``timing_cache``, the file of measurements, None for one beside
    the plan; ``strict``, whether a plan that is not what the graph asks for is refused or only
    warned of; ``memory_check``, whether a build that seems not to fit is refused.
    """

    plugins: bool | None = None
    workspace_mb: int | None = None
    level: int = 3
    version_compatible: bool = False
    hardware_compatible: HardwareLevel | None = None
    dla: int | None = None
    tf32: bool = False
    timing_cache: Path | None = field(default=None, compare=False)
    strict: bool = field(default=True, compare=False)
    memory_check: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise RequestError(
                f"the builder's level is {LEVELS[0]} (fastest build) to {LEVELS[-1]} (longest "
                f"search), and {self.level} came"
            )
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise RequestError(
                f"the workspace is 1 MiB or more, and {self.workspace_mb} came; leave it out to "
                "take it from the free memory"
            )
        if self.dla is not None and self.dla < 0:
            raise RequestError(f"DLA cores are counted from 0, and {self.dla} came")
        known = get_args(HardwareLevel)
        if self.hardware_compatible is not None and self.hardware_compatible not in known:
            raise RequestError(
                f"a plan can be compatible with {' or '.join(known)}, and "
                f"{self.hardware_compatible!r} came"
            )

    def resolved(self, *, has_operators: bool, library_here: bool) -> BuildOptions:
        """The same with ``plugins`` decided.

        EngineError when they are required and their library is not here.
        """
        if self.plugins and has_operators and not library_here:
            raise EngineError(
                "the plan is to use EdgeSeg's plugins, and their library is not here; "
                "`edgeseg kernels build --tensorrt` makes it, --no-plugins does without"
            )
        wanted = library_here if self.plugins is None else self.plugins
        return replace(self, plugins=wanted and has_operators)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, of what changes the plan; ``from_dict`` reads them back."""
        unchanging = {"timing_cache", "strict", "memory_check"}
        return {name: value for name, value in asdict(self).items() if name not in unchanging}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BuildOptions:
        """What ``to_dict`` gave; KeyError, TypeError or ValueError for anything else."""
        workspace, dla = values["workspace_mb"], values["dla"]
        return cls(
            plugins=bool(values["plugins"]),
            workspace_mb=None if workspace is None else int(workspace),
            level=int(values["level"]),
            version_compatible=bool(values["version_compatible"]),
            hardware_compatible=cast("HardwareLevel | None", values["hardware_compatible"]),
            dla=None if dla is None else int(dla),
            tf32=bool(values["tf32"]),
        )


@dataclass(frozen=True)
class PluginLibrary:
    """The plugin library that a plan was built with: its file's name and sha256."""

    name: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> PluginLibrary:
        """The library at ``path``; EngineError when it cannot be read."""
        try:
            return cls(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        except OSError as error:
            raise EngineError(
                f"the plugin library {path} cannot be read ({error.strerror}); "
                "`edgeseg kernels build --tensorrt` makes it again"
            ) from error


@dataclass(frozen=True)
class Plan:
    """A built engine on disk.

    ``path``: the plan's file. ``options``: what it was built for, ``plugins`` decided.
    ``library``: None when it uses no plugins. ``warnings``: what TensorRT said while building.
    """

    path: Path
    sha256: str
    onnx_sha256: str
    tensorrt: str
    device: Device
    options: BuildOptions
    library: PluginLibrary | None
    workspace_bytes: int
    attestation: Attestation
    warnings: tuple[str, ...]
    build_seconds: float
    edgeseg: str

    @property
    def sidecar(self) -> Path:
        """The file that describes it."""
        return self.path.with_suffix(".json")

    def read(self) -> bytes:
        """What TensorRT wrote; EngineError when the file is gone or changed."""
        try:
            content = read_file(self.path, most=_LARGEST_PLAN)
        except OSError as error:
            raise EngineError(
                f"the plan {self.path} cannot be read ({error.strerror}); "
                "`edgeseg build` makes it again"
            ) from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise EngineError(
                f"the plan {self.path} is damaged: its sha256 differs from the one in "
                f"{self.sidecar.name}; `edgeseg build` makes it again"
            )
        return content

    def render(self) -> list[str]:
        """Lines for a person: what it is, what is in it, what TensorRT warned of."""
        asked = [f"level {self.options.level}"]
        if self.options.version_compatible:
            asked.append("for newer TensorRT too")
        if self.options.hardware_compatible is not None:
            asked.append(self.options.hardware_compatible.replace("_", " "))
        if self.options.dla is not None:
            asked.append(f"DLA {self.options.dla}")
        if self.options.tf32:
            asked.append("TF32")
        lines = [
            str(self.path),
            f"TensorRT {self.tensorrt}, {self.device}, {', '.join(asked)}, "
            f"built in {self.build_seconds:.0f} s",
            *self.attestation.render(),
        ]
        lines.extend(f"TensorRT warns: {warning}" for warning in self.warnings)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The sidecar's content; ``from_dict`` reads it back."""
        major, minor = self.device.compute_capability
        return {
            "format": _FORMAT,
            "plan": self.path.name,
            "sha256": self.sha256,
            "onnx_sha256": self.onnx_sha256,
            "tensorrt": self.tensorrt,
            "device": {
                "name": self.device.name,
                "compute_capability": f"{major}.{minor}",
                "integrated": self.device.integrated,
            },
            "options": self.options.to_dict(),
            "plugin_library": None if self.library is None else asdict(self.library),
            "workspace_bytes": self.workspace_bytes,
            "attestation": self.attestation.to_dict(),
            "warnings": list(self.warnings),
            "build_seconds": round(self.build_seconds, 1),
            "edgeseg": self.edgeseg,
        }

    @classmethod
    def from_dict(cls, path: Path, values: Mapping[str, Any]) -> Plan:
        """The plan at ``path`` that a sidecar describes.

        KeyError, TypeError or ValueError when the sidecar is of another layout.
        """
        if values["format"] != _FORMAT:
            raise ValueError(f"format {values['format']}")
        device, library = values["device"], values["plugin_library"]
        major, minor = (int(part) for part in str(device["compute_capability"]).split("."))
        return cls(
            path=path,
            sha256=str(values["sha256"]),
            onnx_sha256=str(values["onnx_sha256"]),
            tensorrt=str(values["tensorrt"]),
            device=Device(0, str(device["name"]), (major, minor), bool(device["integrated"])),
            options=BuildOptions.from_dict(values["options"]),
            library=None
            if library is None
            else PluginLibrary(str(library["name"]), str(library["sha256"])),
            workspace_bytes=int(values["workspace_bytes"]),
            attestation=Attestation.from_dict(values["attestation"]),
            warnings=tuple(str(warning) for warning in values["warnings"]),
            build_seconds=float(values["build_seconds"]),
            edgeseg=str(values["edgeseg"]),
        )


@dataclass(frozen=True)
class NoPlan:
    """Why none of the plans that are here can be used.

    ``path``: the one that comes closest, None when there is none. ``reasons``: what differs, as
    parts of a sentence.
    """

    path: Path | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if self.path is None:
            return "no plan has been built here yet"
        return f"{self.path.name} does not fit: {'; '.join(self.reasons)}"


def find_plan(
    bundle: Bundle,
    options: BuildOptions | None = None,
    *,
    tensorrt_version: str,
    device: Device,
    plugin_library: Path | None,
) -> Plan | NoPlan:
    """A plan of ``bundle`` that can be used as it is, or what keeps those that are here from it.

    ``options``: what it must have been built for; None takes any, the newest first, and is what
    an engine asks for: a plan that someone built on purpose is used. ``tensorrt_version``: as
    ``tensorrt.__version__`` says it. ``plugin_library``: where it is, if it is here. Damaged files
    are among the reasons; nothing is raised for them.

    EngineError when plugins are required and their library is not here.
    """
    onnx_sha256 = hashlib.sha256(bundle.model.content).hexdigest()
    library = None if plugin_library is None else PluginLibrary.of(plugin_library)
    if options is not None:
        options = options.resolved(
            has_operators=bundle.model.has_operators(), library_here=library is not None
        )
    closest: NoPlan | None = None
    for sidecar in _sidecars(bundle, onnx_sha256):
        found = _opened(sidecar)
        if isinstance(found, Plan):
            reasons = [
                *_version_reasons(found, tensorrt_version),
                *_device_reasons(found, device),
                *_content_reasons(found, onnx_sha256, library),
                *_option_reasons(found, options),
            ]
            if not reasons:
                # Last, since it reads the whole file.
                try:
                    found.read()
                except EngineError as error:
                    reasons.append(str(error))
                else:
                    return found
            found = NoPlan(found.path, tuple(reasons))
        if closest is None or len(found.reasons) < len(closest.reasons):
            closest = found
    return closest or NoPlan(None, ())


def _sidecars(bundle: Bundle, onnx_sha256: str) -> list[Path]:
    """Descriptions of plans for ``bundle``, the newest first."""
    folders = [_cache_folder(onnx_sha256)]
    if bundle.folder is not None and not bundle.signed:
        folders.append(bundle.folder / _FOLDER)
    found: list[tuple[int, Path]] = []
    for folder in folders:
        with suppress(OSError):
            found.extend((path.stat().st_mtime_ns, path) for path in folder.glob("*.json"))
    return [path for _, path in sorted(found, reverse=True)]


def _opened(sidecar: Path) -> Plan | NoPlan:
    path = sidecar.with_suffix(".plan")
    try:
        values = parse_json(read_file(sidecar, most=_LARGEST_SIDECAR))
        return Plan.from_dict(path, values)
    except OSError as error:
        return NoPlan(path, (f"{sidecar.name} cannot be read ({error.strerror})",))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return NoPlan(path, (f"{sidecar.name} is damaged, or of another EdgeSeg ({error})",))


def _version_reasons(plan: Plan, here: str) -> list[str]:
    if plan.tensorrt == here:
        return []
    if plan.options.version_compatible and _loads(plan.tensorrt, here):
        return []
    return [f"built by TensorRT {plan.tensorrt}, and {here} is here"]


def _loads(built: str, here: str) -> bool:
    """Whether release ``here`` loads version-compatible plans of release ``built``.

    Newer ones of the same major release do, and 11 those of 10 (TensorRT's support matrix, 11.4).
    """
    try:
        old, new = (tuple(int(part) for part in text.split(".")) for text in (built, here))
    except ValueError:
        return False
    return old <= new and (old[0] == new[0] or (old[0], new[0]) == (10, 11))


def _device_reasons(plan: Plan, device: Device) -> list[str]:
    level = plan.options.hardware_compatible
    if level == "ampere_plus":
        fits = device.compute_capability >= (8, 0)
    elif level == "same_compute_capability":
        fits = device.compute_capability == plan.device.compute_capability
    else:
        fits = (device.name, device.compute_capability) == (
            plan.device.name,
            plan.device.compute_capability,
        )
    return [] if fits else [f"built for {plan.device}, and {device} is here"]


def _content_reasons(plan: Plan, onnx_sha256: str, library: PluginLibrary | None) -> list[str]:
    reasons = []
    if plan.onnx_sha256 != onnx_sha256:
        reasons.append("built from another ONNX file")
    if plan.library is not None and library is None:
        reasons.append(
            f"it uses the plugin library {plan.library.name}, which is not here "
            "(`edgeseg kernels build --tensorrt` makes it)"
        )
    elif plan.library is not None and library is not None and plan.library != library:
        reasons.append(f"the plugin library {library.name} has changed since it was built")
    return reasons


def _option_reasons(plan: Plan, asked: BuildOptions | None) -> list[str]:
    if asked is None:
        return []
    reasons = []
    had, wanted = plan.options.to_dict(), asked.to_dict()
    for name, value in wanted.items():
        # An own workspace is asked for; one from the free memory may have come out as anything.
        if had[name] != value and not (name == "workspace_mb" and value is None):
            reasons.append(f"built with {_said(name, had[name])}, asked {_said(name, value)}")
    if asked.strict and not plan.attestation.holds:
        reasons.append("not what the graph asks for: " + "; ".join(plan.attestation.failures))
    return reasons


def _said(name: str, value: object) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"no {words}" if value is None else f"{words} {value}"


# --- writing


def plan_folder(bundle: Bundle) -> Path:
    """Where new plans of ``bundle`` go, made if need be; EngineError when nothing can be written.

    Beside the model, unless that ships with EdgeSeg, is read-only, or was opened with a key.
    """
    reason = ""
    for folder in plan_folders(bundle):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            reason = f"{folder} cannot be written ({error.strerror})"
    raise EngineError(f"there is no place for the plan: {reason}; copy the bundle to one that has")


def plan_folders(bundle: Bundle) -> list[Path]:
    """Where plans of ``bundle`` may lie, the first choice first; they need not be there."""
    folders = []
    ships = bundle.folder is not None and _SHIPPED in bundle.folder.resolve().parents
    if bundle.folder is not None and not ships and not bundle.signed:
        folders.append(bundle.folder / _FOLDER)
    folders.append(_cache_folder(hashlib.sha256(bundle.model.content).hexdigest()))
    return folders


def plan_stem(options: BuildOptions, *, tensorrt_version: str, device: Device) -> str:
    """Name of a plan's files without ending; all that makes plans differ is in it.

    ``options`` have their plugins decided.
    """
    tags = []
    if options.plugins:
        tags.append("plugins")
    if options.level != BuildOptions.level:
        tags.append(f"level{options.level}")
    if options.workspace_mb is not None:
        tags.append(f"workspace{options.workspace_mb}")
    if options.version_compatible:
        tags.append("newer")
    if options.hardware_compatible is not None:
        tags.append(options.hardware_compatible)
    if options.dla is not None:
        tags.append(f"dla{options.dla}")
    if options.tf32:
        tags.append("tf32")
    return "-".join([device_stem(tensorrt_version=tensorrt_version, device=device), *tags])


def device_stem(*, tensorrt_version: str, device: Device) -> str:
    """The part of the name that says where a plan, or a timing cache, fits."""
    major, minor = device.compute_capability
    gpu = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-") or "gpu"
    return f"{gpu}-sm{major}{minor}-trt{tensorrt_version}"


def save_plan(plan: Plan, content: bytes, library: Path | None = None) -> None:
    """Writes plan and sidecar, each whole or not at all, the sidecar last.

    ``library``: the plugin library that the plan needs. A copy goes beside it, for programs that
    know nothing of EdgeSeg's own; EdgeSeg loads its own.

    EngineError when they cannot be written.
    """
    if library is not None:
        write_whole(plan.path.with_name(library.name), library.read_bytes())
    write_whole(plan.path, content)
    text = json.dumps(plan.to_dict(), indent=2) + "\n"
    write_whole(plan.sidecar, text.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path``; EngineError, and nothing left behind, when that fails."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise EngineError(
            f"{path} cannot be written ({error.strerror}); make room, or copy the bundle elsewhere"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def _cache_folder(onnx_sha256: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "edgeseg" / _FOLDER / onnx_sha256
