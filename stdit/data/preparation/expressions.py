"""Filter expressions on the columns of a manifest, such as ``motion > 2 and height >= 240``.

Expressions are parsed by Python's grammar, of which only comparisons, and/or/not, + - * /, ``in``, numbers, quoted
texts and columns are allowed. Nothing is executed, and all names and types are checked before the first row.
"""

import ast
import difflib
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stdit.errors import UserError

ColumnType = Literal["number", "text", "boolean", "mixed", "empty"]
MAX_EXPRESSION = 2000
"""Characters of an expression."""

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ALLOWED = "comparisons, and, or, not, + - * /, in, columns, numbers and quoted texts"
NOUNS = {
    "number": "a number",
    "text": "a text",
    "boolean": "a boolean",
    "mixed": "of mixed types",
    "empty": "empty in all rows",
}


@dataclass(frozen=True)
class Term:
    """A part of an expression: its type, its columns, and its value for a row (None: unknown)."""

    kind: ColumnType
    value: Callable[[Mapping[str, Any]], Any]
    names: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class RowFilter:
    """A condition on rows: all of `parts` must be true."""

    parts: tuple[Term, ...]

    def objection(self, row: Mapping[str, Any]) -> str | None:
        """Return why a row is excluded, as "kind: detail"; None if it fulfils the condition."""
        for part in self.parts:
            holds = part.value(row)
            if holds is None:
                missing = [name for name in part.names if row.get(name) in (None, "")]
                return f"no value of {', '.join(missing)}" if missing else f"division by zero in {part.text}"
            if not holds:
                values = ", ".join(f"{name} = {_shown(row.get(name))}" for name in dict.fromkeys(part.names))
                return f"not {part.text}" + (f": {values}" if values else "")
        return None


def column_types(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, ColumnType]:
    """Return the type of each column. Numbers may be written as text; empty values are ignored."""
    return {name: _column_type([row.get(name) for row in rows]) for name in columns}


def parse_filter(text: str, kinds: Mapping[str, ColumnType]) -> RowFilter:
    """Parse an expression. Raises UserError, which quotes what is not allowed, unknown or not comparable."""
    if len(text) > MAX_EXPRESSION:
        raise UserError(f"--where has {len(text)} characters; at most {MAX_EXPRESSION} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts
            tree = ast.parse(text.strip(), mode="eval")
        parts = [_Parser(text.strip(), kinds).term(node) for node in _conjuncts(tree.body)]
    except SyntaxError as error:
        raise UserError(
            f"--where {text!r} is not a condition ({error.msg}): write one like 'motion > 2'"
        ) from None
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--where {text[:60]!r} cannot be read ({error}): write a simpler condition"
        ) from None
    for part in parts:
        if part.kind != "boolean":
            raise UserError(
                f"--where: {part.text!r} is {NOUNS[part.kind]}, not a condition: compare it with something"
            )
    return RowFilter(tuple(parts))


def _conjuncts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return [part for value in node.values for part in _conjuncts(value)]
    return [node]


