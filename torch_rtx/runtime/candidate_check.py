"""Checks a candidate: runs a region alone, on random inputs, and compares it with its operations called one by one.

A result is right if its relative error against float64 is at most twice that of the calls, or within the tolerance of
its dtype. Elements that overflow in the calls and not in float64 are not compared. Calls that do not run in float64,
which a library may lack, are themselves what is right.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import TypeVar

import torch

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.dtypes import DTYPES, FLOAT, INT, PACKED, TF32
from torch_rtx.errors import RtxError
from torch_rtx.foreign import launch_in
from torch_rtx.ir import Graph, Node, TensorType, Value, attr_values
from torch_rtx.op_work import kind_in_float32
from torch_rtx.runtime.benchmark import RUNS, Run
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.example_lists import fill_lists
from torch_rtx.runtime.index_check import check_positions, differing, distinct, in_order, limits, numbers_in
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.launch import LoadedTactic
from torch_rtx.runtime.reference import NARROW_FLOATS, Calls, Place, copy_of, parts_of, whole_of
from torch_rtx.runtime.saved_results import fill_saved
from torch_rtx.runtime.streaming import nbytes, numbers
from torch_rtx.targets import EXACT, HIGH, Float32

log = logging.getLogger(__name__)
T = TypeVar("T")
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
PIECE = 1 << 20  # elements that are drawn or compared at once
MEMORY_SHARE = 0.5  # of the device's free memory that a check may use
DRAWN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of which PyTorch draws random numbers


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
        as_it_is = tactics is not None or _takes_bits(node.body) or launch_in(node.body) is not None
        self._node, self._wide = node, not as_it_is
        self._parts = [whole_of(self.graph)] if as_it_is else parts_of(self.graph)
        self._check_memory()
        self._generator = torch.Generator(device).manual_seed(next(SEEDS))
        # What a kernel that others wrote does with integers is not known: zeros are positions that every tensor has.
        high = 1 if launch_in(node.body) is not None else smallest_size(node.body)
        self._highs = dict.fromkeys((value.name for value in values), high) | limits(self.graph)
        self._in_order, self._distinct = in_order(self.graph), distinct(self.graph)
        used = {value.name: known[value.name] for value in values if value.name in known}
        self._known = {name: compile_graph(recipe, device)((), ())[0] for name, recipe in used.items()}
        self._numbers = set() if launch_in(node.body) is not None else numbers_in(self.graph) - self._known.keys()
        self.expected: Sequence[torch.Tensor] = ()
        self._inputs: list[torch.Tensor] = []
        for bits in BITS if self._numbers else BITS[:1]:
            self._inputs = [self._random(value, bits) for value in self.graph.inputs]
            fill_lists(self.graph, self._inputs, self._known)
            with _calls_of(node):
                self._computes_positions = check_positions(self.graph, device, self._given())
                fill_saved(self.graph, device, self._inputs)
                if self._is_whole:
                    calls = compile_graph(self.graph, device, tactics=tactics)
                    self.expected = _comparable(calls(self._given(), ()))
                if not self._numbers or self._is_finite():
                    break
        self._midway = MIDWAY if _rounds(node.body) else 0.0
        self._may_be_tf32 = float32.of(kind_in_float32(node.body)) == HIGH

    @property
    def _is_whole(self) -> bool:
        """Nothing is computed in pieces."""
        return self._parts[0].graph is self.graph

    def _is_finite(self) -> bool:
        """All that the calls compute is finite."""
        found = (piece.calls for piece in self._pieces(wide=False))
        return all(bool(x.float().isfinite().all()) for one in found if one.is_floating_point() for (x,) in _parts(one))

    def _pieces(self, wide: bool) -> Iterator[Piece]:
        """The results of the calls, and what is right: those in float64, or, if not `wide`, the same."""
        inputs = {value.name: x for value, x in zip(self.graph.inputs, self._inputs, strict=True)}
        for part in self._parts:
            calls = None if self.expected else Calls(part, self.device, False)
            exact = self._in_float64(partial(Calls, part, self.device, True)) if wide else None
            for lies, new in part.places():
                mine = right = self.expected if calls is None else _comparable(calls(inputs, lies))
                found = None if exact is None else self._in_float64(partial(exact, inputs, lies))
                right = mine if found is None else _comparable(found)
                names = (value.name for value in attr_values(part.graph.outputs))
                for position, name, *both in zip(part.positions, names, mine, right, strict=True):
                    yield Piece(position, _inside(lies[name], new[name]), *(x[new[name]] for x in both))
                del mine, right, found, both  # before the next piece is computed

    def _in_float64(self, call: Callable[[], T]) -> T | None:
        """What `call` returns; None where it fails, or one before it did. Refusing all kernels of calls without float64
        would leave the calls, which may be slower than what was fused."""
        try:
            return call() if self._wide else None
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, whatever the dtype is
            raise
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            log.warning("%s is compared with its calls, which fail in float64: %s", self._node.op, first)
            self._wide = False
            return None

    def _given(self) -> list[torch.Tensor]:
        """The inputs; what the node writes to is a copy, so that each run starts from the same contents."""
        pairs = zip(self.graph.inputs, self._inputs, strict=True)
        return [copy_of(x) if value.name in self.graph.written else x for value, x in pairs]

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

    def _check_memory(self) -> None:
        """Refuse what needs a good part of the device's memory."""
        if self.device.type != "cuda":
            return
        begun = continued(self._node)  # results in the memory of an operand
        copies = [value for value in self.graph.inputs if value.name in self.graph.written]
        made = [value for value in self._node.results if value.name not in begun] * (1 + self._is_whole)
        types = [value.type for value in (*self.graph.inputs, *copies, *made)]
        need = sum(nbytes(type_) for type_ in types if isinstance(type_, TensorType))
        need += max(part.bytes for part in self._parts)
        free, _ = torch.cuda.mem_get_info(self.device)
        if need > MEMORY_SHARE * free:  # which the allocator adds to by what it keeps for others
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if need > MEMORY_SHARE * free:
            raise RtxError(f"checking it needs {need >> 20} MiB, {free >> 20} MiB are free")

    def code(self, tactics: Mapping[str, LoadedTactic]) -> Code:
        """Code that runs the node by `tactics`, and calls what they do not launch."""
        return compile_graph(self.graph, self.device, tactics=tactics)

    def problem(self, code: Code) -> str | None:
        """The first wrong output of `code`, with its error; None: all are right.

        Raises:
            RtxError: the calls of the node's body fail.
        """
        poison = [_poisoned(value, self.device) for value in self.graph.outputs if isinstance(value, Value)]
        del poison  # the allocator hands this memory out next: elements that a kernel leaves out stay NaN
        found = _comparable(code(self._given(), ()))
        with _calls_of(self._node):
            if isinstance(code, Code) and not _launches(code) and self._is_near_calls(found):
                return None
            distances = self._distances(found)
        for position, (mine, calls, own) in enumerate(zip(found, *distances, strict=True)):
            least = tolerance(mine.dtype) if mine.is_floating_point() else self._midway
            limit, error = max(2 * calls.value, least), own.value
            if not mine.is_floating_point():
                if error > limit:
                    return f"output {position} differs in {error:.2%} of its elements, the limit is {limit:.2%}"
                continue
            if self._may_be_tf32 and limit < error <= TF32.tolerance:
                return LESS_EXACT
            if not error <= limit:
                return f"output {position} has a relative error of {error:.1e}, the limit is {limit:.1e}"
        return None

    def _is_near_calls(self, found: Sequence[torch.Tensor]) -> bool:
        """Results differ from those of the calls by no more than the rounding of their dtypes: what libraries compute
        has to be no better."""
        own = [Distance() for _ in found]
        for piece in self._pieces(wide=False):
            own[piece.position].add(found[piece.position][piece.lies], piece.calls)
        least = (tolerance(x.dtype) if x.is_floating_point() else self._midway for x in found)
        return all(one.value <= limit for one, limit in zip(own, least, strict=True))

    def _distances(
        self, found: Sequence[torch.Tensor], overflowing: Container[int] = ()
    ) -> tuple[list[Distance], list[Distance]]:
        """Of each output, how far the calls and `found` are from what is right. Of `overflowing` outputs, elements of
        which calls tell nothing are left out."""
        calls, own = ([Distance() for _ in found] for _ in range(2))
        for piece in self._pieces(wide=True):
            position = piece.position
            theirs, mine, right = piece.calls, found[position][piece.lies], piece.right
            if position in overflowing:
                unknown = _unknown(theirs, right)
                theirs, mine, right = (_without(x, unknown) for x in (theirs, mine, right))
            calls[position].add(theirs, right)
            own[position].add(mine, right)
            del piece, theirs, mine, right
        infinite = {position for position, one in enumerate(calls) if one.value == math.inf}
        return self._distances(found, infinite) if infinite and not overflowing else (calls, own)

    def runs(self, code: Code, pool: InputPool) -> list[Run]:
        """The runs to time: `code` with floats of `pool`, and copies of all else in as much memory at most: others
        might be positions outside of a tensor, or make some."""
        self.expected = ()  # only a check needs them
        pooled = [pool.holds(x) and not self._computes_positions for x in self._inputs]
        size = sum(_span(x) for x, held in zip(self._inputs, pooled, strict=True) if not held)
        sets = [self._given()]  # it may add to what it writes to, run by run
        for _ in range(min(RUNS, pool.size // max(size, 1)) - 1):
            sets.append([x if held else copy_of(x) for x, held in zip(self._inputs, pooled, strict=True)])
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


def _inside(outer: Place, inner: Place) -> Place:
    """Where a part of a part lies in the whole."""
    return tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(outer, inner, strict=True))


def _launches(code: Code) -> bool:
    """Whether a kernel of ours runs."""
    return any(node.kind == "kernel" for node in inline_kernels(code.graph, code.tactics).nodes)


def _unknown(calls: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The elements of which calls tell nothing: they overflow there and not in float64, or nearly do."""
    finite = right.isfinite()
    near = finite & (right.abs() > NEARLY * torch.finfo(calls.dtype).max)
    return near | (calls.float().isfinite() != finite)


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
    dtype = aten.DTYPES[type_.dtype]
    normal, integers = (partial(draw, generator=generator, device=device) for draw in (torch.randn, torch.randint))
    if type_.dtype == PACKED:
        return _drawn(type_, device, lambda count: integers(0, 256, (count,), dtype=torch.uint8))
    if dtype in DRAWN:
        shape, strides = numbers(type_.shape), numbers(type_.strides)
        return normal(aten.extent(shape, strides), dtype=dtype).as_strided(shape, strides)
    if dtype.is_floating_point or dtype.is_complex:
        return _drawn(type_, device, normal)
    high = 2 if dtype == torch.bool else high
    return _drawn(type_, device, lambda count: integers(0, high, (count,)))


def random_integers(value: Value, device: torch.device, generator: torch.Generator, bits: int) -> torch.Tensor:
    """A random input of integers with at most so many bits."""
    type_ = value.type
    assert isinstance(type_, TensorType)
    info, most = torch.iinfo(aten.DTYPES[type_.dtype]), 1 << bits - 1
    low, high = (max(info.min, -most), min(info.max, most - 1)) if info.min else (0, min(info.max, 2 * most - 1))
    draw = partial(torch.randint, low, high + 1, generator=generator, device=device)
    return _drawn(type_, device, lambda count: draw((count,)))


def _drawn(type_: TensorType, device: torch.device, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """A tensor of numbers that `draw` makes of another dtype, a piece at a time."""
    shape, strides = numbers(type_.shape), numbers(type_.strides)
    memory = torch.empty(aten.extent(shape, strides), dtype=aten.DTYPES[type_.dtype], device=device)
    bytes_ = memory.view(torch.uint8) if type_.dtype == PACKED else memory
    for piece in bytes_.split(PIECE):
        piece.copy_(draw(piece.numel()))
    return memory.as_strided(shape, strides)


def _poisoned(value: Value, device: torch.device) -> torch.Tensor:
    """Memory of the size of `value`: NaN, if it is of floats."""
    type_ = value.type
    assert isinstance(type_, TensorType)
    dtype = torch.uint8 if type_.dtype == PACKED else aten.DTYPES[type_.dtype]
    extent = aten.extent(numbers(type_.shape), numbers(type_.strides))
    return torch.full((extent,), torch.nan if dtype.is_floating_point else 1, dtype=dtype, device=device)


@dataclass(frozen=True)
class Piece:
    """A piece of an output.

    Attributes:
        position: of the output.
        lies: where, in the output.
        calls, right: as the calls compute it, and what is right.
    """

    position: int
    lies: Place
    calls: torch.Tensor
    right: torch.Tensor


class Distance:
    """How far results are from what is right, given piece by piece: of floats the norm of the difference over the norm
    of what is right, infinite where only one of them is finite; of integers the share that differs."""

    def __init__(self) -> None:
        self._difference = self._size = 0.0
        self._least = 1e-30

    def add(self, found: torch.Tensor, right: torch.Tensor) -> None:
        """Count a piece."""
        if not found.is_floating_point():
            self._difference += int((found != right).sum())
            self._size, self._least = self._size + found.numel(), 1.0
            return
        difference, size = _norms(found, right)
        if not math.isfinite(difference + size):
            difference, size = _norms(found, right, finite=True)
        self._difference, self._size = math.hypot(self._difference, difference), math.hypot(self._size, size)

    @property
    def value(self) -> float:
        """The distance by now."""
        return self._difference / max(self._size, self._least) if self._difference != math.inf else math.inf


def relative_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; infinite where only one of them is finite."""
    distance = Distance()
    distance.add(got, reference)
    return distance.value


def _norms(found: torch.Tensor, right: torch.Tensor, finite: bool = False) -> tuple[float, float]:
    """The norms of the difference and of `right`, in float64; with `finite`, of what is finite in both, or infinite
    where only one of them is."""
    norms = []
    for mine, exact in _parts(found, right):
        exact = exact.double()
        difference = (mine.double() if mine.itemsize == 1 else mine) - exact
        if finite:
            known = exact.isfinite()
            if not torch.equal(mine.double().isfinite(), known):
                return math.inf, 1.0
            difference, exact = difference.masked_fill_(~known, 0.0), exact.masked_fill(~known, 0.0)
        norms.append(torch.stack([difference.norm(), exact.norm()]))
    difference, size = (norms[0] if len(norms) == 1 else torch.stack(norms).norm(dim=0)).tolist()
    return difference, size


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape in pieces of at most PIECE elements, without copies: numbers of float64 take much memory."""
    first = tensors[0]
    if first.numel() <= PIECE:
        yield tensors
        return
    axis = max(range(first.dim()), key=lambda axis: (first.shape[axis] > 1, first.stride(axis)))
    count = max(PIECE * first.shape[axis] // first.numel(), 1)
    for pieces in zip(*(tensor.split(count, axis) for tensor in tensors), strict=True):
        yield from _parts(*pieces)
