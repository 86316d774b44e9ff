"""What the language of search spaces computes, tolerates and refuses."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer_daemon.search.expressions import kind_of, parse_expression, same_number, same_value
from shared.errors import SettingsError

VALUES = {"dim": 128, "ratio": 0.8500000000000001, "lr": 1e-4, "optimizer": "AdamW8bit", "cached": True}
KINDS = {name: kind_of(value) for name, value in VALUES.items()}


def parse(text, expected=None):
    return parse_expression(text, KINDS, "my.toml: constraints #1 -> when", expected)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        pytest.param("dim", 128, id="a name is its value"),
        pytest.param("int(dim * 0.75)", 96, id="the product is cut to a whole number"),
        pytest.param("int(0.999)", 0, id="int cuts and does not round"),
        pytest.param("int(-1.5)", -1, id="int cuts towards zero"),
        pytest.param("round(2.6)", 3, id="round goes to the nearest whole number"),
        pytest.param("min(dim, 96)", 96, id="min clamps"),
        pytest.param("max(1, dim, 3)", 128, id="max takes more than two"),
        pytest.param("abs(96 - dim) < 1", False, id="a distance is compared"),
        pytest.param("7 // 2 + 7 % 4 - -1", 7, id="whole division, remainder and sign"),
        pytest.param("dim / 64", 2.0, id="a division is real"),
        pytest.param("64 <= dim < 128", False, id="a chain holds only as a whole"),
        pytest.param("64 <= dim <= 128 == dim", True, id="a chain may go on"),
        pytest.param("optimizer == 'AdamW8bit' and not dim != 128", True, id="and, not and strings combine"),
        pytest.param("dim > 500 or lr < 1e-3", True, id="or needs one side"),
        pytest.param("cached == True and cached", True, id="a true-or-false choice is a condition"),
        pytest.param("  dim +\t1 ", 129, id="blanks around do not matter"),
        pytest.param("(dim\n + 1)", 129, id="parentheses may span lines"),
    ],
)
def test_expressions_mean_what_python_means(text, result):
    assert parse(text)(VALUES) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        pytest.param("ratio > 0.85", False, id="a grid value is not above its own threshold"),
        pytest.param("ratio >= 0.85", True, id="it reaches it"),
        pytest.param("ratio <= 0.85", True, id="nor is it beyond an upper threshold"),
        pytest.param("ratio < 0.85", False, id="nor below it"),
        pytest.param("ratio == 0.85", True, id="it equals it"),
        pytest.param("ratio != 0.85", False, id="and does not differ"),
        pytest.param("0.1 + 0.2 > 0.3", False, id="a sum is compared with the same tolerance"),
        pytest.param("0.3 - 0.1 - 0.2 < 0", False, id="near zero too"),
        pytest.param("lr > 0.99999e-4", True, id="a hundred-thousandth is a difference"),
        pytest.param("1e-7 > 0.9e-7", True, id="tiny learning rates keep their differences"),
        pytest.param("3000000000 == 3000000001", False, id="whole numbers are compared exactly"),
        pytest.param("int(100 * 0.29)", 29, id="28.999999999999996 is cut to 29"),
        pytest.param("0.85 // 0.05", 17.0, id="16.999999999999996 steps are 17"),
        pytest.param("0.85 % 0.05", 0.0, id="and leave nothing"),
        pytest.param("0.87 // 0.05", 17.0, id="a broken step does not count"),
    ],
)
def test_binary_rounding_does_not_move_a_threshold(text, result):
    assert parse(text)(VALUES) == result


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        pytest.param("dim.real > 1", 1, "attribute access", id="attribute access"),
        pytest.param("optimizer.lower() == 'a'", 1, "the call optimizer.lower()", id="a method call"),
        pytest.param("1 < open('x')", 5, "the call open('x')", id="a call of something else"),
        pytest.param("__import__('os')", 1, "the call __import__('os')", id="an import"),
        pytest.param("lambda: 1", 1, "a lambda", id="a lambda"),
        pytest.param("(1).__class__", 1, "attribute access", id="a way to a class"),
        pytest.param("[1, 2]", 1, "a list", id="a list"),
        pytest.param("'abc'[0]", 1, "indexing", id="indexing"),
        pytest.param("{dim for dim in 'a'}", 1, "a comprehension", id="a comprehension"),
        pytest.param("1 if dim > 2 else 3", 1, "if-else", id="if-else"),
        pytest.param("f'{dim}'", 1, "an f-string", id="an f-string"),
        pytest.param("(dim := 3)", 2, "an assignment", id="an assignment"),
        pytest.param("9 ** 9 ** 9", 1, "the operator **", id="a power, which could fill the memory"),
        pytest.param("1 << 999", 1, "the operator <<", id="a shift, which could too"),
        pytest.param("'a' in optimizer", 8, "the operator in", id="membership"),
        pytest.param("dim is 1", 8, "the operator is", id="identity"),
        pytest.param("~dim", 1, "the operator ~", id="bitwise not"),
        pytest.param("None", 1, "the constant None", id="none"),
        pytest.param("1j", 1, "the constant 1j", id="a complex number"),
        pytest.param("1e999", 1, "the constant inf", id="a number beyond every float"),
        pytest.param("b'a'", 1, "the constant b'a'", id="bytes"),
        pytest.param("int(1, 2)", 1, "int() takes one number, not 2", id="int with a base"),
        pytest.param("min(dim)", 1, "min() takes two numbers or more, not 1", id="min of one"),
        pytest.param("max(1, *dim)", 1, "max() takes plain arguments", id="unpacking"),
        pytest.param("round(dim, ndigits=1)", 1, "round() takes plain arguments", id="keyword arguments"),
        pytest.param("dim > width", 7, "there is no 'width' here; choose one of dim, ratio", id="an unknown name"),
        pytest.param("dim > 'a'", 7, "a number is compared with a string", id="a number against a string"),
        pytest.param("'a' < optimizer", 7, "values of kind string have no order", id="the order of strings"),
        pytest.param("optimizer + 1", 1, "a string stands where a number is needed", id="sums with strings"),
        pytest.param("dim > 1 and dim", 13, "a number stands where a condition is needed", id="a number as condition"),
        pytest.param("cached + 1", 1, "a condition stands where a number is needed", id="sums with conditions"),
        pytest.param("dim +", 6, "invalid syntax", id="an end too early"),
        pytest.param("dim dim", 5, "invalid syntax", id="two words"),
        pytest.param("   dim.real", 4, "attribute access", id="leading blanks count"),
        pytest.param("'é≥' == dim.real", 9, "attribute access", id="characters count, not bytes"),
        pytest.param("1and dim", 1, "invalid decimal literal", id="what Python only warns about"),
        pytest.param("-" * 60 + "1", 51, "nested more than 50 deep", id="a deep nest"),
    ],
)
def test_everything_else_is_refused_with_its_position(text, column, said):
    with pytest.raises(SettingsError) as refusal:
        parse(text)
    message = str(refusal.value)
    assert message.startswith(f"my.toml: constraints #1 -> when: {text!r} will not do; at character {column}: ")
    assert said in message


def test_a_position_on_a_later_line_names_the_line():
    with pytest.raises(SettingsError, match=r"at line 2, character 4: there is no 'width'"):
        parse("(dim\n + width)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("1 + " * 300 + "1", "characters are too long", id="a very long one"),
        pytest.param("(" * 250 + "1" + ")" * 250, "too many nested parentheses", id="a tower of parentheses"),
        pytest.param("dim\0", "null bytes", id="a null byte"),
        pytest.param("", "invalid syntax", id="nothing at all"),
    ],
)
def test_what_the_parser_cannot_take_is_refused_too(text, said):
    with pytest.raises(SettingsError, match=said):
        parse(text)


def test_a_condition_is_asked_for_where_one_is_needed():
    with pytest.raises(SettingsError, match="yields a number where a condition is needed; write a comparison"):
        parse("dim + 1", "condition")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("1 / (dim - 128)", r"division by zero \(dim = 128\)", id="a division by zero"),
        pytest.param("1e308 * dim", r"no finite number \(dim = 128\)", id="a product beyond every float"),
        pytest.param("int(1e308 * 1e308 * dim)", "infinity", id="a whole number made of infinity"),
    ],
)
def test_broken_arithmetic_names_the_expression_and_the_values(text, said):
    with pytest.raises(SettingsError, match=said) as refusal:
        parse(text)(VALUES)
    assert repr(text) in str(refusal.value)


def test_expressions_are_equal_by_text_and_know_what_they_read():
    there, here = parse("dim > ratio"), parse_expression("dim > ratio", KINDS, "other.toml")
    assert there == here
    assert there != parse("dim < ratio")
    assert here.names == {"dim", "ratio"}


OPERANDS = st.integers(-50, 50).map(lambda number: f"({number})") | st.just("dim")
SUMS = st.recursive(
    OPERANDS,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(lambda part: f"({' '.join(part)})")
        | st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda part: f"{part[0]}({part[1]}, {part[2]})")
        | inner.map("abs({})".format)
    ),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SUMS, st.sampled_from(["<", "<=", "==", "!=", ">=", ">"]), SUMS)
def test_whole_numbers_give_exactly_what_python_gives(left, sign, right):
    text = f"{left} {sign} {right}"
    try:
        expected = eval(text, {"__builtins__": {"min": min, "max": max, "abs": abs}}, VALUES)
    except ZeroDivisionError:
        with pytest.raises(SettingsError, match="zero"):
            parse(text)(VALUES)
    else:
        assert parse(text)(VALUES) is expected


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        pytest.param(1, 1.0, True, id="a whole number equals its float"),
        pytest.param(1, True, False, id="one is not true"),
        pytest.param("1", 1, False, id="a string is no number"),
        pytest.param(None, None, True, id="nothing equals nothing"),
        pytest.param(10**400, 1.5, False, id="a number beyond every float equals none"),
        pytest.param(math.nan, math.nan, False, id="no number equals nothing, itself included"),
        pytest.param(math.inf, 1.0, False, id="infinity is far from everything"),
    ],
)
def test_values_are_equal_within_their_kind(left, right, equal):
    assert same_value(left, right) is equal


def test_the_tolerance_is_a_billionth():
    assert same_number(1.0, 1.0 + 0.9e-9)
    assert not same_number(1.0, 1.0 + 1.1e-9)
