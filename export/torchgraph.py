"""An ONNX graph as a torch module: trained where it lies, and written back to the same file.

Quantization-aware fine-tuning must train the very graph that is deployed, with its folded weights
and its QuantizeLinear/DequantizeLinear pairs, and not the network that it was exported from. So
`TorchGraph` interprets the graph: float or explicit Q/DQ, any batch size.

A pair Q -> DQ is one fake quantization here, ``clamp(round(x / s), low, high) * s``, with a
straight-through gradient; scales may be learned (Esser et al., "Learned Step Size Quantization",
arXiv 1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from edgeseg.errors import RequestError, WeightsError
from edgeseg.onnxfile import HEAD

__all__ = ["TorchGraph", "WeightScales", "fake_quantize"]

#: whether the scales of quantized weights stay as they are, or are the largest absolute value of
#: each channel over the largest integer, at every step
WeightScales = Literal["fixed", "follow"]

#: the oldest operator set whose forms of the operators are known here
OLDEST_OPSET = 13

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_INTEGERS: dict[int, torch.dtype] = {
    TensorProto.BOOL: torch.bool,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
}
#: the integers that QuantizeLinear can write
_BOUNDS: dict[int, tuple[int, int]] = {
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
}
#: operators with weights, and which of their inputs may be weights or biases
_WEIGHT_INPUTS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "MatMul": (0, 1)}
#: operators between an initializer and its layer through which it is still that layer's weight
_FORWARDING = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape")
#: operators that may stand between Q and DQ: they select values and make none
_SELECTING = (
    "Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
)  # fmt: skip
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

# Elements that are quantized at a time: its pieces stay in the processor's cache, and a tensor of
# feature maps costs about as much as one copy of it.
_PIECE = 1 << 17

Result = Tensor | tuple[Tensor, ...]
Run = Callable[..., Result]

# What a quantizer reads: a trained weight, something made of one, an activation, or a constant.
Source = Literal["weight", "derived", "activation", "constant"]


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: int = -128,
    high: int = 127,
    *,
    axis: int | None = None,
    after_relu: bool = False,
) -> Tensor:
    """``clamp(round_half_even(x / scale), low, high) * scale``, of the shape and dtype of ``x``.

    ``scale`` is float32, all above 0: one value, or with ``axis`` one per index of that axis. The
    arithmetic is float32 for any dtype of ``x``. ``after_relu`` quantizes ``relu(x)`` instead, in
    the same pass.

    The gradient reaches ``x`` unchanged where nothing was clipped and is 0 elsewhere. The gradient
    of a single ``scale`` is that of LSQ: ``round(x / s) - x / s``, or the bound where x was
    clipped, times ``1 / sqrt(x.numel() * high)``; several scales get none.
    """
    if scale.numel() == 1:
        scale = scale.reshape(())
    elif axis is None:
        raise RequestError(f"{scale.numel()} scales came for a whole tensor; say which axis")
    else:
        sides = [1] * x.ndim
        sides[axis] = -1
        scale = scale.detach().reshape(sides)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        applied = _FakeQuantize.apply(x, scale, low, high, after_relu)  # type: ignore[no-untyped-call]
        return cast(Tensor, applied)
    with torch.no_grad():
        return _quantize(x, scale, low, high, after_relu, None)


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize`; keeps a mask of one byte per element, or ``x`` when the scale is learned."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, low: int, high: int, after_relu: bool
    ) -> Tensor:
        cast(Any, ctx).bounds = (low, high, after_relu)
        if cast(Any, ctx).needs_input_grad[1]:
            ctx.save_for_backward(x, scale)
            return _quantize(x, scale, low, high, after_relu, None)
        inside = torch.empty_like(x, dtype=torch.bool)
        ctx.save_for_backward(inside)
        return _quantize(x, scale, low, high, after_relu, inside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            (inside,) = ctx.saved_tensors
            return _masked(gradient, inside), None, None, None, None
        x, scale = ctx.saved_tensors
        low, high, after_relu = ctx.bounds
        gradient = _laid_out_like(gradient, x)
        passed = torch.empty_like(x)
        of_scale = torch.zeros((), dtype=torch.float64, device=x.device)
        for part, upper, lower in _pieces(x, gradient, passed):
            exact = part.float() / scale
            if after_relu:
                exact.clamp_min_(0)
            rounded = exact.round()
            clipped = rounded.clamp(low, high)
            inside = rounded == clipped
            error = torch.where(inside, clipped - exact, clipped)
            of_scale += (error * upper).sum(dtype=torch.float64)
            if after_relu:
                inside.logical_and_(part > 0)
            torch.mul(upper, inside, out=lower)
        of_scale /= math.sqrt(x.numel() * high)
        return (
            passed if ctx.needs_input_grad[0] else None,
            of_scale.to(scale.dtype),
            None,
            None,
            None,
        )


def _quantize(
    x: Tensor, scale: Tensor, low: int, high: int, after_relu: bool, inside: Tensor | None
) -> Tensor:
    """The forward pass; ``inside`` (bool, shape and strides of x) becomes True where x was not
    clipped."""
    made = torch.empty_like(x)
    bottom = max(low, 0) if after_relu else low
    whole = scale.ndim > 0
    parts: Iterator[tuple[Tensor, ...]]
    tensors = (x, made) if inside is None else (x, made, inside)
    parts = iter([tensors]) if whole else _pieces(*tensors)
    work: Tensor | None = None
    for part, out, *mask in parts:
        if work is None:
            work = torch.empty_like(part, dtype=torch.float32)
        level = work if work.shape == part.shape else work[: part.numel()]
        if part.dtype == torch.float32:
            torch.div(part, scale, out=level)
        else:
            # A scale without dimensions does not lift x to float32 by itself.
            level.copy_(part).div_(scale)
        level.round_()
        if out.dtype == torch.float32:
            clipped = torch.clamp(level, bottom, high, out=out)
        else:
            clipped = level.clamp(bottom, high)
        if mask:
            torch.eq(level, clipped, out=mask[0])
            if after_relu:
                mask[0].logical_and_(part > 0)
        clipped.mul_(scale)
        if clipped is not out:
            out.copy_(clipped)
    return made


def _masked(gradient: Tensor, inside: Tensor) -> Tensor:
    """``gradient`` where ``inside``, 0 elsewhere."""
    made = torch.empty_like(inside, dtype=gradient.dtype)
    for mask, upper, lower in _pieces(inside, _laid_out_like(gradient, inside), made):
        # Twice as fast as torch.where, which has no vector code for masks.
        lower.copy_(mask.view(torch.uint8)).mul_(upper)
    return made


def _laid_out_like(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.stride() == x.stride():
        return gradient
    return torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of the same shape and strides, piece by piece in the order of their memory; whole
    where that is not possible or not worth it."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _PIECE:
        yield tensors
    elif first.is_contiguous():
        yield from zip(*(torch.split(tensor.view(-1), _PIECE) for tensor in tensors), strict=True)
    elif first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last):
        flat = (tensor.permute(0, 2, 3, 1).view(-1) for tensor in tensors)
        yield from zip(*(torch.split(tensor, _PIECE) for tensor in flat), strict=True)
    else:
        yield tensors


@dataclass(frozen=True)
class _Step:
    """One node: ``outputs = run(*inputs)``; an input that was left out is called ""."""

    name: str
    kind: str
    run: Run
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Quantizer:
    """One QuantizeLinear with what dequantizes it behind: ``output = fake_quantize(input)``.

    ``scale`` names the initializer of the scale, ``twins`` other initializers of the same value
    that the DequantizeLinear nodes read. ``axis`` is None for one scale.
    """

    name: str
    input: str
    output: str
    scale: str
    twins: tuple[str, ...]
    axis: int | None
    low: int
    high: int
    zero_point: int
    after_relu: bool
    source: Source


class TorchGraph(nn.Module):
    """The part of ``model`` between ``inputs`` and ``outputs``, with trainable weights.

    ``outputs``: names of tensors; None for the low-resolution logits, which are what
    ``EdgeSegUpsampleArgmax`` reads. ``inputs``: where to begin, the graph's own input unless a
    block is to be trained alone. Nodes that the outputs do not need are not looked at.

    Float initializers that reach a Conv, ConvTranspose, Gemm or MatMul as its weight or bias, also
    through Cast, Q/DQ or Transpose, are parameters; everything else is a buffer. Integer weights
    with DequantizeLinear alone are constants. All floating-point types of the file are computed in
    float32 (under ``torch.autocast``: as that says; quantizers stay float32 inside).

    ``quantizers_enabled``: set it to False, and the module is the float model.
    ``learn_scales``: the scales of quantized activations are parameters, as the logarithm of their
    ratio to the file's scale, so that they stay positive and one learning rate suits all.
    ``weight_scales``: "fixed", or "follow" for the largest absolute value of each channel of the
    weight as it is at every step; no gradient flows through it.

    The model is copied: ``write_back`` says where trained values go. RequestError for an operator,
    or a form of one, that cannot be run here, and for names that are not in the graph.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        *,
        inputs: Sequence[str] = ("image",),
        outputs: Sequence[str] | None = None,
        learn_scales: bool = False,
        weight_scales: WeightScales = "fixed",
    ) -> None:
        super().__init__()
        if weight_scales not in get_args(WeightScales):
            raise RequestError(
                f"weight_scales is one of {', '.join(get_args(WeightScales))}, "
                f"and {weight_scales!r} came"
            )
        self.quantizers_enabled = True
        reading = _Reading(model, tuple(inputs), outputs)
        self._inputs = reading.inputs
        self._expected = reading.expected
        self._outputs = {name: reading.same.get(name, name) for name in reading.outputs}
        self._steps = tuple(reading.steps)
        self._follow = weight_scales == "follow"
        #: ONNX names of what this module holds
        self._held: list[str] = []
        self._weights: list[str] = []
        self._scales: dict[str, list[_Quantizer]] = {}
        self._learned: list[str] = []
        self._hold(reading, learn_scales)
        self._last_reads = _last_reads(self._steps, set(self._outputs.values()))

    def _hold(self, reading: _Reading, learn_scales: bool) -> None:
        read = {name for step in self._steps for name in _reads(step) if name}
        read.update(self._outputs.values())
        for name in sorted(read):
            if name in reading.weights:
                weight = reading.weights[name]
                if weight.ndim == 4:
                    # As the pictures are, which come as (N, H, W, 3).
                    weight = weight.contiguous(memory_format=torch.channels_last)
                self.register_parameter(_key(name), nn.Parameter(weight))
                self._weights.append(name)
            elif name in reading.constants:
                self.register_buffer(_key(name), reading.constants[name])
            else:
                continue
            self._held.append(name)
        for step in self._steps:
            if isinstance(step, _Quantizer):
                self._scales.setdefault(step.scale, []).append(step)
        for name, quantizers in self._scales.items():
            scale = reading.constants[name]
            if _key(name) not in self._buffers:
                self.register_buffer(_key(name), scale)
            kinds = {quantizer.source for quantizer in quantizers}
            if self._follow and "weight" in kinds and len(quantizers) > 1:
                raise RequestError(
                    f"scale {name} is shared by several tensors and cannot follow one weight; "
                    'give each weight its own, or take weight_scales="fixed"'
                )
            if self._follow and "derived" in kinds:
                raise RequestError(
                    f"scale {name} cannot follow what is made of a weight, only a weight itself; "
                    'take weight_scales="fixed"'
                )
            if learn_scales and kinds == {"activation"} and scale.numel() == 1:
                self.register_parameter(_key(name, "log_ratio"), nn.Parameter(torch.zeros(())))
                self._learned.append(name)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The trained weights and biases by the names of their initializers."""
        return {name: cast(nn.Parameter, self._get(name)) for name in self._weights}

    @property
    def scale_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained of each learned scale, ``log(scale / scale in the file)``, by the name
        of the scale's initializer."""
        return {
            name: cast(nn.Parameter, self._parameters[_key(name, "log_ratio")])
            for name in self._learned
        }

    @property
    def scales(self) -> dict[str, Tensor]:
        """All scales as they are now, float32 in the shape of their initializers, by name."""
        with torch.no_grad():
            found = {}
            for name, quantizers in self._scales.items():
                first = quantizers[0]
                source = self._get(first.input) if first.source == "weight" else None
                found[name] = self._scale(first, source).clone()
            return found

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The requested tensors by name, for one tensor per input of this graph.

        ``image``: uint8 (N, H, W, 3); N may be any number, whatever the file says.
        """
        if len(inputs) != len(self._inputs):
            raise RequestError(
                f"the graph takes {', '.join(self._inputs)}, and {len(inputs)} tensors came"
            )
        values = {name: self._get(name) for name in self._held}
        for name, tensor in zip(self._inputs, inputs, strict=True):
            self._check(name, tensor)
            values[name] = tensor
        for step, last in zip(self._steps, self._last_reads, strict=True):
            if isinstance(step, _Quantizer):
                values[step.output] = self._quantized(step, values[step.input])
            else:
                result = step.run(*[values[name] if name else None for name in step.inputs])
                made = (result,) if isinstance(result, Tensor) else result
                values.update(zip(step.outputs, made, strict=True))
            # What nobody reads any more goes at once: without gradients, that is most of it.
            for name in last:
                del values[name]
        return {name: values[inner] for name, inner in self._outputs.items()}

    def write_back(self, model: onnx.ModelProto) -> None:
        """Puts weights, learned scales and following scales into the initializers of ``model``,
        in place; each keeps its type.

        RequestError if ``model`` lacks one of them or has it in another shape, WeightsError for a
        value that the stored type cannot hold; ``model`` is then as it was.
        """
        arrays = {name: tensor.detach() for name, tensor in self.weights.items()}
        for name, scale in self.scales.items():
            first = self._scales[name][0]
            if name in self._learned or (self._follow and first.source == "weight"):
                twins = {twin for quantizer in self._scales[name] for twin in quantizer.twins}
                arrays.update(dict.fromkeys([name, *sorted(twins)], scale))
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        made = {}
        for name, tensor in arrays.items():
            stored = tensors.get(name)
            if stored is None or list(stored.dims) != list(tensor.shape):
                came = "has none" if stored is None else f"has one of shape {list(stored.dims)}"
                raise RequestError(
                    f"{name} is to be written to an initializer of shape {list(tensor.shape)}, "
                    f"and the model {came}; write to the model that this graph was read from"
                )
            made[name] = _stored_as(stored, tensor)
        for name, array in made.items():
            tensors[name].CopyFrom(array)

    def _get(self, name: str) -> Tensor:
        key = _key(name)
        tensor = self._parameters[key] if key in self._parameters else self._buffers[key]
        assert tensor is not None
        return tensor

    def _check(self, name: str, tensor: Tensor) -> None:
        expected = self._expected.get(name)
        if expected is None:
            return
        dtype, rank = expected
        if tensor.dtype != dtype or tensor.ndim != rank:
            raise RequestError(
                f"the graph takes {name} as {_plain(dtype)} of {rank} dimensions, and "
                f"{_plain(tensor.dtype)} of shape {tuple(tensor.shape)} came"
            )

    def _quantized(self, step: _Quantizer, x: Tensor) -> Tensor:
        if not self.quantizers_enabled:
            return functional.relu(x) if step.after_relu else x
        return fake_quantize(
            x,
            self._scale(step, x),
            step.low - step.zero_point,
            step.high - step.zero_point,
            axis=step.axis,
            after_relu=step.after_relu,
        )

    def _scale(self, step: _Quantizer, x: Tensor | None) -> Tensor:
        """The scale as it is now; ``x`` is what a weight's scale follows."""
        stored = self._get(step.scale)
        ratio = self._parameters.get(_key(step.scale, "log_ratio"))
        if ratio is not None:
            # A ratio of exactly 1 before any training: the file's scale, bit by bit.
            return stored * ratio.exp()
        if self._follow and step.source == "weight":
            assert x is not None
            return _following(x.detach(), stored, step)
        return stored


