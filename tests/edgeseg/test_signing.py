"""Signatures of bundles: what is signed, what is refused, and that model signing's own reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import edgeseg
from edgeseg import cli, signing
from edgeseg.bundle import Bundle, write_manifest
from edgeseg.errors import BundleError, EdgeSegError, RequestError
from edgeseg.onnxfile import OnnxFile
from edgeseg.signing import SIGNATURE, sign_folder, signed_files

if TYPE_CHECKING:
    from tests.conftest import Tiny

pytest.importorskip("model_signing", reason="pip install 'edgeseg[signing]' is what signs")

from cryptography.hazmat.primitives.asymmetric import ec

from tests.edgeseg.keys import write_keys


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


@pytest.fixture
def signed(bundle_folder: Path, keys: tuple[Path, Path]) -> Path:
    assert sign_folder(bundle_folder, keys[0]) == bundle_folder / SIGNATURE
    return bundle_folder


def model_signing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The other program."""
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_signed_bundle(signed: Path, keys: tuple[Path, Path]) -> None:
    bundle = Bundle.open(signed, public_key=keys[1])
    assert bundle.signed and bundle.name == "tiny"
    assert not Bundle.open(signed).signed
    assert sorted(signed_files(signed, keys[1])) == ["bundle.json", "model.onnx", "report.html"]
    assert sorted(path.name for path in signed.iterdir()) == [
        "bundle.json", "model.onnx", "model.sig", "report.html",
    ]  # fmt: skip


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_every_curve(bundle_folder: Path, tmp_path: Path, curve: Callable[[], object]) -> None:
    private, public = write_keys(tmp_path, curve=curve())
    sign_folder(bundle_folder, private)
    assert Bundle.open(bundle_folder, public_key=public).signed


def test_engines_are_built_later(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "engines").mkdir()
    (signed / "engines" / "orin.plan").write_bytes(b"plan")
    assert Bundle.open(signed, public_key=keys[1]).signed


def test_a_copy_is_signed_as_well(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Bundle.open(signed).copy_to(tmp_path / "copy")
    assert Bundle.open(copy, public_key=keys[1]).signed


def test_signed_again(signed: Path, keys: tuple[Path, Path]) -> None:
    write_manifest(signed, {"name": "tiny", "provenance": {"by": "hand"}})
    assert SIGNATURE not in json.loads((signed / "bundle.json").read_text())["files"]
    with pytest.raises(BundleError, match="is not what was signed"):
        Bundle.open(signed, public_key=keys[1])
    sign_folder(signed, keys[0])
    assert Bundle.open(signed, public_key=keys[1]).signed


def appended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / SIGNATURE).unlink(), r"is not signed: it has no model\.sig"),
        (lambda folder: appended(folder / "model.onnx"), "Hash mismatch for 'model.onnx'"),
        (lambda folder: appended(folder / "report.html"), "Hash mismatch for 'report.html'"),
        (lambda folder: appended(folder / "bundle.json"), "Hash mismatch for 'bundle.json'"),
        (lambda folder: (folder / "report.html").unlink(), "Missing files.*report.html"),
        (lambda folder: (folder / "more").write_text("x"), "Extra files.*more"),
        (lambda folder: (folder / "more").symlink_to("report.html"), "symlink"),
        (lambda folder: (folder / SIGNATURE).write_text("{}"), "is not what was signed"),
        (lambda folder: (folder / SIGNATURE).write_text("[" * 100_000), "is not what was signed"),
        (lambda folder: (folder / SIGNATURE).write_bytes(b"\xff"), "is not what was signed"),
    ],
)
def test_changed_bundles(
    signed: Path,
    keys: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    says: str,
) -> None:
    change(signed)

    def parsed(*_: object) -> None:
        raise AssertionError("the model was looked at")

    for name in ("metadata", "check_whole"):
        monkeypatch.setattr(OnnxFile, name, parsed)
    with pytest.raises(BundleError, match=says):
        Bundle.open(signed, public_key=keys[1])


