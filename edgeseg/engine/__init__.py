"""Inference engines behind one protocol, chosen by what is installed."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from edgeseg.bundle import Bundle
from edgeseg.engine.base import Engine
from edgeseg.errors import EngineError, RequestError
from edgeseg.golden import golden_image

__all__ = ["ENGINES", "Engine", "EngineEntry", "available_engines", "open_engine"]


@dataclass(frozen=True)
class EngineEntry:
    """One engine by name: the library it needs, and the command that installs it."""

    name: str
    library: str
    install: str

    def is_installed(self) -> bool:
        """Whether its library can be imported; nothing is loaded to find out."""
        return importlib.util.find_spec(self.library) is not None


#: in the order in which they are preferred
ENGINES: tuple[EngineEntry, ...] = (
    EngineEntry("openvino", "openvino", "pip install openvino"),
    EngineEntry("onnxruntime", "onnxruntime", "pip install onnxruntime"),
)


def available_engines() -> tuple[str, ...]:
    """Names of the engines whose library is installed, best first."""
    return tuple(entry.name for entry in ENGINES if entry.is_installed())


def open_engine(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int = 0,
    compiled_head: bool | None = None,
    check: bool = True,
) -> Engine:
    """The model of ``bundle`` on an engine, checked against its golden pair.

    ``name``: one of ``ENGINES``, or None for the best that is installed. ``threads``: 0 leaves the
    number to the library. ``compiled_head``: whether the upsampling runs in the compiled kernel;
    None uses it if it is there. ``check=False`` leaves the golden pair out.

    RequestError for an unknown name; EngineError when the library is missing, cannot be loaded, or
    gives other masks.
    """
    entry = _entry(name)
    try:
        module = importlib.import_module(f"edgeseg.engine.{entry.name}")
    except ImportError as error:
        raise EngineError(
            f"the engine {entry.name} is installed and cannot be loaded ({error}); "
            f"`{entry.install} --force-reinstall` may help, or try another --engine"
        ) from error
    engine: Engine = module.open_engine(bundle, threads=threads, compiled_head=compiled_head)
    if check:
        try:
            _check(engine, bundle)
        except EngineError:
            engine.close()
            raise
    return engine


def _entry(name: str | None) -> EngineEntry:
    if name is None:
        for entry in ENGINES:
            if entry.is_installed():
                return entry
        raise EngineError(
            "no inference engine is installed; "
            + " or ".join(f"`{entry.install}`" for entry in ENGINES)
            + " adds one"
        )
    for entry in ENGINES:
        if entry.name == name:
            if not entry.is_installed():
                raise EngineError(f"the engine {name} is not installed; `{entry.install}` adds it")
            return entry
    raise RequestError(
        f"the engines are {', '.join(entry.name for entry in ENGINES)}, and {name!r} came"
    )


def _check(engine: Engine, bundle: Bundle) -> None:
    spec = bundle.spec
    outputs = engine.run(golden_image(bundle.golden.seed, spec.height, spec.width))
    agreement = bundle.golden.agreement(outputs.class_map)
    promised = bundle.golden.promised
    if agreement < promised:
        raise EngineError(
            f"{engine.description} gives other masks than those recorded at export: "
            f"{agreement:.1%} of the golden picture agrees and {promised:.0%} is promised; "
            "try another --engine, or update the library"
        )
