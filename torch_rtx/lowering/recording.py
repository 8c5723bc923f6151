"""Calls that PyTorch makes of another one: its decomposition, recorded on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch._decomp import global_decomposition_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import MAIN, Attr, Node, Value
from torch_rtx.lowering.infer import Inference

TABLE: Mapping[Any, Callable[..., Any]] = global_decomposition_table["post_autograd"]
MOST_CALLS = 96  # of a decomposition
IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd
PLAIN = (bool, int, float, str, type(None))


def decomposition(overload: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What PyTorch has in place of an operator, in terms of others; None if nothing."""
    if overload.has_kernel_for_dispatch_key(IMPLICIT):
        return overload.decompose
    if overload.namespace == "prims":
        return overload.impl_aten  # type: ignore[attr-defined]
    return TABLE.get(aten.of_pytorch(overload))


def recorded(
    node: Node, infer: Inference, covered: Callable[[Node], bool], value: Callable[[Any], Value]
) -> tuple[list[Node], list[Value | None]]:
    """The calls that PyTorch makes of `node`, all of them `covered`, and the values that are its results.

    Args:
        value: a new value, of a type.

    Raises:
        Unsupported: there is no decomposition, or not of covered calls for these arguments.
    """
    overload = aten.overload(node.op)
    function = decomposition(overload)
    if function is None:
        raise Unsupported(f"{node.op} has no decomposition")
    recorder = _Recorder(infer, covered, value)
    found = infer.call(partial(recorder.run, function, overload), overload, node.args, recorder.met)
    results = found if isinstance(found, tuple | list) else (found,)
    return recorder.nodes, [recorder.attr(one) for one in results]  # type: ignore[misc]  # None or a tensor


class _Recorder(TorchDispatchMode):
    def __init__(self, infer: Inference, covered: Callable[[Node], bool], value: Callable[[Any], Value]) -> None:
        super().__init__()
        self.infer, self.covered, self.value = infer, covered, value
        self.nodes: list[Node] = []
        self.within: list[Any] = []  # the operators that are decomposed now, each in a decomposition of the one before
        self.values: dict[int, tuple[torch.Tensor, Value]] = {}  # with the tensor, whose id is in use as long

    def met(self, value: Value, tensor: torch.Tensor) -> None:
        """`tensor` stands for `value` from now on."""
        self.values[id(tensor)] = tensor, value

    def run(self, function: Callable[..., Any], overload: torch._ops.OpOverload, /, **given: Any) -> Any:
        """Record the calls of `function`, which names its arguments in another way than `overload`, but for those
        that have no place."""
        arguments = overload._schema.arguments
        named = [place for place, one in enumerate(arguments) if one.name in given and not one.kwarg_only]
        places = [given.pop(one.name, one.default_value) for one in arguments[: max(named, default=-1) + 1]]
        with self:
            try:
                return function(*places, **given)
            except Exception as error:  # whatever: without it there is the call
                raise Unsupported(str(error)) from error

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_constant(result) or func.namespace == "prim":  # of a device, or the like
            return result
        if len(self.nodes) > MOST_CALLS:
            raise Unsupported(f"a decomposition to more than {MOST_CALLS} calls")
        results = list(result) if isinstance(result, tuple | list) else [result]
        if func._schema.is_mutable or not all(isinstance(one, torch.Tensor | None) for one in results):
            raise Unsupported(f"{func} writes, or returns a number")
        outputs = tuple(None if one is None else self.value(self.infer.type(one)) for one in results)
        node = Node("op", str(func), self._arguments(func, args, kwargs), outputs)
        if str(func) not in aten.ALLOWED or not self.covered(node):
            inner = decomposition(func)
            if inner is None or func in self.within:
                raise Unsupported(f"{func} in a decomposition")
            self.within.append(func)
            with self:
                found = inner(*args, **kwargs)
            self.within.pop()
            return found
        for tensor, output in zip(results, outputs, strict=True):
            if output is not None:
                self.met(output, tensor)
        self.nodes.append(node)
        return result

    def _arguments(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[str, Attr], ...]:
        """The arguments by name, without those at their defaults."""
        given = {**dict(zip((one.name for one in func._schema.arguments), args, strict=False)), **kwargs}
        kept = []
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            if argument.name not in given or argument.name in ("pin_memory", "layout"):
                continue
            default = argument.default_value if argument.has_default_value() else ()
            if not (value is None and default is None) and not (type(value) is type(default) and value == default):
                kept.append((argument.name, self.attr(value)))
        return tuple(kept)

    @staticmethod
    def _is_constant(given: Any) -> bool:
        """A tensor with elements, which PyTorch makes of numbers of Python."""
        return isinstance(given, torch.Tensor) and given.device.type != "meta" and not isinstance(given, FakeTensor)

    def _define(self, tensor: torch.Tensor) -> None:
        if not self._is_constant(tensor) or tensor.numel() != 1:
            raise Unsupported("a tensor of PyTorch's own in a decomposition")
        value = self.value(self.infer.type(tensor))
        args = ("size", tuple(tensor.shape)), ("fill_value", tensor.item()), ("dtype", aten.dtype_name(tensor.dtype))
        self.nodes.append(Node("op", "aten.full.default", args, (value,)))
        self.met(value, tensor)

    def attr(self, given: Any) -> Attr:
        """What is given to a call, as an attribute of the IR."""
        if isinstance(given, torch.Tensor):
            if id(given) not in self.values:
                self._define(given)
            return self.values[id(given)][1]
        if isinstance(given, torch.SymInt):
            return self.infer.dim(given)
        if isinstance(given, list | tuple):
            return tuple(map(self.attr, given))
        if isinstance(given, torch.dtype):
            return aten.dtype_name(given)
        if isinstance(given, torch.device):
            return MAIN
        if isinstance(given, torch.memory_format):
            return str(given).removeprefix("torch.")
        if isinstance(given, PLAIN):
            return given
        raise Unsupported(f"an argument of type {type(given).__name__}")
