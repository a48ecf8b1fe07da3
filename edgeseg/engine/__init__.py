"""Inference engines behind one protocol, chosen by what is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass

from edgeseg.bundle import Bundle
from edgeseg.engine.base import Engine, OneAtATime
from edgeseg.errors import EngineError, RequestError
from edgeseg.golden import golden_image

__all__ = [
    "ENGINES",
    "Engine",
    "EngineEntry",
    "available_engines",
    "cpu_engine",
    "cpu_engines",
    "library_version",
    "not_installed",
    "open_engine",
    "passed_over",
]


@dataclass(frozen=True)
class EngineEntry:
    """One engine by name: the library it needs, what installs it, and whether it needs a GPU.

    ``install``: the command, in backquotes, and what else has to be said about it.
    """

    name: str
    library: str
    install: str
    needs_gpu: bool = False

    def is_installed(self) -> bool:
        """Whether its library can be imported; nothing is loaded to find out."""
        return importlib.util.find_spec(self.library) is not None

    def obstacle(self) -> str | None:
        """Why an engine that is installed cannot run on this machine, as a sentence, or None.

        Only an engine for the GPU has any: its library does not load, or there is no GPU, no
        driver, or no Python package for CUDA.
        """
        if not self.needs_gpu:
            return None
        from edgeseg.engine.cuda import open_cuda

        try:
            importlib.import_module(self.library)
            open_cuda().close()
        except (ImportError, OSError, RuntimeError) as error:
            # TensorRT's package looks for its libraries by itself, and fails in its own ways.
            return f"it cannot be loaded ({error})"
        except EngineError as error:
            return str(error)
        return None


#: in the order in which they are preferred
ENGINES: tuple[EngineEntry, ...] = (
    EngineEntry(
        "tensorrt",
        "tensorrt",
        "`pip install tensorrt` (on a Jetson: `sudo apt-get install python3-libnvinfer`, and a "
        "virtual environment made with --system-site-packages)",
        needs_gpu=True,
    ),
    EngineEntry("openvino", "openvino", "`pip install openvino`"),
    EngineEntry("onnxruntime", "onnxruntime", "`pip install onnxruntime`"),
)


def available_engines() -> tuple[str, ...]:
    """Names of the engines that can run here, best first: installed, and with what they run on."""
    return tuple(
        entry.name for entry in ENGINES if entry.is_installed() and entry.obstacle() is None
    )


def cpu_engines() -> tuple[str, ...]:
    """Names of the engines that are installed and need no GPU, best first.

    Where a model is prepared, these are the ones to measure with: TensorRT would build a plan, for
    minutes, for every candidate.
    """
    return tuple(entry.name for entry in ENGINES if not entry.needs_gpu and entry.is_installed())


def cpu_engine() -> str:
    """The best of ``cpu_engines``; EngineError when there is none."""
    names = cpu_engines()
    if not names:
        raise EngineError(_none_here())
    return names[0]


def passed_over() -> dict[str, str]:
    """Engines that are installed and cannot run here -> why; none of them is a default."""
    found = {entry.name: entry.obstacle() for entry in ENGINES if entry.is_installed()}
    return {name: obstacle for name, obstacle in found.items() if obstacle is not None}


def open_engine(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int = 0,
    compiled_head: bool | None = None,
    check: bool = True,
) -> Engine:
    """The model of ``bundle`` on an engine, checked against its golden pair.

    ``name``: one of ``ENGINES``, or None for the best that can run here. ``threads``: 0 takes what
    `edgeseg profile --sweep` found for this bundle on this machine, and leaves the number to the
    library where nothing was. ``compiled_head``: whether the upsampling runs in the compiled
    kernel; None uses it if it is there. ``check=False`` leaves the golden pair out.

    RequestError for an unknown name; EngineError when the library is missing, cannot be loaded, or
    gives other masks.
    """
    entry = _entry(name)
    try:
        module = importlib.import_module(f"edgeseg.engine.{entry.name}")
    except ImportError as error:
        raise EngineError(
            f"the engine {entry.name} is installed and cannot be loaded ({error}); "
            f"install it again with {entry.install}, or try another --engine"
        ) from error
    tuned = None if threads or entry.needs_gpu else _tuned_threads(bundle, entry)
    engine: Engine = module.open_engine(
        bundle, threads=tuned or threads, compiled_head=compiled_head
    )
    if tuned is not None and isinstance(engine, OneAtATime):
        engine.tuned_text = " (tuned)"
    if check:
        try:
            _check(engine, bundle)
        except EngineError:
            engine.close()
            raise
    return engine


def not_installed(name: str) -> str:
    """The sentence for an engine whose library is missing."""
    (install,) = (entry.install for entry in ENGINES if entry.name == name)
    return f"the engine {name} is not installed; {install} adds it"


def _entry(name: str | None) -> EngineEntry:
    if name is None:
        for entry in ENGINES:
            if not entry.is_installed():
                continue
            obstacle = entry.obstacle()
            if obstacle is None:
                return entry
            print(f"{entry.name} is passed over: {obstacle}", file=sys.stderr, flush=True)
        raise EngineError(_none_here())
    for entry in ENGINES:
        if entry.name == name:
            if not entry.is_installed():
                raise EngineError(not_installed(name))
            return entry
    raise RequestError(
        f"the engines are {', '.join(entry.name for entry in ENGINES)}, and {name!r} came"
    )


def _tuned_threads(bundle: Bundle, entry: EngineEntry) -> int | None:
    """The number of threads that was found to be best here, None if nobody looked."""
    from edgeseg.engine.tuned import find_tuned

    found = find_tuned(bundle, entry.name, library_version(entry.name))
    return None if found is None else found.threads


def library_version(name: str) -> str:
    """The version of an engine's library, which has to be installed."""
    (library,) = (entry.library for entry in ENGINES if entry.name == name)
    return str(importlib.import_module(library).__version__)


def _check(engine: Engine, bundle: Bundle) -> None:
    spec = bundle.spec
    outputs = engine.run(golden_image(bundle.golden.seed, spec.height, spec.width))
    agreement = bundle.golden.agreement_of(outputs)
    promised = bundle.golden.promised
    if agreement < promised:
        raise EngineError(
            f"{engine.description} gives other masks than those recorded at export: "
            f"{agreement:.1%} of the golden picture agrees and {promised:.0%} is promised; "
            "try another --engine, or update the library"
        )
    if not bundle.golden.is_proof:
        print(
            f"{bundle.name}: nothing was found in its golden picture at export, so that nobody "
            f"knows whether {engine.name} computes it rightly; `edgeseg eval` on pictures with "
            "objects shows it",
            file=sys.stderr,
            flush=True,
        )


def _none_here() -> str:
    """Why there is no default engine, and what gives one."""
    # The engine for the GPU is nobody's first step out of this.
    commands = " or ".join(entry.install for entry in ENGINES if not entry.needs_gpu)
    obstacles = "; ".join(f"{name}: {obstacle}" for name, obstacle in passed_over().items())
    if obstacles:
        return f"no inference engine can run here ({obstacles}); {commands} adds one"
    return f"no inference engine is installed; {commands} adds one"
