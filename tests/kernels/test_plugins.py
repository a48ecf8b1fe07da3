"""The TensorRT plugins without TensorRT: compiled against its headers, every method called.

The headers are in no package, so EDGESEG_TENSORRT_HEADERS has to name folders of NvInferRuntime.h,
of one release or several (separated as in PATH). ``enqueue`` runs the CUDA kernels' own lines on an
emulation of CUDA, and on a GPU where one is. plugin_harness.cpp stands in for TensorRT; the real
registry is tried where EDGESEG_TENSORRT_LEAN names the folder that tensorrt-lean is installed in.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.kernels.build import PLUGIN_ABI_VERSION, build_plugins, tensorrt_version
from edgeseg.kernels.masks import assemble_masks

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
SOURCES = sorted((KERNELS / "plugins").glob("*.cpp"))
HEADERS = [
    Path(name) for name in os.environ.get("EDGESEG_TENSORRT_HEADERS", "").split(os.pathsep) if name
]

# Major release -> its headers, the oldest first. Majors are not binary compatible: the logger's
# interface changed with 11.0.
RELEASES: dict[int, list[Path]] = {}
for _version, _folder in sorted(
    (tensorrt_version(folder) or (0, 0, 0), folder) for folder in HEADERS
):
    RELEASES.setdefault(_version[0], []).append(_folder)

pytestmark = pytest.mark.skipif(
    not HEADERS, reason="EDGESEG_TENSORRT_HEADERS names no folder of TensorRT's headers"
)

# nvinfer1::DataType, nvinfer1::TensorFormat, nvinfer1::PluginFieldType
TYPES = ["float", "half", "int8", "int32", "bool", "uint8", "fp8", "bf16", "int64", "int4", "fp4"]
FORMATS = [
    "linear", "chw2", "hwc8", "chw4", "chw16", "chw32", "dhwc8", "cdhw32", "hwc", "dla_linear",
    "dla_hwc4", "hwc16", "dhwc",
]  # fmt: skip
FIELD_TYPES = {
    "float16": 0, "float32": 1, "float64": 2, "int8": 3, "int16": 4, "int32": 5, "int64": 10,
}  # fmt: skip
BUILD, RUNTIME = 0, 1

Shape = tuple[int, ...]
Fields = Mapping[str, Any]


# --- compiling


def cuda_includes() -> list[Path]:
    """The CUDA toolkit's include folders, as nvcc names them."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the path: TensorRT's headers include the CUDA toolkit's")
    told = subprocess.run(
        ["nvcc", "--dryrun", "-c", "-x", "c++", os.devnull], capture_output=True, text=True,
        check=True,
    ).stderr  # fmt: skip
    line = next(line for line in told.splitlines() if line.startswith("#$ INCLUDES="))
    return [Path(folder) for folder in re.findall(r'-I([^" ]+)', line)]


def compile_command(headers: Path) -> list[str]:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the path: the plugins cannot be compiled")
    if not (headers / "NvInferRuntime.h").is_file():
        pytest.fail(f"EDGESEG_TENSORRT_HEADERS names {headers}, which has no NvInferRuntime.h")
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    command += ["-Werror", f"-I{KERNELS / 'include'}", "-isystem", str(headers)]
    for folder in cuda_includes():
        command += ["-isystem", str(folder)]
    return command


def compile_objects(headers: Path, folder: Path) -> list[str]:
    """The plugins' sources, compiled against one release's headers without a warning."""
    command = compile_command(headers)

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        subprocess.run([*command, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, SOURCES))


