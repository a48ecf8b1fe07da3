"""Fixtures that put a double of TensorRT in the place of the module, once per release.

A conftest.py that imports them by name has them.
"""

from __future__ import annotations

import sys

import pytest

from tests.tensorrt.double import Double
from tests.tensorrt.stubs import RELEASES, Release, reason_missing

__all__ = ["tensorrt", "tensorrt_release"]


@pytest.fixture(params=RELEASES, ids=lambda release: str(release.name))
def tensorrt_release(request: pytest.FixtureRequest) -> Release:
    """Each of the four releases in turn; skips, with the reason, where it has no stub file."""
    release: Release = request.param
    reason = reason_missing(release)
    if reason is not None:
        pytest.skip(reason)
    return release


@pytest.fixture
def tensorrt(tensorrt_release: Release, monkeypatch: pytest.MonkeyPatch) -> Double:
    """A fresh double, which ``import tensorrt`` gives during the test."""
    double = Double(tensorrt_release)
    monkeypatch.setitem(sys.modules, "tensorrt", double.module)
    return double
