"""One trial: a file is loaded and called, in a process that may not survive it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.utils import _pytree as pytree

import torch_rtx
from tests.fuzz import guard
from torch_rtx import aten
from torch_rtx.dtypes import PACKED
from torch_rtx.errors import RtxError
from torch_rtx.ir import Graph, Sym, TensorType, Type, dim_syms, evaluate, type_dims
from torch_rtx.runtime.module import CompiledModule
from torch_rtx.settings import RuntimeSettings

MAX_INPUT = 1 << 20  # elements; larger inputs are not made
LARGE = 64 << 10  # bytes of a file, whose many nodes would take long with guarded memory or large inputs
MAX_BYTES = 64 << 20  # of the types in a graph: below, running out of memory is a fault of the reader
UNCOMPILED = RuntimeSettings(specialization_strategy="none", cuda_graph_strategy="disabled")
HOSTILE_INTS = (0, 1, -1, 2, 5, 127, -128, 1000, 10**6, -(10**6), 2**31 - 1, -(2**31), 2**33, 2**40, -(2**40), 2**62)
HOSTILE_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-40, 3e9)


class Bug(Exception):
    """What must not happen, in a few words that are equal for equal faults.

    Args:
        detail: more about this one.
    """

    def __init__(self, what: str, detail: object = "") -> None:
        super().__init__(what)
        self.detail = str(detail)[:200]


class Lost(Exception):
    """The GPU can't be used by this process any more, after an assertion of a kernel for instance."""


def trial(path: str, rng: Random, say: Callable[[str], None], device: str = "cpu", binaries: bool = False) -> str:
    """Load the file `path` and call it. Returns how it ended: `refused`, `failed` (at the call), `ran`, `skipped`.

    Args:
        say: told what is done next.
        device: where to run it.
        binaries: launch the kernels in it.

    Raises:
        Bug: the file wrote elsewhere, its results depend on memory that is not its own, or an error has no type of
            ours.
    """
    say("inspect")
    if rng.random() < 0.1:
        typed(lambda: str(torch_rtx.inspect(path)), "inspect")
    say("load")
    large = Path(path).stat().st_size > LARGE
    guard.fill(guard.OFF if large else 0x7F)
    seed = rng.getrandbits(32)
    module = typed(lambda: _loaded(path, Random(seed), device, binaries), "load")
    if module is None:
        return "refused"
    graph = module.engine.graph

    def inputs() -> list[Any] | None:
        return _inputs(graph, Random(seed), module.device, 64 if large else MAX_INPUT)

    if (given := inputs()) is None:
        return "skipped"
    say("call")
    first = typed(lambda: _call(module, given), "call", graph)
    if first is None:
        return "failed"
    if large or graph.written or any(aten.is_random(aten.overload(name)) for name in _ops(graph)):
        return "ran"
    guard.fill(0x35)
    if rng.random() < 0.3:
        module = typed(lambda: _loaded(path, Random(seed), device, binaries), "load")
    second = typed(lambda: _call(module, inputs()), "call", graph)
    if guard.active() and second != first:
        raise Bug("call: uninitialised memory in a result")
    return "ran"


def typed(action: Callable[[], Any], phase: str, graph: Graph | None = None) -> Any:
    """The result of an action; None: an error of ours."""
    try:
        return action()
    except Exception as error:
        starved = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if starved and graph is not None and _bytes(graph) > MAX_BYTES:
            return None  # it says that it needs this much
        if "CUDA error" in f"{error} {error.__cause__}":
            raise Lost from None
        if isinstance(error, RtxError) and not starved:
            return None
        raise Bug(f"{phase}: {type(error).__name__} at {_where(error)}", error) from None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "/torch_rtx/" in frame.filename] or frames
    return f"{Path(inside[-1].filename).name}:{inside[-1].lineno}"


def _ops(graph: Graph) -> set[str]:
    nodes = [*graph.nodes, *(node for weight in graph.weights if weight.recipe for node in weight.recipe.nodes)]
    inner = [node.body for node in nodes if node.body is not None]
    own = {node.op for node in nodes if node.kind in ("op", "extern", "view")}
    return own.union(*map(_ops, inner)) if inner else own


def _bytes(graph: Graph) -> float:
    """The bytes of the results of all nodes, by their types, where these say so."""
    total = 0.0
    for node in graph.nodes:
        total += 0 if node.body is None else _bytes(node.body)
        for value in node.results:
            if isinstance(value.type, TensorType):
                dims = value.type.shape, value.type.strides
                shape, strides = ([dim if isinstance(dim, int) else 64 for dim in one] for one in dims)
                total += 16.0 * aten.extent(shape, strides)  # from the first to the last element
    return total


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _loaded(path: str, rng: Random, device: str, binaries: bool) -> CompiledModule:
    module = torch_rtx.load(path, device=device, settings=UNCOMPILED, trust_binaries=binaries)
    parameters = module._store.parameters
    if module.engine.weights is None and parameters:
        made = {p.name: tensor_of(p.type, {}, rng, module.device) for p in parameters}
        if None in made.values():
            raise RtxError("weights that are too large")
        module.attach(made)
    return module


