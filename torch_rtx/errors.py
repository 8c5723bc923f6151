"""Every exception that torch_rtx raises on purpose.

    RtxError (RuntimeError)
    ├── SettingsError (also ValueError)   an option that is unknown, mistyped or contradicts another
    ├── CaptureError                      a model could not be captured as a graph
    ├── Unsupported                       a node that the engine can't hold: it falls back, and no user sees this
    ├── PartitionError                    `require_full_compilation` and something must fall back
    ├── InvalidIR                         text or graph that breaks a rule of the IR
    ├── LoweringError                     a bug of the compiler: names the pass or op, the dump and the reproduction
    ├── KernelError                       a generated kernel that can't be compiled, loaded or launched
    ├── EngineFormatError (also ValueError)   a file that is no engine, or a damaged one
    │   └── EngineVersionError            an engine of a format this release can't read
    ├── RefitError (also ValueError)      weights that are missing, unexpected or of another type
    ├── InputError (also ValueError)      an argument of a wrong dtype, device, rank or shape
    ├── CacheError                        an entry of a cache that is not there or damaged, a bad archive
    │   └── CacheDamaged                  a runtime cache's file that is no intact database
    └── Uncacheable                       a graph that has no key: it is built each time, and no user sees this

Anything else that comes out of torch_rtx is a bug.
"""

from __future__ import annotations


class RtxError(RuntimeError):
    """Base of the tree.

    Args:
        message: what is wrong, in one sentence.
        loc: where in the user's model or file, if known.
        hint: what to do about it, if known.
    """

    def __init__(self, message: str, *, loc: object = None, hint: str | None = None) -> None:
        self.message, self.loc, self.hint = message, loc, hint
        where = f" (at {loc})" if loc else ""
        super().__init__(message + where + (f"\n  {hint}" if hint else ""))


class SettingsError(RtxError, ValueError):
    """An option is unknown, has the wrong type or contradicts another."""


class CaptureError(RtxError):
    """The model could not be captured as one functional graph."""


class Unsupported(RtxError):
    """The engine can't hold this node: it falls back to PyTorch. Only ever raised before code generation."""


class PartitionError(RtxError):
    """`require_full_compilation` is set and at least one node must fall back."""


class InvalidIR(RtxError):
    """A graph or its text breaks a rule of the IR."""


class LoweringError(RtxError):
    """A pass failed: a bug of torch_rtx, with what is needed to report it."""


class KernelError(RtxError):
    """A generated kernel can't be compiled, loaded or launched: it names the kernel, the target and what refused it."""


class EngineFormatError(RtxError, ValueError):
    """The file is no engine, or it is damaged. Nothing of it was executed or kept."""


class EngineVersionError(EngineFormatError):
    """The engine needs a newer reader than this release, or is older than what it reads."""


class RefitError(RtxError, ValueError):
    """The weights do not fit the engine; nothing was changed.

    Attributes:
        missing, unexpected, mismatched: the names concerned (`mismatched` maps a name to what is wrong with it).
    """

    def __init__(
        self, missing: tuple[str, ...] = (), unexpected: tuple[str, ...] = (), mismatched: dict[str, str] | None = None
    ) -> None:
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched or {}
        lines = [f"  missing: {name}" for name in missing] + [f"  unexpected: {name}" for name in unexpected]
        lines += [f"  {name}: {problem}" for name, problem in self.mismatched.items()]
        super().__init__("weights do not fit the engine, nothing was changed:\n" + "\n".join(lines))


class InputError(RtxError, ValueError):
    """An argument of a call has the wrong dtype, device, rank, shape or structure."""


class CacheError(RtxError):
    """An entry of a cache is not there or damaged, or a file holds no entries or can't be used."""


class CacheDamaged(CacheError):
    """The file of a runtime cache is no intact database."""


class Uncacheable(RtxError):
    """What a graph depends on has no name outside of this process, so that it has no key: it is built each time."""
