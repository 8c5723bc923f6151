"""One small model through every stage of torch_rtx, each called by hand and its artifact printed.

    python examples/by_hand.py

`torch_rtx.compile`, `save` and `load` are these calls in this order; docs/architecture.md explains the stages.
The model is small enough to read what each of them makes of it: a batch norm to fold, two linear layers to merge, a
view, and an operator that is made to fall back.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.export.graph_signature import InputKind

import torch_rtx
from torch_rtx import aten
from torch_rtx.backend.capture import capture_export
from torch_rtx.backend.partition import partition
from torch_rtx.engine import Engine, Manifest
from torch_rtx.engine import load as load_engine
from torch_rtx.engine import save as save_engine
from torch_rtx.inspection import inspect
from torch_rtx.ir import Graph, verify
from torch_rtx.lowering.from_fx import Role, from_fx
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.pipeline import PIPELINE, Context
from torch_rtx.lowering.support import unsupported_reason
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import CompilationSettings, RuntimeSettings
from torch_rtx.targets import PORTABLE

warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)  # torch.export's own
CPU = torch.device("cpu")


class Small(nn.Module):
    """Convolution, batch norm, GELU, then the product of two linear layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.left = nn.Linear(36, 5)
        self.right = nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.gelu(self.norm(self.conv(x))).flatten(1)
        return 1 - torch.tanh(self.left(h) * self.right(h))


def title(text: str) -> None:
    print(f"\n==== {text} ".ljust(120, "="))


def capture(model: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    """Stage 1: the model as a functional ATen graph, the batch size left open."""
    program = capture_export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}})
    title("1. capture: an FX graph of ATen calls")
    print(program.graph_module.print_readable(print_output=False).strip())
    return program


def import_graph(program: torch.export.ExportedProgram) -> Graph:
    """Stages 2 and 3: what stays in PyTorch, and the graph in the IR."""
    symbols = Symbols(CPU, program.range_constraints)
    settings = CompilationSettings(torch_executed_ops=frozenset(["aten.tanh"]))
    parts = partition(program.graph_module, lambda node: unsupported_reason(node, symbols), settings)
    title("2. partition: blocks of the engine, and fallbacks with their reasons")
    print("blocks:", ", ".join(f"{len(block)} nodes" for block in parts.blocks))
    for node, reason in parts.fallbacks.items():
        print(f"fallback: {node.target}: {reason}")

    kinds = {InputKind.USER_INPUT: "input"}
    roles = [Role(kinds.get(s.kind, "parameter"), s.target or s.arg.name) for s in program.graph_signature.input_specs]
    graph = from_fx(program.graph_module, roles, parts.fallbacks, symbols).graph
    verify(graph, aten.ALLOWED)
    title("3. import: level `import` of the IR")
    print(graph, end="")
    return graph


def lower(graph: Graph) -> Graph:
    """Stage 4: the passes, one by one."""
    infer, context = Inference(), Context(CompilationSettings(), PORTABLE)
    title("4. passes")
    for step in PIPELINE:
        after = step(graph, infer, context)
        change = f"{len(graph.nodes)} -> {len(after.nodes)} nodes" if after != graph else "nothing to do"
        purpose = (sys.modules[step.run.__module__].__doc__ or "").splitlines()[0]
        print(f"{step.name:16} {change:16} {purpose}")
        graph = after
    title("   level `fused`: computed weights have recipes")
    print(graph, end="")
    return graph


def to_file(graph: Graph, path: Path) -> Engine:
    """Stage 5: a weight-stripped engine, on disk and back."""
    save_engine(Engine(graph, Manifest(device="cpu", inputs=("x",)), constants={}, weights=None), path)
    title("5. engine file")
    print(inspect(path))
    return load_engine(path)


def run(engine: Engine, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Stages 6 and 7: weights by their recipes, and a session that runs the graph's code."""
    store = WeightStore(engine.graph, CPU, engine.constants)
    store.refit(needed(engine, model))
    title("6. weights: what the recipes made of the parameters")
    for weight, value in zip(store.weights, store.values, strict=True):
        made = "computed" if weight.recipe else "as it is"
        print(f"{weight.value.name:4} {made:8} {list(value.shape)} from {', '.join(weight.names)}")

    title("7. session: the code that it runs, written for this graph")
    print(compile_graph(engine.graph, CPU).source, end="")
    (result,) = Session(engine.graph, store, RuntimeSettings())([x])
    assert isinstance(result, torch.Tensor)
    return result


def needed(engine: Engine, model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors that the engine needs. (`Manifest.unused_names` lists the others for `CompiledModule`.)"""
    state = model.state_dict()
    return {parameter.name: state[parameter.name] for parameter in engine.graph.parameters}


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(2, 3, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        engine = to_file(lower(import_graph(capture(model, x))), Path(folder) / "small.rtx")
        x = torch.randn(7, 3, 8, 8)  # another batch size
        difference = (run(engine, model, x) - model(x)).abs().max().item()
    title("8. against eager")
    print(f"torch_rtx {torch_rtx.__version__}: largest difference {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
