"""A JSON file of figures, written whole or not at all."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edgeseg.errors import SinkError

__all__ = ["json_text", "write_json"]


def json_text(content: Mapping[str, object]) -> str:
    """``content`` as people read it, with a line end."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes ``content`` to ``path``; SinkError, and nothing left behind, when that fails."""
    text = json_text(content)
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise SinkError(f"{path} cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            beside.unlink()
