"""Files of others: what is read, and what is not even opened."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeseg.files import file_sha256, open_file, read_file

READERS: tuple[Callable[..., object], ...] = (read_file, file_sha256)


@pytest.mark.parametrize("size", [0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_whole_files(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    for within in (None, tmp_path):
        assert read_file(path, most=size, within=within) == content
        assert file_sha256(path, most=size, within=within) == hashlib.sha256(content).hexdigest()
    with open_file(path, most=size) as (file, told):
        assert told == size and file.read() == content


@pytest.mark.parametrize("read", READERS)
def test_a_file_that_is_too_large(tmp_path: Path, read: Callable[..., object]) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError) as caught:
        read(path, most=5000)
    assert caught.value.strerror == "it has 1099511.6 MB, and at most 5000 bytes are read"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/zero", "/dev/null", "folder"])
def test_what_is_no_file_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, read: Callable[..., object]
) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)

    def opened(*_: object) -> int:
        raise AssertionError("it was opened")

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(OSError) as caught:
        read(path, most=1 << 20)
    wanted = "Is a directory" if kind == "folder" else "it is no regular file"
    assert caught.value.strerror == wanted


@pytest.mark.parametrize("read", READERS)
def test_what_becomes_a_pipe_after_the_first_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[..., object]
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"content")
    original = os.open

    def swapped(name: str, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        # Without O_NONBLOCK this would wait forever.
        return original(name, flags)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError) as caught:
        read(path, most=100)
    assert caught.value.strerror == "it is no regular file"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("change", [b"", b"cont", b"content and more"])
def test_what_changes_while_it_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: bytes,
    read: Callable[..., object],
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"content")
    original = os.fstat

    def rewritten(descriptor: int) -> os.stat_result:
        status = original(descriptor)
        path.write_bytes(change)
        return status

    monkeypatch.setattr(os, "fstat", rewritten)
    with pytest.raises(OSError) as caught:
        read(path, most=100)
    assert caught.value.strerror == "it changed while it was read"


def test_links_inside_and_out(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (tmp_path / "folder-too").mkdir()
    (tmp_path / "folder-too" / "file").write_bytes(b"outside")
    (folder / "inside").symlink_to("deep/../file")
    assert read_file(folder / "inside", most=100, within=folder) == b"inside"
    (tmp_path / "alias").symlink_to(folder)
    assert read_file(tmp_path / "alias" / "inside", most=100, within=tmp_path / "alias") == (
        b"inside"
    )
    for index, target in enumerate(
        ["../secret", str(tmp_path / "secret"), "../folder-too/file", "deep/../../secret"]
    ):
        link = folder / f"out{index}"
        link.symlink_to(target)
        with pytest.raises(OSError) as caught:
            read_file(link, most=100, within=folder)
        assert "a link out of its folder" in (caught.value.strerror or "")
        assert read_file(link, most=100) == b"outside"
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError):
        read_file(folder / "loop", most=100, within=folder)


def test_names_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        read_file(f"{tmp_path}/a\0b", most=1)
    assert caught.value.strerror == "no file can have that name"
    with pytest.raises(OSError):
        read_file(tmp_path / ("a" * 300), most=1)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "nothing", most=1)
