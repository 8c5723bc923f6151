"""The options of torch_rtx, as two frozen dataclasses, and the only place that reads a `TORCH_RTX_*` variable.

`CompilationSettings` determine the engine, `RuntimeSettings` its execution. `torch.compile(options=...)` accepts the
fields of both by name. docs/settings.md contains the output of `table()`. Fields with `key=True` change the content of
an engine and are part of its cache key (`key_settings`).
"""

from __future__ import annotations

import difflib
import itertools
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Self, TypeVar

from torch_rtx import peers, platforms
from torch_rtx.errors import SettingsError
from torch_rtx.targets import HIGH, HIGHEST, LATER, parse_targets

log = logging.getLogger(__name__)
_PREFIX = "TORCH_RTX_"
STRATEGIES = ("lazy", "eager", "none")
BEST, CALLS = "best", "calls"
KINDS = re.compile(r"[a-z][a-z0-9_]*(,[a-z][a-z0-9_]*)*")  # names of tactics' kinds
CUDA_GRAPH_STRATEGIES = ("whole_graph_capture", "disabled")
# The options of torch.compile's `mode=`. CUDA graphs are on by default, so that two of the modes agree.
MODES: dict[str, dict[str, object]] = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": {"specialization_strategy": "eager"},
    "max-autotune-no-cudagraphs": {"specialization_strategy": "eager", "cuda_graph_strategy": "disabled"},
}
NAMES = "a collection of names"
UNITS = {unit + end: base**power for power, unit in enumerate("KMGT", 1) for end, base in (("iB", 1024), ("B", 1000))}
UNITS["B"] = 1
_BUDGET = re.compile(rf"(\d+(?:\.\d+)?) ?(%|{'|'.join(UNITS)})", re.ASCII)
_FLAGS = dict.fromkeys(("1", "true", "on", "yes"), True) | dict.fromkeys(("0", "false", "off", "no"), False)


def _option(
    default: object,
    expects: str,
    check: Callable[[Any], bool],
    help_: str,
    env: str = "",
    read: Callable[[str], object] = str,
    *,
    key: bool = False,
) -> Any:
    """A dataclass field.

    Args:
        expects, check: the text and the check of valid values.
        env: the environment variable that sets another default, unless it is empty; `read` makes a value of its text,
            and raises a ValueError or KeyError where it can't.
        key: it is part of the engine's cache key.
    """

    def make() -> object:
        text = os.environ.get(env) if env else None
        if not text:
            return default
        try:
            value = read(text)
            valid = check(value)
        except (KeyError, ValueError, SettingsError):
            valid = False
        if not valid:
            problem = f"environment variable {env} is {text!r}, which can't be read"
            raise SettingsError(problem, hint=f"it must be {expects}; a flag is 1 or 0, names have commas between")
        return value

    metadata = {"default": default, "expects": expects, "check": check, "help": help_, "env": env, "key": key}
    return field(default_factory=make, metadata=metadata)


def _flag(default: bool, help_: str, env: str = "", *, key: bool = False) -> Any:
    return _option(default, "a bool", lambda v: isinstance(v, bool), help_, env, _read_flag, key=key)


def _count(default: int, help_: str, env: str = "", *, key: bool = False) -> Any:
    expects = "an int of at least 1"
    return _option(default, expects, lambda v: type(v) is int and v >= 1, help_, env, _read_size, key=key)


def _names(help_: str, env: str, *, key: bool = False) -> Any:
    def check(value: object) -> bool:
        return isinstance(value, frozenset) and all(map(_is_str, value))

    return _option(frozenset(), NAMES, check, help_, env, lambda text: frozenset(_read_list(text)), key=key)


def _read_flag(text: str) -> bool:
    return _FLAGS[text.lower()]


def _read_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _read_targets(text: str) -> str | tuple[str, ...] | None:
    named = _read_list(text)
    return named if len(named) > 1 else None if text.lower() == "none" else text


def _read_size(text: str) -> int | float:
    """Bytes, as a number or with a unit."""
    return int(text) if text.isdecimal() else read_budget(text)


def _read_graphs(text: str) -> str:
    graphs = _FLAGS.get(text.lower())
    return text if graphs is None else CUDA_GRAPH_STRATEGIES[not graphs]


