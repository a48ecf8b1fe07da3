"""A bundle: the folder that goes to the device."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeseg.errors import BundleError, RequestError
from edgeseg.golden import AnyGolden, golden_from_json
from edgeseg.onnxfile import OnnxFile
from edgeseg.spec import ModelSpec

__all__ = ["GOLDEN_KEY", "SHIPPED", "SPEC_KEY", "WEIGHTS_KEY", "Bundle"]

#: keys of ``metadata_props`` in the ONNX file
SPEC_KEY = "edgeseg.spec"
GOLDEN_KEY = "edgeseg.golden"
WEIGHTS_KEY = "edgeseg.weights"

_MODEL = "model.onnx"
_MANIFEST = "bundle.json"
_SHIPPED_FOLDER = Path(__file__).parent / "bundles"

#: names of the models inside the package; they are taken wherever a bundle is
SHIPPED: tuple[str, ...] = ("streets", "streets-int8", "street-objects")


@dataclass(frozen=True)
class Bundle:
    """One opened bundle, or a lone ONNX file made by EdgeSeg.

    ``folder`` is None for a lone file. ``manifest`` is what ``bundle.json`` says: ``files`` (name
    -> sha256), ``provenance``, ``verification``, ``accuracy``; empty for a lone file.
    """

    folder: Path | None
    model_path: Path
    model: OnnxFile
    spec: ModelSpec
    golden: AnyGolden
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Bundle:
        """The bundle called ``source``: a shipped name, a bundle's folder, or an ONNX file.

        The file's hash is compared with ``bundle.json``. BundleError when something is missing,
        changed, or not EdgeSeg's.
        """
        path = cls.locate(source)
        if path.is_dir():
            return cls._open_folder(path)
        return cls._described(None, path, OnnxFile.read(path), {})

    @classmethod
    def locate(cls, source: str | os.PathLike[str]) -> Path:
        """Where ``source`` is: a folder on disk before a shipped model of the same name."""
        path = Path(source)
        if path.exists():
            return path
        if str(source) in SHIPPED:
            return _SHIPPED_FOLDER / str(source)
        raise BundleError(
            f"there is no bundle {source}; give a bundle's folder, an ONNX file made by "
            f"`edgeseg export`, or a model that ships with EdgeSeg: {', '.join(SHIPPED)}"
        )

    @classmethod
    def _open_folder(cls, folder: Path) -> Bundle:
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            promised = dict(manifest["files"])
        except FileNotFoundError as error:
            raise BundleError(
                f"{folder} is not a bundle: it has no {_MANIFEST}; `edgeseg export` makes one"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{folder / _MANIFEST} is damaged ({error})") from error
        if _MODEL not in promised:
            raise BundleError(f"{folder / _MANIFEST} does not name {_MODEL}; export it again")
        content = b""
        for name, expected in promised.items():
            if name in ("", "..") or Path(name).name != name:
                raise BundleError(
                    f"{folder / _MANIFEST} is damaged: a bundle's files lie in its folder, "
                    f"and {name!r} does not"
                )
            file = OnnxFile.read(folder / name)
            if hashlib.sha256(file.content).hexdigest() != expected:
                raise BundleError(
                    f"{folder / name} is not the file that was exported: its sha256 differs from "
                    f"the one in {_MANIFEST}; copy the bundle again, or export it again"
                )
            if name == _MODEL:
                content = file.content
        path = folder / _MODEL
        return cls._described(folder, path, OnnxFile(content, str(path)), manifest)

    @classmethod
    def _described(
        cls, folder: Path | None, path: Path, model: OnnxFile, manifest: Mapping[str, Any]
    ) -> Bundle:
        metadata = model.metadata()
        if SPEC_KEY not in metadata or GOLDEN_KEY not in metadata:
            raise BundleError(
                f"{path} was not exported by EdgeSeg: its metadata lack {SPEC_KEY}; "
                "make a bundle of the trained model with `edgeseg export`"
            )
        return cls(
            folder=folder,
            model_path=path,
            model=model,
            spec=ModelSpec.from_json(metadata[SPEC_KEY]),
            golden=golden_from_json(metadata[GOLDEN_KEY]),
            manifest=manifest,
        )

    @property
    def name(self) -> str:
        """What a person calls it: the spec's name."""
        return self.spec.name

    def copy_to(self, target: str | os.PathLike[str]) -> Path:
        """Writes the bundle's files to a new folder ``target``; returns its path."""
        if self.folder is None:
            raise RequestError(f"{self.model_path} is a lone file, not a bundle; just copy it")
        with new_bundle(target) as folder:
            for name in (*self.manifest["files"], _MANIFEST):
                shutil.copyfile(self.folder / name, folder / name)
        return Path(target)


@contextmanager
def new_bundle(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends, and vanishes if it fails.

    An older bundle at ``target`` is replaced in the same moment. RequestError when something that
    is no bundle is there; BundleError when the place cannot be written.
    """
    target = Path(target)
    if target.exists() and not (target / _MANIFEST).is_file():
        is_empty = target.is_dir() and not any(target.iterdir())
        if not is_empty:
            raise RequestError(
                f"{target} exists and is no bundle; choose another name, or move it away"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise BundleError(f"{target} cannot be written ({error.strerror})") from error
    try:
        yield beside
        try:
            beside.chmod(0o755)
            _put(beside, target)
        except OSError as error:
            raise BundleError(f"{target} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_new_bundle(target: str | os.PathLike[str]) -> None:
    """Raises now what ``new_bundle`` would raise when long work is done."""
    with suppress(_TriedError), new_bundle(target):
        raise _TriedError


class _TriedError(Exception):
    """Leaves a new bundle that was only begun to see whether it could be."""


def _put(folder: Path, target: Path) -> None:
    """Gives ``folder`` the name ``target``; an older bundle there stays if that fails."""
    if not (target / _MANIFEST).is_file():
        # Nothing, or an empty folder, which a rename replaces.
        folder.replace(target)
        return
    attic = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    old = attic / target.name
    try:
        target.replace(old)
        try:
            folder.replace(target)
        except OSError:
            old.replace(target)
            raise
    except OSError:
        # Not rmtree: if the old bundle could not be put back, this is where it is.
        with suppress(OSError):
            attic.rmdir()
        raise
    shutil.rmtree(attic, ignore_errors=True)


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Writes ``bundle.json`` for all files in ``folder``: their sha256, and ``entries``."""
    files = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != _MANIFEST
    }
    text = json.dumps({"files": files, **entries}, indent=2, sort_keys=True)
    (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of the distributions ``names`` that are installed."""
    # Imported here: opening a bundle on the device need not pay for it.
    import importlib.metadata
    import platform

    found = {"python": platform.python_version()}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
