"""A session: one engine with its weights on one device, called with a flat list of inputs.

Calls check the inputs against the graph's types and ranges (once per combination that is met), bring computed weights
up to date, and run the reference tier, on CUDA as one CUDA graph per input shape.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.errors import InputError
from torch_rtx.ir import DIM_OPS, Dim, Expr, Graph, ScalarType, Sym, TensorType, Value
from torch_rtx.runtime.cudagraph import GraphPool, why_not
from torch_rtx.runtime.launch import Launcher
from torch_rtx.runtime.plan import Memory
from torch_rtx.runtime.reference import compile_graph
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings

log = logging.getLogger(__name__)
MAX_CHECKED = 1024  # combinations of input types that are remembered as checked


class Session:
    """Runs `graph` (level fused).

    Args:
        store: its weights.
        callables: Python fallbacks by index.
        trusted_ops: operators outside the allow-list that it may call.
        kernels: its kernels that are launched, see `runtime.launch`; the bodies of others run call by call.

    Raises:
        InvalidIR: an op does not exist here or a dim can't be determined.
    """

    def __init__(
        self,
        graph: Graph,
        store: WeightStore,
        settings: RuntimeSettings,
        callables: Sequence[Callable[..., Any]] = (),
        trusted_ops: frozenset[str] = frozenset(),
        kernels: Mapping[str, Launcher] | None = None,
    ) -> None:
        self.graph, self.store, self.device = graph, store, store.device
        self.kernels = kernels or {}
        self._code = compile_graph(graph, store.device, callables, trusted_ops, kernels=self.kernels)
        self._checked: set[object] = set()
        self._last: object = None  # a key that needs no check; comparing is cheaper than hashing
        self.pool: GraphPool | None = None
        if store.device.type == "cuda" and settings.cuda_graph_strategy != "disabled":
            reason = why_not(graph)
            if reason is None:
                self.pool = GraphPool(graph, self.run, store.device, settings.cuda_graph_pool_size)
            else:
                log.info("no CUDA graphs for this module: %s", reason)

    @property
    def source(self) -> str:
        """The plain code, as Python text."""
        return self._code.source

    def memory(self, **sizes: int) -> Memory:
        """What a call takes on the device, known before the first one.

        Args:
            sizes: of the graph's symbols, by name; none where all sizes are numbers.

        Raises:
            InputError: the size of a symbol is missing.
        """
        missing = [name for name in self._code.plan.symbols if name not in sizes]
        if missing:
            raise InputError(f"the size of {', '.join(missing)} is missing")
        return self._code.plan.memory(sizes)

    def sibling(self) -> Session:
        """A session of the same graph for other parameters, which shares the code; see `WeightStore.sibling`."""
        other = copy(self)
        other.store = self.store.sibling()
        if self.pool is not None:
            other.pool = GraphPool(self.graph, self.run, self.device, self.pool.size)
        return other

    def run(self, inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
        """The plain code. It has no gradients, and its casts were resolved at capture."""
        kind = self.device.type
        autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with torch.no_grad(), autocast, self._current_device():
            return self._code(inputs, weights)

    def _current_device(self) -> AbstractContextManager[object]:
        """Makes the session's device the current one where kernels are launched on it."""
        if not self.kernels or self.device.type != "cuda" or torch._C._cuda_getDevice() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def __call__(self, inputs: Sequence[Any], check: bool = True) -> list[Any]:
        """The graph's outputs for `inputs`, both flat and in the graph's order.

        Args:
            check: False where a guard has already checked the inputs.

        Raises:
            InputError: names the input, the dimension and the range.
        """
        if check:
            inputs = [_plain(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        key = tuple([(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else _number(x) for x in inputs])
        if check and key != self._last and key not in self._checked:
            check_inputs(self.graph, inputs, self.device)
            if len(self._checked) < MAX_CHECKED:
                self._checked.add(key)
        self._last = key
        if self.pool is None:
            return self.run(inputs, self.store.values)
        return self.pool(key, inputs, self.store)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without a pending conjugation or negation, which the types of the IR do not have."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _number(given: object) -> object:
    """What a call depends on in an input that is no tensor: 2 and 2.0 differ, all but numbers will be refused."""
    return (type(given), given) if isinstance(given, int | float) else type(given)


def check_inputs(graph: Graph, inputs: Sequence[Any], device: torch.device) -> None:
    """Check a flat list of inputs against the types of `graph.inputs`.

    Raises:
        InputError: the first input that does not fit: what was expected and what came.
    """
    if len(inputs) != len(graph.inputs):
        raise InputError(f"expected {len(graph.inputs)} inputs, got {len(inputs)}")
    sizes: dict[str, tuple[int, str]] = {}
    later: list[tuple[Dim, int, str]] = []
    for value, given in zip(graph.inputs, inputs, strict=True):
        for dim, size, place in _dims(value, given, device):
            if isinstance(dim, Sym):
                _check_range(dim, size, place, sizes)
            elif isinstance(dim, Expr):
                later.append((dim, size, place))
            elif dim != size:
                raise InputError(f"{place} is {size}, the engine was built for {dim}")
    for dim, size, place in later:
        _check_derived(dim, size, place, sizes)


def _dims(value: Value, given: object, device: torch.device) -> list[tuple[Dim, int, str]]:
    """Check everything of one input but its sizes; return those as (expected, given, what it is)."""
    name, type_ = f"input {value.name!r}", value.type
    if isinstance(type_, ScalarType):
        kinds = {"int": int, "float": (int, float), "bool": bool}
        if not isinstance(given, kinds[type_.kind]):  # type: ignore[arg-type]
            raise InputError(f"{name} is a {type(given).__name__}, expected {type_.kind}")
        return [] if type_.dim is None else [(type_.dim, int(given), name)]  # type: ignore[call-overload]
    if not isinstance(given, torch.Tensor):
        raise InputError(f"{name} is a {type(given).__name__}, expected a tensor")
    if given.dtype != aten.DTYPES[type_.dtype]:
        raise InputError(f"{name} has dtype {given.dtype}, expected {aten.DTYPES[type_.dtype]}")
    expected = aten.to_torch("Device", type_.device, device)
    if given.device != expected:
        raise InputError(f"{name} is on {given.device}, expected {expected}")
    if given.dim() != len(type_.shape):
        raise InputError(f"{name} has {given.dim()} dimensions, expected {len(type_.shape)}: {_shape(type_)}")
    return [(dim, given.shape[axis], f"dimension {axis} of {name}") for axis, dim in enumerate(type_.shape)]


def _check_range(dim: Sym, size: int, place: str, sizes: dict[str, tuple[int, str]]) -> None:
    if dim.name in sizes and sizes[dim.name][0] != size:
        raise InputError(f"{place} is {size}, but {sizes[dim.name][1]} is {sizes[dim.name][0]} and both are {dim.name}")
    sizes[dim.name] = size, place
    high = math.inf if dim.max is None else dim.max
    if not dim.min <= size <= high or size % dim.multiple:
        of = f" in multiples of {dim.multiple}" if dim.multiple != 1 else ""
        raise InputError(f"{place} is {size}, outside its range {dim.name} = {dim.min}..{high}{of}")


def _check_derived(dim: Dim, size: int, place: str, sizes: dict[str, tuple[int, str]]) -> None:
    known = {name: number for name, (number, _) in sizes.items()}
    found = invert(dim, size, known)
    if found is not None:  # the only place that tells what this symbol is
        symbol, number = found
        if evaluate(dim, {**known, symbol.name: number}) != size:
            raise InputError(f"{place} is {size}, which is not of the form {dim}")
        _check_range(symbol, number, f"{place} is {size} = {dim}, so that {symbol.name}", sizes)
    expected = evaluate(dim, known)
    if expected is not None and expected != size:
        raise InputError(f"{place} is {size}, expected {dim} = {expected}")


def _shape(type_: TensorType) -> str:
    return f"[{', '.join(map(str, type_.shape))}]"


def evaluate(dim: Dim, sizes: dict[str, int]) -> int | None:
    """The number that `dim` is for `sizes`; None where a symbol of it has none."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Sym):
        return sizes.get(dim.name)
    args = [evaluate(arg, sizes) for arg in dim.args]
    known = [arg for arg in args if arg is not None]
    return int(DIM_OPS[dim.op](known)) if len(known) == len(args) else None


def invert(dim: Dim, size: int, sizes: dict[str, int]) -> tuple[Sym, int] | None:
    """The symbol of `dim` that `sizes` lacks, and the number that makes `dim` about `size`: what generated code does to
    bind its dims (`reference.solve`), in numbers. None where there are none or several, or `dim` does not determine it.
    """
    if isinstance(dim, Sym):
        return (dim, size) if dim.name not in sizes else None
    if isinstance(dim, int) or dim.op not in ("*", "+"):
        return None
    args = [(arg, evaluate(arg, sizes)) for arg in dim.args]
    unknown = [arg for arg, number in args if number is None]
    rest = [number for _, number in args if number is not None]
    if len(unknown) != 1 or (dim.op == "*" and 0 in rest):
        return None
    return invert(unknown[0], size - sum(rest) if dim.op == "+" else size // math.prod(rest), sizes)
