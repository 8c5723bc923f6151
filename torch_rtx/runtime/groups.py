"""Process groups of an engine: bound by name where it is loaded, as its weights are.

The manifest has the size of each group, and the rank in it that the engine was built for, if that matters. A group is
one of torch.distributed; a DeviceMesh gives one per dimension, by the names of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torch_rtx.collectives import groups_of
from torch_rtx.errors import SettingsError
from torch_rtx.ir import Graph
from torch_rtx.manifest import Manifest

Groups = "Mapping[str, ProcessGroup] | DeviceMesh"
Places = Mapping[str, tuple[int, int]]  # by name of a group: the rank of this process in it, and its size


def named_groups(groups: Any) -> dict[str, Any]:
    """The process groups by name.

    Raises:
        SettingsError: `groups` is neither a mapping of process groups nor a mesh whose dimensions have names.
    """
    if groups is None:
        return {}
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        hint = "call torch.distributed.init_process_group first; torchrun starts the ranks"
        raise SettingsError("groups: this process belongs to no process group", hint=hint)
    if hasattr(groups, "mesh_dim_names"):  # a DeviceMesh, whose module need not be imported otherwise
        if not groups.mesh_dim_names:
            hint = 'init_device_mesh(..., mesh_dim_names=("tp",))'
            raise SettingsError("groups: the dimensions of the mesh have no names", hint=hint)
        return {name: groups.get_group(name) for name in groups.mesh_dim_names}
    found = dict(groups) if isinstance(groups, Mapping) else {"": groups}
    for name, group in found.items():
        if not isinstance(name, str) or not isinstance(group, torch.distributed.ProcessGroup):
            hint = 'pass groups={"tp": group}, or a DeviceMesh'
            raise SettingsError(f"groups: {name!r} is a {type(group).__name__}, not a process group", hint=hint)
    return found


def names_needed(graph: Graph, manifest: Manifest) -> list[str]:
    """The names of the groups that an engine needs: of its collectives, and of its shards of weights."""
    sharded = [name for one in manifest.shards.values() for name, _ in one["splits"]]
    return list(dict.fromkeys([*groups_of(graph), *sharded]))


def checked_groups(graph: Graph, manifest: Manifest, given: Any) -> dict[str, str]:
    """By the names in an engine, the names of the groups in this process.

    Raises:
        SettingsError: see `named_groups`; or a group that the engine needs is missing, or has another size, or this
            process another rank in it, than the engine was built for.
    """
    groups = named_groups(given)
    _check(graph, manifest, groups)
    return {name: group.group_name for name, group in groups.items()}


def _check(graph: Graph, manifest: Manifest, groups: Mapping[str, Any]) -> None:
    needed = names_needed(graph, manifest)
    missing = [name for name in needed if name not in groups]
    if missing:
        sizes = {name: manifest.groups.get(name, {}).get("size", "?") for name in missing}
        names = ", ".join(f"{name!r} of {size} ranks" for name, size in sizes.items())
        hint = f"load(..., groups={{{', '.join(f'{name!r}: group' for name in missing)}}})"
        raise SettingsError(f"the engine needs the process group {names}", hint=hint)
    for name, nodes in groups_of(graph).items():
        size = groups[name].size()
        wrong = [node for node in nodes if node.arg("group_size", size) != size]
        if wrong:
            found = wrong[0].arg("group_size")
            raise SettingsError(f"{wrong[0].op} is for {found} ranks, and the group {name!r} has {size}")
    for name in needed:
        built = manifest.groups.get(name)
        size, rank = groups[name].size(), groups[name].rank()
        if built is None:
            raise SettingsError(f"the engine does not say for how many ranks of {name!r} it was built")
        if built["size"] != size:
            hint = "build an engine for as many ranks as there are"
            raise SettingsError(f"the engine is for {built['size']} ranks of {name!r}, and there are {size}", hint=hint)
        if built["rank"] not in (None, rank):
            hint = "load the engine of this rank, or build one for all ranks with compile_ranks"
            raise SettingsError(f"the engine is for rank {built['rank']} of {name!r}, and this is {rank}", hint=hint)


def places_of(names: Mapping[str, str]) -> Places:
    """Where this process is in each group; `names`: those of the groups in this process, by those in the engine."""
    groups = {name: resolved(real) for name, real in names.items()}
    return {name: (group.rank(), group.size()) for name, group in groups.items()}


def resolved(name: str) -> Any:
    """The process group that has this name in this process."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def why_not_captured(graph: Graph) -> str | None:
    """Why no CUDA graph can have the collectives of `graph`; None if it may."""
    for name in groups_of(graph):
        try:
            backend = resolved(name)._get_backend(torch.device("cuda")).name()
        except RuntimeError:
            backend = "none for GPUs"
        if backend != "nccl":
            return f"the process group {name} runs on {backend}"
    return None
