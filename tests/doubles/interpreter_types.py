"""What Triton's interpreter makes again for each operation, made once: half of its time are types and their names."""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter

_block_type, _numpy_dtype = tl.block_type.__init__, interpreter._get_np_dtype
_blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # by element and shape: attributes of the type
_tensors: dict[str, tuple[Any, Any]] = {}  # by the type's name: shape and number of elements, as a tensor has them
_dtypes: dict[str, Any] = {}


def block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """`tl.block_type.__init__`."""
    key = element_ty.name, *(shape.values if isinstance(shape, tl.tuple) else shape)
    if key not in _blocks:
        _block_type(self, element_ty, shape)
        _blocks[key] = self.shape, self.numel, self.name
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _blocks[key]


def tensor(self: Any, handle: Any, type: Any) -> None:
    """`tl.tensor.__init__`."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if type.name not in _tensors:
        sizes = [tl.constexpr(size) for size in type.shape] if type.is_block() else []
        _tensors[type.name] = tl.tuple(sizes), tl.constexpr(type.numel if type.is_block() else 1)
    self.shape, self.numel = _tensors[type.name]


def numpy_dtype(type: Any) -> Any:
    """`interpreter._get_np_dtype`."""
    if type.name not in _dtypes:
        _dtypes[type.name] = _numpy_dtype(type)
    return _dtypes[type.name]


def unchanged(_: Any) -> Any:
    """`interpreter._patch_lang` where the language is already that of the interpreter: changes nothing."""
    return interpreter._LangPatchScope()


def place(self: Any) -> tuple[str, int]:
    """`interpreter.FunctionRewriter._get_jit_fn_file_line`, which reads the source once more for it."""
    return self.fn.__code__.co_filename, self.fn.__code__.co_firstlineno


def block(lines: list[str]) -> list[str]:
    """`inspect.getblock`, which reads a kernel's tokens, of a function that no text within is at the margin of."""
    margin, begun = len(lines[0]) - len(lines[0].lstrip()), False
    for index, line in enumerate(lines):
        words = line.lstrip()
        if not words or len(line) - len(words) > margin or words[0] in "#)":
            continue
        if begun:
            return lines[:index]
        begun = words.startswith("def ")
    return lines


REPLACED = (
    (inspect, "getblock", block),
    (tl.block_type, "__init__", block_type),
    (tl.tensor, "__init__", tensor),
    (interpreter, "_get_np_dtype", numpy_dtype),
    (interpreter, "_patch_lang", unchanged),
    (interpreter.FunctionRewriter, "_get_jit_fn_file_line", place),
)
