"""Any PyTorch module as a network that can be exported: ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgeseg.errors import RequestError, WeightsError
from edgeseg.export.onnx import OPSET, traced
from edgeseg.export.own import OwnNetwork, check_output, first_line
from edgeseg.export.own_instance import (
    OwnInstanceNetwork,
    RawForm,
    check_pictures,
    check_static,
    free_names,
    probed,
    raw_of,
)
from edgeseg.export.tail import take_off_tail
from edgeseg.export.weights import read_weights
from edgeseg.spec import Preprocessing

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Adapter",
    "InstanceAdapter",
    "adapter_named",
    "importable_here",
    "instances_of_module",
    "logits_of",
    "module_of_factory",
    "network_of_module",
]

#: turns what a model returns into scores (1, classes, h, w)
Adapter = Callable[[Any], Tensor]

#: turns what a model returns into what ``raw_of`` takes
InstanceAdapter = Callable[[Any], Any]

#: entries under which semantic models return their logits
_NAMES = ("out", "logits")
_SHOWN = 4


@contextmanager
def importable_here() -> Iterator[None]:
    """Lets modules in the current directory be imported, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def module_of_factory(
    name: str, *, classes: tuple[str, ...] | None, weights: str | None
) -> nn.Module:
    """What the factory ``name`` (``package.module:attribute``) makes, in eval mode.

    The factory is called without arguments, or with ``num_classes`` where it takes that and
    ``classes`` came; a module that is already made is taken as it is. ``weights``: a checkpoint to
    fill it from.

    RequestError when it cannot be found or called, or makes something else; WeightsError for the
    checkpoint.
    """
    made = _named(name, "a factory")
    if not isinstance(made, nn.Module):
        made = _called(made, name, classes)
    if not isinstance(made, nn.Module):
        raise RequestError(
            f"{name} is to give a torch.nn.Module, and gave a {type(made).__name__}; "
            "write a function that returns the model itself"
        )
    if weights is not None:
        _fill(made, weights)
    return made.float().cpu().eval()


def adapter_named(name: str) -> Adapter:
    """The function ``package.module:function``; RequestError when there is none."""
    found = _named(name, "an adapter")
    if not callable(found):
        raise RequestError(
            f"the adapter {name} is a {type(found).__name__}; write a function that takes what the "
            "model returns and gives the logits"
        )
    adapter: Adapter = found
    return adapter