def _following(weight: Tensor, stored: Tensor, step: _Quantizer) -> Tensor:
    if step.axis is None:
        largest = weight.abs().amax().reshape(stored.shape)
    else:
        axis = step.axis % weight.ndim
        largest = weight.abs().amax([other for other in range(weight.ndim) if other != axis])
    # A channel of zeros keeps its scale: it must stay above 0.
    return torch.where(largest > 0, largest / (step.high - step.zero_point), stored)


def _stored_as(stored: TensorProto, tensor: Tensor) -> TensorProto:
    """``tensor`` under the name and in the type of ``stored``."""
    wanted = helper.tensor_dtype_to_np_dtype(stored.data_type)
    with np.errstate(over="ignore"):
        array = tensor.cpu().numpy().astype(wanted)
    if not np.isfinite(array.astype(np.float32)).all():
        raise WeightsError(
            f"{stored.name} has values that are no numbers or beyond {wanted}, in which the model "
            "stores it; train with a smaller learning rate, or store it as float32"
        )
    return numpy_helper.from_array(np.asarray(array, order="C"), stored.name)


def _key(name: str, what: str = "onnx") -> str:
    """The attribute of the module that holds an ONNX tensor: torch allows no dots in it, and the
    colon keeps it apart from what a module has itself."""
    return f"{what}:{name.replace('%', '%25').replace('.', '%2E')}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reads(step: _Step | _Quantizer) -> tuple[str, ...]:
    return (step.input,) if isinstance(step, _Quantizer) else step.inputs


