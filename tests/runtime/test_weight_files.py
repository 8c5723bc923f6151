"""Weights from folders and shards, as Hugging Face and diffusers write them; nothing outside of a folder is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torch_rtx.errors import EngineFormatError
from torch_rtx.runtime.weight_files import read_weights

TENSORS = {name: torch.full((2,), float(number)) for number, name in enumerate("abcd")}
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
PARTS: Mapping[str, Sequence[str]] = {SHARDS[0]: "ab", SHARDS[1]: "cd"}


def write(folder: Path, files: Mapping[str, Sequence[str]], index: str | None = None) -> Path:
    """A folder of files, each with some of TENSORS, and an index of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    if index is not None:
        weight_map = {name: file for file, names in files.items() for name in names}
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    return folder


def hub(folder: Path) -> Path:
    """The layout of the cache of the Hugging Face hub."""
    names = [*PARTS, "model.safetensors.index.json"]
    write(folder / "blobs", PARTS, names[-1])
    snapshot = folder / "snapshots" / "0123" / "unet"
    snapshot.mkdir(parents=True)
    for number, name in enumerate(names):
        os.rename(folder / "blobs" / name, folder / "blobs" / f"{number}")
        (snapshot / name).symlink_to(Path("../../..") / "blobs" / f"{number}")
    return snapshot


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "one file": lambda p: write(p / "m", {"model.safetensors": "abcd"}),
    "index": lambda p: write(p / "m", PARTS, "model.safetensors.index.json"),
    "index of diffusers": lambda p: write(
        p / "unet", {"x-1.safetensors": "abc", "x-2.safetensors": "d"}, "diffusion_pytorch_model.safetensors.index.json"
    ),
    "index beside a file of the same weights": lambda p: write(
        write(p / "m", PARTS, "model.safetensors.index.json"), {"consolidated.safetensors": "abcd"}
    ),
    "shards without an index": lambda p: write(p / "m", PARTS),
    "cache of the hub": hub,
    "a link to the folder": lambda p: link(p / "link", write(p / "m", PARTS, "model.safetensors.index.json")),
}


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind: str, tmp_path: Path) -> None:
    found = read_weights(FOLDERS[kind](tmp_path))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_link_that_is_named_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "m", {"model.safetensors": "abcd"})
    assert len(read_weights(link(tmp_path / "w.safetensors", tmp_path / "m" / "model.safetensors"))) == 4


@pytest.mark.parametrize("index", ["model.safetensors.index.json", None])
def test_a_shard_that_is_missing_is_named(index: str | None, tmp_path: Path) -> None:
    folder = write(tmp_path, PARTS, index)
    (folder / SHARDS[0]).unlink()
    with pytest.raises(EngineFormatError, match=f"consists of 2 files, of which {SHARDS[0]} are missing"):
        read_weights(folder)


def test_a_folder_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "pipe" / "unet", {"a.safetensors": "a"})
    write(tmp_path / "pipe" / "vae", {"a.safetensors": "a"})
    with pytest.raises(EngineFormatError, match="no safetensors files\n.*folders in it have some: unet, vae"):
        read_weights(tmp_path / "pipe")
    write(tmp_path / "pipe", {"model.safetensors": "a", "model.fp16.safetensors": "a"})
    with pytest.raises(EngineFormatError, match="several sets of weights: model.fp16.safetensors, model.safetensors"):
        read_weights(tmp_path / "pipe")


OUTSIDE = ["../o.safetensors", "..", "sub/o.safetensors", "sub\\o.safetensors", "C:o.safetensors", "o.txt", "ABSOLUTE"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_beside_it(name: str, tmp_path: Path) -> None:
    outside = write(tmp_path, {"o.safetensors": "a"}) / "o.safetensors"
    folder = write(tmp_path / "m" / "sub", {"o.safetensors": "a"}).parent
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": str(outside) if name == "ABSOLUTE" else name}}))
    for source in (folder, index):
        with pytest.raises(EngineFormatError, match="which is no safetensors file beside it"):
            read_weights(source)


@pytest.mark.parametrize("which", ["file", "shard", "index"])
def test_no_link_leads_out_of_a_folder(which: str, tmp_path: Path) -> None:
    files = {"model.safetensors": "abcd"} if which == "file" else PARTS
    folder = write(tmp_path / "m", files, None if which == "file" else "model.safetensors.index.json")
    name = "model.safetensors.index.json" if which == "index" else list(files)[0]
    os.rename(folder / name, tmp_path / "elsewhere")
    link(folder / name, tmp_path / "elsewhere")
    with pytest.raises(EngineFormatError, match=f"{name} is a link to .*elsewhere, outside of the folder"):
        read_weights(folder)


def test_deep_json_is_no_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": ' + "[" * 100_000)
    with pytest.raises(EngineFormatError, match="is no index"):
        read_weights(index)
