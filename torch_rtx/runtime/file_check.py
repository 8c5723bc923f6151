"""Checks the calls in an engine file before any of them runs: a file may come from anywhere.

Every call must be of an operator in `FILE_OPS` (or one that the user trusts), with arguments of the types in its
schema, and must have the results that the file says: PyTorch computes their types on meta tensors. Memory plans and
kernels rely on these types. A graph with symbols is checked for sample sizes at first, and for the sizes of each call
when they are first met. What PyTorch does not check is in `file_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from torch_rtx import aten
from torch_rtx.collectives import check as check_collectives
from torch_rtx.control import all_syms
from torch_rtx.engine import calls, needs_trust
from torch_rtx.errors import EngineFormatError, InvalidIR
from torch_rtx.foreign import launch_of
from torch_rtx.ir import (
    Attr,
    Dim,
    Expr,
    Graph,
    Node,
    ScalarType,
    Sym,
    TensorType,
    Type,
    Value,
    evaluate,
    type_dims,
)
from torch_rtx.op_work import flops
from torch_rtx.optable import LAUNCH
from torch_rtx.runtime.file_rules import ANY, INFERRED, broken_rule
from torch_rtx.runtime.light_meta import light_meta

META = torch.device("meta")
# What recipes may take while an engine is loaded, besides a multiple of the data that they read: memory in bytes (as in
# `hoist_weights`, for several weights), and time in nanoseconds.
FREE_BYTES, BYTES_FACTOR = 192 << 20, 4
FREE_TIME, TIME_PER_BYTE = 500_000_000, 256
# Words in the names of operators that take long for each element, and of those whose time grows faster than n.
SLOW = frozenset(("special", "igamma", "igammac", "polygamma", "digamma", "lgamma", "erfinv", "i0", "pow"))
SUPERLINEAR = frozenset(("linalg", "cholesky", "geqrf", "ormqr", "triangular", "cdist", "pdist", "lstm", "gru"))
SUPERLINEAR |= {"bilinear", "trilinear"}
# Sizes for symbols while no call has said better: different ones, equal ones, small ones.
SAMPLES = (lambda index: 48 + 8 * index, lambda index: 64, lambda index: 2)
MAX_KNOWN = 10_000  # calls that are known to be right
VECTOR = 8  # elements that the rows of results may be padded to, as those of attention on a GPU are
KINDS = {"int": (int,), "float": (int, float), "bool": (bool,)}  # what a number of each kind may be
Sizes = Mapping[str, int]


class FileCheck:
    """The checks of one engine file.

    Args:
        graph: of the file; `verify` has accepted it.
        device: the one that MAIN stands for.
        trusted_ops: operators that the user trusts: their calls are not checked.

    Raises:
        InvalidIR: an operator is neither allowed nor trusted; a kernel that others wrote is launched and not trusted; a
            collective is not waited for, see `collectives`.
        EngineFormatError: a call has wrong arguments or other results than the file says, or the recipes would take too
            much memory or time.
    """

    def __init__(self, graph: Graph, device: torch.device, trusted_ops: Collection[str] = ()) -> None:
        self.graph, self.device = graph, device
        self.trusted = frozenset(trusted_ops)
        self._known: set[object] = set()  # keys of calls that are right
        alike: dict[object, Node] = {}  # the layers of a model have the same calls, of which one is checked for a size
        for node in calls(graph):
            alike.setdefault(_form(node), node)
        self._calls = tuple(alike.values())
        unknown = [op for op in needs_trust(graph) if op not in self.trusted]
        if unknown:
            names = ", ".join(f'"{op}"' for op in unknown)
            raise InvalidIR(
                f"op {', '.join(unknown)} is not on the allow-list for engine files",
                hint=f"load(..., trusted_ops=[{names}]) calls it, if you trust the file",
            )
        check_collectives(graph)
        kernels = sorted({launch.kernel for node in calls(graph) if (launch := launch_of(node)) is not None})
        if kernels and LAUNCH not in self.trusted:
            raise InvalidIR(
                f"the engine launches kernels that others wrote: {', '.join(kernels)}",
                hint="load(..., trust_binaries=True) runs them, if you trust the file",
            )
        self._check_recipes()
        self.at({})

    def at(self, sizes: Sizes) -> None:
        """Check each call for these sizes of symbols. Others get sample sizes, for one of which the call must be right.

        Raises:
            EngineFormatError: see `FileCheck`.
        """
        samples = self._samples(sizes)
        with light_meta():
            for node in self._calls:
                self._check_for_one(node, samples)

    def _check_for_one(self, node: Node, samples: Sequence[Sizes]) -> None:
        errors: list[InvalidIR] = []
        for sample in samples:
            try:
                self._check(node, sample)
                return
            except InvalidIR as error:
                errors.append(error)
        name = ", ".join(value.name for value in node.results)
        message = f"{node.op}{f' of {name}' if name else ''}: {errors[0].message}"
        raise EngineFormatError(message[:2000], loc=node.loc)

    def _samples(self, sizes: Sizes) -> list[Sizes]:
        open_ = [sym for name, sym in all_syms(self.graph).items() if name not in sizes]
        if not open_:
            return [sizes]
        return [{**sizes, **{sym.name: _in_range(sym, sample(i)) for i, sym in enumerate(open_)}} for sample in SAMPLES]

    def _check_recipes(self) -> None:
        """Raises EngineFormatError if the recipes take more memory or time than a file may. Those of constants run
        before a file without weights gets any."""
        constants = {parameter.name for parameter in self.graph.parameters if parameter.constant}
        fixed = [weight for weight in self.graph.weights if constants.issuperset(weight.names)]
        for weights, known in ((fixed, constants), (self.graph.weights, None)):
            read = [p.type for p in self.graph.parameters if known is None or p.name in known]
            stored = [math.prod(_numbers(t.shape, {})) * aten.DTYPES[t.dtype].itemsize for t in read]
            data = sum(stored)
            recipes = [weight.recipe for weight in weights if weight.recipe is not None]
            memory = sum(max(_bytes(t) - size, 0) for t, size in zip(read, stored, strict=True))  # strides with gaps
            memory += sum(_bytes(weight.value.type) for weight in weights if weight.recipe is not None)
            memory += max(map(_peak, recipes), default=0)
            time = sum(_time(node) for recipe in recipes for node in recipe.nodes)
            if memory > FREE_BYTES + BYTES_FACTOR * data or time > FREE_TIME + TIME_PER_BYTE * data:
                about = f"{memory >> 20} MiB and {time / 1e9:.1f} s"
                raise EngineFormatError(f"the recipes of the weights take {about}, more than a file of this size may")

    def _check(self, node: Node, sizes: Sizes) -> None:
        if node.op in self.trusted:
            return
        try:
            results = tuple(None if value is None else _static(value.type, sizes) for value in node.outputs)
            key = node.kind, node.op, tuple([(name, _key(attr, sizes)) for name, attr in node.args]), results
        except ZeroDivisionError:
            raise InvalidIR("a size divides by zero") from None
        if key not in self._known:
            _Call(node, sizes, self.device).check(results)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known.add(key)


def _bytes(type_: Type) -> int:
    """Of a static type, from the first to the last element."""
    if not isinstance(type_, TensorType):
        return 0
    shape, strides = _numbers(type_.shape, {}), _numbers(type_.strides, {})
    return aten.extent(shape, strides) * aten.DTYPES[type_.dtype].itemsize


def _peak(recipe: Graph) -> int:
    """The most bytes that the results of a recipe's calls take at once."""
    owner: dict[str, str] = {}  # from a view to the value whose memory it shows
    last: dict[str, int] = {}  # by owner
    for index, node in enumerate(recipe.nodes):
        last |= {owner.get(value.name, value.name): index for value in node.inputs}
        if node.inputs and aten.is_view(aten.overload(node.op)):
            shown = node.inputs[0].name
            owner |= {value.name: owner.get(shown, shown) for value in node.results}
    ends: dict[int, int] = {}  # bytes that are freed after a node
    now = most = 0
    for index, node in enumerate(recipe.nodes):
        for value in (value for value in node.results if value.name not in owner):
            now += _bytes(value.type)
            end = last.get(value.name, index)
            ends[end] = ends.get(end, 0) + _bytes(value.type)
        most = max(most, now)
        now -= ends.get(index, 0)
    return most


