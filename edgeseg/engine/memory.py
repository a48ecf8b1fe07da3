"""Memory that building a TensorRT engine takes, compared with what is free before it starts.

A Jetson shares one memory between processor and GPU: a build that does not fit is ended by the
kernel after minutes, with a bare "Killed". So the build is refused beforehand, with numbers.

The need is an estimate. Its largest part does not depend on the model: TensorRT loads its library
of kernels to choose from, and says so in its log as "Init builder kernel library". Logs that users
published: 1.2 GiB on a Jetson Thor with 10.13 (counted once, since memory is shared); on cards 1.8
to 2.6 GiB of the computer's memory and 0.3 to 0.4 GiB of the card's with 10.0 to 10.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeseg.engine.graph import Graph
from edgeseg.errors import EngineError

__all__ = ["FreeMemory", "MemoryNeed", "checked_workspace"]

_MIB = 1 << 20
_GIB = 1 << 30

_LIBRARY_HOST = 2 * _GIB
_LIBRARY_DEVICE = _GIB // 2
_LIBRARY_SHARED = 5 * _GIB // 4

# Copies of the weights that are alive together: the file, the parser's, the builder's, the plan's.
_WEIGHT_COPIES = 4
# A tactic is timed on buffers of its own, beside those of the network.
_ACTIVATION_COPIES = 2
_LEAST_WORKSPACE = 64 * _MIB
# Convolutions on feature maps of this size gain nothing from more, and the rest of a Jetson needs
# its memory too.
_MOST_WORKSPACE = 2 * _GIB


@dataclass(frozen=True)
class FreeMemory:
    """What is free now, in bytes.

    ``shared``: processor and GPU have one memory; ``device`` is then that of ``host``. ``swap``
    helps only what the processor uses: the GPU's memory cannot be swapped out.
    """

    host: int
    swap: int
    device: int
    shared: bool

    @classmethod
    def of(cls, device_free: int, *, shared: bool, root: Path = Path("/")) -> FreeMemory:
        """The free memory of this machine; ``device_free`` is what CUDA says for the GPU.

        Without /proc/meminfo only the GPU's is known, and stands for both.
        """
        known = _meminfo(root / "proc/meminfo")
        host = known.get("MemAvailable", device_free)
        # cudaMemGetInfo leaves out what the kernel can take back from its file cache.
        return cls(host, known.get("SwapFree", 0), host if shared else device_free, shared)


@dataclass(frozen=True)
class MemoryNeed:
    """What a build takes without its workspace, in bytes: of the processor's, of the GPU's."""

    host: int
    device: int

    @classmethod
    def of(cls, graph: Graph, *, shared: bool) -> MemoryNeed:
        """The estimate for ``graph``."""
        weights = _WEIGHT_COPIES * graph.weight_bytes
        activations = _ACTIVATION_COPIES * graph.activation_bytes()
        if shared:
            return cls(_LIBRARY_SHARED + weights, activations + graph.weight_bytes)
        return cls(_LIBRARY_HOST + weights, _LIBRARY_DEVICE + activations + graph.weight_bytes)


def checked_workspace(
    need: MemoryNeed, free: FreeMemory, workspace_mb: int | None, *, check: bool = True
) -> int:
    """Bytes that TensorRT may use as scratch memory: what was asked, or what there is room for.

    EngineError when the build would not fit, with the numbers and what helps; ``check=False``
    leaves that out.
    """
    asked = None if workspace_mb is None else workspace_mb * _MIB
    least = _LEAST_WORKSPACE if asked is None else asked
    # On a Jetson swap is compressed memory out of the box, so that half of it is really there.
    host_room = free.host + free.swap // 2
    wanted_device = need.device + least
    if free.shared:
        short = max(need.host + wanted_device - host_room, wanted_device - free.host)
    else:
        short = max(need.host - host_room, wanted_device - free.device)
    if check and short > 0:
        raise EngineError(_refusal(need, free, least, short, asked))
    if asked is not None:
        return asked
    # Of the room that is left, half: measuring tactics needs more than what they ask for.
    taken = need.device + (need.host if free.shared else 0)
    room = (free.device - taken) // 2
    return max(_LEAST_WORKSPACE, min(room, _MOST_WORKSPACE))


def _refusal(
    need: MemoryNeed, free: FreeMemory, workspace: int, short: int, asked: int | None
) -> str:
    if free.shared:
        total = need.host + need.device + workspace
        swap = f" and {_size(free.swap)} of swap" if free.swap else ""
        numbers = f"about {_size(total)}, and {_size(free.host)}{swap} are free"
        ways = ["close the desktop (sudo systemctl isolate multi-user.target) and other programs"]
        if need.device + workspace <= free.host:
            ways.append(f"add {_size(max(2 * short, _GIB))} of swap")
    else:
        numbers = (
            f"about {_size(need.device + workspace)} of the GPU's memory and {_size(need.host)} of "
            f"the computer's, and {_size(free.device)} and {_size(free.host)} are free"
        )
        ways = ["close other programs that use the GPU"]
    if asked is not None and asked > _LEAST_WORKSPACE:
        ways.append(f"ask for less --workspace than {asked // _MIB}")
    ways.append("export with a smaller --size")
    ways.append(
        "build on a larger board of the same kind with the same TensorRT, and copy engines/"
    )
    return f"building takes {numbers}; {', '.join(ways)}, or try it anyway with --no-memory-check"


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{max(round(size / _MIB), 1)} MiB"


def _meminfo(path: Path) -> dict[str, int]:
    """The entries of /proc/meminfo in bytes, nothing where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        key, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            found[key] = int(number[0]) << 10
    return found
