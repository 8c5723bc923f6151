"""Control flow inside of a CUDA graph: conditional nodes, whose bodies the device runs by itself (driver 12.4).

Code that is captured runs each body once, into the graph of a conditional node. A kernel tells the node what a tensor
says; in a loop it is the last node of the body, too. State stays where it is: a pass copies what it makes to there.
Bodies are recorded on streams of their own. What they allocate lies in a pool of memory that lives as long as the
graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from torch_rtx.runtime.driver import checked, context_of, driver, new_stream, newest, relaxed

_OLDEST = 12040  # the driver whose conditional nodes have bodies of any nodes
_IF, _WHILE = "CU_GRAPH_COND_TYPE_IF", "CU_GRAPH_COND_TYPE_WHILE"
# Sets what a conditional node asks for to a truth value, or to its negation. The driver has the function.
PTX = """
.version 6.3
.target sm_75
.address_size 64
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.visible .entry tell(.param .u64 handle, .param .u64 truth, .param .u32 negated)
{
  .reg .b32 %value, %negated;
  .reg .b64 %handle, %truth;
  .param .b64 first;
  .param .b32 second;
  ld.param.u64 %handle, [handle];
  ld.param.u64 %truth, [truth];
  ld.param.u32 %negated, [negated];
  cvta.to.global.u64 %truth, %truth;
  ld.global.u8 %value, [%truth];
  xor.b32 %value, %value, %negated;
  st.param.b64 [first], %handle;
  st.param.b32 [second], %value;
  call.uni cudaGraphSetConditional, (first, second);
  ret;
}
"""
Body = Callable[..., list[Any]]  # `run(inputs, weights)` of code


@dataclass
class Recording:
    """A capture that may meet control flow.

    Attributes:
        pools: what must live as long as the graph.
        inside: a body is being recorded, and allocates in the last of them.
        bodies: the graphs of the conditional nodes.
    """

    pools: list[Any] = field(default_factory=list)
    inside: bool = False
    bodies: list[Any] = field(default_factory=list)


_RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)


@cache
def has_conditional_nodes() -> bool:
    """Whether the driver and its bindings have them, and PyTorch pools of memory."""
    cuda = driver()
    if cuda is None or not hasattr(cuda, "cuStreamBeginCaptureToGraph") or not hasattr(torch.cuda, "use_mem_pool"):
        return False
    return bool(checked(cuda.cuDriverGetVersion()) >= _OLDEST)


@contextmanager
def recording() -> Iterator[Recording]:
    """A time in which control flow on the device may be captured."""
    made = Recording()
    token = _RECORDING.set(made)
    try:
        yield made
    finally:
        _RECORDING.reset(token)


def records(value: Any) -> bool:
    """Whether control flow that asks `value` is being captured."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda or _RECORDING.get() is None:
        return False
    return torch.cuda.is_current_stream_capturing()


def condition(then: Body, otherwise: Body, pred: torch.Tensor, operands: list[Any]) -> list[Any]:
    """Records a condition. Both branches leave their results in the memory of the first. The second one writes there,
    so that it is that of no operand, and of no other result, and that of one element alone."""
    results: list[Any] = []
    taken = {value.untyped_storage().data_ptr() for value in operands if isinstance(value, torch.Tensor)}

    def first() -> None:
        for value in then(operands, ()):
            is_shared = value.untyped_storage().data_ptr() in taken or _is_expanded(value)
            own = value.clone() if is_shared else value
            taken.add(own.untyped_storage().data_ptr())
            results.append(own)

    with _pool(pred.device):
        _record(_IF, pred, False, first)
        _record(_IF, pred, True, lambda: _copy(otherwise(operands, ()), results))
    return results


def _is_expanded(value: torch.Tensor) -> bool:
    """Several elements lie at one place."""
    return any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))


def loop(body: Body, state: list[Any], operands: list[Any]) -> list[Any]:
    """Records a loop."""
    kept = [value.clone() for value in state]
    with _pool(kept[0].device):
        _record(_WHILE, kept[0], False, lambda: _copy(body([*kept, *operands], ()), kept))
    return kept


