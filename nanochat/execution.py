"""The tool that the model may call while it answers: a calculator that can also count letters.

What stands between <|python_start|> and <|python_end|> is text written by a small model, so it is
never passed to `eval`. It passes three gates instead: a pattern that knows every token allowed,
Python's own parser, and a walk over the tree that computes the few kinds of node it knows. Every
intermediate value is bounded, so the answer comes in microseconds and no timeout is needed.
(Timeouts by signal work on the main thread only, and a server answers from another one.)
"""
import ast
import math
import operator
import re

MAX_CHARS = 200
MAX_MAGNITUDE = 10**50      # of every intermediate value
MAX_EXPONENT = 200

ALLOWED = re.compile(
    r"""(?:
        [0-9.+\-*/%()\ ]               # numbers and operators
        | "[^"\\\n]*" | '[^'\\\n]*'     # strings without escapes
        | \.count(?=\() | len(?=\()     # the two functions
    )+""",
    re.VERBOSE,
)
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class Refused(Exception):
    """The expression is outside of what the tool computes."""


def use_tool(expression):
    """Compute one expression.

    It may hold numbers with + - * / // % ** and parentheses, `"text".count("t")` and `len("text")`.
    Returns the result as text, or None when the expression is refused or has no finite result.
    Never raises for a string, whatever is in it.

        use_tool("12 * (3 + 4)")              -> "84"
        use_tool("20 / 2")                    -> "10"
        use_tool("1,000 + 1")                 -> "1001"
        use_tool('"strawberry".count("r")')   -> "3"
        use_tool("open('/etc/passwd')")       -> None
    """
    expression = expression.strip()
    if '"' not in expression and "'" not in expression:
        expression = THOUSANDS.sub("", expression)
    if len(expression) > MAX_CHARS or not ALLOWED.fullmatch(expression):
        return None
    try:
        return _to_text(_number(ast.parse(expression, mode="eval").body))
    except (Refused, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _number(node):
    """The value of a node, an int or a float of at most MAX_MAGNITUDE; Refused for any other."""
    match node:
        case ast.Constant(value=int() | float() as value):
            pass
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_number(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            left = _number(left)
            right = _number(right)
            # 10**50 to the 200th has 10,000 digits: the most that is computed before the check
            if isinstance(op, ast.Pow) and abs(right) > MAX_EXPONENT:
                raise Refused
            value = OPERATORS[type(op)](left, right)
        case ast.Call(
            func=ast.Name(id="len"),
            args=[ast.Constant(value=str() as text)],
            keywords=[],
        ):
            value = len(text)
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise Refused
    # a negative number to the power of a fraction is complex; NaN fails the comparison
    if isinstance(value, complex) or not abs(value) <= MAX_MAGNITUDE:
        raise Refused
    return value


def _to_text(value):
    """A whole number without a decimal point, any other with at most 12 significant digits.

    So 20 / 2 is 10, and 0.1 + 0.2 is 0.3.
    """
    if isinstance(value, int):
        return str(int(value))
    if value.is_integer() and math.fabs(value) < 1e15:
        return str(int(value))
    return format(value, ".12g")
