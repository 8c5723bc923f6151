"""Reads weights from safetensors files: one, several shards, or a folder, as those of Hugging Face and diffusers.

Of a folder, or an index, nothing outside of it is read: neither a path in the index nor a symbolic link leads out. The
one exception is the cache of the Hugging Face hub, whose folders consist of links to its folder `blobs`.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from torch_rtx.errors import EngineFormatError
from torch_rtx.runtime.shards import Part

File = str | os.PathLike[str]
SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"  # the end of the name of an index, as Hugging Face writes it
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")  # a shard, as Hugging Face names it
FILE = re.compile(r"[^/\\:]+\.safetensors")  # the name of a file in a folder, on any system


def read_weights(source: File | Sequence[File], parts: Mapping[str, Part] | None = None) -> dict[str, torch.Tensor]:
    """The named tensors of a file, of all files of a list, or of a folder: those that its index names, all shards of
    one set, or its only file.

    Args:
        parts: by name: the part that is read of a tensor, where the file has the whole.

    Raises:
        EngineFormatError: a file is no safetensors file, or an engine; a shard is missing, or lies outside of the
            folder; the folder has no such file, or several of which nothing says that they belong together; a name is
            in two files.
        FileNotFoundError: there is no such file.
    """
    found: dict[str, torch.Tensor] = {}
    origin: dict[str, Path] = {}
    paths: list[Path] = []
    for one in [source] if isinstance(source, str | os.PathLike) else source:
        paths += _files(Path(one))
    for path in paths:
        for name, tensor in _tensors(path, parts or {}).items():
            if name in found:
                raise EngineFormatError(f"{name} is in two files: {origin[name]} and {path}")
            found[name], origin[name] = tensor, path
    return found


def _files(path: Path) -> list[Path]:
    if path.name.endswith(INDEX):
        return _in_folder(path.parent, _shards(path), path)
    if not path.is_dir():
        return [path]
    indexes = sorted(one.name for one in path.glob(f"*{INDEX}"))
    names = sorted(one.name for one in path.glob(f"*{SUFFIX}"))
    if len(indexes) == 1:
        (index,) = _in_folder(path, indexes, path)
        return _in_folder(path, _shards(index), index)
    if not indexes:
        sets = {match.group(1, 3) for name in names if (match := SHARD.fullmatch(name))}
        if len(sets) == 1 and all(SHARD.fullmatch(name) for name in names):
            ((stem, count),) = sets
            names = [f"{stem}-{number:05}-of-{count}{SUFFIX}" for number in range(1, int(count) + 1)]
            return _in_folder(path, names, path)
        if len(names) == 1:
            return _in_folder(path, names, path)
    if indexes or names:
        problem = f"the folder {path} has several sets of weights: {', '.join(_few([*indexes, *names]))}"
        raise EngineFormatError(problem, hint="name one of these, or a list of files that belong together")
    inner = sorted({one.parent.name for one in path.glob(f"*/*{SUFFIX}")})
    hint = f"folders in it have some: {', '.join(_few(inner))}" if inner else f"weights are files *{SUFFIX}"
    raise EngineFormatError(f"the folder {path} has no safetensors files", hint=hint)


def _few(names: Sequence[str]) -> list[str]:
    return [*names[:6], *([f"{len(names) - 6} more"] if len(names) > 6 else [])]


def _in_folder(folder: Path, names: Sequence[str], origin: Path) -> list[Path]:
    """The files of these names, which `origin` says are all in `folder`."""
    paths = [folder / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        problem = f"{origin} consists of {len(paths)} files, of which {', '.join(_few(missing))} are missing"
        raise EngineFormatError(problem, hint="download the missing files, or name the files to read")
    allowed = [folder.resolve()]
    if allowed[0].parent.name == "snapshots" or allowed[0].parent.parent.name == "snapshots":
        allowed.append(next(above for above in allowed[0].parents if above.name == "snapshots").parent / "blobs")
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            raise EngineFormatError(
                f"{path} is a link to {target}, outside of the folder", hint="name that file if you trust it"
            )
    return paths


def _shards(index: Path) -> list[str]:
    """The names of files in an index."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        wrong = [name for name in names if FILE.fullmatch(name) is None]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        names = wrong = []
    if not names:
        raise EngineFormatError(f"{index} is no index of safetensors files")
    if wrong:
        problem = f"{index} names {wrong[0]!r}, which is no safetensors file beside it"
        raise EngineFormatError(problem, hint="an index names files in its own folder")
    return names


def _tensors(path: Path, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no file of weights", str(path))
    try:
        with safe_open(path, "pt") as file:
            if "torch_rtx" in (file.metadata() or ()):
                hint = "weights come from the model, its state dict, or a safetensors file of it"
                raise EngineFormatError(f"{path} is an engine, not a file of weights", hint=hint)
            if not parts.keys().isdisjoint(file.keys()):
                return {name: _read(file, name, parts.get(name)) for name in file.keys()}  # noqa: SIM118
        return load_file(path)
    except SafetensorError as error:
        hint = "a checkpoint of torch.save: pass torch.load(path, weights_only=True), or convert it with "
        hint += "safetensors.torch.save_file"
        raise EngineFormatError(f"{path} is no safetensors file: {error}", hint=hint) from None


def _read(file: Any, name: str, part: Part | None) -> torch.Tensor:
    """A tensor of an open file, or a part of it where the file has the whole."""
    if part is not None:
        whole = file.get_slice(name)
        if tuple(whole.get_shape()) == part.shape:
            read: torch.Tensor = whole[part.slices]
            return read
    tensor: torch.Tensor = file.get_tensor(name)
    return tensor
