"""What one frame needs while it is inside the TensorRT engine, and nobody else touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeseg.engine.cuda import Cuda, Graph, Stream
from edgeseg.spec import ModelSpec

__all__ = ["DeviceMemory", "Owner", "PinnedMemory", "Slot", "SlotOutput", "Tensor"]

_Thing = TypeVar("_Thing")


class Owner(Protocol):
    """Takes a thing and how it ends, ends it in time, and gives the thing."""

    def __call__(self, thing: _Thing, end: Callable[[_Thing], object]) -> _Thing: ...


@dataclass(frozen=True)
class Tensor:
    """An output of the plan; ``shape`` is None where it depends on what is in the frame."""

    name: str
    element: np.dtype[Any]
    shape: tuple[int, ...] | None


class DeviceMemory:
    """Memory on the GPU that grows on demand; 0 bytes to begin with."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size = 0
        self.address = 0

    def reserve(self, size: int) -> int:
        """The address of ``size`` bytes or more; nothing queued may use the memory so far."""
        if size > self._size:
            self.free()
            self.address = self._cuda.allocate(size)
            self._size = size
        return self.address

    def free(self) -> None:
        """Gives it back."""
        address, self.address, self._size = self.address, 0, 0
        if address:
            self._cuda.free(address)


class PinnedMemory:
    """Pinned memory on the host that grows on demand; 0 bytes to begin with."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._array: NDArray[np.uint8] | None = None

    def reserve(self, size: int) -> NDArray[np.uint8]:
        """(size,) uint8; nothing queued may use the memory so far."""
        if self._array is None or self._array.size < size:
            self.free()
            self._array = self._cuda.allocate_host(size)
        return self._array[:size]

    def free(self) -> None:
        """Gives it back."""
        array, self._array = self._array, None
        if array is not None:
            self._cuda.free_host(array)


class SlotOutput:
    """One output of one slot: where the network writes it, and where it arrives on the host."""

    def __init__(self, tensor: Tensor, cuda: Cuda) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self.memory = DeviceMemory(cuda)
        self._pinned = PinnedMemory(cuda)

    def reserve(self) -> None:
        """Takes the memory of an output whose size is known beforehand."""
        if self.shape is not None and self._bytes():
            self.memory.reserve(self._bytes())
            self._pinned.reserve(self._bytes())

    def _bytes(self) -> int:
        assert self.shape is not None
        return prod(self.shape) * self.tensor.element.itemsize

    def queue_download(self, cuda: Cuda, stream: Stream) -> None:
        """Device to host."""
        if self._bytes():
            cuda.copy_to_host(self._pinned.reserve(self._bytes()), self.memory.address, stream)

    def taken(self) -> NDArray[Any]:
        """What has arrived, as an array of the caller's own."""
        assert self.shape is not None
        arrived = self._pinned.reserve(self._bytes()) if self._bytes() else np.empty(0, np.uint8)
        taken: NDArray[Any] = arrived.view(self.tensor.element).reshape(self.shape).copy()
        return taken

    def free(self) -> None:
        """Gives the memory back."""
        try:
            self.memory.free()
        finally:
            self._pinned.free()


class Slot:
    """What one frame in flight needs: a stream, memory and events that nobody else touches."""

    def __init__(
        self,
        cuda: Cuda,
        spec: ModelSpec,
        outputs: Sequence[Tensor],
        owned: Owner,
    ) -> None:
        self.stream = owned(cuda.create_stream(), cuda.destroy_stream)
        # In the order in which they happen.
        self.arrived = owned(cuda.create_event(), cuda.destroy_event)
        self.started, self.fitted, self.begun, self.computed, self.done = (
            owned(cuda.create_event(timing=True), cuda.destroy_event) for _ in range(5)
        )
        self.frame = owned(DeviceMemory(cuda), DeviceMemory.free)
        self._pinned = owned(PinnedMemory(cuda), PinnedMemory.free)
        self.image = owned(cuda.allocate(spec.height * spec.width * 3), cuda.free)
        self.outputs = tuple(owned(SlotOutput(tensor, cuda), SlotOutput.free) for tensor in outputs)
        for output in self.outputs:
            output.reserve()
        self.graph: Graph | None = None
        self.owner: object = None
        self.copied_ns = 0

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """(size,) uint8 of pinned memory for a frame on its way to the GPU."""
        return self._pinned.reserve(size)
