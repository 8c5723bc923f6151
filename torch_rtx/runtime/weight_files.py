"""Reads weights from safetensors files: one, several shards, or a folder with an index of shards."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from torch_rtx.errors import EngineFormatError

File = str | os.PathLike[str]
INDEX = ".safetensors.index.json"  # the end of the name of an index, as Hugging Face writes it


def read_weights(source: File | Sequence[File]) -> dict[str, torch.Tensor]:
    """The named tensors of a file, of all files of a list, or of a folder: those that its index names, or its only one.

    Raises:
        EngineFormatError: a file is no safetensors file or an engine, the folder has none or several without an index,
            or a name is in two files.
        FileNotFoundError: there is no such file.
    """
    found: dict[str, torch.Tensor] = {}
    origin: dict[str, Path] = {}
    for path in _files([source] if isinstance(source, str | os.PathLike) else source):
        for name, tensor in _tensors(path).items():
            if name in found:
                raise EngineFormatError(f"{name} is in two files: {origin[name]} and {path}")
            found[name], origin[name] = tensor, path
    return found


def _files(sources: Sequence[File]) -> Iterator[Path]:
    for path in map(Path, sources):
        if path.name.endswith(INDEX):
            yield from _shards(path)
        elif path.is_dir():
            indexes, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob("*.safetensors"))
            if len(indexes) == 1:
                yield from _shards(indexes[0])
            elif len(files) == 1 and not indexes:
                yield files[0]
            else:
                problem = f"the folder {path} has {len(files)} safetensors files and {len(indexes)} indexes of such"
                raise EngineFormatError(problem, hint="name the file, or a list of the files")
        else:
            yield path


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if all(Path(name).name == name for name in names):  # in this folder
            return [index.parent / name for name in names]
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise EngineFormatError(f"{index} is no index of safetensors files")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no file of weights", str(path))
    try:
        with safe_open(path, "pt") as file:
            if "torch_rtx" in (file.metadata() or ()):
                hint = "weights come from the model, its state dict, or a safetensors file of it"
                raise EngineFormatError(f"{path} is an engine, not a file of weights", hint=hint)
        return load_file(path)
    except SafetensorError as error:
        hint = "a checkpoint of torch.save: pass torch.load(path, weights_only=True), or convert it with "
        hint += "safetensors.torch.save_file"
        raise EngineFormatError(f"{path} is no safetensors file: {error}", hint=hint) from None
