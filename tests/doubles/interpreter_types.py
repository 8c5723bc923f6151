"""What Triton's interpreter makes again for each operation, launch or function, made once, and by a shorter way: more
than half of its time are types, constants, what it puts in Triton's language, and syntax trees."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

_block_type, _numpy_dtype = tl.block_type.__init__, interpreter._get_np_dtype
_blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # by element and shape: attributes of the type
_tensors: dict[str, tuple[Any, Any]] = {}  # by the type's name: shape and number of elements, as a tensor has them
_dtypes: dict[str, Any] = {}
_broadcast, _scalar = TritonSemantic.broadcast_impl_value, TritonSemantic.scalar_constant
_scalars: dict[tuple[Any, ...], Any] = {}  # by the number's type, its text, and the dtype
_MISSING = object()
_language: list[tuple[Any, str, Any, Any]] = []  # owner and name of what the interpreter replaces, before and after


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


def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
    """`TritonSemantic.broadcast_impl_value`, which compares the sizes of equal shapes one by one."""
    one, other = lhs.type, rhs.type
    if one.is_block() and other.is_block() and list(one.shape) == list(other.shape):
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


def scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
    """`TritonSemantic.scalar_constant`."""
    key = type(value), repr(value), dtype.name  # -0.0 is not 0.0
    if key not in _scalars:
        _scalars[key] = _scalar(self, value, dtype)
    return _scalars[key]


def _called(member: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Triton's language as the interpreter calls it."""
    function = getattr(member, "__wrapped__", member)  # without the check that it is not called from elsewhere

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    return call


def language() -> list[tuple[Any, str, Any, Any]]:
    """What the interpreter replaces in Triton's language for a launch, which it looks for in hundreds of names each
    time: owner, name, what is there otherwise (`_MISSING`: nothing), and what the interpreter puts there."""
    if not _language:
        scope = interpreter._patch_lang(types.FunctionType((lambda: 0).__code__, {"tl": tl, "core": tl.core}))
        found = {(id(owner), name): (owner, name, getattr(owner, name)) for owner, name, _ in scope._changes}
        scope.restore()
        for owner, name, new in found.values():
            before = getattr(owner, name, _MISSING)
            is_wrapper = "_patch_attr" in getattr(new, "__qualname__", "")  # which only adds `_semantic`
            _language.append((owner, name, before, _called(before) if is_wrapper else new))
    return _language


def put_back(replaced: list[tuple[Any, str, Any, Any]]) -> None:
    """Undo what `language` names."""
    for owner, name, before, _ in replaced:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def unchanged(_: Any) -> Any:
    """`interpreter._patch_lang` where the language is already that of the interpreter: changes nothing."""
    return interpreter._LangPatchScope()


def place(self: Any) -> tuple[str, int]:
    """`interpreter.FunctionRewriter._get_jit_fn_file_line`, which reads the source once more for it."""
    return self.fn.__code__.co_filename, self.fn.__code__.co_firstlineno


def transformed(self: Any, source: str) -> ast.Module:
    """`interpreter.FunctionRewriter._transform_ast`, which walks all nodes three times for what is in statements."""
    tree = ast.parse("\n" * (self.def_file_lineno - 1) + source)
    for node in _statements(tree.body):
        if isinstance(node, ast.Assign):
            assert len(node.targets) == 1, "Triton has no chained assignments"
            name = ast.Name("interpreter_semantic", ast.Load())
            call = ast.Call(ast.Attribute(name, "to_tensor", ast.Load()), [node.value, ast.Constant(False)], [])
            for new in (name, call.func, call, call.args[1]):
                ast.copy_location(new, node.value)
            node.value = call
    return tree


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a function's body, and those within them."""
    for node in body:
        yield node
        for name in ("body", "orelse"):
            yield from _statements(getattr(node, name, []))


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
    (TritonSemantic, "broadcast_impl_value", broadcast_impl_value),
    (TritonSemantic, "scalar_constant", scalar_constant),
    (interpreter, "_patch_lang", unchanged),
    (interpreter.FunctionRewriter, "_transform_ast", transformed),
    (interpreter.FunctionRewriter, "_get_jit_fn_file_line", place),
)
