"""Where the memory of a training step goes: what it saves for its backward, and what both graphs need, without running
anything.

    python -m benchmarks.saved gpt2 --batch 8 --length 512 [--small] [--checkpoint] [--default]
        [--channels-last] [--top 20]

Weights are traced as FakeTensors: on CUDA where there is a GPU, else on the CPU, whose attention and autocast differ a
little. `--default` takes PyTorch's own partition instead of `backend.rematerialization`.

The table is of a step with AdamW under CUDA graphs, in which kernels are launched wherever there are some. The peak is
that of the optimizer's step, when all gradients are there, or of the backward. Not in it: workspaces of libraries (one
of cuBLAS, 32 MiB on sm_90) and what the allocator loses to rounding.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from benchmarks.training import labelled, learner
from torch_rtx.backend import capture, compiler, entry
from torch_rtx.backend.training import TrainingStep
from torch_rtx.backend.undefined_gradients import without
from torch_rtx.ir import Graph, TensorType, Value, attr_values
from torch_rtx.lowering.from_fx import Role
from torch_rtx.runtime.plan import Memory, Plan, Room, in_arena, size_of
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
        trained, frozen: bytes of the parameters.
        memories: of the forward and the backward, with generated kernels, if they share nothing.
        rows: where the memory of a step with AdamW is, with its peak at the end, in bytes.
    """

    saved: Counter[Kind] = field(default_factory=Counter)
    counts: Counter[Kind] = field(default_factory=Counter)
    trained: int = 0
    frozen: int = 0
    memories: list[Memory] = field(default_factory=list)
    rows: list[tuple[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Lowered:
    """A graph of the trace, with kernels where it can have some, and its program."""

    traced: fx.GraphModule
    graph: Graph

    @classmethod
    def of(cls, graph: fx.GraphModule) -> Lowered:
        """Lower `graph`."""
        roles = [Role("input", node.name) for node in graph.graph.find_nodes(op="placeholder")]
        with unset_fake_temporarily(), patch.object(compiler, "formed_for", lambda *_: PORTABLE):
            return cls(graph, compiler.compile_fx(graph, roles, CompilationSettings()).program.graph)

    def plan(self, stay: Collection[str] = (), room: Room | None = None) -> Plan:
        """Its memory, see `Plan`."""
        called = frozenset(node.op for node in self.graph.nodes if node.kind == "fallback")
        return Plan(self.graph, called, frozenset(), stay=frozenset(stay), room=room, cudnn=True)

    @cached_property
    def _owners(self) -> dict[str, str]:
        return self.plan().owners

    def owner(self, name: str) -> str:
        """The value in whose memory a value lies."""
        return self._owners.get(name, name)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """The bytes of the memory of these values, by the name of the value that owns it; none of inputs."""
        types = {value.name: value.type for node in self.graph.nodes for value in node.results}
        owners = {self.owner(name) for name in names}
        found = {name: size_of(type_) for name in owners if isinstance(type_ := types.get(name), TensorType)}
        return {name: size for name, size in found.items() if isinstance(size, int)}


def planned(step: Step, forward: Lowered, backward: Lowered, staying: Collection[int]) -> None:
    """Fill in the memory of `step`, whose forward leaves the results at the positions `staying` where they are."""
    step.memories = [forward.plan().memory({}), backward.plan().memory({})]
    traced: Any = forward.traced.graph.output_node().args[0]
    values = {i: value for i, value in enumerate(forward.graph.outputs) if i in staying and isinstance(value, Value)}
    plan = forward.plan([value.name for value in values.values()])
    saved = forward.sizes(value.name for value in values.values())
    total, *offsets = plan.offsets()
    starts = dict(zip(plan.index, offsets, strict=True))
    readers = defaultdict[str, set[str]](set)
    inputs = zip(backward.traced.graph.find_nodes(op="placeholder"), backward.graph.inputs, strict=True)
    read = {node.name: value.name for node, value in inputs}
    for index, value in values.items():
        if traced[index].name in read:
            readers[forward.owner(value.name)].add(read[traced[index].name])
    others = forward.sizes(value.name for value in attr_values(forward.graph.outputs) if value not in values.values())
    inside = {name: starts[name] for name in saved if name in starts}
    parts = [(start, start + saved[name], frozenset(readers[name])) for name, start in inside.items()]
    after = backward.plan(room=Room(total, parts))
    gradients = backward.sizes(value.name for value in backward.graph.outputs if isinstance(value, Value))
    over = sum(size for name, size in gradients.items() if name in after.placed)
    beside = sum(gradients.values()) - over
    # A gradient that a library call has computed is copied to its place.
    planable = {v.name for node in backward.graph.nodes for v in node.results if in_arena(node, v.type, cudnn=True)}
    direct = sum(size for name, size in gradients.items() if name in planable) - over
    rows = [
        ("parameters", step.trained + step.frozen),
        ("states of AdamW", 2 * step.trained),
        ("arena of the forward, with what it saves", total),
        ("saved by library calls", sum(size for name, size in saved.items() if name not in inside)),
        ("results of the forward", sum(size for name, size in others.items() if name not in inside)),
        ("arena of the backward, beside that of the forward", after.memory({}).arena),
        ("gradients, beside those over what was saved", beside),
        ("results of library calls in the backward", max(0, after.memory({}).others - direct)),
    ]
    apart = [*(memory.arena for memory in step.memories), step.memories[0].others, step.memories[1].others]
    step.rows = [
        *rows,
        ("peak", sum(size for _, size in rows)),
        ("peak if forward and backward shared nothing", step.frozen + 3 * step.trained + sum(apart)),
        ("(gradients over what was saved)", over),
    ]


def traced(
    name: str,
    size: models.Size,
    batch: int,
    length: int | None = None,
    checkpointed: bool = False,
    own: bool = True,
    channels_last: bool = False,
) -> Step:
    """The training step of a model of the zoo, under bfloat16 autocast and without dropout."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = learner(name, models.without_weights(name, size, batch=batch))
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    args, kwargs = labelled(model, models.inputs(name, size, batch=batch, length=length), 0)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        args = tuple(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in args)
    step, fakes = Step(), capture._FakeCopies(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            step.trained += parameter.nbytes
        else:
            step.frozen += parameter.nbytes
    graphs: list[tuple[Lowered, Collection[int]]] = []

    def forward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        context = TracingContext.get()
        assert context.fw_metadata is not None
        results = context.fw_metadata.num_forward_returns
        _add_saved(step, graph, results)
        _, staying = TrainingStep().forward(graph, entry.static_inputs(graph))
        graphs.append((Lowered.of(graph), staying))
        return graph.forward

    def backward(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        (before, staying), *_ = graphs
        planned(step, before, Lowered.of(without(graph, ())), staying)
        return graph.forward

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture.capture(gm, inputs, forward, forward, backward, CompilationSettings().logits_chunk_bytes)

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the step of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models.names())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int)
    parser.add_argument("--top", type=int, default=20)
    for flag in ("small", "checkpoint", "default", "channels-last"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args(arguments)
    size: models.Size = "small" if given.small else "full"
    step = traced(
        given.model, size, given.batch, given.length, given.checkpoint, not given.default, given.channels_last
    )
    for kind, nbytes in step.saved.most_common(given.top):
        print(f"{nbytes / MIB:10.1f} MiB in {step.counts[kind]:3}: {kind[0]} {kind[1]}{list(kind[2])}")
    print(f"{step.saved.total() / MIB:10.1f} MiB saved in {step.counts.total()} tensors")
    for what, nbytes in step.rows:
        print(f"{nbytes / MIB:10.1f} MiB {what}")


if __name__ == "__main__":
    main()
