"""JSON of others, read in one way only."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeseg.jsonfile import json_text, parse_json


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        "größe 夜 \U0001f697",
        [1, -(1 << 63), (1 << 64) - 1, 0.5, -1e300, True],
        {"a": {"b": [{"c": "d\n\x00"}]}, "A": 1},
    ],
)
def test_plain_values(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text) == parse_json(text.encode()) == value
    if isinstance(value, dict):
        assert parse_json(json_text(value)) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": {"a": 2, "a": 2}}', "'a' comes twice"),
        ('{"a": 1, "\\u0061": 2}', "'a' comes twice"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e309", "too large a number"),
        ("18446744073709551616", "too large a number"),
        ("-9223372036854775809", "too large a number"),
        ("9" * 100_000, "too large a number"),
        ('"\\ud800"', "surrogates"),
        ('{"\\udc00\\ud800": 1}', "surrogates"),
        ("[" * 64 + "]" * 64 + " ", None),
        ("[" * 65 + "]" * 65, "more than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels"),
        ("[" * 1_000_000, "more than 64 levels"),
        ('{"a":' * 300_000, "more than 64 levels"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        (b"\xff", "can't decode"),
        (b"\xed\xa0\x80", "can't decode"),
    ],
)
def test_what_could_be_read_in_two_ways(text: str | bytes, says: str | None) -> None:
    if says is None:
        parse_json(text)
        return
    with pytest.raises(ValueError, match=says):
        parse_json(text)
