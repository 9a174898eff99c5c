"""Names, JSON and YAML from files of strangers."""

import json
from pathlib import Path

import pytest
from comfyui_blip3o.blip3o_core.untrusted import (
    inner_path,
    is_inner_name,
    is_new_name,
    parse_json,
    parse_object,
    parse_yaml,
    quote,
    whole_number,
)

OUTSIDE = [
    "", ".", "..", "../a", "a/../../b", "/a", "/", "\\a", "\\\\host\\share", "//host/share", "C:", "C:a", "C:\\a", "C:/a",
    "D:models\\evil", "~/a", "~", "a\0b", "CON", "con.txt", "a/NUL", "a/nul.safetensors", "COM1", "lpt9.x", "a.", "a /b", "a:b",
    "\\Users\\x\\model", "..\\a", "a\\..\\..\\b", "aux/x", "x.safetensors.",
]  # fmt: skip
INSIDE = [
    "a",
    "a/b",
    "a\\b",
    "BLIP3o-Model-8B",
    "my model/v1.2",
    "集",
    ".hidden/x",
    "console",
    "a..b",
    "nulls",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_elsewhere_on_some_system_are_seen(name: str) -> None:
    assert not is_inner_name(name)


@pytest.mark.parametrize("name", INSIDE)
def test_names_that_stay_are_let_through(name: str) -> None:
    assert is_inner_name(name)


def test_a_link_out_of_the_folder_is_seen(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.mkdir()
    (folder / "link").symlink_to(secret)
    (folder / "near").symlink_to(folder)
    assert inner_path(folder, "link") is None
    assert inner_path(folder, "link/x") is None
    assert inner_path(folder, "near/x") == folder / "near" / "x"
    assert inner_path(folder, "not yet/there") == folder / "not yet/there"
    assert inner_path(folder, "../secret") is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", b"\xff\xfe", "9" * 5000], ids=len)
def test_json_that_cannot_be_read_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_object(text)


def test_other_json_is_read_as_ever() -> None:
    value = {"a": [1, 2.5, None, "x", {"b": True}]}
    assert parse_json(json.dumps(value)) == parse_object(json.dumps(value).encode()) == value
    with pytest.raises(ValueError, match="no object"):
        parse_object("[1]")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a: &x [1]\nb: *x", "refers to another place"),
        ("a: &x {b: *x}", "refers to another place"),
        ("[" * 40 + "]" * 40, "nested too deep"),
        ("a: [1", "expected"),
        ("!!python/object/apply:os.system [ls]", "constructor"),
        ("x" * 2**21, "longer than"),
    ],
    ids=range(6),
)
def test_yaml_that_could_hurt_is_one_kind_of_error(text: str, fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        parse_yaml(text)


def test_other_yaml_is_read_as_ever() -> None:
    assert parse_yaml("a: {b: [1, 2.5, yes]}\nc: text") == {"a": {"b": [1, 2.5, True]}, "c": "text"}
    assert parse_yaml("") is None


def test_what_a_message_quotes_is_short() -> None:
    nested: list[object] = []
    for _ in range(30):
        nested = [nested] * 10
    assert len(quote(nested)) < 200
    assert len(quote("x" * 10_000)) <= 120


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), ("0", 0), ("²", None), ("-1", None), ("9" * 5000, None), ("", None)]
)
def test_numbers_are_plain_digits_and_not_too_many(text: str, number: int | None) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize(
    "name", [*OUTSIDE, "a/", "a\\", "x\ny", "a*", "x" * 300, "a/" * 1500 + "a", "\ud800", "a/.", ".a", "a/.b"]
)
def test_names_that_no_new_file_can_have_everywhere_are_seen(name: str) -> None:
    assert not is_new_name(name)


@pytest.mark.parametrize("name", ["a", "my dog", "loras/BLIP3o", "集/絵", "v1.2", "a\\b"])
def test_names_of_new_files_may_be_in_any_language_and_folder(name: str) -> None:
    assert is_new_name(name)


@pytest.mark.parametrize("name", [None, 5, [], b"a"])
def test_what_is_no_text_is_no_name(name: object) -> None:
    assert not is_inner_name(name)


def test_numbers_without_end_are_quoted_in_words() -> None:
    assert len(quote(16**9000)) < 100


@pytest.mark.parametrize(
    "text", ["2026-13-45", "[1", "? {a: b}\n: 5", "!!python/object:os.system x", "\0", "a: b: c"]
)
def test_yaml_of_nonsense_is_a_value_error_on_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert type(caught.value) is ValueError
