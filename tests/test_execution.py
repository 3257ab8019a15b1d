"""The Python tool: what it computes, and that it refuses everything else without an exception."""
import threading

import pytest

from nanochat.execution import use_tool


@pytest.mark.parametrize("expression, expected", [
    ("1+1", "2"),
    (" 12 * (3 + 4) ", "84"),
    ("7 - 12", "-5"),
    ("--3", "3"),
    ("17 // 5", "3"),
    ("17 % 5", "2"),
    ("2 ** 10", "1024"),
    ("999*999", "998001"),
    ("7 / 2", "3.5"),
    ("0.1 + 0.2", "0.3"),
    ("1 / 3", "0.333333333333"),
    ('"strawberry".count("r")', "3"),
    ("'strawberry'.count('r')", "3"),
    ('len("hello")', "5"),
    ('"banana".count("a") + len("b")', "4"),
    ('"a(b)**9".count("*")', "2"),
])
def test_results(expression, expected):
    assert use_tool(expression) == expected


@pytest.mark.parametrize("expression, expected", [
    ("20 / 2", "10"),
    ("2.5 * 4", "10"),
    ("10.0", "10"),
    ("-0.0", "0"),
    ("5 - 5.0", "0"),
    ("10**20 / 10**18", "100"),
])
def test_whole_results_have_no_decimal_point(expression, expected):
    # docs/traps.md: tool-timeouts
    assert use_tool(expression) == expected


def test_works_outside_the_main_thread():
    # docs/traps.md: tool-timeouts
    results = []
    thread = threading.Thread(target=lambda: results.append(use_tool("6 * 7")))
    thread.start()
    thread.join()
    assert results == ["42"]


@pytest.mark.parametrize("expression", [
    # nothing, half an expression, names and calls
    "", " ", "()", "1 +", "((((1", "x", "print(1)", "__import__('os').system('true')",
    "open('/etc/passwd')", "(1).__class__", "''.__class__", "'a'.join('b')",
    "len", "len(1)", "len('a', 'b')", "len(''.count(''))",
    "'a'.count", "'a'.count(1)", "'a'.count(*'b')", "b'a'.count(b'a')", "'\\d'.count('d')",
    # other values and other operators
    "'a'", "'a' * 5", "'a' + 'b'", "f'{1}'", "[1]", "1, 2", "(1, 2)", "True", "None",
    "1 if 1 else 2", "lambda: 1", "1 < 2", "1 and 2", "1or 2", "1\n2", "1;2",
    # other spellings of numbers, odd characters
    "1j", "0x10", "1_000", "1e9", "١ + ١", "\x00", "1 + \ud800", "'\ud800'.count('\ud800')",
])
def test_anything_else_is_refused(expression):
    # docs/traps.md: tool-timeouts
    assert use_tool(expression) is None


@pytest.mark.parametrize("expression", [
    "1 / 0", "1 // 0", "1 % 0", "0 ** -1", "(-8) ** 0.5",
    "9 ** 9 ** 9", "9 ** 9 ** 9 ** 9", "9 ** (9 ** 9)", "(-1) ** 10 ** 9",
    "10 ** 51", "(10 ** 50) * 10", "(10 ** 50) ** 200", "9" * 51, "9" * 201,
    "-" * 199 + "1" * 9, "(" * 99 + ")" * 99,
])
def test_no_finite_or_bounded_result_is_none(expression):
    assert use_tool(expression) is None


def test_deep_nesting_is_refused_or_computed_but_never_raises():
    assert use_tool("(" * 99 + "1" + ")" * 99) in ("1", None)
    assert use_tool("-" * 150 + "1") in ("1", None)


def test_thousands_separators_are_digits():
    # docs/traps.md: numbers-as-strings
    assert use_tool("1,000 + 1") == "1001"
    assert use_tool("1,234,567 * 1") == "1234567"
    assert use_tool("1,00 + 1") is None
    assert use_tool('"1,000".count(",")') == "1"      # inside a text a comma is a comma
