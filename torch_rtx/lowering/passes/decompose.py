"""Writes calls that no kernel computes out as PyTorch's own decomposition, where kernels compute all of that.

A library call cuts the loops around it apart. Its decomposition fuses with them, and is expected to take no longer: it
must be loops that read and write little more than the call, and read no element many times.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.fusion import loops_us
from torch_rtx.lowering.infer import Inference, is_symbolic
from torch_rtx.lowering.iteration_space import is_absorbed_view, iteration_space_of
from torch_rtx.lowering.kernels.body_builder import needed
from torch_rtx.lowering.kernels.memory_model import streaming_us, typical
from torch_rtx.lowering.recording import decomposition, recorded
from torch_rtx.lowering.rewrite import Rewriter, escaping, rewrite
from torch_rtx.op_work import ANCHORS
from torch_rtx.targets import Arch, Target

log = logging.getLogger(__name__)
MOST = 1.5  # as long as the call may a decomposition take, and as many elements may a tensor in it have


def decompose(graph: Graph, infer: Inference, targets: tuple[Target, ...]) -> Graph:
    """Level import to level import.

    Args:
        targets: of the kernels.
    """
    arches, kept = tuple(dict.fromkeys(target.arch for target in targets)), escaping(graph)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op in ANCHORS or node.writes or _is_covered(node):
            return False
        if aten.may_alias(node) and any(value.name in kept for value in node.results):
            return False  # the caller may get memory that the call shares with an input
        overload = aten.overload(node.op)
        if aten.is_view(overload) or aten.is_random(overload) or decomposition(overload) is None:
            return False
        given = replace(node, args=node.map_inputs(rewriter.current))
        try:
            nodes, found = recorded(given, infer, _is_covered, rewriter.fresh)
            results = [_as(*pair, given, nodes, rewriter) for pair in zip(node.outputs, found, strict=True)]
        except Unsupported as error:
            log.debug("%s stays a call: %s", node.op, error.message)
            return False
        if _most_elements(nodes) > MOST * _most_elements([node]):  # windows that overlap, one by one
            return False
        us, call_us = _us(given, nodes, results, arches), _call_us(node, arches)
        if us > MOST * call_us:
            log.debug("%s stays a call: its decomposition takes %.1f us instead of %.1f", node.op, us, call_us)
            return False
        rewriter.nodes += [replace(one, loc=node.loc) for one in nodes]
        for old, new in zip(node.outputs, results, strict=True):
            if new is not None:
                rewriter.replace(old, new)
        return True

    return rewrite(graph, infer, visit)


def _is_covered(node: Node) -> bool:
    """Kernels compute `node`, element by element or row by row."""
    return iteration_space_of(node) is not None or is_absorbed_view(node)


def _as(old: Value | None, found: Value | None, given: Node, nodes: list[Node], rewriter: Rewriter) -> Value | None:
    """`found` as the result `old` of `given`: of its type, and in memory of its own; `nodes` get a copy for it.

    Raises:
        Unsupported: it has another shape or dtype, or a layout that no copy has.
    """
    if old is None or found is None:
        return None
    assert isinstance(old.type, TensorType)
    base = aten.bases(Graph("import", given.inputs, nodes=tuple(nodes))).get(found.name, found.name)
    if old.type == found.type and all(base != value.name for value in given.inputs):
        return found
    form = "contiguous_format" if old.type.strides == contiguous(old.type.shape) else "channels_last"
    args = ("self", found), ("memory_format", form)
    if rewriter.infer("aten.clone.default", args) != (old.type,):
        raise Unsupported(f"a decomposition to {found.type} instead of {old.type}")
    copy = rewriter.fresh(old.type)
    nodes.append(Node("op", "aten.clone.default", args, (copy,)))
    return copy


def _most_elements(nodes: list[Node]) -> int:
    """Those of the largest tensor that `nodes` read or write."""
    types = [value.type for node in nodes for value in (*node.inputs, *node.results)]
    return max(typical(dim_expr("*", 1, *type_.shape)) for type_ in types if isinstance(type_, TensorType))


def _us(given: Node, nodes: list[Node], results: list[Value | None], arches: tuple[Arch, ...]) -> float:
    """What kernels for `nodes` are expected to take; what depends on nothing that is given is a weight."""
    known, made, computed = {value.name for value in given.inputs}, list(given.inputs), []
    for node in nodes:
        symbolic = is_symbolic((*node.args, ("", tuple(node.results))))
        if symbolic or any(value.name in known for value in node.inputs):
            known.update(value.name for value in node.results)
            computed.append(node)
        else:
            made += node.results
    outputs = tuple(value for value in results if value is not None)
    return loops_us(Graph("import", tuple(made), nodes=tuple(needed(computed, outputs)), outputs=outputs), arches)


def _call_us(node: Node, arches: tuple[Arch, ...]) -> float:
    types = [value.type for value in (*node.inputs, *node.results) if isinstance(value.type, TensorType)]
    return sum(streaming_us(types, arch) for arch in arches)
