"""The options of torch_rtx, as two frozen dataclasses, and the only place that reads a `TORCH_RTX_*` variable.

`CompilationSettings` decide what an engine is, `RuntimeSettings` how it runs. `torch.compile(options=...)` takes the
fields of both under their own names. docs/settings.md holds the table that `table()` prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any

from torch_rtx.errors import SettingsError
from torch_rtx.targets import parse_targets

TACTICS = ("best", "generated", "library", "calls")
CUDA_GRAPH_STRATEGIES = ("whole_graph_capture", "disabled")
# What torch.compile's `mode=` means here. There is nothing to tune yet, so that three of the four agree.
MODES: dict[str, dict[str, object]] = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": {},
    "max-autotune-no-cudagraphs": {"cuda_graph_strategy": "disabled"},
}


NAMES = "a collection of names"


def _option(default: object, expects: str, check: Callable[[Any], bool], help_: str, env: str = "") -> Any:
    """A field: what it `expects` in words, the check of that, one line for the table, and the variable that sets it."""
    make = (lambda: os.environ.get(env) or default) if env else (lambda: default)
    return field(default_factory=make, metadata={"expects": expects, "check": check, "help": help_, "env": env})


def _flag(default: bool, help_: str) -> Any:
    return _option(default, "a bool", lambda v: isinstance(v, bool), help_)


def _count(default: int, help_: str) -> Any:
    return _option(default, "an int of at least 1", lambda v: type(v) is int and v >= 1, help_)


def _names(help_: str) -> Any:
    return _option(frozenset(), NAMES, lambda v: isinstance(v, frozenset) and all(map(_is_str, v)), help_)


def _is_targets(value: object) -> bool:
    if not isinstance(value, str | int | tuple) or isinstance(value, bool):
        return value is None
    parse_targets(value, capability=(8, 0))  # a known one: whether there is a GPU is for the build to see
    return True


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _name(entry: object) -> object:
    """Operators are given as `torch.ops` objects or as text; their text is the name. Whatever else stays as it is."""
    return str(entry).removeprefix("torch.ops.") if _is_str(entry) or type(entry).__module__ == "torch._ops" else entry


class _Checked:
    """Field checks, named sets and tuples for the frozen dataclasses below."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value = given = getattr(self, item.name)
            if item.metadata["expects"] == NAMES and isinstance(value, Iterable) and not _is_str(value):
                value = frozenset(map(_name, value))
                object.__setattr__(self, item.name, value)
            elif isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            if not item.metadata["check"](value):
                raise SettingsError(f"option {item.name} must be {item.metadata['expects']}, not {given!r}")


@dataclass(frozen=True)
class CompilationSettings(_Checked):
    """What an engine is built of. Equal settings and an equal graph give an equal engine."""

    min_block_size: int = _count(1, "Smallest number of nodes that make a block of the engine; smaller ones fall back.")
    torch_executed_ops: Set[str] = _names("Operators that stay in PyTorch: `aten.softmax`, `aten.softmax.int`.")
    require_full_compilation: bool = _flag(False, "Raise `PartitionError` instead of leaving any node to PyTorch.")
    fallback_on_error: bool = _flag(False, "Run a graph in PyTorch, with a warning, when compiling it fails on a bug.")
    disabled_passes: Set[str] = _names("Passes of the pipeline to leave out, by name.")
    copy_weights: bool | None = _option(
        None,
        "None or a bool",
        lambda v: v is None or isinstance(v, bool),
        "Let `merge_linears` keep a merged copy of parameters beside the model's own. None: ahead of time only.",
    )
    strip_weights: bool = _flag(True, "Save engines without their weights, which `load` or `refit` then has to give.")
    device: str | None = _option(
        None,
        'None, "cpu" or "cuda"',
        lambda v: v in (None, "cpu", "cuda"),
        "Device to capture for ahead of time; None: the model's own. `cuda` needs no GPU.",
    )
    targets: str | int | tuple[str | int, ...] | None = _option(
        None,
        'None, "portable", "current", or a list such as ["sm_86", "sm_120", "ptx"]',
        _is_targets,
        "GPUs to build kernels for. None: no kernels, every operation is a call of PyTorch's.",
    )
    dump_dir: str | None = _option(
        None,
        "None or a folder",
        lambda v: v is None or _is_str(v),
        "Folder that gets every stage's artefact.",
        "TORCH_RTX_DUMP",
    )


@dataclass(frozen=True)
class RuntimeSettings(_Checked):
    """How an engine runs; changing one of these never needs a new engine."""

    cuda_graph_strategy: str = _option(
        "whole_graph_capture",
        " or ".join(map(repr, CUDA_GRAPH_STRATEGIES)),
        lambda v: v in CUDA_GRAPH_STRATEGIES,
        "Replay the whole module as one CUDA graph per input shape, or never.",
    )
    tactics: str = _option(
        "best",
        " or ".join(map(repr, TACTICS)),
        lambda v: v in TACTICS,
        "Which of an engine's kernels run: the best, all, all but those with a library call as a rival, or none.",
    )
    cuda_graph_pool_size: int = _count(16, "Most CUDA graphs that a module keeps; the least recently used goes first.")


def from_options(
    options: Mapping[str, object] | None = None, mode: str | None = None
) -> tuple[CompilationSettings, RuntimeSettings]:
    """The settings that torch.compile's `options=` and `mode=` ask for.

    Raises:
        SettingsError: an unknown option or mode (the message lists the known ones), or a value of the wrong type.
    """
    if mode is not None and mode not in MODES:
        raise SettingsError(f"unknown mode {mode!r}", hint=f"known modes are {', '.join(MODES)}")
    given = {**MODES[mode or "default"], **(options or {})}
    kinds = (CompilationSettings, RuntimeSettings)
    known = {item.name: kind for kind in kinds for item in fields(kind)}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        hint = f"known options are {', '.join(sorted(known))}"
        raise SettingsError(f"unknown option {', '.join(unknown)}", hint=hint)
    compilation, runtime = ({k: v for k, v in given.items() if known[k] is kind} for kind in kinds)
    return CompilationSettings(**compilation), RuntimeSettings(**runtime)  # type: ignore[arg-type]


def table() -> str:
    """The options as a Markdown table: name, default, meaning, environment variable."""
    lines = ["| option | default | meaning | variable |", "|---|---|---|---|"]
    for kind in (CompilationSettings, RuntimeSettings):
        defaults = kind()
        for item in fields(kind):
            default = getattr(defaults, item.name)
            shown = "none" if default == frozenset() else repr(default)
            meaning = f"{item.metadata['help']} Expects {item.metadata['expects']}."
            lines.append(f"| `{item.name}` | `{shown}` | {meaning} | {item.metadata['env'] or ''} |")
    return "\n".join(lines) + "\n"
