"""Captures launches of Triton kernels, also in a process that has no GPU.

PyTorch captures a launch by a higher-order operator: that of a kernel in `torch.library.wrap_triton`, which operators
made by `torch.library.triton_op` use. An export does not look into other launches, which would fail on FakeTensors;
`traced_launches` sends them the same way. To know which tensors a kernel writes, PyTorch lets Triton translate it for
the active GPU. Without one, `standing_in` names the oldest portable target as active.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torch_rtx.targets import PORTABLE

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
    if "triton" not in sys.modules or _is_active():
        yield
        return
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver())
    try:
        yield
    finally:
        driver._active = before


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
