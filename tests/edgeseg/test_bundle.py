"""Bundles: what opens, what is refused and why, and that a new one appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgeseg.bundle import GOLDEN_KEY, SHIPPED, SPEC_KEY, Bundle, new_bundle, write_manifest
from edgeseg.errors import BundleError, RequestError
from edgeseg.onnxfile import OnnxFile

if TYPE_CHECKING:
    from tests.conftest import Tiny

Leftovers = Callable[[Path], list[str]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# --- opening


def test_folder(bundle_folder: Path, tiny: Tiny) -> None:
    for source in (bundle_folder, str(bundle_folder), f"{bundle_folder}/"):
        bundle = Bundle.open(source)
        assert bundle.folder == bundle_folder
        assert bundle.model_path == bundle_folder / "model.onnx"
        assert bundle.spec == tiny.spec and bundle.name == "tiny"
        assert bundle.manifest["name"] == "tiny"
        assert bundle.model.content == (bundle_folder / "model.onnx").read_bytes()


def test_lone_file(bundle_folder: Path, tiny: Tiny) -> None:
    bundle = Bundle.open(bundle_folder / "model.onnx")
    assert (bundle.folder, bundle.spec, bundle.manifest) == (None, tiny.spec, {})
    with pytest.raises(RequestError, match="lone file"):
        bundle.copy_to(bundle_folder.parent / "copy")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = Bundle.open(name)
    assert bundle.name == name
    assert len(bundle.model.content) < (25e6 if name == "street-objects" else 8e6)
    others = bundle.model_path.parent.iterdir()
    assert sum(path.stat().st_size for path in others if path.suffix != ".onnx") < 1e6
    assert len(bundle.spec.classes) == (3 if name == "street-objects" else 11)


def test_folder_on_disk_comes_before_a_shipped_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "streets")
    assert Bundle.open("streets").name == "tiny"


# --- what is refused


def test_missing_bundle_names_what_there_is() -> None:
    with pytest.raises(
        BundleError, match=r"^there is no bundle nowhere; .*streets, streets-int8, street-objects$"
    ):
        Bundle.open("nowhere")


@pytest.mark.parametrize("name", ["model.onnx", "report.html"])
def test_every_changed_byte_is_noticed(bundle_folder: Path, name: str) -> None:
    path = bundle_folder / name
    content = path.read_bytes()
    for at in (0, len(content) // 2, len(content) - 1):
        spoilt = bytearray(content)
        spoilt[at] ^= 1
        path.write_bytes(bytes(spoilt))
        with pytest.raises(BundleError, match=rf"{name} is not the file that was exported"):
            Bundle.open(bundle_folder)
    path.write_bytes(content)
    Bundle.open(bundle_folder)


@pytest.mark.parametrize("name", ["model.onnx", "report.html"])
def test_truncated_and_missing_files(bundle_folder: Path, name: str) -> None:
    path = bundle_folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="copy the bundle again"):
        Bundle.open(bundle_folder)
    path.unlink()
    with pytest.raises(BundleError, match=rf"{name} cannot be read \(No such file"):
        Bundle.open(bundle_folder)


def test_folder_without_a_manifest(bundle_folder: Path) -> None:
    (bundle_folder / "bundle.json").unlink()
    with pytest.raises(BundleError, match=r"is not a bundle: it has no bundle\.json; .*export"):
        Bundle.open(bundle_folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", "[]", '"x"', "{}", '{"files": 3}', '{"files": ["model.onnx"]}', "\0"],
)
def test_damaged_manifest(bundle_folder: Path, text: str) -> None:
    (bundle_folder / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json is damaged \("):
        Bundle.open(bundle_folder)


def test_manifest_that_is_no_text(bundle_folder: Path) -> None:
    (bundle_folder / "bundle.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match=r"bundle\.json is damaged \("):
        Bundle.open(bundle_folder)


def test_manifest_that_does_not_name_the_model(bundle_folder: Path) -> None:
    rewrite(bundle_folder / "bundle.json", lambda manifest: manifest["files"].pop("model.onnx"))
    with pytest.raises(BundleError, match=r"does not name model\.onnx"):
        Bundle.open(bundle_folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside", "sub/file", "/outside", "..", ".", "", " ", "a\\b", "a\0b", "a\nb", "C:x",
        "~root", "-x", ".hidden", "a.", "a ", "a..b", "\u00e9", "e\u0301", "\u202ea",
        "\uff0e\uff0e", "bundle.json", "BUNDLE.json", "model.sig", "engines", "Engines", "con",
        "NUL.txt", "com1.x",
        "MODEL.onnx", "a" * 129,
    ],
)  # fmt: skip
def test_manifest_with_names_that_are_no_plain_ones(bundle_folder: Path, name: str) -> None:
    rewrite(
        bundle_folder / "bundle.json", lambda manifest: manifest["files"].update({name: "0" * 64})
    )
    with pytest.raises(BundleError, match=r"^[^\n\0]*bundle\.json is damaged \([^\n\0]*\)$"):
        Bundle.open(bundle_folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace('"files"', '"files": {}, "files"'), "'files' comes twice"),
        (lambda text: text.replace('"name"', '"x": NaN, "name"'), "NaN is no number"),
        (lambda text: text.replace('"name"', '"x": 1e999, "name"'), "too large a number"),
        (lambda text: text.replace('"name"', f'"x": {"9" * 5000}, "name"'), "too large"),
        (lambda text: text.replace('"tiny"', '"\\ud800"'), "surrogates"),
        (lambda text: text.replace('"tiny"', "3"), "name is int, not str"),
        (lambda text: text.replace("[]", "[" * 99 + "]" * 99), "64 levels"),
        (lambda text: text.replace("[]", "[" * 99_999 + "]" * 99_999), "64 levels"),
        (lambda text: text.replace("[]", '"all"'), "accuracy is str, not list"),
        (lambda text: text.replace('"name"', '"provenance": [], "name"'), "provenance is list"),
    ],
)
def test_manifest_that_says_odd_things(
    bundle_folder: Path, change: Callable[[str], str], says: str
) -> None:
    path = bundle_folder / "bundle.json"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    with pytest.raises(BundleError, match=rf"bundle\.json is damaged \(.*{says}"):
        Bundle.open(bundle_folder)


@pytest.mark.parametrize("digest", ["", "0" * 63, "A" * 64, "\u0660" * 64, 7, None, ["0" * 64]])
def test_manifest_with_a_sha256_that_is_none(bundle_folder: Path, digest: object) -> None:
    rewrite(
        bundle_folder / "bundle.json",
        lambda manifest: manifest["files"].update({"report.html": digest}),
    )
    with pytest.raises(BundleError, match=r"damaged \(the sha256 of report\.html is no sha256\)"):
        Bundle.open(bundle_folder)


def test_manifest_of_too_many_files_and_bytes(bundle_folder: Path) -> None:
    path = bundle_folder / "bundle.json"
    text = path.read_text()
    rewrite(
        path,
        lambda manifest: manifest["files"].update({f"f{n}": "0" * 64 for n in range(1000)}),
    )
    with pytest.raises(BundleError, match="it names 1002 files, and a bundle has 1000 at most"):
        Bundle.open(bundle_folder)
    path.write_text(text + " " * (16 << 20))
    with pytest.raises(BundleError, match=r"cannot be read \(it has 16\.8 MB, and at most 16\.8"):
        Bundle.open(bundle_folder)


@pytest.mark.parametrize("name", ["model.onnx", "report.html", "bundle.json"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "out"])
def test_files_that_are_no_files(bundle_folder: Path, name: str, kind: str) -> None:
    path = bundle_folder / name
    content = path.read_bytes()
    path.unlink()
    says = "it is no regular file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 42)
        says = "it has 4398046\\.5 MB, and at most"
    else:
        outside = bundle_folder.parent / "outside"
        outside.write_bytes(content)
        path.symlink_to("/dev/zero" if kind == "zero" else outside)
        says = "it is a link out of its folder"
    with pytest.raises(BundleError, match=rf"{name} cannot be read \({says}"):
        Bundle.open(bundle_folder)


def test_links_within_the_folder(bundle_folder: Path, tmp_path: Path) -> None:
    (bundle_folder / "model.onnx").rename(bundle_folder / "v1.onnx")
    (bundle_folder / "model.onnx").symlink_to("v1.onnx")
    (tmp_path / "current").symlink_to(bundle_folder)
    assert Bundle.open(tmp_path / "current").name == "tiny"


def test_what_was_hashed_is_what_is_parsed(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    module = importlib.import_module("edgeseg.bundle")
    original: Callable[..., bytes] = module.read_file
    read: list[str] = []

    def once(path: Path, *, most: int, within: Path | None = None) -> bytes:
        content = original(path, most=most, within=within)
        read.append(path.name)
        path.write_bytes(b"another content")
        return content

    monkeypatch.setattr(module, "read_file", once)
    assert Bundle.open(bundle_folder).name == "tiny"
    assert read == ["bundle.json", "model.onnx"]


@pytest.mark.parametrize("source", ["x" * 300, "a/" * 3000, "a\0b", "~nobody/x"])
def test_names_that_no_file_can_have(source: str) -> None:
    with pytest.raises(BundleError, match=r"^there is no bundle"):
        Bundle.open(source)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "was not exported by EdgeSeg: its metadata lack"),
        (b"no model\n" * 40, "is not a whole ONNX file"),
        (b"\x89PNG\r\n\x1a\n", "is not a whole ONNX file"),
    ],
)
def test_file_that_is_no_model(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=says):
        Bundle.open(path)


def test_truncated_lone_file(bundle_folder: Path) -> None:
    path = bundle_folder / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BundleError, match="is not a whole ONNX file: it is damaged, cut short"):
        Bundle.open(path)


@pytest.mark.parametrize("lone", [False, True])
def test_weights_outside_of_the_file(tiny: Tiny, bundle_folder: Path, lone: bool) -> None:
    from onnx import TensorProto

    model = tiny.model()
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    content = model.SerializeToString()
    (bundle_folder / "model.onnx").write_bytes(content)
    write_manifest(bundle_folder, {})
    with pytest.raises(
        BundleError, match=r"keeps the weights 'kernel' in a file beside it.*edgeseg export"
    ):
        Bundle.open(bundle_folder / "model.onnx" if lone else bundle_folder)


def test_weights_outside_in_a_branch(tiny: Tiny, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    tensor = TensorProto(name="deep", data_type=TensorProto.FLOAT, dims=[1])
    tensor.external_data.add(key="location", value="x")
    inner = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "g", [], [])
    model = tiny.model()
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"keeps the weights 'deep' in a file"):
        Bundle.open(path)


def test_messages_in_one_another_without_end(tiny: Tiny, tmp_path: Path) -> None:
    from edgeseg.protobuf import BYTES, joined

    nested = b""
    for _ in range(200):
        # A graph in an attribute of a node of a graph.
        for number in (6, 5, 1):
            nested = joined([(number, BYTES, 0, nested)])
    path = tmp_path / "model.onnx"
    attribute = joined([(6, BYTES, 0, nested)])
    path.write_bytes(tiny.content() + joined([(25, BYTES, 0, joined([(11, BYTES, 0, attribute)]))]))
    with pytest.raises(BundleError, match="is not a whole ONNX file"):
        Bundle.open(path)


def test_metadata_that_comes_twice(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.model()
    model.metadata_props.add(key=SPEC_KEY, value=tiny.spec.to_json())
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"says 'edgeseg\.spec' twice"):
        Bundle.open(path)


@pytest.mark.parametrize("missing", [(SPEC_KEY,), (GOLDEN_KEY,), (SPEC_KEY, GOLDEN_KEY)])
def test_model_that_is_not_ours(tiny: Tiny, tmp_path: Path, missing: tuple[str, ...]) -> None:
    model = tiny.model()
    kept = [entry for entry in model.metadata_props if entry.key not in missing]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"other\.onnx was not exported by EdgeSeg.*export"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (SPEC_KEY, '{"contract": 99}', "follows contract 99.*update EdgeSeg"),
        (SPEC_KEY, "{", "description cannot be read"),
        (GOLDEN_KEY, "{}", "golden pair cannot be read"),
    ],
)
def test_metadata_of_another_time(
    tiny: Tiny, tmp_path: Path, key: str, value: str, says: str
) -> None:
    model = tiny.model()
    next(entry for entry in model.metadata_props if entry.key == key).value = value
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=says):
        Bundle.open(path)


# --- making


def test_copy_is_the_same_bundle(bundle_folder: Path, tmp_path: Path) -> None:
    (bundle_folder / "engines").mkdir()
    target = tmp_path / "deep" / "copy"
    assert Bundle.open(bundle_folder).copy_to(target) == target
    assert names(target) == ["bundle.json", "model.onnx", "report.html"]
    assert Bundle.open(target).model.content == Bundle.open(bundle_folder).model.content
    assert names(target.parent) == ["copy"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_new_bundle_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with new_bundle(target) as folder:
        (folder / "model.onnx").write_bytes(b"model")
        write_manifest(folder, {"name": "new"})
        assert not target.exists() and folder.parent == tmp_path
    assert names(tmp_path) == ["new"]
    manifest = json.loads((target / "bundle.json").read_text())
    digest = hashlib.sha256(b"model").hexdigest()
    assert manifest == {"files": {"model.onnx": digest}, "name": "new"}


def test_new_bundle_takes_an_empty_folder(tmp_path: Path) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    with new_bundle(target) as folder:
        (folder / "bundle.json").write_text("{}")
    assert names(target) == ["bundle.json"] and names(tmp_path) == ["empty"]


def test_new_bundle_replaces_an_old_one(bundle_folder: Path, tmp_path: Path) -> None:
    (bundle_folder / "engines").mkdir()
    with new_bundle(bundle_folder) as folder:
        (folder / "bundle.json").write_text("{}")
        assert "model.onnx" in names(bundle_folder)
    assert names(bundle_folder) == ["bundle.json"] and names(tmp_path) == ["tiny"]


@pytest.mark.parametrize("error", [RuntimeError, BundleError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [False, True])
def test_failure_leaves_everything_as_it_was(
    tiny: Tiny, tmp_path: Path, old: bool, error: type[BaseException]
) -> None:
    target = tmp_path / "x"
    if old:
        tiny.write(target)
    with pytest.raises(error), new_bundle(target) as folder:
        (folder / "model.onnx").write_bytes(b"half")
        raise error
    assert names(tmp_path) == (["x"] if old else [])
    if old:
        assert Bundle.open(target).name == "tiny"


def test_old_bundle_comes_back_when_the_new_cannot_be_put(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_path = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if path.name.startswith(".tiny-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace_path(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with (
        pytest.raises(BundleError, match=r"tiny cannot be written \(No space left"),
        new_bundle(bundle_folder) as folder,
    ):
        (folder / "bundle.json").write_text("{}")
    assert names(tmp_path) == ["tiny"]
    assert Bundle.open(bundle_folder).name == "tiny"


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"dear")
    (tmp_path / "letter").write_text("dear")
    for name in ("photos", "letter"):
        with (
            pytest.raises(RequestError, match=f"{name} exists and is no bundle"),
            new_bundle(tmp_path / name),
        ):
            pytest.fail("the block must not run")
    assert names(tmp_path) == ["letter", "photos"]
    assert (tmp_path / "photos" / "1.jpg").read_bytes() == b"dear"


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BundleError, match="new cannot be written"),
        new_bundle(tmp_path / "file" / "new"),
    ):
        pytest.fail("the block must not run")


def test_manifest_promises_what_the_model_is(bundle_folder: Path) -> None:
    write_manifest(bundle_folder, {"provenance": {"recipe": "by hand"}})
    bundle = Bundle.open(bundle_folder)
    assert bundle.manifest["provenance"] == {"recipe": "by hand"}
    assert OnnxFile.read(bundle.model_path).metadata().keys() == {SPEC_KEY, GOLDEN_KEY}
