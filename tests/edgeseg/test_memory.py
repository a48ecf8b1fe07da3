"""The memory check before a build, with machines made of numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeseg.bundle import Bundle
from edgeseg.engine.graph import Graph
from edgeseg.engine.memory import FreeMemory, MemoryNeed, checked_workspace
from edgeseg.errors import EngineError

MIB = 1 << 20
GIB = 1 << 30
NEED = MemoryNeed(host=2 * GIB, device=1 * GIB)


def jetson(free: int, swap: int = 0) -> FreeMemory:
    return FreeMemory(free, swap, free, shared=True)


def card(host: int, device: int, swap: int = 0) -> FreeMemory:
    return FreeMemory(host, swap, device, shared=False)


def meminfo(root: Path, text: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(text)
    return root


def test_free_memory_of_a_machine(tmp_path: Path) -> None:
    text = "MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable:  3000000 kB\nSwapFree: 1000000 kB\n"
    root = meminfo(tmp_path, text)
    # Shared: what the kernel can take back counts, which CUDA does not know.
    shared = FreeMemory.of(5, shared=True, root=root)
    assert shared == FreeMemory(3000000 << 10, 1000000 << 10, 3000000 << 10, shared=True)
    assert FreeMemory.of(5, shared=False, root=root).device == 5


@pytest.mark.parametrize("text", [None, "", "nonsense\nMemAvailable: much\n"])
def test_machine_without_meminfo(tmp_path: Path, text: str | None) -> None:
    root = tmp_path if text is None else meminfo(tmp_path, text)
    assert FreeMemory.of(7, shared=True, root=root) == FreeMemory(7, 0, 7, shared=True)


def test_here() -> None:
    assert FreeMemory.of(1, shared=False).host > 100 * MIB


@pytest.mark.parametrize("shared", [True, False])
def test_need_grows_with_the_graph(shared: bool) -> None:
    graph = Graph.read(Bundle.open("streets").model.inlined())
    need = MemoryNeed.of(graph, shared=shared)
    assert need.host > GIB + 4 * graph.weight_bytes
    assert need.device >= 2 * graph.activation_bytes() + graph.weight_bytes
    # A network that a Jetson with 4 GB runs every day must not be refused there.
    if shared:
        assert checked_workspace(need, jetson(2 * GIB), None) >= 64 * MIB


@pytest.mark.parametrize(
    ("free", "fits"),
    [
        (jetson(3 * GIB + 64 * MIB), True),
        (jetson(3 * GIB + 63 * MIB), False),
        (jetson(2 * GIB, swap=3 * GIB), True),
        (jetson(2 * GIB, swap=2 * GIB), False),
        # The GPU's part cannot be swapped out.
        (jetson(1 * GIB, swap=90 * GIB), False),
        (card(2 * GIB, GIB + 64 * MIB), True),
        (card(2 * GIB - 1, GIB + 64 * MIB), False),
        (card(GIB, GIB + 64 * MIB, swap=2 * GIB), True),
        (card(90 * GIB, GIB + 63 * MIB, swap=90 * GIB), False),
    ],
)
def test_border(free: FreeMemory, fits: bool) -> None:
    if fits:
        assert checked_workspace(NEED, free, None) >= 64 * MIB
    else:
        with pytest.raises(EngineError):
            checked_workspace(NEED, free, None)
    assert checked_workspace(NEED, free, None, check=False) >= 64 * MIB


def test_what_was_asked_is_given_if_it_fits() -> None:
    free = jetson(4 * GIB)
    assert checked_workspace(NEED, free, 1) == MIB
    assert checked_workspace(NEED, free, 1024) == GIB
    with pytest.raises(EngineError, match="ask for less --workspace than 1025"):
        checked_workspace(NEED, free, 1025)
    assert checked_workspace(NEED, free, 1025, check=False) == 1025 * MIB


def test_workspace_from_what_is_free() -> None:
    assert checked_workspace(NEED, jetson(4 * GIB), None) == GIB // 2
    assert checked_workspace(NEED, card(2 * GIB, 4 * GIB), None) == 3 * GIB // 2
    assert checked_workspace(NEED, jetson(64 * GIB), None) == 2 * GIB


def test_refusals_say_numbers_and_ways_out() -> None:
    with pytest.raises(EngineError) as caught:
        checked_workspace(NEED, jetson(2 * GIB, swap=GIB // 2), None)
    said = str(caught.value)
    assert "about 3.1 GiB, and 2.0 GiB and 512 MiB of swap are free" in said
    for way in (
        "desktop",
        "add 1.6 GiB of swap",
        "--size",
        "larger board of the same kind",
        "--no-memory-check",
    ):
        assert way in said
    assert "--workspace" not in said
    with pytest.raises(EngineError) as caught:
        checked_workspace(NEED, jetson(GIB), None)
    # What the GPU lacks no swap gives.
    assert "of swap" not in str(caught.value)
    with pytest.raises(EngineError) as caught:
        checked_workspace(NEED, card(8 * GIB, GIB // 2), None)
    said = str(caught.value)
    assert "1.1 GiB of the GPU's memory and 2.0 GiB of the computer's" in said
    assert "512 MiB and 8.0 GiB are free" in said and "desktop" not in said
