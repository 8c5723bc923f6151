"""The model zoo, exported by both exporters of PyTorch and read back: its kernels beside those of the module.

python -m benchmarks.exports [MODEL ...]      # a table of all models, or of some
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torch_rtx
from benchmarks import models
from torch_rtx.backend import program_cache
from torch_rtx.ir import Graph, Node
from torch_rtx.onnx.module import from_onnx
from torch_rtx.op_work import ANCHORS
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable

EXPORTERS = {"dynamo": True, "script": False}


class Positional(nn.Module):
    """A model whose inputs and results are tensors, as they are in ONNX."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs of one call."""
        return tuple(self._leaves[place] for place in self._places)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors among the results."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, inputs, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        found = self.model(*args, **kwargs)
        found = dict(found) if hasattr(found, "keys") else found
        return tuple(leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor))


def positional(name: str) -> Positional:
    """A small model of the zoo."""
    return Positional(*models.build(name, "small"))


def export(model: Positional, exporter: str, path: Path, open_batch: bool = False) -> None:
    """Write the model to a file; with `open_batch`, for any size of the first axis of all inputs."""
    names = [f"input{number}" for number in range(len(model.inputs))]
    with torch.no_grad(), warnings.catch_warnings(), _silent():
        warnings.simplefilter("ignore")
        if EXPORTERS[exporter]:
            shapes = (batches(model.inputs),) if open_batch else None
            program = torch.onnx.export(
                copy.deepcopy(model), model.inputs, dynamo=True, verbose=False, dynamic_shapes=shapes
            )
            assert program is not None
            program.save(str(path))
        else:
            axes = dict.fromkeys(names, {0: "batch"}) if open_batch else None
            torch.onnx.export(
                copy.deepcopy(model), model.inputs, str(path), dynamo=False, input_names=names, dynamic_axes=axes
            )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporters print, one of them from C++."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def batches(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """The dynamic shapes of inputs whose first axis is a batch."""
    batch = torch.export.Dim("batch", min=2, max=64)
    return tuple({0: batch} for _ in inputs)


def for_gpu(model: nn.Module, inputs: tuple[Tensor, ...], shapes: Any = None) -> torch_rtx.CompiledModule:
    """The engine that the model has for a GPU, without kernels: it runs call by call."""
    settings = CompilationSettings(device="cuda", targets="sm_80", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        return torch_rtx.compile(copy.deepcopy(model), inputs, dynamic_shapes=shapes, settings=settings)


def lowered(model: nn.Module, inputs: tuple[Tensor, ...], shapes: Any = None) -> Graph:
    """The graph that the model has for a GPU."""
    return for_gpu(model, inputs, shapes).engine.graph


def work(graph: Graph) -> Counter[str]:
    """What a graph launches: kernels by what they are built around, and library calls by name."""
    return Counter(_kind(node) for node in graph.nodes if node.kind != "view")


def _kind(node: Node) -> str:
    if node.kind != "kernel":
        return node.op
    assert node.body is not None
    anchor = next((inner for inner in node.body.nodes if inner.op in ANCHORS), None)
    if anchor is None:
        return "loop"
    masked = ", masked" * (anchor.arg("attn_mask") is not None) + ", causal" * bool(anchor.arg("is_causal"))
    return ANCHORS[anchor.op] + masked


def read_back(model: Positional, exporter: str, folder: Path) -> nn.Module:
    """The module of the model's file."""
    export(model, exporter, folder / "model.onnx")
    return from_onnx(folder / "model.onnx")


def main(names: list[str]) -> None:
    """Print what the module and its files launch."""
    for name in names or models.names():
        model = positional(name)
        print(name, "module", dict(work(lowered(model, model.inputs))), flush=True)
        for exporter in EXPORTERS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    module = read_back(model, exporter, Path(folder))
                    found: Any = dict(work(lowered(module, model.inputs[: len(module.inputs)])))
                except Exception as error:  # exporters do not take every model
                    found = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            print(name, exporter, found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