def _time(node: Node) -> int:
    """About how many nanoseconds a call takes on one core."""
    words = node.op.split(".")[1].split("_")
    if aten.is_view(aten.overload(node.op)):
        return 0
    types = [value.type for value in (*node.inputs, *node.results) if isinstance(value.type, TensorType)]
    count = max((math.prod(_numbers(type_.shape, {})) for type_ in types), default=0)
    if not SUPERLINEAR.isdisjoint(words):
        return math.isqrt(count) ** 3
    return max(
        count * (500 if not SLOW.isdisjoint(words) else 4), flops(node, lambda dim: _numbers((dim,), {})[0]) // 16
    )


class _Parameter(NamedTuple):
    """An argument in a schema: its type without Optional."""

    type: str
    optional: bool
    required: bool


@cache
def _schema(op: torch._ops.OpOverload) -> Mapping[str, _Parameter]:
    """The arguments of `op`, by name."""
    return {
        arg.name: _Parameter(
            aten.schema(op)[arg.name][0],
            isinstance(arg.type, torch.OptionalType) or arg.has_default_value() and arg.default_value is None,
            not arg.has_default_value(),
        )
        for arg in op._schema.arguments
    }


class _Call:
    """A call for given sizes."""

    def __init__(self, node: Node, sizes: Sizes, device: torch.device) -> None:
        self.node, self.sizes, self.device = node, sizes, device
        self.op = aten.overload(node.op)

    def check(self, results: tuple[Type | None, ...]) -> None:
        """Raises InvalidIR if the arguments are wrong, or the results are not of these types."""
        if self.op._schema.is_mutable and self.node.kind == "fallback":
            raise InvalidIR("a fallback of a file must not write")
        schema = _schema(self.op)
        missing = [name for name, parameter in schema.items() if parameter.required and self.node.arg(name) is None]
        missing = [name for name in missing if not schema[name].optional]
        if missing:
            raise InvalidIR(f"the argument {missing[0]!r} is missing")
        given = {name: self._given(name, schema, attr) for name, attr in self.node.args}
        if "device" in schema and given.get("device") is None:
            given["device"] = META
        tensors = [value for name, value in given.items() if schema[name].type == "Tensor" and value is not None]
        if tensors and not any(isinstance(value, torch.Tensor) for value in tensors):
            raise InvalidIR("numbers stand for all of its tensors")
        found = self._infer(given)
        if self.node.outputs and len(found) != len(results):
            raise InvalidIR(f"it has {len(found)} results, not {len(results)}")
        for expected, result in zip(results, found, strict=False):
            if expected is not None:
                self._compare(expected, result)

    def _infer(self, given: Mapping[str, Any]) -> list[Any]:
        try:
            broken = broken_rule(self.node.op, given, [value is not None for value in self.node.outputs])
            if broken is not None:
                raise InvalidIR(broken)
            with torch.no_grad():
                result = INFERRED[self.node.op](given) if self.node.op in INFERRED else self.op(**given)
        except NotImplementedError:
            raise InvalidIR("its results can't be checked", hint="name it in trusted_ops") from None
        except InvalidIR:
            raise
        except Exception as error:
            raise InvalidIR(f"it does not take these arguments: {error}") from None
        return list(result) if isinstance(result, tuple | list) else [] if result is None else [result]

    def _compare(self, expected: Type, result: Any) -> None:
        if isinstance(expected, ScalarType) or not isinstance(result, torch.Tensor):
            kinds = KINDS.get(expected.kind, ()) if isinstance(expected, ScalarType) else ()
            number = expected.dim if isinstance(expected, ScalarType) else None  # is checked in the call, if decided
            if not isinstance(result, kinds) or number not in (None, result) and not aten.is_decided(self.node):
                raise InvalidIR(f"it does not return {expected}")
            return
        shape, strides = _numbers(expected.shape, {}), _numbers(expected.strides, {})
        found = tuple(size if size != ANY else shape[axis] for axis, size in enumerate(result.shape[: len(shape)]))
        if aten.DTYPES[expected.dtype] != result.dtype or found != shape or result.dim() != len(shape):
            raise InvalidIR(f"it returns {aten.dtype_name(result.dtype)}{list(result.shape)}, not {expected}")
        same = all(size < 2 or a == b for size, a, b in zip(shape, strides, result.stride(), strict=True))
        # Generated code gives a tensor these strides where they matter, but a view lies in the memory that is there.
        if not same and not _apart(shape, strides, 1 if self.node.kind == "view" else VECTOR):
            raise InvalidIR(f"it returns the strides {list(result.stride())}, not {list(strides)}")
        self._check_device(expected)

    def _check_device(self, expected: TensorType) -> None:
        named = self.node.arg("device")
        tensors = [value.type for value in self.node.inputs if isinstance(value.type, TensorType)]
        if named is None:
            named = next((type_.device for type_ in tensors if type_.shape), tensors[0].device if tensors else "cpu")
        if self._device(named) != self._device(expected.device):
            raise InvalidIR(f"it returns a tensor on {named}, not on {expected.device}")

    def _device(self, name: Attr) -> torch.device:
        device: torch.device = aten.to_torch("Device", name, self.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InvalidIR(f"this process has no device {name}")
        return device

    # ---- arguments ---------------------------------------------------------------------------------------------------

    def _given(self, name: str, schema: Mapping[str, _Parameter], attr: Attr) -> Any:
        parameter = schema.get(name)
        if parameter is None:
            raise InvalidIR(f"it has no argument {name!r}")
        if attr is None and parameter.optional:
            return None
        if not _fits(parameter.type, attr) or (name == "pin_memory" and attr is True):
            raise InvalidIR(f"the argument {name!r} is no {parameter.type}")
        if parameter.type == "Device":
            self._device(attr)
            return META
        return aten.to_torch(parameter.type, self._concrete(attr), META)

    def _concrete(self, attr: Attr) -> Any:
        if isinstance(attr, tuple):
            return [self._concrete(item) for item in attr]
        if isinstance(attr, Sym | Expr):
            return _numbers((attr,), self.sizes)[0]
        if isinstance(attr, int) and not -(2**63) <= attr < 2**63:
            raise InvalidIR(f"{attr} does not fit in 64 bits")
        if not isinstance(attr, Value):
            return attr
        type_ = _static(attr.type, self.sizes)
        if isinstance(type_, ScalarType):
            return {"int": 1, "float": 1.0, "bool": True}[type_.kind] if type_.dim is None else type_.dim
        try:
            shape, strides = _numbers(type_.shape, {}), _numbers(type_.strides, {})
            return torch.empty_strided(shape, strides, dtype=aten.DTYPES[type_.dtype], device=META)
        except RuntimeError as error:
            raise InvalidIR(f"{attr.name} has an impossible type: {error}") from None


def _fits(type_: str, attr: Attr) -> bool:
    """Whether an attribute is of a type as schemas name it."""
    if type_.startswith("List["):
        inner = type_[5:-1]
        if isinstance(attr, tuple):
            return all(_fits(inner, item) or (inner == "Tensor" and item is None) for item in attr)
        return inner in ("int", "SymInt", "float", "bool") and _fits(inner, attr)
    if isinstance(attr, Value):
        number = isinstance(attr.type, ScalarType) and type_ in ("int", "SymInt", "float", "bool", "number")
        return number or type_ == "Tensor"
    if isinstance(attr, Sym | Expr) or type(attr) is int:
        return type_ in ("int", "SymInt", "float", "number", "Tensor")
    if isinstance(attr, bool):
        return type_ in ("bool", "int", "SymInt", "number", "Tensor")
    if isinstance(attr, float):
        return type_ in ("float", "number", "Tensor")
    named = ("str", "Any", "ScalarType", "Device", "MemoryFormat")  # Any: a process group, or its name
    return isinstance(attr, str) and type_ in named and len(attr) <= 1000


def _in_range(sym: Sym, size: int) -> int:
    """The typical size of a symbol, or one near `size` in its range."""
    low = max(sym.min, 1)
    size = max(low, size if sym.max is None else min(size, sym.max)) if sym.typical is None else sym.typical
    return max(size - size % sym.multiple, -(-low // sym.multiple) * sym.multiple)


def _numbers(dims: tuple[Dim, ...], sizes: Sizes) -> tuple[int, ...]:
    numbers = tuple([dim if type(dim) is int else evaluate(dim, sizes) for dim in dims])
    for number in numbers:
        if number is None or not -(2**63) <= number < 2**63:
            raise InvalidIR(f"a size is {number}")
    return numbers  # type: ignore[return-value]


def _static(type_: Type, sizes: Sizes) -> Type:
    """`type_` with numbers for its symbols.

    Raises:
        InvalidIR: a size or a stride is negative, or too large.
    """
    if all(type(dim) is int for dim in type_dims(type_)):
        return type_
    if isinstance(type_, ScalarType):
        return ScalarType(type_.kind, _numbers((type_.dim,), sizes)[0]) if type_.dim is not None else type_
    shape, strides = _numbers(type_.shape, sizes), _numbers(type_.strides, sizes)
    if min((*shape, *strides), default=0) < 0:
        raise InvalidIR(f"{type_} has a negative size or stride")
    return TensorType(type_.dtype, shape, strides, type_.device)


def _key(attr: Attr, sizes: Sizes) -> object:
    """A key of an argument. Includes Python types: True, 1 and 1.0 are equal."""
    if isinstance(attr, Value):
        return _static(attr.type, sizes)
    if isinstance(attr, tuple):
        return tuple([_key(item, sizes) for item in attr])
    if isinstance(attr, Sym | Expr):
        return _numbers((attr,), sizes)
    return type(attr), attr


def _form(node: Node) -> object:
    """What a check of a call depends on, besides sizes of symbols."""
    results = tuple([None if value is None else value.type for value in node.outputs])
    return node.kind, node.op, tuple([(name, _shown(attr)) for name, attr in node.args]), results


def _shown(attr: Attr) -> object:
    """An argument in `_form`: of a value its type."""
    if isinstance(attr, Value):
        return attr.type
    return tuple(map(_shown, attr)) if isinstance(attr, tuple) else (type(attr), attr)


def _apart(shape: tuple[int, ...], strides: tuple[int, ...], most: int) -> bool:
    """Whether no two elements share memory, in any order of the dimensions, that is at most so many times larger."""
    end = 1  # of what the dimensions by now take
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride < end and all(shape):
            return False
        end += stride * (size - 1)
    return end <= most * math.prod(shape) or not all(shape)
