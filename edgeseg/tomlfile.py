"""A TOML file that a user wrote: a recipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from edgeseg.errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["read_toml"]


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values in the recipe at ``path``; RequestError when it cannot be read."""
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"the recipe {path} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the recipe {path} is not valid TOML: {error}") from error
    return values
