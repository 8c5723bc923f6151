"""Calls of operators that write to their arguments, as functions: they write to copies, and return these, too.

torch_rtx.functional(op, names, values, written)   calls `op` with `values`, named `names`; of those in `written` it
                                                   gets copies, which are the last results
"""

from __future__ import annotations

from torch_rtx.errors import InvalidIR
from torch_rtx.ir import Node, Value

FUNCTIONAL = "torch_rtx.functional"


def copied(node: Node) -> dict[str, tuple[Value, Value]]:
    """By the name of an argument that the operator writes to: what is copied, and the copy.

    Raises:
        InvalidIR: the node has not the arguments and results of such a call.
    """
    names, values, written = (node.arg(name) for name in ("names", "values", "written"))
    if not isinstance(names, tuple) or not isinstance(values, tuple) or not isinstance(written, tuple):
        raise InvalidIR(f"{FUNCTIONAL} must have lists of names, values and written names", loc=node.loc)
    given, copies = dict(zip(names, values, strict=False)), node.outputs[len(node.outputs) - len(written) :]
    found = {}
    for name, copy in zip(written, copies, strict=False):
        value = given.get(name)
        if not isinstance(name, str) or not isinstance(value, Value) or copy is None or copy.type != value.type:
            raise InvalidIR(f"{FUNCTIONAL} must return what it writes to", loc=node.loc)
        found[name] = value, copy
    if len(found) != len(written) or len(names) != len(values) or len(given) != len(names):
        raise InvalidIR(f"{FUNCTIONAL} must name each argument once", loc=node.loc)
    return found


def plain(node: Node) -> Node:
    """The call itself, which writes to the copies.

    Raises:
        InvalidIR: see `copied`, or the operator has no name.
    """
    copies, op = copied(node), node.arg("op")
    if not isinstance(op, str) or op.count(".") < 2:
        raise InvalidIR(f"{FUNCTIONAL} must name an operator", loc=node.loc)
    pairs = zip(node.arg("names"), node.arg("values"), strict=True)  # type: ignore[arg-type]
    args = tuple((name, copies[name][1] if name in copies else value) for name, value in pairs)
    return Node("fallback", op, args, node.outputs[: len(node.outputs) - len(copies)], None, node.loc)  # type: ignore[arg-type]
