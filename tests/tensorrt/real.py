"""What the real bindings of a release answer on a CPU, for comparison with the double.

Run in a process of its own (stubs.bindings_environment) with a JSON list of expressions on
standard input. The last line of standard output is JSON: public names by the class that has them,
the outcome of every expression, and the methods that TensorRT's C++ calls of derived classes, with
the number of their arguments.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any


def outcome(expression: str, trt: Any) -> str:
    """The text of a result, or the name of the error's type.

    Statements before the last ``; `` are executed, the rest is the expression.
    """
    scope = {"trt": trt}
    *statements, last = expression.split("; ")
    try:
        exec("\n".join(statements), scope)
        return str(eval(last, scope))
    except Exception as error:
        return type(error).__name__


def public_names(trt: Any) -> Iterator[tuple[str, list[str]]]:
    """Every class of the bindings by its qualified name, "" for the module, with its names."""
    waiting = [("", trt)]
    while waiting:
        owner, scope = waiting.pop()
        names = [name for name in dir(scope) if not name.startswith("_")]
        yield owner, names
        for name in names:
            value = getattr(scope, name)
            qualified = f"{owner}.{name}".lstrip(".")
            known = isinstance(value, type) and value.__module__ == trt.tensorrt.__name__
            # Logger.Severity is ILogger's.
            if known and value.__qualname__ == qualified:
                waiting.append((qualified, value))


def callbacks(trt: Any) -> list[tuple[str, str, int]]:
    """What C++ calls when an interface's own methods are called on an object of a derived class."""
    found: list[tuple[str, str, int]] = []

    def listener(interface: str, results: dict[str, Any]) -> Any:
        base = getattr(trt, interface)

        def recording(name: str) -> Any:
            def method(self: Any, *arguments: Any) -> Any:
                found.append((interface, name, len(arguments)))
                return results[name]

            return method

        return type(
            "Own",
            (base,),
            {
                "__init__": base.__init__,
                **{name: recording(name) for name in results},
            },
        )()

    success = trt.ErrorCodeTRT.SUCCESS
    tables: dict[str, tuple[dict[str, Any], list[tuple[Any, ...]]]] = {
        "ILogger": ({"log": None}, [("log", trt.ILogger.ERROR, "text")]),
        "IProfiler": ({"report_layer_time": None}, [("report_layer_time", "layer", 0.5)]),
        "IProgressMonitor": (
            {"phase_start": None, "step_complete": True, "phase_finish": None},
            [
                ("phase_start", "phase", "parent", 3),
                ("step_complete", "phase", 1),
                ("phase_finish", "phase"),
            ],
        ),
        "IErrorRecorder": (
            {
                "num_errors": 1,
                "get_num_errors": 1,
                "get_error_code": success,
                "get_error_desc": "text",
                "has_overflowed": False,
                "clear": None,
                "report_error": True,
            },
            [
                ("num_errors",),
                ("get_error_code", 0),
                ("get_error_desc", 0),
                ("has_overflowed",),
                ("clear",),
                ("report_error", success, "text"),
            ],
        ),
    }
    for interface, (results, calls) in tables.items():
        own = listener(interface, results)
        for name, *arguments in calls:
            getattr(getattr(trt, interface), name)(own, *arguments)
    return found


if __name__ == "__main__":
    bindings = importlib.import_module("tensorrt_bindings")
    expressions = json.load(sys.stdin)
    outcomes = [outcome(expression, bindings) for expression in expressions]
    print(json.dumps([dict(public_names(bindings)), outcomes, callbacks(bindings)]))
