"""Speeds that others have published, against which the estimate is calibrated and checked.

Facts only: what ran where, at which size and precision, and how fast. ``runtime`` says by what:
``tensorrt`` an engine alone; ``eager`` a framework that runs operator by operator; ``split`` an
engine for the network, with the framework behind it for boxes and masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeseg.estimate.layers import Wanted

__all__ = ["PUBLISHED", "Measured", "Runtime"]

Runtime = Literal["tensorrt", "split", "eager"]


@dataclass(frozen=True)
class Measured:
    """One published speed of ``model`` at ``height`` x ``width`` on ``device``, batch 1."""

    table: str
    model: str
    height: int
    width: int
    device: str
    precision: Wanted
    fps: float
    runtime: Runtime
    source: str

    @property
    def ms(self) -> float:
        """Milliseconds a picture."""
        return 1e3 / self.fps


_BISENET = "CoinCheung/BiSeNet, README.md"
_PAPER = "Yu et al. 2020, arXiv 2004.02147"
_HARDNET = "PingoLH/FCHarDNet, README.md"
_YOLACT = "dbolya/yolact, README.md"
_EDGE = "haotian-liu/yolact_edge, README.md"
_MMDEPLOY = "open-mmlab/mmdeploy, docs/en/03-benchmark/benchmark.md"
_JETSON = "dusty-nv/jetson-inference, docs/segnet-console-2.md"
_TORCH2TRT = "NVIDIA-AI-IOT/torch2trt, benchmarks/JETSON_XAVIER.md"
_NANOSAM = "NVIDIA-AI-IOT/nanosam, README.md"


def _rows(
    table: str, source: str, runtime: Runtime, *rows: tuple[str, int, int, str, Wanted, float]
) -> tuple[Measured, ...]:
    return tuple(
        Measured(table, model, height, width, device, precision, fps, runtime, source)
        for model, height, width, device, precision, fps in rows
    )


def _fcn_resnet18(height: int, width: int, nano: float, xavier: float) -> tuple[Measured, ...]:
    return _rows(
        "FCN-ResNet18, TensorRT", _JETSON, "tensorrt",
        ("fcn_resnet18", height, width, "nano", "fp16", nano),
        ("fcn_resnet18", height, width, "agx-xavier", "fp16", xavier),
    )  # fmt: skip


#: every published speed, table by table
PUBLISHED: tuple[Measured, ...] = (
    *_rows(
        "BiSeNet on A40, TensorRT 10.3", _BISENET, "tensorrt",
        ("bisenetv1", 1024, 2048, "a40", "fp32", 112),
        ("bisenetv1", 1024, 2048, "a40", "fp16", 239),
        ("bisenetv1", 1024, 2048, "a40", "int8", 435),
        ("bisenetv2", 1024, 2048, "a40", "fp32", 103),
        ("bisenetv2", 1024, 2048, "a40", "fp16", 161),
        ("bisenetv2", 1024, 2048, "a40", "int8", 198),
    ),
    *_rows(
        "BiSeNet on T4, TensorRT 8.2", f"{_BISENET}, before October 2024", "tensorrt",
        ("bisenetv1", 1024, 2048, "t4", "fp32", 25),
        ("bisenetv1", 1024, 2048, "t4", "fp16", 78),
        ("bisenetv1", 1024, 2048, "t4", "int8", 141),
        ("bisenetv2", 1024, 2048, "t4", "fp32", 26),
        ("bisenetv2", 1024, 2048, "t4", "fp16", 67),
        ("bisenetv2", 1024, 2048, "t4", "int8", 95),
    ),
    # The second ran at 720x960, which its strides do not divide.
    *_rows(
        "BiSeNetV2 paper, TensorRT 5.1", _PAPER, "tensorrt",
        ("bisenetv2", 512, 1024, "gtx-1080-ti", "fp32", 156),
        ("bisenetv2", 736, 960, "gtx-1080-ti", "fp32", 124.5),
    ),
    *_rows(
        "MMDeploy, TensorRT 7.2", _MMDEPLOY, "tensorrt",
        ("maskrcnn_resnet50_fpn", 800, 1344, "t4", "fp32", 1e3 / 104.83),
        ("maskrcnn_resnet50_fpn", 800, 1344, "t4", "fp16", 1e3 / 58.27),
        ("fcn_r50_d8", 512, 1024, "t4", "fp32", 1e3 / 128.42),
        ("fcn_r50_d8", 512, 1024, "t4", "fp16", 1e3 / 23.97),
        ("fcn_r50_d8", 512, 1024, "t4", "int8", 1e3 / 18.13),
        ("fcn_r50_d8", 512, 1024, "tx2", "fp32", 1e3 / 1682.54),
        ("resnet50", 224, 224, "t4", "fp32", 1e3 / 2.97),
        ("resnet50", 224, 224, "t4", "fp16", 1e3 / 1.26),
        ("resnet50", 224, 224, "t4", "int8", 1e3 / 1.21),
        ("resnet50", 224, 224, "nano", "fp32", 1e3 / 59.32),
        ("resnet50", 224, 224, "nano", "fp16", 1e3 / 30.54),
        ("resnet50", 224, 224, "tx2", "fp32", 1e3 / 24.13),
    ),
    *_fcn_resnet18(256, 512, 48, 480),
    *_fcn_resnet18(512, 1024, 12, 175),
    *_fcn_resnet18(1024, 2048, 3, 47),
    *_fcn_resnet18(320, 576, 26, 360),
    *_fcn_resnet18(480, 864, 14, 190),
    *_fcn_resnet18(320, 512, 34, 370),
    *_fcn_resnet18(360, 640, 23, 325),
    *_fcn_resnet18(320, 320, 45, 508),
    *_fcn_resnet18(400, 512, 28, 340),
    *_fcn_resnet18(512, 640, 17, 224),
    *_rows(
        "Classifiers on AGX Xavier, TensorRT", _TORCH2TRT, "tensorrt",
        ("resnet18", 224, 224, "agx-xavier", "fp16", 712),
        ("resnet50", 224, 224, "agx-xavier", "fp16", 312),
        ("resnet101", 224, 224, "agx-xavier", "fp16", 170),
        ("vgg16", 224, 224, "agx-xavier", "fp16", 139),
    ),
    *_rows(
        "NanoSAM's encoder, TensorRT", _NANOSAM, "tensorrt",
        ("nanosam_encoder", 1024, 1024, "agx-orin-64gb", "fp16", 1e3 / 4.2),
    ),
    *_rows(
        "YolactEdge, TensorRT and PyTorch", _EDGE, "split",
        ("yolact_resnet50", 550, 550, "agx-xavier", "int8", 30.7),
        ("yolact_resnet101", 550, 550, "agx-xavier", "int8", 27.3),
        ("yolact_mobilenetv2", 550, 550, "agx-xavier", "int8", 35.7),
        ("yolact_resnet50", 550, 550, "rtx-2080-ti", "int8", 140.3),
        ("yolact_resnet101", 550, 550, "rtx-2080-ti", "int8", 124.8),
        ("yolact_mobilenetv2", 550, 550, "rtx-2080-ti", "int8", 161.4),
    ),
    *_rows(
        "YOLACT, PyTorch", _YOLACT, "eager",
        ("yolact_resnet50", 550, 550, "titan-xp", "fp32", 42.5),
        ("yolact_darknet53", 550, 550, "titan-xp", "fp32", 40.0),
        ("yolact_resnet101", 550, 550, "titan-xp", "fp32", 33.5),
    ),
    *_rows(
        "YOLACT on newer devices, PyTorch", _EDGE, "eager",
        ("yolact_resnet50", 550, 550, "agx-xavier", "fp32", 9.1),
        ("yolact_resnet101", 550, 550, "agx-xavier", "fp32", 6.6),
        ("yolact_mobilenetv2", 550, 550, "agx-xavier", "fp32", 15.0),
        ("yolact_resnet50", 550, 550, "rtx-2080-ti", "fp32", 45.0),
        ("yolact_resnet101", 550, 550, "rtx-2080-ti", "fp32", 36.5),
        ("yolact_mobilenetv2", 550, 550, "rtx-2080-ti", "fp32", 35.7),
    ),
    *_rows(
        "FC-HarDNet, PyTorch", _HARDNET, "eager",
        ("fchardnet70", 1024, 2048, "titan-v", "fp32", 70),
        ("fchardnet70", 1024, 2048, "gtx-1080-ti", "fp32", 53),
        ("bisenetv1", 1024, 2048, "titan-v", "fp32", 36),
        ("bisenetv1", 1024, 2048, "gtx-1080-ti", "fp32", 27),
    ),
)  # fmt: skip