def _folder(help_: str, env: str) -> Any:
    return _option(None, "None or a folder", lambda v: v is None or _is_str(v), help_, env)


def _dump_dir() -> Any:
    return _folder(
        "Folder that gets the graph after each pass and every stage of every kernel; caches are not used meanwhile.",
        "TORCH_RTX_DUMP",
    )


def _override_dir() -> Any:
    return _folder(
        "Folder of edited stages of kernels, which replace the generated ones; caches are not used meanwhile.",
        "TORCH_RTX_OVERRIDE",
    )


def _is_store(value: object) -> bool:
    return value is None or all(callable(getattr(value, name, None)) for name in ("get", "put", "delete", "entries"))


def _is_targets(value: object) -> bool:
    if not isinstance(value, str | int | tuple) or isinstance(value, bool):
        return value is None
    parse_targets(value, capability=(8, 0))  # any valid one: the build checks whether there is a GPU
    return True


def read_budget(budget: int | str) -> int | float:
    """A budget in bytes (int), or for a percentage such as "50%" as a fraction from 0 to 1 (float).

    Raises:
        ValueError: the text is not a budget.
    """
    if isinstance(budget, int):
        return budget
    match = _BUDGET.fullmatch(budget)
    if match is None or (match[2] == "%" and float(match[1]) > 100):
        raise ValueError(budget)
    return float(match[1]) / 100 if match[2] == "%" else int(float(match[1]) * UNITS[match[2]])


def _is_budget(value: object) -> bool:
    try:
        return value is None or (isinstance(value, int | str) and type(value) is not bool and read_budget(value) >= 0)
    except ValueError:
        return False


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _name(entry: object) -> object:
    """The name of an operator, given as a `torch.ops` object or as text; `_Checked` refuses other objects."""
    return str(entry).removeprefix("torch.ops.") if _is_str(entry) or type(entry).__module__ == "torch._ops" else entry


_DUMPING: ContextVar[str | None] = ContextVar("torch_rtx_dumping", default=None)


@contextmanager
def dumping(folder: str) -> Iterator[None]:
    """Let `folder` be the `dump_dir` of all settings that are used inside, in this thread, and name no other."""
    token = _DUMPING.set(folder)
    try:
        yield
    finally:
        _DUMPING.reset(token)


class _Checked:
    """Checks the fields of the frozen dataclasses below; normalizes collections of names and lists.

    Raises:
        SettingsError: an option is unknown, or has the wrong type.
    """

    def __new__(cls, *args: object, **options: object) -> Self:
        if args:
            raise SettingsError(f"options are given by name, and {args[0]!r} has none")
        _check_names(options, cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _warn_of_variables()
        for item in fields(self):  # type: ignore[arg-type]
            value = given = getattr(self, item.name)
            if item.metadata["expects"] == NAMES and isinstance(value, Iterable) and not _is_str(value):
                value = frozenset(map(_name, value))
                object.__setattr__(self, item.name, value)
            elif isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            elif value is None and item.name == "dump_dir":
                object.__setattr__(self, item.name, _DUMPING.get())
            elif isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, item.name, value)
            if not item.metadata["check"](value):
                raise SettingsError(f"option {item.name} must be {item.metadata['expects']}, not {given!r}")


