"""A TOML file that a user wrote: a recipe."""

from __future__ import annotations

import os
import sys
from typing import Any

from edgeseg.errors import RequestError
from edgeseg.files import read_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["read_toml"]

# A recipe of all layers of a large network has some ten thousand.
_LARGEST = 1 << 20


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values in the recipe at ``path``; RequestError when it cannot be read."""
    try:
        values: dict[str, Any] = tomllib.loads(read_file(path, most=_LARGEST).decode("utf-8"))
    except OSError as error:
        raise RequestError(f"the recipe {path} cannot be read ({error.strerror})") from error
    except RecursionError:
        raise RequestError(f"the recipe {path} is not valid TOML: it has too many levels") from None
    except ValueError as error:
        # No UTF-8, no TOML, or a number of thousands of digits.
        raise RequestError(f"the recipe {path} is not valid TOML: {error}") from error
    return values
