"""Captures launches of Triton kernels, also in a process that has no GPU.

PyTorch captures a launch by a higher-order operator: that of a kernel in `torch.library.wrap_triton`, which operators
made by `torch.library.triton_op` use. An export does not look into other launches, which would fail on FakeTensors;
`traced_launches` sends them the same way. To know which tensors a kernel writes, PyTorch lets Triton translate it for
the active GPU. Without one, `standing_in` names the oldest portable target as active.

PyTorch drops a launch that writes to nothing, and does not see tensors inside of other arguments, nor memory whose
addresses are numbers in a tensor. Such a launch is refused here: its results would silently be missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torch_rtx.errors import CaptureError
from torch_rtx.targets import PORTABLE

_HINT = "pass tensors as arguments of their own, or launch the kernel in an operator (torch.library.custom_op)"
_SM = min(target.sm for target in PORTABLE)


class _Driver:
    """What PyTorch and Triton ask of the active driver while they translate a kernel."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _SM, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextmanager
def standing_in() -> Iterator[None]:
    """Inside, Triton has an active driver, if it was imported: without a GPU, one that can only translate kernels."""
    if "triton" not in sys.modules:
        yield
        return
    with _checked_writes():
        if _is_active():
            yield
            return
        from triton.runtime import driver

        before = driver._active
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver._active = before


@contextmanager
def _checked_writes() -> Iterator[None]:
    """Inside, a launch whose results PyTorch would lose is a CaptureError."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    own = getattr(wrap, "get_mutated_tensors", None)
    if own is None:  # another release of PyTorch
        yield
        return

    def get_mutated_tensors(kernel_idx: int, constant_args_idx: int, *rest: Any, **named: Any) -> list[str]:
        kernel: Any = wrap.kernel_side_table.get_kernel(kernel_idx)
        _check_arguments(kernel, wrap.kernel_side_table.get_constant_args(constant_args_idx).values())
        found = own(kernel_idx, constant_args_idx, *rest, **named)
        if not found:
            problem = "writes to none of its arguments, as far as a capture sees"
            raise CaptureError(f"the Triton kernel {_function(kernel).__name__} {problem}", hint=_HINT)
        return found

    wrap.get_mutated_tensors = get_mutated_tensors
    try:
        yield
    finally:
        wrap.get_mutated_tensors = own


def _function(kernel: Any) -> Any:
    """The Python function of a kernel, which decorators surround."""
    return _function(kernel.fn) if hasattr(kernel, "fn") else kernel


def _check_arguments(kernel: Any, arguments: Iterable[Any]) -> None:
    """Raises CaptureError if a tensor is inside of another argument."""
    for value in arguments:
        if isinstance(value, torch.Tensor):
            continue
        inside = pytree.tree_leaves([value, getattr(value, "base", None)])
        if any(isinstance(one, torch.Tensor) for one in inside):
            problem = f"the Triton kernel {_function(kernel).__name__} gets a tensor inside of a {type(value).__name__}"
            raise CaptureError(f"{problem}, where a capture does not see what it writes", hint=_HINT)


def _is_active() -> bool:
    from triton.runtime import driver

    try:
        return driver.active is not None
    except RuntimeError:  # no GPU, or several kinds of them
        return False


@contextmanager
def whole_operators(inputs: Sequence[Any]) -> Iterator[None]:
    """Inside, if no input is on a GPU, operators made of Triton kernels are called: they may have a kernel for the
    CPU."""
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs):
        yield
        return
    from torch.export._trace import _disable_custom_triton_op_functional_decomposition as disabled

    with disabled():
        yield


@contextmanager
def traced_launches() -> Iterator[None]:
    """Inside, in a trace with FakeTensors, a launch of a Triton kernel becomes a node of the graph.

    Changes Triton's classes: hold a lock around it.
    """
    if "triton" not in sys.modules:
        yield
        return
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        _check_arguments(self, (*args, *kwargs.values()))
        return torch.library.wrap_triton(self)[grid](*args, **kwargs)

    classes: tuple[Any, ...] = (JITFunction, Autotuner)
    before = [kind.run for kind in classes]
    for kind in classes:
        kind.run = run
    try:
        with standing_in():
            yield
    finally:
        for kind, own in zip(classes, before, strict=True):
            kind.run = own
