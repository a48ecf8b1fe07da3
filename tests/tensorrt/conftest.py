"""What the tests of the double share."""

from tests.tensorrt.fixtures import tensorrt, tensorrt_release

__all__ = ["tensorrt", "tensorrt_release"]