@dataclass(frozen=True)
class CompilationSettings(_Checked):
    """Options of a build. Equal settings and an equal graph give an equal engine."""

    min_block_size: int = _count(
        1, "Smallest block of the engine, in nodes; the nodes of smaller blocks fall back to PyTorch.", key=True
    )
    torch_executed_ops: Set[str] = _names(
        "Operators that always fall back to PyTorch: `aten.softmax` (all overloads), `aten.softmax.int`.",
        "TORCH_RTX_EXECUTED_OPS",
        key=True,
    )
    require_full_compilation: bool = _flag(
        False,
        "Raise `PartitionError` if a node would fall back to PyTorch, or a graph break leaves code to it.",
        key=True,
    )
    fallback_on_error: bool = _flag(
        False,
        "Run a graph in PyTorch, with a warning, if a bug makes compiling it fail.",
        "TORCH_RTX_FALLBACK_ON_ERROR",
    )
    disabled_passes: Set[str] = _names("Passes to skip, by name.", "TORCH_RTX_DISABLED_PASSES", key=True)
    copy_weights: bool | None = _option(
        None,
        "None or a bool",
        lambda v: v is None or isinstance(v, bool),
        "Merge linear layers, and pack 4-bit weights for kernels, although that copies weights. None: only in engines "
        "built ahead of time.",
        key=True,
    )
    logits_chunk_bytes: int = _count(
        128 << 20,
        "In training, logits of more bytes are computed by chunks of rows, with their loss and its gradients, "
        "where nothing else reads them and that saves memory.",
        key=True,
    )
    float32_precision: str | None = _option(
        None,
        f"None, {HIGHEST!r} or {HIGH!r}",
        lambda v: v in (None, HIGHEST, HIGH),
        "How exactly kernels multiply float32: `highest`, as float32 does, or `high`, as TF32 does. None: as PyTorch "
        "is set to when the engine is built, for convolutions and for all else.",
        key=True,
    )
    strip_weights: bool = _flag(True, "Save engines without weights; `load` or `refit` supplies them.")
    device: str | None = _option(
        None,
        'None, "cpu" or "cuda"; `load(path, device="cuda:1")` selects a GPU',
        lambda v: v in (None, "cpu", "cuda"),
        "Device to build an engine for; None: the model's own. `cuda` needs no GPU.",
    )
    targets: str | int | tuple[str | int, ...] | None = _option(
        LATER,
        'None, "portable", "current", "later", or a list such as ["RTX 4090", "sm_120", "ptx"]',
        _is_targets,
        "GPUs to compile kernels for. `later`: the one that runs the engine, when it runs. None: no kernels.",
        "TORCH_RTX_TARGETS",
        _read_targets,
        key=True,
    )
    platform: str = _option(
        platforms.ANY,
        " or ".join(map(repr, platforms.PLATFORMS)),
        lambda v: v in platforms.PLATFORMS,
        "The only operating system that may load the engine. Any but `any` makes `targets` `portable` where they are "
        "`later`. Ahead of time.",
    )
    dump_dir: str | None = _dump_dir()
    override_dir: str | None = _override_dir()
    cache_built_engines: bool = _flag(True, "Write built engines to the engine cache.", "TORCH_RTX_ENGINE_CACHE")
    reuse_cached_engines: bool = _flag(True, "Read engines from the engine cache.", "TORCH_RTX_ENGINE_CACHE")
    engine_cache_dir: str | None = _folder(
        "Folder of both caches; None: `torch_rtx` in the user's cache folder.", "TORCH_RTX_CACHE_DIR"
    )
    engine_cache_size: int = _count(
        5 << 30,
        "Limit on the engine cache, in bytes; the least recently used are evicted.",
        "TORCH_RTX_ENGINE_CACHE_SIZE",
    )
    engine_cache: Any = _option(
        None, "None or a store", _is_store, "An object that stores engines, in place of the folder."
    )


