"""A setting to compare: a bundle, and how it is opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from edgeseg.errors import RequestError

__all__ = ["Head", "Setting"]

Head = Literal["auto", "compiled", "graph"]

_GRAMMAR = "a setting is BUNDLE[@ENGINE][,threads=N][,head=auto|compiled|graph]"


@dataclass(frozen=True)
class Setting:
    """A bundle on an engine.

    ``engine`` None: the best that is here. ``threads``: 0 leaves the number to the library, or to
    what a sweep found. ``head``: where masks are brought to size; "auto" uses the compiled kernel
    if it is there.
    """

    bundle: str
    engine: str | None = None
    threads: int = 0
    head: Head = "auto"

    @classmethod
    def parse(cls, text: str, base: Setting | None = None) -> Setting:
        """The setting called ``text``, such as ``streets@openvino,threads=1``.

        What is left out is as in ``base``: ``@onnxruntime`` or ``,threads=2`` is the same bundle on
        another engine or with other threads. RequestError for what is no setting.
        """
        start = base or cls("")
        # A folder may be called anything.
        if text and Path(text).exists():
            return replace(start, bundle=text)
        name, *options = text.split(",")
        bundle, at, engine = name.rpartition("@") if "@" in name else (name, "", "")
        found = replace(start, bundle=bundle or start.bundle)
        if at:
            if not engine:
                raise RequestError(f"{_GRAMMAR}, and {text!r} names no engine after its @")
            found = replace(found, engine=engine)
        for option in options:
            found = found._with(option, text)
        if not found.bundle:
            raise RequestError(f"{_GRAMMAR}, and {text!r} names no bundle")
        return found

    def _with(self, option: str, text: str) -> Setting:
        key, _, value = option.partition("=")
        if key == "threads" and value.isdecimal():
            return replace(self, threads=int(value))
        if key == "head" and value in get_args(Head):
            return replace(self, head=cast("Head", value))
        if key == "engine" and value:
            return replace(self, engine=value)
        raise RequestError(f"{_GRAMMAR}, and {text!r} came, where {option!r} is none of them")

    @property
    def compiled_head(self) -> bool | None:
        """As `edgeseg.load` takes it."""
        return {"auto": None, "compiled": True, "graph": False}[self.head]

    def __str__(self) -> str:
        """The setting as `parse` reads it."""
        engine = f"@{self.engine}" if self.engine else ""
        threads = f",threads={self.threads}" if self.threads else ""
        head = f",head={self.head}" if self.head != "auto" else ""
        return f"{self.bundle}{engine}{threads}{head}"