def _named(name: str, what: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py") or "/" in module_name or not module_name or not attribute:
        suggestion = module_name.removesuffix(".py").strip("./").replace("/", ".") or "mymodels"
        raise RequestError(
            f"{what} is named package.module:function, such as "
            f"{suggestion}:{attribute or 'make'}, and {name!r} came"
        )
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise RequestError(
                f"there is no Python module {error.name} (looked for in the current directory and "
                "among the installed packages); go to the folder that it lies in, or install it"
            ) from error
        raise RequestError(
            f"{module_name} cannot be imported: it needs {error.name}, which is not installed"
        ) from error
    except Exception as error:
        # Foreign code runs here, and raises what it likes.
        raise RequestError(
            f"{module_name} cannot be imported ({first_line(error)}); "
            f'`python -c "import {module_name}"` shows where'
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [
                key
                for key, value in vars(found).items()
                if not key.startswith("_")
                and callable(value)
                and getattr(value, "__module__", None) == module_name
            ]
            there = f"it has {', '.join(names[:_SHOWN])}" if names else "it has no functions"
            raise RequestError(f"{module_name} has no {attribute}; {there}")
        found = getattr(found, part)
    return found


def _called(factory: Any, name: str, classes: tuple[str, ...] | None) -> Any:
    if not callable(factory):
        raise RequestError(
            f"{name} is a {type(factory).__name__}, neither a module nor a function that makes one"
        )
    try:
        parameters = dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        parameters = {}
    given = {}
    if "num_classes" in parameters and classes is not None:
        given["num_classes"] = len(classes)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in kinds and key not in given
    ]
    if missing == ["num_classes"]:
        raise RequestError(f"{name} wants num_classes; name the classes with --classes A,B,...")
    if missing:
        raise RequestError(
            f"{name} wants {', '.join(missing)}, and a factory is called without arguments (but "
            "num_classes); write a function that calls it with your values, and name that"
        )
    try:
        return factory(**given)
    except Exception as error:
        raise RequestError(
            f"{name} failed ({first_line(error)}); call it in Python to see where"
        ) from error


def _fill(module: nn.Module, weights: str) -> None:
    """Loads the checkpoint ``weights``, whose keys have to be the module's."""
    found = read_weights(weights)
    broken = [
        key
        for key, tensor in found.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise WeightsError(
            f"the checkpoint {weights} holds values that are no numbers, in {len(broken)} entries "
            f"(first {broken[0]}); take one from before the training diverged"
        )
    try:
        outcome = module.load_state_dict(found, strict=False)
    except RuntimeError as error:
        shapes = [line.strip() for line in str(error).splitlines()[1:]]
        raise WeightsError(
            f"the checkpoint {weights} does not fit: {shapes[0] if shapes else error}"
        ) from error
    # The counter of batches steers nothing after training; old checkpoints lack it.
    missing = [key for key in outcome.missing_keys if not key.endswith("num_batches_tracked")]
    for keys, what in ((missing, "missing"), (outcome.unexpected_keys, "unexpected")):
        if keys:
            listed = ", ".join(keys[:_SHOWN]) + (" ..." if len(keys) > _SHOWN else "")
            raise WeightsError(
                f"the checkpoint {weights} is of another model: {len(keys)} keys are {what} "
                f"({listed}); does the factory build what was trained?"
            )


def logits_of(result: Any) -> Tensor:
    """The logits in what a semantic model usually returns.

    A tensor; a mapping with ``out`` or ``logits``; an object with ``logits`` or ``out``; a tuple or
    list whose first entry is one of these. RequestError for anything else.
    """
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        for name in _NAMES:
            if isinstance(result.get(name), Tensor):
                found: Tensor = result[name]
                return found
        came = f"a mapping with {', '.join(map(str, list(result)[:_SHOWN])) or 'nothing'}"
    elif isinstance(result, (tuple, list)) and result:
        return logits_of(result[0])
    else:
        for name in _NAMES:
            if isinstance(getattr(result, name, None), Tensor):
                attribute: Tensor = getattr(result, name)
                return attribute
        came = f"a {type(result).__name__}"
    raise RequestError(
        f"the model returns {came}, in which no logits were found; write a function that takes "
        "that and returns them as (1, classes, h, w), and name it with --adapter module:function"
    )


class _Adapted(nn.Module):
    """A foreign module and its adapter: image -> scores (1, channels, h, w) float32."""

    def __init__(self, network: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.network = network
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.network(x))


def network_of_module(
    module: nn.Module,
    size: tuple[int, int],
    *,
    name: str,
    classes: tuple[str, ...] | None,
    preprocessing: Preprocessing,
    align_corners: bool = False,
    adapter: Adapter = logits_of,
    half_weights: bool = False,
) -> OwnNetwork:
    """``module``, in eval mode, as a network of ``size`` (height, width).

    ``name``: what errors call it. ``half_weights``: kernels are rounded to fp16 in place, as the
    file will hold them.

    RequestError when it does not take that size, gives something else than scores per class and
    pixel, or cannot be traced.
    """
    height, width = size
    if half_weights:
        _round_to_half(module)
    adapted = _Adapted(module, adapter)
    try:
        with torch.inference_mode():
            scores: Any = adapted(torch.zeros(1, 3, height, width))
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(
            f"{name} does not take a picture of {height}x{width} ({first_line(error)}); try "
            "another --size, often a multiple of 32"
        ) from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        came = scores.dtype if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise RequestError(
            f"logits are floating-point numbers per class, and {came} came; "
            "return what stands before the argmax, if need be with --adapter module:function"
        )
    shape = tuple(scores.shape)
    check_output(shape, size, classes, "--adapter module:function can bring it into that form")
    graph = _traced(adapted, size, name)
    tail = take_off_tail(graph, OPSET, shape, size)
    return OwnNetwork(
        adapted,
        graph,
        tail,
        opset=OPSET,
        size=size,
        channels=shape[1],
        classes=classes,
        preprocessing=preprocessing,
        align_corners=align_corners,
        reference="PyTorch",
    )


def _traced(
    module: nn.Module, size: tuple[int, int], name: str, outputs: tuple[str, ...] | None = None
) -> onnx.GraphProto:
    """As ``traced``; RequestError when the network ``name`` cannot be."""
    try:
        return traced(module, size) if outputs is None else traced(module, size, outputs)
    except Exception as error:
        # The exporter's own message is a page; the cause at its root says what it met.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise RequestError(
            f"{name} cannot be turned into ONNX ({first_line(cause)}); loops and branches that "
            "depend on pixel values, and operators from elsewhere, have to be rewritten"
        ) from error


class _AdaptedInstances(nn.Module):
    """A foreign module and its adapter: image -> raw detections, those of ``names``, float32."""

    def __init__(self, network: nn.Module, adapter: InstanceAdapter) -> None:
        super().__init__()
        self.network = network
        self.adapter = adapter
        self.names: tuple[str, ...] = ()

    def found(self, x: Tensor) -> dict[str, Tensor]:
        """By name."""
        return raw_of(self.adapter(self.network(x)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.found(x)
        return tuple(found[name].float() for name in self.names)


def instances_of_module(
    module: nn.Module,
    size: tuple[int, int],
    *,
    name: str,
    classes: tuple[str, ...] | None,
    preprocessing: Preprocessing,
    adapter: InstanceAdapter = raw_of,
    half_weights: bool = False,
    least_score: float | None = None,
    overlap: float | None = None,
) -> OwnInstanceNetwork:
    """As ``network_of_module``, for a ``module`` that finds objects.

    ``least_score`` and ``overlap``: see `OwnInstanceNetwork`. RequestError when it, with
    ``adapter``, gives something else than `edgeseg.export.own_instance` names.
    """
    height, width = size
    if half_weights:
        _round_to_half(module)
    adapted = _AdaptedInstances(module, adapter)
    try:
        with torch.inference_mode():
            found = [adapted.found(x) for x in probed(size)]
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(
            f"{name} or its adapter does not take a picture of {height}x{width} "
            f"({first_line(error)}); try another --size, often a multiple of 32"
        ) from error
    form = RawForm.of(found[0], size, classes, "--adapter module:function can bring it there")
    check_pictures(found, size)
    adapted.names = form.names
    graph = _traced(adapted, size, name, tuple(f"edgeseg.raw.{key}" for key in form.names))
    check_static(graph, OPSET, name)
    free_names(graph)
    return OwnInstanceNetwork(
        adapted,
        graph,
        form,
        opset=OPSET,
        size=size,
        classes=classes,
        preprocessing=preprocessing,
        reference="PyTorch",
        least_score=least_score,
        overlap=overlap,
    )


@torch.no_grad()
def _round_to_half(module: nn.Module) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.ndim > 1 and tensor.is_floating_point():
            tensor.copy_(tensor.half().float())
