"""Values of a JSON file are checked, and an error says where in the file one is wrong."""

import pytest

from timm_autoslim.errors import ArtifactError
from timm_autoslim.slimming.json_reader import JsonValue


def test_values_are_read_by_their_type():
    value = JsonValue("f", {"a": [1, 2.5], "b": "text", "c": {"d": 0}})
    parts = value.object(["a", "b"], optional=["c"])
    one, other = parts["a"].items()
    assert (one.integer(), other.number(), parts["b"].text()) == (1, 2.5, "text")
    assert parts["c"].members()["d"].integer() == 0
    assert (one.where, parts["c"].members()["d"].where) == ("f.a[0]", "f.c.d")


@pytest.mark.parametrize(
    ("value", "read", "message"),
    [
        ([], lambda v: v.members(), r"f: got \[\]; needed: an object"),
        ({}, lambda v: v.items(), r"f: got \{\}; needed: a list"),
        (5, lambda v: v.text(), "f: got 5; needed: a text"),
        (True, lambda v: v.integer(), "f: got True; needed: an integer from 0 on"),
        (2.0, lambda v: v.integer(), r"f: got 2\.0; needed: an integer"),
        (0, lambda v: v.integer(1), "f: got 0; needed: an integer from 1 on"),
        (2**63, lambda v: v.integer(), "f: got 9223372036854775808; needed: an integer"),
        (float("nan"), lambda v: v.number(), "f: got nan; needed: a finite number"),
        (float("inf"), lambda v: v.number(), "f: got inf; needed: a finite number"),
        (10**400, lambda v: v.number(), "needed: a finite number"),
        (False, lambda v: v.number(), "f: got False; needed: a finite number"),
        (0, lambda v: v.number(above=0.0), "f: got 0; needed: a finite number above 0"),
        ({"a": 1}, lambda v: v.object(["a", "b"]), r"f: got no 'b'; needed: the keys \['a', 'b'\]"),
        ({"a": 1, "c": 1}, lambda v: v.object(["a"]), "f: got an unknown 'c'; needed: the keys"),
        ({"c": 1}, lambda v: v.object(["a"]), "f: got no 'a' and an unknown 'c'"),
        ({"a": {"b": [3]}}, lambda v: v.members()["a"].members()["b"].items()[0].text(), r"f\.a\.b\[0\]: got 3"),
    ],
)
def test_a_wrong_value_is_told_with_its_place(value, read, message):
    with pytest.raises(ArtifactError, match=message):
        read(JsonValue("f", value))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000], ids=["empty", "open", "bytes", "deep", "long"]
)
def test_a_file_that_is_no_json_is_told(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.json: got no JSON that can be read \(.*needed: a search"):
        JsonValue.read(path, "a search")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ArtifactError, match=r"x\.json: got no file that can be read .*; needed: a search"):
        JsonValue.read(tmp_path / "x.json", "a search")
