"""A region on its own, with inputs of its own: whether a way to run it is right, and how long it takes.

A result is right when its error against the same operations in float64 is at most twice that of the calls which the
region stands for, or no more than its dtype rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import RtxError
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_map
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.launch import LoadedTactic

Run = Callable[[], object]
NARROW = tuple(name for name, dtype in DTYPES.items() if dtype.tolerance and name != "f64")
ROTATED = 128 << 20  # bytes of inputs that runs take in turn: no cache holds them all, as none holds a model's weights
RUNS = 32  # in a row; so many sets of inputs at most
CLOCK = 2e9  # a device's cycles per second, about
MOST_HELD = 0.05  # seconds that a stream is held back at most
MEMORY = 0.25  # of the free memory of a device; what a trial may take


class CandidateCheck:
    """The node `node`, whose types have numbers for all sizes, with random inputs on `device`.

    Args:
        seed: of the inputs.

    Raises:
        RtxError: the inputs and results take too much memory to try this here, or the calls themselves fail.
    """

    def __init__(self, node: Node, device: torch.device, seed: int = 0) -> None:
        assert node.body is not None
        self.device = device
        values = tuple({value.name: value for value in node.inputs}.values())
        outputs = tuple(value for value in node.outputs if value is not None)
        self.graph = Graph("fused", values, nodes=(replace(node, loc=None),), outputs=outputs)
        nbytes = sum(map(_bytes, (*values, *outputs)))
        self._check_memory(nbytes)
        generator = torch.Generator(device).manual_seed(seed)
        low = lowest_size(node.body)
        sets = max(1, min(RUNS, ROTATED // max(nbytes, 1)))
        self._sets = [[drawn(value, device, generator, low) for value in values] for _ in range(sets)]
        try:
            calls = compile_graph(self.graph, device)
            self.expected: Sequence[torch.Tensor] = calls(self._sets[0], ())
            wide = compile_graph(in_float64(self.graph), device)
            exact = wide([x.double() if x.is_floating_point() else x for x in self._sets[0]], ())
        except RuntimeError as error:  # an OutOfMemoryError, too
            raise RtxError(f"the calls of {node.op} can't be tried alone: {str(error).splitlines()[0]}") from None
        self._limits = [
            max(2 * relative_error(mine, right), tolerance(mine.dtype)) if mine.is_floating_point() else 0.0
            for mine, right in zip(self.expected, exact, strict=True)
        ]
        self._exact = exact

    def _check_memory(self, nbytes: int) -> None:
        if self.device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(self.device)
        if 8 * nbytes > MEMORY * free:  # as they are, in float64, and once more while computing
            raise RtxError(f"trying it takes {8 * nbytes >> 20} MiB, {free >> 20} MiB are free")

    def code(self, tactics: Mapping[str, LoadedTactic]) -> Code:
        """The node as it runs by `tactics`; what they do not launch is called."""
        return compile_graph(self.graph, self.device, tactics=tactics)

    def problem(self, code: Code) -> str | None:
        """What is wrong with the results of `code`; None if nothing is."""
        poison = [torch.full_like(x, torch.nan if x.is_floating_point() else 1) for x in self.expected]
        del poison  # this is what the allocator hands out next
        found = code(self._sets[0], ())
        for position, (mine, right, limit) in enumerate(zip(found, self._exact, self._limits, strict=True)):
            if not mine.is_floating_point():
                if not torch.equal(mine, self.expected[position]):
                    return f"output {position} differs"
                continue
            error = relative_error(mine, right)
            if not error <= limit:
                return f"output {position} has a relative error of {error:.1e}, {limit:.1e} is the most"
        return None

    def runs(self, code: Code) -> list[Run]:
        """What to time: `code` with each set of inputs."""
        return [partial(code, inputs, ()) for inputs in self._sets]


def _bytes(value: Value) -> int:
    type_ = value.type
    assert isinstance(type_, TensorType)
    return aten.extent(*_numbers(type_)) * aten.DTYPES[type_.dtype].itemsize


def _numbers(type_: TensorType) -> tuple[list[int], list[int]]:
    """Sizes and strides of a type that has numbers for both."""
    return [int(size) for size in type_.shape], [int(stride) for stride in type_.strides]  # type: ignore[arg-type]


def tolerance(dtype: torch.dtype) -> float:
    """Relative error below which results are the same for `dtype`, whatever the error of the calls happens to be."""
    return DTYPES[aten.dtype_name(dtype)].tolerance


def lowest_size(body: Graph) -> int:
    """A number below which an integer is a valid position in whatever the body indexes: the smallest size in it."""
    types = [value.type for value in body.values()]
    sizes = (size for type_ in types if isinstance(type_, TensorType) for size in type_.shape)
    return max(1, min((size for size in sizes if isinstance(size, int)), default=1))


def drawn(value: Value, device: torch.device, generator: torch.Generator, low: int) -> torch.Tensor:
    """Random contents for an input: normal, fair, or integers below `low`."""
    type_ = value.type
    assert isinstance(type_, TensorType)
    shape, strides = _numbers(type_)
    extent = aten.extent(shape, strides)
    dtype = aten.DTYPES[type_.dtype]
    if dtype.is_floating_point or dtype.is_complex:
        memory = torch.randn(extent, generator=generator, device=device).to(dtype)
    else:
        high = 2 if dtype == torch.bool else low
        memory = torch.randint(0, high, (extent,), generator=generator, device=device).to(dtype)
    return memory.as_strided(shape, strides)


def in_float64(graph: Graph) -> Graph:
    """The same operations in float64: what is cast to a narrower dtype stays wide."""

    def value(v: Value) -> Value:
        if not isinstance(v.type, TensorType) or v.type.dtype not in NARROW:
            return v
        return replace(v, type=replace(v.type, dtype="f64"))

    def attr(name: str, given: Attr) -> Attr:
        return "f64" if name == "dtype" and given in NARROW else attr_map(given, value)

    def node(n: Node) -> Node:
        args = tuple((name, attr(name, given)) for name, given in n.args)
        outputs = tuple(None if v is None else value(v) for v in n.outputs)
        return replace(n, args=args, outputs=outputs, body=None if n.body is None else in_float64(n.body))

    inputs, outputs = tuple(map(value, graph.inputs)), tuple(attr_map(output, value) for output in graph.outputs)
    return replace(graph, inputs=inputs, nodes=tuple(map(node, graph.nodes)), outputs=outputs)


def relative_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; infinite where only one of them is finite."""
    got, reference = got.double(), reference.double()
    finite = torch.isfinite(reference)
    if not torch.equal(torch.isfinite(got), finite):
        return float("inf")
    difference = torch.where(finite, got - reference, 0.0)
    return float(difference.norm() / torch.where(finite, reference, 0.0).norm().clamp_min(1e-30))


# ---- time ------------------------------------------------------------------------------------------------------------


def host_microseconds(runs: Sequence[Run]) -> float:
    """The time of one run on the CPU, the least of some."""
    best = float("inf")
    for index in range(RUNS):
        start = time.perf_counter_ns()
        runs[index % len(runs)]()
        best = min(best, (time.perf_counter_ns() - start) / 1000)
    return best


def device_microseconds(runs: Sequence[Run]) -> float:
    """The time of one run on the current stream of the current device, with the host's part hidden: the stream is held
    back until all runs are queued."""
    order = [runs[index % len(runs)] for index in range(RUNS)]
    runs[0]()
    begun = time.perf_counter()
    for run in order:
        run()
    held = min(2 * (time.perf_counter() - begun), MOST_HELD)
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(held * CLOCK))
        start.record()
        for run in order:
            run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / RUNS)
    return min(times)


def microseconds(device: torch.device) -> Callable[[Sequence[Run]], float]:
    """How runs are timed on `device`."""
    return device_microseconds if device.type == "cuda" else host_microseconds
