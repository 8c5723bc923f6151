"""Writes the engines of `tests/engines/v7`, which every later release must read: python -m tests.write_engines

Each is written beside what it needs: `NAME.rtx`, `NAME.weights.safetensors` if it is weight-stripped, and
`NAME.calls.safetensors` with the inputs and outputs of some calls, eager's, as `CALL/in/POSITION` and
`CALL/out/POSITION`. Files that were released stay as they are: a change of the format gets a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import torch_rtx
from tests.helpers.kernels import ADD, blocks
from tests.helpers.splits import split_in
from tests.paths import ENGINES
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.ir import Graph, Node, TensorType, Value, dim_expr
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import forms, generate
from torch_rtx.tactics import OWN, Tactic
from torch_rtx.targets import PORTABLE, Target

FOLDER = ENGINES / "v7"


def mlp() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)), [(torch.randn(3, 4),)], None


def conv_bn() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model, [(torch.randn(2, 3, 6, 6),)], None


class Symbolic(nn.Module):
    """A free dim, constants of several dtypes, structured inputs and outputs, a cast, an unsaved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.weight = nn.Parameter(torch.randn(4, 4).to(torch.bfloat16))

    def forward(self, batch: dict[str, torch.Tensor], scale: int = 2) -> dict[str, Any]:
        x, ids = batch["x"], batch["ids"]
        y = (x.to(torch.bfloat16) @ self.weight.t()).float() * scale + self.table
        kept = torch.where(ids.unsqueeze(-1) > torch.tensor([1, 2, 0, 3]), y, 0.0)
        return {"pair": (kept, kept.sum(0)), "rows": x.shape[0], "none": None}


def symbolic() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    calls = [({"x": torch.randn(n, 4), "ids": torch.randint(0, 5, (n,))}, 3) for n in (3, 1, 8)]
    n = Dim("n", min=1, max=8)
    return Symbolic(), calls, {"batch": {"x": {0: n}, "ids": {0: n}}, "scale": None}


class Added(nn.Module):
    """One sum, which becomes a kernel, before a product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(x + y)


def kernel() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    calls = [(torch.randn(n, 8), torch.randn(n, 8)) for n in (3, 1, 64)]
    n = Dim("n", min=1, max=64)
    return Added(), calls, {"x": {0: n}, "y": {0: n}}


class Cached(nn.Module):
    """Rows of a buffer and of an input, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(4, 2), persistent=False)
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, position: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(0, position, self.linear(x))
        values[1:3] = x + 1
        return self.keys.t() @ values


def cache() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    """The second call sees the buffer of the first."""
    return Cached(), [(torch.randn(2, 2), torch.tensor(at), torch.randn(4, 2)) for at in ([3, 0], [1, 3])], None


def onnx() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    from tests.onnx.models import linear  # needs the package onnx, which those who read engines may lack

    calls = [(torch.randn(n, 3, 4),) for n in (2, 1, 8)]
    return torch_rtx.from_onnx(linear()), calls, {"x": {0: Dim("batch", min=1, max=8)}}


BODY = """kernel add_k(in0=x, in1=y) graph import {{
    {dim}
    input in0: {type}
    input in1: {type}
    sum: {type} = op aten.add.Tensor(self=in0, other=in1)
    return [sum]
  }}"""


def with_kernel(engine: torch_rtx.Engine) -> torch_rtx.Engine:
    """The engine with its sum as a kernel for all targets, written by hand: no pass makes kernels by this name."""
    line = next(line for line in str(engine.graph).splitlines() if "aten.add.Tensor" in line)
    call, type_ = line.partition("  #")[0].partition(" = ")[2], engine.graph.inputs[0].type
    dim = next(line.strip() for line in str(engine.graph).splitlines() if line.startswith("  dim "))
    text = str(engine.graph).replace(line, line.partition(" = ")[0] + " = " + BODY.format(dim=dim, type=type_))
    assert call == "extern aten.add.Tensor(self=x, other=y)"
    assert isinstance(type_, TensorType)
    count = dim_expr("*", *type_.shape)
    made = replace(ADD, scalars=(count,), grid=(blocks(count, 1024), 1, 1))
    graph = parse(text)
    table, _ = build_kernels(
        graph, (Target(75), *PORTABLE), lambda *_: [(Tactic("kernel", 1.0, {OWN: made}), iter(()))]
    )
    return replace(engine, graph=graph, kernels=table)


