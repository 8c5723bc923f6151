"""Checks a candidate: runs a region alone, on random inputs, and compares it with its operations called one by one.

A result is right if its relative error against float64 is at most twice that of the calls, or within the tolerance of
its dtype. Elements that overflow in the calls and not in float64 are not compared. Calls that do not run in float64,
which a library may lack, are themselves what is right.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from types import MappingProxyType

import torch

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.dtypes import DTYPES, FLOAT, INT, PACKED, TF32
from torch_rtx.errors import RtxError
from torch_rtx.foreign import launch_in
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_map
from torch_rtx.op_work import kind_in_float32
from torch_rtx.runtime.benchmark import RUNS, Run
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.control import Owned
from torch_rtx.runtime.example_lists import fill_lists
from torch_rtx.runtime.index_check import check_positions, differing, distinct, in_order, limits, numbers_in
from torch_rtx.runtime.launch import LoadedTactic
from torch_rtx.runtime.saved_results import fill_saved
from torch_rtx.runtime.streaming import nbytes, numbers
from torch_rtx.targets import EXACT, HIGH, Float32

log = logging.getLogger(__name__)
NARROW_FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.tolerance and name != "f64")
# Of the L2 cache, what timed runs read in turn: more than it holds, as the weights of a model are. On a CPU, bytes.
ROTATED, ROTATED_ON_CPU = 1.25, 1 << 20
LINE = 256  # bytes that inputs are aligned to, as the allocator aligns them
SEEDS = count()  # each check has other inputs: right results of an earlier check in reused memory are wrong ones now
# Of integers that floats are rounded to, the share that may differ: what lies midway between two of them, up to the
# last bit of a quotient.
MIDWAY = 1e-3
# Of integers that are numbers: all that 32 bits have, and fewer where results would not be finite.
BITS = (32, 12, 4)
NEARLY = 0.9  # of the largest float of a dtype: above it rounding decides whether an element is finite
# A problem where TF32 is allowed, and libraries do not use it for these sizes.
LESS_EXACT = "as TF32 it is less exact than the calls"
PIECE = 1 << 22  # elements that are compared at once
MEMORY_SHARE = 0.25  # of the device's free memory that a check may use


class CandidateCheck:
    """Runs one kernel node on random inputs.

    Args:
        node: with numbers for all sizes.
        known: by the name of an operand that is the same whatever the inputs and parameters are: what computes it.
        tactics: how the expected results are computed; by default, call by call.
        float32: how exact products of float32 have to be.

    Raises:
        RtxError: inputs and results need too much memory, or the calls of the node's body fail.
    """

    def __init__(
        self,
        node: Node,
        device: torch.device,
        known: Mapping[str, Graph] = MappingProxyType({}),
        tactics: Mapping[str, LoadedTactic] | None = None,
        float32: Float32 = EXACT,
    ) -> None:
        assert node.body is not None
        self.device = device
        values = tuple({value.name: value for value in node.inputs}.values())
        outputs = tuple(value for value in node.outputs if value is not None)
        self.graph = Graph("fused", values, nodes=(replace(node, loc=None),), outputs=outputs)
        made = [value for value in outputs if value.name not in continued(node)]  # the others lie in an operand
        total = sum(nbytes(value.type) for value in (*values, *made) if isinstance(value.type, TensorType))
        self._check_memory(total)
        self._generator = torch.Generator(device).manual_seed(next(SEEDS))
        # What a kernel that others wrote does with integers is not known: zeros are positions that every tensor has.
        high = 1 if launch_in(node.body) is not None else smallest_size(node.body)
        self._highs = dict.fromkeys((value.name for value in values), high) | limits(self.graph)
        self._in_order, self._distinct = in_order(self.graph), distinct(self.graph)
        used = {value.name: known[value.name] for value in values if value.name in known}
        self._known = {name: compile_graph(recipe, device)((), ())[0] for name, recipe in used.items()}
        self._numbers = set() if launch_in(node.body) is not None else numbers_in(self.graph) - self._known.keys()
        for bits in BITS if self._numbers else BITS[:1]:
            self._inputs = [self._random(value, bits) for value in self.graph.inputs]
            fill_lists(self.graph, self._inputs, self._known)
            with _calls_of(node):
                self._computes_positions = check_positions(self.graph, device, self._given())
                fill_saved(self.graph, device, self._inputs)
                calls = compile_graph(self.graph, device, tactics=tactics)
                self.expected: Sequence[torch.Tensor] = _comparable(calls(self._given(), ()))
            if all(bool(x.float().isfinite().all()) for x in self.expected if x.is_floating_point()):
                break
        as_it_is = _takes_bits(node.body) or launch_in(node.body) is not None
        with _calls_of(node):
            exact = self.expected if as_it_is else self._right(node)
        self._midway = MIDWAY if _rounds(node.body) else 0.0
        self._may_be_tf32 = float32.of(kind_in_float32(node.body)) == HIGH
        measured = [self._measured(mine, right) for mine, right in zip(self.expected, exact, strict=True)]
        self._limits = [limit for limit, *_ in measured]
        self._exact = [right for _, right, _ in measured]
        self._unknown = [unknown for *_, unknown in measured]

    def _measured(self, mine: torch.Tensor, right: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor | None]:
        """Of an output as calls compute it: the error that a kernel may have, what is right, and the elements of which
        calls tell nothing, since they overflow; None: there are none."""
        if not mine.is_floating_point():
            return max(2 * _share(mine, right), self._midway), right, None
        error, unknown = relative_error(mine, right), None
        if error == math.inf:
            near = right.isfinite() & (right.abs() > NEARLY * torch.finfo(mine.dtype).max)
            unknown = near | (mine.float().isfinite() != right.isfinite())
            right = _without(right, unknown)
            error = relative_error(_without(mine, unknown), right)
        # Float32 is exact enough for narrower results.
        right = right.float() if mine.itemsize < torch.float32.itemsize else right
        return max(2 * error, tolerance(mine.dtype)), right, unknown

    def _right(self, node: Node) -> Sequence[torch.Tensor]:
        """What results are compared with. Refusing all kernels of calls without float64 would leave the calls, which
        may be slower than what was fused."""
        try:
            return self._in_float64()
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, whatever the dtype is
            raise
        except RuntimeError as error:
            log.warning("%s is compared with its calls, which fail in float64: %s", node.op, str(error).splitlines()[0])
            return self.expected

    def _in_float64(self) -> Sequence[torch.Tensor]:
        wide = compile_graph(in_float64(self.graph), self.device)
        given = (x.double() if aten.dtype_name(x.dtype) in NARROW_FLOATS else x for x in self._given())
        return _comparable(wide(Owned(given), ()))

    def _given(self) -> list[torch.Tensor]:
        """The inputs; what the node writes to is a copy, so that each run starts from the same contents."""
        pairs = zip(self.graph.inputs, self._inputs, strict=True)
        return [_copy(x) if value.name in self.graph.written else x for value, x in pairs]

    def _random(self, value: Value, bits: int) -> torch.Tensor:
        """A random input; integers that are numbers have so many bits, or all of their dtype's."""
        if value.name in self._known:
            return self._known[value.name]
        if value.name in self._numbers:
            return random_integers(value, self.device, self._generator, bits)
        high = self._highs[value.name]
        found = random_tensor(value, self.device, self._generator, high)
        if value.name in self._distinct:
            found = differing(found, self._distinct[value.name], high, self._generator)
        if value.name in self._in_order:
            found, last = found.sort().values, self._in_order[value.name]
            found[-1:] = found[-1:] if last is None else last
        return found

    def _check_memory(self, total: int) -> None:
        if self.device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(self.device)
        if 8 * total > MEMORY_SHARE * free:  # as they are, in float64, and temporaries
            raise RtxError(f"checking it needs {8 * total >> 20} MiB, {free >> 20} MiB are free")

    def code(self, tactics: Mapping[str, LoadedTactic]) -> Code:
        """Code that runs the node by `tactics`, and calls what they do not launch."""
        return compile_graph(self.graph, self.device, tactics=tactics)

    def problem(self, code: Code) -> str | None:
        """The first wrong output of `code`, with its error; None: all are right."""
        poison = [torch.full_like(x, torch.nan if x.is_floating_point() else 1) for x in self.expected]
        del poison  # the allocator hands this memory out next: elements that a kernel leaves out stay NaN
        found = _comparable(code(self._given(), ()))
        outputs = zip(found, self._exact, self._limits, self._unknown, strict=True)
        for position, (mine, right, limit, unknown) in enumerate(outputs):
            if not mine.is_floating_point():
                share = _share(mine, right)
                if share > limit:
                    return f"output {position} differs in {share:.2%} of its elements, the limit is {limit:.2%}"
                continue
            error = relative_error(mine if unknown is None else _without(mine, unknown), right)
            if self._may_be_tf32 and limit < error <= TF32.tolerance:
                return LESS_EXACT
            if not error <= limit:
                return f"output {position} has a relative error of {error:.1e}, the limit is {limit:.1e}"
        return None

    def runs(self, code: Code, pool: InputPool) -> list[Run]:
        """The runs to time: `code` with floats of `pool`, and copies of all else in as much memory at most: others
        might be positions outside of a tensor, or make some."""
        pooled = [pool.holds(x) and not self._computes_positions for x in self._inputs]
        size = sum(_span(x) for x, held in zip(self._inputs, pooled, strict=True) if not held)
        sets = [self._given()]  # it may add to what it writes to, run by run
        for _ in range(min(RUNS, pool.size // max(size, 1)) - 1):
            sets.append([x if held else _copy(x) for x, held in zip(self._inputs, pooled, strict=True)])
        turns = (sets[turn % len(sets)] for turn in range(RUNS))
        return [
            partial(code, [pool.like(x) if held else x for x, held in zip(inputs, pooled, strict=True)], ())
            for inputs in turns
        ]


@contextmanager
def _calls_of(node: Node) -> Iterator[None]:
    """Raises RtxError if calls fail inside."""
    try:
        yield
    except RuntimeError as error:  # an OutOfMemoryError, too
        raise RtxError(f"the calls of {node.op} fail in the check: {str(error).splitlines()[0]}") from None


class InputPool:
    """Floats that timed runs read: one after another, from memory of more than the L2 cache, which all candidates of a
    device share. Their values are of no account.

    Attributes:
        size: in bytes.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        size = ROTATED * torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else ROTATED_ON_CPU
        # Two normal floats of 16 bits are, as one of 32, finite and small as well.
        generator = torch.Generator(device).manual_seed(0)  # the program's own numbers stay as they are
        self.size = int(size) // LINE * LINE
        floats = torch.randn(self.size // 2, device=device, dtype=torch.float16, generator=generator)
        self._memory, self._at = floats.view(torch.uint8), 0

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `like` has other memory for it: for floats, as long as they fit."""
        return tensor.is_floating_point() and 0 < _span(tensor) <= self.size

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Other memory in the form of a tensor that the pool holds."""
        span = -(-_span(tensor) // LINE) * LINE
        start = min(self._at, self.size - span)  # the last one ends where the pool ends, so that all of it is read
        self._at = (start + span) % self.size
        memory = self._memory[start : start + span].view(tensor.dtype)
        return memory.as_strided(tensor.shape, tensor.stride())


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Other memory with the same elements and strides, which `clone` changes where elements share memory."""
    extent = aten.extent(tensor.shape, tensor.stride())
    return tensor.as_strided((extent,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element."""
    return aten.extent(tensor.shape, tensor.stride()) * tensor.itemsize


def _comparable(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """`tensors`, those of pairs of values as bytes: PyTorch compares none."""
    return [x.view(torch.uint8) if x.dtype == aten.DTYPES[PACKED] else x for x in tensors]


def _types(body: Graph, op: str) -> list[tuple[str, str]]:
    """The dtypes that calls of `op` in `body` take and give."""
    nodes = [inner for node in body.nodes for inner in (node.body.nodes if node.body is not None else (node,))]
    pairs = ((node.inputs[0].type, node.results[0].type) for node in nodes if node.op == op)
    return [(a.dtype, b.dtype) for a, b in pairs if isinstance(a, TensorType) and isinstance(b, TensorType)]


def _takes_bits(body: Graph) -> bool:
    """Whether `body` looks at the bits of floats, which are others in float64."""
    return any({*pair} & {*NARROW_FLOATS} for pair in _types(body, "aten.view.dtype"))


def _share(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of integers, the share that differs."""
    return float((found != exact).double().mean()) if found.numel() else 0.0


def _without(tensor: torch.Tensor, unknown: torch.Tensor) -> torch.Tensor:
    """`tensor` with NaN for some elements; narrow floats, of which PyTorch has not all operations, as float32."""
    wide = tensor.float() if tensor.itemsize < torch.float32.itemsize else tensor
    return wide.masked_fill(unknown, torch.nan)


def _rounds(body: Graph) -> bool:
    """Whether `body` makes integers of floats."""
    pairs = _types(body, "aten._to_copy.default")
    return any(DTYPES[a].kind == FLOAT and DTYPES[b].kind == INT for a, b in pairs)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that is accepted for `dtype` even where the calls are more accurate."""
    return DTYPES[aten.dtype_name(dtype)].tolerance


def smallest_size(body: Graph) -> int:
    """The smallest size in the body: integers below it are valid indices into each of its tensors."""
    types = [value.type for value in body.values()]
    sizes = (size for type_ in types if isinstance(type_, TensorType) for size in type_.shape)
    return max(1, min((size for size in sizes if isinstance(size, int)), default=1))


def random_tensor(value: Value, device: torch.device, generator: torch.Generator, high: int) -> torch.Tensor:
    """A random input: floats from the normal distribution, fair bools, integers in [0, high)."""
    type_ = value.type
    assert isinstance(type_, TensorType)
    shape, strides = numbers(type_.shape), numbers(type_.strides)
    extent = aten.extent(shape, strides)
    dtype = aten.DTYPES[type_.dtype]
    if type_.dtype == PACKED:
        memory = torch.randint(0, 256, (extent,), generator=generator, device=device, dtype=torch.uint8).view(dtype)
    elif dtype.is_floating_point or dtype.is_complex:
        memory = torch.randn(extent, generator=generator, device=device).to(dtype)
    else:
        high = 2 if dtype == torch.bool else high
        memory = torch.randint(0, high, (extent,), generator=generator, device=device).to(dtype)
    return memory.as_strided(shape, strides)


def random_integers(value: Value, device: torch.device, generator: torch.Generator, bits: int) -> torch.Tensor:
    """A random input of integers with at most so many bits."""
    type_ = value.type
    assert isinstance(type_, TensorType)
    shape, strides, dtype = numbers(type_.shape), numbers(type_.strides), aten.DTYPES[type_.dtype]
    info, most = torch.iinfo(dtype), 1 << bits - 1
    low, high = (max(info.min, -most), min(info.max, most - 1)) if info.min else (0, min(info.max, 2 * most - 1))
    memory = torch.randint(low, high + 1, (aten.extent(shape, strides),), generator=generator, device=device)
    return memory.to(dtype).as_strided(shape, strides)


def in_float64(graph: Graph) -> Graph:
    """The same operations in float64, casts to narrower floats included."""

    def value(v: Value) -> Value:
        if not isinstance(v.type, TensorType) or v.type.dtype not in NARROW_FLOATS:
            return v
        return replace(v, type=replace(v.type, dtype="f64"))

    def attr(name: str, given: Attr) -> Attr:
        return "f64" if "dtype" in name and given in NARROW_FLOATS else attr_map(given, value)

    def node(n: Node) -> Node:
        args = tuple((name, attr(name, given)) for name, given in n.args)
        outputs = tuple(None if v is None else value(v) for v in n.outputs)
        return replace(n, args=args, outputs=outputs, body=None if n.body is None else in_float64(n.body))

    inputs, outputs = tuple(map(value, graph.inputs)), tuple(attr_map(output, value) for output in graph.outputs)
    return replace(graph, inputs=inputs, nodes=tuple(map(node, graph.nodes)), outputs=outputs)


def relative_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; infinite where only one of them is finite."""
    norms = []
    pieces = (tensor.reshape(-1).split(PIECE) for tensor in (got, reference))
    for mine, right in zip(*pieces, strict=True):  # by pieces: numbers of float64 take much memory
        mine, right = mine.double(), right.double()
        finite = torch.isfinite(right)
        if not torch.equal(torch.isfinite(mine), finite):
            return float("inf")
        norms.append(torch.stack([torch.where(finite, x, 0.0).norm() for x in (mine - right, right)]))
    difference, size = torch.stack(norms).norm(dim=0)
    return float(difference / size.clamp_min(1e-30))