@dataclass(frozen=True)
class RuntimeSettings(_Checked):
    """Options of execution. A change of these never needs a new engine."""

    cuda_graph_strategy: str = _option(
        "whole_graph_capture",
        " or ".join(map(repr, CUDA_GRAPH_STRATEGIES)),
        lambda v: v in CUDA_GRAPH_STRATEGIES,
        "Replay the whole module as one CUDA graph per combination of input shapes, or never.",
        "TORCH_RTX_CUDA_GRAPHS",
        _read_graphs,
    )
    tactics: str = _option(
        BEST,
        "'best', 'calls' or kinds such as 'kernel', 'split', 'library', separated by commas",
        lambda v: isinstance(v, str) and KINDS.fullmatch(v) is not None,
        "Which tactic runs each kernel node: the fastest, or one of the first of these kinds that the node has; "
        "'calls': all operations are called one by one.",
        "TORCH_RTX_TACTICS",
    )
    specialization_strategy: str = _option(
        "lazy",
        " or ".join(map(repr, STRATEGIES)),
        lambda v: v in STRATEGIES,
        "When to compile and measure kernels for this GPU and the sizes that occur: in the background (`lazy`), before "
        "the call returns (`eager`), or never.",
        "TORCH_RTX_SPECIALIZATION",
    )
    specialized_shapes: int = _count(
        8, "Most combinations of sizes that have kernels of their own; the most frequent ones get them."
    )
    tuning_seconds: float = _option(
        60.0,
        "a number of at least 0",
        lambda v: type(v) in (int, float) and 0 <= v < math.inf,
        "Limit on measuring tactics, in seconds per combination of sizes; 0: the expected best is used unmeasured.",
        "TORCH_RTX_TUNING_SECONDS",
        float,
    )
    static_outputs: bool = _flag(
        False, "Return results in the memory of the CUDA graph, which the next call overwrites, not in new tensors."
    )
    cuda_graph_pool_size: int = _count(
        16, "Most CUDA graphs of a module; the most frequent combinations of shapes get them."
    )
    watch_weights: bool = _flag(
        True,
        "Compare values of the parameters that weights are computed from, before each call, to see writes that no "
        "version counter tells of. False: such a write needs `refit_module_weights` or `attach` after it.",
        "TORCH_RTX_WATCH_WEIGHTS",
    )
    weight_streaming_budget: int | str | None = _option(
        None,
        'None, bytes such as 2_000_000_000 or "2GiB", or a share such as "50%"',
        _is_budget,
        "Limit on device memory for weights; the others stay in host memory and are copied ahead of their use.",
        "TORCH_RTX_WEIGHT_STREAMING_BUDGET",
        lambda text: int(text) if text.isdecimal() else text,
    )
    runtime_cache: str | None = _option(
        None,
        'None, "off" or a file',
        lambda v: v is None or (_is_str(v) and v != ""),
        "File of the runtime cache; None: `runtime.sqlite` in the folder of the caches.",
        "TORCH_RTX_RUNTIME_CACHE",
    )
    runtime_cache_size: int = _count(
        512 << 20,
        "Limit on that file, in bytes; the least recently used entries are evicted.",
        "TORCH_RTX_RUNTIME_CACHE_SIZE",
    )
    dump_dir: str | None = _dump_dir()
    override_dir: str | None = _override_dir()


def from_options(
    options: Mapping[str, object] | None = None, mode: str | None = None
) -> tuple[CompilationSettings, RuntimeSettings]:
    """The settings for torch.compile's `options=` and `mode=`.

    Raises:
        SettingsError: an unknown option or mode (the message lists the known ones), or a value of the wrong type.
    """
    if mode is not None and mode not in MODES:
        raise SettingsError(f"unknown mode {mode!r}", hint=f"known modes are {', '.join(MODES)}")
    if not isinstance(options, Mapping | None):
        hint = 'write options={"min_block_size": 2}, with fields of CompilationSettings and RuntimeSettings'
        raise SettingsError(f"options must be a dictionary, not a {type(options).__name__}", hint=hint)
    given = {**MODES[mode or "default"], **(options or {})}
    kinds = CompilationSettings, RuntimeSettings
    _check_names(given, *kinds)
    compilation, runtime = ({n: value for n, value in given.items() if n in _names_of(kind)} for kind in kinds)
    return CompilationSettings(**compilation), RuntimeSettings(**runtime)  # type: ignore[arg-type]


def _names_of(kind: type[_Checked]) -> list[str]:
    return [item.name for item in fields(kind)]  # type: ignore[arg-type]


def _check_names(given: Iterable[str], *kinds: type[_Checked]) -> None:
    """Raises SettingsError if a name is no option of `kinds`; the message says what is like it, here or elsewhere."""
    known = sorted({name for kind in kinds for name in _names_of(kind)})
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    hints = []
    for name in unknown:
        others = [kind.__name__ for kind in (CompilationSettings, RuntimeSettings) if name in _names_of(kind)]
        near = difflib.get_close_matches(name, [*known, *itertools.chain(*peers.LIBRARIES.values())], n=1)
        if others:
            hints.append(f"{name} is an option of {others[0]}")
        elif answer := peers.answer(name):
            hints.append(answer)
        elif near:
            hints.append(f"did you mean {near[0]}?" if near[0] in known else str(peers.answer(near[0])))
    if not all(map(peers.answer, unknown)):
        hints.append(f"known options are {', '.join(known)}")
    raise SettingsError(f"unknown option {', '.join(unknown)}", hint="\n  ".join(hints))


