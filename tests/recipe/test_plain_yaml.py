"""YAML of a recipe: plain values, or one line about what a recipe cannot hold."""

import math

import pytest

from finetune.recipe.plain_yaml import parse_yaml
from modeling.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing", None),
        ("a: 1\nb: [x, -2.5, true, Off, ~, null, '']", {"a": 1, "b": ["x", -2.5, True, False, None, None, ""]}),
        ("a: 2e-4\nb: 2.0e-4\nc: 1_000\nd: .5\ne: 1.", {"a": "2e-4", "b": 0.0002, "c": 1000, "d": 0.5, "e": 1.0}),
        ("a: 010\nb: 0x10\nc: 1:30\nd: 0b1", {"a": "010", "b": "0x10", "c": "1:30", "d": "0b1"}),
        ("a: 2024-01-01\nb: 2024-99-99\nc: =\nd: <<", {"a": "2024-01-01", "b": "2024-99-99", "c": "=", "d": "<<"}),
        ("no: a\n1: b\n~: c\n2024-01-01: d", {"no": "a", "1": "b", "~": "c", "2024-01-01": "d"}),
        ("a: 99999999999999999999", {"a": "99999999999999999999"}),
        ("a: !!str 5\nb: !!int x\nc: !!bool x\nd: !!float x", {"a": "5", "b": "x", "c": "x", "d": "x"}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: 1".encode("utf-16"), {"a": 1}),
        ("a: é犬\U0001f600".encode(), {"a": "é犬\U0001f600"}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {p: 1, q: 2}\nb: {q: 3, <<: *x}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("<<: [{p: 1}, {p: 2, q: 3}]\nr: 4", {"p": 1, "q": 3, "r": 4}),
        ("a: {<<: &x {p: 1, q: 0}, q: 2}\nb: &y {<<: *x, q: 3}\nc: {<<: *y}",
         {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}, "c": {"p": 1, "q": 3}}),
        ("[" * 5 + "]" * 5, [[[[[]]]]]),
    ],
)  # fmt: skip
def test_values(text, value):
    found = parse_yaml(text)
    assert (found, str(found)) == (value, str(value))  # 1 is no True, and no 1.0


def test_infinity_and_nan():
    a, b, c = parse_yaml("[.inf, -.INF, .nan]")
    assert (a, b, math.isnan(c)) == (math.inf, -math.inf, True)


def test_aliases_are_copied():
    made = parse_yaml("a: &x {b: [1]}\nc: *x")
    made["a"]["b"].append(2)
    assert made["c"] == {"b": [1]}


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: {{ x }}", "a key that is not text, line 1; is it a template?"),
        ("a:\n  ? [b]\n  : c", "a key that is not text, line 2; is it a template?"),
        ("a: !!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system', line 1"),
        ("a: 1\nb: !!python/name:os.system", "the tag '!!python/name:os.system', line 2"),
        ("!!python/name:os.system : 1", "the tag '!!python/name:os.system', line 1"),
        ("a: !own {}", "the tag '!own', line 1"),
        ("a: !!set {b}", "the tag '!!set', line 1"),
        ("a: !!binary aGk=", "the tag '!!binary', line 1"),
        ("a: 1\nb: 2\na: 3", "duplicate key 'a', line 3"),
        ("a: {no: 1, 'no': 2}", "duplicate key 'no', line 1"),
        ("<<: {a: 1}\n<<: {b: 1}", "duplicate key '<<', line 2"),
        ("<<: [1]", "`<<` of something that is not a mapping, line 1"),
        ("<<: text", "`<<` of something that is not a mapping, line 1"),
        ("a: &x [1, *x]", "an alias inside its own anchor, line 1"),
        ("a: &x {<<: *x}", "an alias inside its own anchor, line 1"),
        ('a: "b\\0"', "text with a NUL or a lone surrogate, line 1"),
        ('a: ["\\ud800"]', "text with a NUL or a lone surrogate, line 1"),
        ('"\\ud800": a', "text with a NUL or a lone surrogate, line 1"),
        (LAUGHS, "more than 1,000,000 values with aliases expanded, line 6"),
        ("a: &x " + "y" * 10_000 + "\nb: [" + "*x, " * 200 + "]",
         "more than 1,000,000 values with aliases expanded, line 2"),
        ("[" * 33 + "]" * 33, "nested more than 32 deep, line 1"),
        ("a: &a0 x\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)),
         "nested more than 32 deep, line 33"),
        ("[" * 20_000, "nested too deeply"),
        ("- " * 20_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_yaml_refused(text, problem):
    with pytest.raises(UserError) as raised:
        parse_yaml(text)
    assert str(raised.value) == f"YAML that a recipe cannot hold: {problem}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a:\t1", "found character '\\t' that cannot start any token, line 1, column 3"),
        ("--- 1\n--- 2", "but found another document, line 2, column 1"),
        ("a: *x", "found undefined alias 'x', line 1, column 4"),
        (b"a: \xff", 'invalid start byte in "<byte string>", position 3'),
        (b"\xff\xfea", 'truncated data in "<byte string>", position 2'),
        ("a: \x1b", 'character #x001b: special characters are not allowed in "<unicode string>", position 3'),
        ("a: \ud800", 'character #xd800: special characters are not allowed in "<unicode string>", position 3'),
    ],
)  # fmt: skip
def test_not_yaml(text, problem):
    with pytest.raises(UserError) as raised:
        parse_yaml(text)
    assert str(raised.value).startswith("not YAML: ")
    assert str(raised.value).endswith(problem)
    assert "\n" not in str(raised.value)


def test_too_large():
    with pytest.raises(UserError, match=r"^too large for a recipe: expected at most 256 KiB$"):
        parse_yaml("#" * (2**18 + 1))
