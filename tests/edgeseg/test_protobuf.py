"""The wire format, compared with what Google's library writes and reads."""

from __future__ import annotations

import random
import struct

import pytest

from edgeseg.protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    WireError,
    fields,
    floats_of,
    integers_of,
    joined,
    text_of,
    texts_of,
)

onnx = pytest.importorskip("onnx")


def test_a_message_of_every_kind() -> None:
    tensor = onnx.TensorProto()
    tensor.dims.extend([1, 0, -1, 2**63 - 1, -(2**63)])
    tensor.float_data.extend([0.5, -1.0, float("inf")])
    tensor.name = "größe 夜"
    tensor.raw_data = b"\x00\xff" * 300
    content = tensor.SerializeToString()
    assert integers_of(content, 1) == tuple(tensor.dims)
    assert floats_of(content, 4) == tuple(tensor.float_data)
    assert text_of(content, 8) == tensor.name and text_of(content, 12) == ""
    assert joined(fields(content)) == content
    attribute = onnx.helper.make_attribute("a", [1.5, 2.5])
    assert floats_of(attribute.SerializeToString(), 7) == (1.5, 2.5)
    node = onnx.helper.make_node("Op", ["x", "", "x"], ["y"])
    assert texts_of(node.SerializeToString(), 1) == ["x", "", "x"]


def test_values_are_views() -> None:
    content = joined([(1, BYTES, 0, b"x" * 1000)])
    ((_, _, _, value),) = fields(content)
    assert isinstance(value, memoryview) and value.obj is content


@pytest.mark.parametrize(
    "field",
    [
        (1, VARINT, 0, b""),
        (15, VARINT, (1 << 64) - 1, b""),
        (16, FIXED32, 0, b"abcd"),
        ((1 << 29) - 1, FIXED64, 0, b"abcdefgh"),
        (2047, BYTES, 0, b""),
        (2048, BYTES, 0, b"x" * 128),
    ],
)
def test_there_and_back(field: tuple[int, int, int, bytes]) -> None:
    content = joined([field, field])
    assert [tuple(found) for found in fields(content)] == [field, field]
    # Every beginning of it is an error, but for nothing and the first field.
    whole = {0, len(content) // 2, len(content)}
    for size in range(len(content) + 1):
        if size in whole:
            assert len(list(fields(content[:size]))) == size * 2 // max(len(content), 1)
        else:
            with pytest.raises(WireError):
                list(fields(content[:size]))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x00\x01", "field number 0"),
        (b"\x0b", "wire type 3"),
        (b"\x0c", "wire type 4"),
        (b"\x0e", "wire type 6"),
        (b"\x0f", "wire type 7"),
        (b"\x80\x80\x80\x80\x80\x01\x00", "field number"),
        (b"\x08" + b"\xff" * 11, "more than ten bytes"),
        (b"\x08\xff", "cut short"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "a field of 9223372036854775807 bytes"),
        (b"\x0a\x02x", "a field of 2 bytes where 1 are left"),
        (b"\x09abcdefg", "a field of 8 bytes where 7 are left"),
    ],
)
def test_what_is_no_message(content: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        list(fields(content))


def test_floats_that_do_not_come_out_even() -> None:
    with pytest.raises(WireError, match="floats in 5 bytes"):
        floats_of(joined([(4, BYTES, 0, b"12345")]), 4)
    assert floats_of(joined([(4, FIXED32, 0, struct.pack("<f", 2.0))]), 4) == (2.0,)


def test_noise_as_google_reads_it() -> None:
    """What is refused here may be read there (groups); what is read here is read there too."""
    rng = random.Random(5)
    content = onnx.helper.make_node(
        "Op", ["a"], ["b"], "n", x=1, y=[1.0], z="s"
    ).SerializeToString()
    taken = 0
    for _ in range(3000):
        data = bytearray(content)
        for _ in range(rng.choice((1, 2, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = list(fields(bytes(data)))
        except WireError:
            continue
        taken += 1
        node = onnx.NodeProto()
        try:
            node.ParseFromString(bytes(data))
        except Exception:
            # It looks into the messages inside, which are bytes here.
            continue
        inputs = [str(value, "utf-8", "replace") for number, wire, _, value in found
                  if (number, wire) == (1, BYTES)]  # fmt: skip
        assert list(node.input) == inputs or any("\ufffd" in text for text in inputs)
    assert taken > 300
