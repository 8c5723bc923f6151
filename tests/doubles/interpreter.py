"""Runs generated kernels on the CPU, in Triton's interpreter.

The interpreter replaces functions of `triton.language` for the time of a call, so that kernels can be interpreted and
compiled in one process. Nine of its gaps are filled here: it computes with the bit patterns of bfloat16, it truncates
where a GPU rounds to bfloat16, it takes NaN of float8 for a number, it has no functions of libdevice, nor the
instruction that converts to float8, nor `dot_scaled`, it multiplies all bits of float32 where tensor cores read those
of TF32, it makes a tile of integers of a scalar truth value (which loads
refuse as a mask from Triton 3.9 on), and it reduces and scans one element at a time, which takes a hundred times as
long.
"""

from __future__ import annotations

import ctypes
import linecache
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, partialmethod
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton._C.libtriton import ir as tl_ir
from triton.language.extra import libdevice
from triton.runtime.jit import JITFunction

from tests.doubles import interpreter_types
from torch_rtx.accumulation import starts
from torch_rtx.aten import DTYPES
from torch_rtx.foreign import launch_in
from torch_rtx.ir import Graph, Sym, TensorType, attr_values, dim_syms, evaluate
from torch_rtx.lowering.kernels.families.foreign import grid_of
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.triton_kernels import SIZE, TENSOR, Signature, TritonKernel
from torch_rtx.targets import ALIGNMENT

# The functions of libdevice that kernels call, with those of NumPy.
LIBRARY = {"fmod": np.fmod, "pow": np.pow, "rint": np.rint, "fast_dividef": np.divide}
FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
ARITHMETIC = {"create_fadd": np.add, "create_fsub": np.subtract, "create_fmul": np.multiply}
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
LOCK = threading.RLock()  # the interpreter replaces functions for all threads


def _bf16(self: Any, value: float) -> Any:
    """A number in bfloat16, which the interpreter lacks."""
    return self.cast_impl(self.get_fp32(value), tl.bfloat16)


interpreter.InterpreterBuilder.get_bf16 = _bf16


def function(kernel: Kernel) -> JITFunction:
    """The kernel's function, from its text."""
    return _function(kernel.name, kernel.source)


@cache  # many are launched again; the interpreter keeps what it makes of a function, and each function
def _function(name: str, source: str) -> JITFunction:
    file = f"<{name} {hash(source):x}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    names: dict[str, Any] = {"__name__": name}
    exec(compile(source, file, "exec"), names)
    return names[name]


def run(kernel: Kernel, tensors: Sequence[torch.Tensor], dims: dict[str, int] | None = None) -> None:
    """One launch: `tensors` are the pointers, inputs then outputs; `dims` gives symbols their numbers."""
    sizes = dims or {}
    assert {sym.name for dim in (*kernel.scalars, *kernel.grid) for sym in dim_syms(dim)} <= sizes.keys()
    grid = tuple(evaluate(dim, sizes) for dim in kernel.grid)
    scalars = [evaluate(dim, sizes) for dim in kernel.scalars]
    if 0 in grid:
        return
    # A float8 that the target does not have is bytes to the kernel.
    pairs = zip(tensors, kernel.pointers, strict=True)
    tensors = [x.view(DTYPES[dtype]) if x.element_size() == 1 else x for x, dtype in pairs]
    with LOCK, _interpreting():
        interpreter.InterpretedFunction(function(kernel).fn)[grid](*tensors, *scalars)


