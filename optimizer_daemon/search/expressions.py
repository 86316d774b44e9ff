"""The little language of search spaces: a typed subset of Python's expressions that can neither loop nor escape.

Names, numbers, strings, True and False; chained comparisons; and, or, not; + - * / // %; int, min, max, abs, round.
Everything else is refused when the space is loaded, and so is mixing kinds ("AdamW" > 3), so that a loaded expression
can fail in its arithmetic only.

Numbers are compared with a tolerance of one part in 10**9, because a grid such as 0.25, 0.30 .. 0.90 is not exact in
binary: 0.25 + 12 * 0.05 is 0.8500000000000001. Two numbers that close are equal: `>` and `<` are then false, `>=` and
`<=` true. int, // and % treat a number that close to a whole one as whole, so int(100 * 0.29) is 29. Whole numbers are
compared exactly.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from shared.errors import SettingsError

Value = bool | int | float | str
Kind = Literal["number", "string", "condition"]
FUNCTIONS = ("int", "min", "max", "abs", "round")

RELATIVE_TOLERANCE = 1e-9
ABSOLUTE_TOLERANCE = 1e-15  # decides near 0 only; far below any learning rate

_LONGEST = 1000  # characters
_DEEPEST = 50  # nested operations
_LANGUAGE = "use names, numbers, strings, comparisons, and, or, not, + - * / // %, " + ", ".join(
    f"{name}()" for name in FUNCTIONS
)

_LINE_END = re.compile(r"\r\n|\r|\n")  # what Python takes for one; splitlines knows more

_Run = Callable[[Mapping[str, Value]], Any]
_Typed = tuple[Kind, _Run]


def kind_of(value: object) -> Kind | None:
    """Return the kind of a value, None for what no expression can handle."""
    if isinstance(value, bool):
        return "condition"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else None


def same_number(left: float, right: float) -> bool:
    """Tell whether two numbers are equal within the tolerance; whole numbers must be equal exactly."""
    if left == right:
        return True
    if isinstance(left, int) and isinstance(right, int):
        return False
    try:
        return math.isclose(left, right, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    except OverflowError:  # a whole number beyond every float
        return False


def same_value(left: object, right: object) -> bool:
    """Tell whether two values are of one kind and equal, numbers within the tolerance."""
    if is_number(left) and is_number(right):
        return same_number(left, right)
    return kind_of(left) == kind_of(right) and left == right


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Expression:
    """A checked expression; two with the same text are equal.

    Args:
        text: as the user wrote it.
        where: file and field, for messages.
        kind: what it yields.
        names: what it reads.
    """

    text: str
    where: str = field(compare=False)
    kind: Kind = field(compare=False)
    names: frozenset[str] = field(compare=False)
    _run: _Run = field(compare=False, repr=False)

    def __call__(self, values: Mapping[str, Value]) -> Value:
        """Return its value; `values` holds every name in `names` with the kind it was declared with.

        Raises:
            SettingsError: division by zero, or a result that is no finite number.
        """
        try:
            result: Value = self._run(values)
            if isinstance(result, float) and not math.isfinite(result):
                raise OverflowError("the result is no finite number")
        except (ArithmeticError, ValueError) as error:
            given = ", ".join(f"{name} = {values[name]!r}" for name in sorted(self.names))
            raise SettingsError(self.where, self.text, f"{error} ({given}); guard against these values") from error
        return result


def parse_expression(text: str, kinds: Mapping[str, Kind], where: str, expected: Kind | None = None) -> Expression:
    """Check `text` against the language and return it ready to run.

    Args:
        text: the expression.
        kinds: the names it may read and the kind of each.
        where: file and field, for messages.
        expected: the kind it must yield, where only one makes sense.

    Raises:
        SettingsError: it is outside the language, reads an unknown name or mixes kinds; the message gives the position.
    """
    compiler = _Compiler(text, kinds, where)
    kind, run = compiler.compile()
    if expected is not None and kind != expected:
        hint = "write a comparison" if expected == "condition" else f"write a {expected}"
        raise SettingsError(where, text, f"it yields a {kind} where a {expected} is needed; {hint}")
    return Expression(text, where, kind, frozenset(compiler.names), run)


class _Compiler:
    """Turns one syntax tree into nested functions, node by node; what has no case is refused."""

    def __init__(self, text: str, kinds: Mapping[str, Kind], where: str) -> None:
        self.text, self.kinds, self.where = text, kinds, where
        self.names: set[str] = set()
        self._depth = 0
        self._source = text.strip()

    def compile(self) -> _Typed:
        if len(self.text) > _LONGEST:
            short = f"{self.text[:40]}..."
            raise SettingsError(self.where, short, f"{len(self.text)} characters are too long; split it")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # "1and x" and "\d" are only warned about
                tree = ast.parse(self._source, mode="eval")
        except SyntaxError as error:
            column = error.offset or len(self._source) + 1  # 0: it ended too early
            raise self._refusal(error.lineno or 1, column, f"{error.msg}; {_LANGUAGE}") from error
        except (ValueError, MemoryError, RecursionError) as error:
            raise SettingsError(self.where, self.text, f"{error or 'too deeply nested'}; {_LANGUAGE}") from error
        return self._compile(tree.body)

    def _compile(self, node: ast.expr) -> _Typed:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._at(node, f"nested more than {_DEEPEST} deep; split it with a derived value")
        try:
            return self._dispatch(node)
        finally:
            self._depth -= 1

    def _dispatch(self, node: ast.expr) -> _Typed:
        match node:
            case ast.Constant():
                return self._constant(node)
            case ast.Name():
                return self._name(node)
            case ast.BoolOp():
                return self._junction(node)
            case ast.UnaryOp():
                return self._unary(node)
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.Compare():
                return self._comparison(node)
            case ast.Call():
                return self._call(node)
        raise self._at(node, f"{_describe(node)} is not part of the language; {_LANGUAGE}")

    def _constant(self, node: ast.Constant) -> _Typed:
        value: Any = node.value
        kind = kind_of(value)
        if kind is None or (isinstance(value, float) and not math.isfinite(value)):
            raise self._at(node, f"the constant {value!r} is not part of the language; {_LANGUAGE}")
        return kind, lambda values: value

    def _name(self, node: ast.Name) -> _Typed:
        name = node.id
        if name not in self.kinds:
            raise self._at(node, f"there is no {name!r} here; choose one of {', '.join(self.kinds) or 'none'}")
        self.names.add(name)
        return self.kinds[name], operator.itemgetter(name)

    def _junction(self, node: ast.BoolOp) -> _Typed:
        runs = [self._of_kind(part, "condition") for part in node.values]
        if isinstance(node.op, ast.And):
            return "condition", lambda values: all(run(values) for run in runs)
        return "condition", lambda values: any(run(values) for run in runs)

    def _unary(self, node: ast.UnaryOp) -> _Typed:
        if isinstance(node.op, ast.Not):
            run = self._of_kind(node.operand, "condition")
            return "condition", lambda values: not run(values)
        if isinstance(node.op, ast.USub | ast.UAdd):
            run = self._of_kind(node.operand, "number")
            sign = -1 if isinstance(node.op, ast.USub) else 1
            return "number", lambda values: sign * run(values)
        raise self._at(node, f"the operator ~ is not part of the language; {_LANGUAGE}")

    def _arithmetic(self, node: ast.BinOp) -> _Typed:
        calculate = _ARITHMETIC.get(type(node.op))
        if calculate is None:
            raise self._at(node, f"the operator {_describe(node.op)} is not part of the language; {_LANGUAGE}")
        left, right = self._of_kind(node.left, "number"), self._of_kind(node.right, "number")
        return "number", lambda values: calculate(left(values), right(values))

    def _comparison(self, node: ast.Compare) -> _Typed:
        for sign, part in zip(node.ops, node.comparators, strict=True):
            if type(sign) not in _COMPARISONS:
                raise self._at(part, f"the operator {_describe(sign)} is not part of the language; {_LANGUAGE}")
        operands = [self._compile(part) for part in (node.left, *node.comparators)]
        tests: list[Callable[[Any, Any], bool]] = []
        for sign, part, (left, _), (right, _) in zip(node.ops, node.comparators, operands, operands[1:], strict=False):
            if left != right:
                raise self._at(part, f"a {left} is compared with a {right}; compare values of one kind")
            if left != "number" and not isinstance(sign, ast.Eq | ast.NotEq):
                raise self._at(part, f"values of kind {left} have no order; use == or !=")
            tests.append((_COMPARISONS if left == "number" else _PLAIN_COMPARISONS)[type(sign)])
        runs = [run for _, run in operands]
        if len(tests) == 1:
            (only,), (first, second) = tests, runs
            return "condition", lambda values: only(first(values), second(values))

        def chain(values: Mapping[str, Value]) -> bool:
            left = runs[0](values)
            for test, run in zip(tests, runs[1:], strict=True):
                right = run(values)
                if not test(left, right):
                    return False
                left = right
            return True

        return "condition", chain

    def _call(self, node: ast.Call) -> _Typed:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise self._at(node, f"the call {ast.unparse(node)} is not part of the language; {_LANGUAGE}")
        if node.keywords or any(isinstance(part, ast.Starred) for part in node.args):
            raise self._at(node, f"{node.func.id}() takes plain arguments only; write them one after the other")
        name, count = node.func.id, len(node.args)
        if name in ("min", "max") and count < 2:
            raise self._at(node, f"{name}() takes two numbers or more, not {count}; add one")
        if name not in ("min", "max") and count != 1:
            raise self._at(node, f"{name}() takes one number, not {count}; give one")
        runs = [self._of_kind(part, "number") for part in node.args]
        calculate = _CALLS[name]
        return "number", lambda values: calculate(*(run(values) for run in runs))

    def _of_kind(self, node: ast.expr, expected: Kind) -> _Run:
        kind, run = self._compile(node)
        if kind != expected:
            hint = "; write a comparison" if expected == "condition" else ""
            raise self._at(node, f"a {kind} stands where a {expected} is needed{hint}")
        return run

    def _at(self, node: ast.expr, problem: str) -> SettingsError:
        line = _LINE_END.split(self._source)[node.lineno - 1]
        characters = len(line.encode()[: node.col_offset].decode())  # ast counts bytes
        return self._refusal(node.lineno, characters + 1, problem)

    def _refusal(self, line: int, column: int, problem: str) -> SettingsError:
        if line == 1:
            column += len(self.text) - len(self.text.lstrip())
            return SettingsError(self.where, self.text, f"at character {column}: {problem}")
        return SettingsError(self.where, self.text, f"at line {line}, character {column}: {problem}")


def _describe(node: ast.AST) -> str:
    return _PLAIN_NAMES.get(type(node), type(node).__name__)


def _floor_divide(left: float, right: float) -> float:
    if isinstance(left, int) and isinstance(right, int):
        return left // right
    quotient = left / right
    whole = round(quotient)
    return float(whole if same_number(quotient, whole) else math.floor(quotient))


def _remainder(left: float, right: float) -> float:
    if isinstance(left, int) and isinstance(right, int):
        return left % right
    quotient = left / right
    return 0.0 if same_number(quotient, round(quotient)) else left % right


def _to_int(number: float) -> int:
    whole = round(number)
    return whole if same_number(number, whole) else int(number)


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: _floor_divide,
    ast.Mod: _remainder,
}


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: same_number,
    ast.NotEq: lambda left, right: not same_number(left, right),
    ast.Lt: lambda left, right: left < right and not same_number(left, right),
    ast.LtE: lambda left, right: left <= right or same_number(left, right),
    ast.Gt: lambda left, right: left > right and not same_number(left, right),
    ast.GtE: lambda left, right: left >= right or same_number(left, right),
}

_PLAIN_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}

_CALLS: dict[str, Callable[..., Any]] = {"int": _to_int, "min": min, "max": max, "abs": abs, "round": round}

_PLAIN_NAMES: dict[type[ast.AST], str] = {
    ast.Attribute: "attribute access",
    ast.Subscript: "indexing",
    ast.Lambda: "a lambda",
    ast.IfExp: "if-else",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.List: "a list",
    ast.Tuple: "a tuple",
    ast.Set: "a set",
    ast.Dict: "a dictionary",
    ast.JoinedStr: "an f-string",
    ast.NamedExpr: "an assignment",
    ast.Starred: "unpacking",
    ast.Await: "await",
    ast.Pow: "**",
    ast.MatMult: "@",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Is: "is",
    ast.IsNot: "is not",
}
