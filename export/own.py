"""A network that is not EdgeSeg's: the graph it was traced to, and the function to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import onnx
import torch
from torch import Tensor, nn

from edgeseg.errors import RequestError
from edgeseg.export.models.semantic import SemanticNetwork
from edgeseg.export.tail import Tail
from edgeseg.spec import Preprocessing, Task

__all__ = [
    "IMAGENET",
    "OwnNetwork",
    "OwnOptions",
    "check_output",
    "first_line",
    "is_own",
    "weights_in",
]

#: what torchvision, timm and most training scripts normalise with
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), order="rgb")

#: before the path of a model of Hugging Face transformers
TRANSFORMERS_PREFIX = "hf:"

Values = tuple[float, float, float]


@dataclass(frozen=True)
class OwnOptions:
    """What a foreign model cannot say of itself; None where it can, or where a default applies.

    ``mean``, ``std``: three numbers each, of pixels that go from 0 to ``scale`` (1 or 255), in the
    order of ``order``. ``align_corners``: convention of the upsampling that is left to EdgeSeg's
    head. ``adapter``: ``module:function`` that turns what the model returns into logits.
    ``output_name``: which output of an ONNX file is meant. ``task``: what the model gives; of an
    instance model, ``least_score`` and ``overlap`` are those of `OwnInstanceNetwork`.
    """

    mean: Values | None = None
    std: Values | None = None
    order: Literal["rgb", "bgr"] | None = None
    scale: Literal[1, 255] = 1
    align_corners: bool = False
    adapter: str | None = None
    output_name: str | None = None
    task: Task = "semantic"
    least_score: float | None = None
    overlap: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--least-score", self.least_score), ("--overlap", self.overlap)):
            if value is not None and not 0 <= value <= 1:
                raise RequestError(f"{option} is between 0 and 1, and {value} came")

    def preprocessing(self, default: Preprocessing = IMAGENET) -> Preprocessing:
        """The normalisation asked for; what was left open is ``default``'s.

        RequestError when only one of mean and std came, or std is not above zero.
        """
        order = self.order or default.order
        if (self.mean is None) != (self.std is None):
            given, missing = ("--mean", "--std") if self.std is None else ("--std", "--mean")
            raise RequestError(
                f"mean and std go together, and only {given} came; add {missing} "
                "(--mean 0,0,0 --std 1,1,1 leaves the pixels as they are)"
            )
        if self.mean is None or self.std is None:
            if self.scale != 1:
                raise RequestError(
                    "--scale 255 says that --mean and --std count in steps of 0 to 255, "
                    "and neither came; add both"
                )
            mean, std = default.mean, default.std
            if order != default.order:
                mean, std = (mean[2], mean[1], mean[0]), (std[2], std[1], std[0])
            return Preprocessing(mean, std, order)
        return Preprocessing(_scaled(self.mean, self.scale), _scaled(self.std, self.scale), order)


def _scaled(values: Values, scale: int) -> Values:
    red, green, blue = values
    return red / scale, green / scale, blue / scale


def is_own(model: str) -> bool:
    """Whether ``model`` names something of the user's: a factory, an ONNX file, a folder."""
    return ":" in model or PurePath(model).suffix == ".onnx"


class OwnNetwork(SemanticNetwork):
    """A foreign network at one size, with the interface of EdgeSeg's own.

    ``raw``: (1, 3, height, width) float32, normalised -> scores (1, channels, h, w), by the code
    that the model came with. ``graph``: the same from ``edgeseg.x`` on, its tail taken off
    (``tail``), in operators of ``opset``. A single channel with two classes is the second class
    where it is above zero, or above one half where ``tail`` has seen a sigmoid.
    """

    stride = 1
    smallest = 1

    def __init__(
        self,
        raw: nn.Module,
        graph: onnx.GraphProto,
        tail: Tail,
        *,
        opset: int,
        size: tuple[int, int],
        channels: int,
        classes: tuple[str, ...] | None,
        preprocessing: Preprocessing,
        align_corners: bool,
        reference: str,
    ) -> None:
        super().__init__()
        self.raw = raw
        self.graph = graph
        self.tail = tail
        self.opset = opset
        self.size = size
        self.is_binary = channels == 1 and (classes is None or len(classes) == 2)
        self.num_classes = 2 if self.is_binary else channels
        self.classes = classes
        self.preprocessing = preprocessing
        #: convention of the upsampling behind ``raw``
        self.behind_align_corners = align_corners
        #: convention of the head behind ``graph``: that of the upsampling that was taken off
        self.align_corners = align_corners if tail.align_corners is None else tail.align_corners
        #: who computes ``raw``, for the report
        self.reference = reference

    def low_resolution_logits(self, x: Tensor) -> Tensor:
        """Scores as the model gives them: (1, 3, height, width) -> (1, classes, h, w)."""
        scores: Tensor = self.raw(x)
        if self.is_binary:
            threshold = 0.5 if self.tail.sigmoid else 0.0
            scores = (scores - threshold) * torch.tensor([-0.5, 0.5]).view(1, 2, 1, 1)
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """(1, 3, height, width) -> (1, classes, height, width)."""
        scores = self.low_resolution_logits(x)
        if scores.shape[-2:] == x.shape[-2:]:
            return scores
        return nn.functional.interpolate(
            scores, size=x.shape[-2:], mode="bilinear", align_corners=self.behind_align_corners
        )

    def parameter_count(self) -> int:
        """Number of floating-point weights in the graph."""
        return weights_in(self.graph)


def weights_in(graph: onnx.GraphProto) -> int:
    """Number of floating-point weights in ``graph``."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return sum(math.prod(tensor.dims) for tensor in graph.initializer if tensor.data_type in floats)


def check_output(
    shape: tuple[int, ...], size: tuple[int, int], classes: tuple[str, ...] | None, way_out: str
) -> None:
    """RequestError unless ``shape`` is scores (1, channels, h, w) for ``size`` and ``classes``."""
    height, width = size
    if len(shape) != 4 or shape[0] != 1 or min(shape) < 1:
        raise RequestError(
            f"a semantic model gives logits (1, classes, h, w), and this one gives {shape}; "
            f"{way_out}"
        )
    channels, rows, columns = shape[1:]
    if rows > height or columns > width:
        raise RequestError(
            f"logits are at most as large as the input, {height}x{width}, and this model gives "
            f"{rows}x{columns}; {way_out}"
        )
    if channels > 255:
        raise RequestError(f"a model has 1 to 255 classes, and this one gives {channels} channels")
    if classes is not None and len(classes) != channels and (channels, len(classes)) != (1, 2):
        if len(classes) == 1 + channels:
            hint = "; is the background one of the names, and not one of the channels?"
        elif len(classes) + 1 == channels:
            hint = "; is the background one of the channels? Then it needs a name too"
        else:
            hint = "; --classes names every channel, in order"
        raise RequestError(
            f"the model gives {channels} channel{'s' if channels > 1 else ''}, "
            f"and {len(classes)} names came{hint}"
        )


def first_line(error: BaseException) -> str:
    """What another library's exception says, short enough for a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(".") if lines else "no message"
    return f"{type(error).__name__}: {text[:200]}"
