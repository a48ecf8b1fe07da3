"""ONNX files with weights beside them: taken in from their own folder, and from nowhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeseg.errors import BundleError

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def taken_in(model: Any, path: Path) -> None:
    from edgeseg.export.external import take_weights_in

    take_weights_in(model, path)


def network(rng: np.random.Generator) -> Any:
    """Weights as initializers, in a Constant, and in a branch."""
    tensors = [
        numpy_helper.from_array(rng.standard_normal((3, 50)).astype(kind), name)
        for name, kind in (("a", np.float32), ("b", np.float16), ("c", np.int64), ("d", np.float32))
    ]
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value=tensors[3])],
        "branch",
        [],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    nodes = [
        helper.make_node("Constant", [], ["k"], value=tensors[2]),
        helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch),
    ]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], tensors[:2]))


def arrays(model: Any) -> list[Any]:
    branch = next(a.g for a in model.graph.node[1].attribute if a.name == "then_branch")
    tensors = [*model.graph.initializer, model.graph.node[0].attribute[0].t]
    return [numpy_helper.to_array(each) for each in (*tensors, branch.node[0].attribute[0].t)]


@pytest.mark.parametrize("together", [True, False])
def test_all_weights_are_taken_in(tmp_path: Path, together: bool) -> None:
    model = network(np.random.default_rng(1))
    wanted = arrays(model)
    path = tmp_path / "model.onnx"
    # As onnx itself writes them: in one file, at offsets, or in one file each.
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=together,
        location="model.onnx.data" if together else None,
        size_threshold=0,
        convert_attribute=True,
    )
    found = onnx.load(path, load_external_data=False)
    assert b"location" in found.SerializeToString()
    taken_in(found, path)
    assert b"location" not in found.SerializeToString()
    for ours, theirs in zip(arrays(found), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def told(**entries: str) -> Any:
    """A model whose only weights, 40 bytes, are where ``entries`` say."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[10], data_location=1)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return helper.make_model(helper.make_graph([], "g", [], [], [tensor]))


def test_below_the_folder_and_by_link_within(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "w").write_bytes(b"head" + values.tobytes() + b"tail")
    (tmp_path / "link").symlink_to("deep/w")
    for name in ("deep/w", "link"):
        model = told(location=name, offset="4", length="40")
        taken_in(model, tmp_path / "model.onnx")
        np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), values)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({}, "in ''"),
        ({"location": ""}, "in ''"),
        ({"location": "."}, "in '.'"),
        ({"location": "/etc/passwd"}, "in '/etc/passwd'"),
        ({"location": "../secret"}, "weights lie in the file's own folder or below"),
        ({"location": "deep/../../secret"}, "weights lie in the file's own folder"),
        ({"location": "C:\\x"}, "weights lie in the file's own folder"),
        ({"location": "a\0b"}, "weights lie in the file's own folder"),
        ({"location": "out"}, "a link out of its folder"),
        ({"location": "pipe"}, "no regular file"),
        ({"location": "zero"}, "a link out of its folder"),
        ({"location": "deep"}, "Is a directory"),
        ({"location": "missing"}, r"in a file beside it, which is missing.*copy that too"),
        ({"location": "w", "offset": "1"}, None),
        ({"location": "w", "length": "41"}, "end at byte 41 of w, which has 40"),
        ({"location": "w", "offset": "41"}, "which has 40"),
        ({"location": "w", "offset": "39", "length": "2"}, "end at byte 41 of w"),
        ({"location": "w", "offset": "-1"}, "'-1' is no number of bytes"),
        ({"location": "w", "length": "1e3"}, "'1e3' is no number of bytes"),
        ({"location": "w", "length": "9" * 5000}, "is no number of bytes"),
        ({"location": "w", "length": "٣"}, "is no number of bytes"),
        ({"location": "huge"}, "more than 2 GiB of weights"),
    ],
)
def test_places_that_are_not_followed(
    tmp_path: Path, entries: dict[str, str], says: str | None
) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "w").write_bytes(bytes(40))
    (tmp_path / "secret").write_bytes(bytes(40))
    (folder / "out").symlink_to("../secret")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    with (folder / "huge").open("wb") as file:
        file.truncate(3 << 30)
    model = told(**entries)
    if says is None:
        taken_in(model, folder / "model.onnx")
        return
    with pytest.raises(BundleError, match=says):
        taken_in(model, folder / "model.onnx")


def test_export_of_a_file_that_points_elsewhere(tmp_path: Path) -> None:
    """The command's own way there."""
    pytest.importorskip("torch")
    from edgeseg.export.graphs import _read

    (tmp_path / "secret").write_bytes(bytes(40))
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "model.onnx"
    path.write_bytes(told(location="../secret").SerializeToString())
    with pytest.raises(BundleError, match="weights lie in the file's own folder"):
        _read(str(path))
    for make in (os.mkfifo, os.mkdir):
        other = tmp_path / make.__name__
        make(other)
        with pytest.raises(BundleError, match="cannot be read"):
            _read(str(other))
