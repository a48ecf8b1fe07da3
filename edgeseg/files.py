"""Files that somebody else wrote, read without trusting them.

A bundle may come from anywhere. What it names may be missing, endless, a device, a pipe that nobody
writes to, or a link to somewhere else; none of these may hang the program, fill its memory, or be
opened at all. So a file is looked at before it is opened, opened without waiting, looked at again,
and read once, as long as it said it is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["file_sha256", "open_file", "read_file"]

_CHUNK = 1 << 20


def read_file(
    path: str | os.PathLike[str], *, most: int, within: str | os.PathLike[str] | None = None
) -> bytes:
    """The content of the regular file at ``path``, which has at most ``most`` bytes.

    ``within``: a folder that no link may lead out of. OSError, with a ``strerror`` that fits into a
    sentence, for anything else; what is no regular file is never opened.
    """
    with open_file(path, most=most, within=within) as (file, size):
        # One more than it says it has: a file that grows meanwhile is not the one looked at.
        content = file.read(size + 1)
        if len(content) != size:
            raise OSError(errno.EIO, "it changed while it was read")
        return content


def file_sha256(
    path: str | os.PathLike[str], *, most: int, within: str | os.PathLike[str] | None = None
) -> str:
    """The sha256 of the regular file at ``path``, in hex; otherwise as `read_file`."""
    digest = hashlib.sha256()
    with open_file(path, most=most, within=within) as (file, size):
        left = size
        while chunk := file.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise OSError(errno.EIO, "it changed while it was read")
            digest.update(chunk)
        if left:
            raise OSError(errno.EIO, "it changed while it was read")
    return digest.hexdigest()


@contextmanager
def open_file(
    path: str | os.PathLike[str], *, most: int, within: str | os.PathLike[str] | None = None
) -> Iterator[tuple[BinaryIO, int]]:
    """The regular file at ``path`` and its size; otherwise as `read_file`."""
    where = Path(path)
    try:
        real = Path(os.path.realpath(where))
        if within is not None and not real.is_relative_to(os.path.realpath(within)):
            raise OSError(
                errno.EPERM, "it is a link out of its folder; `cp -rL` copies what links lead to"
            )
        _check_regular(real.stat(), most)
    except ValueError as error:
        # A zero byte in the name.
        raise OSError(errno.EINVAL, "no file can have that name") from error
    # Between the two looks the name may have been given to something else. Opening a pipe must then
    # not wait for who writes to it.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    with os.fdopen(os.open(real, flags), "rb") as file:
        status = os.fstat(file.fileno())
        _check_regular(status, most)
        yield file, status.st_size


def _check_regular(status: os.stat_result, most: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if status.st_size > most:
        raise OSError(
            errno.EFBIG, f"it has {_size(status.st_size)}, and at most {_size(most)} are read"
        )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"