def _makes(step: _Step | _Quantizer) -> tuple[str, ...]:
    return (step.output,) if isinstance(step, _Quantizer) else step.outputs


def _last_reads(steps: Sequence[_Step | _Quantizer], kept: set[str]) -> tuple[tuple[str, ...], ...]:
    """For each step the tensors that no later step needs."""
    seen = set(kept)
    last: list[tuple[str, ...]] = []
    for step in reversed(steps):
        names = dict.fromkeys(name for name in (*_makes(step), *_reads(step)) if name)
        last.append(tuple(name for name in names if name not in seen))
        seen.update(names)
    return tuple(reversed(last))


class _Reading:
    """A graph being read: what is constant, what is trained, and the steps that remain.

    ``same`` maps tensors that take no step of their own to the tensor whose values they have.
    """

    def __init__(
        self, model: onnx.ModelProto, inputs: tuple[str, ...], outputs: Sequence[str] | None
    ) -> None:
        self.opset = max(
            (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
            default=0,
        )
        if self.opset < OLDEST_OPSET:
            raise RequestError(
                f"the graph is of opset {self.opset}, and opset {OLDEST_OPSET} or newer can be "
                "trained; export it again"
            )
        self.inputs = inputs
        self.graph = model.graph
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.outputs = self._logits() if outputs is None else tuple(outputs)
        self.expected = self._expected()
        self.nodes = self._needed()
        self.types = {name: tensor.data_type for name, tensor in self.initializers.items()}
        self.weights = {name: _tensor(self.initializers[name]) for name in self._weights()}
        self.constants: dict[str, Tensor] = {}
        read = {name for node in self.nodes for name in node.input} | set(self.outputs)
        for name in sorted(read):
            if name in self.initializers and name not in self.weights and name not in inputs:
                self.constants[name] = _tensor(self.initializers[name])
        self.same: dict[str, str] = {}
        self.steps: list[_Step | _Quantizer] = []
        # Tensors of integers -> the scales that they were made with; their values, too, are
        # dequantized here, and a DequantizeLinear has nothing left to do.
        self._quantized: dict[str, tuple[str, ...]] = {}
        self._quantizers: dict[str, _Quantizer] = {}
        self._moving = set(inputs)
        for node in self.nodes:
            self._read(node)
        self._join_relus()
        self.steps = [
            self._quantizers[step.output] if isinstance(step, _Quantizer) else step
            for step in self.steps
        ]

    def _logits(self) -> tuple[str, ...]:
        heads = [node.input[0] for node in self.graph.node if node.op_type == HEAD]
        if len(heads) != 1:
            raise RequestError(
                f"a graph is trained up to what its {HEAD} node reads, and this one has "
                f"{len(heads)} such nodes; name the outputs"
            )
        return (heads[0],)

    def _expected(self) -> dict[str, tuple[torch.dtype, int]]:
        """dtype and number of dimensions of the inputs that are the graph's own."""
        found = {}
        for value in self.graph.input:
            kind = value.type.tensor_type
            if value.name in self.inputs and kind.HasField("shape"):
                dtype = (
                    torch.float32 if kind.elem_type in _FLOATS else _INTEGERS.get(kind.elem_type)
                )
                if dtype is not None:
                    found[value.name] = (dtype, len(kind.shape.dim))
        return found

    def _needed(self) -> list[onnx.NodeProto]:
        """The nodes that the outputs need, in order."""
        there = {value.name for value in self.graph.input} | self.producers.keys()
        for name in self.inputs:
            if name not in there:
                raise RequestError(f"the graph has no tensor {name} to begin at")
        needed: set[str] = set()
        waiting = list(self.outputs)
        while waiting:
            name = waiting.pop()
            if not name or name in needed or name in self.inputs or name in self.initializers:
                continue
            producer = self.producers.get(name)
            if producer is None:
                made_from = ", ".join(self.inputs)
                if name in self.outputs:
                    raise RequestError(f"the graph has no tensor {name} to give")
                raise RequestError(
                    f"the outputs need {name}, which is not made from {made_from}; "
                    "name it among the inputs"
                )
            needed.update(producer.output)
            waiting.extend(producer.input)
        return [node for node in self.graph.node if needed.intersection(filter(None, node.output))]

    def _weights(self) -> set[str]:
        """The float initializers that layers multiply by or add."""
        found = set()
        for node in self.nodes:
            for index in _WEIGHT_INPUTS.get(node.op_type, ()):
                name = node.input[index] if index < len(node.input) else ""
                while name in self.producers and name not in self.inputs:
                    producer = self.producers[name]
                    if producer.op_type not in _FORWARDING:
                        break
                    name = producer.input[0]
                if name in self.initializers and self.initializers[name].data_type in _FLOATS:
                    found.add(name)
        return found.difference(self.inputs)

    def _read(self, node: onnx.NodeProto) -> None:
        if any(name in self.inputs for name in node.output):
            return
        inputs = tuple(self.same.get(name, name) for name in node.input)
        if node.op_type == _QUANTIZE:
            self._quantize(node, inputs)
            return
        if node.op_type == _DEQUANTIZE and node.input[0] in self._quantized:
            self._dequantize(node, inputs)
            return
        known = self._node(node, inputs)
        if inputs and inputs[0] in self.weights and _is_copy(known):
            self.same[node.output[0]] = inputs[0]
            return
        maker = OPERATORS.get(node.op_type)
        if maker is None or node.domain not in _domains(node.op_type):
            raise RequestError(
                f"{known} is an operator that cannot be trained here; the known ones are "
                f"{', '.join(sorted([*OPERATORS, _QUANTIZE]))}"
            )
        raw = {name for name in node.input if name in self._quantized}
        if raw and node.op_type not in _SELECTING:
            raise RequestError(
                f"{known} reads integers of a {_QUANTIZE} without a {_DEQUANTIZE} between; "
                f"only {', '.join(_SELECTING)} may"
            )
        run = maker(known)
        outputs = tuple(node.output)
        if raw:
            scales = tuple(sorted({scale for name in raw for scale in self._quantized[name]}))
            self._quantized.update(dict.fromkeys(outputs, scales))
        if all(name in self.constants for name in inputs if name):
            with torch.no_grad():
                result = run(*[self.constants[name] if name else None for name in inputs])
            made = (result,) if isinstance(result, Tensor) else result
            self.constants.update(zip(outputs, made, strict=True))
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.types[outputs[0]] = node.attribute[0].t.data_type
            return
        if known.moving:
            self._moving.update(outputs)
        self.steps.append(_Step(node.name, node.op_type, run, inputs, outputs))

    def _node(self, node: onnx.NodeProto, inputs: tuple[str, ...]) -> _Node:
        return _Node(node, inputs, self.constants, bool(self._moving.intersection(inputs)))

    def _quantize(self, node: onnx.NodeProto, inputs: tuple[str, ...]) -> None:
        known = self._node(node, inputs)
        low, high, zero_point = self._integers(known)
        scale = self._positive_scale(known)
        if known.number("block_size", 0):
            raise RequestError(f"{known} has scales per block, and they cannot be trained here")
        axis = known.number("axis", 1) if scale.numel() > 1 else None
        source: Source = "constant"
        if inputs[0] in self._moving:
            source = "activation"
        elif inputs[0] in self.weights:
            source = "weight"
        elif inputs[0] not in self.constants:
            # No image reaches it, and still it is no constant: made of a weight.
            source = "derived"
        quantizer = _Quantizer(
            name=node.name,
            input=inputs[0],
            output=node.output[0],
            scale=inputs[1],
            twins=(),
            axis=axis,
            low=low,
            high=high,
            zero_point=zero_point,
            after_relu=False,
            source=source,
        )
        self._quantized[node.output[0]] = (inputs[1],)
        for other in self._quantizers.values():
            if replace(quantizer, name="", output="") == replace(
                other, name="", output="", twins=()
            ):
                # Some tools give every reader of a tensor a pair of its own.
                self.same[node.output[0]] = other.output
                return
        self._quantizers[quantizer.output] = quantizer
        self.steps.append(quantizer)
        if source == "activation":
            self._moving.add(quantizer.output)

    def _dequantize(self, node: onnx.NodeProto, inputs: tuple[str, ...]) -> None:
        """The values are dequantized already; checks that this node means the same scale."""
        known = self._node(node, inputs)
        scale = self._positive_scale(known)
        zero = known.constant(2)
        for name in self._quantized[node.input[0]]:
            quantizers = [one for one in self._quantizers.values() if one.scale == name]
            equal = torch.equal(self.constants[name].reshape(-1), scale.reshape(-1))
            points = {one.zero_point for one in quantizers}
            if not equal or points != {0 if zero is None else int(zero.reshape(-1)[0])}:
                raise RequestError(
                    f"{known} has another scale or zero point than the {_QUANTIZE} before it; "
                    "a pair of them is trained as one"
                )
            for one in quantizers:
                if inputs[1] != name and inputs[1] not in one.twins:
                    twins = (*one.twins, inputs[1])
                    self._quantizers[one.output] = replace(one, twins=twins)
        self.same[node.output[0]] = inputs[0]

    def _integers(self, node: _Node) -> tuple[int, int, int]:
        """(smallest, largest, zero point) of a QuantizeLinear."""
        zero = node.constant(2)
        if zero is None:
            kind = node.number("output_dtype", 0) or TensorProto.UINT8
            if len(node.inputs) > 2 and node.inputs[2]:
                raise RequestError(f"{node} has a zero point that is no constant")
        else:
            kind = self.types.get(node.inputs[2], 0)
        if kind not in _BOUNDS:
            raise RequestError(
                f"{node} quantizes to {TensorProto.DataType.Name(kind).lower()}, and only "
                "integers of 4, 8 or 16 bits can be trained"
            )
        points = {0} if zero is None else {int(value) for value in zero.reshape(-1)}
        if len(points) != 1:
            raise RequestError(
                f"{node} has several zero points, and one is promised; quantize symmetrically"
            )
        return (*_BOUNDS[kind], points.pop())

    def _positive_scale(self, node: _Node) -> Tensor:
        scale = node.constant(1)
        if scale is None or not bool((scale > 0).all()):
            raise RequestError(f"the scales of {node} are to be constants above 0")
        return scale

    def _join_relus(self) -> None:
        """Each Relu whose every reader is a quantizer becomes part of those: one pass over the
        tensor less, and one tensor less kept for the gradients."""
        readers: dict[str, list[_Step | _Quantizer]] = {}
        for step in self.steps:
            for name in dict.fromkeys(_reads(step)):
                readers.setdefault(name, []).append(step)
        given = {self.same.get(name, name) for name in self.outputs}
        for relu in [step for step in self.steps if isinstance(step, _Step)]:
            if relu.kind != "Relu" or relu.outputs[0] in given:
                continue
            behind = readers.get(relu.outputs[0], [])
            if not all(
                isinstance(step, _Quantizer) and step.low <= step.zero_point for step in behind
            ):
                continue
            for step in behind:
                made = self._quantizers[_makes(step)[0]]
                self._quantizers[made.output] = replace(made, input=relu.inputs[0], after_relu=True)
            self.steps.remove(relu)


def _is_copy(node: _Node) -> bool:
    """Whether the node gives its input as it is: all floating-point types are one here."""
    kind = node.proto.op_type
    return kind == "Identity" or (kind == "Cast" and node.number("to", 0) in _FLOATS)


def _domains(kind: str) -> tuple[str, ...]:
    # ONNX Runtime's tools write the pairs of types that an older opset lacks to their own domain.
    return ("", "ai.onnx", *(["com.microsoft"] if kind in (_QUANTIZE, _DEQUANTIZE) else []))


def _tensor(proto: TensorProto) -> Tensor:
    """The values of ``proto``: float32 for any floating-point type."""
    array = numpy_helper.to_array(proto)
    if proto.data_type in _FLOATS:
        # A copy: the array may lie in the message, and that may not be written to.
        return torch.from_numpy(np.array(array, dtype=np.float32))
    dtype = _INTEGERS.get(proto.data_type)
    wide: NDArray[Any] = np.array(array, dtype=bool if dtype == torch.bool else np.int64)
    return torch.from_numpy(wide).to(dtype or torch.int64)


@dataclass(frozen=True)
class _Node:
    """A node with what is known about its inputs; written out for messages as "Conv conv1".

    ``moving``: whether its output depends on the graph's input.
    """

    proto: onnx.NodeProto
    inputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    moving: bool

    def __str__(self) -> str:
        name = self.proto.name or (self.proto.output[0] if self.proto.output else "")
        return f"{self.proto.op_type} {name}".rstrip()

    def attribute(self, name: str, default: Any = None) -> Any:
        for entry in self.proto.attribute:
            if entry.name == name:
                value = helper.get_attribute_value(entry)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def number(self, name: str, default: int) -> int:
        return int(self.attribute(name, default))

    def real(self, name: str, default: float) -> float:
        return float(self.attribute(name, default))

    def text(self, name: str, default: str) -> str:
        return str(self.attribute(name, default))

    def integers(self, name: str) -> list[int] | None:
        values = self.attribute(name)
        return None if values is None else [int(value) for value in values]

    def constant(self, index: int) -> Tensor | None:
        """Input ``index`` if its values are known now."""
        name = self.inputs[index] if index < len(self.inputs) else ""
        return self.constants.get(name) if name else None

    def given(self, index: int) -> bool:
        return index < len(self.inputs) and bool(self.inputs[index])

    def listed(self, index: int, attribute: str | None = None) -> Callable[[Sequence[Any]], Any]:
        """Gives the list of numbers of input ``index`` (or of the attribute) when the node runs:
        read once, now, if it is constant; None if it was left out."""
        if not self.given(index):
            fixed = None if attribute is None else self.integers(attribute)
            return lambda _: fixed
        known = self.constant(index)
        if known is not None:
            values = known.reshape(-1).tolist()
            return lambda _: values
        return lambda inputs: inputs[index].reshape(-1).tolist()

    def refuse(self, what: str) -> RequestError:
        return RequestError(f"{self} has {what}, which cannot be trained here")


def _elementwise(function: Callable[..., Tensor]) -> Callable[[_Node], Run]:
    return lambda _: function


def _divide(_: _Node) -> Run:
    def run(a: Tensor, b: Tensor) -> Tensor:
        whole = not (a.is_floating_point() or b.is_floating_point())
        return torch.div(a, b, rounding_mode="trunc" if whole else None)

    return run


def _cast(node: _Node) -> Run:
    to = node.number("to", 0)
    if to in _FLOATS:
        # Also fp16: types are for the engine; autocast may have its own while training.
        return lambda x: x if x.is_floating_point() else x.float()
    if to not in _INTEGERS:
        raise node.refuse(f"type {TensorProto.DataType.Name(to)}")
    return lambda x: x.to(_INTEGERS[to])


def _transpose(node: _Node) -> Run:
    order = node.integers("perm")
    return lambda x: x.permute(order if order is not None else list(range(x.ndim))[::-1])


@dataclass(frozen=True)
class _Window:
    """Strides, dilations and padding of a node that slides a window; each None for the default."""

    strides: list[int] | None
    dilations: list[int] | None
    pads: list[int] | None
    auto_pad: str

    @classmethod
    def of(cls, node: _Node) -> _Window:
        auto_pad = node.text("auto_pad", "NOTSET")
        if auto_pad not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise node.refuse(f"auto_pad {auto_pad}")
        return cls(
            node.integers("strides"),
            node.integers("dilations"),
            node.integers("pads"),
            auto_pad,
        )

    def stride(self, sides: int) -> list[int]:
        return self.strides or [1] * sides

    def dilation(self, sides: int) -> list[int]:
        return self.dilations or [1] * sides

    def padding(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
        """Padding before and after each side, for a picture of ``size``."""
        sides = len(kernel)
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            before, after = [], []
            for side, width, stride, dilation in zip(
                size, kernel, self.stride(sides), self.dilation(sides), strict=True
            ):
                reach = dilation * (width - 1) + 1
                total = max((-(-side // stride) - 1) * stride + reach - side, 0)
                small, large = total // 2, total - total // 2
                before.append(small if self.auto_pad == "SAME_UPPER" else large)
                after.append(large if self.auto_pad == "SAME_UPPER" else small)
            return before, after
        if self.auto_pad == "VALID" or self.pads is None:
            return [0] * sides, [0] * sides
        return self.pads[:sides], self.pads[sides:]


def _pad_sides(x: Tensor, before: Sequence[int], after: Sequence[int], value: float) -> Tensor:
    """``x`` with its last dimensions padded."""
    pairs = list(zip(before, after, strict=True))[::-1]
    return functional.pad(x, [amount for pair in pairs for amount in pair], value=value)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def _convolution(node: _Node) -> Run:
    window = _Window.of(node)
    group = node.number("group", 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sides = weight.ndim - 2
        before, after = window.padding(x.shape[2:], weight.shape[2:])
        if before != after:
            x = _pad_sides(x, before, after, 0.0)
            before = [0] * sides
        convolve = _CONVOLUTIONS[sides]
        return convolve(
            x, weight, bias, window.stride(sides), before, window.dilation(sides), group
        )

    return run


def _transposed_convolution(node: _Node) -> Run:
    window = _Window.of(node)
    if window.auto_pad.startswith("SAME") or node.integers("output_shape"):
        raise node.refuse("its output's shape instead of pads")
    group = node.number("group", 1)
    added = node.integers("output_padding")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sides = weight.ndim - 2
        before, after = window.padding(x.shape[2:], weight.shape[2:])
        even = before == after
        extra = added or [0] * sides
        made = _TRANSPOSED[sides](
            x,
            weight,
            bias,
            window.stride(sides),
            before if even else [0] * sides,
            extra,
            group,
            window.dilation(sides),
        )
        if not even:
            for side, (low, high) in enumerate(zip(before, after, strict=True), 2):
                made = made.narrow(side, low, made.shape[side] - low - high)
        return made

    return run


def _batch_norm(node: _Node) -> Run:
    if node.number("training_mode", 0) or len(node.proto.output) > 1:
        raise node.refuse("statistics of its own (training_mode)")
    epsilon = node.real("epsilon", 1e-5)

    def run(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return functional.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)
        # As one multiplication and one addition: unlike batch_norm, it keeps nothing of the size
        # of x for the gradients.
        factor = gamma * torch.rsqrt(variance + epsilon)
        shift = beta - mean * factor
        sides = [-1, *[1] * (x.ndim - 2)]
        return torch.addcmul(shift.view(sides), x, factor.view(sides))

    return run


def _leaky_relu(node: _Node) -> Run:
    slope = node.real("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, slope)


def _clip(node: _Node) -> Run:
    lowest, highest = node.listed(1), node.listed(2)

    def run(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        low, high = lowest(inputs), highest(inputs)
        if low is None and high is None:
            return x
        return x.clamp(low[0] if low else None, high[0] if high else None)

    return run


def _hard_sigmoid(node: _Node) -> Run:
    alpha, beta = node.real("alpha", 0.2), node.real("beta", 0.5)
    return lambda x: (x * alpha + beta).clamp(0, 1)


def _softmax(node: _Node) -> Run:
    axis = node.number("axis", -1)
    return lambda x: torch.softmax(x, axis)


_MAX_POOLS: dict[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGE_POOLS: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


def _pooling(node: _Node) -> tuple[_Window, list[int], bool]:
    window = _Window.of(node)
    kernel = node.integers("kernel_shape") or []
    return window, kernel, bool(node.number("ceil_mode", 0))


def _by_hand(node: _Node, kernel: Sequence[int], before: Sequence[int], ceil: bool) -> None:
    """Refuses what padding by hand cannot do: torch itself leaves out windows that lie in the
    padding alone, and it cannot know by hand-made padding where that begins."""
    if ceil:
        raise node.refuse(f"ceil_mode with pads {list(before)} for a window of {list(kernel)}")


def _max_pool(node: _Node) -> Run:
    if len(node.proto.output) > 1:
        raise node.refuse("indices as its second output")
    window, kernel, ceil = _pooling(node)
    sides = len(kernel)

    def run(x: Tensor) -> Tensor:
        before, after = window.padding(x.shape[2:], kernel)
        if before != after or any(
            2 * pad > width for pad, width in zip(before, kernel, strict=True)
        ):
            _by_hand(node, kernel, before, ceil)
            x = _pad_sides(x, before, after, -math.inf)
            before = [0] * sides
        return _MAX_POOLS[sides](
            x, kernel, window.stride(sides), before, window.dilation(sides), ceil
        )

    return run


def _average_pool(node: _Node) -> Run:
    window, kernel, ceil = _pooling(node)
    if any(step != 1 for step in window.dilations or ()):
        raise node.refuse("dilations")
    sides = len(kernel)
    with_padding = bool(node.number("count_include_pad", 0))
    pool = _AVERAGE_POOLS[sides]

    def run(x: Tensor) -> Tensor:
        before, after = window.padding(x.shape[2:], kernel)
        stride = window.stride(sides)
        if before == after and all(
            2 * pad <= width for pad, width in zip(before, kernel, strict=True)
        ):
            return pool(x, kernel, stride, before, ceil, with_padding)
        _by_hand(node, kernel, before, ceil)
        made = pool(_pad_sides(x, before, after, 0.0), kernel, stride)
        if not with_padding:
            ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
            made = made / pool(_pad_sides(ones, before, after, 0.0), kernel, stride)
        return made

    return run


def _global_average_pool(_: _Node) -> Run:
    return lambda x: x.mean(list(range(2, x.ndim)), keepdim=True)


def _reduce_mean(node: _Node) -> Run:
    listed = node.listed(1, "axes")
    kept = bool(node.number("keepdims", 1))
    nothing = bool(node.number("noop_with_empty_axes", 0))

    def run(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        axes = listed(inputs)
        if not axes and nothing:
            return x
        return x.mean(axes or list(range(x.ndim)), keepdim=kept)

    return run


def _concat(node: _Node) -> Run:
    axis = node.number("axis", 0)
    return lambda *inputs: torch.cat(inputs, axis)


def _gemm(node: _Node) -> Run:
    alpha, beta = node.real("alpha", 1.0), node.real("beta", 1.0)
    left, right = node.number("transA", 0), node.number("transB", 0)

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        made = torch.matmul(a.T if left else a, b.T if right else b)
        if alpha != 1:
            made = made * alpha
        if c is not None:
            made = made + (c if beta == 1 else c * beta)
        return made

    return run


def _reshape(node: _Node) -> Run:
    listed = node.listed(1)
    zeros = bool(node.number("allowzero", 0))

    def run(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        shape = [
            x.shape[index] if size == 0 and not zeros else int(size)
            for index, size in enumerate(listed(inputs))
        ]
        if node.moving and shape and shape[0] == 1 and x.shape[0] > 1:
            # The file was written for one picture.
            batched = [x.shape[0], *shape[1:]]
            if -1 in shape or math.prod(batched) == x.numel():
                shape = batched
        if -1 not in shape and math.prod(shape) != x.numel():
            raise RequestError(
                f"{node} is written for another batch than the {x.shape[0]} that came: it makes "
                f"{shape} of {list(x.shape)}; run this graph with batches of one"
            )
        return x.reshape(shape)

    return run


def _flatten(node: _Node) -> Run:
    axis = node.number("axis", 1)

    def run(x: Tensor) -> Tensor:
        first = axis + x.ndim if axis < 0 else axis
        return x.reshape(math.prod(x.shape[:first]), -1)

    return run


def _constant(node: _Node) -> Run:
    entry = node.proto.attribute[0]
    if entry.name == "value":
        value = _tensor(entry.t)
    elif entry.name in ("value_float", "value_floats"):
        value = torch.tensor(helper.get_attribute_value(entry), dtype=torch.float32)
    elif entry.name in ("value_int", "value_ints"):
        value = torch.tensor(helper.get_attribute_value(entry), dtype=torch.int64)
    else:
        raise node.refuse(f"a {entry.name}")
    return lambda: value


def _slice(node: _Node) -> Run:
    starts, ends, axes, steps = (node.listed(index) for index in range(1, 5))

    def run(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        begin, end = starts(inputs), ends(inputs)
        along = axes(inputs) or range(len(begin))
        strides = steps(inputs) or [1] * len(begin)
        for axis, low, high, step in zip(along, begin, end, strides, strict=True):
            chosen = range(*slice(low, high, step).indices(x.shape[axis]))
            if step > 0:
                x = x[(slice(None),) * (axis % x.ndim) + (slice(chosen.start, chosen.stop, step),)]
            else:
                x = x.index_select(axis, torch.tensor(chosen, device=x.device, dtype=torch.long))
        return x

    return run


def _split(node: _Node) -> Run:
    axis = node.number("axis", 0)
    listed = node.listed(1)
    count = len(node.proto.output)

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        x: Tensor = inputs[0]
        sizes = listed(inputs)
        # Without sizes, all are equal but for the last one.
        return tuple(torch.split(x, sizes if sizes else -(-x.shape[axis] // count), axis))

    return run


def _squeeze(node: _Node) -> Run:
    listed = node.listed(1)

    def run(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        axes = listed(inputs)
        if axes is None:
            return x.squeeze()
        if any(x.shape[axis] != 1 for axis in axes):
            raise RequestError(
                f"{node} takes away axes {axes} of size 1, and {list(x.shape)} came; "
                "run this graph with batches of one"
            )
        return x.squeeze(axes)

    return run


def _unsqueeze(node: _Node) -> Run:
    listed = node.listed(1)

    def run(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        axes = listed(inputs)
        rank = x.ndim + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return run


def _pad(node: _Node) -> Run:
    mode = node.text("mode", "constant")
    if mode not in ("constant", "reflect", "edge"):
        raise node.refuse(f"mode {mode}")
    listed, values, along = node.listed(1, "pads"), node.listed(2), node.listed(3)

    def run(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        pads = listed(inputs)
        axes = along(inputs) or range(x.ndim)
        before, after = [0] * x.ndim, [0] * x.ndim
        for index, axis in enumerate(axes):
            before[axis], after[axis] = pads[index], pads[index + len(axes)]
        if mode == "constant":
            value = values(inputs)
            return _pad_sides(x, before, after, float(value[0]) if value else 0.0)
        if any(before[:-2]) or any(after[:-2]) or x.ndim not in (3, 4):
            raise node.refuse(f"mode {mode} for pads {before} and {after}")
        sides = [before[-1], after[-1], before[-2], after[-2]]
        return functional.pad(x, sides, mode="reflect" if mode == "reflect" else "replicate")

    return run


def _shape(node: _Node) -> Run:
    start, end = node.number("start", 0), node.attribute("end")
    return lambda x: torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _gather(node: _Node) -> Run:
    axis = node.number("axis", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        side = x.shape[axis]
        flat = indices.reshape(-1).to(x.device, torch.int64)
        made = x.index_select(axis, torch.where(flat < 0, flat + side, flat))
        at = axis % x.ndim
        return made.reshape([*x.shape[:at], *indices.shape, *x.shape[at + 1 :]])

    return run


def _dequantize_constant(node: _Node) -> Run:
    """DequantizeLinear of integers that the file stores: a constant weight."""
    if node.number("block_size", 0):
        raise node.refuse("scales per block")
    if node.constant(0) is None:
        raise RequestError(f"{node} reads integers that no {_QUANTIZE} made")
    axis = node.number("axis", 1)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        sides = [1] * x.ndim
        if scale.numel() > 1:
            sides[axis] = -1
        centred = x.double() if zero is None else x.double() - zero.double().reshape(sides)
        return (centred.float() * scale.reshape(sides)).float()

    return run


Positions = NDArray[np.float32]

# In float32, as the engines: where a position falls on a tie, rounding decides what is nearest.
_POSITIONS: dict[str, Callable[[Positions, int, int, np.float32], Positions]] = {
    "half_pixel": lambda at, _old, _new, scale: (at + np.float32(0.5)) / scale - np.float32(0.5),
    "pytorch_half_pixel": lambda at, _old, new, scale: (
        (at + np.float32(0.5)) / scale - np.float32(0.5) if new > 1 else at * np.float32(0)
    ),
    "asymmetric": lambda at, _old, _new, scale: np.divide(at, scale),
    "align_corners": lambda at, old, new, _scale: (
        at * np.float32(old - 1) / np.float32(max(new - 1, 1))
    ),
}
_ROUNDINGS: dict[str, Callable[[Positions], Positions]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda position: np.ceil(position - np.float32(0.5)),
    "round_prefer_ceil": lambda position: np.floor(position + np.float32(0.5)),
}


def _resize(node: _Node) -> Run:
    mode = node.text("mode", "nearest")
    convention = node.text("coordinate_transformation_mode", "half_pixel")
    rounding = node.text("nearest_mode", "round_prefer_floor")
    linear = ("half_pixel", "pytorch_half_pixel", "align_corners")
    if mode not in ("nearest", "linear"):
        raise node.refuse(f"mode {mode}")
    if convention not in (linear if mode == "linear" else _POSITIONS):
        raise node.refuse(f"mode {mode} with {convention} coordinates")
    if node.number("antialias", 0) or node.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse("antialias or a keep_aspect_ratio_policy")
    all_scales, all_sizes, axes = node.listed(2), node.listed(3), node.integers("axes")

    def run(*inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        scales, sizes = all_scales(inputs), all_sizes(inputs)
        named = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes]
        target, factor = list(x.shape), [1.0] * x.ndim
        for index, axis in enumerate(named):
            if sizes:
                # The batch and the channels keep their number, whatever the file was written for.
                target[axis] = int(sizes[index]) if axis > 1 else x.shape[axis]
                factor[axis] = target[axis] / x.shape[axis]
            else:
                factor[axis] = float(scales[index])
                target[axis] = math.floor(x.shape[axis] * factor[axis])
        if factor[:2] != [1.0, 1.0] or x.ndim != 4:
            raise node.refuse(f"scales {factor}: it may resize the height and width of pictures")
        if mode == "nearest":
            return _nearest(x, target, factor, convention, rounding)
        return _linear(x, target, factor, convention)

    return run


def _nearest(
    x: Tensor, target: Sequence[int], factor: Sequence[float], convention: str, rounding: str
) -> Tensor:
    chosen = []
    repeated = True
    for axis in (2, 3):
        old, new = x.shape[axis], target[axis]
        at = np.arange(new, dtype=np.float32)
        position = _POSITIONS[convention](at, old, new, np.float32(factor[axis]))
        index = _ROUNDINGS[rounding](position).clip(0, old - 1).astype(np.int64)
        repeated &= new % old == 0 and bool((index == np.arange(new) // (new // old)).all())
        chosen.append(index)
    if repeated:
        return functional.interpolate(x, size=target[2:], mode="nearest")
    for axis, index in zip((2, 3), chosen, strict=True):
        x = x.index_select(axis, torch.from_numpy(index).to(x.device))
    return x


def _linear(x: Tensor, target: Sequence[int], factor: Sequence[float], convention: str) -> Tensor:
    if convention == "align_corners":
        return functional.interpolate(x, size=target[2:], mode="bilinear", align_corners=True)
    # By the factors and not by the size: they differ where a size was rounded down.
    return functional.interpolate(
        x,
        scale_factor=list(factor[2:]),
        mode="bilinear",
        align_corners=False,
        recompute_scale_factor=False,
    )


#: what makes each operator's step of its node; QuantizeLinear is `_Quantizer`
OPERATORS: dict[str, Callable[[_Node], Run]] = {
    "Add": _elementwise(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "DequantizeLinear": _dequantize_constant,
    "Div": _divide,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _elementwise(functional.hardswish),
    "Identity": _elementwise(lambda x: x),
    "LeakyRelu": _leaky_relu,
    "MatMul": _elementwise(torch.matmul),
    "MaxPool": _max_pool,
    "Mul": _elementwise(torch.mul),
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _elementwise(functional.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _elementwise(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _elementwise(torch.sub),
    "Tanh": _elementwise(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