def begin(body: Graph, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """Let the outputs of a kernel hold what its body adds to."""
    given = {value.name: tensor for value, tensor in zip(body.inputs, inputs, strict=True)}
    begun = starts(body)
    for value, output in zip(attr_values(body.outputs), outputs, strict=True):
        if value.name in begun:
            output.copy_(given[begun[value.name].name])


class Interpreted:
    """Stands for a launcher: runs a kernel in the memory that it is given addresses of."""

    waiting: tuple[int, ...] = ()

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.scalars, self.grid = kernel, kernel.scalars, kernel.grid
        self.launches = 0

    def __call__(self, pointers: Sequence[int], scalars: Sequence[int], grid: tuple[int, int, int]) -> None:
        assert all(pointer % ALIGNMENT == 0 for pointer in pointers)
        assert len(pointers) == len(self.kernel.pointers)
        self.launches += 1
        if 0 in grid:
            return
        tensors = [_at(address, DTYPES[dtype]) for address, dtype in zip(pointers, self.kernel.pointers, strict=True)]
        with LOCK, _interpreting():
            interpreter.InterpretedFunction(function(self.kernel).fn)[grid](*tensors, *scalars)


def run_foreign(kernel: TritonKernel, tensors: Sequence[torch.Tensor], sizes: Sequence[int], which: int = 0) -> None:
    """Stands for `TritonKernel.run` on the CPU."""
    start = kernel.integers + 3 * which
    given: dict[str, Sequence[Any]] = {TENSOR: tensors, SIZE: sizes}
    values = {a.name: given[a.kind][int(a.value)] if a.kind in given else a.value for a in kernel.arguments}
    grid = tuple(sizes[start : start + 3])
    if 0 not in grid:
        with LOCK, _interpreting():
            interpreter.InterpretedFunction(kernel.function.fn)[grid](**values, **kernel.configs[which].constants)


class InterpretedForeign:
    """Stands for the launcher of a Triton kernel that others wrote: gets addresses, and passes on what slots say.

    Args:
        body: of the kernel node.
        which: the configuration.
    """

    def __init__(self, kernel: TritonKernel, body: Graph, which: int = 0) -> None:
        found = launch_in(body)
        assert found is not None
        self.signature = Signature(kernel, body, found[1], dict(kernel.configs[which].constants))
        self.kernel, self.slots = kernel, self.signature.slots
        self.scalars, self.grid = tuple(self.signature.scalars), grid_of(found[1], kernel.integers, which)
        types = (value.type for value in (*body.inputs, *attr_values(body.outputs)))
        self.dtypes = [DTYPES[type_.dtype] for type_ in types if isinstance(type_, TensorType)]
        self.launches = 0

    def __call__(self, pointers: Sequence[int], scalars: Sequence[int], grid: tuple[int, int, int]) -> None:
        assert all(pointer % ALIGNMENT == 0 for pointer in pointers)
        self.launches += 1
        tensors = [_at(address, dtype) for address, dtype in zip(pointers, self.dtypes, strict=True)]
        sources: dict[str, Sequence[Any]] = {"tensor": tensors, "scalar": scalars}
        values = [s.value if s.source == "constant" else sources[s.source][int(s.value)] for s in self.slots]
        given = {**dict(zip(self.signature.types, values, strict=True)), **self.signature.constants}
        if 0 not in grid:
            with LOCK, _interpreting():
                interpreter.InterpretedFunction(self.kernel.function.fn)[grid](**given)


def _at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """The element at an address; an empty tensor has none."""
    if not address:
        return torch.empty(1, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


@contextmanager
def _interpreting() -> Iterator[None]:
    replaced = [
        (owner, name, getattr(owner, name))
        for owner, name in (
            (JITFunction, "__call__"),
            (interpreter.InterpreterBuilder, "create_dot"),
            (interpreter.InterpreterBuilder, "cast_impl"),
            (interpreter.InterpreterBuilder, "create_fp_to_fp"),
            (interpreter.InterpreterBuilder, "create_inline_asm"),
            (interpreter.InterpreterBuilder, "create_splat"),
            *((interpreter.InterpreterBuilder, name) for name in ARITHMETIC),
            (interpreter.ReduceOps, "generic_reduce"),
            (interpreter.ScanOps, "generic_scan"),
            (interpreter.interpreter_builder, "options"),
            (tl, "dot_scaled"),
            *((libdevice, name) for name in LIBRARY),
            *((owner, name) for owner, name, _ in interpreter_types.REPLACED),
        )
    ]
    dot, cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl
    language = interpreter_types.language()
    for owner, name, _, new in language:
        setattr(owner, name, new)
    functions: dict[int, Callable[..., Any]] = {}

    def call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in functions:
            functions[id(self)] = interpreter.InterpretedFunction(self.fn).rewrite()
        return functions[id(self)](*args, **kwargs)

    def create_dot(self: Any, a: Any, b: Any, sums: Any, precision: Any, *rest: Any) -> Any:
        if precision == tl_ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            a, b = _tf32(a), _tf32(b)
        return dot(self, _widened(a), _widened(b), sums, precision, *rest)

    def cast_impl(self: Any, source: Any, type_: Any) -> Any:
        if source.dtype.scalar.is_int() and type_.scalar == tl.bfloat16:
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        if source.dtype.scalar == tl.float32 and type_.scalar == tl.bfloat16:
            bits = source.data.astype(np.float32).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            rounded = np.where(np.isnan(source.data), bits | np.uint32(0x400000), rounded)
            return interpreter.TensorHandle((rounded >> 16).astype(np.uint16), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and type_.scalar == tl.float32:
            return _widened(source)
        return cast(self, source, type_)

    def create_fp_to_fp(self: Any, source: Any, type_: Any, rounding: Any) -> Any:
        assert type_.scalar not in FLOAT8, "Triton rounds to float8 twice on sm_89"
        return cast(self, _widened(source), type_)

    def create_inline_asm(self: Any, text: str, registers: str, values: Any, *rest: Any) -> Any:
        assert "cvt.rn.satfinite.e4m3x2.f32" in text
        (value,) = values
        data = torch.from_numpy(value.data).clamp(-448, 448).to(torch.float8_e4m3fn)
        result = interpreter.TensorHandle(data.view(torch.uint8).numpy(), tl.uint8)
        return types.SimpleNamespace(get_result=lambda index: result)

    def arithmetic(function: np.ufunc, self: Any, one: Any, other: Any) -> Any:
        found = function(_widened(one).data, _widened(other).data)
        if one.dtype.scalar != tl.bfloat16:  # a kernel of float32 may be given float64
            return interpreter.TensorHandle(found, tl.float64 if found.dtype == np.float64 else one.dtype.scalar)
        return cast_impl(self, interpreter.TensorHandle(found, tl.float32), tl.bfloat16)

    def dot_scaled(a: Any, a_scale: Any, a_format: str, b: Any, b_scale: Any, b_format: str, acc: Any) -> Any:
        left = _scaled(a.handle.data, a_scale.handle, a_format)
        right = _scaled(b.handle.data.T, b_scale.handle, b_format)
        total = (acc.handle.data + left @ right.T).astype(np.float32)
        return tl.core.tensor(interpreter.TensorHandle(total, acc.handle.dtype), acc.type)

    def create_splat(_: Any, type_: Any, scalar: Any) -> Any:
        # A comparison's data are truth values, though its handle keeps the dtype of the operands.
        return interpreter.TensorHandle(np.full(type_.shape, scalar.data.flat[0]), scalar.dtype.scalar)

    JITFunction.__call__ = call
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    interpreter.InterpreterBuilder.create_splat = create_splat
    for name, ufunc in ARITHMETIC.items():
        setattr(interpreter.InterpreterBuilder, name, partialmethod(partial(arithmetic, ufunc)))
    interpreter.ReduceOps.generic_reduce = _reduced
    interpreter.ScanOps.generic_scan = _scanned
    # Otherwise overflows of integers are computed, which takes longer than all the rest, and reported in `debug` alone.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    tl.dot_scaled = dot_scaled
    for owner, name, new in interpreter_types.REPLACED:
        setattr(owner, name, new)
    for name, function in LIBRARY.items():
        setattr(libdevice, name, partial(_library, function))
    try:
        yield
    finally:
        for owner, name, before in replaced:
            setattr(owner, name, before)
        interpreter_types.put_back(language)


def _library(function: Callable[..., np.ndarray], first: Any, *others: Any) -> Any:
    """A function of libdevice by that of NumPy."""
    result = sum(others, first)  # of the type of the function's
    data = function(*(one.handle.data if isinstance(one, tl.tensor) else one for one in (first, *others)))
    return tl.tensor(interpreter.TensorHandle(data, result.handle.dtype), result.type)


def _combined(ops: Any, types: Sequence[Any], first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Any:
    """What a reduction or scan makes of two parts of its arrays, element by element."""
    both = [ops.to_tensor(data, dtype) for part in (first, second) for data, dtype in zip(part, types, strict=True)]
    found = ops.combine_fn.fn(*both)
    return [one.handle.data for one in (found if isinstance(found, tuple) else (found,))]


def _reduced(self: Any, values: Sequence[Any]) -> list[Any]:
    """Neighbours are combined until one is left, as a GPU does it."""
    arrays, types = [value.handle.data for value in values], [value.dtype for value in values]
    axis, kept = self.axis, [1] * arrays[0].ndim
    if axis is None:
        axis, arrays = 0, [data.reshape(-1) for data in arrays]
    else:
        kept = [1 if at == axis else size for at, size in enumerate(arrays[0].shape)]
    while (count := arrays[0].shape[axis]) > 1:
        assert count % 2 == 0, "blocks are powers of two"
        first, second = ([data.take(range(start, count, 2), axis) for data in arrays] for start in (0, 1))
        arrays = _combined(self, types, first, second)
    arrays = [data.reshape(kept) if self.keep_dims else data.squeeze(axis) for data in arrays]
    return [self.to_tensor(data, dtype) for data, dtype in zip(arrays, types, strict=True)]


def _scanned(self: Any, values: Sequence[Any]) -> list[Any]:
    """Each element is combined with the one 1, 2, 4, ... places before it."""
    arrays, types = [value.handle.data for value in values], [value.dtype for value in values]
    rank, count = arrays[0].ndim, arrays[0].shape[self.axis]
    places = np.arange(count).reshape([-1 if at == self.axis % rank else 1 for at in range(rank)])
    step = 1
    while step < count:
        found = _combined(self, types, [np.roll(data, step, self.axis) for data in arrays], arrays)
        arrays = [np.where(places < step, data, new) for data, new in zip(arrays, found, strict=True)]
        step *= 2
    return [self.to_tensor(data, dtype) for data, dtype in zip(arrays, types, strict=True)]


def _scaled(data: Any, scales: Any, kind: str) -> Any:
    """The values of rows of K of `tl.dot_scaled` times the scales of their blocks, in float64."""
    if kind == "e2m1":
        values = np.array(E2M1)[np.stack((data & 15, data >> 4), -1).reshape(len(data), -1)]
    else:
        dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
        values = torch.from_numpy(np.ascontiguousarray(data)).view(dtype).double().numpy()
    dtype = torch.float8_e4m3fn if scales.dtype.scalar == tl.float8e4nv else torch.float8_e8m0fnu
    factors = torch.from_numpy(scales.data).view(dtype).double().numpy()
    return values * factors.repeat(values.shape[1] // factors.shape[1], 1)


def _tf32(handle: Any) -> Any:
    """What tensor cores read of numbers of float32, in NVIDIA's GPUs: not the last 13 bits."""
    bits = np.ascontiguousarray(handle.data, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar in FLOAT8:
        data = torch.from_numpy(handle.data).view(FLOAT8[handle.dtype.scalar]).float().numpy()
        return interpreter.TensorHandle(data, tl.float32)
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


__all__ = ["LOCK", "Interpreted", "InterpretedForeign", "Sym", "begin", "function", "run", "run_foreign"]
