"""The builder on a double of each release of TensorRT: what it asks for, and what it makes of it.

The double knows names and signatures, so a call that a release would refuse fails here too. What
TensorRT would do is said by the tests.
"""

from __future__ import annotations

import _thread
import importlib
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from edgeseg.bundle import Bundle
from edgeseg.cli import main
from edgeseg.engine import build as module
from edgeseg.engine.build import BuildProgress, build_plan, find_plan, load_plugins
from edgeseg.engine.cuda import Cuda, Device, Memory
from edgeseg.engine.log import Log, listening, tidy
from edgeseg.engine.plan import BuildOptions, NoPlan, Plan
from edgeseg.errors import EngineError, RequestError
from tests.tensorrt.double import Double

ORIN = Device(0, "Orin", (8, 7), integrated=True)
CARD = Device(0, "NVIDIA RTX A2000", (8, 6), integrated=False)
HEAD = "EdgeSegUpsampleArgmax"
PLAN = b"\x00a serialized engine\xff"


class Gpu:
    """A GPU that is only looked at; counts who made it current."""

    def __init__(self, device: Device = CARD, free: int = 6 << 30) -> None:
        self.device = device
        self.free = free
        self.depth = 0

    @contextmanager
    def current(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def memory(self) -> Memory:
        assert self.depth, "asked outside of current()"
        return Memory(self.free, 8 << 30)


def gpu(device: Device = CARD, free: int = 6 << 30) -> Cuda:
    return cast(Cuda, Gpu(device, free))


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, 16 GiB free, and no Jetson, wherever the tests run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_JETSON", tmp_path / "nv_tegra_release")
    free = {"MemAvailable": 16 << 30}
    monkeypatch.setattr("edgeseg.engine.memory._meminfo", lambda path: free)


@pytest.fixture
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.open(bundle_folder)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libedgeseg_plugins.so"
    path.write_bytes(b"plugins")
    return path


def inspected(*, plugins: bool = False, weights: str = "Float", dla: bool = False) -> str:
    """What the inspector says of an engine of the tiny network."""
    tensor = {"Name": "x", "Dimensions": [1, 3, 4, 6], "Format/Datatype": "Row major linear FP32"}
    layers: list[dict[str, Any]] = [
        {"Name": "conv", "LayerType": "CaskConvolution", "ParameterType": "Convolution",
         "Inputs": [tensor], "Outputs": [tensor], "Weights": {"Type": weights, "Count": 576}},
    ]  # fmt: skip
    if plugins:
        layers.append({"Name": "head", "LayerType": "PluginV3", "Inputs": [], "Outputs": []})
    if dla:
        layers.append({"Name": "{ForeignNode[a...b]}", "LayerType": "DLA"})
    return json.dumps({"Layers": layers, "Bindings": ["image", "class_map"]})


class Builder:
    """A double of TensorRT that builds at once; what it says can be changed."""

    def __init__(self, trt: Double) -> None:
        self.trt = trt
        self.version = trt.release.version
        self.logger: Any = None
        self.during: Callable[[Any, Any], object] = lambda network, config: None
        self.loaded: list[str] = []
        trt.when("Builder.build_serialized_network", does=self._build)
        trt.when("EngineInspector.get_engine_information", does=self._inspect)
        trt.when("ITimingCache.serialize", returns=trt.host_memory(b"measurements"))
        trt.when("IPluginRegistry.load_library", does=self._load)
        trt.when("IPluginRegistry.all_creators", does=lambda registry: self._creators())
        self.result: bytes | None = PLAN
        self.inspection: str | None = None

    def _build(self, builder: Any, network: Any, config: Any) -> Any:
        self.during(network, config)
        return None if self.result is None else self.trt.host_memory(self.result)

    def _inspect(self, inspector: Any, kind: Any) -> str:
        assert kind == self.trt.module.LayerInformationFormat.JSON
        return inspected(plugins=bool(self.loaded)) if self.inspection is None else self.inspection

    def _load(self, registry: Any, path: str) -> Any:
        self.loaded.append(path)
        return object()

    def _creators(self) -> list[Any]:
        def creator(name: str, namespace: str) -> Any:
            return self.trt.new(
                "IPluginCreatorV3One", name=name, plugin_namespace=namespace, plugin_version="1"
            )

        ours = [creator(HEAD, "edgeseg")] if self.loaded else []
        return [creator("ROIAlign_TRT", ""), *ours]

    def log(self, severity: str, message: str) -> None:
        """Logs as TensorRT does."""
        (made, *_) = self.trt.named("Builder.__init__")
        value = getattr(self.trt.module.ILogger, severity)
        self.trt.drive(made.arguments["logger"], "log", value, message)

    def value(self, name: str) -> Any:
        """What a property of the configuration was set to, once."""
        (call,) = self.trt.named(f"IBuilderConfig.{name}")
        return call.arguments["value"]

    def flags(self) -> dict[str, bool]:
        """Builder flags that were set or cleared."""
        found = {}
        for call in self.trt.calls:
            if call.name in ("IBuilderConfig.set_flag", "IBuilderConfig.clear_flag"):
                found[call.arguments["flag"].name] = call.name.endswith("set_flag")
        return found

    def names(self) -> list[str]:
        return [call.name for call in self.trt.calls]


@pytest.fixture
def builder(tensorrt: Double) -> Builder:
    return Builder(tensorrt)


def built(bundle: Bundle, options: BuildOptions | None = None, **more: Any) -> Plan:
    given: dict[str, Any] = {"cuda": gpu(), "plugin_library": None, **more}
    return build_plan(bundle, options or BuildOptions(), **given)


# --- what is asked of TensorRT


def test_a_build(builder: Builder, bundle: Bundle) -> None:
    trt: Any = builder.trt.module
    graphics = Gpu()
    plan = built(bundle, cuda=cast(Cuda, graphics))
    assert graphics.depth == 0
    (network,) = builder.trt.named("Builder.create_network")
    typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert network.arguments == {"flags": 1 << typed.value}
    (parsed,) = builder.trt.named("OnnxParser.parse")
    assert parsed.arguments == {"model": bundle.model.for_tensorrt(plugins=False)}
    assert builder.flags() == {"TF32": False}
    assert builder.value("profiling_verbosity") == trt.ProfilingVerbosity.DETAILED
    assert builder.value("builder_optimization_level") == 3
    (limit,) = builder.trt.named("IBuilderConfig.set_memory_pool_limit")
    assert limit.arguments["pool"] == trt.MemoryPoolType.WORKSPACE
    assert 64 << 20 <= limit.arguments["pool_size"] <= 3 << 30
    assert plan.workspace_bytes == limit.arguments["pool_size"]
    assert builder.loaded == []
    for absent in ("hardware_compatibility_level", "default_device_type", "plugins_to_serialize"):
        assert f"IBuilderConfig.{absent}" not in builder.names()
    # The builder's memory is to be free before the engine is loaded.
    (loaded,) = builder.trt.named("Runtime.deserialize_cuda_engine")
    assert list(loaded.arguments.values()) == [PLAN]


def test_what_is_written(builder: Builder, bundle: Bundle) -> None:
    plan = built(bundle)
    assert bundle.folder is not None
    stem = f"nvidia-rtx-a2000-sm86-trt{builder.version}"
    engines = bundle.folder / "engines"
    assert sorted(path.name for path in engines.iterdir()) == [
        f"{stem}.json", f"{stem}.plan", f"{stem}.timing",
    ]  # fmt: skip
    assert plan.path.read_bytes() == PLAN
    assert (engines / f"{stem}.timing").read_bytes() == b"measurements"
    assert plan.attestation.precisions == {"fp32": 1} and plan.options.plugins is False
    assert (plan.tensorrt, plan.device, plan.library) == (builder.version, CARD, None)
    found = find_plan(
        bundle, BuildOptions(), tensorrt_version=builder.version, device=CARD, plugin_library=None
    )
    assert isinstance(found, Plan)
    assert replace(found, build_seconds=plan.build_seconds) == plan
    # A second build replaces the first.
    builder.result = b"another"
    assert built(bundle).read() == b"another"
    assert len(list(engines.iterdir())) == 3


def test_plugins(builder: Builder, bundle: Bundle, library: Path) -> None:
    plan = built(bundle, plugin_library=library)
    # For programs that load the plan by themselves.
    assert plan.path.with_name(library.name).read_bytes() == library.read_bytes()
    assert builder.loaded == [str(library)]
    (parsed,) = builder.trt.named("OnnxParser.parse")
    assert parsed.arguments == {"model": bundle.model.for_tensorrt(plugins=True)}
    names = builder.names()
    assert names.index("IPluginRegistry.load_library") < names.index("OnnxParser.parse")
    assert "IBuilderConfig.plugins_to_serialize" not in names
    assert plan.options.plugins is True
    assert plan.library is not None and plan.library.name == library.name
    assert plan.attestation.plugins == (HEAD,)
    assert plan.path.stem.endswith("-plugins")
    # The registry is the process's own: a library goes in once.
    built(bundle, plugin_library=library)
    load_plugins(library)
    assert builder.loaded == [str(library)]


def test_plugins_left_out(builder: Builder, bundle: Bundle, library: Path) -> None:
    plan = built(bundle, BuildOptions(plugins=False), plugin_library=library)
    assert builder.loaded == [] and plan.library is None
    with pytest.raises(
        EngineError, match="their library is not here; `edgeseg kernels build --tensorrt`"
    ):
        built(bundle, BuildOptions(plugins=True))


@pytest.mark.parametrize("how", ["null", "of another version"])
def test_plugin_library_that_does_not_load(
    builder: Builder, bundle: Bundle, library: Path, how: str
) -> None:
    builder.trt.when("IPluginRegistry.load_library", returns=None if how == "null" else object())
    with pytest.raises(EngineError) as caught:
        built(bundle, plugin_library=library)
    said = str(caught.value)
    assert f"cannot load the plugin library {library}" in said
    assert "`edgeseg kernels build --tensorrt`" in said and "--no-plugins" in said
    assert "OnnxParser.parse" not in builder.names()


def test_options(builder: Builder, bundle: Bundle) -> None:
    trt: Any = builder.trt.module
    options = BuildOptions(
        level=5, workspace_mb=100, version_compatible=True, hardware_compatible="ampere_plus",
        tf32=True,
    )  # fmt: skip
    plan = built(bundle, options)
    assert builder.value("builder_optimization_level") == 5
    (limit,) = builder.trt.named("IBuilderConfig.set_memory_pool_limit")
    assert limit.arguments["pool_size"] == 100 << 20
    assert builder.flags() == {"TF32": True, "VERSION_COMPATIBLE": True}
    level = builder.value("hardware_compatibility_level")
    assert level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    # Such a plan brings code of its own, which the runtime has to be told to trust.
    (allowed,) = builder.trt.named("Runtime.engine_host_code_allowed")
    assert allowed.arguments["value"] is True
    assert plan.options == replace(options, plugins=False)


def test_same_compute_capability(builder: Builder, bundle: Bundle) -> None:
    levels: Any = builder.trt.module.HardwareCompatibilityLevel
    options = BuildOptions(hardware_compatible="same_compute_capability")
    if builder.trt.release.name == "10.3":
        assert not hasattr(levels, "SAME_COMPUTE_CAPABILITY")
        with pytest.raises(RequestError, match="does not know the hardware compatibility same"):
            built(bundle, options)
        return
    built(bundle, options)
    assert builder.value("hardware_compatibility_level") == levels.SAME_COMPUTE_CAPABILITY


@pytest.mark.parametrize(
    ("level", "capability", "refused"),
    [
        ("ampere_plus", (7, 5), True),
        ("same_compute_capability", (7, 2), True),
        ("ampere_plus", (8, 0), False),
    ],
)
def test_hardware_compatibility_of_old_gpus(
    builder: Builder, bundle: Bundle, level: Any, capability: tuple[int, int], refused: bool
) -> None:
    options = BuildOptions(hardware_compatible=level)
    cuda = gpu(replace(CARD, compute_capability=capability))
    if not refused:
        built(bundle, options, cuda=cuda)
        return
    with pytest.raises(RequestError, match=f"{level} needs compute capability"):
        built(bundle, options, cuda=cuda)
    assert builder.names() == []


def test_hardware_compatibility_on_a_jetson(
    builder: Builder, bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "nv_tegra_release").write_text("# R36")
    options = BuildOptions(hardware_compatible="ampere_plus", memory_check=False)
    if builder.version.startswith("11."):
        built(bundle, options)
        return
    with pytest.raises(RequestError, match="no hardware compatibility on a Jetson"):
        built(bundle, options, cuda=gpu(ORIN))


def half(bundle: Bundle) -> Bundle:
    """The same model with its convolution in half precision, which a DLA can run."""
    onnx = pytest.importorskip("onnx")
    from edgeseg.onnxfile import OnnxFile

    model = onnx.load_from_string(bundle.model.content)
    (kernel,) = model.graph.initializer
    array = onnx.numpy_helper.to_array(kernel).astype("float16")
    kernel.CopyFrom(onnx.numpy_helper.from_array(array, kernel.name))
    for node in model.graph.node:
        if node.name == "cast":
            node.attribute[0].i = onnx.TensorProto.FLOAT16
    return replace(bundle, model=OnnxFile(model.SerializeToString(), "half"))


def test_dla(builder: Builder, bundle: Bundle) -> None:
    trt: Any = builder.trt.module
    builder.trt.when("Builder.num_DLA_cores", returns=2)
    builder.inspection = inspected(weights="Half", dla=True)
    plan = built(half(bundle), BuildOptions(dla=1))
    assert builder.value("default_device_type") == trt.DeviceType.DLA
    assert builder.value("DLA_core") == 1
    assert builder.flags() == {"TF32": False, "GPU_FALLBACK": True}
    (core,) = builder.trt.named("Runtime.DLA_core")
    assert core.arguments["value"] == 1
    assert plan.attestation.on_dla == 1 and plan.path.stem.endswith("-dla1")


@pytest.mark.parametrize(("cores", "asked"), [(0, 0), (2, 2)])
def test_dla_that_is_not_there(builder: Builder, bundle: Bundle, cores: int, asked: int) -> None:
    builder.trt.when("Builder.num_DLA_cores", returns=cores)
    with pytest.raises(
        RequestError, match=f"DLA core {asked} .* finds {cores} here; .* 11\\.4\\.1"
    ):
        built(half(bundle), BuildOptions(dla=asked))


def test_dla_computes_no_fp32(builder: Builder, bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="in FP16 and INT8, and this graph is in FP32"):
        built(bundle, BuildOptions(dla=0))
    assert builder.names() == []


def test_dla_that_everything_fell_from(builder: Builder, bundle: Bundle) -> None:
    builder.trt.when("Builder.num_DLA_cores", returns=1)
    builder.inspection = inspected(weights="Half")
    with pytest.raises(EngineError, match="no layer runs on the DLA"):
        built(half(bundle), BuildOptions(dla=0))


def network_inputs(builder: Builder, name: str, shape: tuple[int, ...]) -> None:
    dims: Any = builder.trt.module.Dims
    builder.trt.when("INetworkDefinition.num_inputs", returns=1)
    tensor = builder.trt.new("ITensor", name=name, shape=dims(shape))
    builder.trt.when("INetworkDefinition.get_input", returns=tensor)


def test_open_sizes_get_the_network_size(builder: Builder, bundle: Bundle) -> None:
    network_inputs(builder, "image", (1, 32, 48, 3))
    built(bundle)
    assert builder.trt.named("IBuilderConfig.add_optimization_profile") == []
    network_inputs(builder, "image", (-1, -1, 48, 3))
    built(bundle)
    (shape,) = builder.trt.named("IOptimizationProfile.set_shape")
    size = (1, 32, 48, 3)
    assert shape.arguments == {"input": "image", "min": size, "opt": size, "max": size}
    (added,) = builder.trt.named("IBuilderConfig.add_optimization_profile")
    assert added.arguments["profile"] is shape.owner


@pytest.mark.parametrize("shape", [(-1, 3, 32, 48), (-1,), (-1, 32, 48, 3, 1)])
def test_open_sizes_that_the_spec_does_not_settle(
    builder: Builder, bundle: Bundle, shape: tuple[int, ...]
) -> None:
    network_inputs(builder, "strange", shape)
    with pytest.raises(EngineError, match="leaves the size of its input strange open"):
        built(bundle)


# --- the timing cache


def timing(bundle: Bundle, builder: Builder) -> Path:
    assert bundle.folder is not None
    return bundle.folder / "engines" / f"nvidia-rtx-a2000-sm86-trt{builder.version}.timing"


def test_timing_cache_is_used_and_replaced(
    builder: Builder, bundle: Bundle, tmp_path: Path
) -> None:
    built(bundle)
    built(bundle)
    made = builder.trt.named("IBuilderConfig.create_timing_cache")
    assert [call.arguments["serialized_timing_cache"] for call in made] == [b"", b"measurements"]
    for call in builder.trt.named("IBuilderConfig.set_timing_cache"):
        assert call.arguments["ignore_mismatch"] is False
    own = tmp_path / "own.timing"
    built(bundle, BuildOptions(timing_cache=own))
    assert own.read_bytes() == b"measurements"


@pytest.mark.parametrize("how", ["damaged", "of another GPU"])
def test_timing_cache_that_does_not_fit(builder: Builder, bundle: Bundle, how: str) -> None:
    path = timing(bundle, builder)
    path.parent.mkdir()
    path.write_bytes(b"strange")

    def create(config: Any, content: bytes) -> Any:
        if content and how == "damaged":
            builder.log("ERROR", "Serialization assertion magicTagRead failed")
            return None
        return builder.trt.new("ITimingCache")

    fits = iter([how == "damaged", True])
    builder.trt.when("IBuilderConfig.create_timing_cache", does=create)
    builder.trt.when(
        "IBuilderConfig.set_timing_cache", does=lambda config, cache, ignore: next(fits)
    )
    plan = built(bundle)
    assert path.read_bytes() == b"measurements"
    assert plan.warnings == (
        f"the timing cache {path} is damaged, or of another TensorRT or GPU; it is replaced",
    )


def test_errors_of_the_timing_cache_are_no_cause(builder: Builder, bundle: Bundle) -> None:
    def create(config: Any, content: bytes) -> Any:
        builder.log("ERROR", "Serialization assertion magicTagRead failed")
        return builder.trt.new("ITimingCache")

    builder.trt.when("IBuilderConfig.create_timing_cache", does=create)
    builder.during = lambda network, config: builder.log("ERROR", "the cause")
    builder.result = None
    with pytest.raises(EngineError, match=r"failed building .*: the cause;"):
        built(bundle)


def test_timing_cache_survives_a_plan_that_is_refused(builder: Builder, bundle: Bundle) -> None:
    builder.inspection = "{}"
    with pytest.raises(EngineError, match="not what the graph asks for"):
        built(bundle)
    assert timing(bundle, builder).is_file()


# --- attestation


def test_an_engine_that_is_not_as_asked(builder: Builder, bundle: Bundle, library: Path) -> None:
    builder.inspection = inspected(plugins=False)
    with pytest.raises(EngineError) as caught:
        built(bundle, plugin_library=library)
    said = str(caught.value)
    assert "1 of 1 plugin layers are missing: EdgeSegUpsampleArgmax (head)" in said
    assert "--no-strict" in said
    found = find_plan(bundle, tensorrt_version=builder.version, device=CARD, plugin_library=library)
    assert isinstance(found, NoPlan)
    plan = built(bundle, BuildOptions(strict=False), plugin_library=library)
    assert not plan.attestation.holds
    assert any(line.startswith("not as asked: ") for line in plan.render())


# --- failures

UNSUPPORTED = "No importer registered for op: Mystery. Attempted to import as plugin"


def parser_fails(builder: Builder, *errors: dict[str, Any]) -> None:
    builder.trt.when("OnnxParser.parse", returns=False)
    builder.trt.when("OnnxParser.num_errors", returns=len(errors))
    made = []
    for values in errors:
        error = builder.trt.new("ParserError")
        for name, value in values.items():
            builder.trt.when(f"ParserError.{name}", returns=value, on=error)
        made.append(error)
    builder.trt.when("OnnxParser.get_error", does=lambda parser, index: made[index])


def parser_error(builder: Builder, code: str, node: str, operator: str, words: str) -> Any:
    codes: Any = builder.trt.module.ErrorCode
    return {
        "code": getattr(codes, code), "node_name": node, "node_operator": operator, "desc": words,
        "node": 7,
    }  # fmt: skip


def test_operators_that_are_not_supported(builder: Builder, bundle: Bundle) -> None:
    parser_fails(
        builder,
        parser_error(builder, "UNSUPPORTED_NODE", "layer4.x", "Mystery", UNSUPPORTED),
        parser_error(builder, "INVALID_NODE", "", "Resize", "Assertion failed:\n bad mode."),
    )
    with pytest.raises(EngineError) as caught:
        built(bundle)
    said = str(caught.value)
    assert said.startswith(f"TensorRT {builder.version} cannot take {bundle.model_path}: ")
    assert f"operator Mystery of node layer4.x is not supported ({UNSUPPORTED})" in said
    assert "operator Resize of node number 7 cannot be read (Assertion failed: bad mode)" in said
    assert "export the model without it" in said and "--engine onnxruntime" in said


def test_many_errors_are_cut(builder: Builder, bundle: Bundle) -> None:
    parser_fails(
        builder,
        *(parser_error(builder, "UNSUPPORTED_NODE", f"n{i}", "X", "no") for i in range(9)),
    )
    with pytest.raises(EngineError, match=r"node n2 is not supported .*; and 6 more; "):
        built(bundle)


def test_errors_that_say_the_same_are_told_once(builder: Builder, bundle: Bundle) -> None:
    error = parser_error(builder, "UNSUPPORTED_NODE", "n", "X", "no")
    parser_fails(builder, error, error)
    with pytest.raises(EngineError) as caught:
        built(bundle)
    assert str(caught.value).count("operator X of node n") == 1


def test_plugin_that_the_parser_does_not_find(
    builder: Builder, bundle: Bundle, library: Path
) -> None:
    error = parser_error(builder, "UNSUPPORTED_NODE", "head", HEAD, "Plugin not found")
    parser_fails(builder, error)
    with pytest.raises(EngineError, match=r"the plugin library does not know it: .*--no-plugins"):
        built(bundle, plugin_library=library)


def test_parser_without_reasons(builder: Builder, bundle: Bundle) -> None:
    error = parser_error(builder, "MODEL_DESERIALIZE_FAILED", "", "", "Failed to parse the model.")
    parser_fails(builder, error)
    with pytest.raises(EngineError, match="onnx: Failed to parse the model; export"):
        built(bundle)
    parser_fails(builder)
    with pytest.raises(EngineError, match="it gives no reason"):
        built(bundle)


@pytest.mark.parametrize(
    ("errors", "warnings", "said"),
    [
        ([], [], "failed building .*: it gives no reason"),
        (
            ["[graph.cpp::run::12] Error Code 10: Internal Error (Could not find any "
             "implementation for node conv.)", "Error Code 2: consequence"],
            [],
            r"failed building .*: Error Code 10: Internal Error \(Could not find any "
            r"implementation for node conv\.\) \(and 1 more\); `edgeseg doctor`",
        ),
        (
            ["Error Code 1: Cuda Runtime (out of memory)"], [],
            "ran out of memory building .*Cuda Runtime.*close other programs, add swap, .*--size",
        ),
        (["std::bad_alloc"], [], "ran out of memory"),
        (["Requested size was 5 bytes. OutOfMemory"], [], "ran out of memory"),
        (
            ["Error Code 10: Could not find any implementation for node conv"],
            ["Skipping tactic 3 due to insufficient memory on requested size of 4229 detected"],
            "ran out of memory",
        ),
        (
            ["Error Code 4: wrong"],
            ["Skipping tactic 3 due to insufficient memory on requested size of 4229 detected"],
            "failed building",
        ),
    ],
)  # fmt: skip
def test_a_failed_build_says_why(
    builder: Builder, bundle: Bundle, errors: list[str], warnings: list[str], said: str
) -> None:
    def during(network: Any, config: Any) -> None:
        for text in warnings:
            builder.log("WARNING", text)
        for number, text in enumerate(errors):
            builder.log("INTERNAL_ERROR" if number else "ERROR", text)
        builder.log("INFO", "nothing")
        builder.log("VERBOSE", "nothing")

    builder.during = during
    builder.result = None
    with pytest.raises(EngineError, match=said) as caught:
        built(bundle, BuildOptions(workspace_mb=77))
    assert builder.version in str(caught.value)
    if "memory" in said:
        assert "--workspace than 77" in str(caught.value)
    assert bundle.folder is not None
    assert list((bundle.folder / "engines").iterdir()) == []


def test_warnings_are_kept_once(builder: Builder, bundle: Bundle) -> None:
    def during(network: Any, config: Any) -> None:
        for index in range(50):
            builder.log("WARNING", f"Skipping tactic {index} for 0x{index:016x}.")
        builder.log("WARNING", "Something else")

    builder.during = during
    assert built(bundle).warnings == (
        "Skipping tactic 0 for 0x0000000000000000", "Something else",
    )  # fmt: skip


def test_an_engine_that_does_not_load(builder: Builder, bundle: Bundle) -> None:
    builder.trt.when("Runtime.deserialize_cuda_engine", returns=None)
    with pytest.raises(EngineError, match="failed loading the engine it built of"):
        built(bundle)


def test_no_gpu(builder: Builder, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    error = TypeError("pybind11::init(): factory function returned nullptr")
    original: Any = builder.trt.module.Builder

    def refuses(logger: Any) -> Any:
        original(logger)
        builder.log("ERROR", "CUDA initialization failure with error: 35.")
        raise error

    monkeypatch.setattr(builder.trt.module, "Builder", refuses)
    with pytest.raises(EngineError, match=r"cannot use the GPU \(CUDA initialization failure with"):
        built(bundle)


def test_memory_is_checked_before_anything_starts(builder: Builder, bundle: Bundle) -> None:
    cuda = gpu(free=100 << 20)
    with pytest.raises(EngineError, match=r"of the GPU's memory .* 100 MiB and .* are free"):
        built(bundle, cuda=cuda)
    assert builder.names() == []
    assert bundle.folder is not None and not (bundle.folder / "engines").exists()
    built(bundle, BuildOptions(memory_check=False), cuda=cuda)


@pytest.mark.parametrize("version", ["8.5.2.2", "10.1.0", "strange"])
def test_tensorrt_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, version: str
) -> None:
    old = ModuleType("tensorrt")
    monkeypatch.setattr(old, "__version__", version, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(EngineError, match=f"needs TensorRT 10.3 or newer, and {version} is here"):
        built(bundle)


def test_tensorrt_that_is_not_there(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"cannot be imported .*python3-libnvinfer"):
        built(bundle)


# --- progress and Ctrl-C


def test_progress_goes_up_and_says_so_to_tensorrt(builder: Builder, bundle: Bundle) -> None:
    reports: list[tuple[int, int]] = []

    def during(network: Any, config: Any) -> None:
        monitor = config.progress_monitor
        drive = builder.trt.drive
        drive(monitor, "phase_start", "Building Engine", None, 2)
        drive(monitor, "phase_start", "Tactics", "Building Engine", 4)
        for step in range(4):
            assert drive(monitor, "step_complete", "Tactics", step) is True
        drive(monitor, "phase_finish", "Tactics")
        assert drive(monitor, "step_complete", "Building Engine", 0) is True
        assert drive(monitor, "step_complete", "Building Engine", 1) is True
        drive(monitor, "phase_finish", "Building Engine")

    builder.during = during
    built(bundle, report=lambda done, total: reports.append((done, total)))
    done = [share for share, total in reports]
    assert {total for _, total in reports} == {100}
    assert done == sorted(done) and done[0] == 0 and done[-1] == 100
    assert {12, 25, 37, 50} <= set(done)


def test_ctrl_c_stops_the_build(
    builder: Builder, bundle: Bundle, leftovers: Callable[[Path], list[str]]
) -> None:
    steps = []
    ended = []

    def during(network: Any, config: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        builder.trt.drive(config.progress_monitor, "phase_start", "Building", None, 10**6)
        _thread.interrupt_main()
        for step in range(20_000):
            steps.append(step)
            if not builder.trt.drive(config.progress_monitor, "step_complete", "Building", step):
                # TensorRT takes its time to stop, and is waited for.
                threading.Event().wait(0.5)
                builder.result = None
                ended.append(True)
                return
            threading.Event().wait(0.001)

    builder.during = during
    with pytest.raises(KeyboardInterrupt):
        built(bundle)
    assert ended == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert 1 <= len(steps) < 20_000
    assert bundle.folder is not None
    assert list((bundle.folder / "engines").iterdir()) == [] and leftovers(bundle.folder) == []


def test_a_second_ctrl_c_waits_no_longer(builder: Builder, bundle: Bundle) -> None:
    released, ended = threading.Event(), threading.Event()

    def during(network: Any, config: Any) -> None:
        monitor = config.progress_monitor
        builder.trt.drive(monitor, "phase_start", "Building", None, 2)
        _thread.interrupt_main()
        while builder.trt.drive(monitor, "step_complete", "Building", 0):
            threading.Event().wait(0.001)
        _thread.interrupt_main()
        released.wait(10)
        ended.set()

    builder.during = during
    builder.result = None
    with pytest.raises(KeyboardInterrupt):
        built(bundle)
    assert not ended.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    released.set()


def test_building_in_another_thread(builder: Builder, bundle: Bundle) -> None:
    # Where no signal handler can be set.
    plans: list[Plan] = []
    thread = threading.Thread(target=lambda: plans.append(built(bundle)))
    thread.start()
    thread.join()
    assert plans[0].read() == PLAN


def test_shares_of_nested_phases() -> None:
    shown: list[int] = []
    progress = BuildProgress(lambda done, total: shown.append(done))
    progress.start("root", "", 4)
    progress.step("root", 0)
    assert shown[-1] == 25
    progress.start("inner", "root", 2)
    progress.step("inner", 0)
    assert shown[-1] == 37
    progress.start("deep", "inner", 5)
    progress.step("deep", 4)
    assert shown[-1] == 50
    # A phase that ends early or comes again takes nothing back.
    progress.finish("inner")
    progress.start("inner", "root", 9)
    assert shown[-1] == 50
    progress.step("unknown", 3)
    progress.finish("unknown")
    progress.step("root", 99)
    assert shown[-1] == 100 and shown == sorted(shown)
    assert progress.step("root", 3) is True
    progress.cancel()
    assert progress.step("root", 3) is False


def test_progress_without_steps() -> None:
    progress = BuildProgress(None)
    progress.start("root", None, 0)
    assert progress.step("root", 0) is True
    progress.finish("root")


# --- the log


def test_log() -> None:
    log = Log()
    assert log.cause() == "" and log.warnings() == [] and not log.out_of_memory()
    log.error("  first\n line. ")
    log.error("second")
    assert log.cause() == "first line (and 1 more)"
    log.forget_errors()
    log.error("Error Code 1: Cuda Runtime (cudaErrorMemoryAllocation)")
    assert log.out_of_memory()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("plain", "plain"),
        (" two\n  lines. ", "two lines"),
        ("[graph.cpp::run::12] Error Code 1: x", "Error Code 1: x"),
        ("IBuilder::buildSerializedNetwork: Error Code 1: x", "Error Code 1: x"),
        ("[optimizer.cpp::f::1] IRuntime::deserialize: y", "y"),
        ("Weights [1,2] are wrong", "Weights [1,2] are wrong"),
    ],
)
def test_messages_are_tidied(message: str, said: str) -> None:
    assert tidy(message) == said


def test_one_logger_for_the_whole_process(builder: Builder) -> None:
    first, second = Log(), Log()
    trt: Any = builder.trt.module
    with listening(first) as logger:
        # Both are empty, and equal; each stops listening for itself.
        with listening(second):
            pass
        builder.trt.drive(logger, "log", trt.ILogger.ERROR, "one")
        with listening(second) as other:
            # TensorRT keeps the first for good.
            assert other is logger
            builder.trt.drive(logger, "log", trt.ILogger.WARNING, "two")
        builder.trt.drive(logger, "log", trt.ILogger.INTERNAL_ERROR, "three")
    builder.trt.drive(logger, "log", trt.ILogger.ERROR, "nobody listens")
    assert (first.errors, first.warnings()) == (["one", "three"], ["two"])
    assert (second.errors, second.warnings()) == ([], ["two"])


# --- the command


class Opened:
    """An engine that was opened to be checked."""

    description = "TensorRT of a test"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, bool | None]] = []
        self.closed = 0

    def open(
        self, bundle: Bundle, name: str | None = None, *, compiled_head: bool | None = None
    ) -> Opened:
        self.asked.append((bundle.name, name, compiled_head))
        return self

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """The machine of a Jetson's user: a GPU, no plugin library, engines that open."""
    made = Opened()
    monkeypatch.setattr("edgeseg.engine.cuda.open_cuda", closing_gpu)
    library = importlib.import_module("edgeseg.kernels.build")  # the function has its name
    monkeypatch.setattr(library, "find_plugin_library", lambda major: None)
    monkeypatch.setattr("edgeseg.engine.open_engine", made.open)
    return made