def profiles() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    return Added(), [(torch.randn(n, 8), torch.randn(n, 8)) for n in (1, 4, 32, 64)], None


def split() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    return nn.Linear(64, 32), [(torch.randn(4, 64),)], None


def as_kernel(engine: torch_rtx.Engine, name: str) -> tuple[Graph, Graph]:
    """The graph of an engine with its only call as a kernel, and the body of that."""
    (node,) = engine.graph.nodes
    names = {value.name: f"in{index}" for index, value in enumerate(node.inputs)}
    given = {value: Value(names[value.name], value.type) for value in node.inputs}
    outputs = tuple(value for value in node.outputs if value is not None)
    inner = replace(node, kind="op", args=node.map_inputs(lambda value: given[value]), loc=None)
    body = Graph("import", tuple(given.values()), nodes=(inner,), outputs=outputs)
    args = tuple((new.name, old) for old, new in given.items())
    return replace(engine.graph, nodes=(Node("kernel", name, args, outputs, body, node.loc),)), body


class Sums(nn.Module):
    """Rows that are added to those of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.table.index_add(0, rows, x)


def sums() -> tuple[nn.Module, list[tuple[Any, ...]], Any]:
    return Sums(), [(torch.randn(7, 8), torch.randint(0, 5, (7,))) for _ in range(2)], None


def with_sums(engine: torch_rtx.Engine) -> torch_rtx.Engine:
    """The engine with its call as a kernel that adds in memory."""
    graph, body = as_kernel(engine, "sums")
    target = Target(120)
    form = next(form for form in forms(body, "sums", target.arch) if OWN in form[0].kernels)
    table, _ = build_kernels(graph, [target], lambda *_: [form])
    return replace(engine, graph=graph, kernels=table)


def with_split(engine: torch_rtx.Engine) -> torch_rtx.Engine:
    """The engine with its layer as a kernel that has a split body."""
    graph, body = as_kernel(engine, "layer")
    target = Target(120)
    divided = split_in(body, "layer", 2)
    inside = {one.op: generate(one.body, one.op, target.arch, 0) for one in divided.nodes}  # type: ignore[arg-type]
    (own,) = (form for form in forms(body, "layer", target.arch) if OWN in form[0].kernels)
    split_form = Tactic("split", own[0].expected_us / 2, inside, divided), iter(())
    table, _ = build_kernels(graph, [target], lambda *_: [own, split_form])  # type: ignore[list-item]
    return replace(engine, graph=graph, kernels=table)


CASES = {
    "mlp": mlp,
    "conv_bn": conv_bn,
    "symbolic": symbolic,
    "kernel": kernel,
    "profiles": profiles,
    "cache": cache,
    "split": split,
    "onnx": onnx,
    "sums": sums,
}
# What a case is built for, if it is not its first call.
INPUTS = {
    "profiles": (
        torch_rtx.Input(profiles=[((1, 8), (2, 8), (4, 8)), ((32, 8), (64, 8), (64, 8))], shared_dims={0: "n"}),
    )
    * 2
}
WITH_WEIGHTS = frozenset(("mlp",))
CHANGES: dict[str, Callable[[torch_rtx.Engine], torch_rtx.Engine]] = {
    "kernel": with_kernel,
    "split": with_split,
    "sums": with_sums,
}


def tensors(tree: Any) -> list[torch.Tensor]:
    """The leaves of a call's arguments or results; numbers as tensors."""
    return [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(tree) if leaf is not None]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        torch.manual_seed(0)
        with torch.no_grad():
            model, calls, shapes = case()
            settings = torch_rtx.CompilationSettings(strip_weights=name not in WITH_WEIGHTS)
            module = torch_rtx.compile(model, INPUTS.get(name, calls[0]), dynamic_shapes=shapes, settings=settings)
            torch_rtx.save(CHANGES[name](module.engine) if name in CHANGES else module, folder / f"{name}.rtx")
            state = {} if name in WITH_WEIGHTS else {"weights": model.state_dict()}
            found = {
                f"{index}/{kind}/{position}": tensor.detach().contiguous().clone()
                for index, args in enumerate(calls)
                for kind, tree in (("in", args), ("out", model(*args)))
                for position, tensor in enumerate(tensors(tree))
            }
            for kind, content in {**state, "calls": found}.items():
                (folder / f"{name}.{kind}.safetensors").write_bytes(save(content))  # save_file's are the owner's alone


if __name__ == "__main__":
    write(FOLDER)
