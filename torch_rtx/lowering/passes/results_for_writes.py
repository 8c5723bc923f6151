"""Gives each input that a value is copied to a result of its own, which the value's kernel then writes there.

The counters of a cache may all get one number, and a caller may get what a state becomes: such a value lies in memory
of its own, and a call would copy it from there. A loop that stores it once more takes no longer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch_rtx import aten
from torch_rtx.accumulation import scatters
from torch_rtx.ir import COPY, Graph, Node, Value
from torch_rtx.lowering.fusion import kernel_name
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.rewrite import Rewriter, returned, with_bases

MAX_POINTERS = 128  # of a kernel, with the further results


def results_for_writes(graph: Graph, infer: Inference) -> Graph:
    """Level import, after `fuse`, to the same level. Only a loop over elements gets further results, for inputs that
    neither it nor a later call reads."""
    wanted = _wanted(graph)
    rewriter = Rewriter(graph, infer)
    sources: dict[int, Value] = {}  # by the id of a copy: what it copies from now on
    for node in graph.nodes:
        copies = wanted.get(id(node), ())
        if copies and node.body is not None:
            made = [node.body.outputs[node.outputs.index(_source(copy))] for copy in copies]
            fresh = [rewriter.fresh(_source(copy).type) for copy in copies]
            sources |= zip(map(id, copies), fresh, strict=True)
            body = replace(node.body, outputs=(*node.body.outputs, *made))
            node = replace(node, op=kernel_name(body), body=body, outputs=(*node.outputs, *fresh))
        elif id(node) in sources:
            node = replace(node, args=(("self", node.arg("self")), ("src", sources[id(node)])))
        rewriter.keep(node)
    return rewriter.finish()


def _wanted(graph: Graph) -> dict[int, list[Node]]:
    """By the id of a kernel: the copies that get results of it for themselves."""
    base = aten.bases(graph)
    last: dict[str, int] = {}  # the position of the last call that reads a value, by name
    for at, node in enumerate(graph.nodes):
        last |= {base.get(value.name, value.name): at for value in node.inputs if node.op != COPY}
    seen = {value.name for node in graph.nodes if node.kind == "fallback" for value in node.inputs}
    kept = with_bases(graph, returned(graph) | seen)
    writes = Counter(value.name for node in graph.nodes for value in node.targets)
    by_source: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == COPY and len(node.args) == 2 and isinstance(node.arg("src"), Value):
            by_source.setdefault(_source(node).name, []).append(node)
    found: dict[int, list[Node]] = {}
    for at, node in enumerate(graph.nodes):
        for name in [value.name for value in node.results if value.name in by_source]:
            able = [
                copy
                for copy in by_source[name]
                for target in copy.targets
                if target.type == _source(copy).type and last.get(target.name, -1) < at and writes[target.name] == 1
            ]
            # The value itself can lie in one of the inputs, unless something else has to be copied from it.
            rest = name in kept or len(able) < len(by_source[name])
            able = able if rest else able[1:]
            room = MAX_POINTERS - len(node.inputs) - len(node.outputs) - len(found.get(id(node), ()))
            if able[: max(room, 0)] and _is_loop(node):
                found.setdefault(id(node), []).extend(able[:room])
    return found


def _source(copy: Node) -> Value:
    source = copy.arg("src")
    assert isinstance(source, Value)
    return source


def _is_loop(node: Node) -> bool:
    """A kernel of one loop over elements."""
    if node.kind != "kernel" or node.body is None or None in node.outputs:
        return False
    if any(step.kind != "op" or step.writes or scatters(step) for step in node.body.nodes):
        return False
    found = region(node.body)
    return found.anchor is None and not found.reductions
