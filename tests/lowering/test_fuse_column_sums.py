"""Loops over rows and sums over all rows: drawn programs give the same numbers by each way to run them, in Triton's
interpreter, as call by call."""

from __future__ import annotations

import random

import pytest
import torch

from tests.doubles.interpreter import Interpreted
from tests.lowering.kernels.kernel_bodies import random_tensor
from torch_rtx.ir import Graph, attr_values, kernel_nodes
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import forms
from torch_rtx.lowering.pipeline import lower
from torch_rtx.runtime.code import compile_graph
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import OWN
from torch_rtx.targets import Target, arch_of

CPU = torch.device("cpu")
TARGET = Target(90)
FULL = {
    "aten.mul.Tensor(self={0}, other={1})",
    "aten.sub.Tensor(self={0}, other={1})",
    "aten.add.Tensor(self={0}, other=w)",
    "aten.relu.default(self={0})",
    "aten.sub.Tensor(self={0}, other={row})",
}


def drawn(seed: int) -> Graph:
    """Pointwise operations, reductions of rows and sums over all rows, in a random order, and some results of each."""
    rng = random.Random(seed)
    rows, columns = rng.choice(["64", "4, 24", "37", "8, 5, 3"]), rng.choice(["16", "33", "4, 6"])
    ahead, behind = rows.count(",") + 1, columns.count(",") + 1
    full, row = f"f32[{rows}, {columns}]", f"f32[{rows}{', 1' * behind}]"
    outer, inner = list(range(ahead)), list(range(ahead, ahead + behind))
    lines = [
        f"input x: {full}",
        f"input g: {full.replace('f32', rng.choice(['f32', 'bf16']))}",
        f"input w: f32[{columns}]",
    ]
    lines.append(f"t0: {full} = op aten.mul.Tensor(self=x, other=g)")
    lines.append(f"r0: {row} = op aten.amax.default(self=t0, dim={inner}, keepdim=True)")
    values, statistics, results = ["t0"], ["r0"], []
    for at in range(1, rng.randint(4, 10)):
        kind, one, other = rng.choice("fffrrcch"), rng.choice(values), rng.choice(values)
        if kind == "f":
            call = rng.choice(sorted(FULL)).format(one, other, row=rng.choice(statistics))
            lines.append(f"t{at}: {full} = op {call}")
            values.append(f"t{at}")
        elif kind == "r":
            call = f"aten.sum.dim_IntList(self={one}, dim={inner}, keepdim=True)"
            lines.append(f"r{at}: {row} = op {call}")
            statistics.append(f"r{at}")
        elif kind == "c":
            lines.append(f"c{at}: f32[{columns}] = op aten.sum.dim_IntList(self={one}, dim={outer})")
            results.append(f"c{at}")
        else:
            lines.append(f"h{at}: {full.replace('f32', 'bf16')} = op aten._to_copy.default(self={one}, dtype='bf16')")
            results.append(f"h{at}")
    results += [rng.choice(values), rng.choice(statistics)]
    return parse("\n".join(["graph import {", *lines, f"return [{', '.join(dict.fromkeys(results))}]", "}"]))


@pytest.mark.parametrize("which", [0, 1])
def test_drawn_programs(which: int) -> None:
    """By the tactic that is expected to be the fastest, and by another one."""
    joint = 0
    for seed in range(40):
        graph = drawn(seed)
        lowered, _ = lower(graph, CompilationSettings(), None, (TARGET,))
        tactics = {}
        for node in kernel_nodes(lowered):
            found = [head for head, _ in forms(node.body, node.op, arch_of(90))]  # type: ignore[arg-type]
            joint += all(OWN not in head.kernels for head in found)
            tactic = found[min(which, len(found) - 1)]
            tactics[node.op] = tactic.with_kernels(lambda op, kernel: Interpreted(kernel))
        torch.manual_seed(seed)
        inputs = [0.3 * random_tensor(value.type, {}) for value in graph.inputs]
        expected = compile_graph(graph, CPU)(inputs, ())
        got = compile_graph(lowered, CPU, tactics=tactics)(inputs, ())  # type: ignore[arg-type]
        for value, mine, right in zip(attr_values(graph.outputs), got, expected, strict=True):
            error = (mine.double() - right.double()).norm() / right.double().norm().clamp_min(1e-20)
            assert error < (1e-2 if right.dtype == torch.bfloat16 else 1e-4), f"{value.name} of seed {seed}: {error}"
    assert joint > 5
