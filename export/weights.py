"""Checkpoints: state_dicts in, state_dicts out, with errors that name the keys."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from edgeseg.errors import WeightsError
from edgeseg.export.models.network import Network
from edgeseg.export.structure import fit_structure

__all__ = ["check_writable", "load_weights", "read_weights", "save_checkpoint", "save_weights"]

AnyNetwork = TypeVar("AnyNetwork", bound=Network)

#: names under which training scripts wrap the state_dict
_WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")
#: what data-parallel training and compilation put before every key
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 6


def read_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state_dict in a checkpoint: key -> tensor.

    ``source``: a ``.pt``/``.pth`` file, the name or folder of a bundle, its ``model.onnx``, or a
    mapping. Wrappers (``state_dict``, ``model_state``) and prefixes (``module.``) are taken off.
    WeightsError when the file is missing, damaged, or holds something else.
    """
    if isinstance(source, Mapping):
        return _unwrapped(source, "the mapping")
    path = Path(source)
    if not path.exists() or path.is_dir() or path.suffix == ".onnx":
        from edgeseg.export.onnx import weights_of_bundle

        found = weights_of_bundle(source)
        if found is not None:
            return found
        raise WeightsError(f"the checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"the checkpoint {path} cannot be read ({error.strerror})") from error
    except Exception as error:
        # torch.load raises whatever its unpickler or zip reader meets first.
        raise WeightsError(
            f"the checkpoint {path} cannot be read: it is damaged, cut short, or holds more than "
            "tensors; save it again with torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"the checkpoint {path} holds a {type(content).__name__}, not a state_dict; "
            "save it again with torch.save(model.state_dict(), ...)"
        )
    return _unwrapped(content, f"the checkpoint {path}")


def _unwrapped(content: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping):
            return _unwrapped(inner, what)
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise WeightsError(
            f"{what} holds no tensors; its entries are {_listed([*map(str, content)]) or 'none'}"
        )
    # Prefixes come in either order: a compiled model was wrapped, or a wrapped one compiled.
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def load_weights(
    model: AnyNetwork, source: str | os.PathLike[str] | Mapping[str, Any]
) -> AnyNetwork:
    """Fills ``model`` in place from a checkpoint (see ``read_weights``) and returns it.

    Heads that only training uses may be absent from the checkpoint, and are passed over when the
    model has none, as are leftovers that published checkpoints are known to hold. A checkpoint of a
    pruned network shrinks ``model`` to its widths, as ``fit_structure`` says. Every other missing,
    unexpected or differently shaped key is a WeightsError that names it; the model is then
    unchanged.
    """
    found = model.current_names(read_weights(source))
    wanted = model.state_dict()
    auxiliary = model.auxiliary_prefixes

    def counts(key: str) -> bool:
        # The counter of batches steers nothing after training; old checkpoints lack it.
        return not key.startswith(auxiliary) and not key.endswith("num_batches_tracked")

    missing = [key for key in wanted if key not in found and counts(key)]
    unexpected = [key for key in found if key not in wanted and not key.startswith(auxiliary)]
    unfit = None
    if not missing and not unexpected:
        unfit = fit_structure(model, found)
        wanted = model.state_dict()
    shapes = [
        f"{key} {tuple(found[key].shape)} where {tuple(wanted[key].shape)} is wanted"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} keys are missing ({_listed(missing)})")
    if unexpected:
        complaints.append(f"{len(unexpected)} keys are unexpected ({_listed(unexpected)})")
    if shapes:
        complaints.append(f"{len(shapes)} shapes differ ({_listed(shapes)})")
    if unfit:
        complaints.append(f"it is no pruned one either: {unfit}")
    if complaints:
        what = "the mapping" if isinstance(source, Mapping) else f"the checkpoint {source}"
        hint = (
            "; is num_classes right?"
            if shapes and not missing and not unexpected
            else "; is it a checkpoint of another model?"
        )
        raise WeightsError(
            f"{what} does not fit {type(model).__name__} with {model.num_classes} classes: "
            + "; ".join(complaints)
            + hint
        )
    model.load_state_dict({key: found[key] for key in wanted if key in found}, strict=False)
    return model


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_writable(path: str | os.PathLike[str]) -> None:
    """WeightsError when no checkpoint can be written to ``path``; its folder need not exist yet."""
    path = Path(path)
    folder = path.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "it is a folder" if path.is_dir() else f"{folder} is no writable folder"
        raise WeightsError(f"the checkpoint {path} cannot be written: {what}")


def save_weights(model: Network, path: str | os.PathLike[str]) -> None:
    """Writes the state_dict of ``model`` to ``path``, whole or not at all; WeightsError if not."""
    save_checkpoint(model.state_dict(), path)


def save_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes ``content`` with torch.save, whole or not at all; WeightsError if not.

    Folders that are missing are made.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError.
        with contextlib.suppress(OSError):
            beside.unlink()
        raise WeightsError(f"the checkpoint {path} cannot be written ({error})") from error
