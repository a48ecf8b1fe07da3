"""The compiled part of EdgeSeg; everything else is in pyproject.toml.

The extension is optional: without a C++ compiler the install succeeds, engines use standard ONNX
operators, and ``edgeseg.kernels.build()`` makes up for it later. It is a plain C library, loaded
with ctypes; only its file name is a Python extension's.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup

# Kept equal to kernels/build.py by a test. No -march: one binary must run on every machine of its
# architecture, and the library picks the instruction set when it runs.
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
]

setup(
    ext_modules=[
        Extension(
            "edgeseg.kernels._cpu",
            sources=sorted(map(str, Path("kernels/cpu").glob("*.cpp"))),
            include_dirs=["kernels/include"],
            depends=[
                *map(str, Path("kernels/cpu").glob("*.h")),
                *map(str, Path("kernels/include/edgeseg").glob("*.h")),
            ],
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
)
