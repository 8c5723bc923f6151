"""The matrices among a model's weights: which axis of each a product sums over, and what bias is added to it.

An exporter to ONNX stores the transposed matrix of a linear layer, and under a name of its own. An engine keeps these
facts of its products, by which `onnx.weights` finds such a matrix again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

# The position of the matrix among a call's arguments, its axis that is summed over, and the position of the bias.
_PRODUCTS: dict[str, tuple[int, int, int | None]] = {
    "aten.linear.default": (1, 1, 2),
    "aten.addmm.default": (2, 0, 0),
    "aten.mm.default": (1, 0, None),
    "aten.matmul.default": (1, 0, None),
}
_SHAPED = ("aten.alias.default", "aten.detach.default", "aten.view.default", "aten.reshape.default")


def products_of(program: ExportedProgram) -> dict[str, Any]:
    """For each weight that is a matrix of a product, by name: `axis`, which the product sums over; `bias`, the name of
    what is added to it, or None; and `module`, the path of the module that has the matrix. A matrix of which products
    sum over both axes is left out."""
    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    weights = {node: names[node.name] for node in program.graph.nodes if node.name in names}
    found: dict[str, Any] = {}
    both: set[str] = set()
    for node in program.graph.nodes:
        if str(node.target) not in _PRODUCTS:
            continue
        at, axis, bias_at = _PRODUCTS[str(node.target)]
        matrix, swapped = _source(node.args[at])
        if matrix in weights and matrix.meta["val"].dim() == 2:
            given = node.args[bias_at] if bias_at is not None and len(node.args) > bias_at else None
            bias = next((weights[one] for one in (given, *_added(node)) if one in weights), None)
            name, axis = weights[matrix], 1 - axis if swapped else axis
            fact = {"axis": axis, "bias": bias, "module": name.rpartition(".")[0]}
            if found.setdefault(name, fact)["axis"] != axis:
                both.add(name)
    return {name: fact for name, fact in found.items() if name not in both}


def _source(node: Any) -> tuple[Any, bool]:
    """What a matrix is a view of, and whether its axes are swapped."""
    swapped = False
    while isinstance(node, Node):
        args: Any = node.args
        if str(node.target) == "aten.transpose.int":
            swapped ^= (args[1] - args[2]) % 2 == 1
        elif str(node.target) == "aten.permute.default":
            swapped ^= args[1][0] % 2 == 1
        elif str(node.target) == "aten.t.default":
            swapped = not swapped
        else:
            break
        node = args[0]
    return node, swapped


def _added(node: Node) -> Iterator[Any]:
    """What is added to a product that nothing else reads."""
    while len(node.users) == 1:
        (node,) = node.users
        if str(node.target) == "aten.add.Tensor":
            yield from node.args[:2]
        if str(node.target) not in _SHAPED:
            return
