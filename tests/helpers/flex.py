"""What tests of `flex_attention` share: functions that modify scores, and the body of a kernel for a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torch_rtx.ir import Graph
from torch_rtx.lowering.flex_calls import name_flex_attention
from torch_rtx.lowering.from_fx import Role, from_fx
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.op_work import FLEX
from torch_rtx.runtime.code import compile_graph

Function = Callable[..., Tensor]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < 17)


def document(ids: Tensor) -> Function:
    """A query sees the keys of its own document."""
    return lambda b, h, q, k: ids[b, q] == ids[b][k]


def alibi(slopes: Tensor) -> Function:
    return lambda score, b, h, q, k: score + (k - q) * slopes.exp()[h]


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 2 * torch.tanh(score / 2)


def relative(bias: Tensor) -> Function:
    """A bias by head and distance, of at most half as many keys as `bias` has columns."""
    return lambda score, b, h, q, k: score + bias[h, q - k + bias.shape[1] // 2]


def shifted(bias: Tensor) -> Function:
    """A bias by head, query and key."""
    return lambda score, b, h, q, k: score + bias[h, q, k]


@dataclass
class Call:
    """A call of `flex_attention`, and its sizes: batch, heads, heads of keys, queries, keys, width."""

    score_mod: Function | None = None
    mask_mod: Function | None = None
    sizes: tuple[int, ...] = (2, 4, 4, 40, 40, 16)
    block: int = 32
    dtype: torch.dtype = torch.float16
    statistics: bool = False

    def operands(self) -> list[Tensor]:
        """Query, key and value."""
        torch.manual_seed(0)
        batch, heads, shared, queries, keys, width = self.sizes
        found = (heads, queries), (shared, keys), (shared, keys)
        return [torch.randn(batch, number, length, width).to(self.dtype) for number, length in found]

    def mask(self) -> BlockMask | None:
        batch, _, _, queries, keys, _ = self.sizes
        if self.mask_mod is None:
            return None
        return create_block_mask(self.mask_mod, batch, None, queries, keys, device="cpu", BLOCK_SIZE=self.block)

    def function(self) -> Callable[..., Any]:
        """The call, as a function of query, key and value."""
        mask = self.mask()
        options: dict[str, Any] = {"score_mod": self.score_mod, "block_mask": mask, "enable_gqa": True}
        return lambda *given: flex_attention(*given, **options, return_lse=self.statistics)


@contextmanager
def uncompiled() -> Iterator[None]:
    """PyTorch's own function does not trace itself, which takes a second."""
    before = module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


def captured(function: Callable[..., Any], *given: Tensor) -> tuple[Graph, Sequence[Tensor]]:
    """The call in a function, and what comes after it, as the body of a kernel; and the tensors that it gets."""
    with torch.no_grad():
        ((graph, tensors),) = _graphs(function, *given)
    return from_call(graph, tensors, FLEX, after=True)


def gradients(call: Call) -> tuple[list[Tensor], Graph, Sequence[Tensor]]:
    """Query, key, value and what the gradient of the sum of a call's results times numbers is, as a graph with the
    tensors that it gets."""
    operands = [one.requires_grad_() for one in call.operands()]
    function, found = call.function(), list[tuple[Graph, Sequence[Tensor]]]()
    validate, module._validate_device = module._validate_device, lambda *_: None  # PyTorch trains on GPUs alone
    try:
        found = _graphs(lambda *given: weighted(function(*given)), *operands)
    finally:
        module._validate_device = validate
    return [one.detach() for one in operands], *found[1]


def weighted(results: Any) -> Tensor:
    """A number that depends on all results; rows without keys have a statistic that it leaves out."""
    listed = results if isinstance(results, tuple) else (results,)
    return sum((torch.where(one.isinf(), 0, one).double() * _factors(one)).sum() for one in listed)  # type: ignore[return-value]


def _factors(like: Tensor) -> Tensor:
    return torch.arange(like.numel(), dtype=torch.float64).view(like.shape).cos()


def _graphs(function: Callable[..., Any], *given: Tensor) -> list[tuple[Graph, Sequence[Tensor]]]:
    """The graphs of a function, and of its gradient if it has one, and the tensors that they get."""
    found: list[tuple[Graph, Sequence[Tensor]]] = []

    def compiler(gm: fx.GraphModule, _: Any) -> Any:
        name_flex_attention(gm)
        roles = [Role("input", node.name) for node in gm.graph.find_nodes(op="placeholder")]
        graph = from_fx(gm, roles, {}, Symbols(torch.device("cpu"))).graph

        def run(*tensors: Tensor) -> Any:
            found.append((graph, tensors))
            return gm(*tensors)

        return run

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    result = torch.compile(function, backend=backend, fullgraph=True)(*given)
    if isinstance(result, Tensor) and result.requires_grad:
        result.backward()
    return found


def from_call(graph: Graph, tensors: Sequence[Tensor], op: str, after: bool = False) -> tuple[Graph, Sequence[Tensor]]:
    """The call of `op` in a graph as a body, and the tensors that it gets; also what comes `after` it."""
    at = next(index for index, node in enumerate(graph.nodes) if node.op == op)
    before, body = graph.nodes[:at], graph.nodes[at:] if after else graph.nodes[at : at + 1]
    made = {value.name for node in body for value in node.results}
    read = [*dict.fromkeys(value for node in body for value in node.inputs if value.name not in made)]
    values = compile_graph(Graph("import", graph.inputs, nodes=before, outputs=tuple(read)), torch.device("cpu"))
    outputs = graph.outputs if after else body[0].results
    return Graph("import", tuple(read), nodes=body, outputs=outputs), values(tensors, ())
