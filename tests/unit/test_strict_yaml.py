"""The YAML reader: what it takes for a number, what it refuses, and that its writer reads back equal."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.errors import ConfigError
from aiprod_ds.strict_yaml import read_yaml, write_yaml

VALUES = [
    ("1e-4", 1e-4),
    ("1E5", 1e5),
    ("1.e3", 1000.0),
    (".5", 0.5),
    ("-2.5e+3", -2500.0),
    ("1_000", 1000),
    ("0x10", 16),
    ("-7", -7),
    ("0", 0),
    ("0.0", 0.0),
    ("on", "on"),
    ("off", "off"),
    ("yes", "yes"),
    ("no", "no"),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("2024-01-01", "2024-01-01"),
    ("1:30", "1:30"),
    ("256x256", "256x256"),
    ("'1e-4'", "1e-4"),
    ("'017'", "017"),
    (".inf", float("inf")),
    ("-.inf", float("-inf")),
    ("[a, 1, {b: 2}]", ["a", 1, {"b": 2}]),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_scalars_mean_what_people_write(text: str, value: object) -> None:
    got = read_yaml(f"key: {text}\n".encode(), "f")["key"]
    assert got == value
    assert type(got) is type(value)


REFUSED = [
    ("a: 1\nb: 2\na: 3\n", "f: line 3: a: must be given once, got it on line 1 too. Remove one of the two."),
    ("x: {a: 1, a: 2}\n", "f: line 1: a: must be given once, got it on line 1 too. Remove one of the two."),
    ("a: 017\n", "f: line 1: an integer must not start with 0, got 017. Drop the zero, or quote it as text."),
    (
        "a: 0o17\n",
        "f: line 1: an integer must not start with 0, got 0o17. Drop the zero, or quote it as text.",
    ),
    (
        "a: &x 1\nb: *x\n",
        (
            "f: line 1, column 4: must be well-formed YAML, got: anchors and aliases are not read; use "
            "`base:`. "
            "Correct the line."
        ),
    ),
    (
        "a: !!python/object:os.system 1\n",
        (
            "f: line 1: must be a plain value, got the tag 'tag:yaml.org,2002:python/object:os.system'. "
            "Remove "
            "the tag."
        ),
    ),
    ("a: !!int x\n", "f: line 1: must be a readable int, got 'x'. Correct the value."),
    ("1: a\n", "f: line 1: a key must be text, got '1'. Quote it."),
    ("true: a\n", "f: line 1: a key must be text, got 'true'. Quote it."),
    ("a:\n\tb: 1\n", "f: line 2, column 1: must be indented with spaces, got a tab. Replace the tab."),
    (
        "a: 1\n---\nb: 1\n",
        (
            "f: line 2, column 1: must hold one YAML document, got a second one. Remove the `---` and what "
            "follows."
        ),
    ),
    (
        "a: [1\n",
        (
            "f: line 2, column 1: must be well-formed YAML, got: expected ',' or ']', but got '<stream "
            "end>'. "
            "Correct the line."
        ),
    ),
    (
        "a: b\n c: d\n",
        (
            "f: line 2, column 3: must be well-formed YAML, got: mapping values are not allowed here. "
            "Correct "
            "the line."
        ),
    ),
    ("a: 1\nb: \x07\n", "f: line 2: must be text, got the character '\\x07'. Remove it."),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text.encode(), "f")
    assert caught.value.problems == (message,)


def test_every_duplicate_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(b"a: 1\na: 2\nb: {c: 01, c: 2}\n", "f")
    assert [problem.split(":")[1] for problem in caught.value.problems] == [" line 2", " line 3", " line 3"]


def test_not_utf8_names_the_line() -> None:
    with pytest.raises(
        ConfigError, match=r"f: line 2: must be UTF-8, got byte 0xff\. Save the file as UTF-8\."
    ):
        read_yaml(b"a: 1\nb: \xff\n", "f")


def test_byte_order_mark_is_not_part_of_the_first_key() -> None:
    assert read_yaml(b"\xef\xbb\xbfa: 1\n", "f") == {"a": 1}


@pytest.mark.parametrize("depth", [70, 100_000])
def test_deep_nesting_is_refused_not_a_crash(depth: int) -> None:
    with pytest.raises(ConfigError, match="must nest at most 64 levels"):
        read_yaml(b"[" * depth + b"]" * depth, "f")


def test_large_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be at most 1048576 bytes, got 1048577"):
        read_yaml(b"#" * ((1 << 20) + 1), "f")


_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(value=_plain)
def test_what_is_written_reads_back_equal(value: object) -> None:
    assert read_yaml(write_yaml({"key": value}).encode(), "f") == {"key": value}


@pytest.mark.parametrize(
    "text", ["1e-4", "on", "017", "0x10", "1_000", "null", "true", "1.5", "", "~", "- a", "a: b", "0o7"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert read_yaml(write_yaml({"key": text}).encode(), "f") == {"key": text}


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_config_error(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        read_yaml(data, "f")
