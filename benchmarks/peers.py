"""Other tools' INT8: one of their configurations, run on one network. It runs in their environment.

`bench_quantization.py` starts it once per configuration, in the virtual environment that has the
tools, which is not the project's own; nothing of EdgeSeg is imported here.

    python benchmarks/peers.py CONFIGURATION MODEL.onnx FRAMES.npy OUT
    python benchmarks/peers.py --versions

MODEL has one input, uint8 (1, H, W, 3), and FRAMES is (N, H, W, 3) uint8. OUT is an ONNX file
with QuantizeLinear and DequantizeLinear, or, for NNCF, an OpenVINO IR (.xml, with its .bin).

Every tool is used as its own documentation says, over the switches that decide accuracy; where a
default is to run on a GPU, or to lower the rest to fp16, it is set to the CPU and fp32.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CONFIGURATIONS",
    "PINNED",
    "TOOLS",
    "Configuration",
    "ModelOpt",
    "Nncf",
    "OnnxRuntime",
    "versions",
]

#: what the environment holds; the tools' other dependencies follow from these
PINNED = (
    "cppimport==26.4.17",
    "lief==1.0.0",
    "ml_dtypes==0.6.0",
    "nncf==3.4.0",
    "numpy==2.4.6",
    "nvidia-modelopt==0.47.0",
    "onnx==1.23.2",
    "onnx-graphsurgeon==0.6.1",
    "onnxconverter-common==1.16.0",
    "onnxruntime==1.31.1",
    "onnxscript==0.7.2",
    "onnxslim==0.1.98",
    "openvino==2026.4.1",
    "polygraphy==0.53.6",
    "scipy==1.17.1",
    "torch==2.13.0",
)

# Frames whose activations a calibrator keeps at once. It divides the number of frames.
_AT_ONCE = 5


@dataclass(frozen=True)
class OnnxRuntime:
    """`onnxruntime.quantization.quantize_static`: Q/DQ, weights per channel, preprocessed.

    ``calibrator``: how activations get their range. ``scope``: every operator that it knows, or
    convolutions alone. ``signed``: symmetric int8 activations, as TensorRT takes them; otherwise
    asymmetric uint8, its own default.
    """

    tool: ClassVar[str] = "ort"
    suffix: ClassVar[str] = ".onnx"

    calibrator: Literal["minmax", "entropy", "p99.99", "p99.999"]
    scope: Literal["all", "conv"]
    signed: bool = True

    @property
    def name(self) -> str:
        """What the command line calls it."""
        kind = "" if self.signed else "-uint8"
        return f"{self.tool}-{self.calibrator}-{self.scope}{kind}"

    def quantize(self, model: Path, frames: NDArray[np.uint8], out: Path) -> None:
        """Writes the INT8 form of ``model`` to ``out``."""
        quantization: Any = importlib.import_module("onnxruntime.quantization")
        shape_inference: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
        method = quantization.CalibrationMethod
        kind = quantization.QuantType
        options: dict[str, Any] = {
            "ActivationSymmetric": self.signed,
            "CalibTensorRangeSymmetric": self.signed,
            "WeightSymmetric": True,
            # Despite its name it works for every calibrator; the results are the same.
            "CalibStridedMinMax": _AT_ONCE if len(frames) % _AT_ONCE == 0 else 1,
        }
        if self.calibrator == "minmax":
            calibrate = method.MinMax
        elif self.calibrator == "entropy":
            calibrate = method.Entropy
        else:
            calibrate = method.Percentile
            options["CalibPercentile"] = float(self.calibrator.removeprefix("p"))
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            shape_inference.quant_pre_process(str(model), str(prepared))
            quantization.quantize_static(
                str(prepared),
                str(out),
                _Reader(_input_name(model), frames),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=None if self.scope == "all" else ["Conv"],
                per_channel=True,
                activation_type=kind.QInt8 if self.signed else kind.QUInt8,
                weight_type=kind.QInt8,
                calibrate_method=calibrate,
                extra_options=options,
            )


@dataclass(frozen=True)
class Nncf:
    """`nncf.quantize` on the network as OpenVINO reads it, saved as OpenVINO IR.

    ``preset``: activations symmetric (performance, its default) or asymmetric (mixed).
    ``bias_correction``: its fast one, the default, or the thorough one. ``folded``: the network
    read by `openvino.convert_model`, which folds constants; `Core.read_model` leaves every bias
    behind a computation of shapes, where NNCF finds none to correct.
    """

    tool: ClassVar[str] = "nncf"
    suffix: ClassVar[str] = ".xml"

    preset: Literal["performance", "mixed"]
    bias_correction: Literal["fast", "thorough"]
    folded: bool = True

    @property
    def name(self) -> str:
        """What the command line calls it."""
        kind = "" if self.folded else "-unfolded"
        return f"{self.tool}-{self.preset}-{self.bias_correction}{kind}"

    def quantize(self, model: Path, frames: NDArray[np.uint8], out: Path) -> None:
        """Writes the INT8 form of ``model`` to ``out``."""
        openvino: Any = importlib.import_module("openvino")
        nncf: Any = importlib.import_module("nncf")
        read = openvino.convert_model if self.folded else openvino.Core().read_model
        quantized = nncf.quantize(
            read(str(model)),
            nncf.Dataset([frame[None] for frame in frames]),
            preset=nncf.QuantizationPreset(self.preset),
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(frames),
            fast_bias_correction=self.bias_correction == "fast",
        )
        openvino.save_model(quantized, str(out), compress_to_fp16=False)


@dataclass(frozen=True)
class ModelOpt:
    """`modelopt.onnx.quantization.quantize`: Q/DQ where TensorRT wants it.

    ``calibrator``: how activations get their range. ``scope``: its own choice of operators, or
    convolutions alone.
    """

    tool: ClassVar[str] = "modelopt"
    suffix: ClassVar[str] = ".onnx"

    calibrator: Literal["entropy", "max"]
    scope: Literal["all", "conv"]

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return f"{self.tool}-{self.calibrator}-{self.scope}"

    def quantize(self, model: Path, frames: NDArray[np.uint8], out: Path) -> None:
        """Writes the INT8 form of ``model`` to ``out``."""
        quantization: Any = importlib.import_module("modelopt.onnx.quantization")
        quantization.quantize(
            str(model),
            quantize_mode="int8",
            calibration_data={_input_name(model): frames},
            calibration_method=self.calibrator,
            calibration_eps=["cpu"],
            op_types_to_quantize=None if self.scope == "all" else ["Conv"],
            high_precision_dtype="fp32",
            output_path=str(out),
        )


Configuration = OnnxRuntime | Nncf | ModelOpt

#: name -> configuration, tool by tool
CONFIGURATIONS: dict[str, Configuration] = {
    found.name: found
    for found in (
        OnnxRuntime("minmax", "all"),
        OnnxRuntime("minmax", "conv"),
        OnnxRuntime("entropy", "all"),
        OnnxRuntime("entropy", "conv"),
        OnnxRuntime("p99.99", "all"),
        OnnxRuntime("p99.99", "conv"),
        OnnxRuntime("p99.999", "all"),
        OnnxRuntime("p99.999", "conv"),
        OnnxRuntime("minmax", "conv", signed=False),
        OnnxRuntime("entropy", "conv", signed=False),
        OnnxRuntime("p99.999", "conv", signed=False),
        Nncf("performance", "fast"),
        Nncf("performance", "thorough"),
        Nncf("mixed", "fast"),
        Nncf("mixed", "thorough"),
        Nncf("performance", "fast", folded=False),
        ModelOpt("entropy", "all"),
        ModelOpt("entropy", "conv"),
        ModelOpt("max", "all"),
        ModelOpt("max", "conv"),
    )
}

TOOLS = tuple(dict.fromkeys(found.tool for found in CONFIGURATIONS.values()))


class _Reader:
    """The frames, one by one, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, name: str, frames: NDArray[np.uint8]) -> None:
        self._name = name
        self._frames = frames
        self._rest: Iterator[NDArray[np.uint8]] = iter(frames)

    def __len__(self) -> int:
        return len(self._frames)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Only these frames from now on."""
        self._rest = iter(self._frames[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The next frame, None after the last."""
        frame = next(self._rest, None)
        return None if frame is None else {self._name: frame[None]}


def _input_name(model: Path) -> str:
    onnx: Any = importlib.import_module("onnx")
    name: str = onnx.load(str(model)).graph.input[0].name
    return name


def versions() -> dict[str, str]:
    """What is installed of ``PINNED``, and Python: package -> version."""
    found = {"python": platform.python_version()}
    for requirement in PINNED:
        package = requirement.partition("==")[0]
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: list[str]) -> int:
    """One configuration on one network; 2 for a wrong request, an exception where a tool fails."""
    if arguments == ["--versions"]:
        print(json.dumps(versions()))
        return 0
    if len(arguments) != 4 or arguments[0] not in CONFIGURATIONS:
        print("usage: peers.py CONFIGURATION MODEL.onnx FRAMES.npy OUT", file=sys.stderr)
        print(f"configurations: {', '.join(CONFIGURATIONS)}", file=sys.stderr)
        return 2
    import numpy as np

    configuration = CONFIGURATIONS[arguments[0]]
    model, frames, out = (Path(argument) for argument in arguments[1:])
    configuration.quantize(model, np.load(frames), out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
