"""The exceptions of torch_rtx.

    RtxError (RuntimeError)
    ├── SettingsError (also ValueError)   an option that is unknown, mistyped or contradicts another
    ├── OnnxError (also ValueError)       an ONNX model that is damaged, or has what is not supported
    ├── CaptureError                      a model could not be captured as a graph
    ├── Unsupported                       internal: no lowering or kernel for an op, dtype, shape or GPU; always handled
    ├── PartitionError                    `require_full_compilation` is set and something must fall back
    ├── InvalidIR                         text or graph that breaks a rule of the IR
    ├── LoweringError                     a bug of the compiler: names the pass or op, the dump and the reproduction
    ├── KernelError                       a generated kernel that can't be compiled, loaded or launched
    ├── EngineFormatError (also ValueError)   a file that is not an engine, or a damaged one
    │   └── EngineVersionError            an engine of a format that this release can't read
    ├── RefitError (also ValueError)      weights that are missing, unexpected or of another type
    ├── QuantizationError (also ValueError)   a quantization that a layer can't have, or calibration data it lacks
    ├── InputError (also ValueError)      an argument of a wrong dtype, device, rank or shape
    ├── CallError                         an operator of a loaded engine failed during a call
    ├── RanksError                        ranks of a group run different programs, or one of them has ended
    ├── IntegrationError (also ImportError)   a library is missing, or not as an integration needs it
    ├── CacheError                        a missing or damaged cache entry, or an invalid archive
    │   └── CacheDamaged                  a damaged runtime cache file
    └── Uncacheable                       internal: a graph without a key, which is built each time; always handled

Any other exception from torch_rtx's own code is a bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RtxError(RuntimeError):
    """Base class of all errors.

    Args:
        message: the problem, in one sentence.
        loc: its location in the user's model or file, if known.
        hint: the remedy, if known.
    """

    def __init__(self, message: str, *, loc: object = None, hint: str | None = None) -> None:
        self.message, self.loc, self.hint = message, loc, hint
        where = f" (at {loc})" if loc else ""
        super().__init__(message + where + (f"\n  {hint}" if hint else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), str(self)), self.__dict__


def _again(kind: type[RtxError], text: str) -> RtxError:
    """An error that came from another process; its attributes follow."""
    return kind.__new__(kind, text)


class SettingsError(RtxError, ValueError):
    """An option is unknown, has the wrong type or contradicts another."""


class OnnxError(RtxError, ValueError):
    """An ONNX model is damaged or breaks ONNX's rules, or it has an operator, version or type that is not supported.

    Attributes:
        file: the path of the model, or None.
        node, op: the name and the operator of the node, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        node: str | None = None,
        op: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.file, self.node, self.op = file, node, op
        where = [file, f"node {node!r}" if node else None, f"operator {op}" if op else None]
        super().__init__(message, loc=", ".join(filter(None, where)) or None, hint=hint)


class CaptureError(RtxError):
    """The model could not be captured as one functional graph."""


class Unsupported(RtxError):
    """No lowering or kernel for an op, dtype, shape or GPU.

    The importer, the passes and code generation raise it. The compiler handles every one: the node falls back to
    PyTorch, a pass leaves the call unchanged, fusion forms a smaller region, or the next implementation is tried.
    """


class PartitionError(RtxError):
    """`require_full_compilation` is set and a node must fall back, or a graph break leaves code to Python."""


class InvalidIR(RtxError):
    """A graph or its text breaks a rule of the IR."""


class LoweringError(RtxError):
    """A pass failed: a bug of torch_rtx; the message names the files to report."""


class KernelError(RtxError):
    """A generated kernel can't be compiled, loaded or launched; names the kernel, the target and the failing tool."""


class EngineFormatError(RtxError, ValueError):
    """The file is not an engine, or it is damaged. Nothing in it was executed or kept."""


class EngineVersionError(EngineFormatError):
    """The engine needs a newer release of torch_rtx, or its format is too old for this one."""


class EnginePlatformError(EngineFormatError):
    """The engine was built for another operating system."""


class RefitError(RtxError, ValueError):
    """The weights do not fit the engine; nothing was changed.

    Attributes:
        missing, unexpected, mismatched: names of weights (`mismatched` maps each name to its problem).
    """

    def __init__(
        self, missing: tuple[str, ...] = (), unexpected: tuple[str, ...] = (), mismatched: dict[str, str] | None = None
    ) -> None:
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched or {}
        groups = (
            [f"  missing: {name}" for name in missing],
            [f"  unexpected: {name}" for name in unexpected],
            [f"  {name}: {problem}" for name, problem in self.mismatched.items()],
        )
        lines = [line for group in groups for line in _first(group)]
        prefix = _prefix(missing, unexpected)
        hint = None
        if prefix:
            hint = f"give them without their prefix: {{name.removeprefix({prefix!r}): tensor, ...}}"
        elif unexpected and not missing and not mismatched:
            hint = "if the engine does not need them: module.refit(weights, strict=False)"
        super().__init__("weights do not fit the engine, nothing was changed:\n" + "\n".join(lines), hint=hint)


def _first(lines: list[str], most: int = 20) -> list[str]:
    """The first lines, and how many more there are."""
    return lines[:most] + [f"  and {len(lines) - most} more"] * (len(lines) > most)


def _prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What stands before every missing name among the unexpected ones, such as `module.`; empty if nothing does."""
    found = {name.removesuffix(missing[0]) for name in unexpected if missing and name.endswith("." + missing[0])}
    return next((prefix for prefix in found if {prefix + name for name in missing} <= set(unexpected)), "")


class QuantizationError(RtxError, ValueError):
    """Layers can't be quantized as asked, or data to calibrate them is missing or not finite; nothing was changed.

    Attributes:
        layers: the names of the layers.
    """

    def __init__(self, message: str, *, layers: Sequence[str] = (), hint: str | None = None) -> None:
        self.layers = tuple(layers)
        lines = _first([f"  {name or '(the model itself)'}" for name in self.layers])
        super().__init__("\n".join([message + ":" * bool(lines), *lines]), hint=hint)


class InputError(RtxError, ValueError):
    """An argument of a call has the wrong dtype, device, rank, shape or structure."""


class CallError(RtxError):
    """An operator of a loaded engine failed, such as an index that is out of range, during a call or while weights are
    computed; `__cause__` is its own error."""


class RanksError(RtxError):
    """The ranks of a process group run different programs, or a collective failed since one of them has ended;
    `__cause__` is the error of NCCL or gloo then."""


class IntegrationError(RtxError, ImportError):
    """A library that `torch_rtx.integrations` is for is missing, or a release of it that is not supported."""


class CacheError(RtxError):
    """A cache entry is missing or damaged, or a cache file is not one or can't be used."""


class CacheDamaged(CacheError):
    """The file of a runtime cache is damaged."""


class Uncacheable(RtxError):
    """The graph contains an object that other processes can't identify: it has no key and is built each time."""
