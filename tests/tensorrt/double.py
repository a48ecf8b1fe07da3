"""A double of the module ``tensorrt``, made of one release's stub file, that records every call.

Classes, enums with their values, methods, properties and functions are those of the release, with
its signatures: an unknown name is an AttributeError; a wrong number of arguments, a wrong keyword
or a value that does not fit the annotation is a TypeError; an attribute that does not exist cannot
be set. A class that the bindings do not let one construct cannot be constructed here either. So a
test of our code on the double fails where the real module would have refused. What TensorRT does
is not known here: a test says what a call returns, or takes the defaults (an instance of the class
that is promised, True, 0, an empty text).

::

    trt = Double.of("10.3")
    trt.when("ICudaEngine.num_io_tensors", returns=2)
    trt.when("Runtime.deserialize_cuda_engine", does=lambda runtime, plan: trt.new("ICudaEngine"))
    ...                                                   # code that imports tensorrt
    (call,) = trt.named("IBuilderConfig.set_memory_pool_limit")
    assert call.arguments["pool_size"] == 1 << 30
    trt.drive(monitor, "phase_start", "Building", None, 3)   # as TensorRT calls it back

A name is ``Class.member``, of the class that has it or one derived from it, or a function's.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from tests.tensorrt.stubs import RELEASES, Release

__all__ = ["Call", "Double", "MissingStub"]


class MissingStub(Exception):
    """No stub file of this release here."""


@dataclass(frozen=True)
class Call:
    """One call of a method or function, or one setting of a property (argument ``value``).

    ``owner``: the object, None for a function or a static method. ``name``: ``Class.member``, of
    the object's own class. ``arguments``: by the signature's names, defaults left out.
    """

    owner: Any
    name: str
    arguments: dict[str, Any]


# --- what a stub file says


@dataclass(frozen=True)
class _Signature:
    """One way to call: parameters without ``self``, their annotations, and what is returned."""

    shape: inspect.Signature
    annotations: dict[str, ast.expr]
    returns: ast.expr
    static: bool


@dataclass
class _Class:
    """A class of the stub file."""

    name: str
    bases: tuple[str, ...]
    methods: dict[str, list[_Signature]] = field(default_factory=dict)
    # Name -> annotation, and whether it can be set.
    properties: dict[str, tuple[ast.expr, bool]] = field(default_factory=dict)

    @property
    def is_enum(self) -> bool:
        return "__members__" in self.properties


@dataclass(frozen=True)
class _Stub:
    """A whole stub file with its values.json."""

    classes: dict[str, _Class]
    functions: dict[str, list[_Signature]]
    enums: dict[str, dict[str, int]]
    names: dict[str, str]


def _argument(node: ast.arg, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(node.arg, kind, default=default)


def _signature(node: ast.FunctionDef, method: bool) -> _Signature:
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    positional = [*node.args.posonlyargs, *node.args.args]
    empty = inspect.Parameter.empty
    defaults: list[Any] = [empty] * (len(positional) - len(node.args.defaults))
    defaults += node.args.defaults
    pairs = list(zip(positional, defaults, strict=True))
    if method and not static:
        pairs = pairs[1:]
    parameters = []
    for argument, default in pairs:
        # What pybind11 could not name can only be given by position.
        unnamed = argument in node.args.posonlyargs or (
            argument.arg.startswith("arg") and argument.arg[3:].isdigit()
        )
        kind = (
            inspect.Parameter.POSITIONAL_ONLY
            if unnamed
            else inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        parameters.append(_argument(argument, kind, default))
    if node.args.vararg is not None:
        parameters.append(_argument(node.args.vararg, inspect.Parameter.VAR_POSITIONAL, empty))
    if node.args.kwarg is not None:
        parameters.append(_argument(node.args.kwarg, inspect.Parameter.VAR_KEYWORD, empty))
    anything = ast.parse("typing.Any", mode="eval").body
    return _Signature(
        inspect.Signature(parameters),
        {argument.arg: argument.annotation or anything for argument, _ in pairs},
        node.returns or anything,
        static,
    )


def _read_class(node: ast.ClassDef, prefix: str, classes: dict[str, _Class]) -> None:
    found = _Class(prefix + node.name, tuple(ast.unparse(base) for base in node.bases))
    classes[found.name] = found
    for member in node.body:
        if isinstance(member, ast.ClassDef):
            _read_class(member, f"{found.name}.", classes)
        elif isinstance(member, ast.AnnAssign):
            annotation = member.annotation
            constant = ast.unparse(annotation).startswith("typing.ClassVar")
            found.properties[ast.unparse(member.target)] = (annotation, not constant)
        elif isinstance(member, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in member.decorator_list]
            if any(decorator.endswith(".setter") for decorator in decorators):
                found.properties[member.name] = (found.properties[member.name][0], True)
            elif any(decorator == "property" for decorator in decorators):
                anything = ast.parse("typing.Any", mode="eval").body
                found.properties[member.name] = (member.returns or anything, False)
            else:
                found.methods.setdefault(member.name, []).append(_signature(member, True))


@functools.cache
def _read(release: Release) -> _Stub:
    source = (release.stubs / "tensorrt" / "__init__.pyi").read_text(encoding="utf-8")
    values = json.loads((release.stubs / "values.json").read_text(encoding="utf-8"))
    classes: dict[str, _Class] = {}
    functions: dict[str, list[_Signature]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            _read_class(node, "", classes)
        elif isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(_signature(node, False))
    return _Stub(classes, functions, values["enums"], values["names"])


# --- interfaces that Python code derives from

# What TensorRT calls, by the number of its arguments, as the bindings' C++ looks it up. Signatures
# in a stub file do not tell: IOutputAllocator's are hidden, IErrorRecorder's num_errors is looked
# up as get_num_errors. (NVIDIA/TensorRT, python/src/infer/pyCore.cpp: PYBIND11_OVERLOAD_PURE_NAME
# and getOverride.)
_CALLBACKS: dict[str, dict[str, int]] = {
    "ILogger": {"log": 2},
    "IProfiler": {"report_layer_time": 2},
    "IProgressMonitor": {"phase_start": 3, "step_complete": 2, "phase_finish": 1},
    "IErrorRecorder": {
        "get_num_errors": 0,
        "get_error_code": 1,
        "get_error_desc": 1,
        "has_overflowed": 0,
        "clear": 0,
        "report_error": 2,
    },
    "IOutputAllocator": {"reallocate_output": 4, "notify_shape": 2},
    "IGpuAllocator": {"allocate": 3, "reallocate": 3, "deallocate": 1},
    "IGpuAsyncAllocator": {"allocate_async": 4, "deallocate_async": 2},
    "IStreamReader": {"read": 1},
    "IStreamReaderV2": {"read": 3, "seek": 2},
    "IStreamWriter": {"write": 2},
    "IDebugListener": {"process_debug_tensor": 6},
}
# May be left out.
_OPTIONAL_CALLBACKS: dict[str, dict[str, int]] = {
    "IOutputAllocator": {"reallocate_output_async": 5},
}
# What a callback has to return, where TensorRT makes use of it.
_CALLBACK_RESULTS: dict[str, type] = {
    "IProgressMonitor.step_complete": bool,
    "IErrorRecorder.get_num_errors": int,
    "IErrorRecorder.get_error_desc": str,
    "IErrorRecorder.has_overflowed": bool,
    "IErrorRecorder.report_error": bool,
    "IOutputAllocator.reallocate_output": int,
    "IOutputAllocator.reallocate_output_async": int,
}


class _Object:
    """Base of every class of the double that is no enum."""

    _double: ClassVar[Double]
    _class: ClassVar[_Class]
    _made = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_class" in vars(cls) or not hasattr(cls, "_class"):
            return
        # A class of the code under test, and not one of the double's own.
        for interface, callbacks in _callbacks_of(cls).items():
            for name, count in callbacks.items():
                if name in vars(cls):
                    _check_override(cls, interface, name, count)
        own = vars(cls).get("__init__")
        if own is None:
            return

        @functools.wraps(own)
        def checked(self: Any, *arguments: Any, **keywords: Any) -> None:
            own(self, *arguments, **keywords)
            if not self._made:
                raise TypeError(
                    f"tensorrt.{self._class.name}.__init__() must be called when overriding "
                    "__init__"
                )

        cls.__init__ = checked  # type: ignore[method-assign]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        signatures = _constructors(self._double, type(self))
        if signatures is None:
            raise TypeError(f"tensorrt.{self._class.name}: No constructor defined!")
        name = f"{self._class.name}.__init__"
        given = self._double._bound(name, signatures, arguments, keywords)[1]
        object.__setattr__(self, "_made", True)
        self._double.calls.append(Call(self, name, given))
        self._start(given)

    def _start(self, given: dict[str, Any]) -> None:
        """What a constructor does with its arguments: keeps those that are properties."""
        for name, value in given.items():
            if self._double._property(type(self), name) is not None:
                self._double._values[id(self), name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        described = inspect.getattr_static(type(self), name, None)
        if "_class" in vars(type(self)) and not isinstance(described, property):
            raise AttributeError(f"'tensorrt.{self._class.name}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"<double of tensorrt.{self._class.name}>"


class _Dims(_Object):
    """Dims, which behave as a sequence."""

    _sizes: tuple[int, ...] = ()

    def _start(self, given: dict[str, Any]) -> None:
        sizes = next(iter(given.values()), ()) if len(given) == 1 else tuple(given.values())
        object.__setattr__(self, "_sizes", tuple(int(size) for size in sizes))

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sizes)

    def __getitem__(self, index: Any) -> Any:
        return self._sizes[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Dims | tuple | list) and self._sizes == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._sizes)


class _Collection(_Object):
    """PluginFieldCollection and its like, which behave as a list."""

    _items: Sequence[Any] = ()

    def _start(self, given: dict[str, Any]) -> None:
        object.__setattr__(self, "_items", list(next(iter(given.values()), ())))

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]


class _Enum:
    """Base of every enum: pybind11's ``enum_``, which is no ``enum.Enum``."""

    __members__: ClassVar[dict[str, Any]]
    _class: ClassVar[_Class]

    def __init__(self, value: int) -> None:
        for member in self.__members__.values():
            if member.value == int(value):
                self._name: str = member.name
                self._value: int = member.value
                return
        raise ValueError(f"tensorrt.{self._class.name} has no value {value}")

    @property
    def name(self) -> str:
        return self._name

    @property
    def value(self) -> int:
        return self._value

    def __int__(self) -> int:
        return self._value

    __index__ = __int__

    def __hash__(self) -> int:
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and other._value == self._value

    def _compared(self, other: object) -> int:
        if not isinstance(other, type(self)):
            raise TypeError("Expected an enumeration of matching type!")
        return other._value

    def __lt__(self, other: object) -> bool:
        return self._value < self._compared(other)

    def __le__(self, other: object) -> bool:
        return self._value <= self._compared(other)

    def __gt__(self, other: object) -> bool:
        return self._value > self._compared(other)

    def __ge__(self, other: object) -> bool:
        return self._value >= self._compared(other)

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self._name}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self._name}: {self._value}>"


