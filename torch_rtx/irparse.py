"""Reads the text form of the IR: `parse(str(graph)) == graph`.

Lines are split by hand; types, dims and arguments are Python expressions. Python's own parser turns them into a syntax
tree, which is walked and never evaluated: untrusted text is safe to parse. Limits bound the time and the memory that a
text takes, to about a second for each megabyte.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from keyword import iskeyword

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import InvalidIR
from torch_rtx.ir import (
    LEVELS,
    MAIN,
    MAX_RANK,
    SCALARS,
    Attr,
    Dim,
    Expr,
    Graph,
    Loc,
    Node,
    Parameter,
    ScalarType,
    Sym,
    TensorType,
    Type,
    Value,
    Weight,
    contiguous,
    dim_expr,
    is_name,
)

MAX_DEPTH = 8  # of nested graphs; real ones have at most 3
MAX_NESTING = 64  # of lists and dims in an expression
MAX_LINES, MAX_LINE = 1 << 18, 1 << 18  # lines, each a node, an input, a parameter, a dim, ...; characters of a line
MAX_NAME = 1000  # characters of the name of a value, dim, parameter or operator
MAX_TERMS = 256  # of a dim
WIDTH = 2**63  # numbers are of 64 bits
KINDS = frozenset(kind for kinds in LEVELS.values() for kind in kinds)
OPERATORS = {ast.Add: "+", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%"}
CONSTANTS: dict[str, Attr] = {"inf": float("inf"), "nan": float("nan")}


def parse(text: str) -> Graph:
    """The graph that `text` describes; not verified.

    Raises:
        InvalidIR: the text is not well-formed; the message has the line and its number.
    """
    reader = _Reader(text.splitlines())
    if len(reader.lines) > MAX_LINES:
        raise InvalidIR(f"a text of {len(reader.lines)} lines, more than {MAX_LINES}")
    try:
        graph = reader.graph(reader.next(), 0)
        if any(line.strip() for line in reader.lines[reader.at :]):
            raise InvalidIR("text follows the end of the graph")
    except InvalidIR as error:
        raise InvalidIR(f"line {reader.at}: {error.message}", hint=reader.line.strip()[:200]) from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidIR(f"line {reader.at}: {error}", hint=reader.line.strip()[:200]) from None
    return graph


def parse_dim(text: str, syms: Mapping[str, Sym]) -> Dim:
    """Parse a dim over the symbols `syms`.

    Raises:
        InvalidIR: the text is not a dim, or has an unknown symbol.
    """
    scope = _Scope()
    scope.syms.update(syms)
    try:
        return _dim(_expression(text), scope)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidIR(f"{text[:200]!r} is not a dim: {error}") from None


class _Scope:
    """The names of one graph: its symbols and the values defined so far."""

    def __init__(self) -> None:
        self.syms: dict[str, Sym] = {}
        self.values: dict[str, Value] = {}
        self.types: dict[str, Type] = {}  # by text: most nodes have one output, of a type that another has


class _Reader:
    def __init__(self, lines: list[str]) -> None:
        self.lines, self.at, self.line = lines, 0, ""

    def next(self) -> str:
        if self.at >= len(self.lines):
            raise InvalidIR("the text ends inside a graph")
        self.line = self.lines[self.at]
        self.at += 1
        if len(self.line) > MAX_LINE:
            raise InvalidIR(f"a line of {len(self.line)} characters, more than {MAX_LINE}")
        return self.line.strip()

    def graph(self, head: str, depth: int) -> Graph:
        word, level, brace = (*head.split(), "", "", "")[:3]
        if (word, brace) != ("graph", "{") or depth > MAX_DEPTH:
            raise InvalidIR("expected `graph LEVEL {`" if depth <= MAX_DEPTH else "graphs are nested too deep")
        scope = _Scope()
        inputs: list[Value] = []
        parameters: list[Parameter] = []
        weights: list[Weight] = []
        nodes: list[Node] = []
        while True:
            word, _, rest = (line := self.next()).partition(" ")
            if word == "return":
                outputs = _attr(_expression(rest), scope)
                if not isinstance(outputs, tuple) or self.next() != "}":
                    raise InvalidIR("expected `return [...]` and `}`")
                return Graph(level, tuple(inputs), tuple(parameters), tuple(weights), tuple(nodes), outputs)
            if word == "dim":
                _dim_line(rest, scope)
            elif word == "input":
                inputs.extend(_values(rest, scope))
            elif word in ("parameter", "constant"):
                parameters.append(_parameter(rest, word == "constant", scope))
            elif word == "weight":
                weights.append(self.weight(rest, scope, depth))
            else:
                nodes.append(self.node(line, scope, depth))

    def weight(self, text: str, scope: _Scope, depth: int) -> Weight:
        left, _, right = text.partition(" = ")
        recipe = None
        if right.endswith("{"):
            right, _, head = (" " + right).rpartition(" graph ")
            recipe = self.graph("graph " + head, depth + 1)
        names = _strings(_expression(f"[{right}]"))
        (value,) = _values(left, scope)
        return Weight(value, names, recipe)

    def node(self, line: str, scope: _Scope, depth: int) -> Node:
        body, loc = None, None
        if line.endswith("{"):
            line, _, head = line.rpartition(" graph ")
            body = self.graph("graph " + head, depth + 1)
        if "  #" in line:
            line, _, comment = line.rpartition("  #")
            loc = _loc(comment.strip()) if comment.strip() else None
        # A node without outputs starts with its kind; a string argument may contain any delimiter.
        left, _, right = ("", "", line) if line.partition(" ")[0] in KINDS else line.partition(" = ")
        kind, _, text = right.strip().partition(" ")
        call = _expression(text)
        if not isinstance(call, ast.Call) or call.args:
            raise InvalidIR("expected a call with named arguments")
        args = tuple((_argument_name(keyword.arg), _attr(keyword.value, scope)) for keyword in call.keywords)
        return Node(kind, _short(_dotted(call.func)), args, tuple(_outputs(left, scope)) if left else (), body, loc)


def _argument_name(name: str | None) -> str:
    if name is None:
        raise InvalidIR("expected a call with named arguments")
    return name[:-1] if name.endswith("_") and iskeyword(name[:-1]) else name


def _expression(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


def _values(text: str, scope: _Scope) -> Iterator[Value]:
    """Parse `a: type, b: type` and add the values to the scope."""
    for value in _outputs(text, scope):
        if value is None:
            raise InvalidIR("value _ has no type")
        yield value


def _outputs(text: str, scope: _Scope) -> Iterator[Value | None]:
    """Parse `a: type, _, b: type`: as `_values`, with None for an unused output."""
    name, _, type_ = text.partition(": ")
    if type_ in scope.types and name != "_" and is_name(name):
        scope.values[name] = value = Value(_short(name), scope.types[type_])
        yield value
        return
    module = ast.parse(f"def f({text}): 0")
    definition = module.body[0]
    if len(module.body) != 1 or not isinstance(definition, ast.FunctionDef) or len(definition.body) != 1:
        raise InvalidIR("expected names and types")
    given = definition.args
    if given.posonlyargs or given.vararg or given.kwonlyargs or given.kwarg or given.defaults:
        raise InvalidIR("expected names and types")
    for argument in definition.args.args:
        if argument.arg == "_" and argument.annotation is None:
            yield None
            continue
        if argument.annotation is None:
            raise InvalidIR(f"value {argument.arg} has no type")
        value = Value(_short(argument.arg), _type(argument.annotation, scope))
        scope.values[value.name] = value
        if type_ and len(definition.args.args) == 1:
            scope.types[type_] = value.type
        yield value


def _dim_line(text: str, scope: _Scope) -> None:
    name, _, right = text.partition(" = ")
    fields = ast.literal_eval(f"({right})")
    numbers = fields if isinstance(fields, tuple) and len(fields) in (3, 4) else (None,)
    valid = all(
        (type(number) is int and -WIDTH <= number < WIDTH) or (index == 1 and number is None)
        for index, number in enumerate(numbers)
    )
    if not is_name(name) or not valid:
        raise InvalidIR("expected `dim NAME = MIN, MAX, MULTIPLE` or `dim NAME = MIN, MAX, MULTIPLE, TYPICAL`")
    scope.syms[name] = Sym(_short(name), *numbers)
    scope.types.clear()


def _parameter(text: str, constant: bool, scope: _Scope) -> Parameter:
    cut = max(text.rfind("'"), text.rfind('"')) + 1  # a type has no quotes
    name, *aliases = _strings(_expression(f"[{text[:cut]}]"))
    type_ = _type(_expression(text[cut:].removeprefix(":")), scope)
    if not isinstance(type_, TensorType):
        raise InvalidIR(f"parameter {name} is not a tensor")
    return Parameter(name, type_, tuple(aliases), constant)


def _strings(tree: ast.expr) -> tuple[str, ...]:
    items = ast.literal_eval(tree)
    if not all(isinstance(item, str) for item in items):
        raise InvalidIR("expected quoted names")
    return tuple(map(_short, items))


def _short(name: str) -> str:
    if len(name) > MAX_NAME:
        raise InvalidIR(f"a name of {len(name)} characters, more than {MAX_NAME}")
    return name


def _dotted(tree: ast.expr) -> str:
    if isinstance(tree, ast.Attribute):
        return f"{_dotted(tree.value)}.{tree.attr}"
    if isinstance(tree, ast.Name):
        return tree.id
    raise InvalidIR("expected an op name such as aten.add.Tensor")


def _loc(text: str) -> Loc:
    module, at, position = (" " + text).rpartition(" @ ")
    if not at:
        return Loc(text)
    file, colon, line = position.rpartition(":")
    if not file or not colon:
        raise InvalidIR("expected `# MODULE @ FILE:LINE`")
    return Loc(module.strip(), file, int(line))


def _type(tree: ast.expr, scope: _Scope) -> Type:
    device, strides = MAIN, None
    if isinstance(tree, ast.Attribute):
        device, tree = tree.attr, tree.value
    if isinstance(tree, ast.Call):
        strides, tree = tuple(_dim(arg, scope) for arg in tree.args), tree.func
    if isinstance(tree, ast.Name) and tree.id in SCALARS and strides is None:
        return ScalarType(tree.id)
    if not isinstance(tree, ast.Subscript) or not isinstance(tree.value, ast.Name):
        raise InvalidIR("expected a type such as f32[2, 3]")
    items = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
    if len(items) > MAX_RANK:
        raise InvalidIR(f"{len(items)} dimensions, more than {MAX_RANK}")
    shape = tuple(_dim(item, scope) for item in items)
    if tree.value.id == "int" and len(shape) == 1 and strides is None and device == MAIN:
        return ScalarType("int", shape[0])
    if tree.value.id not in DTYPES:
        raise InvalidIR(f"unknown dtype {tree.value.id!r}")
    return TensorType(tree.value.id, shape, contiguous(shape) if strides is None else strides, device)


def _dim(tree: ast.expr, scope: _Scope) -> Dim:
    return _as_dim(_attr(tree, scope))


def _as_dim(attr: Attr) -> Dim:
    if type(attr) is not int and not isinstance(attr, Sym | Expr):
        raise InvalidIR("expected a dim")
    return attr


def _attr(tree: ast.expr, scope: _Scope, depth: int = 0) -> Attr:
    if depth > MAX_NESTING:
        raise InvalidIR(f"lists or dims are nested more than {MAX_NESTING} deep")
    match tree:
        case ast.Constant(value=constant) if constant is None or isinstance(constant, bool | float | str):
            return constant
        case ast.Constant(value=int(number)):
            return _narrow(number)
        case ast.List(elts=items):
            return tuple(_attr(item, scope, depth + 1) for item in items)
        case ast.Name(id=name):
            found = scope.syms.get(name, scope.values.get(name, CONSTANTS.get(name)))
            if found is None:
                raise InvalidIR(f"{name[:MAX_NAME]} is not defined")
            return found
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _attr(operand, scope, depth + 1)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            args = [_as_dim(_attr(term, scope, depth + 1)) for term in _terms(tree)]
            return _narrow(dim_expr(OPERATORS[type(op)], *args))
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=terms, keywords=[]) if len(terms) <= MAX_TERMS:
            return _narrow(dim_expr(name, *[_as_dim(_attr(term, scope, depth + 1)) for term in terms]))
    raise InvalidIR("expected None, a number, a string, a list, a value or a dim")


def _terms(tree: ast.BinOp) -> list[ast.expr]:
    """The operands of an operator; of a chain of sums or products all at once, so that it is built in one step."""
    found: list[ast.expr] = [tree.right]
    left = tree.left
    while isinstance(tree.op, ast.Add | ast.Mult) and isinstance(left, ast.BinOp) and type(left.op) is type(tree.op):
        found.append(left.right)
        left = left.left
    if len(found) >= MAX_TERMS:
        raise InvalidIR(f"a dim of more than {MAX_TERMS} terms")
    return [left, *found[::-1]]


def _narrow(dim: Dim) -> Dim:
    """`dim`, which must be a number of 64 bits or no number; 2**63 is one, since `-` may stand before it."""
    if isinstance(dim, int) and not -WIDTH <= dim <= WIDTH:
        raise InvalidIR("a number does not fit in 64 bits")
    return dim
