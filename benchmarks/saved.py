"""What a training step saves for its backward, and the memory of both graphs, without running anything.

    python -m benchmarks.saved gpt2 --batch 8 --length 512 [--small] [--checkpoint] [--default] [--top 20]

Weights are traced as FakeTensors: on CUDA where there is a GPU, else on the CPU, whose attention and autocast differ a
little. `--default` takes PyTorch's own partition instead of `backend.rematerialization`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._functorch import config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks import models
from benchmarks.training import without_dropout
from torch_rtx.backend import capture, compiler
from torch_rtx.lowering.from_fx import Role
from torch_rtx.runtime.plan import Memory, Plan
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import PORTABLE

MIB = 2**20
Kind = tuple[str, str, tuple[int, ...]]  # operator, dtype and shape of a saved tensor


@dataclass
class Step:
    """A training step.

    Attributes:
        saved: the bytes of all saved tensors of a kind that are no inputs of the step.
        counts: how many there are of each kind.
        memories: of the forward and the backward, with generated kernels.
    """

    saved: Counter[Kind] = field(default_factory=Counter)
    counts: Counter[Kind] = field(default_factory=Counter)
    memories: list[Memory] = field(default_factory=list)


def traced(
    name: str, size: models.Size, batch: int, length: int | None = None, checkpointed: bool = False, own: bool = True
) -> Step:
    """The training step of a model of the zoo, under bfloat16 autocast and without dropout."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = without_dropout(models.without_weights(name, size, batch=batch)).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    args, kwargs = models.inputs(name, size, batch=batch, length=length)
    step, fakes = Step(), capture._FakeCopies(device)

    def forward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        context = TracingContext.get()
        assert context.fw_metadata is not None
        _add_saved(step, graph, context.fw_metadata.num_forward_returns)
        return backward(graph, inputs)

    def backward(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        step.memories.append(_memory(graph))
        return graph.forward

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture.capture(gm, inputs, forward, forward, backward)

    partition = capture.partition if own else min_cut_rematerialization_partition
    torch._dynamo.reset()
    with fakes.swapped_into(model), fakes.mode, patch.object(capture, "partition", partition):
        given = torch.utils._pytree.tree_map_only(torch.Tensor, fakes.get, (args, kwargs))
        with torch.autocast(device.type, torch.bfloat16), config.patch(force_non_lazy_backward_lowering=True):
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*given[0], **given[1])
    return step


def _add_saved(step: Step, graph: fx.GraphModule, results: int) -> None:
    seen: set[StorageWeakRef] = set()
    saved: Any = graph.graph.output_node().args[0]
    for node in saved[results:]:
        value = node.meta.get("val") if node.op == "call_function" else None
        memory = StorageWeakRef(value.untyped_storage()) if isinstance(value, torch.Tensor) else None
        if not isinstance(value, torch.Tensor) or memory is None or memory in seen:
            continue
        seen.add(memory)
        nbytes = value.untyped_storage().nbytes()
        if isinstance(nbytes, int):  # the state of a generator has a size of its own
            kind = str(node.target).removeprefix("aten."), str(value.dtype).removeprefix("torch."), tuple(value.shape)
            step.saved[kind] += nbytes
            step.counts[kind] += 1


def _memory(graph: fx.GraphModule) -> Memory:
    """The memory of a static graph where it has kernels."""
    roles = [Role("input", node.name) for node in graph.graph.find_nodes(op="placeholder")]
    with unset_fake_temporarily(), patch.object(compiler, "formed_for", lambda *_: PORTABLE):
        lowered = compiler.compile_fx(graph, roles, CompilationSettings()).program.graph
    called = frozenset(node.op for node in lowered.nodes if node.kind == "fallback")
    return Plan(lowered, called, frozenset()).memory({})


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the step of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models.names())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int)
    parser.add_argument("--top", type=int, default=20)
    for flag in ("small", "checkpoint", "default"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args(arguments)
    size: models.Size = "small" if given.small else "full"
    step = traced(given.model, size, given.batch, given.length, given.checkpoint, not given.default)
    for kind, nbytes in step.saved.most_common(given.top):
        print(f"{nbytes / MIB:10.1f} MiB in {step.counts[kind]:3}: {kind[0]} {kind[1]}{list(kind[2])}")
    print(f"{step.saved.total() / MIB:10.1f} MiB saved in {step.counts.total()} tensors")
    for what, memory in zip(("forward", "backward"), step.memories, strict=True):
        print(f"{memory.arena / MIB:10.1f} MiB arena and {memory.others / MIB:.1f} MiB of results in the {what}")


if __name__ == "__main__":
    main()
