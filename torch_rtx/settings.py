"""The options of torch_rtx, as two frozen dataclasses, and the only place that reads a `TORCH_RTX_*` variable.

`CompilationSettings` decide what an engine is, `RuntimeSettings` how it runs. `torch.compile(options=...)` takes the
fields of both under their own names. docs/settings.md holds the table that `table()` prints. `key_settings` gives the
options that decide what an engine is: each field of `CompilationSettings` says whether it is one of them.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any

from torch_rtx.errors import SettingsError
from torch_rtx.targets import LATER, parse_targets

STRATEGIES = ("lazy", "eager", "none")
TACTICS = ("best", "generated", "split", "library", "calls")
CUDA_GRAPH_STRATEGIES = ("whole_graph_capture", "disabled")
# What torch.compile's `mode=` means here. CUDA graphs are used in any case, so that two of the four agree.
MODES: dict[str, dict[str, object]] = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": {"specialization_strategy": "eager"},
    "max-autotune-no-cudagraphs": {"specialization_strategy": "eager", "cuda_graph_strategy": "disabled"},
}


NAMES = "a collection of names"
_UNITS = {unit + end: base**power for power, unit in enumerate("KMGT", 1) for end, base in (("iB", 1024), ("B", 1000))}
_UNITS["B"] = 1
_BUDGET = re.compile(rf"(\d+(?:\.\d+)?) ?(%|{'|'.join(_UNITS)})", re.ASCII)


def _option(
    default: object, expects: str, check: Callable[[Any], bool], help_: str, env: str = "", *, key: bool = False
) -> Any:
    """A field: what it `expects` in words, the check of that, one line for the table, the variable that sets it, and
    whether another value makes another engine, so that it belongs in the engine's key."""
    make = (lambda: os.environ.get(env) or default) if env else (lambda: default)
    metadata = {"expects": expects, "check": check, "help": help_, "env": env, "key": key}
    return field(default_factory=make, metadata=metadata)


def _flag(default: bool, help_: str, *, key: bool = False) -> Any:
    return _option(default, "a bool", lambda v: isinstance(v, bool), help_, key=key)


def _count(default: int, help_: str, *, key: bool = False) -> Any:
    return _option(default, "an int of at least 1", lambda v: type(v) is int and v >= 1, help_, key=key)


def _names(help_: str, *, key: bool = False) -> Any:
    return _option(frozenset(), NAMES, lambda v: isinstance(v, frozenset) and all(map(_is_str, v)), help_, key=key)


def _folder(help_: str, env: str) -> Any:
    return _option(None, "None or a folder", lambda v: v is None or _is_str(v), help_, env)


def _is_store(value: object) -> bool:
    return value is None or all(callable(getattr(value, name, None)) for name in ("get", "put", "delete", "entries"))


def _is_targets(value: object) -> bool:
    if not isinstance(value, str | int | tuple) or isinstance(value, bool):
        return value is None
    parse_targets(value, capability=(8, 0))  # a known one: whether there is a GPU is for the build to see
    return True


