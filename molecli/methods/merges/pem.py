"""PEM: module arithmetic over names, such as `a + b - c`. Source: Zhang et al. 2023, 2306.14870.

A = Σ |λ_i| A_i, B = Σ λ_i B_i: addition, negation (of B, not of A) and analogy in one formula; `on: updates` uses
Σ λ_i ΔW_i. λ are the expression's coefficients times the user's weights.
Contents: merge, coefficients, usual.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from molecli.config import MethodConfig
from molecli.errors import UsageError, suggestion
from molecli.methods.merges import cat
from molecli.methods.merges.factorwise import added
from molecli.methods.merges.updates import Result, Updates

_WHERE = "method.expression"
_HOW = "Write sums and differences of LoRAs, such as 'a + b - c' or '0.5 * a + 0.5 * b'."


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The sum by factors or by updates. The updates' weights already contain the expression's coefficients."""
    if config.on == "updates":
        return cat.merge(updates, config)
    weights = updates.vector
    return added(updates, weights.abs(), weights, config.rank)


def coefficients(config: MethodConfig, names: Sequence[str]) -> tuple[float, ...]:
    """The coefficient of each of `names` in `method.expression`, 0 for a name that is not in it.

    A name that is not a Python name is written in quotes. Raises: UsageError if it is not a sum of these names.
    """
    expression = config.expression
    if expression is None or not expression.strip():
        raise UsageError(_WHERE, "mode pem needs an expression, and none is given", _HOW)
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        raise UsageError(_WHERE, f"{expression!r} is not a sum of names", _HOW) from None
    found = dict.fromkeys(names, 0.0)
    for name, factor in _terms(tree, 1.0, expression):
        if name not in found:
            raise UsageError(_WHERE, f"there is no LoRA {name!r}", suggestion(name, tuple(names)))
        found[name] += factor
    return tuple(found.values())


def usual(names: Sequence[str]) -> dict[str, str]:
    """The default options: the sum of all LoRAs with equal weights that sum to 1."""
    return {"expression": " + ".join(f"{1 / len(names)!r} * {name!r}" for name in names)}


def _terms(node: ast.expr, factor: float, expression: str) -> Iterator[tuple[str, float]]:
    """(name, coefficient) of every term in `node`, multiplied by `factor`."""
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
            yield from _terms(left, factor, expression)
            yield from _terms(right, factor if isinstance(op, ast.Add) else -factor, expression)
        case ast.UnaryOp(ast.USub() | ast.UAdd() as op, operand):
            yield from _terms(operand, factor if isinstance(op, ast.UAdd) else -factor, expression)
        case ast.BinOp(ast.Constant(int() | float() as number), ast.Mult(), term):
            yield from _terms(term, factor * number, expression)
        case ast.BinOp(term, ast.Mult(), ast.Constant(int() | float() as number)):
            yield from _terms(term, factor * number, expression)
        case ast.BinOp(term, ast.Div(), ast.Constant(int() | float() as number)) if number:
            yield from _terms(term, factor / number, expression)
        case ast.Name(id=name) | ast.Constant(str() as name):
            yield name, factor
        case _:
            raise UsageError(_WHERE, f"{expression!r} is not a sum of names", _HOW)
