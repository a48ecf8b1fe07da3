"""The contract that travels inside the ONNX file, and sizes as people write them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from edgeseg.errors import BundleError, RequestError
from edgeseg.spec import ModelSpec, Preprocessing, parse_size

SPEC = ModelSpec(
    name="strasse bei nacht – 夜",
    architecture="bisenetv2",
    task="semantic",
    height=384,
    width=480,
    classes=("sky", "road"),
    colours=((128, 128, 128), (128, 64, 128)),
    ignore=255,
    preprocessing=Preprocessing((0.3257, 0.369, 0.3223), (0.2112, 0.2148, 0.2115), "rgb"),
    fit="letterbox",
    confidence=True,
)


def changed(**values: Any) -> str:
    return json.dumps({**json.loads(SPEC.to_json()), **values})


def without(key: str) -> str:
    values = json.loads(SPEC.to_json())
    del values[key]
    return json.dumps(values)


INSTANCE_SPEC = replace(
    SPEC, task="instance", confidence=False, capacity=100, mask_height=28, mask_width=29
)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, fit="stretch", confidence=False, ignore=11, height=1, width=1),
        INSTANCE_SPEC,
        replace(INSTANCE_SPEC, mask_extent="box", capacity=1),
    ],
)
def test_json_round_trip(spec: ModelSpec) -> None:
    text = spec.to_json()
    assert "\n" not in text
    assert ModelSpec.from_json(text) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("7", "cannot be read"),
        ("null", "cannot be read"),
        ("{}", "cannot be read.*contract"),
        (changed(contract=2), "follows contract 2 and this EdgeSeg knows 1; update EdgeSeg"),
        (changed(contract="1"), "follows contract 1"),
        (changed(contract=None), "follows contract None"),
        *(
            (without(key), f"incomplete.*{key}")
            for key in ("name", "height", "classes", "colours", "preprocessing", "fit")
        ),
        (changed(height="tall"), "incomplete"),
        (changed(height="360"), "incomplete.*'360' is no whole number"),
        (changed(height=360.0), "incomplete.*no whole number"),
        (changed(height=True), "incomplete.*no whole number"),
        (changed(height=16385), "incomplete.*16385x"),
        (changed(height=16384, width=16384), "incomplete.*16384x16384 cannot be"),
        (changed(ignore=10**19 * 2), "cannot be read.*too large a number"),
        (changed(confidence=1), "incomplete.*neither true nor false"),
        (changed(name=None), "incomplete.*'None' is no text"),
        (changed(name="a\x1b]0;title\x07"), "incomplete.*all of them visible"),
        (changed(name="\u202eabc"), "incomplete.*all of them visible"),
        (changed(name="\ud800"), "cannot be read.*surrogates"),
        (changed(name="x" * 201), "incomplete.*at most 200 characters"),
        (changed(classes="ab"), "incomplete.*'ab' is no list"),
        (changed(classes=["a\nb", "c"]), "incomplete.*all of them visible"),
        (changed(colours=[[0, 0, 256], [0, 0, 0]]), "incomplete.*0 to 255"),
        (changed(colours=[[0, 0, -1], [0, 0, 0]]), "incomplete.*0 to 255"),
        (SPEC.to_json().replace("{", '{"height": 1, ', 1), "cannot be read.*'height' comes twice"),
        (
            changed(preprocessing={"mean": [0, 0, "0"], "std": [1, 1, 1], "order": "rgb"}),
            "incomplete.*'0' is no number",
        ),
        ("[" * 100_000, "cannot be read.*levels"),
        (changed(height=0), "incomplete.*0x480"),
        (changed(task="depth"), "incomplete.*semantic, instance, and 'depth' came"),
        (changed(task="instance"), "capacity and a mask size of 1 or more.*capacity of 0"),
        (changed(task="instance", capacity=9, mask_height=9, mask_width=9), "and a confidence map"),
        (changed(capacity=9), "semantic model has no instances, and a capacity of 9"),
        (changed(mask_extent="box"), "semantic model has no instances"),
        (changed(mask_extent="frame"), "span one of image, box, and 'frame' came"),
        (changed(fit="crop"), "incomplete.*stretch, letterbox.*'crop' came"),
        (changed(classes=["sky"]), "1 classes came with 2 colours"),
        (changed(classes=[], colours=[]), "1 to 255 classes, and 0 came"),
        (changed(colours=[[1, 2], [3, 4]]), "incomplete"),
        (changed(colours=7), "incomplete"),
        (changed(preprocessing={}), "incomplete.*mean"),
        (changed(preprocessing="rgb"), "incomplete"),
        (changed(preprocessing={"mean": [0, 0], "std": [1, 1], "order": "rgb"}), "three numbers"),
        (
            changed(preprocessing={"mean": [0, 0, 0], "std": [1, 0, 1], "order": "rgb"}),
            "above zero",
        ),
        (changed(preprocessing={"mean": [0, 0, 0], "std": [1, 1, 1], "order": "gbr"}), "'gbr'"),
    ],
)
def test_descriptions_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(BundleError, match=rf"^the model.*{says}"):
        ModelSpec.from_json(text)


def test_descriptions_from_before_there_were_instances() -> None:
    values = json.loads(SPEC.to_json())
    for key in ("capacity", "mask_height", "mask_width", "mask_extent"):
        del values[key]
    assert ModelSpec.from_json(json.dumps(values)) == SPEC


@pytest.mark.parametrize(("count", "fits"), [(0, False), (1, True), (255, True), (256, False)])
def test_number_of_classes(count: int, fits: bool) -> None:
    names = tuple(str(index) for index in range(count))
    colours = tuple((0, 0, 0) for _ in names)
    if fits:
        assert len(replace(SPEC, classes=names, colours=colours).classes) == count
    else:
        with pytest.raises(RequestError, match=f"1 to 255 classes, and {count} came"):
            replace(SPEC, classes=names, colours=colours)


@pytest.mark.parametrize(
    ("text", "multiple", "size"),
    [
        ("384x480", 1, (384, 480)),
        (" 384 X 480 ", 32, (384, 480)),
        ("512×1024", 32, (512, 1024)),
        ("1x16384", 1, (1, 16384)),
    ],
)
def test_sizes(text: str, multiple: int, size: tuple[int, int]) -> None:
    assert parse_size(text, multiple=multiple) == size


@pytest.mark.parametrize(
    ("text", "multiple", "says"),
    [
        ("", 1, "HEIGHTxWIDTH, such as 384x480, and '' came"),
        ("384", 1, "HEIGHTxWIDTH"),
        ("384x480x3", 1, "HEIGHTxWIDTH"),
        ("384,480", 1, "HEIGHTxWIDTH"),
        ("-384x480", 1, "HEIGHTxWIDTH"),
        ("3.5x480", 1, "HEIGHTxWIDTH"),
        ("large", 1, "HEIGHTxWIDTH"),
        ("0x480", 1, "between 1 and 16384"),
        ("384x16385", 1, "between 1 and 16384"),
        ("720x960", 32, r"multiples of 32, and 720x960 came; the nearest are 704x960 or 736x960"),
        ("100x100", 32, r"96x96 or 128x128"),
        ("5x64", 32, r"nearest are 32x64 \("),
    ],
)
def test_sizes_that_cannot_be(text: str, multiple: int, says: str) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        parse_size(text, multiple=multiple)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "values",
    [
        {"capacity": 10_001},
        {"mask_height": 16385},
        {"capacity": 10_000, "mask_height": 1000, "mask_width": 1000},
    ],
)
def test_masks_that_fill_the_memory(values: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="more than fit into memory"):
        replace(INSTANCE_SPEC, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["9" * 5000 + "x3", "٣x٣", "3x", "0x3"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(RequestError):
        parse_size(text)