def _copy(sources: list[Any], targets: list[Any]) -> None:
    """Copy all at once: a source that lies in a target is read before it is overwritten."""
    moved = [(t, s) for t, s in zip(targets, sources, strict=True) if s.data_ptr() != t.data_ptr()]  # or written there
    overwritten = {target.untyped_storage().data_ptr() for target, _ in moved}
    read = [s.clone() if s.untyped_storage().data_ptr() in overwritten else s for _, s in moved]
    for (target, _), source in zip(moved, read, strict=True):
        target.copy_(source)


@contextmanager
def _pool(device: torch.device) -> Iterator[None]:
    """Where bodies allocate."""
    now = _RECORDING.get()
    assert now is not None  # `records` is true
    if now.inside:
        yield
        return
    now.pools.append(torch.cuda.MemPool())
    now.inside = True
    try:
        with torch.cuda.use_mem_pool(now.pools[-1], device):
            yield
    finally:
        now.inside = False


def _record(kind: str, truth: torch.Tensor, negated: bool, body: Callable[[], None]) -> None:
    """Record a conditional node that depends on `truth`, and what `body` does as its body."""
    cuda, outer = driver(), torch.cuda.current_stream(truth.device)
    stream = cuda.CUstream(outer.cuda_stream)
    context = checked(cuda.cuCtxGetCurrent())
    graph, _ = _captured(cuda, stream)
    handle = checked(cuda.cuGraphConditionalHandleCreate(graph, context, 0, 0))
    _tell(cuda, handle, truth, negated, stream)
    graph, before = _captured(cuda, stream)
    params = cuda.CUgraphNodeParams()
    params.type = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    params.conditional.handle, params.conditional.ctx = handle, context
    params.conditional.type, params.conditional.size = getattr(cuda.CUgraphConditionalNodeType, kind), 1
    edges = [cuda.CUgraphEdgeData() for _ in before]  # plain ones: cuda-bindings refuse fewer than nodes
    node = checked(newest(cuda, "cuGraphAddNode")(graph, before, edges, len(before), params))
    replaces = cuda.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
    checked(newest(cuda, "cuStreamUpdateCaptureDependencies")(stream, [node], None, 1, replaces))
    recorded = params.conditional.phGraph_out[0]
    with relaxed():  # a branch that has not run yet may load code
        inner = new_stream(truth.device)
        stream = cuda.CUstream(inner.cuda_stream)
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        checked(cuda.cuStreamBeginCaptureToGraph(stream, recorded, None, None, 0, mode))
        try:
            with torch.cuda.stream(inner):
                body()
                if kind == _WHILE:
                    _tell(cuda, handle, truth, negated, stream)
        finally:
            ended = cuda.cuStreamEndCapture(stream)
        checked(ended)
    now = _RECORDING.get()
    assert now is not None
    now.bodies.append(recorded)


def _captured(cuda: Any, stream: Any) -> tuple[Any, list[Any]]:
    """The graph into which a stream is captured, and the nodes on which the next one will depend."""
    status, _, _, graph, before, *_, count = cuda.cuStreamGetCaptureInfo(stream)
    checked((status,))
    return graph, list(before or ())[: int(count)]


def _tell(cuda: Any, handle: Any, truth: torch.Tensor, negated: bool, stream: Any) -> None:
    values = ctypes.c_uint64(int(handle)), ctypes.c_uint64(truth.data_ptr()), ctypes.c_uint32(negated)
    places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    kernel = _kernel(truth.device.index)
    checked(cuda.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, stream, ctypes.addressof(places), 0))


@cache
def _kernel(index: int) -> Any:
    """The kernel, loaded for good."""
    cuda = driver()
    checked(cuda.cuCtxPushCurrent(context_of(cuda, index)))
    try:
        with relaxed():
            module = checked(cuda.cuModuleLoadData(PTX.encode() + b"\0"))
            return checked(cuda.cuModuleGetFunction(module, b"tell"))
    finally:
        checked(cuda.cuCtxPopCurrent())
