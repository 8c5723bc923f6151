"""Type inference of new nodes: runs the node's ATen call on fake tensors instead of handwritten shape functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Expr, Sym, TensorType, Type, Value, attr_dims, attr_values, type_dims
from torch_rtx.lowering.symbols import UNBOUNDED, convert

OPERATORS = {
    "+": operator.add,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": torch.sym_min,
    "max": torch.sym_max,
}
# Devices that replace MAIN: static calls run on meta tensors, symbolic ones in a FakeTensorMode, which takes 10 times
# as long.
META, FAKE = torch.device("meta"), torch.device("cpu")
# Calls whose meta functions in PyTorch do not broadcast symbolic sizes, by other calls.
DECOMPOSED = {"aten.addcmul.default": lambda self, tensor1, tensor2, value=1: self + value * tensor1 * tensor2}


class Inference:
    """Infers types of calls over one graph's symbols; caches equal calls."""

    def __init__(self) -> None:
        self._cache: dict[object, tuple[Type | None, ...]] = {}
        self._new_symbols()

    def _new_symbols(self) -> None:
        self._env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env)
        self._symints: dict[str, int | torch.SymInt] = {}
        self._dims: dict[Any, Dim] = {}

    def __call__(self, op: str, args: Sequence[tuple[str, Attr]]) -> tuple[Type | None, ...]:
        """The types of the results of `op(args)`; None for a gradient that the call is told not to compute.

        Raises:
            Unsupported: the call rejects these types, accepts them for some sizes in the symbols' ranges only, or
                returns a size that dims can't express.
        """
        key = (op, tuple([(name, _key(attr)) for name, attr in args]))
        if key not in self._cache:
            self._cache[key] = self._run(op, args)
        return self._cache[key]

    def _run(self, op: str, args: Sequence[tuple[str, Attr]]) -> tuple[Type | None, ...]:
        overload = aten.overload(op)
        function = DECOMPOSED.get(op, overload) if is_symbolic(args) else overload
        result = self.call(function, overload, args)
        results = result if isinstance(result, tuple | list) else (result,)
        return tuple(None if item is None else self.type(item) for item in results)

    def call(
        self,
        function: Callable[..., Any],
        overload: torch._ops.OpOverload,
        args: Sequence[tuple[str, Attr]],
        met: Callable[[Value, torch.Tensor], None] = lambda value, tensor: None,
    ) -> Any:
        """What `function`, in place of the operator `overload`, returns for fake tensors in place of the values of
        `args`; `met` is called with each of these.

        Raises:
            Unsupported: as for a call of the inference itself.
        """
        symbolic, schema = is_symbolic(args), aten.schema(overload)
        with self._mode if symbolic else nullcontext():
            device = FAKE if symbolic else META
            concrete = {name: self._concrete(attr, device, met) for name, attr in args}
            given = {name: aten.to_torch(schema[name][0], one, device) for name, one in concrete.items()}
            try:
                result = function(**given)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                self._new_symbols()
                raise Unsupported(f"{overload} does not take these arguments: {error}") from None
        if self._env.guards:
            condition = self._env.guards[-1].expr
            self._new_symbols()  # the old environment would assume the condition from now on
            raise Unsupported(f"{overload} takes these arguments only if {condition}")
        return result

    def _concrete(self, attr: Attr, device: torch.device, met: Callable[[Value, torch.Tensor], None]) -> Any:
        if isinstance(attr, tuple):
            return [self._concrete(item, device, met) for item in attr]
        if isinstance(attr, Sym | Expr):
            return self._symint(attr)
        if not isinstance(attr, Value):
            return attr
        if not isinstance(attr.type, TensorType):
            raise Unsupported("a scalar value")
        sizes, strides = ([self._symint(dim) for dim in dims] for dims in (attr.type.shape, attr.type.strides))
        tensor = torch.empty_strided(sizes, strides, dtype=aten.DTYPES[attr.type.dtype], device=device)
        met(attr, tensor)
        return tensor

    def _symint(self, dim: Dim) -> int | torch.SymInt:
        if isinstance(dim, int):
            return dim
        if isinstance(dim, Sym):
            if dim.name not in self._symints:
                # Distinct hints, if the range allows: PyTorch would guard on the equality of equal hints. As in a
                # capture, sizes are at least 2, and the results are assumed to hold for 0 and 1, too.
                low, high = dim.min, UNBOUNDED if dim.max is None else dim.max
                positive = None if low < 0 else True  # None: any sign
                low, high = (max(low, 2), max(high, 2)) if positive else (low, high)
                hint = min(max(low, 2) + 1009 + 2 * len(self._symints), high)
                source = ConstantSource(dim.name)
                symbol = self._env.create_symbol(hint, source, DimDynamic.DYNAMIC, None, positive, True)
                symint = self._env.create_symintnode(symbol, hint=hint, source=source)
                self._env.constrain_symbol_range(symbol, low, high)
                self._symints[dim.name] = symint
                self._dims[symbol] = dim
            return self._symints[dim.name]
        return reduce(OPERATORS[dim.op], map(self._symint, dim.args))

    def type(self, tensor: torch.Tensor) -> TensorType:
        """The type of a fake tensor, on MAIN."""
        shape, strides = (tuple(self.dim(size) for size in sizes) for sizes in (tensor.shape, tensor.stride()))
        return TensorType(aten.dtype_name(tensor.dtype), shape, strides)

    def _known(self, leaf: Any) -> Dim:
        if leaf not in self._dims:
            raise Unsupported(f"the size {leaf}")
        return self._dims[leaf]

    def dim(self, size: int | torch.SymInt) -> Dim:
        """A size of a fake tensor."""
        return size if isinstance(size, int) else convert(size.node.expr, self._known)


def _key(attr: Attr) -> object:
    """A cache key. Includes Python types: True, 1 and 1.0 are equal but lead to different dtypes."""
    if isinstance(attr, Value):
        return attr.type
    return tuple(map(_key, attr)) if isinstance(attr, tuple) else (type(attr), attr)


def is_symbolic(args: Sequence[tuple[str, Attr]]) -> bool:
    """Whether a dim in the arguments, or in the type of a value in them, is not a number."""
    attrs = tuple(attr for _, attr in args)
    dims = (dim for value in attr_values(attrs) for dim in type_dims(value.type))
    return any(True for _ in attr_dims(attrs)) or any(isinstance(dim, Sym | Expr) for dim in dims)
