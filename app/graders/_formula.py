"""Formulas of graders: `0.7 * exact + 0.3 * min(1, length / 100)`.

A formula is parsed, and a closed list of its nodes is computed here, in floats; nothing of it is run as code. `^` is a power.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping

MAX_LENGTH = 2000
MAX_DEPTH = 50
MAX_EXPONENT = 64.0

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: lambda base, exponent: _power(base, exponent),
}
FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {
    "min": (min, None),
    "max": (max, None),
    "abs": (abs, 1),
    "floor": (math.floor, 1),
    "ceil": (math.ceil, 1),
    "exp": (math.exp, 1),
    "sqrt": (math.sqrt, 1),
    "log": (math.log, 1),
}
"""Functions, and how many values each takes; None: one or more."""


class FormulaError(ValueError):
    """A formula that cannot be parsed, or computed with these values."""


def _power(base: float, exponent: float) -> float:
    if abs(exponent) > MAX_EXPONENT:
        raise FormulaError(f"the exponent {exponent:g} is larger than {MAX_EXPONENT:g}")
    found = base**exponent
    if isinstance(found, complex):
        raise FormulaError("it takes a root of a negative number")
    return float(found)


def parse(text: str, names: Iterable[str]) -> ast.expr:
    """The formula, of which every node is allowed and every name known. Raises FormulaError."""
    if len(text) > MAX_LENGTH:
        raise FormulaError(f"it has {len(text):,} characters; {MAX_LENGTH:,} is the most")
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FormulaError(f"it cannot be read: {getattr(error, 'msg', None) or 'it is nested too deeply'}") from None
    _check(tree, frozenset(names), 0)
    return tree


def _check(node: ast.expr, names: frozenset[str], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormulaError("it is nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            parts: list[ast.expr] = []
            if not abs(value) < 1e300:
                raise FormulaError("a number in it is too large")
        case ast.Name(id=name):
            parts = []
            if name not in names:
                raise FormulaError(f"it names {name[:60]!r}; there is {', '.join(sorted(names)) or 'nothing'}")
        case ast.BinOp(left=left, right=right, op=op) if type(op) in _BINARY:
            parts = [left, right]
        case ast.UnaryOp(operand=operand, op=ast.USub() | ast.UAdd()):
            parts = [operand]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            parts = args
            if not args or FUNCTIONS[name][1] not in (None, len(args)):
                raise FormulaError(f"{name} takes {FUNCTIONS[name][1] or 'at least 1'} value{'s' if FUNCTIONS[name][1] is None else ''}")
        case _:
            raise FormulaError(f"it may hold numbers, names of graders, + - * / ^ and {', '.join(FUNCTIONS)} only")
    for part in parts:
        _check(part, names, depth + 1)


def compute(node: ast.expr, values: Mapping[str, float]) -> float:
    """The value of a parsed formula. Raises FormulaError, for example for a division by zero."""
    try:
        found = float(_value(node, values))
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        raise error if isinstance(error, FormulaError) else FormulaError(str(error)) from None
    if not math.isfinite(found):
        raise FormulaError("its value is not finite")
    return found


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, right=right, op=op):
            return _BINARY[type(op)](_value(left, values), _value(right, values))
        case ast.UnaryOp(operand=operand, op=op):
            return -_value(operand, values) if isinstance(op, ast.USub) else _value(operand, values)
        case ast.Call(func=ast.Name(id=name), args=args):
            return float(FUNCTIONS[name][0](*(_value(part, values) for part in args)))
    raise FormulaError("it cannot be computed")  # `_check` refuses it before