def closing_gpu() -> Any:
    made: Any = Gpu()
    made.close = lambda: None
    return made


def test_the_command_builds_once(
    builder: Builder,
    bundle_folder: Path,
    opened: Opened,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["build", str(bundle_folder), "--level", "4", "--json", str(tmp_path / "plan.json")]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "no plan has been built here yet" in told.err
    assert "checked with the golden picture on TensorRT of a test" in told.out
    assert "1 layers; with weights: 1 fp32" in told.out
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["tensorrt"] == builder.version
    assert (written["options"]["level"], written["options"]["plugins"]) == (4, False)
    assert main(command) == 0
    assert "a plan that fits is here" in capsys.readouterr().err
    assert len(builder.trt.named("Builder.build_serialized_network")) == 1
    assert main([*command, "--force"]) == 0
    assert main(["build", str(bundle_folder), "--level", "2", "--tf32"]) == 0
    assert "level 4" in capsys.readouterr().err
    assert len(builder.trt.named("Builder.build_serialized_network")) == 3
    assert builder.flags() == {"TF32": True}
    # Each plan was opened, which is where the golden picture is compared.
    assert opened.asked == [(bundle_folder_name(bundle_folder), "tensorrt", False)] * 4
    assert opened.closed == 4


def bundle_folder_name(folder: Path) -> str:
    return Bundle.open(folder).name


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--level", "6"], 2, "level is 0 .* to 5"),
        (["--plugins"], 1, "library is not here; `edgeseg kernels build --tensorrt`"),
        (["--dla", "0"], 2, "DLA"),
    ],
)
def test_the_command_says_what_is_wrong(
    builder: Builder,
    bundle_folder: Path,
    opened: Opened,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    assert main(["build", str(bundle_folder), *arguments]) == code
    assert re.search(words, capsys.readouterr().err)
    assert opened.asked == []


def test_the_command_without_tensorrt(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(["build", str(bundle_folder)]) == 1
    said = capsys.readouterr().err
    assert "the engine tensorrt is not installed; `pip install tensorrt`" in said
    assert "python3-libnvinfer" in said
