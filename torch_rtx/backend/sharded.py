"""Models whose parameters are DTensors, as `parallelize_module` makes them: their capture, their groups and shards.

The graph of such a model computes with the parts of one rank, and has the collectives between them. A capture needs a
process group, but no other process: one of the backend `fake` stands for any number of ranks, without GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters
from torch.export._trace import _export
from torch.fx.experimental import _config as config
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

from torch_rtx.collectives import bound, groups_of
from torch_rtx.errors import CaptureError
from torch_rtx.ir import Graph
from torch_rtx.runtime.groups import resolved
from torch_rtx.runtime.subclasses import is_sharded

Json = Any
_SLOTS = ("_parameters", "_buffers", "_modules")


def is_divided(model: nn.Module) -> bool:
    """Whether a parameter or buffer of `model` is a DTensor."""
    return any(map(is_sharded, (*model.parameters(), *model.buffers())))


def export_divided(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> Any:
    """Export a model whose parameters are divided, in one step: the calls of DTensors become those of their parts while
    they are traced, as under torch.compile. A program that has calls of DTensors would lose what these keep beside
    their arguments, such as the mask of a lookup in a divided table. Calls that others than DTensors make are kept.

    DTensor asks of sizes whether they can be divided where they are not: it takes the way for any size, then.
    """
    with _of_parts(model), _EqualParts(), config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return _export(model, args, dict(kwargs or {}), dynamic_shapes, strict=False, pre_dispatch=False)


class _EqualParts(TorchFunctionMode):
    """Cuts what a gather over n ranks returns into n parts without asking how many there are: its size is n times
    another one, from which PyTorch can't tell the number for all sizes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`torch.chunk` of a dimension that is divided without rest, as the parts themselves."""
        if func in (torch.chunk, torch.Tensor.chunk):
            tensor, count, dim = _chunked(*args, **(kwargs or {}))
            size = tensor.shape[dim]
            if not isinstance(size, int) and statically_known_true(size % count == 0):
                return torch.split(tensor, [size // count] * count, dim)
        return func(*args, **(kwargs or {}))


def _chunked(input: Any, chunks: int, dim: int = 0) -> tuple[Any, int, int]:
    """The arguments of `torch.chunk`."""
    return input, chunks, dim


@contextmanager
def _of_parts(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `model` are plain tensors, of which it makes DTensors when it is called."""
    before = [(one, type(one), {key: dict(vars(one)[key]) for key in _SLOTS}) for one in model.modules()]
    try:
        unwrap_tensor_subclass_parameters(model)
        yield
    finally:
        for module, kind, slots in before:
            module.__class__ = kind
            vars(module).update(slots)


def group_names(state: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, str]:
    """By the name that a process group has in this process: the one that it has in an engine. That is its name in
    `groups`, or of the dimension of the mesh that a parameter in `state` is divided over.

    Raises:
        CaptureError: dimensions of two meshes have the same name, and are different groups.
    """
    found = {group.group_name: name for name, group in groups.items()}
    for tensor in filter(is_sharded, state.values()):
        for dim, name in enumerate(tensor.device_mesh.mesh_dim_names or ()):
            found.setdefault(tensor.device_mesh.get_group(dim).group_name, name)
    twice = [name for name in found.values() if list(found.values()).count(name) > 1]
    if twice:
        hint = 'name them: compile(..., groups={"tp": group, ...})'
        raise CaptureError(f"several process groups are called {twice[0]!r}", hint=hint)
    return found


def shards_of(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Json]:
    """By name of a parameter that is divided: how, see `runtime.shards`.

    Raises:
        CaptureError: an engine can't say how one is divided.
    """
    found = {}
    for name, tensor in state.items():
        if not is_sharded(tensor):
            continue
        splits = []
        for dim, placement in enumerate(tensor.placements):
            if type(placement).__name__ == "Replicate":
                continue
            if type(placement).__name__ != "Shard":
                problem = f"{name} is divided as {placement}"
                raise CaptureError(
                    problem, hint="an engine has parameters that are Shard or Replicate on each dimension"
                )
            group = tensor.device_mesh.get_group(dim).group_name
            splits.append([names.get(group, group), placement.dim % max(tensor.dim(), 1)])
        if splits:
            found[name] = {"shape": list(tensor.shape), "splits": splits}
    return found


def with_names(graph: Graph, names: Mapping[str, str], shards: Mapping[str, Json]) -> tuple[Graph, dict[str, Json]]:
    """`graph` with the names of groups that an engine has, and what its manifest says of these."""
    named = bound(graph, names)
    real = {new: old for old, new in names.items()}
    used = dict.fromkeys([*groups_of(named), *(name for one in shards.values() for name, _ in one["splits"])])
    facts = {}
    for name in used:
        group = resolved(real.get(name, name))
        facts[name] = {"size": group.size(), "rank": group.rank()}
    return named, facts
