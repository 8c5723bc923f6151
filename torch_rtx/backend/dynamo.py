"""Dynamo beside the graphs that it gives: what it leaves to Python, and how an error gets past it to the user."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from types import FrameType
from typing import Any

from torch import fx
from torch._dynamo import config, convert_frame, eval_frame, trace_rules
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.utils import graph_break_reasons

from torch_rtx.errors import PartitionError, RtxError

# ---- what Dynamo leaves to Python ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Break:
    """Code of a compiled function that is in no graph: why, and at which line."""

    reason: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.reason} ({self.file}:{self.line})" if self.file else self.reason


def break_after(gm: fx.GraphModule) -> Break | None:
    """The graph break that ends a Dynamo graph; None if the graph ends with its function."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return _break(reason) if getattr(reason, "graph_break", False) else None


def break_before() -> Break | None:
    """Why Python runs the function that calls the one which is being compiled, within one call of a compiled function;
    None if it does not. A break before the first operation of a graph, and a function that Dynamo can't compile at all,
    show here alone."""
    frame = _running()
    if frame is None:
        return None
    code = frame.f_code
    lines = {line for *_, line in code.co_lines()}
    known = (found for found in breaks(0) if found.file == code.co_filename and found.line in lines)
    unknown = Break(f"{code.co_qualname} can't be compiled as a whole", code.co_filename, frame.f_lineno)
    return next(known, unknown)


def breaks(start: int) -> list[Break]:
    """The graph breaks of this process, the latest first; without the first `start` ones."""
    return [_break(reason) for reason in reversed(graph_break_reasons[start:])]


def require_one_graph(gm: fx.GraphModule) -> None:
    """Raises PartitionError if code of the compiled function is in no graph."""
    found = break_after(gm) or break_before()
    if found is not None:
        raise PartitionError(
            f"require_full_compilation is set and a graph break leaves code to Python: {found}",
            hint="change this line, or compile what it calls by itself; explain() lists all graph breaks, and "
            "torch.compile(fullgraph=True) says more about the first one",
        )


def _running() -> FrameType | None:
    """The innermost frame of Python code between a call of a compiled function and the compilation that it started; not
    counting frames that Dynamo is told to skip, as those of PyTorch's own wrappers."""
    frame: FrameType | None = sys._getframe(1)
    found, inside = None, True  # inside of Dynamo, whose outermost frame below that of the call is one of convert_frame
    while frame is not None:
        file = frame.f_code.co_filename
        if file == convert_frame.__file__:
            found, inside = None, False
        elif file == eval_frame.__file__ and not inside:
            return found
        elif found is None and not inside and not trace_rules.check(frame.f_code):
            found = frame
        frame = frame.f_back
    return None  # nobody called a compiled function: a compilation of another kind, such as of a backward


def _break(reason: Any) -> Break:
    """One of Dynamo's reasons: its first line, and its explanation, if there is one."""
    frame = reason.user_stack[-1] if reason.user_stack else None
    text, _, more = str(reason.reason).strip().partition("\n")
    found = re.search(r"^ *Explanation: (.*)", more, re.MULTILINE)
    text += f": {found[1].rstrip('. ')}" if found else ""
    return Break(text, "", 0) if frame is None else Break(text, frame.filename, frame.lineno or 0)


# ---- errors ----------------------------------------------------------------------------------------------------------


class _Passed(ShortenTraceback):
    """Errors of this class pass Dynamo as they are; it wraps others in one of its own. To all errors it adds its own
    frames, and how to report bugs of PyTorch: these show neither."""

    plain: tuple[Any, ...]

    def __str__(self) -> str:
        return self.plain[1][1]

    def remove_dynamo_frames(self) -> _Passed:
        """The error without its traceback, unless Dynamo is told to be verbose."""
        return self if config.verbose else self.with_traceback(None)


@cache
def _class(kind: type[RtxError]) -> type[Any]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, _Passed), {**names, "__reduce__": lambda error: error.plain})


def passes_errors(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend, whose RtxErrors reach the caller of the compiled function with their type, once."""

    @wraps(backend)
    def passing(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        try:
            return backend(gm, example_inputs, **kwargs)
        except RtxError as error:
            passed = BaseException.__new__(_class(type(error)))  # type: ignore[arg-type]
            ShortenTraceback.__init__(passed, str(error), first_useful_frame=None)
            vars(passed).update(vars(error), plain=error.__reduce__())
            raise passed.with_traceback(error.__traceback__) from error.__cause__

    return passing