def _call(module: CompiledModule, inputs: list[Any]) -> list[Any]:
    """The results as bytes and numbers."""
    torch.manual_seed(0)
    signature = module._signature
    leaves = [inputs[leaf] if isinstance(leaf, int) else leaf.value for leaf in signature.leaves]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    results = pytree.tree_leaves(module(*args, **kwargs))
    return [_content(result) for result in results]


def _content(result: Any) -> Any:
    if not isinstance(result, torch.Tensor):
        return repr(result)
    plain = result.detach().resolve_conj().resolve_neg()
    if plain.numel() > MAX_INPUT:  # of a few elements, if it has this many: the ends are enough
        plain = plain.flatten()[[0, -1]] if plain.is_contiguous() else plain[(..., *[slice(0, 2)] * plain.dim())]
    flat = plain.cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    return tuple(plain.shape), flat.view(torch.uint8).numpy().tobytes()


def _inputs(graph: Graph, rng: Random, device: torch.device, most: int = MAX_INPUT) -> list[Any] | None:
    """Values of the types of the inputs, some of them hostile; None if they are too large.

    Args:
        most: the largest size where sizes vary.
    """
    sizes: dict[str, int] = {}
    for value in graph.inputs:
        for sym in (sym for dim in type_dims(value.type) for sym in dim_syms(dim)):
            sizes.setdefault(sym.name, size_of(sym, rng, most))
    found = [value_of(value.type, sizes, rng, device) for value in graph.inputs]
    return None if any(one is None for one in found) else found


def size_of(sym: Sym, rng: Random, most: int = MAX_INPUT) -> int:
    """A size within the range of a symbol, if that has any up to `most`."""
    high = most if sym.max is None else min(sym.max, most)
    wanted = rng.choice((sym.min, sym.min + 1, 3, 4, 8, high)) // sym.multiple * sym.multiple
    return wanted if sym.min <= wanted <= high else -(-sym.min // sym.multiple) * sym.multiple


def value_of(type_: Type, sizes: dict[str, int], rng: Random, device: torch.device) -> Any:
    """A value of a type; None if it would be too large."""
    if isinstance(type_, TensorType):
        return tensor_of(type_, sizes, rng, device)
    if type_.dim is not None:
        return evaluate(type_.dim, sizes)
    if type_.kind == "bool":
        return rng.random() < 0.5
    return rng.choice(HOSTILE_INTS if type_.kind == "int" else HOSTILE_FLOATS)


def tensor_of(type_: TensorType, sizes: dict[str, int], rng: Random, device: torch.device) -> torch.Tensor | None:
    """The same for a type of tensors."""
    try:
        shape = [evaluate(dim, sizes) for dim in type_.shape]
    except ZeroDivisionError:
        return None
    if any(size is None or not 0 <= size <= MAX_INPUT for size in shape) or type_.dtype not in aten.DTYPES:
        return None
    numbers = [int(size or 0) for size in shape]
    if math.prod(numbers) > MAX_INPUT:
        return None
    return values(aten.DTYPES[type_.dtype], numbers, rng).to(device)


def values(dtype: torch.dtype, shape: list[int], rng: Random) -> torch.Tensor:
    """A tensor: small numbers, or hostile ones, or both."""
    if dtype == aten.DTYPES[PACKED]:  # PyTorch makes none of numbers
        return values(torch.uint8, shape, rng).view(dtype)
    count = math.prod(shape)
    share = rng.choice((0.0, 0.0, 0.3, 1.0))
    few = [rng.random() < share for _ in range(min(count, 64))]
    if dtype == torch.bool:
        numbers: list[Any] = [rng.random() < 0.5 for _ in few]
    elif dtype.is_floating_point or dtype.is_complex:
        draw = rng.choice((rng.random, rng.normalvariate))
        numbers = [rng.choice(HOSTILE_FLOATS) if bad else draw() for bad in few]
    else:
        info = torch.iinfo(dtype)
        numbers = [rng.choice(HOSTILE_INTS) if bad else rng.randrange(3) for bad in few]
        numbers = [min(max(number, info.min), info.max) for number in numbers]
    wide = torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype
    made = torch.tensor(numbers, dtype=wide)
    if count > len(few):
        made = made.repeat(-(-count // len(few)))[:count]
    return made.reshape(shape).to(dtype)
