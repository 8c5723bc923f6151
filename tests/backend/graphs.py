"""Random FX graphs for the tests of keys: described as plain data, built as FX graphs, and written in a form of their
own that is equal for equal graphs, whatever the order of independent nodes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_rtx.backend.fx_hash import graph_key
from torch_rtx.cache.key import Key
from torch_rtx.lowering.from_fx import Role
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.settings import CompilationSettings

aten = torch.ops.aten
OPS: dict[str, tuple[Any, int, tuple[Any, ...]]] = {  # operator, how many values it takes, the literals it may take
    "add": (aten.add.Tensor, 2, ()),
    "sub": (aten.sub.Tensor, 2, ()),
    "relu": (aten.relu.default, 1, ()),
    "mul": (aten.mul.Scalar, 1, (1, True, 1.0, 0.0, -0.0, 2, float("nan"))),
    "clamp": (aten.clamp.default, 1, ((None, 1), (1, None), (0, 1), (0.0, 1), (False, 1))),
    "rand": (aten.rand_like.default, 1, ()),
    "cat": (aten.cat.default, 2, (0, 1)),
    "constant": (None, 0, (0, 1, 2)),
}
PURE = tuple(name for name in OPS if name != "rand")
MODE = FakeTensorMode()
KINDS = {  # types of inputs: dtype and strides
    "f32": (torch.float32, (4, 1)),
    "f16": (torch.float16, (4, 1)),
    "transposed": (torch.float32, (1, 4)),
}
with MODE:
    FAKES = {name: torch.empty_strided((4, 4), strides, dtype=dtype) for name, (dtype, strides) in KINDS.items()}


@dataclass(frozen=True)
class Spec:
    """`inputs` are KINDS; each step is an operator, the indices of the values that it takes, and a literal; `outputs`
    are indices of values. Values are the inputs, then one per step."""

    inputs: tuple[str, ...]
    steps: tuple[tuple[str, tuple[int, ...], Any], ...]
    outputs: tuple[int, ...]

    @staticmethod
    def random(drawn: random.Random, small: bool = False) -> Spec:
        inputs = tuple(drawn.choice(tuple(KINDS)) for _ in range(1 if small else drawn.randint(1, 3)))
        steps = []
        for index in range(len(inputs), len(inputs) + drawn.randint(1, 3 if small else 8)):
            name = drawn.choice(tuple(OPS))
            _, count, literals = OPS[name]
            args = tuple(drawn.randrange(index) for _ in range(count))
            steps.append((name, args, drawn.choice(literals) if literals else None))
        count = len(inputs) + len(steps)
        outputs = (count - 1, *(drawn.randrange(count) for _ in range(drawn.randint(0, 1 if small else 2))))
        return Spec(inputs, tuple(steps), outputs)

    @staticmethod
    def of(plain: Any) -> Spec:
        """What `plain` gives, after JSON."""
        inputs, steps, outputs = plain
        literal = {name: {repr(item): item for item in literals} for name, (_, _, literals) in OPS.items()}
        made = ((name, tuple(args), literal[name].get(shown)) for name, args, shown in steps)
        return Spec(tuple(inputs), tuple(made), tuple(outputs))

    def plain(self) -> Any:
        return self.inputs, [(name, args, repr(literal)) for name, args, literal in self.steps], self.outputs

    def changed(self, change: str, drawn: random.Random) -> Spec:
        """With one thing changed, where there is such a thing."""
        if change in ("dtype", "stride"):
            kind = "f16" if change == "dtype" else "transposed"
            return replace(self, inputs=("f32" if self.inputs[0] == kind else kind, *self.inputs[1:]))
        if change == "input":
            return replace(self, outputs=(*self.outputs[:-1], 0))
        steps = list(self.steps)
        names = {"literal": ("mul", "clamp", "cat"), "constant": ("constant",)}.get(change)
        found = [i for i, (name, args, _) in enumerate(steps) if (name in names if names else len(args) > 0)]
        if not found:
            return self
        index = drawn.choice(found)
        name, args, literal = steps[index]
        if change == "order":
            args = args[::-1]
        elif change == "edge":
            args = (drawn.randrange(len(self.inputs) + index), *args[1:])
        else:
            literal = drawn.choice(OPS[name][2])
        steps[index] = name, args, literal
        return replace(self, steps=tuple(steps))


def specs() -> st.SearchStrategy[Spec]:
    return st.randoms(use_true_random=False).map(Spec.random)


def reordered(spec: Spec, drawn: random.Random) -> Spec:
    """The same graph with its independent steps in another order; draws, and results that nobody reads, keep theirs."""
    first = len(spec.inputs)
    read = {a for _, args, _ in spec.steps for a in args} | set(spec.outputs)
    kept = [i for i, (name, _, _) in enumerate(spec.steps) if name == "rand" or first + i not in read]
    before = dict(zip(kept[1:], kept, strict=False))
    at = {i: i for i in range(first)}
    steps: list[tuple[str, tuple[int, ...], Any]] = []
    waiting = list(range(len(spec.steps)))
    while waiting:
        free = [i for i in waiting if all(a in at for a in spec.steps[i][1]) and before.get(i, -1) not in waiting]
        index = drawn.choice(free)
        waiting.remove(index)
        name, args, literal = spec.steps[index]
        at[first + index] = first + len(steps)
        steps.append((name, tuple(at[a] for a in args), literal))
    return Spec(spec.inputs, tuple(steps), tuple(at[o] for o in spec.outputs))


def build(spec: Spec, prefix: str = "n") -> torch.fx.GraphModule:
    """The FX graph, with names that begin with `prefix`."""
    graph, root, values = torch.fx.Graph(), torch.nn.Module(), []
    for index, kind in enumerate(spec.inputs):
        node = graph.placeholder(f"{prefix}_in{index}")
        node.meta["val"] = FAKES[kind]
        values.append(node)
    for index, (name, args, literal) in enumerate(spec.steps):
        taken = tuple(values[a] for a in args)
        if name == "constant":
            setattr(root, f"{prefix}_c{index}", torch.full((4, 4), float(literal)))
            node = graph.get_attr(f"{prefix}_c{index}")
        elif name == "cat":
            node = graph.call_function(OPS[name][0], ([*taken], literal))
        else:
            given = literal if isinstance(literal, tuple) else () if literal is None else (literal,)
            node = graph.call_function(OPS[name][0], (*taken, *given), name=f"{prefix}_{index}")
        node.meta["val"] = FAKES["f32"]
        values.append(node)
    graph.output(tuple(values[o] for o in spec.outputs))
    return torch.fx.GraphModule(root, graph)


def key_of(gm: torch.fx.GraphModule) -> Key:
    count = sum(node.op == "placeholder" for node in gm.graph.nodes)
    roles = [Role("input", f"x{index}") for index in range(count)]
    return graph_key(gm, roles, CompilationSettings(), Symbols(torch.device("cpu"))).key


def canonical(spec: Spec) -> str:
    """The graph from its ends, values called by the order in which they are met: draws and unread results, outputs."""
    first, seen = len(spec.inputs), {}
    read = {a for _, args, _ in spec.steps for a in args} | set(spec.outputs)

    def write(index: int) -> str:
        if index < first:
            return f"input {index}"
        if index in seen:
            return f"#{seen[index]}"
        seen[index] = len(seen)
        name, args, literal = spec.steps[index - first]
        return f"{name} {literal!r}({', '.join(map(write, args))})"

    ends = [first + i for i, (name, _, _) in enumerate(spec.steps) if name == "rand" or first + i not in read]
    return f"{spec.inputs} {[write(index) for index in (*ends, *spec.outputs)]}"
