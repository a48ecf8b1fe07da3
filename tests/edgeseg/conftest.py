"""TensorRT's doubles, and a GPU made of host memory."""

from __future__ import annotations

import pytest

from tests.edgeseg.host_cuda import HostCuda
from tests.tensorrt.fixtures import tensorrt, tensorrt_release

__all__ = ["host_cuda", "tensorrt", "tensorrt_release"]


@pytest.fixture
def host_cuda() -> HostCuda:
    """CUDA on the CPU; ``assert_all_freed()`` is the test's own to call."""
    return HostCuda()
