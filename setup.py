"""The compiled part of EdgeSeg; everything else is in pyproject.toml.

The extension is optional: without a C++ compiler the install succeeds, engines use standard ONNX
operators, and ``edgeseg.kernels.build()`` makes up for it later.
"""

from __future__ import annotations

from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Kept equal to kernels/build.py by a test. No -march: one binary must run on every machine of its
# architecture, and cpu.cpp picks the instruction set when it runs.
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
OPENMP_FLAGS = ["-fopenmp"]


class BuildCpuLibrary(build_ext):
    """build_ext that does without OpenMP where the compiler has none."""

    def build_extension(self, ext: Any) -> None:
        compile_args, link_args = ext.extra_compile_args, ext.extra_link_args
        try:
            ext.extra_compile_args = compile_args + OPENMP_FLAGS
            ext.extra_link_args = link_args + OPENMP_FLAGS
            super().build_extension(ext)
        except Exception:
            ext.extra_compile_args, ext.extra_link_args = compile_args, link_args
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "edgeseg.kernels._cpu",
            sources=["kernels/cpu.cpp"],
            include_dirs=["kernels/include"],
            depends=["kernels/include/edgeseg/upsample_argmax.h"],
            extra_compile_args=COMPILE_FLAGS,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildCpuLibrary},
)
