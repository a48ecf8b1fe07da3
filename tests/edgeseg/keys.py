"""Pairs of keys for signatures, new for every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["write_keys"]


def write_keys(folder: Path, name: str = "key", curve: Any = None) -> tuple[Path, Path]:
    """A private and a public key in PEM, of P-256 if no other curve is asked for."""
    private = ec.generate_private_key(curve or ec.SECP256R1())
    paths = folder / f"{name}.pem", folder / f"{name}.pub"
    paths[0].write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    paths[1].write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return paths
