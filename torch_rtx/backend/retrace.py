"""The backward graph of a training step that came from the engine cache: for compiled autograd, which inlines it, and
for other undefined gradients than those that the cached engine is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import TracingContext, tracing
from torch.utils._python_dispatch import _disable_current_modes

from torch_rtx.errors import CaptureError


class Retrace:
    """Captures a Dynamo graph when it is asked to, in the state of PyTorch in which it was created.

    Args:
        capture: see `capture.capture`, without the graph.
    """

    def __init__(self, capture: Callable[..., object], example_inputs: Sequence[torch.Tensor]) -> None:
        self._capture, self._context = capture, TracingContext.get()
        fake_mode = self._context.fake_mode
        assert fake_mode is not None
        self._inputs = [fake_mode.from_tensor(given, static_shapes=True) for given in example_inputs]
        self._modes = [_autocast(device) for device in ("cpu", "cuda")]

    def backward(self, names: Sequence[str]) -> fx.GraphModule:
        """The backward graph.

        Raises:
            CaptureError: its placeholders are not called `names`, so that it is not the one of the cached forward.
        """
        graphs: list[fx.GraphModule] = []

        def note(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        def skip(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            return make_boxed_func(graph.forward)

        settings = functorch_config.patch(force_non_lazy_backward_lowering=True)
        with ExitStack() as stack, _disable_current_modes(), tracing(self._context), torch.enable_grad(), settings:
            stack.enter_context(_compiling())
            for mode in self._modes:
                stack.enter_context(mode)
            self._capture(self._inputs, skip, skip, note)
        if [node.name for graph in graphs for node in graph.graph.find_nodes(op="placeholder")] != list(names):
            hint = "compile the model with reuse_cached_engines=False"
            raise CaptureError("this step has another backward graph than the cached one", hint=hint)
        return graphs[0]


@contextmanager
def _compiling() -> Iterator[None]:
    """As while Dynamo compiles: calls of compiled functions in other threads would take the trace for one of theirs,
    and raise."""
    with compile_lock:
        before = torch.compiler._is_compiling_flag
        torch.compiler._is_compiling_flag = True
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = before


def _autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
