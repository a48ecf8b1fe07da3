"""The double of TensorRT: the same answers as the real bindings, where those answer on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.tensorrt.double import _CALLBACKS, Call, Double, MissingStub
from tests.tensorrt.real import outcome
from tests.tensorrt.stubs import RELEASES, Release, StubsError, bindings_environment, reason_missing

LISTENER = "class Own(trt.{0}):\n  def __init__(self): {1}\n; Own() and None"

EXPRESSIONS = [
    # Enums.
    "trt.BuilderFlag.TF32",
    "repr(trt.BuilderFlag.TF32)",
    "trt.BuilderFlag.TF32.name",
    "trt.BuilderFlag.TF32.value",
    "int(trt.BuilderFlag.TF32)",
    "hash(trt.BuilderFlag.TF32)",
    "1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)",
    "trt.BuilderFlag.TF32 == trt.BuilderFlag.TF32",
    "trt.BuilderFlag.TF32 != trt.BuilderFlag.REFIT",
    "trt.BuilderFlag.TF32 == int(trt.BuilderFlag.TF32)",
    "trt.BuilderFlag.TF32 == trt.DataType(int(trt.BuilderFlag.TF32))",
    "trt.BuilderFlag.TF32 | trt.BuilderFlag.REFIT",
    "trt.BuilderFlag.TF32 + 1",
    "trt.BuilderFlag(int(trt.BuilderFlag.REFIT))",
    "trt.BuilderFlag.NO_SUCH_FLAG",
    "trt.BuilderFlag.FP16",
    "trt.BuilderFlag.INT8",
    "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    "trt.Logger.WARNING is trt.ILogger.Severity.WARNING",
    "trt.Logger.WARNING == trt.ILogger.Severity.WARNING",
    "trt.ILogger.WARNING",
    "trt.ILogger.Severity.ERROR < trt.ILogger.Severity.INFO",
    "trt.ILogger.Severity.ERROR < 3",
    "len(trt.BuilderFlag.__members__)",
    "trt.DataType.HALF == trt.float16",
    "[trt.float32.itemsize, trt.float16.itemsize, trt.int8.itemsize]",
    # Names.
    "trt.IBuilder",
    "trt.no_such_function()",
    "trt.IInt8Calibrator and None",
    "trt.init_libnvinfer_plugins(1, 2)",
    "trt.init_libnvinfer_plugins()",
    # Classes that TensorRT makes.
    "trt.IBuilderConfig()",
    "trt.ICudaEngine()",
    "trt.IExecutionContext()",
    "trt.IHostMemory()",
    # Loggers.
    "trt.Logger() and None",
    "trt.Logger(trt.Logger.INFO) and None",
    "trt.Logger(min_severity=trt.Logger.INFO) and None",
    "trt.Logger(severity=trt.Logger.INFO)",
    "trt.Logger('verbose')",
    "trt.Logger(trt.BuilderFlag.TF32)",
    "trt.Logger(trt.Logger.INFO).min_severity",
    "trt.Logger().no_such_attribute",
    "setattr(trt.Logger(), 'no_such_attribute', 1)",
    "setattr(trt.Logger(), 'min_severity', 'verbose')",
    "log = trt.Logger(trt.Logger.ERROR); log.min_severity = trt.Logger.INFO; log.min_severity",
    "trt.Logger(trt.Logger.ERROR).log(trt.Logger.VERBOSE, 'text')",
    "trt.Logger(trt.Logger.ERROR).log(severity=trt.Logger.VERBOSE, msg='text')",
    "trt.Logger(trt.Logger.ERROR).log(trt.Logger.VERBOSE, message='text')",
    "trt.Logger(trt.Logger.ERROR).log(trt.Logger.VERBOSE)",
    "trt.Logger(trt.Logger.ERROR).log(trt.Logger.VERBOSE, 3)",
    "trt.Logger(trt.Logger.ERROR).log(4, 'text')",
    "trt.Logger(trt.Logger.ERROR).log(trt.Logger.VERBOSE, 'text', 'more')",
    # Objects that need TensorRT itself.
    "trt.Builder()",
    "trt.Builder('logger')",
    "trt.Runtime(logger=3)",
    "trt.OnnxParser(1, 2)",
    # Sizes.
    "trt.Dims()",
    "trt.Dims((1, 2))",
    "trt.Dims([4])",
    "trt.Dims(3)",
    "trt.Dims('ab')",
    "trt.Dims((1, 2)) == (1, 2)",
    "tuple(trt.Dims((1, 2)))",
    "len(trt.Dims((1, 2)))",
    "trt.Dims((1, 2))[1]",
    "trt.Dims((1, 2))[2]",
    "trt.volume((2, 3))",
    "trt.volume(trt.Dims((2, 3)))",
    "trt.nptype(trt.float16)",
    "trt.nptype(trt.int8)",
    "trt.nptype(trt.bfloat16)",
    # Fields of plugins.
    "trt.PluginField('name').name",
    "trt.PluginField(3)",
    "setattr(trt.PluginField('name'), 'type', 3)",
    "setattr(trt.PluginField('name'), 'no_such_attribute', 3)",
    "field = trt.PluginField('name'); field.type = trt.PluginFieldType.INT32; field.type",
    "len(trt.PluginFieldCollection([trt.PluginField('name'), trt.PluginField('other')]))",
    "trt.PluginFieldCollection([trt.PluginField('name')])[0].name",
    # Interfaces that Python derives from.
    *(
        LISTENER.format(name, started)
        for name in (
            "ILogger", "IProgressMonitor", "IOutputAllocator", "IErrorRecorder", "IProfiler",
            "IDebugListener",
        )
        for started in ("pass", "super().__init__()", f"trt.{name}.__init__(self)")
    ),
    "class Own(trt.ILogger):\n  pass\n; Own() and None",
    "class Own(trt.ILogger):\n  def __init__(self):\n    super().__init__()\n    self.own = 3\n; "
    "Own().own",
]  # fmt: skip


class Real(NamedTuple):
    """Answers of the real bindings: names by their class, outcomes, callbacks."""

    release: Release
    names: dict[str, list[str]]
    outcomes: list[str]
    callbacks: list[tuple[str, str, int]]


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: str(release.name))
def real(request: pytest.FixtureRequest) -> Real:
    """Names and outcomes of the real bindings of a release."""
    release: Release = request.param
    reason = reason_missing(release)
    if reason is not None:
        pytest.skip(reason)
    try:
        environment = bindings_environment(release)
    except StubsError as error:
        pytest.skip(f"no bindings of TensorRT {release.name}: {error}")
    answer = subprocess.run(
        [sys.executable, Path(__file__).parent / "real.py"],
        input=json.dumps(EXPRESSIONS),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return Real(release, *json.loads(answer.stdout.splitlines()[-1]))


def test_outcomes_are_those_of_the_real_bindings(real: Real) -> None:
    trt = Double(real.release).module
    found = {expression: outcome(expression, trt) for expression in EXPRESSIONS}
    assert found == dict(zip(EXPRESSIONS, real.outcomes, strict=True))
    # The table has both kinds, on every release.
    assert {"TypeError", "AttributeError", "None", "True"} < set(real.outcomes)


def test_callbacks_are_those_of_the_real_bindings(real: Real) -> None:
    callbacks: dict[str, dict[str, int]] = {}
    for interface, name, count in real.callbacks:
        callbacks.setdefault(interface, {})[name] = count
    assert callbacks == {name: _CALLBACKS[name] for name in callbacks}
    assert set(callbacks) == {"ILogger", "IProgressMonitor", "IProfiler", "IErrorRecorder"}


def test_names_are_those_of_the_real_bindings(real: Real) -> None:
    trt = Double(real.release).module
    inside = {
        "os", "sys", "ctypes", "warnings", "tensorrt", "common_enter", "common_exit",
        "attr", "value",
    }  # fmt: skip
    assert len(real.names) > 150
    for owner, expected in real.names.items():
        place: Any = trt
        for part in filter(None, owner.split(".")):
            place = getattr(place, part)
        found = {name for name in dir(place) if not name.startswith("_")}
        missing = set(expected) - found - (set() if owner else inside)
        assert (owner, missing) == (owner, set())
        assert (owner, found - set(expected)) == (owner, set())


def test_enums_differ_between_releases(tensorrt: Double) -> None:
    import tensorrt as trt  # the double

    old = tensorrt.release.major == 10
    for flag in ("FP16", "INT8", "BF16", "OBEY_PRECISION_CONSTRAINTS"):
        assert hasattr(trt.BuilderFlag, flag) is old
    assert int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == (1 if old else 0)
    assert hasattr(trt.BuilderFlag, "TF32")
    assert trt.__version__ == tensorrt.release.version


# --- calls


@pytest.fixture
def config(tensorrt: Double) -> Any:
    return tensorrt.new("IBuilderConfig")


def test_calls_are_recorded_in_order(tensorrt: Double) -> None:
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, pool_size=1 << 30)
    config.builder_optimization_level = 4
    config.set_flag(trt.BuilderFlag.TF32)
    assert tensorrt.calls == [
        Call(logger, "Logger.__init__", {"min_severity": trt.Logger.ERROR}),
        Call(builder, "Builder.__init__", {"logger": logger}),
        Call(builder, "Builder.create_builder_config", {}),
        Call(
            config,
            "IBuilderConfig.set_memory_pool_limit",
            {"pool": trt.MemoryPoolType.WORKSPACE, "pool_size": 1 << 30},
        ),
        Call(config, "IBuilderConfig.builder_optimization_level", {"value": 4}),
        Call(config, "IBuilderConfig.set_flag", {"flag": trt.BuilderFlag.TF32}),
    ]
    assert config.builder_optimization_level == 4
    assert [call.arguments["flag"].name for call in tensorrt.named("IBuilderConfig.set_flag")] == [
        "TF32"
    ]


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((), {}),
        (("WORKSPACE",), {}),
        (("WORKSPACE", 1, 2), {}),
        (("WORKSPACE", "1"), {}),
        (("WORKSPACE", 1.5), {}),
        (("WORKSPACE", None), {}),
        (("WORKSPACE", True), {}),
        ((0, 1), {}),
        (("WORKSPACE",), {"size": 1}),
        (("WORKSPACE", 1), {"pool_size": 1}),
    ],
)
def test_wrong_arguments_are_refused(
    tensorrt: Double, config: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    pools = tensorrt.module.MemoryPoolType
    given = [pools.WORKSPACE if value == "WORKSPACE" else value for value in arguments]
    with pytest.raises(TypeError, match=r"set_memory_pool_limit\(\): incompatible arguments"):
        config.set_memory_pool_limit(*given, **keywords)
    assert tensorrt.calls == []


def test_numbers_of_numpy_are_numbers(tensorrt: Double, config: Any) -> None:
    config.set_memory_pool_limit(tensorrt.module.MemoryPoolType.WORKSPACE, np.int64(5))
    assert len(tensorrt.named("IBuilderConfig.set_memory_pool_limit")) == 1


def test_unknown_names_are_refused(tensorrt: Double, config: Any) -> None:
    with pytest.raises(AttributeError):
        config.set_max_workspace_size(1)
    with pytest.raises(AttributeError, match="max_workspace_size"):
        config.max_workspace_size = 1
    with pytest.raises(AttributeError):
        config.num_optimization_profiles = 1  # can be read only
    with pytest.raises(AttributeError, match=r"no 'IBuilderConfig\.set_max_workspace_size'"):
        tensorrt.when("IBuilderConfig.set_max_workspace_size", returns=1)
    with pytest.raises(AttributeError, match="no class 'IBuilder'"):
        tensorrt.new("IBuilder")
    with pytest.raises(AttributeError, match="no property 'layers'"):
        tensorrt.new("ICudaEngine", layers=3)


def test_wrong_values_of_properties_are_refused(tensorrt: Double, config: Any) -> None:
    for name, value in (
        ("builder_optimization_level", "high"),
        ("profiling_verbosity", 2),
        ("progress_monitor", "monitor"),
    ):
        with pytest.raises(TypeError, match=name):
            setattr(config, name, value)
    config.profiling_verbosity = tensorrt.module.ProfilingVerbosity.DETAILED
    config.progress_monitor = None


def test_overloads(tensorrt: Double) -> None:
    context = tensorrt.new("IExecutionContext")
    for shape in ((1, 2), [1, 2], tensorrt.module.Dims((1, 2))):
        assert context.set_input_shape("image", shape) is True
    with pytest.raises(TypeError, match="set_input_shape"):
        context.set_input_shape("image", 3)
    with pytest.raises(TypeError, match="set_input_shape"):
        context.set_input_shape((1, 2), "image")


def test_dims_are_made_of_sequences(tensorrt: Double) -> None:
    profile = tensorrt.new("IOptimizationProfile")
    profile.set_shape("image", (1, 3), [2, 3], tensorrt.module.Dims((4, 3)))
    with pytest.raises(TypeError):
        profile.set_shape("image", 1, 2, 4)


# --- behaviour


def test_defaults(tensorrt: Double) -> None:
    trt = tensorrt.module
    runtime = trt.Runtime(trt.Logger())
    engine = runtime.deserialize_cuda_engine(b"plan")
    assert isinstance(engine, trt.ICudaEngine)
    assert engine.num_io_tensors == 0
    assert engine.get_tensor_name(0) == ""
    assert engine.is_shape_inference_io("image") is True
    assert engine.get_tensor_dtype("image") is trt.DataType.FLOAT
    assert tuple(engine.get_tensor_shape("image")) == ()
    first, second = engine.create_execution_context(), engine.create_execution_context()
    assert isinstance(first, trt.IExecutionContext) and first is not second


def test_behaviour_of_methods(tensorrt: Double) -> None:
    trt = tensorrt.module
    names = ["image", "class_map"]
    tensorrt.when("ICudaEngine.num_io_tensors", returns=2)
    tensorrt.when("ICudaEngine.get_tensor_name", does=lambda engine, index: names[index])
    tensorrt.when("ICudaEngine.get_tensor_shape", returns=(1, 32, 48))
    tensorrt.when("ICudaEngine.get_tensor_dtype", returns=trt.uint8)
    engine, other = tensorrt.new("ICudaEngine"), tensorrt.new("ICudaEngine", name="other")
    tensorrt.when("ICudaEngine.num_io_tensors", returns=3, on=other)
    assert [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)] == names
    assert tuple(engine.get_tensor_shape("image")) == (1, 32, 48)
    assert (other.num_io_tensors, other.name) == (3, "other")
    tensorrt.when("Runtime.deserialize_cuda_engine", returns=None)
    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"plan") is None
    tensorrt.when("ICudaEngine.create_execution_context", raises=MemoryError("all of it"))
    with pytest.raises(MemoryError, match="all of it"):
        engine.create_execution_context()


def test_behaviour_that_the_signature_does_not_promise(tensorrt: Double) -> None:
    tensorrt.when("ICudaEngine.num_io_tensors", returns="two")
    with pytest.raises(TypeError, match=r"lets ICudaEngine\.num_io_tensors give 'two'"):
        _ = tensorrt.new("ICudaEngine").num_io_tensors
    tensorrt.when("IExecutionContext.execute_async_v3", returns=None)
    with pytest.raises(TypeError, match="execute_async_v3"):
        tensorrt.new("IExecutionContext").execute_async_v3(1)


def test_behaviour_of_functions_and_base_classes(tensorrt: Double) -> None:
    trt = tensorrt.module
    registry = tensorrt.new("IPluginRegistry")
    tensorrt.when("get_plugin_registry", returns=registry)
    assert trt.get_plugin_registry() is registry
    layer = tensorrt.new("IShuffleLayer")
    tensorrt.when("ILayer.get_output_type", returns=trt.float16)
    assert layer.get_output_type(0) is trt.float16
    assert [call.owner for call in tensorrt.named("ILayer.get_output_type")] == [layer]
    assert tensorrt.named("IResizeLayer.get_output_type") == []


def test_host_memory(tensorrt: Double, tmp_path: Path) -> None:
    trt = tensorrt.module
    content = bytes(range(256))
    plan = tensorrt.host_memory(content)
    assert isinstance(plan, trt.IHostMemory)
    assert (plan.nbytes, bytes(plan), bytes(memoryview(plan)[:2])) == (256, content, b"\0\1")
    (tmp_path / "plan").write_bytes(plan)
    assert (tmp_path / "plan").read_bytes() == content
    trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan)
    with pytest.raises(TypeError):
        len(plan)
    with pytest.raises(TypeError):
        trt.Runtime(trt.Logger()).deserialize_cuda_engine("plan.engine")


# --- callbacks


def test_listener_is_driven(tensorrt: Double, config: Any) -> None:
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[object] = []

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.seen.append((phase, parent, steps))

        def step_complete(self, phase: str, step: int) -> bool:
            self.seen.append(step)
            return True

        def phase_finish(self, phase: str) -> None:
            self.seen.append(phase)

    monitor = Monitor()
    config.progress_monitor = monitor
    registered = config.progress_monitor
    tensorrt.drive(registered, "phase_start", "Building", None, 2)
    assert tensorrt.drive(registered, "step_complete", "Building", 0) is True
    tensorrt.drive(registered, "phase_finish", "Building")
    assert monitor.seen == [("Building", None, 2), 0, "Building"]
    with pytest.raises(TypeError, match="calls no 'phase_end'"):
        tensorrt.drive(registered, "phase_end", "Building")
    with pytest.raises(TypeError, match="with 3 arguments"):
        tensorrt.drive(registered, "phase_start", "Building", 2)


def test_override_that_cannot_be_called_as_tensorrt_calls_it(tensorrt: Double) -> None:
    import tensorrt as trt

    with pytest.raises(TypeError, match="phase_start is called with 3 arguments"):

        class Monitor(trt.IProgressMonitor):
            def phase_start(self, phase: str, steps: int) -> None: ...


def test_listener_that_lacks_a_method(tensorrt: Double) -> None:
    import tensorrt as trt

    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            super().__init__()

        # The name in the stub file; what TensorRT looks up is get_num_errors.
        def num_errors(self) -> int:
            return 0

        def get_error_code(self, index: int) -> Any: ...
        def get_error_desc(self, index: int) -> Any: ...
        def has_overflowed(self) -> Any: ...
        def clear(self) -> None: ...
        def report_error(self, code: object, description: str) -> Any: ...

    with pytest.raises(TypeError, match=r"does not override IErrorRecorder\.get_num_errors"):
        trt.Runtime(trt.Logger()).error_recorder = Recorder()
    with pytest.raises(TypeError, match="has to return bool, and gave None"):
        tensorrt.drive(Recorder(), "report_error", trt.ErrorCodeTRT.SUCCESS, "text")


def test_listener_whose_base_was_not_started(tensorrt: Double) -> None:
    import tensorrt as trt

    class Allocator(trt.IOutputAllocator):
        def __init__(self) -> None:
            self.addresses: dict[str, int] = {}

    with pytest.raises(TypeError, match=r"IOutputAllocator.__init__\(\) must be called"):
        Allocator()


def test_context_managers_are_deprecated(tensorrt: Double) -> None:
    trt = tensorrt.module
    with pytest.warns(DeprecationWarning, match="deprecated"):
        trt.Builder(trt.Logger()).__enter__()


def test_double_of_a_release_without_stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.tensorrt.stubs.BUILD", tmp_path)
    with pytest.raises(MissingStub, match="make tensorrt-stubs"):
        Double.of("10.3")
