"""Weights that an ONNX file keeps in files beside it, taken into the model.

An ONNX file says where such a tensor is by a path, an offset and a length. The path comes with the
file, so it may name anything on this machine: it is followed only as far as the file's own folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import onnx

from edgeseg.errors import BundleError
from edgeseg.files import open_file
from edgeseg.onnxfile import LARGEST

__all__ = ["take_weights_in"]

# A file of weights may be shared by several models.
_LARGEST_FILE = 1 << 36
_NUMBER = re.compile("[0-9]{1,15}", re.ASCII)


def take_weights_in(model: onnx.ModelProto, path: Path) -> None:
    """Reads all weights that ``model``, the content of ``path``, keeps elsewhere.

    BundleError when one lies outside of the file's folder, is missing or cut short, or when all of
    them are more than one ONNX file can hold, as a bundle's has to.
    """
    total = model.ByteSize()
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        name = told.get("location", "")
        offset, length = (_number(told.get(key), path, tensor.name) for key in ("offset", "length"))
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or re.search(r"[\\:\x00]", name):
            raise BundleError(
                f"{path} says that the weights {tensor.name!r} are in {name!r}, and weights lie in "
                "the file's own folder or below; put the file there and export it again"
            )
        try:
            with open_file(path.parent / name, most=_LARGEST_FILE, within=path.parent) as opened:
                file, size = opened
                begin = offset or 0
                count = size - begin if length is None else length
                if count < 0 or begin + count > size:
                    raise BundleError(
                        f"{path} says that the weights {tensor.name!r} end at byte {begin + count} "
                        f"of {name}, which has {size}; it was cut short, or is another model's"
                    )
                total += count
                if total > LARGEST:
                    raise BundleError(
                        f"{path} has more than 2 GiB of weights, which one ONNX file cannot hold "
                        "and no edge device runs; make it smaller, or store its weights as float16"
                    )
                file.seek(begin)
                tensor.raw_data = file.read(count)
        except FileNotFoundError as error:
            raise BundleError(
                f"{path} keeps its weights in a file beside it, which is missing "
                f"({path.parent / name}); copy that too"
            ) from error
        except OSError as error:
            raise BundleError(
                f"{path} keeps weights in {path.parent / name}, which cannot be read "
                f"({error.strerror})"
            ) from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _number(text: str | None, path: Path, name: str) -> int | None:
    if text is None:
        return None
    if not _NUMBER.fullmatch(text):
        raise BundleError(
            f"{path} says no place for the weights {name!r}: {text[:40]!r} is no number of bytes"
        )
    return int(text)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in the model, those in branches and functions too."""
    graphs = [model.graph]
    for info in model.training_info:
        graphs += [info.initialization, info.algorithm]
    nodes: list[Iterable[onnx.NodeProto]] = [function.node for function in model.functions]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.append(graph.node)
        for node in nodes.pop():
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                sparses = [*attribute.sparse_tensors]
                if attribute.HasField("sparse_tensor"):
                    sparses.append(attribute.sparse_tensor)
                for sparse in sparses:
                    yield from (sparse.values, sparse.indices)
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs += attribute.graphs
