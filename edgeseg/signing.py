"""Who made a bundle: signatures by OpenSSF model signing, with an elliptic-curve key.

A hash in ``bundle.json`` says that nothing was changed by accident; who changes a file on purpose
writes a new hash beside it. A signature says that the folder is what the holder of a private key
signed. It is the file ``model.sig`` beside the others, in model signing's own format (v1.0 of its
predicate, in a Sigstore bundle), so that ``model_signing verify key`` reads it, and what
``model_signing sign key`` wrote is read here. Certificates, PKCS #11 and keyless signing are that
command's own.

Everything in the folder is signed but ``engines/``, which each device builds for itself.

https://github.com/sigstore/model-transparency, docs/model_signing_format.md
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from edgeseg.errors import BundleError, EdgeSegError, RequestError
from edgeseg.files import read_file

__all__ = ["SIGNATURE", "UNSIGNED", "sign_folder", "signed_files"]

#: name of the signature in a bundle's folder
SIGNATURE = "model.sig"
#: what is in the folder and is not signed
UNSIGNED: tuple[str, ...] = (SIGNATURE, "engines")

# A name, a hash and a few words for each file.
_LARGEST_SIGNATURE = 1 << 22
# What is hashed before anybody knows whether it is signed.
_MOST_FILES = 1000
_MOST_BYTES = 1 << 32


def sign_folder(folder: Path, private_key: str | os.PathLike[str]) -> Path:
    """Signs all files in ``folder`` but `UNSIGNED`; returns the signature's path.

    ``private_key``: a PEM file, not encrypted, of curve P-256, P-384 or P-521. An older signature
    is replaced. RequestError for a key that cannot be used, BundleError when the folder cannot be
    signed as it is, or not be written.
    """
    _check_installed("signing a bundle")
    from model_signing import signing

    _check_bounded(folder)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except Exception as error:
        # OSError, ValueError, TypeError, and cryptography's own, which share no other base.
        raise RequestError(
            f"{private_key} cannot sign ({_reason(error)}); give an elliptic-curve private key in "
            "PEM, not encrypted, such as `openssl ecparam -name prime256v1 -genkey -noout` writes"
        ) from error
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / SIGNATURE
        try:
            config.set_hashing_config(_recording()).sign(folder, written)
            content = written.read_bytes()
        except Exception as error:
            raise BundleError(f"{folder} cannot be signed ({_reason(error)})") from error
    beside = folder / f".{SIGNATURE}.part"
    try:
        beside.write_bytes(content)
        beside.replace(folder / SIGNATURE)
    except OSError as error:
        raise BundleError(f"{folder / SIGNATURE} cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            beside.unlink()
    return folder / SIGNATURE


def signed_files(folder: Path, public_key: str | os.PathLike[str]) -> Mapping[str, str]:
    """The files of ``folder`` as they were signed: name -> sha256.

    BundleError unless the folder has a signature of the private key that belongs to
    ``public_key``, and holds exactly the files that were signed. They have been read for that; who
    reads them again compares with what this returns. RequestError for a key that is none.
    """
    _check_installed("checking a signature")
    try:
        content = read_file(folder / SIGNATURE, most=_LARGEST_SIGNATURE, within=folder)
    except FileNotFoundError:
        raise BundleError(
            f"{folder} is not signed: it has no {SIGNATURE}; take a signed copy, sign it with "
            "`edgeseg sign`, or load it without a key if you trust where it came from"
        ) from None
    except OSError as error:
        raise BundleError(f"{folder / SIGNATURE} cannot be read ({error.strerror})") from error
    _check_bounded(folder)
    from model_signing import verifying

    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise RequestError(
            f"{public_key} cannot check a signature ({_reason(error)}); give the public key in "
            "PEM, such as `openssl ec -in KEY.pem -pubout` writes"
        ) from error
    hashing = _recording()
    config.set_hashing_config(hashing)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / SIGNATURE
        try:
            copy.write_bytes(content)
            # It prints a warning of old signatures, which is no part of what a command says.
            with redirect_stdout(sys.stderr):
                config.verify(folder, copy)
        except Exception as error:
            raise BundleError(
                f"{folder} is not what was signed with the key that belongs to {public_key} "
                f"({_reason(error)}); copy the bundle again, or ask who signed it for their key"
            ) from error
    found: Mapping[str, str] = hashing.found
    return found


def _recording() -> Any:
    """How model signing hashes a folder, and what it found, by name, in ``found``."""
    from model_signing import hashing

    class Recording(hashing.Config):
        found: Mapping[str, str]

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            manifest = super().hash(model_path, files_to_hash=files_to_hash)
            self.found = {
                str(entry.identifier): entry.digest.digest_hex
                for entry in manifest.resource_descriptors()
                if entry.digest.algorithm == "sha256"
            }
            return manifest

    return Recording().set_ignored_paths(paths=UNSIGNED)


def _check_bounded(folder: Path) -> None:
    """BundleError when hashing ``folder`` would take forever."""
    count = size = 0
    for path, folders, names in os.walk(folder):
        if Path(path) == folder:
            folders[:] = [name for name in folders if name not in (*UNSIGNED, ".git")]
        count += len(names) + len(folders)
        for name in names:
            with suppress(OSError):
                size += (Path(path) / name).lstat().st_size
        if count > _MOST_FILES or size > _MOST_BYTES:
            raise BundleError(
                f"{folder} holds more than {_MOST_FILES} files or {_MOST_BYTES / 1e9:.1f} GB, "
                "which is no bundle; look what else is in it"
            )


def _check_installed(what: str) -> None:
    try:
        importlib.import_module("model_signing")
    except ImportError as error:
        raise EdgeSegError(
            f"{what} needs model-signing, which cannot be loaded here ({error}); "
            "pip install 'edgeseg[signing]' adds it"
        ) from error


def _reason(error: Exception) -> str:
    """What an exception of another library says, on one line, without the digests in full."""
    # Differences come as a list of texts in Python's own notation.
    text = " ".join(str(error).replace("\\", "").split()).partition(": Expected 'Digest")[0]
    return text.replace("['", "").replace('["', "")[:300] or type(error).__name__
