"""Stub files of the TensorRT bindings that this process imports, made by pybind11-stubgen.

Run by stubs.py in a process of its own: ``python bindings.py FOLDER`` with pybind11-stubgen and a
package ``tensorrt`` on the path. Writes ``FOLDER/tensorrt/__init__.pyi``, one file with every
class, enum, function and signature, and ``FOLDER/values.json``: the values of the enums
(class -> member -> value) and of the names that stand for a member.

What pybind11-stubgen cannot read is mended: names as C++ spells them, parameters called ``in``, a
parameter without a default behind one that has one, and the word ``bool``, which TensorRT gives to
a data type as well. What the signatures do not tell is added: None where a call fails, sequences
where Dims are asked for, the buffer behind IHostMemory, iteration over Dims. Documentation is left
out.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, ClassVar

MODULE = "tensorrt"
EXTENSION = "tensorrt.tensorrt"

_LEFTOVERS = {"attr", "value"}  # loop variables of the package's __init__.py


# pybind11 gives None for a null pointer, which a signature does not tell.
_NONE_ON_FAILURE = {
    "build_engine_with_config",
    "build_serialized_network",
    "create_execution_context",
    "create_plugin",
    "create_timing_cache",
    "deserialize_cuda_engine",
    "get_creator",
    "load_library",
}

# What pybind11 gives without a signature: the buffer, and iteration by index.
_ADDED = {
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
    "Dims": "def __iter__(self) -> collections.abc.Iterator[int]: ...",
}


def describe(folder: Path) -> None:
    """Writes the stub file and the values of the bindings on the path."""
    extension = importlib.import_module(EXTENSION)
    enums = dict(_enums(extension))
    with TemporaryDirectory() as scratch:
        _generate(extension, enums, Path(scratch))
        source = _merged(
            (Path(scratch) / MODULE / "tensorrt.pyi").read_text(encoding="utf-8"),
            (Path(scratch) / MODULE / "__init__.pyi").read_text(encoding="utf-8"),
            _write_only(extension),
        )
    target = folder / MODULE
    target.mkdir(parents=True)
    (target / "__init__.pyi").write_text(source, encoding="utf-8")
    values = {
        "enums": {
            name: {member: int(value) for member, value in enum.__members__.items()}
            for name, enum in enums.items()
        },
        "names": dict(_members(importlib.import_module(MODULE), enums)),
    }
    (folder / "values.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def _classes(scope: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every class of the extension by its qualified name, nested ones behind their owner."""
    for name, value in vars(scope).items():
        if isinstance(value, type) and value.__qualname__ == prefix + name:
            yield prefix + name, value
            yield from _classes(value, f"{prefix}{name}.")


def _write_only(extension: ModuleType) -> dict[str, list[str]]:
    """Classes -> properties that can be set and not read, which pybind11-stubgen leaves out."""
    return {
        name: [key for key, value in vars(kind).items() if getattr(value, "fget", kind) is None]
        for name, kind in _classes(extension)
    }


def _enums(extension: ModuleType) -> Iterator[tuple[str, Any]]:
    return ((name, kind) for name, kind in _classes(extension) if hasattr(kind, "__members__"))