def read_budget(budget: int | str) -> int | float:
    """A budget as bytes (an int), or as a share from 0 to 1 (a float) for such as "50%".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(budget, int):
        return budget
    match = _BUDGET.fullmatch(budget)
    if match is None or (match[2] == "%" and float(match[1]) > 100):
        raise ValueError(budget)
    return float(match[1]) / 100 if match[2] == "%" else int(float(match[1]) * _UNITS[match[2]])


def _is_budget(value: object) -> bool:
    try:
        return value is None or (isinstance(value, int | str) and type(value) is not bool and read_budget(value) >= 0)
    except ValueError:
        return False


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

    min_block_size: int = _count(
        1, "Smallest number of nodes that make a block of the engine; smaller ones fall back.", key=True
    )
    torch_executed_ops: Set[str] = _names(
        "Operators that stay in PyTorch: `aten.softmax`, `aten.softmax.int`.", key=True
    )
    require_full_compilation: bool = _flag(
        False, "Raise `PartitionError` instead of leaving any node to PyTorch.", key=True
    )
    fallback_on_error: bool = _flag(False, "Run a graph in PyTorch, with a warning, when compiling it fails on a bug.")
    disabled_passes: Set[str] = _names("Passes of the pipeline to leave out, by name.", key=True)
    copy_weights: bool | None = _option(
        None,
        "None or a bool",
        lambda v: v is None or isinstance(v, bool),
        "Let `merge_linears` keep a merged copy of parameters beside the model's own. None: ahead of time only.",
        key=True,
    )
    strip_weights: bool = _flag(True, "Save engines without their weights, which `load` or `refit` then has to give.")
    device: str | None = _option(
        None,
        'None, "cpu" or "cuda"',
        lambda v: v in (None, "cpu", "cuda"),
        "Device to capture for ahead of time; None: the model's own. `cuda` needs no GPU.",
    )
    targets: str | int | tuple[str | int, ...] | None = _option(
        LATER,
        'None, "portable", "current", "later", or a list such as ["RTX 4090", "sm_120", "ptx"]',
        _is_targets,
        "GPUs to build kernels for. `later`: where the engine runs. None: every operation is a call of PyTorch's.",
        key=True,
    )
    dump_dir: str | None = _folder(
        "Folder that gets every stage's artefact; engines are then built anew.", "TORCH_RTX_DUMP"
    )
    cache_built_engines: bool = _flag(True, "Keep engines that are built in the engine cache.")
    reuse_cached_engines: bool = _flag(True, "Take engines from the engine cache instead of building them.")
    engine_cache_dir: str | None = _folder(
        "Folder of the caches; None: `torch_rtx` in the user's own cache folder.", "TORCH_RTX_CACHE_DIR"
    )
    engine_cache_size: int = _count(5 << 30, "Most bytes of engines that the folder keeps; the least recently used go.")
    engine_cache: Any = _option(
        None, "None or a store", _is_store, "A store of your own for engines, in place of the folder."
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
        "Which of an engine's kernels run: the best, all, all in their split form where there is one, all but "
        "those with a library call as a rival, or none.",
    )
    specialization_strategy: str = _option(
        "lazy",
        " or ".join(map(repr, STRATEGIES)),
        lambda v: v in STRATEGIES,
        "Compile and measure kernels for this GPU and the sizes that are met: in the background, before the call "
        "returns, or never.",
    )
    specialized_shapes: int = _count(
        8, "Most combinations of sizes that a module has kernels of their own for: those that come again most."
    )
    tuning_seconds: float = _option(
        60.0,
        "a number of at least 0",
        lambda v: type(v) in (int, float) and 0 <= v < math.inf,
        "Longest time that is spent on measuring kernels, per combination of sizes; 0: the expected best is taken.",
    )
    static_outputs: bool = _flag(
        False, "Results of a CUDA graph stay in its own memory, which the next call overwrites: none is made per call."
    )
    cuda_graph_pool_size: int = _count(
        16, "Most CUDA graphs that a module keeps: those of the shapes that come again most."
    )
    weight_streaming_budget: int | str | None = _option(
        None,
        'None, bytes such as 2_000_000_000 or "2GiB", or a share such as "50%"',
        _is_budget,
        "Most device memory for weights; the others stay in host memory, and each call copies them ahead of their use.",
    )
    runtime_cache: str | None = _option(
        None,
        'None, "off" or a file',
        lambda v: v is None or (_is_str(v) and v != ""),
        "File that keeps what is learnt on devices; None: `runtime.sqlite` in the folder of the caches.",
    )
    runtime_cache_size: int = _count(512 << 20, "Most bytes of that file; what was used least recently goes first.")


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


def key_settings(settings: CompilationSettings) -> dict[str, str]:
    """The options that decide what an engine is, as text that is the same in every process."""
    shown = {item.name: getattr(settings, item.name) for item in fields(settings) if item.metadata["key"]}
    return {name: repr(sorted(value) if isinstance(value, Set) else value) for name, value in shown.items()}


def assemblers() -> dict[str, str]:
    """The programs that Triton is told to take in place of its own ptxas, by variable, each with its size and age."""
    found = {}
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        path = os.environ.get(name)
        if path:
            status = os.stat(path) if os.path.exists(path) else None
            found[name] = f"{path} {status and (status.st_size, status.st_mtime_ns)}"
    return found


def cache_dir(settings: CompilationSettings) -> str:
    """The folder of the caches: the one that is set, else that of the platform."""
    if settings.engine_cache_dir is not None:
        return settings.engine_cache_dir
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(os.path.expanduser("~"), "AppData", "Local")
    elif sys.platform == "darwin":
        base = os.path.join(os.path.expanduser("~"), "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "torch_rtx")


def runtime_cache_path(runtime: RuntimeSettings, compilation: CompilationSettings | None = None) -> str | None:
    """The file of the runtime cache; None: it is off. By default it is beside the engine cache of `compilation`."""
    if runtime.runtime_cache == "off":
        return None
    return runtime.runtime_cache or os.path.join(cache_dir(compilation or CompilationSettings()), "runtime.sqlite")


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
