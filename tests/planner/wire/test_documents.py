"""JSON and YAML from strangers: safe, bounded, and no surprises of YAML 1.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InvalidInput, NotFound
from planner.wire.documents import dumps, dumps_yaml, load_file, loads_json, loads_yaml

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(
        ["no", "yes", "on", "1e5", "24e9", "0x1f", "010", "1:30", "2026-01-02", "~", "null", "", "=", "1_0"]
    )
    | st.sampled_from(
        ["1e999", "-.5", ".5", "5.", "+1", ".nan", "True", "y", "<<", "*a", "&a", "!x", "- a", "a: b", "#"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_what_is_written_as_yaml_is_read_back_equal(obj: Any) -> None:
    text = dumps_yaml(obj)
    assert loads_yaml(text) == obj
    assert yaml.safe_load(text) == obj  # other readers take it for the same


@given(plain)
def test_what_is_written_as_json_is_read_back_equal_by_both_readers(obj: Any) -> None:
    assert loads_json(dumps(obj)) == obj


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node_id: no", {"node_id": "no"}),
        ("flop_per_s: 24e9", {"flop_per_s": 24e9}),
        ("flop_per_s: 1.5e+12", {"flop_per_s": 1.5e12}),
        ("at: 2026-01-02T03:04:05Z", {"at": "2026-01-02T03:04:05Z"}),
        ("at: 1:30", {"at": "1:30"}),
        ("x: 010", {"x": "010"}),
        ("x: 1_000", {"x": "1_000"}),
        ("x: true", {"x": True}),
        ("x: yes", {"x": "yes"}),
        ("x:", {"x": None}),
        ("x: ~", {"x": None}),
        ("x: -3", {"x": -3}),
        ("x: .5", {"x": 0.5}),
        ('{"x": [1, 2.5, "a"]}', {"x": [1, 2.5, "a"]}),
        ("", None),
    ],
)
def test_yaml_scalars_are_jsons(text: str, expected: Any) -> None:
    found = loads_yaml(text.encode())
    assert found == expected
    if expected:
        assert type(next(iter(found.values()))) is type(next(iter(expected.values())))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
        ("a: !!binary aGk=", "not YAML"),
        ("a: !!set {x}", "not YAML"),
        ("a: 1\na: 2", "the key 'a' is there twice"),
        ("1: 2", "keys must be strings"),
        ("[a]: 2", "not YAML"),
        ("a: [", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("\t x", "not YAML"),
        ("a: \x00", "not YAML"),
        ("[" * 5_000, "nests too deeply|not YAML"),
        ("- " * 5_000, "nests too deeply|not YAML"),
        ("x: " + "9" * 5_000, "not YAML"),
    ],
)
def test_bad_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        loads_yaml(text.encode())
    assert "\n" not in str(caught.value)


def test_a_billion_laughs_are_refused_before_they_unfold() -> None:
    lines = ["a0: &a0 [lol]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(InvalidInput, match="aliases"):
        loads_yaml("\n".join(lines).encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, "nests too deeply"),
        (b"9" * 5_000, "not JSON"),
    ],
)
def test_bad_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        loads_json(text, source="nodes.json")


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("planner.wire.documents.MAX_JSON_BYTES", 100)
    monkeypatch.setattr("planner.wire.documents.MAX_YAML_BYTES", 50)
    for name, count in (("x.json", 101), ("x.yaml", 51)):
        (tmp_path / name).write_bytes(b" " * count)
        with pytest.raises(InvalidInput, match="is larger than the"):
            load_file(tmp_path / name)


def test_a_files_kind_is_told_by_its_name_and_else_by_its_content(tmp_path: Path) -> None:
    for name, text in (("a.json", "{}"), ("a.yml", "{}"), ("a", '{"x": 1}'), ("b", "x: 1"), ("c.txt", "[1]")):
        (tmp_path / name).write_text(text)
    assert load_file(tmp_path / "a.json") == load_file(tmp_path / "a.yml") == {}
    assert load_file(tmp_path / "a") == load_file(tmp_path / "b") == {"x": 1}
    assert load_file(tmp_path / "c.txt") == [1]
    (tmp_path / "d.json").write_text("x: 1")
    with pytest.raises(InvalidInput, match=r"d\.json is not JSON: Expecting value: line 1"):
        load_file(tmp_path / "d.json")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no file"):
        load_file(tmp_path / "none.json")
    with pytest.raises(InvalidInput, match="is a folder"):
        load_file(tmp_path)
