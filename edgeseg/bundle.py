"""A bundle: the folder that goes to the device.

It may come from anywhere, so nothing in it is taken at its word: see docs/bundle.md, "Security".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeseg.errors import BundleError, RequestError
from edgeseg.files import file_sha256, read_file
from edgeseg.golden import AnyGolden, golden_from_json
from edgeseg.jsonfile import parse_json
from edgeseg.onnxfile import LARGEST, OnnxFile
from edgeseg.signing import SIGNATURE, signed_files
from edgeseg.spec import ModelSpec

__all__ = ["GOLDEN_KEY", "SHIPPED", "SPEC_KEY", "WEIGHTS_KEY", "Bundle"]

#: keys of ``metadata_props`` in the ONNX file
SPEC_KEY = "edgeseg.spec"
GOLDEN_KEY = "edgeseg.golden"
WEIGHTS_KEY = "edgeseg.weights"

_MODEL = "model.onnx"
_MANIFEST = "bundle.json"
_ENGINES = "engines"
_SHIPPED_FOLDER = Path(__file__).parent / "bundles"

#: names of the models inside the package; they are taken wherever a bundle is
SHIPPED: tuple[str, ...] = ("streets", "streets-int8", "street-objects")

# Far above what any model needs, and far below what hurts: EdgeSeg's own have 0.1 and 1 MB. A
# model may have as much as the format allows.
_LARGEST_MANIFEST = 1 << 24
_LARGEST_FILE = 1 << 28
_MOST_FILES = 1000

# One name on every file system, whatever it makes of capitals, accents and dots.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]*(?:\.[A-Za-z0-9_+-]+)*", re.ASCII)
_LONGEST_NAME = 128
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
# What others of EdgeSeg's modules look up in a manifest, and its type.
_TYPES: Mapping[str, type] = {
    "name": str,
    "provenance": dict,
    "verification": dict,
    "accuracy": list,
    "quantization": dict,
}
# What has a meaning of its own in the folder, and what Windows takes for a device.
_RESERVED = re.compile(
    rf"{re.escape(_MANIFEST)}|{re.escape(SIGNATURE)}|{_ENGINES}"
    r"|(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?"
)


@dataclass(frozen=True)
class Bundle:
    """One opened bundle, or a lone ONNX file made by EdgeSeg.

    ``folder`` is None for a lone file. ``manifest`` is what ``bundle.json`` says: ``files`` (name
    -> sha256), ``provenance``, ``verification``, ``accuracy``; empty for a lone file. ``signed``:
    whether it was opened with a public key, and is what the key's owner signed; engines in the
    folder, which nobody signs, are then left alone.
    """

    folder: Path | None
    model_path: Path
    model: OnnxFile
    spec: ModelSpec
    golden: AnyGolden
    manifest: Mapping[str, Any]
    signed: bool = False

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        public_key: str | os.PathLike[str] | None = None,
    ) -> Bundle:
        """The bundle called ``source``: a shipped name, a bundle's folder, or an ONNX file.

        Every file's hash is compared with ``bundle.json``; what was hashed is what is parsed.
        ``public_key``: a PEM file; the bundle must then be signed with the private key that
        belongs to it, which is found out before anything of the model is looked at.

        BundleError when something is missing, changed, not signed so, or not EdgeSeg's.
        RequestError for a lone file with a key, and for a key that is none.
        """
        path = cls.locate(source)
        if path.is_dir():
            return cls._open_folder(path, public_key)
        if public_key is not None:
            raise RequestError(
                f"a signature is of a bundle's folder, and {path} is a lone file; give the folder, "
                "or no key"
            )
        return cls._described(None, path, OnnxFile.read(path), {})

    @classmethod
    def locate(cls, source: str | os.PathLike[str]) -> Path:
        """Where ``source`` is: a folder on disk before a shipped model of the same name."""
        path = Path(source)
        # Names that are too long, or in a folder that may not be read.
        with suppress(OSError, ValueError):
            if path.exists():
                return path
        if str(source) in SHIPPED:
            return _SHIPPED_FOLDER / str(source)
        raise BundleError(
            f"there is no bundle {source}; give a bundle's folder, an ONNX file made by "
            f"`edgeseg export`, or a model that ships with EdgeSeg: {', '.join(SHIPPED)}"
        )

    @classmethod
    def _open_folder(cls, folder: Path, public_key: str | os.PathLike[str] | None) -> Bundle:
        signed = None if public_key is None else signed_files(folder, public_key)
        try:
            content = read_file(folder / _MANIFEST, most=_LARGEST_MANIFEST, within=folder)
            if signed is not None and signed.get(_MANIFEST) != hashlib.sha256(content).hexdigest():
                raise BundleError(
                    f"{folder / _MANIFEST} changed while its signature was checked; try again"
                )
            manifest = parse_json(content)
            promised = _promised(manifest)
        except FileNotFoundError as error:
            raise BundleError(
                f"{folder} is not a bundle: it has no {_MANIFEST}; `edgeseg export` makes one"
            ) from error
        except OSError as error:
            raise BundleError(f"{folder / _MANIFEST} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{folder / _MANIFEST} is damaged ({error})") from error
        if _MODEL not in promised:
            raise BundleError(f"{folder / _MANIFEST} does not name {_MODEL}; export it again")
        model = b""
        for name, expected in promised.items():
            path = folder / name
            try:
                if name == _MODEL:
                    model = read_file(path, most=LARGEST, within=folder)
                    found = hashlib.sha256(model).hexdigest()
                else:
                    found = file_sha256(path, most=_LARGEST_FILE, within=folder)
            except OSError as error:
                raise BundleError(f"{path} cannot be read ({error.strerror})") from error
            if found != expected:
                raise BundleError(
                    f"{path} is not the file that was exported: its sha256 differs from "
                    f"the one in {_MANIFEST}; copy the bundle again, or export it again"
                )
        path = folder / _MODEL
        file = OnnxFile(model, str(path))
        return cls._described(folder, path, file, manifest, signed=signed is not None)

    @classmethod
    def _described(
        cls,
        folder: Path | None,
        path: Path,
        model: OnnxFile,
        manifest: Mapping[str, Any],
        *,
        signed: bool = False,
    ) -> Bundle:
        metadata = model.metadata()
        if SPEC_KEY not in metadata or GOLDEN_KEY not in metadata:
            raise BundleError(
                f"{path} was not exported by EdgeSeg: its metadata lack {SPEC_KEY}; "
                "make a bundle of the trained model with `edgeseg export`"
            )
        model.check_whole()
        return cls(
            folder=folder,
            model_path=path,
            model=model,
            spec=ModelSpec.from_json(metadata[SPEC_KEY]),
            golden=golden_from_json(metadata[GOLDEN_KEY]),
            manifest=manifest,
            signed=signed,
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
            with suppress(FileNotFoundError):
                shutil.copyfile(self.folder / SIGNATURE, folder / SIGNATURE)
        return Path(target)


def _promised(manifest: Any) -> dict[str, str]:
    """The files that a manifest names, and their sha256.

    ValueError, KeyError or TypeError for names that could mean two things, or something outside,
    and for entries of other types than EdgeSeg writes.
    """
    files = manifest["files"]
    if not isinstance(files, dict):
        raise TypeError(f"files is {type(files).__name__}, not names with their sha256")
    for entry, kind in _TYPES.items():
        if entry in manifest and not isinstance(manifest[entry], kind):
            raise TypeError(f"{entry} is {type(manifest[entry]).__name__}, not {kind.__name__}")
    if len(files) > _MOST_FILES:
        raise ValueError(f"it names {len(files)} files, and a bundle has {_MOST_FILES} at most")
    seen: dict[str, str] = {}
    for name, digest in files.items():
        if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            raise ValueError(
                f"a bundle's files lie in its folder and have plain names, and {name[:80]!r} came"
            )
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ValueError(f"{other} and {name} are one file on some file systems")
        if _RESERVED.fullmatch(name.lower()):
            raise ValueError(f"{name} is no name of a bundle's file")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"the sha256 of {name} is no sha256")
    return dict(files)


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
        if file.is_file() and file.name not in (_MANIFEST, SIGNATURE)
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
