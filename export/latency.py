"""How long a network takes on an engine for the CPU, told beside another network.

Machines drift: they warm up, and others use them. So a candidate is never timed by itself. It
takes turns with the reference, and its time is the reference's first one times the ratio of the
two, which drift leaves alone.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from edgeseg.bundle import Bundle
from edgeseg.classes import class_list
from edgeseg.engine import Engine, cpu_engines, not_installed, open_engine
from edgeseg.errors import EngineError, RequestError
from edgeseg.export.models import InstanceNetwork, SemanticNetwork, definition_of
from edgeseg.export.models.network import Network
from edgeseg.export.onnx import export_network
from edgeseg.frame import Pixels
from edgeseg.spec import ModelSpec
from edgeseg.synthetic import Street

__all__ = ["EngineStopwatch", "bare_spec", "check_engine"]

# Rounds of one run each: the first warm up, the median of the others tells.
_WARMING = 3
_ROUNDS = 25
# A slow model is asked less often.
_SECONDS = 20.0
_LEAST_ROUNDS = 5
_SEED = 3


class EngineStopwatch:
    """Milliseconds that networks of one architecture take on an engine, for one picture.

    What is timed is the exported graph on the engine, from a picture at network size to its masks,
    as `edgeseg profile` runs it, without a camera. ``reference``: what others are compared with;
    it is exported when this is made, and may change afterwards. ``size``: (height, width).

    RequestError for an engine that does not exist, or that would need a GPU; EngineError for one
    that is not installed. Close it, or use it in a ``with``.
    """

    def __init__(
        self, reference: Network, size: tuple[int, int], *, engine: str, threads: int = 0
    ) -> None:
        check_engine(engine)
        self._name = engine
        self._threads = threads
        self._size = size
        self._pixels = Street(*size, seed=_SEED).frame(0).pixels
        self._reference = self._opened(reference)
        times = _times([self._reference], self._pixels)
        #: milliseconds of the reference, alone, in the beginning
        self.reference_ms = statistics.median(times[0])

    @property
    def description(self) -> str:
        """One line for a person: library, version, threads."""
        return self._reference.description

    def __call__(self, network: Network) -> float:
        """Milliseconds of ``network``: ``reference_ms`` times what it takes to the reference."""
        with closing(self._opened(network)) as engine:
            reference, own = _times([self._reference, engine], self._pixels)
        ratios = [mine / other for mine, other in zip(own, reference, strict=True)]
        return self.reference_ms * statistics.median(ratios)

    def close(self) -> None:
        """Gives the reference's memory back."""
        self._reference.close()

    def __enter__(self) -> EngineStopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self, network: Network) -> Engine:
        assert isinstance(network, SemanticNetwork | InstanceNetwork)
        spec = bare_spec(network, self._size)
        with tempfile.TemporaryDirectory(prefix="edgeseg-") as folder:
            path = Path(folder) / "model.onnx"
            export_network(network, spec).write(path)
            return open_engine(Bundle.open(path), self._name, threads=self._threads, check=False)


def check_engine(name: str) -> None:
    """RequestError for an engine that is none for the CPU, EngineError for one that is not here."""
    known = ("openvino", "onnxruntime")
    if name not in known:
        raise RequestError(f"milliseconds are measured on {' or '.join(known)}, and {name!r} came")
    if name not in cpu_engines():
        raise EngineError(not_installed(name))


def bare_spec(network: SemanticNetwork | InstanceNetwork, size: tuple[int, int]) -> ModelSpec:
    """A contract for ``network``; the names in it do not matter to a clock."""
    entry = definition_of(network)
    classes = class_list(network.named_classes)
    masks = (0, 0)
    if isinstance(network, InstanceNetwork):
        masks = network.mask_size(*size)
    return ModelSpec(
        name=entry.name,
        architecture=entry.name,
        task=entry.task,
        height=size[0],
        width=size[1],
        classes=classes.names,
        colours=classes.colours,
        ignore=classes.ignore,
        preprocessing=entry.preprocessing,
        capacity=100 if entry.task == "instance" else 0,
        mask_height=masks[0],
        mask_width=masks[1],
        mask_extent=network.mask_extent if isinstance(network, InstanceNetwork) else "image",
    )


def _times(engines: Sequence[Engine], pixels: Pixels) -> list[list[float]]:
    """Milliseconds of each engine, round by round; every other round begins with the last."""
    found: list[list[float]] = [[] for _ in engines]
    for _ in range(_WARMING):
        for engine in engines:
            engine.run(pixels)
    began = time.monotonic()
    for turn in range(_ROUNDS):
        order = list(zip(engines, found, strict=True))
        for engine, times in order if turn % 2 else reversed(order):
            start = time.perf_counter_ns()
            engine.run(pixels)
            times.append((time.perf_counter_ns() - start) / 1e6)
        if turn + 1 >= _LEAST_ROUNDS and time.monotonic() - began > _SECONDS:
            break
    return found
