"""`torch-rtx cache`: list the engine cache, compare its keys, clear it, and export it to another machine."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from string import ascii_letters
from typing import Annotated

import typer

from torch_rtx.cache.archive import export_entries, import_entries
from torch_rtx.cache.entries import EngineCache, Head, unpack
from torch_rtx.cache.store import FileStore, Stored
from torch_rtx.cli.terminal import Report, command
from torch_rtx.errors import CacheError
from torch_rtx.settings import UNITS, CompilationSettings, cache_dir

app = typer.Typer(no_args_is_help=True, help="The engine cache: its entries, and the reasons of misses.")
Folder = Annotated[str | None, typer.Option("--dir", help="Folder of the caches; default: that of the settings.")]
Name = Annotated[str, typer.Argument(help="A key, or a unique prefix of one.")]
SHORT = 12  # digits of a key that `ls` prints
SIZES = {"": 1, **{unit: 1024**power for power, unit in enumerate("KMGT", 1)}, **UNITS}


def _open(folder: str | None, *, create: bool = False) -> tuple[EngineCache, FileStore]:
    """The cache in a folder, which has to be there if it is named; `create`: or the folder that it is in.

    Raises:
        CacheError: it is not.
    """
    if folder is not None and not (Path(folder).absolute().parent if create else Path(folder)).is_dir():
        raise CacheError(f"there is no folder {folder}")
    settings = CompilationSettings() if folder is None else CompilationSettings(engine_cache_dir=folder)
    store = FileStore(os.path.join(cache_dir(settings), "engines"), settings.engine_cache_size)
    return EngineCache(store), store


def _find(store: FileStore, prefix: str) -> str:
    names = [entry.name for entry in store.entries() if entry.name.startswith(prefix.lower())]
    if len(names) != 1:
        problem = f"{len(names)} entries begin with {prefix!r}" if names else f"no entry begins with {prefix!r}"
        raise CacheError(problem, hint="`torch-rtx cache ls` lists them")
    return names[0]


def size_of(text: str) -> int:
    """The bytes that `500M` or `2G` stands for, or a size as options take them: `500MB`, `2GiB`.

    Raises:
        CacheError: `text` is not a size.
    """
    number = text.rstrip(ascii_letters)
    units = {unit.upper(): count for unit, count in SIZES.items()}
    try:
        return int(float(number) * units[text[len(number) :].upper()])
    except (KeyError, ValueError, OverflowError):
        raise CacheError(f"{text!r} is not a size", hint="sizes look like 500M, 2G, 500MB (of 1000) or 2GiB") from None


def time_text(seconds: float) -> str:
    """A time in seconds since 1970 as a local date and time."""
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}" if seconds else "unknown"
    except (OverflowError, ValueError, OSError):
        return "unknown"


def _title(head: Head) -> str:
    """The number of nodes of an entry's graph, and its most frequent operators, as one line."""
    graph = head.key.parts.get("graph")
    pairs = [line.partition(": ")[::2] for line in graph.text.splitlines()] if graph else []
    counts = {name: int(count) for name, count in pairs if count.isdigit()}
    nodes = counts.pop("nodes", 0)
    common = sorted(counts, key=lambda name: (-counts[name], name))[:3]
    return f"{nodes} nodes: " + ", ".join(f"{counts[name]} {name}" for name in common)


def ls(directory: Folder = None) -> Report:
    """List the entries, the most recently used first."""
    cache, store = _open(directory)
    rows = [(entry, _head(cache, entry)) for entry in store.entries()]
    value = [{"key": e.name, "bytes": e.size, "used": e.used, "kind": h.key.kind if h else "damaged"} for e, h in rows]
    lines = []
    for entry, head in rows:
        kind, title = (head.key.kind, _title(head)) if head else ("damaged", "")
        used = time_text(entry.used)
        lines.append(f"{entry.name[:SHORT]}  {kind:8}{entry.size / 1024:10.1f} KiB  {used}  {title}")
    total = sum(entry.size for entry, _ in rows)
    lines.append(
        f"{len(rows)} entries, {total / 1024**2:.1f} MiB of {store.limit / 1024**2:.0f} MiB, in {store.folder}"
    )
    return Report(value, "\n".join(lines))


def _head(cache: EngineCache, entry: Stored) -> Head | None:
    try:
        return cache.head(entry.name)
    except CacheError:
        return None


def show(key: Name, directory: Folder = None) -> Report:
    """Show the parts of one entry's key."""
    cache, store = _open(directory)
    name = _find(store, key)
    head = cache.head(name)
    parts = {part: {"digest": p.digest, "text": p.text} for part, p in head.key.parts.items()}
    lines = [name, f"{head.key.kind}, {head.body_bytes / 1024:.1f} KiB, created {time_text(head.created)}"]
    for part, content in head.key.parts.items():
        lines += [f"{part}: {content.digest}", *(f"  {line}" for line in content.text.splitlines())]
    return Report({"key": name, "created": head.created, "bytes": head.body_bytes, "parts": parts}, "\n".join(lines))


def why(a: Name, b: Name, directory: Folder = None) -> Report:
    """Print the parts in which the keys of two entries differ: the values of A, an arrow, the values of B."""
    cache, store = _open(directory)
    first, second = (cache.head(_find(store, key)).key for key in (a, b))
    lines = first.why(second)
    return Report(list(lines), "\n".join(lines) or "the same key")


def prune(
    size: Annotated[str | None, typer.Option("--size", help="Keep at most this size: 500M, 2G.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
    directory: Folder = None,
) -> Report:
    """Remove the least recently used entries, down to a size; default: the size of the settings."""
    if size is not None and everything:
        raise typer.BadParameter("--size keeps entries, --all removes them: give one of them")
    _, store = _open(directory)
    removed = store.prune(0 if everything else None if size is None else size_of(size))
    left, freed = len(store.entries()), sum(entry.size for entry in removed)
    text = f"removed {len(removed)} entries, {freed / 1024**2:.1f} MiB; {left} are left"
    problem = f"{left} entries could not be removed" if everything and left else None
    return Report({"removed": len(removed), "bytes": freed, "left": left}, text, problem)


def verify(directory: Folder = None) -> Report:
    """Read every entry and check its digests. Exit status 1 if one is damaged; damaged entries are not removed."""
    _, store = _open(directory)
    entries = store.entries()
    damaged = []
    for entry in entries:
        try:
            data = store.get(entry.name)
            if data is not None:
                unpack(entry.name, data)
        except CacheError as error:
            damaged.append(str(error))
    text = f"{len(entries) - len(damaged)} of {len(entries)} entries are intact"
    problem = "\n".join(f"damaged: {problem}" for problem in damaged)
    return Report({"entries": len(entries), "damaged": damaged}, text, problem or None)


def export_(
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or unique prefixes; default: all entries.")] = None,
    directory: Folder = None,
) -> Report:
    """Write entries to one file."""
    _, store = _open(directory)
    names = [_find(store, key) for key in keys] if keys else [entry.name for entry in store.entries()]
    count = export_entries(store, names, path)
    return Report({"entries": count, "file": str(path)}, f"{count} entries in {path}")


def import_(
    path: Annotated[Path, typer.Argument(help="A file that `export` wrote.")], directory: Folder = None
) -> Report:
    """Import the entries of a file; checks all of them before it writes any."""
    _, store = _open(directory, create=True)
    count = import_entries(store, path)
    return Report({"entries": count, "folder": str(store.folder)}, f"{count} entries from {path}")


for each in (ls, show, why, prune, verify, export_, import_):
    app.command(each.__name__.strip("_"))(command(each))