class _Parser:
    """Converts nodes of the grammar to terms; a node without a method here is an error."""

    def __init__(self, text: str, kinds: Mapping[str, ColumnType]) -> None:
        self.text, self.kinds = text, kinds

    def term(self, node: ast.expr) -> Term:
        read = getattr(self, f"_{type(node).__name__.lower()}", None)
        if read is None:
            raise UserError(f"--where: {self.source(node)!r} is not allowed; allowed are {ALLOWED}")
        return read(node)

    def source(self, node: ast.expr) -> str:
        return " ".join((ast.get_source_segment(self.text, node) or "").split())

    def _constant(self, node: ast.Constant) -> Term:
        value = node.value
        if isinstance(value, bool):
            return Term("boolean", lambda row: value, text=self.source(node))
        if isinstance(value, str):
            return Term("text", lambda row: value, text=self.source(node))
        if isinstance(value, int | float) and math.isfinite(number := float(value)):
            return Term("number", lambda row: number, text=self.source(node))
        raise UserError(f"--where: {self.source(node)!r} is not allowed; allowed are {ALLOWED}")

    def _name(self, node: ast.Name) -> Term:
        name = node.id
        if name not in self.kinds:
            nearest = difflib.get_close_matches(name, self.kinds, 1, 0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else "put quotes around it if it is a text."
            raise UserError(f"--where: no column {name!r}: {hint} The columns are {', '.join(self.kinds)}")
        kind = self.kinds[name]
        convert = as_number if kind == "number" else lambda value: None if value == "" else value
        return Term(kind, lambda row: convert(row.get(name)), (name,), name)

    def _unaryop(self, node: ast.UnaryOp) -> Term:
        operand = self.term(node.operand)
        if isinstance(node.op, ast.Not):
            self.need(operand, "boolean", "not")
            return Term("boolean", _lifted(operator.not_, operand), operand.names, self.source(node))
        if not isinstance(node.op, ast.USub | ast.UAdd):
            raise UserError(f"--where: {self.source(node)!r} is not allowed; allowed are {ALLOWED}")
        self.need(operand, "number", "a sign")
        sign = operator.neg if isinstance(node.op, ast.USub) else operator.pos
        return Term("number", _lifted(sign, operand), operand.names, self.source(node))

    def _binop(self, node: ast.BinOp) -> Term:
        if type(node.op) not in ARITHMETIC:
            raise UserError(f"--where: {self.source(node)!r} is not allowed; allowed are {ALLOWED}")
        left, right = self.term(node.left), self.term(node.right)
        for side in (left, right):
            self.need(side, "number", "arithmetic")
        value = _lifted(ARITHMETIC[type(node.op)], left, right)
        return Term("number", value, left.names + right.names, self.source(node))

    def _boolop(self, node: ast.BoolOp) -> Term:
        terms = [self.term(value) for value in node.values]
        for term in terms:
            self.need(term, "boolean", "and, or")
        decisive = isinstance(node.op, ast.Or)  # one true decides an "or", one false an "and"

        def value(row: Mapping[str, Any]) -> bool | None:
            values = [term.value(row) for term in terms]
            if decisive in values:
                return decisive
            return None if None in values else not decisive

        return Term("boolean", value, _names(terms), self.source(node))

    def _compare(self, node: ast.Compare) -> Term:
        sides = [node.left, *node.comparators]
        pairs = [
            self.member(left, right, isinstance(op, ast.In))
            if isinstance(op, ast.In | ast.NotIn)
            else self.compared(left, op, right)
            for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
        ]

        def value(row: Mapping[str, Any]) -> bool | None:
            values = [pair.value(row) for pair in pairs]
            return False if False in values else None if None in values else True

        return Term("boolean", value, _names(pairs), self.source(node))

    def compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Term:
        if type(op) not in COMPARISONS:
            raise UserError(f"--where: 'is' is not allowed; allowed are {ALLOWED}")
        terms = [self.term(left), self.term(right)]
        name, wanted = _tested_for_a_value(left, right), isinstance(op, ast.Eq)
        if name is not None and isinstance(op, ast.Eq | ast.NotEq):
            return Term("boolean", lambda row: (row.get(name) in (None, "")) == wanted, (name,))
        self.alike(*terms)
        return Term("boolean", _lifted(COMPARISONS[type(op)], *terms), _names(terms))

    def member(self, left: ast.expr, right: ast.expr, wanted: bool) -> Term:
        """Parse ``"dog" in text`` (a part of a text) or ``camera in ("pan", "tilt")`` (an entry of a list)."""
        one = self.term(left)
        if isinstance(right, ast.Tuple | ast.List):
            terms = [self.term(entry) for entry in right.elts]
            for term in terms:
                self.alike(one, term)
            value = _lifted(lambda value, *entries: (value in entries) == wanted, one, *terms)
            return Term("boolean", value, _names([one, *terms]))
        whole = self.term(right)
        for term in (one, whole):
            self.need(term, "text", "in")
        return Term("boolean", _lifted(lambda a, b: (a in b) == wanted, one, whole), _names([one, whole]))

    def need(self, term: Term, kind: ColumnType, what: str) -> None:
        if term.kind != kind:
            raise UserError(f"--where: {term.text!r} is {NOUNS[term.kind]}, but {what} takes {NOUNS[kind]}")

    def alike(self, left: Term, right: Term) -> None:
        if left.kind != right.kind or left.kind == "mixed":
            raise UserError(
                f"--where: {left.text!r} is {NOUNS[left.kind]} and {right.text!r} {NOUNS[right.kind]}: they "
                "cannot be compared"
            )


def _tested_for_a_value(left: ast.expr, right: ast.expr) -> str | None:
    """Return the column of ``column == ''``, which is true for rows without a value; None if it is no such test."""
    match left, right:
        case (ast.Name(id=name), ast.Constant(value="")) | (ast.Constant(value=""), ast.Name(id=name)):
            return name
    return None


def _names(terms: Sequence[Term]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for term in terms for name in term.names))


def _lifted(function: Callable[..., Any], *terms: Term) -> Callable[[Mapping[str, Any]], Any]:
    """Return `function` of the terms' values as a function of the row; None if one is unknown or a divisor is 0."""

    def value(row: Mapping[str, Any]) -> Any:
        values = [term.value(row) for term in terms]
        if None in values:
            return None
        try:
            return function(*values)
        except ZeroDivisionError:
            return None

    return value


def _column_type(values: Sequence[Any]) -> ColumnType:
    given = [value for value in values if value not in (None, "")]
    if all(isinstance(value, bool) for value in given):
        return "boolean" if given else "empty"
    if all(as_number(value) is not None for value in given):
        return "number"
    return "text" if all(isinstance(value, str) for value in given) else "mixed"


def as_number(value: Any) -> float | None:
    """Convert a number, or text that is one; None for anything else, and for infinity and nan."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