def _members(module: ModuleType, enums: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names that stand for a member of an enum elsewhere: ``float32``, ``Logger.INFO``."""
    kinds = {kind: name for name, kind in enums.items()}
    scopes = [("", module), *((f"{name}.", kind) for name, kind in _classes(module.tensorrt))]
    for prefix, scope in scopes:
        for name, value in vars(scope).items():
            kind = kinds.get(type(value))
            if kind is not None and prefix != f"{kind}." and name not in _LEFTOVERS:
                yield prefix + name, f"{kind}.{value.name}"


def _generate(extension: ModuleType, enums: dict[str, Any], folder: Path) -> None:
    """Runs pybind11-stubgen, with signatures mended before it reads them."""
    import pybind11_stubgen
    from pybind11_stubgen.parser.mixins import parse

    def python_name(match: re.Match[str]) -> str:
        for name in (match[1], match[1].removeprefix("I")):
            if hasattr(extension, name):
                return f"{EXTENSION}.{name}"
        return match[0]

    parser = parse.ExtractSignaturesFromPybind11Docstrings
    read = parser.parse_function_docstring

    def read_mended(self: Any, name: str, lines: list[str]) -> Any:
        mended = []
        for line in lines:
            line = re.sub(r"\bnv\w+::(?:v_\d+_\d+::)?(\w+)", python_name, line)
            line = re.sub(r"([(,] ?)in: ", r"\1in_: ", line)
            line = re.sub(r"\bcapsule\b", "typing_extensions.CapsuleType", line)
            # The one accessor is an attribute of the module, of this type in every release.
            line = re.sub(r"-> detail::accessor<.*>$", f"-> {EXTENSION}.IPluginRegistry", line)
            mended.append(line)
        functions = read(self, name, mended)
        for function in functions:
            default = None
            for argument in function.args:
                if argument.default is None and not (argument.variadic or argument.kw_variadic):
                    argument.default = default
                default = argument.default
        return functions

    parser.parse_function_docstring = read_mended
    locations = []
    for name in enums:
        owner, _, last = f"{EXTENSION}.{name}".rpartition(".")
        locations += ["--enum-class-locations", f"^{last}$:{owner}"]
    pybind11_stubgen.main([*locations, "--output-dir", str(folder), "--exit-code", MODULE])


class _Mender(ast.NodeTransformer):
    """A stub file without documentation, whose types are what mypy's strict mode reads."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        # Python 3.12 and newer show a buffer, without types.
        node.body = [
            member
            for member in node.body
            if not _is_text(member)
            and getattr(member, "name", None) not in ("__buffer__", "__release_buffer__")
        ] or [ast.Expr(ast.Constant(...))]
        node.body += ast.parse(_ADDED.get(node.name, "")).body
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.body = [ast.Expr(ast.Constant(...))]
        arguments = [*node.args.posonlyargs, *node.args.args]
        # Methods that the package's own Python adds call their object so.
        if arguments and arguments[0].arg == "this":
            node.decorator_list = []
        defaults: list[ast.expr | None] = [None] * (len(arguments) - len(node.args.defaults))
        for argument, default in zip(arguments, [*defaults, *node.args.defaults], strict=True):
            if argument.arg == "self":
                argument.annotation = None
                continue
            # pybind11 makes Dims of any sequence, which the signature does not tell.
            if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Dims":
                argument.annotation = _type("Dims | collections.abc.Sequence[int]")
            # What takes a std::vector takes any sequence.
            if isinstance(argument.annotation, ast.Subscript) and (
                ast.unparse(argument.annotation.value) == "list"
                and ast.unparse(argument.annotation.slice) != "typing.Any"
            ):
                argument.annotation.value = _type("collections.abc.Sequence")
            if argument.annotation is None:
                argument.annotation = _type("typing.Any")
            elif isinstance(default, ast.Constant) and default.value is None:
                argument.annotation = _type(f"{ast.unparse(argument.annotation)} | None")
        if node.returns is None:
            node.returns = _type("typing.Any")
        else:
            node.returns = _Types().visit(node.returns)
            if node.name in _NONE_ON_FAILURE:
                node.returns = _type(f"{ast.unparse(node.returns)} | None")
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if node.annotation is not None:
            node.annotation = _Types().visit(node.annotation)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = _Types().visit(node.annotation)
        return node


class _Types(ast.NodeTransformer):
    """Names inside an annotation."""

    names: ClassVar[dict[str, str]] = {
        # ``tensorrt.bool`` is a data type, and hides Python's.
        "bool": "builtins.bool",
        # What takes a str, and is never seen.
        "FallbackString": "str",
        "list": "list[typing.Any]",
        "tuple": "tuple[typing.Any, ...]",
        "dict": "dict[typing.Any, typing.Any]",
        "typing.Iterable": "typing.Iterable[typing.Any]",
        "typing.Iterator": "typing.Iterator[typing.Any]",
        "typing.Callable": "typing.Callable[..., typing.Any]",
        "collections.abc.Callable": "typing.Callable[..., typing.Any]",
        # Newer pybind11 takes whatever has __int__; the narrower type holds for every release.
        "typing.SupportsInt": "int",
        "typing.SupportsFloat": "float",
        "collections.abc.Buffer": "typing_extensions.Buffer",
        "types.CapsuleType": "typing_extensions.CapsuleType",
    }

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _type(self.names[node.id]) if node.id in self.names else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        name = ast.unparse(node)
        return _type(self.names[name]) if name in self.names else node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return _type("typing.Any") if node.value is ... else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        node.slice = self.visit(node.slice)  # and not the value, which has its parameters
        return node


_IMPORTED = ("builtins", "collections.abc", "numpy", "typing", "typing_extensions")


def _type(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is documentation: a class's, a function's, or an attribute's."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _merged(extension: str, package: str, write_only: dict[str, list[str]]) -> str:
    """One stub file of the extension's, with what the package's own Python adds."""
    body: list[ast.stmt] = []
    tree = _Mender().visit(ast.parse(extension))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "__all__":
            continue
        if isinstance(node, ast.ClassDef):
            for name in write_only[node.name]:
                node.body += ast.parse(f"{name}: typing.Any").body
        if not isinstance(node, ast.Import):
            body.append(node)
    for node in _Mender().visit(ast.parse(package)).body:
        added = (
            isinstance(node, ast.FunctionDef) and not node.name.startswith(("_", "common_"))
        ) or (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "__version__")
        if added:
            body.append(node)
    future, *rest = body
    imports = [ast.Import([ast.alias(name)]) for name in _IMPORTED]
    merged = ast.Module([future, *imports, *rest], [])
    return ast.unparse(ast.fix_missing_locations(merged)).replace(f"{EXTENSION}.", "") + "\n"


if __name__ == "__main__":
    describe(Path(sys.argv[1]))