@cache
def _warn_of_variables() -> None:
    """Log which environment variables look like misspelt ones of this table: nothing else would say so."""
    known = {item.metadata["env"] for kind in (CompilationSettings, RuntimeSettings) for item in fields(kind)}
    suffixes = [name.removeprefix(_PREFIX) for name in known if name]
    for name in sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in known):
        near = difflib.get_close_matches(name.removeprefix(_PREFIX), suffixes, n=1, cutoff=0.75)
        if near:
            log.warning("environment variable %s has no effect: did you mean %s%s?", name, _PREFIX, near[0])


_Kind = TypeVar("_Kind", CompilationSettings, RuntimeSettings)


def settings_of(kind: type[_Kind], given: _Kind | None, name: str = "settings") -> _Kind:
    """What a caller gave as the argument `name`, or the defaults.

    Raises:
        SettingsError: it is no `kind`.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given if _DUMPING.get() is None else replace(given)  # takes the folder of `dumping`
    options = ", ".join(f"{key}={value!r}" for key, value in given.items()) if isinstance(given, Mapping) else "..."
    hint = f"write {name}=torch_rtx.{kind.__name__}({options})"
    raise SettingsError(f"{name} must be a {kind.__name__}, not {type(given).__name__}", hint=hint)


def key_settings(settings: CompilationSettings) -> dict[str, str]:
    """The options that change the content of an engine, as text that is equal in all processes."""
    shown = {item.name: getattr(settings, item.name) for item in fields(settings) if item.metadata["key"]}
    return {name: repr(sorted(value) if isinstance(value, Set) else value) for name, value in shown.items()}


def assemblers() -> dict[str, str]:
    """The assemblers that replace Triton's own ptxas, by environment variable: path, size and modification time."""
    found = {}
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        path = os.environ.get(name)
        if path:
            status = os.stat(path) if os.path.exists(path) else None
            found[name] = f"{path} {status and (status.st_size, status.st_mtime_ns)}"
    return found


def opens_stages(settings: CompilationSettings | RuntimeSettings) -> bool:
    """Kernels are dumped or overridden. They are then neither taken from a cache, whose kernels have no stages to look
    at, nor kept in one."""
    return settings.dump_dir is not None or settings.override_dir is not None


def cache_dir(settings: CompilationSettings) -> str:
    """The folder of the caches, as an absolute path: the configured one, else the platform's."""
    if settings.engine_cache_dir is not None:
        return os.path.abspath(os.path.expanduser(settings.engine_cache_dir))
    home = _home()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or ""
        base = base if os.path.isabs(base) else os.path.join(home, ".cache")  # as the XDG specification says
    return os.path.join(base, "torch_rtx")


def _home() -> str:
    """The user's home; a folder for temporary files if there is none, as for the unknown users of some containers."""
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        return home if os.path.isabs(home) else tempfile.gettempdir()  # private to the user there
    if not os.path.isabs(os.environ.get("HOME", "")):
        import pwd

        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return os.path.join(tempfile.gettempdir(), f"torch_rtx-{os.getuid()}")
    return home


def runtime_cache_path(runtime: RuntimeSettings, compilation: CompilationSettings | None = None) -> str | None:
    """The file of the runtime cache; None if it is off. By default it is in the cache folder of `compilation`."""
    if runtime.runtime_cache == "off":
        return None
    return runtime.runtime_cache or os.path.join(cache_dir(compilation or CompilationSettings()), "runtime.sqlite")


def table() -> str:
    """The options as a Markdown table: name, default, meaning, environment variable."""
    lines = ["| option | default | meaning | variable |", "|---|---|---|---|"]
    shown_once: set[str] = set()
    for kind in (CompilationSettings, RuntimeSettings):
        for item in (item for item in fields(kind) if item.name not in shown_once):
            shown_once.add(item.name)
            default = item.metadata["default"]
            shown = "none" if default == frozenset() else repr(default)
            meaning = f"{item.metadata['help']} Expects {item.metadata['expects']}."
            variable = f"`{item.metadata['env']}`" if item.metadata["env"] else ""
            lines.append(f"| `{item.name}` | `{shown}` | {meaning} | {variable} |")
    return "\n".join(lines) + "\n"
