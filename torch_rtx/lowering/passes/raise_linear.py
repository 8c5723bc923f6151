"""Raises products with a matrix of weights, and a bias that is added to them, to linear layers.

    x @ w, x @ w + b, addmm(b, x, w)  ->  linear(x, w.t(), b)

Models from elsewhere than PyTorch hold the matrix of a layer transposed. As linear layers, products of one input merge.
The raised call rounds fewer times.
"""

from __future__ import annotations

from collections.abc import Container

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.merge_linears import LINEAR
from torch_rtx.lowering.rewrite import Rewriter, from_weights, only_user, returned, rewrite, users
from torch_rtx.op_work import PRODUCTS

RAISED = (*(f"aten.{name}.default" for name in ("matmul", "mm", "addmm")), LINEAR)
ADD = "aten.add.Tensor"
TRANSPOSES = ("aten.t.default", "aten.permute.default", "aten.transpose.int", "aten.numpy_T.default")


def raise_linear(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    weights, readers, outputs = from_weights(graph), users(graph), returned(graph)
    producer = {value.name: node for node in graph.nodes for value in node.results}
    layers: dict[str, Node] = {}  # by its result: a product to which a later node adds the bias

    def linear(product: Node, last: Node, bias: Attr, rewriter: Rewriter) -> None:
        source, weight = (product.arg(name) for name in PRODUCTS[product.op][:2])
        before = len(rewriter.nodes)
        if product.op != LINEAR:
            assert isinstance(weight, Value)
            made = producer.get(weight.name)
            straight = made.inputs[0] if made is not None and made.op in TRANSPOSES else None
            weight = straight or rewriter.emit("aten.t.default", product.loc, self=rewriter.current(weight))
        args = {"input": source, "weight": weight} | ({} if bias is None else {"bias": bias})
        current = {name: rewriter.current(v) if isinstance(v, Value) else v for name, v in args.items()}
        try:
            rewriter.replace(last.outputs[0], rewriter.emit(LINEAR, last.loc, **current))
        except Unsupported:  # PyTorch asks whether there are rows, of sizes that are differences of others
            del rewriter.nodes[before:]
            for node in dict.fromkeys((product, last)):
                rewriter.keep(node)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op in RAISED and _is_layer(node, weights):
            add, given = only_user(node.outputs, readers, outputs), PRODUCTS[node.op].added
            bias = node.arg(given) if given else None
            if bias is None and add is not None and _bias(add, node, weights) is not None:
                layers.update((value.name, node) for value in node.results)
                return True
            if node.op == LINEAR or not (bias is None or _fits_bias(bias, node, weights)):
                return False
            linear(node, node, bias, rewriter)
            return True
        product = next((layers[value.name] for value in node.inputs if value.name in layers), None)
        if product is None:
            return False
        linear(product, node, _bias(node, product, weights), rewriter)
        return True

    return rewrite(graph, infer, visit)


def _is_layer(node: Node, weights: Container[str]) -> bool:
    """Whether the node is a product of rows with a matrix of weights, to which it adds its bias as it is."""
    source, weight = (node.arg(name) for name in PRODUCTS[node.op][:2])
    if not isinstance(source, Value) or not isinstance(weight, Value) or weight.name not in weights:
        return False
    plain = node.arg("alpha", 1) == 1 == node.arg("beta", 1)
    return plain and len(_type(source).shape) > 1 and len(_type(weight).shape) == 2 and source.name not in weights


def _bias(add: Node, product: Node, weights: Container[str]) -> Value | None:
    """The bias that a node adds to a product; None: it does something else."""
    operands = [add.arg("self"), add.arg("other")]
    if add.kind != "op" or add.op != ADD or add.arg("alpha", 1) != 1 or product.outputs[0] not in operands:
        return None
    operands.remove(product.outputs[0])
    (bias,) = operands
    return bias if _fits_bias(bias, product, weights) else None  # type: ignore[return-value]  # it is a value, then


def _fits_bias(bias: Attr, product: Node, weights: Container[str]) -> bool:
    """Whether it is a weight with an element for each column."""
    if not isinstance(bias, Value) or bias.name not in weights:
        return False
    wanted = _type(product.outputs[0])
    return (_type(bias).shape, _type(bias).dtype) == (wanted.shape[-1:], wanted.dtype)


def _type(value: Value | None) -> TensorType:
    assert value is not None
    assert isinstance(value.type, TensorType)
    return value.type