# --- the double


@dataclass
class _Behaviour:
    """What a name does, for every object or for one."""

    does: Callable[..., Any]
    on: Any = None


class Double:
    """A fresh module ``tensorrt`` of one release; ``module`` goes into ``sys.modules``.

    ``calls``: everything that was called or set, in order.
    """

    def __init__(self, release: Release) -> None:
        if not (release.stubs / "values.json").is_file():
            raise MissingStub(f"no stub file of TensorRT {release.name}: `make tensorrt-stubs`")
        self.release = release
        self.calls: list[Call] = []
        self._stub = _read(release)
        self._behaviours: dict[str, list[_Behaviour]] = {}
        # Values of properties by object and name; objects are kept, so that an id stays one.
        self._values: dict[tuple[int, str], Any] = {}
        self._objects: list[Any] = []
        self._classes: dict[str, Any] = {}
        self.module = ModuleType("tensorrt", f"A double of TensorRT {release.name}.")
        self._build()

    @classmethod
    def of(cls, name: str) -> Double:
        """The double of the release called ``name``: ``10.3``."""
        return cls(next(release for release in RELEASES if release.name == name))

    # --- what a test arranges and asks

    def when(
        self,
        name: str,
        *,
        returns: Any = None,
        does: Callable[..., Any] | None = None,
        raises: BaseException | None = None,
        on: Any = None,
    ) -> None:
        """What ``Class.member`` gives from now on, or gives for the object ``on`` alone.

        ``does`` is called with the object and the arguments, in the signature's order, without
        those left out. What comes out must fit the signature's promise.
        """
        self._known(name)
        if raises is not None:
            error = raises

            def does(*arguments: Any) -> Any:
                raise error

        elif does is None:

            def does(*arguments: Any) -> Any:
                return returns

        self._behaviours.setdefault(name, []).append(_Behaviour(does, on))

    def named(self, name: str) -> list[Call]:
        """Every call of ``Class.member`` so far, in order, also on objects of derived classes."""
        self._known(name)
        owner, _, member = name.rpartition(".")
        return [
            call
            for call in self.calls
            if call.name.rpartition(".")[2] == member
            and (not owner or owner in self._lineage(call.name.rpartition(".")[0]))
        ]

    def new(self, name: str, /, **values: Any) -> Any:
        """An object of the class ``name``, as TensorRT makes them, with these properties."""
        cls = self._class(name)
        made = cls.__new__(cls)
        object.__setattr__(made, "_made", True)
        for attribute, value in values.items():
            annotation, _ = self._property(cls, attribute) or (None, False)
            if annotation is None:
                raise AttributeError(f"tensorrt.{name} has no property {attribute!r}")
            self._promised(f"{name}.{attribute}", annotation, value)
            self._values[id(made), attribute] = value
        self._objects.append(made)
        return made

    def host_memory(self, content: bytes) -> Any:
        """An IHostMemory with this content, to be read through its buffer and ``nbytes``."""
        # ctypes' arrays have a buffer, which Python 3.11 cannot give a class of its own.
        kind = _host_memory_class(self._class("IHostMemory"), len(content))
        memory = kind.from_buffer_copy(content)
        self._values[id(memory), "nbytes"] = len(content)
        self._objects.append(memory)
        return memory

    def drive(self, listener: Any, name: str, *arguments: Any) -> Any:
        """Calls ``listener``'s ``name`` as TensorRT calls its interfaces back.

        TypeError when the name is none that TensorRT calls, when it is not overridden, or when the
        result cannot be used. TensorRT prints and swallows an exception; here it comes through.
        """
        for interface, callbacks in _callbacks_of(type(listener), optional=True).items():
            if name not in callbacks:
                continue
            if len(arguments) != callbacks[name]:
                raise TypeError(f"{interface}.{name} is called with {callbacks[name]} arguments")
            if _overridden(type(listener), name) is None:
                raise TypeError(f'Tried to call pure virtual function "{interface}::{name}"')
            result = getattr(listener, name)(*arguments)
            wanted = _CALLBACK_RESULTS.get(f"{interface}.{name}")
            if wanted is not None and not isinstance(result, wanted):
                raise TypeError(
                    f"{interface}.{name} has to return {wanted.__name__}, and gave {result!r}"
                )
            return result
        raise TypeError(f"TensorRT calls no {name!r} of {type(listener).__name__}")

    # --- how it works

    def _class(self, name: str) -> Any:
        if name not in self._classes:
            raise AttributeError(f"TensorRT {self.release.name} has no class {name!r}")
        return self._classes[name]

    def _known(self, name: str) -> None:
        owner, _, member = name.rpartition(".")
        if not owner and name in self._stub.functions:
            return
        if owner in self._classes:
            cls = self._classes[owner]
            if self._method(cls, member) or self._property(cls, member) or member == "__init__":
                return
        raise AttributeError(f"TensorRT {self.release.name} has no {name!r}")

    def _lineage(self, name: str) -> list[str]:
        """A class's name and those of its bases."""
        if name not in self._classes:
            return [name]
        return [base._class.name for base in self._classes[name].__mro__ if "_class" in vars(base)]

    def _method(self, cls: Any, name: str) -> list[_Signature] | None:
        for base in cls.__mro__:
            described = vars(base).get("_class")
            if described is not None and name in described.methods:
                found: list[_Signature] = described.methods[name]
                return found
        return None

    def _property(self, cls: Any, name: str) -> tuple[ast.expr, bool] | None:
        for base in cls.__mro__:
            described = vars(base).get("_class")
            if described is not None and name in described.properties:
                found: tuple[ast.expr, bool] = described.properties[name]
                return found
        return None

    def _build(self) -> None:
        for described in self._stub.classes.values():
            bases = tuple(self._classes[base] for base in described.bases if base in self._classes)
            attributes: dict[str, Any] = {
                "_class": described,
                "__module__": "tensorrt",
                "__qualname__": described.name,
            }
            name = described.name.rpartition(".")[2]
            if described.is_enum:
                made: Any = type(name, (_Enum,), {**attributes, "__members__": {}})
                for member, value in self._stub.enums.get(described.name, {}).items():
                    instance = made.__new__(made)
                    instance._name, instance._value = member, value
                    made.__members__[member] = instance
                    setattr(made, member, instance)
            else:
                root = next((kind for start, kind in _ROOTS if name.startswith(start)), _Object)
                attributes["_double"] = self
                for member in described.methods:
                    if member not in _OWN:
                        attributes[member] = self._made_method(member, described.methods[member])
                for member, (_, writable) in described.properties.items():
                    if member not in _OWN:
                        attributes[member] = self._made_property(member, writable)
                made = type(name, bases or (root,), attributes)
            self._classes[described.name] = made
            self._place(described.name, made)
        for name, signatures in self._stub.functions.items():
            setattr(self.module, name, self._made_function(name, signatures))
        for name, target in self._stub.names.items():
            owner, _, member = target.rpartition(".")
            self._place(name, self._classes[owner].__members__[member])
        self.module.__version__ = self.release.version  # type: ignore[attr-defined]
        self.module.volume = lambda iterable: int(np.prod(tuple(iterable), dtype=np.int64))  # type: ignore[attr-defined]
        self.module.nptype = self._nptype  # type: ignore[attr-defined]
        self._class("DataType").itemsize = property(lambda kind: _ITEM_SIZES[kind.name])

    def _place(self, name: str, value: Any) -> None:
        owner, _, member = name.rpartition(".")
        setattr(self._classes[owner] if owner else self.module, member, value)

    def _nptype(self, kind: Any) -> Any:
        if kind.name not in _NUMPY_TYPES:
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return _NUMPY_TYPES[kind.name]

    def _made_method(self, name: str, signatures: list[_Signature]) -> Any:
        if signatures[0].static:

            def static(*arguments: Any, **keywords: Any) -> Any:
                return self._called(None, name, signatures, arguments, keywords)

            return staticmethod(static)

        def method(this: Any, *arguments: Any, **keywords: Any) -> Any:
            if name in ("__enter__", "__exit__"):
                warnings.warn(
                    "Context managers for TensorRT types are deprecated.",
                    DeprecationWarning,
                    stacklevel=2,
                )
            full = f"{this._class.name}.{name}"
            return self._called(this, full, signatures, arguments, keywords)

        method.__name__ = name
        return method

    def _made_function(self, name: str, signatures: list[_Signature]) -> Any:
        def function(*arguments: Any, **keywords: Any) -> Any:
            return self._called(None, name, signatures, arguments, keywords)

        return function

    def _made_property(self, name: str, writable: bool) -> property:
        def read(this: Any) -> Any:
            full = f"{this._class.name}.{name}"
            annotation, _ = self._property(type(this), name) or (None, False)
            assert annotation is not None
            does = self._behaviour(full, this)
            if does is not None:
                return self._promised(full, annotation, does(this))
            if (id(this), name) not in self._values:
                self._values[id(this), name] = self._default(annotation)
            return self._values[id(this), name]

        def write(this: Any, value: Any) -> None:
            annotation, _ = self._property(type(this), name) or (None, False)
            assert annotation is not None
            full = f"{this._class.name}.{name}"
            if value is not None or not self._is_interface(annotation):
                self._check(value, annotation, f"{full} = {value!r}")
            self.calls.append(Call(this, full, {"value": value}))
            self._values[id(this), name] = value

        return property(read, write if writable else None)

    def _behaviour(self, name: str, this: Any) -> Callable[..., Any] | None:
        owner, _, member = name.rpartition(".")
        names = [f"{base}.{member}" for base in self._lineage(owner)] if owner else [name]
        general = None
        for candidate in names:
            for behaviour in reversed(self._behaviours.get(candidate, [])):
                if behaviour.on is not None and behaviour.on is this:
                    return behaviour.does
                if behaviour.on is None and general is None:
                    general = behaviour.does
        return general

    def _called(
        self,
        this: Any,
        name: str,
        signatures: list[_Signature],
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Any:
        if isinstance(this, _Object) and not this._made:
            raise TypeError(f"tensorrt.{this._class.name}.__init__() was never called")
        signature, given = self._bound(name, signatures, arguments, keywords)
        self.calls.append(Call(this, name, given))
        does = self._behaviour(name, this)
        if does is None:
            return self._default(signature.returns)
        result = does(*([] if this is None else [this]), *given.values())
        return self._promised(name, signature.returns, result)

    def _bound(
        self,
        name: str,
        signatures: list[_Signature],
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> tuple[_Signature, dict[str, Any]]:
        """The first signature that takes these arguments, and the arguments by their names."""
        reasons = []
        for signature in signatures:
            try:
                bound = signature.shape.bind(*arguments, **keywords)
            except TypeError as error:
                reasons.append(f"{_spelled(name, signature)}: {error}")
                continue
            wrong = [
                f"{parameter} is {ast.unparse(signature.annotations[parameter])}, not {value!r}"
                for parameter, value in bound.arguments.items()
                if parameter in signature.annotations
                and not self._fits(value, signature.annotations[parameter])
            ]
            if not wrong:
                return signature, dict(bound.arguments)
            reasons.append(f"{_spelled(name, signature)}: {'; '.join(wrong)}")
        lines = "\n    ".join(reasons)
        raise TypeError(
            f"{name}(): incompatible arguments in TensorRT {self.release.name}:\n    {lines}"
        )

    def _check(self, value: Any, annotation: ast.expr, words: str) -> None:
        if not self._fits(value, annotation):
            raise TypeError(f"{words}: {ast.unparse(annotation)} is wanted")

    def _promised(self, name: str, annotation: ast.expr, value: Any) -> Any:
        """``value``, which a test gives for ``name``."""
        self._check(value, annotation, f"the test lets {name} give {value!r}")
        return value

    def _is_interface(self, annotation: ast.expr) -> bool:
        return isinstance(annotation, ast.Name) and annotation.id in self._classes

    def _fits(self, value: Any, annotation: ast.expr) -> bool:
        """Whether ``value`` may stand where ``annotation`` does."""
        match annotation:
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self._fits(value, left) or self._fits(value, right)
            case ast.Constant(value=None):
                return value is None
            case ast.Subscript(value=outer, slice=inner):
                return self._fits_container(value, ast.unparse(outer), inner)
        name = ast.unparse(annotation)
        if name in _PLAIN:
            return _PLAIN[name](value)
        if name not in self._classes:
            return True
        cls = self._classes[name]
        if isinstance(value, cls):
            self._check_complete(value)
            return True
        if name.startswith("Dims"):
            return isinstance(value, list | tuple) and all(map(_PLAIN["int"], value))
        return name == "Weights" and isinstance(value, np.ndarray)

    def _fits_container(self, value: Any, outer: str, inner: ast.expr) -> bool:
        kind = outer.rpartition(".")[2]
        if kind == "ClassVar":
            return self._fits(value, inner)
        if kind == "Optional":
            return value is None or self._fits(value, inner)
        if kind in ("list", "Sequence", "Iterable"):
            return isinstance(value, list | tuple | _Dims | _Collection) and all(
                self._fits(item, inner) for item in value
            )
        if kind in ("tuple", "dict"):
            return isinstance(value, tuple if kind == "tuple" else dict)
        return callable(value) if kind == "Callable" else True

    def _check_complete(self, value: Any) -> None:
        """TypeError for an object of a derived class that lacks what TensorRT will call."""
        if "_class" in vars(type(value)):
            return
        for interface, callbacks in _callbacks_of(type(value)).items():
            for name in callbacks:
                if _overridden(type(value), name) is None:
                    raise TypeError(
                        f"{type(value).__name__} does not override {interface}.{name}, which "
                        "TensorRT calls"
                    )

    def _default(self, annotation: ast.expr) -> Any:
        match annotation:
            case ast.BinOp(left=left, op=ast.BitOr()):
                return self._default(left)
            case ast.Subscript(value=outer):
                kind = ast.unparse(outer).rpartition(".")[2]
                return {"tuple": (), "dict": {}}.get(kind, [])
        name = ast.unparse(annotation)
        if name in _DEFAULTS:
            return _DEFAULTS[name]()
        if name not in self._classes:
            return None
        if name == "IHostMemory":
            return self.host_memory(b"double")
        cls = self._classes[name]
        if issubclass(cls, _Enum):
            return next(iter(cls.__members__.values()))
        return self.new(name)


_ROOTS = (("Dims", _Dims), ("PluginFieldCollection", _Collection), ("Permutation", _Collection))

# What the bases above have themselves, and Python's own.
_OWN = {
    *vars(_Object), *vars(_Dims), *vars(_Collection), "__new__", "__contains__", "__ne__",
    "__delitem__", "__setitem__", "__bool__", "__getstate__", "__setstate__", "__str__",
    "__buffer__", "__del__",
}  # fmt: skip


def _has_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


_PLAIN: dict[str, Callable[[Any], bool]] = {
    # A bool where a number is wanted, or a number where a bool is, is taken by pybind11 and meant
    # by nobody.
    "builtins.bool": lambda value: isinstance(value, bool | np.bool_),
    "int": lambda value: isinstance(value, int | np.integer) and not isinstance(value, bool),
    "float": lambda value: (
        isinstance(value, int | float | np.number) and not isinstance(value, bool)
    ),
    "str": lambda value: isinstance(value, str),
    "bytes": lambda value: isinstance(value, bytes),
    "numpy.ndarray": lambda value: isinstance(value, np.ndarray),
    "typing_extensions.Buffer": _has_buffer,
}

_DEFAULTS: dict[str, Callable[[], Any]] = {
    "builtins.bool": lambda: True,
    "int": lambda: 0,
    "float": lambda: 0.0,
    "str": str,
    "bytes": bytes,
    "memoryview": lambda: memoryview(b""),
    "typing_extensions.CapsuleType": builtins.object,
    "numpy.ndarray": lambda: np.zeros(0),
}

_NUMPY_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}
_ITEM_SIZES = {
    "FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1,
    "FP8": 1, "INT4": 0.5, "FP4": 0.5, "E8M0": 1,
}  # fmt: skip


def _spelled(name: str, signature: _Signature) -> str:
    parameters = ", ".join(
        f"{parameter}: {ast.unparse(signature.annotations[parameter])}"
        if parameter in signature.annotations
        else parameter
        for parameter in signature.shape.parameters
    )
    return f"{name}({parameters})"


def _constructors(double: Double, cls: Any) -> list[_Signature] | None:
    """The constructors of the nearest class of TensorRT's; constructors are not inherited."""
    nearest = next(base for base in cls.__mro__ if "_class" in vars(base))
    described: _Class = nearest._class
    return described.methods.get("__init__")


def _callbacks_of(cls: type, optional: bool = False) -> dict[str, dict[str, int]]:
    """Interfaces that ``cls`` is derived from -> what TensorRT calls of them."""
    found = {}
    for base in cls.__mro__:
        described = vars(base).get("_class")
        if described is not None and described.name in _CALLBACKS:
            found[described.name] = {
                **_CALLBACKS[described.name],
                **(_OPTIONAL_CALLBACKS.get(described.name, {}) if optional else {}),
            }
    return found


def _overridden(cls: type, name: str) -> Any:
    """The method of that name that the code under test defines."""
    for base in cls.__mro__:
        if "_class" in vars(base):
            return None
        if name in vars(base):
            return vars(base)[name]
    return None


def _check_override(cls: type, interface: str, name: str, count: int) -> None:
    """TypeError when a method cannot be called as TensorRT calls it: by position."""
    try:
        inspect.signature(vars(cls)[name]).bind(None, *range(count))
    except TypeError as error:
        raise TypeError(
            f"{cls.__name__}.{name} is called with {count} arguments by {interface}: {error}"
        ) from error


def _host_memory_class(base: Any, size: int) -> Any:
    array: Any = ctypes.c_ubyte * size
    hidden = dict.fromkeys(("__len__", "__getitem__", "__setitem__", "__iter__"))
    return type(array)(
        "IHostMemory",
        (base, array),
        {
            "_class": base._class,
            "_type_": ctypes.c_ubyte,
            "_length_": size,
            "_made": True,
            **hidden,
        },
    )
