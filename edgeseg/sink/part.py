"""A file that is not finished: under another name, beside the one it is to become."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path

from edgeseg.errors import SinkError

__all__ = ["Part", "reason_of", "temporary"]


class Part:
    """A file that takes long to write, under a name that its owner finds should the run be killed.

    ``out.mp4`` is written as ``out.part.mkv``, or ``out.part-2.mkv`` where the first is taken: what
    a killed run has left is never overwritten, and `leftovers` are such files. A lock, which the
    system takes back when a process ends in whatever way, tells them from those that are being
    written. Raises SinkError when the folder cannot be written to.
    """

    def __init__(self, target: Path, suffix: str) -> None:
        if not target.parent.is_dir():
            raise SinkError(
                f"the folder {target.parent} does not exist; make it, or choose another"
            )
        self._target = target
        self.leftovers = _leftovers(target)
        number = 1
        while True:
            place = f".part-{number}" if number > 1 else ".part"
            self.path = target.with_name(f"{target.stem}{place}{suffix}")
            try:
                self._lock = os.open(
                    self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
                )
                break
            except FileExistsError:
                number += 1
            except OSError as error:
                raise SinkError(
                    f"{target} cannot be written ({reason_of(error)}); choose another"
                ) from error
        _lock(self._lock)
        self._done = False

    def keep(self) -> None:
        """Gives it the name it was meant for; OSError when that cannot be."""
        self.path.replace(self._target)
        self.leave()

    def remove(self) -> None:
        """Removes it; does nothing when it was kept."""
        if not self._done:
            self.path.unlink(missing_ok=True)
            self.leave()

    def leave(self) -> None:
        """Leaves it as it is."""
        if not self._done:
            self._done = True
            os.close(self._lock)


def _leftovers(target: Path) -> tuple[Path, ...]:
    """Unfinished files for ``target`` that nobody writes to."""
    pattern = re.compile(re.escape(target.stem) + r"\.part(-[0-9]+)?\.[a-z0-9]+")
    found = []
    for path in sorted(target.parent.iterdir()):
        if not pattern.fullmatch(path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if _lock(descriptor):
                found.append(path)
        finally:
            os.close(descriptor)
    return tuple(found)


def _lock(descriptor: int) -> bool:
    """Locks a file; False when somebody else has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: nothing can be known there.
        return True
    return True


def temporary(target: Path) -> Path:
    """An empty file beside ``target``, with its ending (OpenCV reads the format from it).

    Raises SinkError when the folder cannot be written to.
    """
    if not target.parent.is_dir():
        raise SinkError(f"the folder {target.parent} does not exist; make it, or choose another")
    part = target.with_name(f".{target.stem}-{secrets.token_hex(4)}.part{target.suffix.lower()}")
    try:
        part.touch(exist_ok=False)
    except OSError as error:
        raise SinkError(
            f"{target} cannot be written ({reason_of(error)}); choose another"
        ) from error
    return part


def reason_of(error: OSError) -> str:
    """The system's reason as part of a sentence: ``permission denied``."""
    return (error.strerror or str(error)).lower()