def test_every_byte_of_the_signature_counts(signed: Path, keys: tuple[Path, Path]) -> None:
    values = json.loads((signed / SIGNATURE).read_text())
    (entry,) = values["dsseEnvelope"]["signatures"]
    for where in (entry, values["dsseEnvelope"]):
        key = "sig" if where is entry else "payload"
        original = where[key]
        for at in (10, len(original) // 2, len(original) - 10):
            letter = "A" if original[at] != "A" else "B"
            where[key] = original[:at] + letter + original[at + 1 :]
            (signed / SIGNATURE).write_text(json.dumps(values))
            with pytest.raises(BundleError, match="is not what was signed"):
                Bundle.open(signed, public_key=keys[1])
        where[key] = original


def test_signed_by_somebody_else(signed: Path, tmp_path: Path) -> None:
    other = write_keys(tmp_path, "other")
    with pytest.raises(BundleError, match=r"is not what was signed with the key.*Key mismatch"):
        Bundle.open(signed, public_key=other[1])
    # The hint which key it was is signed by nobody.
    path = signed / SIGNATURE
    values = json.loads(path.read_text())
    del values["verificationMaterial"]["publicKey"]["hint"]
    path.write_text(json.dumps(values))
    with pytest.raises(BundleError, match="is not what was signed with the key"):
        Bundle.open(signed, public_key=other[1])


def test_a_manifest_that_changes_after_the_check(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeseg import bundle as module

    def checked(folder: Path, key: Path) -> object:
        found = signed_files(folder, key)
        appended(folder / "bundle.json")
        return found

    monkeypatch.setattr(module, "signed_files", checked)
    with pytest.raises(BundleError, match="changed while its signature was checked"):
        Bundle.open(signed, public_key=keys[1])


def test_a_folder_that_takes_forever(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (signed / "huge").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(BundleError, match=r"holds more than 1000 files or 4\.3 GB"):
        Bundle.open(signed, public_key=keys[1])
    (signed / "huge").unlink()
    (signed / SIGNATURE).unlink()
    os.mkfifo(signed / SIGNATURE)
    with pytest.raises(BundleError, match=r"model\.sig cannot be read \(it is no regular file"):
        Bundle.open(signed, public_key=keys[1])


def test_keys_that_are_none(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    for wrong in (keys[0], tmp_path / "missing", signed / "report.html", tmp_path):
        with pytest.raises(RequestError, match="cannot check a signature"):
            Bundle.open(signed, public_key=wrong)
    for wrong in (keys[1], tmp_path / "missing", tmp_path):
        with pytest.raises(RequestError, match=r"cannot sign \(.*openssl ecparam"):
            sign_folder(signed, wrong)
    private, _ = write_keys(tmp_path, "odd", ec.SECP256K1())
    with pytest.raises(RequestError, match=r"cannot sign \(Unsupported key for curve"):
        sign_folder(signed, private)


def test_lone_files_and_shipped_models(signed: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(RequestError, match="is a lone file; give the folder, or no key"):
        Bundle.open(signed / "model.onnx", public_key=keys[1])
    with pytest.raises(BundleError, match="streets is not signed"):
        Bundle.open("streets", public_key=keys[1])


def test_without_the_package(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(
        EdgeSegError, match=r"checking a signature needs model-signing.*\[signing\]"
    ):
        Bundle.open(signed, public_key=keys[1])
    with pytest.raises(EdgeSegError, match=r"signing a bundle needs model-signing"):
        signing.sign_folder(signed, keys[0])
    assert Bundle.open(signed).name == "tiny"


# --- the other program


def test_model_signing_verifies_what_edgeseg_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "engines").mkdir()
    (signed / "engines" / "x.plan").write_bytes(b"plan")
    arguments = ("verify", "key", signed, "--signature", signed / SIGNATURE)
    done = model_signing(*arguments, "--public_key", keys[1])
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr
    appended(signed / "report.html")
    assert model_signing(*arguments, "--public_key", keys[1]).returncode == 1


@pytest.mark.parametrize("engines", [False, True])
def test_edgeseg_checks_what_model_signing_signed(
    bundle_folder: Path, keys: tuple[Path, Path], engines: bool
) -> None:
    ignored: tuple[str | Path, ...] = ()
    if engines:
        (bundle_folder / "engines").mkdir()
        (bundle_folder / "engines" / "x.plan").write_bytes(b"plan")
        ignored = ("--ignore-paths", bundle_folder / "engines")
    signature = bundle_folder / SIGNATURE
    done = model_signing(
        "sign", "key", bundle_folder, "--signature", signature, "--private_key", keys[0], *ignored
    )
    assert done.returncode == 0, done.stderr
    assert Bundle.open(bundle_folder, public_key=keys[1]).signed


# --- on the command line


def test_command(
    bundle_folder: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, private, public = str(bundle_folder), str(keys[0]), str(keys[1])
    assert cli.main(["sign", folder, "--key", private]) == 0
    assert capsys.readouterr().out == f"wrote {bundle_folder / SIGNATURE}\n"
    assert cli.main(["sign", folder, "--check", "--public-key", public]) == 0
    assert "is what was signed with the key" in capsys.readouterr().out
    assert cli.main(["inspect", folder, "--public-key", public, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["name"] == "tiny"
    appended(bundle_folder / "report.html")
    for command in (
        ["sign", folder, "--check", "--public-key", public],
        ["inspect", folder, "--public-key", public],
        ["eval", folder, "--data", "synthetic:?frames=1", "--public-key", public],
    ):
        assert cli.main(command) == 1
        assert "is not what was signed" in capsys.readouterr().err
    for wrong in (
        ["sign", folder],
        ["sign", folder, "--check"],
        ["sign", folder, "--key", private, "--public-key", public],
        ["sign", folder, "--key", private, "--check", "--public-key", public],
        ["sign", f"{folder}/model.onnx", "--key", private],
    ):
        assert cli.main(wrong) == 2


def test_load(tiny: Tiny, signed: Path, keys: tuple[Path, Path]) -> None:
    pytest.importorskip("openvino")
    with edgeseg.load(signed, public_key=keys[1]) as model:
        assert model.bundle.signed
        model(tiny.picture(1))
    appended(signed / "report.html")
    with pytest.raises(BundleError, match="is not what was signed"):
        edgeseg.load(signed, public_key=keys[1])