def compile_library(headers: Path, launchers: str, folder: Path) -> Path:
    """The plugin library with kernels from another one; links with nothing left undefined."""
    objects = compile_objects(headers, folder)
    target = folder / "libedgeseg_plugins.so"
    subprocess.run(
        ["g++", "-shared", *objects, launchers, f"-Wl,-rpath,{Path(launchers).parent}",
         "-Wl,-z,defs", f"-Wl,--version-script={KERNELS / 'plugins' / 'exports.map'}",
         "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target


# --- what the harness and the tests pass to each other


class Field(ctypes.Structure):
    """nvinfer1::PluginField"""

    _fields_: ClassVar[Any] = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class CTensor(ctypes.Structure):
    """The harness's Tensor."""

    _fields_: ClassVar[Any] = [
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("extents", ctypes.c_int64 * 8),
        ("least", ctypes.c_int64 * 8),
        ("most", ctypes.c_int64 * 8),
    ]


@dataclass(frozen=True)
class Tensor:
    """A tensor's description; -1 in ``shape`` is known only when the network runs."""

    shape: Shape
    type: str = "float"
    format: str = "linear"
    least: Shape | None = None
    most: Shape | None = None

    def to_c(self) -> CTensor:
        def padded(shape: Shape | None) -> Any:
            return (ctypes.c_int64 * 8)(*(self.shape if shape is None else shape))

        return CTensor(
            len(self.shape),
            TYPES.index(self.type),
            FORMATS.index(self.format),
            padded(self.shape),
            padded(self.least),
            padded(self.most),
        )


def c_tensors(tensors: Sequence[Tensor]) -> Any:
    return (CTensor * len(tensors))(*(tensor.to_c() for tensor in tensors))


def c_fields(fields: Fields) -> tuple[Any, list[NDArray[Any]]]:
    """Fields for createPlugin and the arrays that they point to.

    An int becomes INT32, a float or list of floats FLOAT32; an array keeps its type.
    """
    arrays = []
    for value in fields.values():
        if isinstance(value, np.ndarray):
            arrays.append(value)
        else:
            arrays.append(np.array(value, np.int32 if isinstance(value, int) else np.float32))
    made = (Field * len(arrays))(
        *(
            Field(name.encode(), array.ctypes.data, FIELD_TYPES[str(array.dtype)], array.size)
            for name, array in zip(fields, arrays, strict=True)
        )
    )
    return made, arrays


@dataclass(frozen=True)
class Plugin:
    """A live IPluginV3; the harness's functions by shorter names."""

    harness: Harness
    handle: int

    def _call(self, name: str, *arguments: Any) -> int:
        function = getattr(self.harness.functions, f"harness_{name}")
        function.restype = ctypes.c_int32
        return int(function(ctypes.c_void_p(self.handle), *arguments))

    def _text(self, name: str) -> str:
        function = getattr(self.harness.functions, f"harness_{name}")
        function.restype = ctypes.c_char_p
        text = function(ctypes.c_void_p(self.handle))
        assert isinstance(text, bytes)
        return text.decode()

    def _plugin(self, name: str, *arguments: Any) -> Plugin:
        made = self.harness.plugin(name, *arguments, ctypes.c_void_p(self.handle))
        assert made is not None
        assert made.handle != self.handle
        return made

    def describe(self) -> str:
        return self._text("describe")

    def fields(self) -> str:
        return self._text("fields")

    def clone(self) -> Plugin:
        return self._plugin("clone")

    def attach(self) -> Plugin:
        return self._plugin("attach")

    def through_plan(self) -> Plugin:
        return self._plugin("through_plan", ctypes.c_void_p(self.harness.library))

    def delete(self) -> None:
        self.harness.delete(self)

    def output_types(self, inputs: Sequence[str], outputs: int) -> list[str] | None:
        """Types of the outputs; None where the plugin refuses."""
        given = (ctypes.c_int32 * len(inputs))(*map(TYPES.index, inputs))
        results = (ctypes.c_int32 * outputs)()
        if self._call("output_types", given, len(inputs), results, outputs) != 0:
            return None
        return [TYPES[result] for result in results]

    def output_shapes(self, inputs: Sequence[Tensor], outputs: int) -> list[list[Any]] | None:
        """Shapes of the outputs, (input, axis) for an extent that is not known yet."""
        results = (CTensor * outputs)()
        status = self._call("output_shapes", c_tensors(inputs), len(inputs), results, outputs)
        if status != 0:
            return None
        return [
            [n if n >= 0 else divmod(-1 - n, 8) for n in result.extents[: result.rank]]
            for result in results
        ]

    def supports(self, position: int, tensors: Sequence[Tensor], inputs: int) -> bool:
        return bool(
            self._call("supports", position, c_tensors(tensors), inputs, len(tensors) - inputs)
        )

    def configure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return self._call(
            "configure", c_tensors(inputs), len(inputs), c_tensors(outputs), len(outputs)
        )

    def shape_change(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return self._call(
            "shape_change", c_tensors(inputs), len(inputs), c_tensors(outputs), len(outputs)
        )

    def enqueue(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        input_memory: Sequence[int | None],
        output_memory: Sequence[int | None],
        stream: int | None = None,
    ) -> int:
        return self._call(
            "enqueue", c_tensors(inputs), len(inputs), c_tensors(outputs), len(outputs),
            (ctypes.c_void_p * len(inputs))(*input_memory),
            (ctypes.c_void_p * len(outputs))(*output_memory), ctypes.c_void_p(stream),
        )  # fmt: skip


@dataclass
class Harness:
    """TensorRT's part, played by plugin_harness.cpp, with one plugin library open."""

    functions: ctypes.CDLL
    path: Path
    library: int = 0
    alive: set[int] = field(default_factory=set)

    def open(self, *, with_logger: bool) -> None:
        function = self.functions.harness_open
        function.restype = ctypes.c_void_p
        error = ctypes.c_char_p()
        library = function(str(self.path).encode(), int(with_logger), ctypes.byref(error))
        assert library is not None, error.value
        self.library = library

    def plugin(self, name: str, *arguments: Any) -> Plugin | None:
        function = getattr(self.functions, f"harness_{name}")
        function.restype = ctypes.c_void_p
        handle = function(*arguments)
        if handle is None:
            return None
        self.alive.add(handle)
        return Plugin(self, handle)

    def delete(self, plugin: Plugin) -> None:
        self.alive.remove(plugin.handle)
        self.functions.harness_delete(ctypes.c_void_p(plugin.handle))

    def creators(self) -> list[str]:
        count = self.functions.harness_creators(ctypes.c_void_p(self.library))
        function = self.functions.harness_creator
        function.restype = ctypes.c_char_p
        return [function(ctypes.c_void_p(self.library), index).decode() for index in range(count)]

    def create(
        self, operator: str, fields: Fields | None, *, layer: str = "head", phase: int = BUILD
    ) -> Plugin | None:
        index = [text.split()[0] for text in self.creators()].index(operator)
        made, kept = (None, []) if fields is None else c_fields(fields)
        plugin = self.plugin(
            "create", ctypes.c_void_p(self.library), index, layer.encode(), made, len(kept), phase
        )
        # The plugin must not need what it was made from.
        for array in kept:
            ctypes.memset(array.ctypes.data, 0xFF, array.nbytes)
        return plugin

    def make(self, operator: str, fields: Fields, *, phase: int = BUILD) -> Plugin:
        plugin = self.create(operator, {name: copied(value) for name, value in fields.items()})
        assert plugin is not None, self.logged()
        return plugin

    def logged(self) -> list[str]:
        """Lines logged since the last call: severity, then the message."""
        function = self.functions.harness_logged
        function.restype = ctypes.c_char_p
        lines: list[str] = function(ctypes.c_void_p(self.library)).decode().splitlines()
        return lines

    def refusal(self) -> str:
        """The one sentence that has been logged, as an error."""
        (line,) = self.logged()
        severity, _, message = line.partition(" ")
        assert severity == "1"  # kERROR
        assert message.endswith(".")
        return message


def copied(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def compile_harness(headers: Path, folder: Path) -> ctypes.CDLL:
    target = folder / "libharness.so"
    command = [*compile_command(headers), "-shared", str(HERE / "plugin_harness.cpp"), "-ldl"]
    subprocess.run([*command, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


class Harnesses:
    """Each harness that tests ask for, made once."""

    def __init__(self, request: pytest.FixtureRequest, folders: pytest.TempPathFactory) -> None:
        self._request = request
        self._folders = folders
        self._made: dict[tuple[int, bool], Harness] = {}

    def get(self, release: int, *, on_gpu: bool) -> Harness:
        key = release, on_gpu
        if key not in self._made:
            # A library against the oldest headers, called by a TensorRT that may be newer.
            oldest, newest = RELEASES[release][0], RELEASES[release][-1]
            folder = self._folders.mktemp("plugins")
            if on_gpu:
                torch = pytest.importorskip("torch", reason="torch holds the device memory")
                if not torch.cuda.is_available():
                    pytest.skip("no CUDA device: the plugins cannot run")
                library = build_plugins(folder, oldest)
            else:
                launchers = self._request.getfixturevalue("emulated_cuda")._name
                library = compile_library(oldest, launchers, folder)
            self._made[key] = Harness(compile_harness(newest, folder), library)
        return self._made[key]


@pytest.fixture(scope="session")
def harnesses(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Harnesses:
    return Harnesses(request, tmp_path_factory)


@pytest.fixture(params=sorted(RELEASES))
def release(request: pytest.FixtureRequest) -> int:
    """A major release of TensorRT whose headers are here."""
    return int(request.param)


@pytest.fixture
def emulated_harness(harnesses: Harnesses, release: int) -> Harness:
    return harnesses.get(release, on_gpu=False)


def open_harness(harness: Harness) -> Iterator[Harness]:
    harness.open(with_logger=True)
    yield harness
    for handle in sorted(harness.alive):
        harness.delete(Plugin(harness, handle))
    assert harness.logged() == []  # each test takes the errors that it provokes


@pytest.fixture
def harness(emulated_harness: Harness) -> Iterator[Harness]:
    yield from open_harness(emulated_harness)


# --- the three operators

UPSAMPLE, MASKS, ROIS = "EdgeSegUpsampleArgmax", "EdgeSegMaskAssembly", "EdgeSegPyramidRoiAlign"

GOOD_FIELDS: dict[str, Fields] = {
    UPSAMPLE: {"height": 24, "width": 40, "align_corners": 0, "confidence": 1},
    MASKS: {"network_height": 96, "network_width": 128},
    ROIS: {
        "output_height": 7,
        "output_width": 5,
        "sampling_ratio": 2,
        "aligned": 1,
        "scales": [0.25, 0.125, 0.1],
        "canonical_size": 56.0,
        "canonical_level": 3,
        "first_level": 2,
    },
}
OPERATORS = list(GOOD_FIELDS)

# Inputs and outputs for GOOD_FIELDS.
GOOD_TENSORS: dict[str, tuple[list[Tensor], list[Tensor]]] = {
    UPSAMPLE: (
        [Tensor((2, 19, 6, 10))],
        [Tensor((2, 24, 40), "half"), Tensor((2, 24, 40), "half")],
    ),
    MASKS: (
        [
            Tensor((2, 8, 12, 16)),
            Tensor((2, 5, 8)),
            Tensor((2, 5, 4)),
            Tensor((2,), "int32"),
        ],
        [Tensor((2, 5, 12, 16), "half")],
    ),
    ROIS: (
        [
            Tensor((9, 4)),
            Tensor((9,), "int32"),
            Tensor((2, 6, 16, 20)),
            Tensor((2, 6, 8, 10)),
            Tensor((2, 6, 4, 5)),
        ],
        [Tensor((9, 6, 7, 5))],
    ),
}


def with_input(
    operator: str, index: int, tensor: Tensor | Callable[[Tensor], Tensor]
) -> list[Tensor]:
    inputs = list(GOOD_TENSORS[operator][0])
    inputs[index] = tensor(inputs[index]) if callable(tensor) else tensor
    return inputs


def test_creators_list_the_operators_and_their_fields(harness: Harness) -> None:
    listed = {text.split()[0]: text for text in harness.creators()}
    assert sorted(listed) == sorted(OPERATORS)
    int32, float32 = FIELD_TYPES["int32"], FIELD_TYPES["float32"]
    for operator, fields in GOOD_FIELDS.items():
        expected = [f"{operator} 1 edgeseg"]
        for name, value in fields.items():
            longest = 8 if isinstance(value, list) else 1
            expected.append(f"{name}:{int32 if isinstance(value, int) else float32}:{longest}")
        assert listed[operator].splitlines() == expected


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_plugin_says_what_it_is(harness: Harness, operator: str) -> None:
    lines = harness.make(operator, GOOD_FIELDS[operator]).describe().splitlines()
    outputs = len(GOOD_TENSORS[operator][1])
    # Workspace, tactics: none. TensorRT's own limit of format combinations.
    assert lines[:5] == [f"{operator} 1 edgeseg", str(outputs), "0", "0", "100"]
    assert lines[5] == lines[6]
    assert lines[7:] == [
        "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME", "PLUGIN",
    ]  # fmt: skip


def changed(value: Any) -> Any:
    if isinstance(value, list):
        return [*value[:-1], value[-1] * 0.99]
    return 1 - value if value in (0, 1) else value + type(value)(1)


@pytest.mark.parametrize(
    ("operator", "name"), [(op, name) for op, fields in GOOD_FIELDS.items() for name in fields]
)
def test_timing_cache_tells_attributes_apart(harness: Harness, operator: str, name: str) -> None:
    fields = dict(GOOD_FIELDS[operator])
    same = [harness.make(operator, fields).describe().splitlines()[5] for _ in range(2)]
    fields[name] = changed(fields[name])
    other = harness.make(operator, fields).describe().splitlines()[5]
    assert same[0] == same[1]
    assert other != same[0]
    assert name in other


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("way", ["clone", "attach", "through_plan"])
def test_copies_are_equal_and_live_alone(harness: Harness, operator: str, way: str) -> None:
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    described, fields = plugin.describe(), plugin.fields()
    copy: Plugin = getattr(plugin, way)()
    plugin.delete()
    assert copy.describe() == described
    assert copy.fields() == fields
    assert copy.clone().fields() == fields


@pytest.mark.parametrize("operator", OPERATORS)
def test_serialised_fields_are_the_attributes(harness: Harness, operator: str) -> None:
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    for line, (name, value) in zip(
        plugin.fields().splitlines(), GOOD_FIELDS[operator].items(), strict=True
    ):
        told, kind, values = line.split(":")
        assert told == name
        assert int(kind) == FIELD_TYPES["int32" if isinstance(value, int) else "float32"]
        assert [float(text) for text in values.split(",")] == pytest.approx(
            np.atleast_1d(value).tolist(), abs=1e-6
        )


@pytest.mark.parametrize("operator", OPERATORS)
def test_wide_numbers_and_foreign_fields_are_taken(harness: Harness, operator: str) -> None:
    wide = {
        name: np.array(value, np.int64 if isinstance(value, int) else np.float64)
        for name, value in GOOD_FIELDS[operator].items()
    }
    plugin = harness.make(operator, {"of_another_release": 7, **wide})
    assert plugin.fields() == harness.make(operator, GOOD_FIELDS[operator]).fields()


def test_defaults(harness: Harness) -> None:
    plain = dict(GOOD_FIELDS[UPSAMPLE])
    del plain["confidence"]
    assert harness.make(UPSAMPLE, plain).describe().splitlines()[1] == "1"
    few = {name: GOOD_FIELDS[ROIS][name] for name in list(GOOD_FIELDS[ROIS])[:5]}
    text = harness.make(ROIS, few).describe()
    assert "canonical_size=224;canonical_level=4;first_level=2" in text


BAD_FIELDS = [
    (UPSAMPLE, {"height": None}, "height is missing; expected one INT32 or INT64 from 1 to"),
    (UPSAMPLE, {"height": 0}, "height is 0; expected"),
    (UPSAMPLE, {"width": (1 << 22) + 1}, "width is 4194305; expected .* 4194304"),
    (UPSAMPLE, {"width": np.array([8, 8], np.int32)}, "width came with 2 values"),
    (UPSAMPLE, {"width": np.array([], np.int32)}, "width came with 0 values"),
    (UPSAMPLE, {"width": 8.0}, "width came as FLOAT32"),
    (UPSAMPLE, {"width": np.array(8, np.int16)}, "width came as INT16"),
    (UPSAMPLE, {"height": np.array(1 << 33, np.int64)}, "height is 8589934592"),
    (UPSAMPLE, {"height": np.array(-(1 << 60), np.int64)}, "height is -1152921504606846976"),
    (UPSAMPLE, {"align_corners": 2}, "align_corners is 2; expected .* from 0 to 1"),
    (UPSAMPLE, {"confidence": -1}, "confidence is -1"),
    (MASKS, {"network_height": None}, "network_height is missing"),
    (MASKS, {"network_width": -128}, "network_width is -128"),
    (ROIS, {"scales": None}, "scales is missing; expected 1 to 8 FLOAT32 or FLOAT64, each from"),
    (ROIS, {"scales": [0.1] * 9}, "scales came with 9 values"),
    (ROIS, {"scales": [0.25, 0.0]}, "scales is 0"),
    (ROIS, {"scales": [0.25, float("nan")]}, "scales is nan"),
    (ROIS, {"scales": [0.25, float("inf")]}, "scales is inf"),
    (ROIS, {"scales": np.array([1, 2], np.int32)}, "scales came as INT32"),
    (ROIS, {"canonical_size": -1.0}, "canonical_size is -1"),
    (ROIS, {"output_height": 1025}, "output_height is 1025; expected .* 1024"),
    (ROIS, {"sampling_ratio": -1}, "sampling_ratio is -1"),
    (ROIS, {"aligned": 5}, "aligned is 5"),
]


@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
@pytest.mark.parametrize(("operator", "bad", "message"), BAD_FIELDS)
def test_bad_fields_are_refused(
    harness: Harness, operator: str, bad: Fields, message: str, phase: int
) -> None:
    fields = {**GOOD_FIELDS[operator], **bad}
    fields = {name: copied(value) for name, value in fields.items() if value is not None}
    assert harness.create(operator, fields, layer="the head", phase=phase) is None
    refusal = harness.refusal()
    assert refusal.startswith(f"{operator} the head: attribute ")
    assert re.search(message, refusal), refusal


@pytest.mark.parametrize("fields", [None, {}])
def test_no_fields_at_all(harness: Harness, fields: Fields | None) -> None:
    for operator in OPERATORS:
        assert harness.create(operator, fields) is None
        assert "is missing" in harness.refusal()


def test_without_a_logger_errors_go_to_standard_error(
    emulated_harness: Harness, capfd: pytest.CaptureFixture[str]
) -> None:
    emulated_harness.open(with_logger=False)
    assert emulated_harness.create(MASKS, {"network_height": 0}, layer="masks") is None
    assert capfd.readouterr().err.startswith(f"{MASKS} masks: attribute network_height is 0;")


# --- types, shapes, formats


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_output_types(harness: Harness, operator: str, half: bool) -> None:
    inputs, outputs = GOOD_TENSORS[operator]
    types = [tensor.type for tensor in inputs]
    expected = [tensor.type for tensor in outputs]
    if half:
        floating = {UPSAMPLE: [0], MASKS: [0, 1], ROIS: [2, 3, 4]}[operator]
        types = ["half" if i in floating else name for i, name in enumerate(types)]
        expected = ["half"] * len(outputs)
    assert harness.make(operator, GOOD_FIELDS[operator]).output_types(types, len(outputs)) == (
        expected
    )


BAD_TYPES = [
    (UPSAMPLE, ["int8"], "logits must be float32 or half"),
    (UPSAMPLE, ["bf16"], "logits must be float32 or half"),
    (MASKS, ["half", "float", "float", "int32"], "prototypes and coefficients must both be"),
    (MASKS, ["half", "half", "half", "int32"], "boxes must be float32"),
    (MASKS, ["half", "half", "float", "int64"], "count int32"),
    (ROIS, ["half", "int32", "half", "half", "half"], "boxes must be float32"),
    (ROIS, ["float", "int64", "half", "half", "half"], "image_of int32"),
    (ROIS, ["float", "int32", "half", "float", "half"], "levels must all be"),
    (ROIS, ["float", "int32", "int8", "int8", "int8"], "levels must all be"),
]


@pytest.mark.parametrize(("operator", "types", "message"), BAD_TYPES)
def test_other_types_are_refused(
    harness: Harness, operator: str, types: list[str], message: str
) -> None:
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    assert plugin.output_types(types, len(GOOD_TENSORS[operator][1])) is None
    assert message in harness.refusal()


@pytest.mark.parametrize("operator", OPERATORS)
def test_output_shapes(harness: Harness, operator: str) -> None:
    inputs, outputs = GOOD_TENSORS[operator]
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    assert plugin.output_shapes(inputs, len(outputs)) == [list(tensor.shape) for tensor in outputs]


# Which extent of which input each extent of the output is.
DYNAMIC_SHAPES: dict[str, list[list[Any]]] = {
    UPSAMPLE: [[(0, 0), 24, 40], [(0, 0), 24, 40]],
    MASKS: [[(0, 0), (1, 1), (0, 2), (0, 3)]],
    ROIS: [[(0, 0), (2, 1), 7, 5]],
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_output_shapes_of_dynamic_inputs(harness: Harness, operator: str) -> None:
    inputs, outputs = GOOD_TENSORS[operator]
    unknown = [replace(tensor, shape=(-1,) * len(tensor.shape)) for tensor in inputs]
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    assert plugin.output_shapes(unknown, len(outputs)) == DYNAMIC_SHAPES[operator]


BAD_SHAPES = [
    (UPSAMPLE, 0, (19, 6, 10), r"logits must be .* got \(19, 6, 10\)"),
    (UPSAMPLE, 0, (1, 256, 6, 10), "1 to 255 classes"),
    (UPSAMPLE, 0, (1, 0, 6, 10), "1 to 255 classes"),
    (UPSAMPLE, 0, (1, 19, 0, 10), "1 to 4194304"),
    (UPSAMPLE, 0, (1, 19, 6, 1 << 23), "1 to 4194304"),
    (MASKS, 0, (2, 8, 0, 16), "at least 1"),
    (MASKS, 0, (8, 12, 16), "prototypes must be"),
    (MASKS, 0, (2, 4097, 12, 16), "prototypes must be"),
    (MASKS, 1, (2, 5, 9), "coefficients must be"),
    (MASKS, 1, (3, 5, 8), "coefficients must be"),
    (MASKS, 2, (2, 6, 4), "boxes must be"),
    (MASKS, 2, (2, 5, 5), "boxes must be"),
    (MASKS, 2, (10, 4), "boxes must be"),
    (MASKS, 3, (3,), "count must be"),
    (MASKS, 3, (), "count must be"),
    (ROIS, 0, (9, 5), "boxes must be"),
    (ROIS, 1, (8,), "image_of must be"),
    (ROIS, 2, (2, 6, 0, 20), "each level must be"),
    (ROIS, 3, (2, 7, 8, 10), "images and channels of the first"),
    (ROIS, 4, (1, 6, 4, 5), "images and channels of the first"),
    (ROIS, 4, (6, 4, 5), "each level must be"),
]


@pytest.mark.parametrize(("operator", "index", "shape", "message"), BAD_SHAPES)
def test_other_shapes_are_refused(
    harness: Harness, operator: str, index: int, shape: Shape, message: str
) -> None:
    outputs = GOOD_TENSORS[operator][1]
    inputs = with_input(operator, index, lambda tensor: replace(tensor, shape=shape))
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    assert plugin.output_shapes(inputs, len(outputs)) is None
    assert re.search(message, harness.refusal())
    assert plugin.configure(inputs, outputs) != 0
    assert re.search(message, harness.refusal())
    assert plugin.shape_change(inputs, outputs) != 0
    assert re.search(message, harness.refusal())


@pytest.mark.parametrize("operator", OPERATORS)
def test_fitting_shapes_are_taken(harness: Harness, operator: str) -> None:
    inputs, outputs = GOOD_TENSORS[operator]
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    assert plugin.configure(inputs, outputs) == 0
    assert plugin.shape_change(inputs, outputs) == 0
    dynamic = [
        Tensor((-1, *tensor.shape[1:]), tensor.type, least=tensor.shape, most=tensor.shape)
        for tensor in inputs
    ]
    assert plugin.configure(dynamic, outputs) == 0


def test_bounds_of_a_profile_are_checked(harness: Harness) -> None:
    plugin = harness.make(UPSAMPLE, GOOD_FIELDS[UPSAMPLE])
    outputs = GOOD_TENSORS[UPSAMPLE][1]
    shape, fits = (1, -1, 6, 10), (1, 19, 6, 10)
    assert plugin.configure([Tensor(shape, least=fits, most=(1, 255, 6, 10))], outputs) == 0
    assert plugin.configure([Tensor(shape, least=fits, most=(1, 256, 6, 10))], outputs) != 0
    assert "(1, 256, 6, 10)" in harness.refusal()
    assert plugin.configure([Tensor(shape, least=(1, 0, 6, 10), most=fits)], outputs) != 0
    assert "(1, 0, 6, 10)" in harness.refusal()


@pytest.mark.parametrize("operator", OPERATORS)
def test_other_numbers_of_tensors_are_refused(harness: Harness, operator: str) -> None:
    inputs, outputs = GOOD_TENSORS[operator]
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    for more, out in [([*inputs, inputs[-1]], outputs), (inputs, [*outputs, outputs[0]])]:
        expected = f"expected {len(inputs)} inputs and {len(outputs)} outputs"
        assert plugin.output_shapes(more, len(out)) is None
        assert expected in harness.refusal()
        assert plugin.output_types([tensor.type for tensor in more], len(out)) is None
        assert expected in harness.refusal()
        assert plugin.configure(more, out) != 0
        assert expected in harness.refusal()
        assert plugin.shape_change(more, out) != 0
        assert expected in harness.refusal()
        assert not plugin.supports(0, [*more, *out], len(more))
    assert not plugin.supports(-1, [*inputs, *outputs], len(inputs))
    assert not plugin.supports(len([*inputs, *outputs]), [*inputs, *outputs], len(inputs))


# What each tensor may be, given the type and format of the features.
FEATURES = {("float", "linear"), ("half", "linear"), ("half", "hwc8")}
FEATURES_AT = {UPSAMPLE: 0, MASKS: 0, ROIS: 2}


def allowed(operator: str, position: int, features: tuple[str, str]) -> set[tuple[str, str]]:
    if position == FEATURES_AT[operator]:
        return FEATURES
    kinds = {
        UPSAMPLE: [None, "half", "half"],
        MASKS: [None, features[0], "float", "int32", "half"],
        ROIS: ["float", "int32", None, "like the first", "like the first", features[0]],
    }[operator]
    kind = kinds[position]
    assert kind is not None
    return {features} if kind == "like the first" else {(kind, "linear")}


@pytest.mark.parametrize("features", sorted(FEATURES))
@pytest.mark.parametrize("operator", OPERATORS)
def test_formats(harness: Harness, operator: str, features: tuple[str, str]) -> None:
    """Every type in every format at every place, the others being what they may be."""
    inputs, outputs = GOOD_TENSORS[operator]
    plugin = harness.make(operator, GOOD_FIELDS[operator])
    tensors = [*inputs, *outputs]
    for position in range(len(tensors)):
        if position <= FEATURES_AT[operator]:
            choices = allowed(operator, position, features)
            chosen = features if features in choices else next(iter(choices))
        else:
            (chosen,) = allowed(operator, position, features)
        tensors[position] = replace(tensors[position], type=chosen[0], format=chosen[1])
    for position, tensor in enumerate(tensors):
        supported = {
            (kind, layout)
            for kind in TYPES
            for layout in FORMATS
            if plugin.supports(
                position,
                # What comes later is not set yet.
                [*tensors[:position], replace(tensor, type=kind, format=layout)]
                + [Tensor((), "int4", "dhwc")] * (len(tensors) - position - 1),
                len(inputs),
            )
        }
        assert supported == allowed(operator, position, features), position


# --- enqueue


class HostMemory:
    """Where the emulated kernels work: numpy's own."""

    stream: int | None = None

    def put(self, array: NDArray[Any]) -> Any:
        return array

    def address(self, held: Any) -> int:
        return int(held.ctypes.data)

    def get(self, held: Any) -> NDArray[Any]:
        result: NDArray[Any] = held
        return result


class DeviceMemory(HostMemory):
    """A GPU's, held by torch, and a stream that is not the default one."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream = self._stream.cuda_stream

    def put(self, array: NDArray[Any]) -> Any:
        held = self._torch.from_numpy(array).cuda()
        self._torch.cuda.synchronize()
        return held

    def address(self, held: Any) -> int:
        return int(held.data_ptr())

    def get(self, held: Any) -> NDArray[Any]:
        self._stream.synchronize()
        result: NDArray[Any] = held.cpu().numpy()
        return result


@dataclass(frozen=True)
class Place:
    """Plugins over one kind of kernels, and the memory that these see."""

    harness: Harness
    memory: HostMemory


PLACES = [
    *(pytest.param((release, False), id=f"emulated-{release}") for release in sorted(RELEASES)),
    pytest.param((max(RELEASES, default=0), True), id="gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, harnesses: Harnesses) -> Iterator[Place]:
    release, on_gpu = request.param
    harness = harnesses.get(release, on_gpu=on_gpu)
    memory = DeviceMemory() if on_gpu else HostMemory()
    for opened in open_harness(harness):
        yield Place(opened, memory)


DTYPES = {"float": np.float32, "half": np.float16, "int32": np.int32}
MARGIN = 64  # elements before and after each output, which no kernel may touch


@dataclass
class Bound:
    """A plugin's tensors in memory, ready to be enqueued again and again."""

    place: Place
    plugin: Plugin
    inputs: list[Tensor]
    outputs: list[Tensor]
    held: list[Any]
    results: list[Any]

    def enqueue(self) -> int:
        memory = self.place.memory
        return self.plugin.enqueue(
            self.inputs,
            self.outputs,
            [memory.address(held) for held in self.held],
            [
                memory.address(held) + MARGIN * np.dtype(DTYPES[tensor.type]).itemsize
                for held, tensor in zip(self.results, self.outputs, strict=True)
            ],
            memory.stream,
        )

    def read(self) -> list[NDArray[Any]]:
        """The outputs; what is around them has to be as it was."""
        arrays = []
        for held, tensor in zip(self.results, self.outputs, strict=True):
            array = self.place.memory.get(held)
            assert np.isnan(array[:MARGIN]).all()
            assert np.isnan(array[-MARGIN:]).all()
            arrays.append(array[MARGIN:-MARGIN].reshape(tensor.shape))
        return arrays


def bind(
    place: Place,
    plugin: Plugin,
    inputs: Sequence[tuple[NDArray[Any], str, str]],
    outputs: Sequence[Tensor],
) -> Bound:
    """``inputs`` are arrays with the type and format to lay them out in; outputs hold NaN."""
    tensors = [Tensor(array.shape, kind, layout) for array, kind, layout in inputs]
    held = [place.memory.put(laid_out(array, kind, layout)) for array, kind, layout in inputs]
    results = [
        place.memory.put(
            np.full(int(np.prod(tensor.shape)) + 2 * MARGIN, np.nan, DTYPES[tensor.type])
        )
        for tensor in outputs
    ]
    return Bound(place, plugin, tensors, list(outputs), held, results)


def run(
    place: Place,
    plugin: Plugin,
    inputs: Sequence[tuple[NDArray[Any], str, str]],
    outputs: Sequence[Tensor],
) -> list[NDArray[Any]]:
    bound = bind(place, plugin, inputs, outputs)
    assert bound.enqueue() == 0, place.harness.logged()
    return bound.read()


def laid_out(array: NDArray[Any], kind: str, layout: str) -> NDArray[Any]:
    """As TensorRT has it in memory; padding is NaN, so that reading it shows."""
    array = array.astype(DTYPES[kind])
    if layout == "linear":
        return np.ascontiguousarray(array)
    assert layout == "hwc8"
    images, channels, height, width = array.shape
    padded = np.full((images, height, width, (channels + 7) // 8 * 8), np.nan, array.dtype)
    padded[..., :channels] = array.transpose(0, 2, 3, 1)
    return padded


def rounded(array: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """What is left of ``array`` in a tensor of that type."""
    return array.astype(DTYPES[kind]).astype(np.float32)


LAYOUTS = sorted(FEATURES)


@pytest.mark.parametrize("with_confidence", [0, 1])
@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize(("images", "classes", "height", "width"), [(1, 19, 6, 10), (3, 3, 5, 7)])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_upsample_argmax_equals_the_cpu(
    place: Place,
    kind: str,
    layout: str,
    images: int,
    classes: int,
    height: int,
    width: int,
    align_corners: int,
    with_confidence: int,
) -> None:
    rng = np.random.default_rng([images, classes, align_corners])
    logits = rounded(rng.normal(0, 3, (images, classes, height, width)).astype(np.float32), kind)
    size = (4 * height + 1, 3 * width)
    fields = {"height": size[0], "width": size[1]}
    flags = {"align_corners": align_corners, "confidence": with_confidence}
    plugin = place.harness.make(UPSAMPLE, {**fields, **flags})
    outputs = [Tensor((images, *size), "half")] * (1 + with_confidence)
    results = run(place, plugin, [(logits, kind, layout)], outputs)
    for n in range(images):
        expected = kernels.upsample_argmax_confidence(
            logits[n], size, align_corners=bool(align_corners)
        )
        for result, levels in zip(results, expected, strict=False):
            np.testing.assert_array_equal(result[n], levels.astype(np.float16))


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
@pytest.mark.parametrize("images", [1, 3])
def test_mask_assembly_equals_the_cpu(place: Place, kind: str, layout: str, images: int) -> None:
    channels, height, width, capacity = 11, 12, 17, 6
    network = (96, 136)
    rng = np.random.default_rng(images)
    prototypes = rounded(
        rng.normal(0, 1, (images, channels, height, width)).astype(np.float32), kind
    )
    coefficients = rounded(rng.normal(0, 1, (images, capacity, channels)).astype(np.float32), kind)
    corners = rng.uniform(-20, 150, (images, capacity, 4)).astype(np.float32)
    count = np.array([4, capacity, 0][:images], np.int32)
    plugin = place.harness.make(MASKS, dict(zip(GOOD_FIELDS[MASKS], network, strict=True)))
    (masks,) = run(
        place,
        plugin,
        [
            (prototypes, kind, layout),
            (coefficients, kind, "linear"),
            (corners, "float", "linear"),
            (count, "int32", "linear"),
        ],
        [Tensor((images, capacity, height, width), "half")],
    )
    for n in range(images):
        expected = assemble_masks(prototypes[n], coefficients[n], corners[n], network)
        expected[count[n] :] = 0
        np.testing.assert_array_equal(masks[n], expected.astype(np.float16))
    assert 0 < np.mean(masks == 0) < 1


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_pyramid_roi_align_equals_the_cpu(
    place: Place, kind: str, layout: str, levels: int
) -> None:
    images, channels, rois = 2, 6, 40
    rng = np.random.default_rng(levels)
    scales = [1 / 4, 1 / 8, 1 / 16][:levels]
    maps = [
        rounded(
            rng.normal(0, 1, (images, channels, int(64 * s), int(96 * s))).astype(np.float32), kind
        )
        for s in scales
    ]
    centres, sizes = rng.uniform(0, 90, (rois, 2)), rng.uniform(1, 80, (rois, 2))
    boxes = np.hstack([centres - sizes / 2, centres + sizes / 2]).astype(np.float32)
    image_of = rng.integers(0, images, rois).astype(np.int32)
    fields = {**GOOD_FIELDS[ROIS], "scales": scales}
    plugin = place.harness.make(ROIS, fields)
    (pooled,) = run(
        place,
        plugin,
        [
            (boxes, "float", "linear"),
            (image_of, "int32", "linear"),
            *((level, kind, layout) for level in maps),
        ],
        [Tensor((rois, channels, 7, 5), kind)],
    )
    expected = kernels.pyramid_roi_align(
        maps,
        boxes,
        output_size=(7, 5),
        scales=scales,
        image_of=image_of,
        sampling_ratio=2,
        aligned=True,
        canonical_size=56.0,
        canonical_level=3,
        first_level=2,
    )
    np.testing.assert_array_equal(pooled, expected.astype(DTYPES[kind]))
    assert np.unique(expected).size > rois


@pytest.mark.gpu
def test_enqueue_can_be_captured_in_a_graph(harnesses: Harnesses) -> None:
    """No allocation and no waiting: a stream that is being captured allows neither."""
    torch = pytest.importorskip("torch", reason="torch captures the graph")
    for harness in open_harness(harnesses.get(max(RELEASES), on_gpu=True)):
        memory = DeviceMemory()
        place = Place(harness, memory)
        rng = np.random.default_rng(0)
        logits = rng.normal(0, 3, (2, 19, 6, 10)).astype(np.float16)
        plugin = harness.make(UPSAMPLE, GOOD_FIELDS[UPSAMPLE])
        outputs = GOOD_TENSORS[UPSAMPLE][1]
        bound = bind(place, plugin, [(logits, "half", "linear")], outputs)
        assert bound.enqueue() == 0
        expected = [array.copy() for array in bound.read()]
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        memory.stream = side.cuda_stream
        with torch.cuda.graph(graph, stream=side):
            assert bound.enqueue() == 0
        for held in bound.results:
            held[MARGIN:-MARGIN] = float("nan")
        graph.replay()
        torch.cuda.synchronize()
        for result, want in zip(bound.read(), expected, strict=True):
            np.testing.assert_array_equal(result, want)


def emptied(operator: str, axis_of: Mapping[int, int]) -> list[Tensor]:
    """The inputs with 0 at one axis of some of them."""
    inputs = list(GOOD_TENSORS[operator][0])
    for index, axis in axis_of.items():
        shape = list(inputs[index].shape)
        shape[axis] = 0
        inputs[index] = replace(inputs[index], shape=tuple(shape))
    return inputs


@pytest.mark.parametrize(
    ("operator", "axis_of"),
    [
        pytest.param(UPSAMPLE, {0: 0}, id="upsample-no-images"),
        pytest.param(MASKS, {0: 0, 1: 0, 2: 0, 3: 0}, id="masks-no-images"),
        pytest.param(MASKS, {1: 1, 2: 1}, id="masks-no-instances"),
        pytest.param(ROIS, {0: 0, 1: 0}, id="rois-no-boxes"),
        pytest.param(ROIS, {0: 0, 1: 0, 2: 0, 3: 0, 4: 0}, id="rois-nothing"),
    ],
)
def test_nothing_to_do_is_no_error(place: Place, operator: str, axis_of: Mapping[int, int]) -> None:
    inputs, outputs = emptied(operator, axis_of), GOOD_TENSORS[operator][1]
    plugin = place.harness.make(operator, GOOD_FIELDS[operator])
    assert plugin.shape_change(inputs, outputs) == 0
    # No memory either: TensorRT passes what it likes for empty tensors.
    nothing = [None] * len(inputs), [None] * len(outputs)
    assert plugin.enqueue(inputs, outputs, *nothing, place.memory.stream) == 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_launch_that_fails_is_reported(place: Place, operator: str) -> None:
    inputs, outputs = GOOD_TENSORS[operator]
    plugin = place.harness.make(operator, GOOD_FIELDS[operator])
    nothing = [None] * len(inputs), [None] * len(outputs)
    assert plugin.enqueue(inputs, outputs, *nothing, place.memory.stream) != 0
    assert place.harness.refusal() == (
        f"{operator}: the kernel could not be queued, CUDA error 1."  # cudaErrorInvalidValue
    )


def test_boxes_without_an_image_are_refused(harness: Harness) -> None:
    inputs = emptied(ROIS, {2: 0, 3: 0, 4: 0})
    outputs = GOOD_TENSORS[ROIS][1]
    plugin = harness.make(ROIS, GOOD_FIELDS[ROIS])
    assert plugin.enqueue(inputs, outputs, [None] * 5, [None], None) != 0
    assert "9 boxes, but no image" in harness.refusal()


# --- the library


@pytest.mark.parametrize("headers", HEADERS, ids=lambda folder: folder.name)
def test_compiles_against_each_release(headers: Path) -> None:
    sources = [*map(str, SOURCES), str(HERE / "plugin_harness.cpp")]
    subprocess.run([*compile_command(headers), "-fsyntax-only", *sources], check=True)


def exported(library: Path) -> list[str]:
    told = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return sorted(line.split()[-1].partition("@")[0] for line in told.splitlines())


def needed(library: Path) -> set[str]:
    told = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {name.partition(".so")[0] for name in re.findall(r"NEEDED.*\[(.+)\]", told)}


EXPORTS = [
    "edgeseg_plugin_abi_version",
    "edgeseg_plugin_tensorrt_major",
    "getCreators",
    "setLoggerFinder",
]


def test_the_library_shows_four_functions_and_its_versions(
    emulated_harness: Harness, release: int
) -> None:
    assert exported(emulated_harness.path) == EXPORTS
    library = ctypes.CDLL(str(emulated_harness.path))
    assert library.edgeseg_plugin_abi_version() == PLUGIN_ABI_VERSION
    assert library.edgeseg_plugin_tensorrt_major() == release


@pytest.mark.slow
def test_the_built_library_needs_no_tensorrt(tmp_path: Path) -> None:
    library = build_plugins(tmp_path, HEADERS[0], ["87"])
    assert library == tmp_path / "libedgeseg_plugins.so"
    assert exported(library) == EXPORTS
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread"}
    assert needed(library) <= system | {"ld-linux-x86-64", "ld-linux-aarch64"}
    assert ctypes.CDLL(str(library)).edgeseg_plugin_abi_version() == PLUGIN_ABI_VERSION


# What a program with TensorRT's own registry does; prints JSON. (Python's clone() and
# get_fields_to_serialize() reach only plugins written in Python.)
IN_THE_REGISTRY = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import tensorrt_lean_bindings as trt

registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[2]) is not None
told = {}

def collection(fields):
    made = []
    for name, value in fields.items():
        array = np.atleast_1d(np.array(value, np.int32 if isinstance(value, int) else np.float32))
        kind = trt.PluginFieldType.INT32 if isinstance(value, int) else trt.PluginFieldType.FLOAT32
        made.append(trt.PluginField(name, array, kind))
    return trt.PluginFieldCollection(made)

def described(plugin):
    kinds = trt.PluginCapabilityType
    core, build, runtime = (
        plugin.get_capability_interface(kind) for kind in (kinds.CORE, kinds.BUILD, kinds.RUNTIME)
    )
    return {
        "core": [core.plugin_name, core.plugin_version, core.plugin_namespace],
        "interfaces": [
            [x.interface_info.kind, x.interface_info.major] for x in (plugin, core, build, runtime)
        ],
        "outputs": build.num_outputs,
        "timing": build.timing_cache_id,
        "metadata": build.metadata_string,
    }

for operator, fields in json.loads(sys.argv[3]).items():
    creator = registry.get_creator(operator, "1", "edgeseg")
    plugin = creator.create_plugin("layer", collection(fields), trt.TensorRTPhase.BUILD)
    again = creator.create_plugin("layer", collection(fields), trt.TensorRTPhase.RUNTIME)
    refused = creator.create_plugin("layer", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    told[operator] = {
        "names": [field.name for field in creator.field_names],
        "plugin": described(plugin),
        "again": described(again),
        "refused": refused is None,
    }
print(json.dumps(told))
"""


@pytest.mark.skipif(
    not os.environ.get("EDGESEG_TENSORRT_LEAN"),
    reason="EDGESEG_TENSORRT_LEAN names no folder with tensorrt-lean installed "
    "(pip install --target)",
)
def test_the_real_registry_takes_the_library(emulated_harness: Harness) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", IN_THE_REGISTRY, os.environ["EDGESEG_TENSORRT_LEAN"],
         str(emulated_harness.path), json.dumps(GOOD_FIELDS)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    for operator, fields in GOOD_FIELDS.items():
        of = told[operator]
        assert of["names"] == list(fields)
        assert of["refused"]
        plugin = of["plugin"]
        assert of["again"] == plugin
        assert plugin["core"] == [operator, "1", "edgeseg"]
        assert plugin["interfaces"] == [
            ["PLUGIN", 1],
            ["PLUGIN_V3ONE_CORE", 1],
            ["PLUGIN_V3ONE_BUILD", 1],
            ["PLUGIN_V3ONE_RUNTIME", 1],
        ]
        assert plugin["outputs"] == len(GOOD_TENSORS[operator][1])
        assert plugin["timing"] == plugin["metadata"] != ""
        assert all(f"{name}=" in plugin["timing"] for name in fields)
        assert f"{operator} layer: attribute {next(iter(fields))} is missing" in ran.stderr
