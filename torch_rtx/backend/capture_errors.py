"""Why a model can't be captured ahead of time, or not as it is: what torch.export raises, as CaptureErrors."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import config
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from torch_rtx.errors import CaptureError, RtxError
from torch_rtx.lowering.location import Locations
from torch_rtx.runtime.module import CompiledModule

log = logging.getLogger(__name__)
# Packages whose frames in a traceback say nothing about the model.
_INTERNAL = sys.stdlib_module_names | {"torch", "sympy", "triton", "torch_rtx"}
_OTHERWISE = 'torch.compile(model, backend="rtx") captures more: it breaks the graph there'

# ---- before a capture ------------------------------------------------------------------------------------------------


def checked_model(model: Any, args: object, kwargs: Mapping[str, Any] | None) -> Any:
    """The model to capture: of what torch.compile returned the model itself, whose weights have their own names.

    Raises:
        CaptureError: no capture of `model` can succeed, or its forward does not take the arguments.
    """
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    if isinstance(model, CompiledModule):
        raise CaptureError("a CompiledModule is compiled already", hint="compile the model that it was built from")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a ScriptModule can't be captured", hint="compile the module that it was made of")
    if not isinstance(model, nn.Module) or not isinstance(args, tuple):
        return model  # an ExportedProgram; or what `capture_export` refuses
    if not isinstance(kwargs, Mapping | None):
        raise CaptureError(f"kwargs must be a dictionary, not a {type(kwargs).__name__}")
    taken = inspect.signature(model.forward)
    try:
        taken.bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise CaptureError(
            f"the model's forward does not take these arguments: {error}", hint=f"it is forward{taken}"
        ) from None
    return model


# ---- what torch.export raises ----------------------------------------------------------------------------------------


@contextmanager
def explained() -> Iterator[None]:
    """Turns what torch.export, or the model while it is traced, raises inside into a CaptureError with the line of the
    model and a remedy. The cause keeps the frames of the model alone, unless Dynamo is told to be verbose."""
    try:
        yield
    except RtxError as error:
        frames = list(_model_frames(error.__traceback__)) if isinstance(error, CaptureError) and not error.loc else []
        if not frames:
            raise
        raise CaptureError(error.message, loc=_line(frames[-1]), hint=error.hint) from None
    except Exception as error:
        frames = list(_model_frames(error.__traceback__))
        loc = _line(frames[-1]) if frames else None
        problem, hint = _explanation(error, in_model=bool(frames))
        if not config.verbose:
            error.__cause__, error.__suppress_context__ = None, True
            error.__traceback__ = _chain(frames)
        raise CaptureError(problem, loc=loc, hint=hint) from error


def _line(frame: TracebackType) -> str:
    """File and line of a frame."""
    return f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"


def _model_frames(tb: TracebackType | None) -> Iterator[TracebackType]:
    while tb is not None:
        package = tb.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if package and package not in _INTERNAL:  # generated code has no package
            yield tb
        tb = tb.tb_next


def _chain(frames: list[TracebackType]) -> TracebackType | None:
    """A traceback of these frames alone."""
    chain = None
    for tb in reversed(frames):
        chain = TracebackType(chain, tb.tb_frame, tb.tb_lasti, tb.tb_lineno)
    return chain


def _explanation(error: Exception, in_model: bool) -> tuple[str, str]:
    """The problem and the remedy; `in_model`: a line of the model raised the error."""
    lines = str(error).strip().splitlines() or [""]
    returned = re.match(r"Found (?:<class ')?([\w.]+)(?:'>)? in output", lines[0])
    if isinstance(error, GuardOnDataDependentSymNode):
        problem = "the model decides something in Python by the values of a tensor"
        hint = f"use torch.cond or torch.where; {_OTHERWISE}"
    elif returned is not None:
        problem = f"the model returns a {returned[1]}"
        hint = "return tensors in tuples, lists and dictionaries, or register the class by torch.utils._pytree"
        hint += "; a model of transformers: pass use_cache=False" * ("Cache" in problem)
    elif (given := re.match(r"Unsupported input type <class '([\w.]+)'>", lines[0])) is not None:
        problem = f"an argument is a {given[1]}"
        hint = "pass tensors and numbers, or tuples, lists and dictionaries of these"
    elif isinstance(error, ConstraintViolationError):
        problem = f"an argument is outside of what dynamic_shapes declares: {lines[0]}"
        hint = "pass arguments of sizes in the ranges"
    elif isinstance(error, IndexError) and not in_model:
        problem = f"dynamic_shapes names an axis that an argument does not have: {lines[0]}"
        hint = "axes are counted from 0"
    elif "__obj_flatten__" in lines[0]:
        problem = "the model holds a script object, such as the packed weights of a quantized module"
        hint = "compile the model before it is quantized, or move what the object does out of the model"
    elif isinstance(error, UserError) and error.error_type is UserErrorType.CONSTRAINT_VIOLATION:
        said = [line.strip(" -") for line in lines if line.startswith("  - ")] or lines[:1]
        problem = f"the model does not take all sizes of dynamic_shapes: {'; '.join(said)}"
        fixes = [line.strip() for line in lines if re.match(r"  \w+ = ", line)]
        parts = re.search(r"% (\d+)\)? == 0", problem)
        multiples = "other sizes" if parts is None else f"multiples, {parts[1]} * torch.export.Dim(...)"
        hint = f"declare {', '.join(fixes) if fixes and parts is None else multiples}"
        hint += ", or the ranges of the inputs by torch_rtx.Input"
    elif "dynamic_shapes" in lines[0]:
        problem = re.split(r" (?:Alternatively|For more information)", lines[0])[0]
        hint = "dynamic_shapes has the structure of the arguments; or declare inputs by torch_rtx.Input"
    else:
        problem = f"the model can't be captured: {type(error).__name__}: {lines[0]}"
        hint = f"see whether model(*args) raises the same; {_OTHERWISE}"
    return problem, hint


# ---- after a capture -------------------------------------------------------------------------------------------------


def check_mode(model: nn.Module | ExportedProgram, graph: fx.Graph) -> None:
    """Raises CaptureError if `model` is in training mode and computes something else in it than in evaluation. What was
    exported so may be meant: an ExportedProgram gives a warning."""
    if isinstance(model, nn.Module) and not any(module.training for module in model.modules()):
        return
    locations = Locations()
    for node in graph.nodes:
        if _trains(node):
            what = f"{node.target} at {locations.of(node)}"
            if isinstance(model, ExportedProgram):
                log.warning("the program was exported in training mode, which the engine keeps: %s", what)
                return
            if _module_of(model, node).training:
                hint = (
                    "call model.eval() first; to keep what it does in training, pass torch.export.export(model, args)"
                )
                raise CaptureError(f"the model is in training mode: {what}", hint=hint)


def _trains(node: fx.Node) -> bool:
    """Whether a call drops values at random, as modules do in training alone, or uses the statistics of the batch."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = [argument.name for argument in node.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(schema, node.args, strict=False)), **node.kwargs}
    if "momentum" in schema:  # without running statistics, those of the batch are for evaluation as well
        return given.get("running_mean") is not None and True in (given.get("training"), given.get("use_input_stats"))
    if "train" in schema:
        return given["train"] is True and given.get("p", given.get("dropout")) != 0
    if "dropout_p" in schema:
        return given.get("dropout_p", 0) != 0
    return given.get("training") is True or node.target.overloadpacket is torch.ops.aten.bernoulli  # other dropouts


def _module_of(model: nn.Module, node: fx.Node) -> nn.Module:
    """The innermost module that makes the call."""
    stack = node.meta.get("nn_module_stack") or {}
    try:
        return model.get_submodule(next((path for path, _ in reversed(stack.values())), ""))
    except AttributeError:
        return model
